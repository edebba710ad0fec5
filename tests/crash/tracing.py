"""
strace, attached to a process from within: its system calls are counted, fail, or kill it.

It needs nothing but Python and strace, and runs in the machine as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE_S = 60.0
_TRACER_NONE = "TracerPid:\t0\n"


def tracer(trace: Path, *, inject: str = "", count: str = "") -> Callable[[], None]:
    """
    Return what attaches strace to the process that calls it; nothing where nothing is wanted.

    *inject* is strace's own word, such as "pwrite64:signal=KILL:when=3"; *count* names the calls
    to be counted alone.  The calls are noted in the file *trace*.
    """
    if not inject and not count:
        return lambda: None
    wanted = ["-e", f"inject={inject}"] if inject else []
    names = inject.partition(":")[0] or count
    words = ["strace", "-qq", "-o", str(trace), "-e", f"trace={names}", *wanted, "-p"]

    def attach() -> None:
        traced = str(os.getpid())
        ready, told = os.pipe()
        _detached(lambda: os.execvpe("strace", [*words, traced], {"PATH": PATH}))
        _detached(lambda: _tell_when_traced(traced, told), told)
        os.close(told)
        # Of the calls that count none is made between here and the command.
        is_traced = os.read(ready, 1)
        os.close(ready)
        if not is_traced:
            raise RuntimeError("strace is not attached: is it installed, and may it trace?")

    return attach


def _detached(work: Callable[[], object], *keep: int) -> None:
    """Do something in a process that is nobody's child: a runner ends all that it finds."""
    middle = os.fork()
    if middle:
        os.waitpid(middle, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            for descriptor in range(3, 1024):
                if descriptor not in keep:
                    with suppress(OSError):
                        os.close(descriptor)
            work()
    finally:
        os._exit(0)


def _tell_when_traced(pid: str, told: int) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if _TRACER_NONE not in Path("/proc", pid, "status").read_text():
            os.write(told, b"!")
            break
        time.sleep(0.02)


def calls(trace: Path) -> Iterator[str]:
    """Return the names of the system calls in a trace."""
    for line in trace.read_text(errors="replace").splitlines():
        name, bracket, _ = line.partition("(")
        if bracket and name.isidentifier():
            yield name

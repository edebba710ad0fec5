"""
A command of the user's in a session of its own: started, limited, read, and ended with all of it.

It holds none of our locks, so that one that hangs keeps no recovery out.  What is left of its
session after a crash is found by its first process, or by marks in the environment: a daemon has
them too, and they tell that its session is another one.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import locks, process, system
from .errors import Interrupted
from .interrupts import Interrupts
from .output import Lines, Log
from .redact import Redactor
from .statedir import RunFolder
from .task import span
from .words import printable

if TYPE_CHECKING:
    from subprocess import Popen

GRACE_S = 10.0
_LOOK_S = 0.2
_READ_BYTES = 1 << 16
_LAST_READS = 17  # a pipe holds 1 MiB at most (pipe(7))
_WITHHELD_LINES = 10_000
_MARK, _SESSION = "ATOMTX_HOOK_ID", "ATOMTX_HOOK_SESSION"


class Sessions:
    """Runs the commands of one run's steps."""

    def __init__(self, folder: RunFolder, interrupts: Interrupts) -> None:
        self._folder = folder
        self._interrupts = interrupts
        self._withheld: list[str] | None = None  # lines of the log that may not be written yet
        self._pipes: list[object] = []  # of what a command left: it must not meet a closed one

    def hold_back(self) -> None:
        """Write no file until `write_out`: a command may freeze the file system of all of ours."""
        self._withheld = self._withheld or []

    def write_out(self) -> None:
        """Write what was held back; idempotent."""
        lines, self._withheld = self._withheld or [], None
        if lines:
            log = _LastLine(self._folder, Redactor({}), None)
            for line in lines:
                log.keep(line)
            log.close()

    def run(
        self,
        step: int,
        argv: tuple[str, ...],
        *,
        env: Mapping[str, str],
        cwd: str,
        limit_s: int = 0,
        stops: bool,
        secrets: Collection[str] = (),
        stop_signal: signal.Signals = signal.SIGTERM,
        grace_s: float | None = None,
        pass_fds: Sequence[int] = (),
    ) -> str | None:
        """
        Run a step's command to its end; return what is wrong with it, if anything.

        With *stops* a signal ends it, and Interrupted is raised.  *secrets* are the names of
        further variables whose values must not be seen.  It inherits the descriptors *pass_fds*.
        """
        env = {**env, _MARK: self._mark(step)}
        if self._withheld is None:
            self._folder.forget_hook(step)  # of an earlier start of the same step
        try:
            place = cwd if os.path.isdir(cwd) else "/"
            child = process.spawn_hook(
                argv, env=env, cwd=place, session=_SESSION, pass_fds=pass_fds
            )
        except (OSError, ValueError) as exc:  # ValueError: a NUL in a word
            return f"cannot start {argv[0]}: {getattr(exc, 'strerror', None) or exc}"
        if self._withheld is None:
            with suppress(OSError):  # a full disk: its mark tells as well which processes are its
                self._folder.write_hook(step, _identity(child.pid))
        log = _LastLine(self._folder, Redactor(env, secrets), self._withheld)
        try:
            in_time = self._watch(child, log, limit_s, stops=stops)
        except Interrupted:
            _end_session(child, stop_signal, GRACE_S if grace_s is None else grace_s)
            raise
        finally:
            log.close()
            self._pipes.append(child.stdout)
        if not in_time:
            _end_session(child, stop_signal, GRACE_S if grace_s is None else grace_s)
            return f"did not end within {span(limit_s)}"
        return _trouble(child.wait(), log.last)

    def _mark(self, step: int) -> str:
        return f"{self._folder.path.name}:{step}"

    def _watch(self, child: Popen[bytes], log: _LastLine, limit_s: int, *, stops: bool) -> bool:
        """Read what it prints until it has ended; False where *limit_s* passed before."""
        assert child.stdout
        end = time.monotonic() + limit_s if limit_s else None
        pidfd = system.here.watch(child.pid)
        os.set_blocking(child.stdout.fileno(), False)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(child.stdout, selectors.EVENT_READ)
                while True:
                    ready = {key.fd for key, _ in selector.select(_LOOK_S)}
                    if child.stdout.fileno() in ready and not log.read(child.stdout.fileno()):
                        selector.unregister(child.stdout)
                    if pidfd in ready:
                        break
                    if stops:
                        self._interrupts.check()
                    if end is not None and time.monotonic() >= end:
                        return False
            # What it left behind may keep the pipe open, and write, for ever.
            for _ in range(_LAST_READS):
                if not log.read(child.stdout.fileno()):
                    break
            return True
        finally:
            os.close(pidfd)

    def end_what_is_left(self, step: int) -> list[int]:
        """
        End what lives of a step's session, after a crash too; each process proven first.

        Return what cannot be ended.
        """
        known = self._folder.read_hook(step)
        mark = f"{_MARK}={self._mark(step)}"
        proven: dict[int, dict[str, Any]] = {}

        def is_proven(pid: int) -> bool:
            is_same = pid in proven and _identity(pid) == proven[pid]
            return is_same and system.here.session_of(pid) is not None

        def left() -> list[int]:
            for sid in _sessions_of_hook(known, mark):
                proven.update({pid: _identity(pid) for pid in _session(sid)})
            return list(filter(is_proven, proven))

        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in (alive := left()):
                locks.send(pid, number, if_still=is_proven)
            if not alive or locks.wait_until(lambda: not left(), GRACE_S):
                return []
        return left()


class _LastLine:
    """The log of the hooks, and the last line that one of them printed; redacted."""

    def __init__(self, folder: RunFolder, redactor: Redactor, withheld: list[str] | None) -> None:
        self._redactor = redactor
        self._withheld = withheld
        self._lines = Lines()
        self._log: Log | None = None
        if withheld is None:
            with suppress(OSError):  # a full disk loses the log, never the hook
                self._log = Log(folder.hooks_log, self._redactor)
        self.last = ""

    def read(self, descriptor: int) -> bool:
        """Take what is there; False at the end, or where there is nothing."""
        try:
            data = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        self._take(self._lines.feed(data) if data else self._lines.rest())
        return bool(data)

    def _take(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.last = printable(self._redactor.redact(line.strip()))[:300]
            self.keep(self._redactor.redact(line))

    def keep(self, line: str) -> None:
        """Write a line into the log, or withhold it, but for those of a chatty command."""
        if self._withheld is not None:
            if len(self._withheld) < _WITHHELD_LINES:
                self._withheld.append(line)
        elif self._log:
            self._log.line(line)

    def close(self) -> None:
        self._take(self._lines.rest())
        if self._log:
            self._log.close()


def _end_session(child: Popen[bytes], stop_signal: signal.Signals, grace_s: float) -> None:
    """End a command that is our child, with all of its session; one in the kernel's hands stays."""
    for number, wait_s in ((stop_signal, grace_s), (signal.SIGKILL, GRACE_S)):
        for pid in _session(child.pid):  # which is not reused before the child is waited for
            locks.send(pid, number, if_still=lambda p: system.here.session_of(p) == child.pid)
        if locks.wait_until(lambda: not _session(child.pid), wait_s):
            break
    locks.wait_until(lambda: child.poll() is not None, _LOOK_S)


def _trouble(status: int, last: str) -> str | None:
    if status == 0:
        return None
    how = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
    return f"{how}: {last}" if last else how


def _identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from any other: its pid, its start, the boot."""
    return {"pid": pid, "start": system.here.start_of(pid), "boot_id": locks.boot_id()}


def _session(sid: int) -> list[int]:
    return system.here.session(sid)


def _sessions_of_hook(known: Mapping[str, Any] | None, mark: str) -> set[int]:
    """
    Return the sessions that are proven a hook's: by its first process, or by one with its marks.

    Others of the session may have dropped their environment.  A number of a session is not used
    again while it has a process.
    """
    if known and _identity(int(known["pid"])) == known:
        return {int(known["pid"])}
    marked = {pid: sid for pid in system.here.marked(mark) if (sid := system.here.session_of(pid))}
    if known:
        return {int(known["pid"])}.intersection(marked.values())
    # Nothing could be written, or it was killed before.
    return {sid for sid in set(marked.values()) if _is_begun_as(sid, marked)}


def _is_begun_as(sid: int, marked: Mapping[int, int]) -> bool:
    """Tell whether a session is the one that a hook was started in, and not one of a daemon's."""
    its = {pid for pid, of in marked.items() if of == sid}
    return not its.isdisjoint(system.here.marked(f"{_SESSION}={sid}"))

"""
Tries mutants in forks of one process that has imported everything: that takes most of a trial.

    python -m tests.mutants.warm MODULE TEST-FILE...

On standard input a JSON object a line: {"source": the mutated module, "tests": pytest's
arguments, "timeout_s": ...}; on standard output the answer: {"status": ..., "out": ...}.  The code
of the functions that differ, and their defaults, are put into those that are there, so that every
process that is forked from this one has them; a program that is started anew has not.  Each trial
has a namespace of its own for processes and one for mounts, as in trial.py.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import os
import select
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_MS_REC, _MS_SLAVE, _MS_SHARED = 0x4000, 0x80000, 0x100000
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def main(module: str, *tests: str) -> None:
    """Answer requests until the input ends."""
    import pytest

    mutated = importlib.import_module(f"atomtx.{module}")
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    requests = os.fdopen(os.dup(0))
    os.dup2(null, 0)
    os.dup2(null, 1)
    # Imports the tests, and what they import; the forks collect them anew, from what is there.
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *tests])
    for line in requests:
        answers.write(json.dumps(_try(mutated, json.loads(line))) + "\n")
        answers.flush()


def _try(module: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out:
        pid = os.fork()
        if pid == 0:
            _confined(module, request, out.fileno())
        pidfd = os.pidfd_open(pid)
        ended = select.select([pidfd], [], [], request["timeout_s"])[0]
        if not ended:
            os.kill(pid, signal.SIGKILL)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        text = out.read().decode(errors="replace") if ended else "no end within the time"
    return {"status": status, "out": text}


def _confined(module: ModuleType, request: dict[str, Any], out: int) -> None:
    """Run the tests two forks further: below the first process of a new namespace, which reaps."""
    if _libc.unshare(_CLONE_NEWPID | _CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    first = os.fork()
    if first:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for flags in (_MS_REC | _MS_SLAVE, _MS_REC | _MS_SHARED):
        _libc.mount(b"none", b"/", None, ctypes.c_ulong(flags), None)
    _libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(0), None)
    tests = os.fork()
    if tests == 0:
        os.dup2(out, 1)
        os.dup2(out, 2)
        os._exit(_run(module, request))
    while True:
        pid, status = os.wait()
        if pid == tests:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _run(module: ModuleType, request: dict[str, Any]) -> int:
    import pytest

    mutated = _functions_of(module, request["source"])
    for function in _functions(module):
        other = mutated[function.__qualname__]
        function.__code__ = other.__code__
        function.__defaults__, function.__kwdefaults__ = other.__defaults__, other.__kwdefaults__
    status = 70
    with suppress(BaseException):
        status = int(pytest.main(request["tests"]))
    with suppress(Exception):
        sys.stdout.flush()
    return status


def _functions_of(module: ModuleType, source: str) -> dict[str, FunctionType]:
    """Return what *source* defines in the place of *module*, by qualified name."""
    other = ModuleType(module.__name__)
    other.__package__, other.__file__ = module.__package__, module.__file__
    exec(compile(source, str(module.__file__), "exec"), vars(other))
    return {function.__qualname__: function for function in _functions(other)}


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Yield the functions and methods that a module defines, undecorated."""
    owners = [module, *(v for v in vars(module).values() if inspect.isclass(v))]
    for owner in owners:
        for value in vars(owner).values():
            found = inspect.unwrap(getattr(value, "__func__", value))
            own = isinstance(found, FunctionType) and found.__module__ == module.__name__
            if own and Path(found.__code__.co_filename) == Path(str(module.__file__)):
                yield found


if __name__ == "__main__":
    main(*sys.argv[1:])

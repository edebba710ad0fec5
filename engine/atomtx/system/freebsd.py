"""
FreeBSD: processes by ps(1), fstat(1) and procstat(1), their ends by kqueue(2).

There is no pidfd: a process is signalled by its pid, after the proof, and after a watch that was
set before the proof told that it has not ended.  What the programs print is described in
docs/freebsd.md, with its sources.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .. import process
from ..errors import EffectError
from .shortage import outlast

NAME = "FreeBSD"
NAMESPACES = False
DESTROY_FORCES = True
LAYOUT = "tree"
TREE = "/atomtx"
STATE = "/var/db/atomtx"
RUN = Path("/var/run/atomtx")
CONFIGURATION = "/usr/local/etc/atomtx"
# /etc/machine-id is newer than 13: after an upgrade the machine is still the same one.
MACHINE_IDS: tuple[str, ...] = ("/etc/hostid", "/etc/machine-id")
# execve(2) takes 512 KiB of arguments and environment in all; `zfs program` has each name's
# guid and createtxg as well.
MAX_ARGUMENT_BYTES = 250_000
ZFS_HINTS = (
    "it is a part of FreeBSD: is /sbin in the PATH?",
    "`kldload zfs`, or `service zfs onestart`",
)
PIN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_MARK = "ATOMTX_TOKEN"
_P_PID, _PROC_REAP_ACQUIRE = 0, 2  # sys/wait.h, sys/procctl.h
_COLUMNS = ("pid", "ppid", "sid", "stat", "comm")  # the last one alone may have blanks
_BOOT_ID = re.compile(r"Dump:0x([0-9a-f]{32})\s*")
# USER CMD PID FD MOUNT INUM MODE SZ|DV R/W [NAME]; a command and a mount may have blanks.
_FSTAT = re.compile(
    r"\S+\s+(?P<command>.*?)\s+(?P<pid>\d+)\s+(?:\d+|[a-z]+)\*?\s+(?:/.*?|-)\s+\d+\s+"
    r"[-a-z]\S{9,10}\s+\d+(?:\s+(?P<rw>rw?|w))?(?:\s.*)?"
)

_libc = ctypes.CDLL(None, use_errno=True)
_select: Any = select  # kqueue(2) is not in the library of other systems


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    session: int
    state: str
    command: str


@cache
def boot_id() -> str:
    """
    Return kern.boot_id.

    It is opaque: sysctl(8) prints nothing of it without -x.
    """
    done = process.run(["sysctl", "-nx", "kern.boot_id"])
    match = _BOOT_ID.search(done.stdout)
    if not done.ok or match is None:
        raise done.error("cannot read the identity of this boot", hint="FreeBSD 14 is needed")
    return match[1]


# -- processes ---------------------------------------------------------------------------------


def _ps(*which: str) -> list[_Process]:
    # ps(1): all that follows "=" in one -o is a header, so each column has an option of its own.
    columns = [word for name in _COLUMNS for word in ("-o", f"{name}=")]
    return [_parsed(line) for line in _lines("ps", *which, "-ww", *columns)]


def _parsed(line: str) -> _Process:
    pid, parent, session, state, *command = line.split(None, len(_COLUMNS) - 1)
    return _Process(int(pid), int(parent), int(session), state, "".join(command).strip())


def _lines(*argv: str) -> list[str]:
    """Run a program that lists, and fails without a word where it finds nothing."""
    done = process.run(argv, cwd="/")
    if not done.ok and done.stderr.strip():
        raise done.error(f"{argv[0]} failed")
    return [line for line in done.stdout.splitlines() if line.strip()]


def _find(pid: int) -> _Process | None:
    return next(iter(_ps("-p", str(pid))), None)


def _everybody() -> list[_Process]:
    """Return every process but the `ps` that lists them."""
    mine = os.getpid()

    def is_the_list(each: _Process) -> bool:
        return (each.command, each.parent, each.session) == ("ps", mine, each.pid)

    return [each for each in _ps("-ax") if not is_the_list(each)]


def pids() -> list[int]:
    return [p.pid for p in _everybody()]


def command_of(pid: int) -> str | None:
    found = _find(pid)
    return found.command if found else None


def start_of(pid: int) -> str | None:
    # "Sat Nov 21 07:00:00 2026"; "-" of one that is swapped out, which is not the same as before.
    return next((line.strip() for line in _lines("ps", "-p", str(pid), "-o", "lstart=")), None)


def session_of(pid: int) -> int | None:
    found = _find(pid)
    return found.session if found and _lives(found) else None


def session(sid: int) -> list[int]:
    return [p.pid for p in _everybody() if p.session == sid and _lives(p)]


def _lives(found: _Process) -> bool:
    return "Z" not in found.state


def descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for each in _everybody():
        children.setdefault(each.parent, []).append(each.pid)
    found: list[int] = []

    def visit(pid: int) -> None:
        for child in children.get(pid, ()):
            visit(child)
            found.append(child)

    visit(os.getpid())
    return found


def become_reaper() -> None:
    arguments = (_P_PID, ctypes.c_int64(0), _PROC_REAP_ACQUIRE, None)
    if _libc.procctl(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "procctl(PROC_REAP_ACQUIRE)")


# -- what they have open -----------------------------------------------------------------------


def has_open(pid: int, path: Path, *, locked: bool) -> bool:
    return pid in openers(path, locked=locked)  # fstat fails for the pid of one that is gone


def openers(path: Path, *, locked: bool) -> list[int]:
    """
    Return who has a file open; with *locked* for writing.

    No program tells whose descriptor holds an flock(2): the mark that procstat(1) shows stays on
    one that only tried.  But a lock is taken through one that is open for writing, and looked at
    through one that is not (locks.py).
    """
    if not path.exists():
        return []
    found = [match for line in _lines("fstat", str(path)) if (match := parse_fstat(line))]
    return sorted({int(m["pid"]) for m in found if not locked or "w" in (m["rw"] or "")})


def lockers(tails: Collection[str]) -> dict[str, list[int]]:
    """Return none: fstat(1) finds a file by its path alone, and tells none of those it lists."""
    return {tail: [] for tail in tails}


def parse_fstat(line: str) -> re.Match[str] | None:
    """Match a line of fstat(1): the groups command, pid and rw; None for the header."""
    if line.startswith("USER "):
        return None
    match = _FSTAT.fullmatch(line)
    if match is None:
        raise EffectError(f"cannot understand what fstat says: {line!r}")
    return match


def users(paths: Iterable[str]) -> list[int]:
    """Return the processes that use a file system which is mounted at one of *paths*."""
    lines = _lines("fstat", "-f", *paths)
    return sorted({int(match["pid"]) for line in lines if (match := parse_fstat(line))})


# -- what they have in their environment -------------------------------------------------------


def client_mark(token: str) -> Mapping[str, str]:
    return {_MARK: token}


def marked(mark: str) -> list[int]:
    """
    Return the processes in whose environment *mark* stands.

    ps(1) shows arguments and environment as one, so each that it finds is proven by procstat(1).
    It encodes newlines: nobody can write the line of another process.
    """
    found = []
    for line in _lines("ps", "-axwwe", "-o", "pid=", "-o", "command="):
        pid, _, rest = line.strip().partition(" ")
        if _stands_in(mark, rest) and _has_mark(int(pid), mark):
            found.append(int(pid))
    return found


def _has_mark(pid: int, mark: str) -> bool:
    done = process.run(["procstat", "-h", "-e", str(pid)])  # it fails where the process is gone
    return done.ok and _stands_in(mark, done.stdout)


def _stands_in(mark: str, text: str) -> bool:
    return mark in text.split()


# -- their ends --------------------------------------------------------------------------------


def watch(pid: int) -> int:
    return outlast(lambda: _watch(pid))


def _watch(pid: int) -> int:
    queue = _select.kqueue()
    try:
        names = ("KQ_FILTER_PROC", "KQ_EV_ADD", "KQ_NOTE_EXIT")
        queue.control([_select.kevent(pid, *(getattr(_select, n) for n in names))], 0)
        return os.dup(queue.fileno())
    finally:
        queue.close()


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()  # select(2) takes no descriptor above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def send(pid: int, signum: signal.Signals, *, if_still: Callable[[int], bool]) -> bool:
    try:
        descriptor = watch(pid)
    except ProcessLookupError:
        return False
    try:
        if not if_still(pid) or _has_ended(descriptor):
            return False
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True

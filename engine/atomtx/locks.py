"""
The kernel's locks F, R and C of a run, and who holds them.

    F  front.lock    the front end, and the `zfs` commands that it starts
    R  runner.lock   the runner alone
    C  client.lock   the client and its descendants

flock(2) belongs to the open file description: it is held as long as any process has it open,
however the others died.  Lock files are never unlinked while their run is in the journal.  A
recorded pid is for messages only.  Processes are ended through a pidfd that was opened before
the proof that they are the run's.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_GLANCE_S = 0.1  # `is_held` takes the lock, shared, for an instant: not to be taken for a holder


@dataclass(frozen=True)
class Process:
    """A living process, for messages: who it is and what it runs."""

    pid: int
    command: str

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, command_of(pid) or "?")

    def __str__(self) -> str:
        return f"{self.pid} ({self.command})"


def boot_id() -> str:
    """Return the identity of this boot of the machine (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def try_acquire(path: Path) -> int | None:
    """
    Take the lock, hardly waiting: a descriptor that holds it, close-on-exec, or None if held.

    The file must exist; close the descriptor to release.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if wait_until(lambda: _lock(descriptor, fcntl.LOCK_EX), _GLANCE_S, step_s=0.01):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: Path) -> bool:
    """Tell whether any process holds the lock; a file that is not there is held by nobody."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


@contextmanager
def acquired(path: Path) -> Iterator[int | None]:
    """Hold the lock for a block; None inside where somebody else holds it."""
    descriptor = try_acquire(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def holders(path: Path) -> list[Process]:
    """
    Return the processes, other than this one, that hold the lock, inherited or not.

    One that only looks at it, as `atomtx status` does, is none.
    """
    try:
        target = os.stat(path)
    except FileNotFoundError:
        return []
    others = (pid for pid in pids() if pid != os.getpid())
    return [Process.of(pid) for pid in others if _has_open(pid, target, locked=True)]


def pids() -> list[int]:
    """Return every process that /proc shows."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def command_of(pid: int) -> str | None:
    """Return a process's short name (proc(5), comm), or None if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None


def _has_open(pid: int, target: os.stat_result, *, locked: bool = False) -> bool:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # gone, or another user's
        return False
    for name in names:
        with suppress(OSError):  # closed in between
            info = os.stat(f"/proc/{pid}/fd/{name}")
            same = (info.st_dev, info.st_ino) == (target.st_dev, target.st_ino)
            if same and (not locked or _is_locked(pid, name)):
                return True
    return False


def _is_locked(pid: int, descriptor: str) -> bool:
    """Tell whether an exclusive flock(2) is on a descriptor: proc(5), fdinfo, "lock:"."""
    text = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()
    return any("FLOCK" in line and "WRITE" in line for line in text.splitlines())


def holds(pid: int, path: Path) -> bool:
    """Tell whether process *pid* holds the lock, inherited or not."""
    try:
        return _has_open(pid, os.stat(path), locked=True)
    except FileNotFoundError:
        return False


def has_lock_open(pid: int, path: Path) -> bool:
    """Tell whether process *pid* has the lock's file open."""
    try:
        return _has_open(pid, os.stat(path))
    except FileNotFoundError:
        return False


def send(pid: int, signum: signal.Signals, *, if_still: Callable[[int], bool]) -> bool:
    """
    Signal a process through a pidfd, after *if_still* proved that it is the one meant.

    The pidfd is opened first, so a reused pid cannot be hit.  False if it is gone or another.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not if_still(pid):
            return False
        signal.pidfd_send_signal(descriptor, signum)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until a process has ended, child or not; False when *timeout_s* passed first."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def wait_until(condition: Callable[[], bool], timeout_s: float, *, step_s: float = 0.05) -> bool:
    """Poll *condition* until it is true; False when *timeout_s* passed first."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(step_s)
    return True

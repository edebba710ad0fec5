"""
The kernel's locks F, R and C of a run, and who holds them.

    F  front.lock    the front end, and the `zfs` and LVM commands that it starts, `ssh` and `zstd`
    R  runner.lock   the runner alone
    C  client.lock   the client and its descendants

flock(2) belongs to the open file description: it is held as long as any process has it open,
however the others died.  Lock files are never unlinked while their run is in the journal.  A
recorded pid is for messages only.  How a process is found and signalled: system/.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import system

# They are waited for, never stopped: a half-made change is worse than a late one.  `ssh` and `zstd`
# feed a `zfs receive`, and end soon after their front end: their input has ended with it, and ssh
# gives up by ServerAliveInterval where the far machine does not answer.
COMMANDS = frozenset(
    (
        *("zfs", "zpool", "mount", "mount_nullfs", "umount"),
        *("lvs", "vgs", "lvcreate", "lvchange", "lvremove", "dmsetup"),
        *("thin_check", "cache_check"),  # of LVM's, where a pool is activated: for minutes
        *("ssh", "zstd"),
    )
)
_GLANCE_S = 0.1  # `is_held` takes the lock, shared, for an instant: not to be taken for a holder
_LOOKER_S = 5.0  # who looks may be stopped meanwhile, or not be given the processor


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
    """Return the identity of this boot of the machine."""
    return system.here.boot_id()


def try_acquire(path: Path) -> int | None:
    """
    Take the lock, hardly waiting: a descriptor that holds it, close-on-exec, or None if held.

    Where nobody holds it, and somebody looks at it, that is waited for, some seconds.  The file
    must exist; close the descriptor to release.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if wait_until(lambda: try_lock(descriptor, fcntl.LOCK_EX), _GLANCE_S, step_s=0.01):
        return descriptor
    if _outlast_lookers(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _outlast_lookers(path: Path, descriptor: int) -> bool:
    """Take a lock as soon as nobody looks at it; False where somebody holds it, or looks on."""
    end = time.monotonic() + _LOOKER_S
    while not is_held(path) and time.monotonic() < end:
        if try_lock(descriptor, fcntl.LOCK_EX):
            return True
        time.sleep(_GLANCE_S)
    return False


def try_lock(descriptor: int, kind: int) -> bool:
    """Lock an open file, LOCK_EX or LOCK_SH, without waiting; False where somebody keeps us out."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: Path) -> bool:
    """Tell whether any process holds the lock; a file that is not there is held by nobody."""
    try:
        # Not for writing: that tells who holds it from who looks, where nothing else does.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor, fcntl.LOCK_SH)
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
    found = system.here.openers(path, locked=True)
    return [Process.of(pid) for pid in found if pid != os.getpid()]


def command_of(pid: int) -> str | None:
    """Return a process's short name, or None if it is gone."""
    return system.here.command_of(pid)


def holds(pid: int, path: Path) -> bool:
    """Tell whether process *pid* holds the lock, inherited or not."""
    return system.here.has_open(pid, path, locked=True)


def has_lock_open(pid: int, path: Path) -> bool:
    """Tell whether process *pid* has the lock's file open."""
    return system.here.has_open(pid, path, locked=False)


def send(pid: int, signum: signal.Signals, *, if_still: Callable[[int], bool]) -> bool:
    """
    Signal a process, after *if_still* proved that it is the one meant.

    False if it is gone or another.
    """
    return system.here.send(pid, signum, if_still=if_still)


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until a process has ended, child or not; False when *timeout_s* passed first."""
    try:
        descriptor = system.here.watch(pid)
    except ProcessLookupError:
        return True
    try:
        return is_readable(descriptor, timeout_s)
    finally:
        os.close(descriptor)


def is_readable(descriptor: int, timeout_s: float) -> bool:
    """Wait until a descriptor can be read; False when *timeout_s* passed first."""
    poll = select.poll()  # select(2) takes none above 1023, as many as a parent may leave open
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def wait_until(condition: Callable[[], bool], timeout_s: float, *, step_s: float = 0.05) -> bool:
    """Poll *condition* until it is true; False when *timeout_s* passed first."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(step_s)
    return True

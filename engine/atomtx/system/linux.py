"""
Linux: processes by proc(5), each ended through a pidfd that was opened before the proof.

Mounts of a run are made in a mount namespace of its own: `mounts/namespace.py`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .shortage import outlast

NAME = "Linux"
NAMESPACES = True
DESTROY_FORCES = False
LAYOUT = "namespace"
TREE = ""
STATE = "/var/lib/atomtx"
RUN = Path("/run/atomtx")
CONFIGURATION = "/etc/atomtx"
MACHINE_IDS: tuple[str, ...] = ("/etc/machine-id", "/etc/hostid")
# execve(2) takes 2 MiB of arguments and environment in all by default.
MAX_ARGUMENT_BYTES = 1_900_000
ZFS_HINTS = (
    "install zfsutils-linux (Debian, Ubuntu)",
    "`modprobe zfs`, or install zfs-dkms",
)
PIN = getattr(os, "O_PATH", 0) | os.O_DIRECTORY | os.O_CLOEXEC

_PR_SET_CHILD_SUBREAPER = 36


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # random(4)


def pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def command_of(pid: int) -> str | None:
    # Any bytes: prctl(2), PR_SET_NAME; execve(2) cuts it at 15 of them, even inside a letter.
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def openers(path: Path, *, locked: bool) -> list[int]:
    try:
        target = os.stat(path)
    except FileNotFoundError:
        return []
    return [pid for pid in pids() if _has_open(pid, path.name, target, locked=locked)]


def has_open(pid: int, path: Path, *, locked: bool) -> bool:
    try:
        return _has_open(pid, path.name, os.stat(path), locked=locked)
    except FileNotFoundError:
        return False


def _has_open(pid: int, called: str, target: os.stat_result, *, locked: bool) -> bool:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # gone, or another user's
        return False
    for name in names:
        with suppress(OSError):  # closed in between
            # stat(2) of what lies on a server that is gone hangs, readlink(2) here never.
            if os.path.basename(os.readlink(f"/proc/{pid}/fd/{name}")) != called:
                continue
            info = os.stat(f"/proc/{pid}/fd/{name}")
            same = (info.st_dev, info.st_ino) == (target.st_dev, target.st_ino)
            if same and (not locked or _is_locked(pid, name)):
                return True
    return False


def lockers(tails: Collection[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {tail: [] for tail in tails}
    for pid in pids() if tails else ():
        locked = _locked(pid, tuple(tails))
        for tail in {tail for path in locked for tail in tails if path.endswith(tail)}:
            found[tail].append(pid)
    return found


def _locked(pid: int, tails: tuple[str, ...]) -> Iterator[str]:
    with suppress(OSError):  # gone, or another user's
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # closed in between
                # proc(5): a file that was removed meanwhile is told so.
                path = os.readlink(f"/proc/{pid}/fd/{name}").removesuffix(" (deleted)")
                if path.endswith(tails) and _is_locked(pid, name):
                    yield path


def _is_locked(pid: int, descriptor: str) -> bool:
    """Tell whether an exclusive flock(2) is on a descriptor: proc(5), fdinfo, "lock:"."""
    text = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()
    return any("FLOCK" in line and "WRITE" in line for line in text.splitlines())


def watch(pid: int) -> int:
    try:
        return outlast(lambda: os.pidfd_open(pid))
    except OSError as exc:
        # It is gone, and its number is a group's or a session's still, or a thread's by now.
        if exc.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from exc


def send(pid: int, signum: signal.Signals, *, if_still: Callable[[int], bool]) -> bool:
    try:
        descriptor = watch(pid)
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


def _stat(pid: int) -> list[str]:
    """Return proc(5)'s stat of a process from its state on; nothing where it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
    return []


def start_of(pid: int) -> str | None:
    stat = _stat(pid)
    return stat[19] if stat else None


def session_of(pid: int) -> int | None:
    stat = _stat(pid)
    return int(stat[3]) if stat and stat[0] not in "ZX" else None


def session(sid: int) -> list[int]:
    return [pid for pid in pids() if session_of(pid) == sid]


def marked(mark: str) -> list[int]:
    return [pid for pid in pids() if _has_mark(pid, mark)]


def _has_mark(pid: int, mark: str) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return mark.encode() in file.read().split(b"\0")
    return False


def client_mark(token: str) -> Mapping[str, str]:
    """Return none: the run's namespace tells its processes (mounts/inhabitants.py)."""
    return {}


def become_reaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _children(pid: int, task: str) -> list[int]:
    with suppress(OSError):  # the thread is gone, and its children are another one's
        return [*map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())]
    return []


def descendants() -> list[int]:
    found: list[int] = []

    def visit(pid: int) -> None:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                for child in _children(pid, task):
                    visit(child)
                    found.append(child)

    visit(os.getpid())
    return found

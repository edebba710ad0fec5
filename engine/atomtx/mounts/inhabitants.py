"""Who lives in a run's mount namespace, and who else has a snapshot of it mounted."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress

from .. import locks
from . import mountinfo
from .namespace import identity


def of(token: str) -> list[int]:
    """
    Return the processes whose mount namespace is the one of the run with *token*.

    It shows the marker, a mount with the token as its source.  A mounted snapshot of the run
    would prove nothing: what somebody mounts on the host, or looks at in `.zfs/snapshot`, is
    seen in the namespace of every service as well, and these processes are ended.
    """
    return [
        pid
        for pids, table in _foreign_namespaces()
        if any(entry.source == token for entry in table)
        for pid in pids
    ]


def mounted(snapshots: Collection[str]) -> list[str]:
    """Return who has one of *snapshots* mounted, in words: process, command, mountpoint."""
    wanted = frozenset(snapshots)
    found = [
        f"{entry.mountpoint} (in the namespace of {_name(pids[0])})"
        for pids, table in _foreign_namespaces()
        for entry in table
        if entry.source in wanted
    ]
    return [e.mountpoint for e in mountinfo.read() if e.source in wanted] + found


def using(mountpoints: Collection[str]) -> list[str]:
    """Return who has a file open, or stands, below one of *mountpoints* of this namespace."""
    places = tuple(point.rstrip("/") + "/" for point in mountpoints)
    found = []
    for process in locks.processes():
        for link in _links(process.pid):
            if (link + "/").startswith(places):
                found.append(f"{link} (by {process})")
                break
    return found


def _links(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for name in ("cwd", "root"):
            yield os.readlink(f"/proc/{pid}/{name}")
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{name}")


def _foreign_namespaces() -> Iterator[tuple[list[int], mountinfo.Table]]:
    """Yield the mount table of each namespace that is not ours, with who lives there."""
    groups: dict[tuple[int, int], list[int]] = {}
    for process in locks.processes():
        with suppress(OSError):  # gone
            groups.setdefault(identity(process.pid), []).append(process.pid)
    groups.pop(identity(), None)
    for pids in groups.values():
        for pid in pids:  # the first may have ended meanwhile
            with suppress(OSError):
                yield pids, mountinfo.read(pid)
                break


def _name(pid: int) -> str:
    return str(locks.Process(pid, locks.command_of(pid) or "?"))

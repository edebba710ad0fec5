"""Who lives in a run's mount namespace, and who else uses a snapshot of it: for messages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import locks, system
from ..names import is_within, mounted_as
from . import mountinfo
from .namespace import identity

_MOUNT_ID = re.compile(rb"^mnt_id:\t(\d+)$", re.MULTILINE)


def of(token: str) -> list[int]:
    """Return the processes of one run, as `of_each` does those of several."""
    return of_each((token,))[token]


def of_each(tokens: Collection[str]) -> dict[str, list[int]]:
    """
    Return by each of *tokens* the processes whose mount namespace is the one of the run with it.

    Without namespaces: those that have the mark of the run's client in their environment.

    It shows the marker, a mount with the token as its source.  A mounted snapshot of the run
    would prove nothing: what somebody mounts on the host, or looks at in `.zfs/snapshot`, is
    seen in the namespace of every service as well, and these processes are ended.  For the same
    reason a mount with the token as its source that we see ourselves makes the marker worthless.
    """
    if not system.here.NAMESPACES:
        return {token: _marked(token) for token in tokens}
    asked = {*tokens} - {entry.source for entry in mountinfo.read()}
    found: dict[str, list[int]] = {token: [] for token in tokens}
    for pids, table in _foreign_namespaces() if asked else ():
        for token in asked & {entry.source for entry in table}:
            found[token] += pids
    return found


def _marked(token: str) -> list[int]:
    marks = (f"{name}={value}" for name, value in system.here.client_mark(token).items())
    return [pid for mark in marks for pid in system.here.marked(mark)]


def mounted(sources: Collection[str]) -> list[str]:
    """
    Return where *sources* are mounted, in words; in a foreign namespace with who lives there.

    Of btrfs also where a directory or a file of one is.  A foreign mount that follows one of ours
    goes with it, and is not told.
    """
    things = frozenset(map(mounted_as, sources))
    here = [entry for entry in mountinfo.read() if _shows(entry, things)]
    peers = {group for entry in here for group in _groups(entry)}
    found = [
        f"{entry.mountpoint} (in the namespace of {_name(pids[0])})"
        for pids, table in _foreign_namespaces()
        for entry in table
        if _shows(entry, things) and not peers & _groups(entry)
    ]
    return [entry.mountpoint for entry in here] + found


def _shows(entry: mountinfo.Entry, things: Collection[str]) -> bool:
    """
    Tell whether a mount shows one of *things*, or a part of it.

    A bind mount of a directory has the source of the whole; of btrfs it has the path of that
    directory, and is emptied with the snapshot.
    """
    if entry.fstype != "btrfs":
        return entry.thing in things
    return any(path in things for path in mountinfo.prefixes(entry.thing))


def _groups(entry: mountinfo.Entry) -> set[str]:
    """Return the peer groups from which or to which a mount propagates: mount_namespaces(7)."""
    return {word.partition(":")[2] for word in entry.propagation if ":" in word}


def users(sources: Collection[str], points: Collection[str] = ()) -> list[str]:
    """
    Return who uses *sources*, wherever they are mounted, or what is mounted at *points*, in words.

    "open by 1234 (tail) at /mnt/x/log", with the first file of each process.  Nothing is opened
    or asked for its status there: that might hang.
    """
    if not system.here.NAMESPACES:
        from . import nullfs

        return [f"used by {locks.Process.of(pid)}" for pid in nullfs.users(sources)]
    places = _Places.of(sources, points)
    found = [_use(pid, places) for pid in system.here.pids()] if places.ids else []
    return [words for words in found if words]


@dataclass(frozen=True)
class _Places:
    """The mounts of some sources in all namespaces."""

    ids: frozenset[int]  # of the mounts: unique in the whole system
    devices: frozenset[str]  # as /proc/PID/maps writes them: "00:2f"
    points: dict[tuple[int, int], tuple[str, ...]]  # by namespace

    @classmethod
    def of(cls, sources: Collection[str], at: Collection[str] = ()) -> _Places:
        tables = [(identity(), mountinfo.read())]
        for pids, table in _foreign_namespaces():
            with suppress(OSError):  # gone
                tables.append((identity(pids[0]), table))
        things = frozenset(map(mounted_as, sources))
        used = [
            (space, e)
            for space, table in tables
            for e in table
            if _shows(e, things) or e.mountpoint in at
        ]
        points: dict[tuple[int, int], tuple[str, ...]] = {}
        for space, entry in used:
            points[space] = (*points.get(space, ()), entry.mountpoint)
        return cls(
            ids=frozenset(entry.id for _, entry in used),
            # All subvolumes of a btrfs have one device there, and what is read live has that of
            # the live mount: it would be everybody's files.
            devices=frozenset(
                _as_in_maps(e.dev) for _, e in used if e.fstype != "btrfs" and _shows(e, things)
            ),
            points=points,
        )


def _as_in_maps(device: str) -> str:
    major, _, minor = device.partition(":")
    return f"{int(major):02x}:{int(minor):02x}"


def _use(pid: int, places: _Places) -> str | None:
    looks: tuple[tuple[str, Callable[[int, _Places], Iterator[str]]], ...] = (
        ("open by {} at {}", _opened),
        ("{} stands in {}", _stood_in),
        ("mapped by {} from {}", _mapped),
    )
    for words, look in looks:
        with suppress(OSError):  # it has ended, or is another user's
            for path in look(pid, places):
                return words.format(locks.Process.of(pid), path)
    return None


def _opened(pid: int, places: _Places) -> Iterator[str]:
    """Yield the files that are open on one of our mounts: proc(5), fdinfo, "mnt_id:"."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # closed in between
            if _mount_of(Path(f"/proc/{pid}/fdinfo/{name}").read_bytes()) in places.ids:
                yield os.readlink(f"/proc/{pid}/fd/{name}")


def _mount_of(fdinfo: bytes) -> int | None:
    """Return the mount that an open file is on; below it may stand any bytes, as names do."""
    found = _MOUNT_ID.search(fdinfo)
    return int(found[1]) if found else None


def _stood_in(pid: int, places: _Places) -> Iterator[str]:
    points = places.points.get(identity(pid), ())
    for name in ("cwd", "root"):
        path = os.readlink(f"/proc/{pid}/{name}")
        if any(is_within(path, point) for point in points):
            yield path


def _mapped(pid: int, places: _Places) -> Iterator[str]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.rstrip("\n").split(None, 5)
            if len(words) == 6 and words[3] in places.devices:
                yield words[5]


def _foreign_namespaces() -> Iterator[tuple[list[int], mountinfo.Table]]:
    """Yield the mount table of each namespace that is not ours, with who lives there."""
    if not system.here.NAMESPACES:
        return
    groups: dict[tuple[int, int], list[int]] = {}
    for pid in system.here.pids():
        with suppress(OSError):  # gone
            groups.setdefault(identity(pid), []).append(pid)
    groups.pop(identity(), None)
    for pids in groups.values():
        for pid in pids:  # the first may have ended meanwhile
            with suppress(OSError):
                yield pids, mountinfo.read(pid)
                break


def _name(pid: int) -> str:
    return str(locks.Process.of(pid))

"""
The kernel's table of mounts, on Linux `/proc/PID/mountinfo`, and which of them a path is on.

Paths given to the functions are absolute and normal; they are the names that the process sees
whose table it is.
"""

from __future__ import annotations

import re
import select
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property

from .. import system

_READS = 20  # of a table that changes all the time
DELETED = "//deleted"  # fs/d_path.c
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")


@dataclass(frozen=True)
class Entry:
    """One mount; see proc_pid_mountinfo(5)."""

    id: int
    parent: int
    dev: str  # "major:minor"
    root: str  # what of the file system is mounted: "/" is all of it
    mountpoint: str
    options: str
    propagation: tuple[str, ...]  # such as "shared:1", "master:3"; empty for a private mount
    fstype: str
    source: str
    super_options: str

    @property
    def thing(self) -> str:
        """
        Return what is mounted, in one word: its source; of btrfs the path in the file system.

        Every subvolume of a btrfs has the same source, which is any one of its devices.
        """
        return self.root.removesuffix(DELETED) if self.fstype == "btrfs" else self.source

    @property
    def is_deleted(self) -> bool:
        """Tell whether what is mounted was deleted since: it is seen as an empty directory."""
        return self.root.endswith(DELETED)


class Table(tuple[Entry, ...]):
    """All mounts of one process, in the kernel's order, with indexes that are made once."""

    @cached_property
    def _root(self) -> Entry | None:
        """
        The mount that a path walk starts from.

        A mount over "/" itself is not walked into: it is seen only by who enters it by chroot(2).
        """
        ids = {entry.id for entry in self if entry.id != entry.parent}
        at_root = [entry for entry in self if entry.mountpoint == "/"]
        lowest = [entry for entry in at_root if entry.parent not in ids]
        return next(iter(lowest or at_root), None)

    @cached_property
    def _children(self) -> dict[tuple[int, str], Entry]:
        """The mount on each mountpoint of each mount: one at most, the kernel stacks them."""
        return {(e.parent, e.mountpoint): e for e in self if e.id != e.parent}

    @cached_property
    def _orphans(self) -> dict[str, Entry]:
        """The mounts whose parent is not shown: in a chroot to a plain directory."""
        ids = {entry.id for entry in self}
        return {e.mountpoint: e for e in self if e.parent not in ids and e is not self._root}

    @cached_property
    def _visible(self) -> tuple[tuple[str, ...], tuple[Entry, ...]]:
        """The mounts that are not hidden, sorted by mountpoint, and their mountpoints."""
        found = sorted(
            (e for e in self if self.containing(e.mountpoint) is e), key=lambda e: e.mountpoint
        )
        return tuple(entry.mountpoint for entry in found), tuple(found)

    def containing(self, path: str) -> Entry | None:
        """Return the mount that *path* is on, as the kernel walks: down the stacked mounts."""
        here = self._root
        for prefix in prefixes(path):
            if here is None:
                here = self._orphans.get(prefix)
            while here and (above := self._children.get((here.id, prefix))):
                here = above
        return here

    def topmost(self, mountpoint: str) -> Entry | None:
        """Return the mount that is seen exactly at *mountpoint*; None where there is none."""
        entry = self.containing(mountpoint)
        return entry if entry and entry.mountpoint == mountpoint else None

    def visible_below(self, mountpoint: str) -> tuple[Entry, ...]:
        """Return the mounts that are seen strictly below *mountpoint*, parents first."""
        mountpoints, entries = self._visible
        prefix = mountpoint.rstrip("/") + "/"
        first = bisect_left(mountpoints, prefix)
        last = bisect_left(mountpoints, prefix[:-1] + "0")  # "0" follows "/"
        return tuple(e for e in entries[first:last] if e.mountpoint != mountpoint)

    def without_echoes(self) -> Table:
        """
        Leave out mounts of a directory over itself, which show what is seen there anyway.

        The sandbox of a systemd service is made of them (ProtectHome=, ReadWritePaths=, ...);
        they hide nothing, and a snapshot of what is below them has what they show.
        """
        known = {entry.id: entry for entry in self}
        gone: dict[int, int] = {}
        kept = []
        for entry in self:
            entry = replace(entry, parent=gone.get(entry.parent, entry.parent))
            if _is_echo(entry, known.get(entry.parent)):
                gone[entry.id] = entry.parent
            else:
                kept.append(entry)
        return Table(kept)


def _is_echo(entry: Entry, parent: Entry | None) -> bool:
    if parent is None or parent.id == entry.id or entry.dev != parent.dev:
        return False
    below = entry.mountpoint.removeprefix(parent.mountpoint.rstrip("/"))
    return entry.mountpoint != parent.mountpoint and entry.root == parent.root.rstrip("/") + below


def parse(data: bytes) -> Table:
    """Read the bytes of a mountinfo file; a ValueError for what is not one."""
    # Not splitlines(): the kernel escapes blanks, newlines and backslashes, but not "\r".
    return Table(_entry(line) for line in data.split(b"\n") if line)


def read(pid: int | str = "self") -> Table:
    """
    Read the table of a process; an OSError where it is gone, or /proc is not there.

    The kernel hands out a long one in parts: it is read anew where it has changed meanwhile, as
    poll(2) tells, because a mount of one part may hang where nothing of the other is any more.
    Where there is only one table it is that of everybody (nullfs.py).
    """
    if not system.here.NAMESPACES:
        from . import nullfs

        return nullfs.read()
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        changes = select.poll()
        changes.register(file, select.POLLPRI)
        for _ in range(_READS):
            file.seek(0)
            data = file.read()
            if not changes.poll(0):
                break
    return parse(data)


class Changes:
    """
    Tells of changes of this process's table: *descriptor* is readable once after some.

    Of those since it was registered: each look at it, as that one is, takes back what there was to
    tell (measured with Linux 6.18).  proc_pid_mountinfo(5): a change is an event of
    priority, which epoll(7) passes on as one to be read.  -1 where the system tells of none.
    """

    def __init__(self) -> None:
        self.descriptor = -1
        if system.here.NAMESPACES:
            self._table = open("/proc/self/mountinfo", "rb")  # noqa: SIM115, as long as it tells
            self._events = select.epoll()
            self._events.register(self._table, select.EPOLLPRI)
            self.descriptor = self._events.fileno()


def things() -> frozenset[str]:
    """Return what is mounted somewhere that this process sees."""
    return frozenset(entry.thing for entry in read())


def containing(table: Table, path: str) -> Entry | None:
    """Return the mount that *path* is on."""
    return table.containing(path)


def topmost(table: Table, mountpoint: str) -> Entry | None:
    """Return the mount seen exactly at *mountpoint*; None where none is, or it is hidden."""
    return table.topmost(mountpoint)


def visible_below(table: Table, mountpoint: str) -> tuple[Entry, ...]:
    """Return the mounts seen strictly below *mountpoint*, parents first."""
    return table.visible_below(mountpoint)


def _entry(line: bytes) -> Entry:
    words = line.split(b" ")
    if b"-" not in words[6:]:
        raise ValueError(f"not a line of mountinfo: {line!r}")
    end = words.index(b"-", 6)  # after any number of optional fields; a source may be empty
    identity, parent, dev, root, mountpoint, options = map(_text, words[:6])
    fstype, source, super_options = _text(words[end + 1]), _text(words[end + 2]), words[end + 3 :]
    return Entry(
        int(identity),
        int(parent),
        dev,
        root,
        mountpoint,
        options,
        tuple(map(_text, words[6:end])),
        fstype,
        source,
        _text(b" ".join(super_options)),
    )


def _text(field: bytes) -> str:
    plain = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
    return plain.decode("utf-8", "surrogateescape")


def prefixes(path: str) -> list[str]:
    """List the names that a walk from "/" to *path* passes: /a, /a/b, /a/b/c."""
    ends = [i for i, char in enumerate(path) if char == "/" and i > 0]
    return [path[:end] for end in ends] + ([path] if path != "/" else [])

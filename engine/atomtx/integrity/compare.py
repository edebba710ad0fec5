"""Two entries, or two generations of a tree, to differences in words.  Pure."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from ..words import size as size_words
from .entry import Entry, State, unpack

# What --ignore takes.
PROPERTIES = (
    *("type", "mode", "owner", "group", "size", "time", "ctime", "inode"),
    *("target", "xattrs", "contents"),
)
ELSEWHERE_TOO = frozenset(("ctime", "inode"))  # what a restored tree cannot have
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Kind(StrEnum):
    """What can be said of a path, from the worst to the best."""

    CHANGED = "changed"
    MISSING = "missing"
    EXTRA = "extra"
    UNREADABLE = "unreadable"  # now, so it was not compared
    UNVERIFIED = "unverified"  # it was not readable then


IS_DIFFERENCE = frozenset((Kind.CHANGED, Kind.MISSING, Kind.EXTRA))


@dataclass(frozen=True)
class Difference:
    """One property that differs; *before* and *after* in words, empty where there are none."""

    property: str
    before: str = ""
    after: str = ""
    note: str = ""

    def __str__(self) -> str:
        values = f" {self.before} -> {self.after}" if self.before or self.after else ""
        return f"{self.property}{values}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Finding:
    """What is to be said of one path."""

    kind: Kind
    path: bytes
    differences: tuple[Difference, ...] = field(default=())
    reason: str = ""

    def words(self) -> str:
        """Say it, without the path."""
        said = ", ".join(map(str, self.differences)) or self.reason
        return f"{self.kind}: {said}" if said else str(self.kind)


def differences(
    old: Entry, new: Entry, ignore: Collection[str] = ELSEWHERE_TOO
) -> tuple[Difference, ...]:
    """
    Return how *new* differs from *old*.

    The contents of a regular file are compared where both were read, else never.
    """
    if old.type != new.type:
        found: Iterable[Difference] = [Difference("type", old.type, new.type)]
    else:
        found = _of_one_type(old, new, ignore)
    return tuple(each for each in found if each.property not in ignore)


def _of_one_type(old: Entry, new: Entry, ignore: Collection[str]) -> Iterator[Difference]:
    if old.type == "file":
        yield from _contents(old, new, ignore)
        if old.size != new.size:
            yield Difference("size", str(old.size), str(new.size), _sizes(old, new))
    if old.target != new.target:
        before, after = (_text(each.target) for each in (old, new))
        yield Difference("target", before, after)
    # A link has no mode of its own on Linux.
    if old.type != "link" and stat.S_IMODE(old.mode) != stat.S_IMODE(new.mode):
        before, after = (f"{stat.S_IMODE(each.mode):04o}" for each in (old, new))
        yield Difference("mode", before, after)
    if old.uid != new.uid:
        yield Difference("owner", str(old.uid), str(new.uid))
    if old.gid != new.gid:
        yield Difference("group", str(old.gid), str(new.gid))
    if old.mtime != new.mtime:
        yield Difference("time", time_words(old.mtime), time_words(new.mtime))
    if old.ctime != new.ctime:
        yield Difference("ctime", time_words(old.ctime), time_words(new.ctime))
    if old.inode != new.inode:
        yield Difference("inode", str(old.inode), str(new.inode))
    yield from _xattrs(old, new)


def _contents(old: Entry, new: Entry, ignore: Collection[str]) -> Iterator[Difference]:
    if old.digest is None or new.digest is None or old.digest == new.digest:
        return
    silent = old.size == new.size and old.mtime == new.mtime and not {"size", "time"} & set(ignore)
    note = "though size and time are the same: damage?" if silent else ""
    yield Difference("contents", note=note)


def _xattrs(old: Entry, new: Entry) -> Iterator[Difference]:
    if old.xattrs == new.xattrs:
        return
    before, after = unpack(old.xattrs), unpack(new.xattrs)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            what = "removed" if name not in after else "changed" if name in before else "added"
            yield Difference("xattrs", note=f"{_text(name)} {what}")


def _sizes(old: Entry, new: Entry) -> str:
    """Return the sizes for people, where they are not small."""
    if max(old.size, new.size) < 10_000:
        return ""
    return f"{size_words(old.size)}, {size_words(new.size)}"


def _text(value: bytes | None) -> str:
    return "nothing" if value is None else value.decode("utf-8", "backslashreplace")


def time_words(nanoseconds: int) -> str:
    """Return a time in UTC with all of its digits; as a number where no calendar has it."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    try:
        then = _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return f"{nanoseconds} ns"
    return f"{then:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def judge(
    path: bytes, old: Entry | None, new: Entry | None, ignore: Collection[str]
) -> Iterator[Finding]:
    """Say what became of one path; what could not be read is said, and the rest compared."""
    if old is None:
        yield Finding(Kind.EXTRA, path)
        return
    if new is None:
        yield Finding(Kind.MISSING, path)
        return
    # What was noted then is the root of the other file system, not what lies below it.
    is_other = old.state == State.ELSEWHERE != new.state and old.type == new.type
    if State.UNREADABLE in (old.state, new.state):  # perhaps nobody read these
        ignore = {*ignore, "target", "xattrs"}
    is_unknown = old.is_unknown or new.is_unknown
    found = () if is_other or is_unknown else differences(old, new, ignore)
    if found:
        yield Finding(Kind.CHANGED, path, found)
    if new.state == State.UNREADABLE:
        yield Finding(Kind.UNREADABLE, path, reason=new.error or "")
    elif old.state == State.UNREADABLE:
        yield Finding(Kind.UNVERIFIED, path, reason=f"it was not readable then: {old.error}")
    elif new.state == State.ELSEWHERE != old.state:
        yield Finding(Kind.UNREADABLE, path, reason="another file system is mounted there")
    elif old.state == State.ELSEWHERE != new.state:
        yield Finding(Kind.UNVERIFIED, path, reason="another file system was mounted there then")


def hides(entry: Entry | None) -> bool:
    """Tell whether an entry is, or may be, a directory of which nobody knows what is below it."""
    if entry is None:
        return False
    return entry.is_unknown or (entry.is_directory and entry.state >= State.UNREADABLE)

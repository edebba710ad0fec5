"""Two entries to differences in words: every property is found, named, and can be left out."""

from __future__ import annotations

import stat
from typing import Any

import pytest

from atomtx.integrity.compare import (
    ELSEWHERE_TOO,
    PROPERTIES,
    Kind,
    differences,
    judge,
    time_words,
)
from atomtx.integrity.entry import Entry, State, pack

FILE = Entry(
    b"a", stat.S_IFREG | 0o644, 1, 2, 3, 4, 5, 6, None, pack({b"user.x": b"x" * 32}), b"d" * 32
)
LINK = FILE._replace(mode=stat.S_IFLNK | 0o777, target=b"there", digest=None)
DEVICE = FILE._replace(mode=stat.S_IFBLK | 0o600, target=b"8,1", digest=None)
UNKNOWN = Entry(b"a", 0, 0, 0, 0, 0, 0, 0, state=State.UNREADABLE, error="EACCES")
CHANGES: dict[str, tuple[Entry, dict[str, Any]]] = {
    "type": (FILE, {"mode": stat.S_IFIFO | 0o644}),
    "mode": (FILE, {"mode": stat.S_IFREG | 0o4755}),
    "owner": (FILE, {"uid": 9}),
    "group": (FILE, {"gid": 9}),
    "size": (FILE, {"size": 9}),
    "time": (FILE, {"mtime": 9}),
    "ctime": (FILE, {"ctime": 9}),
    "inode": (FILE, {"inode": 9}),
    "target": (LINK, {"target": b"elsewhere"}),
    "xattrs": (FILE, {"xattrs": pack({b"user.x": b"y" * 32})}),
    "contents": (FILE, {"digest": b"e" * 32}),
}


def test_all_properties() -> None:
    """The table below has every property that can be ignored."""
    assert tuple(CHANGES) == PROPERTIES


@pytest.mark.parametrize("name", PROPERTIES)
def test_each_property(name: str) -> None:
    """A change of one property is named as that one, and nothing else is."""
    entry, change = CHANGES[name]
    assert [each.property for each in differences(entry, entry._replace(**change), ())] == [name]
    assert differences(entry, entry, ()) == ()


@pytest.mark.parametrize("name", PROPERTIES)
def test_ignored(name: str) -> None:
    """A property that is left out is not compared."""
    entry, change = CHANGES[name]
    assert differences(entry, entry._replace(**change), {name}) == ()


def test_restored() -> None:
    """What a restored tree cannot have is not compared by default."""
    assert {"ctime", "inode"} == ELSEWHERE_TOO
    assert differences(FILE, FILE._replace(ctime=9, inode=9)) == ()


def test_device() -> None:
    """A device with other numbers is another one."""
    assert [each.property for each in differences(DEVICE, DEVICE._replace(target=b"8,2"))] == [
        "target"
    ]


def test_values() -> None:
    """The values before and after are told."""
    new = FILE._replace(mode=stat.S_IFREG | 0o600, uid=7, mtime=1_500_000_000)
    assert list(map(str, differences(FILE, new))) == [
        "mode 0644 -> 0600",
        "owner 1 -> 7",
        "time 1970-01-01T00:00:00.000000004Z -> 1970-01-01T00:00:01.500000000Z",
    ]


def test_xattr_names() -> None:
    """Each attribute that was added, changed or removed is named."""
    old = FILE._replace(xattrs=pack({b"user.a": b"1" * 32, b"user.b": b"1" * 32}))
    new = FILE._replace(xattrs=pack({b"user.b": b"2" * 32, b"user.c": b"2" * 32}))
    assert [each.note for each in differences(old, new)] == [
        "user.a removed",
        "user.b changed",
        "user.c added",
    ]


def test_silent_damage() -> None:
    """Other contents with the same size and time are called what they may be."""
    (silent,) = differences(FILE, FILE._replace(digest=b"e" * 32))
    assert "damage?" in silent.note
    loud = differences(FILE, FILE._replace(digest=b"e" * 32, mtime=9))[0]
    assert loud.note == ""


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (None, FILE, [Kind.EXTRA]),
        (FILE, None, [Kind.MISSING]),
        (FILE, FILE, []),
        (FILE, FILE._replace(uid=9), [Kind.CHANGED]),
        (FILE, FILE._replace(state=State.UNREADABLE, digest=None), [Kind.UNREADABLE]),
        (FILE._replace(state=State.UNREADABLE, digest=None), FILE, [Kind.UNVERIFIED]),
        (
            FILE,
            FILE._replace(state=State.UNREADABLE, digest=None, uid=9),
            [Kind.CHANGED, Kind.UNREADABLE],
        ),
        (FILE, UNKNOWN, [Kind.UNREADABLE]),
        (UNKNOWN, FILE, [Kind.UNVERIFIED]),
        (LINK, LINK._replace(state=State.UNREADABLE, target=None), [Kind.UNREADABLE]),
        (FILE._replace(state=State.UNREADABLE, xattrs=None), FILE, [Kind.UNVERIFIED]),
        (FILE, FILE._replace(state=State.ELSEWHERE), [Kind.UNREADABLE]),
        (FILE._replace(state=State.ELSEWHERE), FILE, [Kind.UNVERIFIED]),
        (FILE._replace(state=State.ELSEWHERE), FILE._replace(state=State.ELSEWHERE), []),
        (FILE._replace(state=State.RACY), FILE, []),
    ],
)
def test_kinds(old: Entry | None, new: Entry | None, kinds: list[Kind]) -> None:
    """What could not be read, now or then, is never taken for the same."""
    assert [finding.kind for finding in judge(b"a", old, new, ELSEWHERE_TOO)] == kinds


def test_time_without_calendar() -> None:
    """A time that no calendar has is told as a number, and is no traceback."""
    assert time_words(-(1 << 63)).startswith("1677")
    assert time_words(10**21).endswith(" ns")

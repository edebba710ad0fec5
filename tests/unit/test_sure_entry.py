"""An entry's properties: what a database can hold, and git's racy-clean rule."""

from __future__ import annotations

import os
import stat
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.integrity.entry import Entry, is_racy, pack, shown, stat_of, unpack

STARTED = 1_700_000_000_123_456_789
S, MS = 1_000_000_000, 1_000_000


def info(**values: int) -> os.stat_result:
    """Return a stat with these values."""
    old = {"st_mtime_ns": STARTED - 60 * S, "st_ctime_ns": STARTED - 60 * S}
    file = {"st_mode": stat.S_IFREG, "st_uid": 0, "st_gid": 0, "st_size": 1, "st_ino": 2}
    return cast("os.stat_result", SimpleNamespace(**{**old, **file, **values}))


@pytest.mark.parametrize(
    ("mtime", "ctime", "racy"),
    [
        pytest.param(-60 * S, -60 * S, False, id="old"),
        pytest.param(0, -60 * S, True, id="mtime-of-the-start"),
        pytest.param(-60 * S, 0, True, id="ctime-of-the-start"),
        pytest.param(-60 * S, 5 * S, True, id="changed-during-the-scan"),
        pytest.param(-60 * S, -10 * MS, True, id="a-tick-before"),
        pytest.param(-60 * S, -S, False, id="a-second-before"),
        pytest.param(3600 * S, -60 * S, True, id="mtime-in-the-future"),
    ],
)
def test_racy(mtime: int, ctime: int, racy: bool) -> None:
    """A file whose mtime or ctime is not a tick older than the scan is racy."""
    assert is_racy(info(st_mtime_ns=STARTED + mtime, st_ctime_ns=STARTED + ctime), STARTED) is racy


@pytest.mark.parametrize(("seconds", "racy"), [(0, True), (1, True), (2, False), (3, False)])
def test_whole_seconds_racy(seconds: int, racy: bool) -> None:
    """Where the file system counts in whole seconds, two of them must have passed."""
    whole = (STARTED // S - seconds) * S
    assert is_racy(info(st_ctime_ns=whole), STARTED) is racy


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        ({"st_mtime_ns": 1 << 64}, (1 << 63) - 1),
        ({"st_mtime_ns": -(1 << 64)}, -(1 << 63)),
    ],
)
def test_time_limits(given_: dict[str, int], kept: int) -> None:
    """A time that no 64 bits of nanoseconds hold is set to the limit, and is no error."""
    assert stat_of(info(**given_))[4] == kept


def test_inode_limits() -> None:
    """An inode number of 64 bits stays distinct, and fits into SQLite's signed integers."""
    assert stat_of(info(st_ino=(1 << 64) - 1))[6] == -1
    assert stat_of(info(st_ino=(1 << 63) - 1))[6] == (1 << 63) - 1


def test_stat_order() -> None:
    """The stat of an entry is what `stat_of` returns: one field swapped would hide changes."""
    values = stat_of(info(st_uid=3, st_gid=4, st_size=5, st_ino=8))
    entry = Entry(b"a", *values)
    assert entry.stat == values
    assert (entry.uid, entry.gid, entry.size, entry.inode) == (3, 4, 5, 8)


NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)


@given(st.dictionaries(NAMES, st.binary(min_size=32, max_size=32), max_size=5))
def test_pack(xattrs: dict[bytes, bytes]) -> None:
    """Packed attributes are read back, whatever bytes their digests have."""
    assert unpack(pack(xattrs)) == xattrs


@given(st.sets(st.binary(min_size=1, max_size=6), min_size=2, max_size=2))
def test_shown(paths: set[bytes]) -> None:
    """Two paths are never shown alike, and none drives a terminal."""
    one, other = (shown(path) for path in paths)
    assert one != other or b"." in paths
    assert (one + other).isprintable()

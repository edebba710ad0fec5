"""The choice of power cuts: every mark is known to the cuts after it, and none to those before."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.extent import spread
from tests.vm.points import MARK
from tests.vm.powercut import (
    DISK_BYTES,
    MARKS,
    PARTITIONS,
    Cut,
    Record,
    Tally,
    partition_table,
)
from tests.vm.writelog import SECTOR


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A record of ten times: a write elsewhere, a flush, a mark."""
    marks_at = PARTITIONS[MARKS - 1][0] // SECTOR
    parts = [struct.pack("<QQQI", 0x6A736677736872, 1, 30, SECTOR).ljust(SECTOR, b"\0")]
    for n in range(10):
        mark = (MARK + f"point {n}".encode()).ljust(SECTOR, b"\0")
        for start, flags, data in ((9000 + n, 0, mark), (0, 1, b""), (marks_at, 0, mark)):
            head = struct.pack("<QQQQ", start, len(data) // SECTOR, flags, 0)
            parts += [head.ljust(SECTOR, b"\0"), data]
    (tmp_path / "log").write_bytes(b"".join(parts))
    return Record(tmp_path)


def test_marks(record: Record) -> None:
    """A mark counts from the request after it, and only what was written to the marks' place."""
    assert [mark.position for mark in record.marks] == list(range(3, 31, 3))
    assert record.marks_before(Cut(2, "lost", 0)) == []
    assert record.marks_before(Cut(3, "lost", 0)) == ["point 0"]
    assert record.marks_before(Cut(30, "lost", 0)) == [f"point {n}" for n in range(10)]


def test_every_mark_is_tried(record: Record) -> None:
    """With enough cuts each mark has one that loses all and one at random; others lie between."""
    cuts = record.cuts(random.Random(1), at_marks=99, others=9)
    places = {mark.position for mark in record.marks}
    for kind in ("lost", "random"):
        assert places <= {cut.position for cut in cuts if cut.kind == kind}
    assert len(cuts) == 29
    assert {3 <= cut.position <= 30 for cut in cuts} == {True}
    assert {cut.kind for cut in cuts} == {"lost", "random", "kept"}


def test_sample_is_spread(record: Record) -> None:
    """A small sample has one in each part of the record, and the same one for the same seed."""
    for seed in range(50):
        cuts = record.cuts(random.Random(seed), at_marks=2, others=0)
        assert [cut.position <= 15 for cut in cuts] == [True, True, False, False]
        assert cuts == record.cuts(random.Random(seed), at_marks=2, others=0)
    assert spread(random.Random(1), 3, 5) == [0, 1, 2]


def test_partitions() -> None:
    """The table names three partitions that follow each other and end with the disk."""
    table = partition_table()
    assert (len(table), table[510:]) == (SECTOR, b"\x55\xaa")
    ends = [start + size for start, size in PARTITIONS]
    assert [start for start, _ in PARTITIONS[1:]] == ends[:-1]
    assert ends[-1] == DISK_BYTES
    first = struct.unpack_from("<II", table, 446 + 8)
    assert first == (PARTITIONS[0][0] // SECTOR, PARTITIONS[0][1] // SECTOR)


def test_tally() -> None:
    """A tally counts cuts, what came of them, and names the cut of each violation."""
    tally = Tally("here")
    tally.add(Cut(1, "lost", 2), "whole", [])
    tally.add(Cut(3, "lost", 4), "lost", ["one", "two"])
    assert tally.row() == {
        "where": "here",
        "cuts": 2,
        "violations": 2,
        "outcomes": {"whole": 1, "lost": 1},
    }
    assert tally.violations[0] == "Cut(position=3, kind='lost', seed=4): one"

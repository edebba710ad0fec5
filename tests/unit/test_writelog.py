"""The replay of a disk's writes: what was flushed is there, what was not may be lost or torn."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.vm.writelog import (
    SECTOR,
    WriteLog,
    WriteLogError,
    at_random,
    kept,
    lost,
    write_image,
)

FLUSH, FUA, DISCARD = 1, 2, 4


def sectors(letter: str, count: int = 1) -> bytes:
    return letter.encode() * SECTOR * count


def make_log(path: Path, *requests: tuple[int, bytes, int]) -> WriteLog:
    """Write a log of (sector, data, flags) as the format says, and read it."""
    parts = [struct.pack("<QQQI", 0x6A736677736872, 1, len(requests), SECTOR).ljust(SECTOR, b"\0")]
    for start, data, flags in requests:
        head = struct.pack("<QQQQ", start, len(data) // SECTOR, flags, 0)
        parts += [head.ljust(SECTOR, b"\0"), data]
    path.write_bytes(b"".join(parts))
    return WriteLog(path)


@pytest.fixture
def log(tmp_path: Path) -> WriteLog:
    """A write, a flush, a write of four sectors, a forced write, a flush."""
    return make_log(
        tmp_path / "log",
        (0, sectors("a"), 0),
        (0, b"", FLUSH),
        (1, sectors("b", 4), 0),
        (8, sectors("c"), FUA),
        (0, b"", FLUSH),
    )


def letters(log: WriteLog, position: int, fate: object = lost) -> str:
    """Return the disk after a cut, one letter a sector."""
    disk = bytearray(b"." * SECTOR * 9)
    for offset, data in log.left(position, fate):  # type: ignore[arg-type]
        disk[offset : offset + len(data)] = data
    return disk[::SECTOR].decode()


@pytest.mark.parametrize(
    ("position", "left"),
    [
        (0, "........."),
        (1, "........."),  # written, not flushed
        (2, "a........"),
        (3, "a........"),
        (4, "a.......c"),  # forced, but what came before it is not
        (5, "abbbb...c"),
    ],
)
def test_unflushed_is_lost(log: WriteLog, position: int, left: str) -> None:
    """Where the cache wrote nothing by itself, only what was flushed or forced is there."""
    assert letters(log, position) == left


def test_cache_that_wrote(log: WriteLog) -> None:
    """A cache may have written everything that it had: then nothing is lost."""
    assert [letters(log, n, kept) for n in (1, 3)] == ["a........", "abbbb...."]


def test_torn(log: WriteLog) -> None:
    """Seeds reach every fate of an unflushed write: whole, absent, torn at either end."""
    seen = {letters(log, 3, at_random(random.Random(seed))) for seed in range(500)}
    tails = {"b...", "bb..", "bbb.", "...b", "..bb", ".bbb"}
    assert seen == {f"a{tail}...." for tail in tails | {"....", "bbbb"}}


def test_spared(log: WriteLog) -> None:
    """What is written to an area that is spared is there at once; all else is as it was."""
    spared = range(1 * SECTOR, 3 * SECTOR)
    disk = dict(log.left(3, lost, spared))
    assert {offset // SECTOR for offset in disk} == {0, 1}
    assert {offset // SECTOR for offset, _ in log.left(1, lost, spared)} == set()


def test_seed_repeats(log: WriteLog) -> None:
    """The same seed gives the same disk."""
    for seed in range(20):
        one, two = (letters(log, 3, at_random(random.Random(seed))) for _ in range(2))
        assert one == two


def test_overwritten(tmp_path: Path) -> None:
    """Of a sector that was written twice the later write counts, or the earlier one if lost."""
    log = make_log(
        tmp_path / "log", (0, sectors("a"), 0), (0, b"", FLUSH), (0, sectors("b"), 0)
    )  # fmt: skip
    assert [letters(log, 3, fate)[0] for fate in (lost, kept)] == ["a", "b"]


def test_flush_with_data(tmp_path: Path) -> None:
    """A write that bears a flush flushes what came before it, not itself."""
    log = make_log(tmp_path / "log", (0, sectors("a"), 0), (1, sectors("b"), FLUSH))
    assert letters(log, 2) == "a........"


def test_image(log: WriteLog, tmp_path: Path) -> None:
    """An image is as long as the disk, begins with what was there, and forgets the last one."""
    image = tmp_path / "image"
    for position in (5, 2):
        write_image(image, b"mbr", 10 * SECTOR, log.left(position, lost))
    assert image.stat().st_size == 10 * SECTOR
    assert image.read_bytes()[::SECTOR] == b"a" + bytes(9)
    write_image(image, b"mbr", 10 * SECTOR, [])
    assert image.read_bytes() == b"mbr".ljust(10 * SECTOR, b"\0")


def test_not_a_log(tmp_path: Path) -> None:
    """A file that is no log, a request that no replay knows, and a hole are refused."""
    (tmp_path / "zeros").write_bytes(bytes(4096))
    with pytest.raises(WriteLogError, match="not a log"):
        WriteLog(tmp_path / "zeros")
    with pytest.raises(WriteLogError, match="0x4"):
        make_log(tmp_path / "log", (0, sectors("a"), DISCARD))
    with pytest.raises(WriteLogError, match="hole"):
        make_log(tmp_path / "log", (0, sectors("a"), 0), (0, b"", 0), (0, b"", FLUSH))

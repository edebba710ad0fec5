"""
What a disk with a volatile write cache may hold when the power is cut.

A disk acknowledges a write when it is in the disk's cache.  Only a flush, or a write with FUA
("force unit access"), promises that it survives a power cut; the disk may write the rest in any
order, in part, or not at all.  Programs that forget a flush work until the first power cut.

:class:`WriteLog` reads the order in which a disk got its writes and its flushes, as qemu's driver
`blklogwrites` records it, in the format of Linux' dm-log-writes; `left` says what a cut leaves.

A write counts as flushed when the disk got it before the flush.  A real disk may owe less: only
the writes that it had acknowledged by then.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512  # what a disk writes whole or not at all
# https://www.kernel.org/doc/html/latest/admin-guide/device-mapper/log-writes.html
_MAGIC = 0x6A736677736872
_VERSION = 1
_SUPER = struct.Struct("<QQQI")  # magic, version, entries, sector size
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, length of a mark
_FLUSH, _FUA = 1, 2


class WriteLogError(Exception):
    """A log that is not what it should be."""


@dataclass(frozen=True)
class Entry:
    """One request: what it wrote, if anything, and whether it flushed what came before it."""

    offset: int  # on the disk, in bytes
    length: int
    data_at: int  # in the log
    flush: bool
    fua: bool


# How much of an unflushed write of so many sectors is on the disk: its first sector and its end.
Fate = Callable[[int], tuple[int, int]]


def lost(sectors: int) -> tuple[int, int]:
    """Nothing of it: a cache that wrote nothing of its own accord."""
    return 0, 0


def kept(sectors: int) -> tuple[int, int]:
    """All of it: as if the disk had no cache."""
    return 0, sectors


def at_random(rng: random.Random) -> Fate:
    """Each write whole, torn between two sectors, or not at all; how many, *rng* says too."""
    whole = rng.choice((0.1, 0.5, 0.9))
    torn = rng.choice((0.0, 0.1, 0.5))

    def fate(sectors: int) -> tuple[int, int]:
        if rng.random() < torn and sectors > 1:
            cut = rng.randrange(1, sectors)
            return rng.choice(((0, cut), (cut, sectors)))
        return kept(sectors) if rng.random() < whole else lost(sectors)

    return fate


class WriteLog:
    """The requests that a disk got, in their order; up to the last flush."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.entries = list(self._read())

    def _read(self) -> Iterator[Entry]:
        magic, version, count, sector = _SUPER.unpack_from(self._map)
        if (magic, version) != (_MAGIC, _VERSION):
            raise WriteLogError("not a log of writes")
        at = sector
        for _ in range(count):
            start, sectors, flags, mark = _ENTRY.unpack_from(self._map, at)
            if flags & ~(_FLUSH | _FUA) or mark:
                raise WriteLogError(f"a request that a replay does not know: flags {flags:#x}")
            if not sectors and not flags & _FLUSH:
                raise WriteLogError("a hole: what was written here is not known")
            at += sector
            length = sectors * sector
            yield Entry(start * sector, length, at, bool(flags & _FLUSH), bool(flags & _FUA))
            at += length

    def data(self, entry: Entry) -> bytes:
        """Return what a request wrote."""
        return self._map[entry.data_at : entry.data_at + entry.length]

    def flushed(self, position: int) -> int:
        """Return how many of the first *position* requests the last flush among them covers."""
        flushes = (n for n in range(position - 1, -1, -1) if self.entries[n].flush)
        return next(flushes, 0)

    def left(
        self, position: int, fate: Fate, spared: range = range(0)
    ) -> Iterator[tuple[int, bytes]]:
        """
        Yield what of the first *position* requests is on the disk after a cut, and where.

        Later ones lie over earlier ones.  *fate* is asked about each write that no flush covers,
        but for those that begin at an offset of *spared*.
        """
        flushed = self.flushed(position)
        for n, entry in enumerate(self.entries[:position]):
            if not entry.length:
                continue
            data = self.data(entry)
            if n < flushed or entry.fua or entry.offset in spared:
                yield entry.offset, data
                continue
            first, end = fate(entry.length // SECTOR)
            if first < end:
                yield entry.offset + first * SECTOR, data[first * SECTOR : end * SECTOR]


def write_image(path: Path, blank: bytes, size: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Make the file at *path* that disk: *blank* at its start, then zeros, then the *pieces*."""
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        file.truncate(0)
        file.truncate(size)
        file.write(blank)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)

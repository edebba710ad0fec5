"""
Power cuts: a disk of the machine that records its writes, and one that holds what a cut left.

`recorded` plugs empty disks into the running machine, and qemu logs each write and flush of one
in order; `writelog` then builds what a disk with a volatile cache may hold at any moment
of the record, and `CutDisk` gives that to the machine as another disk.  The record has marks: what
a program in the machine wrote to the disk's first partition to say what had happened (see
points.py).  As they lie among the other writes, each cut knows what was acknowledged before it.

A saved state cannot be loaded into a machine with more disks than it had.  So all of this happens
in a block of `plugged`, which ends with a new qemu at the saved state 'clean'.

`ATOMTX_CRASH=full` tries every mark and many more moments; `ATOMTX_CRASH_SEED` others.
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.extent import spread
from tests.vm.machine import Machine
from tests.vm.points import MARK
from tests.vm.remote import atomtx
from tests.vm.writelog import SECTOR, Fate, WriteLog, at_random, kept, lost, write_image

HERE = Path(__file__).parent
GUEST = "/root/power_guest.py"
MIB = 1 << 20
# The disk's partitions, each (start, size): marks, an ext4 file system, a pool.
PARTITIONS = ((1 * MIB, 1 * MIB), (2 * MIB, 128 * MIB), (130 * MIB, 512 * MIB))
MARKS, FILES, POOL = 1, 2, 3
DISK_BYTES = 642 * MIB
SEED = int(os.environ.get("ATOMTX_CRASH_SEED", "1"))


def partition_table() -> bytes:
    """Return the disk's first sector: an MBR."""
    sector = bytearray(SECTOR)
    for n, (start, size) in enumerate(PARTITIONS):
        entry = (0, bytes(3), 0x83, bytes(3), start // SECTOR, size // SECTOR)
        struct.pack_into("<B3sB3sII", sector, 446 + 16 * n, *entry)
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


LINKS = "/dev/power"
# udev's own links come one by one, go for a while whenever a disk is written and closed, and
# once did not come in a minute.
LINK = """
until disk=$(grep -lx {name} /sys/block/*/serial); do sleep 0.1; done
disk=$(basename $(dirname $disk))
mkdir -p {links} /power && ln -sfn /dev/$disk {links}/{name}
for n in {numbers}; do
    until test -b /dev/$disk$n; do sleep 0.1; done
    ln -sfn /dev/$disk$n {links}/{name}-part$n
done
"""


def partition(disk: str, number: int) -> str:
    """Return the device of a partition in the machine, for a disk that was plugged in."""
    return f"{LINKS}/{disk}-part{number}"


def plug(vm: Machine, name: str, image: Path, log: Path | None = None) -> None:
    """Plug the raw *image* into the running machine, each request to it written to *log*."""
    unsafe = {"no-flush": True}  # of the host: what counts is what the log says

    def file(path: Path) -> dict[str, Any]:
        return {"driver": "file", "filename": str(path), "cache": unsafe}

    if log is None:
        vm.qmp("blockdev-add", **{"driver": "raw", "node-name": name, "file": file(image)})
    else:
        driver = {"driver": "blklogwrites", "file": file(image), "log": file(log)}
        vm.qmp("blockdev-add", **{"node-name": name, **driver})
    device = {"driver": "virtio-blk-pci", "id": name, "drive": name, "serial": name}
    # The log has no words for the first two that a replay could trust.  Of a request that qemu
    # merged from 1024 pieces it keeps a hole: with its own header that is more than IOV_MAX.
    options = {"discard": "off", "write-zeroes": "off", "request-merging": "off"}
    options["write-cache"] = "on"
    vm.qmp("device_add", **device, **options)
    numbers = " ".join(str(n + 1) for n in range(len(PARTITIONS)))
    vm.run(LINK.format(name=name, links=LINKS, numbers=numbers), timeout=60)


def fresh(vm: Machine) -> None:
    """Start another qemu at the saved state 'clean'."""
    vm.power_off_hard()
    vm.boot(load="clean")


@contextmanager
def plugged(vm: Machine) -> Iterator[None]:
    """Let the block plug disks in, and take them all out again."""
    put_programs(vm)
    try:
        yield
    finally:
        fresh(vm)


@contextmanager
def recorded(vm: Machine, folder: Path) -> Iterator[None]:
    """
    Plug in an empty disk under the folder's name and record its writes there for the block.

    At the block's end nothing may have it mounted: the record must be all that was written.
    """
    folder.mkdir()
    write_image(folder / "disk", partition_table(), DISK_BYTES, ())
    (folder / "log").touch()
    plug(vm, folder.name, folder / "disk", folder / "log")
    yield
    # The log counts its entries at a flush; fsync(2) of a disk flushes it.
    vm.run(f"sync {partition(folder.name, MARKS)}")
    log = WriteLog(folder / "log")
    pieces = log.left(len(log.entries), kept)
    write_image(folder / "cut", partition_table(), DISK_BYTES, pieces)
    same = filecmp.cmp(folder / "disk", folder / "cut", shallow=False)
    assert same, "the record is not the disk"


def put_programs(vm: Machine) -> None:
    """Put what runs in the machine there; the saved state does not have it."""
    for source in (HERE / "power_guest.py", HERE.parent / "runs.py"):
        vm.put(source, "/root/")


@dataclass(frozen=True)
class Mark:
    """What was acknowledged once the first *position* requests had reached the disk."""

    position: int
    text: str


@dataclass(frozen=True)
class Cut:
    """A moment, and what becomes of the writes that were not flushed then."""

    position: int
    kind: str  # "lost", "kept" or "random"
    seed: int

    @property
    def fate(self) -> Fate:
        if self.kind == "random":
            return at_random(random.Random(self.seed))
        return {"lost": lost, "kept": kept}[self.kind]


class Record:
    """The writes of one recorded disk, and its marks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = WriteLog(folder / "log")

    @cached_property
    def marks(self) -> list[Mark]:
        return [
            Mark(n + 1, data.partition(b"\0")[0].removeprefix(MARK).decode())
            for n, entry in enumerate(self.log.entries)
            if entry.length and entry.offset == PARTITIONS[MARKS - 1][0]
            if (data := self.log.data(entry)).startswith(MARK)
        ]

    def marks_before(self, cut: Cut) -> list[str]:
        """Return what had been acknowledged before a cut."""
        return [mark.text for mark in self.marks if mark.position <= cut.position]

    def cuts(self, rng: random.Random, *, at_marks: int, others: int) -> list[Cut]:
        """
        Choose cuts between the first and the last mark, in order; each has a seed of its own.

        Right after a mark the unflushed writes are lost once and random once; the others are
        anywhere.  Both are spread over the record.
        """
        places = [mark.position for mark in self.marks]
        wanted = [
            (places[n], kind)
            for n in spread(rng, len(places), at_marks)
            for kind in ("lost", "random")
        ]
        for n in spread(rng, places[-1] - places[0], others):
            wanted.append((places[0] + n, rng.choice(("lost", "random", "random", "kept"))))
        return [Cut(position, kind, rng.getrandbits(32)) for position, kind in sorted(wanted)]


class CutDisk:
    """A disk 'cut' of the machine that holds what a cut left, one cut after the other."""

    def __init__(self, vm: Machine, folder: Path) -> None:
        self._vm = vm
        self._image = folder / "cut"
        write_image(self._image, partition_table(), DISK_BYTES, ())
        plug(self._vm, "cut", self._image)

    def set(self, record: Record, cut: Cut, spared: range = range(0)) -> None:
        """
        Give it what *cut* left; nothing in the machine may have it mounted.

        Writes to the offsets *spared* are on the disk as soon as it has them.
        """
        pieces = record.log.left(cut.position, cut.fate, spared)
        write_image(self._image, partition_table(), DISK_BYTES, pieces)
        # What the machine has in memory is of the cut before, and no power cut would leave it.
        self._vm.run(f"blockdev --flushbufs {LINKS}/cut* && rm -rf /run/atomtx")


def guest(vm: Machine, *words: str, marks: str | None = None) -> dict[str, Any]:
    """Run a command of power_guest.py and return what it prints."""
    answer = atomtx(vm, *words, script=GUEST, marks=marks)
    assert answer.status == 0, answer.output
    told: dict[str, Any] = json.loads(answer.stdout) if answer.stdout else {}
    return told


@dataclass
class Tally:
    """What was tried and what came of it; one line of the table at the end of the tests."""

    where: str
    cuts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, cut: object, outcome: str, violations: Sequence[str]) -> None:
        """Count one cut."""
        self.cuts += 1
        self.outcomes[outcome] += 1
        self.violations += [f"{cut}: {violation}" for violation in violations]

    def row(self) -> dict[str, Any]:
        """Return the line's values, for the report."""
        return {
            "where": self.where,
            "cuts": self.cuts,
            "violations": len(self.violations),
            "outcomes": dict(self.outcomes),
        }

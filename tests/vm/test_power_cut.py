"""Promise 10: what was acknowledged survives a power cut, on a disk that loses its write cache."""

from __future__ import annotations

import random
from pathlib import Path

from atomtx import journalfile
from tests.extent import FULL
from tests.vm.machine import Machine
from tests.vm.powercut import (
    FILES,
    MARKS,
    SEED,
    Cut,
    CutDisk,
    Record,
    Tally,
    guest,
    partition,
    plugged,
    recorded,
)

STATE = "/power/state"
SHIPPED = journalfile.PRAGMAS
# SQLite's settings, and the file system's: the first must lose nothing, the others must.
SETTINGS = {
    "shipped": (SHIPPED, "defaults"),
    "wal-normal": (("journal_mode=WAL", "synchronous=NORMAL"), "defaults"),
    "no-flush": (SHIPPED, "barrier=0"),
}
if FULL:
    SETTINGS["python-default"] = (("journal_mode=DELETE", "synchronous=FULL"), "defaults")


def record_journals(vm: Machine, folder: Path) -> dict[str, Record]:
    """Record runs that are written to a new journal on ext4, two commits each, under each name."""
    runs = "16" if FULL else "8"
    for name, (pragmas, options) in SETTINGS.items():
        with recorded(vm, folder / name):
            files = partition(name, FILES)
            vm.run(f"mkfs.ext4 -q {files} && mount -o {options} {files} /power && sync")
            guest(vm, "write", STATE, partition(name, MARKS), runs, *pragmas)
            vm.run("umount /power")
    return {name: Record(folder / name) for name in SETTINGS}


def acknowledged(marks: list[str]) -> dict[str, int]:
    """Return the revision of each run that was committed."""
    words = [mark.split() for mark in marks if mark.startswith("committed ")]
    return {run: int(revision) for _, run, revision in words}


def commits_lost(known: dict[str, list[int]], wanted: dict[str, int]) -> int:
    """Count the revisions that were acknowledged and are not in the journal."""
    return sum(max(0, rev - known.get(run, [-1])[0]) for run, rev in wanted.items())


def cuts_of(name: str, record: Record) -> list[Cut]:
    """Choose the moments: most of them for what must hold."""
    marks, others = (6, 6) if name == "shipped" else (2, 0)
    if FULL:
        marks, others = (32, 160) if name == "shipped" else (32, 0)
    return record.cuts(random.Random(SEED), at_marks=marks, others=others)


def cut_journal(vm: Machine, disk: CutDisk, name: str, record: Record) -> Tally:
    """Cut the power at many moments, open the journal each time, and count what it lost."""
    tally = Tally(f"journal on ext4, {name}")
    for cut in cuts_of(name, record):
        disk.set(record, cut)
        told = guest(vm, "open", partition("cut", FILES), STATE, *SETTINGS[name][0])
        lost = commits_lost(told["runs"], acknowledged(record.marks_before(cut)))
        if told["check"] != "ok":
            tally.add(cut, "damaged", [f"damaged: {told['check']}"])
        elif lost:
            outcome = "with the last commit lost" if lost == 1 else "with several commits lost"
            tally.add(cut, outcome, [f"{lost} commits lost"])
        else:
            tally.add(cut, "whole", [])
    return tally


def test_commits_survive(bare_vm: Machine, tmp_path: Path, power_cuts: list[Tally]) -> None:
    """
    Wherever the power is cut, the journal opens, is whole, and has each acknowledged commit.

    The same look finds losses with weaker settings, and on a file system that never flushes.
    """
    with plugged(bare_vm):
        records = record_journals(bare_vm, tmp_path)
        disk = CutDisk(bare_vm, tmp_path)
        for name, record in records.items():
            power_cuts.append(cut_journal(bare_vm, disk, name, record))
    shipped, *controls = power_cuts
    assert shipped.violations == []
    assert [tally.where for tally in controls if not tally.violations] == []

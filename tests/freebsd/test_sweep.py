"""
P1 and P4 on FreeBSD's fakes: a tree killed at every point that it passes, and its recovery too.

By default a sample; with ATOMTX_CRASH=full all of it (an hour).  The points are recorded from a
run that nothing disturbs, so that nobody lists them; each program that is started has two.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from atomtx import locks
from atomtx.intents import Mount
from atomtx.mounts import nullfs
from tests.crash.cases import kills
from tests.extent import FULL
from tests.freebsd.stage import FreeBSD
from tests.scene import Ended

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

STEP = 1 if FULL else 23
PARTS = 2  # for as many workers
PARTS_OF_PAIRS = 6 if FULL else 1  # so that none takes the half hour that a test may
SETS = ("tank/a", "tank/a/b", "tank/c d")  # a child is mounted on its frozen parent
FIRST = ("end:mount#3", "journal:backing-up#1", "end:umount#1")
# Asked until a process is gone: how often depends on how fast it goes.
ASKED_AGAIN = ("start:fstat#", "end:fstat#")


class Field:
    """Where case after case is tried, each on a machine of its own."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.cases = 0
        self.changes: list[Any] = []  # mistakes, made in each front end

    def points(self) -> list[str]:
        """Return what a run that nothing disturbs passes."""
        stage = self._stage()
        ended = stage.backup(stage.plan(*SETS))
        assert (ended.status, stage.left()) == (0, [])
        self._end(stage)
        return ended.points

    def recovery_points(self, at: str) -> list[str]:
        """Return what the recovery of a run that was killed at a point passes."""
        stage = self._stage()
        stage.backup(stage.plan(*SETS), at=at, who="all")
        ended = stage.recover()
        self._end(stage)
        return ended.points

    def try_(
        self, run: Mapping[str, str], again: Mapping[str, Any] | None = None, *, boot: bool = False
    ) -> list[str]:
        """
        Disturb a run, and its recovery if *again* is given; return what is wrong after the next.

        Before the recovery the live files change; with *boot* the machine was switched off, too.
        """
        stage = self._stage()
        wrong = _undisturbed(stage.backup(stage.plan(*SETS), **run), run)
        _await_commands(stage)
        whole = len(stage.pool["snapshots"]) == len(SETS)
        stage.write("live", *SETS)
        if boot:
            stage.reboot_after_power_cut(SETS)
        if again:
            wrong += _undisturbed(stage.recover(**again), again)
        wrong += self._wrong(stage, whole)
        self._end(stage)
        return [f"{dict(run)} {dict(again or {})}: {what}" for what in wrong]

    def _wrong(self, stage: FreeBSD, whole: bool) -> Iterator[str]:
        ended = stage.recover()
        if ended.status or ended.raised:
            yield f"recovery ended with {ended.status}, {ended.raised}"
        yield from (f"left: {what}" for what in stage.left())
        if stage.tree.exists():
            yield "left: the tree's directories"
        for row in stage.rows("SELECT state, outcome FROM runs"):
            if row["outcome"] == "completed" and not stage.copies():
                yield "completed, and there is no backup"
            if row["outcome"] != "completed" and (row["outcome"] != "rolled-back" or whole):
                yield f"a whole moment was given up: {row}"
        if set(stage.copies()) - {"frozen frozen frozen"}:
            yield f"a backup that is not of the moment: {stage.copies()}"
        if stage.recover().decisions:
            yield "a second recovery found something to do"

    def _stage(self) -> FreeBSD:
        self.cases += 1
        home = self._home / f"case-{self.cases}"
        home.mkdir()
        stage = FreeBSD(home)
        stage.changes += self.changes
        return stage

    def _end(self, stage: FreeBSD) -> None:
        stage.close()
        shutil.rmtree(stage.home)


@pytest.fixture
def field(tmp_path: Path) -> Field:
    return Field(tmp_path)


@pytest.mark.parametrize("part", range(PARTS))
def test_points(field: Field, part: int) -> None:
    """Promise 5: killed at whatever point, a run is resumed, or nothing of it is left."""
    points = field.points()
    assert {"start:umount#1", "end:umount#1", "end:mount#3", "runner:end:mount#1"} <= set(points)
    wrong = []
    for run in [*kills(points)][::STEP][part::PARTS]:
        wrong += field.try_(run)
        print(f"{field.cases} cases, {run}: {len(wrong)} violations", flush=True)
    assert wrong == []


@pytest.mark.parametrize("first", FIRST if FULL else FIRST[1:2])
@pytest.mark.parametrize("part", range(PARTS_OF_PAIRS))
def test_pairs(field: Field, first: str, part: int) -> None:
    """Promise 5: so it is when the recovery is killed as well."""
    wrong = []
    for again in [*kills(field.recovery_points(first))][:: 1 if FULL else 29][part::PARTS_OF_PAIRS]:
        wrong += field.try_({"at": first, "who": "all"}, again)
        print(f"{field.cases} cases, {first} {again}: {len(wrong)} violations", flush=True)
    assert wrong == []


def test_power_cuts(field: Field) -> None:
    """Promise 5: after a power cut the mounts are gone, the boot is another one."""
    wrong = []
    for at in ("end:mount#3", "journal:mounted#1", "journal:backing-up#1", "end:umount#1"):
        wrong += field.try_({"at": at, "who": "all"}, boot=True)
    assert wrong == []


def test_violations_are_seen(field: Field) -> None:
    """A cleanup that forgets our mounts, or those that the kernel made for them, is caught."""
    killed = {"at": "journal:backing-up#1", "who": "all"}
    assert field.try_(killed) == []
    field.changes.append(lambda: setattr(nullfs, "remove", _nothing_removed))
    (first, *_) = field.try_(killed)
    assert "recovery ended with" in first or "left:" in first
    field.changes[:] = [lambda: setattr(nullfs, "expire", _nothing_expired)]
    assert any("left: " in what and ".zfs/snapshot" in what for what in field.try_(killed))


def _undisturbed(ended: Ended, wish: Mapping[str, str]) -> list[str]:
    """Tell that a command was not killed; of one whose runner was, that it never came there."""
    at = wish["at"]
    if at.startswith("runner:") and wish["who"] == "front":
        return [] if at in ended.points else [f"never passed {at}"]
    if at.startswith(ASKED_AGAIN) and ended.points and at not in ended.points:
        return [] if ended.status == 0 else [f"came to no end without {at}: {ended.status}"]
    return [] if ended.status == -9 else [f"was not killed: {ended.status} {ended.raised}"]


def _await_commands(stage: FreeBSD) -> None:
    """Let a killed front end's command go on to its end: it may be taking the snapshots."""
    files = [*stage.state.glob("runs/*/front.lock")]
    assert locks.wait_until(lambda: not any(map(locks.is_held, files)), 60.0)


def _nothing_removed(mounts: list[Mount]) -> list[Mount]:
    return []


def _nothing_expired(snapshots: object, table: object = None) -> None:
    pass

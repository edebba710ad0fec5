"""
P1 and P4 on btrfs, alone and beside a live directory: a run killed at every point that it passes,
and its recovery as well.

By default a sample; with ATOMTX_CRASH=full all of it (some minutes).  The points are recorded from
a run that nothing disturbs, so that nobody lists them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from atomtx.intents import Mount
from atomtx.mounts.namespace import Assembly
from atomtx.plan import Plan
from atomtx.records import Content
from tests.btrfs.conftest import Boot, Flat, Nested
from tests.btrfs.stage import Disk, Stage, tree
from tests.extent import FULL
from tests.scene import Scene

STEP = 1 if FULL else 7
WHO = ("front", "runner", "all") if FULL else ("all",)
FIRST = (
    "end:btrfs snapshot#1",
    "end:btrfs snapshot#2",
    "journal:snapshotted#1",
    "journal:backing-up#1",
    "journal:unmounting#1",
    "end:btrfs destroy#1",
)


class Field:
    """One disk on which case after case is tried."""

    def __init__(
        self, home: Path, disk: Disk, root: Path, changed: Path, live: Path | None = None
    ) -> None:
        self._home = home
        self._live = [live] if live else []
        self._disk = disk
        self._root = root
        self._changed = changed
        self._before = tree(root)
        self.cases = 0

    def points(self) -> list[str]:
        """Return what a run that nothing disturbs passes."""
        stage = self._stage()
        ended = stage.backup(self._plan(stage))
        self._end(stage)
        return ended.points

    def _plan(self, stage: Stage) -> Plan:
        return stage.plan_of(self._root, recursive=True, live=self._live)

    def try_(self, at: str, who: str, again: str = "", then: str = "front") -> list[str]:
        """
        Kill a run at a point, and its recovery at the point *again*; return what is wrong then.

        Without *again* nothing disturbs the recovery.  The live files change before it.
        """
        stage = self._stage()
        the_plan = self._plan(stage)
        stage.backup(the_plan, at=at, who=who)
        taken = sum(bool(volume.snapshot) for volume in the_plan.volumes)
        whole = len(self._disk.snapshots()) == taken
        frozen = self._changed.read_text()
        self._changed.write_text("changed")
        if again:
            stage.recover(at=again, who=then)
        wrong = [f"{at} {who} {again} {then}: {what}" for what in self._wrong(stage, whole)]
        self._changed.write_text(frozen)
        self._end(stage)
        return wrong

    def recovery_points(self, at: str) -> list[str]:
        """Return what the recovery of a run that was killed at a point passes."""
        stage = self._stage()
        stage.backup(self._plan(stage), at=at, who="all")
        ended = stage.recover()
        self._end(stage)
        return ended.points

    def _wrong(self, stage: Stage, whole: bool) -> Iterator[str]:
        ended = stage.recover()
        if ended.status or ended.raised:
            yield f"recovery ended with {ended.status}, {ended.raised}"
        yield from (f"left: {what}" for what in stage.left())
        for row in stage.rows("SELECT state, outcome FROM runs"):
            if row["outcome"] == "completed":
                if tree(stage.saved(self._root)) != self._before:
                    yield "the backup is not of the moment"
                if any(tree(stage.saved(live)) != tree(live) for live in self._live):
                    yield "what is read live is not in the backup"
            elif row["outcome"] != "rolled-back" or whole:
                yield f"a whole moment was given up: {row}"
        if stage.recover().decisions:
            yield "a second recovery found something to do"

    def _stage(self) -> Stage:
        self.cases += 1
        return Stage(self._home / f"case-{self.cases}", self._disk)

    def _end(self, stage: Stage) -> None:
        Scene.close(stage)
        shutil.rmtree(stage.home)


@pytest.fixture(params=["flat", "nested", "mixed"])
def field(request: pytest.FixtureRequest, tmp_path: Path, disk: Disk) -> Field:
    if request.param in ("flat", "mixed"):
        flat = Flat(disk)
        live = Boot(disk).boot / "grub" if request.param == "mixed" else None
        return Field(tmp_path, disk, flat.root, flat.home / "file", live)
    nested = Nested(disk)
    return Field(tmp_path, disk, nested.data, nested.data / "photos" / "file")


def test_points(field: Field) -> None:
    """Promise 5: killed at whatever point, a run is resumed, or nothing of it is left."""
    points = field.points()
    assert len(points) > 40
    assert any("btrfs destroy" in point for point in points)
    wrong = [w for p in points[::STEP] for who in WHO for w in field.try_(p, who)]
    print(f"{field.cases} cases")
    assert wrong == []


def test_pairs(field: Field) -> None:
    """Promise 5: so it is when the recovery is killed as well."""
    wrong = []
    for first in FIRST:
        for again in field.recovery_points(first)[:: 1 if FULL else 17]:
            wrong += field.try_(first, "all", again, "front")
            wrong += field.try_(first, "all", again, "all") if FULL else []
    print(f"{field.cases} cases")
    assert wrong == []


def test_violations_are_seen(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cleanup that leaves the directory, and a resume that reads the live files, are caught."""
    assert field.try_("journal:backing-up#1", "all") == []
    with monkeypatch.context() as patch:
        patch.setattr("atomtx.volumes.btrfs._remove_directory", lambda *_: None)
        (wrong,) = field.try_("journal:backing-up#1", "all")
        assert "left: .atomtx-" in wrong
    for name in field._disk.left():
        (field._disk.top / name).rmdir()
    monkeypatch.setattr("atomtx.mounts.namespace.mount_snapshot", lambda *_: None)
    monkeypatch.setattr("atomtx.mounts.namespace.observe", _blind)
    (wrong,) = field.try_("journal:backing-up#1", "all")
    assert "not of the moment" in wrong


def _blind(mounts: Sequence[Mount]) -> Assembly:
    """Return what sees no mount, and would see none go."""

    class Blind(Assembly):
        def contents(self) -> dict[str, Content]:
            return {mount.mountpoint: Content.FILES for mount in mounts}

    return Blind((), (), {}, frozenset())

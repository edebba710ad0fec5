"""`atomtx recover --adopt` on pools that are only played, and killed at each of its points."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from atomtx import journalfile, locks
from atomtx.cli import strays
from atomtx.journal import Journal
from atomtx.statedir import RunFolder
from tests.cli.test_steps import DATASET, forked, played, said, scene, status
from tests.extent import some
from tests.scene import Scene

__all__ = ["scene"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root recovers")


def lost(scene: Scene) -> str:
    """Have a run be killed with its client, and lose its journal; return its id."""
    the_plan = scene.plan(DATASET)
    scene.backup(the_plan, at="journal:backing-up#1", who="all")
    (scene.state / journalfile.NAME).unlink()
    assert len(scene.pool["snapshots"]) == 1
    return the_plan.run


def states(scene: Scene) -> list[tuple[str, str]]:
    return [(run["state"], run["outcome"]) for run in scene.rows("SELECT * FROM runs")]


def test_killed_at_every_point(tmp_path: Path) -> None:
    """Promise 5: wherever it is killed, its run is unknown still, or `recover` ends it."""
    (tmp_path / "whole").mkdir()
    scene = played(tmp_path / "whole")
    points = forked(scene, "recover", "--adopt", lost(scene)).points
    assert states(scene) == [("destroyed", "rolled-back")], said(scene)
    points = [point for point in points if point.startswith(("journal:", "before:", "start:"))]
    points = points[points.index("start:upgrade journal#1") :]
    adopted, tried = 0, [points[0], *some(points[1:], 4)]
    for n, point in enumerate(tried):
        (tmp_path / f"{n}").mkdir()
        scene = played(tmp_path / f"{n}")
        run = lost(scene)
        assert forked(scene, "recover", "--adopt", run, at=point).status == -9, point
        recovered = forked(scene, "recover")
        assert (recovered.status, status(recovered)) == (0, 0), (point, said(scene))
        adopted += bool(states(scene))
        if not states(scene):
            assert status(forked(scene, "recover", "--adopt", run)) == 0, (point, said(scene))
        assert states(scene) == [("destroyed", "rolled-back")], (point, said(scene))
        assert scene.left() == [], point
    assert 0 < adopted < len(tried)


def test_somebody_is_at_work(scene: Scene) -> None:
    """Promise 6: a run that has a front end is not taken into another journal under its hands."""
    run = lost(scene)
    with locks.acquired(RunFolder.of(scene.state, run).front_lock):
        assert status(forked(scene, "recover", "--adopt", run)) == 5
    assert f"run {run} is at work" in said(scene)
    assert states(scene) == []
    assert status(forked(scene, "recover", "--adopt", run)) == 0


@pytest.mark.parametrize("removed", [False, True])
def test_at_work_elsewhere(scene: Scene, *, removed: bool) -> None:
    """Promise 6: so is one whose front end has another state directory, also with --stop."""
    run = lost(scene)
    (scene.home / "another" / "runs").mkdir(parents=True)
    folder = RunFolder.of(scene.home / "another", run).make()
    with locks.acquired(folder.front_lock):
        if removed:
            shutil.rmtree(scene.home / "another")
        for words in ((), ("--stop",)):
            assert status(forked(scene, "recover", "--adopt", run, *words)) == 5
        assert status(forked(scene, "recover", "--scan")) == 0
    assert f"run {run} is at work for another state directory: {os.getpid()} (" in said(scene)
    assert f"  at work: {os.getpid()} (" in said(scene)
    assert states(scene) == []
    assert status(forked(scene, "recover", "--adopt", run)) == 0, said(scene)


@pytest.mark.parametrize("seconds", [253402300800, 2**62])
def test_scan_of_no_possible_time(scene: Scene, seconds: int) -> None:
    """A creation beyond what there can be, as a stream may bring one, is listed as any."""
    run = lost(scene)
    there = scene.pool["snapshots"]
    for snapshot in there.values():
        snapshot["creation"] = str(seconds)
    scene.play(snapshots=there)
    scanned = forked(scene, "recover", "--scan")
    assert (scanned.raised, status(scanned)) == (None, 0), said(scene)
    assert f"run {run}, of this minute, in no journal here:" in said(scene)


@pytest.mark.parametrize("option", ["--run", "--job", "--adopt", "--abandon"])
def test_empty(scene: Scene, option: str) -> None:
    """What a variable that is not set stands for is not every run, and not the only one."""
    scene.backup(scene.plan(DATASET), at="journal:backing-up#1", who="all")
    assert status(forked(scene, "recover", "--rollback", option, "")) == 2
    assert f"Invalid value for '{option}': it is empty" in said(scene)
    assert [run["state"] for run in scene.rows("SELECT * FROM runs")] == ["backing-up"]


def test_lock_comes_first(scene: Scene) -> None:
    """Section 6: lock F is held when the row is written, also where the folder was lost."""
    run = lost(scene)
    folder = RunFolder.of(scene.state, run)
    folder.path.rename(scene.home / "lost")
    real = Journal.adopt

    def look() -> None:
        def adopt(journal: Journal, *args: object) -> object:
            (scene.home / "held").write_text(str(locks.is_held(folder.front_lock)))
            return real(journal, *args)  # type: ignore[arg-type]

        Journal.adopt = adopt  # type: ignore[assignment,method-assign]

    assert status(forked(scene, "recover", "--adopt", run, change=look)) == 0, said(scene)
    assert (scene.home / "held").read_text() == "True"


def test_beside_another_kind(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools are asked on a machine of btrfs too, also by cron, whose PATH has no `zpool`."""
    run = lost(scene)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def beside() -> None:
        nothing = {"marked": tuple, "keepers": tuple}
        vars(strays)["btrfs"] = SimpleNamespace(mounted=lambda: ["/srv"], **nothing)

    assert status(forked(scene, "recover", "--scan", change=beside)) == 0
    assert f"run {run}," in said(scene)
    assert status(forked(scene, "recover", "--adopt", run, change=beside)) == 0, said(scene)
    assert states(scene) == [("destroyed", "rolled-back")]

"""
Kept snapshots that stay until a job has saved them: backups and prunes in turn, by one journal.

The pools are played (`tests/fakezfs.py`); the choice itself is in test_pruning.py, what the journal
knows in test_history.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from atomtx import history, journalfile, pruning, wanted
from atomtx.convention import Pattern
from atomtx.names import RunId
from atomtx.plan import DatasetFacts, Plan, Pool, Request
from atomtx.pruning import Choice
from atomtx.retention import Policy
from atomtx.volumes.zfs import Zfs
from tests.scene import Ended, Scene
from tests.unit.test_catchup import SETS, catch_up, keep

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

HOME = "job home"
PATTERN = Pattern.parse("atomtx-%Y%m%d%H%M")
OLD = [f"{name}@m1" for name in SETS]
ALL = [f"{name}@m{moment}" for name in SETS for moment in (1, 2)]
WHY = "not saved in home"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def a_job(scene: Scene, key: str = HOME, **values: str) -> Plan:
    """Return a job over two datasets, and keep two moments of them."""
    of_job = scene.plan(*SETS, job=key, **values)
    for moment in (1, 2):
        keep(scene, moment, *SETS)
    return of_job


def prune(scene: Scene, *jobs: str) -> dict[str, str]:
    """Destroy all but the last of each that each job has saved; return why others stay."""

    def choose(ended: Ended) -> Choice:
        journal = scene.state / journalfile.NAME
        saved = {name: history.saved_by(journal, f"job {name}") for name in jobs or ["home"]}
        there = Zfs().kept(SETS)
        facts = [
            DatasetFacts(n, "filesystem", f"guid of {n}", f"/{n}", "on", True, "-") for n in SETS
        ]
        request = Request(SETS)
        choice = pruning.judge(
            request,
            wanted.choose(request, SETS, facts, [Pool("tank", "guid of tank", "ONLINE")]),
            there,
            Policy(last=1),
            PATTERN,
            [each.name for each in there],  # whatever their names
            run=RunId.new(),
            now=datetime.now(UTC),
            saved=saved,
        )
        ended.told.append(("why", {v.item.name: ", ".join(v.reasons) for v in choice.verdicts}))
        return choice

    ended = scene.prune(choose)
    assert (ended.status, ended.raised) == (0, None), (scene.home / "log").read_text()
    assert ended.run is None or ended.run.outcome == "completed"
    (why,) = ended.said("why")
    return {name: reason for name, reason in why.items() if reason != "last snapshot"}


def check_all_stay(scene: Scene, why: str = WHY) -> None:
    told = prune(scene)
    assert [told[name] for name in OLD] == [why] * 2
    assert sorted(scene.pool["snapshots"]) == ALL


def check_old_go(scene: Scene) -> None:
    prune(scene)
    assert sorted(scene.pool["snapshots"]) == [name for name in ALL if name not in OLD]


def test_course(scene: Scene) -> None:
    """What no rule keeps stays until it is in the repository, and goes then."""
    of_job = a_job(scene)
    check_all_stay(scene)
    assert catch_up(scene, of_job, limit=1).status == 0
    assert scene.copies() == ["m1 m1"]
    check_old_go(scene)
    assert len(scene.pool["bookmarks"]) == 2


def test_backup_of_its_own_snapshots(scene: Scene) -> None:
    """A backup that took snapshots of its own has saved another moment."""
    ended = scene.backup(a_job(scene))
    assert ended.run
    assert ended.run.outcome == "completed"
    check_all_stay(scene)


def test_same_name(scene: Scene) -> None:
    """Of a name that is used again, the one that was saved is gone, and this one is not saved."""
    catch_up(scene, a_job(scene), limit=1)
    there = scene.pool["snapshots"]
    for n, name in enumerate(OLD):
        there[name]["guid"] = str(7 + n)
    scene.play(snapshots=there)
    check_all_stay(scene)


def test_partial(scene: Scene) -> None:
    """What the client could not read whole is not saved, though it is in the repository."""
    of_job = a_job(scene, client="played")
    scene.behave('cat "$1/file"; exit 3')
    ended = catch_up(scene, of_job, limit=1)
    assert ended.run
    assert ended.run.outcome == "partial"
    check_all_stay(scene)


def test_failed(scene: Scene) -> None:
    of_job = a_job(scene, client="played")
    scene.behave("exit 1")
    ended = catch_up(scene, of_job, limit=1)
    assert ended.run
    assert ended.run.outcome == "failed"
    check_all_stay(scene)


def test_each_job(scene: Scene) -> None:
    """What another job has saved is not saved in this one, though it is the same repository."""
    far = a_job(scene, "job far")
    scene.backup(scene.plan(*SETS, job=HOME))  # so that it is known where its backups go
    catch_up(scene, far, limit=1)
    assert prune(scene, "home", "far")["tank/a@m1"] == WHY
    assert prune(scene, "far", "home")["tank/b@m1"] == WHY
    check_all_stay(scene)
    prune(scene, "far")
    assert "tank/a@m1" not in scene.pool["snapshots"]


def test_forgotten(scene: Scene) -> None:
    """What the journal has forgotten is not saved; it is once it was saved again."""
    of_job = a_job(scene)
    catch_up(scene, of_job, limit=1)
    scene.forget("1")
    check_all_stay(scene)
    catch_up(scene, of_job, limit=1)
    check_old_go(scene)


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize(
    "point",
    [
        "before:snapshotted#1",
        "end:zfs hold#1",
        "journal:mounted#1",
        "journal:backing-up#1",
        "before:unmounting#1",
        "journal:unmounting#1",
        "end:zfs release#1",
    ],
)
def test_killed(scene: Scene, point: str, rollback: bool) -> None:
    """
    Wherever the backup is killed, nothing goes that it has not saved for good.

    Until its end is journaled and its hold is released all stay; after a recovery, whichever,
    the journal tells.
    """
    of_job = a_job(scene)
    assert catch_up(scene, of_job, point, "all", limit=1).status == -9
    prune(scene)
    is_saved = point.startswith("end:zfs release")
    assert (sorted(scene.pool["snapshots"]) == ALL) != is_saved
    assert scene.recover(rollback=rollback).raised is None
    (run,) = scene.rows("SELECT * FROM runs WHERE verb = 'backup'")
    if run["outcome"] != "completed":
        assert (run["outcome"], is_saved, rollback) == ("rolled-back", False, True)
        check_all_stay(scene)
        assert catch_up(scene, of_job, limit=1).status == 0
    check_old_go(scene)

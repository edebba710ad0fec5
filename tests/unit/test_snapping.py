"""
Snapshots that stay: what is asked for, and the course of a run that takes them.

The pools are played (`tests/fakezfs.py`): what ZFS itself does is tested in the virtual machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomtx import plan, snapping, wanted
from atomtx.errors import UserError
from atomtx.intents import (
    AFTER_SUCCESS,
    AROUND_RUN,
    AROUND_SNAPSHOT,
    KeepSnapshots,
    RunHook,
    TakeSnapshots,
)
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.names import RunId
from atomtx.plan import DatasetFacts, Plan, Pool, Request
from atomtx.recovery import Resume, RollBack, RollForward
from atomtx.states import Verb
from tests.extent import some
from tests.scene import Ended, Scene

NAME = "atomtx-202611220301"
POOLS = [Pool("tank", "11", "ONLINE"), Pool("dead", "12", "SUSPENDED")]
NAMES = ("tank", "tank/home", "tank/home/ann", "tank/mail", "tank/vm disk")
SETS = ("tank/a", "tank/b", "zroot/c")

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="lock F and its folder are root's")


def facts(name: str) -> DatasetFacts:
    kind = "volume" if name == "tank/vm disk" else "filesystem"
    return DatasetFacts(name, kind, f"guid of {name}", f"/{name}", "on", True, "-")


REQUEST = Request(("tank",))
FOUND = wanted.choose(REQUEST, ["tank"], [facts("tank")], POOLS)


def assembled(*names: str, **values: Any) -> Plan:
    request = Request(names, **values)
    found = wanted.choose(request, names, map(facts, NAMES), POOLS)
    return snapping.assemble(request, found, name=NAME, run=RunId.new())


def snapshots(made: Plan) -> list[str]:
    return [volume.snapshot for volume in made.volumes]


# -- what is asked for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (["tank/home"], {}, ["tank/home"]),
        (["tank/home"], {"recursive": True}, ["tank/home", "tank/home/ann"]),
        (["tank"], {"recursive": True, "exclude": ("tank/home",)}, ["tank", *NAMES[3:]]),
        ([], {"all": True, "exclude": ("tank/mail",)}, [*NAMES[:3], "tank/vm disk"]),
        (["tank/vm disk", "tank/mail"], {}, ["tank/mail", "tank/vm disk"]),
    ],
)
def test_selection(names: list[str], values: dict[str, Any], expected: list[str]) -> None:
    """Datasets and volumes, with children where that is asked, less what is excluded."""
    assert snapshots(assembled(*names, **values)) == [f"{name}@{NAME}" for name in expected]


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ([], {}, "nothing was named"),
        (["tank"], {"all": True}, "exclude each other"),
        (["tank/none"], {}, "there is no dataset tank/none"),
        (["tank"], {"exclude": ("tank/x",)}, "there is no dataset tank/x"),
        (["tank/mail"], {"exclude": ("tank",)}, "everything is excluded"),
    ],
)
def test_wrong_request(names: list[str], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        assembled(*names, **values)


def test_name_too_long() -> None:
    """A snapshot's whole name has a limit, which is known before anything is done."""
    with pytest.raises(UserError, match="too long to be snapshotted"):
        snapping.assemble(REQUEST, FOUND, name="n" * 252, run=RunId.new())


def test_suspended_pool_is_named() -> None:
    assert assembled(all=True).notes == ("pool dead is left out: it is suspended",)


def test_key_of_a_job() -> None:
    """A snap and a backup of one job do not wait for each other; two snaps of it do."""
    named = assembled("tank", job="home")
    assert named.job == f"snap {plan.job_key('home')}"
    assert assembled("tank").job == assembled("tank").job != assembled("tank/mail").job


def test_hooks() -> None:
    """What pauses a database counts here; what follows a backup does not."""
    hooks = [RunHook(when, ("true",)) for when in (AROUND_SNAPSHOT, AFTER_SUCCESS)]
    made = snapping.assemble(REQUEST, FOUND, name=NAME, run=RunId.new(), hooks=hooks)
    assert made.hooks == (hooks[0],)


def test_steps() -> None:
    """A dry run shows the snapshots with what undoes them, and that they are kept."""
    steps = list(snapping.steps(assembled("tank", recursive=True)))
    assert [type(step) for step in steps] == [TakeSnapshots, KeepSnapshots]
    assert steps[0].compensation()
    transient = snapping.assemble(REQUEST, FOUND, name=NAME, run=RunId.new(), transient=True)
    assert next(snapping.steps(transient)).describe().endswith("in one transaction, as transient")
    assert plan.from_json(plan.to_json(transient)) == transient


def entry(source: str, mountpoint: str, fstype: str = "zfs") -> Entry:
    return Entry(1, 0, "0:1", "/", mountpoint, "rw", (), fstype, source, "rw")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/tank/home/x", "is a directory in the dataset tank/home"),
        ("/boot", "is on ext4: snapshots that stay are of ZFS, btrfs and LVM"),
        ("/srv", "is on btrfs: this is of ZFS alone"),  # a clone's, such as
        ("/", "is no live dataset"),
    ],
)
def test_path_that_is_no_dataset(path: str, message: str) -> None:
    table = Table([entry("tank/home", "/tank/home"), entry("/dev/vda1", "/boot", "ext4")])
    table = Table([*table, entry("/dev/vdb", "/srv", "btrfs")])
    assert wanted.dataset_of("/tank/home/", table) == "tank/home"
    with pytest.raises(UserError, match=message) as caught:
        wanted.dataset_of(path, table)
    if "ext4" in message:  # `atomtx backup` alone has no snapshots of it either
        assert "`atomtx backup --read-live /boot`" in (caught.value.hint or "")


# -- the course ------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def a_snap(scene: Scene, **values: Any) -> Plan:
    """Return a plan of kept snapshots; with every point's run another moment's."""
    made = scene.plan(*SETS)
    name = f"atomtx-{made.run}"[:20]
    volumes = tuple(replace(v, snapshot=f"{v.name}@{name}") for v in made.volumes)
    changes = {"volumes": volumes, "verb": Verb.SNAP, "targets": (), **values}
    return replace(made, client=plan.NO_CLIENT, **changes)


def is_whole(scene: Scene, made: Plan) -> bool:
    """Tell whether all is kept, or nothing is there; anything else fails the test."""
    (run,) = scene.rows(f"SELECT * FROM runs WHERE id = '{made.run}'")
    there = {name: s for name, s in scene.pool["snapshots"].items() if name in snapshots(made)}
    marks = {(s["mark"], s["kept"]) for s in there.values()}
    assert {s["holds"] == [] for s in there.values()} <= {True}
    open_steps = scene.rows("SELECT * FROM steps WHERE outcome IS NULL")
    assert open_steps == []
    if there:
        assert len(there) == len(SETS)
        assert marks == {(None, made.run)}
        assert (run["state"], run["outcome"]) == ("kept", "completed")
        return True
    assert (run["state"], run["outcome"]) == ("destroyed", "rolled-back")
    return False


@root_only
def test_course(scene: Scene) -> None:
    """All are taken, one command a pool, and marked as kept; nothing else is done."""
    made = a_snap(scene)
    ended = scene.backup(made)
    assert ended.status == 0, (scene.home / "log").read_text()
    assert is_whole(scene, made)
    assert len(scene.zfs("snapshot")) == 2
    assert scene.zfs("hold") == scene.zfs("release") == []
    moves = [(row["source"], row["dest"]) for row in scene.rows("SELECT * FROM moves")]
    assert moves == [("planned", "snapshotted"), ("snapshotted", "kept")]


@root_only
def test_transient(scene: Scene) -> None:
    """That they are to go again is said in the command that takes them, and survives a crash."""
    scene.backup(a_snap(scene))
    assert {each.get("transient") for each in scene.pool["snapshots"].values()} == {None}
    for at in ("", "start:zfs snapshot#2", "end:zfs snapshot#2", "end:zfs program#1"):
        made = a_snap(scene, transient=True)
        scene.backup(made, at=at)
        scene.recover()
        there = scene.pool["snapshots"]
        marks = {there[name].get("transient") for name in snapshots(made) if name in there}
        assert marks == ({made.run} if is_whole(scene, made) else set()), at


@root_only
def test_killed_at_every_point(scene: Scene) -> None:
    """
    Wherever it is killed, the moment is whole after a recovery, or not there at all.

    Once it was whole before the kill it is kept, never taken away.
    """
    scene.backup(a_snap(scene))  # makes the journal
    points = scene.backup(a_snap(scene)).points
    assert {"before:planned#1", "journal:snapshotted#1", "journal:kept#1"} <= set(points)
    assert {"start:zfs snapshot#2", "end:zfs program#2"} <= set(points)
    kept = 0
    for point in points:
        made = a_snap(scene)
        assert scene.backup(made, at=point).status == -9, point
        if not scene.rows(f"SELECT * FROM runs WHERE id = '{made.run}'"):
            continue  # before its intents were durable
        recovered = scene.recover()
        assert recovered.raised is None, point
        assert scene.recover().decisions == []
        whole = is_whole(scene, made)
        kept += whole
        assert whole or points.index(point) <= points.index("end:zfs snapshot#2"), point
    assert kept > 3


@root_only
def test_recovery_is_killed_too(scene: Scene) -> None:
    """A killed recovery of a killed run is gone on with by the next one."""
    for at in ("end:zfs snapshot#2", "journal:snapshotted#1", "start:zfs program#1"):
        points = recovery_points(scene, at)
        assert points
        for second in some(points, 5):
            made = a_snap(scene)
            assert scene.backup(made, at=at).status == -9
            assert scene.recover(at=second).status == -9, (at, second)
            assert scene.recover().raised is None
            is_whole(scene, made)


def recovery_points(scene: Scene, at: str) -> list[str]:
    assert scene.backup(a_snap(scene), at=at).status == -9
    return scene.recover().points


@root_only
def test_decisions(scene: Scene) -> None:
    """Half a moment is rolled back, a whole one is kept, also at a user's word to roll back."""
    cases: tuple[tuple[str, dict[str, Any], type], ...] = (
        ("end:zfs snapshot#1", {}, RollBack),
        ("end:zfs snapshot#2", {}, Resume),
        ("end:zfs snapshot#2", {"rollback": True}, RollBack),
        ("journal:snapshotted#1", {}, RollForward),
        ("journal:snapshotted#1", {"rollback": True}, RollForward),
        ("journal:snapshotted#1", {"may_resume": False}, RollForward),
    )
    for at, options, expected in cases:
        made = a_snap(scene)
        scene.backup(made, at=at)
        (decision,) = scene.recover(**options).decisions
        assert isinstance(decision, expected), (at, options)
        assert is_whole(scene, made) is (expected is not RollBack)


@root_only
def test_name_is_taken(scene: Scene) -> None:
    """What got the name meanwhile, from somebody else, stays; nothing is left of the run."""
    made = a_snap(scene)
    scene.backup(made)
    before = scene.pool["snapshots"]
    other = replace(a_snap(scene), volumes=made.volumes)
    ended = scene.backup(other)
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert "exists and is not ours" in str(ended.run.reason)
    assert scene.pool["snapshots"] == before


@root_only
def test_destroyed_by_somebody(scene: Scene) -> None:
    """What is gone before it was kept is told; the others are kept."""
    made = a_snap(scene)
    scene.backup(made, at="journal:snapshotted#1")
    pool = scene.pool
    del pool["snapshots"][snapshots(made)[0]]
    scene.play(**pool)
    ended: Ended = scene.recover()
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("kept", "partial")
    assert ended.run.reason == f"{snapshots(made)[0]}: gone before it was kept"
    assert {s["kept"] for s in scene.pool["snapshots"].values()} == {made.run}


@root_only
def test_renamed(scene: Scene) -> None:
    """Whose dataset was renamed after the crash is found by its mark, and kept."""
    made = a_snap(scene)
    scene.backup(made, at="journal:snapshotted#1")
    there = scene.pool["snapshots"]
    name = snapshots(made)[0]
    there["tank/new@" + name.partition("@")[2]] = there.pop(name)
    scene.play(snapshots=there)
    ended = scene.recover()
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("kept", "completed")
    assert {each["kept"] for each in scene.pool["snapshots"].values()} == {made.run}


@root_only
def test_cannot_be_kept(scene: Scene) -> None:
    """Where the mark cannot be changed the run waits, and the next recovery goes on."""
    scene._script("hook", f'#!/bin/sh\necho "$1" >> {scene.home}/hooked\n')
    hook = RunHook(AROUND_RUN, (f"{scene.home}/hook", "pre"), (f"{scene.home}/hook", "post"))
    made = a_snap(scene, hooks=(hook,))
    scene.play(faults={"program": "refuse", "set": "refuse"})
    ended = scene.backup(made)
    assert (scene.home / "hooked").read_text().split() == ["pre", "post"]
    assert ended.raised is not None
    assert "not marked as kept" in str(ended.raised)
    assert len(scene.pool["snapshots"]) == len(SETS)
    scene.play(faults={})
    assert scene.recover().raised is None
    assert is_whole(scene, made)

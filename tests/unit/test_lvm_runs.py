"""
Whole runs on LVM that is only played: killed at points of the run, and of its recovery.

By default a sample; with ATOMTX_CRASH=full every point.  LVM's own commands are never killed, as
the program promises: the points lie around them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atomtx import lvmio, plan, process
from atomtx.errors import WaitingError
from atomtx.intents import Mount, Origin
from atomtx.mounts import namespace
from atomtx.names import LvmSnapshot, RunId, mounted_as
from atomtx.plan import ClientPlan, Plan, PlannedVolume
from atomtx.states import Outcome
from tests import fakelvm
from tests.runs import a_plan
from tests.scene import Scene
from tests.vm.points import Crash

VOLUMES = ("data/home", "data/thin")
_mount = namespace.mount


class LvmScene(Scene):
    """A classic and a thin volume, with a file in each."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        fakelvm.install(home, {"data": 1 << 30})
        thin = {"attr": "Vwi-aotz--", "pool": "pool"}
        self.uuids = {
            "data/home": fakelvm.add(home, "data/home"),
            "data/thin": fakelvm.add(home, "data/thin", **thin),
        }
        for name in VOLUMES:
            self.live(name).mkdir(parents=True)
        self.write("frozen", *VOLUMES)

    def lvm_plan(self) -> Plan:
        run = RunId.new()
        group = fakelvm.read(self.home)["groups"]["data"]["uuid"]
        volumes = []
        for n, name in enumerate(VOLUMES):
            origin = Origin(self.uuids[name], name, "xfs", 0 if n else 8 << 20)
            at, snapshot = str(self.live(name)), str(LvmSnapshot.of("data", run, n))
            made = PlannedVolume(
                "lvm", "data", group, name, origin.uuid, at, snapshot, origin=origin
            )
            volumes.append(made)
        command = ClientPlan("command", (self.client,), (), "/", "1.2", None, (), ())
        return a_plan(
            "tank/a",
            run=run,
            volumes=tuple(volumes),
            targets=plan.targets(v.mountpoint for v in volumes),
            client=command,
            named=tuple(v.mountpoint for v in volumes),
        )

    def _play_along(self, crash: Crash) -> None:
        fakelvm.HOME = self.home
        process.BASE_ENVIRONMENT |= {"FAKE_LVM": str(self.home)}
        lvmio.devices = self._devices
        namespace._mount_logical = _mount_logical
        super()._play_along(crash)

    def _devices(self) -> dict[str, lvmio.Device]:
        state = fakelvm.read(self.home)
        (group,) = (lvmio.plain(each["uuid"]) for each in state["groups"].values())
        active = {p: v for p, v in state["volumes"].items() if v["attr"][4] != "-"}
        return {
            f"254:{v['minor']}": lvmio.Device(
                fakelvm.device_name(path),
                f"LVM-{group}{lvmio.plain(v['uuid'])}",
                f"254:{v['minor']}",
            )
            for path, v in active.items()
        }

    def change(self, path: str, **values: Any) -> None:
        state = fakelvm.read(self.home)
        state["volumes"][path].update(values)
        fakelvm.write(self.home, state)

    def rename_group(self, old: str, new: str) -> None:
        state = fakelvm.read(self.home)
        state["groups"][new] = state["groups"].pop(old)
        there = state["volumes"].items()
        state["volumes"] = {path.replace(f"{old}/", f"{new}/"): v for path, v in there}
        fakelvm.write(self.home, state)

    def snapshots(self) -> list[str]:
        return [path for path in fakelvm.read(self.home)["volumes"] if "atomtx" in path]

    def left(self) -> list[str]:
        return super().left() + self.snapshots()


def _mount_logical(each: Mount, where: str) -> None:
    """Mount as mount(2) does, of what is active; a file system in memory with the files."""
    state = fakelvm.read(fakelvm.HOME)
    volume = state["volumes"].get(each.source)
    if volume is None or volume["uuid"] != each.guid or volume["attr"][4] == "-":
        raise FileNotFoundError(2, f"{each.source} is not active")
    target = os.readlink(where)
    _mount(mounted_as(each.source), target, "tmpfs", 0)
    shutil.copytree(fakelvm.stored(each.source), target, dirs_exist_ok=True)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[LvmScene]:
    made = LvmScene(tmp_path)
    yield made
    made.close()


def test_never_whole(scene: LvmScene) -> None:
    """A snapshot that a power cut left in LVM's metadata alone is rolled back, not resumed."""
    killed = scene.backup(scene.lvm_plan(), at="before:snapshotted#1")
    assert killed.status == -9
    assert len(scene.snapshots()) == 2
    state = fakelvm.read(scene.home)
    fakelvm.write(scene.home, state | {"faults": {"lvchange": "refuse"}})
    ended = scene.recover()
    assert ended.status == 0
    assert ended.run
    assert ended.run.outcome == Outcome.ROLLED_BACK
    assert "cannot activate" in (ended.run.reason or "")
    assert scene.left() == []


def test_group_renamed(scene: LvmScene) -> None:
    """Under its group's new name a moment is found, and waits: it is mounted by the old one."""
    assert scene.backup(scene.lvm_plan(), at="journal:snapshotted#1").status == -9
    scene.rename_group("data", "other")
    waits = scene.recover()
    assert isinstance(waits.raised, WaitingError)
    assert "the volume group data has another name now: other" in waits.raised.message
    assert len(scene.snapshots()) == 2
    scene.rename_group("other", "data")
    ended = scene.recover()
    assert ended.run
    assert ended.run.outcome == Outcome.COMPLETED
    assert scene.copies() == ["frozen frozen"]
    assert scene.left() == []


def test_course(scene: LvmScene) -> None:
    """A run takes both snapshots, activates the thin one, shows both, and leaves nothing."""
    ended = scene.backup(scene.lvm_plan())
    assert ended.status == 0
    assert ended.run
    assert ended.run.outcome == Outcome.COMPLETED
    assert scene.copies() == ["frozen frozen"]
    assert scene.left() == []
    assert any("2 logical volumes one after the other" in words for words in ended.said("step"))
    programs = [p for p in ended.points if "start:lv" in p or "start:dmsetup" in p]
    assert programs == [
        "start:lvs#1",
        "start:lvcreate#1",
        "start:lvcreate#2",
        "start:lvs#2",
        "start:lvs#3",
        "start:lvchange#1",
        "runner:start:dmsetup#1",
        "start:lvs#4",
        "start:lvremove#1",
        "start:lvs#5",
    ]


# What a run and a recovery pass, by what comes of a kill there.
UNDONE = ("start:lvcreate#1", "end:lvcreate#1", "start:lvcreate#2")
RESUMED = ("journal:snapshotted#1", "start:lvchange#1", "journal:mounted#1", "journal:backing-up#1")
DONE = ("journal:unmounting#1", "start:lvremove#1", "end:lvremove#1")


@pytest.mark.parametrize("at", [*UNDONE, *RESUMED, *DONE])
def test_killed(scene: LvmScene, at: str) -> None:
    """Promises 3 to 5: killed anywhere, a run is settled: of the same moment, or not at all."""
    check_killed(scene, at, "all")


def check_killed(scene: LvmScene, at: str, who: str, again: str = "") -> None:
    ended = scene.backup(scene.lvm_plan(), at=at, who=who)
    assert ended.status == -9
    scene.write("later", *VOLUMES)
    if again:
        scene.recover(at=again)
    ended = scene.recover()
    assert ended.status == 0
    assert scene.left() == []
    (row,) = scene.rows("SELECT outcome FROM runs")
    completed = row["outcome"] == "completed"
    assert completed or row["outcome"] == "rolled-back"
    if at in (*RESUMED, *DONE):
        assert completed
    # A command whose front end was killed goes on, and may take its snapshot after our writing.
    whole = {"frozen frozen", "frozen later"} if at in UNDONE else {"frozen frozen"}
    assert bool(scene.copies()) == completed
    assert set(scene.copies()) <= whole


@pytest.mark.full
def test_everywhere(scene: LvmScene, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As above, at every point of the front end and of the runner, with and without it."""
    points = scene.backup(scene.lvm_plan()).points
    for at in points:
        for who in ("front", "all"):
            other = LvmScene(tmp_path_factory.mktemp("point"))
            try:
                if other.backup(other.lvm_plan(), at=at, who=who).status == -9:
                    other.recover()
                    assert other.left() == [], (at, who)
            finally:
                other.close()


@pytest.mark.parametrize("again", ["end:lvs#1", "start:lvremove#1", "end:lvremove#1"])
def test_killed_again(scene: LvmScene, again: str) -> None:
    """Promise 5: a recovery that is killed is recovered."""
    check_killed(scene, "journal:backing-up#1", "all", again)


def test_dead_command(scene: LvmScene) -> None:
    """Half a snapshot that a dead `lvcreate` left is removed, and its origin loaded anew."""
    state = fakelvm.read(scene.home)
    fakelvm.write(scene.home, state | {"faults": {"lvcreate": "half"}})
    ended = scene.backup(scene.lvm_plan())
    assert ended.run
    assert ended.run.outcome == Outcome.FAILED
    assert scene.left() == []


def test_overflow(scene: LvmScene) -> None:
    """Promise 7: whatever the client says, a run whose snapshot overflowed has failed."""
    made = scene.lvm_plan()
    name = fakelvm.device_name(made.volumes[0].snapshot)
    state = fakelvm.read(scene.home)
    fakelvm.write(scene.home, state | {"status": {name: "snapshot Invalid"}})
    ended = scene.backup(made)
    assert ended.run
    assert ended.run.outcome == Outcome.FAILED
    assert "overflowed" in (ended.run.reason or "")
    assert scene.left() == []


def test_overflow_before_resume(scene: LvmScene) -> None:
    """An interrupted run whose snapshot overflowed is rolled back: there is no moment any more."""
    made = scene.lvm_plan()
    scene.backup(made, at="journal:backing-up#1", who="all")
    scene.change(made.volumes[0].snapshot, invalid="snapshot invalid")
    ended = scene.recover()
    assert ended.run
    assert ended.run.outcome == Outcome.ROLLED_BACK
    assert "overflowed" in (ended.run.reason or "")
    assert scene.copies() == []
    assert scene.left() == []


def test_foreign(scene: LvmScene) -> None:
    """Promise 2: a volume of another UUID under our name, with our tag, is left alone."""
    made = scene.lvm_plan()
    scene.backup(made, at="journal:snapshotted#1")
    scene.change(made.volumes[0].snapshot, uuid="another")
    ended = scene.recover()
    assert ended.run
    assert ended.run.outcome == Outcome.ROLLED_BACK
    assert scene.snapshots() == [made.volumes[0].snapshot]


def test_snapshot_of_ours(scene: LvmScene) -> None:
    """Promise 2: what an admin made on a run's own thin snapshot is named, and waited for."""
    made = scene.lvm_plan()
    scene.backup(made, at="journal:backing-up#1", who="all")
    thin = made.volumes[1].snapshot
    fakelvm.add(scene.home, "data/mine", origin=thin.partition("/")[2], attr="swi-a-s---")
    ended = scene.recover(rollback=True)
    assert ended.run
    assert (ended.run.state, ended.run.cleanup) == ("unmounting", "parked")
    assert any(
        f"the logical volume data/mine is on {thin}" in str(row["detail"])
        for row in scene.rows("SELECT detail FROM steps")
    )
    state = fakelvm.read(scene.home)
    assert state["volumes"].pop("data/mine")["origin"]
    fakelvm.write(scene.home, state)
    scene.recover(rollback=True)
    assert scene.left() == []

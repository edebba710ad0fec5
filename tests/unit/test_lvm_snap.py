"""
Snapshots of thin logical volumes that stay: `snap`, `prune`, `unsnap`, and their kills.

LVM is only played (`tests/fakelvm.py`): what it does itself is tested in the virtual machine.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atomtx import adoption, history, journalfile, lvmio, process, pruning, snapping, unsnapping
from atomtx import wanted as wanted_volumes
from atomtx.cli.jobs import Asked
from atomtx.config_schema import Job
from atomtx.convention import Pattern
from atomtx.errors import EffectError, UserError
from atomtx.executor import Tell
from atomtx.interrupts import Interrupts
from atomtx.journal import Journal
from atomtx.logical import Logicals
from atomtx.lvmio import Lvm
from atomtx.names import LvmSnapshot, RunId, kept_name, mounted_as
from atomtx.plan import Plan, Pool, Request
from atomtx.pruning import Choice
from atomtx.retention import Policy
from atomtx.volumes import lvm
from atomtx.volumes.zfs import Zfs
from tests import fakelvm
from tests.extent import some
from tests.scene import Ended
from tests.unit.test_logical import MOUNTS, THERE, table, volume
from tests.unit.test_lvm_runs import LvmScene

PATTERN = Pattern.parse("s-%Y%m%d%H%M")
AT = datetime(2026, 11, 22, 3, 1, tzinfo=UTC)
THIN = ("data/thin", "data/b-c.d")

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="lock F and its folder are root's")


class SnapScene(LvmScene):
    """Two thin volumes and a classic one; each plan is of another minute."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        fakelvm.add(home, THIN[1], attr="Vwi-aotz--", pool="pool")
        self.at = AT

    def snap(self, *names: str, **values: Any) -> Plan:
        self.at += timedelta(minutes=1)
        transient = values.pop("transient", False)
        request = Request(names or THIN, **values)
        return snapping.make_plan(
            request, pattern=PATTERN, at=self.at, zfs=Zfs(), transient=transient
        )

    def chosen(self, *names: str, keep: int = 1, **values: Any) -> Choice:
        return pruning.choose(
            Request(names or THIN),
            policy=Policy.parse({"keep-last": str(keep)}),
            pattern=values.pop("pattern", PATTERN),
            adopted=values.pop("adopted", ()),
            zfs=Zfs(),
            now=datetime.now(UTC),
            **values,
        )

    def unsnapped(self, *names: str) -> Choice:
        return unsnapping.choose(
            Request(names or THIN),
            policy=Policy(),
            pattern=PATTERN,
            zfs=Zfs(),
            snaps=lambda: history.snaps(self.state / journalfile.NAME),
            now=datetime.now(UTC),
        )

    def carry_out(self, choice: Choice, at: str = "", **options: Any) -> Ended:
        return self.prune(lambda _: choice, at, **options)

    @property
    def volumes(self) -> dict[str, Any]:
        found: dict[str, Any] = fakelvm.read(self.home)["volumes"]
        return found

    def play_lvm(self, **faults: str) -> None:
        fakelvm.write(self.home, fakelvm.read(self.home) | {"faults": faults})

    def there(self) -> list[str]:
        return [path for path in self.volumes if path not in (*THIN, "data/home")]

    def tags(self, path: str) -> set[str]:
        return set(self.volumes[path]["tags"])

    def rename(self, old: str, new: str) -> None:
        state = fakelvm.read(self.home)
        state["volumes"][new] = state["volumes"].pop(old)
        fakelvm.write(self.home, state)

    def remove(self, *paths: str) -> None:
        state = fakelvm.read(self.home)
        for path in paths:
            del state["volumes"][path]
        fakelvm.write(self.home, state)

    def commands(self, program: str) -> list[list[str]]:
        lines = (self.home / "lvm.log").read_text().splitlines()
        return [words[1:] for words in map(json.loads, lines) if words[0] == program]

    def is_whole(self, made: Plan) -> bool:
        """Tell whether all is kept, or nothing is there; anything else fails the test."""
        (run,) = self.rows(f"SELECT * FROM runs WHERE id = '{made.run}'")
        assert self.rows("SELECT * FROM steps WHERE outcome IS NULL") == []
        there = [v.snapshot for v in made.volumes if v.snapshot in self.volumes]
        if not there:
            assert (run["state"], run["outcome"]) == ("destroyed", "rolled-back")
            return False
        assert len(there) == len(made.volumes)
        marks = {"atomtx", f"atomtx.kept={made.run}"}
        marks |= {f"atomtx.transient={made.run}"} if made.transient else set()
        assert all(self.tags(path) == marks for path in there)
        assert all(self.volumes[path]["attr"] == "Vri---tz-k" for path in there)
        assert (run["state"], run["outcome"]) == ("kept", "completed")
        return True


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SnapScene]:
    made = SnapScene(tmp_path)
    path = f"{tmp_path}/bin:{process.BASE_ENVIRONMENT['PATH']}"
    played = {"PATH": path, "FAKE_LVM": str(tmp_path), "FAKE_ZFS": str(tmp_path)}
    monkeypatch.setattr(process, "BASE_ENVIRONMENT", {**process.BASE_ENVIRONMENT, **played})
    monkeypatch.setattr(lvmio, "devices", made._devices)
    yield made
    made.close()


def names(*plans: Plan) -> list[str]:
    return [volume.snapshot for made in plans for volume in made.volumes]


def succeeded(ended: Ended) -> Ended:
    assert (ended.status, ended.raised) == (0, None), (ended.raised, ended.told)
    return ended


def killed(ended: Ended) -> Ended:
    assert ended.status == -signal.SIGKILL
    return ended


# -- names -----------------------------------------------------------------------------------


def test_names() -> None:
    """One that stays lies beside its origin; its name is found again by that alone."""
    made = LvmSnapshot.to_keep("data/b-c.d", "s-1")
    assert str(made) == "data/b-c.d.s-1"
    assert LvmSnapshot.parse(str(made)) == made
    assert made.run is None
    assert kept_name(str(made), "data/b-c.d") == "s-1"
    assert kept_name(str(made), "data/b-c") == "d.s-1"
    assert kept_name(str(made), "data/other") == ""
    assert mounted_as(str(made)) == "/dev/mapper/data-b--c.d.s--1"


@pytest.mark.parametrize(
    ("origin", "name", "message"),
    [
        ("data/a", "s 1", "LVM cannot have a snapshot named 's 1'"),
        ("data/a", "s:1", "LVM cannot have a snapshot named 's:1'"),
        ("data/a", "s_tdata1", "it keeps names with '_tdata' for itself"),
        ("data/a", "s" * 119, "too long to be snapshotted"),
        ("data/a", "-" * 61, "too long to be snapshotted"),
    ],
)
def test_name_that_lvm_cannot_have(origin: str, name: str, message: str) -> None:
    """It is refused with one line before anything is done."""
    with pytest.raises(UserError, match=message):
        LvmSnapshot.to_keep(origin, name)


def test_longest_name() -> None:
    """LVM takes 124 bytes of both names, and device-mapper 127 with each hyphen twice."""
    assert LvmSnapshot.to_keep("data/a", "s" * 118)
    longest = LvmSnapshot.to_keep("data/a", "-" * 60)
    assert len(mounted_as(str(longest))) == len("/dev/mapper/") + 127


# -- what is asked for -----------------------------------------------------------------------


def to_keep(*texts: str, exclude: tuple[str, ...] = (), mounts: Any = MOUNTS) -> list[str]:
    found = Logicals(THERE, mounts).to_keep(texts, exclude)
    return [f"{each.facts.name} {each.mountpoint}" for each in found]


def test_to_keep() -> None:
    """A thin volume is the same by its name and by its path, mounted or not."""
    assert to_keep("data/thin") == to_keep("/home/thin/") == ["data/thin /home/thin"]
    assert to_keep("data/thin", mounts=table()) == ["data/thin -"]
    assert to_keep("data/thin", exclude=("/home/thin",)) == []
    assert to_keep("data/thin", exclude=("/home", "data/pool")) == ["data/thin /home/thin"]


def test_excluded_path_in_a_volume() -> None:
    """No volume is left out, or taken, for a directory in it, or what is not there at all."""
    for path in ("/home/thin/x", "/home/nowhere"):
        with pytest.raises(UserError, match=f"{path} is not a logical volume: .* in data/"):
            to_keep("data/thin", exclude=(path,))
    bind = table(("254:3", "ext4", "/bind"), root="/x")
    with pytest.raises(UserError, match="/bind is not a logical volume") as caught:
        to_keep("data/thin", exclude=("/bind",), mounts=bind)
    assert caught.value.hint == "to leave out the volume, name it: data/thin"


def test_excluded_link(tmp_path: Path) -> None:
    """A symbolic link is what it leads to, as where it names what is meant."""
    (tmp_path / "link").symlink_to("/usr/../etc")
    link = str(tmp_path / "link")
    job = Job(volumes=(link, "data/thin"), exclude=(link, "data/home"))
    request = Asked(job).request()
    assert request.names == ("/etc", "data/thin")
    assert request.exclude == ("/etc", "data/home")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data/home", "data/home cannot be snapshotted: it is not thin, .*overflows with time"),
        ("/home", "data/home cannot be snapshotted: it is not thin"),
        ("/home/thin/x", "/home/thin/x is a directory in the logical volume data/thin"),
        ("data/pool", "data/pool cannot be snapshotted: it is a thin pool"),
        ("data/snap", "data/snap cannot be snapshotted: it is a snapshot"),
        ("data/none", "there is no logical volume data/none"),
        ("data/btr", "holds a btrfs"),
    ],
)
def test_not_to_keep(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_keep(name)


def test_twice() -> None:
    with pytest.raises(UserError, match="data/thin is given twice"):
        to_keep("data/thin", "/home/thin")


def test_thin_below_btrfs() -> None:
    """A snapshot of one device of a btrfs would be of no use; where it is mounted is told."""
    thin = volume("data/under", 9, pool="pool", attributes="Vwi-aotz--")
    for at, hint in (("/btr", "name it by its path: /btr"), ("", "name it by its path")):
        found = Logicals([replace(thin, btrfs=at)], MOUNTS)
        with pytest.raises(UserError, match="data/under holds a btrfs") as caught:
            found.to_keep(["data/under"])
        assert caught.value.hint == hint
    assert Logicals([thin], MOUNTS).to_keep(["data/under"])


@pytest.mark.parametrize("tag", ["atomtx.run=x", "atomtx.kept=x"])
def test_ours_are_no_volumes(tag: str) -> None:
    """Our own snapshots are thin volumes to LVM; neither a snap nor a backup takes one."""
    ours = volume(
        "data/thin.s", 9, pool="pool", attributes="Vri-aotz-k", tags=frozenset({"atomtx", tag})
    )
    there = Logicals([*THERE, ours], table(("254:9", "xfs", "/old")))
    for take in (there.to_keep, there.select):
        for name in ("data/thin.s", "/old"):
            with pytest.raises(UserError, match="it is a snapshot that atomtx took"):
                take([name])


@root_only
def test_asked(scene: SnapScene) -> None:
    """In the user's order; excluded ones are left out, of LVM as of ZFS; the key follows both."""
    scene.plan("tank/a", "tank/b")
    scene.play(datasets={"tank/a": "filesystem", "tank/b": "filesystem"})
    asked = ("data/thin", "tank/a", "data/b-c.d")
    found = wanted_volumes.find_all(Request(asked), Zfs())
    assert found.asked == asked
    assert [facts.name for facts in found.logical_facts] == list(THIN)
    less = wanted_volumes.find_all(Request(asked, exclude=("data/thin",)), Zfs())
    assert [facts.name for facts in less.logical_facts] == [THIN[1]]
    assert wanted_volumes.key(less) != wanted_volumes.key(found)
    with pytest.raises(UserError, match="everything is excluded"):
        wanted_volumes.find_all(Request(("data/thin",), exclude=("data/thin",)), Zfs())
    with pytest.raises(UserError, match="data/thin is on LVM: this is of ZFS alone"):
        wanted_volumes.find(Request(("tank/a", "data/thin")), Zfs())


@root_only
def test_pool_with_the_name_of_a_group(scene: SnapScene) -> None:
    """What LVM has not is a dataset where a pool has the group's name, and nothing is mounted."""
    for request in (Request(("data/x",)), Request(("data/x", "tank/a"))):
        with pytest.raises(UserError, match="there is no logical volume data/x"):
            wanted_volumes.find_all(request, Zfs())
    scene.play(pools={"data": "guid of data"}, datasets={"data/x": "filesystem"})
    found = wanted_volumes.find_all(Request(("data/x", "data/thin")), Zfs())
    assert [facts.name for facts in found.datasets] == ["data/x"]
    assert [facts.name for facts in found.logical_facts] == ["data/thin"]
    scene.play(faults={"zpool": "refuse"})
    with pytest.raises(UserError, match="there is no logical volume data/y"):
        wanted_volumes.find_all(Request(("data/y",)), Zfs())


@root_only
def test_group_at_rest(scene: SnapScene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume is found also where no device is of its group; a pool's names cost no more."""
    monkeypatch.setattr(lvmio, "devices", dict)
    request = Request(("data/thin", "tank/a"), exclude=("data/b-c.d",))
    scene.plan("tank/a")
    scene.play(datasets={"tank/a": "filesystem"})
    found = wanted_volumes.find_all(request, Zfs())
    assert [facts.name for facts in found.logical_facts] == ["data/thin"]
    assert [facts.name for facts in found.datasets] == ["tank/a"]
    assert len(scene.commands("lvs")) == 1
    assert (scene.home / "zfs.log").read_text().count('"zpool"') == 1
    with pytest.raises(UserError, match="there is no logical volume data/none"):
        wanted_volumes.find_all(Request(("data/none",)), Zfs())
    with pytest.raises(UserError, match="there is no pool nowhere"):
        wanted_volumes.find_all(Request(("nowhere/a",)), Zfs())
    assert len(scene.commands("lvs")) == 3
    wanted_volumes.find_all(Request(("tank/a",)), Zfs())
    assert len(scene.commands("lvs")) == 3


def test_paths_alone() -> None:
    """Where paths alone are named, no pool is asked for whether one is a volume group's."""

    def pools() -> list[Pool]:
        raise AssertionError("it asks for the pools")

    request = Request(("/home",), exclude=("/home/b",))
    assert wanted_volumes._inactive(request, pools) == []


@root_only
def test_group_at_rest_without_lvm(scene: SnapScene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LVM cannot be asked a name that no pool has is that of a pool, as before."""
    monkeypatch.setattr(lvmio, "devices", dict)
    fakelvm.write(scene.home, fakelvm.read(scene.home) | {"faults": {"lvs": "refuse"}})
    with pytest.raises(UserError, match="there is no pool data"):
        wanted_volumes.find_all(Request(("data/thin",)), Zfs())
    scene.play(faults={"zpool": "refuse"})
    fakelvm.write(scene.home, fakelvm.read(scene.home) | {"faults": {}})
    found = wanted_volumes.find_all(Request(("data/thin",)), Zfs())
    assert [facts.name for facts in found.logical_facts] == ["data/thin"]


# -- snap ------------------------------------------------------------------------------------


@root_only
@pytest.mark.parametrize("transient", [False, True])
def test_course(scene: SnapScene, transient: bool) -> None:
    """Each beside its origin, read-only and inactive, with the marks; the time is measured."""
    made = scene.snap(transient=transient)
    assert names(made) == ["data/thin.s-202611220302", "data/b-c.d.s-202611220302"]
    first, last = snapping.steps(made)
    transiently = ", as transient" if transient else ""
    assert first.describe() == (
        f"snapshot 2 logical volumes of the volume group data, one after the other{transiently}"
    )
    assert last.describe() == "keep 2 snapshots of the volume group data"
    ended = succeeded(scene.backup(made))
    assert scene.is_whole(made)
    assert sorted(scene.there()) == sorted(names(made))
    assert any("2 logical volumes one after the other within" in w for w in ended.said("step"))
    assert [call for call in scene.commands("lvchange") if "--activate" in call] == []
    assert len(scene.commands("lvchange")) == 1
    assert not (scene.home / "zfs.log").exists()  # no program of ZFS was started


@root_only
def test_killed_at_every_point(scene: SnapScene) -> None:
    """
    Promises 4 and 5: wherever it is killed, the moment is whole after a recovery, or not there.

    Once it was whole before the kill it is kept, never taken away; and inactive.
    """
    scene.backup(scene.snap())  # makes the journal
    points = scene.backup(scene.snap()).points
    last = "end:lvcreate#2"
    assert {"before:planned#1", last, "journal:snapshotted#1", "journal:kept#1"} <= set(points)
    assert {"start:lvchange#1", "end:lvchange#1"} <= set(points)
    outcomes = {True: 0, False: 0}
    for point in some(points, 8):
        made = scene.snap(transient=outcomes[True] % 2 == 1)
        killed(scene.backup(made, at=point))
        if not scene.rows(f"SELECT * FROM runs WHERE id = '{made.run}'"):
            continue  # before its intents were durable
        succeeded(scene.recover())
        whole = scene.is_whole(made)
        outcomes[whole] += 1
        # A command whose front end was killed goes on.
        assert whole or points.index(point) < points.index(last), point
    assert scene.recover().decisions == []
    assert min(outcomes.values()) > 1, outcomes


@root_only
@pytest.mark.parametrize("again", ["end:lvchange#1", "start:lvchange#2", "end:lvchange#3"])
def test_recovery_is_killed_too(scene: SnapScene, again: str) -> None:
    """Promise 5: while a recovery activates, marks, and deactivates them it is killed as well."""
    made = scene.snap()
    killed(scene.backup(made, at="before:snapshotted#1"))
    killed(scene.recover(at=again))
    succeeded(scene.recover())
    assert scene.is_whole(made)


@pytest.mark.full
@root_only
def test_recovery_everywhere(scene: SnapScene) -> None:
    """As above, at every point of the recovery, after four crashes."""
    scene.backup(scene.snap())
    firsts = (
        "end:lvcreate#1",
        "before:snapshotted#1",
        "journal:snapshotted#1",
        "end:lvchange#1",
    )
    for at in firsts:
        killed(scene.backup(scene.snap(), at=at))
        points = scene.recover().points
        assert points
        for second in points:
            made = scene.snap()
            killed(scene.backup(made, at=at))
            killed(scene.recover(at=second))
            succeeded(scene.recover())
            assert scene.is_whole(made) is (at != firsts[0]), (at, second)


@root_only
def test_never_whole(scene: SnapScene) -> None:
    """A snapshot that cannot be activated after a power cut is no moment: all goes away."""
    made = scene.snap()
    killed(scene.backup(made, at="before:snapshotted#1"))
    state = fakelvm.read(scene.home)
    fakelvm.write(scene.home, state | {"faults": {"lvchange": "refuse"}})
    ended = succeeded(scene.recover())
    assert ended.run
    assert "cannot activate" in str(ended.run.reason)
    assert not scene.is_whole(made)


@root_only
def test_lvcreate_that_died(scene: SnapScene) -> None:
    """What LVM's metadata have, its thin pool may not: no moment, whatever `lvs` shows."""
    made = scene.snap()
    scene.play_lvm(lvcreate="late")
    ended = scene.backup(made)
    assert ended.run
    assert (ended.run.outcome, ended.run.state) == ("failed", "destroyed")
    assert "cannot take a snapshot of data/thin" in str(ended.run.reason)
    assert scene.left() == []
    assert fakelvm.read(scene.home)["suspended"] == []


@root_only
def test_lvremove_that_died(scene: SnapScene, three: list[Plan]) -> None:
    """What it has left suspended is resumed at once: nobody settles a run that has ended."""
    scene.play_lvm(lvremove="late")
    scene.carry_out(scene.chosen())
    assert fakelvm.read(scene.home)["suspended"] == []
    assert len(scene.there()) == 2


@root_only
def test_two_groups_of_one_name(scene: SnapScene, three: list[Plan]) -> None:
    """LVM refuses both: what another group of that name does not have is not gone from ours."""
    before = scene.there()
    scene.play_lvm(lvremove="refuse")
    choice = scene.chosen()
    real = lvmio.Lvm.volumes

    def volumes(self: lvmio.Lvm) -> list[lvmio.Volume]:
        there = real(self)
        return [*there, replace(there[-1], group_uuid="another", uuid="another", name="zz")]

    scene.changes.append(lambda: setattr(lvmio.Lvm, "volumes", volumes))
    ended = scene.carry_out(choice)
    assert isinstance(ended.raised, EffectError)
    assert "out of luck" in ended.raised.message
    assert scene.there() == before


@root_only
def test_marked_again(scene: SnapScene) -> None:
    """Promise 2: where they cannot be marked now the run waits; what is in use stays active."""
    made = scene.snap()
    killed(scene.backup(made, at="journal:snapshotted#1"))
    for values in ({"used": True, "attr": "Vri-aotz-k"}, {}):
        scene.change(made.volumes[0].snapshot, **values)
    state = fakelvm.read(scene.home)
    fakelvm.write(scene.home, state | {"faults": {"lvchange": "refuse"}})
    assert "are not marked as kept" in str(scene.recover().raised)
    fakelvm.write(scene.home, fakelvm.read(scene.home) | {"faults": {}})
    succeeded(scene.recover())
    scene.change(made.volumes[0].snapshot, attr="Vri---tz-k")
    assert scene.is_whole(made)


@root_only
def test_name_is_taken(scene: SnapScene) -> None:
    """One moment of a name; a volume of the user's that has it is left alone."""
    succeeded(scene.backup(scene.snap("data/thin")))
    scene.at = AT
    with pytest.raises(UserError, match="there is a snapshot 's-202611220302' already"):
        scene.snap()
    made = scene.snap()
    mine = fakelvm.add(scene.home, made.volumes[1].snapshot)
    ended = scene.backup(made)
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert made.volumes[0].snapshot not in scene.volumes
    assert scene.volumes[made.volumes[1].snapshot]["uuid"] == mine


@root_only
def test_destroyed_by_somebody(scene: SnapScene) -> None:
    """What is gone before it was kept is told; the others are kept."""
    made = scene.snap()
    killed(scene.backup(made, at="journal:snapshotted#1"))
    scene.remove(made.volumes[0].snapshot)
    ended = succeeded(scene.recover())
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("kept", "partial")
    assert f"atomtx.kept={made.run}" in scene.tags(made.volumes[1].snapshot)


@root_only
def test_mixed(scene: SnapScene) -> None:
    """Promise 8: datasets and logical volumes in one run; what lies between is measured."""
    of_zfs = scene.plan("tank/a")
    for point in ("", "end:lvcreate#2", "end:lvcreate#1"):
        made = scene.snap()
        dataset = replace(of_zfs.volumes[0], snapshot=f"tank/a@s-{made.run}")
        both = replace(made, volumes=(dataset, *made.volumes))
        scene.play(snapshots={})
        scene.backup(both, at=point)
        succeeded(scene.recover())
        whole = point != "end:lvcreate#1"
        assert len(scene.pool["snapshots"]) == whole, point
        assert [path in scene.volumes for path in names(made)] == [whole] * 2, point
    (row, *_) = scene.rows("SELECT detail FROM steps WHERE kind LIKE 'take%' AND outcome = 'done'")
    skew = "1 pool and 2 logical volumes one after the other within"
    assert skew in row["detail"]


@root_only
def test_lost_journal(scene: SnapScene) -> None:
    """What an interrupted run has taken is found by `recover --scan`; what is kept is not ours."""
    whole, half = scene.snap(), scene.snap()
    scene.backup(whole)
    killed(scene.backup(half, at="end:lvcreate#2"))
    fakelvm.add(scene.home, "data/mine", tags=[f"atomtx.run={RunId.new()}"])
    (stray,) = adoption.scan(None, (), lvm.marked(Lvm()), keepers=[half.run, *lvm.keepers(Lvm())])
    assert (stray.run, len(stray.snapshots)) == (half.run, 2)
    assert (stray.is_of_snap, stray.kept) == (True, 1)
    assert [*lvm.keepers(Lvm())] == [whole.run] * 2
    adopted = adoption.plan_of(stray, ())
    (scene.state / journalfile.NAME).unlink()

    def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
        journal.begin(adopted, adoption.intents_of(stray, adopted))

    scene._in_front_end(work, {})
    succeeded(scene.recover(rollback=True))
    assert sorted(scene.there()) == sorted([*names(whole), "data/mine"])


# -- prune -----------------------------------------------------------------------------------


@pytest.fixture
def three(scene: SnapScene) -> list[Plan]:
    """Three kept moments of two volumes, the oldest first."""
    plans = [scene.snap() for _ in range(3)]
    for made in plans:
        succeeded(scene.backup(made))
    return plans


@root_only
def test_prune(scene: SnapScene, three: list[Plan]) -> None:
    """The rules are for each volume; what they let go is gone, in one command a group."""
    choice = scene.chosen(keep=1)
    assert sorted(v.item.name for v in choice.verdicts if v.keep) == sorted(names(three[2]))
    (step,) = pruning.intents(choice, bookmark=True, copies=True)
    assert step.describe() == "destroy 4 kept snapshots of the volume group data"
    assert not step.copies
    ended = succeeded(scene.carry_out(choice))
    assert sorted(scene.there()) == sorted(names(three[2]))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("pruned", "completed")
    (call,) = scene.commands("lvremove")
    assert call.count("--select") == 1
    assert scene.chosen().going == ()


@root_only
def test_what_does_not_count(scene: SnapScene, three: list[Plan]) -> None:
    """Others' snapshots, backups', transient ones, of another pattern, writable, other volumes."""
    scene.backup(scene.snap("data/thin", transient=True))
    run = str(RunId.new())
    kept = ["atomtx", f"atomtx.kept={run}"]
    thin: dict[str, Any] = {"pool": "pool", "origin": "thin", "attr": "Vri---tz-k"}
    others: dict[str, dict[str, Any]] = {
        "data/thin.s-202611220401": thin,
        f"data/atomtx-{run}-0": {**thin, "tags": kept},
        "data/thin.t-202611220401": {**thin, "tags": kept},
        "data/thin.s-202611220402": {**thin, "tags": kept, "attr": "Vwi---tz-k"},
        "data/thin.s-202611220403": {**thin, "tags": [*kept, "atomtx.kept=other"]},
        "data/thin.s-202611220404": {**thin, "tags": [*kept, "atomtx.run=other"]},
        "data/thin.s-202611220405": {**thin, "tags": kept, "origin": ""},
        "data/home.s-202611220406": {**thin, "tags": kept, "origin": "home"},
        "data/thin.s-202611220407": {**thin, "tags": kept, "attr": "Sri---tz-k"},
    }
    for path, values in others.items():
        fakelvm.add(scene.home, path, **values)
    counted = [v.item.name for v in scene.chosen("data/thin").verdicts]
    assert sorted(counted) == sorted(made.volumes[0].snapshot for made in three)


@root_only
def test_adopted(scene: SnapScene, three: list[Plan]) -> None:
    """A read-only thin snapshot that the user names counts, whoever took it."""
    thin = {"pool": "pool", "origin": "thin"}
    fakelvm.add(scene.home, "data/mine", **thin, attr="Vri---tz-k")
    fakelvm.add(scene.home, "data/work", **thin, attr="Vwi-a-tz--")
    choice = scene.chosen("data/thin", keep=1, adopted=["data/mine"])
    assert [v.item.name for v in choice.verdicts if v.keep] == ["data/mine"]
    later = scene.snap("data/thin")
    succeeded(scene.backup(later))
    succeeded(scene.carry_out(scene.chosen("data/thin", keep=1, adopted=["data/mine"])))
    assert "data/mine" not in scene.volumes
    with pytest.raises(UserError, match="there is no snapshot data/work of what was named"):
        scene.chosen("data/thin", adopted=["data/work"])


@root_only
@pytest.mark.parametrize(
    ("change", "detail", "outcome"),
    [
        ({"uuid": "another"}, "1 foreign", "partial"),
        ({"time": 1}, "1 foreign", "partial"),
        ({"tags": ["atomtx"]}, "1 unmarked", "partial"),
        ({"tags": ["atomtx", "atomtx.kept=other"]}, "1 unmarked", "partial"),
        ({"attr": "Vwi---tz-k"}, "1 unmarked", "partial"),
        ({"attr": "Sri---tz-k"}, "1 unmarked", "partial"),
        ({"used": True, "attr": "Vri-aotz-k"}, "1 busy", "partial"),
        ({"used": "by a device", "attr": "Vri-aotz-k"}, "1 busy", "partial"),
        (None, "1 absent", "completed"),
    ],
)
def test_proof(
    scene: SnapScene, three: list[Plan], change: dict[str, Any] | None, detail: str, outcome: str
) -> None:
    """Promise 2: what is not the one that was decided about, or is in use, stays; the rest goes."""
    choice = scene.chosen()
    victim = choice.going[0].name

    def before() -> None:
        scene.remove(victim) if change is None else scene.change(victim, **change)

    ended = succeeded(scene.carry_out(choice, before=before))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("pruned", outcome)
    if "busy" in detail:
        assert (
            ended.run.reason == f"{victim}: in use meanwhile: mounted, open, or with a device or "
            "a classic snapshot on it"
        )
    (step,) = scene.rows(f"SELECT * FROM steps WHERE run = '{choice.plan.run}'")
    assert (step["outcome"], step["detail"]) == ("done", detail)
    assert not {each.name for each in choice.going[1:]} & set(scene.there())
    assert (victim in scene.volumes) is (outcome == "partial")


@root_only
def test_proof_under_lvms_lock(scene: SnapScene, three: list[Plan]) -> None:
    """What another puts in the place between our look and LVM's lock is not what is destroyed."""
    choice = scene.chosen("data/thin", keep=2)
    (going,) = choice.going
    kind = lvm.LogicalVolumes(Lvm())
    real = kind._lvm.run

    def run(*argv: str) -> process.Completed:
        if argv[0] == "lvremove":
            scene.change(going.name, tags=["atomtx", "atomtx.kept=other"])
        return real(*argv)

    kind._lvm.run = run  # type: ignore[method-assign]
    assert list(kind.prune([going])) == [{going.name: "busy"}]
    assert going.name in scene.volumes


@root_only
def test_origin_of_another(scene: SnapScene, three: list[Plan]) -> None:
    """A thin snapshot of which there are snapshots goes, and they stay."""
    oldest = three[0].volumes[0].snapshot
    fakelvm.add(scene.home, "data/mine", pool="pool", origin=oldest.partition("/")[2])
    succeeded(scene.carry_out(scene.chosen()))
    assert oldest not in scene.volumes
    assert "data/mine" in scene.volumes


@root_only
def test_prune_killed_at_every_point(scene: SnapScene) -> None:
    """
    Promise 5: wherever it is killed, a recovery gives it up, and tells how many are gone.

    The next one comes to the same end: what no rule keeps is gone, and no more.
    """
    for _ in range(2):
        scene.backup(scene.snap())
    points = scene.carry_out(scene.chosen()).points
    assert {"start:lvremove#1", "end:lvremove#1", "journal:pruned#1"} <= set(points)
    given_up = set()
    for point in some(points, 4):
        while len(scene.chosen().verdicts) < 4:
            scene.backup(scene.snap())
        choice = scene.chosen()
        stay = sorted(v.item.name for v in choice.verdicts if v.keep)
        killed(scene.carry_out(choice, at=point))
        recovered = succeeded(scene.recover())
        gone = sum(each.name not in scene.volumes for each in choice.going)
        if recovered.run:
            given_up.add(gone)
            assert recovered.run.outcome == ("partial" if gone else "rolled-back")
            assert recovered.run.reason == f"it was interrupted; {gone} of 2 were destroyed"
        assert set(stay) <= set(scene.there()), point
        succeeded(scene.carry_out(scene.chosen()))
        assert sorted(scene.there()) == stay, point
    assert given_up == {0, 2}


@root_only
def test_pool_is_suspended(scene: SnapScene, three: list[Plan]) -> None:
    """What a killed `lvremove` left suspended is resumed first: all writes to its volumes hang."""
    choice = scene.chosen()
    killed(scene.carry_out(choice, at="start:lvremove#1"))
    group = lvmio.PREFIX + lvmio.plain(choice.plan.volumes[0].pool_guid)
    state = fakelvm.read(scene.home)
    rows = [["data-pool-tpool", f"{group}{'p' * 32}-tpool", 6], ["data-x", f"{group}x", 7]]
    fakelvm.write(scene.home, state | {"suspended": rows})
    succeeded(scene.recover())
    assert fakelvm.read(scene.home)["suspended"] == rows[1:]


@root_only
def test_interrupted(scene: SnapScene, three: list[Plan]) -> None:
    """A signal is heeded between two commands; what is left stays."""
    choice = scene.chosen()

    def before() -> None:
        lvm._AT_ONCE = 1
        real = lvm.LogicalVolumes._change

        def change(*args: Any, **options: Any) -> dict[str, str]:
            signal.raise_signal(signal.SIGTERM)
            return real(*args, **options)

        lvm.LogicalVolumes._change = change  # type: ignore[method-assign]

    ended = scene.carry_out(choice, before=before)
    assert ended.interrupted
    (run,) = scene.rows(f"SELECT * FROM runs WHERE id = '{choice.plan.run}'")
    assert (run["state"], run["outcome"]) == ("pruned", "partial")
    assert run["reason"].endswith("1 of 4 were destroyed")
    assert len(scene.there()) == 5


@root_only
def test_fails_in_the_middle(scene: SnapScene, three: list[Plan]) -> None:
    """What a command has destroyed before it failed is counted: LVM is asked."""
    choice = scene.chosen()

    def before() -> None:
        fakelvm.write(
            scene.home, fakelvm.read(scene.home) | {"faults": {"lvremove": "all but one"}}
        )

    ended = scene.carry_out(choice, before=before)
    assert isinstance(ended.raised, EffectError)
    assert "Failed to update pool" in str(ended.raised)
    (run,) = scene.rows(f"SELECT * FROM runs WHERE id = '{choice.plan.run}'")
    assert (run["state"], run["outcome"]) == ("pruned", "partial")
    assert run["reason"].endswith("3 of 4 were destroyed")
    assert len(scene.there()) == 3


@root_only
def test_renamed(scene: SnapScene, three: list[Plan]) -> None:
    """Under another name it is still there: that is told, and it is not called destroyed."""
    choice = scene.chosen()
    victim = choice.going[0].name
    ended = succeeded(scene.carry_out(choice, before=lambda: scene.rename(victim, "data/renamed")))
    assert ended.run
    assert ended.run.outcome == "partial"
    assert ended.run.reason == f"{victim}: it has another name now"
    (step,) = scene.rows(f"SELECT * FROM steps WHERE run = '{choice.plan.run}'")
    assert step["detail"] == "1 renamed"
    assert "data/renamed" in scene.there()


@root_only
def test_clone_of_one_that_is_gone(scene: SnapScene, three: list[Plan]) -> None:
    """In the group of a cloned disk are the same volumes: what is gone from ours is gone."""
    choice = scene.chosen()
    victim = choice.going[0].name

    def clone_and_remove() -> None:
        state = fakelvm.read(scene.home)
        state["groups"]["copy"] = state["groups"]["data"] | {"uuid": fakelvm._uuid("vgcopy")}
        there = state["volumes"]
        state["volumes"] = there | {k.replace("data/", "copy/"): dict(there[k]) for k in there}
        fakelvm.write(scene.home, state)
        scene.remove(victim)

    ended = succeeded(scene.carry_out(choice, before=clone_and_remove))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("completed", None)
    assert victim.replace("data/", "copy/") in scene.volumes


@root_only
def test_renamed_under_the_command(scene: SnapScene, three: list[Plan]) -> None:
    """Between our look and LVM's command as well; the others are gone, and are counted."""
    choice = scene.chosen()

    def before() -> None:
        real = lvmio.Lvm.run

        def run(self: Lvm, *argv: str) -> process.Completed:
            if argv[0] == "lvremove":
                scene.rename(choice.going[0].name, "data/renamed")
            return real(self, *argv)

        lvmio.Lvm.run = run  # type: ignore[method-assign]

    assert isinstance(scene.carry_out(choice, before=before).raised, EffectError)
    (run,) = scene.rows(f"SELECT * FROM runs WHERE id = '{choice.plan.run}'")
    assert run["outcome"] == "partial"
    assert run["reason"].endswith("3 of 4 were destroyed")
    assert "data/renamed" in scene.there()


@root_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": 1}, "the volume group data lacks 1 devices"),
        ({"uuid": "another"}, "the volume group data is not there"),
    ],
)
def test_group_absent(
    scene: SnapScene, three: list[Plan], change: dict[str, Any], message: str
) -> None:
    """Promise 2: "not found" in a group that is not there is not "gone"."""
    choice = scene.chosen()

    def before() -> None:
        state = fakelvm.read(scene.home)
        state["groups"]["data"] |= change
        fakelvm.write(scene.home, state)

    ended = scene.carry_out(choice, before=before)
    assert isinstance(ended.raised, EffectError)
    assert message in ended.raised.message
    (run,) = scene.rows(f"SELECT * FROM runs WHERE id = '{choice.plan.run}'")
    assert (run["state"], run["outcome"]) == ("pruned", "rolled-back")
    assert len(scene.there()) == 6


@root_only
def test_group_renamed(scene: SnapScene, three: list[Plan]) -> None:
    """Under another name nothing of the group is found, and nothing is called gone."""
    choice = scene.chosen()

    def before() -> None:
        state = fakelvm.read(scene.home)
        state["groups"]["new"] = state["groups"].pop("data")
        state["volumes"] = {k.replace("data/", "new/"): v for k, v in state["volumes"].items()}
        fakelvm.write(scene.home, state)

    ended = scene.carry_out(choice, before=before)
    assert isinstance(ended.raised, EffectError)
    assert "data has another name now" in ended.raised.message


@root_only
def test_until_saved(scene: SnapScene) -> None:
    """No backup reads them, so they cannot wait for one."""
    with pytest.raises(UserError, match=r"data/thin is on LVM: .*they would wait for ever"):
        scene.chosen(saved={"home": ()})


# -- unsnap ----------------------------------------------------------------------------------


@root_only
def test_unsnap(scene: SnapScene) -> None:
    """Those alone go that were taken to go again, and still say so under LVM's lock."""
    stay, go, other = scene.snap(), scene.snap(transient=True), scene.snap(transient=True)
    for made in (stay, go, other):
        succeeded(scene.backup(made))
    waits = scene.snap(transient=True)
    killed(scene.backup(waits, at="end:lvchange#1"))
    choice = scene.unsnapped()
    assert sorted(each.name for each in choice.going) == sorted(names(go, other))
    assert {v.reasons for v in choice.verdicts if v.keep} == {
        (f"the run that took it has not ended: {waits.run}",)
    }
    became = other.volumes[0].snapshot

    def before() -> None:
        scene.change(became, tags=["atomtx", f"atomtx.kept={other.run}"])

    succeeded(scene.carry_out(choice, transient=True, before=before))
    assert sorted(scene.there()) == sorted([*names(stay, waits), became])
    succeeded(scene.recover())
    succeeded(scene.carry_out(scene.unsnapped(), transient=True))
    assert sorted(scene.there()) == sorted([*names(stay), became])

"""LVM through its commands, which are only played: what is taken, proven and destroyed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomtx import btrfsio, lvmio, probing, process
from atomtx.errors import EffectError
from atomtx.intents import Mount, Origin, TakeSnapshots
from atomtx.lvmio import Lvm
from atomtx.mounts import namespace
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.names import LvmSnapshot, RunId, mounted_as
from atomtx.plan import PlannedVolume, Request
from atomtx.records import Volume
from atomtx.recovery import Presence
from atomtx.volumes import lvm
from atomtx.volumes.kind import Identity
from atomtx.volumes.lvm import LogicalVolumes
from tests import fakelvm
from tests.runs import a_run

RUN = RunId("0123456789abcdef")
GIB = 1 << 30
COW = 64 << 20


class Stage:
    """Two volume groups, with the kind of volume that is tested."""

    def __init__(self, home: Path) -> None:
        self.home = home
        fakelvm.install(home, {"data": 4 * GIB, "old-vg": GIB})
        self.sysfs = home / "block"
        self.sysfs.mkdir()
        self.origins = {
            "data/home": fakelvm.add(home, "data/home"),
            "data/thin": fakelvm.add(home, "data/thin", attr="Vwi-aotz--", pool="pool"),
        }
        self.kind = LogicalVolumes(Lvm())

    def volume(self, name: str, n: int = 0) -> PlannedVolume:
        """Return a volume as it is planned."""
        group = name.partition("/")[0]
        uuid = self.state["groups"][group]["uuid"]
        cow = 0 if name == "data/thin" else COW
        origin = Origin(self.origins[name], name, "xfs", cow, "" if cow else "pool")
        snapshot = str(LvmSnapshot.of(group, RUN, n))
        return PlannedVolume("lvm", group, uuid, name, origin.uuid, "/x", snapshot, origin=origin)

    def take(self, *volumes: PlannedVolume) -> EffectError | None:
        intent = TakeSnapshots(
            "data",
            volumes[0].pool_guid,
            tuple(v.snapshot for v in volumes),
            RUN,
            "lvm",
            origins=tuple(v.origin for v in volumes if v.origin),
        )
        try:
            return self.kind.take(intent)
        except EffectError as exc:
            return exc

    def taken(self, *volumes: PlannedVolume) -> list[Identity]:
        assert self.take(*volumes) is None
        found = self.kind.identities(volumes)
        return [found[volume.snapshot] for volume in volumes]

    @property
    def state(self) -> dict[str, Any]:
        return fakelvm.read(self.home)

    def change(self, work: Callable[[dict[str, Any]], object]) -> None:
        state = self.state
        work(state)
        fakelvm.write(self.home, state)

    def play(self, **faults: str) -> None:
        self.change(lambda state: state.update(faults=faults))

    def calls(self, program: str) -> list[list[str]]:
        log = self.home / "lvm.log"
        found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [words[1:] for words in found if words[0] == program]

    def activate(self, number: str, name: str, uuid: str, *slaves: str) -> None:
        """Have sysfs show a device."""
        entry = self.sysfs / f"dm-{number.partition(':')[2]}"
        (entry / "dm").mkdir(parents=True)
        (entry / "dm/name").write_text(name + "\n")
        (entry / "dm/uuid").write_text(uuid + "\n")
        (entry / "dev").write_text(number + "\n")
        for slave in slaves:
            (entry / "slaves" / slave).mkdir(parents=True)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage(tmp_path)
    path = f"{tmp_path}/bin:{process.BASE_ENVIRONMENT['PATH']}"
    monkeypatch.setattr(
        process,
        "BASE_ENVIRONMENT",
        {**process.BASE_ENVIRONMENT, "PATH": path, "FAKE_LVM": str(tmp_path)},
    )
    monkeypatch.setattr(lvmio, "_SYSFS", made.sysfs)
    monkeypatch.setattr(lvm, "_LOOK_S", 0.0)
    return made


# -- asking ------------------------------------------------------------------------------------


def test_device_whose_name_is_no_text(stage: Stage) -> None:
    """What others have made by device-mapper may have any bytes as its name; LVM's are found."""
    stage.activate("254:0", "odd", "odd")
    for name in ("name", "uuid"):
        (stage.sysfs / "dm-0/dm" / name).write_bytes(b"\xff\n")
    stage.activate("254:1", "data-home", lvmio.PREFIX + "x", "dm-0")
    assert [device.name for device in lvmio.devices().values()] == ["data-home"]
    assert lvmio._below(["data-home"]) == [os.fsdecode(b"\xff")]


def test_asked_of_live_directories(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """LVM is asked of what is read live on it; without its commands it can only be read live."""
    stage.activate("254:1", "data-home", lvmio.PREFIX + "x")
    there = Entry(1, 0, "254:1", "/", "/srv", "rw", (), "ext4", "/dev/mapper/data-home", "rw")
    request, table = Request((), live=("/srv/www",)), Table([there])
    assert "data/home" in [volume.path for volume in lvm.named(request, table)[1]]
    nowhere = str(stage.home / "none")
    monkeypatch.setenv("PATH", nowhere)
    monkeypatch.setattr(process, "BASE_ENVIRONMENT", {"PATH": nowhere})
    assert lvm.named(request, table) == (request, [])
    with pytest.raises(EffectError):
        lvm.named(Request(("/srv/www",)), table)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compact_output", "1"),
        ("compact_output_cols", "vg_exported,lv_snapshot_invalid,pool_lv,origin"),
        ("binary_values_as_numeric", "1"),
        ("list_item_separator", ";"),
        ("prefixes", "1"),
    ],
)
def test_report_settings(stage: Stage, name: str, value: str) -> None:
    """What lvm.conf says of reports for people changes nothing of what we read."""
    volume = stage.volume("data/home")
    stage.taken(volume)
    stage.change(lambda state: state["volumes"].pop("data/thin"))
    stage.change(lambda state: state["volumes"][volume.snapshot].update(invalid="snapshot invalid"))
    before = stage.kind.identities([volume])
    assert "overflowed" in (before[volume.snapshot].flaw or "")
    stage.change(lambda state: state.update(report={name: value}))
    assert stage.kind.identities([volume]) == before
    assert stage.kind.trouble([volume]) is None


def test_asked_of_btrfs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a device of a mounted btrfs is said to be, also where that is mounted elsewhere."""
    stage.activate("254:1", "data-home", lvmio.PREFIX + "x")
    sysfs = stage.home / "btrfs"
    member = sysfs / "0544d686-37b6-4e3a-8d8c-4f1b8e2b1a11" / "devices" / "dm-1"
    member.mkdir(parents=True)
    (member / "dev").write_text("254:1\n")
    monkeypatch.setattr(btrfsio, "_SYSFS", sysfs)
    volumes = lvm.named(Request(("data/home",)), Table([]))[1]
    assert {v.path: v.btrfs for v in volumes} == {"data/home": "", "data/thin": None}


# -- taking ------------------------------------------------------------------------------------


def test_taken(stage: Stage) -> None:
    """Each snapshot bears its tags from the command that makes it, and is read-only."""
    volumes = stage.volume("data/home"), stage.volume("data/thin", 1)
    classic, thin = stage.taken(*volumes)
    assert (classic.mark, thin.mark) == (RUN, RUN)
    assert classic.flaw is None
    assert thin.flaw is None
    assert classic.guid != thin.guid
    tags = ["--addtag", "atomtx", "--addtag", f"atomtx.run={RUN}"]
    first, second = stage.calls("lvcreate")
    common = ["--yes", "--snapshot", "--permission", "r", *tags]
    assert first[:-3] == [*common, "--size", f"{COW}b", "--name"]
    assert second[:-1] == [*common, "--name", f"atomtx-{RUN}-1", "data/thin"]
    assert len(stage.calls("lvs")) == 2


def test_other_origin(stage: Stage) -> None:
    """An origin that is another one than a moment ago is not snapshotted."""
    volume = stage.volume("data/home")
    stage.change(lambda state: state["volumes"]["data/home"].update(uuid="another"))
    complaint = stage.take(volume)
    assert complaint
    assert "is not the logical volume any more" in complaint.message
    assert stage.calls("lvcreate") == []


def test_no_room(stage: Stage) -> None:
    """A snapshot that LVM refuses is told with its words, and with what helps."""
    stage.change(lambda state: state["groups"]["data"].update(free=0))
    complaint = stage.take(stage.volume("data/home"))
    assert complaint
    assert "insufficient free space (0 extents): 16 required" in complaint.message
    assert "--cow-size" in (complaint.hint or "")


def test_half_taken(stage: Stage) -> None:
    """What an `lvcreate` that died leaves is ours to be destroyed, and never a moment."""
    volume = stage.volume("data/home")
    stage.play(lvcreate="half")
    assert stage.take(volume)
    stage.play()
    found = stage.kind.identities([volume])[volume.snapshot]
    assert (found.mark, found.flaw) == (RUN, "it was never finished")
    assert probing.presence(a_run(id=str(RUN)), row(volume, None), found) is Presence.BROKEN
    assert stage.kind.destroy([found], run=RUN) == {volume.snapshot: "done"}
    stage.kind.sweep([volume], run=RUN)
    assert ["--refresh", "data/home"] in [call[:-1] for call in stage.calls("lvchange")]
    assert list(stage.state["volumes"]) == list(stage.origins)


def row(volume: PlannedVolume, found: Identity | None) -> Volume:
    """Return the journal's row of a volume, with the identity where one was found."""
    known = (found.guid, found.createtxg) if found else (None, None)
    where = (volume.pool, volume.pool_guid, volume.name, "/x", volume.snapshot)
    return Volume(0, "lvm", *where, *known)


def test_activated(stage: Stage) -> None:
    """Thin snapshots, which LVM leaves inactive, are activated in one command; others are not."""
    volumes = stage.volume("data/home"), stage.volume("data/thin", 1)
    classic, _ = stage.taken(*volumes)
    group = lvmio.plain(volumes[0].pool_guid)
    stage.activate("254:7", "x", f"LVM-{group}{lvmio.plain(classic.guid)}")
    stage.kind.ready(volumes)
    words = ["--yes", "--activate", "y", "--ignoreactivationskip", f"data/atomtx-{RUN}-1"]
    assert [call[:-1] for call in stage.calls("lvchange")] == [words]


# -- proving -----------------------------------------------------------------------------------


def test_mark(stage: Stage) -> None:
    """Without our tag, with two of them, or with another origin, a name of ours proves nothing."""
    volume = stage.volume("data/home")
    stage.taken(volume)

    def with_tags(*tags: str) -> str | None:
        stage.change(lambda state: state["volumes"][volume.snapshot].update(tags=list(tags)))
        return stage.kind.identities([volume])[volume.snapshot].mark

    assert with_tags("atomtx") is None
    assert with_tags(f"atomtx.run={RUN}", "atomtx.run=1") is None
    assert with_tags(f"atomtx.run={RUN}") == RUN
    assert volume.origin
    other = replace(volume, origin=replace(volume.origin, uuid="another"))
    assert stage.kind.identities([other])[volume.snapshot].mark is None


def test_origin_gone(stage: Stage) -> None:
    """A thin snapshot outlives its origin: it is ours all the same, and whole."""
    volume = stage.volume("data/thin")
    stage.taken(volume)
    stage.change(lambda state: state["volumes"][volume.snapshot].update(origin=""))
    found = stage.kind.identities([volume])[volume.snapshot]
    assert (found.mark, found.flaw) == (RUN, None)


@pytest.mark.parametrize(
    ("values", "flaw"),
    [
        ({"invalid": "snapshot invalid"}, "overflowed"),
        ({"attr": "swi-I-s---"}, "overflowed"),
        ({"attr": "swi-a-s---"}, "made writable"),
    ],
)
def test_flaw(stage: Stage, values: dict[str, str], flaw: str) -> None:
    """A snapshot that overflowed, or that somebody can write to, is no moment any more."""
    volume = stage.volume("data/home")
    (before,) = stage.taken(volume)
    stage.change(lambda state: state["volumes"][volume.snapshot].update(values))
    found = stage.kind.identities([volume])[volume.snapshot]
    assert flaw in (found.flaw or "")
    judged = probing.presence(a_run(id=str(RUN)), row(volume, before), found)
    assert judged is Presence.BROKEN


def test_renamed(stage: Stage) -> None:
    """Renamed, a snapshot is found by its UUID; in a renamed group, by that of the group."""
    volume = stage.volume("data/home")
    (before,) = stage.taken(volume)

    def rename(state: dict[str, Any]) -> None:
        state["groups"]["new"] = state["groups"].pop("data")
        state["volumes"] = {k.replace("data/", "new/"): v for k, v in state["volumes"].items()}

    stage.change(rename)
    found = stage.kind.identities([volume])[volume.snapshot]
    assert (found.name, found.guid) == (f"new/atomtx-{RUN}-0", before.guid)
    stage.change(
        lambda state: (
            state["volumes"].update(mine=state["volumes"].pop(found.name))
            or state["volumes"].update({"new/mine": state["volumes"].pop("mine")})
        )
    )
    assert stage.kind.identities([volume]) == {}
    lost = row(volume, before)
    assert stage.kind.renamed(RUN, [lost])[volume.snapshot].name == "new/mine"
    assert stage.kind.renamed("another", [lost]) == {}


def clone(stage: Stage) -> None:
    """Have what `vgimportclone` makes of a copied disk: the group alone has another UUID."""

    def work(state: dict[str, Any]) -> None:
        state["groups"]["copy"] = state["groups"]["data"] | {"uuid": fakelvm._uuid("vgcopy")}
        there = {k.replace("data/", "copy/"): dict(v) for k, v in state["volumes"].items()}
        state["volumes"] |= there

    stage.change(work)


def test_cloned(stage: Stage) -> None:
    """Promise 2: the same volumes in another group are another's, also when ours are gone."""
    volumes = stage.volume("data/home"), stage.volume("data/thin", 1)
    identities = stage.taken(*volumes)
    clone(stage)
    copies = {name for name in stage.state["volumes"] if name.startswith("copy/")}
    assert stage.kind.keep(identities[1:], run=RUN) == {identities[1].name: "done"}
    assert stage.kind.destroy(identities[:1], run=RUN) == {identities[0].name: "done"}
    lost = [row(volume, each) for volume, each in zip(volumes, identities, strict=True)]
    assert stage.kind.renamed(RUN, lost) == {}
    assert copies <= stage.state["volumes"].keys()
    assert stage.kind.keep(identities[1:], run=RUN) == {identities[1].name: "done"}


def test_clone_is_active(stage: Stage) -> None:
    """A clone that is active is no reason to leave ours as it is."""
    volume = stage.volume("data/thin")
    (thin,) = stage.taken(volume)
    of_copy = f"LVM-{lvmio.plain(fakelvm._uuid('vgcopy'))}{lvmio.plain(thin.guid)}"
    stage.activate("254:7", "x", of_copy)
    stage.kind.ready([volume])
    assert [call[-2] for call in stage.calls("lvchange")] == [thin.name]


@pytest.mark.parametrize("clone_is_first", [True, False])
def test_node_beside_a_clone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, clone_is_first: bool
) -> None:
    """What is mounted is ours by its name, whichever of the two the kernel lists first."""
    uuid = stage.volume("data/home").guid
    groups = [lvmio.plain(fakelvm._uuid(group)) for group in ("vgcopy", "vgdata")]
    numbers = ["254:1", "254:2"] if clone_is_first else ["254:2", "254:1"]
    for group, name, number in zip(groups, ("copy-home", "data-home"), numbers, strict=True):
        stage.activate(number, name, f"{lvmio.PREFIX}{group}{lvmio.plain(uuid)}")
    listed = sorted(os.listdir(stage.sysfs))
    monkeypatch.setattr(os, "listdir", lambda _: listed)
    known = {"/dev/mapper/data-home": numbers[1], "/dev/mapper/copy-home": numbers[0]}
    monkeypatch.setattr(lvmio, "number_of", known.get)
    assert lvmio.node(uuid, "data-home").number == numbers[1]
    with pytest.raises(FileExistsError, match="has another name now: copy-home, data-home"):
        lvmio.node(uuid, "data-old")
    known["/dev/mapper/data-home"] = numbers[0]
    with pytest.raises(FileExistsError, match="is not the device"):
        lvmio.node(uuid, "data-home")


# -- destroying --------------------------------------------------------------------------------


def test_destroyed(stage: Stage) -> None:
    """All of a group are destroyed in one command, which proves UUID and tag once more."""
    volumes = stage.volume("data/home"), stage.volume("data/thin", 1)
    identities = stage.taken(*volumes)
    verdicts = stage.kind.destroy(identities, run=RUN)
    assert set(verdicts.values()) == {"done"}
    assert list(stage.state["volumes"]) == list(stage.origins)
    (call,) = stage.calls("lvremove")
    tag = f'lv_tags={{"atomtx.run={RUN}"}}'
    proofs = (f'lv_uuid="{each.guid}" && {tag}' for each in identities)
    assert call[2] == " || ".join(f'({proof} && lv_attr!~"^[oO]")' for proof in proofs)
    assert stage.kind.destroy(identities, run=RUN) == dict.fromkeys(verdicts, "absent")
    assert len(stage.calls("lvremove")) == 1


def test_many_destroyed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many the proof of all is more than a word of a command can have: a hundred at once."""
    monkeypatch.setattr(lvm, "_AT_ONCE", 2)
    identities = stage.taken(*(stage.volume("data/home", n) for n in range(5)))
    assert set(stage.kind.destroy(identities, run=RUN).values()) == {"done"}
    assert list(stage.state["volumes"]) == list(stage.origins)
    names = [[word for word in call if "/atomtx-" in word] for call in stage.calls("lvremove")]
    assert [len(each) for each in names] == [2, 2, 1]
    assert [name for each in names for name in each] == [each.name for each in identities]


def test_not_destroyed(stage: Stage) -> None:
    """What has another UUID, or lost our tag, stays: nothing is asked of LVM for it."""
    volumes = stage.volume("data/home"), stage.volume("data/thin", 1)
    classic, thin = stage.taken(*volumes)
    stage.change(lambda state: state["volumes"][classic.name].update(uuid="another"))
    stage.change(lambda state: state["volumes"][thin.name].update(tags=[]))
    verdicts = stage.kind.destroy([classic, thin], run=RUN)
    assert verdicts == {classic.name: "foreign", thin.name: "unmarked"}
    assert stage.calls("lvremove") == []


@pytest.mark.parametrize("fault", ["silent", "refuse"])
def test_exit_status(stage: Stage, fault: str) -> None:
    """No exit status is believed: what is still there is busy, or its complaint is told."""
    (identity,) = stage.taken(stage.volume("data/home"))
    stage.play(lvremove=fault)
    if fault == "silent":
        assert stage.kind.destroy([identity], run=RUN) == {identity.name: "busy"}
    else:
        with pytest.raises(EffectError, match="out of luck"):
            stage.kind.destroy([identity], run=RUN)


def test_busy(stage: Stage) -> None:
    """One that is mounted is busy; the others of its group are destroyed."""
    volumes = stage.volume("data/home"), stage.volume("data/thin", 1)
    classic, thin = stage.taken(*volumes)
    stage.change(lambda state: state["volumes"][classic.name].update(used=True))
    verdicts = stage.kind.destroy([classic, thin], run=RUN)
    assert verdicts == {classic.name: "busy", thin.name: "done"}


MINE: dict[str, dict[str, Any]] = {
    "a classic snapshot": {"attr": "swi-a-s---"},
    "a thin volume of another pool": {"attr": "Vwi---tz-k", "pool": "other"},
}


@pytest.mark.parametrize("what", MINE)
def test_origin(stage: Stage, what: str) -> None:
    """Promise 2: what an admin made on a thin snapshot is named, and does not go with it."""
    volumes = stage.volume("data/home"), stage.volume("data/thin", 1)
    classic, thin = stage.taken(*volumes)
    mine = {"origin": thin.name.partition("/")[2], **MINE[what]}
    fakelvm.add(stage.home, "data/mine", **mine)
    verdicts = stage.kind.destroy([classic, thin], run=RUN)
    assert verdicts == {classic.name: "done", thin.name: "busy"}
    assert {"data/mine", thin.name} <= stage.state["volumes"].keys()
    assert list(stage.kind.links([thin.name])) == [
        f"the logical volume data/mine is on {thin.name}"
    ]
    stage.change(lambda state: state["volumes"].pop("data/mine"))
    assert stage.kind.destroy([thin], run=RUN) == {thin.name: "done"}


def test_origin_under_lvms_lock(stage: Stage) -> None:
    """So it is where it is made between our look and LVM's lock."""
    (thin,) = stage.taken(stage.volume("data/thin"))
    real = stage.kind._lvm.run

    def run(*argv: str) -> process.Completed:
        if argv[0] == "lvremove":
            fakelvm.add(stage.home, "data/mine", origin=thin.name.partition("/")[2])
        return real(*argv)

    stage.kind._lvm.run = run  # type: ignore[method-assign]
    assert stage.kind.destroy([thin], run=RUN) == {thin.name: "busy"}
    assert {"data/mine", thin.name} <= stage.state["volumes"].keys()


def test_origin_is_kept(stage: Stage) -> None:
    """To be kept harms nothing that is on it; nor does a thin snapshot of it hold it."""
    (thin,) = stage.taken(stage.volume("data/thin"))
    name = thin.name.partition("/")[2]
    fakelvm.add(stage.home, "data/work", origin=name, attr="Vwi---tz-k", pool="pool")
    assert list(stage.kind.links([thin.name])) == []
    fakelvm.add(stage.home, "data/mine", origin=name)
    assert stage.kind.keep([thin], run=RUN) == {thin.name: "done"}


def test_links_unknown(stage: Stage) -> None:
    """Where LVM cannot be asked it is busy all the same, and that is what is told."""
    stage.play(lvs="refuse")
    (told,) = stage.kind.links(["data/x"])
    assert "cannot list the logical volumes" in told


def test_group_gone_meanwhile(stage: Stage) -> None:
    """Where a command failed and its group is not seen any more, nothing is said to be done."""
    (identity,) = stage.taken(stage.volume("data/home"))
    stage.play(lvremove="unplug")
    with pytest.raises(EffectError, match="cannot lvremove"):
        stage.kind.destroy([identity], run=RUN)


def test_kept(stage: Stage) -> None:
    """A snapshot that is kept has a tag of its own, and is nobody's run's any more."""
    (identity,) = stage.taken(stage.volume("data/home"))
    assert stage.kind.keep([identity], run=RUN) == {identity.name: "done"}
    assert f"atomtx.kept={RUN}" in stage.state["volumes"][identity.name]["tags"]
    assert stage.kind.destroy([identity], run=RUN) == {identity.name: "unmarked"}


def test_marked(stage: Stage) -> None:
    """A scan finds what has our tag and our name, as a plan would have it."""
    stage.activate("254:7", "x", "LVM-x")
    (identity,) = stage.taken(stage.volume("data/home"))
    fakelvm.add(stage.home, "data/atomtx-x", tags=[f"atomtx.run={RUN}"])
    fakelvm.add(stage.home, "data/atomtx-fedcba9876543210-0", tags=[f"atomtx.run={RUN}"])
    ((volume, found),) = lvm.marked(Lvm())
    assert found == identity
    assert (volume.name, volume.snapshot) == ("data/home", identity.name)


# -- devices -----------------------------------------------------------------------------------


def test_trouble(stage: Stage) -> None:
    """A group that is absent, or incomplete, is no proof that its snapshots are gone."""
    volume = stage.volume("data/home")
    assert stage.kind.trouble([volume]) is None
    stage.change(lambda state: state["groups"]["data"].update(missing=2))
    assert stage.kind.trouble([volume]) == "the volume group data lacks 2 devices"
    stage.change(lambda state: state["groups"]["data"].update(missing=0, exported="exported"))
    assert stage.kind.trouble([volume]) == "the volume group data is exported"
    absent = replace(volume, pool_guid="another")
    assert stage.kind.trouble([absent]) == "the volume group data is not there"
    stage.play(vgs="refuse", lvs="refuse")
    assert "out of luck" in (stage.kind.trouble([volume]) or "")
    with pytest.raises(EffectError, match="cannot list the logical volumes: out of luck"):
        stage.kind.identities([volume])


def test_resumed(stage: Stage) -> None:
    """
    What a dead command left suspended is resumed before anything else is asked, parts first.

    Another volume's devices, and another pool's, are not touched.
    """
    volume, thin = stage.volume("data/home"), stage.volume("data/thin", 1)
    assert volume.origin
    group = f"LVM-{lvmio.plain(volume.pool_guid)}"
    origin = group + lvmio.plain(volume.origin.uuid)
    rows = [
        ["data-home", origin, 1],
        ["data-home-real", f"{origin}-real", 2],
        [f"data-atomtx--{RUN}--0", f"{group}{'s' * 32}", 3],
        [f"data-atomtx--{RUN}--0-cow", f"{group}{'s' * 32}-cow", 4],
        ["data-other", f"{group}{'o' * 32}", 5],
        ["data-pool-tpool", f"{group}{'p' * 32}-tpool", 6],
        ["data-pool_tdata", f"{group}{'d' * 32}-tdata", 7],
        ["data-pool_tmeta", f"{group}{'m' * 32}-tmeta", 8],
    ]
    of_others = [
        ["data-my--pool-tpool", f"{group}{'P' * 32}-tpool", 9],
        ["data-my--pool_tdata", f"{group}{'D' * 32}-tdata", 10],
        ["data-my--pool_tmeta", f"{group}{'M' * 32}-tmeta", 11],
    ]
    rows += of_others
    stage.change(lambda state: state.update(suspended=rows))
    clone(stage)
    assert "data-home-real is suspended" in (stage.kind.trouble([volume]) or "")
    stage.kind.mend([volume])
    resumed = [call[1] for call in stage.calls("dmsetup") if call[0] == "resume"]
    snapshot = f"data-atomtx--{RUN}--0"
    assert resumed == ["data-home-real", f"{snapshot}-cow", snapshot, "data-home"]
    assert [call[:-1] for call in stage.calls("lvchange")] == [["--refresh", "data/home"]]
    assert stage.kind.trouble([volume]) is None
    stage.kind.mend([thin])
    assert [row for row in stage.state["suspended"] if row not in of_others] == [rows[4]]
    assert len(stage.state["suspended"]) == 1 + len(of_others)
    assert stage.kind.trouble([thin]) is None
    assert thin.origin
    stage.kind.mend([replace(thin, origin=replace(thin.origin, pool=""))])  # of an older journal
    assert stage.state["suspended"] == [rows[4]]


def test_suspended_for_an_instant(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another job's living `lvcreate` has suspended as it is looked at is no trouble."""
    volume = stage.volume("data/home")
    assert volume.origin
    uuid = f"LVM-{lvmio.plain(volume.pool_guid)}{lvmio.plain(volume.origin.uuid)}"
    looks = [[lvmio.Device("data-home", uuid, "254:1")], []]
    monkeypatch.setattr(Lvm, "suspended", lambda _: looks.pop(0))
    assert stage.kind.trouble([volume]) is None
    assert looks == []


@pytest.mark.parametrize("is_thin", [True, False])
def test_resumed_of_what_stays_alone(stage: Stage, *, is_thin: bool) -> None:
    """A snapshot that stays, and has no origin any more, concerns no other volume's devices."""
    kept = stage.volume("data/home")
    fakelvm.add(stage.home, kept.snapshot, attr="Vri---tz-k" if is_thin else "sri-a-s---")
    (found,) = (each for each in stage.kind._lvm.volumes() if each.path == kept.snapshot)
    gone = replace(found, origin="", origin_uuid="", pool="my-pool" if is_thin else "")
    group = f"LVM-{lvmio.plain(kept.pool_guid)}"
    rows = [
        ["data-mysql", f"{group}{'m' * 32}", 1],
        ["data-pool-tpool", f"{group}{'p' * 32}-tpool", 2],
        ["data-pool_tdata", f"{group}{'d' * 32}-tdata", 3],
    ]
    own = [["data-my--pool-tpool", f"{group}{'P' * 32}-tpool", 4]]
    stage.change(lambda state: state.update(suspended=[*rows, *own]))
    stage.kind.mend([lvm._as_planned(gone)])
    assert stage.state["suspended"] == [*rows, *([] if is_thin else own)]


def test_failing(stage: Stage) -> None:
    """An overflown snapshot and a full pool are told; a thin snapshot's pool is asked as well."""
    stage.activate("254:1", "data-thin", "LVM-1", "dm-2")
    stage.activate("254:2", "data-pool-tpool", "LVM-2-tpool")
    healthy = {
        "data-home": "snapshot 16/8192 16",
        "data-thin": "thin 2048 4095",
        "data-pool-tpool": "thin-pool 1 11/1024 9/64 - rw discard_passdown queue_if_no_space - 64",
    }

    def told(**status: str) -> str | None:
        words = healthy | {name.replace("_", "-"): text for name, text in status.items()}
        stage.change(lambda state: state.update(status=words))
        return lvmio.failing(["data-home", "data-thin"])

    assert told() is None
    assert "data-home overflowed" in (told(data_home="snapshot Invalid") or "")
    assert "data-home overflowed" in (told(data_home="snapshot Overflow") or "")
    full = "thin-pool 1 11/1024 64/64 - out_of_data_space discard_passdown queue_if_no_space - 1024"
    assert told(data_pool_tpool=full) == "the thin pool data-pool-tpool is full"
    failed = "thin-pool 1 11/1024 9/64 - ro discard_passdown queue_if_no_space - 1024"
    assert "read-only" in (told(data_pool_tpool=failed) or "")
    assert "has failed" in (told(data_thin="thin Fail") or "")
    assert lvmio.failing(["gone"]) == "the device gone is gone"
    stage.play(dmsetup="removed once")
    assert told() is None
    stage.play(dmsetup="refuse")
    with pytest.raises(EffectError, match="cannot ask for the state of the snapshots"):
        told()


def test_removed_while_it_is_asked(stage: Stage) -> None:
    """A device of another one that is removed while dmsetup looks at all is no trouble of ours."""
    volume = stage.volume("data/home")
    stage.play(dmsetup="removed once")
    assert stage.kind.trouble([volume]) is None
    assert len(stage.calls("dmsetup")) == 2


def test_lost_mount(stage: Stage) -> None:
    """Promise 7: a run whose snapshot is lost is told, though its mount is where it was."""
    source = f"data/atomtx-{RUN}-0"
    mount = Mount(source, "/x", "lvm")
    assembly = namespace.Assembly((mount,), (), {}, frozenset())
    name = mounted_as(source).removeprefix("/dev/mapper/")
    stage.change(lambda state: state.update(status={name: "snapshot Invalid"}))
    assert "overflowed" in (assembly.failure() or "")
    stage.change(lambda state: state.update(status={name: "snapshot 16/8192 16"}))
    assert assembly.failure() is None


def test_lock(stage: Stage) -> None:
    """Lock F is a command's standard input: LVM closes every other descriptor at its start."""
    lock = stage.home / "front.lock"
    lock.touch()
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    Lvm(descriptor).groups()
    Lvm().groups()
    os.close(descriptor)
    assert [call[-1] for call in stage.calls("vgs")] == ["stdin=file", "stdin="]


def test_options() -> None:
    """Each file system is mounted so that nothing is replayed, XFS beside another of its UUID."""
    found = {fstype: lvmio.mount_options(fstype) for fstype in ("xfs", "ext4", "ext3", "ext2")}
    assert found == {
        "xfs": "nouuid,norecovery",
        "ext4": "noload",
        "ext3": "noload",
        "ext2": "",
    }

"""Snapshots of real thin logical volumes that stay: taken, pruned, killed anywhere."""

from __future__ import annotations

import json

import pytest

from tests.extent import some
from tests.vm import remote
from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.remote import Answer, atomtx, runs, stop_at
from tests.vm.scene import LVM_REPAIRS, Prepare, make_journal

PATTERN = ("--pattern", "s-%Y%m%d%H%M%S")
NAMES = ("data/a", "/dev/data/b-c", "tank")
VOLUMES = ("a", "b-c")
SNAP = ("snap", *NAMES, *PATTERN)
PRUNE = ("prune", *NAMES, *PATTERN, "--keep-last", "1")
UNSNAP = ("unsnap", *NAMES, *PATTERN)
# Somebody's own: read-only and not, and one with the name of ours.
FOREIGN = {"mine", "work", "a.s-20200101000000"}
_MAKE = f"""
set -e
vgcreate -q data {DATA_DISKS[1]}
echo '{LVM_REPAIRS}' > /etc/lvm/lvmlocal.conf
lvcreate -qy --type thin-pool -L 1G -n pool data
lvcreate -qy -V 320M --thinpool pool -n a data
lvcreate -qy -V 64M --thinpool pool -n b-c data
lvcreate -qy -L 64M -n classic data
mkfs.xfs -q /dev/data/a && mkdir -p /srv/a /mnt/s && mount /dev/data/a /srv/a
echo first > /srv/a/file && echo first > /dev/data/b-c
lvcreate -qy -s -pr -n mine data/a
lvcreate -qy -s -kn -n work data/a
lvcreate -qy -s -pr -n a.s-20200101000000 data/a
zfs snapshot tank@foreign
"""


def thin_volumes(vm: Machine) -> None:
    vm.run(_MAKE, timeout=300)
    make_journal(vm)


@pytest.fixture
def thin(prepared: Prepare) -> Machine:
    """The machine with two thin volumes, one of them not mounted, snapshots of others, a pool."""
    return prepared("tank", thin_volumes)


def moments(vm: Machine) -> dict[str, dict[str, str]]:
    """
    Return for each name of ours its volumes, of LVM and ZFS, each with "run kept transient".

    Those of LVM are inactive, and what is foreign is there.
    """
    found: dict[str, dict[str, str]] = {}
    columns = "lv_name,lv_attr,lv_tags,origin"
    lines = vm.run(f"lvs --noheadings --separator '|' -o {columns} data").stdout.splitlines()
    others = set()
    for line in lines:
        name, attributes, tags, origin = line.strip().split("|")
        if "atomtx" not in tags:
            others.add(name)
            continue
        assert attributes.startswith("Vri---"), line
        volume = next(each for each in VOLUMES if name.startswith(f"{each}."))
        assert origin == volume
        told = dict(tag.split("=") for tag in tags.split(",") if "=" in tag)
        marks = " ".join(told.get(f"atomtx.{mark}", "-") for mark in ("run", "kept", "transient"))
        found.setdefault(name.removeprefix(f"{volume}."), {})[volume] = marks
    assert others == {*VOLUMES, "pool", "classic", *FOREIGN}
    columns = "name,atomtx:run,atomtx:kept,atomtx:transient"
    for line in vm.run(f"zfs list -Ht snapshot -o {columns} tank").stdout.splitlines():
        whole, *of_zfs = line.split("\t")
        if whole != "tank@foreign":
            found.setdefault(whole.partition("@")[2], {})["tank"] = " ".join(of_zfs)
    return found


def snap(vm: Machine, at: str = "none", *, transient: bool = False) -> Answer:
    vm.run("sleep 1.1")  # one a second
    return atomtx(vm, *SNAP, *(["--transient"] if transient else []), kill=stop_at(at))


def settle(vm: Machine) -> None:
    answer = atomtx(vm, "recover")
    assert answer.status in (0, 3), answer.output  # 3: a prune that has destroyed some
    assert "nothing to recover" in atomtx(vm, "recover").output


def test_course(thin: Machine) -> None:
    """Of LVM and ZFS in one run; rules, busy ones, transient ones; what is foreign stays."""
    vm = thin
    for text in ("second", "third"):
        answer = snap(vm)
        assert answer.status == 0, answer.output
        assert "1 pool and 2 logical volumes one after the other within" in answer.output
        vm.run(f"echo {text} > /srv/a/file && echo {text} > /dev/data/b-c")
    first, second = sorted(moments(vm))
    (later, earlier) = (run["id"] for run in runs(vm))
    whole = {*VOLUMES, "tank"}
    assert moments(vm)[first] == dict.fromkeys(whole, f"- {earlier} -")
    assert moments(vm)[second] == dict.fromkeys(whole, f"- {later} -")

    # What is in use stays, and is told; and it is the moment that it says.
    vm.run(f"lvchange -ay -K data/a.{first} data/b-c.{first}")
    vm.run(f"mount -o ro,nouuid,norecovery /dev/data/a.{first} /mnt/s")
    vm.run(f"dmsetup create --readonly holder --table '0 8 linear /dev/data/b-c.{first} 0'")
    assert vm.run("cat /mnt/s/file").stdout == "first\n"
    assert vm.run("head -n 1 /dev/mapper/holder", check=False).stdout.startswith("first\n")
    answer = atomtx(vm, *PRUNE)
    assert answer.status == 3, answer.output
    assert "and 1 more: in use meanwhile" in answer.output
    vm.run("umount /mnt/s && dmsetup remove holder")
    vm.run(f"lvchange -an data/a.{first} data/b-c.{first}")
    assert moments(vm) == {
        first: dict.fromkeys(VOLUMES, f"- {earlier} -"),
        second: dict.fromkeys(whole, f"- {later} -"),
    }

    # Transient ones are none of a prune's; and one with snapshots of its own goes.
    assert snap(vm, transient=True).status == 0
    go = runs(vm)[0]["id"]
    third = max(moments(vm))
    assert moments(vm)[third] == dict.fromkeys(whole, f"- {go} {go}")
    vm.run(f"lvcreate -qy -s -kn -n of-ours data/a.{first}")
    answer = atomtx(vm, *PRUNE)
    assert answer.status == 0, answer.output
    vm.run("lvremove -qy data/of-ours")
    assert set(moments(vm)) == {second, third}
    answer = atomtx(vm, *UNSNAP)
    assert answer.status == 0, answer.output
    assert set(moments(vm)) == {second}

    for words, message in {
        ("snap", "data/classic"): "data/classic cannot be snapshotted: it is not thin",
        ("snap", f"data/a.{second}"): "it is a snapshot that atomtx took",
        ("snap", "/srv/a", "--pattern", "s_tdata%Y%m%d%H%M"): "LVM cannot have a snapshot named",
        ("backup", f"data/a.{second}", "--command", "true"): "it is a snapshot that atomtx took",
        ("clone", "data/a", "--to", "tank/x"): "data/a is on LVM: this is of ZFS alone",
        ("sure", "scan-kept", "/srv/a"): "/srv/a is on LVM: this is of ZFS alone",
    }.items():
        answer = atomtx(vm, *words)
        assert answer.status == 2, answer.output
        assert message in answer.output
    assert set(moments(vm)) == {second}


def test_snap_killed(thin: Machine) -> None:
    """Killed at a point, the moment is whole after a recovery, or nothing of it is there."""
    vm = thin
    points = snap(vm).points
    kept = 1
    # At the first of these all are taken, and a recovery activates them, to see that they are.
    for point in ("before:snapshotted#1", "end:lvchange#1", *some(points, 2)):
        known = len(runs(vm))
        answer = snap(vm, point)
        assert answer.status == -9, (point, answer.output)
        settle(vm)
        if len(runs(vm)) == known:
            continue  # it was not in the journal yet
        (run, *_) = runs(vm)
        found = moments(vm)
        assert all(set(each) == {*VOLUMES, "tank"} for each in found.values()), point
        whole = dict.fromkeys((*VOLUMES, "tank"), f"- {run['id']} -") in found.values()
        assert (run["state"], run["outcome"]) == (
            ("kept", "completed") if whole else ("destroyed", "rolled-back")
        )
        kept += whole
        assert len(found) == kept, point
    assert kept > 2


@pytest.mark.full  # tests/unit/test_lvm_snap.py has it, played
def test_prune_killed(thin: Machine) -> None:
    """Killed at a point, a prune is given up, and the next one ends it; what is foreign stays."""
    vm = thin
    assert snap(vm).status == 0
    assert snap(vm).status == 0
    points = atomtx(vm, *PRUNE, kill=stop_at("none")).points
    assert {"start:lvremove#1", "end:lvremove#1", "journal:pruned#1"} <= set(points)
    for point in ("start:lvremove#1", *some(points, 1)):
        assert snap(vm).status == 0
        new = max(moments(vm))
        answer = atomtx(vm, *PRUNE, kill=stop_at(point))
        assert answer.status == -9, (point, answer.output)
        settle(vm)
        assert set(moments(vm)[new]) == {*VOLUMES, "tank"}
        answer = atomtx(vm, *PRUNE)
        assert answer.status == 0, answer.output
        assert set(moments(vm)) == {new}, point
    states = json.loads(atomtx(vm, "history", "--json").stdout)
    assert {run["state"] for run in states if run["verb"] == "prune"} == {"pruned"}


def test_suspended(thin: Machine) -> None:
    """What an `lvremove` that was killed too left suspended is resumed: all writes to it hang."""
    vm = thin
    assert snap(vm).status == 0
    assert snap(vm).status == 0
    assert atomtx(vm, *PRUNE, kill=stop_at("start:lvremove#1")).status == -9
    vm.run("while pgrep lvremove; do sleep 0.2; done; dmsetup suspend data-pool-tpool")
    settle(vm)
    vm.run("touch /srv/a/alive && sync -f /srv/a")
    answer = atomtx(vm, *PRUNE)
    assert answer.status == 0, answer.output
    assert len(moments(vm)) == 1


@pytest.mark.full
def test_power_cut(thin: Machine) -> None:
    """After a power cut what was kept is kept, and a moment that was taken is whole or gone."""
    vm = thin
    assert snap(vm).status == 0
    assert snap(vm, "before:snapshotted#1").status == -9
    cut(vm)
    settle(vm)
    found = moments(vm)
    first, *others = sorted(found)
    assert [set(found[name]) for name in (first, *others)] == [{*VOLUMES, "tank"}] * len(found)
    assert runs(vm)[0]["outcome"] == ("completed" if others else "rolled-back")
    assert snap(vm).status == 0
    assert atomtx(vm, *PRUNE, kill=stop_at("end:lvremove#1")).status == -9
    cut(vm)
    settle(vm)
    (run, *_) = runs(vm)
    assert (run["state"], run["outcome"]) == ("pruned", "partial")
    assert len(moments(vm)) == 1
    assert first not in moments(vm)


def cut(vm: Machine) -> None:
    """Cut the power, and boot."""
    vm.power_off_hard()
    vm.boot()
    remote.install(vm)
    vm.run("zpool list tank >/dev/null 2>&1 || zpool import tank; vgchange -qay data")

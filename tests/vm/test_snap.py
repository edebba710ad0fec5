"""Snapshots that stay, and their pruning, on real ZFS: killed anywhere, and after power cuts."""

from __future__ import annotations

import json

import pytest

from tests.extent import some
from tests.vm import remote
from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.remote import Answer, atomtx, runs, stop_at
from tests.vm.scene import Prepare, fill, make_journal
from tests.vm.tank import make_datasets, make_pool

PATTERN = ("--pattern", "s-%Y%m%d%H%M%S")
NAMES = ("tank", "safe/x")
DATASETS = ("tank", "tank/a", "tank/a/b c", "tank/vol", "safe/x")
SNAP = ("snap", "-r", *NAMES, *PATTERN)
UNSNAP = ("unsnap", "-r", *NAMES, *PATTERN)
PRUNE = ("prune", "-r", *NAMES, *PATTERN, "--keep-last", "1")


def two_pools(vm: Machine) -> None:
    make_pool(vm, "safe", DATA_DISKS[1])
    vm.run("zfs create -V 16M tank/vol")
    make_datasets(vm, "tank/a", "tank/a/b c", "safe/x")
    vm.run("zfs set mountpoint=none tank/a && zfs snapshot tank@foreign tank/a@s-20200101000000")
    make_journal(vm)


@pytest.fixture
def pools(prepared: Prepare) -> Machine:
    """The machine with datasets in two pools, one of them not mounted, and foreign snapshots."""
    return prepared("tank", two_pools)


def marks(vm: Machine) -> dict[str, dict[str, str]]:
    """Return for each name of ours its datasets, each with the marks "run kept"."""
    properties = "name,atomtx:run,atomtx:kept"
    lines = vm.run(f"zfs list -Ht snapshot -o {properties}").stdout.splitlines()
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        whole, run, kept = line.split("\t")
        dataset, _, name = whole.partition("@")
        if name not in ("foreign", "s-20200101000000"):
            found.setdefault(name, {})[dataset] = f"{run} {kept}"
    assert len(lines) - sum(map(len, found.values())) == 2, "something foreign is gone"
    return found


def one_by_one(vm: Machine) -> str:
    """Return what was changed in the pool `tank` by single commands, not by a channel program."""
    told = vm.run("zpool history tank").stdout.splitlines()
    words = ("zfs set atomtx", "zfs inherit", "zfs destroy tank", "zfs bookmark")
    return "\n".join(line for line in told if any(word in line for word in words))


def snap(vm: Machine, at: str = "none", who: str = "front", *, transient: bool = False) -> Answer:
    vm.run("sleep 1.1")  # one a second
    return atomtx(vm, *SNAP, *(["--transient"] if transient else []), kill=stop_at(at, who))


def settle(vm: Machine) -> None:
    answer = atomtx(vm, "recover")
    assert answer.status in (0, 3), answer.output  # 3: a prune that has destroyed some
    assert "nothing to recover" in atomtx(vm, "recover").output
    assert set(vm.run("zfs list -Hpt snapshot -o userrefs").stdout.split()) == {"0"}


def check_whole(vm: Machine, before: int) -> bool:
    """Tell whether the newest run's snapshots are all there, and kept; else none may be."""
    (run, *_) = runs(vm)
    found = marks(vm)
    for of_name in found.values():
        assert set(of_name) == set(DATASETS)
        assert len(set(of_name.values())) == 1
    kept = {value for of_name in found.values() for value in of_name.values()}
    assert all(value.startswith("- ") for value in kept)
    whole = f"- {run['id']}" in kept
    assert (run["state"], run["outcome"]) == (
        ("kept", "completed") if whole else ("destroyed", "rolled-back")
    )
    assert len(found) == before + whole
    return whole


def test_course(pools: Machine) -> None:
    """All datasets and volumes of a pool in one transaction, marked as kept, and nothing else."""
    vm = pools
    answer = snap(vm)
    assert answer.status == 0, answer.output
    assert check_whole(vm, 0)
    assert one_by_one(vm) == ""
    (name,) = marks(vm)
    lines = vm.run("zfs list -Ht snapshot -o name,createtxg -r tank").stdout.splitlines()
    assert len({line.split("\t")[1] for line in lines if f"@{name}\t" in line}) == 1
    shown = json.loads(atomtx(vm, "show", runs(vm)[0]["id"], "--json").stdout)
    assert [step["kind"] for step in shown["steps"]] == [
        *["take-snapshots", "destroy-snapshots"] * 2,
        *["keep-snapshots"] * 2,
    ]
    assert "made no backup" in atomtx(vm, "show", runs(vm)[0]["id"], "--check").output
    assert atomtx(vm, "check", "--max-age", "1h").status == 3  # no backup ran


def test_snap_killed(pools: Machine) -> None:
    """Killed at a point, front end or `zfs` itself, the moment is whole, or nothing of it is."""
    vm = pools
    points = snap(vm).points
    kept = 1
    for point in some(points, 5):
        known = len(runs(vm))
        assert snap(vm, point).status == -9, point
        settle(vm)
        if len(runs(vm)) > known:  # else it was not in the journal yet
            kept += check_whole(vm, kept)
    assert kept > 2
    assert snap(vm, "start:zfs snapshot#1", "child").status in (0, 1)
    settle(vm)
    there = len(marks(vm))
    if there == kept:  # nothing was taken: that run has failed
        assert runs(vm)[0]["outcome"] == "failed"
    else:
        assert check_whole(vm, kept)


def test_prune_killed(pools: Machine) -> None:
    """Killed at a point, a prune is given up, and the next one ends it; what is foreign stays."""
    vm = pools
    snap(vm)
    snap(vm)
    points = atomtx(vm, *PRUNE, kill=stop_at("none")).points
    assert {"start:zfs program#1", "end:zfs program#2", "journal:pruned#1"} <= set(points)
    bookmarks = 1
    for point in some(points, 3):
        snap(vm)
        new = max(marks(vm))
        answer = atomtx(vm, *PRUNE, kill=stop_at(point))
        assert answer.status == -9, point
        settle(vm)
        assert set(marks(vm)[new]) == set(DATASETS)
        answer = atomtx(vm, *PRUNE)
        assert answer.status == 0, answer.output
        assert set(marks(vm)) == {new}
        assert one_by_one(vm) == ""
        bookmarks += 1
        found = vm.run("zfs list -Ht bookmark -o name").stdout.splitlines()
        assert len(found) == bookmarks * len(DATASETS)
    # What the bookmarks are for.
    vm.run("b=$(zfs list -Ht bookmark -o name tank/vol | head -1);"
           " s=$(zfs list -Ht snapshot -o name tank/vol | tail -1);"
           " zfs send -i $b $s | zstream dump >/dev/null")  # fmt: skip


@pytest.mark.full
def test_unsnap_killed(pools: Machine) -> None:
    """What was meant to go does, wherever it is killed; what was kept to stay stays."""
    vm = pools
    snap(vm)
    (stays,) = marks(vm)
    # Inherited, and by the right run: no mark of the snapshot's own.
    vm.run(f"zfs set atomtx:transient={runs(vm)[0]['id']} tank")
    snap(vm, transient=True)
    assert atomtx(vm, *PRUNE).status == 0
    assert len(marks(vm)) == 2, "a prune has counted a transient one"
    (goes,) = set(marks(vm)) - {stays}
    vm.run(f"ls /tank/.zfs/snapshot/{goes} && grep -q @{goes} /proc/mounts")  # for five minutes
    points = atomtx(vm, *UNSNAP, kill=stop_at("none")).points
    assert set(marks(vm)) == {stays}
    assert {"start:zfs program#1", "end:zfs program#2", "journal:pruned#1"} <= set(points)
    for point in some(points, 3):
        assert snap(vm, "journal:kept#1", transient=True).status == -9
        settle(vm)
        answer = atomtx(vm, *UNSNAP, kill=stop_at(point))
        assert answer.status == -9, (point, answer.output)
        settle(vm)
        assert set(marks(vm)[stays]) == set(DATASETS)
        answer = atomtx(vm, *UNSNAP)
        assert answer.status == 0, answer.output
        assert set(marks(vm)) == {stays}, point
    (line,) = one_by_one(vm).splitlines()
    assert "zfs set atomtx:transient" in line


def test_in_use(pools: Machine) -> None:
    """What is held or cloned stays, and is told."""
    vm = pools
    for _ in range(3):
        assert snap(vm).status == 0
    first = min(marks(vm))
    vm.run(f"zfs hold me safe/x@{first} && zfs clone tank/vol@{first} tank/clone")
    dry = atomtx(vm, *PRUNE, "--dry-run")
    assert f"tank/vol@{first}" in dry.output
    assert "origin of a clone: tank/clone" in dry.output
    answer = atomtx(vm, *PRUNE)
    assert answer.status == 0, answer.output
    assert set(marks(vm)[first]) == {"tank/vol", "safe/x"}
    assert one_by_one(vm) == ""
    vm.run(f"zfs release me safe/x@{first}")
    assert atomtx(vm, *PRUNE, "--no-bookmark").status == 0
    assert set(marks(vm)[first]) == {"tank/vol"}
    vm.run("zfs destroy tank/clone")


@pytest.mark.full
def test_power_cut(pools: Machine) -> None:
    """After a power cut a whole moment is kept; a prune that was killed is given up."""
    vm = pools
    snap(vm)
    assert snap(vm, "journal:snapshotted#1").status == -9
    vm.power_off_hard()
    vm.boot()
    remote.install(vm)
    vm.run("zpool list safe >/dev/null 2>&1 || zpool import -a")
    settle(vm)
    assert check_whole(vm, 1)
    assert atomtx(vm, *PRUNE, kill=stop_at("end:zfs program#1")).status == -9
    settle(vm)
    (run, *_) = runs(vm)
    assert (run["state"], run["outcome"]) == ("pruned", "partial")
    assert run["reason"] == "it was interrupted; 1 of 5 were destroyed"
    assert set(marks(vm)[min(marks(vm))]) == set(DATASETS) - {"safe/x"}


def test_full_pool(pools: Machine) -> None:
    """A pool that is full to the last block is what a prune makes room in."""
    vm = pools
    vm.run("truncate -s 200M /tmp/disk && zpool create -O compression=off small /tmp/disk")
    for _ in range(2):
        vm.run("head -c 30M /dev/urandom > /small/big && sync; sleep 1.1")
        assert atomtx(vm, "snap", "small", *PATTERN).status == 0
    vm.run(f"rm /small/big; {fill('/small/fill')}", timeout=900)
    answer = atomtx(vm, "prune", "small", *PATTERN, "--keep-last", "1")
    assert answer.status == 0, answer.output
    assert len(vm.run("zfs list -Ht snapshot -o name small").stdout.split()) == 1
    assert int(vm.run("zfs list -Hp -o available small").stdout) > 20_000_000

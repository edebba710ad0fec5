"""Snapshots that stay, of one moment of ZFS and of btrfs: one run, killed anywhere."""

from __future__ import annotations

import pytest

from tests.extent import some
from tests.vm.machine import Machine
from tests.vm.remote import Answer, atomtx, runs, stop_at
from tests.vm.scene import Prepare, make_journal
from tests.vm.tank import make_datasets

PATTERN = ("--pattern", "s %Y%m%d%H%M%S")
NAMES = ("tank/a", "/srv/b")
MAKE = """
set -e
truncate -s 160M /root/btrfs.img
mkfs.btrfs -q /root/btrfs.img
mkdir -p /srv/b
mount -o loop,subvol=/ /root/btrfs.img /mnt
btrfs -q subvolume create /mnt/b
btrfs -q subvolume snapshot -r /mnt/b /mnt/foreign
umount /mnt
mount -o loop,subvol=b /root/btrfs.img /srv/b
echo now >/srv/b/file
zfs snapshot tank/a@foreign
"""


def with_btrfs(vm: Machine) -> None:
    make_datasets(vm, "tank/a")
    vm.run(MAKE)
    make_journal(vm)


@pytest.fixture
def both(prepared: Prepare) -> Machine:
    """The machine with a dataset and a subvolume, each with a foreign snapshot."""
    return prepared("tank", with_btrfs)


def there(vm: Machine) -> tuple[list[str], list[str]]:
    """Return the names of the snapshots of ZFS and of btrfs; the foreign ones must be there."""
    datasets = vm.run("zfs list -Ht snapshot -o name").stdout.splitlines()
    lines = vm.run("btrfs subvolume list -s /srv/b").stdout.splitlines()
    subvolumes = [line.partition(" path ")[2] for line in lines]
    datasets.remove("tank/a@foreign")
    subvolumes.remove("foreign")
    return datasets, subvolumes


def snap(vm: Machine, *options: str, at: str = "none") -> Answer:
    vm.run("sleep 1.1")  # one a second
    return atomtx(vm, "snap", *NAMES, *PATTERN, *options, kill=stop_at(at))


def settle(vm: Machine) -> None:
    answer = atomtx(vm, "recover")
    assert answer.status in (0, 3), answer.output  # 3: a prune that has destroyed some
    assert "nothing to recover" in atomtx(vm, "recover").output


def count(vm: Machine) -> int:
    """Return how many moments there are, of which nothing may be missing or left over."""
    datasets, subvolumes = there(vm)
    moments = {name.partition("@")[2] for name in datasets}
    assert {path.split("/")[1].rpartition(".")[0] for path in subvolumes} == moments
    assert {path.split("/")[0] for path in subvolumes} <= {"atomtx-kept", "atomtx-transient"}
    assert len(datasets) == len(subvolumes) == len(moments)
    vm.run("mount -o subvol=/ /root/btrfs.img /mnt")
    assert vm.run("ls -A /mnt | grep '^[.]atomtx'; umount /mnt", check=False).stdout == ""
    return len(moments)


def test_snap_killed(both: Machine) -> None:
    """Wherever it is killed, both have the moment, or neither has."""
    vm = both
    points = snap(vm).points
    assert {"end:zfs snapshot#1", "end:btrfs snapshot#1", "end:btrfs rename#1"} <= set(points)
    moments = count(vm)
    assert moments == 1
    for point in some(points, 3):
        known = len(runs(vm))
        assert snap(vm, at=point).status == -9, point
        settle(vm)
        if len(runs(vm)) > known:  # else it was not in the journal yet
            moments += runs(vm)[0]["outcome"] == "completed"
        assert count(vm) == moments, point
    assert moments > 1


def test_prune_and_unsnap(both: Machine) -> None:
    """What is to go goes, of both, wherever that is killed; the newest moment stays."""
    vm = both
    prune = ("prune", *NAMES, *PATTERN, "--keep-last", "1")
    unsnap = ("unsnap", *NAMES, *PATTERN)
    for _ in range(2):
        assert snap(vm).status == 0
    points = atomtx(vm, *prune, kill=stop_at("none")).points
    assert count(vm) == 1
    assert {"start:zfs program#1", "end:btrfs destroy#1"} <= set(points)
    (stays,) = there(vm)[0]
    assert snap(vm, "--transient").status == 0
    assert atomtx(vm, *prune).status == 0
    assert count(vm) == 2, "a prune has counted a transient one"
    for point in some(points, 3):
        answer = atomtx(vm, *unsnap, kill=stop_at(point))
        assert answer.status == -9, (point, answer.output)
        settle(vm)
        assert atomtx(vm, *unsnap).status == 0
        assert there(vm)[0] == [stays]
        assert count(vm) == 1
        assert snap(vm, "--transient").status == 0


def test_lost_journal(both: Machine) -> None:
    """Without the journal, what an interrupted one left is found, and undone if that is wanted."""
    vm = both
    assert snap(vm).status == 0
    assert snap(vm, at="end:btrfs snapshot#1").status == -9
    vm.run("rm -r /var/lib/atomtx")
    answer = atomtx(vm, "recover", "--scan", *PATTERN)
    (first,) = [line for line in answer.stderr.splitlines() if line.startswith("run ")]
    assert first.endswith("in no journal here, of an interrupted snap:"), answer.output
    assert answer.stderr.count("  snapshot ") == len(NAMES), answer.output
    answer = atomtx(vm, "recover", "--scan")
    assert answer.stderr.count("  snapshot ") == 1, answer.output
    assert "bears the mark of run" in answer.stderr
    adopted = atomtx(vm, "recover", "--adopt", first.split()[1].rstrip(","), *PATTERN)
    assert adopted.status == 0, adopted.output
    assert count(vm) == 1

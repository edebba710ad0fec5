"""Backups of real logical volumes, classic and thin, with XFS and ext4: whole, killed, lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.points import STOPPED
from tests.vm.remote import atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import (
    HOST,
    LVM_REPAIRS,
    WITH_COPIER,
    Prepare,
    is_copied,
    make_journal,
    script,
    until,
)
from tests.vm.tank import leftovers
from tests.vm.test_crash import settle

VOLUMES = {
    "data/xfs": "/srv/xfs",
    "data/ext4": "/srv/ext4",
    "data/thin-xfs": "/srv/thin-xfs",
    "data/thin-ext4": "/srv/thin-ext4",
}
PATHS = tuple(VOLUMES.values())
FILES = "/root/files_guest.py"
_MAKE = f"""
set -e
vgcreate -q data {DATA_DISKS[1]}
echo '{LVM_REPAIRS}' > /etc/lvm/lvmlocal.conf
lvcreate -qy -L 320M -n xfs data
lvcreate -qy -L 64M -n ext4 data
lvcreate -qy --type thin-pool -L 1G -n pool data
lvcreate -qy -V 320M --thinpool pool -n thin-xfs data
lvcreate -qy -V 64M --thinpool pool -n thin-ext4 data
for name in xfs ext4 thin-xfs thin-ext4; do
  mkdir /srv/$name
  mkfs.${{name#thin-}} -q /dev/data/$name
  mount /dev/data/$name /srv/$name
done
python3 {FILES} make {" ".join(PATHS)}
sync
"""


def logical_volumes(vm: Machine) -> None:
    vm.put(Path(__file__).with_name("files_guest.py"), FILES)
    vm.run(_MAKE, timeout=600)
    vm.run(restic_command("init"))
    make_journal(vm)


@pytest.fixture
def filled(prepared: Prepare) -> Machine:
    """The machine with four logical volumes, a repository, and no pool."""
    return prepared("clean", logical_volumes)


def told(vm: Machine, root: str = "") -> str:
    """Return what is to be known of the files below *root*."""
    return vm.run(f"python3 {FILES} tell '{root}' {' '.join(PATHS)}").stdout


def check_clean(vm: Machine) -> None:
    assert leftovers(vm) == []
    assert all(run["state"] == "destroyed" for run in runs(vm))
    assert "Suspended" not in vm.run("dmsetup info -c --noheadings -o suspended").stdout


def test_restored(filled: Machine) -> None:
    """
    What restic saves of a moment is what is restored: content, mode, owner, times, links, xattrs.

    The live files change meanwhile, and what is saved does not.
    """
    vm = filled
    before = told(vm)
    assert before.count("user.colour") == 8  # of each volume a file by both of its names
    change = f"{HOST} sh -c 'for d in {' '.join(PATHS)}; do echo later > $d/a/file; done'"
    changed = f'case "$*" in *backup*) {change};; esac'
    wrapper = script(vm, "/root/wrapper", f'{changed}\nexec restic "$@"')
    answer = atomtx(vm, "backup", *PATHS, "--client", "restic", "--command", wrapper, started=True)
    assert answer.status == 0, answer.output
    assert "4 logical volumes one after the other within" in answer.output
    assert backups(vm)[0]["paths"] == sorted(PATHS)
    vm.run(
        f"rm -rf /tmp/r && {restic_command('restore latest --sparse --target /tmp/r')}", timeout=300
    )
    assert told(vm, "/tmp/r") == before
    assert vm.run("cat /srv/xfs/a/file").stdout == "later\n"
    check_clean(vm)


@pytest.mark.parametrize(
    ("state", "who"),
    [
        ("planned", "all"),
        pytest.param("snapshotted", "front", marks=pytest.mark.full),
        ("mounted", "runner"),
        pytest.param("backing-up", "all", marks=pytest.mark.full),
        pytest.param("unmounting", "front", marks=pytest.mark.full),
    ],
)
def test_killed_in_state(filled: Machine, state: str, who: str) -> None:
    """Promises 3 to 6: killed in any state, a run is settled by recover; nothing is left."""
    vm = filled
    kill = stop_at(f"journal:{state}#1", who)
    answer = atomtx(vm, "backup", *VOLUMES, *WITH_COPIER, kill=kill, started=True)
    assert answer.status == -9, answer.output
    settle(vm)
    check_clean(vm)
    (run,) = runs(vm)
    assert run["outcome"] == ("rolled-back" if state == "planned" else "completed")
    assert is_copied(vm) is (state != "planned")
    if state != "planned":
        assert told(vm, "/srv/copy") == told(vm)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("start:lvcreate#1", marks=pytest.mark.full),
        "start:lvcreate#4",
        pytest.param("end:lvcreate#2", marks=pytest.mark.full),
        pytest.param("start:lvchange#1", marks=pytest.mark.full),
        pytest.param("start:lvremove#1", marks=pytest.mark.full),
        pytest.param("end:lvremove#1", marks=pytest.mark.full),
    ],
)
def test_killed_around_command(filled: Machine, point: str) -> None:
    """A front end is killed while LVM works: the command goes on, and recover waits for it."""
    vm = filled
    answer = atomtx(vm, "backup", *VOLUMES, *WITH_COPIER, kill=stop_at(point))
    assert answer.status == -9, answer.output
    settle(vm)
    check_clean(vm)
    (run,) = runs(vm)
    assert (run["outcome"] == "completed") == is_copied(vm)
    assert run["outcome"] == "completed" or "lvcreate" in point


@pytest.mark.parametrize("end", [pytest.param("exit 0", marks=pytest.mark.full), "sleep 600"])
def test_overflow(filled: Machine, end: str) -> None:
    """Promise 7: a run whose snapshot overflowed has failed, whatever its client says."""
    vm = filled
    write = "dd if=/dev/urandom of=/srv/xfs/big bs=1M count=24 conv=fsync status=none"
    client = script(vm, "/root/client", f"ls -R /srv/xfs\n{HOST} {write}\n{end}")
    answer = atomtx(vm, "backup", "data/xfs", "--cow-size", "4M", "--command", client, started=True)
    assert answer.status == 1, answer.output
    assert "overflowed" in answer.output
    (run,) = runs(vm)
    assert run["outcome"] == "failed"
    check_clean(vm)
    assert vm.run("ls -s /srv/xfs/big").status == 0


def test_no_room(filled: Machine) -> None:
    """What the group has no room for is refused with both sizes, and nothing was changed."""
    vm = filled
    answer = atomtx(vm, "backup", "data/xfs", "--cow-size", "900G", *WITH_COPIER)
    assert answer.status == 2
    assert "the volume group data has 6." in answer.output
    assert "its snapshots need 900.0 GiB" in answer.output
    answer = atomtx(vm, "backup", "data/xfs", "data/ext4", "--require-atomic", *WITH_COPIER)
    assert answer.status == 2
    assert "LVM snapshots 2 logical volumes one after the other" in answer.output
    assert runs(vm) == []
    check_clean(vm)


def test_busy_is_parked(filled: Machine) -> None:
    """A snapshot that somebody mounted is parked with its holder named, and removed later."""
    vm = filled
    device = "/dev/mapper/data-atomtx*-0"  # and not its -cow
    mount = f"mkdir -p /mnt/s && mount -o ro,nouuid,norecovery {device} /mnt/s"
    client = script(vm, "/root/client", f"ls -R /srv/xfs\n{HOST} sh -c '{mount}'")
    answer = atomtx(vm, "backup", "data/xfs", "--command", client)
    assert answer.status == 4, answer.output
    assert "mounted at /mnt/s" in answer.output
    vm.run("umount /mnt/s")
    settle(vm)
    check_clean(vm)
    assert runs(vm)[0]["outcome"] == "completed"


def test_foreign(filled: Machine) -> None:
    """Promise 2: one of another UUID under our name, with our tag, is left alone."""
    vm = filled
    kill = stop_at("journal:snapshotted#1")
    assert atomtx(vm, "backup", "data/xfs", *WITH_COPIER, kill=kill).status == -9
    run = runs(vm)[0]["id"]
    name = f"data/atomtx-{run}-0"
    vm.run(f"lvremove -qy {name} && lvcreate -qy -L 8M -n atomtx-{run}-0 data")
    vm.run(f"lvchange -q --addtag atomtx.run={run} {name}")
    answer = atomtx(vm, "recover")
    assert "is not the one that we took" in answer.output
    assert runs(vm)[0]["outcome"] == "rolled-back"
    assert vm.run(f"lvs --noheadings {name}").status == 0


def test_suspended(filled: Machine) -> None:
    """What a dead `lvcreate` leaves suspended is resumed, and its half of a snapshot removed."""
    vm = filled
    kill = stop_at("journal:planned#1")
    assert atomtx(vm, "backup", "data/xfs", "data/ext4", *WITH_COPIER, kill=kill).status == -9
    run = runs(vm)[0]["id"]
    vm.run(f"lvcreate -qy -L 8M --addtag atomtx --addtag atomtx.run={run} -n atomtx-{run}-0 data")
    vm.run("dmsetup suspend data-xfs")
    assert "is suspended" in atomtx(vm, "recover", "--dry-run").output
    assert "Suspended" in vm.run("dmsetup info data-xfs").stdout.title()
    settle(vm)
    check_clean(vm)
    vm.run("touch /srv/xfs/alive && sync -f /srv/xfs")
    assert runs(vm)[0]["outcome"] == "rolled-back"


def test_group_absent(filled: Machine) -> None:
    """Promise 14: without the volume group recovery waits; under another name it is found."""
    vm = filled
    kill = stop_at("journal:snapshotted#1")
    assert atomtx(vm, "backup", "data/xfs", *WITH_COPIER, kill=kill).status == -9
    vm.run(f"umount {' '.join(PATHS)} && vgchange -qan data")
    vm.run("echo 'devices { global_filter=[\"r|.*|\"] }' > /etc/lvm/lvmlocal.conf")
    answer = atomtx(vm, "recover")
    assert answer.status == 6, answer.output
    assert "the volume group data is not there" in answer.output
    vm.run("rm /etc/lvm/lvmlocal.conf && vgrename -q data other && vgchange -qay other")
    answer = atomtx(vm, "recover")
    assert answer.status == 6, answer.output
    assert "the volume group data has another name now: other" in answer.output
    answer = atomtx(vm, "recover", "--rollback")
    assert answer.status == 0, answer.output
    check_clean(vm)


def test_scan(filled: Machine) -> None:
    """With its journal lost, a run's snapshots are listed and can be adopted."""
    vm = filled
    kill = stop_at("journal:mounted#1", "all")
    assert atomtx(vm, "backup", "data/thin-xfs", "data/ext4", *WITH_COPIER, kill=kill).status == -9
    vm.run("mv /var/lib/atomtx /root/lost")
    answer = atomtx(vm, "recover", "--scan")
    assert answer.output.count("snapshot data/atomtx-") == 2
    run = answer.output.split("run ")[1].split(",")[0]
    answer = atomtx(vm, "recover", "--adopt", run[:8])
    assert answer.status == 0, answer.output
    check_clean(vm)


def test_doctor(filled: Machine) -> None:
    """`doctor` finds LVM, and `show` says what was snapshotted."""
    answer = atomtx(filled, "doctor", "--json")
    found = [check for check in json.loads(answer.stdout)["checks"] if check["name"] == "lvm"]
    assert [check["status"] for check in found] == ["ok"]
    assert "logical volumes" in found[0]["detail"]


@pytest.mark.full
def test_power_cut(filled: Machine) -> None:
    """After a power cut in mid-backup and a cold boot, recover backs up the same moment."""
    vm = filled
    vm.run("for d in xfs ext4 thin-xfs thin-ext4; do touch /srv/$d/last; done; sync")
    before = told(vm)
    kill = stop_at("journal:backing-up#1", "machine")
    atomtx(vm, "backup", *VOLUMES, *WITH_COPIER, kill=kill, background=True)
    until(vm, f"test -e {STOPPED}")
    vm.power_off_hard()
    vm.boot()
    vm.run("/venv/bin/python /root/agent.py start", timeout=300)
    for name, path in VOLUMES.items():
        vm.run(f"lvchange -ay {name} && mount /dev/{name} {path} && echo later > {path}/later")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert runs(vm)[0]["outcome"] == "completed"
    assert told(vm, "/srv/copy") == before
    check_clean(vm)

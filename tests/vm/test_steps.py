"""
A job of seven steps over ZFS and LVM, killed in each of them, and cut off from its power.

Snapshots, their integrity database, copies in another pool, restic, borg, xfsdump, and what is
transient goes again: one run, which `atomtx recover` brings to its end however often it is killed.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vm import remote
from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.remote import Answer, atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import Prepare, kill_run, make_journal, running, until
from tests.vm.tank import fill, leftovers, make_datasets

STEPS = (
    "snap --transient",
    "sure scan-kept",
    "clone --transient",
    "backup --from-snapshots",
    "backup home-borg --from-snapshots",
    "backup scratch",
    "unsnap",
)
DATASETS = ("tank/srv", "tank/srv/b c")
CONFIG = f"""
[jobs.home]
volumes = ["tank/srv"]
recursive = true
environment = {{ RESTIC_REPOSITORY = "/srv/repo" }}
credentials.RESTIC_PASSWORD = {{ file = "/root/password" }}
snap-pattern = "s-%Y%m%d%H%M%S"
clone-targets = ["safe"]
steps = {json.dumps(STEPS)}

[jobs.home-borg]
volumes = ["tank/srv"]
recursive = true
client = "borg"
environment = {{ BORG_REPO = "/srv/borg" }}
credentials.BORG_PASSPHRASE = {{ file = "/root/password" }}
snap-pattern = "s-%Y%m%d%H%M%S"

[jobs.scratch]
volumes = ["data/xfs"]
client = "xfsdump"
arguments = ["--destination", "/srv/dumps"]
"""
FILE = "/etc/atomtx/atomtx.toml"
_MAKE = f"""
set -e
vgcreate -q data {DATA_DISKS[1]}
lvcreate -qy -L 320M -n xfs data
lvcreate -qy -L 512M -n safe data
zpool create safe /dev/data/safe
mkfs.xfs -q /dev/data/xfs
mkdir -p /srv/xfs /etc/atomtx
mount /dev/data/xfs /srv/xfs
echo 'the files of scratch' >/srv/xfs/file
umask 077
echo 'correct horse' >/root/password
cat >{FILE}
export BORG_PASSPHRASE='correct horse' BORG_REPO=/srv/borg
borg init -e repokey-blake2
mkdir -m 700 /srv/dumps
cat /proc/sys/kernel/random/uuid >/srv/dumps/.atomtx-xfsdump
sync
"""


def volumes(vm: Machine) -> None:
    make_datasets(vm, *DATASETS)
    vm.run(_MAKE, input=CONFIG, timeout=600)
    vm.run(restic_command("init"))
    make_journal(vm)
    answer = atomtx(vm, "sure", "scan", "/srv/xfs")
    assert answer.status == 0, answer.output


@pytest.fixture
def ready(prepared: Prepare) -> Machine:
    """The machine with two datasets and a logical volume, what they are saved in, and a job."""
    return prepared("tank", volumes)


def parent(vm: Machine) -> dict[str, Any]:
    """Return the newest run of steps."""
    return next(run for run in runs(vm) if run["verb"] == "run")


def outcomes(vm: Machine) -> list[str | None]:
    """Return how the steps of that run ended, in their order."""
    shown = json.loads(atomtx(vm, "show", parent(vm)["id"], "--json").stdout)
    return [step["outcome"] for step in shown["steps"]]


def interrupted(vm: Machine, answer: Answer, step: int) -> None:
    """See that the run was killed in a step, counted from 1: the others are done, or not begun."""
    assert answer.status == -9, answer.output
    assert outcomes(vm) == ["done"] * (step - 1) + [None] * (len(STEPS) - step + 1)


def recover(vm: Machine, at: str = "none", who: str = "front") -> Answer:
    return atomtx(vm, "recover", kill=stop_at(at, who))


def change(vm: Machine) -> None:
    """Give all datasets new files, the first one enough to be read for some seconds."""
    fill(vm, "/tank/srv", files=4, size_bytes=10_000_000)
    fill(vm, "/tank/srv/b c", files=2, size_bytes=20_000)


def moments(vm: Machine) -> list[str]:
    """Return the names of the transient snapshots that are there, the oldest first."""
    lines = vm.run("zfs list -Ht snapshot -s createtxg -o name,atomtx:transient tank/srv").stdout
    pairs = [line.split("\t") for line in lines.splitlines()]
    return [name.partition("@")[2] for name, mark in pairs if mark != "-"]


def check(vm: Machine, number: int) -> None:
    """See that the *number*-th run has done all that it was to do, once, and that all is equal."""
    made = parent(vm)
    assert (made["state"], made["outcome"]) == ("ran", "completed")
    assert outcomes(vm) == ["done"] * len(STEPS)
    assert "nothing to recover" in atomtx(vm, "recover").output
    assert leftovers(vm, foreign=names(vm)) == []
    (moment,) = moments(vm)  # what the next clone begins with; older ones are gone
    for dataset in DATASETS:
        copy = f"safe/{dataset.partition('/')[2]}"
        vm.run(f"mount -t zfs '{copy}@{moment}' /mnt")
        answer = atomtx(vm, "sure", "check", "/mnt", "--of", f"/{dataset}")
        assert (answer.status, "no difference" in answer.output) == (0, True), answer.output
        vm.run("umount /mnt")
    check_backups(vm, number)


def names(vm: Machine) -> list[str]:
    return vm.run("zfs list -Ht snapshot -o name").stdout.splitlines()


def check_backups(vm: Machine, number: int) -> None:
    """See that each client has saved each moment once, and can bring the newest one back."""
    assert len(backups(vm)) == number
    borg = "BORG_PASSPHRASE='correct horse' borg list --short /srv/borg"
    assert len(vm.run(borg, timeout=300).stdout.split()) == number
    saved = [run for run in runs(vm) if run["verb"] == "backup"]
    assert len(saved) == 3 * number
    for run in saved[:3]:
        assert run["outcome"] == "completed"
        answer = atomtx(vm, "sure", "verify-backup", run["id"], "--config", FILE)
        assert (answer.status, "no difference" in answer.output) == (0, True), answer.output


def test_killed_in_every_step(ready: Machine) -> None:
    """Each recovery goes on in the step where the last one was killed, and not before it."""
    vm = ready
    change(vm)
    answer = atomtx(vm, "run", "home")
    assert answer.status == 0, answer.output
    check(vm, 1)
    change(vm)
    interrupted(vm, atomtx(vm, "run", "home", kill=stop_at("journal:snapshotted#1")), 1)
    with running(vm, "recover") as recovery:
        until(vm, "fuser -s /var/lib/atomtx/sure/*srv.db")
        kill_run(vm)
    interrupted(vm, recovery.result(), 2)
    interrupted(vm, recover(vm, "start:zfs receive#1"), 3)
    interrupted(vm, recover(vm, "journal:backing-up#1", "all"), 4)
    interrupted(vm, recover(vm, "journal:backing-up#2", "all"), 5)
    interrupted(vm, recover(vm, "journal:backing-up#2", "all"), 6)
    interrupted(vm, recover(vm, "start:zfs program#1"), 7)
    answer = recover(vm)
    assert answer.status == 0, answer.output
    check(vm, 2)


@pytest.mark.full
def test_power_cut(ready: Machine) -> None:
    """After a power cut in the third step the same moment is copied and saved; then the next."""
    vm = ready
    change(vm)
    answer = atomtx(vm, "run", "home", kill=stop_at("start:zfs receive#2"))
    interrupted(vm, answer, 3)
    (moment,) = moments(vm)
    vm.power_off_hard()
    vm.boot()
    remote.install(vm)
    vm.run("zpool list safe >/dev/null 2>&1 || zpool import -d /dev/data safe")
    vm.run("zpool list tank >/dev/null 2>&1 || zpool import -a")
    vm.run("mountpoint -q /srv/xfs || mount /dev/data/xfs /srv/xfs")
    answer = recover(vm)
    assert answer.status == 0, answer.output
    assert moments(vm) == [moment]
    check(vm, 1)
    change(vm)
    answer = atomtx(vm, "run", "home")
    assert answer.status == 0, answer.output
    assert moments(vm) != [moment]
    check(vm, 2)

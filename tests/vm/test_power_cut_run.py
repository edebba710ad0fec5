"""
Promises 5 and 10: whenever the power is cut in a run, or in its recovery, `recover` settles it.

Two kinds of power cut.  In the first qemu is killed, and the machine boots anew.  In the second
the pool, the journal and the repository lie on one disk with a volatile cache, one run is
recorded, and `recover` has to settle what each of many cuts left of that disk.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.extent import FULL
from tests.vm.machine import Machine
from tests.vm.points import STOPPED
from tests.vm.powercut import (
    FILES,
    GUEST,
    MARKS,
    MIB,
    PARTITIONS,
    POOL,
    SEED,
    Cut,
    CutDisk,
    Record,
    Tally,
    guest,
    partition,
    plugged,
    recorded,
)
from tests.vm.remote import atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import LVM_REPAIRS
from tests.vm.tank import fill, leftovers, make_datasets

DATASETS = ("tank/a", "tank/a/b c")
FOREIGN = ("tank/a@atomtx-0123456789abcdef", "tank/a@other")
BACKUP = ("backup", "-r", "tank/a")

# -- qemu is killed --------------------------------------------------------------------------

STATES = ("planned", "snapshotted", "mounted", "backing-up", "unmounting")
_THERE = STATES[1:]  # the journal has all snapshots: nothing but power was lost
_RNG = random.Random(SEED)
INSTANTS: list[str | float] = [*STATES, *(round(_RNG.uniform(0.5, 20), 1) for _ in range(6))]


def kill_machine(vm: Machine, instant: str | float) -> None:
    """Back up, and kill qemu when the run enters a state, or after some seconds."""
    if isinstance(instant, str):
        kill = stop_at(f"journal:{instant}#1", "machine")
        atomtx(vm, *BACKUP, kill=kill, background=True)
        vm.run(f"until test -e {STOPPED}; do sleep 0.1; done", timeout=120)
    else:
        atomtx(vm, *BACKUP, "--", "--limit-upload", "100", background=True)
        vm.run(f"sleep {instant}")
    vm.power_off_hard()
    vm.boot()
    vm.run("zpool import tank; zpool list tank && /venv/bin/python /root/agent.py start")


# A cold boot takes a minute: the sample of this is test_machine_crash in test_faults.py.
@pytest.mark.full
@pytest.mark.parametrize("instant", INSTANTS)
def test_machine_killed(vm: Machine, power_cuts: list[Tally], instant: str | float) -> None:
    """After a cold boot recover settles the run, and says completed only of a whole backup."""
    make_datasets(vm, *DATASETS)
    for name in DATASETS:
        fill(vm, f"/{name}", files=3, size_bytes=100_000)
    names = " && ".join(f"zfs snapshot {name}" for name in FOREIGN)
    vm.run(f"{names} && {restic_command('init')} && sync")
    kill_machine(vm, instant)
    before = guest_peek(vm, "/var/lib/atomtx")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    _, found = check(vm, "/var/lib/atomtx", {})
    outcomes = [run["outcome"] for run in runs(vm)]
    if "completed" in outcomes:
        found += not_restored(vm)
    elif any(state in _THERE for _, state, _ in before["runs"].values()):
        found.append(f"the moment was there, and recover did not save it: {outcomes}")
    state = next((state for _, state, _ in before["runs"].values()), "no run")
    tally = Tally("qemu killed, booted")
    tally.add(f"killed at {instant}, journal: {state}", ", ".join(outcomes) or "no run", found)
    power_cuts.append(tally)
    assert tally.violations == []


def guest_peek(vm: Machine, state: str) -> dict[str, Any]:
    """Read the journal at *state* in a machine that booted anew."""
    vm.run("mkdir -p /power")
    vm.put(Path(__file__).parent / "power_guest.py", "/root/")
    return guest(vm, "peek", state)


def not_restored(vm: Machine) -> list[str]:
    """Tell where the newest backup differs from the files, or that there is none."""
    if not backups(vm):
        return ["completed, and there is no backup"]
    restore = restic_command("restore latest --target /tmp/r >/dev/null")
    done = vm.run(f"rm -rf /tmp/r && {restore} && diff -r /tank/a /tmp/r/tank/a", check=False)
    return [f"completed, and the backup differs: {done.stdout}{done.stderr}"] if done.status else []


# -- what must hold after every recovery -----------------------------------------------------


def check(
    vm: Machine, state: str, env: Mapping[str, str], foreign: Sequence[str] = FOREIGN
) -> tuple[dict[str, Any], list[str]]:
    """Return the journal after a recovery, and what is wrong with it and with the machine."""
    found = leftovers(vm, foreign=foreign)
    names = vm.run("zfs list -H -t snapshot -o name").stdout.splitlines()
    found += [f"{name} was destroyed" for name in foreign if name not in names]
    told = guest(vm, "peek", state)
    if told["check"] != "ok":
        found.append(f"integrity_check: {told['check']}")
    found += [
        f"run {run} is {row[1]}" for run, row in told["runs"].items() if row[1] != "destroyed"
    ]
    again = atomtx(vm, "recover", env=env)
    if again.status != 0 or "nothing to recover" not in again.output:
        found.append(f"a second recover did something: {again.output}")
    if guest(vm, "peek", state) != told:
        found.append("a second recover changed the journal")
    return told, found


# -- a disk with a volatile cache ------------------------------------------------------------

STATE, REPOSITORY = "/power/state", "/power/repo"
ENV = {"ATOMTX_STATE_DIR": STATE}
# The repository has the whole backup when a folder has this name, and that is on the disk.
CLIENT = """#!/bin/sh
set -e
cd {repository}
rm -rf partial
mkdir partial
cp -a "$@" partial
{sync} -f partial
mv -T partial whole.$$
{sync} -f .
"""
# Each is one disk and one cache: the pool alone, or the rest on ext4 beside it, or beside LVM.
LAYOUTS = ("journal in the pool", "journal on ext4", "LVM, journal on ext4")
VOLUMES = ("classic", "thin")
MAKE_VOLUMES = """
set -e
echo 'devices {{ global_filter=["a|^{pv}$|", "r|.*|"] }}' > /etc/lvm/lvmlocal.conf
vgcreate -q -s 1M vg {pv}
lvcreate -qy -L 64M -n classic vg
lvcreate -qy --type thin-pool -L 128M -n pool vg
lvcreate -qy -V 64M --thinpool pool -n thin vg
mkdir -p /vg/classic /vg/thin
for name in classic thin; do mkfs.ext4 -q /dev/vg/$name; mount /dev/vg/$name /vg/$name; done
"""
ATTACH_VOLUMES = """
set -e
cat > /etc/lvm/lvmlocal.conf <<'END'
devices {{ global_filter=["a|^{pv}$|", "r|.*|"] }}
{repairs}
END
vgchange -qay vg
udevadm settle
for name in classic thin; do mount /dev/vg/$name /vg/$name; done
"""
# LVM flushes nothing between a new text of its metadata and the header that points at it (seen
# with 2.03.31): a disk that writes the second alone has no volume group any more, whoever changed
# it.  That is LVM's to mend, and nobody's here.  The area is before the first extent, at 1 MiB.
LVM_METADATA = range(PARTITIONS[POOL - 1][0], PARTITIONS[POOL - 1][0] + MIB)
DETACH = {
    True: "umount /vg/classic /vg/thin; vgchange -qan vg",
    False: "zpool export tank",
}


@dataclass(frozen=True)
class Scenario:
    """What is recorded: a backup, or a recovery after a kill; with what a control leaves out."""

    layout: str
    killed_at: str = ""
    synced: bool = True  # the client flushes what it wrote
    durable: bool = True  # the journal does

    def __str__(self) -> str:
        parts = [self.layout, f"recovery from {self.killed_at}" if self.killed_at else "backup"]
        parts += [] if self.synced else ["careless client"]
        parts += [] if self.durable else ["careless journal"]
        return ", ".join(parts)

    @property
    def is_control(self) -> bool:
        return not (self.synced and self.durable)

    @property
    def of_lvm(self) -> bool:
        return self.layout == LAYOUTS[2]

    @property
    def root(self) -> str:
        """The directory below which all volumes are mounted."""
        return "/vg" if self.of_lvm else "/tank"


SCENARIOS = [
    Scenario(LAYOUTS[1], "mounted"),
    Scenario(LAYOUTS[1], durable=False),
    Scenario(LAYOUTS[2]),
]
if FULL:
    SCENARIOS += [
        Scenario(LAYOUTS[0]),
        Scenario(LAYOUTS[1]),
        Scenario(LAYOUTS[0], "backing-up"),
        Scenario(LAYOUTS[1], "unmounting"),
        Scenario(LAYOUTS[2], "snapshotted"),
        Scenario(LAYOUTS[2], "unmounting"),
        Scenario(LAYOUTS[1], synced=False),
    ]
# A machine for each of the full set, one for the sample.
GROUPS = [[scenario] for scenario in SCENARIOS] if FULL else [SCENARIOS]


def put_client(vm: Machine, *, synced: bool) -> None:
    text = CLIENT.format(repository=REPOSITORY, sync="sync" if synced else "true")
    vm.run(f"cat > /root/client <<'END'\n{text}\nEND\nchmod 755 /root/client")


def record_run(vm: Machine, folder: Path, scenario: Scenario) -> tuple[Record, str]:
    """Record one run in a new *folder*; return the record and what it backs up, as checksums."""
    disk = folder.name
    with recorded(vm, folder):
        if scenario.layout != LAYOUTS[0]:
            files = partition(disk, FILES)
            vm.run(f"mkfs.ext4 -q {files} && mount {files} /power")
        if scenario.of_lvm:
            make_volumes(vm, disk)
        else:
            make_pool(vm, disk, scenario)
        vm.run(f"mkdir {REPOSITORY} && sync")
        put_client(vm, synced=scenario.synced)
        sums = checksums(vm, scenario.root)
        perform(vm, scenario, partition(disk, MARKS))
        vm.run(f"umount /power; {DETACH[scenario.of_lvm]}")
    return Record(folder), sums


def make_pool(vm: Machine, disk: str, scenario: Scenario) -> None:
    """Make a pool with two datasets, files in them, and foreign snapshots."""
    vm.run(f"zpool create -o ashift=12 tank {partition(disk, POOL)}")
    if scenario.layout == LAYOUTS[0]:
        vm.run("zfs create -o mountpoint=/power tank/power")
    make_datasets(vm, *DATASETS)
    for name in DATASETS:
        fill(vm, f"/{name}", files=2, size_bytes=50_000)
    names = " && ".join(f"zfs snapshot '{name}'" for name in FOREIGN)
    vm.run(f"{names} && sync && zpool sync")


def make_volumes(vm: Machine, disk: str) -> None:
    """Make a classic and a thin volume with files in them, and a foreign snapshot."""
    vm.run(MAKE_VOLUMES.format(pv=partition(disk, POOL)), timeout=600)
    for name in VOLUMES:
        vm.run(f"mkdir /vg/{name}/a")
        fill(vm, f"/vg/{name}/a", files=2, size_bytes=50_000)
    vm.run("lvcreate -qy -L 8M -s -n foreign vg/classic && sync")


def perform(vm: Machine, scenario: Scenario, marks: str) -> None:
    """Do what is to be recorded, each of its points marked."""
    backup = ("backup", *(f"vg/{name}" for name in VOLUMES)) if scenario.of_lvm else BACKUP
    words = (*backup, "--command", "/root/client")
    kill = stop_at(f"journal:{scenario.killed_at}#1", "all") if scenario.killed_at else None
    if scenario.durable:
        answer = atomtx(vm, *words, env=ENV, marks=marks, kill=kill)
    else:
        answer = atomtx(vm, "run", *words, env=ENV, marks=marks, kill=kill, script=GUEST)
    if scenario.killed_at:
        assert answer.status == -9, answer.output
        answer = atomtx(vm, "recover", env=ENV, marks=marks)
    assert answer.status == 0, answer.output


def checksums(vm: Machine, folder: str) -> str:
    """Return a checksum of each file of the set, by its path below *folder*."""
    return vm.run(
        f"cd {folder} && find . -path '*/a/*' -type f -exec sha256sum {{}} + | sort -k 2"
    ).stdout


def settle(
    vm: Machine, disk: CutDisk, scenario: Scenario, record: Record, sums: str, cut: Cut
) -> tuple[str, list[str]]:
    """Cut the power, recover, and return what became of the run and what is wrong."""
    disk.set(record, cut, LVM_METADATA if scenario.of_lvm else range(0))
    acknowledged = record.marks_before(cut)
    attach(vm, scenario)
    before = guest(vm, "peek", STATE)
    found = forgotten(before, acknowledged)
    answer = atomtx(vm, "recover", env=ENV)
    if answer.status != 0:
        found.append(f"recover: {answer.status}: {answer.output}")
    after, wrong = check(vm, STATE, ENV, () if scenario.of_lvm else FOREIGN)
    if scenario.of_lvm and vm.run("lvs vg/foreign", check=False).status:
        found.append("vg/foreign was destroyed")
    outcomes = [outcome for _, _, outcome in after["runs"].values()]
    wholes = vm.run(f"ls -d {REPOSITORY}/whole.*", check=False).stdout.split()
    is_whole = any(checksums(vm, folder) == sums for folder in wholes)
    if "completed" in outcomes and not is_whole:
        found.append("completed, and the repository has no whole backup")
    if any(state in _THERE for _, state, _ in before["runs"].values()) and not is_whole:
        found.append(f"the moment was there, and recover did not save it: {outcomes}")
    if "exit 0" in acknowledged and outcomes != ["completed"]:
        found.append(f"exit status 0, and then {outcomes}")
    vm.run(f"mountpoint -q /power && umount /power; {DETACH[scenario.of_lvm]}")
    found += wrong
    came_from = next((state for _, state, _ in before["runs"].values()), "nothing")
    return f"{came_from}: {', '.join(map(str, outcomes)) or 'nothing'}", found


def attach(vm: Machine, scenario: Scenario) -> None:
    """Do what a machine does at boot: mount what is there, import the pool or activate LVM's."""
    if scenario.of_lvm:
        vm.run(f"mkdir -p /power && mount {partition('cut', FILES)} /power")
        vm.run(ATTACH_VOLUMES.format(pv=partition("cut", POOL), repairs=LVM_REPAIRS), timeout=300)
        return
    vm.run(
        f"zpool import -d {partition('cut', POOL)} tank && mkdir -p /power &&"
        f" if ! mountpoint -q /power; then mount {partition('cut', FILES)} /power; fi"
    )


def forgotten(told: Mapping[str, Any], acknowledged: list[str]) -> list[str]:
    """Return the commits that were acknowledged and that the journal does not know."""
    wanted = {
        words[1]: int(words[2])
        for mark in acknowledged
        if len(words := mark.split()) == 3 and mark.startswith("journal:")
    }
    known = told["runs"]
    return [
        f"the journal lost revision {revision} of run {run}"
        for run, revision in wanted.items()
        if run not in known or known[run][0] < revision
    ]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "; ".join(map(str, group)))
def test_cache_lost(
    bare_vm: Machine, tmp_path: Path, power_cuts: list[Tally], group: list[Scenario]
) -> None:
    """
    Wherever the power is cut, nothing is left or lost after recover, nor said done that is not.

    The controls, where a flush is left out, must be found out.
    """
    with plugged(bare_vm):
        disk = CutDisk(bare_vm, tmp_path)
        for n, scenario in enumerate(group):
            record, sums = record_run(bare_vm, tmp_path / f"run{n}", scenario)
            tally = Tally(str(scenario))
            power_cuts.append(tally)
            try_cuts(bare_vm, disk, scenario, record, sums, tally)
    wrong = [
        tally
        for tally, scenario in zip(power_cuts, group, strict=True)
        if bool(tally.violations) != scenario.is_control
    ]
    assert wrong == []


def try_cuts(
    vm: Machine, disk: CutDisk, scenario: Scenario, record: Record, sums: str, tally: Tally
) -> None:
    """Cut and settle at the sampled moments; of a control a part is enough."""
    few = (5, 0) if scenario.is_control else (10, 10)
    at_marks, others = few if FULL else (2, 1)
    for cut in record.cuts(random.Random(SEED), at_marks=at_marks, others=others):
        tally.add(cut, *settle(vm, disk, scenario, record, sums, cut))
        if scenario.is_control and tally.violations and not FULL:
            return

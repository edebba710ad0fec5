"""Kept snapshots into a repository, on real ZFS with real restic: each once, at its own time."""

from __future__ import annotations

from datetime import datetime

import pytest

from tests.extent import some
from tests.vm.machine import Machine
from tests.vm.remote import Answer, atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import Prepare, make_journal
from tests.vm.tank import fill, leftovers, make_datasets

PATTERN = ("--pattern", "s-%Y%m%d%H%M%S")
DATASETS = ("tank/a", "tank/a/b c")
SAVE = ("backup", "-r", "tank/a", "--from-snapshots")


def with_repository(vm: Machine) -> None:
    make_datasets(vm, *DATASETS)
    vm.run(restic_command("init"))
    make_journal(vm)


@pytest.fixture
def ready(prepared: Prepare) -> Machine:
    """The machine with two datasets and an empty repository."""
    return prepared("tank", with_repository)


def snap(vm: Machine, *words: str) -> None:
    """Change all, and take snapshots that stay."""
    vm.run("rm -f /tank/a/file-* '/tank/a/b c'/file-*")
    for name in DATASETS:
        fill(vm, f"/{name}", files=2, size_bytes=20_000)
    vm.run("sleep 1.1")  # one a second
    answer = atomtx(vm, "snap", "-r", "tank/a", *PATTERN, *words)
    assert answer.status == 0, answer.output


def save(vm: Machine, *words: str, at: str = "none", who: str = "front") -> Answer:
    return atomtx(vm, *SAVE, *words, kill=stop_at(at, who))


def moments(vm: Machine) -> list[tuple[int, str]]:
    """Return when the kept snapshots of tank/a were taken, and their names, the oldest first."""
    lines = vm.run("zfs list -Hp -d 1 -t snapshot -s createtxg -o creation,name tank/a").stdout
    pairs = [line.split("\t") for line in lines.splitlines()]
    return [(int(at), name) for at, name in pairs]


def marks(vm: Machine) -> str:
    return vm.run(
        "zfs list -Hpt snapshot -o name,guid,userrefs,atomtx:run,atomtx:kept -s name"
    ).stdout


def check_saved(vm: Machine, before: str) -> None:
    """Each moment is in the repository once, at its time, equal; the kept ones are as before."""
    assert marks(vm) == before
    assert "\t0\t" in before
    saved = [int(datetime.fromisoformat(b["time"]).timestamp()) for b in backups(vm)]
    assert sorted(saved) == [at for at, _ in moments(vm)]
    for backup in backups(vm):
        at = int(datetime.fromisoformat(backup["time"]).timestamp())
        (name,) = [n.partition("@")[2] for t, n in moments(vm) if t == at]
        restore = restic_command(f"restore {backup['id']} --target /tmp/r >/dev/null")
        vm.run(
            f"rm -rf /tmp/r; {restore} &&"
            " for d in a 'a/b c'; do"
            f' mount -t zfs "tank/$d@{name}" /mnt && diff -r -x "b c" /mnt "/tmp/r/tank/$d"'
            " || exit 1; umount /mnt; done"
        )
    names = [line.split("\t")[0] for line in before.splitlines()]
    assert leftovers(vm, foreign=names) == []


def test_course(ready: Machine) -> None:
    """All that is missing, the oldest first, as many as are wanted; then nothing."""
    vm = ready
    for _ in range(3):
        snap(vm)
    before = marks(vm)
    dry = save(vm, "--dry-run")
    assert dry.status == 0, dry.output
    assert dry.output.count("would be saved\n") == 3
    assert save(vm, "--limit", "1").status == 0
    (first,) = backups(vm)
    assert int(datetime.fromisoformat(first["time"]).timestamp()) == moments(vm)[0][0]
    answer = save(vm)
    assert answer.status == 0, answer.output
    check_saved(vm, before)
    assert save(vm).status == 0
    assert len(backups(vm)) == 3


@pytest.mark.full  # tests/cli/test_from_snapshots.py has it, played
def test_killed(ready: Machine) -> None:
    """Killed anywhere, recover ends that moment, and the next call the others."""
    vm = ready
    snap(vm)
    points = [p for p in save(vm).points if "before:" not in p]
    for point in some(points, 3):
        snap(vm)
        before = marks(vm)
        assert save(vm, at=point, who="all").status == -9, point
        assert atomtx(vm, "recover").status == 0, point
        assert "nothing to recover" in atomtx(vm, "recover").output
        assert marks(vm) == before, point
        assert save(vm).status == 0
        outcomes = {run["outcome"] for run in runs(vm)}
        assert outcomes == {"completed"}, (point, outcomes)
    check_saved(vm, marks(vm))


@pytest.mark.full
def test_unsnap(ready: Machine) -> None:
    """What a backup still reads is not taken away under it; afterwards all of it is."""
    vm = ready
    snap(vm)
    stays = marks(vm)
    snap(vm, "--transient")
    there = marks(vm)
    assert save(vm, "--limit", "1").status == 0
    assert save(vm, at="journal:backing-up#1", who="all").status == -9
    unsnap = ("unsnap", "-r", "tank/a", *PATTERN)
    answer = atomtx(vm, *unsnap, "--dry-run")
    assert answer.output.count("its moment is read by a run") == len(DATASETS), answer.output
    assert atomtx(vm, *unsnap).status == 0
    assert atomtx(vm, "recover").status == 0
    check_saved(vm, there)
    assert atomtx(vm, *unsnap).status == 0
    assert marks(vm) == stays

"""Runs killed in each state, on real ZFS with real restic: nothing is lost or left over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vm import remote
from tests.vm.machine import Machine
from tests.vm.remote import atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import WITH_COPIER, Prepare, is_copied, make_journal, running, script, until
from tests.vm.tank import fill, leftovers, make_datasets

STATES = ("planned", "snapshotted", "mounted", "backing-up", "unmounting")
DATASETS = ("tank/a", "tank/a/b c", "tank/d")
MIB = 1 << 20


def three_datasets(vm: Machine) -> None:
    make_datasets(vm, *DATASETS)
    for name in DATASETS:
        fill(vm, f"/{name}", files=3, size_bytes=100_000)
    vm.run(f"zfs snapshot tank/a@atomtx-0123456789abcdef && {restic_command('init')}")
    make_journal(vm)


@pytest.fixture
def filled(prepared: Prepare) -> Machine:
    """The machine with three datasets, a repository, and a foreign snapshot beside ours."""
    return prepared("tank", three_datasets)


def settle(vm: Machine, **options: Any) -> None:
    """Recover until nothing is open; a second time changes nothing."""
    answer = atomtx(vm, "recover", **options)
    assert answer.status == 0, answer.output
    before = runs(vm)
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert "nothing to recover" in answer.output
    assert runs(vm) == before


def check_clean(vm: Machine) -> None:
    """Nothing of ours is left, and what is not ours is still there."""
    assert leftovers(vm, foreign=["tank/a@atomtx-0123456789abcdef"]) == []
    assert vm.run("zfs list -H tank/a@atomtx-0123456789abcdef").status == 0
    assert all(run["state"] == "destroyed" for run in runs(vm))


# Each state once, with real restic and a runner as users' are; tests/crash has all points.
@pytest.mark.parametrize(
    ("state", "who"),
    [
        ("planned", "all"),
        pytest.param("snapshotted", "front", marks=pytest.mark.full),
        ("mounted", "runner"),
        pytest.param("backing-up", "all", marks=pytest.mark.full),
        ("unmounting", "front"),
    ],
)
def test_killed_in_state(filled: Machine, state: str, who: str) -> None:
    """
    Killed in any state, with or without its runner and client, a run is settled by recover.

    It is completed from the same snapshots where they had been taken, and rolled back where not
    (promises 3 to 6); a second recover changes nothing.
    """
    vm = filled
    kill = stop_at(f"journal:{state}#1", who)
    answer = atomtx(vm, "backup", "-r", "tank/a", "tank/d", kill=kill, started=True)
    assert answer.status == -9, answer.output
    settle(vm)
    check_clean(vm)
    (run,) = runs(vm)
    if state == "planned":
        assert run["outcome"] == "rolled-back"
        assert backups(vm) == []
        return
    assert run["outcome"] == "completed"
    assert len(backups(vm)) == 1
    restored = vm.run(
        f"rm -rf /tmp/r && {restic_command('restore latest --target /tmp/r')} >/dev/null &&"
        " diff -r /tank/a /tmp/r/tank/a && diff -r /tank/d /tmp/r/tank/d"
    )
    assert restored.status == 0


@pytest.mark.parametrize(
    ("point", "who"),
    [
        ("start:zfs snapshot#1", "front"),
        ("start:zfs snapshot#1", "child"),
        pytest.param("start:zfs hold#1", "child", marks=pytest.mark.full),
        pytest.param("start:zfs release#1", "front", marks=pytest.mark.full),
        ("start:zfs program#1", "front"),
        ("start:zfs program#1", "child"),
    ],
)
def test_killed_inside_command(filled: Machine, point: str, who: str) -> None:
    """A kill of the front end, or of `zfs` itself, while `zfs` changes the pool, is settled."""
    vm = filled
    command = ("backup", "-r", "tank/a", "tank/d", *WITH_COPIER)
    answer = atomtx(vm, *command, kill=stop_at(point, who))
    assert answer.status in ((-9,) if who == "front" else (0, 1, 4)), answer.output
    settle(vm)
    check_clean(vm)
    (run,) = runs(vm)
    completed = run["outcome"] == "completed"
    assert completed == is_copied(vm)
    assert completed or "snapshot" in point


@pytest.mark.parametrize(
    "who", ["front", *(pytest.param(who, marks=pytest.mark.full) for who in ("runner", "all"))]
)
def test_killed_while_client_reads(filled: Machine, who: str) -> None:
    """Killed while restic uploads: adopted where the runner lives, else resumed; one backup."""
    vm = filled
    kill = stop_at("journal:backing-up#1", f"{who} later", delay_s=4)
    command = ("backup", "-r", "tank/a", "--", "--limit-upload", "80")
    answer = atomtx(vm, *command, kill=kill, started=True)
    assert answer.status == -9, answer.output
    settle(vm)
    check_clean(vm)
    (run,) = runs(vm)
    assert run["outcome"] == "completed"
    assert run["attempts"] == (1 if who == "front" else 2)
    assert len(backups(vm)) == 1


def test_every_point_is_found(filled: Machine) -> None:
    """A run without a kill passes the points that the tests above name, each journal state once."""
    command = ("backup", "-r", "tank/a", "tank/d", *WITH_COPIER)
    answer = atomtx(filled, *command, started=True)
    assert answer.status == 0, answer.output
    assert [p for p in answer.points if p.startswith("journal:") and "+" not in p] == [
        f"journal:{state}#1" for state in (*STATES, "destroyed")
    ]
    programs = [p for p in answer.points if p.startswith("start:zfs")]
    assert programs == [
        "start:zfs list#1",
        "start:zfs snapshot#1",
        "start:zfs get#1",
        "start:zfs hold#1",
        "start:zfs release#1",
        "start:zfs program#1",
    ]
    check_clean(filled)
    assert remote.runs(filled)[0]["outcome"] == "completed"


def test_upload_is_adopted(filled: Machine) -> None:
    """
    A killed front end costs nothing of an upload: the client goes on and recover adopts it.

    Counted at the repository: killed when a part of 48 MiB is there, each byte arrives once.
    """
    vm = filled
    vm.run(f"head -c {48 * MIB} /dev/urandom > /tank/a/big && sync")
    words = ("backup", "tank/a", "--", "--limit-upload", "4000")
    atomtx(vm, *words, background=True, started=True)
    until(vm, "find /srv/repo/data -type f -size +200k | grep -q .")
    # The client stands still for as long as the tests look.
    vm.run("pkill -STOP -x restic; kill -KILL $(fuser /var/lib/atomtx/runs/*/front.lock)")
    assert 0 < arrived(vm) < 40 * MIB
    assert "orphaned" in atomtx(vm, "status").output
    with running(vm, "recover") as recovery:
        until(vm, "fuser -s /var/lib/atomtx/runs/*/front.lock")
        vm.run("sleep 1; pkill -CONT -x restic")
    answer = recovery.result()
    assert answer.status == 0, answer.output
    assert "waiting for its end" in answer.output
    (run,) = runs(vm)
    assert run["outcome"] == "completed"
    check_clean(vm)
    assert 48 * MIB <= arrived(vm) <= 48 * MIB * 1.02
    moves = json.loads(atomtx(vm, "show", "--json", run["id"]).stdout)["moves"]
    assert [move["dest"] for move in moves].count("backing-up") == 1


def arrived(vm: Machine) -> int:
    """Return how many bytes of data the repository has."""
    sizes = vm.run("find /srv/repo/data -type f -printf '%s\\n'").stdout
    return sum(map(int, sizes.split()))


@pytest.mark.parametrize("alive", ["front", "runner"])
def test_stop(filled: Machine, alive: str) -> None:
    """`stop` ends a living run and undoes it, also where only its runner lives."""
    vm = filled
    command = ("backup", "tank/a", "--command", script(vm, "/root/slow", "sleep 600"))
    if alive == "front":
        atomtx(vm, *command, background=True, started=True)
    else:
        kill = stop_at("journal:backing-up#1", "front later", delay_s=4)
        atomtx(vm, *command, kill=kill, started=True)
    until(vm, "pgrep -f /root/slo[w]")
    answer = atomtx(vm, "stop", runs(vm)[0]["id"][:8])
    assert answer.status == 0, answer.output
    assert vm.run("pgrep -f /root/slow", check=False).status == 1
    assert runs(vm)[0]["outcome"] == "rolled-back"
    check_clean(vm)

"""What is not ours stays, what was disturbed is not completed, what escapes is found."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.remote import atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import (
    COPIER,
    HOST,
    WAITS,
    WITH_COPIER,
    Prepare,
    is_copied,
    let_go,
    make_journal,
    running,
    script,
    until,
)
from tests.vm.tank import fill, leftovers, make_datasets


def one_dataset(vm: Machine) -> None:
    make_datasets(vm, "tank/a")
    fill(vm, "/tank/a", files=3, size_bytes=1000)
    vm.run(restic_command("init"))
    make_journal(vm)


@pytest.fixture
def one(prepared: Prepare) -> Machine:
    """The machine with one dataset and an empty restic repository."""
    return prepared("tank", one_dataset)


COPY_A = ("backup", "tank/a", *WITH_COPIER)


def guids(vm: Machine) -> dict[str, str]:
    lines = vm.run("zfs list -Hp -t snapshot -o name,guid").stdout.splitlines()
    return dict(line.split("\t") for line in lines)


def forged(vm: Machine, state: str) -> tuple[str, str]:
    """Kill a run in that state, and put another snapshot in the place of its own, marked as it."""
    answer = atomtx(vm, *COPY_A, kill=stop_at(f"journal:{state}#1", "all"))
    assert answer.status == -9, answer.output
    run = runs(vm)[0]["id"]
    name = f"tank/a@atomtx-{run}"
    vm.run(
        f"zfs release atomtx-{run} {name}; zfs destroy {name};"
        f" zfs snapshot -o atomtx:run={run} {name} && zfs hold atomtx-{run} {name}",
        check=False,
    )
    assert name in guids(vm)
    return run, name


@pytest.mark.parametrize(
    "state",
    ["snapshotted", *(pytest.param(s, marks=pytest.mark.full) for s in ("mounted", "unmounting"))],
)
def test_exact_name_other_guid(one: Machine, state: str) -> None:
    """A snapshot with our exact name, hold tag and local mark, but another guid, is not touched."""
    vm = one
    run, name = forged(vm, state)
    theirs = guids(vm)
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert guids(vm) == theirs
    assert f"atomtx-{run}" in vm.run(f"zfs holds -H {name}").stdout
    (row,) = runs(vm)
    assert row["state"] == "destroyed"
    assert row["outcome"] != "completed" or is_copied(vm)


def test_exact_name_before_its_guid(one: Machine) -> None:
    """Until its identity is journaled, name and local mark are the proof: it is taken for ours."""
    vm = one
    _, name = forged(vm, "planned")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert name not in guids(vm)
    (row,) = runs(vm)
    assert row["outcome"] == ("completed" if is_copied(vm) else "rolled-back")
    assert leftovers(vm) == []


def test_recreated_between_probe_and_destroy(one: Machine) -> None:
    """One that is recreated after the probe and before the destroy is not touched."""
    vm = one
    # The real `zfs program` is started only after somebody else destroyed and recreated it.
    vm.run("mv /usr/sbin/zfs /usr/sbin/zfs.real")
    script(
        vm,
        "/usr/sbin/zfs",
        """
if [ "$1" = program ]; then
  for name in $(zfs.real list -H -t snapshot -o name | grep @atomtx-); do
    zfs.real destroy "$name" && zfs.real snapshot -o atomtx:run="${name##*atomtx-}" "$name"
  done
fi
exec zfs.real "$@"
""",
    )
    answer = atomtx(vm, *COPY_A)
    vm.run("mv /usr/sbin/zfs.real /usr/sbin/zfs")
    assert answer.status == 0, answer.output
    run = runs(vm)[0]["id"]
    assert list(guids(vm)) == [f"tank/a@atomtx-{run}"]
    shown = atomtx(vm, "show", run).stdout
    assert "foreign" in shown


def test_inherited_mark(one: Machine) -> None:
    """A mark that a snapshot inherits from its dataset proves nothing."""
    vm = one
    answer = atomtx(vm, *COPY_A, kill=stop_at("journal:planned#1", "front"))
    assert answer.status == -9
    run = runs(vm)[0]["id"]
    vm.run(
        f"zfs set atomtx:run={run} tank/a && zfs snapshot tank/a@atomtx-{run}"
        " && zfs snapshot tank/a@other"
    )
    theirs = guids(vm)
    assert atomtx(vm, "recover").status == 0
    assert guids(vm) == theirs


@pytest.mark.parametrize("again", [True, False])
def test_unmounted_in_mid_read(one: Machine, again: bool) -> None:
    """A snapshot that was unmounted while the client read, even if mounted again: not completed."""
    vm = one
    remount = 'mount -i -t zfs -o ro "$source" /tank/a' if again else "true"
    wrapper = script(
        vm,
        "/root/wrapper",
        f"""
source=$(grep -o 'tank/a@atomtx-[0-9a-f]*' /proc/self/mountinfo | tail -n 1)
umount -l /tank/a && {remount}
exec true
""",
    )
    answer = atomtx(vm, "backup", "tank/a", "--command", wrapper)
    assert answer.status == 1, answer.output
    assert "mounted" in answer.output
    (run,) = runs(vm)
    assert run["outcome"] == "failed"
    assert leftovers(vm) == []


WRAPPERS = {
    "closes its descriptors": """#!/usr/bin/python3
import os, sys, time
os.closerange(3, 4096)
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
time.sleep(600)
""",
    "goes through sudo": """
exec sudo -n /bin/sh -c 'sleep 600; true'
""",
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("closes its descriptors", "namespace"),
        ("goes through sudo", "tree"),
        pytest.param("closes its descriptors", "tree", marks=pytest.mark.full),
        pytest.param("goes through sudo", "namespace", marks=pytest.mark.full),
    ],
)
def test_escaping_client(one: Machine, kind: str, layout: str) -> None:
    """
    A client that dropped our locks is found by its namespace after its runner was killed.

    It is ended before anything is unmounted (promise 6).
    """
    vm = one
    wrapper = script(vm, "/root/wrapper", WRAPPERS[kind])
    options = ["--layout", "tree", "--root", "/tree"] if layout == "tree" else []
    kill = stop_at("journal:backing-up#1", "runner later", delay_s=4)
    answer = atomtx(vm, "backup", "tank/a", *options, "--command", wrapper, kill=kill)
    assert answer.status == -9, answer.output
    assert vm.run("pgrep -f 'sleep 600|/root/wrapper'", check=False).status == 0
    answer = atomtx(vm, "recover", "--rollback")
    assert answer.status == 0, answer.output
    assert "ending what the interrupted run left behind" in answer.output
    assert vm.run("pgrep -f 'sleep 600|/root/wrapper'", check=False).status == 1
    assert leftovers(vm) == []
    assert runs(vm)[0]["outcome"] == "rolled-back"


def test_busy_is_parked(one: Machine) -> None:
    """
    A snapshot that somebody else has mounted parks the cleanup: exit 4, the holder named.

    A parked run blocks no new backup, and once nobody holds it the next one clears it.
    """
    vm = one
    vm.run("mkdir -p /mnt/theirs")
    wrapper = script(
        vm,
        "/root/wrapper",
        """
source=$(grep -o 'tank/a@atomtx-[0-9a-f]*' /proc/self/mountinfo | tail -n 1)
exec nsenter -t 1 -m mount -t zfs "$source" /mnt/theirs
""",
    )
    answer = atomtx(vm, "backup", "tank/a", "--command", wrapper)
    assert answer.status == 4, answer.output
    assert "/mnt/theirs" in answer.output
    assert runs(vm)[0]["cleanup"] == "parked"
    assert atomtx(vm, "recover").status == 4
    assert atomtx(vm, *COPY_A).status == 0
    vm.run("umount /mnt/theirs")
    script(vm, "/root/wrapper", f'exec {COPIER} "$@"')
    answer = atomtx(vm, "backup", "tank/a", "--command", wrapper)
    assert answer.status == 0, answer.output
    assert leftovers(vm) == []
    assert [(run["outcome"], run["cleanup"]) for run in runs(vm)] == [("completed", None)] * 3


def test_looked_at_through_dot_zfs(one: Machine) -> None:
    """A look into .zfs/snapshot, which mounts the snapshot for minutes, does not park the run."""
    vm = one
    wrapper = script(
        vm, "/root/wrapper", "exec nsenter -t 1 -m sh -c 'ls /tank/a/.zfs/snapshot/*'\n"
    )
    answer = atomtx(vm, "backup", "tank/a", "--command", wrapper)
    assert answer.status == 0, answer.output
    assert leftovers(vm) == []


def test_pool_exported(one: Machine) -> None:
    """A pool that is not imported makes recover wait, and say so; imported, the run completes."""
    vm = one
    answer = atomtx(vm, *COPY_A, kill=stop_at("journal:mounted#1", "all"))
    assert answer.status == -9
    vm.run("zpool export tank")
    answer = atomtx(vm, "recover")
    assert answer.status == 6, answer.output
    assert "pool tank is not imported" in answer.output
    answer = atomtx(vm, "recover", "--rollback")
    assert answer.status == 6, answer.output
    vm.run("zpool import tank")
    assert atomtx(vm, "recover").status == 0
    assert runs(vm)[0]["outcome"] == "completed"
    assert leftovers(vm) == []


def test_password_absent(one: Machine) -> None:
    """Without the run's secret recover waits and names it; no value is in the journal or a log."""
    vm = one
    answer = atomtx(vm, "backup", "tank/a", kill=stop_at("journal:mounted#1", "all"))
    assert answer.status == -9
    vm.run("! grep -r 'correct horse' /var/lib/atomtx")
    answer = atomtx(vm, "recover", env={"RESTIC_PASSWORD": ""})
    assert answer.status == 6, answer.output
    answer = atomtx(vm, "recover", without=("RESTIC_PASSWORD", "RESTIC_REPOSITORY"))
    assert answer.status == 6, answer.output
    assert "RESTIC_PASSWORD" in answer.output
    answer = atomtx(vm, "recover", without=("RESTIC_REPOSITORY",))
    assert answer.status == 0, answer.output
    assert runs(vm)[0]["outcome"] == "completed"


def test_abandon(one: Machine) -> None:
    """A run whose pool will never return is closed at the user's word, and only then."""
    vm = one
    atomtx(vm, *COPY_A, kill=stop_at("journal:mounted#1", "all"))
    run = runs(vm)[0]["id"]
    assert atomtx(vm, "recover", "--abandon", run).status == 2
    vm.run("zpool export tank")
    assert atomtx(vm, "recover", "--abandon", run).status == 0
    assert runs(vm)[0]["state"] == "destroyed"


def test_lost_journal(one: Machine) -> None:
    """With the journal gone, --scan lists what carries our marks, and only --adopt undoes it."""
    vm = one
    atomtx(vm, *COPY_A, kill=stop_at("journal:backing-up#1", "all"))
    run = runs(vm)[0]["id"]
    vm.run("rm -rf /var/lib/atomtx && zfs snapshot tank/a@atomtx-mine")
    assert "nothing to recover" in atomtx(vm, "recover").output
    answer = atomtx(vm, "recover", "--scan")
    assert f"run {run}, of this minute, in no journal here" in answer.output
    assert f"snapshot tank/a@atomtx-{run}, 0 B" in answer.output
    assert "atomtx-mine" not in answer.output
    assert len(guids(vm)) == 2
    answer = atomtx(vm, "recover", "--adopt", run[:6])
    assert answer.status == 0, answer.output
    assert list(guids(vm)) == ["tank/a@atomtx-mine"]


@pytest.mark.full
def test_machine_crash(one: Machine) -> None:
    """After a crash of the whole machine in mid-backup recover resumes the same moment."""
    vm = one
    fill(vm, "/tank/a", files=5, size_bytes=1_000_000)
    vm.run("sync")
    kill = stop_at("journal:backing-up#1", "front later", delay_s=6)
    words = ("backup", "tank/a", "--", "--limit-upload", "100")
    atomtx(vm, *words, kill=kill, started=True)
    vm.power_off_hard()
    vm.boot()
    vm.run(
        "zpool import tank || zpool list tank; /venv/bin/python /root/agent.py start", timeout=300
    )
    (before,) = runs(vm)
    assert before["state"] == "backing-up"
    moment = vm.run(f"zfs get -Hp -o value creation tank/a@atomtx-{before['id']}").stdout.strip()
    vm.run("echo later > /tank/a/later")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    (run,) = runs(vm)
    assert run["outcome"] == "completed"
    (backup,) = backups(vm)
    taken = vm.run(f"date -u -d @{moment} +%Y-%m-%dT%H:%M:%S").stdout.strip()
    assert backup["time"].startswith(taken)
    assert "/tank/a/later" not in vm.run(restic_command("ls latest")).stdout
    assert leftovers(vm) == []


LOCKED = """
case "$*" in
  *backup*) if test -e /root/locked; then
      echo 'repository is already locked' >&2 && exit 11; fi ;;
esac
exec restic "$@"
"""


def test_trouble_is_retried(one: Machine) -> None:
    """A client that failed for trouble with its repository runs again, on the same snapshots."""
    vm = one
    wrapper = script(vm, "/root/wrapper", LOCKED.replace("echo 'rep", "rm /root/locked; echo 'rep"))
    vm.run("touch /root/locked")
    answer = atomtx(vm, "backup", "tank/a", "--client", "restic", "--command", wrapper)
    assert answer.status == 0, answer.output
    assert "again in 10 s" in answer.output
    (run,) = runs(vm)
    assert (run["outcome"], run["attempts"]) == ("completed", 2)
    assert len(backups(vm)) == 1
    assert leftovers(vm) == []


def test_moment_is_kept(one: Machine) -> None:
    """With --keep-for the moment outlives the retries: 6, and the next recover completes it."""
    vm = one
    wrapper = script(vm, "/root/wrapper", LOCKED)
    vm.run("touch /root/locked")
    command = ("backup", "tank/a", "--client", "restic", "--command", wrapper)
    answer = atomtx(vm, *command, "--retries", "0", "--keep-for", "1h")
    assert answer.status == 6, answer.output
    (run,) = runs(vm)
    assert (run["state"], run["outcome"]) == ("snapshotted", None)
    before = guids(vm)
    assert list(before) == [f"tank/a@atomtx-{run['id']}"]
    assert atomtx(vm, "recover").status == 6
    assert guids(vm) == before
    vm.run("rm /root/locked; echo later > /tank/a/later")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    (run,) = runs(vm)
    assert run["outcome"] == "completed"
    assert "/tank/a/later" not in vm.run(restic_command("ls latest")).stdout
    assert leftovers(vm) == []


def test_second_backup_of_a_job(one: Machine) -> None:
    """While a run of a job is at work another one exits 5; an interrupted one is settled first."""
    vm = one
    command = ("backup", "tank/a", "--command", script(vm, "/root/client", WAITS))
    with running(vm, *command) as first:
        until(vm, "test -e /tmp/ready")
        answer = atomtx(vm, *command)
        assert answer.status == 5, answer.output
        let_go(vm)
    assert first.result().status == 0, first.result().output
    assert [run["outcome"] for run in runs(vm)] == ["completed"]
    killed = atomtx(vm, *COPY_A, kill=stop_at("journal:mounted#1", "all"))
    assert killed.status == -9
    answer = atomtx(vm, *COPY_A)
    assert answer.status == 0, answer.output
    assert [run["outcome"] for run in runs(vm)] == ["completed"] * 3
    assert leftovers(vm) == []


HOOKED = (*COPY_A, "--quiesce", "true", "--thaw")  # what comes after the snapshot, before its hold


def test_destroyed_in_mid_run(one: Machine) -> None:
    """A snapshot that somebody destroys before it is held: nothing is copied, nothing is left."""
    vm = one
    thaw = script(vm, "/root/thaw", "zfs destroy $(zfs list -Ht snap -o name | grep @atomtx-)")
    answer = atomtx(vm, *HOOKED, thaw)
    assert answer.status == 1, answer.output
    assert "was not taken, or is gone already" in answer.output
    assert not is_copied(vm)
    assert leftovers(vm) == []


def test_exported_in_mid_run(one: Machine) -> None:
    """A pool that somebody exports before the hold: the run has failed, the rest waits for it."""
    vm = one
    answer = atomtx(vm, *HOOKED, script(vm, "/root/thaw", "zpool export tank"))
    assert answer.status == 1, answer.output
    assert "failed in" in answer.output
    assert "pool tank is not imported; something is left to clean up" in answer.output
    answer = atomtx(vm, "recover")
    assert answer.status == 6, answer.output
    assert "waits: pool tank is not imported" in answer.output
    vm.run("zpool import tank")
    answer = atomtx(vm, "recover")
    assert "nothing of it is left" in answer.output
    assert not is_copied(vm)
    assert leftovers(vm) == []


def test_export_under_a_client(one: Machine) -> None:
    """Who would export the pool in mid-read cannot, but has unmounted the files by then: failed."""
    vm = one
    client = script(vm, "/root/wrapper", f'{HOST} zpool export tank; exec {COPIER} "$@"')
    answer = atomtx(vm, "backup", "tank/a", "--command", client)
    assert answer.status == 1, answer.output
    assert "/tank/a was unmounted while the client read it" in answer.output
    assert vm.run("zpool list tank", check=False).status == 0
    assert leftovers(vm) == []


@pytest.mark.parametrize("layout", [(), ("--layout", "tree", "--root", "/root/tree")])
@pytest.mark.parametrize("killed", [False, True])
def test_renamed_in_mid_run(one: Machine, killed: bool, layout: tuple[str, ...]) -> None:
    """A dataset that is renamed in mid-run takes our snapshot along: it is found and removed."""
    vm = one
    wrapper = script(vm, "/root/wrapper", "exec nsenter -t 1 -m zfs rename -u tank/a tank/new\n")
    kill = stop_at("journal:unmounting#1", "all") if killed else None
    answer = atomtx(vm, "backup", "tank/a", *layout, "--command", wrapper, kill=kill)
    assert vm.run("zfs list tank/new", check=False).status == 0, answer.output
    if killed:
        assert answer.status == -9
        answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert leftovers(vm) == []

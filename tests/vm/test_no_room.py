"""Disks that are full, pools that are suspended, repositories that are gone."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.remote import atomtx, backups, restic_command, stop_at
from tests.vm.scene import (
    HOST,
    WAITS,
    Prepare,
    fill,
    kill_run,
    make_journal,
    running,
    runs,
    script,
    until,
)
from tests.vm.tank import leftovers, make_datasets

READY = "test -e /tmp/ready"
NO_ROOM = "no space left for the journal"


# -- a full pool -------------------------------------------------------------------------------

STATE = "/small/state"
ON_SMALL = {"ATOMTX_STATE_DIR": STATE}


def small_pool(vm: Machine) -> None:
    vm.run(
        "truncate -s 200M /tmp/disk && zpool create -O compression=off small /tmp/disk"
        " && for name in a b state; do zfs create small/$name; done"
        " && head -c 30M /dev/zero > /small/a/big && sync"
    )
    assert atomtx(vm, "recover", env=ON_SMALL).status == 0  # makes the journal


@pytest.fixture
def small(prepared: Prepare) -> Machine:
    """A machine with a pool of about 80 MB, the state directory on it, and 30 MB to back up."""
    return prepared("clean", small_pool)


def space(vm: Machine) -> int:
    return int(vm.run("zfs list -Hp -o available small").stdout)


def filling(then: str) -> str:
    """
    Return a client that fills the pool, so that only the snapshot's destruction makes room.

    The file that it frees first is pinned by the snapshot.
    """
    return f"{HOST} rm /small/a/big\n{HOST} sh -c '{fill('/small/b/fill')}'\n{then}"


@pytest.mark.parametrize("status", [0, pytest.param(7, marks=pytest.mark.full)])
def test_pool_filled(small: Machine, status: int) -> None:
    """
    The pool that holds the journal is filled to the last block while our snapshot pins more.

    Neither the runner nor the journal can write: the snapshot goes first, then the client's end is
    recorded as it was.
    """
    vm = small
    client = script(vm, "/root/client", filling(f"exit {status}"))
    answer = atomtx(vm, "backup", "small/a", "--command", client, env=ON_SMALL)
    assert answer.status == (1 if status else 0), answer.output
    assert "removing the snapshots first" in answer.output
    (run,) = runs(vm, ON_SMALL)
    assert run["state"] == "destroyed"
    assert run["outcome"] == ("failed" if status else "completed")
    assert leftovers(vm) == []
    assert space(vm) > 20_000_000


def test_pool_filled_and_killed(small: Machine) -> None:
    """
    All that is killed on a full pool: recover waits and says for what; --rollback makes room.

    Nothing could be recorded of the client's end, so nothing is said of it.
    """
    vm = small
    client = script(vm, "/root/client", filling(WAITS))
    with running(vm, "backup", "small/a", "--command", client, env=ON_SMALL) as answer:
        until(vm, READY)
        kill_run(vm, STATE)
    assert answer.result().status == -9
    answer2 = atomtx(vm, "recover", env=ON_SMALL)
    assert answer2.status == 6, answer2.output
    assert NO_ROOM in answer2.output
    assert "--rollback" in answer2.output
    answer2 = atomtx(vm, "recover", "--rollback", env=ON_SMALL)
    assert answer2.status == 0, answer2.output
    (run,) = runs(vm, ON_SMALL)
    assert (run["state"], run["outcome"]) == ("destroyed", "rolled-back")
    assert leftovers(vm) == []


def test_no_room_for_a_snapshot(small: Machine) -> None:
    """A refreservation that leaves no room for a snapshot: said, with what to do; nothing left."""
    vm = small
    vm.run(f"zfs set refreservation=40M small/a; {fill('/small/b/fill')}", timeout=300)
    answer = atomtx(vm, "backup", "small/a", "--command", "true")
    assert answer.status == 1, answer.output
    assert "out of space" in answer.output
    assert "refreservation" in answer.output
    (run,) = runs(vm)
    assert (run["state"], run["outcome"]) == ("destroyed", "failed")
    assert leftovers(vm) == []


# -- a full disk of the journal's own ----------------------------------------------------------

DISK = "/srv/state"
ON_DISK = {"ATOMTX_STATE_DIR": f"{DISK}/atomtx"}


def state_on_ext4(vm: Machine) -> None:
    make_datasets(vm, "tank/a")
    vm.run(
        f"echo x > /tank/a/x; mkdir {DISK}; truncate -s 8M /tmp/ext4"
        f" && mkfs.ext4 -q -m 0 /tmp/ext4 && mount -o loop /tmp/ext4 {DISK}"
    )


@pytest.fixture
def ext4(prepared: Prepare) -> Machine:
    """A machine with a dataset, and an ext4 of its own for the state directory."""
    return prepared("tank", state_on_ext4)


def machine_as_it_is(vm: Machine) -> str:
    return vm.run(
        f"zfs list -H -t all -o name; zpool history -i | wc -l; ls {DISK}/atomtx/runs"
    ).stdout


@pytest.mark.parametrize("first", [True, False])
def test_disk_full_at_first(ext4: Machine, first: bool) -> None:
    """A disk that is full from the start is told, and nothing is changed, on the first run too."""
    vm = ext4
    if first:
        vm.run(f"mkdir -p {DISK}/atomtx/runs")
    else:
        assert atomtx(vm, "backup", "tank/a", "--command", "true", env=ON_DISK).status == 0
    vm.run(fill(f"{DISK}/fill"))
    before = machine_as_it_is(vm)
    answer = atomtx(vm, "backup", "tank/a", "--command", "true", env=ON_DISK)
    assert answer.status == 1, answer.output
    assert "no space left" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert machine_as_it_is(vm) == before
    vm.run(f"rm {DISK}/fill.*")
    answer = atomtx(vm, "backup", "tank/a", "--command", "true", env=ON_DISK)
    assert answer.status == 0, answer.output


def test_disk_full_in_the_middle(ext4: Machine) -> None:
    """A disk that is full once the snapshot is taken: given up, and nothing of it is left."""
    vm = ext4
    vm.run("mv /usr/sbin/zfs /usr/sbin/zfs.real")
    wrapper = f'zfs.real "$@" || exit\nif [ "$1" = snapshot ]; then {fill(f"{DISK}/fill")}; fi'
    script(vm, "/usr/sbin/zfs", wrapper)
    answer = atomtx(vm, "backup", "tank/a", "--command", "true", env=ON_DISK)
    assert answer.status == 1, answer.output
    assert "Traceback" not in answer.stderr
    assert leftovers(vm) == []
    assert "No space left on device" in answer.output
    vm.run(f"rm {DISK}/fill.*; mv /usr/sbin/zfs.real /usr/sbin/zfs")
    assert atomtx(vm, "recover", env=ON_DISK).status == 0
    (run,) = runs(vm, ON_DISK)
    assert (run["state"], run["outcome"]) == ("destroyed", "failed")


def test_disk_full_at_last(ext4: Machine) -> None:
    """A disk that is full when the client ends: its end is kept, and nothing is left."""
    vm = ext4
    client = script(vm, "/root/client", f"{HOST} sh -c '{fill(f'{DISK}/fill')}'; exit 0")
    answer = atomtx(vm, "backup", "tank/a", "--command", client, env=ON_DISK)
    assert answer.status == 0, answer.output  # its room was reserved before it started
    assert "Traceback" not in answer.stderr
    assert leftovers(vm) == []
    vm.run(f"rm {DISK}/fill.*")
    assert atomtx(vm, "recover", env=ON_DISK).status == 0
    (run,) = runs(vm, ON_DISK)
    assert (run["state"], run["outcome"]) == ("destroyed", "completed")


# -- a pool that is suspended ------------------------------------------------------------------


def faulty_disk(vm: Machine) -> None:
    vm.run(
        "modprobe scsi_debug dev_size_mb=200 && udevadm settle && zpool create tank /dev/sda"
        " && zfs create tank/a && echo x > /tank/a/x && sync"
    )
    make_journal(vm)


@pytest.fixture
def faulty(prepared: Prepare) -> Machine:
    """A machine with a pool `tank` on a disk that can be switched off."""
    return prepared("clean", faulty_disk)


def switch(vm: Machine, state: str) -> None:
    vm.run(f"echo {state} > /sys/block/sda/device/state")


def suspend(vm: Machine) -> None:
    """Let the disk fail under a write."""
    switch(vm, "offline")
    vm.run("(echo y > /tank/a/y; sync) >/dev/null 2>&1 </dev/null &")
    until(vm, "zpool list -H -o health tank | grep -q SUSPENDED")


@pytest.mark.parametrize("at", ["mounted", "unmounting"])
def test_suspended(faulty: Machine, at: str) -> None:
    """Where the pool is suspended recover waits and says `zpool clear`; after it, it completes."""
    vm = faulty
    client = script(vm, "/root/client", "exec cat /tank/a/x")
    command = ("backup", "tank/a", "--command", client)
    answer = atomtx(vm, *command, kill=stop_at(f"journal:{at}#1", "all"))
    assert answer.status == -9, answer.output
    suspend(vm)
    for words in (("recover",), ("recover", "--rollback"), command):
        answer = atomtx(vm, *words)
        assert answer.status == (2 if words is command else 6), answer.output
        assert "suspended" in answer.output
        assert "`zpool clear tank`" in answer.output
    answer = atomtx(vm, "recover", "--scan")
    assert answer.status == 0, answer.output
    switch(vm, "running")
    vm.run("zpool clear tank")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    (run,) = runs(vm)
    assert (run["state"], run["outcome"]) == ("destroyed", "completed")
    assert leftovers(vm) == []


@pytest.mark.full
def test_suspended_under_a_client(faulty: Machine) -> None:
    """
    A client that hangs in a suspended pool hears no signal: recover waits for the pool, not for it.

    After `zpool clear` it is ended, and the client runs again.
    """
    vm = faulty
    vm.run("zfs set primarycache=metadata tank/a; head -c 1M /dev/urandom > /tank/a/big; sync")
    client = script(vm, "/root/client", f"{WAITS}\nexec cat /tank/a/big")
    with running(vm, "backup", "tank/a", "--command", client) as answer:
        until(vm, READY)
        suspend(vm)
        vm.run("touch /tmp/go")
        until(vm, "grep -q '^State:.D' /proc/$(pgrep -x cat)/status")
        kill_run(vm)
    assert answer.result().status == -9
    assert vm.run("pgrep -x cat", check=False).status == 0
    again = atomtx(vm, "recover")
    assert again.status == 6, again.output
    assert "suspended: `zpool clear tank`" in again.output
    switch(vm, "running")
    vm.run("zpool clear tank")
    again = atomtx(vm, "recover")
    assert again.status == 0, again.output
    (run,) = runs(vm)
    assert (run["outcome"], run["attempts"]) == ("completed", 2)
    assert leftovers(vm) == []


# -- a repository that is gone -----------------------------------------------------------------


def small_repository(vm: Machine) -> None:
    make_datasets(vm, "tank/a")
    vm.run(
        "head -c 8M /dev/urandom > /tank/a/big; mkdir /srv/repo; truncate -s 24M /tmp/ext4"
        " && mkfs.ext4 -q -m 0 -e remount-ro /tmp/ext4 && mount -o loop /tmp/ext4 /srv/repo"
    )
    vm.run(restic_command("init"))
    make_journal(vm)


@pytest.fixture
def repository(prepared: Prepare) -> Machine:
    """A machine with 8 MB to back up, and a repository on a small disk of its own."""
    return prepared("tank", small_repository)


def test_repository_full(repository: Machine) -> None:
    """A repository that is full in mid-run: with --keep-for the moment waits for room."""
    vm = repository
    vm.run("head -c 14M /dev/zero > /srv/repo/ballast")
    answer = atomtx(vm, "backup", "tank/a", "--retries", "0", "--keep-for", "1h")
    assert answer.status == 6, answer.output
    assert "no space left on device" in answer.output
    before = vm.run("zfs list -H -t snapshot -o name").stdout.strip()
    vm.run("rm /srv/repo/ballast; echo later > /tank/a/later")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    (run,) = runs(vm)
    assert (run["outcome"], run["attempts"]) == ("completed", 2)
    assert before == f"tank/a@atomtx-{run['id']}"
    assert "later" not in vm.run(restic_command("ls latest")).stdout
    assert leftovers(vm) == []


def test_repository_unreachable(repository: Machine) -> None:
    """
    A repository that fails in mid-run: restic tries on for a quarter of an hour; a limit ends that.

    Not even its lock can it remove: so it is killed after the grace.
    """
    vm = repository
    options = ("--retries", "0", "--time-limit", "20s", "--grace", "5s")
    with running(vm, "backup", "tank/a", *options, "--", "--limit-upload", "500") as answer:
        until(vm, "ls /srv/repo/data/*/* 2>/dev/null | grep -q .")
        vm.run("echo 1 > /sys/fs/ext4/loop0/trigger_fs_error")  # it is read-only from now on
    said = answer.result()
    assert said.status == 1, said.output
    (run,) = runs(vm)
    assert run["outcome"] == "failed"
    assert "did not end within 20s: killed" in said.output
    assert leftovers(vm) == []
    vm.run("umount /srv/repo && mount -o loop /tmp/ext4 /srv/repo")
    assert backups(vm) == []

"""Clients that hang or are killed, busy snapshots, signals, clocks: what a run does then."""

from __future__ import annotations

import time

import pytest

from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.remote import ENV, atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import WAITS, Prepare, let_go, make_journal, running, script, until
from tests.vm.tank import fill, leftovers, make_datasets, make_pool

READY = "test -e /tmp/ready"


def one_dataset(vm: Machine) -> None:
    make_datasets(vm, "tank/a")
    fill(vm, "/tank/a", files=2, size_bytes=1000)
    make_journal(vm)
    script(vm, "/root/client", WAITS)


@pytest.fixture
def one(prepared: Prepare) -> Machine:
    """The machine with one dataset, and a client that waits."""
    return prepared("tank", one_dataset)


COMMAND = ("backup", "tank/a", "--command", "/root/client")


# -- the client --------------------------------------------------------------------------------


def test_killed_command(one: Machine) -> None:
    """A command of the user's that is killed by SIGKILL has failed: said, cleaned, not repeated."""
    vm = one
    with running(vm, *COMMAND) as answer:
        until(vm, READY)
        vm.run("pkill -KILL -f /root/clien[t]")
    assert answer.result().status == 1, answer.result().output
    assert "killed by SIGKILL" in answer.result().output
    (run,) = runs(vm)
    assert (run["outcome"], run["attempts"]) == ("failed", 1)
    assert leftovers(vm) == []


def test_killed_restic(one: Machine) -> None:
    """restic that is killed by SIGKILL in its middle is mended and runs again: one backup."""
    vm = one
    vm.run(restic_command("init"))
    fill(vm, "/tank/a", files=3, size_bytes=1_000_000)
    with running(vm, "backup", "tank/a", "--", "--limit-upload", "500") as answer:
        until(vm, "ls /srv/repo/data/*/* 2>/dev/null | grep -q . && pgrep -f 'restic backu[p]'")
        vm.run("pkill -KILL -x restic")
    assert answer.result().status == 0, answer.result().output
    assert "killed by SIGKILL; again in 10 s" in answer.result().output
    assert "restic unlock: done" in answer.result().output
    (run,) = runs(vm)
    assert (run["outcome"], run["attempts"]) == ("completed", 2)
    assert len(backups(vm)) == 1
    assert vm.run(restic_command("list locks --no-lock")).stdout == ""
    assert leftovers(vm) == []


def test_hung_client(one: Machine) -> None:
    """A client that hangs, deaf to SIGTERM, is stopped at its limit and killed after the grace."""
    vm = one
    script(vm, "/root/client", "trap '' TERM\nwhile :; do sleep 1; done")
    answer = atomtx(vm, *COMMAND, "--time-limit", "3s", "--grace", "2s", "--keep-for", "1h")
    assert answer.status == 1, answer.output
    assert "did not end within 3s: killed" in answer.output
    (run,) = runs(vm)
    assert (run["outcome"], run["reason"]) == ("failed", "did not end within 3s: killed")
    assert vm.run("pgrep -f /root/clien[t]", check=False).status == 1
    assert leftovers(vm) == []


def test_time_limit_after_a_crash(one: Machine) -> None:
    """The limit is the run's: a resumed client has it as well."""
    vm = one
    kill = stop_at("journal:mounted#1", "all")
    answer = atomtx(vm, *COMMAND, "--time-limit", "3s", kill=kill)
    assert answer.status == -9, answer.output
    answer = atomtx(vm, "recover")
    assert answer.status == 1, answer.output
    assert "did not end within 3s: stopped" in answer.output
    assert leftovers(vm) == []


# -- a busy snapshot ---------------------------------------------------------------------------


def test_busy_holders(one: Machine) -> None:
    """
    Whatever keeps a snapshot busy is named: processes by pid, command and path; exit status 4.

    An open file through `.zfs/snapshot`, one in a namespace of its own, a hold and a clone.  A new
    backup is not blocked, and once they are gone recover clears the parked one.
    """
    vm = one
    with running(vm, *COMMAND) as answer:
        until(vm, READY)
        name = vm.run("zfs list -H -t snapshot -o name").stdout.strip()
        path = "/tank/a/.zfs/snapshot/" + name.partition("@")[2]
        script(
            vm,
            "/root/theirs",
            f"mount -i -t zfs {name} /mnt\nexec 5</mnt/file-aaaa\nexec sleep 1000",
        )
        vm.run(
            f"setsid tail -f {path}/file-aaab >/dev/null 2>&1 </dev/null &"
            " setsid unshare -m --propagation private /root/theirs >/dev/null 2>&1 </dev/null &"
            f" zfs hold keep {name}; zfs clone {name} tank/clone"
        )
        until(vm, "pgrep -x tail && pgrep -f 'sleep 100[0]'")  # it has mounted, then
        tail = vm.run("pgrep -x tail -n").stdout.strip()
        sleep = vm.run("pgrep -f 'sleep 100[0]'").stdout.strip()
        let_go(vm)
    said = answer.result().output
    assert answer.result().status == 4, said
    assert f"open by {tail} (tail) at {path}/file-aaab" in said
    assert f"open by {sleep} (sleep) at /mnt/file-aaaa" in said
    assert f"mounted at {path}" in said
    assert f"/mnt (in the namespace of {sleep} (sleep))" in said
    assert f"hold keep on {name}" in said
    assert "cloned as tank/clone" in said
    assert runs(vm)[0]["cleanup"] == "parked"
    answer2 = atomtx(vm, "backup", "tank/a", "--command", "true")
    assert answer2.status == 0, answer2.output
    vm.run(f"kill {tail} {sleep}; zfs release keep {name}; zfs destroy tank/clone")
    answer2 = atomtx(vm, "recover")
    assert answer2.status == 0, answer2.output
    assert leftovers(vm) == []
    assert [run["outcome"] for run in runs(vm)] == ["completed"] * 2


# -- others ------------------------------------------------------------------------------------


def test_wait_for_others(one: Machine) -> None:
    """Of several backups of a job at once, each with --wait has its turn; none is busy."""
    vm = one
    command = (*COMMAND, "--wait")
    with running(vm, *command) as a, running(vm, *command) as b, running(vm, *command) as c:
        until(vm, READY)
        let_go(vm)
    answers = [a.result(), b.result(), c.result()]
    assert [answer.status for answer in answers] == [0, 0, 0], answers
    assert any("waiting for its end" in answer.output for answer in answers)
    assert [run["outcome"] for run in runs(vm)] == ["completed"] * 3
    assert leftovers(vm) == []


def test_copied_journal(one: Machine) -> None:
    """A journal that was copied to another machine is refused, and nothing there is changed."""
    vm = one
    answer = atomtx(vm, *COMMAND, kill=stop_at("journal:mounted#1", "all"))
    assert answer.status == -9
    vm.run("systemd-id128 new > /root/id && mount --bind /root/id /etc/machine-id")
    before = vm.run("zfs list -H -t all -o name; zpool history -i | wc -l").stdout
    for command in (("recover",), ("recover", "--rollback"), COMMAND):
        answer = atomtx(vm, *command)
        assert answer.status == 1, answer.output
        assert "was written on another machine" in answer.output
    assert vm.run("zfs list -H -t all -o name; zpool history -i | wc -l").stdout == before
    vm.run("umount /etc/machine-id")
    assert atomtx(vm, "recover", "--rollback").status == 0
    assert leftovers(vm) == []


def test_private_host(one: Machine) -> None:
    """Where the host's mounts are private, a run does not pin a pool that it has no use for."""
    vm = one
    # A mountpoint that zpool made would go at the export, and take the run's mount along.
    vm.run("mount --make-rprivate /")
    make_pool(vm, "other", DATA_DISKS[1], "-m /srv/other")
    # Not by --command: what a command of the user's own needs is not known.
    waits = f'if [ "$1" = backup ]; then {WAITS}; fi'
    vm.run("mkdir /root/bin")
    script(vm, "/root/bin/restic", f'{waits}\nexec /usr/bin/restic "$@"')
    vm.run(restic_command("init"))
    env = {"PATH": f"/root/bin:{ENV['PATH']}"}
    with running(vm, "backup", "tank/a", env=env) as answer:
        until(vm, READY)
        vm.run("zpool export other")
        let_go(vm)
    assert answer.result().status == 0, answer.result().output
    assert leftovers(vm) == []


def test_key_unloaded(one: Machine) -> None:
    """Where the key of a dataset is not loaded, recover waits and names it, then completes."""
    vm = one
    vm.run(
        "printf 'correct horse\\n' > /root/key; zfs create -o encryption=on"
        " -o keyformat=passphrase -o keylocation=file:///root/key tank/enc; echo x > /tank/enc/x"
    )
    script(vm, "/root/client", "exec cat /tank/enc/x")
    command = ("backup", "tank/enc", "--command", "/root/client")
    answer = atomtx(vm, *command, kill=stop_at("journal:mounted#1", "all"))
    assert answer.status == -9, answer.output
    vm.run("zfs unmount tank/enc && zfs unload-key tank/enc")
    answer = atomtx(vm, "recover")
    assert answer.status == 6, answer.output
    assert "the key of tank/enc is not loaded: `zfs load-key tank/enc`" in answer.output
    vm.run("zfs load-key tank/enc")
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert runs(vm)[0]["outcome"] == "completed"
    assert leftovers(vm) == []


# -- signals and clocks ------------------------------------------------------------------------


def test_process_group(one: Machine) -> None:
    """SIGTERM to the whole group of the front end, as a service gets it: 143, all undone."""
    vm = one
    with running(vm, *COMMAND, started=True) as answer:
        until(vm, READY)
        (pid,) = vm.run("fuser /var/lib/atomtx/runs/*/front.lock 2>/dev/null").stdout.split()
        vm.run(f"kill -TERM -- -{pid}")
    assert answer.result().status == 143, answer.result().output
    (run,) = runs(vm)
    assert run["outcome"] == "rolled-back"
    assert vm.run("pgrep -f /root/clien[t]", check=False).status == 1
    assert leftovers(vm) == []


def test_closed_terminal(one: Machine) -> None:
    """When the terminal closes the run goes on, and completes."""
    vm = one
    vm.run(
        "setsid script -qec 'atomtx backup tank/a --command /root/client' /dev/null"
        " >/dev/null 2>&1 </dev/null &"
    )
    until(vm, READY)
    vm.run("pkill -KILL -x script; sleep 1")
    (run,) = runs(vm)
    assert run["state"] == "backing-up"
    let_go(vm)
    until(vm, "! pgrep -f atomtx.runne[r] && ! pgrep -f 'atomtx backu[p]'")
    (run,) = runs(vm)
    assert (run["state"], run["outcome"]) == ("destroyed", "completed")
    assert leftovers(vm) == []


def test_suspend_and_clock(one: Machine) -> None:
    """
    A machine that stood still, and a clock that jumps by hours, disturb no run.

    No time limit strikes for them: it is of a clock that nobody sets.
    """
    vm = one
    with running(vm, *COMMAND, "--time-limit", "10m", started=True) as answer:
        until(vm, READY)
        vm._monitor("stop")
        time.sleep(3)
        vm._monitor("cont")
        vm.run("date -s '+5 hours'; sleep 2; date -s '-9 hours'; sleep 2")
        let_go(vm)
    assert answer.result().status == 0, answer.result().output
    (run,) = runs(vm)
    assert (run["outcome"], run["attempts"]) == ("completed", 1)
    assert leftovers(vm) == []

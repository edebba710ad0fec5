"""The main job on real ZFS with real restic, as a user runs it."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.vm.machine import Machine
from tests.vm.remote import atomtx, backups, restic_command, runs, stop_at
from tests.vm.scene import Prepare, make_journal
from tests.vm.tank import fill, leftovers, make_datasets

WRITER = r"""
import os, sys
files = [os.open(f"/tank/m/d{i:02}/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND) for i in range(20)]
n = 0
while not os.path.exists("/tmp/stop"):
    os.write(files[n % 20], b"%d\n" % n)
    os.fsync(files[n % 20])
    n += 1
"""


def two_datasets(vm: Machine) -> None:
    vm.run(restic_command("init"))
    make_datasets(vm, "tank/a", "tank/b")
    fill(vm, "/tank/a", files=2, size_bytes=1000)
    make_journal(vm)


@pytest.fixture
def two(prepared: Prepare) -> Machine:
    """The machine with two datasets, and an empty restic repository outside the pool."""
    return prepared("tank", two_datasets)


def many_datasets(vm: Machine) -> None:
    vm.run(restic_command("init"))
    make_datasets(vm, "tank/m", *(f"tank/m/d{i:02}" for i in range(20)))
    make_journal(vm)


@pytest.fixture
def many(prepared: Prepare) -> Machine:
    """The machine with 21 datasets, and an empty restic repository outside the pool."""
    return prepared("tank", many_datasets)


def restore(vm: Machine, backup_id: str = "latest", restic: str = "restic") -> None:
    vm.run(
        "rm -rf /tmp/r && "
        + restic_command(f"restore {backup_id} --target /tmp/r", restic)
        + " >/dev/null",
        timeout=600,
    )


def test_one_moment(many: Machine) -> None:
    """
    Twenty datasets under a writer are backed up as of one instant (promise 8).

    The restored set is a prefix of what was written, in the writer's order.
    """
    vm = many
    vm.run(f"cat > /root/writer.py <<'END'\n{WRITER}\nEND\nrm -f /tmp/stop")
    vm.run("setsid python3 /root/writer.py >/dev/null 2>&1 </dev/null & sleep 3")
    answer = atomtx(vm, "backup", "-r", "tank/m")
    vm.run("touch /tmp/stop")
    assert answer.status == 0, answer.output
    assert leftovers(vm) == []
    shown = json.loads(atomtx(vm, "show", "--json", runs(vm)[0]["id"]).stdout)
    assert len({volume["createtxg"] for volume in shown["volumes"]}) == 1
    assert len(shown["volumes"]) == 21
    restore(vm)
    text = vm.run("cat /tmp/r/tank/m/*/log").stdout
    numbers = sorted(map(int, text.split()))
    assert len(numbers) > 40
    assert numbers == list(range(len(numbers)))


def test_processes_do_not_grow(many: Machine) -> None:
    """A run over 21 datasets starts as many `zfs` processes, and commits, as one over one."""
    vm = many
    for name in ("tank/m", "tank/m/d00"):
        fill(vm, f"/{name}", files=1, size_bytes=100)
    one = atomtx(vm, "backup", "tank/m/d00", started=True)
    all_ = atomtx(vm, "backup", "-r", "tank/m", started=True)
    assert one.status == all_.status == 0, one.output + all_.output
    assert one.points == all_.points
    assert len([p for p in all_.points if p.startswith("start:z")]) == 7


@pytest.mark.parametrize(
    ("state", "signal", "status"),
    [
        ("planned", 2, 130),
        ("snapshotted", 15, 143),
        pytest.param("mounted", 2, 130, marks=pytest.mark.full),
        ("backing-up", 2, 130),
        ("backing-up", 15, 143),
    ],
)
def test_interrupted(two: Machine, state: str, signal: int, status: int) -> None:
    """SIGINT and SIGTERM are compensated at once: 130 or 143, and nothing is left."""
    vm = two
    vm.run("printf '#!/bin/sh\nsleep 300\n' > /root/slow && chmod 755 /root/slow")
    kill = stop_at(f"journal:{state}#1", f"signal {signal}", delay_s=3 * (state == "backing-up"))
    answer = atomtx(vm, "backup", "tank/a", "--command", "/root/slow", kill=kill)
    assert answer.status == status, answer.output
    assert leftovers(vm) == []
    (run,) = runs(vm)
    assert (run["state"], run["outcome"]) == ("destroyed", "rolled-back")
    assert vm.run("pgrep -f /root/slow", check=False).status == 1


def test_inside_the_set(vm: Machine) -> None:
    """A repository and a cache inside the set stay usable, and are left out of the backup."""
    make_datasets(vm, "tank/home")
    fill(vm, "/tank/home", files=2, size_bytes=1000)
    env = {"RESTIC_REPOSITORY": "/tank/home/repo", "RESTIC_CACHE_DIR": "/tank/home/cache"}
    words = " ".join(f"{k}={v}" for k, v in env.items())
    vm.run(f"{words} RESTIC_PASSWORD='correct horse' restic init")
    answer = atomtx(vm, "backup", "tank/home", env=env)
    assert answer.status == 0, answer.output
    assert "/tank/home/repo is not in the backup" in answer.output
    listed = vm.run(f"{words} RESTIC_PASSWORD='correct horse' restic ls latest").stdout
    assert "/tank/home/file-aaaa" in listed
    assert "/tank/home/repo" not in listed
    assert "/tank/home/cache" not in listed
    assert leftovers(vm) == []


def test_keep_snapshots(two: Machine) -> None:
    """With --keep-snapshots the mark changes from run to kept, and recover lets them be."""
    vm = two
    answer = atomtx(vm, "backup", "tank/a", "tank/b", "--keep-snapshots")
    assert answer.status == 0, answer.output
    run = runs(vm)[0]["id"]
    marks = vm.run(
        "zfs get -Hp -t snapshot -r -o name,property,value,source atomtx:run,atomtx:kept tank"
    )
    for name in ("tank/a", "tank/b"):
        assert f"{name}@atomtx-{run}\tatomtx:kept\t{run}\tlocal" in marks.stdout
        assert f"{name}@atomtx-{run}\tatomtx:run\t-\t-" in marks.stdout
    assert vm.run("zfs list -H -t snapshot -o name | xargs zfs holds -H").stdout == ""
    assert "nothing to recover" in atomtx(vm, "recover").output
    assert len(vm.run("zfs list -H -t snapshot -o name").stdout.split()) == 2


def test_dry_run_changes_nothing(two: Machine) -> None:
    """--dry-run prints each step with its undo, and leaves no journal behind (promise 12)."""
    vm = two
    vm.run("rm -r /var/lib/atomtx /run/atomtx")
    answer = atomtx(vm, "backup", "-n", "tank/a")
    assert answer.status == 0, answer.output
    assert "snapshot 1 dataset of pool tank in one transaction" in answer.stdout
    assert "undo: destroy 1 snapshot of pool tank" in answer.stdout
    assert vm.run("test -e /var/lib/atomtx/journal.db", check=False).status == 1


def test_json(two: Machine) -> None:
    """With --json standard output is JSON lines, the last one the end, with the backup's id."""
    vm = two
    answer = atomtx(vm, "backup", "tank/a", "--json")
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    (result,) = [line for line in lines if line["message_type"] == "result"]
    assert result["outcome"] == "completed"
    assert result["backups"][0]["backup_id"] == backups(vm)[0]["id"]
    assert answer.stderr == ""


def test_show_restores(two: Machine) -> None:
    """`show` prints the command that restores, and it does."""
    vm = two
    assert atomtx(vm, "backup", "tank/a").status == 0
    shown = atomtx(vm, "show", runs(vm)[0]["id"][:6])
    assert shown.status == 0, shown.output
    (line,) = [line for line in shown.stdout.splitlines() if "restic restore" in line]
    words = shlex.split(line.strip().removeprefix("restore:").strip())
    words[words.index("--target") + 1] = "/tmp/r2"
    vm.run(f"RESTIC_REPOSITORY=/srv/repo RESTIC_PASSWORD='correct horse' {shlex.join(words)}")
    assert vm.run("diff -r /tank/a /tmp/r2/tank/a").status == 0


def test_root_on_zfs(two: Machine) -> None:
    """
    A set with the dataset mounted at `/` is read whole, with the live system left out.

    The machine's own root is ext4: a small one on ZFS is made, and entered in a namespace.
    """
    vm = two
    make_datasets(vm, "tank/root", "tank/root/home", options="-o compression=off -o checksum=off")
    libraries = "usr/lib/x86_64-linux-gnu"
    vm.run(
        "set -e; cd /tank/root; mkdir -p dev proc sys run tmp var/lib srv root etc usr/lib;"
        " cp -a /usr/sbin /usr/lib64 usr; cp -a /usr/lib/python3* usr/lib;"
        f" mkdir usr/bin {libraries}; cd /usr/bin;"
        " cp -a sh dash cat grep env mount umount rmdir python3* restic /tank/root/usr/bin;"
        f" cd /{libraries}; cp -a $(ls -d *.so *.so.* | grep -v san.so) /tank/root/{libraries};"
        " cd /tank/root;"
        " ln -s usr/bin usr/sbin . ;"
        " ln -s usr/lib usr/lib64 . ;"
        " cp -a /etc/passwd /etc/group /etc/machine-id etc/; cp -a /venv .;"
        " cp -a /srv/repo srv/; echo hello > home/greeting; sync",
        timeout=900,
    )
    answer = vm.run(
        "cat > /root/enter.sh <<'END'\n"
        "set -e\n"
        "mount --make-rprivate /\n"
        "mkdir -p /new; zfs unmount tank/root/home; zfs unmount tank/root\n"
        "mount -i -t zfs tank/root /new; mount -i -t zfs tank/root/home /new/home\n"
        "for d in dev proc sys run; do mount --rbind /$d /new/$d; done\n"
        "cd /new; mkdir -p old; pivot_root . old; cd /; umount -l /old; rmdir /old\n"
        "export RESTIC_REPOSITORY=/srv/repo RESTIC_PASSWORD='correct horse' HOME=/root\n"
        "/venv/bin/python -m atomtx backup -r tank/root -- --exclude /usr --exclude /venv;"
        " echo status=$?\n"
        "restic ls latest > /run/listed; echo restic=$?\n"
        "cat /proc/self/mountinfo | grep -c @atomtx- || true\n"
        "END\nunshare -m sh /root/enter.sh 2>&1",
        timeout=900,
    )
    assert "status=0" in answer.stdout, answer.stdout
    listed = vm.run("cat /run/listed").stdout
    assert "/home/greeting" in listed
    assert "/etc/passwd" in listed
    for live in ("/proc/", "/sys/", "/run/", "/srv/repo/config", "/dev/null"):
        assert f"\n{live}" not in listed
    assert leftovers(vm) == []

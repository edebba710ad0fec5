"""What docs/from-restomic.md says to those who come from restomic and kopiatomic."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.remote import atomtx, restic_command, runs
from tests.vm.scene import Prepare, make_journal, script
from tests.vm.tank import leftovers, make_pool
from tests.vm.test_clients import trace

PAGE = Path(__file__).parents[2] / "docs/from-restomic.md"
TREE = ("--layout", "tree", "--root", "/restic", "--whole-root")
FILES = 20


def old_and_new() -> list[tuple[str, str]]:
    """Return each line of the page's first table: the old command, the new one."""
    lines = re.findall(r"^\| `((?:restomic|kopiatomic).*?)` \| `(.+?)` \|$", PAGE.read_text(), re.M)
    assert len(lines) > 10
    return lines


def zroot(vm: Machine) -> None:
    """Make a pool as FreeBSD has it, repositories, and the wrappers of the scripts' pages."""
    make_pool(vm, "zroot", DATA_DISKS[1], "-O mountpoint=none")
    vm.run(
        "set -e;"
        " zfs create -o mountpoint=/usr -o canmount=off zroot/usr;"
        " zfs create zroot/usr/home; zfs create zroot/usr/home/ben; zfs create zroot/usr/src;"
        " for d in /usr/home /usr/home/ben /usr/src /tank; do"
        " head -c 50000 /dev/urandom | split -b 10000 - $d/file-; done",
        timeout=600,
    )
    script(vm, "/usr/local/bin/restic-myrepo", 'exec restic "$@"')
    script(vm, "/usr/local/bin/kopia-myrepo", 'exec kopia "$@"')
    script(vm, "/usr/local/bin/app", 'echo "$@" >> /root/app')
    make_journal(vm)
    vm.run(restic_command("init"))
    kopia = "KOPIA_PASSWORD='correct horse' kopia repository create filesystem --path /srv/kopia"
    vm.run(kopia, timeout=300)


@pytest.fixture
def freebsd_like(prepared: Prepare) -> Machine:
    return prepared("tank", zroot)


@pytest.mark.full
def test_each_command(freebsd_like: Machine) -> None:
    """Every command of the page does what its old one was meant to."""
    vm = freebsd_like
    for _, new in old_and_new():
        name, *words = shlex.split(new)
        assert name == "atomtx"
        before = runs(vm)
        answer = atomtx(vm, *words)
        assert answer.status == 0, f"{new}: {answer.output}"
        made = len(runs(vm)) - len(before)
        is_backup = words[0] == "backup" and not {"-n", "-h"} & set(words)
        assert made == is_backup, new
        assert not made or runs(vm)[0]["outcome"] == "completed", new
    assert vm.run("cat /root/app").stdout == "stop\nstart\n"
    assert "nightly" in vm.run(restic_command("snapshots --json")).stdout
    assert leftovers(vm) == []


def as_restomic(vm: Machine) -> None:
    """Back up as restomic does, with a bind mount for its nullfs."""
    vm.run(
        "set -e; zfs snapshot -r zroot/usr/home@restomic_1; umask 0077; mkdir /restic; umask 0022;"
        " for d in home home/ben; do mkdir -p /restic/usr/$d;"
        "  mount -t zfs zroot/usr/$d@restomic_1 /restic/usr/$d; done;"
        f" RESTIC_FEATURES=device-id-for-hardlinks {restic_command('backup /restic')};"
        " umount /restic/usr/home/ben /restic/usr/home;"
        " rm -r /restic; zfs destroy -r zroot/usr/home@restomic_1",
        timeout=600,
    )


@pytest.mark.parametrize(
    ("options", "first_reads"),
    [(TREE, 0), ((), FILES // 2), pytest.param(TREE[:-1], FILES // 2, marks=pytest.mark.full)],
)
def test_history_goes_on(freebsd_like: Machine, options: tuple[str, ...], first_reads: int) -> None:
    """With the root itself nothing of restomic's is read again; at other paths all is, once."""
    vm = freebsd_like
    as_restomic(vm)
    wrapper = trace(vm, "/usr/bin/restic")
    words = ("backup", *options, "-r", "zroot/usr/home", "--client", "restic", "-c", wrapper)
    for reads in (first_reads, 0):
        answer = atomtx(vm, *words)
        assert answer.status == 0, answer.output
        assert len(read(vm)) == reads, read(vm)
    assert leftovers(vm) == []


def read(vm: Machine) -> list[str]:
    """Return the files of the datasets that the traced client opened."""
    lines = vm.run("grep -h 'usr/home/' /root/trace || true", check=False).stdout.splitlines()
    opened = [line for line in lines if "O_DIRECTORY" not in line and " = -1 " not in line]
    return sorted({line.split('"')[1] for line in opened if "/file-" in line})


def test_directories_stay(freebsd_like: Machine) -> None:
    """With --leave-dirs the next run finds the directories of the tree as they were."""
    vm = freebsd_like
    above = "/restic /restic/usr /restic/usr/home"
    seen = []
    for _ in range(2):
        answer = atomtx(vm, "backup", *TREE, "--leave-dirs", "zroot/usr/home/ben")
        assert answer.status == 0, answer.output
        seen.append(vm.run(f"stat -c '%i %Z %n' {above}").stdout)
    assert seen[0] == seen[1]
    assert vm.run("ls -A /restic/usr/home/ben").stdout == ""
    assert leftovers(vm) == []

"""The virtual machine itself: what the other tests take for granted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.vm.machine import Machine, MachineError
from tests.vm.scene import WAITS, let_go, running, script, until
from tests.vm.tank import leftovers, make_datasets


def test_command(vm: Machine) -> None:
    """A command is a shell string as root; its input, outputs and exit status come back."""
    result = vm.run("id -u; cat; echo no >&2; exit 3", check=False, input="in\n")
    assert (result.status, result.stdout, result.stderr) == (3, "0\nin\n", "no\n")
    with pytest.raises(MachineError, match="exit status 1"):
        vm.run("false")


def test_files(vm: Machine, tmp_path: Path) -> None:
    """Files and folders are copied both ways, whatever their names."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "a 'file'").write_bytes(b"\0text")
    vm.put(folder, "/tmp/of mine")
    vm.get("/tmp/of mine", tmp_path / "back")
    assert (tmp_path / "back" / "a 'file'").read_bytes() == b"\0text"


def test_load(vm: Machine) -> None:
    """A saved state comes back whole, its clock is right, and the pool is as it was."""
    vm.run("zfs create tank/x && touch /etc/changed")
    vm.load("tank")
    assert vm.run("zfs list -H -o name").stdout == "tank\n"
    assert vm.run("test -e /etc/changed", check=False).status == 1
    assert abs(float(vm.run("date +%s.%N").stdout) - time.time()) < 5


@pytest.mark.full
def test_crash(vm: Machine) -> None:
    """After a crash and a boot what was flushed is there, and the pool can be imported."""
    vm.run("zfs create tank/x && echo kept >/tank/x/file && sync && zpool sync")
    vm.power_off_hard()
    vm.boot()
    assert vm.run("zpool list -H", check=False).stdout == ""
    vm.run("zpool import tank")
    assert vm.run("cat /tank/x/file").stdout == "kept\n"


def test_programs(vm: Machine) -> None:
    """Each client version that the tests name is there, and so is the program under test."""
    for version in ("0.14", "0.16", "0.18", "0.19"):
        assert f"restic {version}" in vm.run(f"/clients/restic-{version}* version").stdout
    assert vm.run("kopia --version").stdout
    assert vm.run("atomtx --version").stdout.startswith("atomtx ")


def test_leftovers(vm: Machine) -> None:
    """What a run leaves is seen: a snapshot, a hold, and a mount in any process's namespace."""
    make_datasets(vm, "tank/a b", "tank/c")
    assert leftovers(vm) == []
    vm.run(
        "zfs snapshot 'tank/a b@atomtx-1' tank/c@mine && zfs hold tag 'tank/a b@atomtx-1' &&"
        " (unshare -m sh -c 'mount -t zfs \"tank/a b@atomtx-1\" /mnt && exec sleep 60'"
        " >/dev/null 2>&1 </dev/null &) && sleep 3"
    )
    found = [line.split("\t")[0] for line in leftovers(vm)]
    assert found == [
        "snapshot tank/a b@atomtx-1",
        "hold tank/a b@atomtx-1",
        "mount tank/a\\040b@atomtx-1",
    ]
    assert leftovers(vm, foreign=["tank/a b@atomtx-1"]) == found[2:]
    vm.run("zfs hold atomtx-0123456789abcdef 'tank/a b@atomtx-1'")
    left = [line.split("\t")[:2] for line in leftovers(vm, foreign=["tank/a b@atomtx-1"])]
    assert ["hold tank/a b@atomtx-1", "atomtx-0123456789abcdef"] in left


@pytest.mark.parametrize("started", [False, True])
def test_runner_is_found(vm: Machine, started: bool) -> None:
    """A runner at work is seen as left over, forked or started, and no longer once it has ended."""
    make_datasets(vm, "tank/a")
    vm.run("echo x > /tank/a/x")
    words = ("backup", "tank/a", "--command", script(vm, "/root/client", WAITS))
    with running(vm, *words, started=started) as answer:
        until(vm, "test -e /tmp/ready")
        found = [line for line in leftovers(vm) if line.startswith("process ")]
        let_go(vm)
    assert answer.result().status == 0, answer.result().output
    assert len(found) == 1
    assert ("-m atomtx.runner" in found[0]) == started
    assert leftovers(vm) == []

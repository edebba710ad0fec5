"""A btrfs on several devices, and one beside its clone, as the kernel really has them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atomtx import btrfsio, lvmio
from atomtx.errors import UserError, WaitingError
from atomtx.mounts import mountinfo
from atomtx.recovery import Resume
from atomtx.volumes import btrfs, lvm
from tests.btrfs.conftest import Flat
from tests.btrfs.stage import SIZE_BYTES, Disk, Stage, call

Devices = Callable[[int], list[str]]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Yield where to mount; shared, as a `Disk` is, so that no other test's run pins it."""
    home = tmp_path / "shared"
    where = home / "mounted"
    where.mkdir(parents=True)
    call("mount", "--bind", home, home)
    call("mount", "--make-shared", home)
    yield where
    call("umount", "-R", home)


@pytest.fixture
def devices(tmp_path: Path, place: Path) -> Iterator[Devices]:
    """Yield what makes devices of files; they come in the order in which they are tried."""
    made: list[str] = []

    def make(count: int) -> list[str]:
        for n in range(count):
            image = tmp_path / f"image {n}"
            with open(image, "wb") as file:
                file.truncate(SIZE_BYTES)
            made.append(call("losetup", "-f", "--show", image).strip())
        return sorted(made)

    yield make
    subprocess.run(["umount", place], capture_output=True, check=False)
    for device in made:
        # Else the kernel takes what gets this loop device next for a part of the same file system.
        subprocess.run(["btrfs", "device", "scan", "--forget", device], check=False)
        call("losetup", "-d", device)


def test_dead_device(devices: Devices, place: Path) -> None:
    """A mirror of which the first disk has failed is used by the other."""
    first, second = devices(2)
    call("mkfs.btrfs", "-q", "-m", "raid1", "-d", "raid1", first, second)
    call("mount", first, place)
    uuid = call("findmnt", "-no", "UUID", place).strip()
    assert btrfsio.devices(uuid) == [first, second]
    image = call("losetup", "-nO", "BACK-FILE", first).strip()
    call("sync")
    with open(image, "r+b") as file:
        file.truncate(0)
    call("blockdev", "--flushbufs", first)
    assert btrfs.problem(uuid) is None


def test_seed(devices: Devices, place: Path) -> None:
    """One that grew from a seed is not reached by the seed."""
    seed, other = devices(2)
    call("mkfs.btrfs", "-q", seed)
    call("btrfstune", "-S", "1", seed)
    call("mount", seed, place)
    call("btrfs", "-q", "device", "add", "-f", other, place)
    call("mount", "-o", "remount,rw", place)
    uuid = call("btrfs", "filesystem", "show", place).partition("uuid: ")[2].split()[0]
    assert btrfsio.devices(uuid) == [seed, other]
    assert btrfs.problem(uuid) is None


def test_gone_beside_a_seed(devices: Devices, place: Path) -> None:
    """Of a subvolume that is gone it is told so, and not what the seed says that comes after."""
    other, seed = devices(2)
    call("mkfs.btrfs", "-q", seed)
    call("btrfstune", "-S", "1", seed)
    call("mount", seed, place)
    call("btrfs", "-q", "device", "add", "-f", other, place)
    call("mount", "-o", "remount,rw", place)
    uuid = call("btrfs", "filesystem", "show", place).partition("uuid: ")[2].split()[0]
    assert btrfsio.devices(uuid) == [other, seed]
    target = os.open(place, os.O_PATH)
    try:
        with pytest.raises(FileNotFoundError):
            btrfsio.mount_subvolume(uuid, "/gone", target, "")
    finally:
        os.close(target)


def test_all_dead(devices: Devices, place: Path) -> None:
    """Where no device leads to it, it is told why, and nothing of it counts as gone."""
    (only,) = devices(1)
    call("mkfs.btrfs", "-q", only)
    call("mount", only, place)
    uuid = call("findmnt", "-no", "UUID", place).strip()
    image = call("losetup", "-nO", "BACK-FILE", only).strip()
    call("sync")
    with open(image, "r+b") as file:
        file.truncate(0)
    call("blockdev", "--flushbufs", only)
    assert btrfs.problem(uuid) == f"the btrfs file system {uuid} cannot be used: Input/output error"


def test_devices_of_one(devices: Devices, place: Path) -> None:
    """Each device of a btrfs leads to where it is mounted, whichever the table of mounts names."""
    both = devices(2)
    call("mkfs.btrfs", "-q", *both)
    call("btrfs", "device", "scan", *both)
    call("mount", both[0], place)
    found = lvm._on_btrfs(mountinfo.read())
    numbers = [lvmio.number_of(device) for device in both]
    assert [found.get(number or "") for number in numbers] == [str(place), str(place)]


# -- clones ------------------------------------------------------------------------------------


def mounted_first(disk: Disk, place: Path, image: Path) -> None:
    """Have a clone mounted, and then the original, which gets a borrowed UUID."""
    disk.unmount_all()
    call("mount", "-o", "loop", image, place)
    disk.mount(disk.top, device=disk.image, options="loop")


def test_clone(stage: Stage, flat: Flat, disk: Disk, tmp_path: Path, place: Path) -> None:
    """Promise 2: what is not found on a clone that has the original's UUID now is not gone."""
    call("btrfs", "filesystem", "sync", disk.top)
    image = tmp_path / "clone"
    call("cp", "--sparse=always", disk.image, image)
    stage.backup(stage.plan_of(flat.root), at="journal:backing-up#1", who="all")
    mounted_first(disk, place, image)
    ended = stage.recover()
    assert isinstance(ended.raised, WaitingError)
    assert f"{disk.uuid} cannot be used: a clone of it is mounted" in ended.raised.message
    assert disk.left() != []
    disk.unmount_all()
    call("umount", place)
    disk.mount(disk.top, device=disk.image, options="loop")
    disk.device = call("findmnt", "-no", "SOURCE", disk.top).strip()
    disk.mount(flat.root, options="subvol=@")
    assert stage.recover().decisions == [Resume()]
    assert stage.left() == []


def test_plan_beside_clone(stage: Stage, disk: Disk, tmp_path: Path, place: Path) -> None:
    """No run begins whose file system would be another's by its UUID, or nobody's, afterwards."""
    for name in ("@", "@home"):
        disk.make(name)
    call("btrfs", "filesystem", "sync", disk.top)
    image = tmp_path / "clone"
    call("cp", "--sparse=always", disk.image, image)
    mounted_first(disk, place, image)
    for where, what in ((disk.top, "it is a clone of one"), (place, "a clone of it is mounted")):
        with pytest.raises(UserError, match=what) as caught:
            stage.plan_of(where)
        assert "btrfstune -u" in (caught.value.hint or "")

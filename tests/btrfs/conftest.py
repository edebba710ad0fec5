"""btrfs on files: missing root or tools are a failure, never a skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.btrfs.stage import Disk, Stage, call


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    assert os.geteuid() == 0, "btrfs on a loop device needs root"
    assert shutil.which("mkfs.btrfs"), "install btrfs-progs"
    assert "btrfs" in Path("/proc/filesystems").read_text() or not os.system("modprobe btrfs")
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


@pytest.fixture
def stage(tmp_path: Path, disk: Disk) -> Iterator[Stage]:
    made = Stage(tmp_path / "scene", disk)
    yield made
    made.close()


class Flat:
    """Two subvolumes beside each other, as distributions make them: @ with @home mounted in it."""

    def __init__(self, disk: Disk) -> None:
        for name in ("@", "@home"):
            (disk.make(name) / "file").write_text(f"frozen {name}")
        (disk.top / "@" / "home").mkdir()
        self.root = disk.mount(disk.home / "root", options="subvol=@")
        self.home = disk.mount(self.root / "home", options="subvol=@home")


class Nested:
    """A file system whose top level is mounted, with subvolumes in it; names have blanks."""

    def __init__(self, disk: Disk) -> None:
        self.data = disk.mount(disk.home / "my data", options="subvolid=5")
        for name in ("photos", "photos/of 2026", "a directory/deep"):
            (self.data / name).parent.mkdir(exist_ok=True)
            (disk.make(name) / "file").write_text(f"frozen {name}")
        (self.data / "file").write_text("frozen top")


class Boot:
    """An ext4 with an xfs mounted in it, on files, as /boot and the EFI partition lie."""

    def __init__(self, disk: Disk) -> None:
        self.image = self._image(disk, "ext4", 16, "-q")
        self.boot = disk.mount(disk.home / "the boot", options="loop", device=self.image)
        self.efi = disk.mount(
            self.boot / "efi", options="loop", device=self._image(disk, "xfs", 320, "-q")
        )
        (self.boot / "kernel").write_text("a kernel")
        (self.boot / "grub").mkdir()
        (self.boot / "grub" / "config").write_text("a configuration")
        (self.efi / "loader").write_text("a loader")

    def _image(self, disk: Disk, kind: str, size_mib: int, *options: str) -> Path:
        image = disk.home / f"image of {kind}"
        with open(image, "wb") as file:
            file.truncate(size_mib * 2**20)
        call(f"mkfs.{kind}", *options, image)
        return image


@pytest.fixture
def boot(disk: Disk) -> Boot:
    for kind in ("ext4", "xfs"):
        assert shutil.which(f"mkfs.{kind}"), "install e2fsprogs and xfsprogs"
    return Boot(disk)


@pytest.fixture
def flat(disk: Disk) -> Flat:
    return Flat(disk)


@pytest.fixture
def nested(disk: Disk) -> Nested:
    return Nested(disk)

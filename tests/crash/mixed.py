"""
What a stage has besides its datasets where a run takes volumes of every kind.

A volume group on a file with a classic and a thin volume, a btrfs on a file, and a directory that
is read live.  In each is the same file as in the datasets.

It runs in the machine with the program's own Python, beside stage.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LOOPS = ("pv", "btrfs")


class Mixed:
    """Volumes of a stage, below *home*; *number* makes their names its own."""

    def __init__(self, number: int, home: Path) -> None:
        self._home = home
        self._group = f"stage{number}"
        self._top = home / "top"  # of the btrfs
        self._disk = ""  # the device of the btrfs
        self.live = home / "live"
        self.frozen = [home / name for name in ("classic", "thin", "btrfs")]

    def build(self) -> None:
        """Make them; nothing of them is there."""
        for name, size in zip(_LOOPS, ("96M", "128M"), strict=True):
            _must("truncate", "-s", size, str(self._home / f"{name}.img"))
        device = _must("losetup", "-f", "--show", str(self._home / "pv.img")).strip()
        _must("vgcreate", "-q", "-s", "1M", self._group, device)
        _must("lvcreate", "-qy", "-L", "16M", "-n", "classic", self._group)
        _must("lvcreate", "-qy", "--type", "thin-pool", "-L", "32M", "-n", "pool", self._group)
        _must("lvcreate", "-qy", "-V", "16M", "--thinpool", "pool", "-n", "thin", self._group)
        self.live.mkdir()
        for path in self.frozen:
            path.mkdir()
        for path in self.frozen[:2]:
            _must("mkfs.ext4", "-q", f"/dev/{self._group}/{path.name}")
            _must("mount", f"/dev/{self._group}/{path.name}", str(path))
        image = self._home / "btrfs.img"
        _must("mkfs.btrfs", "-q", "--mixed", str(image))
        self._top.mkdir()
        self._disk = _must("losetup", "-f", "--show", str(image)).strip()
        _must("mount", self._disk, str(self._top))
        _must("btrfs", "-q", "subvolume", "create", f"{self._top}/sub")
        _must("mount", "-o", "subvol=sub", self._disk, str(self.frozen[2]))

    def tear_down(self) -> None:
        """Remove them by force, as far as they are there; they may be of a player before us."""
        images = [self._home / f"{name}.img" for name in _LOOPS]
        if not any(image.exists() for image in images):
            return
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if line.split()[4].startswith((f"{self._home}/", f"/dev/mapper/{self._group}-")):
                subprocess.run(["umount", "-l", line.split()[4]])
        subprocess.run(["vgremove", "-qfy", self._group], capture_output=True)
        for image in images:
            for device in _must("losetup", "-nO", "NAME", "-j", str(image)).split():
                _must("losetup", "-d", device)
        if Path("/dev", self._group).exists():
            _must("rm", "-r", f"/dev/{self._group}")

    def write(self, text: str) -> None:
        """Write new contents into every volume."""
        for path in (*self.frozen, self.live):
            (path / "file").write_text(text)

    def left(self) -> Iterator[str]:
        """Tell what a run has left of snapshots, of devices, of mounts on the host."""
        listed = _must("lvs", "--noheadings", "-o", "lv_name,lv_tags", self._group)
        for line in listed.splitlines():
            if "atomtx" in line:
                yield f"left in the volume group: {line.strip()}"
        for file in Path("/sys/block").glob("dm-*/dm/name"):
            with suppress(OSError):  # gone
                name = file.read_text()
                if name.startswith(f"{self._group}-atomtx"):
                    yield f"a device is left: {name.strip()}"
        for left in self._top.glob(".atomtx*"):
            yield f"left in the btrfs: {left.name}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if self.shows(line):
                yield f"mounted in the host: {line}"

    def shows(self, line: str) -> bool:
        """Tell whether a line of mountinfo is of a snapshot of these volumes."""
        words = line.split()
        of_btrfs = words[3].startswith("/.atomtx") and f" {self._disk} " in line
        return f"/{self._group}-atomtx" in line or of_btrfs

    def is_at_work(self) -> bool:
        """Tell whether a command of LVM is on its way to its end."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    name = os.path.basename(words[0])
                    if name.startswith((b"lv", b"vg")) and self._group.encode() in b" ".join(words):
                        return True
        return False


def _must(*argv: str) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout

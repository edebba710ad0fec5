"""XFS file systems on loop devices, and trees whose every property can be compared."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MACHINES_OWN = Path("/var/lib/xfsdump")
IMAGE_BYTES = 320 << 20  # the smallest that mkfs.xfs makes is of 300 MiB
_HOUSEKEEPING = "xfsrestorehousekeepingdir"


def call(*argv: str | Path) -> str:
    """Run a program; what it printed, or a failed test."""
    done = subprocess.run(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout + done.stderr


class Field:
    """Makes file systems below a directory, and takes them away again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._mounted: list[Path] = []

    def make(self, name: str) -> Path:
        """Mount a new XFS at a directory of this name."""
        image, place = self.home / f"{name}.img", self.home / name
        place.mkdir()
        with image.open("xb") as file:
            file.truncate(IMAGE_BYTES)
        call("mkfs.xfs", "-q", image)
        call("mount", "-o", "loop", image, place)
        self._mounted.append(place)
        return place

    def close(self) -> None:
        for place in reversed(self._mounted):
            call("umount", place)


# -- trees -------------------------------------------------------------------------------------


def fill(root: Path) -> None:
    """Make what a backup may lose: links, holes, attributes, lists, odd names, kinds and times."""
    for n in range(12):
        path = root / f"d{n % 3}" / f"f{n}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([n]) * 5000)
    (root / "d0" / "a name\nwith \xff").write_text("odd")
    os.link(root / "d0" / "f0", root / "d1" / "hard")
    (root / "soft").symlink_to("d0/f0")
    os.mkfifo(root / "fifo")
    with (root / "sparse").open("wb") as file:
        file.seek(40 << 20)
        file.write(b"end")
    os.setxattr(root / "d0" / "f3", "user.colour", b"blue\0green")
    os.setxattr(root / "d1", "user.of", b"a directory")
    call("setfacl", "-m", "u:1234:rw,g:99:r", root / "d0" / "f6")
    (root / "lists").mkdir()
    call("setfacl", "-d", "-m", "u:1234:rx", root / "lists")
    (root / "lists" / "inherits").write_text("a list of its own")
    os.chown(root / "d1" / "f1", 1234, 99)
    (root / "d1" / "f4").chmod(0o6750)
    os.utime(root / "d2" / "f2", ns=(10**18 + 123, 10**18 + 456))
    (root / "empty").mkdir(mode=0o711)


def change(root: Path, level: int) -> None:
    """
    Change the tree as people do between two backups.

    But for what xfsrestore cannot do: see `test_xfsrestore_loses`.
    """
    (root / "d0" / f"new{level}").write_text(f"of level {level}")
    (root / "d2" / "f5").write_text(f"changed at level {level}")
    with (root / "sparse").open("r+b") as file:
        file.seek(level << 20)
        file.write(b"in the hole")
    os.setxattr(root / "d0" / "f3", "user.level", str(level).encode())
    os.link(root / "d1" / "hard", root / "d2" / f"hard{level}")
    if level == 1:
        (root / "d1" / "f7").unlink()
        (root / "d0" / "f9").rename(root / "d2" / "moved")
        (root / "empty").rmdir()
        call("setfacl", "-m", "u:4321:r", root / "d1" / "f10")
    else:
        (root / "d2").rename(root / "renamed")
        (root / "d0" / "f6").chmod(0o600)
        (root / "d2").mkdir()
        (root / "d2" / "f5").write_text("another of the same name")
        os.utime(root / "d2" / "f5", (10**9, 10**9))


def described(root: Path) -> dict[str, dict[str, Any]]:
    """Return each name below *root* with all that a backup should keep of it."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for path in [root, *_below(root)]:
        name = str(path.relative_to(root))
        is_first = first.setdefault(path.lstat().st_ino, name)
        found[name] = {**_facts(path), "same as": is_first}
    del found["."]["mtime"]  # the restore's own directory was in it
    return found


def _below(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.name != _HOUSEKEEPING:
            yield path
            if path.is_dir() and not path.is_symlink():
                yield from _below(path)


def _facts(path: Path) -> dict[str, Any]:
    info = path.lstat()
    facts: dict[str, Any] = {
        "mode": oct(info.st_mode),
        "owner": (info.st_uid, info.st_gid),
        "attributes": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        },
    }
    if not path.is_dir():
        facts["links"] = info.st_nlink
    if path.is_symlink():  # xfsrestore sets no time of these
        facts["target"] = os.readlink(path)
        return facts
    facts["mtime"] = info.st_mtime_ns // 10**9  # xfsrestore sets whole seconds
    if stat.S_ISREG(info.st_mode):
        facts["data"] = (info.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        facts["has holes"] = info.st_blocks * 512 < info.st_size
    return facts


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return what is in a folder that nobody should touch, with sizes and times."""
    paths = [folder, *folder.rglob("*")] if folder.exists() else []
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]

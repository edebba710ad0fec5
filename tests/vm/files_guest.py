"""
Makes files with all that a backup may lose, and tells what is there; it runs in the machine.

    python3 files_guest.py make FOLDER ...         into each folder the same kinds of files
    python3 files_guest.py tell ROOT FOLDER ...    a JSON object for what is below ROOT/FOLDER

A folder itself is not told: it is a mountpoint, or what stands in for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any


def make(folder: Path) -> None:
    """Make links, holes, attributes, access lists, odd names, kinds, modes, owners and times."""
    deep = folder / "a" / "b"
    deep.mkdir(parents=True)
    (folder / "a" / "file").write_bytes(os.urandom(300_000))
    (deep / "with space").write_text(f"{folder}\n")
    (folder / "a" / "line\nfeed \u00e9").write_text("odd\n")
    os.link(folder / "a" / "file", folder / "a" / "hard")
    (folder / "a" / "soft").symlink_to("../nowhere")
    os.mkfifo(folder / "a" / "fifo", 0o640)
    with (folder / "a" / "sparse").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(os.urandom(4096))
    (folder / "empty").mkdir(mode=0o711)
    os.setxattr(folder / "a" / "file", "user.colour", b"blue\0green")
    os.setxattr(deep, "user.of", b"a folder")
    subprocess.run(["setfacl", "-m", "u:1234:rw,g:99:r", deep / "with space"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:1234:rx", deep], check=True)
    os.chown(deep, 12, 34)
    os.chown(folder / "a" / "soft", 1234, 99, follow_symlinks=False)
    deep.chmod(0o2750)
    (folder / "a" / "file").chmod(0o4711)
    for path in (folder / "a" / "file", deep, folder / "a"):
        os.utime(path, ns=(10**18 + 123_456_789, 981_169_445_789_000_000))


def tell(root: str, folders: list[str]) -> dict[str, dict[str, Any]]:
    """Return what is known of each path below *folders* in *root*, by its path without *root*."""
    told: dict[str, dict[str, Any]] = {}
    for folder in folders:
        first: dict[int, str] = {}
        for path in sorted(Path(root + folder).rglob("*")):
            if path.name in ("lost+found", "xfsrestorehousekeepingdir"):
                continue
            name = str(path).removeprefix(root)
            told[name] = _entry(path) | {"links": first.setdefault(path.lstat().st_ino, name)}
    return told


def _entry(path: Path) -> dict[str, Any]:
    info = path.lstat()
    link, regular = stat.S_ISLNK(info.st_mode), stat.S_ISREG(info.st_mode)
    lists = {} if link else {n: os.getxattr(path, n).hex() for n in sorted(os.listxattr(path))}
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if regular else ""
    return {
        "kind": stat.filemode(info.st_mode)[0],
        "content": os.readlink(path) if link else digest,
        "mode": oct(stat.S_IMODE(info.st_mode)),
        "owner": [info.st_uid, info.st_gid],
        "time": info.st_mtime_ns,
        "attributes": {n: value for n, value in lists.items() if n.startswith("user.")},
        "access lists": {n: value for n, value in lists.items() if n.startswith("system.posix")},
        "holes": regular and info.st_blocks * 512 < info.st_size // 2,
    }


if __name__ == "__main__":
    if sys.argv[1] == "make":
        for word in sys.argv[2:]:
            make(Path(word))
    else:
        print(json.dumps(tell(sys.argv[2], sys.argv[3:])))

"""Stands for mount(2) where datasets are played: a snapshot is a copy of its files, in memory."""

from __future__ import annotations

import os
import shutil

from atomtx.mounts import namespace
from tests import fakezfs

_real = namespace.mount


def mount(source: str, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    """Mount as mount(2) does; a snapshot is a file system in memory with a copy of its files."""
    if fstype != "zfs":
        _real(source, target, fstype, flags, data)
        return
    if not os.path.exists(fakezfs.stored(source)):
        raise FileNotFoundError(2, f"cannot mount {source}", target)
    target = os.readlink(target)  # a descriptor's; below it is not what will be mounted there
    _real(source, target, "tmpfs", 0)
    shutil.copytree(fakezfs.stored(source), target, symlinks=True, dirs_exist_ok=True)
    _real(source, target, None, flags | namespace.MS_REMOUNT | namespace.MS_BIND)

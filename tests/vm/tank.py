"""Datasets in the machine's pool, and what a run may not leave there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection

from tests.vm.machine import Machine
from tests.vm.remote import atomtx

LOOK = "/root/look.py"
_RUN = re.compile(r"atomtx-[0-9a-f]{16}")  # the tag of a run's holds


def make_pool(vm: Machine, name: str, disk: str, options: str = "") -> None:
    """Create a pool on a whole disk."""
    create = f"{options} {name} {disk}"
    # zpool partitions the disk, and opens the partition by a link that udev may be making anew
    # just then: "no such pool or dataset" (openzfs/zfs lib/libzutil, zpool_label_disk_wait).
    vm.run(f"zpool create {create} || {{ udevadm settle && zpool create -f {create}; }}")


def make_datasets(vm: Machine, *names: str, options: str = "") -> list[str]:
    """Create file systems, parents first, with `zfs create` *options*; return their names."""
    words = [shlex.quote(name) for name in names]
    vm.run("set -e\n" + "\n".join(f"zfs create {options} {word}" for word in words), timeout=600)
    return list(names)


def fill(vm: Machine, folder: str, *, files: int, size_bytes: int) -> None:
    """Write *files* files of random bytes into *folder*."""
    where = shlex.quote(folder)
    total = files * size_bytes
    vm.run(f"cd {where} && head -c {total} /dev/urandom | split -a 4 -b {size_bytes} - file-")


def leftovers(vm: Machine, *, foreign: Collection[str] = ()) -> list[str]:
    """
    Return what any run has left on the machine.

    *foreign* names snapshots not to count, with the holds on them that are no run's.
    """
    answer = atomtx(vm, script=LOOK)
    assert answer.status == 0, answer.output
    return [line for line in answer.stdout.splitlines() if not _is_foreign(line, foreign)]


def _is_foreign(line: str, foreign: Collection[str]) -> bool:
    name, *tags = line.split(" ", 1)[1].split("\t")
    return name in foreign and not any(_RUN.fullmatch(tag) for tag in tags[:1])

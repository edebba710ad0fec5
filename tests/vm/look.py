"""
Prints what runs have left on the machine, a line each; see `leftovers` in tank.py.

One process reads /proc, each mount table once: a pipe of programs takes seconds under the
emulated CPU.  It runs in the machine; see "script" in agent.py.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# A source in mountinfo, in which blanks are escaped.
_MOUNT = re.compile(r" - \S+ (\S*(?:@atomtx-|-atomtx--)\S*) ")
_RUNNER = "atomtx.runner"


def _zfs(*words: str) -> list[str]:
    argv = ["zfs", *words]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def _snapshots_and_holds() -> Iterator[str]:
    names = _zfs("list", "-H", "-t", "snapshot", "-o", "name")
    yield from (f"snapshot {name}" for name in names if "@atomtx-" in name)
    if names:
        yield from (f"hold {line}" for line in _zfs("holds", "-H", *names))


def _logical() -> Iterator[str]:
    """Yield LVM's: volumes with our tag or name, and devices, also without a volume."""
    if not list(Path("/sys/block").glob("dm-*")):
        return
    argv = ["lvs", "--noheadings", "-o", "vg_name,lv_name,lv_tags", "--separator", "/"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    yield from (f"volume {line.strip()}" for line in done.stdout.splitlines() if "atomtx" in line)
    for name in Path("/sys/block").glob("dm-*/dm/name"):
        with suppress(OSError):  # gone
            if "atomtx--" in name.read_text():
                yield f"device {name.read_text().strip()}"


def _mounts(processes: list[Path]) -> list[str]:
    tables: dict[tuple[str, str], str] = {}
    for process in processes:
        with suppress(OSError):  # it has ended
            # Of its namespace a process sees what is below its root.
            view = os.readlink(process / "ns" / "mnt"), os.readlink(process / "root")
            if view not in tables:
                tables[view] = (process / "mountinfo").read_text(errors="surrogateescape")
    return sorted({name for table in tables.values() for name in _MOUNT.findall(table)})


def _runners(processes: list[Path]) -> Iterator[str]:
    """Yield the runners: started ones by their command line, forked ones by their name."""
    for process in processes:
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if _RUNNER in words or (process / "comm").read_text() == f"{_RUNNER}\n":
                yield f"{process.name} {' '.join(words)}"


def main() -> None:
    """Print snapshots, holds, mounts and processes."""
    for line in _snapshots_and_holds():
        print(line)
    for line in _logical():
        print(line)
    processes = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    for name in _mounts(processes):
        print(f"mount {name}")
    for line in _runners(processes):
        print(f"process {line}")


main()

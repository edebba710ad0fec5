"""
`atomtx sure` beside `restic backup`, on the same tree, in one run: sure.py [FILES] [FOLDER].

Both read the tree for the first time, then unchanged, ROUNDS times in turn; the medians and their
ratios are printed as Markdown.  Wall time and CPU time: on a machine at work the second tells
more.  The tree is made of files of 0 to 16 KiB, 50 in a directory, and is in the page cache.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CACHED = Path.home() / ".cache/atomtx/clients/restic-0.19.1"
RESTIC = str(CACHED) if CACHED.exists() else shutil.which("restic") or ""
ROUNDS = int(os.environ.get("ROUNDS", "3"))
FILES_A_DIRECTORY, LARGEST = 50, 16 << 10


class Cost(NamedTuple):
    """What one process took."""

    wall_s: float
    cpu_s: float


def main(files: int, folder: Path | None) -> None:
    """Print the table."""
    if not RESTIC:
        raise SystemExit("restic is needed: on PATH, or as tests/vm/clients.sh puts it")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        size = make_tree(place / "tree", files)
        env = {
            **os.environ,
            "RESTIC_REPOSITORY": str(place / "repository"),
            "RESTIC_PASSWORD": "bench",
            "RESTIC_CACHE_DIR": str(place / "cache"),
            "ATOMTX_STATE_DIR": str(place / "state"),
            "PYTHONPATH": str(ROOT / "engine"),
        }
        restic = [RESTIC, "backup", "--quiet", str(place / "tree")]
        sure = [sys.executable, "-m", "atomtx", "sure", "scan", str(place / "tree")]
        spend([RESTIC, "init", "--quiet"], env)
        print(f"{files} files, {size / 2**20:.0f} MiB; {version(env)}; {os.cpu_count()} cores\n")
        print("| what | restic s (CPU) | sure s (CPU) | ratio (CPU) |")
        print("| --- | --- | --- | --- |")
        row("first", [spend(restic, env)], [spend(sure, env)])
        pairs = [(spend(restic, env), spend(sure, env)) for _ in range(ROUNDS)]
        row(f"unchanged, median of {ROUNDS}", *zip(*pairs, strict=True))
        check = [*sure[:-2], "check", str(place / "tree")]
        print(f"| check | | {words(spend(check, env))} | |")
        (database,) = (place / "state/sure").glob("*.db")
        print(f"\ndatabase: {database.stat().st_size / files:.0f} bytes a file")


def make_tree(tree: Path, files: int) -> int:
    """Make the tree, the same one each time, and return how many bytes its files have."""
    numbers = random.Random(0)
    total = 0
    for number in range(files):
        directory = (
            tree / f"{number // (FILES_A_DIRECTORY * 50)}" / f"{number // FILES_A_DIRECTORY}"
        )
        if number % FILES_A_DIRECTORY == 0:
            directory.mkdir(parents=True)
        data = numbers.randbytes(numbers.randrange(LARGEST))
        (directory / f"file-{number}").write_bytes(data)
        total += len(data)
    time.sleep(3)  # else all of it is racy, rightly
    return total


def spend(command: Sequence[str], env: dict[str, str]) -> Cost:
    """Run a command to its end, which must be a good one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    subprocess.run(command, env=env, check=True, capture_output=True)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu)


def row(what: str, restic: Sequence[Cost], sure: Sequence[Cost]) -> None:
    """Print a row of medians."""
    theirs, ours = (
        Cost(
            statistics.median(cost.wall_s for cost in costs),
            statistics.median(cost.cpu_s for cost in costs),
        )
        for costs in (restic, sure)
    )
    ratio = f"{ours.wall_s / theirs.wall_s:.2f} ({ours.cpu_s / theirs.cpu_s:.2f})"
    print(f"| {what} | {words(theirs)} | {words(ours)} | {ratio} |", flush=True)


def words(cost: Cost) -> str:
    return f"{cost.wall_s:.1f} ({cost.cpu_s:.1f})"


def version(env: dict[str, str]) -> str:
    done = subprocess.run([RESTIC, "version"], env=env, check=True, capture_output=True, text=True)
    return " ".join(done.stdout.split()[:2])


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 100_000,
        Path(sys.argv[2]) if len(sys.argv) > 2 else None,
    )

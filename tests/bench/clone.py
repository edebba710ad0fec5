"""
What a clone costs beside the bare pipe, in the virtual machine, in one go.

    python tests/bench/clone.py        MIB=256 ROUNDS=5

The first table is of the stream alone: `zfs send | zfs receive` by the shell, and by our pipe, with
the same words.  The second is of the whole command, where nothing is to be sent and where one
dataset of N has changed: what is asked and journaled around the streams.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.bench import timed  # noqa: E402
from tests.vm import remote  # noqa: E402
from tests.vm.machine import DATA_DISKS, Machine, install, open_machine  # noqa: E402

MIB = int(os.environ.get("MIB", "256"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
SIZES = tuple(map(int, os.environ.get("SIZES", "1 20 200").split()))
GUEST = Path(__file__).with_name("clone_guest.py")
PATTERN = ("--pattern", "s-%Y%m%d%H%M%S")


def main() -> None:
    """Print the tables as Markdown."""
    with open_machine() as machine:
        install(machine)
        machine.run(f"zpool create tank {DATA_DISKS[0]} && zpool create backup {DATA_DISKS[1]}")
        machine.run("zfs create tank/stream && zfs create tank/many && zfs create backup/here")
        machine.put(GUEST, "/root/clone_guest.py")
        remote.install(machine)
        print("| stream | bare pipe s | atomtx's s | ratio |\n| --- | --- | --- | --- |")
        for what, source in (("random", "/dev/urandom"), ("text", "<(yes atomtx)")):
            print(stream(machine, what, source), flush=True)
        print("\n| datasets | nothing to send s | `zfs` processes | one changed s | processes |")
        print("| --- | --- | --- | --- | --- |")
        made = 0
        for size in SIZES:
            machine.run(
                f"seq {made + 1} {size} | xargs -P 4 -I@ zfs create tank/many/d@", timeout=3000
            )
            made = size
            print(commands(machine, size), flush=True)


def stream(machine: Machine, what: str, source: str) -> str:
    """Return a line: the medians of both sides."""
    machine.run(
        f"zfs destroy tank/stream@s 2>/dev/null; head -c {MIB}M {source} > /tank/stream/f;"
        " zfs snapshot tank/stream@s",
        timeout=900,
    )
    out = machine.run(f"/venv/bin/python /root/clone_guest.py {ROUNDS}", timeout=3000).stdout
    found = json.loads(out)
    bare, ours = (statistics.median(found[side]) for side in ("bare", "ours"))
    return f"| {MIB} MiB, {what} | {bare:.2f} | {ours:.2f} | {ours / bare:.3f} |"


def commands(machine: Machine, size: int) -> str:
    """Return a line: whole commands, the least of three."""
    snap = ("snap", "-r", "tank/many", *PATTERN)
    clone = ("clone", "-r", "tank/many", *PATTERN, "--to", "backup/here")
    idle: list[float] = []
    busy: list[float] = []
    counts = []
    for _ in range(3):
        machine.run("date +%N > /tank/many/f; sleep 1.1")
        assert remote.atomtx(machine, *snap).status == 0
        assert remote.atomtx(machine, *clone, timeout_s=3000).status == 0
    for times in (idle, busy):
        for _ in range(3):
            if times is busy:
                machine.run("date +%N > /tank/many/d1/f; sleep 1.1")
                assert remote.atomtx(machine, "snap", "tank/many/d1", *PATTERN).status == 0
            seconds, answer = timed(
                lambda: remote.atomtx(machine, *clone, kill={"at": "none"}, timeout_s=3000)
            )
            assert answer.status == 0, answer.output
            times.append(seconds)
        counts.append(len([p for p in answer.points if p.startswith("start:z")]))
    return f"| {size} | {min(idle):.2f} | {counts[0]} | {min(busy):.2f} | {counts[1]} |"


if __name__ == "__main__":
    main()

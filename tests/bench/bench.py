"""
`make bench`: what a run costs beside the bare commands, in the virtual machine, in one go.

Both sides do the same work with `true` as the client, in turn, so that their ratio is of our own
work.  The floor is the least that a careful script could start: one `zfs list`, one `zfs
snapshot`, one `zfs hold`, N mount(2) in a namespace, the client, one `zfs release`, one destroy
(a channel program).  The CPU is emulated: only ratios and counts mean something elsewhere.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.vm import remote  # noqa: E402
from tests.vm.machine import DATA_DISKS, Machine, install, open_machine  # noqa: E402

SIZES = tuple(map(int, os.environ.get("SIZES", "1 20 200 1000").split()))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
FLOOR = Path(__file__).with_name("floor.py")


def main() -> None:
    """Print the tables as Markdown."""
    with open_machine() as machine:
        install(machine)
        machine.run(f"zpool create tank {DATA_DISKS[0]}")
        machine.put(FLOOR, "/root/floor.py")
        remote.install(machine)
        print(
            "| datasets | floor s | atomtx s | ratio | + start-up s | `zfs` processes | commits |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        made = 0
        for size in SIZES:
            grow(machine, made, size)
            made = size
            print(row(machine, size), flush=True)
        print("\n| what | measured |\n| --- | --- |")
        for what, measured in others(machine):
            print(f"| {what} | {measured} |", flush=True)


def grow(machine: Machine, have: int, want: int) -> None:
    """Add datasets, each with a file, until there are *want* below tank/m."""
    machine.run(
        "zfs list tank/m >/dev/null 2>&1 || zfs create tank/m;"
        f" seq {have + 1} {want - 1} | xargs -P 4 -I@ sh -c"
        " 'zfs create tank/m/d@ && echo @ > /tank/m/d@/f'; echo m > /tank/m/f; sync",
        timeout=3000,
    )


def row(machine: Machine, size: int) -> str:
    """Measure both sides in turn and return a line of the table."""
    floors: list[float] = []
    runs: list[float] = []
    points: tuple[str, ...] = ()
    for _ in range(ROUNDS):
        floors.append(json.loads(machine.run("python3 /root/floor.py tank/m", timeout=900).stdout))
        seconds, answer = timed(
            lambda: remote.atomtx(machine, "backup", "-r", "tank/m", "--command", "true",
                                  kill={"at": "none"})
        )  # fmt: skip
        assert answer.status == 0, answer.output
        runs.append(seconds)
        points = answer.points
    floor, run = statistics.median(floors), statistics.median(runs)
    programs = len([p for p in points if p.startswith("start:z")])
    commits = len([p for p in points if p.startswith("journal:")])
    start = start_up(machine)
    return (
        f"| {size} | {floor:.2f} | {run:.2f} | {run / floor:.2f} | {start:.2f} |"
        f" {programs} | {commits} |"
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.monotonic()
    result = work()
    return time.monotonic() - start, result


def start_up(machine: Machine) -> float:
    """Return the seconds that the imports of a run take, which the agent has paid already."""
    code = (
        "import time; t = time.monotonic(); import atomtx.cli.backup; print(time.monotonic() - t)"
    )
    return min(float(machine.run(f"/venv/bin/python -c '{code}'").stdout) for _ in range(3))


def others(machine: Machine) -> list[tuple[str, str]]:
    """Measure start-up, `history` over many runs, and memory."""
    fill = Path(__file__).with_name("many_runs.py")
    machine.put(fill, "/root/many_runs.py")
    machine.run("/venv/bin/python /root/many_runs.py /root/many 100000", timeout=900)
    commands = {
        "`python -c pass`": "/venv/bin/python -c pass",
        "`atomtx --help`": "/venv/bin/atomtx --help",
        "`atomtx history`, 100,000 runs": "ATOMTX_STATE_DIR=/root/many /venv/bin/atomtx history",
    }
    rows = []
    for name, command in commands.items():
        code = f"bash -c 'TIMEFORMAT=%R; time {command} >/dev/null' 2>&1"
        best = min(float(machine.run(code).stdout.split()[-1]) for _ in range(5))
        rows.append((name, f"{best:.2f} s"))
    peak = machine.run(
        "cd / && RESTIC_REPOSITORY=x /venv/bin/python -c '"
        "import resource, sys; from atomtx import cli\n"
        'status = cli.run(["backup", "-r", "tank/m", "-q", "--command", "true"])\n'
        "print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)'",
        timeout=900,
    ).stdout.split()
    rows.append(
        (f"peak memory of a run over {SIZES[-1]} datasets", f"{int(peak[-1]) / 1024:.0f} MiB")
    )
    return rows


if __name__ == "__main__":
    main()

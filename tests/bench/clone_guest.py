"""
One stream from pool to pool, by the shell's pipe and by ours, in turn; prints seconds as JSON.

Argument: how many rounds.  In the machine, with the program's own Python; the pools `tank` and
`backup` are there, and the snapshot `tank/stream@s`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

from atomtx.pipeline import Stage, carry
from atomtx.replica import Point, Send, Source
from atomtx.volumes.ends import receive_argv, send_argv

SNAPSHOT = Point("tank/stream@s", "1", 1, True)
SOURCE = Source("tank/stream", False, False, (SNAPSHOT,))
COPY = "backup/stream"
SENDS, RECEIVES = send_argv(SOURCE, Send(SNAPSHOT)), receive_argv(SOURCE, COPY)


def bare() -> None:
    pipe = f"{shlex.join(SENDS)} | {shlex.join(RECEIVES)}"
    subprocess.run(["bash", "-o", "pipefail", "-c", pipe], check=True)


def ours() -> None:
    carry(
        Stage("send", SENDS),
        [Stage("receive", RECEIVES, may_be_killed=False)],
        lock=None,
        moved=lambda _: None,
        check=lambda: None,
    )


def timed(work: Callable[[], None]) -> float:
    subprocess.run(["zpool", "sync"], check=True)
    start = time.monotonic()
    work()
    seconds = time.monotonic() - start
    subprocess.run(["zfs", "destroy", "-r", COPY], check=True)
    return seconds


def main(rounds: int) -> None:
    found: dict[str, list[float]] = {"bare": [], "ours": []}
    for n in range(rounds):
        # Neither is always the one that comes after the other.
        for work in ((bare, ours), (ours, bare))[n % 2]:
            found[work.__name__].append(timed(work))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))

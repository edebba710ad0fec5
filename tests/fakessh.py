"""
Stands for ssh(1): another machine, whose pools are those of the directory "far".

What stands for `zfs` there is `tests/fakezfs.py` again.  Like ssh, it closes all descriptors but
the first three, and the far command hears of its end by its standard input alone.  Faults, under
"ssh" in the pools of this machine:

    "refuse"        nobody is there
    "noise"         the far shell has something to say first, on both outputs
    "title"         the same, without an end of line
    "hang COMMAND"  that is not answered; "hear COMMAND" the same, and the front end gets a SIGTERM
    "cut DATASET"   the line dies at half of a stream into it, and is dead until "dead" is removed
    "blink DATASET" the same, but it is there again at once
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

HOME = os.environ.get("FAKE_ZFS", "/nonexistent")
_HALF = b'{"block": 1,'


def main(argv: list[str]) -> int:
    """Run the last argument in a shell of the far machine."""
    os.closerange(3, 256)
    host, command = argv[-2:]
    with open(f"{HOME}/pool.json") as file:
        fault = json.load(file)["faults"].get("ssh", "")
    if fault == "refuse" or os.path.exists(f"{HOME}/dead"):
        print(f"ssh: connect to host {host} port 22: Connection refused", file=sys.stderr)
        return 255
    if fault == "noise":
        command = f"echo Welcome; echo 'All you do is seen' >&2; {command}"
    if fault == "title":
        command = f"printf 'a title'; printf 'seen' >&2; {command}"
    kind, _, dataset = fault.partition(" ")
    if kind in ("hang", "hear") and f" {dataset} " in command:
        if kind == "hear":
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    is_cut = kind in ("cut", "blink") and command.endswith((f" {dataset}", f" '{dataset}'"))
    far = subprocess.Popen(
        ["sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "FAKE_ZFS": f"{HOME}/far", "FAKE_FRONT": str(os.getppid())},
    )
    died = _feed(far, until=_HALF if is_cut and "receive" in command else None)
    assert far.stdout
    os.write(1, far.stdout.read())
    status = far.wait()
    if died:
        if kind == "cut":
            open(f"{HOME}/dead", "w").close()
        print(f"Connection to {host} closed by remote host.", file=sys.stderr)
        return 255
    return status if status >= 0 else 255


def _feed(far: subprocess.Popen[bytes], *, until: bytes | None) -> bool:
    """Give it our standard input; True where it was not all, because *until* was in it."""
    assert far.stdin
    seen = b""
    died = False
    with suppress(BrokenPipeError):
        while part := os.read(0, 1 << 16):
            seen += part
            if until and until in seen:
                line = seen.index(b"\n", seen.index(until)) + 1
                far.stdin.write(part[: len(part) - (len(seen) - line)])
                died = True
                break
            far.stdin.write(part)
            far.stdin.flush()
    with suppress(BrokenPipeError):
        far.stdin.close()
    return died

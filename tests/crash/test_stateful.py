"""Random histories of crashes, recoveries and other people's deeds, on real ZFS."""

from __future__ import annotations

import os
import random

from tests.crash.field import put_players
from tests.extent import FULL
from tests.vm.machine import Machine

EXAMPLES = int(os.environ.get("ATOMTX_HISTORIES", "150" if FULL else "2"))  # a worker
STEPS = int(os.environ.get("ATOMTX_STEPS", "12" if FULL else "5"))
SEED = int(os.environ.get("ATOMTX_SEED", random.randrange(1_000_000) if FULL else 2))
BLOB = os.environ.get("ATOMTX_BLOB", "")  # of one history: what a failure printed
WORKERS = 1 if BLOB else 2


def test_random_histories(vm: Machine) -> None:
    """
    Whatever crashes, and whatever others do, nothing is lost, left over, or said to be done.

    Promises 2 to 7 and 14, with several commands at once; see stateful_guest.py.  A failure names
    its seed, and each step that its worker made.
    """
    put_players(vm, "world.py", "stateful_guest.py")
    words = f"--seed {SEED} --workers {WORKERS} --examples {EXAMPLES} --steps {STEPS}"
    if BLOB:
        words += f" --blob {BLOB}"
    done = vm.run(
        f"cd / && /venv/bin/python /root/stateful_guest.py /root/histories {words}",
        check=False,
        timeout=600 + EXAMPLES * STEPS * 120,
    )
    log = vm.run("cat /root/histories").stdout
    said = f"ATOMTX_SEED={SEED}: {words}\n{done.stdout}{done.stderr}\n{log}"
    assert done.status == 0, said
    settled = [line for line in log.splitlines() if "settle: [" in line]
    assert len(settled) >= (1 if BLOB else WORKERS * EXAMPLES), said  # all came to their ends
    print(log)

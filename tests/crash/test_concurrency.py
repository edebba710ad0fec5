"""Many commands at once, on real ZFS: nobody is in another's way."""

from __future__ import annotations

import os

from tests.crash.field import put_players
from tests.extent import FULL
from tests.vm.machine import Machine

JOBS = int(os.environ.get("ATOMTX_JOBS", "20" if FULL else "6"))


def test_many_at_once(vm: Machine) -> None:
    """
    Many backups at once, of as many jobs and of one, beside `recover` in a loop; twenty in full.

    None is disturbed: each completes with its first attempt, or is told that its job is at work,
    and no error of the journal reaches anybody (promise 6).
    """
    put_players(vm, "world.py", "crowd_guest.py")
    done = vm.run(f"/venv/bin/python /root/crowd_guest.py --jobs {JOBS}", check=False, timeout=7200)
    assert done.status == 0, done.stdout + done.stderr
    print(done.stdout)

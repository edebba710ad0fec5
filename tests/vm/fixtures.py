"""
The machine as fixtures, one for each process of a test session; tests/conftest.py has them.

Where it cannot run, its tests fail and say why; they are never skipped.  To leave them out:
`pytest -m 'not vm'`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm import remote
from tests.vm.machine import DATA_DISKS, Machine, MachineError, install, open_machine
from tests.vm.tank import make_pool


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """The machine with this checkout's program; its states 'clean' and, with a pool, 'tank'."""
    try:
        with open_machine() as machine:
            install(machine)
            machine.run("python3 -m compileall -q /venv/lib/python3.*/site-packages/atomtx")
            machine.run("atomtx --version && atomtx --help")
            remote.install(machine)
            # A state that is loaded comes back with a clock that jumps: no CPU was stuck.
            machine.run(
                "echo 1 > /sys/module/rcupdate/parameters/rcu_cpu_stall_suppress;"
                " echo 0 > /proc/sys/kernel/watchdog"
            )
            machine.save("clean")
            make_pool(machine, "tank", DATA_DISKS[0])
            machine.run("zfs list tank >/dev/null && sync")
            machine.save("tank")
            yield machine
    except MachineError as exc:
        pytest.fail(f"the virtual machine: {exc}\n(to leave its tests out: -m 'not vm')")


@pytest.fixture
def vm(machine: Machine) -> Machine:
    """The machine as new, with an empty pool `tank` on its first data disk."""
    machine.load("tank")
    return machine

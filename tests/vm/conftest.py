"""
The virtual machine as fixtures.

Where it cannot run, these tests fail and say why; they are never skipped.  To leave them out:
`pytest -m 'not vm'`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm import remote
from tests.vm.machine import DATA_DISKS, Machine, MachineError, install, open_machine
from tests.vm.powercut import Tally
from tests.vm.scene import Prepare

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vm")


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
            machine.run(f"zpool create tank {DATA_DISKS[0]} && zfs list tank >/dev/null && sync")
            machine.save("tank")
            yield machine
    except MachineError as exc:
        pytest.fail(f"the virtual machine: {exc}\n(to leave its tests out: -m 'not vm')")


@pytest.fixture
def vm(machine: Machine) -> Machine:
    """The machine as new, with an empty pool `tank` on its first data disk."""
    machine.load("tank")
    return machine


@pytest.fixture(scope="module")
def prepared(machine: Machine) -> Iterator[Prepare]:
    """Give the machine as *make* leaves it, on a state to begin with; once for a file's tests."""
    made: set[str] = set()

    def load(base: str, make: Callable[[Machine], None]) -> Machine:
        name = make.__name__
        if name in made:
            machine.load(name)
            return machine
        machine.load(base)
        make(machine)
        machine.save(name)
        made.add(name)
        return machine

    yield load
    for name in made:
        machine.forget(name)


@pytest.fixture
def bare_vm(machine: Machine) -> Machine:
    """The machine as new, without any pool."""
    machine.load("clean")
    return machine


@pytest.fixture
def power_cuts(record_property: Callable[[str, object], None]) -> Iterator[list[Tally]]:
    """A list for the tallies of a test's power cuts: they are shown when all tests have ended."""
    tallies: list[Tally] = []
    yield tallies
    for tally in tallies:
        print(tally.where, *tally.violations, sep="\n  ")  # shown with -rP, and of what failed
        record_property("power cuts", tally.row())

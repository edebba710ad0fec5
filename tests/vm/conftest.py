"""States of the machine that a file's tests share, and what they tell at their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.machine import Machine
from tests.vm.powercut import Tally
from tests.vm.scene import Prepare

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vm")


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

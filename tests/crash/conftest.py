"""The virtual machine as fixtures, as for the tests beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.field import Field
from tests.vm.machine import Machine

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below this folder that uses the machine."""
    for item in items:
        if HERE in item.path.parents and "machine" in getattr(item, "fixturenames", ()):
            item.add_marker("vm")


@pytest.fixture(scope="module")
def field(machine: Machine) -> Field:
    """A machine in which cases are played; what was recorded is kept for the module's tests."""
    machine.load("tank")
    made = Field([machine])
    made.prepare()
    return made

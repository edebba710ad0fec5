"""What holds for every test: nothing of the user's own is read or written."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest

from tests.vm.fixtures import machine, vm

__all__ = ["machine", "vm"]

# Under emulation, and on a machine at work, no single example has a deadline.
hypothesis.settings.register_profile("atomtx", deadline=None, print_blob=True)
hypothesis.settings.load_profile("atomtx")

FOREIGN = (
    "ATOMTX_CONFIG",
    "ATOMTX_STATE_DIR",
    "ATOMTX_NOTIFY_",
    "ATOMTX_PING_",
    "ATOMTX_SENDMAIL",
    "STATE_DIRECTORY",
    "RUNTIME_DIRECTORY",
    "RESTIC_",
    "KOPIA_",
    "BORG_",
    "AWS_",
    "B2_",
)

# By the CPU time of their machines; pytest-xdist would go by the number of tests.
LONGEST_FIRST = (
    "crash/test_sweep.py",
    "vm/test_clients.py",
    "crash/test_concurrency.py",
    "crash/test_stateful.py",
    "vm/test_backup.py",
    "vm/test_faults.py",
    "vm/test_no_room.py",
    "vm/test_crash.py",
    "vm/test_behaviour.py",
    "vm/test_power_cut_run.py",
    "vm/test_systemd.py",
    "vm/test_refusals.py",
    "vm/test_from_restomic.py",
    "vm/test_power_cut.py",
    "vm/test_machine.py",
)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests away from the machine's journal, its repositories and their passwords."""
    # A shell starts what runs in the background with SIGINT ignored, and so would we.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            patch.delenv(name)
        patch.setenv("ATOMTX_STATE_DIR", str(tmp_path_factory.mktemp("state") / "absent"))
        patch.setenv("RUNTIME_DIRECTORY", str(tmp_path_factory.mktemp("run") / "atomtx"))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Put the files that take minutes first, the longest one at the head.

    With two workers, each of which takes the next file, they then end at about the same time.
    """
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests of power cuts tried, and what came of it; a line for each place."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    cuts: Counter[str] = Counter()
    violations: Counter[str] = Counter()
    outcomes: dict[str, Counter[str]] = {}
    for report in reports:
        for name, row in getattr(report, "user_properties", ()):
            if name == "power cuts" and report.when == "teardown":
                cuts[row["where"]] += row["cuts"]
                violations[row["where"]] += row["violations"]
                outcomes.setdefault(row["where"], Counter()).update(row["outcomes"])
    if cuts:
        terminalreporter.section("power cuts")
    for where, count in cuts.items():
        told = ", ".join(f"{n} {what}" for what, n in sorted(outcomes[where].items()))
        terminalreporter.line(f"{where}: {count} cuts, {violations[where]} violations; {told}")

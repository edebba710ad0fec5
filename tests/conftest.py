"""What holds for every test: nothing of the user's own is read or written."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest

from tests.extent import FULL
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
    *("NOTIFY_SOCKET", "INVOCATION_ID", "SERVICE_RESULT", "MONITOR_", "CREDENTIALS_DIRECTORY"),
    *("TMPDIR", "RCLONE_"),
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
    "vm/test_systemd.py",
    "vm/test_faults.py",
    "vm/test_lvm.py",
    "vm/test_clone.py",
    "vm/test_matrix.py",
    "crash/test_sweep.py",
    "vm/test_snap.py",
    "vm/test_power_cut_run.py",
    "vm/test_clients.py",
    "vm/test_steps.py",
    "vm/test_lvm_snap.py",
    "vm/test_snap_mixed.py",
    "vm/test_from_snapshots.py",
    "crash/test_concurrency.py",
    "crash/test_stateful.py",
    "vm/test_backup.py",
    "vm/test_no_room.py",
    "vm/test_crash.py",
    "vm/test_behaviour.py",
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    Put the files that take minutes first, the longest one at the head; leave out what is `full`.

    With two workers, each of which takes the next file, they then end at about the same time.
    """
    left_out = [] if FULL else [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test was skipped and none may be, and say which: `.ci/run` wants it so."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ATOMTX_NO_SKIPS") and reporter:
        for report in reporter.stats.get("skipped", ()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter.line(f"skipped, and nothing may be: {report.nodeid}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests of power cuts tried, and what was restored of which client."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    _show_power_cuts(terminalreporter, reports)
    _show_matrix(terminalreporter, reports)


def _show_power_cuts(
    terminalreporter: pytest.TerminalReporter, reports: list[pytest.TestReport]
) -> None:
    """Show what was tried, and what came of it; a line for each place."""
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


def _show_matrix(
    terminalreporter: pytest.TerminalReporter, reports: list[pytest.TestReport]
) -> None:
    """Show the cells in which a killed run and a whole one were restored; a line for each kind."""
    cells: dict[str, list[str]] = {}
    for report in reports:
        for name, cell in getattr(report, "user_properties", ()):
            if name == "matrix" and report.when == "call" and report.passed:
                cells.setdefault(cell["kind"], []).append(cell["client"])
    if cells:
        terminalreporter.section("killed, resumed, restored and equal")
    for kind, clients in cells.items():
        terminalreporter.line(f"{kind:<16}{', '.join(sorted(clients))}")

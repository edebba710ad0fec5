"""`atomtx backup --wait`: every one of many at once gets its turn, a signal ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atomtx import locks
from tests.cli.conftest import SOURCE, Run

Start = Callable[..., "subprocess.Popen[str]"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups")
CHECKOUT = Path(__file__).parents[2]

# The command as it is, with journal and locks as they are; but the plan is of datasets that are
# nowhere, and a run only waits for a file, and takes down that it was alone.
_PROGRAM = """
import os, sys
from pathlib import Path
from atomtx import cli
from atomtx.cli import backup, runs
from atomtx.executor import Executor
from atomtx.names import RunId
from atomtx.states import Event, Outcome
from tests.runs import a_plan

flag, log = Path(sys.argv[1]), Path(sys.argv[2])

def advance(self, run):
    with log.open("a") as file:
        file.write(f"begun {run.id}\\n")
    while flag.exists():
        self._interrupts.sleep(0.05)
    run = self.give_up(run, Outcome.COMPLETED, None)
    with log.open("a") as file:
        file.write(f"ended {run.id}\\n")
    with self._journal.change(run) as change:
        change.fire(Event.CLEANED_UP)
    return self._journal.load(run.id)

Executor.advance = advance
runs._FOLLOWED_S = 0
backup.make_plan = lambda *_, **__: a_plan(run=RunId.new(), notes=("a note",))
cli.main(sys.argv[3:])
"""


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """While it is there, a run that has begun does not end."""
    path = tmp_path / "flag"
    path.touch()
    return path


@pytest.fixture
def start(tmp_path: Path, flag: Path, env: dict[str, str]) -> Iterator[Start]:
    """Start a backup of the one job."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        paths = f"{SOURCE}:{CHECKOUT}"
        argv = [sys.executable, "-c", _PROGRAM, str(flag), str(log(tmp_path)), "backup", "tank/a"]
        child = subprocess.Popen(
            [*argv, "--command", "true", *words],
            env={**env, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def wait_for_line(child: subprocess.Popen[str], words: str) -> str:
    """Read the lines of a child until one has *words*; return it."""
    assert child.stderr is not None
    for line in child.stderr:
        if words in line:
            return line
    raise AssertionError(f"{words!r} was not said")


def begun(tmp_path: Path, child: subprocess.Popen[str]) -> str:
    """Wait until a run has begun, and return its id."""
    path = log(tmp_path)
    assert locks.wait_until(lambda: path.exists() and path.read_text().endswith("\n"), 60)
    assert child.poll() is None
    return log(tmp_path).read_text().split()[1]


def runs(atomtx_: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(atomtx_("history", "--json").stdout)
    return found


def test_busy(tmp_path: Path, start: Start) -> None:
    """Without --wait another run of the job is exit status 5, and the way to wait is named."""
    run = begun(tmp_path, start())
    other = start()
    said = other.communicate(timeout=60)[1]
    assert other.returncode == 5
    assert f"run {run} of this job is at work" in said
    assert "--wait" in said


def test_turn(tmp_path: Path, flag: Path, start: Start, atomtx_: Run) -> None:
    """With --wait it says for whom it waits, once, and goes on when that run has ended."""
    run = begun(tmp_path, start())
    other = start("--wait")
    assert run in wait_for_line(other, "waiting for its end")
    assert len(log(tmp_path).read_text().splitlines()) == 1
    flag.unlink()
    rest = other.communicate(timeout=60)[1]
    assert other.returncode == 0, rest
    assert "note" not in rest  # it was said with the first plan
    assert [run["outcome"] for run in runs(atomtx_)] == ["completed"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, start: Start, atomtx_: Run, number: signal.Signals) -> None:
    """A signal ends the waiting: 130 or 143, nothing was changed, and the other run goes on."""
    first = start()
    begun(tmp_path, first)
    other = start("--wait")
    wait_for_line(other, "waiting for its end")
    other.send_signal(number)
    other.communicate(timeout=60)
    assert other.returncode == 128 + number
    assert len(runs(atomtx_)) == 1
    assert first.poll() is None
    assert len(list((tmp_path / "state" / "runs").iterdir())) == 1


@pytest.mark.parametrize("keep", ["1d", "0"])
def test_twenty_at_once(tmp_path: Path, flag: Path, start: Start, atomtx_: Run, keep: str) -> None:
    """
    Of twenty that start at once, in a new journal, each has its turn, alone.

    Also where all runs but two are forgotten once they have ended, while the others look at them.
    """
    flag.unlink()
    children = [start("--wait", "--quiet", "--keep-history", keep) for _ in range(20)]
    said = [child.communicate(timeout=300)[1] for child in children]
    failed = [s for s, child in zip(said, children, strict=True) if child.returncode]
    assert failed == []
    words = [line.split() for line in log(tmp_path).read_text().splitlines()]
    assert len(words) == 40
    for (begin, run), (end, same) in zip(words[::2], words[1::2], strict=True):
        assert (begin, end, run) == ("begun", "ended", same)
    assert len({run for _, run in words}) == 20
    assert len(runs(atomtx_)) == (20 if keep == "1d" else 2)

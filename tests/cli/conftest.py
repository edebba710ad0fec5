"""A state directory of its own, and the program run in it as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import atomtx
from atomtx import journalfile
from atomtx.statedir import RunFolder
from tests.journals import Journal

SOURCE = Path(atomtx.__file__).parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class State:
    """A state directory with a journal that has the real tables."""

    path: Path
    journal: Journal
    env: dict[str, str]

    def add_run(self, row: dict[str, Any]) -> RunFolder:
        """Write a run's row and make its folder with its lock files."""
        self.journal.add("runs", **row)
        return RunFolder.of(self.path, row["id"]).make()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "ATOMTX_STATE_DIR": str(tmp_path / "state"),
        "PYTHONPATH": str(SOURCE),
        "PYTHONWARNINGS": "error",
        "TZ": "UTC",
    }


@pytest.fixture
def state(tmp_path: Path, env: dict[str, str]) -> Iterator[State]:
    path = tmp_path / "state"
    (path / "runs").mkdir(parents=True)
    journal = Journal(path / journalfile.NAME)
    yield State(path, journal, env)
    journal.close()


@pytest.fixture
def atomtx_(env: dict[str, str]) -> Run:
    """Run `atomtx` with arguments to its end."""

    def run(*args: str, **extra: Any) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "atomtx", *args]
        options: dict[str, Any] = {"env": env, "timeout": 60, "capture_output": True, **extra}
        return subprocess.run(argv, text=True, check=False, **options)

    return run

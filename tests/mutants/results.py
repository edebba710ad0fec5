"""What was found out so far, kept so that the work of hours can be stopped and goes on."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .trial import CHECKOUT, WORK, Verdict


@dataclass(frozen=True)
class Trial:
    """A mutant, and the tests that are asked about it."""

    key: str
    files: Mapping[str, str]  # path and text of what is mutated
    tests: tuple[str, ...]
    body: str  # what is mutated, as it is then: a function, or a whole module


class Results:
    """
    The verdicts of a group.

    That a test finds a mutant holds as long as the mutated function and that test are there: a
    change beside them seldom undoes it, and each would undo the work of hours.  That none does
    holds until the module or the tests change.
    """

    def __init__(self, group: str) -> None:
        self._file = WORK / f"results-{group}.json"
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self._rows = json.loads(self._file.read_text())

    def of(self, trial: Trial) -> Verdict | None:
        """Return the verdict that still holds, if there is one."""
        tests = _tests(trial.tests)
        row = self._rows.get(trial.key)
        if row is None or row["body"] != _sha(trial.body):
            return None
        killer: str | None = row["killer"]
        if killer is not None:
            return Verdict(killer) if _is_there(killer) else None
        is_same = row["files"] == _files(trial) and row["tests"] == tests
        return Verdict(None) if is_same else None

    def note(self, trial: Trial, verdict: Verdict) -> None:
        """Keep a verdict."""
        with self._lock:
            self._rows[trial.key] = {
                "body": _sha(trial.body),
                "files": _files(trial),
                "tests": _tests(trial.tests),
                "killer": verdict.killer,
            }
            self._write()

    def forget(self, trial: Trial) -> None:
        """Take a verdict back."""
        with self._lock:
            self._rows.pop(trial.key, None)
            self._write()

    def _write(self) -> None:
        WORK.mkdir(exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self._rows, indent=0))
        new.replace(self._file)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files(trial: Trial) -> str:
    return _sha(json.dumps(sorted(trial.files.items())))


@cache
def _tests(words: tuple[str, ...]) -> str:
    """Return the tests' hash, as they were when it was first asked for: then they are copied."""
    files = [CHECKOUT / word for word in words if (CHECKOUT / word).is_file()]
    helpers = sorted((CHECKOUT / "tests").glob("*.py"))
    return _sha(" ".join(words) + "".join(file.read_text() for file in [*files, *helpers]))


def _is_there(killer: str) -> bool:
    """Tell whether the test that found it still exists; what is no test, such as a hang, does."""
    path, _, name = killer.partition("::")
    file = CHECKOUT / path
    if not name:
        return killer.startswith("(") or file.is_file()
    return file.is_file() and f"def {name.split('[')[0]}(" in file.read_text()

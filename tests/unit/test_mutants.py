"""What `make mutants` goes by: the seeded defects fit the engine, and which verdicts hold."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import results, run, trial
from tests.mutants.results import Results, Trial
from tests.mutants.seeded import trial_of, written
from tests.mutants.trial import CHECKOUT, Verdict

_TRIAL = Trial("key", {"engine/atomtx/locks.py": "whole"}, (), "body")
_KILLER = Verdict("tests/unit/test_mutants.py::test_seeded")


@pytest.mark.parametrize("mutant", written(), ids=lambda mutant: mutant["name"])
def test_seeded(mutant: dict[str, str]) -> None:
    """A seeded defect is a program, so that it is found by a test, and not for its syntax."""
    made = trial_of(mutant)
    for path, text in made.files.items():
        compile(text, path, "exec")
    files = [CHECKOUT / word for word in made.tests if word.startswith("tests/")]
    assert files
    assert all(file.exists() for file in files)
    words = " ".join(file.read_text() for file in files if file.is_file()).lower()
    likes = re.findall(r"\w+", mutant.get("like", "")) if all(f.is_file() for f in files) else []
    assert all(like in words for like in likes if like not in ("and", "or", "not"))


@pytest.mark.parametrize(
    ("status", "out", "killer"),
    [
        (0, "3 passed", None),
        (1, "FAILED tests/a.py::test_b - no\n1 failed", "tests/a.py::test_b"),
        (2, "ERROR tests/a.py - no\n1 error", "tests/a.py"),
        (-9, "no end within the time", "(no end within the time)"),
    ],
)
def test_verdict(status: int, out: str, killer: str | None) -> None:
    """A mutant is found by a test that fails, or by one that never ends."""
    assert trial._verdict(status, out) == Verdict(killer)


@pytest.mark.parametrize(
    ("status", "out"),
    [(5, "145 deselected"), (4, "ERROR: file or directory"), (1, "KeyError: 'f'")],
)
def test_no_trial(status: int, out: str) -> None:
    """Where no test ran, or the mutant was not put in, nothing is found."""
    with pytest.raises(SystemExit, match="no trial"):
        trial._verdict(status, out)


@pytest.mark.parametrize("verdict", [_KILLER, Verdict(None)], ids=["found", "not found"])
def test_verdicts(verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found stays so when other functions change; what was not is tried again."""
    monkeypatch.setattr(results, "WORK", tmp_path)
    Results("locks").note(_TRIAL, verdict)
    assert Results("locks").of(_TRIAL) == verdict
    beside = replace(_TRIAL, files={"engine/atomtx/locks.py": "whole, and more"})
    assert Results("locks").of(beside) == (verdict if verdict.killer else None)
    assert Results("locks").of(replace(_TRIAL, body="another")) is None


def test_verdict_of_a_test_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict goes with the test that found it."""
    monkeypatch.setattr(results, "WORK", tmp_path)
    Results("locks").note(_TRIAL, Verdict("tests/unit/test_mutants.py::test_of_yesterday"))
    assert Results("locks").of(_TRIAL) is None


def test_stale_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A survivor that the engine's text does not have any more is told: its reason would rot."""
    gone = "locks.is_held: a -> b"
    monkeypatch.setattr(run, "listed", lambda: dict.fromkeys(["locks.there", gone, "moment.x"]))
    assert run.stale("locks", [replace(_TRIAL, key="locks.there")]) == [gone]

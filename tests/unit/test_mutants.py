"""What `make mutants` goes by: the seeded defects fit the engine, and which verdicts hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import results, run
from tests.mutants.results import Results, Trial
from tests.mutants.seeded import trial_of, written
from tests.mutants.trial import Verdict

_TRIAL = Trial("key", {"engine/atomtx/locks.py": "whole"}, (), "body")
_KILLER = Verdict("tests/unit/test_mutants.py::test_seeded")


@pytest.mark.parametrize("mutant", written(), ids=lambda mutant: mutant["name"])
def test_seeded(mutant: dict[str, str]) -> None:
    """A seeded defect is a program, so that it is found by a test, and not for its syntax."""
    trial = trial_of(mutant)
    for path, text in trial.files.items():
        compile(text, path, "exec")
    assert trial.tests


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

"""The defects that `make mutants` seeds: each fits the engine as it is now."""

from __future__ import annotations

import pytest

from tests.mutants.results import Trial
from tests.mutants.seeded import seeded


@pytest.mark.parametrize("trial", seeded(), ids=lambda trial: trial.key)
def test_seeded(trial: Trial) -> None:
    """A seeded defect is a program, so that it is found by a test, and not for its syntax."""
    for path, text in trial.files.items():
        compile(text, path, "exec")
    assert trial.tests

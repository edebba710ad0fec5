"""The defects that `make mutants` seeds: each fits the engine as it is now."""

from __future__ import annotations

import pytest

from tests.mutants.seeded import trial_of, written


@pytest.mark.parametrize("mutant", written(), ids=lambda mutant: mutant["name"])
def test_seeded(mutant: dict[str, str]) -> None:
    """A seeded defect is a program, so that it is found by a test, and not for its syntax."""
    trial = trial_of(mutant)
    for path, text in trial.files.items():
        compile(text, path, "exec")
    assert trial.tests

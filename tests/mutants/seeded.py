"""Mutants that were made by hand: seeded.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

from .results import Trial
from .trial import CHECKOUT

_FILE = Path(__file__).with_name("seeded.toml")


def seeded() -> list[Trial]:
    """Return them; a text that is not in the engine, or more than once, is an error."""
    return [trial_of(mutant) for mutant in written()]


def written() -> list[dict[str, str]]:
    """Return what the file holds."""
    found: list[dict[str, str]] = tomllib.loads(_FILE.read_text())["mutant"]
    return found


def trial_of(mutant: dict[str, str]) -> Trial:
    """Put a defect into the engine's text; SystemExit where it does not fit."""
    path = f"engine/atomtx/{mutant['in']}"
    text = (CHECKOUT / path).read_text()
    if text.count(mutant["old"]) != 1:
        raise SystemExit(f"{_FILE}: {mutant['name']}: its text is not once in {path}")
    changed = text.replace(mutant["old"], mutant["new"])
    tests = (*mutant["tests"].split(), *(("-k", mutant["like"]) if "like" in mutant else ()))
    name = f"{mutant['name']} (promise {mutant['promise']})"
    return Trial(name, {path: changed}, tests, changed)

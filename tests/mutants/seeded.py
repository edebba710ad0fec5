"""Mutants that were made by hand: seeded.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

from .results import Trial
from .trial import CHECKOUT

_FILE = Path(__file__).with_name("seeded.toml")


def seeded() -> list[Trial]:
    """Return them; a text that is not in the engine, or more than once, is an error."""
    return [_trial(mutant) for mutant in tomllib.loads(_FILE.read_text())["mutant"]]


def _trial(mutant: dict[str, str]) -> Trial:
    path = f"engine/atomtx/{mutant['in']}"
    text = (CHECKOUT / path).read_text()
    if text.count(mutant["old"]) != 1:
        raise SystemExit(f"{_FILE}: {mutant['name']}: its text is not once in {path}")
    changed = text.replace(mutant["old"], mutant["new"])
    tests = (*mutant["tests"].split(), *(("-k", mutant["like"]) if "like" in mutant else ()))
    return Trial(f"{mutant['name']} (promise {mutant['promise']})", {path: changed}, tests)

"""How much the tests try: a sample, or with ATOMTX_CRASH=full everything that takes hours."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

FULL = os.environ.get("ATOMTX_CRASH") == "full"
_T = TypeVar("_T")


def some(things: Sequence[_T], count: int, *, seed: int = 2026) -> Sequence[_T]:
    """Return *count* of the things, from all parts of them; always the same, or in full all."""
    if FULL:
        return things
    return [things[n] for n in spread(random.Random(seed), len(things), count)]


def spread(rng: random.Random, length: int, count: int) -> list[int]:
    """Choose *count* numbers below *length*, one at random in each part of it; at most all."""
    count = min(count, length)
    return [int((n + rng.random()) * length / count) for n in range(count)]

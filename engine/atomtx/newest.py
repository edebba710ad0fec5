"""The newest kept snapshot of each dataset, and where its files are seen.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import wanted
from .inventory import Inventory, Unfit
from .names import Snapshot
from .volumes.kind import Kept
from .wanted import Wanted


@dataclass(frozen=True)
class Frozen:
    """A kept snapshot, and where it is seen."""

    snapshot: str
    created_s: int
    live: str  # the mountpoint of its dataset
    path: str  # of the frozen files, which ZFS mounts when somebody looks


@dataclass(frozen=True)
class Unseen:
    """A dataset whose newest kept snapshot nobody can read, or that has none."""

    name: str
    reason: str
    hint: str
    is_named: bool  # by the user, not found below what was

    def __str__(self) -> str:
        return f"{self.name} is left out: {self.reason}"


def choose(
    found: Wanted, there: Iterable[Kept], inventory: Inventory
) -> tuple[tuple[Frozen, ...], tuple[Unseen, ...]]:
    """
    Return for each dataset its newest snapshot that bears a mark of its own, and what has none.

    Copies do not count.  What holds others together and has no files is passed over, but where
    the user has named it.
    """
    kept_of = wanted.newest(filter(_counts, there))
    frozen, unseen = [], []
    for facts in found.datasets:
        place, is_named = inventory.judge(facts), facts.name in found.asked
        if isinstance(place, Unfit):
            if is_named or not (place.is_container or facts.type != "filesystem"):
                unseen.append(Unseen(facts.name, place.reason, place.remedy, is_named))
        elif facts.name in kept_of:
            kept = kept_of[facts.name]
            name = Snapshot.parse(kept.name).name
            path = f"{place.rstrip('/')}/.zfs/snapshot/{name}"
            frozen.append(Frozen(kept.name, kept.creation_s, place, path))
        else:
            hint = f"`atomtx snap {facts.name}` takes one"
            unseen.append(Unseen(facts.name, "it has no kept snapshot", hint, is_named))
    return tuple(frozen), tuple(unseen)


def _counts(each: Kept) -> bool:
    return bool(each.keeper) and not each.is_copy

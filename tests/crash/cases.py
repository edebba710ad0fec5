"""
Which cases a sweep goes through: derived from what a recorded run passed, never written by hand.

A case is what sweep.py takes.  A new intent brings its points and its system calls along.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Case = dict[str, Any]

PERSISTING = (
    *("pwrite64", "write", "fsync", "fdatasync", "ftruncate", "fallocate"),
    *("unlink", "rename", "mkdir", "rmdir", "mount", "umount2"),
)
SPAWNING = ("unshare", "vfork", "clone", "socketpair", "pidfd_open", "pidfd_send_signal")
# What a full disk says no to.
FILLING = ("pwrite64", "write", "fsync", "ftruncate", "fallocate", "mkdir", "rename")
CALLS = ",".join((*PERSISTING, *SPAWNING))
# On either side of these nothing has changed: P1 tries them, the pairs of P4 do without.
_LOOKS = (
    *("zpool list", "zfs list", "zfs get", "lvs", "blkid", "prepare folder", "upgrade journal"),
    *("make folder", "forget runs"),
)


_AT_WORK = "journal:backing-up#1"
# What the runner does in its namespace is gone with it, and the worst way to die is with it.
_OF_NAMESPACE = ("enter", "mount", "btrfs mount")


def case(level: str, scenario: str, run: Mapping[str, str], **more: Any) -> Case:
    """Return a case, with an id that says what it is."""
    words = [level, scenario, _words(run)]
    if "recover" in more:
        words.append(f"then {_words(more['recover'])}")
    return {"id": " ".join(filter(None, words)), "scenario": scenario, "run": dict(run), **more}


def _words(wish: Mapping[str, str]) -> str:
    return " ".join(str(value) for value in wish.values())


def kills(points: Sequence[str]) -> Iterator[dict[str, str]]:
    """
    Yield every way to be killed at a point of a command that passed *points*.

    The front end alone; where a runner lives, the front end with all of the run, as by a power
    cut without the loss of what was not flushed, and the runner alone.
    """
    begun = "start:runner#1" in points
    alive = False
    for point in points:
        alive = (alive or point == "start:runner#1") and not point.startswith("journal:unmount")
        yield {"at": point, "who": "front"}
        if alive and begun:
            yield {"at": point, "who": "all"}
        if point.startswith("journal:backing-up#"):
            yield {"at": point, "who": "runner"}


def changing(wish: Mapping[str, str]) -> bool:
    """Tell whether the machine is another one at a point than at the one before it."""
    kind, _, name = wish["at"].removeprefix("runner:").partition(":")
    what = name.partition("#")[0]
    if what in _LOOKS or kind == "before":
        return False
    if wish["at"].startswith("runner:") and what in _OF_NAMESPACE:
        return False
    in_process = not what.startswith(("zfs", "runner", "client"))
    return not (kind == "start" and in_process)


def worst(wishes: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """
    Yield one way to die for each point at which the machine has changed: the worst one.

    And once the front end alone, while the client reads: that run's recovery finds it at work.
    """
    ways = {wish["at"]: dict(wish) for wish in wishes if changing(wish) and wish["who"] != "runner"}
    yield from ways.values()  # "all" comes after "front"
    if ways.get(_AT_WORK, {}).get("who") == "all":
        yield {"at": _AT_WORK, "who": "front"}


def injections(calls: Sequence[str], of: str, many: int = 100) -> Iterator[dict[str, str]]:
    """
    Yield every way to have one of *calls* kill the process *of*, or fail.

    Where a process writes *many* pages, every fifth write fails, but each kills:
    test_journal_calls.py has every write of a journal fail.
    """
    for name, times in sorted(Counter(calls).items()):
        actions = ["signal=KILL", "error=EIO" if name in PERSISTING else "error=EAGAIN"]
        actions += ["error=ENOSPC"] * (name in FILLING)
        for action in actions:
            step = 5 if name == "pwrite64" and "error" in action and times > many else 1
            for n in range(1, times + 1, step):
                yield {"inject": f"{name}:{action}:when={n}", "of": of}


def sample(cases: Iterable[Case], count: int, seed: int) -> list[Case]:
    """Return *count* of the cases, always the same for a seed."""
    known = list(cases)
    return random.Random(seed).sample(known, min(count, len(known)))

"""
A sample of the crash sweep; `make crash-full` has all of it (full.py).

Every case is derived from what a recorded run passed.  After each, recover settles; then nothing
is left or lost, and what is said to be done is done (stage.py, `check`).
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.crash.bystanders import _NEVER_LOADED, bystanders
from tests.crash.cases import Case, injections, sample
from tests.crash.field import Field, violations
from tests.crash.full import module_of
from tests.vm.machine import CHECKOUT

SEED = int(os.environ.get("ATOMTX_CRASH_SEED", "2026"))


def _cases(field: Field, level: str, scenario: str) -> list[Case]:
    if level == "P1":
        return field.first(scenario)
    return [c for c in field.injected(scenario) if c["id"].startswith(level)]


@pytest.mark.parametrize(
    ("level", "scenario", "count"),
    [
        ("P1", "namespace", 7),
        *(pytest.param("P1", s, 4, marks=pytest.mark.full) for s in ("tree", "hooked", "mixed")),
        *(("P2", "namespace", 3), ("P3", "namespace", 4)),
    ],
)
def test_disturbed_once(field: Field, level: str, scenario: str, count: int) -> None:
    """P1: killed at a point. P2: killed by a system call. P3: a system call fails."""
    results = field.play(sample(_cases(field, level, scenario), count, SEED))
    assert violations(results) == []
    assert any(result.outcome == "completed" for result in results)
    if level != "P3":
        fronts = [r for r in results if " front" in r.id and " runner:" not in r.id]
        assert fronts
        assert all(any(e[1] == -9 for e in r.ended) for r in fronts)


@pytest.mark.parametrize(
    ("scenario", "count"), [("namespace", 4), pytest.param("mixed", 3, marks=pytest.mark.full)]
)
def test_recovery_is_disturbed_too(field: Field, scenario: str, count: int) -> None:
    """P4: a run is killed, its recovery is killed, and the next one settles it."""
    runs = sample(field.first(scenario), count - 2, SEED)
    field.play(runs)
    cases = [case for run in runs for case in field.again(run)]
    results = field.play(sample(cases, count, SEED))
    assert violations(results) == []
    assert len(results) == count
    assert all([each[1] for each in r.ended[:2]] == [-9, -9] for r in results)


@pytest.mark.parametrize(
    "scenario", ["namespace", *(pytest.param(s, marks=pytest.mark.full) for s in ("tree", "mixed"))]
)
def test_points_are_found(field: Field, scenario: str) -> None:
    """Every state of a run, every program and every mount of it has its points."""
    points = field.points(scenario)
    for state in ("planned", "snapshotted", "mounted", "backing-up", "unmounting", "destroyed"):
        assert {f"before:{state}#1", f"journal:{state}#1"} <= set(points)
    assert {"start:zfs snapshot#1", "end:zfs program#1", "runner:end:mount#2"} <= set(points)


def test_bystanders() -> None:
    """What is said to be loaded by no case is there, and is nothing of a run or its recovery."""
    engine = Path(CHECKOUT, "engine")
    modules = {module_of(file.relative_to(engine)) for file in engine.rglob("*.py")}
    assert all(any(fnmatchcase(m, pattern) for m in modules) for pattern in _NEVER_LOADED)
    beside = bystanders(modules)
    assert "atomtx.clients.borg" in beside
    assert beside.isdisjoint({"atomtx.executor", "atomtx.recovery", "atomtx.cli.backup"})


def test_calls_are_counted() -> None:
    """One case for each occurrence of a call, and for each way in which it can go wrong."""
    found = [wish["inject"] for wish in injections(["mkdir", "vfork", "mkdir"], "front")]
    assert found == [
        *(f"mkdir:{how}:when={n}" for how in ("signal=KILL", "error=EIO") for n in (1, 2)),
        *(f"mkdir:error=ENOSPC:when={n}" for n in (1, 2)),
        "vfork:signal=KILL:when=1",
        "vfork:error=EAGAIN:when=1",
    ]

"""`atomtx stop` as it is typed, of runs that are at work on played pools: it is for good."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from atomtx import locks
from tests.cli.test_steps import (
    DATASET,
    WAITS,
    Start,
    Typed,
    configured,
    open_runs,
    played,
    scene,
    start,
    typed,
)
from tests.cli.test_waiting import wait_for_line
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups")

__all__ = ["played", "scene", "start", "typed"]  # the fixtures


def at_work(scene: Scene, child: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    """Wait until the client is at work; return what is open, by its verb."""
    assert locks.wait_until((scene.home / "at-work").exists, 60)
    assert child.poll() is None
    return {run["verb"]: run for run in open_runs(scene)}


def check_undone(scene: Scene) -> None:
    """Check that every run was given up, and that no step was begun after it."""
    assert {run["outcome"] for run in scene.rows("SELECT * FROM runs")} == {"rolled-back"}
    assert open_runs(scene) == []
    assert scene.pool["snapshots"] == {}


def test_kept(scene: Scene, typed: Typed, start: Start) -> None:
    """What SIGTERM would keep for `recover` is undone as well, and a client is not begun again."""
    scene.behave(WAITS)
    front = start("backup", DATASET, "--command", scene.client, "--on-stop", "keep")
    run = at_work(scene, front)["backup"]
    done = typed("stop", run["id"])
    assert done.returncode == 0, done.stderr
    assert front.wait(60) == 143
    check_undone(scene)


def test_adopted(scene: Scene, typed: Typed, start: Start) -> None:
    """Who only waits for the client of a killed front end lets go, and the client is ended."""
    scene.behave(WAITS)
    front = start("backup", DATASET, "--command", scene.client)
    run = at_work(scene, front)["backup"]
    front.kill()
    front.wait()
    waiting = start("recover")
    wait_for_line(waiting, "waiting for its end")
    done = typed("stop", run["id"])
    assert done.returncode == 0, done.stderr
    assert waiting.wait(60) == 143
    check_undone(scene)


@pytest.mark.parametrize("which", ["run", "backup"])
@pytest.mark.parametrize("step", ["backup", "backup --on-stop undo"])
def test_kept_steps(scene: Scene, typed: Typed, start: Start, which: str, step: str) -> None:
    """The run of steps is given up with the run of its step, whichever of them is named."""
    scene.behave(WAITS)
    config = configured(scene, step, "snap")
    front = start("run", "home", "--on-stop", "keep", *config)
    done = typed("stop", at_work(scene, front)[which]["id"])
    assert done.returncode == 0, done.stderr
    assert front.wait(60) == 143
    check_undone(scene)

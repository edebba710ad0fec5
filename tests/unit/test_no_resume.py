"""`recover --no-resume`: what is done of a run without its client and its repository."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from atomtx.intents import AFTER_SUCCESS, AROUND_RUN, RunHook
from atomtx.settling import LEFT, Patience
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
DATASET = "tank/a"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


def test_left(scene: Scene) -> None:
    """A run that can go on is left with its moment, whatever is asked twice; then it goes on."""
    scene.backup(scene.plan(DATASET), "journal:backing-up#1", "all")
    before = scene.pool["snapshots"]
    for _ in range(2):
        assert scene.recover(may_resume=False).decisions == [LEFT]
        assert scene.pool["snapshots"] == before
    assert len(before) == 1
    ended = scene.recover()
    assert ended.run
    assert ended.run.outcome == "completed"
    assert scene.left() == []


def test_hooks_undone(scene: Scene) -> None:
    """The hooks of a run that is left are undone: what they stopped runs again at once."""
    undo = ("sh", "-c", f"echo undone >> {scene.home}/undone")
    hooks = (RunHook(AROUND_RUN, ("true",), undo, 60),)
    scene.backup(scene.plan(DATASET, hooks=hooks), "journal:backing-up#1", "all")
    assert not (scene.home / "undone").exists()
    assert scene.recover(may_resume=False).decisions == [LEFT]
    assert (scene.home / "undone").read_text() == "undone\n"


def test_cleaned(scene: Scene) -> None:
    """A run whose client has ended is cleaned up, and one without a snapshot is rolled back."""
    for point in ("journal:unmounting#1", "journal:planned#1"):
        scene.backup(scene.plan(DATASET), point, "all")
        ended = scene.recover(may_resume=False)
        assert ended.run
        assert ended.run.state == "destroyed"
        assert scene.left() == []


def test_end_needs_more(scene: Scene) -> None:
    """Hooks of the end may need a network: such a run is left for later, though it has ended."""
    hooks = (RunHook(AFTER_SUCCESS, ("touch", f"{scene.home}/told"), (), 60),)
    scene.backup(scene.plan(DATASET, hooks=hooks), "journal:unmounting#1", "all")
    assert scene.recover(may_resume=False).decisions == [LEFT]
    assert not (scene.home / "told").exists()
    scene.recover()
    assert (scene.home / "told").exists()
    assert scene.left() == []


def test_stopped(scene: Scene) -> None:
    """With `--stop` a client that lives is stopped, and its moment is kept."""
    scene.behave(f"test -e {scene.home}/again || {{ touch {scene.home}/again; sleep 60; }}")
    scene.backup(scene.plan(DATASET, grace_s=5), "journal:backing-up#1", "front later", delay_s=1)
    ended = scene.recover(may_resume=False, patience=Patience.STOP)
    assert ended.decisions == [LEFT]
    assert len(scene.pool["snapshots"]) == 1
    ended = scene.recover()
    assert ended.run
    assert (ended.run.outcome, ended.run.attempts) == ("completed", 2)
    assert scene.left() == []

"""Where nothing can be planned, what is left of the job lets go of what its hooks have stopped."""

from __future__ import annotations

import json
import os

import pytest

from tests.cli.test_steps import DATASET, Typed, open_runs, played, scene, typed
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups")

__all__ = ["played", "scene", "typed"]  # the fixtures


def configured(scene: Scene, dataset: str) -> tuple[str, str]:
    """Write a job whose hooks leave a mark of what is stopped; return the option for the file."""
    stopped = str(scene.home / "stopped")
    values = {
        "volumes": [dataset],
        "command": [scene.client],
        "pre-hook": ["touch", stopped],
        "post-hook": ["rm", "-f", stopped],
        "snap-pattern": "s-%Y%m%d%H%M%S",
    }
    path = scene.home / "atomtx.toml"
    path.write_text(
        "[jobs.home]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
    )
    path.chmod(0o600)
    return ("--config", str(path))


@pytest.mark.parametrize("point", ["journal:backing-up#1", "journal:snapshotted#1"])
def test_hooks(scene: Scene, typed: Typed, point: str) -> None:
    """A killed run's hooks are undone, its moment is kept for `recover`; the error stands."""
    killed = typed("backup", "home", *configured(scene, DATASET), AT=point, WHO="all")
    assert (killed.returncode, (scene.home / "stopped").exists()) == (-9, True), killed.stderr
    (left,) = open_runs(scene)
    moment = list(scene.pool["snapshots"])
    done = typed("backup", "home", *configured(scene, "tank/gone"))
    assert done.returncode == 2
    assert "tank/gone" in done.stderr
    assert not (scene.home / "stopped").exists()
    assert f"run {left['id']} of this job is unfinished: `atomtx recover`" in done.stderr
    assert list(scene.pool["snapshots"]) == moment
    settled = typed("recover")
    assert settled.returncode == 0, settled.stderr
    assert (open_runs(scene), scene.pool["snapshots"]) == ([], {})


def test_needs_no_client(scene: Scene, typed: Typed) -> None:
    """What can be ended without the client is: a killed snap, whose snapshots are there."""
    at = "journal:snapshotted#1"
    assert typed("snap", "--job", "home", *configured(scene, DATASET), AT=at).returncode == -9
    (left,) = open_runs(scene)
    done = typed("snap", "--job", "home", *configured(scene, "tank/gone"))
    assert (done.returncode, open_runs(scene)) == (2, []), done.stderr
    assert f"run {left['id']} of this job: completed" in done.stderr

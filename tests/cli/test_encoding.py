"""A path is the same bytes whatever encoding the locale has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_steps import DATASET, configured, played, typist
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root takes snapshots")

# The encoding of file names is then ASCII, wherever the test runs; one of Latin-1 is not
# installed everywhere.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    home = tmp_path / "jürgen"
    home.mkdir()
    scene = played(home)
    yield scene
    scene.close()


def test_backup(scene: Scene) -> None:
    """A volume and a client below a directory that is not ASCII: backed up, and journaled so."""
    typed = typist(scene)
    config = configured(scene)
    done = typed("backup", "home", *config, **ASCII)
    assert done.returncode == 0, done.stderr
    assert scene.copies() == ["one"]
    assert [call[-1] for call in scene.calls()] == [str(scene.live(DATASET))]
    (plan,) = scene.rows("SELECT plan FROM runs")
    assert scene.client in json.loads(plan["plan"])["client"]["command"]

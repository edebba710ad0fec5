"""`atomtx sure scan-kept` as it is typed, on pools and mounts that are only played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atomtx.integrity import places
from tests.cli.conftest import SOURCE
from tests.cli.test_from_snapshots import _PROGRAM
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root takes snapshots")

PROGRAM = _PROGRAM.replace("preparing.mountinfo = ", "sure_scan.mountinfo = ").replace(
    "from atomtx import cli, preparing, process",
    "from atomtx import cli, process\nfrom atomtx.cli import sure_scan",
)
SETS = ("tank/a", "tank/b")
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path)
    for name in (*SETS, "tank/vol"):
        scene.live(name).mkdir(parents=True)
    kinds = {**dict.fromkeys(SETS, "filesystem"), "tank/vol": "volume"}
    scene.play(pools={"tank": "guid of tank"}, datasets=kinds)
    return scene


@pytest.fixture
def typed(scene: Scene) -> Typed:
    def run(*words: str, mounted: tuple[str, ...] = SETS) -> subprocess.CompletedProcess[str]:
        own = {
            "ATOMTX_STATE_DIR": str(scene.state),
            "FAKE_ZFS": str(scene.home),
            "DATASETS": " ".join(mounted),
            "PYTHONPATH": os.pathsep.join((str(SOURCE), str(SOURCE.parent))),
        }
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            cwd="/",
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def snap(scene: Scene, typed: Typed, text: str, *words: str) -> str:
    """Keep a moment whose files have a text, and show it where ZFS would; return its name."""
    scene.play(now=scene.pool["now"] + 60)
    before = set(scene.pool["snapshots"])
    words = ("snap", "-a", "--pattern", "s-%Y%m%d%H%M%S", *words)
    while (done := typed(*words)).returncode == 2:  # still the same second
        assert "there is a snapshot" in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    names = set(scene.pool["snapshots"]) - before
    (name,) = {str(each.partition("@")[2]) for each in names}
    for each in (n for n in names if "vol" not in n):
        folder = scene.live(each.partition("@")[0]) / ".zfs/snapshot" / name
        folder.mkdir(parents=True)
        (folder / "file").write_text(f"{text} {each}")
    return name


def generations(typed: Typed, scene: Scene, dataset: str) -> list[str]:
    """Return which snapshots the generations of a dataset's tree are of."""
    done = typed("sure", "list", str(scene.live(dataset)), "--json")
    assert done.returncode == 0, done.stderr
    return [Path(each["path"]).name for each in json.loads(done.stdout)]


def test_course(scene: Scene, typed: Typed) -> None:
    """The newest of each, once; the volume that has no files is passed over in silence."""
    snap(scene, typed, "one")
    newest = snap(scene, typed, "two")
    done = typed("sure", "scan-kept", "-a")
    assert done.returncode == 0, done.stderr
    assert "vol" not in done.stderr
    assert [generations(typed, scene, each) for each in SETS] == [[newest], [newest]]
    again = typed("sure", "scan-kept", "-a")
    assert again.stderr.count("generation 1 is of it already") == 2
    third = snap(scene, typed, "three")
    assert typed("sure", "scan-kept", "tank/a", "--quiet").stderr == ""
    assert generations(typed, scene, "tank/a") == [newest, third]
    assert generations(typed, scene, "tank/b") == [newest]
    full = typed("sure", "scan-kept", "tank/a", "--full", "--json")
    (scan,) = json.loads(full.stdout.splitlines()[-1])["scans"]
    assert (scan["snapshot"], scan["generation"]) == (f"tank/a@{third}", 3)


def test_transient(scene: Scene, typed: Typed) -> None:
    """One that is meant to go again is a moment as any other."""
    snap(scene, typed, "one")
    name = snap(scene, typed, "two", "--transient")
    assert typed("sure", "scan-kept", "tank/a").returncode == 0
    assert generations(typed, scene, "tank/a") == [name]


def test_another_of_its_name(scene: Scene, typed: Typed) -> None:
    """A snapshot that is younger than the generation of its path is another one."""
    name = snap(scene, typed, "one")
    assert typed("sure", "scan-kept", "tank/a").returncode == 0
    snapshots = scene.pool["snapshots"]
    snapshots[f"tank/a@{name}"]["creation"] = str(2**32)
    scene.play(snapshots=snapshots)
    assert typed("sure", "scan-kept", "tank/a").returncode == 0
    assert generations(typed, scene, "tank/a") == [name, name]


def test_empty(scene: Scene, typed: Typed) -> None:
    """A moment that is empty, and was not, is refused unless it is allowed."""
    snap(scene, typed, "one")
    assert typed("sure", "scan-kept", "tank/a").returncode == 0
    name = snap(scene, typed, "two")
    (scene.live("tank/a") / ".zfs/snapshot" / name / "file").unlink()
    done = typed("sure", "scan-kept", "tank/a")
    assert done.returncode == 2
    assert "empty" in done.stderr
    assert typed("sure", "scan-kept", "tank/a", "--allow-empty").returncode == 0


def test_left_out(scene: Scene, typed: Typed) -> None:
    """What is not mounted, or has none, is named; it is an error where the user named it."""
    snap(scene, typed, "one")
    done = typed("sure", "scan-kept", "-a", mounted=SETS[:1])
    assert done.returncode == 3
    assert "tank/b is left out: ZFS says that it is mounted, but it is not" in done.stderr
    done = typed("sure", "scan-kept", "tank/b", mounted=SETS[:1])
    assert done.returncode == 2
    assert "tank/b cannot be scanned: " in done.stderr
    snapshots = scene.pool["snapshots"]
    for each in snapshots.values():
        each["kept"] = None
    scene.play(snapshots=snapshots)
    done = typed("sure", "scan-kept", "-a")
    assert done.returncode == 2
    assert "tank/a cannot be scanned: it has no kept snapshot" in done.stderr
    assert "`atomtx snap tank/a` takes one" in done.stderr


def test_never_filled(scene: Scene, typed: Typed) -> None:
    """A database that a first scan was killed in, before it had tables, is filled by the next."""
    name = snap(scene, typed, "one")
    file = places.database_of(scene.state, scene.live("tank/a"))
    file.parent.mkdir(parents=True)
    file.touch()
    done = typed("sure", "scan-kept", "tank/a")
    assert done.returncode == 0, done.stderr
    assert generations(typed, scene, "tank/a") == [name]


def test_others_go_on(scene: Scene, typed: Typed) -> None:
    """A dataset that cannot be scanned is told, those after it are scanned; the worst counts."""
    name = snap(scene, typed, "one")
    file = places.database_of(scene.state, scene.live("tank/a"))
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else" * 1000)
    done = typed("sure", "scan-kept", "-a", "--quiet")
    assert done.returncode == 1
    assert f"tank/a@{name}: the integrity database {file} is damaged" in done.stderr
    assert "move it away" in done.stderr
    assert generations(typed, scene, "tank/b") == [name]
    again = typed("sure", "scan-kept", "-a", "--json")
    result = json.loads(again.stdout.splitlines()[-1])
    assert (again.returncode, result["exit_status"]) == (1, 1)
    assert [scan["exit_status"] for scan in result["scans"]] == [1, 0]
    assert "is damaged" in result["scans"][0]["error"]

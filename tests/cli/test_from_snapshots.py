"""`atomtx backup --from-snapshots` as it is typed, on pools and mounts that are only played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts snapshots")

# Whole but for the pools, and for the mounts of the datasets that the planner sees.
_PROGRAM = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from atomtx import cli, preparing, process
from atomtx.mounts import mountinfo, namespace
from tests import fakemount, fakezfs
from tests.vm.points import Crash, fork_runner
home = Path(os.environ["FAKE_ZFS"])
fakezfs.HOME = str(home)
process.BASE_ENVIRONMENT |= {
    "PATH": f"{home}/bin:{process.BASE_ENVIRONMENT['PATH']}", "FAKE_ZFS": str(home)
}
namespace.mount = fakemount.mount
def read():
    table = mountinfo.read()
    above = table.containing(str(home)).id
    names = os.environ["DATASETS"].split()
    return mountinfo.Table([*table, *(
        mountinfo.Entry(10**6 + n, above, f"0:{9000 + n}", "/", f"{home}/live/{name}", "rw", (),
            "zfs", name, "rw")
        for n, name in enumerate(names)
    )])
preparing.mountinfo = SimpleNamespace(
    read=read, Table=mountinfo.Table, containing=mountinfo.containing
)
fork_runner(Crash(home / "points"))
cli.main()
"""
SETS = ("tank/a", "tank/b")
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path)
    for name in SETS:
        scene.live(name).mkdir(parents=True)
    kinds = dict.fromkeys(SETS, "filesystem")
    scene.play(pools={"tank": "guid of tank"}, datasets=kinds)
    return scene


@pytest.fixture
def typed(scene: Scene) -> Typed:
    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        own = {
            "ATOMTX_STATE_DIR": str(scene.state),
            "FAKE_ZFS": str(scene.home),
            "DATASETS": " ".join(SETS),
            "PYTHONPATH": os.pathsep.join((str(SOURCE), str(SOURCE.parent))),
        }
        return subprocess.run(
            [sys.executable, "-c", _PROGRAM, *words],
            cwd="/",  # elsewhere `cp --parents` fails on two paths of one parent
            env={**os.environ, **own, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def snap(scene: Scene, typed: Typed, text: str, *datasets: str) -> None:
    """Keep a moment of *datasets* whose files have a text; its name tells the second."""
    scene.write(text, *SETS)
    scene.play(now=scene.pool["now"] + 60)
    words = ("snap", *datasets, "--pattern", "s-%Y%m%d%H%M%S")
    while (done := typed(*words)).returncode == 2:  # still the same second
        assert "there is a snapshot" in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def kept(scene: Scene) -> list[tuple[str, str | None, list[str]]]:
    there = scene.pool["snapshots"]
    return [(name, there[name]["kept"], there[name]["holds"]) for name in sorted(there)]


def test_course(scene: Scene, typed: Typed) -> None:
    """What is typed, in its order: what would be done, portions, and nothing left to do."""
    snap(scene, typed, "one", *SETS)
    snap(scene, typed, "two", "tank/b")
    snap(scene, typed, "three", *SETS)
    before = kept(scene)
    words = ("backup", *SETS, "--command", scene.client, "--from-snapshots")
    dry = typed(*words, "--limit", "2", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    lines = dry.stdout.splitlines()
    assert [line.rpartition("  ")[2] for line in lines[:2]] == ["would be saved"] * 2
    assert "  2026-07-25 17:21:00 UTC  2 datasets  " in lines[0]
    assert lines[2] == "  tank/a is not in the backup: no kept snapshot of that moment"
    assert lines[3].endswith("2 datasets  left for later")
    assert lines[4] == "3 kept moments: 2 would be saved, 1 would be left for later"
    assert scene.copies() == []
    done = typed(*words, "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert scene.copies() == ["one one", "two"]
    assert "note: 1 kept moment to be saved by the next" in done.stderr
    runs = json.loads(typed("history", "--json").stdout)
    saved = [run for run in runs if run["verb"] == "backup"]
    assert {(run["outcome"], run["label"]) for run in saved} == {("completed", "tank/a, tank/b")}
    assert len({run["job"] for run in saved}) == 1
    listed = json.loads(typed(*words, "--dry-run", "--json").stdout.splitlines()[-1])["moments"]
    assert [each["saved_by"] for each in listed] == [saved[1]["id"], saved[0]["id"], None]
    assert [each["would_be_saved"] for each in listed] == [False, False, True]
    assert typed(*words).returncode == 0
    assert scene.copies()[2:] == ["three three"]
    again = typed(*words)
    assert (again.returncode, "nothing to save: 3 kept" in again.stderr) == (0, True)
    assert len(scene.copies()) == 3
    assert kept(scene) == before
    assert typed("journal", "check").returncode == 0


def test_failed(scene: Scene, typed: Typed) -> None:
    """After a failed moment none is begun; how many are left is told."""
    for text in ("one", "two"):
        snap(scene, typed, text, *SETS)
    scene.behave("exit 1")
    done = typed("backup", *SETS, "--command", scene.client, "--from-snapshots")
    assert done.returncode == 1
    assert "note: 2 kept moments to be saved by the next" in done.stderr
    assert len(scene.calls()) == 1
    assert {tuple(holds) for _, _, holds in kept(scene)} == {()}


def test_gone_meanwhile(scene: Scene, typed: Typed) -> None:
    """A moment that somebody destroys while one before it is saved is told; the rest is saved."""
    for text in ("one", "two", "three"):
        snap(scene, typed, text, *SETS)
    gone = sorted(name for name in scene.pool["snapshots"] if name.startswith("tank/a@"))[1]
    pool = str(scene.home / "pool.json")
    code = f"import json; p = json.load(open({pool!r})); p['snapshots'].pop({gone!r}, 0)"
    scene.behave(f"python3 -c \"{code}; json.dump(p, open({pool!r}, 'w'))\"\n")
    done = typed("backup", *SETS, "--command", scene.client, "--from-snapshots")
    assert done.returncode == 3, done.stderr
    assert f"is not saved: {gone} was destroyed meanwhile" in done.stderr
    assert scene.copies() == ["one one", "three three"]


def jobs(scene: Scene, **of_jobs: str) -> str:
    """Write a configuration with jobs of both datasets, each with its own further lines."""
    path = scene.home / "atomtx.toml"
    common = f"volumes = {json.dumps(SETS)}\ncommand = {json.dumps([scene.client])}\n"
    keys = 'snap-pattern = "s-%Y%m%d%H%M%S"\nsnap-keep = ["--keep-last", "1"]\n'
    heads = (f"[jobs.{name}]\n{common}{keys}{more}\n" for name, more in of_jobs.items())
    path.write_text("".join(heads))
    path.chmod(0o600)
    return str(path)


def test_keep_until_saved(scene: Scene, typed: Typed) -> None:
    """What no rule keeps goes once the job has saved it, and every other one that is named."""
    config = ("--config", jobs(scene, home="keep-until-saved = true", far=""))
    for text in ("one", "two", "three"):
        snap(scene, typed, text, *SETS)
    there = [name for name, *_ in kept(scene)]
    dry = typed("prune", "home", *config, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.splitlines()[1].endswith("  keep     not saved in home")
    assert dry.stdout.endswith("6 kept snapshots: 6 stay (4 until saved), 0 would be destroyed\n")
    assert typed("prune", "home", *config).returncode == 0
    assert [name for name, *_ in kept(scene)] == there
    assert typed("backup", "home", *config, "--from-snapshots", "--limit", "1").returncode == 0
    both = typed("prune", "home", *config, "--saved-in", "far")
    assert "nothing to prune: 6 kept snapshots stay (4 until saved)" in both.stderr
    listed = typed("prune", "home", *config, "--saved-in", "far", "--dry-run", "--json").stdout
    result = json.loads(listed.splitlines()[-1])
    assert result["waiting"] == 4
    assert [each["unsaved_in"] for each in result["snapshots"]] == [
        ["home", "far"], ["home", "far"], ["far"],
    ] * 2  # fmt: skip
    done = typed("prune", "home", *config)
    assert done.returncode == 0, done.stderr
    assert "2 kept snapshots destroyed, 4 stay (2 until saved) (run" in done.stderr
    assert [name for name, *_ in kept(scene)] == [
        each for each in there if each not in oldest(there)
    ]
    assert typed("backup", "home", *config, "--from-snapshots").returncode == 0
    assert typed("prune", "far", *config, "--saved-in", "home").returncode == 0
    assert len(kept(scene)) == 2


def test_two_disks(scene: Scene, typed: Typed) -> None:
    """One program that saves to two disks, by a job each: a moment goes once both have it."""
    night = ["snap --transient", "backup --from-snapshots", "backup two --from-snapshots", "unsnap"]
    to = "arguments = ['{}']\nenvironment = {{ DEST = '{}' }}\n"
    path = jobs(
        scene,
        one=f"steps = {json.dumps(night)}\n" + to.format("--to=/mnt/1", "/mnt/1"),
        two=to.format("--to=/mnt/2", "/mnt/2"),
    )
    scene.behave(f'echo "$1 $DEST" >>{scene.home}/saved; exit 0')
    scene.write("one", *SETS)
    done = typed("run", "one", "--config", path)
    assert done.returncode == 0, done.stderr
    saved = (scene.home / "saved").read_text()
    assert saved == "--to=/mnt/1 /mnt/1\n--to=/mnt/2 /mnt/2\n"
    assert kept(scene) == []


def test_odd_moment(scene: Scene, typed: Typed) -> None:
    """What a backup cannot take for a moment is no whole night, and its unsnap leaves it alone."""
    steps = 'steps = ["snap --transient", "backup --from-snapshots", "unsnap"]'
    config = ("--config", jobs(scene, home=steps))
    scene.write("one", *SETS)
    assert typed("snap", "home", "--transient", *config).returncode == 0
    there = scene.pool["snapshots"]
    (odd,) = (name for name in there if name.startswith("tank/b@"))
    there[odd]["createtxg"] = "7"
    scene.play(snapshots=there)
    scene.write("two", *SETS)
    done = typed("run", "home", *config, "--wait")
    assert done.returncode == 3, done.stderr
    assert f"{odd.partition('@')[2]} is not saved: its snapshots are not of one" in done.stderr
    assert "2 transient snapshots are left alone, whose moment is none" in done.stderr
    assert (scene.copies(), scene.pool["snapshots"]) == (["two two"], there)


def oldest(there: list[str]) -> list[str]:
    return [min(name for name in there if name.startswith(f"{dataset}@")) for dataset in SETS]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "1"], "--limit is of no use without --from-snapshots"),
        (["--from-snapshots", "--limit", "0"], "0 is not in the range"),
    ],
)
def test_refused(scene: Scene, typed: Typed, words: list[str], message: str) -> None:
    done = typed("backup", *SETS, "--command", scene.client, *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_nothing_kept(scene: Scene, typed: Typed) -> None:
    done = typed("backup", *SETS, "--command", scene.client, "--from-snapshots")
    assert (done.returncode, "nothing to save: 0 kept moments" in done.stderr) == (0, True)


def test_live_behind_a_link(scene: Scene, typed: Typed) -> None:
    """A repository that is named by a link is live, and left out, where the link leads to."""
    repository = scene.live("tank/b") / "repo"
    (scene.home / "link").symlink_to(repository.parent)
    words = ("backup", *SETS, "--command", scene.client, "--dry-run", "--json")
    done = typed(*words, RESTIC_REPOSITORY=str(scene.home / "link/repo"))
    assert done.returncode == 0, done.stderr
    notes = [json.loads(line).get("text") for line in done.stdout.splitlines()]
    assert f"{repository} is not in the backup: the client needs it as it is now" in notes


_KOPIA = """#!/bin/sh
case "$1 $2" in
    "policy list") echo "[]" ;;
    "policy show") echo '{"files": {"ignoreCacheDirs": true}}' ;;
    *) echo '{"uniqueIDHex": "01"}' ;;
esac
"""


@pytest.mark.parametrize("tagged", [True, False])
def test_live_cache_of_a_whole_root(scene: Scene, typed: Typed, tagged: bool) -> None:
    """A cache that kopia leaves out by its tag is known by the live one: the root is empty yet."""
    kopia, cache = scene._script("bin/kopia", _KOPIA), scene.live("tank/b") / "cache"
    cache.mkdir()
    tag = "Signature: 8a477f597d28d172789f06886806bc55"
    (cache / "CACHEDIR.TAG").write_text(tag if tagged else "")
    (scene.home / "k.config").write_text(json.dumps({"caching": {"cacheDirectory": str(cache)}}))
    root = scene.home / "root"
    words = ("backup", *SETS, "--client", "kopia", "--dry-run", "--command", str(kopia))
    tree = ("--layout", "tree", "--root", str(root), "--whole-root")
    done = typed(*words, *tree, KOPIA_CONFIG_PATH=str(scene.home / "k.config"))
    assert done.returncode == (0 if tagged else 2), done.stderr
    assert (f"does not ignore {root}{cache}," in done.stderr) is not tagged


def test_notices_without_a_run(scene: Scene, typed: Typed) -> None:
    """Of nothing to save a check is told too, and of a moment that is left out, each time."""
    words = 'echo "$ATOMTX_EVENT $ATOMTX_EXIT_STATUS; $(sed -n 1p); $ATOMTX_SUBJECT"'
    tell = scene._script("tell", f"#!/bin/sh\n{words} >> $FAKE_ZFS/told\n")
    wanted = {"ATOMTX_NOTIFY_COMMAND": str(tell), "ATOMTX_NOTIFY_ON": "completed partial"}
    catch_up = ("backup", *SETS, "--command", scene.client, "--from-snapshots")
    told = scene.home / "told"

    def lines(status: int) -> list[str]:
        told.write_text("")
        done = typed(*catch_up, **wanted)
        assert done.returncode == status, done.stderr
        return [line.split(" on ")[0] for line in told.read_text().splitlines()]

    label = "atomtx: tank/a, tank/b"
    snap(scene, typed, "one", *SETS)
    assert lines(0) == [f"completed 0; The backup is complete.; {label}"]
    assert lines(0) == [f"completed 0; There was nothing to do.; {label}"]
    snap(scene, typed, "two", *SETS)
    there = scene.pool["snapshots"]
    last = max(there)
    there[last]["createtxg"] = str(int(there[last]["createtxg"]) + 7)
    scene.play(snapshots=there)
    left_out = f"partial 3; Something that was kept is not in the repository.; {label}"
    assert lines(3) == [left_out]
    snap(scene, typed, "three", *SETS)
    assert lines(3) == [f"completed 0; The backup is complete.; {label}", left_out]

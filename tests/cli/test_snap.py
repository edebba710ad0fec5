"""`atomtx snap`, `prune` and `unsnap` as they are typed, on pools that are only played."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click import Command

from atomtx.cli.prune import prune
from atomtx.cli.snap import snap
from atomtx.cli.unsnap import unsnap
from atomtx.journal import Journal
from tests.cli.conftest import SOURCE
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root takes snapshots")

_PROGRAM = """
import os, sys
from atomtx import cli, database, process
database.UPGRADE_WAIT_S = 0.1
home = os.environ["FAKE_ZFS"]
process.BASE_ENVIRONMENT |= {
    "PATH": f"{home}/bin:{process.BASE_ENVIRONMENT['PATH']}", "FAKE_ZFS": home
}
cli.main(sys.argv[1:])
"""
_TELL = '#!/bin/sh\n{ echo "$ATOMTX_SUBJECT"; cat; } >> $FAKE_ZFS/told\n'
PATTERN = ("--pattern", "s-%Y%m%d%H%M%S")
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path)
    for name in ("tank/a", "tank/a/b c", "tank/vol"):
        scene.live(name).mkdir(parents=True)
    datasets = {"tank/a": "filesystem", "tank/a/b c": "filesystem", "tank/vol": "volume"}
    scene.play(pools={"tank": "guid of tank"}, datasets=datasets)
    return scene


@pytest.fixture
def typed(scene: Scene) -> Typed:
    tell = scene.home / "tell"
    tell.write_text(_TELL)
    tell.chmod(0o755)

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        own = {
            "ATOMTX_STATE_DIR": str(scene.state),
            "FAKE_ZFS": str(scene.home),
            "PYTHONPATH": os.pathsep.join((str(SOURCE), str(SOURCE.parent))),
        }
        return subprocess.run(
            [sys.executable, "-c", _PROGRAM, *words],
            env={**os.environ, **own, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def names(scene: Scene) -> list[str]:
    return sorted(scene.pool["snapshots"])


def configured(scene: Scene, **values: Any) -> str:
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    path = scene.home / "atomtx.toml"
    path.write_text(f'[jobs.home]\nvolumes = ["tank/a"]\nrecursive = true\n{lines}\n')
    path.chmod(0o600)
    return str(path)


def test_snap(scene: Scene, typed: Typed) -> None:
    """Datasets with their children, told by name; the history has it, and no job of backups."""
    dry = typed("snap", "-r", "tank/a", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "snapshot 2 datasets of pool tank in one transaction" in dry.stdout
    assert names(scene) == []
    done = typed("snap", "-r", "tank/a", "tank/vol", *PATTERN)
    assert done.returncode == 0, done.stderr
    assert {name.split("@")[0] for name in names(scene)} == {"tank/a", "tank/a/b c", "tank/vol"}
    assert "completed in" in done.stderr
    assert all(name in done.stderr for name in names(scene))
    (run,) = json.loads(typed("history", "--json").stdout)
    assert (run["verb"], run["state"], run["label"]) == ("snap", "kept", "snap tank/a, tank/vol -r")
    assert typed("check", "--max-age", "1h").returncode == 3
    shown = typed("show", run["id"]).stdout
    assert "client" not in shown.split("Volumes")[0]
    assert typed("journal", "check").returncode == 0


def test_name_is_taken(scene: Scene, typed: Typed) -> None:
    """There is one moment of a name: nothing is changed."""
    pattern = ("--pattern", "%Y%j-%H%M")
    for _ in range(3):  # the minute may end in between
        typed("snap", "tank/a", *pattern)
        before = names(scene)
        again = typed("snap", "tank/a", *pattern)
        if again.returncode:
            break
    assert again.returncode == 2
    assert "there is a snapshot" in again.stderr
    assert names(scene) == before
    assert len(json.loads(typed("history", "--json").stdout)) == len(before)


def test_name_is_waited_for(scene: Scene, typed: Typed) -> None:
    """With --wait the next free name is taken; without it, none is."""
    pattern = ("--pattern", "s-%Y%m%d%H%M%S")
    typed("snap", "tank/a", *pattern)
    ((first, facts),) = scene.pool["snapshots"].items()
    now = datetime.now(UTC)
    taken = [f"{now + timedelta(seconds=n):s-%Y%m%d%H%M%S}" for n in range(8)]
    there = {f"tank/a@{name}": facts | {"guid": f"{n}"} for n, name in enumerate(taken)}
    scene.play(snapshots={first: facts, **there})
    refused = typed("snap", "tank/a", *pattern)
    assert (refused.returncode, "in a second" in refused.stderr) == (2, True)
    done = typed("snap", "tank/a", *pattern, "--wait")
    assert done.returncode == 0, done.stderr
    assert "already: waiting for the next name" in done.stderr
    assert max(name.partition("@")[2] for name in scene.pool["snapshots"]) > taken[-1]
    assert len(scene.pool["snapshots"]) == len({first, *there}) + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["snap"], "nothing was named"),
        (["snap", "tank/none"], "there is no dataset tank/none"),
        (["snap", "nowhere/x"], "there is no pool nowhere"),
        (["snap", "tank/a", "--pattern", "daily"], "do not tell the minute"),
        (["snap", "tank/a", "--thaw", "true"], "--thaw undoes --quiesce"),
        (["prune", "tank/a"], "no rule says which snapshots to keep"),
        (["prune", "tank/a", "--keep-last", "x"], "'x' is not a number"),
        (["prune", "tank/a", "--keep-last", "1", "--adopt", "tank/a@x"], "there is no snapshot"),
        (["prune", "tank/a", "--keep-last=1", "--keep-until-saved"], "name it: --saved-in JOB"),
        (["prune", "tank/a", "--keep-last=1", "--saved-in", "x"], "there is no configuration"),
        (["unsnap"], "nothing was named"),
        (["unsnap", "tank/a", "--keep-last", ""], "'' is not a number"),
    ],
)
def test_refused(scene: Scene, typed: Typed, words: list[str], message: str) -> None:
    done = typed(*words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert names(scene) == []


def test_job(scene: Scene, typed: Typed) -> None:
    """A job's keys count: its volumes, pattern, hooks and rules; those typed come before."""
    hook = [str(scene.home / "hook")]
    scene._script("hook", '#!/bin/sh\necho "$ATOMTX_HOOK" >> $FAKE_ZFS/hooked\n')
    config = configured(
        scene,
        **{"snap-pattern": "j-%Y%m%d%H%M%S", "snap-keep": ["--keep-last", "1"]},
        quiesce=hook,
        thaw=hook,
    )
    words = ("--config", config, "home")
    for _ in range(3):
        while (done := typed("snap", *words)).returncode == 2:  # still the same second
            assert "there is a snapshot" in done.stderr, done.stderr
    assert len(names(scene)) == 6
    assert {name.split("@")[1][:3] for name in names(scene)} == {"j-2"}
    assert (scene.home / "hooked").read_text().split() == ["snapshot"] * 6
    dry = typed("prune", *words, "--keep-last", "2", "--dry-run").stdout
    assert "6 kept snapshots: 4 stay, 2 would be destroyed" in dry
    done = typed("prune", *words, "--json")
    assert done.returncode == 0, done.stderr
    result = next(line for line in map(json.loads, done.stdout.splitlines()) if "run" in line)
    assert [each["keep"] for each in result["snapshots"]] == [True, False, False] * 2
    assert len(names(scene)) == 2
    again = typed("prune", *words)
    assert (again.returncode, "nothing to prune" in again.stderr) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["home", "--saved-in", "hone"], 'has no job "hone"\n  did you mean "home"?'),
        (["tank/a", "--keep-last=1", "--saved-in", "x"], 'has no job "x"\n  its jobs: home'),
        (["home", "--copies"], "for ever\n  leave out --saved-in, or give --no-keep-until-saved"),
        (["tank/a", "--keep-last=1", "--copies", "--saved-in", "home"], "--copies counts what no"),
    ],
)
@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_not_to_be_saved(
    scene: Scene, typed: Typed, words: list[str], message: str, how: list[str]
) -> None:
    """What cannot be waited for is told in a line, with what to do; no journal is made."""
    config = configured(scene, **{"snap-keep": ["--keep-last=1"], "keep-until-saved": True})
    done = typed("prune", "--config", config, *words, *how)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert not (scene.state / "journal.db").exists()


def test_journal_is_new(scene: Scene, typed: Typed) -> None:
    """Where the journal knows no backup nothing goes, but at the user's word; unsnap asks none."""
    config = configured(
        scene,
        **{"snap-pattern": "j-%Y%m%d%H%M%S", "snap-keep": ["--keep-last=1"]},
        **{"keep-until-saved": True},
    )
    words = ("--config", config, "home")
    for _ in range(2):
        snapped(scene, typed, *words)
    done = typed("prune", *words)
    assert done.returncode == 0, done.stderr
    assert "no completed backup of home: nothing is destroyed" in done.stderr
    assert "nothing to prune: 4 kept snapshots stay (2 until saved)" in done.stderr
    assert len(names(scene)) == 4
    transient = snapped(scene, typed, *words, "--transient")
    assert typed("unsnap", *words).returncode == 0
    assert not set(transient) & set(names(scene))
    for saver in (("--saved-in", "home"), ("--no-job", "--saved-in", "home")):
        datasets = ("--config", config, "tank/a", "--keep-last=1", "--pattern", "j-%Y%m%d%H%M%S")
        told = typed("prune", *datasets, *saver, "--dry-run").stdout
        assert "2 kept snapshots: 2 stay (1 until saved), 0 would" in told
    done = typed("prune", *words, "--no-keep-until-saved")
    assert done.returncode == 0, done.stderr
    assert len(names(scene)) == 2


def snapped(scene: Scene, typed: Typed, *words: str) -> list[str]:
    """Take snapshots, in the next second if need be, and return the names of those."""
    before = names(scene)
    while (done := typed("snap", *words)).returncode == 2:  # still the same second
        assert "there is a snapshot" in done.stderr
    assert done.returncode == 0, done.stderr
    return [name for name in names(scene) if name not in before]


def test_unsnap(scene: Scene, typed: Typed) -> None:
    """What was taken for some programs in a row goes after them; prune has no eyes for it."""
    config = configured(scene, **{"snap-pattern": "j-%Y%m%d%H%M%S", "snap-keep": ["--keep-last=9"]})
    words = ("--config", config, "home")
    stay = snapped(scene, typed, *words)
    old = snapped(scene, typed, *words, "--transient")
    new = snapped(scene, typed, *words, "--transient")
    assert "2 kept snapshots: 2 stay" in typed("prune", *words, "--dry-run").stdout
    dry = typed("unsnap", *words, "--keep-last", "1", "--dry-run").stdout
    assert "4 transient snapshots: 2 stay, 2 would be destroyed" in dry
    assert {line.split("  ")[0] for line in dry.splitlines() if "  destroy" in line} == set(old)
    assert names(scene) == sorted(stay + old + new)
    done = typed("unsnap", *words, "--keep-last", "1")
    assert done.returncode == 0, done.stderr
    assert "2 transient snapshots destroyed, 2 stay" in done.stderr
    assert names(scene) == sorted(stay + new)
    there = scene.pool["snapshots"]
    there[new[0]]["holds"] = ["atomtx-0123456789abcdef"]
    scene.play(snapshots=there)
    held = typed("unsnap", *words)
    assert (held.returncode, "nothing to unsnap: 2" in held.stderr) == (0, True), held.stderr
    there[new[0]]["holds"] = []
    scene.play(snapshots=there)
    done = typed("unsnap", *words, "--no-bookmark", "--json")
    assert done.returncode == 0, done.stderr
    assert names(scene) == stay
    assert len(scene.pool["bookmarks"]) == len(old)
    result = next(line for line in map(json.loads, done.stdout.splitlines()) if "run" in line)
    assert (result["job"], result["state"]) == ("unsnap home", "pruned")
    assert [each["keep"] for each in result["snapshots"]] == [False] * 2
    assert typed("journal", "check").returncode == 0


def test_unsnap_recovered(scene: Scene, typed: Typed) -> None:
    """`recover` of a job settles its unsnap as well."""
    config = configured(scene, **{"snap-pattern": "j-%Y%m%d%H%M%S"})
    words = ("--config", config, "home")
    snapped(scene, typed, *words, "--transient")
    assert typed("unsnap", *words).returncode == 0
    scene.run_sql(
        "UPDATE runs SET state = 'planned', outcome = NULL, ended_at = NULL WHERE verb = 'prune'"
    )
    scene.run_sql("UPDATE steps SET outcome = NULL, ended_at = NULL WHERE kind = 'prune-snapshots'")
    done = typed("recover", "--job", "home", "--config", config)
    assert "unsnap home" in done.stdout + done.stderr
    (run,) = (r for r in json.loads(typed("history", "--json").stdout) if r["verb"] == "prune")
    assert (run["state"], run["outcome"]) == ("pruned", "partial")


def test_told(scene: Scene, typed: Typed) -> None:
    """A failure is told as what it is; nothing is pinged, which is the backups' check."""
    scene.play(faults={"snapshot": "refuse"})
    env = {
        "ATOMTX_NOTIFY_COMMAND": str(scene.home / "tell"),
        "ATOMTX_PING_URL": "http://127.0.0.1:1/",
    }
    done = typed("snap", "tank/a", **env)
    assert done.returncode == 1
    assert "out of luck" in done.stderr
    assert "not notified" not in done.stderr
    told = (scene.home / "told").read_text()
    assert told.startswith("atomtx: snap tank/a on ")
    assert "No snapshots were kept." in told
    assert "last snap" in told


def test_recovered(scene: Scene, typed: Typed) -> None:
    """`recover` of the job settles its snap, and says what became of it."""
    config = configured(scene)
    scene.play(faults={"program": "refuse", "set": "refuse"})
    assert typed("snap", "--config", config, "home").returncode == 6
    assert "snap home" in typed("status").stdout
    would = typed("recover", "--dry-run", "--job", "home", "--config", config)
    assert "its snapshots would be kept" in would.stderr + would.stdout
    scene.play(faults={})
    done = typed("recover", "--job", "home", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "completed; its snapshots stay" in done.stderr + done.stdout
    assert {each["kept"] is not None for each in scene.pool["snapshots"].values()} == {True}


def test_journal_to_be_upgraded(scene: Scene, typed: Typed) -> None:
    """Where another process uses a journal of an older version both wait, and say for what."""
    with Journal.open(scene.state):
        scene.run_sql("PRAGMA user_version = 0")
        for words in (["snap", "tank/a"], ["prune", "tank/a", "--keep-last", "1"]):
            done = typed(*words)
            assert done.returncode == 6, done.stderr
            assert "must be upgraded" in done.stderr
    assert names(scene) == []


@pytest.mark.parametrize("command", [snap, prune, unsnap], ids=lambda command: command.name)
def test_exit_statuses(command: Command) -> None:
    """The help and the page tell of the same exit statuses."""
    page = (SOURCE.parent / "docs/snap.md").read_text()
    table = page.partition(f"| exit status of `{command.name}` |")[2].partition("\n\n")[0]
    told = (command.help or "").partition("EXIT STATUS\n")[2]
    in_help = re.findall(r"(?:^| ) +(\d+(?:, \d+)?) \w", told, re.MULTILINE)
    assert sorted(in_help) == sorted(re.findall(r"^\| (\d.*?) \|", table, re.MULTILINE))
    assert len(in_help) > 5


def test_lost_journal(scene: Scene, typed: Typed) -> None:
    """What an interrupted snap left is listed, and destroyed where named; what is kept stays."""
    for name in ("s-%Y%m%d%H%M%S", "own %Y%m%d%H%M%S"):
        assert typed("snap", "-r", "tank/a", "--pattern", name).returncode == 0
    found = scene.pool["snapshots"]
    half, stays, whole, _ = sorted(found, key=lambda name: (" 2" in name, name))
    for name in (half, whole):  # as it was before it was kept
        found[name] |= {"mark": found[name]["kept"], "kept": None}
    scene.play(snapshots=found)
    run, other = found[half]["mark"], found[whole]["mark"]
    shutil.rmtree(scene.state)
    config = ("--config", configured(scene, **{"snap-pattern": "s-%Y%m%d%H%M%S"}))

    assert run not in typed("recover", "--scan").stderr
    said = typed("recover", "--scan", *config).stderr
    head = f"run {run}, .* old, in no journal here, of an interrupted snap, 1 more of its moment"
    assert re.search(f"{head} are kept, and stay:\n  snapshot {half}, 4.0 KiB\n", said)
    assert (stays in said, other in said) == (False, False)
    assert other in typed("recover", "--scan", *config, "--pattern", "own %Y%m%d%H%M%S").stderr
    assert not scene.state.exists()  # who looks leaves nothing

    assert typed("recover", "--adopt", run[:6]).returncode == 2
    assert half in names(scene)
    done = typed("recover", "--adopt", run[:6], *config)
    assert done.returncode == 0, done.stderr
    assert names(scene) == sorted({*found} - {half})
    assert run not in typed("recover", "--scan", *config).stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--run", "zz"],
        ["--job", "home"],
        ["--rollback"],
        ["--no-resume"],
        ["--stop"],
        ["--no-wait"],
        ["--adopt", "5e0a"],
        ["--abandon", "5e0a"],
    ],
    ids=lambda words: words[0],
)
def test_scan_alone(typed: Typed, words: list[str]) -> None:
    """`--scan` lists; what would do more is refused, and not passed over."""
    done = typed("recover", "--scan", *words)
    assert done.returncode == 2, done.stderr
    assert f"--scan and {words[0]} exclude each other" in done.stderr


def test_pattern_alone(typed: Typed) -> None:
    """It says which names count where a journal was lost, and nothing else."""
    done = typed("recover", "--pattern", "s-%Y%m%d%H%M%S")
    assert (done.returncode, "--pattern is of no use" in done.stderr) == (2, True)
    done = typed("recover", "--scan", "--pattern", "x")
    assert (done.returncode, "do not tell the minute" in done.stderr) == (2, True), done.stderr

"""`atomtx run` as it is typed, on pools and mounts that are only played."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atomtx import cleaning, cli, clients, config, locks, preparing
from atomtx.cli import steps as cli_steps
from atomtx.errors import JournalFullError
from atomtx.executor import Tell
from atomtx.interrupts import Interrupts
from atomtx.journal import Change, Journal
from atomtx.mounts import mountinfo
from atomtx.names import RunId
from atomtx.records import Run
from atomtx.statedir import RunFolder
from atomtx.states import Verb
from tests.cli.conftest import SOURCE
from tests.cli.test_from_snapshots import _PROGRAM
from tests.cli.test_waiting import wait_for_line
from tests.extent import some
from tests.scene import Ended, Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs steps")

# As there, but that it can be killed at a point.
PROGRAM = _PROGRAM.replace(
    'fork_runner(Crash(home / "points"))',
    """
crash = Crash(home / "points", at=os.environ.get("AT", ""), who=os.environ.get("WHO", "front"))
crash.install()
fork_runner(crash)
""",
)
DATASET = "tank/a"
STEPS = ("snap", "backup", "prune")
OF_ONE_MOMENT = ("snap --transient", "backup", "unsnap")
CAUGHT_UP = ("snap --transient", "backup --from-snapshots", "unsnap")
OLD = f"{DATASET}@s-20231114221320"
OF_STEP = "json_extract(plan, '$.parent') != ''"
WAITS = "touch $home/at-work; while ! test -e $home/go; do sleep 0.1; done\n"
OTHER = '[jobs.other]\nvolumes = ["{0}"]\ncommand = ["{1}", "--"]\n'
Typed = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = played(tmp_path)
    yield scene
    scene.close()


def played(home: Path) -> Scene:
    scene = Scene(home)
    scene.live(DATASET).mkdir(parents=True)
    scene.write("one", DATASET)
    scene.play(pools={"tank": "guid of tank"}, datasets={DATASET: "filesystem"})
    return scene


@pytest.fixture
def typed(scene: Scene) -> Typed:
    return typist(scene)


def typist(scene: Scene) -> Typed:
    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        (scene.home / "points").write_text("")
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            cwd="/",
            env=environment(scene) | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def start(scene: Scene) -> Iterator[Start]:
    """Have a command be at work beside the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            cwd="/",
            env=environment(scene),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def environment(scene: Scene) -> dict[str, str]:
    tell = scene._script("tell", '#!/bin/sh\necho "$ATOMTX_SUBJECT" >> $FAKE_ZFS/told\n')
    return {
        **os.environ,
        "ATOMTX_STATE_DIR": str(scene.state),
        "ATOMTX_NOTIFY_COMMAND": str(tell),
        "ATOMTX_NOTIFY_ON": "completed partial failed waiting interrupted",
        "FAKE_ZFS": str(scene.home),
        "DATASETS": DATASET,
        "PYTHONPATH": os.pathsep.join((str(SOURCE), str(SOURCE.parent))),
    }


def configured(scene: Scene, *steps: str, more: str = "", **values: Any) -> tuple[str, str]:
    """Write a job home with steps; return the option that names the file."""
    given = {
        "volumes": [DATASET],
        "command": [scene.client],
        "steps": list(steps),
        "snap-pattern": "s-%Y%m%d%H%M%S",
        "snap-keep": ["--keep-last", "1"],
        **values,
    }
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in given.items())
    path = scene.home / "atomtx.toml"
    path.write_text(f"[jobs.home]\n{lines}\n{more}")
    path.chmod(0o600)
    return ("--config", str(path))


def parent(scene: Scene) -> dict[str, Any]:
    (found,) = scene.rows("SELECT * FROM runs WHERE verb = 'run'")
    return found


def outcomes(scene: Scene, kind: str = "run-step") -> list[str | None]:
    rows = scene.rows(f"SELECT outcome FROM steps WHERE kind = '{kind}' ORDER BY id")
    return [row["outcome"] for row in rows]


def made(scene: Scene) -> list[tuple[str, str | None]]:
    rows = scene.rows("SELECT verb, outcome FROM runs WHERE verb != 'run' ORDER BY rowid")
    return [(row["verb"], row["outcome"]) for row in rows]


def told(scene: Scene) -> list[str]:
    path = scene.home / "told"
    return path.read_text().splitlines() if path.exists() else []


def subjects(scene: Scene, file: str = "told") -> list[str]:
    """Return of which jobs a notice was given, in order."""
    path = scene.home / file
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removeprefix("atomtx: ").partition(" on ")[0] for line in lines]


def open_runs(scene: Scene) -> list[dict[str, Any]]:
    return scene.rows("SELECT * FROM runs WHERE ended_at IS NULL")


def test_course(scene: Scene, typed: Typed) -> None:
    """The steps in their order, each a run that knows its parent; one notice of all."""
    config = configured(scene, *STEPS)
    old = typed("snap", "--job", "home", *config)
    assert old.returncode == 0, old.stderr
    (scene.home / "told").unlink()
    second = int(time.time())  # one snapshot a second
    while int(time.time()) == second:
        time.sleep(0.02)
    done = typed("run", "home", *config)
    assert done.returncode == 0, done.stderr
    run = parent(scene)
    assert (run["state"], run["outcome"], run["reason"]) == ("ran", "completed", None)
    assert made(scene)[-3:] == [(verb, "completed") for verb in STEPS]
    assert scene.copies() == ["one"]
    assert len(scene.pool["snapshots"]) == 1
    assert outcomes(scene) == ["done"] * 3
    assert [line.partition(" on ")[0] for line in told(scene)] == ["atomtx: run home"]
    listed = typed("history").stdout
    assert f"snap home (step 1 of {run['id'][:8]})" in listed
    shown = typed("show", run["id"]).stdout
    children = scene.rows(f"SELECT id FROM runs WHERE {OF_STEP} ORDER BY rowid")
    for child in children:
        assert f"exit status 0; run {child['id']}" in shown
    assert len(children) == 3
    assert "run home" in listed
    assert typed("journal", "check").returncode == 0
    as_json = json.loads(typed("show", run["id"], "--json").stdout)
    assert [child["parent"] for child in as_json["runs_of_steps"]] == [
        f"{run['id']}/{n}" for n in (1, 2, 3)
    ]


def _hasty() -> None:
    """Have nothing tried again that is in use."""

    def destroy(_: Any, kind: Any, identities: Any, run: Any) -> Any:
        return kind.destroy(identities, run=run.id)

    cleaner: Any = cleaning.Cleaner
    cleaner._destroy = destroy


def forked(
    scene: Scene, *words: str, at: str = "", change: Callable[[], None] = lambda: None
) -> Ended:
    """Run a command in a front end of its own, which may be killed at a point."""

    def prepare() -> None:
        (scene.home / "front").write_text(str(os.getpid()))
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        os.chdir("/")
        os.environ["ATOMTX_STATE_DIR"] = str(scene.state)
        real = mountinfo.read

        def read() -> mountinfo.Table:
            table = real()
            above = table.containing(str(scene.home)).id  # type: ignore[union-attr]
            where = str(scene.live(DATASET))
            entry = mountinfo.Entry(
                10**6, above, "0:9000", "/", where, "rw", (), "zfs", DATASET, "rw"
            )
            return mountinfo.Table([*table, entry])

        vars(preparing)["mountinfo"] = SimpleNamespace(
            read=read, Table=mountinfo.Table, containing=mountinfo.containing
        )

    def work(_: Journal, __: Tell, ___: Interrupts, ended: Ended) -> None:
        ended.told.append(("status", cli.run(words)))

    scene.changes = [prepare, change]
    return scene._in_front_end(work, {"at": at})


def status(ended: Ended) -> int:
    (found,) = ended.said("status")
    return int(found)


def fresh(home: Path, *steps: str) -> tuple[Scene, tuple[str, str]]:
    """Return a scene in which an older kept snapshot is there, which may go by a rule alone."""
    home.mkdir()
    scene = played(home)
    old: dict[str, Any] = {
        "guid": "7",
        "createtxg": "7",
        "creation": "1700000000",
        "mark": None,
        "kept": RunId.new(),
        "holds": [],
    }
    scene.play(snapshots={OLD: old})
    frozen = scene.home / "frozen" / OLD.replace("/", "%")
    frozen.mkdir(parents=True)
    (frozen / "file").write_text("old")
    return scene, configured(scene, *(steps or STEPS))


def check_done(scene: Scene, point: str, *, backups: int = 1, is_transient: bool = False) -> None:
    """Each step is done exactly once, and nothing is left of any run but what was kept to stay."""
    run = parent(scene)
    assert (run["state"], run["outcome"]) == ("ran", "completed"), point
    assert outcomes(scene) == ["done"] * 3, point
    assert open_runs(scene) == [], point
    assert scene.copies()[-1:] == ["one"], point
    there = scene.pool["snapshots"]
    assert len(there) == 1, (point, there)
    (only,) = there.values()
    assert (only["mark"], only["holds"]) == (None, []), point
    well = [verb for verb, outcome in made(scene) if outcome == "completed"]
    assert (well.count("snap"), well.count("backup")) == (1, backups), (point, made(scene))
    assert len(scene.copies()) >= backups, point
    assert well.count("prune") <= 1, point
    assert (OLD in there) is is_transient, (point, there)  # of a prune it is the one that goes
    assert [f for f in scene.state.glob("runs/*/*.lock") if locks.is_held(f)] == []


@pytest.mark.parametrize(
    ("steps", "kinds", "backups"),
    [
        # A runner that is killed is started again by its front end.
        pytest.param(OF_ONE_MOMENT, ("journal:", "before:", "start:"), 1, id="everywhere"),
        pytest.param(CAUGHT_UP, ("journal:",), 2, id="catching up"),
    ],
)
def test_killed_at_every_point(
    tmp_path: Path, steps: tuple[str, ...], kinds: tuple[str, ...], backups: int
) -> None:
    """Wherever the front end is killed, a recovery does what is left, and nothing twice."""
    scene, config = fresh(tmp_path / "whole", *steps)
    whole = forked(scene, "run", "home", *config)
    assert (whole.status, status(whole)) == (0, 0), said(scene)
    check_done(scene, "", backups=backups, is_transient=True)
    points = [point for point in whole.points if not point.startswith("runner:")]
    points = points[points.index("before:planned#1") :]
    points = [point for point in points if point.startswith(kinds)]
    scene.close()
    assert {"journal:planned#2", "journal:pruned#1", "journal:ran#1"} <= set(points)
    resumed = 0
    tried = some(points, 3)
    for n, point in enumerate(tried):
        scene, config = fresh(tmp_path / f"{n}", *steps)
        assert forked(scene, "run", "home", *config, at=point).status == -9, point
        recovered = forked(scene, "recover")
        assert (recovered.status, status(recovered)) == (0, 0), (point, said(scene))
        if scene.rows("SELECT * FROM runs"):
            resumed += 1
            check_done(scene, point, backups=backups, is_transient=True)
        scene.close()
    assert resumed == len(tried) - ("before:planned#1" in tried)  # there is nothing yet


def test_failing(scene: Scene, typed: Typed) -> None:
    """After a step that failed nothing else is run, and it is told which; the next one is anew."""
    config = configured(scene, "backup", "snap")
    scene.behave("exit 1\n")
    done = typed("run", "home", *config)
    assert done.returncode == 1, done.stderr
    run = parent(scene)
    assert (run["state"], run["outcome"]) == ("ran", "failed")
    assert re.fullmatch(
        r"step 1 \(backup --job home\): exit status 1; run \w+; not run: snap --job home",
        run["reason"],
    )
    assert run["reason"] in done.stderr
    assert outcomes(scene) == ["failed", "not-needed"]
    assert scene.pool["snapshots"] == {}
    assert len(told(scene)) == 1
    scene.run_sql("DELETE FROM runs")
    scene.behave("")
    assert typed("run", "home", *config).returncode == 0
    assert len(scene.pool["snapshots"]) == 1


def test_partial(scene: Scene, typed: Typed) -> None:
    """What is not whole keeps no other step from its turn, and is the exit status at last."""
    config = configured(
        scene, "snap", "snap --quiesce true --thaw false --pattern t-%Y%m%d%H%M%S", "snap tank/none"
    )
    done = typed("run", "home", *config)
    assert done.returncode == 1, done.stderr
    assert outcomes(scene) == ["done", "done", "failed"]
    scene.run_sql("DELETE FROM runs")
    scene.play(snapshots={})
    config = configured(scene, "snap --thaw false --quiesce true", "snap --pattern t-%Y%m%d%H%M%S")
    done = typed("run", "home", *config, "--json")
    assert done.returncode == 7, done.stderr
    (result,) = (line for line in map(json.loads, done.stdout.splitlines()) if line.get("steps"))
    assert (result["exit_status"], result["outcome"]) == (7, "completed")
    assert [each["exit_status"] for each in result["steps"]] == [7, 0]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["snap", "run home"], "the step 'run home' would run steps again"),
        (["recover"], "the step 'recover' is no command for a step"),
        ([" "], "the step ' ' is no command for a step"),
        (["snap 'x"], "cannot be read: No closing quotation"),
        (["backup -- --password-command=x --password=y"], "carries a secret"),
        (["snap --nosuch"], "the step 'snap --nosuch' is wrong: No such option"),
        (["prune --help"], "only shows a help"),
        (["sure nosuch"], "sure has no command 'nosuch'"),
        (["backup --retries many"], "the step 'backup --retries many' is wrong"),
        (["snap --config /x home"], "the step 'snap --config /x home' names a configuration"),
        (["sure scan-kept --nosuch"], "the step 'sure scan-kept --nosuch' is wrong"),
        (["sure scan"], "the step 'sure scan' is wrong: Missing argument 'PATH'"),
        (["snap -n"], "the step 'snap -n' would change nothing"),
        (["backup --job hme"], 'atomtx.toml has no job "hme"'),
        (["backup hme"], "hme is neither a job of"),
        (["prune --saved-in hme"], 'atomtx.toml has no job "hme"'),
        (["prune --keep-daily x"], "'x' is not a number of snapshots"),
        (["prune --keep-daily 0"], "no rule says which snapshots to keep"),
        (["prune --job other"], "no rule says which snapshots to keep"),
        (["prune tank/a"], "no rule says which snapshots to keep"),
        (["clone"], "no target was given"),
        (["clone --to nopool:"], "the step 'clone --to nopool:'"),
    ],
)
def test_config_errors(scene: Scene, typed: Typed, steps: list[str], words: str) -> None:
    """One line with the file's line and the step; nothing is run."""
    config = configured(scene, *steps, more=OTHER.format(DATASET, scene.client))
    done = typed("config", "check", *config)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "atomtx.toml:4: job home: steps: " in line
    assert words in line
    assert ("hme" in words) is line.endswith('; did you mean "home"?')
    again = typed("run", "home", *config)
    assert again.returncode == 2
    assert words in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    "step",
    [
        "prune",
        "prune --job other --keep-last 1 --saved-in home",
        "prune tank/a --keep-daily 7",
        "unsnap",
        "clone other --to backup/here",
        "snap --no-job hom",  # a pool, though it is nearly a job's name
        "snap tank",
        "sure scan /x",
    ],
)
def test_config_is_right(scene: Scene, typed: Typed, step: str) -> None:
    """What a step needs may be said by itself, or by the job that it is of."""
    config = configured(scene, step, more=OTHER.format(DATASET, scene.client))
    done = typed("config", "check", *config)
    assert done.returncode == 0, done.stderr


def test_no_steps(scene: Scene, typed: Typed) -> None:
    done = typed("run", "home", *configured(scene))
    assert (done.returncode, "has no steps" in done.stderr) == (2, True)


def test_dry_run(scene: Scene, typed: Typed) -> None:
    """Each step's own, and nothing is changed."""
    config = configured(scene, *STEPS, "sure scan /x")
    done = typed("run", "home", "-n", *config)
    assert done.returncode == 0, done.stderr
    assert "snapshot 1 dataset of pool tank" in done.stdout
    assert f"run {scene.client}" in done.stdout
    assert "0 kept snapshots" in done.stdout
    assert "step 4: atomtx sure scan /x\nnote: it has no dry run" in done.stderr
    assert scene.pool["snapshots"] == {}
    assert not (scene.state / "journal.db").exists()


def test_another_job(scene: Scene, typed: Typed) -> None:
    """A step of another job is that job's, found in the same file, and tells as it does."""
    more = OTHER.format(DATASET, scene.client)
    config = configured(scene, "backup", "backup other", "snap -- tank/a", more=more)
    done = typed("run", "home", *config)
    assert done.returncode == 0, done.stderr
    labels = [r["label"] for r in scene.rows("SELECT label FROM runs ORDER BY rowid")]
    assert labels == ["run home", "home", "other", "snap tank/a"]
    assert [line.split(" on ")[0] for line in told(scene)] == ["atomtx: other", "atomtx: run home"]


def test_general(scene: Scene, typed: Typed) -> None:
    """A night as one job: a moment, its sums, copies, three programs, and the moment goes."""
    others = "".join(
        f'[jobs.{name}]\nvolumes = ["{DATASET}"]\ncommand = ["{scene.client}", "--"]\n'
        for name in ("borg", "dump")
    )
    scene.play(
        pools={"tank": "guid of tank", "backup": "guid of backup"},
        datasets={DATASET: "filesystem", "backup": "filesystem", "backup/x": "filesystem"},
        bookmarks={},
    )
    config = configured(
        scene,
        "snap --pattern kept-%Y%m%d%H%M%S",
        "snap --transient",
        f"sure scan {scene.live(DATASET)}",
        "clone --pattern kept-%Y%m%d%H%M%S",
        "backup --from-snapshots",
        "backup borg --from-snapshots",
        "backup dump",
        "unsnap",
        more=others,
        **{"snap-pattern": "s-%Y%m%d%H%M", "clone-targets": ["backup/x"]},
    )
    done = typed("run", "home", *config)
    assert done.returncode == 0, done.stderr
    verbs = [verb for verb, outcome in made(scene) if outcome == "completed"]
    assert verbs == ["snap", "snap", "clone", *["backup"] * 5, "prune"]
    names = sorted(name.partition("@")[0] for name in scene.pool["snapshots"])
    assert names == ["backup/x/a", DATASET]
    assert outcomes(scene) == ["done"] * 8


def test_parked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still in use keeps no step from its turn, and is said at the end, and why."""
    told_by = environment(scene)
    for name in ("FAKE_ZFS", "ATOMTX_NOTIFY_COMMAND"):
        monkeypatch.setenv(name, told_by[name])
    more = OTHER.format(DATASET, scene.client)
    config = configured(scene, "backup other", "snap", more=more)
    scene.play(faults={"program": "busy"})
    ended = forked(scene, "run", "home", *config, change=_hasty)
    assert status(ended) == 4, said(scene)
    assert outcomes(scene) == ["done", "done"]
    run = parent(scene)
    assert (run["state"], run["outcome"]) == ("ran", "completed")
    (left,) = open_runs(scene)
    assert left["cleanup"] == "parked"
    assert run["reason"] == (
        "step 1 (backup other): it is done, and something of it is still in use: "
        f"`atomtx recover` (exit status 4; run {left['id']})"
    )
    assert run["reason"] in said(scene)
    subjects = [line.partition(" on ")[0] for line in told(scene)]
    assert subjects == ["atomtx: other", "atomtx: run home"]
    assert all(line.endswith("completed, cleanup parked") for line in told(scene))
    scene.play(faults={})
    assert status(forked(scene, "recover")) == 0
    assert open_runs(scene) == []


def test_busy(scene: Scene, typed: Typed) -> None:
    """Another run of the same steps is refused while one is at work, and `--wait` is named."""
    second = ("run", "home", *configured(scene, "backup"))
    scene.behave(WAITS)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(typed, *second)
        while not (scene.home / "at-work").exists() and not first.done():
            time.sleep(0.05)
        refused = typed(*second)
        shown = typed("status").stdout
        (scene.home / "go").touch()
    assert first.result().returncode == 0, first.result().stderr
    assert refused.returncode == 5
    assert f"run {parent(scene)['id']}" in refused.stderr
    assert "--wait" in refused.stderr
    assert "run home  running" in shown
    assert f"home (step 1 of {parent(scene)['id'][:8]})  running" in shown
    assert len(scene.copies()) == 1


@pytest.mark.parametrize(("steps", "pinged"), [(("backup", "snap"), True), (("snap",), False)])
def test_pings(scene: Scene, typed: Typed, steps: tuple[str, ...], pinged: bool) -> None:
    """Once at the beginning and once at the end, where there is a backup; nobody listens here."""
    config = configured(scene, *steps)
    done = typed("run", "home", *config, ATOMTX_PING_URL="http://127.0.0.1:1/")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not notified") == (2 if pinged else 0)


def test_sure(scene: Scene, typed: Typed) -> None:
    """A step that makes no run."""
    config = configured(scene, f"sure scan {scene.live(DATASET)}", "sure scan /nowhere", "snap")
    done = typed("run", "home", *config)
    assert done.returncode == 1, done.stderr
    assert outcomes(scene) == ["done", "failed", "not-needed"]


# -- interrupted -----------------------------------------------------------------------------


def interrupted(scene: Scene, *steps: str, at: str, **values: Any) -> tuple[str, str]:
    """Leave a run that was killed at a point, and its front end with it."""
    config = configured(scene, *steps, **values)
    assert forked(scene, "run", "home", *config, at=at).status == -9
    assert parent(scene)["state"] == "planned"
    return config


def killed_by_its_client(scene: Scene, *steps: str) -> tuple[str, str]:
    """Leave a run whose front end is killed while its client is at work, which waits for `go`."""
    scene.behave(
        "test -e $home/killed || { touch $home/killed; kill -9 $(cat $home/front); }\n"
        "while ! test -e $home/go; do sleep 0.1; done\n"
    )
    config = configured(scene, *steps)
    assert forked(scene, "run", "home", *config).status == -9
    return config


def said(scene: Scene) -> str:
    return (scene.home / "log").read_text()


def test_client_lives(scene: Scene) -> None:
    """The client of a step outlives the front end: it is waited for, and not run twice."""
    config = killed_by_its_client(scene, "backup", f"sure scan {scene.live(DATASET)}")
    assert status(forked(scene, "recover", "--no-wait")) == 0
    assert "left alone" in said(scene)
    assert outcomes(scene) == [None, None]
    (scene.home / "go").touch()
    assert status(forked(scene, "run", "home", *config)) == 0, said(scene)
    runs = scene.rows("SELECT * FROM runs WHERE verb = 'run' ORDER BY rowid")
    assert [(run["state"], run["outcome"]) for run in runs] == [("ran", "completed")] * 2
    backups = scene.rows("SELECT * FROM runs WHERE verb = 'backup'")
    assert [run["outcome"] for run in backups] == ["completed"] * 2  # one of each run
    assert len(scene.copies()) == 2


def test_recovery_is_killed(tmp_path: Path) -> None:
    """A recovery that is killed on both sides of a commit is gone on with by the next."""
    at = "journal:snapshotted#2"  # of the backup
    scene, config = fresh(tmp_path / "whole")
    assert forked(scene, "run", "home", *config, at=at).status == -9
    points = forked(scene, "recover").points
    check_done(scene, "")
    scene.close()
    points = [point for point in points if point.startswith(("journal:", "before:"))]
    assert {"before:planned+#1", "journal:ran#1"} <= set(points)
    for n, point in enumerate(some(points, 3)):
        scene, config = fresh(tmp_path / f"{n}")
        assert forked(scene, "run", "home", *config, at=at).status == -9, point
        assert forked(scene, "recover", at=point).status == -9, point
        assert status(forked(scene, "recover")) == 0, (point, said(scene))
        check_done(scene, point)
        scene.close()


def test_of_another_release(scene: Scene) -> None:
    """A step whose words are none any more has failed, and keeps no other run from its end."""
    interrupted(scene, "snap", "backup --retries 1", at="journal:kept#1")
    words = "payload = replace(payload, '--retries', '--nosuch')"
    scene.run_sql(f"UPDATE steps SET {words} WHERE kind = 'run-step'")
    assert status(forked(scene, "recover")) == 1
    assert "No such option" in said(scene)
    assert outcomes(scene) == ["done", "failed"]
    assert open_runs(scene) == []


def test_left_for_later(scene: Scene) -> None:
    """`--no-resume` begins no step; the whole is then done all the same."""
    interrupted(scene, "snap", "backup", at="journal:kept#1")
    assert status(forked(scene, "recover", "--no-resume")) == 0
    assert "left alone" in said(scene)
    assert outcomes(scene) == [None, None]
    assert status(forked(scene, "recover")) == 0
    assert made(scene) == [("snap", "completed"), ("backup", "completed")]
    assert outcomes(scene) == ["done"] * 2


def test_rollback(scene: Scene) -> None:
    """The run of the step is given up first; then this one, and no other step is begun."""
    interrupted(scene, "backup", "snap", at="journal:snapshotted#1")
    assert status(forked(scene, "recover", "--rollback")) == 0
    run = parent(scene)
    assert (run["state"], run["outcome"]) == ("ran", "rolled-back")
    assert run["reason"].startswith("at the user's word; not run: backup --job home, snap")
    assert made(scene) == [("backup", "rolled-back")]
    assert scene.pool["snapshots"] == {}
    assert open_runs(scene) == []


def test_moment_is_another_unsnaps(scene: Scene, typed: Typed) -> None:
    """Promise 2: what a run of steps took and is still to save goes by its own unsnap alone."""
    config = interrupted(scene, *CAUGHT_UP, at="journal:kept#1")
    (moment,) = scene.pool["snapshots"]
    dry = typed("unsnap", "home", *config, "--dry-run")
    why = f"the run that took it has not ended: {parent(scene)['id']}"
    assert f"{moment}  keep     {why}" in dry.stdout, dry.stderr
    done = typed("unsnap", "home", *config)
    assert (done.returncode, "nothing to unsnap" in done.stderr) == (0, True)
    other = configured(scene, "unsnap")
    text = Path(other[1]).read_text()
    Path(other[1]).write_text(text.replace("jobs.home", "jobs.hourly"))
    assert typed("run", "hourly", *other).returncode == 0
    assert list(scene.pool["snapshots"]) == [moment]
    configured(scene, *CAUGHT_UP)
    assert typed("recover", "--job", "home").returncode == 0
    assert scene.copies() == ["one"]
    assert scene.pool["snapshots"] == {}


def test_moment_that_was_given_up(scene: Scene, typed: Typed) -> None:
    """Once its run has ended, however, a moment is left to any unsnap."""
    config = interrupted(scene, *CAUGHT_UP, at="journal:kept#1")
    assert typed("recover", "--rollback").returncode == 0
    assert typed("unsnap", "home", *config).returncode == 0
    assert scene.pool["snapshots"] == {}


def test_own_moment_is_gone(scene: Scene) -> None:
    """A backup that finds nothing of the moment which its run took has failed, and says of what."""
    interrupted(scene, *CAUGHT_UP, at="journal:kept#1")
    (moment,) = scene.pool["snapshots"]
    scene.play(snapshots={})
    assert status(forked(scene, "recover")) == 1, said(scene)
    name = moment.partition("@")[2]
    assert f"atomtx: {name}, which this run took, is not saved of {DATASET}" in said(scene)
    assert outcomes(scene) == ["done", "failed", "not-needed"]
    assert (parent(scene)["outcome"], scene.copies()) == ("failed", [])


@pytest.mark.parametrize(
    ("snap", "last", "ended", "steps"),
    [
        # What is to go again would, unsaved; what stays is saved by the next backup.
        ("snap --transient", "unsnap", 1, ["done", "failed", "not-needed"]),
        ("snap", "prune --keep-last 9", 3, ["done"] * 3),
    ],
)
def test_own_moment_is_left(
    tmp_path: Path, snap: str, last: str, ended: int, steps: list[str]
) -> None:
    """A backup in portions that has not come to the moment which its run took is not whole."""
    scene, config = fresh(tmp_path / "scene", snap, "backup --from-snapshots --limit 1", last)
    assert status(forked(scene, "run", "home", *config)) == ended, said(scene)
    assert f"which this run took, is not saved of {DATASET}" in said(scene)
    assert (outcomes(scene), scene.copies()) == (steps, ["old"])
    assert len(scene.pool["snapshots"]) == 2
    scene.close()


def test_job_is_gone(scene: Scene) -> None:
    """It waits, and says for what; the steps are those of then."""
    config = interrupted(scene, "snap", "backup", at="journal:kept#1")
    text = Path(config[1]).read_text()
    Path(config[1]).write_text(text.replace("jobs.home", "jobs.moved"))
    assert status(forked(scene, "recover")) == 6
    assert "has no job home any more" in said(scene)
    would = forked(scene, "recover", "--dry-run")
    assert status(would) == 0
    assert "would wait: " in said(scene)
    Path(config[1]).write_text(text.replace('"backup"', '"prune"'))
    assert status(forked(scene, "recover")) == 0
    assert made(scene) == [("snap", "completed"), ("backup", "completed")]


def test_step_waits(scene: Scene) -> None:
    """While the run of a step must wait, so does this one, and it can be told which."""
    interrupted(scene, "backup", "snap", at="journal:snapshotted#1")
    scene.play(pools={})
    assert status(forked(scene, "recover", "--run", parent(scene)["id"])) == 6
    assert "the run of its step waits" in said(scene)
    scene.play(pools={"tank": "guid of tank"})
    assert status(forked(scene, "recover", "--run", parent(scene)["id"])) == 0
    assert outcomes(scene) == ["done"] * 2


@pytest.mark.parametrize("name", ["client.lock", "tmp"])
def test_one_cannot_be_settled(scene: Scene, typed: Typed, name: str) -> None:
    """A run whose folder cannot be used is told, and the others are settled."""
    plans = [replace(scene.plan(DATASET), job=job) for job in ("first", "second")]
    for each in plans:
        killed = scene.backup(each, at="journal:unmounting#1", who="all")
        assert killed.status == -9
    bad = RunFolder.of(scene.state, plans[0].run).path / name
    if bad.is_dir():
        bad.rmdir()
        bad.touch()
    else:
        bad.unlink()
        bad.mkdir()
    looked = typed("recover", "--dry-run")
    assert looked.returncode == 1, looked.stderr
    assert f"run {plans[1].run} (tank/a), unmounting: would be cleaned up" in looked.stderr
    done = typed("recover")
    assert done.returncode == 1, done.stderr
    assert f"cannot use {bad} of run {plans[0].run}: " in done.stderr
    assert "ATOMTX_STATE_DIR" not in done.stderr
    assert [row["id"] for row in open_runs(scene)] == [plans[0].run]


def test_folder_of_a_step(scene: Scene, typed: Typed) -> None:
    """A step's run whose folder cannot be used is what its run of steps waits for."""
    interrupted(scene, "snap", "backup --from-snapshots", at="journal:backing-up#1")
    whole = parent(scene)
    (step,) = (run for run in open_runs(scene) if run["id"] != whole["id"])
    lock = RunFolder.of(scene.state, step["id"]).client_lock
    lock.unlink()
    lock.mkdir()
    done = typed("recover", "--run", whole["id"])
    assert done.returncode == 6, done.stderr
    words = f"the run of its step waits: cannot use {lock} of run {step['id']}: Is a directory"
    assert words in done.stderr


def test_journal_is_full(scene: Scene) -> None:
    """A step whose unsnap finds no row for its end waits, with its run, and keeps no other."""
    config = interrupted(scene, "snap --transient", "unsnap", "snap", at="journal:planned#3")
    forked(scene, "backup", "home", *config, at="journal:snapshotted#1")
    real = Journal.change

    @contextmanager
    def scarce(journal: Journal, run: Run) -> Iterator[Change]:
        with real(journal, run) as change:
            yield change
            if run.verb is Verb.PRUNE:
                raise JournalFullError("no space left for the journal")

    ended = forked(scene, "recover", change=lambda: setattr(Journal, "change", scarce))
    assert status(ended) == 6, said(scene)
    assert "the run of its step waits: " in said(scene)
    assert made(scene) == [("snap", "completed"), ("prune", None), ("backup", "completed")]
    assert status(forked(scene, "recover")) == 0, said(scene)
    assert outcomes(scene) == ["done"] * 3


def step_at_work(scene: Scene, start: Start) -> tuple[str, subprocess.Popen[str]]:
    """Have the run of an interrupted step be at work in a process that is not the run's own."""
    (child,) = scene.rows(f"SELECT id FROM runs WHERE {OF_STEP}")
    return child["id"], at_work(scene, start, "recover", "--run", child["id"])


def at_work(scene: Scene, start: Start, *words: str) -> subprocess.Popen[str]:
    """Start a command, whose client waits for `go`."""
    scene.behave(WAITS)
    started = start(*words)
    there = scene.home / "at-work"
    assert locks.wait_until(lambda: there.exists() or started.poll() is not None, 60)
    assert started.poll() is None
    return started


def test_step_is_busy(scene: Scene, typed: Typed, start: Start) -> None:
    """Where a step's run alone is at work elsewhere, it is that which is named, and waited for."""
    run = ("run", "home", *interrupted(scene, "backup", "prune", at="journal:snapshotted#1"))
    child, first = step_at_work(scene, start)
    refused = typed(*run)
    assert (refused.returncode, f"run {child} of a step of this job" in refused.stderr) == (5, True)
    second = start(*run, "--wait")
    assert child in wait_for_line(second, "waiting for its end")
    (scene.home / "go").touch()
    rest = second.communicate(timeout=120)[1]
    assert second.returncode == 0, rest
    assert "waiting for its end" not in rest
    assert first.wait(timeout=120) == 0
    runs = scene.rows("SELECT * FROM runs WHERE verb = 'run'")
    assert [run["outcome"] for run in runs] == ["completed"] * 2
    assert outcomes(scene) == ["done"] * 4


def test_step_is_busy_in_recovery(scene: Scene, typed: Typed, start: Start) -> None:
    """Nobody goes on with the steps when that run has ended: it is said, and told."""
    interrupted(scene, "backup", "snap", at="journal:snapshotted#1")
    child, first = step_at_work(scene, start)
    left = typed("recover", "--no-resume", "--no-wait")  # it would not go on with them anyway
    assert (left.returncode, told(scene)) == (0, []), left.stderr
    done = typed("recover")
    assert done.returncode == 6, done.stderr
    whole = parent(scene)["id"]
    assert f"run {whole} (run home): run {child} of its step is at work in another" in done.stderr
    assert f"run {whole} (run home): left alone" not in done.stdout
    assert len(told(scene)) == 1
    assert outcomes(scene) == [None, None]
    (scene.home / "go").touch()
    assert first.wait(timeout=120) == 0
    assert typed("recover").returncode == 0
    assert outcomes(scene) == ["done"] * 2


def test_recovery_waits_its_turn(scene: Scene, start: Start) -> None:
    """A step that is gone on with waits for its job, as in the service that was interrupted."""
    more = OTHER.format(DATASET, scene.client)
    config = interrupted(scene, "snap", "backup other", "prune", at="journal:kept#1", more=more)
    first = at_work(scene, start, "backup", "other", *config)
    second = start("recover", "--job", "home", *config)
    assert "of this job is at work" in wait_for_line(second, "waiting for its end")
    (scene.home / "go").touch()
    rest = second.communicate(timeout=120)[1]
    assert (first.wait(timeout=120), second.returncode) == (0, 0), rest
    assert outcomes(scene) == ["done"] * 3


def credential(path: Path) -> str:
    path.write_text("secret")
    path.chmod(0o600)
    return f'credentials.WORD = {{ file = "{path}" }}\n'


def test_credentials_moved(scene: Scene, typed: Typed) -> None:
    """A step's run is gone on with by the place that its job's password has now."""
    old, new = scene.home / "old", scene.home / "new"
    interrupted(scene, "backup", at="journal:snapshotted#1", more=credential(old))
    old.unlink()
    config = configured(scene, "backup", more=credential(new))
    done = typed("run", "home", *config)
    assert done.returncode == 0, done.stderr
    assert made(scene) == [("backup", "completed")] * 2


def test_waiting_night_is_given_up(scene: Scene, typed: Typed) -> None:
    """A step's run that must wait keeps the next ones from beginning; the way out is named."""
    path = scene.home / "password"
    config = interrupted(scene, "backup", "snap", at="journal:snapshotted#1", more=credential(path))
    path.unlink()
    for _ in range(2):
        done = typed("run", "home", *config)
        assert done.returncode == 6, done.stderr
    (way_out,) = re.findall(r"or `atomtx (recover .*?)`", done.stderr)
    assert way_out == f"recover --rollback --run {parent(scene)['id']}"
    assert typed(*way_out.split()).returncode == 0
    assert parent(scene)["outcome"] == "rolled-back"
    assert (made(scene), scene.pool["snapshots"]) == ([("backup", "rolled-back")], {})
    credential(path)
    assert typed("run", "home", *config).returncode == 0


def test_kept_waiting(scene: Scene) -> None:
    """Of a step's run that tried again in vain the reason is said, and the way out of both."""

    def tells_trouble() -> None:
        vars(clients)["KNOWN"] = {**clients.KNOWN, "command": "tests.scene:Played"}

    values: dict[str, Any] = {"keep-for": "7000d", "retries": 0}
    config = interrupted(scene, "backup", "snap", at="journal:snapshotted#1", **values)
    scene.behave("exit 75\n")
    assert status(forked(scene, "run", "home", *config, change=tells_trouble)) == 6, said(scene)
    assert "status 75" in said(scene)
    assert f"`atomtx recover --rollback --run {parent(scene)['id']}`" in said(scene)
    assert status(forked(scene, "recover", change=tells_trouble)) == 6, said(scene)
    assert "waiting: None" not in said(scene)
    assert "waits: None" not in said(scene)


def test_another_job_is_told(scene: Scene, typed: Typed) -> None:
    """A step of another job that is settled tells as that job does; the rest is the run's."""
    more = OTHER.format(DATASET, scene.client)
    interrupted(scene, "backup other", "backup", at="journal:snapshotted#1", more=more)
    done = typed("recover", "--job", "home")
    assert done.returncode == 0, done.stderr
    assert subjects(scene) == ["other", "run home"]


@pytest.mark.parametrize("command", ["run home", "recover", "recover --run {}"])
def test_each_is_told_of_its_own(scene: Scene, typed: Typed, command: str) -> None:
    """Whoever settles a step of another job, those alone are told of it whom that job names."""
    tell = scene._script("tell-other", '#!/bin/sh\necho "$ATOMTX_SUBJECT" >> $FAKE_ZFS/other\n')
    more = OTHER.format(DATASET, scene.client) + f'notify-command = ["{tell}"]\n'
    config = interrupted(scene, "backup other", "prune", at="journal:snapshotted#1", more=more)
    scene.play(pools={})
    assert typed("run", "home", *config).returncode == 6
    assert (subjects(scene), subjects(scene, "other")) == (["run home"], [])  # it is home's command
    scene.play(pools={"tank": "guid of tank"})
    (scene.home / "told").unlink()
    done = typed(*command.format(parent(scene)["id"]).split(), *config)
    assert done.returncode == 0, done.stderr
    again = command == "run home"  # it settles the old one, then runs all steps anew
    assert subjects(scene, "other") == ["other"] * (1 + again)
    assert subjects(scene) == ["run home"] * (1 + again)


def test_found_by_a_step(scene: Scene, typed: Typed) -> None:
    """An interrupted run by itself that a silent step settles is told of as ever."""
    config = configured(scene, "backup")
    assert forked(scene, "backup", "home", *config, at="journal:snapshotted#1").status == -9
    done = typed("run", "home", *config)
    assert done.returncode == 0, done.stderr
    assert made(scene) == [("backup", "completed")] * 2
    assert subjects(scene) == ["home", "run home"]


def test_nothing_is_forgotten(tmp_path: Path) -> None:
    """As long as the run is open the runs of its steps are known, however short the history."""
    scene, _ = fresh(tmp_path / "scene")
    interrupted(scene, "snap", "prune", "backup", at="journal:pruned#1")
    with Journal.open(scene.state) as journal:
        assert journal.expire(0) == 0
    assert status(forked(scene, "recover")) == 0
    assert [verb for verb, _ in made(scene)] == ["snap", "prune", "backup"]
    with Journal.open(scene.state) as journal:
        assert journal.expire(0) > 0
    scene.close()


@pytest.mark.parametrize(
    ("first", "expected", "snapshots"),
    [
        # Its moment is whole once it has begun, and is kept.
        ("snap --quiesce true --thaw {term}", ["done", "not-needed"], 1),
        ("snap", ["done", "failed"], 1),
    ],
)
def test_signal(scene: Scene, first: str, expected: list[str], snapshots: int) -> None:
    """The step at work is ended in order, the others are not begun."""
    term = scene._script("term", f"#!/bin/sh\nkill -TERM $(cat {scene.home}/front)\n")
    scene.behave("$home/term; sleep 30\n")
    config = configured(scene, first.format(term=term), "backup")
    ended = forked(scene, "run", "home", *config)
    assert (ended.status, status(ended)) == (0, 143), said(scene)
    run = parent(scene)
    assert (run["state"], run["outcome"]) == ("ran", "rolled-back")
    assert run["reason"].startswith("interrupted by SIGTERM")
    assert outcomes(scene) == expected
    assert len(scene.pool["snapshots"]) == snapshots
    assert open_runs(scene) == []


@pytest.mark.parametrize(
    ("step", "of_job"), [("backup --on-stop keep", "undo"), ("backup", "keep")]
)
def test_moment_is_kept(scene: Scene, step: str, of_job: str) -> None:
    """Where a backup is kept for `recover` so is the run: both are gone on with."""
    values: dict[str, Any] = {"on-stop": of_job}
    config = configured(scene, step, "snap", **values)
    scene.behave("test -e $home/again || { kill -TERM $(cat $home/front); sleep 30; }\n")
    assert status(forked(scene, "run", "home", *config)) == 143, said(scene)
    assert {run["verb"] for run in open_runs(scene)} == {"run", "backup"}
    (scene.home / "again").touch()
    assert status(forked(scene, "recover")) == 0, said(scene)
    assert made(scene) == [("backup", "completed"), ("snap", "completed")]
    assert outcomes(scene) == ["done"] * 2


@pytest.mark.parametrize(
    ("steps", "ended", "first"),
    [
        # A snap whose moment is begun ends well; of the backup its own word counts.
        (("snap --quiesce true --thaw {term}", "backup"), ["done", None], [("snap", "completed")]),
        (("backup --on-stop undo", "snap"), [None, None], [("backup", "rolled-back")]),
    ],
)
def test_left_open(
    scene: Scene,
    typed: Typed,
    steps: tuple[str, ...],
    ended: list[str | None],
    first: list[tuple[str, str]],
) -> None:
    """With `--on-stop keep` a SIGTERM leaves the run for `recover`, whatever step is at work."""
    term = scene._script(
        "term",
        f"#!/bin/sh\ntest -e {scene.home}/again && exit\n"
        f"touch {scene.home}/again\nkill -TERM $(cat {scene.home}/front)\n",
    )
    scene.behave("test -e $home/again || { $home/term; sleep 30; }\n")
    config = configured(scene, *(step.format(term=term) for step in steps))
    stopped = forked(scene, "run", "home", "--on-stop", "keep", *config)
    assert status(stopped) == 143, said(scene)
    (left,) = open_runs(scene)
    assert (left["verb"], left["state"]) == ("run", "planned")
    assert left["reason"].startswith("interrupted by SIGTERM: `atomtx recover` goes on")
    assert outcomes(scene) == ended
    assert made(scene) == first
    assert "1 not ended" in typed("doctor").stdout
    assert status(forked(scene, "recover")) == 0, said(scene)
    assert outcomes(scene) == ["done"] * 2
    assert sorted(made(scene)) == sorted({*first, ("snap", "completed"), ("backup", "completed")})
    assert parent(scene)["reason"] is None


@pytest.mark.parametrize("on_stop", ["keep", "undo"])
def test_steps_are_told(scene: Scene, typed: Typed, on_stop: str) -> None:
    """What `--on-stop keep` says is said to each step that knows it."""
    config = configured(scene, "snap", "backup")
    assert typed("run", "home", "--on-stop", on_stop, *config).returncode == 0
    query = "SELECT json_extract(plan, '$.on_stop') AS word FROM runs WHERE verb = 'backup'"
    assert scene.rows(query) == [{"word": on_stop}]


def test_of_another_job(scene: Scene) -> None:
    """`recover --job` leaves a step of another job's run to that run."""
    more = OTHER.format(DATASET, scene.client)
    interrupted(scene, "backup other", "snap", at="journal:snapshotted#1", more=more)
    assert status(forked(scene, "recover", "--job", "other")) == 0
    assert "nothing to recover" in said(scene)
    assert made(scene) == [("backup", None)]
    assert status(forked(scene, "recover", "--job", "home")) == 0
    assert made(scene) == [("backup", "completed"), ("snap", "completed")]


def test_stopped(scene: Scene, typed: Typed) -> None:
    """`stop` ends what lives of a step whose front end is gone, and gives the run up."""
    killed_by_its_client(scene, "backup", "snap")
    done = typed("stop", parent(scene)["id"])
    assert done.returncode == 0, done.stderr
    assert parent(scene)["outcome"] == "rolled-back"
    assert made(scene) == [("backup", "rolled-back")]
    assert scene.pool["snapshots"] == {}


def test_page() -> None:
    """What the page shows can be run: all of it is read, and each step is a command."""
    page = (SOURCE.parent / "docs/steps.md").read_text()
    shown = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    found = config.parse("".join(shown), "/etc/atomtx/atomtx.toml")
    assert cli_steps.problems(found) == []
    assert cli_steps.backed_up(found, "night") == ("night", "night-borg", "srv-dump")
    night = [words[0] for words in cli_steps.words_of(found, "night")]
    assert cli_steps.words_of(found, "night")[1] == ("sure", "scan-kept", "--job", "night")
    assert night == ["snap", "sure", "clone", "backup", "backup", "backup", "unsnap"]


def test_exit_statuses() -> None:
    """The help and the page tell of the same exit statuses."""
    page = (SOURCE.parent / "docs/steps.md").read_text()
    table = page.partition("| exit status |")[2].partition("\n\n")[0]
    words = (cli_steps.run.help or "").partition("EXIT STATUS\n")[2]
    in_help = re.findall(r"(?:^| ) +(\d+(?:, \d+)?) \w", words, re.MULTILINE)
    assert sorted(in_help) == sorted(re.findall(r"^\| (\d.*?) \|", table, re.MULTILINE))
    assert len(in_help) > 5

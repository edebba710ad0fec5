"""
The course of a run, from its first intent to `destroyed`: the engine's own processes, for real.

The pools are played (`tests/fakezfs.py`): what ZFS itself does is tested in the virtual machine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest

import tests.scene
from atomtx import (
    cleaning,
    clients,
    errand,
    executor,
    history,
    locks,
    moment,
    probing,
    process,
    runner,
    settling,
    supervisor,
    system,
)
from atomtx.cleaning import Cleaner
from atomtx.errors import (
    EffectError,
    JournalFullError,
    StaleRunError,
    UserError,
    WaitingError,
)
from atomtx.executor import Tell
from atomtx.intents import AROUND_RUN, RunHook
from atomtx.interrupts import Interrupts
from atomtx.journal import Journal
from atomtx.mounts import inhabitants, mountinfo, namespace, tree
from atomtx.mounts.witness import Witness
from atomtx.records import Run
from atomtx.recovery import MAX_ATTEMPTS, LeaveAlone, Resume, RollBack, RollForward, Wait
from atomtx.settling import Patience, Settler
from atomtx.statedir import RunFolder
from atomtx.volumes import zfs
from atomtx.volumes.kind import Identity
from atomtx.volumes.kinds import Kinds
from tests.scene import NOW, Ended, Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

SETS = ("tank/a", "tank/b")
FIRST_GUID = 2**63 + 1
PATIENCE_S = 60.0
FRONT_END = "$(awk '/^PPid/ {print $2}' /proc/$PPID/status)"  # the parent of the client's


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def run_of(scene: Scene) -> dict[str, Any]:
    (run,) = scene.rows("SELECT * FROM runs ORDER BY started_at DESC LIMIT 1")
    return run


def steps(scene: Scene) -> list[tuple[str, int, str, str | None]]:
    rows = scene.rows("SELECT * FROM steps ORDER BY id")
    return [(row["kind"], row["attempt"], row["outcome"], row["detail"]) for row in rows]


def moves(scene: Scene) -> list[tuple[str, str | None]]:
    return [(r["dest"], r["reason"]) for r in scene.rows("SELECT * FROM moves ORDER BY rev")]


def check_failed(scene: Scene, ended: Ended, reason: str) -> None:
    """The run has failed for that reason, everything is gone, and nothing was saved."""
    assert ended.status == 0, (scene.home / "log").read_text()
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("failed", reason)
    assert scene.left() == []
    assert scene.copies() == []


def check_completed(scene: Scene, ended: Ended, *, attempts: int = 1) -> None:
    """The run has completed, its backup is of the moment, and nothing else is left."""
    assert ended.status == 0, (scene.home / "log").read_text()
    run = run_of(scene)
    assert (run["state"], run["outcome"], run["cleanup"]) == ("destroyed", "completed", None)
    assert (run["attempts"], run["reason"]) == (attempts, None)
    assert scene.copies() == ["frozen frozen"]
    assert scene.left() == []


# -- the ordinary course ---------------------------------------------------------------------

COURSE = [
    ("take-snapshots", 0, "done", None),
    ("destroy-snapshots", 0, "done", None),
    ("hold-snapshots", 0, "done", None),
    ("release-snapshots", 0, "done", None),
    ("mount-volumes", 1, "done", None),
    ("unmount-volumes", 1, "done", None),
    ("run-client", 1, "done", None),
    ("end-client", 1, "not-needed", "it had ended"),
]
MOVES = [("snapshotted", None), ("mounted", None), ("backing-up", None), ("unmounting", None)]


def test_course(scene: Scene) -> None:
    """Promises 1 and 4: each step is journaled and done, the client reads the moment, all goes."""
    the_plan = scene.plan(*SETS)
    scene.changes.append(lambda: scene.write("frozen", *SETS))
    ended = scene.backup(the_plan)
    check_completed(scene, ended)
    assert steps(scene) == COURSE
    assert moves(scene) == [*MOVES, ("destroyed", None)]
    assert (ended.interrupted, ended.raised, ended.said("warn")) == (None, None, [])
    paths = [str(scene.live(name)) for name in SETS]
    assert ended.said("step") == [
        "snapshot 2 datasets of pool tank in one transaction",
        "mount 2 snapshots read-only at the live paths, in a namespace of its own",
        f"command reads {', '.join(paths)}",
        "cleaning up",
    ]
    assert scene.calls() == [["/", "", "", " ".join(paths)]]
    assert run_of(scene)["moment_at"] == NOW * 1_000_000
    found = scene.rows("SELECT snapshot_guid, createtxg, is_empty FROM volumes ORDER BY n")
    assert [tuple(row.values()) for row in found] == [
        (str(FIRST_GUID), "101", 3),
        (str(FIRST_GUID + 1), "101", 3),
    ]


def test_effects(scene: Scene) -> None:
    """Promise 8: one command a step and pool; what was held is released before it is destroyed."""
    the_plan = scene.plan(*SETS)
    scene.backup(the_plan)
    names = [v.snapshot for v in the_plan.volumes]
    token = f"atomtx-{the_plan.run}"
    assert scene.zfs("snapshot") == [["-o", f"atomtx:run={the_plan.run}", *names]]
    assert scene.zfs("hold") == scene.zfs("release") == [[token, *names]]
    (get,) = scene.zfs("get")
    assert get[-2:] == names
    assert [p.partition("#")[0] for p in scene.backup(scene.plan(*SETS)).points if "zfs " in p] == [
        f"{side}:zfs {verb}"
        for verb in ("snapshot", "get", "hold", "release", "program")
        for side in ("start", "end")
    ]


def test_two_pools(scene: Scene) -> None:
    """Promise 8: one command a pool; the time between them is recorded and shown."""
    ended = scene.backup(scene.plan("tank/a", "zroot/b"))
    check_completed(scene, ended)
    assert len(scene.zfs("snapshot")) == len(scene.zfs("hold")) == 2
    details = [detail for kind, _, _, detail in steps(scene) if kind == "take-snapshots"]
    assert len(set(details)) == 1
    told = next(w for w in ended.said("step") if "not of one moment" in w)
    assert told == f"the snapshots are not of one moment: {details[0]}"
    within = str(details[0]).removeprefix("one transaction group a pool; 2 pools within ")
    assert 0 <= float(within.removesuffix(" s")) < 60


def test_clock_that_is_set(scene: Scene) -> None:
    """Promise 8: the time between two pools is right though somebody sets the clock meanwhile."""
    scene.changes.append(_set_back)
    scene.backup(scene.plan("tank/a", "zroot/b"))
    details = {detail for kind, _, _, detail in steps(scene) if kind == "take-snapshots"}
    (words,) = details
    assert 0 <= float(str(words).rpartition("within ")[2].removesuffix(" s")) < 60


def _set_back() -> None:
    """Have the clock be set back by an hour each time somebody looks at it."""
    real, looks = time.time_ns, count(1)

    def time_ns() -> int:
        return real() - next(looks) * 3600 * 10**9

    setattr(time, "time_ns", time_ns)  # noqa: B010  of a process of its own
    setattr(time, "time", lambda: time_ns() / 1e9)  # noqa: B010


def test_moment_is_the_first(scene: Scene) -> None:
    """The moment of a set over two pools is that of its first snapshot."""
    the_plan = scene.plan("zroot/a", "tank/b")
    scene.changes.append(lambda: _age(scene))
    scene.backup(the_plan)
    assert run_of(scene)["moment_at"] == NOW * 1_000_000


def _age(scene: Scene) -> None:
    """Have the clock go on by a minute after the first pool's snapshots."""
    taken = zfs.Zfs.take

    def take(*args: Any, **options: Any) -> EffectError | None:
        done = taken(*args, **options)
        scene.play(now=NOW + 60)
        return done

    zfs.Zfs.take = take  # type: ignore[method-assign]


def test_tree(scene: Scene) -> None:
    """In a tree: the directories and mounts are intended first, then made, and removed again."""
    root = str(scene.home / "tree")
    the_plan = scene.plan(*SETS, root=root, layout="tree", live_paths=("/live",), grace_s=7)
    ended = scene.backup(the_plan)
    check_completed(scene, ended)
    assert scene.calls()[0][3] == " ".join(root + str(scene.live(name)) for name in SETS)
    assert f"mount 2 snapshots read-only under {root}" in ended.said("step")
    assert steps(scene) == COURSE
    assert not Path(root).exists()
    (row,) = scene.rows("SELECT payload FROM steps WHERE kind = 'mount-volumes'")
    assert f'"directories": ["{root}", "{root}/' in row["payload"]


@pytest.mark.parametrize("who", ["front", "runner", "all"])
@pytest.mark.parametrize("point", ["start:make tree#1", "end:make tree#1", "journal:mounted#1"])
def test_tree_killed(scene: Scene, point: str, who: str) -> None:
    """Promise 1: a tree is in the journal before it is in the machine: it is found and removed."""
    root = str(scene.home / "tree")
    assert scene.backup(scene.plan(*SETS, root=root, layout="tree"), point, who).status == -9
    check_completed(scene, scene.recover(), attempts=2)
    assert not Path(root).exists()


@pytest.mark.parametrize("place", ["tank", "other"])
def test_covered_for_a_while(scene: Scene, place: str) -> None:
    """Promise 7: a client that was led to other files is stopped, though they are gone again."""
    live, reads, rest = scene.home / "live", scene.home / "reads", scene.home / "rest"
    the_plan = scene.plan(*SETS)
    (live / "other").mkdir()
    mount = ("mount", "-t", "tmpfs", "theirs", live / place)
    scene.behave(f"touch {reads}; until test -e {rest}; do sleep 0.05; done; sleep 2\n")

    def cover() -> None:
        assert locks.wait_until(reads.exists, 30, step_s=0.02)
        subprocess.run(mount, check=True)
        time.sleep(0.7)
        subprocess.run(("umount", live / place), check=True)
        rest.touch()

    subprocess.run(("mount", "--bind", live, live), check=True)
    try:
        subprocess.run(("mount", "--make-shared", live), check=True)
        somebody = threading.Thread(target=cover)
        somebody.start()
        ended = scene.backup(the_plan)
        somebody.join()
    finally:
        subprocess.run(("umount", live), check=True)
    if place == "other":
        check_completed(scene, ended)
        return
    check_failed(scene, ended, f"{scene.live('tank/a')} was unmounted while the client read it")


def test_covered_before_it_is_watched(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """So where the others' files are there as the client starts, and the watch over it begins."""
    live, covered, rest = scene.home / "live", scene.home / "covered", scene.home / "rest"
    the_plan = scene.plan(*SETS)
    scene.behave(f"until test -e {rest}; do sleep 0.05; done; sleep 2\n")
    host, real = os.getpid(), process.spawn_client

    def spawn(*words: Any, **values: Any) -> Any:
        outside = ("nsenter", f"--mount=/proc/{host}/ns/mnt")
        subprocess.run((*outside, "mount", "-t", "tmpfs", "theirs", live / "tank"), check=True)
        covered.touch()
        return real(*words, **values)

    def uncover() -> None:
        assert locks.wait_until(covered.exists, 30, step_s=0.02)
        time.sleep(0.7)
        subprocess.run(("umount", live / "tank"), check=True)
        rest.touch()

    monkeypatch.setattr(process, "spawn_client", spawn)
    subprocess.run(("mount", "--bind", live, live), check=True)
    try:
        subprocess.run(("mount", "--make-shared", live), check=True)
        somebody = threading.Thread(target=uncover)
        somebody.start()
        ended = scene.backup(the_plan)
        somebody.join()
    finally:
        subprocess.run(("umount", live), check=True)
    check_failed(scene, ended, f"{scene.live('tank/a')} was unmounted while the client read it")


@contextmanager
def standing_in(scene: Scene, place: str, then: str = "") -> Iterator[None]:
    """Have somebody stand in a directory of the tree from when the client reads it."""
    reads, may_go_on = scene.home / "reads", scene.home / "go-on"
    scene.behave(f"touch {reads}; until test -e {may_go_on}; do sleep 0.05; done\n{then}")
    opened: list[int] = []

    def enter() -> None:
        if locks.wait_until(reads.exists, 30, step_s=0.02):
            opened.append(os.open(place, os.O_RDONLY | os.O_DIRECTORY))
        may_go_on.touch()

    somebody = threading.Thread(target=enter)
    somebody.start()
    try:
        yield
    finally:
        somebody.join()
        for descriptor in opened:
            os.close(descriptor)


@pytest.mark.parametrize("inside", ["tank/b", "tank/a", "tank/a/c"])
def test_tree_in_use(scene: Scene, inside: str) -> None:
    """A parked run's tree blocks no new backup: that is mounted on top, and taken away alone."""
    root, sets = str(scene.home / "tree"), (*SETS, "tank/a/c")
    scene.changes.append(lambda: setattr(cleaning, "PAUSES_S", ()))
    with standing_in(scene, root + str(scene.live(inside))):
        first = scene.backup(scene.plan(*sets, root=root, layout="tree"))
        assert first.run
        assert (first.run.outcome, first.run.cleanup) == ("completed", "parked")
        beneath = [e.id for e in mountinfo.read() if e.mountpoint.startswith(root)]
        for dataset in sets:
            scene.write("later", dataset)
        second = scene.backup(scene.plan(*sets, root=root, layout="tree"))
        assert second.run
        assert (second.run.reason, second.run.state) == (None, "destroyed")
        assert [e.id for e in mountinfo.read() if e.mountpoint.startswith(root)] == beneath
    assert scene.copies() == ["frozen frozen frozen", "later later later"]
    scene.recover()
    assert scene.left() == []
    assert not Path(root).exists()


def test_tree_in_use_as_the_client_fails(scene: Scene) -> None:
    """A moment that is worth another attempt is not given up for who stands in its tree."""
    root = str(scene.home / "tree")
    place = root + str(scene.live("tank/b"))
    scene.changes.append(lambda: setattr(cleaning, "PAUSES_S", ()))
    scene.changes.append(lambda: setattr(executor, "_RETRY_S", (0.0,)))
    once = f"test -e {scene.home}/once || {{ touch {scene.home}/once; exit 75; }}\n"
    with standing_in(scene, place, once):
        terms: dict[str, Any] = {"root": root, "layout": "tree", "client": "played"}
        waits = scene.backup(scene.plan(*SETS, keep_for_s=10**9, **terms))
        assert isinstance(waits.raised, WaitingError), waits.run
        assert f"waits: {place} is busy: open by " in waits.raised.message
        assert waits.raised.message.endswith(", after: status 75")
        assert len(scene.pool["snapshots"]) == 2
    scene.changes.append(lambda: setattr(clients, "load", _inspected))
    check_completed(scene, scene.recover(), attempts=2)
    assert not Path(root).exists()


@pytest.mark.parametrize("killed", ["", "journal:backing-up#1"])
def test_tree_in_use_as_the_client_fails_once(scene: Scene, killed: str) -> None:
    """Without a time within which it is kept the moment does not block new ones: it is parked."""
    root = str(scene.home / "tree")
    place = root + str(scene.live("tank/b"))
    scene.changes.append(lambda: setattr(cleaning, "PAUSES_S", ()))
    scene.changes.append(lambda: setattr(clients, "load", _inspected))
    once = f"test -e {scene.home}/once || {{ touch {scene.home}/once; exit 75; }}\n"
    terms: dict[str, Any] = {"root": root, "layout": "tree", "client": "played"}
    with standing_in(scene, place, once):
        ended = scene.backup(scene.plan(*SETS, retries=1, **terms), killed, "front")
        if killed:
            assert ended.status == -signal.SIGKILL
            ended = scene.recover()
        assert ended.run, ended.raised
        assert (ended.run.outcome, ended.run.cleanup) == ("failed", "parked")
        assert ended.run.reason == "status 75"
        second = scene.backup(scene.plan(*SETS, **terms))
        assert second.run
        assert (second.run.reason, second.run.state) == (None, "destroyed")
    scene.recover()
    assert scene.left() == []
    assert not Path(root).exists()


def test_ended_meanwhile(scene: Scene) -> None:
    """A run that ended by itself while `recover` was at others was not found unfinished."""
    the_plan = scene.plan(*SETS)

    def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
        (run,) = journal.open_runs()
        Settler(journal, Interrupts(), Tell()).settle(run)
        assert Settler(journal, interrupts, tell).decide(run) == settling._ENDED
        settled = Settler(journal, interrupts, tell).settle(run)
        ended.run, ended.decisions = settled.run, [settled.decision]
        assert settled.has_ended_before
        assert settled.status == 0

    scene.backup(the_plan, "journal:backing-up#1", "all")
    ended = scene._in_front_end(work, {})
    assert ended.status == 0, (scene.home / "log").read_text()
    assert isinstance(ended.decisions[0], LeaveAlone)


def test_killed_tree_in_use(scene: Scene) -> None:
    """A tree that cannot be taken away yet keeps the moment waiting, and is named."""
    root = str(scene.home / "tree")
    place = root + str(scene.live("tank/b"))
    scene.changes.append(lambda: setattr(cleaning, "PAUSES_S", ()))
    once = f"test -e {scene.home}/once || {{ touch {scene.home}/once; exec sleep 1000; }}\n"
    with standing_in(scene, place, once):
        the_plan = scene.plan(*SETS, root=root, layout="tree")
        killed = scene.backup(the_plan, "journal:backing-up#1", "all later", delay_s=1.5)
        assert killed.status == -signal.SIGKILL
        waits = scene.recover()
        assert isinstance(waits.raised, WaitingError)
        assert f"waits: {place} is busy: open by " in waits.raised.message
    check_completed(scene, scene.recover(), attempts=2)
    assert not Path(root).exists()


@pytest.mark.parametrize("point", ["", "journal:backing-up#1"])
def test_tree_that_stays(scene: Scene, point: str) -> None:
    """With --leave-dirs the directories of the tree stay, after a crash too; nothing else does."""
    root = str(scene.home / "tree")
    options: dict[str, Any] = {
        "root": root,
        "layout": "tree",
        "leave_dirs": True,
        "whole_root": True,
    }
    ended = scene.backup(scene.plan(*SETS, **options), point, "all")
    check_completed(scene, scene.recover() if point else ended, attempts=2 if point else 1)
    assert scene.calls()[-1][3] == root
    for name in SETS:
        assert list(Path(f"{root}{scene.live(name)}").iterdir()) == []
    again = scene.backup(scene.plan(*SETS, **options))
    assert again.run
    assert again.run.outcome == "completed"
    (row,) = scene.rows(
        "SELECT payload FROM steps WHERE kind = 'mount-volumes' ORDER BY id DESC LIMIT 1"
    )
    assert '"directories": []' in row["payload"]


@pytest.mark.parametrize("layout", ["tree", "namespace"])
def test_frozen_link(scene: Scene, layout: str) -> None:
    """A link that a user puts on the way to a mountpoint leads no mount to another place."""
    victim = scene.home / "victim"
    (victim / "b").mkdir(parents=True)
    root = str(scene.home / "tree") if layout == "tree" else ""
    the_plan = scene.plan("tank/a", "tank/a/x/b", root=root, layout=layout)
    way = scene.live("tank/a") / "x"
    way.rename(way.with_name("kept"))
    way.symlink_to(victim)
    ended = scene.backup(the_plan)
    assert ended.run
    assert ended.run.outcome == "failed"
    assert "Not a directory" in str(ended.run.reason)
    assert str(victim) not in Path("/proc/self/mountinfo").read_text()
    assert scene.left() == []


def test_tree_is_taken(scene: Scene) -> None:
    """What lies at a mountpoint of the tree is nothing of ours: the run has failed."""
    root = scene.home / "tree"
    used = Path(f"{root}{scene.live('tank/a')}")
    used.mkdir(parents=True)
    (used / "file").write_text("mine")
    ended = scene.backup(scene.plan("tank/a", root=str(root), layout="tree"))
    assert ended.run
    reason, _, advice = str(ended.run.reason).partition(" (")
    assert reason == f"{used} is not an empty directory"
    assert "another --root" in advice
    check_failed(scene, ended, f"{reason} ({advice}")
    assert (used / "file").read_text() == "mine"


# -- what the client is given ----------------------------------------------------------------


def test_client_environment(scene: Scene) -> None:
    """A client gets the plan's environment, what it was planned with, and the moment."""
    env = (("TMPDIR", "/var/tmp"), ("HOME", "/root"))
    scene.behave('echo "$HOME" > $home/home')
    check_completed(scene, scene.backup(scene.plan(*SETS, client="played", env=env)))
    moment = datetime.fromtimestamp(NOW, UTC).isoformat()
    assert scene.calls()[0][1:3] == ["/var/tmp", f"1.2 repo {moment} None"]
    assert (scene.home / "home").read_text() == "/root\n"


@pytest.mark.parametrize("layout", ["namespace", "tree"])
@pytest.mark.parametrize("where", ["tank/a", "tank/elsewhere"])
def test_frozen_tmp(scene: Scene, where: str, layout: str) -> None:
    """A client whose folder for temporary files is frozen gets another one."""
    root = str(scene.home / "tree") if layout == "tree" else ""
    tmp = str(scene.live(where) / "tmp")
    the_plan = scene.plan("tank/a", env=(("TMPDIR", tmp),), layout=layout, root=root)
    ended = scene.backup(the_plan)
    own = str(RunFolder.of(scene.state, the_plan.run).temporary)
    frozen = where == "tank/a" and layout == "namespace"
    assert scene.calls()[0][1] == (own if frozen else tmp)
    assert ended.run
    assert ended.run.outcome == "completed"


@pytest.mark.parametrize("is_live", [True, False])
def test_tmp_behind_a_link(scene: Scene, is_live: bool) -> None:
    """A link to a live folder in a frozen place is no frozen folder, and the other way round."""
    folder = scene.live("tank/a") / "tmp"
    live = (str(folder),) if is_live else ()
    link = scene.live("tank/a") / "link" if is_live else scene.home / "link"
    the_plan = scene.plan("tank/a", env=(("TMPDIR", str(link)),), live_paths=live, excludes=live)
    folder.mkdir()
    link.symlink_to(folder)
    scene.backup(the_plan)
    own = str(RunFolder.of(scene.state, the_plan.run).temporary)
    assert scene.calls()[0][1] == (str(link) if is_live else own)


def test_default_tmp(scene: Scene) -> None:
    """Without TMPDIR it is /tmp that must not be frozen."""
    scene.changes.append(lambda: setattr(moment, "_DEFAULT_TMP", str(scene.live("tank/a"))))
    the_plan = scene.plan("tank/a")
    scene.backup(the_plan)
    assert scene.calls()[0][1] == str(RunFolder.of(scene.state, the_plan.run).temporary)


def test_time_limit_and_live_paths(scene: Scene) -> None:
    """The plan's limit, its grace and its live paths reach the runner."""
    live = scene.live("tank/a") / "live"
    the_plan = scene.plan(
        "tank/a", time_limit_s=1, grace_s=1, live_paths=(str(live),), excludes=(str(live),)
    )
    live.mkdir()
    loop = "while :; do sleep 0.1 || :; done"
    scene.behave(f"echo now > {live}/seen\ntrap 'echo stopped' TERM\n{loop}")
    ended = scene.backup(the_plan)
    check_failed(scene, ended, "did not end within 1s: killed")
    assert (live / "seen").read_text() == "now\n"
    log = RunFolder.of(scene.state, the_plan.run).log.read_text()
    assert "stopped" in log
    assert "not ended after 1s: killed" in log


def test_needed_elsewhere(tmp_path: Path) -> None:
    """All that a client needs is known, wherever a link leads; of the user's own words nothing."""
    (tmp_path / "link").symlink_to(tmp_path / "backup")
    client = clients.load("restic")
    env = {"RESTIC_REPOSITORY": f"{tmp_path}/link/repo", "RESTIC_CACHE_DIR": "/cache"}
    repository = os.path.realpath(tmp_path / "backup/repo")
    assert moment._needed(client, clients.Settings((), (), env, "/")) == ("/cache", repository)
    assert moment._needed(client, clients.Settings(("my-restic",), (), env, "/")) is None


def _fail(_: object, line: str) -> NoReturn:
    raise ZeroDivisionError(f"no such thing: {line}")


def test_bug_in_a_reader(scene: Scene) -> None:
    """A bug while the client is watched is a failure, told once; the client does not run again."""
    scene.changes.append(lambda: setattr(tests.scene._Reader, "stderr", _fail))
    # In the place of pytest's, which has another descriptor.
    scene.changes.append(lambda: setattr(sys, "stderr", os.fdopen(2, "w", 1, closefd=False)))
    scene.behave('echo "word: $MY_PASSWORD" >&2; sleep 100')
    env = (("MY_PASSWORD", "open sesame"),)
    ended = scene.backup(scene.plan("tank/a", client="played", env=env))
    check_failed(scene, ended, "a bug in atomtx: ZeroDivisionError: no such thing: word: ***")
    assert len(scene.calls()) == 1
    (folder,) = scene.home.glob("state/runs/*")
    where = (folder / "runner.log").read_text()
    assert "in _fail\n" in where
    assert "open sesame" not in where


def test_bug_on_a_full_disk(scene: Scene) -> None:
    """Where there is no room for the traceback of a bug, its end is told all the same."""

    scene.changes.append(lambda: setattr(tests.scene._Reader, "stderr", _fail))
    scene.changes.append(lambda: setattr(traceback, "print_tb", _used_up))
    scene.behave("echo word >&2; sleep 100")
    ended = scene.backup(scene.plan("tank/a", client="played"))
    check_failed(scene, ended, "a bug in atomtx: ZeroDivisionError: no such thing: word")


@pytest.mark.parametrize(("later_s", "told"), [(60, True), (0, False), (-60, False)])
def test_parent_of_a_clock_set_back(scene: Scene, later_s: int, told: bool) -> None:
    """Where the last backup is newer than the moment, its id is told: by time it is not found."""
    scene.play(now=NOW + later_s)
    scene.backup(scene.plan("tank/a", client="played"))
    scene.play(now=NOW)
    scene.backup(scene.plan("tank/a", client="played"))
    (row,) = scene.rows("SELECT backup_id FROM backups ORDER BY rowid LIMIT 1")
    parent = scene.calls()[1][2].split()[-1]
    assert parent == (row["backup_id"] if told else "None")


def test_parent_without_id(scene: Scene) -> None:
    """A last backup without an id, as of a client that tells none, is no parent."""
    scene.play(now=NOW + 60)
    scene.backup(scene.plan("tank/a"))
    scene.play(now=NOW)
    check = scene.backup(scene.plan("tank/a", client="played"))
    assert check.run
    assert check.run.outcome == "completed"
    assert scene.calls()[1][2].split()[-1] == "None"


# -- what is refused before the client starts (promises 2, 7 and 8) --------------------------


def test_empty_set(scene: Scene) -> None:
    """Promise 7: a set that is empty as a whole is an error before the client starts."""
    the_plan = scene.plan(*SETS)
    for name in SETS:
        (scene.live(name) / "file").unlink()
    ended = scene.backup(the_plan)
    reason = "there is nothing to back up: every volume of the set is empty"
    check_failed(scene, ended, f"{reason} (is what belongs there mounted?)")
    assert scene.calls() == []
    assert [words for words in ended.said("warn") if reason in words]


@pytest.mark.parametrize("root", ["", "tree"])
def test_empty_volume(scene: Scene, root: str) -> None:
    """Promise 7: a volume that is empty, and was not in the job's last backup, is an error."""
    values = {"root": str(scene.home / root), "layout": "tree"} if root else {}
    first = scene.plan(*SETS, **values)
    (scene.live("tank/b") / "file").unlink()
    scene.backup(first)
    assert [r["is_empty"] for r in scene.rows("SELECT * FROM volumes ORDER BY n")] == [3, 1]
    shown = history.volumes(scene.state / "journal.db", run_of(scene)["id"])
    assert [volume.is_empty for volume in shown] == [0, 1]
    assert run_of(scene)["outcome"] == "completed"
    scene.write("frozen", "tank/b")
    (scene.live("tank/a") / "file").unlink()
    ended = scene.backup(scene.plan(*SETS, **values))
    assert ended.run
    assert ended.run.outcome == "failed"
    path = scene.live("tank/a")
    assert ended.run.reason == (
        f"{path} is empty, and was not in the last completed backup"
        " (if that is right, exclude it, or put a file into it)"
    )
    assert len(scene.calls()) == 1


@pytest.mark.parametrize("found", [(), ("tank/b",)])
def test_empty_once(scene: Scene, found: tuple[str, ...]) -> None:
    """Promise 7: where an older version took lost+found for a file, a run warns and completes."""
    the_plan = scene.plan(*SETS, found=found)
    bare = scene.live("tank/b")
    (bare / "file").unlink()
    (bare / "lost+found").mkdir()
    scene.backup(the_plan)
    scene.run_sql("UPDATE volumes SET is_empty = 0")
    for warnings in (1, 0):
        ended = scene.backup(scene.plan(*SETS, found=found))
        assert (run_of(scene)["outcome"], run_of(scene)["reason"]) == ("completed", None)
        assert sum("nothing but lost+found" in words for words in ended.said("warn")) == warnings
    scene.run_sql("UPDATE volumes SET is_empty = 0")
    (bare / "lost+found").rmdir()
    scene.backup(scene.plan(*SETS, found=found))
    assert run_of(scene)["outcome"] == ("partial" if found else "failed")


def test_empty_bare(scene: Scene) -> None:
    """Promise 7: a volume of which only lost+found is left has lost its files."""
    the_plan = scene.plan(*SETS)
    (scene.live("tank/b") / "lost+found").mkdir()
    scene.backup(the_plan)
    (scene.live("tank/b") / "file").unlink()
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    assert ended.run.outcome == "failed"
    words = "is empty, and was not in the last completed backup"
    assert f"{scene.live('tank/b')} {words}" in str(ended.run.reason)


@pytest.mark.parametrize("found", ["tank/a/b", "tank/c"])
def test_empty_found(scene: Scene, found: str) -> None:
    """Promise 7: where one that -r or -a found was emptied, the rest is saved: it is partial."""
    sets = ("tank/a", found)
    scene.backup(scene.plan(*sets, found=(found,)))
    below = scene.live(found)
    (below / "file").unlink()
    for _ in range(2):  # nor is the emptied one taken for what is usual
        scene.backup(scene.plan(*sets, found=(found,)))
        row = run_of(scene)
        reason = f"{below} is empty, and was not in the last completed backup"
        assert (row["outcome"], row["reason"]) == ("partial", reason)
    (below / "file").write_text("again")
    scene.backup(scene.plan(*sets, found=(found,)))
    assert run_of(scene)["outcome"] == "completed"


def test_empty_named_below(scene: Scene) -> None:
    """Promise 7: one that was named is refused, wherever it lies."""
    scene.backup(scene.plan("tank/a", "tank/a/b"))
    (scene.live("tank/a/b") / "file").unlink()
    scene.backup(scene.plan("tank/a", "tank/a/b"))
    assert run_of(scene)["outcome"] == "failed"
    assert len(scene.calls()) == 1


def test_empty_before(scene: Scene) -> None:
    """A volume that was empty in the last backup may be empty again."""
    for _ in range(2):
        the_plan = scene.plan(*SETS)
        (scene.live("tank/b") / "file").unlink(missing_ok=True)
        scene.backup(the_plan)
        assert run_of(scene)["outcome"] == "completed"


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"snapshot": "silent"}, "the snapshot {0} was not taken, or is gone already"),
        (
            {"snapshot": "refuse"},
            "cannot take the snapshots: cannot snapshot: out of luck (the command was: "
            "zfs snapshot -o atomtx:run={run} {0} {1})",
        ),
        ({"snapshot": "foreign"}, "{0} exists and is not ours"),
        (
            {"snapshot": "skew"},
            "the snapshots are not of one moment: their createtxg differ",
        ),
    ],
)
def test_snapshots_that_are_not_ours(scene: Scene, faults: dict[str, str], reason: str) -> None:
    """Promises 2 and 8: what was taken is looked at; what is not ours is not touched."""
    the_plan = scene.plan(*SETS)
    scene.play(faults=faults)
    ended = scene.backup(the_plan)
    names = [v.snapshot for v in the_plan.volumes]
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert ended.run.reason == reason.format(*names, run=the_plan.run)
    assert ended.said("warn") == [ended.run.reason]
    assert scene.calls() == []
    assert list(scene.pool["snapshots"]) == (names if "foreign" in faults.values() else [])
    assert scene.zfs("hold") == []


def test_runner_killed_on_the_way(scene: Scene) -> None:
    """A runner that is killed while it mounts costs an attempt: another one mounts again."""
    ended = scene.backup(scene.plan(*SETS), "runner:start:mount#3")
    check_completed(scene, ended, attempts=2)
    words = "the runner was killed by signal 9; the snapshots are mounted again"
    assert words in ended.said("warn")
    assert len(scene.calls()) == 1


@pytest.mark.parametrize("retries", [0, 1])
def test_runners_killed_on_the_way(scene: Scene, retries: int) -> None:
    """Section 3: these attempts are bounded, too; then the run has failed, and nothing is left."""
    scene.changes.append(lambda: setattr(namespace, "enter", _kill_myself))
    ended = scene.backup(scene.plan(*SETS, retries=retries))
    check_failed(scene, ended, "the runner was killed by signal 9")
    assert run_of(scene)["attempts"] == MAX_ATTEMPTS + retries
    assert scene.calls() == []


def _kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_runner_that_fails(scene: Scene) -> None:
    """A runner that cannot do its work tells why: that is a reason to give up."""
    the_plan = scene.plan(*SETS)
    client = replace(the_plan.client, cwd="/nonexistent")
    ended = scene.backup(replace(the_plan, client=client))
    reason = "cannot work in /nonexistent: No such file or directory at that moment"
    hint = "run atomtx from a directory that was there when the snapshot was taken"
    check_failed(scene, ended, f"{reason} ({hint})")


# -- how the client ended --------------------------------------------------------------------


def test_client_failed(scene: Scene) -> None:
    """A failed client's words are the reason, of the run and its step; the snapshots go."""
    scene.behave("echo no such repository >&2; exit 9")
    ended = scene.backup(scene.plan(*SETS))
    reason = "no such repository (exit status 9)"
    check_failed(scene, ended, reason)
    assert ("run-client", 1, "failed", reason) in steps(scene)
    assert moves(scene)[3] == ("unmounting", reason)
    assert ended.said("sleep") == []


def test_mount_taken_away(scene: Scene) -> None:
    """Promise 7: a mount that did not stay from the client's start to its end is a failure."""
    scene.behave('umount -l "$1"')
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    path = scene.live("tank/a")
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert ended.run.reason == f"{path} was unmounted while the client read it"


def test_no_room_for_the_progress(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk stops the display, not the backup."""
    monkeypatch.setattr(RunFolder, "write_progress", _used_up)
    check_completed(scene, scene.backup(scene.plan(*SETS)))


def test_kernel_without_fanotify(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel tells nobody what was read, the client is believed."""
    monkeypatch.setattr(Witness, "_watch", _used_up)
    ended = scene.backup(scene.plan(*SETS))
    check_completed(scene, ended)


def test_immortal_descendant(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be ended, as where its disk never answers, is told, and is a failure."""
    monkeypatch.setattr(supervisor, "DESCENDANTS_S", 0.1)
    scene.changes.append(lambda: setattr(supervisor, "_reaped_all", lambda: False))
    scene.changes.append(lambda: setattr(system.here, "descendants", lambda: [4194303]))
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert ended.run.reason == "processes of the client cannot be ended: [4194303]"


@pytest.mark.parametrize("wait_s", [0.0, 1000.0])
def test_last_words(scene: Scene, monkeypatch: pytest.MonkeyPatch, wait_s: float) -> None:
    """What a client printed is read to its end, and nothing is waited for behind that."""
    monkeypatch.setattr(supervisor, "LAST_WORDS_S", wait_s)
    monkeypatch.setattr(supervisor, "_READ_BYTES", 16)
    # A turn takes so long that the client has ended before all of it is read.
    monkeypatch.setattr(supervisor.Supervisor, "_look", lambda _: time.sleep(0.3))
    scene.behave("printf '%0190d last' 0")
    check_completed(scene, scene.backup(scene.plan(*SETS)))
    (folder,) = scene.home.glob("state/runs/*")
    assert (folder / "client.log").read_text() == f"{'0' * 190} last\n"


def test_client_is_marked(scene: Scene) -> None:
    """Where no namespace tells a client's processes, a variable with the run's name does."""
    scene.changes.append(lambda: setattr(system.here, "client_mark", lambda token: {"MARK": token}))
    scene.behave("echo $MARK > $home/left")
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    assert (scene.home / "left").read_text() == f"atomtx-{ended.run.id}\n"


@pytest.mark.parametrize(
    "behaviour", ["exec sleep 1000", "trap '' TERM; while :; do sleep 0.1 || :; done"]
)
def test_snapshot_lost_while_it_is_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    """Promise 7: a client that reads a snapshot that has lost its files is stopped at once."""
    monkeypatch.setattr(supervisor, "LOOK_S", 0.0)
    lost = "the room for changes is used up"
    monkeypatch.setattr(namespace.Assembly, "failure", lambda _: lost)
    scene.behave(behaviour)
    ended = scene.backup(scene.plan(*SETS, grace_s=2))  # it is looked at again meanwhile
    check_failed(scene, ended, lost)
    (folder,) = scene.home.glob("state/runs/*")
    assert (folder / "client.log").read_text().count(f"atomtx: {lost}\n") == 1


@pytest.mark.parametrize(("every_s", "most"), [(supervisor.LOOK_S, 1), (1.5, 3)])
def test_snapshot_is_seldom_looked_at(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, every_s: float, most: int
) -> None:
    """A look costs a process: at the end there is one, before it one in so many seconds."""
    monkeypatch.setattr(supervisor, "LOOK_S", every_s)
    looks = scene.home / "looks"

    def look(_: object) -> None:
        with looks.open("a") as file:
            file.write("look\n")

    monkeypatch.setattr(namespace.Assembly, "failure", look)
    scene.behave("sleep 3.5")
    check_completed(scene, scene.backup(scene.plan(*SETS)))
    assert 1 <= len(looks.read_text().splitlines()) <= most


def test_snapshot_looked_at_while_it_is_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at snapshots that show what they showed leaves the client alone."""
    monkeypatch.setattr(supervisor, "LOOK_S", 0.0)
    scene.behave("sleep 1")
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("completed", None)


@pytest.mark.parametrize("trouble", [EffectError("dmsetup: no answer"), OSError(24, "Too many")])
def test_snapshot_that_cannot_be_looked_at(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    """A look that fails is repeated: it ends no client, and what the last one tells counts."""
    monkeypatch.setattr(supervisor, "LOOK_S", 0.0)
    reads = scene.home / "reads"

    def look(_: object) -> None:
        if reads.exists():
            raise trouble

    monkeypatch.setattr(namespace.Assembly, "failure", look)
    scene.behave(f"touch {reads}; sleep 1; rm {reads}\n")
    check_completed(scene, scene.backup(scene.plan(*SETS)))
    (folder,) = scene.home.glob("state/runs/*")
    assert f"atomtx: {trouble}\n" in (folder / "client.log").read_text()


@pytest.mark.parametrize(
    ("behaviour", "limit_s", "outcome"),
    [
        ("setsid sleep 1000 > $home/left 2>&1 &", 0, "completed"),
        ("trap '' TERM; while :; do sleep 0.1 || :; done", 1, "failed"),
    ],
    ids=["daemon", "grace"],
)
def test_number_of_another_process(
    scene: Scene, behaviour: str, limit_s: int, outcome: str
) -> None:
    """Promise 6: who got the number of a client's process that has just ended is not ended."""
    scene.behave(behaviour)
    the_plan = scene.plan(*SETS, time_limit_s=limit_s, grace_s=1)
    with subprocess.Popen(["sleep", "1000"]) as other:
        scene.changes.append(lambda: _see_once(other.pid))
        ended = scene.backup(the_plan)
        is_alive = other.poll() is None
        other.kill()
    assert is_alive
    assert ended.run
    assert (ended.run.outcome, scene.left()) == (outcome, [])


def _see_once(pid: int) -> None:
    """Take a process for a descendant at the first look, as one whose number it has now was."""
    look, first = system.here.descendants, [pid]

    def descendants() -> list[int]:
        return [*(first.pop() for _ in first[:]), *look()]

    setattr(system.here, "descendants", descendants)  # noqa: B010  it is a module


def _used_up(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    ("owner", "name", "reason"),
    [
        (socket, "socketpair", "cannot start the runner: Too many open files"),
        (runner, "_prepare_process", "the runner cannot go on: Too many open files"),
        (namespace, "enter", "cannot set up the client's mounts: Too many open files"),
        (supervisor.Supervisor, "_watch", "cannot watch over the client: Too many open files"),
        (errand.Errand, "mounted", "[Errno 24] Too many open files"),
    ],
)
def test_used_up(scene: Scene, owner: object, name: str, reason: str) -> None:
    """Where no more descriptors are to be had the run fails, says so, and ends its client."""
    scene.behave("exec sleep 1000")
    scene.changes.append(lambda: setattr(owner, name, _used_up))
    ended = scene.backup(scene.plan(*SETS))
    check_failed(scene, ended, reason)
    # How the client ended is told with the run's outcome.
    assert (reason in ended.said("warn")) == (owner is not supervisor.Supervisor)
    assert "Traceback" not in (scene.home / "log").read_text()


def test_mounts_cannot_be_read(scene: Scene) -> None:
    """Promise 7: where nobody can tell whether the mounts stayed, the client has failed."""
    scene.changes.append(lambda: setattr(namespace.Assembly, "disturbance", _used_up))
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert ended.run.reason == "it is not known whether the mounts stayed: Too many open files"
    assert scene.left() == []


def test_end_cannot_be_read(scene: Scene) -> None:
    """Promise 7: a client whose end cannot be looked at now has not failed; recover records it."""
    scene.changes.append(lambda: setattr(errand, "end", _used_up))
    ended = scene.backup(scene.plan(*SETS, keep_snapshots=True))
    assert isinstance(ended.raised, WaitingError)
    assert "how its client ended cannot be read: [Errno 24]" in ended.raised.message
    assert ended.raised.hint == "`atomtx recover` goes on with it"
    assert run_of(scene)["state"] == "backing-up"
    again = scene.recover()
    assert isinstance(again.raised, WaitingError), (scene.home / "log").read_text()
    assert again.raised.message.endswith(" waits: [Errno 24] Too many open files")
    scene.changes.clear()
    scene.recover()
    assert (run_of(scene)["outcome"], len(scene.calls())) == ("completed", 1)


def test_unread_is_not_abandoned(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 14: what cannot be looked at now is waited for, also by who would only be told."""
    assert scene.backup(scene.plan(*SETS), "journal:snapshotted#1").status == -9
    monkeypatch.setattr(system.here, "pids", _used_up)
    with Journal.open(scene.state) as journal:
        (run,) = journal.open_runs()
        settler = Settler(journal, Interrupts(), Tell())
        assert settler.decide(run) == Wait("[Errno 24] Too many open files")
        with pytest.raises(WaitingError, match="Too many open files"):
            settling.abandon(journal, run)
    monkeypatch.undo()


def _play_here(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process start the programs of the scene."""
    path = f"{scene.home}/bin:{process.BASE_ENVIRONMENT['PATH']}"
    for name, value in (("PATH", path), ("FAKE_ZFS", str(scene.home))):
        monkeypatch.setitem(process.BASE_ENVIRONMENT, name, value)


def test_who_only_asks_is_not_at_work(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run holds lock F while it looks, and not while it asks a repository, for minutes."""
    made = scene.plan(*SETS, client="played")
    assert scene.backup(made, "journal:snapshotted#1", who="all").status == -9
    _play_here(scene, monkeypatch)
    lock = RunFolder.of(scene.state, made.run).front_lock
    held = []
    look, ask = Settler._look, Settler._ask

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            held.append(locks.is_held(lock))
            return real(*args)

        return call

    monkeypatch.setattr(clients, "load", _inspected)
    monkeypatch.setattr(Settler, "_look", noted(look))
    monkeypatch.setattr(Settler, "_ask", noted(ask))
    with Journal.open(scene.state) as journal:
        (run,) = journal.open_runs()
        assert Settler(journal, Interrupts(), Tell()).decide(run) == Resume()
    assert held == [True, False]


def test_abandoned_without_zfs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ZFS itself is gone, its pools are: a run is not kept from being abandoned by that."""
    assert scene.backup(scene.plan(*SETS), "journal:unmounting#1", who="all").status == -9
    _play_here(scene, monkeypatch)
    with Journal.open(scene.state) as journal:
        (run,) = journal.open_runs()
        with pytest.raises(UserError, match="are imported"):
            settling.abandon(journal, run)
        scene.play(faults={"zpool": "refuse"})
        why = "cannot list the pools: The ZFS modules are not loaded."
        assert Settler(journal, Interrupts(), Tell()).decide(run) == Wait(why)
        settling.abandon(journal, run)
        assert not journal.open_runs()


def test_cleanup_cannot_look(scene: Scene) -> None:
    """A backup that completed stands where the cleanup cannot look at the machine: it is parked."""
    scene.changes.append(lambda: setattr(cleaning, "end_survivors", _used_up))
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run, (scene.home / "log").read_text()
    assert (ended.run.outcome, ended.run.cleanup) == ("completed", "parked")
    assert ended.run.reason == "[Errno 24] Too many open files"
    scene.changes.clear()
    scene.recover()
    assert (run_of(scene)["outcome"], scene.left()) == ("completed", [])


def test_reason_that_is_no_text(scene: Scene) -> None:
    """What is told of a file whose name is no UTF-8 can be journaled."""
    words = "open by 12 (tail) at /a/caf\udce9"
    scene.play(faults={"program": "busy"})
    scene.changes.append(lambda: setattr(cleaning, "PAUSES_S", ()))
    scene.changes.append(lambda: setattr(inhabitants, "users", lambda *_: [words]))
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run, (scene.home / "log").read_text()
    assert ended.run.cleanup == "parked"
    assert (ended.run.reason or "").endswith(" open by 12 (tail) at /a/caf?")


@pytest.mark.parametrize(
    ("exc", "why"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (EffectError("cannot start dmsetup: no room"), "cannot start dmsetup: no room"),
        (ValueError("not a mount"), "a bug in atomtx: ValueError: not a mount"),
    ],
)
def test_mounts_cannot_be_looked_at(scene: Scene, exc: Exception, why: str) -> None:
    """Promise 7: without the proof that the mounts stayed nothing is completed, nor repeated."""

    def refuse(_: object) -> NoReturn:
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)  # not pytest's
        raise exc

    scene.changes.append(lambda: setattr(namespace.Assembly, "disturbance", refuse))
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    reason = f"it is not known whether the mounts stayed: {why}"
    assert (ended.run.outcome, ended.run.reason, ended.run.attempts) == ("failed", reason, 1)
    assert scene.left() == []


@pytest.mark.parametrize("status", [0, 3])
def test_nothing_read(scene: Scene, status: int) -> None:
    """Promise 7: a client that opened nothing of the frozen files has not saved them."""
    scene.behave(f"exit {status}")
    ended = scene.backup(scene.plan(*SETS, client="played"))
    reason = "the client read nothing of the frozen files: does it leave its mount namespace?"
    check_failed(scene, ended, reason)


def test_own_command_that_reads_nothing(scene: Scene) -> None:
    """What a command of the user's own has to read is between it and the user."""
    scene.behave("exit 0")
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("completed", None)


def test_failed_before_it_read(scene: Scene) -> None:
    """Why a client failed is not hidden by that it read nothing."""
    scene.behave("exit 9")
    ended = scene.backup(scene.plan(*SETS, client="played"))
    assert ended.run
    assert (ended.run.outcome, "read nothing" in str(ended.run.reason)) == ("failed", False)


def test_client_partial(scene: Scene) -> None:
    """A client that saved what it could read has done its step."""
    scene.behave('cat "$1/file"; exit 3')
    ended = scene.backup(scene.plan(*SETS, client="played", keep_snapshots=True))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("partial", "unreadable")
    assert ("run-client", 1, "done", "unreadable") in steps(scene)
    assert {s["kept"] for s in scene.pool["snapshots"].values()} == {ended.run.id}


def test_keep_snapshots(scene: Scene) -> None:
    """`--keep-snapshots` makes those of a good backup the user's: no mark, no hold."""
    the_plan = scene.plan("tank/a", "zroot/b", keep_snapshots=True)
    ended = scene.backup(the_plan)
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "completed")
    kept = scene.pool["snapshots"]
    assert sorted(kept) == sorted(v.snapshot for v in the_plan.volumes)
    assert {(s["mark"], s["kept"], *s["holds"]) for s in kept.values()} == {(None, the_plan.run)}
    keeps = [step for step in steps(scene) if step[0] == "keep-snapshots"]
    assert keeps == [("keep-snapshots", 1, "done", None)] * 2


def test_keep_snapshots_of_a_failure(scene: Scene) -> None:
    """Those of a backup that failed are not kept."""
    scene.behave("exit 9")
    ended = scene.backup(scene.plan(*SETS, keep_snapshots=True))
    check_failed(scene, ended, "exit status 9")


def test_retries(scene: Scene) -> None:
    """Section 3: after network trouble the client runs again, on the same snapshots, mended."""
    scene.behave("n=$(wc -l < $home/calls); test $n -gt 5 || exit 75")
    the_plan = scene.plan(*SETS, client="played", retries=5)
    ended = scene.backup(the_plan)
    check_completed(scene, ended, attempts=6)
    assert ended.said("sleep") == [10.0, 60.0, 300.0, 300.0, 300.0]
    assert ended.said("warn")[:2] == [
        "status 75; again in 10 s, on the same snapshots",
        "status 75; again in 60 s, on the same snapshots",
    ]
    mended = f"mended repo with {scene.client}"
    assert ended.said("step").count(mended) == 5
    assert [r for d, r in moves(scene) if d == "snapshotted"] == [
        None,
        *(f"attempt {n}" for n in range(2, 7)),
    ]
    resumed = [s for s in steps(scene) if s[3] == "resumed"]
    assert resumed[:2] == [
        ("unmount-volumes", 1, "done", "resumed"),
        ("end-client", 1, "not-needed", "resumed"),
    ]
    assert len(resumed) == 10
    assert steps(scene).count(("run-client", 1, "failed", "status 75")) == 1
    assert len(scene.zfs("snapshot")) == 1


def test_retries_after_a_shutdown(scene: Scene) -> None:
    """An attempt that was interrupted uses up no retry."""
    scene.behave("sleep 30")
    made = scene.plan(*SETS, client="played", retries=1, on_stop="keep", grace_s=5)
    scene.backup(made, "journal:backing-up#1", f"signal {int(signal.SIGTERM)}")
    scene.behave("test -e $home/failed || { touch $home/failed; exit 75; }")
    scene.changes.append(lambda: setattr(clients, "load", _inspected))
    again = scene.recover()
    check_completed(scene, again, attempts=3)
    assert again.said("sleep") == [10.0]
    of_client = [step[1:] for step in steps(scene) if step[0] == "run-client"]
    assert of_client == [
        (1, "not-needed", "resumed"),
        (2, "failed", "status 75"),
        (3, "done", None),
    ]


def test_retries_of_a_killed_front_end(scene: Scene) -> None:
    """A failure that nobody recorded is counted by the recovery that tries again."""
    once = "test -e $home/again || { touch $home/again; "
    scene.behave(f"{once} kill -KILL {FRONT_END}; }}; exit 75")
    killed = scene.backup(scene.plan(*SETS, client="played", retries=1))
    assert killed.status == -signal.SIGKILL
    scene.changes.append(lambda: setattr(clients, "load", _inspected))
    check_failed(scene, scene.recover(), "status 75")
    assert run_of(scene)["attempts"] == 2


def test_retries_are_over(scene: Scene) -> None:
    """After the last retry the failure counts."""
    scene.behave("exit 75")
    ended = scene.backup(scene.plan(*SETS, client="played", retries=1))
    check_failed(scene, ended, "status 75")
    assert run_of(scene)["attempts"] == 2
    assert len(ended.said("sleep")) == 1


def test_kept_waiting(scene: Scene) -> None:
    """Section 3: `--keep-for` keeps the moment, held and with the reason, for a later recover."""
    scene.behave("exit 75")
    scene.play(now=_now())
    the_plan = scene.plan(*SETS, client="played", keep_for_s=3600, retries=1)
    ended = scene.backup(the_plan)
    assert ended.status == 0, (scene.home / "log").read_text()
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("snapshotted", None)
    assert (ended.run.reason, ended.run.attempts) == ("status 75", 2)
    assert [s["holds"] for s in scene.pool["snapshots"].values()] == [
        [f"atomtx-{the_plan.run}"]
    ] * 2
    scene.write("live", *SETS)
    scene.behave("true")
    scene.changes.append(lambda: setattr(clients, "load", _inspected))
    again = scene.recover()
    check_completed(scene, again, attempts=3)
    assert again.decisions == [Resume()]


def _kept(scene: Scene, **values: Any) -> list[str]:
    """Leave a moment that is kept for a day, and a client that would be ready; return its names."""
    scene.behave("exit 75")
    scene.play(now=_now())
    kept = scene.backup(scene.plan(*SETS, client="played", keep_for_s=86400, **values))
    assert kept.run, (scene.home / "log").read_text()
    assert (kept.run.state, kept.run.reason) == ("snapshotted", "status 75")
    scene.behave("true")
    scene.changes.append(lambda: setattr(clients, "load", _inspected))
    return sorted(scene.pool["snapshots"])


def _check_still_kept(scene: Scene, ended: Ended, snapshots: list[str], words: str) -> None:
    assert isinstance(ended.raised, WaitingError), (scene.home / "log").read_text()
    assert words in ended.raised.message
    run = run_of(scene)
    assert (run["state"], run["outcome"]) == ("snapshotted", None)
    assert words in run["reason"]
    assert sorted(scene.pool["snapshots"]) == snapshots
    pending = scene.rows("SELECT kind FROM steps WHERE outcome IS NULL")
    assert {row["kind"] for row in pending} == {"destroy-snapshots", "release-snapshots"}


def test_kept_moment_and_a_tree_in_use(scene: Scene) -> None:
    """Promise 14: what is mounted where a kept moment belongs is waited for."""
    root = scene.home / "below" / "tree"
    root.parent.mkdir()
    snapshots = _kept(scene, root=str(root), layout="tree")
    place = Path(f"{root}{scene.live(SETS[0])}")
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "other", place], check=True)
    try:
        _check_still_kept(scene, scene.recover(), snapshots, str(place))
    finally:
        subprocess.run(["umount", place], check=True)
    ended = scene.recover()
    assert (ended.run and ended.run.outcome, scene.left()) == ("completed", [])


def test_directory_at_the_place_of_a_tree(scene: Scene) -> None:
    """Promise 2: what somebody makes where an attempt had its tree, which is undone, stays."""
    root = scene.home / "tree"
    _kept(scene, root=str(root), layout="tree")
    assert not root.exists()
    undone = scene.rows("SELECT outcome FROM steps WHERE kind = 'unmount-volumes'")
    assert [row["outcome"] for row in undone] == ["done"]
    root.mkdir()
    inode = root.stat().st_ino
    ended = scene.recover()
    assert (ended.run and ended.run.outcome, scene.left()) == ("completed", [])
    assert root.stat().st_ino == inode
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("at", ["end:make tree#1", "journal:mounted#1", "journal:snapshotted#1"])
def test_tree_of_a_recovery_that_is_killed(scene: Scene, at: str) -> None:
    """Promise 5: killed before its undo is recorded, the tree of any attempt is removed later."""
    root = scene.home / "tree"
    made = scene.plan(*SETS, root=str(root), layout="tree")
    assert scene.backup(made, "journal:mounted#1", "all").status == -9
    assert scene.recover(at, "all").status == -9
    check_completed(scene, scene.recover(), attempts=2 if "snapshotted" in at else 3)
    assert not root.exists()


def test_kept_moment_that_fails_again(scene: Scene) -> None:
    """A kept moment waits for what its first hook needs, as long as it is kept, and no longer."""
    needed = scene.home / "network"
    needed.touch()
    hook = RunHook(AROUND_RUN, ("test", "-e", str(needed)))
    snapshots = _kept(scene, hooks=(hook,))
    needed.unlink()
    for _ in range(MAX_ATTEMPTS + 1):
        _check_still_kept(scene, scene.recover(), snapshots, "exit status 1")
    needed.touch()
    check_completed(scene, scene.recover(), attempts=2)


def test_new_moment_that_cannot_be_mounted(scene: Scene) -> None:
    """`--keep-for` is for a client that fails: what fails before it, at the first time, is told."""
    scene.play(now=_now())
    scene.changes.append(lambda: setattr(namespace, "enter", _used_up))
    ended = scene.backup(scene.plan(*SETS, keep_for_s=86400))
    check_failed(scene, ended, "cannot set up the client's mounts: Too many open files")


@pytest.mark.parametrize("at", ["journal:snapshotted#1", "journal:mounted#1"])
@pytest.mark.parametrize("keep_for_s", [0, 3600])
def test_moment_that_is_not_kept(scene: Scene, at: str, keep_for_s: int) -> None:
    """Without `--keep-for`, and after it, a run that is resumed and fails is given up."""
    needed = scene.home / "network"
    needed.touch()
    hook = RunHook(AROUND_RUN, ("test", "-e", str(needed)))
    made = scene.plan(*SETS, hooks=(hook,), keep_for_s=keep_for_s)
    assert scene.backup(made, at, who="all").status == -9
    needed.unlink()
    ended = scene.recover()
    assert ended.run, (scene.home / "log").read_text()
    assert (ended.run.outcome, scene.left()) == ("failed", [])


def _now() -> int:
    return int(datetime.now(UTC).timestamp())


def _inspected(name: str) -> Any:
    from atomtx.clients import Facts
    from tests.scene import Played

    client = Played()
    client.inspect = lambda settings: Facts("1.2", "repo")  # type: ignore[method-assign]
    return client


def test_moment_that_is_too_old(scene: Scene) -> None:
    """A moment older than `--keep-for` is not kept."""
    scene.behave("exit 75")
    ended = scene.backup(scene.plan(*SETS, client="played", keep_for_s=3600))
    check_failed(scene, ended, "status 75")


# -- kills -----------------------------------------------------------------------------------

KILLED = {
    "journal:planned": ("rolled-back", 0),
    "end:zfs snapshot": ("completed", 1),
    "journal:snapshotted": ("completed", 1),
    "end:zfs hold": ("completed", 1),
    "journal:mounted": ("completed", 2),
    "journal:backing-up": ("completed", 2),
    "journal:unmounting": ("completed", 1),
    "end:zfs program": ("completed", 1),
}


@pytest.mark.parametrize("point", KILLED)
def test_killed(scene: Scene, point: str) -> None:
    """Promise 5: killed with its runner and client, a run is settled on the same snapshots."""
    scene.behave("test $(wc -l < $home/calls) -gt 1 || sleep 0.5")
    assert scene.backup(scene.plan(*SETS), f"{point}#1", "all").status == -9
    scene.write("live", *SETS)
    outcome, attempts = KILLED[point]
    ended = scene.recover()
    assert ended.status == 0, (scene.home / "log").read_text()
    run = run_of(scene)
    assert (run["state"], run["outcome"]) == ("destroyed", outcome)
    assert run["attempts"] == attempts
    assert scene.copies() == (["frozen frozen"] if outcome == "completed" else [])
    assert scene.left() == []
    assert len(scene.zfs("snapshot")) == (outcome == "completed")
    assert all(outcome for _, _, outcome, _ in steps(scene))
    assert scene.recover().decisions == []


def test_killed_before_go(scene: Scene) -> None:
    """Promise 1: the client does not start before `backing-up` is durable."""
    the_plan = scene.plan(*SETS)
    assert scene.backup(the_plan, "before:backing-up#1").status == -9
    folder = RunFolder.of(scene.state, the_plan.run)
    assert locks.wait_until(lambda: not locks.is_held(folder.runner_lock), PATIENCE_S)
    assert scene.calls() == []
    check_completed(scene, scene.recover(), attempts=2)


def test_front_lock_is_handed_on(scene: Scene) -> None:
    """Promise 6: the runner keeps F until it has R, and no longer."""
    scene.changes.append(lambda: _note_front_lock(scene))
    check_completed(scene, scene.backup(scene.plan(*SETS)))
    assert (scene.home / "held").read_text() == "True before, False after"


def _note_front_lock(scene: Scene) -> None:
    """Have the runner note whether it has F open before it takes R, and when it goes on."""
    front_end, acquire, enter = os.getpid(), locks.try_acquire, namespace.enter
    found: list[bool] = []

    def has_front_lock() -> bool:
        (lock,) = scene.state.glob("runs/*/front.lock")
        return locks.has_lock_open(os.getpid(), lock)

    def noting(path: Path) -> int | None:
        if os.getpid() != front_end and path.name == "runner.lock":
            found.append(has_front_lock())
        return acquire(path)

    def entering() -> None:
        found.append(has_front_lock())
        (scene.home / "held").write_text("{} before, {} after".format(*found))
        enter()

    locks.try_acquire, namespace.enter = noting, entering


def test_front_lock_is_handed_on_to_mounts(scene: Scene) -> None:
    """Promise 6: programs that make or remove a tree (FreeBSD) inherit F: recovery waits."""
    scene.changes.append(lambda: _note_lock_of_mounts(scene))
    root = str(scene.home / "tree")
    check_completed(scene, scene.backup(scene.plan(*SETS, root=root, layout="tree")))
    (folder,) = (scene.state / "runs").iterdir()
    noted = (scene.home / "inherited").read_text().splitlines()
    assert noted == [f"{name} {folder}/front.lock" for name in ("make", "remove")]


def _note_lock_of_mounts(scene: Scene) -> None:
    for name in ("make", "remove"):
        original = getattr(tree, name)

        def noting(
            *args: Any, lock: int, name: str = name, original: Callable[..., Any] = original
        ) -> Any:
            with (scene.home / "inherited").open("a") as file:
                print(name, os.readlink(f"/proc/self/fd/{lock}"), file=file)
            return original(*args, lock=lock)

        setattr(tree, name, noting)


def test_killed_inside_command(scene: Scene) -> None:
    """Promise 6: a `zfs` whose front end was killed holds F on: a recovery waits for it."""
    the_plan = scene.plan(*SETS)
    scene.play(faults={"snapshot": "wait"})
    assert scene.backup(the_plan, "start:zfs snapshot#1").status == -9
    front_lock = RunFolder.of(scene.state, the_plan.run).front_lock
    assert locks.is_held(front_lock)
    (scene.home / "go").touch()
    assert locks.wait_until(lambda: not locks.is_held(front_lock), PATIENCE_S)
    assert list(scene.pool["snapshots"]) == [v.snapshot for v in the_plan.volumes]
    check_completed(scene, scene.recover())


def test_left_alone(scene: Scene) -> None:
    """Promise 6: a run whose F is held is somebody's: it is not touched."""
    the_plan = scene.plan(*SETS)
    assert scene.backup(the_plan, "journal:snapshotted#1").status == -9
    before = scene.pool, scene.rows("SELECT * FROM runs"), scene.rows("SELECT * FROM steps")
    with locks.acquired(RunFolder.of(scene.state, the_plan.run).front_lock) as held:
        assert held is not None
        ended = scene.recover()
    assert ended.decisions == [LeaveAlone("another atomtx is at work on it")]
    after = scene.pool, scene.rows("SELECT * FROM runs"), scene.rows("SELECT * FROM steps")
    assert after == before


def test_end_is_known(scene: Scene) -> None:
    """A client's end that the runner wrote is recorded by recover; the client runs once."""
    point = "before:unmounting#1"
    assert scene.backup(scene.plan(*SETS), point).status == -9
    ended = scene.recover()
    check_completed(scene, ended)
    assert ended.decisions == [RollForward()]
    assert len(scene.calls()) == 1
    assert steps(scene)[6][2:] == ("done", None)


@pytest.mark.parametrize("last", ["kill -KILL $$", "true"])
def test_temporary_files(scene: Scene, last: str) -> None:
    """What a client leaves in the folder that it was given goes with the run, not a year later."""
    made = scene.plan("tank/a", env=(("TMPDIR", str(scene.live("tank/a"))),))
    scene.behave(
        f'mkdir "$TMPDIR/d"; echo x | tee "$TMPDIR/d/x" >"$TMPDIR/x"; ln -s / "$TMPDIR/l"; {last}\n'
    )
    ended = scene.backup(made)
    assert ended.run
    assert ended.run.state == "destroyed"
    assert list(RunFolder.of(scene.state, made.run).temporary.iterdir()) == []


def test_renamed_to_keep_it(scene: Scene) -> None:
    """Promise 2: a name without our token is somebody's, who wants it; our hold is released."""
    made = scene.plan("tank/a", "tank/b")
    assert scene.backup(made, at="journal:unmounting#1", who="all").status == -signal.SIGKILL
    there = scene.pool["snapshots"]
    mine = there.pop(made.volumes[0].snapshot)
    assert mine["holds"]
    scene.play(snapshots=there | {"tank/a@before-the-upgrade": mine})
    ended = scene.recover()
    (left,) = scene.pool["snapshots"].items()
    assert left == ("tank/a@before-the-upgrade", mine | {"holds": []})
    assert ended.said("warn") == [
        f"tank/a@before-the-upgrade was renamed by somebody, from {made.volumes[0].snapshot}: it "
        "stays"
    ]
    (run,) = scene.rows("SELECT state, outcome FROM runs")
    assert (run["state"], run["outcome"]) == ("destroyed", "completed")


def test_killed_runner(scene: Scene) -> None:
    """A killed runner costs an attempt: its client is ended, another reads the same moment."""
    script = "test $(wc -l < $home/calls) -gt 1 || { kill -KILL $PPID; sleep 1000; }"
    scene.behave(script)
    ended = scene.backup(scene.plan(*SETS, client="played"))
    check_completed(scene, ended, attempts=2)
    first, second = ended.said("warn")
    assert first.startswith("ending what the interrupted run left behind: ")
    assert second == "the runner was killed; the client starts again on the same snapshots"
    assert f"mended repo with {scene.client}" in ended.said("step")


_CAP_SYS_PTRACE = 19  # linux/capability.h
_FOREIGN = "exec setpriv --reuid=65534 --clear-groups sleep 1000"


def _without_ptrace() -> None:
    """Be as in `docker run --cap-add SYS_ADMIN`: capset(2), version 3."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("6I", data.raw))
    words[:2] = [word & ~(1 << _CAP_SYS_PTRACE) for word in words[:2]]
    assert libc.capset(header, struct.pack("6I", *words)) == 0


def _hurry() -> None:
    probing._END_S = errand._UNSEEN_S = 0.5


def test_unseen_client_of_killed(scene: Scene) -> None:
    """Promises 6 and 14: a client that we cannot see keeps its repository and its moment."""
    script = "test $(wc -l < $home/calls) -gt 1 || "
    scene.behave(f"{script}{{ kill -KILL {FRONT_END} $PPID; {_FOREIGN}; }}")
    assert scene.backup(scene.plan(*SETS)).status == -9
    lock = RunFolder.of(scene.state, run_of(scene)["id"]).client_lock
    # It kills them before it becomes somebody who may not: it is seen until then.
    assert locks.wait_until(
        lambda: {os.stat(f"/proc/{p.pid}").st_uid for p in locks.holders(lock)} == {65534}, 60
    )
    scene.changes += [_without_ptrace, _hurry]
    ended = scene.recover()
    assert isinstance(ended.raised, WaitingError)
    assert "its client lives, and cannot be seen from here" in ended.raised.message
    assert len(scene.pool["snapshots"]) == 2
    assert run_of(scene)["outcome"] is None
    assert ended.said("step") == []
    scene.changes.clear()
    check_completed(scene, scene.recover(), attempts=2)


def test_unseen_client_of_killed_runner(scene: Scene) -> None:
    """The same while the front end lives: the run waits, and is not given up."""
    scene.behave(f"kill -KILL $PPID; {_FOREIGN}")
    scene.changes += [_without_ptrace, _hurry]
    ended = scene.backup(scene.plan(*SETS))
    assert isinstance(ended.raised, WaitingError)
    assert (run_of(scene)["state"], run_of(scene)["outcome"]) == ("backing-up", None)
    assert len(scene.pool["snapshots"]) == 2


@pytest.mark.parametrize("patience", [Patience.WAIT, Patience.STOP])
def test_unseen_runner(scene: Scene, patience: Patience) -> None:
    """A runner that we cannot see is not waited for without end, and nothing is done."""
    assert scene.backup(scene.plan(*SETS), "journal:unmounting#1", "all").status == -9
    folder = RunFolder.of(scene.state, run_of(scene)["id"])
    scene.changes += [_hurry, lambda: setattr(system.here, "openers", lambda path, locked: [])]
    with locks.acquired(folder.runner_lock):
        ended = scene.recover(patience=patience)
    assert isinstance(ended.raised, WaitingError)
    assert "its runner lives, and cannot be seen from here" in ended.raised.message
    assert len(scene.pool["snapshots"]) == 2
    scene.changes.clear()
    check_completed(scene, scene.recover())


@pytest.mark.parametrize("retries", [0, 2])
def test_runner_is_killed_always(scene: Scene, retries: int) -> None:
    """Section 3: attempts are counted and bounded."""
    scene.behave("kill -KILL $PPID; sleep 1000")
    ended = scene.backup(scene.plan(*SETS, retries=retries))
    check_failed(scene, ended, "the runner was killed again and again")
    assert run_of(scene)["attempts"] == MAX_ATTEMPTS + retries == len(scene.calls())
    assert steps(scene)[-2][2:] == ("failed", "the runner was killed again and again")


def test_rolled_back(scene: Scene) -> None:
    """A roll-back records its reason and that the client's step came to nothing."""
    assert scene.backup(scene.plan(*SETS), "journal:mounted#1", "all").status == -9
    ended = scene.recover(rollback=True)
    assert ended.decisions == [RollBack("at the user's word")]
    run = run_of(scene)
    assert (run["outcome"], run["reason"]) == ("rolled-back", "at the user's word")
    assert steps(scene)[6] == ("run-client", 1, "failed", "at the user's word")
    assert moves(scene)[2:] == [("unmounting", "at the user's word"), ("destroyed", None)]
    assert scene.left() == []


def test_exported_in_a_look(scene: Scene) -> None:
    """Promise 2: a pool that is exported while a run is looked at costs no moment."""
    made = scene.plan(*SETS)
    assert scene.backup(made, "journal:backing-up#1", who="all").status == -9
    there = {name: scene.pool[name] for name in ("pools", "snapshots")}
    identities = Kinds.identities

    def exported(self: Kinds, volumes: Any) -> dict[str, Identity]:
        scene.play(pools={}, snapshots={})
        return identities(self, volumes)

    scene.changes.append(lambda: setattr(Kinds, "identities", exported))
    waits = scene.recover()
    assert isinstance(waits.raised, WaitingError), (scene.home / "log").read_text()
    assert waits.raised.message.endswith(" waits: pool tank is not imported")
    scene.changes.clear()
    scene.play(**there)
    check_completed(scene, scene.recover(), attempts=2)


def test_killed_with_half_a_snapshot(scene: Scene) -> None:
    """What a killed front end took, and is no snapshot that can be used, is taken back."""
    assert scene.backup(scene.plan(*SETS), "end:zfs snapshot#1", "all").status == -9
    scene.changes.append(lambda: setattr(Kinds, "ready", _not_whole))
    ended = scene.recover()
    assert ended.decisions == [Resume()], (scene.home / "log").read_text()
    run = run_of(scene)
    assert (run["outcome"], run["reason"]) == ("rolled-back", "half a snapshot")
    assert scene.left() == []


def _not_whole(*_: object) -> NoReturn:
    raise EffectError("half a snapshot")


def test_resumed_by(scene: Scene) -> None:
    """A resume records who is at work now."""
    assert scene.backup(scene.plan(*SETS), "journal:snapshotted#1").status == -9
    with Journal.open(scene.state) as journal, journal.change(journal.open_runs()[0]) as change:
        change.set(pid=1, boot_id="another", reason=None)
    check_completed(scene, scene.recover())
    run = run_of(scene)
    assert run["pid"] != 1
    assert run["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


# -- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["journal:planned#1", "end:zfs hold#1", "journal:backing-up#1"])
def test_interrupted(scene: Scene, point: str) -> None:
    """A signal before the client's end undoes the run; it is told."""
    scene.behave("sleep 1000")
    ended = scene.backup(scene.plan(*SETS), point, f"signal {int(signal.SIGINT)}")
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "rolled-back")
    assert ended.run.reason == "interrupted by SIGINT"
    assert ended.interrupted == "interrupted by SIGINT"
    assert scene.left() == []
    assert len(scene.calls()) <= 1


def test_interrupted_too_late(scene: Scene) -> None:
    """A client that ends well in spite of a signal has made its backup: it stands."""
    loop = "while ! test -e $home/told; do sleep 0.1 || :; done"
    scene.behave(f"trap 'touch $home/told' TERM; {loop}")
    ended = scene.backup(scene.plan(*SETS), "journal:backing-up#1", "signal 15", delay_s=1)
    check_completed(scene, ended)
    assert ended.interrupted == "interrupted by SIGTERM"


def test_interrupted_without_runner(scene: Scene) -> None:
    """What a killed runner leaves of a run that is given up is ended before all is removed."""
    scene.behave(f"trap '' TERM; kill -INT {FRONT_END}; sleep 1; kill -KILL $PPID; sleep 1000")
    ended = scene.backup(scene.plan(*SETS))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "rolled-back")
    assert scene.left() == []
    assert [words for words in ended.said("warn") if words.startswith("ending what")]


def test_interrupted_by_failure(scene: Scene) -> None:
    """A client that fails because it was stopped is no failure of the run."""
    scene.behave("trap 'exit 75' TERM; while :; do sleep 0.1 || :; done")
    the_plan = scene.plan(*SETS, client="played", retries=3)
    ended = scene.backup(the_plan, "journal:backing-up#1", "signal 15", delay_s=1)
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("rolled-back", "interrupted by SIGTERM")
    assert ended.said("sleep") == []


def test_interrupted_at_go(scene: Scene) -> None:
    """
    A signal that comes as the client is let go stops it, as a later one does.

    Nobody waits for its end in vain, which may take hours.
    """
    scene.behave("sleep 5")
    scene.changes.append(_interrupt_at_go)
    the_plan = scene.plan(*SETS)
    ended = scene.backup(the_plan)
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("rolled-back", "interrupted by SIGINT")
    assert scene.left() == []
    assert scene.copies() == []
    log = RunFolder.of(scene.state, the_plan.run).log.read_text()
    assert "asked to stop by SIGINT" in log


KEPT = {
    "journal:snapshotted#1": "snapshotted",
    "end:zfs hold#1": "mounted",
    "journal:mounted#1": "mounted",
    "journal:backing-up#1": "backing-up",
}


@pytest.mark.parametrize("point", KEPT)
def test_kept_at_a_shutdown(scene: Scene, point: str) -> None:
    """Where the plan says so, SIGTERM stops the client and keeps the moment; recover goes on."""
    delay_s = 0.5 if KEPT[point] == "backing-up" else 0.0
    scene.behave(f"test -e {scene.home}/again || {{ touch {scene.home}/again; sleep 30; }}")
    the_plan = scene.plan(*SETS, on_stop="keep", grace_s=5)
    ended = scene.backup(the_plan, point, f"signal {int(signal.SIGTERM)}", delay_s=delay_s)
    assert ended.interrupted == "interrupted by SIGTERM"
    assert ended.run
    assert ended.run.outcome is None
    assert ended.run.state == KEPT[point]
    assert (scene.home / "again").exists() == (KEPT[point] == "backing-up")
    kept = "stopped; the moment is kept: `atomtx recover` goes on with it"
    assert ended.said("step")[-1] == kept
    assert set(scene.pool["snapshots"]) == {v.snapshot for v in the_plan.volumes}
    assert not [lock for lock in scene.state.glob("runs/*/*.lock") if locks.is_held(lock)]
    scene.write("changed", *SETS)
    check_completed(scene, scene.recover(), attempts=run_of(scene)["attempts"])


ALL = (f"{FRONT_END} $PPID $$", "$PPID $$", f"{FRONT_END} $$", "$PPID")


@pytest.mark.parametrize("processes", ALL, ids=["front", "runner", "client", "runner-alone"])
def test_kept_when_all_are_told(scene: Scene, processes: str) -> None:
    """A client that ends at once, of the signal that the front end got as well, has not failed."""
    once = f"test -e {scene.home}/again || {{ touch {scene.home}/again; "
    scene.behave(f"{once} kill -TERM {processes}; sleep 30; }}")
    ended = scene.backup(scene.plan(*SETS, on_stop="keep", grace_s=5))
    assert ended.interrupted == "interrupted by SIGTERM", (scene.home / "log").read_text()
    assert ended.run
    assert ended.run.outcome is None
    assert len(scene.pool["snapshots"]) == 2
    scene.write("changed", *SETS)
    check_completed(scene, scene.recover(), attempts=2)


def test_failure_of_a_shutdown(scene: Scene) -> None:
    """A client that fails of the signal that the front end got takes none of its attempts away."""
    once = f"test -e {scene.home}/again || {{ touch {scene.home}/again; "
    scene.behave(f"{once} trap 'exit 75' TERM; kill -TERM {FRONT_END} $$; sleep 30; }}")
    made = scene.plan(*SETS, client="played", on_stop="keep", retries=1, grace_s=5)
    ended = scene.backup(made)
    assert ended.interrupted == "interrupted by SIGTERM", (scene.home / "log").read_text()
    assert ended.run
    assert (ended.run.outcome, ended.run.failures) == (None, 0)
    scene.write("changed", *SETS)
    scene.changes.append(lambda: setattr(clients, "load", _inspected))
    check_completed(scene, scene.recover(), attempts=2)


def test_over_its_limit_when_all_are_told(scene: Scene) -> None:
    """A client over its limit has failed, also where a shutdown comes within its grace."""
    told = "trap 'kill -TERM $front $PPID; trap : TERM' TERM"
    scene.behave(f"front={FRONT_END}; {told}; while :; do sleep 0.1 || :; done")
    ended = scene.backup(scene.plan(*SETS, on_stop="keep", time_limit_s=1, grace_s=1))
    assert ended.interrupted == "interrupted by SIGTERM"
    again = scene.recover()
    check_failed(scene, again, "did not end within 1s: killed")
    assert again.decisions == [RollForward()]


def test_undone_when_all_are_told(scene: Scene) -> None:
    """Where nothing is kept the run is given up, and has not failed."""
    scene.behave(f"kill -TERM {ALL[0]}; sleep 30")
    ended = scene.backup(scene.plan(*SETS, grace_s=5))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("rolled-back", "interrupted by SIGTERM")
    assert scene.left() == []


@pytest.mark.parametrize(
    ("point", "number", "on_stop"),
    [
        ("journal:backing-up#1", signal.SIGINT, "keep"),
        ("journal:backing-up#1", signal.SIGTERM, "undo"),
    ],
)
def test_not_kept(scene: Scene, point: str, number: signal.Signals, on_stop: str) -> None:
    """On Ctrl-C, or where nobody asked for it, the run is undone."""
    scene.behave("sleep 30")
    made = scene.plan(*SETS, on_stop=on_stop, grace_s=5)
    ended = scene.backup(made, point, f"signal {int(number)}")
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "rolled-back")
    assert scene.left() == []


def _interrupt_at_go() -> None:
    go = errand.Errand.go

    def interrupted(self: errand.Errand) -> None:
        go(self)
        os.kill(os.getpid(), signal.SIGINT)

    errand.Errand.go = interrupted  # type: ignore[method-assign]


# -- the journal -----------------------------------------------------------------------------


def fail_changes(error: type[Exception], *which: int) -> None:
    """Have the journal refuse these of its changes, counted from one, as on a full disk."""
    from atomtx.journal import Change

    count = iter(range(1, 1000))
    finish = Change.finish

    def refuse(self: Change) -> None:
        if next(count) in which:
            raise error("no space left")
        finish(self)

    Change.finish = refuse  # type: ignore[method-assign]


@pytest.mark.parametrize("which", [(1,), (2,), (3,), (4,), (4, 5)])
def test_no_room(scene: Scene, which: tuple[int, ...]) -> None:
    """Promise 10: where an intent finds no room, the run is given up and everything removed."""
    scene.changes.append(lambda: fail_changes(JournalFullError, *which))
    the_plan = scene.plan(*SETS)
    check_failed(scene, scene.backup(the_plan), "no space left")
    assert RunFolder.of(scene.state, the_plan.run).read_end() is None


def test_no_room_for_the_end(scene: Scene) -> None:
    """Promise 10: where the client's end finds no room, the snapshots go first; it is kept."""
    scene.changes.append(lambda: fail_changes(JournalFullError, 5))
    ended = scene.backup(scene.plan(*SETS))
    check_completed(scene, ended)
    assert "no space left for the journal: removing the snapshots first" in ended.said("warn")


def test_no_room_at_all(scene: Scene) -> None:
    """Promise 10: with no room even then, the traces are gone, and recover records the end."""
    scene.changes.append(lambda: fail_changes(JournalFullError, 5, 6))
    ended = scene.backup(scene.plan(*SETS))
    assert isinstance(ended.raised, JournalFullError)
    assert scene.pool["snapshots"] == {}
    assert run_of(scene)["state"] == "backing-up"
    scene.changes.clear()
    check_completed(scene, scene.recover())
    assert len(scene.calls()) == 1


def test_no_room_to_keep(scene: Scene) -> None:
    """Snapshots that are to be kept are not destroyed for want of room."""
    scene.changes.append(lambda: fail_changes(JournalFullError, 5))
    ended = scene.backup(scene.plan(*SETS, keep_snapshots=True))
    assert isinstance(ended.raised, JournalFullError)
    assert len(scene.pool["snapshots"]) == 2
    scene.changes.clear()
    scene.recover()
    assert run_of(scene)["outcome"] == "completed"
    assert [s["mark"] for s in scene.pool["snapshots"].values()] == [None, None]


def test_end_is_kept_with_the_snapshots(scene: Scene) -> None:
    """Promise 10: an end that was only told is written where there is room now, of these too."""
    scene.changes.append(lambda: _no_room_in_folder(scene, runner_only=True))
    scene.changes.append(lambda: fail_changes(JournalFullError, 5))
    ended = scene.backup(scene.plan(*SETS, keep_snapshots=True))
    assert isinstance(ended.raised, JournalFullError)
    scene.changes.clear()
    scene.recover()
    assert run_of(scene)["outcome"] == "completed"
    assert len(scene.calls()) == 1


def test_no_room_and_busy(scene: Scene) -> None:
    """Promises 7, 10: what is busy while room is made makes no failure of a completed client."""
    busy: list[object] = []
    remove = Cleaner.remove_traces

    def remove_traces(self: Cleaner, run: Run) -> dict[str, str]:
        if not busy:
            busy.append(run)
            raise EffectError("tank is busy")
        return remove(self, run)

    scene.changes.append(lambda: setattr(Cleaner, "remove_traces", remove_traces))
    scene.changes.append(lambda: fail_changes(JournalFullError, 5))
    ended = scene.backup(scene.plan(*SETS))
    assert isinstance(ended.raised, JournalFullError)
    assert ended.raised.message == "no space left; tank is busy"
    assert run_of(scene)["state"] == "backing-up"
    scene.changes.clear()
    check_completed(scene, scene.recover())
    assert len(scene.calls()) == 1


def test_no_room_for_another_attempt(scene: Scene) -> None:
    """A retry that finds no room is a failure; a moment that is to be kept is worth more."""
    scene.behave("exit 75")
    scene.changes.append(lambda: fail_changes(JournalFullError, 5))
    ended = scene.backup(scene.plan(*SETS, client="played", retries=1))
    check_failed(scene, ended, "status 75")
    scene.play(now=_now())
    ended = scene.backup(scene.plan(*SETS, client="played", keep_for_s=3600))
    assert isinstance(ended.raised, JournalFullError)
    assert len(scene.pool["snapshots"]) == 2


def test_end_is_told(scene: Scene) -> None:
    """Promise 10: an end that found no room in the run's folder is told, journaled, and kept."""
    scene.changes.append(lambda: _no_room_in_folder(scene))
    scene.changes.append(lambda: fail_changes(JournalFullError, 5, 6))
    the_plan = scene.plan(*SETS)
    ended = scene.backup(the_plan)
    assert isinstance(ended.raised, JournalFullError)
    assert scene.pool["snapshots"] == {}
    scene.changes.clear()
    check_completed(scene, scene.recover())
    assert len(scene.calls()) == 1


def _no_room_in_folder(scene: Scene, *, runner_only: bool = False) -> None:
    """Have no end record written while there are snapshots."""
    write, front = RunFolder.write_end, os.getpid()

    def write_end(self: RunFolder, data: Any) -> None:
        if scene.pool["snapshots"] and not (runner_only and os.getpid() == front):
            raise OSError(28, "No space left on device")
        write(self, data)

    RunFolder.write_end = write_end  # type: ignore[method-assign]


@pytest.mark.parametrize("told", [True, False])
def test_end_is_told_once(scene: Scene, told: bool) -> None:
    """An end that was told and found its room in the journal needs no other."""
    scene.behave("exit 9" if told else "exit 75")
    scene.changes.append(lambda: _no_room_in_folder(scene))
    ended = scene.backup(scene.plan(*SETS, client="played"))
    check_failed(scene, ended, "status 9" if told else "status 75")


def test_overtaken(scene: Scene) -> None:
    """Promise 6: who was overtaken by another process stops at once, and undoes nothing."""
    scene.changes.append(lambda: fail_changes(StaleRunError, 2))
    ended = scene.backup(scene.plan(*SETS))
    assert isinstance(ended.raised, StaleRunError)
    assert len(scene.pool["snapshots"]) == 2
    assert run_of(scene)["state"] == "snapshotted"


def test_client_that_waits(scene: Scene) -> None:
    """Promise 14: a repository that is another one makes recovery wait."""
    assert scene.backup(scene.plan(*SETS, client="played"), "journal:mounted#1", "all").status == -9
    ended = scene.recover()
    assert isinstance(ended.raised, WaitingError)
    assert len(scene.pool["snapshots"]) == 2


def test_command_without_end(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The `zfs` of a killed atomtx that never ends is what recovery waits for, and says so.

    Who leaves alone what is at work leaves that alone, too.
    """
    monkeypatch.setattr(settling, "_COMMAND_S", 0.0)
    assert scene.backup(scene.plan(*SETS), "journal:snapshotted#1", "all").status == -9
    program = shutil.copy("/bin/sleep", tmp_path / "zfs")
    with locks.acquired(RunFolder.of(scene.state, run_of(scene)["id"]).front_lock) as lock:
        assert lock is not None
        stuck = subprocess.Popen([program, "1000"], pass_fds=(lock,))
    try:
        left = scene.recover(patience=Patience.LEAVE)
        ended = scene.recover()
    finally:
        stuck.kill()
        stuck.wait()
    assert (left.raised, [type(each) for each in left.decisions]) == (None, [LeaveAlone])
    assert isinstance(ended.raised, WaitingError)
    expected = f"waits for process {stuck.pid} (zfs), whose atomtx was killed"
    assert expected in ended.raised.message
    check_completed(scene, scene.recover())


def test_progress(scene: Scene) -> None:
    """What the runner tells of the client's progress is shown."""
    scene.behave("sleep 1.5")
    ended = scene.backup(scene.plan(*SETS))
    check_completed(scene, ended)
    assert ended.said("progress")


def test_busy(scene: Scene) -> None:
    """What is busy parks the run; its result stands, and the next recover removes it."""
    scene.changes.append(lambda: setattr(cleaning.Cleaner, "_destroy", _destroy_once))
    the_plan = scene.plan(*SETS)
    scene.play(faults={"program": "busy"})
    ended = scene.backup(the_plan)
    assert ended.run
    assert (ended.run.state, ended.run.cleanup) == ("unmounting", "parked")
    assert ended.run.outcome == "completed"
    assert [w for w in ended.said("warn") if "busy" in w]
    scene.play(faults={})
    assert scene.recover().decisions == [RollForward()]
    assert scene.left() == []
    assert run_of(scene)["outcome"] == "completed"


def _destroy_once(self: Any, kind: Any, identities: Any, run: Any) -> dict[str, str]:
    found: dict[str, str] = kind.destroy(identities, run=run.id)
    return found

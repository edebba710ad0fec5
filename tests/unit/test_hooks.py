"""
The user's hooks: what they find, in which order they run, and that each is undone.

The engine's own processes, for real, on pools that are played (`tests/scene.py`).
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from atomtx import executor, locks, sessions, settling, system
from atomtx.clients import Facts, Settings
from atomtx.errors import (
    CredentialError,
    EffectError,
    ExitStatus,
    JournalError,
    UserError,
    WaitingError,
)
from atomtx.executor import Executor, Tell
from atomtx.intents import (
    AFTER_FAILURE,
    AFTER_SUCCESS,
    AROUND_RUN,
    AROUND_SNAPSHOT,
    FINALLY,
    RunHook,
)
from atomtx.plan import Plan
from atomtx.records import Step, leaves_a_hook
from atomtx.settling import status_of
from atomtx.statedir import RunFolder
from atomtx.volumes.kinds import Kinds
from tests.extent import some
from tests.scene import Ended, Played, Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

SETS = ("tank/a", "tank/b")
FROZEN = ("/flush", "/freeze", "/lock", "snapshot 2", "/unlock", "/thaw", "/go-on")
# Nobody may have waited for it yet.
DEAD = "dead() { ! test -e /proc/$1 || grep -q 'State:.Z' /proc/$1/status; }\n"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def script(scene: Scene, name: str, body: str = "") -> tuple[str, ...]:
    """Return a command that notes its name, then does what *body* says, in shell."""
    text = f"#!/bin/sh\n{DEAD}cd {scene.home}\necho {name} >> did\n{body}\n"
    return (str(scene._script(name, text)),)


def did(scene: Scene) -> list[str]:
    path = scene.home / "did"
    return path.read_text().split() if path.exists() else []


def pair(scene: Scene, when: str, do: str, undo: str) -> RunHook:
    """Return a hook that makes a file of its place, and an undo that takes it away."""
    hook = script(scene, do, f"touch in-{when}")
    return RunHook(when, hook, script(scene, undo, f"rm -f in-{when}"))


def all_hooks(scene: Scene) -> tuple[RunHook, ...]:
    """Return a hook at every place."""
    return (
        RunHook(FINALLY, script(scene, "finally")),
        RunHook(AFTER_SUCCESS, script(scene, "after-success")),
        RunHook(AFTER_FAILURE, script(scene, "after-failure")),
        pair(scene, AROUND_SNAPSHOT, "quiesce", "thaw"),
        pair(scene, AROUND_RUN, "stop", "start"),
    )


def hooked(scene: Scene, *hooks: RunHook) -> Plan:
    """Return a plan whose client fails where the hooks are not as they have to be."""
    scene.behave(f"test -e {scene.home}/in-run && test ! -e {scene.home}/in-snapshot || exit 9\n")
    return replace(scene.plan(*SETS), hooks=hooks)


def in_force(scene: Scene) -> list[str]:
    return [path.name for path in scene.home.glob("in-*")]


def outcome(ended: Ended) -> tuple[str | None, str | None]:
    assert ended.run
    return ended.run.outcome, ended.run.reason


def hook_steps(scene: Scene) -> list[tuple[str, str | None, str | None]]:
    rows = scene.rows("SELECT * FROM steps WHERE kind LIKE '%hook' ORDER BY id")
    return [(row["kind"], row["outcome"], row["detail"]) for row in rows]


# -- the ordinary course ---------------------------------------------------------------------


def test_order(scene: Scene) -> None:
    """The wide pair is around everything, the narrow one around the snapshots alone."""
    others = all_hooks(scene)
    quiesce = script(scene, "quiesce", "touch in-snapshot; ! grep -q @atomtx pool.json")
    thaw = script(scene, "thaw", "rm in-snapshot; grep -q @atomtx pool.json")
    start = script(scene, "start", "rm in-run; ! grep -q @atomtx pool.json")
    hooks = (
        *others[:3],
        RunHook(AROUND_SNAPSHOT, quiesce, thaw),
        RunHook(AROUND_RUN, others[-1].command, start),
    )
    ended = scene.backup(hooked(scene, *hooks))
    assert outcome(ended) == ("completed", None)
    assert did(scene) == ["stop", "quiesce", "thaw", "start", "after-success", "finally"]
    assert {result for _, result, _ in hook_steps(scene)} == {"done"}
    assert in_force(scene) == scene.left() == []


def test_nothing_is_written_while_frozen(scene: Scene) -> None:
    """A hook may freeze the file system of the journal: nothing is written until it is thawed."""
    look = "echo talks; find state -type f -exec sha256sum {{}} + | sort > {}"
    quiesce = script(scene, "quiesce", look.format("before"))
    thaw = script(scene, "thaw", f"{look.format('after')}; cmp before after")
    ended = scene.backup(hooked(scene, RunHook(AROUND_SNAPSHOT, quiesce, thaw)))
    assert did(scene) == ["quiesce", "thaw"]
    (log,) = scene.state.glob("runs/*/hooks.log")
    assert log.read_text() == "talks\ntalks\n"
    assert [result for _, result, _ in hook_steps(scene)] == ["done", "done"]
    assert outcome(ended)[0] == "failed"  # the client found no in-run: it did run


def test_nothing_is_told_while_frozen(scene: Scene) -> None:
    """Our output may go to a file that a hook has frozen: each line is told before or after."""
    early = scene.home / "told-early"

    def tells(show: Callable[[str], None]) -> Callable[[str], None]:
        def note(line: str) -> None:
            if in_force(scene):
                early.write_text(line)
            show(line)

        return note

    def watch() -> None:
        made = Executor.__init__

        def init(*args: Any, tell: Tell, **rest: Any) -> None:
            made(*args, tell=Tell(tells(tell.step), tells(tell.warn)), **rest)

        Executor.__init__ = init  # type: ignore[method-assign]

    scene.changes.append(watch)
    flush = RunHook(AROUND_SNAPSHOT, script(scene, "flush"), script(scene, "go-on", "exit 3"))
    freeze = pair(scene, AROUND_SNAPSHOT, "freeze", "thaw")
    lock = RunHook(AROUND_SNAPSHOT, script(scene, "lock"), script(scene, "unlock", "exit 3"))
    ended = scene.backup(replace(scene.plan(*SETS), hooks=(flush, freeze, lock)))
    assert not early.exists()
    assert did(scene) == ["flush", "freeze", "lock", "unlock", "thaw", "go-on"]
    told = [str(words) for kind, words in ended.told if kind != "progress"]
    places = [next(n for n, line in enumerate(told) if word in line) for word in FROZEN]
    assert places == sorted(places)
    assert [line.rpartition(" ")[2] for line in ended.said("warn")] == ["3", "3"]


def test_facts(scene: Scene) -> None:
    """Hooks get the run's facts, the client's variables, and no lock of ours."""
    last = script(scene, "last", "env > facts; ls -l /proc/$$/fd > descriptors")
    made = replace(scene.plan(*SETS, env=(("RESTIC_CACHE_DIR", "/c"),)), label="home")
    ended = scene.backup(replace(made, hooks=(RunHook(FINALLY, last),)))
    assert outcome(ended) == ("completed", None)
    facts = (scene.home / "facts").read_text()
    for line in (
        f"ATOMTX_RUN={made.run}\n",
        "ATOMTX_JOB=home\n",
        "ATOMTX_HOOK=finally\n",
        "ATOMTX_OUTCOME=completed\n",
        "ATOMTX_MOMENT=2026-07-25T17:20:00+00:00\n",
        "ATOMTX_VOLUMES=tank/a\ntank/b\n",
        "RESTIC_CACHE_DIR=/c\n",
    ):
        assert line in facts
    assert ".lock" not in (scene.home / "descriptors").read_text()


def test_log_is_redacted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 11: what a hook prints is kept without the secrets."""
    monkeypatch.setenv("RESTIC_PASSWORD", "wordofmine")
    made = scene.plan(*SETS)
    loud = script(scene, "loud", "echo it is $RESTIC_PASSWORD; exit 3")
    ended = scene.backup(replace(made, hooks=(RunHook(AROUND_RUN, loud),)))
    folder = scene.state / "runs" / made.run
    assert (folder / "hooks.log").read_text() == "it is ***\n"
    said = f"hook before the run: {loud[0]}: exit status 3: it is ***"
    assert outcome(ended) == ("failed", said)


# -- what fails ------------------------------------------------------------------------------


def test_hook_before_fails(scene: Scene) -> None:
    """Without its pre-hook there is no backup; what was begun is undone, the rest never starts."""
    others = all_hooks(scene)[:4]
    stop = RunHook(AROUND_RUN, script(scene, "stop", "exit 3"), script(scene, "start"))
    ended = scene.backup(hooked(scene, *others, stop))
    assert outcome(ended) == ("failed", f"{stop.describe()}: exit status 3")
    assert did(scene) == ["stop", "start", "after-failure", "finally"]
    assert ("undo-hook", "not-needed", "it was not started") in hook_steps(scene)
    assert scene.zfs("snapshot") == []
    assert scene.left() == []


@pytest.mark.parametrize("fault", ["refuse", "foreign"])
def test_snapshot_fails(scene: Scene, fault: str) -> None:
    """Where the snapshots fail, the thaw comes at once all the same."""
    scene.play(faults={"snapshot": fault})
    ended = scene.backup(hooked(scene, *all_hooks(scene)))
    assert outcome(ended)[0] == "failed"
    assert did(scene) == ["stop", "quiesce", "thaw", "start", "after-failure", "finally"]


@pytest.mark.parametrize("place", ["thaw", "start", "after-success", "finally"])
def test_hook_after_fails(scene: Scene, place: str) -> None:
    """The backup stands where a hook after it fails: exit status 7, and it is named."""
    hooks = all_hooks(scene)
    path = scene.home / place
    path.write_text(path.read_text() + "exit 4\n")
    ended = scene.backup(hooked(scene, *hooks))
    assert ended.run
    assert outcome(ended) == ("completed", None)
    assert status_of(ended.run) is ExitStatus.STEP_AFTER_FAILED
    assert [step.intent.describe() for step in ended.run.failed_after] == [
        said.removesuffix(": exit status 4") for said in ended.said("warn")
    ]
    assert did(scene)[-1] == "finally"  # those that follow run as ever


def test_strange_words(scene: Scene) -> None:
    """What a hook prints becomes a reason, whatever bytes it has; the hooks after it run."""
    loud = script(scene, "loud", "printf 'a\\000b\\033[31m\\n'; exit 3")
    hook = RunHook(AROUND_RUN, loud, script(scene, "start"))
    ended = scene.backup(hooked(scene, hook, *all_hooks(scene)[:3]))
    assert outcome(ended) == ("failed", f"{hook.describe()}: exit status 3: a?b?[31m")
    assert did(scene) == ["loud", "start", "after-failure", "finally"]


def test_failed_twice(scene: Scene) -> None:
    """Where there is no backup, a hook after it does not make it one: its own status counts."""
    after = RunHook(AFTER_FAILURE, script(scene, "after", "exit 4"))
    ended = scene.backup(hooked(scene, RunHook(AROUND_RUN, script(scene, "no", "exit 3")), after))
    assert ended.run
    assert status_of(ended.run) is ExitStatus.FAILED


def test_not_there(scene: Scene) -> None:
    """A command that does not exist is a hook that fails."""
    ended = scene.backup(hooked(scene, RunHook(AROUND_RUN, ("/nowhere/hook", "word"))))
    said = "hook before the run: /nowhere/hook word: cannot start /nowhere/hook: No such file"
    assert outcome(ended) == ("failed", f"{said} or directory")


def test_over_its_limit(scene: Scene) -> None:
    """A hook that hangs is ended at its limit, with all of its session, and has failed."""
    slow = script(scene, "slow", "echo $$ > pid; trap '' TERM; sleep 1000 & sleep 1000")
    hook = RunHook(AROUND_RUN, slow, script(scene, "start"), limit_s=1)
    scene.changes.append(_short_grace)
    ended = scene.backup(hooked(scene, hook))
    assert outcome(ended) == ("failed", f"{hook.describe()}: did not end within 1s")
    assert did(scene) == ["slow", "start"]
    assert session(scene) == []


def _short_grace() -> None:
    sessions.GRACE_S = 1.0


def session(scene: Scene) -> list[int]:
    return sessions._session(int((scene.home / "pid").read_text()))


def test_signal(scene: Scene) -> None:
    """A signal ends a hook before the client: rolled back, and undone."""
    slow = RunHook(
        AROUND_RUN, script(scene, "slow", "echo $$ > pid; sleep 1000"), script(scene, "start")
    )
    made = hooked(scene, slow)
    ended = scene.backup(made, at="start:slow#1", who=f"signal {signal.SIGTERM:d}", delay_s=0.5)
    assert ended.interrupted == "interrupted by SIGTERM"
    assert outcome(ended) == ("rolled-back", "interrupted by SIGTERM")
    assert did(scene) == ["slow", "start"]
    assert not session(scene)
    assert not scene.left()


LEAVES = "sleep 1000 & echo $! > helper; setsid sleep 1001 & echo $! > daemon"


@pytest.fixture
def daemons(scene: Scene) -> Iterator[Callable[[], bool]]:
    """Yield what tells whether the daemon of a hook lives; it is ended at the end."""

    def pid() -> int:
        return int((scene.home / "daemon").read_text())

    yield lambda: Path(f"/proc/{pid()}/cmdline").read_bytes().startswith(b"sleep")
    with suppress(ProcessLookupError):
        os.kill(pid(), signal.SIGKILL)


def test_what_a_hook_leaves(scene: Scene, daemons: Callable[[], bool]) -> None:
    """What stays in a hook's session lives until its undo; a daemon's life is its own."""
    stop = script(scene, "stop", f"touch in-run; {LEAVES}")
    gone = "dead $(cat helper) && ! dead $(cat daemon)"
    made = hooked(scene, RunHook(AROUND_RUN, stop, script(scene, "start", gone)))
    alive = f"test -e /proc/$(cat {scene.home}/helper) || exit 8\n"
    scene.behave((scene.home / "behaviour").read_text() + alive)
    ended = scene.backup(made)
    assert daemons()
    assert outcome(ended) == ("completed", None)
    assert [result for _, result, _ in hook_steps(scene)] == ["done", "done"]


def test_what_a_hook_around_the_snapshots_leaves(scene: Scene, daemons: Callable[[], bool]) -> None:
    """So it is where no process can be noted."""
    quiesce = script(scene, "quiesce", LEAVES)
    gone = "dead $(cat helper) && ! dead $(cat daemon)"
    made = hooked(scene, RunHook(AROUND_SNAPSHOT, quiesce, script(scene, "thaw", gone)))
    scene.behave("")
    ended = scene.backup(made)
    assert daemons()
    assert outcome(ended) == ("completed", None)
    assert [result for _, result, _ in hook_steps(scene)] == ["done", "done"]


@pytest.mark.parametrize("hangs", [False, True])
def test_killed_after_an_undo_has_begun_a_daemon(
    scene: Scene, daemons: Callable[[], bool], hangs: bool
) -> None:
    """A database that the thaw has started is no part of a hook that has to be ended."""
    once = "test -e daemon && exit; setsid sleep 1001 & echo $! > daemon"
    rest = "; echo $$ > pid; sleep 1000" if hangs else ""
    thaw = script(scene, "thaw", f"test ! -e pid || dead $(cat pid) || exit 9; {once}{rest}")
    made = hooked(scene, RunHook(AROUND_SNAPSHOT, script(scene, "quiesce"), thaw))
    scene.behave("")
    if hangs:
        killed = scene.backup(made, at="start:thaw#1", who="front", delay_s=0.5)
    else:
        killed = scene.backup(made, at="before:snapshotted#1", who="front")
    assert killed.status == -signal.SIGKILL
    ended = scene.recover()
    assert daemons()
    assert outcome(ended)[0] == "completed"
    assert did(scene) == ["quiesce", "thaw", "thaw"]
    assert hook_steps(scene)[1] == ("undo-hook", "done", None)
    assert not (hangs and session(scene))


# -- retention -------------------------------------------------------------------------------


def kept(scene: Scene, body: str = "") -> Plan:
    """Return a plan whose client forgets older backups: by a script, in the place of its own."""
    made = scene.plan(*SETS, client="played")
    forget = script(scene, "forget", f"test -e in-run || exit 9\n{body}")
    scene.behave(f"test -e {scene.home}/in-run || exit 1\n")
    (scene.home / "forgetting").write_text(forget[0])
    return replace(made, hooks=all_hooks(scene), retention=("--keep-last=3",))


def test_retention(scene: Scene) -> None:
    """After a backup that completed, while what a hook has mounted for it is still there."""
    ended = scene.backup(kept(scene))
    assert outcome(ended) == ("completed", None)
    assert did(scene) == ["stop", "quiesce", "thaw", "forget", "start", "after-success", "finally"]
    assert ended.run
    assert status_of(ended.run) is ExitStatus.COMPLETED
    assert scene.left() == []


@pytest.mark.parametrize(("said", "result"), [("exit 3", "partial"), ("exit 1", "failed")])
def test_nothing_is_forgotten(scene: Scene, said: str, result: str) -> None:
    """What a backup lacks that did not complete may be in an older one alone."""
    made = kept(scene)
    scene.behave(f'cat "$1/file" > /dev/null; {said}\n')
    assert outcome(scene.backup(made))[0] == result
    assert "forget" not in did(scene)


def test_retention_fails(scene: Scene) -> None:
    """The backup stands; exit status 7, and the rest goes on."""
    ended = scene.backup(kept(scene, "echo locked; exit 11"))
    assert ended.run
    assert outcome(ended) == ("completed", None)
    assert status_of(ended.run) is ExitStatus.STEP_AFTER_FAILED
    (said,) = ended.said("warn")
    assert said.endswith(" by --keep-last=3: exit status 11: locked")
    assert did(scene)[-3:] == ["start", "after-success", "finally"]


@pytest.mark.parametrize(
    "bug", [ValueError("Extra data: sesame"), OSError(5, "Input/output error")]
)
def test_unknowable_retention(scene: Scene, bug: Exception) -> None:
    """A client that stumbles over an answer keeps no run from its end; nor is a secret told."""

    def stumble(self: Played, settings: Settings, *given: object) -> NoReturn:
        raise bug

    made = kept(scene)
    client = replace(made.client, environment=(("THE_PASSWORD", "sesame"),))
    scene.changes.append(lambda: setattr(Played, "forgetting", stumble))
    ended = scene.backup(replace(made, client=client))
    assert ended.run
    assert outcome(ended) == ("completed", None)
    assert status_of(ended.run) is ExitStatus.STEP_AFTER_FAILED
    (said,) = ended.said("warn")
    assert "played does not tell what there is to forget: " in said
    assert "sesame" not in said
    assert did(scene)[-3:] == ["start", "after-success", "finally"]
    assert scene.left() == []


@pytest.mark.parametrize("who", ["front", "all"])
def test_killed_in_retention(scene: Scene, who: str) -> None:
    """It is ended, what it left in the repository is mended, and it runs once more."""
    made = kept(scene, "test -e twice && exit; touch twice; echo $$ > pid; sleep 1000")
    killed = scene.backup(made, at="start:forget#1", who=who, delay_s=0.5)
    assert killed.status == -signal.SIGKILL
    scene.changes.append(lambda: setattr(Played, "inspect", _there))
    ended = scene.recover()
    assert outcome(ended) == ("completed", None)
    assert did(scene).count("forget") == 2
    assert ended.run
    assert status_of(ended.run) is ExitStatus.COMPLETED
    assert did(scene)[-5:] == ["stop", "forget", "start", "after-success", "finally"]
    assert any(str(words).startswith("mended repo") for words in ended.said("step"))
    assert not session(scene)


def test_killed_in_retention_on_a_disk_of_its_own(scene: Scene) -> None:
    """What forgets is ended before the undo takes away what it works on, and before a new one."""
    made = kept(scene, "test -e twice && exit; touch twice; echo $$ > pid; exec sleep 1000")
    free = "! test -e pid || dead $(cat pid) || { echo busy >&2; exit 9; }"
    stop = script(scene, "stop", "test ! -e in-run || exit 8; touch in-run")
    start = script(scene, "start", f"{free}; rm -f in-run")
    made = replace(made, hooks=(RunHook(AROUND_RUN, stop, start),))
    killed = scene.backup(made, at="start:forget#1", who="front", delay_s=0.5)
    assert killed.status == -signal.SIGKILL
    assert session(scene)
    scene.changes.append(lambda: setattr(Played, "inspect", _there))
    ended = scene.recover()
    assert outcome(ended) == ("completed", None)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.COMPLETED, ended.said("warn")
    assert did(scene) == ["stop", "forget", "start", "stop", "forget", "start"]
    assert not session(scene)
    assert in_force(scene) == scene.left() == []


def test_retention_of_another_repository(scene: Scene) -> None:
    """A disk that was put in the place of the run's own is neither mended nor cleared."""
    made = kept(scene, "test -e twice && exit; touch twice; echo $$ > pid; sleep 1000")
    scene.backup(made, at="start:forget#1", who="all", delay_s=0.5)
    scene.changes.append(lambda: setattr(Played, "inspect", _elsewhere))
    ended = scene.recover()
    assert outcome(ended) == ("completed", None)
    assert ended.statuses == [ExitStatus.STEP_AFTER_FAILED]
    assert "the repository is another one than the run's" in " ".join(ended.said("warn"))
    assert did(scene).count("forget") == 1
    assert not any(str(words).startswith("mended") for words in ended.said("step"))


def test_retention_is_interrupted(scene: Scene) -> None:
    """A signal ends it at once; the backup stands, and the hooks are undone."""
    made = kept(scene, "echo $$ > pid; sleep 1000")
    ended = scene.backup(made, at="start:forget#1", who=f"signal {signal.SIGINT:d}", delay_s=0.5)
    assert outcome(ended) == ("completed", None)
    assert ended.run
    assert [step.intent.kind for step in ended.run.failed_after] == ["apply-retention"]
    assert ended.said("warn")[0].endswith("interrupted by SIGINT")
    assert in_force(scene) == []
    assert not session(scene)


# -- crashes ---------------------------------------------------------------------------------


def test_killed_in_a_hook(scene: Scene) -> None:
    """Of a killed front end's hook nothing lives on when its undo starts; one undo is enough."""
    slow = script(scene, "slow", "echo $$ > pid; touch in-run; env -i sleep 1000")
    gone = script(scene, "start", "rm in-run; dead $(cat pid)")
    made = hooked(scene, RunHook(AROUND_RUN, slow, gone), RunHook(FINALLY, script(scene, "last")))
    killed = scene.backup(made, at="start:slow#1", who="front", delay_s=0.5)
    assert killed.status == -signal.SIGKILL
    ended = scene.recover()
    assert outcome(ended)[0] == "rolled-back"
    assert did(scene) == ["slow", "start", "last"]
    assert ("undo-hook", "done", None) in hook_steps(scene)
    assert not session(scene)
    assert not scene.left()


def test_undo_that_fails_of_a_run_that_is_rolled_back(scene: Scene) -> None:
    """What a hook has stopped may be stopped still: that is no run that nothing is left of."""
    stop = script(scene, "stop", "touch in-run; exec sleep 1000")
    hook = RunHook(AROUND_RUN, stop, script(scene, "start", "echo no bus >&2; exit 3"))
    killed = scene.backup(hooked(scene, hook), at="start:stop#1", who="all", delay_s=0.5)
    assert killed.status == -signal.SIGKILL
    ended = scene.recover()
    assert outcome(ended)[0] == "rolled-back"
    assert ended.run
    assert status_of(ended.run) is ExitStatus.STEP_AFTER_FAILED
    assert ended.statuses == [ExitStatus.STEP_AFTER_FAILED]


def test_undo_that_fails_of_a_run_that_is_left(scene: Scene) -> None:
    """So where the run itself waits for a later `recover`; an undo that works ends that."""
    start = script(scene, "start", "test -e mended || exit 3; rm in-run")
    hook = RunHook(AROUND_RUN, script(scene, "stop", "touch in-run"), start)
    scene.backup(hooked(scene, hook), at="journal:backing-up#1", who="all")
    left = scene.recover(may_resume=False)
    assert left.decisions == [settling.LEFT]
    assert left.statuses == [ExitStatus.STEP_AFTER_FAILED]
    assert scene.recover(may_resume=False).statuses == [ExitStatus.STEP_AFTER_FAILED]
    (scene.home / "mended").touch()
    ended = scene.recover()
    assert outcome(ended) == ("completed", None)
    assert in_force(scene) == []


@pytest.mark.parametrize(
    ("outcomes", "leaves"),
    [
        (("failed",), True),
        (("failed", "not-needed"), True),
        (("failed", None), True),
        (("failed", "done"), False),
        (("done", "failed"), True),
        (("not-needed",), False),
    ],
)
def test_undo_that_counts(outcomes: tuple[str | None, ...], *, leaves: bool) -> None:
    """What an undo has failed to start is stopped still, though a later attempt stopped nothing."""
    undo = RunHook(AROUND_RUN, ("stop",), ("start",)).compensation()
    assert undo
    steps = [Step(n, n, undo, 0, outcome) for n, outcome in enumerate(outcomes)]
    assert leaves_a_hook(steps) == leaves


def test_name_that_is_no_text(scene: Scene) -> None:
    """A hook is undone whatever names the machine's processes have: any user can choose theirs."""
    slow = script(scene, "slow", "echo $$ > pid; touch in-run; sleep 1000")
    made = hooked(scene, RunHook(AROUND_RUN, slow, script(scene, "start", "rm in-run")))
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff'); print(flush=True); input()"
    with subprocess.Popen(
        (sys.executable, "-c", code), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        assert other.stdout.readline()
        killed = scene.backup(made, at="start:slow#1", who="front", delay_s=0.5)
        assert killed.status == -signal.SIGKILL
        ended = scene.recover()
        other.communicate(b"\n")
    assert outcome(ended)[0] == "rolled-back", (scene.home / "log").read_text()
    assert did(scene) == ["slow", "start"]
    assert not session(scene)
    assert in_force(scene) == scene.left() == []


def test_killed_in_an_undo(scene: Scene) -> None:
    """An undo whose front end was killed is ended before it runs once more, never beside itself."""
    once = "test -e twice && exit; touch twice; echo $$ > pid; exec sleep 1000"
    undo = script(scene, "start", f"test ! -e pid || dead $(cat pid) || exit 9; {once}")
    made = hooked(scene, RunHook(AROUND_RUN, script(scene, "stop", "touch in-run"), undo))
    killed = scene.backup(made, at="start:start#1", who="front", delay_s=0.5)
    assert killed.status == -signal.SIGKILL
    assert session(scene)
    ended = scene.recover()
    assert outcome(ended) == ("completed", None)
    assert did(scene) == ["stop", "start", "start"]
    assert hook_steps(scene)[1] == ("undo-hook", "done", None)
    assert not session(scene)


def test_taken_up_again(scene: Scene) -> None:
    """A run that waits is not in the hook's hands; taken up again, it is, until its end."""
    made = hooked(scene, *all_hooks(scene))
    killed = scene.backup(made, at="journal:backing-up#1", who="all")
    assert killed.status == -signal.SIGKILL
    assert in_force(scene) == ["in-run"]
    pools = scene.pool["pools"]
    scene.play(pools={})
    waits = scene.recover()
    assert waits.raised
    assert in_force(scene) == []
    assert did(scene)[-1:] == ["start"]
    scene.play(pools=pools)
    ended = scene.recover()
    assert outcome(ended) == ("completed", None)
    assert did(scene)[4:] == ["stop", "start", "after-success", "finally"]
    assert in_force(scene) == scene.left() == []


@pytest.mark.parametrize("at", ["end:zfs snapshot#1", "journal:backing-up#1"])
def test_repository_out_of_reach(scene: Scene, at: str) -> None:
    """What a killed front end left stopped is undone before the client is asked for anything."""
    made = replace(
        hooked(scene, *all_hooks(scene)), client=scene.plan(*SETS, client="played").client
    )
    killed = scene.backup(made, at=at, who="all")
    assert killed.status == -signal.SIGKILL
    assert "in-run" in in_force(scene)
    scene.changes.append(lambda: setattr(Played, "inspect", _out_of_reach))
    waits = scene.recover()
    assert isinstance(waits.raised, WaitingError), (scene.home / "log").read_text()
    assert "waits: in force: []" in waits.raised.message
    assert in_force(scene) == []
    scene.changes[:] = [lambda: setattr(Played, "inspect", _there)]
    assert outcome(scene.recover()) == ("completed", None)
    assert did(scene)[-4:] == ["stop", "start", "after-success", "finally"]
    assert in_force(scene) == scene.left() == []


def _out_of_reach(_: Played, settings: Settings) -> NoReturn:
    home = Path(settings.command[0]).parent
    raise UserError(f"in force: {[path.name for path in home.glob('in-*')]}")


def _there(_: Played, __: Settings) -> Facts:
    return Facts("1.2", "repo")


def _elsewhere(_: Played, __: Settings) -> Facts:
    return Facts("1.2", "another")


def test_password_that_is_not_there(scene: Scene) -> None:
    """A backup whose password is not there keeps its moment, and leaves no hook in force."""
    made = hooked(scene, *all_hooks(scene))
    scene.changes.append(lambda: setattr(executor, "environment_of", _no_password))
    waits = scene.backup(made)
    assert isinstance(waits.raised, WaitingError), (scene.home / "log").read_text()
    assert waits.raised.message == f"run {made.run} (tank/a) waits: no password"
    hint = "its moment is kept: mend that and run `atomtx recover`, or `recover --rollback`"
    assert waits.raised.hint == hint
    assert in_force(scene) == []
    assert did(scene)[-1:] == ["start"]
    scene.changes.clear()
    assert outcome(scene.recover()) == ("completed", None)
    assert in_force(scene) == scene.left() == []


def _no_password(_: object) -> NoReturn:
    raise CredentialError("no password")


def test_journal_that_cannot_be_written(scene: Scene) -> None:
    """What the journal cannot record any more is undone all the same; `recover` goes on."""
    made = hooked(scene, *all_hooks(scene))
    scene.changes.append(lambda: setattr(Executor, "_record_end", _out_of_order))
    ended = scene.backup(made)
    assert isinstance(ended.raised, JournalError), (scene.home / "log").read_text()
    assert in_force(scene) == []
    assert did(scene)[-1:] == ["start"]
    scene.changes.clear()
    assert outcome(scene.recover()) == ("completed", None)
    assert in_force(scene) == scene.left() == []


def _out_of_order(*_: object) -> NoReturn:
    raise JournalError("disk I/O error")


def test_end_that_cannot_be_read(scene: Scene) -> None:
    """A run whose client's end cannot be read now waits, and is not in the hook's hands."""
    made = hooked(scene, *all_hooks(scene))
    killed = scene.backup(made, at="journal:backing-up#1", who="all")
    assert killed.status == -signal.SIGKILL
    end = RunFolder.of(scene.state, made.run).end
    end.unlink()
    end.mkdir()  # as unreadable as on a bad disk
    waits = scene.recover()
    assert isinstance(waits.raised, WaitingError), (scene.home / "log").read_text()
    said = f"run {made.run} (tank/a) waits: [Errno 21] Is a directory: '{end}'"
    assert waits.raised.message == said
    assert in_force(scene) == []
    assert did(scene)[-1:] == ["start"]
    end.rmdir()
    assert outcome(scene.recover()) == ("completed", None)
    assert in_force(scene) == scene.left() == []


@pytest.mark.parametrize(("owner", "name"), [(system.here, "pids"), (settling, "probe")])
def test_machine_that_cannot_be_looked_at(scene: Scene, owner: object, name: str) -> None:
    """A client that lives stays in the hook's hands, though a recovery cannot look at its run."""
    made = hooked(scene, *all_hooks(scene))
    scene.behave((scene.home / "behaviour").read_text() + f"cat {scene.home}/fifo\n")
    os.mkfifo(scene.home / "fifo")
    killed = scene.backup(made, at="journal:backing-up#1", who="front later", delay_s=1)
    assert killed.status == -signal.SIGKILL
    assert locks.is_held(RunFolder.of(scene.state, made.run).runner_lock)
    scene.changes.append(lambda: setattr(owner, name, _used_up))
    waits = scene.recover()
    assert isinstance(waits.raised, WaitingError), (scene.home / "log").read_text()
    assert "waits: [Errno 24] Too many open files" in waits.raised.message
    assert in_force(scene) == ["in-run"]
    scene.changes.clear()
    (scene.home / "fifo").write_text("")
    assert outcome(scene.recover()) == ("completed", None)
    assert did(scene) == ["stop", "quiesce", "thaw", "start", "after-success", "finally"]


def _used_up(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("zpool", "cannot list the pools: The ZFS modules are not loaded."),
        ("get", "cannot look at the snapshots: cannot get: out of luck"),
    ],
)
def test_command_that_refuses(scene: Scene, fault: str, said: str) -> None:
    """Where a command tells nothing of a run, that waits, and is not in the hook's hands."""
    made = hooked(scene, *all_hooks(scene))
    killed = scene.backup(made, at="journal:backing-up#1", who="all")
    assert killed.status == -signal.SIGKILL
    scene.play(faults={fault: "refuse"})
    _check_waits(scene, made, said)
    scene.play(faults={})
    assert outcome(scene.recover()) == ("completed", None)
    assert in_force(scene) == scene.left() == []


def test_machine_that_cannot_be_mended(scene: Scene) -> None:
    """So it is where what a killed command left cannot be undone before the first look."""
    made = hooked(scene, *all_hooks(scene))
    killed = scene.backup(made, at="journal:backing-up#1", who="all")
    assert killed.status == -signal.SIGKILL
    scene.changes.append(lambda: setattr(Kinds, "mend", _refuse))
    _check_waits(scene, made, "cannot ask for suspended devices")
    scene.changes.clear()
    assert outcome(scene.recover()) == ("completed", None)
    assert in_force(scene) == scene.left() == []


def _check_waits(scene: Scene, made: Plan, said: str) -> None:
    waits = scene.recover()
    assert isinstance(waits.raised, WaitingError), (scene.home / "log").read_text()
    assert waits.raised.message == f"run {made.run} (tank/a) waits: {said}"
    assert in_force(scene) == []
    assert did(scene)[-1:] == ["start"]


def _refuse(*_: object) -> NoReturn:
    raise EffectError("cannot ask for suspended devices")


def test_repeated_at_once(scene: Scene) -> None:
    """A client that is repeated by the same front end stays in the hook's hands."""
    made = replace(scene.plan(*SETS, client="played"), hooks=all_hooks(scene), retries=1)
    once = f"test -e {scene.home}/once || {{ touch {scene.home}/once; exit 75; }}\n"
    scene.behave(f"test -e {scene.home}/in-run || exit 9\n{once}")
    ended = scene.backup(made)
    assert outcome(ended) == ("completed", None)
    assert did(scene).count("stop") == did(scene).count("start") == 1


def _points(scene: Scene) -> list[str]:
    ended = scene.backup(hooked(scene, *all_hooks(scene)))
    assert outcome(ended) == ("completed", None)
    return [p for p in ended.points if not p.startswith("runner:")]


@pytest.mark.parametrize("who", ["front", "all"])
def test_killed_anywhere(tmp_path: Path, who: str) -> None:
    """Promise 5: killed at any point, no hook is left without its undo; nor in the recovery."""
    (tmp_path / "first").mkdir()
    found = _points(Scene(tmp_path / "first"))
    wrong, again = [], 0
    for n, point in enumerate(some(found[found.index("journal:planned#1") :], 9)):
        (tmp_path / str(n)).mkdir()
        scene = Scene(tmp_path / str(n))
        made = hooked(scene, *all_hooks(scene))
        killed = scene.backup(made, at=point, who=who)
        assert killed.status == -signal.SIGKILL, point
        first = scene.recover(at=f"#{3 * n % 40 + 1}", who=who)
        again += first.status == -signal.SIGKILL
        last = scene.recover()
        assert (last.status, last.raised) == (0, None), point
        wrong += [f"{point}: {thing}" for thing in (*scene.left(), *in_force(scene))]
        ran = did(scene)
        if ran.count("stop") and "start" not in ran[len(ran) - ran[::-1].index("stop") :]:
            wrong.append(f"{point}: {ran}")
        if [r for r in scene.rows("SELECT * FROM steps") if r["outcome"] is None]:
            wrong.append(f"{point}: a step without an outcome")
        if "finally" not in ran and (first.run or last.run):
            wrong.append(f"{point}: {ran}")
        if scene.rows("SELECT moment_at FROM runs")[0]["moment_at"] and not scene.copies():
            wrong.append(f"{point}: no copy: {scene.rows('SELECT * FROM runs')}")
        scene.close()
    assert wrong == []
    assert again > 0


def test_hook_and_we_are_told(scene: Scene) -> None:
    """A hook of a kept moment that dies of the shutdown that we hear of as well has not failed."""
    shut_down = "test ! -e shutdown || { rm shutdown; kill -TERM $PPID; kill -TERM $$; }"
    stop = script(scene, "stop", f"touch in-run; {shut_down}")
    hook = RunHook(AROUND_RUN, stop, script(scene, "start", "rm -f in-run"))
    made = replace(hooked(scene, hook), on_stop="keep")
    scene.backup(made, at="journal:snapshotted#1", who="all")
    (scene.home / "shutdown").touch()
    ended = scene.recover()
    assert ended.interrupted == "interrupted by SIGTERM"
    assert (outcome(ended), in_force(scene)) == ((None, None), [])
    assert len(scene.pool["snapshots"]) == 2
    assert outcome(scene.recover()) == ("completed", None)

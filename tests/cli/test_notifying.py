"""Notices of `backup` and `recover`: what is told, when, and that it changes no result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from atomtx import locks, notices, outbox
from atomtx.notices import Facts, NotifySettings
from tests.cli.conftest import SOURCE, Run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups")
CHECKOUT = Path(__file__).parents[2]
Play = Callable[..., "Played"]

# The commands as they are, with journal and locks as they are; but the plan is of datasets that
# are nowhere, and runs end as they are told to.
_PROGRAM = """
import os, sys
from atomtx import cli, statedir
from atomtx.cli import backup, notifying, recover
from atomtx.errors import EffectError, JournalError, UserError, WaitingError
from atomtx.executor import Executor
from atomtx.journal import Journal
from atomtx.names import RunId
from atomtx.recovery import Adopt, LeaveAlone, Resume, RollBack, RollForward
from atomtx.settling import Settled, Settler
from atomtx.statedir import RunFolder
from atomtx.states import Event, Outcome
from tests.runs import RUN, a_plan

def end(journal, run, outcome, reason=None, *, parked=False):
    RunFolder.of(journal.state, run.id).log.write_text("scanning\\nFatal: no route\\n")
    with journal.change(run) as change:
        change.set(outcome=outcome, reason=reason, cleanup="parked" if parked else None)
        change.fire(Event.GIVEN_UP, reason=reason)
    run = journal.load(run.id)
    if not parked:
        with journal.change(run) as change:
            change.fire(Event.CLEANED_UP)
    return journal.load(run.id)

def planned(**values):
    return a_plan(run=RunId.new(), **values)

def begun():
    # A run whose front end is gone.
    with Journal.open(statedir.prepare(statedir.find())) as journal:
        RunFolder.of(journal.state, RUN).make()
        return journal.begin(a_plan(), [])

backup.make_plan = lambda *_, **__: planned()
Executor.advance = lambda self, run: end(self._journal, run, "completed")
Settler.settle = lambda self, run: None
"""
# Writes down what it is told, and which locks are held at that time.
_TELL = """
import fcntl, glob, json, os, sys
def is_held(path):
    with open(path, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
state = os.environ["ATOMTX_STATE_DIR"]
held = [p for p in glob.glob(state + "/runs/*/*.lock") + [state + "/journal.lock"] if is_held(p)]
names = {n[7:]: v for n, v in os.environ.items() if n.startswith("ATOMTX_")}
with open(sys.argv[1], "a") as file:
    print(json.dumps(names | {"TEXT": sys.stdin.read(), "HELD": held}), file=file)
"""


class Played:
    """A command that was run to its end, and what was told of it."""

    def __init__(self, done: subprocess.CompletedProcess[str], told: Path) -> None:
        self.status = done.returncode
        self.said = done.stderr
        self.notices = [json.loads(line) for line in told.read_text().splitlines()]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("warning: ")]


@pytest.fixture
def play(tmp_path: Path, env: dict[str, str]) -> Play:
    """Run a command after some code that says how it goes; told of by a command of the user's."""
    told = tmp_path / "told"
    tell = tmp_path / "tell"
    tell.write_text(_TELL)

    def play(code: str, *words: str, **variables: str) -> Played:
        told.write_text("")
        settings = {
            "ATOMTX_NOTIFY_COMMAND": f"{sys.executable} {tell} {told}",
            "PYTHONPATH": f"{SOURCE}:{CHECKOUT}",
            **variables,
        }
        argv = [sys.executable, "-c", f"{_PROGRAM}{textwrap.dedent(code)}\ncli.main(sys.argv[1:])"]
        words = words or ("backup", "tank/a", "--command", "true")
        done = subprocess.run(
            [*argv, *words], env={**env, **settings}, capture_output=True, text=True, check=False
        )
        return Played(done, told)

    return play


def ends(words: str) -> str:
    return f"Executor.advance = lambda self, run: end(self._journal, run, {words})"


FAILS = ends("'failed'")
FAILED = "'failed', 'why'"
OF_NO_HISTORY = "from atomtx.cli import runs; runs._FOLLOWED_S = 0"
KEEPS_NONE = ("backup", "tank/a", "--command", "true", "--keep-history", "0")


def one(played: Played) -> dict[str, Any]:
    (notice,) = played.notices
    assert isinstance(notice, dict)
    return notice


@pytest.mark.parametrize(
    ("code", "event", "status"),
    [
        (ends("'failed', 'the network is down'"), "failed", 1),
        (ends("'partial', '2 files could not be read'"), "partial", 3),
        (ends("'completed', 'busy', parked=True"), "parked", 4),
        ("Executor.advance = lambda self, run: run", "waiting", 6),
    ],
)
def test_backup(play: Play, code: str, event: str, status: int) -> None:
    """Each end that is not a complete backup is told, once, after every lock was released."""
    if status == 6:  # kept in `snapshotted` for the next attempt
        code = """
            def advance(self, run):
                with self._journal.change(run) as change:
                    change.set(reason="the network is down")
                    change.fire(Event.SNAPSHOTS_TAKEN)
                return self._journal.load(run.id)
            Executor.advance = advance
        """
    played = play(code)
    notice = one(played)
    assert played.status == status
    assert (notice["EVENT"], notice["EXIT_STATUS"]) == (event, str(status))
    assert notice["JOB"] == "tank/a, tank/a/b"
    assert notice["HELD"] == []
    assert "tank/a, tank/a/b" in notice["TEXT"]
    assert notice["RUN"][:8] in notice["TEXT"]
    assert event == "waiting" or "  Fatal: no route" in notice["TEXT"]
    assert "never, as far as the journal knows" in notice["TEXT"] or event == "parked"
    assert played.warnings == []


@pytest.mark.parametrize(
    ("said", "outcome", "status"),
    [("exit status 9", "failed", 1), ("exit status 4: no such table", "completed", 7)],
)
def test_status_of_a_hook(play: Play, said: str, outcome: str, status: int) -> None:
    """What a program of the user's exited with is none of ours: 4 is nothing parked."""
    code = f"""
        from atomtx.intents import RunHook
        def advance(self, run):
            with self._journal.change(run) as change:
                hook = RunHook("finally", ("umount", "/mnt"))
                change.intend(hook)
            run = self._journal.load(run.id)
            with self._journal.change(run) as change:
                (step,) = run.pending(RunHook)
                change.ended(step, "failed", {said!r})
            return end(self._journal, self._journal.load(run.id), {outcome!r})
        Executor.advance = advance
    """
    played = play(code)
    notice = one(played)
    assert (played.status, played.warnings) == (status, []), played.said
    assert (notice["OUTCOME"], notice["EXIT_STATUS"]) == (outcome, str(status))
    assert "parked" not in notice["TEXT"]
    assert notice["EVENT"] != "parked"


def test_completed(play: Play) -> None:
    """A complete backup is told where that was asked for, and not else."""
    assert play("").notices == []
    notice = one(play("", ATOMTX_NOTIFY_ON="completed"))
    assert (notice["EVENT"], notice["EXIT_STATUS"]) == ("completed", "0")
    assert play(FAILS, ATOMTX_NOTIFY_ON="completed").notices == []


def test_last_completed(play: Play) -> None:
    """A failure tells since when there is no new backup."""
    assert play("").status == 0
    text = one(play(FAILS))["TEXT"]
    assert "last backup of " in text
    assert "never" not in text


def test_interrupt(play: Play) -> None:
    """A run that a signal ended is told: there is no backup of it."""
    code = """
        def advance(self, run):
            os.kill(os.getpid(), 15)
            return end(self._journal, run, "rolled-back", "interrupted by SIGTERM")
        Executor.advance = advance
    """
    played = play(code)
    assert played.status == 143
    notice = one(played)
    assert (notice["EVENT"], notice["OUTCOME"]) == ("failed", "rolled-back")
    assert notice["EXIT_STATUS"] == "143"


def test_forgotten_at_once(play: Play) -> None:
    """What is told is taken down before the run may be forgotten at its --keep-history."""
    notice = one(play(f"{OF_NO_HISTORY}; {ends(FAILED)}", *KEEPS_NONE))
    assert "  Fatal: no route" in notice["TEXT"]


def test_known_for_a_while(play: Play, tmp_path: Path, atomtx_: Run) -> None:
    """Whoever stops or follows a run, or is told of it, can ask how it ended."""
    run = one(play(ends(FAILED), *KEEPS_NONE))["RUN"]
    assert atomtx_("attach", run).returncode == 1
    assert atomtx_("stop", run).returncode == 0
    assert atomtx_("show", run).returncode == 0
    run = one(play(f"{OF_NO_HISTORY}; {ends(FAILED)}", *KEEPS_NONE))["RUN"]
    assert "no run" in atomtx_("show", run).stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [("JournalError('disk I/O error')", 0), ("JournalDamagedError('it', 'torn')", 1)],
)
def test_not_forgotten(play: Play, error: str, status: int) -> None:
    """What was done is done, where nothing can be forgotten after it; damage is told at once."""
    code = f"""
        from atomtx.errors import JournalDamagedError
        def expire(self, keep_s):
            raise {error}
        Journal.expire = expire
    """
    played = play(code)
    assert played.status == status, played.said
    assert bool(played.warnings) == (status == 0)


def test_no_run(play: Play) -> None:
    """A backup that fails before it has a run is told, with what to do."""
    code = """
        def refuse(*_, **__):
            raise UserError("tank/a is not mounted", hint="mount it")
        backup.make_plan = refuse
    """
    played = play(code)
    notice = one(played)
    assert played.status == 2
    assert (notice["EVENT"], notice["RUN"], notice["JOB"]) == ("failed", "", "tank/a")
    assert "failed: tank/a is not mounted" in notice["TEXT"]
    assert "what to do  mount it" in notice["TEXT"]
    assert "last backup" not in notice["TEXT"]


def test_bug_in_run(play: Play) -> None:
    """A run that a bug ended is told, by its id; the traceback is shown as ever."""
    code = """
        def advance(self, run):
            raise ZeroDivisionError("a bug")
        Executor.advance = advance
    """
    played = play(code)
    notice = one(played)
    assert played.status == 1
    assert "ZeroDivisionError: a bug" in played.said
    assert notice["EVENT"] == "failed"
    assert len(notice["RUN"]) == 16


BUSY = """
    run = begun()
    Settler.settle = lambda self, run: Settled(run, LeaveAlone("at work"))
"""


def test_busy(play: Play) -> None:
    """That another run of the job is at work is no news: it tells its own end."""
    played = play(BUSY)
    assert played.status == 5
    assert played.notices == []


def test_dry_run(play: Play) -> None:
    """A plan that is only shown tells nobody, whatever comes of it."""
    code = "backup.make_plan = lambda *_, **__: 1 / 0"
    assert play(code, "backup", "-n", "tank/a", "--command", "true").notices == []


# -- found interrupted -------------------------------------------------------------------------

FOUND = """
    run = begun()
    def settle(self, run):
        return Settled(end(self._journal, run, {outcome!r}, {reason!r}), Resume())
    Settler.settle = settle
"""


def test_backup_after_crash(play: Play) -> None:
    """A backup that finds its job interrupted tells that, and then its own end."""
    code = textwrap.dedent(FOUND.format(outcome="rolled-back", reason="a snapshot is gone"))
    played = play(f"{code}\n{FAILS}")
    first, second = played.notices
    assert (first["EVENTS"], second["EVENTS"]) == ("failed interrupted", "failed")
    assert first["RUN"] != second["RUN"]
    assert "a snapshot is gone" in first["TEXT"]


@pytest.mark.parametrize(
    ("outcome", "events"),
    [("completed", "interrupted completed"), ("rolled-back", "failed interrupted")],
)
def test_recover(play: Play, outcome: str, events: str) -> None:
    """`recover` tells of each run that nobody was at work on, and what became of it."""
    played = play(FOUND.format(outcome=outcome, reason=None), "recover")
    notice = one(played)
    assert played.status == 0
    assert notice["EVENTS"] == events
    assert notice["HELD"] == []
    assert "found unfinished, with nobody at work on it" in notice["TEXT"]


@pytest.mark.parametrize("command", ["recover", "backup"])
def test_waiting(play: Play, command: str) -> None:
    """A run that must wait is told by both, with what it waits for and what to do."""
    code = """
        run = begun()
        def settle(self, run):
            raise WaitingError(f"run {run.id} waits: pool tank is not imported", hint="import it")
        Settler.settle = settle
    """
    words = ("recover",) if command == "recover" else ()
    played = play(code, *words)
    notice = one(played)
    assert played.status == 6
    assert notice["EVENT"] == "waiting"
    assert "pool tank is not imported" in notice["TEXT"]
    assert "what to do  import it" in notice["TEXT"]


def test_recover_fails(play: Play, tmp_path: Path) -> None:
    """Of a `recover` that fails, everybody is told whom the configuration names, once."""
    tell = [sys.executable, str(tmp_path / "tell"), str(tmp_path / "told")]
    job = '[jobs.{0}]\nvolumes = ["tank/{0}"]\nclient = "restic"\nnotify-command = {1}\n'
    config = tmp_path / "atomtx.toml"
    config.write_text(job.format("a", json.dumps(tell)) + job.format("b", json.dumps([*tell, "b"])))
    config.chmod(0o600)
    code = """
        def open_runs(self):
            raise JournalError("the disk does not answer")
        Journal.open_runs = open_runs
    """
    typed_wrong = play("", "recover", "--run", "7g", ATOMTX_CONFIG=str(config))
    assert (typed_wrong.status, len(typed_wrong.notices)) == (2, 1)
    played = play(code, "recover", ATOMTX_CONFIG=str(config))
    assert (played.status, len(played.notices)) == (1, 2)
    assert all("the disk does not answer" in notice["TEXT"] for notice in played.notices)


def test_recover_parked(play: Play) -> None:
    """A cleanup that is still parked is told; one that is done now is not."""
    parked = """
        run = begun()
        with Journal.open(statedir.find()) as journal:
            end(journal, run, "completed", "busy", parked=True)
    """
    still = f"{parked}\n        Settler.settle = lambda self, run: Settled(run, RollForward())\n"
    notice = one(play(still, "recover"))
    assert (notice["EVENTS"], notice["EXIT_STATUS"]) == ("parked", "4")
    clean = """
        def settle(self, run):
            with self._journal.change(run) as change:
                change.set(cleanup=None)
                change.fire(Event.CLEANED_UP)
            return Settled(self._journal.load(run.id), RollForward())
        Settler.settle = settle
    """
    played = play(clean, "recover")
    assert (played.status, played.notices) == (0, [])


def test_recover_not_removed(play: Play) -> None:
    """A complete backup whose traces could not be removed is not told as a success."""
    code = """
        run = begun()
        with Journal.open(statedir.find()) as journal:
            end(journal, run, "completed", "busy", parked=True)
        def settle(self, run):
            raise EffectError("zfs destroy failed")
        Settler.settle = settle
    """
    played = play(code, "recover", ATOMTX_NOTIFY_ON="completed,parked")
    assert played.status == 1
    assert one(played)["EVENTS"] == "interrupted parked"


@pytest.mark.parametrize("decision", ["Adopt()", "LeaveAlone('at work')"])
def test_recover_left_alone(play: Play, decision: str) -> None:
    """A run that is left to those who are at work on it is not told."""
    code = f"begun(); Settler.settle = lambda self, run: Settled(run, {decision})"
    played = play(code, "recover", "--no-wait")
    assert (played.status, played.notices) == (0, [])


FAILED_UNDO = """
from atomtx import settling
from atomtx.intents import AROUND_RUN, RunHook, UndoHook
def undo(journal, run):
    with journal.change(run) as change:
        change.intend(RunHook(AROUND_RUN, ("stop",), ("start",)))
    run = journal.load(run.id)
    with journal.change(run) as change:
        for step in (*run.pending(RunHook), *run.pending(UndoHook)):
            change.ended(step, "failed" if step.compensates else "done")
    return journal.load(run.id)
"""


def test_failed_undo_is_told_once(play: Play) -> None:
    """Each later look at a run that is kept gives its exit status, and no notice any more."""
    settle = "Settler.settle = lambda self, run: Settled({}, settling.LEFT)"
    fails = settle.format("undo(self._journal, run)")
    notice = one(play(f"{FAILED_UNDO}begun()\n{fails}", "recover"))
    assert notice["SUBJECT"].endswith("found unfinished; kept waiting, and a hook failed")
    played = play(FAILED_UNDO + settle.format("run"), "recover")
    assert (played.status, played.notices) == (7, [])


def test_failed_undo_of_a_stopped_service(play: Play, tmp_path: Path) -> None:
    """What a shutdown keeps for the next start is told where a hook was not undone, at once."""
    code = textwrap.dedent("""
        def advance(self, run):
            os.kill(os.getpid(), 15)
            return undo(self._journal, run)
        Executor.advance = advance
    """)
    assert play(FAILED_UNDO + code, ATOMTX_NOTIFY_LATER="1").status == 143
    (letter,) = outbox.letters(tmp_path / "state")
    assert letter.notice.subject.endswith("kept waiting, and a hook failed")


# -- a notifier changes no result --------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("false", "false failed: exit status 1"),
        ("/nowhere/tell", "cannot start /nowhere/tell: No such file or directory"),
        ("sleep 600", "sleep did not end within 2 s, and was killed"),
        ("'unclosed", "ATOMTX_NOTIFY_COMMAND cannot be read, and is not run"),
    ],
)
@pytest.mark.parametrize(("outcome", "status"), [("completed", 0), ("partial", 3)])
def test_failing_notifier(play: Play, command: str, words: str, outcome: str, status: int) -> None:
    """A notifier that fails, hangs, or is not there is one warning; the result stands."""
    played = play(
        ends(f"{outcome!r}"),
        ATOMTX_NOTIFY_ON="completed,partial",
        ATOMTX_NOTIFY_TIME_LIMIT="2s" if "sleep" in command else "",
        ATOMTX_NOTIFY_COMMAND=command,
    )
    assert played.status == status
    (warning,) = played.warnings
    assert words in warning


def test_killed_while_telling(play: Play) -> None:
    """Promise 5: a notice comes after the last write; a kill in it loses the notice alone."""
    killed = play(FAILS, ATOMTX_NOTIFY_COMMAND="sh -c 'kill -9 $PPID'")
    assert killed.status == -9
    recovered = play("", "recover")
    assert (recovered.status, recovered.notices) == (0, [])
    assert "nothing to recover" in recovered.said


@pytest.mark.parametrize(
    "function", ["Notifier._facts_of", "Notifier._last_completed", "notices.notice"]
)
def test_bug_in_notifier(play: Play, function: str) -> None:
    """A bug of ours in giving notice is a warning as well; the result stands."""
    code = ends("'partial'") + f"\nnotifying.{function} = lambda *_, **__: 1 / 0"
    played = play(code)
    assert played.status == 3
    assert "a bug: ZeroDivisionError" in played.warnings[-1]


def test_pings(play: Play, tmp_path: Path) -> None:
    """Begin and end are told, each while no lock of the run is held."""
    got: list[tuple[str, bool]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            runs = (tmp_path / "state" / "runs").glob("*/*.lock")
            got.append((self.path, any(map(locks.is_held, runs))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/x"
    try:
        assert play("", ATOMTX_PING_URL=url).status == 0
        assert play(FAILS, ATOMTX_PING_URL=url, ATOMTX_PING_EXIT_STATUS="1").status == 1
        # The run that was found interrupted is told by the backup's own pings alone.
        found = textwrap.dedent(FOUND.format(outcome="completed", reason=None))
        assert play(f"{found}\n{FAILS}", ATOMTX_PING_URL=url).status == 1
        assert play(BUSY, ATOMTX_PING_URL=url).status == 5
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    paths = ["/x/start", "/x", "/x/start", "/x/1", "/x/start", "/x/fail"]
    assert got == [(path, False) for path in paths]


def test_ping_unreachable(play: Play) -> None:
    """A server that is not there costs two warnings, begin and end, without its URL."""
    played = play("", ATOMTX_PING_URL="http://127.0.0.1:9/uuid-0123")
    assert played.status == 0
    assert (
        played.warnings
        == ["warning: not notified: ping: 127.0.0.1 was not told: Connection refused"] * 2
    )
    assert "uuid-0123" not in played.said


def test_nothing_loaded(play: Play) -> None:
    """Where nobody is to be told, nothing is loaded for it."""
    code = """
        import atexit
        atexit.register(lambda: print("atomtx.notifiers" in sys.modules, file=sys.stderr))
    """
    assert play(code, ATOMTX_NOTIFY_COMMAND="").said.endswith("False\n")
    assert play(f"{code}\n        {FAILS}").said.endswith("True\n")


@pytest.mark.parametrize("in_service", [True, False])
def test_service_stopped(play: Play, tmp_path: Path, in_service: bool) -> None:
    """A service that is stopped keeps its moment for the next start: that is no failure to tell."""
    code = """
        def advance(self, run):
            os.kill(os.getpid(), 15)
            return run
        Executor.advance = advance
    """
    later = {"ATOMTX_NOTIFY_LATER": "1"} if in_service else {}
    played = play(code, **later)
    assert played.status == 143
    assert bool(played.notices) is not in_service
    assert not list((tmp_path / "state" / "outbox").glob("*"))


@pytest.mark.parametrize(
    ("words", "warned"),
    [(("--stop", "--no-resume", "--job", "a"), 1), (("--job", "a"), 2), (("--config", ""), None)],
)
def test_broken_configuration(
    play: Play, tmp_path: Path, words: tuple[str, ...], warned: int | None
) -> None:
    """A configuration that is wrong keeps no service from its clean-up, unless it was named."""
    config = tmp_path / "atomtx.toml"
    config.write_text("[jobs.a\n")
    config.chmod(0o600)
    words = tuple(word or str(config) for word in words)
    played = play("", "recover", *words, ATOMTX_CONFIG=str(config))
    assert played.status == (2 if warned is None else 0)
    assert warned is None or len(played.warnings) == warned


TROUBLES = {
    "unsettled": """
        run = begun()
        def settle(self, run):
            raise WaitingError(f"run {run.id} waits: pool tank is not imported", hint="import it")
        Settler.settle = settle
    """,
    "parked": """
        run = begun()
        with Journal.open(statedir.find()) as journal:
            end(journal, run, "completed", "busy", parked=True)
        Settler.settle = lambda self, run: Settled(run, RollForward())
    """,
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize(
    ("result", "spoke", "letters"),
    [("exit-code", False, 0), ("success", True, 1), ("success", False, 1)],
)
def test_after_service(
    play: Play, tmp_path: Path, trouble: str, result: str, spoke: bool, letters: int
) -> None:
    """The clean-up after a service repeats none of its trouble, and hides none."""
    (tmp_path / "state").mkdir()
    if spoke:
        notice = notices.notice(Facts("nas", "home", datetime.now(UTC)), str)
        outbox.leave(tmp_path / "state", "1", NotifySettings(), notice, "abc")
    in_service = {"ATOMTX_NOTIFY_LATER": "1", "INVOCATION_ID": "abc", "SERVICE_RESULT": result}
    words = ("recover", "--stop", "--no-resume")
    assert play(TROUBLES[trouble], *words, **in_service).status != 0
    assert len(list(outbox.letters(tmp_path / "state"))) == letters


@pytest.mark.parametrize(("job", "warned"), [("home", False), ("old", False), ("hom", True)])
def test_unknown_job(play: Play, tmp_path: Path, job: str, warned: bool) -> None:
    """A name that is mistyped is not passed for a job with nothing to recover."""
    config = tmp_path / "atomtx.toml"
    config.write_text('[jobs.home]\nvolumes = ["tank/home"]\nclient = "restic"\n')
    config.chmod(0o600)
    code = """
        with Journal.open(statedir.prepare(statedir.find())) as journal:
            RunFolder.of(journal.state, RUN).make()
            end(journal, journal.begin(a_plan(job="job old"), []), "completed")
    """
    played = play(code, "recover", "--job", job, ATOMTX_CONFIG=str(config))
    expected = 'warning: no configuration and no run has a job "hom"; did you mean "home"?'
    assert played.status == 0
    assert played.warnings == ([expected] if warned else [])


@pytest.mark.parametrize(("stop", "left"), [((), 1), (("--stop",), 0)])
def test_before_network(play: Play, tmp_path: Path, stop: tuple[str, ...], left: int) -> None:
    """At boot what needs a network is left for the unit that waits for one."""
    url = tmp_path / "url"
    url.write_text("http://127.0.0.1:9/x\n")
    url.chmod(0o600)
    in_service = {"ATOMTX_NOTIFY_LATER": "1", "ATOMTX_PING_URL_FILE": str(url)}
    code = FOUND.format(outcome="rolled-back", reason=None)
    played = play(code, "recover", "--no-resume", *stop, **in_service)
    letters = outbox.letters(tmp_path / "state")
    assert sum(letter.settings.has_ping for letter in letters) == left
    assert sum("ping" in warning for warning in played.warnings) == 1 - left

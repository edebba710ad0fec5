"""The journal: what is in it is durable, fenced, complete, and only its own machine's."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError
from transitions import MachineError

from atomtx import database, journalfile, locks, plan, provenance, states, words
from atomtx import journal as journal_of_runs
from atomtx.clients import Backup, End
from atomtx.errors import (
    BusyError,
    JournalError,
    JournalFullError,
    JournalNewerError,
    StaleRunError,
    WaitingError,
)
from atomtx.intents import (
    DestroySnapshots,
    HoldSnapshots,
    MountVolumes,
    ReleaseSnapshots,
    RunClient,
    TakeSnapshots,
    UnmountVolumes,
)
from atomtx.journal import ActiveRunError, Journal, now_us
from atomtx.names import RunId
from atomtx.plan import Plan
from atomtx.records import Content, Run
from atomtx.statedir import RunFolder, prepare
from atomtx.states import Event, Outcome
from tests.runs import OTHER, RUN, a_plan

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return prepare(tmp_path / "state")


@pytest.fixture
def journal(state: Path) -> Iterator[Journal]:
    with Journal.open(state) as journal:
        yield journal


def begin(journal: Journal, the_plan: Plan | None = None) -> Run:
    the_plan = the_plan or a_plan()
    takes = [step for step in plan.intents(the_plan) if isinstance(step, TakeSnapshots)]
    return journal.begin(the_plan, takes)


def test_check_at_the_begin(journal: Journal) -> None:
    """What another run has begun is seen where a run is inserted, and then it is not begun."""
    first = begin(journal)
    seen: list[str] = []

    def check(there: Sequence[Run]) -> None:
        seen.extend(run.id for run in there)
        if len(there) > 1:
            raise BusyError("no")

    journal.begin(a_plan(run=OTHER, job="another"), [], check=check)
    with pytest.raises(BusyError):
        journal.begin(a_plan(run=RunId("2" * 16), job="a third"), [], check=check)
    assert seen == [first.id, first.id, OTHER]
    assert [run.id for run in journal.open_runs()] == [first.id, OTHER]


def fire(journal: Journal, run: Run, *events: Event) -> Run:
    for event in events:
        with journal.change(run) as change:
            if event is Event.GIVEN_UP:
                change.set(outcome="rolled-back", reason="why")
            change.fire(event)
        run = journal.load(run.id)
    return run


def destroy(journal: Journal, run: Run) -> Run:
    return fire(journal, run, Event.GIVEN_UP, Event.CLEANED_UP)


def park(journal: Journal, run: Run) -> Run:
    run = fire(journal, run, Event.GIVEN_UP)
    with journal.change(run) as change:
        change.set(cleanup="parked")
    return journal.load(run.id)


def query(journal: Journal, sql: str) -> list[tuple[object, ...]]:
    """Ask the file itself, over another connection."""
    connection = sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def pragma(journal: Journal, name: str) -> object:
    """Ask the journal's own connection: most settings are not the file's."""
    with journal._engine.connect() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()


# -- a run -----------------------------------------------------------------------------------


def test_begin(journal: Journal) -> None:
    """Promise 1: a run is in the journal, with its plan and its first intent, once it has begun."""
    before = now_us()
    run = begin(journal)
    assert (run.id, run.state, run.rev, run.attempts) == (RUN, states.PLANNED, 0, 0)
    assert run.plan == a_plan()
    assert before <= run.started_at <= now_us()
    assert (run.outcome, run.cleanup, run.reason, run.moment_at) == (None,) * 4
    assert [v.snapshot for v in run.volumes] == [v.snapshot for v in a_plan().volumes]
    assert {(v.guid, v.createtxg) for v in run.volumes} == {(None, None)}
    assert query(journal, "SELECT id, state FROM runs") == [(RUN, "planned")]


def test_compensations(journal: Journal) -> None:
    """Promise 10: each intent's undo is written with it, so that undoing needs no new row."""
    run = begin(journal)
    with journal.change(run) as change:
        change.attempt = 1
        change.intend(HoldSnapshots("tank", "11", ("tank/a@x",), "tag"))
        change.intend(MountVolumes("", plan.mounts(run.plan)))
    steps = journal.load(RUN).steps
    kinds = [type(step.intent) for step in steps]
    assert kinds == [
        *(TakeSnapshots, DestroySnapshots),
        *(HoldSnapshots, ReleaseSnapshots),
        *(MountVolumes, UnmountVolumes),
    ]
    for forward, undo in zip(steps[::2], steps[1::2], strict=True):
        assert undo.intent == forward.intent.compensation()
        assert (forward.compensates, undo.compensates) == (None, forward.id)
        assert (forward.outcome, undo.outcome) == (None, None)
        assert forward.attempt == undo.attempt
    assert [step.attempt for step in steps] == [0, 0, 1, 1, 1, 1]


def test_one_active_run(journal: Journal) -> None:
    """A job has one active run: another is refused, by name, and leaves no trace."""
    begin(journal)
    with pytest.raises(ActiveRunError, match=RUN) as caught:
        begin(journal, a_plan(run=OTHER))
    assert caught.value.run == RUN
    assert caught.value.exit_status == 5
    assert journal.known() == [RUN]
    assert query(journal, f"SELECT count(*) FROM volumes WHERE run = '{OTHER}'") == [(0,)]


def test_other_jobs(journal: Journal) -> None:
    """Runs of different jobs do not stand in each other's way."""
    begin(journal)
    begin(journal, a_plan("tank/c", run=OTHER, job="another"))
    assert [run.id for run in journal.open_runs()] == [RUN, OTHER]


@pytest.mark.parametrize("end", [park, destroy])
def test_not_blocking(journal: Journal, end: object) -> None:
    """Section 3: a parked run and one that has ended never block a new run of their job."""
    assert callable(end)
    end(journal, begin(journal))
    assert begin(journal, a_plan(run=OTHER)).state == states.PLANNED


def test_parked_is_open(journal: Journal) -> None:
    """A parked run stays among those that a recovery looks at; one that has ended does not."""
    park(journal, begin(journal))
    destroy(journal, begin(journal, a_plan(run=OTHER, job="another")))
    (run,) = journal.open_runs()
    assert (run.id, run.is_parked) == (RUN, True)
    assert set(journal.known()) == {RUN, OTHER}


def test_no_such_run(journal: Journal) -> None:
    """A run that is not there is an error that names it."""
    with pytest.raises(JournalError, match=f"no run {OTHER}"):
        journal.load(OTHER)


def test_identity(journal: Journal) -> None:
    """Promise 2: what was read back of a snapshot is kept whole; a guid may need 64 bits."""
    run = begin(journal)
    with journal.change(run) as change:
        change.identify({run.volumes[1].snapshot: (str(2**64 - 1), "28")})
        change.set(moment_at=5)
        change.fire(Event.SNAPSHOTS_TAKEN)
    run = journal.load(RUN)
    assert [(v.guid, v.createtxg) for v in run.volumes] == [(None, None), (str(2**64 - 1), "28")]
    assert (run.state, run.moment_at) == (states.SNAPSHOTTED, 5)


def test_half_an_identity(journal: Journal) -> None:
    """A guid without its transaction group is no proof and cannot be stored."""
    run = begin(journal)
    half = {run.volumes[0].snapshot: ("1", None)}
    with pytest.raises(IntegrityError), journal.change(run) as change:
        change.identify(half)  # type: ignore[arg-type]


def test_result(journal: Journal) -> None:
    """The client's result is kept: each backup, and the sums of what is known."""
    run = fire(journal, begin(journal), Event.SNAPSHOTS_TAKEN, Event.VOLUMES_MOUNTED)
    run = fire(journal, run, Event.CLIENT_STARTED)
    backups = (
        Backup(("/a", "/b"), Outcome.COMPLETED, "id1", None, 10, 100, 3),
        Backup(("/c",), Outcome.PARTIAL, "id2", "unreadable", None, 50, None),
    )
    with journal.change(run) as change:
        change.result(End(Outcome.PARTIAL, "unreadable", backups=backups))
        change.fire(Event.CLIENT_ENDED)
    run = journal.load(RUN)
    assert (run.state, run.outcome, run.reason) == ("unmounting", "partial", "unreadable")
    sums = "SELECT bytes_added, bytes_processed, files_processed FROM runs"
    assert query(journal, sums) == [(10, 150, 3)]
    rows = query(journal, "SELECT n, path, backup_id, outcome FROM backups ORDER BY n")
    assert rows == [(0, "/a\n/b", "id1", "completed"), (1, "/c", "id2", "partial")]


def test_moves(journal: Journal) -> None:
    """Each move is kept with its revision, in order, from `planned` to `destroyed`."""
    destroy(journal, begin(journal))
    rows = query(journal, "SELECT rev, event, source, dest FROM moves ORDER BY rev")
    assert rows == [
        (1, "given_up", "planned", "unmounting"),
        (2, "cleaned_up", "unmounting", "destroyed"),
    ]
    assert query(journal, "SELECT ended_at IS NOT NULL FROM runs") == [(1,)]


def test_outcome_of_a_step(journal: Journal) -> None:
    """An outcome is written once it is known; one that was parked is replaced later."""
    undo = begin(journal).steps[1]
    for outcome in ("parked", "done"):
        with journal.change(journal.load(RUN)) as change:
            change.ended(undo, outcome, "because")
        assert journal.load(RUN).steps[1].outcome == outcome
    assert journal.load(RUN).steps[0].outcome is None


def test_last_completed(journal: Journal) -> None:
    """What the last completed run of a job saw is found again, and no other run's."""
    assert journal.last_completed("job") is None
    run = begin(journal)
    with journal.change(run) as change:
        change.set(outcome="completed", moment_at=77)
        change.saw({"/tank/a": Content.FILES, "/tank/a/b": Content.EMPTY})
        change.result(End(Outcome.COMPLETED, backups=(Backup(("/a",), Outcome.COMPLETED, "id1"),)))
        change.fire(Event.GIVEN_UP)
    fire(journal, journal.load(RUN), Event.CLEANED_UP)
    destroy(journal, begin(journal, a_plan(run=OTHER)))
    seen = {"guid of tank/a": Content.FILES, "guid of tank/a/b": Content.EMPTY}
    assert journal.last_completed("job") == (seen, 77, ("id1",))
    assert journal.last_completed("another") is None
    there = run.plan.client
    assert journal.last_completed("job", client=there) == (seen, 77, ("id1",))
    replace = dataclasses.replace
    for elsewhere in (replace(there, repository="other"), replace(there, name="kopia")):
        assert journal.last_completed("job", client=elsewhere) is None


def complete_with_a_clock_ahead(journal: Journal, count: int) -> list[RunId]:
    """Complete *count* runs of a job; the first began 400 days ahead of the others."""
    ids = [RunId(f"{n:016x}") for n in range(count)]
    for n, run_id in enumerate(ids):
        destroy(journal, begin(journal, a_plan(run=run_id)))
        started = n if n else 400 * 86_400_000_000
        with journal._transaction() as connection:
            connection.exec_driver_sql(
                "UPDATE runs SET ended_at = 1, outcome = 'completed', moment_at = ?, "
                "started_at = ? WHERE id = ?",
                (started, started, run_id),
            )
    return ids


def test_last_completed_with_a_clock_ahead(journal: Journal) -> None:
    """Promise 7: one run with the clock ahead is the last one only until the next."""
    complete_with_a_clock_ahead(journal, 3)
    for of_kept in (False, True):
        last = journal.last_completed("job", of_kept=of_kept)
        assert last
        assert last[1] == 2


def test_adopt(journal: Journal) -> None:
    """A run of a lost journal enters this one by one commit, to be undone, and identified."""
    the_plan = a_plan()
    found = {v.snapshot: (f"9{n}", "5") for n, v in enumerate(the_plan.volumes)}
    before = journalfile.counter(journalfile.header(journal.path))
    run = journal.adopt(the_plan, found, plan.intents(the_plan))
    assert (run.state, run.outcome) == (states.UNMOUNTING, "rolled-back")
    assert [(v.guid, v.createtxg) for v in run.volumes] == [("90", "5"), ("91", "5")]
    assert query(journal, "SELECT rev, source, dest FROM moves") == [(1, "planned", "unmounting")]
    assert journalfile.counter(journalfile.header(journal.path)) == before + 1


@pytest.mark.parametrize("ended", [False, True])
def test_adopted_meanwhile(journal: Journal, *, ended: bool) -> None:
    """Who comes second is told, also where the first has ended it, and changes nothing."""
    the_plan = a_plan()
    found = {v.snapshot: (f"9{n}", "5") for n, v in enumerate(the_plan.volumes)}
    run = journal.adopt(the_plan, found, plan.intents(the_plan))
    if ended:
        with journal.change(run) as change:
            change.fire(Event.CLEANED_UP)
    before = journal.path.read_bytes()
    with pytest.raises(BusyError, match=f"run {RUN} was adopted by another command"):
        journal.adopt(the_plan, found, plan.intents(the_plan))
    assert journal.path.read_bytes() == before


# -- transactions ----------------------------------------------------------------------------


def overwrite(journal: Journal, run: Run, fact: Event = Event.GIVEN_UP) -> None:
    with journal.change(run) as change:
        change.set(attempts=9)
        change.ended(run.steps[0], "done")
        change.intend(RunClient("command", (("true",),), "/"))
        change.fire(fact)


def test_fencing(journal: Journal, state: Path) -> None:
    """Promise 6: who was overtaken gets an error, and nothing of what it wrote remains."""
    stale = begin(journal)
    with Journal.open(state) as other:
        fire(other, stale, Event.SNAPSHOTS_TAKEN)
    before = query(journal, "SELECT * FROM steps"), query(journal, "SELECT * FROM runs")
    with pytest.raises(StaleRunError, match=RUN):
        overwrite(journal, stale)
    with pytest.raises(StaleRunError), journal.change(stale) as change:
        change.set(reason="I was here")
    assert before == (query(journal, "SELECT * FROM steps"), query(journal, "SELECT * FROM runs"))
    assert query(journal, "SELECT count(*) FROM moves") == [(1,)]


def test_fencing_by_revision(journal: Journal) -> None:
    """A change without a move fences as well: the state alone may look the same."""
    stale = begin(journal)
    with journal.change(stale) as change:
        change.set(attempts=1)
    assert journal.load(RUN).state == stale.state
    with pytest.raises(StaleRunError), journal.change(stale) as change:
        change.set(attempts=2)
    assert journal.load(RUN).attempts == 1


def test_fencing_by_state(journal: Journal) -> None:
    """A run in another state than the journal's is refused, whatever its revision is."""
    run = begin(journal)
    forged = dataclasses.replace(run, state=states.SNAPSHOTTED)
    with pytest.raises(StaleRunError), journal.change(forged) as change:
        change.fire(Event.VOLUMES_MOUNTED)
    assert journal.load(RUN) == run


def test_forbidden_move(journal: Journal) -> None:
    """A move that is not in the table of states is refused, and nothing of the change stays."""
    run = begin(journal)
    with pytest.raises(MachineError):
        overwrite(journal, run, Event.CLIENT_ENDED)
    assert journal.load(RUN) == run


def test_failing_block(journal: Journal) -> None:
    """An error between two writes of a change takes both back."""
    run = begin(journal)

    def fail() -> None:
        with journal.change(run) as change:
            change.fire(Event.SNAPSHOTS_TAKEN)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert journal.load(RUN) == run


def test_failing_commit(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that fails leaves the state as it was, in the file and for the next change."""
    run = begin(journal)
    dialect = journal._engine.dialect

    def fail(_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(dialect, "do_commit", fail)
        with pytest.raises(JournalError, match="cannot be used"), journal.change(run) as change:
            change.fire(Event.SNAPSHOTS_TAKEN)
    assert query(journal, "SELECT state, rev FROM runs") == [("planned", 0)]
    assert fire(journal, run, Event.SNAPSHOTS_TAKEN).state == states.SNAPSHOTTED


def test_killed_in_a_change(journal: Journal, state: Path) -> None:
    """Promise 5: a process that is killed inside a change leaves the journal as it was before."""
    begin(journal)
    code = """
        import os, signal, sys
        from pathlib import Path
        from atomtx.journal import Journal
        from atomtx.states import Event
        journal = Journal.open(Path(sys.argv[1]))
        with journal.change(journal.load(sys.argv[2])) as change:
            change.fire(Event.SNAPSHOTS_TAKEN)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert python(code, str(state), RUN).returncode == -9
    assert journal.load(RUN).state == states.PLANNED
    assert query(journal, "PRAGMA integrity_check") == [("ok",)]


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a process of its own."""
    argv = [sys.executable, "-c", textwrap.dedent(code), *args]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)


# -- the file --------------------------------------------------------------------------------


def test_pragmas(journal: Journal) -> None:
    """Promise 10: the settings by which a commit survives a power cut are in effect."""
    assert pragma(journal, "journal_mode") == "persist"
    assert pragma(journal, "synchronous") == 3  # EXTRA
    assert pragma(journal, "foreign_keys") == 1
    assert pragma(journal, "user_version") == journalfile.SCHEMA_VERSION
    assert pragma(journal, "application_id") == journalfile.APPLICATION_ID


def test_foreign_keys(journal: Journal) -> None:
    """A step of no run cannot be written."""
    run = begin(journal)
    ghost = dataclasses.replace(run, id=OTHER)
    with pytest.raises(IntegrityError), journal.change(ghost) as change:
        change.intend(RunClient("command", (("true",),), "/"))


def test_mode(journal: Journal, state: Path) -> None:
    """The journal is for its owner's eyes only, and so is what SQLite keeps beside it."""
    begin(journal)
    assert {f.name for f in state.iterdir() if f.is_file()} == {
        *("journal.db", "journal.db-journal", "journal.lock"),
    }
    for file in (f for f in state.iterdir() if f.is_file()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_reopened(state: Path) -> None:
    """What was begun is found by the next process, and opening changes nothing of it."""
    with Journal.open(state) as journal:
        run = begin(journal)
    before = (state / journalfile.NAME).read_bytes()
    with Journal.open(state) as journal:
        assert journal.load(RUN) == run
    assert (state / journalfile.NAME).read_bytes() == before


def test_closed_twice(state: Path) -> None:
    """Closing is idempotent."""
    journal = Journal.open(state)
    journal.close()
    journal.close()


def make_newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {journalfile.SCHEMA_VERSION + 1}")
    connection.close()


def test_newer(state: Path) -> None:
    """Promise 13: a journal of a newer atomtx is refused with a clear message, and untouched."""
    with Journal.open(state) as journal:
        begin(journal)
    path = state / journalfile.NAME
    make_newer(path)
    before = path.read_bytes()
    with pytest.raises(JournalNewerError, match="newer atomtx") as caught:
        Journal.open(state)
    assert caught.value.exit_status == 2
    assert path.read_bytes() == before


def test_newer_meanwhile(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 13: also one that a newer atomtx upgraded while we waited for the lock."""
    path = state / journalfile.NAME
    Journal.open(state).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 0")
    connection.close()
    real = database._lock_for_upgrade

    def wait(path: Path, lock: int) -> bool:
        locked = real(path, lock)
        make_newer(path)
        return locked

    monkeypatch.setattr(database, "_lock_for_upgrade", wait)
    with pytest.raises(JournalNewerError):
        Journal.open(state)
    assert journalfile_version(path) == journalfile.SCHEMA_VERSION + 1


def journalfile_version(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[60:64], "big")


def test_not_a_journal(state: Path) -> None:
    """Somebody else's database is refused, untouched."""
    path = state / journalfile.NAME
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="not a journal of atomtx"):
        Journal.open(state)
    assert path.read_bytes() == before


def test_other_machine(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 2: a journal that was copied from another machine never acts here, and is left."""
    with Journal.open(state) as journal:
        begin(journal)
    path = state / journalfile.NAME
    before = path.read_bytes()
    monkeypatch.setattr(provenance, "machine_id", lambda: "another")
    with pytest.raises(JournalError, match="another machine"):
        Journal.open(state)
    assert path.read_bytes() == before


def test_machine_id() -> None:
    """The machine's id itself is confidential (machine-id(5)): a hash of it is stored."""
    hashed = provenance.machine_id()
    for source in ("/etc/machine-id", "/etc/hostid"):
        if os.path.exists(source):
            assert Path(source).read_text(errors="replace").strip() not in hashed
    assert len(hashed) in (0, 64)


def test_upgrade_waits(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 13: no journal is upgraded under another process that writes it."""
    monkeypatch.setattr(database, "UPGRADE_WAIT_S", 0.1)
    with Journal.open(state) as journal:
        begin(journal)
        connection = sqlite3.connect(journal.path)
        connection.execute("PRAGMA user_version = 0")
        connection.close()
        before = journal.path.read_bytes()
        with pytest.raises(WaitingError, match="must be upgraded"):
            Journal.open(state)
        assert journal.path.read_bytes() == before


def test_upgraded_by_another(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds an old journal that another process upgrades first goes on beside that process."""
    real = database._version
    seen: list[int] = []

    def version(engine: object) -> int:
        seen.append(real(engine) if seen else 0)  # type: ignore[arg-type]
        return seen[-1]

    with Journal.open(state) as first:
        begin(first)
        monkeypatch.setattr(database, "_version", version)
        with Journal.open(state) as second:
            assert second.load(RUN) == first.load(RUN)
    assert seen == [0, journalfile.SCHEMA_VERSION]


# -- forgetting ------------------------------------------------------------------------------


def test_expire(journal: Journal, state: Path) -> None:
    """Only runs that ended long ago are forgotten, with their folders; no open one ever is."""
    ids = [RunId(f"{n:016x}") for n in range(4)]
    for n, run_id in enumerate(ids):
        run = begin(journal, a_plan(run=run_id, job=f"job {n}"))
        (RunFolder.of(state, run_id).make().path / "client.log").write_text("words")
        if n < 2:
            destroy(journal, run)
    park(journal, journal.load(ids[3]))
    day_us = 86_400_000_000
    with journal._transaction() as connection:
        for run_id, age in ((ids[0], 31 * day_us), (ids[1], 29 * day_us)):
            connection.exec_driver_sql(
                "UPDATE runs SET ended_at = ? WHERE id = ?", (now_us() - age, run_id)
            )
    foreign = state / "runs" / "of-somebody-else"
    foreign.mkdir()
    os.utime(foreign, (1, 1))
    assert journal.expire(30 * 86_400) == 1
    assert set(journal.known()) == set(ids[1:])
    assert {path.name for path in (state / "runs").iterdir()} == {*ids[1:], "of-somebody-else"}
    for table in ("steps", "volumes", "moves", "backups"):
        assert query(journal, f"SELECT count(*) FROM {table} WHERE run = '{ids[0]}'") == [(0,)]
    assert query(journal, f"SELECT count(*) > 0 FROM steps WHERE run = '{ids[1]}'") == [(1,)]
    assert journal.expire(30 * 86_400) == 0


@pytest.mark.parametrize("keep_s", [words.seconds("10000y"), 1e17])
def test_expire_keeps_all(journal: Journal, keep_s: float) -> None:
    """A time that began before any clock keeps everything."""
    destroy(journal, begin(journal))
    assert journal.expire(keep_s) == 0
    assert RUN in journal.known()


def test_expire_is_killed(journal: Journal, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is forgotten after its files, so that one that was killed in between finds them."""
    destroy(journal, begin(journal))
    folder = RunFolder.of(state, RUN).make()
    folder.reserve_end()
    rmtree = shutil.rmtree

    def killed(path: Path, **_: object) -> None:
        rmtree(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.expire(-1)
    monkeypatch.undo()
    assert list(journal.known()) == [RUN]
    assert journal.expire(-1) == 1
    assert not folder.path.exists()


def test_expire_by_parts(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait no longer than a part of them takes; the oldest go first."""
    ids = [RunId(f"{n:016x}") for n in range(3)]
    for run_id in ids:
        destroy(journal, begin(journal, a_plan(run=run_id)))
    monkeypatch.setattr(journal_of_runs, "_AT_ONCE", 2)
    assert [journal.expire(-1) for _ in range(3)] == [2, 1, 0]


def test_expire_spares(journal: Journal) -> None:
    """The last completed run of a job stays, for its volumes that were not empty, and one more."""
    ids = [RunId(f"{n:016x}") for n in range(4)]
    for n, (run_id, job) in enumerate(zip(ids, ("job a", "job a", "job a", "job b"), strict=True)):
        destroy(journal, begin(journal, a_plan(run=run_id, job=job)))
        outcome = "failed" if n == 2 else "completed"
        with journal._transaction() as connection:
            connection.exec_driver_sql(
                "UPDATE runs SET ended_at = 1, moment_at = 1, started_at = ?, outcome = ? "
                "WHERE id = ?",
                (n, outcome, run_id),
            )
    assert journal.expire(0) == 1
    assert set(journal.known()) == {ids[1], ids[2], ids[3]}


@pytest.mark.parametrize(
    ("outcomes", "left"),
    [
        (["completed"] * 3, [1, 2]),
        (["completed", "failed", "failed"], [0, 2]),
        (["failed", "completed"], [0, 1]),
        (["completed"], [0]),
        (["failed", "failed"], []),
    ],
)
@pytest.mark.parametrize("is_of_kept", [False, True])
def test_expire_spares_two(
    journal: Journal, outcomes: list[str], left: list[int], is_of_kept: bool
) -> None:
    """A job that ran twice is known to have: its last completed run stays, and one beside it."""
    ids = [RunId(f"{n:016x}") for n in range(len(outcomes))]
    for n, (run_id, outcome) in enumerate(zip(ids, outcomes, strict=True)):
        destroy(journal, begin(journal, a_plan(run=run_id, job="job a")))
        with journal._transaction() as connection:
            connection.exec_driver_sql(
                "UPDATE runs SET ended_at = 1, moment_at = 1, started_at = ?, outcome = ? "
                "WHERE id = ?",
                (n, outcome, run_id),
            )
    if is_of_kept:
        with journal._transaction() as connection:
            connection.exec_driver_sql("UPDATE volumes SET snapshot = 'tank/a@kept'")
    journal.expire(0)
    assert set(journal.known()) == {ids[n] for n in left}


def test_expire_with_a_clock_ahead(journal: Journal) -> None:
    """The last run that tells what was not empty is spared, not one with the clock ahead."""
    ids = complete_with_a_clock_ahead(journal, 4)
    with journal._transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE volumes SET snapshot = 'tank/a@kept' WHERE run >= ?", (ids[2],)
        )
    assert journal.expire(0) == 1
    assert set(journal.known()) == set(ids[1:])


def test_sweep(journal: Journal, state: Path) -> None:
    """
    The folder of a run that never began is removed after a while.

    Not one in which a runner was at work: it is of a journal that was set aside, or lost, and
    may have the only record of how a client ended.  Nor one that a living front end holds.
    """
    never, used, held, young = (RunFolder.of(state, f"{n:016x}").make() for n in range(4))
    used.reserve_end()
    for folder in (never, used, held):
        os.utime(folder.path, (1, 1))
    with locks.acquired(held.front_lock):
        journal.expire(1)
    there = {path.name for path in (state / "runs").iterdir()}
    assert there == {folder.path.name for folder in (used, held, young)}
    journal.expire(1)
    assert not held.path.exists()


def test_sweep_spares_what_is_foreign(journal: Journal, state: Path) -> None:
    """Promise 2: what is no folder of a run stays, however old it is, and stops no backup."""
    runs = state / "runs"
    for name in ("lost+found", "0123456789ABCDEF", "0123456789abcdef0"):
        (runs / name).mkdir()
    (runs / "notes").write_text("mine")
    (runs / f"{1:016x}").write_text("mine")
    (runs / f"{2:016x}").symlink_to(runs / "lost+found")
    for path in runs.iterdir():
        os.utime(path, (1, 1), follow_symlinks=False)
    there = sorted(runs.iterdir())
    journal.expire(1)
    assert sorted(runs.iterdir()) == there


def test_number_of_a_forgotten_step(journal: Journal, state: Path) -> None:
    """SQLite gives the number of a deleted row again: the step of a new run is its own."""
    old = begin(journal)
    with Journal.open(state) as other:  # as another process does
        destroy(other, other.load(RUN))
        assert other.expire(-1) == 1
    new = begin(journal, a_plan("tank/c", run=OTHER))
    assert [step.id for step in new.steps] == [step.id for step in old.steps]
    assert new.steps[0].intent == plan.intents(new.plan)[0]


# -- a full disk (promise 10) ----------------------------------------------------------------


def free_bytes(journal: Journal) -> int:
    count, size = pragma(journal, "freelist_count"), pragma(journal, "page_size")
    assert isinstance(count, int)
    assert isinstance(size, int)
    return count * size


def test_reserve(journal: Journal) -> None:
    """Free pages are kept in the file; no table of it is left."""
    assert free_bytes(journal) >= database.RESERVE_BYTES
    assert query(journal, "SELECT name FROM sqlite_master WHERE name = 'reserve'") == []


@pytest.mark.parametrize("filled", [False, True])
def test_killed_while_reserving(state: Path, filled: bool) -> None:
    """Promise 5: a kill between the two halves of the reserve does not lock the journal."""
    with Journal.open(state) as journal, journal._transaction() as connection:
        connection.exec_driver_sql("CREATE TABLE reserve (space BLOB)")
        if filled:
            connection.exec_driver_sql("INSERT INTO reserve VALUES (zeroblob(100000))")
    with Journal.open(state) as journal:
        run = begin(journal)
        assert free_bytes(journal) > 0
        assert destroy(journal, run).state == states.DESTROYED


def test_no_page_left(journal: Journal) -> None:
    """A journal that cannot grow says that it is full, and keeps what it had."""
    run = begin(journal)
    pages = pragma(journal, "page_count")
    pragma(journal, f"max_page_count = {pages}")
    with pytest.raises(JournalFullError, match="no space left"), journal.change(run) as change:
        change.intend(RunClient("command", (("x" * 1_000_000,),), "/"))
    assert journal.load(RUN) == run


_FULL = """
    import os, sys
    from pathlib import Path
    from atomtx import journal as journal_module
    from atomtx import plan, statedir
    from atomtx.errors import JournalFullError
    from atomtx.intents import MountVolumes, RunClient, TakeSnapshots
    from atomtx.journal import Journal
    from atomtx.mounts import namespace
    from atomtx.names import RunId
    from atomtx.states import Event, Outcome
    from atomtx.clients import End
    from tests.runs import RUN, a_plan

    namespace.enter()
    namespace.mount("full", sys.argv[1], "tmpfs", 0, "size=1m")
    state = statedir.prepare(Path(sys.argv[1]) / "state")
    if sys.argv[2] == "no reserve":
        journal_module.reserve = lambda engine, path: None
    journal = Journal.open(state)
    names = [f"tank/a{n}" for n in range(100)]
    the_plan = a_plan(*names)
    run = journal.begin(the_plan, [plan.intents(the_plan)[0]])
    with journal.change(run) as change:
        change.fire(Event.SNAPSHOTS_TAKEN)
    run = journal.load(RUN)
    with journal.change(run) as change:
        change.intend(MountVolumes("", plan.mounts(the_plan)))
        change.intend(RunClient("restic", (("restic",),), "/"))
        change.fire(Event.VOLUMES_MOUNTED)
    with open(f"{sys.argv[1]}/fill", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    # To its last byte: what is left of a page cannot be had by another file.
    assert os.statvfs(sys.argv[1]).f_bfree == 0
    refused = False
    try:
        for _ in range(1000):  # until what was reserved is used up
            run = journal.load(RUN)
            with journal.change(run) as change:
                change.intend(RunClient("restic", (("x" * 60000,),), "/"))
    except JournalFullError as exc:
        refused = True
    print("refused" if refused else "never refused")
    run = journal.load(RUN)
    with journal.change(run) as change:
        change.set(outcome="failed", reason="no space left on device " * 8)
        for step in run.pending(RunClient):
            change.ended(step, "failed", "no space left on device " * 8)
        change.fire(Event.GIVEN_UP, reason="no space left on device " * 8)
    run = journal.load(RUN)
    with journal.change(run) as change:
        for step in run.steps:
            if step.outcome is None:
                change.ended(step, "done")
        change.fire(Event.CLEANED_UP)
    print(journal.load(RUN).state)
    journal.close()
    with Journal.open(state) as journal:
        print(journal.load(RUN).state)
"""


@root_only
def test_full_disk(tmp_path: Path) -> None:
    """
    Promise 10: on a disk that is full to its last byte a run can still be given up and ended.

    A large new row is refused as "full", and the reserve still has room for the undo's outcome.
    """
    done = python(_FULL, str(tmp_path), "reserve")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["refused", "destroyed", "destroyed", ""]


@root_only
def test_full_disk_without_reserve(tmp_path: Path) -> None:
    """It is the reserve that makes the difference: without it the same undo finds no room."""
    done = python(_FULL, str(tmp_path), "no reserve")
    assert done.returncode != 0
    assert done.stdout == "refused\n"
    assert "JournalFullError" in done.stderr


# -- several processes -----------------------------------------------------------------------

_RACE = """
    import sys
    from pathlib import Path
    from atomtx import plan
    from atomtx.intents import TakeSnapshots
    from atomtx.journal import Journal
    from atomtx.names import RunId
    from tests.runs import a_plan

    sys.stdin.read()  # until all are ready
    n = int(sys.argv[2])
    with Journal.open(Path(sys.argv[1])) as journal:
        the_plan = a_plan(run=RunId(f"{n:016x}"), job=f"job {n}")
        journal.begin(the_plan, [plan.intents(the_plan)[0]])
"""


def test_empty_journal_opened_by_several(state: Path) -> None:
    """Six processes that open an empty journal at once all get the same one and write to it."""
    argv = [sys.executable, "-c", textwrap.dedent(_RACE), str(state)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen(
            [*argv, str(n)], env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(6)
    ]
    for child in children:
        assert child.stdin
        child.stdin.close()
        child.stdin = None
    said = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0] * 6, said
    with Journal.open(state) as journal:
        assert len(journal.open_runs()) == 6
        assert query(journal, "SELECT count(*) FROM journals") == [(1,)]
        assert query(journal, "PRAGMA integrity_check") == [("ok",)]


def test_one_process_writes_at_a_time(journal: Journal, state: Path) -> None:
    """A change waits for another process's change instead of failing."""
    begin(journal)
    begin(journal, a_plan(run=OTHER, job="another"))
    code = """
        import sys
        from pathlib import Path
        from atomtx.journal import Journal
        with Journal.open(Path(sys.argv[1])) as journal:
            print("open", flush=True)
            for _ in range(20):
                with journal.change(journal.load(sys.argv[2])) as change:
                    change.set(attempts=1)
    """
    argv = [sys.executable, "-c", textwrap.dedent(code), str(state), OTHER]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        child.stdout.readline()
        for _ in range(20):
            with journal.change(journal.load(RUN)) as change:
                change.set(attempts=1)
    assert child.returncode == 0
    assert (journal.load(RUN).rev, journal.load(OTHER).rev) == (20, 20)


def test_copy_is_whole(journal: Journal, tmp_path: Path) -> None:
    """A journal that is closed is one file: a copy of it alone has everything."""
    begin(journal)
    journal.close()
    shutil.copy(journal.path, tmp_path / "copy.db")
    connection = sqlite3.connect(tmp_path / "copy.db")
    assert connection.execute("SELECT id FROM runs").fetchall() == [(RUN,)]
    connection.close()

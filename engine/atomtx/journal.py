"""
The journal: the only module that writes to the database.

SQLite with `journal_mode=PERSIST` and `synchronous=EXTRA`: an acknowledged commit survives a
power cut (FULL, Python's default, loses the last one; WAL with NORMAL loses all since the last
checkpoint).  Each change of a run is one transaction, begun with BEGIN IMMEDIATE and fenced by
the run's state and revision: a process that was overtaken gets :class:`StaleRunError`.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    select,
    text,
    true,
    update,
)

from . import aside, journalfile, locks, plan, provenance
from .clients import Backup, End
from .database import bring_up_to_date, reserve, set_damaged_aside, translated
from .errors import BusyError, JournalDamagedError, JournalError, StaleRunError
from .intents import Intent, from_json
from .journalfile import HeaderFile
from .names import ZFS
from .plan import ClientPlan, Plan
from .records import Content, Run, Step, Volume
from .schema import backups, journals, moves, runs, steps, volumes
from .statedir import RunFolder, sweep
from .states import FINAL, PLANNED, Event, StateMachine, Verb

_IS_WHOLE = (runs.c.outcome == "completed") & runs.c.moment_at.is_not(None)
_IS_COMPLETED_BACKUP = (runs.c.verb == Verb.BACKUP.value) & (runs.c.outcome == "completed")
_ROW: ColumnElement[int] = literal_column(
    "runs.rowid"
)  # in the order in which they were begun, whatever the clock
_AT_ONCE = 500  # runs to forget while others wait for the journal
_PARENT = func.json_extract(runs.c.plan, "$.parent")
# What a backup takes itself has the run's token in its name.
_IS_OF_KEPT = (runs.c.verb == Verb.BACKUP.value) & exists().where(
    volumes.c.run == runs.c.id,
    volumes.c.n == 0,
    volumes.c.kind == ZFS,
    ~volumes.c.snapshot.endswith(runs.c.id),
)


def now_us() -> int:
    """Return the time as the journal stores it."""
    return time.time_ns() // 1000


class ActiveRunError(BusyError):
    """The job has an active run already: *run* is its id, and *whose* it is."""

    def __init__(self, run: str, whose: str = "this job") -> None:
        super().__init__(
            f"run {run} of {whose} is at work",
            hint="`atomtx status` shows it; --wait waits for its end",
        )
        self.run = run


class NoRunError(JournalError):
    """There is no such run, or it has ended and was forgotten a moment ago."""


class Journal:
    """
    An open journal, brought up to date; holds the writers' lock, shared, until closed.

    Where a `with` block on it ends because the journal is damaged, it is set aside.
    """

    def __init__(
        self, path: Path, engine: Engine, lock: int, header: HeaderFile, *, keep: bool
    ) -> None:
        self.path = path
        self.state = path.parent
        self._engine = engine
        self._lock = lock
        self._keep = keep
        self._header = header
        self._watermark: provenance.Watermark | None = None
        self._follows_another = False
        self._machine = StateMachine(_persist)
        self._plans: dict[str, Plan] = {}
        # A step's intent never changes; SQLite may give its number again once it was forgotten.
        self._intents: dict[tuple[str, int], Intent] = {}

    @classmethod
    def open(cls, state: Path, *, keep: bool = False) -> Journal:
        """
        Open the journal of a state directory; make or upgrade it where needed.

        Raises JournalNewerError for one that a newer atomtx wrote, JournalOlderError for one that
        was rolled back, JournalError for one that belongs to another machine: none is touched.
        JournalDamagedError for one that is damaged: unless *keep*, it is set aside.
        """
        path = state / journalfile.NAME
        try:
            return cls._open(path, keep)
        except JournalDamagedError as exc:
            if keep:
                raise
            raise set_damaged_aside(exc, path) from exc

    @classmethod
    def _open(cls, path: Path, keep: bool) -> Journal:
        journalfile.check(path)
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        with ExitStack() as on_error, translated(path):
            lock = os.open(path.with_name(journalfile.LOCK), flags, 0o600)
            on_error.callback(os.close, lock)
            engine = bring_up_to_date(path, lock)
            on_error.callback(engine.dispose)
            header = HeaderFile(path)
            on_error.callback(header.close)
            journal = cls(path, engine, lock, header, keep=keep)
            journal._prove()
            reserve(engine, path)
            on_error.pop_all()
        return journal

    def close(self) -> None:
        """Close the database and give up the lock; idempotent."""
        self._engine.dispose()
        self._header.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        self.close()
        if isinstance(exc, JournalDamagedError) and not self._keep:
            raise set_damaged_aside(exc, self.path) from exc

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with translated(self.path), self._engine.begin() as connection:
            if self._watermark:
                # No other process writes now, and we have not yet: it is the last commit's.
                self._watermark.note(journalfile.counter(self._header.read()))
            yield connection

    def _prove(self) -> None:
        """See that this journal may act here; write in a new one which it is."""
        with self._transaction() as connection:
            row = connection.execute(select(journals)).one_or_none()
            if row is None:
                values = {"uuid": str(uuid.uuid4()), "machine_id": provenance.machine_id()}
                connection.execute(insert(journals).values(values | {"created_at": now_us()}))
                row = connection.execute(select(journals)).one()
                self._follows_another = provenance.knows_any(self.state)
            counter = journalfile.counter(self._header.read())
            watermark = provenance.prove(self.path, row.uuid, row.machine_id, counter)
        watermark.note(counter)
        self._watermark = watermark

    def notes(self) -> list[str]:
        """Return what the user should know about this journal and those beside it."""
        assert self._watermark
        anew = "a new journal was begun; `atomtx recover --scan` lists what the one before left"
        return [
            *([anew] if self._follows_another else []),
            *aside.notes(self.state),
            *self._watermark.trouble(),
        ]

    # -- reading ---------------------------------------------------------------------------

    def load(self, run: str) -> Run:
        """Return a run; NoRunError where there is none."""
        with self._transaction() as connection:
            return self._find(connection, run)

    def open_runs(self) -> list[Run]:
        """Return every run that has not ended, the oldest first."""
        with self._transaction() as connection:
            return self._open_runs(connection)

    def children(self, run: Run, step: int | None = None) -> list[Run]:
        """
        Return the runs that the steps of *run* have made, or one of them, the oldest first.

        By the order of their rows, whatever the clock was set to meanwhile.
        """
        parent = f"{run.id}/%" if step is None else f"{run.id}/{step}"
        number: ColumnElement[int] = literal_column("runs.rowid")
        begun = text("(SELECT rowid FROM runs AS parents WHERE parents.id = :parent)")
        query = (
            select(runs)
            .where(number > begun.bindparams(parent=run.id), _PARENT.like(parent))
            .order_by(number)
        )
        with self._transaction() as connection:
            return [self._read(connection, row) for row in connection.execute(query).all()]

    def last_completed(
        self, job: str, *, of_kept: bool = False, client: ClientPlan | None = None
    ) -> tuple[dict[str, Content], int, tuple[str, ...]] | None:
        """
        Return what the job's last completed run saw; None where there is none.

        The last is the one that was begun last, whatever the clock was set to.  It tells what
        each dataset's guid held, the moment (microseconds), the ids of its backups.  A run that
        read snapshots which were kept tells nothing of how things are since: only *of_kept*
        counts it too.  Of a *client*, only what was saved by it into that repository counts.
        """
        query = (
            select(runs.c.id, runs.c.moment_at)
            .where(runs.c.job == job, _IS_WHOLE, true() if of_kept else ~_IS_OF_KEPT)
            .order_by(_ROW.desc())
            .limit(1)
        )
        if client:
            is_there = runs.c.repository == client.repository
            query = query.where(runs.c.client == client.name, is_there)
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            seen = select(volumes.c.guid, volumes.c.is_empty).where(volumes.c.run == row.id)
            ids = select(backups.c.backup_id).where(
                backups.c.run == row.id, backups.c.backup_id.is_not(None)
            )
            contents = {v.guid: Content(v.is_empty or 0) for v in connection.execute(seen)}
            return contents, row.moment_at, tuple(connection.scalars(ids.order_by(backups.c.n)))

    def contents(self, run: str) -> dict[str, Content]:
        """Return what a run saw at each mountpoint."""
        query = select(volumes.c.mountpoint, volumes.c.is_empty).where(
            volumes.c.run == run, volumes.c.is_empty.is_not(None)
        )
        with self._transaction() as connection:
            return {v.mountpoint: Content(v.is_empty) for v in connection.execute(query)}

    def _find(self, connection: Connection, run: str) -> Run:
        row = connection.execute(select(runs).where(runs.c.id == run)).one_or_none()
        if row is None:
            raise NoRunError(f"no run {run} in {self.path}", hint="see `atomtx history`")
        return self._read(connection, row)

    def _open_runs(self, connection: Connection) -> list[Run]:
        query = select(runs).where(runs.c.ended_at.is_(None)).order_by(runs.c.started_at)
        return [self._read(connection, row) for row in connection.execute(query).all()]

    def _read(self, connection: Connection, row: Row[Any]) -> Run:
        vols = select(volumes).where(volumes.c.run == row.id).order_by(volumes.c.n)
        todo = select(steps).where(steps.c.run == row.id).order_by(steps.c.id)
        return Run(
            id=row.id,
            job=row.job,
            label=row.label,
            state=row.state,
            rev=row.rev,
            outcome=row.outcome,
            cleanup=row.cleanup,
            reason=row.reason,
            attempts=row.attempts,
            plan=self._plan(row),
            moment_at=row.moment_at,
            started_at=row.started_at,
            boot_id=row.boot_id,
            pid=row.pid,
            volumes=tuple(_volume(v, self._plan(row)) for v in connection.execute(vols)),
            steps=tuple(self._step(s) for s in connection.execute(todo)),
        )

    def _plan(self, row: Row[Any]) -> Plan:
        """Return a run's plan; kept, as it is long for a thousand datasets."""
        if row.id not in self._plans:
            self._plans[row.id] = plan.from_json(row.plan)
        return self._plans[row.id]

    def _step(self, row: Row[Any]) -> Step:
        key = (row.run, row.id)
        if key not in self._intents:
            self._intents[key] = from_json(row.kind, row.payload)
        intent = self._intents[key]
        return Step(row.id, row.attempt, intent, row.compensates, row.outcome, row.detail)

    # -- writing ---------------------------------------------------------------------------

    def begin(
        self,
        the_plan: Plan,
        intents: Sequence[Intent],
        *,
        check: Callable[[Sequence[Run]], None] | None = None,
    ) -> Run:
        """
        Insert a run in state `planned` with its first intents; it is durable on return.

        Raises ActiveRunError where the job has an active run, and what *check* raises: it gets all
        open runs in the transaction that inserts, so that no other run is begun in between.
        """
        row = _row(the_plan)
        with self._transaction() as connection:
            if check:
                check(self._open_runs(connection))
            _begin(connection, the_plan, row, intents)
        return self.load(the_plan.run)

    def adopt(
        self, the_plan: Plan, found: Mapping[str, tuple[str, str]], intents: Sequence[Intent]
    ) -> Run:
        """
        Insert a run of a lost journal in state `unmounting`, its snapshots to be destroyed.

        *found* gives guid and createtxg by snapshot.  Raises BusyError where it was adopted
        meanwhile.  In one transaction: in `planned`, it would be resumed without its client.
        """
        row = _row(the_plan)
        with self._transaction() as connection:
            if connection.scalar(select(runs.c.id).where(runs.c.id == the_plan.run)):
                raise BusyError(f"run {the_plan.run} was adopted by another command")
            _begin(connection, the_plan, row, intents)
            change = Change(connection, self._find(connection, the_plan.run), self._machine)
            change.identify(found)
            change.set(outcome="rolled-back", reason="adopted: its journal was lost")
            change.fire(Event.GIVEN_UP, reason="adopted")
        return self.load(the_plan.run)

    def known(self) -> list[str]:
        """Return the id of every run in this journal."""
        with self._transaction() as connection:
            return list(connection.scalars(select(runs.c.id)))

    @contextmanager
    def change(self, run: Run) -> Iterator[Change]:
        """
        Change a run in one transaction, fenced by its revision; durable when the block ends.

        Raises StaleRunError, and changes nothing, where somebody else moved the run.
        """
        with self._transaction() as connection:
            change = Change(connection, run, self._machine)
            yield change
            change.finish()

    def replan(self, run: Run, the_plan: Plan) -> Run:
        """Give a run a plan with the same effects, such as one that finds credentials elsewhere."""
        with self.change(run) as change:
            change.set(plan=plan.to_json(the_plan))
        self._plans.pop(run.id, None)
        return self.load(run.id)

    def expire(self, keep_s: float) -> int:
        """
        Forget runs that ended over *keep_s* seconds ago, with their files; return how many.

        No more than are forgotten while others wait for the journal; the rest is for later calls.

        One whose front end is yet to tell its result stays, and so does the last completed one of
        each job: it knows which volumes were not empty (promise 7).  One more beside it does, where
        there was one: that the job is made again and again is known by it alone, and that it is
        late.  So do those of the steps of a run that is open: by them it is known which steps are
        done.
        """
        before = max(now_us() - int(keep_s * 1e6), 0)  # SQLite has 64 bits
        whole = _IS_WHOLE & ~_IS_OF_KEPT
        last = select(func.max(_ROW)).where(whole).group_by(runs.c.job)
        old = (runs.c.ended_at < before) & _ROW.not_in(last) & ~_is_of_two()
        with self._transaction() as connection:
            at_work = select(runs.c.id).where(
                runs.c.verb == Verb.RUN.value, runs.c.ended_at.is_(None)
            )
            if parents := connection.scalars(at_work).all():
                of = func.coalesce(func.substr(_PARENT, 1, func.length(runs.c.id)), "")
                old &= of.not_in(parents)
            found = connection.scalars(
                select(runs.c.id).where(old).order_by(runs.c.started_at).limit(_AT_ONCE)
            )
            ids = [r for r in found if not locks.is_held(RunFolder.of(self.state, r).front_lock)]
            for run in ids:  # first: the row is what a later call finds its folder by
                shutil.rmtree(RunFolder.of(self.state, run).path, ignore_errors=True)
            if ids:
                connection.execute(runs.delete().where(runs.c.id.in_(ids)))
        sweep(self.state, self.known())
        return len(ids)


def _is_of_two() -> ColumnElement[bool]:
    """Return what holds for the last completed backup of a job, and for the newest beside it."""
    completed = select(func.max(_ROW)).where(_IS_COMPLETED_BACKUP).group_by(runs.c.job)
    jobs = select(runs.c.job).where(_IS_COMPLETED_BACKUP)
    is_beside = (runs.c.verb == Verb.BACKUP.value) & runs.c.job.in_(jobs) & _ROW.not_in(completed)
    beside = select(func.max(_ROW)).where(is_beside).group_by(runs.c.job)
    return _ROW.in_(completed) | _ROW.in_(beside)


class Change:
    """What one transaction does to one run."""

    def __init__(self, connection: Connection, run: Run, machine: StateMachine) -> None:
        self._connection = connection
        self._run = run
        self._machine = machine
        self.attempt = run.attempts  # of the intents that this change writes
        self._values: dict[str, Any] = {}
        self._written = False

    def set(self, **columns: Any) -> None:
        """Set columns of the run's row."""
        self._values.update(columns)

    def fire(self, fact: Event, *, reason: str | None = None) -> None:
        """Move the run; once a transaction, after everything else was set."""
        verb = self._run.verb
        self._machine.fire(fact, self._run.state, verb=verb, change=self, reason=reason)

    def intend(self, intent: Intent) -> None:
        """Write an intent together with its compensation."""
        _intend(self._connection, self._run.id, self.attempt, intent)

    def ended(self, step: Step, outcome: str, detail: str | None = None) -> None:
        """Write a step's outcome; a later one replaces "parked"."""
        self._connection.execute(
            update(steps)
            .where(steps.c.id == step.id)
            .values(outcome=outcome, ended_at=now_us(), detail=detail)
        )

    def identify(self, identities: Mapping[str, tuple[str, str]]) -> None:
        """Write the guid and createtxg that were read back, by snapshot; at least one."""
        self._update_volumes(
            {"at": v.n, "snapshot_guid": guid, "createtxg": createtxg}
            for v in self._run.volumes
            if v.snapshot in identities
            for guid, createtxg in [identities[v.snapshot]]
        )

    def saw(self, contents: Mapping[str, Content]) -> None:
        """Write what was seen at each mountpoint."""
        self._update_volumes(
            {"at": v.n, "is_empty": int(contents[v.mountpoint])} for v in self._run.volumes
        )

    def _update_volumes(self, rows: Iterable[Mapping[str, Any]]) -> None:
        values = list(rows)
        columns: dict[str, Any] = {n: bindparam(n) for n in values[0] if n != "at"}
        where = (volumes.c.run == self._run.id) & (volumes.c.n == bindparam("at"))
        self._connection.execute(update(volumes).where(where).values(columns), values)

    def result(self, end: End) -> None:
        """Write how the client's work ended, and each backup that it made."""
        self.set(
            outcome=end.outcome.value,
            reason=end.reason,
            bytes_added=_total(b.bytes_added for b in end.backups),
            bytes_processed=_total(b.bytes_processed for b in end.backups),
            files_processed=_total(b.files_processed for b in end.backups),
        )
        self._connection.execute(backups.delete().where(backups.c.run == self._run.id))
        for n, backup in enumerate(end.backups):
            self._connection.execute(insert(backups).values(_backup_row(self._run.id, n, backup)))

    def move(self, fact: str, dest: str, reason: str | None) -> None:
        """Write the move; called by the state machine once it has allowed it."""
        if dest in FINAL:
            self._values.setdefault("ended_at", now_us())
        self._write(state=dest)
        self._connection.execute(
            insert(moves).values(
                run=self._run.id,
                rev=self._run.rev + 1,
                at=now_us(),
                event=fact,
                source=self._run.state,
                dest=dest,
                reason=reason,
            )
        )

    def finish(self) -> None:
        """Write what was set where no move did."""
        if not self._written:
            self._write()

    def _write(self, **columns: Any) -> None:
        assert not self._written, "one move a transaction"
        self._written = True
        fence = (
            (runs.c.id == self._run.id)
            & (runs.c.state == self._run.state)
            & (runs.c.rev == self._run.rev)
        )
        values = self._values | columns | {"rev": self._run.rev + 1}
        if self._connection.execute(update(runs).where(fence).values(values)).rowcount != 1:
            raise StaleRunError(
                f"run {self._run.id} was moved by another process",
                hint="see `atomtx status`",
            )


def _active(connection: Connection, job: str) -> str | None:
    query = select(runs.c.id).where(
        runs.c.job == job, runs.c.ended_at.is_(None), runs.c.cleanup.is_(None)
    )
    return connection.scalars(query).first()


def _persist(event_data: Any) -> None:
    """`before_state_change`: the move is allowed; write it, or stop it by an exception."""
    change: Change = event_data.kwargs["change"]
    change.move(event_data.event.name, event_data.transition.dest, event_data.kwargs.get("reason"))


def _row(the_plan: Plan) -> dict[str, Any]:
    """Return a new run's row; what it asks the machine is not the journal's to report."""
    return {
        "id": the_plan.run,
        "verb": the_plan.verb,
        "job": the_plan.job,
        "label": the_plan.label,
        "state": PLANNED,
        "rev": 0,
        "attempts": 0,
        "plan": plan.to_json(the_plan),
        "client": the_plan.client.name,
        "repository": the_plan.client.repository,
        "started_at": now_us(),
        "boot_id": locks.boot_id(),
        "pid": os.getpid(),
    }


def _begin(
    connection: Connection, the_plan: Plan, row: Mapping[str, Any], intents: Iterable[Intent]
) -> None:
    # In the transaction that inserts: it may end between a refused row and a look at it.
    active = _active(connection, the_plan.job)
    if active is not None:
        raise ActiveRunError(active)
    connection.execute(insert(runs).values(row))
    if rows := _volume_rows(the_plan):
        connection.execute(insert(volumes), rows)
    for intent in intents:
        _intend(connection, the_plan.run, 0, intent)


def _intend(connection: Connection, run: str, attempt: int, intent: Intent) -> None:
    values = {"run": run, "attempt": attempt, "intended_at": now_us()}
    forward = insert(steps).values(values | {"kind": intent.kind, "payload": intent.to_json()})
    number = connection.execute(forward).inserted_primary_key[0]  # type: ignore[index]
    undo = intent.compensation()
    if undo is not None:
        row = {"kind": undo.kind, "payload": undo.to_json(), "compensates": number}
        connection.execute(insert(steps).values(values | row))


def _volume_rows(the_plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "run": the_plan.run,
            "n": n,
            "kind": v.kind,
            "pool": v.pool,
            "pool_guid": v.pool_guid,
            "name": v.name,
            "guid": v.guid,
            "mountpoint": v.mountpoint,
            "snapshot": v.snapshot,
            "snapshot_guid": v.existing and v.existing.guid,
            "createtxg": v.existing and v.existing.createtxg,
        }
        for n, v in enumerate(the_plan.volumes)
    ]


def _backup_row(run: str, n: int, backup: Backup) -> dict[str, Any]:
    return {
        "run": run,
        "n": n,
        "path": "\n".join(backup.paths),
        "backup_id": backup.backup_id,
        "outcome": backup.outcome.value,
        "reason": backup.reason,
        "bytes_added": backup.bytes_added,
        "bytes_processed": backup.bytes_processed,
        "files_processed": backup.files_processed,
    }


def _total(numbers: Iterator[int | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return sum(known) if known else None


def _volume(row: Row[Any], of: Plan) -> Volume:
    return Volume(
        n=row.n,
        kind=row.kind,
        pool=row.pool,
        pool_guid=row.pool_guid,
        name=row.name,
        mountpoint=row.mountpoint,
        snapshot=row.snapshot,
        guid=row.snapshot_guid,
        createtxg=row.createtxg,
        stays=of.volumes[row.n].existing is not None,
    )

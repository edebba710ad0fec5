"""
Read the journal, for people: quickly, and without standing in a writer's way.

Only the standard library is imported: `history` and `status` must not pay for SQLAlchemy.  Each
function opens the journal, fetches everything it needs and closes it before it returns, because
a commit in SQLite's rollback mode waits for an open reader.  A journal that does not exist yet
is an empty one.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from . import journalfile
from .errors import ExitStatus, UserError

BUSY_TIMEOUT_MS = 5_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PREFIX = re.compile(r"[0-9a-f]{1,16}")


@dataclass(frozen=True)
class Run:
    """One run, without its plan; the times are aware, in UTC."""

    id: str
    job: str
    label: str
    state: str
    outcome: str | None  # None until the client's end is known
    cleanup: str | None  # "parked" where something could not be removed now
    reason: str | None
    attempts: int
    client: str
    repository: str | None
    moment_at: datetime | None
    started_at: datetime
    ended_at: datetime | None
    boot_id: str
    pid: int
    bytes_added: int | None
    bytes_processed: int | None
    files_processed: int | None
    backup_ids: tuple[str, ...]

    @property
    def is_final(self) -> bool:
        return self.state == "destroyed"

    @property
    def is_parked(self) -> bool:
        return self.cleanup is not None

    @property
    def duration_s(self) -> float | None:
        """Seconds from its first intent to its end; None while it is open."""
        return (self.ended_at - self.started_at).total_seconds() if self.ended_at else None

    def to_dict(self) -> dict[str, Any]:
        """Return it for a program."""
        # Not asdict(), which copies deeply: seconds for 100,000 runs.
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"duration_s": self.duration_s}

    @property
    def exit_status(self) -> ExitStatus:
        """What `atomtx backup` exits with for a run that ended like this one."""
        if self.outcome == "partial":
            return ExitStatus.PARTIAL
        if self.outcome == "completed":
            return ExitStatus.PARKED if self.is_parked else ExitStatus.COMPLETED
        ended = self.outcome or self.is_final or self.is_parked
        return ExitStatus.FAILED if ended else ExitStatus.WAITING


@dataclass(frozen=True)
class Step:
    """An intent and its outcome: "done", "failed", "not-needed", "parked", or None so far."""

    id: int
    attempt: int
    kind: str
    payload: str
    compensates: int | None
    intended_at: datetime
    ended_at: datetime | None
    outcome: str | None
    detail: str | None

    def describe(self) -> str:
        """Say in words what was intended; the kind alone where this release lacks it."""
        from .intents import from_json

        try:
            return from_json(self.kind, self.payload).describe()
        except (KeyError, TypeError, ValueError):  # another release's intent
            return self.kind


@dataclass(frozen=True)
class Move:
    """A transition."""

    rev: int
    at: datetime
    event: str
    source: str
    dest: str
    reason: str | None


@dataclass(frozen=True)
class Backup:
    """What the repository holds of a run."""

    n: int
    path: str  # what was backed up; paths joined by newlines
    backup_id: str | None
    outcome: str
    reason: str | None
    bytes_added: int | None
    bytes_processed: int | None
    files_processed: int | None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.path.split("\n"))


@dataclass(frozen=True)
class Volume:
    """A volume of a run; its identity is None until it was read back."""

    n: int
    kind: str
    pool: str
    pool_guid: str
    name: str
    guid: str
    mountpoint: str
    snapshot: str
    snapshot_guid: str | None
    createtxg: str | None
    is_empty: int | None


@dataclass(frozen=True)
class Job:
    """
    The runs of one job, as people know it: its name, or one label, client, repository and command.

    Not one key, which changes with the datasets that a `-r` or `-a` comes to.
    """

    label: str
    client: str
    repository: str | None
    keys: frozenset[str]
    times: int  # how many runs
    newest: Run
    ended: Run | None  # the newest with an outcome
    completed: Run | None  # the newest that completed
    open: tuple[Run, ...]

    @property
    def name(self) -> str:
        """Return the label, with the repository that tells jobs of one label apart."""
        return f"{self.label} ({self.client} {(self.repository or '')[:8]}".rstrip() + ")"


_IDS = (
    "(SELECT group_concat(backup_id, char(10)) FROM "
    "(SELECT backup_id FROM backups WHERE run = runs.id ORDER BY n)) AS backup_ids"
)
_RUN_COLUMNS = ", ".join([f.name for f in fields(Run) if f.name != "backup_ids"] + [_IDS])
_NOT_WELL = (
    "(outcome IN ('failed', 'partial', 'rolled-back') OR cleanup IS NOT NULL "
    "OR (state = 'destroyed' AND outcome IS NULL))"
)
_OPEN = f"SELECT {_RUN_COLUMNS} FROM runs WHERE state <> 'destroyed' ORDER BY started_at, rowid"
# The order in which runs were begun is that of their rows, whatever the clock was set to.
_KEYS = """
    SELECT job, label, client, repository, count(*) AS times, max(rowid) AS newest,
        max(CASE WHEN outcome IS NOT NULL OR state = 'destroyed' THEN rowid END) AS ended,
        max(CASE WHEN outcome = 'completed' THEN rowid END) AS completed
    FROM runs GROUP BY job, label, client, repository
"""
# A plan may be long, and is read once a key.
_COMMAND = """
    CASE client WHEN 'command' THEN (
        SELECT CASE WHEN json_valid(plan) THEN json_extract(plan, '$.client.command') END
        FROM runs WHERE rowid = newest
    ) END
"""
# A job of the configuration is one job, to whatever repository its backups go.
_JOBS = f"""
    SELECT label, sum(times) AS times, group_concat(DISTINCT job) AS keys,
        max(newest) AS newest, max(ended) AS ended, max(completed) AS completed
    FROM (SELECT *, {_COMMAND} AS command FROM ({_KEYS}))
    GROUP BY CASE WHEN job LIKE 'job %' THEN job
        ELSE json_array(label, client, repository, command) END
"""


def runs(
    path: Path, *, limit: int | None = None, failed_only: bool = False, job: str | None = None
) -> list[Run]:
    """
    Return runs, the newest first.

    *failed_only*: those that failed, saved only a part, were rolled back or are parked.
    *job*: a job's key, or its label.
    """
    conditions = [_NOT_WELL] if failed_only else []
    if job is not None:
        conditions.append("(job = :job OR label = :job)")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    query = (
        f"SELECT {_RUN_COLUMNS} FROM runs {where} ORDER BY started_at DESC, rowid DESC LIMIT :limit"
    )
    rows = _fetch(path, query, {"job": job, "limit": -1 if limit is None else limit})
    return [_run(row) for row in rows]


def open_runs(path: Path) -> list[Run]:
    """Return every run that has not reached its final state, the oldest first."""
    return [_run(row) for row in _fetch(path, _OPEN, {})]


def jobs(path: Path) -> list[Job]:
    """Return every job that ran, with those of its runs that tell how it is; by label."""
    query = (
        f"WITH jobs AS ({_JOBS}) SELECT {_RUN_COLUMNS}, runs.rowid AS n FROM runs WHERE rowid IN "
        "(SELECT newest FROM jobs UNION SELECT ended FROM jobs UNION SELECT completed FROM jobs)"
    )
    told, rows, unfinished = _fetch_all(path, f"{_JOBS} ORDER BY label, newest", query, _OPEN)
    found = {row["n"]: _run(row) for row in rows}
    return [_job(row, found, [_run(each) for each in unfinished]) for row in told]


def _job(row: sqlite3.Row, found: dict[int, Run], unfinished: list[Run]) -> Job:
    keys = frozenset(row["keys"].split(","))
    newest = found[row["newest"]]
    return Job(
        label=row["label"],
        client=newest.client,
        repository=newest.repository,
        keys=keys,
        times=row["times"],
        newest=newest,
        ended=found.get(row["ended"]),
        completed=found.get(row["completed"]),
        open=tuple(r for r in unfinished if r.label == row["label"] and r.job in keys),
    )


def last_moment(path: Path, job: str) -> datetime | None:
    """Return the moment of a job's last completed backup; *job* is its key."""
    query = (
        "SELECT coalesce(moment_at, started_at) AS at FROM runs "
        "WHERE job = :job AND outcome = 'completed' ORDER BY rowid DESC LIMIT 1"
    )
    rows = _fetch(path, query, {"job": job})
    return _time(rows[0]["at"]) if rows else None


def run(path: Path, id_prefix: str) -> Run:
    """
    Return the one run whose id begins with *id_prefix*; "atomtx-" before it is ignored.

    Raises UserError where there is none, or more than one.
    """
    prefix = id_prefix.strip().lower().removeprefix("atomtx-")
    hint = "`atomtx history` lists the runs"
    if not _PREFIX.fullmatch(prefix):
        raise UserError(f"{id_prefix!r} is not a run id, nor the beginning of one", hint=hint)
    query = f"SELECT {_RUN_COLUMNS} FROM runs WHERE id >= :p AND id < :p || 'g' ORDER BY id LIMIT 3"
    found = [_run(row) for row in _fetch(path, query, {"p": prefix})]
    if not found:
        raise UserError(f"no run has an id that begins with {prefix!r}", hint=hint)
    if len(found) > 1:
        ids = ", ".join(run.id for run in found[:2])
        more = " and others" if len(found) > 2 else ""
        raise UserError(f"several runs begin with {prefix!r}: {ids}{more}", hint="give more digits")
    return found[0]


def plan(path: Path, run_id: str) -> str:
    """Return the plan of a run as it was journaled, for plan.from_json; it holds no secret."""
    rows = _fetch(path, "SELECT plan FROM runs WHERE id = :run", {"run": run_id})
    return str(rows[0]["plan"]) if rows else "{}"


def steps(path: Path, run_id: str) -> list[Step]:
    """Return every intent of a run with its outcome, in the order they were written."""
    return [_filled(Step, row) for row in _of_run(path, Step, "steps", run_id, order="id")]


def moves(path: Path, run_id: str) -> list[Move]:
    """Return the transitions of a run, in order."""
    return [_filled(Move, row) for row in _of_run(path, Move, "moves", run_id, order="rev")]


def backups(path: Path, run_id: str) -> list[Backup]:
    """Return the backups that a run made, or should have."""
    return [_filled(Backup, row) for row in _of_run(path, Backup, "backups", run_id, order="n")]


def volumes(path: Path, run_id: str) -> list[Volume]:
    """Return the volumes of a run, parents before children."""
    return [_filled(Volume, row) for row in _of_run(path, Volume, "volumes", run_id, order="n")]


def _of_run(path: Path, cls: type, table: str, run_id: str, *, order: str) -> list[sqlite3.Row]:
    columns = ", ".join(f.name for f in fields(cls))
    query = f"SELECT {columns} FROM {table} WHERE run = :run ORDER BY {order}"
    return _fetch(path, query, {"run": run_id})


def _run(row: sqlite3.Row) -> Run:
    values = _values(row)
    values.pop("n", None)
    ids = values.pop("backup_ids")
    return Run(**values, backup_ids=tuple(ids.split("\n")) if ids else ())


def _filled(cls: type[Any], row: sqlite3.Row) -> Any:
    return cls(**_values(row))


def _values(row: sqlite3.Row) -> dict[str, Any]:
    return {
        name: _time(row[name]) if name == "at" or name.endswith("_at") else row[name]
        for name in row.keys()  # noqa: SIM118  (a Row iterates over its values)
    }


def _time(value: int | None) -> datetime | None:
    return None if value is None else _EPOCH + timedelta(microseconds=value)


def _fetch(path: Path, query: str, values: dict[str, Any]) -> list[sqlite3.Row]:
    """Run one query and return all rows; nothing stays open."""
    if not journalfile.check(path):
        return []
    with _translated(path), closing(_connect(path)) as connection:
        return connection.execute(query, values).fetchall()


def _fetch_all(path: Path, *queries: str) -> list[list[sqlite3.Row]]:
    """Run several queries on the journal as it is at one instant; nothing stays open."""
    if not journalfile.check(path):
        return [[] for _ in queries]
    with _translated(path), closing(_connect(path)) as connection:
        connection.execute("BEGIN")
        return [connection.execute(query).fetchall() for query in queries]


def _connect(path: Path) -> sqlite3.Connection:
    # Not mode=ro: after a kill -9 the journal is hot, and a read-only connection cannot roll it
    # back (SQLITE_READONLY_ROLLBACK).
    connection = sqlite3.connect(
        journalfile.uri(path, "rw"), uri=True, timeout=BUSY_TIMEOUT_MS / 1000
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA query_only=ON")
    return connection


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as exc:
        raise journalfile.read_error(path, exc) from exc

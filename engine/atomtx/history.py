"""
Read the journal, for people: quickly, and without standing in a writer's way.

Only the standard library is imported: `history` and `status` must not pay for SQLAlchemy.  Each
function opens the journal, fetches everything it needs and closes it before it returns, because
a commit in SQLite's rollback mode waits for an open reader.  A journal that does not exist yet
is an empty one.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import journalfile, redact
from .errors import UserError
from .records import Content
from .states import Verb

if TYPE_CHECKING:
    from .intents import Intent

# A commit of another run waits for its fsync, on a disk that is being filled.
BUSY_TIMEOUT_MS = 30_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PREFIX = re.compile(r"[0-9a-f]{1,16}")
_NEWEST = ("last", "latest")  # no digits of an id
_HINT = "`atomtx history` lists the runs"


@dataclass(frozen=True)
class Run:
    """One run, without its plan; the times are aware, in UTC."""

    id: str
    verb: str
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
    not_a_moment: tuple[str, ...]  # the mountpoints of what was read live
    parent: str | None = None  # "RUN/N": the run, and its step, that it was made by
    failed_after: bool = False  # completed, but a step after it failed: a hook, or the retention

    @property
    def is_final(self) -> bool:
        return self.ended_at is not None

    @property
    def is_parked(self) -> bool:
        return self.cleanup is not None

    @property
    def of_run(self) -> str:
        """Return the id of the run whose step has made it; empty: none."""
        return (self.parent or "").partition("/")[0]

    @property
    def duration_s(self) -> float | None:
        """Seconds from its first intent to its end; None while it is open."""
        return (self.ended_at - self.started_at).total_seconds() if self.ended_at else None

    def to_dict(self) -> dict[str, Any]:
        """Return it for a program."""
        # Not asdict(), which copies deeply: seconds for 100,000 runs.
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"duration_s": self.duration_s}


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

    def intent(self) -> Intent | None:
        """Return what was intended; None for another release's intent, which this one lacks."""
        from .intents import from_json

        try:
            return from_json(self.kind, self.payload)
        except (KeyError, TypeError, ValueError):
            return None

    def describe(self) -> str:
        """Say in words what was intended; the kind alone where this release lacks it."""
        intent = self.intent()
        return intent.describe() if intent else self.kind


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
    is_empty: int | None  # 1, 0, or None until it was mounted


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
    completed: Run | None  # the newest that completed, or that of the newest kept snapshots
    open: tuple[Run, ...]

    @property
    def name(self) -> str:
        """Return the label, with the repository that tells jobs of one label apart."""
        return f"{self.label} ({self.client} {(self.repository or '')[:8]}".rstrip() + ")"


_IDS = (
    "(SELECT group_concat(backup_id, char(10)) FROM "
    "(SELECT backup_id FROM backups WHERE run = runs.id ORDER BY n)) AS backup_ids"
)
_LIVE = (
    "(SELECT group_concat(mountpoint, char(10)) FROM "
    "(SELECT mountpoint FROM volumes WHERE run = runs.id AND kind = 'plain' ORDER BY n)) "
    "AS not_a_moment"
)
# A plan may be long: most say in a word that they have none.
_PARENT = (
    'CASE WHEN instr(plan, \'"parent": "\') AND NOT instr(plan, \'"parent": ""\') '
    "AND json_valid(plan) THEN json_extract(plan, '$.parent') END AS parent"
)
_IS_TRANSIENT = (
    "CASE WHEN json_valid(plan) THEN json_extract(plan, '$.transient') END AS is_transient"
)
_ON_STOP = "CASE WHEN json_valid(plan) THEN json_extract(plan, '$.on_stop') END AS on_stop"
# A repository that has an id is known by that alone.
_CLIENT = (
    "CASE WHEN repository IS NULL AND json_valid(plan) THEN json_extract(plan, '$.client') END "
    "AS planned"
)
_MAX_INTEGER = 2**63 - 1  # https://www.sqlite.org/datatype3.html
_LISTS = ("backup_ids", "not_a_moment")
# The others of a run that completed have not failed.
_FAILED_AFTER = (
    "(outcome = 'completed' AND EXISTS (SELECT 1 FROM steps WHERE run = runs.id "
    "AND steps.outcome = 'failed' AND kind IN ('run-hook', 'undo-hook', 'apply-retention')))"
)
_MADE = ("parent", "failed_after")
_RUN_COLUMNS = ", ".join(
    [f.name for f in fields(Run) if f.name not in (*_LISTS, *_MADE)]
    + [_IDS, _LIVE, _PARENT, f"{_FAILED_AFTER} AS failed_after"]
)
_NOT_WELL = (
    f"(outcome IN ('failed', 'partial', 'rolled-back') OR cleanup IS NOT NULL OR {_FAILED_AFTER} "
    "OR (ended_at IS NOT NULL AND outcome IS NULL))"
)
_SAVED = "verb = 'backup' AND outcome IN ('completed', 'partial')"
_OPEN = f"SELECT {_RUN_COLUMNS} FROM runs WHERE ended_at IS NULL ORDER BY started_at, rowid"
# What a backup takes itself has the run's token in its name.
_OF_KEPT = (
    "EXISTS (SELECT 1 FROM volumes WHERE run = runs.id AND n = 0 AND kind = 'zfs' "
    "AND snapshot NOT LIKE '%' || runs.id)"
)
# The order in which runs were begun is that of their rows, whatever the clock was set to.  Runs
# of snapshots that were kept come after, and are of before: they are an order of their own.
_KEYS = f"""
    SELECT job, label, client, repository, count(*) AS times, max(rowid) AS newest,
        max(CASE WHEN outcome IS NOT NULL OR ended_at IS NOT NULL THEN rowid END) AS ended,
        max(CASE WHEN outcome = 'completed' AND NOT {_OF_KEPT} THEN rowid END) AS completed,
        max(CASE WHEN outcome = 'completed' AND {_OF_KEPT} THEN rowid END) AS of_kept
    FROM runs WHERE verb = 'backup' GROUP BY job, label, client, repository
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
        max(newest) AS newest, max(ended) AS ended, max(completed) AS completed,
        max(of_kept) AS of_kept
    FROM (SELECT *, {_COMMAND} AS command FROM ({_KEYS}))
    GROUP BY CASE WHEN job LIKE 'job %' THEN job
        ELSE json_array(label, client, repository, command) END
"""


def runs(
    path: Path,
    *,
    limit: int | None = None,
    failed_only: bool = False,
    saved_only: bool = False,
    job: str | None = None,
) -> list[Run]:
    """
    Return runs, the newest first: the one that was begun last, whatever the clock was.

    *failed_only*: those that failed, saved only a part, were rolled back or are parked, and those
    after which a step failed.
    *saved_only*: backups that completed or are partial.
    *job*: a job's key, or its label.
    """
    conditions = [_NOT_WELL] if failed_only else []
    conditions += [_SAVED] if saved_only else []
    if job is not None:
        conditions.append("(job = :job OR label = :job)")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    query = f"SELECT {_RUN_COLUMNS} FROM runs {where} ORDER BY rowid DESC LIMIT :limit"
    count = -1 if limit is None else min(limit, _MAX_INTEGER)
    rows = _fetch(path, query, {"job": job, "limit": count})
    return [_run(row) for row in rows]


def open_runs(path: Path) -> list[Run]:
    """Return every run that has not reached its final state, the oldest first."""
    return [_run(row) for row in _fetch(path, _OPEN, {})]


def children(path: Path, run_id: str) -> list[Run]:
    """Return the runs that the steps of a run have made, the oldest first."""
    query = (
        f"SELECT * FROM (SELECT {_RUN_COLUMNS}, rowid AS n FROM runs WHERE rowid > "
        "(SELECT rowid FROM runs WHERE id = :run)) WHERE parent LIKE :run || '/%' ORDER BY n"
    )
    return [_run(row) for row in _fetch(path, query, {"run": run_id})]


def is_kept(path: Path, run: Run) -> bool:
    """
    Tell whether a run is open, not parked, and one that SIGTERM leaves for later.

    Or the run whose step has made it, or one that a step of it has made.
    """
    query = (
        f"SELECT id FROM (SELECT id, {_PARENT}, {_ON_STOP} FROM runs WHERE ended_at IS NULL "
        "AND cleanup IS NULL) WHERE on_stop = 'keep' "
        "AND (id IN (:run, :whole) OR parent LIKE :run || '/%')"
    )
    return bool(_fetch(path, query, {"run": run.id, "whole": run.of_run}))


def jobs(path: Path) -> list[Job]:
    """Return every job that ran, with those of its runs that tell how it is; by label."""
    query = (
        f"WITH jobs AS ({_JOBS}) SELECT {_RUN_COLUMNS}, runs.rowid AS n FROM runs WHERE rowid IN "
        "(SELECT newest FROM jobs UNION SELECT ended FROM jobs UNION SELECT completed FROM jobs "
        "UNION SELECT of_kept FROM jobs)"
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
        completed=_fresher(found.get(row["completed"]), found.get(row["of_kept"])),
        open=tuple(r for r in unfinished if _is_of(r, row["label"], keys)),
    )


def _is_of(run: Run, label: str, keys: frozenset[str]) -> bool:
    """Tell whether a run is a backup of a job, or carries out its steps."""
    if run.verb == Verb.RUN:
        return run.job.removeprefix("run ") in keys
    return run.label == label and run.job in keys


def _fresher(one: Run | None, of_kept: Run | None) -> Run | None:
    there = [run for run in (one, of_kept) if run]
    return max(there, key=lambda run: run.moment_at or run.started_at, default=None)


def last_moment(path: Path, job: str) -> datetime | None:
    """Return the moment of a job's last completed backup; *job* is its key."""
    last = (
        "SELECT * FROM (SELECT coalesce(moment_at, started_at) AS at FROM runs "
        "WHERE job = :job AND outcome = 'completed' AND {} ORDER BY rowid DESC LIMIT 1)"
    )
    both = f"{last.format(_OF_KEPT)} UNION ALL {last.format('NOT ' + _OF_KEPT)}"
    rows = _fetch(path, f"SELECT max(at) AS at FROM ({both})", {"job": job})
    return _time(rows[0]["at"]) if rows else None


@dataclass(frozen=True)
class Store:
    """
    Where backups go: a repository, or where none has an id a job and how its client is run.

    An argument or a variable may name another disk.  A job without a name is whoever types it: its
    key changes with the datasets that a `-r` comes to.
    """

    repository: str | None
    client: str
    job: str = ""  # of one of the configuration, its key
    words: str = ""  # what the client is run with that may tell it where, as JSON


def store_of(job: str, client: Mapping[str, Any]) -> Store:
    """Return where the backups of a job go; *client* is what its plan has of the client."""
    repository, name = client.get("repository"), client.get("name", "")
    if repository is not None:
        return Store(repository, "")
    named = job if job.startswith("job ") else ""
    words = {key: client.get(key) for key in ("command", "extra", "cwd", "credentials")}
    words = {key: value for key, value in words.items() if value}
    variables = [pair for pair in client.get("environment", ()) if redact.tells_where(pair[0])]
    return Store(None, name, named, json.dumps([words, variables], sort_keys=True))


class Snap(NamedTuple):
    """A run that takes kept snapshots."""

    is_open: bool
    is_transient: bool  # they are meant to go again
    of_open: str = ""  # the run of steps that it is of, and that is still to go on after it


class Taken(NamedTuple):
    """A moment that a step of a run has kept: what there is of ZFS."""

    name: str  # of each snapshot, behind the "@"
    is_transient: bool
    guids: dict[str, str]  # of its snapshots, by their datasets


def saved(path: Path, store: Store, *, partial: bool = False) -> dict[str, tuple[str, ...]]:
    """
    Return by its guid each ZFS snapshot that a completed backup into a store read.

    With the ids of the runs, the oldest first; *partial* counts partial backups as well.  The
    journal alone is asked: what was forgotten there since is not known.
    """
    found: dict[str, list[str]] = {}
    for row in _saved(path, store, partial=partial):
        found.setdefault(row["guid"], []).append(row["run"])
    return {guid: tuple(runs) for guid, runs in found.items()}


def snaps(path: Path, *, within: str = "") -> dict[str, Snap]:
    """
    Return what the journal knows of runs that take kept snapshots, by their ids.

    *within* is the run of steps of which the caller is one: that is not told as open.
    """
    query = f"""
        SELECT snaps.id, is_open, is_transient, whole.id AS of_open
        FROM (
            SELECT id, ended_at IS NULL AS is_open, {_IS_TRANSIENT}, {_PARENT}
            FROM runs WHERE verb = 'snap'
        ) AS snaps
        LEFT JOIN runs AS whole ON whole.id = substr(parent, 1, instr(parent, '/') - 1)
            AND whole.ended_at IS NULL AND whole.id != :within
    """
    return {
        row["id"]: Snap(bool(row["is_open"]), bool(row["is_transient"]), row["of_open"] or "")
        for row in _fetch(path, query, {"within": within})
    }


def taken(path: Path, run: str) -> list[Taken]:
    """Return the moments that the steps of a run have kept by now, the oldest first."""
    query = f"""
        SELECT * FROM (
            SELECT runs.rowid AS n, runs.id AS run, {_IS_TRANSIENT}, {_PARENT},
                volumes.name AS dataset, volumes.snapshot, volumes.snapshot_guid AS guid
            FROM runs JOIN volumes ON volumes.run = runs.id
            WHERE runs.rowid > (SELECT rowid FROM runs WHERE id = :run)
                AND runs.verb = 'snap' AND runs.outcome IN ('completed', 'partial')
                AND volumes.kind = 'zfs' AND volumes.snapshot_guid IS NOT NULL
        ) WHERE parent LIKE :run || '/%' ORDER BY n
    """
    found: dict[str, Taken] = {}
    for row in _fetch(path, query, {"run": run}):
        name = row["snapshot"].partition("@")[2]
        moment = found.setdefault(row["run"], Taken(name, bool(row["is_transient"]), {}))
        moment.guids[row["dataset"]] = row["guid"]
    return list(found.values())


def saved_by(path: Path, job: str) -> frozenset[str]:
    """
    Return the guids of the ZFS snapshots that completed backups of a job read; *job* is its key.

    Into the store of the newest of its backups alone: what was saved elsewhere, before the job
    was changed, is not saved where its backups are now.  The journal alone is asked, as by
    `saved`: what it has forgotten is not saved.
    """
    store = _store_of(path, job)
    rows = _saved(path, store, job=job) if store else []
    return frozenset(row["guid"] for row in rows)


def _store_of(path: Path, job: str) -> Store | None:
    query = f"""
        SELECT job, repository, client, {_CLIENT}
        FROM runs WHERE verb = 'backup' AND job = :job ORDER BY rowid DESC LIMIT 1
    """
    rows = _fetch(path, query, {"job": job})
    return _store(rows[0]) if rows else None


def _store(row: sqlite3.Row) -> Store:
    told = {"name": row["client"], "repository": row["repository"]}
    return store_of(row["job"], json.loads(row["planned"] or "{}") | told)


def _saved(
    path: Path,
    store: Store,
    *,
    partial: bool = False,
    job: str | None = None,
) -> list[sqlite3.Row]:
    """Return the guids that were read, and by which runs: these are chosen first, each once."""
    query = f"""
        SELECT id, job, repository, client, {_CLIENT} FROM runs
        WHERE verb = 'backup' AND (outcome = 'completed' OR (:partial AND outcome = 'partial'))
            AND (:job IS NULL OR job = :job)
            AND repository IS :repository AND (repository IS NOT NULL OR client = :client)
    """
    values = {
        "partial": partial,
        "job": job,
        "repository": store.repository,
        "client": store.client,
    }
    rows = _fetch(path, query, values)
    if store.repository is None:
        rows = [row for row in rows if row["planned"] and _store(row) == store]
    # One that was forgotten since has no volumes any more.
    of_runs = """
        SELECT volumes.snapshot_guid AS guid, runs.id AS run
        FROM runs JOIN volumes ON volumes.run = runs.id
        WHERE runs.id IN (SELECT value FROM json_each(:runs))
            AND volumes.kind = 'zfs' AND volumes.snapshot_guid IS NOT NULL
        ORDER BY runs.rowid
    """
    return _fetch(path, of_runs, {"runs": json.dumps([row["id"] for row in rows])})


def chosen(path: Path, text: str, *, saved_only: bool = False) -> Run:
    """
    Return the run to read that *text* names: as :func:`run` does, or ``last``, the newest.

    ``latest`` is the same.  *saved_only*: the newest backup that completed or is partial.  Not
    for what changes a run: the newest may be another one by then.  Raises UserError where there
    is none.
    """
    if text.strip().lower() not in _NEWEST:
        return run(path, text)
    found = runs(path, limit=1, saved_only=saved_only)
    if not found:
        what = "no backup has saved anything yet" if saved_only else "nothing ran yet"
        raise UserError(f"there is no {text.strip()} run: {what}", hint=_HINT)
    return found[0]


def run(path: Path, id_prefix: str) -> Run:
    """
    Return the one run whose id begins with *id_prefix*; "atomtx-" before it is ignored.

    Raises UserError where there is none, or more than one.
    """
    prefix = id_prefix.strip().lower().removeprefix("atomtx-")
    if not _PREFIX.fullmatch(prefix):
        raise UserError(f"{id_prefix!r} is not a run id, nor the beginning of one", hint=_HINT)
    query = f"SELECT {_RUN_COLUMNS} FROM runs WHERE id >= :p AND id < :p || 'g' ORDER BY id LIMIT 3"
    found = [_run(row) for row in _fetch(path, query, {"p": prefix})]
    if not found:
        raise UserError(f"no run has an id that begins with {prefix!r}", hint=_HINT)
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
    rows = _of_run(path, Volume, "volumes", run_id, order="n")
    return [_with_content(_filled(Volume, row)) for row in rows]


def _with_content(volume: Volume) -> Volume:
    """Return a volume with whether it was empty in the place of what it held."""
    if volume.is_empty is None:
        return volume
    return replace(volume, is_empty=int(Content(volume.is_empty).is_empty))


def _of_run(path: Path, cls: type, table: str, run_id: str, *, order: str) -> list[sqlite3.Row]:
    columns = ", ".join(f.name for f in fields(cls))
    query = f"SELECT {columns} FROM {table} WHERE run = :run ORDER BY {order}"
    return _fetch(path, query, {"run": run_id})


def _run(row: sqlite3.Row) -> Run:
    values = _values(row)
    values.pop("n", None)
    for name in _LISTS:
        values[name] = tuple(values[name].split("\n")) if values[name] else ()
    values["failed_after"] = bool(values["failed_after"])
    return Run(**values)


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
    with journalfile.translated(path), closing(_connect(path)) as connection:
        return connection.execute(query, values).fetchall()


def _fetch_all(path: Path, *queries: str) -> list[list[sqlite3.Row]]:
    """Run several queries on the journal as it is at one instant; nothing stays open."""
    if not journalfile.check(path):
        return [[] for _ in queries]
    with journalfile.translated(path), closing(_connect(path)) as connection:
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

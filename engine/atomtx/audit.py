"""
What is wrong with a journal, if anything: its file, its references, and what its rows claim.

Everything is asked of a copy (`copying.private`): nothing is changed, and no run waits for it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import copying, intents, journalfile, provenance, states
from .errors import JournalDamagedError, JournalError, JournalOlderError
from .statedir import RunFolder

DAMAGE, NOTE = "damage", "note"
_SHOWN = 100  # lines of SQLite's own checks, which may find something in each row
_LEGAL = {
    verb.value: frozenset((t.event.value, t.source, t.dest) for t in table)
    for verb, table in states.TABLES.items()
}


@dataclass(frozen=True)
class Finding:
    """Something that a sound journal does not have ("damage"), or worth knowing ("note")."""

    kind: str
    text: str


@dataclass
class Report:
    """What was looked at and what was found."""

    journal: Path
    exists: bool = True
    version: int = 0
    change_counter: int = 0
    pages: int = 0
    page_size: int = 0
    runs: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.kind != DAMAGE for finding in self.findings)

    def damage(self, text: str) -> None:
        self.findings.append(Finding(DAMAGE, text))

    def note(self, text: str) -> None:
        self.findings.append(Finding(NOTE, text))


def check(state: Path) -> Report:
    """
    Look at the journal of a state directory; change nothing.

    Raises JournalError where it cannot be read, or is no journal of this release's.
    """
    report = Report(state / journalfile.NAME)
    used = _used(state)  # before the journal, which has a run before its runner begins
    known: frozenset[str] = frozenset()
    try:
        with copying.private(report.journal, lambda source: _identify(source, report)) as copy:
            if copy is None:
                report.exists = False
                _miss(state, report)
            else:
                known = _look(copy, report)
    except JournalDamagedError as exc:
        report.damage(exc.cause)
        return report  # what is unknown to it may be known to its lost pages
    for run in sorted(used - known):
        report.note(
            f"runs/{run} is of a run that is not in the journal, and whose client was started: "
            "the journal was set aside, lost or rolled back since"
        )
    return report


def _miss(state: Path, report: Report) -> None:
    if provenance.knows_any(state):
        report.note(
            "there was one: it was set aside, or lost; `atomtx recover --scan` lists what its "
            "runs left"
        )


def _identify(source: copying.Source, report: Report) -> None:
    """See which journal it is; before another process can write, and note what it wrote."""
    report.version = journalfile.version(source.header)
    report.change_counter = journalfile.counter(source.header)
    rows = source.connection.execute("SELECT uuid, machine_id FROM journals").fetchall()
    if len(rows) > 1:
        report.damage(f"it says {len(rows)} times which journal it is")
    for uuid, machine in rows:
        try:
            provenance.prove(report.journal, uuid, machine, report.change_counter)
        except JournalOlderError as exc:
            # Not where it was a copy already, and the journal went on meanwhile.
            if not source.half_made or journalfile.is_hot(report.journal):
                report.damage(exc.message)
        except JournalError as exc:
            report.damage(exc.message)


def _look(source: copying.Source, report: Report) -> frozenset[str]:
    """Fill the report; return the ids of the runs."""
    connection = source.connection
    connection.row_factory = sqlite3.Row
    (report.pages,) = connection.execute("PRAGMA page_count").fetchone()
    (report.page_size,) = connection.execute("PRAGMA page_size").fetchone()
    if source.half_made:
        report.note(
            "a killed atomtx left a change half made; the next atomtx takes it back, and so it "
            "was in the copy that was checked"
        )
    for (said,) in connection.execute(f"PRAGMA integrity_check({_SHOWN})"):
        if said != "ok":
            report.damage(said)
    for row in connection.execute("PRAGMA foreign_key_check").fetchmany(_SHOWN):
        report.damage(f"row {row['rowid']} of {row['table']} is of no row in {row['parent']}")
    for text in _of_runs(connection, report.journal.parent):
        report.damage(text)
    ids = frozenset(row["id"] for row in connection.execute("SELECT id FROM runs"))
    report.runs = len(ids)
    return ids


def _of_runs(connection: sqlite3.Connection, state: Path) -> Iterator[str]:
    """Hold the rows against what every commit of ours leaves true."""
    query = "SELECT id, verb, state, rev FROM runs ORDER BY started_at, rowid"
    for run in connection.execute(query).fetchall():
        for text in (
            *_of_folder(run, state),
            *_of_moves(run, _rows(connection, "moves", run, "rev")),
            *_of_steps(run, _rows(connection, "steps", run, "id")),
        ):
            yield f"run {run['id']}: {text}"


def _rows(
    connection: sqlite3.Connection, table: str, run: sqlite3.Row, order: str
) -> list[sqlite3.Row]:
    return connection.execute(
        f"SELECT * FROM {table} WHERE run = ? ORDER BY {order}", (run["id"],)
    ).fetchall()


def _of_folder(run: sqlite3.Row, state: Path) -> Iterator[str]:
    folder = RunFolder.of(state, run["id"])
    if run["state"] not in states.FINAL and not folder.path.is_dir():
        yield f"it has not ended, and its folder {folder.path} is not there"


def _of_moves(run: sqlite3.Row, moves: list[sqlite3.Row]) -> Iterator[str]:
    at, rev = states.PLANNED, 0
    for move in moves:
        if move["source"] != at:
            yield f"it moved from {move['source']}, and was {at}"
        if (move["event"], move["source"], move["dest"]) not in _LEGAL[run["verb"]]:
            yield f"no {move['event']} leads from {move['source']} to {move['dest']}"
        at, rev = move["dest"], move["rev"]
    if at != run["state"]:
        yield f"it is {run['state']}, and its moves end in {at}"
    # A change without a move has a revision too, and none comes after the last move.
    if run["rev"] < rev or (run["state"] in states.FINAL and run["rev"] != rev):
        yield f"its revision is {run['rev']}, and that of its last move {rev}"


def _of_steps(run: sqlite3.Row, steps: list[sqlite3.Row]) -> Iterator[str]:
    undone_by = {step["compensates"]: step for step in steps if step["compensates"] is not None}
    for step in steps:
        if run["state"] in states.FINAL and step["outcome"] is None:
            yield f"it has ended, and step {step['id']} ({step['kind']}) has no outcome"
        try:
            intent = intents.from_json(step["kind"], step["payload"])
        except (KeyError, TypeError, ValueError):
            yield f"step {step['id']} ({step['kind']}) cannot be read"
            continue
        undo = intent.compensation()
        if step["compensates"] is None and undo is not None:
            yield from _of_undo(step, undo, undone_by.get(step["id"]))


def _of_undo(step: sqlite3.Row, undo: intents.Intent, row: sqlite3.Row | None) -> Iterator[str]:
    if row is None:
        yield f"step {step['id']} ({step['kind']}) has no compensation"
    elif (row["kind"], row["payload"]) != (undo.kind, undo.to_json()):
        yield f"step {row['id']} ({row['kind']}) does not undo step {step['id']} ({step['kind']})"


def _used(state: Path) -> frozenset[str]:
    """Return the runs that had a runner."""
    folders = (state / "runs").iterdir() if (state / "runs").is_dir() else ()
    return frozenset(path.name for path in folders if RunFolder(path).was_used())

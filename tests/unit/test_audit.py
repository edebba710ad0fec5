"""`journal check`: a journal is sound at every moment, and what is wrong with one is told."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atomtx import audit, journalfile, plan, provenance, schema, states
from atomtx.audit import DAMAGE, NOTE
from atomtx.clients import Backup, End
from atomtx.errors import JournalError, JournalNewerError
from atomtx.intents import HoldSnapshots, MountVolumes, RunClient, TakeSnapshots
from atomtx.journal import Journal
from atomtx.records import Run
from atomtx.statedir import RunFolder, prepare
from atomtx.states import Event, Outcome
from tests import hotjournal
from tests.runs import OTHER, RUN, a_plan


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return prepare(tmp_path / "state")


def begin(journal: Journal) -> Run:
    """Begin a run as a backup does: its folder first."""
    RunFolder.of(journal.state, RUN).make()
    takes = [step for step in plan.intents(a_plan()) if isinstance(step, TakeSnapshots)]
    return journal.begin(a_plan(), takes)


def whole_run(journal: Journal) -> Run:
    """Take a run through its life, resumed once, as the executor does."""
    run = begin(journal)
    for event in (
        *(Event.SNAPSHOTS_TAKEN, Event.VOLUMES_MOUNTED, Event.CLIENT_STARTED, Event.RESUMED),
        *(Event.VOLUMES_MOUNTED, Event.CLIENT_STARTED, Event.CLIENT_ENDED, Event.CLEANED_UP),
    ):
        if event is Event.VOLUMES_MOUNTED:
            with journal.change(run) as change:
                change.intend(MountVolumes("", plan.mounts(run.plan)))
            run = journal.load(RUN)
        with journal.change(run) as change:
            if event is Event.SNAPSHOTS_TAKEN:
                change.intend(HoldSnapshots("tank", "11", ("tank/a@x",), "tag"))
            if event is Event.CLIENT_STARTED:
                change.intend(RunClient("command", (("true",),), "/"))
            if event is Event.CLIENT_ENDED:
                backup = Backup(("/a",), Outcome.COMPLETED, "id")
                change.result(End(Outcome.COMPLETED, backups=(backup,)))
            if event is Event.CLEANED_UP:
                for step in run.steps:
                    change.ended(step, "done")
            change.fire(event)
        run = journal.load(RUN)
        assert findings(journal.state) == [], event
    return run


def findings(state: Path) -> list[tuple[str, str]]:
    return [(finding.kind, finding.text) for finding in audit.check(state).findings]


def sql(state: Path, *statements: str) -> None:
    with closing(sqlite3.connect(state / journalfile.NAME)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_sound(state: Path) -> None:
    """A journal is sound after each commit of a run, and the report has the file's numbers."""
    with Journal.open(state) as journal:
        whole_run(journal)
    report = audit.check(state)
    assert report.ok
    assert (report.exists, report.version, report.runs) == (True, journalfile.SCHEMA_VERSION, 1)
    header = journalfile.header(state / journalfile.NAME)
    assert report.change_counter == journalfile.counter(header) > 1
    assert report.pages * report.page_size == (state / journalfile.NAME).stat().st_size


def test_absent(state: Path) -> None:
    """Before the first run there is nothing to be wrong with."""
    report = audit.check(state)
    assert (report.ok, report.exists, report.findings) == (True, False, [])
    assert audit.check(state / "absent").ok


MOVES = "DELETE FROM moves WHERE "
WRONG = [
    (["DELETE FROM steps WHERE id = 4"], "step 3 (hold-snapshots) has no compensation"),
    (["UPDATE steps SET kind = 'end-client' WHERE id = 4"], "step 4 (end-client) cannot be read"),
    (
        ["UPDATE steps SET payload = replace(payload, 'tank/a@', 'tank/b@') WHERE id = 2"],
        "step 2 (destroy-snapshots) does not undo step 1 (take-snapshots)",
    ),
    (["UPDATE steps SET payload = '{' WHERE id = 1"], "step 1 (take-snapshots) cannot be read"),
    (["UPDATE steps SET kind = 'unheard-of' WHERE id = 1"], "step 1 (unheard-of) cannot be read"),
    (
        ["UPDATE steps SET outcome = NULL, ended_at = NULL WHERE id = 6"],
        "it has ended, and step 6 (unmount-volumes) has no outcome",
    ),
    ([f"{MOVES} event = 'resumed'"], "it moved from snapshotted, and was backing-up"),
    ([f"{MOVES} event = 'cleaned_up'"], "it is destroyed, and its moves end in unmounting"),
    ([MOVES + "1"], "it is destroyed, and its moves end in planned"),
    (
        ["UPDATE moves SET event = 'given_up' WHERE event = 'cleaned_up'"],
        "no given_up leads from unmounting to destroyed",
    ),
    (["UPDATE runs SET rev = rev + 1"], "its revision is 11, and that of its last move 10"),
    (["UPDATE runs SET rev = 3"], "its revision is 3, and that of its last move 10"),
    (
        ["UPDATE runs SET state = 'mounted', ended_at = NULL", "DELETE FROM moves WHERE rev > 3"],
        None,  # sound: the run would be there
    ),
]


@pytest.mark.parametrize(("statements", "said"), WRONG)
def test_wrong_rows(state: Path, statements: list[str], said: str | None) -> None:
    """Rows that no commit of ours leaves are found, each for what it is."""
    with Journal.open(state) as journal:
        whole_run(journal)
    sql(state, *statements)
    found = findings(state)
    assert {kind for kind, _ in found} <= {DAMAGE}
    if said is None:
        assert found == []
    else:
        assert f"run {RUN}: {said}" in [text for _, text in found]
        assert not audit.check(state).ok


def test_wrong_references(state: Path) -> None:
    """A row of a run that is not there is found."""
    with Journal.open(state) as journal:
        whole_run(journal)
    sql(state, f"UPDATE backups SET run = '{OTHER}'")
    assert findings(state) == [(DAMAGE, "row 1 of backups is of no row in runs")]


def test_wrong_pages(state: Path) -> None:
    """What SQLite's own check finds is told; the numbers of free pages are in the header."""
    with Journal.open(state) as journal:
        whole_run(journal)
    path = state / journalfile.NAME
    data = bytearray(path.read_bytes())
    data[36:40] = (int.from_bytes(data[36:40], "big") + 1).to_bytes(4, "big")
    path.write_bytes(data)
    (kind, text), *_ = findings(state)
    assert kind == DAMAGE
    assert "freelist" in text.lower()


def test_no_folder(state: Path) -> None:
    """An open run without its folder has lost the locks and the record of its client's end."""
    with Journal.open(state) as journal:
        begin(journal)
    assert findings(state) == []
    shutil.rmtree(RunFolder.of(state, RUN).path)
    ((kind, text),) = findings(state)
    assert (kind, "its folder" in text) == (DAMAGE, True)


def test_strays(state: Path) -> None:
    """A folder with a runner's traces, of a run that is not known, is a hint, and no damage."""
    Journal.open(state).close()
    for n, trace in enumerate(("end", "client.log", "runner.log", "progress.json")):
        (RunFolder.of(state, f"{n:016x}").make().path / trace).touch()
    RunFolder.of(state, RUN).make()  # killed before it began
    report = audit.check(state)
    assert report.ok
    assert [f.kind for f in report.findings] == [NOTE] * 4
    assert [f.text.split()[0] for f in report.findings] == [f"runs/{n:016x}" for n in range(4)]


def test_begun_meanwhile(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins while the journal is looked at is not taken for one of a lost journal."""
    Journal.open(state).close()
    look = audit._look

    def beginning(*words: Any) -> frozenset[str]:
        found = look(*words)
        RunFolder.of(state, RUN).make().log.touch()
        return found

    monkeypatch.setattr(audit, "_look", beginning)
    assert audit.check(state).findings == []


def test_half_made_change(state: Path) -> None:
    """A change that a killed writer left is no damage; it is told, and left for the next atomtx."""
    with Journal.open(state) as journal:
        begin(journal)
    path = state / journalfile.NAME
    before = path.read_bytes()
    sql(state, "UPDATE runs SET label = 'not committed'")
    hotjournal.write(path, before)
    path.write_bytes(os.urandom(4096) + path.read_bytes()[4096:])
    torn = path.read_bytes()
    report = audit.check(state)
    assert report.ok
    assert [f.kind for f in report.findings] == [NOTE]
    assert "half made" in report.findings[0].text
    assert path.read_bytes() == torn
    assert journalfile.is_hot(path)


def test_other_machine(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of another machine is not sound here."""
    Journal.open(state).close()
    monkeypatch.setattr(provenance, "machine_id", lambda: "another")
    ((kind, text),) = findings(state)
    assert (kind, "another machine" in text) == (DAMAGE, True)


def test_two_journals(state: Path) -> None:
    """A journal is one, and says so once."""
    Journal.open(state).close()
    second = "6f1c3a52-93d4-4f0e-8b1c-0d9f6f6f2a11"
    sql(state, f"INSERT INTO journals SELECT '{second}', machine_id, 1 FROM journals")
    assert findings(state) == [(DAMAGE, "it says 2 times which journal it is")]


def test_newer(state: Path) -> None:
    """Promise 13: a newer atomtx's journal is not judged by this one."""
    Journal.open(state).close()
    sql(state, f"PRAGMA user_version = {journalfile.SCHEMA_VERSION + 1}")
    with pytest.raises(JournalNewerError):
        audit.check(state)


def test_no_tables(state: Path) -> None:
    """A file with our number and nothing in it is an error, not a traceback."""
    sql(state, f"PRAGMA application_id = {journalfile.APPLICATION_ID}")
    with pytest.raises(JournalError, match="no such table"):
        audit.check(state)


def test_every_transition_is_legal() -> None:
    """The check knows the same moves as the machine; every table of the schema is exported."""
    from atomtx.cli.journal import TABLES

    legal = {verb: len(moves) for verb, moves in audit._LEGAL.items()}
    assert legal == {verb: len(moves) for verb, moves in states.TABLES.items()}
    assert set(TABLES) == set(schema.metadata.tables)

"""The migrations: the same journal as the tables, whole or not at all, and nothing lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from atomtx import journalfile, plan, provenance, schema
from atomtx.database import make_engine
from atomtx.errors import JournalError, JournalOlderError
from atomtx.intents import TakeSnapshots
from atomtx.journal import Journal
from atomtx.recovery import Presence, Probes, Resume, RollForward, Wish, decide
from atomtx.statedir import prepare
from atomtx.states import Event
from tests.runs import RUN, a_plan

HERE = schema._migrations()
REVISIONS = sorted(path.name for path in (HERE / "versions").glob("*.py"))
NEXT = journalfile.SCHEMA_VERSION + 1


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return prepare(tmp_path / "state")


def config(connection: Connection, scripts: Path = HERE) -> Config:
    made = Config()
    made.set_main_option("script_location", os.fspath(scripts).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def upgraded(path: Path) -> Path:
    """Make a journal by the migrations alone."""
    engine = make_engine(path, foreign_keys=False)
    schema.upgrade(engine)
    engine.dispose()
    return path


def created(path: Path) -> Path:
    """Make a journal from the tables alone."""
    engine = make_engine(path)
    with engine.begin() as connection:
        schema.metadata.create_all(connection)
    engine.dispose()
    return path


def objects(path: Path) -> dict[tuple[str, str], list[str]]:
    """Return each object's SQL as sorted words: the order of columns' constraints may differ."""
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    connection.close()
    return {
        (kind, name): sorted(_parts(sql or ""))
        for kind, name, sql in rows
        if name != "alembic_version" and "alembic_version" not in name
    }


def _parts(sql: str) -> list[str]:
    """Split at commas outside parentheses, blanks made one; the outermost parentheses opened."""
    head, _, body = re.sub(r"\s+", " ", sql).partition("(")
    parts, depth, part = [head.strip()], 0, ""
    for char in body:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    last, _, tail = part.rpartition(")")
    return [*parts, last.strip(), tail.strip()]


def ask(path: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


# -- the tables ------------------------------------------------------------------------------


def test_same_journal(tmp_path: Path) -> None:
    """What the migrations make is what the tables say: STRICT, CHECKs, names and indexes."""
    by_migrations = objects(upgraded(tmp_path / "upgraded.db"))
    by_tables = objects(created(tmp_path / "created.db"))
    assert by_migrations == by_tables
    assert {name for kind, name in by_tables if kind == "table"} == set(schema.metadata.tables)


def test_difference_is_seen(tmp_path: Path) -> None:
    """The comparison sees what alembic's own does not: a CHECK's text, STRICT, a partial index."""
    path = created(tmp_path / "created.db")
    whole = objects(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema = ON")
    for old, new in (
        ("'partial', ", ""),
        ("STRICT", ""),
        (" AND cleanup IS NULL", ""),
        ("ON DELETE CASCADE", ""),
    ):
        connection.execute("SAVEPOINT s")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, ?, ?)", (old, new))
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        changed = {(kind, name): sorted(_parts(sql or "")) for kind, name, sql in rows}
        assert changed != whole, old
        connection.execute("ROLLBACK TO s")
    connection.close()


def test_alembic_finds_no_difference(tmp_path: Path) -> None:
    """`alembic check` finds nothing to migrate."""
    engine = make_engine(upgraded(tmp_path / "journal.db"), foreign_keys=False)
    with engine.begin() as connection:
        command.check(config(connection))
    engine.dispose()


def test_strict(tmp_path: Path) -> None:
    """Every table refuses a value of another type."""
    path = upgraded(tmp_path / "journal.db")
    strict = {name: bool(flag) for _, name, kind, _, _, flag in ask(path, "PRAGMA table_list")
              if kind == "table" and not name.startswith(("sqlite_", "alembic_"))}  # fmt: skip
    assert strict == dict.fromkeys(schema.metadata.tables, True)
    with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT"):
        ask(path, "INSERT INTO journals VALUES ('u', 'm', 'yesterday')")


@pytest.mark.parametrize(
    ("column", "value"), [("state", "asleep"), ("outcome", "meh"), ("cleanup", "later")]
)
def test_closed_sets(tmp_path: Path, column: str, value: str) -> None:
    """A word that is not in its closed set is refused by the file itself."""
    path = upgraded(tmp_path / "journal.db")
    row = {"id": "r", "job": "j", "label": "l", "state": "planned", "rev": 0, "attempts": 0,
           "plan": "{}", "client": "c", "started_at": 1, "boot_id": "b", "pid": 1}  # fmt: skip
    row[column] = value
    sql = f"INSERT INTO runs ({', '.join(row)}) VALUES ({', '.join(repr(v) for v in row.values())})"
    with pytest.raises(sqlite3.IntegrityError, match=f"ck_runs_{column}"):
        ask(path, sql)


def test_version_is_the_newest_revision(tmp_path: Path) -> None:
    """The number in the file, the one in the program and the newest revision are the same."""
    path = upgraded(tmp_path / "journal.db")
    assert ask(path, "PRAGMA user_version") == [(journalfile.SCHEMA_VERSION,)]
    assert ask(path, "PRAGMA application_id") == [(journalfile.APPLICATION_ID,)]
    assert [name[:4] for name in REVISIONS] == [f"{n + 1:04}" for n in range(len(REVISIONS))]
    assert REVISIONS[-1].startswith(f"{journalfile.SCHEMA_VERSION:04}_")


def test_upgrade_twice(tmp_path: Path) -> None:
    """An upgrade of what is up to date changes nothing."""
    path = upgraded(tmp_path / "journal.db")
    before = path.read_bytes()
    assert upgraded(path).read_bytes() == before


def test_downgrade(tmp_path: Path) -> None:
    """There is no way down: the copy that was made before the upgrade is the way back."""
    path = upgraded(tmp_path / "journal.db")
    engine = make_engine(path, foreign_keys=False)
    with pytest.raises(NotImplementedError, match="copy"), engine.begin() as connection:
        command.downgrade(config(connection), "base")
    engine.dispose()
    assert ask(path, "PRAGMA user_version") == [(journalfile.SCHEMA_VERSION,)]


# -- from one version to the next ------------------------------------------------------------

# What a next release's migration may look like: a table that is altered by copying it, a new
# table, and a row changed.
SECOND = f"""
import os, signal
import sqlalchemy as sa
from alembic import op

revision = "{NEXT:04}"
down_revision = "{NEXT - 1:04}"


def upgrade():
    with op.batch_alter_table("runs", table_kwargs={{"sqlite_strict": True}}) as batch:
        batch.add_column(sa.Column("note", sa.Text()))
        batch.create_check_constraint("ck_runs_note", "note <> ''")
    op.create_table("notes", sa.Column("text", sa.Text()), sqlite_strict=True)
    op.execute("UPDATE runs SET note = 'was here before'")
    op.execute("PRAGMA user_version = {NEXT}")
    MIDWAY
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be a release with one more migration; what it does in its middle is the test's to say."""
    folder = tmp_path / "with 100% of the migrations"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(schema, "_migrations", lambda: folder)
    monkeypatch.setattr(journalfile, "SCHEMA_VERSION", NEXT)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


def write_second(folder: Path, midway: str) -> None:
    (folder / "versions" / f"{NEXT:04}_second.py").write_text(SECOND.replace("MIDWAY", midway))


def with_a_run(state: Path) -> Path:
    """Make this release's journal with an open run in it."""
    with Journal.open(state) as journal:
        the_plan = a_plan()
        takes = [step for step in plan.intents(the_plan) if isinstance(step, TakeSnapshots)]
        run = journal.begin(the_plan, takes)
        with journal.change(run) as change:
            change.fire(Event.SNAPSHOTS_TAKEN)
    return state / journalfile.NAME


@pytest.fixture
def old_journal(state: Path) -> Path:
    return with_a_run(state)


def dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return [*connection.iterdump(), str(connection.execute("PRAGMA user_version").fetchone())]
    finally:
        connection.close()


STORED = Path(__file__).parent
OLD_STATES = [
    "planned",
    "snapshotted",
    "mounted",
    "backing-up",
    "unmounting",
    "unmounting",  # parked
    "destroyed",
]


@pytest.mark.parametrize("version", range(1, journalfile.SCHEMA_VERSION))
def test_stored(state: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """
    Promise 13: this release goes on with the runs that an older one left, in whatever state.

    The journal is stored as the older release wrote it: plans and intents as well.
    """
    connection = sqlite3.connect(state / journalfile.NAME)
    connection.executescript((STORED / f"schema_{version}.sql").read_text())
    connection.close()
    monkeypatch.setattr(provenance, "machine_id", lambda: "machine")
    with Journal.open(state) as journal:
        runs = [journal.load(run) for run in sorted(journal.known())]
        assert [run.state for run in runs] == OLD_STATES
        for run in runs:
            snapshots = {v.snapshot: Presence.OURS for v in run.volumes}
            assert len(snapshots) == 2
            assert {v.kind for v in run.volumes} | {v.kind for v in run.plan.volumes} == {"zfs"}
            assert {v.guid is None for v in run.volumes} == {run.state == "planned"}
            take = run.steps[0].intent
            assert isinstance(take, TakeSnapshots)
            assert take == plan.intents(run.plan)[0]
            assert run.steps[1].intent == take.compensation()
            if run.state != "destroyed":
                decision = decide(run, Probes(snapshots=snapshots), Wish())
                known = run.state == "unmounting"
                assert decision == (RollForward() if known else Resume())
    assert objects(state / journalfile.NAME) == objects(created(state / "created.db"))
    assert ask(state / journalfile.NAME, "PRAGMA foreign_key_check") == []


# `old_journal` comes first: it is made before the next release is there.
def test_rows_are_kept(old_journal: Path, next_release: Path) -> None:
    """Promise 13: an older journal is upgraded on opening: every row is kept, and it is STRICT."""
    tables = ("journals", "runs", "volumes", "steps", "moves")
    before = {table: ask(old_journal, f"SELECT * FROM {table}") for table in tables}
    write_second(next_release, "")
    with Journal.open(old_journal.parent) as journal:
        assert journal.load(RUN).plan == a_plan()
        assert len(journal.load(RUN).steps) == 2
    after = {table: ask(old_journal, f"SELECT * FROM {table}") for table in tables}
    assert after.pop("runs") == [(*row, "was here before") for row in before.pop("runs")]
    assert after == before
    assert ask(old_journal, "PRAGMA user_version") == [(NEXT,)]
    assert ask(old_journal, "PRAGMA foreign_key_check") == []
    assert ask(old_journal, "PRAGMA integrity_check") == [("ok",)]


def test_copy(old_journal: Path, next_release: Path) -> None:
    """Promise 13: an older journal is backed up before; the copy is whole, and private."""
    before = dump(old_journal)
    write_second(next_release, "")
    Journal.open(old_journal.parent).close()
    copy = old_journal.with_name(f"journal.db.v{NEXT - 1}")
    assert dump(copy) == before
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    names = {path.name for path in old_journal.parent.iterdir() if path.is_file()}
    assert not [name for name in names if "partial" in name]


def test_copy_is_the_way_back(old_journal: Path, next_release: Path) -> None:
    """The copy that was made before the upgrade counts as no older than the journal was then."""
    before = journalfile.counter(journalfile.header(old_journal))
    write_second(next_release, "")
    Journal.open(old_journal.parent).close()
    copy = old_journal.with_name(f"journal.db.v{NEXT - 1}")
    assert journalfile.counter(journalfile.header(copy)) == before


def test_rolled_back(
    old_journal: Path, next_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 2: an older journal that was rolled back is refused before it is upgraded."""
    write_second(next_release, "")
    yesterday = old_journal.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(journalfile, "SCHEMA_VERSION", NEXT - 1)
        with Journal.open(old_journal.parent) as journal:
            for attempt in range(3):
                with journal.change(journal.load(RUN)) as change:
                    change.set(attempts=attempt)
    old_journal.write_bytes(yesterday)
    with pytest.raises(JournalOlderError):
        Journal.open(old_journal.parent)
    assert old_journal.read_bytes() == yesterday
    assert list(old_journal.parent.glob("*.v*")) == []


def test_other_machine(
    old_journal: Path, next_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 2: so is an older one of another machine."""
    write_second(next_release, "")
    before = old_journal.read_bytes()
    monkeypatch.setattr(provenance, "machine_id", lambda: "another")
    with pytest.raises(JournalError, match="another machine"):
        Journal.open(old_journal.parent)
    assert old_journal.read_bytes() == before


def test_rubbish_of_an_earlier_copy(old_journal: Path, next_release: Path) -> None:
    """A copy that was cut off, by a kill or a power cut, does not stand in the way of the next."""
    before = dump(old_journal)
    partial = old_journal.with_name(f"journal.db.v{NEXT - 1}.partial")
    partial.write_bytes(b"half a database" * 1000)
    write_second(next_release, "")
    Journal.open(old_journal.parent).close()
    assert dump(old_journal.with_name(f"journal.db.v{NEXT - 1}")) == before
    assert not partial.exists()


@pytest.mark.parametrize("midway", ["raise RuntimeError('midway')", "op.execute('SELECT nothing')"])
def test_failing_migration(old_journal: Path, next_release: Path, midway: str) -> None:
    """Promise 13: one transaction: a migration that fails at its end leaves the old journal."""
    before = dump(old_journal)
    write_second(next_release, midway)
    with pytest.raises((RuntimeError, JournalError)):
        Journal.open(old_journal.parent)
    assert dump(old_journal) == before
    write_second(next_release, "")
    with Journal.open(old_journal.parent) as journal:
        assert journal.load(RUN).id == RUN


def test_broken_reference(old_journal: Path, next_release: Path) -> None:
    """References are not watched during an upgrade; one that is broken by it takes it all back."""
    before = dump(old_journal)
    write_second(next_release, "op.execute('DELETE FROM runs')")
    with pytest.raises(JournalError, match="broken references"):
        Journal.open(old_journal.parent)
    assert dump(old_journal) == before


_OPEN = """
    import sys
    from pathlib import Path
    from atomtx import journalfile, schema
    from atomtx.journal import Journal

    sys.dont_write_bytecode = True
    journalfile.SCHEMA_VERSION = int(sys.argv[3])
    schema._migrations = lambda: Path(sys.argv[2])
    Journal.open(Path(sys.argv[1])).close()
"""


def open_elsewhere(state: Path, scripts: Path) -> int:
    argv = [sys.executable, "-c", textwrap.dedent(_OPEN), str(state), str(scripts), str(NEXT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(argv, env=env, timeout=300).returncode


def test_killed_migration(
    old_journal: Path, next_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promises 5 and 13: a kill in a migration leaves the old journal, to both releases."""
    before = dump(old_journal)
    write_second(next_release, KILL)
    assert open_elsewhere(old_journal.parent, next_release) == -signal.SIGKILL
    with monkeypatch.context() as patch:
        patch.setattr(journalfile, "SCHEMA_VERSION", NEXT - 1)
        with Journal.open(old_journal.parent) as journal:
            assert journal.load(RUN).id == RUN
    assert dump(old_journal) == before
    write_second(next_release, "")
    assert open_elsewhere(old_journal.parent, next_release) == 0
    assert ask(old_journal, "SELECT note FROM runs") == [("was here before",)]


def test_killed_first_migration(state: Path, next_release: Path) -> None:
    """From an empty file it is the same: after a kill it is empty, and opens with the next try."""
    write_second(next_release, KILL)
    assert open_elsewhere(state, next_release) == -signal.SIGKILL
    path = state / journalfile.NAME
    assert ask(path, "SELECT name FROM sqlite_master") == []
    assert ask(path, "PRAGMA user_version") == [(0,)]
    write_second(next_release, "")
    assert open_elsewhere(state, next_release) == 0
    assert ask(path, "PRAGMA user_version") == [(NEXT,)]


def test_empty_file(state: Path) -> None:
    """An empty file, as a kill at the very beginning leaves it, becomes a journal."""
    (state / journalfile.NAME).touch()
    Journal.open(state).close()
    assert ask(state / journalfile.NAME, "PRAGMA user_version") == [(journalfile.SCHEMA_VERSION,)]
    assert list(state.glob("*.v*")) == []


def test_state_directory_with_odd_name(tmp_path: Path) -> None:
    """A percent sign, a blank or a question mark in the path is only a character."""
    state = prepare(tmp_path / "a %20 b?c#d")
    Journal.open(state).close()
    assert (state / journalfile.NAME).stat().st_size > 0


def test_developers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`alembic upgrade` and `alembic check` work from the checkout, on $ATOMTX_STATE_DIR."""
    monkeypatch.setenv("ATOMTX_STATE_DIR", str(tmp_path))
    made = Config(str(HERE.parent / "alembic.ini"))
    command.upgrade(made, "head")
    command.check(made)
    assert objects(tmp_path / journalfile.NAME) == objects(created(tmp_path / "created.db"))
    with pytest.raises(CommandError):
        command.upgrade(made, "9999")

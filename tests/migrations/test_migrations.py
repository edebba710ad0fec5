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

from atomtx import (
    cloning,
    journalfile,
    plan,
    provenance,
    pruning,
    schema,
    snapping,
    stepping,
    steps,
)
from atomtx.cloning import Terms
from atomtx.convention import Pattern
from atomtx.database import make_engine
from atomtx.errors import JournalError, JournalOlderError
from atomtx.intents import CopySnapshots, Intent, PruneSnapshots, TakeSnapshots, UndoHook
from atomtx.journal import Journal
from atomtx.names import Target
from atomtx.pruning import Choice
from atomtx.records import Run
from atomtx.recovery import (
    Decision,
    Presence,
    Probes,
    Resume,
    RollBack,
    RollForward,
    Wish,
    decide,
)
from atomtx.statedir import prepare
from atomtx.states import Event, Verb
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
    ("column", "value"),
    [("verb", "dance"), ("state", "asleep"), ("outcome", "meh"), ("cleanup", "later")],
)
def test_closed_sets(tmp_path: Path, column: str, value: str) -> None:
    """A word that is not in its closed set is refused by the file itself."""
    path = upgraded(tmp_path / "journal.db")
    row = {"id": "r", "verb": "snap", "job": "j", "label": "l", "state": "planned", "rev": 0,
           "attempts": 0, "plan": "{}", "client": "c", "started_at": 1, "boot_id": "b",
           "pid": 1}  # fmt: skip
    row[column] = value
    sql = f"INSERT INTO runs ({', '.join(row)}) VALUES ({', '.join(repr(v) for v in row.values())})"
    with pytest.raises(sqlite3.IntegrityError, match=f"ck_runs_{column}"):
        ask(path, sql)


def test_references_are_found(tmp_path: Path) -> None:
    """What refers to a row that is forgotten is found by an index: else all rows are looked at."""
    path = upgraded(tmp_path / "journal.db")
    columns = [
        (table, row[3])
        for table in schema.metadata.tables
        for row in ask(path, f"PRAGMA foreign_key_list({table})")
    ]
    assert ("steps", "compensates") in columns
    for table, column in columns:
        (found,) = ask(path, f"EXPLAIN QUERY PLAN SELECT 1 FROM {table} WHERE {column} = 5")
        assert found[3].startswith(f"SEARCH {table} USING"), (table, column)


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
OLD_KINDS = {  # each in each state
    1: ["zfs"],
    2: ["zfs", "btrfs"],
    3: ["zfs", "btrfs", "lvm"],
    4: ["zfs", "btrfs", "lvm"],
}
# Of the verbs that schema 3 added: each state, and what is decided on a run that is left in it.
OLD_SNAPS = {
    "planned": Resume(),
    "snapshotted": RollForward(),
    "unmounting": RollForward(),
    "destroyed": None,
    "kept": None,
}
OLD_PRUNES = {"planned": RollBack("it was interrupted"), "pruned": None}
# Likewise of those that schema 4 added; the clones of steps have ended.
OLD_CLONES = {"planned": Resume(), "cloned": None}
OLD_RUNS = {"planned": Resume(), "ran": None}
OLD_WORDS = (("clone", "--job", "home"), ("prune", "--job", "home"))
TABLES = ("journals", "runs", "volumes", "steps", "moves", "backups")


@pytest.fixture
def old_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the machine of the stored journals, which has not seen a newer state of them yet."""
    monkeypatch.setattr(provenance, "machine_id", lambda: "machine")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))


def stored(version: int, path: Path) -> Path:
    """Make the journal that an older release wrote: plans and intents as well."""
    connection = sqlite3.connect(path)
    connection.executescript((STORED / f"schema_{version}.sql").read_text())
    connection.close()
    return path


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return every row by its columns' names, in the order in which they were written."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        queries = {t: f"SELECT rowid AS nr, * FROM {t} ORDER BY nr" for t in TABLES}
        return {t: list(map(dict, connection.execute(sql))) for t, sql in queries.items()}
    finally:
        connection.close()


def of_verb(runs: list[Run], verb: Verb) -> list[Run]:
    return [run for run in runs if run.verb is verb]


def forward(run: Run) -> tuple[Intent, ...]:
    """Return the intents of a run that undo nothing, in order."""
    return tuple(step.intent for step in run.steps if step.compensates is None)


def decided(run: Run) -> Decision | None:
    """Return what recovery decides where every snapshot of the run is there, if it is open."""
    snapshots = {v.snapshot: Presence.OURS for v in run.frozen}
    return None if run.is_final else decide(run, Probes(snapshots=snapshots), Wish())


def check_undos(run: Run) -> None:
    intents = {step.id: step.intent for step in run.steps if step.compensates is None}
    expected = {n: intent.compensation() for n, intent in intents.items() if intent.compensation()}
    assert {s.compensates: s.intent for s in run.steps if s.compensates is not None} == expected


def check_backup(run: Run, kind: str) -> None:
    assert len({v.snapshot for v in run.frozen}) == 2
    assert {v.kind for v in run.frozen} == {kind}
    assert [v.kind for v in run.volumes] == [v.kind for v in run.plan.volumes]
    assert {v.guid is None for v in run.frozen} == {run.state == "planned"}
    first = plan.first_intents(run.plan)
    assert isinstance(first[-1], TakeSnapshots)
    assert forward(run)[: len(first)] == first
    if not run.is_final:
        assert decided(run) == (RollForward() if run.state == "unmounting" else Resume())


def check_hook_and_live_volume(run: Run) -> None:
    """The hook was run, and what undoes it was not; what is read live has no snapshot."""
    hook, undo = run.steps[:2]
    assert run.plan.hooks == (hook.intent,)
    assert isinstance(undo.intent, UndoHook)
    assert [hook.outcome, undo.outcome] == ["done", None]
    assert run.read_live == ("/boot",)
    assert [v.kind for v in run.volumes] == ["plain", "lvm", "lvm"]


def check_snap(run: Run) -> None:
    is_taken = run.state in ("snapshotted", "kept")
    assert {v.guid is not None for v in run.volumes} == {is_taken}
    steps = snapping.steps(run.plan) if is_taken else plan.first_intents(run.plan)
    assert forward(run) == tuple(steps)
    assert decided(run) == OLD_SNAPS[run.state]


def check_prune(run: Run, keeper: str) -> None:
    """Guids, times and marks are in the intents alone: the rest of them the plan tells."""
    found = [intent for intent in forward(run) if isinstance(intent, PruneSnapshots)]
    going = tuple(each for intent in found for each in pruning._going(intent))
    assert forward(run) == pruning.intents(Choice(run.plan, (), going), bookmark=True)
    assert [each.name for each in going] == [v.snapshot for v in run.volumes]
    assert {each.keeper for each in going} == {keeper}
    assert decided(run) == OLD_PRUNES[run.state]


def check_clone(run: Run) -> None:
    """The targets, their pools and the guids are in the intents alone."""
    found = [intent for intent in forward(run) if isinstance(intent, CopySnapshots)]
    pools = {Target.parse(each.target): each.pool_guid for each in found}
    guids = dict(zip(found[0].snapshots, found[0].guids, strict=True))
    pattern = Pattern.parse(found[0].pattern)
    made = cloning.intents(run.plan, guids, pools, pattern=pattern, terms=Terms())
    assert forward(run) == made
    assert [v.snapshot for v in run.volumes] == list(found[0].snapshots)
    assert decided(run) == OLD_CLONES[run.state]


def check_steps(run: Run, made: Run) -> None:
    """The first step has made a clone; of an open run the second is left."""
    assert forward(run) == stepping.intents(OLD_WORDS)
    assert stepping.config_of(run) == "/etc/atomtx/atomtx.toml"
    assert (made.of_run, made.plan.parent) == (run.id, f"{run.id}/1")
    assert [step.intent for step in steps.to_do(run)] == list(forward(run)[1:][: not run.is_final])
    assert decided(run) == OLD_RUNS[run.state]


def opened(state: Path) -> list[Run]:
    """Return the runs of a journal by their ids, as this release reads them."""
    with Journal.open(state) as journal:
        return [journal.load(run) for run in sorted(journal.known())]


@pytest.mark.usefixtures("old_machine")
@pytest.mark.parametrize("version", range(1, journalfile.SCHEMA_VERSION))
def test_stored(state: Path, version: int) -> None:
    """Promise 13: this release goes on with the runs that an older one left, in any state."""
    path = stored(version, state / journalfile.NAME)
    runs = opened(state)
    kinds = [kind for kind in OLD_KINDS[version] for _ in OLD_STATES]
    backups = of_verb(runs, Verb.BACKUP)
    assert [run.state for run in backups] == OLD_STATES * len(OLD_KINDS[version])
    for run, kind in zip(backups, kinds, strict=True):
        check_backup(run, kind)
    for run in runs:
        check_undos(run)
    assert ask(path, "SELECT id, verb FROM runs ORDER BY id") == [(r.id, r.verb) for r in runs]
    assert objects(path) == objects(created(state / "created.db"))
    assert ask(path, "PRAGMA foreign_key_check") == []


@pytest.mark.usefixtures("old_machine")
@pytest.mark.parametrize("version", range(3, journalfile.SCHEMA_VERSION))
def test_stored_verbs(state: Path, version: int) -> None:
    """Promise 13: so it does with snaps, prunes, hooks and what is read live, since schema 3."""
    stored(version, state / journalfile.NAME)
    runs = opened(state)
    (hooked,) = (run for run in runs if run.plan.hooks)
    check_hook_and_live_volume(hooked)
    snaps, prunes = of_verb(runs, Verb.SNAP), of_verb(runs, Verb.PRUNE)
    assert [run.state for run in snaps] == list(OLD_SNAPS)
    assert [run.state for run in prunes] == list(OLD_PRUNES)
    for run in snaps:
        check_snap(run)
    for run in prunes:
        check_prune(run, keeper=snaps[-1].id)


@pytest.mark.usefixtures("old_machine")
@pytest.mark.parametrize("version", range(4, journalfile.SCHEMA_VERSION))
def test_stored_clones_and_steps(state: Path, version: int) -> None:
    """Promise 13: so it does with clones, and with the steps of a job, since schema 4."""
    stored(version, state / journalfile.NAME)
    runs = opened(state)
    clones = of_verb(runs, Verb.CLONE)
    own = [run for run in clones if not run.of_run]
    assert [run.state for run in own] == list(OLD_CLONES)
    for run in clones:
        check_clone(run)
    whole, made = of_verb(runs, Verb.RUN), [run for run in clones if run.of_run]
    assert [run.state for run in whole] == list(OLD_RUNS)
    for run, child in zip(whole, made, strict=True):
        check_steps(run, child)


@pytest.mark.usefixtures("old_machine")
@pytest.mark.parametrize("version", range(1, journalfile.SCHEMA_VERSION))
def test_stored_rows(state: Path, version: int) -> None:
    """Promise 13: every row of an older journal has in each column what it had, in its order."""
    path = stored(version, state / journalfile.NAME)
    before = rows(path)
    Journal.open(state).close()
    after = rows(path)
    for table in TABLES:
        assert before[table]
        for old, new in zip(before[table], after[table], strict=True):
            assert old.items() <= new.items(), table


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


_FULL = """
    import os, sys
    from pathlib import Path
    from atomtx import provenance
    from atomtx.errors import JournalFullError
    from atomtx.journal import Journal
    from atomtx.mounts import namespace
    from atomtx.statedir import prepare
    from tests.migrations.test_migrations import stored

    namespace.enter()
    namespace.mount("full", sys.argv[1], "tmpfs", 0, "size=1m")
    provenance.machine_id = lambda: "machine"
    state = prepare(Path(sys.argv[1]) / "state")
    path = stored(3, state / "journal.db")
    before, names = path.read_bytes(), {file.name for file in state.iterdir()}
    fill = Path(sys.argv[1], "fill")
    with open(fill, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.truncate(fill, file.tell() - 65536)
    try:
        Journal.open(state)
    except JournalFullError as exc:
        print(exc)
    print(*{file.name for file in state.iterdir()} - names, path.read_bytes() == before)
    fill.unlink()
    Journal.open(state).close()
    print((state / "journal.db.v3").exists())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_no_room_for_the_copy(tmp_path: Path) -> None:
    """Without room for the copy the journal stays as it is, and it is told how much it takes."""
    (tmp_path / "full").mkdir()
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "RUNTIME_DIRECTORY": str(tmp_path / "run")}
    env = {**os.environ, **own}
    argv = [sys.executable, "-c", textwrap.dedent(_FULL), str(tmp_path / "full")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    said, left, after, *_ = [*done.stdout.splitlines(), "", "", ""]
    words = r"no space left in \S+/state for a copy of the journal \(make room for .* KiB there: "
    assert re.match(words, said), done.stderr
    assert (left, after) == ("journal.lock True", "True")


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

"""Reading the journal: quick, harmless, and clear about what it cannot read."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from atomtx import history, intents, journalfile
from atomtx.errors import ExitStatus, JournalError, JournalNewerError, UserError
from tests.journals import T0, Journal, a_run

Add = Callable[..., None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "a state?dir%20#"
    folder.mkdir()
    return folder / journalfile.NAME


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


@pytest.fixture
def add(journal: Journal) -> Add:
    return journal.add


def test_no_journal(path: Path) -> None:
    """A journal that does not exist yet is an empty history, and is not made by reading it."""
    assert history.runs(path) == []
    assert history.open_runs(path) == []
    assert not path.exists()


def test_empty_file(path: Path) -> None:
    """A journal whose making was interrupted at its first byte is an empty history."""
    path.touch()
    assert history.runs(path) == []


def test_newest_first(path: Path, add: Add) -> None:
    """Runs come with the newest first, as many as were asked for, whatever the path's name is."""
    for number in (3, 1, 2):
        add("runs", **a_run(number))
    assert [run.id[-1] for run in history.runs(path)] == ["3", "2", "1"]
    assert [run.id[-1] for run in history.runs(path, limit=2)] == ["3", "2"]


def test_values(path: Path, add: Add) -> None:
    """A run's times are aware UTC, its duration seconds, its backup ids in their order."""
    add("runs", **a_run(1, bytes_added=7))
    row = {"run": f"{1:016x}", "path": "/a\n/b", "outcome": "completed"}
    for n, backup_id in ((1, "b"), (0, "a"), (2, None)):
        add("backups", n=n, backup_id=backup_id, **row)
    (run,) = history.runs(path)
    assert run.started_at == datetime.fromtimestamp((T0 + 1_000_000) / 1e6, UTC)
    assert run.duration_s == 0.5
    assert run.backup_ids == ("a", "b")
    assert run.bytes_added == 7
    assert history.backups(path, run.id)[0].paths == ("/a", "/b")
    assert history.plan(path, run.id) == '{"run": "x"}'


def test_failed_only(path: Path, add: Add) -> None:
    """`--failed` shows every run that did not end well, and none that did or is at work."""
    add("runs", **a_run(1))
    add("runs", **a_run(2, outcome="failed"))
    add("runs", **a_run(3, outcome="partial"))
    add("runs", **a_run(4, outcome="rolled-back"))
    add("runs", **a_run(5, state="unmounting", cleanup="parked"))
    add("runs", **a_run(6, state="mounted", outcome=None))
    found = history.runs(path, failed_only=True)
    assert [run.id[-1] for run in found] == ["5", "4", "3", "2"]


def test_one_job(path: Path, add: Add) -> None:
    """A job is found by its label and by its key."""
    add("runs", **a_run(1, label="mail"))
    add("runs", **a_run(2))
    assert [run.id[-1] for run in history.runs(path, job="mail")] == ["1"]
    assert [run.id[-1] for run in history.runs(path, job="key-2")] == ["2"]


def test_open_runs(path: Path, add: Add) -> None:
    """Open runs are those not destroyed, parked ones too, the oldest first."""
    add("runs", **a_run(1))
    add("runs", **a_run(3, state="backing-up", outcome=None))
    add("runs", **a_run(2, state="unmounting", cleanup="parked"))
    assert [run.id[-1] for run in history.open_runs(path)] == ["2", "3"]


def test_prefix(path: Path, add: Add) -> None:
    """A run is found by its first digits, with or without the name that its snapshots bear."""
    add("runs", **a_run(1, id="7f3c000000000001"))
    add("runs", **a_run(2, id="7f3d000000000001"))
    assert history.run(path, "7f3c").id == "7f3c000000000001"
    assert history.run(path, "atomtx-7F3D000000000001").id == "7f3d000000000001"


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("7f3", "several runs"),
        ("8", "no run"),
        ("", "not a run id"),
        ("xyz", "not a run id"),
        ("%", "not a run id"),
    ],
)
def test_bad_prefix(path: Path, add: Add, prefix: str, words: str) -> None:
    """A prefix of no run, of several, or of nothing that could be one, is the user's error."""
    add("runs", **a_run(1, id="7f3c000000000001"))
    add("runs", **a_run(2, id="7f3d000000000001"))
    with pytest.raises(UserError, match=words) as caught:
        history.run(path, prefix)
    assert caught.value.hint


def test_details(path: Path, add: Add) -> None:
    """Steps, moves and volumes come whole and in the order in which they were written."""
    run = f"{1:016x}"
    add("runs", **a_run(1))
    hold = intents.HoldSnapshots("tank", "9", ("tank/a@x",), "tag")
    undo = hold.compensation()
    row = {"run": run, "attempt": 0, "intended_at": T0}
    add("steps", id=1, kind=hold.kind, payload=hold.to_json(), outcome="done", ended_at=T0, **row)
    add("steps", id=2, kind=undo.kind, payload=undo.to_json(), compensates=1, **row)
    add("steps", id=3, kind="of-another-release", payload="{}", **row)
    add("moves", run=run, rev=1, at=T0, event="given_up", source="planned", dest="unmounting")
    facts = {"pool": "tank", "pool_guid": "9", "guid": str(2**64 - 1), "mountpoint": "/a"}
    add("volumes", run=run, n=0, kind="zfs", name="tank/a", snapshot="tank/a@x", **facts)
    first, second, third = history.steps(path, run)
    assert first.describe() == hold.describe()
    assert second.compensates == 1
    assert second.outcome is None
    assert third.describe() == "of-another-release"
    assert [move.dest for move in history.moves(path, run)] == ["unmounting"]
    assert [volume.guid for volume in history.volumes(path, run)] == [str(2**64 - 1)]


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({}, ExitStatus.COMPLETED),
        ({"outcome": "partial"}, ExitStatus.PARTIAL),
        ({"outcome": "failed"}, ExitStatus.FAILED),
        ({"outcome": "rolled-back"}, ExitStatus.FAILED),
        ({"state": "unmounting", "cleanup": "parked"}, ExitStatus.PARKED),
        ({"state": "unmounting", "cleanup": "parked", "outcome": "failed"}, ExitStatus.FAILED),
        ({"state": "mounted", "outcome": None}, ExitStatus.WAITING),
    ],
)
def test_exit_status(path: Path, add: Add, values: dict[str, Any], status: ExitStatus) -> None:
    """A run's row tells the exit status of its backup, the worst part deciding."""
    add("runs", **a_run(1, **values))
    assert history.runs(path)[0].exit_status == status


def test_leaves_no_lock(path: Path, add: Add) -> None:
    """A writer need not wait once a function has returned."""
    add("runs", **a_run(1))
    history.runs(path)
    writer = sqlite3.connect(path, timeout=0)
    writer.execute("BEGIN EXCLUSIVE")
    writer.close()


_KILLED_WRITER = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode=PERSIST")
connection.execute("PRAGMA cache_size=1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE runs SET label = 'not committed'")
connection.execute("CREATE TABLE big (data)")
connection.execute("INSERT INTO big VALUES (zeroblob(4000000))")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_kill(path: Path, add: Add) -> None:
    """After a writer was killed in the middle of a commit, reading shows the last whole state."""
    for number in range(200):
        add("runs", **a_run(number))
    subprocess.run([sys.executable, "-c", _KILLED_WRITER, str(path)], check=False)
    reader = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError):  # the journal is hot: a reader must roll it back
        reader.execute("SELECT * FROM runs")
    reader.close()
    assert {run.label for run in history.runs(path)} == {"home"}
    healed = sqlite3.connect(path)
    assert healed.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    healed.close()


def test_newer(path: Path, journal: Journal) -> None:
    """A journal that a newer atomtx wrote is refused with status 2, and left as it was."""
    journal.set_version(journalfile.SCHEMA_VERSION + 1)
    before = path.read_bytes()
    with pytest.raises(JournalNewerError, match="newer atomtx") as caught:
        history.runs(path)
    assert caught.value.exit_status == ExitStatus.USAGE
    assert path.read_bytes() == before


def test_not_a_journal(path: Path) -> None:
    """Another program's database is refused."""
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE t (a)")
    other.close()
    with pytest.raises(JournalError, match="not a journal of atomtx"):
        history.runs(path)


@pytest.mark.parametrize("content", [b"short", b"\0" * 4096])
def test_no_database(path: Path, content: bytes) -> None:
    """A file that is no database at all is called damaged, and what to do next is said."""
    path.write_bytes(content)
    with pytest.raises(JournalError, match="damaged") as caught:
        history.runs(path)
    assert "recover --scan" in str(caught.value)


def test_damaged(path: Path, add: Add) -> None:
    """A journal whose pages were overwritten is called damaged, not a bug of ours."""
    for number in range(200):
        add("runs", **a_run(number))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(b"\xa5" * (size - 1024))
    with pytest.raises(JournalError, match="damaged"):
        history.runs(path)


def test_directory(path: Path) -> None:
    """A directory in the journal's place is one clear error."""
    path.mkdir()
    with pytest.raises(JournalError, match="cannot read the journal"):
        history.runs(path)


# -- jobs --------------------------------------------------------------------------------------


def test_jobs_none(path: Path) -> None:
    """Without a journal there are no jobs."""
    assert history.jobs(path) == []


def test_jobs(path: Path, add: Add) -> None:
    """A job tells its newest run, the newest that ended, and the newest that completed."""
    add("runs", **a_run(1))
    add("runs", **a_run(2))
    add("runs", **a_run(3, outcome="failed"))
    add("runs", **a_run(4, state="mounted", outcome=None))
    add("runs", **a_run(5, label="other"))
    home, other = history.jobs(path)
    assert (home.label, home.times) == ("home", 4)
    assert home.completed is not None
    assert home.completed.id[-1] == "2"
    assert home.ended is not None
    assert home.ended.id[-1] == "3"
    assert home.newest.id[-1] == "4"
    assert [run.id[-1] for run in home.open] == ["4"]
    assert home.keys == {"key-1", "key-2", "key-3", "key-4"}
    assert (other.label, other.times, other.open) == ("other", 1, ())


def test_jobs_of_one_label(path: Path, add: Add) -> None:
    """A job is one repository's, and of one command: no backup stands for another's."""
    for number, values in enumerate(
        [
            {"repository": "here"},
            {"repository": "there"},
            {"client": "kopia"},
            {"client": "command", "plan": '{"client": {"command": ["tar"]}}'},
            {"client": "command", "plan": '{"client": {"command": ["cpio"]}}'},
            {"client": "command", "plan": "no JSON"},
        ],
        start=1,
    ):
        add("runs", **a_run(number, **values))
        add("runs", **a_run(number + 100, **values))
    found = history.jobs(path)
    assert [job.times for job in found] == [2] * 6
    assert {job.label for job in found} == {"home"}
    assert found[0].name == "home (restic here)"


def test_jobs_order(path: Path, add: Add) -> None:
    """The newest run is the one that was begun last, though the clock was set back before."""
    add("runs", **a_run(100_000, moment_at=T0 + 10**15))
    add("runs", **a_run(2))
    (job,) = history.jobs(path)
    assert job.completed is not None
    assert job.completed.id == f"{2:016x}"


def test_jobs_parked(path: Path, add: Add) -> None:
    """A backup whose cleanup is parked is there."""
    add("runs", **a_run(1, state="unmounting", cleanup="parked"))
    (job,) = history.jobs(path)
    assert job.completed is not None
    assert [run.id for run in job.open] == [job.completed.id]

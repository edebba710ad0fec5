"""Reading the journal: quick, harmless, and clear about what it cannot read."""

from __future__ import annotations

import json
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
from atomtx.history import Snap, Taken
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
    for number in (1, 2, 3):
        add("runs", **a_run(number))
    assert [run.id[-1] for run in history.runs(path)] == ["3", "2", "1"]
    assert [run.id[-1] for run in history.runs(path, limit=2)] == ["3", "2"]
    assert len(history.runs(path, limit=10**20)) == 3  # more than SQLite's integers hold


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
    kinds = {7: "run-hook", 8: "apply-retention", 9: "undo-hook"}
    for number, kind in kinds.items():
        add("runs", **a_run(number))
        step = {"attempt": 1, "payload": "{}", "intended_at": T0, "ended_at": T0}
        add("steps", run=f"{number:016x}", kind="mount-volumes", outcome="failed", **step)
        add("steps", run=f"{number:016x}", kind=kind, outcome="failed", **step)
        add("runs", **a_run(number + 3))
        add("steps", run=f"{number + 3:016x}", kind=kind, outcome="done", **step)
    found = history.runs(path, failed_only=True)
    assert [run.id[-1] for run in found] == ["9", "8", "7", "5", "4", "3", "2"]
    assert [run.failed_after for run in found] == [True] * 3 + [False] * 4


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


@pytest.mark.parametrize("word", ["last", "latest", " Last"])
def test_newest(path: Path, add: Add, word: str) -> None:
    """The newest run has a name, and so has the newest that saved something; any other its id."""
    add("runs", **a_run(1, id="7f3c000000000001", outcome="completed"))
    add("runs", **a_run(2, id="7f3d000000000001", outcome="partial"))
    add("runs", **a_run(3, id="7f3e000000000001", outcome="failed"))
    add("runs", **a_run(4, id="7f3f000000000001", verb="snap", outcome="completed"))
    assert history.chosen(path, word).id == history.runs(path)[0].id == "7f3f000000000001"
    assert history.chosen(path, word, saved_only=True).id == "7f3d000000000001"
    assert history.chosen(path, "7f3e", saved_only=True).outcome == "failed"
    with pytest.raises(UserError, match="not a run id"):
        history.run(path, word)  # as what changes a run reads it


def test_clock_was_ahead(path: Path, add: Add) -> None:
    """One run under a clock that was years ahead does not hide every later one."""
    add("runs", **a_run(100_000))
    add("runs", **a_run(5))
    assert history.chosen(path, "last").id == f"{5:016x}"
    assert history.chosen(path, "last", saved_only=True).id == f"{5:016x}"
    assert [run.id for run in history.runs(path)] == [f"{n:016x}" for n in (5, 100_000)]


def test_no_newest(path: Path, add: Add) -> None:
    """Where nothing ran, or nothing was saved, there is no newest."""
    with pytest.raises(UserError, match="there is no last run: nothing ran yet"):
        history.chosen(path, "last")
    add("runs", **a_run(1, outcome="failed"))
    assert history.chosen(path, "last").outcome == "failed"
    with pytest.raises(UserError, match="no backup has saved anything yet"):
        history.chosen(path, "latest", saved_only=True)


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


# -- what snaps took ---------------------------------------------------------------------------


def snap(add: Add, number: int, parent: str = "", **values: Any) -> str:
    """Write a run that took transient snapshots, perhaps as a step; return its id."""
    told = json.dumps({"transient": True, "parent": parent})
    add("runs", **a_run(number, **{"verb": "snap", "plan": told, **values}))
    return f"{number:016x}"


def test_snaps(path: Path, add: Add) -> None:
    """Whether one is open and what it took; where the plan cannot be read, that it is to stay."""
    assert history.snaps(path) == {}
    add("runs", **a_run(1))  # a backup
    ended, at_work = snap(add, 2), snap(add, 3, state="planned")
    odd = snap(add, 4, plan="torn")
    assert history.snaps(path) == {
        ended: Snap(False, is_transient=True),
        at_work: Snap(True, is_transient=True),
        odd: Snap(False, is_transient=False),
    }


def test_snaps_of_steps(path: Path, add: Add) -> None:
    """What a step took is told to be of its run as long as that is open, but not to its steps."""
    add("runs", **a_run(1, verb="run", state="planned", outcome=None))
    add("runs", **a_run(2, verb="run", state="ran", ended_at=T0))
    first, second, gone = (f"{number:016x}" for number in (1, 2, 3))
    runs = [snap(add, n, f"{of}/1") for n, of in enumerate((first, second, gone), start=4)]
    assert [history.snaps(path)[run].of_open for run in runs] == [first, "", ""]
    assert [history.snaps(path, within=first)[run].of_open for run in runs] == ["", "", ""]
    assert history.snaps(path, within=second)[runs[0]].of_open == first


def test_taken(path: Path, add: Add) -> None:
    """The moments that the steps of a run have kept, with their datasets, and of no other run."""
    whole, other = (f"{number:016x}" for number in (1, 2))
    for number in (1, 2):
        add("runs", **a_run(number, verb="run", state="planned", outcome=None))

    def moment(number: int, of: str, *datasets: str, kind: str = "zfs", **values: Any) -> None:
        run = snap(add, number, of, **values)
        facts = {"kind": kind, "pool": "tank", "pool_guid": "9", "mountpoint": "-", "guid": "g"}
        for n, name in enumerate(datasets):
            names = {"name": name, "snapshot": f"{name}@m{number}", "snapshot_guid": f"{number}{n}"}
            add("volumes", run=run, n=n, createtxg="5", **facts, **names)

    moment(3, f"{whole}/1", "tank/a", "tank/b")
    moment(4, f"{whole}/2", "tank/a", outcome="partial", plan=_TO_STAY % whole)
    moment(5, f"{whole}/3", "tank/a", outcome="rolled-back")
    moment(6, f"{whole}/3", "tank/a", kind="btrfs")
    moment(7, f"{other}/1", "tank/a")
    moment(8, "", "tank/a")
    assert history.taken(path, whole) == [
        Taken("m3", True, {"tank/a": "30", "tank/b": "31"}),
        Taken("m4", False, {"tank/a": "40"}),
    ]
    assert [each.name for each in history.taken(path, other)] == ["m7"]


_TO_STAY = '{"parent": "%s/2"}'


# -- what is saved -----------------------------------------------------------------------------

HERE: dict[str, Any] = {"job": "job home", "repository": "here"}
COMMAND = '{"client": {"command": ["%s"]}}'
RUN_WITH = '{"client": {"command": ["x"], "extra": ["--to=%s"], "environment": [["DEST", "%s"]]}}'


def read(add: Add, number: int, guid: str = "7", kind: str = "zfs", **values: Any) -> None:
    """Write a run that read a snapshot, which is always of the same name."""
    add("runs", **a_run(number, **HERE | values))
    add("volumes", **a_volume(number, 0, guid) | {"kind": kind})


def a_volume(number: int, n: int, guid: str) -> dict[str, Any]:
    facts = {"pool": "tank", "pool_guid": "9", "guid": "1", "mountpoint": "/a", "name": "tank/a"}
    facts |= {"snapshot": "tank/a@m", "snapshot_guid": guid, "createtxg": "5"}
    return {"run": f"{number:016x}", "n": n, "kind": "zfs"} | facts


def test_saved_by(path: Path, add: Add) -> None:
    """What a job has saved is known by guid; another job, or another name of one, has its own."""
    assert history.saved_by(path, "job home") == frozenset()
    read(add, 1)
    read(add, 2, "8")
    read(add, 3, "9", job="job other")
    read(add, 4, "10", job="job third", repository="there")
    assert history.saved_by(path, "job home") == {"7", "8"}
    assert history.saved_by(path, "job other") == {"9"}
    assert history.saved_by(path, "home") == frozenset()  # the label of all of them


@pytest.mark.parametrize(
    "values",
    [
        {"outcome": "partial"},
        {"outcome": "failed"},
        {"outcome": "rolled-back"},
        {"outcome": None, "state": "backing-up"},
        {"verb": "prune", "state": "pruned", "ended_at": T0},
        {"kind": "btrfs"},
        {"repository": None, "client": "command", "plan": "no JSON"},
    ],
)
def test_not_saved(path: Path, add: Add, values: dict[str, Any]) -> None:
    """Nothing but a completed backup of a ZFS snapshot counts."""
    read(add, 1, **values)
    assert history.saved_by(path, "job home") == frozenset()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"repository": "there"}, {"repository": "here"}),
        ({"repository": None, "plan": COMMAND % "restic"}, {"repository": "here"}),
        (
            {"repository": None, "client": "command", "plan": COMMAND % "tar"},
            {"repository": None, "client": "command", "plan": COMMAND % "cpio"},
        ),
        (
            {"repository": None, "client": "command", "plan": RUN_WITH % ("one", "one")},
            {"repository": None, "client": "command", "plan": RUN_WITH % ("two", "one")},
        ),
        (
            {"repository": None, "client": "command", "plan": RUN_WITH % ("one", "one")},
            {"repository": None, "client": "command", "plan": RUN_WITH % ("one", "two")},
        ),
    ],
)
def test_saved_elsewhere(
    path: Path, add: Add, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Where a job's backups go elsewhere by now, what it saved before is not saved there."""
    read(add, 1, "7", **before)
    read(add, 2, "8", **before)
    assert history.saved_by(path, "job home") == {"7", "8"}
    read(add, 3, "8", outcome="failed", **after)
    assert history.saved_by(path, "job home") == frozenset()
    read(add, 4, "8", **after)
    assert history.saved_by(path, "job home") == {"8"}


def test_saved_asks_each_run_once(path: Path, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run's client is may be long: it is read once a run, not for each of its volumes."""
    there: dict[str, Any] = {"client": "command", "repository": None, "plan": COMMAND % "tar"}
    for number in (2, 1):
        read(add, number, "7", **there)
        for n in range(1, 50):
            add("volumes", **a_volume(number, n, str(100 * number + n)))
    read(add, 3, "8", **there | {"plan": COMMAND % "cpio"})
    asked: list[str] = []
    real = history._store

    def counted(row: sqlite3.Row) -> history.Store:
        asked.append(row["job"])
        return real(row)

    monkeypatch.setattr(history, "_store", counted)
    store = history.store_of("job home", {"name": "command", "command": ["tar"]})
    found = history.saved(path, store)
    assert len(asked) == 3
    assert len(found) == 99
    assert found["7"] == (f"{2:016x}", f"{1:016x}")
    assert found["249"] == (f"{2:016x}",)


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


def test_jobs_steps(path: Path, add: Add) -> None:
    """An open run of steps is the job's whose steps they are, and no backup of it."""
    add("runs", **a_run(1, job="job home"))
    add("runs", **a_run(2, job="job other", label="other"))
    steps = {"verb": "run", "state": "planned", "outcome": None}
    add("runs", **a_run(3, job="run job home", label="run home", **steps))
    home, other = history.jobs(path)
    assert [run.id[-1] for run in home.open] == ["3"]
    assert (home.times, home.newest.id[-1], other.open) == (1, "1", ())


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

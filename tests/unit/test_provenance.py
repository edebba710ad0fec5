"""A journal that is older than what this machine has seen never acts; no crash makes it seem so."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from atomtx import aside, audit, copying, journalfile, provenance, system
from atomtx.errors import JournalError, JournalOlderError
from atomtx.journal import Journal
from atomtx.names import RunId
from atomtx.provenance import Watermark
from atomtx.statedir import prepare
from tests import hotjournal
from tests.runs import a_plan

UUID = "6f1c3a52-93d4-4f0e-8b1c-0d9f6f6f2a11"


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be on a machine of its own, with a /run."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}/run/atomtx:/another")
    return tmp_path / "run" / "atomtx"


@pytest.fixture
def state(tmp_path: Path, run_directory: Path) -> Path:
    return prepare(tmp_path / "state")


def work(state: Path, *, runs: int = 1) -> None:
    """Begin some runs, each in a commit."""
    with Journal.open(state) as journal:
        for _ in range(runs):
            run = RunId.new()
            journal.begin(a_plan(run=run, job=f"job of {run}"), [])


def restore(source: Path, target: Path) -> None:
    """Put *source* in the place of *target*, a file or a directory."""
    if target.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def counter(state: Path) -> int:
    return journalfile.counter(journalfile.header(state / journalfile.NAME))


def refused(state: Path) -> JournalOlderError:
    """Open the journal, which must be refused and left as it is."""
    before = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    with pytest.raises(JournalOlderError, match="older than what this machine has seen") as caught:
        Journal.open(state)
    assert {p: p.read_bytes() for p in state.rglob("*") if p.is_file()} == before
    assert caught.value.exit_status == 1
    assert "journal set-aside" in (caught.value.hint or "")
    assert "recover --scan" in (caught.value.hint or "")
    return caught.value


# -- rolled back -----------------------------------------------------------------------------


@pytest.mark.parametrize("rebooted", [False, True])
def test_file_replaced(state: Path, tmp_path: Path, run_directory: Path, rebooted: bool) -> None:
    """Promise 2: yesterday's copy of the file is refused, after a reboot as well."""
    work(state)
    shutil.copy(state / "journal.db", tmp_path / "yesterday")
    work(state, runs=3)
    newest = counter(state)
    if rebooted:
        shutil.rmtree(run_directory)
    restore(tmp_path / "yesterday", state / "journal.db")
    error = refused(state)
    assert f"its change counter is {counter(state)}" in error.message
    assert newest > counter(state)


def test_state_directory_replaced(state: Path, tmp_path: Path, run_directory: Path) -> None:
    """Promise 2: also the whole state directory of yesterday, by what is kept below /run."""
    work(state)
    shutil.copytree(state, tmp_path / "yesterday")
    work(state)
    restore(tmp_path / "yesterday", state)
    assert str(run_directory) in refused(state).message
    shutil.rmtree(run_directory)  # what nobody can know: all of it, and a reboot
    work(state)


def test_last_commit_lost(state: Path, tmp_path: Path) -> None:
    """One commit is enough to be older, as long as the machine has not been rebooted."""
    work(state)
    with Journal.open(state) as journal:
        shutil.copy(state / "journal.db", tmp_path / "before")
        with journal.change(journal.open_runs()[0]) as change:
            change.set(attempts=1)
        journal.open_runs()  # as every command looks once more at what it wrote
    assert counter(state) == journalfile.counter(journalfile.header(tmp_path / "before")) + 1
    restore(tmp_path / "before", state / "journal.db")
    refused(state)


def test_newer_put_back(state: Path, tmp_path: Path) -> None:
    """With the newer one put back, all is well: the refusal left nothing behind."""
    work(state)
    shutil.copy(state / "journal.db", tmp_path / "yesterday")
    work(state)
    shutil.copy(state / "journal.db", tmp_path / "today")
    restore(tmp_path / "yesterday", state / "journal.db")
    refused(state)
    restore(tmp_path / "today", state / "journal.db")
    work(state)


def test_set_aside_and_put_back(state: Path) -> None:
    """A journal that was set aside is the same one when it is put back, whatever ran meanwhile."""
    work(state, runs=3)
    path = state / "journal.db"
    with aside.writers_lock(state):
        old = aside.set_aside(path, aside.BY_HAND)
    work(state)
    with aside.writers_lock(state):
        new = aside.set_aside(path, aside.BY_HAND)
    old.rename(path)
    with Journal.open(state) as journal:
        assert len(journal.known()) == 3
    path.unlink()
    new.rename(path)
    work(state)


def test_backup_put_back(state: Path, tmp_path: Path) -> None:
    """A copy of our own is taken back while nothing is newer; after one more run it is refused."""
    work(state)
    copying.to_file(state / "journal.db", tmp_path / "copy")
    restore(tmp_path / "copy", state / "journal.db")
    work(state)
    restore(tmp_path / "copy", state / "journal.db")
    refused(state)


def test_readers(state: Path, tmp_path: Path) -> None:
    """Promise 2: it must not act, and may be read; `check` tells what it is."""
    work(state)
    shutil.copy(state / "journal.db", tmp_path / "yesterday")
    work(state)
    restore(tmp_path / "yesterday", state / "journal.db")
    report = audit.check(state)
    assert not report.ok
    assert "older than what this machine has seen" in report.findings[0].text


def test_another_journal(state: Path) -> None:
    """A new journal is not held against the counter of another one."""
    work(state, runs=20)
    (state / "journal.db").unlink()
    work(state)


def test_lost(state: Path) -> None:
    """A journal that is begun where there was another says so, once."""
    with Journal.open(state) as journal:
        assert journal.notes() == []
    work(state)
    (state / "journal.db").unlink()
    (note,) = [finding.text for finding in audit.check(state).findings]
    assert "set aside, or lost" in note
    with Journal.open(state) as journal:
        (note,) = journal.notes()
    assert "a new journal was begun" in note
    with Journal.open(state) as journal:
        assert journal.notes() == []


# -- which machine ---------------------------------------------------------------------------


@pytest.fixture
def ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that name the machine, the best one first; none is there."""
    found = [tmp_path / "machine-id", tmp_path / "hostid"]
    monkeypatch.setattr(system.here, "MACHINE_IDS", tuple(map(str, found)))
    return found


@pytest.mark.parametrize("nameless", ["", "\n", "uninitialized\n"])
def test_no_machine_id(ids: list[Path], nameless: str) -> None:
    """machine-id(5): an image's file is empty, or "uninitialized": it names no machine."""
    ids[0].write_text(nameless)
    assert provenance.machine_id() == ""
    ids[1].write_bytes(b"\x01\x02\x03\x04")
    by_host = provenance.machine_id()
    assert by_host
    ids[0].unlink()
    assert provenance.machine_id() == by_host
    ids[0].write_text("the one\n")
    assert provenance.machine_id() not in ("", by_host)


@pytest.mark.parametrize("nameless", ["", "uninitialized\n"])
def test_journal_of_no_machine(
    ids: list[Path], state: Path, monkeypatch: pytest.MonkeyPatch, nameless: str
) -> None:
    """A journal with the hash of such a file, as older ones have it, goes on where that is so."""
    older = hashlib.sha256(b"atomtx" + nameless.strip().encode()).hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(provenance, "machine_id", lambda: older)
        work(state)
    ids[0].write_text(nameless)
    ids[1].write_bytes(b"\x01\x02\x03\x04")
    work(state)
    ids[0].write_text("another one\n")
    with pytest.raises(JournalError, match="another machine"):
        Journal.open(state)


# -- no false alarm --------------------------------------------------------------------------


def test_commit_taken_back(state: Path) -> None:
    """A commit that a crash took back was never noted: the journal before it is the newest."""
    work(state)
    path = state / "journal.db"
    before = path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:  # killed before its commit was durable
        connection.execute("UPDATE runs SET label = 'not committed'")
        connection.commit()
    hotjournal.write(path, before)
    work(state)


def test_last_commit_after_a_power_cut(state: Path, run_directory: Path) -> None:
    """
    A commit that everybody saw, of a writer that was killed before it was durable, may be lost.

    SIGKILL comes after SQLite has ended the commit and before it is synced; another atomtx opens
    the journal, sees it, and notes what it sees; then the power is cut.
    """
    work(state)
    path = state / "journal.db"
    before = path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE runs SET label = 'seen'")
        connection.commit()
    Journal.open(state).close()
    hotjournal.write(path, before)
    shutil.rmtree(run_directory)
    with Journal.open(state) as journal:
        assert journal.open_runs()[0].label != "seen"


def test_checked_while_runs_go_on(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed and noted while a copy is checked is not held against the copy."""
    work(state)
    real = audit._look

    def look(source: copying.Source, report: audit.Report) -> frozenset[str]:
        work(state, runs=3)
        return real(source, report)

    monkeypatch.setattr(audit, "_look", look)
    monkeypatch.setattr(audit, "_of_folder", lambda *_: [])
    report = audit.check(state)
    assert report.findings == []
    assert report.change_counter < counter(state)


_KILLED = """
    import os, random, signal, sys, time
    from contextlib import suppress
    from pathlib import Path
    from atomtx.errors import StaleRunError
    from atomtx.journal import Journal
    from tests.runs import RUN, a_plan

    state, times = Path(sys.argv[1]), int(sys.argv[2])
    dice = random.Random(int(sys.argv[3]))

    def commit_for_ever():
        while True:
            with suppress(StaleRunError), Journal.open(state) as journal:
                for _ in range(5):
                    with journal.change(journal.load(RUN)) as change:
                        change.set(reason="x" * dice.randrange(20000))

    def start():
        child = os.fork()
        if child == 0:
            dice.seed(os.getpid())
            commit_for_ever()
        return child

    with Journal.open(state) as journal:
        journal.begin(a_plan(), [])
    revisions = [0]
    for _ in range(times):
        children = [start() for _ in range(2)]
        for child in children:
            time.sleep(dice.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with Journal.open(state) as journal:  # beside the other child
                revisions.append(journal.load(RUN).rev)
    assert revisions == sorted(revisions)
    print(revisions[-1])
"""


def test_killed_at_any_moment(state: Path, run_directory: Path) -> None:
    """Promise 5: no kill, at whatever moment, makes a journal look older than it is; 60 kills."""
    argv = [sys.executable, "-c", textwrap.dedent(_KILLED), str(state), "30", "7"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 60
    with Journal.open(state) as journal:
        kept = journal._watermark
        assert kept
        assert kept.newer_than(counter(state)) is None
        assert kept.newer_than(counter(state) - 1)


# -- the watermark ---------------------------------------------------------------------------


@pytest.fixture
def watermark(state: Path) -> Watermark:
    return Watermark(state, UUID)


def kept(file: Path) -> int:
    return int(file.read_bytes()[:10])


def test_kept_in_two_places(state: Path, run_directory: Path, watermark: Watermark) -> None:
    """The counter is kept in both places, for root alone; on the disk it stays behind by one."""
    watermark.note(7)
    assert kept(run_directory / UUID) == 7
    assert kept(state / "watermarks" / UUID) == 6
    for folder in (run_directory, state / "watermarks"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / UUID).stat().st_mode & 0o777 == 0o600


def test_only_grows(run_directory: Path, state: Path, watermark: Watermark) -> None:
    """What another process has noted meanwhile is not lowered."""
    watermark.note(7)
    Watermark(state, UUID).note(9)
    watermark.note(8)
    assert kept(run_directory / UUID) == 9
    assert watermark.newer_than(8) == (run_directory / UUID, 9)
    assert watermark.newer_than(9) is None


@pytest.mark.parametrize(
    ("seen", "now", "older"),
    [
        (5, 5, False),
        (5, 4, True),
        (5, 6, False),
        (2**32 - 1, 0, False),
        (0, 2**32 - 1, True),
        (2**32 - 3, 12, False),
        (12, 2**32 - 3, True),
        (2**31 + 5, 6, True),
    ],
)
def test_begins_again_at_zero(watermark: Watermark, seen: int, now: int, older: bool) -> None:
    """The counter has 32 bits: after the last number comes 0, and that is newer."""
    watermark.note(seen)
    assert bool(watermark.newer_than(now)) is older


@pytest.mark.parametrize(
    "record",
    [b"", b"\0" * 20, b"0000000009", b"9999999999 00000000\n", b"garbage\n", b"0000000009 \xff"],
)
def test_torn_note(state: Path, run_directory: Path, watermark: Watermark, record: bytes) -> None:
    """A note that a power cut has torn is none: weaker, and no false alarm; the next one stands."""
    watermark.note(20)
    for folder in (run_directory, state / "watermarks"):
        (folder / UUID).write_bytes(record)
    assert watermark.newer_than(1) is None
    watermark.note(21)
    assert watermark.newer_than(1) == (state / "watermarks" / UUID, 20)


def test_note_of_another(run_directory: Path, watermark: Watermark, state: Path) -> None:
    """A note that was copied from another journal's does not count."""
    other = UUID.replace("6f", "7f")
    Watermark(state, other).note(99)
    shutil.copy(run_directory / other, run_directory / UUID)
    assert watermark.newer_than(1) is None


def test_no_run_directory(
    state: Path, tmp_path: Path, watermark: Watermark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without /run has the other place, and that is no trouble."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "absent" / "atomtx"))
    lonely = Watermark(state, UUID)
    lonely.note(7)
    assert lonely.trouble() == []
    assert lonely.newer_than(5) == (state / "watermarks" / UUID, 6)


def test_trouble(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be kept does not stop a run, and is told."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "file"))
    with Journal.open(state) as journal:
        journal.begin(a_plan(), [])
        (note,) = journal.notes()
    assert "rolled back may go unnoticed" in note
    assert str(tmp_path / "file") in note


def test_unreadable(state: Path, run_directory: Path) -> None:
    """Where it cannot be told whether a journal was rolled back, it does not act."""
    work(state)
    (file,) = run_directory.iterdir()
    file.unlink()
    file.mkdir()
    with pytest.raises(JournalError, match="cannot tell whether") as caught:
        Journal.open(state)
    assert str(file) in (caught.value.hint or "")


def test_uuid_is_no_path(state: Path) -> None:
    """What a damaged journal calls itself is never used as a path."""
    work(state)
    with closing(sqlite3.connect(state / "journal.db")) as connection:
        connection.execute("UPDATE journals SET uuid = '../../../etc/passwd'")
        connection.commit()
    with pytest.raises(JournalError, match="no uuid"):
        Journal.open(state)


def test_run_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's is below /run; another user, who can make no backup, has none."""
    assert provenance.run_directory({"RUNTIME_DIRECTORY": "/run/a:/run/b"}) == Path("/run/a")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert provenance.run_directory({}) == Path("/run/atomtx")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert provenance.run_directory({}) is None


def test_own_tests_keep_away() -> None:
    """The tests write nothing below the machine's own /run."""
    assert provenance.run_directory() not in (None, system.here.RUN)


def test_noted_is_committed(state: Path, run_directory: Path) -> None:
    """While a change is open, what is noted is the commit before it."""
    work(state)
    with Journal.open(state) as journal:
        run = journal.open_runs()[0]
        with journal.change(run) as change:
            change.set(attempts=1)
            (file,) = run_directory.iterdir()
            assert kept(file) == counter(state)

"""A damaged journal is known as such, kept whole under another name, and told."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from atomtx import aside, audit, database, history, journalfile
from atomtx.errors import BusyError, JournalDamagedError, JournalError, JournalNewerError
from atomtx.journal import Journal
from atomtx.statedir import prepare
from tests import hotjournal
from tests.runs import OTHER, RUN, a_plan

Damage = Callable[[bytes], bytes]
DAMAGES = [
    pytest.param(lambda data: b"not a database, but a letter" * 200, id="letter"),
    pytest.param(lambda data: data[:50], id="short"),
    pytest.param(lambda data: data[:100] + b"\xff" * (len(data) - 100), id="pages"),
    pytest.param(lambda data: data[: len(data) // 2], id="half"),
    pytest.param(lambda data: bytes(4096) + data[4096:], id="header"),
]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with a journal that has a run."""
    state = prepare(tmp_path / "state")
    with Journal.open(state) as journal:
        journal.begin(a_plan(), [])
    return state


@pytest.fixture
def path(state: Path) -> Path:
    return state / journalfile.NAME


def ruin(path: Path, damage: Damage = lambda data: data[:4096] + os.urandom(len(data))) -> bytes:
    path.write_bytes(damage(path.read_bytes()))
    return path.read_bytes()


def ruin_schema(path: Path) -> bytes:
    """Make the b-trees unreadable, and leave the header as it is."""
    return ruin(path, lambda data: data[:100] + b"\xff" * (len(data) - 100))


@pytest.mark.parametrize("damage", DAMAGES)
def test_set_aside(state: Path, path: Path, damage: Damage) -> None:
    """A damaged journal is kept, not a byte changed, under a name that the error tells."""
    before = ruin(path, damage)
    with pytest.raises(JournalDamagedError, match="damaged") as caught:
        Journal.open(state)
    (kept,) = aside.damaged(state)
    assert kept.read_bytes() == before
    assert kept.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    assert caught.value.exit_status == 1
    assert f"set aside as {kept}" in (caught.value.hint or "")
    assert "recover --scan" in (caught.value.hint or "")


@pytest.mark.parametrize("damage", DAMAGES)
def test_left_by_readers(state: Path, path: Path, damage: Damage) -> None:
    """Who only reads, and `--dry-run`, changes nothing of a damaged journal, nor its name."""
    before = ruin(path, damage)
    looks: list[Callable[[], object]] = [
        lambda: Journal.open(state, keep=True),
        lambda: history.runs(path),
        lambda: history.open_runs(path),
    ]
    for look in looks:
        with pytest.raises(JournalDamagedError, match="damaged") as caught:
            look()
        assert "journal set-aside" in (caught.value.hint or "")
    assert not audit.check(state).ok
    assert path.read_bytes() == before
    assert aside.damaged(state) == []


def test_begun_anew(state: Path, path: Path) -> None:
    """The next command begins a new journal and is told of the old one, as long as it is there."""
    ruin(path)
    with pytest.raises(JournalDamagedError):
        Journal.open(state)
    (kept,) = aside.damaged(state)
    for _ in range(2):
        with Journal.open(state) as journal:
            assert journal.known() == []
            *_, note = journal.notes()
            assert str(kept) in note
    kept.rename(state.parent / "elsewhere")
    with Journal.open(state) as journal:
        assert journal.notes() == []


def test_damage_at_work(state: Path, path: Path) -> None:
    """Damage that is met in a transaction sets the journal aside when the block ends."""
    journal = Journal.open(state)
    before = ruin_schema(path)
    with pytest.raises(JournalDamagedError, match="set aside as"), journal:
        journal.load(RUN)
    (kept,) = aside.damaged(state)
    assert kept.read_bytes() == before
    assert not path.exists()
    with aside.writers_lock(state):  # nothing holds it any more
        pass


def test_damage_at_work_kept(state: Path, path: Path) -> None:
    """Not so for `--dry-run`."""
    journal = Journal.open(state, keep=True)
    before = ruin_schema(path)
    with pytest.raises(JournalDamagedError), journal:
        journal.load(RUN)
    assert path.read_bytes() == before


def test_busy(state: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another atomtx is at work with it, a damaged journal is left, and that is said."""
    monkeypatch.setattr(aside, "_LOCK_WAIT_S", 0.1)
    before = ruin(path)
    lock = os.open(state / journalfile.LOCK, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        with pytest.raises(JournalDamagedError, match="another atomtx is at work"):
            Journal.open(state)
    finally:
        os.close(lock)
    assert path.read_bytes() == before
    assert aside.damaged(state) == []


def test_looked_at_again(state: Path, path: Path) -> None:
    """What was damaged and is not any more, as another process set it aside first, is left."""
    found = JournalDamagedError(path, "seen by one that was slow")
    told = database.set_damaged_aside(found, path)
    assert "no damage" in (told.hint or "")
    path.unlink()
    told = database.set_damaged_aside(found, path)
    assert "no damage" in (told.hint or "")
    assert aside.damaged(state) == []


def test_two_at_once(state: Path, path: Path) -> None:
    """Of two that find the damage, one sets it aside; the new journal of a third one stays."""
    ruin(path)
    journalfile_error = pytest.raises(JournalDamagedError)
    with journalfile_error as first:
        Journal.open(state, keep=True)
    with pytest.raises(JournalDamagedError, match="set aside as"):
        Journal.open(state)
    with Journal.open(state) as journal:
        journal.begin(a_plan(run=OTHER), [])
    database.set_damaged_aside(first.value, path)
    assert len(aside.damaged(state)) == 1
    with Journal.open(state) as journal:
        assert journal.known() == [OTHER]


def test_not_renamed(state: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be renamed it stays, whole, and that is said."""
    before = ruin(path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(JournalDamagedError, match=r"left there: .*Read-only file system"):
        Journal.open(state)
    assert path.read_bytes() == before


class _Failing(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sqlite_errorname = name


@pytest.mark.parametrize("name", ["SQLITE_IOERR_READ", "SQLITE_CANTOPEN", "SQLITE_BUSY", "", "X"])
def test_no_damage(path: Path, name: str) -> None:
    """A disk that fails, or a file that cannot be opened, is not damage."""
    assert not journalfile.is_damage(_Failing(name))
    assert not isinstance(database._error(path, _Failing(name)), JournalDamagedError)
    assert not isinstance(journalfile.read_error(path, _Failing(name)), JournalDamagedError)


@pytest.mark.parametrize("name", ["SQLITE_CORRUPT", "SQLITE_CORRUPT_INDEX", "SQLITE_NOTADB"])
def test_old_sqlite(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SQLite that does not know our tables calls them malformed: that is no damage."""
    assert isinstance(database._error(path, _Failing(name)), JournalDamagedError)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    assert not isinstance(database._error(path, _Failing(name)), JournalDamagedError)


def test_disk_that_fails(state: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error on the header is told as such, and nothing is set aside."""

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(JournalError, match="Input/output error") as caught:
            Journal.open(state)
    assert not isinstance(caught.value, JournalDamagedError)
    assert aside.damaged(state) == []
    with Journal.open(state) as journal:
        assert journal.known() == [RUN]


# -- a power cut in mid-commit ---------------------------------------------------------------


@pytest.fixture
def torn(path: Path) -> bytes:
    """Cut a commit off after its pages were written, its first one torn; return what was before."""
    before = path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE runs SET label = 'not committed'")
        connection.commit()
    after = path.read_bytes()
    assert after != before
    hotjournal.write(path, before)
    path.write_bytes(os.urandom(4096) + after[4096:])
    return before


def test_torn(state: Path, path: Path, torn: bytes) -> None:
    """Promise 10: a torn header is no damage where SQLite can take the commit back."""
    with Journal.open(state) as journal:
        assert journal.load(RUN).label == "tank/a, tank/a/b"
    assert aside.damaged(state) == []
    assert path.read_bytes() == torn


def test_torn_for_readers(path: Path, torn: bytes) -> None:
    """Also for the one that only reads, and comes first."""
    assert [run.label for run in history.runs(path)] == ["tank/a, tank/a/b"]
    assert path.read_bytes() == torn


def test_torn_without_the_other_half(state: Path, path: Path, torn: bytes) -> None:
    """Without what would mend it, a torn header is damage; the check above can fail."""
    journalfile.rollback_journal(path).unlink()
    with pytest.raises(JournalDamagedError):
        Journal.open(state)


@pytest.mark.parametrize("head", [b"", b"\0" * 28])
def test_torn_with_a_cold_journal(state: Path, path: Path, torn: bytes, head: bytes) -> None:
    """Nor does a rollback journal mend anything whose commit has ended: its header is zeros."""
    rollback = journalfile.rollback_journal(path)
    rollback.write_bytes(head + rollback.read_bytes()[len(head) :] if head else b"")
    with pytest.raises(JournalDamagedError):
        Journal.open(state)


def test_torn_upgrade(state: Path, path: Path) -> None:
    """A newer atomtx that was killed in its upgrade left this one's journal: it is not refused."""
    before = path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {journalfile.SCHEMA_VERSION + 1}")
    with pytest.raises(JournalNewerError):
        Journal.open(state)
    hotjournal.write(path, before)
    with Journal.open(state) as journal:
        assert journal.known() == [RUN]


def test_set_aside_with_its_other_half(state: Path, path: Path, torn: bytes) -> None:
    """Set aside in mid-commit, the two files stay together: put back, the commit is taken back."""
    with aside.writers_lock(state):
        kept = aside.set_aside(path, aside.BY_HAND)
    assert journalfile.is_hot(kept)
    assert not journalfile.rollback_journal(path).exists()
    Journal.open(state).close()
    for name in (path, journalfile.rollback_journal(path)):
        name.unlink(missing_ok=True)
    for line in aside.way_back(kept, path):
        assert os.system(line) == 0
    with Journal.open(state) as journal:
        assert journal.load(RUN).label == "tank/a, tank/a/b"
    assert path.read_bytes() == torn


@pytest.mark.parametrize("steps", [1, 2])
def test_killed_while_setting_aside(
    state: Path, path: Path, torn: bytes, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: a kill between the renames parts no journal from what would mend it."""
    done = 0

    def sync(_: Path) -> None:
        nonlocal done
        done += 1
        if done == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(aside, "sync_directory", sync)
    with pytest.raises(KeyboardInterrupt), aside.writers_lock(state):
        aside.set_aside(path, aside.BY_HAND)
    (where,) = [
        p for p in state.glob("journal.db*") if p.read_bytes()[4096:] and p.name[-8:] != "-journal"
    ]
    if where == path:  # not renamed yet
        with Journal.open(state) as journal:
            assert journal.known() == [RUN]
        return
    with Journal.open(state) as journal:  # a new one, which finds the old rollback journal there
        journal.begin(a_plan(run=OTHER), [])
    with closing(sqlite3.connect(where)) as connection:
        assert connection.execute("SELECT label FROM runs").fetchall() == [("tank/a, tank/a/b",)]
    assert where.read_bytes() == torn


def test_names_are_free(state: Path, path: Path) -> None:
    """Two that are set aside in one second have two names; nothing is overwritten."""
    kept = []
    for _ in range(3):
        Journal.open(state).close()
        with aside.writers_lock(state):
            kept.append(aside.set_aside(path, aside.BY_HAND))
    assert len(set(kept)) == 3
    assert all(name.exists() for name in kept)


def test_lock(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writers' lock is not had while a journal is open, and is given back."""
    monkeypatch.setattr(aside, "_LOCK_WAIT_S", 0.1)
    with Journal.open(state), pytest.raises(BusyError), aside.writers_lock(state):
        raise AssertionError
    with aside.writers_lock(state), pytest.raises(BusyError), aside.writers_lock(state):
        raise AssertionError
    with aside.writers_lock(state):
        pass

"""A copy of the journal is of one instant, whole, private, durable; the journal is untouched."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from atomtx import copying, journalfile
from atomtx.errors import (
    AtomtxError,
    JournalDamagedError,
    JournalError,
    JournalFullError,
    UserError,
)
from atomtx.journal import Journal
from atomtx.statedir import prepare
from tests import hotjournal
from tests.runs import OTHER, RUN, a_plan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with a run."""
    state = prepare(tmp_path / "a state?dir%20#")
    with Journal.open(state) as journal:
        journal.begin(a_plan(), [])
    return state / journalfile.NAME


@pytest.fixture
def hot(path: Path) -> Path:
    """A journal whose last commit was cut off by a kill."""
    before = path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE runs SET label = 'not committed'")
        connection.commit()
    hotjournal.write(path, before)
    return path


def files(path: Path) -> dict[str, tuple[bytes, int]]:
    """Return what is in the state directory's files, and when it was written."""
    found = (file for file in path.parent.iterdir() if file.is_file())
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


def ask(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(journalfile.uri(path, "ro"), uri=True)) as connection:
        return connection.execute(sql).fetchall()


# -- reading ---------------------------------------------------------------------------------


def test_nothing_is_changed(path: Path) -> None:
    """A look at a journal changes no byte of it."""
    before = files(path)
    with copying.private(path) as source:
        assert source
        assert source.connection.execute("SELECT id FROM runs").fetchall() == [(RUN,)]
        assert not source.half_made
    assert files(path) == before


def test_half_made_change(hot: Path) -> None:
    """Nor where a killed writer left a change: it is taken back in the copy alone."""
    before = files(hot)
    with copying.private(hot) as source:
        assert source
        assert source.half_made
        labels = source.connection.execute("SELECT label FROM runs").fetchall()
    assert labels == [("tank/a, tank/a/b",)]
    assert files(hot) == before


def test_torn_header(hot: Path) -> None:
    """Also where the first page is torn, and only the rollback journal has it whole."""
    hot.write_bytes(os.urandom(4096) + hot.read_bytes()[4096:])
    before = files(hot)
    with copying.private(hot) as source:
        assert source
        assert source.connection.execute("SELECT id FROM runs").fetchall() == [(RUN,)]
        assert journalfile.judge(hot, source.header)
    assert files(hot) == before


def test_writer_goes_on(path: Path) -> None:
    """While somebody works on a copy, a run is written to the journal."""
    with copying.private(path) as source, Journal.open(path.parent) as journal:
        journal.begin(a_plan(run=OTHER, job="another"), [])
        assert source
        assert source.connection.execute("SELECT id FROM runs").fetchall() == [(RUN,)]


@pytest.mark.parametrize("content", [None, b""])
def test_no_journal(path: Path, content: bytes | None) -> None:
    """A journal that is not there, or was never filled, is none; looking makes none."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with copying.private(path) as source:
        assert source is None
    assert path.exists() is (content is not None)


# -- a copy to keep --------------------------------------------------------------------------


def test_to_file(path: Path, tmp_path: Path) -> None:
    """A copy has every row and the same change counter, is the owner's alone, and stands alone."""
    before = files(path)
    assert copying.to_file(path, tmp_path / "copy") == 1
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["copy"]
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    assert journalfile.header(tmp_path / "copy")[24:28] == journalfile.header(path)[24:28]
    assert ask(tmp_path / "copy", "PRAGMA integrity_check") == [("ok",)]
    for table in ("journals", "runs", "volumes", "steps"):
        query = f"SELECT * FROM {table}"
        assert ask(tmp_path / "copy", query) == ask(path, query)
    assert files(path) == before


def test_to_file_of_a_half_made_change(hot: Path, tmp_path: Path) -> None:
    """A copy of a journal with a half-made change is one without it."""
    copying.to_file(hot, tmp_path / "copy")
    assert ask(tmp_path / "copy", "SELECT label FROM runs") == [("tank/a, tank/a/b",)]


def test_exists(path: Path, tmp_path: Path) -> None:
    """Nothing is ever overwritten, a dangling link not either, nor what came meanwhile."""
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with pytest.raises(UserError, match="exists"):
            copying.to_file(path, tmp_path / name)
    partial = tmp_path / "partial"
    partial.write_text("new")
    with pytest.raises(UserError, match="exists"):
        copying._publish(partial, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    assert os.readlink(tmp_path / "link") == "nowhere"


def test_no_links(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links, as on a stick, will do."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert copying.to_file(path, tmp_path / "copy") == 1
    assert ask(tmp_path / "copy", "SELECT id FROM runs") == [(RUN,)]


def test_no_room(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that could not be made durable is an error, and nothing of it is left."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(JournalFullError, match=r"no space left in .* for a copy") as caught:
        copying.to_file(path, tmp_path / "copy")
    assert re.fullmatch(r"make room for .* KiB there", caught.value.hint or "")
    assert [file for file in tmp_path.iterdir() if file.is_file()] == []


def test_planted(path: Path, tmp_path: Path) -> None:
    """Nothing that somebody else may have put in the directory is written to, or taken away."""
    (tmp_path / "victim").write_text("mine")
    planted = tmp_path / f".copy.{os.getpid()}.partial"
    planted.symlink_to("victim")
    copying.to_file(path, tmp_path / "copy")
    assert planted.readlink() == Path("victim")
    with closing(sqlite3.connect(path)) as journal:
        for name in ("victim", planted.name):
            with pytest.raises(FileExistsError):
                copying.fill(tmp_path / name, journal, 1)
    assert (tmp_path / "victim").read_text() == "mine"
    assert planted.is_symlink()


def test_no_directory(path: Path, tmp_path: Path) -> None:
    """A directory that is not there is one clear error."""
    with pytest.raises(AtomtxError, match="No such file or directory"):
        copying.to_file(path, tmp_path / "absent" / "copy")


@pytest.mark.parametrize("at", [4096, 100])
def test_damaged(path: Path, tmp_path: Path, at: int) -> None:
    """A damaged journal is not copied in silence: it is told, and no copy is left."""
    data = path.read_bytes()
    path.write_bytes(data[:at] + b"\xff" * (len(data) - at))
    with pytest.raises(JournalDamagedError):
        copying.to_file(path, tmp_path / "copy")
    assert [file for file in tmp_path.iterdir() if file.is_file()] == []


def test_no_journal_to_copy(path: Path, tmp_path: Path) -> None:
    """Where there is no journal there is no copy."""
    path.unlink()
    with pytest.raises(UserError, match="no journal"):
        copying.to_file(path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("after", [1, 2])
def test_another_comes_between(hot: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """
    Where another atomtx goes on with the journal while its files are copied, both are again.

    Half a copy of the old rollback journal must not be used on the new database.
    """
    real = shutil.copyfile
    copied: list[Path] = []

    def copyfile(source: Path, target: Path) -> None:
        real(source, target)
        copied.append(source)
        if len(copied) == after:
            with closing(sqlite3.connect(hot)) as connection:
                connection.execute("UPDATE runs SET label = 'later'")
                connection.commit()

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with copying.private(hot) as source:
        assert source
        labels = source.connection.execute("SELECT label FROM runs").fetchall()
        assert source.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert labels == [("later",)]
    assert copied.count(hot) == 2


def test_changes_all_the_time(hot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they never agree it is given up, and nothing false is told."""
    numbers = iter(range(1000))
    monkeypatch.setattr(copying, "_stamp", lambda _: (next(numbers), 0, 0))
    with pytest.raises(JournalError, match="changes all the time"), copying.private(hot):
        raise AssertionError

"""
Copies of the journal, each as it was at one instant, while others write it.

A reader of the journal makes every commit wait, so whoever needs long, or writes to a slow
terminal or disk, works on a copy.  The journal itself is opened read-only and never changed, not
even where a killed writer left a change half made: then both its files are copied, and the change
is taken back in the copy.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import journalfile
from .errors import (
    AtomtxError,
    JournalDamagedError,
    JournalError,
    JournalFullError,
    UserError,
)
from .statedir import sync_directory
from .words import size

BUSY_TIMEOUT_S = 5.0
_COPY_TRIES = 5
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # vfat, exfat, some of FUSE


@dataclass(frozen=True)
class Source:
    """A journal in a read transaction: nothing is written to it as long as it is open."""

    connection: sqlite3.Connection
    header: bytes
    half_made: bool  # a killed writer left a change half made; it is taken back here


@contextmanager
def source(path: Path) -> Iterator[Source | None]:
    """
    Open a journal for reading alone; None where there is none, or one that was never filled.

    Raises what `journalfile.judge` raises, and JournalDamagedError where SQLite finds damage,
    in the block as well.  Not while this process has a transaction open on it.
    """
    with _at_rest(path) as place, journalfile.translated(path):
        try:
            header = journalfile.HeaderFile(place)
        except FileNotFoundError:
            yield None
            return
        with closing(header):  # after the connection: see journalfile.check
            mode = "ro" if place == path else "rw"
            connection = sqlite3.connect(
                journalfile.uri(place, mode), uri=True, timeout=BUSY_TIMEOUT_S
            )
            with closing(connection):
                connection.isolation_level = None
                connection.execute("BEGIN")
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                head = header.read()
                filled = journalfile.judge(path, head)
                yield Source(connection, head, half_made=place != path) if filled else None


@contextmanager
def private(path: Path, look: Callable[[Source], None] = lambda _: None) -> Iterator[Source | None]:
    """
    Give a copy that is nobody else's, and goes away; None as `source` does.

    *look* sees the journal itself before it is copied, while nothing can be written to it.
    """
    with closing(sqlite3.connect("", isolation_level=None)) as copy:
        with source(path) as found:
            if found:
                look(found)
                found.connection.backup(copy)
        with journalfile.translated(path):
            yield Source(copy, found.header, found.half_made) if found else None


def to_file(path: Path, target: Path) -> int:
    """
    Copy a journal to a new file, durable and private; return how many runs it has.

    Raises UserError where *target* exists, or there is no journal; JournalDamagedError, and
    leaves no copy, where the copy is damaged, as it then is a copy of damage.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} exists", hint="name a file that does not exist yet")
    # Others may write to its directory: by a name that can be guessed they could lend us a file.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        with source(path) as found:
            if found is None:
                raise UserError(f"there is no journal at {path}")
            fill(partial, found.connection, journalfile.counter(found.header))
        runs = _proven(path, partial)
        _publish(partial, target)
    except OSError as exc:
        raise AtomtxError(f"cannot write {target}: {exc.strerror}") from exc
    finally:
        partial.unlink(missing_ok=True)
    return runs


def fill(partial: Path, connection: sqlite3.Connection, counter: int) -> None:
    """
    Copy the database of a connection into a new file, durable and for nobody else to read.

    The copy has the original's change counter: SQLite begins a new one, and a journal that is
    put back from it would be taken for an older one.  On an error nothing of it is left; raises
    JournalFullError where there is no room for it, FileExistsError where something has its name.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o600)
    try:
        with closing(sqlite3.connect(partial)) as target:
            connection.backup(target)
        journalfile.set_counter(descriptor, counter)
        os.fsync(descriptor)
    except BaseException as exc:
        for path in (partial, journalfile.rollback_journal(partial)):
            with suppress(OSError):  # the first error is the one to tell
                path.unlink()
        if journalfile.is_full(partial.parent, exc):
            raise _no_room(partial.parent, connection) from exc
        if isinstance(exc, sqlite3.DatabaseError) and not journalfile.is_damage(exc):
            raise JournalError(f"cannot copy the journal to {partial}: {exc}") from exc
        raise  # also damage: it is of the original
    finally:
        os.close(descriptor)


def _no_room(folder: Path, connection: sqlite3.Connection) -> JournalFullError:
    pages, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
    )
    return JournalFullError(
        f"no space left in {folder} for a copy of the journal",
        hint=f"make room for {size(pages * page_bytes)} there",
    )


def _proven(path: Path, copy: Path) -> int:
    """Return how many runs a copy has; JournalDamagedError for one that is not whole."""
    with (
        journalfile.translated(path),
        closing(sqlite3.connect(journalfile.uri(copy, "ro"), uri=True)) as connection,
    ):
        (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            raise JournalDamagedError(path, said)
        runs: int = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    return runs


def _publish(partial: Path, target: Path) -> None:
    """Give the finished file its name, which must be free."""
    try:
        os.link(partial, target)
    except FileExistsError as exc:
        raise UserError(f"{target} exists", hint="name a file that does not exist yet") from exc
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        partial.rename(target)
    sync_directory(target.parent)


@contextmanager
def _at_rest(path: Path) -> Iterator[Path]:
    """Give the journal, or a copy of both its files where a killed writer left a change."""
    if not _is_left_hot(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="atomtx-") as folder:
        try:
            copy = _copy_both(path, Path(folder))
        except OSError as exc:
            raise JournalError(
                f"cannot copy the journal {path} to {folder}: {exc.strerror}",
                hint="set TMPDIR to a directory with room",
            ) from exc
        yield copy


def _is_left_hot(path: Path) -> bool:
    """Tell whether a change is half made and its writer gone: SQLite knows by its locks."""
    if not journalfile.is_hot(path):
        return False
    try:
        with closing(
            sqlite3.connect(journalfile.uri(path, "ro"), uri=True, timeout=BUSY_TIMEOUT_S)
        ) as connection:
            connection.execute("PRAGMA user_version")
    except sqlite3.DatabaseError as exc:
        return journalfile.error_name(exc) == "SQLITE_READONLY_ROLLBACK"
    return False


def _copy_both(path: Path, folder: Path) -> Path:
    """Copy a journal and its rollback journal; again, where a reader took the change back."""
    files = (path.resolve(), journalfile.rollback_journal(path.resolve()))
    for _ in range(_COPY_TRIES):
        before = [_stamp(file) for file in files]
        for file in files:
            (folder / file.name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(file, folder / file.name)
        if before == [_stamp(file) for file in files]:
            return folder / files[0].name
    raise JournalError(f"the journal {path} changes all the time", hint="try again")


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        info = file.stat()
    except FileNotFoundError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size

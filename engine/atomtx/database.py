"""
The journal's database: its connections, its upgrade, its errors as ours.

The settings of a connection decide what a power cut can take; `journalfile.PRAGMAS` has them.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import StaticPool

from . import journalfile, locks, schema
from .errors import JournalError, JournalFullError, WaitingError
from .statedir import sync_directory

BUSY_TIMEOUT_MS = 30_000
_FULL_BYTES = 65_536  # less room than this is none
UPGRADE_WAIT_S = 10.0


def make_engine(path: Path, *, foreign_keys: bool = True) -> Engine:
    """Return an engine whose transactions are SQLite's own, DDL included."""
    arguments: dict[str, Any] = {"isolation_level": None, "timeout": BUSY_TIMEOUT_MS / 1000}
    if hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"):  # Python 3.12; its default will change
        arguments["autocommit"] = sqlite3.LEGACY_TRANSACTION_CONTROL
    engine = create_engine(
        URL.create("sqlite", database=os.fspath(path)), connect_args=arguments, poolclass=StaticPool
    )

    @event.listens_for(engine, "connect")
    def _settings(connection: sqlite3.Connection, _: object) -> None:
        for pragma in journalfile.PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _version(engine: Engine) -> int:
    with engine.connect() as connection:
        version: int = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    return version


def bring_up_to_date(path: Path, lock: int) -> Engine:
    """Return an engine on an up-to-date journal; the shared lock is held on return."""
    fcntl.flock(lock, fcntl.LOCK_SH)
    if journalfile.check(path):
        engine = make_engine(path)
        with closed_on_error(engine):
            if _version(engine) == journalfile.SCHEMA_VERSION:
                return engine
        engine.dispose()
    if _lock_for_upgrade(path, lock):
        _upgrade(path)
    # flock(2): a lock is not converted in one step, so look again under the shared one.
    return bring_up_to_date(path, lock)


def _upgrade(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    engine = make_engine(path, foreign_keys=False)
    with closed_on_error(engine):
        if (found := _version(engine)) < journalfile.SCHEMA_VERSION:
            if found:
                _back_up(engine, path, found)
            schema.upgrade(engine)
    engine.dispose()
    sync_directory(path.parent)


@contextmanager
def closed_on_error(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


def _lock_for_upgrade(path: Path, lock: int) -> bool:
    """Take the writers' lock alone; False where another process has upgraded it meanwhile."""
    locked = False

    def try_lock() -> bool:
        nonlocal locked
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        return locked or journalfile.is_current(path)

    if not locks.wait_until(try_lock, UPGRADE_WAIT_S):
        raise WaitingError(
            f"the journal {path} must be upgraded, and another atomtx is using it",
            hint="try again when it has ended; `atomtx status` shows it",
        )
    return locked


def _back_up(engine: Engine, path: Path, version: int) -> None:
    """Copy the journal beside itself, durable, before it is upgraded."""
    copy = path.with_name(f"{path.name}.v{version}")
    partial = copy.with_name(copy.name + ".partial")
    # Emptied, should an earlier try have left one, and for nobody else to read.
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
    os.close(os.open(partial, flags, 0o600))
    with engine.connect() as connection, closing(sqlite3.connect(partial)) as target:
        source = connection.connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        source.backup(target)
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    os.fsync(descriptor)
    os.close(descriptor)
    partial.replace(copy)
    sync_directory(path.parent)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours; a violated constraint stays what it is."""
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as exc:
        raise _error(path, exc.orig) from exc
    except sqlite3.DatabaseError as exc:
        raise _error(path, exc) from exc


def _is_full(path: Path) -> bool:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize < _FULL_BYTES


def _error(path: Path, cause: BaseException | None) -> JournalError:
    name = getattr(cause, "sqlite_errorname", "") or ""
    # SQLite calls a quota that is used up (EDQUOT) an error of the disk.
    if name == "SQLITE_FULL" or (name == "SQLITE_IOERR_WRITE" and _is_full(path)):
        return JournalFullError(
            f"no space left for the journal {path}", hint="make room on its disk"
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return JournalError(
            f"the journal {path} is damaged: {cause}",
            hint=f"nothing was changed; move {path} aside and run `atomtx recover --scan`",
        )
    return JournalError(f"the journal {path} cannot be used: {cause}")

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

from . import aside, copying, journalfile, locks, provenance, schema
from .errors import (
    BusyError,
    JournalDamagedError,
    JournalError,
    JournalFullError,
    WaitingError,
)
from .statedir import sync_directory

# SQLite's waiters poll, so one of many may lose every time: 20 backups at once on a slow machine
# starved some for over 30 s.  No transaction waits for anything, so the queue ends.
BUSY_TIMEOUT_MS = 600_000
UPGRADE_WAIT_S = 10.0
RESERVE_BYTES = 65_536  # free pages, so that a full disk does not stop an undo from being recorded


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
                _prove(engine, path)
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

    def is_settled() -> bool:
        nonlocal locked
        locked = locks.try_lock(lock, fcntl.LOCK_EX)
        return locked or journalfile.is_current(path)

    if not locks.wait_until(is_settled, UPGRADE_WAIT_S):
        raise WaitingError(
            f"the journal {path} must be upgraded, and another atomtx is using it",
            hint="try again when it has ended; `atomtx status` shows it",
        )
    return locked


def _prove(engine: Engine, path: Path) -> None:
    """Refuse a journal that must not act here before it is changed; the lock is held alone."""
    with engine.connect() as connection:
        row = connection.exec_driver_sql("SELECT uuid, machine_id FROM journals").one_or_none()
    if row:
        counter = journalfile.counter(journalfile.header(path))
        provenance.prove(path, row.uuid, row.machine_id, counter)


def _back_up(engine: Engine, path: Path, version: int) -> None:
    """Copy the journal beside itself, durable, before it is upgraded; the lock is held alone."""
    copy = path.with_name(f"{path.name}.v{version}")
    partial = copy.with_name(copy.name + ".partial")
    counter = journalfile.counter(journalfile.header(path))
    with engine.connect() as connection:
        source = connection.connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        partial.unlink(missing_ok=True)  # should an earlier try have left one
        try:
            copying.fill(partial, source, counter)
        except JournalFullError as exc:
            hint = f"{exc.hint}: an older journal is copied before it is upgraded"
            raise JournalFullError(exc.message, hint=hint) from exc
    partial.replace(copy)
    sync_directory(path.parent)


def reserve(engine: Engine, path: Path) -> None:
    """See that the file has free pages; idempotent, and without effect on a full disk."""
    with engine.connect() as connection:
        free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
        size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    if free * size >= RESERVE_BYTES // 2:
        return
    with suppress(JournalFullError):  # nothing to reserve from; what there was is still there
        with translated(path), engine.begin() as connection:
            # It may be there: another process is at this point, or was killed at it.
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS reserve (space BLOB)")
            connection.exec_driver_sql(f"INSERT INTO reserve VALUES (zeroblob({RESERVE_BYTES}))")
        with translated(path), engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS reserve")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """
    Turn SQLite's errors, and those of the file itself, into ours.

    A violated constraint stays what it is.
    """
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as exc:
        raise _error(path, exc.orig) from exc
    except (sqlite3.DatabaseError, OSError) as exc:
        raise _error(path, exc) from exc


def _error(path: Path, cause: BaseException | None) -> JournalError:
    if journalfile.is_full(path, cause):
        return JournalFullError(
            f"no space left for the journal {path}", hint="make room on its disk"
        )
    if journalfile.is_damage(cause):
        return JournalDamagedError(path, cause)
    return JournalError(f"the journal {path} cannot be used: {cause}")


def set_damaged_aside(found: JournalDamagedError, path: Path) -> JournalDamagedError:
    """
    Set a damaged journal aside; return the error to raise, which says where it is now.

    This process must have let go of the journal and its lock.  It stays where it is while
    another atomtx is at work with it, where a second look finds no damage, and where it cannot
    be renamed.
    """
    try:
        with aside.writers_lock(path.parent):
            if not _is_damaged(path):
                return _still_damaged(found, path, "a second look found no damage: try again")
            new = aside.set_aside(path, aside.DAMAGED)
    except BusyError:
        why = "it was left there, because another atomtx is at work with it; when that has ended, "
        return _still_damaged(found, path, why + "`atomtx recover` sets it aside")
    except JournalError as exc:
        return _still_damaged(found, path, f"it was left there: {exc}")
    hint = f"it was set aside as {new}; `atomtx recover --scan` lists what its runs left, and the "
    return _still_damaged(found, path, hint + "next command begins a new journal")


def _still_damaged(found: JournalDamagedError, path: Path, hint: str) -> JournalDamagedError:
    return JournalDamagedError(path, found.cause, hint=hint)


def _is_damaged(path: Path) -> bool:
    """Look at every page; what a killed writer left half made is taken back first."""
    try:
        if not journalfile.check(path):  # another process has set it aside
            return False
        with translated(path), closing(sqlite3.connect(journalfile.uri(path, "rw"), uri=True)) as c:
            said: list[tuple[str]] = c.execute("PRAGMA integrity_check(1)").fetchall()
    except JournalDamagedError:
        return True
    return said != [("ok",)]

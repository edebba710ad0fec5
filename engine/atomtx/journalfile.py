"""
The journal's file: its name, its numbers, and whether this release may touch it.

Its header is read raw, so that readers start fast and a journal of a newer release is refused
before SQLite opens it.  SQLite is asked only where a killed writer left its header half written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from .errors import AtomtxError, JournalDamagedError, JournalError, JournalNewerError, UserError

NAME = "journal.db"
LOCK = "journal.lock"
SCHEMA_VERSION = 5  # PRAGMA user_version; the ordinal of the newest file in migrations/versions
APPLICATION_ID = 0x61746F6D  # "atom", PRAGMA application_id
SQLITE_NEEDED = (3, 37, 0)  # it brought STRICT tables; an older one calls ours malformed
# Of every connection that writes: an acknowledged commit survives a power cut (promise 10).
PRAGMAS = ("journal_mode=PERSIST", "synchronous=EXTRA")

ELSEWHERE = "set ATOMTX_STATE_DIR to a directory of root's on a local disk"

_MAGIC = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat2.html#the_database_header
_HEADER_BYTES = 100
_COUNTER_AT, _VALID_FOR_AT = 24, 92  # the file change counter, and the copy of it that must agree
_BUSY_TIMEOUT_S = 5.0
_FULL_BYTES = 65_536  # less room than this is none


def check(path: Path) -> bool:
    """
    Tell whether there is a journal to open; False for none, or one that was never filled.

    Raises what `judge` raises, and UserError where this user may not read it.  The file is read,
    never changed, with one exception: where its header is bad and a killed writer left its
    rollback journal, SQLite takes the half-made change back first.  A power cut may tear the
    first page, and the rollback journal has it whole.

    Not while this process has a transaction open on it: closing any descriptor of a file drops
    all of the process's POSIX locks on it (fcntl(2)), SQLite's too.
    """
    try:
        return judge(path, header(path))
    except JournalError:
        if not is_hot(path):
            raise
    _roll_back(path)
    return judge(path, header(path))


def judge(path: Path, head: bytes) -> bool:
    """
    Tell by its header whether there is a journal to open; *path* is for messages.

    Raises JournalNewerError for one that a newer atomtx wrote, JournalDamagedError for one that
    is no database, JournalError for a database that is no journal.
    """
    if not head:
        return False
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise JournalDamagedError(path, "it has no header of a database")
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise JournalError(
            f"{path} is a database, but not a journal of atomtx",
            hint="move it away, or set ATOMTX_STATE_DIR to another directory",
        )
    if version(head) > SCHEMA_VERSION:
        raise JournalNewerError(
            f"the journal {path} was written by a newer atomtx "
            f"(its version is {version(head)}, this atomtx reads up to {SCHEMA_VERSION})",
            hint="use the newer atomtx; the journal was left untouched",
        )
    return True


def is_current(path: Path) -> bool:
    """Tell whether the journal has this release's tables, as its header says; see `check`."""
    return version(header(path)) == SCHEMA_VERSION


def version(head: bytes) -> int:
    """Return the schema's version that a header tells."""
    return int.from_bytes(head[60:64], "big")


def counter(head: bytes) -> int:
    """
    Return the file change counter that a header tells.

    Each commit adds one to it, modulo 2^32, in the modes with a rollback journal.
    """
    return int.from_bytes(head[_COUNTER_AT : _COUNTER_AT + 4], "big")


def set_counter(descriptor: int, value: int) -> None:
    """Write the file change counter of a database that nobody has open."""
    for offset in (_COUNTER_AT, _VALID_FOR_AT):
        os.pwrite(descriptor, value.to_bytes(4, "big"), offset)


def rollback_journal(path: Path) -> Path:
    """Return the file that SQLite keeps beside the journal, for taking a change back."""
    return path.with_name(path.name + "-journal")


def is_hot(path: Path) -> bool:
    """
    Tell whether a change is half made: its writer was killed, or is making it just now.

    Under `journal_mode=PERSIST` the end of a commit fills the rollback journal's header with
    zeros.
    """
    try:
        with rollback_journal(path.resolve()).open("rb") as file:
            return file.read(1) not in (b"", b"\0")
    except OSError:  # none, or not for us to read: then SQLite says so
        return False


def _roll_back(path: Path) -> None:
    """Let SQLite take a half-made change back, where its writer is gone; idempotent."""
    import sqlite3  # what most calls, those with a whole header, need not pay

    try:
        with closing(sqlite3.connect(uri(path, "rw"), uri=True, timeout=_BUSY_TIMEOUT_S)) as asked:
            asked.execute("PRAGMA user_version")
    except sqlite3.DatabaseError as exc:
        # Damaged: it is judged again.  Busy: its writer lives, and there is nothing to take back.
        if not is_damage(exc) and not error_name(exc).startswith("SQLITE_BUSY"):
            raise JournalError(
                f"what a killed atomtx left half written in {path} cannot be taken back: {exc}"
            ) from exc


def uri(path: Path, mode: str) -> str:
    """Return the name by which SQLite opens a file that is there; *mode* is "ro" or "rw"."""
    return f"{path.absolute().as_uri()}?mode={mode}"


def error_name(exc: BaseException | None) -> str:
    """Return SQLite's name of an error, such as SQLITE_CORRUPT_INDEX; empty for another's."""
    return getattr(exc, "sqlite_errorname", "") or ""


def is_damage(exc: BaseException | None) -> bool:
    """
    Tell whether an error of SQLite's says that the file is damaged.

    An I/O error does not, nor anything from an SQLite that is too old: it calls our tables
    malformed.
    """
    import sqlite3

    new_enough = sqlite3.sqlite_version_info >= SQLITE_NEEDED
    return new_enough and error_name(exc).startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def is_full(path: Path, exc: BaseException | None) -> bool:
    """Tell whether an error of SQLite's, or of a file, says that the disk of *path* is full."""
    name = error_name(exc)
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # SQLite calls a quota that is used up (EDQUOT) an error of the disk.
    return name == "SQLITE_FULL" or (name == "SQLITE_IOERR_WRITE" and not _has_room(path))


def _has_room(path: Path) -> bool:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize >= _FULL_BYTES


class HeaderFile:
    """The journal's header over a descriptor of its own; see `check` on when to close it."""

    def __init__(self, path: Path) -> None:
        """Open the file; FileNotFoundError where there is none."""
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except PermissionError as exc:
            raise not_permitted(path) from exc
        except OSError as exc:
            raise _unreadable(path, exc) from exc

    def read(self) -> bytes:
        """Return what the file has now."""
        try:
            return os.pread(self._descriptor, _HEADER_BYTES, 0)
        except OSError as exc:  # a directory, or a disk that fails
            raise _unreadable(self._path, exc) from exc

    def close(self) -> None:
        """Give the descriptor up; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_error(path: Path, exc: Exception) -> AtomtxError:
    """Return the error of a reader for one of SQLite's."""
    name = error_name(exc)
    if is_damage(exc):
        return JournalDamagedError(path, exc)
    if name == "SQLITE_READONLY_ROLLBACK":
        return JournalError(f"the journal {path} was left half written just now", hint="try again")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_READONLY", "SQLITE_AUTH")):
        return not_permitted(path)
    hint = "another atomtx writes it; try again" if name.startswith("SQLITE_BUSY") else None
    return JournalError(f"cannot read the journal {path}: {exc}", hint=hint)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into those of a reader."""
    import sqlite3

    try:
        yield
    except sqlite3.DatabaseError as exc:
        raise read_error(path, exc) from exc


def header(path: Path) -> bytes:
    """Return the journal's header as it is in the file; empty where there is no file."""
    try:
        file = HeaderFile(path)
    except FileNotFoundError:
        return b""
    with closing(file):
        return file.read()


def _unreadable(path: Path, exc: OSError) -> JournalError:
    hint = ELSEWHERE if isinstance(exc, NotADirectoryError) else None
    return JournalError(f"cannot read the journal {path}: {exc.strerror}", hint=hint)


def not_permitted(path: Path) -> UserError:
    """Return the error for a user who may not read the journal."""
    return UserError(
        f"cannot read the journal {path}: permission denied",
        hint="run atomtx as root, or set ATOMTX_STATE_DIR to a directory of your own",
    )

"""
The journal's file: its name, its numbers, and whether this release may touch it.

No database library is imported here, so that readers start fast and a journal of a newer release
is refused before anything opens it.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import JournalError, JournalNewerError, UserError

NAME = "journal.db"
SCHEMA_VERSION = 1  # PRAGMA user_version; the ordinal of the newest file in migrations/versions
APPLICATION_ID = 0x61746F6D  # "atom", PRAGMA application_id
# Of every connection that writes: an acknowledged commit survives a power cut (promise 10).
PRAGMAS = ("journal_mode=PERSIST", "synchronous=EXTRA")

_MAGIC = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat2.html#the_database_header
_HEADER_BYTES = 100


def check(path: Path) -> bool:
    """
    Tell whether there is a journal to open; False for none, or one that was never filled.

    Raises JournalNewerError for one that a newer atomtx wrote, JournalError for one that is
    damaged or no journal at all, UserError where this user may not read it.  The file is read,
    never changed.

    Not while this process has a transaction open on it: closing any descriptor of a file drops
    all of the process's POSIX locks on it (fcntl(2)), SQLite's too.
    """
    header = _header(path)
    if not header:
        return False
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise damaged(path, "it has no header of a database")
    version = _version(header)
    application = int.from_bytes(header[68:72], "big")
    if application != APPLICATION_ID:
        raise JournalError(
            f"{path} is a database, but not a journal of atomtx",
            hint="move it away, or set ATOMTX_STATE_DIR to another directory",
        )
    if version > SCHEMA_VERSION:
        raise JournalNewerError(
            f"the journal {path} was written by a newer atomtx "
            f"(its version is {version}, this atomtx reads up to {SCHEMA_VERSION})",
            hint="use the newer atomtx; the journal was left untouched",
        )
    return True


def is_current(path: Path) -> bool:
    """Tell whether the journal has this release's tables, as its header says; see `check`."""
    return _version(_header(path)) == SCHEMA_VERSION


def _version(header: bytes) -> int:
    return int.from_bytes(header[60:64], "big")


def damaged(path: Path, cause: object) -> JournalError:
    """Return the error for a journal that cannot be trusted."""
    return JournalError(
        f"the journal {path} is damaged: {cause}",
        hint=f"nothing was changed; move {path} aside and run `atomtx recover --scan`",
    )


def _header(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except PermissionError as exc:
        raise not_permitted(path) from exc
    except OSError as exc:
        raise JournalError(f"cannot read the journal {path}: {exc.strerror}") from exc
    try:
        return os.read(descriptor, _HEADER_BYTES)
    except OSError as exc:  # a directory, or a disk that fails
        raise JournalError(f"cannot read the journal {path}: {exc.strerror}") from exc
    finally:
        os.close(descriptor)


def not_permitted(path: Path) -> UserError:
    """Return the error for a user who may not read the journal."""
    return UserError(
        f"cannot read the journal {path}: permission denied",
        hint="run atomtx as root, or set ATOMTX_STATE_DIR to a directory of your own",
    )

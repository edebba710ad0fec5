"""
Set a journal aside: renamed with its rollback journal, never overwritten, never deleted.

Only who holds the writers' lock alone may do it.  A journal without its rollback journal may be
one with half a change in it, so the two are never apart: a power cut between the steps leaves the
rollback journal under both names.
"""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from . import journalfile, locks
from .errors import BusyError, JournalError
from .statedir import sync_directory

DAMAGED, BY_HAND = "damaged", "aside"
_LOCK_WAIT_S = 2.0  # two that find the damage at once: each lets go of the shared lock first


@contextmanager
def writers_lock(state: Path) -> Iterator[None]:
    """Hold the writers' lock alone for a block; BusyError where another atomtx has it."""
    flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
    try:
        lock = os.open(state / journalfile.LOCK, flags, 0o600)
    except PermissionError as exc:
        raise journalfile.not_permitted(state / journalfile.NAME) from exc
    except OSError as exc:
        raise JournalError(f"cannot lock the journal in {state}: {exc.strerror}") from exc
    try:
        if not locks.wait_until(lambda: locks.try_lock(lock, fcntl.LOCK_EX), _LOCK_WAIT_S):
            raise BusyError(
                f"another atomtx is at work with the journal in {state}",
                hint="try again when it has ended; `atomtx status` shows it",
            )
        yield
    finally:
        os.close(lock)


def set_aside(path: Path, why: str) -> Path:
    """
    Rename the journal and its rollback journal, durable, and return the journal's new path.

    The caller holds `writers_lock`.  Raises JournalError where it cannot be renamed: the journal
    is then where it was.
    """
    new = _free_name(path, why)
    old_rollback, new_rollback = map(journalfile.rollback_journal, (path, new))
    try:
        with suppress(FileNotFoundError):
            os.link(old_rollback, new_rollback)
            sync_directory(path.parent)
        os.rename(path, new)
        sync_directory(path.parent)
        old_rollback.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as exc:
        raise JournalError(f"cannot rename the journal {path}: {exc.strerror}") from exc
    return new


def _free_name(path: Path, why: str) -> Path:
    stem = f"{path.name}.{why}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (path.with_name(stem + (f".{n}" if n else "")) for n in range(10_000))
    return next(
        name
        for name in names
        if not os.path.lexists(name) and not os.path.lexists(journalfile.rollback_journal(name))
    )


def way_back(new: Path, path: Path) -> list[str]:
    """Return the commands that put a journal back that was set aside as *new*."""
    pairs = [(journalfile.rollback_journal(new), journalfile.rollback_journal(path)), (new, path)]
    return [shlex.join(["mv", "-n", str(old), str(back)]) for old, back in pairs if old.exists()]


def damaged(state: Path) -> list[Path]:
    """Return the damaged journals that lie in the state directory, the oldest first."""
    found = state.glob(f"{journalfile.NAME}.{DAMAGED}-*")
    return sorted(path for path in found if not path.name.endswith("-journal"))


def notes(state: Path) -> list[str]:
    """Return a line for each damaged journal that lies there, and what to do with it."""
    return [
        f"a damaged journal lies aside at {path}: `atomtx recover --scan` lists what its runs "
        "left; when you are done with it, move it away"
        for path in damaged(state)
    ]

"""
The locks that borg leaves: a folder with one file, named after who holds it.

borg itself removes one whose process is gone when it next needs the lock, but only where the
machine still has the name that it had; at boot, before the network is up, it may have another.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress

from .. import system

_HOLDER = re.compile(r"(?P<host>.+)\.(?P<pid>\d+)-(?P<thread>[0-9a-f]+)")
_RANDOM = 1 << 40  # the multicast bit: no address of the machine's (RFC 4122, 4.5)


def has_own_address() -> bool:
    """Tell whether the machine has an address by which borg can know it again."""
    return not uuid.getnode() & _RANDOM


def remove_stale(path: str, host_id: str | None) -> Iterator[str]:
    """
    Remove the locks on a repository or cache at *path* that a process of this machine left.

    Each by its own name, as borg does: `borg break-lock` takes away any, also one that a living
    process got a moment ago.  Yields what was done, and who holds what is left; idempotent.
    """
    folder = os.path.join(path, "lock.exclusive")
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        yield f"borg: cannot see who locks {path}: {exc.strerror}"
        return
    for name in names:
        yield (
            _remove(folder, name)
            if is_stale(name, host_id)
            else f"borg: {path} is locked by {name}"
        )
    with suppress(OSError):  # somebody took it again, or was faster
        os.rmdir(folder)


def is_stale(name: str, host_id: str | None) -> bool:
    """Tell whether a lock's name proves that a process of this machine had it, and is gone."""
    holder = _HOLDER.fullmatch(name)
    if holder is None or not _is_here(holder["host"], host_id):
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    # A container's first process may never reap what it inherits.
    return _is_unreaped(int(holder["pid"]))


def _is_unreaped(pid: int) -> bool:
    """Tell whether a process has ended and only waits for its parent to be told."""
    return system.here.start_of(pid) is not None and system.here.session_of(pid) is None


def _is_here(host: str, host_id: str | None) -> bool:
    if host_id:
        return host == host_id
    return has_own_address() and host.rpartition("@")[2] == str(uuid.getnode())


def _remove(folder: str, name: str) -> str:
    try:
        os.unlink(os.path.join(folder, name))
    except FileNotFoundError:
        pass
    except OSError as exc:
        return f"borg: the stale lock {name} cannot be removed: {exc.strerror}"
    return f"borg: removed the lock of a process that is gone: {name}"

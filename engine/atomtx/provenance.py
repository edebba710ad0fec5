"""
Whether a journal may act here: it must be this machine's, and the newest that it has seen.

A journal that was rolled back, or restored from a backup, does not know of newer runs.  SQLite's
file change counter tells: each commit adds one to it, and taking back a change that was not
committed never lowers it below the last commit.  The highest that was seen of each journal, its
watermark, is kept in two places: in the state directory, where it outlives a reboot, and below
/run, which is not rolled back together with a disk.  What both lose, nobody notices: a whole disk
that is restored while the machine is off.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from . import system
from .errors import JournalError, JournalOlderError

_UUID = re.compile(r"[0-9a-f-]{36}")
_NAMELESS = (b"", b"uninitialized")  # machine-id(5): of an image that has not been booted yet
_COUNTERS = 2**32  # SQLite's counter begins again at 0 after so many


def machine_id() -> str:
    """Return a hash of what names this machine; empty where nothing does."""
    return next((_hash(name) for name in _names() if name not in _NAMELESS), "")


def _names() -> list[bytes]:
    found = []
    for source in system.here.MACHINE_IDS:
        with suppress(OSError):
            found.append(Path(source).read_bytes().strip())
    return found


def _hash(name: bytes) -> str:
    return hashlib.sha256(b"atomtx" + name).hexdigest()


def _is_here(machine: str) -> bool:
    """
    Tell whether a journal's *machine* is this one.

    Older journals have the hash of the first file that is there, also where it names none.
    """
    nameless = [name for name in _names()[:1] if name in _NAMELESS]
    return machine in (machine_id(), *map(_hash, nameless))


def run_directory(env: Mapping[str, str] = os.environ) -> Path | None:
    """Return our directory on a tmpfs: systemd's, or root's; another user has none."""
    if env.get("RUNTIME_DIRECTORY"):
        return Path(env["RUNTIME_DIRECTORY"].split(":")[0])
    return system.here.RUN if os.geteuid() == 0 else None


def prove(path: Path, uuid: str, machine: str, counter: int) -> Watermark:
    """
    Return the watermark of a journal that may act here; JournalError for one that may not.

    *counter* must be that of a commit: read while no other process can write.
    """
    if not _is_here(machine):
        raise JournalError(
            f"the journal {path} was written on another machine",
            hint=f"move {path.parent} away to begin a new one here",
        )
    if not _UUID.fullmatch(uuid):  # it becomes the name of a file
        raise JournalError(
            f"the journal {path} does not tell which it is: {uuid!r} is no uuid",
            hint="run `atomtx journal set-aside`, then `atomtx recover --scan`",
        )
    watermark = Watermark(path.parent, uuid)
    newer = watermark.newer_than(counter)
    if newer:
        raise JournalOlderError(
            f"the journal {path} is older than what this machine has seen: its change counter is "
            f"{counter}, and {newer[0]} has {newer[1]}; it was rolled back, or restored from a "
            "backup",
            hint="nothing was changed; put the newer one back, or run `atomtx journal set-aside`, "
            "then `atomtx recover --scan`",
        )
    return watermark


def knows_any(state: Path) -> bool:
    """Tell whether a state directory has, or had, a journal that was proven here."""
    folder = state / "watermarks"
    return folder.is_dir() and any(folder.iterdir())


class Watermark:
    """The highest change counter that this machine has seen of one journal."""

    def __init__(self, state: Path, uuid: str) -> None:
        self._uuid = uuid
        # The last commit of a writer that was killed at its very end is seen by everybody, and
        # may still be lost in a power cut; the one before may not.  What is on a disk, and so
        # outlives the power cut, stays behind by one.
        self._files = [(state / "watermarks" / uuid, 1)]
        below_run = run_directory()
        if below_run is not None:
            self._files.append((below_run / uuid, 0))
        self._noted: int | None = None
        self._trouble: dict[Path, str] = {}  # where it could not be kept, and why

    def newer_than(self, counter: int) -> tuple[Path, int] | None:
        """Return the file, and its counter, that shows *counter* to be an old one; or None."""
        for file, _ in self._files:
            try:
                seen = self._read(file)
            except OSError as exc:
                raise JournalError(
                    f"cannot tell whether the journal was rolled back: {file}: {exc.strerror}",
                    hint=f"mend that, or remove {file}",
                ) from exc
            if seen is not None and _is_newer(seen, counter):
                return file, seen
        return None

    def note(self, counter: int) -> None:
        """
        Keep the counter of a commit, where it is higher than what is kept; idempotent.

        Not synced: a note that is lost weakens the watermark, and one that outlives its commit
        would be a false alarm.
        """
        if counter == self._noted:
            return
        self._noted = counter
        for file, behind in self._files:
            try:
                self._write(file, (counter - behind) % _COUNTERS)
            except OSError as exc:
                self._trouble[file] = exc.strerror or str(exc)

    def trouble(self) -> list[str]:
        """Return a line for each place where it could not be kept."""
        return [
            f"a journal that was rolled back may go unnoticed: {file}: {why}"
            for file, why in self._trouble.items()
        ]

    def _write(self, file: Path, counter: int) -> None:
        seen = self._read(file)
        if seen is not None and not _is_newer(counter, seen):
            return
        if not file.parent.parent.is_dir():  # a machine without /run
            return
        file.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, self._record(counter), 0)
            os.ftruncate(descriptor, len(self._record(counter)))
        finally:
            os.close(descriptor)

    def _read(self, file: Path) -> int | None:
        """Return a kept counter; None for none, or one that a power cut has torn."""
        try:
            record = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        digits = record[:10]
        if not digits.isdigit() or record != self._record(int(digits)):
            return None
        return int(digits)

    def _record(self, counter: int) -> bytes:
        """Return what a file has: of one length, so that it is overwritten in place."""
        body = b"%010d" % counter
        return body + b" %08x\n" % zlib.crc32(self._uuid.encode() + body)


def _is_newer(one: int, other: int) -> bool:
    """Compare counters that begin again at 0 (RFC 1982)."""
    return 0 < (one - other) % _COUNTERS < _COUNTERS // 2

"""
A tree into a new generation of its database.

What has the stat that the last generation has, and was not racy then, is believed; all else is
read.  What cannot be read is an entry that says so.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .entry import Entry, State, is_racy, stat_of
from .hashing import Item, Pool, Reading, read_xattrs
from .store import TOP, Counts, Store
from .walk import Directory, reason_of, walk

_DAMAGED = "its contents changed, though size and times did not: damage?"


@dataclass(frozen=True)
class Told:
    """Whom to tell what: *problem* of a path, *elsewhere* of one not entered, *progress*."""

    problem: Callable[[bytes, str], None] = lambda path, text: None
    elsewhere: Callable[[bytes], None] = lambda path: None
    progress: Callable[[int, int], None] = lambda entries, read: None


@dataclass(frozen=True)
class Summary:
    """What a scan found."""

    generation: int
    counts: Counts
    damaged: int  # contents that changed without a trace in stat: --full alone sees them
    seconds: float


def scan(
    store: Store,
    root: Path,
    *,
    full: bool = False,
    cross: bool = False,
    may_be_empty: bool = False,
    told: Told = Told(),
    now: Callable[[], int] = time.time_ns,
) -> Summary:
    """
    Add a generation: the tree at *root* as it is now; *full* hashes every file.

    UserError where the tree is empty and was not: it may not be mounted.
    """
    begun = time.monotonic()
    run = _Scan(store, full, told, now())
    generation = store.begin(os.fsencode(root), run.started, complete=full)
    run.read(root, cross, may_be_empty)
    store.commit(run.counts(), now())
    return Summary(generation, run.counts(), run.damaged, time.monotonic() - begun)


class _Scan:
    """A scan at work."""

    def __init__(self, store: Store, full: bool, told: Told, started: int) -> None:
        self.started = started
        self.damaged = 0
        self._store = store
        self._full = full
        self._told = told
        self._entries = self._bytes = self._errors = 0
        # Of each directory that is still to come, the node above it and its last entry.
        self._awaited: dict[bytes, tuple[int, Entry | None]] = {}
        self._pool = Pool(self._done, self._tell)

    def counts(self) -> Counts:
        read = self._pool.reader
        return Counts(self._entries, self._bytes, read.files_read, read.bytes_read, self._errors)

    def read(self, root: Path, cross: bool, may_be_empty: bool) -> None:
        """Read the whole tree."""
        self._awaited[b""] = (TOP, self._store.current(TOP).get(b""))
        with self._pool:
            for directory in walk(root, cross=cross):
                if not (directory.path or directory.found or directory.failed or may_be_empty):
                    self._refuse_emptied(root)
                self._visit(directory)
                self._tell()
            self._pool.finish()

    def _refuse_emptied(self, root: Path) -> None:
        node = self._store.find_node(TOP, b"")
        if node is not None and self._store.current(node):
            raise UserError(
                f"{root} is empty, and was not at the last scan",
                hint="is it mounted? if it was emptied, say --allow-empty",
            )

    def _visit(self, directory: Directory) -> None:
        above, old = self._awaited.pop(directory.path)
        name = directory.path.rpartition(b"/")[2]
        if directory.state is None:
            self._gone(above, old)
            return
        self._note_directory(above, name, directory, old)
        node = self._store.node(above, name)
        known = self._store.current(node) if old and old.is_directory else {}
        if directory.descriptor < 0:
            self._store.close_below(node)
            return
        self._pool.add(directory.descriptor, self._to_read(directory, node, known))
        for failed, error in directory.failed:
            last = known.pop(failed, None)
            self._replaced(node, last)
            self._write(node, last, _unknown(failed, error), directory.path)
        for last in known.values():
            self._gone(node, last)

    def _note_directory(
        self, above: int, name: bytes, directory: Directory, old: Entry | None
    ) -> None:
        info = directory.info
        if directory.state == State.CLEAN and self._is_believed(old, info):
            self._entries += 1
            return
        reading = Reading(info, error=directory.error)
        if directory.descriptor >= 0:
            try:
                reading = Reading(info, xattrs=read_xattrs(directory.descriptor))
            except OSError as exc:
                reading = Reading(info, error=reason_of(exc))
        elif directory.state == State.ELSEWHERE:
            self._told.elsewhere(directory.path)
        state = self._state(info) if directory.descriptor >= 0 else State.ELSEWHERE
        self._write(above, old, reading.entry(name, state), directory.path.rpartition(b"/")[0])

    def _to_read(
        self, directory: Directory, node: int, known: dict[bytes, Entry]
    ) -> Iterator[Item]:
        """Yield what cannot be believed; take what is there out of *known*."""
        prefix = directory.path + b"/" if directory.path else b""
        for name, info in directory.found:
            old = known.pop(name, None)
            if stat.S_ISDIR(info.st_mode):
                self._awaited[prefix + name] = (node, old)
            elif self._is_believed(old, info):
                self._entries += 1
                self._count_bytes(info)
            else:
                self._replaced(node, old)
                yield Item(name, info, (node, old, directory.path))

    def _is_believed(self, old: Entry | None, info: os.stat_result) -> bool:
        """Tell whether the last generation's entry is still true, by git's rule."""
        if old is None or self._full:
            return False
        return old.state == State.CLEAN and old[1:8] == stat_of(info)

    def _done(self, item: Item, reading: Reading) -> None:
        """Note what the pool has read."""
        node, old, above = item.context
        if reading.info is None:
            if old is not None:
                self._store.close(node, old)
            return
        new = reading.entry(item.name, self._state(reading.info))
        if old is not None and _is_damage(old, new):
            self.damaged += 1
            self._told.problem(_joined(above, item.name), _DAMAGED)
        self._count_bytes(reading.info)
        self._write(node, old, new, above)

    def _write(self, node: int, old: Entry | None, new: Entry, above: bytes) -> None:
        self._entries += 1
        if new.state == State.UNREADABLE:
            self._errors += 1
            self._told.problem(_joined(above, new.name), new.error or "")
        self._store.write(node, old, new)

    def _gone(self, node: int, old: Entry | None) -> None:
        """Note that something is not there any more, nor what was below it."""
        if old is not None:
            self._store.close(node, old)
            self._replaced(node, old)

    def _replaced(self, node: int, old: Entry | None) -> None:
        """Note that what was below a directory went away with it."""
        below = self._store.find_node(node, old.name) if old and old.is_directory else None
        if below is not None:
            self._store.close_below(below)

    def _state(self, info: os.stat_result) -> State:
        return State.RACY if is_racy(info, self.started) else State.CLEAN

    def _count_bytes(self, info: os.stat_result) -> None:
        if stat.S_ISREG(info.st_mode):
            self._bytes += info.st_size

    def _tell(self) -> None:
        self._told.progress(self._entries, self._pool.reader.bytes_read)


def _is_damage(old: Entry, new: Entry) -> bool:
    """Tell whether contents changed, and nothing that a write changes."""
    same = old.state == State.CLEAN and old.stat == new.stat
    return same and None not in (old.digest, new.digest) and old.digest != new.digest


def _unknown(name: bytes, error: str) -> Entry:
    """Return the entry of a name that even stat(2) refuses."""
    return Entry(name, 0, 0, 0, 0, 0, 0, 0, state=State.UNREADABLE, error=error)


def _joined(above: bytes, name: bytes) -> bytes:
    return above + b"/" + name if above else name

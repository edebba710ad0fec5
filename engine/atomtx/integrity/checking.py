"""A tree against a generation: every file read, every difference named; and two generations."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .compare import IS_DIFFERENCE, Finding, Kind, hides, judge
from .entry import Entry, State, stat_of
from .hashing import Item, Pool, Reading, read_xattrs
from .store import TOP, Store
from .walk import Directory, reason_of, walk


@dataclass(frozen=True)
class Result:
    """What a check found, in numbers."""

    generation: int
    compared: int
    bytes_read: int
    differences: int
    not_compared: int  # not readable, now or then
    seconds: float


@dataclass(frozen=True)
class Copy:
    """What a copy of a tree need not have; nothing where the tree itself is checked."""

    leave_out: frozenset[bytes] = frozenset()  # paths that are not compared, nor what is below
    ignore_of_root: frozenset[str] = frozenset()  # properties of the root itself
    as_kept: Callable[[Entry], Entry | None] = lambda entry: entry  # None: it has no such thing


class _Above:
    """What the generation has of a directory that is still to come."""

    def __init__(self, node: int | None, entry: Entry | None, hidden: bool) -> None:
        self.node = node  # of the directory above it
        self.entry = entry
        self.hidden = hidden  # below one that nobody could read then: nothing here is new


class Check:
    """A check at work; *found* is told each finding, *progress* entries and bytes."""

    def __init__(
        self,
        store: Store,
        generation: int,
        *,
        ignore: Collection[str],
        found: Callable[[Finding], None],
        progress: Callable[[int, int], None] = lambda entries, read: None,
        copy: Copy = Copy(),
    ) -> None:
        self._store = store
        self._copy = copy
        self._generation = generation
        self._ignore = ignore
        self._found = found
        self._progress = progress
        self._compared = self._differences = self._not_compared = 0
        self._awaited: dict[bytes, _Above] = {}
        self._pool = Pool(self._done, self._tell)

    def run(self, root: Path, *, cross: bool = False) -> Result:
        """Read the tree at *root* and compare it; errors as those of `walk`."""
        begun = time.monotonic()
        top = self._store.at(TOP, self._generation)
        self._awaited[b""] = _Above(TOP, top.get(b""), False)
        with self._pool:
            for directory in walk(root, cross=cross, leave_out=self._copy.leave_out):
                self._visit(directory)
                self._tell()
            self._pool.finish()
        return Result(
            self._generation,
            self._compared,
            self._pool.reader.bytes_read,
            self._differences,
            self._not_compared,
            time.monotonic() - begun,
        )

    def _visit(self, directory: Directory) -> None:
        above = self._awaited.pop(directory.path)
        name = directory.path.rpartition(b"/")[2]
        old = above.entry
        node = None
        if old and old.is_directory and above.node is not None:
            node = self._store.find_node(above.node, name)
        if directory.state is None:
            self._missing(directory.path, old, node)
            return
        if old or not above.hidden:
            self._judge(directory.path, old, _entry_of(directory, name))
        if directory.descriptor < 0:  # and what is below it was said to be unknown
            return
        hidden = above.hidden or hides(old)
        known = self._known(directory.path, node)
        items = self._to_read(directory, node, known, hidden)
        self._pool.add(directory.descriptor, items)
        prefix = _prefix(directory.path)
        for failed, reason in directory.failed:
            known.pop(failed, None)
            self._tell_of(Finding(Kind.UNREADABLE, prefix + failed, reason=reason))
        for entry in known.values():
            self._missing(prefix + entry.name, entry, self._node_of(node, entry))

    def _known(self, path: bytes, node: int | None) -> dict[bytes, Entry]:
        """Return what the generation has in a directory, but for what is left out."""
        known = self._store.at(node, self._generation) if node is not None else {}
        for name in [name for name in known if _prefix(path) + name in self._copy.leave_out]:
            del known[name]
        return known

    def _to_read(
        self, directory: Directory, node: int | None, known: dict[bytes, Entry], hidden: bool
    ) -> Iterator[Item]:
        """Yield what is to be compared; take what is there out of *known*."""
        prefix = _prefix(directory.path)
        for name, info in directory.found:
            old = known.pop(name, None)
            if stat.S_ISDIR(info.st_mode):
                self._awaited[prefix + name] = _Above(node, old, hidden)
            elif old is None:
                if not hidden:
                    self._judge(prefix + name, None, Entry(name, *stat_of(info)))
            else:
                if old.is_directory:
                    self._missing_below(prefix + name, self._node_of(node, old))
                yield Item(name, info, (prefix + name, old))

    def _done(self, item: Item, reading: Reading) -> None:
        path, old = item.context
        if reading.info is None:
            self._missing(path, old, None)
        else:
            self._judge(path, old, reading.entry(item.name))

    def _node_of(self, above: int | None, entry: Entry) -> int | None:
        """Return the node of a directory."""
        if above is None or not entry.is_directory:
            return None
        return self._store.find_node(above, entry.name)

    def _missing(self, path: bytes, old: Entry | None, node: int | None) -> None:
        if old is not None:
            self._judge(path, old, None)
            self._missing_below(path, node)

    def _missing_below(self, path: bytes, node: int | None) -> None:
        if node is not None:
            left_out = self._copy.leave_out
            for below, entry in self._store.below(path, node, self._generation):
                if below not in left_out and not _is_below(below, left_out):
                    self._judge(below, entry, None)

    def _judge(self, path: bytes, old: Entry | None, new: Entry | None) -> None:
        old, new = old and self._copy.as_kept(old), new and self._copy.as_kept(new)
        if old is None and new is None:
            return
        self._compared += 1
        ignore = self._ignore if path else {*self._ignore, *self._copy.ignore_of_root}
        for finding in judge(path, old, new, ignore):
            self._tell_of(finding)

    def _tell_of(self, finding: Finding) -> None:
        if finding.kind in IS_DIFFERENCE:
            self._differences += 1
        else:
            self._not_compared += 1
        self._found(finding)

    def _tell(self) -> None:
        self._progress(self._compared, self._pool.reader.bytes_read)


def diff(
    store: Store, before: int, after: int, ignore: Collection[str] = frozenset()
) -> Iterator[Finding]:
    """Yield what differs between two generations, by path; what either could not read, too."""
    pairs = sorted(store.changed(before, after), key=lambda pair: pair[0])
    hidden = {path for path, old, new in pairs if hides(old) or hides(new)}
    for path, old, new in pairs:
        if not _is_below(path, hidden):
            yield from judge(path, old, new, ignore)


def _is_below(path: bytes, directories: Collection[bytes]) -> bool:
    """Tell whether a path is in one of the directories, at any depth."""
    if not directories or not path:
        return False
    parts = path.split(b"/")
    return any(b"/".join(parts[:count]) in directories for count in range(len(parts)))


def _entry_of(directory: Directory, name: bytes) -> Entry:
    """Return what a directory is now."""
    info, state = directory.info, directory.state
    if directory.descriptor < 0:
        assert state is not None
        return Entry(name, *stat_of(info), state=state, error=directory.error)
    try:
        xattrs = read_xattrs(directory.descriptor)
    except OSError as exc:
        return Reading(info, error=reason_of(exc)).entry(name)
    return Entry(name, *stat_of(info), xattrs=xattrs, state=State.CLEAN)


def _prefix(path: bytes) -> bytes:
    return path + b"/" if path else b""

"""
The database of one tree: its generations, and each entry with the generations that it was in.

An entry's row is written when it is first seen, closed by the first generation that finds it
changed or gone, and not touched by those that find it as it was: an unchanged generation is one
row.  A generation is one transaction, so a killed scan leaves the last whole one.  SQLite's WAL,
so that a reader who takes his time keeps no scan from its commit.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..errors import AtomtxError, BusyError, EffectError, UserError
from ..locks import acquired
from ..statedir import sync_directory
from .entry import Entry, State

SCHEMA_VERSION = 1
APPLICATION_ID = 0x73757265  # "sure"
BUSY_TIMEOUT_S = 10.0
TOP = 0  # the node above the root: its one entry is the root itself
_ROWS_AT_ONCE = 2_000
_CACHE_KIB = 65_536
_FULL_BYTES = 65_536  # less room than this is none
_SCHEMA = """
CREATE TABLE tree (path BLOB NOT NULL, hash TEXT NOT NULL) STRICT;
CREATE TABLE generation (
    id INTEGER PRIMARY KEY,
    path BLOB NOT NULL,
    started INTEGER NOT NULL,
    ended INTEGER,
    complete INTEGER NOT NULL,
    entries INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    hashed INTEGER NOT NULL DEFAULT 0,
    hashed_bytes INTEGER NOT NULL DEFAULT 0,
    errors INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE node (
    id INTEGER PRIMARY KEY,
    parent INTEGER NOT NULL,
    name BLOB NOT NULL,
    UNIQUE (parent, name)
) STRICT;
CREATE TABLE entry (
    node INTEGER NOT NULL,
    name BLOB NOT NULL,
    since INTEGER NOT NULL,
    until INTEGER,
    mode INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime INTEGER NOT NULL,
    ctime INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    target BLOB,
    xattrs BLOB,
    digest BLOB,
    state INTEGER NOT NULL,
    error TEXT,
    PRIMARY KEY (node, name, since)
) STRICT, WITHOUT ROWID;
"""
_DUE = "shrink_due"  # a table that is there from a forgetting until the file is smaller
_COLUMNS = ", ".join(Entry._fields)
_AT = "since <= :at AND (until IS NULL OR until >= :at)"
_BELOW = (
    "WITH RECURSIVE below(id) AS (SELECT :node UNION ALL"
    " SELECT node.id FROM node JOIN below ON node.parent = below.id)"
)


class Generation(NamedTuple):
    """One scan of the tree."""

    id: int
    path: bytes  # where the tree was read: the live path, or a snapshot of it
    started: int  # nanoseconds
    ended: int
    complete: bool  # every file was hashed, whatever its stat
    entries: int
    bytes: int
    hashed: int
    hashed_bytes: int
    errors: int


class Counts(NamedTuple):
    """What a scan found."""

    entries: int
    bytes: int
    hashed: int
    hashed_bytes: int
    errors: int


@contextmanager
def writing(path: Path, tree: bytes) -> Iterator[Store]:
    """
    Open the database to write, made where there is none; nobody else writes meanwhile.

    BusyError where another process writes it, UserError where it is of another tree.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        is_made = _has_content(path)
        _make(path)
        if is_made:
            with _opened(path) as store:  # beside a stranger's file no lock is left
                store.judge()
        _make(lock)
        sync_directory(path.parent)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from exc
        raise UserError(f"cannot write {path}: {exc.strerror}") from exc
    with acquired(lock) as held:
        if held is None:
            raise BusyError(f"another atomtx writes {path}", hint="try again when it has ended")
        with _opened(path) as store:
            store.prepare(tree)
            yield store


def _has_content(file: Path) -> bool:
    """Tell whether it is a database, or a stranger's; to look would disturb who makes one."""
    return file.exists() and file.stat().st_size > 0


def _make(file: Path) -> None:
    """See that a file is there, for nobody else to read."""
    os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))


@contextmanager
def reading(path: Path) -> Iterator[Store]:
    """
    Open the database to read it, all as of one instant.

    UserError where there is none, or nothing in it.
    """
    with looking(path) as store:
        if store is None:
            raise _none(path)
        yield store


@contextmanager
def looking(path: Path) -> Iterator[Store | None]:
    """
    Open the database as `reading` does; None where there is none, or nothing in it.

    A first scan that was killed, or found no room, leaves a file without tables.
    """
    if not _is_there(path):
        yield None
        return
    with _frozen(path) if _is_frozen(path) else _opened(path) as store:
        store.connection.execute("PRAGMA query_only=ON")
        store.connection.execute("BEGIN")
        yield store if store.judge() else None


def _is_there(path: Path) -> bool:
    """Tell whether there is a database; UserError where the user may not look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:
        raise UserError(
            f"cannot read the integrity database {path}: {exc.strerror}",
            hint="run atomtx as root, or name one with --database",
        ) from exc
    return True


def _is_frozen(path: Path) -> bool:
    """Tell whether a database is whole without its WAL, where nothing can be made beside it."""
    wal = path.with_name(path.name + "-wal")
    is_whole = not wal.exists() or not wal.stat().st_size
    return is_whole and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


@contextmanager
def _frozen(path: Path) -> Iterator[Store]:
    """
    Open a database where SQLite could not make its -shm, and so asks for no lock either.

    BusyError where it was written meanwhile: it may be read-only here and not elsewhere.
    """
    before = path.stat()
    try:
        with _opened(path, "mode=ro&immutable=1") as store:
            yield store
    except AtomtxError:  # what changes meanwhile looks like damage
        _refuse_written(path, before)
        raise
    _refuse_written(path, before)


def _refuse_written(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise BusyError(f"{path} was written while it was read", hint="try again")


@contextmanager
def _opened(path: Path, how: str = "mode=rw") -> Iterator[Store]:
    try:
        uri = f"{path.absolute().as_uri()}?{how}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=True
        )
        with closing(connection):
            yield Store(path, connection)
    except sqlite3.Error as exc:
        raise _translated(path, exc) from exc


class Store:
    """An open database; what is written is durable after `commit`, and gone without it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.connection = connection
        self._generation = 0
        self._new: list[tuple[object, ...]] = []
        self._paths: dict[int, bytes] = {}

    # -- the file ----------------------------------------------------------------------------

    def judge(self) -> bool:
        """
        Tell whether it has our tables; False where it is empty.

        UserError where it is no integrity database, or a newer atomtx made it.
        """
        (application,) = self.connection.execute("PRAGMA application_id").fetchone()
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            return False
        if application != APPLICATION_ID:
            raise UserError(
                f"{self.path} is a database, but no integrity database of atomtx",
                hint="name another file with --database",
            )
        if version > SCHEMA_VERSION:
            raise UserError(
                f"a newer atomtx wrote {self.path} (its version is {version}, this atomtx knows "
                f"{SCHEMA_VERSION})",
                hint="use the newer atomtx; the file was left untouched",
            )
        return True

    def prepare(self, tree: bytes) -> None:
        """Make the tables where there are none; UserError where they are of another tree."""
        if not self.judge():
            self.connection.execute("PRAGMA journal_mode=WAL")
            self._make(tree)
        for pragma in ("synchronous=FULL", f"cache_size=-{_CACHE_KIB}"):
            self.connection.execute(f"PRAGMA {pragma}")
        if self.tree != tree:
            mine, asked = (os.fsdecode(each) for each in (self.tree, tree))
            raise UserError(
                f"{self.path} is the database of {mine}, not of {asked}",
                hint=f"say --of {mine} if this is a snapshot or a copy of it",
            )

    def _make(self, tree: bytes) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.split(";")[:-1]:
            self.connection.execute(statement)
        self.connection.execute("INSERT INTO tree VALUES (?, 'sha256')", (tree,))
        self.connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        self.connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self.connection.execute("COMMIT")

    @property
    def tree(self) -> bytes:
        """The live path of the tree; of one below `/` some versions wrote two slashes."""
        (path,) = self.connection.execute("SELECT path FROM tree").fetchone()
        return b"/" + bytes(path).lstrip(b"/")

    # -- generations -------------------------------------------------------------------------

    def generations(self) -> list[Generation]:
        """Return the whole generations, the oldest first."""
        columns = ", ".join(Generation._fields)
        rows = self.connection.execute(f"SELECT {columns} FROM generation ORDER BY id")
        return [Generation._make(row) for row in rows]

    def generation(self, number: int | None) -> Generation:
        """Return one, the newest for None; UserError where it is not there."""
        found = {each.id: each for each in self.generations()}
        if not found:
            raise _none(self.path)
        try:
            return found[max(found) if number is None else number]
        except KeyError as exc:
            raise UserError(
                f"{self.path} has no generation {number}",
                hint=f"it has {', '.join(map(str, found))}",
            ) from exc

    def begin(self, path: bytes, started: int, *, complete: bool) -> int:
        """Begin a new generation and return its number; without `commit` it never was."""
        self.connection.execute("BEGIN IMMEDIATE")
        newest = self.connection.execute("SELECT max(id) FROM generation").fetchone()[0]
        self._generation = (newest or 0) + 1
        self.connection.execute(
            "INSERT INTO generation (id, path, started, complete) VALUES (?, ?, ?, ?)",
            (self._generation, path, started, complete),
        )
        return self._generation

    def commit(self, counts: Counts, ended: int) -> None:
        """Make the generation whole, and durable."""
        self._flush()
        columns = ", ".join(f"{name} = ?" for name in Counts._fields)
        self.connection.execute(
            f"UPDATE generation SET ended = ?, {columns} WHERE id = ?",
            (ended, *counts, self._generation),
        )
        self.connection.execute("COMMIT")

    def forget(self, keep: int) -> int:
        """
        Forget all but the newest *keep* generations, and return how many that were.

        The file is made smaller, also of what an earlier call could not: EffectError where there
        is no room for that, and then they are forgotten all the same.  Where nothing was forgotten
        since, it is left as it is.
        """
        old = [each.id for each in self.generations()][:-keep]
        if old:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS {_DUE} (x INTEGER) STRICT")
            self.connection.execute("DELETE FROM entry WHERE until <= ?", (old[-1],))
            self.connection.execute("DELETE FROM generation WHERE id <= ?", (old[-1],))
            self.connection.execute("DELETE FROM node WHERE id NOT IN (SELECT node FROM entry)")
            self.connection.execute("COMMIT")
        if self._is_to_shrink():
            self._shrink(len(old))
        return len(old)

    def _is_to_shrink(self) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE name = ?"
        return self.connection.execute(query, (_DUE,)).fetchone() is not None

    def _shrink(self, forgotten: int) -> None:
        try:
            self.connection.execute("VACUUM")
            self.connection.execute(f"DROP TABLE {_DUE}")
        except sqlite3.Error as exc:
            if not _is_full(self.path, exc):
                raise
            raise EffectError(
                f"{forgotten} generations forgotten, but no space left to make {self.path} smaller",
                hint="make room for twice its size, there and in $TMPDIR, and say it again",
            ) from exc

    # -- entries -----------------------------------------------------------------------------

    def node(self, parent: int, name: bytes) -> int:
        """Return the number of a directory, a new one where it never had one."""
        found = self.find_node(parent, name)
        if found is not None:
            return found
        cursor = self.connection.execute(
            "INSERT INTO node (parent, name) VALUES (?, ?)", (parent, name)
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def find_node(self, parent: int, name: bytes) -> int | None:
        """Return the number of a directory; None where it never had one."""
        row = self.connection.execute(
            "SELECT id FROM node WHERE parent = ? AND name = ?", (parent, name)
        ).fetchone()
        return row[0] if row else None

    def current(self, node: int) -> dict[bytes, Entry]:
        """Return what the last generation has in a directory, by name."""
        rows = self.connection.execute(
            f"SELECT {_COLUMNS} FROM entry WHERE node = ? AND until IS NULL", (node,)
        )
        return {row[0]: Entry._make(row) for row in rows}

    def at(self, node: int, generation: int) -> dict[bytes, Entry]:
        """Return what a generation has in a directory, by name and in its order."""
        rows = self.connection.execute(
            f"SELECT {_COLUMNS} FROM entry WHERE node = :node AND {_AT} ORDER BY name",
            {"node": node, "at": generation},
        )
        return {row[0]: Entry._make(row) for row in rows}

    def write(self, node: int, old: Entry | None, new: Entry) -> None:
        """Note an entry of this generation, in the place of the last one's."""
        if old is not None:
            is_known = max(old.state, new.state) <= State.RACY  # else it tells what was seen then
            if old == new or (is_known and old._replace(state=new.state) == new):
                if old.state != new.state:
                    self.connection.execute(
                        "UPDATE entry SET state = ? WHERE node = ? AND name = ? AND until IS NULL",
                        (int(new.state), node, new.name),
                    )
                return
            self.close(node, old)
        self._new.append((node, self._generation, *new))
        if len(self._new) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        places = ", ".join("?" * (len(Entry._fields) + 2))
        self.connection.executemany(
            f"INSERT INTO entry (node, since, {_COLUMNS}) VALUES ({places})", self._new
        )
        self._new.clear()

    def close(self, node: int, old: Entry) -> None:
        """Note that an entry of the last generation is not in this one; nor what is below it."""
        self.connection.execute(
            "UPDATE entry SET until = ? WHERE node = ? AND name = ? AND until IS NULL",
            (self._generation - 1, node, old.name),
        )

    def close_below(self, node: int) -> None:
        """Note that all that the last generation had below a directory is not in this one."""
        self.connection.execute(
            f"{_BELOW} UPDATE entry SET until = :last WHERE until IS NULL AND node IN below",
            {"node": node, "last": self._generation - 1},
        )

    def has_below(self, path: bytes, generation: int) -> bool:
        """Tell whether a generation has anything in the directory at *path*."""
        node = self.find_node(TOP, b"")
        for name in path.split(b"/"):
            node = self.find_node(node, name) if node is not None else None
        return node is not None and bool(self.at(node, generation))

    # -- whole generations -------------------------------------------------------------------

    def tree_at(self, generation: int) -> Iterator[tuple[bytes, Entry]]:
        """Yield all entries of a generation with their paths, in the order of a walk."""
        for name, entry in self.at(TOP, generation).items():
            yield name, entry
            node = self.find_node(TOP, name)
            if node is not None:
                yield from self.below(b"", node, generation)

    def changed(self, a: int, b: int) -> Iterator[tuple[bytes, Entry | None, Entry | None]]:
        """
        Yield each path that may differ between two generations, with its entry in each.

        Among them are those that one of the two could not read.
        """
        in_a, in_b = (_AT.replace(":at", name) for name in (":a", ":b"))
        rows = self.connection.execute(
            f"SELECT node, {in_a}, {in_b}, {_COLUMNS} FROM entry"
            f" WHERE ({in_a}) != ({in_b}) OR (state >= 2 AND {in_a}) ORDER BY node, name",
            {"a": a, "b": b},
        )
        for (node, name), group in groupby(rows, key=lambda row: (row[0], row[3])):
            old = new = None
            for row in group:
                entry = Entry._make(row[3:])
                old = entry if row[1] else old
                new = entry if row[2] else new
            above = self.path_of(node)
            yield (above + b"/" + name if above else name), old, new

    def below(self, path: bytes, node: int, generation: int) -> Iterator[tuple[bytes, Entry]]:
        """Yield all that a generation has below a directory with the paths, parents first."""
        waiting: list[tuple[bytes, int | None]] = [(path, node)]
        while waiting:
            above, parent = waiting.pop()
            if parent is None:  # a directory that was never entered
                continue
            directories = []
            for name, entry in self.at(parent, generation).items():
                full = above + b"/" + name if above else name
                yield full, entry
                if entry.is_directory:
                    directories.append((full, self.find_node(parent, name)))
            waiting += reversed(directories)

    def path_of(self, node: int) -> bytes:
        """Return the path of a directory below the root, empty for the root."""
        names: list[bytes] = []
        here = node
        while here != TOP and here not in self._paths:
            here, name = self.connection.execute(
                "SELECT parent, name FROM node WHERE id = ?", (here,)
            ).fetchone()
            names.append(name)
        start = [self._paths[here]] if here != TOP else []
        self._paths[node] = b"/".join(filter(None, (*start, *reversed(names))))
        return self._paths[node]


def _none(path: Path) -> UserError:
    return UserError(
        f"there is no integrity database at {path}, or nothing in it",
        hint="`atomtx sure scan` makes one",
    )


def _full(path: Path) -> AtomtxError:
    return EffectError(
        f"no space left for {path}", hint="make room; the generations before are untouched"
    )


def _is_full(path: Path, exc: sqlite3.Error) -> bool:
    """Tell whether an error says that a disk is full; SQLite has another for its -shm."""
    name = _name(exc)
    if name.startswith(("SQLITE_IOERR_SHM", "SQLITE_IOERR_WRITE")):
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize < _FULL_BYTES
    return name.startswith("SQLITE_FULL")


def _name(exc: sqlite3.Error) -> str:
    return getattr(exc, "sqlite_errorname", "") or ""


def _translated(path: Path, exc: sqlite3.Error) -> AtomtxError:
    """Return our error for one of SQLite's."""
    name = _name(exc)
    if name.startswith("SQLITE_BUSY"):
        return BusyError(f"another process works with {path}", hint="try again")
    if _is_full(path, exc):
        return _full(path)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return AtomtxError(
            f"the integrity database {path} is damaged: {exc}",
            hint="move it away with its -wal and -shm; the next scan begins a new one",
        )
    hint = None
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
        hint = "is it read-only? copy it, with its -wal, to where it can be written"
    return AtomtxError(f"cannot use the integrity database {path}: {exc}", hint=hint)

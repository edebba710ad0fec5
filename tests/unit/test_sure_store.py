"""The database of a tree: whole generations or none, and nothing of a stranger's touched."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtx import locks
from atomtx.errors import AtomtxError, BusyError, EffectError, UserError
from atomtx.integrity import places, scanning, store
from atomtx.integrity.entry import Entry
from tests.sure import Watched

ROOT = Path(__file__).parents[2]
UNSHARED = ("unshare", "--mount", "sh", "-c")


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    """A tree that was scanned once."""
    made = Watched(tmp_path)
    (made.tree / "a").mkdir()
    (made.tree / "a/one").write_text("one")
    made.scan()
    return made


def ask(path: Path, question: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(question, values).fetchall()


# -- a kill --------------------------------------------------------------------------------------

KILLED = """
import sys, time
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from atomtx.integrity import hashing, scanning, store
store._CACHE_KIB = 16  # so that what is not committed is in the files
store._ROWS_AT_ONCE = 10
hashing.BATCHES_A_THREAD, hashing._cores = 1, lambda: 2
def progress(entries, read):
    if entries > 600:
        print("now", flush=True)
        time.sleep(600)
tree, file = map(Path, sys.argv[1:3])
with store.writing(file, str(tree).encode()) as db:
    scanning.scan(db, tree, told=scanning.Told(progress=progress))
"""


@pytest.mark.parametrize("first", [True, False])
def test_killed(tmp_path: Path, first: bool) -> None:
    """SIGKILL in the middle of a scan leaves the last whole generation, or none; the next works."""
    watched = Watched(tmp_path)
    for number in range(40):
        (watched.tree / f"d{number:02}").mkdir()
        for name in range(40):
            (watched.tree / f"d{number:02}/{name}").write_text(f"{number} {name}")
    if not first:
        watched.scan()
        before = watched.entries()
        for file in watched.tree.glob("d*/*"):
            file.write_text("changed")
        shutil.rmtree(watched.tree / "d01")
    paths = [str(ROOT / "engine"), str(ROOT)]
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, watched.tree, watched.file, *paths],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "now\n"
        finally:
            child.send_signal(signal.SIGKILL)
    wal = watched.file.with_name(watched.file.name + "-wal")
    assert wal.stat().st_size > 60_000  # the half of it was written
    if first:
        with pytest.raises(UserError, match="nothing in it"):
            watched.entries()
    else:
        assert watched.entries() == before
    assert ask(watched.file, "PRAGMA integrity_check") == [("ok",)]
    assert watched.scan().generation == (1 if first else 2)
    assert watched.check() == []
    assert watched.check(against=1) == [] or not first


# -- any change --------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "a/a", "a/b", "b/a", "b/a/a", "c\udcff"])
EDIT = st.tuples(
    st.sampled_from(["file", "rot", "directory", "link", "hard", "remove", "mode", "rename"]),
    NAMES,
    NAMES,
)


def edit(tree: Path, kind: str, name: str, other: str, random_: random.Random) -> None:
    """Do one change to a tree, if it can be done."""
    path = tree / name
    try:
        if kind == "remove":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif kind == "directory":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(other)
        elif kind == "hard":
            os.link(tree / other, path, follow_symlinks=False)
        elif kind == "mode":
            path.chmod(random_.choice([0o700, 0o755, 0o750]), follow_symlinks=True)
        elif kind == "rename":
            path.rename(tree / other)
        elif kind == "rot":  # the same size, and the same mtime
            info = path.stat()
            path.write_bytes(bytes([random_.randrange(256)]) * info.st_size)
            os.utime(path, ns=(0, info.st_mtime_ns))
        else:
            path.write_text(random_.choice(["x", "y", "xx", "yy"]))
    except OSError:
        return


@settings(max_examples=60)
@given(
    st.lists(st.lists(EDIT, max_size=6), min_size=1, max_size=5), st.randoms(use_true_random=False)
)
def test_as_full(rounds: list[list[tuple[str, str, str]]], random_: random.Random) -> None:
    """
    After any edits, a scan that reads only what changed finds what a first scan finds.

    The clock is the real one: edits of one tick are what the racy rule is for.  And each earlier
    generation stays what it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        watched = Watched(Path(folder))
        past: list[dict[str, Entry]] = []
        for number, edits in enumerate(rounds):
            for kind, name, other in edits:
                edit(watched.tree, kind, name, other, random_)
            watched.scan(may_be_empty=True, now=time.time_ns)
            fresh = Watched(Path(folder) / f"fresh-{number}")
            fresh.scan(watched.tree)
            assert watched.entries() == fresh.entries()
            past.append(fresh.entries())
            if number:
                told = {
                    line.split(" ")[1].split(":")[0] for line in watched.diff(number, number + 1)
                }
                assert told == {
                    path or "."
                    for path in past[-1].keys() | past[-2].keys()
                    if past[-1].get(path) != past[-2].get(path)
                }
        for number, entries in enumerate(past, 1):
            assert watched.entries(number) == entries


# -- whose it is -------------------------------------------------------------------------------


def test_private(watched: Watched) -> None:
    """Nobody else may read what the files are called, whatever the umask."""
    old = os.umask(0)
    try:
        other = Watched(watched.tree.parent / "other")
        other.scan()
    finally:
        os.umask(old)
    for path in other.file.parent.glob("sure.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_newer(watched: Watched) -> None:
    """A database of a newer release is refused, and left untouched."""
    ask(watched.file, f"PRAGMA user_version={store.SCHEMA_VERSION + 1}")
    before = watched.file.read_bytes()
    for use in (watched.scan, watched.check):
        with pytest.raises(UserError, match="newer atomtx"):
            use()
    assert watched.file.read_bytes() == before


def test_foreign_database(watched: Watched) -> None:
    """Another program's database is refused, and left untouched."""
    watched.file.unlink()
    ask(watched.file, "CREATE TABLE theirs (x)")
    before = watched.file.read_bytes()
    for use in (watched.scan, watched.check):
        with pytest.raises(UserError, match="no integrity database"):
            use()
    assert watched.file.read_bytes() == before


def test_no_database(watched: Watched) -> None:
    """A file that is no database is an error that says what to do."""
    watched.file.write_bytes(b"something else" * 1000)
    with pytest.raises(AtomtxError, match="damaged") as caught:
        watched.scan()
    assert "move it away" in (caught.value.hint or "")


@pytest.mark.parametrize("theirs", ["database", "text"])
def test_nothing_beside_foreign(watched: Watched, tmp_path: Path, theirs: str) -> None:
    """No lock is left beside a file of somebody else's: /etc/passwd.lock would mean something."""
    watched.file = tmp_path / "own" / "passwd"
    watched.file.parent.mkdir()
    if theirs == "database":
        ask(watched.file, "CREATE TABLE theirs (x)")
    else:
        watched.file.write_text("root:x:0:0:root:/root:/bin/bash\n" * 20)
    with pytest.raises(AtomtxError):
        watched.scan()
    assert list(watched.file.parent.iterdir()) == [watched.file]


def test_tree_with_two_slashes(tmp_path: Path) -> None:
    """A database that a version made for //etc, from a snapshot of /, is the one of /etc."""
    file = tmp_path / "etc.db"
    with store.writing(file, b"/etc"):
        pass
    ask(file, "UPDATE tree SET path = ?", b"//etc")
    with store.writing(file, b"/etc") as db:
        assert db.tree == b"/etc"
    words = "is the database of /etc, not of /home"
    with pytest.raises(UserError, match=words), store.writing(file, b"/home"):
        pass


def test_other_tree(watched: Watched) -> None:
    """The database of another tree is refused, and has no new generation."""
    watched.tree = watched.tree / "a"
    with pytest.raises(UserError, match="is the database of") as caught:
        watched.scan()
    assert "--of" in (caught.value.hint or "")
    assert ask(watched.file, "SELECT count(*) FROM generation") == [(1,)]


def test_busy(watched: Watched) -> None:
    """Two scans at once are refused, not mixed; a reader does not disturb either."""
    with store.writing(watched.file, os.fsencode(watched.tree)) as db:
        db.begin(b"x", 1, complete=False)
        with pytest.raises(BusyError, match="another atomtx writes"):
            watched.scan()
        assert watched.check() == []
    assert watched.scan().generation == 2


def test_busy_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes the database is not disturbed by another one who comes to make it."""
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.0)
    file = tmp_path / "new.db"
    for made in (file, file.with_name("new.db.lock")):
        made.touch()
    with locks.acquired(file.with_name("new.db.lock")), closing(sqlite3.connect(file)) as first:
        first.execute("BEGIN EXCLUSIVE")
        with (
            pytest.raises(BusyError, match="another atomtx writes"),
            store.writing(file, b"/tree"),
        ):
            pass


def test_long_reader(watched: Watched) -> None:
    """Whoever reads for hours keeps no scan from its commit, and sees what he began with."""
    with store.reading(watched.file) as db:
        (watched.tree / "a/one").write_text("other")
        assert watched.scan().generation == 2
        assert [each.id for each in db.generations()] == [1]
    assert len(watched.entries(2)) == 3


def test_no_generation(watched: Watched) -> None:
    """A generation that is not there is a usage error that lists those that are."""
    with pytest.raises(UserError, match="no generation 7") as caught:
        watched.check(against=7)
    assert caught.value.hint == "it has 1"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SQLITE_FULL", EffectError),
        ("SQLITE_BUSY_SNAPSHOT", BusyError),
        ("SQLITE_IOERR_WRITE", AtomtxError),
    ],
)
def test_errors(watched: Watched, name: str, kind: type[AtomtxError]) -> None:
    """SQLite's errors become ours; what was begun is not there."""

    def fail() -> None:
        with store.writing(watched.file, os.fsencode(watched.tree)) as db:
            db.begin(b"x", 1, complete=False)
            error = sqlite3.OperationalError("x")
            error.sqlite_errorname = name
            raise error

    with pytest.raises(AtomtxError) as caught:
        fail()
    assert type(caught.value) is kind
    assert ask(watched.file, "SELECT count(*) FROM generation") == [(1,)]


def test_really_full(watched: Watched) -> None:
    """A scan that finds no room says so, and the generation before is whole."""
    before = watched.entries()
    for number in range(3000):
        (watched.tree / f"file-{number}").touch()

    def scan_without_room() -> None:
        with store.writing(watched.file, os.fsencode(watched.tree)) as db:
            (pages,) = db.connection.execute("PRAGMA page_count").fetchone()
            db.connection.execute(f"PRAGMA max_page_count={pages + 2}")
            scanning.scan(db, watched.tree)

    with pytest.raises(EffectError, match="no space"):
        scan_without_room()
    assert watched.entries() == before


FROZEN = """
import os, sys
sys.path[:0] = sys.argv[4:]
from pathlib import Path
from atomtx.errors import AtomtxError
from atomtx.integrity import store
try:
    with store.reading(Path(sys.argv[1], "sure.db")) as db:
        print([each.id for each in db.generations()])
        if sys.argv[3]:
            os.utime(sys.argv[3])
except AtomtxError as exc:
    print(f"{type(exc).__name__}: {exc}")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("state", ["whole", "written", "cut off"])
def test_read_only(watched: Watched, tmp_path: Path, state: str) -> None:
    """A database on a read-only medium is read; not half of one, nor one that changes."""
    medium = tmp_path / "medium"
    medium.mkdir()
    with store.writing(watched.file, os.fsencode(watched.tree)) as db:
        db.begin(b"x", 1, complete=False)
        db.commit(store.Counts(0, 0, 0, 0, 0), 2)
        if state == "cut off":
            shutil.copy(f"{watched.file}-wal", f"{watched.file}-kept")
    if state == "cut off":
        os.rename(f"{watched.file}-kept", f"{watched.file}-wal")
    written = watched.file if state == "written" else ""
    python, paths = (sys.executable, "-c", FROZEN), (medium, "", written, f"{ROOT}/engine", ROOT)
    command = 'mount --bind "$0" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    done = subprocess.run(
        [*UNSHARED, command, watched.file.parent, medium, *python, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {
        "whole": r"\[1, 2\]",
        "written": r"\[1, 2\]\nBusyError: .*/sure.db was written while it was read \(try again\)",
        "cut off": r"AtomtxError: .*: unable to open database file \(is it read-only\?.*",
    }
    assert re.fullmatch(expected[state] + r"\n", done.stdout), done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_no_room_to_read(watched: Watched, tmp_path: Path) -> None:
    """A disk without room for what SQLite makes to read is called full, not broken."""
    disk = tmp_path / "disk"
    disk.mkdir()
    python, paths = (sys.executable, "-c", FROZEN), (disk, "", "", f"{ROOT}/engine", ROOT)
    command = (
        'mount -t tmpfs -o size=256k tmpfs "$1" && cp "$0" "$1/sure.db" && '
        '{ head -c 1M /dev/zero >"$1/fill" || true; } 2>&- && shift && exec "$@"'
    )
    done = subprocess.run(
        [*UNSHARED, command, watched.file, disk, *python, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"EffectError: no space left for {disk}/sure.db")


def test_cannot_write(watched: Watched) -> None:
    """A place that cannot be written is a usage error."""
    watched.file = watched.tree / "absent" / "sure.db"
    with pytest.raises(UserError, match="cannot write"):
        watched.scan()


# -- forgetting --------------------------------------------------------------------------------


def test_forget(watched: Watched) -> None:
    """What is forgotten is gone, with its rows; what is kept is as it was."""
    kept = []
    for number in range(4):
        (watched.tree / f"new{number}").mkdir()
        (watched.tree / f"new{number}/file").write_text(str(number))
        if number:
            shutil.rmtree(watched.tree / f"new{number - 1}")
        watched.scan()
        kept.append(watched.entries())
    with store.writing(watched.file, os.fsencode(watched.tree)) as db:
        assert db.forget(2) == 3
        assert db.forget(2) == 0
        assert [each.id for each in db.generations()] == [4, 5]
    assert [watched.entries(4), watched.entries(5)] == kept[-2:]
    names = {name for (name,) in ask(watched.file, "SELECT name FROM entry")}
    assert b"new1" not in names
    assert {b"new2", b"new3"} <= names
    assert watched.scan().generation == 6
    assert watched.check() == []


def test_forget_nothing(watched: Watched) -> None:
    """Where nothing is forgotten, and nothing was left to do, the file is not written anew."""

    def look() -> tuple[int, int, int]:
        info = watched.file.stat()
        return info.st_ino, info.st_size, info.st_mtime_ns

    tree = os.fsencode(watched.tree)
    with store.writing(watched.file, tree) as db:
        assert db.forget(5) == 0
    for _ in range(3):
        watched.scan(full=True)
    with store.writing(watched.file, tree) as db:
        assert db.forget(2) == 2
    os.utime(watched.file, ns=(0, 0))
    before = look()
    with store.writing(watched.file, tree) as db:
        assert db.forget(2) == 0
    assert look() == before


CRAMPED = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from atomtx.integrity import store
store._CACHE_KIB = 16  # so that SQLite needs a temporary file
tree, file = sys.argv[1:3]
try:
    with store.writing(Path(file), tree.encode()) as db:
        db.forget(1)
except store.EffectError as exc:
    print(exc.message)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_forget_without_room(watched: Watched, tmp_path: Path) -> None:
    """What was forgotten before the room ran out is told so; the next call shrinks the file."""
    for _ in range(2):
        for number in range(2000):
            (watched.tree / f"file-{number}").write_text("x")
        watched.scan(full=True)
    (tmp_path / "small").mkdir()
    command = 'mount -t tmpfs -o size=64k tmpfs "$SQLITE_TMPDIR" && exec "$@"'
    python = (sys.executable, "-c", CRAMPED, watched.tree, watched.file, f"{ROOT}/engine", ROOT)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", *python],
        env={**os.environ, "SQLITE_TMPDIR": str(tmp_path / "small")},
        capture_output=True,
        text=True,
        check=True,
    )
    told = f"2 generations forgotten, but no space left to make {watched.file} smaller\n"
    assert done.stdout == told
    assert watched.check() == []
    large = watched.file.stat().st_size
    with store.writing(watched.file, os.fsencode(watched.tree)) as db:
        assert [each.id for each in db.generations()] == [3]
        assert db.forget(1) == 0
    assert watched.file.stat().st_size < large * 0.7


# -- where it is -------------------------------------------------------------------------------


def test_places(tmp_path: Path) -> None:
    """Each tree has a file of its own, whatever its path; also one that is long."""
    trees = [Path(name) for name in ("/", "/a", "/a/b", "/a%2Fb", "/a\udcff", "/" + "x" * 3000)]
    trees.append(Path("/" + "x" * 2999))
    files = [places.database_of(tmp_path, tree) for tree in trees]
    assert len(set(files)) == len(trees)
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.with_name(file.name + "-journal").touch()  # a name that the file system takes


@pytest.mark.parametrize(
    ("path", "tree"),
    [
        ("/tank/home/.zfs/snapshot/monday", "/tank/home"),
        ("/tank/home/.zfs/snapshot/monday/ann/x", "/tank/home/ann/x"),
        ("/.zfs/snapshot/monday", "/"),
        ("/.zfs/snapshot/monday/etc", "/etc"),
        ("/tank/home", "/tank/home"),
        ("/tank/.zfs/other/x", "/tank/.zfs/other/x"),
    ],
)
def test_snapshot_of(path: str, tree: str) -> None:
    """A snapshot of ZFS is known to be of its dataset."""
    assert places.tree_of(Path(path)) == Path(tree)


def test_folder(tmp_path: Path) -> None:
    """The folder of the databases is made once, for nobody else; a file in its place is told."""
    file = tmp_path / "sure/x.db"
    for _ in range(2):
        places.prepare(file)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.parent.rmdir()
    file.parent.touch()
    with pytest.raises(UserError, match=os.strerror(errno.EEXIST)):
        places.prepare(file)

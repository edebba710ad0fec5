"""Scans and checks of real trees: what changed is found, and what was not read is said."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from atomtx.errors import AtomtxError, UserError
from atomtx.integrity import hashing, scanning, walk
from atomtx.integrity.entry import State
from atomtx.integrity.hashing import Reader
from tests.sure import Watched, unchanged_stat

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="owners and mounts need root")


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    """A tree that was scanned once."""
    made = Watched(tmp_path)
    (made.tree / "a/b").mkdir(parents=True)
    (made.tree / "a/one").write_text("one")
    (made.tree / "a/b/two").write_text("two")
    (made.tree / "three").write_text("three")
    (made.tree / "link").symlink_to("three")
    (made.tree / "large").write_bytes(os.urandom(3 * hashing.BUFFER_BYTES + 17))
    summary = made.scan()
    assert (summary.generation, summary.counts.hashed, summary.counts.errors) == (1, 4, 0)
    assert made.check() == []
    return made


def set_xattr(path: Path) -> None:
    try:
        os.setxattr(path, "user.x", b"y")
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            pytest.skip("no extended attributes here")
        raise


def relink(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


def rotten(path: Path) -> None:
    """Change one byte, and nothing that stat tells but ctime."""
    with unchanged_stat(path), path.open("r+b") as file:
        file.seek(path.stat().st_size - 1)
        last = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last[0] ^ 1]))


EDITS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "mode": ("three", lambda path: path.chmod(0o600), "changed three: mode"),
    "owner": ("three", lambda path: os.chown(path, 12, -1), "changed three: owner"),
    "group": ("three", lambda path: os.chown(path, -1, 12), "changed three: group"),
    "time": ("three", lambda path: os.utime(path, ns=(0, 5)), "changed three: time"),
    "xattrs": ("three", set_xattr, "changed three: xattrs"),
    "directory": ("a/b", lambda path: path.chmod(0o700), "changed a/b: mode"),
    "directory-xattrs": ("a/b", set_xattr, "changed a/b: xattrs"),
    "root": ("", lambda path: path.chmod(0o711), "changed .: mode"),
    "target": ("link", relink, "changed link: target,time"),
    "contents": ("three", rotten, "changed three: contents"),
    "last-byte-of-many": ("large", rotten, "changed large: contents"),
    "append": (
        "three",
        lambda path: path.write_text("three and more"),
        "changed three: contents,size,time",
    ),
    "missing": ("three", Path.unlink, "missing three"),
    "extra": ("new", Path.touch, "extra new"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_each_change(watched: Watched, edit: str) -> None:
    """Each change of a property, and it alone, is named by a check, and by a diff after a scan."""
    if edit in ("owner", "group") and os.geteuid() != 0:
        pytest.skip("owners need root")
    name, change, expected = EDITS[edit]
    top = watched.tree.stat()
    change(watched.tree / name)
    if name:
        os.utime(watched.tree, ns=(0, top.st_mtime_ns))
    assert watched.check() == [expected]
    watched.scan()
    assert watched.diff(1, 2, ignore=("ctime", "inode")) == [expected]
    assert watched.check() == []
    assert watched.check(against=1) == [expected]


def test_types(watched: Watched) -> None:
    """What became something else is named, and so is all that was or is below it."""
    (watched.tree / "three").unlink()
    (watched.tree / "three").mkdir()
    (watched.tree / "three/in").touch()
    shutil.rmtree(watched.tree / "a")
    (watched.tree / "a").write_text("a file")
    expected = [
        "changed a: type",
        "changed three: type",
        "extra three/in",
        "missing a/b",
        "missing a/b/two",
        "missing a/one",
    ]
    assert watched.check(ignore=("time", "ctime", "inode")) == expected
    watched.scan()
    assert sorted(watched.diff(1, 2, ignore=("time", "ctime", "inode"))) == expected
    assert watched.check() == []


def test_restored(watched: Watched, tmp_path: Path) -> None:
    """A copy elsewhere, with other inodes and ctimes, has no difference; --strict sees them."""
    copy = tmp_path / "restored"
    shutil.copytree(watched.tree, copy, symlinks=True)
    for folder in (copy / "a/b", copy / "a", copy):  # what copytree sets too early
        original = watched.tree / folder.relative_to(copy)
        os.utime(folder, ns=(0, original.stat().st_mtime_ns))
    assert watched.check(copy) == []
    assert "changed three: ctime,inode" in watched.check(copy, ignore=())
    rotten(copy / "large")
    assert watched.check(copy) == ["changed large: contents"]


def test_unchanged(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second scan opens no file, and adds one row to the database."""

    def refuse(*_: object) -> None:
        raise AssertionError("a file was read")

    def rows() -> list[int]:
        with closing(sqlite3.connect(watched.file)) as connection:
            return [
                connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("generation", "entry", "node")
            ]

    before = rows()
    monkeypatch.setattr(Reader, "read", refuse)
    summary = watched.scan()
    assert (summary.counts.hashed, summary.counts.hashed_bytes) == (0, 0)
    assert summary.counts.entries == 8
    assert rows() == [before[0] + 1, *before[1:]]
    assert watched.diff(1, 2) == []


def test_only_changed(watched: Watched) -> None:
    """Only what changed is hashed."""
    (watched.tree / "a/one").write_text("other")
    (watched.tree / "a/new").write_text("new")
    summary = watched.scan()
    assert (summary.counts.hashed, summary.counts.hashed_bytes) == (2, 8)


def test_snapshot(watched: Watched, tmp_path: Path) -> None:
    """A tree at another path is the next generation of the same one."""
    moved = tmp_path / "snapshot"
    watched.tree.rename(moved)
    (moved / "a/one").write_text("other")
    assert watched.scan(moved).counts.hashed == 1


# -- racy ----------------------------------------------------------------------------------------


def before_all() -> int:
    """A clock by which all that a test has made is younger than the scan, however slow it is."""
    return 0


def change_unseen(watched: Watched, name: str) -> None:
    """
    Change a file's contents so that stat cannot tell: as within one tick of the clock.

    The database is given the new times, because nobody can give a file the old ctime.
    """
    rotten(watched.tree / name)
    info = (watched.tree / name).stat()
    with closing(sqlite3.connect(watched.file)) as connection, connection:
        done = connection.execute(
            "UPDATE entry SET mtime = ?, ctime = ? WHERE name = ? AND until IS NULL",
            (info.st_mtime_ns, info.st_ctime_ns, os.path.basename(name).encode()),
        )
        assert done.rowcount == 1


def test_racy(watched: Watched) -> None:
    """A file as young as the scan that hashed it is hashed again, whatever its stat says."""
    (watched.tree / "three").write_text("3")
    watched.scan(now=before_all)
    change_unseen(watched, "three")
    watched.scan()
    assert watched.diff(2, 3, ignore=("ctime",)) == ["changed three: contents"]


def test_not_racy(watched: Watched) -> None:
    """One that was older is believed: so the rule is what the other test sees; --full is not."""
    change_unseen(watched, "three")
    watched.scan()
    assert watched.diff(1, 2) == []
    summary = watched.scan(full=True)
    assert summary.damaged == 1
    assert list(watched.problems) == ["three"]
    assert watched.diff(2, 3) == ["changed three: contents"]


def test_racy_once(watched: Watched) -> None:
    """A racy file that proves to be the same is clean from then on, and no new version of it."""
    (watched.tree / "three").write_text("3")
    assert watched.scan(now=before_all).counts.hashed == 1
    assert watched.scan().counts.hashed == 1
    assert watched.scan().counts.hashed == 0
    assert watched.diff(2, 4) == []


def test_racy_mtime(watched: Watched) -> None:
    """A file with a time in the future is hashed each time."""
    os.utime(watched.tree / "three", ns=(0, time.time_ns() + 10**13))
    assert [watched.scan().counts.hashed for _ in range(3)] == [1, 1, 1]


# -- what cannot be read -------------------------------------------------------------------------


def fail_on(monkeypatch: pytest.MonkeyPatch, size: int, number: int = errno.EIO) -> None:
    """Let the read of every file of so many bytes fail."""
    real = os.readv

    def readv(descriptor: int, buffers: Sequence[Any]) -> int:
        if os.fstat(descriptor).st_size == size:
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "readv", readv)


def test_unreadable(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read is named, is an entry, and is tried again by the next scan."""
    (watched.tree / "bad").write_text("bad file")
    with monkeypatch.context() as patch:
        fail_on(patch, len("bad file"))
        for _ in range(2):
            summary = watched.scan()
            assert summary.counts.errors == 1
            assert watched.problems == {"bad": "EIO: Input/output error"}
        entry = watched.entries()["bad"]
        assert (entry.state, entry.digest) == (State.UNREADABLE, None)
        assert watched.check() == ["unreadable bad: EIO: Input/output error"]
    expected = "unverified bad: it was not readable then: EIO: Input/output error"
    assert watched.check() == [expected]
    assert (watched.result.differences, watched.result.not_compared) == (0, 1)
    assert watched.diff(2, 3) == ["unreadable bad: EIO: Input/output error"]
    assert watched.scan().counts.errors == 0
    assert watched.check() == []


def test_unreadable_now(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was readable and is not is unreadable, not the same and not missing."""
    fail_on(monkeypatch, len("three"))
    assert watched.check() == ["unreadable three: EIO: Input/output error"]


def refuse_directory(monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    """Let the opening of a directory fail."""
    real = walk.open_at

    def open_at(path: bytes, flags: int, directory: int | None = None) -> int:
        if path == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, directory)

    monkeypatch.setattr(walk, "open_at", open_at)


def test_unreadable_directory(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a directory that cannot be read nothing below it is said to be missing, or new."""
    expected = "unreadable a: EACCES: Permission denied"
    with monkeypatch.context() as patch:
        refuse_directory(patch, b"a")
        assert watched.check() == [expected]
        assert watched.scan().counts.errors == 1
        assert watched.problems == {"a": "EACCES: Permission denied"}
    assert watched.diff(1, 2) == [expected]
    assert watched.check() == ["unverified a: it was not readable then: EACCES: Permission denied"]
    assert watched.scan().counts.hashed == 2  # again, as nothing was known of them
    assert watched.diff(1, 3) == []
    assert watched.check() == []


def test_stat_fails(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that even stat(2) refuses is an entry, and named."""
    real = walk._look

    def look(directory: walk.Directory, each: os.DirEntry[str]) -> None:
        if each.name == "three":
            directory.failed.append((b"three", "EIO: Input/output error"))
        else:
            real(directory, each)

    with monkeypatch.context() as patch:
        patch.setattr(walk, "_look", look)
        assert watched.check() == ["unreadable three: EIO: Input/output error"]
        assert watched.scan().counts.errors == 1
        assert watched.problems == {"three": "EIO: Input/output error"}
    assert watched.scan().counts.hashed == 1
    assert watched.diff(1, 3) == []


@as_root
def test_no_proc(watched: Watched) -> None:
    """Without /proc, as in a chroot, links and special files are told and kept, not left out."""
    os.mkfifo(watched.tree / "fifo")
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from tests.sure import Watched\n"
        "w = Watched.__new__(Watched)\n"
        "w.tree, w.file, w.problems, w.elsewhere = Path(sys.argv[1]), Path(sys.argv[2]), {}, []\n"
        "print(w.check()); w.scan(full=True); print(sorted(w.problems.items()))\n"
    )
    root = str(Path(__file__).parents[2])
    python = (sys.executable, "-c", script, watched.tree, watched.file, f"{root}/engine", root)
    watched.scan()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh", *python],
        capture_output=True,
        text=True,
        check=True,
    )
    names = ("fifo", "link")
    assert done.stdout.splitlines() == [
        str([f"unreadable {name}: {hashing._NO_PROC}" for name in names]),
        str([(name, hashing._NO_PROC) for name in names]),
    ]
    assert watched.entries()["link"].target == b"three"


def test_opens_as_absent(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is there, and cannot be opened as if it were not, is told."""
    real = walk.open_at

    def open_at(path: bytes, flags: int, directory: int | None = None) -> int:
        if path == b"three":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(path, flags, directory)

    monkeypatch.setattr(hashing, "open_at", open_at)
    assert watched.check() == ["unreadable three: ENOENT: No such file or directory"]
    assert watched.scan(full=True).counts.errors == 1


@pytest.mark.parametrize("remains", [True, False])
def test_stat_says_absent(watched: Watched, monkeypatch: pytest.MonkeyPatch, remains: bool) -> None:
    """A name that is listed again and again, and that stat(2) does not find, is told."""
    real, stat_at = walk._look, os.stat

    def look(directory: walk.Directory, each: os.DirEntry[str]) -> None:
        if each.name == "three":
            directory.absent.append(b"three")
        else:
            real(directory, each)

    def refuse(path: Any, *more: Any, **options: Any) -> os.stat_result:
        if path == b"three":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return stat_at(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(walk, "_look", look)
        assert watched.check() == []  # it is there again on the second look
        if not remains:
            (watched.tree / "three").unlink()
        patch.setattr(os, "stat", refuse)
        found = watched.check(ignore=("time", "ctime"))
        assert watched.scan().counts.errors == remains
    expected = "unreadable three: ENOENT: No such file or directory"
    assert found == [expected if remains else "missing three"]
    assert ("three" in watched.entries()) is remains


def list_twice(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """Let the first *times* listings of a directory have a name of it twice."""
    scandir, listdir, left = os.scandir, os.listdir, [times]

    @contextmanager
    def scanned(place: int) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(place) as names:
            found = list(names)
        yield chain(found, again([each for each in found if each.name == name]))

    def listed(place: int) -> list[str]:
        found = listdir(place)
        return found + again([each for each in found if each == name])

    def again(names: list[Any]) -> list[Any]:
        left[0] -= bool(names)
        return names if left[0] >= 0 else []

    monkeypatch.setattr(os, "scandir", scanned)
    monkeypatch.setattr(os, "listdir", listed)


@pytest.mark.parametrize("name", ["three", "a"])
def test_listed_twice_once(watched: Watched, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A name that a directory, written meanwhile, lists twice is there once."""
    with monkeypatch.context() as patch:
        list_twice(patch, name, 1)
        assert watched.check() == []
    with monkeypatch.context() as patch:
        list_twice(patch, name, 1)
        assert watched.scan().counts.errors == 0
    assert watched.diff(1, 2) == []


@pytest.mark.parametrize("name", ["three", "a"])
def test_listed_twice_later(watched: Watched, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """So it is where the second look, which was for another's sake, lists it twice."""
    look, listdir = walk._look, os.listdir

    def absent(directory: walk.Directory, each: os.DirEntry[str]) -> None:
        if each.name == "link":
            directory.absent.append(b"link")
        else:
            look(directory, each)

    def listed(place: int) -> list[str]:
        found = listdir(place)
        return found + [each for each in found if each == name]

    monkeypatch.setattr(walk, "_look", absent)
    monkeypatch.setattr(os, "listdir", listed)
    assert watched.check() == []
    assert watched.scan().counts.errors == 0


@pytest.mark.parametrize("name", ["three", "a"])
def test_listed_twice(watched: Watched, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A name that a damaged directory lists twice each time is told, and ends no scan."""
    with monkeypatch.context() as patch:
        list_twice(patch, name, 100)
        assert watched.check() == [f"unreadable {name}: {walk.TWICE}"]
        assert watched.scan().counts.errors == 1
        assert watched.problems == {name: walk.TWICE}
        assert watched.entries()[name].state == State.UNREADABLE
    assert watched.scan().counts.errors == 0
    assert watched.diff(1, 3) == []


@pytest.mark.parametrize("times", [1, 2])
def test_changed_while_read(watched: Watched, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A file that changes while it is read is read once more; if it changes again, it is named."""
    real = Reader._digest
    path = watched.tree / "three"
    path.write_text("first")
    left = [times]

    def digest(self: Reader, descriptor: int, size: int) -> tuple[bytes, int]:
        result = real(self, descriptor, size)
        if left[0] and os.fstat(descriptor).st_ino == path.stat().st_ino:
            left[0] -= 1
            path.write_text(f"then {left[0]} more")
        return result

    monkeypatch.setattr(Reader, "_digest", digest)
    summary = watched.scan()
    assert summary.counts.errors == times - 1
    assert watched.problems == ({"three": "changed while it was read"} if times == 2 else {})
    assert watched.entries()["three"].size == path.stat().st_size
    assert (watched.check() == []) is (times == 1)


def test_grown_without_stat(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes than stat says are no contents: that is an error too."""
    real = Reader._digest
    monkeypatch.setattr(
        Reader, "_digest", lambda self, fd, size: (real(self, fd, size)[0], size - 1)
    )
    (watched.tree / "three").write_text("other")
    assert watched.scan().counts.errors == 1


def test_grows_while_read(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that grows as fast as it is read is given up, and named."""
    path = watched.tree / "large"
    real = os.readv
    most = 50 * hashing.BUFFER_BYTES

    def readv(descriptor: int, buffers: Sequence[Any]) -> int:
        read = real(descriptor, buffers)
        if read and path.stat().st_size < most:
            with path.open("ab") as file:
                file.write(bytes(read))
        return read

    rotten(path)
    monkeypatch.setattr(os, "readv", readv)
    summary = watched.scan()
    assert watched.problems == {"large": "changed while it was read"}
    assert summary.counts.hashed_bytes < 13 * hashing.BUFFER_BYTES  # 4 of it, then 8 of twice that


def replace(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "link":
        path.symlink_to("large")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "gone"])
def test_replaced_while_read(watched: Watched, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What a file was swapped for is neither followed nor waited for; one that went is gone."""
    real = Reader.read
    path = watched.tree / "three"
    path.write_text("3")

    def read(self: Reader, directory: int, item: hashing.Item) -> hashing.Reading:
        if item.name == b"three":
            replace(path, kind)
        return real(self, directory, item)

    monkeypatch.setattr(Reader, "read", read)
    summary = watched.scan()
    if kind == "gone":
        assert (summary.counts.errors, "three" in watched.entries()) == (0, False)
    else:
        assert watched.problems == {"three": "changed while it was read"}
        assert watched.entries()["three"].digest is None


def test_swapped_directory(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is swapped for a link is not entered through it."""
    outside = watched.tree.parent / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    real = walk._enter

    def enter(above: walk.Directory, name: bytes, *more: Any) -> walk.Directory:
        if name == b"b":
            shutil.rmtree(watched.tree / "a/b")
            (watched.tree / "a/b").symlink_to(outside)
        return real(above, name, *more)

    monkeypatch.setattr(walk, "_enter", enter)
    assert watched.scan().counts.errors == 1
    assert watched.problems == {"a/b": "changed while it was read"}
    assert not any("secret" in path for path in watched.entries())


def test_vanished_directory(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that goes away during the scan is gone, with all that was below it."""
    real = walk._enter

    def enter(above: walk.Directory, name: bytes, *more: Any) -> walk.Directory:
        if name == b"b":
            shutil.rmtree(watched.tree / "a/b")
        return real(above, name, *more)

    monkeypatch.setattr(walk, "_enter", enter)
    assert watched.scan().counts.errors == 0
    assert not any(path.startswith("a/b") for path in watched.entries())
    monkeypatch.undo()
    assert watched.check() == ["changed a: time"]  # it was listed before


# -- the tree ------------------------------------------------------------------------------------


def test_hard_links(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links of a file are read once, wherever they are, and each has the digest."""
    for name in ("l1", "a/l2", "a/b/l3"):
        os.link(watched.tree / "large", watched.tree / name)
    summary = watched.scan()
    size = (watched.tree / "large").stat().st_size
    assert (summary.counts.hashed, summary.counts.hashed_bytes) == (1, size)
    found = watched.entries()
    assert len({found[name].digest for name in ("large", "l1", "a/l2", "a/b/l3")}) == 1
    assert watched.check() == []
    fail_on(monkeypatch, size)
    for name in ("large", "l1", "a/l2", "a/b/l3"):
        os.utime(watched.tree / name, ns=(0, 7))
    assert watched.scan().counts.errors == 4  # each name is told


def test_first_link_goes(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first link goes away before it is read, the other is read by itself."""
    os.link(watched.tree / "large", watched.tree / "zlink")
    real = Reader.read

    def read(self: Reader, directory: int, item: hashing.Item) -> hashing.Reading:
        if item.name == b"large" and (watched.tree / "large").exists():
            (watched.tree / "large").unlink()
        return real(self, directory, item)

    monkeypatch.setattr(Reader, "read", read)
    assert watched.scan().counts.errors == 0
    monkeypatch.undo()
    assert watched.entries()["zlink"].digest is not None
    assert watched.check() == ["changed .: time"]  # it was listed before


def test_traceless(watched: Watched) -> None:
    """Neither a scan nor a check changes a file's or a directory's time of access."""
    names = ("", "a", "a/b", "three", "large", "a/b/two")

    def times() -> list[int]:
        return [(watched.tree / name).stat().st_atime_ns for name in names]

    for name in names:  # relatime would set those that are older than the change
        os.utime(watched.tree / name, ns=(5, 10**18))
    before = times()
    watched.scan(full=True)
    watched.check()
    assert times() == before == [5] * len(names)


def test_emptied(watched: Watched) -> None:
    """A tree that is empty and was not is refused, as one that is not mounted; or allowed."""
    shutil.rmtree(watched.tree)
    watched.tree.mkdir()
    with pytest.raises(UserError, match="is empty, and was not"):
        watched.scan()
    assert len(watched.entries()) == 8
    watched.scan(may_be_empty=True)
    assert list(watched.entries()) == [""]
    watched.scan()


@pytest.mark.parametrize("name", ["absent", "tree/three"])
def test_no_tree(watched: Watched, name: str) -> None:
    """What is no directory is a usage error, and no generation."""
    with pytest.raises(UserError):
        watched.scan(watched.tree.parent / name)
    assert watched.scan().generation == 2


def test_unreadable_root(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree whose root cannot be read is an error, not an empty generation."""

    def scandir(_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(AtomtxError, match="EIO"):
        watched.scan()
    monkeypatch.undo()
    assert watched.scan().generation == 2


@as_root
def test_elsewhere(watched: Watched) -> None:
    """Another file system is told and not entered, by a check neither; --cross-mounts enters it."""
    place = watched.tree / "mnt"
    place.mkdir()
    (place / "below").touch()
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from tests.sure import Watched\n"
        "w = Watched.__new__(Watched)\n"
        "w.tree, w.file, w.problems, w.elsewhere = Path(sys.argv[1]), Path(sys.argv[2]), {}, []\n"
        "print(w.check()); w.scan(); print(w.elsewhere); print(w.check())\n"
        "print(sorted(p for p in w.entries() if 'mnt' in p))\n"
        "w.scan(cross=True); print(sorted(p for p in w.entries() if 'mnt' in p))\n"
    )
    watched.scan()
    command = 'mount -t tmpfs tmpfs "$1" && touch "$1/above" && shift && exec "$@"'
    root = str(Path(__file__).parents[2])
    python = (sys.executable, "-c", script, watched.tree, watched.file)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", place, *python, f"{root}/engine", root],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "['changed mnt: mode,time', 'unreadable mnt: another file system is mounted there']",
        "['mnt']",
        "[]",
        "['mnt']",
        "['mnt', 'mnt/above']",
    ]


@as_root
def test_elsewhere_then_entered(watched: Watched) -> None:
    """That a quiet mount was not entered once is still told after a scan that enters it."""
    place = watched.tree / "mnt"
    place.mkdir()
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from tests.sure import Watched\n"
        "w = Watched.__new__(Watched)\n"
        "w.tree, w.file, w.problems, w.elsewhere = Path(sys.argv[1]), Path(sys.argv[2]), {}, []\n"
        "w.scan(); w.scan(cross=True); w.scan()\n"
        "print(w.diff(2, 3)); print(w.diff(3, 4)); print(w.diff(2, 4))\n"
        "print(w.check(against=2), w.check(against=3))\n"
    )
    command = 'mount -t tmpfs tmpfs "$1" && touch "$1/above" && shift && exec "$@"'
    root = str(Path(__file__).parents[2])
    python = (sys.executable, "-c", script, watched.tree, watched.file)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", place, *python, f"{root}/engine", root],
        capture_output=True,
        text=True,
        check=True,
    )
    then = "['unverified mnt: another file system was mounted there then']"
    now = "['unreadable mnt: another file system is mounted there']"
    assert done.stdout.splitlines() == [then, now, "[]", f"[] {now}"]


@as_root
def test_kernel_not_entered(watched: Watched) -> None:
    """What the kernel shows of itself is not entered by --cross-mounts: some of it has no end."""
    places = [watched.tree / name for name in ("disk", "proc", "sys")]
    for place in places:
        place.mkdir()
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from tests.sure import Watched\n"
        "w = Watched.__new__(Watched)\n"
        "w.tree, w.file, w.problems, w.elsewhere = Path(sys.argv[1]), Path(sys.argv[2]), {}, []\n"
        "w.scan(cross=True); print(w.elsewhere, len(w.entries()))\n"
        "w.scan(w.tree / 'sys/kernel/mm/hugepages', cross=True); print(w.elsewhere)\n"
    )
    command = (
        'mount -t tmpfs tmpfs "$0" && touch "$0/file" && mount -t proc proc "$1" && '
        'mount -t sysfs sysfs "$2" && shift 2 && exec "$@"'
    )
    root = str(Path(__file__).parents[2])
    python = (sys.executable, "-c", script, watched.tree, watched.file, f"{root}/engine", root)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, *places, *python],
        timeout=120,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["['proc', 'sys'] 12", "[]"]


def test_deep(tmp_path: Path) -> None:
    """A tree deeper than Python's recursion, with paths longer than PATH_MAX, is read whole."""
    watched = Watched(tmp_path)
    depth = 600
    descriptor = os.open(watched.tree, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(b"longname", dir_fd=descriptor)
        below = os.open(b"longname", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    summary = watched.scan()
    assert (summary.counts.entries, summary.counts.errors) == (depth + 2, 0)
    assert watched.check() == []
    watched.scan()
    assert watched.diff(1, 2) == []


@pytest.mark.parametrize("room", [3, 4, 5])
def test_no_descriptors(watched: Watched, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Where no descriptor is left, what cannot be opened is named, and the scan ends."""
    for number in range(3 * hashing.BATCH_FILES):
        (watched.tree / f"a/{number}").write_text(str(number))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    real = walk.walk

    def cramped(*args: Any, **options: Any) -> Iterator[walk.Directory]:
        """Leave room for the tree's root, and a few more."""
        free = os.open("/", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, before[1]))
        yield from real(*args, **options)

    monkeypatch.setattr(scanning, "walk", cramped)
    try:
        summary = watched.scan()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.undo()
    assert set(watched.problems.values()) <= {"EMFILE: Too many open files"}
    assert summary.counts.errors == len(watched.problems)
    assert watched.scan().counts.errors == 0
    assert watched.check() == []


def test_order_and_names(tmp_path: Path) -> None:
    """Names of any bytes are kept apart, and a walk gives them in order."""
    watched = Watched(tmp_path)
    for name in (b"\xff", b"\xc3\xbf", b"a", b"B", b" "):
        (watched.tree / os.fsdecode(name)).write_bytes(name)
    watched.scan()
    assert [os.fsencode(path) for path in watched.entries()][1:] == sorted(
        (b"\xff", b"\xc3\xbf", b"a", b"B", b" ")
    )
    assert watched.check() == []


def test_special(tmp_path: Path) -> None:
    """Neither a fifo nor a device is opened; a fifo nobody writes would hang us."""
    watched = Watched(tmp_path)
    os.mkfifo(watched.tree / "fifo")
    if os.geteuid() == 0:
        os.mknod(watched.tree / "null", stat.S_IFCHR, os.makedev(1, 3))
    assert watched.scan().counts.errors == 0
    assert watched.check() == []
    if os.geteuid() == 0:
        (watched.tree / "null").unlink()
        os.mknod(watched.tree / "null", stat.S_IFCHR, os.makedev(1, 5))
        assert "changed null: target,time" in watched.check()


def test_control_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZFS's own `.zfs` is not entered, as that would mount every snapshot; another `.zfs` is."""
    watched = Watched(tmp_path)
    (watched.tree / ".zfs/snapshot").mkdir(parents=True)
    (watched.tree / "file").touch()
    watched.scan()
    assert ".zfs/snapshot" in watched.entries()
    monkeypatch.setattr(walk, "_CONTROL", (b".zfs", (watched.tree / ".zfs").stat().st_ino))
    watched.scan()
    assert set(watched.entries()) == {"", "file"}


def test_attribute_that_goes(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that is removed between the list and its reading is not there."""
    path = os.fsencode(watched.tree / "three")
    before, there = hashing.read_xattrs(path), os.listxattr(path)
    monkeypatch.setattr(os, "listxattr", lambda *_, **__: [*there, "user.gone"])
    assert hashing.read_xattrs(path) == before

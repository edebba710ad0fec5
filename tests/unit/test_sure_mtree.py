"""A generation as mtree(5): read back by the real mtree, and by a strict reader of our own."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.integrity import mtree, store
from atomtx.integrity.entry import Entry, State
from tests.sure import Watched

MTREE = shutil.which("mtree")
ODD_NAMES = (
    *(
        b"space here",
        b"new\nline",
        b"tab\there",
        b"#hash",
        b"star*",
        b"ask?",
        b"[x]",
        b"back\\slash",
    ),
    *(b"\xff\xfe", "\N{SNOWMAN}".encode(), b"\x01", b"=", b"-rf", b"...", b"..x", b"~", b"a\\040b"),
    *(b"type=dir", b"/set"[1:], b"$HOME", b"'", b'"', b"`id`", b"\x7f"),
)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    """A tree with odd names, each type of file, and times before 1970."""
    made = Watched(tmp_path)
    for number, name in enumerate(ODD_NAMES):
        (made.tree / os.fsdecode(name)).write_bytes(b"x" * number)
    deep = made.tree / "dir" / os.fsdecode(b"deep \xff*")
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"contents")
    os.link(deep / "file", deep / "linked")
    os.symlink(b"no where\n*\xff", os.fsencode(made.tree) + b"/link")
    os.mkfifo(made.tree / "fifo")
    (deep / "file").chmod(0o4750)
    os.utime(made.tree / "-rf", ns=(0, -1_500_000_000))
    if os.geteuid() == 0:
        os.mknod(made.tree / "device", stat.S_IFCHR | 0o600, os.makedev(259, 300))
        os.chown(made.tree / "~", 1234, 5678)
    made.scan()
    return made


def exported(watched: Watched) -> list[str]:
    with store.reading(watched.file) as db:
        return list(mtree.lines(db.tree_at(db.generation(None).id)))


def run(specification: Path, tree: Path) -> subprocess.CompletedProcess[str]:
    assert MTREE is not None, "no mtree: Debian's mtree-netbsd"
    return subprocess.run(
        [MTREE, "-f", specification, "-p", tree],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=60,
    )


def test_unknown_type(watched: Watched, tmp_path: Path) -> None:
    """What stat(2) refused has no type, which mtree would refuse: it is a comment."""
    unknown = Entry(b"?", 0, 0, 0, 0, 0, 0, 0, state=State.UNREADABLE, error="EIO")
    with store.reading(watched.file) as db:
        entries = [*db.tree_at(1), (b"dir/?", unknown)]
    specification = tmp_path / "specification"
    specification.write_text("\n".join(mtree.lines(entries)) + "\n")
    assert "# ./dir/\\077 was not readable: EIO\n" in specification.read_text()
    if MTREE:
        same = run(specification, watched.tree)
        assert (same.returncode, same.stdout, same.stderr) == (0, "", "")


def test_real_mtree(watched: Watched, tmp_path: Path) -> None:
    """The real mtree finds the tree to be as exported, and each change of it."""
    specification = tmp_path / "specification"
    specification.write_text("\n".join(exported(watched)) + "\n")
    same = run(specification, watched.tree)
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    info = (watched.tree / "star*").stat()
    (watched.tree / "star*").write_bytes(b"y" * info.st_size)
    os.utime(watched.tree / "star*", ns=(0, info.st_mtime_ns))
    (watched.tree / "link").unlink()
    (watched.tree / "link").symlink_to("other")
    (watched.tree / "[x]").unlink()
    (watched.tree / "more").touch()
    (watched.tree / "dir").chmod(0o700)
    other = run(specification, watched.tree)
    assert other.returncode == 2
    for word in ("sha256", "link", "missing: ./", "extra: more", "permissions"):
        assert word in other.stdout


def test_real_mtree_of_patterns(tmp_path: Path) -> None:
    """A name that would match its siblings as a pattern is not taken for one of them."""
    watched = Watched(tmp_path)
    for name in ("*", "*.tar", "a", "b", "z [x]", "*d", "d", "y*/*", "yes/a"):
        path = watched.tree / name
        if name.endswith("d"):
            path.mkdir()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)
    watched.scan()
    specification = tmp_path / "specification"
    specification.write_text("\n".join(exported(watched)) + "\n")
    same = run(specification, watched.tree)
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    (watched.tree / "*").write_text("other")
    other = run(specification, watched.tree)
    assert other.returncode == 2
    assert "sha256" in other.stdout


def read_back(line: str) -> tuple[bytes, dict[str, str]]:
    """Read one line strictly: printable ASCII, a path, and keywords with values."""
    assert re.fullmatch(r"[!-~]+( [a-z0-9]+=[!-~]+)+", line), line
    path, *words = line.split(" ")
    return unvis(path), dict(word.split("=", 1) for word in words)


def unvis(text: str) -> bytes:
    r"""Decode \ooo alone; another escape, or a bare character of a pattern, is an error."""
    assert re.fullmatch(r"([^\\#*?\[\]=]|\\[0-3][0-7]{2})*", text), text
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), text.encode())


def test_read_back(watched: Watched) -> None:
    """Every entry is there with its type, mode, owner, size, time, target and digest."""
    first, *lines = exported(watched)
    assert first == "#mtree"
    found = dict(map(read_back, lines))
    entries = {os.fsencode(path): entry for path, entry in watched.entries().items()}
    assert {b"./" + path if path else b"." for path in entries} == found.keys()
    for path, entry in entries.items():
        words = found[b"./" + path if path else b"."]
        assert words["type"] == entry.type
        assert (int(words["uid"]), int(words["gid"])) == (entry.uid, entry.gid)
        seconds, digits = words["time"].split(".")
        assert len(digits) == 9
        assert int(seconds) * 10**9 + int(digits) == entry.mtime
        assert entry.type == "link" or int(words["mode"], 8) == stat.S_IMODE(entry.mode)
        assert ("sha256" in words, "size" in words) == (entry.type == "file",) * 2
        if entry.type == "file":
            assert (int(words["size"]), bytes.fromhex(words["sha256"])) == (
                entry.size,
                entry.digest,
            )
        if entry.type == "link":
            assert unvis(words["link"]) == entry.target
        if entry.type == "char":
            assert words["device"] == "native,259,300"


@given(st.binary(min_size=1).filter(lambda name: not {0, 47} & set(name)))
def test_escapes(name: bytes) -> None:
    """Any name is one word of printable ASCII, and is read back."""
    assert unvis(mtree.escaped(name)) == name


def test_unreadable() -> None:
    """What could not be read is said in a comment, has no digest, and no text ends the comment."""
    entry = Entry(
        b"a", stat.S_IFREG | 0o600, 0, 0, 0, 0, 0, 0, state=State.UNREADABLE, error="EIO\nx"
    )
    lines = list(mtree.lines([(b"a", entry)]))
    assert lines[1] == "# the next one was not readable: EIO?x"
    assert "sha256" not in lines[2]


def test_elsewhere() -> None:
    """A directory on another file system is said to be one that was not entered."""
    entry = Entry(b"a", stat.S_IFDIR | 0o755, 0, 0, 0, 0, 0, 0, state=State.ELSEWHERE)
    assert "not entered" in list(mtree.lines([(b"a", entry)]))[1]

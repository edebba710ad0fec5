"""A copy of a tree against a generation: what it need not have is no difference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from atomtx.integrity import checking, store
from atomtx.integrity.checking import Copy
from atomtx.integrity.compare import ELSEWHERE_TOO, Finding
from atomtx.integrity.entry import Entry
from tests.sure import Watched, said, unchanged_stat


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    made = Watched(tmp_path)
    for name in ("a/one", "a/b/two", "c/three", "four"):
        path = made.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    made.scan()
    return made


def check(watched: Watched, root: Path, copy: Copy) -> list[str]:
    found: list[Finding] = []
    with store.reading(watched.file) as db:
        checking.Check(db, 1, ignore=ELSEWHERE_TOO, found=found.append, copy=copy).run(root)
    return sorted(map(said, found))


def test_leave_out(watched: Watched, tmp_path: Path) -> None:
    """Neither what a left out path is, nor what is below it, is compared, on either side."""
    copy = shutil.copytree(watched.tree, tmp_path / "copy")
    shutil.copystat(watched.tree, copy)
    (copy / "a/b/two").write_text("other")
    (copy / "a/b/new").touch()
    assert check(watched, copy, Copy(frozenset((b"a/b",)))) == []
    assert check(watched, copy, Copy())
    with unchanged_stat(copy / "a"):
        shutil.rmtree(copy / "a/b")
    assert check(watched, copy, Copy(frozenset((b"a/b",)))) == []
    with unchanged_stat(copy):
        shutil.rmtree(copy / "a")
    assert check(watched, copy, Copy(frozenset((b"a/b",)))) == ["missing a", "missing a/one"]
    assert check(watched, copy, Copy(frozenset((b"a",)))) == []
    with unchanged_stat(copy):
        (copy / "a").mkdir()
        (copy / "a/b").touch()
    found = check(watched, copy, Copy(frozenset((b"a/b", b"four"))))
    assert found == ["changed a: time", "missing a/one"]


def test_of_root(watched: Watched, tmp_path: Path) -> None:
    """What is ignored of the root is compared of all else."""
    copy = shutil.copytree(watched.tree, tmp_path / "copy")
    for path in (copy, copy / "a"):
        path.chmod(0o700)
    assert check(watched, copy, Copy(ignore_of_root=frozenset(("mode",)))) == ["changed a: mode"]


def test_as_kept(watched: Watched, tmp_path: Path) -> None:
    """What no copy can have is neither missing nor changed; what should not be there is extra."""

    def as_kept(entry: Entry) -> Entry | None:
        return None if entry.name == b"four" else entry._replace(uid=0)

    copy = shutil.copytree(watched.tree, tmp_path / "copy")
    with unchanged_stat(copy):
        (copy / "four").unlink()
    assert check(watched, copy, Copy()) == ["missing four"]
    assert check(watched, copy, Copy(as_kept=as_kept)) == []
    with unchanged_stat(copy):
        (copy / "five").touch()
    assert check(watched, copy, Copy(as_kept=as_kept)) == ["extra five"]


def test_has_below(watched: Watched) -> None:
    """A directory that was entered, and was not empty, is told from any other path."""
    with store.reading(watched.file) as db:
        assert [p for p in (b"a", b"a/b", b"four", b"absent", b"a/b/x") if db.has_below(p, 1)] == [
            b"a",
            b"a/b",
        ]

"""Trees, scans and checks for the tests of `atomtx sure`."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atomtx.integrity import checking, scanning, store
from atomtx.integrity.compare import ELSEWHERE_TOO, Finding
from atomtx.integrity.entry import Entry, State
from atomtx.integrity.scanning import Summary


def later() -> int:
    """A clock by which all that a test has just made is old: as a snapshot of yesterday."""
    return time.time_ns() + 3600 * 1_000_000_000


class Watched:
    """A tree, its database, and what was told of it."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.tree.mkdir(parents=True)
        self.file = folder / "sure.db"
        self.problems: dict[str, str] = {}
        self.elsewhere: list[str] = []

    def scan(self, root: Path | None = None, **options: Any) -> Summary:
        """Add a generation; nothing is racy, but with now=time.time_ns."""
        self.problems.clear()
        self.elsewhere.clear()
        told = scanning.Told(
            lambda path, text: self.problems.update({os.fsdecode(path): text}),
            lambda path: self.elsewhere.append(os.fsdecode(path)),
        )
        with store.writing(self.file, os.fsencode(self.tree)) as db:
            return scanning.scan(db, root or self.tree, **{"told": told, "now": later, **options})

    def check(
        self,
        root: Path | None = None,
        *,
        against: int | None = None,
        ignore: Collection[str] = ELSEWHERE_TOO,
    ) -> list[str]:
        """Return the findings in words, sorted."""
        found: list[Finding] = []
        with store.reading(self.file) as db:
            number = db.generation(against).id
            check = checking.Check(db, number, ignore=ignore, found=found.append)
            self.result = check.run(root or self.tree)
        return sorted(map(said, found))

    def diff(self, a: int, b: int, ignore: Collection[str] = ()) -> list[str]:
        """Return what differs between two generations, in words, in the order it is told."""
        with store.reading(self.file) as db:
            return [said(finding) for finding in checking.diff(db, a, b, ignore)]

    def entries(self, generation: int | None = None) -> dict[str, Entry]:
        """Return a generation by path; whether an entry was racy is left out."""
        with store.reading(self.file) as db:
            return {
                os.fsdecode(path): entry._replace(state=max(entry.state, State.RACY))
                for path, entry in db.tree_at(db.generation(generation).id)
            }


def said(finding: Finding) -> str:
    """Return a finding in one line: kind, path, and the names of what differs, or the reason."""
    what = ",".join(each.property for each in finding.differences) or finding.reason
    path = os.fsdecode(finding.path) or "."
    return f"{finding.kind} {path}" + (f": {what}" if what else "")


@contextmanager
def unchanged_stat(path: Path) -> Iterator[None]:
    """Set the time of a file back after the block; its ctime cannot be."""
    info = path.stat()
    yield
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

"""
What of a backup is compared with which generation, and what the client cannot keep.  Pure.

A generation was read from a path alone: the one of a run is told by the run's token, which the
names of its snapshots have, so only of one that was kept.  Any other is of another moment.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import UserError
from .integrity.compare import PROPERTIES
from .integrity.entry import Entry, pack, unpack
from .names import is_within
from .plan import Plan, path_order
from .states import Outcome, Verb

if TYPE_CHECKING:
    from .history import Backup, Run
    from .integrity.store import Generation

HOUSEKEEPING = "xfsrestorehousekeepingdir"  # what `xfsrestore -r` leaves in its destination
# XFS shows an access control list under two names, and another file system keeps the one.
_OTHER_NAMES = b"trusted.SGI_ACL_"
_MICROSECOND_NS, _SECOND_NS = 1_000, 1_000_000_000
_SPECIAL = frozenset(("fifo", "socket", "char", "block"))


# -- what is compared --------------------------------------------------------------------------


def check(run: Run) -> None:
    """Raise UserError for a run that has no backup to restore."""
    if run.verb != Verb.BACKUP:
        raise UserError(f"run {run.id} made no backup: it is one of `atomtx {run.verb}`")
    if run.outcome not in (Outcome.COMPLETED, Outcome.PARTIAL):
        said = run.outcome or (
            "rolled back" if run.is_final else f"not at its end: it is {run.state}"
        )
        raise UserError(
            f"run {run.id} has no backup to verify: it is {said}",
            hint="`atomtx history` lists the runs",
        )


def trees(plan: Plan) -> tuple[str, ...]:
    """Return the live paths of all that a run was to save, each volume by itself, parents first."""
    tops = plan.targets
    inner = {v.mountpoint for v in plan.volumes if any(is_within(v.mountpoint, t) for t in tops)}
    return tuple(sorted({*tops, *inner}, key=path_order))


def place(plan: Plan, path: str) -> str:
    """Return where a restore has the live *path*, relative to the directory restored to."""
    root = plan.root.rstrip("/") if plan.whole_root else ""
    return (root + path).strip("/")


def holding(plan: Plan, path: str, backups: Iterable[Backup]) -> Backup | None:
    """Return the backup of a run in which *path* was to be; of several the one nearest to it."""
    stored = "/" + place(plan, path)
    found = {p: b for b in backups for p in b.paths if is_within(stored, p)}
    return found[max(found, key=len)] if found else None


def below(path: str, parent: str) -> str:
    """Return *path* relative to *parent*, which it lies in."""
    return posixpath.relpath(path, parent)


def inside(path: str, parents: Iterable[str]) -> str | None:
    """Return the nearest of *parents* that *path* lies below; None where there is none."""
    above = [parent for parent in parents if parent != path and is_within(path, parent)]
    return max(above, key=len, default=None)


def left_out(path: str, others: Iterable[str], excludes: Iterable[str]) -> frozenset[str]:
    """Return what is not to be compared in the tree at *path*, relative to it."""
    inner = {other for other in (*others, *excludes) if other != path and is_within(other, path)}
    return frozenset(below(each, path) for each in inner)


# -- with what ---------------------------------------------------------------------------------


def is_of_run(generation: Generation, run: str) -> bool:
    """Tell whether a generation was read from a snapshot of *run*: by its path."""
    name = rb"\.?atomtx-(?:kept-)?" + re.escape(run.encode()) + rb"(?:-[0-9]+)?"
    return any(re.fullmatch(name, part) for part in generation.path.split(b"/"))


def choose(generations: Sequence[Generation], run: str) -> Generation:
    """Return the newest generation of the run's own snapshot, else the newest of all."""
    own = [each for each in generations if is_of_run(each, run)]
    return (own or generations)[-1]


# -- what the client keeps ---------------------------------------------------------------------


@dataclass(frozen=True)
class Keeps:
    """
    What a restored tree has of the one that was saved; everything by default.

    *precision* is that of times, in nanoseconds, by the type of the entry, 0 for none at all.
    """

    words: str = ""  # what it lacks, for people
    lost: frozenset[str] = frozenset()  # types of entries
    xattrs: bool = True
    precision: dict[str, int] = field(default_factory=dict)
    default_precision: int = 1

    def of(self, entry: Entry) -> Entry | None:
        """Return what is kept of an entry; None where nothing is."""
        if entry.type in self.lost:
            return None
        xattrs = _without_other_names(entry.xattrs) if self.xattrs else None
        return entry._replace(mtime=self._time(entry), xattrs=xattrs)

    def _time(self, entry: Entry) -> int:
        step = self.precision.get(entry.type, self.default_precision)
        if step == _MICROSECOND_NS:  # rounded; whole seconds are cut
            return (entry.mtime + step // 2) // step * step
        return entry.mtime // step * step if step else 0


def _without_other_names(packed: bytes | None) -> bytes | None:
    if packed is None or _OTHER_NAMES not in packed:
        return packed
    found = unpack(packed).items()
    return pack({name: value for name, value in found if not name.startswith(_OTHER_NAMES)})


ALL = Keeps()
_KEEPS = {
    "restic": Keeps("sockets", frozenset(("socket",))),
    "borg": Keeps("sockets", frozenset(("socket",))),
    "kopia": Keeps(
        "extended attributes, access control lists, special files, the times of directories, "
        "and what is below a microsecond in the time of a link",
        _SPECIAL,
        xattrs=False,
        precision={"dir": 0, "link": _MICROSECOND_NS},
    ),
}
_XFSDUMP = "fractions of a second, the times of links and of the topmost directory"
_NO_XFS = ", extended attributes and access control lists (this is no XFS)"


def keeps(client: str, *, onto_xfs: bool) -> Keeps:
    """Return what *client* keeps, restored to an XFS or to another file system (clients.md)."""
    if client != "xfsdump":
        return _KEEPS[client]
    return Keeps(
        _XFSDUMP if onto_xfs else _XFSDUMP + _NO_XFS,
        xattrs=onto_xfs,
        precision={"link": 0},
        default_precision=_SECOND_NS,
    )


def ignored_of_root(client: str, path: str) -> frozenset[str]:
    """
    Return what is not compared of a restored tree's root.

    `/` has no entry in a backup, or its own directory got it.  xfsrestore's housekeeping is made,
    and removed, in the root of a file system.
    """
    if path == "/":
        return frozenset(PROPERTIES)
    return frozenset(("time",)) if client == "xfsdump" else frozenset()


# -- room --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """What a restore needs, or a file system has free; None where that is not known."""

    size_bytes: int | None
    files: int | None


def needed(backups: Collection[Backup]) -> Room:
    """Return what a restore of *backups* needs at least, as their clients counted it."""
    sizes = [b.bytes_processed for b in backups if b.bytes_processed is not None]
    files = [b.files_processed for b in backups if b.files_processed is not None]
    return Room(sum(sizes) if sizes else None, sum(files) if files else None)


def lacks(wanted: Room, free: Room) -> str | None:
    """Return what there is clearly not enough of, "bytes" or "files"; None where it may do."""
    if _exceeds(wanted.size_bytes, free.size_bytes):
        return "bytes"
    return "files" if _exceeds(wanted.files, free.files) else None


def _exceeds(wanted: int | None, free: int | None) -> bool:
    return wanted is not None and free is not None and wanted > free

"""
What is to be sent of a dataset to its copy: both ends as they are -> the transfers.  Pure.

A snapshot and its copy have the same guid, whatever they are called; a bookmark has the guid of the
snapshot that it was made of.  So the last common point is found by guid alone, and names are for
commands and people.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import EffectError
from .names import on_host


@dataclass(frozen=True)
class Point:
    """A snapshot or a bookmark of a dataset."""

    name: str  # whole: "tank/a@x", "tank/a#x"
    guid: str
    createtxg: int
    wanted: bool = False  # a snapshot that the copy is to have
    holds: int = 0
    keeper: str = ""  # the run whose kept mark it bears

    @property
    def short(self) -> str:
        """The name without the dataset: "@x"."""
        return self.name[min(n for n in map(self.name.find, "@#") if n >= 0) :]


@dataclass(frozen=True)
class Source:
    """A dataset that is copied."""

    dataset: str
    is_volume: bool
    is_encrypted: bool
    snapshots: tuple[Point, ...]  # the oldest first
    bookmarks: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Copy:
    """The dataset that is, or shall be, its copy."""

    dataset: str
    exists: bool = False
    snapshots: tuple[Point, ...] = ()  # the oldest first
    token: str = ""  # of a receive that was cut off, and can be gone on with
    host: str = ""  # where it is, as ssh(1) takes it; empty: here

    @property
    def shown(self) -> str:
        """The dataset with its host: the source may have the same name."""
        return on_host(self.host, self.dataset)

    def command(self, *argv: str) -> str:
        """Return what runs *argv* where the copy is, as a person types it here."""
        line = shlex.join(argv)
        return shlex.join(("ssh", self.host, line)) if self.host else line


@dataclass(frozen=True)
class Token:
    """What a resume token asks for."""

    dataset: str
    to_guid: str
    from_guid: str  # empty: a whole dataset
    is_raw: bool


@dataclass(frozen=True)
class Send:
    """One stream: a snapshot, or what lies between a point and a snapshot."""

    to: Point
    base: Point | None = None
    between: bool = False  # with every snapshot in between (`zfs send -I`), and not just the last


@dataclass(frozen=True)
class Resume:
    """The rest of a stream that was cut off."""

    to: Point
    token: str


Transfer = Send | Resume


def common(source: Source, copy: Copy) -> Point | None:
    """
    Return the newest snapshot of the copy that the source knows, as the source calls it.

    A snapshot before a bookmark of it: from that, all in between can be sent at once.
    """
    known = {point.guid: point for point in (*source.bookmarks, *source.snapshots)}
    return next((known[p.guid] for p in reversed(copy.snapshots) if p.guid in known), None)


def transfers(
    source: Source, copy: Copy, last: Point, token: Token | None = None
) -> tuple[Transfer, ...]:
    """
    Return what brings *copy* to the snapshot *last* of *source*, in order; nothing where it is.

    *token* is what the copy's own token asks for.  Raises EffectError where the copy has gone its
    own way: nothing of it is rolled back, or thrown away; and where it went past *last* without it.
    """
    if any(point.guid == last.guid for point in copy.snapshots) and not copy.token:
        return ()
    base = _base(source, copy)
    if copy.token:
        resumed = Resume(_resumed(source, copy, base, token), copy.token)
        return (resumed, *_sends(source, resumed.to, last))
    if base:
        sends = tuple(_sends(source, base, last))
        if not sends:
            raise EffectError(
                f"{last.name} is older than {base.short}, which {copy.shown} has, and cannot be "
                "sent any more",
                hint="a target for each pattern, or one pattern for both",
            )
        return sends
    first = next(point for point in source.snapshots if point.wanted)
    return (Send(first), *_sends(source, first, last))


def _base(source: Source, copy: Copy) -> Point | None:
    """Return what an incremental stream begins at; None for a copy that is to be made."""
    base = common(source, copy)
    if not copy.snapshots:
        if copy.exists and not copy.token:
            raise EffectError(
                f"{copy.shown} is there already, and is no copy of {source.dataset}: it has no "
                "snapshot",
                hint="name another target, or rename or destroy what is there",
            )
        return None
    if base is None:
        raise EffectError(
            f"{copy.shown} has no snapshot in common with {source.dataset}",
            hint="name another target, or rename what is there: it can only be copied as a whole",
        )
    newest = copy.snapshots[-1]
    if newest.guid != base.guid:
        raise EffectError(
            f"{copy.shown} has a snapshot of its own, {newest.short}, after {base.short}",
            hint=f"destroy it if it is of no use: {copy.command('zfs', 'destroy', newest.name)}",
        )
    return base


def _resumed(source: Source, copy: Copy, base: Point | None, token: Token | None) -> Point:
    """
    Return the snapshot that a stream that was cut off leads to.

    The token comes from the other end, which may be anybody's: it could ask for any dataset, and
    for one that is encrypted in the clear (openzfs/zfs#14153).  So only what we would send anyway
    is gone on with.
    """
    begins = base.guid if base else ""
    if not token or not is_of(source, token) or token.from_guid != begins:
        raise EffectError(
            f"{copy.shown} has a part of a stream that cannot be gone on with",
            hint="throw that part away, its snapshots stay: "
            + copy.command("zfs", "receive", "-A", copy.dataset),
        )
    return next(point for point in source.snapshots if point.guid == token.to_guid)


def is_of(source: Source, token: Token) -> bool:
    """Tell whether a token asks for a snapshot that we send of this dataset, as we send it."""
    known = {point.guid for point in source.snapshots if point.wanted}
    is_ours = token.dataset == source.dataset and token.to_guid in known
    return is_ours and token.is_raw == source.is_encrypted


def _sends(source: Source, base: Point, last: Point) -> Iterator[Send]:
    """Yield the streams from *base* to *last*, with what is wanted in between and nothing else."""
    later = [p for p in source.snapshots if base.createtxg < p.createtxg <= last.createtxg]
    for run, stranger_before in _runs(later):
        first, end = run[0], run[-1]
        whole = not stranger_before and not base.name.count("#")
        if whole and len(run) > 1:
            yield Send(end, base, between=True)
        else:
            yield Send(first, base)
            if len(run) > 1:
                yield Send(end, first, between=True)
        base = end


def _runs(points: Sequence[Point]) -> Iterator[tuple[list[Point], bool]]:
    """Part snapshots into runs of wanted ones, each with whether another lies just before it."""
    run: list[Point] = []
    stranger, before = False, False
    for point in points:
        if point.wanted:
            before = stranger if not run else before
            run.append(point)
        elif run:
            yield run, before
            run = []
        stranger = not point.wanted
    if run:
        yield run, before


def to_hold(source: Source, copy: Copy, planned: Sequence[Transfer]) -> tuple[str, ...]:
    """Return the snapshots of the source that must not go until *planned* is done."""
    found = {transfer.to.name for transfer in planned} | set(staying(source, copy))
    for transfer in planned:
        if isinstance(transfer, Send) and transfer.base:
            found |= {
                point.name
                for point in source.snapshots
                if transfer.base.createtxg <= point.createtxg < transfer.to.createtxg
                and (transfer.between or point == transfer.base)
            }
    return tuple(point.name for point in source.snapshots if point.name in found)


def staying(source: Source, copy: Copy, token: Token | None = None) -> tuple[str, ...]:
    """Return the snapshots of the source that the next clone begins with."""
    last = common(source, copy)
    guids = {last.guid if last else "", token.to_guid if token else ""}
    return tuple(point.name for point in source.snapshots if point.guid in guids)


def unmarked(source: Source, copy: Copy) -> dict[str, list[str]]:
    """
    Return what the copy has of the source's kept snapshots without their mark, by the keeper.

    A stream's properties come at its head, and are set at its end: the rest of one that was cut
    off has none.
    """
    keepers = {point.guid: point.keeper for point in source.snapshots if point.wanted}
    found: dict[str, list[str]] = {}
    for point in copy.snapshots:
        if point.guid in keepers and not point.keeper:
            found.setdefault(keepers[point.guid], []).append(point.name)
    return found


def last_of(source: Source, copy: Copy) -> tuple[str, ...]:
    """Return the snapshot of the copy that the next clone begins with, if there is one."""
    last = common(source, copy)
    return tuple(point.name for point in copy.snapshots if last and point.guid == last.guid)

"""
Which btrfs subvolumes a request means, and what is left out.  Pure.

A subvolume is named by the path at which it is seen, whether it is mounted there or lies inside
another one that is.  In the snapshot of that other one it would be an empty directory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .errors import UserError
from .intents import Source
from .inventory import ancestors, command, named_elsewhere, unfit_name
from .mounts.mountinfo import Entry, Table
from .names import BtrfsSnapshot, is_within
from .plan import (
    SYSTEM_PATHS,
    Chosen,
    LeftOut,
    Request,
    SubvolumeFacts,
    normal,
    path_order,
    shown,
)


@dataclass(frozen=True)
class Filesystem:
    """A mounted btrfs file system."""

    uuid: str
    device: str  # "major:minor", as in the table of mounts
    generation: int
    subvolumes: tuple[Subvolume, ...]  # the top level first


@dataclass(frozen=True)
class Subvolume:
    """A btrfs subvolume, as its file system lists it."""

    id: int
    path: str  # below the top level: "/@home"; "/" is the top level itself
    uuid: str
    parent_uuid: str  # of what it is a snapshot of; "" for none
    is_readonly: bool


@dataclass(frozen=True)
class Found:
    """What a request comes to on btrfs."""

    named: tuple[str, ...]  # in the user's order
    parts: tuple[str, ...]  # those of them that are inside a subvolume
    volumes: tuple[Chosen, ...]
    skipped: tuple[LeftOut, ...]  # by -r


def is_on_btrfs(mounts: Table, text: str) -> bool:
    """Tell whether what the user typed is a path on btrfs."""
    entry = mounts.containing(normal(text)) if text.startswith("/") else None
    return entry is not None and entry.fstype == "btrfs"


class Subvolumes:
    """The subvolumes of some file systems, by the paths at which they are seen."""

    def __init__(self, filesystems: Iterable[Filesystem], mounts: Table) -> None:
        self._mounts = mounts
        self._at: dict[str, tuple[Filesystem, Subvolume, Entry]] = {}
        for filesystem in filesystems:
            for entry in mounts:
                if entry.fstype == "btrfs" and entry.dev == filesystem.device:
                    self._at |= self._seen_through(filesystem, entry)

    def _seen_through(
        self, filesystem: Filesystem, entry: Entry
    ) -> dict[str, tuple[Filesystem, Subvolume, Entry]]:
        found = {}
        for subvolume in filesystem.subvolumes:
            if is_within(subvolume.path, entry.root):
                rest = subvolume.path.removeprefix(entry.root.rstrip("/")).strip("/")
                path = normal(f"{entry.mountpoint}/{rest}")
                if self._mounts.containing(path) is entry:
                    found[path] = (filesystem, subvolume, entry)
        return found

    def select(self, request: Request, *, shown_together: bool = True) -> Found:
        """
        Return what *request*, which has names and exclusions on btrfs alone, comes to.

        Raises UserError for a path that is on no subvolume, or cannot be backed up, and where one
        could not be seen in another, if they are to be *shown_together*.
        """
        named = self._named(request)
        holders = {path: self._holder(path) for path in named}
        parts = tuple(path for path, holder in holders.items() if holder != path)
        excluded = [self._resolve(text) for text in request.exclude]
        for path in named:
            if any(is_within(path, other) for other in excluded):
                raise UserError(f"{path} is both named and left out", hint="do one of the two")
        below = self._below(named) if request.recursive else []
        wanted = [p for p in below if not any(is_within(p, other) for other in excluded)]
        self._check_one_place(holders, wanted)
        snapshots = [path for path in wanted if self._is_snapshot(path)]
        bad = {path: why for path in wanted if (why := unfit_name(path))}
        paths = [*holders.values(), *(p for p in wanted if p not in snapshots and p not in bad)]
        volumes = [self._chosen(path) for path in self._once(paths)]
        if shown_together:
            self._check_gaps([volume.mountpoint for volume in volumes])
        skipped = [LeftOut(path, f"its name {why}") for path, why in bad.items()]
        skipped += _of_snapshots(snapshots)
        return Found(tuple(named), parts, tuple(volumes), tuple(skipped))

    def _named(self, request: Request) -> list[str]:
        named: list[str] = []
        for text in request.names:
            path = normal(text)
            if path in named:
                raise UserError(f"{shown(path)} is given twice", hint="name it once")
            if why := unfit_name(path):
                raise UserError(f"the name of {shown(path)} {why}", hint="rename it")
            _, _, entry = self._at[self._holder(path)]
            if "ro" in entry.super_options.split(","):
                raise UserError(
                    f"{path} is on a file system that is mounted read-only: "
                    "no snapshot can be taken there",
                    hint=command("mount", "-o", "remount,rw", entry.mountpoint),
                )
            named.append(path)
        self._check_disjoint(named, recursive=request.recursive)
        return named

    def _check_disjoint(self, named: Collection[str], *, recursive: bool) -> None:
        for path in named:
            above = next((a for a in ancestors(path) if a in named), None)
            if above and (recursive or self._holder(path) == self._holder(above)):
                how = f"{above} with -r" if recursive else above
                raise UserError(f"{path} is already included by {how}", hint=f"leave out {path}")

    def _check_one_place(self, holders: Mapping[str, str], below: Iterable[str]) -> None:
        """
        Refuse what is named at two places of one subvolume: the client is shown one of them.

        Also a part of one that -r finds whole elsewhere.
        """
        first: dict[tuple[str, int], str] = {}
        for path, holder in holders.items():
            other = first.setdefault(self._key(holder), path)
            if holders[other] != holder:
                raise named_elsewhere(path, other)
        for place in below:
            part = first.get(self._key(place))
            if part and holders[part] not in (part, place):
                raise named_elsewhere(place, part)

    def _holder(self, path: str) -> str:
        """Return where the subvolume is seen that a path is in."""
        entry = self._mounts.containing(path)
        above = next((a for a in (path, *ancestors(path)) if a in self._at), None)
        if above is None or self._at[above][2] is not entry:
            where = f"below {shown(entry.mountpoint)}" if entry else "there"
            raise UserError(
                f"{shown(path)} is in a subvolume of which only a part is mounted {where}",
                hint="mount the whole subvolume, and name it where that is",
            )
        return above

    def _resolve(self, text: str) -> str:
        path = normal(text)
        if path in self._at:
            return path
        above = next((a for a in ancestors(path) if a in self._at), None)
        raise UserError(
            f"{shown(path)} is not a subvolume"
            + (f": it is a directory or file in {shown(above)}" if above else ""),
            hint=(f"name {shown(above)}" if above else "`btrfs subvolume list` shows them")
            + "; of a symbolic link, name the target",
        )

    def _below(self, tops: Collection[str]) -> list[str]:
        """Return where subvolumes are seen strictly below *tops*, parents first, but not ours."""
        ignored = SYSTEM_PATHS if "/" in tops else ()
        found = [
            path
            for path, (filesystem, subvolume, _) in self._at.items()
            if any(is_within(path, top) and path != top for top in tops)
            and not any(is_within(path, other) for other in ignored)
            and not BtrfsSnapshot(filesystem.uuid, subvolume.path).is_ours
        ]
        return sorted(found, key=path_order)

    def _is_snapshot(self, path: str) -> bool:
        _, subvolume, _ = self._at[path]
        return subvolume.is_readonly and bool(subvolume.parent_uuid)

    def _key(self, path: str) -> tuple[str, int]:
        filesystem, subvolume, _ = self._at[path]
        return filesystem.uuid, subvolume.id

    def _once(self, paths: Iterable[str]) -> list[str]:
        """Return *paths* without a second place of the same subvolume."""
        first: dict[tuple[str, int], str] = {}
        for path in paths:
            first.setdefault(self._key(path), path)
        return sorted(first.values(), key=path_order)

    def _chosen(self, path: str) -> Chosen:
        filesystem, subvolume, _ = self._at[path]
        source = Source(subvolume.id, subvolume.uuid, subvolume.path, filesystem.generation)
        # The top level of a file system of an old mkfs.btrfs has no UUID.
        guid = subvolume.uuid or f"{filesystem.uuid}/{subvolume.id}"
        return Chosen(SubvolumeFacts(path, guid, filesystem.uuid, source), path)

    def _check_gaps(self, chosen: Collection[str]) -> None:
        """Refuse one in another that is not in the set, where that is in a third that is."""
        for path in chosen:
            between = ""
            for above in ancestors(path):
                if above in chosen:
                    if between:
                        raise _gap(path, between, above)
                    break
                between = above if above in self._at else between

    def uncovered(
        self, volumes: Sequence[Chosen], known: Collection[str], tops: Collection[str]
    ) -> Iterator[LeftOut]:
        """Yield the subvolumes below *tops* that are not in the set, but those *known*."""
        chosen = {volume.mountpoint for volume in volumes}
        keys = {self._key(path): path for path in chosen if path in self._at}
        snapshots = []
        for path in (p for p in self._below(tops) if p not in chosen):
            if other := keys.get(self._key(path)):
                yield LeftOut(path, f"it is the subvolume at {other} once more")
            elif path in known:
                continue
            elif self._is_snapshot(path):
                snapshots.append(path)
            else:
                yield LeftOut(path, "it is a subvolume of its own; name it as well, or use -r")
        yield from _of_snapshots(snapshots)

    def exclusions(self, request: Request) -> Iterator[str]:
        """Yield what is left out at the user's word, in words."""
        for text in request.exclude:
            yield f"{shown(self._resolve(text))} and all below it is left out at your word"

    def shows(self, entry: Entry) -> bool:
        """Tell whether a mount is of a whole subvolume that is known."""
        return self._at.get(entry.mountpoint, (None, None, None))[2] is entry

    def at(self, paths: Iterable[str]) -> list[str]:
        """Return every path at or below *paths* at which a subvolume is seen."""
        tops = [normal(path) for path in paths]
        return [path for path in self._at if any(is_within(path, top) for top in tops)]


def _of_snapshots(paths: Sequence[str]) -> Iterator[LeftOut]:
    """Yield one line for all read-only snapshots: a machine may have thousands of them."""
    if paths:
        more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        yield LeftOut(paths[0], f"it is a read-only snapshot{more}; name it to have it")


def _gap(path: str, between: str, above: str) -> UserError:
    return UserError(
        f"{path} cannot be shown below the snapshot of {above}: the subvolume {shown(between)} "
        "lies between them and is not in the set",
        hint=f"add {shown(between)}, or leave out {path} or {above}",
    )

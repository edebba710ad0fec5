"""
Which volumes are meant where snapshots stay.

Datasets and zvols, mounted or not, subvolumes, and thin logical volumes.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

from . import plan
from .errors import EffectError, UserError
from .logical import Logicals
from .lvmio import Lvm, Volume
from .mounts import mountinfo
from .names import Dataset, is_within
from .plan import Chosen, DatasetFacts, LogicalFacts, Pool, Request, SubvolumeFacts
from .subvolumes import Filesystem, Subvolumes, is_on_btrfs
from .volumes import btrfs, lvm, plain
from .volumes.kind import Kept
from .volumes.zfs import Zfs, pools_for

_Pools = Callable[[], list[Pool]]  # asks for those that are imported


@dataclass(frozen=True)
class Wanted:
    """What a request comes to."""

    asked: tuple[str, ...]  # the volumes that were named, in the user's order
    datasets: tuple[DatasetFacts, ...]  # with their children, less what is excluded
    pools: tuple[Pool, ...]
    notes: tuple[str, ...]
    subvolumes: tuple[SubvolumeFacts, ...] = ()  # likewise
    logical: tuple[Chosen, ...] = ()  # with where each is mounted, or "-"; likewise

    @property
    def logical_facts(self) -> tuple[LogicalFacts, ...]:
        return tuple(v.facts for v in self.logical if isinstance(v.facts, LogicalFacts))

    def guid_of(self, pool: str) -> str:
        return next(each.guid for each in self.pools if each.name == pool)


def find(request: Request, zfs: Zfs) -> Wanted:
    """
    Ask the machine what a request means, of ZFS alone: one `zpool`, and one `zfs` a pool.

    Raises UserError for what is wrong with it.
    """
    table = mountinfo.read().without_echoes()
    request, listed = lvm.named(request, table)
    plain.check_there((*request.names, *request.exclude), table)
    logicals = Logicals(listed, table)
    for text in filter(_on_lvm(logicals, zfs.pools), request.names):
        raise UserError(
            f"{plan.shown(text)} is on LVM: this is of ZFS alone",
            hint="`atomtx snap` and `atomtx prune` are of thin logical volumes, too",
        )
    return _on_zfs(request, zfs, table, zfs.pools)


def find_all(request: Request, zfs: Zfs) -> Wanted:
    """
    Ask the machine what a request means, of ZFS, of btrfs and of LVM.

    Where others alone are named, ZFS is not asked: it may not be there.  Raises UserError for
    what is wrong with the request.
    """
    if request.all and request.names:
        raise _both(request.names[0])
    table = mountinfo.read().without_echoes()
    pools = cache(zfs.pools)
    request, listed = lvm.named(request, table)
    plain.check_there((*request.names, *request.exclude), table)
    logicals = Logicals(listed or _inactive(request, pools), table)
    on_lvm, others = _parted(request, _on_lvm(logicals, pools))
    on_btrfs, on_zfs = _parted(others, lambda text: is_on_btrfs(table, text))
    there = btrfs.filesystems((*others.names, *others.exclude), table)
    subvolumes, notes = chosen_subvolumes(on_btrfs, there, table)
    logical = logicals.to_keep(on_lvm.names, on_lvm.exclude)
    if request.names and not on_zfs.names and not on_zfs.exclude:
        found = Wanted((), (), (), ())
    else:
        found = _on_zfs(on_zfs, zfs, table, pools)
    datasets = iter(found.asked)
    asked = tuple(
        next(datasets)
        if text in on_zfs.names
        else (plan.normal(text) if text.startswith("/") else text)
        for text in request.names
    )
    notes = (*found.notes, *notes)
    found = replace(found, asked=asked, subvolumes=subvolumes, logical=logical, notes=notes)
    if not (found.datasets or found.subvolumes or found.logical):
        raise _nothing_left()
    return found


def _inactive(request: Request, pools: _Pools) -> list[Volume]:
    """Return all logical volumes where one is named whose group is seen nowhere, and no pool is."""
    names = [text for text in (*request.names, *request.exclude) if lvm.may_be_inactive(text)]
    if not names or not {text.partition("/")[0] for text in names} - _names_of(pools):
        return []
    try:
        return Lvm().volumes()
    except EffectError:  # then it is a pool's that is not there
        return []


def _names_of(pools: _Pools) -> set[str]:
    try:
        return {pool.name for pool in pools()}
    except EffectError:  # there is no ZFS
        return set()


def _on_lvm(logicals: Logicals, pools: _Pools) -> Callable[[str], bool]:
    """
    Return what tells whether a text means a logical volume.

    One that LVM has not may be a dataset's: a pool of which nothing is mounted can have the name
    of a volume group.
    """

    def means(text: str) -> bool:
        if not logicals.means(text) or logicals.has(text):
            return logicals.means(text)
        return text.partition("/")[0] not in _names_of(pools)

    return means


def _parted(request: Request, belongs: Callable[[str], bool]) -> tuple[Request, Request]:
    """Part a request into that of what *belongs*, and that of all else."""

    there = frozenset(filter(belongs, (*request.names, *request.exclude)))

    def part(*, wish: bool) -> Request:
        return replace(
            request,
            names=tuple(t for t in request.names if (t in there) is wish),
            exclude=tuple(t for t in request.exclude if (t in there) is wish),
        )

    return part(wish=True), part(wish=False)


def _on_zfs(request: Request, zfs: Zfs, table: mountinfo.Table, listed: _Pools) -> Wanted:
    asked = [dataset_of(text, table) for text in request.names]
    pools = pools_for(request.names, listed)
    names = {pool.name for pool in pools} if request.all else {Dataset(n).pool for n in asked}
    healthy = _healthy(pools, names, named=not request.all)
    found = (zfs.datasets(pool, may_go=request.all) for pool in healthy)
    return choose(request, asked, [*chain.from_iterable(found)], pools)


def chosen_subvolumes(
    request: Request, filesystems: Iterable[Filesystem], table: mountinfo.Table
) -> tuple[tuple[SubvolumeFacts, ...], tuple[str, ...]]:
    """
    Return the subvolumes that are meant by a request with names on btrfs alone, and notes; pure.

    A path in a subvolume is refused: there is no snapshot of a part.
    """
    found = Subvolumes(filesystems, table).select(request, shown_together=False)
    facts = tuple(v.facts for v in found.volumes if isinstance(v.facts, SubvolumeFacts))
    for path in found.parts:
        holder = max((f.name for f in facts if is_within(path, f.name)), key=len)
        raise UserError(
            f"{plan.shown(path)} is a directory in the subvolume {plan.shown(holder)}",
            hint=f"name the subvolume: {plan.shown(holder)}",
        )
    for each in facts:
        if not each.source.uuid:
            raise UserError(
                f"{plan.shown(each.name)} has no UUID: nobody could tell whose its snapshots are",
                hint="an old mkfs.btrfs gave the top level none; name the subvolumes in it",
            )
    skipped = (f"{plan.shown(each.name)} is left out: {each.reason}" for each in found.skipped)
    return facts, tuple(skipped)


def dataset_of(text: str, table: mountinfo.Table) -> str:
    """Return the dataset that was named, or is mounted at a path; UserError where none is."""
    if not text.startswith("/"):
        return Dataset.parse(text).name
    path = plan.normal(text)
    entry = table.containing(path)
    if entry is None or entry.fstype != "zfs" or "@" in entry.source:
        raise _no_dataset(text, entry)
    if entry.mountpoint != path:
        raise UserError(
            f"{plan.shown(text)} is a directory in the dataset {entry.source}",
            hint=f"name the dataset: {entry.source}",
        )
    return entry.source


def _no_dataset(text: str, entry: mountinfo.Entry | None) -> UserError:
    if entry is None or entry.fstype == "zfs":
        return UserError(f"{plan.shown(text)} is no live dataset", hint="name the dataset")
    if entry.fstype == "btrfs":
        return UserError(
            f"{plan.shown(text)} is on btrfs: this is of ZFS alone",
            hint="`atomtx snap` and `atomtx prune` are of btrfs, too",
        )
    return UserError(
        f"{plan.shown(text)} is on {entry.fstype}: snapshots that stay are of ZFS, btrfs and LVM",
        hint=f"`atomtx backup --read-live {shlex.quote(text)}` reads it as it is, which is not a "
        "moment",
    )


def _healthy(pools: Sequence[Pool], wanted: Iterable[str], *, named: bool) -> list[str]:
    by_name = {pool.name: pool for pool in pools}
    for name in sorted(set(wanted)):
        if name not in by_name:
            raise UserError(f"there is no pool {name}", hint="is it imported? see `zpool list`")
        if named and by_name[name].health == "SUSPENDED":
            raise UserError(f"the pool {name} is suspended", hint=f"see `zpool status {name}`")
    return [name for name in sorted(set(wanted)) if by_name[name].health != "SUSPENDED"]


def choose(
    request: Request,
    asked: Sequence[str],
    datasets: Iterable[DatasetFacts],
    pools: Iterable[Pool],
) -> Wanted:
    """Return what is meant of *datasets*, which are all of the pools that are asked for; pure."""
    pools = tuple(pools)
    suspended = [pool.name for pool in pools if pool.health == "SUSPENDED"] if request.all else []
    return Wanted(
        tuple(asked),
        tuple(_chosen(request, asked, tuple(datasets))),
        pools,
        tuple(f"pool {pool} is left out: it is suspended" for pool in suspended),
    )


def key(found: Wanted) -> str:
    """Return the key of an unnamed job: it follows what is meant, not when."""
    guids = [facts.guid for facts in found.datasets]
    guids += [facts.guid for facts in found.subvolumes]
    guids += [facts.guid for facts in found.logical_facts]
    return hashlib.sha256(json.dumps(sorted(guids)).encode()).hexdigest()[:32]


def _chosen(
    request: Request, asked: Sequence[str], datasets: Sequence[DatasetFacts]
) -> list[DatasetFacts]:
    """Return the datasets that are meant, in order; those with volumes of their own as well."""
    if request.all and asked:
        raise _both(asked[0])
    if not request.all and not asked:
        raise UserError("nothing was named", hint="name volumes, or use --all")
    known = {facts.name for facts in datasets}
    for text in (*asked, *request.exclude):
        if text not in known:
            raise UserError(f"there is no dataset {text}", hint="`zfs list` shows them")
    excluded = set(request.exclude)
    chosen = [
        facts
        for facts in datasets
        if _is_meant(facts.name, request, asked) and not _is_in(facts.name, excluded)
    ]
    if not chosen:
        raise _nothing_left()
    return chosen


def _nothing_left() -> UserError:
    return UserError("there is nothing left: everything is excluded")


def _both(name: str) -> UserError:
    return UserError(
        f"--all and {name} exclude each other", hint="name datasets, or use --all with --exclude"
    )


def _is_meant(name: str, request: Request, asked: Sequence[str]) -> bool:
    return request.all or name in asked or (request.recursive and _is_in(name, asked))


def _is_in(name: str, tops: Iterable[str]) -> bool:
    return any(name == top or name.startswith(f"{top}/") for top in tops)


def by_volume(there: Iterable[Kept]) -> list[list[Kept]]:
    """Return the snapshots of each volume, the newest first; a VG can have the name of a pool."""
    groups: dict[tuple[str, str], list[Kept]] = {}
    for each in there:
        groups.setdefault((each.kind, each.volume), []).append(each)
    for group in groups.values():  # the time of creation is told in whole seconds
        group.sort(key=lambda each: int(each.createtxg), reverse=True)
    return list(groups.values())


def newest(there: Iterable[Kept]) -> dict[str, Kept]:
    """Return the newest snapshot of each volume, all of one kind, by the volume."""
    return {group[0].volume: group[0] for group in by_volume(there)}

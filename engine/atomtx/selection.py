"""
Which datasets a request means, and what is left out.  Pure.

What a user names and cannot be backed up is an error; what `-a` and `-r` find on their way and
cannot take, and what lies below the volumes and is not in the set, is reported (promises 7, 9).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from . import directories, system
from .errors import UserError
from .inventory import Inventory, Unfit, ancestors, command, is_whole_dataset
from .logical import Logicals
from .lvmio import Volume
from .mounts.mountinfo import Entry, Table
from .names import Dataset, is_within
from .plan import (
    SYSTEM_PATHS,
    Chosen,
    DatasetFacts,
    LeftOut,
    Pool,
    Request,
    Selection,
    normal,
    path_order,
    paths_to_read,
    shown,
    targets,
)
from .subvolumes import Filesystem, Subvolumes, is_on_btrfs


def select(
    request: Request,
    datasets: Sequence[DatasetFacts],
    pools: Sequence[Pool],
    mounts: Table,
    filesystems: Sequence[Filesystem] = (),
    logical: Sequence[Volume] = (),
    live: directories.Found = directories.Found(),  # noqa: B008  (frozen)
) -> Selection:
    """
    Return the volumes that *request* asks for, parents first, and what it leaves out.

    *datasets* are all file systems and volumes of the imported *pools*, *filesystems* those of
    btrfs on which something is named, *logical* all of LVM's where something may be, *live* what
    is read without a snapshot.  Raises UserError for a request that makes no sense, and for a
    volume that was named and cannot be backed up.
    """
    _check_request(request)
    order = request.names
    logicals = Logicals(logical, mounts, request.cow_size)
    on_lvm = logicals.select([text for text in request.names if logicals.means(text)])
    request = replace(
        request,
        names=tuple(text for text in request.names if not logicals.means(text)),
        exclude=tuple(text for text in request.exclude if text not in live.excluded),
    )
    request, on_btrfs = _parted(request, mounts)
    there = Inventory(datasets, pools, mounts)
    subvolumes = Subvolumes(filesystems, mounts)
    found = subvolumes.select(on_btrfs)
    named = _named(request, there)
    excluded = _excluded(request, there, named)
    judged = {
        facts.name: there.judge(facts, wish=named.get(facts.name, ""))
        for facts in _candidates(request, there, named)
        if facts.name not in excluded
    }
    _check_named(request, named, judged)
    others = (*found.volumes, *on_lvm.volumes, *_not_frozen(live.volumes, on_lvm.volumes))
    volumes = _in_mount_order(there, judged, others)
    skipped = (*_suspended(request, there, excluded), *_skipped(judged), *found.skipped)
    skipped += _not_chosen(live.skipped, volumes)
    if not volumes:
        raise _nothing(skipped)
    _check_gaps(there, volumes)
    if request.layout == "tree":
        _check_root(normal(request.root), volumes)
    known = there.facts if request.all else {*judged, *excluded}
    parts = (*found.parts, *on_lvm.parts)
    tops = paths_to_read((mountpoint for _, mountpoint in volumes), parts)
    told = {*subvolumes.at(on_btrfs.exclude)}
    told |= {*subvolumes.at(found.named)} if request.recursive else set()
    return Selection(
        asked=(*_in_order(order, named, found.named, logicals.places(on_lvm)), *live.named),
        volumes=volumes,
        skipped=skipped,
        uncovered=(
            *_other_datasets(there, volumes, known, tops),
            *subvolumes.uncovered(volumes, told, tops),
            *_other_mounts(there, volumes, subvolumes, logicals, live, tops),
        ),
        notes=(
            *_exclusions(request, there),
            *subvolumes.exclusions(on_btrfs),
            *directories.exclusions(live),
            *_choices(there, volumes),
            *directories.read_live(volumes),
        ),
        parts=parts,
        seams=_seams(mounts, subvolumes, volumes),
    )


# -- what was asked ----------------------------------------------------------------------------


def _check_request(request: Request) -> None:
    if request.all and request.names:
        raise UserError(
            f"--all and {request.names[0]} exclude each other",
            hint="name datasets, or use --all with --exclude",
        )
    if not request.all and not request.names and not request.live:
        raise UserError("nothing was named", hint="name volumes, or use --all")
    if request.layout == "namespace" and not system.here.NAMESPACES:
        raise UserError(
            f"{system.here.NAME} has no mount namespaces: a client can only read in a tree",
            hint="leave out the layout `namespace`, or give --layout tree",
        )
    if request.layout != "tree" and request.root:
        raise UserError(
            f"the root {request.root} is of no use without a tree", hint="add --layout tree"
        )
    if request.layout != "tree" and (request.whole_root or request.leave_dirs):
        option = "--whole-root" if request.whole_root else "--leave-dirs"
        raise UserError(f"{option} is of no use without a tree", hint="add --layout tree")
    if request.layout == "tree" and (
        not request.root.startswith("/") or normal(request.root) == "/"
    ):
        raise UserError(
            f"the root of the tree must be an absolute path below /, not {request.root!r}",
            hint="such as --root /restic",
        )


def _parted(request: Request, mounts: Table) -> tuple[Request, Request]:
    """Part a request into that for ZFS and that for btrfs."""

    def part(*, btrfs: bool) -> Request:
        return replace(
            request,
            names=tuple(t for t in request.names if is_on_btrfs(mounts, t) is btrfs),
            exclude=tuple(t for t in request.exclude if is_on_btrfs(mounts, t) is btrfs),
        )

    return part(btrfs=False), part(btrfs=True)


def _in_order(
    texts: Sequence[str],
    named: Mapping[str, str],
    paths: Collection[str],
    logical: Mapping[str, str],
) -> tuple[str, ...]:
    """Return what was named, on ZFS, on btrfs and on LVM, in the user's order."""
    places = {path: name for name, path in named.items() if path} | dict(logical)
    words = (normal(text) if text.startswith("/") else text for text in texts)
    return tuple(word if word in paths else places.get(word, word) for word in words)


def _named(request: Request, there: Inventory) -> dict[str, str]:
    """Return the datasets that were named, in order, each with the path that named it, or ""."""
    named: dict[str, str] = {}
    for text in request.names:
        name, path = _resolve(there, text)
        if name in named:
            raise UserError(f"{name} is given twice", hint="name it once")
        _check_pool(there, name)
        named[name] = path
    for name in named if request.recursive else ():
        for above in ancestors(name):
            if above in named:
                raise UserError(
                    f"{name} is already included by {above} with -r", hint=f"leave out {name}"
                )
    return named


def _resolve(there: Inventory, text: str) -> tuple[str, str]:
    """Return the dataset that *text* means, and the path if it is one."""
    if text.startswith("/"):
        path = normal(text)
        name, where = _dataset_at(there.mounts, path), path
    else:
        name, where = Dataset.parse(text).name, ""
    pool = Dataset(name).pool
    if pool not in there.pools:
        raise UserError(f"pool {pool} is not imported", hint=command("zpool", "import", pool))
    if name not in there.facts and not _is_suspended(there, name):  # which cannot be asked
        hint = command("zfs", "list", "-r", pool) + " shows those of its pool"
        raise UserError(f"there is no dataset {name}", hint=hint)
    return name, where


def _dataset_at(mounts: Table, path: str) -> str:
    entry = mounts.containing(path)
    if entry is None or entry.fstype != "zfs":
        what = f"{entry.fstype} at {shown(entry.mountpoint)}" if entry else "no mount"
        raise UserError(
            f"{shown(path)} is on none of ZFS, btrfs and LVM, but on {what}",
            hint="`zfs list` shows the datasets; --read-live reads a directory, not of a moment",
        )
    if "@" in entry.source:
        raise UserError(
            f"{shown(path)} is in the mounted snapshot {entry.source}",
            hint="name the dataset; atomtx takes the snapshot itself",
        )
    if entry.mountpoint != path or entry.root != "/":
        raise UserError(
            f"{shown(path)} is not the mountpoint of a dataset: it is inside {entry.source}, "
            f"mounted at {shown(entry.mountpoint)}",
            hint=f"name {entry.source}; of a symbolic link, name the target",
        )
    return entry.source


def _is_suspended(there: Inventory, name: str) -> bool:
    return there.pools[Dataset(name).pool].health == "SUSPENDED"


def _check_pool(there: Inventory, name: str) -> None:
    pool = Dataset(name).pool
    if _is_suspended(there, name):
        raise UserError(
            f"{name} cannot be backed up: its pool {pool} is suspended",
            hint=f"{command('zpool', 'status', pool)} shows why; "
            f"then {command('zpool', 'clear', pool)}",
        )


def _excluded(request: Request, there: Inventory, named: Collection[str]) -> set[str]:
    """Return the datasets that are left out by the user's word: those given, and all below."""
    given = {_resolve(there, text)[0] for text in request.exclude}
    below = {name for name in there.facts if not given.isdisjoint((name, *ancestors(name)))}
    excluded = given | below  # of a suspended pool no facts are known
    for name in named:
        if name in excluded:
            raise UserError(f"{name} is both named and left out", hint="do one of the two")
    return excluded


def _candidates(
    request: Request, there: Inventory, named: Collection[str]
) -> Iterator[DatasetFacts]:
    for name, facts in there.facts.items():
        if request.all:
            if not _is_suspended(there, name):
                yield facts
        elif name in named or (request.recursive and any(a in named for a in ancestors(name))):
            yield facts


# -- what comes of it --------------------------------------------------------------------------


def _check_named(request: Request, named: Iterable[str], judged: Mapping[str, str | Unfit]) -> None:
    for name in named:
        why = judged[name]
        if isinstance(why, Unfit) and not (request.recursive and why.is_container):
            raise UserError(f"{name} cannot be backed up: {why.reason}", hint=why.remedy)


def _in_mount_order(
    there: Inventory, judged: Mapping[str, str | Unfit], subvolumes: Iterable[Chosen]
) -> tuple[Chosen, ...]:
    volumes = [Chosen(there.facts[n], at) for n, at in judged.items() if isinstance(at, str)]
    return tuple(sorted([*volumes, *subvolumes], key=lambda volume: path_order(volume.mountpoint)))


def _suspended(
    request: Request, there: Inventory, excluded: Collection[str]
) -> tuple[LeftOut, ...]:
    return tuple(
        LeftOut(pool.name, "the whole pool is suspended")
        for pool in there.pools.values()
        if request.all and pool.health == "SUSPENDED" and pool.name not in excluded
    )


def _skipped(judged: Mapping[str, str | Unfit]) -> tuple[LeftOut, ...]:
    return tuple(
        LeftOut(name, why.reason)
        for name, why in judged.items()
        if isinstance(why, Unfit) and not why.is_container
    )


def _not_frozen(live: Iterable[Chosen], logical: Iterable[Chosen]) -> Iterator[Chosen]:
    """Return what is read live, without what -r took of volumes of LVM that were named as well."""
    frozen = {volume.mountpoint for volume in logical}
    return (volume for volume in live if volume.mountpoint not in frozen)


def _not_chosen(skipped: Iterable[LeftOut], volumes: Iterable[Chosen]) -> tuple[LeftOut, ...]:
    """Return what -r did not take below a live directory, but what was named as well."""
    chosen = {volume.mountpoint for volume in volumes}
    return tuple(each for each in skipped if each.name not in chosen)


def _nothing(skipped: Sequence[LeftOut]) -> UserError:
    hint = f"{shown(skipped[0].name)}: {skipped[0].reason}" if skipped else "no dataset is mounted"
    more = f"; and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return UserError("there is nothing to back up", hint=hint + more)


def _check_gaps(there: Inventory, volumes: Iterable[Chosen]) -> None:
    """
    Refuse a volume that has no mountpoint in the frozen files above it.

    In the snapshot of /a the directory /a/b, where something else is mounted, is empty: there
    is no /a/b/c to mount on.
    """
    chosen = {volume.mountpoint: volume.facts.name for volume in volumes}
    for mountpoint, name in chosen.items():
        between: list[Entry] = []
        for path in ancestors(mountpoint):
            if path in chosen:
                if between:
                    raise _gap(name, mountpoint, chosen[path], between[-1])
                break
            between += filter(None, [there.mounts.topmost(path)])


def _gap(name: str, mountpoint: str, parent: str, missing: Entry) -> UserError:
    is_dataset = is_whole_dataset(missing)
    what = missing.source if is_dataset else f"the {missing.fstype} file system"
    return UserError(
        f"{name} at {mountpoint} cannot be mounted below the snapshot of {parent}: "
        f"{what} at {shown(missing.mountpoint)} lies between them and is not in the set",
        hint=(f"add {missing.source}, " if is_dataset else "")
        + f"leave out {name} (--exclude) or {parent}, or back them up in runs of their own",
    )


def _check_root(root: str, volumes: Iterable[Chosen]) -> None:
    for volume in volumes:
        if volume.mountpoint == "/" and not system.here.NAMESPACES:
            continue  # no directory is outside, and no other layout could be taken
        if is_within(root, volume.mountpoint):
            raise UserError(
                f"the root of the tree {root} is inside {volume.facts.name}, mounted at "
                f"{volume.mountpoint}, which is to be backed up",
                hint="choose a directory outside of the set",
            )


# -- what to say about it ----------------------------------------------------------------------


def _other_datasets(
    there: Inventory, volumes: Iterable[Chosen], known: Collection[str], tops: Collection[str]
) -> Iterator[LeftOut]:
    """Yield the datasets below the volumes, by name or by mountpoint, that are not in the set."""
    chosen = {volume.facts.name for volume in volumes}
    below = {entry.source for entry in _below(there, tops) if is_whole_dataset(entry)}
    for name, facts in there.facts.items():
        if name in known or not (name in below or any(a in chosen for a in ancestors(name))):
            continue
        at = there.judge(facts)
        if isinstance(at, str):
            yield LeftOut(name, f"it is a dataset of its own, at {at}; name it as well, or use -r")
        elif not at.is_container:
            yield LeftOut(name, f"it is a dataset of its own, and {at.reason}")


def _other_mounts(
    there: Inventory,
    volumes: Sequence[Chosen],
    subvolumes: Subvolumes,
    logicals: Logicals,
    live: directories.Found,
    tops: Collection[str],
) -> Iterator[LeftOut]:
    """Yield the mounts below the volumes that are not datasets, or datasets once more."""
    chosen = {volume.facts.name: volume.mountpoint for volume in volumes}
    told = {volume.mountpoint for volume in live.volumes} | {each.name for each in live.skipped}
    told |= set(map(normal, live.excluded))
    for entry in _below(there, tops):
        if entry.mountpoint in told:
            continue
        if subvolumes.shows(entry) or logicals.shows(entry, volumes):
            continue  # it is in the set, or told already
        if not is_whole_dataset(entry) or entry.source not in there.facts:
            yield LeftOut(entry.mountpoint, _what_is(entry))
        elif chosen.get(entry.source, entry.mountpoint) != entry.mountpoint:
            yield LeftOut(entry.mountpoint, f"it is a second mount of {entry.source}")


def _below(there: Inventory, tops: Collection[str]) -> Iterator[Entry]:
    ignored = SYSTEM_PATHS if "/" in tops else ()  # said once for the plan as a whole
    for top in tops:
        for entry in there.mounts.visible_below(top):
            is_automount = "@" in entry.source and "/.zfs/snapshot/" in entry.mountpoint
            if not is_automount and not any(is_within(entry.mountpoint, path) for path in ignored):
                yield entry


def _what_is(entry: Entry) -> str:
    source = shown(entry.source)
    if entry.fstype != "zfs":
        return f"it is another file system ({entry.fstype}, {source})"
    if "@" in entry.source:
        return f"it is the mounted snapshot {source}"
    if entry.root != "/":
        return f"it is a bind mount of {shown(entry.root)} in {source}"
    return f"it is the dataset {source}, which `zfs list` does not show"


def _seams(mounts: Table, subvolumes: Subvolumes, volumes: Iterable[Chosen]) -> frozenset[str]:
    """Return where something else is seen below the volumes, in the set or not."""
    tops = targets(mountpoint for _, mountpoint in volumes)
    mounted = (entry.mountpoint for top in tops for entry in mounts.visible_below(top))
    return frozenset((*mounted, *subvolumes.at(tops)))


def _exclusions(request: Request, there: Inventory) -> Iterator[str]:
    for text in request.exclude:
        name = _resolve(there, text)[0]
        yield f"{name} and all below it is left out at your word"


def _choices(there: Inventory, volumes: Iterable[Chosen]) -> Iterator[str]:
    for facts, mountpoint in volumes:
        others = [shown(path) for path in there.visible(facts.name) if path != mountpoint]
        if others:
            yield f"{facts.name} is backed up as {mountpoint}; also mounted at {', '.join(others)}"

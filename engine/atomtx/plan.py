"""What is there, and what was asked for -> the plan of a run.  Pure."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .errors import UserError
from .intents import (
    AFTER_FAILURE,
    AFTER_SUCCESS,
    BEFORE,
    FINALLY,
    HoldSnapshots,
    Intent,
    Mount,
    MountVolumes,
    Origin,
    RunHook,
    Source,
    TakeSnapshots,
)
from .names import BTRFS, LVM, PLAIN, ZFS, BtrfsSnapshot, Dataset, LvmSnapshot, RunId, is_within
from .states import Outcome, Verb

SYSTEM_PATHS = ("/dev", "/proc", "/run", "/sys")  # always the live ones, in a set that holds "/"
GRACE_S = 60
COW_SIZE = "20%"  # of its origin: the room of a classic snapshot of LVM
_LABEL_CHARS = 60


@dataclass(frozen=True)
class DatasetFacts:
    """One line of `zfs list`: a dataset as ZFS describes it."""

    name: str
    type: str  # "filesystem" or "volume"
    guid: str
    mountpoint: str  # the property: a path, "legacy", "none" or "-"
    canmount: str  # "on", "off", "noauto" or "-"
    mounted: bool  # in any namespace, says ZFS
    keystatus: str  # "available", "unavailable" or "-" (not encrypted)


@dataclass(frozen=True)
class Pool:
    name: str
    guid: str
    health: str  # "ONLINE", "DEGRADED", "SUSPENDED", ...


@dataclass(frozen=True)
class SubvolumeFacts:
    """A btrfs subvolume where it is seen."""

    name: str  # the path by which it is seen
    guid: str
    filesystem: str
    source: Source


@dataclass(frozen=True)
class DirectoryFacts:
    """A directory of a file system without snapshots: it is read live."""

    name: str  # its path
    guid: str  # its file system, and the directory in it; the same on each boot
    filesystem: str  # what proves that it is the same one
    fstype: str
    source: str


@dataclass(frozen=True)
class LogicalFacts:
    """A logical volume of LVM that is to be snapshotted."""

    name: str  # "VG/LV"
    guid: str
    group: str
    group_guid: str
    origin: Origin


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    names: tuple[str, ...]  # datasets or absolute paths, as typed
    all: bool = False
    recursive: bool = False
    exclude: tuple[str, ...] = ()  # datasets (with their children) to leave out
    layout: str = "namespace"  # or "tree"
    root: str = ""  # of the tree
    whole_root: bool = False  # the client gets the root itself
    leave_dirs: bool = False  # the directories of the tree stay
    job: str = ""  # its name in the configuration; empty: an unnamed one
    live: tuple[str, ...] = ()  # directories to read as they are: not a moment
    cow_size: str = COW_SIZE  # or such as "10G"


class Chosen(NamedTuple):
    """A volume of the set, and where it is seen live."""

    facts: DatasetFacts | SubvolumeFacts | LogicalFacts | DirectoryFacts
    mountpoint: str


class LeftOut(NamedTuple):
    """Something that the backup will not hold; *name* is a dataset's, or a mountpoint."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.name)} is not in the backup: {self.reason}"


@dataclass(frozen=True)
class Selection:
    """What `selection.select` made of a request."""

    asked: tuple[str, ...]  # the datasets that were named, in the user's order
    volumes: tuple[Chosen, ...]  # parents before children
    skipped: tuple[LeftOut, ...]  # what -a or -r would have taken, and cannot
    uncovered: tuple[LeftOut, ...]  # what lies below the volumes and was not asked for
    notes: tuple[str, ...]
    parts: tuple[str, ...] = ()  # paths that were named inside a volume, in place of all of it
    seams: frozenset[str] = frozenset()  # what is seen there is not in the frozen files above it


@dataclass(frozen=True)
class Existing:
    """A snapshot that was there before the run, which reads it and leaves it."""

    guid: str
    createtxg: str


@dataclass(frozen=True)
class PlannedVolume:
    """A volume of the set."""

    kind: str  # "zfs", "btrfs", "lvm" or "plain"
    pool: str  # of LVM the volume group; of btrfs and plain ones the file system, by its UUID
    pool_guid: str
    name: str
    guid: str
    mountpoint: str  # where it is mounted live
    snapshot: str  # the whole name of the snapshot to take; empty for a plain directory
    source: Source | None = None  # of btrfs
    origin: Origin | None = None  # of LVM
    existing: Existing | None = None  # of ZFS: the snapshot is not to be taken, only to be read


@dataclass(frozen=True)
class ClientPlan:
    """The client and what a resume needs of it: never a secret's value (promise 11)."""

    name: str
    command: tuple[str, ...]
    extra: tuple[str, ...]
    cwd: str
    version: str
    repository: str | None
    environment: tuple[tuple[str, str], ...]  # variables that are no secrets, with their values
    secrets: tuple[str, ...]  # names of the variables that are
    credentials: tuple[tuple[str, str], ...] = ()  # variables of a named job, and their sources


NO_CLIENT = ClientPlan("none", (), (), "/", "", None, (), ())  # of a verb that needs none


@dataclass(frozen=True)
class Plan:
    """A whole run before it begins; what `--dry-run` prints and the journal stores."""

    run: str
    job: str  # the key
    label: str
    volumes: tuple[PlannedVolume, ...]  # parents before children
    targets: tuple[str, ...]  # the topmost mountpoints, or what was named in them, for the client
    layout: str
    root: str
    live_paths: tuple[str, ...]  # bound back over the frozen files
    excludes: tuple[str, ...]  # left out of the backup
    notes: tuple[str, ...]  # what is not in the backup, and other things to say before
    client: ClientPlan
    keep_snapshots: bool = False
    retries: int = 0
    keep_for_s: int = 0
    # What an older journal does not tell has the value that held then.
    time_limit_s: int = 0  # of one attempt; 0: none
    grace_s: int = GRACE_S  # from a stop of the client to its kill
    hooks: tuple[RunHook, ...] = ()  # in the user's order
    whole_root: bool = False
    leave_dirs: bool = False
    retention: tuple[str, ...] = ()  # rules, each a word, as the client has them
    on_stop: str = "undo"  # or "keep": what a SIGTERM makes of the moment
    named: tuple[str, ...] = ()  # the mountpoints of the volumes that were named themselves
    nice: int = 0
    io_class: str = ""  # such as "idle", "best-effort:7"; empty: as it is
    verb: str = Verb.BACKUP
    transient: bool = False  # of a snap: its snapshots are meant to go again
    parent: str = ""  # "RUN/N": the run, and its step, that this one is made by

    @property
    def is_of_kept(self) -> bool:
        """Tell whether the run takes no snapshot, but reads those that were kept."""
        return any(volume.existing for volume in self.volumes)

    @property
    def below(self) -> str:
        """The root below which the repository has the paths of a backup; empty: they are whole."""
        return "" if self.whole_root else self.root


# -- making a plan -----------------------------------------------------------------------------


def assemble(
    request: Request,
    selection: Selection,
    *,
    pools: Sequence[Pool],
    run: RunId,
    client: ClientPlan,
    live_paths: Iterable[str] = (),
    notes: Iterable[str] = (),
    keep_snapshots: bool = False,
    retries: int = 0,
    keep_for_s: int = 0,
    time_limit_s: int = 0,
    grace_s: int = GRACE_S,
    hooks: Sequence[RunHook] = (),
    retention: tuple[str, ...] = (),
    on_stop: str = "undo",
    nice: int = 0,
    io_class: str = "",
    by_volume: bool = False,
) -> Plan:
    """
    Put a plan together from what was selected and what the client needs.

    *live_paths* and *notes* are the client's, which with *by_volume* reads no file system through
    another's directory.  Raises UserError for a snapshot's name that is too
    long, and for a named volume that the client needs as it is now.
    """
    tops = targets(mountpoint for _, mountpoint in selection.volumes)
    system = SYSTEM_PATHS if "/" in tops else ()
    needed = _live_inside(live_paths, selection, system, in_tree=bool(request.root))
    chosen, lost = _part(selection, needed)
    tops = targets(mountpoint for _, mountpoint in chosen)
    read = paths_to_read((mountpoint for _, mountpoint in chosen), selection.parts)
    if by_volume and not selection.parts:
        read = tuple(mountpoint for _, mountpoint in chosen)
    live = tuple(path for path in needed if _inside(path, tops))
    root = normal(request.root) if request.root else ""
    return Plan(
        run=str(run),
        job=job_key(request.job)
        if request.job
        else _unnamed_key((facts.guid for facts, _ in chosen), client, root, selection.parts),
        label=request.job or label(request, selection.asked),
        volumes=_planned(chosen, pools, run),
        targets=read,
        layout=request.layout,
        root=root,
        live_paths=live,
        excludes=targets(path for path in (*live, *system) if _inside(path, read)),
        notes=(*_notes(selection, lost, live, system), *notes),
        client=client,
        keep_snapshots=keep_snapshots,
        retries=retries,
        keep_for_s=keep_for_s,
        time_limit_s=time_limit_s,
        grace_s=grace_s,
        hooks=tuple(hooks),
        retention=retention,
        on_stop=on_stop,
        named=tuple(volume.mountpoint for volume in chosen if _is_named(volume, selection)),
        whole_root=request.whole_root,
        leave_dirs=request.leave_dirs,
        nice=nice,
        io_class=io_class,
    )


def without_client(
    *,
    run: str,
    job: str,
    label: str,
    volumes: tuple[PlannedVolume, ...],
    verb: Verb,
    notes: tuple[str, ...] = (),
    hooks: tuple[RunHook, ...] = (),
    transient: bool = False,
) -> Plan:
    """Return the plan of a run whose volumes nobody reads."""
    return Plan(
        run=run,
        job=job,
        label=label,
        volumes=volumes,
        targets=(),
        layout="namespace",
        root="",
        live_paths=(),
        excludes=(),
        notes=notes,
        client=NO_CLIENT,
        hooks=hooks,
        verb=verb,
        transient=transient,
    )


def _part(
    selection: Selection, live: Sequence[str]
) -> tuple[tuple[Chosen, ...], tuple[LeftOut, ...]]:
    """
    Part the volumes that can be frozen from those that the client needs as they are now.

    The latter, such as the dataset of a local repository or of /tmp under `-a`, are left out;
    it is an error to name them.
    """
    chosen, lost = [], []
    for volume in selection.volumes:
        name, path = volume.facts.name, _parent_in(volume.mountpoint, live)
        if path is None:
            chosen.append(volume)
            continue
        if _is_named(volume, selection):
            raise UserError(
                f"{name} cannot be backed up as it was: the client needs {path} as it is now",
                hint="move the client's cache, repository or temporary files elsewhere",
            )
        lost.append(LeftOut(name, f"the client needs {path} as it is now"))
    if not chosen:
        raise UserError("there is nothing to back up", hint=str(lost[0]))
    return tuple(chosen), tuple(lost)


def _is_named(volume: Chosen, selection: Selection) -> bool:
    """Tell whether a volume, or something in it, was named itself."""
    facts, mountpoint = volume
    where = "" if isinstance(facts, DatasetFacts) else mountpoint
    in_it = where and any(_parent_in(part, [where]) for part in selection.parts)
    return facts.name in selection.asked or bool(in_it)


def _planned(
    volumes: Iterable[Chosen], pools: Sequence[Pool], run: RunId
) -> tuple[PlannedVolume, ...]:
    guids = {pool.name: pool.guid for pool in pools}

    def planned(n: int, volume: Chosen) -> PlannedVolume:
        match volume.facts:
            case DatasetFacts() as facts:
                dataset = Dataset(facts.name)
                snapshot = str(dataset.snapshot(run).check())
                return planned_dataset(facts, volume.mountpoint, guids[dataset.pool], snapshot)
            case SubvolumeFacts() as facts:
                is_top = facts.source.path == "/"
                taken = BtrfsSnapshot.of(facts.filesystem, run, n, is_top=is_top)
                return planned_subvolume(facts, str(taken))
            case LogicalFacts() as facts:
                snapshot = str(LvmSnapshot.of(facts.group, run, n))
                return planned_logical(facts, volume.mountpoint, snapshot)
            case DirectoryFacts() as facts:
                return _planned_directory(facts)

    return tuple(planned(n, volume) for n, volume in enumerate(volumes))


def _planned_directory(facts: DirectoryFacts) -> PlannedVolume:
    return PlannedVolume(
        kind=PLAIN,
        pool=facts.filesystem,
        pool_guid=facts.filesystem,
        name=facts.name,
        guid=facts.guid,
        mountpoint=facts.name,
        snapshot="",
    )


def planned_logical(facts: LogicalFacts, mountpoint: str, snapshot: str) -> PlannedVolume:
    """Return a logical volume as a plan has it, with a snapshot's name."""
    return PlannedVolume(
        kind=LVM,
        pool=facts.group,
        pool_guid=facts.group_guid,
        name=facts.name,
        guid=facts.guid,
        mountpoint=mountpoint,
        snapshot=snapshot,
        origin=facts.origin,
    )


def planned_subvolume(facts: SubvolumeFacts, snapshot: str) -> PlannedVolume:
    """Return a subvolume as a plan has it, with a snapshot's name."""
    return PlannedVolume(
        kind=BTRFS,
        pool=facts.filesystem,
        pool_guid=facts.filesystem,
        name=facts.name,
        guid=facts.guid,
        mountpoint=facts.name,
        snapshot=snapshot,
        source=facts.source,
    )


def planned_dataset(
    facts: DatasetFacts, mountpoint: str, pool_guid: str, snapshot: str
) -> PlannedVolume:
    """Return a dataset as a plan has it, with a snapshot's name."""
    return PlannedVolume(
        kind=ZFS,
        pool=Dataset(facts.name).pool,
        pool_guid=pool_guid,
        name=facts.name,
        guid=facts.guid,
        mountpoint=mountpoint,
        snapshot=snapshot,
    )


def job_key(name: str) -> str:
    """
    Return the key of a job of the configuration: it follows the name, whatever the job holds.

    No unnamed job has it: those keys are hexadecimal.
    """
    return f"job {name}"


def _unnamed_key(guids: Iterable[str], client: ClientPlan, root: str, parts: Iterable[str]) -> str:
    words = [sorted(guids), client.name, client.repository, client.command, root]
    words += [sorted(parts)] if parts else []
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]


def label(request: Request, asked: Sequence[str]) -> str:
    """Name the job as a person would: what was asked for, not what it came to."""
    if request.all:
        return "-a"
    fit = 1
    while fit < len(asked) and len(", ".join(asked[: fit + 1])) <= _LABEL_CHARS:
        fit += 1
    more = f" and {len(asked) - fit} more" if fit < len(asked) else ""
    return ", ".join(asked[:fit]) + more + (" -r" if request.recursive else "")


def _live_inside(
    paths: Iterable[str], selection: Selection, system: Sequence[str], *, in_tree: bool
) -> tuple[str, ...]:
    """Return what is to stay live of the client's paths that are in the set."""
    points = [volume.mountpoint for volume in selection.volumes]
    inside = [p for p in map(normal, paths) if _inside(p, points) and not _inside(p, system)]
    return to_bring_back(inside, points, selection.seams, in_tree=in_tree)


def to_bring_back(
    paths: Iterable[str], mountpoints: Collection[str], seams: Collection[str], *, in_tree: bool
) -> tuple[str, ...]:
    """
    Return what to bind so that *paths*, inside *mountpoints* of the set, are live; none twice.

    Below a seam, where something else begins that is not in the set, the frozen files have
    nothing to bind over: it is brought back as a whole.  A tree hides nothing, and what its
    frozen files do not have needs no exclusion.
    """
    found = {path: _in_frozen(path, mountpoints, seams) for path in paths}
    return targets(there for path, there in found.items() if there == path or not in_tree)


def _in_frozen(path: str, mountpoints: Collection[str], seams: Collection[str]) -> str:
    """Return *path*, or the seam on the way to it: an empty directory in the frozen files."""
    volume = max((m for m in mountpoints if is_within(path, m)), key=len)
    between = (s for s in seams if is_within(path, s) and is_within(s, volume) and s != volume)
    return min(between, key=len, default=path)


def _parent_in(path: str, parents: Iterable[str]) -> str | None:
    return next((parent for parent in parents if is_within(path, parent)), None)


def _inside(path: str, parents: Iterable[str]) -> bool:
    return _parent_in(path, parents) is not None


def _notes(
    selection: Selection, lost: Iterable[LeftOut], live: Iterable[str], system: Iterable[str]
) -> tuple[str, ...]:
    left_out = map(str, (*selection.skipped, *selection.uncovered, *lost))
    needed = (str(LeftOut(path, "the client needs it as it is now")) for path in live)
    running = (str(LeftOut(path, "it belongs to the running system")) for path in system)
    return (*left_out, *selection.notes, *needed, *running)


# -- reading a plan ----------------------------------------------------------------------------


def intents(plan: Plan, directories: tuple[str, ...] = ()) -> tuple[Intent, ...]:
    """
    Return the effects of the plan in order, up to the client, which its caller knows.

    *directories* are those to be made for a tree, parents first.
    """
    take = [_take(plan, volumes) for volumes in _by_pool(plan)]
    hold = filter(None, map(hold_of, take))
    mount = MountVolumes(plan.root, mounts(plan), directories, plan.leave_dirs)
    return (*hold, mount) if plan.is_of_kept else (*take, *hold, mount)


def first_intents(plan: Plan) -> tuple[Intent, ...]:
    """
    Return what is journaled with a new run: its hooks up to the snapshots, and these.

    Of those that exist already the holds.
    """
    hooks = [hook for when in BEFORE for hook in plan.hooks if hook.when == when]
    first = HoldSnapshots if plan.is_of_kept else TakeSnapshots
    return (*hooks, *(step for step in intents(plan) if isinstance(step, first)))


def hooks_after(plan: Plan, outcome: Outcome | None) -> tuple[RunHook, ...]:
    """Return the hooks that follow a run's outcome; for None, those of any: a dry run's."""
    ends = {AFTER_SUCCESS: outcome in (None, Outcome.COMPLETED)}
    ends |= {AFTER_FAILURE: outcome is not Outcome.COMPLETED, FINALLY: True}
    return tuple(hook for when in ends for hook in plan.hooks if hook.when == when and ends[when])


def _take(plan: Plan, volumes: Sequence[PlannedVolume]) -> TakeSnapshots:
    first = volumes[0]
    # The top level of a btrfs first: its snapshot is not to have the others' directory in it.
    volumes = sorted(volumes, key=lambda v: v.source is not None and v.source.path != "/")
    return TakeSnapshots(
        pool=first.pool,
        pool_guid=first.pool_guid,
        snapshots=tuple(volume.snapshot for volume in volumes),
        run=plan.run,
        volume_kind=first.kind,
        sources=tuple(volume.source for volume in volumes if volume.source),
        origins=tuple(volume.origin for volume in volumes if volume.origin),
        transient=plan.transient,
    )


def hold_of(take: TakeSnapshots) -> HoldSnapshots | None:
    """Return the hold that follows on snapshots; only ZFS knows holds."""
    if take.volume_kind != ZFS:
        return None
    return HoldSnapshots(take.pool, take.pool_guid, take.snapshots, RunId(take.run).token)


def mounts(plan: Plan) -> tuple[Mount, ...]:
    """Return the mounts of the plan in its layout, parents first."""
    return tree_mounts(plan) if plan.root else namespace_mounts(plan)


def namespace_mounts(plan: Plan) -> tuple[Mount, ...]:
    """Return each snapshot, or live directory, at its volume's own mountpoint."""
    return tuple(_mount(v, v.mountpoint) for v in plan.volumes)


def tree_mounts(plan: Plan) -> tuple[Mount, ...]:
    """Return each snapshot, or live directory, at its volume's mountpoint under the root."""
    return tuple(_mount(v, (plan.root + v.mountpoint).rstrip("/")) for v in plan.volumes)


def _mount(volume: PlannedVolume, mountpoint: str) -> Mount:
    source = volume.mountpoint if volume.kind == PLAIN else volume.snapshot
    fstype = volume.origin.fstype if volume.origin else ""
    return Mount(source, mountpoint, volume.kind, fstype=fstype)


def prioritized(plan: Plan, argv: tuple[str, ...]) -> tuple[str, ...]:
    """Return the client's command with the niceness and the class of I/O that the plan has."""
    if plan.io_class:
        name, _, level = plan.io_class.partition(":")
        data = ("--classdata", level) if level else ()
        argv = ("ionice", "--class", name, *data, *argv)
    return ("nice", "-n", str(plan.nice), *argv) if plan.nice else argv


def tops(plan: Plan) -> tuple[str, ...]:
    """Return the topmost mountpoints of the set: what lies below them is frozen."""
    return targets(volume.mountpoint for volume in plan.volumes)


def read_live(plan: Plan) -> tuple[str, ...]:
    """Return the directories of the set that are not a moment."""
    return tuple(volume.mountpoint for volume in plan.volumes if volume.kind == PLAIN)


def as_read(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the targets and exclusions by the names that the client's backup has of them."""
    if not plan.whole_root:
        return plan.targets, plan.excludes
    root = plan.root.rstrip("/")
    return (plan.root,), tuple(root + path for path in plan.excludes)


def is_frozen(plan: Plan, path: str) -> bool:
    """Tell whether the client finds *path* as it was at the moment, and read-only."""
    frozen = tops(plan)
    live = (*plan.live_paths, *(SYSTEM_PATHS if "/" in frozen else ()))
    return not plan.root and _inside(path, frozen) and not _inside(path, live)


def describe(plan: Plan, steps: Sequence[Intent] | None = None) -> tuple[str, ...]:
    """
    Return the lines of `--dry-run`: each step, and below it what undoes it.

    *steps* are all the steps of the run where the caller knows more of them than :func:`intents`.
    """
    lines = []
    for number, step in enumerate(intents(plan) if steps is None else steps, start=1):
        undo = step.compensation()
        lines.append(f"{number}. {step.describe()}")
        lines.append(f"   undo: {undo.describe() if undo else 'none'}")
    return tuple(lines)


def _by_pool(plan: Plan) -> list[list[PlannedVolume]]:
    """Group the volumes: those of one pool are taken in one transaction group (promise 8)."""
    pools: dict[tuple[str, str, str], list[PlannedVolume]] = {}
    for volume in (v for v in plan.volumes if v.kind != PLAIN):
        pools.setdefault((volume.kind, volume.pool, volume.pool_guid), []).append(volume)
    return list(pools.values())


# -- storing a plan ----------------------------------------------------------------------------


def to_json(plan: Plan) -> str:
    """Return the text that :func:`from_json` reads back to an equal plan."""
    # In ASCII: a path that is not UTF-8 has surrogates, which SQLite could not store.
    return json.dumps(asdict(plan, dict_factory=_told), sort_keys=True)


def _told(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A volume without one of these says nothing of it, as in older journals."""
    untold = ("source", "origin", "existing")
    return {name: value for name, value in pairs if name not in untold or value is not None}


def from_json(text: str) -> Plan:
    """Read a plan back from the journal."""
    data = {name: _frozen(value) for name, value in json.loads(text).items()}
    data["volumes"] = tuple(map(_planned_volume, data["volumes"]))
    client = {name: _frozen(value) for name, value in data["client"].items()}
    hooks = tuple(_hook(hook) for hook in data.get("hooks", ()))
    return Plan(**data | {"client": ClientPlan(**client), "hooks": hooks})


def _hook(data: dict[str, Any]) -> RunHook:
    return RunHook(**{name: _frozen(value) for name, value in data.items()})


def _planned_volume(data: dict[str, Any]) -> PlannedVolume:
    source, origin, existing = (data.get(name) for name in ("source", "origin", "existing"))
    return PlannedVolume(
        **data
        | {"source": Source(**source) if source else None}
        | {"origin": Origin(**origin) if origin else None}
        | {"existing": Existing(**existing) if existing else None}
    )


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


# -- paths -------------------------------------------------------------------------------------


def targets(mountpoints: Iterable[str]) -> tuple[str, ...]:
    """Return the topmost of some absolute, normal paths: each one is within one of them."""
    tops: list[str] = []
    for path in sorted(set(mountpoints), key=path_order):
        if not tops or not is_within(path, tops[-1]):
            tops.append(path)
    return tuple(tops)


def paths_to_read(mountpoints: Iterable[str], parts: Iterable[str]) -> tuple[str, ...]:
    """
    Return what the client reads of some volumes: *parts* of those that have any, else all.

    Each part is in a volume: one that is in none would be left out in silence.
    """
    points = tuple(mountpoints)
    held: dict[str, str] = {}
    for part in parts:
        above = [m for m in points if is_within(part, m)]
        assert above, part
        held[part] = max(above, key=len)
    return targets([*held, *(m for m in points if m not in held.values())])


def path_order(path: str) -> list[str]:
    """Return a key that sorts parents first, and all that is below a path next to it."""
    return path.rstrip("/").split("/")


def normal(path: str) -> str:
    """Return an absolute path without dots and doubled or trailing slashes."""
    return "/" + posixpath.normpath(path).lstrip("/")


def shown(text: str) -> str:
    """Return a name as it can be printed, whatever bytes it has."""
    return text if text.isprintable() else ascii(text)

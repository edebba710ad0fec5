"""
What a run does to the machine, as data: one frozen dataclass an effect.  Pure.

The journal stores an intent before its effect, together with its compensation, so that an undo
never needs room for a new row.  ``executor.py`` carries them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

from .names import BTRFS, LVM, PLAIN, ZFS

# Not written, and read back all the same: older journals do not tell them, and a thousand mounts
# would tell them a thousand times.
_UNTOLD: Mapping[str, Any] = {
    "volume_kind": ZFS,
    "sources": (),
    "origins": (),
    "guid": "",
    "fstype": "",
    "transient": False,
}
_NOUNS = {ZFS: "dataset", BTRFS: "subvolume", LVM: "logical volume"}


def _told(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in _UNTOLD or value != _UNTOLD[name]}


@dataclass(frozen=True)
class _Intent:
    kind: ClassVar[str]

    def to_json(self) -> str:
        """Return the payload that :func:`from_json` reads back to an equal intent."""
        # In ASCII: a path that is not UTF-8 has surrogates, which SQLite could not store.
        return json.dumps(asdict(self, dict_factory=_told), sort_keys=True)


@dataclass(frozen=True)
class Source:
    """The btrfs subvolume that is snapshotted: it is looked at again before it is."""

    id: int
    uuid: str
    path: str  # below the top level of its file system: "/@home"
    generation: int  # of the file system, when the intent was made


@dataclass(frozen=True)
class Origin:
    """The logical volume of LVM that is snapshotted, and how."""

    uuid: str
    name: str  # "VG/LV"
    fstype: str = ""  # not known of what is adopted
    cow_bytes: int = 0  # the room for what changes meanwhile; a thin volume needs none
    pool: str = ""  # of a thin volume, without its group; older runs do not know it


@dataclass(frozen=True)
class TakeSnapshots(_Intent):
    """
    All snapshots of one pool, of one btrfs file system, or of one volume group of LVM.

    Those of a pool are taken in one command and so in one transaction group.  The others are
    taken one after the other, of *sources* or of *origins* in the same order.  *transient* ones
    get that mark as well, of LVM a tag; of btrfs their names say it.
    """

    kind: ClassVar[str] = "take-snapshots"
    pool: str
    pool_guid: str
    snapshots: tuple[str, ...]
    run: str
    volume_kind: str = ZFS
    sources: tuple[Source, ...] = ()
    origins: tuple[Origin, ...] = ()
    transient: bool = False

    def describe(self) -> str:
        count = _count(self.snapshots, _NOUNS[self.volume_kind])
        how = ", one after the other" if len(self.snapshots) > 1 else ""
        if self.volume_kind == ZFS:
            how = " in one transaction"
        how += ", as transient" if self.transient else ""
        return f"snapshot {count} of {_where(self)}{how}"

    def compensation(self) -> DestroySnapshots:
        return DestroySnapshots(
            self.pool, self.pool_guid, self.snapshots, self.run, self.volume_kind
        )


@dataclass(frozen=True)
class DestroySnapshots(_Intent):
    """Each is destroyed only if it is proven to be the one that this run took."""

    kind: ClassVar[str] = "destroy-snapshots"
    pool: str
    pool_guid: str
    snapshots: tuple[str, ...]
    run: str
    volume_kind: str = ZFS

    def describe(self) -> str:
        return f"destroy {_count(self.snapshots, 'snapshot')} of {_where(self)}"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class KeepSnapshots(_Intent):
    """Change the mark from the run's to one that says kept: from then on they are the user's."""

    kind: ClassVar[str] = "keep-snapshots"
    pool: str
    pool_guid: str
    snapshots: tuple[str, ...]
    run: str
    volume_kind: str = ZFS

    def describe(self) -> str:
        return f"keep {_count(self.snapshots, 'snapshot')} of {_where(self)}"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class HoldSnapshots(_Intent):
    """Holds keep other tools from destroying a snapshot that is being read."""

    kind: ClassVar[str] = "hold-snapshots"
    pool: str
    pool_guid: str
    snapshots: tuple[str, ...]
    tag: str
    volume_kind: str = ZFS

    def describe(self) -> str:
        return f"hold {_count(self.snapshots, 'snapshot')} of {_where(self)}"

    def compensation(self) -> ReleaseSnapshots:
        return ReleaseSnapshots(
            self.pool, self.pool_guid, self.snapshots, self.tag, self.volume_kind
        )


@dataclass(frozen=True)
class ReleaseSnapshots(_Intent):
    kind: ClassVar[str] = "release-snapshots"
    pool: str
    pool_guid: str
    snapshots: tuple[str, ...]
    tag: str
    volume_kind: str = ZFS

    def describe(self) -> str:
        return f"release {_count(self.snapshots, 'hold')} of {_where(self)}"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class Mount:
    """
    One snapshot, read-only, at *mountpoint*; *guid* is its own, of btrfs and LVM.

    Of a plain directory *source* is the live path, and *guid* the device and the directory in it.
    """

    source: str
    mountpoint: str
    volume_kind: str = ZFS
    guid: str = ""
    fstype: str = ""  # of LVM


@dataclass(frozen=True)
class MountVolumes(_Intent):
    """
    Every mount of the set, parents first.

    *root* is empty for the run's own namespace, where each mountpoint is the live one; else the
    directory of the host's namespace under which the tree is assembled.  *directories* are those
    that are made for it, parents first.
    """

    kind: ClassVar[str] = "mount-volumes"
    root: str
    mounts: tuple[Mount, ...]
    directories: tuple[str, ...] = ()
    stay: bool = False  # the directories, after the run

    def describe(self) -> str:
        where = (
            f"under {self.root}" if self.root else "at the live paths, in a namespace of its own"
        )
        return f"mount {_mounted(self.mounts)} read-only {where}"

    def compensation(self) -> UnmountVolumes:
        return UnmountVolumes(self.root, self.mounts, self.to_remove)

    @property
    def to_remove(self) -> tuple[str, ...]:
        """The directories that were made for the run alone."""
        return () if self.stay else self.directories


@dataclass(frozen=True)
class UnmountVolumes(_Intent):
    """Children first; in a namespace the end of its last process does it."""

    kind: ClassVar[str] = "unmount-volumes"
    root: str
    mounts: tuple[Mount, ...]
    directories: tuple[str, ...] = ()

    def describe(self) -> str:
        where = f"under {self.root}" if self.root else "with the namespace"
        return f"unmount {_mounted(self.mounts)} {where}"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class RunClient(_Intent):
    """The client's commands, in order, on the mounted set.  Arguments hold no secret."""

    kind: ClassVar[str] = "run-client"
    client: str
    commands: tuple[tuple[str, ...], ...]
    cwd: str

    def describe(self) -> str:
        return "run " + " && ".join(map(_shown, self.commands))

    def compensation(self) -> EndClient:
        return EndClient(self.client)


@dataclass(frozen=True)
class EndClient(_Intent):
    """End every process that the client left behind."""

    kind: ClassVar[str] = "end-client"
    client: str

    def describe(self) -> str:
        return f"end {self.client} and all that it started"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class PruneSnapshots(_Intent):
    """
    Kept snapshots of one pool that no rule keeps; nothing brings them back.

    Each is destroyed only if it still has the guid and createtxg at its place here, and the mark
    of the run that kept it, which is empty for one that the user named.  One that is *transient*
    must have that mark of the same run as well.  On btrfs the mark is the path, on LVM a tag, and
    no bookmark can be left.
    """

    kind: ClassVar[str] = "prune-snapshots"
    pool: str
    pool_guid: str
    snapshots: tuple[str, ...]
    guids: tuple[str, ...]
    createtxgs: tuple[str, ...]
    keepers: tuple[str, ...]
    bookmark: bool = True  # leave a bookmark of each, as a base for a later `zfs send -i`
    copies: bool = False  # the mark may have come with it, by `zfs receive`
    volume_kind: str = ZFS
    transient: bool = False

    def describe(self) -> str:
        leaving = " and leave a bookmark of each" if self.bookmark else ""
        noun = "transient snapshot" if self.transient else "kept snapshot"
        return f"destroy {_count(self.snapshots, noun)} of {_where(self)}{leaving}"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class CopySnapshots(_Intent):
    """
    Bring the copies of some datasets up to one snapshot of each; what has arrived stays there.

    In between go the kept snapshots whose names are of *pattern*.  Holds under *tag* keep those
    that are being sent and, here and there, the last one that both ends have: the next clone
    begins with that.
    """

    kind: ClassVar[str] = "copy-snapshots"
    target: str
    pool_guid: str  # of the target's pool; empty where it could not be asked: nothing is sent
    datasets: tuple[str, ...]  # parents before children, as are the three below
    copies: tuple[str, ...]
    snapshots: tuple[str, ...]  # the last of each
    guids: tuple[str, ...]
    pattern: str
    tag: str
    rate: int = 0  # bytes a second; 0: no limit
    compress: bool = True  # on the way to another machine
    discard: bool = False  # what was changed in a copy since its newest snapshot
    transient: bool = False  # send also what is meant to go again here

    def describe(self) -> str:
        first, *others = self.datasets
        more = f" and {_count(tuple(others), 'more dataset')}" if others else ""
        return f"send the kept snapshots of {first}{more} to {self.target}"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class RunStep(_Intent):
    """
    One step of a run of steps: the words of a command of ours, without "atomtx".

    What it does to the machine is journaled by the runs that it makes; they name this run as
    their parent.
    """

    kind: ClassVar[str] = "run-step"
    n: int  # from 1
    words: tuple[str, ...]

    def describe(self) -> str:
        return f"step {self.n}: atomtx {_shown(self.words)}"

    def compensation(self) -> None:
        return None


AROUND_RUN = "run"
AROUND_SNAPSHOT = "snapshot"
AFTER_SUCCESS = "after-success"
AFTER_FAILURE = "after-failure"
FINALLY = "finally"
BEFORE = (AROUND_RUN, AROUND_SNAPSHOT)
AFTER = (AFTER_SUCCESS, AFTER_FAILURE, FINALLY)


@dataclass(frozen=True)
class RunHook(_Intent):
    """
    A command of the user's own at one place of a run, with the one that undoes it, if any.

    *when* is one of BEFORE or AFTER; an undo belongs to those before.
    """

    kind: ClassVar[str] = "run-hook"
    when: str
    command: tuple[str, ...]
    undo: tuple[str, ...] = ()
    limit_s: int = 0  # 0: none

    def describe(self) -> str:
        return f"hook {_WHERE[self.when]}: {_shown(self.command)}"

    def compensation(self) -> UndoHook | None:
        return UndoHook(self.when, self.undo, self.limit_s) if self.undo else None


@dataclass(frozen=True)
class UndoHook(_Intent):
    """Runs once its hook may have run, whatever became of it."""

    kind: ClassVar[str] = "undo-hook"
    when: str
    command: tuple[str, ...]
    limit_s: int = 0

    def describe(self) -> str:
        return f"hook {_WHERE_UNDONE[self.when]}: {_shown(self.command)}"

    def compensation(self) -> None:
        return None


@dataclass(frozen=True)
class ApplyRetention(_Intent):
    """
    Have the client forget backups of exactly these paths by its rules; nothing brings them back.
    """

    kind: ClassVar[str] = "apply-retention"
    client: str
    paths: tuple[str, ...]  # as the repository has them
    policy: tuple[str, ...]

    def describe(self) -> str:
        paths = ", ".join(self.paths)
        return f"{self.client} forgets older backups of {paths} by {' '.join(self.policy)}"

    def compensation(self) -> None:
        return None


_WHERE = {
    AROUND_RUN: "before the run",
    AROUND_SNAPSHOT: "before the snapshots",
    AFTER_SUCCESS: "after success",
    AFTER_FAILURE: "after failure",
    FINALLY: "at the end",
}
_WHERE_UNDONE = {AROUND_RUN: "after the run", AROUND_SNAPSHOT: "after the snapshots"}


def _shown(argv: tuple[str, ...]) -> str:
    import shlex

    return shlex.join(argv)


Intent = (
    TakeSnapshots
    | DestroySnapshots
    | KeepSnapshots
    | HoldSnapshots
    | ReleaseSnapshots
    | MountVolumes
    | UnmountVolumes
    | RunClient
    | EndClient
    | RunHook
    | UndoHook
    | ApplyRetention
    | PruneSnapshots
    | CopySnapshots
    | RunStep
)
Beside = RunHook | UndoHook | ApplyRetention  # not of the backup itself
KINDS: Mapping[str, type[Intent]] = {
    cls.kind: cls
    for cls in (
        TakeSnapshots,
        DestroySnapshots,
        KeepSnapshots,
        HoldSnapshots,
        ReleaseSnapshots,
        MountVolumes,
        UnmountVolumes,
        RunClient,
        EndClient,
        RunHook,
        UndoHook,
        ApplyRetention,
        PruneSnapshots,
        CopySnapshots,
        RunStep,
    )
}


def from_json(kind: str, payload: str) -> Intent:
    """Read an intent back from the journal; a KeyError for a kind that this release lacks."""
    cls = KINDS[kind]
    data: dict[str, Any] = json.loads(payload)
    known = {f.name: data[f.name] for f in fields(cls) if f.name in data or f.default is MISSING}
    return cls(**{name: _frozen(name, value) for name, value in known.items()})


def _frozen(name: str, value: Any) -> Any:
    if name == "mounts":
        return tuple(Mount(**mount) for mount in value)
    if name == "sources":
        return tuple(Source(**source) for source in value)
    if name == "origins":
        return tuple(Origin(**origin) for origin in value)
    if isinstance(value, list):
        return tuple(_frozen("", item) for item in value)
    return value


def _where(step: Any) -> str:
    places = {ZFS: "pool", LVM: "the volume group"}
    return f"{places.get(step.volume_kind, f'the {step.volume_kind} file system')} {step.pool}"


def _mounted(mounts: tuple[Mount, ...]) -> str:
    live = tuple(each for each in mounts if each.volume_kind == PLAIN)
    frozen = len(mounts) - len(live)
    words = [_count(mounts[:frozen], "snapshot")] if frozen or not live else []
    if live:
        many = "directories" if len(live) > 1 else "directory"
        words.append(f"{len(live)} live {many} (not a moment)")
    return " and ".join(words)


def _count(things: tuple[Any, ...], noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")

"""
Objects on the machine that carry our marks and are in no journal: find them, adopt them.

A journal may be lost, and its snapshots are still there.  They are listed with what proves them
ours; only one that the user names is taken into this journal, and only then can it be destroyed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from . import convention
from .convention import Pattern
from .errors import EffectError, UserError
from .intents import Intent, Mount, MountVolumes
from .mounts import mountinfo
from .names import (
    BTRFS,
    KEPT_MARK,
    LVM,
    ZFS,
    BtrfsSnapshot,
    LvmSnapshot,
    RunId,
    Snapshot,
    mounted_as,
)
from .plan import ClientPlan, Plan, PlannedVolume, Pool, intents, without_client
from .states import Verb
from .volumes.kind import Identity
from .volumes.zfs import Zfs

# Whichever the run had: it is not known, and is not asked any more.
_CLIENT = ClientPlan("command", (), (), "/", "", None, (), ())


@dataclass(frozen=True)
class Stray:
    """What one unknown run left on this machine."""

    run: str
    snapshots: tuple[Identity, ...]
    mounts: tuple[str, ...]
    others: tuple[PlannedVolume, ...] = ()  # of btrfs and LVM, as a plan would have them
    kept: int = 0  # how many of its moment are kept, and are none of these
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes, by name; of ZFS alone
    unlike: tuple[str, ...] = ()  # what bears its mark under a name of no pattern, and is left

    @property
    def created_s(self) -> int:
        return min(s.creation_s for s in self.snapshots)

    @property
    def is_of_snap(self) -> bool:
        """Tell whether they were taken to stay, by a run that had not kept them yet."""
        kinds = {volume.snapshot: volume.kind for volume in self.others}
        return any(self._is_named(s.name, kinds.get(s.name, ZFS)) for s in self.snapshots)

    def _is_named(self, snapshot: str, kind: str) -> bool:
        """Tell whether a snapshot's name is for people, not the run's token."""
        if kind == BTRFS:
            return BtrfsSnapshot.parse(snapshot).is_named
        if kind == LVM:
            return LvmSnapshot.parse(snapshot).run is None
        return not _is_token(snapshot, self.run)


def scan(
    zfs: Zfs | None,
    known: Iterable[str],
    others: Iterable[tuple[PlannedVolume, Identity]] = (),
    *,
    patterns: Collection[Pattern] = (),
    keepers: Iterable[str] = (),
) -> list[Stray]:
    """
    Return what carries our marks, mark and name agreeing, of runs that are not *known*.

    A name agrees that is the run's, or one of *patterns*, by which an interrupted `snap` has named
    it.  What is kept, or is about to be, is none.  *zfs* is None on a machine that has none;
    *others* is what `btrfs.marked` and `lvm.marked` found, *keepers* what their `keepers` did.
    """
    known = frozenset(known)
    pools = _pools(zfs)
    marked = zfs.marked(pools) if zfs else []
    kept = dict(zfs.marked(pools, mark=KEPT_MARK)) if zfs and marked else {}
    count = Counter((*kept.values(), *keepers))
    names: dict[str, list[str]] = {}
    unlike: dict[str, list[str]] = {}
    for name, run in marked:
        if run not in known and name not in kept:
            named = names if _agree(name, run, patterns) else unlike
            named.setdefault(run, []).append(name)
    of_zfs = [n for group in names.values() for n in group]
    found = zfs.identities(of_zfs) if zfs else {}
    sizes = zfs.sizes(of_zfs) if zfs else {}
    volumes: dict[str, list[PlannedVolume]] = {}
    for volume, identity in others:
        if identity.mark and identity.mark not in known:
            volumes.setdefault(identity.mark, []).append(volume)
            names.setdefault(identity.mark, []).append(identity.name)
            found[identity.name] = identity
    table = mountinfo.read()
    strays = [
        replace(
            _stray(run, group, found, table, volumes.get(run, ())),
            kept=count[run],
            sizes={name: sizes[name] for name in group if name in sizes},
            unlike=tuple(unlike.get(run, ())),
        )
        for run, group in sorted(names.items())
    ]
    return [stray for stray in strays if stray.snapshots]  # not what was destroyed meanwhile


def _pools(zfs: Zfs | None) -> list[str]:
    pools = zfs.pools() if zfs else []
    return [pool.name for pool in pools if pool.health != "SUSPENDED"]


def _agree(name: str, run: str, patterns: Collection[Pattern]) -> bool:
    """Tell whether a snapshot's name is one that the run of its mark gives."""
    if _is_token(name, run):
        return True
    return RunId.is_one(run) and any(convention.is_of(pattern, name) for pattern in patterns)


def _is_token(name: str, run: str) -> bool:
    return RunId.from_token(Snapshot.parse(name).name) == run


def _stray(
    run: str,
    names: list[str],
    found: dict[str, Identity],
    table: mountinfo.Table,
    volumes: Iterable[PlannedVolume],
) -> Stray:
    snapshots = tuple(found[name] for name in names if name in found)
    things = frozenset(map(mounted_as, names))
    mounts = tuple(e.mountpoint for e in table if e.thing in things)
    return Stray(run, snapshots, mounts, tuple(volumes))


def pick(strays: Iterable[Stray], prefix: str) -> Stray:
    """Return the stray whose run id begins with *prefix*; a UserError unless exactly one does."""
    matching = [stray for stray in strays if stray.run.startswith(prefix)]
    if len(matching) != 1:
        many = "more than one unknown run" if matching else "no unknown run"
        raise UserError(f"{many} begins with {prefix!r}", hint="`atomtx recover --scan` lists them")
    return matching[0]


def plan_of(stray: Stray, pools: Iterable[Pool]) -> Plan:
    """
    Return the plan under which a stray run is journaled, only to be undone.

    Raises EffectError where one of its pools is not there any more.
    """
    guids = {pool.name: pool.guid for pool in pools}
    others = {volume.snapshot for volume in stray.others}
    names = [Snapshot.parse(s.name) for s in stray.snapshots if s.name not in others]
    for name in names:
        if name.dataset.pool not in guids:
            raise EffectError(f"the pool {name.dataset.pool} is not there any more")
    volumes = (
        *(
            PlannedVolume(
                ZFS, n.dataset.pool, guids[n.dataset.pool], str(n.dataset), "", "", str(n)
            )
            for n in names
        ),
        *stray.others,
    )
    made = without_client(
        run=stray.run,
        job=f"adopted-{stray.run}",
        label=", ".join(v.name for v in volumes[:2]) + (" and more" if volumes[2:] else ""),
        volumes=volumes,
        verb=Verb.BACKUP,
    )
    return replace(made, client=_CLIENT)


def intents_of(stray: Stray, the_plan: Plan) -> tuple[Intent, ...]:
    """Return what the lost journal must have held: the snapshots, their holds, their mounts."""
    mounts = tuple(m for s in stray.snapshots for m in _mounts_of(s))
    effects = [step for step in intents(the_plan) if not isinstance(step, MountVolumes)]
    return (*effects, *([MountVolumes("/", mounts)] if mounts else ()))


def _mounts_of(snapshot: Identity) -> Iterator[Mount]:
    for entry in mountinfo.read():
        if entry.thing == mounted_as(snapshot.name):
            yield Mount(snapshot.name, entry.mountpoint)

"""
Objects on the machine that carry our marks and are in no journal: find them, adopt them.

A journal may be lost, and its snapshots are still there.  They are listed with what proves them
ours; only one that the user names is taken into this journal, and only then can it be destroyed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import UserError
from .intents import Intent, Mount, MountVolumes
from .mounts import mountinfo
from .names import RunId, Snapshot, mounted_as
from .plan import ClientPlan, Plan, PlannedVolume, Pool, intents
from .volumes.kind import Identity
from .volumes.zfs import Zfs


@dataclass(frozen=True)
class Stray:
    """What one unknown run left on this machine."""

    run: str
    snapshots: tuple[Identity, ...]
    mounts: tuple[str, ...]
    subvolumes: tuple[PlannedVolume, ...] = ()  # those of btrfs, as a plan would have them

    @property
    def created_s(self) -> int:
        return min(s.creation_s for s in self.snapshots)


def scan(
    zfs: Zfs | None, known: Iterable[str], on_btrfs: Iterable[tuple[PlannedVolume, Identity]] = ()
) -> list[Stray]:
    """
    Return what carries our marks, mark and name agreeing, of runs that are not *known*.

    *zfs* is None on a machine that has none; *on_btrfs* is what `btrfs.marked` found.
    """
    known = frozenset(known)
    names: dict[str, list[str]] = {}
    for name, run in _marked(zfs):
        if run not in known and RunId.from_token(Snapshot.parse(name).name) == run:
            names.setdefault(run, []).append(name)
    found = zfs.identities([n for group in names.values() for n in group]) if zfs else {}
    volumes: dict[str, list[PlannedVolume]] = {}
    for volume, identity in on_btrfs:
        if identity.mark and identity.mark not in known:
            volumes.setdefault(identity.mark, []).append(volume)
            names.setdefault(identity.mark, []).append(identity.name)
            found[identity.name] = identity
    table = mountinfo.read()
    strays = [
        _stray(run, group, found, table, volumes.get(run, ()))
        for run, group in sorted(names.items())
    ]
    return [stray for stray in strays if stray.snapshots]  # not what was destroyed meanwhile


def _marked(zfs: Zfs | None) -> list[tuple[str, str]]:
    if zfs is None:
        return []
    return zfs.marked([pool.name for pool in zfs.pools() if pool.health != "SUSPENDED"])


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
    """Return the plan under which a stray run is journaled, only to be undone."""
    guids = {pool.name: pool.guid for pool in pools}
    others = {volume.snapshot for volume in stray.subvolumes}
    names = [Snapshot.parse(s.name) for s in stray.snapshots if s.name not in others]
    volumes = (
        *(
            PlannedVolume(
                "zfs", n.dataset.pool, guids[n.dataset.pool], str(n.dataset), "", "", str(n)
            )
            for n in names
        ),
        *stray.subvolumes,
    )
    client = ClientPlan("command", (), (), "/", "", None, (), ())
    label = ", ".join(v.name for v in volumes[:2]) + (" and more" if volumes[2:] else "")
    return Plan(
        run=stray.run,
        job=f"adopted-{stray.run}",
        label=label,
        volumes=volumes,
        targets=(),
        layout="namespace",
        root="",
        live_paths=(),
        excludes=(),
        notes=(),
        client=client,
    )


def intents_of(stray: Stray, the_plan: Plan) -> tuple[Intent, ...]:
    """Return what the lost journal must have held: the snapshots, their holds, their mounts."""
    mounts = tuple(m for s in stray.snapshots for m in _mounts_of(s))
    effects = [step for step in intents(the_plan) if not isinstance(step, MountVolumes)]
    return (*effects, *([MountVolumes("/", mounts)] if mounts else ()))


def _mounts_of(snapshot: Identity) -> Iterator[Mount]:
    for entry in mountinfo.read():
        if entry.thing == mounted_as(snapshot.name):
            yield Mount(snapshot.name, entry.mountpoint)

"""ZFS datasets as a kind of volume: what the engine asks, by the commands of `zfs.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from ..errors import EffectError
from ..intents import PruneSnapshots, TakeSnapshots
from ..plan import PlannedVolume, Pool
from ..records import Volume
from .kind import Identity
from .zfs import Zfs


class Datasets:
    """ZFS datasets; a pool's snapshots are taken in one transaction group."""

    def __init__(self, zfs: Zfs) -> None:
        self._zfs = zfs

    def mend(self, volumes: Collection[PlannedVolume]) -> None:
        """Do nothing: a `zfs` that was killed has done all or nothing."""

    def trouble(self, volumes: Collection[PlannedVolume | Volume]) -> str | None:
        """Tell why a pool cannot be asked, as where the module is not loaded."""
        try:
            return pool_trouble(volumes, self._zfs.pools())
        except EffectError as exc:
            return exc.message

    def identities(self, volumes: Sequence[PlannedVolume]) -> dict[str, Identity]:
        """Return what each volume's snapshot is; one that is absent is absent from the answer."""
        return self._zfs.identities([v.snapshot for v in volumes])

    def renamed(self, run: str, lost: Sequence[Volume]) -> dict[str, Identity]:
        """
        Find snapshots whose dataset was renamed meanwhile, by guid, createtxg and their own mark.

        One that stays, by the first two.  The whole pool is searched, which is slow: only where a
        name is not found.  Raises EffectError where a pool cannot be asked.
        """
        wanted = {(v.guid, v.createtxg): v.snapshot for v in lost if v.guid}
        if not wanted:
            return {}
        if trouble := self.trouble(lost):
            raise EffectError(trouble)
        found = self._marked(run, lost)
        if stay := {v.pool for v in lost if v.stays}:
            found += self._zfs.snapshots(stay)
        keys = ((identity.guid, identity.createtxg) for identity in found)
        return {wanted[key]: each for key, each in zip(keys, found, strict=True) if key in wanted}

    def _marked(self, run: str, lost: Sequence[Volume]) -> list[Identity]:
        """Return the snapshots with the run's own mark."""
        marked = self._zfs.marked({v.pool for v in lost if not v.stays})
        names = [name for name, mark in marked if mark == run]
        return list(self._zfs.identities(names).values())

    def unreadable(self, volumes: Sequence[PlannedVolume]) -> str | None:
        """Tell whose key is not loaded."""
        locked = self._zfs.locked([v.name for v in volumes])
        return (
            f"the key of {locked[0]} is not loaded: `zfs load-key {locked[0]}`" if locked else None
        )

    def take(self, intent: TakeSnapshots) -> EffectError | None:
        """Take a pool's snapshots in one transaction group: all or none."""
        return self._zfs.take(intent.snapshots, run=intent.run, transient=intent.transient)

    def ready(self, volumes: Sequence[PlannedVolume]) -> None:
        """Do nothing: a snapshot is mounted as it is."""

    def hold(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Hold snapshots under *tag*; idempotent."""
        self._zfs.hold(snapshots, tag=tag)

    def release(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Release the holds under *tag*; one that is gone is success."""
        self._zfs.release(snapshots, tag=tag)

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """Destroy the snapshots that are still these, in one transaction group."""
        return self._zfs.destroy(identities, run=run)

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """Change the mark of the snapshots that are still these from run to kept."""
        return self._zfs.keep(identities, run=run)

    def sweep(self, volumes: Sequence[PlannedVolume], *, run: str) -> None:
        """Do nothing: a transaction group that destroyed was synced before the command ended."""

    def links(self, snapshots: Collection[str]) -> Iterator[str]:
        """Name holds and clones; where they cannot be read, say why: it is busy all the same."""
        try:
            for name, tags in self._zfs.holders(snapshots).items():
                yield from (f"hold {tag} on {name}" for tag in tags)
            for clones in self._zfs.clones(snapshots).values():
                yield from (f"cloned as {clone}" for clone in clones)
        except EffectError as exc:
            yield exc.message


def pool_trouble(
    volumes: Iterable[PlannedVolume | Volume | PruneSnapshots], pools: Iterable[Pool]
) -> str | None:
    """Tell why a pool of *volumes* cannot be asked; "not found" there would not mean "gone"."""
    by_name = {pool.name: pool for pool in pools}
    names = {pool.guid: pool.name for pool in by_name.values()}
    for name, guid in {(v.pool, v.pool_guid) for v in volumes}:
        pool = by_name.get(name)
        if guid in names and names[guid] != name:
            return f"pool {name} is imported under the name {names[guid]}"
        if pool is None:
            return f"pool {name} is not imported"
        if pool.guid != guid:
            return f"the pool {name} that is imported is another one"
        if pool.health == "SUSPENDED":
            return f"pool {name} is suspended: `zpool clear {name}`"
    return None

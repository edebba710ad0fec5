"""Every kind of volume: which one a volume is of, and questions to the volumes of a mixed set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from ..lvmio import Lvm
from ..names import BTRFS, LVM, PLAIN, ZFS
from ..plan import PlannedVolume
from ..records import Volume
from .btrfs import Subvolumes
from .datasets import Datasets
from .kind import Identity, Kind
from .lvm import LogicalVolumes
from .plain import Directories
from .zfs import Zfs

_Any = TypeVar("_Any", PlannedVolume, Volume)


class Kinds:
    """The kinds of volumes by name, as the journal writes it."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds

    @classmethod
    def real(cls, lock: int | None = None) -> Kinds:
        """Return those of this machine; *lock* is the descriptor of F for the commands."""
        return cls(
            {
                ZFS: Datasets(Zfs(lock)),
                BTRFS: Subvolumes(),
                LVM: LogicalVolumes(Lvm(lock)),
                PLAIN: Directories(),
            }
        )

    def of(self, kind: str) -> Kind:
        return self._kinds[kind]

    def _parted(self, volumes: Iterable[_Any]) -> Iterator[tuple[Kind, list[_Any]]]:
        parts: dict[str, list[_Any]] = {}
        for volume in volumes:
            parts.setdefault(volume.kind, []).append(volume)
        for kind, part in parts.items():
            yield self.of(kind), part

    def mend(self, volumes: Iterable[PlannedVolume]) -> None:
        """Undo what a command that was killed left; the caller holds lock F."""
        for kind, part in self._parted(volumes):
            kind.mend(part)

    def ready(self, volumes: Iterable[PlannedVolume]) -> None:
        """Make the snapshots ready to be mounted."""
        for kind, part in self._parted(volumes):
            kind.ready(part)

    def trouble(self, volumes: Iterable[PlannedVolume]) -> str | None:
        """Tell why a pool of *volumes* cannot be asked; None where all can."""
        return next(filter(None, (k.trouble(part) for k, part in self._parted(volumes))), None)

    def unreadable(self, volumes: Iterable[PlannedVolume]) -> str | None:
        """Tell why the files of a snapshot cannot be read now; None where all can."""
        return next(filter(None, (k.unreadable(part) for k, part in self._parted(volumes))), None)

    def identities(self, volumes: Iterable[PlannedVolume]) -> dict[str, Identity]:
        """Return what each volume's snapshot is, by name; one that is absent is absent."""
        found: dict[str, Identity] = {}
        for kind, part in self._parted(volumes):
            found |= kind.identities(part)
        return found

    def sweep(self, volumes: Iterable[PlannedVolume], *, run: str) -> None:
        """Remove what else the run made for its snapshots; then all of its cleanup is durable."""
        for kind, part in self._parted(volumes):
            kind.sweep(part, run=run)

    def renamed(self, run: str, lost: Iterable[Volume]) -> dict[str, Identity]:
        """Return those of the *lost* snapshots that have another name now, by their old one."""
        found: dict[str, Identity] = {}
        for kind, part in self._parted(lost):
            found |= kind.renamed(run, part)
        return found

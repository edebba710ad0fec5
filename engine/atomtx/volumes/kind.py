"""
What the engine asks of a kind of volume, whatever it is.

Each effect is idempotent, and none is believed for its exit status: whoever calls it probes what
is there.  A new kind is a module beside this one and a line in `kinds.py`; how its snapshots are
mounted is said in `mounts/namespace.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import EffectError
from ..intents import TakeSnapshots
from ..names import BTRFS, LVM, ZFS
from ..plan import PlannedVolume
from ..records import Volume


@dataclass(frozen=True)
class Identity:
    """What a snapshot is, as the machine tells it."""

    name: str  # the whole name
    guid: str
    createtxg: str  # the transaction in which it was made
    creation_s: int
    mark: str | None  # the run whose mark it bears itself, never inherited
    flaw: str | None = None  # why it is ours and does not hold the moment; only LVM has such


@dataclass(frozen=True)
class Kept:
    """A snapshot that may stay: *keeper* is the run whose kept mark it bears itself, or empty."""

    name: str
    guid: str
    createtxg: str
    creation_s: int
    keeper: str
    holds: int
    clones: tuple[str, ...]
    is_copy: bool = False  # the mark came with it, by `zfs receive`, or says so
    is_transient: bool = False  # and it bears the transient mark of that run itself
    subvolume: str = ""  # of btrfs: where that is seen of which it is
    origin: str = ""  # of LVM: that volume

    @property
    def kind(self) -> str:
        """The kind of volume of which it is."""
        if self.origin:
            return LVM
        return BTRFS if self.subvolume else ZFS

    @property
    def volume(self) -> str:
        """The dataset, subvolume or logical volume of which it is."""
        return self.subvolume or self.origin or self.name.partition("@")[0]


class Kind(Protocol):
    """A kind of volume.  Volumes and snapshots that are given are all of this kind."""

    def mend(self, volumes: Collection[PlannedVolume]) -> None:
        """
        Undo what a command that was killed left, and what would keep us from looking; idempotent.

        To be called by who holds lock F alone.
        """

    def trouble(self, volumes: Collection[PlannedVolume]) -> str | None:
        """Tell why the pools of *volumes* cannot be asked: "not found" would not mean "gone"."""

    def identities(self, volumes: Sequence[PlannedVolume]) -> dict[str, Identity]:
        """Return what each volume's snapshot is, by name; one that is absent is absent."""

    def renamed(self, run: str, lost: Sequence[Volume]) -> dict[str, Identity]:
        """Return those of the *lost* snapshots that have another name now, by their old one."""

    def unreadable(self, volumes: Sequence[PlannedVolume]) -> str | None:
        """Tell why the files of a snapshot cannot be read now, and what mends it."""

    def take(self, intent: TakeSnapshots) -> EffectError | None:
        """
        Take what *intent* names, each with the run's mark.

        Returns what went wrong, if anything, where a probe tells what is there and whole; raises
        EffectError where none does.
        """

    def ready(self, volumes: Sequence[PlannedVolume]) -> None:
        """Make the snapshots ready to be mounted; their destruction undoes it.  Idempotent."""

    def hold(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Keep others from destroying the snapshots; idempotent."""

    def release(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Undo `hold`; idempotent."""

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Destroy the snapshots of one pool that are still these.

        Returns a verdict a name: "done", "absent", "foreign" (another thing has the name),
        "unmarked", or "busy".
        """

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """Make the snapshots that are still these the user's; verdicts as of `destroy`."""

    def sweep(self, volumes: Sequence[PlannedVolume], *, run: str) -> None:
        """
        Remove what else the run made for its snapshots; then all of its cleanup is durable.

        Idempotent.  Raises EffectError where a pool cannot be asked.
        """

    def links(self, snapshots: Collection[str]) -> Iterator[str]:
        """Say in words what but a process or a mount keeps snapshots from being destroyed."""

"""
Datasets, pools and mounts as they are, and where each dataset can be read.  Pure.

The table of mounts tells where a dataset is, not its `mountpoint` property: there are legacy and
temporary mounts, and mounts that hide one another.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import UserError
from .mounts.mountinfo import Entry, Table
from .plan import DatasetFacts, Pool, shown


@dataclass(frozen=True)
class Unfit:
    """Why a dataset cannot be backed up; a container only holds other datasets together."""

    reason: str
    remedy: str
    is_container: bool = False


class Inventory:
    """All of a machine that a plan is made from, indexed."""

    def __init__(
        self, datasets: Iterable[DatasetFacts], pools: Iterable[Pool], mounts: Table
    ) -> None:
        self.facts = {facts.name: facts for facts in datasets}
        self.pools = {pool.name: pool for pool in pools}
        self.mounts = mounts
        self._parents = {name.rpartition("/")[0] for name in self.facts}
        self._places: dict[str, list[Entry]] = {}
        for entry in filter(is_whole_dataset, mounts):
            self._places.setdefault(entry.source, []).append(entry)

    def visible(self, name: str) -> list[str]:
        """Return the mountpoints at which a dataset is seen, in the order of mounting."""
        places = self._places.get(name, ())
        seen = [e.mountpoint for e in places if self.mounts.topmost(e.mountpoint) is e]
        return list(dict.fromkeys(seen))

    def judge(self, facts: DatasetFacts, *, wish: str = "") -> str | Unfit:
        """Return the mountpoint to use: the *wish*, the property's, the first; or why none."""
        visible = self.visible(facts.name)
        if facts.type != "filesystem" or not visible:
            return self._unfit(facts)
        best = [path for path in (wish, facts.mountpoint) if path in visible]
        mountpoint = (best + visible)[0]
        if why := unfit_name(mountpoint):
            return Unfit(
                f"the name of its mountpoint {shown(mountpoint)} {why}",
                command("zfs", "set", "mountpoint=/PATH", facts.name),
            )
        return mountpoint

    def _unfit(self, facts: DatasetFacts) -> Unfit:
        name = facts.name
        if facts.type != "filesystem":
            return Unfit(
                "it is a volume (zvol), which has no files of its own",
                "back up what is in it where it is used, or use `zfs send`",
            )
        if name in self._places:
            return self._hidden(self._places[name][0])
        if facts.mounted:
            return Unfit(
                "ZFS says that it is mounted, but it is not in this mount namespace",
                "run atomtx where it is mounted, outside of the container or service",
            )
        if facts.canmount == "off" or facts.mountpoint == "none":
            return self._never_mounted(facts)
        return _unmounted(facts)

    def _hidden(self, place: Entry) -> Unfit:
        above = self.mounts.containing(place.mountpoint)
        cover = f" {above.source} at {shown(above.mountpoint)}" if above else " another mount"
        return Unfit(
            f"it is mounted at {shown(place.mountpoint)}, but hidden beneath{cover}",
            "unmount what hides it, or mount it elsewhere",
        )

    def _never_mounted(self, facts: DatasetFacts) -> Unfit:
        is_container = facts.name in self._parents
        off = facts.canmount == "off"
        mend = "canmount=on" if off else "mountpoint=/PATH"
        return Unfit(
            f"it is never mounted ({'canmount=off' if off else 'mountpoint=none'})",
            "use -r for the datasets below it"
            if is_container
            else command("zfs", "set", mend, facts.name),
            is_container,
        )


def _unmounted(facts: DatasetFacts) -> Unfit:
    if facts.keystatus == "unavailable":
        return Unfit("its key is not loaded", command("zfs", "mount", "-l", facts.name))
    if facts.mountpoint == "legacy":
        return Unfit(
            "it is not mounted (mountpoint=legacy)",
            command("mount", "-t", "zfs", facts.name, "/PATH"),
        )
    why = " (canmount=noauto)" if facts.canmount == "noauto" else ""
    return Unfit(f"it is not mounted{why}", command("zfs", "mount", facts.name))


def is_whole_dataset(entry: Entry) -> bool:
    return entry.fstype == "zfs" and entry.root == "/" and "@" not in entry.source


def is_utf8(path: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in path)


def unfit_name(path: str) -> str:
    """Tell why what is read may not have this path, as words after it; empty where it may."""
    if not is_utf8(path):  # neither the journal nor the clients' JSON could hold it
        return "is not UTF-8"
    # The journal has the paths of a backup in lines, and so have ATOMTX_PATHS and notices.
    return "has a newline in it" if "\n" in path else ""


def command(*words: str) -> str:
    """Quote a command in a message, to be pasted."""
    return f"`{shlex.join(words)}`"


def named_elsewhere(text: str, other: str) -> UserError:
    """Return the refusal of a second name that leads to the same volume by another mount."""
    return UserError(
        f"{shown(text)} is on the same volume as {shown(other)}, by another mount of it",
        hint="name both through the same mount, or leave out one",
    )


def ancestors(name: str) -> Iterator[str]:
    """Yield what is above a dataset or a path, nearest first; "/" is the last of a path."""
    while "/" in name and name != "/":
        absolute = name.startswith("/")
        name = name.rpartition("/")[0] or ("/" if absolute else "")
        yield name

"""
Which logical volumes of LVM a request means.  Pure.

One is named as VG/LV, by its device, or by the path where it is mounted, or one inside it.  What
counts is what is mounted straight from it: a btrfs on a logical volume is taken as btrfs, and
what lies on LUKS or MD above one is none of LVM's.

A snapshot that stays is taken of a thin volume alone, which need not be mounted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from .errors import UserError
from .intents import Origin
from .inventory import ancestors, command, named_elsewhere, unfit_name
from .lvmio import Volume
from .mounts.mountinfo import Entry, Table
from .plan import COW_SIZE, Chosen, LogicalFacts, normal, path_order, shown
from .words import SHARE, bytes_of, size

OURS = ("atomtx.run=", "atomtx.kept=")  # begins the tags of the snapshots that we took
FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs")
# lvs(8), the first letter of lv_attr: what has no files of its own, or no files of now.
_NO_ORIGINS = {
    "s": "it is a snapshot",
    "S": "it is a snapshot that is being merged",
    "O": "a snapshot is being merged into it",
    "t": "it is a thin pool",
    "T": "it is the data of a thin pool",
    "e": "it is a part of a pool",
    "v": "it is virtual",
    "d": "it is a VDO pool",
    "p": "it is being moved (pvmove)",
}


@dataclass(frozen=True)
class Found:
    """What a request comes to on LVM."""

    named: tuple[str, ...]  # VG/LV, or the path of a part, in the user's order
    parts: tuple[str, ...]  # paths that were named inside a volume
    volumes: tuple[Chosen, ...]


class Logicals:
    """Logical volumes, by the names that users give to them."""

    def __init__(self, volumes: Iterable[Volume], mounts: Table, cow_size: str = COW_SIZE) -> None:
        self._mounts = mounts
        self._by_name = {volume.path: volume for volume in volumes}
        self._by_device = {v.device: v for v in self._by_name.values() if v.device}
        self._groups = {volume.group for volume in self._by_name.values()}
        self._cow_size = cow_size

    def means(self, text: str) -> bool:
        """Tell whether what the user typed is on LVM, or would be, and not on btrfs."""
        if text.startswith("/"):
            entry = self._mounts.containing(normal(text))
            return entry is not None and entry.dev in self._by_device
        if text in self._by_name:
            if any(e.fstype == "zfs" and e.source == text for e in self._mounts):
                raise UserError(
                    f"{text} is a logical volume and a dataset", hint="name it by its mountpoint"
                )
            return True
        group, slash, name = text.partition("/")
        pools = {e.source.partition("/")[0] for e in self._mounts if e.fstype == "zfs"}
        return bool(slash) and "/" not in name and group in self._groups - pools

    def has(self, text: str) -> bool:
        """Tell of what :meth:`means` is true of whether it is there, too."""
        return text.startswith("/") or text in self._by_name

    def select(self, texts: Sequence[str]) -> Found:
        """
        Return what *texts*, all of which are on LVM, come to.

        Raises UserError for one that cannot be backed up, and where a group has too little room.
        """
        named: list[str] = []
        parts: list[str] = []
        chosen: dict[str, tuple[Volume, Entry]] = {}
        first: dict[str, str] = {}
        for text in texts:
            volume, entry, part = self._resolve(text)
            word = part or volume.path
            if word in named:
                raise UserError(f"{shown(word)} is given twice", hint="name it once")
            other = first.setdefault(volume.path, text)
            if other != text and chosen[volume.path][1].mountpoint != entry.mountpoint:
                raise named_elsewhere(text, other)
            named.append(word)
            parts += [part] if part else []
            chosen[volume.path] = (volume, entry)
        _check_disjoint(named, parts, chosen)
        volumes = [self._chosen(volume, entry) for volume, entry in chosen.values()]
        _check_room([volume for volume, _ in chosen.values()], volumes)
        volumes.sort(key=lambda each: path_order(each.mountpoint))
        return Found(tuple(named), tuple(parts), tuple(volumes))

    def to_keep(self, texts: Sequence[str], exclude: Sequence[str] = ()) -> tuple[Chosen, ...]:
        """
        Return the volumes that are meant where snapshots stay, less those of *exclude*.

        All of the texts are on LVM.  Raises UserError for one that is not thin, and for what else
        no snapshot can be taken of, and for a path that leaves out what is no whole volume.
        """
        named: dict[str, Chosen] = {}
        for text in texts:
            volume, entry = self._whole(text)
            if volume.path in named:
                raise UserError(f"{volume.path} is given twice", hint="name it once")
            named[volume.path] = self._chosen(volume, entry)
        left_out = {self._left_out(text) for text in exclude}
        return tuple(each for path, each in named.items() if path not in left_out)

    def places(self, found: Found) -> dict[str, str]:
        """Return the names of those volumes that were named by the path of their mount."""
        return {v.mountpoint: v.facts.name for v in found.volumes if v.facts.name in found.named}

    def shows(self, entry: Entry, volumes: Collection[Chosen]) -> bool:
        """Tell whether a mount is where one of *volumes* is taken."""
        volume = self._by_device.get(entry.dev)
        chosen = {each.facts.name: each.mountpoint for each in volumes}
        return volume is not None and chosen.get(volume.path) == entry.mountpoint

    def offers(self, entry: Entry) -> str:
        """Return of which volume a snapshot can be taken in place of a mount; empty: of none."""
        volume = self._by_device.get(entry.dev)
        if volume is None or _unfit(volume, entry):
            return ""
        has_room = _cow_bytes(self._cow_size, volume) <= volume.group_free
        return f"the logical volume {volume.path}" if has_room else ""

    def _resolve(self, text: str) -> tuple[Volume, Entry, str]:
        """Return the volume that *text* means, its mount, and the path if it is a part of it."""
        if text.startswith("/"):
            path = normal(text)
            entry = self._mounts.containing(path)
            assert entry
            volume = self._by_device[entry.dev]
            part = "" if path == entry.mountpoint else path
        else:
            volume, part = self._volume(text), ""
            entry = self._entry(volume)
        if unfit := _unfit(volume, entry):
            why, hint = unfit
            raise UserError(f"{volume.path} cannot be backed up: {why}", hint=hint)
        if why := unfit_name(part):
            raise UserError(f"the name of {shown(part)} {why}", hint="rename it")
        return volume, entry, part

    def _whole(self, text: str) -> tuple[Volume, Entry | None]:
        """Return the volume that *text* means, not a part, and its mount, if there is one."""
        volume, path = self._meant(text), normal(text)
        is_path = text.startswith("/")
        entry = self._mounts.containing(path) if is_path else self._mount_of(volume)
        why = _no_origin(volume) or _no_thin(volume)
        if not why and entry:
            why = _unfit(volume, entry)
        if why:
            raise UserError(f"{volume.path} cannot be snapshotted: {why[0]}", hint=why[1])
        if is_path and entry and entry.mountpoint != path:
            raise UserError(
                f"{shown(text)} is a directory in the logical volume {volume.path}",
                hint=f"name the volume: {volume.path}",
            )
        return volume, entry

    def _left_out(self, text: str) -> str:
        """Return the volume that *text* is; to leave out one for a path in it would be a guess."""
        volume, path = self._meant(text), normal(text)
        entry = self._mounts.containing(path) if text.startswith("/") else None
        if entry and (entry.mountpoint, entry.root) != (path, "/"):
            raise UserError(
                f"{shown(text)} is not a logical volume: it is a directory or file in "
                f"{volume.path}",
                hint=f"to leave out the volume, name it: {volume.path}",
            )
        return volume.path

    def _meant(self, text: str) -> Volume:
        """Return the volume that *text* is, or is on."""
        entry = self._mounts.containing(normal(text)) if text.startswith("/") else None
        return self._by_device[entry.dev] if entry else self._volume(text)

    def _volume(self, name: str) -> Volume:
        if name not in self._by_name:
            group = name.partition("/")[0]
            raise UserError(
                f"there is no logical volume {name}", hint=f"{command('lvs', group)} shows them"
            )
        return self._by_name[name]

    def _entry(self, volume: Volume) -> Entry:
        if why := _no_origin(volume):
            raise UserError(f"{volume.path} cannot be backed up: {why[0]}", hint=why[1])
        entry = self._mount_of(volume)
        if entry is None:
            raise UserError(
                f"{volume.path} cannot be backed up: it is not mounted",
                hint=command("mount", f"/dev/{volume.path}", "/PATH"),
            )
        return entry

    def _mount_of(self, volume: Volume) -> Entry | None:
        """Return where the whole of a volume is seen; None where it is not."""
        if volume.btrfs is not None:
            raise UserError(
                f"{volume.path} holds a btrfs, which atomtx snapshots itself",
                hint="name it by its path" + (f": {shown(volume.btrfs)}" if volume.btrfs else ""),
            )
        seen = [e for e in self._mounts if volume.device and e.dev == volume.device]
        visible = [e for e in seen if self._mounts.topmost(e.mountpoint) is e]
        return next((e for e in visible if e.root == "/"), None)

    def _chosen(self, volume: Volume, entry: Entry | None) -> Chosen:
        cow = _cow_bytes(self._cow_size, volume)
        fstype, pool = entry.fstype if entry else "", volume.pool if volume.is_thin else ""
        origin = Origin(volume.uuid, volume.path, fstype, cow, pool)
        facts = LogicalFacts(volume.path, volume.uuid, volume.group, volume.group_uuid, origin)
        return Chosen(facts, entry.mountpoint if entry else "-")


def _no_origin(volume: Volume) -> tuple[str, str] | None:
    """Tell why a volume is not one of the user's with files of now, and what to name."""
    if why := _NO_ORIGINS.get(volume.attributes[:1]):
        return why, "name its origin"
    if any(tag.startswith(OURS) for tag in volume.tags):  # a thin one is a volume like any other
        return "it is a snapshot that atomtx took", "name its origin"
    return None


def _no_thin(volume: Volume) -> tuple[str, str] | None:
    if volume.is_thin:
        return None
    return (
        "it is not thin, and a snapshot of it that stays overflows with time",
        "`atomtx backup` takes one for as long as it needs it; or make it thin: lvmthin(7)",
    )


def _unfit(volume: Volume, entry: Entry) -> tuple[str, str] | None:
    """Tell why no snapshot of a volume that is mounted so can be taken, and what mends it."""
    if no_origin := _no_origin(volume):
        return no_origin
    at = shown(entry.mountpoint)
    if entry.fstype not in FILE_SYSTEMS:
        hint = f"those of {', '.join(FILE_SYSTEMS)} can be; a btrfs is named by its path"
        return f"its file system is {entry.fstype}", hint
    if entry.root != "/":
        return f"only {shown(entry.root)} of it is mounted at {at}", "mount the whole"
    if why := unfit_name(entry.mountpoint):
        return f"the name of its mountpoint {at} {why}", "rename it"
    if any(o.startswith(("logdev=", "rtdev=")) for o in entry.super_options.split(",")):
        why = "its XFS is on more than one device, which cannot be snapshotted together"
        return why, "use one with its log inside"
    return None


def _check_disjoint(
    named: Collection[str], parts: Sequence[str], chosen: dict[str, tuple[Volume, Entry]]
) -> None:
    """Refuse a part of a volume, or of another part, that is named as a whole as well."""
    wholes = {entry.mountpoint: path for path, (_, entry) in chosen.items() if path in named}
    homes = {part: next(a for a in ancestors(part) if _is_home(a, chosen)) for part in parts}
    for part, home in homes.items():
        above = next((a for a in ancestors(part) if a in parts and homes[a] == home), None)
        if home in wholes or above:
            raise UserError(
                f"{shown(part)} is already included by {above or wholes[home]}",
                hint=f"leave out {shown(part)}",
            )


def _is_home(path: str, chosen: dict[str, tuple[Volume, Entry]]) -> bool:
    return any(entry.mountpoint == path for _, entry in chosen.values())


def _cow_bytes(cow_size: str, volume: Volume) -> int:
    """Return the room for a classic snapshot, in whole extents; one of a thin volume needs none."""
    if volume.is_thin:
        return 0
    share = SHARE.fullmatch(cow_size)
    wanted = volume.size * int(share[1]) // 100 if share else bytes_of(cow_size)
    return max(-(-wanted // volume.extent), 1) * volume.extent


def _check_room(volumes: Iterable[Volume], chosen: Iterable[Chosen]) -> None:
    """Refuse snapshots for which their volume group has no room, before anything is changed."""
    needed: Counter[str] = Counter()
    for each in chosen:
        assert isinstance(each.facts, LogicalFacts)
        needed[each.facts.group] += each.facts.origin.cow_bytes
    free = {volume.group: volume.group_free for volume in volumes}
    for group, count in needed.items():
        if count > free[group]:
            raise UserError(
                f"the volume group {group} has {size(free[group])} free, and its snapshots need "
                f"{size(count)}",
                hint="give a smaller --cow-size, extend the group, or remove what it can spare",
            )

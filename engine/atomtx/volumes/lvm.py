"""
Logical volumes of LVM: take, prove, keep and destroy read-only snapshots of them.

A classic snapshot has room for what changes in its origin meanwhile, and is lost when that is
used up; one of a thin volume shares the pool.  Both bear tags that are written by the command
that makes them.  There are no holds: nothing keeps root from removing one, unless it is mounted.

A snapshot is ours if its volume group has the UUID and its name the token that the plan names, it
has our tag, its origin is the plan's or is no more, and, once journaled, its UUID is that UUID.
What a power cut leaves of an `lvcreate` has the name and the tag, and no origin: it is ours to be
destroyed, and of no other use.

One that is to stay is of a thin volume, and stays inactive.  The tag that says whose it is becomes
the one that says who kept it, by one command a group; with that, read-only and with an origin it
counts as kept.  Its name is no proof of anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from .. import btrfsio, lvmio, process
from ..errors import EffectError
from ..intents import Origin, TakeSnapshots
from ..logical import OURS
from ..lvmio import Device, Lvm
from ..mounts.mountinfo import Table
from ..names import LVM, LvmSnapshot, device_name, mounted_as
from ..plan import LogicalFacts, PlannedVolume, Request, normal
from ..records import Volume
from .kind import Identity, Kept

_TAG = "atomtx"
_MARK, _KEPT = OURS
_TRANSIENT = "atomtx.transient="
_AT_ONCE = 100  # names, and a proof of each: one word of a command has 128 KiB at most
_REMOVE = ("lvremove", "--yes")
# lvs(8), lv_attr: classic snapshots are on it, or thin volumes of which it is the external origin.
# An `lvremove --yes` destroys them with it (lv_remove_with_dependencies in LVM's lv_manip.c).
_ORIGINS = "oO"
_NO_ORIGIN = f'lv_attr!~"^[{_ORIGINS}]"'
_OURS = "ours"
_LOOKS, _LOOK_S = 3, 0.5  # a command at work has its devices suspended for less than that
# What a snapshot needs is resumed before what it belongs to.
_ORDER = ("-tmeta", "-tdata", "-tpool", "-real", "-cow")
_OF_POOL = 3  # so many of them are a thin pool's


class LogicalVolumes:
    """Logical volumes, classic and thin; their snapshots are taken one after the other."""

    def __init__(self, lvm: Lvm) -> None:
        self._lvm = lvm
        self._was_broken = False  # what it destroyed

    # -- looking ---------------------------------------------------------------------------

    def trouble(self, volumes: Collection[PlannedVolume]) -> str | None:
        """Tell which volume group is not there, or hangs."""
        try:
            stuck = self._stuck(volumes)
            if stuck:
                return f"the device {stuck[0].name} is suspended: `dmsetup resume {stuck[0].name}`"
            there = {group.uuid: group for group in self._lvm.groups()}
        except EffectError as exc:
            return exc.message
        groups = sorted({(v.pool, v.pool_guid) for v in volumes})
        return next(filter(None, (_unusable(n, there.get(uuid)) for n, uuid in groups)), None)

    def identities(self, volumes: Sequence[PlannedVolume]) -> dict[str, Identity]:
        """
        Return what each volume's snapshot is, also where its group was renamed.

        Raises EffectError where LVM cannot be asked.
        """
        there = {(v.group_uuid, v.name): v for v in self._lvm.volumes()}
        keys = ((v, (v.pool_guid, LvmSnapshot.parse(v.snapshot).name)) for v in volumes)
        return {v.snapshot: _identity(there[key], v.origin) for v, key in keys if key in there}

    def renamed(self, run: str, lost: Sequence[Volume]) -> dict[str, Identity]:
        """
        Find snapshots that somebody renamed, by their group's UUID, their own and their tag.

        vgimportclone(8) gives a new UUID to the group alone: a cloned disk has ours once more.
        """
        wanted = {(v.pool_guid, v.guid): v.snapshot for v in lost if v.guid}
        there = self._lvm.volumes() if wanted else ()
        found = {wanted.get((v.group_uuid, v.uuid), ""): _identity(v, None) for v in there}
        return {old: each for old, each in found.items() if old and each.mark == run}

    def unreadable(self, volumes: Sequence[PlannedVolume]) -> str | None:
        """Tell which group has another name: a device is mounted by the one that was planned."""
        there = {group.uuid: group.name for group in self._lvm.groups()}
        groups = sorted({(v.pool, v.pool_guid) for v in volumes})
        return next((_renamed(n, there[u]) for n, u in groups if there.get(u, n) != n), None)

    def links(self, snapshots: Collection[str]) -> Iterator[str]:
        """Name the devices and the volumes that were made on top of the snapshots."""
        names = {mounted_as(name).removeprefix("/dev/mapper/"): name for name in snapshots}
        for device in lvmio.devices().values():
            holders = Path("/sys/dev/block", device.number, "holders")
            with suppress(OSError):
                for holder in os.listdir(holders) if device.name in names else ():
                    yield f"the device {holder} is on {names[device.name]}"
        yield from self._on(snapshots)

    def _on(self, snapshots: Collection[str]) -> Iterator[str]:
        """Name the volumes that would go with a snapshot; a thin one of its pool would not."""
        try:
            there = {volume.path: volume for volume in self._lvm.volumes()}
        except EffectError as exc:
            yield exc.message
            return
        for each in there.values():
            origin = f"{each.group}/{each.origin}"
            if origin in snapshots and origin in there and each.pool != there[origin].pool:
                yield f"the logical volume {each.path} is on {origin}"

    # -- changing --------------------------------------------------------------------------

    def mend(self, volumes: Collection[PlannedVolume]) -> None:
        """
        Resume what a command that died has left suspended, and load what its origin should be.

        First of all: as long as an origin is suspended, whoever writes to it hangs, and we with
        it.  Raises EffectError where it cannot be resumed.
        """
        stuck = self._stuck(volumes)
        for device in stuck:
            done = self._lvm.run("dmsetup", "resume", device.name)
            if not done.ok:
                raise done.error(f"cannot resume the device {device.name}")
        if stuck:
            self._refresh(volumes)

    def _stuck(self, volumes: Collection[PlannedVolume]) -> list[Device]:
        """Return what is seen suspended again and again, as it is not by a living command."""
        stuck = _concerned(self._lvm.suspended(), volumes)
        for _ in range(_LOOKS - 1):
            if not stuck:
                break
            time.sleep(_LOOK_S)
            names = {device.uuid for device in self._lvm.suspended()}
            stuck = [device for device in stuck if device.uuid in names]
        return stuck

    def _refresh(self, volumes: Iterable[PlannedVolume]) -> None:
        """Have LVM load what its metadata say of the origins; what it complains of is not ours."""
        wanted = {(v.pool_guid, v.origin.uuid) for v in volumes if v.origin}
        there = (v for v in self._lvm.volumes() if v.device)
        paths = [v.path for v in there if (v.group_uuid, v.uuid) in wanted]
        if paths:
            self._lvm.run("lvchange", "--refresh", *paths)

    def take(self, intent: TakeSnapshots) -> EffectError | None:
        """
        Take the snapshots of one volume group, one after the other.

        Raises EffectError where `lvcreate` fails: LVM's metadata may have a thin snapshot, with all
        that `lvs` tells of a whole one, that its pool has not.
        """
        words = [_TAG, f"{_MARK}{intent.run}"]
        words += [f"{_TRANSIENT}{intent.run}"] if intent.transient else []
        tags = [option for word in words for option in ("--addtag", word)]
        try:
            there = {volume.path: volume.uuid for volume in self._lvm.volumes()}
        except EffectError as exc:
            return exc
        for origin in intent.origins:
            if there.get(origin.name) != origin.uuid:
                return EffectError(
                    f"{origin.name} is not the logical volume any more that it was a moment ago",
                    hint="try again",
                )
        for origin, text in zip(intent.origins, intent.snapshots, strict=True):
            size = ("--size", f"{origin.cow_bytes}b") if origin.cow_bytes else ()
            name = LvmSnapshot.parse(text).name
            done = self._lvm.run(
                "lvcreate", "--yes", "--snapshot", "--permission", "r", *tags, *size,
                "--name", name, origin.name,
            )  # fmt: skip
            if not done.ok:
                raise done.error(
                    f"cannot take a snapshot of {origin.name}", hint=_hint(done.stderr)
                )
        return None

    def ready(self, volumes: Sequence[PlannedVolume]) -> None:
        """
        Activate those that are not: LVM leaves thin snapshots inactive, at creation and at boot.

        Raises EffectError where that fails.
        """
        active = list(lvmio.devices().values())
        groups = {v.snapshot: v.pool_guid for v in volumes}
        names = [
            each.name
            for taken, each in self.identities(volumes).items()
            if not any(lvmio.is_of(device, groups[taken], each.guid) for device in active)
        ]
        if not names:
            return
        done = self._lvm.run(
            "lvchange", "--yes", "--activate", "y", "--ignoreactivationskip", *names
        )
        if not done.ok:
            raise done.error(f"cannot activate {names[0]}")

    def hold(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Do nothing: there are no holds."""

    def release(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Do nothing: there are no holds."""

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Destroy the snapshots that are still these, each proven under LVM's own lock.

        One that became an origin is busy: what is on it is somebody's, and would go with it.
        """
        tags = {each.name: (f"{_MARK}{run}",) for each in identities}
        verdicts = self._change(identities, tags, _REMOVE, lambda _: True)
        self._was_broken |= any(each.flaw for each in identities)
        return verdicts

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Change the tag of the snapshots that are still these from run to kept.

        One that was kept by this run already is "done".  Those that stay beside their origins are
        inactive again: a recovery may have activated them, to see whether they are whole.
        """
        if not identities:
            return {}
        mark, kept = f"{_MARK}{run}", f"{_KEPT}{run}"
        done = {(v.group, v.uuid) for v in self._lvm.volumes() if kept in v.tags}
        left = [each for each in identities if (_group(each), each.guid) not in done]
        verdicts = {each.name: "done" for each in identities if each not in left}
        verdicts |= self._change(
            left,
            {each.name: (mark,) for each in left},
            ("lvchange", "--deltag", mark, "--addtag", kept),
            lambda volume: mark in volume.tags,
        )
        self._deactivate(each for each in identities if verdicts[each.name] == "done")
        return verdicts

    def _deactivate(self, identities: Iterable[Identity]) -> None:
        """Deactivate what is to stay; what somebody uses already stays as it is."""
        to_stay = [each for each in identities if not LvmSnapshot.parse(each.name).run]
        active = list(lvmio.devices().values())
        groups = _groups(self._lvm.volumes()) if to_stay else {}
        there = [
            each
            for each in to_stay
            if any(
                lvmio.is_of(device, groups.get((each.name, each.guid), ""), each.guid)
                for device in active
            )
        ]
        for start in range(0, len(there), _AT_ONCE):
            part = there[start : start + _AT_ONCE]
            proof = _proof(part, {each.name: () for each in part})
            names = [each.name for each in part]
            self._lvm.run("lvchange", "--yes", "--activate", "n", "--select", proof, *names)

    def prune(self, snapshots: Sequence[Kept]) -> Iterator[dict[str, str]]:
        """
        Destroy kept snapshots of one group that are still these, some at once.

        Each is proven by its UUID and the tag of the run that kept it, under LVM's own lock; one
        that is transient by that tag as well.  Yields verdicts by name as they are known, those
        of `destroy`.  Idempotent.
        """
        for start in range(0, len(snapshots), _AT_ONCE):
            part = snapshots[start : start + _AT_ONCE]
            yield self._change(
                [_as_identity(each) for each in part],
                {each.name: _marks_of(each) for each in part},
                _REMOVE,
                lambda _: True,
                is_kept=True,
            )

    def _change(
        self,
        identities: Sequence[Identity],
        tags: Mapping[str, Sequence[str]],
        command: Sequence[str],
        is_left: Callable[[lvmio.Volume], bool],
        *,
        is_kept: bool = False,
    ) -> dict[str, str]:
        """
        Run *command* on those that are still these, one a group or, of many, a hundred.

        *is_left* tells what it left.

        Each must have its *tags*, and one that *is_kept* be read-only.  LVM compares UUID and tags
        once more, under its lock, and of what is removed whether it is an origin: nothing can come
        in between.
        """
        if not identities:
            return {}
        removes = command == _REMOVE
        before = self._lvm.volumes()
        groups = _groups(before)
        verdicts = _judged(identities, before, tags, is_kept=is_kept, is_removed=removes)
        proof = partial(_proof, tags=tags, more=(_NO_ORIGIN,) if removes else ())
        proven = [each for each in identities if verdicts[each.name] == _OURS]
        failed: dict[str, process.Completed] = {}
        for group in sorted({_group(each) for each in proven}):
            of_group = [each for each in proven if _group(each) == group]
            for start in range(0, len(of_group), _AT_ONCE):
                part = of_group[start : start + _AT_ONCE]
                names = [each.name for each in part]
                done = self._lvm.run(*command, "--select", proof(part), *names)
                if not done.ok:
                    failed[group] = done
                if done.status < 0:  # killed: it may have left devices suspended
                    self.mend([_as_planned(v) for v in before if v.path in names])
        after = self._lvm.volumes() if proven else []
        left = {(volume.group_uuid, volume.uuid) for volume in after if is_left(volume)}
        seen = {volume.group_uuid for volume in after}
        for each in proven:
            group_uuid = groups[each.name, each.guid]
            is_there = (group_uuid, each.guid) in left
            verdicts[each.name] = "busy" if is_there else "done"
            why = failed.get(_group(each))
            # Of a group that is gone meanwhile nothing is known; "busy" is tried again in vain.
            if why and (group_uuid not in seen or (is_there and not _says_busy(why, each.name))):
                raise why.error(f"cannot {command[0]} {each.name}")
        return verdicts

    def sweep(self, volumes: Sequence[PlannedVolume], *, run: str) -> None:
        """
        Load the origins' tables anew where something broken was destroyed.

        An `lvcreate` that died may have left the table of an origin that has a snapshot.  All
        else is done: LVM's metadata are on the disk before a command ends.
        """
        if self._was_broken:
            self._was_broken = False
            self._refresh(volumes)


def marked(lvm: Lvm) -> Iterator[tuple[PlannedVolume, Identity]]:
    """
    Yield what has our tags and our names, each as the volume that a plan would have.

    Raises EffectError where LVM cannot be asked.
    """
    for volume in lvm.volumes() if lvmio.devices() else ():
        try:
            snapshot = LvmSnapshot.parse(volume.path)
        except ValueError:  # no name of a snapshot of ours
            continue
        identity = _identity(volume, None)
        is_to_stay = bool(volume.origin and snapshot.name_as_of(f"{volume.group}/{volume.origin}"))
        if identity.mark and (is_to_stay or identity.mark == snapshot.run):
            yield _as_planned(volume), identity


def keepers(lvm: Lvm) -> Iterator[str]:
    """Yield for each kept snapshot the run whose tag it has; EffectError as of `marked`."""
    for volume in lvm.volumes() if lvmio.devices() else ():
        yield from _marks(volume, _KEPT)


def _groups(volumes: Iterable[lvmio.Volume]) -> dict[tuple[str, str], str]:
    """Return the group of each volume by its name and UUID: two groups may have one name."""
    return {(volume.path, volume.uuid): volume.group_uuid for volume in volumes}


def _as_planned(volume: lvmio.Volume) -> PlannedVolume:
    """Return a snapshot as the volume that a plan would have; one whose origin is gone, too."""
    origin = Origin(
        volume.origin_uuid,
        f"{volume.group}/{volume.origin}",
        cow_bytes=0 if volume.pool else volume.size,
        pool=volume.pool,
    )
    return PlannedVolume(
        LVM, volume.group, volume.group_uuid, origin.name, "", "", volume.path, origin=origin
    )


def _identity(volume: lvmio.Volume, origin: Origin | None) -> Identity:
    runs = _runs(volume)
    ours = origin is None or volume.origin_uuid in ("", origin.uuid)
    return Identity(
        name=volume.path,
        guid=volume.uuid,
        createtxg=str(volume.created_s),
        creation_s=volume.created_s,
        mark=runs[0] if ours and len(runs) == 1 else None,
        flaw=_flaw(volume),
    )


def _flaw(volume: lvmio.Volume) -> str | None:
    """Tell why a snapshot does not hold its moment; lvs(8) has the letters of lv_attr."""
    if volume.is_invalid or volume.attributes[4:5] in ("I", "S"):
        return "it overflowed: its room (--cow-size) was too small for what was written"
    if not volume.origin and not volume.is_thin:
        return "it was never finished"
    return "it was made writable" if volume.is_writable else None


def _judged(
    identities: Iterable[Identity],
    volumes: Iterable[lvmio.Volume],
    tags: Mapping[str, Sequence[str]],
    *,
    is_kept: bool,
    is_removed: bool,
) -> dict[str, str]:
    """
    Return a verdict for each name: _OURS where it is still the same, with its *tags*.

    One that *is_removed* is busy as long as it is an origin.
    """
    there = {volume.path: volume for volume in volumes}
    verdicts = {}
    for each in identities:
        found = there.get(each.name)
        if found is None:
            verdicts[each.name] = "absent"
        elif (found.uuid, str(found.created_s)) != (each.guid, each.createtxg):
            verdicts[each.name] = "foreign"
        elif not found.tags.issuperset(tags[each.name]) or len(_runs(found)) > 1:
            verdicts[each.name] = "unmarked"
        elif is_removed and found.attributes.startswith(tuple(_ORIGINS)):
            verdicts[each.name] = "busy"
        else:
            verdicts[each.name] = "unmarked" if is_kept and not _stays(found) else _OURS
    return verdicts


def _proof(
    identities: Iterable[Identity], tags: Mapping[str, Sequence[str]], more: Sequence[str] = ()
) -> str:
    """
    Return the selection of LVM that has these alone, by UUID and by tags: lvmreport(7).

    *more* must be true of each as well.
    """
    proofs = {each.guid: [*map(_has_tag, tags[each.name])] for each in identities}
    return " || ".join(
        "(" + " && ".join([f'lv_uuid="{uuid}"', *has_tags, *more]) + ")"
        for uuid, has_tags in proofs.items()
    )


def _has_tag(tag: str) -> str:
    return f'lv_tags={{"{tag}"}}'


def _runs(volume: lvmio.Volume) -> list[str]:
    return _marks(volume, _MARK)


def _marks(volume: lvmio.Volume, start: str) -> list[str]:
    return [tag.removeprefix(start) for tag in sorted(volume.tags) if tag.startswith(start)]


def _concerned(devices: Iterable[Device], volumes: Collection[PlannedVolume]) -> list[Device]:
    """Return those of the *devices* that origins, snapshots and pools of *volumes* are made of."""
    found = []
    for device in devices:
        for volume in volumes:
            place = _place(device, volume)
            if place is not None:
                found.append((place, device))
                break
    return [device for _, device in sorted(found, key=lambda each: each[0])]


def _place(device: Device, volume: PlannedVolume) -> int | None:
    """Return when a device is to be resumed; None for one that *volume* has nothing to do with."""
    group = lvmio.PREFIX + lvmio.plain(volume.pool_guid)
    if not device.uuid.startswith(group) or not volume.origin:
        return None
    rest = device.uuid.removeprefix(group)
    suffix = next((n for n, end in enumerate(_ORDER) if rest.endswith(end)), None)
    if suffix is not None and suffix < _OF_POOL:
        return suffix if _is_of_pool(device, volume.pool, volume.origin) else None
    if volume.origin.uuid and rest.startswith(lvmio.plain(volume.origin.uuid)):
        return len(_ORDER) + 1 if suffix is None else suffix
    snapshot = device_name(volume.pool, LvmSnapshot.parse(volume.snapshot).name)
    if device.name == snapshot + ("" if suffix is None else _ORDER[suffix]):
        return len(_ORDER) if suffix is None else suffix
    return None


def _is_of_pool(device: Device, group: str, origin: Origin) -> bool:
    """
    Tell whether a part of some thin pool is one of the origin's pool.

    By its name: data and metadata are volumes with UUIDs of their own.  A suspension outlives
    neither a boot nor a rename.
    """
    if not origin.pool:  # of a thin volume of an older run it may be each pool of the group
        return not origin.cow_bytes
    parts = (device_name(group, origin.pool + end) for end in ("_tmeta", "_tdata"))
    return device.name in (*parts, device_name(group, origin.pool) + "-tpool")


def _group(identity: Identity) -> str:
    return identity.name.partition("/")[0]


def _says_busy(done: process.Completed, name: str) -> bool:
    """Tell whether a command has left a volume because somebody uses it."""
    lines = [line for line in done.stderr.splitlines() if f" {name} " in line]
    return any("in use" in line or "is used by" in line for line in lines)


def _hint(stderr: str) -> str | None:
    if "insufficient free space" in stderr or "insufficient free extents" in stderr:
        return "the volume group has too little room: `vgs` shows it; lower --cow-size"
    if "free space in pool" in stderr or ("pool" in stderr and "full" in stderr):
        return "the thin pool is full: extend it, or free some of it"
    return None


# -- those that stay ---------------------------------------------------------------------------


def named(request: Request, table: Table) -> tuple[Request, list[lvmio.Volume]]:
    """
    List all logical volumes where something that is named may be one: one `lvs`.

    Those that were named by their device have the name VG/LV in the request that is returned.
    Without LVM's commands, as in a container, what is read live can be had in no other way.
    """
    active = lvmio.devices()
    others = (*request.exclude, *request.live) if lvmio.is_installed() else ()
    if not any(_may_be_one(text, table, active) for text in (*request.names, *others)):
        return request, []
    on_btrfs = _on_btrfs(table)
    found = [replace(volume, btrfs=on_btrfs.get(volume.device)) for volume in Lvm().volumes()]
    by_device = {volume.device: volume.path for volume in found if volume.device}

    def plainly(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(
            by_device.get(lvmio.number_of(text) or "", text) if text.startswith("/dev/") else text
            for text in texts
        )

    return replace(request, names=plainly(request.names), exclude=plainly(request.exclude)), found


def _on_btrfs(table: Table) -> dict[str, str]:
    """
    Return where the btrfs is mounted that a device is of, by the device's number; else "".

    The table of mounts has a number of the kernel's own for each, and names one of its devices.
    """
    members = btrfsio.members()
    places: dict[str, str] = {}
    for entry in table if members else ():
        number = lvmio.number_of(entry.source) if entry.fstype == "btrfs" else None
        if number in members:
            places.setdefault(members[number], entry.mountpoint)
    return {number: places.get(filesystem, "") for number, filesystem in members.items()}


def may_be_inactive(text: str) -> bool:
    """Tell whether a text may be VG/LV, and LVM be asked: no device tells of a group at rest."""
    return not text.startswith("/") and text.count("/") == 1 and lvmio.is_installed()


def _may_be_one(text: str, table: Table, active: Mapping[str, Device]) -> bool:
    if text.startswith("/dev/"):
        return lvmio.number_of(text) in active
    if text.startswith("/"):
        entry = table.containing(normal(text))
        return entry is not None and entry.dev in active
    group, _, name = text.partition("/")
    start = device_name(group, "")
    return bool(name) and any(device.name.startswith(start) for device in active.values())


def kept(volumes: Collection[LogicalFacts], lvm: Lvm) -> list[Kept]:
    """
    Return all read-only thin snapshots of *volumes*, whoever took them.

    But not those that a run has for itself.  Raises EffectError where LVM cannot be asked.
    """
    names = {(facts.group_guid, facts.guid): facts.name for facts in volumes}
    there = lvm.volumes() if volumes else ()
    return [
        _kept(volume, names[volume.group_uuid, volume.origin_uuid])
        for volume in there
        if (volume.group_uuid, volume.origin_uuid) in names and _stays(volume)
    ]


def _stays(volume: lvmio.Volume) -> bool:
    return volume.is_thin and not volume.is_writable and not _runs(volume)


def _kept(volume: lvmio.Volume, origin: str) -> Kept:
    keepers = _marks(volume, _KEPT)
    keeper = keepers[0] if len(keepers) == 1 else ""
    return Kept(
        name=volume.path,
        guid=volume.uuid,
        createtxg=str(volume.created_s),
        creation_s=volume.created_s,
        keeper=keeper,
        holds=0,
        clones=(),  # a thin snapshot needs none of those that it is of, nor they it
        is_transient=bool(keeper) and keeper in _marks(volume, _TRANSIENT),
        origin=origin,
    )


def _marks_of(each: Kept) -> tuple[str, ...]:
    """Return the tags that prove one that is to be pruned; of one that the user named none."""
    starts = (_KEPT, _TRANSIENT) if each.is_transient else (_KEPT,)
    return tuple(f"{start}{each.keeper}" for start in starts) if each.keeper else ()


def _as_identity(each: Kept) -> Identity:
    return Identity(each.name, each.guid, each.createtxg, each.creation_s, None)


def group_trouble(name: str, uuid: str, lvm: Lvm) -> str | None:
    """Tell why a group cannot be asked, or has another name now; None where it can."""
    groups = {group.uuid: group for group in lvm.groups()}
    if trouble := _unusable(name, groups.get(uuid)):
        return trouble
    return None if groups[uuid].name == name else _renamed(name, groups[uuid].name)


def _renamed(name: str, now: str) -> str:
    return f"the volume group {name} has another name now: {now}"


def _unusable(name: str, group: lvmio.Group | None) -> str | None:
    if group is None:
        return f"the volume group {name} is not there"
    if group.is_exported:
        return f"the volume group {group.name} is exported"
    return f"the volume group {group.name} lacks {group.missing} devices" if group.missing else None


def uuids(names: Collection[str], lvm: Lvm) -> dict[str, str]:
    """Return the UUID of what has each name now; EffectError where LVM cannot be asked."""
    there = lvm.volumes() if names else ()
    return {volume.path: volume.uuid for volume in there if volume.path in names}

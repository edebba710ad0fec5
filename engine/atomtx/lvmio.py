"""
LVM as its commands and the kernel tell it.

A question is one command, whatever the number of logical volumes.  No command is ever killed: a
dead `lvcreate` leaves an origin suspended, half a snapshot, or a thin pool that takes no more.
They inherit lock F, so that a recovery waits for those of a killed front end.  What is mounted,
and whether a snapshot still holds what it held, device-mapper tells without LVM's own locks.

Sources: lvs(8), lvcreate(8), lvmreport(7), dmsetup(8), lvmthin(7); LVM 2.03.31 on Linux 6.12;
Documentation/admin-guide/device-mapper/snapshot.rst and thin-provisioning.rst of Linux.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import process

_SYSFS = Path("/sys/block")
PREFIX = "LVM-"  # of the UUIDs that LVM gives to its devices: then the group's, and the volume's
_PLAIN_UUID = 32
# LVM closes every descriptor that it inherits, and would complain of each.
_ENVIRONMENT = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
_FIELDS = (
    "vg_name,vg_uuid,vg_free,vg_extent_size,lv_name,lv_uuid,lv_tags,lv_attr,lv_size,lv_time,"
    "origin,origin_uuid,pool_lv,lv_snapshot_invalid,lv_kernel_major,lv_kernel_minor"
)
# lvmreport(7), lvm.conf(5): what an administrator may have set for people would change what we
# read, or have us miss it.  An epoch is the same in every zone.
_PLAINLY = (
    'report { time_format="%s" list_item_separator="," binary_values_as_numeric=0 '
    'compact_output=0 compact_output_cols="" prefixes=0 }'
)
_AGAIN_S = (0.0, 0.1, 0.3, 1.0, 3.0)  # pauses; what is removed in all of them is a flood
_REPORT = ("--reportformat", "json", "--units", "b", "--nosuffix", "--config", _PLAINLY)


@dataclass(frozen=True)
class Volume:
    """A logical volume, as one line of `lvs` has it."""

    group: str
    group_uuid: str
    group_free: int  # bytes
    extent: int  # bytes
    name: str
    uuid: str
    tags: frozenset[str]
    attributes: str  # lvs(8), lv_attr
    size: int
    created_s: int
    origin: str
    origin_uuid: str
    pool: str  # of a thin volume, or of one that has a cache
    is_invalid: bool  # a classic snapshot that overflowed
    device: str  # "major:minor"; "" where it is not active
    # Not of `lvs`: where a btrfs that it is a device of is mounted, "" where that is out of sight.
    btrfs: str | None = None

    @property
    def path(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def is_thin(self) -> bool:
        """Tell whether it is thin, and not at work to become another one's content (a merge)."""
        return bool(self.pool) and self.attributes[:1] == "V"

    @property
    def is_writable(self) -> bool:
        return self.attributes[1:2] == "w"


@dataclass(frozen=True)
class Group:
    name: str
    uuid: str
    missing: int  # how many of its devices are not there
    is_exported: bool  # its volumes are then not listed


@dataclass(frozen=True)
class Device:
    """A device of device-mapper that LVM made."""

    name: str
    uuid: str  # LVM's
    number: str  # "major:minor"


class Lvm:
    """The commands of LVM; *lock* is the descriptor of F that they inherit."""

    def __init__(self, lock: int | None = None) -> None:
        self._lock = lock

    def run(self, *argv: str) -> process.Completed:
        """Run one command to its end."""
        return process.run_to_end(argv, env=_ENVIRONMENT, lock=self._lock)

    def volumes(self) -> list[Volume]:
        """Return all logical volumes that can be seen; EffectError where LVM cannot be asked."""
        done = self.run("lvs", *_REPORT, "-o", _FIELDS)
        return [_volume(row) for row in _rows(done, "lv", "cannot list the logical volumes")]

    def groups(self) -> list[Group]:
        """Return all volume groups; EffectError where LVM cannot be asked."""
        done = self.run("vgs", *_REPORT, "-o", "vg_name,vg_uuid,vg_missing_pv_count,vg_exported")
        return [
            Group(
                name=row["vg_name"],
                uuid=row["vg_uuid"],
                missing=int(row["vg_missing_pv_count"] or 0),
                is_exported=bool(row["vg_exported"]),
            )
            for row in _rows(done, "vg", "cannot list the volume groups")
        ]

    def suspended(self) -> list[Device]:
        """Return LVM's devices that are suspended: whatever reads or writes them hangs."""
        columns = "name,uuid,major,minor,suspended"
        words = ("info", "-c", "--noheadings", "--separator", "|", "-o", columns)
        done = _listed(lambda: self.run("dmsetup", *words))
        if not done.ok:
            raise done.error("cannot ask for suspended devices")
        rows = [line.strip().split("|") for line in done.stdout.splitlines() if "|" in line]
        return [
            Device(name, uuid, f"{major}:{minor}")
            for name, uuid, major, minor, state in rows
            if state == "Suspended" and uuid.startswith(PREFIX)
        ]


def _listed(ask: Callable[[], process.Completed]) -> process.Completed:
    """
    Have dmsetup tell of all devices, again where one of them was removed meanwhile.

    It lists their names first, and then looks at each: that of another one's `lvremove` in between
    fails the command (seen with 2.03.31).
    """
    for pause_s in _AGAIN_S:
        done = ask()
        if done.ok or "Device does not exist" not in done.stderr:
            return done
        time.sleep(pause_s)
    return ask()


def _rows(done: process.Completed, kind: str, what: str) -> list[dict[str, str]]:
    if not done.ok:  # it may have left out what is there, and "not found" would mean "gone"
        raise done.error(what)
    try:
        found: list[dict[str, str]] = []
        for report in json.loads(done.stdout)["report"]:
            found += report[kind]
    except (ValueError, KeyError, TypeError) as exc:
        raise done.error(what) from exc
    return found


def _volume(row: Mapping[str, Any]) -> Volume:
    major, minor = row["lv_kernel_major"], row["lv_kernel_minor"]
    return Volume(
        group=row["vg_name"],
        group_uuid=row["vg_uuid"],
        group_free=int(row["vg_free"]),
        extent=int(row["vg_extent_size"]),
        name=row["lv_name"],
        uuid=row["lv_uuid"],
        tags=frozenset(filter(None, row["lv_tags"].split(","))),
        attributes=row["lv_attr"],
        size=int(row["lv_size"]),
        created_s=int(row["lv_time"].split()[0]) if row["lv_time"][:1].isdigit() else 0,
        origin=row["origin"],
        origin_uuid=row["origin_uuid"],
        pool=row["pool_lv"],
        is_invalid=row["lv_snapshot_invalid"] == "snapshot invalid",  # else "", or "unknown"
        device=f"{major}:{minor}" if int(minor or -1) >= 0 else "",
    )


# -- without LVM -------------------------------------------------------------------------------


def devices() -> dict[str, Device]:
    """Return the active devices that LVM made, by number, as sysfs tells; nothing is started."""
    found = {}
    with suppress(FileNotFoundError):
        for entry in os.listdir(_SYSFS):
            with suppress(OSError):  # no device-mapper's, or gone
                uuid = _text(_SYSFS / entry / "dm/uuid")
                if uuid.startswith(PREFIX):
                    name = _text(_SYSFS / entry / "dm/name")
                    number = _text(_SYSFS / entry / "dev")
                    found[number] = Device(name, uuid, number)
    return found


def is_installed() -> bool:
    """Tell whether LVM can be asked."""
    return process.which("lvs") is not None


def number_of(path: str) -> str | None:
    """Return the number of a block device by its path; None where there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISBLK(info.st_mode):
        return None
    return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"


def plain(uuid: str) -> str:
    """Return a UUID of LVM as device-mapper has it: without hyphens."""
    return uuid.replace("-", "")


def is_of(device: Device, group: str, uuid: str) -> bool:
    """Tell whether a device is a logical volume's own, and not a part or a helper of one."""
    return device.uuid == PREFIX + plain(group) + plain(uuid)


def node(uuid: str, name: str) -> Device:
    """
    Return the device of an active logical volume, of which the node under /dev/mapper is proven.

    The volume's clone in another group has the same UUID, and may be found first: *name* is that
    of the device.  Raises FileNotFoundError where none is active, FileExistsError where none has
    the name, or the node is another's.
    """
    start = len(PREFIX) + _PLAIN_UUID
    found = [device for device in devices().values() if device.uuid[start:] == plain(uuid)]
    if not found:
        raise FileNotFoundError(2, f"the logical volume {uuid} is not active")
    named = {device.name: device for device in found}
    if name not in named:
        others = ", ".join(sorted(named))
        raise FileExistsError(17, f"the device {name} has another name now: {others}")
    path = f"/dev/mapper/{name}"
    if number_of(path) != named[name].number:
        raise FileExistsError(17, f"{path} is not the device of the logical volume {uuid}")
    return named[name]


def mount_options(fstype: str) -> str:
    """
    Return the options for a read-only snapshot of a file system whose origin is mounted.

    It was frozen when the snapshot was taken, so its log holds nothing that is needed, and cannot
    be replayed on a device that is read-only.  XFS refuses a second one of the same UUID.
    """
    return {"xfs": "nouuid,norecovery", "ext4": "noload", "ext3": "noload"}.get(fstype, "")


def failing(names: Collection[str]) -> str | None:
    """
    Tell why snapshots do not show any more what they showed; None where all do.

    *names* are those of their devices.  A classic snapshot whose room is used up is lost, and a
    thin pool that is full stops or fails whoever writes.  Raises EffectError where that cannot be
    asked.
    """
    pools = _below(names)  # first: one that is renamed meanwhile is told with its new name
    # --noflush: the status of a thin pool is else not told before all of its writes are done.
    done = _listed(lambda: process.run(("dmsetup", "status", "--noflush")))
    if not done.ok:
        raise done.error("cannot ask for the state of the snapshots")
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    for name in (*names, *pools):
        if name not in told:
            return f"the device {name} is gone"
        if trouble := _trouble(name, told[name].split()[2:]):
            return trouble
    return None


def _trouble(name: str, words: Sequence[str]) -> str | None:
    """Judge the status of one device: its target's name, and what that tells."""
    target, told = words[0], words[1:]
    if target == "snapshot" and told[0] in ("Invalid", "Overflow", "Merge"):
        return f"the snapshot {name} overflowed: its --cow-size was too small for what was written"
    if target in ("thin", "thin-pool") and told[0] in ("Fail", "Error"):
        return f"the thin {'pool' if target == 'thin-pool' else 'snapshot'} {name} has failed"
    for word, what in (("out_of_data_space", "is full"), ("ro", "is read-only: it has failed")):
        if target == "thin-pool" and word in told:
            return f"the thin pool {name} {what}"
    if target == "error":
        return f"the device {name} has failed"
    return None


def _below(names: Collection[str]) -> list[str]:
    """Return the devices that some devices are on, by their names: of a thin one, its pool."""
    found: dict[str, None] = {}
    with suppress(FileNotFoundError):
        for entry in os.listdir(_SYSFS):
            with suppress(OSError):
                if _text(_SYSFS / entry / "dm/name") in names:
                    for slave in os.listdir(_SYSFS / entry / "slaves"):
                        with suppress(OSError):
                            found[_text(_SYSFS / slave / "dm/name")] = None
    return list(found)


def _text(path: Path) -> str:
    """Read what device-mapper was told: of devices that are not LVM's any bytes."""
    return os.fsdecode(path.read_bytes()).strip()

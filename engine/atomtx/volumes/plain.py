"""
Plain directories: read live, because their file system has no snapshots.

Nothing is taken, held or destroyed.  What is asked of the machine is whether a directory is still
the one of the plan: an unmounted /boot is an empty directory of the root file system.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .. import locks, process
from ..directories import inside
from ..errors import EffectError, UserError
from ..intents import TakeSnapshots
from ..mounts import live, mountinfo
from ..mounts.mountinfo import Entry, Table
from ..plan import DirectoryFacts, PlannedVolume, normal, shown
from ..records import Volume
from .kind import Identity

_BY_UUID = Path("/dev/disk/by-uuid")
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "afs")
_HINT = "is what belongs there mounted?"


class Directories:
    """Directories that are read live: as a kind of volume they have no snapshots."""

    def mend(self, volumes: Collection[PlannedVolume]) -> None:
        """Do nothing: no command is run for them."""

    def trouble(self, volumes: Collection[PlannedVolume]) -> str | None:
        """Tell nothing: what is to be cleaned up needs no file system."""
        return None

    def identities(self, volumes: Sequence[PlannedVolume]) -> dict[str, Identity]:
        """Find nothing: there are no snapshots."""
        return {}

    def renamed(self, run: str, lost: Sequence[Volume]) -> dict[str, Identity]:
        """Find nothing."""
        return {}

    def unreadable(self, volumes: Sequence[PlannedVolume]) -> str | None:
        """Tell which directory is not the one of the plan now."""
        return next(filter(None, map(_problem, volumes)), None)

    def take(self, intent: TakeSnapshots) -> EffectError | None:
        """Refuse: no plan has such a step."""
        raise AssertionError(intent)

    def ready(self, volumes: Sequence[PlannedVolume]) -> None:
        """Do nothing: they are there, or the proof before the bind says so."""

    def hold(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Do nothing."""

    def release(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Do nothing."""

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """Destroy nothing."""
        return {}

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """Keep nothing."""
        return {}

    def sweep(self, volumes: Sequence[PlannedVolume], *, run: str) -> None:
        """Do nothing: nothing was made."""

    def links(self, snapshots: Collection[str]) -> Iterator[str]:
        """Say nothing."""
        yield from ()


def reach(paths: Sequence[str]) -> None:
    """
    Look into each directory, so that what is mounted on demand is.

    Raises UserError for one that is not there, is no directory, or is empty.
    """
    for path in paths:
        try:
            content = live.content_of(path)
        except OSError as exc:
            raise UserError(f"cannot read {path}: {exc.strerror}", hint=_HINT) from exc
        if content.is_empty:
            raise UserError(f"{path} is empty: there is nothing to back up", hint=_HINT)


def check_there(texts: Iterable[str], table: Table) -> None:
    """
    Raise UserError for a path that the user typed and that is not there.

    What is mounted is there, and is not looked at: that may hang.  What cannot be looked at is
    not absent.
    """
    for path in (normal(text) for text in texts if text.startswith("/")):
        if table.topmost(path) is None and _is_absent(path):
            raise UserError(f"there is no {shown(path)}", hint=_HINT)


def _is_absent(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def is_file(path: str) -> bool:
    """Tell whether what is mounted there is a file, as a container has them on /etc/hosts."""
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def identify(path: str, entry: Entry) -> DirectoryFacts:
    """Describe a directory by its path and the mount that it is on."""
    filesystem, lasting = _filesystem(entry)
    return DirectoryFacts(
        name=path,
        guid=f"{lasting}:{inside(path, entry)}",
        filesystem=filesystem,
        fstype=entry.fstype,
        source=entry.source,
    )


def proof(volume: PlannedVolume) -> str:
    """
    Return what proves a directory to the runner: the device, and the directory in it.

    Raises EffectError where it is not the one of the plan.
    """
    entry, problem = _judged(volume)
    if entry is None:
        raise EffectError(problem, hint=_HINT)
    return f"{entry.dev}:{inside(volume.mountpoint, entry)}"


def _problem(volume: PlannedVolume) -> str | None:
    entry, problem = _judged(volume)
    return None if entry else f"{problem}; mount what belongs there"


def _judged(volume: PlannedVolume) -> tuple[Entry | None, str]:
    """Return the mount that a directory is on, or None and why it is not the plan's."""
    path = volume.mountpoint
    try:
        with os.scandir(path):  # mounts what is mounted on demand
            pass
    except OSError as exc:
        return None, f"cannot read {path}: {exc.strerror}"
    entry = mountinfo.read().containing(path)
    if entry is None:
        return None, f"nothing is mounted at {path}"
    found = identify(path, entry)
    if (found.filesystem, found.guid) != (volume.pool_guid, volume.guid):
        return None, f"{path} is on another file system than in the plan, {volume.pool}"
    return entry, ""


def _filesystem(entry: Entry) -> tuple[str, str]:
    """
    Return what names a file system now, and what does on each boot.

    That is the UUID, or for one that is far away where it comes from.  One without either, such as
    one in memory, is the same only as long as it is mounted.
    """
    if not entry.dev.startswith("0:"):
        if uuid := _uuid(entry):
            return uuid, uuid
    elif entry.fstype in _REMOTE or entry.fstype.startswith("fuse."):
        name = f"{entry.fstype} {entry.source}"
        return name, name
    lasting = f"{entry.fstype} {entry.source}"
    return f"{lasting}, device {entry.dev} of boot {locks.boot_id()}", lasting


def _uuid(entry: Entry) -> str:
    """Return the UUID in the superblock of a device; empty where nobody can tell."""
    device = f"/dev/block/{entry.dev}" if os.path.exists(f"/dev/block/{entry.dev}") else ""
    with suppress(OSError):
        if not device and _number(entry.source) == entry.dev:
            device = entry.source
    if device and process.which("blkid") and os.access(device, os.R_OK):
        # The superblock itself, past the cache.
        words = ("blkid", "--probe", "--match-tag", "UUID", "--output", "value", device)
        if found := process.run(words).stdout.strip():
            return found
    links = sorted(_BY_UUID.iterdir()) if _BY_UUID.is_dir() else ()
    return next((link.name for link in links if _leads_to(link, entry.dev)), "")


def _leads_to(link: Path, device: str) -> bool:
    with suppress(OSError):  # a disk was unplugged
        return _number(str(link)) == device
    return False


def _number(device: str) -> str:
    info = os.stat(device)
    if not stat.S_ISBLK(info.st_mode):
        return ""
    return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"

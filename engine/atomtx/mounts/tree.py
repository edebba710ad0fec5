"""
The tree: the snapshots assembled under one stable root, in the host's namespace.

Without namespaces, nullfs.py makes the mounts and takes them away.

These mounts outlive a crash, until the next boot, so they have compensations.  A mount is ours
if its source is our snapshot, whose name holds the run's token, at the mountpoint that the
journal names, whatever its dataset is called by now; nothing else is ever unmounted, and never
lazily or by force.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from .. import system
from ..errors import EffectError, UserError
from ..intents import Mount
from ..names import RunId, is_within
from . import live, mountinfo
from .namespace import mount_live, mount_snapshot, unmount

# rmdir(2), of a directory that is gone, or in which somebody has put something meanwhile.
_NOT_OURS_ALONE = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR)
# fsync(2), of one that is gone as well, or on a file system that has no sync of directories.
_NOT_SYNCED = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)


def directories_to_make(root: str, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the directories that are missing for *targets* under *root*, parents first."""
    missing: list[str] = []
    for target in sorted((root, *(root + target for target in targets))):
        path, parts = "", [part for part in target.split("/") if part]
        for part in parts:
            path += "/" + part
            if path not in missing and not os.path.isdir(path):
                missing.append(path)
    return tuple(missing)


def check_free(mounts: Sequence[Mount], *, beneath: Sequence[Mount] = ()) -> None:
    """
    Raise UserError where something is mounted, or files lie, at a mountpoint of the tree.

    A mount of *beneath* is neither, if it can be told from ours, which come to lie on top of it.
    """
    table = mountinfo.read()
    ids = {
        e.id for e in table for b in beneath if e.mountpoint == b.mountpoint and _has_token(e, b)
    }
    covered = [entry.mountpoint for entry in table if entry.id in ids]
    for each in mounts:
        if any(entry.mountpoint == each.mountpoint and entry.id not in ids for entry in table):
            raise UserError(
                f"something is mounted at {each.mountpoint} already",
                hint="unmount it, or choose another --root",
            )
        if os.path.realpath(each.mountpoint) != each.mountpoint:
            # The kernel's table would show our mount under another name: never to be found again.
            raise UserError(
                f"the way to {each.mountpoint} leads over a symbolic link",
                hint="choose another --root",
            )
        with suppress(FileNotFoundError):
            is_covered = any(is_within(each.mountpoint, path) for path in covered)
            if not is_covered and _is_used(each.mountpoint):
                raise UserError(
                    f"{each.mountpoint} is not an empty directory",
                    hint="empty it, or choose another --root",
                )


def _is_used(path: str) -> bool:
    try:
        return bool(os.listdir(path))
    except NotADirectoryError:
        return True


def make(mounts: Sequence[Mount], directories: Sequence[str], *, lock: int | None = None) -> None:
    """
    Make the directories and the mounts, parents first; idempotent.

    Where programs make the mounts, they inherit *lock*.
    """
    for directory in directories:
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            continue
        except OSError as exc:
            raise EffectError(f"cannot make {directory}: {exc.strerror}") from exc
    if not system.here.NAMESPACES:
        from . import nullfs

        nullfs.make(mounts, lock=lock)
        return
    table = mountinfo.read()
    sources = live.opened(mounts)
    try:
        for each in mounts:
            found = mountinfo.topmost(table, each.mountpoint)
            if found is None or not live.shows(found, each):
                _mount(each, sources)
    finally:
        live.close(sources)


def _mount(each: Mount, sources: Mapping[str, int]) -> None:
    try:
        if each.mountpoint in sources:
            mount_live(sources[each.mountpoint], each.mountpoint)
        else:
            mount_snapshot(each, each.mountpoint)
    except OSError as exc:
        raise EffectError(f"cannot mount {each.source} at {each.mountpoint}: {exc}") from exc


def remove(
    mounts: Sequence[Mount], directories: Sequence[str], *, lock: int | None = None
) -> list[Mount]:
    """
    Unmount what is ours, children first, and remove the directories that were made.

    Idempotent, and durable where nothing is busy, because what is recorded as undone is not looked
    for again.  Returns the mounts that are busy, or covered by another's; a directory with
    something in it stays.
    Programs that are started for it inherit *lock*.  Raises EffectError where the machine
    refuses.
    """
    busy = _unmount_all(mounts, lock)
    if not busy:
        for directory in reversed(directories):
            _remove_directory(directory)
        for parent in {os.path.dirname(directory) for directory in directories}:
            _sync(parent)
    return busy


def _remove_directory(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError as exc:
        if exc.errno not in _NOT_OURS_ALONE:
            raise EffectError(f"cannot remove {directory}: {exc.strerror}") from exc


def _sync(directory: str) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as exc:
        if exc.errno not in _NOT_SYNCED:
            raise EffectError(f"cannot sync {directory}: {exc.strerror}") from exc


def _unmount_all(mounts: Sequence[Mount], lock: int | None) -> list[Mount]:
    if not system.here.NAMESPACES:
        from . import nullfs

        return nullfs.remove(mounts, lock=lock)
    for each in reversed(mounts):
        while _is_ours(each):
            try:
                unmount(each.mountpoint)
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise EffectError(f"cannot unmount {each.mountpoint}: {exc.strerror}") from exc
                break
    return _left(mounts)


def _left(mounts: Sequence[Mount]) -> list[Mount]:
    """Return what is still mounted, children first: in use, or beneath somebody else's mount."""
    points = {each.mountpoint for each in mounts}
    there = [entry for entry in mountinfo.read() if entry.mountpoint in points]

    def is_left(each: Mount) -> bool:
        return any(e.mountpoint == each.mountpoint and _shows(e, each) for e in there)

    return [each for each in reversed(mounts) if is_left(each)]


def _is_ours(each: Mount) -> bool:
    found = mountinfo.topmost(mountinfo.read(), each.mountpoint)
    return found is not None and _shows(found, each)


def _shows(entry: mountinfo.Entry, each: Mount) -> bool:
    """Tell whether an entry is of what we mounted, also where its dataset was renamed since."""
    return _has_token(entry, each) or live.shows(entry, each)


def _has_token(entry: mountinfo.Entry, each: Mount) -> bool:
    """
    Tell whether an entry is of the one run that has mounted a snapshot of its own.

    The table has the name of today (__zpl_show_devname in zpl_super.c of OpenZFS), whose random
    part stays.
    """
    token = each.source.rpartition("@")[2]
    return RunId.from_token(token) is not None and entry.source.endswith(f"@{token}")


def expire_automounts(snapshots: Sequence[str], *, lock: int | None = None) -> None:
    """
    Unmount what somebody's look into `.zfs/snapshot` mounted of our snapshots.

    The kernel would let it go after five minutes (zfs(4), zfs_expire_snapshot); until then
    the snapshot is busy.  One that is in use stays.
    """
    ours = frozenset(snapshots)
    if not system.here.NAMESPACES:
        from . import nullfs

        nullfs.expire(ours, lock=lock)
        return
    for entry in reversed(mountinfo.read()):
        if entry.source in ours and "/.zfs/snapshot/" in entry.mountpoint + "/":
            with suppress(OSError):
                unmount(entry.mountpoint)

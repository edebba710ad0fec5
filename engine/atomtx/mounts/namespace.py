"""
Linux: the mount namespace of a run, and mount(2), umount2(2), pivot_root(2) themselves.

The runner enters a namespace of its own and mounts each snapshot over the volume's own live
mountpoint.  When the last process in the namespace dies, however it dies, the kernel removes
every mount.  `os.unshare` exists from Python 3.12 on only, hence libc.

Sources: mount_namespaces(7), mount(2), pivot_root(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from .. import btrfsio, lvmio, system
from ..errors import EffectError
from ..intents import Mount
from ..names import LVM, PLAIN, ZFS, BtrfsSnapshot, is_within, mounted_as
from ..records import Content
from . import live as livedirs
from . import mountinfo
from .live import open_directory

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 0x1, 0x2, 0x4, 0x20
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 0x1000, 0x4000, 0x40000, 0x80000
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8

_libc = ctypes.CDLL(None, use_errno=True)
LIVE_BELOW_ROOT = ("/dev", "/proc", "/sys", "/run")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    """Call mount(2); an OSError names both ends."""
    arguments = (
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() if fstype else None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    if _libc.mount(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot mount {source}: {os.strerror(number)}", target)


def unmount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """Call umount2(2); never by force, and lazily only what no one else can see."""
    if _libc.umount2(os.fsencode(target), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def mount_snapshot(each: Mount, target: str) -> None:
    """
    Mount a snapshot read-only, over what is there.

    mount(2) itself: the mount.zfs helper refuses a directory that is not empty.  *target* is
    followed over no symbolic link: a user's, in the frozen files, must not lead us elsewhere.
    """
    descriptor = open_directory(target)
    try:
        if each.volume_kind == ZFS:
            where = f"/proc/self/fd/{descriptor}"
            mount(each.source, where, "zfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
        elif each.volume_kind == LVM:
            _mount_logical(each, f"/proc/self/fd/{descriptor}")
        else:
            snapshot = BtrfsSnapshot.parse(each.source)
            btrfsio.mount_subvolume(snapshot.filesystem, snapshot.path, descriptor, each.guid)
    except OSError as exc:
        exc.filename = target
        raise
    finally:
        os.close(descriptor)


def _mount_logical(each: Mount, where: str) -> None:
    lvmio.node(each.guid, mounted_as(each.source).removeprefix("/dev/mapper/"))
    options = lvmio.mount_options(each.fstype)
    mount(mounted_as(each.source), where, each.fstype, MS_RDONLY | MS_NOSUID | MS_NODEV, options)


def mount_live(source: int, target: str) -> None:
    """
    Bind the directory of a descriptor read-only, over what is there, without the mounts below it.

    Private: what is mounted below the live one later is not to appear here.
    """
    descriptor = open_directory(target)
    try:
        mount(f"/proc/self/fd/{source}", f"/proc/self/fd/{descriptor}", None, MS_BIND)
    finally:
        os.close(descriptor)
    descriptor = open_directory(target)  # now on the bind
    try:
        where = f"/proc/self/fd/{descriptor}"
        mount("none", where, None, MS_PRIVATE)
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
        mount("none", where, None, flags)
    finally:
        os.close(descriptor)


def identity(pid: int | str = "self") -> tuple[int, int]:
    """Return what names a process's mount namespace: device and inode of its file."""
    info = os.stat(f"/proc/{pid}/ns/mnt")
    return info.st_dev, info.st_ino


def enter() -> None:
    """
    Move this process, which must be single-threaded, into a mount namespace of its own.

    Slave propagation: private would pin every mount of the host, and with `shared` our mounts
    would appear on the host's live paths.  Raises EffectError unless the namespace is proven to
    be another one before anything is mounted.
    """
    before = identity()
    if _libc.unshare(ctypes.c_int(CLONE_NEWNS)) != 0:
        number = ctypes.get_errno()
        raise EffectError(
            f"cannot make a mount namespace: {os.strerror(number)}",
            hint="run atomtx as root; in a service, allow RestrictNamespaces=mnt and @mount",
        )
    if identity() == before:
        raise EffectError("the mount namespace is still the host's", hint="this is a kernel fault")
    try:
        mount("none", "/", None, MS_REC | MS_SLAVE)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        raise EffectError(
            "the mounts cannot be parted from the host's: / is no mountpoint, as in a chroot",
            hint="bind the chroot's directory over itself (mount --bind) before it is entered",
        ) from exc
    if any(p.startswith("shared:") for e in mountinfo.read() for p in e.propagation):
        raise EffectError("a mount of the new namespace is still shared with the host")


def leave_marker(token: str, folder: str) -> None:
    """
    Mount an empty file system named *token* on *folder*, in this namespace.

    It tells the run's processes by their mount table: a wrapper may close every inherited
    descriptor, but hardly leaves the namespace.  Nothing propagates from here, so that nobody
    else's table shows it.
    """
    mount(token, folder, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=700")


def drop_pinned(keep: Collection[str], live: Collection[str]) -> None:
    """
    Unmount, in this namespace, the ZFS mounts that the host could not unmount any more.

    Where the host's own mounts are private (OpenRC, containers), our copies of them follow
    nobody: they would keep another pool from being exported for as long as the client runs.
    Mounts that contain a path of *keep* stay, and those inside what is brought back *live*.
    """
    for mountpoint in pinned(mountinfo.read(), keep, live):
        with suppress(OSError):  # in use, or covered: then it stays, as it would have
            unmount(mountpoint)


def pinned(table: mountinfo.Table, keep: Collection[str], live: Collection[str]) -> Iterator[str]:
    """Yield the mountpoints that :func:`drop_pinned` is to free, children first."""
    for entry in reversed(table):
        follows = any(p.startswith("master:") for p in entry.propagation)
        is_needed = any(is_within(path, entry.mountpoint) for path in keep)
        is_needed |= any(is_within(entry.mountpoint, path) for path in live)
        if entry.fstype == "zfs" and not follows and not is_needed:
            yield entry.mountpoint


@dataclass(frozen=True)
class Assembly:
    """The mounts of a run as this process sees them, and the proof that they stayed."""

    mounts: Sequence[Mount]
    pins: Sequence[int]  # a descriptor on each; they keep even a lazily unmounted one alive
    ids: Mapping[str, int]  # of ours, by mountpoint
    known: frozenset[int]  # every mount that was there at the start

    def contents(self) -> dict[str, Content]:
        """Return what is seen at each mountpoint."""
        return {m.mountpoint: livedirs.content_of(m.mountpoint) for m in self.mounts}

    def disturbance(self) -> str | None:
        """Tell what happened to our mounts, or to what they show; None if nothing did."""
        return self.displaced() or self.failure()

    def displaced(self) -> str | None:
        """
        Tell what happened to our mounts since they were made; None if nothing did.

        proc(5): a mount id is reused only after its mount is gone, and the pins keep ours from
        going.  So an equal id is the same mount, on kernels without unique ids (6.8) too.
        """
        table = mountinfo.read()
        for made in self.mounts:
            found = mountinfo.topmost(table, made.mountpoint)
            if found is None:
                return f"{made.mountpoint} was unmounted while the client read it"
            if found.id != self.ids[made.mountpoint]:
                return f"{made.mountpoint} was mounted anew while the client read it"
            if found.is_deleted:  # btrfs lets a mounted one be deleted
                what = "directory" if made.volume_kind == PLAIN else "snapshot"
                return f"the {what} at {made.mountpoint} was deleted while the client read it"
        ours = frozenset(self.ids.values())
        for entry in table:
            if entry.parent in ours and entry.id not in self.known:
                return f"{entry.source} was mounted on {entry.mountpoint} while the client read it"
        return None

    def failure(self) -> str | None:
        """
        Tell why a snapshot does not show any more what it showed; None if all do.

        One of LVM loses its files when the room for changes is used up, or its thin pool is full.
        """
        logical = [m.source for m in self.mounts if m.volume_kind == LVM]
        names = [mounted_as(source).removeprefix("/dev/mapper/") for source in logical]
        return lvmio.failing(names) if names else None


def assemble(mounts: Sequence[Mount], *, live: Sequence[str]) -> Assembly:
    """
    Mount each snapshot over its live mountpoint, parents first, and the *live* paths back.

    A set that holds `/` is assembled beside it and entered by pivot_root(2).
    """
    opened = _open_live(live)
    sources = livedirs.opened(mounts)
    try:
        if any(m.mountpoint == "/" for m in mounts):
            _assemble_root(mounts, sources, opened)
        else:
            _mount_all(mounts, sources, "")
            _bind_live(opened, "")
    finally:
        livedirs.close(sources)
        for descriptor in opened.values():
            os.close(descriptor)
    return observe(mounts)


def observe(mounts: Sequence[Mount]) -> Assembly:
    """Pin mounts that are there, and note which they are."""
    pins = [os.open(m.mountpoint, system.here.PIN) for m in mounts]
    table = mountinfo.read()
    ids = {}
    for each in mounts:
        found = mountinfo.topmost(table, each.mountpoint)
        if found is None or not livedirs.shows(found, each):
            raise EffectError(f"{each.source} is not what is seen at {each.mountpoint}")
        if each.volume_kind == PLAIN and "ro" not in found.options.split(","):
            raise EffectError(f"{each.mountpoint} is not mounted read-only")
        ids[each.mountpoint] = found.id
    return Assembly(mounts, pins, ids, frozenset(entry.id for entry in table))


def _mount_all(mounts: Sequence[Mount], sources: Mapping[str, int], root: str) -> None:
    for each in mounts:
        target = root + each.mountpoint if each.mountpoint != "/" else root
        try:
            if each.mountpoint in sources:
                mount_live(sources[each.mountpoint], target)
            else:
                mount_snapshot(each, target)
        except FileNotFoundError as exc:
            raise EffectError(
                f"cannot mount {each.source}: its directory {each.mountpoint} is not in the "
                "frozen parent, or the snapshot is gone",
                hint="include the dataset between the two, or leave this one out",
            ) from exc
        except OSError as exc:
            raise EffectError(f"cannot mount {each.source} at {each.mountpoint}: {exc}") from exc


def _open_live(live: Sequence[str]) -> dict[str, int]:
    opened = {}
    for path in live:
        with suppress(FileNotFoundError):  # a cache that is not there yet needs no way back
            opened[path] = os.open(path, os.O_PATH | os.O_CLOEXEC)
    return opened


def _bind_live(opened: dict[str, int], root: str) -> None:
    for path, descriptor in opened.items():
        try:
            mount(f"/proc/self/fd/{descriptor}", root + path, None, MS_BIND | MS_REC)
        except OSError as exc:
            raise EffectError(
                f"cannot bring the live {path} back over the frozen files: {exc.strerror}",
                hint="put the client's cache and repository outside of what is backed up",
            ) from exc


def _assemble_root(
    mounts: Sequence[Mount], sources: Mapping[str, int], opened: dict[str, int]
) -> None:
    """Build the whole tree under a private staging mount, then make it `/`."""
    staging = "/run"  # any directory outside the set: the mount over it is seen by us alone
    descriptor = os.open(staging, os.O_PATH | os.O_CLOEXEC)
    live = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in LIVE_BELOW_ROOT}
    live["/run"] = descriptor
    _mount_all(mounts, sources, staging)
    for path, source in live.items():
        mount(f"/proc/self/fd/{source}", staging + path, None, MS_BIND | MS_REC)
    _bind_live(opened, staging)
    os.chdir(staging)
    # pivot_root(2), NOTES: with both arguments "." no directory for the old root is needed.
    if _libc.pivot_root(b".", b".") != 0:
        number = ctypes.get_errno()
        raise EffectError(f"cannot make the frozen tree the root: {os.strerror(number)}")
    unmount(".", MNT_DETACH)  # seen by this namespace alone
    os.chdir("/")
    for source in live.values():
        with suppress(OSError):
            os.close(source)

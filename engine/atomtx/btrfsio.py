"""
btrfs as the kernel shows it: ioctls, and a mount of the top level that nobody else sees.

No program is started: the answers of `btrfs` are text for people, and a killed child could be in
the middle of its work, where an ioctl is done or not.  The top level is reached through a mount
that is attached nowhere, in no mount namespace: it cannot propagate, and goes with its descriptor.

Sources: include/uapi/linux/btrfs.h and btrfs_tree.h; fsopen(2), fsmount(2), move_mount(2).  The
numbers of ioctls are those of asm-generic/ioctl.h: not of Alpha, MIPS, PowerPC and SPARC, where
the kernel answers ENOTTY.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOP = 5  # the id of the top level: BTRFS_FS_TREE_OBJECTID
_SYSFS = Path("/sys/fs/btrfs")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_NONE, _WRITE, _READ = 0, 1, 2


def _number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0x94 << 8 | number


_TREE_SEARCH = _number(_READ | _WRITE, 17, 4096)
_INO_LOOKUP = _number(_READ | _WRITE, 18, 4096)
_WAIT_SYNC = _number(_WRITE, 22, 8)
_SNAP_CREATE_V2 = _number(_WRITE, 23, 4096)
_START_SYNC = _number(_READ, 24, 8)
_FS_INFO = _number(_READ, 31, 1024)
_GET_SUBVOL_INFO = _number(_READ, 60, 504)
_SNAP_DESTROY_V2 = _number(_WRITE, 63, 4096)

_SUBVOL_RDONLY, _SUBVOL_SPEC_BY_ID = 0x2, 0x10  # of struct btrfs_ioctl_vol_args_v2
_FS_INFO_GENERATION = 0x2
_ROOT_TREE, _ROOT_ITEM, _ROOT_BACKREF = 1, 132, 144
_ROOT_RDONLY = 0x1
ROOT_INODE = 256  # of each subvolume; in an empty stub of one it is another
_LAST_ID, _LAST = 2**64 - 256, 2**64 - 1
_LISTINGS = 5  # beside a program that takes and deletes snapshots all the time one in 5000 fails

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = (
    429,
    430,
    431,
    432,
)  # the same on all of these architectures
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_RDONLY, _NOSUID_NODEV = 0x1, 0x2 | 0x4  # MOUNT_ATTR_*
_FROM_EMPTY_PATH, _TO_EMPTY_PATH = 0x4, 0x40  # MOVE_MOUNT_F_, MOVE_MOUNT_T_

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Info:
    """A subvolume, as the kernel describes the one that a descriptor is in."""

    id: int
    uuid: str
    parent_uuid: str  # of what it is a snapshot of; "" for none
    is_readonly: bool
    created: int  # the generation in which it was made
    created_s: int


@dataclass(frozen=True)
class Row:
    """A subvolume in the list of its file system; *path* is below the top level: "/@home"."""

    id: int
    parent: int  # the id of the subvolume that it lies in
    path: str
    uuid: str
    parent_uuid: str
    is_readonly: bool


# -- reaching a file system --------------------------------------------------------------------


def mounted() -> list[str]:
    """Return the UUIDs of the file systems that are mounted, in whatever namespace."""
    with suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(_SYSFS) if _UUID.fullmatch(name))
    return []


def check_only(filesystem: str) -> None:
    """
    Raise OSError with ENOTUNIQ where it, or a clone that is mounted beside it, has a borrowed UUID.

    Since Linux 6.7 that is what the second of the two gets: temp_fsid in btrfs(5).  Which of them
    was mounted first, and so has their own, tells nothing of which it was before.
    """
    if _sysfs(filesystem, "temp_fsid") == "1":
        raise OSError(errno.ENOTUNIQ, "it is a clone of one that is mounted: unmount one of them")
    own = _sysfs(filesystem, "metadata_uuid")
    for other in mounted() if own else ():
        if _sysfs(other, "temp_fsid") == "1" and _sysfs(other, "metadata_uuid") == own:
            raise OSError(errno.ENOTUNIQ, "a clone of it is mounted: unmount one of them")


def _sysfs(filesystem: str, name: str) -> str:
    """Return what sysfs says of a file system; "" where it is not mounted, or the kernel older."""
    with suppress(FileNotFoundError):
        return _attribute(_SYSFS / filesystem / name)
    return ""


def _attribute(path: Path) -> str:
    """Read a file of sysfs; FileNotFoundError also where it goes as it is read."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except OSError as exc:
        if exc.errno != errno.ENODEV:  # kernfs_get_active(), fs/kernfs/dir.c
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from exc


def devices(filesystem: str) -> list[str]:
    """Return the devices of a mounted file system; FileNotFoundError where it is not mounted."""
    names = sorted(os.listdir(_SYSFS / filesystem / "devices"))
    if not names:
        raise FileNotFoundError(2, "no device of the file system is there", filesystem)
    return [_node(_SYSFS / filesystem / "devices" / name) for name in names]


def members() -> dict[str, str]:
    """Return the UUID of the mounted file system that each device is of, by the device's number."""
    found = {}
    for filesystem in mounted():
        with suppress(FileNotFoundError):
            for name in os.listdir(_SYSFS / filesystem / "devices"):
                with suppress(FileNotFoundError):
                    number = _SYSFS / filesystem / "devices" / name / "dev"
                    found[_attribute(number)] = filesystem
    return found


def _node(device: Path) -> str:
    """
    Return a device's node by the name that the kernel knows it by.

    Some kernels take over whichever is used last, for all to see in the table of mounts.
    """
    with suppress(FileNotFoundError):
        return "/dev/mapper/" + _attribute(device / "dm" / "name")
    return "/dev/" + device.name.replace("!", "/")


@contextmanager
def top_level(filesystem: str) -> Iterator[int]:
    """
    Open the top level of a mounted file system, for reading and changing it.

    An OSError where it is not mounted, cannot be written to, or is not the only one: `check_only`.
    """
    check_only(filesystem)
    mount = _detached(filesystem, "/", _NOSUID_NODEV)
    try:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            if os.fstatvfs(directory).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), filesystem)
            yield directory
        finally:
            os.close(directory)
    finally:
        os.close(mount)


def mount_subvolume(filesystem: str, path: str, target: int, uuid: str) -> None:
    """
    Mount the subvolume at *path* read-only on the open *target*, if its UUID is this one.

    Not mount(2): that refuses a second mount of the same file system on one mountpoint, whatever
    subvolumes they are of.  Raises OSError; FileExistsError where another one has the path.
    """
    mount = _detached(filesystem, path, _NOSUID_NODEV | _RDONLY)
    try:
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            found = info(root).uuid
        finally:
            os.close(root)
        if found != uuid:
            raise FileExistsError(17, f"another subvolume has its path, with UUID {found}", path)
        _call(_MOVE_MOUNT, mount, b"", target, b"", _FROM_EMPTY_PATH | _TO_EMPTY_PATH)
    finally:
        os.close(mount)


def _detached(filesystem: str, path: str, flags: int) -> int:
    """
    Mount a subvolume, attached nowhere; what of it is mounted goes with the last descriptor.

    By the first device that leads to it: one that has failed does not, nor does a seed of it.
    Raises the OSError of that device, of the last where none does.
    """
    failed = None
    for source in devices(filesystem):
        try:
            return _proven(filesystem, source, path, flags)
        except OSError as exc:
            failed = exc
        if path != "/" and _leads(filesystem, source):
            break
    assert failed
    raise failed


def _leads(filesystem: str, source: str) -> bool:
    """Tell whether a device leads to the file system, whatever is in it."""
    try:
        os.close(_proven(filesystem, source, "/", _NOSUID_NODEV | _RDONLY))
    except OSError:
        return False
    return True


def _proven(filesystem: str, source: str, path: str, flags: int) -> int:
    """Mount from a device; FileNotFoundError where it leads to another file system."""
    mount = _mount_from(source, path, flags)
    try:
        _check(mount, filesystem)
    except OSError:
        os.close(mount)
        raise
    return mount


def _check(mount: int, filesystem: str) -> None:
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    try:
        if identify(directory)[0] != filesystem:
            raise FileNotFoundError(2, "another file system is on its device", filesystem)
    finally:
        os.close(directory)


def _mount_from(source: str, path: str, flags: int) -> int:
    context = _call(_FSOPEN, b"btrfs", _FSOPEN_CLOEXEC)
    try:
        options = {"source": source, "subvol": path}
        for key, value in options.items():
            _call(_FSCONFIG, context, _SET_STRING, key.encode(), os.fsencode(value), 0)
        # A mount that asks for writing makes a file system writable that somebody made read-only,
        # for all its mounts.  One that asks for "ro" leaves it as it is; *flags* are the mount's.
        _call(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, flags)
    finally:
        os.close(context)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


# -- looking -----------------------------------------------------------------------------------


def identify(fd: int) -> tuple[str, int]:
    """
    Return the UUID of the file system that *fd* is in, and its generation.

    Raises OSError for a kernel before 5.10, which answers without setting the flag.
    """
    found = bytearray(1024)
    struct.pack_into("=Q", found, 48, _FS_INFO_GENERATION)
    fcntl.ioctl(fd, _FS_INFO, found)
    if not struct.unpack_from("=Q", found, 48)[0] & _FS_INFO_GENERATION:
        # It has no deletion by id (5.7) either, perhaps: better no snapshot than one that stays.
        raise OSError(errno.EOPNOTSUPP, "the kernel is older than Linux 5.10")
    (generation,) = struct.unpack_from("=Q", found, 56)
    return str(uuid.UUID(bytes=bytes(found[16:32]))), generation


def info(fd: int) -> Info:
    """Describe the subvolume that *fd* is in; FileNotFoundError where it was deleted."""
    found = bytearray(504)
    fcntl.ioctl(fd, _GET_SUBVOL_INFO, found)
    flags, own, parent = struct.unpack_from("=Q16s16s", found, 288)
    (created,) = struct.unpack_from("=Q", found, 352)
    (created_s,) = struct.unpack_from("=Q", found, 392)
    return Info(
        id=struct.unpack_from("=Q", found)[0],
        uuid=_uuid(own),
        parent_uuid=_uuid(parent),
        is_readonly=bool(flags & _ROOT_RDONLY),
        created=created,
        created_s=created_s,
    )


def subvolumes(fd: int) -> list[Row]:
    """
    List the subvolumes of the file system that *fd* is in, the top level first.

    Anew where a directory went meanwhile with what lay in it: that may be gone, or be elsewhere.
    """
    for _ in range(_LISTINGS - 1):
        with suppress(FileNotFoundError):
            return _subvolumes(fd)
    return _subvolumes(fd)


def _subvolumes(fd: int) -> list[Row]:
    roots: dict[int, tuple[str, str, bool]] = {}
    places: dict[int, tuple[int, str]] = {}
    for id_, kind, offset, data in _items(fd):
        if kind == _ROOT_ITEM and len(data) >= 279:
            (flags,) = struct.unpack_from("<Q", data, 208)
            own, parent = struct.unpack_from("<16s16s", data, 247)
            roots[id_] = _uuid(own), _uuid(parent), bool(flags & _ROOT_RDONLY)
        elif kind == _ROOT_BACKREF:
            directory, _, length = struct.unpack_from("<QQH", data)
            name = os.fsdecode(data[18 : 18 + length])
            places[id_] = offset, _directory(fd, offset, directory) + name
    top = Row(TOP, 0, "/", *roots.get(TOP, ("", "", False)))
    found = ((id_, _path(id_, places)) for id_ in places if id_ in roots)
    return [top, *(Row(id_, places[id_][0], path, *roots[id_]) for id_, path in found if path)]


def _items(fd: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield id, type, offset and data of the items of the tree of roots that tell of subvolumes."""
    key = [TOP, 0, 0]  # objectid, type, offset
    while True:
        arguments = bytearray(4096)
        # tree_id, min and max objectid, offset and transid, min and max type, nr_items
        limits = (_ROOT_TREE, key[0], _LAST_ID, key[2], _LAST, 0, _LAST, key[1], 255, 4096)
        struct.pack_into("=7Q3I", arguments, 0, *limits)
        fcntl.ioctl(fd, _TREE_SEARCH, arguments)
        (count,) = struct.unpack_from("=I", arguments, 64)
        if not count:
            return
        at = 104
        for _ in range(count):
            _, id_, offset, kind, length = struct.unpack_from("=QQQII", arguments, at)
            at += 32
            yield id_, kind, offset, bytes(arguments[at : at + length])
            at += length
            key = [id_, kind, offset]
        key = _following(key)


def _following(key: list[int]) -> list[int]:
    id_, kind, offset = key
    if offset < _LAST:
        return [id_, kind, offset + 1]
    return [id_, kind + 1, 0] if kind < 255 else [id_ + 1, 0, 0]


def _directory(fd: int, subvolume: int, inode: int) -> str:
    """Return where a directory is in a subvolume, with a slash at its end; "" for its root."""
    if inode == ROOT_INODE:
        return ""
    arguments = bytearray(4096)
    struct.pack_into("=QQ", arguments, 0, subvolume, inode)
    fcntl.ioctl(fd, _INO_LOOKUP, arguments)
    return os.fsdecode(bytes(arguments[16:]).split(b"\0", 1)[0])


def _path(id_: int, places: dict[int, tuple[int, str]]) -> str | None:
    """Return a subvolume's path below the top level; None where one above it was deleted."""
    path = ""
    while id_ != TOP:
        if id_ not in places:
            return None
        id_, name = places[id_]
        path = f"/{name}{path}"
    return path


def _uuid(data: bytes) -> str:
    return str(uuid.UUID(bytes=data)) if any(data) else ""


# -- changing ----------------------------------------------------------------------------------


def snapshot(source: int, directory: int, name: str) -> None:
    """
    Take a read-only snapshot of the subvolume *source* as *name* in *directory*.

    Durable on return.  FileExistsError where something has the name.
    """
    arguments = bytearray(4096)
    struct.pack_into("=qQQ", arguments, 0, source, 0, _SUBVOL_RDONLY)
    data = os.fsencode(name)
    arguments[56 : 56 + len(data)] = data
    fcntl.ioctl(directory, _SNAP_CREATE_V2, arguments)


def destroy(fd: int, id_: int) -> None:
    """
    Delete a subvolume of the file system that *fd* is in, by its id; `commit` makes it durable.

    One that is mounted or read is deleted as well: its readers find an empty directory.
    """
    arguments = bytearray(4096)
    struct.pack_into("=qQQ", arguments, 0, 0, 0, _SUBVOL_SPEC_BY_ID)
    struct.pack_into("=Q", arguments, 56, id_)
    fcntl.ioctl(fd, _SNAP_DESTROY_V2, arguments)


def commit(fd: int) -> None:
    """Make durable what was changed; a deletion is undone by a power cut before."""
    transaction = bytearray(8)
    fcntl.ioctl(fd, _START_SYNC, transaction)
    fcntl.ioctl(fd, _WAIT_SYNC, bytes(transaction))

"""
The directories of a tree, in the order of their names, never following a link.

Each is opened by its name in the open directory above it, so a directory that is swapped for a
link meanwhile leads nowhere else.  Nothing in the tree is changed, not even a time of access
where the kernel lets us.  Names are bytes: a file system knows no encoding.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path

from .. import system
from ..directories import KERNELS
from ..errors import AtomtxError, UserError
from ..mounts import mountinfo
from .entry import State

_CONTROL = (b".zfs", (1 << 48) - 1)  # ZFS's directory of snapshots, and the inode it always has
_NO_ATIME = getattr(os, "O_NOATIME", 0)  # Linux
CHANGED = "changed while it was read"
TWICE = "listed twice: damage?"


@dataclass(frozen=True)
class Directory:
    """One directory, open for as long as it is the last one given or one above it."""

    path: bytes  # below the root of the tree, empty for the root itself
    info: os.stat_result
    descriptor: int  # -1 where it was not entered
    state: State | None  # None: it went away meanwhile
    error: str | None = None
    found: list[tuple[bytes, os.stat_result]] = field(default_factory=list)
    failed: list[tuple[bytes, str]] = field(default_factory=list)  # what even stat(2) refuses
    absent: list[bytes] = field(default_factory=list)  # what was listed, and is not there


def walk(
    root: Path, *, cross: bool = False, leave_out: Collection[bytes] = ()
) -> Iterator[Directory]:
    """
    Yield each directory of a tree, a directory before what is in it, the names in order.

    What is on another file system is told and not entered, unless *cross*, and that which shows the
    kernel itself in any case; the paths *leave_out* are as if they were not there.  UserError where
    the root is no directory, AtomtxError where it cannot be read.
    """
    top = _without(_root(root), leave_out)
    device = top.info.st_dev
    is_outside = (_kernels() - {device}).__contains__ if cross else device.__ne__
    open_now = [(top, _directories_of(top))]
    try:
        yield top
        while open_now:
            above, rest = open_now[-1]
            step = next(rest, None)
            if step is None:
                open_now.pop()
                os.close(above.descriptor)
                continue
            below = _without(_enter(above, *step, is_outside), leave_out)
            if below.descriptor >= 0:
                open_now.append((below, _directories_of(below)))
            yield below
    finally:
        for directory, _ in open_now:
            os.close(directory.descriptor)


def _without(directory: Directory, leave_out: Collection[bytes]) -> Directory:
    """Take out of a directory what is to be left out."""
    if not leave_out:
        return directory
    above = directory.path + b"/" if directory.path else b""
    found = [each for each in directory.found if above + each[0] not in leave_out]
    failed = [each for each in directory.failed if above + each[0] not in leave_out]
    return replace(directory, found=found, failed=failed)


def _directories_of(directory: Directory) -> Iterator[tuple[bytes, os.stat_result]]:
    return (each for each in directory.found if stat.S_ISDIR(each[1].st_mode))


def _root(root: Path) -> Directory:
    try:
        descriptor = open_at(os.fsencode(root), os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise UserError(f"cannot read {root}: {exc.strerror}", hint="name a directory") from exc
    except OSError as exc:
        raise AtomtxError(f"cannot read {root}: {exc.strerror}") from exc
    directory = _listed(b"", os.fstat(descriptor), descriptor)
    if directory.state is not State.CLEAN:
        raise AtomtxError(f"cannot read {root}: {directory.error}")
    return directory


def _kernels() -> frozenset[int]:
    """
    Return the devices of the file systems in which the kernel shows itself.

    They are no files of anybody's, and some have no end, as /proc/kcore.  Below an automounter
    there are files.  Of FreeBSD's no device is known.
    """
    try:
        mounts = mountinfo.read() if system.here.NAMESPACES else ()
    except OSError:  # no /proc, as in a chroot
        return frozenset()
    types = {*KERNELS} - {"autofs"}
    return frozenset(
        os.makedev(*map(int, each.dev.split(":"))) for each in mounts if each.fstype in types
    )


def _enter(
    above: Directory, name: bytes, info: os.stat_result, is_outside: Callable[[int], bool]
) -> Directory:
    """Open a directory in another one, and list it."""
    path = above.path + b"/" + name if above.path else name
    if is_outside(info.st_dev):
        return Directory(path, info, -1, State.ELSEWHERE)
    try:
        descriptor = open_at(name, os.O_DIRECTORY | os.O_NOFOLLOW, above.descriptor)
    except OSError as exc:
        return _not_entered(path, info, exc)
    info = os.fstat(descriptor)
    if is_outside(info.st_dev):  # mounted by the very opening
        os.close(descriptor)
        return Directory(path, info, -1, State.ELSEWHERE)
    return _listed(path, info, descriptor)


def _not_entered(path: bytes, info: os.stat_result, exc: OSError) -> Directory:
    if exc.errno == errno.ENOENT:
        return Directory(path, info, -1, None)
    if exc.errno in (errno.ENOTDIR, errno.ELOOP):
        return Directory(path, info, -1, State.UNREADABLE, CHANGED)
    return Directory(path, info, -1, State.UNREADABLE, reason_of(exc))


def _listed(path: bytes, info: os.stat_result, descriptor: int) -> Directory:
    """List an open directory; on an error it is closed, and nothing in it counts as seen."""
    directory = Directory(path, info, descriptor, State.CLEAN)
    try:
        with os.scandir(descriptor) as names:
            for each in names:
                _look(directory, each)
        if directory.absent or len(dict(directory.found)) < len(directory.found):
            directory = _looked_again(directory)
    except OSError as exc:
        os.close(descriptor)
        return Directory(path, info, -1, State.UNREADABLE, reason_of(exc))
    directory.found.sort(key=itemgetter(0))
    return directory


def _looked_again(directory: Directory) -> Directory:
    """
    Take each name once; tell what both looks listed twice, or the second lists and does not find.

    A directory that is written meanwhile may be listed so (readdir(3)), a damaged one always is.
    """
    looked_at = map(itemgetter(0), (*directory.found, *directory.failed))
    before = Counter([*looked_at, *directory.absent])
    counts = Counter(os.fsencode(name) for name in os.listdir(directory.descriptor))
    found, failed = dict(directory.found), dict(directory.failed)
    for name in filter(counts.__contains__, directory.absent):
        try:
            found[name] = os.stat(name, dir_fd=directory.descriptor, follow_symlinks=False)
        except OSError as exc:
            failed[name] = reason_of(exc)
    twice = (name for name in {*found, *failed} if min(before[name], counts[name]) > 1)
    failed.update(dict.fromkeys(twice, TWICE))
    rest = [each for each in found.items() if each[0] not in failed]
    return replace(directory, found=rest, failed=sorted(failed.items()))


def _look(directory: Directory, each: os.DirEntry[str]) -> None:
    name = os.fsencode(each.name)
    try:
        info = each.stat(follow_symlinks=False)
    except FileNotFoundError:
        directory.absent.append(name)
        return
    except OSError as exc:
        directory.failed.append((name, reason_of(exc)))
        return
    if (name, info.st_ino) != _CONTROL:
        directory.found.append((name, info))


def open_at(name: bytes, flags: int, directory: int | None = None) -> int:
    """Open for reading, without a trace in the time of access where we may."""
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        return os.open(name, flags | _NO_ATIME, dir_fd=directory)
    except PermissionError as exc:
        # O_NOATIME is for the owner and root alone.
        if exc.errno != errno.EPERM or not _NO_ATIME:
            raise
    return os.open(name, flags, dir_fd=directory)


def reason_of(exc: OSError) -> str:
    """Say why something could not be read, such as "EIO: Input/output error"."""
    name = errno.errorcode.get(exc.errno or 0, "error")
    return f"{name}: {exc.strerror or exc}"

"""One name in a tree, and its properties as the database keeps them.  Pure."""

from __future__ import annotations

import stat
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import os

_INT64 = 1 << 63
_TICK_NS = 20_000_000  # twice the longest tick, 10 ms: a file system's clock lags by up to one
_WHOLE_NS = 2_000_000_000  # vfat counts in steps of two seconds
_SECOND_NS = 1_000_000_000

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


class State(IntEnum):
    """What is known of an entry."""

    CLEAN = 0  # whole, and to be believed as long as its stat is the same
    RACY = 1  # whole, but it may have changed since without a trace: read again next time
    UNREADABLE = 2  # or a part of it; `error` says why
    ELSEWHERE = 3  # a directory on another file system: not entered


class Entry(NamedTuple):
    """
    One name in a directory.

    The fields from `mode` to `inode` are those of stat(2), in the order of `stat_of`.
    """

    name: bytes
    mode: int  # with the type
    uid: int
    gid: int
    size: int
    mtime: int  # nanoseconds
    ctime: int
    inode: int
    target: bytes | None = None  # where a link points, the numbers of a device
    xattrs: bytes | None = None  # see `pack`; None: there are none
    digest: bytes | None = None  # SHA-256, of a regular file
    state: int = State.CLEAN
    error: str | None = None

    @property
    def type(self) -> str:
        """What it is, in the words of mtree(5)."""
        return TYPES.get(stat.S_IFMT(self.mode), "unknown")

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_unknown(self) -> bool:
        """Whether even stat(2) was refused: nothing but the name is known."""
        return not self.mode

    @property
    def stat(self) -> tuple[int, ...]:
        """What stat(2) said, to compare with `stat_of`."""
        return self[1:8]


def stat_of(info: os.stat_result) -> tuple[int, int, int, int, int, int, int]:
    """
    Return what is kept of a stat, as numbers that a database can hold.

    An inode number of 64 bits is taken as a signed one; a time after 2262 or before 1677 is set
    to that limit.
    """
    mtime, ctime, inode = info.st_mtime_ns, info.st_ctime_ns, info.st_ino
    if not -_INT64 <= mtime < _INT64:
        mtime = max(-_INT64, min(mtime, _INT64 - 1))
    if not -_INT64 <= ctime < _INT64:
        ctime = max(-_INT64, min(ctime, _INT64 - 1))
    if inode >= _INT64:
        inode -= 2 * _INT64
    return (info.st_mode, info.st_uid, info.st_gid, info.st_size, mtime, ctime, inode)


def is_racy(info: os.stat_result, started: int) -> bool:
    """
    Tell whether a file that was read in a scan may change later without another stat.

    That is git's rule: its time is not older than the scan, by the clock of its file system.
    *started* is the start of the scan in nanoseconds.
    """
    times = (info.st_mtime_ns, info.st_ctime_ns)
    return any(time >= started - (_TICK_NS if time % _SECOND_NS else _WHOLE_NS) for time in times)


def pack(xattrs: dict[bytes, bytes]) -> bytes | None:
    """Return extended attributes as one value: each name, a NUL, and 32 bytes of SHA-256."""
    return b"".join(name + b"\0" + xattrs[name] for name in sorted(xattrs)) or None


def unpack(packed: bytes | None) -> dict[bytes, bytes]:
    """Return the names of extended attributes with their digests: the inverse of `pack`."""
    found: dict[bytes, bytes] = {}
    rest = packed or b""
    while rest:
        name, _, rest = rest.partition(b"\0")
        found[name], rest = rest[:32], rest[32:]
    return found


def shown(path: bytes) -> str:
    r"""Return a path for people, in one line; what cannot be printed as \ooo, as `ls -b` does."""
    if not path:
        return "."
    text = path.decode("utf-8", "surrogateescape")
    return "".join(char if char.isprintable() and char != "\\" else _octal(char) for char in text)


def _octal(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))

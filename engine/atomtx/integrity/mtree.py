"""
Entries as lines of mtree(5).  Pure.

Each line has the whole path, so that it means the same wherever it stands; NetBSD's mtree,
FreeBSD's and libarchive read it.  What mtree has no word for is left out: ctime, inode, xattrs.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from itertools import groupby

from .entry import Entry, State

_PLAIN = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-+,:@/%~^{}()&;'"
)


def escaped(path: bytes) -> str:
    r"""
    Return a path as vis(3) encodes it: \ooo for each byte that could mean something else.

    A pattern's characters are among them, though mtree takes them for a pattern all the same.
    """
    return "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in path)


def lines(entries: Iterable[tuple[bytes, Entry]]) -> Iterator[str]:
    """
    Yield the lines of a specification.

    *entries* come with their paths, directories first, and all of one directory in a row.
    """
    yield "#mtree"
    for _, siblings in groupby(entries, key=lambda each: each[0].rpartition(b"/")[0]):
        yield from _siblings(sorted(siblings, key=lambda each: _breadth(each[0])))


def _breadth(path: bytes) -> tuple[bool, int]:
    """
    Return how much a name would match as a pattern, for an order.

    NetBSD's mtree takes a decoded name with a pattern's character for a pattern, however it was
    encoded, and a file is the first entry that it matches (spec.c, verify.c): `*` before `a` would
    be `a`.  Names that match each other, `*` and `?`, have no order in which it is right.
    """
    name = path.rpartition(b"/")[2]
    literal = len(name.translate(None, b"*?["))
    is_pattern = literal < len(name)
    return is_pattern, -literal if is_pattern else 0


def _siblings(entries: Iterable[tuple[bytes, Entry]]) -> Iterator[str]:
    for path, entry in entries:
        if entry.is_unknown:  # there is no type for it
            yield f"# {_named(path)} was not readable: {_comment(entry.error or '')}"
            continue
        if entry.state == State.UNREADABLE:
            yield f"# the next one was not readable: {_comment(entry.error or '')}"
        elif entry.state == State.ELSEWHERE:
            yield "# the next one is on another file system, and was not entered"
        yield " ".join((_named(path), *_keywords(entry)))


def _named(path: bytes) -> str:
    return f"./{escaped(path)}" if path else "."


def _keywords(entry: Entry) -> Iterator[str]:
    yield f"type={entry.type}"
    if entry.type != "link":  # on Linux it has none of its own
        yield f"mode=0{stat.S_IMODE(entry.mode):o}"
    yield f"uid={entry.uid}"
    yield f"gid={entry.gid}"
    if entry.type == "file":
        yield f"size={entry.size}"
    seconds, rest = divmod(entry.mtime, 1_000_000_000)
    yield f"time={seconds}.{rest:09d}"
    if entry.target is not None:
        if entry.type == "link":
            yield f"link={escaped(entry.target)}"
        else:
            yield f"device=native,{entry.target.decode()}"
    if entry.digest is not None:
        yield f"sha256={entry.digest.hex()}"


def _comment(text: str) -> str:
    """Return a text that cannot end its line."""
    return "".join(char if char.isprintable() else "?" for char in text)

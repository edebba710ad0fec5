"""Files that only root may have written: what decides the content of a path, and whose it is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from .errors import UserError

_MAX_LINKS = 40  # as the kernel: path_resolution(7)


def read(path: str, what: str, *, secret: bool = False, limit: int = 1 << 20) -> str:
    """
    Return the text of a file that nobody but root can change; *what* is its name in errors.

    Raises UserError where it cannot be read, is no regular file, is too long or no text, or, for
    root, where somebody else owns or may write it, a directory on the way to it, or, of a
    *secret*, may read it.  For another user it is read as it is: it can do no more than they.
    """
    try:
        # Not to hang at a pipe that nobody writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise UserError(f"cannot read {what} {path}: {exc.strerror}") from exc
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise UserError(f"{what} {path} is not a regular file")
        trouble = _trouble_on_the_way(path, info, secret=secret) if os.geteuid() == 0 else None
        if trouble:
            raise UserError(f"{what} {path} is refused: {trouble[0]}", hint=trouble[1])
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise UserError(f"{what} {path} is refused: it has more than {limit} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise UserError(f"{what} {path} is not text in UTF-8: byte {exc.start}") from exc


def _trouble_on_the_way(
    path: str, opened: os.stat_result, *, secret: bool
) -> tuple[str, str] | None:
    last = "/"
    for last in _way(path if path.startswith("/") else os.path.join(os.getcwd(), path)):
        info = os.lstat(last)
        trouble = _trouble(last, info)
        if trouble:
            return trouble
    if not os.path.samestat(info, opened):
        return f"{last} was replaced meanwhile", "try again"
    if secret and info.st_mode & 0o077:
        return f"{last} can be read by others than its owner", f"chmod 600 {last}"
    return None


def _trouble(path: str, info: os.stat_result) -> tuple[str, str] | None:
    if info.st_uid != 0:
        return f"{path} belongs to user {info.st_uid}, not to root", f"chown root {path}"
    if stat.S_ISLNK(info.st_mode):  # whatever its mode says, it can only be replaced
        return None
    # Others may add to a sticky directory such as /tmp, but not replace what is root's in it.
    sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
    if info.st_mode & 0o022 and not sticky:
        return f"{path} can be written by others than its owner", f"chmod go-w {path}"
    return None


def _way(path: str) -> Iterator[str]:
    """Return each directory and link through which an absolute path leads, and its end."""
    yield "/"
    here, ahead, links = "/", path.split("/"), 0
    while ahead:
        name = ahead.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            continue
        here = os.path.join(here, name)
        yield here
        if os.path.islink(here):
            links += 1
            if links > _MAX_LINKS:
                raise UserError(f"too many symbolic links on the way to {path}")
            target = os.readlink(here)
            here = "/" if target.startswith("/") else os.path.dirname(here)
            ahead = target.split("/") + ahead

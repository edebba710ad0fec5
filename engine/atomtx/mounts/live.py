"""
Linux: directories that are shown live, each through a read-only bind of its own.

The bind has no mounts below it, keeps no times of access, and stays on its file system whatever
becomes of the mount that it was made from.  Whether that one stayed is asked of the host.

Sources: mount(2); openat(2): a descriptor leads into the mount namespace that it was opened in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import EffectError
from ..intents import Mount
from ..names import PLAIN, mounted_as
from ..records import Content
from .mountinfo import DELETED, Entry

_LOST_FOUND = "lost+found"


def open_directory(path: str, root: int | None = None) -> int:
    """
    Open an absolute path, from the directory *root* where it is given.

    NotADirectoryError for one that leads over a symbolic link: a user's must not lead us
    elsewhere.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open("/", flags) if root is None else os.dup(root)
    for part in filter(None, path.split("/")):
        above = here
        try:
            here = os.open(part, flags, dir_fd=above)
        finally:
            os.close(above)
    return here


def content_of(path: str) -> Content:
    """
    Tell whether a directory holds anything of anybody's.

    mke2fs(8) makes an empty lost+found in each file system.  Raises OSError.
    """
    content = Content.EMPTY
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name != _LOST_FOUND or not _is_bare(entry):
                return Content.FILES
            content = Content.BARE
    return content


def _is_bare(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is an empty directory; one that cannot be read may hold files."""
    try:
        with os.scandir(entry.path) as inside:
            return entry.is_dir(follow_symlinks=False) and next(inside, None) is None
    except OSError:
        return False


def opened(mounts: Sequence[Mount]) -> dict[str, int]:
    """
    Open what is to be shown live, by mountpoint, before anything covers it.

    Raises EffectError for what is on another device than the intent says.
    """
    found: dict[str, int] = {}
    try:
        for each in mounts:
            if each.volume_kind == PLAIN:
                found[each.mountpoint] = _proven(each)
    except BaseException:
        close(found)
        raise
    return found


def close(found: dict[str, int]) -> None:
    """Close what `opened` returned."""
    for descriptor in found.values():
        os.close(descriptor)


def _proven(each: Mount) -> int:
    try:
        descriptor = open_directory(each.source)
    except OSError as exc:
        raise EffectError(f"cannot read {each.source}: {exc.strerror}") from exc
    if _device(descriptor) != device_of(each):
        os.close(descriptor)
        raise EffectError(
            f"{each.source} is on another file system than a moment ago",
            hint="is what belongs there mounted?",
        )
    return descriptor


def shows(entry: Entry, each: Mount) -> bool:
    """Tell whether an entry of the table of mounts is of what a mount is to show."""
    if each.volume_kind == PLAIN:
        return f"{entry.dev}:{entry.root.removesuffix(DELETED)}" == each.guid
    return entry.thing == mounted_as(each.source)


def device_of(each: Mount) -> str:
    """Return the device of the file system that a mount shows, "major:minor"."""
    return ":".join(each.guid.split(":", 2)[:2])


def _device(descriptor: int) -> str:
    number = os.fstat(descriptor).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


class Watch:
    """The live directories as the host sees them; made before this process leaves its namespace."""

    def __init__(self, mounts: Sequence[Mount]) -> None:
        self._mounts = [each for each in mounts if each.volume_kind == PLAIN]
        self._root = open_directory("/") if self._mounts else -1

    def trouble(self) -> str | None:
        """Tell which of them is not the same file system any more; None where all are."""
        for each in self._mounts:
            try:
                descriptor = open_directory(each.source, self._root)
            except OSError as exc:
                return f"{each.source} cannot be found any more: {exc.strerror}"
            device = _device(descriptor)
            os.close(descriptor)
            if device != device_of(each):
                return f"{each.source} was unmounted, or mounted over, while the client read it"
        return None

"""
Which directories are read live, and what is left out.  Pure.

They are on file systems that have no snapshots, such as /boot: what is read of them is not a
moment.  So they are never taken for one by mistake: each is asked for as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from . import system
from .errors import UserError
from .inventory import ancestors, unfit_name
from .mounts.mountinfo import Entry, Table
from .names import is_within
from .plan import (
    SYSTEM_PATHS,
    Chosen,
    DirectoryFacts,
    LeftOut,
    Request,
    normal,
    path_order,
    shown,
)

_FROZEN = ("zfs", "btrfs")  # of which a snapshot can be taken; of LVM's, where there is room
# What the kernel shows of itself: no files of anybody's.
KERNELS = (
    *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts"),
    *("devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore"),
    *("rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs"),
)
_IN_MEMORY = ("tmpfs", "ramfs")

Identify = Callable[[str, Entry], DirectoryFacts]
Offers = Callable[[Entry], str]  # of what a snapshot can be taken in place of a mount; or empty
IsFile = Callable[[str], bool]  # whether a mountpoint is no directory


@dataclass(frozen=True)
class Found:
    """What a request comes to of directories that are read live."""

    named: tuple[str, ...] = ()  # in the user's order
    volumes: tuple[Chosen, ...] = ()
    skipped: tuple[LeftOut, ...] = ()  # by -r
    excluded: tuple[str, ...] = ()  # those of the request's exclusions that are below them


def select(
    request: Request,
    mounts: Table,
    identify: Identify,
    offers: Offers = lambda _: "",
    is_file: IsFile = lambda _: False,
) -> Found:
    """
    Return the directories that *request* has read live; with -r the file systems below as well.

    *identify* describes one by its path and the mount that it is on; *offers* tells what LVM has
    there; *is_file* is asked of what -r would take.  Raises UserError for one that cannot be read
    so, or of which a snapshot can be taken.
    """
    named = _named(request, mounts, offers)
    excluded = tuple(text for text in request.exclude if _is_below(text, named, mounts))
    gone = [normal(text) for text in excluded]
    chosen = dict(named)
    skipped: list[LeftOut] = []
    for entry in _below(named, mounts) if request.recursive else ():
        if any(is_within(entry.mountpoint, other) for other in gone):
            continue
        reason = _unfit_below(entry, chosen, is_file)
        if reason:
            skipped.append(LeftOut(entry.mountpoint, reason))
        else:
            chosen[entry.mountpoint] = entry
    volumes = [Chosen(identify(p, chosen[p]), p) for p in sorted(chosen, key=path_order)]
    return Found(tuple(named), tuple(volumes), tuple(skipped), excluded)


def exclusions(found: Found) -> Iterator[str]:
    """Yield what is left out at the user's word, in words."""
    for text in found.excluded:
        yield f"{shown(normal(text))} and all below it is left out at your word"


def _named(request: Request, mounts: Table, offers: Offers) -> dict[str, Entry]:
    named: dict[str, Entry] = {}
    for text in request.live:
        path = normal(text)
        entry = _readable(text, path, mounts, offers)
        if path in named:
            raise UserError(f"{shown(path)} is given twice", hint="name it once")
        named[path] = entry
    for path, entry in named.items():
        above = next((a for a in ancestors(path) if a in named), None)
        if above and (request.recursive or named[above] is entry):
            how = f"{above} with -r" if named[above] is not entry else above
            raise UserError(f"{path} is already included by {how}", hint=f"leave out {path}")
    return named


def _readable(text: str, path: str, mounts: Table, offers: Offers) -> Entry:
    """Return the mount that a directory is on; UserError where it is not to be read live."""
    if not system.here.NAMESPACES:
        raise UserError(
            f"{shown(path)} cannot be read live on {system.here.NAME}", hint="leave out --read-live"
        )
    if not text.startswith("/"):
        raise UserError(f"--read-live needs an absolute path, not {text!r}")
    if why := unfit_name(path):
        raise UserError(f"the name of {shown(path)} {why}", hint="rename it")
    entry = mounts.containing(path)
    if entry is None or entry.fstype in KERNELS:
        what = f"{entry.fstype} at {shown(entry.mountpoint)}" if entry else "no mount"
        raise UserError(
            f"{shown(path)} is on {what}, which holds no files of anybody's",
            hint="name a directory of a file system",
        )
    if what := entry.fstype if entry.fstype in _FROZEN else offers(entry):
        raise UserError(
            f"{shown(path)} is on {what}, of which a snapshot can be taken",
            hint="name it without --read-live; is what belongs there mounted?",
        )
    return entry


def _is_below(text: str, tops: Iterable[str], mounts: Table) -> bool:
    """Tell whether an exclusion is of a mount below a directory that is read live."""
    if not text.startswith("/"):
        return False
    path = normal(text)
    entry = mounts.topmost(path)
    is_ours = entry is not None and entry.fstype not in _FROZEN
    return is_ours and any(is_within(path, top) and path != top for top in tops)


def _below(tops: Iterable[str], mounts: Table) -> list[Entry]:
    tops = tuple(tops)
    ignored = SYSTEM_PATHS if "/" in tops else ()
    found = {e.mountpoint: e for top in tops for e in mounts.visible_below(top)}
    return [
        found[path]
        for path in sorted(found, key=path_order)
        if path not in tops and not any(is_within(path, other) for other in ignored)
    ]


def _unfit_below(entry: Entry, chosen: dict[str, Entry], is_file: IsFile) -> str | None:
    """Tell why -r does not take a mount; None where it does."""
    source = shown(entry.source)
    if entry.fstype in _FROZEN:
        return f"it is on {entry.fstype}, of which a snapshot can be taken; name it as well"
    if entry.fstype in KERNELS:
        return f"it is a {entry.fstype}, which holds no files of anybody's"
    if why := unfit_name(entry.mountpoint):
        return f"its name {why}"
    if entry.is_deleted:
        return "it is a directory that was deleted since it was mounted"
    for path, other in chosen.items():
        if entry.dev == other.dev and is_within(entry.root, inside(path, other)):
            return f"it is the files of {path} once more"
    if entry.dev.startswith("0:"):  # no device of its own: in memory, from afar, put together
        what = "in memory" if entry.fstype in _IN_MEMORY else f"a {entry.fstype}, {source}"
        return f"it is {what}; name it with --read-live to have it"
    if is_file(entry.mountpoint):  # asked last: what is from afar may not answer
        return "it is a single file; the one that it hides is saved"
    return None


def inside(path: str, entry: Entry) -> str:
    """Return the directory of the file system that is seen at *path*, which is on *entry*."""
    rest = path.removeprefix(entry.mountpoint.rstrip("/"))
    return normal(f"{entry.root}/{rest}")


def read_live(volumes: Sequence[Chosen]) -> Iterator[str]:
    """Yield a line for each volume that is not a moment."""
    for facts, path in volumes:
        if isinstance(facts, DirectoryFacts):
            source = shown(facts.source)
            yield (
                f"{path} is not a moment: it is read live, while it may change "
                f"({facts.fstype}, {source})"
            )

"""
FreeBSD: nullfs of `.zfs/snapshot/NAME`, and mounts by the id of their file system.

The kernel mounts a snapshot itself as soon as its name below `.zfs/snapshot` is walked, and
lets it stay.  nullfs on top of that is what the client reads.  Both are the host's: they outlive
a crash until the next boot.  A mount is unmounted by its fsid, which is no other mount's, never
by force.

Sources: mount(8), mount_nullfs(8), umount(8); docs/freebsd.md has those of each detail.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from .. import process
from ..errors import EffectError
from ..intents import Mount
from ..names import Snapshot
from ..system import freebsd
from .mountinfo import Entry, Table, prefixes

_CONTROL = "/.zfs/snapshot/"
_MAX_PATH_BYTES = 1023  # MNAMELEN: the kernel cuts a longer "from" without a word


def read() -> Table:
    """Ask mount(8), in a form in which a blank in a name means nothing; EffectError if it fails."""
    done = process.run(["mount", "--libxo", "json", "-v"], cwd="/")
    hint = "FreeBSD 14 or later is needed"
    if not done.ok:
        raise done.error("cannot list the mounts", hint=hint)
    try:
        return parse(done.stdout)
    except (KeyError, ValueError) as exc:
        raise EffectError(f"cannot understand what mount says: {exc!r}", hint=hint) from exc


def parse(text: str) -> Table:
    """Read what `mount --libxo json -v` prints: the mounts in the order of their making."""
    made: list[Entry] = []
    children: dict[tuple[int, str], Entry] = {}
    for n, each in enumerate(json.loads(text)["mount"]["mounted"]):
        mountpoint = _normal(each["node"])
        parent = _containing(children, mountpoint)
        entry = Entry(
            id=int(each["fsid"], 16) if "fsid" in each else -1 - n,
            parent=parent.id if parent else 0,
            dev="",
            root="/",
            mountpoint=mountpoint,
            options=",".join(each.get("opts", ())),
            propagation=(),
            fstype=each["fstype"],
            source=each["special"],
            super_options="",
        )
        made.append(entry)
        children[entry.parent, mountpoint] = entry
    return Table(_with_origins(Table(made)))


def _normal(path: str) -> str:
    return re.sub("/+", "/", path)  # the kernel's name of a snapshot of "/" begins with two


def _containing(children: dict[tuple[int, str], Entry], path: str) -> Entry | None:
    """Return the mount that *path* is on, among those made so far."""
    here: Entry | None = None
    for prefix in ("/", *prefixes(path)) if path != "/" else ("/",):
        while above := children.get((here.id if here else 0, prefix)):
            here = above
    return here


def _with_origins(table: Table) -> Iterator[Entry]:
    """Name the snapshot as the source of a nullfs of it, in the place of a path."""
    for entry in table:
        origin = _snapshot_at(table, _normal(entry.source)) if entry.fstype == "nullfs" else None
        yield replace(entry, source=origin) if origin else entry


def _snapshot_at(table: Table, path: str) -> str | None:
    found = table.topmost(path)
    if found and found.fstype == "zfs" and "@" in found.source:
        return found.source
    live, control, name = path.rpartition(_CONTROL)
    dataset = table.topmost(live or "/") if control and "/" not in name else None
    return f"{dataset.source}@{name}" if dataset and dataset.fstype == "zfs" else None


def make(mounts: Sequence[Mount], *, lock: int | None) -> None:
    """
    Make the mounts, parents first; idempotent.

    The programs inherit *lock*, so that a recovery waits for those of a killed front end.
    """
    table = read()
    for each in mounts:
        found = table.topmost(each.mountpoint)
        if found is None or found.source != each.source:
            _mount(each, _origin(table, each), lock)


def _origin(table: Table, each: Mount) -> str:
    """Return the path of a snapshot below its dataset's mountpoint."""
    snapshot = Snapshot.parse(each.source)
    dataset = str(snapshot.dataset)
    live = [e for e in table if e.fstype == "zfs" and e.source == dataset]
    seen = [e for e in live if table.topmost(e.mountpoint) is e]
    if not seen:
        raise EffectError(
            f"cannot mount {each.source}: {dataset} is {'hidden' if live else 'not mounted'}",
            hint=f"mount {dataset}: its snapshots are seen below its mountpoint alone",
        )
    return seen[0].mountpoint.rstrip("/") + _CONTROL + snapshot.name


def _mount(each: Mount, origin: str, lock: int | None) -> None:
    for path in (origin, each.mountpoint):
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise EffectError(f"cannot mount {each.source}: {path} is too long")
    # mount(8) follows links: one of a user's, in the frozen files, must not lead us elsewhere.
    if os.path.realpath(each.mountpoint) != each.mountpoint:
        raise EffectError(
            f"cannot mount {each.source} at {each.mountpoint}: the way there leads over a "
            "symbolic link, or is not there in the frozen parent"
        )
    done = process.run(
        ["mount", "-t", "nullfs", "-o", "ro,nosuid", origin, each.mountpoint],
        cwd="/",
        pass_fds=() if lock is None else (lock,),
    )
    if not done.ok:
        hint = f"is `zfs get snapdir {Snapshot.parse(each.source).dataset}` disabled?"
        raise done.error(f"cannot mount {each.source} at {each.mountpoint}", hint=hint)


def remove(mounts: Sequence[Mount], *, lock: int | None = None) -> list[Mount]:
    """
    Unmount what is ours, children first, then what the kernel mounted for it; idempotent.

    What is where was proven by one look: an fsid is the same mount as long as there is one.
    Returns the mounts that are busy.
    """
    busy = []
    table = read()
    for each in reversed(mounts):
        stack = [e for e in table if e.mountpoint == each.mountpoint and e.fstype == "nullfs"]
        ours = [e for e in stack if e.source == each.source]
        if not all(_unmount(entry, lock) for entry in reversed(ours)):
            busy.append(each)
    expire({each.source for each in mounts}, table, lock=lock)
    return busy


def expire(
    snapshots: Collection[str], table: Table | None = None, *, lock: int | None = None
) -> None:
    """
    Unmount what the kernel mounted of *snapshots* below `.zfs/snapshot`; idempotent.

    It never would, and a channel program cannot destroy a snapshot that is mounted.  One that
    somebody uses stays.
    """
    for entry in reversed(table or read()):
        if entry.fstype == "zfs" and entry.source in snapshots and _CONTROL in entry.mountpoint:
            _unmount(entry, lock)


def _unmount(entry: Entry, lock: int | None) -> bool:
    """
    Unmount one mount, never by force; False where it is busy.

    Idempotent.  umount(8) takes what is no fsid for a path: hence the directory that it stands
    in; and where the fsid is gone, it tries the path, where another's may be by now: hence it
    inherits *lock*, and a recovery waits for it.  EffectError for any other failure.
    """
    if entry.id < 0:
        raise EffectError(f"cannot tell which mount is at {entry.mountpoint}", hint="run as root")
    held = () if lock is None else (lock,)
    done = process.run(["umount", f"{entry.id:016x}"], cwd="/", pass_fds=held)
    if done.ok or all(e.id != entry.id for e in read()):
        return True
    if "busy" in done.stderr:  # "Device busy": strerror(3), untranslated in our environment
        return False
    raise done.error(f"cannot unmount {entry.mountpoint}")


def users(snapshots: Collection[str]) -> list[int]:
    """Return the processes that use a mount of *snapshots*."""
    places = [e.mountpoint for e in read() if e.source in snapshots]
    return freebsd.users(places) if places else []

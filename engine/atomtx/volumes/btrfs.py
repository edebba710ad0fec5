"""
btrfs subvolumes: take, prove, keep and destroy read-only snapshots of them.

They lie in a directory of the run's own at the top level of the file system, which nobody may
enter, under a random name.  There are no holds: nothing keeps root from deleting one, and a
deletion succeeds under a reader, who then finds an empty tree.  So ours are destroyed only when
no process of the run lives and none has them mounted, and the runner looks at the end whether its
mounts still have something to show.

A snapshot is ours if its path has the run's token, it is read-only, its parent is the subvolume
that the plan names, it is no older than the plan, and, once journaled, its UUID is that UUID.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from .. import btrfsio
from ..errors import EffectError, UserError
from ..intents import Source, TakeSnapshots
from ..mounts import inhabitants
from ..names import BtrfsSnapshot, RunId
from ..plan import PlannedVolume
from ..records import Volume
from ..subvolumes import Filesystem, Subvolume
from .kind import Identity

_IN_USE = (errno.EBUSY, errno.EPERM, errno.ETXTBSY)  # EPERM: it is being sent, or the default
_KEPT = "atomtx-kept"


class Subvolumes:
    """btrfs subvolumes; their snapshots are taken one after the other."""

    def trouble(self, volumes: Collection[PlannedVolume]) -> str | None:
        """Tell which file system is not there."""
        filesystems = sorted({v.pool_guid for v in volumes})
        return next(filter(None, map(problem, filesystems)), None)

    def identities(self, volumes: Sequence[PlannedVolume]) -> dict[str, Identity]:
        """
        Return what each volume's snapshot is.

        Raises EffectError where a file system cannot be asked.
        """
        found: dict[str, Identity] = {}
        for filesystem in sorted({v.pool_guid for v in volumes}):
            with _reached(filesystem, "look at its snapshots") as top:
                for volume in (v for v in volumes if v.pool_guid == filesystem):
                    info = _look(top, BtrfsSnapshot.parse(volume.snapshot))
                    if info:
                        found[volume.snapshot] = _identity(volume, info)
        return found

    def renamed(self, run: str, lost: Sequence[Volume]) -> dict[str, Identity]:
        """Find nothing: the path is a part of the proof, and only a person moves a snapshot."""
        return {}

    def unreadable(self, volumes: Sequence[PlannedVolume]) -> str | None:
        """Tell nothing: what is mounted can be read."""
        return None

    # -- changing --------------------------------------------------------------------------

    def take(self, intent: TakeSnapshots) -> EffectError | None:
        """Take the snapshots of one file system, one after the other, each durable at once."""
        try:
            with _reached(intent.pool_guid, "take its snapshots") as top:
                for source, name in zip(intent.sources, intent.snapshots, strict=True):
                    _take(top, source, BtrfsSnapshot.parse(name))
        except EffectError as exc:
            return exc
        return None

    def hold(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Do nothing: there are no holds."""

    def release(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Do nothing: there are no holds."""

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Destroy the snapshots that are still these, each by its id.

        A power cut undoes that until `sweep` has made it durable.
        """
        verdicts: dict[str, str] = {}
        for filesystem, part in _by_filesystem(identities):
            with _reached(filesystem, "destroy its snapshots") as top:
                mounted = bool(inhabitants.mounted([each.name for each in part]))
                verdicts |= {each.name: _destroy(top, each, run, mounted) for each in part}
        return verdicts

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """Give the run's directory, and what lies beside it, a name that says kept: see `sweep`."""
        verdicts: dict[str, str] = {}
        for filesystem, part in _by_filesystem(identities):
            with _reached(filesystem, "keep its snapshots") as top:
                proven = {each.name: _prove(top, each, run) for each in part}
                kept = {name for name, found in proven.items() if isinstance(found, btrfsio.Info)}
                verdicts |= {n: f if isinstance(f, str) else "done" for n, f in proven.items()}
                for name in sorted({BtrfsSnapshot.parse(n).path.split("/")[1] for n in kept}):
                    _rename(top, name, _KEPT + name.removeprefix(".atomtx"))
        return verdicts

    def sweep(self, volumes: Sequence[PlannedVolume], *, run: str) -> None:
        """Remove the run's directory where it is empty, and make all of the cleanup durable."""
        for filesystem in sorted({v.pool_guid for v in volumes}):
            with _reached(filesystem, "remove its directory there") as top:
                _remove_directory(top, "." + RunId(run).token)
                btrfsio.commit(top)

    def links(self, snapshots: Collection[str]) -> Iterator[str]:
        """Say what the kernel does not tell."""
        yield "unless it is mounted, it is being sent (`btrfs send`) or is the default subvolume"


def find(path: str, device: str) -> Filesystem:
    """Return the file system at *path*, whose *device* the table of mounts tells."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            uuid, generation = btrfsio.identify(descriptor)
            rows = btrfsio.subvolumes(descriptor)
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise UserError(
            f"cannot list the subvolumes at {path}: {exc.strerror}", hint=_hint(exc)
        ) from exc
    found = (Subvolume(r.id, r.path, r.uuid, r.parent_uuid, r.is_readonly) for r in rows)
    return Filesystem(uuid, device, generation, tuple(found))


def problem(filesystem: str) -> str | None:
    """Tell why a file system cannot be reached; None where it can."""
    try:
        with btrfsio.top_level(filesystem):
            return None
    except FileNotFoundError:
        return f"the btrfs file system {filesystem} is not mounted"
    except OSError as exc:
        return f"the btrfs file system {filesystem} cannot be used: {exc.strerror}"


def mounted() -> list[str]:
    """Return the UUIDs of the file systems that are mounted."""
    return btrfsio.mounted()


def marked() -> Iterator[tuple[PlannedVolume, Identity]]:
    """
    Yield what has our names on the file systems that are mounted and can be written to.

    Each as the volume that a plan would have, of which the source is what the snapshot says.
    """
    for filesystem in mounted():
        with suppress(OSError), btrfsio.top_level(filesystem) as top:
            for row in btrfsio.subvolumes(top):
                snapshot = BtrfsSnapshot(filesystem, row.path)
                if row.is_readonly and snapshot.run and (info := _look(top, snapshot)):
                    volume = _found(snapshot, info)
                    yield volume, _identity(volume, info)


def _found(snapshot: BtrfsSnapshot, info: btrfsio.Info) -> PlannedVolume:
    filesystem, source = snapshot.filesystem, Source(0, info.parent_uuid, "", 0)
    return PlannedVolume(
        "btrfs", filesystem, filesystem, str(snapshot), "", "", str(snapshot), source
    )


@contextmanager
def _reached(filesystem: str, what: str) -> Iterator[int]:
    try:
        with btrfsio.top_level(filesystem) as top:
            yield top
    except OSError as exc:
        about = f" ({exc.filename})" if exc.filename else ""
        raise EffectError(
            f"btrfs file system {filesystem}: cannot {what}: {exc.strerror}{about}",
            hint=_hint(exc),
        ) from exc


def _hint(exc: OSError) -> str | None:
    match exc.errno:
        case errno.ENOSPC:
            return "the file system has no room for a snapshot; see `btrfs filesystem usage`"
        case errno.EPERM | errno.EACCES:
            return "run atomtx as root"
        case errno.ETXTBSY:
            return "a subvolume with an active swap file cannot be snapshotted; name others"
    return None


def _by_filesystem(identities: Sequence[Identity]) -> Iterator[tuple[str, list[Identity]]]:
    parts: dict[str, list[Identity]] = {}
    for each in identities:
        parts.setdefault(BtrfsSnapshot.parse(each.name).filesystem, []).append(each)
    yield from parts.items()


def _open(top: int, path: str) -> int:
    """Open a directory below the top level: a subvolume's path leads over no symbolic link."""
    here = os.dup(top)
    for part in filter(None, path.split("/")):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            below = os.open(part, flags, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def _look(top: int, snapshot: BtrfsSnapshot) -> btrfsio.Info | None:
    """Describe what has a snapshot's path; None where nothing has, or what has is no subvolume."""
    try:
        descriptor = _open(top, snapshot.path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        is_subvolume = os.fstat(descriptor).st_ino == btrfsio.ROOT_INODE
        return btrfsio.info(descriptor) if is_subvolume else None
    finally:
        os.close(descriptor)


def _identity(volume: PlannedVolume, info: btrfsio.Info) -> Identity:
    assert volume.source
    ours = (
        info.is_readonly
        and info.parent_uuid == volume.source.uuid
        and info.created >= volume.source.generation
    )
    run = BtrfsSnapshot.parse(volume.snapshot).run
    return Identity(
        name=volume.snapshot,
        guid=info.uuid,
        createtxg=str(info.created),
        creation_s=info.created_s,
        mark=run if ours else None,
    )


def _take(top: int, source: Source, snapshot: BtrfsSnapshot) -> None:
    live = _open(top, source.path)
    try:
        found = btrfsio.info(live)
        if (found.id, found.uuid) != (source.id, source.uuid):
            raise EffectError(
                f"{source.path} is not the subvolume any more that it was a moment ago",
                hint="try again",
            )
        parent = _run_directory(top, snapshot.directory)
        try:
            btrfsio.snapshot(live, parent, snapshot.path.rpartition("/")[2])
        finally:
            os.close(parent)
    finally:
        os.close(live)


def _run_directory(top: int, name: str) -> int:
    """Open the run's directory, which is made where it is not there yet."""
    if name:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=top)
    return _open(top, name)


def _remove_directory(top: int, name: str) -> None:
    try:
        os.rmdir(name, dir_fd=top)
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # gone; not only ours
            raise


def _prove(top: int, identity: Identity, run: str) -> btrfsio.Info | str:
    """Return what a snapshot is where it is still the one; else the verdict."""
    snapshot = BtrfsSnapshot.parse(identity.name)
    found = _look(top, snapshot)
    if found is None:
        return "absent"
    if (found.uuid, str(found.created)) != (identity.guid, identity.createtxg):
        return "foreign"
    return found if found.is_readonly and snapshot.run == run else "unmarked"


def _destroy(top: int, identity: Identity, run: str, mounted: bool) -> str:
    """Destroy one snapshot; *mounted* tells whether anything of its file system's part is."""
    found = _prove(top, identity, run)
    if isinstance(found, str):
        return found
    if mounted and inhabitants.mounted([identity.name]):
        return "busy"
    try:
        btrfsio.destroy(top, found.id)
    except FileNotFoundError:
        return "absent"
    except OSError as exc:
        if exc.errno not in _IN_USE:
            raise
        return "busy"
    return "done"


def _rename(top: int, name: str, new: str) -> None:
    with suppress(FileNotFoundError):
        os.rename(name, new, src_dir_fd=top, dst_dir_fd=top)

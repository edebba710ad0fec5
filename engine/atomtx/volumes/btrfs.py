"""
btrfs subvolumes: take, prove, keep and destroy read-only snapshots of them.

They lie in a directory of the run's own at the top level of the file system, which nobody may
enter, under a random name.  There are no holds: nothing keeps root from deleting one, and a
deletion succeeds under a reader, who then finds an empty tree.  So ours are destroyed only when
no process of the run lives and none has them mounted, and the runner looks at the end whether its
mounts still have something to show.

A snapshot is ours if its path has the run's token, it is read-only, its parent is the subvolume
that the plan names, it is no older than the plan, and, once journaled, its UUID is that UUID.

One that is to stay is in the run's directory as well until the whole moment is journaled.  Then one
rename makes that directory the user's, under a name of the convention, in one of two directories of
the top level: which of them is the mark.  There it counts as kept if it is read-only, and it is of
the subvolume that is its parent.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from .. import btrfsio
from ..errors import EffectError, UserError
from ..intents import Source, TakeSnapshots
from ..mounts import inhabitants
from ..mounts.mountinfo import Table
from ..names import BTRFS, KEPT_DIRECTORY, TRANSIENT_DIRECTORY, BtrfsSnapshot, RunId
from ..plan import PlannedVolume, SubvolumeFacts, normal
from ..records import Volume
from ..subvolumes import Filesystem, Subvolume, is_on_btrfs
from .kind import Identity, Kept

# EPERM: it is being sent, or the default; ENOTEMPTY: somebody has made a subvolume in it.
_IN_USE = (errno.EBUSY, errno.EPERM, errno.ETXTBSY, errno.ENOTEMPTY)
_KEPT = "atomtx-kept"  # what becomes of the name of a backup's directory
_OURS = "ours"


class Subvolumes:
    """btrfs subvolumes; their snapshots are taken one after the other."""

    def mend(self, volumes: Collection[PlannedVolume]) -> None:
        """Do nothing: an ioctl is done or not."""

    def trouble(self, volumes: Collection[PlannedVolume]) -> str | None:
        """Tell which file system is not there."""
        filesystems = sorted({v.pool_guid for v in volumes})
        return next(filter(None, map(problem, filesystems)), None)

    def identities(self, volumes: Sequence[PlannedVolume]) -> dict[str, Identity]:
        """
        Return what each volume's snapshot is; one that was kept has no mark of the run any more.

        Raises EffectError where a file system cannot be asked.
        """
        found: dict[str, Identity] = {}
        for filesystem in sorted({v.pool_guid for v in volumes}):
            with _reached(filesystem, "look at its snapshots") as top:
                for volume in (v for v in volumes if v.pool_guid == filesystem):
                    if identity := _identify(top, volume):
                        found[volume.snapshot] = identity
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
                    snapshot = BtrfsSnapshot.parse(name)
                    if snapshot.keeper:
                        _check_kept_directory(top, snapshot.directory.partition("/")[0])
                    _take(top, source, snapshot.taken_as)
        except EffectError as exc:
            return exc
        return None

    def ready(self, volumes: Sequence[PlannedVolume]) -> None:
        """Do nothing: a snapshot is mounted as it is."""

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
                now = {each.name: _as_taken(each) for each in part}
                mounted = bool(inhabitants.mounted([each.name for each in now.values()]))
                verdicts |= {n: _destroy(top, each, run, mounted) for n, each in now.items()}
        return verdicts

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Give the run's directory, and what lies beside it, a name that says kept: see `sweep`.

        One that was kept by this run already is "done".
        """
        verdicts: dict[str, str] = {}
        for filesystem, part in _by_filesystem(identities):
            with _reached(filesystem, "keep its snapshots") as top:
                found = {each.name: _keepable(top, each, run) for each in part}
                verdicts |= {n: "done" if v == _OURS else v for n, v in found.items()}
                ours = (BtrfsSnapshot.parse(name) for name, v in found.items() if v == _OURS)
                for old, new in sorted(set(map(_renaming, ours))):
                    _rename(top, old, new)
        return verdicts

    def sweep(self, volumes: Sequence[PlannedVolume], *, run: str) -> None:
        """Remove the run's directory where it is empty, and make all of the cleanup durable."""
        for filesystem in sorted({v.pool_guid for v in volumes}):
            with _reached(filesystem, "remove its directory there") as top:
                _remove_directory(top, "." + RunId(run).token)
                btrfsio.commit(top)

    def links(self, snapshots: Collection[str]) -> Iterator[str]:
        """Say what the kernel does not tell."""
        yield "unless it is mounted, it is being sent, is the default, or has a subvolume in it"


def find(path: str, device: str) -> Filesystem:
    """Return the file system at *path*, whose *device* the table of mounts tells."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            uuid, generation = btrfsio.identify(descriptor)
            btrfsio.check_only(uuid)
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


def keepers() -> Iterator[str]:
    """Yield for each kept snapshot of the file systems that are mounted the run that kept it."""
    for filesystem in mounted():
        with suppress(OSError), btrfsio.top_level(filesystem) as top:
            for row in btrfsio.subvolumes(top):
                if row.is_readonly and (run := BtrfsSnapshot(filesystem, row.path).keeper):
                    yield run


def _found(snapshot: BtrfsSnapshot, info: btrfsio.Info) -> PlannedVolume:
    filesystem, source = snapshot.filesystem, Source(0, info.parent_uuid, "", 0)
    return PlannedVolume(
        BTRFS, filesystem, filesystem, str(snapshot), "", "", str(snapshot), source
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
        case errno.ENOTUNIQ:
            return "both have the same UUID; `btrfstune -u` gives a clone one of its own"
        case errno.ETXTBSY:
            return "a subvolume with an active swap file cannot be snapshotted; name others"
    return None


def _by_filesystem(identities: Sequence[Identity]) -> Iterator[tuple[str, list[Identity]]]:
    parts: dict[str, list[Identity]] = {}
    for each in identities:
        parts.setdefault(BtrfsSnapshot.parse(each.name).filesystem, []).append(each)
    yield from parts.items()


def _identify(top: int, volume: PlannedVolume) -> Identity | None:
    """Return what a volume's snapshot is: where it was taken, or else where it was kept."""
    snapshot = BtrfsSnapshot.parse(volume.snapshot)
    if info := _look(top, snapshot.taken_as):
        return _identity(volume, info)
    if snapshot.keeper and (info := _look(top, snapshot)):
        return replace(_identity(volume, info), mark=None)
    return None


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
    run = BtrfsSnapshot.parse(volume.snapshot).taken_as.run
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
    # rmdir(2) would remove an empty subvolume, too (Linux 4.18).
    with suppress(FileNotFoundError):
        if os.stat(name, dir_fd=top, follow_symlinks=False).st_ino == btrfsio.ROOT_INODE:
            return
    try:
        os.rmdir(name, dir_fd=top)
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.ENOTDIR):  # gone; not only ours
            raise


def _prove(top: int, identity: Identity, run: str) -> btrfsio.Info | str:
    """Return what a snapshot is where it is still the one; else the verdict."""
    found = _same(top, identity)
    if isinstance(found, str):
        return found
    is_marked = BtrfsSnapshot.parse(identity.name).run == run
    return found if found.is_readonly and is_marked else "unmarked"


def _same(top: int, each: Identity | Kept) -> btrfsio.Info | str:
    """Return what has the place if it is what was there, whatever its mark; else the verdict."""
    found = _look(top, BtrfsSnapshot.parse(each.name))
    if found is None:
        return "absent"
    is_same = (found.uuid, str(found.created)) == (each.guid, each.createtxg)
    return found if is_same else "foreign"


def _destroy(top: int, identity: Identity, run: str, mounted: bool) -> str:
    """Destroy one snapshot; *mounted* tells whether anything of its file system's part is."""
    found = _prove(top, identity, run)
    if isinstance(found, str):
        return found
    if mounted and inhabitants.mounted([identity.name]):
        return "busy"
    return _deleted(top, found)


def _deleted(top: int, found: btrfsio.Info) -> str:
    try:
        btrfsio.destroy(top, found.id)
    except FileNotFoundError:
        return "absent"
    except OSError as exc:
        if exc.errno not in _IN_USE:
            raise
        return "busy"
    return "done"


# -- those that stay ---------------------------------------------------------------------------


def filesystems(texts: Iterable[str], table: Table) -> list[Filesystem]:
    """List the subvolumes of each btrfs that one of *texts* is a path on."""
    paths: dict[str, str] = {}
    for text in texts:
        entry = table.containing(normal(text)) if is_on_btrfs(table, text) else None
        if entry:
            paths.setdefault(entry.dev, entry.mountpoint)
    return [find(path, device) for device, path in paths.items()]


def kept(subvolumes: Iterable[SubvolumeFacts]) -> list[Kept]:
    """
    Return all read-only snapshots of *subvolumes*, whoever took them.

    But not those that a run has for itself.  Raises EffectError where a file system cannot be
    asked.
    """
    parts: dict[str, dict[str, str]] = {}
    for facts in subvolumes:
        parts.setdefault(facts.filesystem, {})[facts.source.uuid] = facts.name
    found: list[Kept] = []
    for filesystem, names in parts.items():
        with _reached(filesystem, "list its snapshots") as top:
            found += _kept_of(top, filesystem, names)
    return found


def _kept_of(top: int, filesystem: str, names: Mapping[str, str]) -> Iterator[Kept]:
    """Yield the snapshots of the subvolumes whose *names* are given by their UUIDs."""
    for row in btrfsio.subvolumes(top):
        snapshot = BtrfsSnapshot(filesystem, row.path)
        if not (row.is_readonly and row.parent_uuid in names) or snapshot.run:
            continue
        info = _look(top, snapshot)
        if info and (info.id, info.is_readonly) == (row.id, True):
            keeper = _keeper(top, snapshot)
            yield Kept(
                name=str(snapshot),
                guid=info.uuid,
                createtxg=str(info.created),
                creation_s=info.created_s,
                keeper=keeper,
                holds=0,
                clones=(),
                is_transient=bool(keeper) and snapshot.is_transient,
                subvolume=names[row.parent_uuid],
            )


def _keeper(top: int, snapshot: BtrfsSnapshot) -> str:
    """Return the run that kept it, where root alone could make that place; else nothing."""
    moment = snapshot.directory
    places = (moment.partition("/")[0], moment)
    is_marked = snapshot.keeper and all(_is_roots(top, place) for place in places)
    return snapshot.keeper or "" if is_marked else ""


def _is_roots(top: int, path: str) -> bool:
    """Tell whether a path is a directory of the top level, and root's; false where it is gone."""
    try:
        there = os.stat(path, dir_fd=top, follow_symlinks=False)
    except FileNotFoundError:
        return False
    is_plain = stat.S_ISDIR(there.st_mode) and there.st_dev == os.fstat(top).st_dev
    return is_plain and there.st_uid == os.geteuid()


def guids(filesystem: str, names: Iterable[str]) -> dict[str, str]:
    """Return the UUID of what has each name now; EffectError where that cannot be asked."""
    with _reached(filesystem, "look at its snapshots") as top:
        looked = {name: _look(top, BtrfsSnapshot.parse(name)) for name in names}
        return {name: info.uuid for name, info in looked.items() if info}


def uuids(filesystem: str) -> set[str]:
    """Return the UUID of every subvolume; EffectError where that cannot be asked."""
    with _reached(filesystem, "list its subvolumes") as top:
        return {row.uuid for row in btrfsio.subvolumes(top)}


def prune(filesystem: str, snapshots: Sequence[Kept]) -> Iterator[dict[str, str]]:
    """
    Destroy kept snapshots of one file system that are still these.

    Each is proven just before it is destroyed by its id, which no other subvolume ever gets.
    Yields verdicts by name as they are known, those of `Subvolumes.destroy`; all of it is durable
    once the last was asked for, or the iterator is closed.  Idempotent.
    """
    with _reached(filesystem, "destroy its snapshots") as top:
        try:
            for each in snapshots:
                yield {each.name: _prune(top, each)}
        finally:
            _tidy(top)
            btrfsio.commit(top)


def tidy(filesystem: str) -> None:
    """Remove the directories of moments of which nothing is left; idempotent."""
    with _reached(filesystem, "remove empty directories there") as top:
        _tidy(top)


def _prune(top: int, each: Kept) -> str:
    snapshot, found = BtrfsSnapshot.parse(each.name), _same(top, each)
    if isinstance(found, str):
        return found
    is_marked = not each.keeper or each.keeper == _keeper(top, snapshot)
    if each.is_transient:
        is_marked = is_marked and snapshot.is_transient
    if not (found.is_readonly and is_marked):
        return "unmarked"
    return "busy" if inhabitants.mounted([each.name]) else _deleted(top, found)


def _tidy(top: int) -> None:
    for directory in (KEPT_DIRECTORY, TRANSIENT_DIRECTORY):
        try:
            here = _open(top, directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            for name in os.listdir(here):
                if BtrfsSnapshot("", f"/{directory}/{name}/0").keeper:
                    _tidy_moment(here, name)
        finally:
            os.close(here)


def _tidy_moment(here: int, name: str) -> None:
    """Remove a moment's directory if it is empty; one that is immutable or mounted on stays."""
    try:
        _remove_directory(here, name)
    except OSError as exc:
        if exc.errno not in _IN_USE:
            raise


def _check_kept_directory(top: int, name: str) -> None:
    """Raise EffectError where no directory could be moved into what has the name."""
    if name in os.listdir(top) and not _is_roots(top, name):
        raise EffectError(
            f"/{name} below the top level is no directory of root's: no snapshot can be kept there",
            hint="move it away",
        )


def _as_taken(identity: Identity) -> Identity:
    return replace(identity, name=str(BtrfsSnapshot.parse(identity.name).taken_as))


def _keepable(top: int, identity: Identity, run: str) -> str:
    """Return _OURS for a snapshot that is to be kept, "done" for one that is; else the verdict."""
    found = _prove(top, _as_taken(identity), run)
    if isinstance(found, btrfsio.Info):
        return _OURS
    if found != "absent" or BtrfsSnapshot.parse(identity.name).keeper != run:
        return found
    kept = _same(top, identity)
    return kept if isinstance(kept, str) else "done"


def _renaming(snapshot: BtrfsSnapshot) -> tuple[str, str]:
    """Return what is renamed to keep a snapshot, and the new name."""
    if snapshot.keeper:
        return snapshot.taken_as.directory, snapshot.directory
    name = snapshot.path.split("/")[1]
    return name, _KEPT + name.removeprefix(".atomtx")


def _rename(top: int, name: str, new: str) -> None:
    parent, _, last = new.rpartition("/")
    if not parent:
        with suppress(FileNotFoundError):
            os.rename(name, new, src_dir_fd=top, dst_dir_fd=top)
        return
    there = _run_directory(top, parent)
    try:
        os.rename(name, last, src_dir_fd=top, dst_dir_fd=there)
    finally:
        os.close(there)

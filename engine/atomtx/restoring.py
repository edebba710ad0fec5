"""
A run's backup brought back into a directory of its own, by the client's own commands.

What is restored is other people's files: the directory is ours alone to read, and goes away with
the block that it is for, whatever ends that.  One that a killed process left is known by a mark in
it, and by a lock that nobody holds, and goes with the next.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import clients, locks, process
from .clients import Cacher, Dumper
from .errors import EffectError, UserError
from .history import Backup
from .interrupts import Interrupts
from .launching import bare_settings_of, facts_of, settings_of
from .mounts import mountinfo
from .plan import ClientPlan
from .sessions import Sessions
from .statedir import RunFolder
from .states import Outcome
from .verifying import Room

PREFIX = "atomtx-verify-"
_MARK = ".atomtx-verify"  # holds the directory's name: a copy of it, or one renamed, is the user's
_MADE = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}")  # by tempfile


# -- the commands ------------------------------------------------------------------------------


def saved(row: Backup) -> clients.Backup:
    """Return a row of the journal as the client knows it."""
    return clients.Backup(
        paths=row.paths,
        outcome=Outcome(row.outcome),
        backup_id=row.backup_id,
        reason=row.reason,
        bytes_added=row.bytes_added,
        bytes_processed=row.bytes_processed,
        files_processed=row.files_processed,
    )


def commands(
    planned: ClientPlan, backup: Backup, to: str, *, below: str
) -> tuple[tuple[str, ...], ...]:
    """
    Return the commands that restore *backup* below *to*, in order; none where nobody knows one.

    *below* is the `Plan.below` of the run.  No secret is in them.  Raises an AtomtxError where
    what they would read is not there.
    """
    settings = replace(bare_settings_of(planned), below=below)
    client = clients.load(planned.name)
    if isinstance(client, Dumper):
        return client.restore_commands(settings, saved(backup), to)
    argv = client.restore_command(settings, facts_of(planned), saved(backup), to)
    return (argv,) if argv else ()


def usable(planned: ClientPlan, run: str) -> None:
    """
    Raise UserError, with one clear line, unless the client answers with the run's repository.

    CredentialError where a secret of it cannot be had.
    """
    missing = [name for name in planned.secrets if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} of run {run} is not in the environment",
            hint="set what was set for the backup",
        )
    found = clients.load(planned.name).inspect(settings_of(planned))
    if found.repository != planned.repository:
        raise UserError(f"the repository is another one than that of run {run}")


def uncached(planned: ClientPlan, run: str, folder: Path) -> ClientPlan | None:
    """
    Return how to run the client with a new cache below *folder*, made for it; None if it cannot be.

    A wrapper may choose a repository itself, and its connection is not the one that is copied.
    """
    client = clients.load(planned.name)
    if not isinstance(client, Cacher):
        return planned
    folder.mkdir(mode=0o700)
    try:
        extra = client.uncached(bare_settings_of(planned), str(folder))
        changed = replace(planned, extra=extra)
        usable(changed, run)
    except (OSError, ValueError, UserError):
        return None
    return changed


def restore(
    planned: ClientPlan,
    backups: Iterable[Backup],
    to: Path,
    interrupts: Interrupts,
    *,
    below: str,
    lock: int,
) -> str | None:
    """
    Restore all of *backups* below *to*; return what is wrong with the first command that fails.

    On a signal the client is stopped with all that it started, and Interrupted is raised.  The
    client inherits *lock*: where this process is killed, nobody removes what it still writes.
    """
    sessions = Sessions(RunFolder(to), interrupts)
    sessions.hold_back()  # for ever: a restore has no log
    settings = settings_of(planned)
    found = [commands(planned, backup, str(to), below=below) for backup in backups]
    for argv in [argv for each in found for argv in each]:
        trouble = sessions.run(
            0,
            argv,
            env=settings.env,
            cwd=settings.cwd,
            stops=True,
            secrets=[name for name, _ in planned.credentials],
            stop_signal=clients.load(planned.name).stop_signal,
            pass_fds=(lock,),
        )
        if trouble:
            return f"{argv[0]}: {trouble}"
    return None


# -- the directory -----------------------------------------------------------------------------


def free_room(place: Path) -> Room:
    """Return what the file system of *place*, or of the nearest above that is there, has free."""
    there = next(each for each in (place, *place.parents) if each.exists())
    found = os.statvfs(there)
    # btrfs has no fixed number of files, and says 0.
    return Room(found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None)


def is_on_xfs(place: Path) -> bool:
    """Tell whether a directory is on an XFS."""
    entry = mountinfo.containing(mountinfo.read(), os.path.realpath(place))
    return entry is not None and entry.fstype == "xfs"


def check_target(target: Path) -> None:
    """Raise UserError for a directory that is there and not empty, or cannot be made."""
    try:
        is_empty = not any(target.iterdir())
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise UserError(f"cannot restore to {target}: {target.parent} is not there") from None
        return
    except OSError as exc:
        raise UserError(f"cannot restore to {target}: {exc.strerror}") from exc
    if not is_empty:
        raise UserError(f"cannot restore to {target}: it is not empty", hint="name a new directory")


def make_target(target: Path) -> Path:
    """Make the directory, mode 0700, where it is not there; idempotent."""
    try:
        target.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise UserError(f"cannot restore to {target}: {exc.strerror}") from exc
    return target


def temporary_base(state: Path) -> Path:
    """Return where a temporary directory is made: $TMPDIR, else the state directory."""
    return Path(os.path.abspath(os.environ.get("TMPDIR") or state))


@contextmanager
def temporary(base: Path, warn: Callable[[str], None]) -> Iterator[tuple[Path, int]]:
    """
    Have a directory that nobody else can enter; removed at the end with all that is in it.

    With it the descriptor of its lock, for as long as which it is nobody else's to remove.  A
    client is to restore below it, not to it, and so set its mode.  What cannot be removed is
    warned of.  UserError where none can be made.
    """
    try:
        ours, lock = _locked(base)
    except OSError as exc:
        raise UserError(
            f"cannot restore to a directory in {base}: {exc.strerror}", hint="say --target DIR"
        ) from exc
    try:
        yield ours, lock
    finally:
        trouble = _remove_marked(ours)
        if trouble:
            warn(f"{ours} has restored files, and was not removed: {trouble}")
        os.close(lock)


def _locked(base: Path) -> tuple[Path, int]:
    """Make a directory with a lock on it, then the mark, by which another process may remove it."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _mark(path, lock)
    except OSError:
        remove(path)
        os.close(lock)
        raise
    return path, lock


def _mark(path: Path, directory: int) -> None:
    """Make the mark durable: without it what is restored would stay after a power cut."""
    with (path / _MARK).open("xb") as file:
        file.write(os.fsencode(path.name))
        file.flush()
        os.fsync(file.fileno())
    os.fsync(directory)


def _is_marked(path: Path) -> bool:
    try:
        return (path / _MARK).read_bytes() == os.fsencode(path.name)
    except OSError:
        return False


def _may_be_older(path: Path) -> bool:
    """Tell whether a directory without a mark has a name as mkdtemp(3) makes, and anything."""
    try:
        there = os.listdir(path)
    except OSError:
        return False
    return bool(_MADE.fullmatch(path.name)) and bool(there) and _MARK not in there


def sweep(base: Path) -> list[str]:
    """
    Remove what killed processes of this user left in *base*; return what was done, in words.

    What has no mark stays, and is told where it looks like that of a release that made none.
    """
    done = []
    for path in sorted(base.glob(f"{PREFIX}*")):
        lock = _abandoned(path)
        if lock is None:
            continue
        if _is_marked(path):
            trouble = _remove_marked(path)
            words = f"was not removed: {trouble}" if trouble else "was removed"
            done.append(f"{path}, of a verification that was killed, {words}")
        elif _may_be_older(path):
            done.append(
                f"{path} may be of a verification by an older atomtx that was killed: look, and "
                "remove it"
            )
        os.close(lock)
    return done


def _abandoned(path: Path) -> int | None:
    """Return a descriptor that locks a directory as ours are, which nobody else has locked."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    info = os.fstat(lock)
    is_ours = info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) == 0o700
    if is_ours and locks.try_lock(lock, fcntl.LOCK_EX):
        return lock
    os.close(lock)
    return None


def _remove_marked(path: Path) -> str | None:
    """Remove a directory of ours, the mark after all else, as `remove` does."""
    try:
        for each in path.iterdir():
            trouble = remove(each) if each.is_dir() and not each.is_symlink() else None
            if trouble:
                return trouble
    except FileNotFoundError:
        pass
    except OSError as exc:
        return exc.strerror
    return remove(path)


def remove(path: Path) -> str | None:
    """
    Remove a directory with all that is in it; return what is wrong, if anything.

    Idempotent.  borg and xfsrestore restore the flags of chattr(1), and one that is immutable
    cannot be removed before that is taken away.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError:
        return _remove_unwilling(path)
    return None


def _remove_unwilling(path: Path) -> str | None:
    for argv in (("chattr", "-R", "-f", "-i", "-a"), ("chmod", "-R", "-f", "u+rwX")):
        try:
            process.run((*argv, "--", str(path)))
        except EffectError:  # not installed
            continue
    try:
        shutil.rmtree(path)
    except OSError as exc:
        return f"{exc.filename}: {exc.strerror}" if path.exists() else None
    return None

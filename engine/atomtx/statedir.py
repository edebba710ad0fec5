"""The state directory: where it is, what it may be on, and the folder of each run in it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import locks, system
from .errors import AtomtxError, EffectError, UserError
from .journalfile import ELSEWHERE, LOCK, NAME
from .names import RunId

# flock and fsync mean little there, and another machine could write the same journal.
REMOTE_FILE_SYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "glusterfs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.s3fs",
        "fuse.rclone",
        "lustre",
        "ocfs2",
        "gfs2",
        "virtiofs",
        "p9fs",
        "fusefs.sshfs",
    ]
)
# Used all the same: somebody may want it so, and what is there is undone after any other crash.
_IN_MEMORY = ("tmpfs", "ramfs")
LOST = "a power cut takes the journal with it, and what its runs have left stays"
_SWEEP_AFTER_S = 3600.0  # long after any front end would have written its row
END_RECORD_BYTES = 262_144  # reserved before the client starts: its end must find room


# What a file system of its own may have: mke2fs(8), snapdir of zfsprops(7), snapper(8).
_OF_A_FILE_SYSTEM = {"lost+found", ".zfs", ".snapshots"}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def find(env: Mapping[str, str] = os.environ) -> Path:
    """Return the state directory's path: $ATOMTX_STATE_DIR, systemd's, or the system's."""
    if env.get("ATOMTX_STATE_DIR"):
        return Path(os.path.abspath(env["ATOMTX_STATE_DIR"]))
    if env.get("STATE_DIRECTORY"):
        return Path(env["STATE_DIRECTORY"].split(":")[0])
    return Path(system.here.STATE)


def prepare(path: Path) -> Path:
    """
    Make the state directory ready, mode 0700, and return it; idempotent.

    Raises UserError where it cannot be written, belongs to somebody else, is a directory of others'
    that it would close to them, or is on a remote file system; EffectError where its disk is full,
    but that does not stop an undo.
    """
    try:
        make_directory(path, 0o700)
        info = check(path)
    except FileExistsError as exc:
        raise _unusable(path, "it is not a directory") from exc
    except OSError as exc:
        raise _unusable(path, exc.strerror) from exc
    try:
        if stat.S_IMODE(info.st_mode) & 0o077:
            path.chmod(0o700)
        make_directory(path / "runs", 0o700)
        os.utime(path)  # mkdir(2) finds no fault where there is nothing to make
    except OSError as exc:
        if exc.errno not in _FULL or not (path / "runs").is_dir():
            raise _not_written(path, exc) from exc
    return path


def check(path: Path) -> os.stat_result:
    """
    Return what the state directory is; nothing is changed.

    Raises FileNotFoundError where it is not there, UserError where `prepare` would refuse it as
    it is.
    """
    try:
        info = path.stat()
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise _unusable(path, exc.strerror) from exc
    if not stat.S_ISDIR(info.st_mode):
        raise _unusable(path, "it is not a directory")
    if info.st_uid != os.geteuid():
        owner = f"`chown root: {path}`" if os.geteuid() == 0 else "run atomtx as its owner (root)"
        raise UserError(
            f"the state directory {path} belongs to user {info.st_uid}, not to {os.geteuid()}",
            hint=f"{owner}, or set ATOMTX_STATE_DIR",
        )
    if stat.S_IMODE(info.st_mode) & 0o077 and not _may_be_closed(path, info):
        raise UserError(
            f"the state directory {path} is one for others too, and would be closed to them",
            hint=f"set ATOMTX_STATE_DIR to a directory of its own, such as {path / 'atomtx'}",
        )
    fstype = file_system(path)
    if fstype in REMOTE_FILE_SYSTEMS:
        raise UserError(
            f"the state directory {path} is on a remote file system ({fstype})", hint=ELSEWHERE
        )
    return info


def _may_be_closed(path: Path, info: os.stat_result) -> bool:
    """Tell whether a directory has nobody's things but ours, as one that was made for us has."""
    if info.st_mode & stat.S_ISVTX:  # made for everybody, as /tmp
        return False
    try:
        names = {*os.listdir(path)} - _OF_A_FILE_SYSTEM
        runs = os.listdir(path / "runs") if (path / "runs").is_dir() else None
    except OSError as exc:
        raise _unusable(path, exc.strerror) from exc
    if not names or names & {NAME, LOCK}:
        return True
    return any(map(RunId.is_one, runs or ())) or (names == {"runs"} and runs == [])


def _unusable(path: Path, why: str | None) -> UserError:
    return UserError(f"cannot use the state directory {path}: {why}", hint=ELSEWHERE)


def _not_written(path: Path, cause: OSError) -> AtomtxError:
    if cause.errno in _FULL:
        return _full(path)
    return UserError(
        f"the state directory {path} cannot be written: {cause.strerror}",
        hint=ELSEWHERE,
    )


def _full(path: Path) -> EffectError:
    return EffectError(f"no space left in {path}", hint="make room on its disk")


def file_system(path: Path) -> str:
    """Return the type of the file system that *path* is on; empty where that cannot be told."""
    from .mounts import mountinfo

    try:
        table = mountinfo.read()
    except OSError:  # no /proc: not Linux
        return ""
    entry = mountinfo.containing(table, os.path.realpath(path))
    return entry.fstype if entry else ""


def is_in_memory(fstype: str) -> bool:
    """Tell whether a type of file systems keeps nothing of what was made durable on it."""
    return fstype in _IN_MEMORY


def notes(path: Path) -> list[str]:
    """Return what the user should know about where the state directory is."""
    fstype = file_system(path)
    if not is_in_memory(fstype):
        return []
    return [f"the state directory {path} is in memory ({fstype}): {LOST}; {ELSEWHERE}"]


class RunFolder:
    """
    The files of one run, in ``<state directory>/runs/<run id>``.

    front.lock, runner.lock, client.lock   the locks F, R and C; see locks.py
    client.log      what the client printed, redacted and capped
    progress.json   where the client is; replaced about once a second, never synced
    end             how the client's work ended; durable, in space reserved before it started
    runner.log      what the runner itself had to say when it failed
    hooks.log       what the user's hooks printed, redacted and capped
    hook-N.json     the process of the hook of step N
    marker          where a run marks its own namespace
    tmp             the client's TMPDIR where the set would freeze the usual one
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.front_lock = path / "front.lock"
        self.runner_lock = path / "runner.lock"
        self.client_lock = path / "client.lock"
        self.log = path / "client.log"
        self.progress = path / "progress.json"
        self.end = path / "end"
        self.runner_log = path / "runner.log"
        self.hooks_log = path / "hooks.log"
        self.marker = path / "marker"
        self.temporary = path / "tmp"

    @classmethod
    def of(cls, state: Path, run: str) -> RunFolder:
        return cls(state / "runs" / run)

    def make(self) -> RunFolder:
        """
        Make the folder and its lock files, durable; idempotent.

        Raises EffectError where it cannot be had: what is wrong with it says nothing of others'.
        """
        try:
            for directory in (self.path, self.marker, self.temporary):
                directory.mkdir(mode=0o700, exist_ok=True)
            for file in (self.front_lock, self.runner_lock, self.client_lock):
                os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            sync_directory(self.path)
            sync_directory(self.path.parent)
        except OSError as exc:
            if exc.errno in _FULL:
                raise _full(self.path) from exc
            where = exc.filename or self.path
            raise EffectError(
                f"cannot use {where} of run {self.path.name}: {exc.strerror}",
                hint="mend it, or its disk",
            ) from exc
        return self

    def was_used(self) -> bool:
        """Tell whether a runner was ever at work in it."""
        traces = (self.runner_log, self.log, self.progress, self.end)
        return any(trace.exists() for trace in traces)

    def write_progress(self, data: Mapping[str, Any]) -> None:
        """Replace the progress file; a reader sees the old one or the new one, whole."""
        new = self.progress.with_suffix(".new")
        new.write_text(json.dumps(data))
        new.replace(self.progress)

    def read_progress(self) -> dict[str, Any]:
        """Return the last progress, or nothing."""
        try:
            data: dict[str, Any] = json.loads(self.progress.read_text())
        except (OSError, ValueError):  # none yet, or the disk was full: it is only a display
            return {}
        return data

    def write_hook(self, step: int, identity: Mapping[str, Any]) -> None:
        """Note the process of a step's hook."""
        (self.path / f"hook-{step}.json").write_text(json.dumps(identity))

    def empty_temporary(self) -> None:
        """Remove what a client left where it was given to write; idempotent."""
        for path in self.temporary.iterdir() if self.temporary.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # what it made immutable goes with the folder, if at all
                    path.unlink()

    def forget_hook(self, step: int) -> None:
        """Remove the note of a step's process; idempotent."""
        with suppress(OSError):
            (self.path / f"hook-{step}.json").unlink()

    def read_hook(self, step: int) -> dict[str, Any] | None:
        """Return the process of a step's hook; None where it was not, or only half, noted."""
        try:
            data: dict[str, Any] = json.loads((self.path / f"hook-{step}.json").read_text())
        except (OSError, ValueError):
            return None
        return data

    def reserve_end(self) -> None:
        """Allocate the space of the end record, durable and empty; forgets an older end."""
        descriptor = os.open(self.end, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            if os.pwrite(descriptor, bytes(END_RECORD_BYTES), 0) < END_RECORD_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.end))
            os.ftruncate(descriptor, END_RECORD_BYTES)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(self.path)

    def write_end(self, data: Mapping[str, Any]) -> None:
        """
        Write the end record over the reserved space and make it durable.

        OSError where a longer one than was reserved finds no room.
        """
        body = json.dumps(data).encode()
        record = hashlib.sha256(body).hexdigest().encode() + b" " + body + b"\n"
        descriptor = os.open(self.end, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.pwrite(descriptor, record, 0) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.end))
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def read_end(self) -> dict[str, Any] | None:
        """Return the end record; None where the client's end was not, or only half, written."""
        try:
            record = self.end.read_bytes().split(b"\n", 1)[0]
        except FileNotFoundError:
            return None
        digest, _, body = record.partition(b" ")
        if not body or hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        data: dict[str, Any] = json.loads(body)
        return data


def sweep(state: Path, known: Collection[str]) -> None:
    """
    Remove the folders of runs that were killed before their row was written.

    *known* are the runs of the journal.  A folder in which a runner was at work, and whose run
    is not known, belongs to a journal that was set aside, or lost: it is left.  So is what is no
    folder of a run.
    """
    for path in (state / "runs").iterdir():
        if RunId.is_one(path.name) and path.name not in known and _is_left_over(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_left_over(path: Path) -> bool:
    folder = RunFolder(path)
    try:
        info = path.lstat()
    except FileNotFoundError:  # another process has swept it meanwhile
        return False
    if not stat.S_ISDIR(info.st_mode) or time.time() - info.st_mtime < _SWEEP_AFTER_S:
        return False
    return not (folder.was_used() or locks.is_held(folder.front_lock))


def write_new(path: Path, text: str, mode: int = 0o600) -> None:
    """
    Write a file of our own, durable but for its name; on an OSError there is none.

    What has the name is removed before, such as the half of one that was killed, and no link is
    followed.
    """
    path.unlink(missing_ok=True)
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask is
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # the first error is the one to tell
            path.unlink()
        raise


def make_directory(path: Path, mode: int) -> None:
    """
    Make a directory, with its parents; the names of new ones are durable on return; idempotent.

    Nobody but the owner may write a new parent, whatever the umask is: `Path.mkdir` would leave
    that to the umask alone.
    """
    new = [each for each in path.parents if not each.exists()]
    for each in reversed(new):
        each.mkdir(mode=0o755, exist_ok=True)
    if not path.exists():
        new.append(path)
    path.mkdir(mode=mode, exist_ok=True)
    for each in new:
        sync_directory(each.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

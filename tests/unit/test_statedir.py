"""The state directory: where it is, what it may be on, and the files of a run in it."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from atomtx import statedir, system
from atomtx.errors import EffectError, UserError
from atomtx.mounts import mountinfo
from atomtx.statedir import END_RECORD_BYTES, RunFolder, prepare

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other owners need root")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run").make()


# -- the directory ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, system.here.STATE),
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a"),
        ({"ATOMTX_STATE_DIR": "/own", "STATE_DIRECTORY": "/var/lib/a"}, "/own"),
        ({"ATOMTX_STATE_DIR": "/own/../x/"}, "/x"),
        ({"ATOMTX_STATE_DIR": "", "STATE_DIRECTORY": ""}, system.here.STATE),
    ],
)
def test_find(env: dict[str, str], expected: str) -> None:
    """Our own variable counts before systemd's, and that before the system's place."""
    assert statedir.find(env) == Path(expected)


def test_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative name is taken from here, once and for all: the runner stands elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert statedir.find({"ATOMTX_STATE_DIR": "state"}) == tmp_path / "state"


def test_prepare(tmp_path: Path) -> None:
    """Section 5: the directory is made for its owner alone, with all above it; again is no harm."""
    path = tmp_path / "a" / "state"
    assert prepare(path) == path
    assert prepare(path) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "runs").stat().st_mode) == 0o700


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_new_parents(tmp_path: Path, umask: int) -> None:
    """Nobody else may write the directories above it that are made, whatever the umask is."""
    old = os.umask(umask)
    try:
        state = prepare(tmp_path / "new" / "above" / "state")
    finally:
        os.umask(old)
    made = [stat.S_IMODE(path.stat().st_mode) for path in (state, *state.parents[:2])]
    assert made == [0o700, 0o755 & ~umask, 0o755 & ~umask]


def test_prepare_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of all directories that are made are flushed, and nothing is where none is made."""
    synced: list[Path] = []
    monkeypatch.setattr(statedir, "sync_directory", synced.append)
    prepare(tmp_path / "a" / "b")
    assert sorted(synced) == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    synced.clear()
    prepare(tmp_path / "a" / "b")
    assert synced == []


def test_loose_mode(tmp_path: Path) -> None:
    """A directory that others may look into is closed to them: an empty one, or one of ours."""
    path = tmp_path / "state"
    path.mkdir(mode=0o755)
    for name in ("", "lost+found", ".zfs", ".snapshots", "journal.db"):
        (path / name).mkdir(exist_ok=True)
        path.chmod(0o755)
        statedir.check(path)
        prepare(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, name
        (path / "runs").rmdir()


def test_loose_mode_before_the_first_run(tmp_path: Path) -> None:
    """So is one that was made, and in which nothing ran yet."""
    prepare(tmp_path / "state").chmod(0o755)
    prepare(tmp_path / "state")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("left", ["runs/0123456789abcdef", "journal.lock"])
def test_loose_mode_of_a_lost_journal(tmp_path: Path, left: str) -> None:
    """One of ours is known by its runs, or by its journal's lock, where the journal is lost."""
    path = tmp_path / "state"
    for name in ("outbox", left):
        (path / name).mkdir(parents=True)
    path.chmod(0o755)
    prepare(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        (0o1777, ()),
        (0o1777, ("runs",)),
        (0o755, ("www",)),
        (0o710, (".x",)),
        (0o755, (".zfs", "www")),
        (0o755, ("runs", "www")),
        (0o755, ("runs", "runs/monday")),
    ],
)
def test_of_others(tmp_path: Path, mode: int, names: tuple[str, ...]) -> None:
    """What was named by mistake, as /tmp or /srv, is not closed to all the others: refused."""
    path = tmp_path / "shared"
    path.mkdir()
    for name in names:
        (path / name).mkdir()
    path.chmod(mode)
    for refuse in (prepare, statedir.check):
        with pytest.raises(UserError, match="shared is one for others too") as caught:
            refuse(path)
        assert f"{path}/atomtx" in (caught.value.hint or "")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert sorted(os.listdir(path)) == sorted(name for name in names if "/" not in name)


def test_of_others_with_a_file(tmp_path: Path) -> None:
    """A file that has the name of our folder is none of ours."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/runs").write_text("theirs")
    (tmp_path / "shared").chmod(0o755)
    with pytest.raises(UserError, match="shared is one for others too"):
        prepare(tmp_path / "shared")


def test_file(tmp_path: Path) -> None:
    """A file is no state directory; it stays what it is."""
    path = tmp_path / "state"
    path.write_text("mine")
    with pytest.raises(UserError, match="state: it is not a directory") as caught:
        prepare(path)
    assert "ATOMTX_STATE_DIR" in (caught.value.hint or "")
    assert path.read_text() == "mine"


def test_dangling_link(tmp_path: Path) -> None:
    """A link that leads nowhere is none either."""
    path = tmp_path / "state"
    path.symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="state: it is not a directory"):
        prepare(path)


def test_below_a_file(tmp_path: Path) -> None:
    """Nor can it be below a file."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        prepare(tmp_path / "file" / "state")


@as_root
def test_foreign_owner(tmp_path: Path) -> None:
    """A directory of another user, who could swap what is in it, is refused untouched."""
    path = tmp_path / "state"
    path.mkdir(mode=0o755)
    os.chown(path, 1234, 1234)
    path.chmod(0o755)
    with pytest.raises(UserError, match="belongs to user 1234, not to 0") as caught:
        prepare(path)
    assert f"`chown root: {path}`" in (caught.value.hint or "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert list(path.iterdir()) == []


def test_check(tmp_path: Path) -> None:
    """What is there is judged, and nothing is made of what is not."""
    statedir.check(prepare(tmp_path / "state"))
    with pytest.raises(FileNotFoundError):
        statedir.check(tmp_path / "absent" / "state")
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "file", "it is not"), (tmp_path / "file" / "state", "Not a")):
        with pytest.raises(UserError, match=f"{words} a? ?directory"):
            statedir.check(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "state"]


@pytest.mark.parametrize("fstype", ["nfs4", "cifs", "9p", "fuse.sshfs", "virtiofs"])
def test_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fstype: str) -> None:
    """A remote file system, where flock and fsync mean little, is refused by name."""
    line = f"30 1 0:30 / {tmp_path} rw - {fstype} server:/export rw\n"
    table = mountinfo.parse(b"1 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + line.encode())
    monkeypatch.setattr(mountinfo, "read", lambda: table)
    with pytest.raises(UserError, match=f"is on a remote file system \\({fstype}\\)"):
        prepare(tmp_path / "state")


def test_remote_over_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is where the directory really is, not where its name seems to be."""
    (tmp_path / "export").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "export")
    line = f"30 1 0:30 / {tmp_path}/export rw - nfs server:/export rw\n"
    table = mountinfo.parse(b"1 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + line.encode())
    monkeypatch.setattr(mountinfo, "read", lambda: table)
    with pytest.raises(UserError, match="remote"):
        prepare(tmp_path / "state")


@pytest.mark.parametrize(
    ("fstype", "notes"), [("tmpfs", 1), ("ramfs", 1), ("ext4", 0), ("zfs", 0), ("overlay", 0)]
)
def test_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fstype: str, notes: int
) -> None:
    """Promise 10: in memory no commit survives a power cut; it is used all the same, and told."""
    line = f"30 1 0:30 / {tmp_path} rw - {fstype} none rw\n"
    table = mountinfo.parse(b"1 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + line.encode())
    monkeypatch.setattr(mountinfo, "read", lambda: table)
    state = prepare(tmp_path / "state")
    told = statedir.notes(state)
    assert len(told) == notes
    assert all(f"{state} is in memory ({fstype}): a power cut" in line for line in told)


def test_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without /proc cannot tell, and is trusted."""

    def read() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(mountinfo, "read", read)
    assert prepare(tmp_path / "state").is_dir()


_READ_ONLY = """
    import os, sys
    from pathlib import Path
    from atomtx import statedir
    from atomtx.errors import EffectError, UserError
    from atomtx.mounts import namespace as ns

    where, made = sys.argv[1:]
    ns.enter()
    ns.mount("readonly", where, "tmpfs", 0)
    state = Path(where) / "state"
    if made == "made":
        statedir.prepare(state)
    if made == "loose":
        state.mkdir()
        state.chmod(0o755)
    ns.mount("readonly", where, None, ns.MS_REMOUNT | ns.MS_RDONLY)
    try:
        statedir.prepare(state)
    except UserError as exc:
        print(exc.message)
"""


@as_root
@pytest.mark.parametrize("made", ["absent", "made", "loose"])
def test_read_only(tmp_path: Path, made: str) -> None:
    """A read-only file system is told as such, also where the directory is there already."""
    argv = [sys.executable, "-c", textwrap.dedent(_READ_ONLY), str(tmp_path), made]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith(("the state directory", "cannot use the state directory"))
    assert done.stdout.endswith("Read-only file system\n")


# -- a run's folder --------------------------------------------------------------------------


def test_make(tmp_path: Path) -> None:
    """A folder has its locks from the start; making it again keeps what is in it."""
    folder = RunFolder.of(prepare(tmp_path / "state"), "0123").make()
    assert folder.path == tmp_path / "state" / "runs" / "0123"
    inodes = [os.stat(lock).st_ino for lock in (folder.front_lock, folder.client_lock)]
    folder.log.write_text("words")
    folder.make()
    assert inodes == [os.stat(lock).st_ino for lock in (folder.front_lock, folder.client_lock)]
    assert folder.log.read_text() == "words"
    for path in folder.path.iterdir():
        mode = 0o600 if path.is_file() and path != folder.log else 0o700
        assert path == folder.log or stat.S_IMODE(path.stat().st_mode) == mode


def test_make_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with one run's folder is no fault of the state directory, nor of the user."""
    folder = RunFolder.of(prepare(tmp_path / "state"), "0123")
    folder.path.mkdir()
    folder.front_lock.mkdir()
    with pytest.raises(EffectError, match=r"front.lock of run 0123: Is a directory") as refused:
        folder.make()
    assert refused.value.hint == "mend it, or its disk"
    folder.front_lock.rmdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(statedir, "sync_directory", full)
    with pytest.raises(EffectError, match=r"no space left in .*0123"):
        folder.make()


def test_progress(folder: RunFolder) -> None:
    """Progress is replaced as a whole; what cannot be read is no progress, and no error."""
    assert folder.read_progress() == {}
    folder.write_progress({"percent": 1})
    folder.write_progress({"percent": 2})
    assert folder.read_progress() == {"percent": 2}
    folder.progress.write_text('{"percent": ')
    assert folder.read_progress() == {}


RECORD = {"attempt": 1, "outcome": "completed", "reason": "café\nline", "backups": []}


def test_end(folder: RunFolder) -> None:
    """An end that was written is read back; none is known before."""
    assert folder.read_end() is None
    folder.reserve_end()
    assert folder.read_end() is None
    folder.write_end(RECORD)
    assert folder.read_end() == RECORD


def test_end_is_reserved(folder: RunFolder) -> None:
    """Promise 10: an end has its space before the client starts, so a full disk cannot lose it."""
    folder.reserve_end()
    before = folder.end.stat()
    assert before.st_size == END_RECORD_BYTES
    assert before.st_blocks * 512 >= END_RECORD_BYTES
    folder.write_end(RECORD)
    after = folder.end.stat()
    assert (after.st_size, after.st_blocks, after.st_ino) == (
        before.st_size,
        before.st_blocks,
        before.st_ino,
    )
    assert stat.S_IMODE(after.st_mode) == 0o600


def test_end_of_an_older_attempt(folder: RunFolder) -> None:
    """Section 8: the end of one attempt is forgotten before the next one starts."""
    folder.reserve_end()
    folder.write_end(RECORD)
    folder.reserve_end()
    assert folder.read_end() is None


def test_end_without_space(folder: RunFolder) -> None:
    """An end is never written where no space was reserved for it."""
    with pytest.raises(FileNotFoundError):
        folder.write_end(RECORD)


def test_long_end(folder: RunFolder) -> None:
    """One that is longer than its space, as of a thousand sources, takes more, where there is."""
    folder.reserve_end()
    long = {"reason": "x" * END_RECORD_BYTES}
    folder.write_end(long)
    assert folder.read_end() == long
    folder.reserve_end()
    assert folder.end.stat().st_size == END_RECORD_BYTES


def test_long_end_without_room(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes only a part of it is full: such an end is none, and is not said to be."""
    folder.reserve_end()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:END_RECORD_BYTES], at))
    with pytest.raises(OSError, match="No space left on device"):
        folder.write_end({"reason": "x" * END_RECORD_BYTES})
    assert folder.read_end() is None


def test_torn_end(folder: RunFolder) -> None:
    """Promise 7: an end that a power cut tore, at whatever byte, is no end at all."""
    folder.reserve_end()
    folder.write_end(RECORD)
    whole = folder.end.read_bytes()
    length = whole.index(b"\n")
    for cut in range(length):
        folder.end.write_bytes(whole[:cut] + bytes(END_RECORD_BYTES - cut))
        assert folder.read_end() is None
        folder.end.write_bytes(whole[:cut])
        assert folder.read_end() is None


@pytest.mark.parametrize("place", [0, 5, 63, 64, 65, 80, 110])
def test_corrupt_end(folder: RunFolder, place: int) -> None:
    """Promise 7: one flipped bit and it is no end: a result is not guessed at."""
    folder.reserve_end()
    folder.write_end(RECORD)
    data = bytearray(folder.end.read_bytes())
    data[place] ^= 1
    folder.end.write_bytes(data)
    assert folder.read_end() is None


def test_shorter_end_over_a_longer_one(folder: RunFolder) -> None:
    """What is left of a longer record behind a shorter one does not count."""
    folder.reserve_end()
    folder.write_end(RECORD | {"reason": "x" * 1000})
    folder.write_end(RECORD)
    assert folder.read_end() == RECORD


def test_end_is_durable(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 10: the file is synced after it was written, its name after it was made."""
    calls: list[str] = []

    def spy(name: str) -> None:
        real: Any = getattr(os, name)

        def called(descriptor: int, *args: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            calls.append(f"{name} {os.path.basename(target)}")
            return real(descriptor, *args)

        monkeypatch.setattr(os, name, called)

    for name in ("fsync", "fdatasync", "pwrite"):
        spy(name)
    folder.reserve_end()
    assert calls == ["pwrite end", "fsync end", "fsync run"]
    calls.clear()
    folder.write_end(RECORD)
    assert calls == ["pwrite end", "fdatasync end"]
    assert json.loads(folder.end.read_bytes().split(b"\n")[0].partition(b" ")[2]) == RECORD


def test_end_that_finds_half_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short write is no error of write(2), and no room either."""
    folder = RunFolder.of(prepare(tmp_path / "state"), "0" * 16).make()
    monkeypatch.setattr(os, "pwrite", lambda *_: 512)
    with pytest.raises(OSError, match="No space left on device"):
        folder.reserve_end()

"""The directory that is restored to: nobody else's to read, and gone at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from atomtx import restoring
from atomtx.errors import UserError


def fail(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_temporary(tmp_path: Path, error: type[BaseException] | None) -> None:
    """It is ours alone, and goes with all that is in it however the block ends."""

    def use() -> None:
        with restoring.temporary(tmp_path, fail) as (ours, _):
            assert stat.S_IMODE(ours.stat().st_mode) == 0o700
            (ours / "home").mkdir()
            (ours / "home/file").write_text("mine")
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert list(tmp_path.iterdir()) == []


def test_unwilling(tmp_path: Path) -> None:
    """A file that was restored as immutable, and a directory that nobody may change, go too."""
    assert os.geteuid() == 0, "chattr needs root"
    with restoring.temporary(tmp_path, fail) as (files, _):
        (files / "d").mkdir()
        (files / "d/file").write_text("mine")
        subprocess.run(["chattr", "+i", files / "d/file", files / "d"], check=True)
    assert list(tmp_path.iterdir()) == []


def test_unreadable(tmp_path: Path) -> None:
    """What the file system refuses at the end is told, and hides no error of the block."""
    told: list[str] = []

    def use() -> None:
        with restoring.temporary(tmp_path, told.append) as (ours, _):
            shutil.rmtree(ours)
            ours.write_text("a file in its place cannot be listed")
            raise RuntimeError

    before = os.listdir("/proc/self/fd")
    with pytest.raises(RuntimeError):
        use()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    (line,) = told
    assert line.endswith("was not removed: Not a directory")


def test_not_made(tmp_path: Path) -> None:
    """Where none can be made that is said in one line."""
    with pytest.raises(UserError, match="cannot restore to a directory in"):
        restoring.temporary(tmp_path / "absent", fail).__enter__()


def killed(base: Path) -> Path:
    """Return what a process leaves that is killed while it restores."""
    pid = os.fork()
    if pid == 0:
        with restoring.temporary(base, fail) as (files, _):
            (files / "restored").mkdir()
            (files / "restored/file").write_text("mine")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = base.glob(f"{restoring.PREFIX}*")
    return left


def test_sweep(tmp_path: Path) -> None:
    """What a killed process left is removed; what a living one holds stays."""
    left = killed(tmp_path)
    (tmp_path / "other").mkdir(mode=0o700)
    link = tmp_path / f"{restoring.PREFIX}link"
    link.symlink_to("other")
    with restoring.temporary(tmp_path, fail) as (files, _):
        (said,) = restoring.sweep(tmp_path)
        assert said == f"{left}, of a verification that was killed, was removed"
        assert files.is_dir()
        assert restoring.sweep(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == sorted((link, tmp_path / "other"))


def test_sweep_is_sure(tmp_path: Path) -> None:
    """Promise 2: a directory that is not proven to be ours stays, whatever it is called."""
    kept = restoring.make_target(tmp_path / f"{restoring.PREFIX}home")
    (kept / "file").write_text("restored, and kept")
    (tmp_path / "other").mkdir()
    left = killed(tmp_path / "other")
    for name in ("copied", "open"):
        shutil.copytree(left, tmp_path / f"{restoring.PREFIX}{name}")
    open_to_all = tmp_path / f"{restoring.PREFIX}open"
    (open_to_all / ".atomtx-verify").write_text(open_to_all.name)
    open_to_all.chmod(0o755)
    there = sorted(tmp_path.rglob("*"))
    assert restoring.sweep(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == there


def test_sweep_tells_of_what_an_older_one_left(tmp_path: Path) -> None:
    """Without a mark it may be the user's, and stays; but what may be in it is said."""
    left = killed(tmp_path)
    (left / ".atomtx-verify").unlink()
    tempfile.mkdtemp(prefix=restoring.PREFIX, dir=tmp_path)  # killed before there was anything
    open_to_all = Path(tempfile.mkdtemp(prefix=restoring.PREFIX, dir=tmp_path))
    (open_to_all / "file").touch()
    open_to_all.chmod(0o755)
    for _ in range(2):
        (said,) = restoring.sweep(tmp_path)
        assert said.startswith(f"{left} may be of a verification by an older atomtx")
    assert (left / "restored/file").read_text() == "mine"
    held = os.open(left, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as the older one has it that is still at work
    assert restoring.sweep(tmp_path) == []
    os.close(held)


def test_removal_is_cut_off(tmp_path: Path) -> None:
    """What is restored goes before the mark: a sweep that is killed leaves it to the next."""
    left = killed(tmp_path)
    mark = left / ".atomtx-verify"
    text = mark.read_text()
    mark.unlink()
    mark.write_text(text)
    # Listed by age, either way, or by a hash: one that a removal comes to after the mark.
    last = mark.name
    while last == mark.name:
        tempfile.mkdtemp(dir=left)
        last = [entry.name for entry in os.scandir(left)][-1]
    held = left / last / "held"
    held.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", held], check=True)
    try:
        (said,) = restoring.sweep(tmp_path)
    finally:
        subprocess.run(["umount", held], check=True)
    assert "was not removed" in said
    (said,) = restoring.sweep(tmp_path)
    assert said.endswith("was removed")
    assert list(tmp_path.iterdir()) == []


def test_target(tmp_path: Path) -> None:
    """A directory of the user's has to be new, or empty; a new one is for him alone."""
    new = tmp_path / "new"
    restoring.check_target(new)
    assert restoring.make_target(new) == new
    assert stat.S_IMODE(new.stat().st_mode) == 0o700
    restoring.check_target(new)
    restoring.make_target(new)
    (new / "file").touch()
    for path, words in (
        (new, "it is not empty"),
        (new / "file", "Not a directory"),
        (tmp_path / "absent/new", "absent is not there"),
    ):
        with pytest.raises(UserError, match=words):
            restoring.check_target(path)


def test_free_room(tmp_path: Path) -> None:
    """The room is that of the nearest directory that is there."""
    assert restoring.free_room(tmp_path / "a/b").size_bytes

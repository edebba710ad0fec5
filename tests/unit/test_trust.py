"""What root reads as its own: nobody else can have written it, nor read a secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from atomtx import trust
from atomtx.errors import UserError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has others to fear")
SOMEBODY = 4242


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of root's, two directories deep."""
    path = tmp_path / "etc" / "file"
    path.parent.mkdir(mode=0o755)
    path.write_text("words\n")
    path.chmod(0o600)
    return path


def refusal(path: Path, *, secret: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        trust.read(str(path), "the file", secret=secret)
    return str(caught.value)


def test_read(file: Path) -> None:
    """A file of root's alone is read, also as a secret."""
    assert trust.read(str(file), "the file") == "words\n"
    assert trust.read(str(file), "the file", secret=True) == "words\n"


@as_root
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("which", ["file", "etc"])
def test_writable(file: Path, which: str, mode: int) -> None:
    """What others can write is refused, a directory on the way as well, with what to do."""
    path = file if which == "file" else file.parent
    path.chmod(mode | (0 if which == "file" else 0o111))
    said = refusal(file)
    assert f"{path} can be written by others" in said
    assert f"chmod go-w {path}" in said


@as_root
@pytest.mark.parametrize("which", ["file", "etc"])
def test_owner(file: Path, which: str) -> None:
    """What belongs to somebody else is refused, whatever its mode."""
    path = file if which == "file" else file.parent
    os.chown(path, SOMEBODY, 0)
    assert f"{path} belongs to user {SOMEBODY}" in refusal(file)


@as_root
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_secret(file: Path, mode: int) -> None:
    """A secret that others can read is refused; anything else may be read by all."""
    file.chmod(mode)
    assert "can be read by others" in refusal(file, secret=True)
    assert trust.read(str(file), "the file") == "words\n"


@as_root
def test_links(file: Path, tmp_path: Path) -> None:
    """A link leads to a file that is trusted, but not where others can turn it elsewhere."""
    good, open_, bad = tmp_path / "good", tmp_path / "open", tmp_path / "bad"
    good.symlink_to(file)
    assert trust.read(str(good), "the file") == "words\n"
    open_.mkdir(mode=0o755)
    (open_ / "link").symlink_to("../etc/file")
    bad.symlink_to("open/link")
    assert trust.read(str(bad), "the file") == "words\n"
    open_.chmod(0o777)
    assert f"{open_} can be written by others" in refusal(bad)
    open_.chmod(0o1777)  # sticky: what is root's in it cannot be replaced
    assert trust.read(str(bad), "the file") == "words\n"
    os.chown(open_ / "link", SOMEBODY, 0, follow_symlinks=False)
    assert f"belongs to user {SOMEBODY}" in refusal(bad)


@as_root
def test_link_in_the_way(file: Path, tmp_path: Path) -> None:
    """A directory may be a link; `..` after it is that of where it leads."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    (tmp_path / "far" / "file").write_text("far\n")
    assert trust.read(str(tmp_path / "link" / ".." / "file"), "the file") == "far\n"
    (tmp_path / "far").chmod(0o777)
    assert "far can be written" in refusal(tmp_path / "link" / ".." / "file")


def test_no_file(file: Path, tmp_path: Path) -> None:
    """What is absent, no regular file, too long or no text is told, and hangs nothing."""
    assert "No such file" in refusal(tmp_path / "absent")
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a regular file" in refusal(tmp_path / "pipe")
    file.write_bytes(b"a\xff")
    assert "not text in UTF-8: byte 1" in refusal(file)
    file.write_bytes(bytes(101))
    with pytest.raises(UserError, match="more than 100 bytes"):
        trust.read(str(file), "the file", limit=100)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in refusal(tmp_path / "loop")


def test_another_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user than root reads what can be read: there is nothing to gain."""
    file.chmod(0o666)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert trust.read(str(file), "the file", secret=True) == "words\n"

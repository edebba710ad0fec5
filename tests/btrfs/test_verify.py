"""`atomtx sure verify-backup` of real btrfs: the run's own snapshot, and volumes in each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.btrfs.conftest import Flat
from tests.btrfs.stage import Disk
from tests.btrfs.test_btrfs import Typed, typed

__all__ = ["typed"]  # a fixture


@pytest.fixture
def run(disk: Disk, flat: Flat, typed: Typed) -> str:
    """A run that saved two subvolumes, of which one is mounted in the other, and kept them."""
    typed.run(typed.restic, "init")
    client = ("--client", "restic", "--command", typed.restic)
    typed.atomtx("backup", "-r", str(flat.root), "--keep-snapshots", *client)
    return str(json.loads(typed.run(*typed.words("history", "--json")))[0]["id"])


def kept(disk: Disk, run: str, n: int) -> str:
    return str(disk.top / f"atomtx-kept-{run}" / str(n))


def test_own_moment(disk: Disk, flat: Flat, typed: Typed, run: str) -> None:
    """The run's kept snapshots are what it is compared with, whatever was scanned later."""
    for n, path in enumerate((flat.root, flat.home)):
        typed.atomtx("sure", "scan", kept(disk, run, n), "--of", str(path))
        (path / "later").write_text("later")
        typed.atomtx("sure", "scan", str(path))
    said = typed.atomtx("sure", "verify-backup", run)
    for path in (flat.root, flat.home):
        assert f"comparing {path} with generation 1, the run's own moment" in said
    assert "was read at" not in said
    assert f"not compared in {flat.root}: home" in said
    words = ("sure", "verify-backup", run, "--of", str(flat.home), "--against", "2")
    said = typed.atomtx(*words, status=1)
    assert f"missing     {flat.home}/later" in said
    assert f"comparing {flat.root} " not in said
    said = typed.atomtx("sure", "verify-backup", run, "--against", "2", status=2)
    assert "--against goes with one path, and the run has 2\n" in said
    assert f"name one with --of: {flat.root}, {flat.home}\n" in said


def test_without_a_database(disk: Disk, flat: Flat, typed: Typed, run: str) -> None:
    """A volume that no generation tells of is an error; one of all file systems tells of each."""
    typed.atomtx("sure", "scan", kept(disk, run, 0), "--of", str(flat.root))
    said = typed.atomtx("sure", "verify-backup", run, status=2)
    assert f"there is no integrity database of {flat.home}" in said
    typed.atomtx("sure", "scan", str(flat.root), "--cross-mounts")
    words = ("sure", "verify-backup", run, "--of", str(flat.home))
    assert f"there is no integrity database of {flat.home}" in typed.atomtx(*words, status=2)
    for file in Path(typed.env["ATOMTX_STATE_DIR"], "sure").iterdir():
        file.unlink()
    typed.atomtx("sure", "scan", str(flat.root), "--cross-mounts")
    said = typed.atomtx("sure", "verify-backup", run)
    assert f"comparing {flat.root} with generation 1\n" in said
    assert f"comparing {flat.home} " not in said
    (flat.home / "later").write_text("later")
    typed.atomtx("sure", "scan", str(flat.root), "--cross-mounts")
    said = typed.atomtx("sure", "verify-backup", run, status=1)
    assert f"missing     {flat.home}/later" in said

"""`atomtx sure verify-backup` of whole runs with the real xfsdump: a level, and a chain of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atomtx.clients.dumps import MARK
from tests.xfs.field import Field, fill
from tests.xfs.test_xfsdump import wait_until_old


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    assert os.geteuid() == 0, "XFS on a loop device needs root"
    made = Field(tmp_path)
    yield made
    made.close()


def test_chain(field: Field, tmp_path: Path) -> None:
    """Each level is restored with those below it; onto another file system attributes are lost."""
    source, onto_xfs = field.make("source"), field.make("target")
    destination = tmp_path / "dumps"
    destination.mkdir()
    (destination / MARK).write_text("0123-4567-89ab\n")
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path))),
        "HOME": str(tmp_path),
        "ATOMTX_STATE_DIR": str(tmp_path / "state"),
        "RUNTIME_DIRECTORY": str(tmp_path / "run"),
    }

    def atomtx(*words: str, status: int = 0) -> str:
        argv = (sys.executable, "-m", "atomtx", *words)
        done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd="/")
        assert done.returncode == status, (argv, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def backup() -> str:
        wait_until_old()
        atomtx("sure", "scan", str(source))
        words = ("--read-live", str(source), "--client", "xfsdump")
        atomtx("backup", *words, "--", f"--destination={destination}", "--levels=0,1")
        return str(json.loads(atomtx("history", "--json"))[0]["id"])

    fill(source)
    tree = ("--layout", "tree", "--root", str(tmp_path / "tree"), "--whole-root")
    words = ("--read-live", str(source), "--client", "xfsdump", *tree, "--dry-run")
    said = atomtx("backup", *words, "--", f"--destination={destination}", status=2)
    assert "xfsdump saves each file system by itself" in said
    runs = [backup()]
    (source / "d0" / "new").write_text("of level 1")
    (source / "d1" / "f7").unlink()
    runs.append(backup())
    for number, run in enumerate(runs, start=1):
        said = atomtx("sure", "verify-backup", run, "--against", str(number))
        assert "access control lists (this is no XFS): not compared" in said
        env["TMPDIR"] = str(onto_xfs)
        said = atomtx("sure", "verify-backup", run, "--against", str(number))
        assert "xfsdump does not keep fractions of a second, the times of links and" in said
        assert "no XFS" not in said
        del env["TMPDIR"]
    said = atomtx("sure", "verify-backup", runs[0], status=1)
    assert f"missing     {source}/d0/new" in said
    assert f"extra       {source}/d1/f7" in said
    os.setxattr(source / "d0" / "f0", "user.later", b"x")
    atomtx("sure", "scan", str(source))
    assert "user.later" not in atomtx("sure", "verify-backup", runs[1])
    env["TMPDIR"] = str(onto_xfs)
    assert "user.later" in atomtx("sure", "verify-backup", runs[1], status=1)

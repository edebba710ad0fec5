"""Whole runs with the real borg over real btrfs: what is saved, restored, resumed and pruned."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.btrfs.conftest import Flat
from tests.btrfs.stage import Disk, tree
from tests.contract.test_borg import NEW, borg_of, described, inside, make_special
from tests.contract.test_clients import make_tree


class Typed:
    """`atomtx` and borg as a person types them, with a repository of their own."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True)
        self.home = home
        self.repository = home / "repository"
        # borg goes by the name of its program, and so does the doctor.
        (home / "bin").mkdir()
        (home / "bin/borg").symlink_to(borg_of(NEW))
        self.env = {
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path))),
            "HOME": str(home),
            "ATOMTX_STATE_DIR": str(home / "state"),
            "BORG_REPO": str(self.repository),
            "BORG_PASSPHRASE": "correct horse",
        }

    def _done(self, *argv: str, status: int = 0, without: str = "") -> tuple[str, str]:
        env = {name: value for name, value in self.env.items() if name != without}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == status, (argv, done.stdout, done.stderr)
        assert "correct horse" not in done.stdout + done.stderr
        return done.stdout, done.stderr

    def run(self, *argv: str) -> str:
        """Return what was asked for, without the warnings: borg tells of stale locks beside it."""
        return self._done(*argv)[0]

    def atomtx(self, *words: str, status: int = 0, without: str = "") -> str:
        """Return all that a person at a terminal sees."""
        argv = (sys.executable, "-m", "atomtx", *words)
        return "".join(self._done(*argv, status=status, without=without))

    def told(self, *words: str) -> Any:
        return json.loads(self.run(sys.executable, "-m", "atomtx", *words, "--json"))

    def backup(self, *words: str, status: int = 0) -> str:
        return self.atomtx("backup", *words, "--client", "borg", status=status)

    def archives(self, *words: str) -> list[str]:
        listed = json.loads(self.run("borg", "list", "--json", *words))
        return [each["name"] for each in listed["archives"]]

    def runs(self) -> list[dict[str, Any]]:
        return list(self.told("history"))

    def pid_with_lock(self, front: subprocess.Popen[bytes]) -> int:
        """Wait until borg holds the repository's lock; return its pid, which the lock tells."""
        limit, folder = time.monotonic() + 120, self.repository / "lock.exclusive"
        while True:
            with suppress(OSError, IndexError):
                return int(os.listdir(folder)[0].rpartition(".")[2].partition("-")[0])
            assert front.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """Return every process that was started with this journal, however far down."""
        mark, found = f"ATOMTX_STATE_DIR={self.home}/state".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    made = Typed(tmp_path / "home")
    made.run("borg", "init", "--encryption=repokey-blake2")
    return made


def test_restored(disk: Disk, flat: Flat, typed: Typed, tmp_path: Path) -> None:
    """The command that `show` prints restores the moment, byte for byte and with all metadata."""
    make_special(make_tree(flat.home / "data"))
    before, about = tree(flat.root), described(flat.home)
    typed.backup("-r", str(flat.root))
    (flat.home / "file").write_bytes(b"later")
    (run,) = typed.runs()
    assert (run["outcome"], run["client"]) == ("completed", "borg")
    to = tmp_path / "to here"
    shown = typed.told("show", run["id"], "--to", str(to))
    (backup,) = shown["backups"]
    restore = backup["restore"]
    assert restore["needs"] == ["BORG_PASSPHRASE"]
    typed.run("env", "-C", restore["cwd"], *restore["argv"])
    assert tree(Path(f"{to}{flat.root}")) == before
    assert described(Path(f"{to}{flat.home}")) == about
    assert [backup["backup_id"]] == typed.archives()
    assert disk.left() == []


def test_inside(flat: Flat) -> None:
    """A repository and cache inside the set are the live ones, and left out of the backup."""
    make_tree(flat.home / "data")
    typed = Typed(flat.home / "user")
    typed.run("borg", "init", "--encryption=repokey-blake2")
    said = typed.backup("-r", str(flat.root))
    assert str(typed.repository) in said
    (name,) = typed.archives()
    paths = set(typed.run("borg", "list", "--format={path}{NL}", f"::{name}").splitlines())
    assert inside(flat.home / "data") <= paths
    left_out = (typed.repository, typed.home / ".cache/borg", typed.home / ".config/borg/security")
    assert not [path for path in paths for out in left_out if path.startswith(f"{str(out)[1:]}/")]


_RSH = """#!{python}
import os, socket, sys
socket.socket(socket.AF_UNIX).connect(os.environ["SSH_AUTH_SOCK"])
os.execvp("sh", ["sh", "-c", " ".join(sys.argv[2:])])
"""


def test_agent(flat: Flat, typed: Typed) -> None:
    """An agent inside the set answers, and the keys beside its socket are saved."""
    keys = flat.home / "keys"
    keys.mkdir()
    (keys / "private").write_text("key")
    shell = typed.home / "rsh"
    shell.write_text(_RSH.format(python=sys.executable))
    shell.chmod(0o755)
    typed.env |= {
        "BORG_REPO": f"ssh://host{typed.repository}",
        "BORG_RSH": str(shell),
        "BORG_REMOTE_PATH": str(borg_of(NEW)),
        "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        "SSH_AUTH_SOCK": str(keys / "agent"),
    }
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(keys / "agent"))
        agent.listen()
        said = typed.backup(str(flat.home))
        (name,) = typed.archives()
        paths = typed.run("borg", "list", "--format={path}{NL}", f"::{name}").splitlines()
    assert f"{keys}/agent" in said
    assert str(keys / "private")[1:] in paths


def test_killed(disk: Disk, flat: Flat, typed: Typed) -> None:
    """After SIGKILL of all, recovery waits for the passphrase, then saves the same moment."""
    (flat.home / "big").write_bytes(os.urandom(24 << 20))
    before = tree(flat.root)
    argv = (sys.executable, "-m", "atomtx", "backup", "-r", str(flat.root), "--client", "borg")
    front = subprocess.Popen(argv, env=typed.env, cwd="/")
    borg = typed.pid_with_lock(front)
    os.kill(borg, signal.SIGSTOP)
    killed = typed.processes()
    assert {front.pid, borg} < set(killed)  # and the runner
    for pid in killed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    front.wait()
    assert (typed.repository / "lock.exclusive").exists()
    (flat.home / "file").write_bytes(b"later")
    said = typed.atomtx("recover", status=6, without="BORG_PASSPHRASE")
    assert "BORG_PASSPHRASE of the interrupted run is not in the environment" in said
    said = typed.atomtx("recover")
    assert "borg: removed the lock of a process that is gone" in said
    assert [run["outcome"] for run in typed.runs()] == ["completed"]
    (name,) = typed.archives()
    assert name.endswith("-2")
    to = typed.home / "to"
    to.mkdir()
    typed.run("sh", "-c", f"cd {to} && borg extract ::{name}")
    assert tree(Path(f"{to}{flat.root}")) == before
    assert not (typed.repository / "lock.exclusive").exists()
    assert disk.left() == []


def test_retention(flat: Flat, typed: Typed) -> None:
    """Prune and compact are a step of the run: what no rule keeps is gone, and its space."""
    random = flat.home / "random"
    for n in range(2):
        random.write_bytes(os.urandom(3 << 20))
        typed.backup(str(flat.home), *(("--retention", "--keep-last 1") if n else ()))
    (name,) = typed.archives()
    newest = max(typed.runs(), key=lambda run: run["started_at"])
    assert name == typed.told("show", newest["id"])["backups"][0]["backup_id"]
    stored = sum(path.stat().st_size for path in typed.repository.rglob("*") if path.is_file())
    assert stored < 2 * (3 << 20)


def test_unusable(disk: Disk, flat: Flat, typed: Typed) -> None:
    """With a wrong passphrase there is one line, exit status 2, and nothing was changed."""
    typed.env["BORG_PASSPHRASE"] = "wrong horse"
    said = typed.backup(str(flat.home), status=2)
    assert "borg: the passphrase is wrong for this repository" in said
    assert disk.left() == []
    assert typed.runs() == []
    doctor = (sys.executable, "-m", "atomtx", "doctor")
    found = subprocess.run(doctor, env=typed.env, capture_output=True, text=True, check=False)
    assert any(line.split()[:3] == ["ok", "borg", NEW] for line in found.stdout.splitlines())


def test_by_its_repository(flat: Flat, typed: Typed) -> None:
    """Without --client, BORG_REPO says that borg is meant, where nothing else is."""
    assert shutil.which("borg", path=typed.env["PATH"])
    said = typed.atomtx("backup", "--dry-run", str(flat.home))
    assert "borg create --json --log-json" in said

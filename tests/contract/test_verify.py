"""`atomtx sure verify-backup` of whole runs with the real restic, kopia and borg."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from atomtx import journalfile, locks
from atomtx.restoring import PREFIX, sweep
from tests.contract.test_borg import NEW
from tests.contract.test_clients import program
from tests.sure import unchanged_stat
from tests.vm import files_guest

SECRET = "correct horse"
PROGRAMS = {"restic": "restic-0.19.1", "kopia": "kopia", "borg": f"borg-{NEW}"}
Done = subprocess.CompletedProcess[str]


class Typed:
    """`atomtx` as root types it, a client with its repository, and a directory to save."""

    def __init__(self, home: Path, client: str) -> None:
        assert os.geteuid() == 0, "a run mounts, and so needs root"
        self.home, self.client = home, client
        self.program = program(PROGRAMS[client])
        self.data = home / "my data"
        self.data.mkdir(parents=True)
        self.tmp = home / "tmp"
        self.tmp.mkdir()
        repository = home / "repository"
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path))),
            "HOME": str(home),
            "TZ": "UTC",
            "ATOMTX_STATE_DIR": str(home / "state"),
            "RUNTIME_DIRECTORY": str(home / "run"),
        }
        if client == "restic":
            self.env |= {"RESTIC_REPOSITORY": str(repository), "RESTIC_PASSWORD": SECRET}
            self.run(self.program, "init", "--quiet")
        elif client == "kopia":
            repository.mkdir()
            self.env |= {
                "KOPIA_PASSWORD": SECRET,
                "KOPIA_CHECK_FOR_UPDATES": "false",
                "KOPIA_PERSIST_CREDENTIALS_ON_CONNECT": "false",
            }
            self.run(self.program, "repository", "create", "filesystem", "--path", str(repository))
        else:
            self.env |= {"BORG_REPO": str(repository), "BORG_PASSPHRASE": SECRET}
            self.run(self.program, "init", "--encryption=repokey-blake2")

    def run(self, *argv: str, status: int = 0) -> Done:
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, cwd="/")
        assert done.returncode == status, (argv, done.stdout, done.stderr)
        assert SECRET not in done.stdout + done.stderr
        return done

    def words(self, *words: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "atomtx", *words)

    def atomtx(self, *words: str, status: int = 0) -> Done:
        return self.run(*self.words(*words), status=status)

    def backup(self, *extra: str, command: str = "", status: int = 0) -> str:
        """Save the directory, and return the run's id."""
        client = ("--client", self.client, "--command", command or self.program)
        self.atomtx("backup", "--read-live", str(self.data), *client, *extra, status=status)
        return str(json.loads(self.atomtx("history", "--json").stdout)[0]["id"])

    def scan(self) -> None:
        self.atomtx("sure", "scan", str(self.data))

    def verify(self, run: str, *words: str, status: int = 0) -> Done:
        done = self.atomtx("sure", "verify-backup", run, *words, status=status)
        assert self.left() == []
        return done

    def left(self) -> list[str]:
        """Return what a verification left where it restores to."""
        state = Path(self.env["ATOMTX_STATE_DIR"])
        return [str(p) for place in (state, self.tmp) for p in place.glob(f"{PREFIX}*")]

    def sql(self, statement: str) -> None:
        path = Path(self.env["ATOMTX_STATE_DIR"], journalfile.NAME)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Typed]:
    return lambda client: Typed(tmp_path / "home", client)


@pytest.fixture
def restic(made: Callable[[str], Typed]) -> Typed:
    typed = made("restic")
    (typed.data / "a").mkdir()
    (typed.data / "a/one").write_bytes(os.urandom(300_000))
    (typed.data / "two").write_text("two")
    return typed


@pytest.mark.parametrize("client", list(PROGRAMS))
def test_equal(client: str, made: Callable[[str], Typed]) -> None:
    """All that a client keeps comes back equal; what it does not is said, or named by --strict."""
    typed = made(client)
    files_guest.make(typed.data)
    (typed.data / "s").mkdir()
    with closing(socket.socket(socket.AF_UNIX)) as made_one:
        made_one.bind(os.path.relpath(typed.data / "s/socket"))
    os.utime(typed.data / "a/soft", ns=(0, 10**18 + 123_456_789), follow_symlinks=False)
    typed.scan()
    run = typed.backup()
    done = typed.verify(run[:6])
    assert (done.stdout, "no difference" in done.stderr) == ("", True)
    assert f"note: {client} does not keep " in done.stderr
    assert f"restoring run {run} with {client} to {typed.home}/state/{PREFIX}" in done.stderr
    told = [json.loads(line) for line in typed.verify(run, "--json").stdout.splitlines()]
    (tree,) = told[-1]["trees"]
    assert (told[-1]["message_type"], told[-1]["exit_status"], tree["differences"]) == (
        *("result", 0),
        0,
    )
    assert (tree["path"], tree["generation"], tree["is_of_run"]) == (str(typed.data), 1, False)
    strict = typed.verify(run, "--strict", status=1).stdout.splitlines()
    assert f"missing     {typed.data}/s/socket" in strict
    assert (f"missing     {typed.data}/a/fifo" in strict) == (client == "kopia")
    assert len(strict) == (8 if client == "kopia" else 1)


@pytest.mark.parametrize("client", list(PROGRAMS))
def test_differences(client: str, made: Callable[[str], Typed]) -> None:
    """A byte that differs, a file that the backup lacks, and one that it has too much are named."""
    typed = made(client)
    for name in ("byte", "gone", "same"):
        (typed.data / name).write_text(name)
    run = typed.backup()
    with unchanged_stat(typed.data):
        (typed.data / "gone").unlink()
        (typed.data / "new").touch()
    with unchanged_stat(typed.data / "byte"):
        (typed.data / "byte").write_text("bite")
    typed.scan()
    done = typed.verify(run, status=1)
    assert sorted(done.stdout.splitlines()) == [
        f"changed     {typed.data}/byte: contents (though size and time are the same: damage?)",
        f"extra       {typed.data}/gone",
        f"missing     {typed.data}/new",
    ]
    assert f"generation 1 of {typed.data} was read at 20" in done.stderr
    assert "3 differences" in done.stderr
    typed.scan()
    found = typed.verify(run, "--against", "1", "--ignore", "contents", "--json", status=1).stdout
    kinds = [json.loads(line).get("kind") for line in found.splitlines()]
    assert sorted(filter(None, kinds)) == ["extra", "missing"]
    typed.verify(run, "--against", "3", status=2)


def test_damaged_repository(restic: Typed) -> None:
    """What restic cannot read back is said in its words, and what it restored is compared."""
    run = restic.backup()
    restic.scan()
    packs = [path for path in (restic.home / "repository/data").rglob("*") if path.is_file()]
    largest = max(packs, key=lambda path: path.stat().st_size)
    largest.chmod(0o600)
    with largest.open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(1000))
    done = restic.verify(run, status=1)
    assert "; what was restored is compared" in done.stderr
    assert f"{restic.data}/a/one" in done.stdout
    assert f"{restic.data}/two" not in done.stdout


def test_nothing_restored(restic: Typed) -> None:
    """A backup that restic's cache has, and the repository has not, is one line, and no list."""
    run = restic.backup()
    restic.scan()
    shutil.rmtree(restic.home / "repository/snapshots")
    (restic.home / "repository/snapshots").mkdir()
    done = restic.verify(run, status=1)
    assert done.stdout == ""
    assert f"run {run} could not be restored: {restic.program}: exit status 1" in done.stderr


# -- refused -------------------------------------------------------------------------------------


def refused(done: Done) -> str:
    """Return what was said, in one line and perhaps a hint; and nothing was begun."""
    assert done.stdout == ""
    message, *hints = done.stderr.splitlines()
    assert len(hints) <= 1
    assert message.startswith("atomtx: ")
    return done.stderr


def test_no_database(restic: Typed) -> None:
    """A path of which no generation tells is not silently well."""
    run = restic.backup()
    said = refused(restic.verify(run, status=2))
    assert f"there is no integrity database of {restic.data}" in said
    assert f"`atomtx sure scan {restic.data}` makes one" in said


def test_no_backup(restic: Typed) -> None:
    """A run that failed, one that is not there, and one of a command of the user's are refused."""
    restic.scan()
    live = ("--read-live", str(restic.data))
    for command, words in (("false", "it is failed"), ("true", "a command of your own")):
        status = 1 if command == "false" else 0
        restic.atomtx("backup", *live, "--client", "command", "--command", command, status=status)
        run = json.loads(restic.atomtx("history", "--json").stdout)[0]["id"]
        assert words in refused(restic.verify(run, status=2))
    assert "no run has an id" in refused(restic.verify("abcdef", status=2))


def test_password(restic: Typed) -> None:
    """A password that is wrong, or not there, is one line; it is in none."""
    run = restic.backup()
    restic.scan()
    right = restic.env.pop("RESTIC_PASSWORD")
    said = refused(restic.verify(run, status=2))
    assert f"RESTIC_PASSWORD of run {run} is not in the environment" in said
    restic.env["RESTIC_PASSWORD"] = "wrong horse"
    said = refused(restic.verify(run, status=2))
    assert "the password is wrong for this repository" in said
    assert "horse" not in said
    restic.env["RESTIC_PASSWORD"] = right
    restic.verify(run)


def test_another_repository(restic: Typed) -> None:
    """A repository in the place of the run's is not restored from."""
    run = restic.backup()
    restic.scan()
    shutil.rmtree(restic.home / "repository")
    restic.run(restic.program, "init", "--quiet")
    assert f"another one than that of run {run}" in refused(restic.verify(run, status=2))


def test_no_room(restic: Typed) -> None:
    """Where there is clearly no room nothing is begun; at the user's word it is."""
    run = restic.backup()
    restic.scan()
    restic.sql(f"UPDATE backups SET bytes_processed = {1 << 60}")
    target = restic.home / "restored"
    for words in ((), ("--target", str(target))):
        assert "1.0 EiB" in refused(restic.verify(run, *words, status=2))
        assert not target.exists()
    restic.verify(run, "--no-space-check")
    restic.sql(f"UPDATE backups SET bytes_processed = NULL, files_processed = {1 << 60}")
    assert f"{1 << 60} files to restore" in refused(restic.verify(run, status=2))


def test_target(restic: Typed) -> None:
    """A directory that the user names must be new or empty, and stays, for him alone."""
    run = restic.backup()
    restic.scan()
    target = restic.home / "restored"
    restic.verify(run, "--target", str(target))
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert Path(f"{target}{restic.data}/two").read_text() == "two"
    assert "it is not empty" in refused(restic.verify(run, "--target", str(target), status=2))
    assert Path(f"{target}{restic.data}/two").read_text() == "two"


def test_which_path(restic: Typed) -> None:
    """--of names one path of the run, and no other."""
    run = restic.backup()
    restic.atomtx("sure", "scan", str(restic.data), "--database", str(restic.home / "own.db"))
    own = ("--database", str(restic.home / "own.db"))
    restic.verify(run, "--of", str(restic.data), *own)
    said = refused(restic.verify(run, "--of", str(restic.data / "a"), *own, status=2))
    assert f"{restic.data}/a is no path of the run" in said


def test_partial(made: Callable[[str], Typed]) -> None:
    """A path that was not saved is said, and is not silently well; the others are compared."""
    typed = made("kopia")
    other = typed.home / "other"
    other.mkdir()
    for path in (typed.data, other):
        (path / "file").write_text("file")
        typed.atomtx("sure", "scan", str(path))
    run = typed.backup("--read-live", str(other))
    said = typed.verify(run).stderr
    assert said.count(": no difference") == 2
    assert said.count(" does not keep ") == 1
    typed.sql("UPDATE runs SET outcome = 'partial', reason = 'one was not read'")
    typed.sql(f"UPDATE backups SET outcome = 'failed' WHERE path = '{other}'")
    said = typed.verify(run, status=3).stderr
    assert f"{other} was not saved: it is not compared" in said
    assert "partial, what it lacks is missing: one was not read" in said
    assert said.count(": no difference") == 1
    assert "saved nothing of" in refused(typed.verify(run, "--of", str(other), status=2))


# -- credentials ---------------------------------------------------------------------------------


def test_credentials(restic: Typed) -> None:
    """A job's password comes from its file, also from where the configuration has it now."""
    password, moved = restic.home / "password", restic.home / "moved"
    password.write_text(restic.env.pop("RESTIC_PASSWORD"))
    password.chmod(0o600)
    config = restic.home / "atomtx.toml"

    def configure(place: Path) -> None:
        config.write_text(
            f'[jobs.it]\nread-live = ["{restic.data}"]\nclient = "restic"\n'
            f'command = ["{restic.program}"]\n'
            f'[jobs.it.credentials]\nRESTIC_PASSWORD = {{ file = "{place}" }}\n'
        )
        config.chmod(0o600)

    configure(password)
    restic.env["ATOMTX_CONFIG"] = str(config)
    restic.atomtx("backup", "it")
    run = json.loads(restic.atomtx("history", "--json").stdout)[0]["id"]
    restic.scan()
    restic.verify(run)
    password.rename(moved)
    configure(moved)
    assert "RESTIC_PASSWORD" in refused(restic.verify(run, status=2))
    restic.verify(run, "--config", str(config))


# -- interrupted ---------------------------------------------------------------------------------

WRAPPER = """#!/bin/sh
[ "$1" = restore ] || exec {program} "$@"
{program} "$@"
echo $$ >{pid}
exec sleep 600
"""


def start(typed: Typed, run: str) -> subprocess.Popen[str]:
    words = typed.words("sure", "verify-backup", run)
    return subprocess.Popen(
        words, env=typed.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
    )


def halted(typed: Typed) -> tuple[str, Path]:
    """Save with a restic that does not end when it has restored; return its run, and its pid's."""
    wrapper, pid = typed.home / "restic", typed.home / "pid"
    wrapper.write_text(WRAPPER.format(program=typed.program, pid=pid))
    wrapper.chmod(0o755)
    run = typed.backup(command=str(wrapper))
    typed.scan()
    return run, pid


def is_there(pid: Path) -> bool:
    return pid.exists() and pid.read_text().endswith("\n")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.full, id="INT"),
        pytest.param(signal.SIGTERM, 143, id="TERM"),
    ],
)
def test_interrupted_restore(restic: Typed, number: signal.Signals, status: int) -> None:
    """A signal while the client restores ends the client, and nothing of the files is left."""
    restic.env["TMPDIR"] = str(restic.tmp)
    run, pid = halted(restic)
    with start(restic, run) as child:
        try:
            assert locks.wait_until(lambda: is_there(pid), 60)
            (left,) = restic.left()
            assert left.startswith(str(restic.tmp))
            assert Path(f"{left}/restored{restic.data}/two").read_text() == "two"
            assert stat.S_IMODE(os.stat(left).st_mode) == 0o700
            child.send_signal(number)
            assert child.wait(60) == status
        finally:
            child.kill()
    assert restic.left() == []
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="INT"),
        pytest.param(signal.SIGTERM, marks=pytest.mark.full, id="TERM"),
    ],
)
def test_interrupted_comparison(restic: Typed, number: signal.Signals) -> None:
    """So does one while it is compared, here by a process whose reader does not read."""
    run = restic.backup()
    for n in range(3000):
        (restic.data / f"a file that the backup lacks, number {n}").touch()
    restic.scan()
    with start(restic, run) as child:
        try:
            assert child.stderr
            while not child.stderr.readline().startswith("comparing "):
                assert child.poll() is None
            assert len(restic.left()) == 1
            child.send_signal(number)
            assert child.wait(60) == 128 + number
        finally:
            child.kill()
    assert restic.left() == []


def test_killed(restic: Typed) -> None:
    """What a killed verification left goes with the next after its client, and that is said."""
    run, pid = halted(restic)
    with start(restic, run) as child:
        try:
            assert locks.wait_until(lambda: is_there(pid), 60)
        finally:
            child.kill()
    (left,) = restic.left()
    assert sweep(Path(left).parent) == []
    assert restic.left() == [left]
    os.kill(int(pid.read_text()), signal.SIGKILL)
    pid.unlink()
    with start(restic, run) as child:
        try:
            assert locks.wait_until(lambda: is_there(pid), 60)
            assert child.stderr
            said = child.stderr.readline()
            assert said == f"note: {left}, of a verification that was killed, was removed\n"
            assert len(restic.left()) == 1
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 143
        finally:
            child.kill()
    assert restic.left() == []


def test_kopia_cache(made: Callable[[str], Typed]) -> None:
    """What kopia has in its cache, and the repository has lost, is not taken for saved."""
    typed = made("kopia")
    (typed.data / "one").write_text("one")
    # Then nothing tells the password but a file beside the description of the connection.
    place = ("filesystem", "--path", str(typed.home / "repository"))
    del typed.env["KOPIA_PERSIST_CREDENTIALS_ON_CONNECT"]
    typed.run(typed.program, "repository", "connect", *place)
    del typed.env["KOPIA_PASSWORD"]
    run = typed.backup()
    typed.scan()
    assert "may read from its cache" not in typed.verify(run).stderr
    for path in (typed.home / "repository").glob("[pq]/**/*.f"):
        path.unlink()
    assert "could not be restored" in typed.verify(run, status=1).stderr


def test_kopia_wrapper(made: Callable[[str], Typed]) -> None:
    """A wrapper that has a connection of its own cannot be given another cache: that is said."""
    typed = made("kopia")
    (typed.data / "one").write_text("one")
    wrapper = typed.home / "kopia"
    config = Path(typed.env["HOME"], ".config/kopia").rename(typed.home / "elsewhere")
    wrapper.write_text(
        f"#!/bin/sh\nexport KOPIA_CONFIG_PATH={config}/repository.config\n"
        f'exec {typed.program} "$@"\n'
    )
    wrapper.chmod(0o755)
    run = typed.backup(command=str(wrapper))
    typed.scan()
    assert "kopia may read from its cache" in typed.verify(run).stderr

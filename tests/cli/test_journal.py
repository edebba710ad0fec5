"""`atomtx journal`, and what the other commands say of a journal that is damaged or an old one."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import pytest

from atomtx import aside, journalfile
from atomtx.cli import runs
from atomtx.cli.journal import TABLES, journal
from atomtx.cli.render import Reporter
from atomtx.errors import AtomtxError, EffectError, JournalDamagedError
from atomtx.intents import RunClient
from atomtx.journal import Journal
from atomtx.settling import Settler
from atomtx.statedir import RunFolder, prepare
from tests import hotjournal
from tests.cli.conftest import Run
from tests.cli.test_cli import loaded
from tests.runs import RUN, a_plan, a_run

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can recover")


@pytest.fixture
def path(env: dict[str, str]) -> Path:
    """The journal, with a run."""
    state = prepare(Path(env["ATOMTX_STATE_DIR"]))
    with Journal.open(state) as journal:
        RunFolder.of(state, RUN).make()
        journal.begin(a_plan(), [])
    return state / journalfile.NAME


@pytest.fixture
def busy(path: Path) -> Iterator[None]:
    """Another atomtx is at work."""
    lock = os.open(path.with_name(journalfile.LOCK), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_SH)
    yield
    os.close(lock)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}


def ruin(path: Path) -> bytes:
    path.write_bytes(os.urandom(8192))
    return path.read_bytes()


@pytest.mark.parametrize("name", journal.commands)
def test_help(name: str) -> None:
    """The help of each command below `journal` has an example and its exit statuses."""
    command = journal.get_command(click.Context(journal), name)
    assert command
    assert "EXIT STATUS" in (command.help or "")
    assert "Example" in (command.help or "")


@pytest.mark.parametrize(
    "words", ["--help", "check --help", "backup --help", "export --help", "set-aside --help"]
)
def test_help_imports(env: dict[str, str], atomtx_: Run, words: str) -> None:
    """Help is there without a database library."""
    assert loaded(env, "journal", *words.split()) == []
    assert "EXIT STATUS" in atomtx_("journal", *words.split()).stdout


@pytest.mark.parametrize("words", ["check", "export", "set-aside", "backup copy"])
def test_imports(env: dict[str, str], path: Path, tmp_path: Path, words: str) -> None:
    """What looks after the file needs the standard library alone."""
    words = words.replace("copy", str(tmp_path / "copy"))
    assert set(loaded(env, "journal", *words.split())) <= {"sqlite3"}


# -- check -----------------------------------------------------------------------------------


def test_check(path: Path, atomtx_: Run) -> None:
    """A sound journal is one line with the file's numbers, status 0, and left as it is."""
    before = files(path)
    done = atomtx_("journal", "check")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    version = journalfile.SCHEMA_VERSION
    assert line.startswith(f"sound: {path}, 1 run, version {version}, change counter ")
    data = json.loads(atomtx_("journal", "check", "--json").stdout)
    assert (data["ok"], data["runs"], data["findings"]) == (True, 1, [])
    assert files(path) == before


def test_check_finds(path: Path, atomtx_: Run) -> None:
    """Each finding is a line, and the status is 1."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE runs SET state = 'mounted', rev = -1")
        connection.commit()
    done = atomtx_("journal", "check")
    assert done.returncode == 1
    first, second, last = done.stdout.splitlines()
    assert first == f"damage  run {RUN}: it is mounted, and its moves end in planned"
    assert second == f"damage  run {RUN}: its revision is -1, and that of its last move 0"
    assert last == f"not sound: {path}; docs/recovery.md tells what to do"
    data = json.loads(atomtx_("journal", "check", "--json").stdout)
    assert [finding["kind"] for finding in data["findings"]] == ["damage"] * 2


def test_check_damaged(path: Path, atomtx_: Run) -> None:
    """A file that is no database is told by the check, and left where it is."""
    before = ruin(path)
    done = atomtx_("journal", "check")
    assert done.returncode == 1
    assert done.stdout.startswith("damage  ")
    assert done.stderr == ""
    assert path.read_bytes() == before


def test_check_hot(path: Path, atomtx_: Run) -> None:
    """A change that a killed writer left is told, and is still there afterwards."""
    before = path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE runs SET label = 'not committed'")
        connection.commit()
    hotjournal.write(path, before)
    left = files(path)
    done = atomtx_("journal", "check")
    assert done.returncode == 0
    assert done.stdout.startswith("note    a killed atomtx left a change half made")
    assert files(path) == left


def test_check_nothing(env: dict[str, str], atomtx_: Run) -> None:
    """Before the first backup there is nothing to check, and none is made."""
    done = atomtx_("journal", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "is not there" in done.stdout
    assert not Path(env["ATOMTX_STATE_DIR"]).exists()


# -- backup and export -----------------------------------------------------------------------


def test_backup(path: Path, atomtx_: Run, tmp_path: Path) -> None:
    """A copy is made at its name and told, also as JSON; a second one of that name is refused."""
    done = atomtx_("journal", "backup", "copy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"copied {path} with 1 run to {tmp_path}/copy\n"
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    again = atomtx_("journal", "backup", str(tmp_path / "copy"))
    assert again.returncode == 2
    assert "exists" in again.stderr
    data = json.loads(atomtx_("journal", "backup", "--json", str(tmp_path / "other")).stdout)
    assert data == {"journal": str(path), "file": str(tmp_path / "other"), "runs": 1}


def test_backup_at_work(path: Path, atomtx_: Run, tmp_path: Path) -> None:
    """While a run is in the middle of a change it is copied as it was before that change."""
    with Journal.open(path.parent) as journal:
        with journal.change(journal.load(RUN)) as change:
            change.intend(RunClient("command", (("true",),), "/"))
            done = atomtx_("journal", "backup", str(tmp_path / "copy"))
            assert done.returncode == 0, done.stderr
        assert len(journal.load(RUN).steps) == 2
    with closing(sqlite3.connect(tmp_path / "copy")) as connection:
        assert connection.execute("SELECT count(*) FROM steps").fetchone() == (0,)


def test_export(path: Path, atomtx_: Run) -> None:
    """Every row is an object a line, with its table and the table's columns."""
    before = files(path)
    done = atomtx_("journal", "export")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    order = [row["table"] for row in rows]
    assert order == sorted(order, key=TABLES.index)
    assert {"journals", "runs", "volumes"} <= set(order)
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        for table in TABLES:
            expected = [
                {"table": table, **dict(row)}
                for row in connection.execute(f"SELECT * FROM {table}")
            ]
            assert [row for row in rows if row["table"] == table] == expected
    assert files(path) == before


def test_export_to_a_slow_reader(path: Path, env: dict[str, str]) -> None:
    """A reader that does not read on makes no run wait."""
    with closing(sqlite3.connect(path)) as connection:  # more than a pipe holds
        for n in range(40):
            connection.execute(
                "INSERT INTO runs SELECT printf('%016x', ?), 'backup', 'job ' || ?, label, "
                "'destroyed', 0, NULL, NULL, NULL, 0, zeroblob(9000) || plan, client, NULL, NULL, "
                "1, 1, 'b', 1, NULL, NULL, NULL FROM runs LIMIT 1",
                (n, n),
            )
        connection.commit()
    argv = [sys.executable, "-m", "atomtx", "journal", "export"]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert b'"journals"' in child.stdout.readline()
        assert child.poll() is None
        with closing(sqlite3.connect(path, timeout=0)) as connection:
            connection.execute("UPDATE runs SET pid = 70000000")
            connection.commit()
        rest = child.stdout.read()
    assert b'"pid": 70000000' not in rest


# -- set aside -------------------------------------------------------------------------------


def test_set_aside(path: Path, atomtx_: Run) -> None:
    """It is renamed, whole; the next command begins anew; the way back is told, and is one."""
    before = path.read_bytes()
    done = atomtx_("journal", "set-aside")
    assert done.returncode == 0, done.stderr
    (kept,) = path.parent.glob("journal.db.aside-*Z")
    assert kept.read_bytes() == before
    assert f"{path} is now {kept}" in done.stdout
    assert "recover --scan" in done.stdout
    assert atomtx_("history").stdout == "no run to show\n"
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            subprocess.run(line, shell=True, check=True)
    assert RUN[:8] in atomtx_("history").stdout
    data = json.loads(atomtx_("journal", "set-aside", "--json").stdout)
    assert set(data) == {"journal", "aside", "way_back"}
    assert Path(data["aside"]).read_bytes() == before


def test_set_aside_busy(path: Path, atomtx_: Run, busy: None) -> None:
    """Not while another atomtx is at work: status 5, and it is where it was."""
    before = files(path)
    done = atomtx_("journal", "set-aside")
    assert done.returncode == 5
    assert "another atomtx is at work" in done.stderr
    assert files(path) == before


def test_set_aside_nothing(env: dict[str, str], atomtx_: Run) -> None:
    """Where there is none, that is an error, and no state directory is made."""
    assert atomtx_("journal", "set-aside").returncode == 2
    prepare(Path(env["ATOMTX_STATE_DIR"]))
    done = atomtx_("journal", "set-aside")
    assert done.returncode == 2
    assert "no journal" in done.stderr


# -- what the others say ---------------------------------------------------------------------


@root_only
def test_damaged(path: Path, atomtx_: Run) -> None:
    """`recover` sets a damaged journal aside and says so; readers and `--dry-run` leave it."""
    before = ruin(path)
    for words in ("history", "status", "show 1", "doctor", "journal check", "recover --dry-run"):
        done = atomtx_(*words.split())
        assert done.returncode == 1, words
        assert "damaged" in done.stdout + done.stderr, words
        assert path.read_bytes() == before, words
    done = atomtx_("recover")
    (kept,) = aside.damaged(path.parent)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].strip() == (
        f"it was set aside as {kept}; `atomtx recover --scan` lists what its runs left, and the "
        "next command begins a new journal"
    )
    assert kept.read_bytes() == before


@root_only
def test_reminder(path: Path, atomtx_: Run) -> None:
    """While a damaged journal lies there, `recover`, `backup` and `doctor` say so in a line."""
    ruin(path)
    atomtx_("recover")
    (kept,) = aside.damaged(path.parent)
    for _ in range(2):
        done = atomtx_("recover")
        assert done.returncode == 0
        line = [line for line in done.stderr.splitlines() if line.startswith("note:")][-1]
        assert f"a damaged journal lies aside at {kept}" in line
        assert f"a damaged one lies aside at {kept}" in atomtx_("doctor").stdout
        done = atomtx_("backup", "no-such-pool/a", "--command", "true")
        assert f"note: a damaged journal lies aside at {kept}" in done.stderr
    kept.unlink()
    assert "aside" not in atomtx_("recover").stderr
    assert "aside" not in atomtx_("doctor").stdout


@root_only
def test_only_looks(env: dict[str, str], atomtx_: Run) -> None:
    """`--dry-run` says that there is nothing to do; where there is no journal it makes none."""
    Journal.open(prepare(Path(env["ATOMTX_STATE_DIR"]))).close()
    done = atomtx_("recover", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "nothing to recover\n")
    env["ATOMTX_STATE_DIR"] += "-new"
    done = atomtx_("recover", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "nothing to recover\n")
    done = atomtx_("recover", "--dry-run", "--run", "5e0a")
    assert (done.returncode, "no open run begins with '5e0a'" in done.stderr) == (2, True)
    assert not Path(env["ATOMTX_STATE_DIR"]).exists()


@root_only
def test_looks_after_loss(path: Path, atomtx_: Run) -> None:
    """Where the journal is gone, a dry run does not say that all is well, and stays one."""
    path.unlink()
    before = files(path)
    for _ in range(2):
        done = atomtx_("recover", "--dry-run")
        assert done.returncode == 0
        assert "note: the journal that was here is gone; `atomtx recover --scan`" in done.stderr
    assert files(path) == before


class _Settler:
    """Stands for what settles a parked run, and meets trouble."""

    def __init__(self, trouble: AtomtxError) -> None:
        self.trouble = trouble

    def settle(self, _: object) -> None:
        raise self.trouble


def test_damage_is_not_a_parked_run(path: Path) -> None:
    """What keeps a parked run from its end stops no backup; a damaged journal does."""
    said: list[str] = []
    show = SimpleNamespace(step=said.append, warn=said.append, progress=said.append)
    run = a_run()
    busy = cast(Settler, _Settler(EffectError("it is busy")))
    runs._try_parked(busy, run, cast(Reporter, show))
    assert said == ["it is busy"]
    damaged = cast(Settler, _Settler(JournalDamagedError(path, "why")))
    with pytest.raises(JournalDamagedError):
        runs._try_parked(damaged, run, cast(Reporter, show))


@root_only
@pytest.mark.parametrize("words", ["recover", "recover --dry-run", "recover --scan"])
def test_rolled_back(path: Path, atomtx_: Run, words: str) -> None:
    """Promise 2: a journal of yesterday acts in no command; it is told, and stays as it is."""
    yesterday = path.read_bytes()
    with Journal.open(path.parent) as journal:
        for _ in range(3):
            with journal.change(journal.load(RUN)) as change:
                change.set(attempts=1)
    path.write_bytes(yesterday)
    done = atomtx_(*words.split())
    assert done.returncode == 1
    assert "older than what this machine has seen" in done.stderr
    assert "journal set-aside" in done.stderr
    assert path.read_bytes() == yesterday
    assert atomtx_("history").returncode == 0
    assert atomtx_("journal", "check").returncode == 1
    assert atomtx_("journal", "set-aside").returncode == 0
    assert atomtx_("recover", "--dry-run").returncode == 0

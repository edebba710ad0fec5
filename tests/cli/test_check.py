"""`atomtx check`, as a monitoring system runs it: one line, and the plug-ins' exit statuses."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from atomtx.journal import Journal
from tests.cli.conftest import Run, State
from tests.cli.test_cli import loaded
from tests.journals import a_run

LINE = re.compile(r"ATOMTX (OK|WARNING|CRITICAL|UNKNOWN) - [^|\n]+( \| [^|\n]+)?\n")
_NOBODY = """
import os, sys, json, sqlite3, encodings.idna
from atomtx import cli, clients, history
from atomtx.cli import check
os.setgroups([])
os.setgid(65534)
os.setuid(int(sys.argv[1]))
cli.main(["check", "--max-age", "26h"])
"""
STATUS = {"OK": 0, "WARNING": 1, "CRITICAL": 2, "UNKNOWN": 3}


def ago(hours: float) -> int:
    """Return a time as the journal has it."""
    return time.time_ns() // 1000 - int(hours * 3_600_000_000)


def add(add_to: State, number: int, hours: float, **values: Any) -> None:
    """Write a run whose moment was *hours* ago."""
    at = ago(hours)
    add_to.add_run(a_run(number, **{"moment_at": at, "started_at": at} | values))


def check(atomtx_: Run, *words: str) -> tuple[int, str]:
    """Run the check, see that it says what a plug-in may, and return its status and line."""
    done = atomtx_("check", *words)
    match = LINE.fullmatch(done.stdout)
    assert match, done.stdout
    assert STATUS[match[1]] == done.returncode
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_ok(state: State, atomtx_: Run) -> None:
    """A fresh backup is OK, with its age and the limits as performance data."""
    add(state, 1, 27)
    add(state, 2, 3)
    status, line = check(atomtx_, "--max-age", "26h", "--warn-age", "25h")
    assert status == 0
    words = re.fullmatch(r"ATOMTX OK - home: completed 3 h ago \| age=(\d+)s;90000;93600;0\n", line)
    assert words
    assert 10_800 <= int(words[1]) < 10_860


@pytest.mark.parametrize(("hours", "status"), [(24.9, 0), (25.1, 1), (26.1, 2)])
def test_limits(state: State, atomtx_: Run, hours: float, status: int) -> None:
    """Each limit has its exit status."""
    add(state, 1, 50)
    add(state, 2, hours)
    assert check(atomtx_, "--max-age", "26h", "--warn-age", "25h")[0] == status


def test_failed(state: State, atomtx_: Run) -> None:
    """A failure after a fresh backup warns; a bar or a newline in its reason breaks no line."""
    add(state, 1, 3)
    add(state, 2, 1, outcome="failed", reason="one | two\nthree")
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 1
    assert "failed 1 h ago: one / two three (`atomtx show 00000000`)" in line


def test_never(state: State, atomtx_: Run) -> None:
    """What never completed is critical, and has no age."""
    add(state, 1, 2, outcome="partial")
    add(state, 2, 1, outcome="failed")
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 2
    assert "home: never completed, the last run failed" in line
    assert line.endswith("| age=U;;93600;0\n")


def test_interrupted(state: State, atomtx_: Run) -> None:
    """An interrupted run warns, that of a job which ran once as well."""
    add(state, 1, 3)
    add(state, 2, 2)
    state.add_run(a_run(3, label="once", state="mounted", outcome=None))
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 1
    assert "once: run 00000000 was interrupted (`atomtx recover`); home: completed" in line


def test_parked(state: State, atomtx_: Run) -> None:
    """A parked cleanup warns; the backup counts."""
    add(state, 1, 3)
    add(state, 2, 2, state="unmounting", cleanup="parked")
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 1
    assert "parked (`atomtx recover`), completed 2 h ago" in line


def test_future(state: State, atomtx_: Run) -> None:
    """A clock that was set back is a warning, and no age of -3 h."""
    add(state, 1, 5)
    add(state, 2, -3)
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 1
    assert "in the future: was the clock set back?" in line
    assert "| age=U;" in line


def test_one_off(state: State, atomtx_: Run) -> None:
    """A backup made once does not alarm for ever; asked for by name it does."""
    add(state, 1, 9999)
    assert check(atomtx_, "--max-age", "26h")[0] == 3
    add(state, 2, 2, label="nightly")
    add(state, 3, 1, label="nightly")
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 0
    assert "home" not in line
    assert check(atomtx_, "--max-age", "26h", "--job", "home")[0] == 2


def test_idle(state: State, atomtx_: Run) -> None:
    """A job whose timer is off is critical after its history was forgotten; the way out is told."""
    for number in range(3):
        add(state, number, (9 - number) * 168, job="job weekly", label="weekly")
        add(state, number + 10, 1, job="job daily", label="daily", ended_at=ago(1))
    with Journal.open(state.path) as journal:
        assert journal.expire(86_400) == 1
    status, line = check(atomtx_, "--max-age", "9d")
    assert status == 2
    assert "weekly: last completed 49 d ago, over 9d; daily: completed" in line
    assert "; where one was given up: --ignore JOB | " in line
    named = check(atomtx_, "--max-age", "9d", "--job", "weekly")
    assert (named[0], "--ignore" in named[1]) == (2, False)
    assert check(atomtx_, "--max-age", "9d", "--ignore", "weekly")[0] == 0
    add(state, 4, 1, job="job weekly", label="weekly", outcome="failed")
    status, line = check(atomtx_, "--max-age", "9d")
    assert (status, "--ignore" in line) == (2, False)


def test_job(state: State, atomtx_: Run) -> None:
    """--job takes a label or a key, exactly; one that never ran is critical."""
    add(state, 1, 9999, label="home -r")
    add(state, 2, 1)
    assert check(atomtx_, "--max-age", "26h", "--job", "home")[0] == 0
    assert check(atomtx_, "--max-age", "26h", "--job", "key-2")[0] == 0
    assert check(atomtx_, "--max-age", "26h", "--job", "key-2", "--job", "home -r")[0] == 2
    for name in ("hom", "home%", "HOME", "key", ""):
        status, line = check(atomtx_, "--max-age", "26h", "--job", name)
        assert (status, "never ran" in line) == (2, True), name


def test_ignore(state: State, atomtx_: Run) -> None:
    """A job that was given up is left out by its label or its key."""
    for number in (1, 2):
        add(state, number, 9999, label="old", job="old-key")
        add(state, number + 10, 1)
    assert check(atomtx_, "--max-age", "26h")[0] == 2
    assert check(atomtx_, "--max-age", "26h", "--ignore", "old")[0] == 0
    assert check(atomtx_, "--max-age", "26h", "--ignore", "old-key")[0] == 0
    assert check(atomtx_, "--max-age", "26h", "--ignore", "ol")[0] == 2


@pytest.mark.parametrize("named", [("--job", "old"), ("--job", "never-ran"), ()])
def test_ignore_all(state: State, atomtx_: Run, named: tuple[str, ...]) -> None:
    """What was left out is not said to have never run, nor to have run once."""
    for number in (1, 2):
        add(state, number, 9999, label="old")
    left_out = ("--ignore", "old", "--ignore", "never-ran")
    status, line = check(atomtx_, "--max-age", "26h", *named, *left_out)
    assert (status, "--ignore leaves no job to check" in line) == (3, True), line
    status, line = check(atomtx_, "--max-age", "26h", "--job", "other", *named, *left_out)
    assert (status, "other: never ran" in line, "old" in line) == (2, True, False), line


def test_two_repositories(state: State, atomtx_: Run) -> None:
    """One label in two repositories is two jobs: the fresh one does not stand for the old one."""
    for number in (1, 2):
        add(state, number, 99, repository="aaaaaaaaaaaa")
        add(state, number + 10, 1, repository="bbbbbbbbbbbb")
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 2
    assert "home (restic aaaaaaaa): last completed" in line
    assert "home (restic bbbbbbbb): completed" in line
    assert re.search(r"'home \(restic aaaaaaaa\)'=\d+s;;93600;0 'home \(restic bbbbb", line)


def test_moved_repository(state: State, atomtx_: Run) -> None:
    """A job of the configuration that got another repository is the same: the old one is none."""
    add(state, 1, 99, job="job home", repository="aaaaaaaaaaaa")
    add(state, 2, 1, job="job home", repository="bbbbbbbbbbbb")
    status, line = check(atomtx_, "--max-age", "26h")
    assert (status, "aaaaaaaa" in line) == (0, False)
    (job,) = json.loads(atomtx_("check", "--max-age", "26h", "--json").stdout)["jobs"]
    assert (job["runs"], job["repository"]) == (2, "bbbbbbbbbbbb")


def test_many(state: State, atomtx_: Run) -> None:
    """Of many jobs the gravest come first, as many as a line holds; each has its age."""
    for number in range(8):
        add(state, 2 * number + 1, 1, label=f"job-{number}")
        add(state, 2 * number + 2, 99 if number == 7 else 1, label=f"job-{number}")
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 2
    text, numbers = line.split(" | ")
    assert text.startswith("ATOMTX CRITICAL - job-7: last completed ")
    assert text.endswith("; and 3 more jobs; where one was given up: --ignore JOB")
    assert numbers.count(";;93600;0") == 8


def test_no_journal(atomtx_: Run, tmp_path: Path) -> None:
    """Where nothing ran here there is no answer, and nothing is made."""
    status, line = check(atomtx_, "--max-age", "26h", "--job", "home")
    assert status == 3
    assert "there is no journal" in line
    assert not (tmp_path / "state").exists()


def test_damaged(state: State, atomtx_: Run) -> None:
    """A journal that cannot be read is UNKNOWN, and is left where it is."""
    add(state, 1, 1)
    state.journal.close()
    state.journal.path.write_bytes(b"not a database" * 100)
    status, line = check(atomtx_, "--max-age", "26h")
    assert status == 3
    assert "damaged" in line
    assert state.journal.path.read_bytes() == b"not a database" * 100


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--max-age", "soon"),
        ("--max-age", "26h", "--warn-age", "27h"),
        ("--max-age", "26h", "--bogus"),
        ("--max-age", "26h", "extra"),
    ],
)
def test_usage(state: State, atomtx_: Run, words: tuple[str, ...]) -> None:
    """Wrong usage is UNKNOWN, not the 2 of our other commands, which would be CRITICAL."""
    add(state, 1, 1)
    assert check(atomtx_, *words)[0] == 3
    done = atomtx_("check", *words, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["status"] == "UNKNOWN"


def test_help(atomtx_: Run) -> None:
    """`--help` is none of a plug-in's failures."""
    done = atomtx_("check", "--help")
    assert done.returncode == 0
    assert "UNKNOWN" in done.stdout


def test_json(state: State, atomtx_: Run) -> None:
    """--json says the same, and everything that the line leaves out."""
    add(state, 1, 3)
    add(state, 2, 1, outcome="failed", reason="no network")
    done = atomtx_("check", "--max-age", "26h", "--job", "home", "--job", "srv", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_status"] == 2
    assert found["never_ran"] == ["srv"]
    assert found["max_age_s"] == 93_600
    (job,) = found["jobs"]
    assert (job["label"], job["job"], job["status"], job["runs"]) == ("home", "key-2", "WARNING", 2)
    assert 10_800 <= job["age_s"] < 10_860
    assert job["completed"] == f"{1:016x}"
    assert job["newest"] == f"{2:016x}"


def test_imports(state: State) -> None:
    """The check reads with the standard library alone, so that it is quick."""
    add(state, 1, 1)
    state.add_run(a_run(2, state="mounted", outcome=None))
    assert loaded(state.env, "check", "--max-age", "26h", "--job", "home") == ["sqlite3"]


def test_writes_nothing(state: State, atomtx_: Run) -> None:
    """Nothing in the state directory changes."""
    add(state, 1, 1)
    add(state, 2, 1, outcome=None, state="mounted")
    state.journal.close()

    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in state.path.rglob("*") if p.is_file()}

    before = files()
    check(atomtx_, "--max-age", "26h")
    assert files() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_open", [False, True])
def test_other_user(state: State, is_open: bool) -> None:
    """Another user gets one clear line; an answer where the journal is for all to read."""
    add(state, 1, 3)
    add(state, 2, 3)
    if is_open:
        state.add_run(a_run(3, state="mounted", outcome=None))
    state.journal.close()
    # Not below pytest's own folder, which each session closes to others again.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "state"
        shutil.copytree(state.path, path)
        env = {**state.env, "ATOMTX_STATE_DIR": str(path)}
        path.chmod(0o700)
        status, line = check(_as_nobody(env))
        assert status == 3
        assert "permission denied" in line
        path.chmod(0o755)
        (path / "journal.db").chmod(0o644)
        status, line = check(_as_nobody(env))
    assert (status, "permission denied" in line) == ((3, True) if is_open else (0, False)), line


def _as_nobody(env: dict[str, str]) -> Run:
    """Return how to run the check as another user; Python itself may be out of its reach."""

    def run(*_: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", _NOBODY, str(pwd.getpwnam("nobody").pw_uid)]
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)

    return run

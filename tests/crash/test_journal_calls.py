"""
The journal alone, killed or failing at every single system call that persists something.

Two commits, through `atomtx.journal.Journal`, on this machine's own disk.  Whatever was
acknowledged is there afterwards, whatever was not is there as a whole or not at all, and SQLite
finds no fault with the file.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from atomtx import plan
from atomtx.errors import AtomtxError
from atomtx.journal import Journal
from atomtx.statedir import prepare
from atomtx.states import Event
from tests.crash.cases import PERSISTING, injections
from tests.crash.tracing import calls, tracer
from tests.runs import a_plan

_ENDED, _REFUSED, _BROKEN = 0, 1, 70


def _write(state: Path, acknowledged: int) -> None:
    """Make a run of two commits; tell each that is durable on *acknowledged*."""
    with Journal.open(prepare(state)) as journal:
        the_plan = a_plan()
        run = journal.begin(the_plan, [plan.intents(the_plan)[0]])
        os.writev(acknowledged, [f"{run.id} 0\n".encode()])
        with journal.change(run) as change:
            change.intend(plan.intents(the_plan)[0])
            change.fire(Event.SNAPSHOTS_TAKEN)
        os.writev(acknowledged, [f"{run.id} 1\n".encode()])


def _copied(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a journal to begin with; as if on another machine, which has seen none of the others."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder / "run"))
    return shutil.copytree(made, folder)


def _played(folder: Path, *, inject: str = "", count: str = "") -> tuple[int, list[str]]:
    """Write in a forked child that is disturbed; return its status, and its system calls."""
    folder.mkdir(exist_ok=True)
    told, trace = folder / "acknowledged", folder / "trace"
    trace.touch()
    pid = os.fork()
    if pid == 0:
        status = _BROKEN
        try:
            os.closerange(3, 1024)
            acknowledged = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            tracer(trace, inject=inject, count=count)()
            _write(folder / "state", acknowledged)
            status = _ENDED
        except AtomtxError:
            status = _REFUSED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), list(calls(trace))


def _violations(folder: Path) -> list[str]:
    """Open the journal as the next process does, and look for what is missing or half there."""
    with Journal.open(prepare(folder / "state")) as journal:
        found = {run.id: (run.rev, len(run.steps)) for run in journal.open_runs()}
        path = journal.path
    with closing(sqlite3.connect(path)) as connection:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    told = folder / "acknowledged"
    lines = [line.split() for line in told.read_text().splitlines()] if told.exists() else []
    lost = [f"{run} {rev} is lost" for run, rev in lines if found.get(run, (-1,))[0] < int(rev)]
    halves = [f"{run} at {n[0]} has {n[1]} steps" for run, n in found.items() if n[1] <= n[0]]
    return [*lost, *halves, *([verdict] if verdict != "ok" else [])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a journal in which nothing is yet."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "run").mkdir()
    Journal.open(prepare(folder / "state")).close()
    return folder


@pytest.fixture(scope="module")
def recorded(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """The system calls that persist something of a run of two commits."""
    folder = tmp_path_factory.mktemp("recorded") / "it"
    with pytest.MonkeyPatch.context() as patch:
        status, found = _played(_copied(made, folder, patch), count=",".join(PERSISTING))
    assert status == _ENDED
    assert found.count("fdatasync") >= 2  # a commit is flushed
    return found


@pytest.mark.parametrize("action", ["signal=KILL", "error=EIO", "error=ENOSPC"])
def test_every_call(
    tmp_path: Path,
    made: Path,
    recorded: Sequence[str],
    action: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise 10: an acknowledged commit stays, a disturbed one is whole or absent."""
    wishes = [way["inject"] for way in injections(recorded, "front") if action in way["inject"]]
    assert len(wishes) > 20
    found, disturbed = [], 0
    for n, wish in enumerate(wishes):
        folder = _copied(made, tmp_path / str(n), monkeypatch)
        status, traced = _played(folder, inject=wish)
        if not traced or status == _BROKEN:
            found.append(f"{wish}: ended with {status}")
        disturbed += status in (-signal.SIGKILL, _REFUSED)
        found += [f"{wish}: {text}" for text in _violations(folder)]
    assert found == []
    assert disturbed > len(wishes) // 2


@pytest.mark.parametrize(
    ("call", "action", "step"),
    [
        *((call, "error=EIO", 1) for call in ("fsync", "mkdir", "ftruncate", "unlink")),
        ("fdatasync", "signal=KILL", 2),
        ("pwrite64", "signal=KILL", 10),
    ],
)
def test_new_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, action: str, step: int
) -> None:
    """A journal that cannot be made is an error, not a traceback; and then it can be made."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for n in range(1, 1000, step):
        folder = tmp_path / str(n)
        status, traced = _played(folder, inject=f"{call}:{action}:when={n}")
        if len(traced) < n:
            break
        assert status in (_ENDED, _REFUSED, -signal.SIGKILL)
        assert _violations(folder) == []
    assert n > 1


def test_the_check_can_fail(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that cannot roll back is found half written."""
    monkeypatch.setattr("atomtx.journalfile.PRAGMAS", ("journal_mode=OFF", "synchronous=OFF"))
    found = []
    for n in range(1, 40):
        folder = _copied(made, tmp_path / str(n), monkeypatch)
        _played(folder, inject=f"pwrite64:signal=KILL:when={n}")
        try:
            found += _violations(folder)
        except (AtomtxError, sqlite3.DatabaseError) as exc:
            found.append(str(exc))
    assert found

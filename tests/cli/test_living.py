"""status, attach and stop, with processes that hold a run's locks as the real ones do."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atomtx import health, history
from atomtx.cli import status
from atomtx.cli.status import standing
from atomtx.intents import (
    AFTER_SUCCESS,
    AROUND_SNAPSHOT,
    FINALLY,
    ApplyRetention,
    Intent,
    RunHook,
    RunStep,
    UndoHook,
)
from tests.cli.conftest import Run, State
from tests.journals import T0, a_run

RUN = f"{1:016x}"
Hold = Callable[..., "subprocess.Popen[str]"]
Made = tuple[Intent | str, str, str | None]  # what was intended, its outcome, and the detail
PARKED_ROW = {"state": "unmounting", "cleanup": "parked"}
STEPS = {"verb": "run", "state": "ran", "ended_at": T0 + 2_000_000}

# Holds the lock; on SIGTERM runs the SQL, if any, and ends: so does a front end that compensates.
_HOLDER = """
import fcntl, os, signal, sqlite3, sys
lock, journal, sql = sys.argv[1:]
descriptor = os.open(lock, os.O_RDWR)
fcntl.flock(descriptor, fcntl.LOCK_EX)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("held", flush=True)
signal.sigwait([signal.SIGTERM])
if sql:
    connection = sqlite3.connect(journal)
    connection.execute(sql)
    connection.commit()
    connection.close()
"""
UNDONE = (
    "UPDATE runs SET state = 'destroyed', outcome = 'rolled-back', ended_at = started_at + 1, "
    "reason = 'interrupted by SIGTERM'"
)
COMPLETED = "UPDATE runs SET state = 'destroyed', outcome = 'completed', ended_at = started_at + 1"
PARKED = "UPDATE runs SET state = 'unmounting', outcome = 'completed', cleanup = 'parked'"


@pytest.fixture
def hold(state: State) -> Iterator[Hold]:
    """Start a process that holds a lock until SIGTERM."""
    started: list[subprocess.Popen[str]] = []

    def hold(lock: Path, sql: str = "") -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", _HOLDER, str(lock), str(state.journal.path), sql]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        return child

    yield hold
    for child in started:
        child.kill()
        child.communicate()


def test_ended_meanwhile(state: State) -> None:
    """A run that ends between the look at its row and that at its locks is not interrupted."""
    folder = state.add_run(a_run(1, state="backing-up", outcome=None))
    (seen,) = history.open_runs(state.journal.path)
    assert standing(state.path, seen)[0] == seen
    with closing(sqlite3.connect(state.journal.path)) as connection:
        connection.execute(COMPLETED)
        connection.commit()
    now, life = standing(state.path, seen)
    assert (now.outcome, life.any) == ("completed", False)
    assert health._of_open(now, status.situation(now, life)) is None
    assert folder.path.exists()


def situation(atomtx_: Run) -> dict[str, object]:
    (entry,) = json.loads(atomtx_("status", "--json").stdout)
    assert isinstance(entry, dict)
    return entry


def test_status_none(state: State, atomtx_: Run) -> None:
    """Where every run has ended, `status` says so."""
    state.add_run(a_run(1))
    assert atomtx_("status").stdout == "no run is at work, none is unfinished\n"
    assert json.loads(atomtx_("status", "--json").stdout) == []


def test_status_running(state: State, atomtx_: Run, hold: Hold) -> None:
    """A run whose front end lives is running, and its progress is shown."""
    folder = state.add_run(a_run(1, state="backing-up", outcome=None))
    folder.write_progress({"percent": 42.0, "bytes_done": 1024, "eta_s": 60, "new": "field"})
    hold(folder.front_lock)
    assert situation(atomtx_)["situation"] == "running"
    done = atomtx_("status")
    assert done.returncode == 0
    assert "42 %, 1.0 KiB, 1 min 00 s left" in done.stdout


@pytest.mark.parametrize("lock", ["runner.lock", "client.lock"])
def test_status_orphaned(state: State, atomtx_: Run, hold: Hold, lock: str) -> None:
    """A run whose front end is gone while its client goes on is for `recover` to take over."""
    folder = state.add_run(a_run(1, state="backing-up", outcome=None))
    hold(folder.path / lock)
    assert situation(atomtx_)["situation"] == "orphaned"
    assert "atomtx recover" in atomtx_("status").stdout


def test_status_interrupted(state: State, atomtx_: Run) -> None:
    """A run that holds no lock is interrupted, whatever pid its row has; so is a parked one's."""
    state.add_run(a_run(1, state="mounted", outcome=None, pid=1))
    assert situation(atomtx_)["situation"] == "interrupted"
    assert "run `atomtx recover`" in atomtx_("status").stdout


def test_status_parked(state: State, atomtx_: Run) -> None:
    """A parked run is shown with the reason."""
    state.add_run(a_run(1, state="unmounting", cleanup="parked", reason="held by backup-x"))
    assert situation(atomtx_)["situation"] == "parked"
    assert "held by backup-x" in atomtx_("status").stdout


def test_attach(state: State, env: dict[str, str], hold: Hold) -> None:
    """`attach` follows a run until its end, and exits with the run's status."""
    folder = state.add_run(a_run(1, state="backing-up", outcome=None))
    front = hold(folder.front_lock, COMPLETED)
    argv = [sys.executable, "-m", "atomtx", "attach", RUN[:15]]
    child = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert child.stderr.readline() == "backing-up\n"
    front.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=120)[1].endswith(f"run {RUN}: completed\n")
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({}, 0),
        ({"outcome": "partial"}, 3),
        ({"outcome": "failed"}, 1),
        ({"outcome": "rolled-back"}, 1),
        (PARKED_ROW, 4),
        (PARKED_ROW | {"outcome": "failed"}, 1),
        (PARKED_ROW | {"outcome": "rolled-back"}, 1),
    ],
)
def test_attach_ended(state: State, atomtx_: Run, values: dict[str, Any], status: int) -> None:
    """`attach` to a run that has ended tells how, at once; the worst part decides."""
    state.add_run(a_run(1, **values))
    assert atomtx_("attach", RUN).returncode == status


RETENTION = ApplyRetention("restic", ("/home",), ("--keep-last", "1"))


@pytest.mark.parametrize(
    ("values", "steps", "status"),
    [
        ({}, [(RunHook(AFTER_SUCCESS, ("mail",)), "failed", None)], 7),
        ({}, [(UndoHook(AROUND_SNAPSHOT, ("thaw",)), "failed", None)], 7),
        ({}, [(RETENTION, "failed", None), (RunHook(FINALLY, ("mail",)), "done", None)], 7),
        ({}, [(RETENTION, "done", None)], 0),
        ({}, [("of-another-release", "failed", None)], 0),
        (PARKED_ROW, [(RETENTION, "failed", None)], 7),
        ({"outcome": "partial"}, [(RETENTION, "failed", None)], 3),
        ({"outcome": "failed"}, [(RunHook(AROUND_SNAPSHOT, ("freeze",)), "failed", None)], 1),
        (STEPS, [(RunStep(1, ("snap",)), "done", "exit status 0")], 0),
        (STEPS, [(RunStep(n, ("backup",)), "done", f"exit status {n}") for n in (4, 7)], 7),
        (STEPS | {"outcome": "partial"}, [(RunStep(1, ("snap",)), "done", "exit status 3")], 3),
    ],
)
def test_attach_steps(
    state: State, atomtx_: Run, values: dict[str, Any], steps: list[Made], status: int
) -> None:
    """`attach` exits as the run itself did: its hooks, its retention and its steps count."""
    state.add_run(a_run(1, **values))
    for what, outcome, detail in steps:
        kind, payload = (what, "{}") if isinstance(what, str) else (what.kind, what.to_json())
        row = {"run": RUN, "attempt": 1, "kind": kind, "payload": payload, "detail": detail}
        state.journal.add("steps", outcome=outcome, intended_at=T0, ended_at=T0, **row)
    done = atomtx_("attach", "--json", RUN)
    assert done.returncode == status, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exit_status"] == status


def test_attach_interrupted(state: State, atomtx_: Run) -> None:
    """`attach` to an interrupted run does not wait for ever: status 6, and what to do."""
    state.add_run(a_run(1, state="backing-up", outcome=None))
    done = atomtx_("attach", RUN)
    assert done.returncode == 6
    assert "run `atomtx recover`" in done.stderr


def test_detach(state: State, env: dict[str, str], hold: Hold) -> None:
    """Ctrl-C ends the watching, not the run."""
    folder = state.add_run(a_run(1, state="backing-up", outcome=None))
    front = hold(folder.front_lock)
    argv = [sys.executable, "-m", "atomtx", "attach", RUN]
    child = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    child.stderr.readline()
    child.send_signal(signal.SIGINT)
    assert f"detached; run {RUN} goes on" in child.communicate(timeout=120)[1]
    assert child.returncode == 130
    assert front.poll() is None


def test_attach_json(state: State, atomtx_: Run) -> None:
    """`attach --json` ends with the run's result as one object."""
    state.add_run(a_run(1, outcome="partial"))
    lines = [json.loads(line) for line in atomtx_("attach", "--json", RUN).stdout.splitlines()]
    assert lines[-1]["message_type"] == "result"
    assert (lines[-1]["outcome"], lines[-1]["exit_status"]) == ("partial", 3)


def test_stop(state: State, atomtx_: Run, hold: Hold) -> None:
    """`stop` asks the front end, waits for its end, and reports how the run ended."""
    front = hold(state.add_run(a_run(1, state="backing-up", outcome=None)).front_lock, UNDONE)
    done = atomtx_("stop", RUN)
    assert done.returncode == 0
    assert f"asked the front end, process {front.pid}" in done.stderr
    assert "rolled-back (interrupted by SIGTERM)" in done.stderr
    assert front.wait(10) == 0


def test_stop_parked(state: State, atomtx_: Run, hold: Hold) -> None:
    """A stopped run whose cleanup was parked is status 4."""
    hold(state.add_run(a_run(1, state="backing-up", outcome=None)).front_lock, PARKED)
    assert atomtx_("stop", RUN).returncode == 4


def test_stop_recorded_pid(state: State, atomtx_: Run, hold: Hold) -> None:
    """Of several that have the lock's file open only the front end is signalled."""
    folder = state.add_run(a_run(2))
    front = hold(folder.front_lock, UNDONE)
    with folder.front_lock.open() as lock:
        other = subprocess.Popen(["sleep", "60"], stdin=lock)
    state.add_run(a_run(1, state="mounted", outcome=None, pid=front.pid))
    (state.path / "runs" / RUN / "front.lock").unlink()
    (state.path / "runs" / RUN / "front.lock").hardlink_to(folder.front_lock)
    assert atomtx_("stop", RUN).returncode == 0
    assert other.poll() is None
    other.kill()
    other.wait()


def test_stop_spares_zfs(state: State, env: dict[str, str], tmp_path: Path) -> None:
    """A `zfs` command that outlived its front end is waited for, never signalled."""
    folder = state.add_run(a_run(1, state="planned", outcome=None))
    fake = tmp_path / "zfs"
    fake.symlink_to(sys.executable)
    source, sink = os.pipe()
    code = (
        f"import fcntl, os; fcntl.flock(0, fcntl.LOCK_EX); print(flush=True); os.read({source}, 1)"
    )
    with folder.front_lock.open("r+") as lock:
        child = subprocess.Popen(
            [str(fake), "-c", code], stdin=lock, stdout=subprocess.PIPE, pass_fds=(source,)
        )
    assert child.stdout is not None
    child.stdout.readline()
    argv = [sys.executable, "-m", "atomtx", "stop", RUN]
    stop = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
    assert stop.stderr is not None
    lines = iter(stop.stderr.readline, "")
    said = next((line for line in lines if "waiting for what it started" in line), None)
    os.close(sink)  # now it may end
    stop.communicate()
    child.communicate()
    assert said
    assert (stop.returncode, child.returncode) == (6, 0)


def test_stop_nobody(state: State, atomtx_: Run) -> None:
    """Where nobody is at work `stop` says so and points to recover."""
    state.add_run(a_run(1, state="backing-up", outcome=None, pid=1))
    done = atomtx_("stop", RUN)
    assert done.returncode == 6
    assert "nobody is at work" in done.stderr


def test_stop_ended(state: State, atomtx_: Run) -> None:
    """A run that ended before is no error."""
    state.add_run(a_run(1))
    done = atomtx_("stop", RUN)
    assert (done.returncode, done.stderr) == (0, f"run {RUN}: completed\n")


def test_stop_timeout(state: State, atomtx_: Run, hold: Hold) -> None:
    """A front end that takes longer than `--timeout` is reported, not killed."""
    folder = state.add_run(a_run(1, state="backing-up", outcome=None))
    slow = hold(folder.front_lock, UNDONE)
    slow.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    done = atomtx_("stop", RUN, "--timeout", "0.5")
    slow.send_signal(signal.SIGCONT)
    assert done.returncode == 1
    assert "did not end within" in done.stderr
    assert time.monotonic() - began < 20

"""The kernel's locks: who lives is what they say, however the others died."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atomtx import locks, system

PATIENCE_S = 60.0


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "front.lock"
    path.touch()
    return path


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def start(children: list[subprocess.Popen[str]], code: str, *args: str) -> subprocess.Popen[str]:
    """Start *code*, and wait for the line that it prints when it is ready."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", textwrap.dedent(code), *args]
    child = subprocess.Popen(
        argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children.append(child)
    return child


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    return child.stdout.readline().strip()


HOLDER = """
    import subprocess, sys
    from pathlib import Path
    from atomtx import locks

    held = locks.try_acquire(Path(sys.argv[1]))
    assert held is not None
    passed = (held,) if sys.argv[2] == "inherited" else ()
    # Without `passed` nothing is closed for the child but what closes itself.
    child = subprocess.Popen(
        ["sleep", "1000"], stdout=subprocess.DEVNULL, pass_fds=passed, close_fds=bool(passed)
    )
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def test_exclusive(lock: Path) -> None:
    """A lock has one holder; it is free again as soon as that holder lets go."""
    first = locks.try_acquire(lock)
    assert first is not None
    assert locks.try_acquire(lock) is None
    assert locks.is_held(lock)
    os.close(first)
    assert not locks.is_held(lock)
    second = locks.try_acquire(lock)
    assert second is not None
    os.close(second)


def test_acquired(lock: Path) -> None:
    """A lock that is held for a block is free after it, also where the block fails."""
    with locks.acquired(lock) as first, locks.acquired(lock) as second:
        assert first is not None
        assert second is None
    assert not locks.is_held(lock)
    with pytest.raises(RuntimeError), locks.acquired(lock):
        raise RuntimeError
    assert not locks.is_held(lock)


def test_missing_file(tmp_path: Path) -> None:
    """A lock whose file is not there is held by nobody, and cannot be taken."""
    assert not locks.is_held(tmp_path / "absent")
    assert locks.holders(tmp_path / "absent") == []
    assert not locks.has_lock_open(os.getpid(), tmp_path / "absent")
    assert not locks.holds(os.getpid(), tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        locks.try_acquire(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_inherited(lock: Path, children: list[subprocess.Popen[str]]) -> None:
    """Promise 6: F is held as long as a command lives that a killed front end had started."""
    front = start(children, HOLDER, str(lock), "inherited")
    command = int(line(front))
    front.kill()
    front.wait()
    assert locks.is_held(lock)
    assert locks.try_acquire(lock) is None
    assert [p.pid for p in locks.holders(lock)] == [command]
    assert locks.send(command, signal.SIGKILL, if_still=lambda pid: locks.has_lock_open(pid, lock))
    assert locks.wait_gone(command, PATIENCE_S)
    assert not locks.is_held(lock)


def test_not_inherited(lock: Path, children: list[subprocess.Popen[str]]) -> None:
    """Promise 6: R is the runner's alone: its children do not hold it on when it is killed."""
    runner = start(children, HOLDER, str(lock), "close-on-exec")
    child = int(line(runner))
    assert locks.is_held(lock)
    assert [p.pid for p in locks.holders(lock)] == [runner.pid]
    runner.kill()
    runner.wait()
    assert locks.command_of(child) is not None
    assert not locks.is_held(lock)
    os.kill(child, signal.SIGKILL)


def test_look_is_not_a_holder(lock: Path) -> None:
    """Many who look whether a lock is held never keep somebody from taking it."""
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            locks.is_held(lock)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            held = locks.try_acquire(lock)
            assert held is not None
            os.close(held)
    finally:
        done.set()
        for looker in lookers:
            looker.join()


def looked_at(lock: Path) -> int:
    """Look at a lock without an end, as one does that is stopped meanwhile."""
    descriptor = os.open(lock, os.O_RDONLY)
    assert locks.try_lock(descriptor, fcntl.LOCK_SH)
    return descriptor


def test_slow_look(lock: Path) -> None:
    """One who looks, and is not given the processor, keeps nobody from taking the lock."""
    threading.Timer(1.0, os.close, [looked_at(lock)]).start()
    held = locks.try_acquire(lock)
    assert held is not None
    assert locks.is_held(lock)
    os.close(held)


def test_look_without_end(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who looks for ever is not waited for as long."""
    monkeypatch.setattr(locks, "_LOOKER_S", 0.3)
    looker = looked_at(lock)
    assert locks.try_acquire(lock) is None
    os.close(looker)
    with locks.acquired(lock) as held:
        assert held is not None


def test_held_is_told_soon(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a lock is held is told at once, also where that comes while a look is waited for."""
    monkeypatch.setattr(locks, "_LOOKER_S", PATIENCE_S)
    with locks.acquired(lock):
        assert locks.try_acquire(lock) is None
    looker, late = looked_at(lock), os.open(lock, os.O_RDWR)

    def take() -> None:
        fcntl.flock(looker, fcntl.LOCK_UN)
        fcntl.flock(late, fcntl.LOCK_EX)

    monkeypatch.setattr(time, "sleep", lambda _: take())
    assert locks.try_acquire(lock) is None
    os.close(looker)
    os.close(late)


def test_looks_do_not_see_each_other(lock: Path) -> None:
    """Two who look at the same time both see that nobody holds it."""
    descriptor = os.open(lock, os.O_RDWR)
    assert locks.try_lock(descriptor, fcntl.LOCK_SH)
    assert not locks.is_held(lock)
    os.close(descriptor)


def test_holders(lock: Path, children: list[subprocess.Popen[str]]) -> None:
    """Those who have the file open are found by what they have open, and shown with their names."""
    front = start(children, HOLDER, str(lock), "inherited")
    command = int(line(front))
    # execve(2) closes what tells us of it an instant before the name is the new one.
    assert locks.wait_until(lambda: locks.command_of(command) == "sleep", PATIENCE_S)
    found = {p.pid: p.command for p in locks.holders(lock)}
    assert found.keys() == {front.pid, command}
    assert locks.holds(front.pid, lock)
    assert locks.holds(command, lock)
    assert not locks.holds(os.getpid(), lock)
    assert found[command] == "sleep"
    assert str(locks.Process(command, "sleep")) == f"{command} (sleep)"
    with lock.open():
        assert os.getpid() not in [p.pid for p in locks.holders(lock)]
        assert locks.has_lock_open(os.getpid(), lock)
    assert not locks.has_lock_open(os.getpid(), lock)
    os.kill(command, signal.SIGKILL)


def test_onlooker(lock: Path, children: list[subprocess.Popen[str]]) -> None:
    """Who has the file open without the lock, to look at it, is no holder of it."""
    code = """
        import fcntl, sys
        file = open(sys.argv[1])
        fcntl.flock(file, fcntl.LOCK_SH)
        print("open", flush=True)
        sys.stdin.read()
    """
    onlooker = start(children, code, str(lock))
    assert line(onlooker) == "open"
    assert locks.has_lock_open(onlooker.pid, lock)
    assert locks.holders(lock) == []
    assert not locks.holds(onlooker.pid, lock)


def test_same_name_elsewhere(lock: Path, tmp_path: Path) -> None:
    """A file of the same name is another lock: the file itself counts."""
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / lock.name
    other.touch()
    with locks.acquired(lock):
        assert not locks.is_held(other)
        assert not locks.has_lock_open(os.getpid(), other)


def test_foreign_files_are_not_asked(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of anybody's is asked for its status: on a server that is gone, stat(2) hangs."""
    monkeypatch.setattr(system.here, "pids", lambda: [os.getpid()])
    asked: list[str] = []
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith("/proc/"):
            asked.append(os.readlink(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with (tmp_path / "on a dead server").open("w"), lock.open():
        assert locks.has_lock_open(os.getpid(), lock)
        assert locks.holders(lock) == []
    assert str(lock) in asked
    assert str(tmp_path / "on a dead server") not in asked


def test_unproven_process(children: list[subprocess.Popen[str]]) -> None:
    """Promise 6: a process is signalled only after the proof that it is the one that is meant."""
    child = start(children, "import time; print(flush=True); time.sleep(1000)")
    line(child)
    asked: list[int] = []

    def no(pid: int) -> bool:
        asked.append(pid)
        return False

    assert not locks.send(child.pid, signal.SIGKILL, if_still=no)
    assert asked == [child.pid]
    assert child.poll() is None
    assert locks.send(child.pid, signal.SIGTERM, if_still=lambda _: True)
    assert child.wait(PATIENCE_S) == -signal.SIGTERM


def test_process_that_ends_under_the_proof(children: list[subprocess.Popen[str]]) -> None:
    """A process that ends, and is waited for, during the proof is not signalled, nor another."""
    child = start(children, "import sys; sys.stdin.read()")

    def ends(_: int) -> bool:
        child.communicate("")
        return True

    assert not locks.send(child.pid, signal.SIGKILL, if_still=ends)


def test_process_that_is_gone(lock: Path, children: list[subprocess.Popen[str]]) -> None:
    """A process that is gone is not signalled, has no name, no lock, and is not waited for."""
    child = start(children, "")
    child.communicate()
    assert not locks.send(child.pid, signal.SIGKILL, if_still=lambda _: True)
    assert locks.command_of(child.pid) is None
    assert str(locks.Process.of(child.pid)) == f"{child.pid} (?)"
    assert not locks.has_lock_open(child.pid, lock)
    assert not locks.holds(child.pid, lock)
    assert locks.wait_gone(child.pid, 0.0)


def test_wait_gone(children: list[subprocess.Popen[str]]) -> None:
    """A wait for a process ends with the process, or with the time that was given."""
    child = start(children, "import sys; sys.stdin.read()")
    assert not locks.wait_gone(child.pid, 0.01)
    assert child.stdin
    child.stdin.close()
    child.stdin = None
    assert locks.wait_gone(child.pid, PATIENCE_S)


def test_readable() -> None:
    """What can be written to, but holds nothing to read, is waited for."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not locks.is_readable(ours.fileno(), 0.01)
        theirs.send(b"x")
        assert locks.is_readable(ours.fileno(), PATIENCE_S)


def test_wait_until() -> None:
    """A condition is looked at once at least, and until it holds."""
    answers = iter([False, False, True])
    assert locks.wait_until(lambda: next(answers), PATIENCE_S, step_s=0.001)
    assert list(answers) == []
    assert locks.wait_until(lambda: True, 0.0)
    assert not locks.wait_until(lambda: False, 0.0)


def test_boot_id() -> None:
    """A boot has one id."""
    assert len(locks.boot_id()) == 36
    assert locks.boot_id() == locks.boot_id()


@pytest.mark.parametrize("name", [b"\xff", b"sauvegarde-\xc3\xa9t\xc3\xa9"[:12], b") R 1 (\xe9"])
def test_name_that_is_no_text(
    lock: Path, children: list[subprocess.Popen[str]], name: bytes
) -> None:
    """A process that has any bytes as its name, or a letter cut in two, is found all the same."""
    code = """
        import ctypes, sys
        from pathlib import Path
        from atomtx import locks

        held = locks.try_acquire(Path(sys.argv[1]))
        assert ctypes.CDLL(None).prctl(15, bytes.fromhex(sys.argv[2]), 0, 0, 0) == 0
        print(flush=True)
        sys.stdin.read()
    """
    child = start(children, code, str(lock), name.hex())
    line(child)
    assert locks.holders(lock) == [locks.Process(child.pid, name.decode(errors="replace"))]
    assert system.here.session_of(child.pid) == os.getsid(child.pid)
    assert child.pid in system.here.session(os.getsid(child.pid))
    assert system.here.start_of(child.pid)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
def test_reaped_leader(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """
    A number that is a group's or a session's still is no process: nobody is signalled.

    Linux before 6.15 has EINVAL for it (pidfd_prepare in kernel/fork.c), later ones ENOENT for one
    that is a thread's by now.
    """

    def refuse(_: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(ProcessLookupError):
        system.here.watch(os.getpid())
    assert not locks.send(os.getpid(), signal.SIGTERM, if_still=lambda _: True)


def test_thread_that_ends(
    monkeypatch: pytest.MonkeyPatch, children: list[subprocess.Popen[str]]
) -> None:
    """The children of other threads are found, also where one ends as they are looked at."""
    children.append(subprocess.Popen(("sleep", "60"), text=True))
    listdir = os.listdir

    def listed(path: str) -> list[str]:
        return (["4194304"] if path.endswith("/task") else []) + listdir(path)

    monkeypatch.setattr(os, "listdir", listed)
    assert children[0].pid in system.here.descendants()

"""The runner: pure parts here, and the process itself, for real, as root."""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

import atomtx
from atomtx import clients, errand, locks, output, runner, supervisor, words
from atomtx.clients import Backup, End, Moment
from atomtx.errand import Errand, RunnerKilledError
from atomtx.errors import EffectError
from atomtx.intents import Mount
from atomtx.interrupts import Interrupts
from atomtx.mounts import namespace
from atomtx.output import Lines, Log
from atomtx.redact import Redactor
from atomtx.runner import Conversation, _drop_pinned, _needed, _reserve_end
from atomtx.statedir import RunFolder, prepare
from atomtx.states import Outcome
from atomtx.task import Task, end_from_json, end_to_json, span
from tests.runs import RUN

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
PATIENCE_S = 60.0
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


# -- lines -----------------------------------------------------------------------------------


def split(*chunks: bytes) -> list[str]:
    lines = Lines()
    return [line for chunk in chunks for line in lines.feed(chunk)] + list(lines.rest())


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ((b"a\nb\n",), ["a", "b"]),
        ((b"a\nb",), ["a", "b"]),
        ((b"a", b"b\nc", b"\n"), ["ab", "c"]),
        ((b"1%\r2%\r\n3%",), ["1%", "2%", "3%"]),
        ((b"\n\n \t\n",), []),
        ((b" a \n",), [" a "]),
        ((b"a\0b\n",), ["a\0b"]),
        ((b"caf\xc3\xa9 \xff\n",), ["café \ufffd"]),
        ((b"\xc3", b"\xa9\n"), ["é"]),
        ((b"a\x0bb\x1cc\xc2\x85d\n",), ["a\x0bb\x1cc\x85d"]),
        ((), []),
    ],
)
def test_lines(chunks: tuple[bytes, ...], expected: list[str]) -> None:
    """Output is split at newlines and carriage returns alone, whatever bytes it has."""
    assert split(*chunks) == expected


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_lines_by_chunks(chunks: list[bytes]) -> None:
    """Where the pipe's reads happen to cut the output makes no difference."""
    assert split(*chunks) == split(b"".join(chunks))


def test_overlong_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An overlong line is cut, also one that never ends, and the next one is whole again."""
    monkeypatch.setattr(output, "LINE_BYTES", 10)
    assert split(b"x" * 25 + b"\nnext\n") == ["x" * 10, "next"]
    lines = Lines()
    for _ in range(100):
        assert list(lines.feed(b"y" * 7)) == []
        assert len(lines._rest) <= 10
    assert list(lines.rest()) == ["y" * 10]


# -- the log ---------------------------------------------------------------------------------


def test_log_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 11: a chatty client cannot fill the disk; the log says where it was cut."""
    monkeypatch.setattr(output, "LOG_BYTES", 100)
    log = Log(tmp_path / "log", Redactor({}))
    for _ in range(50):
        log.line("x" * 9)
    text = (tmp_path / "log").read_text()
    assert text.endswith("[the log is full; the rest is not kept]\n")
    assert text.count("log is full") == 1
    assert len(text) <= 100 + 40
    Log(tmp_path / "log", Redactor({})).line("of the next attempt")
    assert (tmp_path / "log").read_text() == text


def test_log_is_redacted(tmp_path: Path) -> None:
    """Promise 11: no secret of the environment reaches the log, nor a password of a URL."""
    log = Log(tmp_path / "log", Redactor({"RESTIC_PASSWORD": "open sesame", "HOME": "/root"}))
    log.line("wrong password: open sesame (HOME is /root)")
    log.line("cannot reach rest:https://me:hunter22@host/")
    assert (tmp_path / "log").read_text() == (
        "wrong password: *** (HOME is /root)\ncannot reach rest:https://me:***@host/\n"
    )
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_log_of_a_full_disk() -> None:
    """A line that cannot be written is lost; the backup goes on."""
    Log(Path("/dev/full"), Redactor({})).line("words")


# -- what is stored --------------------------------------------------------------------------

TEXT = st.text(max_size=20)
TUPLE = st.lists(TEXT, max_size=3).map(tuple)
NUMBER = st.none() | st.integers(0, 2**63)
OUTCOME = st.sampled_from([Outcome.COMPLETED, Outcome.PARTIAL, Outcome.FAILED])
MOMENTS = st.builds(
    Moment,
    targets=TUPLE,
    root=TEXT,
    at=st.sampled_from([AT, AT.astimezone(timezone(timedelta(hours=2)))]),
    excludes=TUPLE,
    parent=st.none() | TEXT,
)
TASKS = st.builds(
    Task,
    run=TEXT,
    attempt=st.integers(),
    folder=TEXT,
    in_namespace=st.booleans(),
    mounts=st.lists(st.builds(Mount, TEXT, TEXT), max_size=3).map(tuple),
    live=TUPLE,
    client=TEXT,
    commands=st.lists(TUPLE, max_size=3).map(tuple),
    cwd=TEXT,
    env=st.dictionaries(TEXT, TEXT, max_size=3),
    moment=MOMENTS,
    stop_signal=st.integers(),
    grace_s=st.floats(0, 1e6),
    time_limit_s=st.floats(0, 1e6),
    needed=st.none() | TUPLE,
)
BACKUPS = st.builds(Backup, TUPLE, OUTCOME, st.none() | TEXT, st.none() | TEXT, NUMBER, NUMBER)
ENDS = st.builds(
    End,
    OUTCOME,
    st.none() | TEXT,
    st.booleans(),
    st.lists(BACKUPS, max_size=3).map(tuple),
    st.booleans(),
)


@given(TASKS)
def test_task_round_trip(task: Task) -> None:
    """A task arrives at the runner as it was sent, in one line."""
    text = task.to_json()
    assert "\n" not in text
    assert Task.from_json(text) == task


@given(ENDS, st.integers(1, 99), st.none() | st.just(15))
def test_end_round_trip(
    tmp_path_factory: pytest.TempPathFactory, end: End, attempt: int, stopped: int | None
) -> None:
    """How a client ended is read back from the run's folder as it was written there."""
    folder = RunFolder(tmp_path_factory.mktemp("run")).make()
    folder.reserve_end()
    assert errand.end(folder, attempt) is None
    folder.write_end(end_to_json(end, attempt=attempt, stopped=stopped))
    assert errand.end(folder, attempt) == (end, stopped)
    assert errand.end(folder, attempt + 1) is None
    data = folder.read_end()
    assert data
    assert end_from_json(data) == (end, attempt, stopped)


def test_end_of_an_older_runner() -> None:
    """A client that an older atomtx has started may be at work when it is replaced."""
    data = end_to_json(End(Outcome.FAILED, "why"), attempt=1, stopped=None)
    del data["overdue"]
    assert end_from_json(data) == (End(Outcome.FAILED, "why"), 1, None)


# -- other pools -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("/a b/c", "/a b/c"),
        ("/X11/c", "/X11/c"),
        ("--repo=/backup/repo", "/backup/repo"),
        ("rclone:b2,config=/etc/r:x", "/etc/r"),
        ("file:///backup/repo", "/backup/repo"),
        ("ssh -i /keys/id", "/keys/id"),
        ("cat </keys/p|tee '/log/x'", "/log/x"),
    ],
)
def test_needed_in_words(word: str, path: str) -> None:
    """What a client needs may be anywhere in a word, and in a variable."""
    task = task_of(("restic", "backup", word), needed=("/cache/restic",), env={"A": "/x"})
    assert {"/cache/restic", "/x", path} <= _needed(task)
    assert path in _needed(task_of(env={"VARIABLE": word}, needed=()))


def test_other_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client needs stays mounted; of a command of the user's own that is not known."""
    dropped: list[tuple[set[str], set[str]]] = []

    def drop_pinned(keep: Iterable[str], live: Iterable[str]) -> None:
        dropped.append((set(keep), set(live)))

    monkeypatch.setattr(namespace, "drop_pinned", drop_pinned)
    mounts = (Mount("tank/a@x", "/a"),)
    _drop_pinned(task_of(sh("tar -c /a >/backup/tar"), mounts=mounts))
    assert dropped == []
    _drop_pinned(task_of(("restic",), mounts=mounts, live=("/a/cache",), needed=("/backup",)))
    ((keep, live),) = dropped
    assert {"/a", "/a/cache", "/backup"} <= keep
    assert live == {"/a/cache", "/backup"}


# -- the process -----------------------------------------------------------------------------


def task_of(*commands: tuple[str, ...], **values: Any) -> Task:
    given: dict[str, Any] = {
        "run": RUN,
        "attempt": 1,
        "folder": "/state",
        "in_namespace": True,
        "mounts": (),
        "live": (),
        "client": "command",
        "commands": commands,
        "cwd": "/",
        "env": {},
        "moment": Moment(("/a",), "", AT),
        "stop_signal": int(signal.SIGTERM),
        "grace_s": PATIENCE_S,
        "time_limit_s": 0,
    }
    return Task(**given | values)


class Stage:
    """A run's folder, and runners in it; nothing of them is left after the test."""

    def __init__(self, folder: RunFolder, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = env
        self.front: int | None = None
        self._started: list[tuple[Errand, int]] = []

    def start(self, *commands: tuple[str, ...], **values: Any) -> Errand:
        """Start a runner, and wait until it has made its mounts."""
        if self.front is None:
            self.front = locks.try_acquire(self.folder.front_lock)
        assert self.front is not None
        task = task_of(*commands, **{"folder": str(self.folder.path), **values})
        started = Errand(task, self.folder, env=self.env, front=self.front)
        self._started.append((started, os.pidfd_open(started.pid)))
        return started

    def run(self, *commands: tuple[str, ...], **values: Any) -> Errand:
        started = self.start(*commands, **values)
        started.mounted()
        started.go()
        return started

    def end(self, started: Errand) -> tuple[End, int | None]:
        """Wait for the runner's end; return what it wrote."""
        assert locks.wait_gone(started.pid, PATIENCE_S)
        started.dismiss()
        known = errand.end(self.folder, 1)
        assert known
        return known

    def log(self) -> str:
        return self.folder.log.read_text() if self.folder.log.exists() else ""

    def said(self, words: str) -> None:
        assert locks.wait_until(lambda: words in self.log(), PATIENCE_S), self.log()

    def close(self) -> None:
        for started, pidfd in self._started:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            started.dismiss()
        for process in locks.holders(self.folder.client_lock):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if self.front is not None:
            os.close(self.front)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    folder = RunFolder.of(prepare(tmp_path / "state"), RUN).make()
    source = str(Path(atomtx.__file__).parent.parent)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": source}
    stage = Stage(folder, env)
    yield stage
    stage.close()


def sh(script: str, *args: str) -> tuple[str, ...]:
    return ("sh", "-c", script, "sh", *args)


def python(code: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code), *args)


def is_alive(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@as_root
def test_end_of_file(stage: Stage, tmp_path: Path) -> None:
    """Promise 1: without "go", which says that the state is durable, no client is started."""
    started = stage.start(sh('touch "$0"', str(tmp_path / "made")))
    assert started.mounted() == {}
    assert locks.is_held(stage.folder.runner_lock)
    started.dismiss()
    assert not is_alive(started.pid)
    assert not (tmp_path / "made").exists()
    assert errand.end(stage.folder, 1) is None
    assert not locks.is_held(stage.folder.runner_lock)


@pytest.fixture
def talk() -> Iterator[tuple[Conversation, socket.socket, socket.socket, socket.socket]]:
    """The runner's end of a conversation and the other, and both ends of its signals' socket."""
    pairs = (*socket.socketpair(), *socket.socketpair())
    conversation = Conversation(pairs[0])
    yield conversation, *pairs[1:]
    for each in pairs:
        each.close()


Talk = tuple[Conversation, socket.socket, socket.socket, socket.socket]


def test_nobody_listens(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A front end that is stopped does not keep the runner from what comes next."""
    conversation, front, _, _ = talk
    monkeypatch.setattr(runner, "_TELL_S", 0.1)
    told: list[bool] = []
    teller = threading.Thread(target=lambda: told.append(conversation.tell(words="x" * 2**22)))
    teller.start()
    teller.join(PATIENCE_S)
    soon = list(told)
    front.close()  # ends the thread, whatever it waits for
    teller.join()
    assert soon == [False]


def test_half_a_task(talk: Talk) -> None:
    """A task whose end was never sent is none, however whole it looks."""
    conversation, front, *_ = talk
    front.sendall(b"{}")
    front.close()
    assert conversation.task() is None


@pytest.mark.parametrize(
    ("numbers", "goes"),
    [
        ([signal.SIGCHLD], True),
        ([signal.SIGTERM], False),
        ([signal.SIGINT], False),
        ([signal.SIGCHLD, signal.SIGTERM], False),
    ],
)
def test_signals_before_go(talk: Talk, numbers: list[int], goes: bool) -> None:
    """A child that ends is no reason to stop; only the signals that say so are."""
    conversation, front, wakeup, signals = talk

    def go_once_they_are_read() -> None:
        while select.select([wakeup], [], [], 0)[0]:
            time.sleep(0.01)
        front.sendall(b"go\n")

    signals.sendall(bytes(numbers))
    front_end = threading.Thread(target=go_once_they_are_read)
    front_end.start()
    assert conversation.go(wakeup) is goes
    front_end.join()


@as_root
def test_signal_before_go(stage: Stage, tmp_path: Path) -> None:
    """A runner that is stopped while it waits for "go" exits, and never starts the client."""
    started = stage.start(sh('touch "$0"', str(tmp_path / "made")))
    started.mounted()
    os.kill(started.pid, signal.SIGTERM)
    assert locks.wait_gone(started.pid, PATIENCE_S)
    started.go()
    started.dismiss()
    assert not (tmp_path / "made").exists()
    assert errand.end(stage.folder, 1) is None


@as_root
def test_go(stage: Stage, tmp_path: Path) -> None:
    """A client that is let go runs with its words, directory and environment, and its end stays."""
    (tmp_path / "with space").mkdir()
    script = 'pwd; echo "$1|$GIVEN|$ADDED"; echo warned >&2'
    stage.env["GIVEN"] = "by the user"
    started = stage.run(
        ("sh", "-c", script, "sh", "two\nlines"),
        cwd=str(tmp_path / "with space"),
        env={"ADDED": "by the client"},
    )
    end, stopped = stage.end(started)
    assert (end.outcome, end.reason, stopped) == (Outcome.COMPLETED, None, None)
    assert end.backups == (Backup(("/a",), Outcome.COMPLETED),)
    lines = stage.log().splitlines()
    assert sorted(lines) == sorted(
        [str(tmp_path / "with space"), "two", "lines|by the user|by the client", "warned"]
    )
    assert stage.folder.runner_log.read_text() == ""  # the runner itself had nothing to complain of


def test_no_room_for_the_end(tmp_path: Path) -> None:
    """Without room for its end no client is started; the message says where, and what helps."""
    folder = RunFolder(tmp_path / "gone")
    with pytest.raises(EffectError) as caught:
        _reserve_end(folder)
    assert caught.value.message == (
        f"cannot reserve room for the client's end in {folder.path}: No such file or directory"
    )
    assert caught.value.hint == "make room on the disk of the state directory"
    assert isinstance(caught.value.__cause__, OSError)


@as_root
def test_failure(stage: Stage) -> None:
    """Promise 7: a client that fails has failed, with its last words as the reason."""
    end, _ = stage.end(stage.run(sh("echo no space >&2; exit 9")))
    assert (end.outcome, end.reason) == (Outcome.FAILED, "no space (exit status 9)")


@as_root
def test_killed_by_a_real_time_signal(stage: Stage) -> None:
    """A signal without a name is told by its number."""
    end, _ = stage.end(stage.run(sh("kill -40 $$")))
    assert (end.outcome, end.reason) == (Outcome.FAILED, "killed by signal 40")


@as_root
def test_ignored_children(stage: Stage) -> None:
    """Promise 7: where whoever started us ignores SIGCHLD, which is inherited, 9 is still 9."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        started = stage.run(sh("echo no space >&2; exit 9"))
    finally:
        signal.signal(signal.SIGCHLD, before)
    end, _ = stage.end(started)
    assert (end.outcome, end.reason) == (Outcome.FAILED, "no space (exit status 9)")


@as_root
def test_blocked_signals(stage: Stage) -> None:
    """Where whoever started us had a stop's signals blocked, which is inherited, they are heard."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        started = stage.run(sh("grep SigBlk /proc/self/status; exec sleep 1000"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    stage.said("SigBlk:\t0000000000000000\n")
    assert errand.stop(stage.folder, signal.SIGTERM)
    end, stopped = stage.end(started)
    assert (end.reason, stopped) == ("killed by SIGTERM", signal.SIGTERM)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Have so many files open that a new descriptor is more than select(2) can hold."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, before[1]))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@as_root
@pytest.mark.usefixtures("many_files")
def test_many_files(stage: Stage) -> None:
    """Whoever starts us may leave us a thousand open files."""
    started = stage.run(sh("sleep 0.5; exit 9"))
    errand.wait(stage.folder, Interrupts(), lambda _: None, stop_on_signal=True)
    end, _ = stage.end(started)
    assert end.reason == "exit status 9"


@pytest.mark.parametrize(
    ("hard", "soft"), [(4096, 4096), (1 << 20, 1 << 16), (resource.RLIM_INFINITY, 1 << 16)]
)
def test_as_many_files_as_allowed(monkeypatch: pytest.MonkeyPatch, hard: int, soft: int) -> None:
    """A pin for each mount wants many open files: as many as may be, within reason."""
    asked: list[object] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda *limits: asked.append(limits))
    runner._allow_many_files()
    assert asked == [(resource.RLIMIT_NOFILE, (soft, hard))]


@pytest.mark.parametrize("refused", [ValueError("not allowed"), OSError(errno.EPERM, "no")])
def test_no_more_files(monkeypatch: pytest.MonkeyPatch, refused: Exception) -> None:
    """Where no more open files are allowed, as many as there are have to do."""
    asked: list[object] = []

    def refuse(*limits: object) -> NoReturn:
        asked.append(limits)
        raise refused

    monkeypatch.setattr(resource, "setrlimit", refuse)
    runner._allow_many_files()
    assert len(asked) == 1


@as_root
def test_missing_program(stage: Stage) -> None:
    """A client that cannot be started is a failed one, not a lost runner."""
    end, _ = stage.end(stage.run(("/no/such/program",)))
    assert end.outcome is Outcome.FAILED
    assert end.reason == "cannot start /no/such/program: No such file or directory"


@as_root
def test_missing_directory(stage: Stage) -> None:
    """A working directory that was not there at that moment is told before the client starts."""
    started = stage.start(("true",), cwd="/no/such/directory")
    with pytest.raises(EffectError, match="cannot work in /no/such/directory"):
        started.mounted()
    started.dismiss()


@as_root
def test_no_process_for_the_runner(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where as many processes run as may, nothing is left open and the message says so."""
    stage.front = locks.try_acquire(stage.folder.front_lock)
    before = os.listdir("/proc/self/fd")

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(EffectError, match="cannot start the runner: Resource temporarily unavail"):
        stage.start(sh("true"))
    assert os.listdir("/proc/self/fd") == before


@as_root
def test_runner_that_dies(stage: Stage) -> None:
    """A runner that dies on the way is told with its last words."""
    started = stage.start(("true",), folder=None)
    with pytest.raises(EffectError, match=r"the runner died: TypeError: expected str"):
        started.mounted()
    started.dismiss()


@as_root
def test_runner_without_its_lock(stage: Stage) -> None:
    """What the machine refuses the runner is told with the file that it is about."""
    stage.folder.runner_lock.unlink()
    stage.folder.runner_lock.mkdir()
    started = stage.start(("true",))
    with pytest.raises(EffectError) as caught:
        started.mounted()
    lock = stage.folder.runner_lock
    assert caught.value.message == f"the runner cannot go on: Is a directory ({lock})"
    started.dismiss()


@as_root
def test_runner_that_is_killed(stage: Stage) -> None:
    """A killed runner is told apart from one that failed: another one can do it."""
    started = stage.start(("true",))
    os.kill(started.pid, signal.SIGKILL)
    with pytest.raises(RunnerKilledError, match="the runner was killed by signal 9"):
        started.mounted()
    assert started.reap() == 0  # known already


@as_root
def test_unwritable_log(stage: Stage) -> None:
    """A runner that cannot write the client's log says so before the client starts."""
    stage.folder.log.mkdir()
    started = stage.start(("true",))
    with pytest.raises(EffectError, match=r"cannot write /.*/client\.log: Is a directory"):
        started.mounted()
    started.dismiss()


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/a"), "Input/output error (/a)"),
    ],
)
def test_machine_that_refuses(monkeypatch: pytest.MonkeyPatch, refused: OSError, told: str) -> None:
    """What the machine refuses the runner is told, with a file only where it is about one."""

    def refuse(*_: object) -> NoReturn:
        raise refused

    monkeypatch.setattr(runner, "_converse", refuse)
    front, control = socket.socketpair()
    with front, front.makefile() as answers:
        runner.main(control.detach(), -1)
        answer = json.loads(answers.readline())
    assert answer == {"error": f"the runner cannot go on: {told}", "hint": None}


@as_root
def test_client_that_cannot_be_watched(stage: Stage) -> None:
    """What the machine refuses once the client was let go is a failure, not a lost runner."""
    started = stage.start(("true",))
    started.mounted()
    stage.folder.client_lock.unlink()
    stage.folder.client_lock.mkdir()
    started.go()
    end, _ = stage.end(started)
    words = f"cannot watch over the client: Is a directory ({stage.folder.client_lock})"
    assert (end.outcome, end.reason) == (Outcome.FAILED, words)


@as_root
def test_second_runner(stage: Stage) -> None:
    """Promise 6: R is one runner's; a second one gives up at once."""
    first = stage.start(("true",))
    first.mounted()
    second = stage.start(("true",))
    with pytest.raises(EffectError) as caught:
        second.mounted()
    assert caught.value.message == "a runner of this run is still alive"
    assert caught.value.hint == "see `atomtx status`"
    second.dismiss()
    assert is_alive(first.pid)
    first.dismiss()


@as_root
def test_stop(stage: Stage) -> None:
    """Section 8: SIGTERM to the runner becomes the client's own stop signal, and is recorded."""
    script = 'trap "echo stopping; exit 7" USR1; echo ready; while :; do sleep 0.1; done'
    started = stage.run(sh(script), stop_signal=int(signal.SIGUSR1))
    stage.said("ready")
    os.kill(started.pid, signal.SIGTERM)
    end, stopped = stage.end(started)
    assert (end.outcome, stopped) == (Outcome.FAILED, signal.SIGTERM)
    assert end.reason is not None
    assert "exit status 7" in end.reason
    assert "asked to stop by SIGTERM" in stage.log()
    assert "stopping" in stage.log()


@as_root
def test_second_signal(stage: Stage) -> None:
    """The first signal counts: a second one gives no other reason, and no grace anew."""
    started = stage.run(sh("trap '' TERM; echo ready; while :; do sleep 0.1; done"), grace_s=2)
    stage.said("ready")
    os.kill(started.pid, signal.SIGTERM)
    stage.said("asked to stop by SIGTERM")
    os.kill(started.pid, signal.SIGINT)
    _, stopped = stage.end(started)
    assert stopped == signal.SIGTERM
    assert "SIGINT" not in stage.log()


@as_root
def test_stop_for_good(stage: Stage) -> None:
    """`errand.stop` reaches the runner by its lock; SIGINT is told apart from a shutdown."""
    started = stage.run(sh("echo ready; exec sleep 1000"))
    stage.said("ready")
    assert errand.runner_pid(stage.folder) == started.pid
    assert errand.stop(stage.folder, signal.SIGINT)
    end, stopped = stage.end(started)
    assert (end.reason, stopped) == ("killed by SIGTERM", signal.SIGINT)
    assert not errand.stop(stage.folder, signal.SIGINT)
    assert errand.runner_pid(stage.folder) is None


@as_root
def test_stopped_client_that_was_done(stage: Stage) -> None:
    """A client that ends well although it was asked to stop is believed."""
    script = 'trap "exit 0" TERM; echo ready; while :; do sleep 0.1; done'
    started = stage.run(sh(script))
    stage.said("ready")
    os.kill(started.pid, signal.SIGTERM)
    end, stopped = stage.end(started)
    assert (end.outcome, stopped) == (Outcome.COMPLETED, signal.SIGTERM)


@as_root
@pytest.mark.parametrize("stopped", [False, True])
def test_stopped_client_is_not_repeated(stage: Stage, stopped: bool) -> None:
    """Trouble that is worth repeating is none where somebody stopped the client."""
    script = 'trap "exit 11" TERM; echo ready; while :; do sleep 0.1; done'
    started = stage.run(sh(script if stopped else "exit 11"), client="restic")
    if stopped:
        stage.said("ready")
        os.kill(started.pid, signal.SIGTERM)
    end, _ = stage.end(started)
    assert (end.outcome, end.retriable) == (Outcome.FAILED, not stopped)


@as_root
def test_stop_after_the_client(stage: Stage) -> None:
    """A signal to all that reaches the runner last is a stop as well."""
    late = '(trap "kill -TERM $PPID; exit" TERM; echo ready; exec 2>/dev/null; '
    late += "while :; do sleep 0.1; done) &"
    until_ready = "while ! grep -q ready $1; do sleep 0.1; done; exit 11"
    log = str(stage.folder.log)
    end, stopped = stage.end(stage.run(sh(f"{late} {until_ready}", log), client="restic"))
    assert (end.outcome, end.retriable, stopped) == (Outcome.FAILED, False, signal.SIGTERM)


@as_root
def test_client_of_before(stage: Stage) -> None:
    """Promise 6: no client is started while C is held by another one."""
    with locks.acquired(stage.folder.client_lock) as held:
        assert held is not None
        end, _ = stage.end(stage.run(("true",)))
    assert (end.outcome, end.reason) == (Outcome.FAILED, "a client of this run is still alive")


@as_root
def test_grace(stage: Stage) -> None:
    """Section 8: a client that does not end in its time is killed, with all that it started."""
    script = 'trap "" TERM; sleep 1000 & echo "child $!"; echo ready; wait; sleep 1000'
    started = stage.run(sh(script), grace_s=0.3)
    stage.said("ready")
    child = int(stage.log().split("child ")[1].split()[0])
    os.kill(started.pid, signal.SIGTERM)
    end, _ = stage.end(started)
    assert end.reason == "killed by SIGKILL"
    assert "not ended after 0s: killed" in stage.log()
    assert not is_alive(child)


@as_root
def test_time_limit(stage: Stage) -> None:
    """A client that runs longer than it may is stopped in its own way; it is not tried again."""
    script = 'trap "echo stopping; exit 7" USR1; while :; do sleep 0.1; done'
    started = stage.run(sh(script), stop_signal=int(signal.SIGUSR1), time_limit_s=0.6)
    end, stopped = stage.end(started)
    assert (end.outcome, end.reason) == (Outcome.FAILED, "did not end within 1s: stopped")
    assert (end.retriable, stopped) == (False, None)
    assert end.backups == (Backup(("/a",), Outcome.FAILED, reason=end.reason),)
    assert "over its limit of 1s" in stage.log()
    assert "stopping" in stage.log()


@as_root
def test_time_limit_and_grace(stage: Stage) -> None:
    """One that does not hear the stop either is killed after the grace, with what it started."""
    script = 'trap "" TERM; sleep 1000 & echo "child $!"; wait; sleep 1000'
    started = stage.run(sh(script), time_limit_s=1, grace_s=0.3)
    end, _ = stage.end(started)
    assert (end.reason, end.retriable) == ("did not end within 1s: killed", False)
    assert not is_alive(int(stage.log().split("child ")[1].split()[0]))


@as_root
def test_time_limit_of_the_attempt(stage: Stage, tmp_path: Path) -> None:
    """The limit is for all commands of an attempt, and after it no other one is started."""
    commands = (sh("sleep 0.4"), sh("sleep 1000"), sh('touch "$1"', str(tmp_path / "made")))
    end, _ = stage.end(stage.run(*commands, time_limit_s=0.8))
    assert end.reason == "did not end within 1s: stopped"
    assert not (tmp_path / "made").exists()


@as_root
def test_time_limit_kept(stage: Stage) -> None:
    """A client that ends well at its limit, or long before, is believed."""
    end, _ = stage.end(stage.run(("true",), time_limit_s=1000))
    assert end.outcome is Outcome.COMPLETED
    script = 'trap "exit 0" TERM; while :; do sleep 0.1; done'
    end, _ = stage.end(stage.run(sh(script), time_limit_s=0.5))
    assert end.outcome is Outcome.COMPLETED


@as_root
def test_stop_after_the_limit(stage: Stage) -> None:
    """A stop from outside gives a client that is overdue no second grace, nor another reason."""
    script = 'trap "echo told" TERM; while :; do sleep 0.1; done'
    started = stage.run(sh(script), time_limit_s=0.2, grace_s=3)
    stage.said("told")
    os.kill(started.pid, signal.SIGTERM)
    end, stopped = stage.end(started)
    assert (end.reason, end.overdue) == ("did not end within 0s: killed", True)
    assert stopped is None  # else recovery would take it for a shutdown's, and resume
    assert "asked to stop by SIGTERM" in stage.log()
    assert stage.log().count("told") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (1, "1s"), (90, "90s"), (5400, "90m"), (21600, "6h"), (172800, "2d")],
)
def test_span(seconds: float, text: str) -> None:
    """A time is told as it can be typed."""
    assert span(seconds) == text
    assert words.seconds(text) == seconds


@as_root
def test_end_without_room(stage: Stage) -> None:
    """Promise 10: an end that finds no room is told to the front end, which makes room."""
    flag = stage.folder.path / "flag"
    started = stage.run(sh('while ! test -e "$1"; do sleep 0.05; done; exit 9', str(flag)))
    stage.folder.end.unlink()
    stage.folder.end.mkdir()
    flag.touch()
    assert locks.wait_gone(started.pid, PATIENCE_S)
    data = started.unwritten_end()
    assert data
    end, attempt, _ = end_from_json(data)
    assert (end.reason, attempt) == ("exit status 9", 1)
    started.dismiss()


@as_root
def test_end_without_room_nor_front_end(stage: Stage) -> None:
    """Where nobody can be told, the runner waits for room, for a while."""
    flag = stage.folder.path / "flag"
    started = stage.run(sh('while ! test -e "$1"; do sleep 0.05; done; exit 9', str(flag)))
    started._answers.close()
    started._control.close()
    stage.folder.end.unlink()
    stage.folder.end.mkdir()
    flag.touch()
    assert locks.wait_until(lambda: not locks.is_held(stage.folder.client_lock), PATIENCE_S)
    assert not locks.wait_gone(started.pid, 1.5)
    stage.folder.end.rmdir()
    stage.folder.end.touch()
    end, _ = stage.end(started)
    assert end.reason == "exit status 9"


@as_root
def test_end_told_nothing(stage: Stage) -> None:
    """A runner that wrote the end, or was killed, tells none."""
    started = stage.run(("true",))
    assert locks.wait_gone(started.pid, PATIENCE_S)
    assert started.unwritten_end() is None
    started.dismiss()


@as_root
def test_chatty_client(stage: Stage) -> None:
    """A client that never pauses in its output is stopped like any other."""
    started = stage.run(("yes", "words"))
    stage.said("words")
    os.kill(started.pid, signal.SIGTERM)
    end, stopped = stage.end(started)
    assert (end.reason, stopped) == ("killed by SIGTERM", signal.SIGTERM)


@as_root
def test_chatty_orphan(stage: Stage) -> None:
    """A descendant that goes on writing does not keep the runner from seeing the client's end."""
    end, _ = stage.end(stage.run(sh("yes words & echo ready")))
    assert end.outcome is Outcome.COMPLETED


@as_root
def test_last_line(stage: Stage) -> None:
    """Everything that a client printed is read, also after it ended, to the last half line."""
    script = 'i=0; while [ $i -lt 6000 ]; do echo "line $i"; i=$((i+1)); done; printf "the last"'
    stage.end(stage.run(sh(script)))
    assert stage.log().splitlines() == [*(f"line {n}" for n in range(6000)), "the last"]


@as_root
def test_filter_of_a_wrapper(stage: Stage) -> None:
    """What passes through a wrapper's own filter may come after the wrapper's end, and is read."""
    saved = '{"message_type": "summary", "snapshot_id": "0123456789abcdef", "files_new": 1}'
    script = f"exec > >(sleep 0.3; exec cat) 2>&1; echo '{saved}'; echo 'the last' >&2"
    end, _ = stage.end(stage.run(("bash", "-c", script), client="restic"))
    assert end.outcome is Outcome.COMPLETED
    assert stage.log().splitlines() == [saved, "the last"]


@as_root
def test_stubborn_descendant(stage: Stage, tmp_path: Path) -> None:
    """What the client left behind, and does not hear SIGTERM, is killed before the runner ends."""
    left = 'trap "" TERM; echo $$ > "$0"; exec sleep 1000'
    script = 'sh -c "$1" "$0" >/dev/null 2>&1 & until test -s "$0"; do sleep 0.1; done'
    end, _ = stage.end(stage.run(("sh", "-c", script, str(tmp_path / "pid"), left)))
    assert end.outcome is Outcome.COMPLETED
    assert not is_alive(int((tmp_path / "pid").read_text()))


@as_root
def test_quiet_daemon(stage: Stage) -> None:
    """A descendant that holds the pipes, and says nothing, is waited for no longer."""
    limit_s = supervisor.LAST_WORDS_S + PATIENCE_S / 4
    started = time.monotonic()
    end, _ = stage.end(stage.run(sh("sleep 1000 & echo ready")))
    assert (end.outcome, stage.log()) == (Outcome.COMPLETED, "ready\n")
    assert supervisor.LAST_WORDS_S < time.monotonic() - started < limit_s


@as_root
def test_two_commands(stage: Stage) -> None:
    """Several commands run one after the other."""
    end, _ = stage.end(stage.run(sh("echo one"), sh("echo two")))
    assert end.outcome is Outcome.COMPLETED
    assert stage.log() == "one\ntwo\n"


DAEMON = """
    import os, sys, time
    if os.fork():
        os.wait()
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.02)
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    if sys.argv[2] == "close":
        os.closerange(0, 256)
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(1000)
"""


@as_root
@pytest.mark.parametrize("fds", ["close", "keep"])
def test_daemon(stage: Stage, tmp_path: Path, fds: str) -> None:
    """Section 8: what the client leaves behind is ended, in whatever session, with or without C."""
    pid_file = tmp_path / "pid"
    client = python(DAEMON + "\n", str(pid_file), fds)
    end, _ = stage.end(stage.run(client, sh("true")))
    assert end.outcome is Outcome.COMPLETED, end.reason
    assert not is_alive(int(pid_file.read_text()))
    assert not locks.is_held(stage.folder.client_lock)


@as_root
def test_locks(stage: Stage, tmp_path: Path) -> None:
    """Promise 6: R is held exactly while the runner lives, C exactly while the client does."""
    folder, flag = stage.folder, tmp_path / "flag"
    assert not locks.is_held(folder.runner_lock)
    started = stage.start(sh('echo ready; while ! test -e "$1"; do sleep 0.05; done', str(flag)))
    started.mounted()
    assert locks.is_held(folder.runner_lock)
    assert not locks.is_held(folder.client_lock)
    started.go()
    stage.said("ready")
    assert locks.is_held(folder.runner_lock)
    assert locks.is_held(folder.client_lock)
    assert [p.pid for p in locks.holders(folder.runner_lock)] == [started.pid]
    assert started.pid not in [p.pid for p in locks.holders(folder.client_lock)]
    flag.touch()
    stage.end(started)
    assert not locks.is_held(folder.runner_lock)
    assert not locks.is_held(folder.client_lock)


@as_root
def test_killed_runner(stage: Stage) -> None:
    """Promise 6: of a killed runner R is free at once, and C says that the client lives."""
    started = stage.run(sh("echo ready; exec sleep 1000"))
    stage.said("ready")
    os.kill(started.pid, signal.SIGKILL)
    started.dismiss()
    assert not locks.is_held(stage.folder.runner_lock)
    assert locks.is_held(stage.folder.client_lock)
    assert errand.end(stage.folder, 1) is None


@as_root
def test_hangup(stage: Stage) -> None:
    """A closed terminal, or restic's SIGHUP to a recorded pid, does not end the runner."""
    started = stage.start(sh("kill -HUP $PPID; echo alive"))
    started.mounted()
    os.kill(started.pid, signal.SIGHUP)
    started.go()
    end, _ = stage.end(started)
    assert end.outcome is Outcome.COMPLETED
    assert stage.log() == "alive\n"


@as_root
@pytest.mark.parametrize(("name", "secrets"), [("RESTIC_PASSWORD", ()), ("MINE", ("MINE",))])
def test_secrets(stage: Stage, name: str, secrets: tuple[str, ...]) -> None:
    """Promise 11: a secret, by its name or the job's word, reaches neither the log nor the end."""
    stage.env[name] = "open-sesame"
    script = f'echo "out ${name}"; echo "wrong: ${name}" >&2; exit 1'
    end, _ = stage.end(stage.run(sh(script), secrets=secrets))
    assert end.reason == "wrong: *** (exit status 1)"
    assert end.backups[0].reason == end.reason
    assert "out ***" in stage.log()
    for file in (f for f in stage.folder.path.rglob("*") if f.is_file()):
        assert b"open-sesame" not in file.read_bytes(), file


_FRONT = """
    import os, signal, sys
    from pathlib import Path
    from atomtx import locks
    from atomtx.errand import Errand
    from atomtx.runner import Task
    from atomtx.statedir import RunFolder

    folder = RunFolder(Path(sys.argv[1]))
    front = locks.try_acquire(folder.front_lock)
    errand = Errand(Task.from_json(sys.argv[2]), folder, env=dict(os.environ), front=front)
    errand.mounted()
    errand.go()
    print(errand.pid, flush=True)
    signal.pause()
"""


@as_root
def test_killed_front_end(stage: Stage, tmp_path: Path) -> None:
    """Promise 6 and section 8: a killed front end costs nothing: F is free, the runner goes on."""
    folder, flag = stage.folder, tmp_path / "flag"
    script = 'echo ready; while ! test -e "$1"; do sleep 0.05; done'
    task = task_of(sh(script, str(flag)), folder=str(folder.path))
    argv = python(_FRONT, str(folder.path), task.to_json())
    with subprocess.Popen(argv, env=stage.env, stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout
        pid = int(front.stdout.readline())
        stage.said("ready")
        assert locks.is_held(folder.front_lock)
        front.kill()
    assert not locks.is_held(folder.front_lock)
    assert locks.is_held(folder.runner_lock)
    assert errand.runner_pid(folder) == pid
    flag.touch()
    assert locks.wait_gone(pid, PATIENCE_S)
    known = errand.end(folder, 1)
    assert known
    assert known[0].outcome is Outcome.COMPLETED


@as_root
def test_namespace(stage: Stage) -> None:
    """Section 7: the client lives in a mount namespace of its own that carries the run's marker."""
    script = f"readlink /proc/self/ns/mnt; grep -c ' - tmpfs {RUN.token} ' $1"
    end, _ = stage.end(stage.run(sh(script, "/proc/self/mountinfo")))
    assert end.outcome is Outcome.COMPLETED, stage.log()
    namespace, count = stage.log().splitlines()
    assert namespace != os.readlink("/proc/self/ns/mnt")
    assert count == "1"
    assert RUN.token not in Path("/proc/self/mountinfo").read_text()


@as_root
def test_host_mounts(stage: Stage) -> None:
    """In a tree, whose mounts are the host's, the namespace carries the marker as well."""
    script = f"grep -c ' - tmpfs {RUN.token} ' /proc/self/mountinfo"
    end, _ = stage.end(stage.run(sh(script), in_namespace=False))
    assert end.outcome is Outcome.COMPLETED, stage.log()


def wait_for(check: Callable[[], bool]) -> None:
    assert locks.wait_until(check, PATIENCE_S)


@as_root
def test_progress(stage: Stage) -> None:
    """Where a client is can be read while it runs."""
    status = '{"message_type":"status","percent_done":0.42,"bytes_done":42,"total_bytes":100}'
    script = 'while :; do echo "$1"; sleep 0.1; done'
    stage.run(sh(script, status), client="restic")
    wait_for(lambda: errand.progress(stage.folder).bytes_done == 42)
    assert errand.progress(stage.folder).percent == 42.0
    assert stage.folder.read_progress()["attempt"] == 1
    assert stage.log() == ""


def test_command_is_loaded_by_name() -> None:
    """The client that these tests use is the one that the front end would load."""
    assert clients.load("command").name == "command"

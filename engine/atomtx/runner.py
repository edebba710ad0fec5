"""
The runner: a small process that holds a run's namespace and its client.

It outlives a killed front end, so that an upload of six hours is not lost with it.  It holds
lock R, makes the mounts, starts the client only on the front end's "go" (end of file before it
means exit), reads, redacts and caps the client's output, forwards a stop in the client's own
way, ends every descendant, and writes the client's end durably.  It reports through files in
the run's folder; the socket serves the start alone.

Single-threaded, because only the calling thread moves into a namespace, and light: it imports
neither the journal nor the state machine.

    front end -> runner   one line of JSON, the Task; then "go"
    runner -> front end   {"mounted": true, "empty": [...]} or {"error": ..., "hint": ...}
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import clients, locks, process
from .clients import Backup, End, Reader
from .errors import AtomtxError, EffectError
from .mounts import namespace
from .mounts.witness import Witness
from .names import RunId
from .output import Lines, Log
from .redact import Redactor
from .statedir import RunFolder
from .states import Outcome
from .task import Task, end_to_json

if TYPE_CHECKING:
    from subprocess import Popen

_READ_BYTES = 1 << 16
_LAST_READS = (1 << 20) // _READ_BYTES + 1  # a pipe holds 1 MiB at most (pipe(7)), then its end
PROGRESS_S = 0.5
DESCENDANTS_S = 5.0
_PR_SET_CHILD_SUBREAPER = 36
_MAX_OPEN_FILES = 65_536


# -- the client ------------------------------------------------------------------------------


class Supervisor:
    """Runs the client's commands one after the other and reads what they print."""

    def __init__(
        self, task: Task, folder: RunFolder, wakeup: socket.socket, witness: Witness
    ) -> None:
        self._task = task
        self._folder = folder
        self._wakeup = wakeup
        self._witness = witness
        self._redactor = Redactor(dict(os.environ))
        self._log = Log(folder.log, self._redactor)
        self._reader: Reader = clients.load(task.client).reader(task.moment)
        self._child: Popen[bytes] | None = None
        self._progress_at = 0.0
        self._kill_at: float | None = None
        self.stopped: int | None = None

    def run(self) -> End:
        """Run all commands; a stop, or the first that cannot be started, ends it."""
        for n, argv in enumerate(self._task.commands):
            if self.stopped:
                break
            self._run_one(n, argv)
            self._end_descendants()
        return self._redacted(self._reader.end())

    def _run_one(self, n: int, argv: tuple[str, ...]) -> None:
        lock = locks.try_acquire(self._folder.client_lock)
        if lock is None:
            raise EffectError("a client of this run is still alive")
        env = {**os.environ, **self._task.env}
        try:
            self._child = process.spawn_client(argv, env=env, cwd=self._task.cwd, lock=lock)
        except OSError as exc:
            raise EffectError(f"cannot start {argv[0]}: {exc.strerror}") from exc
        finally:
            os.close(lock)  # from here on C is held by the client and its descendants alone
        self._watch(self._child)
        self._reader.end_command(n, self._child.wait())
        self._child = None

    def _watch(self, child: Popen[bytes]) -> None:
        """Read both outputs until the child has ended and what it printed is read."""
        assert child.stdout
        assert child.stderr
        pidfd = os.pidfd_open(child.pid)
        with selectors.DefaultSelector() as selector:
            for pipe, take in (
                (child.stdout, self._reader.stdout),
                (child.stderr, self._reader.stderr),
            ):
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, self._feeder(pipe, take))
            selector.register(pidfd, selectors.EVENT_READ, None)
            selector.register(self._wakeup, selectors.EVENT_READ, self._on_signal)
            if self._witness.saw is False:
                selector.register(self._witness.descriptor, selectors.EVENT_READ, self._on_read)
            while self._turn(selector, pidfd):
                pass
            # A descendant may keep a pipe open, and write, for ever: read what is there, and go.
            for _ in range(_LAST_READS):
                for key in list(selector.get_map().values()):
                    if key.fileobj in (child.stdout, child.stderr):
                        key.data(selector)
        os.close(pidfd)
        child.stdout.close()
        child.stderr.close()

    def _turn(self, selector: selectors.BaseSelector, pidfd: int) -> bool:
        """Handle what is ready; False once the child has ended."""
        timeout = PROGRESS_S
        if self._kill_at is not None:
            timeout = min(timeout, max(0.0, self._kill_at - time.monotonic()))
        ended = False
        for key, _ in selector.select(timeout):
            if key.fd == pidfd:
                ended = True
            else:
                key.data(selector)
        self._tell_progress()
        self._escalate()
        return not ended

    def _feeder(
        self, pipe: IO[bytes], take: Callable[[str], None]
    ) -> Callable[[selectors.BaseSelector], None]:
        lines = Lines()

        def feed(selector: selectors.BaseSelector) -> None:
            # Once a turn: a client that never pauses must not keep us from hearing a signal.
            try:
                data = os.read(pipe.fileno(), _READ_BYTES)
            except BlockingIOError:
                return
            for line in lines.feed(data) if data else lines.rest():
                self._take(line, take)
            if not data:
                selector.unregister(pipe)

        return feed

    def _take(self, line: str, take: Callable[[str], None]) -> None:
        before = self._reader.progress
        take(line)
        if self._reader.progress is before:  # a line of progress is not worth keeping
            self._log.line(line)

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if now - self._progress_at < PROGRESS_S:
            return
        self._progress_at = now
        with suppress(OSError):  # a full disk: the display stands still, the backup goes on
            self._folder.write_progress(
                {"attempt": self._task.attempt, **asdict(self._reader.progress)}
            )

    def _on_read(self, selector: selectors.BaseSelector) -> None:
        if self._witness.look():
            selector.unregister(self._witness.descriptor)

    # -- stopping --------------------------------------------------------------------------

    def _on_signal(self, _: selectors.BaseSelector) -> None:
        for number in self._wakeup.recv(4096):
            if number in (signal.SIGTERM, signal.SIGINT) and self.stopped is None:
                self._stop(number)

    def _stop(self, number: int) -> None:
        self.stopped = number
        self._kill_at = time.monotonic() + self._task.grace_s
        self._log.line(f"atomtx: asked to stop by {signal.Signals(number).name}")
        if self._child:
            with suppress(ProcessLookupError):  # a session of its own: the wrapper and all in it
                os.killpg(self._child.pid, self._task.stop_signal)

    def _escalate(self) -> None:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            self._log.line(f"atomtx: not ended after {self._task.grace_s:.0f} s: killed")
            for pid in descendants():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _end_descendants(self) -> None:
        """End what the client left behind; as its subreaper we are the parent of all of it."""
        for signum, wait_s in ((signal.SIGTERM, DESCENDANTS_S), (signal.SIGKILL, DESCENDANTS_S)):
            for pid in descendants():
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)
            if locks.wait_until(_reaped_all, wait_s):
                return
        raise EffectError(f"processes of the client cannot be ended: {descendants()}")

    def _redacted(self, end: End) -> End:
        def clean(text: str | None) -> str | None:
            return self._redactor.redact(text)[:2000] if text else text

        backups = tuple(Backup(**{**vars(b), "reason": clean(b.reason)}) for b in end.backups)
        return End(end.outcome, clean(end.reason), end.retriable, backups)


def descendants() -> list[int]:
    """Return the living descendants of this process; their children before them."""
    found: list[int] = []

    def visit(pid: int) -> None:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
                for child in map(int, children):
                    visit(child)
                    found.append(child)

    visit(os.getpid())
    return found


def _reaped_all() -> bool:
    """Reap what has ended; True when no child is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False


# -- the whole -------------------------------------------------------------------------------


class Conversation:
    """The runner's end of the socket."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._file = control.makefile("rb")

    def task(self) -> Task | None:
        line = self._file.readline()
        return Task.from_json(line.decode()) if line.endswith(b"\n") else None

    def tell(self, **facts: Any) -> None:
        with suppress(OSError):  # the front end was killed: whoever comes next reads the folder
            self._control.sendall(json.dumps(facts).encode() + b"\n")

    def go(self, wakeup: socket.socket) -> bool:
        """Wait for "go"; False at end of file, or when a signal says stop."""
        while True:
            ready, _, _ = select.select([self._control, wakeup], [], [])
            if self._control in ready:
                return self._file.readline() == b"go\n"
            if set(wakeup.recv(4096)) & {signal.SIGTERM, signal.SIGINT}:
                return False


def main(control: int, front: int) -> int:
    """
    Serve one attempt of one run; the exit status is only for people who watch.

    *front* is a descriptor of lock F: held until we have R, so that a recovery cannot come in
    between when the front end is killed in that moment.
    """
    wakeup = _prepare_process()
    conversation = Conversation(socket.socket(fileno=control))
    task = conversation.task()
    if task is None:
        return 1
    folder = RunFolder(Path(task.folder))
    lock = locks.try_acquire(folder.runner_lock)
    os.close(front)
    if lock is None:
        conversation.tell(error="a runner of this run is still alive", hint="see `atomtx status`")
        return 1
    try:
        return _serve(task, folder, conversation, wakeup)
    except AtomtxError as exc:
        conversation.tell(error=exc.message, hint=exc.hint)
        return 1
    finally:
        os.close(lock)


def _serve(task: Task, folder: RunFolder, conversation: Conversation, wakeup: socket.socket) -> int:
    folder.reserve_end()
    assembly = _assemble(task)
    _stand_in(task.cwd)
    empty = sorted(assembly.empty())
    witness = Witness([m.mountpoint for m in task.mounts])
    supervisor = Supervisor(task, folder, wakeup, witness)
    conversation.tell(mounted=True, empty=empty)
    if not conversation.go(wakeup):
        return 1
    try:
        end = supervisor.run()
    except EffectError as exc:
        end = End(Outcome.FAILED, exc.message)
    trouble = assembly.disturbance() or _unread(task, witness, end)
    if trouble:
        end = End(Outcome.FAILED, trouble, retriable=False, backups=_failed(end.backups, trouble))
    folder.write_end(end_to_json(end, attempt=task.attempt, stopped=supervisor.stopped))
    return 0


def _unread(task: Task, witness: Witness, end: End) -> str | None:
    """
    Tell that a client of which we know what it does read nothing through our mounts.

    What a command of the user's own must read is between it and the user.
    """
    if end.outcome is Outcome.FAILED or task.client == "command" or not task.mounts:
        return None
    if witness.look() is not False:
        return None
    return "the client read nothing of the frozen files: does it leave its mount namespace?"


def _failed(backups: tuple[Backup, ...], reason: str) -> tuple[Backup, ...]:
    return tuple(
        Backup(**{**vars(b), "outcome": Outcome.FAILED, "reason": reason}) for b in backups
    )


def _assemble(task: Task) -> namespace.Assembly:
    namespace.enter()
    if task.in_namespace:
        namespace.drop_pinned([*(m.mountpoint for m in task.mounts), *_needed(task)])
        assembly = namespace.assemble(task.mounts, live=task.live)
    else:
        assembly = namespace.observe(task.mounts)
    # After the assembly, which may have made another tree the root.
    namespace.leave_marker(RunId(task.run).token, str(RunFolder(Path(task.folder)).marker))
    return assembly


def _needed(task: Task) -> list[str]:
    """Return every path that the client may need: those that its words and variables name."""
    words = [task.folder, task.cwd, sys.executable, *task.live, *task.env.values()]
    words += [word for argv in task.commands for word in argv]
    for value in os.environ.values():
        words += value.split(":")
    return [word for word in words if word.startswith("/")]


def _stand_in(cwd: str) -> None:
    """Enter the working directory anew: the old one is below the live mounts."""
    try:
        os.chdir(cwd)
    except OSError as exc:
        raise EffectError(
            f"cannot work in {cwd}: {exc.strerror} at that moment",
            hint="run atomtx from a directory that was there when the snapshot was taken",
        ) from exc


def _prepare_process() -> socket.socket:
    """Become the subreaper, ignore SIGHUP, and turn signals into bytes on a socket."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    _allow_many_files()
    # restic tells a stale lock by sending its owner SIGHUP: a reused pid must not kill us.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    signal.set_wakeup_fd(theirs.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return ours


def _allow_many_files() -> None:
    """Each mount is pinned by a descriptor."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))

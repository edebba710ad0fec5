"""The front end's end of a runner: start it, let the client go, stop it, wait for its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from . import locks, process, system
from .clients import End, Progress
from .errors import EffectError, Interrupted, WaitingError
from .interrupts import Interrupts
from .records import Content
from .statedir import RunFolder
from .task import Task, end_from_json

_MOUNT_S = 600.0  # a thousand mounts on a slow machine take a minute
_LOOK_S = 0.5
_UNSEEN_S = 5.0  # who ends closes its files an instant before they are unlocked
UNSEEN = (
    "run `atomtx recover` where it runs, such as in its container, and with CAP_SYS_PTRACE; or end "
    "it there first"
)


class RunnerKilledError(EffectError):
    """Nothing is wrong with the run: another runner can do it."""


class Errand:
    """One attempt's runner, started by this process."""

    def __init__(
        self, task: Task, folder: RunFolder, *, env: Mapping[str, str], front: int
    ) -> None:
        self.pid, self._control = _start(folder, env=env, front=front)
        self._answers = self._control.makefile("rb")
        self._folder = folder
        with suppress(OSError):  # it died at once: `mounted` tells with which words
            self._control.sendall(task.to_json().encode() + b"\n")

    def mounted(self) -> dict[str, Content]:
        """
        Wait until everything is mounted; return what is seen at each mountpoint.

        Raises RunnerKilledError where the runner was killed, EffectError for any other failure.
        """
        self._control.settimeout(_MOUNT_S)
        try:
            line = self._answers.readline()
        except TimeoutError as exc:
            raise EffectError(f"the mounts were not made within {_MOUNT_S:.0f} s") from exc
        except ConnectionError:  # it died before it had read its task: unix(7), ECONNRESET
            line = b""
        if not line:
            number = -self.reap()
            if number > 0:
                raise RunnerKilledError(f"the runner was killed by signal {number}")
            raise EffectError(f"the runner died: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EffectError(answer["error"], hint=answer["hint"])
        return {path: Content(seen) for path, seen in answer["seen"].items()}

    def _last_words(self) -> str:
        lines = self._folder.runner_log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def go(self) -> None:
        """Let the client start; call it when that is durable in the journal."""
        with suppress(OSError):  # killed: the wait that follows sees it
            self._control.sendall(b"go\n")

    def unwritten_end(self) -> dict[str, Any] | None:
        """Return the end record that a runner which has ended could not write, if it told one."""
        try:
            line = self._answers.readline()
        except OSError:  # it was killed
            return None
        answer: dict[str, dict[str, Any]] = json.loads(line) if line.endswith(b"\n") else {}
        return answer.get("end")

    def dismiss(self) -> None:
        """Tell a runner that was not let go to exit, and wait for it; idempotent."""
        self._answers.close()
        self._control.close()
        self.reap()

    def reap(self) -> int:
        """Wait for the runner's end; return its status, minus a signal; 0 if it was known."""
        with suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return 0


def _start(folder: RunFolder, *, env: Mapping[str, str], front: int) -> tuple[int, socket.socket]:
    """Start a runner; return its pid and our end of the conversation, EffectError if it cannot."""
    log = _open_log(folder)
    try:
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as undo:
            undo.callback(ours.close)
            pid = process.spawn_runner(control=theirs.fileno(), front=front, stderr=log, env=env)
            undo.pop_all()
        return pid, ours
    except OSError as exc:  # as many processes or descriptors as are allowed
        raise EffectError(f"cannot start the runner: {exc.strerror}") from exc
    finally:
        os.close(log)


def _open_log(folder: RunFolder) -> int:
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    try:
        return os.open(folder.runner_log, flags, 0o600)
    except OSError as exc:
        raise EffectError(f"cannot write {folder.runner_log}: {exc.strerror}") from exc


def runner_pid(folder: RunFolder, *, likely: int | None = None) -> int | None:
    """
    Return the process that holds R, or None, also for one that cannot be seen.

    Looking at the *likely* one first is faster.
    """
    if not locks.is_held(folder.runner_lock):
        return None
    if likely is not None and locks.holds(likely, folder.runner_lock):
        return likely
    holders = locks.holders(folder.runner_lock)
    return holders[0].pid if holders else None


def stop(folder: RunFolder, number: signal.Signals) -> bool:
    """Ask the runner to stop its client; SIGINT: for good, SIGTERM: to be resumed."""
    pid = runner_pid(folder)
    if pid is None:
        return False
    return locks.send(pid, number, if_still=lambda p: locks.has_lock_open(p, folder.runner_lock))


def wait(
    folder: RunFolder,
    interrupts: Interrupts,
    show: Callable[[Progress], None],
    *,
    stop_on_signal: bool,
    to_be_resumed: Callable[[Interrupted], bool] = lambda _: False,
    likely: int | None = None,
) -> None:
    """
    Wait until the runner of a run, *likely* a child of this process, has ended, showing progress.

    On a signal raises Interrupted, after the client was stopped in order if *stop_on_signal*;
    WaitingError where nobody who can be seen holds R.
    """
    interruption: Interrupted | None = None
    while (pid := _seen(folder, likely)) is not None:
        descriptor = _open(pid)
        if descriptor is None:
            continue
        try:
            interruption = interruption or _until_ended(
                descriptor, folder, interrupts, show, patient=False
            )
            if interruption and not stop_on_signal:
                raise interruption
            if interruption:
                stop(folder, signal.SIGTERM if to_be_resumed(interruption) else signal.SIGINT)
                _until_ended(descriptor, folder, interrupts, show, patient=True)
        finally:
            os.close(descriptor)
        _reap(pid)
    if interruption:
        raise interruption


def _seen(folder: RunFolder, likely: int | None) -> int | None:
    """Return the process that holds R, None once nobody does; WaitingError for an unseen one."""
    end = time.monotonic() + _UNSEEN_S
    while (pid := runner_pid(folder, likely=likely)) is None:
        if not locks.is_held(folder.runner_lock):
            return None
        if time.monotonic() >= end:
            raise WaitingError(
                f"run {folder.path.name} waits: its runner lives, and cannot be seen from here",
                hint=UNSEEN,
            )
        time.sleep(_LOOK_S)
    return pid


def _open(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return system.here.watch(pid)
    return None


def _until_ended(
    descriptor: int,
    folder: RunFolder,
    interrupts: Interrupts,
    show: Callable[[Progress], None],
    *,
    patient: bool,
) -> Interrupted | None:
    while not locks.is_readable(descriptor, _LOOK_S):
        show(progress(folder))
        if patient:
            continue
        try:
            interrupts.check()
        except Interrupted as exc:
            return exc
    return None


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # not ours: adopted, or waited for already
        os.waitpid(pid, 0)


def progress(folder: RunFolder) -> Progress:
    """Return where the client is."""
    data = folder.read_progress()
    return Progress(**{k: v for k, v in data.items() if k in Progress.__dataclass_fields__})


def end(folder: RunFolder, attempt: int) -> tuple[End, int | None] | None:
    """Return how the client of *attempt* ended, and the signal that stopped it; None if unknown."""
    data = folder.read_end()
    if data is None:
        return None
    found, of_attempt, stopped = end_from_json(data)
    return (found, stopped) if of_attempt == attempt else None

"""
The runner: a small process that holds a run's namespace and its client.

It outlives a killed front end, so that an upload of six hours is not lost with it.  It holds
lock R, makes the mounts, starts the client only on the front end's "go" (end of file before it
means exit), watches over it (supervisor.py), and writes its end durably.  It reports through
files in the run's folder; the socket serves the start, and the end where the disk is full.

Single-threaded, because only the calling thread moves into a namespace, and light: it imports
neither the journal nor the state machine.

    front end -> runner   one line of JSON, the Task; then "go"
    runner -> front end   {"mounted": true, "seen": {...}} or {"error": ..., "hint": ...};
                          {"end": ...} where it could not be written
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import locks, signals, system
from .clients import End, failed
from .errors import AtomtxError, EffectError
from .mounts import live, namespace
from .mounts.witness import Witness
from .names import RunId
from .statedir import RunFolder
from .states import Outcome
from .supervisor import Supervisor
from .task import Task, end_to_json

_TELL_S = 30.0
_ROOM_S = 120.0  # how long to wait for room for the end record when nobody else can be told
_MAX_OPEN_FILES = 65_536
_BETWEEN = re.compile(r"[\s=:,;<>|'\"]+")  # what may stand in a word before a path, and behind it


class Conversation:
    """The runner's end of the socket."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._file = control.makefile("rb")

    def task(self) -> Task | None:
        line = self._file.readline()
        return Task.from_json(line.decode()) if line.endswith(b"\n") else None

    def tell(self, **facts: Any) -> bool:
        """
        Tell the front end; False where it was killed: whoever comes next reads the folder.

        Also where it does not listen: it waits for our end, and more than fits into a socket
        nobody would read.
        """
        self._control.settimeout(_TELL_S)
        try:
            self._control.sendall(json.dumps(facts).encode() + b"\n")
        except OSError:
            return False
        finally:
            self._control.settimeout(None)
        return True

    def go(self, wakeup: socket.socket) -> bool:
        """Wait for "go"; False at end of file, or when a signal says stop."""
        poll = select.poll()
        for each in (self._control, wakeup):
            poll.register(each, select.POLLIN)
        while True:
            if self._control.fileno() in dict(poll.poll()):
                return self._file.readline() == b"go\n"
            if set(wakeup.recv(4096)) & {signal.SIGTERM, signal.SIGINT}:
                return False


def main(control: int, front: int) -> int:
    """
    Serve one attempt of one run; the exit status is only for people who watch.

    *front* is a descriptor of lock F: held until we have R, so that a recovery cannot come in
    between when the front end is killed in that moment.
    """
    conversation = Conversation(socket.socket(fileno=control))
    try:
        return _converse(conversation, front)
    except AtomtxError as exc:
        conversation.tell(error=exc.message, hint=exc.hint)
    except OSError as exc:  # as many descriptors as are allowed, or no memory
        conversation.tell(error=f"the runner cannot go on: {_why(exc)}", hint=None)
    return 1


def _converse(conversation: Conversation, front: int) -> int:
    wakeup = _prepare_process()
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
    finally:
        os.close(lock)


def _serve(task: Task, folder: RunFolder, conversation: Conversation, wakeup: socket.socket) -> int:
    _reserve_end(folder)
    watch = live.Watch(task.mounts)
    assembly = _assemble(task)
    _stand_in(task.cwd)
    seen = assembly.contents()
    witness = Witness([m.mountpoint for m in task.mounts])
    supervisor = Supervisor(task, folder, wakeup, witness, assembly)
    conversation.tell(mounted=True, seen=seen)
    if not conversation.go(wakeup):
        return 1
    try:
        end = supervisor.run()
    except EffectError as exc:
        end = End(Outcome.FAILED, exc.message)
    except OSError as exc:
        end = End(Outcome.FAILED, f"cannot watch over the client: {_why(exc)}")
    except Exception as exc:
        # A bug, maybe a reader's.  A lost runner would have the client do all again, and meet it.
        end = supervisor.redacted(End(Outcome.FAILED, _bug(exc)))
    unknown = "it is not known whether the mounts stayed"
    try:
        trouble = supervisor.lost or assembly.disturbance() or watch.trouble()
        trouble = trouble or _unread(task, witness, end)
    except OSError as exc:
        trouble = f"{unknown}: {exc.strerror}"
    except EffectError as exc:
        trouble = f"{unknown}: {exc.message}"
    except Exception as exc:
        trouble = f"{unknown}: {_bug(exc)}"
    if trouble:
        end = failed(end, trouble)
    record = end_to_json(end, attempt=task.attempt, stopped=supervisor.stopped)
    return 0 if _leave_end(folder, conversation, record) else 1


def _bug(exc: Exception) -> str:
    with suppress(OSError):  # a full disk; not its words, which may be the client's
        traceback.print_tb(exc.__traceback__)
    return f"a bug in atomtx: {type(exc).__name__}: {exc}"


def _why(exc: OSError) -> str:
    """Return what the machine refuses, with the file that it is about, if there is one."""
    return f"{exc.strerror} ({exc.filename})" if exc.filename else str(exc.strerror)


def _reserve_end(folder: RunFolder) -> None:
    try:
        folder.reserve_end()
    except OSError as exc:
        raise EffectError(
            f"cannot reserve room for the client's end in {folder.path}: {exc.strerror}",
            hint="make room on the disk of the state directory",
        ) from exc


def _leave_end(folder: RunFolder, conversation: Conversation, record: Mapping[str, Any]) -> bool:
    """
    Write the end record; False where it cannot be, for too long, and nobody could be told.

    The space was reserved, but where files are not overwritten in place (ZFS, btrfs) a full disk
    refuses that as well.  The front end, if it lives, makes room by removing our snapshots, for
    which this process has to end first.
    """

    def is_written() -> bool:
        try:
            folder.write_end(record)
        except OSError:  # full; what fails for another reason may be better soon, too
            return False
        return True

    return (
        is_written()
        or conversation.tell(end=record)
        or locks.wait_until(is_written, _ROOM_S, step_s=1.0)
    )


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


def _assemble(task: Task) -> namespace.Assembly:
    """Make what the client shall see; EffectError for whatever the kernel refuses of it."""
    try:
        return _made(task)
    except OSError as exc:
        raise EffectError(f"cannot set up the client's mounts: {_why(exc)}") from exc


def _made(task: Task) -> namespace.Assembly:
    if not system.here.NAMESPACES:
        return namespace.observe(task.mounts)
    namespace.enter()
    if task.in_namespace:
        _drop_pinned(task)
        assembly = namespace.assemble(task.mounts, live=task.live)
    else:
        assembly = namespace.observe(task.mounts)
    # After the assembly, which may have made another tree the root.
    namespace.leave_marker(RunId(task.run).token, str(RunFolder(Path(task.folder)).marker))
    return assembly


def _drop_pinned(task: Task) -> None:
    """Free other pools, but where what the client needs of them is not known."""
    if task.needed is None:
        return
    mountpoints = (mount.mountpoint for mount in task.mounts)
    namespace.drop_pinned([*mountpoints, *_needed(task)], [*task.live, *task.needed])


def _needed(task: Task) -> set[str]:
    """Return every path that the client may need: what its words and variables name, or hold."""
    words = [task.folder, task.cwd, sys.executable, *task.live, *(task.needed or ())]
    words += [*task.env.values(), *os.environ.values()]
    words += [word for argv in task.commands for word in argv]
    pieces = (piece for word in words for piece in (word, *_BETWEEN.split(word)))
    return {os.path.normpath("/" + p.lstrip("/")) for p in pieces if p.startswith("/")}


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
    """Become the reaper, ignore SIGHUP, and turn signals into bytes on a socket."""
    system.here.become_reaper()
    _allow_many_files()
    # restic tells a stale lock by sending its owner SIGHUP: a reused pid must not kill us.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    signal.set_wakeup_fd(theirs.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signals.forget_inherited()  # now that they end nobody
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

"""
The client under the runner's eyes: started, read, stopped, and ended with all that it started.

A stop is the client's own stop signal to its whole session; what lives after the grace is
killed.  A time limit stops it in the same way, once an attempt.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import IO, TYPE_CHECKING

from . import clients, locks, process, system
from .clients import Backup, End, Reader, failed
from .errors import EffectError
from .mounts import mountinfo
from .mounts.witness import Witness
from .names import RunId
from .output import Lines, Log
from .redact import Redactor
from .statedir import RunFolder
from .states import Outcome
from .task import Task, span

if TYPE_CHECKING:
    from subprocess import Popen

    from .mounts.namespace import Assembly

_READ_BYTES = 1 << 16
_LAST_READS = (1 << 20) // _READ_BYTES + 1  # a pipe holds 1 MiB at most (pipe(7)), then its end
PROGRESS_S = 0.5
LAST_WORDS_S = 1.0
DESCENDANTS_S = 5.0
LOOK_S = 15.0  # between two looks at the snapshots, where there is something to see
MOUNTS_S = 0.5  # between two at the mounts: other programs may make and remove some all the time


class Supervisor:
    """Runs the client's commands one after the other and reads what they print."""

    def __init__(
        self,
        task: Task,
        folder: RunFolder,
        wakeup: socket.socket,
        witness: Witness,
        assembly: Assembly,
    ) -> None:
        self._task = task
        self._folder = folder
        self._wakeup = wakeup
        self._witness = witness
        self._assembly = assembly
        self._changes = mountinfo.Changes()
        self._have_changed = False  # some mounts, since they were looked at
        self._mounts_at = 0.0
        self._look_at = time.monotonic() + LOOK_S
        self.lost: str | None = None  # why a client was stopped that reads something else by now
        self._redactor = Redactor(dict(os.environ), task.secrets)
        try:
            self._log = Log(folder.log, self._redactor)
        except OSError as exc:
            raise EffectError(f"cannot write {folder.log}: {exc.strerror}") from exc
        self._reader: Reader = clients.load(task.client).reader(task.moment)
        self._child: Popen[bytes] | None = None
        self._progress_at = 0.0
        self._limit_at: float | None = None
        self._kill_at: float | None = None
        self._overdue = False  # stopped for its time limit
        self._killed = False  # by us, after the grace
        self.stopped: int | None = None  # the signal by which somebody asked for it

    def run(self) -> End:
        """Run all commands; a stop, or the first that cannot be started, ends it."""
        if self._task.time_limit_s:  # of a clock that nobody sets, and that stands in a suspend
            self._limit_at = time.monotonic() + self._task.time_limit_s
        for n, argv in enumerate(self._task.commands):
            if self.stopped or self._overdue or self.lost:
                break
            try:
                self._run_one(n, argv)
            finally:  # also of a client that cannot be watched over any more
                self._end_descendants()
        self._hear()  # a signal to all of a service may reach us after the client
        return self.redacted(self._judged(self._reader.end()))

    def _judged(self, end: End) -> End:
        """Return the end as it counts: a client that ended well in spite of a stop is believed."""
        if end.outcome is not Outcome.FAILED:
            return end
        if self._overdue:
            how = "killed" if self._killed else "stopped"
            words = f"did not end within {span(self._task.time_limit_s)}: {how}"
            return replace(failed(end, words), overdue=True)
        return replace(end, retriable=False) if self.stopped else end

    def _run_one(self, n: int, argv: tuple[str, ...]) -> None:
        lock = locks.try_acquire(self._folder.client_lock)
        if lock is None:
            raise EffectError("a client of this run is still alive")
        mark = system.here.client_mark(RunId(self._task.run).token)
        env = {**os.environ, **self._task.env, **mark}
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
        pidfd = system.here.watch(child.pid)
        with selectors.DefaultSelector() as selector:
            for pipe, take in (
                (child.stdout, self._reader.stdout),
                (child.stderr, self._reader.stderr),
            ):
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, self._feeder(pipe, take))
            selector.register(pidfd, selectors.EVENT_READ, None)
            selector.register(self._wakeup, selectors.EVENT_READ, self._on_signal)
            if self._changes.descriptor >= 0:
                selector.register(self._changes.descriptor, selectors.EVENT_READ, self._on_change)
                self._have_changed = True  # perhaps: to register it took back what it had to tell
                self._look()
            if self._witness.saw is False:
                selector.register(self._witness.descriptor, selectors.EVENT_READ, self._on_read)
            while self._turn(selector, pidfd):
                pass
            selector.unregister(pidfd)
            _hear_out(selector, (child.stdout, child.stderr))
        os.close(pidfd)
        child.stdout.close()
        child.stderr.close()

    def _turn(self, selector: selectors.BaseSelector, pidfd: int) -> bool:
        """Handle what is ready; False once the child has ended."""
        now = time.monotonic()
        due = [at - now for at in (self._limit_at, self._kill_at) if at is not None]
        timeout = max(0.0, min([PROGRESS_S, *due]))
        ended = False
        for key, _ in selector.select(timeout):
            if key.fd == pidfd:
                ended = True
            else:
                key.data(selector)
        self._tell_progress()
        self._limit()
        self._look()
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
        self._hear()

    def _hear(self) -> None:
        with suppress(BlockingIOError):  # looked at once more at the end, where nothing came
            for number in self._wakeup.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT) and self.stopped is None:
                    self._stop(number)

    def _stop(self, number: int) -> None:
        self._log.line(f"atomtx: asked to stop by {signal.Signals(number).name}")
        if not self._overdue:  # else it was told already, its grace runs, and it has failed
            self.stopped = number
            self._ask_to_end()

    def _limit(self) -> None:
        if self._limit_at is not None and time.monotonic() >= self._limit_at:
            self._limit_at = None
            if self.stopped is None:
                self._overdue = True
                self._log.line(f"atomtx: over its limit of {span(self._task.time_limit_s)}")
                self._ask_to_end()

    def _on_change(self, _: selectors.BaseSelector) -> None:
        self._have_changed = True

    def _look(self) -> None:
        """Stop a client that reads lost snapshots, or others' files; the runner judges the end."""
        if self.lost:
            return
        try:
            self.lost = self._seen()
        except (EffectError, OSError) as exc:  # the next look, or the one at the end, may tell
            self._log.line(f"atomtx: {exc}")
            return
        if self.lost:
            self._log.line(f"atomtx: {self.lost}")
            if self.stopped is None and not self._overdue:
                self._ask_to_end()

    def _seen(self) -> str | None:
        """Look at the mounts where some have changed, and at the snapshots now and then."""
        now = time.monotonic()
        trouble = None
        if self._have_changed and now >= self._mounts_at:
            self._have_changed, self._mounts_at = False, now + MOUNTS_S
            trouble = self._assembly.displaced()
        if not trouble and now >= self._look_at:
            self._look_at = now + LOOK_S
            trouble = self._assembly.failure()
        return trouble

    def _ask_to_end(self) -> None:
        self._kill_at = time.monotonic() + self._task.grace_s
        if self._child:
            with suppress(ProcessLookupError):  # a session of its own: the wrapper and all in it
                os.killpg(self._child.pid, self._task.stop_signal)

    def _escalate(self) -> None:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            self._killed = True
            self._log.line(f"atomtx: not ended after {span(self._task.grace_s)}: killed")
            _signal_descendants(signal.SIGKILL)

    def _end_descendants(self) -> None:
        """End what the client left behind; as its subreaper we are the parent of all of it."""
        for signum, wait_s in ((signal.SIGTERM, DESCENDANTS_S), (signal.SIGKILL, DESCENDANTS_S)):
            _signal_descendants(signum)
            if locks.wait_until(_reaped_all, wait_s):
                return
        left = system.here.descendants()
        raise EffectError(f"processes of the client cannot be ended: {left}")

    def redacted(self, end: End) -> End:
        """Return *end* without what must not be seen in its words."""

        def clean(text: str | None) -> str | None:
            return self._redactor.redact(text)[:2000] if text else text

        backups = tuple(Backup(**{**vars(b), "reason": clean(b.reason)}) for b in end.backups)
        return replace(end, reason=clean(end.reason), backups=backups)


def _hear_out(selector: selectors.BaseSelector, pipes: Sequence[IO[bytes]]) -> None:
    """
    Read what a client that has ended printed, to its last word.

    A filter of the client's own, such as `exec > >(tee -a LOG)` in a wrapper, prints after it.  A
    descendant may keep a pipe open, and write, for ever: then read what is there, and go.
    """

    def unread() -> list[selectors.SelectorKey]:
        return [key for key in selector.get_map().values() if key.fileobj in pipes]

    end = time.monotonic() + LAST_WORDS_S
    while unread() and (left_s := end - time.monotonic()) > 0:
        for key, _ in selector.select(left_s):
            key.data(selector)
    for _ in range(_LAST_READS):
        for key in unread():
            key.data(selector)


def _signal_descendants(signum: signal.Signals) -> None:
    """Signal each, proven first: its parent may have reaped it, and its number be another's."""
    for pid in system.here.descendants():
        locks.send(pid, signum, if_still=lambda p: p in system.here.descendants())


def _reaped_all() -> bool:
    """Reap what has ended; True when no child is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False

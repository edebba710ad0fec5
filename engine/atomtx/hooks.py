"""
The user's own commands around a run: started, limited, read, and undone whatever happens.

A hook holds none of our locks, so that one that hangs keeps no recovery out.  It runs in a
session of its own; what it leaves behind in that session lives until its undo, which ends it
first, or until the run's end.  What leaves the session, as a daemon does, is the user's.

The intents are journaled before; the outcomes are kept here and written with the next change of
the run: between the hooks around the snapshots nothing is written, because a hook may have
frozen the very file system that the journal lies on.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from . import locks, process
from .errors import EffectError, Interrupted
from .intents import AROUND_RUN, BEFORE, RunHook, UndoHook
from .interrupts import Interrupts
from .journal import Change
from .output import Lines, Log
from .plan import ClientPlan
from .records import Run, Step
from .redact import Redactor
from .statedir import RunFolder
from .task import span

if TYPE_CHECKING:
    from subprocess import Popen

GRACE_S = 10.0
_LOOK_S = 0.2
_READ_BYTES = 1 << 16
_LAST_READS = 17  # a pipe holds 1 MiB at most (pipe(7))
_LONGEST_VALUE = 100_000  # execve(2): 128 KiB for one string
_MARK = "ATOMTX_HOOK_ID"
_NEVER = ("not-needed", "it was not started")


class Hooks:
    """One front end's work on the hooks of one run."""

    def __init__(
        self,
        folder: RunFolder,
        interrupts: Interrupts,
        *,
        step: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._interrupts = interrupts
        self._tell = step
        self._warn = warn
        self._inherited: frozenset[int] = frozenset()  # steps of a front end before this one
        self._started: set[int] = set()
        self._ended: dict[int, tuple[str, str | None]] = {}
        self._let_go: set[int] = set()

    def take_over(self, run: Run) -> None:
        """Go on where another front end was killed: any hook that it intended may have run."""
        self._inherited = frozenset(step.id for step in run.steps)

    # -- what is to be done ----------------------------------------------------------------

    def missing(self, run: Run) -> tuple[RunHook, ...]:
        """Return the hooks around the run that are not in force: those of a run taken up again."""
        live = [
            step.intent
            for step in run.steps
            if isinstance(step.intent, RunHook) and self._is_live(run, step)
        ]
        wanted = (hook for hook in run.plan.hooks if hook.when == AROUND_RUN)
        return tuple(hook for hook in wanted if hook not in live)

    def _is_live(self, run: Run, step: Step) -> bool:
        undo = _undo_of(run, step)
        if undo is not None:
            return self._is_open(undo)
        return step.id not in self._inherited

    def _is_open(self, step: Step) -> bool:
        return step.outcome is None and step.id not in self._ended

    def has_open(self, run: Run) -> bool:
        """Tell whether a hook of a front end before this one was left without its undo."""
        return any(
            step.intent.when in BEFORE and self._is_open(step)
            for step in run.steps
            if isinstance(step.intent, RunHook | UndoHook)
        )

    # -- doing it --------------------------------------------------------------------------

    def before(self, run: Run, when: str) -> None:
        """
        Run the open hooks of one place, in order.

        Raises EffectError for the first that fails, and Interrupted on a signal, after it was
        ended; nothing is undone here.
        """
        for step in run.steps:
            intent = step.intent
            if isinstance(intent, RunHook) and intent.when == when and self._is_open(step):
                self._tell(intent.describe())
                trouble = self._run(run, step, intent.command, intent.limit_s, stops=True)
                self._ended[step.id] = ("failed", trouble) if trouble else ("done", None)
                if trouble:
                    raise EffectError(f"{intent.describe()}: {trouble}")

    def undo(self, run: Run, *places: str) -> None:
        """
        Undo, the last one first, each hook of *places* that may have run; idempotent.

        Nothing interrupts it, and nothing is raised: what fails is warned of and noted.
        """
        for step in reversed(run.steps):
            intent = step.intent
            if isinstance(intent, RunHook) and intent.when in places:
                self._undo_one(run, step)

    def _undo_one(self, run: Run, step: Step) -> None:
        if step.id in self._let_go:
            return
        self._let_go.add(step.id)
        undo = _undo_of(run, step)
        if step.id not in self._inherited | self._started:
            self._ended |= {s.id: _NEVER for s in (step, undo) if s and self._is_open(s)}
            return
        if self._is_open(step):
            self._ended[step.id] = ("failed", "interrupted")
        self._end_what_is_left(run, step.id)
        if undo and self._is_open(undo):
            self._carry_out(run, undo)

    def at_end(self, run: Run) -> None:
        """Undo what is not undone yet, then run the hooks of the run's outcome; as `undo`."""
        self.undo(run, *BEFORE)
        for step in run.steps:
            if isinstance(step.intent, RunHook) and self._is_open(step):
                self._carry_out(run, step)
        for step in run.steps:
            if isinstance(step.intent, RunHook) and not _undo_of(run, step):
                self._end_what_is_left(run, step.id)

    def _carry_out(self, run: Run, step: Step) -> None:
        intent = step.intent
        assert isinstance(intent, RunHook | UndoHook)
        if step.id in self._inherited:  # it may be at work still
            self._end_what_is_left(run, step.id)
        self._tell(intent.describe())
        trouble = self._run(run, step, intent.command, intent.limit_s, stops=False)
        self._ended[step.id] = ("failed", trouble) if trouble else ("done", None)
        if trouble:
            self._warn(f"{intent.describe()}: {trouble}")

    def record(self, change: Change, run: Run) -> None:
        """Write every outcome that the journal does not have yet."""
        for step in run.steps:
            if step.outcome is None and step.id in self._ended:
                change.ended(step, *self._ended[step.id])

    # -- a hook's process ------------------------------------------------------------------

    def _run(
        self, run: Run, step: Step, argv: tuple[str, ...], limit_s: int, *, stops: bool
    ) -> str | None:
        """Run one to its end; return what is wrong with it, if anything."""
        self._started.add(step.id)
        env = environment(run, step)
        cwd = run.plan.client.cwd if os.path.isdir(run.plan.client.cwd) else "/"
        try:
            child = process.spawn_hook(argv, env=env, cwd=cwd)
        except OSError as exc:
            return f"cannot start {argv[0]}: {exc.strerror}"
        with suppress(OSError):  # a full disk: its mark tells as well which processes are its
            self._folder.write_hook(step.id, _identity(child.pid))
        log = _LastLine(self._folder, env)
        try:
            in_time = self._watch(child, log, limit_s, stops=stops)
        except Interrupted:
            self._end_session(child)
            raise
        finally:
            log.close()
        if not in_time:
            self._end_session(child)
            return f"did not end within {span(limit_s)}"
        return _trouble(child.wait(), log.last)

    def _watch(self, child: Popen[bytes], log: _LastLine, limit_s: int, *, stops: bool) -> bool:
        """Read what it prints until it has ended; False where *limit_s* passed before."""
        assert child.stdout
        end = time.monotonic() + limit_s if limit_s else None
        pidfd = os.pidfd_open(child.pid)
        os.set_blocking(child.stdout.fileno(), False)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(child.stdout, selectors.EVENT_READ)
                while True:
                    ready = {key.fd for key, _ in selector.select(_LOOK_S)}
                    if child.stdout.fileno() in ready and not log.read(child.stdout.fileno()):
                        selector.unregister(child.stdout)
                    if pidfd in ready:
                        break
                    if stops:
                        self._interrupts.check()
                    if end is not None and time.monotonic() >= end:
                        return False
            # What it left behind may keep the pipe open, and write, for ever.
            for _ in range(_LAST_READS):
                if not log.read(child.stdout.fileno()):
                    break
            return True
        finally:
            os.close(pidfd)
            child.stdout.close()

    def _end_session(self, child: Popen[bytes]) -> None:
        """End a hook that is our child, with all of its session, and wait for it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in _session(child.pid):  # which is not reused before the child is waited for
                locks.send(pid, number, if_still=lambda p: _session_of(p) == child.pid)
            if locks.wait_until(lambda: not _session(child.pid), GRACE_S):
                break
        child.wait()

    def _end_what_is_left(self, run: Run, step: int) -> None:
        """End what lives of a hook's session, after a crash too; each process proven first."""
        known = self._folder.read_hook(step)
        mark = f"{_MARK}={run.id}:{step}"
        proven: dict[int, dict[str, Any]] = {}

        def is_proven(pid: int) -> bool:
            return pid in proven and _identity(pid) == proven[pid] and _session_of(pid) is not None

        def left() -> list[int]:
            for sid in _sessions_of_hook(known, mark):
                proven.update({pid: _identity(pid) for pid in _session(sid)})
            return list(filter(is_proven, proven))

        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in (alive := left()):
                locks.send(pid, number, if_still=is_proven)
            if not alive or locks.wait_until(lambda: not left(), GRACE_S):
                return
        self._warn(f"a hook's processes cannot be ended: {left()}")


class _LastLine:
    """The log of the hooks, and the last line that one of them printed; redacted."""

    def __init__(self, folder: RunFolder, env: Mapping[str, str]) -> None:
        self._redactor = Redactor(env)
        self._lines = Lines()
        self._log: Log | None = None
        with suppress(OSError):  # a full disk loses the log, never the hook
            self._log = Log(folder.hooks_log, self._redactor)
        self.last = ""

    def read(self, descriptor: int) -> bool:
        """Take what is there; False at the end, or where there is nothing."""
        try:
            data = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        self._take(self._lines.feed(data) if data else self._lines.rest())
        return bool(data)

    def _take(self, lines: Any) -> None:
        for line in lines:
            self.last = self._redactor.redact(line.strip())[:300]
            if self._log:
                self._log.line(line)

    def close(self) -> None:
        self._take(self._lines.rest())
        if self._log:
            self._log.close()


def environment(run: Run, step: Step) -> dict[str, str]:
    """Return a hook's environment: ours, what was journaled of the first one's, and the facts."""
    moment = run.moment_at and datetime.fromtimestamp(run.moment_at // 1_000_000, UTC)
    assert isinstance(step.intent, RunHook | UndoHook)
    facts = {
        _MARK: f"{run.id}:{step.id}",
        "ATOMTX_HOOK": step.intent.when,
        "ATOMTX_RUN": run.id,
        "ATOMTX_JOB": run.label,
        "ATOMTX_OUTCOME": run.outcome or "",
        "ATOMTX_REASON": run.reason or "",
        "ATOMTX_ATTEMPT": str(run.attempts),
        "ATOMTX_MOMENT": moment.isoformat() if moment else "",
        "ATOMTX_VOLUMES": "\n".join(v.name for v in run.volumes),
        "ATOMTX_SNAPSHOTS": "\n".join(v.snapshot for v in run.volumes),
        "ATOMTX_PATHS": "\n".join(run.plan.targets),
    }
    short = {n: v for n, v in facts.items() if len(os.fsencode(v)) < _LONGEST_VALUE}
    return {**_base(run.plan.client), **short}


def _base(client: ClientPlan) -> dict[str, str]:
    return {**os.environ, **dict(client.environment)}


def _trouble(status: int, last: str) -> str | None:
    if status == 0:
        return None
    how = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
    return f"{how}: {last}" if last else how


def _undo_of(run: Run, step: Step) -> Step | None:
    return next((s for s in run.steps if s.compensates == step.id), None)


def _stat(pid: int) -> list[str]:
    """Return proc(5)'s stat of a process from its state on; nothing where it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()
    return []


def _identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from any other: its pid, its start, the boot."""
    stat = _stat(pid)
    return {"pid": pid, "start": stat[19] if stat else None, "boot_id": locks.boot_id()}


def _session_of(pid: int) -> int | None:
    """Return the session of a living process; one that only waits to be reaped is in none."""
    stat = _stat(pid)
    return int(stat[3]) if stat and stat[0] not in "ZX" else None


def _session(sid: int) -> list[int]:
    return [pid for pid in locks.pids() if _session_of(pid) == sid]


def _sessions_of_hook(known: Mapping[str, Any] | None, mark: str) -> set[int]:
    """
    Return the sessions that are proven a hook's: by its first process, or by one with its mark.

    Others of the session may have dropped their environment.  A number of a session is not used
    again while it has a process.
    """
    if known is None:  # killed before it could note the process
        return {sid for pid in locks.pids() if _has_mark(pid, mark) and (sid := _session_of(pid))}
    sid = int(known["pid"])
    is_its = _identity(sid) == known or any(_has_mark(pid, mark) for pid in _session(sid))
    return {sid} if is_its else set()


def _has_mark(pid: int, mark: str) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return mark.encode() in file.read().split(b"\0")
    return False

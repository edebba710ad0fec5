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
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from . import clients
from .clients import Client
from .errors import AtomtxError, EffectError, Interrupted
from .intents import AROUND_RUN, AROUND_SNAPSHOT, BEFORE, ApplyRetention, RunHook, UndoHook
from .interrupts import Interrupts
from .journal import Change
from .launching import mended, settings_of
from .plan import ClientPlan
from .records import Run, Step
from .sessions import Sessions
from .statedir import RunFolder

_LONGEST_VALUE = 100_000  # execve(2): 128 KiB for one string
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
        self._sessions = Sessions(folder, interrupts)
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
        if when == AROUND_SNAPSHOT:
            self._sessions.hold_back()
        for step in run.steps:
            intent = step.intent
            if isinstance(intent, RunHook) and intent.when == when and self._is_open(step):
                self._tell(intent.describe())
                trouble = self._run(run, step, intent, stops=True)
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
        if AROUND_SNAPSHOT in places:
            self._sessions.write_out()

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
        self._end_what_is_left(step)
        if undo and self._is_open(undo):
            self._carry_out(run, undo)

    def at_end(self, run: Run) -> None:
        """
        Undo what is not undone yet, then run the hooks of the run's outcome; as `undo`.

        Before that the retention, which may need what a hook has mounted.
        """
        self._retain(run)
        self.undo(run, *BEFORE)
        for step in run.steps:
            if isinstance(step.intent, RunHook) and self._is_open(step):
                self._carry_out(run, step)
        for step in run.steps:
            if isinstance(step.intent, RunHook) and not _undo_of(run, step):
                self._end_what_is_left(step)

    def _retain(self, run: Run) -> None:
        for step in run.steps:
            intent = step.intent
            if isinstance(intent, ApplyRetention) and self._is_open(step):
                self._tell(intent.describe())
                try:
                    trouble = self._retention(run, step, intent)
                except Interrupted as exc:
                    trouble = exc.message
                    if step.id in self._started:
                        with suppress(AtomtxError):  # the next run of the job tries again
                            self._mend(run)
                except AtomtxError as exc:
                    trouble = exc.message
                self._end(step, trouble)

    def _mend(self, run: Run) -> None:
        """Let the client mend what its killed predecessor left in the repository."""
        for line in mended(run.plan.client):
            self._tell(line)

    def _retention(self, run: Run, step: Step, intent: ApplyRetention) -> str | None:
        config = run.plan.client
        client: Client = clients.load(config.name)
        settings = settings_of(config)
        self._interrupts.stop()
        self.before(run, AROUND_RUN)  # those that were undone after a crash
        if step.id in self._inherited:
            self._end_what_is_left(step)
            self._mend(run)
        self._started.add(step.id)
        for argv in client.forgetting(settings, intent.paths, intent.policy):
            trouble = self._sessions.run(
                step.id,
                argv,
                env=settings.env,
                cwd=config.cwd,
                stops=True,
                secrets=[name for name, _ in config.credentials],
                stop_signal=client.stop_signal,
                grace_s=run.plan.grace_s,
            )
            if trouble:
                return trouble
        return None

    def _carry_out(self, run: Run, step: Step) -> None:
        intent = step.intent
        assert isinstance(intent, RunHook | UndoHook)
        if step.id in self._inherited:  # it may be at work still
            self._end_what_is_left(step)
        self._tell(intent.describe())
        self._end(step, self._run(run, step, intent, stops=False))

    def _end(self, step: Step, trouble: str | None) -> None:
        self._ended[step.id] = ("failed", trouble) if trouble else ("done", None)
        if trouble:
            self._warn(f"{step.intent.describe()}: {trouble}")

    def _run(self, run: Run, step: Step, intent: RunHook | UndoHook, *, stops: bool) -> str | None:
        self._started.add(step.id)
        return self._sessions.run(
            step.id,
            intent.command,
            env=environment(run, step),
            cwd=run.plan.client.cwd,
            limit_s=intent.limit_s,
            stops=stops,
            secrets=[name for name, _ in run.plan.client.credentials],
        )

    def _end_what_is_left(self, step: Step) -> None:
        left = self._sessions.end_what_is_left(step.id)
        if left:
            self._warn(f"processes of a hook cannot be ended: {left}")

    def record(self, change: Change, run: Run) -> None:
        """Write every outcome that the journal does not have yet."""
        for step in run.steps:
            if step.outcome is None and step.id in self._ended:
                change.ended(step, *self._ended[step.id])


def environment(run: Run, step: Step) -> dict[str, str]:
    """Return a hook's environment: ours, what was journaled of the first one's, and the facts."""
    moment = run.moment_at and datetime.fromtimestamp(run.moment_at // 1_000_000, UTC)
    assert isinstance(step.intent, RunHook | UndoHook)
    facts = {
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
    # A reason may be what a program printed; a NUL ends a string of execve(2).
    clean = {name: value.replace("\0", "?") for name, value in facts.items()}
    short = {n: v for n, v in clean.items() if len(os.fsencode(v)) < _LONGEST_VALUE}
    return {**_base(run.plan.client), **short}


def _base(client: ClientPlan) -> dict[str, str]:
    return {**os.environ, **dict(client.environment)}


def _undo_of(run: Run, step: Step) -> Step | None:
    return next((s for s in run.steps if s.compensates == step.id), None)

"""
The user's own commands around a run: started, limited, read, and undone whatever happens.

A hook holds none of our locks, so that one that hangs keeps no recovery out.  It runs in a
session of its own; what it leaves behind in that session lives until its undo, which ends it
first, or until the run's end.  What leaves the session, as a daemon does, is the user's.

The intents are journaled before; the outcomes are kept here and written with the next change of
the run: between the hooks around the snapshots nothing is written, because a hook may have
frozen the very file system that the journal lies on, or that our own output goes to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from . import clients
from .clients import Client, Facts, Settings
from .errors import AtomtxError, ClientError, EffectError, Interrupted
from .intents import AROUND_RUN, AROUND_SNAPSHOT, BEFORE, ApplyRetention, RunHook, UndoHook
from .interrupts import Interrupts
from .journal import Change
from .launching import facts_of, mended, settings_of
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
        self._step = step
        self._warn = warn
        self._unsaid: list[tuple[Callable[[str], None], str]] | None = None  # held back
        self._inherited: frozenset[int] = frozenset()  # steps of a front end before this one
        self._started: set[int] = set()
        self._ended: dict[int, tuple[str, str | None]] = {}
        self._let_go: set[int] = set()

    def take_over(self, run: Run) -> None:
        """Go on where another front end was killed: any hook that it intended may have run."""
        self._inherited = frozenset(step.id for step in run.steps)

    # -- what is told ----------------------------------------------------------------------

    def step(self, line: str) -> None:
        """Tell what is done now; while a hook around the snapshots is in force, after it."""
        self._say(self._step, line)

    def warn(self, line: str) -> None:
        """Warn, as `step` tells."""
        self._say(self._warn, line)

    def _say(self, show: Callable[[str], None], line: str) -> None:
        if self._unsaid is None:
            show(line)
        else:
            self._unsaid.append((show, line))

    def _hold_back(self) -> None:
        """Show nothing until `_say_all`: write(2) to a frozen file system waits for its thaw."""
        self._unsaid = self._unsaid or []

    def _say_all(self) -> None:
        lines, self._unsaid = self._unsaid or [], None
        for show, line in lines:
            show(line)

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
                self.step(intent.describe())
                if when == AROUND_SNAPSHOT:
                    self._hold_back()
                trouble = self._run(run, step, intent, stops=True)
                self._ended[step.id] = ("failed", trouble) if trouble else ("done", None)
                if trouble:
                    raise EffectError(f"{intent.describe()}: {trouble}")

    def undo(self, run: Run, *places: str) -> None:
        """
        Undo, the last one first, each hook of *places* that may have run; idempotent.

        Those around the snapshots come first.  Nothing interrupts it, and nothing is raised: what
        fails is warned of and noted.
        """
        if AROUND_SNAPSHOT in places:
            self._hold_back()  # those of a killed front end may be in force
            self._undo_all(run, AROUND_SNAPSHOT)
            self._sessions.write_out()
            self._say_all()
        if AROUND_RUN in places:
            self._end_retention(run)
            self._undo_all(run, AROUND_RUN)

    def _end_retention(self, run: Run) -> None:
        """End the client that forgets for a killed front end: it needs what a hook has mounted."""
        for step in run.steps:
            is_its = isinstance(step.intent, ApplyRetention) and step.id in self._inherited
            if is_its and self._is_open(step):
                self._end_what_is_left(step)

    def _undo_all(self, run: Run, place: str) -> None:
        for step in reversed(run.steps):
            intent = step.intent
            if isinstance(intent, RunHook) and intent.when == place:
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
                self.step(intent.describe())
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
            self.step(line)

    def _retention(self, run: Run, step: Step, intent: ApplyRetention) -> str | None:
        self._end_retention(run)  # whatever keeps the next one from its start
        config = run.plan.client
        client: Client = clients.load(config.name)
        settings = settings_of(config)
        self._interrupts.stop()
        self.before(run, AROUND_RUN)  # those that were undone after a crash
        if step.id in self._inherited:
            if client.inspect(settings).repository != config.repository:
                raise ClientError("the repository is another one than the run's")
            self._mend(run)
        self._started.add(step.id)
        for argv in _forgetting(client, settings, facts_of(config), intent):
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
        self.step(intent.describe())
        self._end(step, self._run(run, step, intent, stops=False))

    def _end(self, step: Step, trouble: str | None) -> None:
        self._ended[step.id] = ("failed", trouble) if trouble else ("done", None)
        if trouble:
            self.warn(f"{step.intent.describe()}: {trouble}")

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
            self.warn(f"processes of a hook cannot be ended: {left}")

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
        "ATOMTX_SNAPSHOTS": "\n".join(v.snapshot for v in run.frozen),
        "ATOMTX_PATHS": "\n".join(run.plan.targets),
    }
    # A reason may be what a program printed; a NUL ends a string of execve(2).
    clean = {name: value.replace("\0", "?") for name, value in facts.items()}
    short = {n: v for n, v in clean.items() if len(os.fsencode(v)) < _LONGEST_VALUE}
    return {**_base(run.plan.client), **short}


def _forgetting(
    client: Client, settings: Settings, facts: Facts, intent: ApplyRetention
) -> tuple[tuple[str, ...], ...]:
    """Ask the client what to start; ClientError for whatever it cannot tell."""
    try:
        return client.forgetting(settings, facts, intent.paths, intent.policy)
    except AtomtxError:
        raise
    # A program's words, read wrongly, would keep the run from its end for ever, and every
    # recovery and every later run of the job with it: this step may fail, the next run has it too.
    except Exception as exc:
        said = settings.redact(f"{type(exc).__name__}: {exc}")
        raise ClientError(f"{client.name} does not tell what there is to forget: {said}") from exc


def _base(client: ClientPlan) -> dict[str, str]:
    return {**os.environ, **dict(client.environment)}


def _undo_of(run: Run, step: Step) -> Step | None:
    return next((s for s in run.steps if s.compensates == step.id), None)

"""
Settle interrupted runs: probe, decide, act; until nothing is left to do.

The same for `atomtx recover` and for `atomtx backup`, which settles its own job's run first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum

from . import clients, errand, locks, moment, plan, recovery, states
from .errors import (
    AtomtxError,
    BusyError,
    CredentialError,
    EffectError,
    ExitStatus,
    Interrupted,
    JournalFullError,
    UserError,
    WaitingError,
)
from .executor import Executor, Tell
from .interrupts import Interrupts
from .journal import Journal, NoRunError
from .launching import settings_of
from .probing import end_survivors, probe, survivors
from .records import Run
from .recovery import Decision, Probes, Wish
from .statedir import RunFolder
from .states import Event, Outcome
from .volumes.kinds import Kinds

LEFT = recovery.LeaveAlone("`atomtx recover` goes on with it when its repository is there")
_COMMAND_S = 60.0
_LOOK_S = 0.2


class Patience(Enum):
    """What to do with a runner that lives."""

    WAIT = "wait"  # for the client's end, showing its progress
    STOP = "stop"  # it, and clean up
    LEAVE = "leave"  # it alone


@dataclass(frozen=True)
class Settled:
    """What became of a run."""

    run: Run
    decision: Decision  # the last one
    interrupted: Interrupted | None = None

    @property
    def status(self) -> ExitStatus:
        """Return the exit status that this alone would give."""
        if self.interrupted:
            return self.interrupted.exit_status
        if isinstance(self.decision, recovery.LeaveAlone | recovery.Adopt):
            return ExitStatus.COMPLETED
        return status_of(self.run)


def status_of(run: Run) -> ExitStatus:
    """Return the exit status of a run as it stands."""
    if run.outcome in (Outcome.FAILED, None) and run.state in (states.DESTROYED, states.UNMOUNTING):
        return ExitStatus.FAILED
    if run.outcome is None:
        return ExitStatus.WAITING
    if run.outcome == Outcome.PARTIAL:
        return ExitStatus.PARTIAL
    if run.failed_after and run.outcome == Outcome.COMPLETED:
        return ExitStatus.STEP_AFTER_FAILED
    return ExitStatus.PARKED if run.is_parked else ExitStatus.COMPLETED


class Settler:
    """
    Settles the open runs of a journal.

    *sources* tell where the credentials of a job are now: its key -> variable -> source.
    Unless it *may_resume*, only what needs neither the client nor its repository is done, and a
    client that is stopped can go on later.
    """

    def __init__(
        self,
        journal: Journal,
        interrupts: Interrupts,
        tell: Tell,
        *,
        rollback: bool = False,
        patience: Patience = Patience.WAIT,
        sources: Mapping[str, Mapping[str, str]] | None = None,
        may_resume: bool = True,
    ) -> None:
        self._journal = journal
        self._interrupts = interrupts
        self._tell = tell
        self._rollback = rollback or (patience is Patience.STOP and may_resume)
        self._patience = patience
        self._may_resume = may_resume
        self._sources = sources or {}

    def settle(self, run: Run) -> Settled:
        """
        Bring one open run to its end, or as far as it can be brought now.

        Raises WaitingError where it must wait, and says for what; NoRunError where it has ended
        and was forgotten meanwhile.
        """
        run = self._journal.load(run.id)  # no folder is made for one that was forgotten
        folder = RunFolder.of(self._journal.state, run.id).make()
        if self._patience is not Patience.LEAVE:
            self._await_command(folder)
        with front(folder) as lock:
            if lock is None:
                return Settled(run, recovery.decide(run, Probes(front_alive=True), self._wish()))
            # Somebody may have settled it between our look and our lock.
            run = self._journal.load(run.id)
            return self._settle_locked(run, folder, lock)

    def _await_command(self, folder: RunFolder) -> None:
        """
        Wait for the command of a killed front end: it is never killed, and holds lock F.

        Not for ever, because one in a suspended pool does not end.
        """
        end = time.monotonic() + _COMMAND_S
        told = False
        while locks.is_held(folder.front_lock) and time.monotonic() < end:
            holders = locks.holders(folder.front_lock)
            if not holders or any(p.command not in locks.COMMANDS for p in holders):
                return
            if not told:
                self._tell.step(f"waiting for the end of {holders[0]}, whose atomtx was killed")
                told = True
            self._interrupts.sleep(_LOOK_S)

    def decide(self, run: Run) -> Decision:
        """Return what `settle` would do first, changing nothing."""
        folder = RunFolder.of(self._journal.state, run.id).make()
        with front(folder) as lock:
            if lock is None:
                return recovery.decide(run, Probes(front_alive=True), self._wish())
            return self._decide(run, folder, Kinds.real(lock))

    def _wish(self) -> Wish:
        return Wish(rollback=self._rollback, now_us=time.time_ns() // 1000)

    def _decide(self, run: Run, folder: RunFolder, kinds: Kinds) -> Decision:
        probes, _ = probe(run, folder, kinds)
        decision = recovery.decide(run, probes, self._wish())
        if isinstance(decision, recovery.Resume) and self._may_resume:
            # Asking the repository may take a minute: only when everything else is ready.
            not_ready = self._not_ready(self._updated(run), kinds)
            decision = recovery.decide(run, replace(probes, not_ready=not_ready), self._wish())
        return decision

    def _updated(self, run: Run) -> Run:
        """Return the run with the sources that its credentials have in the configuration now."""
        client = run.plan.client
        now = self._sources.get(run.job, {})
        found = tuple((name, now.get(name, source)) for name, source in client.credentials)
        return replace(run, plan=replace(run.plan, client=replace(client, credentials=found)))

    def _update(self, run: Run) -> Run:
        updated = self._updated(run)
        return run if updated == run else self._journal.replan(run, updated.plan)

    def _not_ready(self, run: Run, kinds: Kinds) -> str | None:
        """Tell why the client cannot run on the run's snapshots now; None if it can."""
        config = run.plan.client
        missing = [name for name in config.secrets if name not in os.environ]
        if missing:
            return f"{', '.join(missing)} of the interrupted run is not in the environment"
        if trouble := kinds.unreadable(run.plan.volumes):
            return trouble
        try:
            found = clients.load(config.name).inspect(settings_of(config))
        except AtomtxError as exc:
            return str(exc)
        if found.repository != config.repository:
            return "the repository is another one than the interrupted run's"
        return None

    def _settle_locked(self, run: Run, folder: RunFolder, lock: int) -> Settled:
        executor = Executor(
            self._journal, folder, front=lock, interrupts=self._interrupts, tell=self._tell
        )
        while run.state != states.DESTROYED:
            decision = self._decide(run, folder, Kinds.real(lock))
            if isinstance(decision, recovery.Adopt):
                if self._patience is Patience.LEAVE:
                    return Settled(run, decision)
                self._adopt(run, folder)
            elif isinstance(decision, recovery.EndOrphans):
                try:
                    self._end_orphans(run, folder, Kinds.real(lock))
                except AtomtxError:
                    executor.take_over(run)
                    raise
            elif isinstance(decision, recovery.Wait):
                executor.take_over(run)
                raise self._waiting(run, decision)
            elif not self._may_resume and _is_for_later(run, decision):
                return Settled(executor.take_over(run), LEFT)
            else:
                run = self._act(executor.take_over(run), decision, executor)
                return Settled(run, decision, executor.interrupted)
        return Settled(run, recovery.RollForward())

    def _end_orphans(self, run: Run, folder: RunFolder, kinds: Kinds) -> None:
        """End what is left of the run; in a suspended pool no signal is heard."""
        try:
            end_survivors(run, folder, self._tell.warn)
        except EffectError as exc:
            trouble = kinds.trouble(run.plan.volumes)
            if trouble is None:
                raise
            raise self._waiting(run, recovery.Wait(trouble)) from exc

    def _waiting(self, run: Run, decision: recovery.Wait) -> WaitingError:
        probes_blocked = self._rollback or run.state == states.UNMOUNTING
        way_out = f"--abandon {run.id}" if probes_blocked else "--rollback"
        return WaitingError(
            f"run {run.id} ({run.label}) waits: {decision.reason}",
            hint=f"mend that and run `atomtx recover`; or `atomtx recover {way_out}`",
        )

    def _adopt(self, run: Run, folder: RunFolder) -> None:
        if self._patience is Patience.STOP:
            self._tell.step(f"stopping the client of run {run.id}")
            errand.stop(folder, signal.SIGINT if self._may_resume else signal.SIGTERM)
        else:
            self._tell.step(f"the client of run {run.id} ({run.label}) lives: waiting for its end")
        errand.wait(folder, self._interrupts, self._tell.progress, stop_on_signal=False)

    def _act(self, run: Run, decision: Decision, executor: Executor) -> Run:
        try:
            return self._advance(run, decision, executor)
        # What could be undone without a new row is undone.
        except (JournalFullError, CredentialError) as exc:
            raise self._waiting(run, recovery.Wait(exc.message)) from exc

    def _advance(self, run: Run, decision: Decision, executor: Executor) -> Run:
        match decision:
            case recovery.Resume():
                self._tell.step(
                    f"resuming run {run.id} ({run.label}): "
                    f"the same snapshots, attempt {run.attempts + 1}"
                )
                run = executor.resume(self._update(run))
                executor.mend(run)
            case recovery.RollForward():
                if run.state == states.BACKING_UP:
                    run = executor.record_end(run)
            case recovery.RollBack(reason):
                self._tell.step(f"rolling back run {run.id} ({run.label}): {reason}")
                run = executor.give_up(run, Outcome.ROLLED_BACK, reason)
            case _:
                raise AssertionError(decision)
        return executor.advance(run)


def _is_for_later(run: Run, decision: Decision) -> bool:
    """Tell whether what is left to do needs the client, its repository or hooks of the end."""
    ends = run.plan.retention or plan.hooks_after(run.plan, None)
    return isinstance(decision, recovery.Resume) or bool(ends)


@contextmanager
def front(folder: RunFolder) -> Iterator[int | None]:
    """
    Hold lock F of a run for a block; None inside where somebody else holds it.

    Raises NoRunError where the run was forgotten, with its folder, a moment ago.
    """
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locks.acquired(folder.front_lock))
        except FileNotFoundError as exc:
            raise NoRunError(f"run {folder.path.name} was forgotten meanwhile") from exc
        yield descriptor


def abandon(journal: Journal, run: Run) -> None:
    """
    Close a run whose pool or file system will never return, touching nothing on the machine.

    Refused where all of them are there: then `recover` can settle it.
    """
    folder = RunFolder.of(journal.state, run.id).make()
    with front(folder) as lock:
        if lock is None or locks.is_held(folder.runner_lock) or survivors(run, folder):
            raise BusyError(f"run {run.id} is at work", hint="see `atomtx status`")
        run = journal.load(run.id)
        if Kinds.real(lock).trouble(run.plan.volumes) is None:
            raise UserError(
                f"the pools of run {run.id} are imported", hint="`atomtx recover` settles it"
            )
        known = errand.end(folder, run.attempts) if run.state == states.BACKING_UP else None
        run = Executor(journal, folder, front=lock, interrupts=Interrupts(), tell=Tell()).take_over(
            run
        )
        end = moment.judged(journal, run, known[0]) if known else None
        _close(journal, run, end, "abandoned at the user's word")


def _close(journal: Journal, run: Run, end: clients.End | None, reason: str) -> None:
    if run.state != states.UNMOUNTING:
        with journal.change(run) as change:
            if end:  # the client's own word stands
                change.result(end)
            else:
                change.set(outcome=Outcome.ROLLED_BACK.value, reason=reason)
            change.fire(Event.GIVEN_UP, reason=reason)
        run = journal.load(run.id)
    with journal.change(run) as change:
        for step in run.steps:
            if step.outcome in (None, "parked"):
                change.ended(step, "failed", reason)
        change.set(cleanup=None)
        change.fire(Event.CLEANED_UP, reason=reason)

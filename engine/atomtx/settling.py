"""
Settle interrupted runs: probe, decide, act; until nothing is left to do.

The same for `atomtx recover` and for `atomtx backup`, which settles its own job's run first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from . import clients, errand, locks, moment, plan, recovery, states
from .errors import (
    AtomtxError,
    BusyError,
    CredentialError,
    EffectError,
    ExitStatus,
    Interrupted,
    JournalError,
    JournalFullError,
    UserError,
    WaitingError,
)
from .executor import Executor, Tell
from .interrupts import Interrupts
from .journal import Change, Journal, NoRunError
from .launching import settings_of
from .probing import client_lives, end_survivors, probe
from .pruning import Pruner
from .records import Run, leaves_a_hook
from .records import status_of as status_of
from .recovery import Decision, Probes, Wish
from .statedir import RunFolder
from .states import Event, Outcome, Verb
from .stepping import Commands, Stepper
from .volumes.kinds import Kinds

LEFT = recovery.LeaveAlone(
    "`atomtx recover` goes on with it when its repository, or its target, is there"
)
_ENDED = recovery.LeaveAlone("it has ended meanwhile")
_NO_COMMANDS = "`atomtx recover` goes on with it"
_COMMAND_S = 90.0  # an ssh whose other end is gone gives up after 75 s
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
        if self.leaves_a_hook:
            return ExitStatus.STEP_AFTER_FAILED
        if isinstance(self.decision, recovery.LeaveAlone | recovery.Adopt):
            return ExitStatus.COMPLETED
        return status_of(self.run)

    @property
    def has_ended_before(self) -> bool:
        """Tell whether nothing was left to settle once nobody else was at work on the run."""
        return self.decision == _ENDED

    @property
    def leaves_a_hook(self) -> bool:
        """Tell whether the run waits for a later `recover`, and the undo of a hook has failed."""
        return self.decision == LEFT and leaves_a_hook(self.run.steps)


class ActiveStepError(WaitingError):
    """A run of steps cannot be gone on with while the run of one is at work: *run* is its id."""

    def __init__(self, whole: Run, run: str) -> None:
        super().__init__(
            f"run {whole.id} ({whole.label}): run {run} of its step is at work in another atomtx",
            hint="once that has ended, `atomtx recover` goes on with the other steps",
        )
        self.run = run


class LivingCommandError(WaitingError):
    """A command of a killed front end does not end: *run* is the id of the run that it is of."""

    run = ""

    @classmethod
    def of(cls, run: Run, command: locks.Process) -> Self:
        """Return the error that names both."""
        made = cls(
            f"run {run.id} ({run.label}) waits for process {command}, whose atomtx was killed",
            hint="such a command is never killed; where a suspended pool keeps it: "
            "`zpool status`, `zpool clear`, then `atomtx recover`",
        )
        made.run = run.id
        return made


class Settler:
    """
    Settles the open runs of a journal.

    *sources* tell where the credentials of a job are now: its key -> variable -> source.
    *commands* carry out the steps of a job that are left; without them such a run waits.
    *told* is called for each run of a step that was settled with its run of steps, before that.
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
        commands: Commands | None = None,
        told: Callable[[Settled], None] = lambda _: None,
    ) -> None:
        self._journal = journal
        self._interrupts = interrupts
        self._tell = tell
        self._rollback = rollback or (patience is Patience.STOP and may_resume)
        self._patience = patience
        self._may_resume = may_resume
        self._sources = sources or {}
        self._commands = commands
        self._told = told

    def settle(self, run: Run) -> Settled:
        """
        Bring one open run to its end, or as far as it can be brought now.

        Raises WaitingError where it must wait, and says for what: LivingCommandError for a command
        that holds lock F and does not end within 90 s, ActiveStepError for the run of a step, any
        other also for what cannot be read or asked now; NoRunError where it has ended and was
        forgotten meanwhile.
        """
        with _seen(run):
            return self._settle(run)

    def _settle(self, run: Run) -> Settled:
        run = self._journal.load(run.id)  # no folder is made for one that was forgotten
        folder = RunFolder.of(self._journal.state, run.id).make()
        stuck = None if self._patience is Patience.LEAVE else self._await_command(folder)
        with front(folder) as lock:
            if lock is None:
                if stuck and locks.holds(stuck.pid, folder.front_lock):
                    raise LivingCommandError.of(run, stuck)
                return Settled(run, recovery.decide(run, Probes(front_alive=True), self._wish()))
            # Somebody may have settled it between our look and our lock, or it has ended itself.
            run = self._journal.load(run.id)
            return Settled(run, _ENDED) if run.is_final else self._settle_locked(run, folder, lock)

    def _await_command(self, folder: RunFolder) -> locks.Process | None:
        """
        Wait for the command of a killed front end: it is never killed, and holds lock F.

        Not for ever, because one in a suspended pool does not end: then it is returned.
        """
        end = time.monotonic() + _COMMAND_S
        told = False
        while locks.is_held(folder.front_lock):
            holders = locks.holders(folder.front_lock)
            if not holders or any(p.command not in locks.COMMANDS for p in holders):
                return None
            if time.monotonic() >= end:
                return holders[0]
            if not told:
                self._tell.step(f"waiting for the end of {holders[0]}, whose atomtx was killed")
                told = True
            self._interrupts.sleep(_LOOK_S)
        return None

    def decide(self, run: Run) -> Decision:
        """Return what `settle` would do first, changing nothing."""
        folder = RunFolder.of(self._journal.state, run.id).make()
        try:
            with front(folder) as lock:
                if lock is None:
                    return recovery.decide(run, Probes(front_alive=True), self._wish())
                run = self._journal.load(run.id)
                if run.is_final:
                    return _ENDED
                decision, probes = self._look(run, folder, Kinds.real(lock))
            # Without lock F, which says that somebody is at work: that may take minutes.
            is_asked = self._wants_client(run, decision)
            return self._ask(run, probes, Kinds.real()) if is_asked else decision
        except EffectError as exc:
            return recovery.Wait(exc.message)
        except OSError as exc:
            return recovery.Wait(str(exc))

    def _wish(self) -> Wish:
        return Wish(rollback=self._rollback, now_us=time.time_ns() // 1000)

    def _look(self, run: Run, folder: RunFolder, kinds: Kinds) -> tuple[Decision, Probes]:
        """Decide by what the machine says, without the client: it counts if no client is wanted."""
        probes, _ = probe(run, folder, kinds)
        decision = recovery.decide(run, probes, self._wish())
        if isinstance(decision, recovery.Resume) and run.verb is Verb.RUN and self._may_resume:
            not_ready = self._commands.not_ready(run) if self._commands else _NO_COMMANDS
            probes = replace(probes, not_ready=not_ready)
            decision = recovery.decide(run, probes, self._wish())
        return decision, probes

    def _wants_client(self, run: Run, decision: Decision) -> bool:
        is_resumed = isinstance(decision, recovery.Resume) and self._may_resume
        return is_resumed and run.verb is Verb.BACKUP

    def _ask(self, run: Run, probes: Probes, kinds: Kinds) -> Decision:
        """Decide by what the client says as well: asking its repository may take minutes."""
        not_ready = self._not_ready(self._updated(run), kinds)
        return recovery.decide(run, replace(probes, not_ready=not_ready), self._wish())

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
        with self._looking(run, folder, executor):
            Kinds.real(lock).mend(run.plan.volumes)
        while not run.is_final:
            if run.verb is Verb.RUN and (left := self._settle_children(run)):
                return left
            with self._looking(run, folder, executor):
                decision, probes = self._look(run, folder, Kinds.real(lock))
                if self._wants_client(run, decision):
                    # What a hook has stopped does not wait for a repository out of reach.
                    run = executor.take_over(run)
                    decision = self._ask(run, probes, Kinds.real(lock))
            if isinstance(decision, recovery.Adopt):
                if self._patience is Patience.LEAVE:
                    return Settled(run, decision)
                self._adopt(run, folder)
            elif isinstance(decision, recovery.EndOrphans):
                try:
                    self._end_orphans(run, folder, Kinds.real(lock))
                except (AtomtxError, OSError):
                    executor.take_over(run)
                    raise
            elif isinstance(decision, recovery.Wait):
                executor.take_over(run)
                raise self._waiting(run, decision)
            elif not self._may_resume and _is_for_later(run, decision):
                return Settled(executor.take_over(run), LEFT)
            else:
                if run.verb is Verb.PRUNE:
                    return Settled(self._prune(run, decision, lock), decision)
                if run.verb is Verb.CLONE:
                    return self._clone(run, decision, lock)
                if run.verb is Verb.RUN:
                    return self._go_on(run, decision)
                run = self._act(executor.take_over(run), decision, executor)
                return Settled(run, decision, executor.interrupted)
        return Settled(run, recovery.RollForward())

    @contextmanager
    def _looking(self, run: Run, folder: RunFolder, executor: Executor) -> Iterator[None]:
        """
        Undo the hooks of a run that cannot be looked at now, but where its client is at work.

        Raises WaitingError for what a command refuses to tell: it may tell it later.
        """
        try:
            yield
        except (AtomtxError, OSError) as exc:
            if not locks.is_held(folder.runner_lock):
                executor.take_over(run)
            if isinstance(exc, EffectError):
                raise self._waiting(run, recovery.Wait(exc.message)) from exc
            raise

    def _settle_children(self, run: Run) -> Settled | None:
        """
        Settle the runs of a run's steps, before it is asked which steps are done.

        What stands in the way of one of them stands in the way of *run*, and is returned.
        """
        for child in self._journal.children(run):
            if child.is_final or child.is_parked:
                continue
            try:
                settled = self.settle(child)
            except (JournalError, Interrupted):
                raise
            except AtomtxError as exc:
                raise _step_waits(run, exc.message, exc.hint) from exc
            if settled.has_ended_before:
                continue
            if isinstance(settled.decision, recovery.LeaveAlone):
                if self._may_resume:
                    raise ActiveStepError(run, child.id)
                return Settled(run, LEFT)  # whoever is at work: the other steps are for later
            if isinstance(settled.decision, recovery.Adopt):
                return replace(settled, run=run)
            self._told(settled)
            if settled.interrupted:
                return replace(settled, run=run)
            if not (settled.run.is_final or settled.run.is_parked):
                hint = f"`atomtx recover` tries again; or `atomtx recover {self._roll_back(child)}`"
                raise _step_waits(run, f"run {child.id}: {settled.run.reason}", hint)
        return None

    def _go_on(self, run: Run, decision: Decision) -> Settled:
        """Carry out the steps that are left, or give the run up."""
        if isinstance(decision, recovery.RollBack):
            self._tell.step(f"giving up run {run.id} ({run.label}): {decision.reason}")
        else:
            self._tell.step(f"resuming run {run.id} ({run.label}) at the step where it was")
        stepper = Stepper(self._journal, self._commands, self._interrupts)
        try:
            if isinstance(decision, recovery.RollBack):
                return Settled(stepper.give_up(run, decision.reason), decision)
            return Settled(stepper.advance(run), decision)
        except JournalFullError as exc:
            raise self._waiting(run, recovery.Wait(exc.message)) from exc
        except Interrupted as exc:
            return Settled(self._journal.load(run.id), decision, exc)

    def _end_orphans(self, run: Run, folder: RunFolder, kinds: Kinds) -> None:
        """End what is left of the run; in a suspended pool no signal is heard."""
        try:
            end_survivors(run, folder, self._tell.warn)
        except EffectError as exc:
            why = kinds.trouble(run.plan.volumes) or exc.message
            raise self._waiting(run, recovery.Wait(why)) from exc

    def _waiting(self, run: Run, decision: recovery.Wait) -> WaitingError:
        probes_blocked = self._rollback or run.state == states.UNMOUNTING
        probes_blocked |= run.verb is Verb.SNAP and run.state == states.SNAPSHOTTED
        probes_blocked |= run.verb is Verb.CLONE
        way_out = f"--abandon {run.id}" if probes_blocked else self._roll_back(run)
        return WaitingError(
            f"run {run.id} ({run.label}) waits: {decision.reason}",
            hint=f"mend that and run `atomtx recover`; or `atomtx recover {way_out}`",
        )

    def _roll_back(self, run: Run) -> str:
        """Return the option that gives a run up, with the open run of which it is a step's."""
        is_of_open = any(each.id == run.of_run for each in self._journal.open_runs())
        return f"--rollback --run {run.of_run}" if is_of_open else "--rollback"

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
                    f"resuming run {run.id} ({run.label}): the same snapshots, {moment.again(run)}"
                )
                run = self._resumed(run, executor)
            case recovery.RollForward():
                if run.state == states.BACKING_UP:
                    run = executor.record_end(run)
            case recovery.RollBack(reason):
                self._tell.step(f"rolling back run {run.id} ({run.label}): {reason}")
                run = executor.give_up(run, Outcome.ROLLED_BACK, reason)
            case _:
                raise AssertionError(decision)
        return executor.advance(run)

    def _resumed(self, run: Run, executor: Executor) -> Run:
        """Have a run begin once more; what stands in its way, as a tree in use, is waited for."""
        try:
            run = executor.resume(self._update(run))
        except EffectError as exc:
            if not executor.is_worth_waiting(run):
                return executor.record_end(run)
            raise self._waiting(run, recovery.Wait(exc.message)) from exc
        executor.mend(run)
        return run

    def _prune(self, run: Run, decision: Decision, lock: int) -> Run:
        assert isinstance(decision, recovery.RollBack)
        self._tell.step(f"giving up run {run.id} ({run.label}): {decision.reason}")
        pruner = Pruner(self._journal, lock, self._interrupts, self._tell.step)
        try:
            return pruner.give_up(run, decision.reason)
        except JournalFullError as exc:
            raise self._waiting(run, recovery.Wait(exc.message)) from exc

    def _clone(self, run: Run, decision: Decision, lock: int) -> Settled:
        """Go on with a clone, or give it up; a target that cannot be reached is waited for."""
        from .cloner import Cloner  # 20 ms that no other recovery need pay
        from .volumes.ends import UnreachableError

        cloner = Cloner(self._journal, lock, self._interrupts, self._tell)
        try:
            if isinstance(decision, recovery.RollBack):
                self._tell.step(f"giving up run {run.id} ({run.label}): {decision.reason}")
                cloner.undo(run)
                return Settled(cloner.give_up(run, decision.reason), decision)
            self._tell.step(f"resuming run {run.id} ({run.label}) with what has arrived")
            return Settled(cloner.advance(run, is_patient=True), decision)
        except (UnreachableError, JournalFullError) as exc:
            raise self._waiting(run, recovery.Wait(exc.message)) from exc
        except Interrupted as exc:
            return Settled(self._journal.load(run.id), decision, exc)


def _step_waits(run: Run, reason: str, hint: str | None) -> WaitingError:
    words = f"run {run.id} ({run.label}): the run of its step waits: {reason}"
    return WaitingError(words, hint=hint)


def _is_for_later(run: Run, decision: Decision) -> bool:
    """Tell whether what is left to do needs the client, its repository or hooks of the end."""
    if run.verb is not Verb.BACKUP:
        return run.verb in (Verb.CLONE, Verb.RUN)
    ends = run.plan.retention or plan.hooks_after(run.plan, None)
    return isinstance(decision, recovery.Resume) or bool(ends)


@contextmanager
def _seen(run: Run) -> Iterator[None]:
    """Wait for what cannot be read or asked now: descriptors are used up, or a disk is bad."""
    try:
        yield
    except OSError as exc:
        raise WaitingError(
            f"run {run.id} ({run.label}) waits: {exc}",
            hint="mend that and run `atomtx recover`",
        ) from exc


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

    Refused where all of them are there: then `recover` can settle it.  Raises WaitingError for what
    cannot be read now, such as the client's own word.
    """
    folder = RunFolder.of(journal.state, run.id).make()
    with _seen(run), front(folder) as lock:
        if lock is None or locks.is_held(folder.runner_lock) or client_lives(run, folder):
            raise BusyError(f"run {run.id} is at work", hint="see `atomtx status`")
        run = journal.load(run.id)
        if run.verb is Verb.PRUNE:
            raise UserError(
                f"run {run.id} destroys kept snapshots",
                hint="`atomtx recover` gives it up, and leaves what is still there",
            )
        if run.verb is Verb.RUN:
            raise UserError(
                f"run {run.id} changes nothing itself: its steps have runs of their own",
                hint=f"abandon those; `atomtx recover --rollback --run {run.id}` gives it up",
            )
        if run.verb is not Verb.CLONE and Kinds.real(lock).trouble(run.plan.volumes) is None:
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
    if run.verb is Verb.SNAP and run.state == states.SNAPSHOTTED:
        with journal.change(run) as change:
            _end_steps(change, run, reason)
            change.set(outcome=Outcome.FAILED.value, reason=reason)
            change.fire(Event.SNAPSHOTS_KEPT, reason=reason)
        return
    if run.verb is Verb.CLONE:
        with journal.change(run) as change:
            _end_steps(change, run, reason)
            change.set(outcome=Outcome.ROLLED_BACK.value, reason=reason)
            change.fire(Event.GIVEN_UP, reason=reason)
        return
    if run.state != states.UNMOUNTING:
        with journal.change(run) as change:
            if end:  # the client's own word stands
                change.result(end)
            else:
                change.set(outcome=Outcome.ROLLED_BACK.value, reason=reason)
            change.fire(Event.GIVEN_UP, reason=reason)
        run = journal.load(run.id)
    with journal.change(run) as change:
        _end_steps(change, run, reason)
        change.set(cleanup=None)
        change.fire(Event.CLEANED_UP, reason=reason)


def _end_steps(change: Change, run: Run, reason: str) -> None:
    for step in run.steps:
        if step.outcome in (None, "parked"):
            change.ended(step, "failed", reason)

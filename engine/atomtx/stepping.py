"""
The steps of a job at work: one after the other, each by the code of its own command.

A run of steps changes nothing itself.  Its lock F is held as long as a step is carried out, in
this same process, so that no step is at work once its front end is gone.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from . import plan, steps
from .errors import DONE, ExitStatus, Interrupted
from .intents import RunStep
from .interrupts import Interrupts
from .journal import Journal
from .names import RunId
from .plan import Plan
from .records import Run, Step
from .states import Event, Outcome, Verb

CONFIG = "ATOMTX_CONFIG"  # in the plan's environment: of which configuration the job is


class Commands(Protocol):
    """How a step is carried out; made by the command line, which knows our commands."""

    def not_ready(self, run: Run) -> str | None:
        """Tell why the steps of an interrupted run cannot be gone on with now."""

    def carry_out(self, run: Run, step: RunStep) -> ExitStatus:
        """Carry out a step of *run* to its end, and return what it exits with."""


def make_plan(job: str, config: str, *, on_stop: str = "undo") -> Plan:
    """Return the plan of a run of the steps of a *job* of the configuration at a path."""
    made = plan.without_client(
        run=str(RunId.new()),
        job=f"run {plan.job_key(job)}",
        label=f"run {job}",
        volumes=(),
        verb=Verb.RUN,
    )
    client = replace(made.client, environment=((CONFIG, config),))
    return replace(made, client=client, on_stop=on_stop)


def config_of(run: Run) -> str:
    """Return the path of the configuration that a run's job is of."""
    return dict(run.plan.client.environment)[CONFIG]


def job_of(run: Run) -> str:
    """Return the name of a run's job."""
    return run.of_job.removeprefix(plan.job_key(""))


def is_backup(run: Run) -> bool:
    """Tell whether a step of a run backs up the run's job."""
    words = [step.intent.words for step in run.steps if isinstance(step.intent, RunStep)]
    return any(steps.is_backup_of(each, job_of(run)) for each in words)


def intents(words: Sequence[tuple[str, ...]]) -> tuple[RunStep, ...]:
    """Return the steps of a new run, all of which are journaled with it."""
    return tuple(RunStep(n, each) for n, each in enumerate(words, start=1))


class Stepper:
    """One front end's work on one run."""

    def __init__(
        self,
        journal: Journal,
        commands: Commands | None,
        interrupts: Interrupts,
    ) -> None:
        self._journal = journal
        self._commands = commands
        self._interrupts = interrupts

    def advance(self, run: Run) -> Run:
        """
        Carry out the steps that are left, and end the run.

        After a step that failed the others are not begun.  After a signal the run is given up, but
        where the run of a step is kept for a recovery, or the plan says so of SIGTERM: then this
        one is left open as well.  Interrupted is raised once that is journaled.
        """
        try:
            while todo := steps.to_do(run):
                self._interrupts.stop()
                run = self._step(run, todo[0])
            if steps.failed(run):
                self._interrupts.stop()
        except Interrupted as exc:
            self._stop(self._journal.load(run.id), exc)
            raise
        return self._end(run)

    def _stop(self, run: Run, exc: Interrupted) -> None:
        if not (_is_kept(run, exc.signum) or self._open(run)):
            self.give_up(run, exc.message)
            return
        with self._journal.change(run) as change:
            change.set(reason=f"{exc.message}: `atomtx recover` goes on at the step where it was")

    def _step(self, run: Run, step: Step) -> Run:
        assert isinstance(step.intent, RunStep)
        n, words = step.intent.n, step.intent.words
        status = steps.ended_by(words, self._journal.children(run, n))
        if status is None:
            status = self._carry_out(run, step.intent)
        outcome = "done" if status in DONE else "failed"
        detail = steps.detail(status, self._journal.children(run, n))
        with self._journal.change(run) as change:
            change.ended(step, outcome, detail)
        return self._journal.load(run.id)

    def _carry_out(self, run: Run, step: RunStep) -> ExitStatus:
        """Carry a step out; raise Interrupted where a recovery is to go on with it."""
        assert self._commands, "they are needed by all but `give_up`"
        status = self._commands.carry_out(run, step)
        signum = self._interrupts.noted
        if signum is None:
            return status
        # It may have ended well before it saw the signal.
        known = steps.ended_by(step.words, self._journal.children(run, step.n))
        is_done = known is not None or status in DONE
        if self._open(run) or (not is_done and _is_kept(run, signum)):
            self._interrupts.stop()
        return status if known is None else known

    def _open(self, run: Run) -> bool:
        """Tell whether the run of a step is to be gone on with by a recovery."""
        made = self._journal.children(run)
        return any(not (child.is_final or child.is_parked) for child in made)

    def _end(self, run: Run) -> Run:
        outcome, reason = steps.verdict(run)
        with self._journal.change(run) as change:
            for step in run.pending(RunStep):
                change.ended(step, "not-needed")
            change.set(outcome=outcome.value, reason=reason)
            change.fire(Event.STEPS_ENDED, reason=reason)
        return self._journal.load(run.id)

    def give_up(self, run: Run, reason: str) -> Run:
        """End the run; what its steps have done stays, and no other is begun."""
        with self._journal.change(run) as change:
            for step in run.pending(RunStep):
                change.ended(step, "not-needed")
            words = f"{reason}{steps.not_run(run)}"
            change.set(outcome=Outcome.ROLLED_BACK.value, reason=words)
            change.fire(Event.GIVEN_UP, reason=reason)
        return self._journal.load(run.id)


def _is_kept(run: Run, signum: int) -> bool:
    """Tell whether a signal leaves a run for later: SIGTERM, where its plan says so."""
    return run.plan.on_stop == "keep" and signum == signal.SIGTERM

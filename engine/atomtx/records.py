"""The journal's rows as plain values, for those who decide and those who show.  Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from .errors import ExitStatus, worst
from .intents import AFTER, ApplyRetention, Intent, RunClient, RunHook, RunStep, UndoHook
from .names import PLAIN
from .plan import Plan
from .states import FINAL, UNMOUNTING, Outcome, Verb

_STATUS = re.compile(r"exit status (\d+)")


class Content(IntEnum):
    """What the root of a volume was seen to hold."""

    ENTRIES = 0  # what versions wrote that took an empty lost+found for a file
    EMPTY = 1
    BARE = 2  # nothing but an empty lost+found
    FILES = 3

    @property
    def is_empty(self) -> bool:
        return self in (Content.EMPTY, Content.BARE)


@dataclass(frozen=True)
class Volume:
    """
    A volume of a run; *guid* and *createtxg* are None until they were read back.

    One that *stays* was there before the run: its guid and createtxg are those of the plan.
    """

    n: int
    kind: str
    pool: str
    pool_guid: str
    name: str
    mountpoint: str
    snapshot: str
    guid: str | None
    createtxg: str | None
    stays: bool = False


@dataclass(frozen=True)
class Step:
    """An intent and, once known, its outcome ("done", "failed", "not-needed" or "parked")."""

    id: int
    attempt: int
    intent: Intent
    compensates: int | None
    outcome: str | None
    detail: str | None = None

    @property
    def status(self) -> ExitStatus | None:
        """What the command exited with that a step of a job is; None where it has not ended."""
        # A program of the user's, of which the detail of a hook tells, has statuses of its own.
        found = _STATUS.match(self.detail or "") if isinstance(self.intent, RunStep) else None
        return ExitStatus(int(found[1])) if found else None

    @property
    def has_failed_after(self) -> bool:
        """Tell whether it failed, and is one of those that do not decide about the backup."""
        if self.outcome != "failed":
            return False
        if isinstance(self.intent, RunHook):
            return self.intent.when in AFTER
        return isinstance(self.intent, UndoHook | ApplyRetention)


@dataclass(frozen=True)
class Run:
    """One run as the journal has it at revision *rev*."""

    id: str
    job: str
    label: str
    state: str
    rev: int
    outcome: str | None
    cleanup: str | None
    reason: str | None
    attempts: int
    plan: Plan
    moment_at: int | None  # microseconds since the epoch
    started_at: int
    boot_id: str
    pid: int
    volumes: tuple[Volume, ...]
    steps: tuple[Step, ...]

    @property
    def verb(self) -> Verb:
        return Verb(self.plan.verb)

    @property
    def of_job(self) -> str:
        """The job's key, which backups, snaps, prunes and unsnaps of a job have in common."""
        if self.verb is Verb.BACKUP:
            return self.job
        return self.job.removeprefix(f"{self.verb} ").removeprefix("unsnap ")

    @property
    def of_run(self) -> str:
        """The id of the run of steps that this one is made by; empty for none."""
        return self.plan.parent.partition("/")[0]

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def is_parked(self) -> bool:
        return self.cleanup is not None

    @property
    def frozen(self) -> tuple[Volume, ...]:
        """The volumes that have a snapshot: all but those that are read live."""
        return tuple(volume for volume in self.volumes if volume.kind != PLAIN)

    @property
    def read_live(self) -> tuple[str, ...]:
        """Where the volumes are seen that are not a moment."""
        return tuple(volume.mountpoint for volume in self.volumes if volume.kind == PLAIN)

    @property
    def failed_after(self) -> tuple[Step, ...]:
        """The hooks and other steps that failed, of those that do not decide about the backup."""
        return tuple(step for step in self.steps if step.has_failed_after)

    @property
    def failures(self) -> int:
        """How many attempts ended by themselves, and failed: one that was interrupted has not."""
        return sum(isinstance(s.intent, RunClient) and s.outcome == "failed" for s in self.steps)

    @property
    def step_statuses(self) -> tuple[ExitStatus, ...]:
        """What the steps of a job exited with, of those that have ended."""
        return _statuses(self.steps)

    def pending(self, kind: type[Intent]) -> tuple[Step, ...]:
        """Return the steps of a kind that have no outcome yet, or were parked."""
        return tuple(
            step
            for step in self.steps
            if isinstance(step.intent, kind) and step.outcome in (None, "parked")
        )


def status_of(run: Run) -> ExitStatus:
    """Return the exit status of a run as it stands."""
    return status(run.verb, run.state, run.outcome, run.steps, is_parked=run.is_parked)


def status(
    verb: Verb, state: str, outcome: str | None, steps: Sequence[Step], *, is_parked: bool
) -> ExitStatus:
    """Return the exit status of a run that stands so, of which these are the *steps*."""
    if outcome in (Outcome.FAILED, None) and (state in FINAL or state == UNMOUNTING):
        return ExitStatus.FAILED
    if outcome is None:
        return ExitStatus.WAITING
    if verb is Verb.RUN and outcome in (Outcome.COMPLETED, Outcome.PARTIAL):
        return worst(_statuses(steps))
    if outcome == Outcome.PARTIAL:
        return ExitStatus.PARTIAL
    if outcome == Outcome.COMPLETED and any(step.has_failed_after for step in steps):
        return ExitStatus.STEP_AFTER_FAILED
    if outcome == Outcome.ROLLED_BACK and leaves_a_hook(steps):
        return ExitStatus.STEP_AFTER_FAILED
    return ExitStatus.PARKED if is_parked else ExitStatus.COMPLETED


def leaves_a_hook(steps: Sequence[Step]) -> bool:
    """Tell whether the last undo of some hook has failed: what it stopped may be stopped still."""
    undone = (step for step in steps if isinstance(step.intent, UndoHook))
    last = {step.intent: step.outcome for step in undone if step.outcome in ("done", "failed")}
    return "failed" in last.values()


def _statuses(steps: Sequence[Step]) -> tuple[ExitStatus, ...]:
    return tuple(step.status for step in steps if step.status is not None)

"""The journal's rows as plain values, for those who decide and those who show.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .intents import AFTER, ApplyRetention, Intent, RunHook, UndoHook
from .plan import Plan


@dataclass(frozen=True)
class Volume:
    """A volume of a run; *guid* and *createtxg* are None until they were read back."""

    n: int
    kind: str
    pool: str
    pool_guid: str
    name: str
    mountpoint: str
    snapshot: str
    guid: str | None
    createtxg: str | None


@dataclass(frozen=True)
class Step:
    """An intent and, once known, its outcome ("done", "failed", "not-needed" or "parked")."""

    id: int
    attempt: int
    intent: Intent
    compensates: int | None
    outcome: str | None


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
    def is_parked(self) -> bool:
        return self.cleanup is not None

    @property
    def failed_after(self) -> tuple[Step, ...]:
        """The hooks and other steps that failed, of those that do not decide about the backup."""
        return tuple(
            step
            for step in self.steps
            if step.outcome == "failed"
            and (
                isinstance(step.intent, UndoHook | ApplyRetention)
                or (isinstance(step.intent, RunHook) and step.intent.when in AFTER)
            )
        )

    def pending(self, kind: type[Intent]) -> tuple[Step, ...]:
        """Return the steps of a kind that have no outcome yet, or were parked."""
        return tuple(
            step
            for step in self.steps
            if isinstance(step.intent, kind) and step.outcome in (None, "parked")
        )

"""
Judge whether a job's backups are as fresh as they should be.  Pure.

The levels are those of the monitoring plug-ins that Nagios began with.  A backup's age counts
from its moment, that of the snapshots, not from its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from .history import Job, Run
from .task import span
from .words import age

CLOCK_SLACK_S = 60.0  # a clock that is set by the network is moved by less


class Level(IntEnum):
    """How a job is; the exit status of `atomtx check`."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True)
class Limits:
    """From which age on, in seconds, a job's last completed backup is too old."""

    critical_s: int
    warning_s: int | None = None


@dataclass(frozen=True)
class Verdict:
    """How a job is, and each reason, the gravest first."""

    job: Job
    level: Level
    reasons: tuple[str, ...]
    age_s: float | None  # None where nothing completed, and where its moment is in the future
    is_idle: bool  # it is too old, and no run was begun since it became so

    @property
    def words(self) -> str:
        return ", ".join(self.reasons)


def is_regular(job: Job) -> bool:
    """Tell whether a job is one that is made again and again: it ran twice."""
    return job.times > 1


def judge(job: Job, limits: Limits | None, situations: Mapping[str, str], now: datetime) -> Verdict:
    """
    Return how a job is.

    *situations* tell by run id how each open run stands, in the words of `cli.status.situation`.
    Without *limits* a job is judged by its open runs alone.
    """
    age_s = _age(job.completed, now)
    found: list[_Reason | None] = [_of_open(run, situations[run.id]) for run in job.open]
    if limits is not None:
        found += [_of_last(job, now), _of_age(job, age_s, limits, now)]
    reasons = sorted(filter(None, found), key=lambda each: -each[0])
    level = max((level for level, _ in reasons), default=Level.OK)
    known = age_s if age_s is not None and age_s >= 0 else None
    is_idle = limits is not None and _is_idle(job, age_s, limits, now)
    return Verdict(job, level, tuple(words for _, words in reasons), known, is_idle)


def _is_idle(job: Job, age_s: float | None, limits: Limits, now: datetime) -> bool:
    """Tell whether nobody even tries: its timer is off, or it was given up."""
    is_fresh = age_s is not None and age_s <= limits.critical_s
    return not is_fresh and (now - job.newest.started_at).total_seconds() > limits.critical_s


_Reason = tuple[Level, str]


def _age(run: Run | None, now: datetime) -> float | None:
    """Return the age of a run's moment; 0 where the clock was set back by a trifle."""
    if run is None:
        return None
    seconds = (now - _moment(run)).total_seconds()
    return 0.0 if -CLOCK_SLACK_S <= seconds < 0 else seconds


def _moment(run: Run) -> datetime:
    return run.moment_at or run.started_at


def _of_age(job: Job, age_s: float | None, limits: Limits, now: datetime) -> _Reason:
    if job.completed is None:
        return Level.CRITICAL, "never completed"
    assert age_s is not None
    if age_s < 0:
        ahead = age(now, _moment(job.completed))
        return Level.WARNING, f"completed {ahead} in the future: was the clock set back?"
    ago = _ago(_moment(job.completed), now)
    if age_s > limits.critical_s:
        return Level.CRITICAL, f"last completed {ago}, over {span(limits.critical_s)}"
    if limits.warning_s is not None and age_s > limits.warning_s:
        return Level.WARNING, f"last completed {ago}, over {span(limits.warning_s)}"
    return Level.OK, f"completed {ago}"


def _of_last(job: Job, now: datetime) -> _Reason | None:
    """Tell of the last run that ended, where it did not complete, or a step after it failed."""
    run = job.ended
    if run is None or (run.outcome == "completed" and not run.failed_after):
        return None
    if run.failed_after:
        words = f"a step after the last backup failed {_ago(_moment(run), now)}"
        return Level.WARNING, f"{words} (`atomtx show {run.id[:8]}`)"
    how = {"partial": "was partial", "rolled-back": "was rolled back"}.get(
        run.outcome or "", "failed"
    )
    why = f": {run.reason}" if run.reason else ""
    when = _ago(_moment(run), now)
    return Level.WARNING, f"the last run {how} {when}{why} (`atomtx show {run.id[:8]}`)"


def _of_open(run: Run, situation: str) -> _Reason | None:
    match situation:
        case "ended":  # since it was listed
            return None
        case "parked":
            words = f"the cleanup of run {run.id[:8]} is parked"
        case "orphaned":
            words = f"run {run.id[:8]} has lost its front end"
        case "interrupted":
            words = f"run {run.id[:8]} was interrupted"
        case _:
            return Level.OK, f"run {run.id[:8]} is at work"
    return Level.WARNING, f"{words} (`atomtx recover`)"


def _ago(then: datetime, now: datetime) -> str:
    words = age(then, now)
    return "just now" if words == "now" else f"{words} ago"

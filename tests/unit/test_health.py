"""Whether backups are fresh: every outcome, the ages around each limit, a clock set back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.health import CLOCK_SLACK_S, Level, Limits, is_regular, judge
from atomtx.history import Job, Run

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
HOUR_S = 3600
LIMITS = Limits(critical_s=26 * HOUR_S, warning_s=25 * HOUR_S)


def a_run(hours_ago: float, outcome: str | None = "completed", **values: Any) -> Run:
    """Return a run whose moment was *hours_ago*, and whose end came an hour later."""
    moment = NOW - timedelta(hours=hours_ago)
    facts: dict[str, Any] = {
        "id": "7f3c12ab34cd56ef",
        "verb": "backup",
        "job": "key",
        "label": "home",
        "state": "destroyed",
        "outcome": outcome,
        "cleanup": None,
        "reason": None,
        "attempts": 1,
        "client": "restic",
        "repository": "4ad4a8e1c0",
        "moment_at": moment,
        "started_at": moment - timedelta(minutes=1),
        "ended_at": moment + timedelta(hours=1),
        "boot_id": "boot",
        "pid": 42,
        "bytes_added": None,
        "bytes_processed": None,
        "files_processed": None,
        "backup_ids": (),
        "not_a_moment": (),
    }
    return Run(**facts | values)


def a_job(*, completed: Run | None, ended: Run | None = None, **values: Any) -> Job:
    """Return a job; *ended* is its last run with an outcome, that which completed by default."""
    ended = ended or completed
    newest = values.get("open", ())[-1:] or (ended,)
    facts: dict[str, Any] = {
        "label": "home",
        "client": "restic",
        "repository": "4ad4a8e1c0",
        "keys": frozenset(["key"]),
        "times": 2,
        "newest": newest[0],
        "ended": ended,
        "completed": completed,
        "open": (),
    }
    return Job(**facts | values)


def level(job: Job, limits: Limits | None = LIMITS, situation: str = "running") -> Level:
    return judge(job, limits, {run.id: situation for run in job.open}, NOW).level


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, Level.OK),
        (25 * HOUR_S, Level.OK),
        (25 * HOUR_S + 1, Level.WARNING),
        (26 * HOUR_S, Level.WARNING),
        (26 * HOUR_S + 1, Level.CRITICAL),
        (10_000 * HOUR_S, Level.CRITICAL),
    ],
)
def test_limits(seconds: int, expected: Level) -> None:
    """An age is judged by each limit; one that is just reached is not passed."""
    assert level(a_job(completed=a_run(seconds / HOUR_S))) is expected


def test_no_warning_limit() -> None:
    """Without --warn-age the one limit is --max-age."""
    assert level(a_job(completed=a_run(25.9)), Limits(26 * HOUR_S)) is Level.OK
    assert level(a_job(completed=a_run(26.1)), Limits(26 * HOUR_S)) is Level.CRITICAL


def test_moment_counts() -> None:
    """The age is that of the moment: a backup that took a week is a week old at its end."""
    run = a_run(7 * 24, ended_at=NOW)
    verdict = judge(a_job(completed=run), LIMITS, {}, NOW)
    assert verdict.level is Level.CRITICAL
    assert verdict.age_s == 7 * 24 * HOUR_S


def test_no_moment() -> None:
    """Where the moment is not known the run's start counts, which was earlier."""
    verdict = judge(a_job(completed=a_run(3, moment_at=None)), LIMITS, {}, NOW)
    assert verdict.age_s == 3 * HOUR_S + 60


@pytest.mark.parametrize(
    ("outcome", "words"),
    [("failed", "failed"), ("partial", "was partial"), ("rolled-back", "was rolled back")],
)
def test_last_run(outcome: str, words: str) -> None:
    """Fresh, but the last run did not complete: a warning that says why, and what to type."""
    ended = a_run(1, outcome, reason="repository is locked")
    verdict = judge(a_job(completed=a_run(2), ended=ended), LIMITS, {}, NOW)
    assert verdict.level is Level.WARNING
    assert verdict.words == (
        f"the last run {words} 1 h ago: repository is locked (`atomtx show 7f3c12ab`), "
        "completed 2 h ago"
    )
    assert level(a_job(completed=a_run(27), ended=ended)) is Level.CRITICAL


@pytest.mark.parametrize("outcome", ["failed", "partial", "rolled-back"])
def test_never_completed(outcome: str) -> None:
    """What never completed is critical, however new its last run is; a partial one is none."""
    verdict = judge(a_job(completed=None, ended=a_run(0, outcome)), LIMITS, {}, NOW)
    assert verdict.level is Level.CRITICAL
    assert verdict.reasons[0] == "never completed"
    assert verdict.age_s is None


@pytest.mark.parametrize(
    ("situation", "cleanup", "expected", "words"),
    [
        ("running", None, Level.OK, "is at work"),
        ("running", "parked", Level.OK, "is at work"),
        ("interrupted", None, Level.WARNING, "was interrupted (`atomtx recover`)"),
        ("orphaned", None, Level.WARNING, "has lost its front end (`atomtx recover`)"),
        ("parked", "parked", Level.WARNING, "is parked (`atomtx recover`)"),
    ],
)
def test_open_run(situation: str, cleanup: str | None, expected: Level, words: str) -> None:
    """A run that nobody is at work on is a warning, with what to type; a living one is none."""
    run = a_run(0, None, state="unmounting", cleanup=cleanup)
    job = a_job(completed=a_run(1), open=(run,))
    verdict = judge(job, LIMITS, {run.id: situation}, NOW)
    assert verdict.level is expected
    assert words in verdict.words
    # Without limits what is open counts all the same, and nothing else does.
    alone = judge(a_job(completed=a_run(99), open=(run,)), None, {run.id: situation}, NOW)
    assert alone.level is expected
    assert len(alone.reasons) == 1


def test_future() -> None:
    """A moment in the future has no age: the clock was set back, and that is said."""
    verdict = judge(a_job(completed=a_run(-3)), LIMITS, {}, NOW)
    assert verdict.level is Level.WARNING
    assert verdict.words == "completed 3 h in the future: was the clock set back?"
    assert verdict.age_s is None


@pytest.mark.parametrize(
    ("completed", "begun", "is_idle"),
    [(99, 99, True), (99, 27, True), (99, 1, False), (1, 1, False), (None, 99, True)],
)
def test_idle(completed: float | None, begun: float, is_idle: bool) -> None:
    """What is too old, and of which no run was begun since, may have been given up."""
    whole = None if completed is None else a_run(completed)
    job = a_job(completed=whole, ended=a_run(begun, "failed"), newest=a_run(begun))
    assert judge(job, LIMITS, {}, NOW).is_idle is is_idle
    assert not judge(job, None, {}, NOW).is_idle


def test_step_after() -> None:
    """A backup stands, but what failed after it is worth a look: a repository may fill up."""
    run = a_run(3, failed_after=True)
    verdict = judge(a_job(completed=run), LIMITS, {}, NOW)
    assert verdict.level is Level.WARNING
    assert verdict.reasons == (
        "a step after the last backup failed 3 h ago (`atomtx show 7f3c12ab`)",
        "completed 3 h ago",
    )


def test_clock_slack() -> None:
    """A clock that the network sets by a second alarms nobody."""
    verdict = judge(a_job(completed=a_run(-CLOCK_SLACK_S / HOUR_S)), LIMITS, {}, NOW)
    assert (verdict.level, verdict.age_s) == (Level.OK, 0.0)
    assert level(a_job(completed=a_run((-CLOCK_SLACK_S - 1) / HOUR_S))) is Level.WARNING


def test_one_off() -> None:
    """A job that ran once is no regular one; two runs make it one."""
    assert not is_regular(a_job(completed=a_run(1), times=1))
    assert is_regular(a_job(completed=a_run(1), times=2))


@given(
    age_s=st.integers(-(10**7), 10**7),
    critical_s=st.integers(0, 10**6),
    warning_s=st.none() | st.integers(0, 10**6),
    last=st.sampled_from(["completed", "failed", "partial", "rolled-back"]),
    situation=st.none() | st.sampled_from(["running", "interrupted", "orphaned", "parked"]),
)
def test_any(
    age_s: int, critical_s: int, warning_s: int | None, last: str, situation: str | None
) -> None:
    """OK is said only of a fresh backup whose job left nothing; critical of nothing fresh."""
    completed = a_run(age_s / HOUR_S)
    ended = completed if last == "completed" else a_run(0, last)
    runs = (a_run(0, None, state="mounted"),) if situation else ()
    job = a_job(completed=completed, ended=ended, open=runs)
    found = judge(job, Limits(critical_s, warning_s), {run.id: str(situation) for run in runs}, NOW)
    assert (found.level is Level.CRITICAL) == (age_s > critical_s)
    if found.level is Level.OK:
        assert -CLOCK_SLACK_S <= age_s <= critical_s
        assert warning_s is None or age_s <= warning_s
        assert last == "completed"
        assert situation in (None, "running")
    assert found.reasons

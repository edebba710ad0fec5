"""
What to do with an open run: rows and probes in, a decision out.  Pure.

The machine is asked, never the journal about the machine (promise 3), and "not yet" is not "no"
(promise 14): a roll-back needs a proof or the user's word, everything else waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from . import states
from .records import Run, Volume
from .states import Outcome, Verb

MAX_ATTEMPTS = 5


class Presence(Enum):
    """What a probe says of one snapshot."""

    OURS = "ours"
    ABSENT = "absent"  # in a pool that is imported and is the same pool
    FOREIGN = "foreign"  # something else has the name
    BROKEN = "broken"  # ours, and not whole: of no use, and to be destroyed


@dataclass(frozen=True)
class Ended:
    """The runner's durable record of how the client's work ended."""

    outcome: Outcome
    reason: str | None
    retriable: bool
    stopped: bool  # from outside, as a shutdown does; `atomtx stop` is another thing


@dataclass(frozen=True)
class Probes:
    """What the machine says about a run, all looked at after lock F was tried."""

    front_alive: bool = False  # somebody else holds F
    runner_alive: bool = False  # somebody holds R
    client_alive: bool = False  # somebody holds C, or lives in the run's namespace
    ended: Ended | None = None  # of the newest attempt
    snapshots: Mapping[str, Presence] = ()  # type: ignore[assignment]
    equal_createtxg: bool = True  # of all snapshots of each pool
    trouble: str | None = None  # why a pool cannot be asked: not imported, suspended
    not_ready: str | None = None  # why the client cannot run now: a key, a repository, a secret


@dataclass(frozen=True)
class Wish:
    """What the user asked of recovery."""

    rollback: bool = False  # undo instead of resuming
    now_us: int = 0


@dataclass(frozen=True)
class LeaveAlone:
    reason: str


@dataclass(frozen=True)
class Adopt:
    """The runner lives: wait for the client's end, then decide again."""


@dataclass(frozen=True)
class EndOrphans:
    """Processes of the run live without a runner: end them, then decide again."""


@dataclass(frozen=True)
class Resume:
    """Run the client again on the same snapshots."""


@dataclass(frozen=True)
class RollForward:
    """The client's end is known: record it, if it was not yet, and clean up."""


@dataclass(frozen=True)
class RollBack:
    reason: str


@dataclass(frozen=True)
class Wait:
    reason: str


Decision = LeaveAlone | Adopt | EndOrphans | Resume | RollForward | RollBack | Wait


def decide(run: Run, probes: Probes, wish: Wish) -> Decision:
    """Return what to do next with an open run."""
    if probes.front_alive:
        return LeaveAlone("another atomtx is at work on it")
    if probes.runner_alive:
        return Adopt()
    if probes.client_alive:
        return EndOrphans()
    if run.verb is Verb.PRUNE:
        # Not gone on with: what was to stay may be gone since, and the next one decides anew.
        return RollBack("at the user's word" if wish.rollback else "it was interrupted")
    if run.verb is Verb.CLONE:
        return _of_clone(probes, wish)
    if run.verb is Verb.RUN:
        return _of_steps(probes, wish)
    if run.verb is Verb.SNAP and run.state == states.SNAPSHOTTED:
        return Wait(probes.trouble) if probes.trouble else RollForward()
    if run.state == states.UNMOUNTING:
        return Wait(probes.trouble) if probes.trouble else RollForward()
    if run.state == states.BACKING_UP and probes.ended:
        return _after_end(run, probes.ended, probes, wish)
    return _unfinished(run, probes, wish)


def _of_clone(probes: Probes, wish: Wish) -> Decision:
    """Go on with what has arrived, as often as it takes: nothing is sent twice."""
    if probes.trouble:
        return Wait(probes.trouble)
    return RollBack("at the user's word") if wish.rollback else Resume()


def _of_steps(probes: Probes, wish: Wish) -> Decision:
    """Go on with the steps that are left; the runs of the others were settled before."""
    if wish.rollback:
        return RollBack("at the user's word")
    return Wait(probes.not_ready) if probes.not_ready else Resume()


def _after_end(run: Run, ended: Ended, probes: Probes, wish: Wish) -> Decision:
    if ended.outcome is Outcome.FAILED and wish.rollback and not probes.trouble:
        return RollBack(f"at the user's word: {ended.reason or 'the client failed'}")
    failures = run.failures + 1  # this one is not recorded yet
    is_patient = within_patience(run, wish.now_us, failures=failures)
    worth = ended.stopped or (ended.retriable and is_patient)
    again = ended.outcome is Outcome.FAILED and worth
    return _unfinished(run, probes, wish) if again else RollForward()


def within_patience(run: Run, now_us: int, *, failures: int) -> bool:
    """Tell whether a moment is still worth keeping after a client that failed so often."""
    plan = run.plan
    if failures <= plan.retries:
        return True
    since = run.moment_at or run.started_at
    return plan.keep_for_s > 0 and now_us < since + plan.keep_for_s * 1_000_000


def _unfinished(run: Run, probes: Probes, wish: Wish) -> Decision:
    if probes.trouble:
        return Wait(probes.trouble)
    if wish.rollback:
        return RollBack("at the user's word")
    lost = [v for v in run.frozen if probes.snapshots[v.snapshot] is not Presence.OURS]
    if lost:
        return RollBack(_loss(run, lost, probes))
    if not probes.equal_createtxg:
        return RollBack("the snapshots are not of one moment")
    is_patient = within_patience(run, wish.now_us, failures=run.failures)
    if run.state == states.SNAPSHOTTED and run.reason and not is_patient:
        return RollBack(f"the client failed for too long: {run.reason}")
    if run.attempts >= MAX_ATTEMPTS + run.plan.retries:
        return RollBack(f"the client was interrupted {run.attempts} times")
    return Wait(probes.not_ready) if probes.not_ready else Resume()


def _loss(run: Run, lost: list[Volume], probes: Probes) -> str:
    if run.state == states.PLANNED and not run.plan.is_of_kept:
        return "it was interrupted before its snapshots were taken"
    first = lost[0].snapshot
    what = {
        Presence.ABSENT: "is gone",
        Presence.BROKEN: "is not whole: it overflowed, or was never finished",
    }.get(
        probes.snapshots[first],
        "is another one now" if run.plan.is_of_kept else "is not the one that we took",
    )
    more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"{first} {what}{more}"

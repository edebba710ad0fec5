"""The decision about an interrupted run: a pure function of the journal and the machine."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import recovery, states
from atomtx.intents import AROUND_RUN, RunClient, RunHook
from atomtx.plan import Existing
from atomtx.records import Run, Step
from atomtx.recovery import (
    MAX_ATTEMPTS,
    Adopt,
    Decision,
    Ended,
    EndOrphans,
    LeaveAlone,
    Presence,
    Probes,
    Resume,
    RollBack,
    RollForward,
    Wait,
    Wish,
    within_patience,
)
from atomtx.states import Outcome, Verb
from tests.runs import a_plan, a_run

OPEN = tuple(state for state in states.STATES if state not in states.FINAL)
FIRST, SECOND = (volume.snapshot for volume in a_plan().volumes)
ALL_OURS = {FIRST: Presence.OURS, SECOND: Presence.OURS}
EXPORTED = "pool tank is not imported"
SECOND_US = 1_000_000

COMPLETED = Ended(Outcome.COMPLETED, None, retriable=False, stopped=False)
PARTIAL = Ended(Outcome.PARTIAL, "unreadable", retriable=False, stopped=False)
FAILED = Ended(Outcome.FAILED, "disk full", retriable=False, stopped=False)
NETWORK = Ended(Outcome.FAILED, "timeout", retriable=True, stopped=False)
SHUTDOWN = Ended(Outcome.FAILED, "killed", retriable=False, stopped=True)
ENDS = (COMPLETED, PARTIAL, FAILED, NETWORK, SHUTDOWN)

ADOPT, END_ORPHANS, RESUME, FORWARD = Adopt(), EndOrphans(), Resume(), RollForward()
TROUBLE = Wait(EXPORTED)
BY_WORD = RollBack("at the user's word")
INTERRUPTED = RollBack("it was interrupted")
GONE = RollBack(f"{FIRST} is gone")
FOREIGN = RollBack(f"{SECOND} is not the one that we took")
NOT_TAKEN = RollBack("it was interrupted before its snapshots were taken")
TORN = RollBack("the snapshots are not of one moment")
LOCKED = Wait("the key is not loaded")


def run_in(state: str, attempts: int = 1) -> Run:
    attempts = 0 if state == states.PLANNED else attempts
    return a_run(state=state, attempts=attempts)


def probes(**values: object) -> Probes:
    """What is seen of a run that died alone, with its snapshots in place."""
    return replace(Probes(snapshots=ALL_OURS), **values)  # type: ignore[arg-type]


WHOLE = probes()
IN_TROUBLE = probes(snapshots={}, trouble=EXPORTED)
LOST = probes(snapshots=ALL_OURS | {FIRST: Presence.ABSENT})
SWAPPED = probes(snapshots=ALL_OURS | {SECOND: Presence.FOREIGN})
NONE_TAKEN = probes(snapshots=dict.fromkeys(ALL_OURS, Presence.ABSENT))
SKEWED = probes(equal_createtxg=False)
UNREADY = probes(not_ready=LOCKED.reason)


# -- who lives (promise 6) -------------------------------------------------------------------

LIVES = [
    (front, runner, client)
    for front, runner, client in product((True, False), repeat=3)
    if front or runner or client
]


@pytest.mark.parametrize("state", OPEN)
@pytest.mark.parametrize(("front", "runner", "client"), LIVES)
@pytest.mark.parametrize("rollback", [False, True])
def test_living(state: str, front: bool, runner: bool, client: bool, rollback: bool) -> None:
    """
    Promise 6: F held, leave alone; R held, adopt; only C held, end the orphans.

    Whatever else is seen, and whatever the user wishes.
    """
    for seen in (WHOLE, IN_TROUBLE, LOST, SKEWED, *(probes(ended=end) for end in ENDS)):
        alive = replace(seen, front_alive=front, runner_alive=runner, client_alive=client)
        decision = recovery.decide(run_in(state), alive, Wish(rollback=rollback))
        expected = (
            LeaveAlone("another atomtx is at work on it")
            if front
            else (ADOPT if runner else END_ORPHANS)
        )
        assert decision == expected


# -- the table -------------------------------------------------------------------------------

# What is seen -> the decision in (planned, snapshotted, mounted, backing-up, unmounting), and
# what it is where the user wished a roll-back.
TABLE: dict[str, tuple[Probes, tuple[Decision, ...], tuple[Decision, ...]]] = {
    "whole": (WHOLE, (RESUME,) * 4 + (FORWARD,), (BY_WORD,) * 4 + (FORWARD,)),
    "pool away": (IN_TROUBLE, (TROUBLE,) * 5, (TROUBLE,) * 5),
    "one gone": (LOST, (NOT_TAKEN, GONE, GONE, GONE, FORWARD), (BY_WORD,) * 4 + (FORWARD,)),
    "none there": (
        NONE_TAKEN,
        (NOT_TAKEN, *(RollBack(f"{FIRST} is gone, and 1 more"),) * 3, FORWARD),
        (BY_WORD,) * 4 + (FORWARD,),
    ),
    "one foreign": (
        SWAPPED,
        (NOT_TAKEN, FOREIGN, FOREIGN, FOREIGN, FORWARD),
        (BY_WORD,) * 4 + (FORWARD,),
    ),
    "two moments": (SKEWED, (TORN,) * 4 + (FORWARD,), (BY_WORD,) * 4 + (FORWARD,)),
    "key away": (UNREADY, (LOCKED,) * 4 + (FORWARD,), (BY_WORD,) * 4 + (FORWARD,)),
}
ROWS = [
    pytest.param(state, seen, wish, decision, id=f"{name}-{state}{'-rollback' * wish}")
    for name, (seen, as_is, undone) in TABLE.items()
    for wish, decisions in ((False, as_is), (True, undone))
    for state, decision in zip(OPEN, decisions, strict=True)
]


@pytest.mark.parametrize(("state", "seen", "rollback", "decision"), ROWS)
def test_table(state: str, seen: Probes, rollback: bool, decision: Decision) -> None:
    """
    Section 3 and promises 3, 8 and 14, for a run that died without an end of its client.

    The same moment is resumed where every snapshot is proven; one that is missing, foreign or of
    another moment rolls back; a pool or a key that is away makes it wait, and a pool is waited
    for even where a roll-back was wished; a run in `unmounting` goes on with its cleanup.
    """
    assert recovery.decide(run_in(state), seen, Wish(rollback=rollback)) == decision


# Of the other verbs' runs, which have no client, by verb, state and what is seen: likewise.
OF_VERBS: dict[tuple[Verb, str], dict[str, tuple[Probes, Decision, Decision]]] = {
    (Verb.PRUNE, states.PLANNED): {
        "whole": (WHOLE, INTERRUPTED, BY_WORD),
        "pool away": (IN_TROUBLE, INTERRUPTED, BY_WORD),  # what is there still is told in its end
    },
    (Verb.CLONE, states.PLANNED): {
        "whole": (WHOLE, RESUME, BY_WORD),
        "pool away": (IN_TROUBLE, TROUBLE, TROUBLE),
    },
    (Verb.RUN, states.PLANNED): {
        "whole": (WHOLE, RESUME, BY_WORD),
        "a step waits": (UNREADY, LOCKED, BY_WORD),
    },
    (Verb.SNAP, states.PLANNED): {
        "whole": (WHOLE, RESUME, BY_WORD),
        "pool away": (IN_TROUBLE, TROUBLE, TROUBLE),
        "none there": (NONE_TAKEN, NOT_TAKEN, BY_WORD),
    },
    # All is taken, and is kept whatever became of it since, also at the user's word.
    (Verb.SNAP, states.SNAPSHOTTED): {
        "whole": (WHOLE, FORWARD, FORWARD),
        "pool away": (IN_TROUBLE, TROUBLE, TROUBLE),
        "one gone": (LOST, FORWARD, FORWARD),
    },
    (Verb.SNAP, states.UNMOUNTING): {
        "whole": (WHOLE, FORWARD, FORWARD),
        "pool away": (IN_TROUBLE, TROUBLE, TROUBLE),
    },
}
ROWS_OF_VERBS = [
    pytest.param(verb, state, seen, wish, decision, id=f"{verb}-{state}-{name}{'-rollback' * wish}")
    for (verb, state), table in OF_VERBS.items()
    for name, (seen, as_is, undone) in table.items()
    for wish, decision in ((False, as_is), (True, undone))
]


@pytest.mark.parametrize(("verb", "state", "seen", "rollback", "decision"), ROWS_OF_VERBS)
def test_table_of_verbs(
    verb: Verb, state: str, seen: Probes, rollback: bool, decision: Decision
) -> None:
    """Section 3: a prune is never gone on with, a clone and steps are, and a moment is kept."""
    run = a_run(a_plan(verb=verb), state=state)
    assert recovery.decide(run, seen, Wish(rollback=rollback)) == decision


def test_each_open_state_of_each_verb() -> None:
    """A verb or a state that is new has a table, too."""
    of_verbs = {(v, s) for v in Verb for s in states.states_of(v) if s not in states.FINAL}
    assert of_verbs == {*OF_VERBS, *((Verb.BACKUP, state) for state in OPEN)}


@pytest.mark.parametrize(
    ("presence", "is_of_kept", "what"),
    [
        (Presence.ABSENT, False, "is gone"),
        (Presence.ABSENT, True, "is gone"),
        (Presence.FOREIGN, False, "is not the one that we took"),
        (Presence.FOREIGN, True, "is another one now"),
        (Presence.BROKEN, False, "is not whole: it overflowed, or was never finished"),
    ],
)
def test_loss(presence: Presence, is_of_kept: bool, what: str) -> None:
    """What became of the first that is lost is the reason; of kept ones none was taken by us."""
    the_plan = a_plan()
    kept = Existing("7", "7") if is_of_kept else None
    volumes = tuple(replace(v, existing=kept) for v in the_plan.volumes)
    run = a_run(replace(the_plan, volumes=volumes), attempts=1)
    lost = probes(snapshots=ALL_OURS | {SECOND: presence})
    assert recovery.decide(run, lost, Wish()) == RollBack(f"{SECOND} {what}")


# -- the client's end is known (promise 7) ---------------------------------------------------


@pytest.mark.parametrize("seen", [WHOLE, LOST, SWAPPED, SKEWED, UNREADY, IN_TROUBLE])
@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("end", [COMPLETED, PARTIAL])
def test_known_end(end: Ended, seen: Probes, rollback: bool) -> None:
    """
    Section 8: what the runner wrote is the run's result, whatever became of the snapshots.

    A backup that is in the repository is not rolled back.  It is recorded even while a pool is
    away: the cleanup then waits, parked.
    """
    found = replace(seen, ended=end)
    run = run_in(states.BACKING_UP)
    assert recovery.decide(run, found, Wish(rollback=rollback)) == FORWARD


@pytest.mark.parametrize("seen", [WHOLE, LOST, SWAPPED, SKEWED, UNREADY, IN_TROUBLE])
def test_known_failure(seen: Probes) -> None:
    """A failure that is not worth repeating is the run's result, too."""
    found = replace(seen, ended=FAILED)
    assert recovery.decide(run_in(states.BACKING_UP), found, Wish()) == FORWARD


@pytest.mark.parametrize("state", [states.SNAPSHOTTED, states.MOUNTED])
def test_end_of_another_attempt(state: str) -> None:
    """A run that is not backing up has no client's end: the record is an older one's."""
    assert recovery.decide(run_in(state), probes(ended=COMPLETED), Wish()) == RESUME


def test_shutdown() -> None:
    """Promise 14: a client that was stopped from outside is no failure; the moment is resumed."""
    run = run_in(states.BACKING_UP)
    assert recovery.decide(run, probes(ended=SHUTDOWN), Wish()) == RESUME
    waiting = replace(IN_TROUBLE, ended=SHUTDOWN)
    assert recovery.decide(run, waiting, Wish()) == TROUBLE
    lost = replace(LOST, ended=SHUTDOWN)
    assert recovery.decide(run, lost, Wish()) == GONE


@pytest.mark.parametrize("end", [SHUTDOWN, NETWORK, FAILED])
def test_rollback_after_failure(end: Ended) -> None:
    """After a client that failed the user's word counts, and the reason of the failure stays."""
    run = run_in(states.BACKING_UP)
    decision = recovery.decide(run, probes(ended=end), Wish(rollback=True))
    assert decision == RollBack(f"at the user's word: {end.reason}")
    unsaid = recovery.decide(run, probes(ended=replace(end, reason=None)), Wish(rollback=True))
    assert unsaid == RollBack("at the user's word: the client failed")


# -- patience (section 3) --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retries", "keep_for_s", "failures", "age_s", "patient"),
    [
        (0, 0, 0, 0, True),
        (0, 0, 1, 0, False),
        (2, 0, 2, 10**6, True),
        (2, 0, 3, 0, False),
        (0, 1, 1, 0, True),
        (0, 60, 1, 59, True),
        (0, 60, 4, 59, True),
        (0, 60, 1, 60, False),
        (2, 60, 3, 61, False),
    ],
)
def test_patience(retries: int, keep_for_s: int, failures: int, age_s: int, patient: bool) -> None:
    """Section 3: after network trouble a moment is kept for `--retries` and `--keep-for`."""
    the_plan = a_plan(retries=retries, keep_for_s=keep_for_s)
    began = 5 * SECOND_US
    steps = attempts_of(*["failed"] * failures)
    run = a_run(the_plan, attempts=failures, steps=steps, moment_at=began)
    now = began + age_s * SECOND_US
    assert within_patience(run, now, failures=failures) is patient
    waiting = replace(run, reason="timeout")
    too_long = RollBack("the client failed for too long: timeout")
    decision = recovery.decide(waiting, WHOLE, Wish(now_us=now))
    assert decision == (RESUME if patient else too_long)


def attempts_of(*outcomes: str | None) -> tuple[Step, ...]:
    """Return the steps of the client's attempts that ended so; beside them one of a hook."""
    hook = Step(0, 0, RunHook(AROUND_RUN, ("false",)), None, "failed")
    client = RunClient("command", (("true",),), "/")
    return (hook, *(Step(n, n, client, None, each) for n, each in enumerate(outcomes, start=1)))


# What became of the attempts, of which the last one has just failed for the network.
NETWORK_TROUBLE: list[tuple[tuple[str | None, ...], Decision]] = [
    ((None,), RESUME),
    (("failed", None), RESUME),
    (("failed", "failed", None), FORWARD),
    (("not-needed", None), RESUME),
    (("not-needed", "not-needed", "not-needed", None), RESUME),
    (("not-needed", "failed", "not-needed", None), RESUME),
    (("failed", "not-needed", "failed", None), FORWARD),
]


@pytest.mark.parametrize(("outcomes", "decision"), NETWORK_TROUBLE)
def test_network_trouble(outcomes: tuple[str | None, ...], decision: Decision) -> None:
    """
    A client that failed for the network starts again while there is patience; then it counts.

    An attempt that was interrupted, "not-needed" in the journal, uses up no retry.
    """
    steps = attempts_of(*outcomes)
    run = a_run(a_plan(retries=2), state=states.BACKING_UP, attempts=len(outcomes), steps=steps)
    assert recovery.decide(run, probes(ended=NETWORK), Wish()) == decision


def test_waits_with_failures_of_an_older_atomtx() -> None:
    """Of one that counted attempts, whose failures are not in the journal, it is tried again."""
    steps = attempts_of("not-needed", "not-needed")
    run = a_run(a_plan(retries=1), attempts=2, steps=steps, reason="timeout")
    assert recovery.decide(run, WHOLE, Wish()) == RESUME


@pytest.mark.parametrize(("age_s", "decision"), [(59, RESUME), (60, FORWARD)])
def test_network_trouble_of_a_moment_kept(age_s: int, decision: Decision) -> None:
    """It starts again as long as the moment is kept, counted from the moment to the wish."""
    the_plan = a_plan(keep_for_s=60)
    run = a_run(the_plan, state=states.BACKING_UP, attempts=1, moment_at=SECOND_US)
    wish = Wish(now_us=(1 + age_s) * SECOND_US)
    assert recovery.decide(run, probes(ended=NETWORK), wish) == decision


def test_patience_counts_from_the_moment() -> None:
    """A moment ages from its snapshots; before they are dated, from the run's beginning."""
    the_plan = a_plan(keep_for_s=60)
    run = a_run(the_plan, attempts=1, moment_at=None, started_at=SECOND_US)
    assert within_patience(run, 60 * SECOND_US, failures=1)
    assert not within_patience(run, 61 * SECOND_US, failures=1)


@pytest.mark.parametrize("state", [states.SNAPSHOTTED, states.MOUNTED, states.BACKING_UP])
@pytest.mark.parametrize("retries", [0, 3])
def test_attempts_are_bounded(state: str, retries: int) -> None:
    """Section 3: attempts are counted and bounded; a moment is not tried for ever."""
    most = MAX_ATTEMPTS + retries
    the_plan = a_plan(retries=retries)
    last = a_run(the_plan, state=state, attempts=most - 1)
    assert recovery.decide(last, WHOLE, Wish()) == RESUME
    enough = replace(last, attempts=most)
    assert recovery.decide(enough, WHOLE, Wish()) == RollBack(
        f"the client was interrupted {most} times"
    )


# -- what always holds -----------------------------------------------------------------------

ENDED = st.none() | st.builds(
    Ended,
    st.sampled_from([Outcome.COMPLETED, Outcome.PARTIAL, Outcome.FAILED]),
    st.none() | st.just("why"),
    retriable=st.booleans(),
    stopped=st.booleans(),
)
SEEN = st.builds(
    Probes,
    front_alive=st.booleans(),
    runner_alive=st.booleans(),
    client_alive=st.booleans(),
    ended=ENDED,
    snapshots=st.fixed_dictionaries(dict.fromkeys(ALL_OURS, st.sampled_from(Presence))),
    equal_createtxg=st.booleans(),
    trouble=st.none() | st.just(EXPORTED),
    not_ready=st.none() | st.just("no password"),
)
PLANS = st.builds(
    lambda retries, keep: a_plan(retries=retries, keep_for_s=keep),
    st.integers(0, 3),
    st.sampled_from([0, 60]),
)
RUNS = st.builds(
    a_run,
    PLANS,
    proven=st.booleans(),
    state=st.sampled_from(OPEN),
    attempts=st.integers(0, 12),
    reason=st.none() | st.just("timeout"),
    outcome=st.none(),
    moment_at=st.none() | st.integers(0, 200 * SECOND_US),
    started_at=st.integers(0, 200 * SECOND_US),
)
WISHES = st.builds(Wish, rollback=st.booleans(), now_us=st.integers(0, 400 * SECOND_US))


@given(RUNS, SEEN, WISHES)
def test_always(run: Run, seen: Probes, wish: Wish) -> None:
    """
    Whatever the journal and the machine say, every open run has a decision, and these hold.

    Promise 6: nobody's run is resumed, rolled back or cleaned up while somebody lives.
    Promise 2 and 14: nothing is rolled back or resumed while a pool cannot be asked.
    Promise 2 and section 3: only a run whose snapshots are all proven, of one moment, is resumed.
    Promise 14: a roll-back has a proof or the user's word, and a wait says for what.
    """
    decision = recovery.decide(run, seen, wish)
    assert isinstance(decision, Decision)
    proven = set(seen.snapshots.values()) == {Presence.OURS} and seen.equal_createtxg
    if seen.front_alive or seen.runner_alive or seen.client_alive:
        assert isinstance(decision, LeaveAlone | Adopt | EndOrphans)
    else:
        assert not isinstance(decision, LeaveAlone | Adopt | EndOrphans)
    if seen.trouble:
        assert not isinstance(decision, Resume | RollBack)
    if isinstance(decision, Resume):
        assert proven
        assert not seen.not_ready
        assert not wish.rollback
        assert run.state != states.UNMOUNTING
    if isinstance(decision, RollBack):
        exhausted = run.attempts >= MAX_ATTEMPTS or run.reason
        assert wish.rollback or not proven or exhausted
        assert run.state != states.UNMOUNTING
    if isinstance(decision, RollForward):
        assert run.state == states.UNMOUNTING or (run.state == states.BACKING_UP and seen.ended)
    if isinstance(decision, RollBack | Wait | LeaveAlone):
        assert decision.reason


@given(RUNS, SEEN)
def test_rollback_is_obeyed(run: Run, seen: Probes) -> None:
    """`--rollback` never ends in another attempt, nor in waiting for a key or a repository."""
    decision = recovery.decide(run, seen, Wish(rollback=True))
    assert not isinstance(decision, Resume)
    assert decision != Wait(seen.not_ready or "")

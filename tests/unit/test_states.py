"""The table of a run's states, and the machine that reads it."""

from __future__ import annotations

from typing import Any

import pytest
from transitions import MachineError

from atomtx.states import (
    DESTROYED,
    FINAL,
    MOUNTED,
    PLANNED,
    SNAPSHOTTED,
    STATES,
    TRANSITIONS,
    UNMOUNTING,
    Event,
    StateMachine,
    Transition,
)

IN_TABLE = {(move.event, move.source) for move in TRANSITIONS}
FORBIDDEN = [(e, s) for e in Event for s in STATES if (e, s) not in IN_TABLE]


class Journal:
    """Notes what it is asked to persist."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, dict[str, Any]]] = []

    def persist(self, event: Any) -> None:
        move = event.transition
        self.seen.append((event.model.state, move.source, move.dest, event.kwargs))


def reachable(start: str) -> set[str]:
    """Return the states to which moves lead from *start*."""
    found, new = set[str](), {start}
    while new:
        found |= new
        new = {move.dest for move in TRANSITIONS if move.source in found} - found
    return found


def test_states_of_the_table() -> None:
    """The table speaks only of known states, and of each event."""
    assert {move.source for move in TRANSITIONS} | {move.dest for move in TRANSITIONS} == set(
        STATES
    )
    assert {move.event for move in TRANSITIONS} == set(Event)


def test_table_is_a_function() -> None:
    """An event in a state leads to one place."""
    assert len(IN_TABLE) == len(TRANSITIONS)


def test_every_state_is_reachable() -> None:
    """A planned run can come to every state."""
    assert reachable(PLANNED) == set(STATES)


@pytest.mark.parametrize("state", [s for s in STATES if s not in (UNMOUNTING, FINAL)])
def test_way_to_unmounting(state: str) -> None:
    """From each state before it a run can be given up at once, and then cleaned up."""
    given_up = {(m.source, m.dest) for m in TRANSITIONS if m.event is Event.GIVEN_UP}
    assert (state, UNMOUNTING) in given_up
    assert FINAL in reachable(state)


def test_unmounting_leads_only_to_destroyed() -> None:
    """A run that is being cleaned up is never started again."""
    assert [m.dest for m in TRANSITIONS if m.source == UNMOUNTING] == [DESTROYED]


def test_destroyed_is_final() -> None:
    """Nothing leaves `destroyed`."""
    assert FINAL == DESTROYED
    assert [move for move in TRANSITIONS if move.source == DESTROYED] == []


def test_only_a_resume_goes_back() -> None:
    """The one way back is a resume, to `snapshotted`: the same moment again."""
    order = STATES.index
    back = [move for move in TRANSITIONS if order(move.dest) <= order(move.source)]
    assert {(move.event, move.dest) for move in back} == {(Event.RESUMED, SNAPSHOTTED)}


@pytest.mark.parametrize("move", TRANSITIONS, ids=lambda m: f"{m.event}-{m.source}")
def test_move(move: Transition) -> None:
    """A move of the table is persisted, once and while the state is still the old one."""
    journal = Journal()
    state = StateMachine(journal.persist).fire(move.event, move.source, outcome="failed")
    assert state == move.dest
    assert journal.seen == [(move.source, move.source, move.dest, {"outcome": "failed"})]


@pytest.mark.parametrize(("event", "state"), FORBIDDEN)
def test_move_that_is_not_in_the_table(event: Event, state: str) -> None:
    """An event in the wrong state is an error, and nothing is persisted."""
    journal = Journal()
    with pytest.raises(MachineError):
        StateMachine(journal.persist).fire(event, state)
    assert journal.seen == []


def test_journal_that_fails() -> None:
    """A move that cannot be persisted is not made: the error comes out, the state stays."""
    seen: list[Any] = []

    def persist(event: Any) -> None:
        seen.append(event.model)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        StateMachine(persist).fire(Event.GIVEN_UP, MOUNTED)
    (position,) = seen
    assert position.state == MOUNTED

"""
The states of a run, and the moves between them.  Pure.

The table is data: the journal's machine, the tests and the diagram in the docs read it.
``transitions`` judges each move; effects never run in its callbacks, and the only callback
(`before_state_change`) writes the row inside the journal's open transaction, so that a commit
that fails leaves nothing out of step.  An exception in `after_state_change` would come after
the move, and one in `finalize_event` would be swallowed (measured with transitions 0.9.3).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

PLANNED = "planned"
SNAPSHOTTED = "snapshotted"
MOUNTED = "mounted"
BACKING_UP = "backing-up"
UNMOUNTING = "unmounting"
DESTROYED = "destroyed"

STATES = (PLANNED, SNAPSHOTTED, MOUNTED, BACKING_UP, UNMOUNTING, DESTROYED)
FINAL = DESTROYED


class Outcome(StrEnum):
    """How the client's work ended; NULL in the journal until that is known."""

    COMPLETED = "completed"
    PARTIAL = "partial"
    FAILED = "failed"
    ROLLED_BACK = "rolled-back"


class Event(StrEnum):
    """Facts that move a run."""

    SNAPSHOTS_TAKEN = "snapshots_taken"
    VOLUMES_MOUNTED = "volumes_mounted"
    CLIENT_STARTED = "client_started"
    CLIENT_ENDED = "client_ended"
    GIVEN_UP = "given_up"
    RESUMED = "resumed"
    CLEANED_UP = "cleaned_up"


class Transition(NamedTuple):
    event: Event
    source: str
    dest: str


TRANSITIONS = (
    Transition(Event.SNAPSHOTS_TAKEN, PLANNED, SNAPSHOTTED),
    Transition(Event.VOLUMES_MOUNTED, SNAPSHOTTED, MOUNTED),
    Transition(Event.CLIENT_STARTED, MOUNTED, BACKING_UP),
    Transition(Event.CLIENT_ENDED, BACKING_UP, UNMOUNTING),
    Transition(Event.GIVEN_UP, PLANNED, UNMOUNTING),
    Transition(Event.GIVEN_UP, SNAPSHOTTED, UNMOUNTING),
    Transition(Event.GIVEN_UP, MOUNTED, UNMOUNTING),
    Transition(Event.GIVEN_UP, BACKING_UP, UNMOUNTING),
    Transition(Event.RESUMED, MOUNTED, SNAPSHOTTED),
    Transition(Event.RESUMED, BACKING_UP, SNAPSHOTTED),
    Transition(Event.CLEANED_UP, UNMOUNTING, DESTROYED),
)


class Position:
    """The throw-away model that one transition is judged on; the journal's row is the truth."""

    def __init__(self, state: str) -> None:
        self.state = state


class StateMachine:
    """The `transitions` machine over one table of states."""

    def __init__(self, persist: Callable[[Any], None]) -> None:
        from transitions import Machine

        self._machine = Machine(
            model=None,
            states=list(STATES),
            transitions=[[t.event.value, t.source, t.dest] for t in TRANSITIONS],
            initial=PLANNED,
            auto_transitions=False,
            send_event=True,
            queued=False,
            before_state_change=persist,
        )

    def fire(self, event: Event, state: str, **facts: object) -> str:
        """
        Judge *event* in *state*, persist the move, and return the new state.

        Raises ``transitions.MachineError`` for a move that is not in the table.
        """
        position = Position(state)
        self._machine.events[event.value].trigger(position, **facts)
        return position.state

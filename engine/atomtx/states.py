"""
The states of a run, and the moves between them: a table for each verb.  Pure.

The tables are data: the journal's machines, the tests and the diagrams in the docs read them.
``transitions`` judges each move; effects never run in its callbacks, and the only callback
(`before_state_change`) writes the row inside the journal's open transaction, so that a commit
that fails leaves nothing out of step.  An exception in `after_state_change` would come after
the move, and one in `finalize_event` would be swallowed (measured with transitions 0.9.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

PLANNED = "planned"
SNAPSHOTTED = "snapshotted"
MOUNTED = "mounted"
BACKING_UP = "backing-up"
UNMOUNTING = "unmounting"
DESTROYED = "destroyed"
KEPT = "kept"
PRUNED = "pruned"
CLONED = "cloned"
RAN = "ran"

_OPEN = (PLANNED, SNAPSHOTTED, MOUNTED, BACKING_UP, UNMOUNTING)
FINAL = (DESTROYED, KEPT, PRUNED, CLONED, RAN)
STATES = (*_OPEN, *FINAL)


class Verb(StrEnum):
    """What a run does."""

    BACKUP = "backup"
    SNAP = "snap"  # take snapshots that stay
    PRUNE = "prune"  # destroy those of them that no rule keeps
    CLONE = "clone"  # send them to other pools and machines
    RUN = "run"  # the steps of a job, each a command with runs of its own


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
    SNAPSHOTS_KEPT = "snapshots_kept"
    SNAPSHOTS_PRUNED = "snapshots_pruned"
    SNAPSHOTS_COPIED = "snapshots_copied"
    STEPS_ENDED = "steps_ended"


class Transition(NamedTuple):
    event: Event
    source: str
    dest: str


_BACKUP = (
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
# Once all snapshots are there, to keep them is all that is left, and nothing leads back.
_SNAP = (
    Transition(Event.SNAPSHOTS_TAKEN, PLANNED, SNAPSHOTTED),
    Transition(Event.SNAPSHOTS_KEPT, SNAPSHOTTED, KEPT),
    Transition(Event.GIVEN_UP, PLANNED, UNMOUNTING),
    Transition(Event.CLEANED_UP, UNMOUNTING, DESTROYED),
)
# What is destroyed cannot be brought back: who gives up leaves the others alone.
_PRUNE = (
    Transition(Event.SNAPSHOTS_PRUNED, PLANNED, PRUNED),
    Transition(Event.GIVEN_UP, PLANNED, PRUNED),
)
# What arrived stays, and what was cut off can be gone on with by the next one.
_CLONE = (
    Transition(Event.SNAPSHOTS_COPIED, PLANNED, CLONED),
    Transition(Event.GIVEN_UP, PLANNED, CLONED),
)
# What a step has done is its own run's; the steps that are left are not begun.
_RUN = (
    Transition(Event.STEPS_ENDED, PLANNED, RAN),
    Transition(Event.GIVEN_UP, PLANNED, RAN),
)
TABLES: Mapping[Verb, tuple[Transition, ...]] = {
    Verb.BACKUP: _BACKUP,
    Verb.SNAP: _SNAP,
    Verb.PRUNE: _PRUNE,
    Verb.CLONE: _CLONE,
    Verb.RUN: _RUN,
}


def states_of(verb: Verb) -> tuple[str, ...]:
    """Return the states that a verb's runs may be in, in order."""
    known = {state for move in TABLES[verb] for state in (move.source, move.dest)}
    return tuple(state for state in STATES if state in known)


class Position:
    """The throw-away model that one transition is judged on; the journal's row is the truth."""

    def __init__(self, state: str) -> None:
        self.state = state


class StateMachine:
    """The `transitions` machines over the tables of states, each made when it is needed."""

    def __init__(self, persist: Callable[[Any], None]) -> None:
        self._persist = persist
        self._machines: dict[Verb, Any] = {}

    def _machine(self, verb: Verb) -> Any:
        from transitions import Machine

        if verb not in self._machines:
            self._machines[verb] = Machine(
                model=None,
                states=list(states_of(verb)),
                transitions=[[t.event.value, t.source, t.dest] for t in TABLES[verb]],
                initial=PLANNED,
                auto_transitions=False,
                send_event=True,
                queued=False,
                before_state_change=self._persist,
            )
        return self._machines[verb]

    def fire(self, event: Event, state: str, *, verb: Verb, **facts: object) -> str:
        """
        Judge *event* in *state* of a *verb*'s run, persist the move, and return the new state.

        Raises ``transitions.MachineError`` for a move that is not in the verb's table.
        """
        machine = self._machine(verb)
        if event.value not in machine.events:
            from transitions import MachineError

            raise MachineError(f"{verb} knows no event {event}")
        position = Position(state)
        machine.events[event.value].trigger(position, **facts)
        return position.state

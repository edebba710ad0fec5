"""The table of a run's states, and the machine that reads it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
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
    TABLES,
    UNMOUNTING,
    Event,
    StateMachine,
    Transition,
    Verb,
    states_of,
)

MOVES = [(verb, move) for verb in Verb for move in TABLES[verb]]
IN_TABLE = {(verb, move.event, move.source) for verb, move in MOVES}
FORBIDDEN = [
    (v, e, s) for v in Verb for e in Event for s in states_of(v) if (v, e, s) not in IN_TABLE
]


class Journal:
    """Notes what it is asked to persist."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, dict[str, Any]]] = []

    def persist(self, event: Any) -> None:
        move = event.transition
        self.seen.append((event.model.state, move.source, move.dest, event.kwargs))


def reachable(verb: Verb, start: str) -> set[str]:
    """Return the states to which moves of a verb lead from *start*."""
    found, new = set[str](), {start}
    while new:
        found |= new
        new = {move.dest for move in TABLES[verb] if move.source in found} - found
    return found


def test_states_of_the_tables() -> None:
    """The tables speak of each known state, and of each event."""
    assert {state for verb in Verb for state in states_of(verb)} == set(STATES)
    assert {move.event for _, move in MOVES} == set(Event)


def test_tables_are_functions() -> None:
    """An event in a state leads to one place."""
    assert len(IN_TABLE) == len(MOVES)


@pytest.mark.parametrize("verb", Verb)
def test_every_state_is_reachable(verb: Verb) -> None:
    """A planned run can come to every state of its verb, and from each to an end."""
    assert reachable(verb, PLANNED) == set(states_of(verb))
    for state in states_of(verb):
        assert reachable(verb, state) & set(FINAL)


@pytest.mark.parametrize("verb", Verb)
def test_final_states(verb: Verb) -> None:
    """Nothing leaves a final state, and something leaves every other."""
    left = {move.source for move in TABLES[verb]}
    assert left == set(states_of(verb)) - set(FINAL)


@pytest.mark.parametrize(
    "state", [s for s in states_of(Verb.BACKUP) if s not in (UNMOUNTING, DESTROYED)]
)
def test_way_to_unmounting(state: str) -> None:
    """From each state before it a backup can be given up at once, and then cleaned up."""
    given_up = {(m.source, m.dest) for m in TABLES[Verb.BACKUP] if m.event is Event.GIVEN_UP}
    assert (state, UNMOUNTING) in given_up
    assert DESTROYED in reachable(Verb.BACKUP, state)


def test_unmounting_leads_only_to_destroyed() -> None:
    """A run that is being cleaned up is never started again."""
    assert {m.dest for _, m in MOVES if m.source == UNMOUNTING} == {DESTROYED}


def test_a_whole_moment_is_kept() -> None:
    """A snap whose snapshots are all there can only keep them."""
    assert [m.event for m in TABLES[Verb.SNAP] if m.source == SNAPSHOTTED] == [Event.SNAPSHOTS_KEPT]


def test_only_a_resume_goes_back() -> None:
    """The one way back is a resume, to `snapshotted`: the same moment again."""
    order = STATES.index
    back = [move for _, move in MOVES if order(move.dest) <= order(move.source)]
    assert {(move.event, move.dest) for move in back} == {(Event.RESUMED, SNAPSHOTTED)}


@pytest.mark.parametrize(("verb", "move"), MOVES, ids=str)
def test_move(verb: Verb, move: Transition) -> None:
    """A move of the table is persisted, once and while the state is still the old one."""
    journal = Journal()
    machine = StateMachine(journal.persist)
    state = machine.fire(move.event, move.source, verb=verb, outcome="failed")
    assert state == move.dest
    assert journal.seen == [(move.source, move.source, move.dest, {"outcome": "failed"})]


@pytest.mark.parametrize(("verb", "event", "state"), FORBIDDEN)
def test_move_that_is_not_in_the_table(verb: Verb, event: Event, state: str) -> None:
    """An event in the wrong state is an error, and nothing is persisted."""
    journal = Journal()
    with pytest.raises(MachineError):
        StateMachine(journal.persist).fire(event, state, verb=verb)
    assert journal.seen == []


def test_journal_that_fails() -> None:
    """A move that cannot be persisted is not made: the error comes out, the state stays."""
    seen: list[Any] = []

    def persist(event: Any) -> None:
        seen.append(event.model)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        StateMachine(persist).fire(Event.GIVEN_UP, MOUNTED, verb=Verb.BACKUP)
    (position,) = seen
    assert position.state == MOUNTED


# -- the diagrams of docs/design.md --------------------------------------------------------------

DESIGN = Path(__file__).parents[2] / "docs/design.md"
ARROW = re.compile(r"    (\w+|\[\*\]) --> (\w+|\[\*\])(?:: (\w+))?")
ALIAS = re.compile(r'    state "([\w-]+)" as (\w+)')
END = "[*]"
Arrows = list[tuple[str | None, str, str]]


def diagrams(page: str) -> list[Arrows]:
    """Return the arrows of each diagram of states: event, source and destination."""
    blocks = re.findall(r"^```mermaid\nstateDiagram-v2\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("stateDiagram")
    return [arrows(block.splitlines()) for block in blocks]


def arrows(lines: list[str]) -> Arrows:
    aliases: dict[str, str] = {}
    found: Arrows = []
    for line in lines:
        if alias := ALIAS.fullmatch(line):
            aliases[alias[2]] = alias[1]
            continue
        arrow = ARROW.fullmatch(line)
        assert arrow, f"no line of a diagram: {line!r}"
        source, dest, event = arrow.groups()
        found.append((event, aliases.get(source, source), aliases.get(dest, dest)))
    return found


def drawn(verb: Verb) -> Arrows:
    """Return what the diagram of a verb must show."""
    ends = [(None, state, END) for state in FINAL if state in states_of(verb)]
    return [(None, END, PLANNED), *TABLES[verb], *ends]


def test_diagrams() -> None:
    """The page shows the verbs' tables in their order: every move of each, and no more."""
    found = diagrams(DESIGN.read_text())
    assert len(found) == len(Verb)
    for verb, shown in zip(Verb, found, strict=True):
        assert Counter(shown) == Counter(drawn(verb)), verb


@pytest.mark.parametrize(
    "line",
    [
        "planned --> snapshotted: snapshots_taken",
        "    planned -> snapshotted: snapshots_taken",
        "    planned --> snapshotted : snapshots_taken",
        "    planned --> backing-up: client_started",
        "    note right of planned: a word",
        "",
    ],
)
def test_line_that_is_not_known(line: str) -> None:
    """What is not understood is not passed over."""
    with pytest.raises(AssertionError, match="no line of a diagram"):
        arrows([line])

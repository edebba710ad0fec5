"""Intents: each can be stored, told and undone."""

from __future__ import annotations

import dataclasses

import pytest

from atomtx import intents
from atomtx.intents import (
    AFTER,
    BEFORE,
    KINDS,
    ApplyRetention,
    CopySnapshots,
    DestroySnapshots,
    EndClient,
    HoldSnapshots,
    Intent,
    KeepSnapshots,
    Mount,
    MountVolumes,
    Origin,
    PruneSnapshots,
    ReleaseSnapshots,
    RunClient,
    RunHook,
    RunStep,
    Source,
    TakeSnapshots,
    UndoHook,
    UnmountVolumes,
)

RUN = "0123456789abcdef"
SNAPSHOTS = (f"tank/with space@atomtx-{RUN}", f"tank/a@atomtx-{RUN}")
MOUNTS = (Mount(SNAPSHOTS[0], "/with space"), Mount(SNAPSHOTS[1], "/with space/ä"))
SET = ("tank", "123", SNAPSHOTS)
TREE = ("/restic", MOUNTS, ("/restic", "/restic/with space"))

# Each forward intent, and what undoes it; None where nothing does.
PAIRS: list[tuple[Intent, Intent | None]] = [
    (TakeSnapshots(*SET, run=RUN), DestroySnapshots(*SET, run=RUN)),
    (TakeSnapshots(*SET, run=RUN, transient=True), DestroySnapshots(*SET, run=RUN)),
    (HoldSnapshots(*SET, tag="atomtx"), ReleaseSnapshots(*SET, tag="atomtx")),
    (KeepSnapshots(*SET, run=RUN), None),
    (MountVolumes(*TREE), UnmountVolumes(*TREE)),
    (RunClient("restic", (("restic", "backup", "/a b"), ("true",)), "/"), EndClient("restic")),
    *(
        (RunHook(when, ("freeze", "a b"), ("thaw",), 5), UndoHook(when, ("thaw",), 5))
        for when in BEFORE
    ),
    *((RunHook(when, ("tell",)), None) for when in AFTER),
    (ApplyRetention("restic", ("/a", "/b c"), ("--keep-last=3",)), None),
    (PruneSnapshots("tank", "11", ("tank/a@x",), ("1",), ("7",), (RUN,)), None),
    (PruneSnapshots("tank", "11", ("tank/a@x",), ("1",), ("7",), (RUN,), transient=True), None),
    (
        CopySnapshots(
            "nas:b", "7", ("tank/a",), ("b/a",), ("tank/a@x",), ("1",), "%Y%m%d%H%M", "tag"
        ),
        None,
    ),
    (RunStep(2, ("snap", "tank/a b")), None),
]
ALL = [intent for pair in PAIRS for intent in pair if intent]
each_intent = pytest.mark.parametrize("intent", ALL, ids=lambda intent: str(intent.kind))


def test_every_kind_is_tried() -> None:
    """The tests of this module know every kind of intent that there is."""
    assert {intent.kind for intent in ALL} == set(KINDS)
    assert all(cls.kind == kind for kind, cls in KINDS.items())


@each_intent
def test_round_trip(intent: Intent) -> None:
    """An intent is read back from the journal as it was written, down to the types."""
    again = intents.from_json(intent.kind, intent.to_json())
    assert again == intent
    assert hash(again) == hash(intent)


@pytest.mark.parametrize("part", [*KINDS.values(), Mount, Origin, Source])
def test_what_is_not_written(part: type[Intent]) -> None:
    """What is left out of a payload is what a field is by default: else it could not be read."""
    defaults = {field.name: field.default for field in dataclasses.fields(part)}
    untold = intents._UNTOLD
    assert {name: defaults[name] for name in untold if name in defaults} == {
        name: value for name, value in untold.items() if name in defaults
    }


@each_intent
def test_description(intent: Intent) -> None:
    """Each intent can be told in one line that names its pool, its client or its place."""
    text = intent.describe()
    assert text == text.strip()
    assert "\n" not in text
    assert any(word in text for word in ("tank", "restic", "freeze", "thaw", "tell"))


@each_intent
def test_undo_is_not_undone(intent: Intent) -> None:
    """An undo has no undo: it is complete in itself."""
    undo = intent.compensation()
    assert undo is None or undo.compensation() is None


@pytest.mark.parametrize(("intent", "undo"), PAIRS, ids=lambda i: i.kind if i else "nothing")
def test_compensation(intent: Intent, undo: Intent | None) -> None:
    """The undo names all that the intent would create, so that it needs no other row."""
    assert intent.compensation() == undo


def test_namespace_and_tree_are_told_apart() -> None:
    """A description says whether mounts are the host's or end with their namespace."""
    inside = MountVolumes("", MOUNTS)
    assert "in a namespace of its own" in inside.describe()
    assert "with the namespace" in inside.compensation().describe()
    assert "under /restic" in MountVolumes(*TREE).describe()


def test_command_is_quoted() -> None:
    """A described command can be pasted into a shell."""
    intent = RunClient("restic", (("restic", "backup", "/a b"), ("true",)), "/")
    assert intent.describe() == "run restic backup '/a b' && true"


@pytest.mark.parametrize(("count", "words"), [(1, "1 snapshot "), (2, "2 snapshots ")])
def test_plural(count: int, words: str) -> None:
    """One thing is not told as several."""
    assert words in DestroySnapshots("tank", "1", SNAPSHOTS[:count], RUN).describe()


def test_unknown_kind() -> None:
    """The intent of a newer release is an error, never guessed at."""
    with pytest.raises(KeyError):
        intents.from_json("defragment", "{}")


@each_intent
def test_frozen(intent: Intent) -> None:
    """Once made, an intent does not change: what is journaled is what is done."""
    name = dataclasses.fields(intent)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(intent, name, "else")

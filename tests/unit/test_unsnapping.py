"""
Which transient snapshots go, and the run that destroys them.

The pools are played (`tests/fakezfs.py`); what a prune and this have in common is in
test_pruning.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atomtx import plan, pruning, unsnapping, wanted
from atomtx.convention import Pattern
from atomtx.errors import EffectError, JournalFullError, WaitingError
from atomtx.history import Snap
from atomtx.intents import from_json
from atomtx.journal import Change, Journal
from atomtx.names import RunId
from atomtx.plan import DatasetFacts, Pool, Request
from atomtx.pruning import Choice
from atomtx.records import Run
from atomtx.retention import Policy
from atomtx.volumes.kind import Kept
from atomtx.volumes.zfs import Zfs
from tests.extent import some
from tests.scene import Ended, Scene

FIRST = datetime(2026, 11, 1, tzinfo=UTC)
ALL = Policy()
PATTERN = Pattern.parse()
POOLS = [Pool("tank", "guid of tank", "ONLINE"), Pool("zroot", "guid of zroot", "ONLINE")]
SETS = ("tank/a", "zroot/c")
REQUEST = Request(SETS)
RUNS = tuple(RunId(f"{n:016x}") for n in range(4))  # each has kept a moment
READER = RunId("4a1f0c8e27d95b36")

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="lock F and its folder are root's")


def name(dataset: str, day: int) -> str:
    return f"{dataset}@atomtx-{FIRST + timedelta(days=day):%Y%m%d%H%M}"


def kept(dataset: str, day: int, **values: Any) -> Kept:
    at = int((FIRST + timedelta(days=day)).timestamp())
    guid = str(day + 1 + 10 * SETS.index(dataset))
    made = Kept(name(dataset, day), guid, str(day + 7), at, RUNS[day], 0, (), is_transient=True)
    return replace(made, **values)


def found(request: Request = REQUEST) -> wanted.Wanted:
    facts = [DatasetFacts(n, "filesystem", f"guid of {n}", f"/{n}", "on", True, "-") for n in SETS]
    return wanted.choose(request, SETS, facts, POOLS)


def judged(
    *there: Kept,
    policy: Policy = ALL,
    held: Mapping[str, Sequence[str]] | None = None,
    snaps: Mapping[str, Snap] | None = None,
) -> Choice:
    now = datetime.now(UTC)
    return unsnapping.judge(
        REQUEST, found(), there, held or {}, snaps or {}, policy, PATTERN, run=RunId.new(), now=now
    )


def going(choice: Choice) -> list[str]:
    return [each.name for each in choice.going]


def reasons(choice: Choice) -> dict[str, str]:
    return {v.item.name: ", ".join(v.reasons) for v in choice.verdicts if v.keep}


# -- the choice ------------------------------------------------------------------------------


def test_all_of_them() -> None:
    """Without a rule all go: that is what they were taken for."""
    there = [kept(dataset, day) for dataset in SETS for day in range(3)]
    assert going(judged(*there)) == [each.name for each in there]


def test_keep_last() -> None:
    """The last of each dataset, by transaction group; they say why they stay."""
    there = [kept(dataset, day) for dataset in SETS for day in range(3)]
    choice = judged(*there, policy=Policy(last=2))
    assert going(choice) == [name(dataset, 0) for dataset in SETS]
    assert set(reasons(choice).values()) == {"last snapshot"}


@pytest.mark.parametrize("hours", [-24 * 365, 24 * 365])
def test_clock_was_wrong(hours: int) -> None:
    """The last are those that were taken last, though the clock was ahead, or behind, before."""
    wrong = int((datetime.now(UTC) + timedelta(hours=hours)).timestamp())
    there = [kept("tank/a", day) for day in range(4)]
    for strange, stays in ((1, 3), (3, 3)):
        mixed = [replace(e, creation_s=wrong) if e is there[strange] else e for e in there]
        choice = judged(*mixed, policy=Policy(last=1))
        assert reasons(choice) == {name("tank/a", stays): "last snapshot"}


def test_clock_was_ahead_on_lvm() -> None:
    """A volume group tells no order but the clock's: as with a prune, what is ahead stays."""
    now = datetime.now(UTC)
    ahead = int((now + timedelta(days=300)).timestamp())
    there = [
        replace(kept("tank/a", day), createtxg=str(at), creation_s=at, origin="tank/a")
        for day, at in enumerate((1, ahead, 3))
    ]
    (group,) = wanted.by_volume(there)
    verdicts = unsnapping._verdicts(group, {}, Policy(last=1), now=now)
    assert {v.item.name: v.reasons for v in verdicts} == {
        name("tank/a", 0): (),
        name("tank/a", 1): ("in the future of this machine's clock",),
        name("tank/a", 2): ("last snapshot",),
    }


@pytest.mark.parametrize(
    "foreign",
    [
        kept("tank/a", 3, is_transient=False),  # kept to stay
        kept("tank/a", 3, is_transient=False, keeper=""),
        kept("tank/a", 3, name="tank/a@daily"),
    ],
)
def test_what_is_not_meant(foreign: Kept) -> None:
    """Promise 2: neither does it go, nor does it take a place in the rule."""
    choice = judged(foreign, kept("tank/a", 0), kept("tank/a", 1), policy=Policy(last=1))
    assert going(choice) == [name("tank/a", 0)]
    assert foreign.name not in {verdict.item.name for verdict in choice.verdicts}


def test_other_names_are_told() -> None:
    """What has the mark and another name stays; without a word it would be forgotten."""
    others = [kept("tank/a", day, name=f"tank/a@{day}") for day in range(2)]
    assert judged(kept("tank/a", 2)).plan.notes == ()
    assert judged(others[0]).plan.notes == (
        "1 transient snapshot is left alone, with a name that is not of the pattern",
    )
    assert judged(*others).plan.notes[0].startswith("2 transient snapshots are left alone")


def test_set_by_somebody_else() -> None:
    """Promise 2: where the journal knows the run, it took them to go again, or they stay."""
    there = [kept("tank/a", day) for day in range(3)]
    snaps: dict[str, Snap] = {
        RUNS[0]: Snap(False, is_transient=False),
        RUNS[1]: Snap(False, is_transient=True),
    }
    choice = judged(*there, snaps=snaps)
    assert going(choice) == [name("tank/a", 1), name("tank/a", 2)]
    assert choice.plan.notes == (
        "1 transient snapshot is left alone, "
        "which a run took to stay: the mark was set by somebody else",
    )


def test_not_ended() -> None:
    """What an interrupted run has taken is for its recovery to keep, or to take away."""
    there = [kept(dataset, 0) for dataset in SETS]
    choice = judged(*there, snaps={RUNS[0]: Snap(True, is_transient=True)})
    assert going(choice) == []
    assert set(reasons(choice).values()) == {f"the run that took it has not ended: {RUNS[0]}"}


def test_of_steps() -> None:
    """What a step took stays as long as its run goes on: a step after it is to read it."""
    there = [kept(dataset, day) for dataset in SETS for day in range(2)]
    snaps: dict[str, Snap] = {RUNS[0]: Snap(False, is_transient=True, of_open=READER)}
    for policy in (ALL, Policy(last=1)):
        choice = judged(*there, snaps=snaps, policy=policy)
        assert [e for e in going(choice) if e in {name(dataset, 0) for dataset in SETS}] == []
        why = reasons(choice)[name("tank/a", 0)]
        assert why.startswith(f"the run that took it has not ended: {READER}")
    assert going(judged(*there, snaps=snaps)) == [name(dataset, 1) for dataset in SETS]


@pytest.mark.parametrize("is_transient", [True, False])
def test_not_of_one_moment(is_transient: bool) -> None:
    """What no backup of kept snapshots reads is not destroyed unsaved; each pool has its own."""
    other = kept("tank/a", 0, name=name("tank/b", 0), createtxg="99", is_transient=is_transient)
    there = [kept(dataset, day) for dataset in SETS for day in range(2)]
    there[3] = replace(there[3], createtxg="98")  # of zroot
    choice = judged(*there, other)
    assert going(choice) == [name(dataset, 1) for dataset in SETS]
    assert choice.plan.notes == (
        f"{2 + is_transient} transient snapshots are left alone, "
        "whose moment is none, so that no backup reads it: their createtxg differ",
    )
    copy = replace(other, is_copy=True, is_transient=False)
    assert len(going(judged(*there, copy))) == 4


@pytest.mark.parametrize(
    ("values", "reason"), [({"holds": 1}, "held"), ({"clones": ("tank/x",)}, "tank/x")]
)
def test_in_use(values: dict[str, Any], reason: str) -> None:
    """What somebody holds or has cloned stays, and it alone, with a rule and without one."""
    there = [kept("tank/a", 0, **values), kept("tank/a", 1), kept("zroot/c", 0)]
    choice = judged(*there, held={there[0].name: ["mine"]} if "holds" in values else {})
    assert going(choice) == [name("tank/a", 1), name("zroot/c", 0)]
    assert reason in reasons(choice)[there[0].name]
    assert name("tank/a", 0) not in going(judged(*there, policy=Policy(last=1)))


def test_moment_that_is_read() -> None:
    """A run that reads one snapshot of a moment keeps all of it; other moments go."""
    held = {name("tank/a", 1): ["mine", READER.token]}
    there = [kept(dataset, day) for dataset in SETS for day in range(2)]
    there[1] = replace(there[1], holds=2)
    choice = judged(*there, held=held)
    assert going(choice) == [name(dataset, 0) for dataset in SETS]
    read = f"its moment is read by a run: {READER}"
    assert reasons(choice) == {name("tank/a", 1): f"held, {read}", name("zroot/c", 1): read}


def test_plan() -> None:
    """It is a prune of its own job: neither waits for the other, and a job's have one in common."""
    choice = judged(kept("tank/a", 0))
    made = choice.plan
    assert (made.verb, made.label) == ("prune", "unsnap tank/a, zroot/c")
    assert made.job == f"unsnap {wanted.key(found())}"
    named = pruning.plan_of(
        replace(REQUEST, job="home"), found(), choice.going, RunId.new(), command="unsnap"
    )
    assert named.job == f"unsnap {plan.job_key('home')}"
    (step,) = pruning.intents(choice, bookmark=True, transient=True)
    assert from_json(step.kind, step.to_json()) == step
    assert list(pruning._going(step)) == [kept("tank/a", 0, creation_s=0)]
    words = "destroy 1 transient snapshot of pool tank and leave a bookmark of each"
    assert step.describe() == words


# -- the run ---------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    scene.plan(*SETS)
    yield scene
    scene.close()


def fill(scene: Scene, **values: Any) -> None:
    """Put two transient moments into the pools, and one that is to stay between them."""
    there = [kept(dataset, day) for dataset in SETS for day in range(3)]
    snapshots: dict[str, Any] = {
        each.name: {
            "guid": each.guid,
            "createtxg": each.createtxg,
            "creation": str(each.creation_s),
            "mark": None,
            "kept": each.keeper,
            "holds": [],
            "transient": "- -" if each.keeper == RUNS[1] else each.keeper,
        }
        for each in there
    }
    scene.play(snapshots=snapshots, bookmarks={}, **values)


def changed(scene: Scene, **values: Any) -> None:
    """Change the oldest snapshot of the first dataset, behind our back."""
    snapshots = scene.pool["snapshots"]
    snapshots[name("tank/a", 0)] |= values
    scene.play(snapshots=snapshots)


def run_unsnap(scene: Scene, at: str = "", *, policy: Policy = ALL, **options: Any) -> Ended:
    def choose(_: Ended) -> Choice:
        zfs = Zfs()
        there = zfs.kept(SETS)
        held = zfs.holders([each.name for each in there if each.holds])
        return judged(*there, policy=policy, held=held)

    return scene.prune(choose, at, transient=True, **options)


def days(scene: Scene, dataset: str) -> list[int]:
    there = scene.pool["snapshots"]
    return [day for day in range(3) if name(dataset, day) in there]


def check_gone(scene: Scene) -> None:
    """The transient ones are gone, with a bookmark each; the run is at its end."""
    assert [days(scene, dataset) for dataset in SETS] == [[1], [1]]
    expected = [name(dataset, day).replace("@", "#") for dataset in SETS for day in (0, 2)]
    assert sorted(scene.pool["bookmarks"]) == sorted(expected)
    (run,) = scene.rows("SELECT * FROM runs ORDER BY started_at DESC LIMIT 1")
    assert (run["verb"], run["state"], run["outcome"]) == ("prune", "pruned", "completed")
    assert scene.rows("SELECT * FROM steps WHERE outcome IS NULL") == []


@root_only
def test_course(scene: Scene) -> None:
    """One channel program a pool, with the mark that is to be compared."""
    fill(scene)
    ended = run_unsnap(scene)
    assert ended.status == 0, (scene.home / "log").read_text()
    check_gone(scene)
    programs = scene.zfs("program")
    assert len(programs) == 2
    assert {word[0] for words in programs for word in words[10::4]} == {"t"}
    assert ended.run
    assert ended.run.of_job == wanted.key(found())  # as of a backup, a snap or a prune of the job


@root_only
def test_killed_at_every_point(scene: Scene) -> None:
    """Wherever it is killed a recovery gives it up; the next one ends it, and what stays stays."""
    fill(scene)
    run_unsnap(scene)
    fill(scene)
    points = run_unsnap(scene).points
    assert {"journal:pruned#1", "start:zfs program#1", "end:zfs program#2"} <= set(points)
    given_up = 0
    for point in some(points, 6):
        fill(scene)
        assert run_unsnap(scene, at=point).status == -9, point
        recovered = scene.recover()
        assert recovered.raised is None, point
        for run in filter(None, [recovered.run]):
            given_up += 1
            gone = sum(3 - len(days(scene, dataset)) for dataset in SETS)
            assert run.reason == f"it was interrupted; {gone} of 4 were destroyed"
        assert all(1 in days(scene, dataset) for dataset in SETS), point
        assert scene.recover().decisions == []
        if any(days(scene, dataset) != [1] for dataset in SETS):
            assert run_unsnap(scene).status == 0
            check_gone(scene)
    assert given_up > 3


_UNMARKED = "its mark was taken away meanwhile"


@root_only
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"guid": "99"}, "another snapshot has the name now"),
        ({"createtxg": "99"}, "another snapshot has the name now"),
        ({"kept": None}, _UNMARKED),
        ({"transient": "- -"}, _UNMARKED),
        ({"transient": f"{RUNS[0]} inherited from tank/a"}, _UNMARKED),
        ({"transient": RUNS[1]}, _UNMARKED),
        ({"holds": [READER.token]}, "in use meanwhile: held, cloned, mounted or being sent"),
        ({"clones": ["tank/x"]}, "in use meanwhile: held, cloned, mounted or being sent"),
    ],
)
def test_changed_meanwhile(scene: Scene, change: dict[str, Any], reason: str) -> None:
    """Promise 2: what is not proven any more, or is being read by now, stays and is told."""
    fill(scene)
    ended = run_unsnap(scene, before=lambda: changed(scene, **change))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("partial", f"{name('tank/a', 0)}: {reason}")
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1], [1]]


@root_only
def test_inherited(scene: Scene) -> None:
    """Promise 2: a mark that was set on the dataset, and is inherited by all in it, is none."""
    fill(scene)
    changed(scene, transient=f"{RUNS[0]} inherited from tank/a")
    ended = run_unsnap(scene)
    assert ended.run
    assert (ended.run.outcome, len(ended.run.volumes)) == ("completed", 3)  # it was never chosen
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1], [1]]


@root_only
def test_taken_meanwhile(scene: Scene) -> None:
    """What is taken while it is chosen is known as what it is: the journal is asked last."""
    fill(scene)
    scene.play(datasets=dict.fromkeys(SETS, "filesystem"))

    def choose(_: Ended) -> Choice:
        def snaps() -> dict[str, Snap]:
            listed = any("snapshot" in words for words in scene.zfs("get"))
            return {RUNS[0]: Snap(listed, is_transient=True)}

        now = datetime.now(UTC)
        return unsnapping.choose(
            REQUEST, policy=ALL, pattern=PATTERN, zfs=Zfs(), snaps=snaps, now=now
        )

    ended = scene.prune(choose, transient=True)
    assert ended.status == 0, (scene.home / "log").read_text()
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1], [0, 1]]


@root_only
def test_read_by_a_run(scene: Scene) -> None:
    """A moment that a run holds one of stays whole; once it is released, it goes."""
    fill(scene)
    changed(scene, holds=[READER.token])
    run_unsnap(scene)
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1], [0, 1]]
    changed(scene, holds=[])
    run_unsnap(scene)
    assert [days(scene, dataset) for dataset in SETS] == [[1], [1]]


@root_only
def test_pool_goes_away(scene: Scene) -> None:
    """Promise 2: "not found" is not "gone", also here."""
    fill(scene, faults={"program": "export"})
    ended = run_unsnap(scene)
    assert isinstance(ended.raised, EffectError)
    assert ended.raised.message == "pool tank is not imported"
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1, 2]] * 2


@root_only
def test_journal_is_full(scene: Scene) -> None:
    """Promise 10: an interrupted one that finds no row for its end waits, and is then given up."""
    fill(scene)
    assert run_unsnap(scene, at="end:zfs program#1").status == -9

    @contextmanager
    def scarce(journal: Journal, run: Run) -> Iterator[Change]:
        with change(journal, run) as made:
            yield made
            raise JournalFullError("no space left for the journal")

    change = Journal.change
    scene.changes.append(lambda: setattr(Journal, "change", scarce))
    raised = scene.recover().raised
    assert isinstance(raised, WaitingError)
    assert raised.message.endswith(" waits: no space left for the journal")
    assert "`atomtx recover`" in str(raised.hint)
    scene.changes.clear()
    ended = scene.recover()
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("pruned", "partial")


def test_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where channel programs cannot be had both marks are compared before each command."""
    asked: list[tuple[str, ...]] = []
    zfs = Zfs()
    changes: list[dict[str, Any]] = [{}, {"is_transient": False}, {"keeper": RUNS[3]}, {"holds": 1}]
    there = [kept("tank/a", day, **change) for day, change in enumerate(changes)]

    class Done:
        ok = True
        stdout = ""

    class Failed(Done):
        ok = False

    def run(*argv: str) -> Done:
        asked.append(argv)
        return Failed() if argv[1] == "program" else Done()

    monkeypatch.setattr(zfs, "_run", run)
    monkeypatch.setattr(zfs, "kept", lambda _: there)
    monkeypatch.setattr(zfs, "identities", lambda _: {})
    verdicts: dict[str, str] = {}
    for batch in zfs.prune([kept("tank/a", day) for day in range(4)], bookmark=False):
        verdicts |= batch
    words = ("done", "unmarked", "unmarked", "busy")
    assert verdicts == {name("tank/a", day): word for day, word in enumerate(words)}
    assert [argv[2] for argv in asked if argv[1] == "destroy"] == [name("tank/a", 0)]

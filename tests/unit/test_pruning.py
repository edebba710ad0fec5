"""
Which kept snapshots go, and the run that destroys them.

The pools are played (`tests/fakezfs.py`); the rules themselves are in test_retention.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atomtx import names, plan, pruning, wanted
from atomtx.cli.prune import _closing_line
from atomtx.convention import Pattern
from atomtx.errors import EffectError, ExitStatus, UserError
from atomtx.executor import Tell
from atomtx.intents import PruneSnapshots
from atomtx.interrupts import Interrupts
from atomtx.journal import Journal
from atomtx.names import RunId
from atomtx.plan import DatasetFacts, Pool, Request
from atomtx.process import Completed
from atomtx.pruning import Choice
from atomtx.recovery import RollBack
from atomtx.retention import Duration, Policy
from atomtx.settling import status_of
from atomtx.states import Outcome
from atomtx.volumes.kind import Kept
from atomtx.volumes.zfs import Zfs
from tests.extent import some
from tests.runs import a_run
from tests.scene import Ended, Scene

FIRST = datetime(2026, 11, 1, tzinfo=UTC)
POLICY = Policy(last=2)
PATTERN = Pattern.parse("atomtx-%Y%m%d%H%M")
POOLS = [Pool("tank", "guid of tank", "ONLINE"), Pool("zroot", "guid of zroot", "ONLINE")]
REQUEST = Request(("tank/a", "zroot/c"))
SETS = ("tank/a", "zroot/c")
KEEPER = RunId.new()

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="lock F and its folder are root's")


def name(dataset: str, day: int) -> str:
    return f"{dataset}@atomtx-{FIRST + timedelta(days=day):%Y%m%d%H%M}"


def kept(dataset: str, day: int, **values: Any) -> Kept:
    at = int((FIRST + timedelta(days=day)).timestamp())
    made = Kept(name(dataset, day), str(day + 1), str(day + 7), at, KEEPER, 0, ())
    return replace(made, **values)


def found() -> wanted.Wanted:
    facts = [DatasetFacts(n, "filesystem", f"guid of {n}", f"/{n}", "on", True, "-") for n in SETS]
    return wanted.choose(REQUEST, SETS, facts, POOLS)


def judged(
    *there: Kept, policy: Policy = POLICY, adopted: Sequence[str] = (), **options: Any
) -> Choice:
    """Decide, with *options* such as `copies` and `saved`."""
    now = options.pop("now", FIRST + timedelta(days=9))
    return pruning.judge(
        REQUEST, found(), there, policy, PATTERN, adopted, run=RunId.new(), now=now, **options
    )


def going(choice: Choice) -> list[str]:
    return [each.name for each in choice.going]


# -- the choice ------------------------------------------------------------------------------


def test_each_dataset_on_its_own() -> None:
    choice = judged(*(kept("tank/a", day) for day in range(4)), kept("zroot/c", 0))
    assert sorted(going(choice)) == [name("tank/a", 0), name("tank/a", 1)]
    assert len(choice.verdicts) == 5


def test_volume_group_named_as_the_pool() -> None:
    """A dataset and a logical volume of one name are two volumes, each with places of its own."""
    of_lvm = [
        kept("tank/a", day, name=f"tank/a-{day}", origin="tank/a", createtxg=str(day + 50))
        for day in range(2)
    ]
    groups = wanted.by_volume([*of_lvm, *(kept("tank/a", day) for day in range(2))])
    assert [[each.name for each in group] for group in groups] == [
        ["tank/a-1", "tank/a-0"],
        [name("tank/a", 1), name("tank/a", 0)],
    ]


@pytest.mark.parametrize(
    "foreign",
    [
        kept("tank/a", 0, keeper=""),  # of the name, and not marked, or only by inheritance
        kept("tank/a", 0, name="tank/a@daily"),
        kept("tank/a", 0, name="tank/a@atomtx-202611010000x"),
        kept("tank/a", 0, name=f"tank/a@{RunId.new().token}"),  # of --keep-snapshots
        kept("tank/a", 4, is_transient=True),  # the newest: it would take a place
    ],
)
def test_what_is_not_of_the_convention(foreign: Kept) -> None:
    """Neither does it go, nor does it take a place in a rule."""
    choice = judged(foreign, *(kept("tank/a", day) for day in (1, 2, 3)))
    assert going(choice) == [name("tank/a", 1)]
    assert foreign.name not in {verdict.item.name for verdict in choice.verdicts}


def test_clock_that_ran_ahead() -> None:
    """What is in the clock's future stays, and takes the place of none that is not, in any rule."""
    real = [kept("tank/a", day) for day in range(4)]
    ahead = [kept("tank/a", day) for day in range(300, 304)]
    policy = Policy(last=2, hourly=2, daily=2, within=Duration(days=1))
    choice = judged(*real, *ahead, policy=policy)
    assert sorted(going(choice)) == [each.name for each in real[:2]]
    said = reasons(choice)
    assert {said[each.name] for each in ahead} == {"in the future of this machine's clock"}
    alone = judged(*real, policy=policy)
    assert {each.name: said[each.name] for each in real} == reasons(alone)


def test_all_are_ahead() -> None:
    """Also where nothing else is there they stay; a policy that is empty is wrong all the same."""
    there = [kept("tank/a", day) for day in range(4)]
    before = FIRST - timedelta(days=1)
    assert going(judged(*there, now=before)) == []
    with pytest.raises(UserError, match="no rule says"):
        judged(*there, now=before, policy=Policy())


@pytest.mark.parametrize(("seconds", "are_ahead"), [(-1, False), (60, False), (61, True)])
def test_clock_that_is_corrected(seconds: int, are_ahead: bool) -> None:
    """What is not more than a minute ahead is judged by the rules."""
    at = int(FIRST.timestamp())
    there = [kept("tank/a", day, creation_s=at) for day in range(3)]
    choice = judged(*there, now=FIRST - timedelta(seconds=seconds), policy=Policy(last=1))
    assert len(choice.going) == (0 if are_ahead else 2)


@pytest.mark.parametrize("seconds", [2**62, -(2**62)])
def test_no_possible_time(seconds: int) -> None:
    """A time that cannot be, as a stream may bring one, counts as ahead."""
    there = [kept("tank/a", day) for day in range(2)]
    there[0] = replace(there[0], creation_s=seconds)
    choice = judged(*there, policy=Policy(last=1))
    assert going(choice) == []
    said = {v.item.name: v.reasons for v in choice.verdicts}
    assert said[there[0].name] == ("in the future of this machine's clock",)


def test_ahead_is_held_and_not_saved() -> None:
    """All reasons are told; it does not wait for a backup alone."""
    there = [kept("tank/a", 30, holds=1), kept("tank/a", 31)]
    choice = judged(*there, saved={"home": set()})
    ahead = "in the future of this machine's clock"
    assert reasons(choice) == {
        there[0].name: f"{ahead}, held, not saved in home",
        there[1].name: f"{ahead}, not saved in home",
    }
    assert choice.waiting == 0


def test_copies_of_a_clock_ahead() -> None:
    """Copies are pruned by the clock of the machine that has them."""
    there = [kept("tank/a", day, is_copy=True) for day in (0, 1, 2, 300)]
    assert going(judged(*there, copies=True)) == [there[0].name]


def test_adopted() -> None:
    """What the user names counts, whatever its name and whoever took it."""
    foreign = kept("tank/a", 0, name="tank/a@before upgrade", keeper="")
    choice = judged(foreign, kept("tank/a", 1), kept("tank/a", 2), adopted=[foreign.name])
    assert going(choice) == [foreign.name]


def test_copies() -> None:
    """What was received counts only where the user says so; adopted, it is proven by no mark."""
    there = [kept("tank/a", day, is_copy=True) for day in range(4)]
    assert judged(*there).verdicts == ()
    choice = judged(*there, copies=True)
    assert sorted(going(choice)) == [name("tank/a", 0), name("tank/a", 1)]
    assert {each.keeper for each in choice.going} == {there[0].keeper}
    choice = judged(*there, adopted=[each.name for each in there])
    assert [each.keeper for each in choice.going] == ["", ""]


@pytest.mark.parametrize(
    ("values", "reason"), [({"holds": 1}, "held"), ({"clones": ("tank/x",)}, "tank/x")]
)
def test_in_use(values: dict[str, Any], reason: str) -> None:
    """What is held, or cloned from, stays and says why."""
    choice = judged(kept("tank/a", 0, **values), *(kept("tank/a", day) for day in (1, 2, 3)))
    assert going(choice) == [name("tank/a", 1)]
    (verdict,) = (v for v in choice.verdicts if v.item.name == name("tank/a", 0))
    assert reason in " ".join(verdict.reasons)


def reasons(choice: Choice) -> dict[str, str]:
    return {verdict.item.name: ", ".join(verdict.reasons) for verdict in choice.verdicts}


def test_not_saved() -> None:
    """What no rule keeps goes once it is saved, by its guid; what a rule keeps stays anyway."""
    there = [kept("tank/a", day) for day in range(4)]
    choice = judged(*there, saved={"home": {there[0].guid, there[3].guid}})
    assert going(choice) == [there[0].name]
    assert reasons(choice) == {
        there[0].name: "",
        there[1].name: "not saved in home",
        there[2].name: "not saved in home, last snapshot",
        there[3].name: "last snapshot",
    }
    assert [v.item.name for v in choice.verdicts if v.is_waiting] == [there[1].name]


def test_same_name_is_not_saved() -> None:
    """Another snapshot of the name, or of the transaction group, is not the one that was saved."""
    saved = {"home": {kept("tank/a", 0).guid}}
    there = [kept("tank/a", day) for day in range(3)]
    assert going(judged(*there, saved=saved)) == [there[0].name]
    assert going(judged(replace(there[0], guid="99"), *there[1:], saved=saved)) == []
    renamed = replace(there[0], name="tank/a@atomtx-202610010000", createtxg="2")
    assert going(judged(renamed, *there[1:], saved=saved)) == [renamed.name]


def test_saved_in_each() -> None:
    """Of several jobs each must have it; those that lack it are named."""
    there = [kept("tank/a", day) for day in range(5)]
    one, two, three = (each.guid for each in there[:3])
    choice = judged(*there, saved={"home": {one, two}, "far": {one, three}, "off": {one}})
    assert going(choice) == [there[0].name]
    said = reasons(choice)
    assert said[there[1].name] == "not saved in far, not saved in off"
    assert said[there[2].name] == "not saved in home, not saved in off"
    assert going(judged(*there, saved={})) == [each.name for each in there[:3]]


def test_not_saved_and_in_use() -> None:
    """What is held or cloned as well stays for that, too, and waits for no backup alone."""
    held = kept("tank/a", 0, holds=1)
    cloned = kept("tank/a", 1, clones=("tank/x",))
    there = [held, cloned, *(kept("tank/a", day) for day in (2, 3, 4))]
    choice = judged(*there, saved={"home": set()})
    assert going(choice) == []
    said = reasons(choice)
    assert said[held.name] == "held, not saved in home"
    assert said[cloned.name] == "origin of a clone: tank/x, not saved in home"
    assert [v.item.name for v in choice.verdicts if v.is_waiting] == [there[2].name]
    everything = {each.guid for each in there}
    assert going(judged(*there, saved={"home": everything})) == [there[2].name]


def test_adopted_is_not_saved() -> None:
    """What the user names is asked like any other."""
    foreign = kept("tank/a", 0, name="tank/a@before upgrade", keeper="")
    there = [foreign, kept("tank/a", 1), kept("tank/a", 2)]
    assert going(judged(*there, adopted=[foreign.name], saved={"home": set()})) == []
    saved = {"home": {foreign.guid}}
    assert going(judged(*there, adopted=[foreign.name], saved=saved)) == [foreign.name]


@pytest.mark.parametrize("there", [[], [kept("tank/a", 0)]])
def test_empty_policy(there: list[Kept]) -> None:
    """No rule is a mistake, also where there is nothing to destroy."""
    with pytest.raises(UserError, match="no rule says"):
        judged(*there, policy=Policy())


def test_adopted_is_absent() -> None:
    with pytest.raises(UserError, match="no snapshot tank/a@x"):
        pruning._check_adopted(["tank/a@x"], [kept("tank/a", 0)])


def test_adopted_is_not_utf8() -> None:
    """What the journal could not hold is refused before it."""
    name = "0544d686-bc2a-4b36-8920-25649d1a58e5:/th\udceeirs"
    with pytest.raises(UserError, match="is not UTF-8") as caught:
        pruning._check_adopted([name], [kept("tank/a", 0, name=name)])
    assert str(caught.value).isprintable()


def test_intents() -> None:
    """One step a pool, with what proves each snapshot; it survives the journal."""
    from atomtx.intents import from_json

    there = [kept(dataset, day) for dataset in SETS for day in range(4)]
    steps = pruning.intents(judged(*there), bookmark=True)
    assert [step.pool for step in steps] == ["tank", "zroot"]
    assert {len(step.snapshots) for step in steps} == {2}
    assert from_json(steps[0].kind, steps[0].to_json()) == steps[0]
    assert set(pruning._going(steps[0])) == {kept("tank/a", d, creation_s=0) for d in (0, 1)}


# -- the run ---------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    scene.plan(*SETS)
    yield scene
    scene.close()


def fill(scene: Scene, **values: Any) -> None:
    """Put four kept snapshots of each dataset into the pools."""
    snapshots: dict[str, Any] = {
        each.name: {
            "guid": each.guid,
            "createtxg": each.createtxg,
            "creation": str(each.creation_s),
            "mark": None,
            "kept": each.keeper,
            "holds": [],
        }
        for each in (kept(dataset, day) for dataset in SETS for day in range(4))
    }
    scene.play(snapshots=snapshots, bookmarks={}, **values)


def changed(scene: Scene, change: dict[str, Any] | None) -> None:
    """Change the oldest snapshot of the first dataset, or destroy it, behind our back."""
    snapshots = scene.pool["snapshots"]
    found = snapshots.pop(name("tank/a", 0))
    if change is not None:
        snapshots[name("tank/a", 0)] = found | change
    scene.play(snapshots=snapshots)


def prune(scene: Scene, at: str = "", **options: Any) -> Ended:
    return scene.prune(lambda _: judged(*Zfs().kept(SETS)), at, **options)


def days(scene: Scene, dataset: str) -> list[int]:
    there = scene.pool["snapshots"]
    return [day for day in range(4) if name(dataset, day) in there]


def check_pruned(scene: Scene) -> None:
    """The two oldest of each are gone, with a bookmark each; the run is at its end."""
    assert [days(scene, dataset) for dataset in SETS] == [[2, 3], [2, 3]]
    expected = [name(dataset, day).replace("@", "#") for dataset in SETS for day in (0, 1)]
    assert sorted(scene.pool["bookmarks"]) == sorted(expected)
    (run,) = scene.rows("SELECT * FROM runs ORDER BY started_at DESC LIMIT 1")
    assert (run["verb"], run["state"], run["outcome"]) == ("prune", "pruned", "completed")
    assert scene.rows("SELECT * FROM steps WHERE outcome IS NULL") == []


@root_only
def test_course(scene: Scene) -> None:
    fill(scene)
    ended = prune(scene)
    assert ended.status == 0, (scene.home / "log").read_text()
    check_pruned(scene)
    assert len(scene.zfs("program")) == 2
    assert ended.run
    assert status_of(ended.run) is ExitStatus.COMPLETED


@root_only
def test_killed_at_every_point(scene: Scene) -> None:
    """
    Wherever it is killed, a recovery gives it up, and tells how many are gone.

    The next one comes to the same end: what no rule keeps is gone, and no more.
    """
    fill(scene)
    prune(scene)
    fill(scene)
    points = prune(scene).points
    assert {"journal:pruned#1", "start:zfs program#1", "end:zfs program#2"} <= set(points)
    given_up = 0
    for point in some(points, 6):
        fill(scene)
        assert prune(scene, at=point).status == -9, point
        recovered = scene.recover()
        assert recovered.raised is None, point
        for run in filter(None, [recovered.run]):
            given_up += 1
            gone = sum(4 - len(days(scene, dataset)) for dataset in SETS)
            assert run.state == "pruned"
            assert run.outcome == ("partial" if gone else "rolled-back")
            assert run.reason == f"it was interrupted; {gone} of 4 were destroyed"
        assert scene.recover().decisions == []
        if any(days(scene, dataset) != [2, 3] for dataset in SETS):
            assert prune(scene).status == 0
            check_pruned(scene)
    assert given_up > 3


@root_only
def test_rollback(scene: Scene) -> None:
    """At a user's word the same, and that is what is said."""
    fill(scene)
    prune(scene, at="end:zfs program#1")
    (decision,) = scene.recover(rollback=True).decisions
    assert isinstance(decision, RollBack)
    assert [days(scene, dataset) for dataset in SETS] == [[2, 3], [0, 1, 2, 3]]
    (run,) = scene.rows("SELECT * FROM runs")
    assert (run["state"], run["outcome"]) == ("pruned", "partial")
    assert run["reason"] == "at the user's word; 2 of 4 were destroyed"


@root_only
def test_kept_ones_are_gone(scene: Scene) -> None:
    """What was to stay is gone after a crash, as by `zfs rollback -r`: then the others stay."""
    fill(scene)
    prune(scene, at="end:zpool list#1")
    snapshots = scene.pool["snapshots"]
    for day in (2, 3):
        del snapshots[name("tank/a", day)]
    scene.play(snapshots=snapshots)
    assert scene.recover().raised is None
    assert days(scene, "tank/a") == [0, 1]


@root_only
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"guid": "99"}, "another snapshot has the name now"),
        ({"createtxg": "99"}, "another snapshot has the name now"),
        ({"kept": None}, "its mark was taken away meanwhile"),
        ({"holds": ["mine"]}, "in use meanwhile: held, cloned, mounted or being sent"),
        ({"clones": ["tank/x"]}, "in use meanwhile: held, cloned, mounted or being sent"),
    ],
)
def test_changed_meanwhile(scene: Scene, change: dict[str, Any], reason: str) -> None:
    """Promise 2: what is not proven any more stays, whatever was decided."""
    fill(scene)
    ended = prune(scene, before=lambda: changed(scene, change))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("partial", f"{name('tank/a', 0)}: {reason}")
    assert [days(scene, dataset) for dataset in SETS] == [[0, 2, 3], [2, 3]]
    assert status_of(ended.run) is ExitStatus.PARTIAL


@root_only
def test_gone_already(scene: Scene) -> None:
    """What somebody else destroyed is no trouble."""
    fill(scene)
    ended = prune(scene, before=lambda: changed(scene, None))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("completed", None)


def renamed(scene: Scene, **change: Any) -> None:
    """Rename the dataset of the oldest snapshot behind our back."""
    snapshots = scene.pool["snapshots"]
    snapshots[name("tank/z", 0)] = snapshots.pop(name("tank/a", 0)) | change
    scene.play(snapshots=snapshots)


@root_only
def test_renamed(scene: Scene) -> None:
    """What has another name now is still there: it is no snapshot that was destroyed."""
    fill(scene)
    ended = prune(scene, before=lambda: renamed(scene))
    assert ended.run
    assert ended.run.outcome == "partial"
    assert ended.run.reason == f"{name('tank/a', 0)}: it has another name now"
    assert status_of(ended.run) is ExitStatus.PARTIAL
    details = [row["detail"] for row in scene.rows("SELECT * FROM steps")]
    assert sorted(details, key=str) == ["1 renamed", None]


@root_only
def test_copy_of_one_that_is_gone(scene: Scene) -> None:
    """One that was received into its pool has its guid, and is another: what is gone is gone."""
    fill(scene)
    ended = prune(scene, before=lambda: renamed(scene, createtxg="99"))
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("completed", None)


@root_only
def test_renamed_before_a_recovery(scene: Scene) -> None:
    """Nor does a recovery count it among those that are gone."""
    fill(scene)
    prune(scene, at="end:zfs program#2")
    snapshots = scene.pool["snapshots"]
    snapshots[name("tank/z", 0)] = {
        "guid": "1", "createtxg": "7", "creation": "0", "mark": None, "kept": None, "holds": []
    }  # fmt: skip
    scene.play(snapshots=snapshots)
    scene.recover()
    (run,) = scene.rows("SELECT * FROM runs")
    assert run["reason"] == "it was interrupted; 3 of 4 were destroyed"


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (("done", "no-bookmark"), "2 kept snapshots destroyed, 2 stay"),
        (("done", "absent"), "1 kept snapshot destroyed, 1 was gone already, 2 stay"),
        (("absent", "absent"), "0 kept snapshots destroyed, 2 were gone already, 2 stay"),
    ],
)
def test_told_in_the_end(verdicts: Sequence[str], words: str) -> None:
    """What somebody else destroyed is not said to be our work."""
    choice = judged(*(kept("tank/a", day) for day in range(4)))
    told = dict(zip(going(choice), verdicts, strict=True))
    run = replace(a_run(), outcome=Outcome.COMPLETED, reason=None)
    assert words in _closing_line(run, choice, told, 1.0, "kept snapshot")


@root_only
@pytest.mark.parametrize(
    ("pools", "trouble"),
    [
        ({}, "pool tank is not imported"),
        ({"tank": "another"}, "the pool tank that is imported is another one"),
    ],
)
def test_pool_is_not_there(scene: Scene, pools: dict[str, str], trouble: str) -> None:
    """In a pool that is not there nothing is gone, nor is anything destroyed: it has failed."""
    fill(scene)
    ended = prune(scene, before=lambda: scene.play(pools=pools | {"zroot": "guid of zroot"}))
    assert isinstance(ended.raised, EffectError)
    assert ended.raised.message == trouble
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1, 2, 3]] * 2
    (run,) = scene.rows("SELECT * FROM runs")
    assert (run["state"], run["outcome"]) == ("pruned", "rolled-back")


@root_only
def test_pool_goes_away(scene: Scene) -> None:
    """Promise 2: "not found" is not "gone", also in a pool that was there a moment ago."""
    fill(scene, faults={"program": "export"})
    ended = prune(scene)
    assert isinstance(ended.raised, EffectError)
    assert ended.raised.message == "pool tank is not imported"
    (run,) = scene.rows("SELECT * FROM runs")
    assert (run["state"], run["outcome"]) == ("pruned", "rolled-back")
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1, 2, 3]] * 2


@root_only
def test_recovered_without_its_pool(scene: Scene) -> None:
    """Where the pool cannot be asked it is given up all the same, and nothing is claimed."""
    fill(scene)
    prune(scene, at="end:zfs program#1")
    scene.play(pools={})
    ended = scene.recover()
    assert ended.run
    assert ended.run.outcome == "partial"
    assert ended.run.reason == "it was interrupted; it is not known how many of 4 were destroyed"


@root_only
def test_error_of_one(scene: Scene) -> None:
    """An error that nobody knows keeps one from its end; the others are destroyed and counted."""
    fill(scene, faults={"program": "eio"})
    ended = prune(scene)
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("pruned", "partial")
    assert ended.run.reason == f"{name('tank/a', 0)}: ZFS answered error 5"
    assert [days(scene, dataset) for dataset in SETS] == [[0, 2, 3], [2, 3]]


@root_only
def test_no_room_for_bookmarks(scene: Scene) -> None:
    """Where a bookmark finds no room the snapshot goes all the same: that is what makes room."""
    fill(scene, faults={"program": "full"})
    ended = prune(scene)
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("completed", None)
    assert scene.pool["bookmarks"] == {}
    details = [row["detail"] for row in scene.rows("SELECT * FROM steps")]
    assert details == ["2 no-bookmark"] * 2


@root_only
def test_interrupted(scene: Scene) -> None:
    """A signal ends it between two pools; what is left stays, and the journal says how many."""
    fill(scene)
    ended = prune(scene, before=lambda: signal.raise_signal(signal.SIGTERM))
    assert ended.interrupted == "interrupted by SIGTERM"
    (run,) = scene.rows("SELECT * FROM runs")
    assert (run["state"], run["outcome"]) == ("pruned", "rolled-back")
    assert [days(scene, dataset) for dataset in SETS] == [[0, 1, 2, 3]] * 2


@root_only
def test_abandon(scene: Scene) -> None:
    """There is another way out of a prune: nothing has to be cleaned up."""
    from atomtx.settling import abandon

    fill(scene)
    prune(scene, at="end:zpool list#1")

    def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
        abandon(journal, journal.open_runs()[0])

    raised = scene._in_front_end(work, {"at": ""}).raised
    assert isinstance(raised, UserError)
    assert raised.hint
    assert "gives it up" in raised.hint


def test_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where channel programs cannot be had the proof is made before each command."""
    asked: list[tuple[str, ...]] = []
    zfs = Zfs()
    changes: list[dict[str, Any]] = [
        {},
        {"holds": 1},
        {"clones": ("tank/x",)},
        {"guid": "99"},
        {"createtxg": "99"},
        {"keeper": ""},
    ]
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
    wished = [kept("tank/a", day) for day in range(7)]
    verdicts: dict[str, str] = {}
    for batch in zfs.prune(wished, bookmark=True):
        verdicts |= batch
    words = ("done", "busy", "busy", "foreign", "foreign", "unmarked", "absent")
    assert verdicts == {name("tank/a", day): word for day, word in enumerate(words)}
    changed = [argv[1:] for argv in asked if argv[1] != "program"]
    assert changed == [
        ("bookmark", name("tank/a", 0), name("tank/a", 0).replace("@", "#")),
        ("destroy", name("tank/a", 0)),
    ]


def test_one_by_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ZFS says of a pool that is imported read-only is told, and not that it is in use."""
    each = kept("tank/a clone", 0)
    zfs = Zfs()

    def run(*argv: str) -> Completed:
        return Completed(argv, 1, "", f"cannot {argv[1]} {each.name}: pool is read-only\n")

    monkeypatch.setattr(zfs, "_run", run)
    monkeypatch.setattr(zfs, "kept", lambda _: [each])
    monkeypatch.setattr(zfs, "identities", dict.fromkeys)
    (verdicts,) = zfs.prune([each], bookmark=True)
    assert verdicts == {each.name: "error: pool is read-only"}
    why = pruning._why(verdicts[each.name], names.ZFS)
    assert why == "ZFS answered error: pool is read-only"


@pytest.mark.parametrize("is_there", [False, True])
def test_one_by_one_being_sent(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    """Where the snapshot stays, so does no bookmark that was made for its end; another's does."""
    each = kept("tank/a", 0)
    mark = each.name.replace("@", "#")
    bookmarks, sent = ({mark} if is_there else set()), [each.name]
    zfs = Zfs()

    class Done:
        stdout = ""
        stderr = "dataset is busy"

        def __init__(self, ok: bool) -> None:
            self.ok = ok

    def run(*argv: str) -> Done:
        if argv[1] == "bookmark":
            is_new = argv[3] not in bookmarks
            bookmarks.add(argv[3])
            return Done(is_new)
        if argv[1] == "destroy" and argv[2] not in sent:
            bookmarks.discard(argv[2])
            return Done(True)
        return Done(False)  # no channel programs; the snapshot is being sent

    monkeypatch.setattr(zfs, "_run", run)
    monkeypatch.setattr(zfs, "kept", lambda _: [each])
    monkeypatch.setattr(zfs, "identities", lambda _: dict.fromkeys(sent))
    assert list(zfs.prune([each], bookmark=True)) == [{each.name: "busy"}]
    assert bookmarks == ({mark} if is_there else set())
    sent.clear()
    (verdicts,) = zfs.prune([each], bookmark=True)
    assert verdicts == {each.name: "no-bookmark" if is_there else "done"}
    assert bookmarks == {mark}


def test_steps_are_no_secret_of_the_plan() -> None:
    """A prune needs no client: nothing of one is in its plan."""
    choice = judged(*(kept("tank/a", day) for day in range(3)))
    assert choice.plan.client == plan.NO_CLIENT
    (step,) = pruning.intents(choice, bookmark=False)
    assert isinstance(step, PruneSnapshots)
    assert step.describe() == "destroy 1 kept snapshot of pool tank"

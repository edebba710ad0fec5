"""
Kept snapshots that are brought into a repository: which, in which order, and the runs that do it.

The pools are played (`tests/fakezfs.py`).  Whatever happens to such a run, the snapshots are the
user's: each test of a run ends with a look at all of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import adoption, catchup, history, plan
from atomtx import moment as engine_moment
from atomtx.catchup import KeptMoment
from atomtx.cli import from_snapshots
from atomtx.errors import ExitStatus
from atomtx.executor import Executor, Tell
from atomtx.history import Store
from atomtx.intents import (
    AFTER_SUCCESS,
    AROUND_RUN,
    AROUND_SNAPSHOT,
    DestroySnapshots,
    HoldSnapshots,
    KeepSnapshots,
    MountVolumes,
    RunHook,
    TakeSnapshots,
)
from atomtx.interrupts import Interrupts
from atomtx.journal import Journal
from atomtx.names import RunId
from atomtx.plan import Existing, Plan
from atomtx.records import Run
from atomtx.recovery import Resume, RollBack
from atomtx.settling import front, status_of
from atomtx.statedir import RunFolder
from atomtx.volumes.kind import Kept
from atomtx.volumes.zfs import Zfs
from tests import fakezfs
from tests.extent import some
from tests.runs import a_plan
from tests.scene import NOW, Ended, Scene

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

SETS = ("tank/a", "tank/b")
KEEPER, LATER = RunId.new(), RunId.new()


def kept(dataset: str, moment: int, keeper: str = KEEPER, **values: Any) -> Kept:
    guid = str(1000 * moment + len(dataset) + ord(dataset[-1]))
    name = f"{dataset}@m{moment}"
    return replace(Kept(name, guid, str(10 + moment), moment, keeper, 0, ()), **values)


def chosen(*there: Kept, names: Sequence[str] = SETS, **saved: tuple[str, ...]) -> list[KeptMoment]:
    return list(catchup.choose(a_plan(*names), there, saved))


def snapshots(moment: KeptMoment) -> list[str]:
    return [volume.snapshot for volume in moment.volumes]


def test_no_possible_time() -> None:
    """A clock beyond the years that there can be has the last of them."""
    (moment,) = chosen(*(kept(name, 1, creation_s=2**62) for name in SETS))
    assert f"{moment.at:%Y} {moment.at.tzname()}" == "9999 UTC"


# -- the choice ------------------------------------------------------------------------------


def test_moments() -> None:
    """What one run has kept under one name is a moment; the oldest comes first."""
    found = chosen(
        *(kept(name, 2, LATER) for name in SETS),
        *(kept(name, 1) for name in SETS),
        kept("tank/c", 1),
    )
    assert [snapshots(moment) for moment in found] == [
        ["tank/a@m1", "tank/b@m1"],
        ["tank/a@m2", "tank/b@m2"],
    ]
    assert all(moment.is_missing and moment.lost == () for moment in found)
    assert found[0].volumes[0].existing == Existing(kept("tank/a", 1).guid, "11")
    assert chosen(*(kept(name, 1, is_transient=True) for name in SETS)) == found[:1]


def test_same_second() -> None:
    """Within a second the transaction group tells which was first."""
    one = kept("tank/a", 5, name="tank/a@z")
    two = kept("tank/a", 5, LATER, name="tank/a@a", createtxg="16")
    assert [moment.name for moment in chosen(two, one)] == ["z", "a"]


@pytest.mark.parametrize(
    "foreign",
    [
        kept("tank/a", 1, keeper=""),
        kept("tank/a", 1, is_copy=True),
        kept("tank/a", 1, name=f"tank/a@{KEEPER.token}"),  # of --keep-snapshots
    ],
)
def test_what_does_not_count(foreign: Kept) -> None:
    assert chosen(foreign) == []


def test_not_in_the_moment() -> None:
    """What a job has and a moment lacks is named, and what could not be mounted without it."""
    names = ("tank", "tank/a", "tank/a/b", "tank/c")
    (found,) = chosen(kept("tank", 1), kept("tank/a/b", 1), kept("tank/c", 1), names=names)
    assert snapshots(found) == ["tank@m1", "tank/c@m1"]
    assert list(map(str, found.lost)) == [
        "tank/a is not in the backup: no kept snapshot of that moment",
        "tank/a/b is not in the backup: tank/a, in which it lies, has no kept snapshot of that "
        "moment",
    ]
    (found,) = chosen(kept("tank/a/b", 1), kept("tank/c", 1), names=names)
    assert snapshots(found) == ["tank/a/b@m1", "tank/c@m1"]  # nothing frozen is above them


def test_not_of_one_moment() -> None:
    """Marks that somebody set by hand make no moment, and keep no other from being saved."""
    odd, whole = chosen(kept("tank/a", 1), kept("tank/b", 1, createtxg="99"), kept("tank/a", 2))
    assert (odd.is_missing, whole.is_missing) == (False, True)
    assert "not of one moment" in str(odd.trouble)


def test_saved() -> None:
    """A moment is saved by a run that read all of it, the newest of several."""
    a, b = kept("tank/a", 1), kept("tank/b", 1)
    catch = {a.guid: ("one", "two", "three"), b.guid: ("two", "one", "four")}
    (found,) = catchup.choose(a_plan(*SETS), [a, b], catch)
    assert (found.saved_by, found.is_missing) == ("two", False)
    (found,) = catchup.choose(a_plan(*SETS), [a, b], {a.guid: ("one",), b.guid: ("two",)})
    assert found.is_missing
    (found,) = catchup.choose(a_plan(*SETS), [a], {a.guid: ("one",)})  # b's is pruned
    assert found.saved_by == "one"


def test_unsaved() -> None:
    """Of a moment what the job has is asked for, whichever runs have it, and nothing else is."""
    guids = {"tank/a": "1", "tank/b": "2", "tank/c": "3"}
    of_job = a_plan(*SETS)
    assert catchup.unsaved(of_job, guids, {}) == (SETS, True)
    assert catchup.unsaved(of_job, guids, {"1": ("one",)}) == (("tank/b",), False)
    assert catchup.unsaved(of_job, guids, {"1": ("one",), "2": ("two",)})[0] == ()
    assert catchup.unsaved(of_job, {"tank/b": "2"}, {"1": ("one",)}) == (("tank/b",), True)
    assert catchup.unsaved(of_job, {"tank/c": "3"}, {})[0] == ()


@given(st.sets(st.tuples(st.sampled_from(SETS), st.integers(1, 6)), min_size=1), st.data())
def test_one_run_a_moment(there: set[tuple[str, int]], data: st.DataObject) -> None:
    """In whichever portions: each snapshot is read once, the oldest first, until none is left."""
    pool = [kept(*each, keeper=f"{each[1]:016x}") for each in sorted(there)]
    saved: dict[str, tuple[str, ...]] = {}
    read: list[tuple[int, str]] = []
    for run in range(6):
        moments = catchup.choose(a_plan(*SETS), data.draw(st.permutations(pool)), saved)
        missing = [moment for moment in moments if moment.is_missing]
        for moment in missing[: data.draw(st.integers(1, 3))]:
            made = catchup.plan_of(a_plan(*SETS), moment, run=RunId.new(), is_last=False)
            read += [(moment.created_s, volume.snapshot) for volume in made.volumes]
            saved |= {v.existing.guid: (str(run),) for v in made.volumes if v.existing}
    assert sorted(name for _, name in read) == sorted(each.name for each in pool)
    assert [at for at, _ in read] == sorted(at for at, _ in read)


# -- the plan --------------------------------------------------------------------------------


def of_moment(of_job: Plan, *there: Kept, is_last: bool = False) -> Plan:
    (found,) = catchup.choose(of_job, there, {})
    return catchup.plan_of(of_job, found, run=RunId.new(), is_last=is_last)


def test_plan() -> None:
    """It holds and mounts; nothing in it takes, keeps or destroys a snapshot."""
    of_job = a_plan(*SETS, "zroot/c", keep_snapshots=True, keep_for_s=5, named=("/tank/b", "/x"))
    made = of_moment(of_job, kept("tank/a", 1), kept("tank/b", 1), kept("zroot/c", 1))
    steps = plan.intents(made)
    undos = [step.compensation() for step in steps]
    made_by_us = TakeSnapshots | DestroySnapshots | KeepSnapshots
    assert not any(isinstance(step, made_by_us) for step in (*steps, *undos))
    first = plan.first_intents(made)
    assert [type(step) for step in first] == [HoldSnapshots] * 2
    assert {step.tag for step in first if isinstance(step, HoldSnapshots)} == {
        RunId(made.run).token
    }
    assert (made.job, made.label) == (of_job.job, of_job.label)
    assert (made.keep_snapshots, made.keep_for_s, made.named) == (False, 0, ("/tank/b",))
    assert made.is_of_kept
    assert not of_job.is_of_kept
    assert plan.from_json(plan.to_json(made)) == made


def test_plan_of_a_part() -> None:
    """What is read, bound back and left out follows what the moment has."""
    of_job = a_plan(
        "tank/a", "tank/a/b", "tank/c", live_paths=("/tank/a/x", "/tank/a/b/y", "/tank/c/z")
    )
    made = of_moment(of_job, kept("tank/a/b", 1))
    assert made.targets == ("/tank/a/b",)
    assert made.live_paths == made.excludes == ("/tank/a/b/y",)
    assert [note.partition(" ")[0] for note in made.notes] == ["tank/a", "tank/c"]


@pytest.mark.parametrize("root", ["", "/restic"])
def test_plan_without_a_volume_between(root: str) -> None:
    """What the moment lacks is empty in it: what must stay live there comes back with it all."""
    live = ("/tank/a/b/y", "/tank/a/b/z", "/tank/a/x")
    of_job = a_plan("tank/a", "tank/a/b", live_paths=live, root=root)
    made = of_moment(of_job, kept("tank/a", 1))
    there = () if root else ("/tank/a/b",)
    assert made.live_paths == made.excludes == (*there, "/tank/a/x")


def test_hooks_and_retention() -> None:
    """Nothing is quiesced where nothing is taken; older backups are forgotten once, at the end."""
    hooks = tuple(RunHook(when, ("x",)) for when in (AROUND_RUN, AROUND_SNAPSHOT, AFTER_SUCCESS))
    of_job = a_plan(*SETS, hooks=hooks, retention=("--keep-last", "1"))
    made = of_moment(of_job, kept("tank/a", 1))
    assert [hook.when for hook in made.hooks] == [AROUND_RUN, AFTER_SUCCESS]
    assert made.retention == ()
    assert of_moment(of_job, kept("tank/a", 1), is_last=True).retention == of_job.retention


# -- runs ------------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def keep(scene: Scene, moment: int, *datasets: str) -> None:
    """Have a run of `atomtx snap` keep a moment whose files say which it is."""
    fakezfs.HOME = str(scene.home)
    there = scene.pool["snapshots"]
    for n, dataset in enumerate(datasets):
        name = f"{dataset}@m{moment}"
        there[name] = {
            "guid": str(2**63 + 100 * moment + n),
            "createtxg": str(50 + moment),
            "creation": str(NOW - 9000 + 60 * moment),
            "mark": None,
            "kept": f"{moment:016x}",
            "holds": [],
        }
        shutil.copytree(scene.live(dataset), fakezfs.stored(name), dirs_exist_ok=True)
        Path(fakezfs.stored(name), "file").write_text(f"m{moment}")
    scene.play(snapshots=there)


class _Show:
    """A reporter that tells a front end's test."""

    def __init__(self, tell: Tell) -> None:
        self.step = self.done = tell.step
        self.note = self.warn = tell.warn


def catch_up(
    scene: Scene,
    of_job: Plan,
    at: str = "",
    who: str = "front",
    *,
    limit: int | None = None,
    before: Callable[[], object] = lambda: None,
) -> Ended:
    """Bring what is missing into the repository, in a front end of its own."""

    def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
        def back_up(made: Plan) -> ExitStatus:
            folder = RunFolder.of(scene.state, made.run).make()
            with front(folder) as lock:
                assert lock is not None
                run = journal.begin(made, plan.first_intents(made))
                executor = Executor(journal, folder, front=lock, interrupts=interrupts, tell=tell)
                ended.run = executor.advance(run)
            return status_of(ended.run)

        backlog = from_snapshots.find(of_job, journal.path, limit)
        before()
        show: Any = _Show(tell)
        status = from_snapshots.carry_out(backlog, back_up, interrupts=interrupts, show=show)
        ended.told.append(("status", status))

    return scene._in_front_end(work, {"at": at, "who": who})


def check_untouched(scene: Scene, before: dict[str, Any]) -> None:
    """The snapshots are all there, with their marks and without a hold, and nothing else is."""
    assert scene.pool["snapshots"] == before
    assert [left for left in scene.left() if left not in before] == []
    assert scene.rows("SELECT * FROM steps WHERE outcome IS NULL") == []
    forbidden = "('take-snapshots', 'destroy-snapshots', 'keep-snapshots')"
    assert scene.rows(f"SELECT * FROM steps WHERE kind IN {forbidden}") == []
    assert scene.zfs("program") == scene.zfs("destroy") == scene.zfs("snapshot") == []


def completed(scene: Scene) -> list[str]:
    """Return the first snapshot of each completed run, in the order in which they began."""
    query = (
        "SELECT snapshot FROM runs JOIN volumes ON run = id WHERE n = 0 AND outcome = 'completed' "
        "ORDER BY runs.rowid"
    )
    return [row["snapshot"] for row in scene.rows(query)]


def a_job(scene: Scene, *moments: int, **values: Any) -> tuple[Plan, dict[str, Any]]:
    """Return a job over two datasets with kept moments, and the snapshots."""
    of_job = scene.plan(*SETS, **values)
    for moment in moments:
        keep(scene, moment, *SETS)
    return of_job, scene.pool["snapshots"]


@root_only
def test_course(scene: Scene) -> None:
    """Each moment is a run of its own, the oldest first, of the time of its snapshots."""
    of_job, before = a_job(scene, 2, 1)
    ended = catch_up(scene, of_job)
    assert ended.status == 0, (scene.home / "log").read_text()
    assert ended.said("status") == [ExitStatus.COMPLETED]
    assert scene.copies() == ["m1 m1", "m2 m2"]
    check_untouched(scene, before)
    runs = scene.rows("SELECT * FROM runs ORDER BY rowid")
    assert [(r["state"], r["outcome"], r["attempts"]) for r in runs] == [
        ("destroyed", "completed", 1)
    ] * 2
    assert [r["moment_at"] // 1_000_000 for r in runs] == [NOW - 9000 + 60, NOW - 9000 + 120]
    moves = scene.rows(f"SELECT dest FROM moves WHERE run = '{runs[0]['id']}' ORDER BY rev")
    assert [move["dest"] for move in moves] == [
        "snapshotted", "mounted", "backing-up", "unmounting", "destroyed",
    ]  # fmt: skip
    assert [words[0] for words in scene.zfs("hold")] == [RunId(r["id"]).token for r in runs]
    assert scene.zfs("release") == scene.zfs("hold")
    again = catch_up(scene, of_job)
    assert again.said("step") == ["nothing to save: 2 kept moments found"]


@root_only
def test_left_out(scene: Scene) -> None:
    """What cannot be saved is told by name and by the status, and keeps no other from it."""
    of_job, _ = a_job(scene, 1, 2)
    odd = scene.pool["snapshots"]
    odd["tank/b@m1"]["createtxg"] = "7"
    scene.play(snapshots=odd)
    why = "m1 is not saved: its snapshots are not of one moment: their createtxg differ"
    for _ in range(2):
        ended = catch_up(scene, of_job)
        assert (ended.said("status"), ended.said("warn")) == ([ExitStatus.PARTIAL], [why])
    assert scene.copies() == ["m2 m2"]
    check_untouched(scene, odd)


@root_only
def test_limit(scene: Scene) -> None:
    """In portions it goes on where it stopped, and a new moment comes in its turn."""
    of_job, _ = a_job(scene, 1, 3)
    ended = catch_up(scene, of_job, limit=1)
    left = "1 kept moment to be saved by the next `atomtx backup --from-snapshots`"
    assert ended.said("warn") == [left]
    keep(scene, 2, *SETS)
    before = scene.pool["snapshots"]
    assert catch_up(scene, of_job, limit=1).said("warn") == [left]
    assert scene.copies() == ["m1 m1", "m2 m2"]
    assert catch_up(scene, of_job, limit=5).said("warn") == []
    assert scene.copies() == ["m1 m1", "m2 m2", "m3 m3"]
    check_untouched(scene, before)


@root_only
@pytest.mark.parametrize("who", ["front", "all"])
def test_killed_at_every_point(scene: Scene, who: str) -> None:
    """
    Wherever it is killed, a recovery and the next call save the moment, once, and leave no hold.

    The snapshots are those of before, to the mark.
    """
    of_job, _ = a_job(scene, 1)
    catch_up(scene, of_job)  # makes the journal
    keep(scene, 2, *SETS)
    points = catch_up(scene, of_job).points
    assert {"journal:snapshotted#1", "journal:destroyed#1"} <= set(points)
    assert {"start:zfs hold#1", "end:zfs release#1"} <= set(points)
    resumed = 0
    for n, point in enumerate(some(points, 7), start=3):
        scene.play(snapshots={})
        keep(scene, n, *SETS)
        before = scene.pool["snapshots"]
        of_runner = point.startswith("runner:") and who == "front"  # then the runner dies there
        assert catch_up(scene, of_job, point, who).status == (0 if of_runner else -9), point
        recovered = scene.recover()
        assert recovered.raised is None, point
        resumed += any(isinstance(decision, Resume) for decision in recovered.decisions)
        check_untouched(scene, before)
        assert catch_up(scene, of_job).status == 0
        check_untouched(scene, before)
        assert completed(scene).count(f"tank/a@m{n}") == 1, point
        assert f"m{n} m{n}" in scene.copies()
    assert resumed > 2


@root_only
def test_rolled_back(scene: Scene) -> None:
    """At the user's word the moment is not saved, and nothing is gone; the next call saves it."""
    of_job, before = a_job(scene, 1)
    for point in ("before:snapshotted#1", "end:zfs hold#1", "journal:backing-up#1"):
        assert catch_up(scene, of_job, point, "all").status == -9
        (decision,) = scene.recover(rollback=True).decisions
        assert isinstance(decision, RollBack)
        check_untouched(scene, before)
    assert catch_up(scene, of_job).said("status") == [ExitStatus.COMPLETED]
    assert completed(scene) == ["tank/a@m1"]
    check_untouched(scene, before)


@root_only
def test_recovery_is_killed_too(scene: Scene) -> None:
    """A killed recovery, and a killed roll-back, are gone on with by the next one."""
    of_job, before = a_job(scene, 1)
    for rollback, at in ((False, "end:zfs hold#1"), (True, "journal:mounted#1")):
        catch_up(scene, of_job, at, "all")
        points = scene.recover(rollback=rollback).points
        scene.run_sql("DELETE FROM runs")
        assert "end:zfs release#1" in points
        for point in some(points, 4):
            catch_up(scene, of_job, at, "all")
            assert scene.recover(point, "all", rollback=rollback).status == -9, (at, point)
            assert scene.recover(rollback=rollback).raised is None
            check_untouched(scene, before)
            scene.run_sql("DELETE FROM runs")


def changed(scene: Scene, change: dict[str, Any] | None) -> None:
    """Change the first snapshot behind our back, or destroy it."""
    there = scene.pool["snapshots"]
    found = there.pop("tank/a@m1")
    if change is not None:
        there["tank/a@m1"] = found | change
    scene.play(snapshots=there)


@root_only
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "the kept snapshot tank/a@m1 is gone"),
        ({"guid": "7"}, "tank/a@m1 is another snapshot than the planned one"),
        ({"createtxg": "7"}, "tank/a@m1 is another snapshot than the planned one"),
        ({"guid": "7", "mark": "x", "kept": None}, "tank/a@m1 is another snapshot"),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_changed_meanwhile(
    scene: Scene, change: dict[str, Any] | None, reason: str, killed: bool
) -> None:
    """Promise 2: another snapshot of the name is not read, and keeps all that it has."""
    of_job, _ = a_job(scene, 1, 2)
    at = "end:zfs hold#1" if killed else ""
    ended = catch_up(scene, of_job, at, before=lambda: changed(scene, change))
    if killed:
        assert scene.recover().raised is None
    else:
        assert ended.said("status") == [ExitStatus.FAILED]
        assert "2 kept moments to be saved" in ended.said("warn")[-1]
    (run,) = scene.rows("SELECT * FROM runs")
    assert (run["state"], run["outcome"]) == (
        "destroyed",
        "rolled-back" if killed else "failed",
    )
    if not killed:
        assert run["reason"].startswith(reason)
    assert scene.copies() == []
    assert scene.rows("SELECT * FROM moves WHERE dest IN ('snapshotted', 'mounted')") == []
    there = scene.pool["snapshots"]
    assert there.get("tank/a@m1", {}).get("guid") == (
        change and change.get("guid", str(2**63 + 100))
    )
    check_untouched(scene, there)
    assert {tuple(each["holds"]) for each in there.values()} == {()}


@root_only
@pytest.mark.parametrize("point", ["journal:snapshotted#1", "journal:backing-up#1"])
def test_renamed(scene: Scene, point: str) -> None:
    """A hold follows its snapshot: it is found by guid, and released, whoever has the name now."""
    of_job, _ = a_job(scene, 1)
    catch_up(scene, of_job, point, "all")
    there = scene.pool["snapshots"]
    there["tank/new@m1"] = there.pop("tank/a@m1")
    there["tank/a@m1"] = there["tank/new@m1"] | {"guid": "7", "mark": None, "holds": ["theirs"]}
    scene.play(snapshots=there)
    ended = scene.recover()
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("rolled-back", "tank/a@m1 is another one now")
    after = scene.pool["snapshots"]
    assert after["tank/a@m1"] == there["tank/a@m1"]
    assert after["tank/new@m1"] == there["tank/new@m1"] | {"holds": []}
    check_untouched(scene, after)


def swapped(scene: Scene) -> None:
    """Rename the first snapshot, and give its name to another one."""
    there = scene.pool["snapshots"]
    there["tank/a@old"] = there.pop("tank/a@m1")
    there["tank/a@m1"] = there["tank/a@old"] | {"guid": "7", "holds": []}
    scene.play(snapshots=there)


@root_only
def test_swapped_before_the_mount(scene: Scene) -> None:
    """A hold keeps nobody from renaming: what was mounted is compared again, and not read."""
    of_job, before = a_job(scene, 1)

    real = engine_moment.mount_intent

    def mount_intent(journal: Journal, run: Run) -> MountVolumes:
        swapped(scene)
        return real(journal, run)

    scene.changes.append(lambda: setattr(engine_moment, "mount_intent", mount_intent))
    ended = catch_up(scene, of_job)
    assert ended.run
    reason = "tank/a@m1 is another snapshot than the planned one"
    assert (ended.run.outcome, ended.run.reason) == ("failed", reason)
    assert scene.copies() == []
    after = scene.pool["snapshots"]
    assert after["tank/a@old"] == before["tank/a@m1"]
    assert after["tank/a@m1"] == before["tank/a@m1"] | {"guid": "7"}
    check_untouched(scene, after)


@root_only
def test_pool_is_away(scene: Scene) -> None:
    """Where the pool is away nothing is gone: recovery waits, and then ends it."""
    of_job, before = a_job(scene, 1)
    catch_up(scene, of_job, "journal:mounted#1", "all")
    pools = scene.pool["pools"]
    scene.play(pools={})
    assert "not imported" in str(scene.recover().raised)
    assert "not imported" in str(scene.recover(rollback=True).raised)
    scene.play(pools=pools)
    assert scene.recover().raised is None
    assert completed(scene) == ["tank/a@m1"]
    check_untouched(scene, before)


@root_only
def test_scan(scene: Scene) -> None:
    """Where the journal is lost nothing is adopted: a kept snapshot bears no mark of a run."""
    of_job, before = a_job(scene, 1)
    catch_up(scene, of_job, "journal:mounted#1", "all")
    found: list[Any] = []

    def work(_: Journal, __: Tell, ___: Interrupts, ended: Ended) -> None:
        ended.told.append(("strays", adoption.scan(Zfs(), ())))

    found = scene._in_front_end(work, {"at": ""}).said("strays")
    assert found == [[]]
    scene.recover(rollback=True)
    check_untouched(scene, before)


@root_only
def test_client_fails(scene: Scene) -> None:
    """After a moment that failed none is begun, and it is tried again by the next call."""
    of_job, before = a_job(scene, 1, 2, keep_for_s=600, client="played")
    scene.behave("exit 75")
    ended = catch_up(scene, of_job)
    assert ended.said("status") == [ExitStatus.FAILED]
    assert len(scene.rows("SELECT * FROM runs")) == 1
    check_untouched(scene, before)
    scene.behave('cat "$1/file"; exit 3')
    assert catch_up(scene, of_job, limit=1).said("status") == [ExitStatus.PARTIAL]
    scene.behave("")
    catch_up(scene, of_job)
    assert scene.copies() == ["m2 m2"]  # what is partial is there
    check_untouched(scene, before)


@root_only
def test_empty_then(scene: Scene) -> None:
    """A dataset that was empty at an older moment was not emptied since the last backup."""
    of_job, before = a_job(scene, 1, 2)
    live = scene.backup(scene.plan(*SETS))
    assert live.run
    assert live.run.outcome == "completed"
    for name in SETS:
        Path(fakezfs.stored(f"{name}@m1"), "file").unlink()
    Path(fakezfs.stored("tank/a@m2"), "file").unlink()
    assert catch_up(scene, of_job).said("status") == [ExitStatus.COMPLETED]
    assert scene.pool["snapshots"] == before
    (scene.live("tank/a") / "file").unlink()
    emptied = scene.backup(scene.plan(*SETS))
    assert emptied.run
    assert "is empty, and was not in the last completed backup" in str(emptied.run.reason)


@root_only
def test_parent(scene: Scene) -> None:
    """The first moment is compared with the newer backup, the next with what it finds by time."""
    of_job, _ = a_job(scene, 1, 2, client="played")
    scene.backup(scene.plan(*SETS, client="played"))
    catch_up(scene, of_job)
    (row,) = scene.rows("SELECT backup_id FROM backups ORDER BY rowid LIMIT 1")
    parents = [call[2].split()[-1] for call in scene.calls()]
    assert parents == ["None", row["backup_id"], "None"]


@root_only
def test_journal_tells(scene: Scene) -> None:
    """What is saved is known by guid, in its repository alone; freshness is that of the moment."""
    of_job, before = a_job(scene, 1)
    path = scene.state / "journal.db"
    scene.backup(scene.plan(*SETS))
    (live,) = (each.id for each in history.runs(path))
    last = history.last_moment(path, of_job.job)
    catch_up(scene, of_job)
    store = history.store_of(of_job.job, asdict(of_job.client))
    guid = before["tank/a@m1"]["guid"]
    (run,) = scene.rows("SELECT id FROM runs ORDER BY rowid DESC LIMIT 1")
    assert history.saved(path, store)[guid] == (run["id"],)
    assert "7" not in history.saved(path, store)
    for other in (Store("repo", ""), replace(store, client="borg"), replace(store, words="[]")):
        assert guid not in history.saved(path, other)
    assert history.last_moment(path, of_job.job) == last
    (job,) = history.jobs(path)
    assert job.completed
    assert job.completed.moment_at == last
    scene.forget(f"id != '{live}'")
    assert [each.id for each in history.runs(path)] == [live]
    catch_up(scene, of_job)
    (run,) = scene.rows("SELECT id FROM runs ORDER BY rowid DESC LIMIT 1")
    assert history.saved(path, store)[guid] == (run["id"],)  # forgotten, and saved once more
    scene.run_sql(f"UPDATE runs SET outcome = 'partial' WHERE id = '{run['id']}'")
    assert guid in history.saved(path, store, partial=True)
    assert guid not in history.saved(path, store)


def of_client(**values: Any) -> Callable[[Plan], Plan]:
    return lambda of_job: replace(of_job, client=replace(of_job.client, **values))


def saved_by(scene: Scene, of_job: Plan) -> dict[str, tuple[str, ...]]:
    """Return what the journal knows as saved where this one's backups go."""
    store = history.store_of(of_job.job, asdict(of_job.client))
    return history.saved(scene.state / "journal.db", store)


DEST = (("DEST", "/mnt/one"), ("PATH", "/bin"), ("https_proxy", "one"))


@root_only
@pytest.mark.parametrize(
    "other",
    [
        of_client(extra=("--to=/mnt/two",)),
        of_client(environment=(("DEST", "/mnt/two"),)),
        of_client(environment=()),
        of_client(credentials=(("DEST_OF", "file:/two"),)),
        of_client(cwd="/mnt/two"),
        lambda of_job: replace(of_job, job="job two"),
        lambda of_job: replace(of_job, job="typed"),
    ],
)
def test_command_elsewhere(scene: Scene, other: Callable[[Plan], Plan]) -> None:
    """What a command saved by one job, or with one argument or variable, no other has."""
    of_job, _ = a_job(scene, 1)
    of_job = of_client(environment=DEST)(replace(of_job, job="job one"))
    catch_up(scene, of_job)
    assert len(saved_by(scene, of_job)) == 2
    assert saved_by(scene, other(of_job)) == {}


@root_only
@pytest.mark.parametrize(
    ("first", "second"), [("job one", "job one"), ("key of a", "key of a and b")]
)
def test_command_again(scene: Scene, first: str, second: str) -> None:
    """What a login and a timer have each their own of is no other place, nor is a new dataset."""
    of_job, _ = a_job(scene, 1)
    of_job = of_client(environment=DEST)(replace(of_job, job=first))
    catch_up(scene, of_job)
    service = (("DEST", "/mnt/one"), ("LANG", "C"), ("PATH", "/usr/bin"))
    again = of_client(environment=service, version="2.0")(replace(of_job, job=second))
    assert len(saved_by(scene, again)) == 2

"""Cleaning: what is not found is gone only where the pool itself is there to be asked."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from atomtx import cleaning, locks, plan, probing, states
from atomtx.cleaning import Cleaner
from atomtx.clients.dumps import MARK
from atomtx.errors import EffectError
from atomtx.intents import Intent, RunClient, TakeSnapshots
from atomtx.journal import Journal
from atomtx.plan import Pool
from atomtx.records import Run
from atomtx.statedir import RunFolder, prepare
from atomtx.states import Event
from atomtx.volumes.datasets import Datasets
from atomtx.volumes.kind import Identity
from atomtx.volumes.kinds import Kinds
from atomtx.volumes.zfs import Zfs
from tests.dumps import ID as ID_OF_DUMPS
from tests.runs import CLIENT, OTHER, RUN, a_plan, no_hooks

TANK = Pool("tank", "11", "ONLINE")
NAMES = [v.snapshot for v in a_plan().volumes]


class Machine:
    """Stands for `Zfs`: a pool with snapshots that can be destroyed, and exported."""

    def __init__(self, names: Collection[str] = NAMES, mark: str | None = RUN) -> None:
        self.pool: Pool | None = TANK
        self.there = {name: Identity(name, f"guid of {name}", "7", 5, mark) for name in names}
        self.effects: list[tuple[str, list[str]]] = []

    def pools(self) -> list[Pool]:
        return [self.pool] if self.pool else []

    def identities(self, names: Collection[str]) -> dict[str, Identity]:
        return {n: self.there[n] for n in names if self.pool and n in self.there}

    def marked(self, pools: Collection[str]) -> list[tuple[str, str | None]]:
        return [(i.name, i.mark) for i in self.there.values()]

    def release(self, names: Sequence[str], *, tag: str) -> None:
        if names:
            self.effects.append(("release", list(names)))

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        return {i.name: "done" for i in identities}

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        self.effects.append(("destroy", [i.name for i in identities]))
        found = self.identities([i.name for i in identities])
        verdicts = {i.name: "done" if i.name in found else "absent" for i in identities}
        for name in found:
            del self.there[name]
        return verdicts


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(prepare(tmp_path / "state")) as journal:
        yield journal


def given_up(journal: Journal, the_plan: plan.Plan | None = None, *more: Intent) -> Run:
    """Begin a run, and give it up before any identity is journaled."""
    the_plan = the_plan or a_plan()
    takes = [step for step in plan.intents(the_plan) if isinstance(step, TakeSnapshots)]
    with journal.change(journal.begin(the_plan, takes)) as change:
        for intent in more:
            change.intend(intent)
        change.set(outcome="rolled-back", reason="why")
        change.fire(Event.GIVEN_UP)
    return journal.load(RUN)


def clean(journal: Journal, machine: Machine) -> Run:
    folder = RunFolder.of(journal.state, RUN).make()
    kinds = Kinds({"zfs": Datasets(cast(Zfs, machine))})
    cleaner = Cleaner(journal, folder, kinds, no_hooks(folder), lambda _: None)
    return cleaner.clean(journal.load(RUN))


def test_destroyed(journal: Journal) -> None:
    """What is proven ours is released and destroyed, and its identity was journaled before."""
    given_up(journal)
    machine = Machine()
    run = clean(journal, machine)
    assert run.state == states.DESTROYED
    assert machine.there == {}
    assert [name for name, _ in machine.effects] == ["release", "destroy"]
    assert {v.guid for v in run.volumes} == {f"guid of {name}" for name in NAMES}


def test_gone(journal: Journal) -> None:
    """Promise 4: what is gone already, in a pool that is there, is success."""
    given_up(journal)
    assert clean(journal, Machine([])).state == states.DESTROYED


@pytest.mark.parametrize(
    "pool", [None, Pool("tank", "99", "ONLINE"), Pool("tank", "11", "SUSPENDED")]
)
def test_pool_that_is_away(journal: Journal, pool: Pool | None) -> None:
    """Promise 2: "not found" in a pool that cannot be asked is not "gone": it is parked."""
    given_up(journal)
    machine = Machine([] if pool else NAMES)
    machine.pool = pool
    run = clean(journal, machine)
    assert (run.state, run.cleanup) == (states.UNMOUNTING, "parked")
    assert [step.outcome for step in run.steps] == [None, "parked"]
    again = Machine()
    assert clean(journal, again).state == states.DESTROYED
    assert again.there == {}


def test_pool_that_goes_away(journal: Journal) -> None:
    """Promise 2: also where the pool is exported between the proof and the destroy."""
    given_up(journal)

    class Exported(Machine):
        def release(self, names: Sequence[str], *, tag: str) -> None:
            self.pool = None

    machine = Exported()
    run = clean(journal, machine)
    assert (run.state, run.cleanup) == (states.UNMOUNTING, "parked")
    assert len(machine.there) == len(NAMES)


@pytest.mark.parametrize("lock", ["runner_lock", "client_lock"])
def test_unseen_process(journal: Journal, monkeypatch: pytest.MonkeyPatch, lock: str) -> None:
    """Promise 6: while R or C is held nothing goes, though nobody who holds it can be seen."""
    monkeypatch.setattr(cleaning, "_RUNNER_END_S", 0.0)
    monkeypatch.setattr(probing, "_END_S", 0.0)
    given_up(journal)
    machine = Machine()
    folder = RunFolder.of(journal.state, RUN).make()
    with locks.acquired(getattr(folder, lock)):  # we are not looked at
        run = clean(journal, machine)
    assert (run.state, run.cleanup) == (states.UNMOUNTING, "parked")
    assert machine.effects == []
    assert clean(journal, machine).state == states.DESTROYED


def test_busy_and_unseen(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is busy is parked, with a reason, also where its holds cannot be listed."""
    given_up(journal)
    monkeypatch.setattr(cleaning, "PAUSES_S", ())

    class Busy(Machine):
        def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
            return {identity.name: "busy" for identity in identities}

        def holders(self, names: Collection[str]) -> dict[str, list[str]]:
            raise EffectError("cannot look at the holds: I/O error")

    machine = Busy()
    run = clean(journal, machine)
    assert (run.state, run.cleanup) == (states.UNMOUNTING, "parked")
    assert {step.outcome for step in run.steps} == {None, "parked"}
    (why,) = query(journal, "SELECT detail FROM steps WHERE outcome = 'parked'")
    assert why == (f"{min(NAMES)} and 1 more are busy: cannot look at the holds: I/O error",)


def query(journal: Journal, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(journal.path)) as connection:
        return connection.execute(sql).fetchall()


def test_foreign(journal: Journal) -> None:
    """Promise 2: what has our name but not our mark is neither released nor destroyed."""
    given_up(journal)
    machine = Machine(mark=None)
    assert clean(journal, machine).state == states.DESTROYED
    assert len(machine.there) == len(NAMES)
    assert [names for _, names in machine.effects if names] == []


# -- what a client left half made --------------------------------------------------------------


def dumping(journal: Journal, destination: Path) -> Path:
    """Give up a run whose xfsdump was killed; return the part that it left, beside another's."""
    extra = ("--destination", str(destination))
    client = dataclasses.replace(
        CLIENT, name="xfsdump", command=(), extra=extra, repository=ID_OF_DUMPS
    )
    given_up(journal, a_plan(client=client), RunClient("xfsdump", (), "/"))
    for run in (RUN, OTHER):
        (destination / "a" / f".part-{run}").mkdir(parents=True)
        (destination / "a" / f".part-{run}" / "dump").write_text("half")
    (destination / MARK).write_text(ID_OF_DUMPS)
    return destination / "a"


def test_part_of_a_dump(journal: Journal, tmp_path: Path) -> None:
    """Promise 5: a roll-back leaves no half of a dump behind, and touches no other run's."""
    folder = dumping(journal, tmp_path)
    assert clean(journal, Machine()).state == states.DESTROYED
    assert [path.name for path in folder.iterdir()] == [f".part-{OTHER}"]


def test_part_on_a_disk_that_is_away(journal: Journal, tmp_path: Path) -> None:
    """Promise 14: a destination that is not there is no proof; the snapshots go all the same."""
    folder = dumping(journal, tmp_path)
    (tmp_path / MARK).rename(tmp_path / "elsewhere")
    machine = Machine()
    run = clean(journal, machine)
    assert (run.state, run.cleanup) == (states.UNMOUNTING, "parked")
    assert machine.there == {}
    (tmp_path / MARK).write_text("another-disk")
    assert clean(journal, machine).cleanup == "parked"
    (tmp_path / "elsewhere").rename(tmp_path / MARK)
    assert clean(journal, machine).state == states.DESTROYED
    assert [path.name for path in folder.iterdir()] == [f".part-{OTHER}"]


def test_no_question_without_a_client(journal: Journal) -> None:
    """A run that never began its client waits for no destination."""
    client = dataclasses.replace(CLIENT, name="xfsdump", extra=("--destination", "/absent"))
    given_up(journal, a_plan(client=client))
    assert clean(journal, Machine()).state == states.DESTROYED

"""Promise 10: a disk that is full stops no undo; what cannot be recorded is not said done."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from atomtx import errand, plan, states
from atomtx.cleaning import Cleaner
from atomtx.clients import Backup, End
from atomtx.database import translated
from atomtx.errors import ExitStatus, JournalError, JournalFullError, WaitingError
from atomtx.executor import Executor, Tell
from atomtx.intents import RunClient, TakeSnapshots
from atomtx.interrupts import Interrupts
from atomtx.journal import Change, Journal
from atomtx.records import Run
from atomtx.settling import Settler, status_of
from atomtx.statedir import RunFolder, prepare
from atomtx.states import Event, Outcome
from atomtx.task import end_to_json
from atomtx.volumes.datasets import Datasets
from atomtx.volumes.kinds import Kinds
from atomtx.volumes.zfs import Zfs
from tests.runs import RUN, a_plan, no_hooks
from tests.unit.test_cleaning import NAMES, Machine

FULL = JournalFullError("no space left for the journal")


class Desk:
    """A journal with one run, its folder, and a machine that stands for `Zfs`."""

    def __init__(self, journal: Journal, patch: pytest.MonkeyPatch) -> None:
        self.journal = journal
        self.folder = RunFolder.of(journal.state, RUN).make()
        self.machine = Machine()
        self.said: list[str] = []
        self.full = False  # for every change from now on
        self.full_while: Callable[[], bool] = lambda: self.full
        change = journal.change

        @contextmanager
        def scarce(run: Run) -> Iterator[Change]:
            with change(run) as made:
                yield made
                if self.full_while():
                    raise FULL

        patch.setattr(journal, "change", scarce)

    def begin(self, **values: Any) -> Run:
        made = a_plan(**values)
        takes = [step for step in plan.intents(made) if isinstance(step, TakeSnapshots)]
        return self.journal.begin(made, takes)

    def fire(self, run: Run, event: Event, **columns: Any) -> Run:
        with self.journal.change(run) as change:
            change.set(**columns)
            if event is Event.VOLUMES_MOUNTED:
                change.intend(RunClient("command", (("true",),), "/"))
            change.fire(event)
        return self.journal.load(RUN)

    def backing_up(self, **values: Any) -> Run:
        run = self.fire(self.begin(**values), Event.SNAPSHOTS_TAKEN, moment_at=1)
        run = self.fire(run, Event.VOLUMES_MOUNTED, attempts=1)
        return self.fire(run, Event.CLIENT_STARTED)

    def ended(self, end: End) -> None:
        self.folder.reserve_end()
        self.folder.write_end(end_to_json(end, attempt=1, stopped=None))

    def executor(self) -> Executor:
        tell = Tell(self.said.append, self.said.append)
        executor = Executor(self.journal, self.folder, front=0, interrupts=Interrupts(), tell=tell)
        executor._kinds = executor._cleaner._kinds = self.kinds()
        return executor

    def cleaner(self) -> Cleaner:
        hooks = no_hooks(self.folder)
        return Cleaner(self.journal, self.folder, self.kinds(), hooks, self.said.append)

    def kinds(self) -> Kinds:
        return Kinds({"zfs": Datasets(cast(Zfs, self.machine))})


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with Journal.open(prepare(tmp_path / "state")) as journal:
        yield Desk(journal, monkeypatch)


def test_once_the_snapshots_are_taken(desk: Desk) -> None:
    """Snapshots whose taking finds no row are removed, and the run is not said to have begun."""
    run = desk.begin()
    executor = desk.executor()
    desk.machine.take = lambda *_, **__: None  # type: ignore[attr-defined]
    desk.full = True
    with pytest.raises(JournalFullError):
        executor.advance(run)
    assert desk.machine.there == {}
    assert desk.journal.load(RUN).state == states.PLANNED
    assert "no space left for the journal: removing the snapshots first" in desk.said


def test_our_snapshots_fill_the_disk(desk: Desk) -> None:
    """Where they are what fills it, they go, and then all is recorded."""
    run = desk.backing_up()
    desk.ended(End(Outcome.COMPLETED, backups=(Backup(("/a",), Outcome.COMPLETED),)))
    desk.full_while = lambda: bool(desk.machine.there)
    run = desk.executor().advance(run)
    assert (run.state, run.outcome) == (states.DESTROYED, "completed")
    assert desk.machine.there == {}


def test_end_that_was_only_told(desk: Desk) -> None:
    """An end that found no room is kept in the folder as soon as there is some."""
    run = desk.backing_up()
    end = End(Outcome.COMPLETED)
    executor = desk.executor()
    desk.folder.reserve_end()
    executor._unwritten = end_to_json(end, attempt=1, stopped=None)
    desk.full = True
    with pytest.raises(JournalFullError):
        executor._record_end(run, end)
    assert desk.machine.there == {}
    assert errand.end(desk.folder, 1) == (end, None)


@pytest.mark.parametrize("keep_for_s", [0, 3600])
def test_failure_worth_repeating(desk: Desk, keep_for_s: int) -> None:
    """A retry that finds no row is given up for the room, but not a moment that is to be kept."""
    run = desk.backing_up(retries=1, keep_for_s=keep_for_s)
    desk.ended(End(Outcome.FAILED, "no space left on device", retriable=True))
    desk.full_while = lambda: bool(desk.machine.there)
    executor = desk.executor()
    if keep_for_s:
        with pytest.raises(JournalFullError):
            executor.advance(run)
        assert sorted(desk.machine.there) == sorted(NAMES)
        assert desk.journal.load(RUN).state == states.BACKING_UP
    else:
        run = executor.advance(run)
        assert (run.state, run.outcome) == (states.DESTROYED, "failed")
        assert desk.machine.there == {}


def test_last_commit(desk: Desk) -> None:
    """Where nothing is left but the row that says so, it counts as parked; recover says it."""
    run = desk.fire(desk.backing_up(), Event.CLIENT_ENDED, outcome="completed")
    desk.full = True
    run = desk.cleaner().clean(run)
    assert desk.machine.there == {}
    assert status_of(run) is ExitStatus.PARKED
    assert "everything is removed, but no space left" in desk.said[-1]
    assert desk.journal.load(RUN).state == states.UNMOUNTING
    desk.full = False
    run = desk.cleaner().clean(desk.journal.load(RUN))
    assert (run.state, status_of(run)) == (states.DESTROYED, ExitStatus.COMPLETED)


def test_recovery_waits(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume that finds no row waits for room, and says what makes some; --rollback does."""
    run = desk.fire(desk.begin(), Event.SNAPSHOTS_TAKEN, moment_at=1)
    monkeypatch.setattr(Kinds, "real", lambda *_: desk.kinds())
    desk.machine.locked = lambda *_: []  # type: ignore[attr-defined]
    desk.full_while = lambda: bool(desk.machine.there)
    tell = Tell(desk.said.append, desk.said.append)
    settler = Settler(desk.journal, Interrupts(), tell)
    with pytest.raises(WaitingError, match="no space left for the journal") as caught:
        settler.settle(run)
    assert "--rollback" in str(caught.value)
    assert sorted(desk.machine.there) == sorted(NAMES)
    run = Settler(desk.journal, Interrupts(), tell, rollback=True).settle(run).run
    assert (run.state, run.outcome) == (states.DESTROYED, "rolled-back")
    assert desk.machine.there == {}


@pytest.mark.parametrize(("free", "kind"), [(0, JournalFullError), (1 << 30, JournalError)])
def test_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: type[JournalError]
) -> None:
    """SQLite calls EDQUOT an error of the disk: without room it is no space, else it is not."""
    cause = sqlite3.OperationalError("disk I/O error")
    cause.sqlite_errorname = "SQLITE_IOERR_WRITE"
    result = os.statvfs_result((4096, 4096, 9, free // 4096, free // 4096, 9, 9, 9, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: result)
    with pytest.raises(JournalError) as caught, translated(tmp_path):
        raise cause
    assert type(caught.value) is kind

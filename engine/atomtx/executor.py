"""
Carry a run forward: journal the intent, make the effect, journal the outcome.

`Executor.advance` takes a run from whatever state it is in to `destroyed`: a new run, one that
is resumed and one that is rolled back go through the same few steps, and an interruption only
changes the direction.  Each step is at most one transaction after its effects; what a later
step needs is read from the journal again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from . import errand, locks, moment, plan, states
from .cleaning import Cleaner
from .clients import End, Progress
from .errors import (
    ClientError,
    CredentialError,
    EffectError,
    Interrupted,
    JournalError,
    JournalFullError,
    StaleRunError,
    UserError,
    WaitingError,
)
from .hooks import Hooks
from .intents import (
    AROUND_RUN,
    AROUND_SNAPSHOT,
    BEFORE,
    ApplyRetention,
    EndClient,
    HoldSnapshots,
    MountVolumes,
    RunClient,
    TakeSnapshots,
    UnmountVolumes,
)
from .interrupts import Interrupts
from .journal import Change, Journal
from .launching import environment_of, mended, retention_of
from .mounts import tree
from .probing import end_survivors
from .records import Run, Step
from .recovery import MAX_ATTEMPTS, within_patience
from .statedir import RunFolder
from .states import Event, Outcome
from .task import end_from_json
from .volumes.kind import Identity
from .volumes.kinds import Kinds

_RETRY_S = (10.0, 60.0, 300.0)
_SAVED = (Outcome.COMPLETED, Outcome.PARTIAL)


@dataclass(frozen=True)
class Tell:
    """What the front end shows; each does nothing by default."""

    step: Callable[[str], None] = lambda _: None
    warn: Callable[[str], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None


class Executor:
    """One front end's work on one run; *front* is the descriptor that holds lock F."""

    def __init__(
        self,
        journal: Journal,
        folder: RunFolder,
        *,
        front: int,
        interrupts: Interrupts,
        tell: Tell,
    ) -> None:
        self._journal = journal
        self._folder = folder
        self._front = front
        self._kinds = Kinds.real(front)
        self._interrupts = interrupts
        self._tell = tell
        self._hooks = Hooks(folder, interrupts, step=tell.step, warn=tell.warn)
        self._cleaner = Cleaner(journal, folder, self._kinds, self._hooks, tell.warn, front=front)
        self._errand: errand.Errand | None = None
        self._unwritten: dict[str, Any] | None = None  # the end record that found no room
        self._taken = False  # the snapshots of a planned run are there already
        self._found: dict[str, Identity] = {}  # by this process, since it took them
        self.interrupted: Interrupted | None = None
        self._is_left = False  # interrupted, and kept for `recover`

    # -- the course ------------------------------------------------------------------------

    def advance(self, run: Run) -> Run:
        """
        Take *run* on until it is destroyed, parked, or kept waiting in `snapshotted`.

        Whatever fails before the client's end is a reason to give up and clean up; a signal as
        well, and it is then found in :attr:`interrupted`.  But for a credential that is not there
        the moment is kept: WaitingError.  Where the journal can no longer be written, the hooks
        are undone all the same.
        """
        try:
            return self._advance(run)
        except StaleRunError:
            raise
        except JournalError:
            self._hooks.undo(run, *BEFORE)
            raise

    def _advance(self, run: Run) -> Run:
        steps = {
            states.PLANNED: self._take,
            states.SNAPSHOTTED: self._hold_and_mount,
            states.MOUNTED: self._start,
            states.BACKING_UP: self._await_end,
        }
        try:
            while run.state in steps and not self._is_left:
                run = self._try(steps[run.state], run)
                if run.state == states.SNAPSHOTTED and self._is_kept_waiting(run):
                    return self.undo_hooks(run)
        finally:
            self._dismiss()
        if self._is_left:
            return self.undo_hooks(run)
        if run.state == states.UNMOUNTING:
            self._tell.step("cleaning up")
            run = self._cleaner.clean(self._prepared(run))
        return run

    def _try(self, step: Callable[[Run], Run], run: Run) -> Run:
        try:
            if run.state != states.BACKING_UP:  # else the client runs: it is stopped in order
                self._interrupts.check()
            return step(run)
        except Interrupted as exc:
            self.interrupted = exc
            run = self._journal.load(run.id)
            if self._is_kept(run, exc):
                self._is_left = True
                self._tell.step("stopped; the moment is kept: `atomtx recover` goes on with it")
                return run
            return self.give_up(run, Outcome.ROLLED_BACK, exc.message)
        except StaleRunError:
            raise
        except JournalFullError as exc:
            if run.state == states.BACKING_UP:
                raise  # the client's work is not given up for that: `recover` goes on
            return self.give_up(self._journal.load(run.id), Outcome.FAILED, exc.message)
        except CredentialError as exc:
            raise self._waiting(run, exc) from exc
        except (EffectError, ClientError, UserError) as exc:
            self._tell.warn(str(exc))
            return self.give_up(self._journal.load(run.id), Outcome.FAILED, str(exc))

    def _waiting(self, run: Run, exc: CredentialError) -> WaitingError:
        """Keep the moment for `recover`: a password that is not there now may be in a minute."""
        try:
            self.resume(self._journal.load(run.id))
        finally:  # also where a mount is in use
            self.undo_hooks(self._journal.load(run.id))
        return WaitingError(
            f"run {run.id} ({run.label}) waits: {exc.message}",
            hint="its moment is kept: mend that and run `atomtx recover`, or `recover --rollback`",
        )

    def _is_kept(self, run: Run, exc: Interrupted) -> bool:
        """Tell whether a signal leaves a run for later: SIGTERM, where its plan says so."""
        wanted = run.plan.on_stop == "keep" and exc.signum == signal.SIGTERM
        return wanted and run.state != states.PLANNED

    def give_up(self, run: Run, outcome: Outcome, reason: str) -> Run:
        """Decide that the client will not run again: record why and turn back."""
        self._dismiss()

        def record(change: Change) -> None:
            change.set(outcome=outcome.value, reason=reason)
            for step in run.pending(RunClient):
                change.ended(step, "failed", reason)
            self._hooks.record(change, run)
            for hook in plan.hooks_after(run.plan, outcome):
                change.intend(hook)
            change.fire(Event.GIVEN_UP, reason=reason)

        return self._record_or_make_room(run, record)

    def resume(self, run: Run, *, reason: str | None = None) -> Run:
        """
        Go back to `snapshotted`: the same moment, the client once more.

        With a *reason* the run is kept waiting there.
        """
        if run.state == states.PLANNED:
            self._taken = True
            return self._intend_hooks(run)
        self._cleaner.unmount(run)
        with self._journal.change(run) as change:
            for kind in (MountVolumes, UnmountVolumes, RunClient, EndClient):
                for step in run.pending(kind):
                    change.ended(
                        step, "done" if kind is UnmountVolumes else "not-needed", "resumed"
                    )
            change.set(boot_id=locks.boot_id(), pid=os.getpid(), reason=reason)
            for hook in self._hooks.missing(run):
                change.intend(hook)
            if run.state != states.SNAPSHOTTED:
                change.fire(Event.RESUMED, reason=f"attempt {run.attempts + 1}")
        return self._journal.load(run.id)

    def _prepared(self, run: Run) -> Run:
        """Intend once more what a retention may need that was undone after a crash."""
        if not run.pending(ApplyRetention):
            return run
        try:
            return self._intend_hooks(run)
        except JournalFullError:  # it will say itself what it lacks
            return run

    def _intend_hooks(self, run: Run) -> Run:
        missing = self._hooks.missing(run)
        if not missing:
            return run
        with self._journal.change(run) as change:
            for hook in missing:
                change.intend(hook)
        return self._journal.load(run.id)

    def take_over(self, run: Run) -> Run:
        """
        Undo every hook of a run that is not at work any more, and journal it; idempotent.

        To be called once, before anything else is done about a run of another front end.
        """
        self._hooks.take_over(run)
        return self.undo_hooks(run)

    def undo_hooks(self, run: Run) -> Run:
        """Undo the hooks of a run that nobody goes on with now, and journal it; idempotent."""
        if not self._hooks.has_open(run):
            return run
        self._hooks.undo(run, *BEFORE)
        try:
            with self._journal.change(run) as change:
                self._hooks.record(change, run)
        except JournalFullError:  # an undo bears to be repeated
            return run
        return self._journal.load(run.id)

    def record_end(self, run: Run) -> Run:
        """Journal the client's end that the runner left, if it was not yet."""
        known = errand.end(self._folder, run.attempts)
        assert known
        return self._record_end(run, known[0])

    def _dismiss(self) -> None:
        if self._errand:
            self._errand.dismiss()
            self._errand = None

    # -- planned -> snapshotted ------------------------------------------------------------

    def _take(self, run: Run) -> Run:
        self._hooks.before(run, AROUND_RUN)
        steps = run.pending(TakeSnapshots)
        complaints, took = ([], 0.0) if self._taken else self._take_all(run, steps)
        found = self._kinds.identities(run.plan.volumes)
        moment.check_taken(run, found, [c for c in complaints if c])
        self._found = found
        skew = moment.skew(run, f"within {took:.3f} s")
        if self._taken:  # by a front end that was killed: nobody measured it
            created = [identity.creation_s for identity in found.values()]
            skew = moment.skew(run, f"within {max(created) - min(created) + 1} s")
        with self._journal.change(run) as change:
            for step in steps:
                change.ended(step, "done", skew)
                assert isinstance(step.intent, TakeSnapshots)
                if hold := plan.hold_of(step.intent):
                    change.intend(hold)
            change.identify({n: (i.guid, i.createtxg) for n, i in found.items()})
            moment_s = min(found[v.snapshot].creation_s for v in run.volumes)
            change.set(moment_at=moment_s * 1_000_000)
            self._hooks.record(change, run)
            change.fire(Event.SNAPSHOTS_TAKEN)
        if skew:
            self._tell.step(f"the snapshots are not of one moment: {skew}")
        return self._journal.load(run.id)

    def _take_all(
        self, run: Run, steps: tuple[Step, ...]
    ) -> tuple[list[EffectError | None], float]:
        """Take the snapshots of each pool; return the complaints and the seconds in between."""
        try:
            self._hooks.before(run, AROUND_SNAPSHOT)
            started = datetime.now(UTC)
            complaints = [self._take_pool(step.intent) for step in steps]
            return complaints, (datetime.now(UTC) - started).total_seconds()
        finally:
            self._hooks.undo(run, AROUND_SNAPSHOT)

    def _take_pool(self, intent: object) -> EffectError | None:
        assert isinstance(intent, TakeSnapshots)
        self._tell.step(intent.describe())
        return self._kinds.of(intent.volume_kind).take(intent)

    # -- snapshotted -> mounted ------------------------------------------------------------

    def _hold_and_mount(self, run: Run) -> Run:
        self._hooks.before(run, AROUND_RUN)
        for step in run.pending(HoldSnapshots):
            assert isinstance(step.intent, HoldSnapshots)
            kind = self._kinds.of(step.intent.volume_kind)
            kind.hold(step.intent.snapshots, tag=step.intent.tag)
        self._cleaner.held = self._found
        intent = moment.mount_intent(run)
        run = self._intend_mounts(run, intent)
        launch, task = moment.task_of(self._journal, self._folder, run, intent)
        self._tell.step(intent.describe())
        if intent.root:
            tree.make(intent.mounts, intent.directories, lock=self._front)
        env = environment_of(run.plan.client)
        self._errand = errand.Errand(task, self._folder, env=env, front=self._front)
        try:
            empty = self._errand.mounted()
        except errand.RunnerKilledError as exc:
            return self._mount_again(run, exc)
        roots = {
            m.mountpoint: v.mountpoint for m, v in zip(intent.mounts, run.volumes, strict=True)
        }
        empty = frozenset(roots[path] for path in empty)
        if warning := moment.check_empty(self._journal, run, empty):
            self._tell.warn(warning)
        with self._journal.change(run) as change:
            for step in run.pending(MountVolumes):
                change.ended(step, "done")
            change.saw(empty)
            change.intend(RunClient(run.plan.client.name, launch.commands, launch.cwd))
            change.fire(Event.VOLUMES_MOUNTED)
        return self._journal.load(run.id)

    def _mount_again(self, run: Run, exc: errand.RunnerKilledError) -> Run:
        self._dismiss()
        if run.attempts >= MAX_ATTEMPTS + run.plan.retries:
            raise exc
        self._tell.warn(f"{exc.message}; the snapshots are mounted again")
        return self.resume(run)

    def _intend_mounts(self, run: Run, intent: MountVolumes) -> Run:
        with self._journal.change(run) as change:
            for step in run.pending(HoldSnapshots):
                change.ended(step, "done")
            self._hooks.record(change, run)
            change.set(attempts=run.attempts + 1)
            change.attempt = run.attempts + 1
            change.intend(intent)
        return self._journal.load(run.id)

    # -- mounted -> backing-up -> unmounting -----------------------------------------------

    def _start(self, run: Run) -> Run:
        if self._errand is None:  # nobody holds the mounts any more
            return self.resume(run)
        with self._journal.change(run) as change:
            change.fire(Event.CLIENT_STARTED)
        run = self._journal.load(run.id)
        self._tell.step(f"{run.plan.client.name} reads {', '.join(run.plan.targets)}")
        self._errand.go()
        return run

    def _await_end(self, run: Run) -> Run:
        interruption: Interrupted | None = None
        try:
            errand.wait(
                self._folder,
                self._interrupts,
                self._tell.progress,
                stop_on_signal=True,
                to_be_resumed=lambda exc: self._is_kept(run, exc),
                likely=self._errand.pid if self._errand else None,
            )
        except Interrupted as exc:
            interruption = exc
        self._unwritten = self._errand.unwritten_end() if self._errand else None
        self._dismiss()
        known = self._end(run)
        if interruption and not (known and known[0].outcome in _SAVED):
            raise interruption
        self.interrupted = interruption  # too late: the backup is in the repository
        if known is None:
            return self._after_lost_runner(run)
        end, _ = known
        if not (end.outcome is Outcome.FAILED and end.retriable):
            return self._record_end(run, end)
        retry = run.attempts <= run.plan.retries
        if not retry and not (run.plan.keep_for_s and within_patience(run, _now_us())):
            return self._record_end(run, end)
        try:
            resumed = self.resume(run, reason=None if retry else end.reason)
        except JournalFullError:
            if run.plan.keep_for_s:
                raise  # the moment is worth more to the user than the room
            return self._record_end(run, end)
        return self._again(resumed, end) if retry else resumed

    def _end(self, run: Run) -> tuple[End, int | None] | None:
        """Return how the client of this attempt ended, as the runner wrote or told it."""
        if self._unwritten is None:
            return errand.end(self._folder, run.attempts)
        end, _, stopped = end_from_json(self._unwritten)
        return end, stopped

    def _after_lost_runner(self, run: Run) -> Run:
        end_survivors(run, self._folder, self._tell.warn)
        if run.attempts >= MAX_ATTEMPTS + run.plan.retries:
            return self.give_up(run, Outcome.FAILED, "the runner was killed again and again")
        self._tell.warn("the runner was killed; the client starts again on the same snapshots")
        return self._mended(self.resume(run))

    def _again(self, run: Run, end: End) -> Run:
        pause = _RETRY_S[min(run.attempts, len(_RETRY_S)) - 1]
        self._tell.warn(f"{end.reason}; again in {pause:.0f} s, on the same snapshots")
        self._interrupts.sleep(pause)
        return self._mended(run)

    def _is_kept_waiting(self, run: Run) -> bool:
        return run.reason is not None and run.attempts > run.plan.retries

    def mend(self, run: Run) -> None:
        """Let the client mend what its killed predecessor left in the repository."""
        if run.attempts:
            for line in mended(run.plan.client):
                self._tell.step(line)

    def _mended(self, run: Run) -> Run:
        self.mend(run)
        return run

    def _record_end(self, run: Run, end: End) -> Run:
        end = moment.judged(self._journal, run, end)
        keeps = run.plan.keep_snapshots and end.outcome in _SAVED
        # Of a partial backup too little is known: what it lacks may be in an older one alone.
        whole = end.outcome is Outcome.COMPLETED
        retention = retention_of(run.plan, moment.moment_of(self._journal, run)) if whole else None

        def record(change: Change) -> None:
            failed = end.outcome is Outcome.FAILED
            for step in run.pending(RunClient):
                change.ended(step, "failed" if failed else "done", end.reason)
            change.result(end)
            if keeps:
                for take in run.steps:
                    if isinstance(take.intent, TakeSnapshots):
                        change.intend(moment.kept(take.intent))
            if retention:
                change.intend(retention)
            for hook in plan.hooks_after(run.plan, end.outcome):
                change.intend(hook)
            change.fire(Event.CLIENT_ENDED, reason=end.reason)

        return self._record_or_make_room(run, record, may_destroy=not keeps)

    def _record_or_make_room(
        self, run: Run, record: Callable[[Change], None], *, may_destroy: bool = True
    ) -> Run:
        """
        Journal that the run turns back; on a full disk, undo first and record after.

        Our own snapshot may be what fills the disk (promise 10).  Nothing is lost by the order:
        the client's end is in the run's folder, and each undo is in the journal since its intent.
        """
        try:
            with self._journal.change(run) as change:
                record(change)
        except JournalFullError:
            if not may_destroy:
                raise
            self._tell.warn("no space left for the journal: removing the snapshots first")
            self._cleaner.remove_traces(run)
            self._keep_end()
            with self._journal.change(run) as change:
                record(change)
        return self._journal.load(run.id)

    def _keep_end(self) -> None:
        """Write the end record that found no room before, should the journal find none now."""
        if self._unwritten is not None:
            with suppress(OSError):
                self._folder.write_end(self._unwritten)


def _now_us() -> int:
    return int(datetime.now(UTC).timestamp() * 1e6)

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
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
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
    DestroySnapshots,
    EndClient,
    HoldSnapshots,
    KeepSnapshots,
    MountVolumes,
    RunClient,
    TakeSnapshots,
    UnmountVolumes,
)
from .interrupts import Interrupts
from .journal import Change, Journal, now_us
from .launching import environment_of, mended, retention_of
from .mounts import tree
from .probing import end_survivors
from .records import Run, Step, Volume
from .recovery import MAX_ATTEMPTS, within_patience
from .statedir import RunFolder
from .states import Event, Outcome, Verb
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
        self._hooks = Hooks(folder, interrupts, step=tell.step, warn=tell.warn)
        self._tell = replace(tell, step=self._hooks.step, warn=self._hooks.warn)
        self._cleaner = Cleaner(
            journal, folder, self._kinds, self._hooks, self._tell.warn, front=front
        )
        self._errand: errand.Errand | None = None
        self._unwritten: dict[str, Any] | None = None  # the end record that found no room
        self._is_resumed = False
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
        the moment is kept, and within `--keep-for` for whatever keeps back a run that was resumed:
        WaitingError.  Where the journal can no longer be written, the hooks
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
        steps = self._course(run)
        try:
            while run.state in steps and not self._is_left:
                run = self._try(steps[run.state], run)
                if run.state == states.SNAPSHOTTED and self._is_kept_waiting(run):
                    return self.undo_hooks(run)
        finally:
            self._dismiss()
        if self._is_left:
            return self.undo_hooks(run)
        if run.verb is Verb.SNAP and run.state == states.SNAPSHOTTED:
            return self._keep(run)
        if run.state == states.UNMOUNTING:
            self._tell.step("cleaning up")
            run = self._cleaner.clean(self._prepared(run))
        return run

    def _course(self, run: Run) -> Mapping[str, Callable[[Run], Run]]:
        """Return what is done in each state in which a run can fail, and then turns back."""
        if run.verb is Verb.SNAP:
            return {states.PLANNED: self._take}
        return {
            states.PLANNED: self._hold_kept if run.plan.is_of_kept else self._take,
            states.SNAPSHOTTED: self._hold_and_mount,
            states.MOUNTED: self._start,
            states.BACKING_UP: self._await_end,
        }

    def _try(self, step: Callable[[Run], Run], run: Run) -> Run:
        try:
            if run.state != states.BACKING_UP:  # else the client runs: it is stopped in order
                self._interrupts.check()
            return self._unless_signalled(step, run)
        except Interrupted as exc:
            self.interrupted = exc
            run = self._journal.load(run.id)
            if self._is_kept(run, exc):
                return self._leave(run)
            return self.give_up(run, Outcome.ROLLED_BACK, exc.message)
        except StaleRunError:
            raise
        except JournalFullError as exc:
            if run.state == states.BACKING_UP:
                raise  # the client's work is not given up for that: `recover` goes on
            return self.give_up(self._journal.load(run.id), Outcome.FAILED, exc.message)
        except CredentialError as exc:
            raise self._waiting(run, exc.message) from exc
        except OSError as exc:
            if run.state == states.BACKING_UP:
                raise self._left(run, exc) from exc
            return self._after_failure(run, exc)
        except (EffectError, ClientError, UserError) as exc:
            return self._after_failure(run, exc)

    def _after_failure(self, run: Run, exc: Exception) -> Run:
        """Give the run up; but what keeps back a moment that is kept may be over in a minute."""
        if self._is_taken_up(run):
            raise self._waiting(run, str(exc), reason=str(exc)) from exc
        self._tell.warn(str(exc))
        return self.give_up(self._journal.load(run.id), Outcome.FAILED, str(exc))

    def _is_taken_up(self, run: Run) -> bool:
        """Tell whether a moment is taken up again, before its client, within its `--keep-for`."""
        is_early = run.state in (states.SNAPSHOTTED, states.MOUNTED)
        return self._is_resumed and is_early and _is_patient(run)

    def is_worth_waiting(self, run: Run) -> bool:
        """
        Tell whether a moment waits for who stands in its tree, and new backups of the job with it.

        Not one that a client has failed, but within its `--keep-for`: parked, it blocks none.
        """
        has_ended = run.state == states.BACKING_UP and self._end(run) is not None
        return not has_ended or _is_patient(run)

    def _unless_signalled(self, step: Callable[[Run], Run], run: Run) -> Run:
        """
        Carry out a step; where it fails and a signal came, that is what is raised.

        systemd.kill(5), `control-group`: the command that failed may have got the same one.
        """
        try:
            return step(run)
        except (EffectError, ClientError, UserError):
            self._interrupts.check()
            raise

    def _leave(self, run: Run) -> Run:
        """Leave the moment to `recover`, also where the client's end seems one of its own."""
        self._is_left = True
        if self._failed_unstopped(run):
            try:
                run = self.resume(run, is_excused=True)
            finally:  # also where a mount is in use
                self.undo_hooks(self._journal.load(run.id))
        self._tell.step("stopped; the moment is kept: `atomtx recover` goes on with it")
        return self._journal.load(run.id)

    def _failed_unstopped(self, run: Run) -> bool:
        """Tell whether the client failed before its runner was asked to stop it, but in time."""
        known = self._end(run) if run.state == states.BACKING_UP else None
        if known is None:
            return False
        end, stopped = known
        is_unstopped = stopped != signal.SIGTERM and not end.overdue
        return end.outcome is Outcome.FAILED and is_unstopped

    def _waiting(self, run: Run, message: str, *, reason: str | None = None) -> WaitingError:
        """Keep the moment for `recover`: a password that is not there now may be in a minute."""
        self._dismiss()
        try:
            self.resume(self._journal.load(run.id), reason=reason)
        finally:  # also where a mount is in use
            self.undo_hooks(self._journal.load(run.id))
        return WaitingError(
            f"run {run.id} ({run.label}) waits: {message}",
            hint="its moment is kept: mend that and run `atomtx recover`, or `recover --rollback`",
        )

    def _left(self, run: Run, exc: OSError) -> WaitingError:
        """Leave a client's end that cannot be looked at now, which may be a good one."""
        self._dismiss()
        self.undo_hooks(self._journal.load(run.id))
        return WaitingError(
            f"run {run.id} ({run.label}) waits: how its client ended cannot be read: {exc}",
            hint="`atomtx recover` goes on with it",
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

    def resume(self, run: Run, *, reason: str | None = None, is_excused: bool = False) -> Run:
        """
        Go back to `snapshotted`: the same moment, the client once more.

        With a *reason* the run is kept waiting there.  A client that failed is counted, for
        `--retries`, but where it *is_excused*: its failure is a signal's.  Snapshots of a killed
        front end that cannot be used were never whole: a power cut within LVM's command leaves
        such.
        """
        self._is_resumed = True
        if run.state == states.PLANNED:
            try:
                self._kinds.ready(run.plan.volumes)
            except EffectError as exc:
                return self.give_up(run, Outcome.ROLLED_BACK, str(exc))
            self._taken = True
            return self._intend_hooks(run)
        self._cleaner.unmount(run)
        failure = None if is_excused else self._failure(run)
        of_client = ("failed", failure.reason) if failure else ("not-needed", "resumed")
        with self._journal.change(run) as change:
            for step in run.pending(RunClient):
                change.ended(step, *of_client)
            for kind in (MountVolumes, UnmountVolumes, EndClient):
                for step in run.pending(kind):
                    change.ended(
                        step, "done" if kind is UnmountVolumes else "not-needed", "resumed"
                    )
            change.set(boot_id=locks.boot_id(), pid=os.getpid(), reason=reason)
            self._hooks.record(change, run)
            for hook in self._hooks.missing(run):
                change.intend(hook)
            if run.state != states.SNAPSHOTTED:
                change.fire(Event.RESUMED, reason=moment.again(run))
        return self._journal.load(run.id)

    def _failure(self, run: Run) -> End | None:
        """Return the end of an attempt that failed, and is worth another one."""
        known = self._end(run) if run.state == states.BACKING_UP else None
        return known[0] if known and known[0].retriable else None

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
        if len(found) < len(run.frozen) and not any(complaints):
            self._check_pools(run)
        moment.check_taken(run, found, [c for c in complaints if c])
        self._found = found
        skew = moment.skew(run, f"within {took:.3f} s")
        if self._taken:  # by a front end that was killed: nobody measured it
            skew = moment.skew_of(run, found)
        with self._journal.change(run) as change:
            for step in steps:
                change.ended(step, "done", skew)
                assert isinstance(step.intent, TakeSnapshots)
                if run.verb is Verb.SNAP:
                    change.intend(moment.kept(step.intent))
                elif hold := plan.hold_of(step.intent):
                    change.intend(hold)
            if found:
                change.identify({n: (i.guid, i.createtxg) for n, i in found.items()})
            self._record_moment(change, run, found)
        self._tell_skew(skew)
        if run.read_live:
            self._tell.step(f"not a moment, read as it is from now on: {', '.join(run.read_live)}")
        return self._journal.load(run.id)

    def _check_pools(self, run: Run) -> None:
        """Raise EffectError where a pool cannot be asked: "not found" would not mean "gone"."""
        if trouble := self._kinds.trouble(run.plan.volumes):
            raise EffectError(trouble)

    def _record_moment(self, change: Change, run: Run, found: Mapping[str, Identity]) -> None:
        taken_us = [found[v.snapshot].creation_s * 1_000_000 for v in run.frozen]
        change.set(moment_at=min(taken_us, default=now_us()))
        self._hooks.record(change, run)
        change.fire(Event.SNAPSHOTS_TAKEN)

    def _tell_skew(self, skew: str | None) -> None:
        if skew:
            self._tell.step(f"the snapshots are not of one moment: {skew}")

    def _take_all(
        self, run: Run, steps: tuple[Step, ...]
    ) -> tuple[list[EffectError | None], float]:
        """Take the snapshots of each pool; return the complaints and the seconds in between."""
        try:
            self._hooks.before(run, AROUND_SNAPSHOT)
            started = time.monotonic()
            complaints = [self._take_pool(run, step.intent) for step in steps]
            return complaints, time.monotonic() - started
        finally:
            self._hooks.undo(run, AROUND_SNAPSHOT)

    def _take_pool(self, run: Run, intent: object) -> EffectError | None:
        assert isinstance(intent, TakeSnapshots)
        self._tell.step(intent.describe())
        try:
            return self._kinds.of(intent.volume_kind).take(intent)
        except EffectError:
            # It may have died, and left suspended what the undo of a hook is about to write to.
            self._kinds.mend(run.plan.volumes)
            raise

    def _hold_kept(self, run: Run) -> Run:
        """
        Hold the kept snapshots that the run reads, and see that they are those of the plan.

        Compared once they are held, and again when they are mounted.
        """
        self._hooks.before(run, AROUND_RUN)
        steps = run.pending(HoldSnapshots)
        complaints = [self._try_to_hold(step) for step in steps]
        found = self._kinds.identities(run.plan.volumes)
        moment.check_kept(run, found, [c for c in complaints if c])
        skew = moment.skew_of(run, found)
        with self._journal.change(run) as change:
            for step in steps:
                change.ended(step, "done", skew)
            self._record_moment(change, run, found)
        self._tell_skew(skew)
        return self._journal.load(run.id)

    def _try_to_hold(self, step: Step) -> EffectError | None:
        self._tell.step(step.intent.describe())
        try:
            self._hold(step)
        except EffectError as exc:
            return exc
        return None

    def _hold(self, step: Step) -> None:
        assert isinstance(step.intent, HoldSnapshots)
        kind = self._kinds.of(step.intent.volume_kind)
        kind.hold(step.intent.snapshots, tag=step.intent.tag)

    # -- snapshotted -> kept ---------------------------------------------------------------

    def _keep(self, run: Run) -> Run:
        """
        Make the snapshots of a moment the user's; idempotent.

        Raises WaitingError where that cannot be done, or journaled, now: `recover` goes on.
        """
        try:
            lost = self._keep_all(run)
            self._hooks.undo(run, *BEFORE)
            with self._journal.change(run) as change:
                self._record_kept(change, run, lost)
        except (EffectError, JournalFullError) as exc:
            self.undo_hooks(run)
            raise WaitingError(
                f"run {run.id} ({run.label}) waits: its snapshots are there, and are not marked "
                f"as kept: {exc.message}",
                hint="mend that and run `atomtx recover`",
            ) from exc
        return self._journal.load(run.id)

    def _keep_all(self, run: Run) -> list[str]:
        """Keep all snapshots of the run; return the names of those that are gone, or foreign."""
        verdicts = self._kept(run, self._found or self._kinds.identities(run.plan.volumes))
        gone = [v for v in run.frozen if verdicts.get(v.snapshot, "absent") == "absent"]
        if gone:  # or its dataset was renamed meanwhile
            verdicts |= self._kept(run, self._kinds.renamed(run.id, gone))
        lost = [v.snapshot for v in run.frozen if verdicts.get(v.snapshot) != "done"]
        # "Not found" in a pool that is not there is not "gone" (promise 2).
        if lost and (trouble := self._kinds.trouble(run.plan.volumes)):
            raise EffectError(trouble)
        self._kinds.sweep(run.plan.volumes, run=run.id)
        return lost

    def _kept(self, run: Run, found: Mapping[str, Identity]) -> dict[str, str]:
        """Keep what was found, by the name that it was taken under; return the verdicts by that."""
        verdicts: dict[str, str] = {}
        taken = {volume.snapshot: volume for volume in run.frozen}
        for step in run.pending(KeepSnapshots):
            assert isinstance(step.intent, KeepSnapshots)
            there = [name for name in step.intent.snapshots if name in found]
            known = [_as_taken(taken[name], found[name]) for name in there]
            now = self._kinds.of(step.intent.volume_kind).keep(known, run=run.id)
            verdicts |= {name: now[found[name].name] for name in there}
        return verdicts

    def _record_kept(self, change: Change, run: Run, lost: list[str]) -> None:
        self._hooks.record(change, run)
        for step in run.pending(KeepSnapshots):
            change.ended(step, "done", f"{len(lost)} gone" if lost else None)
        for step in run.pending(DestroySnapshots):
            change.ended(step, "not-needed", "kept")
        reason = None
        if lost:
            more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
            reason = f"{lost[0]}{more}: gone before it was kept"
        whole = Outcome.PARTIAL if len(lost) < len(run.frozen) else Outcome.FAILED
        change.set(outcome=(whole if lost else Outcome.COMPLETED).value, reason=reason)
        change.fire(Event.SNAPSHOTS_KEPT, reason=reason)

    # -- snapshotted -> mounted ------------------------------------------------------------

    def _hold_and_mount(self, run: Run) -> Run:
        self._hooks.before(run, AROUND_RUN)
        for step in run.pending(HoldSnapshots):
            self._hold(step)
        self._kinds.ready(run.plan.volumes)
        self._cleaner.held = self._found
        intent = moment.mount_intent(self._journal, run)
        run = self._intend_mounts(run, intent)
        launch, task = moment.task_of(self._journal, self._folder, run, intent)
        self._tell.step(intent.describe())
        if intent.root:
            tree.make(intent.mounts, intent.directories, lock=self._front)
        env = environment_of(run.plan.client)
        self._errand = errand.Errand(task, self._folder, env=env, front=self._front)
        try:
            seen = self._errand.mounted()
        except errand.RunnerKilledError as exc:
            return self._mount_again(run, exc)
        if run.plan.is_of_kept:  # a hold keeps nobody from renaming
            moment.check_kept(run, self._kinds.identities(run.plan.volumes))
        contents = {
            v.mountpoint: seen[m.mountpoint]
            for m, v in zip(intent.mounts, run.volumes, strict=True)
        }
        for warning in moment.check_empty(self._journal, run, contents):
            self._tell.warn(warning)
        with self._journal.change(run) as change:
            for step in run.pending(MountVolumes):
                change.ended(step, "done")
            change.saw(contents)
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
            self._interrupts.check()  # all may have got the signal: the runner has ended first
        except Interrupted as exc:
            interruption = exc
        self._unwritten = self._errand.unwritten_end() if self._errand else None
        self._dismiss()
        known = self._end(run)
        interruption = interruption or self._told_to_runner(run, known)
        if interruption and not (known and known[0].outcome in _SAVED):
            raise interruption
        self.interrupted = interruption  # too late: the backup is in the repository
        if known is None:
            return self._after_lost_runner(run)
        end, _ = known
        if not (end.outcome is Outcome.FAILED and end.retriable):
            return self._record_end(run, end)
        failures = run.failures + 1
        retry = failures <= run.plan.retries
        if not within_patience(run, now_us(), failures=failures):
            return self._record_end(run, end)
        try:
            resumed = self.resume(run, reason=None if retry else end.reason)
        except JournalFullError:
            if run.plan.keep_for_s:
                raise  # the moment is worth more to the user than the room
            return self._record_end(run, end)
        except EffectError as exc:  # a tree is in use; the client's end is there for `recover`
            if not self.is_worth_waiting(run):
                return self._record_end(run, end)
            self.undo_hooks(self._journal.load(run.id))
            raise WaitingError(
                f"run {run.id} ({run.label}) waits: {exc.message}, after: {end.reason}",
                hint="its moment is kept: mend that and run `atomtx recover`",
            ) from exc
        return self._again(resumed, end) if retry else resumed

    def _end(self, run: Run) -> tuple[End, int | None] | None:
        """Return how the client of this attempt ended, as the runner wrote or told it."""
        if self._unwritten is None:
            return errand.end(self._folder, run.attempts)
        end, _, stopped = end_from_json(self._unwritten)
        return end, stopped

    def _told_to_runner(self, run: Run, known: tuple[End, int | None] | None) -> Interrupted | None:
        """Return the signal that stopped the client without us, where it leaves the run."""
        if known is None or known[0].outcome in _SAVED or known[1] != signal.SIGTERM:
            return None
        exc = Interrupted(signal.SIGTERM)
        return exc if self._is_kept(run, exc) else None

    def _after_lost_runner(self, run: Run) -> Run:
        try:
            end_survivors(run, self._folder, self._tell.warn)
        except WaitingError:
            self.undo_hooks(run)
            raise
        if run.attempts >= MAX_ATTEMPTS + run.plan.retries:
            return self.give_up(run, Outcome.FAILED, "the runner was killed again and again")
        self._tell.warn("the runner was killed; the client starts again on the same snapshots")
        return self._mended(self.resume(run))

    def _again(self, run: Run, end: End) -> Run:
        pause = _RETRY_S[min(run.failures, len(_RETRY_S)) - 1]
        self._tell.warn(f"{end.reason}; again in {pause:.0f} s, on the same snapshots")
        self._interrupts.sleep(pause)
        return self._mended(run)

    def _is_kept_waiting(self, run: Run) -> bool:
        return run.reason is not None and run.failures > run.plan.retries

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
        except JournalFullError as full:
            if not may_destroy:
                self._keep_end()
                raise
            first = "releasing" if run.plan.is_of_kept else "removing"
            self._tell.warn(f"no space left for the journal: {first} the snapshots first")
            self._make_room(run, full)
            with self._journal.change(run) as change:
                record(change)
        return self._journal.load(run.id)

    def _make_room(self, run: Run, full: JournalFullError) -> None:
        """Undo everything; JournalFullError where it cannot be: what is busy has failed no run."""
        try:
            self._cleaner.remove_traces(run)
        except (EffectError, WaitingError, OSError) as exc:
            raise JournalFullError(f"{full.message}; {exc}", hint=full.hint) from exc
        finally:
            self._keep_end()

    def _keep_end(self) -> None:
        """Write the end record that found no room before, should the journal find none now."""
        if self._unwritten is not None:
            with suppress(OSError):
                self._folder.write_end(self._unwritten)


def _is_patient(run: Run) -> bool:
    """Tell whether a run is within its `--keep-for`."""
    # The time alone counts: by its failures a run that no client has failed waits for ever.
    return within_patience(run, now_us(), failures=run.plan.retries + 1)


def _as_taken(volume: Volume, found: Identity) -> Identity:
    """Return the identity that was journaled: what has the name now may be another one."""
    if volume.guid is None or volume.createtxg is None:
        return found
    return replace(found, guid=volume.guid, createtxg=volume.createtxg)

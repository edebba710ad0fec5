"""
A clone at work: hold, send, prove, release; one target after the other.

Nothing is remembered between two steps but what both ends tell when they are asked again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from . import pipeline, replica
from .clients import Progress
from .cloning import TAG, Pair, look
from .errors import EffectError, Interrupted
from .executor import Tell
from .intents import CopySnapshots
from .interrupts import Interrupts
from .journal import Change, Journal
from .names import Dataset, Target
from .pipeline import Stage
from .records import Run
from .replica import Copy, Resume, Source, Transfer
from .states import Event, Outcome
from .volumes import ends
from .volumes.ends import End, UnreachableError
from .words import size

_ADVICE = "Partially received snapshot"  # and how to go on by hand, with a long token


class Cloner:
    """One front end's work on one run; *lock* is the descriptor that holds lock F."""

    def __init__(self, journal: Journal, lock: int, interrupts: Interrupts, tell: Tell) -> None:
        self._journal = journal
        self._lock = lock
        self._here = End(lock)
        self._interrupts = interrupts
        self._tell = tell

    def advance(self, run: Run, *, is_patient: bool = False) -> Run:
        """
        Bring the copies of a run up to date, and end it.

        A dataset or a target that fails does not keep the others from being copied: the run is
        then partial, or failed.  Where it *is_patient*, and a target cannot be reached, it is left
        open for a later try, and UnreachableError is raised once the others were served.  After a
        signal what has arrived stays, and Interrupted is raised once that is journaled.
        """
        ended: dict[int, list[EffectError]] = {}
        try:
            for step in run.pending(CopySnapshots):
                assert isinstance(step.intent, CopySnapshots)
                ended[step.id] = self._step(step.intent)
        except Interrupted as exc:
            self.give_up(run, exc.message)
            raise
        lost = [each for wrong in ended.values() for each in wrong if _is_lost(each)]
        if lost and is_patient:
            raise lost[0]
        with self._journal.change(run) as change:
            _record(change, run, ended)
        return self._journal.load(run.id)

    def _step(self, intent: CopySnapshots) -> list[EffectError]:
        """Bring the copies at one target up to date; return what went wrong with each."""
        there = ends.end_of(Target.parse(intent.target), self._lock, self._interrupts.check)
        self._interrupts.check()
        self._tell.step(intent.describe())
        try:
            pairs = self._copy(intent, there)
        except EffectError as exc:
            self._tell.warn(str(exc))
            return [exc] * len(intent.datasets)
        return [pair.trouble for pair in pairs if pair.trouble]

    def _copy(self, intent: CopySnapshots, there: End) -> list[Pair]:
        pairs = self._hold(intent, look(intent, self._here, there))
        zipped = _zips(intent, pairs, self._here, there)
        pairs = self._send_all(intent, pairs, there, zipped=zipped)
        for trouble in dict.fromkeys(str(pair.trouble) for pair in pairs if pair.trouble):
            self._tell.warn(trouble)
        if any(_is_lost(pair.trouble) for pair in pairs):
            return pairs
        arrived = pairs
        if any(pair.transfers for pair in pairs):
            try:
                arrived = look(intent, self._here, there)
            except EffectError as exc:
                self._tell.warn(str(exc))
                return [_unproven(pair, exc) for pair in pairs]
        self._settle(intent, arrived, there)
        return [_proven(pair, after) for pair, after in zip(pairs, arrived, strict=True)]

    def _hold(self, intent: CopySnapshots, pairs: Sequence[Pair]) -> list[Pair]:
        """Hold what is to be sent, and what that begins at; a snapshot may be gone by now."""
        names = [replica.to_hold(p.source, p.copy, p.transfers) for p in pairs]
        try:
            _hold(self._here, [name for part in names for name in part], intent.tag)
        except EffectError:
            return [
                _held(self._here, pair, part, intent.tag)
                for pair, part in zip(pairs, names, strict=True)
            ]
        return list(pairs)

    # -- the streams -----------------------------------------------------------------------

    def _send_all(
        self, intent: CopySnapshots, pairs: Sequence[Pair], there: End, *, zipped: bool
    ) -> list[Pair]:
        """Send what each copy lacks; a target that is gone concerns all that are left to send."""
        done: list[Pair] = []
        for pair in pairs:
            try:
                done.append(self._pair(intent, pair, there, zipped=zipped))
            except EffectError as exc:
                rest = pairs[len(done) :]
                return [*done, *(_unproven(each, exc) for each in rest)]
        return done

    def _pair(self, intent: CopySnapshots, pair: Pair, there: End, *, zipped: bool) -> Pair:
        """Send what one copy lacks; return the pair, with what went wrong with it alone."""
        if pair.trouble or not pair.transfers:
            return pair
        try:
            if intent.discard and pair.copy.snapshots:
                there.roll_back(pair.copy.snapshots[-1].name)
            for transfer in pair.transfers:
                self._interrupts.check()
                self._send(intent, pair, transfer, there, zipped=zipped)
        except UnreachableError:
            raise
        except EffectError as exc:
            there.require(Dataset(pair.copy.dataset).pool, intent.pool_guid)  # is it there still?
            return replace(pair, trouble=exc)
        return pair

    def _send(
        self, intent: CopySnapshots, pair: Pair, transfer: Transfer, there: End, *, zipped: bool
    ) -> None:
        source, copy = pair.source, pair.copy.dataset
        total = self._here.size(source, transfer)
        about = f", about {size(total)}" if total is not None else ""
        self._tell.step(f"{told(source, transfer)} to {there.shown(copy)}{about}")
        pipeline.carry(
            Stage(f"zfs send {transfer.to.name}", ends.send_argv(source, transfer)),
            _sinks(
                ends.receive_argv(source, copy),
                there,
                copy,
                zipped=zipped and not source.is_encrypted,
            ),
            lock=self._lock,
            rate=intent.rate,
            moved=lambda done: self._tell.progress(_progress(done, total)),
            check=self._interrupts.check,
        )

    # -- afterwards ------------------------------------------------------------------------

    def _settle(self, intent: CopySnapshots, pairs: Sequence[Pair], there: End) -> None:
        """
        Hold the last snapshot that both ends have, here and there, and release all others.

        And give the mark to what has arrived without it.  What cannot be done now, as where the
        user of a target may not hold, is told: the next clone tries again.
        """
        with self._only_told():
            _mark(there, pairs)
        with self._only_told():
            self._settle_holds(intent, pairs, there)

    @contextmanager
    def _only_told(self) -> Iterator[None]:
        try:
            yield
        except EffectError as exc:
            self._tell.warn(str(exc))

    def _settle_holds(self, intent: CopySnapshots, pairs: Sequence[Pair], there: End) -> None:
        """
        Each end by itself: where the target's user may not hold, ours must not pile up.

        That is told; raises EffectError for what cannot be held or released here.
        """
        ours = {n for p in pairs for n in replica.staying(p.source, p.copy, p.token)}
        theirs = {n for p in pairs for n in replica.last_of(p.source, p.copy)}
        # A copy that has nothing in common may be another's, and the hold there as well.
        known = [p for p in pairs if replica.common(p.source, p.copy)]
        absent = [p for p in pairs if not (p.copy.exists or p.may_be_elsewhere)]
        with self._only_told():
            _hold(there, sorted(theirs), TAG)
            _release(there, [p.copy for p in known], theirs, TAG)
        _hold(self._here, sorted(ours), intent.tag)
        _release(self._here, [p.source for p in (*known, *absent)], ours, intent.tag)

    # -- giving up -------------------------------------------------------------------------

    def give_up(self, run: Run, reason: str) -> Run:
        """End the run; what has arrived stays, and what was cut off, for the next clone."""
        with self._journal.change(run) as change:
            for step in run.pending(CopySnapshots):
                change.ended(step, "failed", reason)
            words = f"{reason}; the next clone goes on with what has arrived"
            change.set(outcome=Outcome.ROLLED_BACK.value, reason=words)
            change.fire(Event.GIVEN_UP, reason=reason)
        return self._journal.load(run.id)

    def undo(self, run: Run) -> None:
        """
        Throw away what was cut off at the targets, and release what only that would have needed.

        Raises EffectError where that fails, once it is done at the other targets: UnreachableError
        where one of them cannot be reached, and what failed at others is told.  Idempotent.
        """
        troubles: list[EffectError] = []
        for step in run.pending(CopySnapshots):
            assert isinstance(step.intent, CopySnapshots)
            try:
                self._undo(step.intent)
            except EffectError as exc:
                troubles.append(exc)
        if not troubles:
            return
        first = next(filter(_is_lost, troubles), troubles[0])
        for trouble in troubles:
            if trouble is not first:
                self._tell.warn(str(trouble))
        raise first

    def _undo(self, intent: CopySnapshots) -> None:
        if not intent.pool_guid:
            return
        there = ends.end_of(Target.parse(intent.target), self._lock, self._interrupts.check)
        for pair in look(intent, self._here, there):
            if pair.token and replica.is_of(pair.source, pair.token):
                there.abort(pair.copy.dataset)
        self._settle_holds(intent, look(intent, self._here, there), there)


def _is_lost(trouble: EffectError | None) -> bool:
    return isinstance(trouble, UnreachableError)


# -- programs ----------------------------------------------------------------------------------


def _zips(intent: CopySnapshots, pairs: Sequence[Pair], here: End, there: End) -> bool:
    """Tell whether streams are compressed on their way: to another machine, where both can."""
    if not (there.host and intent.compress):
        return False
    if not any(pair.transfers and not pair.source.is_encrypted for pair in pairs):
        return False
    return here.has_zstd() and there.has_zstd()


def _sinks(receive: tuple[str, ...], there: End, copy: str, *, zipped: bool) -> tuple[Stage, ...]:
    name = f"zfs receive {there.shown(copy)}"
    if not there.host:
        return (Stage(name, receive, may_be_killed=False, advice=_ADVICE),)
    if not zipped:
        return (Stage(name, ends.remote(there.host, receive), advice=_ADVICE),)
    unzip = ("zstd", "-qdc")
    return (
        Stage("zstd", ("zstd", "-qc", "-T0")),
        Stage(name, ends.remote(there.host, unzip, receive), advice=_ADVICE),
    )


def _hold(end: End, names: Sequence[str], tag: str) -> None:
    for part in ends.portions(names):
        end.hold(part, tag=tag)


def _held(end: End, pair: Pair, names: Sequence[str], tag: str) -> Pair:
    try:
        _hold(end, names, tag)
    except EffectError as exc:
        return replace(pair, transfers=(), trouble=pair.trouble or exc)
    return pair


def _mark(there: End, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        for keeper, names in replica.unmarked(pair.source, pair.copy).items():
            for part in ends.portions(names):
                there.mark(part, keeper=keeper)


def _release(end: End, ones: Iterable[Source | Copy], staying: Collection[str], tag: str) -> None:
    held = [point.name for one in ones for point in one.snapshots if point.holds]
    for part in ends.portions([name for name in held if name not in staying]):
        tags = end.holders(part)
        end.release([name for name in part if tag in tags.get(name, ())], tag=tag)


# -- in words, and in the journal --------------------------------------------------------------


def _proven(pair: Pair, after: Pair) -> Pair:
    """Return a pair with its trouble, also where all seemed well and something has not arrived."""
    if pair.trouble:
        return pair
    if after.trouble:
        return replace(pair, trouble=after.trouble)
    if after.transfers:
        missing = after.transfers[-1].to.name
        words = f"{missing} has not arrived in {pair.copy.shown}, though nothing failed"
        return replace(pair, trouble=EffectError(words))
    return pair


def _unproven(pair: Pair, why: EffectError) -> Pair:
    """Return a pair where nobody could be asked what has arrived; what was there before is."""
    return replace(pair, trouble=why) if pair.transfers and not pair.trouble else pair


def told(source: Source, transfer: Transfer) -> str:
    """Return in words what a transfer sends."""
    if isinstance(transfer, Resume):
        return f"the rest of {transfer.to.name}"
    if transfer.base is None:
        return f"all of {transfer.to.name}"
    return f"{source.dataset} {transfer.base.short} to {transfer.to.short}"


def _progress(done: int, total: int | None) -> Progress:
    # The size is ZFS' estimate, and the stream may be a little longer.
    percent = min(100.0, 100.0 * done / total) if total else None
    return Progress(
        percent=percent, bytes_done=done, bytes_total=max(total, done) if total else None
    )


def _record(change: Change, run: Run, ended: Mapping[int, Sequence[EffectError]]) -> None:
    for step in run.pending(CopySnapshots):
        wrong = dict.fromkeys(trouble.message for trouble in ended[step.id])
        change.ended(step, "failed" if wrong else "done", "; ".join(wrong) or None)
    troubles = [trouble.message for wrong in ended.values() for trouble in wrong]
    reason = None
    if troubles:
        others = len(set(troubles)) - 1
        reason = troubles[0] + (f", and {others} more" if others else "")
    outcome = Outcome.COMPLETED
    if troubles:
        is_any = len(troubles) < len(ended) * len(run.volumes)
        outcome = Outcome.PARTIAL if is_any else Outcome.FAILED
    change.set(outcome=outcome.value, reason=reason)
    change.fire(Event.SNAPSHOTS_COPIED, reason=reason)

"""
Kept snapshots that no rule keeps: which they are, and their destruction as a run of its own.

What goes is decided once, and journaled with what proves each of them.  A run has one state before
its end, and a recovery gives it up: what is destroyed cannot be brought back, and about what is
still there the next one decides anew, by what there is then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from . import convention, names, plan, wanted, words
from .convention import Pattern
from .errors import EffectError, Interrupted, UserError
from .intents import PruneSnapshots
from .interrupts import Interrupts
from .inventory import is_utf8
from .journal import Change, Journal
from .lvmio import Lvm
from .mounts import tree
from .names import Dataset, RunId
from .plan import Plan, PlannedVolume, Request
from .records import Run
from .retention import Exempt, Exemption, Item, Policy, Verdict, decide
from .states import Event, Outcome, Verb
from .volumes import btrfs, lvm
from .volumes.datasets import pool_trouble
from .volumes.kind import Kept
from .volumes.zfs import Zfs
from .wanted import Wanted

# By the name of each job that is to have saved what goes, the guids of what it has saved.
Saved = Mapping[str, Collection[str]]
_NO_JOBS: Saved = {}
_CLOCK_SLACK = timedelta(minutes=1)  # a clock that is set by the network is moved by less


@dataclass(frozen=True)
class Choice:
    """What is to be pruned, and what stays, and why: a verdict on each snapshot."""

    plan: Plan
    verdicts: tuple[Verdict, ...]  # of one dataset after the other, the newest first
    going: tuple[Kept, ...]

    @property
    def waiting(self) -> int:
        """How many stay for nothing but that they are not saved yet."""
        return sum(verdict.is_waiting for verdict in self.verdicts)


def choose(
    request: Request,
    *,
    policy: Policy,
    pattern: Pattern,
    adopted: Collection[str],
    zfs: Zfs,
    now: datetime,
    copies: bool = False,
    saved: Saved = _NO_JOBS,
) -> Choice:
    """
    Return which snapshots *policy* lets go, and the plan of the run that destroys them.

    Of each dataset on its own.  Only those count that a run has kept and whose names are of
    *pattern*, with *copies* also what was received with its mark, and those of *adopted*, whole
    names.  What one of the jobs in *saved* has not saved stays.  Raises UserError for what is
    wrong with the request, and for a policy that is empty.
    """
    found = wanted.find_all(request, zfs)
    if saved:
        _check_readable(found)
    there = kept(found, zfs)
    _check_adopted(adopted, there)
    return judge(
        request,
        found,
        there,
        policy,
        pattern,
        adopted,
        run=RunId.new(),
        now=now,
        copies=copies,
        saved=saved,
    )


def _check_readable(found: Wanted) -> None:
    """Refuse to wait until what no backup reads is saved."""
    places = [(facts.name, "btrfs") for facts in found.subvolumes]
    places += [(facts.name, "LVM") for facts in found.logical_facts]
    for name, where in places:
        raise UserError(
            f"{plan.shown(name)} is on {where}: no backup reads kept snapshots of it, and they "
            "would wait for ever",
            hint="--exclude it, or give --no-keep-until-saved",
        )


def kept(found: Wanted, zfs: Zfs) -> list[Kept]:
    """Return all snapshots of what was found, whoever took them."""
    of_datasets = zfs.kept([facts.name for facts in found.datasets])
    return [*of_datasets, *btrfs.kept(found.subvolumes), *lvm.kept(found.logical_facts, Lvm())]


def judge(
    request: Request,
    found: Wanted,
    there: Sequence[Kept],
    policy: Policy,
    pattern: Pattern,
    adopted: Collection[str],
    *,
    run: RunId,
    now: datetime,
    copies: bool = False,
    saved: Saved = _NO_JOBS,
) -> Choice:
    """Decide about the snapshots that are *there*; pure."""
    if not copies:  # a mark that was received counts as none
        there = [replace(each, keeper="") if each.is_copy else each for each in there]
    ours = [each for each in there if _counts(each, pattern, adopted)]
    verdicts = tuple(
        verdict
        for group in wanted.by_volume(ours)
        for verdict in by_time([_item(each, saved) for each in group], policy, now)
    )
    if not verdicts:
        decide((), policy, now=now)  # an empty policy is wrong also where there is nothing
    gone = {verdict.item.name for verdict in verdicts if not verdict.keep}
    going = tuple(each for each in ours if each.name in gone)
    return Choice(plan_of(request, found, going, run), verdicts, going)


def by_time(items: Sequence[Item], policy: Policy, now: datetime) -> Iterator[Verdict]:
    """
    Yield a verdict on each of *items*, which are all of one volume; what is ahead stays.

    It takes no place in a rule: the clock was wrong then, or is now, and its like would be the
    newest until that time has come, instead of those that are.  restic's rules have no such thing.
    """
    latest = now + _CLOCK_SLACK
    for item in (each for each in items if each.at > latest):
        exempt = (Exempt(Exemption.AHEAD), *item.exempt)
        yield Verdict(replace(item, exempt=exempt), True, tuple(map(str, exempt)))
    yield from decide([each for each in items if each.at <= latest], policy, now=now)


def _counts(each: Kept, pattern: Pattern, adopted: Collection[str]) -> bool:
    if each.name in adopted:
        return True
    if each.is_transient:
        return False
    return bool(each.keeper) and convention.is_of(pattern, each.name, each.origin)


def _check_adopted(adopted: Collection[str], there: Sequence[Kept]) -> None:
    known = {each.name for each in there}
    for name in adopted:
        if name not in known:
            raise UserError(
                f"there is no snapshot {name} of what was named",
                hint="give its whole name, as `zfs list -t snapshot` shows it; on btrfs "
                "UUID:/PATH, on LVM VG/LV",
            )
        if not is_utf8(name):  # the journal could not hold it
            raise UserError(
                f"the name of {plan.shown(name)} is not UTF-8",
                hint="delete it yourself: `btrfs subvolume delete`",
            )


def item_of(each: Kept) -> Item:
    """Return a snapshot as the rules see it, with why it must stay."""
    exempt = [Exempt(Exemption.HELD)] if each.holds else []
    exempt += [Exempt(Exemption.CLONED, clone) for clone in each.clones]
    return Item(each.name, words.creation_time(each.creation_s), tuple(exempt))


def _item(each: Kept, saved: Saved) -> Item:
    item = item_of(each)
    unsaved = (Exempt(Exemption.UNSAVED, job) for job in saved if each.guid not in saved[job])
    return replace(item, exempt=(*item.exempt, *unsaved))


def plan_of(
    request: Request, found: Wanted, going: Sequence[Kept], run: RunId, *, command: str = "prune"
) -> Plan:
    """Return the plan of the run that destroys *going*; its job is of *command* alone."""
    job = plan.job_key(request.job) if request.job else wanted.key(found)
    volumes = _planned(found)
    return plan.without_client(
        run=str(run),
        job=f"{command} {job}",
        label=f"{command} {request.job or plan.label(request, found.asked)}",
        volumes=tuple(
            replace(volumes[each.kind, each.volume], snapshot=each.name) for each in going
        ),
        verb=Verb.PRUNE,
        notes=found.notes,
    )


def _planned(found: Wanted) -> dict[tuple[str, str], PlannedVolume]:
    """Return each volume as a plan has it, without a snapshot, by its kind and its name."""
    volumes = [
        plan.planned_dataset(facts, "-", found.guid_of(Dataset(facts.name).pool), "")
        for facts in found.datasets
    ]
    volumes += [
        replace(plan.planned_subvolume(facts, ""), mountpoint="-", source=None)
        for facts in found.subvolumes
    ]
    # The origin tells what a killed command may have left suspended.
    volumes += [plan.planned_logical(facts, "-", "") for facts in found.logical_facts]
    return {(volume.kind, volume.name): volume for volume in volumes}


def intents(
    choice: Choice, *, bookmark: bool, copies: bool = False, transient: bool = False
) -> tuple[PruneSnapshots, ...]:
    """Return the effects, one a pool; *transient* ones are proven by that mark, too."""
    parts: dict[tuple[str, str, str], list[Kept]] = {}
    for volume, each in zip(choice.plan.volumes, choice.going, strict=True):
        parts.setdefault((volume.kind, volume.pool, volume.pool_guid), []).append(each)
    return tuple(
        PruneSnapshots(
            pool=pool,
            pool_guid=pool_guid,
            snapshots=tuple(each.name for each in part),
            guids=tuple(each.guid for each in part),
            createtxgs=tuple(each.createtxg for each in part),
            keepers=tuple(each.keeper for each in part),
            bookmark=bookmark and kind == names.ZFS,
            copies=copies and kind == names.ZFS,
            volume_kind=kind,
            transient=transient,
        )
        for (kind, pool, pool_guid), part in parts.items()
    )


# -- the run -----------------------------------------------------------------------------------


class Pruner:
    """One front end's work on one run."""

    def __init__(
        self,
        journal: Journal,
        lock: int | None,
        interrupts: Interrupts,
        tell: Callable[[str], None],
    ) -> None:
        self._journal = journal
        self._lock = lock
        self._zfs = Zfs(lock)
        self._lvm = Lvm(lock)
        self._interrupts = interrupts
        self._tell = tell
        self.verdicts: dict[str, str] = {}  # what became of each, by its name

    def advance(self, run: Run) -> Run:
        """
        Destroy what the run is to destroy, and end it.

        What cannot be destroyed stays, and the run is partial.  After a signal, or where ZFS
        cannot be asked, all that is left stays.  EffectError and Interrupted are raised once that
        is journaled.
        """
        verdicts = self.verdicts
        try:
            for step in run.pending(PruneSnapshots):
                assert isinstance(step.intent, PruneSnapshots)
                self._prune(step.intent, verdicts)
        except (Interrupted, EffectError) as exc:
            self.give_up(run, exc.message, verdicts)
            raise
        with self._journal.change(run) as change:
            _record_pruned(change, run, verdicts)
        return self._journal.load(run.id)

    def _prune(self, intent: PruneSnapshots, verdicts: dict[str, str]) -> None:
        """Destroy the snapshots of one pool until a signal comes; note what became of each."""
        self._interrupts.check()
        self._check_pool(intent)
        self._tell(intent.describe())
        self._destroy(intent, list(_going(intent)), verdicts)
        busy = [each for each in _going(intent) if verdicts[each.name] == "busy"]
        if busy and intent.volume_kind == names.ZFS:
            tree.expire_automounts([each.name for each in busy], lock=self._lock)
            self._destroy(intent, busy, verdicts)
        if "absent" in verdicts.values():
            self._check_pool(intent)
        absent = {each.name for each in _going(intent) if verdicts[each.name] == "absent"}
        verdicts |= dict.fromkeys(self._renamed(intent, absent), _RENAMED)

    def _destroy(
        self, intent: PruneSnapshots, snapshots: Sequence[Kept], verdicts: dict[str, str]
    ) -> None:
        left = {each.name for each in snapshots}
        try:
            with closing(self._destroying(intent, snapshots)) as found_in_turn:
                for found in found_in_turn:
                    verdicts |= found
                    left -= found.keys()
                    if left:
                        self._interrupts.check()
        except EffectError:  # the effect on these may be done, or done in part
            verdicts |= dict.fromkeys(left, _UNKNOWN)
            raise

    def _destroying(
        self, intent: PruneSnapshots, snapshots: Sequence[Kept]
    ) -> Generator[dict[str, str]]:
        match intent.volume_kind:
            case names.BTRFS:
                yield from btrfs.prune(intent.pool_guid, snapshots)
            case names.LVM:
                yield from lvm.LogicalVolumes(self._lvm).prune(snapshots)
            case _:
                bookmark, copies = intent.bookmark, intent.copies
                yield from self._zfs.prune(snapshots, bookmark=bookmark, copies=copies)

    def _check_pool(self, intent: PruneSnapshots) -> None:
        """Not found in a pool that is not there, or in another of its name, is not gone."""
        match intent.volume_kind:
            case names.BTRFS:
                trouble = btrfs.problem(intent.pool_guid)
            case names.LVM:
                trouble = lvm.group_trouble(intent.pool, intent.pool_guid, self._lvm)
            case _:
                trouble = pool_trouble([intent], self._zfs.pools())
        if trouble:
            raise EffectError(trouble)

    def give_up(self, run: Run, reason: str, verdicts: Mapping[str, str] | None = None) -> Run:
        """
        End the run; what is still there stays.

        Of a front end's before this one nobody knows the *verdicts*: the pools are asked, as of
        what an effect failed on.
        """
        gone = self._gone(run) if verdicts is None else self._destroyed(run, verdicts)
        self._tidy(run)
        told = "it is not known how many" if gone is None else str(gone)

        with self._journal.change(run) as change:
            for step in run.pending(PruneSnapshots):
                change.ended(step, "failed", reason)
            outcome = Outcome.ROLLED_BACK if gone == 0 else Outcome.PARTIAL
            words = f"{reason}; {told} of {len(run.volumes)} were destroyed"
            change.set(outcome=outcome.value, reason=words)
            change.fire(Event.GIVEN_UP, reason=reason)
        return self._journal.load(run.id)

    def _destroyed(self, run: Run, verdicts: Mapping[str, str]) -> int | None:
        """Return how many were destroyed; None where that is not known."""
        unknown = {name for name, verdict in verdicts.items() if verdict == _UNKNOWN}
        gone = self._gone(run, unknown) if unknown else 0
        return None if gone is None else destroyed(verdicts) + gone

    def _gone(self, run: Run, names: Collection[str] | None = None) -> int | None:
        """Return how many, of *names* alone, are gone; None where a pool cannot be asked."""
        gone = 0
        try:
            for step in run.pending(PruneSnapshots):
                assert isinstance(step.intent, PruneSnapshots)
                if names is not None and set(names).isdisjoint(step.intent.snapshots):
                    continue
                self._check_pool(step.intent)
                guids = self._guids(step.intent)
                missing = {e.name for e in _going(step.intent) if guids.get(e.name) != e.guid}
                missing &= missing if names is None else set(names)
                gone += len(missing) - len(self._renamed(step.intent, missing))
        except EffectError:
            return None
        return gone

    def _renamed(self, intent: PruneSnapshots, missing: Collection[str]) -> list[str]:
        """
        Return those of the *missing* that have another name now.

        All of the pool is searched, which is slow: only where a name is not found.  Raises
        EffectError where it cannot be asked.
        """
        lost = [each for each in _going(intent) if each.name in missing]
        there = self._everywhere(intent) if lost else ()
        return [each.name for each in lost if (each.guid, each.createtxg) in there]

    def _everywhere(self, intent: PruneSnapshots) -> set[tuple[str, str]]:
        """Return guid and createtxg of all that is there, whatever its name."""
        match intent.volume_kind:
            case names.BTRFS:
                found = btrfs.uuids(intent.pool_guid)
                return {(e.guid, e.createtxg) for e in _going(intent) if e.guid in found}
            case names.LVM:
                # vgimportclone(8) gives a new UUID to the group alone.
                ours = (v for v in self._lvm.volumes() if v.group_uuid == intent.pool_guid)
                return {(v.uuid, str(v.created_s)) for v in ours}
            case _:
                return {(e.guid, e.createtxg) for e in self._zfs.snapshots([intent.pool])}

    def _guids(self, intent: PruneSnapshots) -> dict[str, str]:
        if intent.volume_kind == names.BTRFS:
            return btrfs.guids(intent.pool_guid, intent.snapshots)
        if intent.volume_kind == names.LVM:
            return lvm.uuids(intent.snapshots, self._lvm)
        found = self._zfs.identities(intent.snapshots)
        return {name: identity.guid for name, identity in found.items()}

    def _tidy(self, run: Run) -> None:
        """Remove what a killed front end left of moments that are gone; the next prune can, too."""
        for step in run.pending(PruneSnapshots):
            if isinstance(step.intent, PruneSnapshots) and step.intent.volume_kind == names.BTRFS:
                with suppress(EffectError):
                    btrfs.tidy(step.intent.pool_guid)


def destroyed(verdicts: Mapping[str, str]) -> int:
    """Return how many were destroyed; what was gone already was not."""
    return sum(verdict in ("done", _BARE) for verdict in verdicts.values())


def _going(intent: PruneSnapshots) -> Iterator[Kept]:
    four = zip(intent.snapshots, intent.guids, intent.createtxgs, intent.keepers, strict=True)
    for name, guid, createtxg, keeper in four:
        yield Kept(name, guid, createtxg, 0, keeper, 0, (), is_transient=intent.transient)


def _record_pruned(change: Change, run: Run, verdicts: Mapping[str, str]) -> None:
    """A snapshot that is gone already is no trouble; one that is in use, or another now, is."""
    kinds: dict[str, str] = {}
    for step in run.pending(PruneSnapshots):
        assert isinstance(step.intent, PruneSnapshots)
        kinds |= dict.fromkeys(step.intent.snapshots, step.intent.volume_kind)
        of_step = [verdicts[name] for name in step.intent.snapshots]
        odd = {word: of_step.count(word) for word in sorted(set(of_step) - {"done"})}
        detail = ", ".join(f"{count} {word}" for word, count in odd.items())
        change.ended(step, "done", detail or None)
    stayed = [n for n, verdict in verdicts.items() if verdict not in ("done", "absent", _BARE)]
    reason = None
    if stayed:
        more = f", and {len(stayed) - 1} more" if len(stayed) > 1 else ""
        reason = f"{stayed[0]}{more}: {_why(verdicts[stayed[0]], kinds[stayed[0]])}"
    outcome = Outcome.PARTIAL if stayed else Outcome.COMPLETED
    change.set(outcome=outcome.value, reason=reason)
    change.fire(Event.SNAPSHOTS_PRUNED, reason=reason)


def _why(verdict: str, kind: str) -> str:
    """Say why a snapshot stayed; what a file system answers else is raised, but for ZFS's."""
    if verdict == "busy":
        return f"in use meanwhile: {_USES[kind]}"
    return _WHY.get(verdict, f"ZFS answered {verdict}")


_BARE = "no-bookmark"
_RENAMED = "renamed"
_UNKNOWN = "unknown"
_USES = {
    names.ZFS: "held, cloned, mounted or being sent",
    names.BTRFS: "mounted, being sent, the default, or with a subvolume in it",
    names.LVM: "mounted, open, or with a device or a classic snapshot on it",
}
_WHY = {
    "foreign": "another snapshot has the name now",
    "unmarked": "its mark was taken away meanwhile",
    _RENAMED: "it has another name now",
}

"""
Transient snapshots, which are kept until somebody has read them: which of them go.

Their destruction is a run of `pruning.py`, with one more mark that each of them must bear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from . import convention, pruning, wanted
from .convention import Pattern
from .history import Snap
from .names import LVM, ZFS, RunId
from .plan import Request
from .pruning import Choice
from .retention import Exempt, Exemption, Item, Policy, Verdict, decide
from .volumes.kind import Kept
from .volumes.zfs import Zfs
from .wanted import Wanted

COMMAND = "unsnap"  # in the key of its runs: neither a prune nor an unsnap waits for the other
_NAMED = "with a name that is not of the pattern"
_ODD = "whose moment is none, so that no backup reads it: their createtxg differ"
_STAYS = "which a run took to stay: the mark was set by somebody else"


def choose(
    request: Request,
    *,
    policy: Policy,
    pattern: Pattern,
    zfs: Zfs,
    snaps: Callable[[], Mapping[str, Snap]],
    now: datetime,
) -> Choice:
    """
    Return which transient snapshots go, and the plan of the run that destroys them.

    All of them, but for those that *policy* keeps of each dataset, those in use, and each moment
    that a run still reads, or whose own run, or the run of steps that this is of, has not ended.
    Of the runs that took them *snaps* tells what the journal knows: one that took snapshots to
    stay counts more than a mark, which whoever may set user properties can set.  Of one that is
    not known any more the mark counts; so the journal is asked last, when it knows each run whose
    snapshots were found.  What is no moment, because a pool was not snapshotted at once, stays;
    that, and names that are not of *pattern*, are told by notes.  Raises UserError for what is
    wrong with the request.
    """
    found = wanted.find_all(request, zfs)
    there = pruning.kept(found, zfs)
    held = zfs.holders([each.name for each in there if each.is_transient and each.holds])
    return judge(request, found, there, held, snaps(), policy, pattern, run=RunId.new(), now=now)


def judge(
    request: Request,
    found: Wanted,
    there: Sequence[Kept],
    held: Mapping[str, Sequence[str]],
    snaps: Mapping[str, Snap],
    policy: Policy,
    pattern: Pattern,
    *,
    run: RunId,
    now: datetime,
) -> Choice:
    """Decide about the snapshots that are *there*, with the tags of those that are held; pure."""
    marked = [each for each in there if each.is_transient]
    transient = [e for e in marked if e.keeper not in snaps or snaps[e.keeper].is_transient]
    odd = _odd(there)
    whole = [each for each in transient if _moment(each) not in odd]
    ours = [each for each in whole if convention.is_of(pattern, each.name, each.origin)]
    exempt = _readers(transient, held) | _open(snaps)
    verdicts = tuple(
        verdict
        for group in wanted.by_volume(ours)
        for verdict in _verdicts(group, exempt, policy, now=now)
    )
    gone = {verdict.item.name for verdict in verdicts if not verdict.keep}
    going = tuple(each for each in ours if each.name in gone)
    notes = (
        *_notes(len(marked) - len(transient), _STAYS),
        *_notes(len(transient) - len(whole), _ODD),
        *_notes(len(whole) - len(ours), _NAMED),
    )
    found = replace(found, notes=(*found.notes, *notes))
    plan = pruning.plan_of(request, found, going, run, command=COMMAND)
    return Choice(plan, verdicts, going)


def _moment(each: Kept) -> tuple[str, str]:
    """Return what the snapshots of a moment have in common: the run that kept them, and a name."""
    return each.keeper, each.name.partition("@")[2]


def _odd(there: Iterable[Kept]) -> set[tuple[str, str]]:
    """Return what is no moment, and is read by no backup: the createtxg of a pool differ."""
    of: dict[tuple[str, str, str], set[str]] = {}
    for each in there:
        if each.kind == ZFS and each.keeper and not each.is_copy:
            pool = each.volume.partition("/")[0]
            of.setdefault((*_moment(each), pool), set()).add(each.createtxg)
    return {(keeper, name) for (keeper, name, _), groups in of.items() if len(groups) > 1}


def _open(snaps: Mapping[str, Snap]) -> dict[str, Exempt]:
    """Return for each run that took a moment what has not ended: it, or the run of its step."""
    of = {run: run if snap.is_open else snap.of_open for run, snap in snaps.items()}
    return {run: Exempt(Exemption.OPEN, by) for run, by in of.items() if by}


def _readers(there: Iterable[Kept], held: Mapping[str, Sequence[str]]) -> dict[str, Exempt]:
    """Return for each moment, by the run that kept it, one that reads it: by that one's holds."""
    return {
        each.keeper: Exempt(Exemption.READ, reader)
        for each in there
        for tag in held.get(each.name, ())
        if (reader := RunId.from_token(tag))
    }


def _item(each: Kept, of_moments: Mapping[str, Exempt]) -> Item:
    item = pruning.item_of(each)
    more = of_moments.get(each.keeper)
    return replace(item, exempt=(*item.exempt, more)) if more else item


def _verdicts(
    group: Sequence[Kept], of_moments: Mapping[str, Exempt], policy: Policy, *, now: datetime
) -> tuple[Verdict, ...]:
    """Return a verdict on each of a *group*, which is of one volume, the newest first."""
    items = [_item(each, of_moments) for each in group]
    if policy.is_empty:
        return tuple(
            Verdict(item, bool(item.exempt), tuple(map(str, item.exempt))) for item in items
        )
    if group[0].kind == LVM:  # has no order but that of the clock
        return tuple(pruning.by_time(items, policy, now))
    # The only rule is --keep-last, and this order holds whatever the clock was set to.
    return decide(items, policy, now=now, by_time=False)


def _notes(others: int, why: str) -> tuple[str, ...]:
    if not others:
        return ()
    many = f"{others} transient snapshots are" if others > 1 else "1 transient snapshot is"
    return (f"{many} left alone, {why}",)

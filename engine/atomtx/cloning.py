"""
Copies of kept snapshots in other pools and on other machines: the plan, and both ends as they are.

What is to arrive is decided once: the newest kept snapshot of each dataset.  How it gets there is
asked of both ends whenever the work begins, so a run that was killed goes on with what has
arrived, to the byte, and repeats nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from . import convention, plan, replica, tokens, wanted
from .convention import Pattern
from .errors import BusyError, EffectError, UserError
from .intents import CopySnapshots
from .names import ZFS, Dataset, RunId, Target
from .plan import Plan, PlannedVolume, Request
from .records import Run
from .replica import Copy, Source, Token, Transfer
from .states import Verb
from .volumes import ends
from .volumes.ends import End
from .volumes.kind import Kept
from .wanted import Wanted

TAG = "atomtx-clone"  # of the holds at a target
_TAG_BYTES = 200  # of 255 (ZAP_MAXNAMELEN)


@dataclass(frozen=True)
class Terms:
    """How it is sent; as the user said."""

    rate: int = 0
    compress: bool = True
    discard: bool = False
    transient: bool = False  # what is meant to go again here is sent as well


@dataclass(frozen=True)
class Pair:
    """A dataset and its copy as they are, and what is to be done about them."""

    source: Source
    copy: Copy
    token: Token | None = None  # of what the copy was cut off in
    transfers: tuple[Transfer, ...] = ()
    trouble: EffectError | None = None
    may_be_elsewhere: bool = False  # what the copy lies in is not there: renamed, for example


# -- the plan ----------------------------------------------------------------------------------


def make(
    request: Request,
    targets: Sequence[str],
    *,
    pattern: Pattern,
    terms: Terms,
    here: End,
    check: Callable[[], None] = lambda: None,
) -> tuple[Plan, tuple[CopySnapshots, ...]]:
    """
    Return the plan of a run that brings copies up to date, and its effects.

    A dataset without a kept snapshot is left out with a note; one that was named itself is an
    error.  Raises UserError for that, for what else is wrong with the request, and where a copy
    would lie in what is copied; EffectError where no target can be asked.  *check* is called as
    long as one does not answer.
    """
    parsed = [Target.parse(text) for text in targets]
    if not parsed:
        raise UserError("no target was given", hint="--to POOL/PATH, or --to HOST:POOL/PATH")
    found = wanted.find(request, here)
    for target in parsed:
        _check_apart(target, found)
    last = _last(
        here.kept([facts.name for facts in found.datasets]), pattern, transient=terms.transient
    )
    found = _with_snapshots(found, last)
    pools, notes = _pools(parsed, check)
    made = _plan(request, replace(found, notes=(*found.notes, *notes)), parsed, last)
    guids = {each.name: each.guid for each in last.values()}
    return made, intents(made, guids, pools, pattern=pattern, terms=terms)


def _pools(
    targets: Sequence[Target], check: Callable[[], None]
) -> tuple[dict[Target, str], list[str]]:
    """Return the guids of the targets' pools, empty for one that cannot be asked, with notes."""
    guids: dict[Target, str] = {}
    lost: list[EffectError] = []
    for target in targets:
        try:
            guids[target] = ends.end_of(target, check=check).guid_of(target.dataset.pool)
        except EffectError as exc:
            guids[target] = ""
            lost.append(exc)
    if not any(guids.values()):
        raise lost[0]
    return guids, [f"{exc.message}: nothing is sent there" for exc in lost]


def _check_apart(target: Target, found: Wanted) -> None:
    """Refuse copies that meet, and those on this machine that would themselves be copied."""
    copies: dict[str, str] = {}
    for facts in found.datasets:
        copy = target.copy_of(Dataset(facts.name)).name
        if copy in copies:
            raise UserError(
                f"{copies[copy]} and {facts.name} would have one copy, {target.shown(copy)}",
                hint="a target for each pool, each in a clone of its own",
            )
        copies[copy] = facts.name
    names = {facts.name for facts in found.datasets}
    both = sorted(names & copies.keys()) if not target.host else []
    if both or (not target.host and target.dataset.name in names):
        raise UserError(
            f"the target {target} is one of the datasets that are to be copied",
            hint=f"leave it out: --exclude {target}",
        )


def _last(there: Sequence[Kept], pattern: Pattern, *, transient: bool) -> dict[str, Kept]:
    """Return the newest snapshot of each dataset that is to be copied, by the dataset."""
    return wanted.newest(each for each in there if counts(each, pattern, transient=transient))


def _with_snapshots(found: Wanted, last: Mapping[str, Kept]) -> Wanted:
    """Leave out the datasets that have no snapshot, with a note of each."""
    without = [facts.name for facts in found.datasets if facts.name not in last]
    named = [name for name in without if name in found.asked]
    if named or len(without) == len(found.datasets):
        name = (named or without)[0]
        raise UserError(
            f"{name} has no kept snapshot of that pattern",
            hint="`atomtx snap` takes some; `zfs list -t snapshot` shows what there is",
        )
    return replace(
        found,
        datasets=tuple(facts for facts in found.datasets if facts.name in last),
        notes=(*found.notes, *(f"{n} is not copied: it has no kept snapshot" for n in without)),
    )


def counts(each: Kept, pattern: Pattern, *, transient: bool = False) -> bool:
    """Tell whether a snapshot is sent: one that we have kept to stay, with a pattern's name."""
    is_meant = bool(each.keeper) and (transient or not each.is_transient)
    return is_meant and convention.is_of(pattern, each.name)


def _plan(
    request: Request, found: Wanted, targets: Sequence[Target], last: Mapping[str, Kept]
) -> Plan:
    job = plan.job_key(request.job) if request.job else _key(found, targets)
    names = ", ".join(map(str, targets))
    return plan.without_client(
        run=str(RunId.new()),
        job=f"clone {job}",
        label=f"clone {request.job or plan.label(request, found.asked)} to {names}",
        volumes=tuple(
            PlannedVolume(
                kind=ZFS,
                pool=Dataset(facts.name).pool,
                pool_guid=found.guid_of(Dataset(facts.name).pool),
                name=facts.name,
                guid=facts.guid,
                mountpoint="-",
                snapshot=last[facts.name].name,
            )
            for facts in found.datasets
        ),
        notes=found.notes,
        verb=Verb.CLONE,
    )


def _key(found: Wanted, targets: Sequence[Target]) -> str:
    words = [wanted.key(found), *sorted(map(str, targets))]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]


def intents(
    made: Plan,
    guids: Mapping[str, str],
    pools: Mapping[Target, str],
    *,
    pattern: Pattern,
    terms: Terms,
) -> tuple[CopySnapshots, ...]:
    """Return the effects, one a target; *pools* are the guids of the targets' pools."""
    return tuple(
        CopySnapshots(
            target=str(target),
            pool_guid=pool_guid,
            datasets=tuple(volume.name for volume in made.volumes),
            copies=tuple(target.copy_of(Dataset(v.name)).name for v in made.volumes),
            snapshots=tuple(volume.snapshot for volume in made.volumes),
            guids=tuple(guids[volume.snapshot] for volume in made.volumes),
            pattern=pattern.text,
            tag=tag_of(target, pool_guid),
            rate=terms.rate,
            compress=terms.compress,
            discard=terms.discard,
            transient=terms.transient,
        )
        for target, pool_guid in pools.items()
    )


def tag_of(target: Target, pool_guid: str) -> str:
    """
    Return the tag of the holds that a clone to *target* has at its source.

    Two disks that are plugged in by turns may have pools of one name.
    """
    tag = f"{TAG}:{target}:{pool_guid}"
    if len(tag.encode()) <= _TAG_BYTES:
        return tag
    return f"{TAG}:{hashlib.sha256(tag.encode()).hexdigest()[:32]}"


def check_alone(steps: Sequence[CopySnapshots], others: Iterable[Run]) -> None:
    """
    Raise BusyError where an open run of another job writes one of these copies as well.

    A copy is known by its pool's guid: a machine may have many names, as `nas` and `root@nas`.
    """
    copies = {place for step in steps for place in _places(step)}
    for run in others:
        for each in run.pending(CopySnapshots):
            assert isinstance(each.intent, CopySnapshots)
            theirs = _places(each.intent)
            if both := sorted(copies & theirs):
                raise BusyError(
                    f"run {run.id} ({run.label}) sends to {both[0][1]} as well",
                    hint="`atomtx status` shows it; `atomtx recover` ends one that was interrupted",
                )


def _places(step: CopySnapshots) -> set[tuple[str, str]]:
    """Return the copies of a step; to a pool that could not be asked nothing is sent."""
    return {(step.pool_guid, copy) for copy in step.copies if step.pool_guid}


# -- both ends ---------------------------------------------------------------------------------


def look(intent: CopySnapshots, here: End, there: End) -> list[Pair]:
    """
    Ask both ends, and return what is to be done about each dataset; four processes.

    Raises EffectError where an end cannot be asked, UnreachableError where the target's pool is
    not there: what is not found in it is not gone.
    """
    if not intent.pool_guid:
        # Not as one that is waited for: whatever is there now, nothing was begun with it.
        raise EffectError(f"{intent.target} could not be asked when the clone was planned")
    there.require(Dataset(intent.copies[0]).pool, intent.pool_guid)
    pattern = Pattern.parse(intent.pattern)
    kept = [
        each
        for each in here.kept(intent.datasets)
        if counts(each, pattern, transient=intent.transient)
    ]
    sources = here.sources(intent.datasets, kept)
    parents = {ends.parent_of(copy) for copy in intent.copies} - {""}
    copies = there.copies({*intent.copies, *parents})
    pairs: list[Pair] = []
    made: set[str] = set(copies)
    four = zip(intent.datasets, intent.copies, intent.snapshots, intent.guids, strict=True)
    for dataset, copy, snapshot, guid in four:
        source = sources.get(dataset) or Source(dataset, False, False, ())
        known = copies.get(copy, Copy(copy, host=there.host))
        pair = Pair(source, known, tokens.read(known.token) if known.token else None)
        parent = ends.parent_of(copy)
        if parent and parent not in made:
            create = known.command("zfs", "create", "-o", "canmount=off", parent)
            missing = EffectError(
                f"there is no dataset {there.shown(parent)}", hint=f"make it: {create}"
            )
            pairs.append(replace(pair, trouble=missing, may_be_elsewhere=True))
            continue
        try:
            pairs.append(_judged(pair, snapshot, guid))
            made.add(copy)
        except EffectError as exc:
            pairs.append(replace(pair, trouble=exc))
    return pairs


def _judged(pair: Pair, snapshot: str, guid: str) -> Pair:
    last = next((p for p in pair.source.snapshots if p.guid == guid), None)
    if last is None or not last.wanted:
        if any(point.guid == guid for point in pair.copy.snapshots):
            return pair
        if last:
            raise EffectError(
                f"{snapshot} is to be sent no more: it was renamed, or lost its mark",
                hint="the next clone sends the newest snapshot that is kept then",
            )
        raise EffectError(f"{snapshot} is gone")
    transfers = replica.transfers(pair.source, pair.copy, last, pair.token)
    return replace(pair, transfers=transfers)

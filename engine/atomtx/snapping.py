"""Which snapshots are to be taken and kept: what was asked for, and the machine -> the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from . import convention, plan, wanted
from .convention import Pattern
from .intents import BEFORE, Intent, RunHook, TakeSnapshots
from .lvmio import Lvm
from .moment import kept
from .names import LVM, ZFS, BtrfsSnapshot, Dataset, LvmSnapshot, RunId, kept_name
from .plan import DatasetFacts, LogicalFacts, Plan, PlannedVolume, Request, SubvolumeFacts
from .states import Verb
from .volumes import btrfs, lvm
from .volumes.zfs import Zfs
from .wanted import Wanted


def make_plan(
    request: Request,
    *,
    pattern: Pattern,
    at: datetime,
    zfs: Zfs,
    hooks: Sequence[RunHook] = (),
    transient: bool = False,
) -> Plan:
    """
    Return the plan of a run that takes snapshots and keeps them, with the name for *at*.

    *transient* ones until `atomtx unsnap`.  Of *hooks* those around the run and around the
    snapshots.  Raises UserError for what is wrong with the request, and where the name is taken.
    """
    name = convention.format(pattern, at)
    found = wanted.find_all(request, zfs)
    made = assemble(request, found, name=name, run=RunId.new(), hooks=hooks, transient=transient)
    there = {*zfs.identities([v.snapshot for v in made.volumes if v.kind == ZFS])}
    there |= {each.name for each in btrfs.kept(found.subvolumes)}
    taken = {kept_name(each) for each in there}
    if lvm.uuids([v.snapshot for v in made.volumes if v.kind == LVM], Lvm()):
        taken.add(name)
    convention.fresh(pattern, at, taken)
    return made


def assemble(
    request: Request,
    found: Wanted,
    *,
    name: str,
    run: RunId,
    hooks: Sequence[RunHook] = (),
    transient: bool = False,
) -> Plan:
    """Put the plan together; pure."""
    label = request.job or plan.label(request, found.asked)
    on_zfs = [_planned(facts, found, name) for facts in found.datasets]
    on_btrfs = [
        _planned_subvolume(facts, n, name, run, transient=transient)
        for n, facts in enumerate(found.subvolumes)
    ]
    on_lvm = [
        _planned_logical(each.facts, each.mountpoint, name)
        for each in found.logical
        if isinstance(each.facts, LogicalFacts)
    ]
    return plan.without_client(
        run=str(run),
        job=f"snap {plan.job_key(request.job) if request.job else wanted.key(found)}",
        label=f"snap {label}",
        volumes=(*on_zfs, *on_btrfs, *on_lvm),
        verb=Verb.SNAP,
        notes=found.notes,
        hooks=tuple(hook for hook in hooks if hook.when in BEFORE),
        transient=transient,
    )


def _planned(facts: DatasetFacts, found: Wanted, name: str) -> PlannedVolume:
    snapshot = str(convention.snapshot_of(facts.name, name))
    guid = found.guid_of(Dataset(facts.name).pool)
    return plan.planned_dataset(facts, facts.mountpoint, guid, snapshot)


def _planned_subvolume(
    facts: SubvolumeFacts, n: int, name: str, run: RunId, *, transient: bool
) -> PlannedVolume:
    snapshot = BtrfsSnapshot.to_keep(
        facts.filesystem, run, n, name=name, volume=facts.name, transient=transient
    )
    return plan.planned_subvolume(facts, str(snapshot))


def _planned_logical(facts: LogicalFacts, mountpoint: str, name: str) -> PlannedVolume:
    return plan.planned_logical(facts, mountpoint, str(LvmSnapshot.to_keep(facts.name, name)))


def steps(made: Plan) -> Iterator[Intent]:
    """Yield the plan's effects in order, as `--dry-run` shows them."""
    first = plan.first_intents(made)
    yield from first
    yield from (kept(step) for step in first if isinstance(step, TakeSnapshots))

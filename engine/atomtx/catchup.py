"""
Which kept snapshots a repository does not have, and the plan of each run that brings them there.

A moment is what one run of `atomtx snap` has kept: its snapshots bear the mark of that run, and
have one name.  Each moment becomes one backup.  Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from . import plan
from .intents import AROUND_SNAPSHOT
from .inventory import ancestors
from .names import ZFS, RunId, Snapshot, is_within
from .plan import SYSTEM_PATHS, Existing, LeftOut, Plan, PlannedVolume
from .volumes.kind import Kept
from .words import creation_time

_NO_SNAPSHOT = "no kept snapshot of that moment"


@dataclass(frozen=True)
class KeptMoment:
    """The snapshots of one moment that a job can back up."""

    name: str  # of each snapshot, behind the "@"
    created_s: int
    volumes: tuple[PlannedVolume, ...]  # parents before children
    lost: tuple[LeftOut, ...]  # of the job, and not in the moment
    saved_by: str | None = None  # the run whose backup has all of them
    trouble: str | None = None  # why it is none

    @property
    def at(self) -> datetime:
        return creation_time(self.created_s).astimezone(UTC)

    @property
    def is_missing(self) -> bool:
        return self.saved_by is None and self.trouble is None

    @property
    def is_left_out(self) -> bool:
        return self.saved_by is None and self.trouble is not None


def choose(
    of_job: Plan, there: Iterable[Kept], saved: Mapping[str, Sequence[str]]
) -> tuple[KeptMoment, ...]:
    """
    Return the moments that are *there* of the volumes of a job's plan, the oldest first.

    *saved* gives the runs that read a snapshot, by its guid: `history.saved`.
    """
    groups: dict[tuple[str, str], list[Kept]] = {}
    for each in filter(_counts, there):
        groups.setdefault((each.keeper, Snapshot.parse(each.name).name), []).append(each)
    ordered = sorted(groups.items(), key=lambda item: _age(item[1]))
    return tuple(_moment(of_job, name, group, saved) for (_, name), group in ordered)


def _counts(each: Kept) -> bool:
    """Leave out copies, and what a backup has kept of its own: its moment was saved by it."""
    own = RunId.from_token(Snapshot.parse(each.name).name)
    return bool(each.keeper) and not each.is_copy and own != each.keeper


def _age(group: Iterable[Kept]) -> tuple[int, int]:
    # The time of creation is told in whole seconds.
    return min((each.creation_s, int(each.createtxg)) for each in group)


def _moment(
    of_job: Plan, name: str, group: Sequence[Kept], saved: Mapping[str, Sequence[str]]
) -> KeptMoment:
    found = {each.name.partition("@")[0]: each for each in group}
    volumes, lost = _parted(of_job, found)
    pools = {(v.pool, v.existing.createtxg) for v in volumes if v.existing}
    is_one = len(pools) == len({pool for pool, _ in pools})
    return KeptMoment(
        name=name,
        created_s=min(each.creation_s for each in group),
        volumes=volumes,
        lost=lost,
        saved_by=_saved_by(volumes, saved),
        trouble=None if is_one else "its snapshots are not of one moment: their createtxg differ",
    )


def _saved_by(volumes: Iterable[PlannedVolume], saved: Mapping[str, Sequence[str]]) -> str | None:
    """Return the newest run that read all of the snapshots."""
    runs = [saved.get(v.existing.guid, ()) for v in volumes if v.existing]
    return next((run for run in reversed(runs[0]) if all(run in each for each in runs)), None)


def unsaved(
    of_job: Plan, guids: Mapping[str, str], saved: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], bool]:
    """
    Return the datasets of a job whose snapshots of a moment nobody saved, and whether it is all.

    *guids* are those of the moment, by dataset; of what the job has not, nothing is asked.
    """
    asked = [v.name for v in of_job.volumes if v.kind == ZFS and v.name in guids]
    lacking = tuple(name for name in asked if guids[name] not in saved)
    return lacking, lacking == tuple(asked)


def _parted(
    of_job: Plan, found: Mapping[str, Kept]
) -> tuple[tuple[PlannedVolume, ...], tuple[LeftOut, ...]]:
    """Part a job's volumes into those that a moment can show, and the others."""
    chosen: dict[str, PlannedVolume] = {}
    lost = []
    between = {v.mountpoint: v.name for v in of_job.volumes}
    for volume in of_job.volumes:
        kept = found.get(volume.name) if volume.kind == ZFS else None
        gap = _gap(volume.mountpoint, chosen, between)
        if kept is None:
            lost.append(LeftOut(volume.name, _NO_SNAPSHOT))
        elif gap is not None:
            why = f"{between[gap]}, in which it lies, has {_NO_SNAPSHOT}"
            lost.append(LeftOut(volume.name, why))
        else:
            existing = Existing(kept.guid, kept.createtxg)
            chosen[volume.mountpoint] = replace(volume, snapshot=kept.name, existing=existing)
    return tuple(chosen.values()), tuple(lost)


def _gap(
    mountpoint: str, chosen: Mapping[str, PlannedVolume], of_job: Mapping[str, str]
) -> str | None:
    """
    Return the mountpoint of the job that is missing between a volume and the frozen files above.

    There the directory is empty: nothing can be mounted below it.
    """
    missing = None
    for path in ancestors(mountpoint):
        if path in chosen:
            return missing
        if path in of_job:
            missing = path
    return None


def plan_of(of_job: Plan, moment: KeptMoment, *, run: RunId, is_last: bool) -> Plan:
    """
    Return the plan of the run that backs a moment up; it neither takes nor destroys a snapshot.

    Retention is for the last of several, and hooks around the taking of snapshots for none.
    """
    points = [volume.mountpoint for volume in moment.volumes]
    tops = plan.targets(points)
    system = SYSTEM_PATHS if "/" in tops else ()
    lacking = [v.mountpoint for v in of_job.volumes if v.mountpoint not in points]
    needed = _within(of_job.live_paths, tops)
    live = plan.to_bring_back(needed, points, lacking, in_tree=bool(of_job.root))
    return replace(
        of_job,
        run=str(run),
        volumes=moment.volumes,
        targets=tops,
        live_paths=live,
        excludes=plan.targets(_within((*live, *system), tops)),
        notes=(*map(str, moment.lost), *of_job.notes),
        named=tuple(path for path in of_job.named if path in points),
        hooks=tuple(hook for hook in of_job.hooks if hook.when != AROUND_SNAPSHOT),
        retention=of_job.retention if is_last else (),
        keep_snapshots=False,
        keep_for_s=0,  # the moment is kept in any case
    )


def _within(paths: Iterable[str], tops: Sequence[str]) -> Iterator[str]:
    return (path for path in paths if any(is_within(path, top) for top in tops))

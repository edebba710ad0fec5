"""`atomtx backup --from-snapshots`: one run after the other, the oldest moment first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from .. import catchup, history
from ..catchup import KeptMoment
from ..errors import DONE, AtomtxError, ExitStatus, UserError, worst
from ..interrupts import Interrupts
from ..names import ZFS, RunId
from ..plan import Plan
from ..states import Outcome
from ..volumes.zfs import Zfs
from .render import Reporter


@dataclass(frozen=True)
class Backlog:
    """What a job's datasets have kept, and how many of the missing moments are to be saved."""

    of_job: Plan
    moments: tuple[KeptMoment, ...]
    limit: int | None

    @property
    def missing(self) -> tuple[KeptMoment, ...]:
        return tuple(moment for moment in self.moments if moment.is_missing)

    @property
    def left_out(self) -> tuple[KeptMoment, ...]:
        return tuple(moment for moment in self.moments if moment.is_left_out)

    @property
    def todo(self) -> tuple[KeptMoment, ...]:
        return self.missing[: self.limit]


def find(of_job: Plan, journal: Path, limit: int | None) -> Backlog:
    """Ask ZFS and the journal which moments there are, and which are saved."""
    datasets = [volume.name for volume in of_job.volumes if volume.kind == ZFS]
    if not datasets:
        raise UserError(
            "no ZFS dataset is to be backed up: kept snapshots of others are not read",
            hint="leave out --from-snapshots",
        )
    saved = _saved(of_job, journal)
    return Backlog(of_job, catchup.choose(of_job, Zfs().kept(datasets), saved), limit)


def _saved(of_job: Plan, journal: Path) -> dict[str, tuple[str, ...]]:
    store = history.store_of(of_job.job, asdict(of_job.client))
    return history.saved(journal, store, partial=True)


def carry_out(
    backlog: Backlog,
    back_up: Callable[[Plan], ExitStatus],
    *,
    interrupts: Interrupts,
    show: Reporter,
) -> ExitStatus:
    """
    Save the missing moments, a run each; return the worst status, PARTIAL where one is left out.

    After one that failed none is begun: the next would most likely fail as well.
    """
    for moment in backlog.left_out:
        show.warn(f"{moment.name} is not saved: {moment.trouble}")
    if not backlog.todo:
        show.done(_nothing(backlog))
    of_moments = _save(backlog, back_up, interrupts=interrupts, show=show)
    return worst([*of_moments, *(ExitStatus.PARTIAL for _ in backlog.left_out)])


def _save(
    backlog: Backlog,
    back_up: Callable[[Plan], ExitStatus],
    *,
    interrupts: Interrupts,
    show: Reporter,
) -> list[ExitStatus]:
    statuses: list[ExitStatus] = []
    try:
        for moment in backlog.todo:
            interrupts.stop()
            is_last = len(statuses) + 1 == len(backlog.todo)
            made = catchup.plan_of(backlog.of_job, moment, run=RunId.new(), is_last=is_last)
            gone = _gone(made) if statuses else None  # the one before it may have taken hours
            if gone:
                show.warn(f"{moment.name} is not saved: {gone} was destroyed meanwhile")
                statuses.append(ExitStatus.PARTIAL)
                continue
            show.step(f"{moment.name}, {_when(moment)}:")
            for lost in moment.lost:
                show.note(str(lost))
            statuses.append(back_up(made))
            if statuses[-1] not in DONE:
                break
    except AtomtxError:
        _tell_left(backlog, len(statuses), show)
        raise
    _tell_left(backlog, sum(status in DONE for status in statuses), show)
    return statuses


def _gone(made: Plan) -> str | None:
    """Return a snapshot of a moment that somebody has destroyed since it was found."""
    found = Zfs().identities([volume.snapshot for volume in made.volumes])
    for volume in made.volumes:
        there, known = found.get(volume.snapshot), volume.existing
        if there is None or (known and there.guid != known.guid):
            return volume.snapshot
    return None


def told_of_no_run(backlog: Backlog) -> tuple[Outcome, str] | None:
    """Return what no run's notice tells, how it ended and why: moments left out, nothing to do."""
    if left_out := [f"{m.name} is not saved: {m.trouble}" for m in backlog.left_out]:
        more = f", and {len(left_out) - 1} more" if left_out[1:] else ""
        return Outcome.PARTIAL, left_out[0] + more
    return None if backlog.todo else (Outcome.COMPLETED, _nothing(backlog))


def _nothing(backlog: Backlog) -> str:
    return f"nothing to save: {_count(len(backlog.moments))} found"


def check_taken(of_job: Plan, journal: Path, run: str, show: Reporter) -> ExitStatus:
    """
    Return PARTIAL where the steps of a run took a moment, and the job has not saved all of it.

    Raises AtomtxError where it has nothing of one that is to go again: no step must come after,
    because an `unsnap` would take it.
    """
    saved, status = _saved(of_job, journal), ExitStatus.COMPLETED
    for moment in history.taken(journal, run):
        lacking, is_all = catchup.unsaved(of_job, moment.guids, saved)
        if not lacking:
            continue
        what = f"{moment.name}, which this run took, is not saved of {', '.join(lacking)}"
        if is_all and moment.is_transient:
            hint = "no step that comes after is run; where it is still there, the next run saves it"
            raise AtomtxError(what, hint=hint)
        show.warn(what)
        status = ExitStatus.PARTIAL
    return status


def _tell_left(backlog: Backlog, saved: int, show: Reporter) -> None:
    if left := len(backlog.missing) - saved:
        show.note(f"{_count(left)} to be saved by the next `atomtx backup --from-snapshots`")


def told(backlog: Backlog) -> list[dict[str, Any]]:
    """Return the moments as `--dry-run --json` prints them."""
    todo = backlog.todo
    return [
        {
            "name": moment.name,
            "at": moment.at,
            "snapshots": [volume.snapshot for volume in moment.volumes],
            "left_out": [str(left_out) for left_out in moment.lost],
            "saved_by": moment.saved_by,
            "trouble": moment.trouble,
            "would_be_saved": moment in todo,
        }
        for moment in backlog.moments
    ]


def lines(backlog: Backlog) -> Iterator[str]:
    """Yield a line for each moment, and for each dataset that is not in it."""
    width = max((len(moment.name) for moment in backlog.moments), default=0)
    for moment in backlog.moments:
        what = _datasets(len(moment.volumes))
        yield f"{moment.name:<{width}}  {_when(moment)}  {what}  {_word(moment, backlog.todo)}"
        if moment.is_missing:
            yield from (f"  {left_out}" for left_out in moment.lost)
    yield (
        f"{_count(len(backlog.moments))}: {len(backlog.todo)} would be saved, "
        f"{len(backlog.missing) - len(backlog.todo)} would be left for later"
    )


def print_dry(backlog: Backlog, show: Reporter, *, as_json: bool) -> None:
    """Print what would be saved."""
    show.result({"job": backlog.of_job.label, "moments": told(backlog)})
    if not as_json:
        click.echo("\n".join(lines(backlog)))


def _word(moment: KeptMoment, todo: Sequence[KeptMoment]) -> str:
    if moment.trouble:
        return moment.trouble
    if moment.saved_by:
        return f"in the repository (run {moment.saved_by})"
    return "would be saved" if moment in todo else "left for later"


def _when(moment: KeptMoment) -> str:
    return f"{moment.at:%Y-%m-%d %H:%M:%S} UTC"


def _datasets(count: int) -> str:
    return f"{count} dataset" + "s" * (count != 1)


def _count(moments: int) -> str:
    return f"{moments} kept moment" + "s" * (moments != 1)

"""`atomtx history`: what ran, what it saved, how it ended."""

from __future__ import annotations

from pathlib import Path

import click

from .. import journalfile, statedir
from ..errors import ExitStatus
from ..history import Run, runs
from . import NAMED, echo, json_option, render

_HEADERS = (
    "AGE", "STARTED", "JOB", "STATE", "OUTCOME", "DURATION", "ADDED", "BACKUP", "RUN",
)  # fmt: skip


@click.command()
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Show the N newest runs; 0 shows all.",
)
@click.option("--failed", is_flag=True, help="Only those that did not end well.")
@click.option("--job", type=NAMED, metavar="NAME", help="Only the runs of one job.")
@json_option
def history(limit: int, failed: bool, job: str | None, as_json: bool) -> ExitStatus:
    """
    List what ran, what it saved, how it ended.

    The newest run comes first. ADDED is what the repository grew by, BACKUP the client's own
    id of the backup. Changes nothing on the machine.

    \b
    Examples:
      atomtx history
      atomtx history --failed --limit 5
      atomtx history --json | jq '.[0].outcome'

    \b
    EXIT STATUS
      0  shown, also when nothing ran yet
      1  the journal cannot be read
      2  wrong usage, or no permission
    """
    state = statedir.find()
    found = runs(state / journalfile.NAME, limit=limit or None, failed_only=failed, job=job)
    if as_json:
        echo(render.to_json_list(run.to_dict() for run in found))
    elif found:
        rows = [_row(run, state) for run in found]
        echo("\n".join(render.table(_HEADERS, rows, right=("AGE", "DURATION", "ADDED"))))
    else:
        echo("no run to show")
    return ExitStatus.COMPLETED


def _row(run: Run, state: Path) -> tuple[str, ...]:
    return (
        render.age(run.started_at),
        render.local_time(run.started_at),
        _job(run),
        run.state,
        _outcome(run, state),
        render.duration(run.duration_s),
        render.size(run.bytes_added),
        _backups(run.backup_ids),
        run.id[: render.SHORT_ID],
    )


def _job(run: Run) -> str:
    """Return the label; for the run of a step with the run that has made it."""
    label = run.label if len(run.label) <= 40 else run.label[:37] + "..."
    return render.label(label, run.parent)


def _outcome(run: Run, state: Path) -> str:
    """Return the outcome; for an open run also how it stands."""
    how = ""
    if not run.is_final:
        from .status import situation, standing

        run, life = standing(state, run)
        how = situation(run, life)
    if run.is_final:
        after = ", a step after it failed" if run.failed_after else ""
        return (run.outcome or "-") + after + _live(run)
    return (f"{run.outcome}, {how}" if run.outcome else how) + _live(run)


def _live(run: Run) -> str:
    """Say of a run that what it read, or which of it, was not a moment."""
    if not run.not_a_moment:
        return ""
    more = f" +{len(run.not_a_moment) - 1}" if len(run.not_a_moment) > 1 else ""
    return f" (not a moment: {run.not_a_moment[0]}{more})"


def _backups(ids: tuple[str, ...]) -> str:
    """Return the first backup's short id, and how many more there are."""
    if not ids:
        return "-"
    return render.backup_id(ids[0]) + (f" +{len(ids) - 1}" if len(ids) > 1 else "")

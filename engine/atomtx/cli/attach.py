"""`atomtx attach`: follow a living run."""

from __future__ import annotations

import time
from pathlib import Path

import click

from .. import history, journalfile, records, statedir
from ..errors import ExitStatus, WaitingError
from ..statedir import RunFolder
from ..states import Outcome, Verb
from . import NAMED, json_option, render
from .status import ADVICE, Life, read_progress

POLL_S = 0.5


@click.command()
@click.argument("run", type=NAMED)
@json_option
def attach(run: str, as_json: bool) -> ExitStatus:
    """
    Follow a living run until it ends.

    RUN is a run's id, or its first digits; or last, the newest. Ctrl-C ends the watching, not the
    run. Changes nothing on the machine.

    \b
    Example:
      atomtx attach 7f3c

    \b
    EXIT STATUS
      that of the run, as `atomtx backup` gives it:
      0  completed                     3  some files could not be read
      1  failed, or rolled back        4  backed up, cleanup parked
      7  backed up, a hook or the retention after it failed
      and of attach itself:
      2  no such run                   6  the run was interrupted: `atomtx recover`
      130  detached by Ctrl-C; the run goes on
    """
    state = statedir.find()
    found = history.chosen(state / journalfile.NAME, run)
    with render.reporter(as_json=as_json) as reporter:
        try:
            ended = follow(state, found, reporter)
        except KeyboardInterrupt:
            reporter.done(f"detached; run {found.id} goes on")
            return ExitStatus.SIGINT
        status = status_of(state, ended)
        reporter.done(describe_end(ended))
        reporter.result(ended.to_dict() | {"exit_status": status})
    return status


def follow(state: Path, run: history.Run, reporter: render.Reporter) -> history.Run:
    """
    Report a run's states and progress until nobody is at work on it; return how it stands then.

    Raises WaitingError where it was interrupted.
    """
    folder = RunFolder.of(state, run.id)
    shown = ""
    while True:
        life = Life.of(folder)  # first: a front end writes the end before it lets its lock go
        run = history.run(state / journalfile.NAME, run.id)
        if run.state != shown:
            shown = run.state
            reporter.step(shown)
        if run.is_final or (run.is_parked and not life.any):
            return run
        if not life.any:
            raise WaitingError(
                f"run {run.id} was interrupted in state {run.state}", hint=ADVICE["interrupted"]
            )
        if run.state == "backing-up":
            reporter.progress(read_progress(folder))
        time.sleep(POLL_S)


def status_of(state: Path, run: history.Run) -> ExitStatus:
    """Return what a run exited with that ended; 1 for a rolled back one: the signal is unknown."""
    if run.outcome == Outcome.ROLLED_BACK:
        return ExitStatus.FAILED
    steps = [
        records.Step(each.id, each.attempt, intent, each.compensates, each.outcome, each.detail)
        for each in history.steps(state / journalfile.NAME, run.id)
        if (intent := each.intent())
    ]
    return records.status(Verb(run.verb), run.state, run.outcome, steps, is_parked=run.is_parked)


def describe_end(run: history.Run) -> str:
    """Return in one line how a run ended."""
    words = f"run {run.id}: {run.outcome or 'no outcome'}"
    if run.is_parked and not run.is_final:
        words += ", cleanup parked: run `atomtx recover`"
    return f"{words} ({run.reason})" if run.reason else words

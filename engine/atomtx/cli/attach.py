"""`atomtx attach`: follow a living run."""

from __future__ import annotations

import time
from pathlib import Path

import click

from .. import history, journalfile, statedir
from ..errors import ExitStatus, WaitingError
from ..statedir import RunFolder
from . import json_option, render
from .status import ADVICE, Life, read_progress

POLL_S = 0.5


@click.command()
@click.argument("run")
@json_option
def attach(run: str, as_json: bool) -> ExitStatus:
    """
    Follow a living run until it ends.

    RUN is a run's id, or its first digits. Ctrl-C ends the watching, not the run. Changes
    nothing on the machine.

    \b
    Example:
      atomtx attach 7f3c

    \b
    EXIT STATUS
      that of the run, as `atomtx backup` gives it:
      0  completed                     3  some files could not be read
      1  failed, or rolled back        4  backed up, cleanup parked
      and of attach itself:
      2  no such run                   6  the run was interrupted: `atomtx recover`
      130  detached by Ctrl-C; the run goes on
    """
    state = statedir.find()
    found = history.run(state / journalfile.NAME, run)
    with render.reporter(as_json=as_json) as reporter:
        try:
            ended = follow(state, found, reporter)
        except KeyboardInterrupt:
            reporter.done(f"detached; run {found.id} goes on")
            return ExitStatus.SIGINT
        reporter.done(describe_end(ended))
        reporter.result(ended.to_dict() | {"exit_status": ended.exit_status})
    return ended.exit_status


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


def describe_end(run: history.Run) -> str:
    """Return in one line how a run ended."""
    words = f"run {run.id}: {run.outcome or 'no outcome'}"
    if run.is_parked and not run.is_final:
        words += ", cleanup parked: run `atomtx recover`"
    return f"{words} ({run.reason})" if run.reason else words

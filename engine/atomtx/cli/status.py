"""`atomtx status`: the runs that are at work, interrupted, or parked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from .. import history, journalfile, locks, statedir
from ..clients import Progress
from ..errors import ExitStatus
from ..statedir import RunFolder
from . import echo, json_option, render


@dataclass(frozen=True)
class Life:
    """Which of a run's locks are held: the truth about who lives."""

    front: bool
    runner: bool
    client: bool

    @classmethod
    def of(cls, folder: RunFolder) -> Life:
        return cls(
            front=locks.is_held(folder.front_lock),
            runner=locks.is_held(folder.runner_lock),
            client=locks.is_held(folder.client_lock),
        )

    @property
    def any(self) -> bool:
        return self.front or self.runner or self.client


def situation(run: history.Run, life: Life) -> str:
    """Return in one word how a run stands."""
    if run.is_final:
        return "ended"
    if life.front:
        return "running"
    if life.any:
        return "orphaned"
    return "parked" if run.is_parked else "interrupted"


def standing(state: Path, run: history.Run) -> tuple[history.Run, Life]:
    """
    Return a run as it stands, with who is at work on it.

    Who is gone meanwhile has written the run's end first: it is read once more.
    """
    life = Life.of(RunFolder.of(state, run.id))
    return (run if life.any else history.run(state / journalfile.NAME, run.id)), life


ADVICE: Mapping[str, str] = {
    "orphaned": "its front end is gone, its client goes on: `atomtx recover` takes it over",
    "interrupted": "nobody is at work on it: run `atomtx recover`",
    "parked": "something could not be removed yet: run `atomtx recover`",
}


def read_progress(folder: RunFolder) -> Progress:
    """Return where the client is; what is missing or unknown in the file is left out."""
    data = folder.read_progress()
    return Progress(**{f.name: data[f.name] for f in fields(Progress) if f.name in data})


@click.command()
@json_option
def status(as_json: bool) -> ExitStatus:
    """
    Show the runs that are at work or unfinished.

    Living runs with their progress; interrupted and parked ones with what to do about them.
    Changes nothing on the machine.

    \b
    Example:
      atomtx status

    \b
    EXIT STATUS
      0  shown
      1  the journal cannot be read
      2  wrong usage, or no permission
    """
    state = statedir.find()
    found = [standing(state, run) for run in history.open_runs(state / journalfile.NAME)]
    entries = [_entry(state, run, life) for run, life in found if not run.is_final]
    if as_json:
        echo(render.to_json(entries))
    elif entries:
        echo("\n".join(line for entry in entries for line in _lines(entry)))
    else:
        echo("no run is at work, none is unfinished")
    return ExitStatus.COMPLETED


def _entry(state: Path, run: history.Run, life: Life) -> dict[str, Any]:
    folder = RunFolder.of(state, run.id)
    how = situation(run, life)
    return {
        "run": run.id,
        "label": run.label,
        "parent": run.parent,
        "situation": how,
        "advice": ADVICE.get(how),
        "state": run.state,
        "outcome": run.outcome,
        "reason": run.reason,
        "started_at": run.started_at,
        "locks": life,
        "pid": run.pid if life.front else None,
        "progress": read_progress(folder) if life.any and run.state == "backing-up" else None,
    }


def _lines(entry: dict[str, Any]) -> list[str]:
    started = render.age(entry["started_at"])
    label = render.label(entry["label"], entry["parent"])
    first = f"{entry['run']}  {label}  {entry['situation']}"
    lines = [render.printable(first), f"  {entry['state']}, started {_ago(started)}"]
    if entry["progress"] and (words := render.progress_words(entry["progress"])):
        lines.append(f"  {words}")
    if entry["reason"]:
        lines.append(render.printable(f"  {entry['reason']}"))
    if entry["advice"]:
        lines.append(f"  {entry['advice']}")
    return lines


def _ago(age: str) -> str:
    return "now" if age == "now" else f"{age} ago"

"""
The steps of a job: which words may be one, and what became of each.  Pure.

A step is a command of ours.  Whether it is done is asked of the runs that it has made, never
remembered: the journal has them, and each is settled by the rules of its own verb first.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .errors import ExitStatus, UserError, worst
from .intents import RunStep
from .records import Run, Step, status_of
from .states import Outcome, Verb

COMMANDS = ("snap", "prune", "unsnap", "clone", "backup", "sure")
_SHOWN = 3
_TOLD = {
    ExitStatus.PARTIAL: "it did a part of its work",
    ExitStatus.PARKED: "it is done, and something of it is still in use: `atomtx recover`",
    ExitStatus.BUSY: "another run of its job was at work",
    ExitStatus.WAITING: "its run waits: `atomtx recover` goes on with that",
    ExitStatus.STEP_AFTER_FAILED: "it is done, and a hook after it failed",
}


def parse(text: str) -> tuple[str, ...]:
    """Return the words of a step; UserError for what cannot be one."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as exc:
        raise UserError(f"the step {text!r} cannot be read: {exc}") from exc
    if words[:1] == ("run",):
        raise UserError(f"the step {text!r} would run steps again")
    if not words or words[0] not in COMMANDS:
        raise UserError(
            f"the step {text!r} is no command for a step; they are {', '.join(COMMANDS)}"
        )
    return words


def own_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return the words of a command that are not for its client, which follow on `--`."""
    has_more = words[0] == "backup" and "--" in words
    return tuple(words[: words.index("--")] if has_more else words)


def is_repeated(words: Sequence[str]) -> bool:
    """
    Tell whether a step that was interrupted is simply carried out again, whatever it has done.

    `sure` makes no run, and a backup of kept snapshots one a moment: what it lacks it asks itself.
    """
    return words[0] == "sure" or "--from-snapshots" in own_words(words)


def is_backup_of(words: Sequence[str], job: str) -> bool:
    """Tell whether a whole step backs a job up: whoever waits for its ping waits for that."""
    return words[0] == "backup" and job in own_words(words)[1:]


def ended_by(words: Sequence[str], made: Sequence[Run]) -> ExitStatus | None:
    """
    Return how a step has ended by the runs that it *made*, the oldest first; None for not yet.

    One that was rolled back, or has failed, is carried out again: nobody can tell an interruption
    from another reason.
    """
    done = [] if is_repeated(words) else [run for run in made if _is_done(run)]
    return status_of(done[-1]) if done else None


def _is_done(run: Run) -> bool:
    if run.verb is Verb.PRUNE:  # an interrupted one, or unsnap, is partial: it decides anew
        return run.outcome == Outcome.COMPLETED
    return run.outcome in (Outcome.COMPLETED, Outcome.PARTIAL)


def detail(status: ExitStatus, made: Sequence[Run]) -> str:
    """Say how a step ended, for the journal; `records.Step.status` reads it back."""
    ids = [run.id for run in made]
    if len(ids) > _SHOWN:
        return f"exit status {status:d}; {len(ids)} runs, the last {ids[-1]}"
    word = "runs" if len(ids) > 1 else "run"
    return f"exit status {status:d}" + (f"; {word} {', '.join(ids)}" if ids else "")


def to_do(run: Run) -> tuple[Step, ...]:
    """Return the steps that are left; none after one that failed."""
    return () if failed(run) else run.pending(RunStep)


def verdict(run: Run) -> tuple[Outcome, str | None]:
    """Return the outcome of a run of which nothing is left to do, and the reason."""
    if wrong := failed(run):
        return Outcome.FAILED, _told(wrong[-1]) + not_run(run)
    found = [step for step in run.steps if step.status not in (None, ExitStatus.COMPLETED)]
    partial = worst(run.step_statuses) is ExitStatus.PARTIAL
    outcome = Outcome.PARTIAL if partial else Outcome.COMPLETED
    return outcome, "; ".join(map(_told, found)) or None


def not_run(run: Run) -> str:
    """Name the steps that are not begun any more."""
    left = [words_of(step) for step in run.pending(RunStep)]
    return f"; not run: {', '.join(left)}" if left else ""


def words_of(step: Step) -> str:
    """Return a step's words as they can be typed."""
    assert isinstance(step.intent, RunStep)
    return shlex.join(step.intent.words)


def failed(run: Run) -> list[Step]:
    """Return the steps that failed: one, or none."""
    return [step for step in run.steps if step.outcome == "failed"]


def _told(step: Step) -> str:
    assert isinstance(step.intent, RunStep)
    words = _TOLD.get(step.status) if step.status is not None else None
    said = f"{words} ({step.detail})" if words else step.detail
    return f"step {step.intent.n} ({words_of(step)}): {said}"

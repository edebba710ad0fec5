"""`atomtx stop`: ask a living run to end."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import click

from .. import history, journalfile, locks, statedir
from ..errors import EffectError, ExitStatus, UserError, WaitingError
from ..statedir import RunFolder
from ..states import Verb
from . import NAMED, json_option, render
from .attach import describe_end
from .status import ADVICE, Life

POLL_S = 0.2


@click.command()
@click.argument("run", type=NAMED)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for its end.",
)
@json_option
def stop(run: str, timeout_s: float, as_json: bool) -> ExitStatus:
    """
    Stop a living run and undo it.

    Sends SIGTERM to the run's front end, which ends the client in order, removes mounts and
    snapshots, and exits. Where the front end is gone, or leaves the run for later, as with
    --on-stop keep, does all that itself. RUN is a run's id, or its first digits. A snap whose
    snapshots are all there keeps them; of a prune that is stopped what it has not destroyed stays,
    and of a clone what has arrived. Of the steps of a job the one that is at work is stopped in
    order, and the others are not run.

    \b
    Example:
      atomtx stop 7f3c

    \b
    EXIT STATUS
      0  it has ended, nothing of it is left; also when it had ended before
      1  it was asked, but did not end in time
      2  no such run, or no permission to signal it
      4  it has ended, its cleanup is parked: run `atomtx recover`
      6  nobody is at work on it any more: run `atomtx recover`
    """
    state = statedir.find()
    found = history.run(state / journalfile.NAME, run)
    with render.reporter(as_json=as_json) as reporter:
        ended = found if found.is_final else _stop(state, found, reporter, timeout_s=timeout_s)
        reporter.done(describe_end(ended))
        reporter.result(ended.to_dict())
    return ExitStatus.COMPLETED if ended.is_final else ExitStatus.PARKED


def _stop(
    state: Path, run: history.Run, reporter: render.Reporter, *, timeout_s: float
) -> history.Run:
    folder = RunFolder.of(state, run.id)
    end = time.monotonic() + timeout_s
    was_asked = False
    while Life.of(folder).front:  # who waits for the job may have taken it over from the first
        _ask(folder.front_lock, run, "front end", reporter)
        _wait(folder.front_lock, end, timeout_s)
        was_asked = True
    if _lives(state, run) or (was_asked and history.is_kept(state / journalfile.NAME, run)):
        _settle(state, run, reporter)
    return _settled(state, run)


def _lives(state: Path, run: history.Run) -> bool:
    """Tell whether something of a run is at work, or of the runs that its steps have made."""
    steps = history.children(state / journalfile.NAME, run.id) if run.verb == Verb.RUN else []
    return any(Life.of(RunFolder.of(state, each.id)).any for each in (run, *steps))


def _settle(state: Path, run: history.Run, reporter: render.Reporter) -> None:
    """
    End what lives of a run whose front end is gone, and undo it, as `recover --stop` does.

    A run of steps is given up with the run of one of them, which it would begin again.
    """
    from ..executor import Tell
    from ..interrupts import Interrupts
    from ..journal import Journal
    from ..settling import Patience, Settler

    tell = Tell(reporter.step, reporter.warn, reporter.progress)
    with Journal.open(statedir.prepare(state)) as journal:
        settler = Settler(
            journal, Interrupts().install(), tell, rollback=True, patience=Patience.STOP
        )
        for each in journal.open_runs():
            if each.id == run.of_run:
                settler.settle(each)
        settler.settle(journal.load(run.id))


def _settled(state: Path, run: history.Run) -> history.Run:
    """Return the run as it stands now; WaitingError where it is neither ended nor parked."""
    now = history.run(state / journalfile.NAME, run.id)
    if now.is_final or now.is_parked:
        return now
    raise WaitingError(
        f"nobody is at work on run {run.id}; it is in state {now.state}", hint=ADVICE["interrupted"]
    )


def _ask(lock: Path, run: history.Run, who: str, reporter: render.Reporter) -> None:
    targets = _targets(lock, run.pid)
    try:
        asked = [
            process
            for process in targets
            if locks.send(
                process.pid, signal.SIGTERM, if_still=lambda pid: locks.has_lock_open(pid, lock)
            )
        ]
    except PermissionError as exc:
        raise UserError(
            f"not permitted to signal the {who} of run {run.id}", hint="run atomtx as root"
        ) from exc
    if not asked:
        reporter.step(f"the {who} is gone already; waiting for what it started")
    for process in asked:
        reporter.step(f"asked the {who}, process {process}, to stop")


def _targets(lock: Path, recorded_pid: int) -> list[locks.Process]:
    """
    Return the processes to signal among those that have the lock's file open.

    Another `atomtx status` may have it open for an instant; the recorded pid tells them apart,
    where it is one of them (it may be another pid namespace's).
    """
    found = [p for p in locks.holders(lock) if p.command not in locks.COMMANDS]
    return [p for p in found if p.pid == recorded_pid] or found


def _wait(lock: Path, end: float, timeout_s: float) -> None:
    while locks.is_held(lock):
        if time.monotonic() >= end:
            raise EffectError(
                f"it did not end within {timeout_s:.0f} s",
                hint="it may be waiting for the pool or the repository; `atomtx status` shows it",
            )
        time.sleep(POLL_S)

"""A run from a command line: settle what is left of its job, then carry it out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from .. import locks, statedir
from ..errors import (
    AtomtxError,
    BusyError,
    EffectError,
    ExitStatus,
    Interrupted,
    JournalDamagedError,
    JournalError,
    JournalFullError,
    WaitingError,
    worst,
)
from ..executor import Executor, Tell
from ..intents import Intent
from ..interrupts import Interrupts
from ..journal import ActiveRunError, Journal, NoRunError
from ..plan import Plan, job_key
from ..records import Run
from ..recovery import Adopt, LeaveAlone
from ..settling import (
    LEFT,
    ActiveStepError,
    LivingCommandError,
    Patience,
    Settled,
    Settler,
    front,
    status_of,
)
from ..statedir import RunFolder
from ..stepping import Commands
from .render import Reporter
from .within import within

if TYPE_CHECKING:
    from .jobs import Asked
    from .notifying import Notifier

_T = TypeVar("_T")
_LOOK_S = 0.2
_FOLLOWED_S = 60.0  # in which who stops or follows a run sees how it ended


def tell(show: Reporter) -> Tell:
    """Return what a run tells, as a reporter shows it."""
    return Tell(show.step, show.warn, show.progress)


def in_journal(
    work: Callable[[Journal], ExitStatus],
    *,
    keep_history_s: float,
    interrupts: Interrupts,
    show: Reporter,
) -> ExitStatus:
    """Do *work* on the journal, which is made where there is none; forget old runs after it."""
    interrupts.install()
    state = statedir.prepare(statedir.find())
    of_state = [] if within() else statedir.notes(state)  # else it was said of all the steps
    with Journal.open(state) as journal:
        for note in (*of_state, *journal.notes()):
            show.note(note)
        status = work(journal)
        try:
            journal.expire(max(keep_history_s, _FOLLOWED_S))
        except JournalDamagedError:
            raise
        except JournalError as exc:  # what was done is done
            show.warn(f"old runs are not forgotten yet: {exc.message}")
    return status


def result(run: Run, **more: Any) -> dict[str, Any]:
    """Return how a run ended as `--json` prints it, with what its verb has to tell besides."""
    return {
        "run": run.id,
        "job": run.label,
        "state": run.state,
        "outcome": run.outcome,
        "reason": run.reason,
        "exit_status": int(status_of(run)),
        **more,
    }


def in_its_turn(
    asked: Asked,
    command: str,
    make: Callable[[], _T],
    plan_of: Callable[[_T], Plan],
    carry_out: Callable[[Journal, _T], ExitStatus],
    *,
    wait: bool,
    notifier: Notifier,
    interrupts: Interrupts,
    show: Reporter,
) -> ExitStatus:
    """Do `in_turn` in the journal, and give notice of what was left, and of what happens."""

    def work(journal: Journal) -> ExitStatus:
        return in_turn(
            journal,
            make,
            lambda made: plan_of(made).job,
            lambda made: carry_out(journal, made),
            wait=wait,
            interrupts=interrupts,
            show=show,
            told=lambda settled: notifier.interrupted(settled.run, settled.status),
            known=f"{command} {job_key(asked.name)}" if asked.name else "",
        )

    with notifier.delivering(f"{command} {asked.title}"):
        return in_journal(
            work, keep_history_s=asked.job.keep_history, interrupts=interrupts, show=show
        )


def status_of_ended(run: Run, interrupts: Interrupts) -> ExitStatus:
    """Return the exit status of a run that this command brought to its end, signals and all."""
    if interrupts.noted is None:
        return status_of(run)
    return worst([status_of(run), Interrupted(interrupts.noted).exit_status])


def settle(
    journal: Journal,
    job: str,
    *,
    interrupts: Interrupts,
    show: Reporter,
    sources: Mapping[str, Mapping[str, str]] | None = None,
    told: Callable[[Settled], None] = lambda _: None,
    of_step: Callable[[Settled], None] = lambda _: None,
    commands: Commands | None = None,
) -> bool:
    """
    Finish or undo a job's interrupted run; try to clear a parked one; name those of other jobs.

    Tell whether there was any of this job; *told* is called for an interrupted one, and before
    that *of_step* for each run of a step of it.  Raises ActiveRunError where one is at work,
    WaitingError where one waits.
    """
    settler = Settler(
        journal,
        interrupts,
        tell(show),
        patience=Patience.WAIT,
        sources=sources,
        commands=commands,
        told=of_step,
    )
    others, found = [], False
    there = journal.open_runs()
    ours = {run.id for run in there if run.job == job}
    for run in there:
        found = found or run.job == job
        if run.of_run in ours:  # settled with that
            continue
        if run.job != job:
            others.append(run.id)
        elif run.is_parked:
            _try_parked(settler, run, show)
        else:
            _settle_one(settler, run, show, told)
        interrupts.stop()
    if others:
        _tell_of_others(journal, others, show)
    return found


def _tell_of_others(journal: Journal, others: Sequence[str], show: Reporter) -> None:
    """Tell how many of them nobody is at work on, now: to settle ours may have taken hours."""
    folders = [RunFolder.of(journal.state, run) for run in others]
    idle = [folder.path.name for folder in folders if not locks.is_held(folder.front_lock)]
    count = sum(run.id in idle for run in journal.open_runs()) if idle else 0
    if count:
        runs = "run of another job is" if count == 1 else "runs of other jobs are"
        show.note(f"{count} {runs} unfinished: `atomtx recover`")


def _try_parked(settler: Settler, run: Run, show: Reporter) -> None:
    try:
        settler.settle(run)
    except JournalDamagedError:
        raise
    except AtomtxError as exc:  # its result stands; it must not block a new backup
        show.warn(str(exc))


def _settle_one(
    settler: Settler, run: Run, show: Reporter, told: Callable[[Settled], None]
) -> None:
    try:
        settled = settler.settle(run)
    except NoRunError:  # ended, and forgotten at its --keep-history, since we looked
        return
    except ActiveStepError as exc:
        raise ActiveRunError(exc.run, "a step of this job") from exc
    if settled.has_ended_before:
        return
    if isinstance(settled.decision, LeaveAlone):
        raise ActiveRunError(run.id)
    told(settled)
    if settled.interrupted:
        raise settled.interrupted
    if not settled.run.is_final and not settled.run.is_parked:
        raise WaitingError(
            f"run {run.id} of this job is kept waiting: {settled.run.reason}",
            hint="`atomtx recover` tries again, `atomtx recover --rollback` gives it up",
        )
    show.step(f"run {run.id} of this job: {settled.run.outcome}")


def in_turn(
    journal: Journal,
    make: Callable[[], _T],
    job_of: Callable[[_T], str],
    carry_out: Callable[[_T], ExitStatus],
    *,
    wait: bool,
    interrupts: Interrupts,
    show: Reporter,
    sources: Mapping[str, Mapping[str, str]] | None = None,
    told: Callable[[Settled], None] = lambda _: None,
    of_step: Callable[[Settled], None] = lambda _: None,
    commands: Commands | None = None,
    known: str = "",
) -> ExitStatus:
    """
    Settle what is left of a job, and carry out what *make* plans.

    Where another run of the job is at work, raise ActiveRunError, or *wait* for its end and plan
    anew; so with a command of a killed one, LivingCommandError.  Where nothing can be planned, what
    is left of the job *known* lets go at least of what its hooks have stopped.
    """
    while True:
        try:
            made = make()
        except Interrupted:
            raise
        except AtomtxError:
            if known:
                _take_over(journal, known, interrupts=interrupts, show=show, told=told)
            raise
        try:
            job = job_of(made)
            if settle(
                journal,
                job,
                interrupts=interrupts,
                show=show,
                sources=sources,
                told=told,
                of_step=of_step,
                commands=commands,
            ):
                made = make()  # it may have taken hours
            return carry_out(made)
        except (ActiveRunError, LivingCommandError) as exc:
            if not wait:
                raise
            _wait_for(journal, exc, interrupts=interrupts, show=show)


def _take_over(
    journal: Journal,
    job: str,
    *,
    interrupts: Interrupts,
    show: Reporter,
    told: Callable[[Settled], None],
) -> None:
    """Take a job's interrupted runs as far as that needs no client, as `recover --no-resume`."""
    settler = Settler(journal, interrupts, tell(show), patience=Patience.LEAVE, may_resume=False)
    for run in journal.open_runs():
        if run.job != job or run.is_parked:
            continue
        try:
            settled = settler.settle(run)
        except JournalDamagedError:
            raise
        except AtomtxError as exc:  # why nothing can be planned is what the user is told
            show.warn(str(exc))
        else:
            _tell_taken_over(settled, show, told)


def _tell_taken_over(settled: Settled, show: Reporter, told: Callable[[Settled], None]) -> None:
    run = settled.run
    if settled.decision == LEFT or isinstance(settled.decision, Adopt):
        show.note(f"run {run.id} of this job is unfinished: `atomtx recover`")
    elif not isinstance(settled.decision, LeaveAlone):  # else somebody is at work on it
        told(settled)
        show.step(f"run {run.id} of this job: {run.outcome}")


def _wait_for(
    journal: Journal,
    active: ActiveRunError | LivingCommandError,
    *,
    interrupts: Interrupts,
    show: Reporter,
) -> None:
    """Wait until nobody is at work on the active run; raise Interrupted on a signal."""
    show.step(f"{active.message}: waiting for its end")
    lock = RunFolder.of(journal.state, active.run).front_lock
    while locks.is_held(lock):
        interrupts.sleep(_LOOK_S)
    interrupts.check()


def carry_out(
    journal: Journal,
    made: Plan,
    intents: Sequence[Intent],
    advance: Callable[[RunFolder, int, Run], Run],
    *,
    check: Callable[[Sequence[Run]], None] | None = None,
) -> Run:
    """
    Begin a run in the journal and bring it to its end by *advance*; return it.

    *advance* gets its folder and the descriptor that holds lock F.  *check* is for `Journal.begin`.
    """
    if step := within():
        made = replace(made, parent=step.parent)
    folder = _make(RunFolder.of(journal.state, made.run))
    with front(folder) as lock:
        assert lock is not None
        try:
            run = journal.begin(made, intents, check=check)
        except (BusyError, JournalFullError):  # there is no row of it
            shutil.rmtree(folder.path)
            raise
        return advance(folder, lock, run)


def executed(
    journal: Journal, interrupts: Interrupts, show: Reporter
) -> Callable[[RunFolder, int, Run], Run]:
    """Return the `advance` of `carry_out` for what the executor does."""

    def advance(folder: RunFolder, lock: int, run: Run) -> Run:
        executor = Executor(journal, folder, front=lock, interrupts=interrupts, tell=tell(show))
        return executor.advance(run)

    return advance


def _make(folder: RunFolder) -> RunFolder:
    try:
        return folder.make()
    except EffectError:  # such as a full disk
        shutil.rmtree(folder.path, ignore_errors=True)
        raise

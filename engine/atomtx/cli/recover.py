"""`atomtx recover`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from .. import (
    aside,
    config,
    history,
    journalfile,
    outbox,
    provenance,
    recovery,
    statedir,
    states,
)
from ..config_kinds import near, shown
from ..errors import AtomtxError, ExitStatus, Interrupted, JournalError, UserError, worst
from ..executor import Tell
from ..interrupts import Interrupts
from ..journal import Journal, NoRunError
from ..plan import job_key
from ..records import Run, leaves_a_hook
from ..settling import Patience, Settled, Settler, abandon
from ..states import Verb
from . import NAMED, jobs, json_option, strays
from .notifying import Notifier
from .render import Reporter, reporter
from .steps import Commands, tells_itself
from .summary import result

_NOT_WITH_SCAN = {
    "prefix": "--run",
    "job_name": "--job",
    "rollback": "--rollback",
    "no_resume": "--no-resume",
    "stop": "--stop",
    "no_wait": "--no-wait",
    "adopt": "--adopt",
    "abandoned": "--abandon",
}
# What a state that nobody thought of raises: of one run alone, and no reason to leave the mounts
# and holds of the others where they are.
_BUGS = (AssertionError, AttributeError, LookupError, StopIteration, TypeError, ValueError)

# What the journal refuses, or a signal ends, is of all runs; any other error is of one alone.
_OF_ALL = (JournalError, Interrupted)


@click.command()
@click.option("--run", "prefix", type=NAMED, metavar="ID", help="This run alone.")
@click.option("--job", "job_name", type=NAMED, metavar="NAME", help="The runs of this job alone.")
@click.option("--rollback", is_flag=True, help="Undo; do not resume.")
@click.option(
    "--no-resume",
    is_flag=True,
    help="Clean up alone: leave what needs the client or its repository for later.",
)
@click.option("--stop", is_flag=True, help="Stop a client that is still running.")
@click.option("--no-wait", is_flag=True, help="Leave a client that is still running alone.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, change nothing.")
@click.option("--scan", is_flag=True, help="List what carries our marks and is in no journal.")
@click.option(
    "--adopt",
    type=NAMED,
    metavar="ID",
    help="Take what --scan found into this journal and undo it.",
)
@click.option(
    "--abandon",
    "abandoned",
    type=NAMED,
    metavar="ID",
    help="Forget a run whose pool never returns.",
)
@click.option(
    "--pattern",
    type=NAMED,
    metavar="NAME",
    help="With --scan and --adopt: names of an interrupted snap, besides the jobs'.",
)
@jobs.config_option("Take the places of the jobs' credentials from this configuration.")
@json_option
def recover(as_json: bool, **options: Any) -> ExitStatus:
    """
    Finish or undo interrupted runs.

    For each run whose front end is gone: a client that still runs is waited for; one that ended
    is taken at its word; else it runs again on the same snapshots, or, where one of them is
    gone, everything is undone. What cannot be decided now (a pool that is not imported, a key,
    a repository, a password that is not there) waits, and says for what. Only what is proven to
    be the run's own is ever unmounted or destroyed.

    \b
    Examples:
      atomtx recover
      atomtx recover --rollback --run 7f3c
      atomtx recover --scan
      atomtx recover --config /etc/atomtx/atomtx.toml    the credentials were moved
      atomtx recover --no-resume       at boot, before there is a network

    \b
    EXIT STATUS
      0 nothing is left to do     5 the run to adopt, or to abandon, is at work
      1 a run failed              6 waiting, and why
      3 a run ended partial       130, 143 interrupted
      4 something is in use: parked, try again
      7 a step after a backup failed, or the undo of a hook of a run that was interrupted
    """
    with reporter(as_json=as_json) as show:
        return _Recover(show, options, as_json=as_json).run()


class _Recover:
    def __init__(self, show: Reporter, options: dict[str, Any], *, as_json: bool) -> None:
        self._show = show
        self._options = options
        self._interrupts = Interrupts()
        self._notifier = Notifier.of_environment(
            show.warn, statedir.find(), by_job=jobs.notices(options["config_path"], show.warn)
        )
        # As at boot; after a service there is one.
        self._notifier.is_offline = options["no_resume"] and not options["stop"]
        self._sources: dict[str, dict[str, str]] = {}
        self._open: dict[str, str] = {}  # the runs of steps that are settled here -> their jobs
        # What was interrupted may have been a service, which waits: so does what is left of it.
        self._passed = ("--wait", "--json") if as_json else ("--wait",)

    def run(self) -> ExitStatus:
        if os.geteuid() != 0:
            raise UserError("only root can recover", hint="run it with sudo")
        if self._options["stop"] and self._options["no_wait"]:
            raise UserError("--stop and --no-wait exclude each other")
        if self._options["rollback"] and self._options["no_resume"]:
            raise UserError("--rollback and --no-resume exclude each other")
        if self._options["pattern"] and not (self._options["scan"] or self._options["adopt"]):
            raise UserError("--pattern is of no use without --scan or --adopt")
        self._check_scan()
        if self._options["dry_run"] and (self._options["adopt"] or self._options["abandoned"]):
            raise UserError("--dry-run goes with neither --adopt nor --abandon")
        self._sources = self._sources_found()
        if self._options["dry_run"] or self._options["scan"]:
            return self._recover()
        with self._notifier.delivering("atomtx recover"):
            return self._recover()

    def _check_scan(self) -> None:
        """Refuse what `--scan`, which lists, would pass over."""
        given = next((o for name, o in _NOT_WITH_SCAN.items() if self._options[name]), None)
        if self._options["scan"] and given:
            raise UserError(f"--scan and {given} exclude each other", hint="--scan only lists")

    def _sources_found(self) -> dict[str, dict[str, str]]:
        """
        Return where credentials are now, by the configuration that was given, or a job's own.

        One that nobody named and that is wrong is warned of: it must not keep hooks from being
        undone, and the journal has the places as they were.
        """
        given: str | None = self._options["config_path"]
        if given is not None:
            return jobs.sources(given)
        if self._options["no_resume"] or not self._options["job_name"] or not config.is_there():
            return {}
        try:
            return jobs.sources(config.find())
        except UserError as exc:
            self._show.warn(f"credentials are looked for where they were: {exc.message}")
            return {}

    def _recover(self) -> ExitStatus:
        self._interrupts.install()
        state = statedir.find()
        only_looks = self._options["dry_run"] or self._options["scan"]
        if only_looks and not journalfile.header(state / journalfile.NAME):
            return self._without_journal(state)
        statedir.prepare(state)
        with Journal.open(state, keep=self._options["dry_run"]) as journal:
            for note in journal.notes():
                self._show.note(note)
            if self._options["scan"]:
                return self._strays().scan(journal)
            if self._options["adopt"]:
                adopted = self._strays().adopt(journal, self._options["adopt"])
                self._options["prefix"] = adopted
            if self._options["abandoned"]:
                return self._abandon(journal, self._options["abandoned"])
            return self._settle_all(journal)

    def _without_journal(self, state: Path) -> ExitStatus:
        """Do so where there is no journal yet, or no more: who only looks makes none."""
        for note in aside.notes(state):
            self._show.note(note)
        if self._options["scan"]:
            return self._strays().scan(None)
        if provenance.knows_any(state):
            self._show.note(
                "the journal that was here is gone; `atomtx recover --scan` lists what its runs "
                "left"
            )
        _chosen([], self._options["prefix"])
        return self._nothing(state / journalfile.NAME)

    def _strays(self) -> strays.Strays:
        options = self._options
        return strays.Strays(
            self._show, options["pattern"], options["config_path"], may_stop=options["stop"]
        )

    # -- open runs -------------------------------------------------------------------------

    def _settle_all(self, journal: Journal) -> ExitStatus:
        there = journal.open_runs()
        runs = _chosen(there, self._options["prefix"])
        if self._options["job_name"]:
            wanted = job_key(self._options["job_name"])
            # Of a step of another job's run that one has more to do, and must find it free.
            of_steps = {run.id: run.of_job for run in there if run.verb is Verb.RUN}
            runs = [run for run in runs if of_steps.get(run.of_run, run.of_job) == wanted]
        # What is left of a run's steps is decided by the runs of those that were begun.
        runs.sort(key=lambda run: run.verb is Verb.RUN)
        settler = Settler(
            journal,
            self._interrupts,
            Tell(self._show.step, self._show.warn, self._show.progress),
            rollback=self._options["rollback"],
            patience=self._patience(),
            sources=self._sources,
            may_resume=not self._options["no_resume"],
            commands=Commands(self._show, self._interrupts, self._passed),
            told=lambda settled: self._tell_of_step(settled, [run.id for run in runs]),
        )
        if not runs:
            return self._nothing(journal.path)
        if self._options["dry_run"]:
            return self._each(runs, lambda run: self._foresee(settler, run))
        self._open = {run.id: run.of_job for run in runs if run.verb is Verb.RUN}
        return self._each(runs, lambda run: self._settle(settler, journal, run))

    def _each(self, runs: list[Run], act: Callable[[Run], ExitStatus]) -> ExitStatus:
        """Act on one after the other; a bug that one meets is raised after all others."""
        statuses, bugs = [], []
        for run in runs:
            try:
                status = act(run)
            except _BUGS as exc:
                self._show.warn(f"run {run.id} cannot be settled: this is a bug, shown at the end")
                bugs.append(exc)
            else:
                if run.of_run not in self._open:  # that run tells how all of it stands now
                    statuses.append(status)
            self._interrupts.stop()
        if bugs:
            raise ExceptionGroup("runs that cannot be settled", bugs)
        return worst(statuses)

    def _nothing(self, journal: Path) -> ExitStatus:
        self._check_job(journal)
        self._show.done("nothing to recover")
        return ExitStatus.COMPLETED

    def _check_job(self, journal: Path) -> None:
        """Warn of a job that nobody knows: its name is mistyped, or the configuration another."""
        name: str | None = self._options["job_name"]
        if not name or history.runs(journal, limit=1, job=job_key(name)):
            return
        given = self._options["config_path"]
        try:
            known = config.load(config.find(given)).jobs if config.is_there(given) else {}
        except UserError:  # it was warned of, and may well have the job
            return
        if name not in known:
            meant = near(name, tuple(known))
            hint = f'; did you mean "{meant}"?' if meant else ""
            self._show.warn(f"no configuration and no run has a job {shown(name)}{hint}")

    def _patience(self) -> Patience:
        if self._options["stop"]:
            return Patience.STOP
        return Patience.LEAVE if self._options["no_wait"] else Patience.WAIT

    def _foresee(self, settler: Settler, run: Run) -> ExitStatus:
        """Say what would be done with a run; one that cannot be asked about is warned of."""
        try:
            would = _would(run, settler.decide(run))
        except _OF_ALL:
            raise
        except AtomtxError as exc:
            self._show.warn(f"run {run.id} ({run.label}): {exc}")
            return exc.exit_status
        self._show.done(f"run {run.id} ({run.label}), {run.state}: {would}")
        return ExitStatus.COMPLETED

    def _settle(self, settler: Settler, journal: Journal, run: Run) -> ExitStatus:
        try:
            settled = settler.settle(run)
        except NoRunError:  # ended, and forgotten at its --keep-history, since we looked
            return ExitStatus.COMPLETED
        except _OF_ALL:
            raise
        except AtomtxError as exc:
            # One run that must wait, or cannot be settled, does not keep the others from their end.
            self._show.warn(str(exc))
            if not (self._is_told_by_service() or self._is_told_by_steps(run)):
                self._notifier.unsettled(run, exc)
            return exc.exit_status
        self._show.result(result(journal.path, settled.run))
        self._show.done(_told(settled))
        self._tell(run, settled)
        return settled.status

    def _tell(self, before: Run, settled: Settled) -> None:
        """Give notice of a run that nobody was at work on."""
        is_left = isinstance(settled.decision, recovery.LeaveAlone | recovery.Adopt)
        is_new = settled.leaves_a_hook and not leaves_a_hook(before.steps)  # else it was told
        if is_left and not is_new:
            return
        if self._is_told_by_steps(before):
            return
        if not before.is_parked:
            self._notifier.interrupted(settled.run, settled.status)
        elif settled.run.is_parked and not self._is_told_by_service():
            self._notifier.still_parked(settled.run, settled.status)

    def _tell_of_step(self, settled: Settled, chosen: Collection[str]) -> None:
        """Give notice of a step's run that was settled with its steps, and not as one *chosen*."""
        if settled.run.id not in chosen and not self._is_told_by_steps(settled.run):
            self._notifier.interrupted(settled.run, settled.status)

    def _is_told_by_steps(self, run: Run) -> bool:
        """Tell whether a run of steps that is settled as well tells of it: not of another job's."""
        return run.of_run in self._open and not tells_itself(run, self._open[run.of_run])

    def _is_told_by_service(self) -> bool:
        """
        Tell whether we clean up after a service of whose trouble a notice is given anyway.

        It has left one itself, or it failed (systemd.exec(5)), and `notify` would tell of it.
        """
        if not (self._options["stop"] and self._options["no_resume"] and outbox.is_wanted()):
            return False
        started = os.environ.get("INVOCATION_ID", "")
        failed = os.environ.get("SERVICE_RESULT", "success") != "success"
        return failed or bool(started and outbox.has_spoken(statedir.find(), started))

    def _abandon(self, journal: Journal, prefix: str) -> ExitStatus:
        run = _chosen(journal.open_runs(), prefix)[0]
        abandon(journal, run)
        self._show.done(
            f"run {run.id} ({run.label}) is abandoned; nothing on the machine was changed"
        )
        return ExitStatus.COMPLETED


def _chosen(runs: list[Run], prefix: str | None) -> list[Run]:
    if prefix is None:
        return runs
    matching = [run for run in runs if run.id.startswith(prefix)]
    if len(matching) != 1:
        many = "more than one open run" if matching else "no open run"
        raise UserError(f"{many} begins with {prefix!r}", hint="`atomtx status` lists them")
    return matching


def _would(run: Run, decision: recovery.Decision) -> str:
    match decision:
        case recovery.RollBack(reason) if run.verb is Verb.PRUNE:
            return f"would be given up, and what is still there stay: {reason}"
        case recovery.Resume() | recovery.RollForward() if run.verb is Verb.SNAP and (
            run.state != states.UNMOUNTING
        ):
            return "its snapshots would be kept"
        case recovery.RollBack(reason) if run.verb is Verb.CLONE:
            return f"would be given up, and what has arrived stay: {reason}"
        case recovery.Resume() if run.verb is Verb.CLONE:
            return "would go on with what has arrived"
        case recovery.RollBack(reason) if run.verb is Verb.RUN:
            return f"would be given up, and what its steps have done stay: {reason}"
        case recovery.Resume() if run.verb is Verb.RUN:
            return "would go on at the step where it was"
        case recovery.LeaveAlone(reason):
            return f"would be left alone: {reason}"
        case recovery.Adopt():
            return "its client lives: would wait for its end"
        case recovery.EndOrphans():
            return "would end the processes that it left behind"
        case recovery.Resume():
            return "would be resumed on the same snapshots"
        case recovery.RollForward():
            return "would be cleaned up"
        case recovery.RollBack(reason):
            return f"would be rolled back: {reason}"
        case recovery.Wait(reason):
            return f"would wait: {reason}"


def _told(settled: Settled) -> str:
    run = settled.run
    head = f"run {run.id} ({run.label})"
    if isinstance(settled.decision, recovery.LeaveAlone):
        return f"{head}: left alone, {settled.decision.reason}"
    if isinstance(settled.decision, recovery.Adopt):
        return f"{head}: its client is at work; left alone"
    tail = f": {run.reason}" if run.reason else ""
    if run.is_parked:
        return f"{head}: {run.outcome}; the cleanup is parked{tail}"
    if not run.is_final:
        return f"{head}: kept waiting{tail}"
    return f"{head}: {run.outcome}{tail}; {_LEFT[run.state]}"


_LEFT = {
    states.DESTROYED: "nothing of it is left",
    states.KEPT: "its snapshots stay",
    states.PRUNED: "what it has not destroyed stays",
    states.CLONED: "what has arrived stays",
    states.RAN: "what its steps have done stays",
}

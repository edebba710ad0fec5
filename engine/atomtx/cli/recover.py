"""`atomtx recover`."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

import click

from .. import adoption, config, history, outbox, process, recovery, statedir, states
from ..config_kinds import near, shown
from ..errors import EffectError, ExitStatus, UserError, WaitingError, worst
from ..executor import Tell
from ..interrupts import Interrupts
from ..journal import Journal, NoRunError
from ..plan import job_key
from ..records import Run
from ..settling import Patience, Settled, Settler, abandon
from ..volumes import btrfs
from ..volumes.zfs import Zfs
from . import jobs, json_option
from .notifying import Notifier
from .render import Reporter, age, reporter
from .summary import result


@click.command()
@click.option("--run", "prefix", metavar="ID", help="This run alone.")
@click.option("--job", "job_name", metavar="NAME", help="The runs of this job alone.")
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
@click.option("--adopt", metavar="ID", help="Take what --scan found into this journal and undo it.")
@click.option("--abandon", "abandoned", metavar="ID", help="Forget a run whose pool never returns.")
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
      0 nothing is left to do     4 something is in use: parked, try again
      1 a run failed              6 waiting, and why
      3 a run ended partial       130, 143 interrupted
    """
    with reporter(as_json=as_json) as show:
        return _Recover(show, options).run()


class _Recover:
    def __init__(self, show: Reporter, options: dict[str, Any]) -> None:
        self._show = show
        self._options = options
        self._interrupts = Interrupts()
        self._notifier = Notifier.of_environment(
            show.warn, statedir.find(), by_job=jobs.notices(options["config_path"], show.warn)
        )
        # As at boot; after a service there is one.
        self._notifier.is_offline = options["no_resume"] and not options["stop"]
        self._sources: dict[str, dict[str, str]] = {}

    def run(self) -> ExitStatus:
        if os.geteuid() != 0:
            raise UserError("only root can recover", hint="run it with sudo")
        if self._options["stop"] and self._options["no_wait"]:
            raise UserError("--stop and --no-wait exclude each other")
        if self._options["rollback"] and self._options["no_resume"]:
            raise UserError("--rollback and --no-resume exclude each other")
        if self._options["dry_run"] and (self._options["adopt"] or self._options["abandoned"]):
            raise UserError("--dry-run goes with neither --adopt nor --abandon")
        self._sources = self._sources_found()
        if self._options["dry_run"] or self._options["scan"]:
            return self._recover()
        with self._notifier.delivering("atomtx recover"):
            return self._recover()

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
        state = statedir.prepare(statedir.find())
        with Journal.open(state, keep=self._options["dry_run"]) as journal:
            for note in journal.notes():
                self._show.note(note)
            if self._options["scan"]:
                return self._scan(journal)
            if self._options["adopt"]:
                self._adopt(journal, self._options["adopt"])
            if self._options["abandoned"]:
                return self._abandon(journal, self._options["abandoned"])
            return self._settle_all(journal)

    # -- open runs -------------------------------------------------------------------------

    def _settle_all(self, journal: Journal) -> ExitStatus:
        runs = _chosen(journal.open_runs(), self._options["prefix"])
        if self._options["job_name"]:
            wanted = job_key(self._options["job_name"])
            runs = [run for run in runs if run.job == wanted]
        settler = Settler(
            journal,
            self._interrupts,
            Tell(self._show.step, self._show.warn, self._show.progress),
            rollback=self._options["rollback"],
            patience=self._patience(),
            sources=self._sources,
            may_resume=not self._options["no_resume"],
        )
        if self._options["dry_run"]:
            for run in runs:
                self._show.done(
                    f"run {run.id} ({run.label}), {run.state}: {_would(settler.decide(run))}"
                )
            return ExitStatus.COMPLETED
        statuses = []
        for run in runs:
            statuses.append(self._settle(settler, journal, run))
            self._interrupts.stop()
        if not runs:
            self._check_job(journal)
            self._show.done("nothing to recover")
        return worst(statuses)

    def _check_job(self, journal: Journal) -> None:
        """Warn of a job that nobody knows: its name is mistyped, or the configuration another."""
        name: str | None = self._options["job_name"]
        if not name or history.runs(journal.path, limit=1, job=job_key(name)):
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

    def _settle(self, settler: Settler, journal: Journal, run: Run) -> ExitStatus:
        try:
            settled = settler.settle(run)
        except (WaitingError, EffectError) as exc:
            # One run that must wait, or cannot be settled, does not keep the others from their end.
            self._show.warn(str(exc))
            if not self._is_told_by_service():
                self._notifier.unsettled(run, exc)
            return exc.exit_status
        except NoRunError:  # ended, and forgotten at its --keep-history, since we looked
            return ExitStatus.COMPLETED
        self._show.result(result(journal.path, settled.run))
        self._show.done(_told(settled))
        self._tell(run, settled)
        return settled.status

    def _tell(self, before: Run, settled: Settled) -> None:
        """Give notice of a run that nobody was at work on."""
        if isinstance(settled.decision, recovery.LeaveAlone | recovery.Adopt):
            return
        if not before.is_parked:
            self._notifier.interrupted(settled.run, settled.status)
        elif settled.run.is_parked and not self._is_told_by_service():
            self._notifier.still_parked(settled.run, settled.status)

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

    # -- lost journals ---------------------------------------------------------------------

    def _scan(self, journal: Journal) -> ExitStatus:
        strays = _strays(_zfs(), journal)
        for stray in strays:
            when = age(datetime.fromtimestamp(stray.created_s, UTC))
            self._show.done(f"run {stray.run}, {when} old, in no journal here:")
            for snapshot in stray.snapshots:
                self._show.done(f"  snapshot {snapshot.name}")
            for mountpoint in stray.mounts:
                self._show.done(f"  mounted at {mountpoint}")
        if strays:
            self._show.done("`atomtx recover --adopt ID` takes one into this journal and undoes it")
        else:
            self._show.done("nothing carries our marks that is not in the journal")
        return ExitStatus.COMPLETED

    def _adopt(self, journal: Journal, prefix: str) -> None:
        zfs = _zfs()
        stray = adoption.pick(_strays(zfs, journal), prefix)
        made = adoption.plan_of(stray, zfs.pools() if zfs else ())
        found = {s.name: (s.guid, s.createtxg) for s in stray.snapshots}
        run = journal.adopt(made, found, adoption.intents_of(stray, made))
        self._options["prefix"] = run.id
        self._show.step(f"run {run.id} is in this journal now")

    def _abandon(self, journal: Journal, prefix: str) -> ExitStatus:
        run = _chosen(journal.open_runs(), prefix)[0]
        abandon(journal, run)
        self._show.done(
            f"run {run.id} ({run.label}) is abandoned; nothing on the machine was changed"
        )
        return ExitStatus.COMPLETED


def _zfs() -> Zfs | None:
    """Return ZFS; None on a machine without it, which is none the worse for btrfs."""
    return Zfs() if process.which("zpool") or not btrfs.mounted() else None


def _strays(zfs: Zfs | None, journal: Journal) -> list[adoption.Stray]:
    return adoption.scan(zfs, journal.known(), btrfs.marked())


def _chosen(runs: list[Run], prefix: str | None) -> list[Run]:
    if prefix is None:
        return runs
    matching = [run for run in runs if run.id.startswith(prefix)]
    if len(matching) != 1:
        many = "more than one open run" if matching else "no open run"
        raise UserError(f"{many} begins with {prefix!r}", hint="`atomtx status` lists them")
    return matching


def _would(decision: recovery.Decision) -> str:
    match decision:
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
    if run.state != states.DESTROYED:
        return f"{head}: kept waiting{tail}"
    return f"{head}: {run.outcome}{tail}; nothing of it is left"

"""`atomtx backup`."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from .. import clients, locks, plan, statedir, states
from ..clients import Moment
from ..config_schema import DEFAULT, LAYOUTS
from ..errors import (
    AtomtxError,
    BusyError,
    EffectError,
    ExitStatus,
    Interrupted,
    JournalDamagedError,
    JournalFullError,
    UserError,
    WaitingError,
    worst,
)
from ..executor import Executor, Tell
from ..intents import KeepSnapshots, RunClient, RunHook, TakeSnapshots
from ..interrupts import Interrupts
from ..journal import ActiveRunError, Journal, NoRunError
from ..launching import launch_of, retention_of
from ..moment import kept
from ..mounts import tree
from ..plan import Plan, Request
from ..preparing import choose_client, make_plan, settings
from ..records import Run
from ..recovery import LeaveAlone
from ..settling import Patience, Settler, front, status_of
from ..statedir import RunFolder
from ..volumes.zfs import Zfs
from . import hook_options, jobs, json_option
from .notifying import Notifier
from .render import Reporter, reporter
from .summary import closing_line, result

_LOOK_S = 0.2


class _WithClientOptions(click.Command):
    """Everything after the first `--` is the client's; click alone would mix it with ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, ctx.meta["atomtx.extra"] = args[:at], tuple(args[at + 1 :])
        return super().parse_args(ctx, args)


@click.command(cls=_WithClientOptions)
@click.argument("names", nargs=-1, metavar="[JOB | VOLUME...] [-- CLIENT OPTIONS]")
@click.option("--job", "job_name", metavar="NAME", help="This job of the configuration.")
@click.option("--no-job", is_flag=True, help="Take no name for a job: they are volumes.")
@jobs.config_option(f"The configuration.  [default: {DEFAULT}]")
@click.option(
    "-r",
    "--recursive/--no-recursive",
    default=None,
    help="Include what lies below each volume.",
)
@click.option("-a", "--all", is_flag=True, default=None, help="All datasets of all ZFS pools.")
@click.option("--exclude", multiple=True, metavar="VOLUME", help="Leave out, with what is below.")
@click.option("--client", type=click.Choice(tuple(clients.KNOWN)), help="The backup program.")
@click.option("-c", "--command", metavar="WORDS", help="Run this, with the paths appended.")
@click.option("-o", "--options", metavar="WORDS", help="The client's options, as after `--`.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    show_default=jobs.without("layout"),
    help="Where the client reads: at the live paths, or in a tree.",
)
@click.option("--root", metavar="DIR", help="The root of the tree.")
@click.option(
    "--whole-root/--no-whole-root",
    default=None,
    help="Back up the root itself, not what is below.",
)
@click.option(
    "--leave-dirs/--no-leave-dirs",
    default=None,
    help="Leave the directories of the tree in place.",
)
@click.option(
    "--keep-snapshots/--no-keep-snapshots",
    default=None,
    help="Keep the snapshots of a good backup.",
)
@click.option(
    "--require-atomic/--no-require-atomic",
    default=None,
    help="Refuse a set that is not of one moment.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    show_default=jobs.without("retries"),
    help="How often to try again after network or repository trouble.",
)
@click.option(
    "--keep-for",
    metavar="TIME",
    show_default=jobs.without("keep-for"),
    help="Keep the moment that long (such as 6h, 2d) when the client keeps failing.",
)
@click.option(
    "--time-limit",
    metavar="TIME",
    show_default=jobs.without("time-limit"),
    help="Stop a client that runs longer: the backup has failed. 0: no limit.",
)
@click.option(
    "--grace",
    metavar="TIME",
    show_default=jobs.without("grace"),
    help="How long a client that was stopped may take to end; then it is killed.",
)
@click.option(
    "--retention", metavar="WORDS", help="Then forget older backups of the job: --keep-daily 7 ..."
)
@hook_options.add
@click.option("--nice", type=click.IntRange(0, 19), help="Run the client with this niceness.")
@click.option("--io-class", metavar="CLASS[:LEVEL]", help="Run it so; as ionice: idle, ...")
@click.option(
    "--on-stop",
    type=click.Choice(("undo", "keep")),
    show_default=jobs.without("on-stop"),
    help="What SIGTERM makes of the moment: undo it, or keep it for `recover`.",
)
@click.option("--wait", is_flag=True, help="Wait for another run of this job to end.")
@click.option(
    "--keep-history",
    metavar="TIME",
    show_default=jobs.without("keep-history"),
    help="Forget runs that ended longer ago.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, change nothing.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def backup(names: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Back up the named volumes as they are at one moment.

    Takes a snapshot of each ZFS dataset, all of a pool in one transaction, or of each btrfs
    subvolume; shows the frozen files to the backup client at their live paths, in a mount
    namespace of its own; and takes mounts, holds and snapshots away again. Everything is
    journaled first: after a crash, `atomtx recover` finishes the backup of the same moment, or
    undoes it.

    A dataset is given by its name or by its mountpoint, a subvolume by the path at which it is
    seen, or one inside it. What follows `--` goes to the client. Without --client, the
    environment decides: RESTIC_REPOSITORY, or a connected kopia.

    \b
    Examples:
      atomtx backup zroot/usr/home zroot/usr/src
      atomtx backup -r zroot/usr/home -- --tag nightly
      atomtx backup home               the job home of the configuration
      atomtx backup /home /srv/photos
      atomtx backup -a --command 'my-wrapper backup'

    \b
    EXIT STATUS
      0 completed       3 partial: some files could not be read
      1 failed          4 backed up, cleanup parked: run `atomtx recover`
      2 usage           5 another run of this job is at work
      6 waiting         7 backed up, a step after it failed
                        130, 143 interrupted and cleaned up
    """
    with reporter(as_json=as_json, quiet=quiet) as show:
        extra = click.get_current_context().meta.get("atomtx.extra", ())
        return _Backup(show, as_json, names, extra, options).run()


class _Backup:
    def __init__(
        self,
        show: Reporter,
        as_json: bool,
        names: tuple[str, ...],
        extra: tuple[str, ...],
        options: dict[str, Any],
    ) -> None:
        self._show = show
        self._as_json = as_json
        self._asked = jobs.asked(names, extra, options)
        self._job = self._asked.job
        self._options = options
        self._tell = Tell(show.step, show.warn, show.progress)
        self._interrupts = Interrupts()
        self._noted: set[str] = set()
        self._notifier = Notifier.of_environment(show.warn, statedir.find(), own=self._job.notices)

    def run(self) -> ExitStatus:
        state = statedir.find()
        if self._options["dry_run"]:
            self._print_plan(self._plan(state))
            return ExitStatus.COMPLETED
        with self._notifier.delivering(self._asked.title):
            return self._back_up(state)

    def _back_up(self, state: Path) -> ExitStatus:
        if os.geteuid() != 0:
            raise UserError("only root can mount snapshots", hint="run it with sudo")
        self._interrupts.install()
        statedir.prepare(state)
        with Journal.open(state) as journal:
            for note in journal.notes():
                self._show.note(note)
            status = self._in_turn(journal)
            journal.expire(self._job.keep_history)
        return status

    def _in_turn(self, journal: Journal) -> ExitStatus:
        """Back up; where another run of the job is at work, fail, or wait for it and plan anew."""
        while True:
            made = self._plan(journal.state)
            self._notifier.job = made.label
            try:
                if self._settle(journal, made.job):
                    made = self._plan(journal.state)  # it may have taken hours
                return self._carry_out(journal, made)
            except ActiveRunError as exc:
                if not self._options["wait"]:
                    raise
                self._await(journal, exc.run)

    def _await(self, journal: Journal, run: str) -> None:
        """Wait until nobody is at work on *run*; raise Interrupted on a signal."""
        self._show.step(f"run {run} of this job is at work: waiting for its end")
        lock = RunFolder.of(journal.state, run).front_lock
        while locks.is_held(lock):
            self._interrupts.sleep(_LOOK_S)
        self._interrupts.check()

    def _plan(self, state: Path) -> Plan:
        job = self._job
        wanted = settings(
            job.command,
            job.arguments,
            os.environ,
            cwd=job.working_directory,
            chosen=job.environment,
            sources=job.sources,
        )
        made = make_plan(
            self._request(),
            client_name=choose_client(job.client, job.command, wanted.env),
            wanted=wanted,
            zfs=Zfs(),
            state=state,
            keep_snapshots=job.keep_snapshots,
            retries=job.retries,
            keep_for_s=job.keep_for,
            time_limit_s=job.time_limit,
            grace_s=job.grace,
            hooks=job.hooks,
            retention=job.retention,
            on_stop=job.on_stop,
            nice=job.nice,
            io_class=job.io_class,
        )
        self._check_atomic(made)
        for note in made.notes:
            if note not in self._noted:
                self._show.note(note)
        self._noted.update(made.notes)
        return made

    def _request(self) -> Request:
        job = self._job
        return Request(
            names=tuple(map(_resolved, job.volumes)),
            all=job.all,
            recursive=job.recursive,
            exclude=job.exclude,
            layout=job.layout,
            root=_resolved(job.root),
            whole_root=job.whole_root,
            leave_dirs=job.leave_dirs,
            job=self._asked.name,
        )

    def _check_atomic(self, made: Plan) -> None:
        if not self._job.require_atomic:
            return
        pools = sorted({volume.pool for volume in made.volumes})
        if len(pools) > 1:
            raise UserError(
                f"the set spans the pools {', '.join(pools)}: its snapshots are not of one moment",
                hint="make a job of each pool, or leave out --require-atomic",
            )
        subvolumes = [volume.name for volume in made.volumes if volume.kind == "btrfs"]
        if len(subvolumes) > 1:
            raise UserError(
                f"btrfs snapshots {len(subvolumes)} subvolumes one after the other "
                f"({', '.join(subvolumes[:3])}): they are not of one moment",
                hint="make a job of each subvolume, or leave out --require-atomic",
            )

    def _print_plan(self, made: Plan) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        moment = Moment(made.targets, made.root, now, made.excludes, made.whole_root)
        launch = launch_of(made, moment)
        client_step = RunClient(made.client.name, launch.commands, launch.cwd)
        steps = (
            *(hook for hook in plan.first_intents(made) if isinstance(hook, RunHook)),
            *plan.intents(made, self._directories(made)),
            client_step,
            *_keeping(made),
            *filter(None, [retention_of(made, moment)]),
            *plan.hooks_after(made, None),
        )
        lines = plan.describe(made, steps)
        self._show.result({"run": made.run, "job": made.label, "notes": made.notes, "plan": lines})
        if not self._as_json:
            click.echo("\n".join(lines))

    def _directories(self, made: Plan) -> tuple[str, ...]:
        return tree.directories_to_make(made.root, plan.tops(made)) if made.root else ()

    def _settle(self, journal: Journal, job: str) -> bool:
        """
        Finish or undo this job's interrupted run; try to clear a parked one; name the others.

        Tell whether there was any of this job.
        """
        settler = Settler(
            journal,
            self._interrupts,
            self._tell,
            patience=Patience.WAIT,
            sources=self._asked.sources,
        )
        others, found = 0, False
        for run in journal.open_runs():
            found = found or run.job == job
            if run.job != job:
                others += not locks.is_held(RunFolder.of(journal.state, run.id).front_lock)
            elif run.is_parked:
                self._try_parked(settler, run)
            else:
                self._settle_one(settler, run)
            self._interrupts.stop()
        if others:
            self._show.note(f"{others} runs of other jobs are unfinished: `atomtx recover`")
        return found

    def _try_parked(self, settler: Settler, run: Run) -> None:
        try:
            settler.settle(run)
        except JournalDamagedError:
            raise
        except AtomtxError as exc:  # its result stands; it must not block a new backup
            self._show.warn(str(exc))

    def _settle_one(self, settler: Settler, run: Run) -> None:
        try:
            settled = settler.settle(run)
        except NoRunError:  # ended, and forgotten at its --keep-history, since we looked
            return
        if isinstance(settled.decision, LeaveAlone):
            raise ActiveRunError(run.id)
        self._notifier.interrupted(settled.run, settled.status, pings=False)
        if settled.interrupted:
            raise settled.interrupted
        if settled.run.state != states.DESTROYED and not settled.run.is_parked:
            raise WaitingError(
                f"run {run.id} of this job is kept waiting: {settled.run.reason}",
                hint="`atomtx recover` tries again, `atomtx recover --rollback` gives it up",
            )
        self._show.step(f"run {run.id} of this job: {settled.run.outcome}")

    def _carry_out(self, journal: Journal, made: Plan) -> ExitStatus:
        self._notifier.started(made.run)
        folder = _make(RunFolder.of(journal.state, made.run))
        with front(folder) as lock:
            assert lock is not None
            try:
                run = journal.begin(made, plan.first_intents(made))
            except (BusyError, JournalFullError):  # there is no row of it
                shutil.rmtree(folder.path)
                raise
            executor = Executor(
                journal, folder, front=lock, interrupts=self._interrupts, tell=self._tell
            )
            started = time.monotonic()
            run = executor.advance(run)
            self._show.result(result(journal.path, run))
            self._show.done(closing_line(journal.path, run, time.monotonic() - started))
        statuses = [status_of(run)]
        if self._interrupts.noted is not None:
            statuses.append(Interrupted(self._interrupts.noted).exit_status)
        self._notifier.ended(run, worst(statuses))
        return worst(statuses)


def _make(folder: RunFolder) -> RunFolder:
    try:
        return folder.make()
    except EffectError:  # the disk is full
        shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _keeping(made: Plan) -> list[KeepSnapshots]:
    taken = [step for step in plan.intents(made) if isinstance(step, TakeSnapshots)]
    return [kept(step) for step in taken] if made.keep_snapshots else []


def _resolved(name: str) -> str:
    return os.path.realpath(name) if name.startswith("/") else name

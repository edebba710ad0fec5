"""`atomtx backup`."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from .. import clients, journalfile, plan, statedir
from ..clients import Moment
from ..config_schema import DEFAULT, LAYOUTS
from ..errors import DONE, ExitStatus, UserError, worst
from ..intents import KeepSnapshots, RunClient, RunHook, TakeSnapshots
from ..interrupts import Interrupts
from ..journal import Journal
from ..launching import launch_of, make_folders, retention_of
from ..moment import kept
from ..mounts import tree
from ..names import BTRFS, LVM
from ..plan import Plan, Request
from ..preparing import choose_client, make_plan, settings
from ..records import Run
from ..statedir import RunFolder
from ..volumes.zfs import Zfs
from . import NAMED, VOLUME, from_snapshots, hook_options, jobs, json_option, runs
from .from_snapshots import Backlog
from .notifying import Notifier
from .render import Reporter, reporter
from .summary import closing_line, result
from .within import within


class _WithClientOptions(click.Command):
    """Everything after the first `--` is the client's; click alone would mix it with ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, ctx.meta["atomtx.extra"] = args[:at], tuple(args[at + 1 :])
        return super().parse_args(ctx, args)


@click.command(cls=_WithClientOptions)
@click.argument("names", nargs=-1, type=VOLUME, metavar="[JOB | VOLUME...] [-- CLIENT OPTIONS]")
@click.option(
    "--job", "job_name", type=NAMED, metavar="NAME", help="This job of the configuration."
)
@click.option("--no-job", is_flag=True, help="Take no name for a job: they are volumes.")
@jobs.config_option(f"The configuration.  [default: {DEFAULT}]")
@click.option(
    "-r",
    "--recursive/--no-recursive",
    default=None,
    help="Include what lies below each volume.",
)
@click.option("-a", "--all", is_flag=True, default=None, help="All datasets of all ZFS pools.")
@click.option(
    "--read-live", multiple=True, type=VOLUME, metavar="DIR", help="Read as it is: not a moment."
)
@click.option(
    "--exclude",
    multiple=True,
    type=VOLUME,
    metavar="VOLUME",
    help="Leave out, with what is below.",
)
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
    "--cow-size",
    metavar="SIZE",
    show_default=jobs.without("cow-size"),
    help="The room of a classic LVM snapshot: 20% of its origin, or 10G.",
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
    "--retention",
    metavar="WORDS",
    help="Then forget older backups of the paths: --keep-daily 7 ...",
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
@click.option(
    "--from-snapshots",
    is_flag=True,
    help="Take none: save what `atomtx snap` has kept and the repository lacks, oldest first.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="With --from-snapshots, save that many moments at most."
)
@click.option("--wait", is_flag=True, help="Wait for another run of this job to end.")
@click.option(
    "--keep-history",
    metavar="TIME",
    show_default=jobs.without("keep-history"),
    help="Forget runs that ended longer ago. 0: all but the last whole one of each job, one more "
    "of it, and those of the last minute.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, change nothing.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def backup(names: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Back up the named volumes as they are at one moment.

    Takes a snapshot of each ZFS dataset, all of a pool in one transaction, of each btrfs
    subvolume, or of each logical volume of LVM; shows the frozen files to the backup client at
    their live paths, in a mount namespace of its own; and takes mounts, holds and snapshots away
    again. Everything is journaled first: after a crash, `atomtx recover` finishes the backup of
    the same moment, or undoes it.

    A dataset is given by its name or by its mountpoint, a logical volume as VG/LV or by its
    path, a subvolume by the path at which it is seen, or one inside it. A directory without
    snapshots, such as /boot, is read as it is where --read-live names it. What follows `--` goes
    to the client. Without --client, the environment decides: RESTIC_REPOSITORY, a connected
    kopia, or BORG_REPO.

    \b
    Examples:
      atomtx backup zroot/usr/home zroot/usr/src
      atomtx backup -r zroot/usr/home -- --tag nightly
      atomtx backup home               the job home of the configuration
      atomtx backup /home /srv/photos
      atomtx backup -a --command 'my-wrapper backup'
      atomtx backup home --from-snapshots --limit 24

    \b
    EXIT STATUS
      0 completed       3 partial: some files, or a kept moment, could not be read
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
        self._from_snapshots: bool = options["from_snapshots"]
        if options["limit"] and not self._from_snapshots:
            raise UserError("--limit is of no use without --from-snapshots")
        self._interrupts = Interrupts()
        self._noted: set[str] = set()
        self._notifier = Notifier.of_environment(show.warn, statedir.find(), own=self._job.notices)

    def run(self) -> ExitStatus:
        state = statedir.find()
        if self._options["dry_run"]:
            self._print(self._plan(state), state)
            return ExitStatus.COMPLETED
        with self._notifier.delivering(self._asked.title):
            return self._back_up()

    def _back_up(self) -> ExitStatus:
        if os.geteuid() != 0:
            raise UserError("only root can mount snapshots", hint="run it with sudo")
        return runs.in_journal(
            self._in_turn,
            keep_history_s=self._job.keep_history,
            interrupts=self._interrupts,
            show=self._show,
        )

    def _in_turn(self, journal: Journal) -> ExitStatus:
        def planned() -> Plan:
            made = self._plan(journal.state)
            self._notifier.job = made.label
            return made

        return runs.in_turn(
            journal,
            planned,
            lambda made: made.job,
            lambda made: self._carry_out_all(journal, made),
            wait=self._options["wait"],
            interrupts=self._interrupts,
            show=self._show,
            sources=self._asked.sources,
            told=lambda settled: self._notifier.interrupted(
                settled.run, settled.status, pings=False
            ),
            known=plan.job_key(self._asked.name) if self._asked.name else "",
        )

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
            live=tuple(map(_resolved, job.read_live)),
            layout=job.layout,
            root=_resolved(job.root),
            whole_root=job.whole_root,
            leave_dirs=job.leave_dirs,
            cow_size=job.cow_size,
            job=self._asked.name,
        )

    def _check_atomic(self, made: Plan) -> None:
        if not self._job.require_atomic:
            return
        if live := plan.read_live(made):
            raise UserError(
                f"{live[0]} is read live: what is read of it is not a moment",
                hint="make a job of its own of it, or leave out --require-atomic",
            )
        pools = sorted({volume.pool for volume in made.volumes})
        if len(pools) > 1:
            raise UserError(
                f"the set spans the pools {', '.join(pools)}: its snapshots are not of one moment",
                hint="make a job of each pool, or leave out --require-atomic",
            )
        subvolumes = [volume.name for volume in made.volumes if volume.kind == BTRFS]
        if len(subvolumes) > 1:
            raise UserError(
                f"btrfs snapshots {len(subvolumes)} subvolumes one after the other "
                f"({', '.join(subvolumes[:3])}): they are not of one moment",
                hint="make a job of each subvolume, or leave out --require-atomic",
            )
        logical = [volume.name for volume in made.volumes if volume.kind == LVM]
        if len(logical) > 1:
            raise UserError(
                f"LVM snapshots {len(logical)} logical volumes one after the other "
                f"({', '.join(logical[:3])}): they are not of one moment",
                hint="make a job of each, or leave out --require-atomic",
            )

    def _print(self, made: Plan, state: Path) -> None:
        if self._from_snapshots:
            backlog = self._backlog(made, state)
            from_snapshots.print_dry(backlog, self._show, as_json=self._as_json)
        else:
            self._print_plan(made)

    def _backlog(self, made: Plan, state: Path) -> Backlog:
        return from_snapshots.find(made, state / journalfile.NAME, self._options["limit"])

    def _print_plan(self, made: Plan) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        moment = Moment(
            made.targets,
            made.root,
            now,
            made.excludes,
            made.whole_root,
            run=made.run,
            job=made.label,
        )
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
        told = {"run": made.run, "job": made.label, "notes": made.notes, "plan": lines}
        self._show.result(told | {"not_a_moment": plan.read_live(made)})
        if not self._as_json:
            click.echo("\n".join(lines))

    def _directories(self, made: Plan) -> tuple[str, ...]:
        return tree.directories_to_make(made.root, plan.tops(made)) if made.root else ()

    def _carry_out_all(self, journal: Journal, made: Plan) -> ExitStatus:
        if not self._from_snapshots:
            make_folders(made)
            return self._carry_out(journal, made)
        backlog = self._backlog(made, journal.state)
        status = from_snapshots.carry_out(
            backlog,
            lambda of_moment: self._carry_out(journal, of_moment),
            interrupts=self._interrupts,
            show=self._show,
        )
        if status in DONE and (told := from_snapshots.told_of_no_run(backlog)):
            self._notifier.without_run(told[0], status, told[1])
        step = within()
        if not step or status not in DONE:
            return status
        of_run = from_snapshots.check_taken(made, journal.path, step.run, self._show)
        return worst([status, of_run])

    def _carry_out(self, journal: Journal, made: Plan) -> ExitStatus:
        self._notifier.started(made.run)
        advance = runs.executed(journal, self._interrupts, self._show)

        def advanced(folder: RunFolder, lock: int, run: Run) -> Run:
            started = time.monotonic()
            run = advance(folder, lock, run)
            self._show.result(result(journal.path, run))
            self._show.done(closing_line(journal.path, run, time.monotonic() - started))
            return run

        run = runs.carry_out(journal, made, plan.first_intents(made), advanced)
        status = runs.status_of_ended(run, self._interrupts)
        self._notifier.ended(run, status)
        return status


def _keeping(made: Plan) -> list[KeepSnapshots]:
    taken = [step for step in plan.intents(made) if isinstance(step, TakeSnapshots)]
    return [kept(step) for step in taken] if made.keep_snapshots else []


def _resolved(name: str) -> str:
    return os.path.realpath(name) if name.startswith("/") else name

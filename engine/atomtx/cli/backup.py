"""`atomtx backup`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from .. import clients, locks, plan, statedir
from ..clients import Moment
from ..errors import (
    AtomtxError,
    BusyError,
    EffectError,
    ExitStatus,
    JournalDamagedError,
    JournalFullError,
    UserError,
    worst,
)
from ..executor import Executor, Tell, facts_of, kept, settings_of
from ..intents import KeepSnapshots, RunClient, TakeSnapshots
from ..interrupts import Interrupts
from ..journal import ActiveRunError, Journal, NoRunError
from ..mounts import tree
from ..plan import Plan, Request
from ..preparing import choose_client, make_plan, settings
from ..records import Run
from ..recovery import LeaveAlone
from ..settling import Patience, Settler, front, status_of
from ..statedir import RunFolder
from ..volumes.zfs import Zfs
from . import json_option
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
@click.argument("names", nargs=-1, metavar="[DATASET]... [-- CLIENT OPTIONS]")
@click.option("-r", "--recursive", is_flag=True, help="Include the children of each dataset.")
@click.option("-a", "--all", "every", is_flag=True, help="All mounted datasets of all pools.")
@click.option("--exclude", multiple=True, metavar="DATASET", help="Leave out, with its children.")
@click.option("--client", type=click.Choice(tuple(clients.KNOWN)), help="The backup program.")
@click.option("-c", "--command", metavar="WORDS", help="Run this, with the paths appended.")
@click.option(
    "--layout",
    type=click.Choice(("namespace", "tree")),
    default="namespace",
    show_default=True,
    help="Where the client reads: at the live paths, or in a tree.",
)
@click.option("--root", default="", metavar="DIR", help="The root of the tree.")
@click.option("--keep-snapshots", is_flag=True, help="Keep the snapshots of a good backup.")
@click.option("--require-atomic", is_flag=True, help="Refuse a set that is not of one moment.")
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="How often to try again after network or repository trouble.",
)
@click.option(
    "--keep-for",
    default="0",
    metavar="TIME",
    help="Keep the moment that long (such as 6h, 2d) when the client keeps failing.",
)
@click.option(
    "--time-limit",
    default="0",
    metavar="TIME",
    help="Stop a client that runs longer: the backup has failed. 0: no limit.",
)
@click.option(
    "--grace",
    default=f"{plan.GRACE_S}s",
    metavar="TIME",
    show_default=True,
    help="How long a client that was stopped may take to end; then it is killed.",
)
@click.option("--wait", is_flag=True, help="Wait for another run of this job to end.")
@click.option(
    "--keep-history",
    default="366d",
    metavar="TIME",
    show_default=True,
    help="Forget runs that ended longer ago.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, change nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def backup(names: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Back up the named datasets as they are at one moment.

    Takes a snapshot of each dataset, all of a pool in one transaction; shows the frozen files
    to the backup client at their live paths, in a mount namespace of its own; and takes mounts,
    holds and snapshots away again. Everything is journaled first: after a crash, `atomtx
    recover` finishes the backup of the same moment, or undoes it.

    A dataset is given by its name or by its mountpoint. What follows `--` goes to the client.
    Without --client, the environment decides: RESTIC_REPOSITORY, or a connected kopia.

    \b
    Examples:
      atomtx backup zroot/usr/home zroot/usr/src
      atomtx backup -r zroot/usr/home -- --tag nightly
      atomtx backup -a --command 'my-wrapper backup'

    \b
    EXIT STATUS
      0 completed       3 partial: some files could not be read
      1 failed          4 backed up, cleanup parked: run `atomtx recover`
      2 usage           5 another run of this job is at work
      6 waiting         130, 143 interrupted and cleaned up
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
        self._names = names
        self._extra = extra
        self._options = options
        self._tell = Tell(show.step, show.warn, show.progress)
        self._interrupts = Interrupts()
        self._noted: set[str] = set()

    def run(self) -> ExitStatus:
        state = statedir.find()
        keep_history_s = seconds(self._options["keep_history"])
        if self._options["dry_run"]:
            self._print_plan(self._plan(state))
            return ExitStatus.COMPLETED
        if os.geteuid() != 0:
            raise UserError("only root can mount snapshots", hint="run it with sudo")
        self._interrupts.install()
        statedir.prepare(state)
        with Journal.open(state) as journal:
            for note in journal.notes():
                self._show.note(note)
            status = self._in_turn(journal)
            journal.expire(keep_history_s)
        return status

    def _in_turn(self, journal: Journal) -> ExitStatus:
        """Back up; where another run of the job is at work, fail, or wait for it and plan anew."""
        while True:
            made = self._plan(journal.state)
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
        options = self._options
        command = shlex.split(options["command"] or "")
        made = make_plan(
            self._request(),
            client_name=choose_client(options["client"], command, os.environ),
            wanted=settings(command, self._extra, os.environ),
            zfs=Zfs(),
            state=state,
            keep_snapshots=options["keep_snapshots"],
            retries=options["retries"],
            keep_for_s=seconds(options["keep_for"]),
            time_limit_s=seconds(options["time_limit"]),
            grace_s=seconds(options["grace"]),
        )
        self._check_atomic(made)
        for note in made.notes:
            if note not in self._noted:
                self._show.note(note)
        self._noted.update(made.notes)
        return made

    def _request(self) -> Request:
        options = self._options
        return Request(
            names=tuple(map(_resolved, self._names)),
            all=options["every"],
            recursive=options["recursive"],
            exclude=options["exclude"],
            layout=options["layout"],
            root=_resolved(options["root"]),
        )

    def _check_atomic(self, made: Plan) -> None:
        pools = sorted({volume.pool for volume in made.volumes})
        if len(pools) > 1 and self._options["require_atomic"]:
            raise UserError(
                f"the set spans the pools {', '.join(pools)}: its snapshots are not of one moment",
                hint="make a job of each pool, or leave out --require-atomic",
            )

    def _print_plan(self, made: Plan) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        moment = Moment(made.targets, made.root, now, made.excludes)
        client = clients.load(made.client.name)
        launch = client.launch(settings_of(made.client), facts_of(made.client), moment)
        client_step = RunClient(client.name, launch.commands, launch.cwd)
        steps = (*plan.intents(made, self._directories(made)), client_step, *_keeping(made))
        lines = plan.describe(made, steps)
        self._show.result({"run": made.run, "job": made.label, "notes": made.notes, "plan": lines})
        if not self._as_json:
            click.echo("\n".join(lines))

    def _directories(self, made: Plan) -> tuple[str, ...]:
        return tree.directories_to_make(made.root, made.targets) if made.root else ()

    def _settle(self, journal: Journal, job: str) -> bool:
        """
        Finish or undo this job's interrupted run; try to clear a parked one; name the others.

        Tell whether there was any of this job.
        """
        settler = Settler(journal, self._interrupts, self._tell, patience=Patience.WAIT)
        others, found = 0, False
        for run in journal.open_runs():
            found = found or run.job == job
            if run.job != job:
                others += not locks.is_held(RunFolder.of(journal.state, run.id).front_lock)
            elif run.is_parked:
                self._try_parked(settler, run)
            else:
                self._settle_one(settler, run)
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
        if settled.interrupted:
            raise settled.interrupted
        self._show.step(f"run {run.id} of this job: {settled.run.outcome}")

    def _carry_out(self, journal: Journal, made: Plan) -> ExitStatus:
        folder = _make(RunFolder.of(journal.state, made.run))
        with front(folder) as lock:
            assert lock is not None
            first = [step for step in plan.intents(made) if isinstance(step, TakeSnapshots)]
            try:
                run = journal.begin(made, first)
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
        if executor.interrupted:
            statuses.append(executor.interrupted.exit_status)
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


_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "y": 31_557_600}


def seconds(text: str) -> int:
    """Read a time such as "90", "15m", "6h", "2d", "1y"."""
    match = re.fullmatch(r"(\d+)([smhdwy]?)", text.strip())
    if not match:
        raise UserError(f"{text!r} is not a time", hint="such as 90s, 15m, 6h, 2d, 4w, 1y")
    return int(match[1]) * _UNITS_S[match[2]]

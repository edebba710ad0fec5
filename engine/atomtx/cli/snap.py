"""`atomtx snap`."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import Any

import click

from .. import convention, plan, snapping, statedir
from ..errors import ExitStatus, UserError
from ..interrupts import Interrupts
from ..journal import Journal
from ..plan import Plan
from ..records import Run
from ..states import Verb
from ..volumes.zfs import Zfs
from . import jobs, json_option, runs
from .notifying import Notifier
from .render import Reporter, duration, reporter

_SHOWN = 3


@click.command()
@jobs.named("volume")
@jobs.chosen("volume")
@click.option(
    "--pattern",
    "snap_pattern",
    metavar="NAME",
    show_default=jobs.without("snap-pattern"),
    help="The snapshots' name, with the words of strftime(3) for the time in UTC.",
)
@click.option("--quiesce", metavar="WORDS", help="Run this just before the snapshots.")
@click.option("--thaw", metavar="WORDS", help="Run this just after them, whatever happens.")
@click.option("--transient", is_flag=True, help="They are to go again, by `atomtx unsnap`.")
@click.option(
    "--wait", is_flag=True, help="Wait for another run of this job to end, and for a free name."
)
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, change nothing.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def snap(names: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Take snapshots that stay.

    All of a pool of ZFS are taken in one transaction, and volumes (zvols) and datasets that are
    not mounted with them. Subvolumes of btrfs, named by their paths, and thin volumes of LVM,
    named as VG/LV or by their paths, are taken one after the other. Their names follow a pattern,
    and each is marked as taken by atomtx: a later `atomtx prune` destroys such alone. Everything
    is journaled first: after a crash, `atomtx recover` marks the snapshots of the whole moment as
    kept, or takes away what there is of one that is not whole.

    With --transient they are for programs that read them one after the other: `atomtx prune` does
    not count them, `atomtx clone` does not send them, and `atomtx unsnap` destroys them.

    Of a job of the configuration its volumes, recursive, all, exclude, snap-pattern, pre-hook,
    post-hook, quiesce and thaw count here.

    \b
    Examples:
      atomtx snap tank/home tank/mail
      atomtx snap -r tank --exclude tank/scratch
      atomtx snap / /home              subvolumes of btrfs
      atomtx snap data/home            a thin logical volume
      atomtx snap -r tank --pattern 'daily %Y-%m-%d %H:%M'
      atomtx snap home                 the job home of the configuration
      atomtx snap --transient home     and `atomtx unsnap home` when all have read them

    \b
    EXIT STATUS
      0 all are kept       4 there is something to clean up: run `atomtx recover`
      1 none was taken     5 another run of this job is at work
      2 usage              6 waiting, and why
      7 they are kept, a hook after them failed
      3 some were destroyed by somebody else meanwhile
                           130, 143 interrupted: undone, or kept
    """
    with reporter(as_json=as_json, quiet=quiet) as show:
        return _Snap(show, as_json, names, options).run()


class _Snap:
    def __init__(
        self, show: Reporter, as_json: bool, names: tuple[str, ...], options: dict[str, Any]
    ) -> None:
        self._show = show
        self._as_json = as_json
        self._asked = jobs.asked(names, (), options)
        self._options = options
        self._interrupts = Interrupts()
        self._notifier = Notifier.of_environment(
            show.warn, statedir.find(), own=self._asked.job.notices, verb=Verb.SNAP
        )

    def run(self) -> ExitStatus:
        if self._options["dry_run"]:
            self._print_plan(self._plan())
            return ExitStatus.COMPLETED
        if os.geteuid() != 0:
            raise UserError("only root can take snapshots", hint="run it with sudo")
        return runs.in_its_turn(
            self._asked,
            "snap",
            self._plan,
            lambda made: made,
            self._carry_out,
            wait=self._options["wait"],
            notifier=self._notifier,
            interrupts=self._interrupts,
            show=self._show,
        )

    def _plan(self) -> Plan:
        """Plan; with --wait not for a name that is taken, but for the next one."""
        while True:
            try:
                return self._planned()
            except convention.NameTakenError as exc:
                if not self._options["wait"] or self._options["dry_run"]:
                    raise
                self._show.step(f"{exc.message}: waiting for the next name")
                left = (exc.free_at - datetime.now(UTC)).total_seconds()
                self._interrupts.sleep(max(left, 0.0))

    def _planned(self) -> Plan:
        job = self._asked.job
        if job.read_live:
            raise UserError(
                f"there is no snapshot of {job.read_live[0]}", hint="leave out read-live"
            )
        pattern = convention.Pattern.parse(job.snap_pattern)
        now = datetime.now(UTC)
        made = snapping.make_plan(
            self._asked.request(),
            pattern=pattern,
            at=now,
            zfs=Zfs(),
            hooks=job.hooks,
            transient=self._options["transient"],
        )
        for note in made.notes:
            self._show.note(note)
        return made

    def _print_plan(self, made: Plan) -> None:
        lines = plan.describe(made, tuple(snapping.steps(made)))
        names = [volume.snapshot for volume in made.volumes]
        self._show.result({"run": made.run, "job": made.label, "snapshots": names, "plan": lines})
        if not self._as_json:
            click.echo("\n".join((*lines, "these are:", *(f"  {name}" for name in names))))

    def _carry_out(self, journal: Journal, made: Plan) -> ExitStatus:
        self._notifier.started(made.run)
        started = time.monotonic()
        advance = runs.executed(journal, self._interrupts, self._show)
        run = runs.carry_out(journal, made, plan.first_intents(made), advance)
        self._show.result(_result(run))
        self._show.done(_closing_line(run, time.monotonic() - started))
        status = runs.status_of_ended(run, self._interrupts)
        self._notifier.ended(run, status)
        return status


def _result(run: Run) -> dict[str, Any]:
    names = [volume.snapshot for volume in run.volumes]
    return runs.result(run, cleanup=run.cleanup, snapshots=names)


def _closing_line(run: Run, seconds: float) -> str:
    words = f"{run.outcome or 'waiting'} in {duration(seconds)}"
    if run.reason:
        words += f": {run.reason}"
    if run.is_parked:
        words += "; something is left to clean up: `atomtx recover`"
    names = [volume.snapshot for volume in run.volumes]
    if run.outcome == "completed":
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        words += f": {', '.join(names[:_SHOWN])}{more}"
    return f"{words} (run {run.id})"

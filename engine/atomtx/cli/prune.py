"""`atomtx prune`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from .. import history, journalfile, pruning, retention, statedir
from ..convention import Pattern
from ..errors import ExitStatus, UserError
from ..intents import PruneSnapshots
from ..interrupts import Interrupts
from ..journal import Journal
from ..plan import job_key
from ..pruning import Choice, Pruner
from ..records import Run
from ..retention import Policy, Verdict
from ..statedir import RunFolder
from ..states import Verb
from ..volumes.zfs import Zfs
from . import NAMED, jobs, json_option, runs
from .notifying import Notifier
from .render import Reporter, duration, reporter

_F = TypeVar("_F", bound=Callable[..., object])
_HELP = {
    "last": "the last N",
    "within": "all of TIME before the newest, such as 1y5m7d2h",
}


def _rules(command: _F) -> _F:
    """Add an option for each rule of retention."""
    for option in reversed(retention.OPTIONS):
        what = option.removeprefix("keep-")
        metavar = "TIME" if what.startswith("within") else "N"
        period = what.removeprefix("within-")
        of_period = f"the newest of each of the last N {_PERIODS.get(period, '')}"
        if what.startswith("within-"):
            of_period = f"the newest of each {_PERIODS[period].removesuffix('s')} within TIME"
        text = f"Keep {_HELP.get(what, of_period)}."
        command = click.option(f"--{option}", metavar=metavar, help=text)(command)
    return command


_PERIODS = {
    "hourly": "hours",
    "daily": "days",
    "weekly": "weeks",
    "monthly": "months",
    "yearly": "years",
}


@click.command()
@jobs.named("volume")
@jobs.chosen("volume")
@_rules
@jobs.pattern
@click.option(
    "--adopt",
    type=NAMED,
    multiple=True,
    metavar="SNAPSHOT",
    help="Count this one too, whoever took it.",
)
@click.option(
    "--keep-until-saved/--no-keep-until-saved",
    default=None,
    help="Keep what no completed backup of the job has saved yet.",
)
@click.option(
    "--saved-in",
    type=NAMED,
    multiple=True,
    metavar="JOB",
    help="Keep what this job has not saved yet.",
)
@click.option("--copies", is_flag=True, help="Count what `atomtx clone` has sent here, too.")
@click.option("--bookmark/--no-bookmark", default=True, help="Leave a bookmark of each of ZFS.")
@click.option("--wait", is_flag=True, help="Wait for another run of this job to end.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what stays and why, change nothing.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def prune(names: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Destroy kept snapshots that no rule keeps.

    Only snapshots count that `atomtx snap` took, by their mark and their name, and those that
    --adopt names; what else there is stays, and takes no place in a rule. The rules are those of
    `restic forget`, for each volume on its own. One that is held, or the origin of a clone, stays,
    and on btrfs and LVM one that is mounted. Of each of ZFS that goes a bookmark is left, which
    takes no room: a later `zfs send -i` can begin there.

    With --keep-until-saved one that no rule keeps goes only once a completed backup of the job
    has read that very snapshot, as `atomtx backup JOB --from-snapshots` does; with --saved-in, of
    each job that is named. What the journal does not know is not saved.

    Of a job of the configuration its volumes, recursive, all, exclude, snap-pattern, snap-keep
    and keep-until-saved count; rules on the command line take the place of snap-keep.

    \b
    Examples:
      atomtx prune -r tank --keep-hourly 24 --keep-daily 7 --keep-weekly 5 --dry-run
      atomtx prune home                the job home of the configuration
      atomtx prune home --keep-until-saved --saved-in home-kopia

    \b
    EXIT STATUS
      0 done, or there was nothing to do    5 another run of this job is at work
      1 failed: a pool cannot be asked      6 an upgrade of the journal must wait
      2 usage, or no rule was given         130, 143 interrupted
      3 some are in use, and stay
    """
    with reporter(as_json=as_json, quiet=quiet) as show:
        return Prune(show, as_json, names, options).run()


class Prune:
    """A command that destroys kept snapshots: `atomtx prune`, and what differs is for others."""

    command = "prune"
    noun = "kept snapshot"

    def __init__(
        self, show: Reporter, as_json: bool, names: tuple[str, ...], options: dict[str, Any]
    ) -> None:
        self._show = show
        self._as_json = as_json
        self._asked = jobs.asked(names, (), options)
        self._options = options
        self._interrupts = Interrupts()
        self._notifier = Notifier.of_environment(
            show.warn, statedir.find(), own=self._asked.job.notices, verb=Verb.PRUNE
        )
        self._policy = self._rules()
        self._savers = self._jobs_that_save()

    def _rules(self) -> Policy:
        return policy_of(self._options, self._asked.job.snap_keep)

    def _jobs_that_save(self) -> tuple[str, ...]:
        """Return the jobs of which each must have saved what goes."""
        found = jobs.known(self._options["saved_in"], self._options["config_path"], self._asked)
        if self._asked.job.keep_until_saved:
            found = (*self._own_job(), *found)
        if found and self._options["copies"]:
            raise UserError(
                "--copies counts what no backup reads, so that it would wait for ever",
                hint="leave out --saved-in, or give --no-keep-until-saved",
            )
        return found

    def _own_job(self) -> tuple[str, ...]:
        if not self._asked.name and not self._options["saved_in"]:
            raise UserError(
                "--keep-until-saved is of no use without a job, whose backups are asked for",
                hint="name it: --saved-in JOB",
            )
        return (self._asked.name,) if self._asked.name else ()

    def run(self) -> ExitStatus:
        if self._options["dry_run"]:
            self._print(self._choose())
            return ExitStatus.COMPLETED
        if os.geteuid() != 0:
            raise UserError("only root can destroy snapshots", hint="run it with sudo")
        return runs.in_its_turn(
            self._asked,
            self.command,
            self._choose,
            lambda choice: choice.plan,
            self._carry_out,
            wait=self._options["wait"],
            notifier=self._notifier,
            interrupts=self._interrupts,
            show=self._show,
        )

    def _judge(self) -> Choice:
        return pruning.choose(
            self._asked.request(),
            policy=self._policy,
            pattern=Pattern.parse(self._asked.job.snap_pattern),
            adopted=self._options["adopt"],
            zfs=Zfs(),
            now=datetime.now(UTC),
            copies=self._options["copies"],
            saved=self._saved(),
        )

    def _saved(self) -> pruning.Saved:
        journal = statedir.find() / journalfile.NAME
        found = {name: history.saved_by(journal, job_key(name)) for name in self._savers}
        for name in (name for name, guids in found.items() if not guids):
            self._show.note(
                f"the journal knows no completed backup of {name}: nothing is destroyed"
            )
        return found

    def _steps(self, choice: Choice) -> tuple[PruneSnapshots, ...]:
        return pruning.intents(
            choice, bookmark=self._options["bookmark"], copies=self._options["copies"]
        )

    def _choose(self) -> Choice:
        choice = self._judge()
        for note in choice.plan.notes:
            self._show.note(note)
        return choice

    def _print(self, choice: Choice) -> None:
        told = [_told(verdict) for verdict in choice.verdicts]
        result = {"job": choice.plan.label, "snapshots": told, "waiting": choice.waiting}
        self._show.result(result)
        if not self._as_json:
            click.echo("\n".join(_lines(choice, self.noun)))

    def _carry_out(self, journal: Journal, choice: Choice) -> ExitStatus:
        if not choice.going:
            there = _count(len(choice.verdicts), self.noun)
            self._show.done(f"nothing to {self.command}: {there} stay{_waiting(choice)}")
            return ExitStatus.COMPLETED
        self._notifier.started(choice.plan.run)
        started = time.monotonic()

        verdicts: dict[str, str] = {}

        def advance(_: RunFolder, lock: int, run: Run) -> Run:
            pruner = Pruner(journal, lock, self._interrupts, self._show.step)
            ended = pruner.advance(run)
            verdicts.update(pruner.verdicts)
            return ended

        run = runs.carry_out(journal, choice.plan, self._steps(choice), advance)
        self._show.result(_result(run, choice))
        seconds = time.monotonic() - started
        self._show.done(_closing_line(run, choice, verdicts, seconds, self.noun))
        status = runs.status_of_ended(run, self._interrupts)
        self._notifier.ended(run, status)
        return status


def policy_of(options: Mapping[str, Any], of_job: Sequence[str]) -> Policy:
    """Return the rules of the command line, or else the job's."""
    given = {
        option: options[option.replace("-", "_")]
        for option in retention.OPTIONS
        if options[option.replace("-", "_")] is not None
    }
    return Policy.parse(given or dict(retention.words(of_job)))


def _told(verdict: Verdict) -> dict[str, Any]:
    return {
        "snapshot": verdict.item.name,
        "at": verdict.item.at.isoformat(),
        "keep": verdict.keep,
        "reasons": verdict.reasons,
        "unsaved_in": verdict.unsaved_in,
    }


def _lines(choice: Choice, noun: str) -> Iterator[str]:
    """Yield a line for each snapshot; the reasons stand in a column."""
    verdicts = choice.verdicts
    width = max((len(verdict.item.name) for verdict in verdicts), default=0)
    for verdict in verdicts:
        word = f"keep     {', '.join(verdict.reasons)}" if verdict.keep else "destroy"
        yield f"{verdict.item.name:<{width}}  {word}"
    going = len(choice.going)
    stay = f"{len(verdicts) - going} stay{_waiting(choice)}"
    yield f"{_count(len(verdicts), noun)}: {stay}, {going} would be destroyed"


def _waiting(choice: Choice) -> str:
    return f" ({choice.waiting} until saved)" if choice.waiting else ""


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def _result(run: Run, choice: Choice) -> dict[str, Any]:
    told = [_told(verdict) for verdict in choice.verdicts]
    return runs.result(run, snapshots=told, waiting=choice.waiting)


def _closing_line(
    run: Run, choice: Choice, verdicts: Mapping[str, str], seconds: float, noun: str
) -> str:
    stay = len(choice.verdicts) - len(choice.going)
    count = _count(pruning.destroyed(verdicts), noun)
    words = f"{run.outcome} in {duration(seconds)}: {count} destroyed"
    if absent := list(verdicts.values()).count("absent"):
        words += f", {absent} {'was' if absent == 1 else 'were'} gone already"
    if run.reason:
        words = f"{run.outcome} in {duration(seconds)}: {run.reason}"
    return f"{words}, {stay} stay{_waiting(choice)} (run {run.id})"

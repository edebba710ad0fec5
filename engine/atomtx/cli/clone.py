"""`atomtx clone`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from .. import cloning, statedir, words
from ..cloner import Cloner
from ..cloner import told as told_words
from ..cloning import Pair, Terms
from ..convention import Pattern
from ..errors import EffectError, ExitStatus, UserError
from ..intents import CopySnapshots
from ..interrupts import Interrupts
from ..journal import Journal
from ..names import Target
from ..plan import Plan
from ..records import Run
from ..replica import Copy, Source
from ..statedir import RunFolder
from ..states import Verb
from ..volumes import ends
from ..volumes.ends import End
from . import jobs, json_option, runs
from .notifying import Notifier
from .render import Reporter, duration, reporter


@click.command()
@jobs.named("dataset")
@click.option(
    "--to",
    "clone_targets",
    multiple=True,
    metavar="TARGET",
    help="[[USER@]HOST:]DATASET; may be repeated.",
)
@jobs.chosen("dataset")
@jobs.pattern
@click.option(
    "--rate", "clone_rate", metavar="SIZE", help="Send that much a second at most, such as 10M."
)
@click.option(
    "--compress/--no-compress",
    default=True,
    help="Compress on the way to another machine, where both have zstd.",
)
@click.option(
    "--discard-changes",
    is_flag=True,
    help="Forget what was changed in a copy since its newest snapshot.",
)
@click.option("--transient", is_flag=True, help="Send what `atomtx unsnap` takes away here, too.")
@click.option("--wait", is_flag=True, help="Wait for another run of this job to end.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be sent, change nothing.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def clone(names: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Send kept snapshots to other pools and machines.

    The copy of POOL/PATH is TARGET/PATH. A copy that is not there is made of the oldest kept
    snapshot; then it gets all later ones, by what both ends have in common: a snapshot, or a
    bookmark of it here. Only snapshots go that `atomtx snap` took. A copy is read-only, is not
    mounted, and has the properties of its dataset; one that is encrypted is sent as it is, and
    never in the clear. What was cut off goes on where it was. A hold keeps the last snapshot that
    both have, here and there. Nothing of a target is ever destroyed, or rolled back unasked.

    Of a job of the configuration its volumes, recursive, all, exclude, snap-pattern, clone-targets
    and clone-rate count.

    \b
    Examples:
      atomtx clone -r tank/home --to backup/here
      atomtx clone -r tank --to root@nas:backup/tank --rate 20M --dry-run
      atomtx clone home                the job home of the configuration

    \b
    EXIT STATUS
      0 all copies are up to date      5 another run of this job is at work
      1 none is                        6 waiting, and why
      2 usage; nothing was sent
      3 some are not                   130, 143 interrupted; what has arrived stays
    """
    with reporter(as_json=as_json, quiet=quiet) as show:
        return _Clone(show, as_json, names, options).run()


class _Clone:
    def __init__(
        self, show: Reporter, as_json: bool, names: tuple[str, ...], options: dict[str, Any]
    ) -> None:
        self._show = show
        self._as_json = as_json
        self._asked = jobs.asked(names, (), options)
        self._wait = options["wait"]
        self._dry_run = options["dry_run"]
        job = self._asked.job
        self._terms = Terms(
            rate=words.bytes_of(job.clone_rate) if job.clone_rate else 0,
            compress=options["compress"],
            discard=options["discard_changes"],
            transient=options["transient"],
        )
        self._pattern = Pattern.parse(job.snap_pattern)
        self._interrupts = Interrupts()
        self._notifier = Notifier.of_environment(
            show.warn, statedir.find(), own=job.notices, verb=Verb.CLONE
        )

    def run(self) -> ExitStatus:
        if self._dry_run:
            return self._print(*self._plan())
        if os.geteuid() != 0:
            raise UserError("only root can send snapshots", hint="run it with sudo")
        return runs.in_its_turn(
            self._asked,
            "clone",
            self._plan,
            lambda planned: planned[0],
            self._carry_out,
            wait=self._wait,
            notifier=self._notifier,
            interrupts=self._interrupts,
            show=self._show,
        )

    def _plan(self) -> tuple[Plan, tuple[CopySnapshots, ...]]:
        targets = self._asked.job.clone_targets
        made, steps = cloning.make(
            self._asked.request(),
            targets,
            pattern=self._pattern,
            terms=self._terms,
            here=End(),
            check=self._interrupts.check,
        )
        for note in made.notes:
            self._show.note(note)
        return made, steps

    def _print(self, made: Plan, steps: Sequence[CopySnapshots]) -> ExitStatus:
        here = End()
        told: list[dict[str, Any]] = []
        for step in steps:
            there = ends.end_of(Target.parse(step.target))
            told += [_told(pair, here, there) for pair in _pairs(step, here, there)]
        self._show.result({"job": made.label, "copies": told})
        if not self._as_json:
            click.echo("\n".join(_lines(told)))
        troubles = sum(each["trouble"] is not None for each in told)
        if troubles == len(told):
            return ExitStatus.FAILED
        return ExitStatus.PARTIAL if troubles else ExitStatus.COMPLETED

    def _carry_out(
        self, journal: Journal, planned: tuple[Plan, tuple[CopySnapshots, ...]]
    ) -> ExitStatus:
        made, steps = planned

        def check(there: Sequence[Run]) -> None:
            cloning.check_alone(steps, (run for run in there if run.job != made.job))

        check(journal.open_runs())  # so that nobody is told of a start; another may yet be begun
        self._notifier.started(made.run)
        started = time.monotonic()

        def advance(_: RunFolder, lock: int, run: Run) -> Run:
            tell = runs.tell(self._show)
            return Cloner(journal, lock, self._interrupts, tell).advance(run)

        run = runs.carry_out(journal, made, steps, advance, check=check)
        self._show.result(_result(run, steps))
        self._show.done(_closing_line(run, steps, time.monotonic() - started))
        status = runs.status_of_ended(run, self._interrupts)
        self._notifier.ended(run, status)
        return status


def _pairs(step: CopySnapshots, here: End, there: End) -> list[Pair]:
    try:
        return cloning.look(step, here, there)
    except EffectError as exc:
        names = zip(step.datasets, step.copies, strict=True)
        return [
            Pair(Source(d, False, False, ()), Copy(c, host=there.host), trouble=exc)
            for d, c in names
        ]


def _told(pair: Pair, here: End, there: End) -> dict[str, Any]:
    sizes = [here.size(pair.source, transfer) for transfer in pair.transfers]
    return {
        "dataset": pair.source.dataset,
        "copy": pair.copy.shown,
        "sends": [told_words(pair.source, transfer) for transfer in pair.transfers],
        "bytes": None if None in sizes else sum(filter(None, sizes)),
        "trouble": str(pair.trouble) if pair.trouble else None,
    }


def _lines(told: Sequence[dict[str, Any]]) -> Iterator[str]:
    for each in told:
        head = f"{each['dataset']} to {each['copy']}"
        if each["trouble"]:
            yield f"{head}: {each['trouble']}"
        elif not each["sends"]:
            yield f"{head}: up to date"
        else:
            about = "" if each["bytes"] is None else f", about {words.size(each['bytes'])}"
            yield f"{head}: {'; '.join(each['sends'])}{about}"


def _result(run: Run, steps: Sequence[CopySnapshots]) -> dict[str, Any]:
    names = [volume.snapshot for volume in run.volumes]
    return runs.result(run, snapshots=names, targets=[step.target for step in steps])


def _closing_line(run: Run, steps: Sequence[CopySnapshots], seconds: float) -> str:
    head = f"{run.outcome} in {duration(seconds)}"
    if run.reason:
        return f"{head}: {run.reason} (run {run.id})"
    count = len(run.volumes) * len(steps)
    what = "1 copy is" if count == 1 else f"{count} copies are"
    return f"{head}: {what} up to date (run {run.id})"

"""`atomtx run`: the steps of a job, and how each is carried out."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import click

from .. import config, statedir, stepping, steps
from ..config import Config, Problem
from ..config_schema import DEFAULT, Job
from ..errors import EffectError, ExitStatus, UserError, worst
from ..intents import RunStep
from ..interrupts import Interrupts
from ..journal import Journal
from ..names import Target
from ..plan import Plan, job_key
from ..records import Run
from ..settling import Settled
from ..statedir import RunFolder
from ..states import Verb
from ..stepping import CONFIG, Stepper
from . import NAMED, cli, jobs, json_option, runs
from . import run as run_command
from .notifying import Notifier
from .prune import policy_of
from .render import Reporter, duration, reporter
from .within import Within

_HELP = ("-h", "--help")


@click.command()
@click.argument("job", type=NAMED)
@jobs.config_option(f"The configuration.  [default: {DEFAULT}]")
@click.option(
    "--on-stop",
    type=click.Choice(("undo", "keep")),
    show_default=jobs.without("on-stop"),
    help="What SIGTERM makes of the run: give it up, or leave it for `recover`.",
)
@click.option("--wait", is_flag=True, help="Wait for another run of a job, its steps' too, to end.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what each step would do.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def run(job: str, as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Run the steps of a job, one after the other.

    Each step of JOB in the configuration is a command of atomtx: snap, clone, backup, prune,
    unsnap or sure, with its options. Where it names no job and no dataset, it is of this job.
    After a step that failed the following ones are not run. The steps are journaled first: after
    a crash, `atomtx recover` goes on at the step where it was, and what is done is not done again.

    \b
    Examples:
      atomtx run home
      atomtx run home --dry-run

    \b
    EXIT STATUS
      0 all steps are done     3 a step did a part of its work
      1 a step failed          4 something is in use: run `atomtx recover`
      2 usage                  5 another run of the job's steps is at work
      6 waiting, and why       7 all is done, a hook after a step failed
                               130, 143 interrupted: the other steps are not run
    """
    with reporter(as_json=as_json, quiet=quiet) as show:
        passed = {"--json": as_json, "--quiet": quiet, "--wait": options["wait"]}
        return _Run(show, job, passed, options).run()


class _Run:
    def __init__(
        self, show: Reporter, job: str, passed: dict[str, bool], options: dict[str, Any]
    ) -> None:
        self._show = show
        self._config = config.load(config.find(options["config_path"]))
        self._name = job
        self._job = self._config.job(job)
        self._steps = words_of(self._config, job)
        self._passed = tuple(option for option, given in passed.items() if given)
        self._options = options
        self._interrupts = Interrupts()
        self._commands = Commands(show, self._interrupts, self._passed)
        pings = any(steps.is_backup_of(words, job) for words in self._steps)
        self._notifier = Notifier.of_environment(
            show.warn,
            statedir.find(),
            own=self._job.notices,
            by_job=jobs.notices_of(self._config, but=job),
            verb=Verb.RUN,
            pings=pings,
        )

    def run(self) -> ExitStatus:
        if self._options["dry_run"]:
            return self._dry_run()
        if os.geteuid() != 0:
            raise UserError("only root can run the steps of a job", hint="run it with sudo")
        with self._notifier.delivering(f"run {self._name}"):
            return runs.in_journal(
                self._in_turn,
                keep_history_s=self._job.keep_history,
                interrupts=self._interrupts,
                show=self._show,
            )

    def _dry_run(self) -> ExitStatus:
        statuses = []
        for step in stepping.intents(self._steps):
            self._show.step(step.describe())
            if "--dry-run" not in _options_of(step.words):
                self._show.note("it has no dry run")
                continue
            words = _with(step.words, "--dry-run", *self._passed)
            with _configured(self._config.path):
                statuses.append(_status(run_command(words)))
        return worst(statuses)

    def _in_turn(self, journal: Journal) -> ExitStatus:
        return runs.in_turn(
            journal,
            lambda: stepping.make_plan(
                self._name, self._config.path, on_stop=self._options["on_stop"] or self._job.on_stop
            ),
            lambda made: made.job,
            lambda made: self._carry_out(journal, made),
            wait=self._options["wait"],
            interrupts=self._interrupts,
            show=self._show,
            sources=jobs.sources(self._config.path),
            told=lambda settled: self._notifier.interrupted(
                settled.run, settled.status, pings=False
            ),
            of_step=self._tell_of_step,
            commands=self._commands,
        )

    def _tell_of_step(self, settled: Settled) -> None:
        """Give notice of an interrupted step's run, of which the run of steps does not tell."""
        if tells_itself(settled.run, job_key(self._name)):
            self._notifier.interrupted(settled.run, settled.status)

    def _carry_out(self, journal: Journal, made: Plan) -> ExitStatus:
        self._notifier.started(made.run)
        started = time.monotonic()

        def advance(_: RunFolder, __: int, run: Run) -> Run:
            stepper = Stepper(journal, self._commands, self._interrupts)
            return stepper.advance(run)

        run = runs.carry_out(journal, made, stepping.intents(self._steps), advance)
        self._show.result(result(run))
        words = f"{run.outcome} in {duration(time.monotonic() - started)}"
        words += f": {run.reason}" if run.reason else f": {len(self._steps)} steps"
        self._show.done(f"{words} (run {run.id})")
        status = runs.status_of_ended(run, self._interrupts)
        self._notifier.ended(run, status)
        return status


def tells_itself(run: Run, of_job: str) -> bool:
    """Tell whether a step's run is told of as its job is: another one than that of the steps."""
    return run.of_job.startswith(job_key("")) and run.of_job != of_job


def result(run: Run) -> dict[str, Any]:
    """Return how a run of steps ended, for a program."""
    told = [
        {"step": steps.words_of(step), "outcome": step.outcome, "exit_status": step.status}
        for step in run.steps
    ]
    return runs.result(run, steps=told)


class Commands:
    """Carries steps out by the code of their commands, in this process."""

    def __init__(self, show: Reporter, interrupts: Interrupts, passed: tuple[str, ...]) -> None:
        self._show = show
        self._interrupts = interrupts
        self._passed = passed  # options of ours that each step gets too

    def not_ready(self, run: Run) -> str | None:
        """Tell why the steps of an interrupted run cannot be gone on with: its job is gone."""
        path, job = stepping.config_of(run), stepping.job_of(run)
        try:
            there = config.load(path).jobs
        except UserError as exc:
            return exc.message
        return None if job in there else f"{path} has no job {job} any more"

    def carry_out(self, run: Run, step: RunStep) -> ExitStatus:
        """Carry out a step as if it was typed; a signal reaches both of us."""
        path = stepping.config_of(run)
        kept = ("--on-stop=keep",) if run.plan.on_stop == "keep" else ()
        try:
            of = _job_of(step.words, _known(path))
            words = _with(step.words, *self._passed, *kept)
        except click.ClickException as exc:  # the words are of another release
            self._show.warn(f"{step.describe()}: {exc.format_message()}")
            return ExitStatus.USAGE
        within = Within(f"{run.id}/{step.n}", tells=of not in ("", stepping.job_of(run)))
        with self._show:  # its end takes a live line away, for that of the step
            self._show.step(step.describe())
        # It looks at no signal of ours, and a killed scan leaves nothing.
        at_once = self._interrupts.at_once() if step.words[0] == "sure" else nullcontext()
        with _configured(path), self._interrupts.lent(), at_once:
            return _status(run_command(words, within))


# -- words -------------------------------------------------------------------------------------


def words_of(found: Config, job: str) -> tuple[tuple[str, ...], ...]:
    """
    Return the steps of a job, each of which names what it is of; UserError for what is wrong.

    The options of each are held against its command's; what they name is not looked for.
    """
    texts = found.jobs[job].steps
    if not texts:
        raise UserError(
            f"the job {job} has no steps", hint=f"give it some in {found.path}: steps = [...]"
        )
    return tuple(_whole(text, job, found) for text in texts)


def backed_up(found: Config, job: str) -> tuple[str, ...]:
    """Return the jobs that the steps of a job back up; UserError for what is wrong with them."""
    words = words_of(found, job)
    named = [_job_of(each, found.jobs) for each in words if each[0] == "backup"]
    return tuple(dict.fromkeys(name for name in named if name in found.jobs))


def problems(found: Config) -> list[Problem]:
    """Return what the commands themselves find wrong with steps."""
    wrong = []
    for name, job in found.jobs.items():
        for text in job.steps:
            try:
                _whole(text, name, found)
            except UserError as exc:
                hint = f"; {exc.hint}" if exc.hint else ""
                wrong.append(found.problem(name, "steps", f"steps: {exc.message}{hint}"))
    return wrong


def _whole(text: str, job: str, found: Config) -> tuple[str, ...]:
    words = steps.parse(text)
    try:
        given = _parsed(words)
    except click.ClickException as exc:
        raise UserError(f"the step {text!r} is wrong: {exc.format_message()}") from exc
    if given.get("config_path"):
        raise UserError(
            f"the step {text!r} names a configuration", hint="steps are of the jobs of one file"
        )
    if given.get("dry_run"):
        raise UserError(
            f"the step {text!r} would change nothing", hint=f"`atomtx run {job} -n` shows them all"
        )
    names = "job_name" not in given or any(
        given[what] for what in ("names", "job_name", "no_job", "all")
    )
    at = _at(words)
    whole = words if names else (*words[:at], "--job", job, *words[at:])
    try:
        _check_jobs(given, found)
        _check_needs(words[0], given, found.jobs.get(_job_of(whole, found.jobs), Job()))
    except UserError as exc:
        raise UserError(f"the step {text!r} is wrong: {exc.message}", hint=exc.hint) from exc
    return whole


def _check_jobs(given: Mapping[str, Any], found: Config) -> None:
    """Refuse a job that the file has not."""
    named = (given.get("job_name"), *given.get("saved_in", ()))
    for name in filter(None, named):
        found.job(name)
    if not given.get("no_job"):
        with suppress(EffectError):  # no pool can be asked now
            jobs.check_meant(given.get("names", ()), found)


def _check_needs(command: str, given: Mapping[str, Any], job: Job) -> None:
    """Refuse a command that lacks what neither the step nor its job says."""
    if command == "prune" and policy_of(given, job.snap_keep).is_empty:
        raise UserError(
            "no rule says which snapshots to keep", hint="such as --keep-daily 7, or snap-keep"
        )
    if command == "clone":
        targets = given["clone_targets"] or job.clone_targets
        if not targets:
            raise UserError("no target was given", hint="--to POOL/PATH, or clone-targets")
        for text in targets:
            Target.parse(text)


def _parsed(words: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a command by their names."""
    own = steps.own_words(words)
    if any(word in _HELP for word in own):
        raise click.UsageError("it only shows a help")
    command = _command(own)
    at = _at(own)
    with click.Context(cli, info_name="atomtx") as root:
        return command.make_context(own[at - 1], list(own[at:]), parent=root).params


def _at(words: Sequence[str]) -> int:
    """Return where the words of a command itself begin: `sure` has commands of its own."""
    return 2 if words[0] == "sure" else 1


def _command(words: Sequence[str]) -> click.Command:
    """Return the command that words are for."""
    context = click.Context(cli, info_name="atomtx")
    command = cli.get_command(context, words[0])
    if isinstance(command, click.Group):
        name = words[1] if len(words) > 1 else ""
        command = command.get_command(context, name)
        if command is None:
            raise click.UsageError(f"{words[0]} has no command {name!r}")
    assert command
    return command


def _options_of(words: Sequence[str]) -> set[str]:
    return {option for param in _command(words).params for option in param.opts}


def _with(words: Sequence[str], *options: str) -> tuple[str, ...]:
    """Return the words with those of *options* that their command has."""
    known = _options_of(words)
    at = _at(words)
    ours = (option for option in options if option.partition("=")[0] in known)
    return (*words[:at], *ours, *words[at:])


def _known(path: str) -> Collection[str]:
    """Return the jobs of a configuration; none of a wrong one, of which the step itself tells."""
    try:
        return config.load(path).jobs
    except UserError:
        return ()


def _job_of(words: Sequence[str], known: Collection[str]) -> str:
    """Return the job that a whole step is of; empty for datasets, and for `sure`."""
    given = _parsed(words)
    if given.get("job_name") or given.get("no_job"):
        return given["job_name"] or ""
    return next((name for name in given.get("names", ()) if name in known), "")


def _status(number: int) -> ExitStatus:
    return ExitStatus(number) if number in set(ExitStatus) else ExitStatus.FAILED


@contextmanager
def _configured(path: str) -> Iterator[None]:
    """Have the commands of a block find their jobs in the configuration at *path*."""
    before = os.environ.get(CONFIG)
    os.environ[CONFIG] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[CONFIG]
        else:
            os.environ[CONFIG] = before

"""`atomtx check`: whether backups are fresh, for monitoring systems that run plug-ins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from .. import history, journalfile, statedir
from ..errors import AtomtxError, UserError
from ..health import Level, Limits, Verdict, is_regular, judge
from ..words import printable, seconds
from . import echo, json_option, render, wants_json
from .status import situation, standing

_SHOWN = 5  # a pager shows one short line


class _PlugIn(click.Command):
    """
    A command whose every failure is UNKNOWN, on standard output, with exit status 3.

    That is what monitoring systems take for "no answer"; our own 2 would be CRITICAL to them.
    """

    def make_context(
        self, info_name: str | None, args: list[str], *more: Any, **extra: Any
    ) -> click.Context:
        as_json = wants_json(args)
        try:
            return super().make_context(info_name, args, *more, **extra)
        except click.ClickException as exc:
            _print(Level.UNKNOWN, exc.format_message(), [], as_json=as_json)
            raise click.exceptions.Exit(int(Level.UNKNOWN)) from exc

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AtomtxError as exc:
            _print(Level.UNKNOWN, str(exc), [], as_json=ctx.params["as_json"])
            return Level.UNKNOWN


@click.command(cls=_PlugIn)
@click.option(
    "--max-age",
    required=True,
    metavar="TIME",
    help="CRITICAL where the last completed backup is older, such as 26h, 8d.",
)
@click.option("--warn-age", metavar="TIME", help="WARNING where it is older.")
@click.option("--job", "names", multiple=True, metavar="JOB", help="Only this job; repeatable.")
@click.option("--ignore", multiple=True, metavar="JOB", help="Not this job; repeatable.")
@json_option
def check(
    max_age: str,
    warn_age: str | None,
    names: tuple[str, ...],
    ignore: tuple[str, ...],
    as_json: bool,
) -> Level:
    """
    Tell a monitoring system whether backups are fresh.

    Prints one line, as Nagios plug-ins do. The age of a backup is that of its moment, when the
    snapshots were taken. Only completed backups count, not partial ones. JOB is exactly what
    `atomtx history` shows as JOB, or the job's key in --json. Without --job every job that ran
    at least twice is checked, so that a backup made once does not alarm for ever; and every run
    that was left unfinished. One that was given up alarms until it is left out with --ignore.
    Changes nothing on the machine.

    \b
    Examples:
      atomtx check --max-age 26h
      atomtx check --max-age 26h --warn-age 25h --job 'tank/home -r'

    \b
    EXIT STATUS (of plug-ins, not those of the other commands)
      0  OK
      1  WARNING: older than --warn-age, the last run did not complete, a step after it failed,
         a cleanup is parked, an interrupted run is not settled, or a moment is in the future
      2  CRITICAL: nothing completed within --max-age, or ever
      3  UNKNOWN: no journal, it cannot be read, nothing to check, or wrong usage
    """
    limits = _limits(max_age, warn_age)
    state = statedir.find()
    verdicts, missing = _judged(state, limits, names, ignore)
    level = max([v.level for v in verdicts] + [Level.CRITICAL for _ in missing])
    text = _text(verdicts, missing, may_ignore=not names)
    _print(level, text, verdicts, limits=limits, missing=missing, as_json=as_json)
    return level


def _limits(max_age: str, warn_age: str | None) -> Limits:
    limits = Limits(seconds(max_age), None if warn_age is None else seconds(warn_age))
    if limits.warning_s is not None and limits.warning_s > limits.critical_s:
        raise UserError(f"--warn-age {warn_age} is more than --max-age {max_age}")
    return limits


# -- judging -----------------------------------------------------------------------------------


def _judged(
    state: Path, limits: Limits, names: Sequence[str], ignore: Sequence[str]
) -> tuple[list[Verdict], list[str]]:
    """Return how each job is that was asked for, and the names of those that never ran."""
    path = state / journalfile.NAME
    if not journalfile.check(path):
        raise UserError(f"there is no journal {path}", hint="no backup was made by this atomtx")
    ran = history.jobs(path)
    absent = [name for name in names if not any(_is_named(job, [name]) for job in ran)]
    missing = [name for name in absent if name not in ignore]
    jobs = [job for job in ran if not _is_named(job, ignore)]
    if names:
        jobs = [job for job in jobs if _is_named(job, names)]
    now = datetime.now(UTC)
    verdicts = [
        judge(job, limits if names or is_regular(job) else None, _situations(state, job), now)
        for job in jobs
    ]
    told = [verdict for verdict in verdicts if verdict.reasons]
    if told or missing:
        return told, missing
    if ignore and ran and not jobs:
        raise UserError("--ignore leaves no job to check")
    raise UserError("no job ran twice yet, so there is nothing to check", hint="name one: --job")


def _is_named(job: history.Job, names: Iterable[str]) -> bool:
    return any(name == job.label or name in job.keys for name in names)


def _situations(state: Path, job: history.Job) -> dict[str, str]:
    try:
        return {run.id: situation(*standing(state, run)) for run in job.open}
    except PermissionError as exc:
        raise UserError(
            f"cannot tell whether a run is at work: {exc.filename}: permission denied",
            hint="run it as root",
        ) from exc


# -- telling -----------------------------------------------------------------------------------


def _names(verdicts: Sequence[Verdict]) -> dict[int, str]:
    """Return what to call each job: its label, or more where two have the same."""
    labels = [verdict.job.label for verdict in verdicts]
    return {
        n: verdict.job.label if labels.count(verdict.job.label) == 1 else verdict.job.name
        for n, verdict in enumerate(verdicts)
    }


def _text(verdicts: Sequence[Verdict], missing: Sequence[str], *, may_ignore: bool) -> str:
    """Return the gravest first, as many as a short line holds, and what ends an alarm for ever."""
    names = _names(verdicts)
    told = [(Level.CRITICAL, 0.0, f"{name}: never ran") for name in missing]
    told += [(v.level, v.age_s or 0.0, f"{names[n]}: {v.words}") for n, v in enumerate(verdicts)]
    told.sort(key=lambda each: each[:2], reverse=True)
    more = len(told) - _SHOWN
    tail = [f"and {more} more jobs"] if more > 0 else []
    if may_ignore and any(v.is_idle for v in verdicts):
        tail.append("where one was given up: --ignore JOB")
    return "; ".join([words for _, _, words in told[:_SHOWN]] + tail)


def _performance(verdicts: Sequence[Verdict], limits: Limits) -> str:
    """Return each age in the plug-ins' form: 'label'=value;warning;critical;least."""
    names = _names(verdicts)
    warning = "" if limits.warning_s is None else limits.warning_s
    return " ".join(
        f"{_quoted(names[n]) if len(verdicts) > 1 else 'age'}="
        f"{'U' if v.age_s is None else f'{v.age_s:.0f}s'};{warning};{limits.critical_s};0"
        for n, v in enumerate(verdicts)
    )


def _quoted(name: str) -> str:
    # The guidelines forbid `=` in a label; a quote is doubled.
    return "'" + _line(name).replace("=", "_").replace("'", "''") + "'"


def _line(text: str) -> str:
    """Return text in one line, without the bar behind which performance data begins."""
    return printable(" ".join(text.split())).replace("|", "/")


def _print(
    level: Level,
    text: str,
    verdicts: Sequence[Verdict],
    *,
    as_json: bool,
    limits: Limits | None = None,
    missing: Sequence[str] = (),
) -> None:
    if as_json:
        echo(render.to_json(_object(level, text, verdicts, limits, missing)))
        return
    numbers = f" | {_performance(verdicts, limits)}" if verdicts and limits else ""
    echo(f"ATOMTX {level.name} - {_line(text)}{numbers}")


def _object(
    level: Level,
    text: str,
    verdicts: Sequence[Verdict],
    limits: Limits | None,
    missing: Sequence[str],
) -> dict[str, Any]:
    return {
        "status": level.name,
        "exit_status": int(level),
        "message": text,
        "max_age_s": limits.critical_s if limits else None,
        "warn_age_s": limits.warning_s if limits else None,
        "never_ran": missing,
        "jobs": [_job_object(verdict) for verdict in verdicts],
    }


def _job_object(verdict: Verdict) -> dict[str, Any]:
    job = verdict.job
    completed = job.completed
    return {
        "job": job.newest.job,
        "label": job.label,
        "client": job.client,
        "repository": job.repository,
        "status": verdict.level.name,
        "reasons": verdict.reasons,
        "age_s": verdict.age_s,
        "runs": job.times,
        "completed": completed.id if completed else None,
        "moment_at": completed.moment_at if completed else None,
        "newest": job.newest.id,
        "open": [run.id for run in job.open],
    }

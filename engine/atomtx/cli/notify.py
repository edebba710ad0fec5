"""`atomtx notify`: give the notices that a service left for a process that can."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click

from .. import history, journalfile, notices, outbox, statedir
from ..errors import AtomtxError, ExitStatus, UserError
from ..notices import Facts, NotifySettings
from ..plan import job_key
from ..redact import Redactor
from . import jobs, json_option
from .render import Reporter, reporter


@click.command()
@click.argument("unit", required=False)
@jobs.config_option("Who is told of a service that was killed stands in this configuration.")
@json_option
def notify(unit: str | None, config_path: str | None, as_json: bool) -> ExitStatus:
    """
    Give the notices that services have left.

    The units that `atomtx install systemd` writes do this when a run has ended: the service of
    a backup is too confined to send a mail. UNIT is the service that ended, without ".service";
    where it was killed, and could not leave a notice, one is given that says so.

    What cannot be given is kept, and tried again the next time.

    \b
    Example:
      atomtx notify

    \b
    EXIT STATUS
      0  all were given, or there was none
      1  one could not be given
      2  wrong usage
    """
    if os.geteuid() != 0:
        raise UserError("only root can read the notices", hint="run it with sudo")
    with reporter(as_json=as_json) as show:
        return _give(statedir.find(), unit or "", config_path, show)


def _give(state: Path, unit: str, config_path: str | None, show: Reporter) -> ExitStatus:
    from .. import notifiers

    letters = list(outbox.letters(state))
    problems: list[str] = []
    for letter in letters:
        trouble = notifiers.send(letter.settings, [letter.notice])
        problems += trouble
        if not trouble:
            letter.path.unlink(missing_ok=True)
    spoken = {letter.invocation for letter in letters}
    ended = _ended_unit(os.environ)
    if unit and ended and os.environ.get("MONITOR_INVOCATION_ID", "") not in spoken:
        settings, troubles = _who(_job_of(unit), config_path)
        problems += troubles
        redact = Redactor(os.environ).redact
        problems += notifiers.send(settings, [notices.notice(_facts(state, unit, ended), redact)])
    for problem in problems:
        show.warn(f"not notified: {problem}")
    show.done(f"{len(letters)} notices, {len(problems)} could not be given")
    return ExitStatus.FAILED if problems else ExitStatus.COMPLETED


def _who(job: str, config_path: str | None) -> tuple[NotifySettings, list[str]]:
    """Return who is told of a job's service that was killed, and why it may be too few."""
    from .. import config

    general, problems = notices.settings_of(os.environ)
    if not config.is_there(config_path):
        return general, problems
    try:
        there = config.load(config.find(config_path))
    except UserError as exc:
        return general, [*problems, f"who is told is not known: {exc.message}"]
    named = there.jobs.get(job)
    return notices.combined(general, named.notices if named else NotifySettings()), problems


def _job_of(unit: str) -> str:
    return unit.partition("@")[2]


def _ended_unit(env: Mapping[str, str]) -> str:
    """Say how the service ended, as systemd tells its OnFailure= units; empty for a good end."""
    result = env.get("MONITOR_SERVICE_RESULT", "success")
    if result == "success":
        return ""
    code, status = env.get("MONITOR_EXIT_CODE", ""), env.get("MONITOR_EXIT_STATUS", "")
    return f"{result} ({code} {status})" if code else result


def _facts(state: Path, unit: str, ended: str) -> Facts:
    """Return what is known of a service that ended without a word."""
    job, journal = _job_of(unit), state / journalfile.NAME
    facts = Facts(
        host=os.uname().nodename,
        job=job or unit,
        at=datetime.now(UTC),
        exit_status=ExitStatus.FAILED,
        reason=f"{unit}.service was ended: {ended}",
        hint=f"`journalctl -u {unit}` has its last words",
        is_last_known=False,
    )
    try:
        left = [run for run in history.open_runs(journal) if run.job == job_key(job)]
        last = history.last_moment(journal, job_key(job)) if job else None
    except AtomtxError:  # the notice is worth more than these lines of it
        return facts
    of_run = {"run": left[0].id, "state": left[0].state} if left else {}
    return Facts(**{**vars(facts), **of_run, "last_completed": last, "is_last_known": bool(job)})

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
from . import NAMED, jobs, json_option
from .render import Reporter, reporter


@click.command()
@click.argument("unit", type=NAMED, required=False)
@jobs.config_option("Who is told of a service that was killed stands in this configuration.")
@json_option
def notify(unit: str | None, config_path: str | None, as_json: bool) -> ExitStatus:
    """
    Give the notices that services have left.

    The units that `atomtx install systemd` writes do this when a run has ended: the service of
    a backup is too confined to send a mail. UNIT is the service that ended, without ".service";
    where it was killed, and could not leave a notice, one is given that says so.

    What cannot be given is kept, and tried again the next time, for 14 days. With UNIT, what
    another service has just left is its own unit's to give.

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

    own = os.environ.get("MONITOR_INVOCATION_ID", "") if unit else ""
    spoken = bool(own) and outbox.has_spoken(state, own)  # before anything is given
    try:
        count, problems = empty(state, unit, own, show)
    except (AtomtxError, OSError) as exc:  # what the service came to is told all the same
        count, problems = 0, [str(exc)]
    ended = _ended_unit(os.environ)
    if unit and ended and not spoken:
        told, troubles = _who(_job_of(unit), config_path)
        problems += troubles
        made = notices.notice(_facts(state, unit, ended), Redactor(os.environ).redact)
        for settings in told:
            problems += notifiers.send(settings, [made])
    for problem in problems:
        show.warn(f"not notified: {problem}")
    show.done(f"{count} notices, {len(problems)} could not be given")
    return ExitStatus.FAILED if problems else ExitStatus.COMPLETED


def empty(state: Path, unit: str, own: str, show: Reporter) -> tuple[int, list[str]]:
    """
    Give what lies in the outbox; return how many there were, and what went wrong.

    The unit of a service leaves alone what another's is about to give: else that one would find
    nothing, and tell of a service that ended without a word.
    """
    from .. import notifiers

    problems: list[str] = []
    with outbox.giving(state) as is_ours:
        if not is_ours:
            return 0, ["another `atomtx notify` is at work; the next one gives what is left"]
        for note in outbox.tidy(state, own):
            show.warn(note)
        found = [each for each in outbox.letters(state) if not unit or each.is_for(own)]
        for letter in sorted(found, key=lambda each: each.invocation != own):
            trouble = notifiers.send(letter.settings, [letter.notice])
            problems += trouble
            if trouble and letter.is_too_old:
                show.warn(f"given up: {letter.notice.subject}")
            if not trouble or letter.is_too_old:
                outbox.remove(letter, own)
    return len(found), problems


def _who(job: str, config_path: str | None) -> tuple[list[NotifySettings], list[str]]:
    """
    Return who is told of a service that was killed, and why they may be too few.

    Everybody, once, where it is no job's.
    """
    from .. import config

    general, problems = notices.settings_of(os.environ)
    try:
        named = config.load(config.find(config_path)).jobs if config.is_there(config_path) else {}
    except UserError as exc:
        return [general], [*problems, f"who is told is not known: {exc.message}"]
    own = {name: notices.combined(general, each.notices) for name, each in named.items()}
    if job:
        return [own.get(job, general)], problems
    return notices.distinct([general, *own.values()]), problems


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

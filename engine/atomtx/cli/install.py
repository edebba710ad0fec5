"""`atomtx install systemd` and `atomtx uninstall systemd`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from .. import config as configuration
from .. import installing, units
from ..config import Config
from ..errors import ExitStatus, UserError
from ..words import seconds
from . import NAMED, echo, jobs

_WHAT = click.argument("what", type=click.Choice(("systemd",)))
_DIRECTORY = click.option(
    "--directory",
    type=NAMED,
    default=units.DIRECTORY,
    show_default=True,
    metavar="DIR",
    help="Where units are; in another one nothing is enabled or started.",
)
_JOBS = click.option(
    "--job", "names", type=NAMED, multiple=True, metavar="NAME", help="This job; or all."
)


@click.command()
@_WHAT
@_JOBS
@click.option(
    "--on-calendar",
    type=NAMED,
    multiple=True,
    metavar="TIME",
    help="When to back up: systemd.time(7).  [default: daily]",
)
@click.option(
    "--persistent/--no-persistent",
    default=None,
    help="Make up for a time at which the machine was off.  [default: persistent]",
)
@click.option(
    "--randomized-delay",
    type=NAMED,
    metavar="TIME",
    help="Start later, by chance, up to this.  [default: 0]",
)
@click.option(
    "--wake-system/--no-wake-system",
    default=None,
    help="Wake the machine from suspend.  [default: no]",
)
@click.option("--print", "only_print", is_flag=True, help="Print the units, change nothing.")
@click.option("--no-start", is_flag=True, help="Write the units alone: enable and start nothing.")
@_DIRECTORY
@jobs.config_option("The configuration with the jobs.")
def install(what: str, names: tuple[str, ...], only_print: bool, **options: Any) -> ExitStatus:
    """
    Make a service and a timer of systemd of each job.

    The service of a job with steps runs them, as `atomtx run` does; another's backs it up.

    Writes confined services with the paths that a job's repository, cache and hooks need, a
    timer, a clean-up at boot, a resumption of interrupted backups at boot, and notices of what
    failed; enables them, and starts the timer. After a change of the configuration, do it again:
    what is the same stays, and so does of the timer what no option changes. A file that is not
    ours is never overwritten.

    \b
    Examples:
      atomtx install systemd --print
      atomtx install systemd --job home --on-calendar 'Mon *-*-* 03:00'
      systemctl start atomtx@home.service      back up now
      atomtx uninstall systemd

    \b
    EXIT STATUS
      0  done
      1  systemd refused something, or a file cannot be written
      2  wrong usage or configuration, or a file that is not ours; nothing was changed
    """
    config = configuration.load(configuration.find(options["config_path"]))
    names = names or tuple(config.jobs)
    if not names:
        raise UserError(f"{config.path} has no jobs", hint="`atomtx config init` shows how")
    for name in names:
        config.job(name)
    directory = Path(os.path.abspath(options["directory"]))
    made = installing.program(os.environ, config.path)
    of_steps = _of_steps(config)
    texts, notes = installing.pages(
        config, names, _schedule(options), made, directory, of_steps=of_steps
    )
    if only_print:
        echo("\n".join(f"# {directory / name}\n{text}" for name, text in texts.items()))
        return ExitStatus.COMPLETED
    if os.geteuid() != 0:
        raise UserError("only root can write units", hint="run it with sudo, or with --print")
    installing.check_shared(config, names, texts, directory)
    changed = installing.write(directory, texts)
    echo("\n".join(f"{directory / name}: written" for name in changed) or "nothing has changed")
    for note in notes:
        echo(f"note: {note}")
    for warning in installing.warnings(config, names, made, of_steps=of_steps):
        echo(f"warning: {warning}")
    _begin(names, directory, no_start=options["no_start"])
    return ExitStatus.COMPLETED


def _of_steps(config: Config) -> dict[str, tuple[str, ...]]:
    """Return of each job with steps the jobs that these back up."""
    wanted = [name for name, job in config.jobs.items() if job.steps]
    if not wanted:
        return {}
    from . import steps  # and the commands, which no other configuration needs

    return {name: steps.backed_up(config, name) for name in wanted}


def _schedule(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a Schedule that were given."""
    delay, times = options["randomized_delay"], options["on_calendar"]
    for each in times:
        installing.check_calendar(each)
    fields = {
        "on_calendar": times or None,
        "is_persistent": options["persistent"],
        "randomized_delay_s": None if delay is None else seconds(delay),
        "wakes": options["wake_system"],
    }
    return {name: value for name, value in fields.items() if value is not None}


def _begin(names: tuple[str, ...], directory: Path, *, no_start: bool) -> None:
    is_live = str(directory) == units.DIRECTORY and installing.is_booted()
    if no_start or not is_live:
        echo("nothing was enabled or started")
        return
    installing.start(names)
    service = units.instance(units.BACKUP, names[0])
    echo(f"the timers run: `systemctl list-timers 'atomtx@*'`; now: `systemctl start {service}`")


@click.command()
@_WHAT
@_JOBS
@click.option("--no-stop", is_flag=True, help="Remove the files alone.")
@_DIRECTORY
def uninstall(what: str, names: tuple[str, ...], no_stop: bool, directory: str) -> ExitStatus:
    """
    Take away what `atomtx install` wrote.

    Stops the timers and removes our files; a backup that is at work goes on to its end. Drop-ins
    of your own, the configuration, the journal and the repository stay.

    \b
    Example:
      atomtx uninstall systemd --job home

    \b
    EXIT STATUS
      0  done, or nothing was there
      1  systemd refused something, or a file cannot be removed
      2  wrong usage
    """
    if os.geteuid() != 0:
        raise UserError("only root can remove units", hint="run it with sudo")
    for name in names:  # a file's name is made of it
        jobs.check_name(name)
    where = Path(os.path.abspath(directory))
    found = installing.ours(where, names)
    live = str(where) == units.DIRECTORY and installing.is_booted() and not no_stop
    if found and live:
        installing.stop(where, found)
    installing.remove(where, found)
    if live:  # also where one that was killed has removed all
        installing.systemctl("daemon-reload")
    echo("\n".join(f"{where / name}: removed" for name in found) or "nothing of ours is there")
    return ExitStatus.COMPLETED

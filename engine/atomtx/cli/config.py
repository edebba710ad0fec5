"""`atomtx config`: look after the configuration."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click

from .. import config as configuration
from .. import config_text
from ..config import ConfigError, Problem
from ..config_schema import DEFAULT, json_schema
from ..errors import EffectError, ExitStatus, UserError
from ..statedir import make_directory, sync_directory, write_new
from . import NAMED, echo, json_option, render, warn
from .jobs import check_name, config_option, problems_of

_config_option = config_option(f"The file.  [default: {DEFAULT}]")


@click.group()
def config() -> None:
    """
    Check, show or begin the configuration.

    It is the file /etc/atomtx/atomtx.toml, or the one that --config or $ATOMTX_CONFIG names, and
    holds jobs: `atomtx backup NAME` runs one. Only `init` writes anything.

    \b
    Examples:
      atomtx config init --job home
      atomtx config check
      atomtx config show home

    \b
    EXIT STATUS
      0  done        2  wrong configuration or usage
      1  failed
    """


@config.command()
@_config_option
@json_option
def check(config_path: str | None, as_json: bool) -> ExitStatus:
    """
    Tell all that is wrong with the configuration.

    Looks at the file's owner and mode, at each key, and, as root, at the files of credentials.
    Whether datasets and repositories are there is told by `atomtx backup --dry-run JOB`.

    \b
    Example:
      atomtx config check

    \b
    EXIT STATUS
      0  nothing is wrong
      2  something is, or the file cannot be read
    """
    path = configuration.find(config_path)
    try:
        found = configuration.load(path)
    except ConfigError as exc:
        names, problems = [], list(exc.problems)
    else:
        names = list(found.jobs)
        problems = problems_of(found)
    if as_json:
        facts = {"ok": not problems, "path": path, "jobs": names}
        echo(render.to_json({**facts, "problems": [asdict(each) for each in problems]}))
    elif problems:
        _print_problems(problems)
    else:
        echo(render.printable(f"{path}: right; jobs: {', '.join(names) or 'none'}"))
    return ExitStatus.USAGE if problems else ExitStatus.COMPLETED


def _print_problems(problems: list[Problem]) -> None:
    for each in problems:
        warn(render.printable(str(each)))


@config.command()
@click.argument("job", type=NAMED, required=False)
@_config_option
@json_option
def show(job: str | None, config_path: str | None, as_json: bool) -> ExitStatus:
    """
    Show what holds for a job, or for all, and where each value comes from.

    Prints TOML with every key; the comment behind each names the line of the file, or "default".
    Of credentials only the places are shown.

    \b
    Example:
      atomtx config show home

    \b
    EXIT STATUS
      0  done
      2  no such job, or a wrong configuration
    """
    found = configuration.load(configuration.find(config_path))
    if job is not None:
        found.job(job)
    names = list(found.jobs) if job is None else [job]
    if as_json:
        facts = {name: config_text.job_facts(found, name) for name in names}
        echo(render.to_json({"path": found.path, "jobs": facts}))
    else:
        pages = ("\n".join(config_text.job_lines(found, name)) for name in names)
        echo("\n\n".join([f"# {found.path}", *pages]))
    return ExitStatus.COMPLETED


@config.command()
@click.option(
    "--job", "jobs", type=NAMED, multiple=True, metavar="NAME", help="A job to begin with."
)
@_config_option
def init(jobs: tuple[str, ...], config_path: str | None) -> ExitStatus:
    """
    Write a new configuration, with every key explained.

    It is right as it is, but names a dataset and a repository that have to be yours. An existing
    file is never overwritten. Only its owner can read it.

    \b
    Example:
      atomtx config init --job home --job mail

    \b
    EXIT STATUS
      0  written
      1  it cannot be written
      2  it exists, or wrong usage
    """
    names = tuple(dict.fromkeys(jobs)) or ("home",)
    for name in names:
        check_name(name)
    path = Path(configuration.find(config_path))
    _write_new(path, config_text.new_file(names))
    echo(f"{path} is written; edit it, then run `atomtx config check`")
    return ExitStatus.COMPLETED


def _write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet, whole or not at all, durable, and one that loads."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make_directory(path.parent, 0o755)
        write_new(partial, text)
        configuration.load(str(partial))
        os.link(partial, path)  # not over one that exists
        sync_directory(path.parent)
    except FileExistsError as exc:
        raise UserError(f"{path} exists", hint="edit it, or name another with --config") from exc
    except OSError as exc:
        raise EffectError(f"cannot write {path}: {exc.strerror}") from exc
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@config.command()
def schema() -> ExitStatus:
    """
    Print the JSON schema of the configuration, for editors.

    \b
    Example:
      atomtx config schema > /etc/atomtx/atomtx.schema.json

    \b
    EXIT STATUS
      0  done
    """
    echo(render.to_json(json_schema()))
    return ExitStatus.COMPLETED

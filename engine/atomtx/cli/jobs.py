"""Which job a command line means: one of the configuration, or one that is made of its options."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import convention, process
from ..config_kinds import Kind, Words, default_text, keys, near
from ..config_schema import DEFAULT, JOB_NAME, Job
from ..convention import Pattern
from ..errors import UserError
from ..inventory import command
from ..names import Dataset
from ..notices import NotifySettings
from ..plan import Request, job_key
from ..redact import check_arguments
from ..volumes.zfs import Zfs
from . import NAMED, VOLUME

if TYPE_CHECKING:
    from ..config import Config, Problem

_F = TypeVar("_F", bound=Callable[..., object])
# The keys of which the command that they are for knows whose they are.
_OPTIONS = {"snap-pattern": "--pattern", "clone-targets": "--to", "clone-rate": "--rate"}


@dataclass(frozen=True)
class Asked:
    """What a `backup` is to do."""

    job: Job
    name: str = ""  # in the configuration; empty: an unnamed one
    config: Config | None = field(default=None, repr=False)  # where it was read for the name

    @property
    def title(self) -> str:
        """What is said of a job that was not planned yet."""
        return self.name or " ".join((*self.job.volumes, *self.job.read_live)) or "-a"

    def request(self) -> Request:
        """Return which datasets are meant where snapshots stay; a path by what it leads to."""
        job = self.job
        return Request(
            names=_resolved(job.volumes),
            all=job.all,
            recursive=job.recursive,
            exclude=_resolved(job.exclude),
            job=self.name,
        )

    @property
    def sources(self) -> dict[str, dict[str, str]]:
        """Return where the credentials of the job are, by its key."""
        return {job_key(self.name): dict(self.job.sources)} if self.name else {}


def _resolved(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(os.path.realpath(text) if text.startswith("/") else text for text in texts)


def problems_of(found: Config) -> list[Problem]:
    """Return what is wrong with a configuration whose text is right: credentials, and steps."""
    from .. import config

    problems = config.credential_problems(found, os.environ)
    if any(job.steps for job in found.jobs.values()):
        from . import steps  # and the commands: 300 ms that no other configuration need pay

        problems += steps.problems(found)
    return problems


def check_name(name: str) -> None:
    """Raise UserError for what no job can be called."""
    if not re.fullmatch(JOB_NAME, name):
        raise UserError(
            f"{name!r} cannot be a job's name", hint="letters, digits and . _ -, at most 60"
        )


def config_option(what: str) -> Callable[[_F], _F]:
    """Add `--config`, as the parameter ``config_path``."""

    def decorate(command: _F) -> _F:
        return click.option("--config", "config_path", type=NAMED, metavar="FILE", help=what)(
            command
        )

    return decorate


def named(word: str) -> Callable[[_F], _F]:
    """Add the parameters that say what a command is of; *word* is what it works on; see `asked`."""
    help_no_job = f"Take no name for a job: they are {word}s."
    return _all(
        click.argument("names", nargs=-1, type=VOLUME, metavar=f"[JOB | {word.upper()}...]"),
        click.option(
            "--job", "job_name", type=NAMED, metavar="NAME", help="This job of the configuration."
        ),
        click.option("--no-job", is_flag=True, help=help_no_job),
        config_option(f"The configuration.  [default: {DEFAULT}]"),
    )


def chosen(word: str) -> Callable[[_F], _F]:
    """Add the options that say which are meant besides those that are named."""
    below = f"Include what is below each {word}."
    left_out = "Leave out, with what is below."
    return _all(
        click.option("-r", "--recursive/--no-recursive", default=None, help=below),
        click.option("-a", "--all", is_flag=True, default=None, help="All datasets of all pools."),
        click.option("--exclude", multiple=True, type=VOLUME, metavar=word.upper(), help=left_out),
    )


def pattern(command: _F) -> _F:
    """Add the option that says which kept snapshots count, by their names."""
    return click.option(
        "--pattern",
        "snap_pattern",
        metavar="NAME",
        show_default=without("snap-pattern"),
        help="The names that count, as of `atomtx snap`.",
    )(command)


def _all(*parameters: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def decorate(command: _F) -> _F:
        for add in reversed(parameters):
            command = add(command)
        return command

    return decorate


def without(key: str) -> str:
    """Return the default of a job's key, as the help of its option shows it."""
    return default_text(keys(Job)[key]).strip('"')


def asked(names: Sequence[str], extra: Sequence[str], options: Mapping[str, Any]) -> Asked:
    """
    Return the job that a command line means, its own options over those of the configuration.

    Raises UserError where a name is both a job and a pool, or neither, where nothing is named,
    and for whatever the configuration has wrong.
    """
    found, name = _named(names, options)
    job = found.job(name) if found and name else Job(working_directory="")
    given = _given(options)
    if given.get("layout") == "namespace" and "root" not in given:
        given["root"] = ""
    if not name:
        if not (names or given.get("all") or given.get("read_live")):
            raise _nothing_named(options.get("config_path"))
        given["volumes"] = tuple(names)
    arguments = (*job.arguments, *_split("--options", options.get("options") or ""), *extra)
    job = replace(job, arguments=arguments, **given)
    _check_hooks(job)
    return Asked(job, name, found)


def _check_hooks(job: Job) -> None:
    if job.thaw and not job.quiesce:
        raise UserError("--thaw undoes --quiesce, which is not given")
    for hook in job.hooks:
        check_arguments((*hook.command, *hook.undo))


def known(names: Sequence[str], config_path: str | None, of: Asked) -> tuple[str, ...]:
    """Return names of jobs; UserError where the configuration, *of* that job's, lacks one."""
    if not names:
        return ()
    from .. import config

    there = of.config or config.load(config.find(config_path))
    for name in names:
        there.job(name)
    return tuple(names)


def check_meant(names: Sequence[str], there: Config) -> None:
    """
    Raise UserError for a name that is nearly that of a job of *there*, and no pool's.

    Any other may be a pool that is imported by the time when it is needed.
    """
    bare = (name for name in names if "/" not in name and name not in there.jobs)
    _check_meant([name for name in bare if near(name, tuple(there.jobs))], there)


def sources(config_path: str | None) -> dict[str, dict[str, str]]:
    """Return where a configuration says that credentials are: job's key -> variable -> source."""
    if config_path is None:
        return {}
    from .. import config

    jobs = config.load(config.find(config_path)).jobs
    return {job_key(name): dict(job.sources) for name, job in jobs.items()}


def notices(config_path: str | None, warn: Callable[[str], None]) -> dict[str, NotifySettings]:
    """
    Return who is told of each job's runs, by the job's key.

    A configuration that is wrong is warned of: it must not keep anybody from recovering.
    """
    from .. import config

    if not config.is_there(config_path):
        return {}
    try:
        there = config.load(config.find(config_path))
    except UserError as exc:
        if config_path is None:  # else it is refused where it is read next
            warn(f"nobody is told by it: {exc.message}")
        return {}
    return notices_of(there)


def patterns(config_path: str | None) -> tuple[Pattern, ...]:
    """Return how kept snapshots may be named: by the default, and as jobs have it."""
    from .. import config

    try:
        known = config.load(config.find(config_path)).jobs if config.is_there(config_path) else {}
    except UserError:  # it was warned of
        known = {}
    texts = (convention.PATTERN, *(job.snap_pattern for job in known.values()))
    return tuple(Pattern.parse(text) for text in dict.fromkeys(texts))


def notices_of(there: Config, *, but: str = "") -> dict[str, NotifySettings]:
    """Return who is told of each job's runs *but* one's, by the job's key."""
    return {job_key(name): job.notices for name, job in there.jobs.items() if name != but}


def _named(names: Sequence[str], options: Mapping[str, Any]) -> tuple[Config | None, str]:
    """Return the job that is named, "" for datasets; and the configuration, if it was read."""
    from .. import config  # its parser takes 15 ms that `--help` need not pay

    given, job = options.get("config_path"), options.get("job_name")
    if job and (names or options.get("no_job")):
        other = names[0] if names else "--no-job"
        raise UserError(f"--job {job} and {other} exclude each other", hint="one job a call")
    if job:
        return config.load(config.find(given)), job
    bare = [] if options.get("no_job") else [name for name in names if name and "/" not in name]
    if not bare and given and not options.get("saved_in"):
        raise UserError("--config is of no use without a job", hint="name one: --job NAME")
    if not bare or not config.is_there(given):
        return None, ""
    there = config.load(config.find(given))
    for name in bare:
        if name in there.jobs:
            _check_alone(name, names, there)
            return there, name
    _check_meant(bare, there)
    return there, ""


def _check_alone(name: str, names: Sequence[str], there: Config) -> None:
    if len(names) > 1:
        raise UserError(
            f"{name} is a job of {there.path}, and {len(names)} names were given",
            hint=f"one job a call: --job {name}; or --no-job, to take all of them for datasets",
        )
    if name in _pools():
        raise UserError(
            f"{name} is a job of {there.path} and a pool",
            hint=f"--job {name} is the job, --no-job {name} the pool",
        )


def _check_meant(bare: Sequence[str], there: Config) -> None:
    """Refuse a name that is no job's and no pool's: without a slash it can be of nothing else."""
    pools = _pools()
    for name in bare:
        if name in pools:
            continue
        meant = near(name, tuple(there.jobs))
        if not meant:
            Dataset.parse(name)  # which knows best what is wrong with one that cannot be a pool's
        raise UserError(
            f"{name} is neither a job of {there.path} nor a pool",
            hint=f'did you mean "{meant}"?' if meant else _jobs_or_pool(name, there),
        )


def _jobs_or_pool(name: str, there: Config) -> str:
    known = f"its jobs: {', '.join(there.jobs) or 'none'}"
    if process.which("zpool") is None:
        return known
    return f"{known}; a pool that is not imported: {command('zpool', 'import', name)}"


def _nothing_named(config_path: str | None) -> UserError:
    from .. import config

    try:
        known = config.load(config.find(config_path)).jobs if config.is_there(config_path) else {}
    except UserError:  # it is refused where a job is named
        known = {}
    jobs = f"a job ({', '.join(known)}) or " if known else ""
    return UserError("nothing was named", hint=f"name {jobs}volumes, or use --all")


def _pools() -> list[str]:
    if process.which("zpool") is None:
        return []
    return [pool.name for pool in Zfs().pools()]


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as a job's values."""
    found: dict[str, Any] = {}
    for key, each in keys(Job).items():
        value = options.get(each.name)
        if value in (None, ()):
            continue
        try:
            found[each.name] = _parsed(option(key), each, value)
        except ValueError as exc:
            raise UserError(f"{option(key)} {exc}", hint="see --help") from exc
    return found


def option(key: str) -> str:
    """Return the option that stands for a job's key on the command line."""
    return _OPTIONS.get(key, f"--{key}")


def _parsed(named: str, each: Field[Any], value: Any) -> Any:
    kind: Kind = each.metadata["kind"]
    if isinstance(kind, Words) and isinstance(value, str):
        value = _split(named, value)
        if not value:
            raise ValueError("is empty; give a command")
    elif value == "" or (isinstance(value, tuple) and "" in value):
        raise ValueError("is empty")
    if each.name == "root":  # relative ones are refused with the whole request
        return value
    return kind.parse(list(value) if isinstance(value, tuple) else value)


def _split(option: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as exc:
        raise UserError(f"{option} {text!r}: {exc}", hint="quote it as for a shell") from exc

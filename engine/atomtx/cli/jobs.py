"""Which job a command line means: one of the configuration, or one that is made of its options."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import process
from ..config_kinds import Kind, Words, default_text, keys, near
from ..config_schema import Job
from ..errors import UserError
from ..notices import NotifySettings
from ..plan import job_key
from ..redact import check_arguments
from ..volumes.zfs import Zfs

if TYPE_CHECKING:
    from ..config import Config

_F = TypeVar("_F", bound=Callable[..., object])


@dataclass(frozen=True)
class Asked:
    """What a `backup` is to do."""

    job: Job
    name: str = ""  # in the configuration; empty: an unnamed one

    @property
    def title(self) -> str:
        """What is said of a job that was not planned yet."""
        return self.name or " ".join(self.job.volumes) or "-a"

    @property
    def sources(self) -> dict[str, dict[str, str]]:
        """Return where the credentials of the job are, by its key."""
        return {job_key(self.name): dict(self.job.sources)} if self.name else {}


def config_option(what: str) -> Callable[[_F], _F]:
    """Add `--config`, as the parameter ``config_path``."""

    def decorate(command: _F) -> _F:
        return click.option("--config", "config_path", metavar="FILE", help=what)(command)

    return decorate


def without(key: str) -> str:
    """Return the default of a job's key, as the help of its option shows it."""
    return default_text(keys(Job)[key]).strip('"')


def asked(names: Sequence[str], extra: Sequence[str], options: Mapping[str, Any]) -> Asked:
    """
    Return the job that a command line means, its own options over those of the configuration.

    Raises UserError where a name is both a job and a pool, and for whatever the configuration
    has wrong.
    """
    found, name = _named(names, options)
    job = found.job(name) if found else Job(working_directory="")
    given = _given(options)
    if given.get("layout") == "namespace" and "root" not in given:
        given["root"] = ""
    if not found:
        given["volumes"] = tuple(names)
    arguments = (*job.arguments, *_split("--options", options.get("options") or ""), *extra)
    job = replace(job, arguments=arguments, **given)
    _check_hooks(job)
    return Asked(job, name)


def _check_hooks(job: Job) -> None:
    if job.thaw and not job.quiesce:
        raise UserError("--thaw undoes --quiesce, which is not given")
    for hook in job.hooks:
        check_arguments((*hook.command, *hook.undo))


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
    return {job_key(name): job.notices for name, job in there.jobs.items()}


def _named(names: Sequence[str], options: Mapping[str, Any]) -> tuple[Config | None, str]:
    """Return the job that is named, with its configuration; None for datasets."""
    from .. import config  # its parser takes 15 ms that `--help` need not pay

    given, job = options.get("config_path"), options.get("job_name")
    if job and (names or options.get("no_job")):
        other = names[0] if names else "--no-job"
        raise UserError(f"--job {job} and {other} exclude each other", hint="one job a call")
    if job:
        return config.load(config.find(given)), job
    bare = [] if options.get("no_job") else [name for name in names if name and "/" not in name]
    if not bare and given:
        raise UserError("--config is of no use without a job", hint="name one: --job NAME")
    if not bare or not config.is_there(given):
        return None, ""
    there = config.load(config.find(given))
    for name in bare:
        if name in there.jobs:
            _check_alone(name, names, there)
            return there, name
    _check_meant(bare, there)
    return None, ""


def _check_alone(name: str, names: Sequence[str], there: Config) -> None:
    if len(names) > 1:
        raise UserError(
            f"{name} is a job of {there.path}, and {len(names)} names were given",
            hint=f"one job a call: --job {name}; or --no-job, to take all of them for datasets",
        )
    if name in _pools():
        raise UserError(
            f"{name} is a job of {there.path} and a pool",
            hint=f"`atomtx backup --job {name}` is the job, `--no-job {name}` the pool",
        )


def _check_meant(bare: Sequence[str], there: Config) -> None:
    """Tell of a name that is nearly a job's; what is a pool is no mistake."""
    for name in bare:
        meant = near(name, tuple(there.jobs))
        if meant and name not in _pools():
            raise UserError(
                f"{name} is neither a job of {there.path} nor a pool",
                hint=f'did you mean "{meant}"?',
            )


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
            found[each.name] = _parsed(each, value)
        except ValueError as exc:
            raise UserError(f"--{key} {exc}", hint="see `atomtx backup --help`") from exc
    return found


def _parsed(each: Field[Any], value: Any) -> Any:
    if each.name == "root":  # relative ones are refused with the whole request
        return value
    kind: Kind = each.metadata["kind"]
    if isinstance(kind, Words) and isinstance(value, str):
        value = shlex.split(value)
        if not value:
            raise ValueError("is empty; give a command")
    return kind.parse(list(value) if isinstance(value, tuple) else value)


def _split(option: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as exc:
        raise UserError(f"{option} {text!r}: {exc}", hint="quote it as for a shell") from exc

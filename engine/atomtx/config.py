"""
The configuration file: found, trusted, read and checked; jobs by name.

Whatever is wrong is found at once, each error with its file and line.  Nothing is changed.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import credentials, tomllines, trust
from .config_kinds import Table, key_of, near, shown
from .config_schema import DEFAULT, NOT_IN_DEFAULTS, File, Job, merged, problems
from .errors import UserError
from .tomllines import Place

_WHERE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong, and where."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


class ConfigError(UserError):
    """A configuration that is refused, with all that is wrong."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        many = len(self.problems)
        head = [] if many == 1 else [f"{many} errors in the configuration; nothing was changed"]
        super().__init__(
            "\n".join([*head, *map(str, self.problems)]), hint="`atomtx config check` looks again"
        )


@dataclass(frozen=True)
class Config:
    """A whole file that is right."""

    path: str
    jobs: Mapping[str, Job]  # with the defaults
    said: Mapping[str, frozenset[str]]  # the keys of each job that stand in it
    lines: Mapping[Place, int] = field(repr=False)
    in_defaults: frozenset[str] = frozenset()

    def job(self, name: str) -> Job:
        """Return a job; UserError where there is none of that name."""
        if name in self.jobs:
            return self.jobs[name]
        meant = near(name, tuple(self.jobs))
        there = ", ".join(sorted(self.jobs)) or "none"
        raise UserError(
            f"{self.path} has no job {shown(name)}",
            hint=f'did you mean "{meant}"?' if meant else f"its jobs: {there}",
        )

    def origin(self, name: str, key: str) -> str:
        """Tell where the value of a job's key comes from: "line 7", "defaults, line 2"."""
        own, inherited = key in self.said[name], key in self.in_defaults
        mine = f"line {_line(self.lines, ('jobs', name, key))}" if own else ""
        theirs = f"defaults, line {_line(self.lines, ('defaults', key))}" if inherited else ""
        if own and inherited and key in ("environment", "credentials"):
            return f"{mine}; {theirs}"
        return mine or theirs or "default"

    def problem(self, name: str, key: str, what: str) -> Problem:
        """Return a problem with a job's key, at its line."""
        at = _place_of(self, name, (key,))
        return Problem(self.path, _line(self.lines, at), _said(at, what))


def find(given: str | None = None) -> str:
    """Return the file's path: the one that was given, $ATOMTX_CONFIG, or the system's."""
    return os.path.abspath(given or os.environ.get("ATOMTX_CONFIG") or DEFAULT)


def is_there(given: str | None = None) -> bool:
    """Tell whether there is a configuration to read; one that was named must be there."""
    return bool(given or os.environ.get("ATOMTX_CONFIG")) or os.path.lexists(find(given))


def load(path: str) -> Config:
    """
    Read and check a configuration file.

    Raises ConfigError with all that is wrong, UserError where it cannot be read or where
    somebody else than root could have written it.
    """
    if not os.path.lexists(path):
        raise UserError(
            f"there is no configuration {path}",
            hint="`atomtx config init` writes one; --config or ATOMTX_CONFIG names another",
        )
    return parse(trust.read(path, "the configuration"), path)


def parse(text: str, path: str) -> Config:
    """Do as :func:`load` with the text of a file."""
    try:
        data = tomllib.loads(text)
        lines = tomllines.lines(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError([_syntax(str(exc), text, path)]) from exc
    except (ValueError, RecursionError) as exc:  # tomllib lets pass what Python itself refuses
        what = (
            "it is nested too deep" if isinstance(exc, RecursionError) else "a number is too long"
        )
        raise ConfigError([Problem(path, 1, f"not TOML: {what}")]) from exc
    found: list[tuple[Place, str]] = []
    read = Table(File).read(data, (), lambda at, what: found.append((at, what)))
    config = _merged(read, data, path, lines)
    bad = {at[:n] for at, _ in found for n in range(len(at) + 1)}
    found += _misplaced(data)
    for name, job in config.jobs.items():
        for at, what in problems(job):
            if ("jobs", name, *at) not in bad:  # what was not understood is not missing as well
                found.append((_place_of(config, name, at), what))
    if found:
        unique = {Problem(path, _line(lines, at), _said(at, what)) for at, what in found}
        raise ConfigError(sorted(unique))
    return config


def _merged(read: File, data: Mapping[str, Any], path: str, lines: Mapping[Place, int]) -> Config:
    said = {name: frozenset(data["jobs"][name]) for name in read.jobs}
    jobs = {name: merged(read.defaults, job, said[name]) for name, job in read.jobs.items()}
    defaults = data.get("defaults")
    inherited = frozenset(defaults) if isinstance(defaults, dict) else frozenset[str]()
    return Config(path, jobs, said, lines, inherited)


def _misplaced(data: Mapping[str, Any]) -> list[tuple[Place, str]]:
    defaults = data.get("defaults")
    there = defaults if isinstance(defaults, dict) else {}
    return [
        (("defaults", key), f"{key} belongs to a job") for key in NOT_IN_DEFAULTS if key in there
    ]


def _place_of(config: Config, name: str, at: Place) -> Place:
    """Return where a key of a merged job was written."""
    own: Place = ("jobs", name, *at)
    inherited: Place = ("defaults", *at)
    return inherited if own not in config.lines and inherited in config.lines else own


def _line(lines: Mapping[Place, int], at: Place) -> int:
    while at not in lines:
        at = at[:-1]
    return lines[at]


def _said(at: Place, what: str) -> str:
    """Put the name of the job or section before an error."""
    if len(at) > 1 and at[0] == "jobs":
        head = f"job {at[1]}: "
    else:
        head = "defaults: " if at[:1] == ("defaults",) else ""
    outer = at[:-1]
    depth = 2 if at[:1] == ("jobs",) else 1
    if what.startswith("unknown key") and len(outer) > depth:
        head += f"{key_of(outer)}: "
    return head + what


def _syntax(message: str, text: str, path: str) -> Problem:
    match = _WHERE.search(message)
    last = max(1, len(text.rstrip("\n").split("\n")))
    line = int(match[1]) if match and match[1] else last
    return Problem(path, line, f"not TOML: {_WHERE.sub('', message)}")


def credential_problems(config: Config, env: Mapping[str, str]) -> list[Problem]:
    """
    Return what is wrong with the files of credentials.

    systemd's can be looked at only inside of a unit, and others by root alone.
    """
    if os.geteuid() != 0:
        return []
    found = set()
    for name, job in config.jobs.items():
        for variable, source in job.sources:
            if source.startswith("credential:") and not env.get("CREDENTIALS_DIRECTORY"):
                continue
            trouble = credentials.trouble(variable, source, env)
            if trouble:
                at = _place_of(config, name, ("credentials", variable))
                found.add(Problem(config.path, _line(config.lines, at), _said(at, trouble)))
    return sorted(found)

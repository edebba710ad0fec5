"""The configuration as text: what `config show` prints and what `config init` writes.  Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import Field
from typing import Any

from .config import Config
from .config_kinds import default, keys, toml, toml_key
from .config_schema import NOT_IN_DEFAULTS, Job

_WIDTH = 96


def job_lines(config: Config, name: str) -> Iterator[str]:
    """Return a job as TOML with every effective value, and where each comes from."""
    yield f"[jobs.{toml_key(name)}]"
    for key, each in keys(Job).items():
        text = _pair(key, each, config.jobs[name])
        yield f"{text:<40}  # {config.origin(name, key)}"


def job_facts(config: Config, name: str) -> dict[str, Any]:
    """Return the same for programs: key -> its value and origin."""
    return {
        key: {"value": _value(each, config.jobs[name]), "origin": config.origin(name, key)}
        for key, each in keys(Job).items()
    }


def _value(each: Field[Any], job: Job) -> Any:
    return each.metadata["kind"].written(getattr(job, each.name))


def _pair(key: str, each: Field[Any], job: Job) -> str:
    if each.metadata["unset"] and not getattr(job, each.name):
        return f"# {key}: {each.metadata['unset']}"
    return f"{key} = {toml(_value(each, job))}"


# -- a new file --------------------------------------------------------------------------------


def new_file(jobs: Sequence[str]) -> str:
    """Return a file with these jobs that is right, and every other key as a comment."""
    return "\n".join([*_HEAD, *_defaults(), *(line for name in jobs for line in _new_job(name))])


_HEAD = (
    "# The configuration of atomtx.  `atomtx config check` tells what is wrong with it,",
    "# `atomtx config show` what holds for each job.  Only root may be able to write it.",
    "",
)


def _defaults() -> Iterator[str]:
    yield "# What holds for every job that does not say otherwise.  Each key stands here as a"
    yield "# comment, with what holds without it, or with an example."
    yield "[defaults]"
    for key, each in keys(Job).items():
        if key in NOT_IN_DEFAULTS:
            continue
        unset = each.metadata["unset"]
        yield from _comment(each.metadata["what"] + (f"  Without it: {unset}." if unset else ""))
        value = each.metadata["example"] if unset else each.metadata["kind"].written(default(each))
        yield f"#{key} = {toml(value)}"
    yield ""


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _new_job(name: str) -> Iterator[str]:
    yield f"# `atomtx backup {name}`; try `atomtx backup --dry-run {name}` first."
    yield f"[jobs.{toml_key(name)}]"
    yield "# Datasets by name or mountpoint; subvolumes by path; logical volumes as VG/LV."
    yield f'volumes = ["tank/{name}"]'
    yield "recursive = true"
    yield 'client = "restic"'
    yield 'environment = { RESTIC_REPOSITORY = "/srv/restic" }'
    yield "# Only root may be able to read the file."
    yield f"[jobs.{toml_key(name)}.credentials]"
    yield f'#RESTIC_PASSWORD = {{ file = "/etc/atomtx/{name}.password" }}'
    yield "# or, in a systemd unit with LoadCredential= or LoadCredentialEncrypted=:"
    yield f'#RESTIC_PASSWORD = {{ credential = "{name}" }}'
    yield ""

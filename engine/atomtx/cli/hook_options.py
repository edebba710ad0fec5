"""The options of `atomtx backup` that name the user's hooks."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ..errors import UserError
from ..intents import (
    AFTER_FAILURE,
    AFTER_SUCCESS,
    AROUND_RUN,
    AROUND_SNAPSHOT,
    FINALLY,
    RunHook,
)
from ..redact import check_arguments

_F = TypeVar("_F", bound=Callable[..., object])
_OPTIONS = (
    (("-p", "--pre-hook"), "Run this first; if it fails, there is no backup."),
    (("-q", "--post-hook"), "Run this last, whatever happens: it undoes the --pre-hook."),
    (("--quiesce",), "Run this just before the snapshots."),
    (("--thaw",), "Run this just after the snapshots, whatever happens: it undoes --quiesce."),
    (("--after-success",), "Run this after a backup that completed."),
    (("--after-failure",), "Run this after a run that did not."),
)


def add(command: _F) -> _F:
    """Add the options, each a command's words as a shell would split them; no shell runs."""
    limit = click.option(
        "--hook-limit",
        default="5m",
        metavar="TIME",
        show_default=True,
        help="A hook that takes longer is ended and has failed. 0: no limit.",
    )
    decorated = limit(command)
    for names, text in reversed(_OPTIONS):
        decorated = click.option(*names, metavar="WORDS", help=text)(decorated)
    return decorated


def hooks(options: Mapping[str, Any], limit_s: int) -> tuple[RunHook, ...]:
    """Return the hooks that were asked for; UserError for one that cannot be."""
    words = {
        names[-1].removeprefix("--").replace("-", "_"): _words(names[-1], options)
        for names, _ in _OPTIONS
    }
    if words["thaw"] and not words["quiesce"]:
        raise UserError("--thaw undoes --quiesce, which is not given")
    found = []
    if words["pre_hook"]:
        found.append(RunHook(AROUND_RUN, words["pre_hook"], words["post_hook"], limit_s))
    elif words["post_hook"]:
        found.append(RunHook(FINALLY, words["post_hook"], (), limit_s))
    if words["quiesce"]:
        found.append(RunHook(AROUND_SNAPSHOT, words["quiesce"], words["thaw"], limit_s))
    for when in (AFTER_SUCCESS, AFTER_FAILURE):
        argv = words[when.replace("-", "_")]
        if argv:
            found.append(RunHook(when, argv, (), limit_s))
    return tuple(found)


def _words(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    text = options[name.removeprefix("--").replace("-", "_")]
    words = split(name, text)
    if text is not None and not words:
        raise UserError(f"{name} is empty", hint="give a command")
    check_arguments(words)
    return words


def split(name: str, text: str | None) -> tuple[str, ...]:
    """Return the words of an option's text as a shell splits them; none for none."""
    try:
        return tuple(shlex.split(text or ""))
    except ValueError as exc:
        raise UserError(f"{name} {text!r}: {exc}", hint="quote it as for a shell") from exc

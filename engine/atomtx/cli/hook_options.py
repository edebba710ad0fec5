"""The options of `atomtx backup` that name the user's hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from . import jobs

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
        metavar="TIME",
        show_default=jobs.without("hook-limit"),
        help="A hook that takes longer is ended and has failed. 0: no limit.",
    )
    decorated = limit(command)
    for names, text in reversed(_OPTIONS):
        decorated = click.option(*names, metavar="WORDS", help=text)(decorated)
    return decorated

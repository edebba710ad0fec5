"""Which hooks the options of `atomtx backup` ask for."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from atomtx.cli import hook_options, jobs
from atomtx.errors import UserError
from atomtx.intents import (
    AFTER_FAILURE,
    AFTER_SUCCESS,
    AROUND_RUN,
    AROUND_SNAPSHOT,
    FINALLY,
    RunHook,
)


def parsed(*words: str) -> tuple[RunHook, ...]:
    found: list[tuple[RunHook, ...]] = []

    @click.command()
    @hook_options.add
    def command(**options: Any) -> None:
        found.append(jobs.asked(("tank/a",), (), options).job.hooks)

    result = CliRunner().invoke(command, words)
    if result.exception:
        raise result.exception
    return found[0]


@pytest.mark.parametrize(
    ("words", "hooks"),
    [
        ((), ()),
        (("-p", "stop it", "-q", "start"), (RunHook(AROUND_RUN, ("stop", "it"), ("start",), 300),)),
        (("-p", "'a b' c"), (RunHook(AROUND_RUN, ("a b", "c"), (), 300),)),
        (("-q", "umount /x"), (RunHook(FINALLY, ("umount", "/x"), (), 300),)),
        (
            ("--quiesce", "q", "--thaw", "t"),
            (RunHook(AROUND_SNAPSHOT, ("q",), ("t",), 300),),
        ),
        (
            ("--after-success", "s", "--after-failure", "f"),
            (RunHook(AFTER_SUCCESS, ("s",), (), 300), RunHook(AFTER_FAILURE, ("f",), (), 300)),
        ),
    ],
)
def test_options(words: tuple[str, ...], hooks: tuple[RunHook, ...]) -> None:
    """A post-hook undoes its pre-hook; alone it runs at the end. No shell is asked."""
    assert parsed(*words) == hooks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--thaw", "t"), "--thaw undoes --quiesce, which is not given"),
        (("-p", "'"), "No closing quotation"),
        (("-q", "  "), "--post-hook is empty; give a command"),
        (("-p", "login --password=x"), "carries a secret"),
        (("-q", "-r"), '--post-hook must begin with a program, not with the option "-r"'),
    ],
)
def test_refused(words: tuple[str, ...], said: str) -> None:
    """What cannot be a hook is refused before anything is done; promise 11 for its arguments."""
    with pytest.raises(UserError, match=said):
        parsed(*words)

"""What a command knows where it is a step of `atomtx run`: click's `obj` of its context."""

from __future__ import annotations

from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Within:
    """The step that a command is carried out for."""

    parent: str  # "RUN/N", as the plans of its runs have it
    tells: bool  # of how it ends: it is of another job than the run of steps, which tells else

    @property
    def run(self) -> str:
        """The run of steps."""
        return self.parent.partition("/")[0]


def within() -> Within | None:
    """Return which step the command is that is carried out now; None where it is none."""
    context = click.get_current_context(silent=True)
    return context.find_object(Within) if context else None

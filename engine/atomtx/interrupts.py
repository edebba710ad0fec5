"""SIGINT and SIGTERM as a request to compensate, looked at between effects, never inside one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from . import locks
from .errors import Interrupted

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """
    Notes the first signal; a second one changes nothing: what is left is in the journal.

    SIGHUP is ignored: the terminal may close, and restic sends it to test a recorded pid.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._told = False
        self._at_once = False
        self._outer: Interrupts | None = None  # of the command that has made ours a step

    def install(self) -> Interrupts:
        """
        Take the signals over for the rest of the process.

        Whoever had taken them over before is told of each as well, and tells what came already.
        """
        for number in _NUMBERS:
            outer = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(outer, Interrupts) and outer is not self:
                self._outer = outer  # first: a signal may come as soon as it is ours
            signal.signal(number, self._note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self._outer and self._outer.noted is not None:
            self._take(self._outer.noted)
        return self

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let a block take the signals over, and have them back after it."""
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._take(number)
        if self._at_once:
            self.check()

    def _take(self, number: int) -> None:
        if self._outer:  # which has lent them, and so raises nothing
            self._outer._take(number)
        if self.noted is None:
            self.noted = number

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """
        Let the first signal raise Interrupted at once, inside a block that makes no effect.

        Not where the block has taken the signals over: it knows when it may be interrupted.
        """
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def check(self) -> None:
        """Raise Interrupted, once, if a signal came."""
        if self.noted is not None and not self._told:
            self._told = True
            raise Interrupted(self.noted)

    def stop(self) -> None:
        """Raise Interrupted if a signal ever came, told before or not: nothing new is begun."""
        if self.noted is not None:
            raise Interrupted(self.noted)

    def sleep(self, seconds: float) -> None:
        """Wait, but not past a signal that was not told yet."""
        locks.wait_until(lambda: self.noted is not None and not self._told, seconds, step_s=0.1)
        self.check()

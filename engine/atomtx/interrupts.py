"""SIGINT and SIGTERM as a request to compensate, looked at between effects, never inside one."""

from __future__ import annotations

import signal
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

    def install(self) -> Interrupts:
        """Take the signals over for the rest of the process."""
        for number in _NUMBERS:
            signal.signal(number, self._note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.noted is None:
            self.noted = number

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

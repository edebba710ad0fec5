"""
Every error of atomtx, and the exit status of each.

    AtomtxError                 1   the system could not do what was asked
      UserError                 2   the command line, or what it names, is wrong
        CredentialError         2   a credential of the job cannot be had
      BusyError                 5   another run of this job is at work
      WaitingError              6   an interrupted run cannot be settled yet
      EffectError               1   a change to the machine failed
      ClientError               1   the backup client failed, or cannot be used
      JournalError              1   the journal cannot be read or written
        JournalFullError        1   no space left for a row
        JournalDamagedError     1   the journal's file is damaged
        JournalOlderError       1   this machine has seen a newer state of the journal
        JournalNewerError       2   a newer atomtx wrote the journal
        StaleRunError           1   somebody else moved the run: this process is fenced off
      Interrupted         130/143   SIGINT or SIGTERM; everything was compensated

A bug has no class here: it is an assertion or a plain exception, and shows its traceback.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from enum import IntEnum


class ExitStatus(IntEnum):
    """What ``atomtx`` exits with; ``docs/design.md`` and each ``--help`` explain them."""

    COMPLETED = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    PARKED = 4
    BUSY = 5
    WAITING = 6
    STEP_AFTER_FAILED = 7
    SIGINT = 128 + signal.SIGINT
    SIGTERM = 128 + signal.SIGTERM


# From the worst to the best.  An interruption tells more than what it interrupted.
_SEVERITY = (
    ExitStatus.SIGTERM,
    ExitStatus.SIGINT,
    ExitStatus.USAGE,
    ExitStatus.FAILED,
    ExitStatus.PARTIAL,
    ExitStatus.STEP_AFTER_FAILED,
    ExitStatus.WAITING,
    ExitStatus.BUSY,
    ExitStatus.PARKED,
    ExitStatus.COMPLETED,
)


def worst(statuses: Iterable[ExitStatus]) -> ExitStatus:
    """Return the status that counts when several things happened in one command."""
    return min(statuses, key=_SEVERITY.index, default=ExitStatus.COMPLETED)


# What was asked for is done, or as much as could be, whatever is left over or failed after it.
DONE = (
    ExitStatus.COMPLETED,
    ExitStatus.PARTIAL,
    ExitStatus.PARKED,
    ExitStatus.STEP_AFTER_FAILED,
)


class AtomtxError(Exception):
    """Base of all: *message* says what failed and on what, *hint* what to do next."""

    exit_status = ExitStatus.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UserError(AtomtxError):
    exit_status = ExitStatus.USAGE


class CredentialError(UserError):
    pass


class BusyError(AtomtxError):
    exit_status = ExitStatus.BUSY


class WaitingError(AtomtxError):
    exit_status = ExitStatus.WAITING


class EffectError(AtomtxError):
    pass


class ClientError(AtomtxError):
    pass


class JournalError(AtomtxError):
    pass


class JournalFullError(JournalError):
    pass


class JournalDamagedError(JournalError):
    """The file cannot be trusted: *cause* is what was found; an I/O error is none."""

    def __init__(self, path: object, cause: object, *, hint: str | None = None) -> None:
        super().__init__(
            f"the journal {path} is damaged: {cause}",
            hint=hint
            or "nothing was changed; after `atomtx journal set-aside`, `atomtx recover --scan` "
            "lists what its runs left",
        )
        self.cause = str(cause)


class JournalOlderError(JournalError):
    pass


class JournalNewerError(JournalError):
    exit_status = ExitStatus.USAGE


class StaleRunError(JournalError):
    pass


class Interrupted(AtomtxError):
    """A signal asked us to stop; raised only between effects, never inside one."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_status = ExitStatus(128 + signum)

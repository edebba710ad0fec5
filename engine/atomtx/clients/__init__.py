"""
Backup clients: the one protocol, and the list of those that atomtx knows.

A client module is pure but for `inspect`, which asks the installed program and its repository,
and `after_loss`, which mends what our own dead run left in the repository.  A module is imported
only when its client is used.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib import import_module
from typing import Protocol, runtime_checkable

from ..errors import UserError
from ..redact import Redactor
from ..states import Outcome

KNOWN = {
    "restic": "atomtx.clients.restic:Restic",
    "kopia": "atomtx.clients.kopia:Kopia",
    "borg": "atomtx.clients.borg:Borg",
    "xfsdump": "atomtx.clients.xfsdump:Xfsdump",
    "command": "atomtx.clients.command:Command",
}


@dataclass(frozen=True)
class Settings:
    """How the user wants the client to be run; the same at the plan and at a resume."""

    command: tuple[str, ...]  # the wrapper's words; empty for the client's own program
    extra: tuple[str, ...]  # everything that the user wrote after `--`
    env: Mapping[str, str]  # the client's whole environment
    cwd: str  # the user's working directory
    chosen: frozenset[str] = frozenset()  # variables that the job sets, whatever they are called
    credentials: tuple[tuple[str, str], ...] = ()  # variables that it reads, and from where
    below: str = ""  # for a restore: the root of the tree that was saved, not itself but its parts

    def redact(self, text: str) -> str:
        """Return *text* without the secrets of the environment."""
        return Redactor(self.env, [name for name, _ in self.credentials]).redact(text)


@dataclass(frozen=True)
class Facts:
    """What `inspect` found."""

    version: str  # such as "0.18.0"; empty for a command that nobody knows
    repository: str | None  # the repository's own id; None where there is none to ask
    notes: tuple[str, ...] = ()  # what the user should know before, not find out after


@dataclass(frozen=True)
class Moment:
    """What is to be backed up, and as of when."""

    targets: tuple[str, ...]  # absolute live paths, none below another but for a Dumper
    root: str  # where the tree is assembled; empty: at the live paths themselves
    at: datetime  # aware; the snapshots' creation, whole seconds
    excludes: tuple[str, ...] = ()  # absolute live paths inside the targets to leave out
    whole: bool = False  # of a tree, the root itself is backed up
    parent: str | None = None  # a backup_id to compare with; None: let the client find it
    attempt: int = 1  # which one of the run: an attempt that was lost may have been stored
    run: str = ""
    job: str = ""  # as people call it
    is_kept: bool = False  # of snapshots that stay: another run may have stored it

    @property
    def sources(self) -> tuple[str, ...]:
        """The paths under which the repository has what is backed up."""
        return (self.root,) if self.whole else self.targets


@dataclass(frozen=True)
class Launch:
    """The commands to run, in order, each to its end."""

    commands: tuple[tuple[str, ...], ...]
    cwd: str  # where to run them; entered after the mounts are made
    env: Mapping[str, str]  # set in addition to Settings.env


@dataclass(frozen=True)
class Progress:
    """Where the client is; None for what it does not tell."""

    percent: float | None = None  # 0 to 100
    bytes_done: int | None = None
    bytes_total: int | None = None
    files_done: int | None = None
    files_total: int | None = None
    eta_s: float | None = None


@dataclass(frozen=True)
class Backup:
    """One backup that the repository now holds, or should."""

    paths: tuple[str, ...]
    outcome: Outcome  # COMPLETED, PARTIAL or FAILED
    backup_id: str | None = None
    reason: str | None = None  # why it is not completed
    bytes_added: int | None = None
    bytes_processed: int | None = None
    files_processed: int | None = None


@dataclass(frozen=True)
class End:
    """How the client's work ended as a whole."""

    outcome: Outcome  # COMPLETED, PARTIAL or FAILED
    reason: str | None = None
    retriable: bool = False  # network or repository trouble: the moment is worth keeping
    backups: tuple[Backup, ...] = field(default=())
    overdue: bool = False  # stopped at its time limit: whatever else stopped it came after


def failed(end: End, reason: str) -> End:
    """Return *end* as a failure for another reason than the client's own; not to be repeated."""
    backups = tuple(replace(b, outcome=Outcome.FAILED, reason=reason) for b in end.backups)
    return End(Outcome.FAILED, reason, retriable=False, backups=backups)


class Reader(Protocol):
    """Reads what the client prints, line by line; lives in the runner."""

    progress: Progress

    def stdout(self, line: str) -> None: ...

    def stderr(self, line: str) -> None: ...

    def end_command(self, n: int, status: int) -> None:
        """Note the end of command *n*: its exit status, or minus the signal that ended it."""
        ...

    def end(self) -> End:
        """Judge the whole; an exit status without a documented meaning is a failure."""
        ...


class Client(Protocol):
    """A backup program."""

    name: str
    stop_signal: signal.Signals  # the one after which it ends in order

    def inspect(self, settings: Settings) -> Facts:
        """
        Ask the program for its version and the repository for its id, changing nothing.

        Raises UserError with one clear line: not installed, too old, no repository named, a
        password missing or wrong, the repository absent or out of reach.
        """
        ...

    def check(
        self,
        settings: Settings,
        targets: tuple[str, ...],
        excludes: tuple[str, ...],
        root: str = "",
    ) -> None:
        """
        Raise UserError where it could not leave *excludes* out of a backup of *targets*.

        Where these are below a *root* of the run's, nothing is mounted there yet: what they are
        is to be seen at their live paths.
        """
        ...

    def live_paths(self, settings: Settings) -> tuple[str, ...]:
        """
        Return the absolute paths that must be the live ones while it runs.

        The cache, a repository in the file system, sockets, the folder for temporary files:
        what the client writes, or what must not be a frozen copy.
        """
        ...

    def launch(self, settings: Settings, facts: Facts, moment: Moment) -> Launch:
        """Return the commands that back *moment* up.  Pure; no secret in an argument."""
        ...

    def reader(self, moment: Moment) -> Reader: ...

    def policy(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Return rules of retention, one a word; UserError for what is none of this client's."""
        ...

    def stored_paths(self, moment: Moment) -> tuple[str, ...]:
        """Return the paths under which the repository has a backup of *moment*."""
        ...

    def forgetting(
        self, settings: Settings, facts: Facts, paths: tuple[str, ...], policy: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        """
        Return the commands that forget backups of this host and of exactly *paths* by *policy*.

        May ask the repository first.  Raises ClientError where it does not answer.
        """
        ...

    def after_loss(self, settings: Settings, facts: Facts) -> tuple[str, ...]:
        """
        Mend the repository after our own run's client was killed; return what was done, in words.

        Called before the client runs again on the same moment, and only when no process of that
        run lives.  Never touches what another host or a living process left.
        """
        ...

    def restore_command(
        self, settings: Settings, facts: Facts, backup: Backup, to: str
    ) -> tuple[str, ...]:
        """Return the command that restores *backup* below the directory *to*."""
        ...


@runtime_checkable
class Dumper(Protocol):
    """
    What a client has besides that saves whole file systems into files, one dump a volume.

    Its targets are the mountpoints of all volumes of a set, also of one below another.
    """

    def remove_parts(self, settings: Settings, repository: str | None, run: str) -> tuple[str, ...]:
        """
        Remove what dead attempts of *run* left half made; return what was done, in words.

        Idempotent.  Raises an AtomtxError where the destination *repository* is not there: then
        it is not known whether anything is left.
        """
        ...

    def restore_commands(
        self, settings: Settings, backup: Backup, to: str
    ) -> tuple[tuple[str, ...], ...]:
        """Return all commands of a restore, in order; AtomtxError where a dump is missing."""
        ...

    def files(self, settings: Settings, backup: Backup) -> tuple[str, ...]:
        """Return the files that a restore reads, in order, each with its hash, in words."""
        ...

    def damage(self, settings: Settings, repository: str | None, backup: Backup) -> tuple[str, ...]:
        """Read all these files; return what is wrong with them, in words."""
        ...


@runtime_checkable
class Cacher(Protocol):
    """What a client has besides that may read from a cache what the repository has lost."""

    def uncached(self, settings: Settings, folder: str) -> tuple[str, ...]:
        """
        Return the user's options, changed so that the cache is a new one below *folder*.

        May write into *folder*, also what is secret in the client's own configuration.  Raises
        OSError where that cannot be read or written.
        """
        ...


@runtime_checkable
class Housed(Protocol):
    """What a client has besides that makes folders of its own, but not when it is only asked."""

    def folders(self, settings: Settings) -> tuple[str, ...]:
        """Return those of its live paths that it makes where they are absent."""
        ...


@runtime_checkable
class Checker(Protocol):
    """What a client has besides whose settings alone tell that no backup can be made."""

    def lacks(self, settings: Settings) -> tuple[str, ...]:
        """Return what is said nowhere, and the variable to say it with; values are not read."""
        ...


def load(name: str) -> Client:
    """Import a client by its name."""
    if name not in KNOWN:
        raise UserError(f"unknown client {name!r}", hint=f"known: {', '.join(KNOWN)}")
    module, _, attribute = KNOWN[name].partition(":")
    client: Client = getattr(import_module(module), attribute)()
    return client

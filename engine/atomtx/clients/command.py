"""Any other program: the paths are added to its words, and its exit status is all it tells."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

from ..errors import UserError
from ..redact import check_arguments
from ..states import Outcome
from . import Backup, End, Facts, Launch, Moment, Progress, Settings
from .program import absolute, ended, find, home_folder, local_repository, program

_FOLDERS = (
    "RESTIC_CACHE_DIR",
    "KOPIA_CACHE_DIRECTORY",
    "KOPIA_LOG_DIR",
    "BORG_BASE_DIR",
    "BORG_CACHE_DIR",
    "BORG_CONFIG_DIR",
    "BORG_KEYS_DIR",
    "BORG_SECURITY_DIR",
    "TMPDIR",
)
_REPOSITORIES = ("RESTIC_REPOSITORY", "BORG_REPO")
_KEPT_LINES = 3


class Command:
    """Runs the user's own words with the paths behind them."""

    name = "command"
    stop_signal = signal.SIGTERM

    def inspect(self, settings: Settings) -> Facts:
        """Look only whether the program is there: nothing is known about its repository."""
        argv = self._argv(settings)
        find(argv, settings)
        return Facts(
            version="",
            repository=None,
            notes=(
                f"{argv[0]} tells its result by its exit status alone: 0 counts as a whole backup",
                f"paths that have to stay live are not hidden from {argv[0]}: exclude them there",
            ),
        )

    def _argv(self, settings: Settings) -> tuple[str, ...]:
        if not settings.command:
            raise UserError("the client `command` needs a command", hint="name it with --command")
        check_arguments((*settings.command, *settings.extra))
        return (*program(settings, settings.command[0]), *settings.extra)

    def check(
        self,
        settings: Settings,
        targets: tuple[str, ...],
        excludes: tuple[str, ...],
        root: str = "",
    ) -> None:
        """Do nothing: what a command leaves out is between it and the user."""

    def live_paths(self, settings: Settings) -> tuple[str, ...]:
        """Return what variables of the known clients name, and the user's cache."""
        return absolute(self._live_paths(settings), settings.cwd)

    def _live_paths(self, settings: Settings) -> Iterator[str]:
        env = settings.env
        yield from (env[name] for name in _FOLDERS if env.get(name))
        for name in _REPOSITORIES:
            path = local_repository(env.get(name, ""))
            if path is not None:
                yield path
        if "/" in env.get("KOPIA_CONFIG_PATH", ""):
            yield os.path.dirname(env["KOPIA_CONFIG_PATH"])
        yield from home_folder(env, "XDG_CACHE_HOME", ".cache")

    def launch(self, settings: Settings, facts: Facts, moment: Moment) -> Launch:
        """Return the one command, with the absolute paths where the frozen files are."""
        root = moment.root.rstrip("/")
        below = tuple(root + target for target in moment.targets)
        targets = (moment.root,) if moment.whole else below
        return Launch(((*self._argv(settings), *targets),), settings.cwd, {})

    def reader(self, moment: Moment) -> CommandReader:
        return CommandReader(moment)

    def policy(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse: what such a program keeps is not known."""
        raise UserError(
            "a command of your own cannot be told what to keep",
            hint="name the client that it wraps (--client restic), or use --after-success",
        )

    def stored_paths(self, moment: Moment) -> tuple[str, ...]:
        """Return what it was given."""
        return moment.sources

    def forgetting(
        self, settings: Settings, facts: Facts, paths: tuple[str, ...], policy: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        """Return nothing: there is no policy."""
        return ()

    def after_loss(self, settings: Settings, facts: Facts) -> tuple[str, ...]:
        """Do nothing: what such a program leaves behind is not known."""
        return ()

    def restore_command(
        self, settings: Settings, facts: Facts, backup: Backup, to: str
    ) -> tuple[str, ...]:
        """Return nothing: how such a program restores is not known."""
        return ()


class CommandReader:
    """Keeps the last lines of an unknown program for the reason of its failure."""

    def __init__(self, moment: Moment) -> None:
        self.progress = Progress()
        self._targets = moment.sources
        self._lines: list[str] = []
        self._status: int | None = None

    def stdout(self, line: str) -> None:
        pass

    def stderr(self, line: str) -> None:
        text = line.rpartition("\r")[2].strip()
        if text:
            self._lines = [*self._lines, text][-_KEPT_LINES:]

    def end_command(self, n: int, status: int) -> None:
        self._status = status

    def end(self) -> End:
        reason = self._failure()
        outcome = Outcome.COMPLETED if reason is None else Outcome.FAILED
        return End(outcome, reason, backups=(Backup(self._targets, outcome, reason=reason),))

    def _failure(self) -> str | None:
        if self._status == 0:
            return None
        status = "its end was not seen" if self._status is None else ended(self._status)
        return f"{self._lines[-1]} ({status})" if self._lines else status

"""
Give notice of what `backup` and `recover` did.

What is known of a run is taken down when it has ended, and told when the journal is closed and no
lock is held: `Notifier.delivering` is around all of the command's work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import history, journalfile, notices, outbox
from ..errors import AtomtxError, BusyError, EffectError, ExitStatus, Interrupted, UserError
from ..notices import Facts, NotifySettings
from ..records import Run, leaves_a_hook
from ..redact import Redactor
from ..statedir import RunFolder
from ..states import Outcome, Verb
from ..stepping import is_backup
from .show import read_log
from .within import within


class Notifier:
    """Notes what is to be told, and tells it at the end."""

    def __init__(
        self,
        settings: NotifySettings,
        warn: Callable[[str], None],
        state: Path,
        by_job: Mapping[str, NotifySettings] | None = None,
        verb: Verb = Verb.BACKUP,
        found: NotifySettings | None = None,
        is_of_one: bool = False,
    ) -> None:
        self._verb = verb
        self.job = ""  # what to call it until there is a run
        self.is_offline = False  # there may be no network yet
        self._settings = settings
        self._by_job = by_job or {}  # by the job's key
        self._found = settings if found is None else found  # for what others left unfinished
        self._is_of_one = is_of_one
        self._warn = warn
        self._state = state
        self._run: str | None = None
        self._facts: list[tuple[NotifySettings, Facts]] = []

    @classmethod
    def of_environment(
        cls,
        warn: Callable[[str], None],
        state: Path,
        own: NotifySettings | None = None,
        by_job: Mapping[str, NotifySettings] | None = None,
        verb: Verb = Verb.BACKUP,
        pings: bool = False,
    ) -> Notifier:
        """
        Return one with the settings of the environment; what is wrong with them is warned of.

        Those of a job, its *own* or *by_job*, count before them.  Of a command with its *own* the
        others are told of their jobs' runs alone.  Pings are of backups alone, and of runs with
        such a step: *pings*.  A step of a run tells nobody how it ends: the run does.
        """
        settings, problems = notices.settings_of(os.environ)
        is_silent = (step := within()) is not None and not step.tells
        for problem in () if is_silent else problems:
            warn(problem)
        jobs = {key: notices.combined(settings, of_job) for key, of_job in (by_job or {}).items()}
        whole = notices.combined(settings, own or NotifySettings())
        if not pings and verb is not Verb.BACKUP:
            whole = replace(whole, ping_url="", ping_url_file="")
        if is_silent:
            return cls(NotifySettings(), warn, state, verb=verb, found=whole)
        return cls(whole, warn, state, jobs, verb, is_of_one=own is not None)

    # -- what happened -------------------------------------------------------------------------

    def started(self, run: str) -> None:
        """Tell that a run is about to begin; before it holds a lock."""
        self._run = run
        text = f"atomtx: {self.job} on {_host()}: run {run} begins\n"
        if self._settings.has_ping:
            self._tell(lambda notifiers: notifiers.start(self._settings, text))

    def ended(self, run: Run, status: ExitStatus) -> None:
        """Note how a run of this command ended."""
        if not _is_kept_by_service(run, status):
            self._note(run.of_job, lambda: self._facts_of(run, status))

    def interrupted(self, run: Run, status: ExitStatus, *, pings: bool = True) -> None:
        """Note a run that was found unfinished, and what became of it."""
        if _is_kept_by_service(run, status):
            return
        told = self._by_job.get(run.of_job, self._found)
        facts = partial(self._facts_of, run, status, found_unfinished=True, pings=pings)
        self._note_to([told], facts)

    def still_parked(self, run: Run, status: ExitStatus) -> None:
        """Note that a parked cleanup could not be done now either."""
        self._note(run.of_job, lambda: self._facts_of(run, status, pings=False))

    def without_run(self, outcome: Outcome, status: ExitStatus, reason: str) -> None:
        """Note what this command came to where no run was to be made, or none of a part."""
        facts = partial(
            Facts,
            host=_host(),
            job=self.job,
            at=datetime.now(UTC),
            verb=self._verb,
            exit_status=status,
            outcome=outcome,
            reason=reason,
            is_last_known=False,
        )
        self._note("", facts)

    def unsettled(self, run: Run, exc: AtomtxError) -> None:
        """Note a run that was found unfinished and could not be settled."""
        self._note(run.of_job, lambda: self._unsettled(run, exc))

    def _unsettled(self, run: Run, exc: AtomtxError) -> Facts:
        cleanup = "unfinished" if run.outcome is not None else None
        facts = self._facts_of(run, exc.exit_status, found_unfinished=True)
        return replace(facts, reason=exc.message, hint=exc.hint, cleanup=cleanup)

    def _refused(self, exc: Exception) -> Facts:
        """Return the facts of a command that itself failed."""
        status = exc.exit_status if isinstance(exc, AtomtxError) else ExitStatus.FAILED
        message = exc.message if isinstance(exc, AtomtxError) else f"{type(exc).__name__}: {exc}"
        return Facts(
            host=_host(),
            job=self.job,
            at=datetime.now(UTC),
            verb=self._verb,
            exit_status=status,
            run=self._run if self._is_journaled() else None,
            reason=message,
            hint=exc.hint if isinstance(exc, AtomtxError) else None,
            is_last_known=False,
        )

    # -- telling it ----------------------------------------------------------------------------

    @contextmanager
    def delivering(self, job: str) -> Iterator[None]:
        """
        Tell what was noted when the block ends, and how it failed where it did.

        That another run of the job is at work is no news, nor that a service was stopped.
        """
        self.job = job
        try:
            yield
        except BusyError:
            raise
        except Interrupted as exc:
            if not outbox.is_wanted():
                interruption = exc
                self._note("", lambda: self._refused(interruption))
            raise
        except Exception as exc:
            failure = exc
            # What was typed wrong concerns no job.
            told = [self._settings] if isinstance(exc, UserError) else self._everybody()
            self._note_to(told, lambda: self._refused(failure))
            raise
        finally:
            self._deliver()

    def _everybody(self) -> Iterable[NotifySettings]:
        """Return who is told that the command itself failed, everybody once."""
        if self._is_of_one:
            return [self._settings]
        return notices.distinct([self._settings, *self._by_job.values()])

    def _note(self, job: str, facts: Callable[[], Facts]) -> None:
        self._note_to([self._by_job.get(job, self._settings)], facts)

    def _note_to(self, told: Iterable[NotifySettings], facts: Callable[[], Facts]) -> None:
        for settings in told:
            if not settings.is_empty:
                with self._harmless():
                    self._facts.append((settings, facts()))

    def _deliver(self) -> None:
        redact = Redactor(os.environ).redact
        for settings in dict.fromkeys(settings for settings, _ in self._facts):
            with self._harmless():
                told = [notices.notice(facts, redact) for s, facts in self._facts if s == settings]
                if outbox.is_wanted():
                    settings = self._leave(settings, told)
                if not settings.is_empty:
                    self._tell(partial(_send, settings=settings, told=told))
        self._facts.clear()

    def _leave(self, settings: NotifySettings, told: list[notices.Notice]) -> NotifySettings:
        """Leave to another process what it gives; return the settings for the rest."""
        now, later = outbox.parted(settings, offline=self.is_offline)
        started = os.environ.get("INVOCATION_ID", "")
        for n, (each, notice) in enumerate((s, notice) for notice in told for s in later):
            name = f"{time.time_ns():020}-{os.getpid()}-{n}"
            try:
                outbox.leave(self._state, name, each, notice, started)
            except EffectError as exc:
                self._warn(f"not notified: {exc.message}")
        return now

    def _tell(self, effect: Callable[[ModuleType], list[str]]) -> None:
        with self._harmless():
            # 40 ms, which a command that tells nobody need not pay.
            from .. import notifiers

            for problem in effect(notifiers):
                self._warn(f"not notified: {problem}")

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn a bug of ours into a warning: it must not become the run's result."""
        try:
            yield
        except Exception as exc:
            words = Redactor(os.environ).redact(str(exc))
            self._warn(f"not notified: a bug: {type(exc).__name__}: {words}")

    # -- facts -----------------------------------------------------------------------------------

    def _facts_of(self, run: Run, status: ExitStatus, **values: Any) -> Facts:
        last, is_known = self._last_completed(run.job)
        if run.verb is not Verb.BACKUP and not (run.verb is Verb.RUN and is_backup(run)):
            values["pings"] = False
        return Facts(
            host=_host(),
            job=run.label,
            at=datetime.now(UTC),
            verb=run.verb,
            exit_status=status,
            run=run.id,
            state=run.state,
            outcome=run.outcome,
            cleanup=run.cleanup or _of_steps(run),
            reason=run.reason,
            datasets=tuple(volume.name for volume in run.volumes),
            not_a_moment=run.read_live,
            last_completed=last,
            is_last_known=is_known,
            log=tuple(read_log(RunFolder.of(self._state, run.id).log, whole=False)),
            failed_after=tuple(step.intent.describe() for step in run.failed_after),
            **values,
        )

    def _last_completed(self, job: str) -> tuple[datetime | None, bool]:
        try:
            return history.last_moment(self._state / journalfile.NAME, job), True
        except AtomtxError:  # the notice is worth more than this line of it
            return None, False

    def _is_journaled(self) -> bool:
        try:
            return bool(self._run and history.run(self._state / journalfile.NAME, self._run))
        except AtomtxError:
            return False


def _send(
    notifiers: ModuleType, *, settings: NotifySettings, told: list[notices.Notice]
) -> list[str]:
    problems: list[str] = notifiers.send(settings, told)
    return problems


def _is_kept_by_service(run: Run, status: ExitStatus) -> bool:
    """Tell whether a service was stopped, as by a shutdown, and its run is kept for the next."""
    is_kept = outbox.is_wanted() and status == ExitStatus.SIGTERM and run.outcome is None
    return is_kept and not leaves_a_hook(run.steps)


def _of_steps(run: Run) -> str | None:
    """Return how the cleanup of a run of steps stands: what one of them has parked is left."""
    return "parked" if ExitStatus.PARKED in run.step_statuses else None


def _host() -> str:
    return os.uname().nodename

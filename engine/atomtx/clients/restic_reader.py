"""What restic prints: JSON lines that differ by version, and the plain text between them."""

from __future__ import annotations

import os
from typing import Any

from ..states import Outcome
from . import Backup, End, Moment, Progress
from .program import ended, is_trouble, message_of, was_killed

_KEPT_LINES = 50


class ResticReader:
    """Reads the JSON lines of all versions, and the plain text between them."""

    def __init__(self, moment: Moment) -> None:
        self.progress = Progress()
        self._targets = moment.sources
        self._summaries: list[dict[str, Any]] = []
        self._unread: dict[str, str] = {}  # path -> what restic said
        self._skipped: list[str] = []
        self._exit_error: str | None = None
        self._text: list[str] = []
        self._status: int | None = None

    def stdout(self, line: str) -> None:
        self._read(line)

    def stderr(self, line: str) -> None:
        self._read(line)

    def end_command(self, n: int, status: int) -> None:
        self._status = status

    def _read(self, line: str) -> None:
        """Read a line of either stream: a wrapper may have joined them."""
        message = message_of(line)
        if message is None:
            for part in line.split("\r"):
                self._read_text(part.strip())
            return
        match message.get("message_type"):
            case "status" if "action" not in message:  # 0.14: the end of the scan has one
                self._read_status(message)
            case "summary":
                self._summaries.append(message)
            case "error":
                self._read_error(message)
            case "exit_error":
                self._exit_error = str(message.get("message", ""))

    def _read_text(self, text: str) -> None:
        if text.endswith(("does not exist, skipping", "cannot be accessed, skipping")):
            self._skipped.append(text.removesuffix(", skipping"))
        elif text:
            self._text = [*self._text, text][-_KEPT_LINES:]

    def _read_status(self, message: dict[str, Any]) -> None:
        total = message.get("total_bytes")
        self.progress = Progress(
            percent=100 * message.get("percent_done", 0) if total else None,
            bytes_done=message.get("bytes_done", 0),
            bytes_total=total,
            files_done=message.get("files_done", 0),
            files_total=message.get("total_files"),
            eta_s=message.get("seconds_remaining"),
        )

    def _read_error(self, message: dict[str, Any]) -> None:
        error = message.get("error")
        said = str(error)
        if isinstance(error, dict):  # up to 0.16 a Go error as it is: Op, Path, Err
            number = error.get("Err")
            system = os.strerror(number) if isinstance(number, int) else ""
            said = str(error.get("message") or f"{error.get('Op', 'error')}: {system}")
        self._unread[str(message.get("item", ""))] = said

    def end(self) -> End:
        failure = self._failure()
        if failure is not None:
            return self._end(Outcome.FAILED, failure, retriable=self._is_retriable())
        incomplete = self._incomplete()
        if incomplete is not None:
            return self._end(Outcome.PARTIAL, incomplete)
        return self._end(Outcome.COMPLETED, None)

    def _failure(self) -> str | None:
        """Return why there is no backup at all; None if there is one."""
        if self._status not in (0, 3):
            return self._last_words()
        if not self._summaries:
            return f"restic ended without a summary ({self._last_words()})"
        if any(summary.get("dry_run") for summary in self._summaries):
            return "it was a dry run: nothing was saved"
        # The field is left out (from 0.17) only where --skip-if-unchanged found no change.
        if any(summary.get("snapshot_id") == "" for summary in self._summaries):
            return "restic named no snapshot"
        return None

    def _last_words(self) -> str:
        """Return what restic said last about its failure."""
        fatal = [line for line in self._text if "Fatal" in line]
        said = [self._exit_error or "", *fatal[::-1], *self._skipped, *self._text[::-1]]
        status = ended(self._status) if self._status is not None else "its end was not seen"
        words = next((words for words in said if words), "")
        return f"{words.replace('Fatal: ', '')} ({status})" if words else status

    def _incomplete(self) -> str | None:
        """Return what the backup lacks; None if it is whole."""
        parts = list(self._skipped)
        if self._unread:
            item, said = next(iter(self._unread.items()))
            files = "file" if len(self._unread) == 1 else "files"
            parts.append(f"{len(self._unread)} {files} could not be read: {item}: {said}")
        if not parts and self._status == 3:
            parts.append("restic could not read some files")
        return "; ".join(parts) or None

    def _is_retriable(self) -> bool:
        if self._status in (10, 11):  # the repository was there at `inspect`; or it is locked
            return True
        if was_killed(self._status):
            return True
        return self._status == 1 and is_trouble([*self._text, self._exit_error or ""])

    def _end(self, outcome: Outcome, reason: str | None, *, retriable: bool = False) -> End:
        backups = tuple(self._backup(summary, outcome, reason) for summary in self._summaries)
        nothing = Backup(self._targets, outcome, reason=reason)
        return End(outcome, reason, retriable, backups or (nothing,))

    def _backup(self, summary: dict[str, Any], outcome: Outcome, reason: str | None) -> Backup:
        return Backup(
            self._targets,
            outcome,
            backup_id=summary.get("snapshot_id") or None,
            reason=reason,
            bytes_added=summary.get("data_added_packed", summary.get("data_added")),
            bytes_processed=summary.get("total_bytes_processed"),
            files_processed=summary.get("total_files_processed"),
        )

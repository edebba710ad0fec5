"""What borg prints: log lines as JSON on standard error, one document at the end of the other."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from .. import process
from ..states import Outcome
from . import Backup, End, Moment, Progress
from .program import document_of, ended, is_trouble, message_of, was_killed

_KEPT_LINES = 50
_KEPT_CHARS = 1 << 23  # of the document: it has every word of the command line, 2 MiB at most

# Of both schemes: the old one has 0, 1 and 2 alone, BORG_EXIT_CODES=modern one for each kind.
_WARNED = frozenset([1, *range(100, 128)])
_IN_A_WHILE = frozenset(
    [
        13,  # the repository is not there; it was at `inspect`
        *(14, 20),  # no space, quota
        30,  # an archive of that name is there; the next attempt's has another
        *range(70, 74),  # locked
        *(80, 81, 87),  # connection
    ]
)
_IN_A_WHILE_ID = re.compile(
    r"Repository\.(DoesNotExist|InsufficientFreeSpaceError|StorageQuotaExceeded)"
    r"|Archive\.AlreadyExists|Lock(Timeout|Failed|Error|ErrorT)|Connection(Closed|Broken)\w*"
)
# A file that was not saved, or not as one piece; other warnings are about other things.
_UNREAD = re.compile(
    r"\[Errno \d+\]|file changed while we backed it up|file type or inode changed|: backup error"
)
_LOUD = ("ERROR", "CRITICAL")


def said_of(answer: process.Completed) -> str:
    """Return what borg said about its failure: its last error, or else its last line."""
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    messages = [m for m in map(message_of, lines) if m is not None]
    errors = [_first_line(m) for m in messages if m.get("levelname") in _LOUD]
    return next((words for words in (*errors[::-1], *lines[::-1]) if words), ended(answer.status))


def _first_line(message: dict[str, Any]) -> str:
    """Return a message's first line; of a traceback the exception, as Python ends it."""
    text = str(message.get("message", "")).strip()
    first = text.partition("\n")[0]
    if not first.startswith("Traceback "):
        return first
    # What follows is about the machine.
    lines = text.partition("\nPlatform: ")[0].splitlines()
    return next(line for line in reversed(lines) if line and not line.startswith(" "))


class BorgReader:
    """Judges by the exit status and the document together; warnings give the reasons."""

    def __init__(self, moment: Moment) -> None:
        self.progress = Progress()
        self._targets = moment.sources
        self._document: deque[str] = deque()
        self._document_chars = 0
        self._errors: list[str] = []
        self._ids: list[str] = []
        self._unread: list[str] = []
        self._unread_count = 0
        self._warnings: list[str] = []
        self._text: list[str] = []
        self._status: int | None = None

    def stdout(self, line: str) -> None:
        """Keep a line of the document, which is printed over many; a wrapper adds others."""
        self._document.append(line)
        self._document_chars += len(line)
        while self._document_chars > _KEPT_CHARS:
            self._document_chars -= len(self._document.popleft())

    def stderr(self, line: str) -> None:
        for part in line.split("\r"):
            message = message_of(part)
            if message is not None:
                self._read(message)
            elif part.strip():
                self._text = [*self._text, part.strip()][-_KEPT_LINES:]

    def end_command(self, n: int, status: int) -> None:
        self._status = status

    def _read(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "archive_progress" if "nfiles" in message:
                self.progress = Progress(
                    bytes_done=message.get("original_size"), files_done=message["nfiles"]
                )
            case "archive_progress" | "progress_message" | "progress_percent":
                # The same anew: a line of progress, which the log is spared.
                self.progress = Progress(
                    bytes_done=self.progress.bytes_done, files_done=self.progress.files_done
                )
            case "log_message":
                self._read_log(message)

    def _read_log(self, message: dict[str, Any]) -> None:
        text = _first_line(message)
        if message.get("levelname") in _LOUD:
            self._errors = [*self._errors, text][-_KEPT_LINES:]
            self._ids = [*self._ids, str(message.get("msgid", ""))][-_KEPT_LINES:]
        elif message.get("levelname") == "WARNING" and _UNREAD.search(text):
            self._unread_count += 1
            self._unread = self._unread or [text]
        elif message.get("levelname") == "WARNING":
            self._warnings = [*self._warnings, text][-_KEPT_LINES:]

    def end(self) -> End:
        document = document_of("\n".join(self._document)) or {}
        archive = document.get("archive")
        archive = archive if isinstance(archive, dict) else {}
        failure = self._failure(archive)
        if failure is not None:
            return self._end(Outcome.FAILED, failure, {}, retriable=self._is_retriable())
        lacks = self._incomplete()
        return self._end(Outcome.PARTIAL if lacks else Outcome.COMPLETED, lacks, archive)

    def _failure(self, archive: dict[str, Any]) -> str | None:
        """Return why there is no backup at all; None if there is one."""
        if self._status != 0 and self._status not in _WARNED:
            return self._last_words()
        if not archive.get("name"):
            return f"borg named no archive ({self._last_words()})"
        return None

    def _last_words(self) -> str:
        status = ended(self._status) if self._status is not None else "its end was not seen"
        said = (*self._errors[::-1], *self._unread, *self._warnings[::-1], *self._text[::-1])
        words = next((words for words in said if words), "")
        return f"{words} ({status})" if words else status

    def _incomplete(self) -> str | None:
        """Return what the backup lacks; None if it is whole."""
        if self._unread_count:
            files = "file" if self._unread_count == 1 else "files"
            return f"{self._unread_count} {files} could not be read: {self._unread[0]}"
        return None if self._status == 0 else f"borg warned: {self._last_words()}"

    def _is_retriable(self) -> bool:
        if was_killed(self._status) or self._status in _IN_A_WHILE:
            return True
        if any(_IN_A_WHILE_ID.fullmatch(each) for each in self._ids):
            return True
        return self._status == 2 and is_trouble([*self._text, *self._errors])

    def _end(
        self,
        outcome: Outcome,
        reason: str | None,
        archive: dict[str, Any],
        *,
        retriable: bool = False,
    ) -> End:
        stats = archive.get("stats") or {}
        backup = Backup(
            self._targets,
            outcome,
            backup_id=archive.get("name"),
            reason=reason,
            bytes_added=stats.get("deduplicated_size"),
            bytes_processed=stats.get("original_size"),
            files_processed=stats.get("nfiles"),
        )
        return End(outcome, reason, retriable, (backup,))

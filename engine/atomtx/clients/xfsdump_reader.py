"""What xfsdump prints, and the one line of JSON that our process around it adds for a dump."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from ..states import Outcome
from . import Backup, End, Moment, Progress
from .program import ended, is_trouble, message_of, was_killed

OURS = "atomtx: "  # before each line of the process around xfsdump
_XFSDUMP = re.compile(r"xfsdump(?::\w+)?: ")
_STATUS = re.compile(r"Dump Status: (\w+)")
_SESSION = re.compile(r"session id: ([0-9a-f-]{36})$")
_VERSION = re.compile(r"version (\d+\.\d+[.\d]*)")
_ESTIMATE = re.compile(r"estimated dump size: (\d+) bytes")
_AT = re.compile(r"status at [\d:]+: (\d+)/(\d+) files dumped, ([\d.]+)% data dumped")
# Of dump/content.c and dump/inomap.c, with and without "WARNING": something is not in the dump.
_UNSAVED = re.compile(
    r"not dumping|not dumped|could not (open|read|stat|get|retrieve)|unable to (read|open|dump)"
    r"|failed to get (valid )?bulkstat|too long: .*skipping|inconsistency|extent map error"
    r"|dioinfo failed|dump is incomplete|^WARNING: ",
    re.IGNORECASE,
)
# A quota is none of the files; the others are of a fresh inventory, or of an older attempt.
_HARMLESS = re.compile(
    r"failed to save .+ information|no (session|media) label specified|most recent level \d+ dump"
)


class Said:
    """What one xfsdump has told so far."""

    def __init__(self) -> None:
        self.status = ""  # of its last line
        self.session = ""
        self.version = ""
        self.estimate: int | None = None
        self.files: int | None = None
        self.lost: list[str] = []  # lines that tell of something not saved
        self.last = ""

    @property
    def is_whole(self) -> bool:
        return self.status == "SUCCESS"

    def line(self, line: str) -> tuple[int, int, float] | None:
        """Take a line in; return (files done, files in all, percent) where it tells of these."""
        match = _XFSDUMP.match(line)
        if not match:
            return None
        text = line[match.end() :].strip()
        if found := _AT.match(text):
            self.files = int(found[2])
            return int(found[1]), int(found[2]), float(found[3])
        if found := _STATUS.match(text):
            self.status = found[1]
        elif found := _SESSION.match(text):
            self.session = found[1]
        elif found := _VERSION.match(text):
            self.version = found[1]
        elif found := _ESTIMATE.match(text):
            self.estimate = int(found[1])
        elif _UNSAVED.search(text) and not _HARMLESS.search(text):
            self.lost.append(text)
        if text.startswith("ERROR:") or not self.last.startswith("ERROR:"):
            self.last = text if not found else self.last
        return None

    def trouble(self) -> str:
        """Return its own words for why it is no dump."""
        return self.last.removeprefix("ERROR: ") or "it said nothing"


def lost_words(lost: list[str]) -> str | None:
    """Say what a dump lacks; None where nothing."""
    if not lost:
        return None
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    return f"{lost[0].removeprefix('WARNING: ')}{more}"


class XfsdumpReader:
    """Reads the dumps of a moment, one command a volume."""

    def __init__(self, moment: Moment) -> None:
        self.progress = Progress()
        self._targets = moment.targets
        self._backups: list[Backup] = []
        self._retriable: list[bool] = []
        self._begin()

    def _begin(self) -> None:
        self._said = Said()
        self._ours: list[str] = []  # what went wrong around xfsdump
        self._made: dict[str, object] = {}

    def stdout(self, line: str) -> None:
        self._made = message_of(line) or self._made

    def stderr(self, line: str) -> None:
        if line.startswith(OURS):
            self._ours.append(line.removeprefix(OURS))
            return
        at = self._said.line(line)
        if at is None:
            return
        done, total, percent = at
        whole = (100.0 * len(self._backups) + percent) / max(1, len(self._targets))
        size = self._said.estimate
        self.progress = replace(
            self.progress,
            percent=min(100.0, whole),
            files_done=done,
            files_total=total,
            bytes_total=size,
            bytes_done=None if size is None else int(size * percent / 100),
        )

    def end_command(self, n: int, status: int) -> None:
        """Judge the dump of one volume."""
        outcome, reason = self._judge(status)
        number = _number(self._made)
        self._backups.append(
            Backup(
                (self._targets[n],),
                outcome,
                backup_id=None if outcome is Outcome.FAILED else str(self._made["dump"]),
                reason=reason,
                bytes_added=number("size"),
                bytes_processed=number("size"),
                files_processed=number("files"),
            )
        )
        failed = outcome is Outcome.FAILED
        lines = [*self._ours, self._said.last]
        self._retriable.append(failed and (was_killed(status) or is_trouble(lines)))
        self._begin()

    def _judge(self, status: int) -> tuple[Outcome, str | None]:
        if status == 0 and self._made.get("dump"):
            lost = self._made.get("lost")
            return (Outcome.PARTIAL, str(lost)) if lost else (Outcome.COMPLETED, None)
        if status < 0 or not (self._ours or self._said.last):
            return Outcome.FAILED, ended(status)
        words = self._ours[-1] if self._ours else self._said.trouble()
        return Outcome.FAILED, f"{words} ({ended(status)})"

    def end(self) -> End:
        """Judge the whole: each volume needs its dump."""
        missing = self._targets[len(self._backups) :]
        never = "its end was not seen"
        backups = (*self._backups, *(Backup((p,), Outcome.FAILED, reason=never) for p in missing))
        failed = [backup for backup in backups if backup.outcome is Outcome.FAILED]
        bad = failed or [backup for backup in backups if backup.outcome is Outcome.PARTIAL]
        if not bad:
            return End(Outcome.COMPLETED, backups=backups)
        # A volume that never began was kept from it by somebody's stop.
        retriable = bool(failed) and not missing and sum(self._retriable) == len(failed)
        return End(bad[0].outcome, f"{bad[0].paths[0]}: {bad[0].reason}", retriable, backups)


def _number(made: dict[str, object]) -> Callable[[str], int | None]:
    def number(name: str) -> int | None:
        value = made.get(name)
        return value if isinstance(value, int) else None

    return number

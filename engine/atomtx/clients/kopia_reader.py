"""What kopia prints: one manifest a source on standard output, progress and errors beside it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

from ..states import Outcome
from . import Backup, End, Moment, Progress
from .program import ended, is_trouble, message_of, was_killed

_KEPT_LINES = 50
_SOURCE = re.compile(r"Snapshotting [^@]*@[^:]*:(.*) \.\.\.")
_FILE_ERROR = re.compile(r"! (Ignored error|Error) when processing ")
_UNCHANGED = "Not saving snapshot because no files have been changed"
_PROGRESS = re.compile(
    r"\d+ hashing, (?P<hashed>\d+) hashed \((?P<hashed_size>[^)]*)\), "
    r"(?P<cached>\d+) cached \((?P<cached_size>[^)]*)\), uploaded [^,]*"
    r"(, estimated (?P<total>[^(]*) \((?P<percent>[\d.]+)%\)( (?P<left>\w+) left)?)?"
)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
# What follows the manifests; one that was printed before is then not sure to be stored.
_NOT_STORED = re.compile(r"flush error|unable to close repository|error flushing|write session")
_MAINTENANCE = "running auto-maintenance"


def _size(text: str) -> int | None:
    """Read kopia's `1.2 GB`."""
    number, _, unit = text.strip().partition(" ")
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        return None


def _seconds(text: str | None) -> float | None:
    """Read Go's `1h2m3s`."""
    match = _DURATION.fullmatch(text or "")
    if not text or not match:
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


def _sum(*parts: int | None) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


class KopiaReader:
    """Judges each source by its manifest, and the exit status by what explains it."""

    def __init__(self, moment: Moment) -> None:
        self.progress = Progress()
        self._targets = moment.sources
        self._manifests: dict[str, dict[str, Any]] = {}
        self._current = ""
        self._unread: Counter[str] = Counter()
        self._unchanged: set[str] = set()
        self._text: list[str] = []
        self._statuses: list[int] = []

    def stdout(self, line: str) -> None:
        manifest = message_of(line)
        if manifest is None or "rootEntry" not in manifest:
            return self.stderr(line)
        return self._read_manifest(manifest)

    def _read_manifest(self, manifest: dict[str, Any]) -> None:
        source = manifest.get("source")
        path = source.get("path") if isinstance(source, dict) else None
        self._manifests[str(path)] = manifest

    def stderr(self, line: str) -> None:
        for part in line.split("\r"):
            self._read_text(part.strip())

    def _read_text(self, text: str) -> None:
        if match := _PROGRESS.search(text):
            self._read_progress(match)
        elif match := _SOURCE.fullmatch(text):
            self._current = match[1]
        elif _FILE_ERROR.match(text):
            self._unread[self._current] += 1
        elif _UNCHANGED in text:
            self._unchanged.add(self._current)
        elif text:
            self._text = [*self._text, text][-_KEPT_LINES:]

    def _read_progress(self, match: re.Match[str]) -> None:
        self.progress = Progress(
            percent=float(match["percent"]) if match["percent"] else None,
            bytes_done=_sum(_size(match["hashed_size"]), _size(match["cached_size"])),
            bytes_total=_size(match["total"]) if match["total"] else None,
            files_done=int(match["hashed"]) + int(match["cached"]),
            eta_s=_seconds(match["left"]),
        )

    def end_command(self, n: int, status: int) -> None:
        self._statuses.append(status)

    def end(self) -> End:
        backups = tuple(self._backup(target) for target in self._targets)
        failure = self._unexplained(backups)
        if failure is not None:
            failed = (replace(b, outcome=Outcome.FAILED, reason=failure) for b in backups)
            return self._failed(failure, tuple(failed))
        bad = next((b for b in backups if b.outcome is Outcome.FAILED), None)
        if bad is not None:
            return self._failed(bad.reason or "", backups)
        reasons = [f"{b.paths[0]}: {b.reason}" for b in backups if b.outcome is Outcome.PARTIAL]
        if any(self._statuses) and self._says(_MAINTENANCE):
            reasons.append(f"all is saved, but kopia's maintenance failed: {self._last_words()}")
        outcome = Outcome.PARTIAL if reasons else Outcome.COMPLETED
        return End(outcome, "; ".join(reasons) or None, backups=backups)

    def _failed(self, reason: str, backups: tuple[Backup, ...]) -> End:
        retriable = is_trouble(self._text) or any(map(was_killed, self._statuses))
        return End(Outcome.FAILED, reason, retriable, backups)

    def _says(self, words: str) -> bool:
        return any(words in line for line in self._text)

    def _unexplained(self, backups: tuple[Backup, ...]) -> str | None:
        """Return why no manifest can be believed; None if the exit statuses are explained."""
        if not self._statuses:
            return "its end was not seen"
        strange = [status for status in self._statuses if status not in (0, 1)]
        if strange:
            return self._last_words(strange[0])
        if any(_NOT_STORED.search(line) for line in self._text):
            return self._last_words()
        # A 1 means that a source was not saved whole, or that something else went wrong.
        whole = all(backup.outcome is Outcome.COMPLETED for backup in backups)
        if 1 in self._statuses and whole and not self._says(_MAINTENANCE):
            return self._last_words()
        return None

    def _last_words(self, status: int | None = None) -> str:
        worst = status if status is not None else max(self._statuses, key=abs)
        return f"{self._text[-1]} ({ended(worst)})" if self._text else ended(worst)

    def _backup(self, target: str) -> Backup:
        manifest = self._manifests.get(target)
        if manifest is None:
            return self._without_manifest(target)
        entry = manifest.get("rootEntry") or {}
        summary = entry.get("summ") or {}
        outcome, reason = self._judge(manifest, summary)
        return Backup(
            (target,),
            outcome,
            backup_id=manifest.get("id"),
            reason=reason,
            bytes_processed=summary.get("size"),
            files_processed=summary.get("files"),
        )

    def _without_manifest(self, target: str) -> Backup:
        """Judge a source without one: a policy may drop a backup that equals the one before."""
        if target not in self._unchanged:
            reason = self._last_words() if self._statuses else "its end was not seen"
            return Backup((target,), Outcome.FAILED, reason=reason)
        # Equal may mean that the same files could not be read again; the exit status is then 0.
        if self._unread[target]:
            reason = f"{self._unread[target]} files could not be read"
            return Backup((target,), Outcome.PARTIAL, reason=reason)
        return Backup((target,), Outcome.COMPLETED)

    def _judge(
        self, manifest: dict[str, Any], summary: dict[str, Any]
    ) -> tuple[Outcome, str | None]:
        incomplete = manifest.get("incomplete") or summary.get("incomplete")
        if incomplete:
            return Outcome.FAILED, f"kopia ended before the backup was whole: {incomplete}"
        if "numFailed" not in summary:
            return Outcome.FAILED, "kopia did not tell whether all files were read"
        failed = summary["numFailed"] + summary.get("numIgnoredErrors", 0)
        if failed:
            files = "file" if failed == 1 else "files"
            return Outcome.PARTIAL, f"{failed} {files} could not be read{_first_error(summary)}"
        return Outcome.COMPLETED, None


def _first_error(summary: dict[str, Any]) -> str:
    errors = summary.get("errors") or [{}]
    error = errors[0].get("error")
    return f": {errors[0].get('path')}: {error}" if error else ""

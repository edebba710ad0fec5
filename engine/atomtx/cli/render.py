"""
What people and programs see: tables, JSON, and the progress of a run.

A reporter never fails: a terminal that went away (the front end ignores SIGHUP) must not stop a
backup in its middle.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from .. import sdnotify
from ..words import age as age
from ..words import duration as duration
from ..words import local_time as local_time
from ..words import printable as printable
from ..words import size as size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from ..clients import Progress

PLAIN_INTERVAL_S = 600.0
STATUS_INTERVAL_S = 5.0
JSON_INTERVAL_S = 1.0


# -- values ----------------------------------------------------------------------------------


SHORT_ID = 8


def label(text: str, parent: str | None) -> str:
    """Return the label of a run; where a step has made it with the step: *parent* is "RUN/N"."""
    run, _, number = (parent or "").partition("/")
    return f"{text} (step {number} of {run[:SHORT_ID]})" if run else text


def backup_id(text: str) -> str:
    """Shorten a hash, as restic does; a name, as borg and xfsdump have, is no use in part."""
    is_hash = len(text) >= 16 and not set(text) - set("0123456789abcdef")
    return text[:8] if is_hash else text


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()
) -> list[str]:
    """Return plain-text lines in columns; those named in *right* are set to the right."""
    cells = [tuple(headers), *(tuple(printable(cell) for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_right = set(right)

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if header in to_right else cell.ljust(width)
            for cell, width, header in zip(row, widths, headers, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return [line(row) for row in cells]


def to_json(data: object, *, indent: int | None = 2) -> str:
    """Return JSON; dataclasses become objects, times ISO 8601 in UTC."""
    return json.dumps(data, indent=indent, default=_jsonable, ensure_ascii=False)


def to_json_list(items: Iterable[object]) -> str:
    """Return a JSON list, an item a line: json's fast encoder does not indent."""
    return "[" + ",\n ".join(to_json(item, indent=None) for item in items) + "]"


def _jsonable(value: object) -> object:
    if isinstance(value, datetime):
        aware = value if value.tzinfo is UTC else value.astimezone(UTC)
        return aware.isoformat().removesuffix("+00:00") + "Z"
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, PurePath):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be printed as JSON")


def progress_words(progress: Progress) -> str:
    """Return "42 %, 1.2 GiB of 3.0 GiB, 4 min 10 s left"; empty where nothing is known."""
    parts = [] if progress.percent is None else [f"{progress.percent:.0f} %"]
    parts += _amounts(progress)
    if progress.eta_s is not None:
        parts.append(f"{duration(progress.eta_s)} left")
    return ", ".join(parts)


def _amounts(progress: Progress) -> list[str]:
    done, total = progress.bytes_done, progress.bytes_total
    if done is not None:
        return [f"{size(done)} of {size(total)}" if total else size(done)]
    if progress.files_done is not None:
        return [f"{progress.files_done} files"]
    return []


# -- progress of a run -----------------------------------------------------------------------


class Reporter(Protocol):
    """Tells somebody what a run does; a context manager, so that a live line is taken away."""

    def step(self, text: str) -> None:
        """Say what is being done now."""

    def note(self, text: str) -> None:
        """Say what the user should know."""

    def warn(self, text: str) -> None:
        """Say what the user should look at."""

    def progress(self, progress: Progress) -> None:
        """Show where the client is; call it as often as there is news."""

    def done(self, text: str) -> None:
        """Say how it ended; takes the live line away."""

    def result(self, data: Mapping[str, Any]) -> None:
        """Give a program the result; people have :meth:`done`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def reporter(
    *, as_json: bool = False, quiet: bool = False, stderr: TextIO | None = None
) -> Reporter:
    """
    Return the reporter that fits: JSON lines on stdout, a live line on a terminal, or plain lines.

    In a service of systemd, plain lines and the status that `systemctl status` shows.
    *quiet* leaves warnings alone (as JSON has its own, it has no effect there).
    """
    stream = stderr if stderr is not None else sys.stderr
    if as_json:
        return JsonReporter(sys.stdout)
    if quiet:
        return QuietReporter(stream)
    if stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb":
        return TerminalReporter(stream)
    return ServiceReporter(stream) if sdnotify.is_listened_to() else PlainReporter(stream)


class PlainReporter:
    """One line a step on a stream; progress at most every ten minutes, for logs and mails."""

    interval_s = PLAIN_INTERVAL_S

    def __init__(
        self, stream: TextIO | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._shown_at = clock()

    def step(self, text: str) -> None:
        self._line(text)

    def note(self, text: str) -> None:
        self._line(f"note: {text}")

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}")

    def progress(self, progress: Progress) -> None:
        now = self._clock()
        if now - self._shown_at >= self.interval_s:
            self._shown_at = now
            self._show(progress)

    def done(self, text: str) -> None:
        self._line(text)

    def result(self, data: Mapping[str, Any]) -> None:
        """Nothing: :meth:`done` has said it in words."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _show(self, progress: Progress) -> None:
        words = progress_words(progress)
        if words:
            self._line(f"  {words}")

    def _line(self, text: str) -> None:
        self._write("\n".join(printable(line) for line in text.splitlines()))

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):  # the terminal or the reader went away, or it is closed
            self._stream = None


class ServiceReporter(PlainReporter):
    """Plain lines, and what is done now, with percent, as the status of the service."""

    def __init__(
        self, stream: TextIO | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream, clock=clock)
        self._now = ""
        self._told_at = clock() - STATUS_INTERVAL_S

    def step(self, text: str) -> None:
        super().step(text)
        self._now = printable(text.partition("\n")[0])
        sdnotify.status(self._now)

    def progress(self, progress: Progress) -> None:
        super().progress(progress)
        now = self._clock()
        if now - self._told_at >= STATUS_INTERVAL_S:
            self._told_at = now
            words = progress_words(progress)
            sdnotify.status(f"{self._now}: {words}" if words else self._now)

    def done(self, text: str) -> None:
        super().done(text)
        sdnotify.status(printable(text.partition("\n")[0]))


class QuietReporter(PlainReporter):
    """Warnings alone."""

    def step(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def done(self, text: str) -> None:
        pass


class JsonReporter(PlainReporter):
    """One JSON object a line on standard output, and nothing else."""

    interval_s = JSON_INTERVAL_S

    def step(self, text: str) -> None:
        self._object("step", text=text)

    def note(self, text: str) -> None:
        self._object("note", text=text)

    def warn(self, text: str) -> None:
        self._object("warning", text=text)

    def done(self, text: str) -> None:
        self._object("done", text=text)

    def result(self, data: Mapping[str, Any]) -> None:
        self._object("result", **data)

    def _show(self, progress: Progress) -> None:
        self._object("progress", **asdict(progress))

    def _object(self, message_type: str, **data: object) -> None:
        self._write(to_json({"message_type": message_type, **data}, indent=None))


class TerminalReporter(PlainReporter):
    """Plain lines, and below them a live bar with percent, bytes and the time left."""

    interval_s = 0.0

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def done(self, text: str) -> None:
        self._stop()
        super().done(text)

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _show(self, progress: Progress) -> None:
        if self._stream is None:
            return
        try:
            self._update(progress)
        except (OSError, ValueError):
            self._bar = self._stream = None

    def _update(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = _start_bar(self._stream)
            self._task = self._bar.add_task("", words="")
        assert self._task is not None
        known = progress.percent is not None
        self._bar.update(
            self._task,
            total=100.0 if known else None,
            completed=progress.percent if known else 0.0,
            words=progress_words(progress),
            refresh=True,
        )

    def _write(self, text: str) -> None:
        if self._bar is None:
            super()._write(text)
            return
        try:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        except (OSError, ValueError):
            self._bar = self._stream = None

    def _stop(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.stop()
            except (OSError, ValueError):
                self._stream = None


def _start_bar(stream: TextIO | None) -> Bar:
    """Start the live line; no thread of its own, so that the caller may fork."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.fields[words]}", markup=False),
        console=Console(file=stream),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.start()
    return bar

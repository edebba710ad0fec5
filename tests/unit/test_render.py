"""What people and programs see."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from atomtx.cli import render
from atomtx.clients import Progress

HALF = Progress(percent=50.4, bytes_done=1 << 30, bytes_total=2 << 30, eta_s=250)


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A pseudo terminal that keeps what was written to it."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w")
        self.screen = ""

    def shows(self, text: str) -> bool:
        """Tell whether *text* comes to be on the screen."""
        while text not in self.screen and select.select([self.master], [], [], 1)[0]:
            self.screen += os.read(self.master, 65536).decode()
        return text in self.screen

    def hang_up(self) -> None:
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    with suppress(OSError):  # hung up already
        terminal.hang_up()
    with suppress(OSError):
        terminal.stream.close()


class Gone(io.StringIO):
    """A terminal that was hung up."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_048_575, "1.0 MiB"),
        (1536 << 20, "1.5 GiB"),
        (1 << 70, "1024.0 EiB"),
    ],
)
def test_size(count: int | None, text: str) -> None:
    """Sizes are shown in binary units with one digit."""
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7380, "2 h 03 min"),
        (90_000, "1 d 01 h"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    """Time spans are shown in their two largest units."""
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("ago", "text"),
    [
        (timedelta(seconds=-5), "now"),
        (timedelta(seconds=59), "now"),
        (timedelta(minutes=5), "5 min"),
        (timedelta(hours=47), "47 h"),
        (timedelta(days=100), "100 d"),
        (timedelta(days=800), "2 y"),
    ],
)
def test_age(ago: timedelta, text: str) -> None:
    """Ages are shown in one unit; a clock that was set back makes none negative."""
    now = datetime(2026, 8, 1, tzinfo=UTC)
    assert render.age(now - ago, now) == text


def test_table() -> None:
    """Columns are as wide as their widest cell, and no cell can drive the terminal."""
    rows = [("tank/a b", "1"), ("x\x1b[2J\n", "200")]
    lines = render.table(("NAME", "N"), rows, right=("N",))
    assert lines == ["NAME        N", "tank/a b    1", "x?[2J?    200"]


def test_json_values() -> None:
    """Times are ISO 8601 in UTC, dataclasses objects, paths text, and é stays é."""
    data = {"at": datetime(2026, 8, 1, tzinfo=UTC), "p": HALF, "path": Path("/é")}
    read = json.loads(render.to_json(data))
    assert read["at"] == "2026-08-01T00:00:00Z"
    assert read["p"]["percent"] == 50.4
    assert "é" in render.to_json(data)


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(), ""),
        (HALF, "50 %, 1.0 GiB of 2.0 GiB, 4 min 10 s left"),
        (Progress(bytes_done=5), "5 B"),
        (Progress(files_done=3), "3 files"),
    ],
)
def test_progress_words(progress: Progress, text: str) -> None:
    """Progress says what the client tells, and nothing that it does not."""
    assert render.progress_words(progress) == text


def test_plain_steps() -> None:
    """Without a terminal each step is one plain line."""
    stream = io.StringIO()
    with render.reporter(stderr=stream) as reporter:
        reporter.step("snapshot 2 datasets")
        reporter.note("tank/x is not in the backup")
        reporter.warn("slow")
        reporter.done("completed")
    assert stream.getvalue() == (
        "snapshot 2 datasets\nnote: tank/x is not in the backup\nwarning: slow\ncompleted\n"
    )


def test_plain_progress() -> None:
    """Without a terminal progress is shown at most once in ten minutes."""
    stream, clock = io.StringIO(), Clock()
    reporter = render.PlainReporter(stream, clock=clock)
    for _ in range(3600):
        reporter.progress(HALF)
        clock.now += 1
    assert stream.getvalue().count("50 %") == 5


def test_quiet() -> None:
    """Quiet leaves the warnings."""
    stream = io.StringIO()
    with render.reporter(quiet=True, stderr=stream) as reporter:
        reporter.step("a")
        reporter.note("b")
        reporter.warn("c")
        reporter.progress(HALF)
        reporter.done("d")
    assert stream.getvalue() == "warning: c\n"


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Under `--json` standard output has one object a line, and standard error nothing."""
    with render.reporter(as_json=True) as reporter:
        reporter.step("a\nb")
        reporter.result({"run": "7f"})
        reporter.done("completed")
    said = capsys.readouterr()
    kinds = [json.loads(line)["message_type"] for line in said.out.splitlines()]
    assert kinds == ["step", "result", "done"]
    assert said.err == ""


def test_json_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """Under `--json` progress comes at most once a second."""
    clock = Clock()
    reporter = render.JsonReporter(sys.stdout, clock=clock)
    for _ in range(50):
        reporter.progress(HALF)
        clock.now += 0.1
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 5
    assert json.loads(lines[0])["bytes_total"] == 2 << 30


def test_terminal(terminal: Terminal) -> None:
    """On a terminal a live line shows percent, bytes and the time left; steps stay above it."""
    with render.reporter(stderr=terminal.stream) as reporter:
        assert isinstance(reporter, render.TerminalReporter)
        reporter.step("run restic")
        reporter.progress(HALF)
        assert terminal.shows("50 %, 1.0 GiB of 2.0 GiB, 4 min 10 s left")
        reporter.step("[bold]unmount[/bold]")
        assert terminal.shows("[bold]unmount[/bold]")
        reporter.done("completed")
        assert terminal.shows("completed\r\n")
    assert terminal.screen.endswith("completed\r\n")


def test_no_thread(terminal: Terminal) -> None:
    """The live line has no thread of its own: the front end may fork beside it."""
    before = threading.active_count()
    with render.reporter(stderr=terminal.stream) as reporter:
        reporter.progress(HALF)
        assert threading.active_count() == before


def test_hung_up(terminal: Terminal) -> None:
    """A terminal that went away never stops a run, with a live line or without."""
    plain = render.PlainReporter(Gone())
    plain.step("a")
    plain.step("b")
    with render.reporter(stderr=terminal.stream) as live:
        live.progress(HALF)
        terminal.hang_up()
        live.progress(HALF)
        live.step("a")
        live.done("b")


def test_no_stderr() -> None:
    """A program started with standard error closed is silent."""
    render.PlainReporter(None).step("a")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("772a9c2d" + "0" * 56, "772a9c2d"),
        ("web1-home-1f3c9a12-2026-07-01T10:00:00Z", "web1-home-1f3c9a12-2026-07-01T10:00:00Z"),
        ("srv%2Fdata/20261121T030000Z-0123456789abcdef",) * 2,
        ("", ""),
    ],
)
def test_backup_id(given: str, shown: str) -> None:
    """A hash is cut, a name is not: the part of a name that is the same for all says nothing."""
    assert render.backup_id(given) == shown

"""What the service manager is told."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from atomtx import sdnotify
from atomtx.cli import render
from atomtx.clients import Progress


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """A service manager that listens, on a path or in the abstract namespace."""
    abstract = f"atomtx-test-{os.getpid()}"
    address = str(tmp_path / "notify") if request.param == "path" else f"\0{abstract}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        yield listener


def test_status(manager: socket.socket) -> None:
    """A status is one line of sd_notify(3), whatever the text has."""
    sdnotify.status("restic reads\n/home: 42 %")
    assert manager.recv(4096) == b"STATUS=restic reads /home: 42 %"


def test_nobody(tmp_path: Path) -> None:
    """A manager that is gone, or none at all, is no trouble."""
    for socket_path in ("", "relative", str(tmp_path / "gone"), "@gone"):
        sdnotify.status("x", {"NOTIFY_SOCKET": socket_path})
    assert not sdnotify.is_listened_to({})


def test_progress(manager: socket.socket) -> None:
    """Percent is told every few seconds, and printed every ten minutes."""
    now = 1000.0
    stream = io.StringIO()
    show = render.ServiceReporter(stream, clock=lambda: now)
    show.step("restic reads /home")
    assert manager.recv(4096) == b"STATUS=restic reads /home"
    told = []
    manager.setblocking(False)
    for second in range(1300):
        now = 1000.0 + second
        show.progress(Progress(percent=second / 13))
        try:
            told.append(manager.recv(4096).decode())
        except BlockingIOError:
            continue
    assert told[0] == "STATUS=restic reads /home: 0 %"
    assert len(told) == 1300 / render.STATUS_INTERVAL_S
    assert told[-1] == "STATUS=restic reads /home: 100 %"
    assert [line.strip() for line in stream.getvalue().splitlines()] == [
        "restic reads /home",
        "46 %",
        "92 %",
    ]


def test_reporter(manager: socket.socket) -> None:
    """A service gets the reporter that tells its manager."""
    assert isinstance(render.reporter(stderr=io.StringIO()), render.ServiceReporter)

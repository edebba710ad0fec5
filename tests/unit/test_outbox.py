"""Notices that are left for another process: nothing is lost, said twice, or written for others."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from atomtx import notices, outbox
from atomtx.errors import EffectError
from atomtx.notices import Event, Facts, NotifySettings

SETTINGS = NotifySettings(
    on=frozenset([Event.FAILED]),
    command=("tell", "me"),
    mail=("root",),
    ping_url="https://hc.example/secret",
    apprise=("json://secret",),
    time_limit_s=7.0,
)
NOTICE = notices.notice(Facts("nas", "home", datetime(2026, 7, 1, tzinfo=UTC)), str)


def test_parted() -> None:
    """Mail and command are for the outbox, each alone; pings and apprise are given at once."""
    now, later = outbox.parted(SETTINGS)
    assert (now.mail, now.command) == ((), ())
    assert (now.ping_url, now.apprise) == (SETTINGS.ping_url, SETTINGS.apprise)
    assert [(each.mail, each.command) for each in later] == [(("root",), ()), ((), ("tell", "me"))]
    assert all(each.on == SETTINGS.on and not each.has_ping for each in later)
    (nobody,) = outbox.parted(NotifySettings(ping_url="https://x"))[1]
    assert nobody.is_empty


def test_left(tmp_path: Path) -> None:
    """A letter comes back as it was left, the oldest first; no secret and no other reader."""
    for n, each in enumerate(outbox.parted(SETTINGS)[1]):
        outbox.leave(tmp_path, f"{n}", each, NOTICE, "unit 1")
    mail, command = outbox.letters(tmp_path)
    assert (mail.settings.mail, command.settings.command) == (("root",), ("tell", "me"))
    assert (mail.notice, mail.invocation, mail.settings.on) == (NOTICE, "unit 1", SETTINGS.on)
    folder = tmp_path / outbox.FOLDER
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    assert "secret" not in "".join(path.read_text() for path in folder.iterdir())


def test_damaged(tmp_path: Path) -> None:
    """What cannot be read is passed over, and keeps no other letter."""
    assert list(outbox.letters(tmp_path)) == []
    outbox.leave(tmp_path, "2", SETTINGS, NOTICE)
    (tmp_path / outbox.FOLDER / "1.json").write_text("{")
    (tmp_path / outbox.FOLDER / ".3").write_text("half a letter")
    (letter,) = outbox.letters(tmp_path)
    assert letter.path.name == "2.json"


def test_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody takes them out, they do not fill the disk."""
    monkeypatch.setattr(outbox, "MOST", 2)
    for n in range(2):
        outbox.leave(tmp_path, str(n), SETTINGS, NOTICE)
    with pytest.raises(EffectError, match="holds 2 notices already"):
        outbox.leave(tmp_path, "3", SETTINGS, NOTICE)

"""Notices that are left for another process: nothing is lost, said twice, or written for others."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from atomtx import notices, outbox
from atomtx.errors import EffectError, UserError
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


def test_parted_offline() -> None:
    """Before there is a network, pings and apprise wait as well; but no URL, which is a secret."""
    files = replace(SETTINGS, ping_url="", ping_url_file="/p", apprise=(), apprise_file="/a")
    now, later = outbox.parted(files, offline=True)
    assert now.is_empty
    assert [(e.apprise_file, e.ping_url_file) for e in later[2:]] == [("/a", ""), ("", "/p")]
    now, later = outbox.parted(SETTINGS, offline=True)
    assert (now.ping_url, now.apprise) == (SETTINGS.ping_url, SETTINGS.apprise)
    assert "secret" not in str([vars(each) for each in later])


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
    (tmp_path / outbox.FOLDER / "1.json").rename(tmp_path / outbox.FOLDER / ".1")
    outbox.leave(tmp_path, "2", SETTINGS, NOTICE)
    with pytest.raises(EffectError, match="holds 2 notices already"):
        outbox.leave(tmp_path, "3", SETTINGS, NOTICE)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter for which there is no room is told, and leaves no half of it."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EffectError, match="No space left"):
        outbox.leave(tmp_path, "1", SETTINGS, NOTICE)
    assert list((tmp_path / outbox.FOLDER).iterdir()) == []


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_tidy(tmp_path: Path) -> None:
    """What is unreadable is set aside and told; halves and old traces go, what is young stays."""
    outbox.leave(tmp_path, "1", SETTINGS, NOTICE)
    folder = tmp_path / outbox.FOLDER
    (folder / "2.json").write_text("{")
    for name in (".3", "given-b", "old.bad", ".4", "given-c", "given-own", "5.bad"):
        (folder / name).write_text("half a letter")
    for name in (".3", "given-b", "old.bad"):
        age(folder / name, 15 * 86400)
    assert outbox.tidy(tmp_path, "own") == [f"nobody can read {folder / '2.bad'}"]
    left = {path.name for path in folder.iterdir()}
    assert left == {"1.json", "2.bad", ".4", "given-c", "5.bad"}
    assert outbox.tidy(tmp_path) == []


def test_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gives at a time; a unit whose letter another gave has spoken all the same."""
    outbox.leave(tmp_path, "1", SETTINGS, NOTICE, "a")
    with outbox.giving(tmp_path) as first, outbox.giving(tmp_path, 0) as second:
        assert (first, second) == (True, False)
    (letter,) = outbox.letters(tmp_path)
    assert (letter.is_for("a"), letter.is_for("b")) == (True, False)
    assert outbox.has_spoken(tmp_path, "a")
    outbox.remove(letter, "b")
    outbox.remove(letter, "b")
    assert list(outbox.letters(tmp_path)) == []
    assert outbox.has_spoken(tmp_path, "a")
    assert not outbox.has_spoken(tmp_path, "b")
    outbox.leave(tmp_path, "2", SETTINGS, NOTICE, "c")
    age(tmp_path / outbox.FOLDER / "2.json", outbox.OWN_FIRST_S + 1)
    (letter,) = outbox.letters(tmp_path)
    assert letter.is_for("b")
    age(tmp_path / outbox.FOLDER / "2.json", 120)
    (letter,) = outbox.letters(tmp_path)
    monkeypatch.setattr(time, "monotonic", lambda: 180.0)
    assert not letter.is_for("b")
    monkeypatch.setattr(time, "monotonic", lambda: 60.0)  # since the boot
    assert letter.is_for("b")
    outbox.remove(letter, "c")
    assert not outbox.has_spoken(tmp_path, "c")


@pytest.mark.parametrize("which", ["state", "outbox", "owner", "link"])
def test_others(tmp_path: Path, which: str) -> None:
    """Where others could have put a letter in, with its command, none is given."""
    state = tmp_path / "state"
    state.mkdir(0o700)
    outbox.leave(state, "1", SETTINGS, NOTICE)
    with outbox.giving(state) as ours:
        assert ours
    if which == "state":
        state.chmod(0o770)
    elif which == "outbox":
        (state / outbox.FOLDER).chmod(0o755)
    elif which == "owner":
        if os.geteuid():
            pytest.skip("only root gives a directory away")
        os.chown(state / outbox.FOLDER, 1000, -1)
    else:
        (state / outbox.FOLDER).rename(tmp_path / "elsewhere")
        (state / outbox.FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError), outbox.giving(state):
        pytest.fail("it was given")

"""
Notices that another process is to give: a file each, in the state directory's `outbox`.

The hardened service of a backup cannot send a mail, because the programs for it are set-group-id
and write where the service may not.  So it leaves the notice here, and a unit of its own takes it
out.  A notice is lost by no crash: it is durable before the command ends, and removed when it
was given.

    N.json              a letter
    .N                  one that was never finished
    N.bad               one that nobody can read
    given-INVOCATION    that start of a unit has spoken, though its own `notify` has given nothing

Who gives holds flock(2) on the folder, for which no full disk leaves no room.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import locks
from .errors import EffectError, UserError
from .notices import Event, Notice, NotifySettings
from .statedir import sync_directory, write_new

FOLDER = "outbox"
VARIABLE = "ATOMTX_NOTIFY_LATER"  # set in the units: mails and commands are for the outbox
MOST = 100  # where nobody empties it
OWN_FIRST_S = 20 * 60.0  # the start of a unit that left a letter gives it itself, within this
OLDEST_S = 14 * 86400.0
WAIT_S = 300.0  # within the time limit of atomtx-notify@.service
_TRACE_S = 86400.0
_GIVEN = "given-"
_UNFINISHED = ".[0-9]*"
_SINCE_S = 3600.0  # longer than anybody writes


@dataclass(frozen=True)
class Letter:
    """What lies in the outbox: a notice, who wants it, and which start of a unit wrote it."""

    path: Path
    invocation: str
    settings: NotifySettings
    notice: Notice
    written_s: float

    @property
    def is_too_old(self) -> bool:
        """Tell whether it is given up where it cannot be given; a late ping tells what was."""
        return self.settings.has_ping or time.time() - self.written_s > OLDEST_S

    def is_for(self, invocation: str) -> bool:
        """
        Tell whether the `notify` of that start of a unit gives it, or leaves it to another's.

        One of before the boot is nobody's: a shutdown may have kept its own from starting.
        """
        own_first_s = min(OWN_FIRST_S, time.monotonic())
        is_young = 0 <= time.time() - self.written_s < own_first_s
        return self.invocation in ("", invocation) or not is_young


def is_wanted() -> bool:
    """Tell whether another process gives our mails."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def parted(
    settings: NotifySettings, *, offline: bool = False
) -> tuple[NotifySettings, list[NotifySettings]]:
    """
    Return the settings for what is given at once, and those for what is left here.

    One for each notifier, so that one that fails repeats no other; at least one, which tells
    that the command has spoken for itself.  *offline*, before there is a network, also those whose
    URLs are in a file of their own: a URL is a secret, and is never written here.
    """
    now = replace(settings, command=(), mail=())
    if offline:
        now = replace(now, apprise_file="", ping_url_file="")
    later = replace(NotifySettings(), on=settings.on, time_limit_s=settings.time_limit_s)
    mail = replace(
        later,
        mail=settings.mail,
        mail_from=settings.mail_from,
        sendmail=settings.sendmail,
    )
    found = [mail, replace(later, command=settings.command)]
    if offline:
        found.append(replace(later, apprise_file=settings.apprise_file))
        status = settings.ping_exit_status
        found.append(replace(later, ping_url_file=settings.ping_url_file, ping_exit_status=status))
    return now, [each for each in found if not each.is_empty] or [later]


def leave(
    state: Path, name: str, settings: NotifySettings, notice: Notice, invocation: str = ""
) -> None:
    """
    Put a notice into the outbox, durable; *name* is the file's.

    Raises EffectError where it cannot be written, or where nobody takes them out.
    """
    folder = state / FOLDER
    body = {
        "invocation": invocation,
        "settings": {**asdict(settings), "on": sorted(settings.on)},
        "notice": {**asdict(notice), "events": sorted(notice.events)},
    }
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if len(_names(folder)) >= MOST:
            raise EffectError(f"{folder} holds {MOST} notices already: `atomtx notify` gives them")
        write_new(folder / f".{name}", json.dumps(body))
        (folder / f".{name}").replace(folder / f"{name}.json")
        sync_directory(folder)
    except OSError as exc:
        raise EffectError(f"cannot write into {folder}: {exc.strerror}") from exc


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".json"))


# -- taking them out ---------------------------------------------------------------------------


@contextmanager
def giving(state: Path, wait_s: float = WAIT_S) -> Iterator[bool]:
    """
    Keep others from giving notices for a block; False inside where another one gave all the time.

    Raises UserError where others than root could have put something in: letters hold commands.
    """
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(state / FOLDER, flags)
    except FileNotFoundError:
        yield True
        return
    except OSError as exc:
        raise UserError(f"cannot read {state / FOLDER}: {exc.strerror}") from exc
    try:
        _check(state, state.stat(), 0o022)
        _check(state / FOLDER, os.fstat(descriptor), 0o077)
        yield locks.wait_until(
            lambda: locks.try_lock(descriptor, fcntl.LOCK_EX), wait_s, step_s=0.2
        )
    finally:
        os.close(descriptor)


def _check(path: Path, info: os.stat_result, others: int) -> None:
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & others:
        raise UserError(
            f"{path} is refused: others could have put notices there",
            hint=f"look at what is in it, then: chown root {path}; chmod 700 {path}",
        )


def letters(state: Path) -> Iterator[Letter]:
    """Yield what lies there, the oldest first; what cannot be understood is passed over."""
    try:
        names = _names(state / FOLDER)
    except FileNotFoundError:
        return
    for name in names:
        with suppress(OSError, ValueError, KeyError, TypeError):  # of another version, or taken
            yield _letter(state / FOLDER / name)


def _letter(path: Path) -> Letter:
    with open(path, encoding="utf-8") as file:
        body: Mapping[str, Any] = json.load(file)
        written_s = os.fstat(file.fileno()).st_mtime
    settings, notice = dict(body["settings"]), dict(body["notice"])
    for names in ("command", "mail", "apprise"):
        settings[names] = tuple(settings.get(names, ()))
    settings["on"] = frozenset(map(Event, settings["on"]))
    notice["events"] = frozenset(map(Event, notice["events"]))
    return Letter(path, body["invocation"], NotifySettings(**settings), Notice(**notice), written_s)


def has_spoken(state: Path, invocation: str) -> bool:
    """Tell whether that start of a unit left a letter, given meanwhile or not."""
    # In this order: a letter that is given becomes the trace.
    left = any(letter.invocation == invocation for letter in letters(state))
    return left or (state / FOLDER / f"{_GIVEN}{invocation}").exists()


def remove(letter: Letter, invocation: str = "") -> None:
    """
    Remove a letter that was given, by the `notify` of that start of a unit; idempotent.

    One of another start becomes the trace of it, at once and with no need of space.
    """
    folder = letter.path.parent
    with suppress(FileNotFoundError):
        if letter.invocation in ("", invocation) or "/" in letter.invocation:
            letter.path.unlink()
        else:
            os.utime(letter.path)
            letter.path.replace(folder / f"{_GIVEN}{letter.invocation}")
    sync_directory(folder)


def tidy(state: Path, invocation: str = "") -> list[str]:
    """
    Remove traces that nobody needs, and what was never finished; set aside what is unreadable.

    Only while `giving`; idempotent.  Returns what somebody should know.  *invocation* is the
    start of a unit that has asked whether it had spoken.
    """
    folder, notes = state / FOLDER, []
    for name in _names(folder) if folder.is_dir() else ():
        try:
            _letter(folder / name)
        except (ValueError, KeyError, TypeError):
            bad = (folder / name).replace(folder / f"{name.removesuffix('.json')}.bad")
            notes.append(f"nobody can read {bad}")
        except OSError as exc:
            notes.append(f"cannot read {folder / name}: {exc.strerror}")
    for pattern, kept_s in ((_UNFINISHED, _SINCE_S), ("*.bad", OLDEST_S), (f"{_GIVEN}*", _TRACE_S)):
        for path in folder.glob(pattern):
            own = path.name == f"{_GIVEN}{invocation}"
            with suppress(FileNotFoundError):  # what was unfinished has its name now
                if own or time.time() - path.stat().st_mtime > kept_s:
                    path.unlink()
    return notes

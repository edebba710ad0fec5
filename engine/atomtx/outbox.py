"""
Notices that another process is to give: a file each, in the state directory's `outbox`.

The hardened service of a backup cannot send a mail, because the programs for it are set-group-id
and write where the service may not.  So it leaves the notice here, and a unit of its own takes it
out.  A notice is lost by no crash: it is durable before the command ends, and removed when it
was given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import EffectError
from .notices import Event, Notice, NotifySettings
from .statedir import sync_directory

FOLDER = "outbox"
VARIABLE = "ATOMTX_NOTIFY_LATER"  # set in the units: mails and commands are for the outbox
MOST = 100  # where nobody empties it


@dataclass(frozen=True)
class Letter:
    """What lies in the outbox: a notice, who wants it, and which start of a unit wrote it."""

    path: Path
    invocation: str
    settings: NotifySettings
    notice: Notice


def is_wanted(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether another process gives our mails."""
    return env.get(VARIABLE, "") not in ("", "0")


def parted(settings: NotifySettings) -> tuple[NotifySettings, list[NotifySettings]]:
    """
    Return the settings for what is given at once, and those for what is left here.

    One for each notifier, so that one that fails repeats no other; at least one, which tells
    that the command has spoken for itself.
    """
    now = replace(settings, command=(), mail=())
    later = replace(NotifySettings(), on=settings.on, time_limit_s=settings.time_limit_s)
    mail = replace(
        later,
        mail=settings.mail,
        mail_from=settings.mail_from,
        sendmail=settings.sendmail,
    )
    found = [mail, replace(later, command=settings.command)]
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
        if len(os.listdir(folder)) >= MOST:
            raise EffectError(f"{folder} holds {MOST} notices already: `atomtx notify` gives them")
        new = folder / f".{name}"
        with open(new, "w", encoding="utf-8", opener=_private) as file:
            json.dump(body, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(folder / f"{name}.json")
        sync_directory(folder)
    except OSError as exc:
        raise EffectError(f"cannot write into {folder}: {exc.strerror}") from exc


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def letters(state: Path) -> Iterator[Letter]:
    """Yield what lies there, the oldest first; what cannot be understood is passed over."""
    try:
        names = sorted(name for name in os.listdir(state / FOLDER) if name.endswith(".json"))
    except FileNotFoundError:
        return
    for name in names:
        path = state / FOLDER / name
        try:
            yield _letter(path, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):  # of another version, or taken
            continue


def _letter(path: Path, body: Mapping[str, Any]) -> Letter:
    settings, notice = dict(body["settings"]), dict(body["notice"])
    for names in ("command", "mail", "apprise"):
        settings[names] = tuple(settings.get(names, ()))
    settings["on"] = frozenset(map(Event, settings["on"]))
    notice["events"] = frozenset(map(Event, notice["events"]))
    return Letter(path, body["invocation"], NotifySettings(**settings), Notice(**notice))

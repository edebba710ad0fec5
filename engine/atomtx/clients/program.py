"""
A client as an installed program: its words, the options that the user adds, a question to it.

Options are read as the program itself reads them (restic: pflag, kopia: kingpin), because an
option that is not seen here, such as `-r` in `-vr REPO`, would be missing where it counts.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from .. import process
from ..credentials import thing_of
from ..errors import EffectError, UserError
from ..redact import check_arguments
from ..retention import check_one
from . import Settings

ASK_TIMEOUT_S = 60.0

# Words of Go's net, os and TLS packages, and of the clients, for what may be better later.
_TROUBLE = re.compile(
    r"connection (refused|reset|timed out|closed)|no such host|could not resolve|unreachable"
    r"|no route to host|broken pipe|i/o timeout|timed out|timeout|unexpected EOF|: EOF\b"
    r"|TLS handshake|deadline exceeded|already locked|no space left|input/output error"
    r"|read-only file system|stale (NFS )?file handle|quota exceeded|too many requests"
    r"|server response unexpected|(status|response|HTTP)\D{0,20}50[0234]\b|session.*failed"
    r"|cannot open storage|repository does not exist|unable to open (config file|repository)"
    r"|server unexpectedly closed|load\(<|save\(<",
    re.IGNORECASE,
)
_COUNT = re.compile(r"[0-9]+")
_NO_COUNT = ("--keep-within", "--keep-tag")  # rules whose value is a time, or a name
_HOPELESS = re.compile(
    r"wrong password|no key found|invalid repository password|empty password|unknown.* flag"
    r"|password prompt|resolving password failed|specify repository location|invalid backend",
    re.IGNORECASE,
)

# Where Go's time package looks, in this order (src/time/zoneinfo_unix.go).
_ZONE_FOLDERS = (
    "/usr/share/zoneinfo",
    "/usr/share/lib/zoneinfo",
    "/usr/lib/locale/TZ",
    "/etc/zoneinfo",
)


@dataclass(frozen=True)
class Option:
    """One option under its long name, or a word that is none: then *name* is empty."""

    name: str
    value: str | None = None

    @property
    def word(self) -> str:
        if not self.name:
            return self.value or ""
        return self.name if self.value is None else f"{self.name}={self.value}"


@dataclass(frozen=True)
class Syntax:
    """Which options a program has: *valued* ones take the next word where there is no `=`."""

    valued: frozenset[str]
    short: Mapping[str, str]  # "-r" -> "--repo"

    def parse(self, words: Sequence[str]) -> tuple[Option, ...]:
        """Read *words*; a :class:`UserError` where an option lacks its value."""
        return tuple(self._options(iter(words)))

    def _options(self, words: Iterator[str]) -> Iterator[Option]:
        for word in words:
            if word == "--":
                yield from (Option("", rest) for rest in words)
            elif word.startswith("--"):
                name, equals, value = word.partition("=")
                yield self._option(name, value if equals else None, words)
            elif word.startswith("-") and len(word) > 1:
                yield from self._cluster(word[1:], words)
            else:
                yield Option("", word)

    def _cluster(self, letters: str, words: Iterator[str]) -> Iterator[Option]:
        """Read `-vq`, `-rREPO`, `-r=REPO` or the beginning of `-r REPO`."""
        while letters:
            name = self.short.get(f"-{letters[0]}", f"-{letters[0]}")
            letters = letters[1:]
            if name in self.valued or letters.startswith("="):
                yield self._option(name, letters.removeprefix("=") or None, words)
                return
            yield Option(name)

    def _option(self, name: str, value: str | None, words: Iterator[str]) -> Option:
        if value is None and name in self.valued:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name} needs a value")
        return Option(name, value)


def refuse(options: Iterable[Option], reasons: Mapping[str, str], client: str) -> None:
    """Raise a :class:`UserError` for an option that would break a promise, with the reason."""
    for option in options:
        if not option.name:
            raise UserError(
                f"cannot pass {option.value!r} to {client}: atomtx itself names what to back up",
                hint="write the value of an option as --option=value",
            )
        if option.name in reasons:
            raise UserError(f"cannot pass {option.name} to {client}: {reasons[option.name]}")


def last_value(options: Iterable[Option], name: str) -> str | None:
    """Return the value of the option *name*; the last one counts."""
    return next((o.value for o in reversed(tuple(options)) if o.name == name), None)


_VERBS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "borg": [("create",)],
    "restic": [("backup",)],
    "kopia": [("snapshot", "create"), ("snapshot",)],
}


def program(settings: Settings, default: str) -> tuple[str, ...]:
    """
    Return the words that start the client: the wrapper's, or the program's own name.

    Without the verb of a backup at its end, as restomic and kopiatomic want it: a client has
    others, too, to be asked by.
    """
    words = settings.command or (default,)
    for verb in _VERBS.get(default, ()):
        if words[1:] and words[-len(verb) :] == verb:
            words = words[: -len(verb)]
            break
    first, *rest = words
    if "/" in first:
        first = os.path.normpath(os.path.join(settings.cwd, first))
    argv = (first, *rest)
    check_arguments(argv)
    return argv


def rules(
    words: Sequence[str], known: Collection[str], client: str, *, counts: Collection[str] = ()
) -> tuple[str, ...]:
    """
    Return rules of retention, each `--keep-...=value`; UserError for anything else.

    Nothing else may be among them: a bare word would be the name of a backup to forget.  *counts*
    are words that the client takes for a number.
    """
    found, left = [], list(words)
    while left:
        check_one(left[0])
        name, equals, value = left.pop(0).partition("=")
        if name not in known:
            raise UserError(
                f"{name} is no rule of retention for {client}",
                hint=f"its rules: {', '.join(sorted(known))}",
            )
        if not equals:
            value = left.pop(0) if left else ""
        if not value or value.startswith("-"):
            raise UserError(f"the rule {name} has no value", hint=f"such as {name} 7")
        if not (name.startswith(_NO_COUNT) or value in counts or _COUNT.fullmatch(value)):
            raise UserError(f"the rule {name}: {value!r} is no number", hint=f"such as {name} 7")
        found.append(f"{name}={value}")
    return tuple(found)


def keeping_some(rules: tuple[str, ...], client: str) -> tuple[str, ...]:
    """Return *rules*; UserError where each keeps nothing, which *client* refuses."""
    counts = [rule.partition("=")[2] for rule in rules if not rule.startswith(_NO_COUNT)]
    if rules and len(counts) == len(rules) and not any(count.strip("0") for count in counts):
        raise UserError(
            f"{client} refuses rules of retention that keep nothing: {' '.join(rules)}",
            hint="such as --keep-last=7",
        )
    return rules


def things(settings: Settings) -> frozenset[str]:
    """Return what the variables say, in whatever way; a credential that is not there yet, too."""
    names = (*(name for name, value in settings.env.items() if value), *dict(settings.credentials))
    return frozenset(map(thing_of, names))


def find(argv: Sequence[str], settings: Settings) -> None:
    """Raise a :class:`UserError` if the program is not installed."""
    if process.which(argv[0], settings.env) is None:
        raise UserError(
            f"{argv[0]} is not installed, or not in the PATH",
            hint="install it, or name it with --command",
        )


def ask(argv: Sequence[str], settings: Settings) -> process.Completed:
    """Run a short question to its end; a :class:`UserError` if it cannot be asked."""
    try:
        return process.run(argv, env=settings.env, cwd=settings.cwd, timeout_s=ASK_TIMEOUT_S)
    except EffectError as exc:
        text = settings.redact(exc.message)
        raise UserError(text, hint="can the repository be reached?") from exc


def message_of(line: str) -> dict[str, Any] | None:
    """Return the JSON object on *line*; None for any other text."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def document_of(text: str) -> dict[str, Any] | None:
    """Return the JSON object in *text*; a wrapper may print lines of its own around it."""
    return message_of(text[text.find("{") : text.rfind("}") + 1])


def objects_of(text: str) -> list[Any] | None:
    """
    Return the JSON list of objects in *text*, with lines of a wrapper around it; maybe none.

    None where one begins that cannot be read.
    """
    starts = [match.start() for match in re.finditer(r"\[\s*\{", text)]
    for start in starts:
        with suppress(ValueError):
            found: list[Any] = json.JSONDecoder().raw_decode(text, start)[0]
            return found
    return None if starts else []


def ended(status: int) -> str:
    """Say how a program ended."""
    if status >= 0:
        return f"exit status {status}"
    with suppress(ValueError):  # a real-time signal has no name
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


def was_killed(status: int | None) -> bool:
    """
    Tell whether a program, or the one that its wrapper started, was ended by SIGKILL.

    Somebody else did that, such as the kernel for want of memory: it says nothing of the backup.
    """
    return status in (-signal.SIGKILL, 128 + signal.SIGKILL)


def is_trouble(lines: Iterable[str]) -> bool:
    """Tell whether a failure is one of the network or the repository, worth another attempt."""
    text = "\n".join(lines)
    return bool(_TROUBLE.search(text)) and not _HOPELESS.search(text)


def absolute(paths: Iterable[str], cwd: str) -> tuple[str, ...]:
    """Return *paths* absolute and normal, each once."""
    return tuple(dict.fromkeys(os.path.normpath(os.path.join(cwd, path)) for path in paths))


def local_repository(location: str) -> str | None:
    """Return the path of a restic repository in the file system; None for any other."""
    if location.startswith("local:"):
        return location.removeprefix("local:")
    # restic takes a word with a colon for a path only if it begins like one.
    if ":" in location and not location.startswith(("/", "./", "../")):
        return None
    return location or None


def home_folder(env: Mapping[str, str], variable: str, below_home: str) -> Collection[str]:
    """Return the XDG folder that *variable* names, or its default in HOME; empty without both."""
    if env.get(variable):
        return (env[variable],)
    return (os.path.join(env["HOME"], below_home),) if env.get("HOME") else ()


def _zone(env: Mapping[str, str]) -> tzinfo | None:
    """
    Return the time zone that a Go program takes for the local one; None if it is not to be had.

    Not by `ZoneInfo(name)`: that may find a zone where Go does not, which then takes UTC.
    """
    name = env.get("TZ", "/etc/localtime").removeprefix(":")
    if name in ("", "UTC"):
        return UTC
    for path in [os.path.join(folder, name) for folder in _ZONE_FOLDERS]:
        try:
            with open(path, "rb") as file:
                return ZoneInfo.from_file(file)
        except (OSError, ValueError):
            continue
    return None


def local_time(at: datetime, env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """
    Return *at* as `--time` reads it, and what to set so that it is read so.

    The local zone is kept where it can be: restic's `forget` counts days in it.  A local time
    that happens twice, when clocks are put back, is given in UTC.
    """
    zone = _zone(env)
    local = at.astimezone(zone or UTC)
    again = local.replace(fold=1 - local.fold)
    if zone is None or local.utcoffset() != again.utcoffset():
        return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}", {"TZ": "UTC"}
    return f"{local:%Y-%m-%d %H:%M:%S}", {}

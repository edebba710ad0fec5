"""Values in words, for people: sizes, time spans, ages, one-line text; and spans read.  Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from .errors import UserError

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
SPAN = re.compile(r"(\d{1,9})([smhdwy]?)")
SHARE = re.compile(r"([1-9]\d{0,2})%")
SIZE = re.compile(r"([1-9]\d{0,8})([KMGT])")
UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "y": 31_557_600}
MOST_YEARS = 10_000  # systemd and SQLite count microseconds, in 64 bits


def size(count: int | None) -> str:
    """Return a number of bytes for people: "1.4 GiB"; "-" for None."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in _UNITS:
        value /= 1024
        if value < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Return a time span for people: "0.4 s", "3 min 05 s"; "-" for None."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for unit, below, large, small in ((60, 3600, "min", "s"), (3600, 86400, "h", "min")):
        if whole < below:
            return f"{whole // unit} {large} {whole % unit // (unit // 60):02d} {small}"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def age(then: datetime | None, now: datetime | None = None) -> str:
    """Return how long ago *then* was, in one unit: "5 min"; a time in the future is "now"."""
    if then is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    for below, unit, name in ((3600, 60, "min"), (172_800, 3600, "h")):
        if seconds < below:
            return f"{int(seconds // unit)} {name}" if seconds >= unit else "now"
    days = int(seconds // 86400)
    return f"{days} d" if days < 730 else f"{days // 365} y"


def local_time(then: datetime | None, *, seconds: bool = False) -> str:
    """Return a time as the clock on the wall shows it; "-" for None."""
    if then is None:
        return "-"
    return then.astimezone().strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def creation_time(seconds: int) -> datetime:
    """
    Return a snapshot's time of creation in local time, whose days are those that people mean.

    One that there cannot be counts as ahead: a stream brings what its sender says.
    """
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone()
    except (OSError, OverflowError, ValueError):  # time_t of a machine, the years of Python
        return datetime.max.replace(tzinfo=UTC)


def printable(text: str) -> str:
    """Return *text* in one line without control characters: a name must not drive a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def seconds(text: str) -> int:
    """Read a time such as "90", "15m", "6h", "2d", "1y"; UserError for what is none, or longer."""
    match = SPAN.fullmatch(text.strip())
    if not match:
        raise UserError(f"{text!r} is not a time", hint="such as 90s, 15m, 6h, 2d, 4w, 1y")
    found = int(match[1]) * UNITS_S[match[2]]
    if found > MOST_YEARS * UNITS_S["y"]:
        raise UserError(f"{text!r} is too long a time", hint=f"at most {MOST_YEARS}y")
    return found


def bytes_of(text: str) -> int:
    """Read a size such as "512M", "10G", in powers of 1024."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise UserError(f"{text!r} is not a size", hint="such as 512M, 10G")
    return int(match[1]) << 10 * ("KMGT".index(match[2]) + 1)

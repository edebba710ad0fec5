"""
The names of kept snapshots: a prefix, and when they were taken, in UTC.  Pure.

A name is for people, and for those who look for the snapshots of a time.  It is never proof of
whose a snapshot is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from .errors import UserError
from .names import Dataset, RunId, Snapshot, kept_name

PATTERN = "atomtx-%Y%m%d%H%M"

# The words of strftime that have one width and no language: how wide, and what they show.
_WORDS: dict[str, tuple[int, Callable[[datetime], int]]] = {
    "Y": (4, lambda at: at.year),
    "m": (2, lambda at: at.month),
    "d": (2, lambda at: at.day),
    "j": (3, lambda at: at.timetuple().tm_yday),
    "H": (2, lambda at: at.hour),
    "M": (2, lambda at: at.minute),
    "S": (2, lambda at: at.second),
}
_SHORT = {"%F": "%Y-%m-%d", "%R": "%H:%M", "%T": "%H:%M:%S"}
_WORD = re.compile(r"%(.?)", re.DOTALL)
_LITERAL = re.compile(r"[A-Za-z0-9_.: -]")
_ENDS = re.compile(r"[A-Za-z0-9_:].*[^ ]", re.DOTALL)

_ZFS = re.compile(r"[A-Za-z0-9_.: -]+")  # module/zcommon/zfs_namecheck.c


@dataclass(frozen=True)
class Pattern:
    """How kept snapshots are named: *text* has no words of strftime but `_WORDS`."""

    text: str

    @classmethod
    def parse(cls, text: str = PATTERN) -> Pattern:
        """
        Check a pattern: literal text, and words of strftime.

        A :class:`UserError` says what no name can hold, which word is unknown, and what is
        missing for the name to tell the minute.  A pattern whose names could be those of runs is
        refused.
        """
        whole = text
        for short, long in _SHORT.items():
            whole = whole.replace(short, long)
        _check_words(whole, text)
        _check_characters(whole)
        pattern = cls(whole)
        if _is_like_a_run(format(pattern, datetime(2000, 1, 1, tzinfo=UTC))):
            raise UserError(
                f"the pattern {whole!r} makes names that could be those of a run",
                hint="put a letter such as T between the date and the time",
            )
        return pattern


def format(pattern: Pattern, when: datetime) -> str:
    """Return the name of a snapshot that was taken at *when*, which is aware."""
    assert when.tzinfo
    at = when.astimezone(UTC)

    def shown(match: re.Match[str]) -> str:
        width, value = _WORDS[match[1]]
        return f"{value(at):0{width}}"

    return _WORD.sub(shown, pattern.text)


def parse(pattern: Pattern, name: str) -> datetime | None:
    """
    Return when the snapshot was taken, in UTC; None where *name* is not of the convention.

    It is of the convention only if that time has exactly this name.
    """
    match = _compiled(pattern.text).fullmatch(name)
    if not match:
        return None
    found = {word: int(digits) for word, digits in match.groupdict().items()}
    try:
        when = datetime(
            found["Y"],
            found.get("m", 1),
            found.get("d", 1),
            found["H"],
            found["M"],
            found.get("S", 0),
            tzinfo=UTC,
        )
        if "m" not in found or "d" not in found:
            when = when.replace(month=1, day=1) + timedelta(days=found["j"] - 1)
    except (ValueError, OverflowError):
        return None
    return when if format(pattern, when) == name else None


def is_of(pattern: Pattern, snapshot: str, origin: str = "") -> bool:
    """Tell whether a snapshot, by its whole name, is of the convention; of LVM by its *origin*."""
    return parse(pattern, kept_name(snapshot, origin)) is not None


class NameTakenError(UserError):
    """There is a snapshot of that name already; a later one is *free_at* that time."""

    def __init__(self, name: str, free_at: datetime, *, hint: str) -> None:
        super().__init__(f"there is a snapshot {name!r} already", hint=hint)
        self.free_at = free_at


def fresh(pattern: Pattern, when: datetime, taken: Collection[str]) -> str:
    """
    Return the name for *when*; a :class:`NameTakenError` if it is among *taken*.

    *taken* are the names on all volumes of the moment, which gets one name on all of them.  A
    second snapshot in the same minute is refused, not given a suffix: a name would no longer tell
    one time, two volumes of a moment could get two names, and a timer that went wild would fill
    the pool in silence.  Who wants more of them says so with %S.
    """
    name = format(pattern, when)
    if name not in taken:
        return name
    if "%S" in pattern.text:
        free_at, hint = when.replace(microsecond=0) + timedelta(seconds=1), "try again in a second"
    else:
        free_at = when.replace(second=0, microsecond=0) + timedelta(minutes=1)
        hint = "wait for the next minute (--wait), or add %S to the pattern"
    raise NameTakenError(name, free_at, hint=hint)


def snapshot_of(dataset: str, name: str) -> Snapshot:
    """Return the snapshot of that name; a :class:`UserError` if ZFS cannot have it."""
    if not _ZFS.fullmatch(name):
        raise UserError(
            f"ZFS cannot have a snapshot named {name!r}",
            hint="letters, digits, and _ . : - and the space are allowed",
        )
    return Snapshot(Dataset(dataset), name).check()


# -- patterns ----------------------------------------------------------------------------------


def _check_words(whole: str, text: str) -> None:
    """Check that a pattern has none but known words, and those that tell a minute."""
    words = _WORD.findall(whole)
    for word in words:
        if word not in _WORDS:
            known = ", ".join(f"%{each}" for each in _WORDS)
            raise UserError(
                f"the pattern {text!r} holds '%{word}'", hint=f"{known}, %F, %R and %T are known"
            )
    needed = "YjHM" if "j" in words else "YmdHM"
    if missing := [f"%{word}" for word in needed if word not in words]:
        raise UserError(
            f"the names of {text!r} do not tell the minute: no {', no '.join(missing)}",
            hint=f"such as {PATTERN}",
        )


def _check_characters(whole: str) -> None:
    """Check the literal text of a pattern."""
    for char in _WORD.sub("", whole):
        if not _LITERAL.fullmatch(char):
            raise UserError(
                f"the pattern {whole!r} holds {char!r}, which cannot be in a snapshot's name",
                hint="letters, digits, and _ . : - and the space can",
            )
    if not _ENDS.fullmatch(_WORD.sub("0", whole)):
        raise UserError(
            f"the pattern {whole!r} begins or ends with what is easily mistaken",
            hint="a name begins with no '-', '.' or space, and ends with no space",
        )


def _is_like_a_run(name: str) -> bool:
    """Tell whether *name* is, but for its digits, what a run calls its snapshots: `names`."""
    return RunId.from_token("-".join(name.split("-")[:2])) is not None


@lru_cache
def _compiled(text: str) -> re.Pattern[str]:
    """Return what matches the names of a pattern; a word that comes again is the same again."""
    found, seen = [], set()
    for n, part in enumerate(re.split(r"%(.)", text)):
        if n % 2 == 0:
            found.append(re.escape(part))
        elif part in seen:
            found.append(f"(?P={part})")
        else:
            found.append(f"(?P<{part}>[0-9]{{{_WORDS[part][0]}}})")
            seen.add(part)
    return re.compile("".join(found))

"""
Which kept snapshots of one volume stay, by restic's rules.  Pure.

The rules, their order and their words are those of restic 0.18 and later
(internal/data/snapshot_policy.go); 0.16 keeps the same snapshots.  From the newest to the oldest:

- keep-last keeps as many as it says; keep-hourly to keep-yearly the newest of as many hours,
  days, ISO weeks, months, years.  A period without a snapshot is not counted.
- keep-within keeps all that are younger than its time before the newest, keep-within-hourly to
  keep-within-yearly the newest of each such period in that time.  The clock is asked for one
  thing: a snapshot in its future is not the newest.
- Where a rule has room left at the oldest, that one is kept too.

Hours, days and so on are those of each snapshot's own time zone, and so are the days and months
that keep-within goes back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from typing import Any

from .errors import UserError

UNLIMITED = -1
_COUNT = re.compile(r"[0-9]{1,18}")
_DURATION = re.compile(r"(?:[0-9]{1,9}[ymdh])+")
_PART = re.compile(r"([0-9]+)([ymdh])")


class Exemption(StrEnum):
    """Why a snapshot must stay, whatever the rules say."""

    HELD = "held"
    CLONED = "origin of a clone"
    READ = "its moment is read by a run"
    OPEN = "the run that took it has not ended"
    UNSAVED = "not saved in"
    AHEAD = "in the future of this machine's clock"


@dataclass(frozen=True)
class Exempt:
    """One reason to stay; *by* names the hold, the clone, or the job that has not saved it."""

    why: Exemption
    by: str = ""

    def __str__(self) -> str:
        between = " " if self.why is Exemption.UNSAVED else ": "
        return f"{self.why}{between}{self.by}" if self.by else self.why.value


@dataclass(frozen=True)
class Item:
    """A kept snapshot: its name, its time in the zone whose days count, why it must stay."""

    name: str
    at: datetime
    exempt: tuple[Exempt, ...] = ()

    def __post_init__(self) -> None:
        assert self.at.tzinfo, f"the time of {self.name} has no zone"


@dataclass(frozen=True)
class Verdict:
    """Whether a snapshot stays, and all reasons why; none where it goes."""

    item: Item
    keep: bool
    reasons: tuple[str, ...]

    @property
    def unsaved_in(self) -> tuple[str, ...]:
        """The jobs that are to save it, and have not yet."""
        return tuple(each.by for each in self.item.exempt if each.why is Exemption.UNSAVED)

    @property
    def is_waiting(self) -> bool:
        """Whether it stays for nothing but that it is not saved yet."""
        return self.keep and len(self.reasons) == len(self.unsaved_in)


@dataclass(frozen=True)
class Duration:
    """A time such as ``1y5m7d2h``: m is a month; a year, a month and a day are the calendar's."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    @classmethod
    def parse(cls, text: str) -> Duration:
        """
        Read a time as restic does; ValueError says what is wrong with it.

        What restic guesses at is refused: an empty text, which it takes for no rule, and a unit
        that is given twice, of which it takes the last.
        """
        if not _DURATION.fullmatch(text.strip()):
            raise ValueError("is not a time such as 1y5m7d2h")
        parts = _PART.findall(text)
        found = {unit: int(number) for number, unit in parts}
        if len(found) < len(parts):
            raise ValueError("has a unit twice")
        return cls(**{each.name: found.get(each.name[0], 0) for each in fields(cls)})

    def before(self, then: datetime) -> datetime | None:
        """Return the instant, in UTC, this long before *then*; None before the year 1."""
        months = then.year * 12 + then.month - 1 - self.years * 12 - self.months
        try:
            first = datetime(months // 12, months % 12 + 1, 1)
            wall = datetime.combine(first, then.time()) + timedelta(days=then.day - 1 - self.days)
            return _instant(wall, then.tzinfo) - timedelta(hours=self.hours)
        except (OverflowError, ValueError):
            return None

    def __str__(self) -> str:
        parts = ((getattr(self, each.name), each.name[0]) for each in fields(self))
        return "".join(f"{number}{unit}" for number, unit in parts if number)


_NO_TIME = Duration()


@dataclass(frozen=True)
class Policy:
    """The rules: how many of each period to keep, 0 for none; and within which time."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration = _NO_TIME
    within_hourly: Duration = _NO_TIME
    within_daily: Duration = _NO_TIME
    within_weekly: Duration = _NO_TIME
    within_monthly: Duration = _NO_TIME
    within_yearly: Duration = _NO_TIME

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> Policy:
        """
        Read the options by their names without hyphens before them, such as ``keep-daily``.

        A :class:`UserError` says which one is wrong.  No option at all is an empty policy, which
        :func:`decide` refuses.
        """
        if unknown := sorted(values.keys() - OPTIONS):
            raise UserError(
                f"{unknown[0]!r} is not a rule of retention", hint=f"one of {', '.join(OPTIONS)}"
            )
        found: dict[str, Any] = {
            name.removeprefix("keep-").replace("-", "_"): _value_of(name, text)
            for name, text in values.items()
        }
        return cls(**found)

    @property
    def is_empty(self) -> bool:
        """Tell whether no rule keeps anything."""
        return self == Policy()


OPTIONS = tuple(f"keep-{each.name.replace('_', '-')}" for each in fields(Policy))


def decide(
    items: Iterable[Item], policy: Policy, *, now: datetime, by_time: bool = True
) -> tuple[Verdict, ...]:
    """
    Return a verdict on each of *items*, which are all of one volume, the newest first.

    Of equal times, and without *by_time* of any, the one that comes first in *items* counts as the
    newer.  An exempt one takes its place in the rules like any other.  *now* is aware.  Raises
    UserError for a policy that is empty: "keep nothing" is never what somebody forgot to say.
    """
    if policy.is_empty:
        raise UserError(
            "no rule says which snapshots to keep, so none is destroyed",
            hint="such as --keep-daily 7",
        )
    # In UTC, because times that share a zone are compared by their clocks on the wall.
    order = list(items)
    if by_time:
        order.sort(key=lambda item: item.at.astimezone(UTC), reverse=True)
    rules = tuple(_rules(policy, _newest(order, now)))
    verdicts = []
    for nr, item in enumerate(order):
        is_oldest = nr == len(order) - 1
        found = [rule.judge(item.at, nr, is_oldest=is_oldest) for rule in rules]
        reasons = (*map(str, item.exempt), *filter(None, found))
        verdicts.append(Verdict(item, bool(reasons), reasons))
    return tuple(verdicts)


def words(rules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each of some rules as `Policy.parse` takes them: ``--keep-daily 7``, or with ``=``."""
    rest = iter(rules)
    for word in rest:
        check_one(word)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise UserError(f"{word!r} is no rule", hint="such as --keep-daily 7")
        found = value if equals else next(rest, None)
        if found is None:
            raise UserError(f"{word} has no value", hint="such as --keep-daily 7")
        yield name.removeprefix("--"), found


def check_one(word: str) -> None:
    """Raise a UserError for a rule that was written as one word with its value."""
    name, *values = word.split() or [""]
    if values and name.startswith("--") and "=" not in name:
        count = "two" if len(values) == 1 else len(values) + 1
        parts = ", ".join(f'"{part}"' for part in (name, *values))
        raise UserError(f'"{word}" is one word; write it as {count} words: {parts}')


# -- rules -------------------------------------------------------------------------------------

_Period = Callable[[datetime, int], Any]


def _each(at: datetime, nr: int) -> Any:
    return nr


def _hour(at: datetime, nr: int) -> Any:
    return at.date(), at.hour


def _day(at: datetime, nr: int) -> Any:
    return at.date()


def _week(at: datetime, nr: int) -> Any:
    return at.isocalendar()[:2]


def _month(at: datetime, nr: int) -> Any:
    return at.year, at.month


def _year(at: datetime, nr: int) -> Any:
    return at.year


_PERIODS: dict[str, _Period] = {
    "hourly": _hour,
    "daily": _day,
    "weekly": _week,
    "monthly": _month,
    "yearly": _year,
}


@dataclass
class _Rule:
    """One rule on its way from the newest to the oldest."""

    reason: str
    period: _Period
    left: int = UNLIMITED
    after: datetime | None = None  # None: as long ago as may be
    last: Any = field(default=None, init=False)  # the period of what was kept last

    def judge(self, at: datetime, nr: int, *, is_oldest: bool) -> str | None:
        """Return the reason why this rule keeps the snapshot, or None."""
        if not self.left or (self.after and at.astimezone(UTC) <= self.after):
            return None
        period = self.period(at, nr)
        is_new = period != self.last
        if not is_new and not is_oldest:
            return None
        self.last = period
        if self.left != UNLIMITED:
            self.left -= 1
        return self.reason if is_new else f"oldest {self.reason}"


def _rules(policy: Policy, newest: datetime | None) -> Iterator[_Rule]:
    """Yield the rules in the order in which restic names them."""

    def within(rule: str, period: _Period, duration: Duration) -> Iterator[_Rule]:
        if duration != _NO_TIME:
            after = duration.before(newest) if newest else None
            yield _Rule(f"{rule} {duration}", period, after=after)

    yield from within("within", _each, policy.within)
    yield _Rule("last snapshot", _each, policy.last)
    for name, period in _PERIODS.items():
        yield _Rule(f"{name} snapshot", period, getattr(policy, name))
    for name, period in _PERIODS.items():
        yield from within(f"{name} within", period, getattr(policy, f"within_{name}"))


def _newest(order: Iterable[Item], now: datetime) -> datetime | None:
    """Return the newest time that is not in the future; None where all are, as all count then."""
    present = now.astimezone(UTC)
    return next((item.at for item in order if item.at.astimezone(UTC) < present), None)


def _instant(wall: datetime, zone: tzinfo | None) -> datetime:
    """
    Return when a clock on the wall shows *wall*, in UTC.

    Where the clocks are put, this is what Go's time.Date makes of an hour that comes twice or
    never, because restic goes back with it.
    """
    utc = wall.replace(tzinfo=UTC)
    offset = _offset(utc, zone)
    return utc - _offset(utc - offset, zone) if offset else utc


def _offset(utc: datetime, zone: tzinfo | None) -> timedelta:
    offset = utc.astimezone(zone).utcoffset()
    assert offset is not None
    return offset


# -- options -----------------------------------------------------------------------------------


def _value_of(option: str, text: str) -> int | Duration:
    """Read the value of one option."""
    if not option.startswith("keep-within"):
        return _count(option, text)
    try:
        return Duration.parse(text)
    except ValueError as exc:
        raise UserError(
            f"{option}: {text!r} {exc}", hint="y, m (months), d and h, each once, such as 1y5m7d2h"
        ) from exc


def _count(option: str, text: str) -> int:
    """Read a number of snapshots; "-1" is refused, as restic does."""
    if text == "unlimited":
        return UNLIMITED
    if not _COUNT.fullmatch(text):
        raise UserError(
            f"{option}: {text!r} is not a number of snapshots",
            hint='a whole number from 0 on, or "unlimited"',
        )
    return int(text)

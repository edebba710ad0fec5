"""Which snapshots stay: each rule, the oldest, the exempt; and options that make no sense."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.errors import UserError
from atomtx.retention import (
    OPTIONS,
    UNLIMITED,
    Duration,
    Exempt,
    Exemption,
    Item,
    Policy,
    decide,
    words,
)

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
# Two an hour for two hours, two an evening for two days; 2020 has a week 53, to 3 January 2021.
TIMES = (
    "2021-01-05T12:30",
    "2021-01-05T12:00",
    "2021-01-05T11:30",
    "2021-01-05T11:00",
    "2021-01-04T20:00",
    "2021-01-04T19:00",
    "2021-01-03T20:00",
    "2021-01-03T19:00",
    "2020-12-28T19:00",
    "2020-12-27T19:00",
    "2020-11-30T19:00",
    "2019-12-30T19:00",
)
HISTORY = tuple(Item(text, datetime.fromisoformat(text).replace(tzinfo=UTC)) for text in TIMES)


def policy(words: str) -> Policy:
    """Return the policy of options in the form ``daily=7 within=3d``."""
    given = dict(word.split("=") for word in words.split())
    return Policy.parse({f"keep-{name}": text for name, text in given.items()})


def reasons(words: str, items: tuple[Item, ...] = HISTORY) -> dict[str, tuple[str, ...]]:
    """Return of each snapshot that stays the reasons."""
    verdicts = decide(items, policy(words), now=NOW)
    assert all(verdict.keep == bool(verdict.reasons) for verdict in verdicts)
    return {verdict.item.name: verdict.reasons for verdict in verdicts if verdict.keep}


def kept(words: str) -> list[int]:
    """Return the places in the history of what stays."""
    return [TIMES.index(name) for name in reasons(words)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("last=1", [0]),
        ("last=3", [0, 1, 2]),
        ("last=unlimited", [*range(12)]),
        ("hourly=3", [0, 2, 4]),
        ("daily=3", [0, 4, 6]),
        ("weekly=3", [0, 6, 9]),
        ("monthly=3", [0, 8, 10]),
        ("yearly=2", [0, 8]),
        ("within=1h", [0, 1]),  # not what is exactly an hour older than the newest
        ("within=1d", [0, 1, 2, 3, 4, 5]),
        ("within=1d1h", [0, 1, 2, 3, 4, 5]),
        ("within=1m9d", [*range(11)]),
        ("within=1y", [*range(11)]),
        ("within-hourly=2h", [0, 2]),
        ("within-daily=2d", [0, 4, 6]),
        ("within-weekly=8d", [0, 6]),
        ("within-monthly=1m", [0, 8]),
        ("within-yearly=1y", [0, 8]),
        ("last=1 yearly=2", [0, 8]),
        ("last=0 daily=1", [0]),
        ("within=0d daily=1", [0]),
    ],
)
def test_each_rule(words: str, expected: list[int]) -> None:
    """Each rule keeps what it names, and the newest of each period."""
    assert kept(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("last=1", {0: ("last snapshot",)}),
        (
            "yearly=9 daily=1",
            {
                0: ("daily snapshot", "yearly snapshot"),
                8: ("yearly snapshot",),
                11: ("yearly snapshot",),
            },
        ),
        (
            "within=1h within-yearly=2y1h last=1",
            {
                0: ("within 1h", "last snapshot", "yearly within 2y1h"),
                1: ("within 1h",),
                8: ("yearly within 2y1h",),
                11: ("yearly within 2y1h",),
            },
        ),
    ],
)
def test_reasons(words: str, expected: dict[int, tuple[str, ...]]) -> None:
    """Every reason is given, in restic's words and in its order."""
    assert reasons(words) == {TIMES[n]: found for n, found in expected.items()}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("monthly=4", "oldest monthly snapshot"),
        ("monthly=unlimited", "oldest monthly snapshot"),
        ("within-monthly=1y", "oldest monthly within 1y"),
    ],
)
def test_oldest(words: str, reason: str) -> None:
    """A rule with room left keeps the oldest as well: history begins there."""
    assert reasons(words, HISTORY[:10])[TIMES[9]] == (reason,)


@pytest.mark.parametrize("words", ["monthly=2", "within-monthly=8d"])
def test_oldest_without_room(words: str) -> None:
    """A rule that is used up, or does not reach as far, leaves the oldest alone."""
    assert TIMES[9] not in reasons(words, HISTORY[:10])


def test_future() -> None:
    """A snapshot from the future is not the newest for the rules of time, else all would go."""
    future = Item("future", datetime(2090, 1, 1, tzinfo=UTC))
    found = reasons("within=1d", (future, *HISTORY))
    assert list(found) == ["future", *TIMES[:6]]
    assert reasons("within=1h", (future,)) == {"future": ("within 1h",)}
    at_now = Item("at now", NOW)
    assert list(reasons("within=1h", (at_now, *HISTORY))) == ["at now", *TIMES[:2]]


def test_equal_times() -> None:
    """Of equal times the first that was given is the newer, so a decision can be repeated."""
    two = tuple(Item(name, NOW) for name in "ab")
    assert reasons("last=1", two) == {"a": ("last snapshot",)}
    assert reasons("last=1", two[::-1]) == {"b": ("last snapshot",)}


def test_order() -> None:
    """Verdicts come from the newest to the oldest, however the snapshots are given."""
    mixed = (*HISTORY[5:], *HISTORY[:5])
    assert [v.item.name for v in decide(mixed, policy("last=2"), now=NOW)] == [*TIMES]


def test_zones() -> None:
    """A day is that of the snapshot's own zone."""
    times = (datetime(2024, 7, 1, 23, 30, tzinfo=UTC), datetime(2024, 7, 2, 0, 30, tzinfo=UTC))
    there = ZoneInfo("Asia/Kathmandu")
    for zone, reason in ((UTC, "daily snapshot"), (there, "oldest daily snapshot")):
        items = tuple(Item(str(at), at.astimezone(zone)) for at in times)
        assert reasons("daily=9", items)[str(times[0])] == (reason,)


@pytest.mark.parametrize("rule", ["hourly", "daily", "weekly", "monthly"])
def test_numbers_that_come_again(rule: str) -> None:
    """The same hour, day, week or month by its number is another one in another year."""
    items = tuple(Item(str(year), datetime(year, 6, 15, 12, tzinfo=UTC)) for year in (2021, 2022))
    assert reasons(f"{rule}=9", items)["2021"] == (f"{rule} snapshot",)


def test_day_of_another_month() -> None:
    """The first of a month is another day than the first of the next."""
    items = tuple(Item(str(month), datetime(2024, month, 1, tzinfo=UTC)) for month in (1, 2))
    assert reasons("daily=9", items)["1"] == ("daily snapshot",)


def test_within_zone() -> None:
    """A day before the newest is one of its own zone, over the night when the clocks are put."""
    zone = ZoneInfo("America/New_York")
    newest = datetime(2024, 3, 10, 12, tzinfo=zone)
    old = datetime(2024, 3, 9, 12, 30, tzinfo=zone)  # 22.5 hours before
    older = datetime(2024, 3, 9, 11, 30, tzinfo=zone)  # 23.5 hours before
    items = tuple(Item(name, at) for name, at in (("c", newest), ("b", old), ("a", older)))
    assert [*reasons("within=1d", items)] == ["c", "b"]


def test_hour_that_comes_twice() -> None:
    """Where the clocks are put back, the order is that of the instants, and the hour is one."""
    zone = ZoneInfo("America/New_York")
    first = datetime(2023, 11, 5, 5, 45, tzinfo=UTC).astimezone(zone)
    second = (first.astimezone(UTC) + timedelta(minutes=30)).astimezone(zone)
    later = second + timedelta(days=9)
    assert second.time() < first.time()
    items = tuple(Item(name, at) for name, at in (("a", first), ("b", second), ("c", later)))
    assert [v.item.name for v in decide(items, policy("hourly=9"), now=NOW)] == ["c", "b", "a"]
    assert reasons("hourly=2", items) == {"c": ("hourly snapshot",), "b": ("hourly snapshot",)}


@pytest.mark.parametrize(
    ("text", "zone", "then", "expected"),
    [
        ("1m", "UTC", "2024-03-31T12:00", "2024-03-02T12:00"),  # there is no 31 February
        ("1y", "UTC", "2024-02-29T12:00", "2023-03-01T12:00"),
        ("1m1d", "UTC", "2024-03-01T12:00", "2024-01-31T12:00"),
        ("13m", "UTC", "2024-01-31T12:00", "2022-12-31T12:00"),
        ("2d", "America/New_York", "2024-03-11T12:00", "2024-03-09T17:00"),  # one has 23 hours
        ("1d12h", "America/New_York", "2024-03-11T12:00", "2024-03-10T04:00"),
        ("1d", "America/New_York", "2024-03-11T02:30", "2024-03-10T06:30"),  # an hour left out
        ("1d", "America/New_York", "2023-11-06T01:30", "2023-11-05T05:30"),  # one that came twice
    ],
)
def test_before(text: str, zone: str, then: str, expected: str) -> None:
    """Years, months and days are the calendar's where the snapshot was made; hours are hours."""
    at = datetime.fromisoformat(then).replace(tzinfo=ZoneInfo(zone))
    expected_at = datetime.fromisoformat(expected).replace(tzinfo=UTC)
    assert Duration.parse(text).before(at) == expected_at


@pytest.mark.parametrize("text", ["3000y", "999999999m", "999999999d", "999999999h", "2026y"])
def test_before_all_times(text: str) -> None:
    """A time that goes back before the calendar keeps all, as does one that nobody can count."""
    assert Duration.parse(text).before(NOW) is None
    assert kept(f"within={text}") == [*range(12)]


# -- the exempt --------------------------------------------------------------------------------


@pytest.mark.parametrize("why", Exemption)
def test_exempt(why: Exemption) -> None:
    """An exempt snapshot stays where no rule keeps it, and says why."""
    item = Item("old", datetime(2001, 1, 1, tzinfo=UTC), (Exempt(why),))
    assert reasons("last=1", (*HISTORY, item))["old"] == (why.value,)


def test_exempt_says_by_whom() -> None:
    """The reason names the hold, and comes before the rules' own; several are all given."""
    exempt = (Exempt(Exemption.HELD, "zrepl"), Exempt(Exemption.CLONED, "tank/x"))
    item = Item("new", datetime(2024, 1, 1, tzinfo=UTC), exempt)
    expected = ("held: zrepl", "origin of a clone: tank/x", "last snapshot")
    assert reasons("last=1", (*HISTORY, item))["new"] == expected


@pytest.mark.parametrize(
    ("exempt", "at", "is_waiting"),
    [
        ((), 2001, False),
        ((), 2024, False),
        (("home",), 2001, True),
        (("home", "far"), 2001, True),
        (("home",), 2024, False),  # a rule keeps it as well
    ],
)
def test_not_saved(exempt: tuple[str, ...], at: int, is_waiting: bool) -> None:
    """What is not saved names each job that lacks it; it waits where nothing else keeps it."""
    found = tuple(Exempt(Exemption.UNSAVED, job) for job in exempt)
    item = Item("new", datetime(at, 1, 1, tzinfo=UTC), found)
    (verdict,) = (v for v in decide((*HISTORY, item), policy("last=1"), now=NOW) if v.item is item)
    assert verdict.unsaved_in == exempt
    assert verdict.is_waiting == is_waiting
    assert verdict.reasons[: len(exempt)] == tuple(f"not saved in {job}" for job in exempt)


def test_not_saved_and_held() -> None:
    """What is held as well does not wait for a backup alone."""
    exempt = (Exempt(Exemption.HELD), Exempt(Exemption.UNSAVED, "home"))
    item = Item("old", datetime(2001, 1, 1, tzinfo=UTC), exempt)
    verdict = decide((*HISTORY, item), policy("last=1"), now=NOW)[-1]
    assert (verdict.unsaved_in, verdict.is_waiting) == (("home",), False)


def test_exempt_counts() -> None:
    """An exempt snapshot takes its place in the rules like any other."""
    item = Item("new", datetime(2024, 1, 1, tzinfo=UTC), (Exempt(Exemption.HELD),))
    assert list(reasons("last=2", (*HISTORY, item))) == ["new", TIMES[0]]


# -- what must hold always ---------------------------------------------------------------------

moments = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
some = st.lists(moments, max_size=20).map(
    lambda times: tuple(Item(str(n), at) for n, at in enumerate(times))
)
rules = st.dictionaries(
    st.sampled_from([name for name in OPTIONS if "within" not in name]),
    st.sampled_from(["1", "2", "7", "unlimited"]),
    min_size=1,
) | st.dictionaries(
    st.sampled_from([name for name in OPTIONS if "within" in name]),
    st.sampled_from(["1h", "1d", "3m", "9y"]),
    min_size=1,
)


@given(some, rules)
def test_never_all(items: tuple[Item, ...], options: dict[str, str]) -> None:
    """Whatever the rules say, a volume that has snapshots keeps one, and each has a verdict."""
    verdicts = decide(items, Policy.parse(options), now=NOW)
    assert sorted(v.item.name for v in verdicts) == sorted(item.name for item in items)
    assert any(v.keep for v in verdicts) is bool(items)


@given(some, rules)
def test_again(items: tuple[Item, ...], options: dict[str, str]) -> None:
    """What stays, stays: a second decision on the rest lets nothing more go."""
    wanted = Policy.parse(options)
    left = tuple(v.item for v in decide(items, wanted, now=NOW) if v.keep)
    assert all(v.keep for v in decide(left, wanted, now=NOW))


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"keep-last": "0"}, {"keep-within": "0d"}])
def test_empty(options: dict[str, str]) -> None:
    """A policy that keeps nothing is refused, with or without snapshots; nothing is destroyed."""
    empty = Policy.parse(options)
    assert empty.is_empty
    for items in (HISTORY, ()):
        with pytest.raises(UserError, match=r"none is destroyed \(such as --keep-daily 7\)"):
            decide(items, empty, now=NOW)


@pytest.mark.parametrize("option", OPTIONS)
def test_not_empty(option: str) -> None:
    """Each option alone is a policy."""
    text = "1d" if "within" in option else "1"
    assert not Policy.parse({option: text}).is_empty


def test_parse() -> None:
    """Every option is read into its own rule."""
    assert policy("last=1 hourly=2 daily=3 weekly=4 monthly=5 yearly=unlimited") == Policy(
        1, 2, 3, 4, 5, UNLIMITED
    )
    assert policy(
        "within=1y5m7d2h within-hourly=1h within-daily=2d within-weekly=21d"
        " within-monthly=4m within-yearly=5y"
    ) == Policy(
        within=Duration(1, 5, 7, 2),
        within_hourly=Duration(hours=1),
        within_daily=Duration(days=2),
        within_weekly=Duration(days=21),
        within_monthly=Duration(months=4),
        within_yearly=Duration(years=5),
    )


@pytest.mark.parametrize("text", ["", "-1", "x", "1.5", " 5", "+5", "\u0665"])
def test_not_a_count(text: str) -> None:
    """What is not a number of snapshots is refused in one line that says what would do."""
    with pytest.raises(UserError, match=r"keep-daily: .* is not a number .*unlimited") as caught:
        Policy.parse({"keep-daily": text})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a time such as 1y5m7d2h"),
        ("5", "is not a time"),
        ("1w", "is not a time"),
        ("-1d", "is not a time"),
        ("1d 2h", "is not a time"),
        ("\u0661d", "is not a time"),
        ("7d1d", "has a unit twice"),
    ],
)
def test_not_a_duration(text: str, says: str) -> None:
    """What is not a time is refused, and the line says that m are months."""
    with pytest.raises(UserError, match=f"keep-within: .* {says}.*months"):
        Policy.parse({"keep-within": text})


def test_unknown_option() -> None:
    """An option that is none of the rules is named, with those that are."""
    with pytest.raises(UserError, match=r"'keep-tag' is not a rule of retention .*keep-last"):
        Policy.parse({"keep-tag": "x", "keep-last": "1"})


@given(st.builds(Duration, *[st.integers(0, 99)] * 4))
def test_duration_round_trip(duration: Duration) -> None:
    """A time is printed as it is read."""
    assert Duration.parse(str(duration) or "0d") == duration


def test_naive_time() -> None:
    """A time without a zone is a defect of the caller, not a guess of ours."""
    with pytest.raises(AssertionError, match="has no zone"):
        Item("a", datetime(2024, 1, 1))


def test_fixed_zone() -> None:
    """A zone that is an offset alone serves as well."""
    zone = timezone(timedelta(hours=5, minutes=45))
    before = Duration(days=1).before(datetime(2024, 1, 2, tzinfo=zone))
    assert before == datetime(2024, 1, 1, tzinfo=zone)


# -- a job's rules -----------------------------------------------------------------------------


def test_words() -> None:
    """A job's rules are options, each with its value in the next word or after "="."""
    found = dict(words(["--keep-daily", "7", "--keep-within=1y2d"]))
    assert found == {"keep-daily": "7", "keep-within": "1y2d"}


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (["x"], "'x' is no rule"),
        (["--keep-daily"], "--keep-daily has no value"),
        (
            ["--keep-daily 7"],
            '^"--keep-daily 7" is one word; write it as two words: "--keep-daily", "7"$',
        ),
        (["--keep-last=3", "--keep-daily 7", "--keep-weekly", "4"], "write it as two words"),
        (["--keep-daily 7 --keep-weekly 4"], 'as 4 words: "--keep-daily", "7", "--keep-weekly"'),
    ],
)
def test_wrong_words(rules: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        list(words(rules))

"""Names of kept snapshots: to a name and back, patterns that make no sense, what a name allows."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import convention
from atomtx.convention import NameTakenError, Pattern, fresh, snapshot_of
from atomtx.errors import UserError
from atomtx.names import Dataset, RunId, Snapshot

AT = datetime(2024, 2, 29, 23, 5, 9, tzinfo=UTC)
DEFAULT = Pattern.parse()
PATTERNS = (
    "atomtx-%Y%m%d%H%M",
    "atomtx_%F_%T",
    "%Y-%j %R",
    "snap.%S.%M.%H.%d.%m.%Y",
    "atomtx:%Y%j%m%d-%H.%M",
    "%Y-%Y%m%d%H%M%M",
)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=zones)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("atomtx-%Y%m%d%H%M", "atomtx-202402292305"),
        ("atomtx_%F_%T", "atomtx_2024-02-29_23:05:09"),
        ("%Y-%j %R", "2024-060 23:05"),
    ],
)
def test_format(pattern: str, name: str) -> None:
    """A name holds the prefix and the time as the pattern says, the default to the minute."""
    assert convention.format(Pattern.parse(pattern), AT) == name


def test_utc() -> None:
    """A name is in UTC, whatever the zone of the time; a time without one is no time."""
    there = AT.astimezone(timezone(timedelta(hours=5, minutes=45)))
    assert convention.format(DEFAULT, there) == "atomtx-202402292305"
    with pytest.raises(AssertionError):
        convention.format(DEFAULT, AT.replace(tzinfo=None))


@given(st.sampled_from(PATTERNS), moments)
def test_round_trip(text: str, when: datetime) -> None:
    """A name reads back as its time, to the second or the minute."""
    pattern = Pattern.parse(text)
    read = convention.parse(pattern, convention.format(pattern, when))
    expected = when.astimezone(UTC).replace(microsecond=0)
    has_seconds = "%S" in pattern.text
    assert read == (expected if has_seconds else expected.replace(second=0))
    assert read.utcoffset() == timedelta()


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (PATTERNS[0], "atomtx-202302292305"),  # no leap day
        (PATTERNS[0], "atomtx-202402292405"),
        (PATTERNS[0], "atomtx-202402292360"),
        (PATTERNS[0], "atomtx-000002292305"),
        (PATTERNS[0], "atomtx-20240229230"),
        (PATTERNS[0], "atomtx-2024022923055"),
        (PATTERNS[0], "atomtx-2024 229235 "),
        (PATTERNS[0], "atomtx-202402292305\n"),
        (PATTERNS[0], "atomtx-202402292305-2"),
        (PATTERNS[0], "Atomtx-202402292305"),
        (PATTERNS[0], "my-atomtx-202402292305"),
        (PATTERNS[0], "atomtx-0123456789abcdef"),
        (PATTERNS[0], "atomtx-20240229230\u0665"),
        (PATTERNS[0], ""),
        (PATTERNS[1], "atomtx_2024-02-29_23:05:60"),
        (PATTERNS[2], "2023-366 23:05"),
        (PATTERNS[2], "2023-000 23:05"),
        (PATTERNS[2], "9999-999 23:05"),
        (PATTERNS[3], "snapx09x05x23x29x02x2024"),
        (PATTERNS[4], "atomtx:20240590229-23+05"),  # two days at once
        (PATTERNS[5], "2024-20250228230505"),  # two years
    ],
)
def test_not_of_the_convention(pattern: str, name: str) -> None:
    """A name that no time has is nobody's."""
    assert convention.parse(Pattern.parse(pattern), name) is None


@given(st.sampled_from(PATTERNS), st.text("0123456789-_.: +atomxsnp", max_size=30))
def test_strict(text: str, name: str) -> None:
    """What reads as a time is exactly the name of that time."""
    pattern = Pattern.parse(text)
    when = convention.parse(pattern, name)
    assert when is None or convention.format(pattern, when) == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("atomtx", "do not tell the minute: no %Y, no %m, no %d, no %H, no %M .such as atomtx-%Y"),
        ("atomtx-%Y%m%d%H", "do not tell the minute: no %M"),
        ("atomtx-%m%d%H%M", "no %Y"),
        ("atomtx-%Y%d%H%M", "no %m"),
        ("atomtx-%Y%m%H%M", "no %d"),
        ("atomtx-%Y%m%d%M", "no %H"),
        ("atomtx-%j%H%M", "no %Y"),
        ("atomtx-%y%m%d%H%M", "holds '%y' .%Y, %m"),
        ("atomtx-%Y%m%d%H%M%%", "holds '%%'"),
        ("atomtx-%Y%b%d%H%M", "holds '%b'"),
        ("atomtx-%Y%m%d%H%M%", "holds '%' "),
        ("atomtx-%Y%-m%d%H%M", "holds '%-'"),
        ("atomtx/%Y%m%d%H%M", "holds '/', which cannot be"),
        ("atomtx@%Y%m%d%H%M", "holds '@', which cannot be"),
        ("{host}-%Y%m%d%H%M", "holds '{', which cannot be"),
        ("ä-%Y%m%d%H%M", "holds 'ä', which cannot be"),
        ("a\n%Y%m%d%H%M", r"holds '\\n', which cannot be"),
        ("-%Y%m%d%H%M", "begins or ends"),
        (".%Y%m%d%H%M", "begins or ends"),
        (" %Y%m%d%H%M", "begins or ends"),
        ("%Y%m%d%H%M ", "begins or ends"),
        ("atomtx-%Y%m%d%H%M0000", "could be those of a run .put a letter"),
        ("atomtx-%Y%m%d%H%M%S00", "could be those of a run"),
        ("atomtx-ab%Y%m%d%H%Mcd-%S", "could be those of a run"),
    ],
)
def test_not_a_pattern(text: str, says: str) -> None:
    """A pattern that cannot be, or does not tell the minute, is refused in a line that says why."""
    with pytest.raises(UserError, match=re.sub(r"([%{])", r"\\\1", says)) as caught:
        Pattern.parse(text)
    assert "\n" not in str(caught.value)


@given(moments)
def test_no_run(when: datetime) -> None:
    """A name of the default pattern is never that of a run's snapshot."""
    assert RunId.from_token(convention.format(DEFAULT, when)) is None


def test_fresh() -> None:
    """A moment gets the name of its time, whatever other names there are."""
    assert fresh(DEFAULT, AT, {"atomtx-202402292304", "daily"}) == "atomtx-202402292305"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (PATTERNS[0], "'atomtx-202402292305' already .*next minute .--wait., or add %S"),
        (PATTERNS[1], "'atomtx_2024-02-29_23:05:09' already .*in a second"),
        ("%F %T", "'2024-02-29 23:05:09' already .*in a second"),
    ],
)
def test_taken(pattern: str, says: str) -> None:
    """A second snapshot of the same minute is refused: one name is one time, the next is free."""
    wanted = Pattern.parse(pattern)
    name = convention.format(wanted, AT)
    with pytest.raises(NameTakenError, match=says) as caught:
        fresh(wanted, AT, [name])
    before = caught.value.free_at - timedelta(microseconds=1)
    assert convention.format(wanted, before) == name != fresh(wanted, caught.value.free_at, [name])


# -- kinds of volumes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "name"), [("tank/with space", "a-b_c.d:e f"), ("t", "a" * 253)]
)
def test_allowed(dataset: str, name: str) -> None:
    """What ZFS allows is taken as it is, up to the longest."""
    assert snapshot_of(dataset, name) == Snapshot(Dataset(dataset), name)


@pytest.mark.parametrize(
    ("dataset", "name", "says"),
    [
        ("tank", "", "ZFS cannot have"),
        ("tank", "a+b", "ZFS cannot have"),
        ("tank", "a@b", "ZFS cannot have"),
        ("tank", "a%b", "ZFS cannot have"),
        ("tank", "ä", "ZFS cannot have"),
        ("tank", "a\n", "ZFS cannot have"),
        ("t", "a" * 254, "has more than 255 bytes"),
    ],
)
def test_not_allowed(dataset: str, name: str, says: str) -> None:
    """What ZFS does not allow is refused before anything is made."""
    with pytest.raises(UserError, match=says):
        snapshot_of(dataset, name)

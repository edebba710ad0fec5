"""
Our rules of retention and restic's: on histories at random, the same stay, for the same reasons.

The real program is asked, `restic forget --dry-run --json`, found as in test_clients.py.  Its
snapshots are written by hand, because it would make one a process (tests/resticrepo.py).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atomtx.errors import UserError
from atomtx.retention import OPTIONS, Item, Policy, decide
from tests.resticrepo import PASSWORD, Aes, Repository

ZONES = ("UTC", "America/New_York", "Asia/Kathmandu")
# Where calendars are odd; all in UTC.
ANCHORS = (
    "2024-03-10T08:30:00",  # clocks put forward in New York at 07:00
    "2023-11-05T07:30:00",  # put back at 06:00
    "1986-01-01T00:00:00",  # Kathmandu put forward by 15 minutes, half past six before
    "2024-03-01T00:30:00",  # behind a leap day
    "2023-03-31T23:59:59",
    "2021-01-04T00:00:01",  # behind the week 53 of 2020
    "2024-12-31T12:00:00",  # in the week 1 of 2025
    "2021-01-01T04:59:59",  # another year in Kathmandu, not yet in New York
    "2097-05-05T05:05:05",  # in the future
)
STEPS_H = (0, 0.0001, 0.25, 0.5, 1, 1, 2, 12, 23, 24, 24, 25, 72, 168, 672, 720, 744, 8760, 8784)


Answer = subprocess.CompletedProcess[str]


def program(version: str) -> str:
    """Return the path of a restic."""
    folder = Path(os.environ.get("ATOMTX_CLIENTS") or "~/.cache/atomtx/clients").expanduser()
    path = folder / f"restic-{version}"
    assert os.access(path, os.X_OK), f"{path} is missing: ATOMTX_CLIENTS names the directory"
    return str(path)


def call(
    version: str, repository: Path, zone: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """Run restic in a time zone."""
    return subprocess.run(
        (program(version), "--repo", str(repository), "--no-cache", *words),
        env={"RESTIC_PASSWORD": PASSWORD, "TZ": zone, "HOME": str(repository)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def forget(version: str, repository: Path, zone: str, options: Mapping[str, str]) -> Answer:
    words = (f"--{name}={text}" for name, text in options.items())
    return call(version, repository, zone, "--no-lock", "forget", "--dry-run", "--json", *words)


Kept = list[tuple[str, bool, tuple[str, ...]]]  # instants in order, whether they stay, reasons


@dataclass(frozen=True)
class Snapshot:
    """A time, and the zone of the machine that made the backup."""

    at: datetime
    zone: str

    @property
    def text(self) -> str:
        """Return the time as restic writes it."""
        return self.at.astimezone(ZoneInfo(self.zone)).isoformat().replace("+00:00", "Z")

    def as_read_in(self, zone: str) -> datetime:
        """Return the time as Go reads it: in the local zone, if that has its offset then."""
        at = datetime.fromisoformat(self.text)
        local, offset = at.astimezone(ZoneInfo(zone)), at.utcoffset()
        assert offset is not None
        here: tzinfo = ZoneInfo(zone) if local.utcoffset() == offset else timezone(offset)
        return at.astimezone(here)


def restic_decides(
    version: str,
    repository: Repository,
    zone: str,
    options: Mapping[str, str],
    hosts: Sequence[History],
) -> list[Kept] | None:
    """Return what restic says of each snapshot, by the host; None where it refuses."""
    repository.clear()
    for host, history in enumerate(hosts):
        for n, snapshot in enumerate(history):
            repository.add(snapshot.text, hostname=str(host), username=str(n))
    answer = forget(version, repository.path, zone, options)
    assert answer.returncode == 0 or "no policy was specified" in answer.stderr
    if not answer.stdout:  # 0.16.5 says nothing
        return None
    groups = {int(group["host"]): group for group in json.loads(answer.stdout)}
    return [told(groups[host], history) for host, history in enumerate(hosts)]


def told(group: Mapping[str, Any], history: History) -> Kept:
    """Return what restic says of each snapshot of one host."""
    found: dict[int, tuple[str, ...]] = {
        int(each["username"]): () for each in group["remove"] or ()
    }
    kept = {int(each["username"]) for each in group["keep"]}
    found |= {int(each["snapshot"]["username"]): (*each["matches"],) for each in group["reasons"]}
    assert len(found) == len(history)
    return sorted((history[n].at.isoformat(), n in kept, found[n]) for n in found)


def we_decide(zone: str, options: Mapping[str, str], history: History) -> Kept:
    """Return what we say of each snapshot of one host."""
    items = [Item(str(n), each.as_read_in(zone)) for n, each in enumerate(history)]
    verdicts = decide(items, Policy.parse(options), now=datetime.now(UTC))
    assert {verdict.item for verdict in verdicts} == {*items}
    return sorted((v.item.at.astimezone(UTC).isoformat(), v.keep, v.reasons) for v in verdicts)


# -- what is generated -------------------------------------------------------------------------

History = Sequence[Snapshot]


@st.composite
def walks(draw: st.DrawFn) -> list[datetime]:
    """Go back from an odd time, by odd steps, some of them none."""
    at = datetime.fromisoformat(draw(st.sampled_from(ANCHORS))).replace(tzinfo=UTC)
    steps = draw(st.lists(st.sampled_from(STEPS_H), min_size=1, max_size=25))
    return [at := at - timedelta(hours=step) for step in steps]


@st.composite
def histories(draw: st.DrawFn, zone: str) -> History:
    """
    Return snapshots, most of them made in *zone*.

    Those of one instant have one zone: restic reads them in an order that nobody knows.
    """
    times = [at for walk in draw(st.lists(walks(), min_size=1, max_size=2)) for at in walk]
    zones = dict.fromkeys(times, zone)
    for at in draw(st.sets(st.sampled_from(times), max_size=4)):
        zones[at] = draw(st.sampled_from(ZONES))
    return [Snapshot(at, zones[at]) for at in draw(st.permutations(times))]


counts = st.sampled_from(("0", "1", "2", "3", "5", "10", "unlimited"))
durations = st.builds(
    lambda parts: "".join(f"{number}{unit}" for unit, number in parts.items()),
    st.dictionaries(st.sampled_from("ymdh"), st.integers(0, 40), min_size=1),
) | st.sampled_from(("1d", "3d", "7d", "1m", "1y", "24h", "13m", "2000y"))
policies = st.lists(st.sampled_from(OPTIONS), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries(
        {name: durations if "within" in name else counts for name in names}
    )
)
Case = tuple[str, dict[str, str], Sequence[History]]
cases = st.sampled_from(ZONES).flatmap(
    lambda zone: st.tuples(
        st.just(zone), policies, st.lists(histories(zone), min_size=1, max_size=4)
    )
)


def a_case(zone: str, options: str, *times: str) -> Case:
    """Return a case by hand: options as ``daily=7 within=3d``, times in UTC."""
    given = dict(word.split("=") for word in options.split())
    made = [Snapshot(datetime.fromisoformat(time).replace(tzinfo=UTC), zone) for time in times]
    return zone, {f"keep-{name}": text for name, text in given.items()}, [made]


NY = "America/New_York"
# Three days before 02:30 in New York is an hour that never was; restic goes back to 01:30.
NEVER = a_case(
    NY,
    "within=3d",
    "2024-03-13T06:30:00",
    *(f"2024-03-10T{h:02}:{m:02}:{s:02}" for h in (6, 7) for m in (29, 30) for s in (0, 1)),
)
TWICE = a_case(
    NY,
    "within=3d hourly=2",
    "2023-11-08T06:30:00",
    *(f"2023-11-05T{h:02}:{m:02}:{s:02}" for h in (5, 6) for m in (29, 30) for s in (0, 1)),
)
# Twelve hours and a day before noon, over the hour that is left out.
HOURS = a_case(
    NY, "within=1d12h", "2024-03-11T16:00:00", *(f"2024-03-10T0{h}:00:01" for h in (3, 4, 5))
)
DAYS = a_case(NY, "within=2d", "2024-03-11T16:00:00", "2024-03-09T17:00:01", "2024-03-09T16:59:59")
MONTH_END = a_case("UTC", "within=1m", "2024-03-31", *(f"2024-03-0{d}T00:00:01" for d in (1, 2)))
EVERY = a_case(
    "UTC",
    " ".join(f"{name[5:]}={'3m' if 'within' in name else '2'}" for name in OPTIONS),
    *(f"2024-{month:02}-{day:02}" for month in (1, 4, 5, 6) for day in (1, 2, 9, 30)),
)
FUTURE = a_case("UTC", "within-daily=2d last=1", "2090-01-01", "2020-01-03", "2020-01-01")
ALL_FUTURE = a_case("UTC", "within=1h", "2090-01-01", "2089-01-01")
WEEK_53 = a_case("UTC", "weekly=3", "2021-01-04", "2021-01-03", "2020-12-28", "2020-12-27")
OLDEST = a_case("UTC", "yearly=9 within-yearly=9y", "2020-03-01", "2020-02-01", "2020-01-01")
# What has the same number is not the same day, week, month.
NUMBERS = a_case("UTC", "daily=2", "2024-03-01", "2024-02-01", "2024-01-01", "2023-01-01")
WEEKS = a_case("UTC", "weekly=2", "2024-01-01", "2018-12-31", "2018-01-01")
MONTHS = a_case("UTC", "monthly=2", "2024-03-01", "2023-03-01", "2022-03-01", "2021-03-01")
SAME = a_case("Asia/Kathmandu", "daily=2", *["2020-01-03T18:14:59"] * 3, "2020-01-03T18:15:00")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("oracle") / "repository").create()


def in_words_of(version: str, kept: Kept) -> Kept:
    """Return *kept* as *version* has it: before 0.18 restic did not say "oldest"."""
    if version == "0.19.1":
        return kept
    plain = [
        (at, keep, tuple(reason.removeprefix("oldest ") for reason in reasons))
        for at, keep, reasons in kept
    ]
    return sorted(plain)


@pytest.mark.parametrize("version", ["0.16.5", "0.19.1"])
@given(case=cases)
@example(case=NEVER)
@example(case=TWICE)
@example(case=HOURS)
@example(case=DAYS)
@example(case=MONTH_END)
@example(case=EVERY)
@example(case=FUTURE)
@example(case=ALL_FUTURE)
@example(case=WEEK_53)
@example(case=OLDEST)
@example(case=NUMBERS)
@example(case=WEEKS)
@example(case=MONTHS)
@example(case=SAME)
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_as_restic(version: str, repository: Repository, case: Case) -> None:
    """The same snapshots stay as with restic, in every zone, and for the same reasons."""
    zone, options, hosts = case
    theirs = restic_decides(version, repository, zone, options, hosts)
    assert (theirs is None) is Policy.parse(options).is_empty
    if theirs is None:
        with pytest.raises(UserError, match="no rule says which snapshots to keep"):
            we_decide(zone, options, hosts[0])
        return
    for history, kept in zip(hosts, theirs, strict=True):
        assert in_words_of(version, we_decide(zone, options, history)) == kept


# -- options -----------------------------------------------------------------------------------

BOTH_REFUSE = [
    *[("keep-daily", text) for text in ("-1", "-2", "", "x", "1.5", " 5", "0x5", "Unlimited")],
    *[("keep-within", text) for text in ("5", "d", "1w", "1D", "-1d", "1d-1h", "1d 2h", "1.5d")],
    *[("keep-within-daily", text) for text in ("unlimited", "-1", "+1d", "\u0661d")],
]
# What restic guesses at; see Duration.parse.
WE_REFUSE = [("keep-within", ""), ("keep-within", "1d2d"), ("keep-daily", "+5")]
BOTH_TAKE = [
    *[("keep-daily", text) for text in ("0", "007", "unlimited")],
    *[("keep-within", text) for text in ("0d", "2h1y", " 1d ", "00d1h", "1y5m7d2h")],
]


def takes(option: str, text: str) -> bool:
    """Tell whether we take the value of an option."""
    try:
        Policy.parse({option: text})
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("option", "text", "theirs", "ours"),
    [
        *[(*each, False, False) for each in BOTH_REFUSE],
        *[(*each, True, False) for each in WE_REFUSE],
        *[(*each, True, True) for each in BOTH_TAKE],
    ],
)
def test_options(repository: Repository, option: str, text: str, theirs: bool, ours: bool) -> None:
    """We refuse what restic refuses, and what it guesses at."""
    options = {"keep-last": "1", option: text}
    assert (forget("0.19.1", repository.path, "UTC", options).returncode == 0) is theirs
    assert takes(option, text) is ours


# -- the repository ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [(16, "69c4e0d86a7b0430d8cdb78070b4c55a"), (32, "8ea2b7ca516745bfeafc49904b496089")],
)
def test_aes(size: int, expected: str) -> None:
    """The cipher of the hand-written repository is AES: the examples of FIPS 197."""
    plain = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert Aes(bytes(range(size))).encrypt(plain).hex() == expected


@pytest.mark.parametrize("zone", ZONES)
def test_by_hand(tmp_path: Path, zone: str) -> None:
    """A snapshot that we wrote by hand has the same time as one that restic made."""
    repository = Repository(tmp_path / "repository").create()
    (tmp_path / "file").touch()
    words = ("--time", "2024-07-01 12:00:00", "--host", "host", str(tmp_path / "file"))
    assert call("0.19.1", repository.path, zone, "backup", *words).returncode == 0
    at = datetime(2024, 7, 1, 12, tzinfo=ZoneInfo(zone)).astimezone(UTC)
    repository.add(Snapshot(at, zone).text)
    listed = json.loads(call("0.19.1", repository.path, zone, "snapshots", "--json").stdout)
    made, written = (each["time"] for each in listed)
    assert made == written

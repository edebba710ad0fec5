"""What is sent of a dataset to its copy: every transfer is one that ZFS would do, and no more."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import replica
from atomtx.errors import EffectError
from atomtx.replica import Copy, Point, Resume, Send, Source, Token


def snapshot(n: int, *, wanted: bool = True, of: str = "tank/a") -> Point:
    return Point(f"{of}@{n}", f"guid {n}", 10 * n, wanted)


def bookmark(n: int) -> Point:
    return replace(snapshot(n, wanted=False), name=f"tank/a#{n}")


def source(*points: Point, bookmarks: tuple[int, ...] = (), encrypted: bool = False) -> Source:
    return Source("tank/a", False, encrypted, points, tuple(map(bookmark, bookmarks)))


def copy(*numbers: int, token: str = "") -> Copy:
    return Copy("backup/a", True, tuple(snapshot(n, of="backup/a") for n in numbers), token)


ABSENT = Copy("backup/a")
ONE_TO_FOUR = source(*map(snapshot, (1, 2, 3, 4)))


# -- which streams ---------------------------------------------------------------------------


def test_whole() -> None:
    """A copy that is not there is made of the oldest, and then gets all later ones at once."""
    first, last = snapshot(1), snapshot(4)
    assert replica.transfers(ONE_TO_FOUR, ABSENT, last) == (
        Send(first),
        Send(last, first, between=True),
    )


def test_increment() -> None:
    sends = replica.transfers(ONE_TO_FOUR, copy(1, 2), snapshot(4))
    assert sends == (Send(snapshot(4), snapshot(2), between=True),)
    assert replica.transfers(ONE_TO_FOUR, copy(3), snapshot(4)) == (Send(snapshot(4), snapshot(3)),)


def test_up_to_date() -> None:
    assert replica.transfers(ONE_TO_FOUR, copy(1, 4), snapshot(4)) == ()


def test_not_beyond() -> None:
    """What came after the plan is the next run's."""
    sends = replica.transfers(ONE_TO_FOUR, copy(1), snapshot(2))
    assert sends == (Send(snapshot(2), snapshot(1)),)


def test_strangers_stay() -> None:
    """A snapshot that somebody else took, such as one of a backup at work, is not sent."""
    strange = snapshot(2, wanted=False)
    there = source(snapshot(1), strange, snapshot(3), snapshot(4))
    assert replica.transfers(there, copy(1), snapshot(4)) == (
        Send(snapshot(3), snapshot(1)),
        Send(snapshot(4), snapshot(3), between=True),
    )


def test_from_bookmark() -> None:
    """`zfs send -I` knows no bookmark: the first goes alone."""
    there = source(snapshot(3), snapshot(4), bookmarks=(1, 2))
    assert replica.transfers(there, copy(1, 2), snapshot(4)) == (
        Send(snapshot(3), bookmark(2)),
        Send(snapshot(4), snapshot(3), between=True),
    )


def test_snapshot_before_bookmark() -> None:
    there = source(snapshot(2), snapshot(3), snapshot(4), bookmarks=(2,))
    sends = replica.transfers(there, copy(1, 2), snapshot(4))
    assert sends == (Send(snapshot(4), snapshot(2), between=True),)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (copy(7), "no snapshot in common"),
        (copy(), "is no copy of tank/a"),
        (copy(1, 7), "a snapshot of its own, @7, after @1"),
        (copy(7, token="t"), "no snapshot in common"),
    ],
)
def test_own_way(there: Copy, words: str) -> None:
    """A copy that went its own way is left alone, and named."""
    with pytest.raises(EffectError, match=words):
        replica.transfers(ONE_TO_FOUR, there, snapshot(4))


@pytest.mark.parametrize(
    ("there", "what_to_do"),
    [
        (copy(1, 7), "destroy it if it is of no use: ssh root@nas 'zfs destroy backup/a@7'"),
        (copy(1, token="t"), "throw .* away, .*: ssh root@nas 'zfs receive -A backup/a'"),
    ],
)
def test_own_way_elsewhere(there: Copy, what_to_do: str) -> None:
    """What is advised of another machine's copy is not done to a dataset of this one."""
    with pytest.raises(EffectError) as found:
        replica.transfers(ONE_TO_FOUR, replace(there, host="root@nas"), snapshot(4))
    assert found.value.message.startswith("root@nas:backup/a has a ")
    assert re.fullmatch(what_to_do, found.value.hint or "")


def test_command_of_a_name_with_a_space() -> None:
    """A line for a shell, and for that of the other machine, names one dataset."""
    here = Copy("backup/b c").command("zfs", "destroy", "backup/b c@x")
    assert shlex.split(here) == ["zfs", "destroy", "backup/b c@x"]
    *ssh, line = shlex.split(Copy("a", host="nas").command("zfs", "destroy", "backup/b c@x"))
    assert ssh == ["ssh", "nas"]
    assert shlex.split(line) == ["zfs", "destroy", "backup/b c@x"]


def test_older_than_what_is_there() -> None:
    """What the copy went past, as by a job with another pattern, is not said to be there."""
    later = source(snapshot(1), snapshot(2), snapshot(3, wanted=False))
    with pytest.raises(EffectError, match="tank/a@2 is older than @3, which backup/a has"):
        replica.transfers(later, copy(1, 3), snapshot(2))


# -- going on with what was cut off ----------------------------------------------------------

REST = Token("tank/a", "guid 3", "guid 2", is_raw=False)


def test_resumed() -> None:
    sends = replica.transfers(ONE_TO_FOUR, copy(1, 2, token="t"), snapshot(4), REST)
    assert sends == (Resume(snapshot(3), "t"), Send(snapshot(4), snapshot(3)))


def test_resumed_whole() -> None:
    token = replace(REST, to_guid="guid 1", from_guid="")
    sends = replica.transfers(ONE_TO_FOUR, copy(token="t"), snapshot(2), token)
    assert sends == (Resume(snapshot(1), "t"), Send(snapshot(2), snapshot(1)))


@pytest.mark.parametrize(
    "token",
    [
        None,  # not understood
        replace(REST, dataset="tank/secret"),
        replace(REST, to_guid="guid 9"),
        replace(REST, from_guid=""),
        replace(REST, from_guid="guid 1"),
        replace(REST, is_raw=True),
    ],
)
def test_forged_token(token: Token | None) -> None:
    """A target that lies about what it lacks gets nothing (openzfs/zfs#14153)."""
    with pytest.raises(EffectError, match="cannot be gone on with"):
        replica.transfers(ONE_TO_FOUR, copy(1, 2, token="t"), snapshot(4), token)


def test_never_in_the_clear() -> None:
    """A token for an encrypted dataset that does not ask for it raw is refused."""
    there = source(*map(snapshot, (1, 2, 3)), encrypted=True)
    with pytest.raises(EffectError):
        replica.transfers(there, copy(1, 2, token="t"), snapshot(3), REST)
    raw = replace(REST, is_raw=True)
    assert replica.transfers(there, copy(1, 2, token="t"), snapshot(3), raw)


# -- holds -----------------------------------------------------------------------------------


def test_holds() -> None:
    """What is being sent, and what it begins at, must stay; then what both ends have."""
    before = copy(1, 2)
    planned = replica.transfers(ONE_TO_FOUR, before, snapshot(4))
    assert replica.to_hold(ONE_TO_FOUR, before, planned) == ("tank/a@2", "tank/a@3", "tank/a@4")
    assert replica.staying(ONE_TO_FOUR, copy(1, 2, 3, 4)) == ("tank/a@4",)
    assert replica.last_of(ONE_TO_FOUR, copy(1, 2, 3, 4)) == ("backup/a@4",)


def test_holds_of_rest() -> None:
    """As long as a part of it is there, the snapshot that was cut off stays as well."""
    assert replica.staying(ONE_TO_FOUR, copy(1, token="t"), REST) == ("tank/a@1", "tank/a@3")


def test_no_bookmark_is_held() -> None:
    there = source(snapshot(3), bookmarks=(2,))
    planned = replica.transfers(there, copy(2), snapshot(3))
    assert replica.to_hold(there, copy(2), planned) == ("tank/a@3",)


def test_unmarked() -> None:
    """What arrived without its mark gets the one that its source has; what is foreign, none."""
    marked = [replace(point, keeper="run 1") for point in map(snapshot, (1, 2))]
    there = source(*marked, snapshot(3, wanted=False))
    with_mark = replace(snapshot(1, of="backup/a"), keeper="run 1")
    arrived = replace(copy(2, 3), snapshots=(with_mark, *copy(2, 3).snapshots))
    assert replica.unmarked(there, arrived) == {"run 1": ["backup/a@2"]}


def test_token_of_stranger() -> None:
    """A snapshot that stays at home is not sent because a token asks for it."""
    there = source(snapshot(1), snapshot(2, wanted=False), snapshot(3))
    token = replace(REST, to_guid="guid 2", from_guid="guid 1")
    with pytest.raises(EffectError, match="cannot be gone on with"):
        replica.transfers(there, copy(1, token="t"), snapshot(3), token)


# -- any history -----------------------------------------------------------------------------


@dataclass
class Machine:
    """A copy as ZFS keeps it: it refuses what `zfs receive` refuses."""

    guids: list[str] = field(default_factory=list)

    def receive(self, there: Source, send: Send) -> None:
        if send.base is None:
            assert not self.guids, "destination exists"
        else:
            assert self.guids, "destination does not exist"
            assert self.guids[-1] == send.base.guid, "most recent snapshot does not match"
            assert "#" not in send.base.name or not send.between, "-I from a bookmark"
        if send.between:
            assert send.base
            inside = [
                point.guid
                for point in there.snapshots
                if send.base.createtxg < point.createtxg < send.to.createtxg
            ]
            self.guids += inside
        self.guids.append(send.to.guid)


HISTORIES = st.lists(st.sampled_from(["wanted", "strange", "marked", "gone"]), max_size=12)


@given(history=HISTORIES, sent=st.integers(0, 12), planned=st.integers(0, 11))
def test_any_history(history: list[str], sent: int, planned: int) -> None:
    """
    Of any history the copy gets what is wanted after the last common point, and nothing else.

    Up to the one that was *planned*, the newest of then: others may have been taken since.
    """
    points = [snapshot(n, wanted=what == "wanted") for n, what in enumerate(history, 1)]
    there = Source(
        "tank/a",
        False,
        False,
        tuple(p for p, what in zip(points, history, strict=True) if what in ("wanted", "strange")),
        tuple(bookmark(n) for n, what in enumerate(history, 1) if what == "marked"),
    )
    wanted = [point for point in there.snapshots if point.wanted]
    if not wanted:
        return
    last = wanted[planned % len(wanted)]
    had = [p for p, what in zip(points, history, strict=True) if what in ("wanted", "marked")]
    had = [p for p in had[:sent] if p.createtxg <= last.createtxg]
    machine = Machine([point.guid for point in had])
    before = Copy("backup/a", bool(had), tuple(had))
    for send in replica.transfers(there, before, last):
        assert isinstance(send, Send)
        machine.receive(there, send)
    base = had[-1].createtxg if had else 0
    assert machine.guids == [p.guid for p in had] + [
        p.guid for p in there.snapshots if p.wanted and base < p.createtxg <= last.createtxg
    ]

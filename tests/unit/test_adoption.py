"""Snapshots of a lost journal: found by their marks, and adopted only where the user names them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import pytest

from atomtx import adoption
from atomtx.adoption import Stray
from atomtx.convention import Pattern
from atomtx.errors import UserError
from atomtx.intents import HoldSnapshots, Mount, MountVolumes, TakeSnapshots
from atomtx.mounts import mountinfo
from atomtx.names import KEPT_MARK, MARK, RunId
from atomtx.plan import Pool
from atomtx.volumes.kind import Identity
from atomtx.volumes.zfs import Zfs

POOLS = [
    Pool("tank", "11", "ONLINE"),
    Pool("zroot", "22", "ONLINE"),
    Pool("bad", "33", "SUSPENDED"),
]
RUN, OTHER, THIRD = map(RunId, ("0123456789abcdef", "fedcba9876543210", "00000000000000aa"))


class Machine:
    """Stands for `Zfs`, with marked snapshots, and *kept* ones; *gone* vanish meanwhile."""

    def __init__(
        self,
        *marked: tuple[str, str],
        gone: Collection[str] = (),
        kept: Mapping[str, str] | None = None,
    ) -> None:
        self._marked = {MARK: list(marked), KEPT_MARK: list((kept or {}).items())}
        self._gone = gone
        self.asked: list[str] = []

    def pools(self) -> list[Pool]:
        return POOLS

    def marked(self, pools: Collection[str], *, mark: str = MARK) -> list[tuple[str, str]]:
        self.asked = list(pools)
        return self._marked[mark]

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        return {name: 7 for name in names if name not in self._gone}

    def identities(self, names: Collection[str]) -> dict[str, Identity]:
        return {n: Identity(n, f"guid of {n}", "7", 5, RUN) for n in names if n not in self._gone}


def scan(machine: Machine, known: Collection[str] = (), *patterns: str) -> list[Stray]:
    return adoption.scan(cast(Zfs, machine), known, patterns=list(map(Pattern.parse, patterns)))


def snapshot(dataset: str, run: RunId = RUN) -> str:
    return f"{dataset}@{run.token}"


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where one of the snapshots is mounted."""
    lines = (
        "1 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 0:30 / /mnt/a rw - zfs {snapshot('tank/a')} ro\n"
        f"3 1 0:31 / /mnt/other rw - zfs tank/a@{OTHER.token} ro\n"
    )
    monkeypatch.setattr(mountinfo, "read", lambda: mountinfo.parse(lines.encode()))


def test_scan() -> None:
    """What carries our mark is shown run by run, with its mounts; suspended pools are not asked."""
    machine = Machine(
        (snapshot("tank/a"), RUN), (snapshot("tank/b", OTHER), OTHER), (snapshot("zroot/c"), RUN)
    )
    first, second = scan(machine)
    assert (first.run, [s.name for s in first.snapshots], first.mounts) == (
        RUN,
        [snapshot("tank/a"), snapshot("zroot/c")],
        ("/mnt/a",),
    )
    assert (second.run, second.mounts) == (OTHER, ())
    assert first.created_s == 5
    assert machine.asked == ["tank", "zroot"]


def test_known() -> None:
    """A run that is in the journal is not a stray: recovery has it."""
    machine = Machine((snapshot("tank/a"), RUN), (snapshot("tank/b", OTHER), OTHER))
    assert [stray.run for stray in scan(machine, [RUN])] == [OTHER]


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        (f"tank/a@atomtx-{OTHER}", RUN),
        (f"tank/a@daily-{RUN}", RUN),
        (f"tank/a@atomtx-{RUN}x", RUN),
        (f"tank/a@{RUN}", RUN),
        ("tank/a@atomtx-mine", "mine"),
    ],
)
def test_name_and_mark_agree(name: str, mark: str) -> None:
    """Promise 2: a name or a mark alone is no proof: both must be there, and agree."""
    assert scan(Machine((name, mark))) == []


def test_interrupted_snap() -> None:
    """Those of a snap have a name of a pattern; each is told with its size, and is no backup's."""
    names = ("tank/a@atomtx-202611221410", "zroot/b c@atomtx-202611221410")
    machine = Machine(*((name, RUN) for name in names), (snapshot("tank/b", OTHER), OTHER))
    assert [stray.run for stray in scan(machine)] == [OTHER]
    first, second = scan(machine, (), "daily %F %T", "atomtx-%Y%m%d%H%M")
    assert (first.run, first.is_of_snap, first.kept) == (RUN, True, 0)
    assert first.sizes == dict.fromkeys(names, 7)
    assert (second.run, second.is_of_snap) == (OTHER, False)
    assert first.unlike == second.unlike == ()
    made = adoption.plan_of(first, POOLS)
    assert [v.snapshot for v in made.volumes] == list(names)


def test_only_a_part_is_found() -> None:
    """What a run to be adopted has under names of other patterns is told: nobody looks again."""
    names = ("tank/b@daily 2026-11-22 14:10", snapshot("tank/a"), "zroot/c@mine")
    kept = "zroot/d@mine"
    machine = Machine(*((name, RUN) for name in (*names, kept)), kept={kept: RUN})
    (stray,) = scan(machine)
    assert stray.unlike == (names[0], names[2])
    (stray,) = scan(machine, (), "daily %F %H:%M")
    assert stray.unlike == (names[2],)


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("tank/a@atomtx-202613221410", RUN),  # no such month
        (f"tank/a@{OTHER.token}", RUN),
        ("tank/a@atomtx-202611221410", "mine"),
        ("tank/a@atomtx-202611221410", RUN + "0"),
    ],
)
def test_no_interrupted_snap(name: str, mark: str) -> None:
    """Neither another name nor a mark that no run has is one of ours."""
    assert scan(Machine((name, mark)), (), "atomtx-%Y%m%d%H%M") == []


def test_half_kept() -> None:
    """What is kept of a moment is counted, and is not what can be adopted: nor with both marks."""
    there, other = "tank/a@atomtx-202611221410", "zroot/b@atomtx-202611221410"
    both, of_backup = "tank/c@atomtx-202611221410", snapshot("tank/d")
    machine = Machine(
        *((name, RUN) for name in (there, both, of_backup)),
        kept={other: RUN, both: RUN, of_backup: RUN, "tank/x@y": OTHER},
    )
    (stray,) = scan(machine, (), "atomtx-%Y%m%d%H%M")
    assert [s.name for s in stray.snapshots] == [there]
    assert stray.kept == 3
    zfs = cast(Zfs, Machine((there, RUN)))
    patterns = [Pattern.parse("atomtx-%Y%m%d%H%M")]
    (stray,) = adoption.scan(zfs, (), patterns=patterns, keepers=[RUN, OTHER, RUN])
    assert stray.kept == 2  # of btrfs


def test_destroyed_meanwhile() -> None:
    """What was destroyed between two looks is not shown."""
    name = snapshot("tank/a")
    assert scan(Machine((name, RUN), gone=[name])) == []


def strays(*runs: str) -> list[Stray]:
    return [Stray(run, (), ()) for run in runs]


def test_pick() -> None:
    """A stray is named by the first digits of its run, as far as they tell it from others."""
    some = strays(RUN, OTHER, "0123000000000000")
    assert adoption.pick(some, "fe").run == OTHER
    assert adoption.pick(some, RUN).run == RUN
    with pytest.raises(UserError, match="more than one unknown run"):
        adoption.pick(some, "0123")
    with pytest.raises(UserError, match="no unknown run"):
        adoption.pick(some, "9")


def test_plan() -> None:
    """The plan of an adopted run has its volumes, by pool, and nothing that a client would do."""
    stray = scan(Machine((snapshot("tank/a"), RUN), (snapshot("zroot/with space"), RUN)))[0]
    made = adoption.plan_of(stray, POOLS)
    assert (made.run, made.job) == (RUN, f"adopted-{RUN}")
    assert [(v.pool, v.pool_guid, v.name, v.snapshot) for v in made.volumes] == [
        ("tank", "11", "tank/a", snapshot("tank/a")),
        ("zroot", "22", "zroot/with space", snapshot("zroot/with space")),
    ]
    assert made.targets == ()
    assert made.label == "tank/a, zroot/with space"


def test_intents() -> None:
    """What is to be undone of an adopted run: snapshots, holds, and those mounts that are there."""
    stray = scan(Machine((snapshot("tank/a"), RUN), (snapshot("tank/b"), RUN)))[0]
    steps = adoption.intents_of(stray, adoption.plan_of(stray, POOLS))
    names = (snapshot("tank/a"), snapshot("tank/b"))
    assert steps == (
        TakeSnapshots("tank", "11", names, RUN),
        HoldSnapshots("tank", "11", names, RUN.token),
        MountVolumes("/", (Mount(names[0], "/mnt/a"),)),
    )


def test_intents_without_mounts() -> None:
    """Where nothing of it is mounted there is nothing to unmount."""
    stray = scan(Machine((snapshot("tank/b", THIRD), THIRD)))[0]
    steps = adoption.intents_of(stray, adoption.plan_of(stray, POOLS))
    assert [type(step) for step in steps] == [TakeSnapshots, HoldSnapshots]

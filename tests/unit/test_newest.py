"""Which kept snapshot of a dataset is the newest, and where its files are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from atomtx import newest, wanted
from atomtx.inventory import Inventory
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.newest import Frozen
from atomtx.plan import DatasetFacts, Pool, Request
from atomtx.volumes.kind import Kept

POOL = Pool("tank", "guid of tank", "ONLINE")


def kept(name: str, txg: int, **values: Any) -> Kept:
    made = Kept(name, f"1{txg}", str(txg), 1_000 + txg, "0123456789abcdef", 0, ())
    return replace(made, **values)


def choose(
    *there: Kept, asked: tuple[str, ...] = ("tank",), mounted: tuple[str, ...] = ("tank",)
) -> tuple[tuple[Frozen, ...], list[str]]:
    facts = [
        DatasetFacts("tank", "filesystem", "1", "/", "on", True, "-"),
        DatasetFacts("tank/holder", "filesystem", "2", "none", "off", False, "-"),
        DatasetFacts("tank/holder/a", "filesystem", "3", "/a", "noauto", False, "-"),
        DatasetFacts("tank/vol", "volume", "4", "-", "-", False, "-"),
    ]
    request = Request(asked, recursive=True)
    found = wanted.choose(request, asked, facts, [POOL])
    places = {"tank": "/", "tank/holder/a": "/a"}
    table = Table(
        Entry(n + 2, n + 1, f"0:{n + 2}", "/", places[name], "rw", (), "zfs", name, "rw")
        for n, name in enumerate(mounted)
    )
    frozen, unseen = newest.choose(found, there, Inventory(found.datasets, found.pools, table))
    return frozen, [f"{each.name}: {each.reason}, named: {each.is_named}" for each in unseen]


def test_newest() -> None:
    """By transaction group, whatever the clock said, and at a mountpoint that is the root."""
    there = [kept("tank@b", 9, creation_s=5_000), kept("tank@a", 12), kept("tank@c", 10)]
    frozen, _ = choose(*there)
    assert frozen == (Frozen("tank@a", 1_012, "/", "/.zfs/snapshot/a"),)


def test_copies() -> None:
    """What came from elsewhere, and what nobody has kept, is no moment of this machine."""
    frozen, _ = choose(
        kept("tank@a", 1), kept("tank@b", 2, is_copy=True), kept("tank@c", 3, keeper="")
    )
    assert [each.snapshot for each in frozen] == ["tank@a"]


def test_unseen() -> None:
    """What holds others together, and a volume, are passed over, but where they are named."""
    _, unseen = choose(kept("tank@a", 1))
    assert unseen == ["tank/holder/a: it is not mounted (canmount=noauto), named: False"]
    _, unseen = choose(mounted=("tank", "tank/holder/a"))
    assert unseen == [
        "tank: it has no kept snapshot, named: True",
        "tank/holder/a: it has no kept snapshot, named: False",
    ]
    _, unseen = choose(asked=("tank/holder", "tank/vol"))
    assert [line.partition(":")[0] for line in unseen] == [
        "tank/holder",
        "tank/holder/a",
        "tank/vol",
    ]

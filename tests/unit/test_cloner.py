"""
A clone at work, on played pools: killed at every point, cut off, and refused.

What stands for `zfs` and `ssh` refuses what they refuse (`tests/fakesend.py`, `tests/fakessh.py`);
what ZFS itself does is tested in the virtual machine.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atomtx.cloning import Terms
from atomtx.convention import Pattern
from atomtx.errors import EffectError, ExitStatus, JournalFullError, WaitingError
from atomtx.executor import Tell
from atomtx.interrupts import Interrupts
from atomtx.journal import Change, Journal
from atomtx.records import Run
from atomtx.settling import status_of
from atomtx.volumes import ends
from atomtx.volumes.ends import End, UnreachableError
from tests import faketoken
from tests.clones import CHILD, HERE, KEEPER, NAS, POOLS, SETS, Field, copy_of
from tests.extent import some
from tests.scene import Ended, Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="lock F and its folder are root's")


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    scene = Scene(tmp_path)
    yield Field(scene)
    scene.close()


def log(field: Field) -> str:
    return (field.scene.home / "log").read_text()


# -- the course ------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "zips"), [(HERE, False), (NAS, False), (NAS, True)])
def test_course(field: Field, target: str, zips: bool) -> None:
    """The first time all of it, then what is new, then nothing; strangers stay at home."""
    if zips and not shutil.which("zstd"):
        pytest.skip("zstd is not installed")
    datasets = ("tank/a", CHILD, "tank/enc")
    options: dict[str, Any] = {"datasets": datasets, "terms": Terms(compress=zips)}
    field.snap(*datasets)
    field.snap("tank/a", kept=False)
    field.snap("tank/a")
    ended = field.clone(target, **options)
    assert (ended.status, ended.raised, ended.said("warn")) == (0, None, []), log(field)
    assert ("start:zstd#3" in ended.points, "start:zstd#4" in ended.points) == (zips, False)
    field.check_copies(target, datasets=datasets)
    assert field.run()["outcome"] == "completed"
    assert len(field.sends()) == 4
    field.snap(*datasets)
    field.clone(target, **options)
    field.check_copies(target, datasets=datasets)
    assert len(field.sends()) == 7
    ended = field.clone(target, **options)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.COMPLETED
    assert len(field.sends()) == 7
    field.check_once(target)


def test_processes(field: Field) -> None:
    """Where there is nothing to send, some datasets take as many processes as a hundred."""
    counts = []
    for n in (2, 50):
        datasets = tuple(f"tank/{i:03}" for i in range(n))
        field.scene.play(datasets=field.pool()["datasets"] | dict.fromkeys(datasets, "filesystem"))
        field.snap(*datasets)
        assert field.clone(datasets=datasets).raised is None
        field.forget()
        assert field.clone(datasets=datasets).raised is None
        counts.append([words[:2] for words in field.commands()])
    assert counts[0] == counts[1]


def test_encrypted(field: Field) -> None:
    """What is encrypted leaves raw, in whatever way it is sent; also when it is gone on with."""
    field.snap()
    field.cut_off(dataset="tank/enc")
    field.clone()
    field.snap()
    field.clone()
    field.check_copies()
    sends = [words for words in field.commands("send") if "tank/enc@" in words[-1]]
    assert len(sends) == 4
    assert {"w" in words[words[0] == "-nP"] for words in sends} == {True}
    assert field.pool()["facts"][f"{HERE}/enc"]["encryption"] == "aes-256-gcm"


def test_from_bookmark(field: Field) -> None:
    """Where the last common snapshot is gone at home, a bookmark of it does."""
    field.snap()
    field.clone()
    base = field.newest("tank/a")

    def prune(pool: dict[str, Any]) -> None:
        pool["bookmarks"][base.replace("@", "#")] = pool["snapshots"].pop(base)

    field.change(prune)
    field.snap()
    field.snap()
    assert field.clone().said("warn") == []
    assert field.guids(f"{HERE}/a")[1:] == field.guids("tank/a")
    assert ["-Lcp", "-i", base.replace("@", "#")] in [words[:3] for words in field.sends()]


# -- killed ----------------------------------------------------------------------------------


LOOKS = ("start:zpool list", "start:zfs list", "start:zfs get", "start:zfs holds")


def planned(ended: Ended) -> list[str]:
    """Return the points of a clone from where it is begun in the journal."""
    return ended.points[ended.points.index("before:planned#1") :]


def to_be_killed(ended: Ended) -> list[str]:
    """Return all of these but where a look begins: it changes nothing, and has an end."""
    return [point for point in planned(ended) if not point.startswith(LOOKS)]


def check_recovered(
    field: Field, point: str, target: str, *, streams: int, halves: int = 0, **options: Any
) -> None:
    """Of a clone that was killed, all is done in the end, and nothing of it twice."""
    recovered = field.recover()
    assert recovered.raised is None, point
    assert recovered.said("warn") == [], point
    assert field.recover().decisions == []
    if point == "before:planned#1":
        assert not recovered.decisions
        field.clone(target, **options)
    field.check_copies(target, **options)
    field.check_once(target, halves=halves)
    assert streams <= len(field.sends()) <= streams + 1, point
    assert (field.run()["state"], field.run()["outcome"]) == ("cloned", "completed")


def test_first_one_is_killed(field: Field) -> None:
    """Wherever it is killed, recover brings all copies up to date, and holds what is to be held."""
    field.snap()
    field.snap("tank/a")
    restore = field.save()
    points = to_be_killed(field.clone())
    assert {"journal:planned#1", "start:zfs send#3", "start:zfs receive#3"} <= set(points)
    assert {"end:zfs hold#3", "end:zfs release#1", "journal:cloned#1"} <= set(points)
    for point in some(points, 3):
        restore()
        assert field.clone(at=point).status == -9, point
        check_recovered(field, point, HERE, streams=3)


def test_resumed_one_is_killed(field: Field) -> None:
    """The same of one that goes on with what was cut off, on another machine."""
    one: dict[str, Any] = {"datasets": ("tank/a",)}
    field.snap()
    field.clone(NAS, **one)
    field.snap()
    field.cut_off(NAS, **one)
    field.snap()
    restore = field.save()
    restore()
    points = to_be_killed(field.clone(NAS, **one))
    field.check_copies(NAS, **one)
    assert [words[0] for words in field.sends()] == ["-t", "-Lcp"]
    for point in some(points, 3):
        restore()
        assert field.clone(NAS, at=point, **one).status == -9, point
        check_recovered(field, point, NAS, streams=2, halves=1, **one)


def test_recovery_is_killed_too(field: Field) -> None:
    """Killed in mid-stream, and then at every point of its recovery."""
    field.snap()
    restore = field.save()

    def cut(at: str = "") -> Ended:
        restore()
        assert field.cut_off(by="kill").status == -9
        return field.scene.recover(at=at)

    first = cut()
    assert f"the rest of {field.newest('tank/a')}" in " ".join(first.said("step"))
    field.check_copies()
    field.check_once()
    for point in some([p for p in first.points if not p.startswith(LOOKS)], 3):
        assert cut(point).status == -9, point
        check_recovered(field, point, HERE, streams=3)


def test_rolled_back(field: Field) -> None:
    """At a user's word nothing of what was cut off is left, and held is what both have."""
    field.snap()
    field.clone()
    field.snap()
    field.cut_off()
    restore = field.save()
    for point in some(to_be_killed(field.clone())[1:], 3):
        restore()
        assert field.clone(at=point).status == -9, point
        recovered = field.recover(rollback=True)
        assert recovered.raised is None, point
        assert field.tokens() == [], point
        both = [set(field.guids(n)) for d in SETS for n in (d, copy_of(d))]
        common = (both[0] & both[1]) | (both[2] & both[3])
        there = field.pool()["snapshots"]
        assert {there[name]["guid"] for name in field.holds()} <= common, point
        assert len(field.holds()) == 4, point
        if recovered.decisions:
            assert field.run()["outcome"] == "rolled-back"
        assert field.recover().decisions == []
        field.clone()
        field.check_copies()


def test_first_one_is_rolled_back(field: Field) -> None:
    """A copy of which only a part is there goes with it, and so do all holds."""
    field.snap()
    assert field.cut_off(by="kill").status == -9
    assert field.recover(rollback=True).raised is None
    assert field.holds() == {}
    assert f"{HERE}/a" not in field.pool()["datasets"]


@pytest.mark.parametrize("target", [HERE, NAS])
def test_signal(field: Field, target: str) -> None:
    """A signal in mid-stream ends it; what has arrived stays, and the next one goes on with it."""
    field.snap()
    ended = field.cut_off(target)
    assert ended.interrupted == "interrupted by SIGTERM"
    run = field.run()
    assert (run["state"], run["outcome"]) == ("cloned", "rolled-back")
    assert run["reason"].endswith("the next clone goes on with what has arrived")
    assert field.recover().decisions == []
    told = field.clone(target).said("step")
    assert any(words.startswith("the rest of tank/a@") for words in told)
    field.check_copies(target)
    field.check_once(target)


def test_program_is_killed(field: Field) -> None:
    """No program dies unseen: what is said to be up to date is; the next one does the rest."""
    field.snap()
    restore = field.save()
    points = [point for point in planned(field.clone()) if point.startswith("start:zfs")]
    outcomes = Counter[str]()
    for point in some(points, 3):
        restore()
        ended = field.clone(at=point, who="child")
        assert (ended.status, ended.raised) == (0, None), point
        outcomes[field.run()["outcome"]] += 1
        field.settle()
        if field.run()["outcome"] == "completed":
            assert all(map(field.is_whole, SETS)), point
        field.clone()
        field.check_copies()
    assert set(outcomes) == {"completed", "partial", "failed"}


# -- refused ---------------------------------------------------------------------------------


def just_before(
    field: Field, method: str, dataset: str, what: Callable[[], object], *, nth: int = 1
) -> None:
    """Have somebody do *what* just before the nth time that an end is asked for that."""
    real = getattr(End, method)
    left = [*[lambda: None] * (nth - 1), what]

    def late(self: End, first: Any, *args: Any, **options: Any) -> Any:
        if left and dataset in str(first):
            left.pop(0)()
        return real(self, first, *args, **options)

    field.scene.changes.append(lambda: setattr(End, method, late))


def own_snapshot(pool: dict[str, Any]) -> None:
    pool["txg"] += 1
    mine = {"guid": "4711", "createtxg": str(pool["txg"]), "creation": "1", "mark": None}
    pool["snapshots"][f"{HERE}/a@mine"] = {**mine, "kept": None, "holds": []}


def modified(pool: dict[str, Any]) -> None:
    pool["facts"][f"{HERE}/a"] = {"modified": True}


def another(pool: dict[str, Any]) -> None:
    """Something else is where the copy was."""
    for name in [name for name in pool["snapshots"] if name.startswith(f"{HERE}/a@")]:
        pool["snapshots"][name]["guid"] = "4712"


def emptied(pool: dict[str, Any]) -> None:
    for name in [name for name in pool["snapshots"] if name.startswith(f"{HERE}/a@")]:
        del pool["snapshots"][name]


def with_part(pool: dict[str, Any]) -> None:
    """Somebody else's stream was cut off there."""
    token = faketoken.made("tank/secret@x", done=2, to="5", base="4")
    pool["facts"][f"{HERE}/a"] = {"token": token}


REFUSALS = [
    (own_snapshot, "has a snapshot of its own, @mine"),
    (modified, "has been modified"),
    (another, "no snapshot in common"),
    (emptied, "is there already, and is no copy of tank/a"),
    (with_part, "has a part of a stream that cannot be gone on with"),
]
LATE = [
    (own_snapshot, "most recent snapshot of backup/here/a does not"),
    (modified, "has been modified"),
    (with_part, "partially-complete state"),
]


@pytest.mark.parametrize(("what", "words"), REFUSALS)
@pytest.mark.parametrize("terms", [Terms(), Terms(discard=True)])
def test_own_way(field: Field, what: Callable[[Any], None], words: str, terms: Terms) -> None:
    """A copy that went its own way is told, and left as it is; the others are copied."""
    field.snap()
    field.clone()
    held = field.holds()
    field.snap()
    field.change(what)
    before = field.guids(f"{HERE}/a")
    if terms.discard and what is modified:
        field.clone(terms=terms)
        field.check_copies()
        return
    check_refused(field, field.clone(terms=terms), words, held)
    assert field.guids(f"{HERE}/a") == before
    if what is own_snapshot:
        assert not any("/a@" in words[0] for words in field.commands("rollback"))


def test_own_way_elsewhere(field: Field) -> None:
    """What is told of a copy names its machine: the source may have the same name."""
    field.snap()
    field.clone(NAS)
    field.snap()
    far = field.pool(NAS)
    own_snapshot(far)
    field.play_far(**far)
    ended = field.clone(NAS)
    warned = " ".join(ended.said("warn"))
    assert f"{NAS}/a has a snapshot of its own, @mine" in warned
    assert "ssh root@nas 'zfs destroy backup/here/a@mine'" in warned
    field.play_far(datasets={"backup": "filesystem"}, snapshots={})
    warned = " ".join(field.clone(NAS).said("warn"))
    assert "ssh root@nas 'zfs create -o canmount=off backup/here'" in warned


@pytest.mark.parametrize(("what", "words"), LATE)
def test_changed_meanwhile(field: Field, what: Callable[[Any], None], words: str) -> None:
    """What changed since the copy was looked at, ZFS refuses; the others are copied."""
    field.snap()
    field.clone()
    held = field.holds()
    field.snap()
    just_before(field, "size", "tank/a", lambda: field.change(what))
    check_refused(field, field.clone(), words, held)


def check_refused(field: Field, ended: Ended, words: str, held: dict[str, list[str]]) -> None:
    """The copy of tank/a alone was refused: partial, and nothing of it was released."""
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert words in str(ended.run.reason)
    assert words in " ".join(ended.said("warn"))
    assert not field.is_whole("tank/a")
    assert field.is_whole("tank/enc")
    still = field.holds()
    assert {n: t for n, t in held.items() if "tank/a@" in n}.items() <= still.items()
    assert field.newest("tank/enc") in still


def test_parent_is_absent(field: Field) -> None:
    """What a copy would lie in is not made; others are copied."""
    field.snap("tank/enc", CHILD)
    ended = field.clone(datasets=("tank/enc", CHILD))
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert ended.run.reason == f"there is no dataset {HERE}/a"
    assert field.is_whole("tank/enc")
    ended = field.clone("backup/nope/deep")
    assert ended.raised or status_of(ended.run) is ExitStatus.FAILED  # type: ignore[arg-type]


def test_two_patterns_of_one_copy(field: Field) -> None:
    """What is older than what another job has sent to the same copy never arrives: it is told."""
    field.snap()
    older = field.newest("tank/a")
    field.snap()
    name = field.newest("tank/a")
    field.change(lambda pool: renamed(pool, name))
    mine = Pattern.parse("mine-%Y%m%d%H%M%S")
    one: dict[str, Any] = {"datasets": ("tank/a",)}
    assert field.clone(pattern=mine, **one).said("warn") == []
    held = field.holds()
    ended = field.clone(**one)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.FAILED
    newer = name.replace("tank/a@s-", "@mine-")
    words = f"{older} is older than {newer}, which {HERE}/a has, and cannot be sent any more"
    assert ended.run.reason == words
    assert field.holds() == held


def move(field: Field, old: str, new: str) -> None:
    """Rename a dataset, with what is below it."""

    def moved(pool: dict[str, Any]) -> None:
        for part in (pool["datasets"], pool["facts"], pool["snapshots"]):
            for name in [n for n in part if n == old or n.startswith(f"{old}/")]:
                part[new + name.removeprefix(old)] = part.pop(name)

    field.change(moved)


def test_target_was_renamed(field: Field) -> None:
    """What the target lacks while it has another name is not gone: all holds stay."""
    field.snap()
    field.clone()
    held = field.holds()
    move(field, HERE, "backup/moved")
    field.snap()
    ended = field.clone()
    assert ended.run
    assert status_of(ended.run) is ExitStatus.FAILED
    assert ended.run.reason == f"there is no dataset {HERE}"
    move(field, "backup/moved", HERE)
    assert field.holds() == held
    assert field.clone().said("warn") == []
    field.check_copies()


def test_rows_that_cannot_be_read(field: Field) -> None:
    """A copy whose line of `zfs list` has more columns is not taken for one that is gone."""
    field.snap()
    field.clone(NAS)
    held, there = field.holds(), field.pool(NAS)["facts"]
    field.snap()
    field.play_far(facts={copy_of("tank/a"): {"token": "a\ttab"}})
    ended = field.clone(NAS)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.FAILED
    assert str(ended.run.reason).startswith("cannot read the snapshots of root@nas: ")
    assert field.holds() == held
    field.play_far(facts=there)
    assert field.clone(NAS).said("warn") == []
    field.check_copies(NAS)


def unmarked(pool: dict[str, Any], name: str) -> None:
    pool["snapshots"][name]["kept"] = None


def renamed(pool: dict[str, Any], name: str) -> None:
    pool["snapshots"][name.replace("@s-", "@mine-")] = pool["snapshots"].pop(name)


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("what", [unmarked, renamed])
def test_wanted_no_more(
    field: Field, what: Callable[[Any, str], None], is_first: bool, rollback: bool
) -> None:
    """A snapshot that an interrupted clone was to send, and that is none of ours any more."""
    field.snap()
    if not is_first:
        field.clone()
        field.snap()
    newest = field.newest("tank/a")
    assert field.clone(at="end:zfs hold#1").status == -9
    field.settle()
    field.change(lambda pool: what(pool, newest))
    ended = field.recover(rollback=rollback)
    assert (ended.status, ended.raised) == (0, None), log(field)
    run = field.run()
    if rollback:
        assert run["outcome"] == "rolled-back"
    else:
        assert run["outcome"] == "partial"
        assert run["reason"].startswith(f"{newest} is to be sent no more")
        assert field.is_whole("tank/enc")
    assert field.guids(f"{HERE}/a") == field.guids("tank/a")[: 0 if is_first else 1]
    tags = [tag for name, tag in field.holds().items() if "tank/a@" in name]
    assert len(tags) == (not is_first)  # on what both ends have
    field.snap()
    assert field.clone().status == 0
    assert field.run()["outcome"] == "completed"
    assert field.guids(f"{HERE}/a")[-1] == field.guids("tank/a")[-1]


@pytest.mark.parametrize("is_new", [True, False])
def test_pruned_meanwhile(field: Field, is_new: bool) -> None:
    """A snapshot that is gone before it is held is that dataset's trouble alone."""
    field.snap()
    field.clone()
    field.snap("tank/a", *(["tank/enc"] if is_new else []))
    gone = field.newest("tank/a")
    just_before(field, "hold", gone, lambda: field.change(lambda pool: pool["snapshots"].pop(gone)))
    ended = field.clone()
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert gone in str(ended.run.reason)
    assert field.is_whole("tank/enc")
    field.snap()
    field.scene.changes.clear()
    assert field.clone().said("warn") == []
    field.check_copies()


@pytest.mark.parametrize(("method", "nth"), [("size", 1), ("require", 2)])
@pytest.mark.parametrize("sent", [SETS, ("tank/enc",), ("tank/a",)])
def test_pool_goes_away(field: Field, method: str, nth: int, sent: tuple[str, ...]) -> None:
    """A disk that is pulled out in the midst of it, or before it is proven what has arrived."""
    field.snap()
    field.clone()
    field.snap(*sent)
    subject = sent[-1] if method == "size" else "backup"
    away = {"pools": {"tank": POOLS["tank"]}}
    just_before(field, method, subject, lambda: field.scene.play(**away), nth=nth)
    ended = field.clone()
    assert ended.run
    is_any_known = method == "size" or sent != SETS
    expected = ExitStatus.PARTIAL if is_any_known else ExitStatus.FAILED
    assert status_of(ended.run) is expected
    assert ended.run.reason == "pool backup is not imported"
    assert ended.said("warn") == ["pool backup is not imported"]
    assert field.newest("tank/enc") in field.holds()
    field.scene.changes.clear()
    field.play(pools=dict(POOLS))
    field.clone()
    field.check_copies()
    field.check_once()


def test_gone_once_it_has_arrived(field: Field) -> None:
    """What is gone here when an interrupted clone is gone on with, and is there, has arrived."""
    field.snap()
    gone = field.newest("tank/a")
    assert field.clone(at="before:cloned#1").status == -9
    field.change(lambda pool: pool["snapshots"].pop(gone))
    assert field.recover().raised is None
    assert (field.run()["outcome"], field.run()["reason"]) == ("completed", None)


def test_nothing_arrives(field: Field) -> None:
    """Where every program says that all is well, and nothing is there, that is seen."""
    field.snap()
    field.play(faults={"receive": "silent"})
    ended = field.clone()
    assert ended.run
    assert status_of(ended.run) is ExitStatus.FAILED
    assert "has not arrived in backup/here/a, though nothing failed" in str(ended.run.reason)
    assert field.holds() == {}  # there is nothing that the next one begins with


@pytest.mark.parametrize(
    "token",
    [
        {"snapshot": "tank/secret@x", "to": "9"},
        {"snapshot": "tank/a@foreign2"},  # asked for below by its guid
        {"snapshot": "tank/enc@s-20261122000001"},
    ],
)
def test_forged_token(field: Field, token: dict[str, str]) -> None:
    """A target that lies about what it lacks gets nothing, of nobody's."""
    field.snap()
    field.clone(NAS)
    field.snap("tank/a", kept=False)
    field.snap()
    there = field.scene.pool["snapshots"]
    name = token["snapshot"]
    copy = f"{HERE}/{name.partition('@')[0].partition('/')[2]}".replace("secret", "a")
    known = there.get(name, {}).get("guid", "9")
    base = field.guids("tank/enc")[0] if "enc" in name else field.guids("tank/a")[0]
    forged = faketoken.made(name, done=0, to=known, base=base)  # never raw
    field.forget()
    field.play_far(facts={**field.pool(NAS)["facts"], copy: {"token": forged}})
    ended = field.clone(NAS)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert "cannot be gone on with" in str(ended.run.reason)
    assert [words for words in field.commands("send") if "-t" in words] == []
    assert field.tokens(NAS) == [copy]


def test_discard(field: Field) -> None:
    """What was changed in a copy is forgotten where the user says so, and there alone."""
    field.snap()
    field.clone()
    base = field.newest("tank/a").replace("tank", HERE)
    field.snap()
    field.change(modified)
    field.clone(terms=Terms(discard=True))
    field.check_copies()
    assert base in [words[0] for words in field.commands("rollback")]
    assert all(len(words) == 1 for words in field.commands("rollback"))
    field.forget()
    field.clone(terms=Terms(discard=True))
    assert field.commands("rollback") == []


def test_discard_before_the_rest(field: Field) -> None:
    """What was changed beside a part of a stream is forgotten as well; the part is gone on with."""
    field.snap()
    field.clone()
    field.snap()
    field.cut_off()

    def written(pool: dict[str, Any]) -> None:
        pool["facts"][copy_of("tank/a")]["modified"] = True

    field.change(written)
    ended = field.clone()
    assert "has been modified" in str(ended.run and ended.run.reason)
    field.clone(terms=Terms(compress=False, discard=True))
    field.check_copies()
    field.check_once()


def test_discard_is_refused(field: Field) -> None:
    """What somebody took since the copy was looked at is not destroyed by the roll-back."""
    field.snap()
    field.clone()
    held = field.holds()
    field.snap()
    field.change(modified)
    just_before(field, "roll_back", f"{HERE}/a@", lambda: field.change(own_snapshot))
    ended = field.clone(terms=Terms(discard=True))
    check_refused(field, ended, "more recent snapshots or bookmarks exist", held)
    assert f"{HERE}/a@mine" in field.pool()["snapshots"]
    assert field.pool()["facts"][f"{HERE}/a"] == {"modified": True}


# -- who is not there ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pools": {"tank": "guid of tank"}}, "pool backup is not imported"),
        ({"pools": POOLS | {"backup": "another"}}, "the pool backup that is imported is another"),
        ({"health": {"backup": "SUSPENDED"}}, "pool backup is suspended"),
    ],
)
def test_pool_away(field: Field, change: dict[str, Any], words: str) -> None:
    """In a pool that is not there nothing is gone: nothing is released, and recover waits."""
    field.snap()
    field.clone()
    field.snap()
    restore = field.save()
    before = field.pool()["snapshots"]
    ended = field.clone(before=lambda: field.scene.play(**change))
    assert ended.run
    assert status_of(ended.run) is ExitStatus.FAILED
    assert words in str(ended.run.reason)
    assert field.pool()["snapshots"] == before
    restore()
    field.cut_off(by="kill")
    before = field.pool()["snapshots"]
    field.play(**change)
    for options in ({}, {"rollback": True}):
        ended = field.recover(**options)
        assert isinstance(ended.raised, WaitingError)
        assert words in str(ended.raised)
        assert field.pool()["snapshots"] == before
    field.play(pools=dict(POOLS), health={})
    assert field.recover().raised is None
    field.check_copies()


@pytest.mark.parametrize("is_late", [True, False])
def test_one_is_not_there(field: Field, is_late: bool) -> None:
    """A target that cannot be reached does not keep the other from being served."""
    field.snap()
    refuse = {"ssh": "refuse"}
    if not is_late:
        field.play(faults=refuse)
    ended = field.clone(NAS, HERE, before=lambda: field.scene.play(faults=refuse))
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert "root@nas cannot be reached" in " ".join(ended.said("warn"))
    assert "nas" in str(ended.run.reason)
    field.check_copies(HERE)
    field.play(faults={})
    field.clone(NAS, HERE)
    field.check_copies(NAS)


def test_cannot_be_asked(field: Field) -> None:
    """Nor does one that is reached, and whose pools cannot be listed."""
    field.snap()
    field.play_far(faults={"zpool": "refuse"})
    words = "cannot list the pools of root@nas: The ZFS modules are not loaded."
    ended = field.clone(NAS, HERE)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert f"{words}: nothing is sent there" in ended.said("warn")
    field.check_copies(HERE)
    alone = field.clone(NAS)
    assert isinstance(alone.raised, EffectError)
    assert str(alone.raised).startswith(f"{words} (`ssh -o BatchMode=yes root@nas zpool list`")


def test_was_not_there(field: Field) -> None:
    """What was not there when it was planned is not waited for, nor is anything undone there."""
    field.snap()
    for options, outcome in (({}, "partial"), ({"rollback": True}, "rolled-back")):
        field.play(faults={"ssh": "refuse"})
        assert field.clone(NAS, HERE, at="start:zfs hold#1").status == -9
        field.play(faults={})
        assert field.recover(**options).raised is None
        assert field.run()["outcome"] == outcome
        assert field.guids(f"{HERE}/a", NAS) == []


def test_none_is_there(field: Field) -> None:
    """Where no target can be asked nothing is begun."""
    field.snap()
    field.play(faults={"ssh": "refuse"})
    ended = field.clone(NAS)
    assert isinstance(ended.raised, UnreachableError)
    assert field.scene.rows("SELECT * FROM runs") == []


def test_rollback_of_two(field: Field) -> None:
    """What was cut off goes where it can, and then the other target is waited for."""
    field.snap()
    field.clone(NAS)
    assert field.cut_off(by="kill", targets=(NAS, HERE)).status == -9
    field.play(faults={"ssh": "refuse"})
    ended = field.recover(rollback=True)
    assert isinstance(ended.raised, WaitingError)
    assert field.tokens() == []
    field.play(faults={})
    assert field.recover(rollback=True).raised is None
    assert field.run()["outcome"] == "rolled-back"


def test_rollback_that_fails_at_two(field: Field) -> None:
    """The target that is to be waited for is waited for, and what failed at another is told."""
    field.snap()
    field.clone(NAS)
    assert field.cut_off(by="kill", targets=(HERE, NAS)).status == -9
    field.play(faults={"receive": "refuse", "ssh": "refuse"})
    ended = field.recover(rollback=True)
    assert isinstance(ended.raised, WaitingError)
    assert "root@nas cannot be reached" in str(ended.raised)
    (told,) = ended.said("warn")
    assert f"cannot throw away what {HERE}/a has of a stream" in told
    field.play(faults={})
    assert field.recover(rollback=True).raised is None
    assert field.tokens() == []
    assert field.run()["outcome"] == "rolled-back"


def test_marks(field: Field) -> None:
    """All copies are known as such, also one that was cut off, whose mark did not come with it."""
    field.snap()
    field.cut_off()
    field.clone()

    def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
        ended.told = [(each.name, each) for each in End().kept((*SETS, *map(copy_of, SETS)))]

    told = field.scene._in_front_end(work, {"at": ""}).told
    assert {name.startswith(HERE): each.is_copy for name, each in told} == {
        True: True,
        False: False,
    }
    assert all(each.keeper for _, each in told)
    marks = {n: s["kept"] for n, s in field.pool()["snapshots"].items() if n.startswith(HERE)}
    assert sorted(marks.values()) == [KEEPER, f"copy:{KEEPER}"]


def test_recovery_of_two(field: Field) -> None:
    """An interrupted one waits for the target that is away, once the other was served."""
    field.snap()
    assert field.clone(NAS, HERE, at="start:zfs hold#1").status == -9
    field.play(faults={"ssh": "refuse"})
    ended = field.recover()
    assert isinstance(ended.raised, WaitingError)
    assert "root@nas cannot be reached" in str(ended.raised)
    field.check_copies(HERE)
    field.play(faults={})
    assert field.recover().raised is None
    field.check_copies(NAS)
    field.check_copies(HERE)
    field.check_once(HERE)


@pytest.mark.parametrize("kind", ["cut", "blink"])
def test_line_dies(field: Field, kind: str) -> None:
    """A line that dies at the last dataset: what arrived before that has arrived."""
    field.snap()
    field.play(faults={"ssh": f"{kind} {copy_of('tank/enc')}"})
    ended = field.clone(NAS)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert field.is_whole("tank/a", NAS)
    assert field.tokens(NAS) == [copy_of("tank/enc")]
    (field.scene.home / "dead").unlink(missing_ok=True)
    field.play(faults={})
    field.clone(NAS)
    field.check_copies(NAS)
    field.check_once(NAS)


def test_may_not_hold(field: Field) -> None:
    """Where the target's user may not hold, that is told; here only the last one is held."""
    field.play_far(faults={"hold": "refuse"})
    for _ in range(2):
        field.snap()
        ended = field.clone(NAS)
        assert ended.run
        assert status_of(ended.run) is ExitStatus.COMPLETED
        assert "cannot hold" in " ".join(ended.said("warn"))
        field.check_copies(NAS, held=False)


def test_may_not_hold_rolled_back(field: Field) -> None:
    """That does not keep a clone from being given up."""
    field.snap()
    field.clone(NAS)
    field.snap()
    assert field.cut_off(NAS, by="kill").status == -9
    field.play_far(faults={"hold": "refuse"})
    ended = field.recover(rollback=True)
    assert ended.raised is None
    assert field.tokens(NAS) == []
    assert field.run()["outcome"] == "rolled-back"


def test_release_here_is_refused(field: Field) -> None:
    """A roll-back that leaves holds here is not done: they would keep a prune from snapshots."""
    field.snap()
    field.clone(NAS)
    field.snap()
    assert field.cut_off(NAS, by="kill").status == -9
    held = field.newest("tank/a")
    field.play(faults={"release": "refuse"})
    ended = field.recover(rollback=True)
    assert "cannot release" in str(ended.raised)
    assert field.run()["outcome"] is None
    assert held in field.holds()
    field.play(faults={})
    assert field.recover(rollback=True).raised is None
    assert field.run()["outcome"] == "rolled-back"
    assert held not in field.holds()


@pytest.mark.parametrize("kind", ["noise", "title"])
def test_noise(field: Field, kind: str) -> None:
    """What the far shell has to say on its way changes nothing, whether or not it ends its line."""
    field.play(faults={"ssh": kind})
    for _ in range(2):
        field.snap()
        ended = field.clone(NAS)
        assert (ended.status, ended.raised, ended.said("warn")) == (0, None, []), log(field)
        field.check_copies(NAS)


@pytest.mark.parametrize("createtxg", ["a word", "9" * 5000])  # no int() of Python's reads that
def test_not_as_zfs_prints(field: Field, createtxg: str) -> None:
    """What the other machine prints can be anything; it is told, and ends no run half-way."""
    field.snap()
    field.clone(NAS)
    held, there = field.holds(), field.pool(NAS)["snapshots"]
    field.snap()
    printed = {name: each | {"createtxg": createtxg} for name, each in there.items()}
    field.play_far(snapshots=printed)
    ended = field.clone(NAS)
    assert ended.run, log(field)
    assert status_of(ended.run) is ExitStatus.FAILED
    assert str(ended.run.reason).startswith("cannot read the snapshots of root@nas: ")
    assert field.holds() == held
    field.play_far(snapshots=there)
    assert field.clone(NAS).status == 0
    field.check_copies(NAS)


@pytest.mark.parametrize("guid", ["", "\udce9"])
def test_guid_that_is_none(field: Field, guid: str) -> None:
    """Nor does what it prints for the guid of its pool; nothing is begun."""
    field.snap()
    field.play_far(pools={"backup": guid})
    ended = field.clone(NAS)
    assert isinstance(ended.raised, UnreachableError)
    assert ended.raised.message == "the pool root@nas:backup has no guid"
    assert field.scene.rows("SELECT * FROM runs") == []


@pytest.mark.parametrize("command", ["zpool list", "zfs list"])
def test_signal_while_nobody_answers(field: Field, command: str) -> None:
    """A machine that answers to ssh, and whose zfs hangs, keeps nobody from ending a clone."""
    field.snap()
    field.clone(NAS)
    held = field.holds()
    field.snap()
    field.play(faults={"ssh": f"hear {command}"})
    began = time.monotonic()
    ended = field.clone(NAS)
    field.settle()
    assert time.monotonic() - began < 30
    assert ended.interrupted == "interrupted by SIGTERM", log(field)
    assert field.holds() == held
    field.play(faults={})
    assert field.recover().decisions == []
    field.clone(NAS)
    field.check_copies(NAS)


def test_nobody_answers(field: Field) -> None:
    """Nor does it keep a clone for ever; it is a target that cannot be asked."""
    field.snap()
    field.play(faults={"ssh": "hang zfs list"})
    field.scene.changes.append(lambda: setattr(ends, "_ANSWER_S", 1.0))
    ended = field.clone(NAS, HERE)
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert ended.run.reason
    words = "root@nas cannot be asked: `zfs list` has not ended there after 1 s"
    assert ended.run.reason.startswith(words)
    field.check_copies(HERE)


# -- no room ---------------------------------------------------------------------------------


def test_journal_is_full(field: Field) -> None:
    """What has arrived and cannot be recorded is not said; recover waits, and then says it."""
    field.snap()
    assert field.clone(at="start:zfs hold#1").status == -9

    @contextmanager
    def scarce(journal: Journal, run: Run) -> Iterator[Change]:
        with change(journal, run) as made:
            yield made
            raise JournalFullError("no space left for the journal")

    change = Journal.change
    field.scene.changes.append(lambda: setattr(Journal, "change", scarce))
    ended = field.recover()
    assert isinstance(ended.raised, WaitingError)
    assert "no space left for the journal" in str(ended.raised)
    assert all(map(field.is_whole, SETS))
    field.scene.changes.clear()
    assert field.recover().raised is None
    field.check_copies()
    assert len(field.sends()) == 2
    assert field.run()["outcome"] == "completed"

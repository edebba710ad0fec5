"""What a clone is asked to do, and what it will do with each dataset: all that needs no ZFS."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from atomtx import cloner, cloning, process, wanted
from atomtx.cloning import Pair, Terms
from atomtx.convention import Pattern
from atomtx.errors import BusyError, EffectError, UserError
from atomtx.intents import from_json
from atomtx.names import Target
from atomtx.pipeline import Stage, carry
from atomtx.plan import DatasetFacts, Pool, Request
from atomtx.records import Step
from atomtx.recovery import LeaveAlone, Probes, Resume, RollBack, Wait, Wish, decide
from atomtx.replica import Copy, Point, Send, Source
from atomtx.states import PLANNED, Verb
from atomtx.volumes import ends
from atomtx.volumes.ends import End
from atomtx.volumes.kind import Kept
from tests.runs import a_plan, a_run

PATTERN = Pattern.parse()
POOLS = [Pool("tank", "11", "ONLINE"), Pool("zroot", "22", "ONLINE")]
HERE, THERE = Target.parse("backup/here"), Target.parse("root@nas:backup/here")


def kept(dataset: str, n: int = 1, **values: Any) -> Kept:
    made = Kept(f"{dataset}@atomtx-20261101000{n}", f"{n}", f"{n}", n, "0123456789abcdef", 0, ())
    return replace(made, **values)


def found(*names: str, asked: tuple[str, ...] = ()) -> wanted.Wanted:
    facts = [DatasetFacts(n, "filesystem", f"guid of {n}", f"/{n}", "on", True, "-") for n in names]
    return wanted.choose(Request(asked or names, recursive=True), asked or names, facts, POOLS)


# -- the plan --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "names", "words"),
    [
        ("tank/a", ("tank/a", "tank/a/b"), "is one of the datasets"),
        ("tank/a/b", ("tank", "tank/a", "tank/a/b"), "is one of the datasets"),
        ("tank", ("tank/a", "zroot/b"), "is one of the datasets"),  # it would be its own copy
        ("backup", ("tank/a", "zroot/a"), "would have one copy, backup/a"),
        ("nas:backup", ("tank", "zroot"), "would have one copy, nas:backup"),
    ],
)
def test_copies_meet(target: str, names: tuple[str, ...], words: str) -> None:
    """Neither do two datasets share a copy, nor is a copy copied."""
    with pytest.raises(UserError, match=words):
        cloning._check_apart(Target.parse(target), found(*names))


def test_copies_apart() -> None:
    """The same names on another machine are others."""
    cloning._check_apart(Target.parse("nas:tank"), found("tank", "tank/a"))
    cloning._check_apart(Target.parse("backup/here"), found("tank/a", "tank/b"))


@pytest.mark.parametrize(
    ("each", "is_one"),
    [
        (kept("tank/a"), True),
        (kept("tank/a", is_copy=True), True),  # a copy of a copy
        (kept("tank/a", keeper=""), False),
        (kept("tank/a", is_transient=True), False),  # at home it goes again
        (kept("tank/a", name="tank/a@daily"), False),
        (kept("tank/a", name="tank/a@atomtx-0123456789abcdef"), False),  # of a backup at work
    ],
)
def test_what_counts(each: Kept, is_one: bool) -> None:
    """Only what `atomtx snap` took is sent."""
    assert cloning.counts(each, PATTERN) is is_one


def test_transient() -> None:
    """What is meant to go again is sent where the user wants it, and nothing else with it."""
    transient = kept("tank/a", is_transient=True)
    assert cloning.counts(transient, PATTERN, transient=True)
    assert not cloning.counts(replace(transient, keeper=""), PATTERN, transient=True)
    assert cloning._last([transient], PATTERN, transient=False) == {}
    assert cloning._last([transient], PATTERN, transient=True) == {"tank/a": transient}


def test_last() -> None:
    """The newest by transaction group, whatever the clock said."""
    there = [kept("tank/a", 1, createtxg="10"), kept("tank/a", 2, createtxg="9")]
    assert cloning._last(there, PATTERN, transient=False) == {"tank/a": there[0]}


def test_without_snapshots() -> None:
    """A child without any is left out and named; who names one without any is told."""
    last = {"tank/a": kept("tank/a")}
    of_tank = cloning._with_snapshots(found("tank/a", "tank/a/new", asked=("tank/a",)), last)
    assert [facts.name for facts in of_tank.datasets] == ["tank/a"]
    assert of_tank.notes == ("tank/a/new is not copied: it has no kept snapshot",)
    for names, asked in ((("tank/a", "tank/b"), ()), (("tank/c",), ())):
        with pytest.raises(UserError, match="has no kept snapshot"):
            cloning._with_snapshots(found(*names, asked=asked), last)


def test_intents() -> None:
    """One step a target, which survives the journal; its holds are named after the target."""
    last = {name: kept(name) for name in ("tank/a", "tank/a/b")}
    there = found("tank/a", "tank/a/b", asked=("tank/a",))
    made = cloning._plan(Request(("tank/a",)), there, [HERE, THERE], last)
    guids = {each.name: each.guid for each in last.values()}
    pools = {HERE: "7", THERE: "8"}
    steps = cloning.intents(made, guids, pools, pattern=PATTERN, terms=Terms(rate=7))
    assert [step.target for step in steps] == [str(HERE), str(THERE)]
    assert [step.pool_guid for step in steps] == ["7", "8"]
    assert steps[0].copies == ("backup/here/a", "backup/here/a/b")
    assert steps[1].tag == "atomtx-clone:root@nas:backup/here:8"
    assert from_json(steps[1].kind, steps[1].to_json()) == steps[1]
    assert made.verb is Verb.CLONE
    assert made.label == "clone tank/a to backup/here, root@nas:backup/here"


def test_long_tags() -> None:
    """ZFS takes no longer tag, and two targets have never one."""
    targets = [Target.parse(f"nas:backup/{'x' * n}") for n in range(150, 200)]
    tags = {cloning.tag_of(target, guid) for target in targets for guid in ("7", "8")}
    assert len(tags) == 100
    assert max(map(len, tags)) <= 255


def test_alone() -> None:
    """Two jobs do not write to one copy at a time."""
    last = {"tank/a": kept("tank/a")}
    made = cloning._plan(Request(("tank/a",)), found("tank/a"), [HERE], last)
    steps = cloning.intents(
        made, {last["tank/a"].name: "1"}, {HERE: "7"}, pattern=PATTERN, terms=Terms()
    )
    other = a_run(a_plan(verb=Verb.CLONE), steps=(Step(1, 0, steps[0], None, None),))
    with pytest.raises(BusyError, match="sends to backup/here/a as well"):
        cloning.check_alone(steps, [other])
    with pytest.raises(BusyError):  # by another name of this machine
        cloning.check_alone([replace(steps[0], target="localhost:backup/here")], [other])
    elsewhere = replace(steps[0], target="nas:backup/here", pool_guid="8")
    cloning.check_alone([elsewhere], [other])
    unasked = replace(steps[0], pool_guid="")  # nothing is sent there
    cloning.check_alone([unasked], [replace(other, steps=(Step(1, 0, unasked, None, None),))])
    done = replace(other, steps=(Step(1, 0, steps[0], None, "done"),))
    cloning.check_alone(steps, [done])


# -- both ends -------------------------------------------------------------------------------


def test_portions() -> None:
    """No argument of ssh gets too long, and nothing is lost."""
    names = [f"backup/{n:0200}" for n in range(2000)]
    parts = list(ends.portions(names))
    assert [name for part in parts for name in part] == names
    assert max(len(" ".join(part)) for part in parts) < 131_072
    assert len(parts) == 5
    assert list(ends.portions([])) == []


def test_remote_command() -> None:
    """Each word reaches the other machine as it is."""
    argv = ends.remote("nas", ("zstd", "-d"), ("zfs", "receive", "b/$(reboot) 'x'"))
    assert argv[-3:-1] == ("--", "nas")
    assert argv[-1].replace(f"env PATH={process.BASE_ENVIRONMENT['PATH']} ", "") == (
        "zstd -d | zfs receive 'b/$(reboot) '\"'\"'x'\"'\"''"
    )


A1, A2 = Point("tank/a@1", "1", 10, True), Point("tank/a@2", "2", 20, True)
PLAIN = Source("tank/a", False, False, (A1, A2))


@pytest.mark.parametrize(
    ("source", "send"),
    [
        (PLAIN, "zfs send -Lcp -i tank/a@1 tank/a@2"),
        (replace(PLAIN, is_encrypted=True), "zfs send -Lcpw -i tank/a@1 tank/a@2"),
    ],
)
def test_send(source: Source, send: str) -> None:
    """What is encrypted leaves raw, in whatever way it is sent."""
    assert " ".join(ends.send_argv(source, Send(A2, A1))) == send


def test_receive() -> None:
    """A copy cannot be mounted over anything, shared or written to; a cut is kept."""
    words = ends.receive_argv(PLAIN, "b/a")
    assert {"-s", "-u", "readonly=on", "canmount=noauto", "mountpoint", "encryption"} <= set(words)
    assert "-F" not in words
    words = ends.receive_argv(replace(PLAIN, is_volume=True, is_encrypted=True), "b/a")
    assert {"mountpoint", "canmount=noauto", "encryption"}.isdisjoint(words)


def test_room_of_a_copy() -> None:
    """What limits or reserves the room of a dataset is not its copy's; a volume has no quota."""

    def excluded(source: Source) -> set[str]:
        words = ends.receive_argv(source, "b/a")
        return {word for flag, word in pairwise(words) if flag == "-x"}

    assert {"quota", "refquota", "reservation", "refreservation"} <= excluded(PLAIN)
    of_volume = excluded(replace(PLAIN, is_volume=True))
    assert {"reservation", "refreservation"} <= of_volume
    assert {"quota", "refquota"}.isdisjoint(of_volume)


def test_zipped() -> None:
    """Compressed on the way to another machine, and never where that is of no use."""
    there = End(host="nas")
    (zstd, last) = cloner._sinks(("zfs", "receive", "b/a"), there, "b/a", zipped=True)
    assert zstd.argv[0] == "zstd"
    assert [words.split()[2] for words in last.argv[-1].split(" | ")] == ["zstd", "zfs"]
    (only,) = cloner._sinks(("zfs", "receive", "b/a"), End(), "b/a", zipped=False)
    assert only.argv == ("zfs", "receive", "b/a")
    assert not only.may_be_killed


def test_through_zstd(tmp_path: Path) -> None:
    """What zstd makes here, it reads there: the words of both are right."""
    file = tmp_path / "there"
    zstd, last = cloner._sinks(("dd", f"of={file}"), End(host="nas"), "b/a", zipped=True)
    far = replace(last, argv=("sh", "-c", last.argv[-1]))  # as sshd gives it to a shell
    text = b"the same again and again, " * 100_000
    (tmp_path / "here").write_bytes(text)
    source = Stage("cat", ("cat", str(tmp_path / "here")))
    carry(source, [zstd, far], lock=None, moved=lambda _: None, check=lambda: None)
    assert file.read_bytes() == text


# -- the end ---------------------------------------------------------------------------------


def test_proven() -> None:
    """What did not arrive is trouble, also where every program said that all was well."""
    sent = Pair(PLAIN, Copy("b/a"), transfers=(Send(A2, A1),))
    arrived = Pair(PLAIN, Copy("b/a", True, (A1, A2)))
    assert cloner._proven(sent, arrived) == sent
    lost = cloner._proven(sent, sent).trouble
    assert lost
    assert "tank/a@2 has not arrived in b/a" in lost.message
    failed = replace(sent, trouble=EffectError("cut"))
    assert cloner._proven(failed, arrived) == failed


@pytest.mark.parametrize(
    ("probes", "wish", "decision"),
    [
        (Probes(), Wish(), Resume()),
        (Probes(), Wish(rollback=True), RollBack("at the user's word")),
        (Probes(trouble="pool tank is not imported"), Wish(), Wait("pool tank is not imported")),
        (Probes(trouble="no"), Wish(rollback=True), Wait("no")),
        (Probes(front_alive=True), Wish(), LeaveAlone("another atomtx is at work on it")),
    ],
)
def test_recovery(probes: Probes, wish: Wish, decision: object) -> None:
    """An interrupted clone is gone on with, however often, unless the user says otherwise."""
    run = a_run(a_plan(verb=Verb.CLONE), state=PLANNED, attempts=99)
    assert decide(run, probes, wish) == decision

"""Snapshots of subvolumes that stay: `snap`, `prune`, `unsnap` on real btrfs, and their kills."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atomtx import adoption, btrfsio, history, journalfile, pruning, snapping, unsnapping
from atomtx.convention import Pattern
from atomtx.errors import EffectError, ExitStatus, UserError, WaitingError
from atomtx.executor import Tell
from atomtx.interrupts import Interrupts
from atomtx.journal import Journal
from atomtx.names import KEPT_DIRECTORY, TRANSIENT_DIRECTORY, BtrfsSnapshot, RunId
from atomtx.plan import Plan, Request
from atomtx.pruning import Choice
from atomtx.records import status_of
from atomtx.recovery import Resume, RollBack, RollForward
from atomtx.retention import Policy
from atomtx.volumes import btrfs
from atomtx.volumes.zfs import Zfs
from tests.btrfs.conftest import Flat, Nested
from tests.btrfs.stage import Disk, Stage, call, tree
from tests.scene import Ended

PATTERN = Pattern.parse("s-%Y%m%d%H%M")
IN_USE = "in use meanwhile: mounted, being sent, the default, or with a subvolume in it"
FIRST = datetime(2026, 11, 22, 3, 1, tzinfo=UTC)


class Clock:
    """A minute later with each plan, so that no name comes again."""

    def __init__(self) -> None:
        self._at = FIRST

    def __call__(self) -> datetime:
        self._at += timedelta(minutes=1)
        return self._at


@pytest.fixture
def clock() -> Clock:
    return Clock()


def a_snap(clock: Callable[[], datetime], *paths: Path, **values: Any) -> Plan:
    transient = values.pop("transient", False)
    request = Request(tuple(map(str, paths)), **values)
    return snapping.make_plan(request, pattern=PATTERN, at=clock(), zfs=Zfs(), transient=transient)


def directory(stage: Stage, made: Plan) -> Path:
    """Return where a run's snapshots lie once they are kept."""
    return stage.disk.top / BtrfsSnapshot.parse(made.volumes[0].snapshot).directory


def path_of(stage: Stage, snapshot: str) -> Path:
    return Path(f"{stage.disk.top}{BtrfsSnapshot.parse(snapshot).path}")


def kept(stage: Stage) -> list[str]:
    """Return the kept snapshots of the file system, by their paths, and empty directories."""
    tops = (stage.disk.top / name for name in (KEPT_DIRECTORY, TRANSIENT_DIRECTORY))
    moments = [moment for top in tops if top.exists() for moment in sorted(top.iterdir())]
    found = [leaf for moment in moments for leaf in sorted(moment.iterdir()) or [moment]]
    return [str(each.relative_to(stage.disk.top)) for each in found]


def is_whole(stage: Stage, made: Plan) -> bool:
    """Tell whether all is kept, or nothing is there; anything else fails the test."""
    (run,) = stage.rows(f"SELECT * FROM runs WHERE id = '{made.run}'")
    assert stage.rows("SELECT * FROM steps WHERE outcome IS NULL") == []
    assert stage.disk.left() == []
    there = [v.snapshot for v in made.volumes if path_of(stage, v.snapshot).exists()]
    if there:
        assert len(there) == len(made.volumes)
        assert (run["state"], run["outcome"]) == ("kept", "completed")
        return True
    assert (run["state"], run["outcome"]) == ("destroyed", "rolled-back")
    return False


def cleared(stage: Stage) -> None:
    """Take away all that is kept, and where it lies: the next run is the first."""
    for path in kept(stage):
        delete(stage.disk.top / path)
    for name in (KEPT_DIRECTORY, TRANSIENT_DIRECTORY):
        shutil.rmtree(stage.disk.top / name, ignore_errors=True)


def succeeded(stage: Stage, ended: Ended) -> Ended:
    assert (ended.status, ended.raised) == (0, None), (stage.home / "log").read_text()
    return ended


def delete(path: Path) -> None:
    call("btrfs", "-q", "subvolume", "delete", path)


# -- snap: the ordinary course ---------------------------------------------------------------


def test_course(stage: Stage, flat: Flat, clock: Clock) -> None:
    """They lie in one directory that tells the time and the run, read-only, as the files were."""
    made = a_snap(clock, flat.root, flat.home)
    ended = succeeded(stage, stage.backup(made))
    assert is_whole(stage, made)
    where = directory(stage, made)
    assert where == stage.disk.top / "atomtx-kept" / f"s-202611220302.{made.run}"
    leaves = [
        f"{n}.{str(path)[1:].replace('/', '-')}" for n, path in enumerate((flat.root, flat.home))
    ]
    assert sorted(path.name for path in where.iterdir()) == leaves
    (flat.home / "file").write_text("changed")
    assert (where / leaves[1] / "file").read_text() == "frozen @home"
    with pytest.raises(OSError, match="Read-only"):
        (where / leaves[1] / "file").write_text("x")
    assert {where.stat().st_mode & 0o777, where.parent.stat().st_mode & 0o777} == {0o700}
    assert not (stage.home / "zfs.log").exists()  # no program of ZFS was started
    moves = [(row["source"], row["dest"]) for row in stage.rows("SELECT * FROM moves")]
    assert moves == [("planned", "snapshotted"), ("snapshotted", "kept")]
    (skew,) = {row["detail"] for row in stage.rows("SELECT * FROM steps WHERE kind LIKE 'take%'")}
    assert skew.startswith("2 subvolumes one after the other within 0.")
    assert any(skew in words for words in ended.said("step"))


def test_durable(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Promise 10: the rename is committed before the journal says that they are kept."""
    points = stage.backup(a_snap(clock, flat.home)).points
    assert points.index("end:btrfs rename#1") < points.index("end:btrfs commit#1")
    assert points.index("end:btrfs commit#1") < points.index("before:kept#1")


def test_transient(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Those that are to go again lie apart from the others: that is their mark."""
    made = a_snap(clock, flat.home, transient=True)
    assert "as transient" in next(snapping.steps(made)).describe()
    succeeded(stage, stage.backup(made))
    assert is_whole(stage, made)
    assert directory(stage, made).parent.name == "atomtx-transient"


def test_nested(stage: Stage, nested: Nested, clock: Clock) -> None:
    """With -r what lies below as well, but none of ours: neither at work nor kept."""
    made = a_snap(clock, nested.data, recursive=True)
    succeeded(stage, stage.backup(made))
    assert is_whole(stage, made)
    contents = {path.name.split(".")[0]: tree(path) for path in directory(stage, made).iterdir()}
    assert contents["0"]["file"] == b"frozen top"
    assert contents["0"]["photos"] is None
    assert contents["2"] == {"file": b"frozen photos", "of 2026": None}
    again = a_snap(clock, nested.data, recursive=True)
    assert (len(made.volumes), again.notes) == (4, ())
    assert [v.name for v in again.volumes] == [v.name for v in made.volumes]
    backup = stage.plan_of(nested.data, recursive=True)
    assert (len(backup.volumes), backup.notes) == (4, ())


def test_gap(stage: Stage, nested: Nested, clock: Clock) -> None:
    """What no backup could show, because one between two is missing, can be kept all the same."""
    made = a_snap(clock, nested.data, nested.data / "photos" / "of 2026")
    assert len(made.volumes) == 2


def test_mixed(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Promise 8: datasets and subvolumes in one run; what lies between them is measured."""
    of_zfs = stage.plan("tank/a", "tank/b")
    made = a_snap(clock, flat.root, flat.home)
    datasets = tuple(replace(v, snapshot=f"{v.name}@s-{made.run}") for v in of_zfs.volumes)
    both = replace(made, volumes=(*datasets, *made.volumes))
    whole = ("", "journal:snapshotted#1", "end:zfs program#1", "end:btrfs rename#1")
    for point in (*whole, "end:btrfs snapshot#1"):
        run = RunId.new()
        volumes = [replace(v, snapshot=v.snapshot.replace(made.run, run)) for v in both.volumes]
        stage.play(snapshots={})
        stage.backup(replace(both, run=run, volumes=tuple(volumes)), at=point)
        succeeded(stage, stage.recover())
        marks = {each["kept"] for each in stage.pool["snapshots"].values()}
        assert marks == ({run} if point in whole else set()), point
        paths = [path_of(stage, v.snapshot).exists() for v in volumes[2:]]
        assert paths == [point in whole] * 2, point
        assert stage.disk.left() == []
    rows = stage.rows("SELECT detail FROM steps WHERE kind LIKE 'take%' AND outcome = 'done'")
    assert len(rows) == 2 * len(whole)
    skew = "one transaction group a pool; 1 pool and 2 subvolumes one after the other within"
    assert all(row["detail"].startswith(skew) for row in rows)


# -- snap: kills -----------------------------------------------------------------------------


@pytest.fixture(params=["flat", "nested"])
def paths(request: pytest.FixtureRequest) -> tuple[list[Path], dict[str, Any]]:
    """What is named, of two subvolumes beside each other, and of four with the top level."""
    if request.param == "flat":
        flat: Flat = request.getfixturevalue("flat")
        return [flat.root, flat.home], {}
    return [request.getfixturevalue("nested").data], {"recursive": True}


def test_killed_at_every_point(stage: Stage, clock: Clock, paths: Any) -> None:
    """
    Promises 4 and 5: wherever it is killed, the moment is whole after a recovery, or not there.

    Once it was whole before the kill it is kept, never taken away.
    """
    named, values = paths
    stage.backup(a_snap(clock, *named, **values))  # makes the journal
    cleared(stage)
    points = stage.backup(made := a_snap(clock, *named, **values)).points
    last = f"end:btrfs snapshot#{len(made.volumes)}"
    assert {"before:planned#1", last, "journal:snapshotted#1", "journal:kept#1"} <= set(points)
    assert {"start:btrfs rename#1", "end:btrfs rename#1", "end:btrfs commit#1"} <= set(points)
    outcomes = {True: 0, False: 0}
    for point in points:
        cleared(stage)
        made = a_snap(clock, *named, **values)
        assert stage.backup(made, at=point).status == -signal.SIGKILL, point
        if not stage.rows(f"SELECT * FROM runs WHERE id = '{made.run}'"):
            continue  # before its intents were durable
        succeeded(stage, stage.recover())
        assert stage.recover().decisions == [], point
        whole = is_whole(stage, made)
        outcomes[whole] += 1
        assert whole is (points.index(point) >= points.index(last)), point
    assert min(outcomes.values()) > 3, outcomes


def test_recovery_is_killed_too(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Promise 5: a killed recovery of a killed run is gone on with by the next one."""
    firsts = (
        "end:btrfs snapshot#1",
        "end:btrfs snapshot#2",
        "journal:snapshotted#1",
        "end:btrfs rename#1",
    )
    for at in firsts:
        stage.backup(a_snap(clock, flat.root, flat.home), at=at)
        points = stage.recover().points
        assert points
        for second in points:
            made = a_snap(clock, flat.root, flat.home)
            assert stage.backup(made, at=at).status == -signal.SIGKILL
            assert stage.recover(at=second).status == -signal.SIGKILL, (at, second)
            succeeded(stage, stage.recover())
            assert is_whole(stage, made) is (at != firsts[0]), (at, second)


def test_decisions(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Half a moment is rolled back, a whole one is kept, also at a user's word to roll back."""
    cases: tuple[tuple[str, dict[str, Any], type], ...] = (
        ("end:btrfs snapshot#1", {}, RollBack),
        ("end:btrfs snapshot#2", {}, Resume),
        ("end:btrfs snapshot#2", {"rollback": True}, RollBack),
        ("journal:snapshotted#1", {"rollback": True}, RollForward),
        ("end:btrfs rename#1", {"rollback": True, "may_resume": False}, RollForward),
    )
    for at, options, expected in cases:
        made = a_snap(clock, flat.root, flat.home)
        stage.backup(made, at=at)
        (decision,) = succeeded(stage, stage.recover(**options)).decisions
        assert isinstance(decision, expected), (at, options)
        assert is_whole(stage, made) is (expected is not RollBack)


def test_violations_are_seen(stage: Stage, flat: Flat, clock: Clock) -> None:
    """A recovery that does not know a kept snapshot again, and an undo that leaves one, fail."""
    real = btrfs._identify
    stage.changes.append(
        lambda: setattr(
            btrfs,
            "_identify",
            lambda top, v: found if (found := real(top, v)) and found.mark else None,
        )
    )
    made = a_snap(clock, flat.home)
    stage.backup(made, at="end:btrfs rename#1")
    succeeded(stage, stage.recover())
    with pytest.raises(AssertionError):
        is_whole(stage, made)
    stage.changes[:] = [lambda: setattr(btrfs, "_destroy", lambda *_: "done")]
    made = a_snap(clock, flat.home)
    stage.backup(made, at="end:btrfs snapshot#1")
    stage.recover(rollback=True)
    with pytest.raises(AssertionError):
        is_whole(stage, made)


# -- snap: what others do --------------------------------------------------------------------


def test_name_is_taken(stage: Stage, flat: Flat) -> None:
    """One moment of a name for a subvolume, transient or not; another subvolume has its own."""
    succeeded(stage, stage.backup(a_snap(lambda: FIRST, flat.home)))
    for transient in (False, True):
        with pytest.raises(UserError, match="there is a snapshot 's-202611220301' already"):
            a_snap(lambda: FIRST, flat.root, flat.home, transient=transient)
    other = a_snap(lambda: FIRST, flat.root)
    succeeded(stage, stage.backup(other))
    assert is_whole(stage, other)
    assert len(kept(stage)) == 2


def test_destroyed_by_somebody(stage: Stage, flat: Flat, clock: Clock) -> None:
    """What is gone before it was kept is told; the others are kept. Of none nothing is left."""
    for count, outcome in ((1, "partial"), (2, "failed")):
        made = a_snap(clock, flat.root, flat.home)
        stage.backup(made, at="journal:snapshotted#1")
        for volume in made.volumes[:count]:
            delete(path_of(stage, str(BtrfsSnapshot.parse(volume.snapshot).taken_as)))
        ended = succeeded(stage, stage.recover())
        assert ended.run
        assert (ended.run.state, ended.run.outcome) == ("kept", outcome)
        assert str(ended.run.reason).startswith(made.volumes[0].snapshot)
        assert stage.disk.left() == []
        assert len(kept(stage)) == 1  # of the first case


@pytest.mark.parametrize("what", ["file", "link", "subvolume", "another's"])
def test_no_place(stage: Stage, flat: Flat, clock: Clock, what: str) -> None:
    """Where the directory of kept ones cannot be had, nothing is taken, and nothing followed."""
    place = stage.disk.top / KEPT_DIRECTORY
    if what == "file":
        place.write_text("x")
    elif what == "link":
        (stage.disk.top / "elsewhere").mkdir()
        place.symlink_to("elsewhere")
    elif what == "subvolume":
        stage.disk.make(KEPT_DIRECTORY)
    else:
        place.mkdir()
        os.chown(place, 1, 1)
    made = a_snap(clock, flat.home)
    ended = stage.backup(made)
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert "is no directory of root's" in str(ended.run.reason)
    assert stage.disk.left() == []
    assert len(stage.rows("SELECT * FROM runs")) == 1


def test_place_is_lost_meanwhile(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Promise 2: where they cannot be moved now the run waits, and is gone on with later."""
    made = a_snap(clock, flat.home)
    stage.backup(made, at="journal:snapshotted#1")
    (stage.disk.top / KEPT_DIRECTORY).write_text("x")
    ended = stage.recover()
    assert isinstance(ended.raised, WaitingError)
    assert "are not marked as kept" in ended.raised.message
    (stage.disk.top / KEPT_DIRECTORY).unlink()
    succeeded(stage, stage.recover())
    assert is_whole(stage, made)


def test_not_mounted(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Promise 2: on a file system that is not mounted nothing is gone; recovery waits for it."""
    made = a_snap(clock, flat.home)
    stage.backup(made, at="journal:snapshotted#1")
    mounted = stage.disk.unmount_all()
    ended = stage.recover()
    assert isinstance(ended.raised, WaitingError)
    assert "is not mounted" in ended.raised.message
    stage.disk.mount(mounted[0], device=stage.disk.image, options="loop")
    succeeded(stage, stage.recover())
    assert is_whole(stage, made)


def test_lost_journal(stage: Stage, flat: Flat, clock: Clock) -> None:
    """What an interrupted run has taken is found by `recover --scan`; what is kept is not ours."""
    whole, half = a_snap(clock, flat.home), a_snap(clock, flat.root, flat.home)
    stage.backup(whole)
    stage.backup(half, at="end:btrfs snapshot#2")
    # Tests beside this one have strays and kept snapshots of their own.
    strays = {stray.run: stray for stray in adoption.scan(None, (), btrfs.marked())}
    stray, kept_by = strays[half.run], set(btrfs.keepers())
    assert (len(stray.snapshots), stray.is_of_snap) == (2, True)
    assert (whole.run in kept_by, half.run in kept_by) == (True, False)
    assert whole.run not in strays
    adopted = adoption.plan_of(stray, ())
    (stage.state / journalfile.NAME).unlink()

    def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
        journal.begin(adopted, adoption.intents_of(stray, adopted))

    stage._in_front_end(work, {})
    succeeded(stage, stage.recover(rollback=True))
    assert stage.disk.left() == []
    assert len(kept(stage)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("directory", "is a directory in the subvolume"), ("", "exclude each other")],
)
def test_refused(flat: Flat, clock: Clock, name: str, message: str) -> None:
    """There is no snapshot of a part, and no path beside --all."""
    (flat.home / "directory").mkdir()
    with pytest.raises(UserError, match=message):
        a_snap(clock, flat.home / name, all=not name)


# -- prune -----------------------------------------------------------------------------------


def chosen(*paths: Path, keep: int = 1, **values: Any) -> Choice:
    request = Request(tuple(map(str, paths)), recursive=values.pop("recursive", False))
    return pruning.choose(
        request,
        policy=Policy.parse({"keep-last": str(keep)}),
        pattern=values.pop("pattern", PATTERN),
        adopted=values.pop("adopted", ()),
        zfs=Zfs(),
        now=datetime.now(UTC),
        **values,
    )


def prune(stage: Stage, choice: Choice, at: str = "", **options: Any) -> Ended:
    return stage.prune(lambda _: choice, at, **options)


@pytest.fixture
def three(stage: Stage, flat: Flat, clock: Clock) -> list[Plan]:
    """Three kept moments of two subvolumes, the oldest first."""
    plans = [a_snap(clock, flat.root, flat.home) for _ in range(3)]
    for made in plans:
        stage.backup(made)
    return plans


def names(*plans: Plan) -> list[str]:
    return [volume.snapshot for made in plans for volume in made.volumes]


def there(stage: Stage) -> list[str]:
    return [f"{stage.disk.uuid}:/{path}" for path in kept(stage)]


def test_prune(stage: Stage, flat: Flat, three: list[Plan]) -> None:
    """The rules are for each subvolume; what they let go is gone, and so are its directories."""
    choice = chosen(flat.root, flat.home, keep=1)
    assert [v.item.name for v in choice.verdicts if v.keep] == names(three[2])
    (step,) = pruning.intents(choice, bookmark=True)
    assert step.describe() == f"destroy 4 kept snapshots of the btrfs file system {stage.disk.uuid}"
    ended = succeeded(stage, prune(stage, choice))
    assert there(stage) == names(three[2])
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("pruned", "completed")
    assert status_of(ended.run) is ExitStatus.COMPLETED
    assert "end:btrfs commit#1" in ended.points
    assert ended.points.index("end:btrfs commit#1") < ended.points.index("before:pruned#1")
    assert chosen(flat.root, flat.home).going == ()
    assert not (stage.home / "zfs.log").exists()


def test_what_does_not_count(stage: Stage, flat: Flat, clock: Clock, three: list[Plan]) -> None:
    """Others' snapshots, those of backups, of another pattern, transient ones, other subvolumes."""
    other = stage.disk.top / "theirs"
    call("btrfs", "-q", "subvolume", "snapshot", "-r", flat.home, other)
    stage.backup(stage.plan_of(flat.home, keep_snapshots=True))
    stage.backup(a_snap(clock, flat.home, transient=True))
    for uid, name in ((1, f"s-202611220401.{RunId.new()}"), (0, "s-202611220401")):
        made = stage.disk.top / KEPT_DIRECTORY / name
        made.mkdir()
        os.chown(made, uid, uid)
        call("btrfs", "-q", "subvolume", "snapshot", "-r", flat.home, made / "0")
    counted = [v.item.name for v in chosen(flat.home).verdicts]
    assert sorted(counted) == sorted(made.volumes[1].snapshot for made in three)
    assert chosen(flat.home, pattern=Pattern.parse("t-%Y%m%d%H%M")).verdicts == ()


def test_adopted(stage: Stage, flat: Flat, three: list[Plan]) -> None:
    """One that the user names counts, whoever took it; one that a run works with is not there."""
    call("btrfs", "-q", "subvolume", "snapshot", "-r", flat.home, stage.disk.top / "theirs")
    name = f"{stage.disk.uuid}:/theirs"
    choice = chosen(flat.home, keep=9, adopted=[name])
    assert next(v.item.name for v in choice.verdicts) == name  # the newest
    newer = a_snap(lambda: FIRST, flat.home)
    stage.backup(newer)
    choice = chosen(flat.home, adopted=[name], keep=1)
    assert [v.item.name for v in choice.verdicts if v.keep] == names(newer)
    succeeded(stage, prune(stage, choice))
    assert not (stage.disk.top / "theirs").exists()
    running = stage.plan_of(flat.root)
    stage.backup(running, at="journal:snapshotted#1")
    with pytest.raises(UserError, match="there is no snapshot"):
        chosen(flat.root, adopted=[running.volumes[0].snapshot])
    stage.recover()


def test_adopted_not_utf8(stage: Stage, flat: Flat, clock: Clock, typed: Typed) -> None:
    """One whose name the journal cannot hold is refused; nothing is destroyed."""
    theirs = stage.disk.top / "th\udceeirs"
    call("btrfs", "-q", "subvolume", "snapshot", "-r", flat.home, theirs)
    name = f"{stage.disk.uuid}:/{theirs.name}"
    newer = a_snap(clock, flat.home)
    stage.backup(newer)
    rule = ("--pattern", PATTERN.text, "--keep-last", "1")
    for how in ((), ("--dry-run",)):
        done = typed("prune", flat.home, *rule, "--adopt", name, *how)
        assert "is not UTF-8" in done.stderr
        assert done.returncode == ExitStatus.USAGE
    assert theirs.exists()
    assert [v.item.name for v in chosen(flat.home).verdicts] == names(newer)


def test_adopted_transient(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Also one that is to go again counts, where the user names it."""
    old, new = a_snap(clock, flat.home, transient=True), a_snap(clock, flat.home)
    for made in (old, new):
        stage.backup(made)
    succeeded(stage, prune(stage, chosen(flat.home, adopted=names(old))))
    assert there(stage) == names(new)


def replaced(stage: Stage, flat: Flat, path: Path) -> None:
    delete(path)
    call("btrfs", "-q", "subvolume", "snapshot", "-r", flat.home, path)


def writable(stage: Stage, flat: Flat, path: Path) -> None:
    call("btrfs", "property", "set", "-f", path, "ro", "false")


def given_away(stage: Stage, flat: Flat, path: Path) -> None:
    os.chown(path.parent, 1, 1)


def mounted(stage: Stage, flat: Flat, path: Path) -> None:
    inside = path.relative_to(stage.disk.top)
    stage.disk.mount(stage.disk.home / "looked at", options=f"ro,subvol=/{inside}")


def made_default(stage: Stage, flat: Flat, path: Path) -> None:
    call("btrfs", "subvolume", "set-default", path)


def filled(stage: Stage, flat: Flat, path: Path) -> None:
    writable(stage, flat, path)
    call("btrfs", "-q", "subvolume", "create", path / "inside")
    call("btrfs", "property", "set", path, "ro", "true")


def moved(stage: Stage, flat: Flat, path: Path) -> None:
    path.parent.rename(stage.disk.top / "mine")


@pytest.mark.parametrize(
    ("change", "detail", "outcome", "why"),
    [
        (replaced, "1 foreign", "partial", "another snapshot has the name now"),
        (writable, "1 unmarked", "partial", "its mark was taken away meanwhile"),
        (given_away, "1 unmarked", "partial", "its mark was taken away meanwhile"),
        (mounted, "1 busy", "partial", IN_USE),
        (made_default, "1 busy", "partial", IN_USE),
        (filled, "1 busy", "partial", IN_USE),
        (moved, "1 renamed", "partial", "it has another name now"),
        (lambda stage, flat, path: delete(path), "1 absent", "completed", None),
    ],
)
def test_proof(
    stage: Stage,
    flat: Flat,
    three: list[Plan],
    change: Callable[[Stage, Flat, Path], None],
    detail: str,
    outcome: str,
    why: str | None,
) -> None:
    """Promise 2: what is not the one that was decided about, or is in use, stays; the rest goes."""
    choice = chosen(flat.home)
    victim = path_of(stage, choice.going[0].name)
    ended = succeeded(stage, prune(stage, choice, before=lambda: change(stage, flat, victim)))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("pruned", outcome)
    assert ended.run.reason == (why and f"{choice.going[0].name}: {why}")
    (step,) = stage.rows(f"SELECT * FROM steps WHERE run = '{choice.plan.run}'")
    assert (step["outcome"], step["detail"]) == ("done", detail)
    assert not path_of(stage, choice.going[1].name).exists()
    assert victim.exists() is (outcome == "partial" and change is not moved)
    if change is moved:
        assert len(list((stage.disk.top / "mine").iterdir())) == 2


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Path], None]]:
    """Show a directory at /mnt in a mount namespace that ends with the test."""
    children: list[subprocess.Popen[str]] = []

    def show(path: Path) -> None:
        script = 'mount --bind "$0" /mnt; echo ready; exec sleep 600'
        argv = ("unshare", "--mount", "sh", "-ec", script, path)
        children.append(subprocess.Popen(argv, cwd="/", stdout=subprocess.PIPE, text=True))
        said = children[-1].stdout
        assert said
        assert said.readline() == "ready\n"

    yield show
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("transient", [False, True])
def test_part_is_mounted(
    stage: Stage,
    flat: Flat,
    clock: Clock,
    elsewhere: Callable[[Path], None],
    transient: bool,
) -> None:
    """Promise 2: one of which a directory is mounted, in whatever namespace, stays for its user."""
    (flat.home / "etc").mkdir()
    (flat.home / "etc" / "file").write_text("frozen")
    plans = [a_snap(clock, flat.home, transient=transient) for _ in range(4)]
    for made in plans:
        succeeded(stage, stage.backup(made))
    elsewhere(path_of(stage, *names(plans[0])) / "etc")
    part = stage.disk.home / "part"
    stage.disk.mount(part, device=path_of(stage, *names(plans[1])) / "etc", options="bind")

    def destroy() -> Ended:
        if transient:
            return prune(stage, unsnapped(stage, flat.home), transient=True)
        return prune(stage, chosen(flat.home))

    ended = succeeded(stage, destroy())
    assert ended.run
    assert status_of(ended.run) is ExitStatus.PARTIAL
    assert ended.run.reason
    assert ended.run.reason.endswith(f", and 1 more: {IN_USE}")
    assert there(stage) == names(*plans[:2], *([] if transient else plans[3:]))
    assert (part / "file").read_text() == "frozen"
    call("umount", part)
    succeeded(stage, destroy())
    assert there(stage) == names(*plans[:1], *([] if transient else plans[3:]))


def test_prune_killed_at_every_point(stage: Stage, flat: Flat, clock: Clock) -> None:
    """
    Promise 5: wherever it is killed, a recovery gives it up, and tells how many are gone.

    The next one comes to the same end: what no rule keeps is gone, and no more.
    """
    for _ in range(3):
        stage.backup(a_snap(clock, flat.root, flat.home))
    points = prune(stage, chosen(flat.root, flat.home)).points
    assert {"journal:pruned#1", "end:btrfs destroy#4", "end:btrfs commit#1"} <= set(points)
    given_up = set()
    for point in points:
        while len(chosen(flat.root, flat.home).verdicts) < 6:
            stage.backup(a_snap(clock, flat.root, flat.home))
        choice = chosen(flat.root, flat.home)
        stay = sorted(v.item.name for v in choice.verdicts if v.keep)
        assert prune(stage, choice, at=point).status == -signal.SIGKILL, point
        recovered = succeeded(stage, stage.recover())
        left = there(stage)
        gone = sum(each.name not in left for each in choice.going)
        assert all(path_of(stage, name).exists() for name in left)
        if recovered.run:
            given_up.add(gone)
            assert recovered.run.outcome == ("partial" if gone else "rolled-back")
            assert recovered.run.reason == f"it was interrupted; {gone} of 4 were destroyed"
            assert {name.count("/") for name in left} == {3}, point  # no empty directory
        assert set(stay) <= set(left), point
        assert stage.recover().decisions == []
        succeeded(stage, prune(stage, chosen(flat.root, flat.home)))
        assert sorted(there(stage)) == stay, point
    assert given_up == {0, 1, 2, 3, 4}


def test_interrupted(stage: Stage, flat: Flat, three: list[Plan]) -> None:
    """A signal is heeded between two of them; what is left stays, and no empty directory."""
    choice = chosen(flat.home)
    real = btrfs._deleted

    def first(top: int, found: Any) -> str:
        signal.raise_signal(signal.SIGTERM)
        return real(top, found)

    ended = prune(stage, choice, before=lambda: setattr(btrfs, "_deleted", first))
    assert ended.interrupted
    (run,) = stage.rows(f"SELECT * FROM runs WHERE id = '{choice.plan.run}'")
    assert (run["state"], run["outcome"]) == ("pruned", "partial")
    assert run["reason"].endswith("1 of 2 were destroyed")
    assert len(there(stage)) == 5


def test_prune_not_mounted(stage: Stage, flat: Flat, three: list[Plan]) -> None:
    """Promise 2: "not found" on a file system that is not there is not "gone"."""
    choice = chosen(flat.home)
    again: list[Path] = []
    ended = prune(stage, choice, before=lambda: again.extend(stage.disk.unmount_all()))
    assert isinstance(ended.raised, EffectError)
    assert "is not mounted" in ended.raised.message
    stage.disk.mount(stage.disk.top, device=stage.disk.image, options="loop")
    (run,) = stage.rows(f"SELECT * FROM runs WHERE id = '{choice.plan.run}'")
    assert (run["state"], run["outcome"]) == ("pruned", "rolled-back")
    assert len(there(stage)) == 6


def test_prune_leaves_others(stage: Stage, flat: Flat, three: list[Plan]) -> None:
    """Promise 2: of what is called as a moment, an empty subvolume is none: it stays."""
    theirs = stage.disk.top / KEPT_DIRECTORY / f"mine.{RunId.new()}"
    call("btrfs", "-q", "subvolume", "create", theirs)
    succeeded(stage, prune(stage, chosen(flat.root, flat.home)))
    assert theirs.exists()
    assert there(stage) == sorted(
        [str(theirs).replace(str(stage.disk.top), f"{stage.disk.uuid}:"), *names(three[2])]
    )


@pytest.mark.parametrize(
    ("use", "undo", "left"),
    [
        (("chattr", "+i", "{}"), ("chattr", "-i", "{}"), [0, 2]),
        (("mount", "--bind", "{}", "{}"), ("umount", "{}"), [2]),
    ],
)
def test_prune_place_in_use(
    stage: Stage,
    flat: Flat,
    three: list[Plan],
    use: tuple[str, ...],
    undo: tuple[str, ...],
    left: list[int],
) -> None:
    """A moment's directory that cannot be removed keeps nothing else from its end."""
    where = directory(stage, three[0])
    call(*(word.format(where) for word in use))
    choice = chosen(flat.root, flat.home)
    try:
        ended = succeeded(stage, prune(stage, choice))
        assert ended.run
        assert ended.run.outcome == ("partial" if 0 in left else "completed")
        expected = names(*(three[n] for n in left))
        assert [name for name in there(stage) if name in names(*three)] == expected
    finally:
        call(*(word.format(where) for word in undo))


def test_until_saved(flat: Flat, three: list[Plan]) -> None:
    """No backup reads them, so they cannot wait for one."""
    with pytest.raises(UserError, match="they would wait for ever"):
        chosen(flat.home, saved={"home": ()})


# -- power, and a file system that refuses ---------------------------------------------------


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("verb", ["snap", "prune"])
def test_power_cut(
    stage: Stage, flat: Flat, disk: Disk, clock: Clock, verb: str, committed: bool
) -> None:
    """
    Promise 10: what is called kept is kept after a power cut, and what is called gone is gone.

    The disk as it was written at that moment is mounted anew.  Without the commit it is not so:
    the test can fail.
    """
    plans = [a_snap(clock, flat.home) for _ in range(2)]
    for made in plans:
        stage.backup(made)
    newest = a_snap(clock, flat.home)

    def freeze() -> None:
        real = btrfsio.commit

        def commit(fd: int) -> None:
            if committed:
                real(fd)
            shutil.copyfile(disk.image, disk.home / "after the cut")

        btrfsio.commit = commit

    stage.changes.append(freeze)
    if verb == "snap":
        stage.backup(newest)
    else:
        prune(stage, chosen(flat.home))
    disk.unmount_all()
    disk.mount(disk.top, device=disk.home / "after the cut", options="loop")
    expected = [*plans, newest] if verb == "snap" else plans[1:]
    assert (there(stage) == names(*expected)) is committed
    assert disk.left() == ([] if committed or verb == "prune" else [f".atomtx-{newest.run}"])


def refuse(owner: Any, name: str, number: int) -> None:
    """Have the second call of something in this process fail."""
    real, calls = getattr(owner, name), [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(number, os.strerror(number))
        return real(*args)

    setattr(owner, name, failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_refused_ioctls(stage: Stage, flat: Flat, clock: Clock, number: int) -> None:
    """A moment is whole or nothing; of a prune what is not gone stays, and both are told."""
    stage.changes[:] = [lambda: refuse(btrfsio, "snapshot", number)]
    ended = stage.backup(a_snap(clock, flat.root, flat.home))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert os.strerror(number) in str(ended.run.reason)
    assert (kept(stage), stage.disk.left()) == ([], [])
    stage.changes[:] = []
    for _ in range(2):
        stage.backup(a_snap(clock, flat.root, flat.home))
    stage.changes[:] = [lambda: refuse(btrfsio, "destroy", number)]
    choice = chosen(flat.root, flat.home)
    ended = prune(stage, choice)
    assert isinstance(ended.raised, EffectError)
    (run,) = stage.rows(f"SELECT * FROM runs WHERE id = '{choice.plan.run}'")
    assert (run["state"], run["outcome"]) == ("pruned", "partial")
    assert run["reason"].endswith("1 of 2 were destroyed")
    assert len(kept(stage)) == 3


def test_being_sent(stage: Stage, flat: Flat, clock: Clock) -> None:
    """One that `btrfs send` reads stays, and is told; the rest goes."""
    (flat.home / "much").write_bytes(os.urandom(2**20))  # more than a pipe holds
    for _ in range(3):
        stage.backup(a_snap(clock, flat.home))
    choice = chosen(flat.home)
    sent, other = choice.going
    with subprocess.Popen(
        ["btrfs", "-q", "send", path_of(stage, sent.name)], stdout=subprocess.PIPE
    ) as sending:
        assert sending.stdout
        assert sending.stdout.read(5) == b"btrfs"
        ended = succeeded(stage, prune(stage, choice))
        sending.kill()
    assert ended.run
    assert ended.run.reason == f"{sent.name}: {IN_USE}"
    assert path_of(stage, sent.name).exists()
    assert not path_of(stage, other.name).exists()


# -- unsnap ----------------------------------------------------------------------------------


def unsnapped(stage: Stage, *paths: Path) -> Choice:
    return unsnapping.choose(
        Request(tuple(map(str, paths))),
        policy=Policy(),
        pattern=PATTERN,
        zfs=Zfs(),
        snaps=lambda: history.snaps(stage.state / journalfile.NAME),
        now=datetime.now(UTC),
    )


def test_unsnap(stage: Stage, flat: Flat, clock: Clock) -> None:
    """Those alone go that were taken to go again, and not of a run that has not ended."""
    stay, go = a_snap(clock, flat.home), a_snap(clock, flat.home, transient=True)
    for made in (stay, go):
        succeeded(stage, stage.backup(made))
    waits = a_snap(clock, flat.home, transient=True)
    stage.backup(waits, at="end:btrfs rename#1")
    choice = unsnapped(stage, flat.home)
    assert [each.name for each in choice.going] == names(go)
    assert [v.reasons for v in choice.verdicts if v.keep] == [
        (f"the run that took it has not ended: {waits.run}",)
    ]
    succeeded(stage, prune(stage, choice, transient=True))
    assert there(stage) == names(stay, waits)
    succeeded(stage, stage.recover())
    succeeded(stage, prune(stage, unsnapped(stage, flat.home), transient=True))
    assert there(stage) == names(stay)


@pytest.mark.parametrize("of", ["moment", "directory"])
def test_unsnap_of_others(stage: Stage, flat: Flat, clock: Clock, of: str) -> None:
    """Promise 2: a place that not root alone could have made is no mark of a transient one."""
    made = a_snap(clock, flat.home, transient=True)
    succeeded(stage, stage.backup(made))
    where = directory(stage, made)
    os.chown(where if of == "moment" else where.parent, 1, 1)
    assert unsnapped(stage, flat.home).verdicts == ()


# -- as they are typed -----------------------------------------------------------------------

Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(stage: Stage) -> Typed:
    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "atomtx", *map(str, words)],
            env={**os.environ, "ATOMTX_STATE_DIR": str(stage.state)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_typed(stage: Stage, flat: Flat, typed: Typed) -> None:
    """Taken, listed, pruned and shown by their paths; copies and other verbs refuse them."""
    pattern = ("--pattern", "j-%Y%m%d%H%M%S")
    dry = typed("snap", flat.root, flat.home, *pattern, "--dry-run")
    assert f"snapshot 2 subvolumes of the btrfs file system {stage.disk.uuid}" in dry.stdout
    assert kept(stage) == []
    for transient in ((), (), ("--transient",)):
        while (done := typed("snap", flat.home, *pattern, *transient)).returncode == 2:
            assert "there is a snapshot" in done.stderr  # still the same second
        assert done.returncode == 0, done.stderr
    assert there(stage)[-1] in done.stderr
    told = typed("prune", flat.home, *pattern, "--keep-last", "1", "--dry-run").stdout
    assert "2 kept snapshots: 1 stay, 1 would be destroyed" in told
    done = typed("prune", flat.home, *pattern, "--keep-last", "1")
    assert (done.returncode, "1 kept snapshot destroyed, 1 stay" in done.stderr) == (0, True)
    done = typed("unsnap", flat.home, *pattern)
    assert (done.returncode, "1 transient snapshot destroyed" in done.stderr) == (0, True)
    assert len(kept(stage)) == 1
    runs = json.loads(typed("history", "--json").stdout)
    assert sorted(run["verb"] for run in runs) == ["prune", "prune", "snap", "snap", "snap"]
    shown = typed("show", next(run["id"] for run in runs if run["state"] == "kept"))
    assert (shown.returncode, str(flat.home) in shown.stdout) == (0, True)
    assert typed("journal", "check").returncode == 0
    refused = typed("sure", "scan-kept", flat.home)
    assert (refused.returncode, "is on btrfs: this is of ZFS alone" in refused.stderr) in (
        (2, True),
        (1, False),  # without the programs of ZFS
    )

"""Runs over btrfs subvolumes: what the client reads, what is left, and what a kill leaves."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

from atomtx import btrfsio, locks
from atomtx.errors import UserError, WaitingError
from atomtx.names import BtrfsSnapshot, RunId
from atomtx.recovery import Resume, RollBack, RollForward
from atomtx.volumes import btrfs
from tests.btrfs.conftest import Boot, Flat, Nested
from tests.btrfs.stage import Disk, Stage, call, tree
from tests.scene import Ended


def check_completed(stage: Stage, ended: Ended) -> None:
    """The run has completed, and nothing else of it is left."""
    assert ended.status == 0, (stage.home / "log").read_text()
    rows = stage.rows("SELECT state, outcome, cleanup, reason FROM runs")
    assert [tuple(row.values()) for row in rows] == [("destroyed", "completed", None, None)]
    assert stage.left() == []


def steps(stage: Stage) -> list[tuple[str, str | None]]:
    return [(r["kind"], r["detail"]) for r in stage.rows("SELECT * FROM steps ORDER BY id")]


# -- the ordinary course ---------------------------------------------------------------------


def test_flat(stage: Stage, flat: Flat) -> None:
    """@ and @home: the client reads both at their live paths, as they were, though they change."""
    before = tree(flat.root)
    the_plan = stage.plan_of(flat.root, recursive=True)
    assert [v.mountpoint for v in the_plan.volumes] == [str(flat.root), str(flat.home)]
    stage.behave(f"(cd {quote(str(stage.disk.top))}; echo changed > @home/file; rm @/file)\n")
    ended = stage.backup(the_plan)
    check_completed(stage, ended)
    assert tree(stage.saved(flat.root)) == before
    assert (flat.home / "file").read_text() == "changed\n"
    assert not (stage.home / "zfs.log").exists()  # no program of ZFS was started
    assert [kind for kind, _ in steps(stage)] == [
        "take-snapshots",
        "destroy-snapshots",
        "mount-volumes",
        "unmount-volumes",
        "run-client",
        "end-client",
    ]


def test_skew(stage: Stage, flat: Flat) -> None:
    """Promise 8: what lies between snapshots that are not of one moment is recorded and shown."""
    ended = stage.backup(stage.plan_of(flat.root, flat.home))
    (detail,) = [detail for kind, detail in steps(stage) if kind == "take-snapshots"]
    assert detail is not None
    assert detail.startswith("2 subvolumes one after the other within 0.")
    assert f"the snapshots are not of one moment: {detail}" in ended.said("step")
    (stage.home / "state" / "journal.db").unlink()
    stage.backup(stage.plan_of(flat.home))
    assert [detail for kind, detail in steps(stage) if kind == "take-snapshots"] == [None]


def test_nested(stage: Stage, nested: Nested) -> None:
    """Subvolumes in subvolumes, the top level first; nothing of ours is in what is saved."""
    before = tree(nested.data)
    the_plan = stage.plan_of(nested.data, recursive=True)
    assert len(the_plan.volumes) == 4
    assert the_plan.notes == ()
    check_completed(stage, stage.backup(the_plan))
    assert tree(stage.saved(nested.data)) == before


def test_named_inside(stage: Stage, nested: Nested) -> None:
    """Promise 9: a subvolume that is not asked for is named; in the backup it is empty."""
    photos = nested.data / "photos"
    the_plan = stage.plan_of(photos)
    assert the_plan.notes == (
        f"{photos}/of 2026 is not in the backup: it is a subvolume of its own; name it as well, "
        "or use -r",
    )
    check_completed(stage, stage.backup(the_plan))
    assert tree(stage.saved(photos)) == {"file": b"frozen photos", "of 2026": None}


def test_snapshots_of_others(stage: Stage, nested: Nested) -> None:
    """Promise 9: read-only snapshots of somebody else are not copied under -r, and are named."""
    (nested.data / "snapshots").mkdir()
    for n in range(3):
        made = nested.data / f"snapshots/{n}"
        call("btrfs", "-q", "subvolume", "snapshot", "-r", nested.data / "photos", made)
    the_plan = stage.plan_of(nested.data, recursive=True)
    assert len(the_plan.volumes) == 4
    assert the_plan.notes == (
        f"{nested.data}/snapshots/0 is not in the backup: it is a read-only snapshot "
        "(and 2 more); name it to have it",
    )
    named = stage.plan_of(nested.data / "snapshots/1")
    check_completed(stage, stage.backup(named))
    assert tree(stage.saved(nested.data / "snapshots/1"))["file"] == b"frozen photos"


def test_exclude(stage: Stage, nested: Nested) -> None:
    """What is left out at the user's word is, with all below it."""
    the_plan = stage.plan_of(nested.data, recursive=True, exclude=[nested.data / "photos"])
    assert [Path(v.mountpoint).name for v in the_plan.volumes] == ["my data", "deep"]
    assert the_plan.notes == (f"{nested.data}/photos and all below it is left out at your word",)


@pytest.mark.parametrize("layout", ["namespace", "tree"])
def test_part(stage: Stage, flat: Flat, layout: str) -> None:
    """A directory in place of a subvolume: it alone is read, at its own path, as it was."""
    inner = flat.home / "ann" / "letters"
    inner.mkdir(parents=True)
    (inner / "file").write_text("frozen letter")
    root = str(stage.home / "tree") if layout == "tree" else ""
    the_plan = stage.plan_of(inner, root=root)
    assert the_plan.targets == (str(inner),)
    stage.behave(f"echo changed > {quote(str(stage.disk.top))}/@home/ann/letters/file\n")
    check_completed(stage, stage.backup(the_plan))
    assert tree(stage.saved(Path(root + str(inner)))) == {"file": b"frozen letter"}
    assert not (stage.saved(Path(root + str(flat.home))) / "file").exists()


@pytest.mark.parametrize("layout", ["namespace", "tree"])
def test_live_elsewhere(stage: Stage, nested: Nested, boot: Boot, layout: str) -> None:
    """What the client needs on a disk, or in a subvolume, below is live; the rest is frozen."""
    usb = nested.data / "a directory" / "usb"
    device = call("findmnt", "-no", "SOURCE", boot.efi).strip()
    stage.disk.mount(usb, options="rw", device=device)
    needed = [usb / "restic", usb / "of the user" / "cache", nested.data / "photos" / "cache"]
    for path in needed:
        path.mkdir(parents=True)
    root = str(stage.home / "tree") if layout == "tree" else ""
    the_plan = stage.plan_of(nested.data, root=root, live_paths=map(str, needed))
    seams = (str(usb), str(nested.data / "photos"))
    assert the_plan.live_paths == the_plan.excludes == (() if root else seams)
    writes = [f"echo now >{quote(str(path))}/written\n" for path in needed]
    stage.behave(f"echo later >{quote(str(stage.disk.top))}/file\n{''.join(writes)}")
    check_completed(stage, stage.backup(the_plan))
    assert {(path / "written").read_text() for path in needed} == {"now\n"}
    assert (stage.saved(Path(f"{root}{nested.data}")) / "file").read_text() == "frozen top"


# A namespace in which the frozen tree is the root, and what is then seen of the live one.
_AS_ROOT = """
import os, sys
from atomtx.intents import Mount
from atomtx.mounts import namespace
namespace.enter()
snapshot, uuid, live = sys.argv[1:]
namespace.assemble([Mount(snapshot, "/", "btrfs", uuid)], live=[live])
print(sorted(os.listdir("/")), os.listdir(live), os.path.ismount(live))
"""


def test_live_elsewhere_below_a_root(disk: Disk, boot: Boot) -> None:
    """In a set that holds `/` a whole mount is brought back into the tree that becomes the root."""
    made = disk.make("@")
    for path in ("dev", "proc", "sys", "run", str(boot.efi)[1:]):
        (made / path).mkdir(parents=True)
    call("btrfs", "-q", "subvolume", "snapshot", "-r", made, disk.top / "taken")
    with btrfsio.top_level(disk.uuid) as top:
        (row,) = [row for row in btrfsio.subvolumes(top) if row.path == "/taken"]
    argv = (sys.executable, "-c", _AS_ROOT, f"{disk.uuid}:/taken", row.uuid, str(boot.efi))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    seen = sorted(["dev", "proc", "sys", "run", str(boot.efi).split("/")[1]])
    assert (done.stdout, done.stderr) == (f"{seen} ['loader'] True\n", "")


def test_tree(stage: Stage, flat: Flat) -> None:
    """In a tree the mounts are the host's: they are removed again, with their directories."""
    root = stage.home / "tree"
    the_plan = stage.plan_of(flat.root, flat.home, root=str(root))
    stage.behave(f"echo changed > {quote(str(stage.disk.top))}/@home/file\n")
    check_completed(stage, stage.backup(the_plan))
    assert stage.saved(root / str(flat.home)[1:] / "file").read_text() == "frozen @home"
    assert not root.exists()


def test_keep(stage: Stage, flat: Flat) -> None:
    """Snapshots that are to be kept are the user's from then on, under another name."""
    the_plan = stage.plan_of(flat.root, flat.home, keep_snapshots=True)
    check_completed(stage, stage.backup(the_plan))
    kept = stage.disk.top / f"atomtx-kept-{the_plan.run}"
    assert sorted(path.name for path in kept.iterdir()) == ["0", "1"]
    assert (kept / "1" / "file").read_text() == "frozen @home"


class Typed:
    """`atomtx` and restic as a person types them, with a repository of their own."""

    def __init__(self, home: Path) -> None:
        self.restic = os.environ.get("RESTIC") or shutil.which("restic") or _cached_restic()
        self.env = {
            "PATH": f"{Path(self.restic).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path))),
            "HOME": str(home),
            "ATOMTX_STATE_DIR": str(home / "state"),
            "RESTIC_REPOSITORY": str(home / "repository"),
            "RESTIC_PASSWORD": "secret",
            "RESTIC_CACHE_DIR": str(home / "cache"),
        }

    def run(self, *argv: str, status: int = 0) -> str:
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, cwd="/")
        assert done.returncode == status, (argv, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def words(self, *words: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "atomtx", *words)

    def atomtx(self, *words: str, status: int = 0) -> str:
        return self.run(*self.words(*words), status=status)


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    (tmp_path / "home").mkdir()
    return Typed(tmp_path / "home")


def test_restic(disk: Disk, flat: Flat, typed: Typed) -> None:
    """What restic restores is equal byte for byte to the moment."""
    (flat.home / "random").write_bytes(os.urandom(3_000_000))
    before = tree(flat.root)
    typed.run(typed.restic, "init")
    words = ("--client", "restic", "--command", typed.restic)
    assert "2 subvolumes" in typed.atomtx("backup", "-r", str(flat.root), *words)
    (flat.home / "random").write_bytes(b"later")
    restored = f"{typed.env['HOME']}/restored"
    typed.run(typed.restic, "restore", "latest", "--target", restored)
    assert tree(Path(f"{restored}{flat.root}")) == before
    assert disk.left() == []


def test_require_atomic(disk: Disk, flat: Flat, typed: Typed) -> None:
    """Promise 8: what is not of one moment is refused where that is asked for."""
    words = ("backup", "--require-atomic", "--command", "true")
    said = typed.atomtx(*words, str(flat.root), str(flat.home), status=2)
    assert "btrfs snapshots 2 subvolumes one after the other" in said
    typed.atomtx(*words, str(flat.home))


def test_no_zfs(disk: Disk, flat: Flat, typed: Typed, tmp_path: Path) -> None:
    """On a machine without ZFS a path that is nowhere near it is refused for what it is."""
    typed.env["PATH"] = "/nonexistent"
    said = typed.atomtx("backup", "-n", "--command", "/bin/true", str(tmp_path), status=2)
    assert "is on none of ZFS, btrfs and LVM, but on" in said
    typed.atomtx("backup", "-n", "--command", "/bin/true", str(flat.home))


def test_dry_run(disk: Disk, flat: Flat, typed: Typed) -> None:
    """Promise 12: the plan says what would be done, and nothing is."""
    said = typed.atomtx("backup", "--dry-run", "--command", "true", "-r", str(flat.root))
    where = f"of the btrfs file system {disk.uuid}"
    assert f"1. snapshot 2 subvolumes {where}, one after the other\n" in said
    assert f"   undo: destroy 2 snapshots {where}\n" in said
    assert disk.left() == []


def test_adopt(stage: Stage, disk: Disk, nested: Nested, typed: Typed) -> None:
    """Snapshots of a journal that was lost are listed, and destroyed once they are named."""
    the_plan = stage.plan_of(nested.data, recursive=True)
    stage.backup(the_plan, at="journal:snapshotted#1")
    other = stage.plan_of(nested.data / "photos")
    stage.backup(other, at="journal:snapshotted#1")
    said = typed.atomtx("recover", "--scan")
    for volume in (*the_plan.volumes, *other.volumes):
        assert f"  snapshot {volume.snapshot}\n" in said
    typed.atomtx("recover", "--adopt", the_plan.run)
    assert [row.path for row in disk.snapshots()] == [f"/.atomtx-{other.run}/0"]


def test_adopt_of_another_state_directory(disk: Disk, flat: Flat, typed: Typed) -> None:
    """Promise 6: a run that is at work for another state directory is listed so, and refused."""
    home = Path(typed.env["HOME"])
    waits = f"touch {home}/at-work; while ! test -e {home}/go; do sleep 0.1; done"
    words = typed.words("backup", str(flat.home), "--command", f"sh -c '{waits}'")
    child = subprocess.Popen(words, env=typed.env, cwd="/", stderr=subprocess.PIPE, text=True)
    try:
        assert locks.wait_until((home / "at-work").exists, 60)
        (name,) = disk.left()
        run = name.removeprefix(".atomtx-")
        typed.env["ATOMTX_STATE_DIR"] = str(home / "another")
        for _ in range(2):  # the first one leaves a folder of the run's
            said = typed.atomtx("recover", "--adopt", run, status=5)
            assert f"run {run} is at work for another state directory: {child.pid} (" in said
        typed.atomtx("recover", "--adopt", run, "--stop", status=5)  # its front end lives
        assert f"  at work: {child.pid} (" in typed.atomtx("recover", "--scan")
        (home / "go").touch()
        said = child.communicate(timeout=60)[1]
        assert child.returncode == 0, said
    finally:
        child.kill()
        child.communicate()
    assert disk.left() == []


def test_adopt_of_a_lost_state_directory(disk: Disk, flat: Flat, typed: Typed) -> None:
    """A client that outlived its front end is ended where somebody says so, and not before."""
    home = Path(typed.env["HOME"])
    waits = f"touch {home}/at-work; exec sleep 1000"
    words = typed.words("backup", str(flat.home), "--command", f"sh -c '{waits}'")
    child = subprocess.Popen(words, env=typed.env, cwd="/", stderr=subprocess.DEVNULL)
    try:
        assert locks.wait_until((home / "at-work").exists, 60)
    finally:
        child.kill()
        child.wait()
    (home / "state").rename(home / "lost")
    (name,) = disk.left()
    run = name.removeprefix(".atomtx-")
    said = typed.atomtx("recover", "--adopt", run, status=5)
    assert "(sleep)" in said
    assert "--stop ends them" in said
    assert disk.left() == [name]
    typed.atomtx("recover", "--adopt", run, "--stop")
    assert disk.left() == []


def test_doctor(disk: Disk, typed: Typed) -> None:
    """The doctor says whether a file system can be used."""
    said = subprocess.run(
        [sys.executable, "-m", "atomtx", "doctor"], env=typed.env, capture_output=True, text=True
    ).stdout
    assert re.search(f"^ok +btrfs +{disk.uuid} is usable$", said, re.MULTILINE)


def _cached_restic() -> str:
    cache = Path(os.environ.get("ATOMTX_CACHE", "~/.cache/atomtx")).expanduser()
    found = sorted((cache / "clients").glob("restic-*"))
    assert found, "install restic, or build the clients of the virtual machine"
    return str(found[-1])


# -- what is refused -------------------------------------------------------------------------


def refusal(stage: Stage, *paths: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        stage.plan_of(*paths, **options)
    return str(caught.value)


def test_refusals(stage: Stage, flat: Flat, nested: Nested) -> None:
    """What cannot be backed up as it was asked for is refused, with what to name instead."""
    assert "is given twice" in refusal(stage, flat.home, flat.home)
    assert "already included by" in refusal(stage, flat.root, flat.home, recursive=True)
    assert "both named and left out" in refusal(stage, flat.home, exclude=[flat.root])
    assert f"the subvolume {nested.data}/photos lies between them" in refusal(
        stage, nested.data, nested.data / "photos" / "of 2026"
    )


def test_readonly(stage: Stage, flat: Flat) -> None:
    """A file system that is mounted read-only is not written to."""
    stage.disk.unmount_all()
    where = stage.disk.mount(flat.root, options="ro,loop,subvol=@", device=stage.disk.image)
    assert "mounted read-only: no snapshot can be taken" in refusal(stage, where)
    assert "rw" not in call("findmnt", "-no", "FS-OPTIONS", where).split(",")


def test_mixed(stage: Stage, flat: Flat) -> None:
    """A set over ZFS (played) and btrfs: both are taken, what lies between them is said."""
    on_zfs = stage.plan("tank/a", "tank/b")
    on_btrfs = stage.plan_of(flat.root, flat.home, run=RunId(on_zfs.run))
    both = replace(
        on_btrfs,
        volumes=(*on_zfs.volumes, *on_btrfs.volumes),
        targets=(*on_zfs.targets, *on_btrfs.targets),
    )
    check_completed(stage, stage.backup(both))
    details = [detail for kind, detail in steps(stage) if kind == "take-snapshots"]
    assert len(details) == 2
    assert all(
        str(d).startswith("one transaction group a pool; 1 pool and 2 subvolumes") for d in details
    )
    assert stage.saved(flat.home / "file").read_text() == "frozen @home"
    assert stage.saved(stage.live("tank/b") / "file").read_text() == "frozen"


# -- kills -----------------------------------------------------------------------------------

POINTS = [
    "journal:planned#1",
    "start:make btrfs directory#1",
    "end:make btrfs directory#1",
    "end:btrfs snapshot#1",
    "start:btrfs snapshot#2",
    "end:btrfs snapshot#2",
    "before:snapshotted#1",
    "journal:snapshotted#1",
    "runner:start:btrfs mount#2",
    "runner:end:btrfs mount#2",
    "journal:mounted#1",
    "journal:backing-up#1",
    "runner:end:write end#1",
    "journal:unmounting#1",
    "start:btrfs destroy#1",
    "end:btrfs destroy#1",
    "end:btrfs destroy#2",
    "end:remove btrfs directory#1",
    "end:btrfs commit#1",
    "before:destroyed#1",
]


@pytest.mark.parametrize("who", ["front", "all"])
@pytest.mark.parametrize("point", POINTS)
def test_killed(stage: Stage, flat: Flat, point: str, who: str) -> None:
    """
    Promise 5: killed at a point, the run is resumed with the same moment, or nothing is left of it.

    The live files change between the kill and the recovery.
    """
    before = tree(flat.root)
    stage.backup(stage.plan_of(flat.root, flat.home), at=point, who=who)
    with open(stage.home / "points") as file:
        assert f"{point}\n" in file.readlines()
    taken = stage.disk.snapshots()
    (flat.home / "file").write_text("changed")
    ended = stage.recover()
    assert ended.status == 0, (stage.home / "log").read_text()
    (row,) = stage.rows("SELECT state, outcome FROM runs") or [{}]
    assert stage.left() == []
    if row.get("outcome") == "completed":
        assert tree(stage.saved(flat.root)) == before
    else:
        assert row in ({"state": "destroyed", "outcome": "rolled-back"}, {})
        assert len(taken) < 2  # a whole moment is never given up
    assert stage.recover().decisions == []


@pytest.mark.parametrize(
    "point",
    ["start:btrfs destroy#1", "end:btrfs destroy#1", "end:remove btrfs directory#1"],
)
def test_killed_recovery(stage: Stage, flat: Flat, point: str) -> None:
    """Promise 5: a recovery that is killed as well is recovered."""
    stage.backup(stage.plan_of(flat.root, flat.home), at="journal:backing-up#1", who="all")
    assert stage.recover(at=point).status == -9
    assert stage.recover().decisions == [RollForward()]
    assert stage.left() == []
    assert [row["outcome"] for row in stage.rows("SELECT outcome FROM runs")] == ["completed"]


@pytest.mark.parametrize("point", ["start:btrfs rename#1", "end:btrfs rename#1"])
def test_killed_keep(stage: Stage, flat: Flat, point: str) -> None:
    """Promise 4: what is kept already is kept."""
    the_plan = stage.plan_of(flat.root, flat.home, keep_snapshots=True)
    assert stage.backup(the_plan, at=point).status == -9
    assert stage.recover().status == 0
    assert stage.left() == []
    assert len(list((stage.disk.top / f"atomtx-kept-{the_plan.run}").iterdir())) == 2


def test_rollback(stage: Stage, nested: Nested) -> None:
    """At the user's word a whole moment is undone, the top level's snapshot too."""
    the_plan = stage.plan_of(nested.data, recursive=True)
    stage.backup(the_plan, at="journal:snapshotted#1")
    assert len(stage.disk.snapshots()) == 4
    assert stage.recover(rollback=True).decisions == [RollBack("at the user's word")]
    assert stage.left() == []


# -- what others do --------------------------------------------------------------------------


def test_emptied(stage: Stage, flat: Flat) -> None:
    """
    Promise 7: a snapshot that is deleted while it is read is no backup, whatever the client says.

    btrfs lets it be deleted, and shows an empty tree from then on.
    """
    the_plan = stage.plan_of(flat.home, client="played")
    snapshot = f"{stage.disk.top}/.atomtx-{the_plan.run}/0"
    stage.behave(f"btrfs -q subvolume delete {quote(snapshot)}\n")
    ended = stage.backup(the_plan)
    assert ended.run
    assert ended.run.outcome == "failed"
    reason = f"the snapshot at {flat.home} was deleted while the client read it"
    assert reason in str(ended.run.reason)
    assert not stage.saved(flat.home / "file").exists()  # the client did say 0
    assert stage.left() == []


def test_foreign(stage: Stage, flat: Flat) -> None:
    """Promise 2: another snapshot under our exact name is not ours: its UUID differs."""
    the_plan = stage.plan_of(flat.home)
    stage.backup(the_plan, at="journal:snapshotted#1")
    ours = stage.disk.top / f".atomtx-{the_plan.run}" / "0"
    call("btrfs", "-q", "subvolume", "delete", ours)
    call("btrfs", "-q", "subvolume", "snapshot", "-r", stage.disk.top / "@home", ours)
    (decision,) = stage.recover().decisions
    assert isinstance(decision, RollBack)
    assert decision.reason.endswith("is not the one that we took")
    assert (ours / "file").read_text() == "frozen @home"
    call("btrfs", "-q", "subvolume", "delete", ours)


def test_replaced(stage: Stage, flat: Flat) -> None:
    """Promise 2: so it is between the proof and the destroy: each is looked at once more."""
    the_plan = stage.plan_of(flat.home)
    ours = stage.disk.top / f".atomtx-{the_plan.run}" / "0"
    live = quote(str(stage.disk.top / "@home"))
    stage.behave(
        f"btrfs -q subvolume delete {quote(str(ours))}\n"
        f"btrfs -q subvolume snapshot -r {live} {quote(str(ours))}\n"
    )
    ended = stage.backup(the_plan)
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert (ours / "file").read_text() == "frozen @home"
    call("btrfs", "-q", "subvolume", "delete", ours)


@pytest.mark.parametrize("how", ["writable", "of another", "a directory"])
def test_foreign_before_it_is_known(stage: Stage, flat: Flat, how: str) -> None:
    """Promise 2: before a UUID is journaled, parent, path and read-only must agree."""
    the_plan = stage.plan_of(flat.home)
    stage.backup(the_plan, at="end:btrfs snapshot#1")
    ours = stage.disk.top / f".atomtx-{the_plan.run}" / "0"
    call("btrfs", "-q", "subvolume", "delete", ours)
    if how == "a directory":
        ours.mkdir()
    else:
        source = "@home" if how == "writable" else "@"
        flags = [] if how == "writable" else ["-r"]
        call("btrfs", "-q", "subvolume", "snapshot", *flags, stage.disk.top / source, ours)
    (decision,) = stage.recover().decisions
    assert isinstance(decision, RollBack)
    assert ours.exists()
    assert [row["state"] for row in stage.rows("SELECT state FROM runs")] == ["destroyed"]
    ours.rmdir() if how == "a directory" else call("btrfs", "-q", "subvolume", "delete", ours)


@pytest.mark.parametrize("part", [".", "etc"])
def test_busy(stage: Stage, flat: Flat, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """A snapshot of ours, or a part of it, that somebody mounted is not emptied under them."""
    monkeypatch.setattr("atomtx.cleaning.PAUSES_S", ())
    (flat.home / "etc").mkdir()
    (flat.home / part / "seen").write_text("frozen")
    the_plan = stage.plan_of(flat.home)
    stage.backup(the_plan, at="journal:snapshotted#1")
    snapshot = stage.disk.top / f".atomtx-{the_plan.run}/0"
    where = stage.disk.mount(stage.disk.home / "looked at", device=snapshot / part, options="bind")
    ended = stage.recover(rollback=True)
    assert ended.run
    assert ended.run.cleanup == "parked"
    assert f"mounted at {where}" in ended.said("warn")[-1]
    assert (where / "seen").read_text() == "frozen"
    call("umount", where)
    assert stage.recover().decisions == [RollForward()]
    assert stage.left() == []


def test_not_mounted(stage: Stage, flat: Flat) -> None:
    """Promises 2 and 14: not found on a file system that is not mounted is not gone: wait."""
    stage.backup(stage.plan_of(flat.root), at="journal:backing-up#1", who="all")
    stage.disk.unmount_all()
    ended = stage.recover()
    assert isinstance(ended.raised, WaitingError)
    assert f"file system {stage.disk.uuid} is not mounted" in ended.raised.message
    stage.disk.mount(stage.disk.top, device=stage.disk.image, options="loop")
    stage.disk.device = call("findmnt", "-no", "SOURCE", stage.disk.top).strip()
    stage.disk.mount(flat.root, options="subvol=@")
    assert stage.recover().decisions == [Resume()]
    assert stage.saved(flat.root / "file").read_text() == "frozen @"
    assert stage.left() == []


def test_made_readonly(stage: Stage, flat: Flat) -> None:
    """A file system that was made read-only stays so: recovery waits, and says for what."""
    stage.backup(stage.plan_of(flat.root), at="journal:backing-up#1", who="all")
    for where in (flat.home, flat.root, stage.disk.top):
        call("mount", "-o", "remount,ro", where)
    ended = stage.recover()
    assert isinstance(ended.raised, WaitingError)
    assert "cannot be used: Read-only file system" in ended.raised.message
    assert "ro" in call("findmnt", "-no", "FS-OPTIONS", flat.root).strip().split(",")
    call("mount", "-o", "remount,rw", stage.disk.top)
    assert stage.recover().decisions == [Resume()]
    assert stage.left() == []


def test_never_seen(stage: Stage, flat: Flat) -> None:
    """The mounts of a run, and that of the top level, are in no other mount namespace."""
    table = Path(f"/proc/{os.getpid()}/mountinfo")
    stage.behave(f"cat {table} > {stage.home}/seen\ncat /proc/self/mountinfo > {stage.home}/own\n")
    the_plan = stage.plan_of(flat.home)
    before = of_disk(stage, table.read_text())
    check_completed(stage, stage.backup(the_plan))
    assert f".atomtx-{the_plan.run}/0" in (stage.home / "own").read_text()
    assert len(of_disk(stage, (stage.home / "own").read_text())) > len(before) > 0
    assert of_disk(stage, (stage.home / "seen").read_text()) == before
    assert the_plan.run not in (stage.home / "seen").read_text()


def of_disk(stage: Stage, table: str) -> list[str]:
    """Return the lines of *table* whose source is the stage's disk: other tests mount theirs."""
    return [line for line in table.splitlines() if line.split()[-2] == stage.disk.device]


def test_older(stage: Stage, flat: Flat) -> None:
    """What has the snapshot's path, and was made before the plan, is not ours."""
    (volume,) = stage.plan_of(flat.home).volumes
    assert volume.source
    made = volume.source.generation

    def mark(created: int, parent: str = volume.source.uuid) -> str | None:
        info = btrfsio.Info(300, "its uuid", parent, True, created, 0)
        return btrfs._identity(volume, info).mark

    assert mark(made) == mark(made + 1) == BtrfsSnapshot.parse(volume.snapshot).run
    assert mark(made - 1) is None
    assert mark(made, "another's") is None


@pytest.mark.parametrize("flags", [0, btrfsio._FS_INFO_GENERATION])
def test_old_kernel(stage: Stage, flat: Flat, flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that may be unable to delete by id is found before there is a snapshot."""
    ioctl = fcntl.ioctl

    def asked(fd: int, number: int, data: bytearray) -> object:
        done = ioctl(fd, number, data)
        if number == btrfsio._FS_INFO:
            struct.pack_into("=Q", data, 48, flags)
        return done

    monkeypatch.setattr(fcntl, "ioctl", asked)
    if flags:
        stage.plan_of(flat.home)
    else:
        with pytest.raises(UserError, match=r"older than Linux 5\.10"):
            stage.plan_of(flat.home)


@pytest.mark.parametrize("where", ["", "elsewhere"])
def test_changed_while_listed(disk: Disk, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What others delete or move while subvolumes are listed is gone, or in its new place."""
    for name in ("one", "two"):
        (disk.top / name).mkdir()
        disk.make(f"{name}/snapshot")
    ioctl = fcntl.ioctl

    def at_work(fd: int, number: int, data: bytearray) -> object:
        old = disk.top / "two" / "snapshot"
        if number == btrfsio._INO_LOOKUP and old.exists():
            if where:
                old.rename(disk.top / where)
            else:
                call("btrfs", "-q", "subvolume", "delete", old)
            old.parent.rmdir()
        return ioctl(fd, number, data)

    monkeypatch.setattr(fcntl, "ioctl", at_work)
    found = {row.path for row in btrfs.find(str(disk.top), "x").subvolumes}
    assert found == {"/", "/one/snapshot"} | ({f"/{where}"} if where else set())


# -- power -----------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [True, False])
def test_durable(stage: Stage, flat: Flat, disk: Disk, committed: bool) -> None:
    """
    Promise 10: what is called destroyed is destroyed after a power cut, too.

    The disk as it was written at that moment is mounted anew.  Without the commit the snapshot is
    there again: the test can fail.
    """

    def freeze() -> None:
        destroyed = btrfsio.commit

        def commit(fd: int) -> None:
            if committed:
                destroyed(fd)
            shutil.copyfile(disk.image, disk.home / "after the cut")

        btrfsio.commit = commit

    stage.changes.append(freeze)
    the_plan = stage.plan_of(flat.home)
    stage.backup(the_plan)
    disk.unmount_all()
    disk.mount(disk.top, device=disk.home / "after the cut", options="loop")
    assert disk.left() == ([] if committed else [f".atomtx-{the_plan.run}"])


# -- faults ----------------------------------------------------------------------------------


def fail(stage: Stage, name: str, number: int, call_: int = 1) -> None:
    """Have the *call_*-th call of an ioctl fail, in each front end to come."""

    def change() -> None:
        real, calls = getattr(btrfsio, name), [0]

        def failing(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == call_:
                raise OSError(number, os.strerror(number))
            return real(*args)

        setattr(btrfsio, name, failing)

    stage.changes.append(change)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_second_snapshot_fails(stage: Stage, flat: Flat, number: int) -> None:
    """A set is whole or nothing: where its second snapshot fails, the first one is removed."""
    fail(stage, "snapshot", number, call_=2)
    ended = stage.backup(stage.plan_of(flat.root, flat.home))
    assert ended.run
    assert (ended.run.state, ended.run.outcome) == ("destroyed", "failed")
    assert os.strerror(number) in str(ended.run.reason)
    assert stage.left() == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EBUSY, errno.EPERM])
def test_destroy_fails(
    stage: Stage, flat: Flat, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be destroyed now is parked: the result stands, and the next try does it."""
    monkeypatch.setattr("atomtx.cleaning.PAUSES_S", ())
    fail(stage, "destroy", number)
    ended = stage.backup(stage.plan_of(flat.root, flat.home))
    assert ended.run
    assert (ended.run.outcome, ended.run.cleanup) == ("completed", "parked")
    stage.changes.clear()
    assert stage.recover().decisions == [RollForward()]
    assert stage.left() == []


def test_commit_fails(stage: Stage, flat: Flat) -> None:
    """Promise 10: a cleanup that is not known to be durable is not called done."""
    fail(stage, "commit", errno.EIO)
    ended = stage.backup(stage.plan_of(flat.home))
    assert ended.run
    assert (ended.run.outcome, ended.run.cleanup) == ("completed", "parked")
    assert stage.recover().decisions == [RollForward()]


def test_another_is_unmounted(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sysfs tells of another file system may go while it is read: that is none of ours."""
    read, asked = Path.read_bytes, []
    other = "0" * 8 + "-0000-0000-0000-" + "0" * 12

    def going(path: Path) -> bytes:
        if other in str(path):
            asked.append(path.name)
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(path))
        return read(path)

    found = btrfsio.mounted()
    monkeypatch.setattr(btrfsio, "mounted", lambda: [other, *found])
    monkeypatch.setattr(Path, "read_bytes", going)
    assert btrfs.problem(disk.uuid) is None
    assert disk.uuid in btrfsio.members().values()
    assert "temp_fsid" in asked

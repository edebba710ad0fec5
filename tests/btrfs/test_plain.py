"""Directories that are read live, on real ext4 and xfs, alone and beside btrfs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote

import pytest

from atomtx.errors import WaitingError
from atomtx.names import RunId
from atomtx.recovery import Resume, RollBack
from tests.btrfs.conftest import Boot, Flat
from tests.btrfs.stage import Disk, Stage, call, tree
from tests.btrfs.test_btrfs import Typed, check_completed, refusal, steps, typed

__all__ = ["typed"]  # a fixture
BOOT = {
    "grub": None,
    "grub/config": b"a configuration",
    "kernel": b"a kernel",
    "lost+found": None,
    "efi": None,
}


def on_host(command: str) -> str:
    """Return what does *command* in this namespace, wherever it is run."""
    return f"nsenter --mount=/proc/{os.getpid()}/ns/mnt sh -c {quote(command)}\n"


# -- the ordinary course ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["namespace", "tree"])
def test_alone(stage: Stage, boot: Boot, layout: str) -> None:
    """Read live at its path, or in a tree; no snapshot is taken, and what is below it is named."""
    root = str(stage.home / "tree") if layout == "tree" else ""
    the_plan = stage.plan_of(live=[boot.boot], root=root)
    source = call("findmnt", "-no", "SOURCE", boot.efi).strip()
    assert set(the_plan.notes) == {
        f"{boot.efi} is not in the backup: it is another file system (xfs, {source})",
        f"{boot.boot} is not a moment: it is read live, while it may change "
        f"(ext4, {call('findmnt', '-no', 'SOURCE', boot.boot).strip()})",
    }
    ended = stage.backup(the_plan)
    check_completed(stage, ended)
    assert tree(stage.saved(Path(f"{root}{boot.boot}"))) == BOOT
    assert [kind for kind, _ in steps(stage)] == [
        "mount-volumes",
        "unmount-volumes",
        "run-client",
        "end-client",
    ]
    assert f"not a moment, read as it is from now on: {boot.boot}" in ended.said("step")
    assert not (stage.home / "tree").exists()


def test_recursive(stage: Stage, boot: Boot) -> None:
    """Promise 9: with -r the file systems below are read as well, and excluded at a word."""
    the_plan = stage.plan_of(live=[boot.boot], recursive=True)
    assert [v.mountpoint for v in the_plan.volumes] == [str(boot.boot), str(boot.efi)]
    assert the_plan.named == (str(boot.boot),)
    check_completed(stage, stage.backup(the_plan))
    assert tree(stage.saved(boot.boot)) == BOOT | {"efi/loader": b"a loader"}
    without = stage.plan_of(live=[boot.boot], recursive=True, exclude=[boot.efi])
    assert [v.mountpoint for v in without.volumes] == [str(boot.boot)]
    assert f"{boot.efi} and all below it is left out at your word" in without.notes


def test_directory(stage: Stage, boot: Boot) -> None:
    """A directory that is no mountpoint is read alone, and is read-only to the client."""
    the_plan = stage.plan_of(live=[boot.boot / "grub"])
    stage.behave(f"if touch {quote(str(boot.boot))}/grub/x; then exit 9; fi\n")
    check_completed(stage, stage.backup(the_plan))
    assert tree(stage.saved(boot.boot)) == {"grub": None, "grub/config": b"a configuration"}


def test_mixed(stage: Stage, flat: Flat, boot: Boot) -> None:
    """btrfs as it was, and beside it what is read live as it is; what lies between is recorded."""
    again = stage.disk.mount(
        stage.disk.home / "again",
        options="rw",
        device=call("findmnt", "-no", "SOURCE", boot.boot).strip(),
    )
    before = tree(flat.root)
    the_plan = stage.plan_of(flat.root, flat.home, live=[boot.boot])
    home = quote(str(stage.disk.top / "@home"))
    stage.behave(f"echo later > {home}/file; echo later > {again}/new\n")
    ended = stage.backup(the_plan)
    check_completed(stage, ended)
    assert tree(stage.saved(flat.root)) == before
    assert tree(stage.saved(boot.boot)) == BOOT | {"new": b"later\n"}
    (detail,) = [detail for kind, detail in steps(stage) if kind == "take-snapshots"]
    assert str(detail).startswith("2 subvolumes one after the other within 0.")
    assert [v["kind"] for v in stage.rows("SELECT kind FROM volumes ORDER BY n")] == (
        [v.kind for v in the_plan.volumes]
    )


def test_three_kinds(stage: Stage, flat: Flat, boot: Boot) -> None:
    """ZFS (played), btrfs and a live directory in one run: the time between snapshots is kept."""
    on_zfs = stage.plan("tank/a", "tank/b")
    rest = stage.plan_of(flat.root, flat.home, live=[boot.boot], run=RunId(on_zfs.run))
    both = replace(
        rest,
        volumes=(*on_zfs.volumes, *rest.volumes),
        targets=(*on_zfs.targets, *rest.targets),
    )
    check_completed(stage, stage.backup(both))
    found = [detail for kind, detail in steps(stage) if kind == "take-snapshots"]
    assert len(found) == 2
    words = "one transaction group a pool; 1 pool and 2 subvolumes one after the other within"
    assert all(str(detail).startswith(words) for detail in found)
    assert stage.saved(stage.live("tank/b") / "file").read_text() == "frozen"
    assert stage.saved(flat.home / "file").read_text() == "frozen @home"
    assert stage.saved(boot.boot / "kernel").read_text() == "a kernel"


def test_below_frozen(stage: Stage, flat: Flat, disk: Disk, boot: Boot) -> None:
    """A live directory in the middle of a frozen one is seen there, as on the host."""
    (flat.home / "stick").mkdir()
    stick = disk.mount(flat.home / "stick", options="loop", device=boot.image)
    the_plan = stage.plan_of(flat.root, flat.home, live=[stick])
    stage.behave(f"echo later > {quote(str(stage.disk.top))}/@home/file\n")
    check_completed(stage, stage.backup(the_plan))
    assert stage.saved(flat.home / "file").read_text() == "frozen @home"
    assert stage.saved(stick / "kernel").read_text() == "a kernel"
    assert the_plan.targets == (str(flat.root),)


# -- the emptied tree ------------------------------------------------------------------------

Trick = Callable[[Boot], str]
TRICKS: dict[str, Trick] = {
    "unmounted": lambda b: f"umount -l {quote(str(b.efi))}; umount {quote(str(b.boot))}",
    "lazily": lambda b: f"umount -R -l {quote(str(b.boot))}",
    "mounted over": lambda b: f"mount -t tmpfs none {quote(str(b.boot))}",
}


@pytest.mark.parametrize("propagation", ["shared", "private"])
@pytest.mark.parametrize("trick", TRICKS)
def test_not_the_same_at_the_end(
    stage: Stage, disk: Disk, boot: Boot, trick: str, propagation: str
) -> None:
    """Promise 7: what is not the plan's file system at the end is no backup, whatever was read."""
    call("mount", f"--make-r{propagation}", disk.home)
    the_plan = stage.plan_of(live=[boot.boot], client="played")
    stage.behave(on_host(TRICKS[trick](boot)))
    ended = stage.backup(the_plan)
    assert ended.run
    assert ended.run.outcome == "failed"
    reason = f"{boot.boot} was unmounted, or mounted over, while the client read it"
    assert ended.run.reason == reason
    assert tree(stage.saved(boot.boot))["kernel"] == b"a kernel"  # it kept what it had
    assert stage.left() == []


def test_mounted_again(stage: Stage, boot: Boot) -> None:
    """The same file system in the place of itself is no harm."""
    where = quote(str(boot.boot))
    source = call("findmnt", "-no", "SOURCE", boot.boot).strip()
    stage.behave(on_host(f"umount -R -l {where}; mount {source} {where}"))
    check_completed(stage, stage.backup(stage.plan_of(live=[boot.boot])))


def test_mounted_below(stage: Stage, boot: Boot) -> None:
    """What is mounted below it meanwhile is not read, and does not disturb."""
    stage.behave(on_host(f"mount -t tmpfs none {quote(str(boot.boot))}/grub"))
    check_completed(stage, stage.backup(stage.plan_of(live=[boot.boot])))
    assert tree(stage.saved(boot.boot)) == BOOT


def test_not_the_same_at_the_start(stage: Stage, boot: Boot) -> None:
    """Promise 7: unmounted since the plan, it is an empty directory of another file system."""
    the_plan = stage.plan_of(live=[boot.boot])
    call("umount", "-R", boot.boot)
    ended = stage.backup(the_plan)
    assert ended.run
    assert ended.run.outcome == "failed"
    assert f"{boot.boot} is on another file system than in the plan" in str(ended.run.reason)
    assert stage.copies() == []
    assert stage.left() == []


def test_another_disk(stage: Stage, disk: Disk, boot: Boot) -> None:
    """A file system of the same kind at the same path, with the same files, is another one."""
    the_plan = stage.plan_of(live=[boot.boot])
    call("umount", "-R", boot.boot)
    call("mkfs.ext4", "-q", "-F", boot.image)  # another UUID on the same device
    disk.mount(boot.boot, options="loop", device=boot.image)
    (boot.boot / "kernel").write_text("a kernel")
    ended = stage.backup(the_plan)
    assert ended.run
    assert f"{boot.boot} is on another file system than in the plan" in str(ended.run.reason)


def test_empty(stage: Stage, disk: Disk) -> None:
    """Promise 7: an empty directory is refused: what belongs there is not mounted."""
    (disk.home / "empty").mkdir()
    assert "is empty: there is nothing to back up" in live_refusal(stage, disk.home / "empty")


def test_emptied(stage: Stage, flat: Flat, boot: Boot) -> None:
    """Promise 7: an ext4 without files is empty, whatever mke2fs made in it."""
    check_completed(stage, stage.backup(stage.plan_of(flat.root, live=[boot.boot])))
    the_plan = stage.plan_of(flat.root, live=[boot.boot])
    call("umount", boot.efi)
    call("rm", "-r", *(p for p in boot.boot.iterdir() if p.name != "lost+found"))
    ended = stage.backup(the_plan)
    assert ended.run
    assert ended.run.outcome == "failed"
    assert f"{boot.boot} is empty, and was not in the last" in str(ended.run.reason)
    assert "is empty: there is nothing to back up" in live_refusal(stage, boot.boot)
    (boot.boot / "lost+found" / "#12").write_text("found by fsck")
    ended = stage.backup(stage.plan_of(flat.root, live=[boot.boot]))
    assert ended.run
    assert ended.run.outcome == "completed"


# -- kills -----------------------------------------------------------------------------------


def test_resumed(stage: Stage, flat: Flat, boot: Boot) -> None:
    """A resumed run has the moment of btrfs, and says that the rest is read later."""
    before = tree(flat.root)
    stage.backup(
        stage.plan_of(flat.root, flat.home, live=[boot.boot]),
        at="journal:backing-up#1",
        who="all",
    )
    (flat.home / "file").write_text("changed")
    (boot.boot / "kernel").write_text("a newer kernel")
    ended = stage.recover()
    assert ended.decisions == [Resume()]
    assert tree(stage.saved(flat.root)) == before
    assert tree(stage.saved(boot.boot)) == BOOT | {"kernel": b"a newer kernel"}
    words = f"attempt 2; {boot.boot} is read as it is now, later than the moment"
    assert any(words in said for said in ended.said("step"))
    assert words in {row["reason"] for row in stage.rows("SELECT reason FROM moves")}
    assert stage.left() == []


def test_waits(stage: Stage, disk: Disk, flat: Flat, boot: Boot) -> None:
    """Promise 14: a resume waits for the file system; a roll-back does not."""
    the_plan = stage.plan_of(flat.home, live=[boot.boot])
    stage.backup(the_plan, at="journal:backing-up#1", who="all")
    call("umount", "-R", boot.boot)
    ended = stage.recover()
    assert isinstance(ended.raised, WaitingError)
    assert f"{boot.boot} is on another file system than in the plan" in str(ended.raised)
    assert len(disk.snapshots()) == 1
    disk.mount(boot.boot, options="loop", device=boot.image)
    assert stage.recover().decisions == [Resume()]
    assert stage.left() == []
    assert stage.saved(boot.boot / "kernel").read_text() == "a kernel"


def test_rolled_back(stage: Stage, flat: Flat, boot: Boot) -> None:
    """What a run made is undone without the live file system."""
    the_plan = stage.plan_of(flat.home, live=[boot.boot])
    stage.backup(the_plan, at="journal:backing-up#1", who="all")
    call("umount", "-R", boot.boot)
    assert stage.recover(rollback=True).decisions == [RollBack("at the user's word")]
    assert stage.left() == []


@pytest.mark.parametrize(
    "point", ["start:mount#1", "end:mount#1", "end:mount#2", "end:mount#3", "journal:backing-up#1"]
)
def test_killed_tree(stage: Stage, flat: Flat, boot: Boot, point: str) -> None:
    """Promise 5: the mounts of a tree are removed, also one that is not read-only yet."""
    root = stage.home / "tree"
    the_plan = stage.plan_of(flat.home, live=[boot.boot], root=str(root))
    assert stage.backup(the_plan, at=point, who="all").status == -9
    assert stage.recover(rollback=True).status == 0
    assert stage.left() == []
    assert not root.exists()


def test_busy_tree(stage: Stage, boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind in a tree that somebody uses is parked; who does is named, and nobody else."""
    monkeypatch.setattr("atomtx.cleaning.PAUSES_S", ())
    root = stage.home / "tree"
    the_plan = stage.plan_of(live=[boot.boot], root=str(root))
    stage.backup(the_plan, at="journal:backing-up#1", who="all")
    with open(f"{root}{boot.boot}/kernel") as file, open(boot.boot / "grub" / "config"):
        (warning,) = [w for w in stage.recover(rollback=True).said("warn") if "busy" in w]
        assert f"{root}{boot.boot} is busy: open by " in warning
        assert f"open by {os.getpid()} " in warning  # and by the fork that runs the command
        assert "config" not in warning  # the live mount's
        assert file.name in warning
    assert stage.recover().status == 0
    assert stage.left() == []


def test_tree_of_another_boot(stage: Stage, boot: Boot) -> None:
    """Promise 2: after a reboot a mount of the same file system in the tree is somebody's own."""
    root = stage.home / "tree"
    the_plan = stage.plan_of(live=[boot.boot], root=str(root))
    stage.backup(the_plan, at="journal:backing-up#1", who="all")
    mounted = f"{root}{boot.boot}"
    stage.run_sql("UPDATE runs SET boot_id = 'another'")
    stage.recover(rollback=True)
    assert os.path.ismount(mounted)
    call("umount", mounted)


def test_covered(stage: Stage, disk: Disk, boot: Boot) -> None:
    """Promise 4: a bind beneath somebody's mount is not forgotten: it goes once that is gone."""
    root = disk.home / "tree"
    the_plan = stage.plan_of(live=[boot.boot], root=str(root))
    stage.backup(the_plan, at="journal:backing-up#1", who="all")
    mounted = f"{root}{boot.boot}"
    call("mount", "-t", "tmpfs", "foreign", mounted)
    ended = stage.recover(rollback=True)
    said = "".join(ended.said("warn"))
    assert f"{mounted} is busy: foreign is mounted at {mounted} (end what uses it" in said
    (run,) = stage.rows("SELECT state, cleanup FROM runs")
    assert (run["state"], run["cleanup"]) == ("unmounting", "parked")
    call("umount", mounted)
    assert os.path.ismount(mounted)
    stage.recover(rollback=True)
    assert not root.exists()
    assert stage.left() == []


# -- as a person types it --------------------------------------------------------------------


def live_refusal(stage: Stage, *paths: Path, **options: object) -> str:
    return refusal(stage, live=paths, **options)


def test_refusals(stage: Stage, flat: Flat, boot: Boot) -> None:
    """A typo does not make a live backup of what can be frozen; what makes no sense is refused."""
    assert "is on btrfs, of which a snapshot can be taken" in live_refusal(stage, flat.home)
    assert "is on none of ZFS, btrfs and LVM" in refusal(stage, boot.boot)
    assert "is given twice" in live_refusal(stage, boot.boot, boot.boot)
    assert "already included by" in live_refusal(stage, boot.boot, boot.boot / "grub")
    assert "already included by" in live_refusal(stage, boot.boot, boot.efi, recursive=True)
    assert "holds no files of anybody's" in live_refusal(stage, Path("/proc/sys"))
    assert "cannot read" in live_refusal(stage, boot.boot / "kernel")
    assert "cannot read" in live_refusal(stage, boot.boot / "absent")


def details(root: Path) -> dict[str, object]:
    """Return what a restore has to bring back of each file but its bytes."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in _names(path)}
        found[str(path.relative_to(root))] = (
            *(stat.filemode(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns),
            *(info.st_nlink, xattrs, os.readlink(path) if path.is_symlink() else None),
        )
    return found


def _names(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def test_restic(flat: Flat, boot: Boot, typed: Typed) -> None:
    """What restic restores of a mixed set is equal, with owners, times, links and attributes."""
    (boot.boot / "random").write_bytes(os.urandom(1_000_000))
    os.chown(boot.boot / "random", 1234, 4321)
    (boot.boot / "random").chmod(0o640)
    os.setxattr(boot.boot / "kernel", "user.word", b"value")
    os.link(boot.boot / "kernel", boot.boot / "kernel.old")
    (boot.boot / "link").symlink_to("kernel")
    call("setfacl", "-m", "u:1234:r", boot.boot / "kernel")
    (boot.boot / "sparse").write_bytes(b"")
    os.truncate(boot.boot / "sparse", 3_000_000)
    before = tree(boot.boot), details(boot.boot)
    frozen = tree(flat.root)
    typed.run(typed.restic, "init")
    words = ("backup", "-r", str(flat.root), "--read-live", str(boot.boot))
    client = ("--client", "restic", "--command", typed.restic)
    said = typed.atomtx(*words, *client)
    assert f"4 volumes, not a moment: {boot.boot}, {boot.efi}" in said
    restored = Path(f"{typed.env['HOME']}/restored")
    typed.run(typed.restic, "restore", "latest", "--target", str(restored))
    there = Path(f"{restored}{boot.boot}")
    assert (tree(there), details(there)) == before
    assert tree(Path(f"{restored}{flat.root}")) == frozen
    run = json.loads(typed.run(*typed.words("history", "--json")))[0]
    assert run["not_a_moment"] == [str(boot.boot), str(boot.efi)]
    assert f"completed (not a moment: {boot.boot} +1)" in typed.atomtx("history")
    shown = typed.atomtx("show", run["id"])
    assert f"{boot.boot}, {boot.efi}: not a moment, from 20" in shown
    assert "none: read live, not a moment" in shown


def test_require_atomic(disk: Disk, flat: Flat, boot: Boot, typed: Typed) -> None:
    """Promise 8: what is read live is refused where one moment is asked for; nothing is changed."""
    words = ("backup", "--require-atomic", "--command", "true")
    for names in ((), (str(flat.home),)):
        said = typed.atomtx(*words, *names, "--read-live", str(boot.boot), status=2)
        assert "is read live: what is read of it is not a moment" in said
    assert "no run to show" in typed.atomtx("history")
    assert disk.snapshots() == []


def test_told(boot: Boot, typed: Typed, tmp_path: Path) -> None:
    """The plan, its JSON and the notice say that it is not a moment."""
    words = ("backup", "--command", "false", "--read-live", str(boot.boot))
    said = typed.atomtx(*words, "--dry-run")
    assert f"{boot.boot} is not a moment: it is read live" in said
    assert "mount 1 live directory (not a moment) read-only at the live paths" in said
    done = subprocess.run(
        typed.words(*words, "--dry-run", "--json"), env=typed.env, capture_output=True, text=True
    )
    told = [json.loads(line) for line in done.stdout.splitlines()][-1]
    assert told["not_a_moment"] == [str(boot.boot)]
    typed.env["ATOMTX_NOTIFY_COMMAND"] = f"sh -c 'cat > {tmp_path}/notice; env > {tmp_path}/env'"
    typed.atomtx(*words, status=1)
    assert f"read live   {boot.boot}: not a moment" in (tmp_path / "notice").read_text()
    assert f"ATOMTX_NOT_A_MOMENT={boot.boot}\n" in (tmp_path / "env").read_text()

"""Which directories are read live, what is left out, and how the plan says so."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomtx import directories, moment, plan, selection, system
from atomtx.directories import Found
from atomtx.errors import EffectError, UserError
from atomtx.intents import Mount, MountVolumes, TakeSnapshots, from_json
from atomtx.mounts import live, mountinfo
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.names import RunId
from atomtx.plan import DatasetFacts, DirectoryFacts, Plan, Pool, Request, assemble
from atomtx.preparing import inventory
from atomtx.recovery import Presence, Probes, Resume, RollBack, Wish, decide
from atomtx.volumes import plain
from atomtx.volumes.kinds import Kinds
from tests.runs import CLIENT, a_plan, a_run

RUN = RunId("0123456789abcdef")
ROOT = ("/", "ext4", "/dev/sda1", "8:1", "/")
BOOT = ("/boot", "ext4", "/dev/sda2", "8:2", "/")
EFI = ("/boot/efi", "vfat", "/dev/sda3", "8:3", "/")
HOME = ("/tank/home", "zfs", "tank/home", "0:40", "/")
Row = tuple[str, str, str, str, str]


def table(*rows: Row) -> Table:
    """Make the table of mounts: mountpoint, type, source, device and root of each."""
    entries: list[Entry] = []
    for n, (at, fstype, source, dev, root) in enumerate(rows, start=1):
        below = Table(entries).containing(at)
        parent = below.id if below else 0
        entries.append(Entry(n, parent, dev, root, at, "rw", (), fstype, source, "rw"))
    return Table(entries)


def described(path: str, entry: Entry) -> DirectoryFacts:
    guid = f"uuid {entry.dev}:{directories.inside(path, entry)}"
    return DirectoryFacts(path, guid, f"uuid {entry.dev}", entry.fstype, entry.source)


def test_there(tmp_path: Path) -> None:
    """A path below no directory, or below a file, is not there; a mountpoint is not looked at."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    mounts = table(ROOT, ("/mounted/elsewhere", "zfs", "tank/x", "0:41", "/"))
    there = (str(tmp_path), f"{tmp_path}/file", f"{tmp_path}/link", "/mounted/elsewhere/", "tank/x")
    plain.check_there((*there, f"/{'n' * 300}"), mounts)  # too long to be looked at
    for absent in (f"{tmp_path}/absent", f"{tmp_path}/file/x", "/mounted/elsewhere/x"):
        with pytest.raises(UserError, match=f"there is no {absent} .*mounted"):
            plain.check_there((*there, absent), mounts)


def test_file(tmp_path: Path) -> None:
    """What is mounted on a file is one; of what cannot be looked at that is not known."""
    (tmp_path / "file").touch()
    answers = [plain.is_file(f"{tmp_path}{name}") for name in ("", "/file", "/absent")]
    assert answers == [False, True, False]


@pytest.mark.parametrize(
    ("made", "empty"),
    [
        ((), True),
        (("mkdir", "lost+found"), True),
        (("mkdir", "-p", "lost+found/#12"), False),
        (("mkdir", "lost+found", "other"), False),
        (("touch", "lost+found"), False),
        (("ln", "-s", ".", "lost+found"), False),
        (("mkdir", "other"), False),
    ],
)
def test_empty(tmp_path: Path, made: tuple[str, ...], empty: bool) -> None:
    """Promise 7: a directory with what mke2fs made and nothing else is empty."""
    if made:
        subprocess.run(made, cwd=tmp_path, check=True)
    assert live.content_of(str(tmp_path)).is_empty is empty


def choose(mounts: Table, *paths: str, **options: Any) -> Found:
    request = Request((), live=paths, **options)
    return directories.select(request, mounts, described, is_file="/boot/file".__eq__)


def refusal(mounts: Table, *paths: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        choose(mounts, *paths, **options)
    return str(caught.value)


def planned(mounts: Table, *names: str, layout: str = "namespace", **options: Any) -> Plan:
    """Return the plan over live directories and the dataset tank/home."""
    request = Request(names, layout=layout, **options)
    found = directories.select(request, mounts, described)
    facts = DatasetFacts("tank/home", "filesystem", "7", "/tank/home", "on", True, "-")
    pools = [Pool("tank", "11", "ONLINE")]
    chosen = selection.select(request, [facts], pools, mounts, live=found)
    return assemble(request, chosen, pools=pools, run=RUN, client=CLIENT)


# -- selection -------------------------------------------------------------------------------


def test_named() -> None:
    """A mountpoint or a directory is taken as it is typed; what is below a mount is not."""
    found = choose(table(ROOT, BOOT, EFI), "/boot/", "/etc")
    assert found.named == ("/boot", "/etc")
    assert [(v.mountpoint, v.facts.guid) for v in found.volumes] == [
        ("/boot", "uuid 8:2:/"),
        ("/etc", "uuid 8:1:/etc"),
    ]


def test_bind_mount() -> None:
    """A directory is the one of its file system, by whatever mount it is seen."""
    found = choose(table(ROOT, ("/srv", "ext4", "/dev/sda2", "8:2", "/data")), "/srv/x")
    assert found.volumes[0].facts.guid == "uuid 8:2:/data/x"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("/boot/z", "zfs", "tank/z", "0:41", "/"), "of which a snapshot can be taken"),
        (("/boot/b", "btrfs", "/dev/sdb", "0:42", "/@"), "of which a snapshot can be taken"),
        (("/boot/t", "tmpfs", "tmpfs", "0:43", "/"), "it is in memory; name it with --read-live"),
        (("/boot/n", "nfs4", "far:/x", "0:44", "/"), "it is a nfs4, far:/x; name it with"),
        (("/boot/p", "proc", "proc", "0:45", "/"), "holds no files of anybody's"),
        (("/boot/again", "ext4", "/dev/sda2", "8:2", "/grub"), "the files of /boot once more"),
        (("/boot/\udcff", "ext4", "/dev/sdc", "8:9", "/"), "its name is not UTF-8"),
        (("/boot/a\nb", "ext4", "/dev/sdc", "8:9", "/"), "its name has a newline in it"),
        (("/boot/d", "ext4", "/dev/sda1", "8:1", "/d//deleted"), "it is a directory that was del"),
        (("/boot/file", "ext4", "/dev/sda1", "8:1", "/file"), "it is a single file; the one that"),
    ],
)
def test_recursive(row: Row, reason: str) -> None:
    """-r takes what is on a disk below, and names what it does not take, with the reason."""
    found = choose(table(ROOT, BOOT, EFI, row), "/boot", recursive=True)
    assert [v.mountpoint for v in found.volumes] == ["/boot", "/boot/efi"]
    (skipped,) = found.skipped
    assert skipped.name == row[0]
    assert reason in skipped.reason
    assert choose(table(ROOT, BOOT, EFI, row), "/boot").skipped == ()


@pytest.mark.parametrize("fstype", ["tmpfs", "nfs4", "fuse.sshfs", "overlay"])
def test_named_all_the_same(fstype: str) -> None:
    """What -r does not take is taken where it is named."""
    (volume,) = choose(table(ROOT, ("/x", fstype, "far:/x", "0:44", "/")), "/x").volumes
    assert volume.mountpoint == "/x"


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (("/tank/home",), {}, "/tank/home is on zfs, of which a snapshot can be taken"),
        (("/tank/home/x",), {}, "/tank/home/x is on zfs, of which a snapshot can be taken"),
        (("/proc/1",), {}, "holds no files of anybody's"),
        (("boot",), {}, "--read-live needs an absolute path, not 'boot'"),
        (("/boot", "/boot/"), {}, "/boot is given twice"),
        (("/boot", "/boot/grub"), {}, "/boot/grub is already included by /boot"),
        (("/boot", "/boot/efi"), {"recursive": True}, "already included by /boot with -r"),
        (("/\udcff",), {}, "is not UTF-8"),
        (("/new\nline",), {}, r"the name of '/new\nline' has a newline in it"),
    ],
)
def test_refused(paths: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    """What can be frozen, or cannot be read, is never read live by mistake."""
    mounts = table(ROOT, BOOT, EFI, HOME, ("/proc", "proc", "proc", "0:5", "/"))
    assert message in refusal(mounts, *paths, **options)


def test_two_mounts() -> None:
    """Without -r a directory and a file system mounted in it are two."""
    found = choose(table(ROOT, BOOT, EFI), "/boot", "/boot/efi")
    assert [v.mountpoint for v in found.volumes] == ["/boot", "/boot/efi"]


def test_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mount namespaces there is nothing that could show it."""
    monkeypatch.setattr(system.here, "NAMESPACES", False)
    assert "cannot be read live on" in refusal(table(ROOT), "/etc")


# -- the plan --------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["", "/tree"])
def test_plan(root: str) -> None:
    """A mixed set: snapshots are taken and held of what has them, and of nothing else."""
    layout = "tree" if root else "namespace"
    made = planned(table(ROOT, BOOT, EFI, HOME), "tank/home", live=("/boot",), root=root,
                   layout=layout)  # fmt: skip
    assert made.label == "tank/home, /boot"
    assert plan.read_live(made) == ("/boot",)
    assert made.named == ("/boot", "/tank/home")
    (take, hold, mount) = plan.intents(made)
    assert isinstance(take, TakeSnapshots)
    assert isinstance(mount, MountVolumes)
    assert take.snapshots == (f"tank/home@atomtx-{RUN}",)
    assert "1 hold" in str(hold.compensation() and hold.compensation().describe())  # type: ignore[union-attr]
    assert mount.mounts[0] == Mount("/boot", f"{root}/boot", "plain")
    assert mount.describe().startswith("mount 1 snapshot and 1 live directory (not a moment) read-")
    assert from_json(mount.kind, mount.to_json()) == mount
    assert plan.from_json(plan.to_json(made)) == made
    assert "/boot is not a moment: it is read live, while it may change (ext4, /dev/sda2)" in (
        made.notes
    )
    assert any(note.startswith("/boot/efi is not in the backup") for note in made.notes)


def test_plan_of_none_frozen() -> None:
    """A set of live directories alone takes nothing."""
    made = planned(table(ROOT, BOOT, EFI), live=("/boot",), recursive=True)
    (mount,) = plan.intents(made)
    assert mount.describe() == (
        "mount 2 live directories (not a moment) read-only at the live paths, "
        "in a namespace of its own"
    )
    assert made.notes == tuple(
        f"{path} is not a moment: it is read live, while it may change ({source})"
        for path, source in (("/boot", "ext4, /dev/sda2"), ("/boot/efi", "vfat, /dev/sda3"))
    )


def test_excluded() -> None:
    """Promise 9: what is left out at the user's word is said to be, once."""
    made = planned(table(ROOT, BOOT, EFI), live=("/boot",), exclude=("/boot/efi",), recursive=True)
    assert [v.mountpoint for v in made.volumes] == ["/boot"]
    assert [n for n in made.notes if "efi" in n] == [
        "/boot/efi and all below it is left out at your word"
    ]


def test_gap() -> None:
    """A directory that has no place in the frozen files above it is refused."""
    mounts = table(HOME, ("/tank/home/a", "ext4", "/dev/sda2", "8:2", "/"))
    with pytest.raises(UserError, match="lies between them and is not in the set"):
        planned(mounts, "tank/home", live=("/tank/home/a/deep",))


def test_key() -> None:
    """An unnamed job is another one where its live directory is of another file system."""
    one = planned(table(ROOT, BOOT), live=("/boot",))
    other = planned(table(ROOT), live=("/boot",))
    assert one.job != other.job


def test_no_zfs() -> None:
    """Of a machine without ZFS nothing is asked where only live directories are named."""

    class Absent:
        def pools(self) -> list[Pool]:
            raise AssertionError("no such program")

    request = Request((), live=("/boot",))
    assert inventory(request, Absent(), table(ROOT)) == ([], [])  # type: ignore[arg-type]


# -- recovery --------------------------------------------------------------------------------


def mixed(**values: Any) -> Any:
    boot = plan.PlannedVolume("plain", "uuid", "uuid", "/boot", "uuid:/", "/boot", "")
    made = a_plan("tank/a")
    return a_run(replace(made, volumes=(boot, *made.volumes)), **values)


def test_decisions() -> None:
    """A live directory neither keeps a run from being resumed nor is it ever lost."""
    run = mixed()
    (frozen,) = run.frozen
    assert run.read_live == ("/boot",)
    ours = Probes(snapshots={frozen.snapshot: Presence.OURS})
    assert decide(run, ours, Wish()) == Resume()
    gone = Probes(snapshots={frozen.snapshot: Presence.ABSENT})
    assert isinstance(decide(run, gone, Wish()), RollBack)


def test_said_again() -> None:
    """A resumed run says what it reads later than the moment."""
    words = "attempt 3; /boot is read as it is now, later than the moment"
    assert moment.again(mixed(attempts=2)) == words
    assert moment.again(a_run(attempts=2)) == "attempt 3"


# -- the machine -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fstype", "source", "dev", "expected"),
    [
        ("nfs4", "far:/x", "0:44", ("nfs4 far:/x", "nfs4 far:/x")),
        ("fuse.sshfs", "far:", "0:44", ("fuse.sshfs far:", "fuse.sshfs far:")),
        ("tmpfs", "tmpfs", "0:44", ("tmpfs tmpfs, device 0:44 of boot B", "tmpfs tmpfs")),
        ("ext4", "/dev/sdx9", "254:999", ("ext4 /dev/sdx9, device 254:999 of boot B",
                                          "ext4 /dev/sdx9")),
    ],
)  # fmt: skip
def test_identity(
    fstype: str, source: str, dev: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a UUID a file system is where it comes from, or the same as long as it is mounted."""
    monkeypatch.setattr("atomtx.locks.boot_id", lambda: "B")
    entry = Entry(1, 0, dev, "/", "/x", "rw", (), fstype, source, "rw")
    facts = plain.identify("/x/y", entry)
    assert (facts.filesystem, facts.guid) == (expected[0], f"{expected[1]}:/y")


def test_proof(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of the plan is proven by device and path; any other is refused."""
    entry = Entry(1, 0, "0:44", "/", "/", "rw", (), "nfs4", "far:/x", "rw")
    monkeypatch.setattr(mountinfo, "read", lambda: Table([entry]))
    path = str(tmp_path)
    volume = plan.PlannedVolume(
        "plain", "nfs4 far:/x", "nfs4 far:/x", path, f"nfs4 far:/x:{path}", path, ""
    )
    assert plain.proof(volume) == f"0:44:{path}"
    assert Kinds.real().unreadable([volume]) is None
    for other in (replace(volume, pool_guid="nfs4 near:/x"), replace(volume, guid="another")):
        with pytest.raises(EffectError, match="another file system than in the plan"):
            plain.proof(other)
        assert "mount what belongs there" in str(Kinds.real().unreadable([other]))
    with pytest.raises(EffectError, match="cannot read"):
        plain.proof(replace(volume, mountpoint=f"{path}/absent"))


def test_shown() -> None:
    """A mount of a live directory is told by device and path, deleted or not."""
    each = Mount("/boot/x", "/tree/boot/x", "plain", "8:2:/x")
    entry = Entry(1, 0, "8:2", "/x", "/tree/boot/x", "ro", (), "ext4", "/dev/sda2", "rw")
    assert live.shows(entry, each)
    assert live.shows(replace(entry, root="/x//deleted"), each)
    assert not live.shows(replace(entry, root="/"), each)
    assert not live.shows(replace(entry, dev="8:3"), each)
    assert live.device_of(each) == "8:2"


def test_another_device(tmp_path: Any) -> None:
    """What is on another device than the intent says is not opened; nor is a symbolic link."""
    with pytest.raises(EffectError, match="another file system than a moment ago"):
        live.opened([Mount(str(tmp_path), "/x", "plain", "1:1:/")])
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(EffectError, match="cannot read"):
        live.opened([Mount(str(tmp_path / "link"), "/x", "plain", "1:1:/")])


def test_device_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is unplugged meanwhile does not hide the UUID of another one."""
    for name in ("1111", "2222"):
        (tmp_path / name).touch()

    def number(device: str) -> str:
        if device.endswith("1111"):
            raise FileNotFoundError(device)
        return "254:77" if device.endswith("2222") else ""

    monkeypatch.setattr(plain, "_BY_UUID", tmp_path)
    monkeypatch.setattr(plain, "_number", number)
    entry = Entry(9, 1, "254:77", "/", "/x", "rw", (), "ext4", "none", "rw")
    assert plain._uuid(entry) == "2222"

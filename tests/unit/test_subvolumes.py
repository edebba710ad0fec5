"""Which btrfs subvolumes a request means, where each is seen, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from atomtx import wanted
from atomtx.errors import UserError
from atomtx.intents import MountVolumes, TakeSnapshots
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.names import BtrfsSnapshot, RunId, kept_name, mounted_as
from atomtx.plan import (
    ClientPlan,
    Plan,
    Request,
    Selection,
    SubvolumeFacts,
    assemble,
    intents,
    is_frozen,
    tops,
)
from atomtx.selection import select
from atomtx.subvolumes import Filesystem, Subvolume

UUID = "0544d686-bc2a-4b36-8920-25649d1a58e5"
DEVICE = "0:39"
RUN = RunId("0123456789abcdef")
CLIENT = ClientPlan("command", ("true",), (), "/", "", None, (), ())


def subvolume(path: str, **values: Any) -> Subvolume:
    """Make a subvolume whose id is told by its path."""
    given: dict[str, Any] = {"uuid": f"uuid of {path}", "parent_uuid": "", "is_readonly": False}
    return Subvolume(5 if path == "/" else 256 + len(path), path, **given | values)


def table(*mounts: tuple[str, str], **values: str) -> Table:
    """Make the table after subvolumes (root, mountpoint) are mounted on a machine on ext4."""
    entries = [Entry(1, 0, "8:1", "/", "/", "rw", (), "ext4", "/dev/sda1", "rw")]
    for n, (root, at) in enumerate(mounts, start=2):
        below = Table(entries).containing(at)
        assert below
        given = {"dev": DEVICE, "fstype": "btrfs", "source": "/dev/sdb", "super_options": "rw"}
        made = given | values
        entries.append(
            Entry(
                n, below.id, made["dev"], root, at, "rw", (), made["fstype"], made["source"],
                made["super_options"],
            )
        )  # fmt: skip
    return Table(entries)


def choose(mounts: Table, subvolumes: list[Subvolume], *names: str, **options: Any) -> Selection:
    there = Filesystem(UUID, DEVICE, 7, (subvolume("/"), *subvolumes))
    return select(Request(names, **options), (), (), mounts, [there])


def places(selection: Selection) -> list[str]:
    return [volume.mountpoint for volume in selection.volumes]


def told(selection: Selection) -> list[str]:
    return [str(left) for left in (*selection.skipped, *selection.uncovered)]


def refusal(mounts: Table, subvolumes: list[Subvolume], *names: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        choose(mounts, subvolumes, *names, **options)
    return str(caught.value)


FLAT = [subvolume("/@"), subvolume("/@home")]
FLAT_TABLE = table(("/@", "/m"), ("/@home", "/m/home"))
NESTED = [subvolume("/data"), subvolume("/data/a"), subvolume("/data/a/b c")]
NESTED_TABLE = table(("/", "/m"))


def test_flat() -> None:
    """A subvolume is where it is mounted; -r takes what is mounted below, in the same order."""
    chosen = choose(FLAT_TABLE, FLAT, "/m", recursive=True)
    assert places(chosen) == ["/m", "/m/home"]
    assert chosen.asked == ("/m",)
    assert told(chosen) == []
    facts = chosen.volumes[1].facts
    assert isinstance(facts, SubvolumeFacts)
    assert (facts.guid, facts.filesystem, facts.source.path) == ("uuid of /@home", UUID, "/@home")
    assert facts.source.generation == 7


def test_nested() -> None:
    """A subvolume that is mounted nowhere is where it lies in one that is."""
    chosen = choose(NESTED_TABLE, NESTED, "/m", recursive=True)
    assert places(chosen) == ["/m", "/m/data", "/m/data/a", "/m/data/a/b c"]
    assert places(choose(NESTED_TABLE, NESTED, "/m/data/a/")) == ["/m/data/a"]


def test_named() -> None:
    """Promise 9: what lies below and is not in the set is named, by its path."""
    assert told(choose(NESTED_TABLE, NESTED, "/m/data/a")) == [
        "/m/data/a/b c is not in the backup: it is a subvolume of its own; name it as well, "
        "or use -r"
    ]
    assert told(choose(FLAT_TABLE, FLAT, "/m")) == [
        "/m/home is not in the backup: it is a subvolume of its own; name it as well, or use -r"
    ]


def test_hidden() -> None:
    """A subvolume beneath a mount is not seen; the mount over it is named."""
    mounts = Table(
        [*NESTED_TABLE, Entry(9, 2, "0:50", "/", "/m/data/a", "rw", (), "tmpfs", "tmpfs", "rw")]
    )
    chosen = choose(mounts, NESTED, "/m", recursive=True)
    assert places(chosen) == ["/m", "/m/data"]
    assert told(chosen) == [
        "/m/data/a is not in the backup: it is another file system (tmpfs, tmpfs)"
    ]


def test_bind_mount() -> None:
    """A mount of a directory is no subvolume, but one in that directory is seen through it."""
    mounts = table(("/data/plain", "/bind"))
    subvolumes = [subvolume("/data"), subvolume("/data/plain/deep")]
    assert places(choose(mounts, subvolumes, "/bind/deep")) == ["/bind/deep"]
    said = refusal(mounts, subvolumes, "/bind/file")
    assert "/bind/file is in a subvolume of which only a part is mounted below /bind" in said


def test_twice() -> None:
    """Promise 9: a second place of a subvolume would be empty in the backup, and is named."""
    mounts = table(("/", "/m"), ("/data", "/m/again"))
    chosen = choose(mounts, [subvolume("/data")], "/m", recursive=True)
    assert places(chosen) == ["/m", "/m/again"]
    assert told(chosen) == [
        "/m/data is not in the backup: it is the subvolume at /m/again once more"
    ]


@pytest.mark.parametrize("recursive", [True, False])
def test_snapshots(recursive: bool) -> None:
    """Promise 9: read-only snapshots are not copied a thousand times, and are named in one line."""
    snapshots = [Subvolume(300 + n, f"/s/{n}", f"u{n}", "uuid of /", True) for n in range(12)]
    chosen = choose(NESTED_TABLE, snapshots, "/m", recursive=recursive)
    assert places(chosen) == ["/m"]
    assert told(chosen) == [
        "/m/s/0 is not in the backup: it is a read-only snapshot (and 11 more); name it to have it"
    ]
    assert places(choose(NESTED_TABLE, snapshots, "/m/s/3")) == ["/m/s/3"]


def test_ours() -> None:
    """Snapshots of a run that is at work are nobody's files."""
    ours = [
        Subvolume(300, f"/.{RUN.token}/0", "u", "uuid of /", True),
        Subvolume(301, f"/.{RUN.token}-1", "v", "uuid of /", True),
    ]
    chosen = choose(NESTED_TABLE, ours, "/m", recursive=True)
    assert places(chosen) == ["/m"]
    assert told(chosen) == []


def test_exclude() -> None:
    """What is left out is so with all below it, and is said."""
    chosen = choose(NESTED_TABLE, NESTED, "/m", recursive=True, exclude=("/m/data/a",))
    assert places(chosen) == ["/m", "/m/data"]
    assert told(chosen) == []
    assert chosen.notes == ("/m/data/a and all below it is left out at your word",)


def test_gap() -> None:
    """In the frozen /m the subvolume /m/data is empty: there is no place for what lies in it."""
    said = refusal(NESTED_TABLE, NESTED, "/m", "/m/data/a")
    assert "the subvolume /m/data lies between them and is not in the set" in said
    assert places(choose(NESTED_TABLE, NESTED, "/m/data", "/m/data/a/b c", "/m/data/a")) == [
        "/m/data",
        "/m/data/a",
        "/m/data/a/b c",
    ]


def test_refused() -> None:
    """What makes no sense is refused, with what to do instead."""
    assert "it is a directory or file in /m (name /m;" in refusal(
        NESTED_TABLE, NESTED, "/m", exclude=("/m/file",)
    )
    assert "already included by /m" in refusal(NESTED_TABLE, NESTED, "/m", "/m/file")
    assert "already included by /m/a" in refusal(NESTED_TABLE, NESTED, "/m/a/b", "/m/a")
    assert "is given twice" in refusal(NESTED_TABLE, NESTED, "/m", "/m/")
    assert "both named and left out" in refusal(NESTED_TABLE, NESTED, "/m/data", exclude=("/m",))
    said = refusal(NESTED_TABLE, NESTED, "/m", "/m/data", recursive=True)
    assert "already included by /m" in said
    readonly = table(("/", "/m"), super_options="ro,space_cache")
    assert "mounted read-only" in refusal(readonly, NESTED, "/m")
    lines = [subvolume("/a\nb")]
    assert "has a newline in it" in refusal(NESTED_TABLE, lines, "/m/a\nb")
    assert told(choose(NESTED_TABLE, lines, "/m", recursive=True)) == [
        r"'/m/a\nb' is not in the backup: its name has a newline in it"
    ]
    odd = [subvolume("/\udcff")]
    assert "is not UTF-8" in refusal(NESTED_TABLE, odd, "/m/\udcff")
    assert told(choose(NESTED_TABLE, odd, "/m", recursive=True)) == [
        "'/m/\\udcff' is not in the backup: its name is not UTF-8"
    ]


def plan_of(chosen: Selection, *names: str, **options: Any) -> Plan:
    return assemble(Request(names), chosen, pools=(), run=RUN, client=CLIENT, **options)


def test_part() -> None:
    """A path inside a subvolume stands for it: all of it is frozen, the client reads the path."""
    names = ("/m/data/x/y", "/m/data/z", "/m/data/a")
    chosen = choose(NESTED_TABLE, NESTED, *names)
    assert places(chosen) == ["/m/data", "/m/data/a"]
    assert chosen.asked == names
    assert told(chosen) == [
        "/m/data/a/b c is not in the backup: it is a subvolume of its own; name it as well, "
        "or use -r"
    ]
    made = plan_of(chosen, *names, live_paths=("/m/data/x/y/cache", "/m/data/cache"))
    assert made.targets == ("/m/data/a", "/m/data/x/y", "/m/data/z")
    assert made.live_paths == ("/m/data/cache", "/m/data/x/y/cache")
    assert made.excludes == ("/m/data/x/y/cache",)
    assert tops(made) == ("/m/data",)
    assert is_frozen(made, "/m/data/other")
    whole = plan_of(choose(NESTED_TABLE, NESTED, "/m/data", "/m/data/a"), "/m/data", "/m/data/a")
    assert made.job != whole.job


@pytest.mark.parametrize(
    "names",
    [
        ("/m/home/ann", "/top/@home/bob"),
        ("/top/@home/bob", "/m/home/ann"),
        ("/m/home", "/top/@home"),
        ("/top/@home", "/m/home/ann"),
    ],
)
def test_two_places(names: tuple[str, str]) -> None:
    """Promise 7: of what is named at two places of a subvolume one would be left out in silence."""
    mounts = table(("/@", "/m"), ("/@home", "/m/home"), ("/", "/top"))
    said = refusal(mounts, FLAT, *names)
    assert f"{names[1]} is on the same volume as {names[0]}, by another mount" in said
    assert choose(mounts, FLAT, "/m/home/ann", "/m/home/bob").parts
    said = refusal(mounts, FLAT, "/top", "/m/home/ann", recursive=True)
    assert "/top/@home is on the same volume as /m/home/ann, by another mount" in said
    both = choose(mounts, FLAT, "/top", "/m/home", recursive=True)
    assert places(both) == ["/m/home", "/top", "/top/@"]
    assert told(both)[0].startswith("/top/@home is not in the backup: it is the subvolume at /m/")
    without = choose(mounts, FLAT, "/top", "/m/home/ann", recursive=True, exclude=("/top/@home",))
    assert places(without) == ["/m/home", "/top", "/top/@"]


def test_needed_elsewhere() -> None:
    """Below a mount, or a subvolume, that is not in the set, the whole of that is brought back."""
    mounts = table(("/", "/m"), ("/@usb", "/m/data/usb"), ("/@x", "/m/data/usb/x"))
    needed = ("/m/data/usb/x/cache", "/m/data/usb/repo", "/m/data/a/b c/repo", "/m/file")
    made = plan_of(choose(mounts, NESTED, "/m/data"), "/m/data", live_paths=needed)
    assert made.live_paths == made.excludes == ("/m/data/a", "/m/data/usb")
    some = choose(mounts, NESTED, "/m/data", "/m/data/a")
    made = plan_of(some, "/m/data", "/m/data/a", live_paths=needed)
    assert made.live_paths == ("/m/data/a/b c", "/m/data/usb")
    every = choose(mounts, NESTED, "/m/data", recursive=True)
    made = plan_of(every, "/m/data", live_paths=needed)
    assert made.live_paths == ("/m/data/a/b c/repo", "/m/data/usb")
    without = choose(mounts, NESTED, "/m/data", recursive=True, exclude=("/m/data/a",))
    made = plan_of(without, "/m/data", live_paths=needed)
    assert made.live_paths == made.excludes == ("/m/data/a", "/m/data/usb")


def test_recursive_part() -> None:
    """-r takes what lies below the path, and names nothing of what lies beside it."""
    chosen = choose(NESTED_TABLE, [*NESTED, subvolume("/data/x/deep")], "/m/data/x", recursive=True)
    assert places(chosen) == ["/m/data", "/m/data/x/deep"]
    assert told(chosen) == []
    assert plan_of(chosen, "/m/data/x").targets == ("/m/data/x",)


def test_part_that_is_needed() -> None:
    """A volume of which a part was named is not left out in silence."""
    chosen = choose(NESTED_TABLE, NESTED, "/m/data/x")
    with pytest.raises(UserError, match="the client needs /m/data as it"):
        plan_of(chosen, "/m/data/x", live_paths=("/m/data",))


def test_plan() -> None:
    """Promise 1: the intent names everything: file system, directory, snapshots, sources."""
    chosen = choose(NESTED_TABLE, NESTED, "/m/data", "/m", exclude=())
    made = assemble(Request(("/m/data", "/m")), chosen, pools=(), run=RUN, client=CLIENT)
    assert made.label == "/m/data, /m"
    take, mounts = intents(made)
    assert isinstance(take, TakeSnapshots)
    assert isinstance(mounts, MountVolumes)
    assert (take.pool, take.pool_guid, take.volume_kind) == (UUID, UUID, "btrfs")
    # The top level first, beside the directory: else it would have the directory in it.
    assert take.snapshots == (f"{UUID}:/.{RUN.token}-0", f"{UUID}:/.{RUN.token}/1")
    assert [(s.id, s.uuid, s.path) for s in take.sources] == [
        (5, "uuid of /", "/"),
        (261, "uuid of /data", "/data"),
    ]
    assert [m.volume_kind for m in mounts.mounts] == ["btrfs", "btrfs"]
    assert take.compensation().volume_kind == "btrfs"


@pytest.mark.parametrize(
    ("path", "run", "directory"),
    [
        (f"/.{RUN.token}/0", RUN, f".{RUN.token}"),
        (f"/.{RUN.token}-12", RUN, ""),
        (f"/{RUN.token}/0", None, RUN.token),
        (f"/.{RUN.token}/0/x", None, f".{RUN.token}/0"),
        (f"/.{RUN.token}", None, ""),
        (f"/a/.{RUN.token}/0", None, f"a/.{RUN.token}"),
        ("/.atomtx-0123/0", None, ".atomtx-0123"),
    ],
)
def test_names(path: str, run: RunId | None, directory: str) -> None:
    """Promise 2: a path is a run's only as a whole, with its whole token."""
    made = BtrfsSnapshot(UUID, path)
    assert BtrfsSnapshot.parse(str(made)) == made
    assert (made.run, made.directory) == (run, directory)
    assert mounted_as(str(made)) == path


def kept_as(volume: str, *, name: str = "n 1", transient: bool = False) -> BtrfsSnapshot:
    return BtrfsSnapshot.to_keep(UUID, RUN, 3, name=name, volume=volume, transient=transient)


@pytest.mark.parametrize(
    "volume", ["/", "/home", "/srv/a, b", "/new\nline", "/x" * 300, "/ä" * 300]
)
@pytest.mark.parametrize("transient", [False, True])
def test_kept_names(volume: str, transient: bool) -> None:
    """Promise 2: a kept snapshot's path tells its run, its name, and where it was taken."""
    made = kept_as(volume, transient=transient)
    assert BtrfsSnapshot.parse(str(made)) == made
    assert (made.run, made.keeper, made.name, made.is_transient) == (None, RUN, "n 1", transient)
    assert made.taken_as.run == RUN
    assert (made.taken_as.keeper, made.taken_as.taken_as) == (None, made.taken_as)
    assert made.taken_as.directory == f".{RUN.token}"
    leaf = made.path.rpartition("/")[2]
    assert made.taken_as.path.rpartition("/")[2] == leaf
    assert len(leaf.encode()) <= 255
    assert leaf.isprintable()
    assert kept_name(str(made)) == "n 1"


def test_kept_name_too_long() -> None:
    with pytest.raises(UserError, match="too long for a directory"):
        kept_as("/", name="n" * 239)
    assert kept_as("/", name="n" * 238)


@pytest.mark.parametrize(
    "path",
    [
        f"/{RUN.token}",
        f"/atomtx-kept-{RUN}/0",  # of `atomtx backup --keep-snapshots`
        f"/atomtx-kept/{RUN}/0",
        f"/atomtx-kept/.{RUN}/0",
        f"/atomtx-kept/n.{RUN}",
        f"/atomtx-kept/n.{RUN}/x",
        f"/atomtx-kept/n.{RUN}/0/x",
        f"/atomtx-kept/n.{RUN}0/0",
        f"/a/atomtx-kept/n.{RUN}/0",
        "/atomtx-kept/n.0123/0",
    ],
)
def test_not_kept(path: str) -> None:
    """Promise 2: what is only like a kept one is nobody's."""
    made = BtrfsSnapshot(UUID, path)
    assert (made.keeper, made.name, made.is_ours, made.taken_as) == (None, "", False, made)
    assert not made.is_transient


def test_none_of_ours() -> None:
    """-r neither takes nor tells of what runs have taken, for themselves or to stay."""
    ours = [kept_as("/m").path, kept_as("/m", transient=True).path, kept_as("/m").taken_as.path]
    snapshots = [subvolume(path, is_readonly=True, parent_uuid="uuid of /") for path in ours]
    chosen = choose(table(("/", "/m")), [*snapshots, subvolume("/x")], "/m", recursive=True)
    assert (places(chosen), told(chosen)) == (["/m", "/m/x"], [])


def wanted_of(*names: str, top: str = "uuid of /", **options: Any) -> tuple[list[str], list[str]]:
    """Return what `atomtx snap` would take, and what it tells."""
    subvolumes = (
        subvolume("/", uuid=top),
        *map(subvolume, ("/a", "/a/b", "/a/b/c")),
        subvolume("/s", is_readonly=True, parent_uuid="uuid of /a"),
    )
    there = Filesystem(UUID, DEVICE, 7, subvolumes)
    request = Request(names, **options)
    facts, notes = wanted.chosen_subvolumes(request, [there], table(("/", "/m")))
    return [each.name for each in facts], list(notes)


def test_to_stay() -> None:
    """What stays is shown to nobody, so that any set can be taken."""
    assert wanted_of("/m/a", "/m/a/b/c") == (["/m/a", "/m/a/b/c"], [])
    why = "/m/s is left out: it is a read-only snapshot; name it to have it"
    assert wanted_of("/m", recursive=True, exclude=("/m/a/b",)) == (["/m", "/m/a"], [why])


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["/m/a/x/y"], {}, "is a directory in the subvolume /m/a"),
        (["/m/a/b/x"], {}, "is a directory in the subvolume /m/a/b"),
        (["/m"], {"top": ""}, "/m has no UUID"),
        (["/m/a"], {"exclude": ("/m/x",)}, "is not a subvolume"),
    ],
)
def test_not_to_stay(names: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wanted_of(*names, **options)


@pytest.mark.parametrize("text", ["tank/a@x", "/a", f"{UUID}", f"{UUID}:x", f"x{UUID}:/a"])
def test_other_names(text: str) -> None:
    """What is no snapshot of btrfs is not read as one, and is mounted as what it is."""
    with pytest.raises(ValueError, match="not a snapshot"):
        BtrfsSnapshot.parse(text)
    assert mounted_as(text) == text

"""Which btrfs subvolumes a request means, where each is seen, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from atomtx.errors import UserError
from atomtx.intents import MountVolumes, TakeSnapshots
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.names import BtrfsSnapshot, RunId, mounted_as
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


@pytest.mark.parametrize("text", ["tank/a@x", "/a", f"{UUID}", f"{UUID}:x", f"x{UUID}:/a"])
def test_other_names(text: str) -> None:
    """What is no snapshot of btrfs is not read as one, and is mounted as what it is."""
    with pytest.raises(ValueError, match="not a snapshot"):
        BtrfsSnapshot.parse(text)
    assert mounted_as(text) == text

"""Which logical volumes a request means, on machines that are only described."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atomtx import directories, words
from atomtx.errors import UserError
from atomtx.logical import Logicals
from atomtx.lvmio import Volume
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.names import RunId
from atomtx.plan import (
    ClientPlan,
    DirectoryFacts,
    LogicalFacts,
    Pool,
    Request,
    Selection,
    assemble,
    from_json,
    intents,
    to_json,
)
from atomtx.selection import select

GIB, MIB = 1 << 30, 1 << 20
RUN = RunId("0123456789abcdef")
CLIENT = ClientPlan("command", ("true",), (), "/", "", None, (), ())


def volume(path: str, minor: int, **values: Any) -> Volume:
    """Make an active linear volume of 1 GiB in a group with 1 GiB free."""
    group, name = path.split("/")
    made: dict[str, Any] = {
        "group": group,
        "group_uuid": f"uuid of {group}",
        "group_free": GIB,
        "extent": 4 * MIB,
        "name": name,
        "uuid": f"uuid of {path}",
        "tags": frozenset(),
        "attributes": "-wi-ao----",
        "size": GIB,
        "created_s": 0,
        "origin": "",
        "origin_uuid": "",
        "pool": "",
        "is_invalid": False,
        "device": f"254:{minor}",
    }
    return Volume(**made | values)


THERE = [
    volume("data/home", 1),
    volume("data/web-site", 2),
    volume("data/thin", 3, pool="pool", attributes="Vwi-aotz--"),
    volume("data/pool", 4, attributes="twi-aotz--"),
    volume("data/snap", 5, attributes="sri-a-s---", origin="home"),
    volume("data/off", 6, device=""),
    volume("data/btr", 7, btrfs="/btr"),
    volume("data/fat", 8),
]


def table(*mounts: tuple[str, str, str], root: str = "/", options: str = "rw") -> Table:
    """Make the table after (device, fstype, mountpoint) are mounted on a machine on ext4."""
    entries = [Entry(1, 0, "8:1", "/", "/", "rw", (), "ext4", "/dev/sda1", "rw")]
    for n, (device, fstype, at) in enumerate(mounts, start=2):
        below = Table(entries).containing(at)
        assert below
        source = f"/dev/mapper/x-{device}"
        entries.append(Entry(n, below.id, device, root, at, "rw", (), fstype, source, options))
    return Table(entries)


MOUNTS = table(
    ("254:1", "xfs", "/home"),
    ("254:2", "ext4", "/srv/web"),
    ("254:3", "ext4", "/home/thin"),
    ("0:40", "btrfs", "/btr"),  # as the kernel numbers them all
    ("254:8", "vfat", "/fat"),
)


def choose(*names: str, mounts: Table = MOUNTS, **options: Any) -> Selection:
    return select(Request(names, **options), (), (), mounts, (), THERE)


def described(path: str, entry: Entry) -> DirectoryFacts:
    return DirectoryFacts(path, f"guid {path}", entry.dev, entry.fstype, entry.source)


def refusal(*names: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        choose(*names, **options)
    return str(caught.value)


def facts(selection: Selection) -> list[LogicalFacts]:
    found = [volume.facts for volume in selection.volumes]
    assert all(isinstance(each, LogicalFacts) for each in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["data/home", "/home", "/home/"])
def test_named(name: str) -> None:
    """A volume is the same by its name and by its mountpoint, and is called by its name."""
    chosen = choose(name)
    (one,) = facts(chosen)
    assert chosen.asked == ("data/home",)
    assert chosen.volumes[0].mountpoint == "/home"
    assert (one.name, one.guid, one.origin.fstype) == ("data/home", "uuid of data/home", "xfs")
    assert [str(left) for left in chosen.uncovered] == [
        "/home/thin is not in the backup: it is another file system (ext4, /dev/mapper/x-254:3)"
    ]


def test_together() -> None:
    """Parents come first, whatever the order of the words; a nested one is not reported."""
    chosen = choose("data/thin", "/home")
    assert [v.mountpoint for v in chosen.volumes] == ["/home", "/home/thin"]
    assert chosen.asked == ("data/thin", "data/home")
    assert chosen.uncovered == ()


def test_part() -> None:
    """A directory inside is backed up alone, from a snapshot of its volume."""
    chosen = choose("/srv/web/a", "/srv/web/b")
    assert [v.mountpoint for v in chosen.volumes] == ["/srv/web"]
    assert chosen.parts == ("/srv/web/a", "/srv/web/b")
    made = assemble(Request(("/srv/web/a",)), chosen, pools=(), run=RUN, client=CLIENT)
    assert made.targets == ("/srv/web/a", "/srv/web/b")
    assert made.named == ("/srv/web",)
    assert "already included by data/web-site" in refusal("/srv/web/a", "data/web-site")
    assert "already included by /srv/web/a" in refusal("/srv/web/a/x", "/srv/web/a")


@pytest.mark.parametrize(
    "names",
    [
        ("/home/ann", "/mnt/all/bob"),
        ("/mnt/all/bob", "/home"),
        ("/home", "/mnt/all/bob"),
        ("/mnt/all/bob", "data/home"),
    ],
)
def test_two_places(names: tuple[str, str]) -> None:
    """Promise 7: a volume is shown to the client at one place, so it is named through one mount."""
    mounts = table(("254:1", "xfs", "/home"), ("254:1", "xfs", "/mnt/all"))
    said = refusal(*names, mounts=mounts)
    assert f"{names[1]} is on the same volume as {names[0]}, by another mount" in said
    assert choose("/mnt/all/ann", "/mnt/all/bob", mounts=mounts).parts


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("data/pool", "data/pool cannot be backed up: it is a thin pool"),
        ("data/snap", "data/snap cannot be backed up: it is a snapshot"),
        ("data/off", "data/off cannot be backed up: it is not mounted"),
        ("data/none", "there is no logical volume data/none"),
        (
            "data/btr",
            "data/btr holds a btrfs, which atomtx snapshots itself (name it by its path: /btr)",
        ),
        ("data/fat", "its file system is vfat"),
        ("/fat", "its file system is vfat"),
    ],
)
def test_refused(name: str, why: str) -> None:
    """What is named and cannot be snapshotted is refused in one line, which says why."""
    assert why in refusal(name)


def test_twice() -> None:
    """A volume is named once, however."""
    assert "data/home is given twice" in refusal("data/home", "/home")


@pytest.mark.parametrize(
    ("at", "cow_size", "offered"),
    [
        ("/home", "1G", "the logical volume data/home"),
        ("/home", "2G", ""),  # no room in the group
        ("/home/thin", "2G", "the logical volume data/thin"),  # which needs none
        ("/fat", "1G", ""),
        ("/btr", "1G", ""),  # as btrfs it can be
        ("/", "1G", ""),
    ],
)
def test_offered(at: str, cow_size: str, offered: str) -> None:
    """What a snapshot can be taken of is not read live; what none can be taken of, can be."""
    entry = MOUNTS.topmost(at)
    assert entry
    assert Logicals(THERE, MOUNTS, cow_size).offers(entry) == offered


def test_not_read_live() -> None:
    """A directory on a logical volume is refused as one on ZFS is."""
    request = Request((), live=("/home/ann",))
    offers = Logicals(THERE, MOUNTS).offers
    with pytest.raises(UserError, match="is on the logical volume data/home, of which a snapshot"):
        directories.select(request, MOUNTS, described, offers)


@pytest.mark.parametrize("name", ["data/home", "/home", "/home/ann"])
def test_beside_live(name: str) -> None:
    """What -r finds below a live directory and was named as well is frozen, and there once."""
    request = Request((name,), live=("/",), recursive=True)
    live = directories.select(request, MOUNTS, described, Logicals(THERE, MOUNTS).offers)
    chosen = select(request, (), (), MOUNTS, (), THERE, live)
    kinds = {volume.mountpoint: type(volume.facts) for volume in chosen.volumes}
    assert len(kinds) == len(chosen.volumes)
    assert kinds == {
        "/": DirectoryFacts,
        "/fat": DirectoryFacts,
        "/home": LogicalFacts,
        "/home/thin": DirectoryFacts,
        "/srv/web": DirectoryFacts,
    }


def test_mounted_in_part() -> None:
    """A bind mount of a directory of it, or an XFS with its log elsewhere, is refused."""
    bind = table(("254:1", "xfs", "/home"), root="/a")
    assert "only /a of it is mounted at /home" in refusal("/home", mounts=bind)
    assert "it is not mounted" in refusal("data/home", mounts=bind)
    log = table(("254:1", "xfs", "/home"), options="rw,logdev=/dev/sdb1,noquota")
    assert "more than one device" in refusal("/home", mounts=log)


@pytest.mark.parametrize(
    ("path", "why"), [("/\udcff", "is not UTF-8"), ("/a\nb", "has a newline in it")]
)
def test_unfit_name(path: str, why: str) -> None:
    """A mountpoint, or a part, that the journal could not hold is refused."""
    mounts = table(("254:1", "xfs", path))
    assert f"the name of its mountpoint {path!a} {why}" in refusal("data/home", mounts=mounts)
    assert f"the name of {'/home' + path!a} {why}" in refusal("/home" + path)


def test_dataset_of_the_same_name() -> None:
    """A name that may mean a dataset is not guessed at; another name in a pool is the pool's."""
    zfs = Entry(9, 1, "0:40", "/", "/z", "rw", (), "zfs", "data/home", "rw")
    mounts = Table([*MOUNTS, zfs])
    assert "is a logical volume and a dataset" in refusal("data/home", mounts=mounts)
    assert "pool data is not imported" in refusal("data/none", mounts=mounts)


@pytest.mark.parametrize(
    ("size", "room"), [("20%", 52 * 4 * MIB), ("1%", 12 * MIB), ("5M", 8 * MIB), ("100%", GIB)]
)
def test_room(size: str, room: int) -> None:
    """The room of a classic snapshot is a share of its origin, or so many bytes, in extents."""
    (one,) = facts(choose("data/home", cow_size=size))
    assert one.origin.cow_bytes == room


def test_no_room() -> None:
    """What a group has too little room for is refused before anything is changed, but thin ones."""
    said = refusal("data/home", "data/web-site", cow_size="60%")
    assert "the volume group data has 1.0 GiB free, and its snapshots need 1.2 GiB" in said
    assert "--cow-size" in said
    assert facts(choose("data/thin", cow_size="200%"))[0].origin.cow_bytes == 0


def test_sizes() -> None:
    """Sizes are powers of 1024, as LVM's own."""
    assert (words.bytes_of("512M"), words.bytes_of("2T")) == (512 * MIB, 2 << 40)
    for text in ("0M", "5", "5MB", "-1G", "20%"):
        with pytest.raises(UserError):
            words.bytes_of(text)


def test_plan() -> None:
    """A plan is stored and read back whole, and its intents as well."""
    made = assemble(
        Request(("data/home", "data/thin")),
        choose("data/home", "data/thin"),
        pools=[Pool("tank", "1", "ONLINE")],
        run=RUN,
        client=CLIENT,
    )
    assert from_json(to_json(made)) == made
    pools = [volume.origin.pool for volume in made.volumes if volume.origin]
    assert pools == ["", "pool"]
    older = json.loads(to_json(made))
    for one in older["volumes"]:
        del one["origin"]["pool"]
    assert [v.origin and v.origin.pool for v in from_json(json.dumps(older)).volumes] == ["", ""]
    take, mount = intents(made)
    assert (
        take.describe()
        == "snapshot 2 logical volumes of the volume group data, one after the other"
    )
    undo = take.compensation()
    assert undo
    assert undo.describe() == "destroy 2 snapshots of the volume group data"
    from atomtx.intents import from_json as read

    for step in (take, undo, mount):
        assert read(step.kind, step.to_json()) == step
    assert [v.snapshot for v in made.volumes] == [f"data/atomtx-{RUN}-{n}" for n in (0, 1)]

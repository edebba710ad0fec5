"""Which datasets a request means, what it leaves out, and what is refused before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from atomtx.errors import UserError
from atomtx.mounts.mountinfo import Entry, Table
from atomtx.plan import DatasetFacts, Pool, Request, Selection
from atomtx.selection import select

POOLS = (Pool("tank", "11", "ONLINE"), Pool("zroot", "22", "DEGRADED"))


def dataset(name: str, mountpoint: str | None = None, **facts: Any) -> DatasetFacts:
    """Make a dataset, mounted by default at its own name."""
    values: dict[str, Any] = {
        "type": "filesystem",
        "guid": f"guid of {name}",
        "mountpoint": f"/{name}" if mountpoint is None else mountpoint,
        "canmount": "on",
        "mounted": True,
        "keystatus": "-",
    }
    return DatasetFacts(name=name, **values | facts)


def mount(source: str, at: str, fstype: str = "zfs", root: str = "/") -> tuple[str, ...]:
    return (source, at, fstype, root)


def table(*mounts: tuple[str, ...]) -> Table:
    """Make the table that the kernel has after *mounts* are made one after another."""
    entries: list[Entry] = []
    for n, (source, at, fstype, root) in enumerate((mount("/dev/sda1", "/", "ext4"), *mounts)):
        below = Table(entries).containing(at)
        parent = below.id if below else 0
        entries.append(Entry(n + 1, parent, "0:1", root, at, "rw", (), fstype, source, "rw"))
    return Table(entries)


def choose(
    request: Request, datasets: Sequence[DatasetFacts], *mounts: tuple[str, ...]
) -> Selection:
    """Select; without *mounts* every dataset that says so is mounted where its property says."""
    default = [mount(facts.name, facts.mountpoint) for facts in datasets if facts.mounted]
    return select(request, datasets, POOLS, table(*(mounts or default)))


def names(selection: Selection) -> list[str]:
    return [facts.name for facts, _ in selection.volumes]


def refusal(
    request: Request, datasets: Sequence[DatasetFacts], *mounts: tuple[str, ...]
) -> tuple[str, str]:
    """Return the message and the hint with which a request is refused."""
    with pytest.raises(UserError) as caught:
        choose(request, datasets, *mounts)
    return caught.value.message, caught.value.hint or ""


HOME = dataset("tank/home")
BOB = dataset("tank/home/bob")
SRC = dataset("tank/src")
ZVOL = dataset("tank/home/vol", "-", type="volume", canmount="-", mounted=False)
LOCKED = dataset("tank/home/locked", mounted=False, keystatus="unavailable")
LEGACY = dataset("tank/home/legacy", "legacy", mounted=False)
NOAUTO = dataset("tank/home/noauto", canmount="noauto", mounted=False)
UNMOUNTED = dataset("tank/home/idle", mounted=False)
NONE = dataset("tank/home/none", "none", mounted=False)
OFF = dataset("tank/home/off", canmount="off", mounted=False)
UNFIT = {
    ZVOL: ("is a volume (zvol)", "zfs send"),
    LOCKED: ("its key is not loaded", "`zfs mount -l tank/home/locked`"),
    LEGACY: ("not mounted (mountpoint=legacy)", "`mount -t zfs tank/home/legacy /PATH`"),
    NOAUTO: ("not mounted (canmount=noauto)", "`zfs mount tank/home/noauto`"),
    UNMOUNTED: ("it is not mounted", "`zfs mount tank/home/idle`"),
    NONE: ("never mounted (mountpoint=none)", "`zfs set mountpoint=/PATH tank/home/none`"),
    OFF: ("never mounted (canmount=off)", "`zfs set canmount=on tank/home/off`"),
}


# -- what is taken -----------------------------------------------------------------------------


def test_named() -> None:
    """The datasets that are named are taken, and they alone."""
    selection = choose(Request(("tank/src", "tank/home")), [HOME, SRC, dataset("tank/x")])
    assert selection.volumes == ((HOME, "/tank/home"), (SRC, "/tank/src"))
    assert selection.asked == ("tank/src", "tank/home")
    assert (selection.skipped, selection.uncovered, selection.notes) == ((), (), ())


def test_recursive() -> None:
    """With -r all below is taken, and nothing whose name only begins alike."""
    datasets = [HOME, BOB, dataset("tank/home/bob/x"), dataset("tank/home2")]
    selection = choose(Request(("tank/home",), recursive=True), datasets)
    assert names(selection) == ["tank/home", "tank/home/bob", "tank/home/bob/x"]


def test_all() -> None:
    """With -a every mounted dataset of every imported pool is taken."""
    datasets = [dataset("zroot", "/z"), HOME, SRC, UNMOUNTED]
    assert names(choose(Request((), all=True), datasets)) == ["tank/home", "tank/src", "zroot"]


def test_mount_order() -> None:
    """Parents are mounted before children, by mountpoint and not by name."""
    datasets = [dataset("tank/a", "/x/y"), dataset("tank/b", "/x"), dataset("tank/c", "/x y")]
    selection = choose(Request((), all=True), datasets, *_parents_first(datasets))
    assert [at for _, at in selection.volumes] == ["/x", "/x/y", "/x y"]


def _parents_first(datasets: Sequence[DatasetFacts]) -> list[tuple[str, ...]]:
    return sorted((mount(f.name, f.mountpoint) for f in datasets), key=lambda m: m[1])


def test_root_dataset() -> None:
    """The root of the machine can be a volume like another."""
    datasets = [dataset("zroot/ROOT/default", "/"), dataset("zroot/home", "/home")]
    selection = select(
        Request((), all=True),
        datasets,
        POOLS,
        Table(
            [
                Entry(1, 0, "0:1", "/", "/", "rw", (), "zfs", "zroot/ROOT/default", "rw"),
                Entry(2, 1, "0:2", "/", "/home", "rw", (), "zfs", "zroot/home", "rw"),
                Entry(3, 1, "0:3", "/", "/proc", "rw", (), "proc", "proc", "rw"),
                Entry(4, 1, "0:4", "/", "/tmp", "rw", (), "tmpfs", "tmpfs", "rw"),
            ]
        ),
    )
    assert [at for _, at in selection.volumes] == ["/", "/home"]
    assert [left.name for left in selection.uncovered] == ["/tmp"]


@pytest.mark.parametrize("property_", ["legacy", "/elsewhere", "none"])
def test_mountpoint_is_the_mount_tables(property_: str) -> None:
    """Where a dataset is mounted is asked of the kernel: legacy and temporary mounts count."""
    facts = dataset("tank/home", property_)
    selection = choose(Request(("tank/home",)), [facts], mount("tank/home", "/mnt"))
    assert selection.volumes == ((facts, "/mnt"),)


@pytest.mark.parametrize(
    ("asked", "property_", "expected"),
    [
        ("tank/home", "/b", "/b"),
        ("tank/home", "legacy", "/a"),
        ("/c", "/b", "/c"),
    ],
)
def test_mounted_at_several_places(asked: str, property_: str, expected: str) -> None:
    """Of several mountpoints the typed one, the property's or the first is used, and said."""
    places = [mount("tank/home", at) for at in ("/a", "/b", "/c")]
    selection = choose(Request((asked,)), [dataset("tank/home", property_)], *places)
    assert [at for _, at in selection.volumes] == [expected]
    others = ", ".join(at for at in ("/a", "/b", "/c") if at != expected)
    assert selection.notes == (f"tank/home is backed up as {expected}; also mounted at {others}",)


@pytest.mark.parametrize("path", ["/tank/home", "/tank/home/", "//tank/./home"])
def test_named_by_path(path: str) -> None:
    """A mountpoint names the dataset that is mounted there."""
    selection = choose(Request((path,)), [HOME, BOB])
    assert (names(selection), selection.asked) == (["tank/home"], ("tank/home",))


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("/tank/home/x", "it is inside tank/home, mounted at /tank/home", "name tank/home"),
        ("/etc", "/etc is on none of ZFS, btrfs and LVM, but on ext4 at /", "zfs list"),
        ("/snap", "is in the mounted snapshot tank/home@old", "name the dataset"),
        ("/bind", "it is inside tank/home, mounted at /bind", "name tank/home"),
        ("/other", "pool other is not imported", "`zpool import other`"),
    ],
)
def test_path_that_is_no_dataset(path: str, message: str, hint: str) -> None:
    """A path that is not a dataset's mountpoint is refused with what it is instead."""
    mounts = [
        mount("tank/home", "/tank/home"),
        mount("tank/home@old", "/snap"),
        mount("tank/home", "/bind", root="/x"),
        mount("other", "/other"),
    ]
    got = refusal(Request((path,)), [HOME], *mounts)
    assert message in got[0]
    assert hint in got[1]


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message", "hint"),
    [
        (Request(()), "nothing was named", "--all"),
        (Request(("tank/home",), all=True), "--all and tank/home exclude each other", "--exclude"),
        (Request(("tank/nope",)), "there is no dataset tank/nope", "`zfs list -r tank`"),
        (Request(("usb/home",)), "pool usb is not imported", "`zpool import usb`"),
        (Request(("tank/home@x",)), "names a snapshot", "takes the snapshot itself"),
        (Request(("tank/home", "tank/home")), "tank/home is given twice", "once"),
        (Request(("tank/home", "/tank/home/")), "tank/home is given twice", "once"),
        (
            Request(("tank/home/bob", "tank/home"), recursive=True),
            "tank/home/bob is already included by tank/home with -r",
            "leave out tank/home/bob",
        ),
        (Request((), all=True, exclude=("tank/nope",)), "there is no dataset tank/nope", ""),
        (Request(("tank/home",), exclude=("tank/home",)), "both named and left out", ""),
        (Request(("tank/home/bob",), exclude=("tank/home",)), "both named and left out", ""),
        (Request(("tank/home",), root="/r"), "of no use without a tree", "--layout tree"),
        (Request(("tank/home",), whole_root=True), "--whole-root is of no use", "--layout tree"),
        (Request(("tank/home",), leave_dirs=True), "--leave-dirs is of no use", "--layout tree"),
        (Request(("tank/home",), layout="tree"), "must be an absolute path", "--root"),
        (Request(("tank/home",), layout="tree", root="r"), "must be an absolute path", "--root"),
        (Request(("tank/home",), layout="tree", root="//"), "must be an absolute path", "--root"),
        (
            Request(("tank/home",), layout="tree", root="/tank/home/../home/r"),
            "the root of the tree /tank/home/r is inside tank/home",
            "outside",
        ),
    ],
)
def test_request_that_makes_no_sense(request_: Request, message: str, hint: str) -> None:
    """A request that cannot be meant is refused with one line and a way out."""
    got = refusal(request_, [HOME, BOB])
    assert message in got[0]
    assert hint in got[1]
    assert "\n" not in got[0] + got[1]


def test_tree_beside_the_set() -> None:
    """A tree may be anywhere outside of the set."""
    request = Request(("tank/home",), layout="tree", root="/tank/homes")
    assert names(choose(request, [HOME])) == ["tank/home"]


@pytest.mark.parametrize("facts", UNFIT, ids=lambda facts: str(facts.name))
def test_named_and_unfit(facts: DatasetFacts) -> None:
    """Promise 7: a dataset that is named and has no files to read is an error with its remedy."""
    message, hint = refusal(Request((facts.name,)), [HOME, facts])
    reason, remedy = UNFIT[facts]
    assert message.startswith(f"{facts.name} cannot be backed up: ")
    assert reason in message
    assert remedy in hint


@pytest.mark.parametrize(
    "request_",
    [Request(("tank/home",), recursive=True), Request((), all=True)],
    ids=["-r", "-a"],
)
def test_unfit_on_the_way(request_: Request) -> None:
    """Promise 7: what -a and -r cannot take is reported, never silent."""
    selection = choose(request_, [HOME, *UNFIT])
    told = dict(selection.skipped)
    assert names(selection) == ["tank/home"]
    assert told.keys() == {facts.name for facts in UNFIT}
    assert all(reason in told[facts.name] for facts, (reason, _) in UNFIT.items())
    assert selection.uncovered == ()


HIDDEN = [mount("tank/home", "/tank/home"), mount("tmpfs", "/tank", "tmpfs")]


def test_hidden_beneath_another_mount() -> None:
    """A dataset that nobody can see is refused, and what hides it is named."""
    message, _ = refusal(Request(("tank/home",)), [HOME], *HIDDEN)
    assert "mounted at /tank/home, but hidden beneath tmpfs at /tank" in message
    selection = choose(Request((), all=True), [HOME, SRC], *HIDDEN, mount("tank/src", "/src"))
    assert [left.name for left in selection.skipped] == ["tank/home"]


def test_mounted_in_another_namespace() -> None:
    """A dataset that ZFS calls mounted and our table does not know is not called unmounted."""
    message, hint = refusal(Request(("tank/home",)), [HOME], mount("tank/src", "/src"))
    assert "not in this mount namespace" in message
    assert "outside of the container" in hint


def test_snapshot_mount_is_no_dataset() -> None:
    """A mounted snapshot, or a bind mount of a directory, does not make its dataset mounted."""
    mounts = [mount("tank/home@x", "/tank/home"), mount("tank/home", "/b", root="/dir")]
    message, _ = refusal(Request(("tank/home",)), [dataset("tank/home", mounted=False)], *mounts)
    assert "it is not mounted" in message


@pytest.mark.parametrize("facts", [{"canmount": "off"}, {"mountpoint": "none"}], ids=str)
def test_container(facts: dict[str, Any]) -> None:
    """A dataset that only holds others together is no error with -r, and not worth a line."""
    top = dataset("tank/home", mounted=False, **facts)
    for request in (Request(("tank/home",), recursive=True), Request((), all=True)):
        selection = choose(request, [top, BOB])
        assert names(selection) == ["tank/home/bob"]
        assert selection.skipped == ()
    message, hint = refusal(Request(("tank/home",)), [top, BOB])
    assert "never mounted" in message
    assert "use -r" in hint


def test_suspended_pool() -> None:
    """
    A suspended pool is refused by name; with -a it is left out as a whole, and said.

    Its datasets cannot be listed; that must not look as if they were not there.
    """
    pools = (Pool("tank", "11", "SUSPENDED"), POOLS[1])
    datasets = [dataset("zroot")]
    mounts = table(*(mount(facts.name, facts.mountpoint) for facts in (HOME, *datasets)))
    for name in ("tank/home", HOME.mountpoint):
        with pytest.raises(UserError, match=r"tank/home cannot .* its pool tank is suspended"):
            select(Request((name,)), datasets, pools, mounts)
    for left_out in ("tank", "tank/home"):
        selection = select(Request((), all=True, exclude=(left_out,)), datasets, pools, mounts)
        assert names(selection) == ["zroot"]
        assert bool(selection.skipped) is (left_out != "tank")
    selection = select(Request((), all=True), datasets, pools, mounts)
    assert names(selection) == ["zroot"]
    assert selection.skipped == (("tank", "the whole pool is suspended"),)


def test_nothing_left() -> None:
    """An empty set is an error that says why it is empty."""
    message, hint = refusal(Request((), all=True), [UNMOUNTED, LOCKED], mount("x", "/x", "ext4"))
    assert message == "there is nothing to back up"
    assert hint == "tank/home/idle: it is not mounted; and 1 more"


@pytest.mark.parametrize(
    ("path", "why"), [("/\udcff", "is not UTF-8"), ("/a\n/b", "has a newline in it")]
)
def test_mountpoint_that_is_unfit(path: str, why: str) -> None:
    """A mountpoint that the journal could not hold is refused, not met as a crash later."""
    facts = dataset("tank/home", path)
    message, _ = refusal(Request(("tank/home",)), [facts])
    assert message.isprintable()
    assert why in message


A, B, C = dataset("tank/a", "/a"), dataset("tank/a/b", "/a/b"), dataset("tank/a/b/c", "/a/b/c")


def test_gap_of_a_dataset() -> None:
    """A volume below one that is not in the set has no mountpoint in the frozen files."""
    message, hint = refusal(Request(("tank/a", "tank/a/b/c")), [A, B, C])
    assert "tank/a/b/c at /a/b/c cannot be mounted below the snapshot of tank/a" in message
    assert "tank/a/b at /a/b lies between" in message
    assert hint.startswith("add tank/a/b, leave out tank/a/b/c")


def test_gap_of_another_file_system() -> None:
    """The same holds for a file system that is not ZFS, and for -a."""
    mounts = [mount("tank/a", "/a"), mount("/dev/sdb", "/a/b", "ext4"), mount("tank/c", "/a/b/c")]
    datasets = [A, dataset("tank/c", "/a/b/c")]
    message, hint = refusal(Request((), all=True), datasets, *mounts)
    assert "the ext4 file system at /a/b lies between" in message
    assert "--exclude" in hint


def test_gap_of_a_mounted_snapshot() -> None:
    """A snapshot that is mounted in between cannot be added, and is not proposed."""
    mounts = [mount("tank/a", "/a"), mount("tank/b@x", "/a/b"), mount("tank/c", "/a/b/c")]
    _, hint = refusal(Request((), all=True), [A, dataset("tank/c", "/a/b/c")], *mounts)
    assert hint.startswith("leave out tank/c")


@pytest.mark.parametrize(
    "names_", [("tank/a", "tank/a/b", "tank/a/b/c"), ("tank/a/b", "tank/a/b/c"), ("tank/a/b/c",)]
)
def test_no_gap(names_: tuple[str, ...]) -> None:
    """A set without a hole in it is taken, wherever it begins."""
    assert names(choose(Request(names_), [A, B, C])) == list(names_)


def test_deep_mountpoint_is_no_gap() -> None:
    """Directories between two volumes are in the frozen parent."""
    datasets = [A, dataset("tank/a/deep", "/a/x/y/z")]
    assert len(names(choose(Request(("tank/a",), recursive=True), datasets))) == 2


# -- what is reported --------------------------------------------------------------------------


def test_uncovered_datasets() -> None:
    """Promise 9: a child dataset that is not in the set is named, mounted or not."""
    datasets = [HOME, BOB, dataset("tank/home/far", "/srv"), SRC, *UNFIT]
    selection = choose(Request(("tank/home",)), datasets)
    told = dict(selection.uncovered)
    assert told.keys() == {f.name for f in datasets} - {"tank/home", "tank/src"}
    assert "a dataset of its own, at /tank/home/bob; name it as well" in told["tank/home/bob"]
    assert "at /srv" in told["tank/home/far"]
    assert all(UNFIT[facts][0] in told[facts.name] for facts in UNFIT)


def test_uncovered_dataset_that_is_no_child() -> None:
    """Promise 9: a dataset of another name or pool that is mounted below is named."""
    other = dataset("zroot/x", "/tank/home/x")
    selection = choose(Request(("tank/home",)), [HOME, other])
    assert [left.name for left in selection.uncovered] == ["zroot/x"]


def test_uncovered_container() -> None:
    """A child without files of its own is not worth a line; what is in it is."""
    box = dataset("tank/home/box", canmount="off", mounted=False)
    selection = choose(Request(("tank/home",)), [HOME, box, dataset("tank/home/box/x")])
    assert [left.name for left in selection.uncovered] == ["tank/home/box/x"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (mount("srv:/x", "/tank/home/m", "nfs4"), "another file system (nfs4, srv:/x)"),
        (mount("tmpfs", "/tank/home/m", "tmpfs"), "another file system (tmpfs, tmpfs)"),
        (mount("tank/src", "/tank/home/m", root="/d"), "a bind mount of /d in tank/src"),
        (mount("tank/src@x", "/tank/home/m"), "the mounted snapshot tank/src@x"),
        (mount("tank/home", "/tank/home/m"), "a second mount of tank/home"),
        (mount("tank/new", "/tank/home/m"), "the dataset tank/new, which `zfs list` does not show"),
    ],
    ids=lambda value: value[2] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("request_", [Request(("tank/home",)), Request((), all=True)])
def test_uncovered_mounts(request_: Request, other: tuple[str, ...], reason: str) -> None:
    """Promise 9: a mount below a volume that is not in the set is named for what it is."""
    selection = choose(request_, [HOME], mount("tank/home", "/tank/home"), other)
    assert selection.uncovered == (("/tank/home/m", f"it is {reason}"),)


def test_mounts_that_are_not_below() -> None:
    """What is beside the volumes, hidden, or an automount of ZFS's own is not spoken of."""
    mounts = [
        mount("tmpfs", "/tank/home/x/hidden", "tmpfs"),
        mount("tank/home", "/tank/home"),
        mount("tmpfs", "/tank/home2", "tmpfs"),
        mount("tank/home@x", "/tank/home/.zfs/snapshot/x"),
    ]
    assert choose(Request(("tank/home",)), [HOME], *mounts).uncovered == ()


def test_name_that_cannot_be_printed() -> None:
    """A mountpoint with control characters or bytes that are not text is reported in ASCII."""
    mounts = [mount("tank/home", "/tank/home"), mount("x\x1b[2J", "/tank/home/\udcff", "ext4")]
    (left,) = choose(Request(("tank/home",)), [HOME], *mounts).uncovered
    assert str(left).isprintable()
    assert r"\udcff" in str(left)


@pytest.mark.parametrize("excluded", ["tank/home/bob", "/tank/home/bob"])
@pytest.mark.parametrize(
    "request_", [Request(("tank/home",), recursive=True), Request(("tank/home",))]
)
def test_exclude(request_: Request, excluded: str) -> None:
    """What the user leaves out is left out with all below it, and said once."""
    request = Request(request_.names, recursive=request_.recursive, exclude=(excluded,))
    selection = choose(request, [HOME, BOB, dataset("tank/home/bob/x")])
    assert names(selection) == ["tank/home"]
    assert (selection.skipped, selection.uncovered) == ((), ())
    assert selection.notes == ("tank/home/bob and all below it is left out at your word",)


def test_many_datasets() -> None:
    """A thousand datasets among two thousand mounts are sorted out in no time."""
    datasets = [HOME, *(dataset(f"tank/home/{n}") for n in range(1000))]
    rows = [Entry(1, 0, "", "/", "/", "", (), "ext4", "sda", "")]
    rows.append(Entry(2, 1, "", "/", "/tank/home", "", (), "zfs", "tank/home", ""))
    for n, facts in enumerate(datasets[1:]):
        rows.append(Entry(n + 3, 2, "", "/", facts.mountpoint, "", (), "zfs", facts.name, ""))
        rows.append(Entry(n + 3000, 2, "", "/", f"/tank/home/t{n}", "", (), "tmpfs", "t", ""))
    start = time.process_time()
    selection = select(Request(("tank/home",), recursive=True), datasets, POOLS, Table(rows))
    assert (len(selection.volumes), len(selection.uncovered)) == (1001, 1000)
    assert time.process_time() - start < 1

"""What of a backup is compared with what: decided from plain values."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from typing import Any

import pytest

from atomtx import verifying
from atomtx.errors import UserError
from atomtx.history import Backup, Run
from atomtx.integrity.compare import Kind, judge
from atomtx.integrity.entry import Entry, State, pack
from atomtx.integrity.store import Generation
from atomtx.plan import ClientPlan, Plan, PlannedVolume
from atomtx.verifying import Room

RUN = "0123456789abcdef"
AT = datetime(2026, 7, 1, tzinfo=UTC)
CLIENT = ClientPlan("restic", (), (), "/", "0.19.1", "id", (), ())


def a_plan(*targets: str, volumes: tuple[str, ...] = (), **values: Any) -> Plan:
    planned = tuple(PlannedVolume("zfs", "p", "1", v, v, v, "s") for v in volumes)
    root = values.pop("root", "")
    return Plan(RUN, "j", "l", planned, targets, "namespace", root, (), (), (), CLIENT, **values)


def a_backup(*paths: str, n: int = 0, **values: Any) -> Backup:
    row: dict[str, Any] = {"backup_id": "beef", "outcome": "completed", "reason": None}
    sizes = {"bytes_added": None, "bytes_processed": None, "files_processed": None}
    return Backup(n=n, path="\n".join(paths), **{**row, **sizes, **values})


def a_generation(number: int, path: bytes) -> Generation:
    return Generation(number, path, 0, 0, False, 0, 0, 0, 0, 0)


def a_run(**values: Any) -> Run:
    row = dict.fromkeys(Run.__dataclass_fields__)
    given = {"id": RUN, "verb": "backup", "outcome": "completed", "state": "destroyed"}
    return Run(**{**row, **given, "started_at": AT, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"verb": "snap"}, "made no backup"),
        ({"outcome": "failed", "ended_at": AT}, "it is failed"),
        ({"outcome": None, "ended_at": AT}, "it is rolled back"),
        ({"outcome": None, "state": "backing-up"}, "it is backing-up"),
    ],
)
def test_no_backup(values: dict[str, Any], words: str) -> None:
    """Only a run that has saved something can be verified."""
    verifying.check(a_run())
    verifying.check(a_run(outcome="partial"))
    with pytest.raises(UserError, match=words):
        verifying.check(a_run(**values))


def test_trees() -> None:
    """Each volume is a tree; of one of which a part was named, the part."""
    whole = a_plan("/home", "/srv/a", volumes=("/home", "/home/ann", "/srv"))
    assert verifying.trees(whole) == ("/home", "/home/ann", "/srv/a")


@pytest.mark.parametrize(
    ("path", "values", "expected"),
    [
        ("/home/ann", {}, "home/ann"),
        ("/", {}, ""),
        ("/home", {"root": "/run/tree"}, "home"),
        ("/home", {"root": "/run/tree", "whole_root": True}, "run/tree/home"),
        ("/", {"root": "/run/tree/", "whole_root": True}, "run/tree"),
    ],
)
def test_place(path: str, values: dict[str, Any], expected: str) -> None:
    """A restore has a path where it was live, below the root of a tree that was saved whole."""
    assert verifying.place(a_plan("/home", **values), path) == expected


def test_holding() -> None:
    """A path is in the backup that is nearest to it, or in none."""
    outer, inner = a_backup("/home", "/srv"), a_backup("/home/ann", n=1)
    plan = a_plan("/home", "/home/ann", "/srv")
    assert verifying.holding(plan, "/home/ann", [outer, inner]) == inner
    assert verifying.holding(plan, "/home/bob", [outer, inner]) == outer
    assert verifying.holding(plan, "/srv", [inner]) is None
    whole = a_plan("/home", root="/t", whole_root=True)
    assert verifying.holding(whole, "/home", [a_backup("/t")]) == a_backup("/t")


def test_left_out() -> None:
    """What is a tree of its own, or was left out of the backup, is not compared twice."""
    out = verifying.left_out("/home", ["/home", "/home/a/b", "/homer"], ["/home/cache", "/dev"])
    assert out == {"a/b", "cache"}
    assert verifying.left_out("/", ["/", "/home"], ["/dev"]) == {"home", "dev"}
    assert verifying.inside("/a/b/c", ["/a", "/a/b", "/a/b/c"]) == "/a/b"
    assert verifying.inside("/a", ["/a", "/b"]) is None


@pytest.mark.parametrize(
    ("path", "is_of_run"),
    [
        (f"/home/.zfs/snapshot/atomtx-{RUN}", True),
        (f"/home/.zfs/snapshot/atomtx-{RUN}/ann", True),
        (f"/mnt/.atomtx-{RUN}/0", True),
        (f"/mnt/atomtx-kept-{RUN}/0", True),
        (f"/mnt/atomtx-kept-{RUN}-0", True),
        (f"/mnt/atomtx-{RUN}-3", True),
        (f"/mnt/atomtx-{RUN}0", False),
        (f"/mnt/my-atomtx-{RUN}", False),
        ("/home/.zfs/snapshot/atomtx-fedcba9876543210", False),
        ("/home", False),
    ],
)
def test_of_run(path: str, is_of_run: bool) -> None:
    """A generation is of a run's moment where it was read from the run's snapshot alone."""
    assert verifying.is_of_run(a_generation(1, path.encode()), RUN) == is_of_run


def test_choose() -> None:
    """The newest generation of the run's snapshot counts, else the newest."""
    live = [a_generation(n, b"/home") for n in (1, 4)]
    own = [a_generation(n, f"/home/.zfs/snapshot/atomtx-{RUN}".encode()) for n in (2, 3)]
    assert verifying.choose([live[0], *own, live[1]], RUN).id == 3
    assert verifying.choose(live, RUN).id == 4


# -- what a client keeps -------------------------------------------------------------------------


def entry(kind: int, **values: Any) -> Entry:
    made = Entry(b"a", kind | 0o644, 0, 0, 0, 1_000_000_123_456_789, 0, 0)
    return made._replace(**values)


def time_of(kept: Entry | None) -> int:
    assert kept
    return kept.mtime


def test_kopia() -> None:
    """kopia keeps neither attributes nor special files, and not the times of directories."""
    keeps = verifying.keeps("kopia", onto_xfs=False)
    for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
        assert keeps.of(entry(kind)) is None
    attributed = entry(stat.S_IFREG, xattrs=pack({b"user.a": bytes(32)}))
    assert keeps.of(attributed) == attributed._replace(xattrs=None)
    assert time_of(keeps.of(entry(stat.S_IFDIR))) == 0
    # The real one restored 123456789 as 123457000 (kopia 0.23).
    assert time_of(keeps.of(entry(stat.S_IFLNK))) == 1_000_000_123_457_000
    restored = entry(stat.S_IFLNK, mtime=1_000_000_123_457_000)
    assert keeps.of(restored) == keeps.of(entry(stat.S_IFLNK))


@pytest.mark.parametrize("client", ["restic", "borg"])
def test_sockets(client: str) -> None:
    """restic and borg keep all but sockets."""
    keeps = verifying.keeps(client, onto_xfs=False)
    assert keeps.of(entry(stat.S_IFSOCK)) is None
    for kind in (stat.S_IFIFO, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFREG):
        attributed = entry(kind, xattrs=pack({b"user.a": bytes(32)}))
        assert keeps.of(attributed) == attributed


def test_xfsdump() -> None:
    """xfsrestore sets whole seconds, none of links, and attributes on XFS alone."""
    attributed = entry(stat.S_IFREG, xattrs=pack({b"user.a": bytes(32)}))
    for onto_xfs in (True, False):
        kept = verifying.keeps("xfsdump", onto_xfs=onto_xfs).of(attributed)
        assert kept
        assert (kept.mtime, bool(kept.xattrs)) == (1_000_000_000_000_000, onto_xfs)
    assert time_of(verifying.keeps("xfsdump", onto_xfs=True).of(entry(stat.S_IFLNK))) == 0


def test_strict() -> None:
    """With everything compared only XFS's second name for an access control list is left out."""
    both = {b"system.posix_acl_access": bytes(32), b"trusted.SGI_ACL_FILE": bytes(32)}
    kept = verifying.ALL.of(entry(stat.S_IFSOCK, xattrs=pack(both)))
    assert kept == entry(stat.S_IFSOCK, xattrs=pack({b"system.posix_acl_access": bytes(32)}))


def test_every_client() -> None:
    """Of every client that can restore it is known what it keeps; of `/` the root is not told."""
    from atomtx.clients import KNOWN

    for client in set(KNOWN) - {"command"}:
        assert verifying.keeps(client, onto_xfs=True).words
    assert "mode" in verifying.ignored_of_root("borg", "/")
    assert verifying.ignored_of_root("borg", "/home") == frozenset()


def test_elsewhere() -> None:
    """A directory is no change of the root of a file system that was mounted on it."""
    mounted, bare = entry(stat.S_IFDIR, uid=5, state=State.ELSEWHERE), entry(stat.S_IFDIR)
    assert [f.kind for f in judge(b"a", mounted, bare, ())] == [Kind.UNVERIFIED]
    kinds = [f.kind for f in judge(b"a", mounted, entry(stat.S_IFREG), ())]
    assert kinds == [Kind.CHANGED, Kind.UNVERIFIED]


# -- room ----------------------------------------------------------------------------------------


def test_room() -> None:
    """What is not known is no reason to refuse; what is, counts over all backups."""
    rows = [a_backup("/a", bytes_processed=5, files_processed=1), a_backup("/b", bytes_processed=6)]
    assert verifying.needed(rows) == Room(11, 1)
    assert verifying.needed([a_backup("/a")]) == Room(None, None)
    assert verifying.lacks(Room(11, 1), Room(10, 9)) == "bytes"
    assert verifying.lacks(Room(11, 1), Room(11, 0)) == "files"
    assert verifying.lacks(Room(11, 1), Room(11, None)) is None
    assert verifying.lacks(Room(None, None), Room(0, 0)) is None

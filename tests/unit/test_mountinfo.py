"""Which mount a path is on, read from the kernel's own table."""

from __future__ import annotations

import io
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.mounts import mountinfo, namespace
from atomtx.mounts.mountinfo import Entry, Table

LINE = (
    rb"64 43 0:40 /sub\040dir /tmp/z\134z rw,relatime shared:1 master:3"
    b" - zfs tank/a\\043b\\040c@x rw,xattr\n"
)


def table(*rows: tuple[int, int, str]) -> Table:
    """Make a table of (id, parent, mountpoint)."""
    return Table(
        Entry(i, parent, "0:1", "/", at, "rw", (), "zfs", f"m{i}", "rw") for i, parent, at in rows
    )


def ids(entries: tuple[Entry, ...]) -> list[int]:
    return [entry.id for entry in entries]


def test_fields() -> None:
    """Each field of a line is read, escapes and optional fields included."""
    (entry,) = mountinfo.parse(LINE)
    assert entry == Entry(
        id=64,
        parent=43,
        dev="0:40",
        root="/sub dir",
        mountpoint="/tmp/z\\z",
        options="rw,relatime",
        propagation=("shared:1", "master:3"),
        fstype="zfs",
        source="tank/a#b c@x",
        super_options="rw,xattr",
    )


def test_private_mount_with_an_empty_source() -> None:
    """A mount without optional fields and with an empty source is read."""
    (entry,) = mountinfo.parse(b"1 0 0:1 / / rw - tmpfs  rw\n")
    assert (entry.propagation, entry.source, entry.super_options) == ((), "", "rw")


def test_what_is_not_a_table() -> None:
    """Bytes that are no mountinfo are refused, not read halfway."""
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        mountinfo.parse(b"proc /proc proc rw 0 0\n")


def test_own_table() -> None:
    """The table of this process is read from /proc, and every path is on one of its mounts."""
    entry = mountinfo.containing(mountinfo.read(), "/proc/self")
    assert entry is not None
    assert (entry.mountpoint, entry.fstype) == ("/proc", "proc")


def escaped(name: bytes) -> bytes:
    """Escape as the kernel does."""
    return b"".join(b"\\%03o" % c if c in b" \t\n\\#" else bytes([c]) for c in name)


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_escapes_round_trip(name: bytes) -> None:
    """Any name that a mountpoint or a source can have is read back, byte for byte."""
    line = b"1 0 0:1 / /%s rw - zfs %s rw\n" % (escaped(name), escaped(name))
    (entry,) = mountinfo.parse(line)
    assert entry.mountpoint.encode(errors="surrogateescape") == b"/" + name
    assert entry.source.encode(errors="surrogateescape") == name


@pytest.mark.parametrize(
    ("rows", "path", "expected"),
    [
        pytest.param([(1, 0, "/")], "/", 1, id="the root itself"),
        pytest.param([(1, 0, "/")], "/a/b", 1, id="nothing mounted on the way"),
        pytest.param([(1, 0, "/"), (2, 1, "/a")], "/a", 2, id="at the mountpoint"),
        pytest.param([(1, 0, "/"), (2, 1, "/a")], "/a/b", 2, id="below the mountpoint"),
        pytest.param([(1, 0, "/"), (2, 1, "/a")], "/ab", 1, id="a name that begins alike"),
        pytest.param([(1, 0, "/"), (2, 1, "/a"), (3, 2, "/a")], "/a", 3, id="stacked"),
        pytest.param([(1, 0, "/"), (3, 2, "/a"), (2, 1, "/a")], "/a/x", 3, id="ids out of order"),
        pytest.param(
            [(1, 0, "/"), (2, 1, "/a/b"), (3, 1, "/a")], "/a/b", 3, id="parent mounted over later"
        ),
        pytest.param(
            [(1, 0, "/"), (2, 1, "/a/b"), (3, 1, "/a"), (4, 3, "/a/b")],
            "/a/b/c",
            4,
            id="and the child mounted again",
        ),
        # Measured: a mount over "/" is not seen by processes whose root is below it.
        pytest.param([(1, 0, "/"), (2, 1, "/"), (3, 1, "/a")], "/a", 3, id="over the root"),
        pytest.param([(1, 1, "/"), (2, 1, "/a")], "/a", 2, id="a root that is its own parent"),
        pytest.param([(2, 1, "/a")], "/a/b", 2, id="chroot to a plain directory"),
        pytest.param([(2, 1, "/a")], "/b", None, id="on the mount that a chroot does not show"),
        pytest.param([], "/", None, id="an empty table"),
    ],
)
def test_containing(rows: list[tuple[int, int, str]], path: str, expected: int | None) -> None:
    """A path is on the mount to which the kernel walks: from the root, down the stacks."""
    entry = mountinfo.containing(table(*rows), path)
    assert (entry and entry.id) == expected


def test_topmost() -> None:
    """At a mountpoint the last mount of a stack is seen; a hidden one is not there."""
    mounts = table((1, 0, "/"), (2, 1, "/a"), (3, 2, "/a"), (4, 1, "/b/c"), (5, 1, "/b"))
    seen = {path: mountinfo.topmost(mounts, path) for path in ("/", "/a", "/b", "/b/c", "/a/x")}
    assert {path: entry and entry.id for path, entry in seen.items()} == {
        "/": 1,
        "/a": 3,
        "/b": 5,
        "/b/c": None,
        "/a/x": None,
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that has changed while it was handed out, in parts, is read anew."""
    reads = 0

    class Parted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal reads
            reads += 1
            if reads == 1:
                first = super().read(1)  # the kernel gives a page
                namespace.mount("theirs", str(tmp_path), "tmpfs", 0)
                return first + b"0 0 0:0 / /nowhere rw - torn torn rw\n"
            return super().read(size)

    def opened(path: str, _: str) -> Parted:
        return Parted(io.FileIO(path))

    monkeypatch.setattr(mountinfo, "open", opened, raising=False)
    try:
        found = mountinfo.read()
    finally:
        namespace.unmount(str(tmp_path))
    assert reads == 2
    assert "theirs" in {entry.source for entry in found}
    assert "torn" not in {entry.source for entry in found}


def test_visible_below() -> None:
    """Below a mountpoint the seen mounts are listed, parents first, and nothing beside it."""
    mounts = table(
        (1, 0, "/"),
        (2, 1, "/a"),
        (3, 2, "/a/b/c"),
        (4, 2, "/a/b"),  # hides 3
        (5, 4, "/a/b/d"),
        (6, 1, "/a b"),
        (7, 1, "/a-b"),
    )
    assert ids(mountinfo.visible_below(mounts, "/a")) == [4, 5]
    assert ids(mountinfo.visible_below(mounts, "/a/b/d")) == []
    assert sorted(ids(mountinfo.visible_below(mounts, "/"))) == [2, 4, 5, 6, 7]


def test_many_mounts() -> None:
    """A thousand questions to a table of two thousand mounts take a fraction of a second."""
    rows = [(1, 0, "/"), *((n, 1, f"/m/{n}") for n in range(2, 2001))]
    mounts = table(*rows)
    start = time.process_time()
    for n in range(2, 1002):
        assert mountinfo.containing(mounts, f"/m/{n}/x/y") is mounts[n - 1]
        assert mountinfo.visible_below(mounts, f"/m/{n}") == ()
    assert time.process_time() - start < 1


def bind(i: int, parent: int, at: str, root: str, dev: str = "0:1") -> Entry:
    return Entry(i, parent, dev, root, at, "rw", (), "zfs", "tank/ROOT", "rw")


def test_echoes() -> None:
    """A directory mounted over itself, as in a service of systemd, is no mount of its own."""
    sandbox = Table(
        [
            bind(1, 0, "/", "/"),
            bind(2, 1, "/home/ann", "/", "0:2"),  # a dataset of its own, hidden now
            bind(3, 1, "/home", "/home"),
            bind(4, 3, "/home/ann", "/", "0:2"),  # and seen again
            bind(5, 4, "/home/ann/repo", "/repo", "0:2"),
            bind(6, 5, "/home/ann/repo/x", "/repo/x", "0:2"),
            bind(7, 1, "/mnt", "/home"),  # another directory
            bind(8, 1, "/srv", "/srv", "0:3"),  # of another file system
        ]
    )
    plain = sandbox.without_echoes()
    assert ids(plain) == [1, 2, 4, 7, 8]
    assert ids(plain.visible_below("/")) == [4, 7, 8]
    assert [entry.parent for entry in plain] == [0, 1, 1, 1, 1]


def test_no_echo_of_a_whole() -> None:
    """What a mount stacked on another one hides is not told apart, and is left."""
    stacked = Table([bind(1, 0, "/", "/"), bind(2, 1, "/", "/"), bind(3, 3, "/x", "/x")])
    assert stacked.without_echoes() == stacked
    below = Table([bind(1, 0, "/a", "/@/sub"), bind(2, 1, "/a/b", "/@/sub/b")])
    assert ids(below.without_echoes()) == [1]


def test_pinned() -> None:
    """Of the ZFS mounts that follow nobody those stay that are needed, or lie in what is live."""
    places = ["/", "/srv", "/mnt/usb", "/mnt/usb/restic", "/mnt/usb2", "/follows", "/other"]
    private = [Entry(n, 0, "0:1", "/", p, "", (), "zfs", p, "rw") for n, p in enumerate(places)]
    private[5] = replace(private[5], propagation=("master:1",))
    private[6] = replace(private[6], fstype="ext4")
    found = namespace.pinned(Table(private), ["/srv/cache", "/mnt/usb"], ["/mnt/usb"])
    assert list(found) == ["/mnt/usb2"]

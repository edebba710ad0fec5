"""The tree: mounts under one root, made where nothing is, and only ours taken away."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from atomtx.errors import EffectError, UserError
from atomtx.intents import Mount
from atomtx.mounts import tree

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


# -- before ----------------------------------------------------------------------------------


def test_directories_to_make(tmp_path: Path) -> None:
    """Each missing directory is named once, parents first; what is there is not ours to remove."""
    root = f"{tmp_path}/root"
    assert tree.directories_to_make(root, ["/usr/home", "/usr/home/ann", "/srv"]) == (
        root,
        f"{root}/srv",
        f"{root}/usr",
        f"{root}/usr/home",
        f"{root}/usr/home/ann",
    )
    (tmp_path / "root" / "usr").mkdir(parents=True)
    assert tree.directories_to_make(root, ["/usr/home"]) == (f"{root}/usr/home",)
    (tmp_path / "root" / "usr" / "home").mkdir()
    assert tree.directories_to_make(root, ["/usr/home"]) == ()


def test_directories_of_the_root_dataset(tmp_path: Path) -> None:
    """A set that holds `/` is mounted at the tree's root itself."""
    assert tree.directories_to_make(f"{tmp_path}/x", ["", "/srv"]) == (
        f"{tmp_path}/x",
        f"{tmp_path}/x/srv",
    )


def check(path: Path) -> None:
    tree.check_free([Mount("tank/a@x", str(path))])


def test_free(tmp_path: Path) -> None:
    """A place that is an empty directory, or is not there yet, is free."""
    check(tmp_path)
    check(tmp_path / "absent" / "below")


def test_files_in_the_way(tmp_path: Path) -> None:
    """Files at a mountpoint would be hidden, and taken for a part of the backup: refused."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not an empty directory"):
        check(tmp_path)
    with pytest.raises(UserError, match="is not an empty directory"):
        check(tmp_path / "file")
    with pytest.raises(UserError, match="is not an empty directory"):
        check(tmp_path / "file" / "below")


def test_link_in_the_way(tmp_path: Path) -> None:
    """
    A mountpoint behind a symbolic link is refused.

    The kernel's table has the real path: our mount would never be found, nor unmounted.
    """
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(UserError, match="leads over a symbolic link"):
            check(path)


@pytest.mark.parametrize("mountpoint", ["/proc", "/"])
def test_mount_in_the_way(mountpoint: str) -> None:
    """A place where something is mounted is not free, however empty it looks."""
    with pytest.raises(UserError, match=f"something is mounted at {mountpoint} already"):
        check(Path(mountpoint))


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """A directory that cannot be made is an error that names it, not a crash."""
    (tmp_path / "file").touch()
    with pytest.raises(EffectError, match=r"cannot make .*/file/below: Not a directory"):
        tree.make([], [f"{tmp_path}/file/below"])


def test_missing_snapshot(tmp_path: Path) -> None:
    """A mount that fails is an error that names both ends."""
    with pytest.raises(EffectError, match=f"cannot mount no/such@snapshot at {tmp_path}"):
        tree.make([Mount("no/such@snapshot", str(tmp_path))], [])


# -- real mounts -----------------------------------------------------------------------------

# In a namespace of its own, with empty file systems in the place of snapshots.
PRELUDE = """
    import os, subprocess, sys
    from atomtx.errors import EffectError, UserError
    from atomtx.intents import Mount
    from atomtx.mounts import mountinfo, namespace, tree

    namespace.enter()
    top = sys.argv[1]
    namespace.mount("scratch", top, "tmpfs", 0)
    root = top + "/root"

    def mount(each, target):
        namespace.mount(each.source, target, "tmpfs", 0)
        if each == OURS[0]:
            os.makedirs(target + "/b")  # as in the frozen parent

    def seen():
        table = mountinfo.read()
        return [(e.source, e.mountpoint[len(top):]) for e in table if e.mountpoint.startswith(root)]

    tree.mount_snapshot = mount
    OURS = [Mount("tank/a@x", root + "/a"), Mount("tank/a/b@x", root + "/a/b")]
    MADE = tree.directories_to_make(root, ["/a"])
    BOTH = [("tank/a@x", "/root/a"), ("tank/a/b@x", "/root/a/b")]
"""


def inside(tmp_path: Path, code: str) -> None:
    """Run *code* after the prelude; its assertions are the test's."""
    text = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", text, str(tmp_path)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@as_root
def test_make_and_remove(tmp_path: Path) -> None:
    """Promise 4: what is made is removed again, children first; both are idempotent."""
    inside(
        tmp_path,
        """
        for _ in range(2):
            tree.make(OURS, MADE)
            assert seen() == BOTH, seen()
        for _ in range(2):
            assert tree.remove(OURS, MADE) == []
            assert seen() == []
            assert os.listdir(top) == []
        """,
    )


@as_root
def test_chroot(tmp_path: Path) -> None:
    """In a chroot, where / is no mountpoint, no namespace can be made; why is said."""
    inside(
        tmp_path,
        """
        os.makedirs(top + "/chroot/proc")
        namespace.mount("/proc", top + "/chroot/proc", None, 0x5000)  # MS_BIND | MS_REC
        os.chroot(top + "/chroot")
        try:
            namespace.enter()
            raise AssertionError
        except EffectError as exc:
            assert exc.message.endswith("/ is no mountpoint, as in a chroot"), exc
            assert "mount --bind" in exc.hint
        """,
    )


@as_root
def test_directory_stays(tmp_path: Path) -> None:
    """One that the machine does not remove is told, and goes the next time; a filled one stays."""
    inside(
        tmp_path,
        """
        tree.make((), MADE)
        subprocess.run(["mount", "-o", "remount,ro", top], check=True)
        try:
            tree.remove((), MADE)
        except EffectError as exc:
            assert exc.message == f"cannot remove {root}/a: Read-only file system", exc
        else:
            raise AssertionError("it says that they are gone")
        subprocess.run(["mount", "-o", "remount,rw", top], check=True)
        open(root + "/file", "w").close()
        assert tree.remove((), MADE) == []
        assert os.listdir(root) == ["file"]
        os.unlink(root + "/file")
        for _ in range(2):
            assert tree.remove((), MADE) == []
            assert os.listdir(top) == []
        """,
    )


@as_root
def test_crash_halfway(tmp_path: Path) -> None:
    """Promise 5: whatever part of the tree was made, it is completed, or removed."""
    inside(
        tmp_path,
        """
        os.mkdir(root)
        assert tree.remove(OURS, MADE) == []
        assert os.listdir(top) == []
        for directory in MADE:
            os.mkdir(directory)
        mount(OURS[0], OURS[0].mountpoint)
        tree.make(OURS, MADE)
        assert seen() == BOTH
        namespace.unmount(OURS[1].mountpoint)
        assert tree.remove(OURS, MADE) == []
        assert os.listdir(top) == []
        """,
    )


@as_root
def test_renamed(tmp_path: Path) -> None:
    """Ours are taken away under another dataset's name; what another run has beneath it stays."""
    inside(
        tmp_path,
        """
        ours, other = "tank/%s@atomtx-0123456789abcdef", "tank/%s@atomtx-0123456789abcde0"
        made = [Mount(ours % "a", root + "/a"), Mount(ours % "a/b", root + "/a/b")]
        os.makedirs(root + "/a")
        namespace.mount(other % "a", root + "/a", "tmpfs", 0)
        namespace.mount(ours % "new", root + "/a", "tmpfs", 0)
        os.mkdir(root + "/a/b")
        namespace.mount(ours % "new/b", root + "/a/b", "tmpfs", 0)
        assert tree.remove(made, MADE) == []
        assert seen() == [(other % "a", "/root/a")], seen()
        """,
    )


@as_root
def test_like_what_is_parked(tmp_path: Path) -> None:
    """What a run could not tell from its own, as a live directory, does not lie beneath it."""
    inside(
        tmp_path,
        """
        own = [Mount("tank/a@atomtx-0123456789abcdef", root + "/a")]
        os.makedirs(root + "/a")
        namespace.mount(own[0].source, root + "/a", "tmpfs", 0)
        tree.check_free(own, beneath=own)
        namespace.unmount(root + "/a")
        namespace.mount(OURS[0].source, root + "/a", "tmpfs", 0)
        try:
            tree.check_free(OURS[:1], beneath=OURS[:1])
        except UserError as exc:
            assert "is mounted at" in str(exc)
        else:
            raise AssertionError("it is free")
        """,
    )


@as_root
def test_foreign_mount(tmp_path: Path) -> None:
    """Promise 2: what somebody else mounted at our place is never unmounted."""
    inside(
        tmp_path,
        """
        os.makedirs(OURS[0].mountpoint)
        namespace.mount("foreign", OURS[0].mountpoint, "tmpfs", 0)
        tree.remove(OURS, MADE)
        assert seen() == [("foreign", "/root/a")], seen()
        """,
    )


@as_root
def test_foreign_mount_above(tmp_path: Path) -> None:
    """Promise 2: nor what was mounted over ours, which stays and is told until that is gone."""
    inside(
        tmp_path,
        """
        tree.make(OURS, MADE)
        namespace.mount("foreign", OURS[1].mountpoint, "tmpfs", 0)
        assert tree.remove(OURS, MADE) == OURS[::-1]
        assert seen() == [*BOTH, ("foreign", "/root/a/b")], seen()
        namespace.unmount(OURS[1].mountpoint)
        assert tree.remove(OURS, MADE) == []
        tree.make(OURS[:1], MADE)
        namespace.mount("foreign", root, "tmpfs", 0)
        assert tree.remove(OURS[:1], MADE) == OURS[:1]
        namespace.unmount(root)
        assert tree.remove(OURS[:1], MADE) == []
        assert seen() == []
        """,
    )


@as_root
def test_busy(tmp_path: Path) -> None:
    """Section 7: what is in use is not unmounted, neither by force nor lazily; it is named."""
    inside(
        tmp_path,
        """
        tree.make(OURS, MADE)
        file = os.open(OURS[1].mountpoint, os.O_RDONLY)
        assert tree.remove(OURS, MADE) == OURS[::-1]
        assert seen() == BOTH, seen()
        os.close(file)
        assert tree.remove(OURS, MADE) == []
        """,
    )


@as_root
def test_mounted_twice(tmp_path: Path) -> None:
    """A snapshot of ours that is mounted twice at one place is unmounted twice."""
    inside(
        tmp_path,
        """
        tree.make(OURS[:1], MADE)
        mount(OURS[0], OURS[0].mountpoint)
        assert len(seen()) == 2
        assert tree.remove(OURS[:1], MADE) == []
        assert seen() == []
        """,
    )


def test_removal_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut brings no directory back; where that cannot be had it is told."""
    root = tmp_path / "root"
    directories = (str(root), f"{root}/usr")
    (root / "usr").mkdir(parents=True)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda n: synced.append(os.readlink(f"/proc/self/fd/{n}")))
    assert tree.remove([], directories) == []
    assert synced == [str(tmp_path)]
    assert list(tmp_path.iterdir()) == []

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(EffectError, match=f"cannot sync .*: {os.strerror(errno.EIO)}"):
        tree.remove([], directories)


@as_root
def test_directory_of_somebody(tmp_path: Path) -> None:
    """A directory that we made and somebody put a file in stays, with the file."""
    inside(
        tmp_path,
        """
        tree.make(OURS, MADE)
        open(root + "/theirs", "w").close()
        assert tree.remove(OURS, MADE) == []
        assert seen() == []
        assert os.listdir(root) == ["theirs"]
        """,
    )


@as_root
def test_automounts(tmp_path: Path) -> None:
    """A look into `.zfs/snapshot` of ours is expired; a foreign one, or one in use, is not."""
    inside(
        tmp_path,
        """
        places = {}
        for name in ("idle", "used", "foreign"):
            places[name] = f"{top}/{name}/.zfs/snapshot/x"
            os.makedirs(places[name])
            source = "tank/other@x" if name == "foreign" else f"tank/{name}@x"
            mount(Mount(source, places[name]), places[name])
        os.mkdir(top + "/plain")
        mount(Mount("tank/idle@x", top + "/plain"), top + "/plain")
        file = os.open(places["used"], os.O_RDONLY)
        tree.expire_automounts(["tank/idle@x", "tank/used@x"])
        left = {e.mountpoint for e in mountinfo.read() if e.source.startswith("tank/")}
        assert left == {places["used"], places["foreign"], top + "/plain"}, left
        """,
    )

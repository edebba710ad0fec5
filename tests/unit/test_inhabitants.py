"""Who uses a busy snapshot: named by process, command and path, in whatever namespace."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from atomtx.mounts import inhabitants, mountinfo

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

# In a namespace of its own, with a small file system in the place of a snapshot.
PRELUDE = """
    import os, subprocess, sys, time
    from atomtx import locks
    from atomtx.mounts import inhabitants, namespace

    namespace.enter()
    top, place = sys.argv[1], sys.argv[1] + "/a"
    os.mkdir(place)
    namespace.mount("scratch", top, "tmpfs", 0)
    os.mkdir(place)
    namespace.mount("none", top, None, 0x100000)  # MS_SHARED
    namespace.mount("tank/a@x", place, "tmpfs", 0)
    with open(place + "/log", "w") as file:
        file.write("words" * 1000)
    children = []

    def start(*argv, **options):
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **options)
        children.append(child)
        return child

    def unshared(propagation, script):
        child = start("unshare", "-m", "--propagation", propagation, "sh", "-c", script, cwd="/")
        assert child.stdout.readline() == "ready\\n"
        return child.pid

    def users():
        return inhabitants.users(["tank/a@x"])

    def mounted():
        return inhabitants.mounted(["tank/a@x"])

    def until(check):
        assert locks.wait_until(check, 30), (users(), mounted())
"""
END = """
    for child in children:
        child.kill()
        child.wait()
"""


def inside(tmp_path: Path, code: str) -> None:
    """Run *code* after the prelude; its assertions are the test's."""
    text = textwrap.dedent(PRELUDE) + textwrap.dedent(code) + textwrap.dedent(END)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", text, str(tmp_path)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@as_root
def test_nobody(tmp_path: Path) -> None:
    """A file system that nobody uses has no users, and one that is not mounted is nowhere."""
    inside(
        tmp_path,
        """
        assert users() == []
        assert mounted() == [place]
        assert inhabitants.users(["tank/b@x"]) == inhabitants.mounted(["tank/b@x"]) == []
        """,
    )


@as_root
def test_open_file(tmp_path: Path) -> None:
    """A process with an open file is named by pid, command and path."""
    inside(
        tmp_path,
        """
        child = start("tail", "-f", place + "/log")
        until(lambda: users() == [f"open by {child.pid} (tail) at {place}/log"])
        """,
    )


@as_root
def test_name_that_is_no_text(tmp_path: Path) -> None:
    """A process is named whatever bytes its name has: the kernel cuts one inside a letter."""
    inside(
        tmp_path,
        """
        import shutil
        tail = shutil.copy(shutil.which("tail"), top + "/sauvegarde-abcé")
        child = start(tail, "-f", place + "/log")
        until(lambda: users() == [f"open by {child.pid} (sauvegarde-abc\\ufffd) at {place}/log"])
        """,
    )


def test_mount_of_a_file() -> None:
    """What a device adds to the facts of an open file may have any bytes: a name of a tun has."""
    facts = b"pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t105\n"
    assert inhabitants._mount_of(facts + b"iff:\t\xff\xfetap\n") == 24
    assert inhabitants._mount_of(facts + b"name:\t\nmnt_id:\n") == 24
    assert inhabitants._mount_of(b"") is None


@as_root
def test_working_directory(tmp_path: Path) -> None:
    """A process that only stands there is named; one that stands beside is not."""
    inside(
        tmp_path,
        """
        os.mkdir(top + "/ab")
        beside = start("sleep", "100", cwd=top + "/ab")
        child = start("sleep", "100", cwd=place)
        until(lambda: users() == [f"{child.pid} (sleep) stands in {place}"])
        """,
    )


@as_root
def test_mapped_file(tmp_path: Path) -> None:
    """A file that is mapped and closed keeps its file system busy as well."""
    inside(
        tmp_path,
        """
        code = (
            "import mmap, sys, time; file = open(sys.argv[1], 'rb');"
            " held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); file.close();"
            " import os; os.closerange(3, 64); print('ready', flush=True); time.sleep(100)"
        )
        child = start(sys.executable, "-c", code, place + "/log", cwd="/")
        assert child.stdout.readline() == "ready\\n"
        until(lambda: len(users()) == 1)
        assert users()[0].startswith(f"mapped by {child.pid} (")
        assert users()[0].endswith(f") from {place}/log")
        """,
    )


@as_root
def test_other_namespace(tmp_path: Path) -> None:
    """A mount that only another namespace has is named with who lives there; so is its user."""
    inside(
        tmp_path,
        """
        child = unshared("private", f"exec 5<{place}/log; echo ready; exec sleep 100")
        namespace.unmount(place)
        until(lambda: mounted() == [f"{place} (in the namespace of {child} (sleep))"])
        assert users() == [f"open by {child} (sleep) at {place}/log"]
        """,
    )


def played(monkeypatch: pytest.MonkeyPatch, *mounts: str) -> None:
    """Let everybody's table of mounts be these: root, mountpoint, file system, source."""
    lines = (
        f"{n} 1 0:{n} {root} {place} ro shared:{n} - {fstype} {source} rw\n"
        for n, (root, place, fstype, source) in enumerate(map(str.split, mounts))
    )
    table = mountinfo.parse("".join(lines).encode())
    monkeypatch.setattr(mountinfo, "read", lambda pid="self": table)


def test_part_of_a_btrfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any directory or file of a snapshot of btrfs that is mounted counts, and no neighbour's."""
    played(
        monkeypatch,
        "/k/1.home /whole btrfs /dev/sdb",
        "/k/1.home/etc/x /part btrfs /dev/sdb",
        "/k/1.home2/etc /beside btrfs /dev/sdb",
        "/k /above btrfs /dev/sdb",
        "/ /top btrfs /dev/sdb",
        "/k/1.home/etc /other ext4 /dev/sdc",
    )
    uuid = "0544d686-bc2a-4b36-8920-25649d1a58e5"
    assert inhabitants.mounted([f"{uuid}:/k/1.home"]) == ["/whole", "/part"]
    assert inhabitants.mounted([f"{uuid}:/k/1.hom"]) == []


def test_name_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset's or a logical volume's snapshot is what has its very name."""
    played(
        monkeypatch,
        "/ /a zfs tank/a@x",
        "/etc /b zfs tank/a@x",
        "/ /c zfs tank/a@x/y",
        "/ /d xfs /dev/mapper/vg-a",
        "/ /e xfs /dev/mapper/vg-a/b",
    )
    assert inhabitants.mounted(["tank/a@x"]) == ["/a", "/b"]
    assert inhabitants.mounted(["vg/a"]) == ["/d"]


@as_root
def test_following_namespace(tmp_path: Path) -> None:
    """A copy that goes with its original, as each service has of the host's, is not told."""
    inside(
        tmp_path,
        """
        unshared("slave", "echo ready; exec sleep 100")
        assert mounted() == [place]
        unshared("private", "echo ready; exec sleep 100")
        assert len(mounted()) == 2
        """,
    )


@as_root
def test_marker_that_all_see(tmp_path: Path) -> None:
    """A marker proves who lives in a namespace, unless somebody mounts its like for all to see."""
    inside(
        tmp_path,
        """
        token = "atomtx-00000000000000aa"
        mine = unshared("slave", f"mount -t tmpfs {token} {place}; echo ready; exec sleep 60")
        other = unshared("slave", "echo ready; exec sleep 60")
        assert inhabitants.of(token) == [mine]
        os.mkdir(top + "/b")
        namespace.mount(token, top + "/b", "tmpfs", 0)
        assert inhabitants.of(token) == []
        """,
    )

"""What is FreeBSD's own: each difference that docs/freebsd.md lists, on the played programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import process, selection, system
from atomtx.errors import EffectError, UserError
from atomtx.intents import Mount
from atomtx.mounts import mountinfo, nullfs
from atomtx.names import RunId
from atomtx.plan import DatasetFacts, Pool, Request
from atomtx.system import freebsd
from atomtx.volumes.zfs import Zfs
from tests import fakezfs
from tests.freebsd.stage import FreeBSD, _play_kernel

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[FreeBSD]:
    stage = FreeBSD(tmp_path)
    yield stage
    stage.close()


@pytest.fixture
def on_freebsd(stage: FreeBSD, monkeypatch: pytest.MonkeyPatch) -> FreeBSD:
    """The test's own process asks FreeBSD's programs."""
    path = f"{stage.home}/bin:{process.BASE_ENVIRONMENT['PATH']}"
    monkeypatch.setitem(process.BASE_ENVIRONMENT, "PATH", path)
    monkeypatch.setitem(process.BASE_ENVIRONMENT, "FAKE_ZFS", str(stage.home))
    monkeypatch.setattr(system, "here", freebsd)
    monkeypatch.setattr(fakezfs, "HOME", str(stage.home))
    freebsd.boot_id.cache_clear()
    return stage


def table(*mounts: tuple[str, str, str]) -> mountinfo.Table:
    listed = [
        {"special": s, "node": n, "fstype": t, "opts": ["local"], "fsid": f"{i + 1:016x}"}
        for i, (s, n, t) in enumerate(mounts)
    ]
    return nullfs.parse(json.dumps({"mount": {"mounted": listed}}))


ROOT = ("zroot/ROOT/default", "/", "zfs")
HOME = ("zroot/home", "/home", "zfs")
SNAPSHOT = ("zroot/home@x", "/home/.zfs/snapshot/x", "zfs")
SHOWN = ("/home/.zfs/snapshot/x", "/atomtx/home", "nullfs")


# -- the table of mounts ---------------------------------------------------------------------


def test_origin_of_nullfs() -> None:
    """A nullfs of a snapshot is that snapshot, as the kernel's own mount below it says."""
    found = table(ROOT, HOME, SNAPSHOT, SHOWN)
    assert [e.thing for e in found] == ["zroot/ROOT/default", "zroot/home", *2 * ["zroot/home@x"]]
    entry = found.topmost("/atomtx/home")
    assert entry
    assert (entry.id, entry.fstype) == (4, "nullfs")


def test_origin_is_the_kernels() -> None:
    """What nullfs shows is judged by what is mounted there, not by the names in the path."""
    found = table(ROOT, HOME, ("zroot/other@y", SNAPSHOT[1], "zfs"), SHOWN)
    assert found[-1].thing == "zroot/other@y"
    assert table(ROOT, HOME, SHOWN)[-1].thing == "zroot/home@x"  # the one below was not listed
    plain = table(ROOT, HOME, ("/home/ann", "/jail/ann", "nullfs"))
    assert plain[-1].thing == "/home/ann"
    deep = table(ROOT, HOME, SNAPSHOT, ("/home/.zfs/snapshot/x/ann", "/y", "nullfs"))
    assert deep[-1].thing == "/home/.zfs/snapshot/x/ann"


def test_origin_of_root() -> None:
    """The kernel names a snapshot of "/" with two slashes, realpath(3) with one."""
    found = table(
        ROOT,
        ("zroot/ROOT/default@x", "//.zfs/snapshot/x", "zfs"),
        ("/.zfs/snapshot/x", "/atomtx", "nullfs"),
    )
    assert found[-1].thing == "zroot/ROOT/default@x"


def test_stacked_mounts() -> None:
    """A later mount is on the one that was seen at its place then."""
    found = table(ROOT, ("a", "/a", "ufs"), ("b", "/a/b", "ufs"), ("c", "/a", "ufs"))
    assert [e.parent for e in found] == [0, 1, 2, 2]
    top = found.topmost("/a")
    assert top
    assert top.source == "c"
    assert found.topmost("/a/b") is None


def test_names_with_blanks() -> None:
    """A name may have " on " and "(" in it, which the plain form of mount(8) cannot tell."""
    found = table(ROOT, ("tank/a on /b (x", "/c on /d (zfs, e", "zfs"))
    assert (found[1].source, found[1].mountpoint) == ("tank/a on /b (x", "/c on /d (zfs, e")


@pytest.mark.parametrize("said", ["", "{}", '{"mount": {"mounted": [{"node": "/"}]}}'])
@as_root
def test_strange_table(on_freebsd: FreeBSD, said: str) -> None:
    """A table that cannot be read is an error, never an empty one: "not there" is proof of it."""
    program = on_freebsd.home / "bin" / "mount"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    with pytest.raises(EffectError, match="cannot understand what mount says"):
        mountinfo.read()
    program.write_text("#!/bin/sh\necho 'mount: illegal option -- -' >&2; exit 1\n")
    with pytest.raises(EffectError, match="cannot list the mounts: mount: illegal option") as info:
        mountinfo.read()
    assert info.value.hint == "FreeBSD 14 or later is needed"


# -- mounting and unmounting -----------------------------------------------------------------


def taken(stage: FreeBSD, *datasets: str) -> list[Mount]:
    """Take snapshots, and return where they are to be shown."""
    made = stage.plan(*datasets)
    zfs = Zfs()
    assert zfs.take([v.snapshot for v in made.volumes], run=made.run) is None
    mounts = [Mount(v.snapshot, f"{made.root}{v.mountpoint}") for v in made.volumes]
    os.makedirs(mounts[0].mountpoint)
    return mounts


@as_root
def test_make_and_remove(on_freebsd: FreeBSD) -> None:
    """Promise 4: made and removed, again and again, children on their parents."""
    mounts = taken(on_freebsd, "tank/a", "tank/a/b")
    for _ in range(2):
        nullfs.make(mounts, lock=None)
        seen = [e.source for e in mountinfo.read() if e.fstype == "nullfs"]
        assert seen == [m.source for m in mounts]
    assert Path(mounts[1].mountpoint, "file").read_text() == "frozen"
    for _ in range(2):
        assert nullfs.remove(mounts) == []
        assert not any("@" in e.source for e in mountinfo.read())
    by_fsid = on_freebsd.programs("umount")
    assert len(by_fsid) == 4
    assert all(len(argv) == 1 and len(argv[0]) == 16 for argv in by_fsid)


@as_root
def test_inherits_the_lock(on_freebsd: FreeBSD, tmp_path: Path) -> None:
    """Promise 6: a recovery waits for the mount program of a killed front end: it holds F."""
    from atomtx import locks

    (path := tmp_path / "front.lock").touch()
    program = on_freebsd.home / "bin" / "mount"
    seen = f'case "$1" in -t) ls -l /proc/$$/fd > {on_freebsd.home}/fds ;; esac'
    real = program.rename(program.with_name("mount-real"))
    program.write_text(f'#!/bin/sh\n{seen}\nexec {real} "$@"\n')
    program.chmod(0o755)
    mounts = taken(on_freebsd, "tank/a")
    with locks.acquired(path) as held:
        nullfs.make(mounts, lock=held)
        assert str(path) in (on_freebsd.home / "fds").read_text()
    assert nullfs.remove(mounts) == []


@as_root
def test_busy(on_freebsd: FreeBSD) -> None:
    """What is in use is left, named, and never unmounted by force."""
    mounts = taken(on_freebsd, "tank/a", "tank/a/b")
    nullfs.make(mounts, lock=None)
    with open(f"{mounts[1].mountpoint}/file"):
        assert nullfs.remove(mounts) == mounts[::-1]
        assert nullfs.users([m.source for m in mounts]) == [os.getpid()]
    assert nullfs.remove(mounts) == []
    assert on_freebsd.mounts["forced"] == []


@as_root
def test_foreign_mount(on_freebsd: FreeBSD) -> None:
    """Promise 2: what somebody else shows at our place, or on ours, is not unmounted."""
    mounts = taken(on_freebsd, "tank/a")
    others = taken(on_freebsd, "tank/x")
    place = mounts[0].mountpoint
    nullfs.make([Mount(others[0].source, place)], lock=None)
    assert nullfs.remove(mounts) == []
    assert [e.source for e in mountinfo.read() if e.mountpoint == place] == [others[0].source]
    assert nullfs.remove([Mount(others[0].source, place)]) == []
    nullfs.make(mounts, lock=None)
    nullfs.make([Mount(others[0].source, place)], lock=None)
    assert nullfs.remove(mounts) == mounts
    top = mountinfo.read().topmost(place)
    assert top
    assert top.source == others[0].source
    assert nullfs.remove([Mount(others[0].source, place)]) == []


@as_root
def test_link_in_the_frozen_files(on_freebsd: FreeBSD) -> None:
    """mount(8) follows links: a user's in the frozen files leads nobody elsewhere."""
    mounts = taken(on_freebsd, "tank/a")
    victim = on_freebsd.home / "victim"
    victim.mkdir()
    place = Path(mounts[0].mountpoint)
    place.rmdir()
    place.symlink_to(victim)
    with pytest.raises(EffectError, match="leads over a symbolic link"):
        nullfs.make(mounts, lock=None)
    assert on_freebsd.programs("mount") == [["--libxo", "json", "-v"]]


@as_root
@pytest.mark.parametrize(
    ("faults", "said"),
    [({"snapdir": "disabled"}, "No such file or directory"), ({}, "is not mounted")],
)
def test_not_to_be_seen(on_freebsd: FreeBSD, faults: dict[str, str], said: str) -> None:
    """A snapshot that cannot be seen below its dataset is an error that says what to do."""
    mounts = taken(on_freebsd, "tank/a")
    on_freebsd.play(faults=faults)
    if not faults:
        state = on_freebsd.mounts
        state["mounts"] = [m for m in state["mounts"] if m["special"] != "tank/a"]
        on_freebsd._write_mounts(**state)
    with pytest.raises(EffectError, match=said) as info:
        nullfs.make(mounts, lock=None)
    assert info.value.hint


def test_long_path() -> None:
    """The kernel would cut the name of what is shown: a path that is too long is refused."""
    each = Mount("tank/a@x", "/" + "y" * 1023)
    with pytest.raises(EffectError, match="is too long"):
        nullfs._mount(each, "/a/.zfs/snapshot/x", None)


@as_root
def test_one_by_one(on_freebsd: FreeBSD, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without channel programs a snapshot that is mounted is busy: `zfs destroy` would force it."""
    mounts = taken(on_freebsd, "tank/a")
    nullfs.make(mounts, lock=None)
    zfs = Zfs()
    name = mounts[0].source
    identity = zfs.identities([name])[name]
    run = str(identity.mark)
    real = Zfs._run
    monkeypatch.setattr(
        Zfs,
        "_run",
        lambda self, *a: process.run(["false"]) if a[1] == "program" else real(self, *a),
    )
    assert zfs.destroy([identity], run=run) == {name: "busy"}
    assert on_freebsd.zfs("destroy") == []
    assert nullfs.remove(mounts) == []
    assert zfs.destroy([identity], run=run) == {name: "done"}
    assert on_freebsd.mounts["forced"] == []


# -- processes -------------------------------------------------------------------------------


@pytest.fixture
def child(on_freebsd: FreeBSD) -> Iterator[subprocess.Popen[bytes]]:
    env = {"ATOMTX_TOKEN": "atomtx-0011223344556677", "OTHER": "a\n 1 sh ATOMTX_TOKEN=forged"}
    started = subprocess.Popen(["sleep", "1000"], env={**os.environ, **env}, start_new_session=True)
    yield started
    if started.returncode is None:  # os.kill may be a played one still
        signal.pidfd_send_signal(os.pidfd_open(started.pid), signal.SIGKILL)
        started.wait()


def test_boot_id(on_freebsd: FreeBSD) -> None:
    """kern.boot_id is opaque; what cannot be read is an error, not an empty identity."""
    assert freebsd.boot_id() == (on_freebsd.home / "boot_id").read_text()
    freebsd.boot_id.cache_clear()
    (on_freebsd.home / "boot_id").write_text("")
    with pytest.raises(EffectError, match="cannot read the identity of this boot"):
        freebsd.boot_id()


def test_processes(on_freebsd: FreeBSD, child: subprocess.Popen[bytes]) -> None:
    """ps(1) tells of a process what proc(5) tells on Linux."""
    from atomtx.system import linux

    assert freebsd.session_of(child.pid) == linux.session_of(child.pid) == child.pid
    assert freebsd.session(child.pid) == linux.session(child.pid) == [child.pid]
    assert freebsd.command_of(child.pid) == linux.command_of(child.pid) == "sleep"
    assert child.pid in freebsd.descendants()
    assert child.pid in freebsd.pids()
    start = freebsd.start_of(child.pid)
    assert start
    assert len(start.split()) == 5
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert freebsd.session_of(child.pid) == linux.session_of(child.pid) is None
    child.wait()
    assert (freebsd.command_of(child.pid), freebsd.start_of(child.pid)) == (None, None)


def test_marks(on_freebsd: FreeBSD, child: subprocess.Popen[bytes]) -> None:
    """A mark is in the environment: in an argument, or in another's lines, it proves nothing."""
    mark = "ATOMTX_TOKEN=atomtx-0011223344556677"
    looker = subprocess.Popen(["sh", "-c", f"sleep 1000; : {mark}"])
    assert freebsd.marked(mark) == [child.pid]
    assert freebsd.marked("ATOMTX_TOKEN=atomtx-001122334455667") == []
    assert freebsd.client_mark("atomtx-0011223344556677") == dict([mark.split("=")])
    looker.kill()
    looker.wait()


def test_locks(on_freebsd: FreeBSD, tmp_path: Path) -> None:
    """Who has a lock's file open for writing holds it; who only looks does not."""
    from atomtx import locks

    path = tmp_path / "a lock"
    path.touch()
    assert locks.holders(path) == []
    held = locks.try_acquire(path)
    assert held is not None
    assert locks.holds(os.getpid(), path)
    assert locks.holders(path) == []  # others
    os.close(held)
    with open(path):
        assert not locks.holds(os.getpid(), path)
        assert locks.has_lock_open(os.getpid(), path)
    assert not locks.has_lock_open(os.getpid(), path)
    assert freebsd.openers(tmp_path / "absent", locked=False) == []


LINE = "root     {command} {pid:>5} {fd:>4} {mount:<8} 9161 -rw-------  0 {rw:>2}{name}"


@given(
    command=st.text("abc 19-", min_size=1, max_size=19),
    pid=st.integers(1, 99_999),
    fd=st.sampled_from(["3", "12", "wd", "root", "text", "jail"]),
    mount=st.sampled_from(["/", "/var", "/my data 7"]),
    rw=st.sampled_from(["r", "w", "rw"]),
    name=st.sampled_from(["", "  /var/db/atomtx/runs/0 1/front.lock"]),
)
def test_fstat(command: str, pid: int, fd: str, mount: str, rw: str, name: str) -> None:
    """A line of fstat(1) is read whatever a process is called."""
    line = LINE.format(command=command, pid=pid, fd=fd, mount=mount, rw=rw, name=name)
    match = freebsd.parse_fstat(line)
    assert match
    assert (int(match["pid"]), match["rw"]) == (pid, rw)


def test_fstat_is_strange() -> None:
    """A line that cannot be read is an error: a holder that is not seen would be lost."""
    with pytest.raises(EffectError, match="cannot understand what fstat says"):
        freebsd.parse_fstat("something else")


def test_send(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is signalled after the proof, and not if it ended meanwhile."""
    import select

    for name in ("kqueue", "kevent", "KQ_FILTER_PROC", "KQ_EV_ADD", "KQ_NOTE_EXIT"):
        monkeypatch.setattr(select, name, None, raising=False)
    _play_kernel()
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(pid))

    def ends(pid: int) -> bool:
        signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return True

    assert not freebsd.send(child.pid, signal.SIGTERM, if_still=lambda _: False)
    assert freebsd.send(child.pid, signal.SIGTERM, if_still=lambda _: True)
    assert sent == [child.pid]
    assert not freebsd.send(child.pid, signal.SIGTERM, if_still=ends)
    child.wait()
    assert not freebsd.send(child.pid, signal.SIGTERM, if_still=lambda _: True)
    assert sent == [child.pid]


# -- what is chosen --------------------------------------------------------------------------


def test_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no mount namespaces: that layout is refused in one line, a tree is the default."""
    monkeypatch.setattr(system, "here", freebsd)
    request = Request(("tank/a",), layout="namespace")
    with pytest.raises(UserError, match="FreeBSD has no mount namespaces") as info:
        selection._check_request(request)
    assert "--layout tree" in str(info.value.hint)
    selection._check_request(replace(request, layout=freebsd.LAYOUT, root=freebsd.TREE))


def test_selection() -> None:
    """A dataset is found by FreeBSD's table; what the kernel mounted of it is none beside it."""
    pools = [Pool("zroot", "1", "ONLINE")]
    facts = [
        DatasetFacts(name, "filesystem", f"guid of {name}", place, "on", True, "-")
        for name, place in (("zroot/ROOT/default", "/"), ("zroot/home", "/home"))
    ]
    request = Request(("zroot/home",), layout="tree", root="/atomtx")
    found = selection.select(request, facts, pools, table(ROOT, HOME, SNAPSHOT, SHOWN))
    assert [(each.name, place) for each, place in found.volumes] == [("zroot/home", "/home")]
    assert found.uncovered == ()


def test_selection_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set may hold "/", though the tree is in it; on Linux the live paths serve for that."""
    pools = [Pool("zroot", "1", "ONLINE")]
    facts = [DatasetFacts("zroot/ROOT/default", "filesystem", "g", "/", "on", True, "-")]
    request = Request(("/",), layout="tree", root="/atomtx")
    mounts = table(ROOT, HOME, SNAPSHOT, SHOWN)
    with pytest.raises(UserError, match="is inside zroot/ROOT/default"):
        selection.select(request, facts, pools, mounts)
    monkeypatch.setattr(system, "here", freebsd)
    found = selection.select(request, facts, pools, mounts)
    assert [place for _, place in found.volumes] == ["/"]
    # Not what the kernel mounted below .zfs; what a run shows, and other mounts, yes.
    assert sorted(each.name for each in found.uncovered) == ["/atomtx/home", "/home"]


def test_imports() -> None:
    """Every module of the engine can be imported by a Python that has what FreeBSD's has."""
    code = """
import ctypes, importlib, os, pkgutil, select, signal, sys
for owner, name in ((os, "pidfd_open"), (signal, "pidfd_send_signal"), (os, "O_PATH"),
                    (os, "sched_getaffinity"), (select, "epoll")):
    delattr(owner, name)
real, sys.platform = sys.platform, "freebsd14"
import atomtx.system
sys.platform = real  # Python's own library looks for what belongs to it
for found in pkgutil.walk_packages(atomtx.__path__, "atomtx."):
    if found.name not in ("atomtx.__main__", "atomtx.system.linux"):
        importlib.import_module(found.name)
from atomtx import config_schema, statedir, system
assert system.here.NAME == "FreeBSD"
assert "atomtx.system.linux" not in sys.modules
assert config_schema.DEFAULT == "/usr/local/etc/atomtx/atomtx.toml"
job = config_schema.Job(volumes=("home",))
assert (job.layout, job.root) == ("tree", "/atomtx")
assert [*config_schema.problems(job)] == []
from dataclasses import replace
((where, what),) = config_schema.problems(replace(job, layout="namespace"))
assert where == ("layout",) and "FreeBSD has no mount namespaces" in what
assert str(statedir.find({})) == "/var/db/atomtx"
"""
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_linux_is_out_of_reach(stage: FreeBSD) -> None:
    """The stage sees it if the engine reads what is Linux's: it would not be on FreeBSD."""
    from atomtx.system import linux

    def boot_id() -> str:
        try:
            return linux.boot_id()
        except FileNotFoundError as exc:
            (stage.home / "seen").write_text(str(exc))
            raise

    stage.changes.append(lambda: setattr(freebsd, "boot_id", boot_id))
    assert stage.backup(stage.plan("tank/a")).status == 70
    assert "FreeBSD has no" in (stage.home / "seen").read_text()


def test_long_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """execve(2) takes less there: a set that is too long is refused before it is half taken."""
    names = [f"tank/{'x' * 90}{n}@{RunId.new().token}" for n in range(2500)]
    monkeypatch.setattr(process, "run", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setattr(system, "here", freebsd)
    with pytest.raises(EffectError, match="too many for one `zfs snapshot` command"):
        Zfs().take(names, run="0011223344556677")

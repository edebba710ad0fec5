"""The real xfsdump and xfsrestore, on real XFS: what is dumped comes back, and nothing is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

import atomtx
from atomtx import errand, locks
from atomtx.clients import Backup, End, Facts, Moment, Settings
from atomtx.clients.dumps import MARK, Destination, Dump, this_host
from atomtx.clients.xfsdump import Xfsdump
from atomtx.clients.xfsdump_process import SLACK_S
from atomtx.errand import Errand
from atomtx.errors import UserError
from atomtx.statedir import RunFolder, prepare
from atomtx.states import Outcome
from atomtx.task import Task
from tests.dumps import a_dump, make_chain, put
from tests.xfs.field import MACHINES_OWN, Field, call, change, described, fill, listing

PATIENCE_S = 120.0
ENGINE = str(Path(atomtx.__file__).parent.parent)


class Scene:
    """A destination, some file systems, and the client between them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.field = Field(home)
        self.destination = home / "dumps of mine"
        self.destination.mkdir()
        (self.destination / MARK).write_text("0123-4567-89ab\n")
        self.client = Xfsdump()
        self.runs = 0

    def settings(self, *extra: str, program: str = "") -> Settings:
        options = (f"--destination={self.destination}", *extra)
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": ENGINE}
        return Settings((program,) if program else (), options, env, str(self.home))

    def moment(self, *paths: Path) -> Moment:
        """Return a moment of now, of a run of its own."""
        self.runs += 1
        at = datetime.now(UTC).replace(microsecond=0)
        return Moment(
            tuple(map(str, paths)), "", at, run=f"{self.runs:016x}", job=f"job {self.runs}"
        )

    def start(self, settings: Settings, moment: Moment) -> list[subprocess.Popen[str]]:
        launch = self.client.launch(settings, self.client.inspect(settings), moment)
        return [
            subprocess.Popen(
                argv,
                env={**settings.env, **launch.env},
                cwd=launch.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for argv in launch.commands
        ]

    def dump(self, settings: Settings, moment: Moment) -> End:
        reader = self.client.reader(moment)
        for n, process in enumerate(self.start(settings, moment)):
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
            print(stderr)
            for line in stdout.splitlines():
                reader.stdout(line)
            for line in stderr.splitlines():
                reader.stderr(line)
            reader.end_command(n, process.returncode)
        return reader.end()

    def made(self, end: End) -> Dump:
        assert end.outcome is Outcome.COMPLETED, end
        return self.store.dump(end.backups[0].backup_id or "")

    @property
    def store(self) -> Destination:
        return Destination(str(self.destination))

    def names(self) -> list[str]:
        """Return what is in the destination but for the mark, to the depth of a dump."""
        found = self.destination.glob("*/*")
        return sorted(str(path.relative_to(self.destination)) for path in found)

    def restore(self, backup: Backup, to: Path, settings: Settings) -> Path:
        """Run the restore commands as `atomtx show` prints them."""
        for argv in self.client.restore_commands(settings, backup, str(to)):
            said = call(*argv)
            if argv[0] == "xfsrestore":
                assert "Restore Status: SUCCESS" in said
        return to / backup.paths[0].lstrip("/")


def wait_until_old() -> None:
    """Let all that was changed so far be older than the next moment, to xfsdump's measure."""
    time.sleep(SLACK_S + 1.1)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    assert os.geteuid() == 0, "XFS on a loop device needs root"
    for program in ("mkfs.xfs", "xfsdump", "xfsrestore", "setfacl", "strace"):
        assert shutil.which(program), f"install xfsprogs, xfsdump, acl and strace: {program}"
    before = listing(MACHINES_OWN)
    made = Scene(tmp_path)
    yield made
    made.field.close()
    assert listing(MACHINES_OWN) == before, "the machine's own inventory was touched"


def differences(one: Path, other: Path) -> dict[str, object]:
    """Return what differs between two trees, fact by fact."""
    left, right = described(one), described(other)
    return {
        f"{name!r}: {fact}": (left.get(name, {}).get(fact), right.get(name, {}).get(fact))
        for name in left | right
        for fact in left.get(name, {}) | right.get(name, {})
        if left.get(name, {}).get(fact) != right.get(name, {}).get(fact)
    }


def test_chain(scene: Scene) -> None:
    """Levels 0, 1 and 2 restore to the very tree: data, holes, links, attributes, ACLs, times."""
    volume, elsewhere = scene.field.make("my data"), scene.field.make("restored")
    fill(volume)
    settings = scene.settings("--levels=0,1,2")
    ends = []
    for level in range(3):
        if level:
            change(volume, level)
        wait_until_old()
        ends.append(scene.dump(settings, scene.moment(volume)))
        assert scene.made(ends[-1]).level == level
    zero, one, two = (scene.made(end) for end in ends)
    assert (zero.base, one.base, two.base) == (None, zero.name, one.name)
    assert zero.size > max(one.size, two.size)
    assert scene.store.chain(two.name) == [zero, one, two]
    restored = scene.restore(ends[2].backups[0], elsewhere, settings)
    assert differences(volume, restored) == {}
    assert scene.client.damage(settings, scene.store.id, ends[2].backups[0]) == ()


def test_xfsrestore_loses(scene: Scene) -> None:
    """
    What docs/xfsdump.md says of xfsrestore 3.1.11 is so; where this fails, it was mended.

    A directory that got another name, and of which a file was deleted, between two levels, stays
    under its old name; a file without a list of its own gets one, below a directory with a default
    list; times are of whole seconds.  The status is SUCCESS each time.
    """
    volume, elsewhere = scene.field.make("a"), scene.field.make("b")
    (volume / "old").mkdir()
    for name in ("kept", "deleted"):
        (volume / "old" / name).write_text(name)
    (volume / "lists").mkdir()
    (volume / "lists" / "bare").write_text("no list")
    call("setfacl", "-d", "-m", "u:1234:rx", volume / "lists")
    settings = scene.settings("--levels=0,1")
    scene.made(scene.dump(settings, scene.moment(volume)))
    (volume / "old").rename(volume / "new")
    (volume / "new" / "deleted").unlink()
    wait_until_old()
    end = scene.dump(settings, scene.moment(volume))
    assert scene.made(end).level == 1
    restored = scene.restore(end.backups[0], elsewhere, settings)
    assert sorted(p.name for p in restored.iterdir() if p.name in ("old", "new")) == ["old"]
    assert os.listxattr(volume / "lists" / "bare") == []
    assert "system.posix_acl_access" in os.listxattr(restored / "lists" / "bare")
    assert (restored / "old" / "kept").stat().st_mtime_ns % 10**9 == 0


# -- what is damaged is found out --------------------------------------------------------------


def test_cut_short_and_flipped(scene: Scene) -> None:
    """Where xfsrestore says SUCCESS of a dump cut short, or of a flipped byte, we do not."""
    volume, elsewhere = scene.field.make("a"), scene.field.make("b")
    for n in range(30):
        (volume / f"f{n}").write_bytes(bytes([n]) * 100_000)
    settings = scene.settings("--levels=0,1")
    wait_until_old()
    zero = scene.dump(settings, scene.moment(volume))
    wait_until_old()  # of the same second it would be another level 0
    one = scene.dump(settings, scene.moment(volume))
    assert scene.made(one).level == 1
    backup = one.backups[0]
    whole = scene.destination / scene.made(zero).name / "dump"
    content = whole.read_bytes()
    for n, damaged in enumerate([content[: len(content) // 2], flipped(content)]):
        whole.write_bytes(damaged)
        restored = scene.restore(backup, elsewhere / str(n), settings)  # both say SUCCESS
        assert differences(volume, restored) != {}
        (words,) = scene.client.damage(settings, scene.store.id, backup)
        assert ("bytes, and was written with" in words, "SHA-256" in words) == (not n, bool(n))
    whole.write_bytes(content)
    assert scene.client.damage(settings, scene.store.id, backup) == ()


def flipped(content: bytes) -> bytes:
    """Return it with one bit of a file's data the other way."""
    at = content.index(bytes([7]) * 4096) + 4000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_no_base_that_is_cut_short(scene: Scene) -> None:
    """No increment is made on a dump that is not whole: a level 0 begins another chain."""
    volume = scene.field.make("a")
    settings = scene.settings("--levels=0,1,1,1")
    first = scene.made(scene.dump(settings, scene.moment(volume)))
    wait_until_old()
    os.truncate(scene.destination / first.name / "dump", 1000)
    second = scene.made(scene.dump(settings, scene.moment(volume)))
    assert (second.level, second.base) == (0, None)


LIARS = {
    "says that it is incomplete": 'xfsdump "$@" 2>&1 >&3 | sed s/SUCCESS/INCOMPLETE/ >&2',
    "fails after all": 'xfsdump "$@" >&3; exit 1',
    "reads nothing": 'echo data >&3; echo "xfsdump: Dump Status: SUCCESS" >&2',
    "says nothing": 'xfsdump "$@" >&3 2>/dev/null',
}


@pytest.mark.parametrize("lie", LIARS)
def test_not_believed(scene: Scene, lie: str) -> None:
    """Promise 7: a dump needs status 0, the word SUCCESS, and somebody who read the files."""
    volume = scene.field.make("a")
    (volume / "file").write_text("content")
    program = scene.home / "liar"
    program.write_text(f'#!/bin/sh\n[ "$1" = -h ] && exec xfsdump -h\nexec 3>&1\n{LIARS[lie]}\n')
    program.chmod(0o755)
    end = scene.dump(scene.settings(program=str(program)), scene.moment(volume))
    assert end.outcome is Outcome.FAILED
    assert os.listdir(scene.destination) == [MARK]


# -- killed, stopped, full ---------------------------------------------------------------------

HANGS = """#!/bin/sh
[ "$1" = -h ] && exec xfsdump -h
exec 3>&1
xfsdump "$@" | { head -c 100000 >&3; touch "%s"; exec sleep 1000; }
"""


class Hanging:
    """A dump that stops in its midst."""

    def __init__(self, scene: Scene, volume: Path) -> None:
        (volume / "big").write_bytes(b"x" * 2_000_000)
        self.ready = scene.home / "ready"
        self.program = scene.home / "hanging"
        self.program.write_text(HANGS % self.ready)
        self.program.chmod(0o755)
        self.settings = scene.settings(program=str(self.program))

    def wait(self) -> None:
        assert locks.wait_until(self.ready.exists, PATIENCE_S)


def test_killed(scene: Scene) -> None:
    """After SIGKILL in its midst there is no dump; the run's part goes; the next one is whole."""
    volume = scene.field.make("a")
    settings = scene.settings("--level=1")
    scene.made(scene.dump(settings, scene.moment(volume)))
    before = scene.names()
    hanging = Hanging(scene, volume)
    moment = scene.moment(volume)
    (process,) = scene.start(hanging.settings, moment)
    hanging.wait()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (part,) = set(scene.names()) - set(before)
    assert moment.run in part
    assert [dump.run for dump in scene.store.dumps(str(volume))] == ["0" * 15 + "1"]
    assert scene.client.remove_parts(settings, scene.store.id, "f" * 16) == ()
    assert len(scene.client.remove_parts(settings, scene.store.id, moment.run)) == 1
    assert scene.names() == before
    assert scene.client.remove_parts(settings, scene.store.id, moment.run) == ()
    wait_until_old()
    last = scene.dump(settings, scene.moment(volume))
    assert scene.made(last).level == 1
    assert scene.client.damage(settings, scene.store.id, last.backups[0]) == ()


def killed_at(call: str, n: int, argv: Sequence[str], settings: Settings) -> bool:
    """Run a process of ours that is killed before its *n*th call of a kind; False if it ended."""
    where = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={n}")
    process = subprocess.Popen(
        ("strace", "-qq", "-o", "/dev/null", *where, *argv),
        env={**settings.env, "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    status = process.wait(timeout=PATIENCE_S)
    with suppress(ProcessLookupError):  # what is left of it, as a run's recovery would
        os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()
    assert status in (0, -signal.SIGKILL, 128 + signal.SIGKILL), said
    return status != 0


@pytest.mark.parametrize(
    ("call", "least"),
    [("mkdir", 5), ("unshare", 1), ("mount", 4), ("vfork", 1), ("fsync", 8), ("rename", 1)],
)
def test_killed_at_each_call(scene: Scene, call: str, least: int) -> None:
    """Promise 5: killed before each call that lasts, there is a whole dump or none of it."""
    volume = scene.field.make("a")
    fill(volume)
    settings = scene.settings("--level=1")
    scene.made(scene.dump(settings, scene.moment(volume)))
    facts = scene.client.inspect(settings)
    for n in range(1, 200):
        moment = scene.moment(volume)
        (argv,) = scene.client.launch(settings, facts, moment).commands
        was_killed = killed_at(call, n, argv, settings)
        scene.client.remove_parts(settings, facts.repository, moment.run)
        made = scene.store.dumps(str(volume))
        assert scene.names() == sorted(dump.name for dump in made)
        assert all(scene.store.damage(dump) is None for dump in made)
        if not was_killed:
            break
    assert n > least
    assert made[-1].run == moment.run


def test_retention_of_another_destination(tmp_path: Path) -> None:
    """Dumps of a disk that was put in the place of the run's own are not forgotten."""
    store = Destination(str(tmp_path / "dumps"))
    made = [*make_chain(store, 2), put(store, a_dump(9, 0))]
    settings = Settings(
        (), (f"--destination={store.path}",), {**os.environ, "PYTHONPATH": ENGINE}, "/"
    )
    facts = Facts("3.1", str(uuid.uuid4()))
    (argv,) = Xfsdump().forgetting(settings, facts, ("/home",), ("--keep-chains=1",))
    done = subprocess.run(argv, env=dict(settings.env), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "another" in done.stderr + done.stdout
    assert all(Path(store.path, dump.name).exists() for dump in made)


@pytest.mark.parametrize(("call", "least"), [("rename", 2), ("fsync", 2), ("unlinkat", 9)])
def test_retention_killed_at_each_call(tmp_path: Path, call: str, least: int) -> None:
    """Promise 5: a retention that is killed anywhere leaves whole chains; again, it is done."""
    store = Destination(str(tmp_path / "dumps"))
    old, newest = make_chain(store, 2), put(store, a_dump(9, 0))
    settings = Settings(
        (), (f"--destination={store.path}",), {**os.environ, "PYTHONPATH": ENGINE}, "/"
    )
    facts = Facts("3.1", store.id)
    (argv,) = Xfsdump().forgetting(settings, facts, ("/home",), ("--keep-chains=1",))
    whole = tmp_path / "whole"
    shutil.copytree(store.path, whole)
    for n in range(1, 200):
        shutil.rmtree(store.path)
        shutil.copytree(whole, store.path)
        was_killed = killed_at(call, n, argv, settings)
        left = store.dumps("/home")
        assert left == [*old[: len(left) - 1], newest]
        assert all(store.damage(each) is None for dump in left for each in store.chain(dump.name))
        store.forget("/home", 1, this_host())
        assert store.dumps("/home") == [newest]
        assert [path.name for path in (store.path / "home").iterdir()] == [newest.name[5:]]
        if not was_killed:
            break
    assert n > least


def test_again(scene: Scene) -> None:
    """A resumed attempt begins anew over its own part; one that had ended is not made twice."""
    volume = scene.field.make("a")
    hanging = Hanging(scene, volume)
    moment = scene.moment(volume)
    (process,) = scene.start(hanging.settings, moment)
    hanging.wait()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    end = scene.dump(scene.settings(), moment)
    made = scene.made(end)
    assert scene.names() == [made.name]
    written = (scene.destination / made.name / "dump").stat().st_mtime_ns
    assert scene.made(scene.dump(scene.settings(), moment)) == made
    assert (scene.destination / made.name / "dump").stat().st_mtime_ns == written


def test_full(scene: Scene) -> None:
    """A full destination is told as such, worth another attempt, and nothing is left in it."""
    volume = scene.field.make("a")
    (volume / "big").write_bytes(os.urandom(3_000_000))
    call("mount", "-t", "tmpfs", "-o", "size=1m", "none", scene.destination)
    try:
        (scene.destination / MARK).write_text("0123-4567-89ab\n")
        end = scene.dump(scene.settings(), scene.moment(volume))
        assert (end.outcome, end.retriable) == (Outcome.FAILED, True)
        assert "No space left on device" in (end.reason or "")
        assert os.listdir(scene.destination) == [MARK]
    finally:
        call("umount", scene.destination)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.of(prepare(tmp_path / "state"), f"{1:016x}").make()


def errand_of(scene: Scene, folder: RunFolder, settings: Settings, moment: Moment) -> Errand:
    """Let a real runner run the client, as a run does."""
    launch = scene.client.launch(settings, scene.client.inspect(settings), moment)
    task = Task(
        run=moment.run,
        attempt=1,
        folder=str(folder.path),
        in_namespace=True,
        mounts=(),
        live=(),
        client="xfsdump",
        commands=launch.commands,
        cwd=launch.cwd,
        env=dict(launch.env),
        moment=moment,
        stop_signal=int(scene.client.stop_signal),
        grace_s=PATIENCE_S,
        time_limit_s=0,
    )
    front = locks.try_acquire(folder.front_lock)
    assert front is not None
    try:
        started = Errand(task, folder, env=settings.env, front=front)
    finally:
        os.close(front)
    started.mounted()
    started.go()
    return started


def ended(started: Errand, folder: RunFolder) -> End:
    assert locks.wait_gone(started.pid, PATIENCE_S)
    started.dismiss()
    known = errand.end(folder, 1)
    assert known
    return known[0]


def test_run(scene: Scene, folder: RunFolder) -> None:
    """Under the runner two volumes of a moment are two dumps, each with its id, size and files."""
    one, two = scene.field.make("one"), scene.field.make("two")
    for volume in (one, two):
        fill(volume)
    moment = scene.moment(one, two)
    end = ended(errand_of(scene, folder, scene.settings(), moment), folder)
    assert end.outcome is Outcome.COMPLETED
    assert [backup.paths for backup in end.backups] == [(str(one),), (str(two),)]
    for backup in end.backups:
        made = scene.store.dump(backup.backup_id or "")
        assert (backup.bytes_added, made.run, made.level) == (made.size, moment.run, 0)
        assert scene.store.damage(made) is None
    assert "Dump Status: SUCCESS" in folder.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped(scene: Scene, folder: RunFolder, number: signal.Signals) -> None:
    """A stop ends xfsdump in order, and its part is gone with it."""
    volume = scene.field.make("a")
    hanging = Hanging(scene, volume)
    started = errand_of(scene, folder, hanging.settings, scene.moment(volume))
    hanging.wait()
    assert errand.stop(folder, number)
    end = ended(started, folder)
    assert (end.outcome, end.retriable) == (Outcome.FAILED, False)
    assert scene.names() == []
    assert os.listdir(scene.destination) == [MARK]


def test_killed_under_the_runner(scene: Scene, folder: RunFolder) -> None:
    """Whoever kills the process around xfsdump fails the attempt, and leaves nobody at work."""
    volume = scene.field.make("a")
    hanging = Hanging(scene, volume)
    started = errand_of(scene, folder, hanging.settings, scene.moment(volume))
    hanging.wait()
    (mine, *_) = sorted(process.pid for process in locks.holders(folder.client_lock))
    os.kill(mine, signal.SIGKILL)
    end = ended(started, folder)
    assert (end.outcome, end.retriable) == (Outcome.FAILED, True)
    assert not locks.is_held(folder.client_lock)
    assert scene.store.dumps(str(volume)) == []


# -- what it refuses, and forgets --------------------------------------------------------------


def test_check(scene: Scene) -> None:
    """Only whole XFS file systems are taken, and none that holds the destination."""
    volume = scene.field.make("a")
    (volume / "sub").mkdir()
    client, settings = scene.client, scene.settings()
    assert re.fullmatch(r"3\.\d.*", client.inspect(settings).version)
    client.check(settings, (str(volume),), ())
    with pytest.raises(UserError, match="is a part of the one at"):
        client.check(settings, (str(volume / "sub"),), ())
    with pytest.raises(UserError, match="saves XFS alone, and /proc is proc"):
        client.check(settings, ("/proc",), ())
    inside = replace(settings, extra=(f"--destination={volume}",))
    with pytest.raises(UserError, match="is on the file system"):
        client.check(inside, (str(volume),), ())
    call("mount", "--bind", volume / "sub", scene.home / "a" / "sub")
    try:
        with pytest.raises(UserError, match="shows a directory of one"):
            client.check(settings, (str(volume / "sub"),), ())
    finally:
        call("umount", volume / "sub")


def test_read_only_bind(scene: Scene) -> None:
    """A read-only bind of the root of a file system is as good as the file system itself."""
    volume, elsewhere = scene.field.make("a"), scene.field.make("b")
    fill(volume)
    place = scene.home / "bound"
    place.mkdir()
    call("mount", "--bind", "-o", "ro", volume, place)
    try:
        end = scene.dump(scene.settings(), scene.moment(place))
        assert scene.made(end).path == str(place)
        restored = scene.restore(end.backups[0], elsewhere, scene.settings())
        assert differences(volume, restored) == {}
    finally:
        call("umount", place)


def test_forget(scene: Scene) -> None:
    """The retention keeps whole chains, of the newest; what it keeps restores."""
    volume, elsewhere = scene.field.make("a"), scene.field.make("b")
    fill(volume)
    settings = scene.settings("--levels=0,1")
    wait_until_old()
    ends = []
    for _ in range(5):
        ends.append(scene.dump(settings, scene.moment(volume)))
        time.sleep(1)  # no two of them are of one second
    assert [scene.made(end).level for end in ends] == [0, 1, 0, 1, 0]
    (argv,) = scene.client.forgetting(
        settings, scene.client.inspect(settings), (str(volume),), ("--keep-chains=2",)
    )
    subprocess.run(argv, env=dict(settings.env), check=True, timeout=PATIENCE_S)
    assert scene.names() == [scene.made(end).name for end in ends[2:]]
    restored = scene.restore(ends[3].backups[0], elsewhere, settings)
    assert differences(volume, restored) == {}


def test_destination_below_var_lib(scene: Scene) -> None:
    """A destination below /var/lib, where the inventory's place is made, is as good as another."""
    volume = scene.field.make("a")
    call("mount", "--make-private", volume)
    settings = scene.settings()
    launch = scene.client.launch(settings, scene.client.inspect(settings), scene.moment(volume))
    place = "/var/lib/atomtx-test-of-xfsdump/dumps"
    argv = [word.replace(str(scene.destination), place) for word in launch.commands[0]]
    script = 'mount -t tmpfs none /var/lib && mkdir -p "$1" && mount --bind "$0" "$1" && shift'
    words = ("unshare", "--mount", "sh", "-c", f'{script} && exec "$@"')
    subprocess.run(
        (*words, str(scene.destination), place, *argv),
        env={**settings.env, **launch.env},
        cwd="/",
        check=True,
        timeout=PATIENCE_S,
    )
    (made,) = scene.store.dumps(str(volume))
    assert scene.store.damage(made) is None

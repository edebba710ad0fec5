"""What the machine says about a run: its pools, its snapshots, and who of it still lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from atomtx import locks, system
from atomtx.clients import End
from atomtx.errors import EffectError, WaitingError
from atomtx.names import RunId
from atomtx.plan import Pool
from atomtx.probing import (
    at_work,
    client_lives,
    end_survivors,
    presence,
    probe,
    same_moment,
    survivors,
)
from atomtx.recovery import Ended, Presence, Probes
from atomtx.statedir import RunFolder, prepare
from atomtx.states import BACKING_UP, Outcome
from atomtx.task import end_to_json
from atomtx.volumes.datasets import Datasets, pool_trouble
from atomtx.volumes.kind import Identity
from atomtx.volumes.kinds import Kinds
from atomtx.volumes.zfs import Zfs
from tests.runs import OTHER, RUN, a_plan, a_run

PATIENCE_S = 60.0
TANK = Pool("tank", "11", "ONLINE")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


def identities(*, txg: str = "7", mark: str | None = RUN) -> dict[str, Identity]:
    """What the pool says of the run of `tests.runs`, all in place."""
    return {
        v.snapshot: Identity(v.snapshot, f"{100 + n}", txg, 1_785_000_000, mark)
        for n, v in enumerate(a_plan().volumes)
    }


# -- pools -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pools", "trouble"),
    [
        ([TANK], None),
        ([TANK, Pool("zroot", "22", "ONLINE")], None),
        ([Pool("tank", "11", "DEGRADED")], None),
        ([], "pool tank is not imported"),
        ([Pool("zroot", "22", "ONLINE")], "pool tank is not imported"),
        ([Pool("tank", "99", "ONLINE")], "the pool tank that is imported is another one"),
        ([Pool("old", "11", "ONLINE")], "pool tank is imported under the name old"),
        (
            [Pool("old", "11", "ONLINE"), Pool("tank", "99", "ONLINE")],
            "pool tank is imported under the name old",
        ),
        ([Pool("tank", "11", "SUSPENDED")], "pool tank is suspended: `zpool clear tank`"),
    ],
)
def test_pool_trouble(pools: list[Pool], trouble: str | None) -> None:
    """Promises 2 and 14: only the same pool, by its guid, can say that something is not there."""
    assert pool_trouble(a_run().volumes, pools) == trouble


def test_every_pool_counts() -> None:
    """Of a set over several pools each one must be there."""
    run = a_run(a_plan("tank/a", "zroot/b"))
    assert pool_trouble(run.volumes, [TANK]) == "pool zroot is not imported"
    assert pool_trouble(run.volumes, [TANK, Pool("zroot", "22", "ONLINE")]) is None


# -- snapshots -------------------------------------------------------------------------------


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize(
    ("guid", "txg", "mark", "expected"),
    [
        ("100", "7", RUN, Presence.OURS),
        ("100", "7", None, Presence.FOREIGN),
        ("100", "7", OTHER, Presence.FOREIGN),
        ("999", "7", RUN, Presence.FOREIGN),
        ("100", "9", RUN, Presence.FOREIGN),
    ],
    # A run id is another one in each process; the name of a test must not be.
    ids=["ours", "unmarked", "another run's", "another guid", "another txg"],
)
def test_presence(proven: bool, guid: str, txg: str, mark: str | None, expected: Presence) -> None:
    """
    Promise 2: name, mark, guid and createtxg together prove a snapshot.

    Until its identity is journaled, which a crash may prevent, the random name and the mark do.
    """
    run = a_run(proven=proven)
    found = Identity(run.volumes[0].snapshot, guid, txg, 1, mark)
    if not proven and mark == RUN:
        expected = Presence.OURS
    assert presence(run, run.volumes[0], found) is expected


@pytest.mark.parametrize("mark", [None, RUN, OTHER], ids=["unmarked", "ours", "another run's"])
@pytest.mark.parametrize(
    ("guid", "txg", "expected"),
    [
        ("100", "7", Presence.OURS),
        ("999", "7", Presence.FOREIGN),
        ("100", "9", Presence.FOREIGN),
    ],
)
def test_presence_of_one_that_stays(
    guid: str, txg: str, mark: str | None, expected: Presence
) -> None:
    """A kept snapshot is proven by guid and createtxg of the plan; no mark adds to that."""
    run = a_run()
    volume = replace(run.volumes[0], stays=True)
    found = Identity(volume.snapshot, guid, txg, 1, mark)
    assert presence(run, volume, found) is expected


def test_absent() -> None:
    """A snapshot that the pool does not know is absent."""
    run = a_run()
    assert presence(run, run.volumes[0], None) is Presence.ABSENT


def test_same_moment() -> None:
    """Promise 8: the snapshots of one pool are of one transaction group; pools have their own."""
    run = a_run(a_plan("tank/a", "tank/b", "zroot/c"))
    a, b, c = (v.snapshot for v in run.volumes)

    def found(*groups: tuple[str, str]) -> dict[str, Identity]:
        return {name: Identity(name, "1", txg, 1, RUN) for name, txg in groups}

    assert same_moment(run.volumes, found((a, "7"), (b, "7"), (c, "9")))
    assert not same_moment(run.volumes, found((a, "7"), (b, "8"), (c, "9")))
    assert same_moment(run.volumes, found((a, "7"), (c, "9")))
    assert same_moment(run.volumes, {})


# -- the whole -------------------------------------------------------------------------------


class Machine:
    """Stands for `Zfs`: pools and snapshots as they are given, and how often it was asked."""

    def __init__(self, pools: list[Pool], found: dict[str, Identity]) -> None:
        self._pools = pools
        self._found = found
        self.asked: list[str] = []

    def pools(self) -> list[Pool]:
        self.asked.append("pools")
        return self._pools

    def identities(self, names: Collection[str]) -> dict[str, Identity]:
        self.asked.append("identities")
        return {name: self._found[name] for name in names if name in self._found}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.of(prepare(tmp_path / "state"), RUN).make()


def look(folder: RunFolder, machine: Machine) -> tuple[Probes, dict[str, Identity]]:
    kinds = Kinds({"zfs": Datasets(cast(Zfs, machine))})
    return probe(a_run(state=BACKING_UP, attempts=2), folder, kinds)


def write_end(folder: RunFolder, *, attempt: int, stopped: int | None = None) -> None:
    folder.reserve_end()
    end = End(Outcome.FAILED, "timeout", retriable=True)
    folder.write_end(end_to_json(end, attempt=attempt, stopped=stopped))


def test_probe(folder: RunFolder) -> None:
    """A run that died alone is seen with its snapshots, each judged; two questions are asked."""
    machine = Machine([TANK], identities())
    probes, _ = look(folder, machine)
    assert probes == Probes(snapshots=dict.fromkeys(identities(), Presence.OURS))
    assert machine.asked == ["pools", "identities"]


def test_probe_of_one_that_is_gone(folder: RunFolder) -> None:
    """Before one is said to be gone it is asked once more whether its pool is there."""
    found = identities()
    first, second = found
    machine = Machine([TANK], {first: found[first]})
    probes, seen = look(folder, machine)
    assert probes == Probes(
        snapshots={first: Presence.OURS, second: Presence.ABSENT}, equal_createtxg=True
    )
    assert seen == {first: found[first]}
    assert machine.asked == ["pools", "identities", "pools"]


def test_probe_of_two_moments(folder: RunFolder) -> None:
    """Snapshots that are not of one moment are seen to be so."""
    found = identities(mark=RUN)
    second = list(found)[1]
    found[second] = replace(found[second], createtxg="8")
    probes, _ = look(folder, Machine([TANK], found))
    assert not probes.equal_createtxg


def test_probe_of_an_exported_pool(folder: RunFolder) -> None:
    """Promise 2: a pool that is not imported is asked nothing; the client's end still counts."""
    write_end(folder, attempt=2)
    machine = Machine([], {})
    probes, _ = look(folder, machine)
    assert probes.trouble == "pool tank is not imported"
    assert probes.ended is not None
    assert machine.asked == ["pools"]


def test_probe_of_a_pool_that_goes_away(folder: RunFolder) -> None:
    """Promise 2: what is not found since its pool was exported a moment ago is not gone."""

    class Exported(Machine):
        def identities(self, names: Collection[str]) -> dict[str, Identity]:
            self._pools, self._found = [], {}
            return super().identities(names)

    write_end(folder, attempt=2)
    probes, seen = look(folder, Exported([TANK], identities()))
    assert probes.trouble == "pool tank is not imported"
    assert probes.ended is not None
    assert not probes.snapshots
    assert not seen


@pytest.mark.parametrize(
    ("signum", "stopped"), [(signal.SIGTERM, True), (signal.SIGINT, False), (None, False)]
)
def test_probe_of_an_end(folder: RunFolder, signum: int | None, stopped: bool) -> None:
    """The end of the newest attempt is seen; a shutdown's SIGTERM is told from a stop for good."""
    write_end(folder, attempt=2, stopped=signum)
    probes, _ = look(folder, Machine([TANK], identities()))
    assert probes.ended == Ended(Outcome.FAILED, "timeout", retriable=True, stopped=stopped)


def test_probe_of_an_older_end(folder: RunFolder) -> None:
    """The end of an older attempt is none."""
    write_end(folder, attempt=1)
    probes, _ = look(folder, Machine([TANK], identities()))
    assert probes.ended is None


def test_probe_of_a_living_runner(folder: RunFolder) -> None:
    """Promise 6: while the runner lives nothing else is asked."""
    machine = Machine([TANK], {})
    with locks.acquired(folder.runner_lock):
        assert look(folder, machine) == (Probes(runner_alive=True), {})
    assert machine.asked == []


# -- who lives -------------------------------------------------------------------------------

Start = Callable[..., "subprocess.Popen[str]"]

CLIENT = """
    import os, signal, sys, time
    from pathlib import Path
    from atomtx import locks

    lock, how = sys.argv[1:]
    held = locks.try_acquire(Path(lock))
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(1000)
"""
# Has closed everything that it could have inherited, and left nothing but its namespace.
DAEMON = """
    import os, sys, time
    from atomtx.mounts import namespace

    source, where, how = sys.argv[1:]
    namespace.enter()
    namespace.mount(source, where, "tmpfs", 0)
    os.setsid()
    print("ready", flush=True)
    os.closerange(0, 256)
    time.sleep(1000)
"""


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *args: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        argv = [sys.executable, "-c", textwrap.dedent(code), *args]
        child = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_nobody(folder: RunFolder) -> None:
    """Of a run that died alone nobody lives, and there is nobody to end."""
    told: list[str] = []
    assert survivors(a_run(), folder) == []
    end_survivors(a_run(), folder, told.append)
    assert told == []


def test_holder_of_c(folder: RunFolder, start: Start) -> None:
    """Promise 6: who holds C lives, is seen, named and ended."""
    client = start(CLIENT, str(folder.client_lock), "")
    machine = Machine([TANK], {})
    assert survivors(a_run(), folder) == [client.pid]
    assert look(folder, machine) == (Probes(client_alive=True), {})
    told: list[str] = []
    end_survivors(a_run(), folder, told.append)
    assert client.wait(PATIENCE_S) == -signal.SIGTERM
    (line,) = told
    assert line.startswith(f"ending what the interrupted run left behind: {client.pid} (")
    assert machine.asked == []


def test_stubborn(folder: RunFolder, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not end on SIGTERM is killed."""
    monkeypatch.setattr("atomtx.probing._END_S", 0.5)
    client = start(CLIENT, str(folder.client_lock), "stubborn")
    end_survivors(a_run(), folder, lambda _: None)
    assert client.wait(PATIENCE_S) == -signal.SIGKILL


def test_one_who_looks(folder: RunFolder, start: Start) -> None:
    """Promise 6: a process that has C's file open while nobody holds C is none of the run's."""
    code = "import sys, time; f = open(sys.argv[1]); print('ready', flush=True); time.sleep(1000)"
    other = start(code, str(folder.client_lock))
    assert survivors(a_run(), folder) == []
    end_survivors(a_run(), folder, lambda _: None)
    assert other.poll() is None


@as_root
def test_daemon(folder: RunFolder, start: Start) -> None:
    """Promise 6: who closed every descriptor is still seen in the run's namespace, and ended."""
    daemon = start(DAEMON, f"atomtx-{RUN}", str(folder.marker), "")
    assert not locks.is_held(folder.client_lock)
    assert survivors(a_run(), folder) == [daemon.pid]
    end_survivors(a_run(), folder, lambda _: None)
    assert daemon.wait(PATIENCE_S) == -signal.SIGTERM


@as_root
@pytest.mark.parametrize(
    "source",
    [f"tank/a@atomtx-{RUN}", f"atomtx-{OTHER}", "tmpfs", f"x-atomtx-{RUN}", f"atomtx-{RUN}x"],
    ids=["snapshot", "another run's", "nothing", "longer before", "longer behind"],
)
def test_foreign_namespace(folder: RunFolder, start: Start, tmp_path: Path, source: str) -> None:
    """
    Promise 2: a service that sees our snapshot mounted is not ours, and is not ended.

    What somebody mounts on the host, by hand or by a look into `.zfs/snapshot`, appears in the
    namespace of every service.
    """
    (tmp_path / "place").mkdir()
    service = start(DAEMON, source, str(tmp_path / "place"), "")
    assert survivors(a_run(), folder) == []
    end_survivors(a_run(), folder, lambda _: None)
    assert service.poll() is None


@as_root
def test_at_work(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many runs each has its own processes, and the machine is looked at as often as for one."""
    looks: list[int] = []
    real = system.here.pids

    def counted() -> list[int]:
        looks.append(1)
        return real()

    monkeypatch.setattr(system.here, "pids", counted)
    assert at_work([RUN]) == {RUN: []}
    once = len(looks)
    runs = {run: RunFolder.of(prepare(tmp_path / run), run).make() for run in (RUN, OTHER)}
    clients = {run: start(CLIENT, str(runs[run].client_lock), "").pid for run in runs}
    daemon = start(DAEMON, f"atomtx-{OTHER}", str(runs[OTHER].marker), "").pid
    nobody = [RunId.new() for _ in range(5)]
    looks.clear()
    assert at_work([*runs, *nobody]) == {
        RUN: [clients[RUN]],
        OTHER: sorted([clients[OTHER], daemon]),
        **{run: [] for run in nobody},
    }
    assert len(looks) == once


def test_unseen(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 6: C is held by nobody who can be seen: it lives, and nobody here can end it."""
    monkeypatch.setattr("atomtx.probing._END_S", 0.0)
    told: list[str] = []
    with locks.acquired(folder.client_lock):  # we are not looked at
        assert survivors(a_run(), folder) == []
        machine = Machine([TANK], {})
        assert look(folder, machine) == (Probes(client_alive=True), {})
        with pytest.raises(WaitingError, match="its client lives, and cannot be seen") as caught:
            end_survivors(a_run(), folder, told.append)
    assert caught.value.hint
    assert told == machine.asked == []
    assert not client_lives(a_run(), folder)


def test_unseen_for_an_instant(folder: RunFolder) -> None:
    """Who ends is not seen any more an instant before C is free: that is waited for."""
    held = locks.try_acquire(folder.client_lock)
    assert held is not None
    threading.Timer(0.5, os.close, [held]).start()
    end_survivors(a_run(), folder, lambda _: None)
    assert not client_lives(a_run(), folder)


def test_unseen_until_the_last_look(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ends when nobody waits for him any more has ended all the same."""
    held = locks.try_acquire(folder.client_lock)
    assert held is not None
    after_wait: Iterator[list[int]] = iter([[], [held]])

    def wait_until(*_: object, **__: object) -> bool:
        for descriptor in next(after_wait):
            os.close(descriptor)
        return False

    monkeypatch.setattr(locks, "wait_until", wait_until)
    end_survivors(a_run(), folder, lambda _: None)
    assert list(after_wait) == []


_ELSEWHERE = """
    import sys
    from pathlib import Path
    from atomtx.probing import client_lives, survivors
    from atomtx.statedir import RunFolder
    from tests.runs import RUN, a_run

    run = a_run()
    folder = RunFolder.of(Path(sys.argv[1]), sys.argv[2])
    print(client_lives(run, folder), survivors(run, folder))
"""


@as_root
def test_another_pid_namespace(folder: RunFolder) -> None:
    """Promise 6: a container with pids of its own and the same state directory is told the lock."""
    python = (sys.executable, "-c", textwrap.dedent(_ELSEWHERE))
    argv = ("unshare", "--pid", "--fork", "--mount-proc", *python, folder.path.parent.parent, RUN)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with locks.acquired(folder.client_lock):
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_cannot_be_ended(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 6: while one lives that cannot be ended, nothing is unmounted or destroyed."""
    monkeypatch.setattr("atomtx.probing._END_S", 0.0)
    monkeypatch.setattr("atomtx.probing.survivors", lambda *_: [4_000_000])
    with pytest.raises(EffectError, match=r"cannot be ended: \[4000000\]"):
        end_survivors(a_run(), folder, lambda _: None)

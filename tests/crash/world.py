"""
A stage with a pool of its own, and everybody else on the machine: who is not us.

They have snapshots, holds, mounts and processes with names like ours, take our snapshots away,
export the pool, set the clock, restart the machine.  `World.disorder` says what must never be so
while no command is at work.

It runs in the machine with the program's own Python, beside stage.py.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.crash.stage import LOOKALIKE, Stage
else:
    from stage import LOOKALIKE, Stage

TREE, NAMESPACE = "tree", "namespace"
PATIENCE_S = 60.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
_SIZE = "256M"
# It waits while somebody holds the gate shut, so that a test can kill others meanwhile.
CLIENT = """#!/bin/sh
set -e
: > {home}/at-work
while [ -e {home}/shut ]; do sleep 0.2; done
[ ! -e {home}/fails ] || exit 1
d=$(mktemp -d {home}/copies/new.XXXXXX)
cp -a --parents "$@" "$d"
mv "$d" "{home}/copies/done.${{d##*.}}"
"""


@dataclass(frozen=True)
class Row:
    """What the journal says of a run."""

    id: str
    job: str
    state: str
    outcome: str | None
    parked: bool
    attempts: int
    pid: int
    snapshots: tuple[str, ...]
    identified: bool  # guid and createtxg are journaled
    moment: int  # in which case it began

    @property
    def is_open(self) -> bool:
        return self.state != "destroyed"

    @property
    def token(self) -> str:
        return f"atomtx-{self.id}"


@dataclass(frozen=True)
class Snapshot:
    """What the pool says of a snapshot."""

    name: str
    guid: str
    holds: str

    @property
    def token(self) -> str:
        return self.name.partition("@")[2]


@dataclass
class World(Stage):
    """One worker's pool and state directory, with what is foreign in them."""

    foreign: set[Snapshot] = field(default_factory=set)
    mounts: set[str] = field(default_factory=set)  # foreign ones, by mountpoint
    processes: dict[int, int] = field(default_factory=dict)  # foreign: pid -> pidfd
    skew_s: int = 0  # of the wall clock, by us
    log: int = 2  # a descriptor
    begun: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Note what happens, with the seconds since the beginning."""
        passed = time.monotonic() - self.begun
        os.write(self.log, f"[{self.number} {passed:6.1f}] {text}\n".encode())

    # -- files with a meaning to the client ------------------------------------------------

    @property
    def gate(self) -> Path:
        return self.home / "shut"

    @property
    def failing(self) -> Path:
        return self.home / "fails"

    @property
    def disk(self) -> Path:
        return Path(f"/srv/{self.pool}.disk")

    # -- the scene -------------------------------------------------------------------------

    def build(self) -> None:
        """Make everything anew, by force."""
        self.forget_foreign()
        for point in Path("/mnt").glob(f"{self.pool}-*"):  # of a process that died
            ran("umount", str(point))
            point.rmdir()
        if self.state.exists():
            self.kill_all()
        self.unmount_ours()
        subprocess.run(["zpool", "destroy", "-f", self.pool], capture_output=True)
        self.disk.unlink(missing_ok=True)
        must("truncate", "-s", _SIZE, str(self.disk))
        must("zpool", "create", "-o", "cachefile=none", self.pool, str(self.disk))
        super().build()
        client = self.home / "client"
        client.write_text(CLIENT.format(home=self.home))
        must("zfs", "create", self.pool + "/other")
        must("zfs", "snapshot", f"{self.pool}/other@{LOOKALIKE}")
        must("zfs", "hold", LOOKALIKE, f"{self.pool}/other@{LOOKALIKE}")
        self.mount_foreign(LOOKALIKE)
        self.foreign = set(self.snapshots())

    def begin_moment(self) -> int:
        """Write new contents everywhere; what is copied from now on has the number."""
        self.moment += 1
        self._write(str(self.moment))
        return self.moment

    def forget_copies(self) -> None:
        for copy in self.copies.iterdir():
            must("rm", "-r", str(copy))

    def copied(self) -> set[tuple[str, int]]:
        """Return of which job and moment there is a whole copy; ValueError for any other."""
        found = set()
        for copy in self.copies.glob("done.*"):
            job = TREE if (copy / self.tree.relative_to("/")).exists() else NAMESPACE
            texts = sorted(path.read_text() for path in copy.rglob("file"))
            if len(texts) != 2 or len(set(texts)) != 1 or not texts[0].isdecimal():
                raise ValueError(f"a backup that is not of one moment: {texts} in {job}")
            found.add((job, int(texts[0])))
        return found

    # -- what is so ------------------------------------------------------------------------

    def snapshots(self) -> list[Snapshot]:
        lines = told("zfs", "list", "-Hpr", "-t", "snapshot", "-o", "name,guid,userrefs", self.pool)
        return [Snapshot(*line.split("\t")) for line in lines]

    def rows(self) -> list[Row]:
        """Return every run in the journal."""
        query = (
            "SELECT id, json_extract(plan, '$.root') <> '', state, outcome, cleanup IS NOT NULL,"
            " attempts, pid FROM runs"
        )
        volumes = "SELECT run, snapshot, snapshot_guid IS NOT NULL FROM volumes"
        path = self.state / "journal.db"
        if not path.exists():
            return []
        with closing(sqlite3.connect(path)) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                return []
            found = db.execute(query).fetchall()
            of = db.execute(volumes).fetchall()
        return [
            Row(
                *(id, TREE if in_tree else NAMESPACE, state, outcome, bool(parked), attempts, pid),
                snapshots=tuple(name for run, name, _ in of if run == id),
                identified=all(known for run, _, known in of if run == id),
                moment=self._moment_of(id),
            )
            for id, in_tree, state, outcome, parked, attempts, pid in found
        ]

    def open_rows(self) -> list[Row]:
        return [row for row in self.rows() if row.is_open]

    def disorder(self) -> Iterator[str]:
        """Tell what must not be so while no command is at work, the pool imported."""
        rows = self.rows()
        yield from self._disorder_in_journal(rows)
        opened = {row.token: row for row in rows if row.is_open}
        found = set(self.snapshots())
        for lost in self.foreign - found:
            yield f"not ours, but destroyed, or no longer held as it was: {lost}"
        for left in found - self.foreign:
            if left.token not in opened:
                yield f"ours without an open run: {left}"
        yield from self._disorder_in_kernel(opened)

    def _disorder_in_journal(self, rows: list[Row]) -> Iterator[str]:
        journal = self.journal()
        if journal["integrity"] != "ok":
            yield f"the journal is damaged: {journal['integrity']}"
        ended = {row.id for row in rows if not row.is_open}
        for step in journal["steps"]:
            if step["run"] in ended and not step["outcome"]:
                yield f"ended, but a step has no outcome: {step}"
        for job in (TREE, NAMESPACE):
            active = [row for row in rows if row.job == job and row.is_open and not row.parked]
            if len(active) > 1:
                yield f"more than one active run of the job {job}: {active}"
        for row in rows:
            if not row.is_open and row.outcome is None:
                yield f"ended without an outcome: {row}"

    def _disorder_in_kernel(self, opened: dict[str, Row]) -> Iterator[str]:
        shown = mounted_here()
        for point in self.mounts - set(shown):
            yield f"not ours, but unmounted: {point}"
        for point, source in shown.items():
            ours = source.startswith(f"{self.pool}/") and "@" in source and point not in self.mounts
            if ours and source.partition("@")[2] not in opened:
                yield f"mounted without an open run: {source} at {point}"
        if self.tree.exists() and not any(row.job == TREE for row in opened.values()):
            yield f"{self.tree} without an open run"
        if not opened and (left := self._ours()):
            yield f"processes without an open run: {left}"
        for pid, pidfd in self.processes.items():
            if has_ended(pidfd):
                yield f"not ours, but killed: process {pid}"

    # -- what others do --------------------------------------------------------------------

    def kill_all(self) -> None:
        """Kill every process of every run, as a crash of the machine does."""
        for pid in self._ours():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self._ours(), "processes of runs do not end")

    def _ours(self) -> set[int]:
        from atomtx import locks
        from atomtx.mounts import inhabitants

        found = set()
        for folder in self.state.glob("runs/*"):
            for name in ("front", "runner", "client"):
                lock = folder / f"{name}.lock"
                if lock.exists() and locks.is_held(lock):
                    found |= {process.pid for process in locks.holders(lock)}
        for row in self.rows():
            found |= set(inhabitants.of(row.token)) if row.is_open else set()
        return found

    def await_fronts(self) -> None:
        """Wait for the `zfs` commands of killed front ends, which hold lock F."""
        from atomtx import locks

        fronts = [folder / "front.lock" for folder in self.state.glob("runs/*")]
        wait_until(lambda: not any(map(locks.is_held, fronts)), "a lock F is still held")

    def set_clock(self, hours: int) -> None:
        """Set the wall clock forward, or back."""
        if hours:
            self.say(f"clock {hours:+} h")
        self.skew_s += hours * 3600
        time.clock_settime(time.CLOCK_REALTIME, time.time() + hours * 3600)

    def restore_clock(self) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() - self.skew_s)
        self.skew_s = 0

    def export_pool(self) -> None:
        """Export the pool, unmounting first what is mounted of it, as an admin has to."""
        if self.on_pool():
            must("umount", *reversed(self.on_pool()))
        wait_until(lambda: ran("zpool", "export", self.pool), "the pool cannot be exported")

    def on_pool(self) -> list[str]:
        """Return where snapshots of the pool are mounted on the host."""
        shown = mounted_here().items()
        return [p for p, source in shown if source.startswith(f"{self.pool}/") and "@" in source]

    def unmount_ours(self) -> None:
        for point in reversed(self.on_pool()):
            must("umount", point)

    def import_pool(self) -> None:
        must("zpool", "import", "-d", str(self.disk), "-o", "cachefile=none", self.pool)

    def restart_machine(self) -> None:
        """
        Do what a crash and a boot of the machine do, as far as runs see it.

        Every process of ours is killed, mounts of the host are gone, the pool is imported anew,
        /run is empty of our marks, and another file is mounted over the kernel's boot id.
        """
        self.kill_all()
        self.export_pool()
        must("rm", "-rf", "/run/atomtx")
        other = self.home / "boot-id"
        other.write_text(f"{uuid.uuid4()}\n")
        if str(_BOOT_ID) in mounted_here():
            must("umount", str(_BOOT_ID))
        must("mount", "--bind", str(other), str(_BOOT_ID))
        self.import_pool()

    def reuse_pid(self, pid: int) -> str:
        """Give the pid of a dead front end to a foreign process; return how that was done."""
        for _ in range(20):
            _LAST_PID.write_text(str(pid - 1))
            child = sleeper()
            if child == pid:
                self.processes[pid] = os.pidfd_open(pid)
                return "reused"
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        child = sleeper()
        self.processes[child] = os.pidfd_open(child)
        with closing(sqlite3.connect(self.state / "journal.db")) as db, db:
            db.execute("UPDATE runs SET pid = ? WHERE pid = ?", (child, pid))
        return "written"

    def take_away(self, row: Row, nth: int, again: str) -> bool:
        """
        Destroy a snapshot of a run, and make another with its name if *again*.

        "plain" is one without any mark, "marked" has the mark and the hold of the run.
        False where that is refused, because something uses it.
        """
        name = row.snapshots[nth % len(row.snapshots)]
        ran("zfs", "release", row.token, name)
        if not ran("zfs", "destroy", name):
            ran("zfs", "hold", row.token, name)
            return False
        if again == "plain":
            must("zfs", "snapshot", name)
        elif again == "marked":
            must("zfs", "snapshot", "-o", f"atomtx:run={row.id}", name)
            must("zfs", "hold", row.token, name)
        self.foreign |= {found for found in self.snapshots() if found.name == name}
        return True

    def make_foreign(self, row: Row, kind: str) -> None:
        """Make something foreign that has names of *row*."""
        before = set(self.snapshots())
        if kind == "snapshot":
            ran("zfs", "snapshot", f"{self.pool}/other@{row.token}")
        elif kind == "mark":
            name = f"{self.dataset}@foreign-{uuid.uuid4().hex[:6]}"
            must("zfs", "snapshot", "-o", f"atomtx:run={row.id}", name)
            must("zfs", "hold", row.token, name)
        else:
            self.mount_foreign(f"atomtx-{uuid.uuid4().hex[:16]}")
        self.foreign |= set(self.snapshots()) - before

    def mount_foreign(self, source: str) -> None:
        point = Path(f"/mnt/{self.pool}-{source}")
        point.mkdir(parents=True)
        must("mount", "-t", "tmpfs", source, str(point))
        self.mounts.add(str(point))

    def forget_foreign(self, keep: frozenset[Snapshot] = frozenset()) -> None:
        """Take foreign things away, but for what every stage has."""
        for snapshot in self.foreign - keep if keep else ():
            for hold in told("zfs", "holds", "-H", snapshot.name):
                must("zfs", "release", hold.split("\t")[1], snapshot.name)
            must("zfs", "destroy", snapshot.name)
        self.foreign &= keep
        for point in [p for p in self.mounts if not (keep and p.endswith(LOOKALIKE))]:
            ran("umount", point)
            Path(point).rmdir()
            self.mounts.remove(point)
        for pid, pidfd in self.processes.items():
            if not has_ended(pidfd):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pidfd)
        self.processes.clear()


def must(*argv: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stderr}"


def ran(*argv: str) -> bool:
    """Run a program; tell whether it did what it was told."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def told(*argv: str) -> list[str]:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout.splitlines()


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    from atomtx import locks

    assert locks.wait_until(condition, PATIENCE_S, step_s=0.1), otherwise


def mounted_here() -> dict[str, str]:
    """Return what is mounted on the host: mountpoint -> source."""
    from atomtx.mounts import mountinfo

    return {entry.mountpoint: entry.source for entry in mountinfo.read()}


def sleeper() -> int:
    """Start a process that nobody of ours knows; return its pid."""
    return subprocess.Popen(["sleep", "1000000"], cwd="/", start_new_session=True).pid


def has_ended(pidfd: int) -> bool:
    import select

    return bool(select.select([pidfd], [], [], 0)[0])

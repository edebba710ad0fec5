"""
A stage in the machine on which runs are killed, and what must be true afterwards.

A stage has datasets, a state directory, a client and a place for its copies of its own, so that
several can be used at once.  Each case begins with a new *moment*: a number in every file.  Before
a recovery the live files are changed, so that a copy of them would show.  The client copies what
it is given, whole or not at all.

It runs in the machine with the program's own Python and needs points.py beside it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bystanders import bystanders  # type: ignore[import-not-found]
from mixed import Mixed  # type: ignore[import-not-found]
from tracing import PATH, calls, tracer  # type: ignore[import-not-found]

HANGS_S = 240.0  # no command of these takes a tenth of it
DOCUMENTED = (0, 1, 2, 3, 4, 5, 6, 130, 143)  # exit statuses, see errors.py
LOOKALIKE = "atomtx-0123456789abcdef"  # our name, but not our mark
_FOREIGN = ("foreign", LOOKALIKE)
_CHILDREN = ("", "/b c")
# What a hook has in its hands is a file: `in-run`, `in-snapshot`.
_HOOK = """#!/bin/sh
cd {home}
case $1 in take) touch in-$ATOMTX_HOOK ;; let-go) rm -f in-$ATOMTX_HOOK ;; esac
echo "$ATOMTX_RUN $1 $ATOMTX_HOOK" >> hooked
"""
_CLIENT = """#!/bin/sh
set -e
test ! -e {home}/in-snapshot
test ! -e {home}/hooked || test -e {home}/in-run
d=$(mktemp -d {copies}/new.XXXXXX)
cp -a --parents "$@" "$d"
mv "$d" {copies}/done.$$
"""


@dataclass(frozen=True)
class Crashing:
    """How a command is disturbed: killed at a point, or a system call of it fails or kills it."""

    at: str = ""  # a point, see points.py
    who: str = "front"
    inject: str = ""  # such as "pwrite64:signal=KILL:when=3"; see strace(1)
    of: str = "front"  # the process that makes the system call: "front" or "runner"
    count: str = ""  # system calls to count, as strace names them


@dataclass(frozen=True)
class Ended:
    """A command that ended; *status* is its exit status, or minus the signal that ended it."""

    argv: tuple[str, ...]
    status: int
    output: str
    points: tuple[str, ...]
    calls: tuple[str, ...] = ()  # the system calls that were counted

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


@dataclass(frozen=True)
class Started:
    """A command that is at work; its files are in *folder*."""

    argv: tuple[str, ...]
    pid: int
    folder: Path

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")


@dataclass
class Stage:
    """One worker's datasets and everything else that it needs."""

    number: int
    pool: str = "tank"
    moment: int = 0
    violations: list[str] = field(default_factory=list)
    _seen: dict[str, int] = field(default_factory=dict)
    mixed: Mixed | None = None  # volumes of other kinds beside the datasets

    @property
    def dataset(self) -> str:
        return f"{self.pool}/w{self.number}"

    @property
    def root(self) -> Path:
        return Path("/", self.dataset)

    @property
    def home(self) -> Path:
        return Path(f"/srv/stage{self.number}")

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def copies(self) -> Path:
        return self.home / "copies"

    @property
    def tree(self) -> Path:
        return self.home / "tree"

    # -- before ----------------------------------------------------------------------------

    def build(self) -> None:
        """Make everything anew, by force."""
        self._tear_down()
        for child in _CHILDREN:
            _must("zfs", "create", self.dataset + child)
        for name in _FOREIGN:
            _must("zfs", "snapshot", f"{self.dataset}@{name}")
        self.copies.mkdir(parents=True)
        if self.mixed:
            self.mixed.build()
        client = self.home / "client"
        client.write_text(_CLIENT.format(home=self.home, copies=self.copies))
        hook = self.home / "hook"
        hook.write_text(_HOOK.format(home=self.home))
        for script in (client, hook):
            script.chmod(0o755)
        self.recover()  # makes the journal

    def take_all_kinds(self) -> None:
        """Have volumes of LVM, a btrfs and a directory that is read live from now on."""
        if not self.mixed:
            self.mixed = Mixed(self.number, self.home)
            self.mixed.build()

    def _tear_down(self) -> None:
        for pid in self._inside():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if f" {self.dataset}@" in line or f" {self.dataset}/b\\040c@" in line:
                subprocess.run(["umount", line.split()[4].replace("\\040", " ")])
        found = _lines("zfs", "list", "-Hr", "-t", "snapshot", "-o", "name,userrefs", self.dataset)
        for name, held in (line.split("\t") for line in found):
            if held != "0":
                for hold in _lines("zfs", "holds", "-H", name):
                    _must("zfs", "release", hold.split("\t")[1], name)
        if Path("/", self.dataset).exists():
            subprocess.run(["zfs", "destroy", "-R", self.dataset])
        Mixed(self.number, self.home).tear_down()
        shutil.rmtree(self.home, ignore_errors=True)

    def new_moment(self) -> None:
        """Begin a case: new contents everywhere, no copies."""
        self.moment += 1
        self.violations = []
        self._await_lvm()
        (self.home / "hooked").unlink(missing_ok=True)
        self._write(str(self.moment))
        for copy in self.copies.iterdir():
            shutil.rmtree(copy)

    def change_live_files(self) -> None:
        """
        Change what a run may not read any more: a backup of it is not one of the moment.

        A killed front end's `zfs snapshot` is let go on to its end first.
        """
        from atomtx import locks

        for lock in self.state.glob("runs/*/front.lock"):
            while any(p.command == "zfs" for p in locks.holders(lock)):
                time.sleep(0.1)
        self._await_lvm()
        self._write("live")

    def _await_lvm(self) -> None:
        while self.mixed and self.mixed.is_at_work():
            time.sleep(0.1)

    def _write(self, text: str) -> None:
        for child in _CHILDREN:
            Path(str(self.root) + child, "file").write_text(text)
        if self.mixed:
            self.mixed.write(text)

    # -- commands --------------------------------------------------------------------------

    def backup(self, crashing: Crashing, *options: str, client: str = "client") -> Ended:
        """Back up the stage's datasets."""
        words = ("backup", "-r", self.dataset, "--retries", "0", "--command")
        return self.run((*words, f"{self.home}/{client}", *options), crashing)

    def recover(self, crashing: Crashing | None = None, *options: str) -> Ended:
        """Recover what is open on this stage."""
        return self.run(("recover", *options), crashing or Crashing())

    def run(self, argv: Sequence[str], crashing: Crashing) -> Ended:
        """Run a command of the program in a forked child, to its end."""
        return self.wait(self.start(argv, crashing))

    def start(self, argv: Sequence[str], crashing: Crashing) -> Started:
        """Start a command of the program in a forked child."""
        folder = Path(tempfile.mkdtemp(prefix="command-", dir=self.home))
        files = {name: folder / name for name in ("output", "points", "trace")}
        for file in files.values():
            file.write_bytes(b"")
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._become(argv, crashing, files)
        return Started(tuple(argv), pid, folder)

    def wait(self, started: Started) -> Ended:
        """Wait for the end of a command, and tell how it ended."""
        status = self._await(started.pid, started.argv)
        ended = Ended(
            started.argv,
            status,
            started.output,
            tuple((started.folder / "points").read_text().splitlines()),
            tuple(calls(started.folder / "trace")),
        )
        shutil.rmtree(started.folder)
        return ended

    def _await(self, pid: int, argv: Sequence[str]) -> int:
        pidfd = os.pidfd_open(pid)
        try:
            import select

            if not select.select([pidfd], [], [], HANGS_S)[0]:
                self.violations.append(f"{argv[0]} hangs")
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _become(self, argv: Sequence[str], crashing: Crashing, files: Mapping[str, Path]) -> None:
        from points import Crash, fork_runner  # type: ignore[import-not-found]

        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        out = os.open(files["output"], os.O_WRONLY | os.O_APPEND)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        os.closerange(3, 1024)
        os.chdir("/")
        os.environ.clear()
        os.environ |= {"PATH": PATH, "LANG": "C.UTF-8", "ATOMTX_STATE_DIR": str(self.state)}
        crash = Crash(files["points"], at=crashing.at, who=crashing.who)
        crash.install()
        trace = tracer(files["trace"], inject=crashing.inject, count=crashing.count)
        fork_runner(crash, trace if crashing.of == "runner" else lambda: None)
        if crashing.of == "front":
            trace()
        _run_program(argv)

    # -- after -----------------------------------------------------------------------------

    def settle(self) -> list[Ended]:
        """Recover until nothing is open; then once more, which must change nothing."""
        tries = []
        for _ in range(4):
            tries.append(self.recover())
            self._check_ended(tries[-1])
            if tries[-1].status == 0:
                break
        before = self.journal()
        again = self.recover()
        if again.status != 0 or "nothing to recover" not in again.output:
            self.violations.append(f"recover again: {again.status} {again.output}")
        if self.journal() != before:
            self.violations.append("recover again changed the journal")
        return [*tries, again]

    def _check_ended(self, ended: Ended) -> None:
        if ended.status not in DOCUMENTED:
            self.violations.append(f"{ended.argv[0]} ended with {ended.status}: {ended.output}")
        elif "Traceback" in ended.output:
            self.violations.append(f"{ended.argv[0]} shows a traceback: {ended.output}")

    def check_disturbed(self, ended: Ended) -> None:
        """Check a command that was killed, or of which a system call failed."""
        if not ended.killed:
            self._check_ended(ended)
        for log in self.state.glob("runs/*/runner.log"):
            if "Traceback" in log.read_text(errors="replace"):
                self.violations.append(f"the runner shows a traceback: {log.read_text()}")

    def check(self) -> dict[str, Any] | None:
        """Check that nothing is left, lost or said to be done; return the case's run, if any."""
        self.violations += [*self._left_in_pool(), *self._left_in_kernel(), *self._left_locked()]
        self.violations += [f"a hook was not undone: {path}" for path in self.home.glob("in-*")]
        journal = self.journal()
        self.violations += _inconsistencies(journal)
        runs = [run for run in journal["runs"] if run["moment"] == self.moment]
        self.violations += self._wrong_copies(runs[-1] if runs else None)
        return runs[-1] if runs else None

    def _left_in_pool(self) -> Iterator[str]:
        listed = _lines("zfs", "list", "-Hr", "-t", "snapshot", "-o", "name,userrefs", self.dataset)
        expected = [f"{self.dataset}@{name}\t0" for name in _FOREIGN]
        for line in sorted(set(listed) - set(expected)):
            yield f"left in the pool: {line}"
        for line in sorted(set(expected) - set(listed)):
            yield f"not ours, but destroyed or held: {line}"

    def _left_in_kernel(self) -> Iterator[str]:
        for pid in self._inside():
            yield f"process {pid} still has a mount of a snapshot, or our client"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if f" {self.dataset}@" in line or f" {self.dataset}/b\\040c@" in line:
                yield f"mounted in the host: {line}"
        yield from self.mixed.left() if self.mixed else ()
        if self.tree.exists():
            yield f"{self.tree} is left"

    def _left_locked(self) -> Iterator[str]:
        from atomtx import locks

        for lock in self.state.glob("runs/*/*.lock"):
            if locks.is_held(lock):
                yield f"{lock} is still held"

    def _inside(self) -> list[int]:
        """Return the processes that see snapshots of the stage apart from the host, or are ours."""
        source = self.dataset.replace(" ", "\\040")
        client, host = f"{self.home}/client", os.readlink("/proc/self/ns/mnt")
        found, spaces = [], {host: False}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with suppress(OSError):
                space = os.readlink(entry / "ns/mnt")
                if space not in spaces:
                    table = (entry / "mountinfo").read_text()
                    spaces[space] = f" {source}@" in table or f" {source}/b\\040c@" in table
                    if self.mixed and not spaces[space]:
                        spaces[space] = any(map(self.mixed.shows, table.splitlines()))
                if spaces[space] or client in (entry / "cmdline").read_text().split("\0"):
                    found.append(int(entry.name))
        return found

    def _wrong_copies(self, run: Mapping[str, Any] | None) -> Iterator[str]:
        whole = list(self.copies.glob("done.*"))
        for copy in whole:
            found = sorted(p.read_text() for p in copy.rglob("file") if p.parent.name != "live")
            mixed = self.mixed and Path(f"{copy}{self.mixed.live}").exists()
            frozen = [*_CHILDREN, *(self.mixed.frozen if self.mixed and mixed else ())]
            if found != [str(self.moment)] * len(frozen):
                yield f"a backup that is not of the moment {self.moment}: {found}"
        if run is not None and run["outcome"] == "completed" and not whole:
            yield "completed, and there is no backup"

    def journal(self) -> dict[str, Any]:
        """Return the journal's rows, and what SQLite says of the file."""
        path = self.state / "journal.db"
        if not path.exists():
            return {"integrity": "ok", "runs": [], "steps": [], "moves": 0}
        with closing(sqlite3.connect(path)) as connection:
            connection.row_factory = sqlite3.Row
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                return {"integrity": "ok", "runs": [], "steps": [], "moves": 0}
            query = "SELECT id, state, rev, outcome, cleanup, attempts, label FROM runs"
            runs = [dict(row) for row in connection.execute(query + " ORDER BY started_at")]
            steps = connection.execute("SELECT id, run, kind, outcome FROM steps").fetchall()
            moves = connection.execute("SELECT count(*) FROM moves").fetchone()[0]
            (integrity,) = connection.execute("PRAGMA integrity_check").fetchone()
        return {
            "integrity": integrity,
            "runs": [run | {"moment": self._moment_of(run["id"])} for run in runs],
            "steps": [dict(step) for step in steps],
            "moves": moves,
        }

    def _moment_of(self, run: str) -> int:
        """Return in which case a run began: it is in that case's run that it was first seen."""
        return self._seen.setdefault(run, self.moment)


def _inconsistencies(journal: Mapping[str, Any]) -> Iterator[str]:
    if journal["integrity"] != "ok":
        yield f"the journal is damaged: {journal['integrity']}"
    for run in journal["runs"]:
        if run["state"] != "destroyed" or not run["outcome"]:
            yield f"run {run['id']} is not at its end: {run}"
    for step in journal["steps"]:
        if not step["outcome"]:
            yield f"step {step['id']} ({step['kind']}) of run {step['run']} has no outcome"


def _run_program(argv: Sequence[str]) -> None:
    from atomtx import cli

    status = 70
    try:
        cli.main(list(argv))
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if strangers := bystanders(sys.modules):
            print(f"loaded, but no part of the version in full.py: {sorted(strangers)}")
            status = 70
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _must(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def _lines(*argv: str) -> list[str]:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.stdout.splitlines()

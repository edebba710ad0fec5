"""Whole runs without a machine: the engine's own processes, on pools that are only played."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import sqlite3
import subprocess
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atomtx import clients, locks, plan, process, pruning
from atomtx.clients import Backup, End, Facts, Launch, Moment, Settings
from atomtx.clients.command import Command, CommandReader
from atomtx.errors import AtomtxError, ExitStatus, Interrupted
from atomtx.executor import Executor, Tell
from atomtx.interrupts import Interrupts
from atomtx.journal import Journal
from atomtx.mounts import mountinfo, namespace
from atomtx.names import RunId, is_within
from atomtx.plan import ClientPlan, Plan, PlannedVolume
from atomtx.records import Run
from atomtx.recovery import Decision
from atomtx.settling import Settler, front
from atomtx.statedir import RunFolder, prepare
from atomtx.states import Outcome
from tests import fakemount, fakezfs
from tests.runs import a_plan
from tests.standin import write_program
from tests.vm.points import Crash, fork_runner

HANGS_S = 60.0
NOW = 1_785_000_000  # when the first snapshot is taken, in seconds
_CLIENT = """#!/bin/sh
set -e
home={home}
echo "$PWD;$TMPDIR;$WORD;$*" >> $home/calls
! test -e $home/behaviour || . $home/behaviour
new=$(mktemp -d $home/copies/new.XXXXXX)
cp -a --parents "$@" "$new"
mv "$new" $home/copies/done.$$
"""


class Played(Command):
    """A client that tells more by its exit status: 3 is partial, 75 trouble of the network."""

    name = "played"

    def launch(self, settings: Settings, facts: Facts, moment: Moment) -> Launch:
        launch = super().launch(settings, facts, moment)
        word = f"{facts.version} {facts.repository} {moment.at.isoformat()} {moment.parent}"
        return Launch(launch.commands, launch.cwd, {"WORD": word})

    def reader(self, moment: Moment) -> CommandReader:
        return _Reader(moment)

    def forgetting(
        self, settings: Settings, facts: Facts, paths: tuple[str, ...], policy: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        forget = Path(settings.command[0]).with_name("forgetting").read_text()
        return ((forget, *policy),) if paths else ()

    def after_loss(self, settings: Settings, facts: Facts) -> tuple[str, ...]:
        return (f"mended {facts.repository} with {settings.command[0]}",)


class _Reader(CommandReader):
    def end_command(self, n: int, status: int) -> None:
        assert n == 0
        super().end_command(n, status)
        self.status = status

    def end(self) -> End:
        if self.status == 0:
            saved = Backup(self._targets, Outcome.COMPLETED, f"id{os.getpid()}", bytes_added=7)
            return End(Outcome.COMPLETED, backups=(saved,))
        if self.status == 3:
            return End(Outcome.PARTIAL, "unreadable", backups=(Backup((), Outcome.PARTIAL),))
        return End(Outcome.FAILED, f"status {self.status}", retriable=self.status == 75)


@dataclass
class Ended:
    """What a front end came to, and what it told; *status* is its process's."""

    status: int = 0
    run: Run | None = None
    interrupted: str | None = None
    raised: AtomtxError | None = None
    decisions: list[Decision] = field(default_factory=list)
    statuses: list[ExitStatus] = field(default_factory=list)  # one for each decision
    told: list[tuple[str, Any]] = field(default_factory=list)
    points: list[str] = field(default_factory=list)

    def said(self, kind: str) -> list[Any]:
        return [words for of_kind, words in self.told if of_kind == kind]


class Scene:
    """Datasets, a state directory and a client of one test's own."""

    hangs_s = HANGS_S  # a front end that takes longer is killed

    def __init__(self, home: Path) -> None:
        self.home = home
        self.state = prepare(home / "state")
        self.changes: list[Callable[[], object]] = []  # made in each front end before it begins
        self._write_pool(pools={}, txg=100, guid=2**63, now=NOW, snapshots={}, faults={})
        (home / "copies").mkdir()
        (home / "bin").mkdir()
        self.client = str(self._script("client", _CLIENT.format(home=home)))
        for name in ("zfs", "zpool"):
            write_program(home / "bin" / name, "fakezfs", f"{name!r}, sys.argv[1:]")

    def _script(self, name: str, text: str) -> Path:
        path = self.home / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    # -- what is there ---------------------------------------------------------------------

    @property
    def pool(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "pool.json").read_text())
        return found

    def _write_pool(self, **values: Any) -> None:
        (self.home / "pool.json").write_text(json.dumps(values))

    def play(self, **values: Any) -> None:
        """Change the pools: `faults`, `now`."""
        self._write_pool(**self.pool | values)

    def live(self, dataset: str) -> Path:
        return self.home / "live" / dataset

    def write(self, text: str, *datasets: str) -> None:
        """Write the one file of each live dataset."""
        for dataset in datasets:
            (self.live(dataset) / "file").write_text(text)

    def behave(self, script: str) -> None:
        """Have the client do this, in shell, before it copies."""
        (self.home / "behaviour").write_text(script)

    def plan(self, *datasets: str, client: str = "command", env: Any = (), **values: Any) -> Plan:
        """Return a plan over datasets, which are made with a file in each."""
        run = RunId.new()
        for dataset in datasets:
            if not self.live(dataset).exists():
                self.live(dataset).mkdir(parents=True)
                self.write("frozen", dataset)
        pools = {name: f"guid of {name}" for name in {d.split("/")[0] for d in datasets}}
        self.play(pools=self.pool["pools"] | pools)
        volumes = tuple(
            PlannedVolume(
                "zfs", p, pools[p], d, f"guid of {d}", str(self.live(d)), f"{d}@{run.token}"
            )
            for d, p in ((d, d.split("/")[0]) for d in datasets)
        )
        repository = "repo" if client == "played" else None
        command = ClientPlan(client, (self.client,), (), "/", "1.2", repository, env, ())
        targets = plan.targets(v.mountpoint for v in volumes)
        found: tuple[str, ...] = values.pop("found", ())  # by -r: the others were named
        named = tuple(v.mountpoint for v in volumes if v.name not in found)
        given = {"volumes": volumes, "targets": targets, "client": command, "named": named}
        return a_plan("tank/a", run=run, **given | values)

    # -- front ends ------------------------------------------------------------------------

    def backup(self, the_plan: Plan, at: str = "", who: str = "front", **options: Any) -> Ended:
        """Carry a plan out in a front end of its own, which may be killed at a point."""

        def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
            folder = RunFolder.of(self.state, the_plan.run).make()
            with front(folder) as lock:
                assert lock is not None
                run = journal.begin(the_plan, plan.first_intents(the_plan))
                made = Executor(journal, folder, front=lock, interrupts=interrupts, tell=tell)
                ended.run = made.advance(run)
                ended.interrupted = _words(made.interrupted)

        return self._in_front_end(work, {"at": at, "who": who, **options})

    def recover(self, at: str = "", who: str = "front", **options: Any) -> Ended:
        """Settle every open run in a front end of its own, with *options* of the settler."""

        def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
            for run in journal.open_runs():
                settled = Settler(journal, interrupts, tell, **options).settle(run)
                ended.run, ended.interrupted = settled.run, _words(settled.interrupted)
                ended.decisions.append(settled.decision)
                ended.statuses.append(settled.status)

        return self._in_front_end(work, {"at": at, "who": who})

    def prune(
        self,
        choose: Callable[[Ended], pruning.Choice],
        at: str = "",
        *,
        transient: bool = False,
        before: Callable[[], object] = lambda: None,
    ) -> Ended:
        """Choose and carry out in a front end of its own; *before* the effects, a change."""

        def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
            choice = choose(ended)
            if not choice.going:
                return
            folder = RunFolder.of(self.state, choice.plan.run).make()
            with front(folder) as lock:
                steps = pruning.intents(choice, bookmark=True, transient=transient)
                run = journal.begin(choice.plan, steps)
                before()
                try:
                    pruner = pruning.Pruner(journal, lock, interrupts, tell.step)
                    ended.run = pruner.advance(run)
                except Interrupted as exc:
                    ended.interrupted = exc.message

        return self._in_front_end(work, {"at": at})

    def _in_front_end(self, work: Callable[..., None], kill: dict[str, Any]) -> Ended:
        (self.home / "points").write_text("")
        answer = self.home / "answer"
        answer.unlink(missing_ok=True)
        _load_before_fork()
        pid = os.fork()
        if pid == 0:
            self._become(work, kill, answer)
        pidfd = os.pidfd_open(pid)
        hangs = not select.select([pidfd], [], [], self.hangs_s)[0]
        if hangs:
            os.kill(pid, signal.SIGKILL)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert not hangs, f"the front end hangs: {(self.home / 'points').read_text()}"
        ended: Ended = pickle.loads(answer.read_bytes()) if answer.exists() else Ended()
        ended.status = status
        ended.points = (self.home / "points").read_text().splitlines()
        at = kill.get("at", "")
        if status == -signal.SIGKILL and not at.startswith("#"):
            assert at in ["", *ended.points], f"killed, but never at {at}: {ended.points}"
        return ended

    def _become(self, work: Callable[..., None], kill: dict[str, Any], answer: Path) -> None:
        ended = Ended()
        try:
            os.setsid()
            log = os.open(self.home / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for target in (1, 2):
                os.dup2(log, target)
            self._play_along(Crash(self.home / "points", **kill))
            tell = Tell(
                lambda words: ended.told.append(("step", words)),
                lambda words: ended.told.append(("warn", words)),
                lambda progress: ended.told.append(("progress", progress)),
            )
            interrupts = _Interrupts(ended).install()
            with Journal.open(self.state) as journal:
                work(journal, tell, interrupts, ended)
        except AtomtxError as exc:
            ended.raised = exc
        except BaseException:
            traceback.print_exc()
            os._exit(70)
        try:
            answer.write_bytes(pickle.dumps(ended))
        except BaseException:
            traceback.print_exc()
            os._exit(71)
        os._exit(0)

    def _play_along(self, crash: Crash) -> None:
        """Put the played pools in the place of real ones, in this process and its runner."""
        fakezfs.HOME = str(self.home)
        os.environ.pop("TMPDIR", None)  # of whoever runs the tests
        path = f"{self.home}/bin:{process.BASE_ENVIRONMENT['PATH']}"
        process.BASE_ENVIRONMENT |= {"PATH": path, "FAKE_ZFS": str(self.home)}
        clients.KNOWN = {**clients.KNOWN, "played": "tests.scene:Played"}
        self._in_the_place_of_mounts()
        for change in self.changes:
            change()
        crash.install()
        fork_runner(crash)

    def _in_the_place_of_mounts(self) -> None:
        namespace.mount = fakemount.mount

    # -- after -----------------------------------------------------------------------------

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Ask the journal."""
        with closing(sqlite3.connect(self.state / "journal.db")) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query)]

    def run_sql(self, statement: str) -> None:
        """Change the journal behind the program's back."""
        with closing(sqlite3.connect(self.state / "journal.db")) as connection, connection:
            connection.execute(statement)

    def forget(self, which: str) -> None:
        """Let the journal forget runs, as it does with those that are old and not of use."""
        with Journal.open(self.state) as journal, journal._transaction() as connection:
            connection.exec_driver_sql(f"DELETE FROM runs WHERE {which}")

    def copies(self) -> list[str]:
        """Return what each whole copy of the client holds, one word a copy."""
        found = sorted((self.home / "copies").glob("done.*"), key=lambda p: p.stat().st_mtime_ns)
        return [" ".join(sorted(f.read_text() for f in copy.rglob("file"))) for copy in found]

    def calls(self) -> list[list[str]]:
        """Return for each start of the client where it stood, TMPDIR, WORD, its arguments."""
        path = self.home / "calls"
        return [line.split(";") for line in path.read_text().splitlines()] if path.exists() else []

    def zfs(self, verb: str) -> list[list[str]]:
        """Return the words of each `zfs` command of a kind."""
        found = [json.loads(line) for line in (self.home / "zfs.log").read_text().splitlines()]
        return [argv[2:] for argv in found if argv[:2] == ["zfs", verb]]

    def left(self) -> list[str]:
        """Return what is left of any run: snapshots, mounts, processes, locks, open runs."""
        found = list(self.pool["snapshots"])
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                table = Path("/proc", pid, "mountinfo").read_text()
            except OSError:
                continue
            found += [line for line in table.splitlines() if f"{self.home}/" in line]
        found += [str(f) for f in self.state.glob("runs/*/*.lock") if locks.is_held(f)]
        found += [str(row) for row in self.rows("SELECT * FROM runs WHERE state != 'destroyed'")]
        return found

    def close(self) -> None:
        """Kill and unmount what is left."""
        for lock in self.state.glob("runs/*/*.lock"):
            for holder in locks.holders(lock):
                with suppress(ProcessLookupError):
                    os.kill(holder.pid, signal.SIGKILL)
        for entry in reversed(mountinfo.read()):
            if is_within(entry.mountpoint, str(self.home)):
                subprocess.run(["umount", "-l", entry.mountpoint], check=False)


def _load_before_fork() -> None:
    """Load once what each front end would; a program that plays along may not need it at all."""
    import alembic.command  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401


def _words(interrupted: Interrupted | None) -> str | None:
    return interrupted.message if interrupted else None


class _Interrupts(Interrupts):
    """Tells how long it was to sleep, and does not."""

    def __init__(self, ended: Ended) -> None:
        super().__init__()
        self._ended = ended

    def sleep(self, seconds: float) -> None:
        self._ended.told.append(("sleep", seconds))
        self.check()

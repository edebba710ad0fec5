"""
Random histories of the whole engine on real ZFS, against a model of what may become of a run.

    python stateful_guest.py LOG --seed 1 --workers 2 --examples 5 --steps 6

Commands are killed at random points, alone and beside others, and everybody else on the machine
does what `world.World` can.  After each step nothing may be in disorder; at the end of each
history everything is settled.  The model knows which moment a run has, and whether it may still
complete: where all its snapshots were taken, and nothing but kills came between, it must.

LOG gets a line for each step, because no history on a real machine is exactly repeated: the same
seed makes the same wishes, not the same instants.  A worker's seed is SEED and its number.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

sys.path.insert(0, "/root")  # where the other files of the tests lie

import hypothesis
from hypothesis import HealthCheck, Phase, reproduce_failure, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

if TYPE_CHECKING:
    from tests.crash.stage import Crashing, Ended, Started
    from tests.crash.sweep import import_everything
    from tests.crash.world import NAMESPACE, TREE, Row, World, wait_until
else:
    from stage import Crashing, Ended, Started
    from sweep import import_everything
    from world import NAMESPACE, TREE, Row, World, wait_until

_FRONT_POINTS, _RUNNER_POINTS = 56, 14  # of an ordinary run; the longest has some more
_PROGRAMS = ("zpool list", "zfs list", "zfs snapshot", "zfs get", "zfs hold", "zfs program")
_AT_WORK = ("waiting for its end", "command reads", "at work")
_MAX_ATTEMPTS = 5

JOBS = st.sampled_from((NAMESPACE, TREE))
HOURS = st.sampled_from((0, 0, -30, -1, 1, 30))
FRONT = [f"#{n}" for n in (31, *range(1, _FRONT_POINTS + 1))]  # the first is tried always
RUNNER = [f"runner:#{n}" for n in range(1, _RUNNER_POINTS + 1)]
VICTIMS = ("front", "runner", "all")
_KILLS = [
    *(Crashing(at=at, who=who) for at in FRONT for who in VICTIMS),
    *(Crashing(at=at, who="all") for at in RUNNER * 3),
]
KILLS = st.sampled_from(_KILLS)
CRASHES = st.sampled_from(
    [
        *_KILLS,
        *(Crashing(at=at, who="front") for at in RUNNER),
        *(Crashing(at=f"start:{program}#1", who="child") for program in _PROGRAMS * 5),
        *(Crashing(at=at, who=who) for at in FRONT[::4] for who in ("signal 2", "signal 15")),
    ]
)
CALM = st.just(Crashing())
PAIRS = st.sampled_from(
    (
        ("recover", "recover"),
        ("recover", NAMESPACE),
        ("recover", TREE),
        (NAMESPACE, NAMESPACE),
        (NAMESPACE, TREE),
    )
)


@dataclass
class Expected:
    """What the model knows of a run."""

    taken: bool = False  # all its snapshots were seen
    excuses: set[str] = field(default_factory=set)  # why it may end without a backup
    outcome: str | None = None  # once it is known, it stands


class History(RuleBasedStateMachine):
    """One history on a worker's world."""

    world: ClassVar[World]
    broken: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, Expected] = {}
        self.outer = sys.exception()
        self.world.violations = []
        if History.broken:
            self.world.build()
        self.base = frozenset(self.world.foreign)
        self.old = {row.id for row in self.world.rows()}
        History.broken = True  # until its end was seen
        self.violations: list[str] = []
        self.world.say("history")

    # -- steps -----------------------------------------------------------------------------

    @initialize(job=JOBS, crash=KILLS)
    def begin(self, job: str, crash: Crashing) -> None:
        self._backup(job, crash)

    @rule(job=JOBS, crash=CRASHES)
    def backup(self, job: str, crash: Crashing) -> None:
        """Back up, and be killed, or not, at some point."""
        self._backup(job, crash)

    @rule(job=JOBS, killed=st.sampled_from(("", "front", "runner", "both", "all")), hours=HOURS,
          linger=st.booleans())  # fmt: skip
    def client_at_work(self, job: str, killed: str, hours: int, linger: bool) -> None:
        """Kill some of a run's processes while its client reads; it may go on until later."""
        world = self.world
        world.gate.touch()
        (world.home / "at-work").unlink(missing_ok=True)
        moment = world.begin_moment()
        started = self._start(job, Crashing())
        self._until_at_work(started, (world.home / "at-work").exists)
        world.set_clock(hours)
        self._kill(started, killed)
        if not (linger and killed in ("front", "both")):
            world.gate.unlink()
        self._end([(job, started, Crashing(), moment)], killed)
        world.change_live_files()

    @rule(crash=st.one_of(CALM, CRASHES), hours=HOURS, reuse=st.booleans(),
          option=st.sampled_from(("", "", "", "--no-wait")))  # fmt: skip
    def recover(self, crash: Crashing, hours: int, reuse: bool, option: str) -> None:
        """Recover, at another time of the wall clock, with the recorded pids in use by others."""
        self.world.set_clock(hours)
        if reuse:
            self._reuse_pids()
        self._commands([("recover", crash)], option)

    @rule(crash=st.one_of(CALM, CRASHES))
    def roll_back(self, crash: Crashing) -> None:
        """Recover at the user's word that nothing is to be resumed."""
        self._excuse("rollback")
        self._commands([("recover", crash)], "--rollback")

    @rule(pair=PAIRS, crash=st.one_of(CALM, CRASHES))
    def together(self, pair: tuple[str, str], crash: Crashing) -> None:
        """Start two commands at once, one of which may be killed."""
        self._commands([(pair[0], crash), (pair[1], Crashing())])

    @rule(fails=st.booleans())
    def client_changes(self, fails: bool) -> None:
        """From now on the client fails, or works again."""
        if fails:
            self.world.failing.touch()
        else:
            self.world.failing.unlink(missing_ok=True)
        self.world.say(f"client fails: {fails}")

    @rule(hours=HOURS)
    def restart(self, hours: int) -> None:
        self._quiet()
        self.world.restart_machine()
        self.world.set_clock(hours)
        self.world.say("restart")

    @rule(which=st.integers(0, 3), nth=st.integers(0, 1),
          again=st.sampled_from(("", "plain", "marked")))  # fmt: skip
    def take_away(self, which: int, nth: int, again: str) -> None:
        """Destroy a snapshot of an open run, and perhaps make another in its place."""
        row = self._pick(which)
        if not self.expected[row.id].taken:
            return
        again = again if row.identified else ""
        done = self.world.take_away(row, nth, again)
        self.world.say(f"take away {row.id} {row.state} {again}: {done}")
        if done:
            self.expected[row.id].excuses.add("destroyed")

    @rule(which=st.integers(0, 3), kind=st.sampled_from(("snapshot", "mark", "mount")))
    def foreign(self, which: int, kind: str) -> None:
        row = self._pick(which)
        self.world.make_foreign(row, kind)
        self.world.say(f"foreign {kind} like {row.id}")

    @rule(rollback=st.booleans())
    def export(self, rollback: bool) -> None:
        """Export the pool, see that recover waits and ends no run; import it again."""
        self._pick(0)
        self._quiet()
        opened = {row.id for row in self.world.open_rows()}
        self.world.export_pool()
        try:
            first = self._recover_away(rollback)
            # A run whose client's end is known is recorded first, and its cleanup parked.
            last = first if first in (0, 6) else self._recover_away(rollback)
        finally:
            self.world.import_pool()
        self._require(last == (6 if opened else 0), f"recover without the pool: {first}, {last}")
        left = {row.id for row in self.world.open_rows()}
        self._require(left == opened, f"ended without the pool: {opened - left}")

    # -- how steps are made ----------------------------------------------------------------

    def _backup(self, job: str, crash: Crashing) -> None:
        self._commands([(job, crash)])

    def _commands(self, wishes: Sequence[tuple[str, Crashing]], *options: str) -> None:
        """Run commands at once, to their ends; a client at the gate is let in by and by."""
        moment = self.world.begin_moment()
        started = [(what, self._start(what, c, *filter(None, options)), c, moment)
                   for what, c in wishes]  # fmt: skip
        if self.world.gate.exists() and "--no-wait" not in options:
            self._until_at_work(started[0][1], lambda: False)
            self.world.gate.unlink(missing_ok=True)
        self._end(started)
        self.world.change_live_files()

    def _start(self, what: str, crash: Crashing, *options: str) -> Started:
        if what == "recover":
            return self.world.start(("recover", *options), crash)
        tree = ("--layout", "tree", "--root", str(self.world.tree)) if what == TREE else ()
        words = ("backup", "-r", self.world.dataset, "--retries", "0", *tree)
        return self.world.start((*words, "--command", str(self.world.home / "client")), crash)

    def _until_at_work(self, started: Started, more: Callable[[], bool]) -> None:
        """Wait until a command has come to a client, or has ended."""
        pidfd = os.pidfd_open(started.pid)

        def is_there() -> bool:
            return more() or _ended(pidfd) or any(w in started.output for w in _AT_WORK)

        wait_until(is_there, f"{started.argv[0]} comes to no client")
        os.close(pidfd)

    def _kill(self, started: Started, killed: str) -> None:
        from atomtx import locks

        runners = [
            process.pid
            for lock in self.world.state.glob("runs/*/runner.lock")
            for process in locks.holders(lock)
        ]
        victims = [started.pid] if killed in ("front", "both") else []
        victims += runners if killed in ("runner", "both") else []
        for pid in victims:
            os.kill(pid, 9)
        if killed == "all":
            os.kill(started.pid, 9)
            self.world.kill_all()

    def _end(
        self, commands: Sequence[tuple[str, Started, Crashing, int]], killed: str = ""
    ) -> None:
        """Wait for commands that are at work, and judge what they said."""
        before = set(self.expected)
        ended = [self.world.wait(started) for _, started, _, _ in commands]
        self.world.await_fronts()
        rows = {row.id: row for row in self.world.rows() if row.id not in self.old}
        for row in rows.values():
            self.expected.setdefault(row.id, Expected())
        self._excuse_for(commands)
        self._see(rows)
        words = [what for what, _, _, _ in commands]
        for (what, _, crash, moment), each in zip(commands, ended, strict=True):
            last = each.points[-1] if each.points else ""
            wish = f" {crash.who} at {crash.at}" if crash.at else ""
            name = " ".join(each.argv) if what == "recover" else what
            self.world.say(f"{name}{wish}{' ' + killed if killed else ''}: {each.status} {last}")
            self.world.check_disturbed(each)
            new = [r for r in rows.values() if r.id not in before and what == r.job]
            in_the_way = what != "recover" and (words.count(what) > 1 or "recover" in words)
            self._judge(what, each, crash, moment, new, may_be_busy=in_the_way)
        for row in rows.values():
            self.world.say(f"  {row.id} {row.job} {row.state} {row.outcome} {row.attempts}")

    def _excuse_for(self, commands: Sequence[tuple[str, Started, Crashing, int]]) -> None:
        for _, _, crash, _ in commands:
            if crash.who.startswith("signal"):
                self._excuse("interrupted")
            elif crash.who == "child":
                self._excuse("a program failed under a front end that lives")
        if self.world.failing.exists():
            self._excuse("the client fails")

    def _excuse(self, why: str) -> None:
        """No open run has to be completed any more."""
        for row in self.world.rows():
            if row.id in self.expected:
                self.expected[row.id].excuses.add(why)

    def _see(self, rows: Mapping[str, Row]) -> None:
        there = {snapshot.name for snapshot in self.world.snapshots()}
        for row in rows.values():
            if row.snapshots and there.issuperset(row.snapshots):
                self.expected[row.id].taken = True

    def _judge(self, what: str, ended: Ended, crash: Crashing, moment: int, new: list[Row],
               *, may_be_busy: bool) -> None:  # fmt: skip
        """Check what a command said against the journal."""
        if ended.killed:
            return
        said = f"{what} ended with {ended.status}: {ended.output}"
        disturbed = crash.at != "" or self.world.failing.exists()
        allowed = {0, 1, 130, 143} if disturbed else {0, 1}
        if may_be_busy:
            allowed.add(5)
        self._require(ended.status in allowed, f"unexpected: {said}")
        if what == "recover" or ended.status != 0:
            return
        done = [row for row in new if row.moment == moment and row.outcome == "completed"]
        self._require(bool(done), f"no run is completed: {said}")

    def _recover_away(self, rollback: bool) -> int:
        started = self.world.start(("recover", *(["--rollback"] if rollback else [])), Crashing())
        ended = self.world.wait(started)
        self.world.check_disturbed(ended)
        if rollback:
            self._excuse("rollback")
        self.world.say(f"recover while exported: {ended.status}")
        return int(ended.status)

    def _reuse_pids(self) -> None:
        for row in self.world.open_rows():
            if row.pid not in self.world.processes:
                self.world.say(f"pid {row.pid} of {row.id} {self.world.reuse_pid(row.pid)}")

    def _quiet(self) -> None:
        self.world.gate.unlink(missing_ok=True)
        self.world.kill_all()
        if self.world.failing.exists():
            self._excuse("the client fails")

    def _pick(self, which: int) -> Row:
        """Return an open run; where there is none, begin one."""
        if not self.world.open_rows():
            self._backup(NAMESPACE, Crashing(at="journal:mounted#1", who="all"))
        rows = self.world.open_rows()
        return rows[which % len(rows)]

    # -- what must be so -------------------------------------------------------------------

    def _require(self, so: bool, otherwise: str) -> None:
        if not so:
            self.violations.append(otherwise)

    @invariant()
    def nothing_is_wrong(self) -> None:
        """See that nothing is in disorder, lost, or said to be done that is not."""
        found = [*self.violations, *self.world.violations, *self.world.disorder()]
        copied = self.world.copied()
        for row in self.world.rows():
            if row.id not in self.old:
                found += self._wrong(row, copied)
        if found:
            self.world.say("WRONG: " + "\n".join(found))
        assert not found, "\n".join(found)

    def _wrong(self, row: Row, copied: set[tuple[str, int]]) -> list[str]:
        expected = self.expected[row.id]
        if expected.outcome not in (None, row.outcome):
            return [f"its outcome was {expected.outcome}: {row}"]
        expected.outcome = row.outcome
        if row.outcome == "completed":
            there = (row.job, row.moment) in copied
            return [] if there else [f"completed, and there is no backup: {row}"]
        must = expected.taken and not expected.excuses and row.attempts < _MAX_ATTEMPTS
        if row.outcome is not None and must:
            return [f"could have been completed: {row}"]
        return []

    def teardown(self) -> None:
        """Settle everything; then nothing is left."""
        world = self.world
        world.restore_clock()
        if History.broken and self._failed():
            return
        world.gate.unlink(missing_ok=True)
        if world.failing.exists():
            self._excuse("the client fails")
        world.failing.unlink(missing_ok=True)
        ended = world.settle()
        self.world.say(f"settle: {[each.status for each in ended]}")
        self.nothing_is_wrong()
        opened = [row for row in world.rows() if row.is_open]
        assert not opened, f"not settled: {opened}"
        world.forget_foreign(self.base)
        world.forget_copies()
        History.broken = False

    def _failed(self) -> bool:
        return sys.exception() is not self.outer


def _ended(pidfd: int) -> bool:
    import select

    return bool(select.select([pidfd], [], [], 0)[0])


def main(argv: Sequence[str]) -> int:
    """Let some workers go through histories; 0 if all was well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--blob", help="go once through the history that a failure printed")
    options = parser.parse_args(argv)
    import_everything()
    log = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    children = [_fork_worker(n, options, log) for n in range(options.workers)]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _fork_worker(number: int, options: Any, log: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        History.world = World(number, pool=f"pool{number}", log=log)
        wished = settings(
            max_examples=options.examples,
            stateful_step_count=options.steps,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        chosen = seed(options.seed * 1000 + number)(History)
        if options.blob:
            chosen = reproduce_failure(hypothesis.__version__, options.blob.encode())(chosen)
        run_state_machine_as_test(chosen, settings=wished)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
Many commands at once in one state directory, with `atomtx recover` in a loop beside them.

    python crowd_guest.py --jobs 20

First as many backups of as many jobs, then as many of one job: without --wait one wins and the
others end while it is at work; with --wait all complete in turn.  No run may be disturbed, and
nobody may be shown an error of the journal.

It runs in the machine with the program's own Python, beside stage.py and world.py.
"""

from __future__ import annotations

import argparse
import os
import select
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, "/root")  # where the other files of the tests lie

if TYPE_CHECKING:
    from tests.crash.stage import Crashing, Ended, Stage, Started
    from tests.crash.sweep import import_everything
    from tests.crash.world import CLIENT, PATIENCE_S, must
else:
    from stage import Crashing, Ended, Stage, Started
    from sweep import import_everything
    from world import CLIENT, PATIENCE_S, must

# What a user must not read of the journal because somebody else is at work with it.
_ERRORS = ("Traceback", "database is locked", "was moved by another process", "is damaged")
_DISTURBS = ("resuming", "rolling back", "ending what", "waiting for its end")


class Crowd(Stage):
    """Some small datasets, a job each."""

    recoveries: Counter[int]  # by exit status

    def build_jobs(self, count: int) -> None:
        self.build()
        (self.home / "client").write_text(CLIENT.format(home=self.home))
        for n in range(count):
            must("zfs", "create", self.job(n))
            Path("/", self.job(n), "file").write_text(self.job(n))

    def job(self, n: int) -> str:
        return f"{self.dataset}/j{n}"

    def start_backup(self, n: int, *options: str) -> Started:
        words = ("backup", self.job(n), "--command", str(self.home / "client"), *options)
        return self.start(words, Crashing())

    def together(self, started: Sequence[Started], *, gate: bool = False) -> list[Ended]:
        """
        Wait for commands, with one `recover` after the other beside them.

        With a *gate*, the client is let go when all but one have ended.
        """
        waiting = {os.pidfd_open(each.pid): each for each in started}
        ended: list[Ended] = []
        pidfd, recovery = self._start_recovery()
        end = time.monotonic() + 30 * PATIENCE_S
        while waiting and time.monotonic() < end:
            if gate and len(waiting) == 1:
                (self.home / "shut").unlink(missing_ok=True)
            for ready in select.select([*waiting, pidfd], [], [], 1.0)[0]:
                os.close(ready)
                if ready == pidfd:
                    self._check_recovery(self.wait(recovery))
                    pidfd, recovery = self._start_recovery()
                else:
                    ended.append(self.wait(waiting.pop(ready)))
        for left in waiting.values():
            self.violations.append(f"{left.argv} comes to no end: {left.output}")
        os.close(pidfd)
        self._check_recovery(self.wait(recovery))
        for each in ended:
            self._check_words(each)
        return ended

    def _start_recovery(self) -> tuple[int, Started]:
        started = self.start(("recover",), Crashing())
        return os.pidfd_open(started.pid), started

    def _check_recovery(self, ended: Ended) -> None:
        self.recoveries[ended.status] += 1
        self._check_words(ended)
        if ended.status != 0 or any(word in ended.output for word in _DISTURBS):
            self.violations.append(f"recover does more than look: {ended}")

    def _check_words(self, ended: Ended) -> None:
        if any(error in ended.output for error in _ERRORS):
            self.violations.append(f"{ended.argv} shows {ended.output}")

    def check_runs(self, expected: Counter[str]) -> None:
        """See that as many runs of each job as *expected* are completed, undisturbed."""
        with closing(sqlite3.connect(self.state / "journal.db")) as db:
            rows = db.execute(
                "SELECT label, state, outcome, cleanup, attempts FROM runs"
            ).fetchall()
            resumed = db.execute("SELECT * FROM moves WHERE event = 'resumed'").fetchall()
        done = Counter(row[0] for row in rows if row[1:] == ("destroyed", "completed", None, 1))
        if done != expected or len(rows) != expected.total():
            self.violations.append(f"expected {expected}, and there is {rows}")
        if resumed:
            self.violations.append(f"resumed: {resumed}")
        self._check_copies(expected)
        # A snapshot that is still mounted anywhere could not have been destroyed.
        self.violations += [*self._left_in_pool(), *self._left_in_kernel(), *self._left_locked()]

    def _check_copies(self, expected: Counter[str]) -> None:
        found = Counter(self._copied())
        if found != expected:
            self.violations.append(f"expected the copies {expected}, and there are {found}")

    def _copied(self) -> Iterator[str]:
        """Return for each copy the dataset whose file it has, and nothing else."""
        for copy in self.copies.glob("done.*"):
            files = [path for path in copy.rglob("*") if path.is_file()]
            yield "; ".join(path.read_text() for path in files)


def main(argv: Sequence[str]) -> int:
    """Let a crowd work; 0 if nobody was in another's way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=20)
    count = parser.parse_args(argv).jobs
    import_everything()
    crowd = Crowd(1)
    crowd.recoveries = Counter()
    crowd.build_jobs(count)
    begun = time.monotonic()
    for name, play in (("many jobs", many_jobs), ("one job", one_job), ("in turn", in_turn)):
        statuses = Counter(ended.status for ended in play(crowd, count))
        passed = time.monotonic() - begun
        print(f"{passed:6.1f} s  {name}: {statuses}, recoveries {crowd.recoveries}", flush=True)
        if crowd.violations:
            print(*crowd.violations, sep="\n")
            return 1
    return 0


def many_jobs(crowd: Crowd, count: int) -> list[Ended]:
    """As many jobs at once."""
    ended = crowd.together([crowd.start_backup(n) for n in range(count)])
    _require(crowd, ended, Counter({0: count}))
    crowd.check_runs(Counter(crowd.job(n) for n in range(count)))
    return ended


def one_job(crowd: Crowd, count: int) -> list[Ended]:
    """One job as often at once: one wins, and the others end while it is at work."""
    (crowd.home / "shut").touch()
    ended = crowd.together([crowd.start_backup(0) for _ in range(count)], gate=True)
    _require(crowd, ended, Counter({0: 1, 5: count - 1}))
    crowd.check_runs(Counter(crowd.job(n) for n in range(count)) + Counter([crowd.job(0)]))
    return ended


def in_turn(crowd: Crowd, count: int) -> list[Ended]:
    """The same, each waiting for its turn."""
    ended = crowd.together([crowd.start_backup(0, "--wait") for _ in range(count)])
    _require(crowd, ended, Counter({0: count}))
    once = Counter(crowd.job(n) for n in range(count))
    crowd.check_runs(once + Counter({crowd.job(0): count + 1}))
    return ended


def _require(crowd: Crowd, ended: Sequence[Ended], statuses: Counter[int]) -> None:
    if Counter(each.status for each in ended) != statuses:
        crowd.violations += [f"{e.status}: {e.output}" for e in ended if e.status not in (0, 5)]
        crowd.violations.append(f"expected {statuses}: {Counter(e.status for e in ended)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

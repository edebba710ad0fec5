"""
Make a journal with many runs that ended: many_runs.py STATE_DIRECTORY COUNT [forget].

With `forget` it then tells how long others wait while as many as are forgotten at once are.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from atomtx import statedir
from atomtx.database import make_engine
from atomtx.journal import Journal

# Each with what undoes it, as a backup has them.
_STEPS = (
    ("take-snapshots", "destroy-snapshots"),
    ("hold-snapshots", "release-snapshots"),
    ("mount-volumes", "unmount-volumes"),
    ("run-client", "end-client"),
)


def main(state: Path, count: int) -> None:
    """Fill a fresh journal by SQL."""
    statedir.prepare(state)
    with Journal.open(state) as journal:
        path = journal.path
    now = int(time.time() * 1e6)
    with make_engine(path).begin() as connection:
        connection.exec_driver_sql(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO runs (id, verb, job, label, state, rev, outcome, attempts, plan, client,"
            " started_at, ended_at, boot_id, pid, bytes_added)"
            " SELECT printf('%016x', i), 'backup', 'job', 'tank/home', 'destroyed', 5, 'completed',"
            " 1, '{}', 'restic', ? - i * 60000000, ? - i * 60000000 + 9000000, 'boot', 1, i FROM n",
            (count, now, now),
        )
        connection.exec_driver_sql(
            "INSERT INTO backups (run, n, path, backup_id, outcome)"
            " SELECT id, 0, '/tank/home', id || id, 'completed' FROM runs"
        )
        for n, (kind, undo) in enumerate(_STEPS):
            for at, name, of in ((1, kind, None), (2, undo, 1)):
                connection.exec_driver_sql(
                    "INSERT INTO steps (id, run, attempt, kind, payload, compensates, intended_at,"
                    " ended_at, outcome) SELECT rowid * 8 + ?, id, 1, ?, '{}', rowid * 8 + ?,"
                    " started_at, ended_at, 'done' FROM runs",
                    (2 * n + at, name, None if of is None else 2 * n + of),
                )


def forget(state: Path) -> None:
    """Forget what is forgotten in one transaction, and tell how long it took."""
    with Journal.open(state) as journal:
        began = time.monotonic()
        count = journal.expire(0)
        print(f"{count} runs were forgotten in {time.monotonic() - began:.3f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if "forget" in sys.argv[3:]:
        forget(Path(sys.argv[1]))

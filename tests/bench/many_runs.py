"""Make a journal with many runs that ended: many_runs.py STATE_DIRECTORY COUNT."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from atomtx import statedir
from atomtx.database import make_engine
from atomtx.journal import Journal


def main(state: Path, count: int) -> None:
    """Fill a fresh journal by SQL."""
    statedir.prepare(state)
    with Journal.open(state) as journal:
        path = journal.path
    now = int(time.time() * 1e6)
    with make_engine(path).begin() as connection:
        connection.exec_driver_sql(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO runs (id, job, label, state, rev, outcome, attempts, plan, client,"
            " started_at, ended_at, boot_id, pid, bytes_added)"
            " SELECT printf('%016x', i), 'job', 'tank/home', 'destroyed', 5, 'completed', 1, '{}',"
            " 'restic', ? - i * 60000000, ? - i * 60000000 + 9000000, 'boot', 1, i FROM n",
            (count, now, now),
        )
        connection.exec_driver_sql(
            "INSERT INTO backups (run, n, path, backup_id, outcome)"
            " SELECT id, 0, '/tank/home', id || id, 'completed' FROM runs"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

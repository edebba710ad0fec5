"""
Writes and reads a journal in the machine, around a power cut; see test_power_cut.py.

    write STATE MARKS COUNT PRAGMA...   begin COUNT runs and move each; mark what was acknowledged
    open PART STATE PRAGMA...           mount PART, open the journal in it, print it, unmount PART
    peek STATE                          print the journal as a copy of its files tells it
    run WORDS...                        run atomtx with a journal that never waits for the disk

What is printed is JSON: {"runs": {id: [revision, state, outcome]}, "check": SQLite's verdict}.
It runs in the machine, with the program's own Python; see "script" in agent.py.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

sys.path.insert(0, "/root")  # where this file, points.py and tests/runs.py lie

from atomtx import cli, journalfile, plan
from atomtx.errors import JournalError
from atomtx.journal import Journal
from atomtx.names import RunId
from atomtx.statedir import prepare
from atomtx.states import Event

MOUNT = "/power"


def write(state: str, marks: str, count: str, *pragmas: str) -> None:
    """Make *count* runs, two commits each, in a new state directory."""
    from points import Marks  # type: ignore[import-not-found]
    from runs import a_plan  # type: ignore[import-not-found]

    journalfile.PRAGMAS = pragmas  # type: ignore[assignment]
    disk = Marks(marks)
    disk.write("nothing yet")  # a cut in the making of the journal counts too
    with Journal.open(prepare(Path(state))) as journal:
        for n in range(int(count)):
            the_plan = a_plan("tank/a", "tank/b", run=RunId(f"{n:016x}"), job=f"job {n}")
            run = journal.begin(the_plan, [plan.intents(the_plan)[0]])
            disk.write(f"committed {run.id} {run.rev}")
            with journal.change(run) as change:
                change.intend(plan.intents(the_plan)[0])
                change.fire(Event.SNAPSHOTS_TAKEN)
            disk.write(f"committed {run.id} {run.rev + 1}")


def open_journal(part: str, state: str, *pragmas: str) -> None:
    """Open the journal on the file system of *part* with the program's own code."""
    journalfile.PRAGMAS = pragmas  # type: ignore[assignment]
    mounted = subprocess.run(["mount", part, MOUNT], capture_output=True, text=True)
    if mounted.returncode:
        print(json.dumps({"runs": {}, "check": mounted.stderr}))
        return
    try:
        with Journal.open(prepare(Path(state))) as journal:
            tell(journal.path)
    except JournalError as exc:
        print(json.dumps({"runs": {}, "check": str(exc)}))
    finally:
        subprocess.run(["umount", MOUNT], check=True)


def peek(state: str) -> None:
    """Print the journal without a change of its files: SQLite mends what it opens."""
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        for path in Path(state).glob(f"{journalfile.NAME}*"):
            shutil.copy(path, folder)
        tell(Path(folder, journalfile.NAME))


def tell(path: Path) -> None:
    """Print the journal at *path*; one that was never filled has no runs."""
    with closing(sqlite3.connect(path)) as connection:
        check = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        has_runs = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'runs'").fetchone()
        query = "SELECT id, rev, state, outcome FROM runs"
        rows = connection.execute(query).fetchall() if has_runs else []
    print(json.dumps({"runs": {row[0]: row[1:] for row in rows}, "check": check}))


def careless(*words: str) -> None:
    """Run the program with a journal whose commits wait for nothing: a control."""
    journalfile.PRAGMAS = ("journal_mode=MEMORY", "synchronous=OFF")
    cli.main(list(words))


COMMANDS: dict[str, Callable[..., None]] = {
    "write": write,
    "open": open_journal,
    "peek": peek,
    "run": careless,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])

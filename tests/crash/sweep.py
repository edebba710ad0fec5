"""
Goes through cases in the machine: disturb a run, disturb its recovery, settle, check.

    python sweep.py CASES RESULTS --workers 2

CASES has a JSON object a line, RESULTS gets one for each, as it ends:

    {"id": "...", "scenario": "namespace", "run": {"at": ..., "who": ...}, "recover": {...}}
        -> {"id": ..., "ended": [...], "outcome": ..., "violations": [...], ...}

"run" and "recover" are fields of `stage.Crashing`; without "recover", no recovery is disturbed.
A case whose point is never passed is a violation too: it would prove nothing.  After a violation
the stage is built anew.  It runs in the machine with the program's own Python, beside points.py
and stage.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, "/root")  # where points.py and stage.py lie

from stage import Crashing, Ended, Stage  # type: ignore[import-not-found]

SCENARIOS: Mapping[str, Sequence[str]] = {
    "namespace": (),
    "tree": ("--layout", "tree", "--root", "{tree}"),
    "hooked": (
        *("--pre-hook", "{home}/hook take", "--post-hook", "{home}/hook let-go"),
        *("--quiesce", "{home}/hook take", "--thaw", "{home}/hook let-go"),
        *("--after-success", "{home}/hook tell", "--after-failure", "{home}/hook tell"),
    ),
    "mixed": (
        *("{home}/classic", "{home}/thin", "{home}/btrfs"),  # see mixed.py
        *("--read-live", "{home}/live"),
    ),
    "fresh": (),  # without a journal
}


def main(argv: Sequence[str]) -> int:
    """Go through all cases with some workers; 0 if each of these came to its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    cases = [json.loads(line) for line in options.cases.read_text().splitlines()]
    import_everything()
    source, sink = os.pipe()  # the numbers of the cases: whoever is free takes the next
    os.set_blocking(sink, False)
    os.write(sink, b"".join(n.to_bytes(2, "big") for n in range(len(cases))))
    os.close(sink)
    results = os.open(options.results, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    children = [_fork_worker(n, cases, source, results) for n in range(options.workers)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return int(any(statuses))


def import_everything() -> None:
    """Pay for the imports once, before the commands are forked."""
    import alembic.command  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401
    import transitions  # noqa: F401

    import atomtx.cli.backup
    import atomtx.cli.recover
    import atomtx.clients.command
    import atomtx.runner  # noqa: F401


def _fork_worker(number: int, cases: Sequence[Mapping[str, Any]], source: int, results: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _work(Stage(number), cases, source, results)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _work(stage: Stage, cases: Sequence[Mapping[str, Any]], source: int, results: int) -> None:
    stage.build()
    while number := os.read(source, 2):
        case = cases[int.from_bytes(number, "big")]
        begun = time.monotonic()
        result = play(stage, case)
        result |= {"id": case["id"], "seconds": round(time.monotonic() - begun, 1)}
        os.write(results, json.dumps(result).encode() + b"\n")
        if result["violations"]:
            stage.build()


def play(stage: Stage, case: Mapping[str, Any]) -> dict[str, Any]:
    """Go through one case."""
    options = [
        word.format(tree=stage.tree, home=stage.home) for word in SCENARIOS[case["scenario"]]
    ]
    if case["scenario"] == "mixed":
        stage.take_all_kinds()
    stage.new_moment()
    if case["scenario"] == "fresh":
        shutil.rmtree(stage.state)
    ended = [_disturbed(stage, case["run"], lambda c: stage.backup(c, *options))]
    stage.journal()  # which run is this case's
    stage.change_live_files()
    if "recover" in case:
        ended.append(_disturbed(stage, case["recover"], stage.recover))
    ended += stage.settle()
    run = stage.check()
    outcome = run and run["outcome"]
    if ended[0].status == 0 and outcome != "completed":
        stage.violations.append(f"backup said that it was done: {outcome}")
    failed = any("error=" in case.get(which, {}).get("inject", "") for which in ("run", "recover"))
    if "journal:snapshotted#1" in ended[0].points and not failed and outcome != "completed":
        stage.violations.append(f"the moment was there, and nothing but kills happened: {outcome}")
    return {
        "ended": [[e.argv[0], e.status, e.points, e.calls] for e in ended],
        "outcome": outcome,
        "attempts": run and run["attempts"],
        "violations": stage.violations,
    }


def _disturbed(
    stage: Stage, wish: Mapping[str, str], command: Callable[[Crashing], Ended]
) -> Ended:
    crashing = Crashing(**wish)
    ended = command(crashing)
    stage.check_disturbed(ended)
    if crashing.at and crashing.at not in ended.points:
        stage.violations.append(f"{ended.argv[0]} never passed {crashing.at}: {ended.output}")
    if crashing.inject and not _was_injected(crashing, ended):
        stage.violations.append(f"{ended.argv[0]} never came to {crashing.inject}")
    return ended


def _was_injected(crashing: Crashing, ended: Ended) -> bool:
    """Tell whether the call that was to be disturbed was made, and whether that has killed."""
    nth = int(crashing.inject.rpartition("when=")[2])
    kills_front = "signal=KILL" in crashing.inject and crashing.of == "front"
    return len(ended.calls) >= nth and (ended.status == -signal.SIGKILL or not kills_front)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

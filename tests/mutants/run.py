"""
`make mutants`: put defects into the engine, and see that the tests find each.

Two kinds: those of seeded.toml, of the sort that a good engineer makes by mistake, and every one
that mutmut makes of the modules below.  A mutant that no test finds must be listed in
survivors.toml with its reason; one that is listed and is found is an error, too.

    python -m tests.mutants.run [--jobs N] [--match TEXT] [--show] [GROUP...]

Groups are "seeded" and the modules.  `--show` tries nothing: it prints what is known.  Verdicts
are kept in `.mutants/`: the work can be stopped at any time, and goes on where it was.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .generated import mutants_of
from .results import Results, Trial
from .seeded import seeded
from .survivors import listed
from .trial import Bench, Verdict

# Which tests are asked about which module, the fastest first.
_RUNNER = ("tests/unit/test_runner.py", "-k", "not test_lines and not round_trip and not test_log")
TESTS = {
    "recovery": ("tests/unit/test_recovery.py",),
    "locks": ("tests/unit/test_locks.py", "tests/unit/test_probing.py"),
    "supervisor": _RUNNER,
    "runner": _RUNNER,
    "executor": ("tests/unit/test_executor.py",),
}
_TIMEOUT_S = 240.0


def main() -> int:
    options = _options()
    groups = options.groups or ["seeded", *TESTS]
    results = Results()
    trials = [t for group in groups for t in _trials(group) if options.match in t.key]
    if not options.show:
        _prove_whole(trials)
        _try_all([t for t in trials if results.of(t) is None], results, options.jobs)
    return _report(trials, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--match", default="", metavar="TEXT", help="only mutants with that text")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    return parser.parse_args()


def _trials(group: str) -> list[Trial]:
    if group == "seeded":
        return seeded()
    return [
        Trial(group, mutant.key, {mutant.path: mutant.source}, TESTS[group])
        for mutant in mutants_of(group)
    ]


def _prove_whole(trials: Sequence[Trial]) -> None:
    """See that the tests pass without a mutant: else each of them would seem to be found."""
    bench = Bench("whole")
    for tests in sorted({t.tests for t in trials if not t.in_machine}):
        verdict = bench.try_({}, tests, _TIMEOUT_S)
        if verdict.killer:
            raise SystemExit(f"without any mutant, {verdict.killer} fails")


def _try_all(trials: Sequence[Trial], results: Results, jobs: int) -> None:
    benches: queue.SimpleQueue[Bench] = queue.SimpleQueue()
    for n in range(jobs):
        benches.put(Bench(str(n)))

    def try_one(trial: Trial) -> None:
        bench = benches.get()
        try:
            verdict = bench.try_(trial.files, trial.tests, _TIMEOUT_S)
        finally:
            benches.put(bench)
        results.note(trial, verdict)
        print(f"{trial.key}\n    {_found_by(verdict)}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(try_one, trial) for trial in trials]:
            done.result()


def _found_by(verdict: Verdict | None) -> str:
    if verdict is None:
        return "not tried"
    return f"found by {verdict.killer}" if verdict.killer else "NOT FOUND"


def _report(trials: Sequence[Trial], results: Results) -> int:
    """Print the table and what is wrong in it; return the exit status."""
    known = listed()
    wrong: list[str] = []
    print("\n| group | mutants | found | listed survivors | not found | not tried |")
    print("| --- | --- | --- | --- | --- | --- |")
    for group in dict.fromkeys(t.group for t in trials):
        mine = [t for t in trials if t.group == group]
        verdicts = {t.key: results.of(t) for t in mine}
        found = [k for k, v in verdicts.items() if v and v.killer]
        lived = [k for k, v in verdicts.items() if v and not v.killer]
        unknown = [k for k in lived if k not in known]
        wrong += [f"not found, and not in survivors.toml: {k}" for k in unknown]
        wrong += [f"in survivors.toml, but found: {k}" for k in found if k in known]
        row = (len(mine), len(found), len(lived) - len(unknown), len(unknown))
        print(f"| {group} |", " | ".join(map(str, (*row, list(verdicts.values()).count(None)))), "|")
        if group == "seeded":
            seen = [f"  {k}: {_found_by(v)}" for k, v in verdicts.items()]
    if any(t.group == "seeded" for t in trials):
        print("", *seen, sep="\n")
    print("", *wrong, sep="\n")
    untried = any(results.of(t) is None for t in trials)
    return 1 if wrong or untried else 0


if __name__ == "__main__":
    sys.exit(main())

"""
`make mutants`: put defects into the engine, and see that the tests find each.

Two kinds: those of seeded.toml, of the sort that a good engineer makes by mistake, and every one
that mutmut makes of the modules below.  A mutant that no test finds must be listed in
survivors.toml with its reason; one that is listed and is found, or is not there any more, is an
error, too.

    python -m tests.mutants.run [--jobs N] [--match TEXT] [--show] [GROUP...]

Groups are "seeded" and the modules.  `--show` tries nothing: it prints what is known.  Verdicts
are kept in `.mutants/`: the work can be stopped at any time, and goes on where it was.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .focus import MODULES, WARM, tests_of
from .generated import mutants_of
from .results import Results, Trial
from .seeded import seeded
from .survivors import listed
from .trial import CHECKOUT, Bench, Verdict

_TIMEOUT_S = 420.0  # of one mutant, on a machine that is shared
_PROOF_S = 3600.0
_LIKELY = 3  # of the tests that found its neighbours, how many are asked first


def main() -> int:
    options = _options()
    known = listed()
    wrong: list[str] = []
    rows: list[str] = []
    for group in options.groups or ["seeded", *MODULES]:
        results = Results(group)
        made = _trials(group)
        wrong += [f"in survivors.toml, but no such mutant: {key}" for key in stale(group, made)]
        trials = [t for t in made if options.match in t.key]
        todo = [t for t in trials if results.of(t) is None]
        todo.sort(key=lambda t: t.key in known)  # last: each takes all of its tests
        if todo and not options.show:
            _try_all(group, todo, results, options.jobs)
            _prove(group, trials, results)
        rows.append(_row(group, trials, results, wrong))
    print("\n| group | mutants | found | listed survivors | not found | not tried |")
    print("| --- | --- | --- | --- | --- | --- |", *rows, "", *wrong, sep="\n")
    return 1 if wrong else 0


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
        Trial(
            mutant.key,
            {mutant.path: mutant.source},
            tests_of(group, mutant.function),
            mutant.body,
        )
        for mutant in mutants_of(group)
    ]


def stale(group: str, trials: Sequence[Trial]) -> list[str]:
    """Return what is listed as a survivor of a group, and is none of its mutants any more."""
    made = {trial.key for trial in trials}
    return [key for key in listed() if key.startswith(f"{group}.") and key not in made]


def _prove(group: str, trials: Sequence[Trial], results: Results) -> None:
    """Forget verdicts of tests that fail without any mutant, too."""
    killers = {v.killer for t in trials if (v := results.of(t)) and v.killer and "::" in v.killer}
    if not killers:
        return
    whole = {path: (CHECKOUT / path).read_text() for path in trials[0].files}
    wrong = _bench(group, "whole").failing(whole, sorted(killers), _PROOF_S)
    if any("::" not in each for each in wrong):
        raise SystemExit(f"the tests without a mutant: {', '.join(wrong)}")
    for trial in trials:
        if (verdict := results.of(trial)) and verdict.killer in wrong:
            print(f"fails without a mutant: {verdict.killer}", flush=True)
            results.forget(trial)


def _bench(group: str, name: str) -> Bench:
    bench = Bench(f"{group}-{name}")
    if group in WARM:
        bench.warm_up(group, WARM[group])
    return bench


def _try_all(group: str, trials: Sequence[Trial], results: Results, jobs: int) -> None:
    benches: queue.SimpleQueue[Bench] = queue.SimpleQueue()
    for n in range(jobs):
        benches.put(_bench(group, str(n)))
    killers: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)

    def try_one(trial: Trial) -> None:
        likely = killers[trial.tests]
        bench = benches.get()
        try:
            verdict = _tried(bench, trial, likely[:_LIKELY])
        finally:
            benches.put(bench)
        killers[trial.tests] = _moved_up(likely, verdict.killer)
        results.note(trial, verdict)
        print(f"{trial.key}\n    {_found_by(verdict)}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(try_one, trial) for trial in trials]:
            done.result()


def _tried(bench: Bench, trial: Trial, likely: Sequence[str]) -> Verdict:
    """Ask the tests that found its neighbours before all the others: often one finds it too."""
    if likely:
        verdict = bench.try_(trial.files, likely, _TIMEOUT_S)
        if verdict.killer in likely:
            return verdict
    return bench.try_(trial.files, trial.tests, _TIMEOUT_S)


def _moved_up(killers: Sequence[str], last: str | None) -> list[str]:
    others = [each for each in killers if each != last]
    return [last, *others] if last and "::" in last else others


def _found_by(verdict: Verdict | None) -> str:
    if verdict is None:
        return "not tried"
    return f"found by {verdict.killer}" if verdict.killer else "NOT FOUND"


def _row(group: str, trials: Sequence[Trial], results: Results, wrong: list[str]) -> str:
    """Return a group's row of the table; add what is wrong in it to *wrong*."""
    known = listed()
    verdicts = {t.key: results.of(t) for t in trials}
    found = [key for key, verdict in verdicts.items() if verdict and verdict.killer]
    lived = [key for key, verdict in verdicts.items() if verdict and not verdict.killer]
    untried = [key for key, verdict in verdicts.items() if verdict is None]
    unknown = [key for key in lived if key not in known]
    wrong += [f"not found, and not in survivors.toml: {key}" for key in unknown]
    wrong += [f"in survivors.toml, but found: {key}" for key in found if key in known]
    if untried:
        wrong.append(f"{len(untried)} mutants of {group} are not tried yet")
    if group == "seeded":
        print(*(f"{key}\n    {_found_by(verdict)}" for key, verdict in verdicts.items()), sep="\n")
    numbers = (len(trials), len(found), len(lived) - len(unknown), len(unknown), len(untried))
    return f"| {group} | {' | '.join(map(str, numbers))} |"


if __name__ == "__main__":
    sys.exit(main())

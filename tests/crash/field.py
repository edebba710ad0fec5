"""The host's side of a sweep: it has cases played in the machine, and counts what came of them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from tests.crash.cases import CALLS, Case, case, injections, kills, worst
from tests.vm.machine import Machine

HERE = Path(__file__).parent
_PLAYERS = ("bystanders", "tracing", "mixed", "stage", "sweep")
GUEST = (HERE.parent / "vm/points.py", *(HERE / f"{name}.py" for name in _PLAYERS))
SCENARIOS = ("namespace", "tree", "mixed")
TREE_CALLS = ("mount", "umount2", "mkdir", "rmdir")
JOURNAL_CALLS = ("pwrite64", "fdatasync", "ftruncate")
_KILLED = {"at": "journal:backing-up#1", "who": "all"}  # a run whose recovery resumes
_CHUNK = 60  # cases a start of the players


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    id: str
    ended: Sequence[tuple[str, int, Sequence[str], Sequence[str]]]  # argv[0], status, points, calls
    outcome: str | None
    attempts: int | None
    violations: Sequence[str]
    seconds: float

    @property
    def level(self) -> str:
        return self.id.partition(" ")[0]

    def points(self, command: int = 0) -> Sequence[str]:
        return self.ended[command][2]

    def calls(self, command: int = 0) -> Sequence[str]:
        return self.ended[command][3]


@dataclass
class Field:
    """Machines in which cases are played, by some workers in each; they also wait."""

    machines: Sequence[Machine]
    workers: int = 2
    tell: Callable[[str], None] = lambda _: None
    known: dict[str, Result] = field(default_factory=dict)  # played before
    keep: Callable[[str], None] = lambda _: None  # a result, as JSON

    def prepare(self) -> None:
        """Put the players into the machines."""
        for machine in self.machines:
            put_players(machine)

    def play(self, cases: Iterable[Case]) -> list[Result]:
        """Play cases, and return their results in no order."""
        wanted = list(cases)
        todo = [c for c in wanted if c["id"] not in self.known]
        chunks = [todo[start : start + _CHUNK] for start in range(0, len(todo), _CHUNK)]
        idle: SimpleQueue[Machine] = SimpleQueue()
        for machine in self.machines:
            idle.put(machine)

        def play(chunk: Sequence[Case]) -> list[str]:
            machine = idle.get()
            try:
                return _play(machine, chunk, self.workers)
            finally:
                idle.put(machine)

        with ThreadPoolExecutor(len(self.machines)) as pool:
            for n, lines in enumerate(pool.map(play, chunks), start=1):
                self._take(lines)
                self.tell(f"{min(n * _CHUNK, len(todo))} of {len(todo)} cases")
        return [self.known[c["id"]] for c in wanted]

    def _take(self, lines: Sequence[str]) -> None:
        for line in lines:
            result = Result(**json.loads(line))
            self.known[result.id] = result
            self.keep(line)
            for violation in result.violations:
                self.tell(f"VIOLATION {result.id}: {violation}")

    # -- recording -------------------------------------------------------------------------

    def points(self, scenario: str) -> Sequence[str]:
        """Return the points that a run passes which nothing disturbs."""
        (result,) = self.play([case("record", scenario, {})])
        return result.points()

    def first(self, scenario: str) -> list[Case]:
        """P1: return the cases of runs that are killed once."""
        points = list(self.points(scenario))
        if scenario == "fresh":  # from there on as with an older journal
            points = points[: points.index("before:planned#1")]
        return [case("P1", scenario, wish) for wish in kills(points)]

    def pairs(self, scenario: str) -> Iterator[Case]:
        """
        P4: yield the cases of runs that are killed, and then their recovery as well.

        Of the others than the namespace those in which at least one of the two points is its own.
        """
        runs = [case("P1", scenario, wish) for wish in worst(kills(self.points(scenario)))]
        self.play(runs)
        for run in runs:
            yield from self.again(run)

    def again(self, run: Case) -> Iterator[Case]:
        """Yield the cases in which the recovery of a killed run is killed as well."""
        (result,) = self.play([run])
        for wish in worst(kills(result.points(1))):
            own = _OWN[run["scenario"]]
            if own(run["run"]) or own(wish):
                yield case("P4", run["scenario"], run["run"], recover=wish)

    def injected(self, scenario: str) -> Iterator[Case]:
        """
        P2, P3: yield the cases in which a system call kills a process, or fails.

        Of the tree those that it has and the namespace has not; of `mixed` all but the journal's,
        which are those of the namespace.
        """
        for of in ("front", "runner"):
            count = {"count": CALLS, "of": of}
            run = case("record", scenario, count)
            recovery = case("record", scenario, _KILLED, recover=count)
            ran, recovered = self.play([run, recovery])
            for wish in injections(_own(ran.calls(), scenario), of):
                yield case(_level(wish), scenario, wish)
            for wish in injections(_own(recovered.calls(1), scenario), of):
                yield case(_level(wish), scenario, _KILLED, recover=wish)


def put_players(machine: Machine, *beside: str) -> None:
    """Put the players into a machine, and what a test has *beside* them, by its file's name."""
    for file in (*GUEST, *(HERE / name for name in beside)):
        machine.put(file, f"/root/{file.name}")


def _play(machine: Machine, cases: Sequence[Case], workers: int) -> list[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write("".join(json.dumps(each) + "\n" for each in cases))
        file.flush()
        machine.put(Path(file.name), "/root/cases.json")
    machine.run(
        "cd /root && rm -f results.json &&"
        f" /venv/bin/python sweep.py cases.json results.json --workers {workers}",
        timeout=300 + 120 * len(cases),
    )
    lines = machine.run("cat /root/results.json").stdout.splitlines()
    if len(lines) != len(cases):
        raise AssertionError(f"{len(cases)} cases, {len(lines)} results")
    return lines


def _is_of_tree(wish: Mapping[str, str]) -> bool:
    """Tell whether a point is one that only a tree has: its mounts are the front end's."""
    front = not wish["at"].startswith("runner:")
    return front and any(word in wish["at"] for word in ("tree", "mount#"))


def _is_of_mixed(wish: Mapping[str, str]) -> bool:
    """Tell whether a point is one that only volumes of other kinds than ZFS have."""
    return any(word in wish["at"] for word in ("lv", "dmsetup", "btrfs"))


_OWN: Mapping[str, Callable[[Mapping[str, str]], bool]] = {
    "namespace": lambda _: True,
    "tree": _is_of_tree,
    "mixed": _is_of_mixed,
}


def _own(calls: Sequence[str], scenario: str) -> Sequence[str]:
    if scenario == "tree":
        return [c for c in calls if c in TREE_CALLS]
    return [c for c in calls if c not in JOURNAL_CALLS] if scenario == "mixed" else calls


def _level(wish: dict[str, str]) -> str:
    return "P2" if "signal=" in wish["inject"] else "P3"


def table(results: Iterable[Result]) -> str:
    """Return a table of what came of the cases, by level."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        row = counts.setdefault(result.level, Counter())
        row["cases"] += 1
        row["killed"] += any(status == -9 for _, status, *_ in result.ended)
        row[result.outcome or "no run"] += 1
        row["violations"] += len(result.violations)
    names = ("cases", "killed", "completed", "rolled-back", "failed", "no run", "violations")
    lines = ["level   " + "".join(f"{name:>13}" for name in names)]
    for level, row in sorted(counts.items()):
        lines.append(f"{level:<8}" + "".join(f"{row[name]:>13}" for name in names))
    return "\n".join(lines)


def violations(results: Iterable[Result]) -> list[str]:
    """Return each violation, with the case that shows it."""
    return [f"{result.id}: {text}" for result in results for text in result.violations]

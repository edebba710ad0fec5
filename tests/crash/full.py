"""
Every point, every pair, every system call: `make crash-full`.

It takes hours.  Results are kept as they come, for as long as these tests are the same, and what
they load of the program: an interrupted sweep goes on where it was.  Ends with a table, and with
1 where anything was violated.

    python -m tests.crash.full [P1] [P2] [P3] [P4] [TEXT...]

Without a level it plays all of them; with texts the cases alone whose id has one of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.crash.bystanders import bystanders
from tests.crash.cases import Case
from tests.crash.field import GUEST, SCENARIOS, Field, Result, table, violations
from tests.vm.machine import CHECKOUT, CPUS, DATA_DISKS, cache_folder, install, open_machine

LEVELS = ("P1", "P4", "P2", "P3")


def main(words: Sequence[str]) -> int:
    """Play the cases that are named."""
    levels = [word for word in words if word in LEVELS] or LEVELS
    texts = [word for word in words if word not in LEVELS]
    kept = cache_folder() / f"crash-{_version()}.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    known = {result.id: result for result in (Result(**json.loads(line)) for line in lines)}
    _tell(f"{len(known)} results are there; each is kept in {kept}")
    with ExitStack() as stack, kept.open("a", buffering=1) as file:
        count = max(1, (os.cpu_count() or 2) // int(CPUS))
        machines = [stack.enter_context(open_machine()) for _ in range(count)]
        for machine in machines:
            install(machine)
            machine.run(f"zpool create tank {DATA_DISKS[0]}")

        def keep(line: str) -> None:
            print(line, file=file)

        field = Field(machines, workers=6, tell=_tell, known=known, keep=keep)
        field.prepare()
        results = [result for level in levels for result in _play(field, level, texts)]
    print(table(results))
    found = violations(results)
    print(f"{len(results)} cases, {len(found)} violations", *found, sep="\n  ")
    return 1 if found else 0


def _play(field: Field, level: str, texts: Sequence[str]) -> list[Result]:
    cases = [c for c in _cases(field, level) if not texts or any(t in c["id"] for t in texts)]
    # In no order, so that what an interrupted sweep has played is a sample of all.
    random.Random(level).shuffle(cases)
    _tell(f"{level}: {len(cases)} cases")
    return field.play(cases)


def _cases(field: Field, level: str) -> Iterable[Case]:
    if level == "P1":
        yield from field.first("fresh")
        yield from field.first("hooked")
    for scenario in SCENARIOS:
        if level == "P1":
            yield from field.first(scenario)
        elif level == "P4":
            yield from field.pairs(scenario)
        else:
            yield from (c for c in field.injected(scenario) if c["id"].startswith(level))


def _version() -> str:
    """Return what the results depend on: the program, and the tests that run in the machine."""
    engine = Path(CHECKOUT, "engine")
    files = {file: module_of(file.relative_to(engine)) for file in sorted(engine.rglob("*.py"))}
    beside = bystanders(files.values())
    program = [file for file, module in files.items() if module not in beside]
    program += sorted(engine.rglob("*.lua"))
    texts = [file.read_bytes() for file in (*program, *GUEST, Path(__file__).with_name("cases.py"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def module_of(file: Path) -> str:
    """Return the name of the module that a file, seen from the engine, is."""
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

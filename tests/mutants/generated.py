"""
Mutants that mutmut makes of a module: every one that its operators know.

mutmut's own runner is not used: it chooses tests and mutants inside one process, but what is
mutated here also runs in processes that the tests start.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import libcst
from mutmut.mutation.file_mutation import Mutation, create_mutations

from .trial import CHECKOUT, WORK


@dataclass(frozen=True)
class Mutant:
    """One change of a module: *old* and *new* are the lines that differ."""

    module: str
    function: str
    old: str
    new: str
    nth: int  # of those that look the same: two functions can have an equal line
    body: str  # the whole function, as it is then
    source: str  # the whole module

    @property
    def path(self) -> str:
        return f"engine/atomtx/{self.module}.py"

    @property
    def key(self) -> str:
        nth = f" #{self.nth}" if self.nth > 1 else ""
        return f"{self.module}.{self.function}{nth}: {self.old} -> {self.new}"


def mutants_of(module: str) -> list[Mutant]:
    """Return the mutants of one of the engine's modules; they are kept: it takes minutes."""
    code = (CHECKOUT / f"engine/atomtx/{module}.py").read_text()
    made_by = Path(__file__).read_text()
    kept = WORK / f"{module}-{hashlib.sha256((made_by + code).encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return [Mutant(**values) for values in json.loads(kept.read_text())]
    made = _make(module, code)
    WORK.mkdir(exist_ok=True)
    kept.with_suffix(".new").write_text(json.dumps([asdict(mutant) for mutant in made]))
    kept.with_suffix(".new").replace(kept)
    return made


def _make(module: str, code: str) -> list[Mutant]:
    tree, mutations, _, _ = create_mutations(module, code)
    found: dict[str, Mutant] = {}
    seen: Counter[str] = Counter()
    for each in mutations:
        function = each.contained_by_top_level_function
        if not isinstance(function, libcst.FunctionDef):  # mutmut does not try these
            continue
        mutated = tree.deep_replace(each.original_node, each.mutated_node)
        assert isinstance(mutated, libcst.Module)
        if mutated.code in found or mutated.code == code:
            continue
        old, new = _difference(code, mutated.code)
        body = tree.code_for_node(_replaced(function, each))
        mutant = Mutant(module, function.name.value, old, new, 1, body, mutated.code)
        seen[mutant.key] += 1
        found[mutated.code] = replace(mutant, nth=seen[mutant.key])
    return list(found.values())


def _replaced(function: libcst.FunctionDef, mutation: Mutation) -> libcst.CSTNode:
    replaced = function.deep_replace(mutation.original_node, mutation.mutated_node)
    assert isinstance(replaced, libcst.CSTNode)
    return replaced


def _difference(old: str, new: str) -> tuple[str, str]:
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0))[2:]
    gone = [line[1:].strip() for line in lines if line.startswith("-")]
    come = [line[1:].strip() for line in lines if line.startswith("+")]
    return "\n".join(gone), "\n".join(come)

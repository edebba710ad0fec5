"""
One trial: the program with a mutant in it, and the tests that should see it.

The tests run on a copy, in namespaces of their own for processes and mounts: a mutant may kill
or unmount what it should not, and what it leaves behind is gone when the trial ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
WORK = CHECKOUT / ".mutants"
_COPIED = ("engine", "migrations", "tests", "pyproject.toml", "alembic.ini")
# Mounts made inside are not seen outside, and are shared inside, as on a machine.
_CONFINED = (
    *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "slave"),
    *("--mount-proc", "--", "sh", "-c", 'mount --make-rshared / && "$@"; exit $?', "sh"),
)
_PYTEST = (
    *("-m", "pytest", "-q", "--no-header", "--tb=line", "-rfE"),
    *("-p", "no:cacheprovider", "-p", "no:xdist"),
)
_RAN_NONE = (3, 4, 5)  # pytest's exit codes: an error of its own, of usage, no tests
# What a test waits for at most: a mutant often makes it wait in vain.
_PATIENCE = (("PATIENCE_S = 60.0", "PATIENCE_S = 15.0"), ("HANGS_S = 60.0", "HANGS_S = 40.0"))


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: *killer* is the first test that failed; None if none did."""

    killer: str | None


class Bench:
    """A copy of the checkout in which one mutant after the other is tried."""

    def __init__(self, name: str) -> None:
        self.path = WORK / "work" / name
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for each in _COPIED:
            source = CHECKOUT / each
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, self.path / each)
        for test in (self.path / "tests").rglob("*.py"):
            text = test.read_text()
            for long, short in _PATIENCE:
                text = text.replace(long, short)
            test.write_text(text)
        self._compile()
        self._warm: subprocess.Popen[str] | None = None

    def _compile(self) -> None:
        """
        Compile once what each process of each trial imports.

        By the hash of its source, so that a mutant is seen: Python else tells a stale .pyc by size
        and second, and two mutants can have the same.
        """
        compiling = ("-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "engine")
        # The tests by pytest itself, which rewrites them.  Some cannot be had: they need documents.
        collecting = (*_PYTEST, "--collect-only", "tests/unit")
        for words, write in ((compiling, "1"), (collecting, "")):
            subprocess.run(
                [sys.executable, *words],
                cwd=self.path,
                env=self._environment() | {"PYTHONDONTWRITEBYTECODE": write},
                stdout=subprocess.DEVNULL,
                check=words is compiling,
            )

    def warm_up(self, module: str, tests: Sequence[str]) -> None:
        """Have mutants of *module* tried in forks of one process; see warm.py."""
        argv = [sys.executable, "-m", "tests.mutants.warm", module, *tests]
        self._warm = subprocess.Popen(
            argv,
            cwd=self.path,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def try_(self, files: Mapping[str, str], tests: Sequence[str], timeout_s: float) -> Verdict:
        """Put *files* (path and text) in, run *tests* until one fails, and take them out again."""
        if self._warm:
            return _verdict(*self._run_warm(next(iter(files.values())), ("-x", *tests), timeout_s))
        before = {path: (self.path / path).read_text() for path in files}
        try:
            for path, text in files.items():
                (self.path / path).write_text(text)
            return _verdict(*self._run(("-x", *tests), timeout_s))
        finally:
            for path, text in before.items():
                (self.path / path).write_text(text)

    def failing(
        self, files: Mapping[str, str], tests: Sequence[str], timeout_s: float
    ) -> list[str]:
        """Run *tests*, each to its end, on *files* as they are, and return those that fail."""
        if self._warm:
            status, out = self._run_warm(next(iter(files.values())), tests, timeout_s)
        else:
            status, out = self._run(tests, timeout_s)
        return failures(out) or ([] if status == 0 else [_last_words(out)])

    def _run_warm(self, source: str, tests: Sequence[str], timeout_s: float) -> tuple[int, str]:
        assert self._warm
        assert self._warm.stdin
        assert self._warm.stdout
        words = [*_PYTEST[2:], f"--basetemp={self.path}/tmp", *tests]
        request = {"source": source, "tests": words, "timeout_s": timeout_s}
        self._warm.stdin.write(json.dumps(request) + "\n")
        self._warm.stdin.flush()
        answer = json.loads(self._warm.stdout.readline())
        return answer["status"], answer["out"]

    def _run(self, tests: Sequence[str], timeout_s: float) -> tuple[int, str]:
        argv = [*_CONFINED, sys.executable, *_PYTEST, f"--basetemp={self.path}/tmp", *tests]
        with subprocess.Popen(
            argv,
            cwd=self.path,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child:
            try:
                out, _ = child.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                return -signal.SIGKILL, "no end within the time"
        return child.returncode, out

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": f"{self.path}/engine:{self.path}",
            "PYTHONDONTWRITEBYTECODE": "1",  # what is compiled is; see _compile
        }


def _verdict(status: int, out: str) -> Verdict:
    """
    Judge how pytest ended: a test failed, or none did, or it was ended itself, as by a hang.

    SystemExit where it ran no test, or the mutant could not be put in: that finds nothing.
    """
    if status == 0:
        return Verdict(None)
    found = failures(out)
    if status in _RAN_NONE or (status == 1 and not found):
        raise SystemExit(f"no trial: pytest ended with {status}: {_last_words(out)}")
    return Verdict((found or [_last_words(out)])[0])


def failures(out: str) -> list[str]:
    """Return the tests that failed, the first one first."""
    lines = [line for line in out.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [line.split(" ", 1)[1].split(" - ")[0] for line in lines]


def _last_words(out: str) -> str:
    """Say how pytest ended where no test failed."""
    return f"({(out.strip().splitlines() or ['no output'])[-1]})"

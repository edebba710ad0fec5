"""Puts a program of the tests in the place of one of the machine's."""

from __future__ import annotations

import sys
from pathlib import Path

# Most of the time that it takes is its start and its end: it has no site, and is not taken down.
_PROGRAM = """#!{python} -SE
import os, sys
sys.path.insert(0, {tests!r})
import {module}
status = {module}.main({arguments})
sys.stdout.flush()
os._exit(status)
"""


def write_program(path: Path, module: str, arguments: str) -> None:
    """Write a program that is the main of a module of this folder, with these arguments."""
    tests = str(Path(__file__).parent)
    text = _PROGRAM.format(python=sys.executable, tests=tests, module=module, arguments=arguments)
    path.write_text(text)
    path.chmod(0o755)

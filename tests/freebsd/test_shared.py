"""
What both systems share: tests of whole runs, once more, on FreeBSD's programs.

They are the tests of tests/unit, unchanged; only where they stand is another machine, on which
every plan is a tree's.  On Linux the same run with mounts of its own kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.freebsd.stage import FreeBSD
from tests.unit.test_executor import (
    test_adopted,
    test_empty_set,
    test_tree_is_taken,
    test_tree_killed,
    test_tree_that_stays,
)

__all__ = ["test_adopted"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FreeBSD]:
    scene = FreeBSD(tmp_path)
    yield scene
    scene.close()

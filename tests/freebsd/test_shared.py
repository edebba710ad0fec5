"""
What both systems share: the tests of whole runs, once more, on FreeBSD's programs.

They are those of tests/unit, unchanged; only where they stand is another machine, on which every
plan is a tree's.  By default some of them; with ATOMTX_CRASH=full all but those of `LINUX`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.extent import FULL
from tests.freebsd.stage import FreeBSD
from tests.unit import test_executor, test_hooks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

SOME = (
    *("test_effects", "test_two_pools", "test_tree_that_stays", "test_empty_set"),
    *("test_keep_snapshots", "test_killed_runner", "test_interrupted_too_late", "test_busy"),
    *("test_no_room_for_the_end", "test_killed_in_a_hook", "test_what_a_hook_leaves"),
    *("test_killed_after_an_undo_has_begun_a_daemon", "test_tree_in_use"),
)
# What is Linux's alone, and why.
LINUX = {
    "test_course": "it tells where the client reads: at the live paths",
    "test_frozen_link": "each system has its own words for it: test_freebsd.py",
    "test_frozen_tmp": "in the namespace layout TMPDIR may be frozen",
    "test_default_tmp": "in the namespace layout TMPDIR may be frozen",
    "test_time_limit_and_live_paths": "in the namespace layout live paths are brought back",
    "test_killed_anywhere": "test_sweep.py goes through more",
    "test_covered_for_a_while": "it tells nobody that mounts have changed: docs/freebsd.md",
    "test_covered_before_it_is_watched": "the same",
    "test_machine_that_cannot_be_looked_at": "who waits for a client lists no processes",
}
daemons = test_hooks.daemons
for _module in (test_executor, test_hooks):
    for _name in [name for name in vars(_module) if name.startswith("test_")]:
        if _name in SOME or (FULL and _name not in LINUX):
            globals()[_name] = getattr(_module, _name)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FreeBSD]:
    scene = FreeBSD(tmp_path)
    yield scene
    scene.close()

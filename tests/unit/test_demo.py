"""What the demo does on a machine that has other things on it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SESSION = Path(__file__).resolve().parents[2] / "demo" / "session.sh"


def test_pool_of_another(tmp_path: Path) -> None:
    """A pool of the demo's name that is there already, another demo's even, is not destroyed."""
    zpool = tmp_path / "zpool"
    zpool.write_text(f'#!/bin/sh\necho "$1" >>{tmp_path}/asked\ntest "$1" != create\n')
    zpool.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([SESSION, "zfs"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert (tmp_path / "asked").read_text().splitlines() == ["create"]

"""How a run ended: one line for people, one object for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import history
from ..records import Run
from ..settling import status_of
from .render import duration, size


def result(path: Path, run: Run) -> dict[str, Any]:
    """Return the result of a run as `--json` prints it."""
    return {
        "run": run.id,
        "job": run.label,
        "state": run.state,
        "outcome": run.outcome,
        "cleanup": run.cleanup,
        "reason": run.reason,
        "exit_status": int(status_of(run)),
        "backups": history.backups(path, run.id),
    }


def closing_line(path: Path, run: Run, seconds: float) -> str:
    """Return the last line that a person sees of a run."""
    words = f"{run.outcome or 'kept waiting'} in {duration(seconds)}"
    details = [*_amounts(path, run), f"run {run.id}"]
    if run.reason:
        words += f": {run.reason}"
    if run.outcome is None:
        words += "; `atomtx recover` goes on with the same moment"
    for step in run.failed_after:
        words += f"; failed: {step.intent.describe()}"
    if run.is_parked:
        words += "; something is left to clean up: `atomtx recover`"
    return f"{words} ({', '.join(details)})"


def _amounts(path: Path, run: Run) -> list[str]:
    backups = history.backups(path, run.id)
    words = [_count(run)]
    row = history.run(path, run.id)
    if row.bytes_processed is not None:
        words.append(f"{size(row.bytes_processed)} read")
    if row.bytes_added is not None:
        words.append(f"{size(row.bytes_added)} added")
    words += [f"backup {b.backup_id[:8]}" for b in backups[:3] if b.backup_id]
    return words


def _count(run: Run) -> str:
    kinds = {volume.kind for volume in run.volumes}
    noun = {"zfs": "dataset", "btrfs": "subvolume"}[kinds.pop()] if len(kinds) == 1 else "volume"
    return f"{len(run.volumes)} {noun}" + ("s" if len(run.volumes) != 1 else "")

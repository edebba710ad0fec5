"""How a run ended: one line for people, one object for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import history
from ..names import BTRFS, LVM, PLAIN, ZFS
from ..records import Run
from ..settling import status_of
from .render import backup_id, duration, size

_NOUNS = {
    ZFS: ("dataset", "datasets"),
    BTRFS: ("subvolume", "subvolumes"),
    LVM: ("logical volume", "logical volumes"),
    PLAIN: ("directory", "directories"),
}


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
        "not_a_moment": run.read_live,
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
    words += [f"backup {backup_id(b.backup_id)}" for b in backups[:3] if b.backup_id]
    return words


def _count(run: Run) -> str:
    kinds = {volume.kind for volume in run.volumes}
    noun = _NOUNS[kinds.pop()] if len(kinds) == 1 else ("volume", "volumes")
    words = f"{len(run.volumes)} {noun[len(run.volumes) != 1]}"
    return f"{words}, not a moment: {', '.join(run.read_live)}" if run.read_live else words

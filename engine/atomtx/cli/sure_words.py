"""What `atomtx sure` says: findings, summaries, tables, and where a scan is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..integrity.entry import shown
from . import echo, render

if TYPE_CHECKING:
    from ..errors import ExitStatus
    from ..history import Run
    from ..integrity.checking import Result
    from ..integrity.compare import Finding
    from ..integrity.scanning import Summary
    from ..integrity.store import Generation
    from ..verifying import Room

_SHOW_EVERY_S = 0.2
_LINES_AT_ONCE = 1000
DIFF_WORDS = {"missing": "removed", "extra": "added"}  # of generations, not of a tree
_HEADERS = ("GENERATION", "SCANNED", "ENTRIES", "SIZE", "HASHED", "UNREADABLE", "READ AT")
_RIGHT = ("GENERATION", "ENTRIES", "SIZE", "HASHED", "UNREADABLE")


def tell(
    show: render.Reporter | None,
    finding: Finding,
    *,
    as_json: bool,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """Print a finding, after the live line, if there is one, was taken away."""
    if show is not None:
        show.__exit__()
    kind = (kinds or {}).get(finding.kind, finding.kind)
    if as_json:
        data = {
            "message_type": "finding",
            "kind": str(kind),
            "path": os.fsdecode(finding.path),
            "differences": finding.differences,
            "reason": finding.reason,
        }
        echo(render.to_json(data, indent=None))
        return
    said = ", ".join(map(str, finding.differences)) or finding.reason
    echo(render.printable(f"{kind:<10}  {shown(finding.path)}" + (f": {said}" if said else "")))


def ticker(show: render.Reporter, expected: int | None) -> Callable[[int, int], None]:
    """Return what shows where a scan is: of *expected* entries, where that is known."""
    from ..clients import Progress

    shown_at = time.monotonic()

    def tick(entries: int, read: int) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at < _SHOW_EVERY_S:
            return
        shown_at = time.monotonic()
        percent = min(100.0 * entries / expected, 99.0) if expected else None
        show.progress(Progress(percent, bytes_done=read, files_done=entries))

    return tick


def scanned(summary: Summary) -> str:
    """Return the last line of a scan."""
    counts = summary.counts
    words = (
        f"generation {summary.generation}: {counts.entries} entries, {render.size(counts.bytes)}; "
        f"{counts.hashed} files hashed, {render.size(counts.hashed_bytes)}, "
        f"in {render.duration(summary.seconds)}"
    )
    if counts.errors:
        words += f"; {counts.errors} could not be read"
    if summary.damaged:
        words += f"; the contents of {summary.damaged} changed without a trace"
    return words


def scan_object(
    summary: Summary, database: Path, tree: Path, root: Path, status: ExitStatus
) -> dict[str, Any]:
    """Return the result of a scan for a program."""
    return {
        "database": database,
        "tree": tree,
        "path": root,
        "generation": summary.generation,
        **summary.counts._asdict(),
        "damaged": summary.damaged,
        "seconds": summary.seconds,
        "exit_status": int(status),
    }


def checked(result: Result) -> str:
    """Return the last line of a check."""
    words = (
        f"{result.compared} entries compared with generation {result.generation}, "
        f"{render.size(result.bytes_read)} read in {render.duration(result.seconds)}: "
    )
    count = result.differences
    words += {0: "no difference", 1: "1 difference"}.get(count, f"{count} differences")
    if result.not_compared:
        words += f", {result.not_compared} could not be compared"
    return words


def table(generations: Sequence[Generation]) -> str:
    """Return the generations in columns."""
    rows = [
        (
            str(each.id),
            render.local_time(_time(each.started)),
            str(each.entries),
            render.size(each.bytes),
            str(each.hashed),
            str(each.errors),
            shown(each.path),
        )
        for each in generations
    ]
    return "\n".join(render.table(_HEADERS, rows, right=_RIGHT))


def generation_object(each: Generation, tree: bytes) -> dict[str, Any]:
    """Return a generation for a program."""
    return {
        **each._asdict(),
        "tree": os.fsdecode(tree),
        "path": os.fsdecode(each.path),
        "started": _time(each.started),
        "ended": _time(each.ended),
        "complete": bool(each.complete),
    }


def comparing(path: str, each: Generation, *, is_of_run: bool) -> str:
    """Return the line before a comparison of what was restored."""
    of = ", the run's own moment" if is_of_run else ""
    return f"comparing {path} with generation {each.id}{of}"


def of_another_moment(path: str, each: Generation, run: Run) -> str:
    """Say that a generation is not known to be of a run's moment."""
    moment = render.local_time(run.moment_at or run.started_at, seconds=True)
    return (
        f"generation {each.id} of {path} was read at "
        f"{render.local_time(_time(each.started), seconds=True)} from {shown(each.path)}, and not "
        f"from the run's snapshot: what changed between it and {moment} is named, too"
    )


def room(found: Room) -> str:
    """Return bytes and files, where they are known."""
    files = [] if found.files is None else [f"{found.files} files"]
    size = [] if found.size_bytes is None else [render.size(found.size_bytes)]
    return " and ".join((*size, *files)) or "an unknown size"


def print_lines(lines: Iterable[str]) -> None:
    """Print many lines, not each by itself: every write to standard output is flushed."""
    waiting: list[str] = []
    for line in lines:
        waiting.append(line)
        if len(waiting) == _LINES_AT_ONCE:
            echo("\n".join(waiting))
            waiting.clear()
    if waiting:
        echo("\n".join(waiting))


def _time(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC)

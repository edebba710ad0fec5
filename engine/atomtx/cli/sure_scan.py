"""`atomtx sure scan` and `scan-kept`: a tree, or the newest kept snapshots, as generations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import newest, statedir, wanted
from ..errors import AtomtxError, ExitStatus, Interrupted, UserError, worst
from ..inventory import Inventory
from ..mounts import mountinfo
from ..newest import Frozen, Unseen
from ..volumes.zfs import Zfs
from . import render
from . import sure_options as options
from . import sure_words as words
from .jobs import Asked

if TYPE_CHECKING:
    from ..integrity.store import Generation


@dataclass(frozen=True)
class How:
    """How a tree is scanned."""

    full: bool = False
    cross: bool = False
    may_be_empty: bool = False


def tree(show: render.Reporter, path: Path, file: Path, live: Path, how: How) -> dict[str, Any]:
    """Add a generation to a database: the tree at *path*, whose live path is *live*."""
    from ..integrity import scanning, store
    from ..integrity.entry import shown

    root = Path(os.path.realpath(path))
    with store.writing(file, os.fsencode(live)) as db:
        last = db.generations()[-1:]
        told = scanning.Told(
            lambda name, text: show.warn(f"{shown(name)}: {text}"),
            lambda name: show.note(f"{shown(name)}: another file system, not entered"),
            words.ticker(show, last[0].entries if last else None),
        )
        summary = scanning.scan(
            db, root, full=how.full, cross=how.cross, may_be_empty=how.may_be_empty, told=told
        )
    status = options.status(damaged=summary.damaged, unread=summary.counts.errors)
    show.done(words.scanned(summary))
    return words.scan_object(summary, file, live, root, status)


def kept(show: render.Reporter, asked: Asked, how: How) -> ExitStatus:
    """
    Add a generation for each dataset that is asked for, of its newest kept snapshot.

    Of what was scanned already no second one is made.  One that fails is told, and those after it
    are scanned.  UserError where a dataset that was named cannot be scanned, or none can.
    """
    frozen, unseen = _chosen(asked)
    for each in unseen:
        if each.is_named or not frozen:
            raise UserError(f"{each.name} cannot be scanned: {each.reason}", hint=each.hint)
    for each in unseen:
        show.warn(str(each))
    statedir.prepare(statedir.find())
    told = [_told(show, each, how) for each in frozen]
    status = worst(
        (
            ExitStatus.PARTIAL if unseen else ExitStatus.COMPLETED,
            *(ExitStatus(each["exit_status"]) for each in told),
        )
    )
    left_out = [{"dataset": each.name, "reason": each.reason} for each in unseen]
    show.result({"scans": told, "left_out": left_out, "exit_status": int(status)})
    return status


def _chosen(asked: Asked) -> tuple[tuple[Frozen, ...], tuple[Unseen, ...]]:
    zfs = Zfs()
    found = wanted.find(asked.request(), zfs)
    there = zfs.kept([facts.name for facts in found.datasets])
    inventory = Inventory(found.datasets, found.pools, mountinfo.read().without_echoes())
    return newest.choose(found, there, inventory)


def _told(show: render.Reporter, frozen: Frozen, how: How) -> dict[str, Any]:
    """Scan one snapshot; an error is told, and is its result."""
    try:
        return _scanned(show, frozen, how)
    except Interrupted:
        raise
    except AtomtxError as exc:
        show.warn(f"{frozen.snapshot}: {exc}")
        status = int(exc.exit_status)
        return {"snapshot": frozen.snapshot, "error": str(exc), "exit_status": status}


def _scanned(show: render.Reporter, frozen: Frozen, how: How) -> dict[str, Any]:
    """Scan one snapshot, but where the last generation is of it and lacks nothing."""
    from ..integrity import places

    file, live = options.place(Path(frozen.live), None, None)
    places.prepare(file)
    last = _last(file)
    if last and not how.full and _is_of(last, frozen):
        show.done(f"{frozen.snapshot}: generation {last.id} is of it already")
        return {"snapshot": frozen.snapshot, "generation": last.id, "exit_status": 0}
    show.step(f"scanning {frozen.snapshot}")
    return {"snapshot": frozen.snapshot, **tree(show, Path(frozen.path), file, live, how)}


def _last(file: Path) -> Generation | None:
    from ..integrity import store

    with store.looking(file) as db:
        return next(iter(db.generations()[-1:]), None) if db else None


def _is_of(last: Generation, frozen: Frozen) -> bool:
    """Tell whether a generation is of a snapshot, not of an older one of its name."""
    path = os.fsencode(os.path.realpath(frozen.path))
    return last.path == path and last.started // 10**9 > frozen.created_s and not last.errors

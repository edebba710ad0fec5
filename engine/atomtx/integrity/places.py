"""Which database is whose: a tree is known by its live path, its snapshots by the same."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import quote

from ..errors import UserError

FOLDER = "sure"  # in the state directory
_SNAPSHOT = re.compile(r"(?P<above>.*)/\.zfs/snapshot/[^/]+(?P<below>/.*)?", re.DOTALL)
_LONGEST = 200  # SQLite and our lock add to it, and NAME_MAX is 255


def tree_of(path: Path) -> Path:
    """Return the live path of a tree: that of a snapshot in `.zfs/snapshot` without the latter."""
    real = os.path.realpath(path)
    match = _SNAPSHOT.fullmatch(real)
    return Path(match["above"] + (match["below"] or "") or "/") if match else Path(real)


def database_of(state: Path, tree: Path) -> Path:
    """Return where the database of a tree is by default."""
    name = quote(os.fsencode(tree).lstrip(b"/") or b"/", safe="")
    if len(name) > _LONGEST:
        digest = hashlib.sha256(os.fsencode(tree)).hexdigest()[:32]
        name = f"{name[: _LONGEST - 40]}-{digest}"
    return state / FOLDER / f"{name}.db"


def prepare(database: Path) -> None:
    """Make the folder of the default databases, for nobody else to read; idempotent."""
    try:
        database.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise UserError(f"cannot make {database.parent}: {exc.strerror}") from exc

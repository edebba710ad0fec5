"""Dumps of xfsdump for the tests of those who read them: in the form of the real ones."""

from __future__ import annotations

import dataclasses
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

from atomtx.clients import dumps
from atomtx.clients.dumps import MARK, Destination, Dump

T0 = datetime(2026, 7, 1, 12, tzinfo=UTC)
ID = "0123-4567"
UUID = "5a812253-b5dc-496d-a816-75df39b19e0a"


def a_dump(n: int, level: int, base: Dump | None = None, **values: Any) -> Dump:
    """Return the dump of the *n*th day."""
    at = T0 + timedelta(days=n)
    made = Dump(
        name=f"home/{at:%Y%m%dT%H%M%SZ}-{n:016x}",
        run=f"{n:016x}",
        job="home",
        host=dumps.this_host(),
        path="/home",
        filesystem=UUID,
        at=at.isoformat(),
        level=level,
        base=base.name if base else None,
        partial=False,
        levels=(0, 1, 2),
        turn=level,
        session="",
        size=0,
        sha256="",
        files=1,
        inventory={},
    )
    return dataclasses.replace(made, **values)


def put(store: Destination, dump: Dump, content: bytes = b"content") -> Dump:
    """Write a dump as a run does."""
    store.path.mkdir(exist_ok=True)
    (store.path / MARK).write_text(ID)
    base = store.dump(dump.base) if dump.base else None
    part = store.begin(dump.path, dump.run, base)
    (part / dumps.INVENTORY / f"session{dump.level}").write_text(dump.name)
    (part / dumps.DUMP).write_bytes(content)
    made = dataclasses.replace(
        dump,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        inventory=dumps.digests(part / dumps.INVENTORY),
    )
    store.commit(part, made)
    return made


def make_chain(store: Destination, levels: int = 3) -> list[Dump]:
    """Write dumps of the levels 0, 1, 2, each on the one before."""
    made: list[Dump] = []
    for level in range(levels):
        dump = a_dump(level, level, made[-1] if made else None)
        made.append(put(store, dump, f"content of {level}".encode()))
    return made

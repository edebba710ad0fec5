"""Journals for the tests of those who read them: made from the tables, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, insert
from sqlalchemy.engine import URL

from atomtx import journalfile, schema

T0 = 1_785_000_000_000_000


class Journal:
    """An empty journal of this release, and how to write rows into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._engine = create_engine(URL.create("sqlite", database=str(path)))
        schema.metadata.create_all(self._engine)
        self._pragma("application_id", journalfile.APPLICATION_ID)
        self.set_version(journalfile.SCHEMA_VERSION)

    def add(self, table: str, **values: Any) -> None:
        """Insert one row."""
        with self._engine.begin() as connection:
            connection.execute(insert(schema.metadata.tables[table]).values(values))

    def set_version(self, number: int) -> None:
        self._pragma("user_version", number)

    def close(self) -> None:
        self._engine.dispose()

    def _pragma(self, name: str, value: int) -> None:
        with self._engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA {name}={value}")


def a_run(number: int, **values: Any) -> dict[str, Any]:
    """Return the row of a completed run, begun *number* seconds after T0, with other *values*."""
    began = T0 + number * 1_000_000
    ended = {} if "state" in values else {"state": "destroyed", "ended_at": began + 500_000}
    return {
        "id": f"{number:016x}",
        "job": f"key-{number}",
        "verb": "backup",
        "label": "home",
        "rev": 6,
        "outcome": "completed",
        "attempts": 1,
        "plan": '{"run": "x"}',
        "client": "restic",
        "started_at": began,
        "boot_id": "boot",
        "pid": 42,
        **ended,
        **values,
    }

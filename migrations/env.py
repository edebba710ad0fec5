"""alembic's environment: run the migrations on the connection that the program hands over."""

from __future__ import annotations

import os
from pathlib import Path

from alembic import context
from sqlalchemy import Connection

from atomtx import schema


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=schema.metadata,
        render_as_batch=True,
        # One transaction for the whole upgrade, begun by the caller: a kill leaves the old
        # journal, not a half-made one.
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    context.run_migrations()


def _for_developers() -> None:
    """`alembic revision|check` on the journal that ATOMTX_STATE_DIR names."""
    from atomtx.database import make_engine

    path = Path(os.environ["ATOMTX_STATE_DIR"]) / "journal.db"
    engine = make_engine(path, foreign_keys=False)
    try:
        with engine.begin() as connection:
            _migrate(connection)
    finally:
        engine.dispose()


if (handed_over := context.config.attributes.get("connection")) is not None:
    _migrate(handed_over)
else:
    _for_developers()

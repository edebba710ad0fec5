"""What undoes a step is found by an index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """
    Let SQLite find what refers to a step; every row stays as it is.

    It looks for that with each step that is deleted, in all steps where there is no index:
    https://www.sqlite.org/foreignkeys.html#fk_indexes.
    """
    op.create_index(
        "ix_steps_compensates",
        "steps",
        ["compensates"],
        sqlite_where=sa.text("compensates IS NOT NULL"),
    )
    op.execute("PRAGMA user_version = 5")


def downgrade() -> None:
    """Refuse: the way back is the copy that was made before the upgrade."""
    raise NotImplementedError("restore the copy of the journal instead")

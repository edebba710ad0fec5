"""${message}."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Do it; end with `PRAGMA user_version`, the ordinal of this file."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Refuse: the way back is the copy that was made before the upgrade."""
    raise NotImplementedError("restore the copy of the journal instead")

"""Volumes may be btrfs subvolumes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_COLUMNS = (
    "run, n, kind, pool, pool_guid, name, guid, mountpoint, snapshot, snapshot_guid, createtxg, "
    "is_empty"
)


def upgrade() -> None:
    """
    Let a volume be of kind btrfs; every row stays as it is.

    SQLite cannot alter a CHECK.  The table is made anew under its own name, because the text of
    one that got it by a renaming has it in quotes; nothing refers to it.
    """
    op.rename_table("volumes", "volumes_0001")
    _volumes()
    op.execute(f"INSERT INTO volumes ({_COLUMNS}) SELECT {_COLUMNS} FROM volumes_0001")
    op.drop_table("volumes_0001")
    op.execute("PRAGMA user_version = 2")


def downgrade() -> None:
    """Refuse: the way back is the copy that was made before the upgrade."""
    raise NotImplementedError("restore the copy of the journal instead")


def _volumes() -> None:
    op.create_table(
        "volumes",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("pool_guid", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("guid", sa.Text(), nullable=False),
        sa.Column("mountpoint", sa.Text(), nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False),
        sa.Column("snapshot_guid", sa.Text()),
        sa.Column("createtxg", sa.Text()),
        sa.Column("is_empty", sa.Integer()),
        sa.CheckConstraint("kind IN ('zfs', 'btrfs')", name=op.f("ck_volumes_kind")),
        sa.CheckConstraint(
            "(snapshot_guid IS NULL) = (createtxg IS NULL)", name=op.f("ck_volumes_identity")
        ),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_volumes_run", ondelete="CASCADE"),
        sa.UniqueConstraint("run", "n", name="uq_volumes_run"),
        sqlite_strict=True,
    )

"""Volumes may be of LVM, or plain directories; a run may do something else than a backup."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_COLUMNS = (
    "run, n, kind, pool, pool_guid, name, guid, mountpoint, snapshot, snapshot_guid, createtxg, "
    "is_empty"
)


_STATES = (
    "'planned', 'snapshotted', 'mounted', 'backing-up', 'unmounting', 'destroyed', 'kept', 'pruned'"
)
_OUTCOMES = "'completed', 'partial', 'failed', 'rolled-back'"
_RUN_COLUMNS = (
    "id, job, label, state, rev, outcome, cleanup, reason, attempts, plan, client, repository, "
    "moment_at, started_at, ended_at, boot_id, pid, bytes_added, bytes_processed, files_processed"
)


def upgrade() -> None:
    """
    Let a volume be of kind lvm or plain, and a run have a verb; every row stays as it is.

    SQLite cannot alter a CHECK.  The tables are made anew under their own names, because the text
    of one that got it by a renaming has it in quotes.
    """
    op.rename_table("volumes", "volumes_0002")
    _volumes()
    op.execute(f"INSERT INTO volumes ({_COLUMNS}) SELECT {_COLUMNS} FROM volumes_0002")
    op.drop_table("volumes_0002")
    for index in ("uq_runs_active_job", "ix_runs_started_at", "ix_runs_open"):
        op.drop_index(index, "runs")
    # Else the other tables would refer to the old one by its new name; SQLite, lang_altertable.
    op.execute("PRAGMA legacy_alter_table = ON")
    op.rename_table("runs", "runs_0002")
    op.execute("PRAGMA legacy_alter_table = OFF")
    _runs()
    # In the order in which they were begun, which their hidden number tells.
    op.execute(
        f"INSERT INTO runs (rowid, verb, {_RUN_COLUMNS}) "
        f"SELECT rowid, 'backup', {_RUN_COLUMNS} FROM runs_0002"
    )
    op.drop_table("runs_0002")
    op.execute("PRAGMA user_version = 3")


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
        sa.CheckConstraint(
            "kind IN ('zfs', 'btrfs', 'lvm', 'plain')", name=op.f("ck_volumes_kind")
        ),
        sa.CheckConstraint(
            "(snapshot_guid IS NULL) = (createtxg IS NULL)", name=op.f("ck_volumes_identity")
        ),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_volumes_run", ondelete="CASCADE"),
        sa.UniqueConstraint("run", "n", name="uq_volumes_run"),
        sqlite_strict=True,
    )


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("verb", sa.Text(), nullable=False),
        sa.Column("job", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("rev", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.Text()),
        sa.Column("cleanup", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("client", sa.Text(), nullable=False),
        sa.Column("repository", sa.Text()),
        sa.Column("moment_at", sa.Integer()),
        sa.Column("started_at", sa.Integer(), nullable=False),
        sa.Column("ended_at", sa.Integer()),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("bytes_added", sa.Integer()),
        sa.Column("bytes_processed", sa.Integer()),
        sa.Column("files_processed", sa.Integer()),
        sa.CheckConstraint("verb IN ('backup', 'snap', 'prune')", name=op.f("ck_runs_verb")),
        sa.CheckConstraint(f"state IN ({_STATES})", name=op.f("ck_runs_state")),
        sa.CheckConstraint(f"outcome IN ({_OUTCOMES})", name=op.f("ck_runs_outcome")),
        sa.CheckConstraint("cleanup = 'parked'", name=op.f("ck_runs_cleanup")),
        sa.CheckConstraint(
            "(state IN ('destroyed', 'kept', 'pruned')) = (ended_at IS NOT NULL)",
            name=op.f("ck_runs_ended"),
        ),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sqlite_strict=True,
    )
    op.create_index(
        "uq_runs_active_job",
        "runs",
        ["job"],
        unique=True,
        sqlite_where=sa.text("ended_at IS NULL AND cleanup IS NULL"),
    )
    op.create_index("ix_runs_started_at", "runs", ["started_at"])
    op.create_index(
        "ix_runs_open", "runs", ["started_at"], sqlite_where=sa.text("ended_at IS NULL")
    )

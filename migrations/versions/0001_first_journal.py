"""The first journal."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_STATES = "'planned', 'snapshotted', 'mounted', 'backing-up', 'unmounting', 'destroyed'"
_OUTCOMES = "'completed', 'partial', 'failed', 'rolled-back'"


def upgrade() -> None:
    """Create every table."""
    _journals()
    _runs()
    _volumes()
    _steps()
    _moves()
    _backups()
    op.execute("PRAGMA application_id = 0x61746F6D")
    op.execute("PRAGMA user_version = 1")


def downgrade() -> None:
    """Refuse: the way back is the copy that was made before the upgrade."""
    raise NotImplementedError("restore the copy of the journal instead")


def _journals() -> None:
    op.create_table(
        "journals",
        sa.Column("uuid", sa.Text(), nullable=False),
        sa.Column("machine_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("uuid", name="pk_journals"),
        sqlite_strict=True,
    )


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
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
        sa.CheckConstraint(f"state IN ({_STATES})", name=op.f("ck_runs_state")),
        sa.CheckConstraint(f"outcome IN ({_OUTCOMES})", name=op.f("ck_runs_outcome")),
        sa.CheckConstraint("cleanup = 'parked'", name=op.f("ck_runs_cleanup")),
        sa.CheckConstraint(
            "(state = 'destroyed') = (ended_at IS NOT NULL)", name=op.f("ck_runs_ended")
        ),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sqlite_strict=True,
    )
    op.create_index(
        "uq_runs_active_job",
        "runs",
        ["job"],
        unique=True,
        sqlite_where=sa.text("state <> 'destroyed' AND cleanup IS NULL"),
    )
    op.create_index("ix_runs_started_at", "runs", ["started_at"])
    op.create_index(
        "ix_runs_open", "runs", ["started_at"], sqlite_where=sa.text("state <> 'destroyed'")
    )


def _volumes() -> None:
    op.create_table(
        "volumes",
        _run_column(),
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
        sa.CheckConstraint("kind IN ('zfs')", name=op.f("ck_volumes_kind")),
        sa.CheckConstraint(
            "(snapshot_guid IS NULL) = (createtxg IS NULL)", name=op.f("ck_volumes_identity")
        ),
        _run_reference("volumes"),
        sa.UniqueConstraint("run", "n", name="uq_volumes_run"),
        sqlite_strict=True,
    )


def _steps() -> None:
    op.create_table(
        "steps",
        sa.Column("id", sa.Integer(), nullable=False),
        _run_column(),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("compensates", sa.Integer()),
        sa.Column("intended_at", sa.Integer(), nullable=False),
        sa.Column("ended_at", sa.Integer()),
        sa.Column("outcome", sa.Text()),
        sa.Column("detail", sa.Text()),
        sa.CheckConstraint(
            "outcome IN ('done', 'failed', 'not-needed', 'parked')", name=op.f("ck_steps_outcome")
        ),
        sa.CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name=op.f("ck_steps_ended")),
        sa.PrimaryKeyConstraint("id", name="pk_steps"),
        sa.ForeignKeyConstraint(
            ["compensates"], ["steps.id"], name="fk_steps_compensates", ondelete="CASCADE"
        ),
        _run_reference("steps"),
        sqlite_strict=True,
    )
    op.create_index("ix_steps_run", "steps", ["run"])


def _moves() -> None:
    op.create_table(
        "moves",
        _run_column(),
        sa.Column("rev", sa.Integer(), nullable=False),
        sa.Column("at", sa.Integer(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("dest", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        _run_reference("moves"),
        sa.UniqueConstraint("run", "rev", name="uq_moves_run"),
        sqlite_strict=True,
    )


def _backups() -> None:
    op.create_table(
        "backups",
        _run_column(),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("backup_id", sa.Text()),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("bytes_added", sa.Integer()),
        sa.Column("bytes_processed", sa.Integer()),
        sa.Column("files_processed", sa.Integer()),
        _run_reference("backups"),
        sa.UniqueConstraint("run", "n", name="uq_backups_run"),
        sqlite_strict=True,
    )


def _run_column() -> sa.Column[str]:
    return sa.Column("run", sa.Text(), nullable=False)


def _run_reference(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["run"], ["runs.id"], name=f"fk_{table}_run", ondelete="CASCADE")

"""A run may send snapshots to another pool or machine, or be made of steps."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_STATES = (
    "'planned', 'snapshotted', 'mounted', 'backing-up', 'unmounting', 'destroyed', 'kept', "
    "'pruned', 'cloned', 'ran'"
)
_OUTCOMES = "'completed', 'partial', 'failed', 'rolled-back'"
_RUN_COLUMNS = (
    "id, verb, job, label, state, rev, outcome, cleanup, reason, attempts, plan, client, "
    "repository, moment_at, started_at, ended_at, boot_id, pid, bytes_added, bytes_processed, "
    "files_processed"
)


def upgrade() -> None:
    """
    Let a run's verb be clone or run; every row stays as it is.

    SQLite cannot alter a CHECK: see 0003.
    """
    for index in ("uq_runs_active_job", "ix_runs_started_at", "ix_runs_open"):
        op.drop_index(index, "runs")
    op.execute("PRAGMA legacy_alter_table = ON")
    op.rename_table("runs", "runs_0003")
    op.execute("PRAGMA legacy_alter_table = OFF")
    _runs()
    op.execute(
        f"INSERT INTO runs (rowid, {_RUN_COLUMNS}) SELECT rowid, {_RUN_COLUMNS} FROM runs_0003"
    )
    op.drop_table("runs_0003")
    op.execute("PRAGMA user_version = 4")


def downgrade() -> None:
    """Refuse: the way back is the copy that was made before the upgrade."""
    raise NotImplementedError("restore the copy of the journal instead")


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
        sa.CheckConstraint(
            "verb IN ('backup', 'snap', 'prune', 'clone', 'run')", name=op.f("ck_runs_verb")
        ),
        sa.CheckConstraint(f"state IN ({_STATES})", name=op.f("ck_runs_state")),
        sa.CheckConstraint(f"outcome IN ({_OUTCOMES})", name=op.f("ck_runs_outcome")),
        sa.CheckConstraint("cleanup = 'parked'", name=op.f("ck_runs_cleanup")),
        sa.CheckConstraint(
            "(state IN ('destroyed', 'kept', 'pruned', 'cloned', 'ran')) = (ended_at IS NOT NULL)",
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

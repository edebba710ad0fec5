"""
The journal's tables, and how an older journal is brought up to date.

Times are INTEGER microseconds since the epoch, UTC.  A ZFS guid is TEXT: it is an unsigned 64-bit
number, and SQLite's INTEGER is signed.
"""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import (
    CheckConstraint,
    Column,
    Dialect,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

from .errors import JournalError
from .names import BTRFS, LVM, PLAIN, ZFS
from .states import FINAL, STATES, Outcome, Verb

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


class _Words(TypeDecorator[str]):
    """Text for people, such as a name of a file: what is no UTF-8 in it SQLite could not store."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.encode("utf-8", "replace").decode()


# One row: which journal this is.  Effects on the machine belong to one journal.
journals = Table(
    "journals",
    metadata,
    Column("uuid", Text, primary_key=True),
    Column("machine_id", Text, nullable=False),  # sha256 of the machine's identity; see journal.py
    Column("created_at", Integer, nullable=False),
    sqlite_strict=True,
)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("verb", Text, nullable=False),
    Column("job", Text, nullable=False),  # the key: one active run each
    Column("label", Text, nullable=False),  # what people read
    Column("state", Text, nullable=False),
    Column("rev", Integer, nullable=False),  # fences transitions
    Column("outcome", Text),  # NULL until the client's end is known
    Column("cleanup", Text),  # 'parked' where something could not be removed now; else NULL
    Column("reason", _Words),  # why it failed, was rolled back or is parked; NULL for none
    Column("attempts", Integer, nullable=False),  # how often the client was started or is about to
    Column("plan", Text, nullable=False),  # JSON of plan.Plan, without secrets
    Column("client", Text, nullable=False),
    Column("repository", Text),  # the repository's own id; NULL where the client has none
    Column("moment_at", Integer),  # the snapshots' creation time; NULL until taken
    Column("started_at", Integer, nullable=False),
    Column("ended_at", Integer),  # NULL until its final state
    Column("boot_id", Text, nullable=False),  # of the newest front end, for messages
    Column("pid", Integer, nullable=False),
    Column("bytes_added", Integer),  # to the repository; NULL where the client does not tell
    Column("bytes_processed", Integer),
    Column("files_processed", Integer),
    CheckConstraint(_one_of("verb", tuple(v.value for v in Verb)), name="verb"),
    CheckConstraint(_one_of("state", STATES), name="state"),
    CheckConstraint(_one_of("outcome", tuple(o.value for o in Outcome)), name="outcome"),
    CheckConstraint("cleanup = 'parked'", name="cleanup"),
    CheckConstraint(f"({_one_of('state', FINAL)}) = (ended_at IS NOT NULL)", name="ended"),
    sqlite_strict=True,
)
# At most one active run a job; a parked one has its result and blocks nobody.
Index(
    "uq_runs_active_job",
    runs.c.job,
    unique=True,
    sqlite_where=text("ended_at IS NULL AND cleanup IS NULL"),
)
Index("ix_runs_started_at", runs.c.started_at)
Index("ix_runs_open", runs.c.started_at, sqlite_where=text("ended_at IS NULL"))

volumes = Table(
    "volumes",
    metadata,
    Column("run", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    Column("n", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("pool", Text, nullable=False),
    Column("pool_guid", Text, nullable=False),
    Column("name", Text, nullable=False),  # of the dataset
    Column("guid", Text, nullable=False),
    Column("mountpoint", Text, nullable=False),  # the live one
    Column("snapshot", Text, nullable=False),  # the whole name
    Column("snapshot_guid", Text),  # NULL until its identity was read back
    Column("createtxg", Text),  # likewise
    Column("is_empty", Integer),  # records.Content; NULL until mounted
    UniqueConstraint("run", "n"),
    CheckConstraint(_one_of("kind", (ZFS, BTRFS, LVM, PLAIN)), name="kind"),
    CheckConstraint("(snapshot_guid IS NULL) = (createtxg IS NULL)", name="identity"),
    sqlite_strict=True,
)

steps = Table(
    "steps",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payload", Text, nullable=False),  # JSON of the intent
    # NULL for a forward step.  A compensation is written with its forward step, so that an undo
    # needs no room for a new row.
    Column("compensates", Integer, ForeignKey("steps.id", ondelete="CASCADE")),
    Column("intended_at", Integer, nullable=False),
    Column("ended_at", Integer),  # NULL until the outcome is known
    Column("outcome", Text),  # NULL until then
    Column("detail", _Words),  # what was found; NULL for nothing to say
    CheckConstraint(_one_of("outcome", ("done", "failed", "not-needed", "parked")), name="outcome"),
    CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="ended"),
    sqlite_strict=True,
)
# Else each step that is deleted costs a look at all steps: it may be what one compensates.
Index(
    "ix_steps_compensates",
    steps.c.compensates,
    sqlite_where=text("compensates IS NOT NULL"),
)

moves = Table(
    "moves",
    metadata,
    Column("run", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    Column("rev", Integer, nullable=False),
    Column("at", Integer, nullable=False),
    Column("event", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("dest", Text, nullable=False),
    Column("reason", _Words),  # NULL for the ordinary course
    UniqueConstraint("run", "rev"),
    sqlite_strict=True,
)

backups = Table(
    "backups",
    metadata,
    Column("run", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    Column("n", Integer, nullable=False),
    Column("path", Text, nullable=False),  # what was backed up; paths joined by newlines
    Column("backup_id", Text),  # the repository's name for it; NULL where the client tells none
    Column("outcome", Text, nullable=False),
    Column("reason", _Words),
    Column("bytes_added", Integer),
    Column("bytes_processed", Integer),
    Column("files_processed", Integer),
    UniqueConstraint("run", "n"),
    sqlite_strict=True,
)


def upgrade(engine: Engine) -> None:
    """
    Bring an older or empty journal up to date, in one transaction.

    *engine* must have foreign keys off: SQLite alters a table by copying it, and the pragma
    cannot change inside a transaction.  They are checked before the commit.
    """
    # 360 ms to import, and needed once a release.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", os.fspath(_migrations()).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if broken:
            raise JournalError(f"the upgraded journal has {len(broken)} broken references")


def _migrations() -> Path:
    """Return the folder of the migrations: in the wheel, else beside `engine/`."""
    package = Path(__file__).parent
    for folder in (package / "migrations", package.parent.parent / "migrations"):
        if (folder / "env.py").exists():
            return folder
    raise JournalError("this installation of atomtx lacks its migrations", hint="reinstall it")

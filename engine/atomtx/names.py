"""Names of things on the machine: parse, check and print them.  Pure."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from .errors import UserError

MAX_NAME_BYTES = 255  # module/zcommon/zfs_namecheck.c: ZFS_MAX_DATASET_NAME_LEN is 256 with NUL
MARK = "atomtx:run"  # the user property that a snapshot of ours carries, source local
KEPT_MARK = "atomtx:kept"
_PREFIX = "atomtx-"
_RUN_ID = re.compile(r"[0-9a-f]{16}")
_BTRFS_SNAPSHOT = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}):(/.+)", re.DOTALL)
_BTRFS_OWN = re.compile(r"/\.(atomtx-[0-9a-f]{16})[/-][0-9]+")
_COMPONENT = re.compile(r"[A-Za-z0-9_.:-][A-Za-z0-9_.: -]*")


class RunId(str):
    """Sixteen hexadecimal digits at random: the token in each name that a run creates."""

    __slots__ = ()

    @classmethod
    def new(cls) -> RunId:
        """Make a run id that nobody else has."""
        return cls(secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str) -> RunId:
        """Read a whole run id; a :class:`UserError` for anything else."""
        if not _RUN_ID.fullmatch(text):
            raise UserError(f"{text!r} is not a run id", hint="`atomtx history` lists them")
        return cls(text)

    @property
    def token(self) -> str:
        """Return the name that this run gives to its snapshots, holds and mounts."""
        return _PREFIX + self

    @classmethod
    def from_token(cls, token: str) -> RunId | None:
        """Read :attr:`token` back; None where it is somebody else's name."""
        text = token.removeprefix(_PREFIX)
        return cls(text) if token.startswith(_PREFIX) and _RUN_ID.fullmatch(text) else None


@dataclass(frozen=True, order=True)
class Dataset:
    """A ZFS file system or volume, such as ``zroot/usr/home``; names may contain spaces."""

    name: str

    @classmethod
    def parse(cls, text: str) -> Dataset:
        """Check a name that a person typed; a :class:`UserError` says what is wrong with it."""
        if "@" in text:
            raise UserError(
                f"{text!r} names a snapshot",
                hint="name the dataset; atomtx takes the snapshot itself",
            )
        for char in "%,#":
            if char in text:
                raise UserError(f"{text!r} is not a dataset: {char!r} cannot be in its name")
        if text.startswith("-"):
            raise UserError(
                f"{text!r} is not a dataset: a name cannot begin with '-'",
                hint="options come before the datasets",
            )
        if not all(_COMPONENT.fullmatch(part) for part in text.split("/")):
            raise UserError(f"{text!r} is not the name of a dataset", hint="`zfs list` shows them")
        if len(text.encode()) > MAX_NAME_BYTES:
            raise UserError(f"{text!r} is longer than {MAX_NAME_BYTES} bytes")
        return cls(text)

    @property
    def pool(self) -> str:
        return self.name.split("/", 1)[0]

    def is_below(self, other: Dataset) -> bool:
        """Tell whether *other* is an ancestor of this dataset."""
        return self.name.startswith(other.name + "/")

    def snapshot(self, run: RunId) -> Snapshot:
        """Return the snapshot that *run* takes of this dataset."""
        return Snapshot(self, run.token)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, order=True)
class Snapshot:
    """``dataset@name``."""

    dataset: Dataset
    name: str

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Read back what :meth:`__str__` printed."""
        dataset, at, name = text.partition("@")
        if not at or not name or not dataset:
            raise ValueError(f"{text!r} is not a snapshot")
        return cls(Dataset(dataset), name)

    def check(self) -> Snapshot:
        """Return self; a :class:`UserError` if the whole name is too long for ZFS."""
        if len(str(self).encode()) > MAX_NAME_BYTES:
            raise UserError(
                f"the name of {self.dataset} is too long to be snapshotted: "
                f"{str(self)!r} has more than {MAX_NAME_BYTES} bytes"
            )
        return self

    def __str__(self) -> str:
        return f"{self.dataset}@{self.name}"


@dataclass(frozen=True, order=True)
class BtrfsSnapshot:
    """
    ``UUID:/PATH``: a snapshot by its file system, and its path below the top level of that.

    The path is below the run's own directory, ``/.atomtx-RUN/0``.  Only a snapshot of the top
    level itself lies beside it, because it would have the directory in it.
    """

    filesystem: str
    path: str

    @classmethod
    def of(cls, filesystem: str, run: RunId, n: int, *, is_top: bool) -> BtrfsSnapshot:
        """Return the snapshot that *run* takes of its volume number *n*."""
        return cls(filesystem, f"/.{run.token}{'-' if is_top else '/'}{n}")

    @classmethod
    def parse(cls, text: str) -> BtrfsSnapshot:
        """Read back what :meth:`__str__` printed."""
        match = _BTRFS_SNAPSHOT.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a snapshot")
        return cls(match[1], match[2])

    @property
    def run(self) -> RunId | None:
        """Return the run whose token the path has; None where it is somebody else's."""
        match = _BTRFS_OWN.fullmatch(self.path)
        return RunId.from_token(match[1]) if match else None

    @property
    def directory(self) -> str:
        """Return the name of the run's directory; "" for a snapshot that lies beside it."""
        return self.path.rpartition("/")[0].lstrip("/")

    def __str__(self) -> str:
        return f"{self.filesystem}:{self.path}"


def mounted_as(snapshot: str) -> str:
    """Return what a table of mounts calls a snapshot: of btrfs the path in its file system."""
    match = _BTRFS_SNAPSHOT.fullmatch(snapshot)
    return match[2] if match else snapshot


def is_within(path: str, parent: str) -> bool:
    """Tell whether *path* is *parent* or lies below it; both absolute and normal."""
    return path == parent or parent == "/" or path.startswith(parent + "/")

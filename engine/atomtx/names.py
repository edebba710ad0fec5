"""Names of things on the machine: parse, check and print them.  Pure."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from .errors import UserError

# The kinds of volumes, as the journal has them.
ZFS, BTRFS, LVM = "zfs", "btrfs", "lvm"
PLAIN = "plain"  # read live: there is no snapshot of it
MAX_NAME_BYTES = 255  # module/zcommon/zfs_namecheck.c: ZFS_MAX_DATASET_NAME_LEN is 256 with NUL
MARK = "atomtx:run"  # the user property that a snapshot of ours carries, source local
KEPT_MARK = "atomtx:kept"
COPIED = "copy:"  # before the run's id, in the kept mark that was set on a copy
TRANSIENT_MARK = "atomtx:transient"  # beside the others, of one that is meant to go again
# Where kept snapshots of btrfs lie, below the top level: which of the two is their mark.
KEPT_DIRECTORY, TRANSIENT_DIRECTORY = "atomtx-kept", "atomtx-transient"
_PREFIX = "atomtx-"
_RUN_ID = re.compile(r"[0-9a-f]{16}")
_BTRFS_SNAPSHOT = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}):(/.+)", re.DOTALL)
_BTRFS_LEAF = r"[0-9]+(?:\.[^/]+)?"
_BTRFS_OWN = re.compile(rf"/\.(atomtx-[0-9a-f]{{16}})(?:-[0-9]+|/{_BTRFS_LEAF})", re.DOTALL)
_BTRFS_KEPT = re.compile(
    rf"/(atomtx-kept|atomtx-transient)/([^/]+)\.([0-9a-f]{{16}})/({_BTRFS_LEAF})", re.DOTALL
)
_NOT_IN_LEAF = re.compile(r"[/,]")  # a comma would end an option of mount(8)
_MAX_LEAF_BYTES = 200
_LVM_NAME = r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]*"
_LVM_VOLUME = re.compile(rf"({_LVM_NAME})/({_LVM_NAME})")
_LVM_OWN = re.compile(r"(atomtx-[0-9a-f]{16})-[0-9]+")
_MAX_DEVICE_BYTES = 127  # DM_NAME_LEN less the NUL
_MAX_LVM_BYTES = 124  # of a group's and a volume's name together: LVM counts three more
# What lvm(8) has for the parts of a volume, with what LVM 2.03.31 refuses besides.
_LVM_RESERVED = (
    "_cdata", "_cmeta", "_corig", "_cpool", "_cvol", "_imeta", "_iorig", "_mimage", "_mlog",
    "_pmspare", "_rimage", "_rmeta", "_tdata", "_tmeta", "_vdata", "_vorigin", "_wcorig",
)  # fmt: skip
# A user and a host must not look like an option of ssh.
_TARGET = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*@)?"
    r"(?:(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)|\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?)\]):)?"
    r"(?P<dataset>[^:/][^:/]*(?:/.*)?)"
)
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

    @staticmethod
    def is_one(text: str) -> bool:
        """Tell whether a name has the form of a run id."""
        return _RUN_ID.fullmatch(text) is not None

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
class Target:
    """``POOL/PATH`` or ``[USER@]HOST:POOL/PATH``: the dataset below which copies are kept."""

    host: str  # as ssh(1) takes it; empty: this machine
    dataset: Dataset

    @classmethod
    def parse(cls, text: str) -> Target:
        """
        Read what a person typed; a :class:`UserError` for anything else.

        A colon before the first slash ends a host, so a pool here whose name has a colon cannot
        be a target.
        """
        match = _TARGET.fullmatch(text)
        if not match:
            raise UserError(
                f"{text!r} is not a target", hint="give POOL/PATH, or HOST:POOL/PATH for ssh"
            )
        host = (match["user"] or "") + (match["ipv6"] or match["name"] or "")
        return cls(host, Dataset.parse(match["dataset"]))

    def copy_of(self, dataset: Dataset) -> Dataset:
        """Return where a dataset's copy is: its path without the pool, below this."""
        _, slash, path = dataset.name.partition("/")
        copy = f"{self.dataset}{slash}{path}"
        if len(copy.encode()) > MAX_NAME_BYTES:
            raise UserError(f"the name of the copy is longer than {MAX_NAME_BYTES} bytes: {copy!r}")
        return Dataset(copy)

    def shown(self, name: str) -> str:
        """Return a name of the target's machine as people read it: with the host."""
        return on_host(self.host, name)

    def __str__(self) -> str:
        return self.shown(self.dataset.name)


@dataclass(frozen=True, order=True)
class BtrfsSnapshot:
    """
    ``UUID:/PATH``: a snapshot by its file system, and its path below the top level of that.

    The path is below the run's own directory, ``/.atomtx-RUN/0``.  Only a snapshot of the top
    level itself lies beside it, because it would have the directory in it.

    One that is to stay is named by where it will lie, ``/atomtx-kept/NAME.RUN/0.home``.  Until it
    is kept it is in the run's directory as well, and that becomes NAME.RUN by one rename: a
    snapshot that is read-only cannot be moved from one directory into another.
    """

    filesystem: str
    path: str

    @classmethod
    def of(cls, filesystem: str, run: RunId, n: int, *, is_top: bool) -> BtrfsSnapshot:
        """Return the snapshot that *run* takes of its volume number *n*."""
        return cls(filesystem, f"/.{run.token}{'-' if is_top else '/'}{n}")

    @classmethod
    def to_keep(
        cls, filesystem: str, run: RunId, n: int, *, name: str, volume: str, transient: bool
    ) -> BtrfsSnapshot:
        """Return the one called *name* that *run* takes, to stay, of its volume number *n*."""
        directory = f"{name}.{run}"
        if len(directory.encode()) > MAX_NAME_BYTES:
            raise UserError(f"the name {name!r} is too long for a directory of btrfs")
        where = TRANSIENT_DIRECTORY if transient else KEPT_DIRECTORY
        return cls(filesystem, f"/{where}/{directory}/{n}{_leaf(volume)}")

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
    def is_ours(self) -> bool:
        """Tell whether a run has taken it for itself, or as one that stays."""
        return bool(self.run or self.keeper)

    @property
    def taken_as(self) -> BtrfsSnapshot:
        """Return what it is until it is kept; itself where that never changes its place."""
        if not (match := self._as_kept()):
            return self
        return BtrfsSnapshot(self.filesystem, f"/.{_PREFIX}{match[3]}/{match[4]}")

    @property
    def keeper(self) -> RunId | None:
        """Return the run that kept it, where it lies among those that stay."""
        return RunId(match[3]) if (match := self._as_kept()) else None

    @property
    def name(self) -> str:
        """Return the name by which it was kept; "" where it was not."""
        return match[2] if (match := self._as_kept()) else ""

    @property
    def is_transient(self) -> bool:
        """Tell whether it lies among those that are meant to go again."""
        match = self._as_kept()
        return match is not None and match[1] == TRANSIENT_DIRECTORY

    def _as_kept(self) -> re.Match[str] | None:
        return _BTRFS_KEPT.fullmatch(self.path)

    @property
    def is_named(self) -> bool:
        """Tell whether its last part names its subvolume, as of one that stays."""
        return "." in self.path.rpartition("/")[2].removeprefix(".")

    @property
    def directory(self) -> str:
        """Return the name of the run's directory; "" for a snapshot that lies beside it."""
        return self.path.rpartition("/")[0].lstrip("/")

    def __str__(self) -> str:
        return f"{self.filesystem}:{self.path}"


@dataclass(frozen=True, order=True)
class LvmSnapshot:
    """
    ``VG/atomtx-RUN-0``: a snapshot of LVM, a logical volume beside its origin.

    One that is to stay is ``VG/LV.NAME``, where VG/LV is the origin: a group has one name but once.
    """

    group: str
    name: str

    @classmethod
    def of(cls, group: str, run: RunId, n: int) -> LvmSnapshot:
        """Return the snapshot that *run* takes of its volume number *n*."""
        return cls(group, f"{run.token}-{n}")

    @classmethod
    def to_keep(cls, origin: str, name: str) -> LvmSnapshot:
        """Return the one called *name*, to stay, of *origin*; UserError if LVM cannot have it."""
        group, _, volume = origin.partition("/")
        made = cls(group, f"{volume}.{name}")
        if not _LVM_VOLUME.fullmatch(str(made)):
            raise UserError(
                f"LVM cannot have a snapshot named {name!r}",
                hint="letters, digits, and + _ . - are allowed: give another --pattern",
            )
        if reserved := [word for word in _LVM_RESERVED if word in made.name]:
            raise UserError(
                f"LVM cannot have a snapshot named {name!r}: it keeps names with {reserved[0]!r} "
                "for itself",
                hint="give another --pattern",
            )
        device = device_name(group, made.name)
        if len(group + made.name) > _MAX_LVM_BYTES or len(device) > _MAX_DEVICE_BYTES:
            raise UserError(
                f"the name of {origin} is too long to be snapshotted: of {str(made)!r} the device "
                f"would be called {device}",
                hint="give a shorter --pattern, or one with fewer hyphens, which count twice",
            )
        return made

    @classmethod
    def parse(cls, text: str) -> LvmSnapshot:
        """Read back what :meth:`__str__` printed; other volumes have such names, too."""
        match = _LVM_VOLUME.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a snapshot")
        return cls(match[1], match[2])

    @property
    def run(self) -> RunId | None:
        """Return the run whose token the name has; None where it has none."""
        match = _LVM_OWN.fullmatch(self.name)
        return RunId.from_token(match[1]) if match else None

    def name_as_of(self, origin: str) -> str:
        """Return the name by which it was kept of *origin*; "" where it has no such name."""
        start = f"{origin.partition('/')[2]}."
        return self.name.removeprefix(start) if self.name.startswith(start) else ""

    def __str__(self) -> str:
        return f"{self.group}/{self.name}"


def on_host(host: str, name: str) -> str:
    """Return a dataset of a host as `Target.parse` reads it back; of this one, its name."""
    if not host:
        return name
    user, at, address = host.rpartition("@")
    return f"{user}{at}[{address}]:{name}" if ":" in address else f"{host}:{name}"


def _leaf(volume: str) -> str:
    """Return what tells people of which volume a kept snapshot of btrfs is; "" for the root."""
    text = "".join(c if c.isprintable() else "_" for c in _NOT_IN_LEAF.sub("-", volume.strip("/")))
    cut = text.encode()[:_MAX_LEAF_BYTES].decode(errors="ignore")
    return f".{cut}" if cut else ""


def kept_name(snapshot: str, origin: str = "") -> str:
    """
    Return the name by which a snapshot was kept: behind the "@", or of its directory.

    Of LVM, where it is of *origin*, what follows that one's name.
    """
    if origin:
        return LvmSnapshot.parse(snapshot).name_as_of(origin)
    if match := _BTRFS_SNAPSHOT.fullmatch(snapshot):
        return BtrfsSnapshot(match[1], match[2]).name
    return Snapshot.parse(snapshot).name


def pool_of(name: str) -> str:
    """Return the pool of a dataset or a snapshot, by its whole name."""
    return name.partition("@")[0].partition("/")[0]


def device_name(group: str, volume: str) -> str:
    """Return what device-mapper calls a logical volume: a hyphen is doubled, but ours is not."""
    return f"{group.replace('-', '--')}-{volume.replace('-', '--')}"


def mounted_as(snapshot: str) -> str:
    """Return what a table of mounts calls a snapshot: of btrfs its path, of LVM its device."""
    if match := _BTRFS_SNAPSHOT.fullmatch(snapshot):
        return match[2]
    if _LVM_VOLUME.fullmatch(snapshot):
        ours = LvmSnapshot.parse(snapshot)
        return f"/dev/mapper/{device_name(ours.group, ours.name)}"
    return snapshot


def is_within(path: str, parent: str) -> bool:
    """Tell whether *path* is *parent* or lies below it; both absolute and normal."""
    return path == parent or parent == "/" or path.startswith(parent + "/")

"""
A destination of xfsdump: a marked directory, and in it a folder for each dump.

    DEST/.atomtx-xfsdump              the mark: the destination's id, which the user gave it
    DEST/VOLUME/.part-RUN/            a dump in the making; nobody takes it for a dump
    DEST/VOLUME/TIME-RUN/dump         what xfsdump wrote
                         dump.sha256  for sha256sum -c, where there is no atomtx
                         manifest     what it is: level, base, size, SHA-256; and of itself
                         inventory/   xfsdump's own, of this dump and its bases alone

VOLUME is the live mountpoint, quoted.  A folder gets its name by one rename, after all in it is
durable: dump, hash and inventory are there together or not at all.  An increment is made on its
base's inventory, which holds nothing but the base's chain; so xfsdump can find no other base, and
what is forgotten needs to be taken out of none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..errors import ClientError, UserError

MARK = ".atomtx-xfsdump"
DUMP, MANIFEST, SUMS, INVENTORY = "dump", "manifest", "dump.sha256", "inventory"
_PART = ".part-"
_FORGOTTEN = ".forgotten-"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{7,63}")
_LONGEST_NAME = 255  # NAME_MAX
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Dump:
    """One dump as its manifest tells it."""

    name: str  # below the destination: VOLUME/TIME-RUN
    run: str
    job: str
    host: str
    path: str  # where the volume is mounted live
    filesystem: str  # its UUID
    at: str  # the moment, ISO 8601
    level: int
    base: str | None  # the name of the dump that it adds to
    partial: bool  # something could not be read: no base for another
    levels: tuple[int, ...]  # the rotation that chose the level
    turn: int  # which of them it was; -1: none, a level 0 that had to be
    session: str  # xfsdump's id of it
    size: int
    sha256: str
    files: int | None
    inventory: Mapping[str, str]  # SHA-256 of each file

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.at)


class Turn(NamedTuple):
    """The dump to make next."""

    level: int
    base: Dump | None
    turn: int
    why: str = ""  # it is a level 0 that nobody asked for


class DamagedError(ClientError):
    """What is in the destination is not what was written there."""


def volume_name(path: str) -> str:
    """Return the folder of a volume; UserError for a path too long for one."""
    name = quote(os.fsencode(path).lstrip(b"/") or b"/", safe="")
    if len(name) > _LONGEST_NAME:
        raise UserError(f"the path {path} is too long for a folder of dumps")
    return name


class Destination:
    """A directory of dumps."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @cached_property
    def id(self) -> str:
        """The id in the mark; UserError where there is none, as of a disk that is not mounted."""
        try:
            text = (self.path / MARK).read_text(errors="replace").strip()
        except OSError as exc:
            raise UserError(
                f"{self.path} is no destination of xfsdump: {MARK}: {exc.strerror}",
                hint=f"is its disk mounted? a new one: {self._to_begin}",
            ) from exc
        if not _ID.fullmatch(text):
            raise UserError(f"{self.path / MARK} holds no id", hint=self._to_begin)
        return text

    @property
    def _to_begin(self) -> str:
        return f"`cat /proc/sys/kernel/random/uuid >{shlex.quote(str(self.path / MARK))}`"

    def check_id(self, wanted: str | None) -> None:
        """Raise ClientError where it is not the destination that a run was planned for."""
        if self.id != (wanted or self.id):
            raise ClientError(
                f"{self.path} is another destination than before: {self.id}, not {wanted}",
                hint="mount the right disk there",
            )

    def folder(self, path: str) -> Path:
        """Return where the dumps of a volume are."""
        return self.path / volume_name(path)

    def part(self, path: str, run: str) -> Path:
        """Return where a run makes its dump of a volume."""
        return self.folder(path) / f"{_PART}{run}"

    def name(self, path: str, run: str, at: datetime) -> str:
        """Return the name of a run's dump of a volume."""
        return f"{volume_name(path)}/{at:%Y%m%dT%H%M%SZ}-{run}"

    # -- reading ---------------------------------------------------------------------------

    def dump(self, name: str) -> Dump:
        """Read a manifest; DamagedError where it is absent, or not what was written."""
        path = self.path / name / MANIFEST
        try:
            digest, _, body = path.read_bytes().partition(b" ")
        except OSError as exc:
            raise DamagedError(f"the dump {name} is not there: {exc.strerror}") from exc
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise DamagedError(f"the manifest of the dump {name} is damaged")
        data: dict[str, Any] = json.loads(body)
        known = {key: data[key] for key in Dump.__dataclass_fields__}
        return Dump(**known | {"name": name, "levels": tuple(data["levels"])})

    def dumps(self, path: str) -> list[Dump]:
        """Return the dumps of a volume whose manifests are whole, the oldest first."""
        found = []
        for folder in _listed(self.folder(path)):
            if not folder.name.startswith("."):
                with suppress(DamagedError):
                    found.append(self.dump(f"{folder.parent.name}/{folder.name}"))
        return sorted(found, key=lambda dump: (dump.time, dump.name))

    def chain(self, name: str) -> list[Dump]:
        """Return a dump with all that it is based on, level 0 first; DamagedError without one."""
        found = [self.dump(name)]
        while base := found[0].base:
            below = self.dump(base)
            if below.level >= found[0].level:
                raise DamagedError(f"the dump {base} is no base of {found[0].name}")
            found.insert(0, below)
        return found

    def trouble(self, dump: Dump) -> str | None:
        """Tell what a look at a dump's size finds wrong, without reading it."""
        try:
            size = (self.path / dump.name / DUMP).stat().st_size
        except OSError as exc:
            return f"the dump {dump.name} cannot be read: {exc.strerror}"
        if size != dump.size:
            return f"the dump {dump.name} has {size} bytes, and was written with {dump.size}"
        return None

    def damage(self, dump: Dump) -> str | None:
        """Tell what is wrong with a dump, reading all of it."""
        trouble = self.trouble(dump)
        if trouble:
            return trouble
        try:
            found = digest_of(self.path / dump.name / DUMP)
        except OSError as exc:
            return f"the dump {dump.name} cannot be read: {exc.strerror}"
        if found != dump.sha256:
            return f"the dump {dump.name} is damaged: its SHA-256 is {found}, not {dump.sha256}"
        return None

    # -- choosing --------------------------------------------------------------------------

    def next_turn(self, path: str, filesystem: str, levels: tuple[int, ...], at: datetime) -> Turn:
        """
        Choose the level and the base of a dump of what *path* was at *at*.

        Of this host's dumps alone, as `forget` does: machines made from one image have file
        systems with the same UUID.
        """
        ours = [dump for dump in self.dumps(path) if dump.host == this_host()]
        dumps = [dump for dump in ours if dump.filesystem == filesystem]
        turn = next_turn(dumps, levels, at, lambda dump: self.trouble(dump) is None)
        if turn.base and not self._has_inventory(turn.base):
            return Turn(0, None, forced(levels), f"the inventory of {turn.base.name} is damaged")
        return turn

    def _has_inventory(self, dump: Dump) -> bool:
        try:
            return digests(self.path / dump.name / INVENTORY) == dict(dump.inventory)
        except OSError:
            return False

    # -- writing ---------------------------------------------------------------------------

    def begin(self, path: str, run: str, base: Dump | None) -> Path:
        """
        Make the folder of a new dump, with its base's inventory; an older part of the run goes.

        No process of the run's older attempts may live.
        """
        part = self.part(path, run)
        part.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        inventory = part / INVENTORY
        inventory.mkdir(mode=0o700)
        for name in base.inventory if base else ():
            assert base is not None
            shutil.copyfile(self.path / base.name / INVENTORY / name, inventory / name)
        return part

    def commit(self, part: Path, dump: Dump) -> None:
        """Make all of a dump durable, then its name; OSError leaves it a part."""
        body = json.dumps(asdict(dump), sort_keys=True).encode()
        manifest = hashlib.sha256(body).hexdigest().encode() + b" " + body
        (part / MANIFEST).write_bytes(manifest)
        (part / SUMS).write_text(f"{dump.sha256}  {DUMP}\n")
        for path in (*_files(part / INVENTORY), part / MANIFEST, part / SUMS, part / DUMP):
            sync(path)
        for path in (part / INVENTORY, part):
            sync(path)
        final = self.path / dump.name
        os.rename(part, final)
        for path in (final.parent, self.path):
            sync(path)

    def discard(self, part: Path) -> None:
        """Remove a part, and the volume's folder if nothing else is in it."""
        shutil.rmtree(part)
        with suppress(OSError):  # it holds dumps
            part.parent.rmdir()

    def remove_parts(self, run: str) -> list[Path]:
        """Remove what a dead run left half made; return what it was."""
        left = [p for folder in _listed(self.path) for p in folder.glob(f"{_PART}{run}")]
        for part in left:
            self.discard(part)
        return left

    def forget(self, path: str, keep: int, host: str) -> list[str]:
        """
        Remove the chains of this host's dumps but for the newest *keep*; return their names.

        Increments go before their bases, and each at once: what is left is whole at any instant.
        A chain whose level 0 is damaged is neither counted nor removed.
        """
        for left in _listed(self.folder(path)):  # of one that was killed
            if left.name.startswith(_FORGOTTEN):
                shutil.rmtree(left)
        gone = superseded([d for d in self.dumps(path) if d.host == host], keep, self.trouble)
        for dump in gone:
            folder = self.path / dump.name
            doomed = folder.with_name(f"{_FORGOTTEN}{folder.name}")
            os.rename(folder, doomed)
            sync(folder.parent)
            shutil.rmtree(doomed)
        return [dump.name for dump in gone]


# -- decisions ---------------------------------------------------------------------------------


def forced(levels: Sequence[int]) -> int:
    """Return the turn of a level 0 that had to be: that of a rotation's first 0."""
    return levels.index(0) if 0 in levels else -1


def next_turn(
    dumps: Sequence[Dump],
    levels: tuple[int, ...],
    at: datetime,
    is_there: Callable[[Dump], bool],
) -> Turn:
    """
    Return the turn after *dumps*, which are of one file system, the oldest first.

    The base is the newest dump below the level in the newest chain that is whole.
    """
    chains = _chains(dumps, is_there)
    if not chains:
        why = "there is no whole dump to add to" if dumps else "it is the first dump"
        return Turn(0, None, forced(levels), why if levels[0] else "")
    last = chains[-1][-1]
    if dumps[-1].time >= at:
        return Turn(0, None, forced(levels), f"the last dump, of {dumps[-1].at}, is no older")
    turn = (last.turn + 1) % len(levels) if last.levels == levels else 0
    below = [dump for dump in chains[-1] if dump.level < levels[turn]]
    if levels[turn] == 0:
        return Turn(0, None, turn)
    return Turn(levels[turn], below[-1], turn)


def _chains(dumps: Sequence[Dump], is_there: Callable[[Dump], bool]) -> list[list[Dump]]:
    """Return each dump that can be a base, behind its bases, by its own age."""
    found: dict[str, list[Dump]] = {}
    for dump in dumps:
        if dump.partial or not is_there(dump):
            continue
        if dump.base is None:
            found[dump.name] = [dump]
        elif dump.base in found:
            found[dump.name] = [*found[dump.base], dump]
    return list(found.values())


def superseded(
    dumps: Sequence[Dump], keep: int, trouble: Callable[[Dump], str | None]
) -> list[Dump]:
    """
    Return what is in none of the newest *keep* chains, increments before their bases.

    *dumps* are the oldest first.  A partial level 0 goes with the chains around it.
    """
    chains = [
        _above(root, dumps)
        for root in dumps
        if root.base is None and not root.partial and trouble(root) is None
    ]
    chains.sort(key=lambda chain: chain[-1].time)
    kept, doomed = chains[-keep:], chains[:-keep]
    if not doomed:
        return []
    since = min(chain[0].time for chain in kept)
    halves = (d for d in dumps if d.partial and d.base is None and d.time < since)
    gone = {dump.name for chain in (*doomed, halves) for dump in chain}
    return [dump for dump in reversed(dumps) if dump.name in gone]


def _above(root: Dump, dumps: Sequence[Dump]) -> list[Dump]:
    """Return *root* and all that is based on it, the oldest first."""
    found = {root.name: root}
    for dump in dumps:
        if dump.base in found:
            found[dump.name] = dump
    return list(found.values())


# -- files -------------------------------------------------------------------------------------


def this_host() -> str:
    return socket.gethostname()


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            found.update(data)
    return found.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder."""
    return {path.name: digest_of(path) for path in _files(folder)}


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _listed(folder: Path) -> Iterable[Path]:
    """Return the directories in a folder; none of one that is not there."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []

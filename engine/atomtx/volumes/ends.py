"""
ZFS at one end of a clone: on this machine, or on another one through ssh.

Each function starts one process, whatever the number of datasets.  What is run on the other
machine is a line for its shell, quoted word by word: ssh has no other way.

Sources: zfs-send(8), zfs-receive(8), ssh(1); what OpenZFS 2.3.9 printed on Linux 6.12.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from .. import process
from ..errors import EffectError
from ..names import COPIED, KEPT_MARK, Dataset, Target, on_host
from ..replica import Copy, Point, Resume, Source, Transfer
from .kind import Kept
from .zfs import Zfs, lines_of

# No question that nobody answers; a machine that is gone is noticed within a minute.
SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15",
    "-o", "ServerAliveCountMax=4", "-o", "ConnectTimeout=30", "-o", "LogLevel=ERROR",
    # A connection of its own: one that is shared would outlive it, with our locks.
    "-o", "ControlMaster=no", "-o", "ControlPath=none",
)  # fmt: skip
_SSH_FAILED = 255
# What changes nothing may be killed.  A machine may answer to ssh, and its `zfs` may hang for ever;
# that of a slow pool with very many snapshots may take a quarter of an hour.
_LOOKS = (("zpool", "list"), ("zfs", "list"), ("zfs", "get"), ("zfs", "holds"), ("zstd", "-qV"))
_ANSWER_S = 1800.0
# What a login shell prints first, such as a terminal's title, may have no end of line.  In the
# words of sh, whatever that shell is: csh takes `>&2` for a file.
_ON_A_NEW_LINE = ("sh", "-c", 'echo; echo >&2; exec "$@"', "sh")
# A copy is never mounted over the files of this machine, shared, or written to.
_COPY = ("-o", "readonly=on", "-x", "com.sun:auto-snapshot")
_PLAIN = ("-x", "encryption")  # else a plain one could not be kept below one that is encrypted
_FILES = ("-o", "canmount=noauto", "-x", "mountpoint", "-x", "sharenfs", "-x", "sharesmb")
# A copy may keep more snapshots than its source, and they count: beyond a quota it would take none
# (psy0rz/zfs_autobackup#92).  A refquota of today may be less than an older snapshot refers to, and
# then it is not received: EDQUOT (dsl_dataset_clone_swap_check_impl in dsl_dataset.c of OpenZFS).
_QUOTA = ("-x", "quota", "-x", "refquota")  # no properties of a volume
_ROOM = ("-x", "reservation", "-x", "refreservation")  # else it is taken at the target besides
_ARGUMENT_BYTES = 100_000  # of 131,072: execve(2), MAX_ARG_STRLEN
_QUOTES = 3
# What begins a complaint of exit status 1 (zfs_main.c; zfs_verror and libzfs_error_init in libzfs).
_COMPLAINTS = ("cannot ", "no datasets ", "internal error", "Permission denied ", "The ZFS ")
_COLUMNS = f"name,type,guid,createtxg,userrefs,{KEPT_MARK}"


class UnreachableError(EffectError):
    """The other machine cannot be asked."""


class End(Zfs):
    """
    The `zfs` of one machine; *host* as ssh(1) takes it, empty for this one.

    *check* is called as long as another machine does not answer, and may raise Interrupted.
    """

    def __init__(
        self,
        lock: int | None = None,
        *,
        host: str = "",
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(lock)
        self.host = host
        self._check = check
        if host:
            self._of = f" of {host}"
            self._hint = f"`ssh -o BatchMode=yes {host} zpool list` must work for this user"

    def _run(self, *argv: str) -> process.Completed:
        if not self.host:
            return super()._run(*argv)
        try:
            done = process.run(
                remote(self.host, (*_ON_A_NEW_LINE, *argv)),
                env=process.users_environment(),
                pass_fds=self._locks,
                timeout_s=_ANSWER_S if argv[:2] in _LOOKS else None,
                check=self._check,
            )
        except process.UnansweredError as exc:
            words = f"{self.host} cannot be asked: `{' '.join(argv[:2])}` has not ended there"
            raise UnreachableError(f"{words} after {_ANSWER_S:.0f} s", hint=self._hint) from exc
        if done.status == _SSH_FAILED:
            raise UnreachableError(
                f"{self.host} cannot be reached: {done.last_line()}",
                hint=self._hint,
            )
        return done

    def _said(self, done: process.Completed) -> list[str]:
        """Return what a command complained of; what else a login shell prints is none of it."""
        said = super()._said(done)
        return [line for line in said if line.startswith(_COMPLAINTS)] if self.host else said

    # -- looking ---------------------------------------------------------------------------

    def require(self, pool: str, guid: str) -> None:
        """Raise UnreachableError unless that very pool is imported there, and answers."""
        there = next((each for each in self.pools() if each.name == pool), None)
        if there is None:
            raise UnreachableError(f"pool {self.shown(pool)} is not imported")
        if there.guid != guid:
            raise UnreachableError(f"the pool {self.shown(pool)} that is imported is another one")
        if there.health == "SUSPENDED":
            raise UnreachableError(f"pool {self.shown(pool)} is suspended")

    def guid_of(self, pool: str) -> str:
        """Return the guid of a pool; UnreachableError where it is not imported."""
        guid = next((each.guid for each in self.pools() if each.name == pool), None)
        if guid is None:
            raise UnreachableError(f"there is no pool {self.shown(pool)}", hint="is it imported?")
        if not guid or not guid.isascii():  # the `zpool` of another machine may be anybody's
            raise UnreachableError(f"the pool {self.shown(pool)} has no guid", hint=self._hint)
        return guid

    def sources(self, datasets: Collection[str], kept: Iterable[Kept]) -> dict[str, Source]:
        """
        Return datasets as they can be sent; of their snapshots those of *kept* are wanted.

        One that is gone is absent from the answer.
        """
        keepers = {each.guid: each.keeper for each in kept}
        found = self._list(
            "filesystem,volume,snapshot,bookmark", f"{_COLUMNS},encryption", datasets
        )
        points = self._points(found, keepers)
        return {
            name: Source(
                name,
                is_volume=kind == "volume",
                is_encrypted=encryption not in ("off", "-"),
                snapshots=tuple(points.get((name, "@"), ())),
                bookmarks=tuple(points.get((name, "#"), ())),
            )
            for name, kind, *_, encryption in found
            if name in datasets
        }

    def copies(self, datasets: Collection[str]) -> dict[str, Copy]:
        """Return what there is under these names; one that is absent is absent from the answer."""
        found = self._list(
            "filesystem,volume,snapshot", f"{_COLUMNS},receive_resume_token", datasets
        )
        points = self._points(found, {})
        return {
            name: Copy(
                name,
                exists=True,
                snapshots=tuple(points.get((name, "@"), ())),
                token=token.removeprefix("-"),
                host=self.host,
            )
            for name, *_, token in found
            if name in datasets
        }

    def _list(self, types: str, columns: str, datasets: Collection[str]) -> list[list[str]]:
        """
        Return lines of columns; what else a login shell prints is none.

        Raises EffectError for a line of one of *datasets* that has other columns: what is not
        read is not absent.
        """
        count = columns.count(",") + 1
        lines = [
            line.split("\t")
            for part in portions(sorted(datasets))
            for line in lines_of(self._list_some(types, columns, part))
        ]
        for name, *rest in lines:
            if rest and len(rest) != count - 1 and _dataset_of(name) in datasets:
                raise EffectError(
                    f"cannot read the snapshots{self._of}: what zfs prints of {name!r} is no line "
                    "of them",
                    hint=f"does its {KEPT_MARK} hold a tab, or the end of a line?",
                )
        return [line for line in lines if len(line) == count]

    def _list_some(self, types: str, columns: str, datasets: Sequence[str]) -> str:
        done = self._run("zfs", "list", "-Hp", "-d", "1", "-t", types, "-o", columns, *datasets)
        if not done.ok and self._failure(done):
            raise done.error(f"cannot list the datasets{self._of}")
        return done.stdout

    def _points(
        self, found: Iterable[Sequence[str]], keepers: Mapping[str, str]
    ) -> dict[tuple[str, str], list[Point]]:
        """
        Return snapshots and bookmarks by (dataset, "@" or "#"), the oldest first.

        Those whose guid has one of *keepers* are wanted.  Raises EffectError for what ZFS does not
        print: the `zfs` of another machine may be anybody's.
        """
        points: dict[tuple[str, str], list[Point]] = {}
        for line in found:
            name, kind, *_ = line
            sign = {"snapshot": "@", "bookmark": "#"}.get(kind)
            if not sign:
                continue
            try:
                point = _point(line, sign, keepers)
            except ValueError as exc:
                what = f"what zfs prints of {name!r} is none"
                raise EffectError(f"cannot read the snapshots{self._of}: {what}") from exc
            points.setdefault((name.partition(sign)[0], sign), []).append(point)
        for each in points.values():
            each.sort(key=lambda point: point.createtxg)
        return points

    def shown(self, name: str) -> str:
        """Return a name of that machine as people read it."""
        return on_host(self.host, name)

    def size(self, source: Source, transfer: Transfer) -> int | None:
        """Return about how many bytes a stream has; None where ZFS does not tell."""
        argv = send_argv(source, transfer)
        done = self._run(*argv[:2], "-nP", *argv[2:])
        lines = [line.split("\t") for line in lines_of(done.stdout + done.stderr)]
        sizes = [words[1] for words in lines if len(words) == 2 and words[0] == "size"]
        return int(sizes[-1]) if done.ok and sizes and sizes[-1].isdigit() else None

    def has_zstd(self) -> bool:
        """Tell whether zstd can be run there."""
        if not self.host:
            return process.which("zstd") is not None
        return self._run("zstd", "-qV").ok

    # -- changing --------------------------------------------------------------------------

    def roll_back(self, snapshot: str) -> None:
        """
        Forget what was changed since a dataset's newest snapshot; idempotent.

        EffectError where *snapshot* is not the newest any more: without -r, nothing is destroyed.
        """
        done = self._run("zfs", "rollback", snapshot)
        if not done.ok:
            raise done.error(f"cannot roll back to {self.shown(snapshot)}")

    def mark(self, snapshots: Sequence[str], *, keeper: str) -> None:
        """
        Give copies the mark of the run that has kept their snapshots; idempotent.

        It says that they are copies, as the source of one that was received does.
        """
        mark = COPIED + keeper.removeprefix(COPIED)
        done = self._run("zfs", "set", f"{KEPT_MARK}={mark}", *snapshots)
        if not done.ok:
            raise done.error(f"cannot mark {self.shown(snapshots[0])} as kept")

    def abort(self, copy: str) -> None:
        """Throw away the part of a stream that *copy* has; idempotent."""
        done = self._run("zfs", "receive", "-A", copy)
        left = self.copies([copy]).get(copy)
        if left and left.token:
            raise done.error(f"cannot throw away what {copy} has of a stream")


def _dataset_of(name: str) -> str:
    """Return the dataset of a snapshot or a bookmark; a dataset is its own."""
    return name.partition("@")[0].partition("#")[0]


def _point(line: Sequence[str], sign: str, keepers: Mapping[str, str]) -> Point:
    """Return a snapshot or a bookmark; ValueError for what is none."""
    name, _, guid, createtxg, holds, mark, _ = line
    name.index(sign)
    return Point(
        name,
        guid,
        int(createtxg),
        wanted=sign == "@" and guid in keepers,
        holds=int(holds) if holds.isdigit() else 0,
        keeper=keepers.get(guid, "") or mark.removeprefix("-"),
    )


def portions(names: Sequence[str]) -> Iterator[list[str]]:
    """Part names into so many as one argument of ssh can hold; nearly always that is all."""
    part: list[str] = []
    size = 0
    for name in names:
        length = len(name.encode()) + _QUOTES
        if part and size + length > _ARGUMENT_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += length
    if part:
        yield part


# -- commands ----------------------------------------------------------------------------------


def send_argv(source: Source, transfer: Transfer) -> tuple[str, ...]:
    """
    Return the command that writes a stream.

    Blocks as they lie on the disk, large and compressed, but for embedded ones, which no dataset
    that is encrypted takes.  An encrypted one is sent as it is, and never leaves in the clear.
    With the properties that were set on it.
    """
    if isinstance(transfer, Resume):
        return ("zfs", "send", "-t", transfer.token)
    flags = "-Lcpw" if source.is_encrypted else "-Lcp"
    if transfer.base is None:
        return ("zfs", "send", flags, transfer.to.name)
    which = "-I" if transfer.between else "-i"
    return ("zfs", "send", flags, which, transfer.base.name, transfer.to.name)


def receive_argv(source: Source, copy: str) -> tuple[str, ...]:
    """
    Return the command that reads a stream into *copy*, and keeps what it has if it is cut off.

    Never with -F: it would destroy every snapshot that somebody took there since.
    """
    options = (
        *_COPY,
        *_ROOM,
        *(() if source.is_volume else (*_FILES, *_QUOTA)),
        *(() if source.is_encrypted else _PLAIN),
    )
    return ("zfs", "receive", "-s", "-u", *options, copy)


def remote(host: str, *commands: Sequence[str]) -> tuple[str, ...]:
    """Return a command that runs a pipe of *commands* on *host*."""
    path = f"PATH={process.BASE_ENVIRONMENT['PATH']}"  # a login of its own may lack /usr/sbin
    return (*SSH, "--", host, " | ".join(shlex.join(("env", path, *argv)) for argv in commands))


def end_of(
    target: Target, lock: int | None = None, check: Callable[[], None] = lambda: None
) -> End:
    """Return the end of a target."""
    return End(lock, host=target.host, check=check)


def parent_of(dataset: str) -> str:
    """Return the dataset that another lies in; empty for a pool's own."""
    return Dataset(dataset).name.rpartition("/")[0]

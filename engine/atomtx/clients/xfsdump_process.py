"""
The process around xfsdump: one dump of one volume, into its destination, or none of it.

    python -m atomtx.clients.xfsdump_process dump ...     a part of the run's client
    python -m atomtx.clients.xfsdump_process forget ...   the retention

It runs xfsdump in a mount namespace of its own, inside the run's, where /var/lib/xfsdump is the
inventory of the dump that is made: the machine's own is never seen, and the kernel takes ours
away however we end.  xfsdump writes to a pipe: what is hashed is what it wrote, not what a disk
gave back, and nothing has to be read twice.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import selectors
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .. import locks, process
from ..errors import AtomtxError, ClientError
from ..mounts import namespace
from ..mounts.witness import Witness
from ..names import is_within
from . import dumps
from .dumps import Destination, Dump, Turn
from .xfsdump_reader import OURS, Said, lost_words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import Popen

MODULE = "atomtx.clients.xfsdump_process"
STATE = "/var/lib"
INVENTORY = f"{STATE}/xfsdump/inventory"  # compiled in
_MARKER = f"{STATE}/xfsdump/moment"
# A file's time is that of the last tick, and a snapshot's is in whole seconds: what was changed
# just after the moment may look older.  So much is dumped again.
SLACK_S = 2
_READ_BYTES = 1 << 20
_PROGRESS_S = 1
_LOCK_S = 60.0
_LABEL_CHARS = 100
# linux/fs/xfs/libxfs/xfs_fs.h: XFS_IOC_FSGEOMETRY_V1, struct xfs_fsop_geom_v1
_GEOMETRY_BYTES = 112
_GEOMETRY = 2 << 30 | _GEOMETRY_BYTES << 16 | ord("X") << 8 | 100
_UUID_AT = 64


def main(words: Sequence[str]) -> int:
    """Do what the words say; exit statuses: 0 done, 1 not done, and nothing is left of it."""
    asked = _parser().parse_args(words)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a retention bears to be cut off anywhere
    try:
        return _dump(asked) if asked.what == "dump" else _forget(asked)
    except AtomtxError as exc:
        _say(str(exc))
    except OSError as exc:
        _say(f"{exc.filename or asked.destination}: {exc.strerror}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=MODULE, allow_abbrev=False)
    what = parser.add_subparsers(dest="what", required=True)
    dump = what.add_parser("dump", allow_abbrev=False)
    forget = what.add_parser("forget", allow_abbrev=False)
    for each in (dump, forget):
        each.add_argument("--destination", required=True)
        each.add_argument("--id", default="")
    dump.add_argument("--run", required=True)
    dump.add_argument("--job", default="")
    dump.add_argument("--at", required=True, type=datetime.fromisoformat)
    dump.add_argument("--levels", required=True, type=levels)
    dump.add_argument("--path", required=True, help="where the volume is mounted live")
    dump.add_argument("--source", required=True, help="where it is mounted now")
    dump.add_argument("--program", default="xfsdump")
    forget.add_argument("--keep-chains", required=True, type=int)
    forget.add_argument("paths", nargs="+")
    return parser


def levels(text: str) -> tuple[int, ...]:
    """Read a rotation, such as "0,1,2"; ValueError for any other text."""
    found = tuple(int(word) for word in text.split(","))
    if not all(0 <= level <= 9 for level in found):
        raise ValueError(text)
    return found


def _say(text: str) -> None:
    print(f"{OURS}{text}", file=sys.stderr, flush=True)


def _forget(asked: Any) -> int:
    destination = Destination(asked.destination)
    destination.check_id(asked.id)
    for path in asked.paths:
        if not destination.folder(path).is_dir():
            continue
        with _locked(destination.folder(path), fcntl.LOCK_EX):
            for name in destination.forget(path, asked.keep_chains, dumps.this_host()):
                print(f"forgotten: {name}", flush=True)
    return 0


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Hold a volume's folder for a block: shared to add a dump, alone to forget some."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not locks.wait_until(lambda: locks.try_lock(descriptor, kind), _LOCK_S):
            raise ClientError(
                f"another run is at work on the dumps in {folder}", hint="try again when it ended"
            )
        yield
    finally:
        os.close(descriptor)


# -- one dump ----------------------------------------------------------------------------------


def _dump(asked: Any) -> int:
    destination = Destination(asked.destination)
    destination.check_id(asked.id)
    name = destination.name(asked.path, asked.run, asked.at.astimezone(UTC))
    if (destination.path / name).exists():  # an attempt that was killed after the rename
        return _tell_again(destination, name)
    folder = destination.folder(asked.path)
    folder.mkdir(mode=0o700, exist_ok=True)
    with _locked(folder, fcntl.LOCK_SH):
        return _make(destination, name, asked)


def _tell_again(destination: Destination, name: str) -> int:
    found = destination.dump(name)
    damage = destination.damage(found)
    if damage:
        raise ClientError(damage, hint=f"remove {destination.path / name}")
    _say(f"the dump {name} was made by an earlier attempt, and is whole")
    _tell(found, None)
    return 0


def _tell(dump: Dump, lost: str | None) -> None:
    what = {"dump": dump.name, "level": dump.level, "base": dump.base, "size": dump.size}
    more = {"sha256": dump.sha256, "files": dump.files}
    lost = lost or ("some files could not be read" if dump.partial else None)
    print(json.dumps({**what, **more, "lost": lost}), flush=True)


def _make(destination: Destination, name: str, asked: Any) -> int:
    # Before the namespace: the runner's witness sees that we are in the run's.
    source = os.open(asked.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    filesystem = filesystem_id(source, asked.source)
    turn = destination.next_turn(asked.path, filesystem, asked.levels, asked.at)
    if turn.why:
        _say(f"level 0: {turn.why}")
    part = destination.begin(asked.path, asked.run, turn.base)
    try:
        made, lost = _write(part, name, filesystem, turn, asked)
        destination.commit(part, made)
    except (AtomtxError, OSError):
        if part.exists():  # else it has its name, and the next attempt finds it
            destination.discard(part)
        raise
    _tell(made, lost)
    return 0


def _write(
    part: Path, name: str, filesystem: str, turn: Turn, asked: Any
) -> tuple[Dump, str | None]:
    """Let xfsdump write its dump; raise ClientError unless it says that it is one."""
    stop = _Stop()
    source = _show_inventory(part / dumps.INVENTORY, asked.source, asked.destination)
    moment_s = int(asked.at.timestamp()) - SLACK_S
    Path(_MARKER).touch()
    os.utime(_MARKER, (moment_s, moment_s))
    label = f"{asked.job} {asked.at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}".strip()
    witness = Witness([source])
    with open(part / dumps.DUMP, "xb", buffering=0) as file:
        options = ("-F", "-l", str(turn.level), "-L", label[-_LABEL_CHARS:], "-M", asked.run)
        pace = ("-t", _MARKER, "-p", str(_PROGRESS_S), "-")
        running = _Xfsdump((asked.program, *options, *pace, source), file, witness, stop)
        said = running.run()
    if witness.saw is False:
        raise ClientError("xfsdump read nothing of the frozen files")
    lost = lost_words(said.lost)
    made = Dump(
        name=name,
        run=asked.run,
        job=asked.job,
        host=dumps.this_host(),
        path=asked.path,
        filesystem=filesystem,
        at=asked.at.isoformat(),
        level=turn.level,
        base=turn.base.name if turn.base else None,
        partial=lost is not None,
        levels=asked.levels,
        turn=turn.turn,
        session=said.session,
        size=running.size,
        sha256=running.digest.hexdigest(),
        files=said.files,
        inventory=dumps.digests(part / dumps.INVENTORY),
    )
    return made, lost


def filesystem_id(descriptor: int, path: str) -> str:
    """Return the UUID of the XFS that a directory is on; ClientError where it is on none."""
    answer = bytearray(_GEOMETRY_BYTES)
    try:
        fcntl.ioctl(descriptor, _GEOMETRY, answer)
    except OSError as exc:
        raise ClientError(f"{path} is on no XFS file system: {exc.strerror}") from exc
    return str(uuid.UUID(bytes=bytes(answer[_UUID_AT : _UUID_AT + 16])))


def _show_inventory(inventory: Path, source: str, destination: str) -> str:
    """
    Enter a namespace where xfsdump finds *inventory* at its place; return where *source* is.

    The place may be absent, or in a frozen /: a new file system stands over /var/lib, and what
    of ours is below that is brought back.  The source is read-only in any case: xfsdump would
    write a file with the quotas into it.
    """
    namespace.enter()
    flags = namespace.MS_NOSUID | namespace.MS_NODEV
    opened = {p: os.open(p, os.O_PATH | os.O_CLOEXEC) for p in (source, destination)}
    own = os.open(inventory, os.O_PATH | os.O_CLOEXEC)
    namespace.mount("none", STATE, "tmpfs", flags, "size=1m,mode=755")
    os.makedirs(INVENTORY)
    namespace.mount(f"/proc/self/fd/{own}", INVENTORY, None, namespace.MS_BIND)
    if is_within(destination, STATE):
        os.makedirs(destination)
        _bind(opened[destination], destination)
    if source == "/":  # there is no place over it; a frozen one is read-only
        return source
    shown = f"{STATE}/source" if source == STATE else source
    if is_within(shown, STATE):
        os.makedirs(shown)
    _bind(opened[source], shown)
    read_only = namespace.MS_BIND | namespace.MS_REMOUNT | namespace.MS_RDONLY
    namespace.mount("none", shown, None, read_only | flags)
    return shown


def _bind(descriptor: int, target: str) -> None:
    namespace.mount(f"/proc/self/fd/{descriptor}", target, None, namespace.MS_BIND)


class _Stop:
    """
    A request to stop, given to xfsdump, which then ends in order.

    Python's own handlers would end us in its midst; an ignored signal xfsdump would inherit.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._child: Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.ask())

    def ask(self) -> None:
        self.is_asked = True
        if self._child:
            with suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGINT)

    def reaches(self, child: Popen[bytes]) -> None:
        """Stop *child* when asked, also where that was before."""
        self._child = child
        if self.is_asked:
            self.ask()


class _Xfsdump:
    """xfsdump at work: what it writes is hashed and kept, what it says is read and passed on."""

    def __init__(self, argv: Sequence[str], file: IO[bytes], witness: Witness, stop: _Stop) -> None:
        self._argv = argv
        self._stop = stop
        self._file = file
        self._witness = witness
        self._said = Said()
        self._rest = b""
        self._failed: OSError | None = None
        self.size = 0
        self.digest = sha256()

    def run(self) -> Said:
        """Run it to its end; ClientError for any but a success."""
        child = process.spawn_part(self._argv)
        self._stop.reaches(child)
        self._read(child)
        status = child.wait()
        if self._failed:
            raise ClientError(f"cannot write {self._file.name}: {self._failed.strerror}")
        if status != 0 or not self._said.is_whole:
            raise ClientError(f"xfsdump: {self._said.trouble()}; exit status {status}")
        return self._said

    def _read(self, child: Popen[bytes]) -> None:
        assert child.stdout
        assert child.stderr
        with suppress(OSError):  # more than the kernel allows: then it is as it was
            fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, _READ_BYTES)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ, self._keep)
            selector.register(child.stderr, selectors.EVENT_READ, self._pass_on)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, _READ_BYTES)
                    key.data(data)
                    if not data:
                        selector.unregister(key.fileobj)
                self._witness.look()

    def _keep(self, data: bytes) -> None:
        if self._failed:
            return  # it is being stopped: the rest is read so that it can end
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as exc:
            self._failed = exc
            self._stop.ask()
            return
        self.size += len(data)
        self.digest.update(data)

    def _pass_on(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + (data or b"\n")).split(b"\n")
        for line in filter(None, lines):
            text = line.decode(errors="replace")
            self._said.line(text)
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
Read and hash what a directory holds, in threads.

hashlib and the system calls release the interpreter's lock, so threads use all cores, and can
share open directories.  A file counts as read only if stat(2) says the same before and after.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

from .entry import Entry, State, pack, stat_of
from .walk import CHANGED, open_at, reason_of

BUFFER_BYTES = 1 << 20
BATCH_FILES, BATCH_BYTES = 64, 4 << 20
BATCHES_A_THREAD = 8  # so many may wait: each holds a descriptor
_PATIENCE_S = 0.5
_TRIES = 2
_NO_XATTRS = (errno.ENOTSUP, errno.ENOSYS)
_NO_PROC = "its extended attributes cannot be read: is /proc mounted?"


class Reading(NamedTuple):
    """What was read of one name."""

    info: os.stat_result | None  # None: it went away meanwhile
    target: bytes | None = None
    xattrs: bytes | None = None
    digest: bytes | None = None
    error: str | None = None

    def entry(self, name: bytes, state: State = State.CLEAN) -> Entry:
        """Return the entry of something that did not go away; *state* where it was read."""
        assert self.info is not None
        state = State.UNREADABLE if self.error else state
        stated = stat_of(self.info)
        return Entry(name, *stated, self.target, self.xattrs, self.digest, state, self.error)


class Item(NamedTuple):
    """One name to read, and what the caller wants to know of it afterwards."""

    name: bytes
    info: os.stat_result
    context: Any = None


class Reader:
    """Reads one name at a time, in any thread."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.bytes_read = self.files_read = 0
        self._counting = threading.Lock()
        self._own = threading.local()

    def read_all(self, directory: int, items: list[Item]) -> list[Reading]:
        """Read several names of an open directory; fewer where the reader was stopped."""
        return [self.read(directory, item) for item in items if not self.stopped.is_set()]

    def read(self, directory: int, item: Item) -> Reading:
        """Read one name; an error is in what it returns."""
        try:
            if stat.S_ISREG(item.info.st_mode):
                return self._file(directory, item.name)
            return _special(directory, item)
        except FileNotFoundError as exc:
            return _absent(directory, item, exc)
        except OSError as exc:
            return Reading(item.info, error=reason_of(exc))

    def _file(self, directory: int, name: bytes) -> Reading:
        for _ in range(_TRIES):
            reading = self._once(directory, name)
            if reading:
                return reading
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return Reading(info, error=CHANGED)

    def _once(self, directory: int, name: bytes) -> Reading | None:
        """Read a file; None where it changed meanwhile, or is a file no more."""
        try:
            descriptor = open_at(name, os.O_NOFOLLOW, directory)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                return None
            raise
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                return None
            xattrs = read_xattrs(descriptor)
            digest, count = self._digest(descriptor, before.st_size)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if count != before.st_size or stat_of(before) != stat_of(after):
            return None
        with self._counting:
            self.files_read += 1
        return Reading(after, xattrs=xattrs, digest=digest)

    def _digest(self, descriptor: int, size: int) -> tuple[bytes, int]:
        """
        Return the hash of a file's contents, and how many bytes they are.

        One that has more than *size*, as a log has that is written meanwhile, is not read on.
        """
        buffer = self._buffer()
        hashed, total = hashlib.sha256(), 0
        while count := os.readv(descriptor, [buffer]):
            hashed.update(buffer[:count])
            total += count
            with self._counting:
                self.bytes_read += count
            if total > size or self.stopped.is_set():
                break
        return hashed.digest(), total

    def _buffer(self) -> memoryview:
        """Return this thread's own buffer."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(BUFFER_BYTES))
        buffer: memoryview = self._own.buffer
        return buffer


def _special(directory: int, item: Item) -> Reading:
    """Read what is neither a file nor a directory; it is never opened."""
    mode = item.info.st_mode
    target = None
    if stat.S_ISLNK(mode):
        target = os.readlink(item.name, dir_fd=directory)
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        device = item.info.st_rdev
        target = f"{os.major(device)},{os.minor(device)}".encode()
    # It has no call that takes a directory.
    place = f"/proc/self/fd/{directory}/".encode() + item.name
    try:
        return Reading(item.info, target, read_xattrs(place))
    except FileNotFoundError:
        os.stat(item.name, dir_fd=directory, follow_symlinks=False)
        return Reading(item.info, target, error=_NO_PROC)


def _absent(directory: int, item: Item, exc: OSError) -> Reading:
    """Tell what went away from what is there, and refuses to be read as if it were not."""
    try:
        os.stat(item.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return Reading(None)
    except OSError as other:
        exc = other
    return Reading(item.info, error=reason_of(exc))


def read_xattrs(place: int | bytes) -> bytes | None:
    """Return the extended attributes, packed; of a link those of itself."""
    if not hasattr(os, "listxattr"):  # not Linux
        return None
    follow = isinstance(place, int)
    try:
        names = os.listxattr(place, follow_symlinks=follow)
    except OSError as exc:
        if exc.errno in _NO_XATTRS:
            return None
        raise
    found = {}
    for name in names:
        try:
            value = os.getxattr(place, name, follow_symlinks=follow)
        except OSError as exc:
            if exc.errno != errno.ENODATA:  # it was removed since: the ctime tells, too
                raise
        else:
            found[os.fsencode(name)] = hashlib.sha256(value).digest()
    return pack(found)


@dataclass(frozen=True)
class _Batch:
    future: Future[list[Reading]]
    directory: int  # a descriptor of its own
    items: list[Item]


class Pool:
    """
    Reads names in threads, and calls *done* with each in the thread that adds them.

    The links of a file are hashed once: a key of `_links` is the file, its value the links that
    are still to come and what was read, None while that is at work.
    """

    def __init__(
        self, done: Callable[[Item, Reading], None], waiting: Callable[[], None] = lambda: None
    ) -> None:
        """*waiting* is called now and then while a read takes long."""
        self.reader = Reader()
        count = _cores()
        self._done = done
        self._waiting = waiting
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="hash")
        self._most = count * BATCHES_A_THREAD
        self._batches: deque[_Batch] = deque()
        self._links: dict[tuple[int, ...], tuple[int, Reading | None]] = {}

    def add(self, directory: int, items: Iterable[Item]) -> None:
        """Have names of an open directory read; it may be closed on return."""
        batch: list[Item] = []
        size = 0
        for item in items:
            if item.info.st_nlink > 1 and not stat.S_ISDIR(item.info.st_mode):
                if self._is_known(item, directory, batch):
                    continue
                size = size if batch else 0
            batch.append(item)
            size += item.info.st_size
            if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
                self._submit(directory, batch)
                batch, size = [], 0
        if batch:
            self._submit(directory, batch)

    def finish(self) -> None:
        """Wait for all that was added."""
        while self._batches:
            self._take_oldest()

    def _submit(self, directory: int, items: list[Item]) -> None:
        while len(self._batches) >= self._most:
            self._take_oldest()
        own = self._copy_of(directory)
        if own is None:
            self._take(items, self.reader.read_all(directory, items))
            return
        future = self._threads.submit(self.reader.read_all, own, items)
        self._batches.append(_Batch(future, own, items))

    def _copy_of(self, directory: int) -> int | None:
        """Return another descriptor of a directory; None where there is room for none."""
        while True:
            try:
                return os.dup(directory)
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
            if not self._batches:
                return None
            self._take_oldest()

    def _take_oldest(self) -> None:
        batch = self._batches[0]
        while not wait([batch.future], _PATIENCE_S).done:
            self._waiting()
        readings = batch.future.result()
        self._batches.popleft()
        os.close(batch.directory)
        self._take(batch.items, readings)

    def _take(self, items: list[Item], readings: list[Reading]) -> None:
        for item, reading in zip(items, readings, strict=True):
            self._note_link(item, reading)
            self._done(item, reading)

    def _is_known(self, item: Item, directory: int, batch: list[Item]) -> bool:
        """Tell whether another link of the file was read, and is done with this one."""
        key = _key(item.info)
        if key not in self._links:
            self._links[key] = (item.info.st_nlink - 1, None)
            return False
        if self._links[key][1] is None:  # it is in a batch: the one at hand, or one at work
            if batch:
                self._submit(directory, list(batch))
                batch.clear()
            self.finish()
        left, reading = self._links.get(key, (0, None))
        if reading is None:  # its name went away, or could not be read: this one may
            return False
        if left > 1:
            self._links[key] = (left - 1, reading)
        else:
            del self._links[key]
        self._done(item, reading._replace(info=item.info))
        return True

    def _note_link(self, item: Item, reading: Reading) -> None:
        key = _key(item.info)
        if key not in self._links or self._links[key][1]:
            return
        if reading.info and not reading.error and _key(reading.info) == key:
            self._links[key] = (self._links[key][0], reading)
        else:
            del self._links[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give up what was not finished."""
        self.reader.stopped.set()
        self._threads.shutdown(cancel_futures=True)
        for batch in self._batches:
            os.close(batch.directory)
        self._batches.clear()


def _cores() -> int:
    """Return how many processors we may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _key(info: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file, as it is, whatever the name."""
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

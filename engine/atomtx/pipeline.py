"""
A stream from one program into others, through our hands: `zfs send`, `zstd`, `ssh`.

Between the source and the first sink stand we, and nobody else has our two ends: bytes are counted
before they are compressed, a limit is held, and when we are killed, the source cannot write any
more and the sinks see the end of the stream.

Sources: pipe(7), splice(2), fcntl(2).
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

from .errors import EffectError
from .process import Link, abridged

_PIPE_BYTES = 1 << 20  # what a pipe of an ordinary user may hold at most: pipe(7)
_STEP_S = 0.5
_HALF_STEP_MS = 250
_PORTIONS = 20  # a second: what may go under a limit goes in no smaller portions
_TERM_S = 10.0
_END_S = 60.0
_LINES = 3


@dataclass(frozen=True)
class Stage:
    """One program of the stream; *name* is how messages call it."""

    name: str
    argv: tuple[str, ...]
    may_be_killed: bool = True  # a half-made change is worse than a late one
    advice: str = ""  # how what it says for people at a terminal begins, after its complaint


class PipeError(EffectError):
    """A stream did not arrive; *stage* is the name of the one that is to blame."""

    def __init__(self, stage: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.stage = stage


# -- who is to blame ---------------------------------------------------------------------------


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended; *status* as `Completed.status`, *said* the end of its stderr."""

    stage: Stage
    status: int
    said: str = ""
    was_stopped: bool = False  # we have signalled it

    def words(self) -> str:
        """Return its last words, or how it ended where it has none."""
        said = self.said.partition(self.stage.advice)[0] if self.stage.advice else self.said
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return "; ".join(lines[-_LINES:]) or self._how()

    def _how(self) -> str:
        if self.status == 0:
            return "ended before it had read all"
        if self.status > 0:
            return f"exit status {self.status}"
        with suppress(ValueError):  # a real-time signal has no name
            return f"killed by {signal.Signals(-self.status).name}"
        return f"killed by signal {-self.status}"

    def is_broken_pipe(self) -> bool:
        """Tell whether it says that the one behind it did not read any more."""
        return self.status == -signal.SIGPIPE or "Broken pipe" in self.said


def blame(ends: Sequence[StageEnd], *, broken: bool) -> int | None:
    """
    Return which stage is to blame that a stream did not arrive; None where it did.

    Trouble spreads in two ways.  Down the chain: who is fed by one that failed complains of half a
    stream.  Up the chain: who writes to one that failed gets a broken pipe, and says so.  So it is
    the first that failed and does not point behind itself; where all do, the one behind the last
    of those.  The source is not it where the flow was *broken*: we could not write, or a sink had
    failed, while the source's end was not seen; no sink knew of it.  Nobody is behind the last
    sink: if that one says "Broken pipe", as ssh does of its connection, it means another.
    """
    last = len(ends) - 1
    failed = [n for n, end in enumerate(ends) if end.status != 0]
    if not failed and not broken:
        return None
    pointing = {
        n for n in failed if 0 < n < last and (ends[n].is_broken_pipe() or ends[n].was_stopped)
    }
    if broken:
        pointing.add(0)
    own = [n for n in failed if n not in pointing]
    return own[0] if own else max(pointing) + 1


def failure(ends: Sequence[StageEnd], *, broken: bool) -> PipeError | None:
    """Return the error to raise, None for a stream that arrived: see `blame`."""
    guilty = blame(ends, broken=broken)
    if guilty is None:
        return None
    end = ends[guilty]
    others = [
        f"{other.stage.name}: {other.words()}"
        for n, other in enumerate(ends)
        if n != guilty and other.said.strip() and _adds(other)
    ]
    return PipeError(
        end.stage.name,
        "; ".join([f"{end.stage.name}: {end.words()}", *others]),
        hint=f"the command was: {abridged(end.stage.argv)}",
    )


def _adds(end: StageEnd) -> bool:
    return end.status != 0 and not end.was_stopped and not end.is_broken_pipe()


# -- how fast ----------------------------------------------------------------------------------


class Pace:
    """
    How many bytes may go now, for *rate* bytes a second; 0 is no limit.  Pure but for its clock.

    What a slow source did not use is lost, but for a tenth of a second.
    """

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate, self._clock = rate, clock
        self._portion = max(1, rate // _PORTIONS)
        self._credit = 0.0
        self._at = clock()

    def room(self) -> int:
        """Return how many bytes may go now: 0, or enough to be worth it."""
        if not self._rate:
            return _PIPE_BYTES
        now = self._clock()
        earned = (now - self._at) * self._rate
        self._at, self._credit = now, min(2.0 * self._portion, self._credit + earned)
        return min(int(self._credit), _PIPE_BYTES) if self._credit >= self._portion else 0

    def gone(self, count: int) -> None:
        """Note that *count* bytes went."""
        self._credit -= count

    def wait_s(self) -> float:
        """Return after how many seconds there is room."""
        return max(0.0, (self._portion - self._credit) / self._rate) if self._rate else 0.0


# -- how bytes are moved -----------------------------------------------------------------------


class Mover(Protocol):
    """Moves bytes from a pipe to a pipe; both descriptors do not block."""

    @property
    def holds(self) -> bool:
        """Tell whether bytes that were read wait to be written."""

    def __call__(self, source: int, sink: int, count: int) -> int:
        """
        Move at most *count* bytes and return how many, 0 at the end of the stream.

        Raises BlockingIOError where nothing can be moved now, BrokenPipeError where there is
        something, and nobody to read it.
        """


class Spliced:
    """By splice(2): the kernel hands the pages over, nothing is copied."""

    holds = False

    def __call__(self, source: int, sink: int, count: int) -> int:
        try:
            return os.splice(source, sink, count)
        except BrokenPipeError:
            # splice(2) tells of a missing reader before it looks whether there is something to
            # read; and `zfs receive` ends at the stream's last record, not at the end of file.
            events = _events(source)
            if events & select.POLLIN:
                raise
            if events & select.POLLHUP:
                return 0
            raise BlockingIOError from None


class Copied:
    """By read(2) and write(2), where there is no splice(2)."""

    def __init__(self) -> None:
        self._rest = memoryview(b"")

    @property
    def holds(self) -> bool:
        return bool(self._rest)

    def __call__(self, source: int, sink: int, count: int) -> int:
        if not self._rest:
            self._rest = memoryview(os.read(source, count))
        if not self._rest:
            return 0
        done = os.write(sink, self._rest[:count])
        self._rest = self._rest[done:]
        return done


def _events(descriptor: int) -> int:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return dict(poll.poll(0)).get(descriptor, 0)


BEST: Callable[[], Mover] = Spliced if hasattr(os, "splice") else Copied


# -- the stream --------------------------------------------------------------------------------


def carry(
    source: Stage,
    sinks: Sequence[Stage],
    *,
    lock: int | None,
    rate: int = 0,
    moved: Callable[[int], None],
    check: Callable[[], None],
    mover: Callable[[], Mover] = BEST,
) -> int:
    """
    Move what *source* writes through our hands into the chain *sinks*; return the bytes.

    *lock* is the descriptor of F, which all of them hold; *rate* a limit in bytes a second, 0 for
    none.  Twice a second, *moved* is told how many bytes went, and *check* may raise, which stops
    all: the source is ended, the sinks see the end of the stream and are waited for, for a minute
    or, where one may not be killed, for ever.  What they had got may have been all: the caller
    looks.  However this ends, no program is left running.

    Raises PipeError where a stage failed, EffectError where one cannot be started.
    """
    with _Chain(lock) as chain:
        chain.start(source, sinks)
        pump = _Pump(chain, Pace(rate, time.monotonic), mover(), moved, check)
        broken = not pump.run()
        moved(pump.total)
        if broken:
            chain.stop()
        else:
            chain.finish(check)
        if error := failure(chain.ends(), broken=broken):
            raise error
        return pump.total


class _Chain:
    """The programs and our ends of their pipes; left, all of them have ended."""

    def __init__(self, lock: int | None) -> None:
        self._lock = lock
        self._open: set[int] = set()
        self._links: list[tuple[Stage, Link]] = []
        self.source = self.sink = -1  # our ends: what we read, what we write

    def start(self, source: Stage, sinks: Sequence[Stage]) -> None:
        """
        Start all, the last one last: it is the one that changes something.

        Raises EffectError for one that cannot be started.
        """
        self.source, end = self._pipe()
        self._start(source, None, end)
        upper, self.sink = self._pipe()
        for stage in sinks[:-1]:
            lower, end = self._pipe()
            self._start(stage, upper, end)
            upper = lower
        self._start(sinks[-1], upper, None)
        for descriptor in (self.source, self.sink):  # of our ends alone: each end has its own flag
            os.set_blocking(descriptor, False)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()  # close-on-exec: a child gets its own ends alone
        self._open.update(ends)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with suppress(OSError):  # more than this user may have: it is only slower
                fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return ends

    def _start(self, stage: Stage, stdin: int | None, stdout: int | None) -> None:
        link = Link(stage.argv, stdin=stdin, stdout=stdout, lock=self._lock)
        self._links.append((stage, link))
        self._close(*(end for end in (stdin, stdout) if end is not None))

    def _close(self, *descriptors: int) -> None:
        for descriptor in self._open.intersection(descriptors):
            self._open.remove(descriptor)
            os.close(descriptor)

    def has_failed(self) -> bool:
        """Tell whether a sink has failed already, though it has not seen the stream's end."""
        return any(link.status() for _, link in self._links[1:])

    def trim(self) -> None:
        for _, link in self._links:
            link.trim()

    def finish(self, check: Callable[[], None]) -> None:
        """Let the sinks see the end of the stream, and wait for all; *check* may raise."""
        self._close(*self._open)
        for _, link in self._links:
            while link.wait(_STEP_S) is None:
                check()
                self.trim()

    def stop(self) -> None:
        """End all: see `carry`.  Idempotent."""
        for stage, link in self._links[:1]:
            link.send(signal.SIGTERM)
            self._close(self.source)
            if link.wait(_TERM_S) is None and stage.may_be_killed:
                link.send(signal.SIGKILL)
            link.wait()
        self._close(*self._open)
        self._await_sinks()

    def _await_sinks(self) -> None:
        """Those that may be killed first: another may wait for what they hold back."""
        end = time.monotonic() + _END_S
        for stage, link in sorted(self._links[1:], key=lambda pair: not pair[0].may_be_killed):
            if stage.may_be_killed and link.wait(max(0.0, end - time.monotonic())) is None:
                link.send(signal.SIGKILL)
            link.wait()

    def ends(self) -> list[StageEnd]:
        """Return how all of them ended, in the order of the stream; they have."""
        return [
            StageEnd(stage, link.wait() or 0, link.said(), link.was_signalled)
            for stage, link in self._links
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for _stage, link in self._links:
            link.close()


class _Pump:
    """Moves the stream from the source to the first sink."""

    def __init__(
        self,
        chain: _Chain,
        pace: Pace,
        mover: Mover,
        moved: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        self._chain, self._pace, self._move = chain, pace, mover
        self._moved, self._check = moved, check
        self._tell_at = 0.0
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(chain.source, select.POLLIN)
        self._writable.register(chain.sink, select.POLLOUT)
        self.total = 0

    def run(self) -> bool:
        """Move all until the stream's end; False where the sinks do not take it any more."""
        while True:
            self._check()
            if self._is_due() and self._chain.has_failed():
                return False
            room = self._pace.room()
            if not room:
                time.sleep(min(self._pace.wait_s(), _STEP_S))
                continue
            try:
                count = self._move(self._chain.source, self._chain.sink, room)
            except BlockingIOError:
                self._wait()
                continue
            except BrokenPipeError:
                return False
            if not count:
                return True
            self._pace.gone(count)
            self.total += count

    def _is_due(self) -> bool:
        """Twice a second: tell how far it is, and return True."""
        now = time.monotonic()
        if now < self._tell_at:
            return False
        self._tell_at = now + _STEP_S
        self._moved(self.total)
        self._chain.trim()
        return True

    def _wait(self) -> None:
        """Wait until there is something to move and room for it, but for a step at most."""
        if self._move.holds or self._readable.poll(_HALF_STEP_MS):
            self._writable.poll(_HALF_STEP_MS)

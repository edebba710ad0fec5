"""A stream through our hands: whole or an error, the right one blamed, and nobody left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import locks, pipeline, process
from atomtx.errors import EffectError, Interrupted
from atomtx.pipeline import (
    Copied,
    Mover,
    Pace,
    PipeError,
    Spliced,
    Stage,
    StageEnd,
    blame,
    carry,
    failure,
)

PATIENCE_S = 60.0
ENGINE = str(Path(process.__file__).parents[1])
MOVERS = pytest.mark.parametrize("mover", [Spliced, Copied])
PIPE = 1 << 20

CAT = "exec cat"


def sh(script: str, *args: str, name: str = "") -> Stage:
    return Stage(name or script, ("sh", "-c", script, "sh", *args))


def py(code: str, *args: str, name: str = "python", may_be_killed: bool = True) -> Stage:
    argv = (sys.executable, "-c", textwrap.dedent(code), *args)
    return Stage(name, argv, may_be_killed)


def into(path: Path) -> Stage:
    return Stage(f"write {path.name}", ("dd", "bs=64k", "status=none", f"of={path}"))


def zeros(count: int) -> Stage:
    return Stage("zeros", ("head", "-c", str(count), "/dev/zero"))


def nothing() -> None:
    """Check, and find no signal."""


def through(
    source: Stage,
    *sinks: Stage,
    lock: int | None = None,
    moved: Callable[[int], None] = lambda _: None,
    check: Callable[[], None] = nothing,
    mover: Callable[[], Mover] = pipeline.BEST,
) -> int:
    return carry(source, sinks, lock=lock, moved=moved, check=check, mover=mover)


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """Whatever becomes of a stream, no descriptor stays open and every program is reaped."""
    descriptors, before = os.listdir("/proc/self/fd"), children()
    yield
    assert os.listdir("/proc/self/fd") == descriptors
    assert children() == before


# -- the stream --------------------------------------------------------------------------------


@MOVERS
@pytest.mark.parametrize("between", [0, 2])
def test_unchanged(tmp_path: Path, mover: type[Mover], between: int) -> None:
    """All bytes arrive, in their order, through one sink or more; and they are counted."""
    data = os.urandom(3 * PIPE + 4097)
    (tmp_path / "in").write_bytes(data)
    told: list[int] = []
    source = sh('exec cat "$1"', str(tmp_path / "in"))
    sinks = [sh(CAT) for _ in range(between)]
    count = through(source, *sinks, into(tmp_path / "out"), moved=told.append, mover=mover)
    assert count == told[-1] == len(data)
    assert told == sorted(told)
    found = (tmp_path / "out").read_bytes()
    assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest()


@MOVERS
def test_small_writes(tmp_path: Path, mover: type[Mover]) -> None:
    """Many small pieces arrive as well as few large ones."""
    source = py("import os\nfor n in range(20_000): os.write(1, b'%d,' % n)")
    through(source, into(tmp_path / "out"), mover=mover)
    assert (tmp_path / "out").read_text() == "".join(f"{n}," for n in range(20_000))


@MOVERS
def test_empty(tmp_path: Path, mover: type[Mover]) -> None:
    """A stream may be empty."""
    assert through(sh("exit 0"), into(tmp_path / "out"), mover=mover) == 0
    assert (tmp_path / "out").read_bytes() == b""


@MOVERS
def test_early_end(tmp_path: Path, mover: type[Mover]) -> None:
    """
    A sink that has all may end before the source does: as `zfs receive` at the last record.

    The source ends only after nobody reads any more.
    """
    os.mkfifo(tmp_path / "ended")
    source = sh('printf all; exec cat "$1"', str(tmp_path / "ended"))
    sink = py(
        """
        import os, sys
        assert os.read(0, 10) == b"all"
        os.close(0)
        open(sys.argv[1], "w").close()
        """,
        str(tmp_path / "ended"),
    )
    assert through(source, sink, mover=mover) == 3


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage sees a system program's environment, and where ssh finds its keys; no more."""
    monkeypatch.setenv("HOME", "/home/of ours")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    monkeypatch.setenv("USER", "root")
    monkeypatch.setenv("SECRET", "word")
    through(Stage("env", ("env",)), into(tmp_path / "out"))
    found = dict(line.split("=", 1) for line in (tmp_path / "out").read_text().splitlines())
    own = {"HOME": "/home/of ours", "SSH_AUTH_SOCK": "/run/agent", "USER": "root"}
    assert found == {**process.base_environment(), **own}


def test_descriptors(tmp_path: Path) -> None:
    """A stage has its ends of the pipes and the lock, no end that is another's; all in sessions."""
    look = """
        import os, sys
        from pathlib import Path
        found = {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                 if os.path.exists(f"/proc/self/fd/{n}")}
        Path(sys.argv[1]).write_text(repr((found, os.getsid(0) == os.getpid())))
        while data := os.read(0, 65536):
            if len(sys.argv) > 2: os.write(1, data)
    """
    lock_path = tmp_path / "front.lock"
    lock_path.touch()
    lock = locks.try_acquire(lock_path)
    assert lock is not None
    files = [str(tmp_path / name) for name in ("first", "second", "third")]
    sinks = [py(look, files[0], "on"), py(look, files[1], "on"), py(look, files[2])]
    through(py(look, files[0] + "-source", "on"), *sinks, lock=lock)
    os.close(lock)
    seen = []
    for file in (files[0] + "-source", *files):
        found, is_leader = eval(Path(file).read_text())
        assert is_leader
        assert "memfd:stderr" in found.pop("2")
        assert found.pop(str(lock)) == str(lock_path)
        assert set(found) == {"0", "1"}
        seen += [found["0"], found["1"]]
    # ssh closes all descriptors but the first three: at the ends of the chain, one is the lock.
    assert seen[0] == seen[-1] == str(lock_path)
    assert seen[3] == seen[4] != seen[1]
    assert seen[5] == seen[6]
    assert len(set(seen)) == 5  # the lock, and four pipes: we are between the first two


# -- failures ----------------------------------------------------------------------------------


@MOVERS
def test_source_fails(mover: type[Mover]) -> None:
    """A source that fails midway is to blame, not who complains of half a stream."""
    source = sh("head -c 300000 /dev/zero; echo 'I/O error' >&2; exit 3", name="zfs send tank/a@x")
    sink = sh("cat >/dev/null; echo incomplete stream >&2; exit 1", name="zfs receive pool/a")
    with pytest.raises(PipeError) as caught:
        through(source, sink, mover=mover)
    assert caught.value.stage == "zfs send tank/a@x"
    assert caught.value.message == (
        "zfs send tank/a@x: I/O error; zfs receive pool/a: incomplete stream"
    )
    assert "head -c 300000" in (caught.value.hint or "")


@MOVERS
@pytest.mark.parametrize("taken", [0, 300_000])
@pytest.mark.parametrize("between", [0, 1])
def test_sink_fails(mover: type[Mover], taken: int, between: int) -> None:
    """A sink that fails at once or midway is to blame, not who dies of a broken pipe for it."""
    sink = sh(f"head -c {taken} >/dev/null; echo no space >&2; exit 1", name="zfs receive pool/a")
    with pytest.raises(PipeError) as caught:
        through(zeros(1 << 40), *[sh(CAT)] * between, sink, mover=mover)
    assert caught.value.stage == "zfs receive pool/a"
    assert caught.value.message == "zfs receive pool/a: no space"


@MOVERS
def test_sink_fails_after_all(mover: type[Mover]) -> None:
    """A sink that read all and fails then is to blame."""
    sink = sh("cat >/dev/null; exit 7", name="zfs receive pool/a")
    with pytest.raises(PipeError, match="zfs receive pool/a: exit status 7"):
        through(zeros(1000), sh(CAT), sink, mover=mover)


@MOVERS
def test_sink_fails_in_silence(mover: type[Mover]) -> None:
    """A sink that fails while the source has nothing to say is noticed, and the source ended."""
    sink = sh("echo connection refused >&2; exit 255", name="ssh far")
    with pytest.raises(PipeError, match="ssh far: connection refused"):
        through(sh("exec sleep 1000000"), sh(CAT), sink, mover=mover)


@MOVERS
def test_sink_wants_no_more(mover: type[Mover]) -> None:
    """A sink that ends well without reading all has lost data: an error."""
    with pytest.raises(PipeError, match="exit 0: ended before it had read all"):
        through(zeros(1 << 40), sh("exit 0"), mover=mover)


@MOVERS
def test_killed_sink(mover: type[Mover]) -> None:
    """A stage that a signal ended and that said nothing is told by the signal's name."""
    with pytest.raises(PipeError, match="zfs receive: killed by SIGKILL"):
        through(zeros(1 << 40), sh("kill -9 $$", name="zfs receive"), mover=mover)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_program(missing: int) -> None:
    """A program that is not there is told as elsewhere, and those already started are ended."""
    stages = [sh("exec sleep 1000000"), sh(CAT), sh(CAT)]
    stages[missing] = Stage("absent", ("no-such-program",))
    with pytest.raises(EffectError, match="no-such-program is not installed") as caught:
        through(*stages)
    assert "atomtx doctor" in (caught.value.hint or "")


def test_last_is_started_last(tmp_path: Path) -> None:
    """The last sink, which changes something, is not started unless all others are."""
    touch = sh('echo > "$1"', str(tmp_path / "changed"))
    with pytest.raises(EffectError, match="not installed"):
        through(sh("exit 0"), Stage("absent", ("no-such-program",)), touch)
    assert not (tmp_path / "changed").exists()


def test_much_said(tmp_path: Path) -> None:
    """A stage that says more than a pipe holds is not held up by it; its end is kept."""
    noise = "import sys\nsys.stderr.write('x' * 79 + '\\n' * 1 + ('y' * 79 + '\\n') * 13_000)\n"
    source = py(noise + "sys.stderr.write('why\\n'); print('data'); sys.exit(1)", name="send")
    with pytest.raises(PipeError) as caught:
        through(source, py(noise + "sys.stdin.read()"), into(tmp_path / "out"))
    assert caught.value.message == "send: " + "; ".join(["y" * 79, "y" * 79, "why"])
    assert (tmp_path / "out").read_text() == ""


def test_trimmed(tmp_path: Path) -> None:
    """Of a stage that says very much, the memory is given back; its last words are kept."""
    os.mkfifo(tmp_path / "go")
    code = """
        import os, sys
        for _ in range(2): os.write(2, b"x" * 2**20)
        open(sys.argv[1]).read()
        os.write(2, b"last")
    """
    argv = py(code, str(tmp_path / "go")).argv
    link = process.Link(argv, stdin=None, stdout=None, lock=None)
    with open(tmp_path / "go", "w"):
        link.trim()
        assert link.said() == ""
    assert link.wait() == 0
    assert link.said() == "last"
    link.trim()
    assert link.said() == "last"
    link.close()


def test_errors_of_ours() -> None:
    """An error in what we are told to call is not taken for a sink's, and nothing is left."""

    def moved(_: int) -> None:
        raise BrokenPipeError("the terminal")

    with pytest.raises(BrokenPipeError, match="the terminal"):
        through(zeros(1 << 40), sh("exec cat >/dev/null"), moved=moved)


# -- stopping ----------------------------------------------------------------------------------


def after(ready: Callable[[], bool]) -> Callable[[], None]:
    def check() -> None:
        if ready():
            raise Interrupted(signal.SIGTERM)

    return check


@MOVERS
def test_stop_slow_source(tmp_path: Path, mover: type[Mover]) -> None:
    """A signal ends a source that says nothing; the sink gets what there was, and its end."""
    out = tmp_path / "out"
    sink = sh('head -c 5 >"$1.new"; mv "$1.new" "$1"; cat >>"$1"; echo end >>"$1"', str(out))
    with pytest.raises(Interrupted):
        through(sh("echo word; exec sleep 1000000"), sink, check=after(out.exists), mover=mover)
    assert out.read_text() == "word\nend\n"


@MOVERS
def test_stop_deaf_sink(tmp_path: Path, mover: type[Mover]) -> None:
    """A signal is heard though the sink does not read; one that may not be killed ends itself."""
    os.mkfifo(tmp_path / "fifo")
    code = """
        import os, sys
        open(sys.argv[1] + "/fifo").read()  # until the source has ended
        while os.read(0, 65536): pass
        open(sys.argv[1] + "/ended", "w").close()
    """
    sink = py(code, str(tmp_path), may_be_killed=False)
    source = sh('exec 3>"$1"; exec cat /dev/zero', str(tmp_path / "fifo"))
    totals: list[int] = []

    def stands_still() -> bool:
        return len(totals) > 2 and totals[-1] == totals[-2] > 0

    with pytest.raises(Interrupted):
        through(source, sink, moved=totals.append, check=after(stands_still), mover=mover)
    assert (tmp_path / "ended").exists()


def test_stop_stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that ignores SIGTERM, and a sink that does not see its end, are killed."""
    monkeypatch.setattr(pipeline, "_TERM_S", 0.1)
    monkeypatch.setattr(pipeline, "_END_S", 0.1)
    started = tmp_path / "started"
    source = sh("trap '' TERM; echo >\"$1\"; sleep 1000000; sleep 1000000", str(started))
    ends = tmp_path / "ends"
    last = sh('cat; echo >"$1"', str(ends))
    last = Stage("last", last.argv, may_be_killed=False)
    with pytest.raises(Interrupted):
        through(source, sh("sleep 1000000; exit 0"), last, check=after(started.exists))
    assert ends.exists()


def test_stop_patient_source(tmp_path: Path) -> None:
    """A source that may not be killed and does not end by SIGTERM cannot write any more."""
    out = tmp_path / "out"
    source = Stage("x", sh("trap '' TERM; exec cat /dev/zero").argv, may_be_killed=False)
    sink = sh('head -c 9 >"$1"; cat >/dev/null', str(out))
    with pytest.raises(Interrupted):
        through(source, sink, check=after(out.exists))


def test_stop_while_sinks_end(tmp_path: Path) -> None:
    """A signal is heard while the sinks have the whole stream and work on; they are waited for."""
    path = str(tmp_path / "f")
    sink = sh('cat >/dev/null; echo >"$1.read"; cat "$1" >&2; echo >"$1.done"', path)
    os.mkfifo(path)

    def check() -> None:
        if os.path.exists(path + ".read"):
            with open(path, "w"):  # lets it go on
                raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        through(zeros(10), sink, check=check)
    assert os.path.exists(path + ".done")


_FRONT = """
    import sys
    from atomtx import locks
    from atomtx.pipeline import Stage, carry
    from pathlib import Path
    lock = locks.try_acquire(Path(sys.argv[1]))
    stages = [Stage(argv[0], tuple(argv)) for argv in {argvs!r}]
    carry(stages[0], stages[1:], lock=lock, moved=lambda _: None, check=lambda: None)
"""
_AS_SSH = """
    import os, sys
    os.closerange(3, 4096)
    while data := os.read(0, 65536):
        open(sys.argv[1], "w").close()
    # The lock is held by this one alone, when the others are gone, until it is told to end.
    open(sys.argv[2]).read()
"""


def test_killed(tmp_path: Path) -> None:
    """
    When we are killed, the source cannot write any more and the sinks see their end: all go.

    Until the last has ended the lock is held, even by one that closes what it inherits.
    """
    lock, flows, go = tmp_path / "front.lock", tmp_path / "flows", tmp_path / "go"
    lock.touch()
    os.mkfifo(go)
    stages = [sh("exec cat /dev/zero"), sh(CAT), py(_AS_SSH, str(flows), str(go))]
    code = textwrap.dedent(_FRONT).format(argvs=[stage.argv for stage in stages])
    env = {**os.environ, "PYTHONPATH": ENGINE}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], env=env) as front:
        assert locks.wait_until(flows.exists, PATIENCE_S)
        pids = [p.pid for p in locks.holders(lock) if p.pid != front.pid]
        last = [pid for pid in pids if str(flows) in Path(f"/proc/{pid}/cmdline").read_text()]
        front.kill()
    assert (len(pids), len(last)) == (3, 1)
    for pid in set(pids) - set(last):
        assert locks.wait_gone(pid, PATIENCE_S)
    assert [process.pid for process in locks.holders(lock)] == last
    go.write_text("")
    assert locks.wait_gone(last[0], PATIENCE_S)
    assert not locks.is_held(lock)


def test_commands() -> None:
    """A recovery waits for those that feed a `zfs receive`."""
    assert {"zfs", "ssh", "zstd"} <= locks.COMMANDS


# -- who is to blame ---------------------------------------------------------------------------


def ends(*found: int | tuple[int, str]) -> list[StageEnd]:
    pairs = [(one, "") if isinstance(one, int) else one for one in found]
    return [StageEnd(Stage(f"s{n}", ("x",)), *pair) for n, pair in enumerate(pairs)]


PIPED = -signal.SIGPIPE
EPIPE = (70, "zstd: error 70 : Write error : cannot write block : Broken pipe")


@pytest.mark.parametrize(
    ("found", "broken", "guilty"),
    [
        # none
        (ends(0, 0), False, None),
        (ends(0, 0, 0), False, None),
        # the source, whoever complains of what it did not send
        (ends(1, 0), False, 0),
        (ends(1, 1), False, 0),
        (ends(1, 1, 1), False, 0),
        (ends((1, "Broken pipe"), 1), False, 0),
        (ends(PIPED, 0), False, 0),
        # a sink, whatever becomes of the source
        (ends(PIPED, 1), True, 1),
        (ends((1, "Broken pipe"), 1), True, 1),
        (ends(1, 1), True, 1),
        (ends(0, 1), True, 1),
        (ends(0, 1), False, 1),
        # the one behind those that point behind themselves
        (ends(PIPED, PIPED, 1), True, 2),
        (ends(0, PIPED, 1), False, 2),
        (ends(PIPED, EPIPE, 255), True, 2),
        (ends(PIPED, PIPED, EPIPE, 1), True, 3),
        # the middle one, though the one behind complains
        (ends(PIPED, 1, 1), True, 1),
        (ends(0, -9, 1), False, 1),
        # the last one has nobody behind it
        (ends(PIPED, 0, (255, "client_loop: send disconnect: Broken pipe")), True, 2),
        (ends(0, (255, "client_loop: send disconnect: Broken pipe")), False, 1),
        (ends(0, PIPED), False, 1),
        # who did not read all, and ended well
        (ends(PIPED, 0), True, 1),
        (ends(0, 0), True, 1),
        (ends(0, PIPED, 0), False, 2),
        (ends(PIPED, PIPED, 0), True, 2),
    ],
)
def test_blame(found: Sequence[StageEnd], broken: bool, guilty: int | None) -> None:
    """The one that failed for a reason of its own is to blame, and not who suffers from it."""
    assert blame(found, broken=broken) == guilty


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, PIPED, -9]), st.booleans()), min_size=2, max_size=5),
    st.booleans(),
)
def test_any_blame(found: list[tuple[int, bool]], broken: bool) -> None:
    """There is somebody to blame exactly where something failed, and it is one of the chain."""
    all_ends = [StageEnd(Stage("x", ("x",)), status, "", stopped) for status, stopped in found]
    guilty = blame(all_ends, broken=broken)
    assert (guilty is not None) == (broken or any(status for status, _ in found))
    assert guilty is None or 0 <= guilty < len(all_ends)
    assert not (broken and guilty == 0)


def test_blame_killed_by_us() -> None:
    """One that we had to kill after the one behind it failed is not to blame."""
    stages = [Stage(f"s{n}", ("x",)) for n in range(3)]
    found = [
        StageEnd(stages[0], -15, "", True),
        StageEnd(stages[1], -9, "", True),
        StageEnd(stages[2], 1),
    ]
    assert blame(found, broken=True) == 2


def test_message() -> None:
    """An error has the last words of who is to blame, and what others have to add."""
    error = failure(ends((1, "a\n\n b \nc\nd\n"), (0, "fine"), (2, "incomplete\n")), broken=False)
    assert error is not None
    assert error.stage == "s0"
    assert error.message == "s0: b; c; d; s2: incomplete"
    assert error.hint == "the command was: x"
    silent = failure(ends(PIPED, EPIPE, 3), broken=True)
    assert silent is not None
    assert silent.message == "s2: exit status 3"
    assert failure(ends(0, (0, "a warning")), broken=False) is None


@pytest.mark.parametrize(
    ("status", "words"),
    [(3, "exit status 3"), (-9, "killed by SIGKILL"), (-40, "killed by signal 40")],
)
def test_how(status: int, words: str) -> None:
    """One that said nothing is told by how it ended."""
    assert StageEnd(Stage("x", ("x",)), status, " \n").words() == words


# -- how fast ----------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    st.integers(1, 10**10),
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1)), max_size=60),
)
def test_rate_is_held(rate: int, steps: list[tuple[float, float]]) -> None:
    """Never does more go than the rate allows from any moment on, but for a tenth of a second's."""
    clock = Clock()
    pace = Pace(rate, clock)
    gone = [(clock.now, 0)]
    for passes, share in steps:
        clock.now += passes
        count = int(pace.room() * share)
        pace.gone(count)
        gone.append((clock.now, gone[-1][1] + count))
    for n, (since, before) in enumerate(gone):
        for until, total in gone[n:]:
            assert total - before <= (until - since) * rate * (1 + 1e-9) + max(2, rate / 10) + 1


@given(st.integers(1, 10**8))
def test_rate_is_reached(rate: int) -> None:
    """Who takes all that may go, and waits as told, has the rate; and is not woken for nothing."""
    clock = Clock()
    pace = Pace(rate, clock)
    total = waits = 0
    while clock.now < 1005:
        if room := pace.room():
            pace.gone(room)
            total += room
        else:
            clock.now += pace.wait_s() + 1e-6
            waits += 1
    assert 4.5 * rate - 2 <= total <= 5.2 * rate + 2
    assert waits <= 5 * 20 * 6 + 5 * rate / PIPE + 1


def test_no_rate() -> None:
    """Without a limit there is always room."""
    pace = Pace(0, Clock())
    pace.gone(10**12)
    assert pace.room() == PIPE
    assert pace.wait_s() == 0


@MOVERS
def test_limited(tmp_path: Path, mover: type[Mover]) -> None:
    """A stream under a limit arrives whole, and not more of it than the time that passed allows."""
    rate, size = 2_000_000, 700_000
    begun = time.monotonic()
    sinks = [into(tmp_path / "out")]
    assert size == carry(
        zeros(size),
        sinks,
        lock=None,
        rate=rate,
        moved=lambda _: None,
        check=nothing,
        mover=mover,
    )
    assert size <= (time.monotonic() - begun) * rate + rate / 10
    assert (tmp_path / "out").stat().st_size == size


def test_advice() -> None:
    """What a program tells people at a terminal is no part of its complaint."""
    said = "cannot receive: incomplete stream.\nPartially received\nzfs send -t 1-abc\n"
    stage = Stage("zfs receive b/a", ("true",), advice="Partially received")
    assert StageEnd(stage, 1, said).words() == "cannot receive: incomplete stream."
    assert "1-abc" in StageEnd(Stage("x", ("true",)), 1, said).words()

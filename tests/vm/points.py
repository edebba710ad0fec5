"""
Points in a command's way at which it can be killed, found by counting those of a run.

`Crash` puts them on both sides of every journal transaction, every program, every mount and
unmount, and every file that the run's folder needs, in the front end and in a forked runner.
What is wrapped is what changes the machine, not what decides, so that a new intent has its
points the moment it exists.  A point has the number of its occurrence:

    "before:snapshotted#1"   in the transaction that leads there, before its commit
    "journal:snapshotted#1"  after the commit; "snapshotted+" for one that stays in the state
    "start:zfs snapshot#1"   the child was started; "end:..." it has ended
    "start:mount#1"          mount(2) comes next; "end:mount#1" it has returned
    "runner:..."             the same, in a forked runner

"#17" is whatever point comes seventeenth, "runner:#5" the fifth of a runner.

WHO dies there: "front" (in the runner's points: the runner), "runner" (the front end and the
runner), "all" (and the client with everything that it started), or "child" (the program that was
just started, alone); "signal 2" sends the front end SIGINT instead, "machine" stands still with
a file at `STOPPED`, for a host that then kills the machine, and "... later" lets it go on for
`delay_s` seconds first.

It runs in the machine with the program's own Python and needs nothing else.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STOPPED = "/run/atomtx-stopped"
RUNNER = "atomtx.runner"  # what a forked runner is called, as its command line is its parent's
MARK = b"atomtx mark: "
_HIGH = 200  # descriptors from here on are the forked runner's while it sorts its own


class Marks:
    """Writes marks to a disk that records its writes; without a disk, nothing."""

    def __init__(self, disk: str | None) -> None:
        self._descriptor = -1
        if disk:
            # Past the page cache, and without O_DSYNC: its flush would help what is tested.
            self._descriptor = os.open(disk, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            self._page = mmap.mmap(-1, 4096)  # O_DIRECT wants it aligned

    def write(self, text: str) -> None:
        """Write a mark; the disk has it on return."""
        if self._descriptor >= 0:
            self._page[:] = (MARK + text.encode()).ljust(4096, b"\0")
            os.pwrite(self._descriptor, self._page, 0)


class Crash:
    """Counts the points that a command passes, and kills at one of them."""

    def __init__(
        self,
        points: Path,
        marks: Marks | None = None,
        at: str = "",
        who: str = "front",
        delay_s: float = 0,
    ) -> None:
        self._points = os.open(points, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        self._marks = marks or Marks(None)
        self._at = at
        self._who = who
        self._delay_s = delay_s
        self._seen: Counter[str] = Counter()
        self._folder: Path | None = None
        self._front: int | None = None  # in a forked runner, its front end
        self._runners = 0

    def install(self) -> None:
        """Put the points around what changes the machine."""
        self._around_transactions()
        self._around_programs()
        for name, owner, attribute in _effects():
            self._around(name, owner, attribute)

    def in_runner(self) -> None:
        """Go on as the runner: its points are numbered anew; only the first runner is killed."""
        self._front = os.getppid()
        self._seen.clear()
        if self._runners > 1:
            self._at = ""

    def _around_transactions(self) -> None:
        from atomtx import journal

        change, begin = journal.Journal.change, journal.Journal.begin
        adopt = journal.Journal.adopt
        crash = self

        @contextmanager
        def changed(self: Any, run: Any) -> Iterator[Any]:
            crash._folder = self.state / "runs" / run.id
            with change(self, run) as made:
                yield made
                made.finish()
                made.finish = lambda: None  # type: ignore[method-assign]
                crash.pass_("before:" + _goal(self, run, made))
            crash.pass_("journal:" + _goal(self, run, made), note=f" {run.id} {run.rev + 1}")

        def begun(self: Any, plan: Any, intents: Any, **check: Any) -> Any:
            crash.pass_("before:planned")
            run = begin(self, plan, intents, **check)
            crash._folder = self.state / "runs" / run.id
            crash.pass_("journal:planned", note=f" {run.id} {run.rev}")
            return run

        def adopted(self: Any, plan: Any, found: Any, intents: Any) -> Any:
            crash.pass_("before:unmounting")
            run = adopt(self, plan, found, intents)
            crash._folder = self.state / "runs" / run.id
            crash.pass_("journal:unmounting", note=f" {run.id} {run.rev}")
            return run

        for name, wrapped in (("change", changed), ("begin", begun), ("adopt", adopted)):
            setattr(journal.Journal, name, wrapped)

    def _around_programs(self) -> None:
        popen: Any = subprocess.Popen
        crash = self

        class Popen(popen):  # type: ignore[misc]
            def __init__(self, argv: Any, **options: Any) -> None:
                super().__init__(argv, **options)
                words = argv[:2] if argv[0] in ("zfs", "zpool") else [os.path.basename(argv[0])]
                self._name = " ".join(words)
                crash.pass_("start:" + self._name, child=self.pid)

            def communicate(self, *args: Any, **options: Any) -> Any:
                done = super().communicate(*args, **options)
                crash.pass_("end:" + self._name)
                return done

        subprocess.Popen = Popen  # type: ignore[assignment,misc]

    def _around(self, name: str, owner: Any, attribute: str) -> None:
        function = getattr(owner, attribute)

        def wrapped(*args: Any, **options: Any) -> Any:
            self.pass_("start:" + name)
            result = function(*args, **options)
            self.pass_("end:" + name)
            return result

        setattr(owner, attribute, wrapped)
        # Modules that have imported it by name have it too.
        for module in [m for n, m in sys.modules.items() if n.startswith("atomtx.")]:
            if vars(module).get(attribute) is function:
                setattr(module, attribute, wrapped)

    def pass_(self, name: str, child: int | None = None, note: str = "") -> None:
        """Note a point, with a *note* in its mark; die if it is the one."""
        name = name if self._front is None else f"runner:{name}"
        self._seen[name] += 1
        point = f"{name}#{self._seen[name]}"
        os.writev(self._points, [f"{point}\n".encode()])  # write(2) is one to fail
        self._marks.write(point + note)
        if self._at not in (point, self._ordinal()):
            return
        if self._who.startswith("signal "):
            self._signal_later(int(self._who.removeprefix("signal ")))
        elif self._who.endswith(" later"):
            self._kill_later()
        elif self._who == "machine":
            Path(STOPPED).touch()
            while True:
                signal.pause()
        else:
            time.sleep(self._delay_s)
            self._kill(child)

    def _ordinal(self) -> str:
        return f"{'runner:' if self._front is not None else ''}#{self._seen.total()}"

    def _signal_later(self, number: int) -> None:
        """Send the front end a signal, from outside, after the delay."""
        front = os.getpid()
        if os.fork() == 0:
            time.sleep(self._delay_s)
            os.kill(front, number)
            os._exit(0)

    def _kill_later(self) -> None:
        """Kill from outside after the delay, so that the front end goes on until then."""
        front = os.getpid()
        if os.fork() == 0:
            time.sleep(self._delay_s)
            self._who = self._who.removesuffix(" later")
            for pid in (*self._victims(), front):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(0)

    def _kill(self, child: int | None) -> None:
        if self._who == "child":
            assert child
            os.kill(child, signal.SIGKILL)
            return
        victims = self._victims()
        if self._front is not None and self._who == "all":
            victims.append(self._front)
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _victims(self) -> list[int]:
        from atomtx import errand, locks, probing
        from atomtx.mounts import inhabitants
        from atomtx.statedir import RunFolder

        assert probing
        if self._who == "front" or self._folder is None:
            return []
        folder = RunFolder(self._folder)
        runner = errand.runner_pid(folder)
        found = [runner] if runner else []
        if self._who == "all":
            token = f"atomtx-{self._folder.name}"
            found += [p.pid for p in locks.holders(folder.client_lock)]
            found += inhabitants.of(token)
        return [pid for pid in dict.fromkeys(found) if pid != os.getpid()]


def _effects() -> list[tuple[str, Any, str]]:
    """Return what changes the machine in the program's own processes: name, owner, attribute."""
    from atomtx import btrfsio, journal, locks, statedir
    from atomtx.mounts import namespace, tree
    from atomtx.statedir import RunFolder
    from atomtx.volumes import btrfs

    return [
        ("prepare folder", statedir, "prepare"),
        ("upgrade journal", journal, "bring_up_to_date"),
        ("forget runs", journal.Journal, "expire"),
        ("mount", namespace, "mount"),
        ("unmount", namespace, "unmount"),
        ("enter", namespace, "enter"),
        ("make btrfs directory", btrfs, "_run_directory"),
        ("btrfs snapshot", btrfsio, "snapshot"),
        ("btrfs mount", btrfsio, "mount_subvolume"),
        ("btrfs destroy", btrfsio, "destroy"),
        ("remove btrfs directory", btrfs, "_remove_directory"),
        ("btrfs rename", btrfs, "_rename"),
        ("btrfs commit", btrfsio, "commit"),
        ("make tree", tree, "make"),
        ("remove tree", tree, "remove"),
        ("make folder", RunFolder, "make"),
        ("reserve end", RunFolder, "reserve_end"),
        ("write end", RunFolder, "write_end"),
        ("send signal", locks, "send"),
    ]


def fork_runner(crash: Crash, prepare: Callable[[], None] = lambda: None) -> None:
    """
    Have runners forked from the front end: their imports are paid already.

    *prepare* is called in the first, before its first line.
    """
    from atomtx import process, runner

    def spawn_runner(*, control: int, front: int, stderr: int, env: Mapping[str, str]) -> int:
        crash._runners += 1
        pid = os.fork()
        if pid == 0:
            with _ends_here():
                os.setsid()
                Path("/proc/self/comm").write_text(RUNNER)
                crash.in_runner()
                descriptors = _sort_descriptors(control, front, stderr, crash)
                os.environ.clear()
                os.environ.update(env)
                os.chdir("/")
                if crash._runners == 1:
                    prepare()
                os._exit(runner.main(*descriptors))
        crash.pass_("start:runner", child=pid)
        return pid

    process.spawn_runner = spawn_runner


@contextmanager
def _ends_here() -> Iterator[None]:
    """Never let a forked child go on as its parent."""
    try:
        yield
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(1)


def _sort_descriptors(control: int, front: int, stderr: int, crash: Crash) -> tuple[int, int]:
    """Leave a forked runner the descriptors that a started one has, and the points' file."""
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((null, 0), (null, 1), (stderr, 2)):
        os.dup2(source, target)
    kept = [os.dup2(fd, _HIGH + n, inheritable=False) for n, fd in enumerate((control, front))]
    crash._points = os.dup2(crash._points, _HIGH + 2, inheritable=False)
    os.closerange(3, _HIGH)
    os.closerange(_HIGH + 3, 4096)
    return kept[0], kept[1]


def _goal(journal: Any, run: Any, made: Any) -> str:
    state = (
        made._connection.exec_driver_sql("SELECT state FROM runs WHERE id = ?", (run.id,)).scalar()
        if not made._connection.closed
        else made._goal
    )
    made._goal = state
    return str(state) if state != run.state else f"{state}+"

"""
Runs `atomtx` in the machine in forked children, and kills it where a test wants.

The imports take seconds under an emulated CPU; here they are paid once.  The code that runs is
the program's own; what is put around it are the journal's transactions and the starting of
programs, so that a crash can come on either side of each.  One request a connection, in JSON:

    {"argv": [...], "env": {...}, "cwd": "/", "kill": {"at": POINT, "who": WHO}}
        -> {"status": ..., "stdout": ..., "stderr": ..., "points": [...]}

POINT is one of those that a run without a "kill" returns, with the number of its occurrence:
"journal:snapshotted#1" (after the commit that leads there), "before:...", and for programs
"start:zfs snapshot#1" (the child was started), "end:..." (it has ended).  WHO: "front", "runner"
(the front end and the runner), "all" (and the client with everything that it started), or
"child" (the program that was just started, alone); "signal 2" sends the front end SIGINT instead,
"machine" stands still with a file at `STOPPED`, for a host that then kills the machine, and
"... later" lets it go on for "delay_s" seconds first.

"marks" in a request is a disk whose first sector each point is written to, as it is passed: a
record of that disk's writes then tells what had happened before each of them.  "script" runs a
Python file, with "argv" as its arguments, in place of the program.

It runs in the machine with the program's own Python and needs nothing else.
"""

from __future__ import annotations

import json
import mmap
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PORT = 7777
STOPPED = "/run/atomtx-stopped"
MARK = b"atomtx mark: "


def serve() -> None:
    """Answer requests for ever, each in a child of its own."""
    import alembic.command  # noqa: F401
    import rich.progress  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401
    import transitions  # noqa: F401

    import atomtx.cli.backup
    import atomtx.cli.recover
    import atomtx.clients.command
    import atomtx.clients.kopia
    import atomtx.clients.restic  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server(("0.0.0.0", PORT)) as server:
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with connection:
                    _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> None:
    request = json.loads(connection.makefile("rb").readline())
    with tempfile.TemporaryDirectory(prefix="agent-") as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr", "points")}
        for file in files.values():
            file.touch()
        pid = os.fork()
        if pid == 0:
            _become(request, files)
        if request.get("background"):
            reply: dict[str, Any] = {"pid": pid}
            connection.sendall(json.dumps(reply).encode() + b"\n")
            os.waitpid(pid, 0)
            return
        _, status = os.waitpid(pid, 0)
        reply = {"status": os.waitstatus_to_exitcode(status)}
        reply |= {name: file.read_text(errors="replace") for name, file in files.items()}
        connection.sendall(json.dumps(reply).encode() + b"\n")


def _become(request: dict[str, Any], files: dict[str, Path]) -> None:
    from atomtx import cli

    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(files["stdout"], os.O_WRONLY)
    err = os.open(files["stderr"], os.O_WRONLY)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.chdir(request.get("cwd", "/"))
    os.environ.clear()
    os.environ.update(request["env"])
    marks = Marks(request.get("marks"))
    Crash(files["points"], marks, **request.get("kill", {})).install()
    status = 70
    try:
        if "script" in request:
            sys.argv = [request["script"], *request["argv"]]
            runpy.run_path(request["script"], run_name="__main__")
            status = 0
        else:
            cli.main(request["argv"])
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            marks.write(f"exit {status}")
        os._exit(status)


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
        marks: Marks,
        at: str = "",
        who: str = "front",
        delay_s: float = 0,
    ) -> None:
        self._points = points
        self._marks = marks
        self._at = at
        self._who = who
        self._delay_s = delay_s
        self._seen: Counter[str] = Counter()
        self._folder: Path | None = None

    def install(self) -> None:
        """Put the points around the journal's transactions and the starting of programs."""
        from atomtx import journal

        change, begin = journal.Journal.change, journal.Journal.begin
        popen: Any = subprocess.Popen
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

        def begun(self: Any, plan: Any, intents: Any) -> Any:
            run = begin(self, plan, intents)
            crash._folder = self.state / "runs" / run.id
            crash.pass_("journal:planned", note=f" {run.id} {run.rev}")
            return run

        class Popen(popen):  # type: ignore[misc]
            def __init__(self, argv: Any, **options: Any) -> None:
                super().__init__(argv, **options)
                self._name = " ".join(argv[:2]) if argv[0] in ("zfs", "zpool") else argv[0]
                crash.pass_("start:" + self._name, child=self.pid)

            def communicate(self, *args: Any, **options: Any) -> Any:
                done = super().communicate(*args, **options)
                crash.pass_("end:" + self._name)
                return done

        for owner, name, wrapped in (
            (journal.Journal, "change", changed),
            (journal.Journal, "begin", begun),
            (subprocess, "Popen", Popen),
        ):
            setattr(owner, name, wrapped)

    def pass_(self, name: str, child: int | None = None, note: str = "") -> None:
        """Note a point, with a *note* in its mark; die if it is the one."""
        self._seen[name] += 1
        point = f"{name}#{self._seen[name]}"
        with self._points.open("a") as file:
            file.write(point + "\n")
        self._marks.write(point + note)
        if point == self._at and self._who.startswith("signal "):
            self._signal_later(int(self._who.removeprefix("signal ")))
        elif point == self._at and self._who.endswith(" later"):
            self._kill_later()
        elif point == self._at and self._who == "machine":
            Path(STOPPED).touch()
            while True:
                signal.pause()
        elif point == self._at:
            time.sleep(self._delay_s)
            self._kill(child)

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
        for pid in self._victims():
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


def _goal(journal: Any, run: Any, made: Any) -> str:
    state = (
        made._connection.exec_driver_sql("SELECT state FROM runs WHERE id = ?", (run.id,)).scalar()
        if not made._connection.closed
        else made._goal
    )
    made._goal = state
    return str(state) if state != run.state else f"{state}+"


if __name__ == "__main__":
    if sys.argv[1:] == ["start"]:
        with open("/var/log/agent.log", "w") as log:
            subprocess.Popen(
                [sys.executable, __file__, "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", PORT), 1):
                break
            time.sleep(0.2)
    else:
        serve()

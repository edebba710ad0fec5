"""
Runs `atomtx` in the machine in forked children, and kills it where a test wants.

The imports take seconds under an emulated CPU; here they are paid once.  The code that runs is
the program's own; what is put around it are the journal's transactions and the starting of
programs, so that a crash can come on either side of each.  One request a connection, in JSON:

    {"argv": [...], "env": {...}, "cwd": "/", "kill": {"at": POINT, "who": WHO}}
        -> {"status": ..., "stdout": ..., "stderr": ..., "points": [...]}

POINT and WHO are described in points.py.  "fork" in a request has the runner forked, which is
faster, not started as a program of its own.  "marks" is a disk whose first sector each point is
written to, as it is passed: a record of that disk's writes then tells what had happened before
each of them.  "script" runs a Python file, with "argv" as its arguments, in place of the program.

It runs in the machine with the program's own Python and needs points.py beside it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PORT = 7777


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
    import atomtx.clients.restic
    import atomtx.runner  # noqa: F401

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
    from points import Crash, Marks, fork_runner  # type: ignore[import-not-found]

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
    crash = Crash(files["points"], marks, **request.get("kill", {}))
    crash.install()
    if request.get("fork"):
        fork_runner(crash)
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

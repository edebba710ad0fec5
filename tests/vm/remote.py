"""`atomtx` in the machine, through the agent there: starts fast, dies where a test wants."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vm.machine import Machine

HERE = Path(__file__).parent
REPOSITORY = "/srv/repo"
ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "RESTIC_REPOSITORY": REPOSITORY,
    "RESTIC_PASSWORD": "correct horse",
}


@dataclass(frozen=True)
class Answer:
    """What a command did; *status* is minus the signal that killed it."""

    status: int
    stdout: str
    stderr: str
    points: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def install(machine: Machine) -> None:
    """Start the agent in the machine."""
    for name in ("points.py", "agent.py", "look.py"):
        machine.put(HERE / name, f"/root/{name}")
    machine.run("/venv/bin/python /root/agent.py start", timeout=300)


def atomtx(
    machine: Machine,
    *argv: str,
    kill: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    cwd: str = "/",
    background: bool = False,
    timeout_s: float = 900,
    marks: str | None = None,
    script: str | None = None,
    started: bool = False,
) -> Answer:
    """
    Run one command in the machine and return what it did; in the *background*, at once.

    *marks* names a disk to note the points on, *script* a Python file to run in its place.  Its
    runner is forked from it, which halves the time of a run, but where it is to be *started* as
    users' are, or has marks.
    """
    words = {k: v for k, v in {**ENV, **(env or {})}.items() if k not in without}
    request = {"argv": argv, "env": words, "cwd": cwd, "background": background}
    fork = not (started or marks)
    given = {"kill": kill, "marks": marks, "script": script, "fork": fork}
    request |= {name: value for name, value in given.items() if value}
    reply = _ask(machine, request, timeout_s)
    if background:
        return Answer(reply["pid"], "", "", ())
    points = tuple(reply["points"].split("\n")[:-1])
    return Answer(reply["status"], reply["stdout"], reply["stderr"], points)


def _ask(machine: Machine, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    end = time.monotonic() + 60
    while True:
        with suppress(ConnectionError, json.JSONDecodeError):
            return _ask_once(machine, request, timeout_s)
        if time.monotonic() > end:
            raise AssertionError("the agent in the machine does not answer")
        time.sleep(0.5)


def _ask_once(machine: Machine, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    with socket.create_connection(("127.0.0.1", machine.agent_port), timeout_s) as connection:
        connection.sendall(json.dumps(request).encode() + b"\n")
        reply: dict[str, Any] = json.loads(connection.makefile("rb").readline())
        return reply


def runs(machine: Machine) -> list[dict[str, Any]]:
    """Return the journal's runs, the newest first."""
    answer = atomtx(machine, "history", "--json", "--limit", "50")
    assert answer.status == 0, answer.output
    found: list[dict[str, Any]] = json.loads(answer.stdout)
    return found


def backups(machine: Machine, restic: str = "restic") -> list[dict[str, Any]]:
    """Return the backups in the repository, the oldest first."""
    out = machine.run(restic_command("snapshots --json", restic)).stdout
    found: list[dict[str, Any]] = json.loads(out)
    return found


def restic_command(words: str, restic: str = "restic") -> str:
    """Return a shell command that runs restic on the tests' repository."""
    return f"RESTIC_REPOSITORY={REPOSITORY} RESTIC_PASSWORD='correct horse' {restic} {words}"


def stop_at(point: str, who: str = "front", **options: Sequence[str] | float) -> dict[str, Any]:
    """Return the wish to be killed at a point; see points.py."""
    return {"at": point, "who": who, **options}

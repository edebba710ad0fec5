"""
The only module that starts programs.

Argument lists, never shell strings; standard input closed; the child always waited for; each
child in a session of its own, so that a Ctrl-C on the terminal reaches atomtx alone, which then
decides (`zfs` and `lvm` commands are never killed: a half-made change is worse than a late one).
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .errors import EffectError

# Error text is matched in some places, so it must not be translated.
BASE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True)
class Completed:
    """A program that ended; *status* is its exit status, or minus the signal that ended it."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.status == 0

    def last_line(self) -> str:
        """Return the last line that it printed about its failure, or how it ended."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit status {self.status}"

    def error(self, what: str, *, hint: str | None = None) -> EffectError:
        """Return the error to raise: what failed, the program's own words, the command."""
        text = self.stderr.strip() or f"exit status {self.status}"
        lines = text.splitlines()
        shown = "; ".join(line.strip() for line in lines[:3] if line.strip())
        return EffectError(
            f"{what}: {shown}", hint=hint or f"the command was: {abridged(self.argv)}"
        )


def abridged(argv: Sequence[str], limit: int = 300) -> str:
    """Return a command as it can be pasted into a shell, cut in the middle where it is long."""
    text = shlex.join(argv)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 3 :]}"


def _base_environment() -> dict[str, str]:
    """Return the environment of a system program: fixed, but that the user's PATH comes last."""
    path = ":".join(filter(None, (BASE_ENVIRONMENT["PATH"], os.environ.get("PATH"))))
    return {**BASE_ENVIRONMENT, "PATH": path}


def which(program: str, env: Mapping[str, str] | None = None) -> str | None:
    """Return where a program is, or None."""
    path = (env or os.environ).get("PATH") or BASE_ENVIRONMENT["PATH"]
    return shutil.which(program, path=path)


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: str | None = None,
    timeout_s: float | None = None,
    pass_fds: Collection[int] = (),
) -> Completed:
    """
    Run a program to its end and return what it said.

    Without *timeout_s* it is never killed.  A program that is not there, or one that outlived
    *timeout_s* seconds (it is then killed, and all of its session), raises
    :class:`EffectError`.
    """
    try:
        child = subprocess.Popen(
            argv,
            env=dict(env) if env is not None else _base_environment(),
            cwd=cwd,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except FileNotFoundError as exc:
        if cwd is not None and not os.path.isdir(cwd):
            raise EffectError(f"cannot start {argv[0]} in {cwd}: {exc.strerror}") from exc
        raise EffectError(
            f"{argv[0]} is not installed", hint="`atomtx doctor` tells what is missing"
        ) from exc
    except OSError as exc:
        raise EffectError(f"cannot start {argv[0]}: {exc.strerror}") from exc
    try:
        stdout, stderr = child.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired as exc:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise EffectError(f"{argv[0]} did not answer within {timeout_s:.0f} s") from exc
    return Completed(tuple(argv), child.returncode, stdout, stderr)


def spawn_runner(*, control: int, front: int, stderr: int, env: Mapping[str, str]) -> int:
    """
    Start the runner in a session of its own and return its pid; the caller waits for it.

    *control* is its end of a socket pair, *front* a descriptor of lock F.  `-P` keeps the
    current directory off Python's path: root may stand anywhere.
    """
    argv = [sys.executable, "-P", "-m", "atomtx.runner", str(control), str(front)]
    child = subprocess.Popen(
        argv,
        env=dict(env),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=(control, front),
        start_new_session=True,
    )
    child.returncode = 0  # waited for by pid, or by init when this process is killed
    return child.pid


def spawn_hook(argv: Sequence[str], *, env: Mapping[str, str], cwd: str) -> subprocess.Popen[bytes]:
    """
    Start a hook in a session of its own, all that it prints piped to the caller.

    It inherits no lock.
    """
    return subprocess.Popen(
        argv,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def spawn_client(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: str, lock: int
) -> subprocess.Popen[bytes]:
    """
    Start the client in a session of its own, both outputs piped to the caller.

    It inherits *lock*, and every descendant does that does not close it.
    """
    return subprocess.Popen(
        argv,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(lock,),
        start_new_session=True,
    )

"""
The only module that starts programs.

Argument lists, never shell strings; standard input closed; the child always waited for; each
child in a session of its own, so that a Ctrl-C on the terminal reaches atomtx alone, which then
decides (`zfs` and `lvm` commands are never killed: a half-made change is worse than a late one).
"""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from .errors import EffectError

_READ = selectors.EVENT_READ
_STEP_S = 0.05
_TAIL_BYTES = 4096
_LAST_S = 2.0

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
    return _spawn_piped(argv, env, cwd, stderr=subprocess.STDOUT)


def spawn_client(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: str, lock: int
) -> subprocess.Popen[bytes]:
    """
    Start the client in a session of its own, both outputs piped to the caller.

    It inherits *lock*, and every descendant does that does not close it.
    """
    return _spawn_piped(argv, env, cwd, stderr=subprocess.PIPE, pass_fds=(lock,))


def _spawn_piped(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    *,
    stderr: int,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def run_bounded(
    argv: Sequence[str], *, env: Mapping[str, str], stdin: str, timeout_s: float
) -> Completed:
    """
    Run a program that may hang, and may say more than we keep; return the end of what it said.

    After *timeout_s* seconds it is killed with its session, and EffectError is raised; also for
    one that cannot be started.  Unlike `run`, it does not wait for those of its descendants that
    have left its session, though they hold its outputs open.
    """
    try:
        child = subprocess.Popen(
            argv,
            env=dict(env),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
    except (OSError, ValueError) as exc:  # ValueError: a NUL in a word
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise EffectError(f"cannot start {argv[0]}: {why}") from exc
    with _Talk(child, stdin.encode("utf-8", "replace")) as talk:
        end = time.monotonic() + timeout_s
        while child.poll() is None and time.monotonic() < end:
            talk.go_on(_STEP_S)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # it waits for a disk that never answers
                child.wait(_LAST_S)
            raise EffectError(f"{argv[0]} did not end within {timeout_s:.0f} s, and was killed")
        talk.go_on(0)
        said = talk.tail.decode("utf-8", "replace")
    return Completed(tuple(argv), child.returncode, "", said)


class _Talk:
    """A child's standard input, fed, and its output, of which the end is kept."""

    def __init__(self, child: subprocess.Popen[bytes], rest: bytes) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._stdin, self._stdout, self._rest = child.stdin, child.stdout, rest
        self._selector = selectors.DefaultSelector()
        for file, kind in ((child.stdin, selectors.EVENT_WRITE), (child.stdout, _READ)):
            os.set_blocking(file.fileno(), False)
            self._selector.register(file, kind)
        self.tail = b""

    def go_on(self, timeout_s: float) -> None:
        """Write and read what can be now; wait for it, or for *timeout_s*."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._stdin:
                self._write()
            else:
                self._read()
        if not self._selector.get_map():
            time.sleep(timeout_s)

    def _write(self) -> None:
        try:
            self._rest = self._rest[os.write(self._stdin.fileno(), self._rest) :]
        except BrokenPipeError:  # it does not want to know
            self._rest = b""
        if not self._rest:
            self._selector.unregister(self._stdin)
            self._stdin.close()

    def _read(self) -> None:
        data = os.read(self._stdout.fileno(), 65_536)
        self.tail = (self.tail + data)[-_TAIL_BYTES:]
        if not data:
            self._selector.unregister(self._stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._stdin.close()
        self._stdout.close()

"""
The only module that starts programs.

Argument lists, never shell strings; standard input closed; the child always waited for; each
child in a session of its own, so that a Ctrl-C on the terminal reaches atomtx alone, which then
decides (`zfs` and `lvm` commands are never killed: a half-made change is worse than a late one).
"""

from __future__ import annotations

import errno
import fcntl
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, Any, NoReturn, Self

from .errors import EffectError, Interrupted

_READ = selectors.EVENT_READ
_STEP_S = 0.05
_CHECK_S = 0.5
_TAIL_BYTES = 4096
_LAST_S = 2.0
_SAID_BYTES = 1 << 20
_UTF8 = ("-X", "utf8")  # the first of its kind counts, and more than any variable
_OF_THE_USER = ("HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK")

# Error text is matched in some places, so it must not be translated.
BASE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
}


class NotInstalledError(EffectError):
    """A program is not there to be run."""


class UnansweredError(EffectError):
    """A program outlived its limit, and was killed."""


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


def base_environment() -> dict[str, str]:
    """Return the environment of a system program: fixed, but that the user's PATH comes last."""
    path = ":".join(filter(None, (BASE_ENVIRONMENT["PATH"], os.environ.get("PATH"))))
    return {**BASE_ENVIRONMENT, "PATH": path}


def users_environment() -> dict[str, str]:
    """Return that environment with what leads ssh to the user's keys."""
    users = {name: os.environ[name] for name in _OF_THE_USER if name in os.environ}
    return base_environment() | users


def which(program: str, env: Mapping[str, str] | None = None) -> str | None:
    """Return where a program is, or None; without *env* it is looked for as a system program."""
    path = (env or base_environment()).get("PATH") or BASE_ENVIRONMENT["PATH"]
    return shutil.which(program, path=path)


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: str | None = None,
    timeout_s: float | None = None,
    pass_fds: Collection[int] = (),
    check: Callable[[], None] | None = None,
) -> Completed:
    """
    Run a program to its end and return what it said.

    Without *timeout_s* it is never killed.  A program that is not there, or one that outlived
    *timeout_s* seconds (it is then killed, and all of its session, UnansweredError), raises
    :class:`EffectError`.  It counts as at its end when nobody has its outputs open any more; what
    has left its session is not ended, nor waited for after the limit.  *check* is called now and
    then where it has a limit; it is killed as well where that raises Interrupted.
    """
    try:
        child = subprocess.Popen(
            argv,
            env=dict(env) if env is not None else base_environment(),
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
    except OSError as exc:
        if isinstance(exc, FileNotFoundError) and cwd is not None and not os.path.isdir(cwd):
            raise EffectError(f"cannot start {argv[0]} in {cwd}: {exc.strerror}") from exc
        raise _not_started(argv, exc) from exc
    try:
        if timeout_s is not None and check:
            stdout, stderr = _answer(child, timeout_s, check)
        else:
            stdout, stderr = child.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired as exc:
        _kill(child)
        raise UnansweredError(f"{argv[0]} did not answer within {timeout_s:.0f} s") from exc
    except Interrupted:
        _kill(child)
        raise
    return Completed(tuple(argv), child.returncode, stdout, stderr)


def _answer(
    child: subprocess.Popen[str], timeout_s: float, check: Callable[[], None]
) -> tuple[str, str]:
    """Return what a child says until its end, and call *check* as long as that lasts."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return child.communicate(timeout=min(_CHECK_S, timeout_s))  # it may be called again
        except subprocess.TimeoutExpired:
            check()
            if time.monotonic() >= end:
                raise


def _kill(child: subprocess.Popen[Any]) -> None:
    """Kill a child with its session, and forget its pipes, which others may hold open for ever."""
    os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # it waits for a disk that never answers
        child.wait(_LAST_S)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()


def run_to_end(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, lock: int | None = None
) -> Completed:
    """
    Run a program that must not die half-way, whatever becomes of us; return what it said.

    Nothing here ends it: it has a session of its own, no time limit, and writes into memory that
    outlives us, because one whose reader was killed would die of SIGPIPE at its next word.
    *lock* is the descriptor of F, its standard input: LVM closes all others at its start, and the
    lock's file is as empty as /dev/null.  Raises EffectError for a program that is not there.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(os.fdopen(os.memfd_create(name), "w+b")) for name in ("out", "err")
        ]
        try:
            child = subprocess.Popen(
                argv,
                env={**base_environment(), **(env or {})},
                cwd="/",
                stdin=subprocess.DEVNULL if lock is None else lock,
                stdout=files[0],
                stderr=files[1],
                start_new_session=True,
            )
        except OSError as exc:
            raise _not_started(argv, exc) from exc
        child.communicate()
        stdout, stderr = map(_written, files)
    return Completed(tuple(argv), child.returncode, stdout, stderr)


def _not_started(argv: Sequence[str], exc: OSError) -> EffectError:
    if isinstance(exc, FileNotFoundError):
        return NotInstalledError(
            f"{argv[0]} is not installed", hint="`atomtx doctor` tells what is missing"
        )
    return EffectError(f"cannot start {argv[0]}: {exc.strerror}")


def _written(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "surrogateescape")


class Link:
    """
    A program in a chain of pipes, started in a session of its own; the caller waits for it.

    *stdin* and *stdout* are its ends of pipes, None at the ends of the chain.  It holds *lock*, the
    descriptor of F, to its end: also in place of a pipe that it has not, because ssh closes all
    but the first three descriptors at its start (closefrom in ssh.c of OpenSSH), and the lock's
    file is as empty as /dev/null.  What it says on stderr goes into memory that outlives us: see
    `run_to_end`.  Its environment is `users_environment`.  Raises EffectError for a program that
    cannot be started.
    """

    def __init__(
        self, argv: Sequence[str], *, stdin: int | None, stdout: int | None, lock: int | None
    ) -> None:
        spare = subprocess.DEVNULL if lock is None else lock
        with ExitStack() as stack:
            self._stderr = stack.enter_context(_memory())
            try:
                self._child = subprocess.Popen(
                    argv,
                    env=users_environment(),
                    cwd="/",
                    stdin=spare if stdin is None else stdin,
                    stdout=spare if stdout is None else stdout,
                    stderr=self._stderr,
                    pass_fds=() if lock is None else (lock,),
                    start_new_session=True,
                )
            except OSError as exc:
                raise _not_started(argv, exc) from exc
            stack.pop_all()
        self._written = [self._stderr.fileno()]
        if stdout is None and lock is not None:
            self._written.append(lock)
        self.was_signalled = False

    def status(self) -> int | None:
        """Return how it ended, as `Completed.status`; None while it runs."""
        return self._child.poll()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for its end, and reap it; None where it has not ended after *timeout_s* seconds."""
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def send(self, signum: signal.Signals) -> None:
        """Signal it and all of its session; nothing where it has ended."""
        if self._child.poll() is None:
            self.was_signalled = True
            os.killpg(self._child.pid, signum)

    def said(self) -> str:
        """Return the end of what it said on stderr."""
        start = max(0, os.fstat(self._stderr.fileno()).st_size - _TAIL_BYTES)
        return os.pread(self._stderr.fileno(), _TAIL_BYTES, start).decode("utf-8", "replace")

    def trim(self) -> None:
        """Forget what it said so far, where that is much: a far machine may say what it likes."""
        for descriptor in self._written:
            if os.fstat(descriptor).st_size > _SAID_BYTES:
                os.ftruncate(descriptor, 0)

    def close(self) -> None:
        """Forget what it said; it has been waited for."""
        self._stderr.close()


def _memory() -> IO[bytes]:
    """Return a file without a name that is written at its end, wherever that is."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("stderr")
    else:
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
    return os.fdopen(descriptor, "w+b", buffering=0)


def restart_in_utf8() -> NoReturn:
    """
    Start this very program again, in Python's UTF-8 mode; for a locale of another encoding.

    A path is the same bytes in each locale, and we read the kernel's tables and what programs say
    as UTF-8.  A process that runs cannot change what os.* takes for a name's encoding (PEP 540).
    """
    os.execv(sys.executable, [sys.executable, *_UTF8, *sys.orig_argv[1:]])


def spawn_runner(*, control: int, front: int, stderr: int, env: Mapping[str, str]) -> int:
    """
    Start the runner in a session of its own and return its pid; the caller waits for it.

    *control* is its end of a socket pair, *front* a descriptor of lock F.  `-P` keeps the
    current directory off Python's path: root may stand anywhere.
    """
    argv = [sys.executable, *_UTF8, "-P", "-m", "atomtx.runner", str(control), str(front)]
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


def spawn_hook(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str,
    session: str,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """
    Start a hook in a session of its own, all that it prints piped to the caller.

    The variable *session* says which one that is, to whoever finds it after a crash.  It inherits
    no lock but the descriptors *pass_fds*.  To be called where there is one thread.  Raises OSError
    or ValueError where it cannot be started.
    """
    program = argv[0] if os.sep in argv[0] else which(argv[0], env)
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])

    def begin() -> None:  # in the child, which execs with the variables that it has then
        os.environ.clear()
        os.environ.update({**env, session: str(os.getpid())})

    try:
        return _spawn_piped(
            argv,
            None,
            cwd,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            program=program,
            begin=begin,
        )
    except subprocess.SubprocessError as exc:  # a NUL in a value, or "=" in a name
        raise ValueError("its environment cannot be passed on") from exc


def spawn_client(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: str, lock: int
) -> subprocess.Popen[bytes]:
    """
    Start the client in a session of its own, both outputs piped to the caller.

    It inherits *lock*, and every descendant does that does not close it.
    """
    return _spawn_piped(argv, env, cwd, stderr=subprocess.PIPE, pass_fds=(lock,))


def spawn_part(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """
    Start a program as a part of a client that is ours, both outputs piped to the caller.

    In the caller's session, where the client's stop reaches it, and with lock C inherited.
    """
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        close_fds=False,  # what was not made to be inherited is close-on-exec (PEP 446)
    )


def _spawn_piped(
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    cwd: str,
    *,
    stderr: int,
    pass_fds: Sequence[int],
    program: str | None = None,
    begin: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        executable=program,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=begin,
    )


def run_bounded(
    argv: Sequence[str], *, env: Mapping[str, str], stdin: str, timeout_s: float
) -> Completed:
    """
    Run a program that may hang, and may say more than we keep; return the end of what it said.

    After *timeout_s* seconds it is killed with its session, and EffectError is raised; also for
    one that cannot be started.  Unlike `run`, it ends with the program: it does not wait, within
    the limit either, for descendants that hold its outputs open.
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
            _kill(child)
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

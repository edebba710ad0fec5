"""Programs are started in one place: words kept apart, nothing inherited, always waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import locks, process
from atomtx.errors import EffectError, Interrupted
from atomtx.process import Completed, abridged, run, which

PATIENCE_S = 60.0
ENGINE = str(Path(process.__file__).parents[1])
SHOW = "import os, sys; sys.stdout.buffer.write(b'|'.join(map(os.fsencode, sys.argv[1:])))"


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *args]


def is_alive(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    "words",
    [
        ("with space", "two\nlines", "", "tab\t", "'quoted'", '"$HOME"', "$(reboot)", "*"),
        ("-x", "--", ";", "&&", "\\", "\r", "ä"),
    ],
)
def test_words(words: tuple[str, ...]) -> None:
    """An argument arrives as it was given: no shell is between."""
    done = run(python(SHOW, *words))
    assert done.ok
    expected = "|".join(words).replace("\r", "\n")  # of text read back, not of the argument
    assert done.stdout == expected


@given(st.lists(st.text(st.characters(blacklist_characters="\0", codec="utf-8"), max_size=8)))
def test_any_words_can_be_pasted(words: list[str]) -> None:
    """A command in a message is the command: a shell would read the same words from it."""
    import shlex

    assert shlex.split(abridged(words, limit=10**6)) == words


def test_bytes_that_are_no_text() -> None:
    """A path that is not UTF-8 goes through, there and back."""
    name = os.fsdecode(b"caf\xe9\xff")
    assert os.fsencode(run(python(SHOW, name)).stdout) == b"caf\xe9\xff"


def test_standard_input() -> None:
    """Standard input is at its end: no program waits for a password that nobody types."""
    code = "from atomtx import process; print(process.run(['cat'], timeout_s=60))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(python(code), env=env, input="typed\n", capture_output=True, text=True)
    assert done.stdout == "Completed(argv=('cat',), status=0, stdout='', stderr='')\n"
    assert run(["cat"], stdin="given\n").stdout == "given\n"


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program sees a small environment of ours, in which messages are not translated."""
    monkeypatch.setenv("PATH", "/own/bin")
    lines = run(["env"]).stdout.splitlines()
    path = process.BASE_ENVIRONMENT["PATH"] + ":/own/bin"
    assert dict(line.split("=", 1) for line in lines) == {**process.BASE_ENVIRONMENT, "PATH": path}
    assert "LC_ALL=C.UTF-8" in lines
    assert run(["env"], env={"A": "b c"}).stdout == "A=b c\n"


def test_directory(tmp_path: Path) -> None:
    """A program runs where it is told to."""
    assert run(["pwd"], cwd=str(tmp_path)).stdout == f"{tmp_path}\n"


def test_descriptors(tmp_path: Path) -> None:
    """A program inherits the descriptors that it is given, and no other."""
    lock = tmp_path / "lock"
    lock.touch()
    given, kept = os.open(lock, os.O_RDWR), os.open(lock, os.O_RDWR)
    code = "import os; print([os.path.exists(f'/proc/self/fd/{n}') for n in map(int, argv)])"
    done = run(python(f"import sys; argv = sys.argv[1:]; {code}", str(given), str(kept)))
    assert done.stdout == "[False, False]\n"
    done = run(
        python(f"import sys; argv = sys.argv[1:]; {code}", str(given), str(kept)), pass_fds=[given]
    )
    assert done.stdout == "[True, False]\n"
    os.close(given)
    os.close(kept)


def test_failure() -> None:
    """How a program failed is told in its own words, with the command to be pasted."""
    done = run(["sh", "-c", "echo first >&2; echo 'no space' >&2; echo >&2; exit 3", "x y"])
    assert not done.ok
    assert done.status == 3
    assert done.last_line() == "no space"
    error = done.error("cannot do it")
    assert error.message == "cannot do it: first; no space"
    assert error.hint is not None
    assert error.hint.endswith("exit 3' 'x y'")
    assert done.error("cannot", hint="do this").hint == "do this"


def test_silent_failure() -> None:
    """A program that says nothing is told by its exit status."""
    done = run(["false"])
    assert done.last_line() == "exit status 1"
    assert done.error("cannot").message == "cannot: exit status 1"


def test_killed() -> None:
    """A program that was ended by a signal has minus the signal's number as its status."""
    assert run(["sh", "-c", "kill -9 $$"]).status == -signal.SIGKILL


def test_missing_program() -> None:
    """A program that is not there is an error with a hint."""
    with pytest.raises(EffectError, match="no-such-program is not installed") as caught:
        run(["no-such-program"])
    assert "atomtx doctor" in (caught.value.hint or "")


def test_missing_directory(tmp_path: Path) -> None:
    """A directory that is not there is not taken for a program that is not."""
    with pytest.raises(EffectError, match=r"cannot start true in .*/absent"):
        run(["true"], cwd=str(tmp_path / "absent"))


def test_not_a_program(tmp_path: Path) -> None:
    """A file that cannot be executed is an error that names it."""
    file = tmp_path / "file"
    file.write_text("words")
    with pytest.raises(EffectError, match=r"cannot start .*/file: Permission denied"):
        run([str(file)])


def test_timeout(tmp_path: Path) -> None:
    """A program that does not answer in its time is killed, and all of its session with it."""
    pids = tmp_path / "pids"
    script = 'sleep 1000 & echo $! >"$0.new"; echo $$ >>"$0.new"; mv "$0.new" "$0"; wait'
    # Long enough for a slow machine to write the file.
    with pytest.raises(EffectError, match="sh did not answer within"):
        run(["sh", "-c", script, str(pids)], timeout_s=2.0)
    child, shell = map(int, pids.read_text().split())
    assert locks.wait_until(lambda: not is_alive(child), PATIENCE_S)
    assert not is_alive(shell)


def test_signal_while_it_does_not_answer(tmp_path: Path) -> None:
    """One that has a limit is killed where a signal is heard before; what it says is not lost."""
    pid = tmp_path / "pid"

    def check() -> None:
        if pid.exists():
            raise Interrupted(signal.SIGTERM)

    script = 'echo $$ >"$0.new"; mv "$0.new" "$0"; exec sleep 1000'
    with pytest.raises(Interrupted):
        run(["sh", "-c", script, str(pid)], timeout_s=PATIENCE_S, check=check)
    assert not is_alive(int(pid.read_text()))
    pid.unlink()
    script = "echo a; sleep 1.2; echo b"
    assert run(["sh", "-c", script], timeout_s=PATIENCE_S, check=check).stdout == "a\nb\n"


def test_timeout_of_a_daemon(tmp_path: Path) -> None:
    """What has left the session of a program that hangs may hold its outputs: it is left."""
    pid = tmp_path / "pid"
    daemon = 'echo $$ >"$0.new"; mv "$0.new" "$0"; exec sleep 60'
    script = 'setsid sh -c "$1" "$0" & sleep 1000'
    with pytest.raises(EffectError, match="sh did not answer within"):
        run(["sh", "-c", script, str(pid), daemon], stdin="x" * 1_000_000, timeout_s=2.0)
    left = int(pid.read_text())
    assert is_alive(left)  # else it was waited for
    os.kill(left, signal.SIGKILL)


def test_waited_for(tmp_path: Path) -> None:
    """No program is left behind as a zombie, neither one that ended nor one that was killed."""
    script = 'echo $$ >"$0.new"; mv "$0.new" "$0"; exec sleep "$1"'
    assert run(["sh", "-c", script, str(tmp_path / "ended"), "0"]).ok
    with pytest.raises(EffectError):
        run(["sh", "-c", script, str(tmp_path / "killed"), "1000"], timeout_s=2.0)
    for name in ("ended", "killed"):
        pid = int((tmp_path / name).read_text())
        assert locks.command_of(pid) is None


def test_output_that_fills_both_pipes() -> None:
    """Much output on both pipes does not stop a program for ever."""
    code = """
        import sys
        for _ in range(500):
            sys.stdout.write("o" * 1000)
            sys.stderr.write("e" * 1000)
    """
    done = run(python(code), timeout_s=PATIENCE_S)
    assert (len(done.stdout), len(done.stderr)) == (500_000, 500_000)


_FRONT = """
    import signal, sys
    from atomtx import process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    code += "print('ready', file=open(r'%s', 'w'), flush=True); time.sleep(0.5)" % sys.argv[1]
    print(process.run([sys.executable, "-c", code]).status)
"""


def test_no_interrupt(tmp_path: Path) -> None:
    """
    A Ctrl-C on the terminal reaches atomtx alone, never the command that it runs.

    The terminal sends it to the whole group of the foreground; each command has its own.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = python(_FRONT, str(fifo))
    with subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as front:
        assert fifo.read_text() == "ready\n"
        os.killpg(front.pid, signal.SIGINT)
        assert front.communicate()[0] == "0\n"


def test_session() -> None:
    """Each program is in a session of its own."""
    done = run(python("import os; print(os.getsid(0) == os.getpid(), os.getppid())"))
    assert done.stdout == f"True {os.getpid()}\n"


def test_abridged() -> None:
    """A long command is cut in its middle: how it begins and how it ends can be seen."""
    text = abridged(["zfs", "snapshot", *(f"tank/a{n}@x" for n in range(1000))], limit=60)
    assert text.startswith("zfs snapshot tank/a0@x")
    assert text.endswith("tank/a999@x")
    assert len(text) <= 60


def test_which(tmp_path: Path) -> None:
    """A program is looked for on the PATH of the environment that it will run in."""
    program = tmp_path / "client"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert which("client", {"PATH": str(tmp_path)}) == str(program)
    assert which("client", {"PATH": "/nowhere"}) is None
    assert which("sh", {"HOME": "/root"}) is not None


def test_which_of_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cron's PATH has no /usr/sbin (crontab(5)): what will be found there is found."""
    program = tmp_path / "zpool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setitem(process.BASE_ENVIRONMENT, "PATH", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert which("zpool") == str(program)


def test_completed() -> None:
    """What a program said is a plain value."""
    assert Completed(("a",), 0, "", "").ok
    assert not Completed(("a",), 1, "", "").ok


def test_run_to_end() -> None:
    """What must not die half-way says all that it has to say, however much, and its status."""
    code = "import sys; print('x' * 300_000); sys.stderr.write('why\\n'); sys.exit(5)"
    done = process.run_to_end(python(code), env={"WORD": "1"})
    assert (done.status, len(done.stdout), done.stderr) == (5, 300_001, "why\n")
    with pytest.raises(EffectError, match="absent is not installed"):
        process.run_to_end(["/absent"])


@pytest.mark.parametrize("how", ["run_to_end", "run"])
def test_outlives_us(tmp_path: Path, how: str) -> None:
    """
    Killed, we take nothing with us that must run to its end: not by a signal, nor by a pipe.

    The program writes after our death.  One whose output is a pipe dies of that: the other case.
    """
    child = """
        import os, signal, sys, time
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        open(sys.argv[1] + "/started", "w").close()
        while not os.path.exists(sys.argv[1] + "/killed"):
            time.sleep(0.02)
        os.write(1, b"going on")
        open(sys.argv[1] + "/ended", "w").close()
    """
    front = f"""
        from atomtx import process
        process.{how}({python(child, str(tmp_path))!r})
    """
    with subprocess.Popen(python(front), env={**os.environ, "PYTHONPATH": ENGINE}) as parent:
        assert locks.wait_until((tmp_path / "started").exists, PATIENCE_S)
        parent.kill()
    (tmp_path / "killed").touch()
    if how == "run_to_end":
        assert locks.wait_until((tmp_path / "ended").exists, PATIENCE_S)
    else:
        assert not locks.wait_until((tmp_path / "ended").exists, 1)


def test_lock_as_standard_input(tmp_path: Path) -> None:
    """The lock that a program gets is its standard input: it holds it, and reads nothing there."""
    path = tmp_path / "front.lock"
    path.touch()
    lock = locks.try_acquire(path)
    assert lock is not None
    code = """
        import os, sys
        print(os.read(0, 10), os.fstat(0).st_ino, os.getsid(0) == os.getpid())
    """
    done = process.run_to_end(python(code), lock=lock)
    os.close(lock)
    assert done.stdout == f"b'' {path.stat().st_ino} True\n"


def test_runners_encoding(tmp_path: Path) -> None:
    """The runner takes names as UTF-8, whatever the locale and its variables say."""
    package = tmp_path / "atomtx"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "runner.py").write_text(
        "import os, sys\nos.write(int(sys.argv[1]), sys.getfilesystemencoding().encode())\n"
    )
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    reading, writing = os.pipe()
    with open(reading) as said, open(os.devnull, "w") as null:
        pid = process.spawn_runner(
            control=writing,
            front=null.fileno(),
            stderr=null.fileno(),
            env={**os.environ, **variables, "PYTHONPATH": str(tmp_path)},
        )
        os.close(writing)
        assert said.read() == "utf-8"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_hook_knows_its_session() -> None:
    """The number of its session is in its environment, and nothing of ours but what was given."""
    env = {"PATH": os.environ["PATH"], "A": "b"}
    child = process.spawn_hook(("env",), env=env, cwd="/", session="SESSION")
    said, _ = child.communicate()
    found = dict(line.split("=", 1) for line in said.decode().splitlines())
    of_readline = {"LINES", "COLUMNS"}  # which it sets for programs, where pytest has loaded it
    mine = {name: value for name, value in found.items() if name not in of_readline}
    assert mine == {**env, "SESSION": str(child.pid)}


@pytest.mark.parametrize("env", [{"A": "b\0"}, {"A=B": "c"}, {"": "c"}])
def test_hook_whose_environment_cannot_be(env: dict[str, str]) -> None:
    """What no program can be given is one error, in this process."""
    with pytest.raises(ValueError, match="its environment cannot be passed on"):
        process.spawn_hook(("env",), env=env, cwd="/", session="SESSION")


def test_hook_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        process.spawn_hook(("no-such-program",), env={"PATH": "/bin"}, cwd="/", session="SESSION")

"""The command line as a whole: help, errors, exit statuses, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import atomtx
from atomtx import __version__, cli, clients, journalfile, plan, process
from atomtx.errors import AtomtxError, ExitStatus, UserError
from tests.cli.conftest import Run, State
from tests.journals import T0, a_run

SLOW = ("sqlalchemy", "alembic", "transitions", "rich", "asyncio", "sqlite3")
_LOADED = f"""
import sys
from atomtx.cli import main
try:
    main()
finally:
    print([name for name in {SLOW} if name in sys.modules], file=sys.stderr)
"""


def loaded(env: dict[str, str], *args: str) -> list[str]:
    """Return which of the slow modules a command imports."""
    argv = [sys.executable, "-c", _LOADED, *args]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    found: list[str] = json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"'))
    return found


# -- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_static_help(name: str) -> None:
    """The short help that is printed without importing a command is the command's own."""
    _, short = cli.COMMANDS[name]
    command = cli.LazyGroup().get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(limit=200) == short


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_complete(name: str) -> None:
    """Each command's help says what it changes, gives an example and lists its exit statuses."""
    command = cli.LazyGroup().get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.help is not None
    assert "EXIT STATUS" in command.help
    assert "Example" in command.help


def test_help(atomtx_: Run) -> None:
    """`--help` names every command."""
    done = atomtx_("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)


def test_version(atomtx_: Run) -> None:
    """`--version` prints the version."""
    assert atomtx_("--version").stdout == f"atomtx {__version__}\n"


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("history", "--help")])
def test_help_imports(env: dict[str, str], args: tuple[str, ...]) -> None:
    """`--help` and `--version` import none of the modules that start slowly."""
    assert set(loaded(env, *args)) <= ({"sqlite3"} if "history" in args else set())


def test_completion_imports(env: dict[str, str]) -> None:
    """Shell completion imports none of the modules that start slowly."""
    words = {"_ATOMTX_COMPLETE": "bash_complete", "COMP_WORDS": "atomtx hi", "COMP_CWORD": "1"}
    assert loaded({**env, **words}) == []


@pytest.mark.parametrize("args", [("history",), ("history", "--json"), ("status",)])
def test_read_imports(state: State, args: tuple[str, ...]) -> None:
    """`history` and `status` read the journal with the standard library alone."""
    state.add_run(a_run(1, state="mounted", outcome=None))
    assert loaded(state.env, *args) == ["sqlite3"]


def test_completion(env: dict[str, str], atomtx_: Run) -> None:
    """The shell completes the names of the commands."""
    words = {"_ATOMTX_COMPLETE": "bash_complete", "COMP_WORDS": "atomtx s", "COMP_CWORD": "1"}
    done = atomtx_(env={**env, **words})
    assert done.stdout.split() == ["plain,show", "plain,status", "plain,stop"]


def test_map() -> None:
    """The package's docstring, the map for a newcomer, names every module."""
    package = Path(str(cli.__file__)).parent.parent
    there = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    named = {line.split()[0] for line in (atomtx.__doc__ or "").splitlines() if line[:4] == " " * 4}
    assert there | folders == named


# -- errors ------------------------------------------------------------------------------------


def test_usage_error(atomtx_: Run) -> None:
    """A wrong option is one line, what to do next, and status 2."""
    done = atomtx_("history", "--bogus")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "atomtx: No such option '--bogus'.",
        "  see `atomtx history --help`",
    ]


def test_unknown_command(atomtx_: Run) -> None:
    """An unknown command is a usage error."""
    done = atomtx_("frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr


def test_error_lines(atomtx_: Run) -> None:
    """An error is one line with our name, and one with what to do next."""
    done = atomtx_("show", "7f3c")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "atomtx: no run has an id that begins with '7f3c'",
        "  `atomtx history` lists the runs",
    ]


@pytest.mark.parametrize("args", [("show", "--json", "7f3c"), ("history", "--json", "--bogus")])
def test_json_error(atomtx_: Run, args: tuple[str, ...]) -> None:
    """Under `--json` an error is one JSON object on standard error."""
    done = atomtx_(*args)
    error = json.loads(done.stderr)
    assert set(error) == {"message_type", "message", "hint", "exit_status"}
    assert error["message_type"] == "error"
    assert error["exit_status"] == done.returncode == 2


@pytest.mark.parametrize(
    ("words", "answer"),
    [(["history", "--json"], True), (["backup", "a", "--", "--json"], False), ([], False)],
)
def test_whose_json(words: list[str], answer: bool) -> None:
    """A `--json` after `--` is the client's."""
    assert cli.wants_json(words) is answer


def _failing(monkeypatch: pytest.MonkeyPatch, exc: BaseException) -> None:
    def callback(**_: Any) -> None:
        raise exc

    command = cli.LazyGroup().get_command(click.Context(cli.cli), "history")
    assert command is not None
    monkeypatch.setattr(command, "callback", callback)


@pytest.mark.parametrize("exc", [AtomtxError("x"), UserError("x")])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, exc: AtomtxError) -> None:
    """The class of an error decides the exit status."""
    _failing(monkeypatch, exc)
    assert cli.run(["history"]) == exc.exit_status


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a command that holds nothing is status 130 and no traceback."""
    _failing(monkeypatch, KeyboardInterrupt())
    assert cli.run(["history"]) == ExitStatus.SIGINT


def test_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is not made to look like an error of the user's: it shows its traceback."""
    _failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.run(["history"])


def test_other_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken pipe that is not standard output's is a bug, not a quiet end."""
    _failing(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    with pytest.raises(RuntimeError, match="broken pipe"):
        cli.run(["history"])


@pytest.mark.parametrize("args", [("history", "--json"), ("--help",)])
def test_closed_pipe(state: State, atomtx_: Run, args: tuple[str, ...]) -> None:
    """A reader that went away ends the program without a word."""
    state.add_run(a_run(1))
    read, write = os.pipe()
    os.close(read)
    done = atomtx_(*args, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode != 0


def test_full_stdout(atomtx_: Run) -> None:
    """Standard output on a full disk is one clear line."""
    with open("/dev/full", "w") as full:
        done = atomtx_("history", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert "cannot write to standard output: No space left on device" in done.stderr


def test_closed_stdout(state: State, env: dict[str, str]) -> None:
    """With standard output closed the program does its work and ends well."""
    command = process.abridged([sys.executable, "-m", "atomtx", "history"])
    done = subprocess.run(
        ["sh", "-c", f"{command} >&-"], env=env, check=False, stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_ascii_locale(state: State, atomtx_: Run) -> None:
    """A name that the locale cannot show is no traceback."""
    state.add_run(a_run(1, label="données"))
    env = {**state.env, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = atomtx_("history", env={**env, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "donn\\xe9es" in done.stdout


# -- history and show --------------------------------------------------------------------------


def test_history_empty(atomtx_: Run, tmp_path: Path) -> None:
    """Before the first backup the history is empty, and looking makes no state directory."""
    done = atomtx_("history")
    assert (done.returncode, done.stdout) == (0, "no run to show\n")
    assert json.loads(atomtx_("history", "--json").stdout) == []
    assert not (tmp_path / "state").exists()


def test_history_table(state: State, atomtx_: Run) -> None:
    """A line a run: job, state, outcome, duration, bytes added, backup, the run's short id."""
    state.add_run(a_run(1, id="7f3c000000000001", bytes_added=2048))
    for n in (0, 1):
        row = {"run": "7f3c000000000001", "n": n, "path": "/a", "outcome": "completed"}
        state.journal.add("backups", backup_id=f"0123456789abcdef{n}", **row)
    lines = atomtx_("history").stdout.splitlines()
    assert lines[0].split()[:4] == ["AGE", "STARTED", "JOB", "STATE"]
    words = ("home", "destroyed", "completed", "0.5 s", "2.0 KiB", "01234567 +1", "7f3c0000")
    assert all(word in lines[1] for word in words)


def test_history_open(state: State, atomtx_: Run) -> None:
    """A run that nobody is at work on is called interrupted; a parked one keeps its outcome."""
    state.add_run(a_run(1, state="mounted", outcome=None))
    state.add_run(a_run(2, state="unmounting", cleanup="parked"))
    lines = atomtx_("history").stdout.splitlines()
    assert "completed, parked" in lines[1]
    assert "interrupted" in lines[2]


def test_history_limit(state: State, atomtx_: Run) -> None:
    """`--limit` shows the newest runs, 0 all, 20 where it is not given."""
    for number in range(25):
        state.journal.add("runs", **a_run(number))
    assert len(json.loads(atomtx_("history", "--json").stdout)) == 20
    assert len(json.loads(atomtx_("history", "--json", "--limit", "3").stdout)) == 3
    assert len(json.loads(atomtx_("history", "--json", "--limit", "0").stdout)) == 25


def test_history_failed(state: State, atomtx_: Run) -> None:
    """`--failed --json` is a list of the failed runs with every fact."""
    state.add_run(a_run(1))
    state.add_run(a_run(2, outcome="failed", reason="no network"))
    (run,) = json.loads(atomtx_("history", "--failed", "--json").stdout)
    assert (run["outcome"], run["reason"], run["duration_s"]) == ("failed", "no network", 0.5)


@pytest.mark.parametrize("command", ["history", "status", "show 1", "attach 1", "stop 1"])
def test_newer_journal(state: State, atomtx_: Run, command: str) -> None:
    """A journal of a newer release is refused by every command that reads it, with status 2."""
    state.journal.set_version(journalfile.SCHEMA_VERSION + 1)
    done = atomtx_(*command.split())
    assert done.returncode == 2
    assert "newer atomtx" in done.stderr


class _Fake:
    """A client that shows what it was asked for."""

    def restore_command(
        self, settings: clients.Settings, backup: clients.Backup, to: str
    ) -> tuple[str, ...]:
        return ("restic", "restore", f"{backup.backup_id}:{backup.paths[0]}", "--target", to)


@pytest.fixture
def shown(state: State, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A whole run with a backup; `show` with arguments returns what it prints."""
    monkeypatch.setenv("ATOMTX_STATE_DIR", str(state.path))
    monkeypatch.setattr(clients, "load", lambda name: _Fake())
    run = f"{1:016x}"
    environment = (("HOME", "/root"), ("RESTIC_REPOSITORY", "/srv/my repo"))
    settled = plan.ClientPlan(
        "restic", (), (), "/root", "0.18.0", "abc", environment, ("RESTIC_PASSWORD",)
    )
    whole = plan.Plan(run, "j", "home", (), ("/a",), "namespace", "", (), (), (), settled)
    folder = state.add_run(a_run(1, plan=plan.to_json(whole), moment_at=T0))
    folder.log.write_text("".join(f"line {n}\x1b[2J\n" for n in range(100)))
    row = {"run": run, "n": 0, "path": "/a b", "outcome": "completed", "backup_id": "beef"}
    state.journal.add("backups", **row)
    payload = '{"client": "restic"}'
    times = {"intended_at": T0, "ended_at": T0, "outcome": "done"}
    state.journal.add("steps", run=run, attempt=0, kind="end-client", payload=payload, **times)
    return _show


def _show(*args: str) -> str:
    from click.testing import CliRunner

    result = CliRunner().invoke(cli.cli, ["show", "0000", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stdout


def test_show(shown: Callable[..., str]) -> None:
    """`show` tells the steps in words, and the command that restores, ready to be pasted."""
    page = shown("--to", "/tmp/x")
    assert "end restic and all that it started" in page
    command = "env 'RESTIC_REPOSITORY=/srv/my repo' restic restore 'beef:/a b' --target /tmp/x"
    assert command in page
    assert "it needs RESTIC_PASSWORD" in page


def test_show_log(shown: Callable[..., str]) -> None:
    """`show` prints the end of the client's log, `--log` all of it; neither drives a terminal."""
    page = shown()
    assert "line 99" in page
    assert "line 1?" not in page
    assert "\x1b" not in page
    assert "line 1?" in shown("--log")


def test_show_json(shown: Callable[..., str]) -> None:
    """`show --json` is one object with everything."""
    data = json.loads(shown("--json"))
    assert set(data) == {"run", "plan", "volumes", "steps", "moves", "backups", "log", "hooks_log"}
    assert data["backups"][0]["restore"]["argv"][0] == "restic"
    assert data["steps"][0]["description"] == "end restic and all that it started"


def test_doctor(env: dict[str, str], atomtx_: Run) -> None:
    """`doctor` says what is missing, in words and as JSON, and exits 1 if something is."""
    lines = atomtx_("doctor")
    done = atomtx_("doctor", "--json")
    data = json.loads(done.stdout)
    names = {check["name"] for check in data["checks"]}
    assert {"python", "sqlite", "zfs", "user", "mount namespace", "journal"} <= names
    assert lines.returncode == done.returncode == (0 if data["ok"] else 1)
    assert "docker" in lines.stdout

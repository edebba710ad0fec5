"""The command line as a whole: help, errors, exit statuses, start-up."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import atomtx
from atomtx import __version__, cli, clients, journalfile, plan, process, retention
from atomtx.clients.dumps import MARK, Destination
from atomtx.config_kinds import keys
from atomtx.config_schema import Job
from atomtx.errors import AtomtxError, ExitStatus, UserError
from tests.cli.conftest import Run, State
from tests.dumps import ID, make_chain
from tests.journals import T0, a_run
from tests.runs import RUN

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
    assert done.stdout.split() == [
        "plain,snap",
        "plain,show",
        "plain,status",
        "plain,stop",
        "plain,sure",
    ]


PACKAGE = Path(str(cli.__file__)).parent.parent
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py") if not path.name.startswith("__")}


def layout() -> dict[str, str]:
    """Return what the layout in docs/design.md says of each file and folder of the package."""
    page = (Path(__file__).parents[2] / "docs/design.md").read_text()
    block = (
        page.partition("\n## 12. Layout\n")[2]
        .partition("```text\n")[2]
        .partition("\nmigrations/")[0]
    )
    entries = re.split(r"\n  (?=\S)", block)[1:]
    return {name: words for name, _, words in (entry.partition(" ") for entry in entries)}


def test_map() -> None:
    """The package's docstring, the map for a newcomer, names every module; so does the design."""
    there = modules(PACKAGE) | {f"{name}/" for name in FOLDERS}
    named = {line.split()[0] for line in (atomtx.__doc__ or "").splitlines() if line[:4] == " " * 4}
    assert named == there
    assert set(layout()) - {"__init__.py"} == there


@pytest.mark.parametrize("folder", FOLDERS)
def test_map_of_folder(folder: str) -> None:
    """The layout in the design names every file of a folder, but for those of the commands."""
    commands = {
        f"{module.partition(':')[0].rpartition('.')[2]}.py" for module, _ in cli.COMMANDS.values()
    }
    there = modules(PACKAGE / folder) - (commands if folder == "cli" else set())
    assert set(re.findall(r"\w+\.py", layout()[f"{folder}/"])) == there


# -- the README --------------------------------------------------------------------------------

README = (Path(__file__).parents[2] / "README.md").read_text()


def leaves(group: click.Group, *path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield each command that does something, with the words that it is called by."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, *path, name)
        else:
            yield " ".join((*path, name)), command


# What takes an empty text all the same, besides a job's keys; and what becomes of it.
EMPTY = {
    "names": "it is refused as the name of a volume, or is a job that never ran",
    "options": "no more options for the client",
    "ignore": "nothing is left out",
    "max_age": "it is refused as a time",
    "warn_age": "it is refused as a time",
    **dict.fromkeys((o.replace("-", "_") for o in retention.OPTIONS), "it is refused as a rule"),
    "file": "it is refused as what is there",
}


def test_empty() -> None:
    """What a variable that is not set stands for is refused: it is never taken for nothing."""
    taken = {
        (name, param.name)
        for name, command in leaves(cli.cli)
        for param in command.params
        if isinstance(param.type, click.types.StringParamType | click.Path)
        and not _refuses_empty(param)
    }
    of_jobs = {each.name for each in keys(Job).values()}  # tests/unit/test_config.py
    assert {(of, name) for of, name in taken if name not in EMPTY.keys() | of_jobs} == set()
    assert ("install", "names") not in taken


def _refuses_empty(param: click.Parameter) -> bool:
    try:
        param.type.convert("", param, None)
    except click.BadParameter:
        return True
    return False


def test_readme_json() -> None:
    """The README names each command that has no `--json`."""
    sentence = re.search(r"`--json` but for (.*?), which prints", README, re.DOTALL)
    assert sentence is not None
    without = {
        name
        for name, command in leaves(cli.cli)
        if all("--json" not in param.opts for param in command.params)
    }
    assert set(re.findall(r"`(.*?)`", sentence[1])) == without


def test_readme_names() -> None:
    """The README's table says as the help does what a command may be of."""
    shown = [
        f"| `atomtx {name} {param.metavar}"
        for name, command in leaves(cli.cli)
        for param in command.params
        if " " not in name and (param.metavar or "").startswith("[JOB")
    ]
    assert len(shown) > 4
    assert [each for each in shown if each not in README.replace("\\|", "|")] == []


def test_readme_secrets() -> None:
    """What the first backup reads of a password is made by a line before."""
    page = README.partition("## First backup")[2].partition("\n## ")[0]
    files = set(re.findall(r"/root/[\w-]+", page))
    assert len(files) == 2
    assert [file for file in files if page.find(f">{file})") != page.index(file) - 1] == []


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


@pytest.mark.parametrize("words", [(), ("sure",), ("config",), ("journal",)], ids=" ".join)
def test_no_command(atomtx_: Run, words: tuple[str, ...]) -> None:
    """Where a command is lacking the help is printed as help; the status is that of usage."""
    done = atomtx_(*words)
    assert done.returncode == 2
    assert done.stdout == atomtx_(*words, "--help").stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ("backup", "--command", "true", "/absent/dir"),
        ("backup", "--command", "true", "/", "--exclude", "/absent/dir"),
        ("snap", "/absent/dir"),
        ("clone", "/absent/dir", "--to", "tank/x"),
    ],
    ids=" ".join,
)
def test_absent_path(atomtx_: Run, words: tuple[str, ...]) -> None:
    """Of a path that is not there that is said, and not which file system it would be on."""
    done = atomtx_(*words, "--dry-run")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "atomtx: there is no /absent/dir",
        "  is what belongs there mounted?",
    ]


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


@pytest.mark.parametrize(
    "args", [("history", "--json"), ("--help",), ("--version",), ("history", "--help"), ()]
)
def test_closed_pipe(state: State, atomtx_: Run, args: tuple[str, ...]) -> None:
    """A reader that went away ends the program without a word."""
    state.add_run(a_run(1))
    read, write = os.pipe()
    os.close(read)
    done = atomtx_(*args, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_closed_stderr(tmp_path: Path, atomtx_: Run) -> None:
    """A reader of the errors that went away changes no exit status."""
    path = tmp_path / "atomtx.toml"
    path.write_text("[jobs.home]\n")
    read, write = os.pipe()
    os.close(read)
    words = ("config", "check", "--config", str(path))
    done = atomtx_(*words, capture_output=False, stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(("word", "hint"), [("restore", "show RUN"), ("list", "atomtx history")])
def test_elsewhere(atomtx_: Run, word: str, hint: str) -> None:
    """Who looks for a command that the client has is told where to look."""
    done = atomtx_(word, "last")
    assert done.returncode == 2
    assert done.stderr.startswith(f"atomtx: there is no command {word}\n")
    assert hint in done.stderr


@pytest.mark.parametrize(
    "words", ["history", "--help", "--version", "backup --help", "journal check --help"]
)
def test_full_stdout(atomtx_: Run, words: str) -> None:
    """Standard output on a full disk is one clear line."""
    with open("/dev/full", "w") as full:
        done = atomtx_(*words.split(), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "atomtx: cannot write to standard output: No space left on device\n"


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


_INHERITS = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
from atomtx import cli, process
try:
    cli.main(["--version"])
finally:
    print(process.run(["sh", "-c", "exit 9"]).status)
    print(process.run(["grep", "SigBlk", "/proc/self/status"]).stdout)
    print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_inherited_signals(env: dict[str, str]) -> None:
    """Whoever starts us may ignore SIGCHLD, or block signals: neither is so here, nor below."""
    argv = [sys.executable, "-c", _INHERITS]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[2:] == ["9", "SigBlk:", "0" * 16, "set()"]


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
        self, settings: clients.Settings, facts: clients.Facts, backup: clients.Backup, to: str
    ) -> tuple[str, ...]:
        return ("restic", "restore", f"{backup.backup_id}:{backup.paths[0]}", "--target", to)


OF_THE_RUN = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": os.environ["PATH"],
    "RCLONE_CONFIG": "/etc/rclone.conf",
    "https_proxy": "http://proxy:3128",
}


@pytest.fixture
def shown(state: State, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A whole run with a backup; `show` with arguments returns what it prints."""
    monkeypatch.setenv("ATOMTX_STATE_DIR", str(state.path))
    monkeypatch.setattr(clients, "load", lambda name: _Fake())
    for name, value in OF_THE_RUN.items():
        monkeypatch.setenv(name, value)
    run = f"{1:016x}"
    environment = (*OF_THE_RUN.items(), ("RESTIC_REPOSITORY", "/srv/my repo"))
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


def test_show_in_another_shell(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What leads the client to its repository is there, where this shell has it otherwise."""
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("PATH", f"/opt/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.delenv("RCLONE_CONFIG")
    monkeypatch.delenv("https_proxy")
    (command,) = (line for line in shown("--to", "/tmp/x").splitlines() if "restic restore" in line)
    assert shlex.split(command) == [
        "env",
        "HOME=/root",
        "RCLONE_CONFIG=/etc/rclone.conf",
        "https_proxy=http://proxy:3128",
        "RESTIC_REPOSITORY=/srv/my repo",
        *("restic", "restore", "beef:/a b", "--target", "/tmp/x"),
    ]


def test_show_of_no_id(state: State, shown: Callable[..., str]) -> None:
    """A backup that has no id is restored as the latest of its paths: that is said."""
    assert "latest" not in shown()
    row = {"run": f"{1:016x}", "n": 1, "path": "/c", "outcome": "completed", "backup_id": None}
    state.journal.add("backups", **row)
    page = shown()
    assert page.index("(no id)  completed") < page.index("the latest that has its paths")


@pytest.mark.parametrize("word", ["last", "latest"])
def test_last(state: State, atomtx_: Run, word: str) -> None:
    """What only reads a run takes the newest by a word; what changes one does not."""
    for number, outcome in enumerate(["completed", "partial", "failed"], start=1):
        state.add_run(a_run(number, outcome=outcome))
    assert json.loads(atomtx_("show", word, "--json").stdout)["run"]["outcome"] == "failed"
    assert f"run {3:016x}: failed" in atomtx_("attach", word).stderr
    assert f"the plan of run {2:016x}" in atomtx_("sure", "verify-backup", word).stderr
    assert "is not a run id" in atomtx_("stop", word).stderr


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


def test_show_dumps(state: State, atomtx_: Run, tmp_path: Path) -> None:
    """
    `show` of xfsdump prints the chain in order and what it reads; `--check` finds damage.

    xfsrestore says SUCCESS of a dump that was cut short.
    """
    store = Destination(str(tmp_path / "my dumps"))
    made = make_chain(store)
    settled = plan.ClientPlan(
        "xfsdump", (), ("--destination", str(store.path)), "/", "3.1.11", ID, (), ()
    )
    whole = plan.Plan(RUN, "j", "home", (), ("/home",), "namespace", "", (), (), (), settled)
    state.add_run(a_run(1, plan=plan.to_json(whole), client="xfsdump"))
    row = {"path": "/home", "outcome": "completed", "backup_id": made[-1].name}
    state.journal.add("backups", run=f"{1:016x}", n=0, **row)

    done = atomtx_("show", "0000", "--to", "/r", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    told = [line.strip() for line in done.stdout.splitlines()]
    first = told.index("mkdir -p /r/home")
    assert told[first + 1 : first + 4] == [
        f"xfsrestore -F -J -r -f '{store.path / dump.name}/dump' /r/home" for dump in made
    ]
    assert all(any(dump.sha256 in line for line in told) for dump in made)
    assert told[-1] == "each dump is what was written"

    (store.path / made[0].name / "dump").write_text("cut")
    done = atomtx_("show", "0000", "--check", "--json")
    assert done.returncode == 1
    (damage,) = json.loads(done.stdout)["damage"]
    assert "has 3 bytes, and was written with" in damage
    assert atomtx_("show", "0000").returncode == 0

    (store.path / MARK).unlink()
    done = atomtx_("show", "0000")
    assert "no restore command" in done.stdout
    assert "is its disk mounted?" in done.stdout


def test_show_check_of_others(state: State, atomtx_: Run) -> None:
    """A client that checks its repository itself is named to whoever asks us."""
    settled = plan.ClientPlan("restic", (), (), "/", "0.18.0", "abc", (), ())
    whole = plan.Plan(RUN, "j", "home", (), ("/home",), "namespace", "", (), (), (), settled)
    state.add_run(a_run(1, plan=plan.to_json(whole)))
    done = atomtx_("show", "0000", "--check")
    assert done.returncode == 2
    assert "let restic check its repository itself" in done.stderr


def test_doctor(env: dict[str, str], atomtx_: Run) -> None:
    """`doctor` says what is missing, in words and as JSON, and exits 1 if something is."""
    lines = atomtx_("doctor")
    done = atomtx_("doctor", "--json")
    data = json.loads(done.stdout)
    names = {check["name"] for check in data["checks"]}
    assert {"python", "sqlite", "zfs", "user", "mount namespace", "journal"} <= names
    assert lines.returncode == done.returncode == (0 if data["ok"] else 1)
    assert "docker" in lines.stdout


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("restic", "restic 0.12.1 compiled with go1.16", ["warning", "restic 0.12.1 is too old"]),
        ("restic", "restic 0.18.1 compiled with go1.25", ["ok", "0.18.1"]),
        ("borg", "borg 2.0.0b19", ["warning", "borg 2.0.0b19 cannot be used"]),
        ("borg", "borg 1.4.1", ["ok", "1.4.1"]),
    ],
)
def test_doctor_of_a_client(
    env: dict[str, str], tmp_path: Path, atomtx_: Run, name: str, said: str, expected: list[str]
) -> None:
    """`doctor` says of a client that `backup` would refuse that it cannot be used."""
    program = tmp_path / "bin" / name
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    done = atomtx_("doctor", "--json", env={**env, "PATH": f"{program.parent}:{env['PATH']}"})
    checks = json.loads(done.stdout)["checks"]
    assert [[c["status"], c["detail"]] for c in checks if c["name"] == name] == [expected]


@pytest.mark.skipif(os.geteuid() != 0, reason="a user has no capability to lose")
def test_doctor_without_ptrace(env: dict[str, str]) -> None:
    """`doctor` warns where processes of other users cannot be seen, and says what that means."""
    argv = ("setpriv", "--bounding-set=-sys_ptrace", sys.executable, "-m", "atomtx", "doctor")
    done = subprocess.run((*argv, "--json"), env=env, capture_output=True, text=True, check=False)
    checks = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    found = checks["CAP_SYS_PTRACE"]
    assert (found["status"], found["detail"]) == ("warning", "not held")
    assert "cannot be seen" in found["hint"]
    assert checks["CAP_SYS_ADMIN"]["status"] == "ok"


def _state_check(done: subprocess.CompletedProcess[str]) -> tuple[str, str, str | None]:
    checks = json.loads(done.stdout)["checks"]
    (found,) = (each for each in checks if each["name"] == "state directory")
    return found["status"], found["detail"], found["hint"]


def test_doctor_of_a_state_directory(env: dict[str, str], atomtx_: Run) -> None:
    """`doctor` finds missing what the commands that write would refuse, and makes nothing."""
    path = Path(env["ATOMTX_STATE_DIR"])
    status, detail, _ = _state_check(atomtx_("doctor", "--json"))
    assert (status, detail) == ("note", f"{path} is not there; the first backup makes it")
    assert not path.exists()
    path.touch()
    done = atomtx_("doctor", "--json")
    assert done.returncode == 1
    status, detail, hint = _state_check(done)
    assert (status, detail) == (
        "missing",
        f"cannot use the state directory {path}: it is not a directory",
    )
    assert "ATOMTX_STATE_DIR" in (hint or "")


@pytest.mark.skipif(os.geteuid() != 0, reason="another owner needs root")
def test_doctor_of_a_foreign_state_directory(env: dict[str, str], atomtx_: Run) -> None:
    """`doctor` finds one missing that belongs to somebody else, and says what mends it."""
    path = Path(env["ATOMTX_STATE_DIR"])
    path.mkdir()
    os.chown(path, 65534, 65534)
    status, detail, hint = _state_check(atomtx_("doctor", "--json"))
    assert (status, detail) == (
        "missing",
        f"the state directory {path} belongs to user 65534, not to 0",
    )
    assert f"`chown root: {path}`" in (hint or "")


def _in_memory(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    """Run `atomtx` with its state directory on a tmpfs that nobody else sees."""
    Path(env["ATOMTX_STATE_DIR"]).mkdir(mode=0o700, exist_ok=True)
    mounted = 'mount -t tmpfs none "$ATOMTX_STATE_DIR" && chmod 700 "$ATOMTX_STATE_DIR" && "$@"'
    argv = ("unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-m", "atomtx", *args)
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_state_in_memory(env: dict[str, str]) -> None:
    """A state directory that a power cut empties: `doctor` warns, `backup` says so, once."""
    path = env["ATOMTX_STATE_DIR"]
    status, detail, hint = _state_check(_in_memory(env, "doctor", "--json"))
    assert (status, detail) == ("warning", f"{path} (tmpfs)")
    assert "a power cut" in (hint or "")
    done = _in_memory(env, "backup", "--command", "true", "no-such-pool/home")
    (line,) = [line for line in done.stderr.splitlines() if "in memory" in line]
    assert line.startswith(f"note: the state directory {path} is in memory (tmpfs): a power cut")


@pytest.mark.parametrize("command", ["history", "status"])
def test_state_directory_is_a_file(env: dict[str, str], atomtx_: Run, command: str) -> None:
    """Where the state directory is a file, a reader says so, and what to do."""
    path = Path(env["ATOMTX_STATE_DIR"])
    path.touch()
    assert atomtx_(command).stderr.splitlines() == [
        f"atomtx: cannot read the journal {path}/journal.db: Not a directory",
        "  set ATOMTX_STATE_DIR to a directory of root's on a local disk",
    ]

"""
The command line: the lazy group, and the one place where errors become exit statuses.

`--help`, `--version` and shell completion import no command: the table below holds their short
help.  A command's function returns an :class:`ExitStatus` (or None for success) and raises
:class:`AtomtxError`; it takes `--json` by :func:`json_option`, as the parameter ``as_json``,
and prints by :func:`echo`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn, TextIO, TypeVar

import click

from .. import __version__, signals
from ..errors import AtomtxError, ExitStatus, Interrupted, UserError

# name -> ("module:attribute", short help), in the order in which --help shows them
COMMANDS = {
    "backup": ("atomtx.cli.backup:backup", "Back up the named volumes as they are at one moment."),
    "snap": ("atomtx.cli.snap:snap", "Take snapshots that stay."),
    "prune": ("atomtx.cli.prune:prune", "Destroy kept snapshots that no rule keeps."),
    "unsnap": ("atomtx.cli.unsnap:unsnap", "Destroy what `atomtx snap --transient` took."),
    "clone": ("atomtx.cli.clone:clone", "Send kept snapshots to other pools and machines."),
    "run": ("atomtx.cli.steps:run", "Run the steps of a job, one after the other."),
    "recover": ("atomtx.cli.recover:recover", "Finish or undo interrupted runs."),
    "history": ("atomtx.cli.history:history", "List what ran, what it saved, how it ended."),
    "show": ("atomtx.cli.show:show", "Show one run: each step, its log, how to restore."),
    "status": ("atomtx.cli.status:status", "Show the runs that are at work or unfinished."),
    "attach": ("atomtx.cli.attach:attach", "Follow a living run until it ends."),
    "stop": ("atomtx.cli.stop:stop", "Stop a living run and undo it."),
    "check": ("atomtx.cli.check:check", "Tell a monitoring system whether backups are fresh."),
    "sure": ("atomtx.cli.sure:sure", "Keep an integrity database of the files in a tree."),
    "config": ("atomtx.cli.config:config", "Check, show or begin the configuration."),
    "install": ("atomtx.cli.install:install", "Make a service and a timer of systemd of each job."),
    "uninstall": ("atomtx.cli.install:uninstall", "Take away what `atomtx install` wrote."),
    "notify": ("atomtx.cli.notify:notify", "Give the notices that services have left."),
    "journal": ("atomtx.cli.journal:journal", "Check, copy, export or set aside the journal."),
    "doctor": ("atomtx.cli.doctor:doctor", "Check what is installed, allowed and healthy."),
}


_RESTORE = "`atomtx show RUN` prints the command that restores what a run has saved"
_HISTORY = "`atomtx history` lists the runs; the client lists what is in its repository"
_ELSEWHERE = {"restore": _RESTORE, "extract": _RESTORE, "list": _HISTORY, "snapshots": _HISTORY}


class _Named(click.types.StringParamType):
    """A name that was given: an empty one, as of a variable that is not set, is not none at all."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


class _Volume(click.types.StringParamType):
    """A volume, or where it is mounted: `./home`, which is no dataset's name, is made absolute."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        return os.path.abspath(text) if text.split("/")[0] in (".", "..") else text


NAMED = _Named()
VOLUME = _Volume()
_F = TypeVar("_F", bound=Callable[..., object])
# click 8.2 raises it where a group is given no command; before that it prints the help itself.
_NoCommand: type[click.UsageError] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())


def json_option(command: _F) -> _F:
    """Add `--json`, as the parameter ``as_json``; errors are then JSON on stderr as well."""
    decorate = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
    return decorate(command)


class _OutputClosed(Exception):
    """Nobody reads our standard output any more."""


class LazyGroup(click.Group):
    """A group that imports a command only when it is called or asked for its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Meet standard output that cannot be written: of `--help` and `--version` click writes."""
        try:
            return super().make_context(*args, **extra)
        except OSError as exc:
            raise _unwritten(exc) from exc

    def invoke(self, ctx: click.Context) -> object:
        """
        Tell a reader of our output that went away from any other broken pipe.

        click takes each EPIPE for the former and exits without a word; one from a socket of
        ours is a bug, or a runner that died, and must be seen.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            if _is_read(sys.stdout):
                raise RuntimeError("a broken pipe, not that of standard output") from exc
            raise _OutputClosed from exc
        except OSError as exc:
            if _is_of_help(exc):
                raise _unwritten(exc) from exc
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Tell who looks for what has no command of its own where it is."""
        if args and args[0] in _ELSEWHERE:
            raise UserError(f"there is no command {args[0]}", hint=_ELSEWHERE[args[0]])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the static table; click's own would import every command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Complete names of commands from the table, for the same reason."""
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=short)
            for name, (_, short) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", "-V", "-v", message="atomtx %(version)s")
def cli() -> None:
    """
    Back up a moment: snapshot, mount, back up, unmount, destroy.

    Each change to the machine is journaled before it is made. After a crash, `atomtx recover`
    finishes the interrupted backup of the same moment, or undoes it.

    \b
    Examples:
      atomtx backup zroot/usr/home     back up with the client that is configured
      atomtx recover                   after a crash
      atomtx history                   what ran, and how it ended

    \b
    EXIT STATUS
      0  completed                     5  another run of this job is at work
      1  failed                        6  waiting: not settled yet, and why
      2  usage or configuration        7  backed up, a step after it failed
      3  some files could not be read  130, 143  interrupted and cleaned up
      4  backed up, cleanup parked: run `atomtx recover`
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; the console script."""
    signals.forget_inherited()
    if args is None and sys.getfilesystemencoding() != "utf-8":
        from .. import process

        process.restart_in_utf8()
    words = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name in another encoding must not be a traceback
            stream.reconfigure(errors="backslashreplace")
    status = run(words)
    sys.exit(status)


def run(words: Sequence[str], within: object = None) -> int:
    """
    Run one command and return its exit status; the only place where errors become one.

    A bug is none of the errors below and shows its traceback.  Of a step of `atomtx run` the
    command finds by `within.within` which one it is.
    """
    try:
        status = _called(words, within)
    except AtomtxError as exc:
        _report(exc.message, exc.hint, exc.exit_status, as_json=wants_json(words))
        return int(exc.exit_status)
    except click.ClickException as exc:
        return _report_usage(exc, as_json=wants_json(words))
    except (click.Abort, KeyboardInterrupt):
        interrupted = Interrupted(signal.SIGINT)
        _report(interrupted.message, None, interrupted.exit_status, as_json=wants_json(words))
        return int(interrupted.exit_status)
    except _OutputClosed:
        _discard_stdout()
        return 128 + signal.SIGPIPE  # what a shell shows for the others in the pipe
    return int(status or 0)


def _called(words: Sequence[str], within: object) -> ExitStatus | int | None:
    try:
        status: ExitStatus | int | None = cli.main(
            list(words), prog_name="atomtx", standalone_mode=False, obj=within
        )
    except _NoCommand as exc:
        echo(exc.format_message())
        return ExitStatus.USAGE
    return status


def wants_json(words: Sequence[str]) -> bool:
    """Tell whether `--json` is among our own words; after `--` they are the client's."""
    words = list(words)
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _report(message: str, hint: str | None, status: ExitStatus | int, *, as_json: bool) -> None:
    if as_json:
        import json  # 8 ms that `--help` need not pay

        error = {"message_type": "error", "message": message, "hint": hint}
        _write(sys.stderr, json.dumps(error | {"exit_status": int(status)}))
        return
    _write(sys.stderr, f"atomtx: {message}" + (f"\n  {hint}" if hint else ""))


def _report_usage(exc: click.ClickException, *, as_json: bool) -> int:
    path = exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx else "atomtx"
    _report(exc.format_message(), f"see `{path} --help`", ExitStatus.USAGE, as_json=as_json)
    return int(ExitStatus.USAGE)


def _write(stream: TextIO | None, text: str) -> None:
    """Write a line; where nobody listens any more there is nobody to tell."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        return


def echo(text: str = "") -> None:
    """
    Print what a command has to show; a line is added to its end.

    Standard output that cannot be written is met here, not in the interpreter's shutdown.
    """
    if sys.stdout is None:  # started with the descriptor closed
        return
    try:
        print(text, flush=True)
    except OSError as exc:
        raise _unwritten(exc) from exc


def warn(text: str) -> None:
    """Print what is wrong beside the results; a line is added to its end."""
    _write(sys.stderr, text)


def _unwritten(exc: OSError) -> Exception:
    """Return what to raise where standard output cannot be written."""
    if isinstance(exc, BrokenPipeError):
        return _OutputClosed()
    _discard_stdout()
    return AtomtxError(f"cannot write to standard output: {exc.strerror}")


def _is_of_help(exc: OSError) -> bool:
    """Tell whether click could not print: it does so of a command's `--help` alone."""
    raised = exc.__traceback__
    while raised and raised.tb_next:
        raised = raised.tb_next
    return raised is not None and raised.tb_frame.f_code.co_filename == click.utils.__file__


def _is_read(stream: TextIO) -> bool:
    """Tell whether somebody still reads what we write there; true for anything but a pipe."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not poll.poll(0)
    except (OSError, ValueError):  # not a file
        return True


def _discard_stdout() -> None:
    """Let the interpreter flush what is buffered to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

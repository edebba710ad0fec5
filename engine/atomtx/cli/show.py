"""`atomtx show`: everything that the journal and the run's folder know of one run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from .. import clients, history, journalfile, plan, redact, restoring, statedir
from ..credentials import described
from ..errors import AtomtxError, ExitStatus, UserError
from ..launching import bare_settings_of
from ..names import PLAIN
from ..statedir import RunFolder
from ..states import Outcome, Verb
from . import NAMED, echo, json_option, render

TAIL_LINES = 20
_TAIL_BYTES = 65_536


_LATEST = (
    "it has no id: this restores the latest that has its paths, which may be of another run or job"
)


@dataclass(frozen=True)
class Restore:
    """How to restore one backup, or why that cannot be told."""

    argv: tuple[str, ...]
    cwd: str
    environment: dict[str, str]
    needs: tuple[str, ...]  # variables that hold secrets, by name
    then: tuple[tuple[str, ...], ...] = ()  # commands that have to follow, in order
    files: tuple[str, ...] = ()  # what they read, each with its hash
    problem: str | None = None

    def commands(self) -> list[str]:
        """Return what can be pasted into a shell, line by line."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        prefix = ["env", *variables] if variables else []
        return [shlex.join([*prefix, *argv]) for argv in (self.argv, *self.then)]


@dataclass(frozen=True)
class _Found:
    run: history.Run
    plan: str
    volumes: list[history.Volume]
    steps: list[history.Step]
    children: list[history.Run]
    moves: list[history.Move]
    backups: list[history.Backup]
    log: list[str]
    hooks_log: list[str]


@click.command()
@click.argument("run", type=NAMED)
@click.option("--log", "whole_log", is_flag=True, help="The client's whole log, not its end.")
@click.option(
    "--to",
    type=NAMED,
    default="./restored",
    show_default=True,
    metavar="DIR",
    help="Where the restore command that is shown restores to.",
)
@click.option(
    "--check", is_flag=True, help="Read the dumps of xfsdump again: are they what was written?"
)
@json_option
def show(run: str, whole_log: bool, to: str, check: bool, as_json: bool) -> ExitStatus:
    """
    Show one run: each step, its log, how to restore.

    RUN is a run's id, or its first digits; or last, the newest. Shows its volumes with the
    identity of each snapshot, every intent and outcome in order, the moves between states, the
    client's log, and for each backup the exact command that restores from it. Changes nothing on
    the machine.

    \b
    Examples:
      atomtx show last
      atomtx show 7f3c
      atomtx show 7f3c --log
      atomtx show 7f3c --check

    \b
    EXIT STATUS
      0  shown
      1  the journal cannot be read; with --check, a dump is damaged
      2  no such run, wrong usage, or no permission
    """
    found = _find(statedir.find(), run, whole_log=whole_log)
    restores = [_restore(found, backup, to) for backup in found.backups]
    damage = _check(found) if check else None
    if as_json:
        echo(render.to_json(_object(found, restores, damage)))
    else:
        echo("\n".join(_page(found, restores, damage)))
    return ExitStatus.FAILED if damage else ExitStatus.COMPLETED


def _find(state: Path, prefix: str, *, whole_log: bool) -> _Found:
    path = state / journalfile.NAME
    run = history.chosen(path, prefix)
    return _Found(
        run=run,
        plan=history.plan(path, run.id),
        volumes=history.volumes(path, run.id),
        steps=history.steps(path, run.id),
        children=history.children(path, run.id) if run.verb == Verb.RUN else [],
        moves=history.moves(path, run.id),
        backups=history.backups(path, run.id),
        log=read_log(RunFolder.of(state, run.id).log, whole=whole_log),
        hooks_log=read_log(RunFolder.of(state, run.id).hooks_log, whole=whole_log),
    )


def read_log(path: Path, *, whole: bool) -> list[str]:
    """Return the client's log, or its last lines; nothing where there is none any more."""
    try:
        with path.open("rb") as file:
            if not whole:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines if whole else lines[-TAIL_LINES:]


# -- restoring ---------------------------------------------------------------------------------


def _restore(found: _Found, backup: history.Backup, to: str) -> Restore | None:
    """Return how to restore *backup*; None where the repository has nothing of it."""
    if backup.outcome == Outcome.FAILED:
        return None
    try:
        made = plan.from_json(found.plan)
    except (KeyError, TypeError, ValueError):  # another release's plan
        return Restore((), "", {}, (), problem="this atomtx cannot read the run's plan")
    settled = made.client
    environment = _environment(settled)
    client = clients.load(settled.name)
    files: tuple[str, ...] = ()
    try:
        commands = restoring.commands(settled, backup, to, below=made.below)
        if isinstance(client, clients.Dumper):
            files = client.files(bare_settings_of(settled), restoring.saved(backup))
    except AtomtxError as exc:
        return Restore((), settled.cwd, {}, (), problem=str(exc))
    needs = (*settled.secrets, *(f"{n} ({described(s)})" for n, s in settled.credentials))
    if not commands:
        return None
    argv, *then = commands
    return Restore(argv, settled.cwd, environment, needs, tuple(then), files)


def _environment(settled: plan.ClientPlan) -> dict[str, str]:
    """Return the client's own variables, and of the others those that this shell has not."""
    prefix = f"{settled.name.upper()}_"
    return {
        name: value
        for name, value in settled.environment
        if name.startswith(prefix)
        or not (redact.is_of_a_session(name) or os.environ.get(name) == value)
    }


def _check(found: _Found) -> list[str]:
    """Read again what the run's backups need for a restore; return what is damaged."""
    if found.run.verb != Verb.BACKUP:
        raise UserError(f"run {found.run.id} made no backup that could be checked")
    settled = plan.from_json(found.plan).client
    client = clients.load(settled.name)
    if not isinstance(client, clients.Dumper):
        raise UserError(
            f"--check reads the dumps of xfsdump; this run's client is {settled.name}",
            hint=f"let {settled.name} check its repository itself",
        )
    saved = [backup for backup in found.backups if backup.outcome != Outcome.FAILED]
    if not saved:
        raise UserError(f"run {found.run.id} has no backup to check")
    settings = bare_settings_of(settled)
    return [
        words
        for backup in saved
        for words in client.damage(settings, settled.repository, restoring.saved(backup))
    ]


# -- for programs ------------------------------------------------------------------------------


def _object(
    found: _Found, restores: list[Restore | None], damage: list[str] | None
) -> dict[str, Any]:
    pairs = zip(found.backups, restores, strict=True)
    runs_of_steps = [child.to_dict() for child in found.children]
    return {
        "run": found.run.to_dict(),
        "plan": json.loads(found.plan),
        "volumes": found.volumes,
        "steps": [asdict(step) | {"description": step.describe()} for step in found.steps],
        "moves": found.moves,
        "backups": [asdict(backup) | {"restore": restore} for backup, restore in pairs],
        "log": found.log,
        "hooks_log": found.hooks_log,
        **({"runs_of_steps": runs_of_steps} if found.run.verb == Verb.RUN else {}),
        **({} if damage is None else {"damage": damage}),
    }


# -- for people --------------------------------------------------------------------------------


def _page(found: _Found, restores: list[Restore | None], damage: list[str] | None) -> list[str]:
    sections = {
        "": _header(found),
        "Volumes": _volumes(found.volumes, takes=found.run.verb != Verb.PRUNE),
        "Intents and outcomes": _steps(found),
        "Runs of the steps": _children(found.children),
        "States": _moves(found.moves),
        "Backups": _backups(found.backups, restores),
        "Check": [] if damage is None else damage or ["each dump is what was written"],
        "Client's log": [render.printable(line) for line in found.log],
        "Hooks' log": [render.printable(line) for line in found.hooks_log],
    }
    lines: list[str] = []
    for title, body in sections.items():
        if body:
            lines += ["", title, *(f"  {line}" for line in body)] if title else body
    return lines


def _header(found: _Found) -> list[str]:
    run = found.run
    ended = f"{render.local_time(run.ended_at, seconds=True)} ({render.duration(run.duration_s)})"
    is_backup = run.verb == Verb.BACKUP
    added, processed = render.size(run.bytes_added), render.size(run.bytes_processed)
    pairs = {
        "run": run.id,
        "job": run.label,
        "step of": run.parent,
        "state": run.state + (f", {run.cleanup}" if run.cleanup else ""),
        "outcome": run.outcome,
        "reason": run.reason,
        "client": run.client if is_backup else None,
        "repository": run.repository,
        "moment": render.local_time(run.moment_at, seconds=True) if run.moment_at else None,
        "read live": _live(found),
        "started": render.local_time(run.started_at, seconds=True),
        "ended": ended if run.ended_at else None,
        "attempts": str(run.attempts) if is_backup else None,
        "bytes": f"{added} added of {processed}" if run.outcome and is_backup else None,
        "files": None if run.files_processed is None else str(run.files_processed),
    }
    return [render.printable(f"{name:<12}{value}") for name, value in pairs.items() if value]


def _live(found: _Found) -> str | None:
    """Tell what was not of the moment, and when the last attempt read it."""
    if not found.run.not_a_moment:
        return None
    words = f"{', '.join(found.run.not_a_moment)}: not a moment"
    for event, what in (("client_started", "from"), ("client_ended", "to")):
        times = [render.local_time(m.at, seconds=True) for m in found.moves if m.event == event]
        words += f", {what} {times[-1]}" if times else ""
    return words


def _volumes(volumes: Iterable[history.Volume], *, takes: bool) -> list[str]:
    not_known = "not taken" if takes else "-"
    rows = [
        (v.mountpoint, "none: read live, not a moment", v.guid, "-")
        if v.kind == PLAIN
        else (v.mountpoint, v.snapshot, v.snapshot_guid or not_known, v.createtxg or "-")
        for v in volumes
    ]
    return render.table(("MOUNTPOINT", "SNAPSHOT", "GUID", "CREATETXG"), rows) if rows else []


def _steps(found: _Found) -> list[str]:
    unknown = "-" if found.run.is_final else "open"
    rows = [
        (
            str(step.id),
            render.local_time(step.intended_at, seconds=True),
            render.local_time(step.ended_at, seconds=True),
            step.outcome or unknown,
            _words(step),
        )
        for step in found.steps
    ]
    return render.table(("STEP", "INTENDED", "ENDED", "OUTCOME", "WHAT"), rows) if rows else []


def _children(runs: Iterable[history.Run]) -> list[str]:
    rows = [
        ((run.parent or "").rpartition("/")[2], run.id, run.label, run.outcome or "-", run.state)
        for run in runs
    ]
    return render.table(("STEP", "RUN", "JOB", "OUTCOME", "STATE"), rows) if rows else []


def _words(step: history.Step) -> str:
    what = f"undo {step.compensates}: " if step.compensates is not None else ""
    return what + step.describe() + (f" [{step.detail}]" if step.detail else "")


def _moves(moves: Iterable[history.Move]) -> list[str]:
    rows = [
        (render.local_time(m.at, seconds=True), m.event, f"{m.source} -> {m.dest}", m.reason or "")
        for m in moves
    ]
    return render.table(("AT", "FACT", "MOVE", "REASON"), rows) if rows else []


def _backups(backups: Iterable[history.Backup], restores: Iterable[Restore | None]) -> list[str]:
    lines: list[str] = []
    for backup, restore in zip(backups, restores, strict=True):
        words = f"{backup.backup_id or '(no id)'}  {backup.outcome}"
        lines += [words + (f" ({backup.reason})" if backup.reason else "")]
        lines += [f"  of {path}" for path in backup.paths]
        lines += [f"  {line}" for line in _restore_lines(restore)] if restore else []
        lines += [f"  {_LATEST}"] if restore and restore.argv and not backup.backup_id else []
    return [render.printable(line) for line in lines]


def _restore_lines(restore: Restore) -> list[str]:
    if restore.problem:
        return [f"no restore command: {restore.problem}"]
    lines = [f"restore, in {restore.cwd}:", *(f"  {line}" for line in restore.commands())]
    lines += [f"  it reads {file}" for file in restore.files]
    return lines + ([f"  it needs {', '.join(restore.needs)}"] if restore.needs else [])

"""`atomtx show`: everything that the journal and the run's folder know of one run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from .. import clients, history, journalfile, plan, statedir
from ..credentials import described
from ..errors import AtomtxError, ExitStatus
from ..statedir import RunFolder
from ..states import Outcome
from . import echo, json_option, render

TAIL_LINES = 20
_TAIL_BYTES = 65_536


@dataclass(frozen=True)
class Restore:
    """How to restore one backup, or why that cannot be told."""

    argv: tuple[str, ...]
    cwd: str
    environment: dict[str, str]
    needs: tuple[str, ...]  # variables that hold secrets, by name
    problem: str | None = None

    def command(self) -> str:
        """Return what can be pasted into a shell."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *variables, *self.argv] if variables else self.argv)


@dataclass(frozen=True)
class _Found:
    run: history.Run
    plan: str
    volumes: list[history.Volume]
    steps: list[history.Step]
    moves: list[history.Move]
    backups: list[history.Backup]
    log: list[str]
    hooks_log: list[str]


@click.command()
@click.argument("run")
@click.option("--log", "whole_log", is_flag=True, help="The client's whole log, not its end.")
@click.option(
    "--to",
    default="./restored",
    show_default=True,
    metavar="DIR",
    help="Where the restore command that is shown restores to.",
)
@json_option
def show(run: str, whole_log: bool, to: str, as_json: bool) -> ExitStatus:
    """
    Show one run: each step, its log, how to restore.

    RUN is a run's id, or its first digits. Shows its volumes with the identity of each
    snapshot, every intent and outcome in order, the moves between states, the client's log,
    and for each backup the exact command that restores from it. Changes nothing on the machine.

    \b
    Examples:
      atomtx show 7f3c
      atomtx show 7f3c --log

    \b
    EXIT STATUS
      0  shown
      1  the journal cannot be read
      2  no such run, wrong usage, or no permission
    """
    found = _find(statedir.find(), run, whole_log=whole_log)
    restores = [_restore(found, backup, to) for backup in found.backups]
    if as_json:
        echo(render.to_json(_object(found, restores)))
    else:
        echo("\n".join(_page(found, restores)))
    return ExitStatus.COMPLETED


def _find(state: Path, prefix: str, *, whole_log: bool) -> _Found:
    path = state / journalfile.NAME
    run = history.run(path, prefix)
    return _Found(
        run=run,
        plan=history.plan(path, run.id),
        volumes=history.volumes(path, run.id),
        steps=history.steps(path, run.id),
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
        settled = plan.from_json(found.plan).client
    except (KeyError, TypeError, ValueError):  # another release's plan
        return Restore((), "", {}, (), problem="this atomtx cannot read the run's plan")
    prefix = f"{settled.name.upper()}_"
    environment = {name: value for name, value in settled.environment if name.startswith(prefix)}
    settings = clients.Settings(
        settled.command, settled.extra, dict(settled.environment), settled.cwd
    )
    try:
        argv = clients.load(settled.name).restore_command(settings, _backup(backup), to)
    except AtomtxError as exc:
        return Restore((), settled.cwd, {}, (), problem=exc.message)
    needs = (*settled.secrets, *(f"{n} ({described(s)})" for n, s in settled.credentials))
    return Restore(tuple(argv), settled.cwd, environment, needs) if argv else None


def _backup(row: history.Backup) -> clients.Backup:
    return clients.Backup(
        paths=row.paths,
        outcome=Outcome(row.outcome),
        backup_id=row.backup_id,
        reason=row.reason,
        bytes_added=row.bytes_added,
        bytes_processed=row.bytes_processed,
        files_processed=row.files_processed,
    )


# -- for programs ------------------------------------------------------------------------------


def _object(found: _Found, restores: list[Restore | None]) -> dict[str, Any]:
    pairs = zip(found.backups, restores, strict=True)
    return {
        "run": found.run.to_dict(),
        "plan": json.loads(found.plan),
        "volumes": found.volumes,
        "steps": [asdict(step) | {"description": step.describe()} for step in found.steps],
        "moves": found.moves,
        "backups": [asdict(backup) | {"restore": restore} for backup, restore in pairs],
        "log": found.log,
        "hooks_log": found.hooks_log,
    }


# -- for people --------------------------------------------------------------------------------


def _page(found: _Found, restores: list[Restore | None]) -> list[str]:
    sections = {
        "": _header(found),
        "Volumes": _volumes(found.volumes),
        "Intents and outcomes": _steps(found),
        "States": _moves(found.moves),
        "Backups": _backups(found.backups, restores),
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
    added, processed = render.size(run.bytes_added), render.size(run.bytes_processed)
    pairs = {
        "run": run.id,
        "job": run.label,
        "state": run.state + (f", {run.cleanup}" if run.cleanup else ""),
        "outcome": run.outcome,
        "reason": run.reason,
        "client": run.client,
        "repository": run.repository,
        "moment": render.local_time(run.moment_at, seconds=True) if run.moment_at else None,
        "started": render.local_time(run.started_at, seconds=True),
        "ended": ended if run.ended_at else None,
        "attempts": str(run.attempts),
        "bytes": f"{added} added of {processed}" if run.outcome else None,
        "files": None if run.files_processed is None else str(run.files_processed),
    }
    return [render.printable(f"{name:<12}{value}") for name, value in pairs.items() if value]


def _volumes(volumes: Iterable[history.Volume]) -> list[str]:
    rows = [
        (v.mountpoint, v.snapshot, v.snapshot_guid or "not taken", v.createtxg or "-")
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
    return [render.printable(line) for line in lines]


def _restore_lines(restore: Restore) -> list[str]:
    if restore.problem:
        return [f"no restore command: {restore.problem}"]
    lines = [f"restore, in {restore.cwd}:", f"  {restore.command()}"]
    return lines + ([f"  it needs {', '.join(restore.needs)}"] if restore.needs else [])

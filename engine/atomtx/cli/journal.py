"""`atomtx journal`: look after the journal's file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import journalfile, statedir
from ..errors import ExitStatus, UserError
from . import echo, json_option, render

if TYPE_CHECKING:
    from ..audit import Report

TABLES = ("journals", "runs", "volumes", "steps", "moves", "backups")


@click.group()
def journal() -> None:
    """
    Check, copy, export or set aside the journal.

    The journal is the file `journal.db` in the state directory. These commands look after the
    file; `atomtx history` and `atomtx show` tell what is in it.

    \b
    Examples:
      atomtx journal check
      atomtx journal backup /root/atomtx-journal.db
      atomtx journal export | jq 'select(.table == "moves")'

    \b
    EXIT STATUS
      0  done                        5  set-aside: another atomtx is at work
      1  damaged, or cannot be read  2  wrong usage, or no permission
    """


def _path() -> Path:
    return statedir.find() / journalfile.NAME


@journal.command()
@json_option
def check(as_json: bool) -> ExitStatus:
    """
    Tell whether the journal is sound.

    Looks at the file's header, at every page and reference, at whether it is this machine's
    journal and the newest that this machine has seen, and at whether its rows agree with each
    other. A copy of one instant is checked, so nothing is changed and no run waits. Prints a
    line for each finding.

    \b
    Example:
      atomtx journal check

    \b
    EXIT STATUS
      0  sound, or not there yet; there may be notes
      1  damaged, of another machine or rolled back; or it cannot be read
      2  wrong usage, no permission, or a newer atomtx wrote it
    """
    from .. import audit

    report = audit.check(statedir.find())
    if as_json:
        echo(render.to_json({"ok": report.ok, **asdict(report)}))
    else:
        echo("\n".join(_lines(report)))
    return ExitStatus.COMPLETED if report.ok else ExitStatus.FAILED


def _lines(report: Report) -> Iterator[str]:
    for finding in report.findings:
        yield render.printable(f"{finding.kind:<6}  {finding.text}")
    if not report.exists:
        yield f"{report.journal} is not there; the first backup makes it"
    elif report.ok:
        yield (
            f"sound: {report.journal}, {_count(report.runs)}, version {report.version}, "
            f"change counter {report.change_counter}, "
            f"{report.pages} pages of {report.page_size} bytes"
        )
    else:
        yield f"not sound: {report.journal}; docs/recovery.md tells what to do"


@journal.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def backup(file: Path, as_json: bool) -> ExitStatus:
    """
    Copy the journal to FILE, while runs are at work.

    The copy is whole, of one instant, mode 0600, and durable when the command ends. FILE must
    not exist. A copy that is put back after newer runs is refused: it does not know of them.

    \b
    Example:
      atomtx journal backup /root/atomtx-journal.db

    \b
    EXIT STATUS
      0  copied
      1  the journal is damaged or cannot be read, or FILE cannot be written
      2  FILE exists, there is no journal, wrong usage, or no permission
    """
    from .. import copying

    target = file.absolute()
    runs = copying.to_file(_path(), target)
    if as_json:
        echo(render.to_json({"journal": _path(), "file": target, "runs": runs}))
    else:
        echo(f"copied {_path()} with {_count(runs)} to {target}")
    return ExitStatus.COMPLETED


@journal.command()
@json_option
def export(as_json: bool) -> ExitStatus:
    """
    Print every row of the journal as JSON, an object a line.

    The key "table" is journals, runs, volumes, steps, moves or backups, in this order; the other
    keys are the table's columns. Times are microseconds since 1970, UTC; "plan" and "payload"
    are JSON in a string. All rows are of one instant; nothing is changed. --json makes an error
    JSON as well.

    \b
    Examples:
      atomtx journal export >journal.jsonl
      atomtx journal export | jq -c 'select(.table == "runs") | [.id, .outcome]'

    \b
    EXIT STATUS
      0  printed
      1  the journal is damaged, or cannot be read
      2  wrong usage, no permission, or a newer atomtx wrote it
    """
    from .. import copying

    with copying.private(_path()) as source:
        if source:
            for table in TABLES:
                cursor = source.connection.execute(f"SELECT * FROM {table} ORDER BY rowid")
                names = [column[0] for column in cursor.description]
                for row in cursor:
                    echo(json.dumps({"table": table, **dict(zip(names, row, strict=True))}))
    return ExitStatus.COMPLETED


@journal.command()
@json_option
def set_aside(as_json: bool) -> ExitStatus:
    """
    Rename the journal, so that the next command begins a new one.

    For a journal that is damaged, was rolled back, or came with a copied disk. Nothing in it is
    changed, and nothing on the machine: snapshots, holds and mounts of its runs stay, until
    `atomtx recover --scan` and `--adopt` are used. Prints how to put it back.

    \b
    Example:
      atomtx journal set-aside

    \b
    EXIT STATUS
      0  renamed
      1  it cannot be renamed
      2  there is no journal, wrong usage, or no permission
      5  another atomtx is at work with it
    """
    from .. import aside

    path = _path()
    if not path.parent.is_dir():
        raise UserError(f"there is no journal at {path}")
    with aside.writers_lock(path.parent):
        if not os.path.lexists(path):
            raise UserError(f"there is no journal at {path}")
        new = aside.set_aside(path, aside.BY_HAND)
    back = aside.way_back(new, path)
    if as_json:
        echo(render.to_json({"journal": path, "aside": new, "way_back": back}))
    else:
        echo(_set_aside_words(path, new, back))
    return ExitStatus.COMPLETED


def _set_aside_words(path: Path, new: Path, back: list[str]) -> str:
    return "\n".join(
        [
            f"{path} is now {new}",
            "`atomtx recover --scan` lists what its runs left; the next command begins a new "
            "journal",
            "to put it back, before there is a new one:",
            *(f"  {line}" for line in back),
        ]
    )


def _count(runs: int) -> str:
    return f"{runs} run" + ("" if runs == 1 else "s")

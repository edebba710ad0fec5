"""`atomtx sure`: what the files of a tree were, and whether they still are."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import statedir
from ..errors import ExitStatus
from . import NAMED, echo, jobs, json_option, render
from . import sure_options as options
from . import sure_words as words
from .sure_options import PATH, cross_option, database_option, ignore_option, of_option


@click.group()
def sure() -> None:
    """
    Keep an integrity database of the files in a tree.

    A scan adds a generation: each path with its type, mode, owner, size, times, inode, link
    target, extended attributes and the SHA-256 of its contents. What did not change since the
    last generation is not read again. A check reads everything, and names each difference.
    Nothing is ever written into the tree.

    \b
    Examples:
      atomtx sure scan /tank/home/.zfs/snapshot/monday
      atomtx sure scan-kept home
      atomtx sure check /mnt/restored/tank/home --of /tank/home
      atomtx sure diff 3 4 --of /tank/home
      atomtx sure verify-backup 7f3c

    \b
    EXIT STATUS
      0  done; of check: no difference     3  some files could not be read
      1  failed; of check: differences     5  another atomtx writes the database
      2  wrong usage, nothing was changed
    """


@sure.command()
@click.argument("path", type=PATH)
@of_option
@database_option
@click.option("--full", is_flag=True, help="Hash every file, whatever its times say.")
@cross_option
@click.option("--allow-empty", is_flag=True, help="The tree may be empty now, and was not.")
@json_option
def scan(
    path: Path,
    of: Path | None,
    database: Path | None,
    full: bool,
    cross_mounts: bool,
    allow_empty: bool,
    as_json: bool,
) -> ExitStatus:
    """
    Add a generation: the tree at PATH as it is now.

    PATH is the live tree or a snapshot of it; one in .zfs/snapshot is known to be of its dataset,
    for another one say --of. Files with the path, inode, size, mtime and ctime of the last
    generation are not read, unless they were too young then to be believed. A file that cannot
    be read is named, and noted as such. A killed scan leaves the last generation as it was.

    \b
    Example:
      atomtx sure scan /tank/home/.zfs/snapshot/monday

    \b
    EXIT STATUS
      0  scanned
      1  failed; or, with --full, contents changed though size and times did not
      2  wrong usage, or an empty tree that was not; nothing was changed
      3  scanned, and some files could not be read
      5  another atomtx writes the database
      130  interrupted; the last generation is as it was
    """
    from ..integrity import places
    from . import sure_scan

    file, live = options.place(path, of, database)
    if not database:
        statedir.prepare(statedir.find())
        places.prepare(file)
    how = sure_scan.How(full, cross_mounts, allow_empty)
    with render.reporter(as_json=as_json) as show:
        found = sure_scan.tree(show, path, file, live, how)
        show.result(found)
    return ExitStatus(found["exit_status"])


@sure.command(name="scan-kept")
@jobs.named("dataset")
@jobs.chosen("dataset")
@click.option("--full", is_flag=True, help="Hash every file, whatever its times say.")
@click.option("--allow-empty", is_flag=True, help="A tree may be empty now, and was not.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def scan_kept(
    names: tuple[str, ...],
    full: bool,
    allow_empty: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> ExitStatus:
    """
    Add a generation of each dataset: its newest kept snapshot.

    Kept snapshots are those of `atomtx snap` and of `atomtx backup --keep-snapshots`. Each is read
    in .zfs/snapshot of its dataset, as by `atomtx sure scan`; one that is the last generation
    already is not read again. A dataset that is not mounted, or has none, is named and left out;
    one that was named itself is an error. A scan that fails is told, and those after it are made.

    Of a job of the configuration its volumes, recursive, all and exclude count.

    \b
    Examples:
      atomtx snap home && atomtx sure scan-kept home
      atomtx sure scan-kept -r tank --exclude tank/scratch

    \b
    EXIT STATUS
      0  scanned, or scanned before
      1  failed; or, with --full, contents changed though size and times did not
      2  wrong usage, a dataset that cannot be read, or an empty tree that was not
      3  scanned; some datasets were left out, or some files could not be read
      5  another atomtx writes a database
      130  interrupted; a generation that was not whole is not there
    """
    from . import sure_scan

    asked = jobs.asked(names, (), given)
    how = sure_scan.How(full, may_be_empty=allow_empty)
    with render.reporter(as_json=as_json, quiet=quiet) as show:
        return sure_scan.kept(show, asked, how)


@sure.command()
@click.argument("tree", type=PATH)
@click.option("--against", type=int, metavar="GENERATION", help="By default the newest.")
@of_option
@database_option
@ignore_option
@click.option(
    "--strict", is_flag=True, help="Compare ctime and inode too: not with a restored tree."
)
@cross_option
@json_option
def check(
    tree: Path,
    against: int | None,
    of: Path | None,
    database: Path | None,
    ignore: str,
    strict: bool,
    cross_mounts: bool,
    as_json: bool,
) -> ExitStatus:
    """
    Read all of TREE, and name each difference from a generation.

    TREE is the live tree, a snapshot of it, or what was restored from a backup: then --of says
    whose database to use. What is there, what is not and what is new is compared, with all
    properties but ctime and inode, and the contents of every file. What could not be read is
    named and not compared.

    \b
    Examples:
      atomtx sure check /tank/home
      atomtx sure check /mnt/restored/tank/home --of /tank/home --ignore owner,group

    \b
    EXIT STATUS
      0  no difference
      1  differences, or failed
      2  wrong usage, or there is no such generation
      3  no difference in what was compared; some could not be, as it was named
    """
    from ..integrity import checking, compare, store

    ignored = options.ignored(ignore) | (frozenset() if strict else compare.ELSEWHERE_TOO)
    file, _ = options.place(tree, of, database)
    root = Path(os.path.realpath(tree))
    with render.reporter(as_json=as_json) as show, store.reading(file) as db:
        generation = db.generation(against)
        result = checking.Check(
            db,
            generation.id,
            ignore=ignored,
            found=lambda finding: words.tell(show, finding, as_json=as_json),
            progress=words.ticker(show, generation.entries),
        ).run(root, cross=cross_mounts)
        status = options.status(result.differences, result.not_compared)
        show.done(words.checked(result))
        show.result({"database": file, "path": root, **asdict(result), "exit_status": int(status)})
    return status


@sure.command(name="verify-backup")
@click.argument("run", type=NAMED)
@click.option(
    "--target",
    type=PATH,
    metavar="DIR",
    help="Restore to this directory, new or empty, and keep it; by default to a temporary one.",
)
@click.option("--of", type=PATH, metavar="PATH", help="Compare this path of the run alone.")
@click.option(
    "--against",
    type=int,
    metavar="GENERATION",
    help="By default that of the run's snapshot, else the newest.",
)
@database_option
@ignore_option
@click.option("--strict", is_flag=True, help="Compare also what the client does not keep.")
@click.option("--no-space-check", is_flag=True, help="Restore even where the room may not do.")
@click.option(
    "--config",
    "config_path",
    type=NAMED,
    metavar="FILE",
    help="Take the places of the jobs' credentials from this configuration.",
)
@json_option
def verify_backup(run: str, as_json: bool, **given: Any) -> ExitStatus:
    """
    Restore what RUN saved, and name each difference from a generation.

    RUN is a run's id, or its first digits; or last, the newest backup that completed or is
    partial. What it saved is restored by its own client, with the commands that `atomtx show`
    prints, into a directory that only you can read. Each path of the run is compared with the
    generation that was read from the run's own snapshot, where that was kept, else with the
    newest. The directory is removed at the end, also when interrupted.

    \b
    Examples:
      atomtx sure verify-backup 7f3c
      atomtx sure verify-backup 7f3c --of /tank/home --target /mnt/restored

    \b
    EXIT STATUS
      0  no difference
      1  differences; or the restore failed
      2  wrong usage, no such run, no database, no room, or the client cannot be used
      3  no difference in what was compared; some could not be, as it was named
      130, 143  interrupted; what was restored is removed
    """
    from .sure_verify import Verification

    with render.reporter(as_json=as_json) as show:
        return Verification(show, given, as_json=as_json).run(run)


@sure.command()
@click.argument("before", type=int, metavar="A")
@click.argument("after", type=int, metavar="B")
@of_option
@database_option
@ignore_option
@json_option
def diff(
    before: int, after: int, of: Path | None, database: Path | None, ignore: str, as_json: bool
) -> ExitStatus:
    """
    Name what differs between the generations A and B.

    No file is read. All properties are compared, ctime and inode too; see --ignore.

    \b
    Example:
      atomtx sure diff 3 4 --of /tank/home --ignore ctime

    \b
    EXIT STATUS
      0  done, whether there are differences or not
      1  failed
      2  wrong usage, or there is no such generation
      3  done; what one of the two could not read was named, and not compared
    """
    from ..integrity import checking, compare, store

    ignored = options.ignored(ignore)
    unread = 0
    with store.reading(options.known_place(of, database)) as db:
        for number in (before, after):
            db.generation(number)
        for finding in checking.diff(db, before, after, ignored):
            unread += finding.kind not in compare.IS_DIFFERENCE
            words.tell(None, finding, as_json=as_json, kinds=words.DIFF_WORDS)
    return options.status(unread=unread)


@sure.command(name="list")
@click.argument("path", type=PATH, required=False)
@database_option
@json_option
def list_(path: Path | None, database: Path | None, as_json: bool) -> ExitStatus:
    """
    List the generations of the tree at PATH.

    \b
    Example:
      atomtx sure list /tank/home

    \b
    EXIT STATUS
      0  listed
      1  failed
      2  wrong usage, or there is no database
    """
    from ..integrity import store

    with store.reading(options.known_place(path, database)) as db:
        found = db.generations()
        tree = db.tree
    if as_json:
        echo(render.to_json_list(words.generation_object(each, tree) for each in found))
        return ExitStatus.COMPLETED
    echo(words.table(found))
    return ExitStatus.COMPLETED


@sure.command()
@click.argument("path", type=PATH, required=False)
@database_option
@click.option("--generation", type=int, metavar="N", help="By default the newest.")
@json_option
def export(
    path: Path | None, database: Path | None, generation: int | None, as_json: bool
) -> ExitStatus:
    """
    Print a generation of the tree at PATH as mtree(5).

    mtree(8) of NetBSD, of FreeBSD and of Debian's mtree-netbsd reads it: `mtree -f FILE -p TREE`.
    It has no words for ctime, inode and extended attributes. --json makes an error JSON; what is
    printed is mtree anyway.

    \b
    Example:
      atomtx sure export /tank/home >home.mtree

    \b
    EXIT STATUS
      0  printed
      1  failed
      2  wrong usage, or there is no such generation
      3  printed; a comment names each entry that could not be read then
    """
    from ..integrity import mtree, store

    with store.reading(options.known_place(path, database)) as db:
        chosen = db.generation(generation)
        words.print_lines(mtree.lines(db.tree_at(chosen.id)))
    return options.status(unread=chosen.errors)


@sure.command()
@click.argument("path", type=PATH, required=False)
@database_option
@click.option(
    "--keep", type=click.IntRange(min=1), required=True, metavar="N", help="How many to keep."
)
@json_option
def forget(path: Path | None, database: Path | None, keep: int, as_json: bool) -> ExitStatus:
    """
    Forget all but the newest N generations of the tree at PATH.

    \b
    Example:
      atomtx sure forget /tank/home --keep 30

    \b
    EXIT STATUS
      0  done
      1  failed
      2  wrong usage, or there is no database
      5  another atomtx writes the database
    """
    from ..integrity import store

    file = options.known_place(path, database)
    with store.reading(file) as db:
        tree = db.tree
    with store.writing(file, tree) as db:
        count = db.forget(keep)
        left = [each.id for each in db.generations()]
    if as_json:
        echo(render.to_json({"database": file, "forgotten": count, "generations": left}))
    else:
        echo(f"{count} generations forgotten, {len(left)} kept")
    return ExitStatus.COMPLETED

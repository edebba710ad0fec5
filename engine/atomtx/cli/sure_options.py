"""What the commands of `atomtx sure` share: options, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import statedir
from ..errors import ExitStatus, UserError, worst


class _NamedPath(click.Path):
    """A path that was named: pathlib takes an empty one for the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _NamedPath(path_type=Path)
database_option = click.option(
    "--database",
    type=PATH,
    metavar="FILE",
    help="The database; by default one a tree in the state directory.",
)
of_option = click.option(
    "--of", type=PATH, metavar="PATH", help="The live path of the tree, where this is a copy."
)
cross_option = click.option(
    "--cross-mounts", is_flag=True, help="Enter other file systems as well."
)
ignore_option = click.option(
    "--ignore",
    metavar="LIST",
    default="",
    help="Properties not to compare: type, mode, owner, group, size, time, ctime, inode, "
    "target, xattrs, contents; with commas between.",
)


def place(path: Path, of: Path | None, database: Path | None) -> tuple[Path, Path]:
    """Return the database to use, and the live path of the tree."""
    from ..integrity import places

    tree = places.tree_of(of or path)
    file = database.absolute() if database else places.database_of(statedir.find(), tree)
    return file, tree


def known_place(path: Path | None, database: Path | None) -> Path:
    """Return the database where no tree is read."""
    if database:
        return database.absolute()
    if path is None:
        raise UserError("neither a tree nor a database is named", hint="see --help")
    return place(path, None, None)[0]


def ignored(text: str) -> frozenset[str]:
    """Return the properties of a list; UserError for what is none."""
    from ..integrity.compare import PROPERTIES

    names = frozenset(name for name in text.replace(" ", "").split(",") if name)
    unknown = sorted(names - set(PROPERTIES))
    if unknown:
        raise UserError(f"{unknown[0]!r} is no property", hint=f"there are {', '.join(PROPERTIES)}")
    return names


def status(differences: int = 0, unread: int = 0, *, damaged: int = 0) -> ExitStatus:
    """Return what the command exits with."""
    return worst(
        (
            ExitStatus.FAILED if differences or damaged else ExitStatus.COMPLETED,
            ExitStatus.PARTIAL if unread else ExitStatus.COMPLETED,
        )
    )

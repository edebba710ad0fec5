"""
xfsdump 3: whole XFS file systems into files, in levels, each file with its size and hash.

What runs for each volume is a process of ours around xfsdump (xfsdump_process.py), which makes
the dump appear in its destination (dumps.py) whole or not at all.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator

from ..errors import AtomtxError, UserError
from ..mounts import mountinfo
from ..names import is_within
from ..redact import check_arguments
from . import Backup, Facts, Launch, Moment, Settings, dumps
from .dumps import Destination
from .program import Option, Syntax, absolute, ask, find, last_value, program, refuse, rules
from .xfsdump_process import MODULE, STATE, levels
from .xfsdump_reader import XfsdumpReader

_SYNTAX = Syntax(valued=frozenset({"--destination", "--level", "--levels"}), short={})
_KNOWN = frozenset({"--destination", "--level", "--levels"})
_NOTES = (
    "a dump of xfsdump keeps extended attributes and ACLs; restored to another file system than "
    "XFS they are lost without a word",
    "xfsdump saves each file system as a whole: what a plan leaves out because it must stay live "
    "is in the dump as it was at the moment",
)
_NOTE_OF_LEVELS = (
    "xfsrestore 3.1.11 leaves a directory that was renamed, and of which a file was deleted, "
    "between two levels under its old name; level 0 alone has no such gap (docs/xfsdump.md)"
)
_RULES = frozenset({"--keep-chains"})
# xfsdump's messages are translated, and read.
_ENV = {"LC_ALL": "C", "LANGUAGE": ""}


def _options(settings: Settings) -> tuple[Option, ...]:
    """Read the user's options; a :class:`UserError` for one that is none of ours."""
    options = _SYNTAX.parse(settings.extra)
    check_arguments([option.word for option in options])
    for option in options:
        if option.name and option.name not in _KNOWN:
            raise UserError(
                f"{option.name} is no option of the client xfsdump",
                hint=f"its options: {', '.join(sorted(_KNOWN))}; atomtx gives xfsdump its own",
            )
    refuse(options, {}, "xfsdump")
    return options


def _destination(settings: Settings) -> Destination:
    named = last_value(_options(settings), "--destination")
    if not named:
        raise UserError(
            "xfsdump needs a destination", hint="`... --client xfsdump -- --destination DIR`"
        )
    path = os.path.realpath(*absolute([named], settings.cwd))
    if is_within(STATE, path):  # it would lie over xfsdump's inventory
        raise UserError(f"{path} cannot be a destination", hint="make a directory of its own")
    return Destination(path)


def _levels(settings: Settings) -> tuple[int, ...]:
    """Return the rotation of levels; one level is a rotation, too."""
    options = _options(settings)
    one, many = last_value(options, "--level"), last_value(options, "--levels")
    if one is not None and many is not None:
        raise UserError("--level and --levels exclude each other")
    text = one if one is not None else many
    if text is None:
        return (0,)
    try:
        found = levels(text)
    except ValueError:
        found = ()
    if not found or (one is not None and len(found) > 1):
        raise UserError(
            f"{text!r} is no level of a dump", hint="--level 1, or in turn --levels 0,1,2,3"
        )
    return found


class Xfsdump:
    """Backs up with xfsdump, one command for each volume."""

    name = "xfsdump"
    stop_signal = signal.SIGINT

    def inspect(self, settings: Settings) -> Facts:
        """Ask for the version and the destination's id, changing nothing."""
        argv = self._program(settings)
        destination = _destination(settings)
        notes: tuple[str, ...] = _NOTES
        if any(_levels(settings)):
            notes = (*notes, _NOTE_OF_LEVELS)
        find(argv, settings)
        answer = ask((*argv, "-h"), settings)
        match = re.search(r"version (\d+\.\d+[.\d]*)", answer.stdout + answer.stderr)
        return Facts(match[1] if match else "", destination.id, notes)

    def _program(self, settings: Settings) -> tuple[str, ...]:
        argv = program(settings, "xfsdump")
        if len(argv) > 1:
            raise UserError(
                "the client xfsdump takes one word for its program", hint="write a script"
            )
        return argv

    def check(
        self,
        settings: Settings,
        targets: tuple[str, ...],
        excludes: tuple[str, ...],
        root: str = "",
    ) -> None:
        """Raise a :class:`UserError` unless each target is the whole of an XFS file system."""
        table = mountinfo.read()
        destination = _destination(settings)
        for target in targets:
            _check_volume(target, table.topmost(target), table.containing(target))
            dumps.volume_name(target)
            if os.stat(destination.path).st_dev == os.stat(target).st_dev:
                raise UserError(
                    f"the destination {destination.path} is on the file system {target} itself",
                    hint="each dump would hold the older ones: dump to another file system",
                )

    def live_paths(self, settings: Settings) -> tuple[str, ...]:
        """Return the destination."""
        return (str(_destination(settings).path),)

    def launch(self, settings: Settings, facts: Facts, moment: Moment) -> Launch:
        """Return one command for each volume; its level is chosen when it runs."""
        root = moment.root.rstrip("/")
        commands = tuple(
            (
                *_process("dump", _destination(settings), facts.repository),
                f"--run={moment.run}",
                f"--job={moment.job}",
                f"--at={moment.at.isoformat()}",
                f"--levels={','.join(map(str, _levels(settings)))}",
                f"--path={target}",
                f"--source={root + target if target != '/' else root or '/'}",
                f"--program={self._program(settings)[0]}",
            )
            for target in moment.targets
        )
        return Launch(commands, settings.cwd, _ENV)

    def reader(self, moment: Moment) -> XfsdumpReader:
        return XfsdumpReader(moment)

    def policy(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Return the rule: how many chains of dumps to keep."""
        found = rules(words, _RULES, "xfsdump")
        for rule in found:
            value = rule.partition("=")[2]
            if not (value.isdecimal() and int(value) > 0):
                raise UserError(f"{rule} keeps no chain", hint="such as --keep-chains 3")
        return found

    def stored_paths(self, moment: Moment) -> tuple[str, ...]:
        """Return the live paths of the volumes."""
        return moment.targets

    def forgetting(
        self, settings: Settings, facts: Facts, paths: tuple[str, ...], policy: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...]:
        """Return what removes the older chains of this host's dumps of *paths*."""
        destination = _destination(settings)
        # The destination that is there now may be another one than the run's: it is refused then.
        return ((*_process("forget", destination, facts.repository), policy[-1], "--", *paths),)

    def after_loss(self, settings: Settings, facts: Facts) -> tuple[str, ...]:
        """Do nothing: the next attempt removes its predecessor's part itself."""
        return ()

    def restore_command(
        self, settings: Settings, facts: Facts, backup: Backup, to: str
    ) -> tuple[str, ...]:
        """Return the command that restores the level 0 of a backup's chain."""
        return self.restore_commands(settings, backup, to)[-1] if backup.backup_id else ()

    # -- dumps -----------------------------------------------------------------------------

    def remove_parts(self, settings: Settings, repository: str | None, run: str) -> tuple[str, ...]:
        """Remove the half-made dumps of a dead run, and return what that did, in words."""
        destination = _destination(settings)
        destination.check_id(repository)  # else "nothing found" would prove nothing
        return tuple(f"removed {part}" for part in destination.remove_parts(run))

    def restore_commands(
        self, settings: Settings, backup: Backup, to: str
    ) -> tuple[tuple[str, ...], ...]:
        """
        Return the commands that restore *backup*, its chain of dumps in order.

        Raises an AtomtxError where the destination, or a dump of the chain, is not there.
        """
        destination = _destination(settings)
        assert destination.id
        chain = destination.chain(backup.backup_id or "")
        below = os.path.join(to, backup.paths[0].lstrip("/"))
        each = [str(destination.path / dump.name / dumps.DUMP) for dump in chain]
        # -r, for a chain, leaves a directory of xfsrestore's own.
        how = ("xfsrestore", "-F", "-J", *(["-r"] if len(each) > 1 else []))
        return (("mkdir", "-p", below), *((*how, "-f", file, below) for file in each))

    def files(self, settings: Settings, backup: Backup) -> tuple[str, ...]:
        """Return the dumps that a restore needs, in order, each with its hash."""
        destination = _destination(settings)
        chain = destination.chain(backup.backup_id or "")
        return tuple(
            f"level {dump.level}: {dump.name}/{dumps.DUMP}, {dump.size} bytes, "
            f"SHA-256 {dump.sha256}"
            for dump in chain
        )

    def damage(self, settings: Settings, repository: str | None, backup: Backup) -> tuple[str, ...]:
        """Read all that a restore needs; return what is damaged, in words."""
        destination = _destination(settings)
        try:
            destination.check_id(repository)
            chain = destination.chain(backup.backup_id or "")
        except AtomtxError as exc:
            return (str(exc),)
        return tuple(filter(None, map(destination.damage, chain)))


def _process(what: str, destination: Destination, id: str | None) -> Iterator[str]:
    yield from (sys.executable, "-P", "-m", MODULE, what)
    yield f"--destination={destination.path}"
    yield f"--id={id or ''}"


def _check_volume(path: str, entry: mountinfo.Entry | None, above: mountinfo.Entry | None) -> None:
    if entry is None:
        where = above.mountpoint if above else "/"
        raise UserError(
            f"xfsdump saves whole file systems, and {path} is a part of the one at {where}",
            hint=f"name {where}, or use restic or borg",
        )
    if entry.fstype != "xfs":
        raise UserError(
            f"xfsdump saves XFS alone, and {path} is {entry.fstype}",
            hint="use restic or borg for it, or leave it out",
        )
    if entry.root != "/":
        raise UserError(
            f"xfsdump saves whole file systems, and {path} shows a directory of one",
            hint="name the place where the file system itself is mounted",
        )

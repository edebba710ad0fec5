"""`atomtx unsnap`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from .. import history, journalfile, pruning, statedir, unsnapping
from ..convention import Pattern
from ..errors import ExitStatus
from ..history import Snap
from ..intents import PruneSnapshots
from ..pruning import Choice
from ..retention import Policy
from ..volumes.zfs import Zfs
from . import jobs, json_option
from .prune import Prune
from .render import reporter
from .within import within


@click.command()
@jobs.named("volume")
@jobs.chosen("volume")
@click.option("--keep-last", metavar="N", help="Keep the last N of each volume.")
@jobs.pattern
@click.option("--bookmark/--no-bookmark", default=True, help="Leave a bookmark of each of ZFS.")
@click.option("--wait", is_flag=True, help="Wait for another run of this job to end.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what stays and why, change nothing.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@json_option
def unsnap(names: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> ExitStatus:
    """
    Destroy what `atomtx snap --transient` took.

    Only snapshots count that bear that mark themselves, and whose names are of the pattern; all
    of them go, or all but the last N of each volume. One that is held, mounted (on btrfs and LVM),
    or the origin of a clone, stays, and so does each moment that an `atomtx backup
    --from-snapshots` still reads, or that an `atomtx run` took which has not ended; as a step of
    that run it goes. Of each of ZFS that goes a bookmark is left, as by `atomtx prune`.

    Of a job of the configuration its volumes, recursive, all, exclude and snap-pattern count.

    \b
    Examples:
      atomtx snap --transient home && atomtx backup home --from-snapshots && atomtx unsnap home
      atomtx unsnap -r tank --keep-last 1 --dry-run

    \b
    EXIT STATUS
      0 done, or there was nothing to do    5 another run of this job is at work
      1 failed: a pool cannot be asked      6 an upgrade of the journal must wait
      2 usage                               130, 143 interrupted
      3 some are in use, and stay
    """
    with reporter(as_json=as_json, quiet=quiet) as show:
        return _Unsnap(show, as_json, names, options).run()


class _Unsnap(Prune):
    command = unsnapping.COMMAND
    noun = "transient snapshot"

    def _rules(self) -> Policy:
        last = self._options["keep_last"]
        return Policy() if last is None else Policy.parse({"keep-last": last})

    def _jobs_that_save(self) -> tuple[str, ...]:
        return ()  # what is transient goes when the user says so

    def _judge(self) -> Choice:
        return unsnapping.choose(
            self._asked.request(),
            policy=self._policy,
            pattern=Pattern.parse(self._asked.job.snap_pattern),
            zfs=Zfs(),
            snaps=_known,
            now=datetime.now(UTC),
        )

    def _steps(self, choice: Choice) -> tuple[PruneSnapshots, ...]:
        return pruning.intents(choice, bookmark=self._options["bookmark"], transient=True)


def _known() -> dict[str, Snap]:
    """Ask the journal; the run of steps of which this is one may take what it took."""
    step = within()
    path = statedir.find() / journalfile.NAME
    return history.snaps(path, within=step.run if step else "")

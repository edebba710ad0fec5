"""What carries our marks and is in no journal here: `atomtx recover --scan` and `--adopt`."""

from __future__ import annotations

from .. import adoption, locks, lvmio, probing, process
from ..convention import Pattern
from ..errors import BusyError, ExitStatus
from ..journal import Journal
from ..settling import front
from ..statedir import RunFolder
from ..volumes import btrfs, lvm
from ..volumes.zfs import Zfs
from ..words import creation_time, size
from . import jobs
from .render import Reporter, age


class Strays:
    """
    Lists what is in no journal, and takes into one what the user names.

    *pattern* is that of the names of an interrupted snap, besides those of the configuration's
    jobs.  With *may_stop* what is still at work for a lost state directory is adopted all the same.
    """

    def __init__(
        self, show: Reporter, pattern: str | None, config_path: str | None, *, may_stop: bool
    ) -> None:
        self._show = show
        self._pattern = pattern
        self._config_path = config_path
        self._may_stop = may_stop

    def scan(self, journal: Journal | None) -> ExitStatus:
        """Show each run that *journal* does not have, with the age and size of what it left."""
        found = self._found(_zfs(), journal)
        at_work = probing.at_work([stray.run for stray in found])
        for stray in found:
            self._show_one(stray, at_work[stray.run])
        if found:
            self._show.done("`atomtx recover --adopt ID` takes one into this journal and undoes it")
        else:
            self._show.done("nothing carries our marks that is not in the journal")
        return ExitStatus.COMPLETED

    def _show_one(self, stray: adoption.Stray, pids: list[int]) -> None:
        passed = age(creation_time(stray.created_s))
        when = "of this minute" if passed == "now" else f"{passed} old"
        self._show.done(f"run {stray.run}, {when}, in no journal here{_of_snap(stray)}:")
        if pids:
            self._show.done(f"  at work: {_named(pids)}")
        for snapshot in stray.snapshots:
            used = stray.sizes.get(snapshot.name)
            words = "" if used is None else f", {size(used)}"
            self._show.done(f"  snapshot {snapshot.name}{words}")
        for mountpoint in stray.mounts:
            self._show.done(f"  mounted at {mountpoint}")
        self._warn_of_unlike(stray)

    def adopt(self, journal: Journal, prefix: str) -> str:
        """
        Take the run whose id begins with *prefix* into *journal*, to be undone; return its id.

        Raises UserError where none or several do, and BusyError where it is at work.
        """
        zfs = _zfs()
        stray = adoption.pick(self._found(zfs, journal), prefix)
        self._warn_of_unlike(stray)
        made = adoption.plan_of(stray, zfs.pools() if zfs else ())
        found = {s.name: (s.guid, s.createtxg) for s in stray.snapshots}
        # Its folder may have the only record of its client's end: it stays, whatever happens.
        folder = RunFolder.of(journal.state, made.run).make()
        with front(folder) as lock:
            if lock is None:
                raise BusyError(f"run {made.run} is at work", hint="adopt it when it has ended")
            self._check_elsewhere(made.run, folder)
            run = journal.adopt(made, found, adoption.intents_of(stray, made))
        self._show.step(f"run {run.id} is in this journal now")
        return run.id

    def _check_elsewhere(self, run: str, folder: RunFolder) -> None:
        """
        Refuse a run that is at work for another state directory: lock F here says nothing of it.

        What lives of one that had its runner here is settled as of any run.
        """
        hint = "adopt it when it has ended"
        found = probing.fronts(run)
        if not (found or folder.was_used() or self._may_stop):
            found = probing.at_work([run])[run]
            hint += "; if its state directory is lost, --stop ends them"
        if found:
            raise BusyError(
                f"run {run} is at work for another state directory: {_named(found)}", hint=hint
            )

    def _warn_of_unlike(self, stray: adoption.Stray) -> None:
        """Once a run is adopted, it is in the journal, and `--scan` tells no more of it."""
        if stray.unlike:
            more = f" and {len(stray.unlike) - 1} more" if len(stray.unlike) > 1 else ""
            bear = "bear" if more else "bears"
            self._show.warn(
                f"{stray.unlike[0]}{more} {bear} the mark of run {stray.run} under a name of no "
                "known pattern, and would stay; if a snap took them, give its --pattern"
            )

    def _found(self, zfs: Zfs | None, journal: Journal | None) -> tuple[adoption.Stray, ...]:
        given = [Pattern.parse(self._pattern)] if self._pattern else []
        on_lvm = lvmio.Lvm()
        strays = adoption.scan(
            zfs,
            journal.known() if journal else (),
            (*btrfs.marked(), *lvm.marked(on_lvm)),
            patterns=(*jobs.patterns(self._config_path), *given),
            keepers=(*btrfs.keepers(), *lvm.keepers(on_lvm)),
        )
        known = set(journal.known()) if journal else ()  # once more: of what began meanwhile
        return tuple(stray for stray in strays if stray.run not in known)


def _zfs() -> Zfs | None:
    """Return ZFS; None on a machine without it, which is none the worse for btrfs and LVM."""
    others = btrfs.mounted() or lvmio.devices()
    return Zfs() if process.which("zpool") or not others else None


def _named(pids: list[int]) -> str:
    return ", ".join(str(locks.Process.of(pid)) for pid in pids)


def _of_snap(stray: adoption.Stray) -> str:
    """Say of an interrupted snap's that they are, and what of their moment is none of them."""
    words = ", of an interrupted snap" if stray.is_of_snap else ""
    stay = f", {stray.kept} more of its moment are kept, and stay" if stray.kept else ""
    return words + stay

"""
Take everything of a run away again.

Unmount before release, release before destroy; children before parents; never by force, never
lazily.  Each undo is proven and idempotent, needs no new row, and is recorded after it was made.
What is busy is tried again with growing pauses, then its holders are named and it is parked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from . import locks, states
from .errors import AtomtxError, EffectError, JournalFullError, WaitingError
from .hooks import Hooks
from .intents import (
    Beside,
    DestroySnapshots,
    EndClient,
    KeepSnapshots,
    Mount,
    ReleaseSnapshots,
    RunClient,
    UnmountVolumes,
)
from .journal import Change, Journal
from .launching import swept
from .mounts import inhabitants, live, mountinfo, tree
from .names import PLAIN, RunId, mounted_as
from .probing import end_survivors, presence
from .records import Run, Step
from .recovery import Presence
from .statedir import RunFolder
from .states import Event, Outcome
from .volumes.kind import Identity, Kind
from .volumes.kinds import Kinds

PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_RUNNER_END_S = 30.0
_SHOWN = 6
_SAVED = (Outcome.COMPLETED, Outcome.PARTIAL)


class Cleaner:
    """Undoes what a run did, step by step, and records it."""

    def __init__(
        self,
        journal: Journal,
        folder: RunFolder,
        kinds: Kinds,
        hooks: Hooks,
        warn: Callable[[str], None],
        *,
        front: int | None = None,
    ) -> None:
        self._journal = journal
        self._folder = folder
        self._kinds = kinds
        self._hooks = hooks
        self._warn = warn
        self._front = front  # the descriptor that holds lock F
        # Proven by this process and held ever since: nobody can have put others in their place.
        self.held: dict[str, Identity] = {}

    def clean(self, run: Run) -> Run:
        """
        Take a run from `unmounting` to `destroyed`, or park it, as where something is in use.

        Either way the user's hooks have their end.
        """
        assert run.state == states.UNMOUNTING
        try:
            run = self._identify(run)
            verdicts = self.remove_traces(run)
            left = [name for name, verdict in verdicts.items() if verdict == "busy"]
            trouble = self._why_busy(run, left) if left else self._remove_parts(run)
        except (EffectError, WaitingError, OSError) as exc:
            verdicts, trouble = {}, str(exc)
        self._hooks.at_end(run)
        return self._park(run, trouble) if trouble else self._finish(run, verdicts)

    def remove_traces(self, run: Run) -> dict[str, str]:
        """
        Make every undo, record none; return a verdict for each snapshot.

        Idempotent.  Raises EffectError for what cannot be undone now, and as `unmount` does.
        """
        self.unmount(run)
        held, self.held = self.held, {}  # released below: from then on only a probe proves
        verdicts = self._remove(run, held or self._identities(run))
        if held and "absent" in verdicts.values():  # renamed meanwhile, or destroyed
            again = self._remove(run, self._identities(run))
            verdicts = {n: again[n] if v == "absent" else v for n, v in verdicts.items()}
        if "absent" in verdicts.values() and (trouble := self._kinds.trouble(run.plan.volumes)):
            raise EffectError(trouble)  # "not found" is then not "gone" (promise 2)
        self._kinds.sweep(run.plan.volumes, run=run.id)
        return verdicts

    def _remove_parts(self, run: Run) -> str | None:
        """
        Remove what the client of a run without a result left half made; return why it cannot be.
        """
        if run.outcome in _SAVED or not any(isinstance(s.intent, RunClient) for s in run.steps):
            return None
        try:
            for line in swept(run.plan.client, run.id):
                self._warn(line)
        except (AtomtxError, OSError) as exc:
            return f"it is not known whether half a backup is left: {exc}"
        return None

    def _remove(self, run: Run, found: Mapping[str, Identity]) -> dict[str, str]:
        """
        Release what was found, then keep or destroy it; return a verdict for each snapshot.

        One that stays was not made by the run, and nothing more is done about it.  Nor about one
        that was given a name without our token: whoever did so wants it.
        """
        self._release(run, found)
        kept = {n for step in run.pending(KeepSnapshots) for n in _names(step)}
        named = {n for n, i in found.items() if n not in kept and _token(i.name) != _token(n)}
        for name in sorted(named):
            self._warn(f"{found[name].name} was renamed by somebody, from {name}: it stays")
        now: dict[str, str] = {found[name].name: "renamed" for name in named}
        there = [v for v in run.frozen if v.snapshot in found]
        for kind, pool in sorted({(v.kind, v.pool) for v in run.frozen}):
            of_pool = {
                v.snapshot: found[v.snapshot]
                for v in there
                if (v.kind, v.pool) == (kind, pool) and not v.stays and v.snapshot not in named
            }
            of_kind = self._kinds.of(kind)
            now |= of_kind.keep([i for n, i in of_pool.items() if n in kept], run=run.id)
            now |= self._destroy(of_kind, [i for n, i in of_pool.items() if n not in kept], run)
        now |= {found[v.snapshot].name: "done" for v in there if v.stays}
        absent = {v.snapshot: "absent" for v in run.frozen}
        return absent | {v.snapshot: now[found[v.snapshot].name] for v in there}

    def _release(self, run: Run, found: Mapping[str, Identity]) -> None:
        """
        Release what the run holds, of all pools of a kind at once.

        What has the name of a snapshot that stays may be another one, which our hold came upon:
        the hold is proven by its random tag.
        """
        names: dict[str, set[str]] = {}
        for v in run.frozen:
            names.setdefault(v.kind, set()).update(
                [found[v.snapshot].name] if v.snapshot in found else [],
                [v.snapshot] if v.stays else [],
            )
        for kind in sorted(kind for kind in names if names[kind]):
            self._kinds.of(kind).release(sorted(names[kind]), tag=RunId(run.id).token)

    def _identify(self, run: Run) -> Run:
        """Journal the identities that a crash kept out of it, before anything is destroyed."""
        if all(volume.guid for volume in run.frozen):
            return run
        found = self._identities(run)
        if not found:
            return run
        # A full disk must not stop an undo: name, token and mark are the proof then.
        with suppress(JournalFullError), self._journal.change(run) as change:
            change.identify({n: (i.guid, i.createtxg) for n, i in found.items()})
        return self._journal.load(run.id)

    def _identities(self, run: Run) -> dict[str, Identity]:
        """Return those snapshots of the run that are proven ours, under the names they have now."""
        found = self._kinds.identities(run.plan.volumes)
        ours = {
            v.snapshot: found[v.snapshot]
            for v in run.frozen
            if presence(run, v, found.get(v.snapshot)) in (Presence.OURS, Presence.BROKEN)
        }
        lost = [v for v in run.frozen if v.snapshot not in (ours if v.stays else found)]
        return ours | self._kinds.renamed(run.id, lost)

    def _destroy(self, kind: Kind, identities: list[Identity], run: Run) -> dict[str, str]:
        verdicts: dict[str, str] = {}
        left = identities
        for pause in (*PAUSES_S, None):
            verdicts |= kind.destroy(left, run=run.id)
            left = [identity for identity in left if verdicts[identity.name] == "busy"]
            if not left or pause is None:
                break
            tree.expire_automounts([identity.name for identity in left], lock=self._front)
            time.sleep(pause)
        return verdicts

    def unmount(self, run: Run) -> None:
        """
        See that no process of the run lives, and nothing of its mounts and clients is left.

        Idempotent.

        An attempt whose undo is recorded has left nothing: what is there now is somebody else's.
        Raises WaitingError where one lives that cannot be seen.
        """
        lock = self._folder.runner_lock
        if not locks.wait_until(lambda: not locks.is_held(lock), _RUNNER_END_S):
            raise EffectError(
                f"the runner of run {run.id} does not end", hint="see `atomtx status`"
            )
        end_survivors(run, self._folder, self._warn)
        self._folder.empty_temporary()
        for step in run.pending(UnmountVolumes):
            assert isinstance(step.intent, UnmountVolumes)
            if step.intent.root:
                self._remove_tree(self._as_called(_of_this_boot(step.intent, run), run))

    def _as_called(self, intent: UnmountVolumes, run: Run) -> UnmountVolumes:
        """Name kept snapshots as they are called now: there is no token in their names."""
        if not run.plan.is_of_kept:
            return intent
        now = {name: identity.name for name, identity in self._identities(run).items()}
        mounts = tuple(
            replace(each, source=now.get(each.source, each.source)) for each in intent.mounts
        )
        return replace(intent, mounts=mounts)

    def _remove_tree(self, intent: UnmountVolumes) -> None:
        for pause in (*PAUSES_S, None):
            busy = tree.remove(intent.mounts, intent.directories, lock=self._front)
            if not busy:
                return
            if pause is None:
                raise EffectError(
                    f"{busy[0].mountpoint} is busy: {_why_mount_is_busy(busy)}",
                    hint="end what uses it, then run `atomtx recover`",
                )
            time.sleep(pause)

    def _why_busy(self, run: Run, names: Collection[str]) -> str:
        """Name what uses the snapshots: processes, mounts, holds and clones."""
        now = {i.name for name, i in self._identities(run).items() if name in names}
        mounted = [f"mounted at {m}" for m in inhabitants.mounted(now)]
        where = _words([*inhabitants.users(now), *mounted, *self._links(run, names)])
        more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        return f"{sorted(names)[0]}{more} busy: {where or 'holder not found'}"

    def _links(self, run: Run, names: Collection[str]) -> Iterator[str]:
        for kind in sorted({v.kind for v in run.frozen if v.snapshot in names}):
            of_kind = [v.snapshot for v in run.frozen if v.kind == kind and v.snapshot in names]
            yield from self._kinds.of(kind).links(of_kind)

    # -- recording -------------------------------------------------------------------------

    def _finish(self, run: Run, verdicts: dict[str, str]) -> Run:
        kept = {n for step in run.pending(KeepSnapshots) for n in _names(step)}

        def record(change: Change) -> None:
            self._hooks.record(change, run)
            for step in run.steps:
                is_beside = isinstance(step.intent, Beside)
                if step.outcome in (None, "parked") and not is_beside:
                    change.ended(step, *_outcome(step, verdicts, kept))
            change.set(cleanup=None)
            change.fire(Event.CLEANED_UP)

        return self._record(run, record, "everything is removed")

    def _park(self, run: Run, why: str) -> Run:
        self._warn(f"{why}; the cleanup is parked: `atomtx recover` tries again")

        def record(change: Change) -> None:
            self._hooks.record(change, run)
            for step in run.pending(DestroySnapshots):
                change.ended(step, "parked", why)
            change.set(cleanup="parked", reason=run.reason or why)

        return self._record(run, record, why)

    def _record(self, run: Run, record: Callable[[Change], None], what: str) -> Run:
        """Journal how the cleanup ended; without room for that it counts as parked."""
        try:
            with self._journal.change(run) as change:
                record(change)
        except JournalFullError as exc:
            why = f"{what}, but {exc.message}"
            self._warn(f"{why}: make room and run `atomtx recover`")
            return replace(run, cleanup="parked", reason=run.reason or why)
        return self._journal.load(run.id)


def _token(snapshot: str) -> str:
    """Return what of a snapshot's name is its own; the rest is its dataset's, or its group's."""
    return snapshot.rpartition("@" if "@" in snapshot else "/")[2]


def _of_this_boot(intent: UnmountVolumes, run: Run) -> UnmountVolumes:
    """Leave out live directories after a reboot: their mounts bear no mark, and ours are gone."""
    if run.boot_id == locks.boot_id():
        return intent
    return replace(intent, mounts=tuple(m for m in intent.mounts if m.volume_kind != PLAIN))


def _why_mount_is_busy(busy: Sequence[Mount]) -> str:
    table = mountinfo.read()
    seen = mountinfo.containing(table, busy[0].mountpoint)
    cover = [seen] if seen and not live.shows(seen, busy[0]) else []
    below = [*cover, *mountinfo.visible_below(table, busy[0].mountpoint)]
    sources = [m.source for m in busy if m.volume_kind != PLAIN]
    points = [m.mountpoint for m in busy if m.volume_kind == PLAIN]
    ours = frozenset(map(mounted_as, sources))
    foreign = [f"{e.source} is mounted at {e.mountpoint}" for e in below if e.thing not in ours]
    return _words([*inhabitants.users(sources, points), *foreign]) or "holder not found"


def _outcome(step: Step, verdicts: dict[str, str], kept: Collection[str]) -> tuple[str, str | None]:
    """Return how an undo of a cleaned run ended, and what was found."""
    if isinstance(step.intent, DestroySnapshots) and set(step.intent.snapshots) & set(kept):
        return "not-needed", "kept"
    if isinstance(step.intent, DestroySnapshots | KeepSnapshots):
        of_step = [verdicts.get(name, "absent") for name in step.intent.snapshots]
        odd = [v for v in of_step if v != "done"]
        if not odd:
            return "done", None
        detail = ", ".join(f"{odd.count(v)} {v}" for v in sorted(set(odd)))
        return ("done" if len(odd) < len(of_step) else "not-needed"), detail
    if isinstance(step.intent, UnmountVolumes | ReleaseSnapshots):
        return "done", None
    if isinstance(step.intent, EndClient):
        return "not-needed", "it had ended"
    return "failed", "given up before its outcome was known"


def _names(step: Step) -> tuple[str, ...]:
    return step.intent.snapshots if isinstance(step.intent, KeepSnapshots) else ()


def _words(things: Collection[str]) -> str:
    shown = list(things)[:_SHOWN]
    more = f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else ""
    return "; ".join(shown) + more

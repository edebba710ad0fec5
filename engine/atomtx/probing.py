"""What the machine says about a run: its processes, its pools, its snapshots."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterable, Mapping

from . import errand, locks, system
from .errors import EffectError, WaitingError
from .mounts import inhabitants
from .names import ZFS, RunId
from .records import Run, Volume
from .recovery import Ended, Presence, Probes
from .statedir import RunFolder
from .states import Verb
from .volumes.kind import Identity
from .volumes.kinds import Kinds

_END_S = 10.0


def probe(run: Run, folder: RunFolder, kinds: Kinds) -> tuple[Probes, dict[str, Identity]]:
    """Look at everything that the decision about *run* needs; the caller holds lock F."""
    if locks.is_held(folder.runner_lock):
        return Probes(runner_alive=True), {}
    if client_lives(run, folder):
        return Probes(client_alive=True), {}
    if trouble := kinds.trouble(run.plan.volumes):
        return Probes(ended=_ended(run, folder), trouble=trouble), {}
    # Each is proven when it is destroyed; and both ends are asked when it is sent.
    if run.verb in (Verb.PRUNE, Verb.CLONE, Verb.RUN):
        return Probes(), {}
    found = kinds.identities(run.plan.volumes)
    snapshots = {v.snapshot: presence(run, v, found.get(v.snapshot)) for v in run.frozen}
    # A pool that was exported between the two questions: "not found" is not "gone" (promise 2).
    is_absent = Presence.ABSENT in snapshots.values()
    if is_absent and (trouble := kinds.trouble(run.plan.volumes)):
        return Probes(ended=_ended(run, folder), trouble=trouble), {}
    return (
        Probes(
            ended=_ended(run, folder),
            snapshots=snapshots,
            equal_createtxg=same_moment(run.volumes, found),
        ),
        found,
    )


def _ended(run: Run, folder: RunFolder) -> Ended | None:
    known = errand.end(folder, run.attempts)
    if known is None:
        return None
    end, stopped = known
    return Ended(end.outcome, end.reason, end.retriable, stopped == signal.SIGTERM)


def presence(run: Run, volume: Volume, found: Identity | None) -> Presence:
    """
    Judge one snapshot: by mark alone only as long as its identity is not journaled.

    One that stays has no mark of the run: its identity is journaled with the plan.
    """
    if found is None:
        return Presence.ABSENT
    same = (found.guid, found.createtxg) == (volume.guid, volume.createtxg)
    if volume.stays:
        return Presence.OURS if same else Presence.FOREIGN
    if found.mark != run.id:
        return Presence.FOREIGN
    if volume.guid is not None and not same:
        return Presence.FOREIGN
    return Presence.BROKEN if found.flaw else Presence.OURS


def same_moment(volumes: Iterable[Volume], found: Mapping[str, Identity]) -> bool:
    """
    Tell whether the snapshots of each pool were taken in one transaction group.

    Those of other kinds never are: what lies between them was measured when they were taken.
    """
    groups: dict[str, set[str]] = {}
    for volume in volumes:
        if volume.kind == ZFS and volume.snapshot in found:
            groups.setdefault(volume.pool, set()).add(found[volume.snapshot].createtxg)
    return all(len(group) == 1 for group in groups.values())


def survivors(run: Run, folder: RunFolder) -> list[int]:
    """
    Return the processes of the run that live without its runner.

    A wrapper may close inherited descriptors and drop its environment; it cannot leave the
    run's mount namespace unseen, so the mount tables are asked as well as lock C.  Those that
    nobody here can see are missing: `client_lives` knows of them.
    """
    found = set(inhabitants.of(RunId(run.id).token))
    if locks.is_held(folder.client_lock):
        found |= {p.pid for p in locks.holders(folder.client_lock)}
    return sorted(found - {os.getpid()})


def client_lives(run: Run, folder: RunFolder) -> bool:
    """
    Tell whether a process of the run lives without its runner, seen or not.

    proc(5), ptrace(2): what a process of another user has open is hidden without CAP_SYS_PTRACE,
    and all of one in another PID namespace that shares the state directory.  Lock C is not.
    """
    return locks.is_held(folder.client_lock) or bool(survivors(run, folder))


def fronts(run: str) -> list[int]:
    """Return who else holds lock F of a run, in whatever state directory."""
    tail = _lock(run, "front")
    return _others(system.here.lockers((tail,))[tail])


def at_work(runs: Collection[str]) -> dict[str, list[int]]:
    """
    Return the other processes that are at work on each of *runs*, for whatever state directory.

    Every process is looked at once, however many runs there are.
    """
    tails = {run: [_lock(run, name) for name in ("front", "runner", "client")] for run in runs}
    locking = system.here.lockers([tail for of_run in tails.values() for tail in of_run])
    living = inhabitants.of_each([RunId(run).token for run in runs])
    return {
        run: _others(
            [*living[RunId(run).token], *(pid for tail in tails[run] for pid in locking[tail])]
        )
        for run in runs
    }


def _lock(run: str, name: str) -> str:
    return f"/runs/{run}/{name}.lock"


def _others(pids: Iterable[int]) -> list[int]:
    return sorted({*pids} - {os.getpid()})


def end_survivors(run: Run, folder: RunFolder, tell: Callable[[str], None]) -> None:
    """
    End what lives of a run whose runner is gone: SIGTERM, then SIGKILL; each proven first.

    Raises EffectError where one does not end, WaitingError where one cannot be seen.
    """

    def still(pid: int) -> bool:
        return pid in survivors(run, folder)

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in (alive := survivors(run, folder)):
            locks.send(pid, number, if_still=still)
        if not alive and not locks.is_held(folder.client_lock):
            return
        if alive:
            names = ", ".join(str(locks.Process.of(pid)) for pid in alive)
            tell(f"ending what the interrupted run left behind: {names}")
        if locks.wait_until(lambda: not client_lives(run, folder), _END_S, step_s=0.2):
            return
    if alive := survivors(run, folder):
        raise EffectError(
            f"processes of run {run.id} cannot be ended: {alive}",
            hint="end them, then run `atomtx recover`",
        )
    if locks.is_held(folder.client_lock):
        raise WaitingError(
            f"run {run.id} ({run.label}) waits: its client lives, and cannot be seen from here",
            hint=errand.UNSEEN,
        )

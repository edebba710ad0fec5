"""
A run's moment: whether the snapshots are of one, and how it is shown to the client.

What is asked here of the journal and the machine changes neither.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime

from . import clients, plan
from .clients import End, Launch, Moment, Settings
from .errors import EffectError
from .intents import KeepSnapshots, Mount, MountVolumes, TakeSnapshots
from .journal import Journal
from .launching import launch_of, settings_of
from .mounts import tree
from .probing import same_moment
from .records import Run
from .statedir import RunFolder
from .states import Outcome
from .task import Task
from .volumes.kind import Identity

_DEFAULT_TMP = "/tmp"
_EMPTIED_HINT = "if that is right, exclude it, or put a file into it"


def skew(run: Run, within: str) -> str | None:
    """Say how far the snapshots of a set lie apart; None where they are of one moment."""
    pools = len({v.pool for v in run.volumes if v.kind == "zfs"})
    subvolumes = sum(v.kind == "btrfs" for v in run.volumes)
    if pools + subvolumes < 2:
        return None
    words = []
    if pools:
        words.append(f"one transaction group a pool; {pools} pool" + "s" * (pools > 1))
    if subvolumes:
        words.append(f"{subvolumes} subvolume" + "s one after the other" * (subvolumes > 1))
    return f"{' and '.join(words)} {within}"


def check_taken(run: Run, found: dict[str, Identity], complaints: list[EffectError]) -> None:
    """Raise EffectError unless all snapshots are there, ours, and of one moment."""
    missing = [v.snapshot for v in run.volumes if v.snapshot not in found]
    if missing and complaints:
        raise complaints[0]
    if missing:
        raise EffectError(f"the snapshot {missing[0]} was not taken, or is gone already")
    foreign = [name for name, identity in found.items() if identity.mark != run.id]
    if foreign:
        raise EffectError(f"{foreign[0]} exists and is not ours")
    if not same_moment(run.volumes, found):
        raise EffectError("the snapshots are not of one moment: their createtxg differ")


def kept(intent: TakeSnapshots) -> KeepSnapshots:
    """Return the step that makes the snapshots the user's, in the place of their destruction."""
    return KeepSnapshots(
        intent.pool, intent.pool_guid, intent.snapshots, intent.run, intent.volume_kind
    )


def mount_intent(run: Run) -> MountVolumes:
    """Return the step that mounts the snapshots; EffectError where a tree's root is in use."""
    planned = plan.mounts(run.plan)
    mounts = tuple(_proven(m, v.guid) for m, v in zip(planned, run.volumes, strict=True))
    if not run.plan.root:
        return MountVolumes("", mounts)
    tree.check_free(mounts)
    tops = tuple(t.rstrip("/") for t in plan.tops(run.plan))
    directories = tree.directories_to_make(run.plan.root, tops)
    return MountVolumes(run.plan.root, mounts, directories, run.plan.leave_dirs)


def _proven(mount: Mount, guid: str | None) -> Mount:
    """Return a mount with what proves its snapshot to the runner, where its kind has such."""
    return mount if mount.volume_kind == "zfs" else replace(mount, guid=guid or "")


def task_of(
    journal: Journal, folder: RunFolder, run: Run, intent: MountVolumes
) -> tuple[Launch, Task]:
    """Return how the client is run on the mounts, and the task of the runner that does it."""
    client = clients.load(run.plan.client.name)
    settings = settings_of(run.plan.client)
    moment = moment_of(journal, run)
    launch = launch_of(run.plan, moment)
    env = dict(launch.env)
    live = run.plan.live_paths
    if _freezes_tmp(run, settings):
        env["TMPDIR"] = str(folder.temporary)
    return launch, Task(
        run=run.id,
        attempt=run.attempts,
        folder=str(folder.path),
        in_namespace=not intent.root,
        mounts=intent.mounts,
        live=live,
        client=client.name,
        commands=launch.commands,
        cwd=launch.cwd,
        env=env,
        moment=moment,
        stop_signal=int(client.stop_signal),
        grace_s=run.plan.grace_s,
        time_limit_s=run.plan.time_limit_s,
        secrets=tuple(name for name, _ in run.plan.client.credentials),
    )


def _freezes_tmp(run: Run, settings: Settings) -> bool:
    """Tell whether the client would find its folder for temporary files read-only."""
    tmp = settings.env.get("TMPDIR", _DEFAULT_TMP)
    return not run.plan.root and plan.is_frozen(run.plan, tmp)


def moment_of(journal: Journal, run: Run) -> Moment:
    """Return what the client is told of a run whose snapshots are taken."""
    assert run.moment_at is not None
    return Moment(
        targets=run.plan.targets,
        root=run.plan.root,
        at=datetime.fromtimestamp(run.moment_at // 1_000_000, UTC),
        excludes=run.plan.excludes,
        whole=run.plan.whole_root,
        parent=_newer_parent(journal, run),
    )


def _newer_parent(journal: Journal, run: Run) -> str | None:
    """
    Return the last backup where its moment is later than ours: the clock was set back.

    A client that looks for its parent by time would not find it and read all anew.
    """
    last = journal.last_completed(run.job)
    if last is None or run.moment_at is None or not last[2] or last[1] <= run.moment_at:
        return None
    return last[2][0]


def check_empty(journal: Journal, run: Run, empty: frozenset[str]) -> str | None:
    """
    Raise EffectError for an empty set, or a volume that was named and was not empty before.

    Of one that -r or -a found return a warning: see `judged`.  (Promise 7.)
    """
    if empty and len(empty) == len(run.volumes):
        raise EffectError(
            "there is nothing to back up: every volume of the set is empty",
            hint="is what belongs there mounted?",
        )
    lost = _emptied(journal, run, empty)
    named = lost.intersection(run.plan.named)
    if named:
        raise EffectError(_emptied_words(named), hint=_EMPTIED_HINT)
    return f"{_emptied_words(lost)} ({_EMPTIED_HINT})" if lost else None


def _emptied(journal: Journal, run: Run, empty: Collection[str]) -> set[str]:
    """Return which of the *empty* mountpoints had files in the last completed backup."""
    if not empty:
        return set()
    last = journal.last_completed(run.job)
    before = last[0] if last else {}
    guids = {v.mountpoint: v.guid for v in run.plan.volumes}
    return {path for path in empty if before.get(guids[path]) is False}


def judged(journal: Journal, run: Run, end: End) -> End:
    """Call a backup partial that lacks what a volume that was not named itself once had."""
    if end.outcome is not Outcome.COMPLETED:
        return end
    lost = _emptied(journal, run, journal.seen_empty(run.id))
    if not lost:
        return end
    return replace(end, outcome=Outcome.PARTIAL, reason=_emptied_words(lost))


def _emptied_words(paths: Collection[str]) -> str:
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    return f"{min(paths)} is empty{more}, and was not in the last completed backup"

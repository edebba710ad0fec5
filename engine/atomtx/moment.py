"""
A run's moment: whether the snapshots are of one, and how it is shown to the client.

What is asked here of the journal and the machine changes neither.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from . import clients, plan
from .clients import Client, End, Launch, Moment, Settings
from .errors import EffectError
from .intents import KeepSnapshots, Mount, MountVolumes, TakeSnapshots, UnmountVolumes
from .journal import Journal
from .launching import launch_of, settings_of
from .mounts import tree
from .names import BTRFS, LVM, PLAIN, ZFS
from .plan import PlannedVolume
from .probing import presence, same_moment
from .records import Content, Run
from .recovery import Presence
from .statedir import RunFolder
from .states import Outcome
from .task import Task
from .volumes import plain
from .volumes.kind import Identity

_DEFAULT_TMP = "/tmp"
_EMPTIED_HINT = "if that is right, exclude it, or put a file into it"
_BARE_WORDS = (
    "{path} holds nothing but lost+found, which counts as empty from now on; whether it had files "
    "in the last completed backup is not known"
)


def skew(run: Run, within: str) -> str | None:
    """Say how far the snapshots of a set lie apart; None where they are of one moment."""
    pools = len({v.pool for v in run.volumes if v.kind == ZFS})
    subvolumes = sum(v.kind == BTRFS for v in run.volumes)
    logical = sum(v.kind == LVM for v in run.volumes)
    if pools + subvolumes + logical < 2:
        return None
    words = []
    if pools:
        words.append(f"one transaction group a pool; {pools} pool" + "s" * (pools > 1))
    if subvolumes:
        words.append(f"{subvolumes} subvolume" + "s one after the other" * (subvolumes > 1))
    if logical:
        words.append(f"{logical} logical volume" + "s one after the other" * (logical > 1))
    return f"{' and '.join(words)} {within}"


def skew_of(run: Run, found: Mapping[str, Identity]) -> str | None:
    """Say how far snapshots lie apart by their times of creation, which are whole seconds."""
    created = [identity.creation_s for identity in found.values()] or [0]
    return skew(run, f"within {max(created) - min(created) + 1} s")


def again(run: Run) -> str:
    """Say which attempt the next one is; what is read live is then of a later time."""
    words = f"attempt {run.attempts + 1}"
    live = ", ".join(run.read_live)
    return f"{words}; {live} is read as it is now, later than the moment" if live else words


def check_taken(run: Run, found: dict[str, Identity], complaints: list[EffectError]) -> None:
    """Raise EffectError unless all snapshots are there, ours, and of one moment."""
    missing = [v.snapshot for v in run.frozen if v.snapshot not in found]
    if missing and complaints:
        raise complaints[0]
    if missing:
        raise EffectError(f"the snapshot {missing[0]} was not taken, or is gone already")
    foreign = [name for name, identity in found.items() if identity.mark != run.id]
    if foreign:
        raise EffectError(f"{foreign[0]} exists and is not ours")
    flaws = [f"{name}: {identity.flaw}" for name, identity in found.items() if identity.flaw]
    if flaws:
        raise complaints[0] if complaints else EffectError(flaws[0])
    _check_one(run, found)


def check_kept(
    run: Run, found: Mapping[str, Identity], complaints: Sequence[EffectError] = ()
) -> None:
    """Raise EffectError unless all kept snapshots of the plan are there, and are those."""
    for volume in run.frozen:
        match presence(run, volume, found.get(volume.snapshot)):
            case Presence.ABSENT:
                raise EffectError(f"the kept snapshot {volume.snapshot} is gone")
            case Presence.FOREIGN:
                raise EffectError(f"{volume.snapshot} is another snapshot than the planned one")
    if complaints:
        raise complaints[0]
    _check_one(run, found)


def _check_one(run: Run, found: Mapping[str, Identity]) -> None:
    if not same_moment(run.frozen, found):
        raise EffectError("the snapshots are not of one moment: their createtxg differ")


def kept(intent: TakeSnapshots) -> KeepSnapshots:
    """Return the step that makes the snapshots the user's, in the place of their destruction."""
    return KeepSnapshots(
        intent.pool, intent.pool_guid, intent.snapshots, intent.run, intent.volume_kind
    )


def mount_intent(journal: Journal, run: Run) -> MountVolumes:
    """
    Return the step that mounts the snapshots.

    EffectError where a tree's root is in use, or a live directory is not the plan's.  What a parked
    run has mounted there stays beneath: it blocks no new backup.
    """
    three = zip(plan.mounts(run.plan), run.plan.volumes, run.volumes, strict=True)
    mounts = tuple(_proven(mount, planned, volume.guid) for mount, planned, volume in three)
    if not run.plan.root:
        return MountVolumes("", mounts)
    tree.check_free(mounts, beneath=_parked(journal))
    tops = tuple(t.rstrip("/") for t in plan.tops(run.plan))
    directories = tree.directories_to_make(run.plan.root, tops)
    return MountVolumes(run.plan.root, mounts, directories, run.plan.leave_dirs)


def _parked(journal: Journal) -> list[Mount]:
    """Return what parked runs have mounted in trees, or had until the last boot."""
    steps = (s for run in journal.open_runs() if run.is_parked for s in run.pending(UnmountVolumes))
    trees = (step.intent for step in steps if isinstance(step.intent, UnmountVolumes))
    return [mount for intent in trees if intent.root for mount in intent.mounts]


def _proven(mount: Mount, planned: PlannedVolume, guid: str | None) -> Mount:
    """Return a mount with what proves its source to the runner, where its kind has such."""
    if planned.kind == PLAIN:
        return replace(mount, guid=plain.proof(planned))
    return mount if mount.volume_kind == ZFS else replace(mount, guid=guid or "")


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
        needed=_needed(client, settings),
    )


def _needed(client: Client, settings: Settings) -> tuple[str, ...] | None:
    """
    Return all that the client needs as it is now, in the set or not; None where nobody knows.

    A command of the user's own, a wrapper too, may have its repository and its log anywhere.
    """
    if settings.command:
        return None
    return tuple(map(os.path.realpath, client.live_paths(settings)))


def _freezes_tmp(run: Run, settings: Settings) -> bool:
    """Tell whether the client would find its folder for temporary files read-only."""
    tmp = os.path.join(settings.cwd, settings.env.get("TMPDIR") or _DEFAULT_TMP)
    # The plan's live paths are those to which links lead.
    return not run.plan.root and plan.is_frozen(run.plan, os.path.realpath(tmp))


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
        attempt=run.attempts,
        run=run.id,
        job=run.label,
        is_kept=run.plan.is_of_kept,
    )


def _newer_parent(journal: Journal, run: Run) -> str | None:
    """
    Return the last backup where its moment is later than ours.

    The clock was set back, or ours is of snapshots that were kept.

    A client that looks for its parent by time would not find it and read all anew.
    """
    of_kept, client = run.plan.is_of_kept, run.plan.client
    last = journal.last_completed(run.job, of_kept=of_kept, client=client)
    if last is None or run.moment_at is None or not last[2] or last[1] <= run.moment_at:
        return None
    return last[2][0]


def check_empty(journal: Journal, run: Run, seen: Mapping[str, Content]) -> list[str]:
    """
    Raise EffectError for an empty set, or a volume that was named and was not empty before.

    Of one that -r or -a found return a warning: see `judged`.  (Promise 7.)  Return one, too, of
    those of which it is not known, which is so once after an upgrade.  Kept snapshots are
    what they are: they are from a time before the last backup, and nothing that is empty in them
    was lost since.
    """
    if run.plan.is_of_kept:
        return []
    if all(content.is_empty for content in seen.values()):
        raise EffectError(
            "there is nothing to back up: every volume of the set is empty",
            hint="is what belongs there mounted?",
        )
    lost, unknown = _emptied(journal, run, seen)
    named = lost.intersection(run.plan.named)
    if named:
        raise EffectError(_emptied_words(named), hint=_EMPTIED_HINT)
    warnings = [f"{_emptied_words(lost)} ({_EMPTIED_HINT})"] if lost else []
    return [*warnings, *(_BARE_WORDS.format(path=path) for path in sorted(unknown))]


def _emptied(journal: Journal, run: Run, seen: Mapping[str, Content]) -> tuple[set[str], set[str]]:
    """
    Return at which mountpoints there were files in the last completed backup, and are none now.

    And at which that is not known: it took an empty lost+found for a file.
    """
    empty = {path for path, content in seen.items() if content.is_empty}
    last = journal.last_completed(run.job) if empty else None
    guids = {v.mountpoint: v.guid for v in run.plan.volumes}
    before = {path: last[0].get(guids[path]) for path in empty} if last else {}
    held = {path for path, was in before.items() if was in (Content.ENTRIES, Content.FILES)}
    unknown = {
        path for path in held if (before[path], seen[path]) == (Content.ENTRIES, Content.BARE)
    }
    return held - unknown, unknown


def judged(journal: Journal, run: Run, end: End) -> End:
    """Call a backup partial that lacks what a volume that was not named itself once had."""
    if end.outcome is not Outcome.COMPLETED or run.plan.is_of_kept:
        return end
    lost, _ = _emptied(journal, run, journal.contents(run.id))
    if not lost:
        return end
    return replace(end, outcome=Outcome.PARTIAL, reason=_emptied_words(lost))


def _emptied_words(paths: Collection[str]) -> str:
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    return f"{min(paths)} is empty{more}, and was not in the last completed backup"

"""
ZFS: find datasets; take, prove, hold, release, keep and destroy snapshots.

Each function starts one `zfs` process, whatever the number of datasets.  Each effect is
idempotent, and none is believed for its exit status: whoever calls it probes what is there.
The commands inherit lock F, so that a recovery waits for those of a killed front end.

Sources: zfs-snapshot(8), zfs-hold(8), zfs-program(8); what OpenZFS 2.3.9 printed on Linux 6.12.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from .. import process, system
from ..errors import EffectError
from ..mounts import mountinfo
from ..names import MARK, Dataset
from ..plan import DatasetFacts, Pool
from .kind import Identity

_SCRIPT = Path(__file__).with_name("destroy.lua")
_ABSENT = ("dataset does not exist", "snapshot does not exist", "no such pool")
# The last line of a `zfs holds` that found none of its snapshots (zfs_main.c, zfs_do_holds).
_NONE_FOUND = "no datasets available"
_EBUSY, _EEXIST = 16, 17


class Zfs:
    """The `zfs` and `zpool` commands; *lock* is the descriptor of F that they inherit."""

    def __init__(self, lock: int | None = None) -> None:
        self._locks = () if lock is None else (lock,)

    def _run(self, *argv: str) -> process.Completed:
        return process.run(argv, pass_fds=self._locks)

    # -- looking ---------------------------------------------------------------------------

    def pools(self) -> list[Pool]:
        """Return the imported pools."""
        done = self._run("zpool", "list", "-Hp", "-o", "name,guid,health")
        if not done.ok:
            raise done.error("cannot list the pools", hint="`atomtx doctor` tells what is missing")
        return [Pool(*line.split("\t")) for line in done.stdout.splitlines()]

    def datasets(self, pool: str) -> list[DatasetFacts]:
        """Return the file systems and volumes of a pool, parents first."""
        columns = "name,type,guid,mountpoint,canmount,mounted,keystatus"
        done = self._run("zfs", "list", "-Hp", "-r", "-t", "filesystem,volume", "-o", columns, pool)
        if not done.ok:
            raise done.error(f"cannot list the datasets of pool {pool}")
        return [_facts(line) for line in done.stdout.splitlines()]

    def identities(self, snapshots: Collection[str]) -> dict[str, Identity]:
        """Return what each snapshot is; one that is absent is absent from the answer."""
        if not snapshots:
            return {}
        properties = f"guid,createtxg,creation,{MARK}"
        done = self._run(
            "zfs", "get", "-Hp", "-o", "name,property,value,source", properties, *snapshots
        )
        said = [line for line in done.stderr.splitlines() if line.strip()]
        strange = [line for line in said if not _says_absent(line)]
        found = _identities(done.stdout)
        # One line for each that is absent; a command that was killed says nothing of the others.
        if strange or len(found) + len(said) < len(set(snapshots)):
            said_last = strange[0] if strange else f"`zfs get` ended with status {done.status}"
            raise EffectError(f"cannot look at the snapshots: {said_last}")
        return found

    def marked(self, pools: Collection[str]) -> list[tuple[str, str]]:
        """Return (snapshot, run id) of every snapshot of *pools* that carries a mark of its own."""
        if not pools:
            return []
        done = self._run(
            "zfs", "get", "-Hp", "-r", "-t", "snapshot", "-s", "local", "-o", "name,value", MARK,
            *pools,
        )  # fmt: skip
        if not done.ok:
            raise done.error("cannot look for marked snapshots")
        pairs = (line.split("\t") for line in done.stdout.splitlines())
        return [(name, value) for name, value in pairs]

    def locked(self, datasets: Collection[str]) -> list[str]:
        """Return those datasets whose key is not loaded."""
        done = self._run("zfs", "get", "-Hp", "-o", "name,value", "keystatus", *datasets)
        if not done.ok:
            raise done.error("cannot look at the keys")
        pairs = (line.split("\t") for line in done.stdout.splitlines())
        return [name for name, value in pairs if value == "unavailable"]

    def holders(self, snapshots: Collection[str]) -> dict[str, list[str]]:
        """Return the tags of the holds on each snapshot; one that is absent has none."""
        done = self._look("holds", "zfs", "holds", "-H", *snapshots)
        tags: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            name, tag, _ = line.split("\t", 2)
            tags.setdefault(name, []).append(tag)
        return tags

    def clones(self, snapshots: Collection[str]) -> dict[str, list[str]]:
        """Return the clones of each snapshot that has some; one that is absent has none."""
        done = self._look("clones", "zfs", "get", "-Hp", "-o", "name,value", "clones", *snapshots)
        pairs = (line.split("\t") for line in done.stdout.splitlines())
        return {name: value.split(",") for name, value in pairs if value not in ("", "-")}

    def _look(self, what: str, *argv: str) -> process.Completed:
        """Run a command that prints what it finds and complains of snapshots that are absent."""
        done = self._run(*argv)
        said = [line for line in done.stderr.splitlines() if line.strip()]
        strange = [line for line in said if not _says_absent(line) and line != _NONE_FOUND]
        # One that was killed, or failed without a word, says nothing of those that it left out.
        if strange or not (done.ok or (said and done.status > 0)):
            raise EffectError(f"cannot look at the {what}: {(strange or [done.last_line()])[0]}")
        return done

    # -- changing --------------------------------------------------------------------------

    def take(self, snapshots: Sequence[str], *, run: str) -> EffectError | None:
        """
        Take snapshots of one pool in one transaction group, each marked with *run*.

        All or none.  Returns what the command complained of; only a probe tells what is there.
        """
        _check_length(snapshots)
        done = self._run("zfs", "snapshot", "-o", f"{MARK}={run}", *snapshots)
        return None if done.ok else done.error("cannot take the snapshots", hint=_hint(done.stderr))

    def hold(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Hold snapshots under *tag*; idempotent."""
        self._until_done("hold", snapshots, tag, wanted=True)

    def release(self, snapshots: Sequence[str], *, tag: str) -> None:
        """Release the holds under *tag*; one that is gone is success."""
        self._until_done("release", snapshots, tag, wanted=False)

    def _until_done(self, verb: str, snapshots: Sequence[str], tag: str, *, wanted: bool) -> None:
        """
        Run *verb* until each snapshot's hold is as *wanted*; EffectError after the second try.

        What it complained of tells little: "exists already" and "gone already" are success, and a
        `zfs` that somebody killed may have done it or not.  Hence the look in between.
        """
        left = list(snapshots)
        for last in (False, True):
            if not left or (done := self._run("zfs", verb, tag, *left)).ok:
                return
            held = self.holders(snapshots)
            left = [name for name in left if (tag in held.get(name, ())) is not wanted]
            if left and last:
                raise done.error(f"cannot {verb} {left[0]}")

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Destroy the snapshots that are still these, of one pool, in one transaction group.

        The channel program compares guid, createtxg and mark in the same transaction, so nothing
        can come in between.  Returns a verdict a name: "done", "absent", "foreign" (another
        thing has the name), "unmarked", or "busy".
        """
        return self._judge("destroy", identities, run, self._destroy_one)

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """Change the mark of the snapshots that are still these from run to kept; as `destroy`."""
        return self._judge("keep", identities, run, self._keep_one)

    def _judge(
        self,
        verb: str,
        identities: Sequence[Identity],
        run: str,
        one: Callable[[Identity, str], str],
    ) -> dict[str, str]:
        if not identities:
            return {}
        pool = Dataset(identities[0].name).pool
        arguments = [word for each in identities for word in _arguments(each)]
        done = self._run(
            "zfs", "program", "-j", "-t", "100000000", "-m", "100000000", pool, str(_SCRIPT),
            verb, run, *arguments,
        )  # fmt: skip
        if not done.ok:
            return {each.name: one(each, run) for each in identities}
        answers = json.loads(done.stdout)["return"]
        return {each.name: _verdict(answers[str(n)]) for n, each in enumerate(identities, 1)}

    # Where channel programs cannot be had (a build option removes them), one by one.  A snapshot
    # that is still held by us cannot have become another, but one that was released can: the
    # proof is then as old as the time between two commands.

    def _proven(self, identity: Identity, run: str) -> str:
        found = self.identities([identity.name]).get(identity.name)
        if found is None:
            return "absent"
        if (found.guid, found.createtxg) != (identity.guid, identity.createtxg):
            return "foreign"
        return "ours" if found.mark == run else "unmarked"

    def _destroy_one(self, identity: Identity, run: str) -> str:
        verdict = self._proven(identity, run)
        if verdict != "ours":
            return verdict
        if system.here.DESTROY_FORCES and identity.name in mountinfo.things():
            return "busy"
        self._run("zfs", "destroy", checked(identity.name))
        return "busy" if self._proven(identity, run) == "ours" else "done"

    def _keep_one(self, identity: Identity, run: str) -> str:
        verdict = self._proven(identity, run)
        if verdict != "ours":
            return verdict
        for argv in (("set", f"atomtx:kept={run}"), ("inherit", MARK)):
            done = self._run("zfs", *argv, identity.name)
            if not done.ok:
                raise done.error(f"cannot keep {identity.name}")
        return "done"


def checked(name: str) -> str:
    """Return a snapshot's name for `zfs destroy`; anything that could mean more is a bug."""
    dataset, at, snapshot = name.partition("@")
    # zfs-destroy(8): without "@" the dataset itself, "a,b" a list, "a%b" a range.
    if not dataset or not at or not snapshot or set("@,%") & set(snapshot) or name[0] == "-":
        raise AssertionError(f"not the name of one snapshot: {name!r}")
    return name


def _facts(line: str) -> DatasetFacts:
    name, kind, guid, mountpoint, canmount, mounted, keystatus = line.split("\t")
    return DatasetFacts(name, kind, guid, mountpoint, canmount, mounted == "yes", keystatus)


def _identities(text: str) -> dict[str, Identity]:
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for line in text.splitlines():
        name, prop, value, source = line.split("\t")
        found.setdefault(name, {})[prop] = (value, source)
    return {name: _identity(name, values) for name, values in found.items()}


def _identity(name: str, values: dict[str, tuple[str, str]]) -> Identity:
    mark, source = values[MARK]
    return Identity(
        name=name,
        guid=values["guid"][0],
        createtxg=values["createtxg"][0],
        creation_s=int(values["creation"][0]),
        mark=mark if source == "local" else None,
    )


def _arguments(identity: Identity) -> tuple[str, str, str]:
    # Lua's integers in ZFS are signed 64-bit numbers.
    guid, txg = (
        n - 2**64 if n >= 2**63 else n for n in map(int, (identity.guid, identity.createtxg))
    )
    return checked(identity.name), f"g{guid}", f"t{txg}"


def _verdict(answer: str) -> str:
    if not answer.startswith("error "):
        return answer
    number = int(answer.removeprefix("error "))
    if number in (_EBUSY, _EEXIST):  # used, or cloned
        return "busy"
    raise EffectError(f"cannot destroy or keep a snapshot: ZFS answered error {number}")


def _says_absent(line: str) -> bool:
    return any(text in line for text in _ABSENT)


def _check_length(snapshots: Sequence[str]) -> None:
    # One command must hold every name of a pool, or the snapshots would not be of one moment.
    size = sum(len(name.encode()) + 9 for name in snapshots)
    if size > system.here.MAX_ARGUMENT_BYTES:
        raise EffectError(
            f"{len(snapshots)} datasets are too many for one `zfs snapshot` command, "
            "and two commands would not be one moment",
            hint="make two jobs, or leave datasets out with --exclude",
        )


def _hint(stderr: str) -> str | None:
    if "out of space" in stderr:
        return "the pool has no room for a snapshot; free some, or lower a refreservation"
    if "permission denied" in stderr:
        return "run atomtx as root"
    if "dataset does not exist" in stderr:
        return "it was destroyed or renamed a moment ago; try again"
    return None

"""
ZFS: find datasets; take, prove, hold, release, keep and destroy snapshots.

Each function starts one `zfs` process, whatever the number of datasets, and more where a command
cannot hold all of their names; only what is one moment must be one command.  Each effect is
idempotent, and none is believed for its exit status: whoever calls it probes what is there.
The commands inherit lock F, so that a recovery waits for those of a killed front end.

Sources: zfs-snapshot(8), zfs-hold(8), zfs-program(8); what OpenZFS 2.3.9 printed on Linux 6.12.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .. import process, system
from ..errors import EffectError, UserError
from ..mounts import mountinfo
from ..names import COPIED, KEPT_MARK, MARK, TRANSIENT_MARK, pool_of
from ..plan import DatasetFacts, Pool
from .kind import Identity, Kept

_SCRIPT = Path(__file__).with_name("destroy.lua")
_PRUNE = Path(__file__).with_name("prune.lua")
_PROVING = f"guid,createtxg,creation,{MARK}"
_PRUNED_AT_ONCE = 500  # in one transaction group; a pool does nothing else as long as it lasts
_ABSENT = ("dataset does not exist", "snapshot does not exist", "no such pool")
# The last line of a `zfs holds` that found none of its snapshots (zfs_main.c, zfs_do_holds).
_NONE_FOUND = "no datasets available"
_SOME_ABSENT = 1  # the exit status; 2 is usage, and a shell's are 126 and more
_EBUSY, _EEXIST = 16, 17
# Of what `zfs destroy` says where a snapshot is used (zfs_main.c, libzfs_dataset.c): "dataset is
# busy", "snapshot is cloned", "snapshot has dependent clones", "it's being held".
_USED = ("busy", "clone", "held")
_POOL_COLUMNS = 3
_MARK_COLUMNS = 2
_FACTS = 6  # columns of a dataset beside its name
_ROOM_BESIDE = 1 << 17  # bytes of a command that are not names: options and the environment
_T = TypeVar("_T")


def pools_for(names: Iterable[str], pools: Callable[[], list[Pool]]) -> list[Pool]:
    """
    Return the imported *pools*, which are listed for the sake of *names*.

    Raises UserError for a name that can only be a dataset's, on a machine without ZFS.
    """
    try:
        return pools()
    except process.NotInstalledError as exc:
        name = next((name for name in names if not name.startswith("/")), None)
        if name is None:
            raise
        raise UserError(
            f"there is no dataset {name}: {exc.message}",
            hint="no job has that name either; a directory is named by its whole path, from /",
        ) from exc


class Zfs:
    """The `zfs` and `zpool` commands; *lock* is the descriptor of F that they inherit."""

    _of = ""  # whose they are, in words; of this machine it goes without saying
    _hint = "`atomtx doctor` tells what is missing"

    def __init__(self, lock: int | None = None) -> None:
        self._locks = () if lock is None else (lock,)

    def _run(self, *argv: str) -> process.Completed:
        return process.run(argv, pass_fds=self._locks)

    # -- looking ---------------------------------------------------------------------------

    def pools(self) -> list[Pool]:
        """Return the imported pools."""
        done = self._run("zpool", "list", "-Hp", "-o", "name,guid,health")
        if not done.ok:
            raise done.error(f"cannot list the pools{self._of}", hint=self._hint)
        lines = [line.split("\t") for line in lines_of(done.stdout)]
        return [Pool(*words) for words in lines if len(words) == _POOL_COLUMNS]

    def datasets(self, pool: str, *, may_go: bool = False) -> list[DatasetFacts]:
        """
        Return the file systems and volumes of a pool, parents first.

        If it *may_go*, of one that was exported since it was listed there are none.  Raises
        EffectError where a mountpoint makes them unreadable: none is left out for that.
        """
        columns = "name,type,guid,mountpoint,canmount,mounted,keystatus"
        done = self._run("zfs", "list", "-Hp", "-r", "-t", "filesystem,volume", "-o", columns, pool)
        if not done.ok:
            if may_go and all(each.name != pool for each in self.pools()):
                return []
            raise done.error(f"cannot list the datasets of pool {pool}")
        return _facts(done.stdout, pool)

    def identities(self, snapshots: Collection[str]) -> dict[str, Identity]:
        """Return what each snapshot is; one that is absent is absent from the answer."""
        found: dict[str, Identity] = {}
        for part in _parted(snapshots):
            found |= self._identities(part)
        return found

    def _identities(self, snapshots: Collection[str]) -> dict[str, Identity]:
        done = self._run(
            "zfs", "get", "-Hp", "-o", "name,property,value,source", _PROVING, *snapshots
        )
        said = [line for line in lines_of(done.stderr) if line.strip()]
        strange = [line for line in said if not says_absent(line)]
        found = _identities(done.stdout)
        # One line for each that is absent; a command that was killed says nothing of the others.
        if strange or len(found) + len(said) < len(set(snapshots)):
            said_last = strange[0] if strange else f"`zfs get` ended with status {done.status}"
            raise EffectError(f"cannot look at the snapshots: {said_last}")
        return found

    def marked(self, pools: Collection[str], *, mark: str = MARK) -> list[tuple[str, str]]:
        """Return (snapshot, run id) of every snapshot of *pools* that carries a mark of its own."""
        if not pools:
            return []
        done = self._run(
            "zfs", "get", "-Hp", "-r", "-t", "snapshot", "-s", "local", "-o", "name,value", mark,
            *pools,
        )  # fmt: skip
        if not done.ok:
            raise done.error("cannot look for marked snapshots")
        lines = [line.split("\t") for line in lines_of(done.stdout)]
        # Another value, which whoever may set user properties may have set, is no run's.
        return [(words[0], words[1]) for words in lines if len(words) == _MARK_COLUMNS]

    def sizes(self, snapshots: Collection[str]) -> dict[str, int]:
        """Return the bytes that the destruction of each alone would free; none of an absent one."""
        used = ("sizes", "zfs", "get", "-Hp", "-o", "name,value", "used")
        done = [self._look(*used, *part) for part in _parted(snapshots)]
        pairs = (line.split("\t") for each in done for line in lines_of(each.stdout))
        return {name: int(value) for name, value in pairs}

    def snapshots(self, pools: Collection[str]) -> list[Identity]:
        """Return every snapshot of *pools*; of a large pool that takes a while."""
        if not pools:
            return []
        done = self._run(
            "zfs", "get", "-Hp", "-r", "-t", "snapshot", "-o", "name,property,value,source",
            _PROVING, *sorted(pools),
        )  # fmt: skip
        if not done.ok:
            raise done.error("cannot list the snapshots")
        return list(_identities(done.stdout).values())

    def kept(self, datasets: Collection[str]) -> list[Kept]:
        """
        Return all snapshots of *datasets*, theirs alone, whoever took them.

        A dataset that is gone meanwhile has none.
        """
        return [each for part in _parted(datasets) for each in self._kept_of(part)]

    def _kept_of(self, datasets: Collection[str]) -> list[Kept]:
        properties = f"guid,createtxg,creation,userrefs,clones,{KEPT_MARK},{TRANSIENT_MARK}"
        done = self._run(
            "zfs", "get", "-Hp", "-d", "1", "-t", "snapshot", "-o", "name,property,value,source",
            properties, *datasets,
        )  # fmt: skip
        if not done.ok and not all(map(says_absent, lines_of(done.stderr) or [""])):
            raise done.error("cannot list the snapshots")
        return [_kept(name, found) for name, found in _by_name(done.stdout).items()]

    def locked(self, datasets: Collection[str]) -> list[str]:
        """Return those datasets whose key is not loaded."""
        found = []
        for part in _parted(datasets):
            done = self._run("zfs", "get", "-Hp", "-o", "name,value", "keystatus", *part)
            if not done.ok:
                raise done.error("cannot look at the keys")
            pairs = (line.split("\t") for line in lines_of(done.stdout))
            found += [name for name, value in pairs if value == "unavailable"]
        return found

    def holders(self, snapshots: Collection[str]) -> dict[str, list[str]]:
        """Return the tags of the holds on each snapshot; one that is absent has none."""
        done = [self._look("holds", "zfs", "holds", "-H", *part) for part in _parted(snapshots)]
        lines = (line for each in done for line in lines_of(each.stdout) if "\t" in line)
        tags: dict[str, list[str]] = {}
        for name, tag, *_ in (line.split("\t") for line in lines):
            tags.setdefault(name, []).append(tag)
        return tags

    def clones(self, snapshots: Collection[str]) -> dict[str, list[str]]:
        """Return the clones of each snapshot that has some; one that is absent has none."""
        of_each = ("clones", "zfs", "get", "-Hp", "-o", "name,value", "clones")
        done = [self._look(*of_each, *part) for part in _parted(snapshots)]
        pairs = (line.split("\t") for each in done for line in lines_of(each.stdout))
        return {name: value.split(",") for name, value in pairs if value not in ("", "-")}

    def _look(self, what: str, *argv: str) -> process.Completed:
        """Run a command that prints what it finds and complains of snapshots that are absent."""
        done = self._run(*argv)
        if failure := self._failure(done):
            raise EffectError(f"cannot look at the {what}{self._of}: {failure}")
        return done

    def _failure(self, done: process.Completed) -> str:
        """Return why a look failed; empty where it did not, or for what is absent alone."""
        said = self._said(done)
        strange = [line for line in said if not says_absent(line) and line != _NONE_FOUND]
        # One that was killed, or failed without a word, says nothing of those that it left out.
        if strange or not (done.ok or (said and done.status == _SOME_ABSENT)):
            return (strange or [done.last_line()])[0]
        return ""

    def _said(self, done: process.Completed) -> list[str]:
        """Return what a command complained of."""
        return [line for line in lines_of(done.stderr) if line.strip()]

    # -- changing --------------------------------------------------------------------------

    def take(
        self, snapshots: Sequence[str], *, run: str, transient: bool = False
    ) -> EffectError | None:
        """
        Take snapshots of one pool in one transaction group, each marked with *run*.

        With *transient* they get that mark as well.  All or none.  Returns what the command
        complained of; only a probe tells what is there.
        """
        _check_length(snapshots)
        marks = (MARK, TRANSIENT_MARK) if transient else (MARK,)
        options = [word for mark in marks for word in ("-o", f"{mark}={run}")]
        done = self._run("zfs", "snapshot", *options, *snapshots)
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
            done = [self._run("zfs", verb, tag, *part) for part in _parted(left)]
            failed = next((each for each in done if not each.ok), None)
            if failed is None:
                return
            held = self.holders(snapshots)
            left = [name for name in left if (tag in held.get(name, ())) is not wanted]
            if left and last:
                raise failed.error(f"cannot {verb} {left[0]}")

    def destroy(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Destroy the snapshots that are still these, of one pool, in one transaction group or few.

        The channel program compares guid, createtxg and mark in the same transaction, so nothing
        can come in between.  Returns a verdict a name: "done", "absent", "foreign" (another
        thing has the name), "unmarked", or "busy".
        """
        return self._judge("destroy", identities, run, self._destroy_one)

    def keep(self, identities: Sequence[Identity], *, run: str) -> dict[str, str]:
        """
        Change the mark of the snapshots that are still these from run to kept; as `destroy`.

        One that was kept by this run already is "done".
        """
        return self._judge("keep", identities, run, self._keep_one)

    def _judge(
        self,
        verb: str,
        identities: Sequence[Identity],
        run: str,
        one: Callable[[Identity, str], str],
    ) -> dict[str, str]:
        verdicts: dict[str, str] = {}
        for part in _parted_by(identities, _arguments):
            verdicts |= self._judge_part(verb, part, run, one)
        return verdicts

    def _judge_part(
        self,
        verb: str,
        identities: Sequence[Identity],
        run: str,
        one: Callable[[Identity, str], str],
    ) -> dict[str, str]:
        pool = pool_of(identities[0].name)
        arguments = [word for each in identities for word in _arguments(each)]
        done = self._run(
            "zfs", "program", "-j", "-t", "100000000", "-m", "100000000", pool, str(_SCRIPT),
            verb, run, *arguments,
        )  # fmt: skip
        if not done.ok:
            return {each.name: one(each, run) for each in identities}
        answers = json.loads(done.stdout)["return"]
        return {each.name: _verdict(answers[str(n)]) for n, each in enumerate(identities, 1)}

    def prune(
        self, snapshots: Sequence[Kept], *, bookmark: bool, copies: bool = False
    ) -> Iterator[dict[str, str]]:
        """
        Destroy kept snapshots of one pool that are still these, and leave bookmarks of them.

        Proof, bookmark and destruction are of one transaction group, of some hundreds at once.
        Yields verdicts by name as they are known, of all in the end; between two, nothing is at
        work: those of `destroy`, "no-bookmark" where it was destroyed and none was left of it, and
        "error" with a number, or with ZFS' words.  Idempotent.  With *copies* the mark may have
        been received; one that is transient must still bear that mark as well.
        """
        for start in range(0, len(snapshots), _PRUNED_AT_ONCE):
            part = snapshots[start : start + _PRUNED_AT_ONCE]
            yield from self._prune(part, bookmark, copies)

    def _prune(
        self, snapshots: Sequence[Kept], bookmark: bool, copies: bool
    ) -> Iterator[dict[str, str]]:
        how = "r" if copies else "k"
        words = [
            word
            for each in snapshots
            for word in (*_arguments(each), ("t" if each.is_transient else how) + each.keeper)
        ]
        done = self._run(
            "zfs", "program", "-j", "-t", "100000000", "-m", "100000000",
            pool_of(snapshots[0].name), str(_PRUNE), "bookmark" if bookmark else "none", *words,
        )  # fmt: skip
        if not done.ok:
            for each in snapshots:
                yield {each.name: self._prune_one(each, bookmark, copies)}
            return
        answers = json.loads(done.stdout)["return"]
        yield {each.name: _in_use(answers[str(n)]) for n, each in enumerate(snapshots, 1)}

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
        done = self._run("zfs", "destroy", checked(identity.name))
        if self._proven(identity, run) != "ours":
            return "done" if self._has_worked(done, identity.name) else "absent"
        if _says_used(done, identity.name):
            return "busy"
        raise done.error(f"cannot destroy {identity.name}")

    def _has_worked(self, done: process.Completed, name: str) -> bool:
        """Tell whether it is by a command that a snapshot is gone, and not with its whole pool."""
        return done.ok or any(pool.name == pool_of(name) for pool in self.pools())

    def _keep_one(self, identity: Identity, run: str) -> str:
        verdict = self._proven(identity, run)
        if verdict == "unmarked" and self._is_kept(identity.name, run):
            return "done"
        if verdict != "ours":
            return verdict
        for argv in (("set", f"{KEPT_MARK}={run}"), ("inherit", MARK)):
            done = self._run("zfs", *argv, identity.name)
            if not done.ok:
                raise done.error(f"cannot keep {identity.name}")
        return "done"

    def _prune_one(self, each: Kept, bookmark: bool, copies: bool) -> str:
        dataset = each.name.partition("@")[0]
        found = {kept.name: kept for kept in self.kept([dataset])}.get(each.name)
        if found is None:
            return "absent"
        if (found.guid, found.createtxg) != (each.guid, each.createtxg):
            return "foreign"
        if each.keeper and (found.keeper != each.keeper or (found.is_copy and not copies)):
            return "unmarked"
        if each.is_transient and not found.is_transient:
            return "unmarked"
        if found.holds or found.clones:
            return "busy"
        if system.here.DESTROY_FORCES and each.name in mountinfo.things():
            return "busy"
        beside = checked(each.name).replace("@", "#")
        left = bookmark and self._run("zfs", "bookmark", each.name, beside).ok
        done = self._run("zfs", "destroy", checked(each.name))
        if self.identities([each.name]):
            if left:  # else the next try could make none, and would tell that none was left
                self._run("zfs", "destroy", beside)
            if _says_used(done, each.name):
                return "busy"
            return f"error: {done.last_line().rpartition(': ')[2]}"
        if not self._has_worked(done, each.name):
            return "absent"
        return "done" if left or not bookmark else "no-bookmark"

    def _is_kept(self, name: str, run: str) -> bool:
        done = self._run("zfs", "get", "-Hp", "-o", "value,source", KEPT_MARK, name)
        return done.ok and done.stdout == f"{run}\tlocal\n"


def checked(name: str) -> str:
    """Return a snapshot's name for `zfs destroy`; anything that could mean more is a bug."""
    dataset, at, snapshot = name.partition("@")
    # zfs-destroy(8): without "@" the dataset itself, "a,b" a list, "a%b" a range.
    if not dataset or not at or not snapshot or set("@,%") & set(snapshot) or name[0] == "-":
        raise AssertionError(f"not the name of one snapshot: {name!r}")
    return name


def lines_of(text: str) -> list[str]:
    """Return the lines that a command printed, but for empty ones."""
    # Not splitlines(): who sets a property may put a line separator of Unicode into it.
    return [line for line in text.split("\n") if line]


def _facts(text: str, pool: str) -> list[DatasetFacts]:
    """Read the datasets of a pool; of their columns the mountpoint alone may hold any character."""
    found: dict[str, DatasetFacts] = {}
    for line in lines_of(text):
        name, *words = line.split("\t")
        # The end of a line in a mountpoint can make another line, which could even be a whole one.
        if len(words) < _FACTS or name in found:
            raise EffectError(
                f"cannot read the datasets of pool {pool}: {line!r} is no line of them",
                hint="does a mountpoint hold the end of a line? "
                f"`zfs get -r mountpoint {pool}` shows them; set another one",
            )
        kind, guid, *mountpoint, canmount, mounted, keystatus = words
        found[name] = DatasetFacts(
            name, kind, guid, "\t".join(mountpoint), canmount, mounted == "yes", keystatus
        )
    return list(found.values())


def _by_name(text: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Return for each name its properties, each with its source."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for line in lines_of(text):
        name, *rest = line.split("\t")
        if len(rest) != 3:  # whoever may set user properties may set one to this
            raise EffectError(
                f"cannot read the properties of a snapshot: {line!r} is no line of them",
                hint="does one of them hold a tab, or the end of a line?",
            )
        prop, value, source = rest
        found.setdefault(name, {})[prop] = (value, source)
    return found


def _identities(text: str) -> dict[str, Identity]:
    return {name: _identity(name, values) for name, values in _by_name(text).items()}


def _kept(name: str, values: Mapping[str, tuple[str, str]]) -> Kept:
    keeper, source = values[KEPT_MARK]
    is_local = source == "local"
    clones = values["clones"][0]
    return Kept(
        name=name,
        guid=values["guid"][0],
        createtxg=values["createtxg"][0],
        creation_s=int(values["creation"][0]),
        keeper=keeper if source in ("local", "received") else "",
        is_copy=source == "received" or keeper.startswith(COPIED),
        is_transient=is_local and values[TRANSIENT_MARK] == (keeper, "local"),
        holds=int(values["userrefs"][0]),
        clones=() if clones in ("", "-") else tuple(clones.split(",")),
    )


def _identity(name: str, values: dict[str, tuple[str, str]]) -> Identity:
    mark, source = values[MARK]
    return Identity(
        name=name,
        guid=values["guid"][0],
        createtxg=values["createtxg"][0],
        creation_s=int(values["creation"][0]),
        mark=mark if source == "local" else None,
    )


def _arguments(identity: Identity | Kept) -> tuple[str, str, str]:
    # Lua's integers in ZFS are signed 64-bit numbers.
    guid, txg = (
        n - 2**64 if n >= 2**63 else n for n in map(int, (identity.guid, identity.createtxg))
    )
    return checked(identity.name), f"g{guid}", f"t{txg}"


def _in_use(answer: str) -> str:
    """Return "busy" for the errors that mean it: used, or cloned."""
    return "busy" if answer in (f"error {_EBUSY}", f"error {_EEXIST}") else answer


def _says_used(done: process.Completed, name: str) -> bool:
    """Tell whether a snapshot was not destroyed because it is in use; so also without a word."""
    said = done.stderr.replace(name, "")
    return not said.strip() or any(word in said for word in _USED)


def _verdict(answer: str) -> str:
    answer = _in_use(answer)
    if not answer.startswith("error "):
        return answer
    number = int(answer.removeprefix("error "))
    raise EffectError(f"cannot destroy or keep a snapshot: ZFS answered error {number}")


def says_absent(line: str) -> bool:
    return any(text in line for text in _ABSENT)


def _parted(names: Iterable[str]) -> Iterator[list[str]]:
    """Part *names* so that each part fits into one command; none of nothing."""
    return _parted_by(names, lambda name: (name,))


def _parted_by(things: Iterable[_T], words_of: Callable[[_T], Iterable[str]]) -> Iterator[list[_T]]:
    """
    Part *things* so that the words of each part fit into one command.

    execve(2): a quarter of the stack's limit has room for all words and variables.
    """
    room = min(system.here.MAX_ARGUMENT_BYTES, os.sysconf("SC_ARG_MAX") - _ROOM_BESIDE)
    part: list[_T] = []
    size = 0
    for thing in things:
        needed = sum(len(os.fsencode(word)) + 9 for word in words_of(thing))  # a NUL, a pointer
        if part and size + needed > room:
            yield part
            part, size = [], 0
        part.append(thing)
        size += needed
    if part:
        yield part


def _check_length(snapshots: Sequence[str]) -> None:
    # One command must hold every name of a pool, or the snapshots would not be of one moment.
    if len(list(_parted(snapshots))) > 1:
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

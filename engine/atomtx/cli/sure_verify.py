"""`atomtx sure verify-backup`: restore what a run saved, and compare it with a generation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import history, journalfile, plan, restoring, statedir, verifying
from ..errors import ClientError, ExitStatus, UserError
from ..interrupts import Interrupts
from ..states import Outcome
from . import jobs, render
from . import sure_options as options
from . import sure_words as words

if TYPE_CHECKING:
    from ..integrity.checking import Copy
    from ..integrity.compare import Finding
    from ..integrity.store import Generation


@dataclass(frozen=True)
class _Tree:
    """A live path of the run, and the generation that what was restored of it is compared with."""

    path: str
    database: Path
    generation: Generation
    is_of_run: bool
    leave_out: frozenset[str]


@dataclass(frozen=True)
class _Asked:
    run: history.Run
    plan: plan.Plan
    backups: tuple[history.Backup, ...]  # to restore
    trees: tuple[_Tree, ...]
    lost: tuple[str, ...]  # paths of which nothing was saved


class Verification:
    """A verification at work."""

    def __init__(self, show: render.Reporter, given: dict[str, Any], *, as_json: bool) -> None:
        self._show = show
        self._given = given
        self._as_json = as_json
        self._ignored = options.ignored(given["ignore"])
        self._state = statedir.find()
        self._differences = self._not_compared = 0

    def run(self, prefix: str) -> ExitStatus:
        asked = self._asked(prefix)
        base = self._base(asked)
        restoring.usable(asked.plan.client, asked.run.id)
        interrupts = Interrupts().install()
        with self._directories(base) as (to, cache, lock):
            keeps = self._keeps(asked.run.client, to)
            self._tell(asked, keeps)
            client = self._uncached(asked, cache)
            self._show.step(f"restoring run {asked.run.id} with {client.name} to {to}")
            trouble = restoring.restore(
                client, asked.backups, to, interrupts, below=asked.plan.below, lock=lock
            )
            self._judge(asked, to, trouble)
            with interrupts.at_once():
                told = [self._compare(asked, tree, to, keeps) for tree in asked.trees]
        return self._end(asked, told, trouble)

    def _uncached(self, asked: _Asked, cache: Path) -> plan.ClientPlan:
        client = asked.plan.client
        own = restoring.uncached(client, asked.run.id, cache)
        if own is None:
            self._show.warn(
                f"{client.name} may read from its cache what the repository has lost: "
                "its wrapper takes no other one"
            )
        return own or client

    def _judge(self, asked: _Asked, to: Path, trouble: str | None) -> None:
        """Say what went wrong with the restore; ClientError where it brought back nothing."""
        if trouble is None:
            return
        if not any((to / verifying.place(asked.plan, t.path)).is_dir() for t in asked.trees):
            raise ClientError(f"run {asked.run.id} could not be restored: {trouble}")
        self._show.warn(f"{trouble}; what was restored is compared")

    def _end(
        self, asked: _Asked, told: Sequence[dict[str, Any]], trouble: str | None
    ) -> ExitStatus:
        status = options.status(
            self._differences + bool(trouble), self._not_compared + len(asked.lost)
        )
        kept = self._given["target"]
        self._show.result(
            {
                "run": asked.run.id,
                "client": asked.run.client,
                "target": kept and kept.absolute(),
                "restore_failed": trouble,
                "trees": told,
                "not_saved": asked.lost,
                "differences": self._differences,
                "not_compared": self._not_compared,
                "exit_status": int(status),
            }
        )
        return status

    # -- what is asked for ---------------------------------------------------------------------

    def _asked(self, prefix: str) -> _Asked:
        journal = self._state / journalfile.NAME
        run = history.chosen(journal, prefix, saved_only=True)
        verifying.check(run)
        made = self._plan(journal, run)
        rows = history.backups(journal, run.id)
        paths = self._paths(verifying.trees(made))
        held = {path: verifying.holding(made, path, rows) for path in paths}
        saved = {p: row for p, row in held.items() if row and row.outcome != Outcome.FAILED}
        if not saved:
            raise UserError(f"run {run.id} saved nothing of {', '.join(paths)}")
        backups = tuple(row for row in rows if row in saved.values())
        if not all(restoring.commands(made.client, row, "/", below=made.below) for row in backups):
            raise UserError(
                f"run {run.id} cannot be restored by atomtx: its client is a command of your own",
                hint="restore it yourself, then `atomtx sure check DIR --of PATH`",
            )
        lost = tuple(path for path in paths if path not in saved)
        return _Asked(run, made, backups, self._trees(run, made, tuple(saved)), lost)

    def _plan(self, journal: Path, run: history.Run) -> plan.Plan:
        try:
            made = plan.from_json(history.plan(journal, run.id))
        except (KeyError, TypeError, ValueError) as exc:  # another release's plan
            raise UserError(f"this atomtx cannot read the plan of run {run.id}") from exc
        now = jobs.sources(self._given["config_path"]).get(run.job, {})
        client = made.client
        found = tuple((name, now.get(name, source)) for name, source in client.credentials)
        return replace(made, client=replace(client, credentials=found))

    def _paths(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        of, single = self._given["of"], ("against", "database")
        if of is not None:
            names = (os.path.abspath(of), os.path.realpath(of))
            paths, others = tuple(path for path in paths if path in names), paths
            if not paths:
                raise UserError(f"{of} is no path of the run", hint=f"it has {', '.join(others)}")
        for name in single:
            if len(paths) > 1 and self._given[name] is not None:
                raise UserError(
                    f"--{name} goes with one path, and the run has {len(paths)}",
                    hint=f"name one with --of: {', '.join(paths)}",
                )
        return paths

    def _trees(
        self, run: history.Run, made: plan.Plan, paths: tuple[str, ...]
    ) -> tuple[_Tree, ...]:
        """Return what is compared with what; UserError for a path of which no generation tells."""
        found: dict[str, tuple[Path, Generation]] = {}
        for path in paths:
            file, _ = options.place(Path(path), None, self._given["database"])
            chosen = self._generation(file, run)
            if chosen:
                found[path] = (file, chosen)
            elif not self._is_told_above(path, found):
                raise UserError(
                    f"there is no integrity database of {path}",
                    hint=f"`atomtx sure scan {path}` makes one",
                )
        own = {*found, *(set(verifying.trees(made)) - set(paths))}
        return tuple(
            _Tree(
                path,
                file,
                generation,
                verifying.is_of_run(generation, run.id),
                verifying.left_out(path, own, made.excludes),
            )
            for path, (file, generation) in found.items()
        )

    def _generation(self, file: Path, run: history.Run) -> Generation | None:
        from ..integrity import store

        with store.looking(file) as db:
            generations, number = db.generations() if db else [], self._given["against"]
            if db is None or not generations:
                return None
            return (
                verifying.choose(generations, run.id) if number is None else db.generation(number)
            )

    def _is_told_above(self, path: str, found: dict[str, tuple[Path, Generation]]) -> bool:
        """Tell whether the generation of a tree above has also what is below *path*."""
        from ..integrity import store

        above = verifying.inside(path, found)
        if above is None:
            return False
        file, generation = found[above]
        with store.reading(file) as db:
            return db.has_below(os.fsencode(verifying.below(path, above)), generation.id)

    # -- before --------------------------------------------------------------------------------

    def _keeps(self, client: str, to: Path) -> verifying.Keeps:
        if self._given["strict"]:
            return verifying.ALL
        return verifying.keeps(client, onto_xfs=restoring.is_on_xfs(to))

    def _tell(self, asked: _Asked, keeps: verifying.Keeps) -> None:
        """Say what is not compared, and what is of another moment."""
        run, show = asked.run, self._show
        if run.outcome == Outcome.PARTIAL:
            show.note(f"the backup is partial, what it lacks is missing: {run.reason}")
        if keeps.words:
            show.note(f"{run.client} does not keep {keeps.words}: not compared")
        for path in asked.lost:
            show.warn(f"{path} was not saved: it is not compared")
        for tree in asked.trees:
            if tree.leave_out:
                show.note(f"not compared in {tree.path}: {', '.join(sorted(tree.leave_out))}")
            if not tree.is_of_run:
                show.note(words.of_another_moment(tree.path, tree.generation, run))

    def _base(self, asked: _Asked) -> Path:
        """Return where to restore to, or where a directory is made for it; there is room."""
        target: Path | None = self._given["target"]
        base = target.absolute() if target else restoring.temporary_base(self._state)
        if target:
            restoring.check_target(base)
        for line in restoring.sweep(restoring.temporary_base(self._state)):
            self._show.note(line)
        self._check_room(asked, base)
        return base

    @contextmanager
    def _directories(self, base: Path) -> Iterator[tuple[Path, Path, int]]:
        """Have where to restore to, where the client's cache is to be, and the lock on it."""
        target = self._given["target"]
        place = restoring.temporary_base(self._state) if target else base
        with restoring.temporary(place, self._show.warn) as (ours, lock):
            files = restoring.make_target(base if target else ours / "restored")
            yield files, ours / "cache", lock

    def _check_room(self, asked: _Asked, base: Path) -> None:
        if self._given["no_space_check"]:
            return
        wanted, free = verifying.needed(asked.backups), restoring.free_room(base)
        lacking = verifying.lacks(wanted, free)
        if lacking:
            raise UserError(
                f"no room in {base}: {words.room(wanted)} to restore, {words.room(free)} free",
                hint="say --target DIR for another disk; where much of it is holes, "
                "--no-space-check",
            )

    # -- comparing -----------------------------------------------------------------------------

    def _compare(
        self, asked: _Asked, tree: _Tree, to: Path, keeps: verifying.Keeps
    ) -> dict[str, Any]:
        from ..integrity import checking, compare, store

        root, client = to / verifying.place(asked.plan, tree.path), asked.plan.client.name
        self._show.step(words.comparing(tree.path, tree.generation, is_of_run=tree.is_of_run))
        told = {
            "path": tree.path,
            "database": tree.database,
            "read_from": os.fsdecode(tree.generation.path),
            "is_of_run": tree.is_of_run,
        }
        if not root.is_dir():
            self._found(tree, compare.Finding(compare.Kind.MISSING, b""))
            self._differences += 1
            return {**told, "generation": tree.generation.id, "differences": 1}
        with store.reading(tree.database) as db:
            result = checking.Check(
                db,
                tree.generation.id,
                ignore=self._ignored | compare.ELSEWHERE_TOO,
                found=lambda finding: self._found(tree, finding),
                progress=words.ticker(self._show, tree.generation.entries),
                copy=_copy(tree, client, keeps),
            ).run(root)
        self._differences += result.differences
        self._not_compared += result.not_compared
        self._show.done(f"{tree.path}: {words.checked(result)}")
        return {**told, **asdict(result)}

    def _found(self, tree: _Tree, finding: Finding) -> None:
        """Print a finding with its live path: a run may have several trees."""
        path = os.path.join(os.fsencode(tree.path), finding.path).rstrip(b"/") or b"/"
        words.tell(self._show, replace(finding, path=path), as_json=self._as_json)


def _copy(tree: _Tree, client: str, keeps: verifying.Keeps) -> Copy:
    from ..integrity.checking import Copy

    names = {*tree.leave_out, verifying.HOUSEKEEPING} if client == "xfsdump" else tree.leave_out
    ignored = verifying.ignored_of_root(client, tree.path)
    return Copy(frozenset(map(os.fsencode, names)), ignored, keeps.of)

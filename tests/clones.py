"""Played pools here and at another machine, and clones between them; the plan is a real one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atomtx import cloning, locks
from atomtx.cloner import Cloner
from atomtx.cloning import Terms
from atomtx.convention import Pattern
from atomtx.errors import Interrupted
from atomtx.executor import Tell
from atomtx.interrupts import Interrupts
from atomtx.journal import Journal
from atomtx.plan import Request
from atomtx.settling import front
from atomtx.statedir import RunFolder
from atomtx.volumes.ends import End
from tests.faketoken import BLOCKS
from tests.scene import Ended, Scene
from tests.standin import write_program

PATTERN = Pattern.parse("s-%Y%m%d%H%M%S")
SETS = ("tank/a", "tank/enc")
CHILD = "tank/a/b c"
HERE, NAS = "backup/here", "root@nas:backup/here"
POOLS = {"tank": "guid of tank", "backup": "guid of backup"}
DATASETS = dict.fromkeys(("tank", *SETS, CHILD), "filesystem")
KEEPER = "0123456789abcdef"
FAR = {"pools": {"backup": "guid of far"}, "txg": 1, "guid": 1, "now": 1, "facts": {}}


class Field:
    """Pools here and at another machine, with datasets that have snapshots that are kept."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.far = scene.home / "far"
        self.far.mkdir()
        write_program(scene.home / "bin" / "ssh", "fakessh", "sys.argv[1:]")
        scene.play(
            pools=dict(POOLS),
            datasets={**DATASETS, "backup": "filesystem", HERE: "filesystem"},
            facts={"tank/enc": {"encryption": "aes-256-gcm"}},
            bookmarks={},
        )
        tops = {"backup": "filesystem", HERE: "filesystem"}
        self.play_far(**FAR, datasets=tops, snapshots={}, bookmarks={}, faults={})
        self.count = 0

    # -- what there is ---------------------------------------------------------------------

    def pool(self, target: str = HERE) -> dict[str, Any]:
        """Return the pools of a target's machine."""
        found: dict[str, Any] = json.loads((self.home(target) / "pool.json").read_text())
        return found

    def home(self, target: str = HERE) -> Path:
        return self.far if ":" in target else self.scene.home

    def play(self, **values: Any) -> None:
        """Change the pools of this machine, once nobody is at work on them."""
        self.settle()
        self.scene.play(**values)

    def play_far(self, **values: Any) -> None:
        path = self.far / "pool.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | values))

    def settle(self) -> None:
        """Wait for the commands of a front end that was killed."""
        locked = list(self.scene.state.glob("runs/*/front.lock"))
        assert locks.wait_until(lambda: not any(map(locks.is_held, locked)), 30, step_s=0.01)

    def save(self) -> Callable[[], None]:
        """Return what brings both machines' pools back to what they are now."""
        self.settle()
        files = [home / "pool.json" for home in (self.scene.home, self.far)]
        texts = [file.read_text() for file in files]

        def restore() -> None:
            self.settle()
            for file, text in zip(files, texts, strict=True):
                file.write_text(text)
            self.forget()

        return restore

    def forget(self) -> None:
        """Begin to count anew."""
        for home in (self.scene.home, self.far):
            for name in ("zfs.log", "arrived.log"):
                (home / name).write_text("")

    def snap(self, *datasets: str, kept: bool = True) -> None:
        """Take a snapshot of each dataset, with the mark; or a stranger's."""
        self.count += 1
        pool = self.scene.pool
        name = f"s-202611220000{self.count:02}" if kept else f"foreign{self.count}"
        pool["txg"] += 1
        for dataset in datasets or SETS:
            pool["guid"] += 1
            pool["snapshots"][f"{dataset}@{name}"] = {
                "guid": str(pool["guid"]),
                "createtxg": str(pool["txg"]),
                "creation": str(pool["now"] + self.count),
                "mark": None,
                "kept": KEEPER if kept else None,
                "holds": [],
            }
        self.play(**pool)

    def change(self, what: Callable[[dict[str, Any]], object]) -> None:
        """Change the pools of this machine behind the run's back."""
        pool = self.scene.pool
        what(pool)
        self.scene.play(**pool)

    # -- runs ------------------------------------------------------------------------------

    def clone(self, *targets: str, at: str = "", who: str = "front", **options: Any) -> Ended:
        """Plan and carry out in a front end of its own; *before* the latter, a change."""

        def carry_out(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
            made, steps = cloning.make(
                Request(options.get("datasets", SETS)),
                targets or (HERE,),
                pattern=options.get("pattern", PATTERN),
                terms=options.get("terms", Terms(compress=False)),
                here=End(),
                check=interrupts.check,
            )
            for note in made.notes:
                tell.warn(note)
            folder = RunFolder.of(self.scene.state, made.run).make()
            with front(folder) as lock:
                assert lock is not None
                run = journal.begin(made, steps)
                options.get("before", lambda: None)()
                ended.run = Cloner(journal, lock, interrupts, tell).advance(run)

        def work(journal: Journal, tell: Tell, interrupts: Interrupts, ended: Ended) -> None:
            try:
                carry_out(journal, tell, interrupts, ended)
            except Interrupted as exc:
                ended.interrupted = exc.message

        self.settle()
        return self.scene._in_front_end(work, {"at": at, "who": who})

    def cut_off(
        self,
        target: str = HERE,
        *,
        by: str = "signal",
        dataset: str = "tank/a",
        targets: tuple[str, ...] = (),
        **options: Any,
    ) -> Ended:
        """Have the first snapshot that is sent of a dataset cut off in mid-stream."""
        stall, end = {"send": f"stall {dataset}"}, {"receive": f"{by} {copy_of(dataset)}"}
        self.play(faults=stall | (end if target == HERE else {}))
        self.play_far(faults=end if target == NAS else {})
        ended = self.clone(*(targets or (target,)), **options)
        self.play(faults={})
        self.play_far(faults={})
        assert self.tokens(target) == [copy_of(dataset)], (self.scene.home / "log").read_text()
        return ended

    def recover(self, **options: Any) -> Ended:
        return self.scene.recover(**options)

    def run(self) -> dict[str, Any]:
        """Return the newest run of the journal."""
        return self.scene.rows("SELECT * FROM runs ORDER BY started_at DESC LIMIT 1")[0]

    # -- after -----------------------------------------------------------------------------

    def tokens(self, target: str = HERE) -> list[str]:
        facts = self.pool(target)["facts"]
        return [name for name, known in facts.items() if known.get("token")]

    def guids(self, dataset: str, target: str = HERE, *, kept: bool = False) -> list[str]:
        there = self.pool(target)["snapshots"].items()
        found = [s for n, s in there if n.partition("@")[0] == dataset and (s["kept"] or not kept)]
        return [s["guid"] for s in sorted(found, key=lambda s: int(s["createtxg"]))]

    def holds(self, target: str = HERE) -> dict[str, list[str]]:
        there = self.pool(target)["snapshots"].items()
        return {name: found["holds"] for name, found in there if found["holds"]}

    def is_whole(self, dataset: str, target: str = HERE) -> bool:
        """Tell whether a copy has all that is kept of its dataset."""
        return self.guids(copy_of(dataset), target) == self.guids(dataset, kept=True)

    def check_copies(
        self, target: str = HERE, *, datasets: tuple[str, ...] = SETS, held: bool = True
    ) -> None:
        """All copies are up to date, with marks; one hold a side, no token."""
        assert [d for d in datasets if not self.is_whole(d, target)] == []
        assert self.tokens(target) == []
        there = self.pool(target)["snapshots"]
        marks = {s["kept"] for n, s in there.items() if n.startswith(HERE)}
        assert marks <= {KEEPER, f"copy:{KEEPER}"}
        last = {dataset: self.newest(dataset) for dataset in datasets}
        tag = f"atomtx-clone:{target}:{self.pool(target)['pools']['backup']}"
        here = {name: [tag] for name, tags in self.holds().items() if tag in tags}
        assert here == {name: [tag] for name in last.values()}
        copies = {copy_of(d) + n.removeprefix(d): ["atomtx-clone"] for d, n in last.items()}
        found = self.holds(target)
        theirs = {name: tags for name, tags in found.items() if name.startswith("backup")}
        assert theirs == (copies if held else {})

    def newest(self, dataset: str) -> str:
        there = self.scene.pool["snapshots"]
        names = [n for n, s in there.items() if n.partition("@")[0] == dataset and s["kept"]]
        (*_, last) = sorted(names, key=lambda name: int(there[name]["createtxg"]))
        return str(last)

    def check_once(self, target: str = HERE, *, halves: int = 0) -> None:
        """Nothing arrived twice, not even a part; of *halves* the first had arrived before."""
        counts: Counter[tuple[str, str]] = Counter()
        for copy, guid, blocks in _logged(self.home(target) / "arrived.log"):
            counts[copy, guid] += blocks
        whole = len(counts) - halves
        assert Counter(counts.values()) == +Counter({BLOCKS: whole, BLOCKS // 2: halves})

    def sends(self) -> list[list[str]]:
        return [words for words in self.commands("send") if words[0] != "-nP"]

    def commands(self, verb: str = "", target: str = HERE) -> list[list[str]]:
        """Return the words of each `zfs` command of a kind; without one, of all programs."""
        found = _logged(self.home(target) / "zfs.log")
        return [argv[2:] for argv in found if argv[:2] == ["zfs", verb]] if verb else found


def _logged(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def copy_of(dataset: str) -> str:
    return f"{HERE}/{dataset.partition('/')[2]}"

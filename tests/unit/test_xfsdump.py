"""What xfsdump is told, what its lines mean, and its destinations; the real one: tests/xfs."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.clients import Backup, Dumper, End, Facts, Moment, Settings, dumps, load
from atomtx.clients.dumps import (
    MARK,
    DamagedError,
    Destination,
    Dump,
    next_turn,
    superseded,
    volume_name,
)
from atomtx.clients.xfsdump import Xfsdump
from atomtx.errors import ClientError, UserError
from atomtx.mounts import mountinfo
from atomtx.mounts.mountinfo import Entry
from atomtx.states import Outcome
from tests.dumps import ID, T0, UUID, a_dump, make_chain, put

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
TWO = Moment(("/home", "/srv"), "", AT, run="0123456789abcdef", job="nightly")
MADE = '{"dump": "home/x", "size": 4117088, "files": 21, "lost": null}'

# Of xfsdump 3.1.11, as it printed them.
WHOLE = """\
xfsdump: using file dump (drive_simple) strategy
xfsdump: version 3.1.11 (dump format 3.0)
xfsdump: level 0 dump of vm:/home
xfsdump: dump date: Sat Nov 21 18:45:41 2026
xfsdump: session id: 4397ab75-749c-4661-a71f-9c91fe470a5a
xfsdump: session label: "job home"
xfsdump: ino map phase 1: constructing initial dump list
xfsdump: ino map phase 2: skipping (no pruning necessary)
xfsdump: ino map phase 3: skipping (only one dump stream)
xfsdump: ino map construction complete
xfsdump: estimated dump size: 270120640 bytes
xfsdump: creating dump session media file 0 (media 0, file 0)
xfsdump: dumping ino map
xfsdump: dumping directories
xfsdump: dumping non-directory files
xfsdump: status at 18:45:42: 2/30 files dumped, 6.7% data dumped, 1 seconds elapsed
xfsdump: status at 18:45:46: 12/30 files dumped, 40.0% data dumped, 5 seconds elapsed
xfsdump: ending media file
xfsdump: media file size 270112816 bytes
xfsdump: dump size (non-dir files) : 270074280 bytes
xfsdump: dump complete: 5 seconds elapsed
xfsdump: Dump Status: SUCCESS
"""
STOPPED = """\
xfsdump: dump size (non-dir files) : 0 bytes
xfsdump: NOTE: dump interrupted: 2 seconds elapsed: may resume later using -R option
xfsdump: Dump Status: INTERRUPT
"""
NO_BASE = """\
xfsdump: ERROR: cannot calculate incremental dump: online inventory not available
xfsdump: Dump Status: ERROR
"""


def settings(*extra: str, command: tuple[str, ...] = (), to: str = "/dumps") -> Settings:
    return Settings(command, (f"--destination={to}", *extra), {}, "/work")


def read(*ends: tuple[str, str, int], moment: Moment = TWO) -> End:
    """Return how the reader judges, for each volume, standard error, standard output, status."""
    reader = Xfsdump().reader(moment)
    for n, (stderr, stdout, status) in enumerate(ends):
        for line in stderr.splitlines():
            reader.stderr(line)
        reader.stdout(stdout)
        reader.end_command(n, status)
    return reader.end()


# -- how it is run -----------------------------------------------------------------------------


def test_load() -> None:
    """The client is found by its name, and is one whose targets are the volumes themselves."""
    assert isinstance(load("xfsdump"), Dumper)
    assert not isinstance(load("restic"), Dumper)


def test_launch() -> None:
    """Each volume is a command that names its run, moment, levels and places; none a secret."""
    launch = Xfsdump().launch(settings("--levels", "0,1"), Facts("3.1.11", ID), TWO)
    first, second = launch.commands
    assert first[1:] == (
        *("-P", "-m", "atomtx.clients.xfsdump_process", "dump", "--destination=/dumps"),
        *(f"--id={ID}", "--run=0123456789abcdef", "--job=nightly"),
        *("--at=2026-07-01T12:00:00+00:00", "--levels=0,1", "--path=/home", "--source=/home"),
        "--program=xfsdump",
    )
    assert "--path=/srv" in second
    assert launch.env["LC_ALL"] == "C"  # its words are read


def test_tree() -> None:
    """Of a tree each volume is read where it is, and kept under its live path."""
    moment = dataclasses.replace(TWO, targets=("/", "/srv"), root="/tree")
    launch = Xfsdump().launch(settings(), Facts("", ID), moment)
    assert [argv[-3:-1] for argv in launch.commands] == [
        ("--path=/", "--source=/tree"),
        ("--path=/srv", "--source=/tree/srv"),
    ]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("--level", "10"), "no level"),
        (("--level", "0,1"), "no level"),
        (("--level", ""), "no level"),
        (("--levels", "1,x"), "no level"),
        (("--levels=0,-1",), "no level"),
        (("--level=0", "--levels=0"), "exclude each other"),
        (("-f", "/dev/nst0"), "no option"),
        (("-s", "sub"), "no option"),
        (("/home",), "itself names"),
        (("--destination=/var",), "cannot be a destination"),
        (("--destination=/var/lib",), "cannot be a destination"),
        (("--destination=/",), "cannot be a destination"),
    ],
)
def test_refused(extra: tuple[str, ...], reason: str) -> None:
    """An option that is none of ours, or makes no sense, is refused before anything runs."""
    with pytest.raises(UserError, match=reason):
        Xfsdump().launch(settings(*extra), Facts("", ID), TWO)


def test_no_destination() -> None:
    """Without a destination the way to name one is told."""
    with pytest.raises(UserError, match=r"needs a destination \(.*--destination DIR"):
        Xfsdump().live_paths(Settings((), (), {}, "/"))


def test_live_paths() -> None:
    """The destination must be the live one; a relative one is of the working directory."""
    assert Xfsdump().live_paths(settings(to="sub/d")) == ("/work/sub/d",)


@pytest.mark.parametrize(
    ("fstype", "root", "part", "reason"),
    [
        ("xfs", "/", "", None),
        ("ext4", "/", "", "saves XFS alone, and .* is ext4"),
        ("xfs", "/", "/ann", "saves whole file systems, and .* is a part of the one at"),
        ("xfs", "/ann", "", "shows a directory of one"),
    ],
)
def test_logical_volume(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fstype: str,
    root: str,
    part: str,
    reason: str | None,
) -> None:
    """A logical volume of LVM is dumped if it is XFS, and named as a whole."""
    at, device = str(tmp_path), "/dev/mapper/data-home"
    below = Entry(1, 0, "8:1", "/", "/", "rw", (), "ext4", "/dev/sda1", "rw")
    volume = Entry(2, 1, "254:1", root, at, "rw", (), fstype, device, "rw")
    monkeypatch.setattr(mountinfo, "read", lambda: mountinfo.Table([below, volume]))
    wish = settings(to="/proc")  # on another device, whatever the test's is on
    if reason is None:
        Xfsdump().check(wish, (at + part,), ())
        return
    with pytest.raises(UserError, match=reason):
        Xfsdump().check(wish, (at + part,), ())


def test_policy() -> None:
    """The one rule is how many chains stay, and never none."""
    assert Xfsdump().policy(("--keep-chains", "3")) == ("--keep-chains=3",)
    for words in (("--keep-chains", "0"), ("--keep-chains=x",), ("--keep-daily", "7")):
        with pytest.raises(UserError):
            Xfsdump().policy(words)


# -- what it says ------------------------------------------------------------------------------


def test_completed() -> None:
    """A success of xfsdump's, and our line that the dump has its name, is a whole backup."""
    end = read((WHOLE, MADE, 0), (WHOLE, MADE.replace("home", "srv"), 0))
    assert (end.outcome, end.reason) == (Outcome.COMPLETED, None)
    first, second = end.backups
    assert (first.paths, first.backup_id) == (("/home",), "home/x")
    assert (first.bytes_added, first.files_processed) == (4117088, 21)
    assert (second.paths, second.backup_id) == (("/srv",), "srv/x")


def test_progress() -> None:
    """Percent is of all volumes; files and bytes are of the one that is read."""
    reader = Xfsdump().reader(TWO)
    for line in WHOLE.splitlines()[:-5]:
        reader.stderr(line)
    assert (reader.progress.percent, reader.progress.files_done) == (20.0, 12)
    assert (reader.progress.files_total, reader.progress.bytes_total) == (30, 270120640)
    reader.end_command(0, 0)
    for line in WHOLE.splitlines()[:-6]:
        reader.stderr(line)
    assert reader.progress.percent == pytest.approx(53.35)


def test_no_line_of_ours() -> None:
    """Promise 7: its own word for success is not enough: the dump may have no name yet."""
    end = read((WHOLE, "", 0), (WHOLE, MADE, 0))
    assert end.outcome is Outcome.FAILED
    assert [backup.outcome for backup in end.backups] == [Outcome.FAILED, Outcome.COMPLETED]


@pytest.mark.parametrize(
    ("stderr", "status", "reason", "retriable"),
    [
        (f"{NO_BASE}atomtx: xfsdump: no base; exit status 1", 1, "no base", False),
        (NO_BASE, 1, "cannot calculate incremental dump", False),
        (f"{STOPPED}atomtx: xfsdump: dump interrupted; exit status 2", 1, "interrupted", False),
        ("atomtx: cannot write /d/dump: No space left on device", 1, "No space", True),
        ("atomtx: cannot write /d/dump: Input/output error", 1, "Input/output", True),
        ("atomtx: level 0: it is the first dump", -9, "killed by SIGKILL", True),
        ("", 1, "exit status 1", False),
    ],
)
def test_failed(stderr: str, status: int, reason: str, retriable: bool) -> None:
    """A failure is told in its own words; what may be better later is worth another attempt."""
    end = read((stderr, "", status), (WHOLE, MADE, 0))
    assert (end.outcome, end.retriable) == (Outcome.FAILED, retriable)
    assert reason in (end.reason or "")
    assert (end.reason or "").startswith("/home: ")


@pytest.mark.parametrize(
    ("line", "is_lost"),
    [
        ("WARNING: unable to read dirents (5) for directory ino 7: Input/output error", True),
        ("could not open regular file ino 9 mode 0x000081a4: Stale file handle: not dumped", True),
        ("WARNING: could not get list of root attributes for nondir ino 9: I/O error (5)", True),
        ("inomap inconsistency ino 5: MAP_DIR_NOCHNG but is non-dir: NOT dumping", True),
        ("WARNING: something that nobody has seen yet", True),
        ("WARNING: failed to save user quota information, continuing", False),
        ("WARNING: no session label specified", False),
        ("ino map phase 2: pruning unneeded subtrees", False),
        ("NOTE: pruned 3 files: skip attribute set", False),
    ],
)
def test_lost(line: str, is_lost: bool) -> None:
    """What xfsdump says that it left out makes a dump partial, also under a SUCCESS."""
    from atomtx.clients.xfsdump_reader import Said

    said = Said()
    for each in (*WHOLE.splitlines(), f"xfsdump: {line}"):
        said.line(each)
    assert said.is_whole
    assert bool(said.lost) is is_lost


def test_partial() -> None:
    """A dump that lacks something is a backup, partial, with the reason."""
    lost = MADE.replace("null", '"could not open ino 9"')
    end = read((WHOLE, MADE, 0), (WHOLE, lost, 0))
    assert (end.outcome, end.reason) == (Outcome.PARTIAL, "/srv: could not open ino 9")
    assert end.backups[1].backup_id == "home/x"


def test_never_begun() -> None:
    """A volume whose dump never began, because of a stop, has failed; nothing begins it again."""
    end = read((WHOLE, MADE, 0))
    assert [b.outcome for b in end.backups] == [Outcome.COMPLETED, Outcome.FAILED]
    assert (end.outcome, end.retriable) == (Outcome.FAILED, False)


# -- which level is next -----------------------------------------------------------------------


def turn_of(found: list[Dump], *levels: int, day: int = 99) -> tuple[int, str | None, int]:
    """Return (level, base, turn) of the next dump."""
    turn = next_turn(found, levels, T0 + timedelta(days=day), lambda dump: dump.size >= 0)
    return turn.level, turn.base.name if turn.base else None, turn.turn


ZERO = a_dump(0, 0)
ONE = a_dump(1, 1, ZERO)
TWO_ON_ONE = a_dump(2, 2, ONE)


def test_first_level() -> None:
    """Without a dump to add to, level 0 it is, whatever was asked."""
    assert turn_of([], 1) == (0, None, -1)
    assert turn_of([], 3, 0, 1) == (0, None, 1)


def test_rotation() -> None:
    """The levels follow one another; each is based on the newest below it, of the same chain."""
    assert turn_of([ZERO], 0, 1, 2) == (1, ZERO.name, 1)
    assert turn_of([ZERO, ONE], 0, 1, 2) == (2, ONE.name, 2)
    assert turn_of([ZERO, ONE, TWO_ON_ONE], 0, 1, 2) == (0, None, 0)


def test_fixed_level() -> None:
    """A level that stays the same is based on what is below it, not on its like."""
    one = a_dump(1, 1, ZERO, levels=(1,), turn=0)
    assert turn_of([ZERO, one], 1) == (1, ZERO.name, 0)


def test_another_rotation() -> None:
    """A rotation that was changed begins at its first level."""
    assert turn_of([ZERO, ONE], 2, 1) == (2, ONE.name, 0)


@pytest.mark.parametrize("change", [{"size": -1}, {"partial": True}])
def test_broken_base(change: dict[str, Any]) -> None:
    """What is cut short, or lacks something, is no base, nor is what was based on it."""
    broken = dataclasses.replace(ONE, **change)
    assert turn_of([ZERO, broken, TWO_ON_ONE], 0, 1, 2)[:2] == (1, ZERO.name)
    assert turn_of([dataclasses.replace(ZERO, **change), ONE], 2)[:2] == (0, None)


def test_clock_set_back() -> None:
    """A moment that is no later than a dump's would find files unchanged that are not."""
    assert turn_of([ZERO, ONE], 2, day=1) == (0, None, -1)
    assert turn_of([ZERO, ONE], 2, day=0) == (0, None, -1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 20))
def test_any_rotation(levels: list[int], days: int) -> None:
    """Each dump has a base below its level in the newest chain, or is a level 0."""
    found: dict[str, Dump] = {}
    for day in range(days):
        turn = next_turn(
            list(found.values()), tuple(levels), T0 + timedelta(days=day), lambda _: True
        )
        dump = a_dump(day, turn.level, turn.base, levels=tuple(levels), turn=turn.turn)
        found[dump.name] = dump
        assert (turn.level == 0) == (turn.base is None)
        if turn.base:
            assert turn.base.level < turn.level
    if 0 not in levels:
        assert sum(dump.level == 0 for dump in found.values()) == 1


# -- what is forgotten -------------------------------------------------------------------------

CHAINS = [
    *(ZERO, ONE, TWO_ON_ONE),
    *(three := (a_dump(3, 0), a_dump(4, 1, a_dump(3, 0)))),
    a_dump(5, 0),
]


def days_of(found: list[Dump]) -> list[int]:
    return [dump.time.day - T0.day for dump in found]


def test_superseded() -> None:
    """Whole chains go, the oldest ones, each increment before its base."""
    assert days_of(superseded(CHAINS, 3, lambda _: None)) == []
    assert days_of(superseded(CHAINS, 2, lambda _: None)) == [2, 1, 0]
    assert days_of(superseded(CHAINS, 1, lambda _: None)) == [4, 3, 2, 1, 0]


def test_damaged_is_not_counted() -> None:
    """A chain without its level 0 does not count for one: what restores is kept in its place."""
    broken = {CHAINS[5].name, CHAINS[3].name}
    found = superseded(CHAINS, 1, lambda d: "cut" if d.name in broken else None)
    assert found == []


def test_partial_is_not_counted() -> None:
    """Nor does a partial level 0, which goes with the chains before and after it."""
    half = dataclasses.replace(CHAINS[3], partial=True)
    found = [CHAINS[0], half, CHAINS[5]]
    assert days_of(superseded(found, 2, lambda _: None)) == []
    assert days_of(superseded(found, 1, lambda _: None)) == [3, 0]


# -- destinations ------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Destination:
    return Destination(str(tmp_path / "dumps"))


def test_inspect(store: Destination) -> None:
    """A directory without a mark, as of a disk that is not mounted, is no destination."""
    with pytest.raises(UserError, match=r"no destination of xfsdump.*is its disk mounted"):
        assert store.id
    store.path.mkdir()
    (store.path / MARK).write_text("\n")
    with pytest.raises(UserError, match="holds no id"):
        assert Destination(str(store.path)).id
    (store.path / MARK).write_text(f"{ID}\n")
    assert Destination(str(store.path)).id == ID


def test_another_disk(store: Destination) -> None:
    """Promise 14: another destination at the same place is not taken for the planned one."""
    make_chain(store)
    store.check_id(ID)
    with pytest.raises(ClientError, match="another destination than before"):
        store.check_id("9999-9999")


@given(st.binary(min_size=1, max_size=60).filter(lambda b: b"\0" not in b))
def test_volume_name(path: bytes) -> None:
    """Every path has a folder of its own, from which it can be read again."""
    normal = os.fsdecode(b"/" + path.strip(b"/"))
    name = volume_name(normal)
    assert "/" not in name
    assert not name.startswith(".") or normal.startswith("/.")
    assert "/" + unquote(name, errors="surrogateescape").lstrip("/") == normal


def test_long_path() -> None:
    """A path too long for a folder's name is refused, in the plan."""
    with pytest.raises(UserError, match="too long"):
        volume_name("/" + "x" * 256)


def test_chain(store: Destination) -> None:
    """A dump is found with all that a restore needs, and each holds its chain's inventory."""
    made = make_chain(store)
    assert store.dumps("/home") == made
    assert store.chain(made[2].name) == made
    assert [sorted(dump.inventory) for dump in made] == [
        ["session0"],
        ["session0", "session1"],
        ["session0", "session1", "session2"],
    ]
    sums = (store.path / made[1].name / "dump.sha256").read_text()
    assert sums == f"{made[1].sha256}  dump\n"


def test_every_byte_of_a_manifest(store: Destination) -> None:
    """A manifest of which one byte is not what was written is no manifest."""
    (made,) = make_chain(store, 1)
    path = store.path / made.name / dumps.MANIFEST
    content = path.read_bytes()
    for n in range(0, len(content), 7):
        path.write_bytes(content[:n] + bytes([content[n] ^ 1]) + content[n + 1 :])
        with pytest.raises(DamagedError):
            store.dump(made.name)
    path.write_bytes(content)
    assert store.dump(made.name) == made


def test_damaged_inventory(store: Destination) -> None:
    """An inventory that is not what xfsdump wrote is no base."""
    made = make_chain(store)
    turn = store.next_turn("/home", UUID, (3,), made[2].time + timedelta(1))
    assert turn.base == made[2]
    (store.path / made[2].name / "inventory" / "session1").write_text("x")
    turn = store.next_turn("/home", UUID, (3,), made[2].time + timedelta(1))
    assert (turn.level, turn.base) == (0, None)
    assert "damaged" in turn.why


def test_another_file_system(store: Destination) -> None:
    """A file system that was made anew at the same place begins a chain of its own."""
    made = make_chain(store)
    turn = store.next_turn("/home", UUID.replace("5", "6"), (1,), made[2].time + timedelta(1))
    assert (turn.level, turn.base) == (0, None)


def test_another_host(store: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of the same image, so with the same UUID, begins a chain of its own."""
    made = make_chain(store)
    at = made[2].time + timedelta(1)
    assert store.next_turn("/home", UUID, (3,), at).base == made[2]
    monkeypatch.setattr(dumps, "this_host", lambda: "web2")
    turn = store.next_turn("/home", UUID, (3,), at)
    assert (turn.level, turn.base) == (0, None)
    own = put(store, a_dump(4, 0, levels=(0, 1)))
    assert store.next_turn("/home", UUID, (0, 1), own.time + timedelta(1)).base == own


@pytest.mark.parametrize("n", range(14))
def test_all_or_nothing(store: Destination, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 5: wherever the making of a dump's name is cut off, it is whole or not there."""
    made = make_chain(store, 1)
    calls = 0

    def cut_off(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > n:
                raise OSError(errno.EIO, "cut off")
            return real(*args, **more)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, cut_off(name))
    try:
        put(store, a_dump(1, 1, made[0]))
        was_cut = False
    except OSError:
        was_cut = True
    monkeypatch.undo()
    assert was_cut == (n < 10)
    for dump in store.dumps("/home"):
        assert [store.damage(each) for each in store.chain(dump.name)].count(None) == len(
            store.chain(dump.name)
        )
    store.remove_parts(f"{1:016x}")
    names = {path.name for path in (store.path / "home").iterdir()}
    assert names == {Path(dump.name).name for dump in store.dumps("/home")}


def test_durable_before_its_name(store: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 10: all of a dump is durable before the rename, and the name after it."""
    order: list[str] = []
    sync, rename = dumps.sync, os.rename

    def noted_sync(path: Path) -> None:
        order.append(path.name)
        sync(path)

    def noted_rename(old: Path, new: Path) -> None:
        order.append("RENAME")
        rename(old, new)

    monkeypatch.setattr(dumps, "sync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    put(store, a_dump(0, 0))
    at = order.index("RENAME")
    part = f".part-{0:016x}"
    assert set(order[:at]) == {"session0", "manifest", "dump.sha256", "dump", "inventory", part}
    assert order[at + 1 :] == ["home", "dumps"]


def test_forget(store: Destination) -> None:
    """What is forgotten is gone, with what a killed retention left; other hosts' dumps stay."""
    made = make_chain(store)
    foreign = put(store, a_dump(10, 0, host="another"))
    newest = put(store, a_dump(11, 0))
    left = store.path / "home" / ".forgotten-x"
    shutil.copytree(store.path / foreign.name, left)
    assert store.forget("/home", 1, dumps.this_host()) == [d.name for d in reversed(made)]
    assert store.dumps("/home") == [foreign, newest]
    assert not left.exists()
    assert store.forget("/home", 1, dumps.this_host()) == []


def test_restore_commands(store: Destination) -> None:
    """A restore is the chain in order, below the directory that was asked for."""
    made = make_chain(store)
    given = settings(to=str(store.path))
    backup = Backup(("/home",), Outcome.COMPLETED, backup_id=made[1].name)
    assert Xfsdump().restore_commands(given, backup, "/r") == (
        ("mkdir", "-p", "/r/home"),
        *(
            ("xfsrestore", "-F", "-J", "-r", "-f", f"{store.path}/{dump.name}/dump", "/r/home")
            for dump in made[:2]
        ),
    )
    shutil.rmtree(store.path / made[0].name)
    with pytest.raises(DamagedError, match="is not there"):
        Xfsdump().restore_commands(given, backup, "/r")
    (words,) = Xfsdump().damage(given, ID, backup)
    assert made[0].name in words

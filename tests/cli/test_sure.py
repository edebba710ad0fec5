"""`atomtx sure` as a user runs it: what it prints, and its exit statuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atomtx import locks
from atomtx.cli import render, sure_words
from atomtx.cli.sure import sure
from atomtx.clients import Progress
from tests.cli.conftest import Run

# Root without what lets it read other users' files; an O_NOATIME on those is refused as well.
WEAK = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
as_weak = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, and setpriv"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of an hour ago, but for its ctimes."""
    made = tmp_path / "tree"
    (made / "a").mkdir(parents=True)
    (made / "a/one").write_text("one")
    (made / "two").write_text("two")
    return made


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_scan(atomtx_: Run, tree: Path, env: dict[str, str]) -> None:
    """A scan makes the database in the state directory, and says what it did."""
    done = atomtx_("sure", "scan", str(tree))
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(
        r"generation 1: 4 entries, 6 B; 2 files hashed, 6 B, in [0-9.]+ s\n", done.stderr
    )
    (file,) = Path(env["ATOMTX_STATE_DIR"], "sure").glob("*.db")
    assert file.name == str(tree).lstrip("/").replace("/", "%2F") + ".db"
    assert atomtx_("sure", "check", str(tree)).returncode == 0


def test_nothing_written(atomtx_: Run, tree: Path) -> None:
    """Nothing is left in the tree, and none of its times changes."""

    def state() -> list[tuple[str, int, int]]:
        paths = sorted((tree, *tree.rglob("*")))
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths]

    before = state()
    for command in ("scan", "check", "list", "export"):
        assert atomtx_("sure", command, str(tree)).returncode == 0
    assert state() == before


def test_differences(atomtx_: Run, tree: Path) -> None:
    """A check names each difference on standard output, and exits with 1."""
    atomtx_("sure", "scan", str(tree))
    (tree / "two").chmod(0o600)
    (tree / "a/one").unlink()
    (tree / "a/new\x1b[31m").touch()
    done = atomtx_("sure", "check", str(tree), "--ignore", "time")
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == [
        "changed     two: mode 0644 -> 0600",
        "extra       a/new\\033[31m",
        "missing     a/one",
    ]
    assert "5 entries compared with generation 1, 3 B read in" in done.stderr
    assert "3 differences" in done.stderr


def test_ignored(atomtx_: Run, tree: Path) -> None:
    """What is ignored is no difference; what is no property is a usage error."""
    atomtx_("sure", "scan", str(tree))
    (tree / "two").chmod(0o600)
    assert atomtx_("sure", "check", str(tree), "--ignore", "owner, mode").returncode == 0
    assert atomtx_("sure", "check", str(tree), "--ignore", "owner").returncode == 1
    done = atomtx_("sure", "check", str(tree), "--ignore", "mood")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'mood' is no property" in done.stderr


def test_restored(atomtx_: Run, tree: Path, tmp_path: Path) -> None:
    """A restored tree is compared with the original's database, named by --of or --database."""
    file = tmp_path / "elsewhere.db"
    for extra in ((), ("--database", str(file))):
        assert atomtx_("sure", "scan", str(tree), *extra).returncode == 0
    copy = tmp_path / "restored"
    shutil.copytree(tree, copy)
    os.utime(copy, ns=(0, tree.stat().st_mtime_ns))
    for words in (("--of", str(tree)), ("--database", str(file))):
        assert atomtx_("sure", "check", str(copy), *words).returncode == 0
        strict = atomtx_("sure", "check", str(copy), "--strict", *words)
        assert (strict.returncode, "inode" in strict.stdout) == (1, True)
    assert atomtx_("sure", "check", str(copy)).returncode == 2  # it has no database
    done = atomtx_("sure", "scan", str(copy), "--database", str(file))
    assert done.returncode == 2
    assert f"is the database of {tree}, not of {copy}" in done.stderr


def test_json(atomtx_: Run, tree: Path) -> None:
    """With --json each line is an object, the last one the result; any name is read back."""
    result = objects(atomtx_("sure", "scan", str(tree), "--json"))[-1]
    assert (result["message_type"], result["generation"], result["exit_status"]) == ("result", 1, 0)
    assert (result["entries"], result["hashed"], result["errors"]) == (4, 2, 0)
    (tree / "bad\udcff").touch()
    done = atomtx_("sure", "check", str(tree), "--ignore", "time", "--json")
    finding, _, result = objects(done)
    assert (finding["message_type"], finding["kind"], finding["path"]) == (
        "finding",
        "extra",
        "bad\udcff",
    )
    assert (result["differences"], result["exit_status"], done.returncode) == (1, 1, 1)
    (listed,) = json.loads(atomtx_("sure", "list", str(tree), "--json").stdout)
    assert (listed["id"], listed["tree"], listed["path"]) == (1, str(tree), str(tree))
    assert listed["started"].endswith("Z")


def test_diff(atomtx_: Run, tree: Path) -> None:
    """A diff names what changed between two generations, and is done whether there is any."""
    atomtx_("sure", "scan", str(tree))
    (tree / "two").unlink()
    (tree / "new").touch()
    (tree / "a").chmod(0o700)
    atomtx_("sure", "scan", str(tree))
    done = atomtx_("sure", "diff", "1", "2", "--of", str(tree), "--ignore", "time,ctime")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "changed     a: mode 0755 -> 0700",
        "added       new",
        "removed     two",
    ]
    back = atomtx_("sure", "diff", "2", "1", "--of", str(tree), "--json")
    kinds = {each["path"]: each["kind"] for each in objects(back)}
    assert kinds == {"": "changed", "a": "changed", "new": "removed", "two": "added"}
    assert atomtx_("sure", "diff", "1", "3", "--of", str(tree)).returncode == 2
    assert atomtx_("sure", "diff", "1", "2").returncode == 2


def test_list_and_forget(atomtx_: Run, tree: Path) -> None:
    """Generations are listed, and all but the newest forgotten."""
    for _ in range(3):
        atomtx_("sure", "scan", str(tree))
    done = atomtx_("sure", "list", str(tree))
    assert done.stdout.startswith("GENERATION  SCANNED ")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["1", "2", "3"]
    done = atomtx_("sure", "forget", str(tree), "--keep", "2")
    assert done.stdout == "1 generations forgotten, 2 kept\n"
    assert atomtx_("sure", "check", str(tree), "--against", "1").returncode == 2
    assert atomtx_("sure", "forget", str(tree), "--keep", "0").returncode == 2


def test_export(atomtx_: Run, tree: Path) -> None:
    """An export is a specification, of the generation that is named."""
    atomtx_("sure", "scan", str(tree))
    (tree / "two").unlink()
    atomtx_("sure", "scan", str(tree))
    first = atomtx_("sure", "export", str(tree), "--generation", "1")
    newest = atomtx_("sure", "export", str(tree))
    assert (first.returncode, newest.returncode) == (0, 0)
    assert [line.split()[0] for line in first.stdout.splitlines()] == [
        *("#mtree", ".", "./a", "./two", "./a/one")
    ]
    assert "./two" not in newest.stdout


@as_weak
def test_unreadable(env: dict[str, str], tree: Path) -> None:
    """What a user may not read is named, is noted, and makes the exit status 3: partial."""
    (tree / "two").chmod(0o600)
    (tree / "a").chmod(0o700)
    for path in (tree / "two", tree / "a"):
        os.chown(path, 65534, 65534)

    def run(*args: str, weak: bool = True) -> subprocess.CompletedProcess[str]:
        argv = [*(WEAK if weak else ()), sys.executable, "-m", "atomtx", "sure", *args]
        return subprocess.run(
            argv, env=env, cwd="/", capture_output=True, text=True, check=False, timeout=60
        )

    done = run("scan", str(tree))
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert sorted(lines[:-1]) == [
        "warning: a: EACCES: Permission denied",
        "warning: two: EACCES: Permission denied",
    ]
    assert lines[-1].endswith("; 2 could not be read")
    now = run("check", str(tree))
    assert now.returncode == 3
    assert sorted(now.stdout.splitlines()) == [
        "unreadable  a: EACCES: Permission denied",
        "unreadable  two: EACCES: Permission denied",
    ]
    then = run("check", str(tree), weak=False)
    assert then.returncode == 3
    assert sorted(then.stdout.splitlines()) == [
        "unverified  a: it was not readable then: EACCES: Permission denied",
        "unverified  two: it was not readable then: EACCES: Permission denied",
    ]
    exported = run("export", str(tree))
    assert exported.returncode == 3
    assert exported.stdout.count("# the next one was not readable: EACCES") == 2
    (tree / "new").touch()
    assert run("check", str(tree)).returncode == 1  # a difference is worse
    assert run("scan", str(tree), weak=False).returncode == 0
    assert run("diff", "1", "2", "--of", str(tree)).returncode == 3


@as_weak
def test_not_even_stat(env: dict[str, str], tree: Path) -> None:
    """A name that stat(2) refuses is no other type; what is below it is not missing, nor extra."""
    (tree / "a/sub").mkdir()
    (tree / "a/sub/file").touch()
    (tree / "a/link").symlink_to("one")

    def run(*args: str, weak: bool = True) -> subprocess.CompletedProcess[str]:
        argv = [*(WEAK if weak else ()), sys.executable, "-m", "atomtx", "sure", *args]
        return subprocess.run(
            argv, env=env, cwd="/", capture_output=True, text=True, check=False, timeout=60
        )

    os.chown(tree / "a", 65534, 65534)
    assert run("scan", str(tree), weak=False).returncode == 0
    (tree / "a").chmod(0o744)  # to others: its names, and no more
    assert run("scan", str(tree)).returncode == 3
    ignore = ("--ignore", "ctime,mode")
    now = [f"unreadable  a/{name}: EACCES: Permission denied" for name in ("link", "one", "sub")]
    diff = run("diff", "1", "2", "--of", str(tree), *ignore)
    assert (diff.returncode, diff.stdout.splitlines()) == (3, now)
    check = run("check", str(tree), "--against", "1", *ignore)
    assert (check.returncode, sorted(check.stdout.splitlines())) == (3, now)
    then = [line.replace("unreadable  ", "unverified  ") for line in now]
    check = run("check", str(tree), weak=False)
    assert check.returncode == 3
    assert sorted(check.stdout.splitlines()) == [
        line.replace(": EACCES", ": it was not readable then: EACCES") for line in then
    ]


@as_weak
@pytest.mark.parametrize("command", ["list", "check", "export", "diff 1 2 --of", "forget --keep 1"])
def test_not_permitted(env: dict[str, str], tree: Path, command: str) -> None:
    """Who may not look into the state directory is told so, and what to do: status 2."""
    state = Path(env["ATOMTX_STATE_DIR"])
    (state / "sure").mkdir(parents=True)
    state.chmod(0o700)
    os.chown(state, 65534, 65534)
    done = subprocess.run(
        [*WEAK, sys.executable, "-m", "atomtx", "sure", *command.split(), str(tree)],
        env=env,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    file = state / "sure" / f"{str(tree).lstrip('/').replace('/', '%2F')}.db"
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"atomtx: cannot read the integrity database {file}: Permission denied",
        "  run atomtx as root, or name one with --database",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("scan", ""),
        ("check", ""),
        ("list", ""),
        ("forget", "", "--keep", "1"),
        ("check", ".", "--of", ""),
        ("diff", "1", "2", "--of", ""),
        ("list", "--database", ""),
        ("verify-backup", "7f3c", "--target", ""),
    ],
    ids=" ".join,
)
def test_empty_path(atomtx_: Run, tree: Path, words: tuple[str, ...]) -> None:
    """An empty path, as of a variable that is not set, is not the current directory."""
    atomtx_("sure", "scan", ".", cwd=tree)
    done = atomtx_("sure", *words, cwd=tree)
    assert done.returncode == 2
    assert "the path is empty" in done.stderr


def test_silent_damage(atomtx_: Run, tree: Path, env: dict[str, str]) -> None:
    """Contents that changed without a trace are named by --full, with exit status 1."""
    atomtx_("sure", "scan", str(tree))
    (file,) = Path(env["ATOMTX_STATE_DIR"], "sure").glob("*.db")
    with closing(sqlite3.connect(file)) as connection, connection:
        done = connection.execute(
            "UPDATE entry SET digest = zeroblob(32), state = 0 WHERE name = CAST('two' AS BLOB)"
        )
        assert done.rowcount == 1
    scanned = atomtx_("sure", "scan", str(tree), "--full")
    assert scanned.returncode == 1
    assert "warning: two: its contents changed, though size and times did not" in scanned.stderr


def test_empty(atomtx_: Run, tree: Path) -> None:
    """A tree that is empty and was not is a usage error, unless it is allowed."""
    atomtx_("sure", "scan", str(tree))
    shutil.rmtree(tree)
    tree.mkdir()
    done = atomtx_("sure", "scan", str(tree))
    assert (done.returncode, "--allow-empty" in done.stderr) == (2, True)
    assert atomtx_("sure", "scan", str(tree), "--allow-empty").returncode == 0


def test_busy(atomtx_: Run, tree: Path, env: dict[str, str]) -> None:
    """A second scan of a tree at once is refused with 5."""
    atomtx_("sure", "scan", str(tree))
    (lock,) = Path(env["ATOMTX_STATE_DIR"], "sure").glob("*.lock")
    with locks.acquired(lock) as held:
        assert held is not None
        for command in (("scan",), ("forget", "--keep", "1")):
            done = atomtx_("sure", *command, str(tree))
            assert done.returncode == 5
            assert "another atomtx writes" in done.stderr
        assert atomtx_("sure", "check", str(tree)).returncode == 0


def test_interrupted(tree: Path, env: dict[str, str]) -> None:
    """Ctrl-C ends a scan at once, even in a file that never ends, and leaves no generation."""
    os.truncate(tree / "two", 1 << 42)  # a hole that takes hours
    child = subprocess.Popen(
        [sys.executable, "-m", "atomtx", "sure", "scan", str(tree)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert locks.wait_until(lambda: _has_open(child.pid, tree / "two"), 60)
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 130
        finally:
            child.kill()
    listed = subprocess.run(
        [sys.executable, "-m", "atomtx", "sure", "list", str(tree), "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (listed.returncode, listed.stdout.strip()) == (0, "[]")


def _has_open(pid: int, path: Path) -> bool:
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(each) == str(path):
                return True
        except OSError:  # closed meanwhile
            continue
    return False


@pytest.mark.parametrize("command", list(sure.commands))
def test_help(command: str) -> None:
    """Each help has an example, and lists the exit statuses."""
    text = sure.commands[command].help or ""
    assert "Example" in text
    assert "EXIT STATUS" in text


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """The live line is told percent of the last generation, but not at each file."""
    told: list[Progress] = []
    clock = [0.0]

    class Show(render.QuietReporter):
        def progress(self, progress: Progress) -> None:
            told.append(progress)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tick = sure_words.ticker(Show(None), 200)
    for _ in range(100):
        tick(100, 7)
    assert told == []
    clock[0] = 1.0
    tick(100, 7)
    tick(300, 8)
    assert told == [Progress(50.0, bytes_done=7, files_done=100)]
    clock[0] = 2.0
    tick(300, 8)  # more than there were
    assert told[1].percent == 99.0

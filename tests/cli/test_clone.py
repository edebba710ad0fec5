"""`atomtx clone` as it is typed, on pools that are only played."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atomtx.cli.clone import clone
from tests.cli.conftest import SOURCE
from tests.clones import HERE, NAS, Field
from tests.scene import Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root sends snapshots")

_PROGRAM = """
import os, sys
from atomtx import cli, process
home = os.environ["FAKE_ZFS"]
process.BASE_ENVIRONMENT |= {
    "PATH": f"{home}/bin:{process.BASE_ENVIRONMENT['PATH']}", "FAKE_ZFS": home
}
cli.main(sys.argv[1:])
"""
CLONE = ("clone", "tank/a", "tank/enc", "--pattern", "s-%Y%m%d%H%M%S", "--no-compress")
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def field(tmp_path: Path) -> Field:
    return Field(Scene(tmp_path))


@pytest.fixture
def typed(field: Field) -> Typed:
    def run(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
        own = {
            "ATOMTX_STATE_DIR": str(field.scene.state),
            "FAKE_ZFS": str(field.scene.home),
            "PYTHONPATH": os.pathsep.join((str(SOURCE), str(SOURCE.parent))),
        }
        return subprocess.run(
            [sys.executable, "-c", before + _PROGRAM, *words],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_clone(field: Field, typed: Typed) -> None:
    """What would be sent, what is, and that it is; the history has it."""
    field.snap()
    dry = typed(*CLONE, "--to", HERE, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"tank/a to {HERE}/a: all of tank/a@s-" in dry.stdout
    assert not (field.scene.home / "arrived.log").exists()
    done = typed(*CLONE, "--to", HERE)
    assert done.returncode == 0, done.stderr
    assert "2 copies are up to date" in done.stderr
    field.check_copies()
    dry = typed(*CLONE, "--to", HERE, "--dry-run", "--json")
    (line,) = (line for line in map(json.loads, dry.stdout.splitlines()) if "copies" in line)
    assert [each["sends"] for each in line["copies"]] == [[], []]
    (run,) = json.loads(typed("history", "--json").stdout)
    assert (run["verb"], run["state"], run["outcome"]) == ("clone", "cloned", "completed")


def test_one_is_not_there(field: Field, typed: Typed) -> None:
    """A target that cannot be asked is told, also by a dry run; the other is served."""
    field.snap()
    field.play(faults={"ssh": "refuse"})
    words = (*CLONE, "--to", NAS, "--to", HERE)
    dry = typed(*words, "--dry-run")
    assert dry.returncode == 3, dry.stderr
    assert f"tank/a to {NAS}/a: {NAS} could not be asked" in dry.stdout
    assert f"tank/a to {HERE}/a: all of tank/a@s-" in dry.stdout
    done = typed(*words)
    assert done.returncode == 3, done.stderr
    assert "root@nas cannot be reached" in done.stderr
    assert "Connection refused" in done.stderr
    field.check_copies()
    alone = typed(*CLONE, "--to", NAS)
    assert alone.returncode == 1
    assert "root@nas cannot be reached" in alone.stderr


@pytest.mark.parametrize("is_late", [False, True])
def test_another_sends_there(field: Field, typed: Typed, is_late: bool) -> None:
    """Of two clones with one copy the second is told, also where both are begun at once."""
    field.snap()
    assert field.cut_off(by="kill", datasets=("tank/a",)).status == -9
    late = "from atomtx.journal import Journal\nJournal.open_runs = lambda self: []\n"
    answer = typed(*CLONE, "--to", HERE, before=late if is_late else "")
    assert answer.returncode == 5, answer.stderr
    assert f"sends to {HERE}/a as well" in answer.stderr
    assert len(field.scene.rows("SELECT * FROM runs")) == 1


def test_recovered(field: Field, typed: Typed) -> None:
    """`recover` waits for a target that is away, and says how to give it up."""
    field.snap()
    assert field.clone(NAS, at="end:ssh#3").status == -9
    field.play(faults={"ssh": "refuse"})
    waits = typed("recover")
    assert waits.returncode == 6, waits.stderr
    assert "--abandon" in waits.stderr
    field.play(faults={})
    assert typed("recover").returncode == 0
    field.check_copies(NAS)


def test_one_is_unexpected(field: Field, typed: Typed) -> None:
    """A run that we cannot make sense of is told as the bug that it is, once others are settled."""
    field.snap()
    for dataset in ("tank/a", "tank/enc"):
        assert field.clone(datasets=(dataset,), at="end:zfs hold#1").status == -9
    field.settle()
    first, second = field.scene.rows("SELECT id FROM runs ORDER BY rowid")
    field.scene.run_sql(
        "UPDATE steps SET payload = json_set(payload, '$.copies', json('[]')) "
        f"WHERE run = '{first['id']}'"
    )
    done = typed("recover")
    assert done.returncode == 1
    assert f"run {first['id']} cannot be settled" in done.stderr
    assert "IndexError" in done.stderr
    states = {row["id"]: row["outcome"] for row in field.scene.rows("SELECT * FROM runs")}
    assert states == {first["id"]: None, second["id"]: "completed"}
    assert field.is_whole("tank/enc")


def test_one_is_unexpected_when_looked_at(field: Field, typed: Typed) -> None:
    """Who only looks is told of the others as well, and of a run that cannot be asked."""
    field.snap()
    for dataset in ("tank/a", "tank/enc"):
        assert field.clone(datasets=(dataset,), at="end:zfs hold#1").status == -9
    field.settle()
    first, second = field.scene.rows("SELECT id FROM runs ORDER BY rowid")
    field.scene.run_sql(
        "UPDATE runs SET plan = json_set(plan, '$.volumes[0].kind', 'unheard') "
        f"WHERE id = '{first['id']}'"
    )
    before = field.scene.rows("SELECT * FROM steps ORDER BY id")
    done = typed("recover", "--dry-run")
    assert done.returncode == 1
    assert f"run {first['id']} cannot be settled" in done.stderr
    assert "KeyError: 'unheard'" in done.stderr
    told = next(line for line in done.stderr.splitlines() if f"run {second['id']}" in line)
    assert told.endswith("would go on with what has arrived")
    assert field.scene.rows("SELECT * FROM steps ORDER BY id") == before


def test_exit_statuses() -> None:
    """The help and the page tell of the same exit statuses."""
    page = (SOURCE.parent / "docs/clone.md").read_text()
    table = page.partition("| exit status |")[2].partition("\n\n")[0]
    told = (clone.help or "").partition("EXIT STATUS\n")[2]
    in_help = re.findall(r"(?:^| ) +(\d+(?:, \d+)?) \w", told, re.MULTILINE)
    assert sorted(in_help) == sorted(re.findall(r"^\| (\d.*?) \|", table, re.MULTILINE))
    assert len(in_help) > 5

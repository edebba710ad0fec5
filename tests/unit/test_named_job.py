"""Whole commands on a job of the configuration, its pools played: `backup`, a crash, `recover`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atomtx import cli, preparing, selection
from atomtx.plan import Chosen, DatasetFacts, Pool, Selection
from tests.scene import Ended, Scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
SECRET = "open sesame"
CONFIG = """
[jobs.home]
volumes = ["tank/a"]
client = "command"
command = ["{client}"]
environment.MY_PATH = "/x"
credentials.MY_WORD.file = "{password}"
"""


class Job:
    """The job `home` of a scene: its configuration and its password."""

    more = ""  # of the configuration

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.file = scene.home / "atomtx.toml"
        self.password = scene.home / "password"
        self.keep(self.password)
        scene.behave('echo "$MY_WORD $MY_PATH" > $home/got; echo "the word is $MY_WORD"')
        scene.plan("tank/a")  # for its pool and its files
        scene.changes += [self._play, lambda: os.environ.update(self.env)]
        self.env = {"ATOMTX_CONFIG": str(self.file), "ATOMTX_STATE_DIR": str(scene.state)}

    def keep(self, password: Path) -> None:
        """Keep the password in a file, and write the configuration that names it."""
        self.password.rename(password) if self.password.exists() else password.write_text(SECRET)
        password.chmod(0o600)
        self.password = password
        told = CONFIG.format(client=self.scene.client, password=password)
        self.file.write_text(told + self.more)
        self.file.chmod(0o600)

    def _play(self) -> None:
        live = str(self.scene.live("tank/a"))
        guid = self.scene.pool["pools"]["tank"]
        facts = DatasetFacts("tank/a", "filesystem", "guid of a", live, "on", True, "-")
        made = Selection(("tank/a",), (Chosen(facts, live),), (), (), ())
        preparing.inventory = lambda *_: ([Pool("tank", guid, "ONLINE")], [facts])
        selection.select = lambda *_: made

    def atomtx(self, *words: str, at: str = "", who: str = "front") -> Ended:
        """Run a command in a front end of its own; its exit status is what it told."""

        def work(journal: Any, tell: Any, interrupts: Any, ended: Ended) -> None:
            ended.told.append(("status", cli.run(words)))

        return self.scene._in_front_end(work, {"at": at, "who": who})

    def runs(self) -> list[tuple[str, str, str]]:
        rows = self.scene.rows("SELECT job, label, outcome FROM runs ORDER BY started_at")
        return [(row["job"], row["label"], row["outcome"]) for row in rows]

    def got(self) -> str:
        return (self.scene.home / "got").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    scene = Scene(tmp_path)
    yield Job(scene)
    scene.close()


def test_backup(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    """A job by its name is backed up under its name, with its variables, the secret nowhere."""
    assert job.atomtx("backup", "home").said("status") == [0]
    assert job.runs() == [("job home", "home", "completed")]
    assert job.got() == f"{SECRET} /x\n"
    files = [path for path in job.scene.state.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    said = capfd.readouterr().err
    assert "command reads" in said
    assert SECRET not in said
    assert job.scene.left() == []


def test_recover(job: Job) -> None:
    """After a crash `recover` finishes it without the configuration, in another environment."""
    assert job.atomtx("backup", "home", at="journal:snapshotted#1", who="all").status == -9
    job.file.unlink()
    job.env = {"ATOMTX_STATE_DIR": str(job.scene.state)}
    assert job.atomtx("recover").said("status") == [0]
    assert job.runs() == [("job home", "home", "completed")]
    assert job.got() == f"{SECRET} /x\n"
    assert job.scene.left() == []


@pytest.mark.parametrize("command", ["backup home", "recover --config {}"])
def test_moved(job: Job, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Where the configuration names another place meanwhile, the interrupted run is finished."""
    assert job.atomtx("backup", "home", at="journal:snapshotted#1", who="all").status == -9
    job.keep(job.scene.home / "elsewhere")
    assert job.atomtx("recover").said("status") == [6]
    assert "cannot read the file of MY_WORD" in capfd.readouterr().err
    assert job.atomtx(*command.format(job.file).split()).said("status") == [0]
    again = 2 if command.startswith("backup") else 1
    assert job.runs() == [("job home", "home", "completed")] * again
    assert job.got() == f"{SECRET} /x\n"
    assert job.scene.left() == []


def told(job: Job, when: str, at: str = "") -> list[str]:
    """Have a job with hooks and a notifier run, and return what they noted."""
    note = job.scene._script(
        "note", f"#!/bin/sh\necho $1 $ATOMTX_OUTCOME >> {job.scene.home}/noted\n"
    )
    keys = ("pre-hook", "post-hook", "quiesce", "thaw", "after-success", "after-failure")
    lines = [f'{key} = ["{note}", "{key}"]' for key in (*keys, "notify-command")]
    job.more = "".join(f"{line}\n" for line in lines)
    job.keep(job.password)
    job.scene.behave(when)
    job.atomtx("backup", "home", at=at, who="all")
    if at:
        job.atomtx("recover")
    assert job.scene.left() == []
    return (job.scene.home / "noted").read_text().splitlines()


def test_hooks_and_notice(job: Job) -> None:
    """The hooks of a job run in their order; of a backup that completed nobody is told."""
    assert told(job, "") == [
        *("pre-hook", "quiesce", "thaw", "post-hook completed", "after-success completed"),
    ]


def test_notice_of_a_failure(job: Job) -> None:
    """Of one that failed, the job's own notifier is told, after everything else."""
    assert told(job, "exit 1")[-3:] == [
        *("post-hook failed", "after-failure failed", "notify-command failed"),
    ]


def test_notice_of_an_interruption(job: Job) -> None:
    """`recover` tells the notifier that the configuration names for the run's job."""
    assert told(job, "", at="journal:snapshotted#1")[-3:] == [
        *("post-hook completed", "after-success completed", "notify-command completed"),
    ]


# -- signals, and moments that wait ----------------------------------------------------------


def test_one_signal_ends_recover(job: Job) -> None:
    """After a signal no other run is taken up; the others wait for the next `recover`."""
    for _ in range(2):
        assert job.atomtx("backup", "home", at="journal:snapshotted#1", who="all").status == -9
        job.scene.run_sql("UPDATE runs SET job = job || id")  # another job's, for the second
    job.scene.behave("kill -TERM $(cat $home/front); sleep 5")
    job.scene.changes.append(lambda: _write_pid(job.scene.home / "front"))
    assert job.atomtx("recover").said("status") == [143]
    states = [row["state"] for row in job.scene.rows("SELECT state FROM runs ORDER BY started_at")]
    assert states == ["destroyed", "snapshotted"]


def _write_pid(path: Path) -> None:
    path.write_text(str(os.getpid()))


def test_kept_waiting(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    """A moment that is kept for later is no other run at work: exit status 6, and it stays."""
    job.more = 'keep-for = "999w"\nretries = 0\n'
    job.keep(job.password)
    job.scene.changes.append(_failing_for_now)
    assert job.atomtx("backup", "home").said("status") == [6]
    assert job.atomtx("backup", "home", "--wait").said("status") == [6]
    assert "is kept waiting" in capfd.readouterr().err
    (row,) = job.scene.rows("SELECT state, attempts FROM runs")
    assert (row["state"], row["attempts"]) == ("snapshotted", 2)


def test_password_away(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    """A password that goes in mid-run costs no moment: the run waits, and is finished later."""
    away = job.scene.home / "away"
    hook = job.scene._script("hook", f"#!/bin/sh\ntest -e {away} || mv {job.password} {away}\n")
    job.more = f'pre-hook = ["{hook}"]\nretries = 0\n'
    job.keep(job.password)
    assert job.atomtx("backup", "home").said("status") == [6]
    assert "cannot read the file of MY_WORD" in capfd.readouterr().err
    (row,) = job.scene.rows("SELECT state, outcome, moment_at FROM runs")
    assert (row["state"], row["outcome"]) == ("snapshotted", None)
    assert job.atomtx("recover").said("status") == [6]
    away.rename(job.password)
    away.touch()
    assert job.atomtx("recover").said("status") == [0]
    (end,) = job.scene.rows("SELECT outcome, moment_at FROM runs")
    assert (end["outcome"], end["moment_at"]) == ("completed", row["moment_at"])
    assert job.got() == f"{SECRET} /x\n"
    assert job.scene.left() == []


def _failing_for_now() -> None:
    from atomtx.clients import End
    from atomtx.clients.command import CommandReader
    from atomtx.states import Outcome

    CommandReader.end = lambda self: End(Outcome.FAILED, "away", retriable=True)  # type: ignore[method-assign]

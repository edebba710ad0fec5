"""Credentials: read from where the job says, in the client's environment and nowhere else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from atomtx import credentials, launching, plan, preparing
from atomtx.clients import Facts
from atomtx.clients.command import Command
from atomtx.errors import UserError
from atomtx.journal import Journal
from atomtx.settling import Settler
from tests.scene import Scene

SECRET = "open sesame"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def test_file(file: Path) -> None:
    """A file's one line is the value; what else it holds stays."""
    sources = (("PW", f"file:{file}"),)
    assert credentials.read(sources, {}) == {"PW": SECRET}
    file.write_text(" a \n\nb\r\n")
    assert credentials.read(sources, {}) == {"PW": " a \n\nb"}


@pytest.mark.parametrize(("content", "words"), [("", "empty"), ("\n", "empty"), ("a\0b", "null")])
def test_bad_content(file: Path, content: str, words: str) -> None:
    """A value that no variable can have is told, and not shown."""
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        credentials.read((("PW", f"file:{file}"),), {})


def test_systemd(file: Path) -> None:
    """A systemd credential is the file of its name in $CREDENTIALS_DIRECTORY."""
    sources = (("PW", "credential:password"),)
    env = {"CREDENTIALS_DIRECTORY": str(file.parent)}
    assert credentials.read(sources, env) == {"PW": SECRET}
    with pytest.raises(UserError, match=r"no \$CREDENTIALS_DIRECTORY.*LoadCredential=password"):
        credentials.read(sources, {})
    file.unlink()
    with pytest.raises(UserError, match=r"which is not in .*add LoadCredential=password"):
        credentials.read(sources, env)


def test_inherited(file: Path) -> None:
    """A resume takes from the environment what its place does not give; the place comes first."""
    sources = (("PW", f"file:{file}"),)
    assert credentials.read_or_inherit(sources, {"PW": "other"}) == {"PW": SECRET}
    file.unlink()
    assert credentials.read_or_inherit(sources, {"PW": "other"}) == {"PW": "other"}
    with pytest.raises(UserError, match="No such file"):
        credentials.read_or_inherit(sources, {})


def test_overlaid() -> None:
    """A variable hides the other ways to say the same, but those that are to be kept."""
    base = {"RESTIC_PASSWORD": "x", "RESTIC_PASSWORD_COMMAND": "y", "HOME": "/"}
    top = {"RESTIC_PASSWORD_FILE": "/p"}
    assert credentials.overlaid(base, top) == {"HOME": "/", **top}
    assert credentials.overlaid(base, top, ["RESTIC_PASSWORD"]) == {
        "HOME": "/",
        "RESTIC_PASSWORD": "x",
        **top,
    }


def test_ways_of_borg() -> None:
    """borg prefers BORG_PASSPHRASE: one of the shell must not hide a job's own command."""
    top = {"BORG_PASSCOMMAND": "cat /p"}
    base = {"BORG_PASSPHRASE": "x", "BORG_PASSPHRASE_FD": "3", "BORG_REPO": "/r"}
    assert credentials.overlaid(base, top) == {"BORG_REPO": "/r", **top}
    assert credentials.clashes(("BORG_PASSCOMMAND", "BORG_PASSPHRASE", "BORG_REPO")) == [
        ("BORG_PASSCOMMAND", "BORG_PASSPHRASE")
    ]


def test_resumed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume leaves out the ways of another shell to say it, but none of the first attempt's."""
    monkeypatch.setenv("RESTIC_PASSWORD", "x")
    monkeypatch.setenv("RESTIC_PASSWORD_COMMAND", "y")
    client = dataclasses.replace(
        a_bare_plan().client, environment=(("RESTIC_PASSWORD_FILE", "/p"),)
    )
    env = launching.settings_of(client).env
    assert env["RESTIC_PASSWORD_FILE"] == "/p"
    assert not {"RESTIC_PASSWORD", "RESTIC_PASSWORD_COMMAND"} & set(env)
    both = dataclasses.replace(client, secrets=("RESTIC_PASSWORD",))
    env = launching.settings_of(both).env
    assert (env["RESTIC_PASSWORD"], "RESTIC_PASSWORD_COMMAND" in env) == ("x", False)


# -- whole runs --------------------------------------------------------------------------------


def a_plan(scene: Scene, source: str) -> plan.Plan:
    """Return a plan of a named job whose client prints its credential."""
    scene.behave('echo "$MY_WORD" > $home/got; echo "the word is $MY_WORD"')
    made = scene.plan("tank/a", job=plan.job_key("home"))
    client = dataclasses.replace(made.client, credentials=(("MY_WORD", source),))
    return dataclasses.replace(made, client=client)


def got(scene: Scene) -> str:
    return (scene.home / "got").read_text().strip()


def everywhere(scene: Scene) -> str:
    """Return all that the program wrote: the journal and the folders of the runs."""
    files = [path for path in scene.state.rglob("*") if path.is_file()]
    return "".join(path.read_bytes().decode("latin-1") for path in files)


@as_root
def test_given(scene: Scene, file: Path) -> None:
    """Promise 11: the client has the value; journal, log and end have it not, whatever its name."""
    ended = scene.backup(a_plan(scene, f"file:{file}"))
    assert ended.run
    assert ended.run.outcome == "completed"
    assert got(scene) == SECRET
    written = everywhere(scene)
    assert "the word is ***" in written
    assert f"file:{file}" in written
    assert SECRET not in written


@as_root
@pytest.mark.skipif(not shutil.which("ionice"), reason="ionice is not installed")
def test_niceness(scene: Scene) -> None:
    """The client, and it alone, is as nice as the plan wants, and its failure is still its own."""
    scene.behave('nice > $home/got; ionice -p $$ >> $home/got; exit "$(cat $home/status)"')
    (scene.home / "status").write_text("0")
    made = scene.plan("tank/a", nice=1, io_class="idle")
    ended = scene.backup(made)
    assert ended.run
    assert ended.run.outcome == "completed"
    assert got(scene).split() == [str(min(os.nice(0) + 1, 19)), "idle"]
    (run_client,) = scene.rows("SELECT payload FROM steps WHERE kind = 'run-client'")
    assert '"nice", "-n", "1", "ionice"' in run_client["payload"]
    (scene.home / "status").write_text("9")
    ended = scene.backup(scene.plan("tank/a", nice=1, io_class="idle"))
    assert ended.run
    assert (ended.run.outcome, "exit status 9" in str(ended.run.reason)) == ("failed", True)


def test_journaled(file: Path, tmp_path: Path) -> None:
    """A plan has what a job sets, whatever it is called, and of credentials the place alone."""
    env = {"HOME": "/root", "LESS": "-R", "AWS_SESSION_TOKEN": "x", "RESTIC_PASSWORD_FILE": "/p"}
    sources = (("RESTIC_PASSWORD", f"file:{file}"), ("MY_WORD", f"file:{file}"))
    wanted = preparing.settings(
        ["x"], [], env, cwd=str(tmp_path), chosen={"MY_PATH": "/x"}, sources=sources
    )
    assert wanted.env["MY_WORD"] == wanted.env["RESTIC_PASSWORD"] == SECRET
    made = preparing._client_plan(Command(), wanted, Facts("", None))
    assert made.environment == (("HOME", "/root"), ("MY_PATH", "/x"))
    assert (made.secrets, made.credentials) == (("AWS_SESSION_TOKEN",), sources)
    assert SECRET not in repr(made)
    assert wanted.redact(f"it is {SECRET}") == "it is ***"


def test_no_ionice(scene: Scene, tmp_path: Path) -> None:
    """Where `nice` or `ionice` is not there, the job is refused before anything is changed."""
    wanted = preparing.settings(["x"], [], {"PATH": str(tmp_path / "none")}, cwd="/")
    for values in ({"nice": 1}, {"io_class": "idle"}):
        with pytest.raises(UserError, match="nice is not installed"):
            preparing._check_priority(scene.plan("tank/a", **values), wanted)
    preparing._check_priority(scene.plan("tank/a"), wanted)


@as_root
def test_wait(scene: Scene, file: Path) -> None:
    """Promise 14: a run whose credential is not there waits, says for what, and then goes on."""
    scene.backup(a_plan(scene, f"file:{file}"), "journal:snapshotted#1", "all")
    away = file.rename(file.with_suffix(".away"))
    waiting = scene.recover()
    assert f"waits: cannot read the file of MY_WORD {file}" in str(waiting.raised)
    assert len(scene.pool["snapshots"]) == 1
    away.rename(file)
    assert [run.outcome for run in [scene.recover().run] if run] == ["completed"]
    assert got(scene) == SECRET
    assert scene.left() == []


@as_root
def test_moved(scene: Scene, file: Path) -> None:
    """Where the configuration now names another place, that is journaled and taken."""
    made = a_plan(scene, "credential:gone")
    scene.backup(made, "journal:snapshotted#1", "all")
    assert "systemd credential gone" in str(scene.recover().raised)
    places = {made.job: {"MY_WORD": f"file:{file}", "OTHER": "file:/x"}, "job x": {"MY_WORD": "y"}}
    init = Settler.__init__
    scene.changes.append(
        lambda: setattr(Settler, "__init__", lambda *a, **k: init(*a, **k | {"sources": places}))
    )
    ended = scene.recover()
    assert ended.run
    assert (ended.run.outcome, ended.run.reason) == ("completed", None)
    assert got(scene) == SECRET
    with Journal.open(scene.state) as journal:
        run = journal.load(made.run)
    assert run.plan.client.credentials == (("MY_WORD", f"file:{file}"),)


def test_older_plan() -> None:
    """The plan of an older journal, without credentials and niceness, is read."""
    data = json.loads(plan.to_json(a_bare_plan()))
    for name in ("nice", "io_class"):
        del data[name]
    del data["client"]["credentials"]
    assert plan.from_json(json.dumps(data)) == a_bare_plan()


def a_bare_plan() -> plan.Plan:
    client = plan.ClientPlan("command", ("true",), (), "/", "", None, (), ())
    return plan.Plan("0" * 16, "j", "l", (), (), "namespace", "", (), (), (), client)

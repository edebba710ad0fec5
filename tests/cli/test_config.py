"""`atomtx config`, and jobs by name in `atomtx backup` and `atomtx recover`."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from atomtx import cli
from atomtx.cli import backup
from atomtx.errors import UserError
from tests.cli.conftest import Run
from tests.cli.test_cli import loaded

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups")
SECRET = "open sesame"
GOOD = """
[defaults]
environment = { RESTIC_REPOSITORY = "/srv/restic" }

[jobs.home]
volumes = ["tank/home"]
recursive = true
arguments = ["--tag", "nightly"]
nice = 10
time-limit = "6h"
credentials.RESTIC_PASSWORD.file = "FILE"
"""
BAD = '[jobs.home]\nvolume = ["tank/home"]\nretries = "many"\n'


@pytest.fixture
def file(tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that $ATOMTX_CONFIG names, with one job, and its password."""
    password = tmp_path / "password"
    password.write_text(f"{SECRET}\n")
    path = tmp_path / "atomtx.toml"
    path.write_text(GOOD.replace("FILE", str(password)))
    for each in (password, path):
        each.chmod(0o600)
    env["ATOMTX_CONFIG"] = str(path)
    monkeypatch.setenv("ATOMTX_CONFIG", str(path))
    return path


# -- check -------------------------------------------------------------------------------------


def test_check(file: Path, atomtx_: Run) -> None:
    """What is right is one line, with the jobs; status 0."""
    done = atomtx_("config", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{file}: right; jobs: home\n"
    found = json.loads(atomtx_("config", "check", "--json").stdout)
    assert found == {"ok": True, "path": str(file), "jobs": ["home"], "problems": []}


def test_check_wrong(file: Path, atomtx_: Run) -> None:
    """All that is wrong is told, a line each with file and line; status 2."""
    file.write_text(BAD)
    done = atomtx_("config", "check")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f'{file}:2: job home: unknown key "volume"; did you mean "volumes"?',
        f'{file}:3: job home: retries must be a whole number from 0 to 1000, not "many"',
    ]
    done = atomtx_("config", "check", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (2, False)
    assert [(p["path"], p["line"]) for p in found["problems"]] == [(str(file), 2), (str(file), 3)]


@as_root
def test_check_credentials(file: Path, atomtx_: Run) -> None:
    """A file of a credential that others can read is told, on its line, without its content."""
    (file.parent / "password").chmod(0o644)
    done = atomtx_("config", "check")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{file}:11: job home: the file of RESTIC_PASSWORD ")
    assert "can be read by others" in done.stderr
    assert SECRET not in done.stderr


@as_root
@pytest.mark.parametrize(
    "words", ["config check", "config show", "backup home", "recover --config {}", "backup tank"]
)
def test_untrusted(file: Path, atomtx_: Run, words: str) -> None:
    """Root refuses a configuration that somebody else can write, in one line; status 2."""
    file.chmod(0o666)
    done = atomtx_(*words.format(file).split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"atomtx: the configuration {file} is refused: {file} can be written by others "
        "than its owner",
        f"  chmod go-w {file}",
    ]
    assert not Path(file.parent / "state").exists()


@pytest.mark.parametrize("words", ["backup home", "backup --job x", "config show"])
def test_wrong_everywhere(file: Path, atomtx_: Run, words: str) -> None:
    """A configuration that is wrong stops whatever needs it: all errors, status 2, no change."""
    file.write_text(BAD)
    done = atomtx_(*words.split())
    assert done.returncode == 2
    assert "2 errors in the configuration" in done.stderr
    assert f"\n{file}:2: job home: " in done.stderr
    assert f"\n{file}:3: job home: " in done.stderr
    assert not Path(file.parent / "state").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "ok atomtx.toml, jobs: home"), (BAD, "warning 2 errors"), ("", "ok jobs: none")],
)
def test_doctor(file: Path, atomtx_: Run, text: str | None, words: str) -> None:
    """`doctor` tells whether the configuration is right, and how to see what is not."""
    if text is not None:
        file.write_text(text)
    checks = json.loads(atomtx_("doctor", "--json").stdout)["checks"]
    (found,) = [check for check in checks if check["name"] == "configuration"]
    said = f"{found['status']} {found['detail']}"
    assert all(word in said for word in words.split())
    assert (found["hint"] is not None) is (found["status"] == "warning")


# -- show, schema ------------------------------------------------------------------------------


def test_show(file: Path, atomtx_: Run) -> None:
    """`show` prints a job as TOML with origins; no secret, and nothing of another job."""
    done = atomtx_("config", "show", "home")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["jobs"]["home"]["nice"] == 10
    assert "# line 9\n" in done.stdout
    assert SECRET not in done.stdout
    found = json.loads(atomtx_("config", "show", "--json").stdout)["jobs"]
    assert found["home"]["environment"]["origin"] == "defaults, line 3"
    assert found["home"]["retries"] == {"value": 1, "origin": "default"}
    done = atomtx_("config", "show", "hom")
    assert done.returncode == 2
    assert 'did you mean "home"?' in done.stderr


def test_schema(atomtx_: Run) -> None:
    """`schema` prints JSON, with or without a configuration."""
    done = atomtx_("config", "schema")
    assert done.returncode == 0
    assert json.loads(done.stdout)["properties"]["jobs"]


@pytest.mark.parametrize("words", ["config check", "config show home", "config schema"])
def test_imports(file: Path, env: dict[str, str], words: str) -> None:
    """Looking at the configuration imports none of the modules that start slowly."""
    assert loaded(env, *words.split()) == []


# -- init --------------------------------------------------------------------------------------


def test_doctor_of_steps(file: Path, atomtx_: Run) -> None:
    """A step that `config check` refuses is no configuration that `doctor` calls right."""
    file.write_text(file.read_text() + 'steps = ["backup nosuch --frob"]\n')
    done = atomtx_("config", "check")
    assert done.returncode == 2
    checks = json.loads(atomtx_("doctor", "--json").stdout)["checks"]
    found = [check for check in checks if check["name"] == "configuration"]
    assert [check["status"] for check in found] == ["warning"]
    assert found[0]["detail"] == done.stderr.strip()
    assert "the step 'backup nosuch --frob' is wrong" in found[0]["detail"]


def test_init(tmp_path: Path, atomtx_: Run) -> None:
    """`init` writes a file for its owner alone that `check` finds right, and never overwrites."""
    path = tmp_path / "etc" / "new.toml"
    words = ("config", "init", "--config", str(path))
    assert atomtx_(*words, "--job", "home", "--job", "mail").returncode == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert atomtx_("config", "check", "--config", str(path)).stdout.endswith("jobs: home, mail\n")
    before = path.read_text()
    done = atomtx_(*words)
    assert done.returncode == 2
    assert f"{path} exists" in done.stderr
    assert path.read_text() == before


def test_init_new_parents(tmp_path: Path, atomtx_: Run) -> None:
    """The directories above that it makes can be written by nobody else, whatever the umask is."""
    path = tmp_path / "new" / "etc" / "new.toml"
    done = atomtx_("config", "init", "--config", str(path), umask=0)
    assert (done.returncode, done.stderr) == (0, "")
    assert [above.stat().st_mode & 0o777 for above in path.parents[:2]] == [0o755, 0o755]


def test_init_refused(tmp_path: Path, atomtx_: Run) -> None:
    """Where it cannot be written, is no name, or would be refused, nothing is left."""
    path = tmp_path / "new.toml"
    done = atomtx_("config", "init", "--config", str(path), "--job", "a/b")
    assert done.returncode == 2
    assert "'a/b' cannot be a job's name" in done.stderr
    done = atomtx_("config", "init", "--config", "/proc/new.toml")
    assert done.returncode == 1
    assert "cannot write /proc/new.toml" in done.stderr
    if os.geteuid() == 0:
        tmp_path.chmod(0o777)
        done = atomtx_("config", "init", "--config", str(path))
        assert done.returncode == 2
        assert f"chmod go-w {tmp_path}" in done.stderr
    assert list(tmp_path.iterdir()) == []


# -- backup ------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the planner is asked for; it answers with an error."""
    found: dict[str, Any] = {}

    def make_plan(request: Any, **values: Any) -> None:
        found.update(values, request=request)
        raise UserError("enough")

    monkeypatch.setattr(backup, "make_plan", make_plan)
    return found


def test_job(file: Path, planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A job by its name is planned with all that it says, and the options over it."""
    monkeypatch.setenv("RESTIC_PASSWORD_COMMAND", "pass show other")
    words = ["backup", "-n", "home", "--time-limit", "1h", "--", "--verbose"]
    assert cli.run(words) == 2
    request, wanted = planned["request"], planned["wanted"]
    assert (request.job, request.names, request.recursive) == ("home", ("tank/home",), True)
    assert (wanted.cwd, wanted.extra) == ("/", ("--tag", "nightly", "--verbose"))
    assert wanted.env["RESTIC_PASSWORD"] == SECRET
    assert "RESTIC_PASSWORD_COMMAND" not in wanted.env
    assert wanted.credentials == (("RESTIC_PASSWORD", f"file:{file.parent}/password"),)
    assert (planned["client_name"], planned["nice"], planned["retries"]) == ("restic", 10, 1)
    assert (planned["time_limit_s"], planned["grace_s"]) == (3600, 60)


def test_unnamed(file: Path, planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are planned as if there were no configuration."""
    monkeypatch.setenv("RESTIC_REPOSITORY", "/srv/other")
    assert cli.run(["backup", "-n", "tank/home"]) == 2
    assert planned["request"].job == ""
    assert planned["wanted"].env["RESTIC_REPOSITORY"] == "/srv/other"
    assert planned["wanted"].cwd == os.getcwd()
    assert (planned["nice"], planned["time_limit_s"], planned["wanted"].credentials) == (0, 0, ())


def test_absent_credential(file: Path, atomtx_: Run) -> None:
    """A new backup without its credential is refused before anything is asked or changed."""
    (file.parent / "password").unlink()
    done = atomtx_("backup", "--dry-run", "home")
    assert done.returncode == 2
    assert "cannot read the file of RESTIC_PASSWORD" in done.stderr


@as_root
def test_recover(file: Path, atomtx_: Run) -> None:
    """`recover --config` reads the configuration, and goes on as without it."""
    done = atomtx_("recover", "--config", str(file))
    assert done.returncode == 0, done.stderr
    assert "nothing to recover" in done.stdout + done.stderr
    assert atomtx_("recover", "--config", "/nowhere").returncode == 2

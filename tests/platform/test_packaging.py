"""What users install: each form of the package, in an empty virtual environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
UPGRADE = """
import sys
from pathlib import Path
from atomtx import statedir
from atomtx.journal import Journal
with Journal.open(statedir.prepare(Path(sys.argv[1]))) as journal:
    assert journal.open_runs() == []
"""
HEAVY = {"sqlalchemy", "alembic", "transitions", "rich", "sqlite3"}


@dataclass(frozen=True)
class Installation:
    """A virtual environment that holds atomtx and its dependencies, and nothing else."""

    folder: Path

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a program of its `bin`, far from the checkout and with nothing of our own set."""
        foreign = ("PYTHON", "ATOMTX", "VIRTUAL_ENV")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        program, *arguments = argv
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd="/tmp",
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def imports(self, *argv: str) -> set[str]:
        """Return the packages that Python imports while it runs *argv*."""
        script, *arguments = argv
        path = script if script.startswith("-") else str(self.folder / "bin" / script)
        log = self.run("python", "-X", "importtime", path, *arguments).stderr
        names = re.findall(r"^import time:.*\|\s*(\S+)$", log, re.MULTILINE)
        assert "click" in names or "json" in names
        return {name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    argv = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    done = subprocess.run(argv, cwd="/tmp", capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return folder


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def installation(
    request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    """Each form in turn, installed by pip as a user does it."""
    source = {
        "wheel": [str(next(built.glob("*.whl")))],
        "sdist": [str(next(built.glob("*.tar.gz")))],
        "editable": ["--editable", str(CHECKOUT)],
    }[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder)
    python = str(folder / "bin" / "python")
    argv = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *source]
    done = subprocess.run(argv, cwd="/tmp", capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return Installation(folder)


def test_version(installation: Installation) -> None:
    """The installed command starts and tells the version of its metadata."""
    said = installation.run("atomtx", "--version").stdout.split()[-1]
    code = "from importlib.metadata import version; print(version('atomtx'))"
    assert installation.run("python", "-c", code).stdout.strip() == said


def test_help(installation: Installation) -> None:
    """The installed command and `python -m atomtx` list the commands."""
    shown = installation.run("atomtx", "--help").stdout
    assert "backup" in shown
    assert "recover" in shown
    assert installation.run("python", "-m", "atomtx", "--help").stdout == shown


def test_new_journal(installation: Installation, tmp_path: Path) -> None:
    """An installation makes a journal and brings it up to date by itself; a second time too."""
    state = tmp_path / "100% mine"
    installation.run("python", "-c", UPGRADE, str(state))
    installation.run("python", "-c", UPGRADE, str(state))
    assert (state / "journal.db").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_light_start(installation: Installation, option: str) -> None:
    """`--help` and `--version` import neither SQLAlchemy nor transitions, nor what else is slow."""
    assert not installation.imports("atomtx", option) & HEAVY


def test_light_runner(installation: Installation) -> None:
    """The runner, which may stay for hours, loads neither the database nor the terminal."""
    found = installation.imports("-c", "import atomtx.runner")
    assert not found & (HEAVY | {"click"})


def test_editable_leaves_no_copy(installation: Installation) -> None:
    """Exactly one copy of the package is installed: an editable one is the checkout itself."""
    code = "import atomtx, pathlib; print(pathlib.Path(atomtx.__file__).parent)"
    used = Path(installation.run("python", "-c", code).stdout.strip())
    copies = list(installation.folder.glob("lib/python3*/site-packages/atomtx"))
    assert copies in ([used], [])
    if not copies:
        assert used == CHECKOUT / "engine" / "atomtx"


def test_wheel_content(built: Path) -> None:
    """The wheel holds the package with its migrations, the licence, and nothing else."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"atomtx"}
    assert {"atomtx/py.typed", "atomtx/migrations/env.py", "atomtx/migrations/script.py.mako"} <= {
        *names
    }
    shipped = {Path(name).name for name in names if name.startswith("atomtx/migrations/versions/")}
    assert shipped == {path.name for path in (CHECKOUT / "migrations" / "versions").glob("*.py")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_content(built: Path) -> None:
    """The sdist holds what a packager needs to build and to test: nothing of it is only in git."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "alembic.ini",
        "pyproject.toml",
        "Makefile",
        "README.md",
        "LICENSE",
        ".ci/run",
        "docs/design.md",
        "migrations/env.py",
        "tests/conftest.py",
        "tests/vm/build.sh",
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]

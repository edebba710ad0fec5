"""The scripts for rc.d and periodic: run by sh, beside a played rc.subr and a played atomtx."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from atomtx import system

ETC = Path(system.__file__).parent / "etc"
RC_SUBR = """
load_rc_config() { test "$1" = atomtx && test "$rcvar" = atomtx_enable; . {home}/rc.conf; }
run_rc_command() {
	case $1 in
	start) case $atomtx_enable in YES) $start_cmd ;; esac ;;
	status) $status_cmd ;;
	stop) $stop_cmd ;;
	esac
}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A machine's /etc, and programs that tell how they were called."""
    (tmp_path / "rc.subr").write_text(RC_SUBR.replace("{home}", str(tmp_path)))
    for name in ("daemon", "atomtx"):
        path = tmp_path / name
        path.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\ncase "$1 $3" in\n'
            f'"check $3") exit "$(cat {tmp_path}/age)" ;; "backup bad") exit 3 ;; esac\n'
        )
        path.chmod(0o755)
    (tmp_path / "age").write_text("0")
    return tmp_path


def run(home: Path, name: str, conf: str, *argv: str) -> tuple[int, list[str], str]:
    """Run a script with a configuration; return its status, what it called, what it said."""
    (home / "rc.conf").write_text(f'atomtx_program="{home}/atomtx"\n{conf}')
    (home / "periodic.conf").write_text(
        f'source_periodic_confs() {{ daily_atomtx_program="{home}/atomtx"\n{conf}\n}}\n'
    )
    text = (ETC / name).read_text()
    for real, played in (
        ("/etc/rc.subr", f"{home}/rc.subr"),
        ("/usr/sbin/daemon", f"{home}/daemon"),
        ("/etc/defaults/periodic.conf", f"{home}/periodic.conf"),
    ):
        text = text.replace(real, played)
    (home / "calls").write_text("")
    done = subprocess.run(
        ["sh", "-eu" if name.startswith("rc.d") else "-u", "-s", *argv],
        input=text,
        text=True,
        capture_output=True,
    )
    assert done.stderr == ""
    return done.returncode, (home / "calls").read_text().splitlines(), done.stdout


def test_syntax() -> None:
    """Each script is one that sh can read, and may be run."""
    found = [path for path in ETC.rglob("*") if path.is_file()]
    assert len(found) == 2
    for path in found:
        assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
        assert path.stat().st_mode & 0o111 == 0o111


def test_boot(home: Path) -> None:
    """At boot what was interrupted is settled, and the boot does not wait for it."""
    conf = 'atomtx_enable="YES"\natomtx_recover="--config /x"'
    status, calls, _ = run(home, "rc.d/atomtx", conf, "start")
    assert status == 0
    assert calls == [f"daemon -f -S -T atomtx {home}/atomtx recover --config /x"]


def test_not_enabled(home: Path) -> None:
    """What nobody enabled does nothing, at boot and every day."""
    assert run(home, "rc.d/atomtx", "", "start")[1] == []
    assert run(home, "periodic/daily/490.atomtx", "") == (0, [], "")


def test_status(home: Path) -> None:
    """`service atomtx status` is `atomtx status`, and stop is nothing: runs get the signal."""
    assert run(home, "rc.d/atomtx", "", "status")[1] == ["atomtx status"]
    assert run(home, "rc.d/atomtx", "", "stop")[:2] == (0, [])


@pytest.mark.parametrize(
    ("jobs", "age", "expected"),
    [("home mail", 0, 0), ("home", 1, 1), ("home", 2, 3), ("bad", 0, 3), ("bad", 1, 3), ("", 0, 0)],
)
def test_daily(home: Path, jobs: str, age: int, expected: int) -> None:
    """Every job runs, whatever became of the one before; the status is periodic's."""
    (home / "age").write_text(str(age))
    conf = f'daily_atomtx_enable="YES"\ndaily_atomtx_jobs="{jobs}"'
    status, calls, said = run(home, "periodic/daily/490.atomtx", conf)
    assert status == expected
    backups = [f"atomtx backup --quiet {job}" for job in jobs.split()]
    assert calls == [*backups, "atomtx check --max-age 26h"]
    assert ("exit status 3" in said) == (jobs == "bad")


def test_program_is_missing(home: Path) -> None:
    """A program that is not there is told as what it is: a wrong configuration."""
    conf = 'daily_atomtx_enable="YES"\ndaily_atomtx_program="/nonexistent"'
    assert run(home, "periodic/daily/490.atomtx", conf)[0] == 2

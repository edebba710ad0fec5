"""`atomtx install systemd`, `uninstall systemd` and `notify`, as a user types them."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from atomtx import locks, notices, outbox, units
from atomtx.cli import notify
from atomtx.cli.render import reporter
from atomtx.notices import Facts, NotifySettings
from tests.cli.conftest import Run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="units are root's")
CONFIG = """
[jobs.home]
volumes = ["no-such-pool/home"]
client = "restic"
environment = {{ RESTIC_REPOSITORY = "/srv/restic" }}
notify-command = ["{tell}"]
[jobs.my-photos]
volumes = ["/srv/photos"]
client = "restic"
environment = {{ RESTIC_REPOSITORY = "sftp:u@h:/x" }}
credentials.RESTIC_PASSWORD = {{ credential = "no-such" }}
"""


@pytest.fixture
def file(tmp_path: Path, env: dict[str, str]) -> Path:
    path = tmp_path / "atomtx.toml"
    tell = tmp_path / "tell"
    tell.write_text(f"#!/bin/sh\necho $ATOMTX_EVENT $ATOMTX_REASON >>{tmp_path}/told\n")
    tell.chmod(0o755)
    path.write_text(CONFIG.format(tell=tell))
    env["ATOMTX_CONFIG"] = str(path)
    return path


def test_install(file: Path, tmp_path: Path, atomtx_: Run) -> None:
    """Units are written for all jobs, what is missing is told, and all of it is taken away."""
    where = tmp_path / "units"
    words = ("install", "systemd", "--directory", str(where))
    done = atomtx_(*words, "--on-calendar", "Mon *-*-* 03:00", "--randomized-delay", "1h")
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: job home: /srv/restic is not there yet" in done.stdout
    assert "note: job my-photos: the credential no-such is not there" in done.stdout
    timer = (where / "atomtx@my-photos.timer").read_text()
    assert "OnCalendar=Mon *-*-* 03:00\n" in timer
    assert "RandomizedDelaySec=3600\n" in timer
    assert f"Environment=ATOMTX_CONFIG={file}" in (where / units.BACKUP).read_text()
    # Once more: the timer stays as it is, though nothing is said of it.
    again = atomtx_(*words)
    assert again.stdout.startswith("nothing has changed\n")
    assert (where / "atomtx@my-photos.timer").read_text() == timer
    one = atomtx_("uninstall", "systemd", "--directory", str(where), "--job", "home")
    assert one.stdout.count("removed") == 3
    atomtx_("uninstall", "systemd", "--directory", str(where))
    assert list(where.iterdir()) == []
    last = atomtx_("uninstall", "systemd", "--directory", str(where))
    assert (last.returncode, last.stdout) == (0, "nothing of ours is there\n")


def test_one_option_of_a_timer(file: Path, tmp_path: Path, atomtx_: Run) -> None:
    """An option changes what it says, and nothing else of a timer that is there."""
    where = tmp_path / "units"
    words = ("install", "systemd", "--directory", str(where))
    when = ("--on-calendar", "Mon *-*-* 03:00", "--randomized-delay", "1h", "--wake-system")
    assert atomtx_(*words, "--job", "home", *when).returncode == 0
    timer = where / "atomtx@home.timer"
    before = timer.read_text()
    assert "WakeSystem=true\n" in before
    assert atomtx_(*words, "--no-persistent").returncode == 0
    assert timer.read_text() == before.replace("Persistent=true\n", "")
    assert "OnCalendar=daily\n" in (where / "atomtx@my-photos.timer").read_text()
    taken_back = ("--persistent", "--no-wake-system", "--randomized-delay", "0")
    assert atomtx_(*words, "--job", "home", *taken_back).returncode == 0
    lines = ["OnCalendar=Mon *-*-* 03:00", "Persistent=true", "AccuracySec=1s"]
    assert timer.read_text().partition("[Timer]\n")[2].splitlines()[:4] == [*lines, ""]


def test_install_new_parents(file: Path, tmp_path: Path, atomtx_: Run) -> None:
    """The directories that it makes can be written by root alone, whatever the umask is."""
    where = tmp_path / "new" / "units"
    assert atomtx_("install", "systemd", "--directory", str(where), umask=0).returncode == 0
    made = [where.parent, where, *(path for path in where.iterdir() if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o755}


@pytest.mark.parametrize("name", ["*", "**", "hom?", "../home"])
def test_uninstall_no_name(file: Path, tmp_path: Path, atomtx_: Run, name: str) -> None:
    """What no job can be called takes nothing away, a pattern of names neither."""
    where = tmp_path / "units"
    words = ("systemd", "--directory", str(where))
    assert atomtx_("install", *words).returncode == 0
    before = sorted(where.rglob("*"))
    done = atomtx_("uninstall", *words, "--job", "home", "--job", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name!r} cannot be a job's name" in done.stderr
    assert sorted(where.rglob("*")) == before


def test_other_configuration(file: Path, tmp_path: Path, env: dict[str, str], atomtx_: Run) -> None:
    """A job that has gone is told; no configuration is put in the place of an installed job's."""
    where = tmp_path / "units"
    words = ("install", "systemd", "--directory", str(where))
    assert atomtx_(*words).returncode == 0
    drop_in = where / "atomtx@home.service.d" / units.DROP_IN
    assert f"Environment=ATOMTX_CONFIG={file}\n" in drop_in.read_text()
    assert f"Environment=ATOMTX_STATE_DIR={tmp_path}/state\n" in drop_in.read_text()
    before = {path: path.read_text() for path in where.rglob("*") if path.is_file()}
    moved = tmp_path / "moved.toml"
    moved.write_text(file.read_text().replace("[jobs.home]", "[jobs.away]"))
    refused = atomtx_(*words, "--config", str(moved))
    assert refused.returncode == 2
    assert f"job home is installed with another ATOMTX_CONFIG: {file}" in refused.stderr
    elsewhere = atomtx_(*words, "--job", "home", env={**env, "ATOMTX_STATE_DIR": "/srv/state"})
    assert elsewhere.returncode == 2
    assert "job my-photos is installed with another ATOMTX_STATE_DIR" in elsewhere.stderr
    assert before == {path: path.read_text() for path in where.rglob("*") if path.is_file()}
    moved.replace(file)
    done = atomtx_(*words)
    assert done.returncode == 0
    assert f"note: job home is installed, and is not in {file}" in done.stdout
    assert "note: job away is" not in done.stdout


def test_print(file: Path, tmp_path: Path, atomtx_: Run) -> None:
    """`--print` shows each unit under its name, and writes nothing."""
    where = tmp_path / "units"
    done = atomtx_("install", "systemd", "--print", "--job", "home", "--directory", str(where))
    assert done.returncode == 0
    assert f"# {where}/atomtx@home.timer\n{units.MARKER}\n" in done.stdout
    assert "my-photos" not in done.stdout
    assert not where.exists()


def test_steps(file: Path, tmp_path: Path, atomtx_: Run) -> None:
    """The service of a job with steps runs them, with the paths of the jobs that they back up."""
    text = '[jobs.night]\nvolumes = ["tank/a"]\nsteps = ["snap", "backup home", "unsnap"]\n'
    file.write_text(file.read_text() + text)
    done = atomtx_("install", "systemd", "--print", "--job", "night", "--directory", str(tmp_path))
    assert done.returncode == 0, done.stderr
    of_job = done.stdout.partition(f"# {tmp_path}/atomtx@night.service.d/{units.DROP_IN}\n")[2]
    service, _, others = of_job.partition("\n# /")
    assert " run --wait --on-stop keep %i\n" in service
    assert "/srv/restic" in service
    assert " run --wait" not in others


def test_no_client(file: Path, tmp_path: Path, env: dict[str, str], atomtx_: Run) -> None:
    """What each backup of a service would lack is told, and how to see it; not what a shell has."""
    file.write_text(file.read_text() + '[jobs.bare]\nvolumes = ["tank/a"]\n')
    env["RESTIC_REPOSITORY"] = "/srv/of-this-shell"
    done = atomtx_("install", "systemd", "--directory", str(tmp_path / "units"))
    assert (done.returncode, done.stderr) == (0, "")
    told = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert [line.partition(":")[2].partition(":")[2].partition(":")[0] for line in told] == [
        " its service has no password (RESTIC_PASSWORD)",  # of home
        ' its service has no client (client = "restic")',
    ]
    assert told[1].endswith(f": atomtx backup --dry-run --config {file} bare")
    assert "is not known" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--job", "hom"), 'has no job "hom"'),
        (("--on-calendar", "sometime"), "'sometime' is no time for OnCalendar="),
        (("--randomized-delay", "long"), "'long'"),
    ],
)
def test_refused(
    file: Path, tmp_path: Path, atomtx_: Run, words: tuple[str, ...], message: str
) -> None:
    """What makes no sense is refused before anything is written."""
    where = tmp_path / "units"
    done = atomtx_("install", "systemd", "--directory", str(where), *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not where.exists()


def test_foreign(file: Path, tmp_path: Path, atomtx_: Run) -> None:
    """A unit that somebody else wrote is kept, and nothing is written beside it."""
    foreign = tmp_path / "units" / "atomtx@home.timer"
    foreign.parent.mkdir()
    foreign.write_text("[Timer]\nOnCalendar=weekly\n")
    done = atomtx_(
        "install", "systemd", "--directory", str(foreign.parent), "--on-calendar", "daily"
    )
    assert done.returncode == 2
    assert f"{foreign} was not written by `atomtx install systemd`" in done.stderr
    assert list(foreign.parent.iterdir()) == [foreign]


# -- notices -----------------------------------------------------------------------------------


def test_notify(file: Path, tmp_path: Path, env: dict[str, str], atomtx_: Run) -> None:
    """What was left is given once; what cannot be given is kept, and said."""
    state = tmp_path / "state"
    state.mkdir()
    notice = notices.notice(Facts("nas", "home", datetime.now(UTC), reason="no route"), str)
    tell = NotifySettings(command=(str(tmp_path / "tell"),))
    broken = NotifySettings(command=("/no/such",))
    for n, settings in enumerate((tell, broken)):
        outbox.leave(state, str(n), settings, notice)
    done = atomtx_("notify")
    assert done.returncode == 1
    assert "warning: not notified: command: cannot start /no/such" in done.stderr
    assert (tmp_path / "told").read_text() == "failed no route\n"
    assert [path.name for path in (state / "outbox").iterdir()] == ["1.json"]


@pytest.mark.parametrize("spoke", [True, False])
def test_killed(file: Path, tmp_path: Path, env: dict[str, str], atomtx_: Run, spoke: bool) -> None:
    """Of a service that was killed without a word it is said; of one that spoke, nothing more."""
    state = tmp_path / "state"
    state.mkdir()
    if spoke:
        notice = notices.notice(Facts("nas", "home", datetime.now(UTC)), str)
        outbox.leave(state, "1", NotifySettings(), notice, "abc")
    monitor = {"SERVICE_RESULT": "oom-kill", "EXIT_CODE": "killed", "EXIT_STATUS": "KILL"}
    env |= {f"MONITOR_{n}": v for n, v in monitor.items()} | {"MONITOR_INVOCATION_ID": "abc"}
    done = atomtx_("notify", "atomtx@home")
    assert (done.returncode, done.stdout) == (0, "")
    told = tmp_path / "told"
    expected = "failed atomtx@home.service was ended: oom-kill (killed KILL)\n"
    assert (told.read_text() if told.exists() else "") == ("" if spoke else expected)
    env["MONITOR_SERVICE_RESULT"] = "success"
    told.unlink(missing_ok=True)
    assert atomtx_("notify", "atomtx@home").returncode == 0
    assert not told.exists()


def test_late_ping(file: Path, tmp_path: Path, atomtx_: Run) -> None:
    """A ping that cannot be given is said, and not kept: later it would hide what came after."""
    (tmp_path / "state").mkdir()
    notice = notices.notice(Facts("nas", "home", datetime.now(UTC)), str)
    for name, settings in {
        "1": NotifySettings(ping_url_file="/no/such"),
        "2": NotifySettings(apprise_file="/no/such"),
    }.items():
        outbox.leave(tmp_path / "state", name, settings, notice)
    done = atomtx_("notify")
    assert done.returncode == 1
    assert done.stderr.count("not notified") == 2
    assert [path.name for path in (tmp_path / "state" / "outbox").iterdir()] == ["2.json"]


def test_two_units(file: Path, tmp_path: Path, env: dict[str, str], atomtx_: Run) -> None:
    """A unit leaves another's letter to it; who gives it first does not make that one lie."""
    state = tmp_path / "state"
    state.mkdir()
    tell = NotifySettings(command=(str(tmp_path / "tell"),))
    notice = notices.notice(Facts("nas", "home", datetime.now(UTC), reason="no route"), str)
    outbox.leave(state, "1", tell, notice, "abc")
    other = {**env, "MONITOR_SERVICE_RESULT": "success", "MONITOR_INVOCATION_ID": "other"}
    assert atomtx_("notify", "ended-atomtx@my-photos", env=other).returncode == 0
    assert [path.name for path in (state / "outbox").iterdir()] == ["1.json"]
    assert atomtx_("notify").returncode == 0
    assert [path.name for path in (state / "outbox").iterdir()] == ["given-abc"]
    own = {**env, "MONITOR_SERVICE_RESULT": "exit-code", "MONITOR_INVOCATION_ID": "abc"}
    assert atomtx_("notify", "atomtx@home", env=own).returncode == 0
    assert list((state / "outbox").iterdir()) == []
    assert (tmp_path / "told").read_text() == "failed no route\n"


def test_another_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another gives notices, none is given a second time, and that is said."""
    monkeypatch.setattr(locks, "wait_until", lambda condition, *_, **__: condition())
    notice = notices.notice(Facts("nas", "home", datetime.now(UTC)), str)
    outbox.leave(tmp_path, "1", NotifySettings(), notice)
    with reporter(as_json=False) as show:
        with outbox.giving(tmp_path) as is_ours:
            assert is_ours
            count, (problem,) = notify.empty(tmp_path, "", "", show)
        assert (count, len(list(outbox.letters(tmp_path)))) == (0, 1)
        assert problem.startswith("another `atomtx notify` is at work")
        assert notify.empty(tmp_path, "", "", show) == (1, [])


def test_broken_configuration(
    file: Path, tmp_path: Path, env: dict[str, str], atomtx_: Run
) -> None:
    """With a configuration that is wrong, what was left is given; whom nobody told, is said."""
    state = tmp_path / "state"
    state.mkdir()
    notice = notices.notice(Facts("nas", "home", datetime.now(UTC), reason="no route"), str)
    outbox.leave(state, "1", NotifySettings(command=(str(tmp_path / "tell"),)), notice)
    file.write_text("[jobs.home\n")
    env |= {"MONITOR_SERVICE_RESULT": "oom-kill", "MONITOR_INVOCATION_ID": "abc"}
    done = atomtx_("notify", "atomtx@home", "--config", str(file))
    assert done.returncode == 1
    assert f"not notified: who is told is not known: {file}:" in done.stderr
    assert (tmp_path / "told").read_text() == "failed no route\n"


def test_left_for_later(file: Path, tmp_path: Path, env: dict[str, str], atomtx_: Run) -> None:
    """In a service, a backup that fails leaves its notice, and `notify` gives it."""
    env |= {outbox.VARIABLE: "1", "INVOCATION_ID": "abc", "PATH": os.path.dirname(sys.executable)}
    (tmp_path / "state").mkdir()
    assert atomtx_("backup", "--job", "home").returncode in (1, 2)  # with zfs or without it
    assert not (tmp_path / "told").exists()
    env |= {"MONITOR_SERVICE_RESULT": "exit-code", "MONITOR_INVOCATION_ID": "abc"}
    del env[outbox.VARIABLE]
    env["PATH"] += ":/bin"
    assert atomtx_("notify", "atomtx@home").returncode == 0
    (line,) = (tmp_path / "told").read_text().splitlines()
    assert line.startswith("failed ")

"""The units of systemd: their text, and what systemd itself says of them."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atomtx import config, installing, units
from atomtx.cli import install
from atomtx.config import Config
from atomtx.config_schema import Credential, Job
from atomtx.errors import EffectError, UserError
from atomtx.units import Program, Schedule, Service

PROGRAM = Program(("/bin/true",), {"HOME": "/root", "XDG_CACHE_HOME": units.CACHE})
WITH_LVM = dataclasses.replace(PROGRAM, has_lvm=True)
SERVICES = {
    "zfs": Service("home", 60),
    "btrfs, a local repository": Service("my-photos", 60, writes=("/mnt/my disk/restic 100%",)),
    "B2 with credentials": Service(
        "b2",
        600,
        credentials={
            "b2": "/etc/credstore.encrypted/b2",
            "b2-key": "/etc/credstore/b2-key",
        },
    ),
    "hooks": Service("db.1", 60, ("/var/backups",), has_hooks=True, quiesces=True),
    "a command": Service("tar_x", 60, ("/srv/$x",), is_command=True, has_priority=True),
}


def verify(folder: Path, *names: str) -> str:
    """Return what systemd has to say of units."""
    argv = ["systemd-analyze", "verify", "--man=no", *(str(folder / name) for name in names)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr + ("" if done.returncode == 0 else f"{done.returncode}")


def written(folder: Path, services: list[Service], program: Program = PROGRAM) -> list[str]:
    """Write units; return the names of those to be looked at."""
    texts = units.files(services, program)
    schedule = Schedule(("Mon *-*-* 03:00", "daily"), randomized_delay_s=300, wakes=True)
    texts |= {units.timer_name(each.job): units.timer(each.job, schedule) for each in services}
    installing.write(folder, texts)
    instances = [
        units.instance(template, each.job)
        for each in services
        for template in (units.BACKUP, units.RESUME, units.NOTIFY)
    ]
    return [*instances, units.RECOVER, *(units.timer_name(each.job) for each in services)]


def test_verify(tmp_path: Path) -> None:
    """systemd has nothing to say of any unit, and finds a fault where there is one."""
    names = written(tmp_path, list(SERVICES.values()))
    assert verify(tmp_path, *names) == ""
    drop_in = tmp_path / "atomtx@home.service.d" / units.DROP_IN
    drop_in.write_text(drop_in.read_text() + "ReadWritePath=/x\n")
    assert "ReadWritePath'" in verify(tmp_path, *names)


def test_program_not_there(tmp_path: Path) -> None:
    """Words of a program are quoted; a program that is not there is seen by systemd."""
    program = Program(("/no where/python $x", "$y"), {"A": 'b "c" 100%'})
    names = written(tmp_path, [SERVICES["zfs"]], program)
    text = (tmp_path / units.BACKUP).read_text()
    assert 'ExecStart="/no where/python $x" $$y backup --wait --on-stop keep --job %i' in text
    assert 'Environment="A=b \\"c\\" 100%%"' in text
    assert "/no where/python $x is not executable" in verify(tmp_path, *names)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
@example("a\rb")
def test_word(text: str) -> None:
    """Whatever a path holds, its word stays on its line and has no specifier in it."""
    word = units.word(text)
    assert not {"\n", "\r"} & set(word)
    assert "%" not in word.replace("%%", "")


def test_job() -> None:
    """A job's drop-in has what its configuration needs, for the service and the resumption."""
    texts = units.files(list(SERVICES.values()), PROGRAM)
    assert 'ReadWritePaths="-/mnt/my disk/restic 100%%"' in texts[of("my-photos")]
    b2 = texts[of("b2")]
    assert "LoadCredentialEncrypted=b2:/etc/credstore.encrypted/b2\n" in b2
    assert "LoadCredential=b2-key:/etc/credstore/b2-key\n" in b2
    assert "TimeoutStopSec=780\n" in b2
    assert "CAP_SETUID" in texts[of("db.1")]
    assert "CAP_SETUID" not in texts[of("home")] + texts[units.BACKUP]
    assert "RestrictSUIDSGID=no" in texts[of("tar_x")]
    for service in SERVICES.values():
        assert texts[of(service.job)] == texts[of(service.job, units.RESUME)]
    assert "/var/backups" in texts[units.RECOVER]


CONFIG = """
[jobs.home]
volumes = ["tank/home"]
steps = ["snap --transient", "backup borg --from-snapshots", "backup tar", "unsnap"]
write-paths = ["/var/sums"]
quiesce = ["db", "hold"]
hook-limit = "300s"
grace = "1m"
[jobs.borg]
volumes = ["tank/home"]
client = "borg"
grace = "10m"
environment = { BORG_REPO = "/srv/borg" }
credentials.BORG_PASSPHRASE = { credential = "borg" }
[jobs.tar]
volumes = ["tank/home"]
command = ["my-tar"]
write-paths = ["/srv/tar"]
[jobs.alone]
volumes = ["tank/alone"]
client = "restic"
environment = { RESTIC_REPOSITORY = "/srv/alone" }
"""


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        Schedule(("Mon *-*-* 03:00", "daily"), is_persistent=False, wakes=True),
        Schedule(("*:0/5",), randomized_delay_s=300),
    ],
)
def test_schedule_of(schedule: Schedule) -> None:
    """What a timer was written of can be read out of it."""
    assert units.schedule_of(units.timer("home", schedule)) == schedule


def test_steps(tmp_path: Path) -> None:
    """The service of a job with steps runs these, and may do what a backup of their jobs may."""
    found = config.parse(CONFIG, "/etc/atomtx/atomtx.toml")
    texts, _ = installing.pages(
        found, list(found.jobs), {}, PROGRAM, tmp_path, of_steps={"home": ("borg", "tar")}
    )
    home = texts[of("home")]
    assert home.endswith("ExecStart=\nExecStart=/bin/true run --wait --on-stop keep %i\n")
    assert "ExecStart" not in texts[of("home", units.RESUME)]
    for name in ("borg", "tar", "alone"):
        assert "ExecStart" not in texts[of(name)]
    for line in (
        *(f"ReadWritePaths=-{path}" for path in ("/srv/borg", "/srv/tar", "/var/sums")),
        "LoadCredentialEncrypted=borg:/etc/credstore.encrypted/borg",
        "TimeoutStopSec=1080",  # the longest of them: 10 min, a hook, the clean-up
        "RestrictSUIDSGID=no",
        "Nice=0",
    ):
        assert f"{line}\n" in home, line
        assert f"{line}\n" in texts[of("home", units.RESUME)], line
    assert "/srv/alone" not in home
    installing.write(tmp_path, texts)
    assert verify(tmp_path, "atomtx@home.service", "atomtx-resume@home.service") == ""


def test_no_backup_of_its_own() -> None:
    """Of a job whose steps do not back it up no client is asked for."""
    job = "[jobs.home]\nvolumes = ['tank/home']\nsteps = ['snap', 'prune --keep-last 1']\n"
    found = config.parse(job, "/etc/atomtx/atomtx.toml")
    made, notes = installing.service_of_steps("home", found, (), PROGRAM)
    assert (made.has_steps, made.writes, notes) == (True, (), [])


def test_told() -> None:
    """Each end of each service is told: who wants to know may stand in a drop-in of theirs."""
    texts = units.files([SERVICES["zfs"]], PROGRAM)
    for name in (units.BACKUP, units.RESUME, units.RECOVER):
        assert "OnFailure=atomtx-notify@%N.service\n" in texts[name]
        assert "OnSuccess=atomtx-notify@ended-%N.service\n" in texts[name]


def test_after_remote() -> None:
    """A repository on a network's file system is mounted before its job begins."""
    texts = units.files([SERVICES["zfs"]], PROGRAM)
    for name in (units.BACKUP, units.RESUME):
        (after,) = (line for line in texts[name].splitlines() if line.startswith("After=network"))
        assert "remote-fs.target" in after.split()


def of(job: str, template: str = units.BACKUP) -> str:
    return f"{units.instance(template, job)}.d/{units.DROP_IN}"


def test_paths() -> None:
    """What the service may write is what the client, the hooks and the tree write."""

    job = Job(
        volumes=("tank/home",),
        client="restic",
        environment={"RESTIC_REPOSITORY": "/srv/restic", "RESTIC_CACHE_DIR": "/srv/cache"},
        write_paths=("/var/backups", "/tmp/x", "/run/dumps", "/run/atomtx/x"),
        layout="tree",
        root="/restic",
    )
    made, notes = installing.service("home", job, PROGRAM)
    # /run is read-only in the service, but for its own directory.
    assert made.writes == ("/srv/cache", "/srv/restic", "/var/backups", "/run/dumps", "/restic")
    assert any("/srv/restic is not there yet" in note for note in notes)


HOOKS = Job(pre_hook=("a",), post_hook=("b",), quiesce=("c",), hook_limit=300, grace=60)


@pytest.mark.parametrize(
    ("job", "stop", "start"),
    [
        (Job(grace=60), "240", "900"),
        (HOOKS, "1140", "1800"),
        (dataclasses.replace(HOOKS, hook_limit=0), "infinity", "infinity"),
    ],
)
def test_time_for_hooks(job: Job, stop: str, start: str) -> None:
    """A stop waits for the hooks that are undone, and so does the clean-up at boot."""
    made, _ = installing.service("home", dataclasses.replace(job, client="restic"), PROGRAM)
    texts = units.files([made], PROGRAM)
    assert f"TimeoutStopSec={stop}\n" in texts[of("home")]
    assert f"TimeoutStartSec={start}\n" in texts[units.RECOVER]
    last = [line for line in texts[units.RECOVER].splitlines() if line.startswith("TimeoutStop")]
    assert last[-1] == f"TimeoutStopSec={stop}"


def test_remote_repository() -> None:
    """A repository elsewhere needs no path, and the client's cache is the service's own."""
    env = {"RESTIC_REPOSITORY": "b2:bucket:/x"}
    made, notes = installing.service("b2", Job(volumes=("a/b",), environment=env), PROGRAM)
    assert (made.writes, notes) == ((), [])


REPOSITORY = {"RESTIC_REPOSITORY": "/x"}
SECRET = {"RESTIC_PASSWORD": Credential(credential="not-there-yet")}


@pytest.mark.parametrize(
    ("job", "lacks"),
    [
        (Job(), ["client"]),
        (Job(client="restic"), ["repository", "password"]),
        (Job(environment=REPOSITORY), ["password"]),
        (Job(environment=REPOSITORY, credentials=SECRET), []),
        (Job(client="restic", arguments=("-r/x", "--password-file", "/y")), []),
        (Job(environment={"RESTIC_REPOSITORY_FILE": "/x", "RESTIC_PASSWORD_COMMAND": "cat"}), []),
        (Job(environment=REPOSITORY, arguments=("--insecure-no-password",)), []),
        (Job(environment=REPOSITORY, arguments=("--password-file",)), []),  # refused: a note
        (Job(client="borg"), ["repository", "passphrase"]),
        (Job(environment={"BORG_REPO": "/x", "BORG_PASSCOMMAND": "cat /y"}), []),
        (Job(client="restic", command=("wrapper",)), []),  # which may say all that
        (Job(command=("tar",)), []),
        (Job(client="kopia"), []),
    ],
)
def test_lacks(job: Job, lacks: list[str]) -> None:
    """A service of which each backup would fail is told of: what nothing says, and no more."""
    jobs = {"home": job, "night": Job(volumes=("a/b",), steps=("snap", "backup home"))}
    found = Config("/etc/atomtx/atomtx.toml", jobs, {}, {})
    made = dataclasses.replace(PROGRAM, environment={"HOME": "/nowhere"})
    told = installing.warnings(found, ["home"], made)
    assert [line.split()[6] for line in told] == lacks
    assert all(line.endswith(": atomtx backup --dry-run home") for line in told)
    of_steps = {"night": ("home",)}
    assert installing.warnings(found, ["home", "night"], made, of_steps=of_steps) == told


# -- files -------------------------------------------------------------------------------------


def test_write_twice(tmp_path: Path) -> None:
    """What is the same is not written again; what we wrote and changed is replaced."""
    texts = units.files([SERVICES["zfs"]], PROGRAM)
    assert installing.write(tmp_path, texts) == list(texts)
    assert installing.write(tmp_path, texts) == []
    (tmp_path / units.BACKUP).write_text(f"{units.MARKER}\nold\n")
    assert installing.write(tmp_path, texts) == [units.BACKUP]
    assert (tmp_path / units.BACKUP).read_text() == texts[units.BACKUP]


@pytest.mark.parametrize("kind", ["file", "link", "marked later"])
def test_foreign(tmp_path: Path, kind: str) -> None:
    """A file that is not ours is never overwritten nor removed, and nothing else is written."""
    path = tmp_path / units.NOTIFY
    if kind == "link":
        path.symlink_to("/dev/null")  # `systemctl mask`
    else:
        path.write_text("[Unit]\n" if kind == "file" else f"\n{units.MARKER}\n")
    with pytest.raises(UserError, match="was not written by"):
        installing.write(tmp_path, units.files([SERVICES["zfs"]], PROGRAM))
    assert list(tmp_path.iterdir()) == [path]
    installing.remove(tmp_path, [units.NOTIFY])
    assert path.is_symlink() or path.exists()


def test_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written through a link of somebody else's; a write that fails leaves nothing."""
    texts = {units.BACKUP: f"{units.MARKER}\n"}
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / f".{units.BACKUP}.new").symlink_to(target)
    installing.write(tmp_path, texts)
    assert target.read_text() == "precious"
    (tmp_path / units.BACKUP).unlink()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EffectError, match="No space left"):
        installing.write(tmp_path, texts)
    assert list(tmp_path.iterdir()) == [target]


def test_killed_install(tmp_path: Path) -> None:
    """What a write that was killed has left is taken away as well, each job's own alone too."""
    written(tmp_path, [SERVICES["zfs"], SERVICES["hooks"]])
    halves = [
        tmp_path / ".atomtx@.service.new",
        tmp_path / ".atomtx@home.timer.new",
        tmp_path / "atomtx@home.service.d" / f".{units.DROP_IN}.new",
    ]
    for path in halves:
        path.write_text("")
    installing.remove(tmp_path, installing.ours(tmp_path, ["home"]))
    assert [path.exists() for path in halves] == [True, False, False]
    assert not (tmp_path / "atomtx@home.service.d").exists()
    installing.remove(tmp_path, installing.ours(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_remove(tmp_path: Path) -> None:
    """Removal leaves nothing of ours, and what the user has put beside it."""
    written(tmp_path, [SERVICES["zfs"], SERVICES["hooks"]])
    own = tmp_path / "atomtx@home.service.d" / "own.conf"
    own.write_text("[Service]\nNice=19\n")
    assert installing.jobs_of(installing.ours(tmp_path)) == ["db.1", "home"]
    installing.remove(tmp_path, installing.ours(tmp_path, ["db.1"]))
    assert installing.jobs_of(installing.ours(tmp_path)) == ["home"]
    for _ in range(2):
        installing.remove(tmp_path, installing.ours(tmp_path))
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == [own]


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("after", range(8))
def test_killed_uninstall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Removal that was killed, wherever, is finished by the next one, and systemd reads it."""
    written(tmp_path, [SERVICES["zfs"]])
    called: list[tuple[str, ...]] = []

    def systemctl(*words: str) -> None:
        called.append(words)
        if words[0] == "disable":  # systemd refuses units that are not there
            files = [name.replace("@home.service", "@.service") for name in words[1:]]
            assert all((tmp_path / name).exists() for name in files if name != "--now")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        nonlocal after
        if after == 0:
            raise _KilledError
        after -= 1
        path.chmod(0o600)
        path.rename(tmp_path.parent / "gone")

    monkeypatch.setattr(installing, "systemctl", systemctl)
    monkeypatch.setattr(installing, "is_booted", lambda: True)
    monkeypatch.setattr(units, "DIRECTORY", str(tmp_path))
    uninstall = install.uninstall.callback
    assert uninstall
    words = {"what": "systemd", "names": (), "no_stop": False, "directory": str(tmp_path)}
    with monkeypatch.context() as patch, suppress(_KilledError):
        patch.setattr(Path, "unlink", unlink)
        uninstall(**words)
    uninstall(**words)
    assert list(tmp_path.iterdir()) == []
    assert called[-1] == ("daemon-reload",)


def test_module_of_lvm() -> None:
    """Where LVM is, its module is loaded before a backup: the confined service may load none."""
    assert "modprobe@" not in units.files((), PROGRAM)[units.BACKUP]
    for order in ("Wants", "After"):
        unit = units.files((), WITH_LVM)[units.BACKUP]
        assert f"\n{order}=modprobe@dm_snapshot.service\n" in unit

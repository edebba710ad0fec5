"""
borg as it is: each promise of the protocol, asked of a pinned 1.4 and of this host's own borg.

The pinned one is in the directory that ATOMTX_CLIENTS names, as borg-VERSION.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atomtx.clients import Backup, Facts, Moment, Settings
from atomtx.clients.borg import Borg
from atomtx.clients.borg_locks import has_own_address, remove_stale
from atomtx.errors import UserError
from atomtx.names import is_within
from atomtx.states import Outcome
from tests.contract.test_clients import (
    AT,
    FILES,
    Seen,
    back_up,
    call,
    environment,
    make_tree,
    make_unreadable,
    moment_of,
    program,
    siblings,
    unprivileged,
    wait_for,
)

Make = Callable[[str], Settings]
NEW, OLD = "1.4.5", "the host's"
Borgs = pytest.mark.parametrize("version", [NEW, OLD])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "home")


@pytest.fixture
def srv(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "srv", files=3)


def borg_of(version: str) -> str:
    """Return the path of a borg that these tests need."""
    if version == NEW:
        return program(f"borg-{NEW}")
    path = shutil.which("borg")
    assert path, "borg is missing on this host"
    return path


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a repository a version once."""
    folder = tmp_path_factory.mktemp("repositories")

    def make(version: str) -> Path:
        path = folder / version
        if not path.exists():
            env = {**environment(folder), "BORG_PASSPHRASE": "sesame"}
            settings = Settings((borg_of(version),), (), env, str(folder))
            call(settings, "init", "--encryption=repokey-blake2", str(path))
        return path

    return make


@pytest.fixture
def borg(tmp_path: Path, repositories: Callable[[str], Path]) -> Make:
    """Return a function that gives a version of borg a new repository."""

    def make(version: str) -> Settings:
        env = {
            **environment(tmp_path),
            "BORG_REPO": str(tmp_path / "repository"),
            "BORG_PASSPHRASE": "sesame",
        }
        shutil.copytree(repositories(version), tmp_path / "repository")
        return Settings((borg_of(version),), (), env, str(tmp_path))

    return make


def archives(settings: Settings, *words: str) -> list[dict[str, Any]]:
    return list(json.loads(call(settings, "list", "--json", *words))["archives"])


def listed(settings: Settings, archive: str | None) -> list[str]:
    return call(settings, "list", "--format={path}{NL}", f"::{archive}").splitlines()


def inside(*paths: Path) -> set[str]:
    """Return the files below *paths* as borg stores them."""
    return {str(each)[1:] for path in paths for each in path.rglob("*") if each.is_file()}


def traced(settings: Settings, trace: Path) -> Settings:
    """Return *settings* with a borg whose reads are noted, outside of it, in *trace*."""
    strace = ("strace", "--seccomp-bpf", "-f", "-y", "-qq", "-e", "trace=read,pread64", "-e")
    return replace(settings, command=(*strace, "signal=none", "-o", str(trace), *settings.command))


def files_read(trace: Path, below: Path) -> list[str]:
    """Return the names of the files below a folder that were read: borg opens all, for xattrs."""
    read = re.findall(rf"read(?:64)?\(\d+<{re.escape(str(below))}/([^>]*)>", trace.read_text())
    return sorted({Path(name).name for name in read})


def make_cache(settings: Settings, folder: Path) -> None:
    """Make borg's cache: in the run that makes it, borg takes every file for old enough."""
    (folder / "before").write_text("before")
    call(settings, "create", "::before", str(folder / "before"))


# -- a backup ---------------------------------------------------------------------------------


@Borgs
def test_completed(version: str, borg: Make, home: Path, srv: Path) -> None:
    """A whole backup is completed, and the repository has it under the snapshots' time."""
    settings = borg(version)
    facts = Borg().inspect(settings)
    assert facts.version == call(settings, "--version").split()[-1]
    assert facts.repository == json.loads(call(settings, "info", "--json"))["repository"]["id"]
    seen = back_up(Borg(), settings, moment_of(home, srv))
    assert (seen.end.outcome, seen.end.reason) == (Outcome.COMPLETED, None)
    (backup,) = seen.end.backups
    info = json.loads(call(settings, "info", "--json", f"::{backup.backup_id}"))["archives"][0]
    # borg tells it in the local zone, which the environment says is Berlin's.
    assert datetime.fromisoformat(info["start"]) == AT.replace(tzinfo=None) + timedelta(hours=2)
    assert inside(home, srv) <= set(listed(settings, backup.backup_id))
    assert backup.files_processed == FILES + 3
    assert backup.bytes_added
    assert backup.bytes_processed


@Borgs
def test_inspect_changes_nothing(version: str, borg: Make) -> None:
    """To ask for the repository's id leaves no lock and no other trace in it."""
    settings = borg(version)
    repository = Path(settings.env["BORG_REPO"])
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    Borg().inspect(settings)
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (NEW, {"BORG_PASSPHRASE": "wrong"}, "borg: the passphrase is wrong for this repository"),
        (OLD, {"BORG_PASSPHRASE": "wrong"}, "borg: the passphrase is wrong for this repository"),
        (NEW, {"BORG_PASSPHRASE": None}, "borg: there is no passphrase for the repository"),
        (OLD, {"BORG_PASSPHRASE": None}, "borg: there is no passphrase for the repository"),
        (
            *(NEW, {"BORG_PASSPHRASE": None, "BORG_PASSCOMMAND": "false"}),
            "borg: BORG_PASSCOMMAND failed",
        ),
        (NEW, {"BORG_REPO": None}, "borg: no repository is named"),
        (OLD, {"BORG_REPO": None}, "borg: no repository is named"),
        (NEW, {"BORG_REPO": "/absent"}, "borg: the repository is absent or out of reach"),
        (OLD, {"BORG_REPO": "/etc"}, "borg: the repository is absent or out of reach"),
        (
            # Its first question may still go into the pipe, or find it broken.
            *(NEW, {"BORG_REPO": "ssh://h/r", "BORG_RSH": "false"}),
            "borg: the repository cannot be used: Connection (closed|to remote host is broken)",
        ),
        (
            *(NEW, {"BORG_REPO": "ssh://h/r", "BORG_RSH": "sh -c 'head -c 1 >/dev/null'"}),
            "borg: the repository cannot be used: Connection closed",
        ),
        (NEW, {"BORG_PASSPHRASE": None, "BORG_PASSPHRASE_FD": "3"}, "does not reach the client"),
    ],
)
def test_unusable(version: str, borg: Make, change: dict[str, str | None], message: str) -> None:
    """A passphrase or repository missing or wrong is told in one line, and not asked for."""
    settings = borg(version)
    env = {name: value for name, value in {**settings.env, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        Borg().inspect(replace(settings, env=env))
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_unknown_unencrypted(borg: Make, tmp_path: Path) -> None:
    """A question that borg would ask is told, and how to answer it; it is never answered here."""
    settings = borg(NEW)
    elsewhere = replace(settings, env={**settings.env, "HOME": str(tmp_path / "elsewhere")})
    call(elsewhere, "init", "--encryption=none", str(tmp_path / "plain"))
    settings = replace(settings, env={**settings.env, "BORG_REPO": str(tmp_path / "plain")})
    with pytest.raises(UserError, match="unencrypted, and was never used here") as caught:
        Borg().inspect(settings)
    name, _, value = str(caught.value.hint).rpartition(" ")[2].partition("=")
    assert Borg().inspect(replace(settings, env={**settings.env, name: value})).repository


@Borgs
@pytest.mark.parametrize("codes", ["modern", "legacy"])
def test_unreadable(version: str, codes: str, borg: Make, home: Path) -> None:
    """Files that cannot be read make the backup partial in both schemes of exit statuses."""
    settings = unprivileged(borg(version))
    settings = replace(settings, env={**settings.env, "BORG_EXIT_CODES": codes})
    make_unreadable(home / "d0/f0")
    make_unreadable(home / "d1/f1")
    end = back_up(Borg(), settings, moment_of(home)).end
    assert end.outcome is Outcome.PARTIAL
    assert (end.reason or "").startswith("2 files could not be read: ")
    assert "denied" in (end.reason or "")
    assert len(listed(settings, end.backups[0].backup_id)) == FILES - 2 + 4
    assert not end.retriable


@Borgs
@pytest.mark.parametrize("codes", ["modern", "legacy"])
def test_missing_target(version: str, codes: str, borg: Make, home: Path) -> None:
    """A target that is not there makes the backup partial."""
    settings = borg(version)
    settings = replace(settings, env={**settings.env, "BORG_EXIT_CODES": codes})
    end = back_up(Borg(), settings, moment_of(home, Path("/absent"))).end
    assert end.outcome is Outcome.PARTIAL
    assert "/absent" in (end.reason or "")


@Borgs
def test_reads_nothing_again(version: str, borg: Make, home: Path, tmp_path: Path) -> None:
    """
    Of unchanged data the second backup reads no file, but the one that was changed last.

    borg reads that one each time: it may have been changed once more in the same instant.  With
    a file that is changed just before each backup no other is read again.
    """
    settings, trace = borg(version), tmp_path / "trace"
    make_cache(settings, tmp_path)
    (home / "newest").write_text("newest")
    seen = [back_up(Borg(), traced(settings, trace), moment_of(home))]
    assert len(files_read(trace, home)) == FILES + 1
    seen.append(back_up(Borg(), traced(settings, trace), moment_of(home, at=AT + timedelta(1))))
    assert files_read(trace, home) == ["newest"]
    for n in (2, 3):
        (home / "marker").touch()
        seen.append(back_up(Borg(), traced(settings, trace), moment_of(home, at=AT + timedelta(n))))
    assert set(files_read(trace, home)) <= {"marker"}
    assert [each.end.outcome for each in seen] == [Outcome.COMPLETED] * 4


@Borgs
def test_tree(version: str, borg: Make, tmp_path: Path) -> None:
    """A tree is kept under the live paths, and no file of it is read again."""
    settings, trace = borg(version), tmp_path / "trace"
    root = tmp_path / "root"
    make_tree(root / "usr/home")
    make_tree(root / "srv", files=3)
    (root / "srv/newest").write_text("newest")
    make_cache(settings, tmp_path)
    settings = replace(settings, env={**settings.env, "BORG_REPO": "repository"})
    moment = Moment(("/srv", "/usr/home"), str(root), AT, excludes=("/usr/home/d1/f1",))
    first = back_up(Borg(), traced(settings, trace), moment).end
    assert first.outcome is Outcome.COMPLETED
    paths = set(listed(settings, first.backups[0].backup_id))
    assert {"usr/home/d0/f0", "srv/d0/f0"} <= paths
    assert "usr/home/d1/f1" not in paths
    back_up(Borg(), traced(settings, trace), replace(moment, at=AT + timedelta(hours=1)))
    assert files_read(trace, root) == ["newest"]


def test_whole_tree(borg: Make, tmp_path: Path) -> None:
    """The root itself is kept under its own path, without what is excluded."""
    settings, root = borg(NEW), tmp_path / "root"
    make_tree(root / "srv", files=3)
    moment = Moment(("/srv",), str(root), AT, excludes=("/srv/d1",), whole=True)
    end = back_up(Borg(), settings, moment).end
    assert set(listed(settings, end.backups[0].backup_id)) == {
        str(path)[1:]
        for path in (root, root / "srv", *(root / "srv").rglob("*"))
        if not is_within(str(path), str(root / "srv/d1"))
    }


@Borgs
def test_excludes(version: str, borg: Make, home: Path) -> None:
    """Exactly the excluded paths are left out, whatever characters they have."""
    settings = borg(version)
    names = ("x[1]*?", "x1", "back\\slash", "$HOME", "!not", "a b", "{now}", "re:x")
    for name in names:
        make_tree(home / name, files=1)
    out = tuple(str(home / name) for name in names if name != "x1")
    given = replace(settings, extra=("--pattern=+ sh:**",))
    end = back_up(Borg(), given, moment_of(home, excludes=out)).end
    assert end.outcome is Outcome.COMPLETED
    kept = {Path(line).name for line in listed(settings, end.backups[0].backup_id)}
    assert kept & set(names) == {"x1"}


@Borgs
def test_root(version: str, borg: Make, home: Path) -> None:
    """The target / works, with what must stay live left out."""
    settings = borg(version)
    live = Borg().live_paths(settings)
    moment = moment_of(Path("/"), excludes=(*siblings(home), *live))
    end = back_up(Borg(), settings, moment).end
    assert end.outcome is Outcome.COMPLETED
    # Other processes may have put files beside it meanwhile.
    paths = listed(settings, end.backups[0].backup_id)
    assert inside(home) <= set(paths)
    assert not [path for path in paths for out in moment.excludes if is_within("/" + path, out)]


def test_live_paths(borg: Make, home: Path) -> None:
    """The folders that borg really writes to are found."""
    settings = borg(NEW)
    back_up(Borg(), settings, moment_of(home))
    assert all(os.path.isdir(path) for path in Borg().live_paths(settings))
    user, live = home.with_name("user"), Borg().live_paths(settings)
    written = [str(path) for path in user.rglob("*") if path.is_file()]
    assert written
    assert all(any(is_within(path, each) for each in live) for path in written)


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_first_run(borg: Make, home: Path, tmp_path: Path) -> None:
    """A home without borg's folders yet can be backed up with all the rest; a plan makes none."""
    settings = borg(NEW)
    own = {"HOME": str(home), "ATOMTX_STATE_DIR": f"{tmp_path}/state"}
    env = {**os.environ, **settings.env, **own, "RUNTIME_DIRECTORY": str(tmp_path / "run")}
    argv = [sys.executable, "-m", "atomtx", "backup", "--read-live", str(home), "--client", "borg"]
    argv += ["--command", borg_of(NEW)]
    for option in (["--dry-run"], []):
        assert not (home / ".cache").exists()
        done = subprocess.run([*argv, *option], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (home / ".cache").stat().st_mode & 0o777 == 0o700
    assert listed(settings, archives(settings)[0]["name"])


@Borgs
def test_other_locale(version: str, borg: Make, home: Path) -> None:
    """Names that are not ASCII, or no text at all, are read in a locale that knows none."""
    settings = borg(version)
    (home / "grün").write_text("x")
    with open(os.path.join(os.fsencode(home), b"latin-\xe4"), "w") as file:
        file.write("x")
    given = replace(settings, env={**settings.env, "LANG": "C", "LC_ALL": "C"})
    end = back_up(Borg(), given, moment_of(home)).end
    assert (end.outcome, end.reason) == (Outcome.COMPLETED, None)
    assert end.backups[0].files_processed == FILES + 2


@Borgs
@pytest.mark.parametrize("tells", [True, False])
def test_wrapper(version: str, tells: bool, borg: Make, home: Path, tmp_path: Path) -> None:
    """A wrapper keeps borg's result, also where it hides the version."""
    settings = borg(version)
    script = tmp_path / "my borg"
    hides = "" if tells else '[ "$1" = --version ] && echo "my own" && exit\n'
    script.write_text(
        f"#!/bin/sh\n{hides}echo noise\n"
        f"export BORG_PASSPHRASE=sesame BORG_REPO={tmp_path}/repository\n"
        f'exec {settings.command[0]} "$@"\n'
    )
    script.chmod(0o755)
    wrapped = replace(settings, command=("./my borg", "create"), env=environment(tmp_path))
    facts = Borg().inspect(wrapped)
    assert any("does not tell borg's version" in note for note in facts.notes) is not tells
    end = back_up(Borg(), wrapped, moment_of(home)).end
    assert end.outcome is Outcome.COMPLETED
    assert [each["name"] for each in archives(settings)] == [end.backups[0].backup_id]


@Borgs
def test_remote(version: str, borg: Make, home: Path, tmp_path: Path) -> None:
    """A repository behind another program is one as any other."""
    settings = borg(version)
    shell = tmp_path / "rsh"
    shell.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    shell.chmod(0o755)
    env = {**settings.env, "BORG_REPO": f"ssh://host{tmp_path}/repository", "BORG_RSH": str(shell)}
    remote = replace(settings, env=env, extra=("--remote-path", settings.command[0]))
    end = back_up(Borg(), remote, moment_of(home)).end
    assert end.outcome is Outcome.COMPLETED
    assert set(Borg().live_paths(remote)).isdisjoint({str(tmp_path / "repository")})
    restore(remote, end.backups[0], tmp_path / "to")
    assert (tmp_path / "to" / str(home)[1:] / "d0/f0").read_text() == "home 0"


# -- stopped, killed, locked ------------------------------------------------------------------


BIG, ENOUGH = 96 << 20, 8 << 20


def start_and_halt(settings: Settings, home: Path) -> tuple[subprocess.Popen[str], Moment]:
    """Start a backup and halt it when it holds its lock and has stored a part, not all."""
    for n in range(8):
        (home / f"big{n}").write_bytes(os.urandom(BIG // 8))
    moment = moment_of(home)
    launch = Borg().launch(settings, Borg().inspect(settings), moment)
    repository = Path(settings.env["BORG_REPO"])
    before = stored_bytes(repository)
    child = subprocess.Popen(
        launch.commands[0],
        env={**settings.env, **launch.env},
        cwd=launch.cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: stored_bytes(repository) > before + ENOUGH)
    child.send_signal(signal.SIGSTOP)
    assert stored_bytes(repository) < before + BIG
    assert locks(settings)
    return child, moment


def stored_bytes(repository: Path) -> int:
    return sum(path.stat().st_size for path in (repository / "data").rglob("*") if path.is_file())


def locks(settings: Settings) -> list[str]:
    folder = Path(settings.env["BORG_REPO"]) / "lock.exclusive"
    return os.listdir(folder) if folder.is_dir() else []


def ended(child: subprocess.Popen[str], moment: Moment) -> Seen:
    """Return how the end of a client that was started by hand is judged."""
    stdout, stderr = child.communicate(timeout=120)
    reader = Borg().reader(moment)
    for line in stdout.splitlines():
        reader.stdout(line)
    for line in stderr.splitlines():
        reader.stderr(line)
    reader.end_command(0, child.returncode)
    return Seen(reader.end())


@Borgs
def test_stop(version: str, borg: Make, home: Path) -> None:
    """After the stop signal borg ends in order with a checkpoint: the next sends only the rest."""
    settings = borg(version)
    child, moment = start_and_halt(settings, home)
    os.killpg(child.pid, Borg.stop_signal)
    child.send_signal(signal.SIGCONT)
    end = ended(child, moment).end
    assert end.outcome is Outcome.FAILED
    assert "SIGINT" in (end.reason or "")
    assert not end.retriable
    assert not locks(settings)
    assert not archives(settings)
    assert len(archives(settings, "--consider-checkpoints")) == 1
    again = back_up(Borg(), settings, replace(moment, attempt=2)).end
    assert again.outcome is Outcome.COMPLETED
    assert (again.backups[0].bytes_added or 0) < BIG - ENOUGH // 2
    # A checkpoint's time is the clock's: it is gone with the first backup of a later moment.
    later = back_up(Borg(), settings, replace(moment, at=datetime.now(UTC) + timedelta(1))).end
    for argv in Borg().forgetting(settings, Facts("1.4.0", None), (str(home),), ("--keep-last=1",)):
        call(settings, *argv[1:])
    left = archives(settings, "--consider-checkpoints")
    assert [each["name"] for each in left] == [later.backups[0].backup_id]


@Borgs
def test_after_loss(version: str, borg: Make, home: Path) -> None:
    """What a killed borg left is mended: its lock is gone, and the next attempt is whole."""
    settings = borg(version)
    child, moment = start_and_halt(settings, home)
    child.kill()
    end = ended(child, moment).end
    assert (end.outcome, end.retriable) == (Outcome.FAILED, True)
    facts = Borg().inspect(settings)
    (name,) = locks(settings)
    assert f".{child.pid}-" in name
    done = Borg().after_loss(settings, facts)
    # The cache had a lock, too.
    assert done == (f"borg: removed the lock of a process that is gone: {name}",) * 2
    assert not locks(settings)
    assert Borg().after_loss(settings, facts) == ()
    again = back_up(Borg(), settings, replace(moment, attempt=2)).end
    assert (again.outcome, again.reason) == (Outcome.COMPLETED, None)
    call(settings, "check", "--verify-data")


@Borgs
def test_lock_of_a_living(version: str, borg: Make, home: Path) -> None:
    """A lock whose process lives is never taken away; who waits for it in vain may try again."""
    settings = borg(version)
    child, moment = start_and_halt(settings, home)
    try:
        held = locks(settings)
        done = Borg().after_loss(settings, Borg().inspect(settings))
        assert locks(settings) == held != []
        assert any(line.endswith(f"is locked by {held[0]}") for line in done)
        impatient = replace(settings, extra=("--lock-wait=1",))
        end = back_up(Borg(), impatient, moment).end
        assert (end.outcome, end.retriable) == (Outcome.FAILED, True)
        assert "lock" in (end.reason or "")
    finally:
        child.kill()
        child.communicate(timeout=60)


@pytest.mark.skipif(not has_own_address(), reason="this machine has no MAC address")
def test_locks_by_name(tmp_path: Path) -> None:
    """Only a lock with this machine's address, under any name of it, and a dead pid is removed."""
    gone = subprocess.Popen(("true",))
    gone.wait()
    here, name = uuid.getnode(), socket.gethostname()
    stale = {f"{name}@{here}.{gone.pid}-0", f"before.the.network@{here}.{gone.pid}-0"}
    other = {
        f"{name}@{here}.{os.getpid()}-0",
        f"{name}@{here + 1}.{gone.pid}-0",
        f"{name}.{gone.pid}-0",
        "nonsense",
        f"{name}@{here}.{10**30}-0",
    }
    folder = tmp_path / "lock.exclusive"
    folder.mkdir()
    for each in stale | other:
        (folder / each).touch()
    done = list(remove_stale(str(tmp_path), None))
    assert set(os.listdir(folder)) == other
    assert len([line for line in done if "removed" in line]) == len(stale)
    assert len([line for line in done if "is locked by" in line]) == len(other)
    for each in other:
        (folder / each).unlink()
    (folder / f"mine.{gone.pid}-0").touch()
    assert len(list(remove_stale(str(tmp_path), "yours"))) == len(os.listdir(folder)) == 1
    assert len(list(remove_stale(str(tmp_path), "mine"))) == 1
    assert not folder.exists()
    assert list(remove_stale(str(tmp_path), "mine")) == []


@Borgs
def test_lost_attempt(version: str, borg: Make, home: Path) -> None:
    """An attempt whose end was not seen may have been stored: the next one is not in its way."""
    settings, moment = borg(version), moment_of(home)
    first = back_up(Borg(), settings, moment).end
    second = back_up(Borg(), settings, replace(moment, attempt=2)).end
    assert [first.outcome, second.outcome] == [Outcome.COMPLETED] * 2
    # Another run of this second.
    third = back_up(Borg(), settings, moment).end
    assert (third.outcome, third.retriable) == (Outcome.FAILED, True)
    assert "already exists" in (third.reason or "")
    assert len(archives(settings)) == 2


# -- what follows -----------------------------------------------------------------------------


@Borgs
def test_retention(version: str, borg: Make, home: Path, srv: Path) -> None:
    """By the job's rules older backups of its own are forgotten: those of others all stay."""
    settings, client = borg(version), Borg()
    others = moment_of(srv), *(moment_of(home, srv, at=AT + timedelta(n)) for n in range(3))
    for moment in (*others, *(moment_of(home, at=AT + timedelta(n)) for n in range(4))):
        assert back_up(client, settings, moment).end.outcome is Outcome.COMPLETED
    call(settings, "create", "::by-hand", str(home))
    stays = {each["name"] for each in archives(settings)}
    policy = client.policy(("--keep-last", "2"))
    for argv in client.forgetting(settings, Facts("1.4.0", None), (str(home),), policy):
        call(settings, *argv[1:])
    left = {each["name"] for each in archives(settings)}
    gone = sorted(stays - left)
    assert [re.search(r"\d{4}-\d\d-\d\d", name)[0] for name in gone] == [  # type: ignore[index]
        str((AT + timedelta(n)).date()) for n in range(2)
    ]
    call(settings, "check")


def restore(settings: Settings, backup: Backup, to: Path) -> None:
    words = Borg().restore_command(settings, Facts("1.4.0", None), backup, str(to))
    answer = subprocess.run(
        words, env=dict(settings.env), cwd=settings.cwd, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


def make_special(folder: Path) -> None:
    """Put everything into *folder* that a file system has besides bytes."""
    (folder / "mode").write_text("mode")
    (folder / "mode").chmod(0o4751)
    os.chown(folder / "d1/f1", 12345, 54321)
    os.link(folder / "d0/f0", folder / "d1/linked")
    (folder / "link").symlink_to("d0/f0")
    os.mkfifo(folder / "fifo", 0o640)
    os.setxattr(folder / "d0/f3", "user.colour", b"gr\xfcn\0")
    subprocess.run(("setfacl", "-m", "u:12345:rw", folder / "d0/f3"), check=True)
    subprocess.run(("setfacl", "-d", "-m", "g:54321:rx", folder / "d2"), check=True)
    with open(folder / "sparse", "wb") as file:
        file.seek(64 << 20)
        file.write(b"end")
    os.utime(folder / "mode", ns=(10**18, 10**18 + 123_456_789))
    os.utime(folder / "d0", ns=(10**18, 10**18 + 987_654_321))


def described(folder: Path) -> dict[str, object]:
    """Return all that is to be kept of each file in *folder*, but its bytes."""
    found: dict[str, object] = {}
    links: dict[int, str] = {}
    for path in sorted(folder.rglob("*")):
        about, name = path.lstat(), str(path.relative_to(folder))
        xattrs = {} if path.is_symlink() else {x: os.getxattr(path, x) for x in os.listxattr(path)}
        first = links.setdefault(about.st_ino, name)
        found[name] = (
            *(stat.filemode(about.st_mode), about.st_uid, about.st_gid, about.st_mtime_ns),
            *(xattrs, first, about.st_nlink if path.is_file() else None),
            os.readlink(path) if path.is_symlink() else None,
        )
    return found


@Borgs
def test_restore(version: str, borg: Make, home: Path, tmp_path: Path) -> None:
    """The command that is shown restores byte for byte, with all that a file system has besides."""
    settings = borg(version)
    make_special(home)
    end = back_up(Borg(), settings, moment_of(home)).end
    assert (end.outcome, end.reason) == (Outcome.COMPLETED, None)
    # A repository that is named relatively is found from the folder to restore to.
    given = replace(settings, env={**settings.env, "BORG_REPO": "repository"})
    restore(given, end.backups[0], tmp_path / "a b/to")
    restored = tmp_path / "a b/to" / str(home)[1:]
    assert described(restored) == described(home)
    for path in home.rglob("*"):
        if stat.S_ISREG(path.lstat().st_mode):
            assert (restored / path.relative_to(home)).read_bytes() == path.read_bytes()
    assert (restored / "sparse").stat().st_blocks * 512 < (1 << 20)
    assert "user.colour" in os.listxattr(restored / "d0/f3")
    assert "system.posix_acl_access" in os.listxattr(restored / "d0/f3")

"""
The clients as they are: each promise of the protocol, asked of the real programs.

They are found in the directory that ATOMTX_CLIENTS names (default ~/.cache/atomtx/clients) as
restic-VERSION and kopia; one that is missing is a failure, not a reason to skip.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atomtx.clients import Client, End, Facts, Launch, Moment, Settings
from atomtx.clients.command import Command
from atomtx.clients.kopia import Kopia
from atomtx.clients.restic import Restic
from atomtx.errors import UserError
from atomtx.names import is_within
from atomtx.states import Outcome

AT = datetime(2026, 7, 1, 10, 0, 0, tzinfo=UTC)
FILES = 12
# Root reads everything: without these two capabilities it does not.
UNPRIVILEGED = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)
Restics = pytest.mark.parametrize(
    "version", ["0.14.0", pytest.param("0.16.5", marks=pytest.mark.full), "0.19.1"]
)


def program(name: str) -> str:
    """Return the path of a program that these tests need."""
    folder = Path(os.environ.get("ATOMTX_CLIENTS") or "~/.cache/atomtx/clients").expanduser()
    path = folder / name
    assert os.access(path, os.X_OK), f"{path} is missing: ATOMTX_CLIENTS names the directory"
    return str(path)


Answer = tuple[list[str], list[str], int]  # lines of both outputs, and the exit status


@dataclass
class Seen:
    """What one backup printed, and how the reader judged it."""

    end: End
    lines: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return restic's summary."""
        found = [json.loads(line) for line in self.lines if '"summary"' in line]
        assert len(found) == 1
        return dict(found[0])


def run(
    argv: tuple[str, ...], launch: Launch, settings: Settings
) -> tuple[list[str], list[str], int]:
    answer = subprocess.run(
        argv,
        env={**settings.env, **launch.env},
        cwd=launch.cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return answer.stdout.splitlines(), answer.stderr.splitlines(), answer.returncode


def back_up(client: Client, settings: Settings, moment: Moment) -> Seen:
    """Inspect, launch and read, as a run does."""
    launch = client.launch(settings, client.inspect(settings), moment)
    reader = client.reader(moment)
    lines = []
    for n, argv in enumerate(launch.commands):
        stdout, stderr, status = run(argv, launch, settings)
        for line in stdout:
            reader.stdout(line)
        for line in stderr:
            reader.stderr(line)
        reader.end_command(n, status)
        lines += [*stdout, *stderr]
    return Seen(reader.end(), lines)


def call(settings: Settings, *words: str) -> str:
    """Run the client's program for an answer of its own."""
    answer = subprocess.run(
        (*settings.command, *words),
        env=dict(settings.env),
        cwd=settings.cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def make_tree(root: Path, files: int = FILES) -> Path:
    """Make a tree of small files."""
    for n in range(files):
        path = root / f"d{n % 3}" / f"f{n}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{root.name} {n}")
    return root


def make_unreadable(path: Path) -> None:
    path.chmod(0)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)


def unprivileged(settings: Settings) -> Settings:
    """Return *settings* with a wrapper that takes root's privilege to read everything."""
    wrapper = UNPRIVILEGED if os.geteuid() == 0 else ("env",)
    return replace(settings, command=(*wrapper, *settings.command))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "home")


@pytest.fixture
def srv(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "srv", files=3)


def environment(folder: Path) -> dict[str, str]:
    path = os.environ.get("PATH", "/usr/bin:/bin")
    return {"PATH": path, "HOME": str(folder / "user"), "TZ": "Europe/Berlin", "LANG": "C.UTF-8"}


# -- restic -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a repository a version once: its key costs a second."""
    folder = tmp_path_factory.mktemp("repositories")

    def make(version: str) -> Path:
        path = folder / version
        if not path.exists():
            env = {**environment(folder), "RESTIC_PASSWORD": "sesame"}
            settings = Settings((program(f"restic-{version}"),), (), env, str(folder))
            call(settings, "init", "--quiet", "--no-cache", "-r", str(path))
        return path

    return make


@pytest.fixture
def restic(tmp_path: Path, repositories: Callable[[str], Path]) -> Callable[[str], Settings]:
    """Return a function that gives a version of restic a new repository."""

    def make(version: str) -> Settings:
        env = {
            **environment(tmp_path),
            "RESTIC_REPOSITORY": str(tmp_path / "repository"),
            "RESTIC_PASSWORD": "sesame",
            "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
        }
        shutil.copytree(repositories(version), tmp_path / "repository")
        return Settings((program(f"restic-{version}"),), (), env, str(tmp_path))

    return make


def snapshots(settings: Settings) -> list[dict[str, Any]]:
    return list(json.loads(call(settings, "snapshots", "--json")))


def moment_of(*targets: Path, at: datetime = AT, **other: Any) -> Moment:
    return Moment(tuple(map(str, targets)), other.pop("root", ""), at, **other)


@Restics
def test_restic_completed(
    version: str, restic: Callable[[str], Settings], home: Path, srv: Path
) -> None:
    """A whole backup is completed, and the repository has it under the snapshots' time."""
    settings = restic(version)
    facts = Restic().inspect(settings)
    assert facts.version == version
    assert facts.repository == json.loads(call(settings, "cat", "config"))["id"]
    seen = back_up(Restic(), settings, moment_of(home, srv))
    assert (seen.end.outcome, seen.end.reason) == (Outcome.COMPLETED, None)
    (backup,), (snapshot,) = seen.end.backups, snapshots(settings)
    assert backup.backup_id
    assert snapshot["id"].startswith(backup.backup_id)
    assert snapshot["paths"] == [str(home), str(srv)]
    assert datetime.fromisoformat(snapshot["time"]) == AT
    assert backup.files_processed == FILES + 3
    assert backup.bytes_added


@Restics
def test_restic_inspect_changes_nothing(version: str, restic: Callable[[str], Settings]) -> None:
    """To ask for the repository's id leaves no lock and no other trace in it."""
    settings = restic(version)
    repository = Path(settings.env["RESTIC_REPOSITORY"])
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    Restic().inspect(settings)
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


@Restics
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RESTIC_PASSWORD": "wrong"}, "restic: the password is wrong for this repository"),
        ({"RESTIC_PASSWORD": ""}, "restic: there is no password for the repository"),
        ({"RESTIC_REPOSITORY": ""}, "restic: no repository is named"),
        ({"RESTIC_REPOSITORY": "/absent"}, "restic: the repository is absent or out of reach"),
        ({"RESTIC_REPOSITORY": "no:where"}, "restic: the repository cannot be used: parsing"),
        (
            {"RESTIC_PASSWORD": "", "RESTIC_PASSWORD_FILE": "/absent"},
            "restic: the repository cannot be used: .*/absent does not exist",
        ),
    ],
)
def test_restic_unusable(
    version: str, restic: Callable[[str], Settings], change: dict[str, str], message: str
) -> None:
    """A password or repository that is missing or wrong is told in one line, and not asked for."""
    settings = restic(version)
    wrong = replace(settings, env={**settings.env, **change})
    with pytest.raises(UserError, match=message) as caught:
        Restic().inspect(wrong)
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_restic_not_installed(restic: Callable[[str], Settings]) -> None:
    """A program that is not there is told as such."""
    settings = replace(restic("0.19.1"), command=("/absent/restic",))
    with pytest.raises(UserError, match="/absent/restic is not installed"):
        Restic().inspect(settings)


@Restics
def test_restic_options_of_connection(
    version: str, restic: Callable[[str], Settings], home: Path, tmp_path: Path
) -> None:
    """A repository and a password file among the user's options are used for every question."""
    settings = restic(version)
    (tmp_path / "pw").write_text("sesame\n")
    env = {
        name: v for name, v in settings.env.items() if name[:10] not in ("RESTIC_PAS", "RESTIC_REP")
    }
    given = replace(settings, env=env, extra=("-vr", "repository", "-p", "pw", "--tag=a"))
    seen = back_up(Restic(), given, moment_of(home))
    assert seen.end.outcome is Outcome.COMPLETED
    assert snapshots(settings)[0]["tags"] == ["a"]
    facts = Restic().inspect(given)
    assert all(line.endswith("done") for line in Restic().after_loss(given, facts))


@Restics
def test_restic_unreadable(version: str, restic: Callable[[str], Settings], home: Path) -> None:
    """Files that cannot be read make the backup partial; it is saved, and they are counted."""
    settings = unprivileged(restic(version))
    make_unreadable(home / "d0/f0")
    make_unreadable(home / "d1/f1")
    seen = back_up(Restic(), settings, moment_of(home))
    assert seen.end.outcome is Outcome.PARTIAL
    assert (seen.end.reason or "").startswith("2 files could not be read: ")
    assert "denied" in (seen.end.reason or "")
    assert seen.end.backups[0].backup_id
    assert not seen.end.retriable


@Restics
def test_restic_missing_target(version: str, restic: Callable[[str], Settings], home: Path) -> None:
    """A target that is not there makes the backup partial, although old versions exit with 0."""
    settings = restic(version)
    seen = back_up(Restic(), settings, moment_of(home, Path("/absent")))
    assert seen.end.outcome is Outcome.PARTIAL
    assert seen.end.reason
    assert "/absent does not exist" in seen.end.reason
    nothing = back_up(Restic(), settings, moment_of(Path("/absent")))
    assert nothing.end.outcome is Outcome.FAILED


@Restics
def test_restic_clocks_put_back(
    version: str, restic: Callable[[str], Settings], home: Path
) -> None:
    """In the hour that happens twice the time is exact, and no file is read again."""
    settings = restic(version)
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)  # 02:30 in Berlin, and then 02:15
    second = first + timedelta(minutes=45)
    back_up(Restic(), settings, moment_of(home, at=first))
    seen = back_up(Restic(), settings, moment_of(home, at=second))
    assert seen.summary()["files_unmodified"] == FILES
    times = [datetime.fromisoformat(snapshot["time"]) for snapshot in snapshots(settings)]
    assert times == [first, second]


@Restics
def test_restic_local_time(version: str, restic: Callable[[str], Settings], home: Path) -> None:
    """The time is stored in the local zone, in which restic counts the days to keep."""
    settings = restic(version)
    back_up(Restic(), settings, moment_of(home, at=datetime(2026, 7, 1, 23, 30, tzinfo=UTC)))
    assert snapshots(settings)[0]["time"].startswith("2026-07-02T01:30:00")


@Restics
def test_restic_clock_stepped_back(
    version: str, restic: Callable[[str], Settings], home: Path
) -> None:
    """With the parent named, a clock that went back a day does not make restic read it all."""
    settings = restic(version)
    parent = back_up(Restic(), settings, moment_of(home)).end.backups[0].backup_id
    moment = moment_of(home, at=AT - timedelta(days=1), parent=parent)
    seen = back_up(Restic(), settings, moment)
    assert seen.end.outcome is Outcome.COMPLETED
    assert seen.summary()["files_unmodified"] == FILES


@Restics
def test_restic_forgotten_parent(
    version: str, restic: Callable[[str], Settings], home: Path
) -> None:
    """Where that one was forgotten since, the backup is complete without it."""
    settings = restic(version)
    parent = back_up(Restic(), settings, moment_of(home)).end.backups[0].backup_id
    assert parent
    call(settings, "forget", parent)
    moment = moment_of(home, at=AT - timedelta(days=1), parent=parent)
    seen = back_up(Restic(), settings, moment)
    assert seen.end.outcome is Outcome.COMPLETED
    assert seen.summary()["files_new"] == FILES


@Restics
def test_restic_tree(version: str, restic: Callable[[str], Settings], tmp_path: Path) -> None:
    """A tree is kept under the live paths, and compared with the backup before it."""
    settings = restic(version)
    make_tree(tmp_path / "root/usr/home")
    make_tree(tmp_path / "root/srv", files=3)
    moment = Moment(
        ("/srv", "/usr/home"), str(tmp_path / "root"), AT, excludes=("/usr/home/d1/f1",)
    )
    first = back_up(Restic(), settings, moment)
    assert first.end.outcome is Outcome.COMPLETED
    listed = call(settings, "ls", "latest").splitlines()
    assert {"/usr/home/d0/f0", "/srv/d0/f0"} <= set(listed)
    assert "/usr/home/d1/f1" not in listed
    second = back_up(Restic(), settings, replace(moment, at=AT + timedelta(hours=1)))
    assert second.summary()["files_unmodified"] == FILES + 3 - 1


@Restics
def test_restic_excludes(version: str, restic: Callable[[str], Settings], home: Path) -> None:
    """Exactly the excluded paths are left out, whatever characters they have."""
    settings = restic(version)
    names = ("x[1]*?", "x1", "back\\slash", "$HOME", "!not", "a b")
    for name in names:
        make_tree(home / name, files=1)
    out = tuple(str(home / name) for name in names if name != "x1")
    assert back_up(Restic(), settings, moment_of(home, excludes=out)).end.outcome is (
        Outcome.COMPLETED
    )
    kept = {Path(line).name for line in call(settings, "ls", "latest").splitlines()}
    assert kept & set(names) == {"x1"}


def siblings(path: Path) -> Iterator[str]:
    """Yield everything in the file system that is neither *path*, above nor below it."""
    for folder in path.parents:
        keep = path.relative_to(folder).parts[0]
        yield from (entry.path for entry in os.scandir(folder) if entry.name != keep)


@Restics
def test_restic_root(version: str, restic: Callable[[str], Settings], home: Path) -> None:
    """The target / works, with what must stay live left out."""
    settings = restic(version)
    live = Restic().live_paths(settings)
    for _ in range(3):  # partial where another process made a file beside it, and took it away
        moment = moment_of(Path("/"), excludes=(*siblings(home), *live))
        seen = back_up(Restic(), settings, moment)
        if seen.end.outcome is not Outcome.PARTIAL:
            break
        failed = [json.loads(line) for line in seen.lines if '"message_type":"error"' in line]
        assert failed
        assert not [each for each in failed if is_within(each["item"], str(home))]
    assert seen.end.outcome is Outcome.COMPLETED
    # Other processes may have put files beside it meanwhile.
    listed = call(settings, "ls", "latest").splitlines()
    assert {str(path) for path in home.rglob("*") if path.is_file()} <= set(listed)
    assert not [path for path in listed for out in moment.excludes if is_within(path, out)]
    assert snapshots(settings)[0]["paths"] == ["/"]


@Restics
def test_restic_retention(
    version: str, restic: Callable[[str], Settings], home: Path, srv: Path
) -> None:
    """By the job's rules older backups of its own are forgotten: those of others all stay."""
    settings, client, facts = restic(version), Restic(), Facts(version, None)
    # With --path alone, the second of these would be forgotten by the rules of another job.
    others = moment_of(srv), *(moment_of(home, srv, at=AT + timedelta(days=n)) for n in range(3))
    for moment in (*others, *(moment_of(home, at=AT + timedelta(days=n)) for n in range(4))):
        assert back_up(client, settings, moment).end.outcome is Outcome.COMPLETED
    back_up(client, replace(settings, extra=("--host=other",)), moment_of(home))
    policy = client.policy(("--keep-last", "2"))
    for argv in client.forgetting(settings, facts, (str(home),), policy):
        call(settings, *argv[1:])
    assert client.forgetting(settings, facts, (str(home),), policy) == ()
    left = [
        (each["paths"], each["time"][:10], each["hostname"] == "other")
        for each in snapshots(settings)
    ]
    own = [str((AT + timedelta(days=n)).date()) for n in (2, 3)]
    assert sorted(day for paths, day, other in left if paths == [str(home)] and not other) == own
    assert len(left) == len(own) + len(others) + 1
    call(settings, "check")


@pytest.mark.parametrize("leaves", [True, False])
def test_restic_stable_parents(
    restic: Callable[[str], Settings], tmp_path: Path, home: Path, leaves: bool
) -> None:
    """Directories above what is mounted add no tree blob where they stay; made anew they do."""
    settings, root = restic("0.19.1"), tmp_path / "root"
    for hours in range(3):
        mountpoint = root / "usr/home/ben"
        mountpoint.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", home, mountpoint], check=True)
        try:
            moment = Moment(("/usr/home/ben",), str(root), AT + timedelta(hours=hours), whole=True)
            assert back_up(Restic(), settings, moment).end.outcome is Outcome.COMPLETED
        finally:
            subprocess.run(["umount", mountpoint], check=True)
        if not leaves:
            shutil.rmtree(root)
    ids = [each["id"] for each in snapshots(settings)[-2:]]
    changed = call(settings, "diff", "--metadata", *ids)
    above = [f"U    {path}/\n" for path in (root, root / "usr", root / "usr/home")]
    assert [line in changed for line in above] == [not leaves] * 3


def test_restic_skip_if_unchanged(restic: Callable[[str], Settings], home: Path) -> None:
    """A backup that the user's option skips, because nothing changed, is completed without id."""
    settings = replace(restic("0.19.1"), extra=("--skip-if-unchanged",))
    # Of a tree: the directories above the live paths change all the time.
    moment = Moment((f"/{home.name}",), str(home.parent), AT)
    back_up(Restic(), settings, moment)
    seen = back_up(Restic(), settings, replace(moment, at=AT + timedelta(hours=1)))
    assert seen.end.outcome is Outcome.COMPLETED
    assert seen.end.backups[0].backup_id is None


@Restics
@pytest.mark.parametrize("tells", [True, False])
def test_restic_wrapper(
    version: str, tells: bool, restic: Callable[[str], Settings], home: Path, tmp_path: Path
) -> None:
    """A wrapper keeps restic's result; one that hides the version gets no newer option."""
    settings = restic(version)
    script = tmp_path / "my restic"
    hides = "" if tells else '[ "$1" = version ] && echo "my own" && exit\n'
    script.write_text(
        f"#!/bin/sh\n{hides}echo noise\n"
        f'RESTIC_PASSWORD=sesame exec {shlex.join(settings.command)} -r repository "$@"\n'
    )
    script.chmod(0o755)
    wrapped = replace(settings, command=("./my restic",), env=environment(tmp_path))
    facts = Restic().inspect(wrapped)
    assert facts.version == (version if tells else "0.14")
    assert bool(facts.notes) is not tells
    seen = back_up(Restic(), wrapped, moment_of(home))
    assert seen.end.outcome is Outcome.COMPLETED
    assert seen.end.backups[0].backup_id


def start_slow(settings: Settings, home: Path) -> tuple[subprocess.Popen[bytes], Launch, Path]:
    """Start a backup that takes long; return when it holds its lock and uploads."""
    (home / "big").write_bytes(os.urandom(64 << 20))
    slow = replace(settings, extra=("--limit-upload=4000", "--pack-size=4"))
    launch = Restic().launch(slow, Restic().inspect(slow), moment_of(home))
    child = subprocess.Popen(
        launch.commands[0],
        env={**slow.env, **launch.env},
        cwd=launch.cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    locks = Path(settings.env["RESTIC_REPOSITORY"]) / "locks"
    packs = Path(settings.env["RESTIC_REPOSITORY"]) / "data"
    # While it is written, a pack has a name of another form.
    wait_for(lambda: any(locks.iterdir()) and any(len(p.name) == 64 for p in packs.rglob("*")))
    return child, launch, locks


def wait_for(done: Callable[[], bool], timeout_s: float = 60) -> None:
    limit = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)


@Restics
def test_restic_stop(version: str, restic: Callable[[str], Settings], home: Path) -> None:
    """After the stop signal restic ends in order: no lock is left, and it is no success."""
    settings = restic(version)
    child, _, locks = start_slow(settings, home)
    child.send_signal(Restic.stop_signal)
    status = child.wait(timeout=60)
    assert not list(locks.iterdir())
    reader = Restic().reader(moment_of(home))
    reader.end_command(0, status)
    assert reader.end().outcome is Outcome.FAILED
    assert not snapshots(settings)


@Restics
def test_restic_after_loss(version: str, restic: Callable[[str], Settings], home: Path) -> None:
    """What a killed restic left is mended: its lock is gone, and its packs are not sent again."""
    settings = restic(version)
    child, _, locks = start_slow(settings, home)
    child.kill()
    child.wait(timeout=60)
    assert list(locks.iterdir())
    facts = Restic().inspect(settings)
    done = Restic().after_loss(settings, facts)
    assert len(done) == 2
    assert all(line.endswith(": done") for line in done)
    assert not list(locks.iterdir())
    again = back_up(Restic(), settings, moment_of(home)).end
    assert again.outcome is Outcome.COMPLETED
    assert (again.backups[0].bytes_added or 0) < (64 << 20)


def test_restic_lock_of_a_living(restic: Callable[[str], Settings], home: Path) -> None:
    """A lock whose process lives is never taken away."""
    settings = restic("0.19.1")
    child, _, locks = start_slow(settings, home)
    try:
        done = Restic().after_loss(settings, Restic().inspect(settings))
        assert list(locks.iterdir())
        assert "failed" in done[1]
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(timeout=60)


@Restics
def test_restic_restore(
    version: str, restic: Callable[[str], Settings], home: Path, tmp_path: Path
) -> None:
    """The command that is shown restores the backup, holes and access lists too, onto an XFS."""
    settings = restic(version)
    subprocess.run(["setfacl", "-m", "u:1234:rw", home / "d0/f0"], check=True)
    with (home / "sparse").open("wb") as file:
        file.truncate(16 << 20)
    (backup,) = back_up(Restic(), settings, moment_of(home)).end.backups
    to = tmp_path / "xfs"
    words = Restic().restore_command(settings, Facts(version, None), backup, str(to))
    with an_xfs(to):
        call(replace(settings, command=words))
        restored = Path(f"{to}{home}")
        assert (restored / "d0/f0").read_text() == "home 0"
        lists = "system.posix_acl_access"
        assert os.getxattr(restored / "d0/f0", lists) == os.getxattr(home / "d0/f0", lists)
        has_holes = (restored / "sparse").stat().st_blocks == 0
        assert has_holes == (version != "0.14.0")


@contextmanager
def an_xfs(place: Path) -> Iterator[None]:
    """Have an empty XFS mounted at *place*."""
    image = place.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(320 << 20)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


# -- kopia ------------------------------------------------------------------------------------


@pytest.fixture
def kopia(tmp_path: Path) -> Settings:
    """Return settings for a new repository of kopia."""
    env = {
        **environment(tmp_path),
        "KOPIA_CONFIG_PATH": str(tmp_path / "config/repository.config"),
        "KOPIA_CACHE_DIRECTORY": str(tmp_path / "cache"),
        "KOPIA_LOG_DIR": str(tmp_path / "logs"),
        "KOPIA_PASSWORD": "sesame",
        "KOPIA_CHECK_FOR_UPDATES": "false",
        "KOPIA_PERSIST_CREDENTIALS_ON_CONNECT": "false",
    }
    settings = Settings((program("kopia"),), (), env, str(tmp_path))
    (tmp_path / "repository").mkdir()
    call(settings, "repository", "create", "filesystem", "--path", str(tmp_path / "repository"))
    return settings


def manifests(settings: Settings) -> list[dict[str, Any]]:
    return list(json.loads(call(settings, "snapshot", "list", "--json", "--all")))


def test_kopia_completed(kopia: Settings, home: Path, srv: Path) -> None:
    """Each source of a whole backup is completed, and kept under the snapshots' time."""
    facts = Kopia().inspect(kopia)
    assert facts.version.startswith("0.")
    assert facts.repository
    assert "hard links" in facts.notes[0]
    seen = back_up(Kopia(), kopia, moment_of(home, srv))
    assert (seen.end.outcome, seen.end.reason) == (Outcome.COMPLETED, None)
    kept = manifests(kopia)
    assert [b.backup_id for b in seen.end.backups] == [m["id"] for m in kept]
    assert [b.files_processed for b in seen.end.backups] == [FILES, 3]
    assert {datetime.fromisoformat(m["startTime"]) for m in kept} == {AT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"KOPIA_PASSWORD": "wrong"}, "kopia: the password is wrong for this repository"),
        ({"KOPIA_PASSWORD": ""}, "kopia: there is no password for the repository"),
        ({"KOPIA_CONFIG_PATH": "/absent/c"}, "kopia is not connected to a repository"),
    ],
)
def test_kopia_unusable(kopia: Settings, change: dict[str, str], message: str) -> None:
    """A password or connection that is missing or wrong is told in one line, and not asked for."""
    env = {name: value for name, value in {**kopia.env, **change}.items() if value}
    with pytest.raises(UserError, match=message) as caught:
        Kopia().inspect(replace(kopia, env=env))
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_kopia_absent_repository(kopia: Settings, tmp_path: Path) -> None:
    """A repository that is out of reach is told as such."""
    (tmp_path / "repository").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"absent or out of reach: .*no such file"):
        Kopia().inspect(kopia)


def test_kopia_unreadable(kopia: Settings, home: Path, srv: Path) -> None:
    """Only the source with a file that cannot be read is partial; the run is, as a whole."""
    make_unreadable(srv / "d0/f0")
    seen = back_up(Kopia(), unprivileged(kopia), moment_of(home, srv))
    assert seen.end.outcome is Outcome.PARTIAL
    assert [b.outcome for b in seen.end.backups] == [Outcome.COMPLETED, Outcome.PARTIAL]
    assert "1 file could not be read: d0/f0: " in (seen.end.reason or "")


def test_kopia_hidden_errors(kopia: Settings, home: Path) -> None:
    """Policies that ignore errors or drop equal backups do not make a partial backup whole."""
    make_unreadable(home / "d0/f0")

    def end(hour: int, *policy: str) -> End:
        call(kopia, "policy", "set", str(home), *policy)
        moment = moment_of(home, at=AT + timedelta(hours=hour))
        return back_up(Kopia(), unprivileged(kopia), moment).end

    assert end(0, "--ignore-file-errors=true").outcome is Outcome.PARTIAL
    assert end(1, "--ignore-file-errors=false").outcome is Outcome.PARTIAL
    again = end(2, "--ignore-identical-snapshots=true")  # exit status 0, and no manifest at all
    assert (again.outcome, again.backups[0].backup_id) == (Outcome.PARTIAL, None)


def test_kopia_unchanged(kopia: Settings, home: Path) -> None:
    """A backup that a policy drops, because nothing changed, is completed without id."""
    call(kopia, "policy", "set", str(home), "--ignore-identical-snapshots=true")
    back_up(Kopia(), kopia, moment_of(home))
    seen = back_up(Kopia(), kopia, moment_of(home, at=AT + timedelta(hours=1)))
    assert seen.end.outcome is Outcome.COMPLETED
    assert seen.end.backups[0].backup_id is None


def test_kopia_missing_target(kopia: Settings, home: Path) -> None:
    """A target that is not there is a failure; what was saved of the others is told."""
    end = back_up(Kopia(), kopia, moment_of(home, Path("/absent"))).end
    assert end.outcome is Outcome.FAILED
    assert [b.outcome for b in end.backups] == [Outcome.COMPLETED, Outcome.FAILED]


def test_kopia_stop(kopia: Settings, home: Path) -> None:
    """A backup that the stop signal cut short is no success, although kopia exits with 0."""
    for n in range(8):
        (home / f"big{n}").write_bytes(os.urandom(64 << 20))
    moment = moment_of(home)
    launch = Kopia().launch(kopia, Kopia().inspect(kopia), moment)
    child = subprocess.Popen(
        launch.commands[0],
        env={**kopia.env, **launch.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr
    child.stderr.readline()  # Snapshotting ...
    child.send_signal(Kopia.stop_signal)
    stdout, stderr = child.communicate(timeout=60)
    reader = Kopia().reader(moment)
    for line in stdout.splitlines():
        reader.stdout(line)
    for line in stderr.splitlines():
        reader.stderr(line)
    reader.end_command(0, child.returncode)
    assert child.returncode == 0
    end = reader.end()
    assert end.outcome is Outcome.FAILED
    assert "canceled" in (end.reason or "")


def test_kopia_tree(kopia: Settings, tmp_path: Path) -> None:
    """A tree is kept under the live paths, from whatever root, and no file is read again."""
    for root in ("one", "two"):
        make_tree(tmp_path / root / "usr/home")
    subprocess.run(("cp", "-aT", tmp_path / "one", tmp_path / "two"), check=True)
    moment = Moment(("/usr/home",), str(tmp_path / "one"), AT)
    assert back_up(Kopia(), kopia, moment).end.outcome is Outcome.COMPLETED
    again = replace(moment, root=str(tmp_path / "two"), at=AT + timedelta(hours=1))
    seen = back_up(Kopia(), kopia, again)
    assert seen.end.backups[0].outcome is Outcome.COMPLETED
    first, second = manifests(kopia)
    assert first["source"]["path"] == second["source"]["path"] == "/usr/home"
    assert second["stats"]["cachedFiles"] == FILES


def test_kopia_excludes(kopia: Settings, home: Path) -> None:
    """What must stay live is left out by a policy; the command that is shown makes it so."""
    call(kopia, "policy", "set", "--global", "--add-ignore", "*.tmp")
    (home / "x.tmp").write_text("ignored before and after")
    out = tuple(str(make_tree(home / name, files=1)) for name in ("x[1]*?", "a b", "plain"))
    make_tree(home / "x1", files=1)
    targets = (str(home),)
    with pytest.raises(UserError, match=r"does not ignore .*plain") as caught:
        Kopia().check(kopia, targets, out)
    words = shlex.split((caught.value.hint or "").strip("`"))
    assert words[0] == "kopia"
    call(kopia, *words[1:])
    Kopia().check(kopia, targets, out)
    end = back_up(Kopia(), kopia, moment_of(home, excludes=out)).end
    assert end.outcome is Outcome.COMPLETED
    to = home.with_name("to")
    call(kopia, "restore", str(end.backups[0].backup_id), str(to))
    assert {path.name for path in to.iterdir()} == {"d0", "d1", "d2", "x1"}


def test_kopia_excludes_cache(kopia: Settings, home: Path) -> None:
    """A folder that is tagged as a cache needs no policy."""
    (home / "cache").mkdir()
    tag = "Signature: 8a477f597d28d172789f06886806bc55\n"
    (home / "cache/CACHEDIR.TAG").write_text(tag)
    (home / "cache/content").write_text("content")
    Kopia().check(kopia, (str(home),), (str(home / "cache"),))
    end = back_up(Kopia(), kopia, moment_of(home)).end
    assert end.backups[0].files_processed == FILES


def test_kopia_one_file_system(kopia: Settings, home: Path) -> None:
    """A policy that would leave out nested snapshots without a word is refused."""
    call(kopia, "policy", "set", str(home), "--one-file-system=true")
    with pytest.raises(UserError, match="on one file system") as caught:
        Kopia().check(kopia, (str(home),), ())
    call(kopia, *shlex.split((caught.value.hint or "").strip("`"))[1:])
    Kopia().check(kopia, (str(home),), ())


def test_kopia_at_in_a_name(kopia: Settings, tmp_path: Path) -> None:
    """`@home` is the policy's own path, not a user's name: what is shown makes it so, too."""
    home = make_tree(tmp_path / "@home")
    user, host = (json.loads(call(kopia, "repository", "status", "--json"))["clientOptions"][name]
                  for name in ("username", "hostname"))  # fmt: skip
    call(kopia, "policy", "set", f"{user}@{host}:{home}", "--one-file-system=true")
    for excludes, said in (((), "on one file system"), ((str(home / "d0"),), "does not ignore")):
        with pytest.raises(UserError, match=said) as caught:
            Kopia().check(kopia, (str(home),), excludes)
        call(kopia, *shlex.split((caught.value.hint or "").strip("`"))[1:])
        Kopia().check(kopia, (str(home),), excludes)
    end = back_up(Kopia(), kopia, moment_of(home, excludes=(str(home / "d0"),))).end
    assert end.outcome is Outcome.COMPLETED
    unnamed = replace(end.backups[0], backup_id=None)
    call(kopia, *Kopia().restore_command(kopia, Facts("0.19.0", None), unnamed, str(tmp_path))[1:])


def test_kopia_one_file_system_below(kopia: Settings, home: Path) -> None:
    """The policy of a directory below a target counts: not one beside it, left out, or others'."""
    targets, out = (str(home),), (str(home / "d1"),)
    call(kopia, "policy", "set", str(home), "--add-ignore=/d1")
    for other in (f"other@host:{home}/d0", f"{home}0", f"{home}/d1/x"):
        call(kopia, "policy", "set", other, "--one-file-system=true")
    Kopia().check(kopia, targets, out)
    call(kopia, "policy", "set", str(home / "d0"), "--one-file-system=true")
    with pytest.raises(UserError, match=f"policy for {home}/d0 keeps it on one file") as caught:
        Kopia().check(kopia, targets, out)
    call(kopia, *shlex.split((caught.value.hint or "").strip("`"))[1:])
    Kopia().check(kopia, targets, out)


def test_kopia_policy_below_what_is_ignored(kopia: Settings, home: Path) -> None:
    """A policy counts only where kopia goes: not below what the rules above it ignore."""
    targets, out = (str(home),), (str(home / "d0/f0"),)
    call(kopia, "policy", "set", str(home), "--add-ignore=/d0", "--add-ignore=!f3")
    call(kopia, "policy", "set", str(home / "d0"), "--add-ignore=!f0", "--one-file-system=true")
    call(kopia, "policy", "set", str(home / "d1"), "--add-ignore=x")
    for below in ("d0/f0", "d1/x/y"):
        call(kopia, "policy", "set", str(home / below), "--one-file-system=true")
    (home / "d1/x/y").mkdir(parents=True)
    (home / "d1/x/y/file").write_text("ignored")
    Kopia().check(kopia, targets, out)
    end = back_up(Kopia(), kopia, moment_of(home)).end
    assert end.backups[0].files_processed == FILES - len(list((home / "d0").iterdir()))


@pytest.mark.parametrize(
    ("ignored", "of", "rule", "below"), [("d0", "", "!d0", "d0"), ("x", "d0", "!x", "d0/x")]
)
def test_kopia_policy_below_what_is_taken_back(
    kopia: Settings, home: Path, ignored: str, of: str, rule: str, below: str
) -> None:
    """Where a rule may take back what is ignored, kopia may go there, and the policy counts."""
    call(kopia, "policy", "set", str(home), f"--add-ignore={ignored}")
    call(kopia, "policy", "set", str(home / of), f"--add-ignore={rule}")
    call(kopia, "policy", "set", str(home / below), "--one-file-system=true")
    with pytest.raises(UserError, match=f"policy for {home}/{below} keeps it on one file"):
        Kopia().check(kopia, (str(home),), ())


def test_kopia_one_file_system_of_all(kopia: Settings, home: Path) -> None:
    """Where the connection does not tell who we are, the policies of all may be ours."""
    config = Path(kopia.env["KOPIA_CONFIG_PATH"])
    words = json.loads(config.read_text())
    call(kopia, "policy", "set", f"other@host:{home}/d0", "--one-file-system=true")
    Kopia().check(kopia, (str(home),), ())
    config.write_text(json.dumps(words | {"username": "", "hostname": ""}))
    with pytest.raises(UserError, match=f"policy for {home}/d0 keeps it on one file"):
        Kopia().check(kopia, (str(home),), ())


def test_kopia_negated_rule_below(kopia: Settings, home: Path) -> None:
    """A rule of a directory below takes back what its parents ignore: kopia saves it."""
    out, targets = str(home / "d0/f0"), (str(home),)
    call(kopia, "policy", "set", str(home), "--add-ignore=/d0/f0")
    call(kopia, "policy", "set", str(home / "d0"), "--add-ignore=!f3", "--add-ignore=x")
    Kopia().check(kopia, targets, (out,))
    assert back_up(Kopia(), kopia, moment_of(home)).end.backups[0].files_processed == FILES - 1
    call(kopia, "policy", "set", str(home / "d0"), "--add-ignore=!f0")
    assert back_up(Kopia(), kopia, moment_of(home)).end.backups[0].files_processed == FILES
    with pytest.raises(UserError, match=f"!f0 of kopia's policy for {home}/d0 may") as caught:
        Kopia().check(kopia, targets, (out,))
    call(kopia, *shlex.split((caught.value.hint or "").strip("`"))[1:])
    Kopia().check(kopia, targets, (out,))


def test_kopia_live_paths(kopia: Settings, tmp_path: Path) -> None:
    """The folders that kopia really uses are found."""
    assert set(Kopia().live_paths(kopia)) == {
        str(tmp_path / name) for name in ("config", "cache", "logs", "repository")
    }


def test_kopia_restore(kopia: Settings, home: Path, tmp_path: Path) -> None:
    """The command that is shown restores the backup."""
    (backup,) = back_up(Kopia(), kopia, moment_of(home)).end.backups
    words = Kopia().restore_command(kopia, Facts("0.23.1", None), backup, str(tmp_path / "to"))
    call(replace(kopia, command=words))
    assert Path(f"{tmp_path}/to{home}/d0/f0").read_text() == "home 0"


# -- any other --------------------------------------------------------------------------------


def test_command(home: Path, srv: Path, tmp_path: Path) -> None:
    """Another program gets the paths, and its exit status is believed."""
    archive = tmp_path / "archive.tar"
    settings = Settings(("tar", "-cPf", str(archive)), (), environment(tmp_path), str(tmp_path))
    seen = back_up(Command(), settings, moment_of(home, srv))
    assert seen.end.outcome is Outcome.COMPLETED
    listed = subprocess.run(("tar", "-tPf", archive), capture_output=True, text=True, check=True)
    assert f"{srv}/d0/f0" in listed.stdout.splitlines()
    failed = back_up(Command(), settings, moment_of(Path("/absent")))
    assert failed.end.outcome is Outcome.FAILED
    assert "exit status 2" in (failed.end.reason or "")


def test_kopia_retention(kopia: Settings, home: Path, srv: Path) -> None:
    """The job's rules are the policy of its own sources alone, and are applied at once."""
    client = Kopia()
    for n in range(4):
        (home / "more").write_text(str(n))
        for path in (home, srv):
            moment = moment_of(path, at=AT + timedelta(days=n))
            assert back_up(client, kopia, moment).end.outcome is Outcome.COMPLETED
    spans = ("latest", "hourly", "daily", "weekly", "monthly", "annual")
    policy = client.policy(tuple(f"--keep-{span}={2 * (span == 'latest')}" for span in spans))
    for argv in client.forgetting(kopia, Facts("0.19.0", None), (str(home),), policy):
        call(kopia, *argv[1:])
    listed = json.loads(call(kopia, "snapshot", "list", "--json", "--all", "--show-identical"))
    left = [each["source"]["path"] for each in listed]
    assert left.count(str(home)) == 2
    assert left.count(str(srv)) == 4

"""
What borg is told, and what its answers mean; the real programs are in tests/contract.

The lines are those of borg 1.4.5 (with BORG_EXIT_CODES=modern), where nothing else is said.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from atomtx.clients import Backup, End, Facts, Moment, Settings, load
from atomtx.clients.borg import Borg, archive_prefix, local_repository
from atomtx.clients.borg_locks import is_stale
from atomtx.clients.borg_reader import said_of
from atomtx.errors import UserError
from atomtx.launching import make_folders
from atomtx.process import Completed
from atomtx.states import Outcome
from tests.runs import CLIENT, a_plan

AT = datetime(2026, 7, 1, 10, 0, 0, tzinfo=UTC)
HOME = Moment(targets=("/home", "/srv"), root="", at=AT)
FACTS = Facts("1.4.5", "c7232cc58c3b2c32")
# Cut: the real one has the cache, the encryption and the repository besides.
DOCUMENT = """\
{
    "archive": {
        "command_line": [
            "/usr/bin/borg",
            "create"
        ],
        "duration": 0.03074,
        "end": "2026-07-01T10:00:00.000000",
        "id": "01a98a5be794cb7c538bb9e4dcb1deb4364d0fe8bea76ec46692a3dbc46fe85f",
        "limits": {
            "max_archive_size": 2.4986315938899684e-05
        },
        "name": "one",
        "start": "2026-07-01T10:00:00.000000",
        "stats": {
            "compressed_size": 615,
            "deduplicated_size": 614,
            "nfiles": 2,
            "original_size": 541
        }
    }
}"""
PROGRESS = (
    '{"original_size": 541, "compressed_size": 615, "deduplicated_size": 614, "nfiles": 2, '
    '"path": "src", "time": 1795286812.217647, "type": "archive_progress", "finished": false}'
)
PROGRESS_END = '{"time": 1795286812.2461846, "type": "archive_progress", "finished": true}'
CACHE = (
    '{"message": "Saving files cache", "operation": 2, "msgid": "cache.commit", '
    '"type": "progress_message", "finished": false, "time": 1795286812.294471}'
)


def log(message: str, level: str, msgid: str = "") -> str:
    """Return a line of the log as borg writes it."""
    line = {
        "type": "log_message",
        "time": 1795287110.8388512,
        "message": message,
        "levelname": level,
        "name": "borg.archiver",
    }
    return json.dumps(line | ({"msgid": msgid} if msgid else {}))


ABSENT = log(
    "/absent: stat: [Errno 2] No such file or directory: '/absent'",
    *("WARNING", "BackupFileNotFoundError"),
)
ABSENT_1_2 = log("/absent: [Errno 2] No such file or directory: 'absent'", "WARNING")
DENIED = log(
    "src/deny: open: [Errno 13] Permission denied: 'deny'", "WARNING", "BackupPermissionError"
)
EXISTS = log("Archive one already exists", "ERROR", "Archive.AlreadyExists")
STOPPED = log("Error: Got Ctrl-C / SIGINT.", "ERROR", "Error")
LOCKED_1_2 = log(
    "Failed to create/acquire the lock /srv/repo/lock.exclusive (timeout).", "ERROR", "LockTimeout"
)
CLOSED = log(
    "Connection closed by remote host. Is borg working on the server?",
    *("ERROR", "ConnectionClosedWithHint"),
)
WRONG = log(
    "Passphrase supplied in BORG_PASSPHRASE, by BORG_PASSCOMMAND, or via BORG_PASSPHRASE_FD is "
    "incorrect.",
    *("ERROR", "PassphraseWrong"),
)
# borg 1.4.5 on a full disk, the frames cut.
TRACEBACK = log(
    "Traceback (most recent call last):\n"
    '  File "/usr/lib/python3/dist-packages/borg/archiver.py", line 5917, in main\n'
    "    exit_code = archiver.run(args)\n                ^^^^^^^^^^^^^^^^^^\n"
    "OSError: [Errno 28] No space left on device\n\n"
    "Platform: Linux vm 6.18.5 #1 SMP x86_64\nBorg: 1.4.5  Python: CPython 3.11.7\nPID: 12\n",
    "ERROR",
)


def settings(*extra: str, **env: str) -> Settings:
    return Settings((), extra, {"HOME": "/root", **env}, "/work")


def words(*extra: str, moment: Moment = HOME, **env: str) -> tuple[str, ...]:
    """Return the one command that borg is started with."""
    (argv,) = Borg().launch(settings(*extra, **env), FACTS, moment).commands
    return argv


def read(*stderr: str, status: int | None = 0, document: str = DOCUMENT) -> End:
    """Return how the reader judges these lines."""
    reader = Borg().reader(HOME)
    for line in stderr:
        reader.stderr(line)
    for line in document.splitlines():
        reader.stdout(line)
    if status is not None:
        reader.end_command(0, status)
    return reader.end()


# -- what borg is told ------------------------------------------------------------------------


def test_load() -> None:
    """The client is found by its name."""
    assert isinstance(load("borg"), Borg)


def test_launch() -> None:
    """The backup has the snapshots' time and name, the user's options, and targets last."""
    launch = Borg().launch(settings("--comment", "a b"), FACTS, HOME)
    name = f"{archive_prefix(('/home', '/srv'))}-2026-07-01T10:00:00Z"
    assert launch.commands == (
        (
            *("borg", "create", "--json", "--log-json", "--progress"),
            *("--timestamp=2026-07-01T10:00:00", "--lock-wait=600", "--comment=a b"),
            *("--", f"::{name}", "/home", "/srv"),
        ),
    )
    assert launch.cwd == "/work"
    assert launch.env == {"LC_ALL": "C.UTF-8", "BORG_EXIT_CODES": "modern"}


def test_exit_codes_of_the_user() -> None:
    """The scheme that the user chose stays: both are understood."""
    launch = Borg().launch(settings(BORG_EXIT_CODES="legacy"), FACTS, HOME)
    assert "BORG_EXIT_CODES" not in launch.env


def test_names() -> None:
    """A name tells host and paths, whatever they are, and has no sign of a pattern in it."""
    names = [
        archive_prefix(paths)
        for paths in (("/home",), ("/home/x",), ("/home-x",), ("/home", "/srv"), ("/",), ("/a*?",))
    ]
    assert len(set(names)) == len(names)
    assert not [name for name in names for other in names if name != other and other in name]
    assert all(set(name).isdisjoint("/*?[]{}: ") for name in names)
    assert names[0].split("-home-")[0] == os.uname().nodename
    assert archive_prefix(("/srv", "/home")) == archive_prefix(("/home", "/srv"))


def test_name_of_a_kept_moment() -> None:
    """Another run may have stored the same moment: the run's id tells them apart."""
    one, two = (replace(HOME, run=run, is_kept=True) for run in ("1" * 16, "2" * 16))
    assert words(moment=one)[-3].endswith("Z-" + "1" * 16)
    assert words(moment=one)[-3] != words(moment=two)[-3]
    assert words(moment=replace(one, is_kept=False)) == words(moment=replace(two, is_kept=False))


def test_name_of_an_attempt() -> None:
    """A second attempt has another name: the first one's may be there, whole, and unseen."""
    names = {words(moment=replace(HOME, attempt=n))[-3] for n in (1, 2, 3)}
    assert len(names) == 3
    assert all(name.startswith(f"::{archive_prefix(HOME.sources)}-") for name in names)


def test_tree() -> None:
    """A tree is backed up by relative arguments, so that its paths are the live ones."""
    moment = Moment(("/usr/home", "/srv"), "/tree", AT, excludes=("/srv/a*",))
    given = settings("--exclude-from", "list", BORG_REPO="repo")
    launch = Borg().launch(given, FACTS, moment)
    (argv,) = launch.commands
    assert launch.cwd == "/tree"
    assert argv[-2:] == ("usr/home", "srv")
    assert argv[7:9] == ("--exclude=pp:srv/a*", "--exclude-from=/work/list")
    assert launch.env["BORG_REPO"] == "/work/repo"
    assert words(moment=Moment(("/",), "/tree", AT))[-1] == "."


@pytest.mark.parametrize("repo", ["ssh://h/./repo", "user@h:repo", "h:repo", "/repo", "file:///r"])
def test_other_repositories(repo: str) -> None:
    """Where the repository's place does not depend on the directory it is left as it is."""
    launch = Borg().launch(settings(BORG_REPO=repo), FACTS, Moment(("/home",), "/tree", AT))
    assert "BORG_REPO" not in launch.env


def test_whole_tree() -> None:
    """The root itself is one absolute argument, and what is left out lies below it."""
    moment = Moment(("/usr/home",), "/tree", AT, excludes=("/usr/home/x",), whole=True)
    assert words(moment=moment)[-1] == "/tree"
    assert "--exclude=pp:tree/usr/home/x" in words(moment=moment)


def test_verb_of_a_wrapper() -> None:
    """The verb at the end of a wrapper is not given twice."""
    launch = Borg().launch(replace(settings(), command=("wrap", "create")), FACTS, HOME)
    assert launch.commands[0][:3] == ("wrap", "create", "--json")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("-x",), "empty directories"),
        (("-vx",), "empty directories"),
        (("--one-file-system",), "empty directories"),
        (("-n",), "nothing would be saved"),
        (("--stdin-name=x",), "not a stream"),
        (("--content-from-command", "--", "ls"), "not a stream"),
        (("--paths-from-stdin",), "itself names"),
        (("--patterns-from", "list"), "name more"),
        (("--pattern", "R /etc"), "itself names"),
        (("--pattern=r /etc",), "itself names"),
        (("--timestamp=now",), "time of its snapshots"),
        (("--bypass-lock",), "could be damaged"),
        (("--error",), "reads the warnings"),
        (("/etc",), "itself names"),
        (("--", "/etc"), "itself names"),
        (("::name",), "itself names"),
        (("-e",), "needs a value"),
        (("--dry",), "read --dry as --dry-run"),
        (("--one-f",), "as --one-file-system"),
        (("--times=x",), "as --timestamp"),
        (("--rsh=x", "BORG_PASSPHRASE=sesame"), "carries a secret"),
    ],
)
def test_refused(extra: tuple[str, ...], reason: str) -> None:
    """An option that would break a promise is refused with the reason, also where cut short."""
    with pytest.raises(UserError, match=reason):
        words(*extra)


def test_options() -> None:
    """Options are read as borg reads them; what is there anyway is not said twice."""
    argv = words("-sp", "--json", "-C", "zstd,3", "-epp:x", "--noatime", "--list")
    assert argv[7:-4] == ("--compression=zstd,3", "--exclude=pp:x", "--noatime", "--list")
    assert argv.count("--json") == argv.count("--progress") == 1


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("", None),
        ("/srv/repo", "/srv/repo"),
        ("file:///srv/repo", "/srv/repo"),
        ("repo", "repo"),
        ("./a:b", "./a:b"),
        ("/a:b", "/a:b"),
        ("ssh://user@host:22/srv/repo", None),
        ("user@host:repo", None),
        ("host:/srv/repo", None),
        ("[::1]:repo", None),
        ("/srv/{hostname}/repo", "/srv"),
        ("/srv/x-{hostname}", "/srv"),
    ],
)
def test_local_repository(location: str, path: str | None) -> None:
    """A repository in the file system is told from one on another machine, as borg does."""
    assert local_repository(location) == path


@pytest.mark.parametrize(
    ("env", "live"),
    [
        ({}, ("/root/.cache/borg", "/root/.config/borg/security")),
        (
            {"XDG_CACHE_HOME": "/c", "XDG_CONFIG_HOME": "/f"},
            ("/c/borg", "/f/borg/security"),
        ),
        (
            {"BORG_BASE_DIR": "/b", "XDG_CACHE_HOME": "/c"},
            ("/b/.cache/borg", "/b/.config/borg/security"),
        ),
        (
            {"BORG_CACHE_DIR": "/c", "BORG_CONFIG_DIR": "/f", "TMPDIR": "/t"},
            ("/c", "/f/security", "/t"),
        ),
        (
            {"BORG_SECURITY_DIR": "/s", "BORG_REPO": "repo", "SSH_AUTH_SOCK": "/run/a/sock"},
            ("/root/.cache/borg", "/s", "/work/repo"),
        ),
        (
            {"BORG_REPO": "host:repo", "SSH_AUTH_SOCK": "/run/a/sock"},
            ("/root/.cache/borg", "/root/.config/borg/security", "/run/a/sock"),
        ),
    ],
)
def test_live_paths(env: dict[str, str], live: tuple[str, ...]) -> None:
    """What borg writes, a local repository and the agent's socket must be the live ones."""
    assert Borg().live_paths(settings(**env)) == live


def test_no_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no temporary directory can be written, as on a machine in rescue, one line says so."""
    program = tmp_path / "borg"
    program.write_text("#!/bin/sh\necho borg 1.4.5\n")
    program.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    given = replace(settings(PATH="/bin:/usr/bin"), command=(str(program),), cwd="/")
    with pytest.raises(UserError) as caught:
        Borg().inspect(given)
    words = "borg: a temporary directory cannot be made: No such file or directory"
    assert caught.value.message == words
    assert caught.value.hint == "set TMPDIR to a directory that can be written"


def test_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folders are there before the snapshots: in frozen files it could not make them."""
    monkeypatch.delenv("BORG_CACHE_DIR", raising=False)
    home, cache = tmp_path / "home", tmp_path / "home/.cache/borg"
    home.mkdir(mode=0o755)
    env = (("BORG_BASE_DIR", str(home)), ("BORG_SECURITY_DIR", str(tmp_path / "security")))
    made = replace(a_plan(), client=replace(CLIENT, name="borg", environment=env))
    make_folders(made)
    assert not cache.exists()  # outside of the set borg itself can
    made = replace(made, live_paths=(str(cache),))
    for _ in range(2):
        make_folders(made)
    assert [path.stat().st_mode & 0o777 for path in (cache, cache.parent)] == [0o700] * 2
    assert not (tmp_path / "security").exists()
    home.joinpath("file").touch()
    beneath = (*env, ("BORG_CACHE_DIR", f"{home}/file/borg"))
    client = replace(CLIENT, name="borg", environment=beneath)
    with pytest.raises(UserError, match=f"cannot make {home}/file/borg, .*: Not a directory"):
        make_folders(replace(made, client=client, live_paths=(f"{home}/file/borg",)))


def test_policy() -> None:
    """Only rules of retention are taken: a bare word would be a repository."""
    assert Borg().policy(("--keep-daily", "7", "--keep-within=2d")) == (
        *("--keep-daily=7", "--keep-within=2d"),
    )
    for wrong in (("--keep-daily",), ("/srv/repo",), ("--keep-tag", "x"), ("--prefix=x",)):
        with pytest.raises(UserError):
            Borg().policy(wrong)


def test_forgetting() -> None:
    """Only archives that are named after this host and these paths are pruned."""
    given = settings("--rsh", "ssh -i k", "--comment", "x")
    prune, compact = Borg().forgetting(given, Facts("1.4.0", None), ("/home",), ("--keep-daily=7",))
    glob = f"--glob-archives={archive_prefix(('/home',))}-*"
    assert prune == (
        *("borg", "prune", glob, "--keep-daily=7", "--lock-wait=600", "--rsh=ssh -i k"),
    )
    assert compact == ("borg", "compact", "--lock-wait=600", "--rsh=ssh -i k")
    assert Borg().stored_paths(HOME) == HOME.sources


def test_restore_command() -> None:
    """The command makes the folder, goes there, and restores from the same repository."""
    backup = Backup(("/home",), Outcome.COMPLETED, backup_id="one")
    given = settings("--rsh=ssh -i k", "--comment=x", BORG_REPO="repo")
    argv = Borg().restore_command(given, Facts("1.4.0", None), backup, "/to")
    assert argv[:3] == ("env", "BORG_REPO=/work/repo", "sh")
    assert argv[-6:] == ("/to", "borg", "extract", "--sparse", "--rsh=ssh -i k", "::one")
    remote = settings(BORG_REPO="h:r")
    assert Borg().restore_command(remote, Facts("1.4.0", None), backup, "/to")[0] == "sh"


# -- which borg -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("borg 2.0.0b25", "borg 2.0.0b25 cannot be used"),
        ("borg 1.1.18", "borg 1.1.18 cannot be used"),
        ("borg-linux64 1.0.3", "borg 1.0.3 cannot be used"),
    ],
)
def test_other_versions(said: str, message: str, tmp_path: Path) -> None:
    """A version whose command line or result is another one is refused in one line."""
    path = tmp_path / "borg"
    path.write_text(f"#!/bin/sh\necho {said}\n")
    path.chmod(0o755)
    with pytest.raises(UserError, match=message) as caught:
        Borg().inspect(replace(settings(PATH="/bin"), command=(str(path),), cwd="/"))
    assert "1.4" in (caught.value.hint or "")


def test_not_installed() -> None:
    """A program that is not there is told as such."""
    with pytest.raises(UserError, match="/absent/borg is not installed"):
        Borg().inspect(replace(settings(), command=("/absent/borg",)))


# -- what its answers mean --------------------------------------------------------------------


def test_completed() -> None:
    """An archive in the document and exit status 0 are a whole backup."""
    backup = Backup(
        *(("/home", "/srv"), Outcome.COMPLETED),
        backup_id="one",
        bytes_added=614,
        bytes_processed=541,
        files_processed=2,
    )
    assert read(PROGRESS, PROGRESS_END, CACHE) == End(Outcome.COMPLETED, backups=(backup,))


def test_stale_lock_is_no_lack() -> None:
    """That borg removed a stale lock itself does not make its backup partial."""
    line = log("Killed stale lock vm@3281355014145.28180-0.", "WARNING")
    assert read(line).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("status", [0, 1, 100, 105, 107, 127])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (ABSENT, "/absent: stat: [Errno 2] No such file or directory: '/absent'"),
        (ABSENT_1_2, "/absent: [Errno 2] No such file or directory: 'absent'"),
        (DENIED, "src/deny: open: [Errno 13] Permission denied: 'deny'"),
        (log("a: file changed while we backed it up", "WARNING"), "a: file changed while we "),
    ],
)
def test_partial(status: int, line: str, reason: str) -> None:
    """A file that was not saved makes the backup partial, though a wrapper says 0."""
    end = read(line, status=status)
    assert end.outcome is Outcome.PARTIAL
    assert (end.reason or "").startswith(f"1 file could not be read: {reason}")
    assert (end.backups[0].backup_id, end.retriable) == ("one", False)


@pytest.mark.parametrize("status", [1, 100, 127])
def test_warning_without_words(status: int) -> None:
    """An exit status that says warning is not a whole backup, whatever was printed."""
    end = read(log("Include pattern 'x' never matched.", "WARNING"), status=status)
    assert end.outcome is Outcome.PARTIAL
    assert "never matched" in (end.reason or "")
    assert "borg warned" in (read(status=status).reason or "")


@pytest.mark.parametrize("status", [2, 3, 13, 30, 52, 73, 99, 128, 130, 143, 255, -9, -15, None])
def test_failed_status(status: int | None) -> None:
    """An exit status that is not documented to mean success is failure, document or not."""
    assert read(status=status).outcome is Outcome.FAILED


@pytest.mark.parametrize(
    "document", ["", "{}", '{"archive": null}', '{"archive": {"name": ""}}', "{"]
)
@pytest.mark.parametrize("status", [0, 1, 107])
def test_no_document(document: str, status: int) -> None:
    """Without an archive in the document there is none, whatever the exit status says."""
    end = read(status=status, document=document)
    assert end.outcome is Outcome.FAILED
    assert "named no archive" in (end.reason or "")
    assert end.backups[0].backup_id is None


def test_noise() -> None:
    """Lines of a wrapper around the document, and lines that are no JSON, do not disturb."""
    end = read("noise", "[1]", '{"type": "file_status"}', document=f"hello\n{DOCUMENT}\nbye")
    assert end.outcome is Outcome.COMPLETED


def test_long_document() -> None:
    """The document of ten thousand targets is read; what a wrapper pours out before it is not."""
    words = '            "/tank/a/dataset/with/a/name/of/some/length",\n' * 40_000
    document = DOCUMENT.replace('            "create"\n', f'{words}            "create"\n')
    poured = "x" * 80 + "\n"
    assert read(document=poured * 200_000 + document).outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    ("status", "line", "retriable"),
    [
        (30, EXISTS, True),  # the next attempt's has another name
        (2, EXISTS, True),
        (2, LOCKED_1_2, True),
        (73, "", True),
        (13, "", True),
        (81, CLOSED, True),
        (2, CLOSED, True),
        (2, TRACEBACK, True),
        (2, log("Local Exception", "ERROR", "Exception"), False),
        (52, WRONG, False),
        (2, WRONG, False),
        (2, STOPPED, False),
        (12, log("Inconsistency detected.", "ERROR", "Repository.CheckNeeded"), False),
        (2, "borg create: error: unrecognized arguments: --nope", False),
        (-9, "", True),
        (137, "", True),
        (143, "", False),
    ],
)
def test_retriable(status: int, line: str, retriable: bool) -> None:
    """The moment is kept for trouble that may pass, not for what the user has to change."""
    end = read(line, status=status, document="")
    assert end.outcome is Outcome.FAILED
    assert end.retriable is retriable


def test_reason() -> None:
    """The reason is borg's last error, without its traceback, and the exit status."""
    assert read(DENIED, EXISTS, "noise", status=30).reason == (
        "Archive one already exists (exit status 30)"
    )
    assert read(log("Local Exception", "ERROR"), TRACEBACK, status=2).reason == (
        "OSError: [Errno 28] No space left on device (exit status 2)"
    )
    assert read("noise", status=2).reason == "noise (exit status 2)"
    assert read(status=-15).reason == "killed by SIGTERM"


def test_progress() -> None:
    """Progress is counted in files and bytes: borg tells no whole. Its lines fill no log."""
    reader = Borg().reader(HOME)
    reader.stderr(PROGRESS)
    assert (reader.progress.files_done, reader.progress.bytes_done) == (2, 541)
    assert reader.progress.percent is None
    for line in (PROGRESS_END, CACHE):
        before = reader.progress
        reader.stderr(line)
        assert reader.progress == before
        assert reader.progress is not before
    before = reader.progress
    reader.stderr(DENIED)
    assert reader.progress is before


def test_said() -> None:
    """Of a question that failed the last error counts, then the last line, then the status."""
    said = [
        said_of(Completed((), 2, "", text))
        for text in (f"{EXISTS}\n{DENIED}\nx\n", "usage\nborg list: error: no\n", "")
    ]
    assert said == ["Archive one already exists", "borg list: error: no", "exit status 2"]


def test_stale() -> None:
    """A lock is stale only by the host id that the user set, and a process that is gone."""
    assert is_stale(f"mine.{2**22 + 1}-0", "mine")
    assert not is_stale(f"mine.{os.getpid()}-0", "mine")
    assert not is_stale("mine.1-0", "mine")
    assert not is_stale(f"yours.{2**22 + 1}-0", "mine")
    assert not is_stale("mine", "mine")


def test_stale_and_not_reaped() -> None:
    """A process that has ended holds no lock, also where its parent never asks for its status."""
    child = subprocess.Popen(["sleep", "600"])
    name = f"mine.{child.pid}-0"
    assert not is_stale(name, "mine")
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_stale(name, "mine")
    child.wait()

"""What kopia is told, and what its answers mean; the real program is in tests/contract."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from atomtx import preparing
from atomtx.clients import Backup, End, Facts, Moment, Progress, Settings, load
from atomtx.clients.kopia import Kopia, ignore_rule, is_ignored
from atomtx.errors import UserError
from atomtx.states import Outcome

AT = datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))
HOME = Moment(targets=("/home", "/srv"), root="", at=AT)
FACTS = Facts("0.23.1", "id")


def settings(*extra: str, command: tuple[str, ...] = (), **env: str) -> Settings:
    return Settings(command, extra, env, "/work")


def manifest(path: str, incomplete: str = "", **summary: Any) -> str:
    entry = {"obj": "k1", "summ": {"size": 6, "files": 2, "numFailed": 0, **summary}}
    told = {"id": f"id{path}", "source": {"path": path}, "rootEntry": entry}
    return json.dumps({**told, **({"incomplete": incomplete} if incomplete else {})})


BOTH = (manifest("/home"), manifest("/srv"))


def read(*lines: str, status: int | None = 0, text: Iterable[str] = ()) -> End:
    """Return how the reader judges these lines."""
    reader = Kopia().reader(HOME)
    for line in text:
        reader.stderr(line)
    for line in lines:
        reader.stdout(line)
    if status is not None:
        reader.end_command(0, status)
    return reader.end()


def test_load() -> None:
    """The client is found by its name."""
    assert isinstance(load("kopia"), Kopia)


def test_launch() -> None:
    """All live targets are backed up by one command, as of the snapshots' time in UTC."""
    launch = Kopia().launch(settings("--tags", "a:b", "--json"), FACTS, HOME)
    assert launch.commands == (
        (
            *("kopia", "snapshot", "create", "--json", "--progress"),
            *("--progress-update-interval=1s", "--start-time=2026-07-01 10:00:00 UTC"),
            *("--tags=a:b", "/home", "/srv"),
        ),
    )
    assert launch.env == {"KOPIA_CHECK_FOR_UPDATES": "false"}
    assert launch.cwd == "/work"


def test_tree() -> None:
    """Of a tree each target is a command of its own, kept under its live path."""
    moment = Moment(("/", "/srv"), "/tree", AT)
    launch = Kopia().launch(settings(KOPIA_CONFIG_PATH="/absent/c"), FACTS, moment)
    assert [argv[-2:] for argv in launch.commands] == [
        ("--override-source=/", "/tree/"),
        ("--override-source=/srv", "/tree/srv"),
    ]


def test_whole_tree() -> None:
    """The root itself is one source, as kopiatomic gives it; the wrapper's verb is no other."""
    moment = Moment(("/home", "/srv"), "/kopia", AT, whole=True)
    given = replace(settings(), command=("wrap", "snapshot"))
    (argv,) = Kopia().launch(given, FACTS, moment).commands
    assert argv[:4] == ("wrap", "snapshot", "create", "--json")
    assert argv[-1] == "/kopia"
    assert not any(word.startswith("--override-source") for word in argv)


def test_tree_of_a_known_host(tmp_path: Path) -> None:
    """Where the configuration tells user and host, they are named: a path may hold an @."""
    config = tmp_path / "c.config"
    config.write_text('{"hostname": "vm", "username": "root"}')
    given = settings(KOPIA_CONFIG_PATH=str(config))
    launch = Kopia().launch(given, FACTS, Moment(("/a@b",), "/tree", AT))
    assert launch.commands[0][-2] == "--override-source=root@vm:/a@b"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("-p", "sesame"), "carries a secret"),
        (("--password=sesame",), "carries a secret"),
        (("--all",), "itself names"),
        (("/etc",), "itself names"),
        (("--start-time", "now"), "time of its snapshots"),
        (("--override-source=/x",), "itself names"),
        (("--stdin-file=x",), "not a stream"),
        (("--upload-limit-mb", "5"), "not be whole"),
        (("--no-json",), "JSON"),
    ],
)
def test_refused(extra: tuple[str, ...], reason: str) -> None:
    """An option that would break a promise is refused with the reason, before anything runs."""
    with pytest.raises(UserError, match=reason) as caught:
        Kopia().launch(settings(*extra), FACTS, HOME)
    assert "sesame" not in str(caught.value)


def test_live_paths(tmp_path: Path) -> None:
    """Configuration, cache, logs and a local repository must be the live ones."""
    folder = tmp_path / "kopia"
    folder.mkdir()
    storage = {"type": "filesystem", "config": {"path": "/srv/repo"}}
    config = {"storage": storage, "caching": {"cacheDirectory": "../cache"}}
    (folder / "repository.config").write_text(json.dumps(config))
    live = Kopia().live_paths(
        settings(HOME="/root", XDG_CONFIG_HOME=str(tmp_path), TMPDIR="/var/tmp")
    )
    assert live == (
        *(str(folder), str(tmp_path / "cache"), "/root/.cache/kopia", "/srv/repo", "/var/tmp"),
    )


def test_live_paths_of_no_connection() -> None:
    """Without a configuration the folders are those that kopia would use."""
    assert Kopia().live_paths(settings("--log-dir=log", HOME="/root")) == (
        *("/root/.config/kopia", "/work/log"),
    )


@pytest.mark.parametrize(
    ("rule", "ignored"),
    [
        ("/u/.cache/kopia", True),
        ("/u/.cache/", True),
        ("u/.cache", True),
        ("/*/.cache", True),
        (".cache", True),
        ("kopia", True),
        ("*.cache", True),
        ("/.cache", False),
        ("/u/.cache/kopia/logs", False),
        ("/u/*", True),
        ("/u/.cache/k", False),
        ("**/kopia", False),
        ("!kopia", False),
        ("#kopia", False),
        ("", False),
    ],
)
def test_is_ignored(rule: str, ignored: bool) -> None:
    """A rule counts only if it leaves the path out for certain."""
    assert is_ignored("/home/u/.cache/kopia", "/home", [rule]) is ignored


@pytest.mark.parametrize("path", ["/home/a b", "/home/x[1]*?", "/home/back\\slash"])
def test_ignore_rule(path: str) -> None:
    """The rule that is proposed for a path is understood for that path, and for no other."""
    assert is_ignored(path, "/home", [ignore_rule(path, "/home")])
    assert not is_ignored(path + "x", "/home", [ignore_rule(path, "/home")])


def test_completed() -> None:
    """A manifest of each source, without errors, and exit status 0 are whole backups."""
    end = read(*BOTH)
    assert (end.outcome, end.reason) == (Outcome.COMPLETED, None)
    assert end.backups[0] == Backup(
        *(("/home",), Outcome.COMPLETED),
        backup_id="id/home",
        bytes_processed=6,
        files_processed=2,
    )


def test_canceled() -> None:
    """A backup that a signal cut short is not whole, although the exit status is 0."""
    end = read(manifest("/home", incomplete="canceled"), manifest("/srv"))
    assert end.outcome is Outcome.FAILED
    assert "canceled" in (end.reason or "")
    assert [b.outcome for b in end.backups] == [Outcome.FAILED, Outcome.COMPLETED]


def test_partial() -> None:
    """A file that was not read makes its source partial, and only that."""
    bad = manifest("/home", numFailed=1, errors=[{"path": "f", "error": "denied"}])
    end = read(bad, manifest("/srv"), status=1)
    assert end.outcome is Outcome.PARTIAL
    assert end.reason == "/home: 1 file could not be read: f: denied"
    assert [b.outcome for b in end.backups] == [Outcome.PARTIAL, Outcome.COMPLETED]


def test_ignored_errors() -> None:
    """Errors that a policy ignores make the backup partial, although the exit status is 0."""
    end = read(manifest("/home", numIgnoredErrors=2), manifest("/srv"))
    assert end.outcome is Outcome.PARTIAL


def test_missing_manifest() -> None:
    """A source without a manifest is not backed up."""
    end = read(BOTH[0], status=1, text=["upload error: unsupported source"])
    assert end.outcome is Outcome.FAILED
    assert end.reason == "upload error: unsupported source (exit status 1)"


def test_unknown_summary() -> None:
    """A manifest that does not count the failures proves nothing."""
    lacking = json.dumps({"id": "x", "source": {"path": "/home"}, "rootEntry": {"summ": {}}})
    assert read(lacking, BOTH[1]).outcome is Outcome.FAILED


@pytest.mark.parametrize("status", [1, 2, 42, -9, None])
def test_unexplained_status(status: int | None) -> None:
    """Whole manifests do not count if the exit status says that something else failed."""
    end = read(*BOTH, status=status)
    assert end.outcome is Outcome.FAILED
    assert {b.outcome for b in end.backups} == {Outcome.FAILED}


def test_flush_error() -> None:
    """Manifests that were printed but perhaps not stored do not count."""
    bad = manifest("/home", numFailed=1)
    end = read(bad, BOTH[1], status=1, text=["flush error: connection reset by peer"])
    assert end.outcome is Outcome.FAILED
    assert end.retriable


def test_maintenance_failed() -> None:
    """The backups are stored before kopia's maintenance: its failure is told, not theirs."""
    end = read(*BOTH, status=1, text=["running auto-maintenance: cannot"])
    assert end.outcome is Outcome.PARTIAL
    assert {b.outcome for b in end.backups} == {Outcome.COMPLETED}


def test_unchanged() -> None:
    """A policy may drop a backup that equals the one before; unread files are not forgotten."""
    said = ["Snapshotting root@vm:/home ...", " Not saving snapshot because no files have been"]
    text = [said[0], f"{said[1]} changed since previous snapshot"]
    assert read(BOTH[1], text=text).outcome is Outcome.COMPLETED
    error = '\r ! Error when processing "f": unable to open file'
    assert read(BOTH[1], text=[text[0], error, text[1]]).outcome is Outcome.PARTIAL


@pytest.mark.parametrize(("status", "retriable"), [(-9, True), (137, True), (-15, False)])
def test_retriable_kill(status: int, retriable: bool) -> None:
    """A SIGKILL says nothing of the backup; a stop says that it is not wanted."""
    assert read(status=status).retriable is retriable


@pytest.mark.parametrize(
    ("line", "retriable"),
    [
        ("cannot open storage: cannot access storage path: stat /x: no such file", True),
        ("dial tcp: lookup host: no such host", True),
        ("unable to create format manager: invalid repository password", False),
        ("unknown long flag '--nope', try --help", False),
    ],
)
def test_retriable(line: str, retriable: bool) -> None:
    """The moment is kept for trouble that may pass, not for what the user has to change."""
    assert read(status=1, text=[line]).retriable is retriable


def test_progress() -> None:
    """Progress is read loosely from the text; the last piece of a line counts."""
    reader = Kopia().reader(HOME)
    reader.stderr(" | 1 hashing, 0 hashed (3 B), 0 cached (0 B), uploaded 0 B, estimating...")
    assert reader.progress == Progress(bytes_done=3, files_done=0)
    reader.stderr(
        "\r / 2 hashing, 3 hashed (1 GB), 1 cached (500 MB), uploaded 264 MB (1 fatal errors), "
        "estimated 1.3 GB (35.9%) 1m8s left"
    )
    assert reader.progress.percent == 35.9
    assert reader.progress.bytes_done == 1_500_000_000
    assert reader.progress.bytes_total == 1_300_000_000
    assert reader.progress.files_done == 4
    assert reader.progress.eta_s == 68


def test_restore_command() -> None:
    """The command restores from the same repository, each path of a set at a place of its own."""
    backup = Backup(("/srv/home",), Outcome.COMPLETED, backup_id="k1")
    given = settings("--config-file=/c/k.config", command=("sudo", "kopia"))
    assert Kopia().restore_command(given, Facts("0.23.1", None), backup, "/to") == (
        *("sudo", "kopia", "snapshot", "restore", "k1", "/to/srv/home"),
        "--config-file=/c/k.config",
    )
    unchanged = Backup(("/home",), Outcome.COMPLETED)
    assert "/home" in Kopia().restore_command(given, Facts("0.23.1", None), unchanged, "/to")


def test_nothing_to_mend() -> None:
    """kopia leaves no locks, and finds what a killed one uploaded by itself."""
    assert Kopia().after_loss(settings(), FACTS) == ()


def test_utc() -> None:
    """The time is given in UTC whatever zone it comes in."""
    moment = Moment(("/home",), "", datetime(2026, 1, 1, 0, 0, 5, tzinfo=UTC))
    assert (
        "--start-time=2026-01-01 00:00:05 UTC"
        in (Kopia().launch(settings(), FACTS, moment).commands[0])
    )


@pytest.mark.parametrize(
    ("said", "is_list"),
    [
        ("", False),
        ("see the log", False),
        ("[", False),
        ("[\n]", True),
        ("wrapped\n[]\ndone", True),
    ],
)
def test_list_of_policies(tmp_path: Path, said: str, is_list: bool) -> None:
    """Only a list, be it an empty one, tells what policies there are."""
    script, words = tmp_path / "kopia", tmp_path / "words"
    words.write_text(said)
    script.write_text(f'#!/bin/sh\n[ "$2" = show ] && echo "{{}}" || exec cat {words}\n')
    script.chmod(0o755)
    given = replace(settings(command=(str(script),), PATH="/usr/bin:/bin"), cwd="/")
    if is_list:
        Kopia().check(given, ("/home",), ())
    else:
        with pytest.raises(UserError, match="printed of its policies is no list"):
            Kopia().check(given, ("/home",), ())


@pytest.mark.parametrize("variable", ["", "photos.config", "./photos.config"])
def test_chosen_where_it_is_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """kopia is chosen by the file that it reads: a name alone is one of its own folder."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path if "/" in variable else tmp_path / ".config" / "kopia"
    place.mkdir(parents=True, exist_ok=True)
    env = {"HOME": str(tmp_path), "KOPIA_CONFIG_PATH": variable}
    with pytest.raises(UserError, match="no backup client was named"):
        preparing.choose_client("", (), env)
    (place / (variable or "repository.config")).write_text("{}")
    assert preparing.choose_client("", (), env) == "kopia"
    if not variable:  # kopia finds none without a home, also root's
        with pytest.raises(UserError, match="no backup client was named"):
            preparing.choose_client("", (), {})

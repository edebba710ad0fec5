"""What restic is told, and what its answers mean; the real programs are in tests/contract."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from atomtx.clients import Backup, End, Facts, Moment, Settings, load, restic
from atomtx.clients.program import local_time
from atomtx.clients.restic import Restic, escaped
from atomtx.errors import ClientError, UserError
from atomtx.states import Outcome

AT = datetime(2026, 7, 1, 10, 0, 0, tzinfo=UTC)
HOME = Moment(targets=("/home", "/srv"), root="", at=AT)
SUMMARY = {"message_type": "summary", "snapshot_id": "ab12", "data_added": 7}
NEW = Facts("0.19.1", "id")
OLD = Facts("0.14.0", "id")


def settings(*extra: str, **env: str) -> Settings:
    return Settings((), extra, {"TZ": "UTC", **env}, "/work")


def words(*extra: str, moment: Moment = HOME, facts: Facts = NEW, **env: str) -> tuple[str, ...]:
    """Return the one command that restic is started with."""
    (argv,) = Restic().launch(settings(*extra, **env), facts, moment).commands
    return argv


def read(
    *lines: object, status: int | None = 0, text: Iterable[str] = (), moment: Moment = HOME
) -> End:
    """Return how the reader judges these lines."""
    reader = Restic().reader(moment)
    for line in lines:
        reader.stdout(json.dumps(line))
    for line in text:
        reader.stderr(line)
    if status is not None:
        reader.end_command(0, status)
    return reader.end()


def test_load() -> None:
    """The client is found by its name."""
    assert isinstance(load("restic"), Restic)


def test_launch() -> None:
    """The backup has the snapshots' time, the user's options, and absolute targets last."""
    launch = Restic().launch(settings("--tag", "a"), NEW, HOME)
    assert launch.commands == (
        (
            *("restic", "backup", "--json", "--time=2026-07-01 10:00:00", "--retry-lock=10m"),
            *("--tag=a", "--", "/home", "/srv"),
        ),
    )
    assert launch.cwd == "/work"
    assert launch.env == {
        "RESTIC_PROGRESS_FPS": "1",
        "RESTIC_FEATURES": "device-id-for-hardlinks",
    }


@pytest.mark.parametrize("version", ["0.14.0", "0.16.5", "0.17.0"])
def test_host_of_the_environment(version: str) -> None:
    """A backup bears the host by which its retention looks for it, where restic is too old."""
    given = replace(settings(), env={"RESTIC_HOST": "web1"})
    ((*argv,),) = Restic().launch(given, Facts(version, None), HOME).commands
    assert ("--host=web1" in argv) == (version < "0.17")
    named = replace(settings("--host", "db"), env={"RESTIC_HOST": "web1"})
    ((*argv,),) = Restic().launch(named, Facts(version, None), HOME).commands
    assert [word for word in argv if "host" in word] == ["--host=db"]


def test_old_version() -> None:
    """A version gets only the options that it has."""
    moment = Moment(("/home",), "/tree", AT)
    assert words(facts=OLD, moment=moment) == (
        *("restic", "backup", "--json", "--time=2026-07-01 10:00:00", "--", "home"),
    )


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("0.16.5", "", None),
        ("0.17.0", "", "device-id-for-hardlinks"),
        ("0.19.1", "s3-restore", "s3-restore,device-id-for-hardlinks"),
        ("0.19.1", "device-id-for-hardlinks=false", None),
        ("0.20.0", "", None),
    ],
)
def test_features(version: str, given: str, expected: str | None) -> None:
    """The feature is asked for only where it is known: an unknown one is a fatal error."""
    launch = Restic().launch(settings(RESTIC_FEATURES=given), Facts(version, "id"), HOME)
    assert launch.env.get("RESTIC_FEATURES") == expected


def test_tree() -> None:
    """A tree is backed up by relative arguments, so that its paths are the live ones."""
    moment = Moment(("/usr/home", "/srv"), "/tree", AT, excludes=("/srv/a*",))
    launch = Restic().launch(settings(), NEW, moment)
    assert launch.cwd == "/tree"
    assert launch.commands[0][4:] == (
        *("--retry-lock=10m", "--exclude=/tree/srv/a\\*"),
        *("--", "usr/home", "srv"),
    )


def test_whole_tree() -> None:
    """The root itself is one absolute argument, as restomic gives it: its history goes on."""
    moment = Moment(("/usr/home", "/srv"), "/restic", AT, whole=True)
    assert words(moment=moment)[-2:] == ("--", "/restic")
    assert moment.sources == ("/restic",)


@pytest.mark.parametrize("given", [("wrap",), ("wrap", "backup")])
def test_verb_of_a_wrapper(given: tuple[str, ...]) -> None:
    """The verb that restomic wants at the end of a wrapper is not given twice."""
    launch = Restic().launch(replace(settings(), command=given), NEW, HOME)
    assert launch.commands[0][:3] == ("wrap", "backup", "--json")


def test_tree_of_root() -> None:
    """The target / is the tree's root itself."""
    assert words(moment=Moment(("/",), "/tree", AT))[-2:] == ("--", ".")
    assert words(moment=Moment(("/",), "", AT))[-2:] == ("--", "/")


def test_tree_keeps_relative_files() -> None:
    """Files that the user named relatively are still found when restic runs in the tree."""
    files = ("-r", "repo", "--password-file", "pw", "--exclude-file=/abs")
    given = settings(*files, RESTIC_REPOSITORY="sftp:host:/srv", RESTIC_CACERT="ca.pem")
    given = replace(given, command=("./wrapper",))
    launch = Restic().launch(given, NEW, Moment(("/home",), "/tree", AT))
    argv = launch.commands[0]
    assert argv[0] == "/work/wrapper"
    assert {"--repo=/work/repo", "--password-file=/work/pw", "--exclude-file=/abs"} <= set(argv)
    assert launch.env["RESTIC_CACERT"] == "/work/ca.pem"
    assert "RESTIC_REPOSITORY" not in launch.env


@pytest.mark.parametrize(
    ("extra", "absent"),
    [
        (("--parent", "1234"), "--parent=ab12"),
        (("-f",), "--parent=ab12"),
        (("--retry-lock=1h",), "--retry-lock=10m"),
        (("--json",), "--json=true"),
    ],
)
def test_user_decides(monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], absent: str) -> None:
    """What the user says about parent or locks replaces our own."""
    monkeypatch.setattr(restic, "_is_saved", lambda *_: True)
    argv = words(*extra, moment=Moment(("/home",), "", AT, parent="ab12"))
    assert absent not in argv
    assert argv.count("--json") == 1


@pytest.mark.parametrize("there", [True, False])
def test_parent(tmp_path: Path, *, there: bool) -> None:
    """A known parent is named, a clock that was put back would hide it; not one that is gone."""
    program = tmp_path / "restic"
    program.write_text(f'#!/bin/sh\n[ "$*" = "cat snapshot ab12 --no-lock" ] && {there}\n'.lower())
    program.chmod(0o755)
    given = replace(settings(), command=(str(program),), cwd="/")
    (argv,) = Restic().launch(given, NEW, Moment(("/home",), "", AT, parent="ab12")).commands
    assert ("--parent=ab12" in argv) == there


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("-x",), "empty directories"),
        (("-vx",), "empty directories"),
        (("--one-file-system",), "empty directories"),
        (("-n",), "nothing would be saved"),
        (("--stdin",), "not a stream"),
        (("--stdin-from-command", "--", "ls"), "not a stream"),
        (("--files-from", "list"), "itself names"),
        (("--time=now",), "time of its snapshots"),
        (("/etc",), "itself names"),
        (("--", "/etc"), "itself names"),
        (("--exclude",), "needs a value"),
        (("-r", "rest:http://u:sesame@h/"), "carries a secret"),
    ],
)
def test_refused(extra: tuple[str, ...], reason: str) -> None:
    """An option that would break a promise is refused with the reason, before anything runs."""
    with pytest.raises(UserError, match=reason):
        words(*extra)


def test_short_options() -> None:
    """Options are read as restic reads them: joined, with a value behind, or after an =."""
    argv = words("-vr", "/a b", "-e=x", "-ey", "-qH", "host")
    assert argv[5:-3] == (
        *("--verbose", "--repo=/a b", "--exclude=x", "--exclude=y", "--quiet", "--host=host"),
    )


@pytest.mark.parametrize("path", ["/a*", "/a?b", "/[x]", "/back\\slash"])
def test_escaped(path: str) -> None:
    """A path with the characters of a pattern is excluded as itself."""
    assert escaped(path).replace("\\", "") == path.replace("\\", "")
    assert escaped(path).count("\\") >= 1


@pytest.mark.parametrize(
    ("at", "zone", "expected"),
    [
        ((2026, 7, 1, 10), "Europe/Berlin", ("2026-07-01 12:00:00", {})),
        ((2026, 7, 1, 10), ":Europe/Berlin", ("2026-07-01 12:00:00", {})),
        ((2026, 7, 1, 10), "", ("2026-07-01 10:00:00", {})),
        ((2026, 10, 25, 0), "Europe/Berlin", ("2026-10-25 00:00:00", {"TZ": "UTC"})),
        ((2026, 10, 25, 1), "Europe/Berlin", ("2026-10-25 01:00:00", {"TZ": "UTC"})),
        ((2026, 10, 25, 2), "Europe/Berlin", ("2026-10-25 03:00:00", {})),
        ((2026, 3, 29, 1), "Europe/Berlin", ("2026-03-29 03:00:00", {})),
        ((2026, 7, 1, 10), "No/Such", ("2026-07-01 10:00:00", {"TZ": "UTC"})),
    ],
)
def test_local_time(
    at: tuple[int, int, int, int], zone: str, expected: tuple[str, dict[str, str]]
) -> None:
    """The time is given in the local zone where it is unique there, and else in UTC."""
    assert local_time(datetime(*at, tzinfo=UTC), {"TZ": zone}) == expected


def test_stored_paths() -> None:
    """Of a tree the repository has the paths below its root; no slash at an end."""
    assert Restic().stored_paths(HOME) == ("/home", "/srv")
    assert Restic().stored_paths(Moment(("/", "/srv"), "/tree", AT)) == ("/tree", "/tree/srv")
    assert Restic().stored_paths(Moment(("/",), "", AT)) == ("/",)
    assert Restic().stored_paths(Moment(("/srv",), "/tree", AT, whole=True)) == ("/tree",)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (("--keep-daily",), "has no value"),
        (("--keep-daily", "--prune"), "has no value"),
        (("--keep-latest", "3"), "is no rule of retention for restic"),
        (("--keep-last", "0", "--keep-daily=0"), "refuses rules of retention that keep nothing"),
        (("latest",), "is no rule"),
        (("--host=x",), "is no rule"),
        (("--keep-daily=7", "4f3c1d2e"), "is no rule"),
        (("--keep-daily 7",), 'write it as two words: "--keep-daily", "7"'),
        (("--keep-tag=a b", "latest now"), "latest now is no rule"),
    ],
)
def test_wrong_policy(rules: tuple[str, ...], said: str) -> None:
    """A bare word would be the name of a backup to forget: nothing but rules is taken."""
    with pytest.raises(UserError, match=said):
        Restic().policy(rules)


GROUP = {"host": "h", "paths": ["/home"], "remove": [{"id": "ab"}, {"id": "cd"}]}
FORGOTTEN = json.dumps([GROUP | {"host": "other"}, GROUP | {"paths": ["/home", "/srv"]}, GROUP])


def forgetting(
    folder: Path, said: str, *extra: str, version: str = "0.12.1"
) -> tuple[tuple[str, ...], ...]:
    """Return what is to be started where restic, or its wrapper, prints this."""
    (folder / "said").write_text(said)
    wrapper = folder / "wrapper"
    wrapper.write_text(f"#!/bin/sh\ncat {folder}/said\n")
    wrapper.chmod(0o755)
    made = Settings((str(wrapper),), extra, {"RESTIC_HOST": "h"}, "/")
    return Restic().forgetting(made, Facts(version, None), ("/home",), ("--keep-last=1",))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("[2026-01-01 03:00] restic forget\n", ""),
        ("[2026]\n[] [{debug}] forget --dry-run\n", "[done]\n"),
        ("", '\n{"ended": ["at", 3]}\n'),
    ],
)
def test_forgetting_of_a_wrapper(before: str, after: str, tmp_path: Path) -> None:
    """What a wrapper prints around restic's answer is not read: the group's backups go."""
    (argv,) = forgetting(tmp_path, f"{before}{FORGOTTEN}\n{after}")
    assert argv[1:] == ("forget", "--prune", "ab", "cd")


@pytest.mark.parametrize(
    ("version", "extra", "options"),
    [
        ("0.16.0", (), ("--retry-lock=10m",)),
        ("0.15.2", (), ()),  # which does not know it
        ("0.19.0", ("--retry-lock", "1h", "--tag", "x"), ("--retry-lock=1h",)),
    ],
)
def test_forgetting_waits(
    version: str, extra: tuple[str, ...], options: tuple[str, ...], tmp_path: Path
) -> None:
    """Another's lock is waited for as by a backup: forgetting needs the repository for itself."""
    (argv,) = forgetting(tmp_path, FORGOTTEN, *extra, version=version)
    assert argv[1:] == ("forget", "--prune", *options, "ab", "cd")


@pytest.mark.parametrize("said", ["", "null\n", "[2026-01-01 03:00] restic forget\n", "[]"])
def test_nothing_to_forget(said: str, tmp_path: Path) -> None:
    """Without a group there is nothing to start."""
    assert forgetting(tmp_path, said) == ()


@pytest.mark.parametrize(
    "said",
    [
        FORGOTTEN[:-1],
        '[{"host": "h", "paths": ["/ho',
        json.dumps([GROUP, 5]),
        json.dumps([{"level": "info"}]),
        json.dumps([GROUP | {"remove": ["ab"]}]),
    ],
)
def test_unreadable_forgetting(said: str, tmp_path: Path) -> None:
    """An answer that is none of restic's is the client's error: nothing is forgotten by it."""
    with pytest.raises(ClientError, match="no list of groups"):
        forgetting(tmp_path, said)


def test_live_paths() -> None:
    """Cache, local repository, folder for temporary files and agent must be the live ones."""
    env = {"HOME": "/root", "TMPDIR": "/var/tmp", "SSH_AUTH_SOCK": "/run/a/sock"}
    live = Restic().live_paths(settings(RESTIC_REPOSITORY="local:repo", **env))
    assert live == ("/root/.cache/restic", "/work/repo", "/var/tmp")
    live = Restic().live_paths(settings("-r", "sftp:h:/srv", XDG_CACHE_HOME="/c", **env))
    assert live == ("/c/restic", "/var/tmp", "/run/a/sock")


def test_live_paths_named(tmp_path: Path) -> None:
    """The user's own cache and a repository named in a file are found; no cache, no path."""
    (tmp_path / "where").write_text("/srv/repo\n")
    given = settings("--repository-file", "where", "--cache-dir=c")
    live = Restic().live_paths(replace(given, cwd=str(tmp_path)))
    assert live == (str(tmp_path / "c"), "/srv/repo")
    assert Restic().live_paths(settings("--no-cache", RESTIC_REPOSITORY="s3:host/b")) == ()


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("0.14.0", ()),
        ("0.17.3", ("--sparse",)),
        ("0.18.0", ("--sparse", "--exclude-xattr=trusted.SGI_ACL_*")),
    ],
)
def test_restore_command(version: str, options: tuple[str, ...]) -> None:
    """The command restores from the same repository, with what that version needs."""
    backup = Backup(("/home",), Outcome.COMPLETED, backup_id="ab12")
    given = replace(settings("-r", "/repo", "--tag", "a"), command=("sudo", "restic"))
    assert Restic().restore_command(given, Facts(version, None), backup, "/to") == (
        *("sudo", "restic", "restore", "ab12", "--target", "/to", *options, "--repo=/repo"),
    )


@pytest.mark.parametrize(
    ("extra", "env", "host"),
    [((), {}, os.uname().nodename), ((), {"RESTIC_HOST": "b"}, "b"), (("-Hc",), {}, "c")],
)
@pytest.mark.parametrize(
    ("paths", "below", "stored"),
    [
        (("/a", "/b"), "", ("/a", "/b")),
        (("/a",), "/tree", ("/tree/a",)),
        (("/",), "", ("/",)),
        (("/",), "/t/", ("/t",)),
    ],
)
def test_restore_unchanged(
    extra: tuple[str, ...],
    env: dict[str, str],
    host: str,
    paths: tuple[str, ...],
    below: str,
    stored: tuple[str, ...],
) -> None:
    """What --skip-if-unchanged left out is the latest of these paths by this host, no other's."""
    given = replace(settings(*extra, **env), below=below)
    backup = Backup(paths, Outcome.COMPLETED)
    words = Restic().restore_command(given, Facts("0.14.0", None), backup, "/to")
    filters = (f"--host={host}", *(f"--path={path}" for path in stored))
    assert words == ("restic", "restore", "latest", "--target", "/to", *filters)


def test_completed() -> None:
    """A summary with a snapshot and exit status 0 is a whole backup."""
    end = read({**SUMMARY, "total_bytes_processed": 9, "data_added_packed": 5})
    assert end == End(
        Outcome.COMPLETED,
        backups=(
            Backup(
                ("/home", "/srv"),
                Outcome.COMPLETED,
                backup_id="ab12",
                bytes_added=5,
                bytes_processed=9,
            ),
        ),
    )


def test_unchanged() -> None:
    """A summary without the field (--skip-if-unchanged) is whole; with an empty id it is not."""
    assert read({"message_type": "summary"}).outcome is Outcome.COMPLETED
    assert read({**SUMMARY, "snapshot_id": ""}).outcome is Outcome.FAILED


@pytest.mark.parametrize("status", [1, 2, 10, 11, 12, 130, 42, -9, None])
def test_failed_status(status: int | None) -> None:
    """An exit status that is not documented to mean success is failure, summary or not."""
    assert read(SUMMARY, status=status).outcome is Outcome.FAILED


def test_nothing_said() -> None:
    """Exit status 0 or 3 without a summary is failure: a wrapper may have hidden the real one."""
    assert read(status=0).outcome is Outcome.FAILED
    assert read(status=3).outcome is Outcome.FAILED
    assert read({**SUMMARY, "dry_run": True}).outcome is Outcome.FAILED


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/srv does not exist, skipping", "/srv does not exist"),
        (
            '{"message_type":"error","error":{"Op":"open","Path":"/a","Err":13},"item":"/a"}',
            "1 file could not be read: /a: open: Permission denied",
        ),
        (
            '{"message_type":"error","error":{"message":"open /a: denied"},"item":"/a"}',
            "1 file could not be read: /a: open /a: denied",
        ),
    ],
)
def test_partial(status: int, line: str, reason: str) -> None:
    """A file or target that could not be read makes the backup partial, also at status 0."""
    end = read(SUMMARY, status=status, text=[line])
    assert end.outcome is Outcome.PARTIAL
    assert end.reason == reason
    assert end.backups[0].backup_id == "ab12"


def test_partial_counts_once() -> None:
    """A file that the scan and the backup could not read counts once."""
    error = '{"message_type":"error","error":{"message":"m"},"item":"/a","during":"%s"}'
    end = read(SUMMARY, status=3, text=[error % "scan", error % "archival"])
    assert end.reason == "1 file could not be read: /a: m"
    assert "some files" in (read(SUMMARY, status=3).reason or "")


@pytest.mark.parametrize(
    ("status", "line", "retriable"),
    [
        (11, "", True),
        (10, "", True),
        (1, 'Fatal: Head "http://h": dial tcp 127.0.0.1:1: connect: connection refused', True),
        (1, "Fatal: unable to save snapshot: no space left on device", True),
        (1, "Fatal: repository is already locked by PID 1", True),
        (1, "Fatal: wrong password or no key found", False),
        (1, "unknown flag: --nope", False),
        (12, "Fatal: wrong password or no key found", False),
        (-9, "", True),  # by somebody else, such as the kernel for want of memory
        (137, "", True),  # a wrapper's word for the same
        (-15, "", False),  # it was asked to end
    ],
)
def test_retriable(status: int, line: str, retriable: bool) -> None:
    """The moment is kept for trouble that may pass, not for what the user has to change."""
    end = read(status=status, text=[line])
    assert end.outcome is Outcome.FAILED
    assert end.retriable is retriable


def test_reason() -> None:
    """The reason is restic's own last word, with the exit status."""
    exit_error = '{"message_type":"exit_error","code":1,"message":"Fatal: no"}'
    assert read(status=1, text=["text", exit_error, "noise"]).reason == "no (exit status 1)"
    assert read(status=1, text=["Fatal: old", "noise"]).reason == "old (exit status 1)"
    assert read(status=-15).reason == "killed by SIGTERM"


def test_noise() -> None:
    """Lines that are no JSON, or JSON of another kind, do not disturb."""
    reader = Restic().reader(HOME)
    for line in ("", "hello", "{not json", "[1]", '{"message_type":"verbose_status"}', "a\rb"):
        reader.stdout(line)
        reader.stderr(line)
    reader.stdout(json.dumps(SUMMARY))
    reader.end_command(0, 0)
    assert reader.end().outcome is Outcome.COMPLETED


def test_progress() -> None:
    """Progress is read from status lines; the mistyped end of 0.14's scan is none."""
    reader = Restic().reader(HOME)
    status = {"message_type": "status", "percent_done": 0.5, "total_bytes": 10, "bytes_done": 5}
    reader.stdout(json.dumps({**status, "seconds_remaining": 3}))
    reader.stdout('{"message_type":"status","action":"scan_finished","total_files":4}')
    assert reader.progress.percent == 50
    assert reader.progress.bytes_done == 5
    assert reader.progress.eta_s == 3

"""An unknown program is judged by its exit status alone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from atomtx.clients import Facts, Moment, Settings, load
from atomtx.clients.command import Command
from atomtx.errors import UserError
from atomtx.states import Outcome

AT = datetime(2026, 7, 1, tzinfo=UTC)
HOME = Moment(targets=("/home", "/srv"), root="", at=AT)
FACTS = Facts("", None)


def settings(*command: str, extra: tuple[str, ...] = (), **env: str) -> Settings:
    return Settings(command, extra, {"PATH": "/usr/bin:/bin", **env}, "/work")


def test_load() -> None:
    """The client is found by its name."""
    assert isinstance(load("command"), Command)


def test_launch() -> None:
    """The paths are added to the user's words."""
    launch = Command().launch(settings("tar", "-c", extra=("-v",)), FACTS, HOME)
    assert launch.commands == (("tar", "-c", "-v", "/home", "/srv"),)
    assert launch.cwd == "/work"


def test_tree() -> None:
    """In a tree the paths are where the frozen files are; a relative script is still found."""
    launch = Command().launch(settings("./save"), FACTS, Moment(("/", "/srv"), "/tree", AT))
    assert launch.commands == (("/work/save", "/tree/", "/tree/srv"),)
    launch = Command().launch(settings("save"), FACTS, Moment(("/srv",), "/tree", AT, whole=True))
    assert launch.commands == (("save", "/tree"),)


def test_no_command() -> None:
    """Options alone are no command."""
    with pytest.raises(UserError, match="needs a command"):
        Command().launch(settings(extra=("-v",)), FACTS, HOME)


def test_secret() -> None:
    """A secret in the command is refused."""
    with pytest.raises(UserError, match="carries a secret"):
        Command().launch(settings("own", "--password=sesame"), FACTS, HOME)


def test_retention() -> None:
    """What an unknown program keeps cannot be said."""
    with pytest.raises(UserError, match="cannot be told what to keep"):
        Command().policy(("--keep-last", "3"))


def test_inspect() -> None:
    """The program must be there; nothing is known about its repository, and that is said."""
    facts = Command().inspect(settings("sh"))
    assert facts.repository is None
    assert "exit status alone" in facts.notes[0]
    with pytest.raises(UserError, match="no-such-program is not installed"):
        Command().inspect(settings("no-such-program"))


def test_live_paths() -> None:
    """Folders that the known clients' variables name, and the user's cache, stay live."""
    live = Command().live_paths(
        settings(
            "own",
            HOME="/root",
            BORG_REPO="ssh://host/repo",
            RESTIC_REPOSITORY="/srv/repo",
            BORG_CACHE_DIR="cache",
            KOPIA_CONFIG_PATH="/etc/kopia/k.config",
        )
    )
    assert live == ("/work/cache", "/srv/repo", "/etc/kopia", "/root/.cache")


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [
        (0, Outcome.COMPLETED, None),
        (1, Outcome.FAILED, "disk full (exit status 1)"),
        (3, Outcome.FAILED, "disk full (exit status 3)"),
        (-9, Outcome.FAILED, "disk full (killed by SIGKILL)"),
        (None, Outcome.FAILED, "disk full (its end was not seen)"),
    ],
)
def test_end(status: int | None, outcome: Outcome, reason: str | None) -> None:
    """Exit status 0 is success and anything else is failure, with the last line as reason."""
    reader = Command().reader(HOME)
    reader.stdout("{}")
    reader.stderr("50%\rdisk full")
    if status is not None:
        reader.end_command(0, status)
    end = reader.end()
    assert (end.outcome, end.reason, end.retriable) == (outcome, reason, False)
    assert end.backups[0].paths == ("/home", "/srv")


def test_nothing_to_mend() -> None:
    """Nothing is known about what such a program leaves, nor how it restores."""
    given = settings("own")
    end = Command().reader(HOME).end()
    assert Command().after_loss(given, FACTS) == ()
    assert Command().restore_command(given, Facts("", None), end.backups[0], "/to") == ()

"""Which events deserve a notice, what it says, and which settings the environment holds."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.errors import ExitStatus
from atomtx.notices import (
    LINE_CHARS,
    LOG_LINES,
    TIME_LIMIT_S,
    TROUBLE,
    Event,
    Facts,
    Notice,
    NotifySettings,
    combined,
    distinct,
    events_of,
    notice,
    settings_of,
)
from atomtx.redact import Redactor
from atomtx.states import Verb

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
FACTS = Facts(
    host="nas",
    job="tank/home -r",
    at=NOW,
    run="7f3c12ab34cd56ef",
    state="destroyed",
    outcome="completed",
    datasets=("tank/home", "tank/home/ann"),
    last_completed=NOW - timedelta(hours=33),
    log=("scanning", "Fatal: unable to open repository"),
)


def told(**values: Any) -> Notice:
    return notice(replace(FACTS, **values), lambda text: text)


@pytest.mark.parametrize(
    ("values", "expected", "words"),
    [
        ({}, {Event.COMPLETED}, "completed"),
        ({"outcome": "failed", "exit_status": ExitStatus.FAILED}, {Event.FAILED}, "failed"),
        ({"outcome": "partial", "exit_status": ExitStatus.PARTIAL}, {Event.PARTIAL}, "partial"),
        (
            {"outcome": "rolled-back", "exit_status": ExitStatus.SIGTERM},
            {Event.FAILED},
            "rolled back",
        ),
        (
            {"cleanup": "parked", "exit_status": ExitStatus.PARKED, "state": "unmounting"},
            {Event.PARKED},
            "completed, cleanup parked",
        ),
        (
            {"outcome": "failed", "cleanup": "parked", "exit_status": ExitStatus.FAILED},
            {Event.FAILED, Event.PARKED},
            "failed, cleanup parked",
        ),
        (
            {"outcome": None, "state": "snapshotted", "exit_status": ExitStatus.WAITING},
            {Event.WAITING},
            "waiting",
        ),
        (
            {"found_unfinished": True},
            {Event.INTERRUPTED, Event.COMPLETED},
            "found unfinished; completed",
        ),
        (
            # `recover` exits with 0 for a run that it rolled back: nothing is left to do.
            {"found_unfinished": True, "outcome": "rolled-back"},
            {Event.INTERRUPTED, Event.FAILED},
            "found unfinished; rolled back",
        ),
        (
            {"found_unfinished": True, "outcome": None, "exit_status": ExitStatus.WAITING},
            {Event.INTERRUPTED, Event.WAITING},
            "found unfinished; waiting",
        ),
        (
            {"exit_status": ExitStatus.STEP_AFTER_FAILED},
            {Event.FAILED},
            "backed up, but a step after it failed",
        ),
        (
            # Stopped while it cleaned up: the status is the signal's.
            {"exit_status": ExitStatus.SIGTERM, "failed_after": ("the retention",)},
            {Event.FAILED},
            "backed up, but a step after it failed",
        ),
        (
            {"outcome": "rolled-back", "failed_after": ("hook after the run: start app",)},
            {Event.FAILED},
            "rolled back, and a hook failed",
        ),
        (
            {"found_unfinished": True, "outcome": None, "failed_after": ("hook after: start",)},
            {Event.INTERRUPTED, Event.FAILED},
            "found unfinished; kept waiting, and a hook failed",
        ),
        ({"run": None, "outcome": None, "exit_status": ExitStatus.USAGE}, {Event.FAILED}, "failed"),
    ],
)
def test_events(values: dict[str, Any], expected: set[Event], words: str) -> None:
    """Each end of a run is its event, and its subject says it."""
    found = told(**values)
    assert found.events == expected
    assert found.subject == f"atomtx: tank/home -r on nas: {words}"
    assert found.variables["ATOMTX_EVENT"] == next(e for e in Event if e in expected).value


def test_failed_too() -> None:
    """What failed beside the result is named, without secrets."""
    made = notice(
        replace(FACTS, outcome="failed", failed_after=("hook after: start --key sesame",)),
        lambda text: text.replace("sesame", "***"),
    )
    assert "failed too  hook after: start --key ***\n" in made.text


@pytest.mark.parametrize(
    ("verb", "values", "words"),
    [
        (Verb.SNAP, {}, "The snapshots are kept."),
        (Verb.SNAP, {"outcome": "failed", "exit_status": ExitStatus.FAILED}, "No snapshots were"),
        (Verb.SNAP, {"outcome": "partial", "exit_status": ExitStatus.PARTIAL}, "Somebody destroye"),
        (Verb.SNAP, {"exit_status": ExitStatus.STEP_AFTER_FAILED}, "are kept, but a step after it"),
        (Verb.PRUNE, {}, "that were to go are destroyed."),
        (Verb.PRUNE, {"outcome": "partial", "exit_status": ExitStatus.PARTIAL}, "are still there."),
        (Verb.PRUNE, {"outcome": "failed", "exit_status": ExitStatus.FAILED}, "or some of them."),
    ],
)
def test_verbs(verb: Verb, values: dict[str, Any], words: str) -> None:
    """A notice of what is no backup does not say that there is one, or none."""
    text = told(verb=verb, state="kept", **values).text
    assert words in text
    assert "ackup" not in text
    assert "state " not in text


def test_every_outcome() -> None:
    """Promise 7: success is said of a complete backup with nothing left to do, and only of it."""
    for outcome, cleanup, found, status in product(
        (None, "completed", "partial", "failed", "rolled-back"),
        (None, "parked"),
        (False, True),
        ExitStatus,
    ):
        facts = replace(
            FACTS, outcome=outcome, cleanup=cleanup, found_unfinished=found, exit_status=status
        )
        events = events_of(facts)
        made = notice(facts, str)
        assert events, facts
        waits = status in (ExitStatus.WAITING, ExitStatus.STEP_AFTER_FAILED)
        good = outcome == "completed" and cleanup is None and not waits
        assert made.is_success == good
        assert good or events & TROUBLE
        assert good or made.exit_status != 0 or outcome in ("completed", "partial")
        assert all(line in made.text for line in ("tank/home -r", "nas", "7f3c12ab"))


def test_text() -> None:
    """A notice says what failed, on what, since when, the last lines, and what to type."""
    text = told(
        outcome="failed", exit_status=ExitStatus.FAILED, reason="restic ended with status 1"
    ).text
    when = FACTS.last_completed.astimezone() if FACTS.last_completed else None
    assert text == (
        "No backup was made.\n"
        "\n"
        "result      failed: restic ended with status 1\n"
        "job         tank/home -r\n"
        "host        nas\n"
        "datasets    tank/home, tank/home/ann\n"
        "run         7f3c12ab34cd56ef\n"
        f"last backup of {when:%Y-%m-%d %H:%M}, 33 h ago\n"
        "\n"
        "The client's last lines:\n"
        "  scanning\n"
        "  Fatal: unable to open repository\n"
        "\n"
        "Next, as root on nas:\n"
        "  atomtx show 7f3c12ab\n"
    )


@pytest.mark.parametrize(
    ("outcome", "words"), [(None, "No backup was made."), ("completed", "The backup is complete.")]
)
def test_waiting(outcome: str | None, words: str) -> None:
    """A run that waits says whether there is a backup: one may wait with its cleanup alone."""
    lines = told(
        outcome=outcome, cleanup="unfinished", exit_status=ExitStatus.WAITING
    ).text.splitlines()
    assert lines[0] == "An unfinished run waits for something, and cannot be settled yet."
    assert lines[2] == words
    assert "The backup is complete." in lines or outcome is None


def test_waiting_after_a_failed_step() -> None:
    """That it waits stays said where a step after its backup has failed as well."""
    values: dict[str, Any] = {"cleanup": "unfinished", "exit_status": ExitStatus.WAITING}
    lines = told(outcome="completed", failed_after=("hook after: start",), **values)
    assert lines.text.splitlines()[:3] == [
        "An unfinished run waits for something, and cannot be settled yet.",
        "The backup is complete, but a step after it failed.",
        "Something of the run could not be removed from this machine yet.",
    ]


def test_kept_with_a_failed_hook() -> None:
    """Of a run that goes on later it is not known whether there is a backup."""
    text = told(outcome=None, exit_status=ExitStatus.STEP_AFTER_FAILED, failed_after=("up",)).text
    assert text.startswith("The run is kept for `atomtx recover`, and a hook failed.\n")
    assert "No backup was made" not in text


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({"outcome": None, "failed_after": ("hook after: start",)}, "atomtx recover"),
        ({"outcome": "failed", "exit_status": ExitStatus.FAILED}, "atomtx show 7f3c12ab"),
        ({"cleanup": "parked", "exit_status": ExitStatus.PARKED}, "atomtx recover"),
        ({"outcome": None, "exit_status": ExitStatus.WAITING}, "atomtx status"),
        ({"run": None, "outcome": None, "exit_status": ExitStatus.FAILED}, "atomtx doctor"),
    ],
)
def test_next(values: dict[str, Any], first: str) -> None:
    """The command to type fits what happened."""
    lines = told(**values).text.splitlines()
    assert lines[lines.index("Next, as root on nas:") + 1] == f"  {first}"


def test_last_backup() -> None:
    """Never is said where the journal knows of none, nothing where it was not asked."""
    failed = {"outcome": "failed", "last_completed": None}
    assert "last backup never" in told(**failed).text
    assert "last backup" not in told(**failed, is_last_known=False).text
    assert "last backup" not in told().text


def test_redacted() -> None:
    """Promise 11: a secret of the environment is in no part of a notice."""
    env = {
        "RESTIC_PASSWORD": "hunter22",
        "ATOMTX_PING_URL": "https://hc.example/0123-4567",
        "RESTIC_REPOSITORY": "rest:https://ann:pa55@host/",
    }
    dirty = "with hunter22 at https://hc.example/0123-4567 and rest:https://ann:pa55@host/"
    facts = replace(FACTS, job=dirty, reason=dirty, hint=dirty, log=(dirty,), outcome="failed")
    made = notice(facts, Redactor(env).redact)
    for text in (made.subject, made.text, *made.variables.values()):
        assert not any(word in text for word in ("hunter22", "0123-4567", "pa55")), text
    assert "***" in made.text


@given(
    st.builds(
        replace,
        st.just(FACTS),
        job=st.text(),
        reason=st.none() | st.text(),
        hint=st.none() | st.text(),
        outcome=st.sampled_from([None, "failed", "completed"]),
        log=st.lists(st.text(), max_size=30).map(tuple),
        datasets=st.lists(st.text(), max_size=30).map(tuple),
    )
)
def test_any_text(facts: Facts) -> None:
    """Whatever a client prints, a notice is bounded, one line stays one, and none drives mail."""
    made = notice(facts, str)
    assert "\n" not in made.subject
    assert all(char.isprintable() for char in made.subject)
    assert all(c.isprintable() or c == "\n" for c in made.text)
    assert made.text.encode()  # no surrogates
    assert len(made.text) < (LOG_LINES + 20) * (LINE_CHARS * 12)
    assert all("\0" not in value for value in made.variables.values())
    assert sum(line.startswith("  ") for line in made.text.splitlines()) <= LOG_LINES + 4


# -- settings ----------------------------------------------------------------------------------


def test_no_settings() -> None:
    """Nobody is told of anything unless somebody asked for it."""
    assert settings_of({"HOME": "/root"}) == (NotifySettings(), [])
    assert NotifySettings().is_empty


def test_combined() -> None:
    """A job's own settings count, and the general ones where it has none."""
    general = NotifySettings(mail=("root",), command=("tell",), time_limit_s=5)
    own = NotifySettings(mail=("ben",), ping_url_file="/x")
    found = combined(general, own)
    assert found == replace(general, mail=("ben",), ping_url_file="/x")
    assert combined(general, NotifySettings()) == general
    pinged = replace(general, ping_url="https://a", apprise=("a://",))
    own = NotifySettings(ping_url_file="/b", apprise_file="/c")
    found = combined(pinged, own)
    assert (found.ping_url, found.ping_url_file) == ("", "/b")
    assert (found.apprise, found.apprise_file) == ((), "/c")


def test_combined_said() -> None:
    """What a job says counts against the general settings even where it is the usual."""
    general = NotifySettings(mail=("root",), on=frozenset({Event.COMPLETED}), time_limit_s=5)
    found = combined(general, NotifySettings(on=TROUBLE, time_limit_s=TIME_LIMIT_S))
    assert (found.events, found.limit_s) == (TROUBLE, TIME_LIMIT_S)
    assert (NotifySettings().events, NotifySettings().limit_s) == (TROUBLE, TIME_LIMIT_S)


def test_distinct() -> None:
    """Of what concerns no job alone everybody is told once, whoever else is told with them."""
    one = NotifySettings(mail=("root",), ping_url_file="/a")
    two = NotifySettings(mail=("root",), ping_url_file="/b", command=("tell",))
    found = distinct([one, two, one])
    assert found == [one, replace(two, mail=()), NotifySettings()]
    other = replace(one, on=frozenset({Event.COMPLETED}))
    assert distinct([other, one])[1].mail == ("root",)  # who wants other events is told of them


def test_settings() -> None:
    """Every variable is read."""
    made, problems = settings_of(
        {
            "ATOMTX_NOTIFY_ON": "failed, completed",
            "ATOMTX_NOTIFY_COMMAND": "ntfy send 'two words'",
            "ATOMTX_NOTIFY_MAIL": "root, ann@example.org",
            "ATOMTX_NOTIFY_MAIL_FROM": "nas@example.org",
            "ATOMTX_SENDMAIL": "/opt/msmtp",
            "ATOMTX_PING_URL": "https://hc.example/x",
            "ATOMTX_PING_URL_FILE": "/run/ping",
            "ATOMTX_PING_EXIT_STATUS": "1",
            "ATOMTX_NOTIFY_APPRISE": "json://a json://b",
            "ATOMTX_NOTIFY_APPRISE_FILE": "/run/apprise",
            "ATOMTX_NOTIFY_TIME_LIMIT": "1m",
        }
    )
    assert problems == []
    assert made == NotifySettings(
        on=frozenset({Event.FAILED, Event.COMPLETED}),
        command=("ntfy", "send", "two words"),
        mail=("root", "ann@example.org"),
        mail_from="nas@example.org",
        sendmail="/opt/msmtp",
        ping_url="https://hc.example/x",
        ping_url_file="/run/ping",
        ping_exit_status=True,
        apprise=("json://a", "json://b"),
        apprise_file="/run/apprise",
        time_limit_s=60.0,
    )
    assert not made.is_empty
    assert "hc.example" not in repr(made)
    assert "json://" not in repr(made)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("ATOMTX_NOTIFY_ON", "failed,exploded", {"on": frozenset({Event.FAILED})}),
        ("ATOMTX_NOTIFY_ON", "exploded", {}),
        ("ATOMTX_NOTIFY_COMMAND", "unclosed 'quote", {}),
        ("ATOMTX_NOTIFY_MAIL", "ann@example.org -oQ/tmp;x", {"mail": ("ann@example.org",)}),
        ("ATOMTX_NOTIFY_MAIL", "änn@example.org", {}),
        ("ATOMTX_NOTIFY_MAIL_FROM", "Backup nas", {}),
        ("ATOMTX_NOTIFY_MAIL_FROM", "ann@example.org\nBcc: eve@example.org", {}),
        ("ATOMTX_NOTIFY_MAIL_FROM", "a\nb <ann@example.org>", {}),
        ("ATOMTX_NOTIFY_MAIL_FROM", "a, b <ann@example.org>", {}),
        ("ATOMTX_NOTIFY_MAIL_FROM", '"a, b" c" <ann@example.org>', {}),
        ("ATOMTX_NOTIFY_TIME_LIMIT", "soon", {}),
    ],
)
def test_wrong_settings(name: str, value: str, kept: dict[str, Any]) -> None:
    """What is wrong is named by its variable and left out; it does not stop a backup."""
    made, problems = settings_of({name: value})
    assert made == NotifySettings(**kept)
    (problem,) = problems
    assert name in problem


@pytest.mark.parametrize(
    "sender",
    [
        "root",
        "nas@example.org",
        "Bäckup of nas <nas@example.org>",
        '"Backup, \\"nas\\"" <nas@example.org>',
    ],
)
def test_sender(sender: str) -> None:
    """A sender is an address, alone or after a name."""
    made, problems = settings_of({"ATOMTX_NOTIFY_MAIL_FROM": sender})
    assert (made.mail_from, problems) == (sender, [])

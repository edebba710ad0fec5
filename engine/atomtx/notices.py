"""
Which events of a run deserve a notice, and what it says.  Pure.

A notice tells what failed, on what, and the next command to type; all of it redacted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from enum import StrEnum

from .errors import ExitStatus, UserError
from .states import FINAL, Outcome, Verb
from .words import age, local_time, printable, seconds

LOG_LINES = 20
LINE_CHARS = 500
_DATASETS = 10
_SPECIALS = frozenset('()<>[]:;@\\,"')  # RFC 5322, section 3.2.3
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')  # section 3.2.4
_ADDRESS = re.compile(r"[A-Za-z0-9._%+=/~-]+(@[A-Za-z0-9.-]+|@\[[0-9A-Fa-f.:]+\])?")


class Event(StrEnum):
    """What may have happened to a run, from the gravest on."""

    WAITING = "waiting"  # it cannot be settled yet
    FAILED = "failed"  # no backup was made, or a step after it failed
    PARTIAL = "partial"
    INTERRUPTED = "interrupted"  # it was found so
    PARKED = "parked"  # something could not be removed yet
    COMPLETED = "completed"


TROUBLE = frozenset(Event) - {Event.COMPLETED}
TIME_LIMIT_S = 30.0


@dataclass(frozen=True)
class NotifySettings:
    """Who is told of what; the URLs are secrets in effect, and their files hold one a line."""

    on: frozenset[Event] = frozenset()  # for all but pings; none: TROUBLE
    command: tuple[str, ...] = ()
    mail: tuple[str, ...] = ()  # addresses
    mail_from: str = "root"  # to which the machine's mailer adds its domain
    sendmail: str = ""  # the program; where it usually is by default
    ping_url: str = field(default="", repr=False)
    ping_url_file: str = ""
    ping_exit_status: bool = False  # .../<exit status> in place of .../fail
    apprise: tuple[str, ...] = field(default=(), repr=False)
    apprise_file: str = ""
    time_limit_s: float = 0.0  # 0: TIME_LIMIT_S

    @property
    def has_ping(self) -> bool:
        return bool(self.ping_url or self.ping_url_file)

    @property
    def events(self) -> frozenset[Event]:
        """Return what all but pings are told of."""
        return self.on or TROUBLE

    @property
    def limit_s(self) -> float:
        """Return how long all of telling may take."""
        return self.time_limit_s or TIME_LIMIT_S

    @property
    def is_empty(self) -> bool:
        """Tell whether nobody is to be told of anything."""
        others = (self.command, self.mail, self.apprise, self.apprise_file)
        return not (self.has_ping or any(others))


@dataclass(frozen=True)
class Facts:
    """What is known of a run when there may be something to tell."""

    host: str
    job: str  # its label
    at: datetime
    verb: Verb = Verb.BACKUP
    exit_status: ExitStatus = ExitStatus.COMPLETED
    run: str | None = None  # None where it never began
    state: str | None = None
    outcome: str | None = None
    cleanup: str | None = None
    reason: str | None = None
    hint: str | None = None
    found_unfinished: bool = False  # by `recover`, or by the next `backup` of its job
    datasets: tuple[str, ...] = ()
    not_a_moment: tuple[str, ...] = ()  # what of it is read live
    last_completed: datetime | None = None  # the moment
    is_last_known: bool = True
    log: tuple[str, ...] = ()
    failed_after: tuple[str, ...] = ()  # hooks and other steps, in words, whatever the result is
    pings: bool = True  # False where another notice of the same command does


@dataclass(frozen=True)
class Notice:
    """What is told, to whomever."""

    events: frozenset[Event]
    subject: str
    text: str
    exit_status: int
    variables: Mapping[str, str]
    pings: bool

    @property
    def is_success(self) -> bool:
        """Tell whether the backup is complete and nothing is left to do."""
        return Event.COMPLETED in self.events


def events_of(facts: Facts) -> frozenset[Event]:
    """Return everything that happened."""
    found = {Event.INTERRUPTED} if facts.found_unfinished else set()
    if facts.cleanup is not None:
        found.add(Event.PARKED)
    found |= _of_result(facts)
    return frozenset(found)


def _of_result(facts: Facts) -> set[Event]:
    """Return what the result alone says."""
    if facts.exit_status == ExitStatus.WAITING:
        return {Event.WAITING}
    if _has_only_failed_after(facts):
        return {Event.FAILED}
    match facts.outcome:
        case Outcome.COMPLETED:
            return {Event.COMPLETED} if facts.cleanup is None else set()
        case Outcome.PARTIAL:
            return {Event.PARTIAL}
        case _:
            return {Event.FAILED}


def notice(facts: Facts, redact: Callable[[str], str]) -> Notice:
    """Return what is told of *facts*; *redact* takes secrets out of a text."""
    facts = _redacted(facts, redact)
    subject = _line(f"atomtx: {facts.job} on {facts.host}: {_words(facts)}")
    return Notice(
        events=events_of(facts),
        subject=subject,
        text="\n".join(_text(facts)) + "\n",
        exit_status=_exit_status(facts),
        variables=_variables(facts, subject),
        pings=facts.pings,
    )


def _exit_status(facts: Facts) -> int:
    """Return the exit status; never 0 where there is no backup, as of a run rolled back."""
    done = facts.outcome in (Outcome.COMPLETED, Outcome.PARTIAL)
    return int(facts.exit_status or (ExitStatus.COMPLETED if done else ExitStatus.FAILED))


def _redacted(facts: Facts, redact: Callable[[str], str]) -> Facts:
    def clean(text: str | None) -> str | None:
        return None if text is None else _line(redact(text))

    return replace(
        facts,
        job=_line(redact(facts.job)),
        reason=clean(facts.reason),
        hint=clean(facts.hint),
        datasets=tuple(map(_line, facts.datasets)),
        failed_after=tuple(_line(redact(words)) for words in facts.failed_after),
        not_a_moment=tuple(map(_line, facts.not_a_moment)),
        log=tuple(_line(redact(line)) for line in facts.log[-LOG_LINES:]),
    )


def _line(text: str) -> str:
    """Return text in one line that drives no terminal and fills no mailbox."""
    one = printable(" ".join(text.split()))
    return one if len(one) <= LINE_CHARS else one[: LINE_CHARS - 3] + "..."


# -- words -------------------------------------------------------------------------------------


def _words(facts: Facts) -> str:
    """Say in a few words how it ended."""
    words = _result(facts)
    if facts.found_unfinished:
        words = f"found unfinished; {words}"
    return f"{words}, cleanup parked" if facts.cleanup is not None else words


def _result(facts: Facts) -> str:
    if facts.exit_status == ExitStatus.WAITING:
        return "waiting"
    if _has_only_failed_after(facts):
        done = {Verb.BACKUP: "backed up", Verb.RUN: "done"}.get(facts.verb, "kept")
        return f"{done}, but a step after it failed"
    words = facts.outcome or ("kept waiting" if _is_kept(facts) else "failed")
    words = "rolled back" if words == Outcome.ROLLED_BACK else words
    return f"{words}, and a hook failed" if facts.failed_after else words


def _has_only_failed_after(facts: Facts) -> bool:
    """Tell whether all is done, but for a step after it."""
    if facts.failed_after:
        return facts.outcome == Outcome.COMPLETED
    return facts.exit_status == ExitStatus.STEP_AFTER_FAILED


def _is_kept(facts: Facts) -> bool:
    """Tell whether a run goes on later, and is told of for the failed undo of a hook alone."""
    is_open = facts.outcome is None and facts.exit_status != ExitStatus.WAITING
    return is_open and bool(facts.failed_after)


_OF_EVERY_RUN = {
    Event.WAITING: "An unfinished run waits for something, and cannot be settled yet.",
    Event.INTERRUPTED: "A run was found unfinished, with nobody at work on it.",
    Event.PARKED: "Something of the run could not be removed from this machine yet.",
}
_OF_VERB = {
    Verb.BACKUP: {
        Event.FAILED: "No backup was made.",
        Event.PARTIAL: "Some files could not be read; the rest is in the repository.",
        Event.COMPLETED: "The backup is complete.",
    },
    Verb.SNAP: {
        Event.FAILED: "No snapshots were kept.",
        Event.PARTIAL: "Somebody destroyed some snapshots before they were kept.",
        Event.COMPLETED: "The snapshots are kept.",
    },
    Verb.PRUNE: {
        Event.FAILED: "The snapshots that were to go are still there, or some of them.",
        Event.PARTIAL: "Some snapshots that were to go are still there.",
        Event.COMPLETED: "The snapshots that were to go are destroyed.",
    },
    Verb.RUN: {
        Event.FAILED: "A step failed; those after it were not run.",
        Event.PARTIAL: "All steps were run, and one of them did a part of its work.",
        Event.COMPLETED: "All steps are done.",
    },
    Verb.CLONE: {
        Event.FAILED: "No copy was brought up to date.",
        Event.PARTIAL: "Some copies are not up to date.",
        Event.COMPLETED: "The copies are up to date.",
    },
}
_WITHOUT_RUN = {
    Outcome.PARTIAL: "Something that was kept is not in the repository.",
    Outcome.COMPLETED: "There was nothing to do.",
}
_THE = {
    Verb.BACKUP: "The backup is complete",
    Verb.SNAP: "The snapshots are kept",
    Verb.RUN: "All steps were run",
}


def _meanings(facts: Facts) -> list[str]:
    """Explain each event, the gravest first."""
    found = events_of(facts)
    meanings = _OF_EVERY_RUN | _OF_VERB[facts.verb]
    lines = [meanings[event] for event in Event if event in found]
    if _has_only_failed_after(facts):
        first = 1 if Event.WAITING in found else 0
        lines[first:1] = [f"{_THE[facts.verb]}, but a step after it failed."]
    elif _is_kept(facts):
        lines[0] = "The run is kept for `atomtx recover`, and a hook failed."
    elif facts.run is None and Event.FAILED in found:
        lines[0] = "It failed before a run began."
    elif facts.run is None and facts.outcome is not None:
        lines = [_WITHOUT_RUN[Outcome(facts.outcome)]]
    elif Event.WAITING in found and facts.outcome is None:
        lines.append(meanings[Event.FAILED])
    elif facts.outcome == Outcome.COMPLETED and Event.COMPLETED not in found:
        lines.append(meanings[Event.COMPLETED])
    return lines


def _text(facts: Facts) -> list[str]:
    lines = [*_meanings(facts), "", *_table(facts)]
    if facts.log:
        lines += ["", "The client's last lines:", *(f"  {line}" for line in facts.log)]
    return [*lines, "", f"Next, as root on {facts.host}:", *(f"  {c}" for c in _next(facts))]


def _table(facts: Facts) -> list[str]:
    more = len(facts.datasets) - _DATASETS
    names = [*facts.datasets[:_DATASETS], *([f"and {more} more"] if more > 0 else [])]
    result = _result(facts) + (f": {facts.reason}" if facts.reason else "")
    rows = {
        "result": result,
        "failed too": "; ".join(facts.failed_after),
        "what to do": facts.hint,
        "job": facts.job,
        "host": facts.host,
        "datasets": ", ".join(names),
        "read live": _live(facts),
        "run": facts.run,
        "state": None if facts.state in FINAL else facts.state,
        f"last {facts.verb}": _last_completed(facts),
    }
    return [f"{name:<12}{value}" for name, value in rows.items() if value]


def _live(facts: Facts) -> str | None:
    paths = ", ".join(facts.not_a_moment[:_DATASETS])
    return f"{paths}: not a moment" if paths else None


def _last_completed(facts: Facts) -> str | None:
    if Event.COMPLETED in events_of(facts) or not facts.is_last_known:
        return None
    if facts.last_completed is None:
        return "never, as far as the journal knows"
    ago = age(facts.last_completed, facts.at)
    when = local_time(facts.last_completed)
    return f"of {when}" + ("" if ago == "now" else f", {ago} ago")


def _next(facts: Facts) -> list[str]:
    """Return the commands to type, the first one first."""
    found = events_of(facts)
    show = [f"atomtx show {facts.run[:8]}"] if facts.run else ["atomtx history"]
    if Event.WAITING in found:
        return ["atomtx status", "atomtx recover", *show]
    if Event.PARKED in found or _is_kept(facts):
        return ["atomtx recover", *show]
    if Event.FAILED in found and facts.run is None:
        return ["atomtx doctor", *show]
    return show


def _variables(facts: Facts, subject: str) -> dict[str, str]:
    """Return the facts for a program, as variables of its environment."""
    found = events_of(facts)
    gravest = next(event for event in Event if event in found)
    values = {
        "EVENT": gravest.value,
        "EVENTS": " ".join(event.value for event in Event if event in found),
        "SUBJECT": subject,
        "HOST": facts.host,
        "JOB": facts.job,
        "RUN": facts.run,
        "STATE": facts.state,
        "OUTCOME": facts.outcome,
        "CLEANUP": facts.cleanup,
        "REASON": facts.reason,
        "EXIT_STATUS": str(_exit_status(facts)),
        "DATASETS": "\n".join(facts.datasets),
        "NOT_A_MOMENT": "\n".join(facts.not_a_moment),
        "LAST_COMPLETED": facts.last_completed.isoformat() if facts.last_completed else None,
    }
    # execve(2): 128 KiB for one string
    short = {
        n: v or "" for n, v in values.items() if len((v or "").encode(errors="replace")) < 100_000
    }
    return {f"ATOMTX_{name}": value for name, value in short.items()}


# -- settings ----------------------------------------------------------------------------------


def settings_of(env: Mapping[str, str]) -> tuple[NotifySettings, list[str]]:
    """
    Return the settings in the environment, and what is wrong with them.

    What is wrong is left out: a notifier that is set up badly must not stop a backup.
    """
    problems: list[str] = []
    command = _command(env.get("ATOMTX_NOTIFY_COMMAND", ""), problems)
    made = NotifySettings(
        on=_events(env.get("ATOMTX_NOTIFY_ON", ""), problems),
        command=command,
        mail=_addresses(env.get("ATOMTX_NOTIFY_MAIL", ""), problems),
        mail_from=_sender(env.get("ATOMTX_NOTIFY_MAIL_FROM", ""), problems),
        sendmail=env.get("ATOMTX_SENDMAIL", ""),
        ping_url=env.get("ATOMTX_PING_URL", ""),
        ping_url_file=env.get("ATOMTX_PING_URL_FILE", ""),
        ping_exit_status=env.get("ATOMTX_PING_EXIT_STATUS", "") not in ("", "0"),
        apprise=_words_of(env.get("ATOMTX_NOTIFY_APPRISE", "")),
        apprise_file=env.get("ATOMTX_NOTIFY_APPRISE_FILE", ""),
        time_limit_s=_limit(env.get("ATOMTX_NOTIFY_TIME_LIMIT", ""), problems),
    )
    return made, problems


def _words_of(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _addresses(text: str, problems: list[str]) -> tuple[str, ...]:
    words = _words_of(text)
    bad = [word for word in words if not is_address(word)]
    problems += [f"ATOMTX_NOTIFY_MAIL: {word!r} is no address" for word in bad[:1]]
    return tuple(word for word in words if word not in bad)


def _sender(text: str, problems: list[str]) -> str:
    if text and not is_sender(text):
        problems.append(f"ATOMTX_NOTIFY_MAIL_FROM: {text!r} is no address")
        text = ""
    return text or NotifySettings.mail_from


def is_address(word: str) -> bool:
    """Tell whether a mail can be sent there: a user, with or without a host."""
    return bool(_ADDRESS.fullmatch(word))


def is_sender(text: str) -> bool:
    """Tell whether a mail can be from that: an address, alone or in <> after a name."""
    name, bracket, address = text.partition("<")
    if not bracket:
        return is_address(text)
    is_name = _SPECIALS.isdisjoint(name) or _QUOTED.fullmatch(name.strip())
    return (
        bool(is_name) and name.isprintable() and address.endswith(">") and is_address(address[:-1])
    )


def combined(general: NotifySettings, own: NotifySettings) -> NotifySettings:
    """Return the *own* settings of a job, and the *general* ones where it has none."""
    if own.has_ping:  # each check is of one job
        general = replace(general, ping_url="", ping_url_file="")
    if own.apprise or own.apprise_file:
        general = replace(general, apprise=(), apprise_file="")
    nothing = NotifySettings()
    values = {
        each.name: getattr(own, each.name)
        for each in fields(NotifySettings)
        if getattr(own, each.name) != getattr(nothing, each.name)
    }
    return replace(general, **values)


_WAYS = (("command",), ("mail",), ("apprise", "apprise_file"), ("ping_url", "ping_url_file"))


def distinct(every: Iterable[NotifySettings]) -> list[NotifySettings]:
    """Return all settings, each without whom one before it names already."""
    seen: set[object] = set()
    found = []
    for settings in every:
        for names in _WAYS:
            way = (names, *(getattr(settings, name) for name in names))
            if "ping_url" not in names:
                way = (*way, settings.events)
            if way in seen:
                nobody = {name: type(getattr(settings, name))() for name in names}
                settings = replace(settings, **nobody)
            seen.add(way)
        found.append(settings)
    return found


def _command(text: str, problems: list[str]) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as exc:
        problems.append(f"ATOMTX_NOTIFY_COMMAND cannot be read, and is not run: {exc}")
        return ()


def _events(text: str, problems: list[str]) -> frozenset[Event]:
    known = {event.value for event in Event}
    words = _words_of(text)
    unknown = [word for word in words if word not in known]
    if unknown:
        problems.append(
            f"ATOMTX_NOTIFY_ON: {unknown[0]!r} is no event; they are {', '.join(Event)}"
        )
    return frozenset(Event(word) for word in words if word in known)


def _limit(text: str, problems: list[str]) -> float:
    if not text:
        return 0.0
    try:
        return float(max(seconds(text), 1))
    except UserError as exc:
        problems.append(f"ATOMTX_NOTIFY_TIME_LIMIT: {exc}")
        return 0.0

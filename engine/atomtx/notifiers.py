"""
Tell somebody of a run: by a command, by mail, by pings, by apprise.

Whatever a notifier does, the run's result stands.  Each is a process that inherits none of our
descriptors, so no lock, is given a time limit, and ends with its session when that is over; what
it fails at comes back as one line.  All notices of a command are given together, to all notifiers
at once, so that the limit holds for the whole.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid
from functools import partial
from urllib.parse import urlsplit

from . import process, trust
from .errors import EffectError, UserError
from .notices import Notice, NotifySettings
from .redact import Redactor, secret_names

SENDMAIL = ("/usr/sbin/sendmail", "/usr/lib/sendmail")
TRY_S = 10.0  # for one try of a ping
PAUSE_S = 2.0
_MAX_BYTES = 65_536  # of a file of URLs

_Send = Callable[[Notice, float], None]  # with the seconds that are left


def start(settings: NotifySettings, text: str) -> list[str]:
    """Ping that a run begins; return what went wrong, a line each."""
    if not settings.has_ping:
        return []
    limit = min(settings.limit_s, TRY_S)
    return _attempt("ping", lambda: _ping(settings, "start", text, limit))


def send(settings: NotifySettings, notices: Sequence[Notice]) -> list[str]:
    """Give each notice to everybody who wants it; return what went wrong, a line each."""
    jobs = [(name, one, wanted) for name, one, wanted in _notifiers(settings, notices) if wanted]
    if not jobs:
        return []
    end = time.monotonic() + settings.limit_s
    with ThreadPoolExecutor(len(jobs)) as pool:
        told = [pool.submit(_give, name, one, wanted, end) for name, one, wanted in jobs]
        return [line for each in told for line in each.result()]


def _notifiers(
    settings: NotifySettings, notices: Sequence[Notice]
) -> list[tuple[str, _Send, list[Notice]]]:
    """Return each notifier that is set, by name, with what it is to be told."""
    wanted = [notice for notice in notices if notice.events & settings.events]
    found: list[tuple[str, _Send, list[Notice]]] = []
    if settings.command:
        found.append(("command", partial(_command, settings), wanted))
    if settings.mail:
        found.append(("mail", partial(_mail, settings), wanted))
    if settings.apprise or settings.apprise_file:
        found.append(("apprise", partial(_apprise, settings), wanted))
    if settings.has_ping:
        pings = [notice for notice in notices if notice.pings]
        found.append(("ping", partial(_ping_end, settings), pings))
    return found


def _give(name: str, one: _Send, notices: Sequence[Notice], end: float) -> list[str]:
    """Give notices to one notifier, one after the other, until the time is over."""
    lines: list[str] = []
    for n, notice in enumerate(notices):
        left = end - time.monotonic()
        if left <= 0:
            return [*lines, f"{name}: no time was left for {len(notices) - n} notices"]
        lines += _attempt(name, partial(one, notice, left))
    return lines


def _attempt(name: str, effect: Callable[[], None]) -> list[str]:
    try:
        effect()
    except EffectError as exc:
        return [f"{name}: {exc.message}"]
    except Exception as exc:  # a bug of ours, here, must not become the run's result
        return [f"{name}: a bug: {type(exc).__name__}"]
    return []


# -- notifiers ---------------------------------------------------------------------------------


def _command(settings: NotifySettings, notice: Notice, left_s: float) -> None:
    """Run the user's command: facts in its environment, the text on its standard input."""
    env = {**os.environ, **notice.variables}
    _check(process.run_bounded(settings.command, env=env, stdin=notice.text, timeout_s=left_s))


def _mail(settings: NotifySettings, notice: Notice, left_s: float) -> None:
    program = settings.sendmail or _sendmail()
    text = message(settings, notice).as_bytes(policy=SMTP.clone(linesep="\n")).decode("ascii")
    argv = [program, "-t", "-i"]
    _check(process.run_bounded(argv, env=_harmless(), stdin=text, timeout_s=left_s))


def _sendmail() -> str:
    found = next((p for p in SENDMAIL if os.access(p, os.X_OK)), None)
    found = found or process.which("sendmail")
    if found is None:
        raise EffectError("no sendmail is installed")
    return found


def message(settings: NotifySettings, notice: Notice) -> EmailMessage:
    """Return the mail (RFC 5322), in ASCII on the wire."""
    made = EmailMessage(policy=SMTP.clone(cte_type="7bit"))
    made["From"] = settings.mail_from
    made["To"] = ", ".join(settings.mail)
    made["Subject"] = notice.subject
    made["Date"] = formatdate(localtime=True)
    # Not by the name that DNS has for us: to ask may take longer than a mail is worth.
    made["Message-ID"] = make_msgid(domain=notice.variables["ATOMTX_HOST"] or "localhost")
    made["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation replies
    made["X-Atomtx-Event"] = notice.variables["ATOMTX_EVENT"]
    made.set_content(notice.text)
    return made


def _tail(settings: NotifySettings, notice: Notice) -> str:
    if settings.ping_exit_status:
        return str(notice.exit_status)
    return "" if notice.is_success else "fail"


def _ping_end(settings: NotifySettings, notice: Notice, left_s: float) -> None:
    _ping(settings, _tail(settings, notice), notice.text, left_s)


def _host_of(url: str) -> str:
    """Return the part of a URL that is no secret."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.hostname
    except ValueError:
        pass
    return "the server"


def _ping(settings: NotifySettings, tail: str, text: str, left_s: float) -> None:
    url = settings.ping_url or _lines(settings.ping_url_file)[0]
    host = _host_of(url)
    task = {"kind": "ping", "url": url, "tail": tail, "body": text}
    _deliver(host, task | {"timeout_s": min(TRY_S, left_s), "pause_s": PAUSE_S}, left_s)


def _apprise(settings: NotifySettings, notice: Notice, left_s: float) -> None:
    urls = settings.apprise or _lines(settings.apprise_file)
    task = {"kind": "apprise", "urls": urls, "title": notice.subject, "body": notice.text}
    _deliver("apprise", task, left_s)


def _deliver(what: str, task: Mapping[str, object], left_s: float) -> None:
    argv = [sys.executable, "-P", "-m", "atomtx.delivery"]
    try:
        done = process.run_bounded(argv, env=_harmless(), stdin=json.dumps(task), timeout_s=left_s)
    except EffectError as exc:
        raise EffectError(f"{what} was not told within {left_s:.0f} s") from exc
    if not done.ok:
        raise EffectError(f"{what} was not told: {done.last_line()}")


def _lines(file: str) -> tuple[str, ...]:
    """Return what a file of URLs holds, one a line; at least one."""
    try:
        text = trust.read(file, "the file of URLs", limit=_MAX_BYTES)
    except UserError as exc:
        raise EffectError(exc.message) from exc
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not found:
        raise EffectError(f"{file} is empty")
    return found


def _harmless() -> dict[str, str]:
    """Return our environment without secrets, but with a proxy's password."""
    secrets = {n for n in secret_names(os.environ) if not n.lower().endswith("_proxy")}
    return {name: value for name, value in os.environ.items() if name not in secrets}


def _check(done: process.Completed) -> None:
    if not done.ok:
        said = Redactor(os.environ).redact(done.last_line())
        raise EffectError(f"{done.argv[0]} failed: {said}")

"""
Give one message to a server: a program of its own, `python -m atomtx.delivery`.

A name that is not resolved, or a server that sends a byte a minute, holds `urllib` up for longer
than any limit that it is given.  So a process does it that can be killed.  It reads what to do as
JSON from its standard input, because URLs are secrets; it prints a line without them where that
failed, and exits with status 1.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from . import __version__

_TRIES = 3


class _NotDeliveredError(Exception):
    """Why, in words that hold no URL."""


def url_of(url: str, tail: str) -> str:
    """Return *url* with *tail* added to its path, before the query."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/") + f"/{tail}" if tail else parts.path
    return urlunsplit(parts._replace(path=path))


def _ping(url: str, tail: str, body: str, timeout_s: float, pause_s: float) -> None:
    """POST *body*; once more, and again, where the network or the server has trouble."""
    if urlsplit(url).scheme not in ("http", "https"):  # urllib opens files as well
        raise _NotDeliveredError("its URL is none of http or https")
    for left in reversed(range(_TRIES)):
        try:
            return _post(url_of(url, tail), body, timeout_s)
        except urllib.error.HTTPError as exc:
            exc.close()
            if exc.code < 500 or not left:
                raise _NotDeliveredError(f"it answered {exc.code}") from exc
        except (OSError, http.client.HTTPException) as exc:
            if not left:
                raise _NotDeliveredError(_reason(exc)) from exc
        except ValueError as exc:  # its words have the URL
            raise _NotDeliveredError("its URL cannot be used") from exc
        time.sleep(pause_s)
    return None


def _post(url: str, body: str, timeout_s: float) -> None:
    headers = {
        "User-Agent": f"atomtx/{__version__}",
        "Content-Type": "text/plain; charset=utf-8",
    }
    data = body.encode("utf-8", "replace")
    request = urllib.request.Request(url, data=data, headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        answer.read(1024)


def _reason(exc: Exception) -> str:
    cause = getattr(exc, "reason", exc)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {cause.verify_message}"
    if isinstance(cause, TimeoutError):
        return "it did not answer in time"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(cause).__name__


def _apprise(urls: Sequence[str], title: str, body: str) -> None:
    try:
        import apprise
    except ImportError as exc:
        raise _NotDeliveredError("apprise is not installed: pip install 'atomtx[apprise]'") from exc
    to = apprise.Apprise()
    refused = [n for n, url in enumerate(urls, start=1) if not to.add(url)]
    delivered = bool(len(to)) and bool(to.notify(title=title, body=body))
    if refused:
        raise _NotDeliveredError(f"apprise does not know its URL number {refused[0]}")
    if not delivered:
        raise _NotDeliveredError("apprise could not deliver it")


def deliver(task: dict[str, Any]) -> None:
    """Do what *task* says; raise _NotDeliveredError."""
    if task["kind"] == "ping":
        _ping(task["url"], task["tail"], task["body"], task["timeout_s"], task["pause_s"])
    else:
        _apprise(task["urls"], task["title"], task["body"])


def main() -> int:
    try:
        deliver(json.load(sys.stdin))
    except _NotDeliveredError as exc:
        print(exc)
        return 1
    except Exception as exc:  # its words may hold the URL
        print(type(exc).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

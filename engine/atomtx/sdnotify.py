"""
Tell the service manager where we are: sd_notify(3), a datagram to $NOTIFY_SOCKET.

Of our own: the library of that name has had no release since 2017, and systemd's own needs a
compiler and libsystemd.  Whoever does not listen is no trouble of the run's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

_MAX_BYTES = 4096


def is_listened_to(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a service manager wants to know."""
    return env.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def status(text: str, env: Mapping[str, str] = os.environ) -> None:
    """Show *text*, one line, in `systemctl status`; nothing where nobody listens."""
    if not is_listened_to(env):
        return
    message = f"STATUS={' '.join(text.split())}".encode("utf-8", "replace")[:_MAX_BYTES]
    address = os.fsencode(env["NOTIFY_SOCKET"])
    if address.startswith(b"@"):  # an abstract one: unix(7)
        address = b"\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # a manager that is busy must not hold up a backup
        sender.sendto(message, address)

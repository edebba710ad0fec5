"""Signals as a program expects to find them; a module of its own, because `--help` waits for it."""

from __future__ import annotations

import signal


def forget_inherited() -> None:
    """
    Undo what whoever started us did to its signals, which execve(2) hands on.

    Where SIGCHLD is ignored the kernel keeps no exit status (wait(2), NOTES): subprocess takes 0
    for that of each child, and a client that failed would have completed.  A signal that is blocked
    is never heard: neither by us nor by a client, whose stop would be its kill.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])

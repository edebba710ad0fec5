"""Where there is no room for a descriptor for a moment."""

from __future__ import annotations

import errno
import os

import pytest

from atomtx import locks
from atomtx.system import shortage


def test_outlasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a process is heard of although no descriptor was to be had at first."""
    refusals = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN]
    pidfd_open = os.pidfd_open

    def later(pid: int) -> int:
        if refusals:
            number = refusals.pop()
            raise OSError(number, os.strerror(number))
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", later)
    monkeypatch.setattr(shortage, "_STEP_S", 0.0)
    assert not locks.wait_gone(os.getpid(), 0.0)
    assert refusals == []


def test_lasting() -> None:
    """What lasts is told, and what is no shortage at once."""

    def refuse(number: int) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortage, "_PATIENCE_S", 0.0)
        with pytest.raises(OSError, match="Too many open files"):
            shortage.outlast(lambda: refuse(errno.EMFILE))
    with pytest.raises(ProcessLookupError):
        shortage.outlast(lambda: refuse(errno.ESRCH))

"""
Whether anybody read through our mounts at all: fanotify(7) on each of them.

A client that leaves the run's namespace (docker, systemd-run, ssh) reads the live files and
reports success.  The first file or directory that is opened on one of our mounts, by anyone but
this process, is the proof that it did not; after it the marks are taken away, so that they cost
nothing.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from contextlib import suppress

from .. import system

_FAN_CLOEXEC, _FAN_NONBLOCK = 0x1, 0x2
_FAN_MARK_ADD, _FAN_MARK_MOUNT, _FAN_MARK_FLUSH = 0x1, 0x10, 0x80
_FAN_OPEN, _FAN_ONDIR = 0x20, 0x40000000
_AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata

_libc = ctypes.CDLL(None, use_errno=True)


class Witness:
    """Watches some mounts; *saw* is None where the kernel does not let us watch."""

    def __init__(self, mountpoints: Sequence[str]) -> None:
        self.saw: bool | None = None
        self.descriptor = -1
        if not system.here.NAMESPACES:  # fanotify is Linux's, and nobody leaves what is the host's
            return
        with suppress(OSError):  # a kernel without fanotify, or a container: then nobody knows
            self._watch(mountpoints)

    def _watch(self, mountpoints: Sequence[str]) -> None:
        descriptor = _libc.fanotify_init(_FAN_CLOEXEC | _FAN_NONBLOCK, os.O_RDONLY)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "fanotify_init")
        self.descriptor = descriptor
        for path in mountpoints:
            self._mark(_FAN_MARK_ADD, _FAN_OPEN | _FAN_ONDIR, path)
        self.saw = False

    def _mark(self, flags: int, mask: int, path: str) -> None:
        arguments = (ctypes.c_uint(flags | _FAN_MARK_MOUNT), ctypes.c_uint64(mask))
        if _libc.fanotify_mark(self.descriptor, *arguments, _AT_FDCWD, os.fsencode(path)) != 0:
            raise OSError(ctypes.get_errno(), "fanotify_mark", path)

    def look(self) -> bool | None:
        """Take in what happened since the last look, and return :attr:`saw`."""
        while self.saw is False:
            try:
                data = os.read(self.descriptor, 8192)
            except BlockingIOError:
                break
            pids = list(_pids(data))
            if any(pid != os.getpid() for pid in pids):
                self.saw = True
                self._mark(_FAN_MARK_FLUSH, 0, "/")
        return self.saw


def _pids(data: bytes) -> list[int]:
    """Return who made each event, and close the descriptor that came with it."""
    found = []
    while len(data) >= _EVENT.size:
        length, _, _, _, _, descriptor, pid = _EVENT.unpack_from(data)
        if descriptor >= 0:
            os.close(descriptor)
        found.append(pid)
        data = data[length:]
    return found

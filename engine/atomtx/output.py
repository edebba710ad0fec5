"""The client's output: split into lines, redacted, capped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .redact import Redactor

LOG_BYTES = 16 << 20
LINE_BYTES = 1 << 20


class Lines:
    """Splits a stream of bytes into lines, at newlines and carriage returns; bounded."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield each line that *data* completes; an overlong one is cut."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        self._rest = self._rest[:LINE_BYTES]
        for line in lines:
            if line.strip():
                yield line[:LINE_BYTES].decode("utf-8", "replace")

    def rest(self) -> Iterator[str]:
        """Yield the last line where no newline ended it."""
        yield from self.feed(b"\n")


class Log:
    """The client's log: redacted, and capped so that a chatty client cannot fill the disk."""

    def __init__(self, path: Path, redactor: Redactor) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._redactor = redactor
        self._left = LOG_BYTES - os.fstat(self._descriptor).st_size

    def line(self, text: str) -> None:
        """Write one line; a full disk loses the line, never the backup."""
        if self._left <= 0:
            return
        data = (self._redactor.redact(text) + "\n").encode("utf-8", "replace")
        self._left -= len(data)
        if self._left <= 0:
            data = b"[the log is full; the rest is not kept]\n"
        with suppress(OSError):
            os.write(self._descriptor, data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

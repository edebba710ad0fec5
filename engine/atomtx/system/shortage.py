"""Where the machine has no room for a moment: descriptors or memory that others have used up."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")
_NO_ROOM = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_PATIENCE_S = 60.0
_STEP_S = 0.5


def outlast(call: Callable[[], _T]) -> _T:
    """
    Return what *call* returns, trying again while there is no room for it.

    Raises its OSError where that lasts for a minute, and any other at once.
    """
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return call()
        except OSError as exc:
            if exc.errno not in _NO_ROOM or time.monotonic() >= end:
                raise
        time.sleep(_STEP_S)

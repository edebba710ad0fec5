"""
What differs between operating systems: one module for each, with the same names.

`here` is that of this machine, chosen once; nobody else asks which system it is.  Mounts differ
too, but in what they are made of: `mounts/nullfs.py` stands beside `mounts/namespace.py` for a
system without mount namespaces.  Each difference, with its source: docs/freebsd.md.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol


class System(Protocol):
    """What a module of this package has."""

    NAME: str
    NAMESPACES: bool  # of mounts, for a run of its own; else nullfs shows the snapshots
    DESTROY_FORCES: bool  # `zfs destroy` unmounts by force what is in use
    LAYOUT: str  # where a client reads unless it is told
    TREE: str  # the root of a tree unless it is told; empty: there is no default
    STATE: str  # the state directory
    RUN: Path  # what is emptied at boot
    CONFIGURATION: str
    MACHINE_IDS: tuple[str, ...]  # files that name this machine, the best one first
    MAX_ARGUMENT_BYTES: int  # of the names in one command, its environment aside
    ZFS_HINTS: tuple[str, str]  # what to do where ZFS is not installed, or not loaded
    PIN: int  # flags to open(2) a directory only to keep it in use

    def boot_id(self) -> str:
        """Return the identity of this boot of the machine."""

    def pids(self) -> list[int]:
        """Return every process that can be seen."""

    def command_of(self, pid: int) -> str | None:
        """Return a process's short name, or None if it is gone."""

    def openers(self, path: Path, *, locked: bool) -> list[int]:
        """Return the processes that have *path* open; if *locked*, as one that locks it does."""

    def has_open(self, pid: int, path: Path, *, locked: bool) -> bool:
        """Tell whether a process is one of the `openers` of *path*."""

    def lockers(self, tails: Collection[str]) -> dict[str, list[int]]:
        """Return by each of *tails* who locks a file whose path ends so, where it can be told."""

    def watch(self, pid: int) -> int:
        """
        Return a descriptor that can be read once the process has ended; the caller closes it.

        Raises ProcessLookupError where it is gone.  Waits a minute where there is no room for a
        descriptor: who started a process has to learn of its end.
        """

    def send(self, pid: int, signum: signal.Signals, *, if_still: Callable[[int], bool]) -> bool:
        """Signal a process after *if_still* proved that it is the one meant; False if it is not."""

    def start_of(self, pid: int) -> str | None:
        """Return when a process was started, only to be compared; None where it is gone."""

    def session_of(self, pid: int) -> int | None:
        """Return the session of a living process; one that only waits to be reaped is in none."""

    def session(self, sid: int) -> list[int]:
        """Return the living processes of a session."""

    def marked(self, mark: str) -> list[int]:
        """Return the processes in whose environment *mark* stands, as ``NAME=VALUE``."""

    def client_mark(self, token: str) -> Mapping[str, str]:
        """Return the variables by which the processes of a run's client are known."""

    def become_reaper(self) -> None:
        """Become the parent of every descendant whose own parent ends."""

    def descendants(self) -> list[int]:
        """Return the living descendants of this process; their children before them."""


def _choose() -> System:
    if sys.platform.startswith("freebsd"):
        from . import freebsd

        return freebsd
    from . import linux

    return linux


here: System = _choose()

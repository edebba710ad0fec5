"""
What of the program the cases of a sweep never load: their results hold when it changes.

Believed by full.py, and checked in the machine after each command, by stage.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

_NEVER_LOADED = (
    *(f"atomtx.cli.{name}" for name in ("attach", "check", "clone", "config", "doctor", "history")),
    *(f"atomtx.cli.{name}" for name in ("install", "journal", "notify", "snap", "status", "stop")),
    *("atomtx.cli.sure*", "atomtx.cli.unsnap"),
    *(f"atomtx.clients.{name}*" for name in ("borg", "dumps", "kopia", "restic", "xfsdump")),
    *(f"atomtx.integrity.{name}" for name in ("checking", "hashing", "mtree", "places")),
    *(f"atomtx.integrity.{name}" for name in ("scanning", "store", "walk")),
    *("atomtx.audit", "atomtx.cloner", "atomtx.cloning", "atomtx.config_text", "atomtx.delivery"),
    *("atomtx.health", "atomtx.installing", "atomtx.newest", "atomtx.notifiers"),
    *("atomtx.pipeline", "atomtx.replica", "atomtx.tokens", "atomtx.units", "atomtx.unsnapping"),
    *("atomtx.mounts.nullfs", "atomtx.system.freebsd", "atomtx.volumes.ends"),
)


def bystanders(modules: Iterable[str]) -> set[str]:
    """Return which of *modules* no case loads."""
    return {m for m in modules if any(fnmatchcase(m, pattern) for pattern in _NEVER_LOADED)}

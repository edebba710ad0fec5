"""Mutants that no test finds, each with its reason: survivors.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

_FILE = Path(__file__).with_name("survivors.toml")
KINDS = ("equivalent", "message", "speed", "open")


def listed() -> dict[str, str]:
    """Return the kind of each listed survivor, by its key."""
    found: dict[str, str] = {}
    for group in tomllib.loads(_FILE.read_text()).get("survivors", ()):
        if group["kind"] not in KINDS or not group["why"]:
            raise SystemExit(f"{_FILE}: a group needs a kind of {KINDS}, and the reason why")
        for key in group["mutants"]:
            if key in found:
                raise SystemExit(f"{_FILE}: listed twice: {key}")
            found[key] = group["kind"]
    return found

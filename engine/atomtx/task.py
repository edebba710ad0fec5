"""What a front end asks of a runner, and what the runner leaves: as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from .clients import Backup, End, Moment
from .intents import Mount
from .states import Outcome


@dataclass(frozen=True)
class Task:
    """What the front end asks for; no secret is in it: those are in the environment alone."""

    run: str
    attempt: int
    folder: str
    in_namespace: bool  # else the mounts are the host's already
    mounts: tuple[Mount, ...]
    live: tuple[str, ...]
    client: str
    commands: tuple[tuple[str, ...], ...]
    cwd: str
    env: dict[str, str]
    moment: Moment
    stop_signal: int
    grace_s: float  # from a stop to SIGKILL
    time_limit_s: float  # of the attempt; 0: none
    secrets: tuple[str, ...] = ()  # variables to hide in what the client prints, by name
    needed: tuple[str, ...] | None = None  # live wherever it is; None: it is not known

    def to_json(self) -> str:
        data = asdict(self)
        data["moment"]["at"] = self.moment.at.isoformat()
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Task:
        data: dict[str, Any] = json.loads(text)
        moment = data.pop("moment")
        moment["at"] = datetime.fromisoformat(moment["at"])
        moment["targets"] = tuple(moment["targets"])
        moment["excludes"] = tuple(moment["excludes"])
        data["mounts"] = tuple(Mount(**m) for m in data["mounts"])
        data["live"] = tuple(data["live"])
        data["secrets"] = tuple(data["secrets"])
        data["needed"] = None if data["needed"] is None else tuple(data["needed"])
        data["commands"] = tuple(tuple(argv) for argv in data["commands"])
        return cls(moment=Moment(**moment), **data)


_UNITS_S = (("d", 86_400), ("h", 3600), ("m", 60))


def span(seconds: float) -> str:
    """Return a time as `--time-limit` reads it: "6h", "90s"."""
    whole = round(seconds)
    for unit, size_s in _UNITS_S:
        if whole and whole % size_s == 0:
            return f"{whole // size_s}{unit}"
    return f"{whole}s"


# -- the end record --------------------------------------------------------------------------


def end_to_json(end: End, *, attempt: int, stopped: int | None) -> dict[str, Any]:
    """Return the end record: how attempt *attempt* ended; *stopped*: the signal that we sent."""
    return {"attempt": attempt, "stopped": stopped, **asdict(end)}


def end_from_json(data: dict[str, Any]) -> tuple[End, int, int | None]:
    """Read the end record back: (end, attempt, the signal that stopped it or None)."""
    backups = tuple(
        Backup(**{**b, "paths": tuple(b["paths"]), "outcome": Outcome(b["outcome"])})
        for b in data["backups"]
    )
    overdue = data.get("overdue", False)  # not in the record of an older runner
    end = End(Outcome(data["outcome"]), data["reason"], data["retriable"], backups, overdue)
    return end, data["attempt"], data["stopped"]

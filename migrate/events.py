"""What happened, as values: progress of a migration for whoever watches (layer 0: no I/O)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; `to_json` adds the class's name as "event"."""

    def to_json(self) -> dict[str, Any]:
        name = type(self).__name__
        words = "".join("-" + c.lower() if c.isupper() else c for c in name).lstrip("-")
        fields = {key.replace("_", "-"): value for key, value in asdict(self).items()}
        return {"event": words, **fields}


@dataclass(frozen=True, slots=True)
class PhaseEntered(Event):
    """The migration entered a named phase."""

    phase: str
    at_ms: float


@dataclass(frozen=True, slots=True)
class RoundProgress(Event):
    """Inside a round, a few times a second."""

    round: int
    pages_left: int
    pages_total: int
    bytes_sent: int
    bandwidth_bytes_per_s: float
    dirty_pages_per_s: float
    expected_downtime_ms: float | None


@dataclass(frozen=True, slots=True)
class RoundDone(Event):
    """One pass over the dirty pages is on its way."""

    round: int
    pages_dirty: int
    pages_zero: int
    bytes_sent: int
    ms: float


@dataclass(frozen=True, slots=True)
class Log(Event):
    """One line for people."""

    message: str

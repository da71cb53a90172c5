"""What a migration came to, in the field names of QEMU's `query-migrate` (layer 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migrate.units import PAGE_SIZE


@dataclass(slots=True)
class RoundReport:
    """One pass over the dirty pages."""

    round: int
    pages_dirty: int
    pages_zero: int
    bytes_sent: int
    ms: float

    def to_json(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "pages-dirty": self.pages_dirty,
            "pages-zero": self.pages_zero,
            "bytes-sent": self.bytes_sent,
            "ms": round(self.ms, 3),
        }


DOWNTIME_PHASES = ("stop", "final-harvest", "final-send", "state", "handover", "start")


@dataclass(slots=True)
class Report:
    """The object that `migrate send --json` ends with.

    Times in milliseconds. `downtime_phases` add up to the downtime.
    """

    status: str = "active"
    total_ms: float = 0.0
    setup_ms: float = 0.0
    downtime_ms: float = 0.0
    expected_downtime_ms: float = 0.0
    downtime_limit_ms: float = 0.0
    ram_total_bytes: int = 0
    transferred_bytes: int = 0
    pages_zero: int = 0
    pages_sent: int = 0
    pages_remaining: int = 0
    dirty_pages_per_s: float = 0.0
    dirty_sync_count: int = 0
    bandwidth_bytes_per_s: float = 0.0
    compression: str = "none"
    verified: bool = False
    rounds: list[RoundReport] = field(default_factory=list)
    downtime_phases_ms: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As QEMU names things; `mbps` is megabits a second, as there."""
        report: dict[str, Any] = {
            "status": self.status,
            "total-time": round(self.total_ms, 3),
            "setup-time": round(self.setup_ms, 3),
            "downtime": round(self.downtime_ms, 3),
            "expected-downtime": round(self.expected_downtime_ms, 3),
            "downtime-limit": round(self.downtime_limit_ms, 3),
            "ram": {
                "transferred": self.transferred_bytes,
                "total": self.ram_total_bytes,
                "duplicate": self.pages_zero,
                "normal": self.pages_sent,
                "normal-bytes": self.pages_sent * PAGE_SIZE,
                "remaining": self.pages_remaining * PAGE_SIZE,
                "page-size": PAGE_SIZE,
                "dirty-sync-count": self.dirty_sync_count,
                "mbps": round(self.bandwidth_bytes_per_s * 8 / 1e6, 3),
                "dirty-pages-rate": round(self.dirty_pages_per_s, 1),
            },
            "compression": self.compression,
            "verified": self.verified,
            "rounds": [entry.to_json() for entry in self.rounds],
            "downtime-phases": {k: round(v, 4) for k, v in self.downtime_phases_ms.items()},
        }
        if self.error is not None:
            report["error-desc"] = self.error
        return report

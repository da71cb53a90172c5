"""When to go on, when to switch over, when to give up (layer 2, pure).

A policy sees what each round measured and decides; it never touches a clock or a socket. The
downtime limit is a bound and not a budget to spend: as long as another round makes the predicted
downtime markedly shorter, it is worth its few milliseconds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, Protocol

SWITCHOVER_OVERHEAD_NS: Final = 2_000_000
"""What stopping, the state and the handover cost beside the pages, until it is measured."""
GOOD_ENOUGH_NS: Final = 1_000_000
"""Pages that are sent within this do not deserve another round."""
WORTH_A_ROUND: Final = 0.8
"""Another round has to shrink what is left at least to this share."""


class Verdict(enum.Enum):
    """What to do next."""

    CONTINUE = "continue"
    SWITCH_OVER = "switch over"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What one finished round measured; `pages_left` are dirty by now, not yet sent."""

    number: int
    pages_sent: int
    bytes_sent: int
    elapsed_ns: int
    pages_left: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, the downtime expected if the switch came now, and the reason for people."""

    verdict: Verdict
    expected_downtime_ns: int
    reason: str


class Policy(Protocol):
    """Decides after each round; `now_ns` and `bandwidth` (bytes/s) are measured by the caller."""

    def decide(
        self, now_ns: int, history: list[RoundStats], bandwidth: float, bytes_per_page: float
    ) -> Decision: ...


@dataclass(frozen=True, slots=True)
class DowntimePolicy:
    """Pre-copy until what is left fits the downtime limit and rounds no longer help.

    `max_rounds` counts the first one, over all of memory. `started_ns` is on the clock of
    `now_ns`; a `timeout_ns` of None waits for as long as `max_rounds` lets it.
    """

    downtime_limit_ns: int
    max_rounds: int
    started_ns: int
    timeout_ns: int | None = None

    def decide(
        self, now_ns: int, history: list[RoundStats], bandwidth: float, bytes_per_page: float
    ) -> Decision:
        last = history[-1]
        pages_ns = int(last.pages_left * bytes_per_page / max(bandwidth, 1.0) * 1e9)
        expected = pages_ns + SWITCHOVER_OVERHEAD_NS
        fits = expected <= self.downtime_limit_ns
        if pages_ns <= GOOD_ENOUGH_NS and (fits or last.pages_left == 0):
            # With nothing left to send no further round can help, whatever the limit.
            return Decision(Verdict.SWITCH_OVER, expected, "next to nothing is left")
        shrinking = len(history) < 2 or last.pages_left <= WORTH_A_ROUND * history[-2].pages_left
        if fits and not shrinking:
            return Decision(Verdict.SWITCH_OVER, expected, "fits, and rounds no longer help")
        rate = last.pages_left / max(last.elapsed_ns, 1) * 1e9
        out_of_time = self.timeout_ns is not None and now_ns - self.started_ns >= self.timeout_ns
        if last.number + 1 >= self.max_rounds or out_of_time:
            if fits:
                return Decision(Verdict.SWITCH_OVER, expected, "fits")
            limit = "the timeout" if out_of_time else f"{last.number + 1} rounds"
            return Decision(
                Verdict.GIVE_UP,
                expected,
                f"after {limit} the downtime would still be {expected / 1e6:.0f} ms, over the limit"
                f" of {self.downtime_limit_ns / 1e6:.0f} ms: the guest dirties some"
                f" {rate:,.0f} pages/s, the link carries"
                f" {bandwidth / max(bytes_per_page, 1.0):,.0f}",
            )
        return Decision(
            Verdict.CONTINUE, expected, "rounds still help" if fits else "too much left"
        )

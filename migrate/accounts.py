"""How a migration goes and what it came to, for the policy, for whoever watches, and for the report
(layer 4).

The source says what happened; nothing in here does anything to a guest or a link.
"""

from __future__ import annotations

import itertools
import time

from migrate.events import RoundDone, RoundProgress
from migrate.policy import Decision, Policy, RoundStats
from migrate.report import Report, RoundReport
from migrate.sender import PageSender
from migrate.units import PAGE_SIZE

FIRST_GUESS_BYTES_PER_S = 1e9
TELLING_BYTES = 4 << 20
"""Rounds that moved less say nothing about the bandwidth."""


class Accounts:
    """Of one attempt. `pages_left` and `progress` are for any thread."""

    def __init__(self, report: Report, bandwidth: int | None) -> None:
        """`bandwidth`: what the sender is held to, bytes a second."""
        self.report = report
        self.history: list[RoundStats] = []
        self.started_ns = time.monotonic_ns()
        self._decision: Decision | None = None
        self._limit = bandwidth

    def begin(self) -> None:
        """The time counts from now."""
        self.started_ns = time.monotonic_ns()

    def ms(self) -> float:
        """Since the beginning."""
        return (time.monotonic_ns() - self.started_ns) / 1e6

    # -- rounds

    def sent(
        self, pages_dirty: int, pages_zero: int, bytes_sent: int, elapsed_ns: int
    ) -> RoundDone:
        """A pass over the dirty pages, or the last of them, is done; the event that tells it."""
        number, ms = len(self.report.rounds), elapsed_ns / 1e6
        self.report.rounds.append(RoundReport(number, pages_dirty, pages_zero, bytes_sent, ms))
        return RoundDone(number, pages_dirty, pages_zero, bytes_sent, ms)

    def decide(self, policy: Policy, stats: RoundStats) -> Decision:
        """What the policy makes of all rounds, `stats` being the latest."""
        self.history.append(stats)
        self._decision = decision = policy.decide(
            time.monotonic_ns(), self.history, self.bandwidth(), self.bytes_per_page()
        )
        return decision

    def bandwidth(self) -> float:
        """Bytes a second over the rounds that moved enough to tell; the latest weigh most."""
        for stats in reversed(self.history):
            if stats.bytes_sent >= TELLING_BYTES:
                return stats.bytes_sent / stats.elapsed_ns * 1e9
        if self.history and self.history[0].bytes_sent:
            slow = self._limit or FIRST_GUESS_BYTES_PER_S
            return max(slow, self.history[0].bytes_sent / self.history[0].elapsed_ns * 1e9)
        return float(self._limit or FIRST_GUESS_BYTES_PER_S)

    def bytes_per_page(self) -> float:
        """What a dirty page has cost on the link so far."""
        sent = sum(stats.pages_sent for stats in self.history)
        if sent == 0:
            return float(PAGE_SIZE)
        return min(sum(stats.bytes_sent for stats in self.history) / sent, PAGE_SIZE * 1.01)

    def dirty_pages_per_s(self) -> float:
        """During the last round."""
        if not self.history:
            return 0.0
        return self.history[-1].pages_left / max(self.history[-1].elapsed_ns, 1) * 1e9

    def progress(self, pages_left: int, bytes_sent: int) -> RoundProgress:
        """Where the migration stands."""
        decision = self._decision
        return RoundProgress(
            round=len(self.history),
            pages_left=max(pages_left, 0),
            pages_total=self.report.ram_total_bytes // PAGE_SIZE,
            bytes_sent=bytes_sent,
            bandwidth_bytes_per_s=self.bandwidth(),
            dirty_pages_per_s=self.dirty_pages_per_s(),
            expected_downtime_ms=decision.expected_downtime_ns / 1e6 if decision else None,
        )

    # -- the end

    def moved(self, marks: list[int], start_ns: int, sender: PageSender) -> None:
        """The downtime and its parts: from the stop here to the first instruction there.

        `marks`: when each part began, and when the last one ended. `start_ns`: how long the
        destination took to start.
        """
        report = self.report
        stop, harvest, send, state, handover = (
            (after - before) / 1e6 for before, after in itertools.pairwise(marks)
        )
        start = min(start_ns / 1e6, handover)
        # The handover went one way before the start and its confirmation comes back after it.
        one_way = (handover - start) / 2
        report.downtime_phases_ms = {
            "stop": stop,
            "final-harvest": harvest,
            "final-send": send,
            "state": state,
            "handover": one_way,
            "start": start,
        }
        report.downtime_ms = sum(report.downtime_phases_ms.values())
        report.pages_sent, report.pages_zero = sender.pages_sent, sender.pages_zero
        report.dirty_sync_count = len(self.history) + 1
        report.bandwidth_bytes_per_s = self.bandwidth()
        report.dirty_pages_per_s = self.dirty_pages_per_s()
        if self._decision is not None:
            report.expected_downtime_ms = self._decision.expected_downtime_ns / 1e6

    def ended(self, error: BaseException | None, bytes_sent: int = 0) -> None:
        """The attempt is over; `error` is why it failed."""
        if error is not None:
            self.report.status, self.report.error = "failed", str(error)
            return
        self.report.status = "completed"
        self.report.total_ms = self.ms()
        self.report.transferred_bytes = bytes_sent

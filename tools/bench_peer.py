"""One live migration of our own guest, measured from outside: what every peer has in common.

A `Peer` (QEMU, or this project's command line) starts a source with the guest, a destination that
waits, and migrates. `measure` drives it and computes the figures from what the two consoles said
and when; it trusts the peer's own report for nothing but the columns that say so.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from migrate.units import MIB
from migrate.vm import guest

R = TypeVar("R", bound=guest.Report)

START_TIMEOUT_S = 60.0
MIGRATE_TIMEOUT_S = 60.0
SETTLE_S = 0.7
"""Before the migration: the guest at its pace, the start's work done. After it: beats to see."""
CLOCK_RAN_ON_MS = 0.3
"""A guest's clock that lost less than this over the switch did not stand still."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is migrated, and the bounds that hold for this project's figures.

    `downtime_limit_ms` None is the peer's default. `total_ratio`: total time over QEMU's in the
    same run; `bare_ratio`: over the bare socket's; `gap_ms`: the heartbeat gap.
    """

    name: str
    parameters: guest.GuestParameters
    downtime_limit_ms: int | None = None
    destination_populated: bool = True
    total_ratio: float | None = None
    bare_ratio: float | None = None
    gap_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """What the peer itself reports, in QEMU's units. `wall_ms`: from command to completion."""

    total_ms: float
    downtime_ms: float
    setup_ms: float
    transferred_bytes: int
    rounds: int
    wall_ms: float
    report: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, report: dict[str, Any], wall_s: float) -> Self:
        """From the fields of QEMU's `query-migrate`, which `migrate send --json` uses too."""
        return cls(
            total_ms=report["total-time"],
            downtime_ms=report["downtime"],
            setup_ms=report["setup-time"],
            transferred_bytes=report["ram"]["transferred"],
            rounds=report["ram"]["dirty-sync-count"],
            wall_ms=wall_s * 1e3,
            report=report,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One migration.

    `gap_ms`: host time between the source's last beat and the destination's first, less the
    period. A stop between two beats hides in it, up to one period of it.
    `outage_ms`: how much the guest's clock lost on the host's, as it stands still while the guest
    does; nothing hides in it. Where the clock runs on: the longest time in which the guest did
    not look at it.
    `worst_ms`: the longest time without a beat from the migration's start to after its end, less
    the period. `slowdown`: visits a second during the migration over those before (None: idle).
    `beats_lost`: missing numbers at the switch. Negative: the guest
    went on with counters that it had left behind. `verdict`: the destination's, on all of its RAM.
    """

    figures: Figures
    gap_ms: float
    outage_ms: float
    worst_ms: float
    slowdown: float | None
    beats_lost: int
    verdict: guest.Verdict

    @property
    def clean(self) -> bool:
        return self.verdict.clean


class BenchError(Exception):
    """A peer did not do what it was asked."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A report, and when its line's first byte came (CLOCK_MONOTONIC)."""

    at_ns: int
    report: guest.Report


class ConsoleReader:
    """Reads a guest's console from a unix socket, in a thread of its own, as soon as it is there.

    The thread runs with real-time priority where that is allowed: a beat's arrival is to tell of
    the guest, not of this host's scheduler.
    """

    def __init__(self, path: Path) -> None:
        self.arrivals: list[Arrival] = []
        self.unfinished: Arrival | None = None
        """The line that never got its end: the guest was stopped while it printed a beat."""
        self.realtime = False
        self._path = path
        self._changed = threading.Condition()
        self._closing = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._read, name=f"console {path.name}")
        self._thread.start()

    def wait(
        self, kind: type[R], timeout_s: float, test: Callable[[R], bool] = lambda report: True
    ) -> Arrival:
        """The first report of `kind` that passes `test`, past ones included. Raises BenchError."""
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for arrival in self.arrivals[seen:]:
                    seen += 1
                    if isinstance(arrival.report, (guest.Trap, guest.Refused)):
                        raise BenchError(f"{self._path.name}: the guest ended: {arrival.report}")
                    if isinstance(arrival.report, kind) and test(arrival.report):
                        return arrival
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BenchError(
                        f"{self._path.name}: no {kind.__name__} within {timeout_s:.0f} s "
                        f"({len(self.arrivals)} reports came)"
                    )
                self._changed.wait(left)

    def beats(self) -> list[tuple[int, guest.Heartbeat]]:
        """(arrival ns, beat) so far."""
        with self._changed:
            return [
                (arrival.at_ns, arrival.report)
                for arrival in self.arrivals
                if isinstance(arrival.report, guest.Heartbeat)
            ]

    def send(self, request: guest.Request) -> None:
        if self._socket is None:
            raise BenchError(f"{self._path.name}: no console to ask through")
        self._socket.sendall(request.value)

    def close(self) -> None:
        self._closing = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _connect(self) -> socket.socket | None:
        while not self._closing:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                time.sleep(0.005)
            else:
                return connection
        return None

    def _read(self) -> None:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            self.realtime = True
        self._socket = self._connect()
        if self._socket is None:
            return
        line, began_ns = b"", 0
        with self._socket:
            while True:
                try:
                    data = self._socket.recv(65536)
                except OSError:
                    break
                now_ns = time.monotonic_ns()
                if not data:
                    break
                for piece in data.splitlines(keepends=True):
                    began_ns = began_ns if line else now_ns
                    line += piece
                    if line.endswith(b"\n"):
                        self._take(began_ns, line)
                        line = b""
                self.unfinished = (
                    Arrival(began_ns, guest.Refused(line.decode("ascii", "replace")))
                    if line.startswith(b"HB")
                    else None
                )
                time.sleep(0.001)  # QEMU sends byte by byte: take the rest of a line at once

    def _take(self, at_ns: int, line: bytes) -> None:
        report = guest.parse_line(line.decode("ascii", "replace"))
        if report is not None:
            with self._changed:
                self.arrivals.append(Arrival(at_ns, report))
                self._changed.notify_all()


class Peer(ABC):
    """Something that can migrate the guest. One instance makes one migration."""

    name: str
    source: ConsoleReader
    destination: ConsoleReader

    def __init__(self, scratch: Path, case: Case) -> None:
        self.scratch = scratch
        self.case = case
        self.image = scratch / "guest.bin"
        self.image.write_bytes(guest.build_image(case.parameters))

    @abstractmethod
    def start(self) -> None:
        """Start the source with the guest, and a destination that waits for the stream."""

    @abstractmethod
    def migrate(self) -> Figures:
        """Migrate; returns when the peer says that it is done. Raises BenchError."""

    @abstractmethod
    def close(self) -> None:
        """End every process that `start` made. Works after a failed `start` too."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(peer: Peer) -> Outcome:
    """Start, migrate once, and say what could be seen. Closes the peer. Raises BenchError."""
    try:
        peer.start()
        peer.source.wait(guest.Filled, START_TIMEOUT_S)
        parameters = peer.case.parameters
        # Each page of the working set visited once, so that the rate is all there is to see.
        peer.source.wait(
            guest.Heartbeat,
            START_TIMEOUT_S,
            lambda beat: beat.visits * 4096 >= min(parameters.working_set_bytes, 32 * MIB),
        )
        time.sleep(SETTLE_S)
        began_ns = time.monotonic_ns()
        figures = peer.migrate()
        ended_ns = time.monotonic_ns()
        peer.destination.wait(guest.Heartbeat, MIGRATE_TIMEOUT_S)
        time.sleep(SETTLE_S)
        source, destination = peer.source.beats(), peer.destination.beats()
        peer.destination.send(guest.Request.VERIFY)
        verdict = peer.destination.wait(guest.Verdict, START_TIMEOUT_S).report
        assert isinstance(verdict, guest.Verdict)
        return _outcome(peer, figures, source, destination, began_ns, ended_ns, verdict)
    finally:
        peer.close()


def _outcome(
    peer: Peer,
    figures: Figures,
    source: list[tuple[int, guest.Heartbeat]],
    destination: list[tuple[int, guest.Heartbeat]],
    began_ns: int,
    ended_ns: int,
    verdict: guest.Verdict,
) -> Outcome:
    period_ms = peer.case.parameters.heartbeat_ms
    # Should the destination's console repeat what the source printed, it is no beat of its own.
    # (Not by the numbers: a guest that lost memory counts on from an older one.)
    last_ticks = source[-1][1].ticks
    destination = [(at, beat) for at, beat in destination if beat.ticks > last_ticks]
    if not destination:
        raise BenchError(f"{peer.name}: no new beat came from the destination")
    (last_at, last), (first_at, first) = source[-1], destination[0]
    host_ms = (first_at - last_at) / 1e6
    frozen_ms = _ahead_ms(destination[:100]) - _ahead_ms(source[-100:])
    hole_ms = first.hole_ticks / guest.TICKS_PER_MS
    beats_lost = first.number - last.number - 1
    if beats_lost == 1 and peer.source.unfinished is not None:
        # One line began at the source and ended at the destination: it was a beat.
        beats_lost = 0
        gap_ms = max(
            (first_at - peer.source.unfinished.at_ns) / 1e6 - period_ms,
            (peer.source.unfinished.at_ns - last_at) / 1e6 - period_ms,
        )
    else:
        gap_ms = host_ms - period_ms
    beats = source + destination
    arrivals = [at for at, _ in beats if at >= began_ns - period_ms * 1_000_000]
    worst_ms = max(b - a for a, b in itertools.pairwise(arrivals)) / 1e6 - period_ms
    return Outcome(
        figures=figures,
        gap_ms=max(0.0, gap_ms),
        outage_ms=frozen_ms if frozen_ms > CLOCK_RAN_ON_MS else hole_ms,
        worst_ms=max(0.0, worst_ms),
        slowdown=_slowdown(source, began_ns, min(ended_ns, source[-1][0])),
        beats_lost=beats_lost,
        verdict=verdict,
    )


def _ahead_ms(beats: list[tuple[int, guest.Heartbeat]]) -> float:
    """How far the host's clock is ahead of the guest's, by the beat that was delivered quickest.

    Arrivals are late by what the console's way took, which on a busy host is milliseconds.
    """
    return min(at / 1e6 - beat.ticks / guest.TICKS_PER_MS for at, beat in beats)


def _slowdown(
    source: list[tuple[int, guest.Heartbeat]], began_ns: int, ended_ns: int
) -> float | None:
    """Visits a second before the migration over visits a second during it."""

    def rate(first_ns: int, end_ns: int) -> float:
        inside = [(at, beat.visits) for at, beat in source if first_ns <= at <= end_ns]
        if len(inside) < 2 or inside[-1][0] == inside[0][0]:
            return 0.0
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0]) * 1e9

    before, during = rate(began_ns - int(SETTLE_S * 1e9), began_ns), rate(began_ns, ended_ns)
    return before / during if before and during else None

"""Benchmark of live migration, against QEMU in the same run where QEMU is installed.

Every case moves our own guest (1 GiB, one hart) between two processes over loopback, several
times, the peers taking turns; the table shows medians. The bounds are those that this project
sets itself. `tools/bench_migrate.py --help` lists the options; `--json FILE` keeps every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qemu_peer
from bare_socket import bare_socket_ms
from bench_peer import BenchError, Case, Outcome, Peer, measure
from migrate_peer import MigratePeer
from rich.console import Console
from rich.table import Table

from migrate.errors import UsageError
from migrate.units import MIB, parse_size
from migrate.vm.guest import Fill, GuestParameters

DOWNTIME_AGREES_MS = 3.0


def cases(ram_bytes: int, heartbeat_ms: int) -> list[Case]:
    """The cases; working sets shrink with RAM, so that a small trial run has room for them."""

    def parameters(
        fill: Fill = Fill.RANDOM, working_set_bytes: int = 0, rate: int = 0
    ) -> GuestParameters:
        return GuestParameters(
            ram_bytes=ram_bytes,
            fill=fill,
            working_set_bytes=min(working_set_bytes, ram_bytes // 4),
            rate_pages_per_s=rate,
            heartbeat_ms=heartbeat_ms,
        )

    return [
        Case("random, idle", parameters(), total_ratio=0.7, bare_ratio=1.3, gap_ms=5),
        Case("random, idle, limit 20 ms", parameters(), downtime_limit_ms=20, gap_ms=5),
        Case(
            "64 MiB at 5,000 pages/s, limit 20 ms",
            parameters(working_set_bytes=64 * MIB, rate=5000),
            downtime_limit_ms=20, total_ratio=0.7, gap_ms=8,
        ),
        Case(
            "256 MiB at 20,000 pages/s, limit 20 ms",
            parameters(working_set_bytes=256 * MIB, rate=20000),
            downtime_limit_ms=20, total_ratio=0.8, gap_ms=5,
        ),
        Case("zero, idle", parameters(Fill.ZERO), total_ratio=1.0, gap_ms=5),
        Case(
            "random, idle, fresh destination", parameters(), destination_populated=False, gap_ms=20,
        ),
    ]  # fmt: skip


PEERS: dict[str, Callable[[Path, Case], Peer]] = {
    "migrate": MigratePeer,
    "qemu": qemu_peer.QemuPeer,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One bound and what was measured."""

    case: str
    what: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound


class Results:
    """Outcomes by case and peer; failures are kept as text."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], list[Outcome]] = {}
        self.failures: list[str] = []
        self.bare_ms: list[float] = []

    def median(self, case: str, peer: str, key: Callable[[Outcome], float]) -> float | None:
        runs = self.outcomes.get((case, peer))
        return statistics.median(map(key, runs)) if runs else None

    def checks(self, all_cases: list[Case]) -> list[Check]:
        """This project's figures against their bounds, as far as they were measured."""
        checks: list[Check] = []
        for case in all_cases:
            total = self.median(case.name, "migrate", lambda run: run.figures.total_ms)
            gap = self.median(case.name, "migrate", lambda run: run.gap_ms)
            if total is None or gap is None:
                continue
            rival = self.median(case.name, "qemu", lambda run: run.figures.total_ms)
            if case.total_ratio is not None and rival:
                checks.append(Check(case.name, "total / QEMU's", total / rival, case.total_ratio))
            if case.bare_ratio is not None and self.bare_ms:
                ratio = total / statistics.median(self.bare_ms)
                checks.append(Check(case.name, "total / bare socket's", ratio, case.bare_ratio))
            if case.gap_ms is not None:
                checks.append(Check(case.name, "gap, ms", gap, case.gap_ms))
            apart = self.median(
                case.name, "migrate", lambda run: abs(run.figures.downtime_ms - run.outage_ms)
            )
            assert apart is not None
            checks.append(Check(case.name, "reported downtime off, ms", apart, DOWNTIME_AGREES_MS))
            wrong = sum(not run.clean for run in self.outcomes[case.name, "migrate"])
            checks.append(Check(case.name, "runs with wrong pages", wrong, 0))
        return checks

    def to_json(self) -> dict[str, Any]:
        return {
            "bare-socket-ms": self.bare_ms,
            "runs": [
                {"case": case, "peer": peer, **asdict(run)}
                for (case, peer), runs in self.outcomes.items()
                for run in runs
            ],
            "failures": self.failures,
        }


def run_all(
    all_cases: list[Case], peers: list[str], runs: int, say: Console, bare: bool
) -> Results:
    """Rounds over all cases, the peers next to each other, so that a slow minute hits both."""
    results = Results()
    for number in range(1, runs + 1):
        if bare:
            results.bare_ms.append(bare_socket_ms(all_cases[0].parameters.ram_bytes))
            say.print(f"run {number}: bare socket {results.bare_ms[-1]:.0f} ms")
        for case in all_cases:
            for name in peers:
                with tempfile.TemporaryDirectory(prefix="migrate-bench-") as scratch:
                    try:
                        outcome = measure(PEERS[name](Path(scratch), case))
                    except BenchError as error:
                        results.failures.append(f"{case.name}, {name}, run {number}: {error}")
                        say.print(f"run {number}: {results.failures[-1]}", style="red")
                        continue
                results.outcomes.setdefault((case.name, name), []).append(outcome)
                say.print(
                    f"run {number}: {case.name}: {name} total {outcome.figures.total_ms:.0f} ms, "
                    f"gap {outcome.gap_ms:.1f} ms, downtime {outcome.figures.downtime_ms:.1f} ms"
                )
    return results


def table_of(results: Results, all_cases: list[Case], peers: list[str], runs: int) -> Table:
    table = Table(title=f"Live migration over loopback, medians of {runs}")
    table.add_column("case")
    table.add_column("peer")
    for heading in (
        "total ms", "gap ms", "outage ms", "downtime ms", "worst ms", "sent MiB", "rounds",
        "slower", "RAM",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    columns: list[tuple[Callable[[Outcome], float], str]] = [
        (lambda run: run.figures.total_ms, ".0f"),
        (lambda run: run.gap_ms, ".1f"),
        (lambda run: run.outage_ms, ".1f"),
        (lambda run: run.figures.downtime_ms, ".1f"),
        (lambda run: run.worst_ms, ".1f"),
        (lambda run: run.figures.transferred_bytes / MIB, ",.0f"),
        (lambda run: run.figures.rounds, ".0f"),
    ]
    for case in all_cases:
        for peer in peers:
            done = results.outcomes.get((case.name, peer), [])
            cells = [
                format(statistics.median(map(key, done)), style) if done else "–"
                for key, style in columns
            ]
            slower = [run.slowdown for run in done if run.slowdown is not None]
            cells.append(f"{statistics.median(slower):.2f}×" if slower else "–")
            cells.append("–" if not done else "exact" if all(r.clean for r in done) else "WRONG")
            table.add_row(case.name, peer, *cells)
        table.add_section()
    return table


def checks_table(checks: list[Check]) -> Table:
    table = Table(title="Bounds")
    for heading in ("case", "what", "measured", "at most", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "at most") else "left")
    for check in checks:
        mark = "[green]holds[/]" if check.holds else "[red]missed[/]"
        table.add_row(check.case, check.what, f"{check.value:.2f}", f"{check.bound:g}", mark)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--runs", type=int, default=3, metavar="N", help="runs of each case (default 3)")
    add("--memory", default="1GiB", metavar="SIZE", help="guest RAM (default 1GiB)")
    add("--peer", action="append", choices=list(PEERS), help="only this peer (may be repeated)")
    add("--case", action="append", metavar="TEXT", help="only cases whose name contains TEXT")
    add("--heartbeat", type=int, default=10, metavar="MS", help="period, ms (default 10)")
    add("--no-bare", action="store_true", help="leave out the bare socket")
    add("--json", metavar="FILE", help="write every run to FILE ('-': standard output, no table)")
    add("--check", action="store_true", help="exit with 1 if a bound is missed or a run failed")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    out, say = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)
    try:
        all_cases = cases(parse_size(options.memory), options.heartbeat)
    except UsageError as error:
        say.print(f"bench_migrate: {error}")
        return 2
    if options.case:
        all_cases = [c for c in all_cases if any(text in c.name for text in options.case)]
    if not all_cases or options.runs < 1:
        say.print("bench_migrate: no such case, or no run asked for")
        return 2
    peers = options.peer or list(PEERS)
    qemu = qemu_peer.version()
    if qemu is None and "qemu" in peers:
        say.print(f"{qemu_peer.BINARY} is not installed (Debian: qemu-system-misc): without it")
        peers = [peer for peer in peers if peer != "qemu"]
    results = run_all(all_cases, peers, options.runs, say, not options.no_bare)
    checks = results.checks(all_cases)
    host = {"cpus": os.cpu_count(), "kernel": os.uname().release, "qemu": qemu}
    if options.json:
        document = {
            "host": host,
            **results.to_json(),
            "checks": [asdict(check) | {"holds": check.holds} for check in checks],
        }
        text = json.dumps(document, indent=2) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.json != "-":
        out.print(f"{host['cpus']} CPUs, Linux {host['kernel']}, QEMU {qemu or 'absent'}")
        if results.bare_ms:
            out.print(f"bare socket beside a spinner: {statistics.median(results.bare_ms):.0f} ms")
        out.print(table_of(results, all_cases, peers, options.runs))
        if checks:
            out.print(checks_table(checks))
        for failure in results.failures:
            out.print(f"failed: {failure}", style="red")
    missed = any(not check.holds for check in checks) or bool(results.failures)
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

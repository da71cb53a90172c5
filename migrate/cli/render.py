"""A migration for people: live progress, and the report (layer 5)."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from migrate.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class Progress:
    """What `send` shows while it goes on: a live table on a terminal, else a line a round."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live: Live | None = None
        self._phase = ""
        self._last: dict[str, Any] = {}
        self._rounds: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        if not self._quiet and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, event: dict[str, Any]) -> None:
        """An event of the control protocol."""
        match event.get("event"):
            case "phase-entered":
                self._phase = str(event["phase"])
            case "round-progress":
                self._last = event
            case "round-done":
                self._rounds.append(event)
                self._line(
                    f"round {event['round']}: {event['pages-dirty']:,} pages, "
                    f"{event['pages-zero']:,} of them zero, {format_size(event['bytes-sent'])} "
                    f"in {event['ms']:,.0f} ms"
                )
            case "log":
                self._line(str(event["message"]))
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def _line(self, text: str) -> None:
        if not self._quiet and self._live is None:
            print(text, flush=True)

    def _picture(self) -> RenderableType:
        from rich.table import Table

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_row("phase", self._phase)
        if self._last:
            left, total = self._last["pages-left"], max(self._last["pages-total"], 1)
            done = max(0, min(30, 30 - round(30 * left / total)))
            table.add_row("round", str(self._last["round"]))
            table.add_row("pages left", f"{left:>10,}  [{'█' * done}{'·' * (30 - done)}]")
            table.add_row("sent", format_size(self._last["bytes-sent"]))
            table.add_row("bandwidth", f"{self._last['bandwidth-bytes-per-s'] / 1e6:,.0f} MB/s")
            table.add_row("dirty rate", f"{self._last['dirty-pages-per-s']:,.0f} pages/s")
            expected = self._last["expected-downtime-ms"]
            table.add_row(
                "expected downtime", "not known yet" if expected is None else f"{expected:.1f} ms"
            )
        return table


def print_report(report: dict[str, Any], uri: str) -> None:
    """The report of `send` (Report.to_json) for people."""
    from rich.console import Console
    from rich.table import Table

    # Without a terminal rich would fold the tables at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    ram = report["ram"]
    console.print(f"[bold]{report['status']}[/]: the guest runs at {uri}", soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in [
        ("total time", f"{report['total-time']:,.1f} ms (set-up {report['setup-time']:,.1f} ms)"),
        ("downtime", f"{report['downtime']:.2f} ms (limit {report['downtime-limit']:g} ms)"),
        ("memory", f"{format_size(ram['total'])}; sent {format_size(ram['transferred'])}"),
        ("pages", f"{ram['normal']:,} sent, {ram['duplicate']:,} zero"),
        ("bandwidth", f"{ram['mbps']:,.0f} Mbit/s, compression {report['compression']}"),
        ("dirty rate", f"{ram['dirty-pages-rate']:,.0f} pages/s"),
        ("verified", "all memory, at the switch" if report["verified"] else "-"),
    ]:
        facts.add_row(key, value)
    console.print(facts)

    rounds = Table(title="rounds", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("round", "dirty pages", "zero pages", "sent", "ms"):
        rounds.add_column(heading, justify="right")
    for row in report["rounds"]:
        rounds.add_row(
            str(row["round"]),
            f"{row['pages-dirty']:,}",
            f"{row['pages-zero']:,}",
            format_size(row["bytes-sent"]),
            f"{row['ms']:,.1f}",
        )
    console.print(rounds)

    phases = Table(title="downtime", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in report["downtime-phases"]:
        phases.add_column(name, justify="right")
    phases.add_column("sum", justify="right")
    times = report["downtime-phases"].values()
    phases.add_row(*(f"{ms:.2f} ms" for ms in times), f"{sum(times):.2f} ms")
    console.print(phases)

"""ps, stat, pause, resume, stop: questions to machines that run (layer 5)."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Any

import click

from migrate.cli.common import JSON_OPTION, NAME_ARGUMENT, print_json
from migrate.control import Client, RemoteError, ask, machine_names, socket_path
from migrate.errors import MachineStateError, MigrateError
from migrate.units import format_size

STOP_TIMEOUT_S = 40.0
PS_TIMEOUT_S = 2.0


@click.command("ps")
@JSON_OPTION
def ps_command(as_json: bool) -> None:
    """List the machines that run here.

    A machine that does not answer is listed as such; what dead ones left behind is not.
    """
    rows = machine_rows()
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("no machine runs here")
        return
    click.echo(f"{'NAME':<20} {'STATE':<14} {'PID':>8} {'CPUS':>5} {'MEMORY':>9}")
    for row in rows:
        memory = format_size(row["memory"]) if row.get("memory") else ""
        click.echo(
            f"{row['name']:<20} {row['state']:<14} {row['pid'] or '':>8} "
            f"{row.get('cpus', ''):>5} {memory:>9}"
        )


def _answers(name: str) -> bool:
    try:
        Client(name).socket.close()
    except MigrateError:
        return False
    return True


def machine_rows() -> list[dict[str, Any]]:
    """The status of every machine here."""
    rows: list[dict[str, Any]] = []
    for name in machine_names():
        try:
            rows.append(ask(name, "status", timeout_s=PS_TIMEOUT_S))
        except RemoteError:
            raise
        except MachineStateError:
            if _answers(name):
                rows.append({"name": name, "state": "not answering", "pid": None})
    return rows


@click.command("stat")
@NAME_ARGUMENT
@click.option(
    "--watch",
    type=click.FloatRange(min=0.05),
    is_flag=False,
    flag_value=1.0,
    default=None,
    metavar="[SECONDS]",
    help="Again every so many seconds (default 1), with the guest's dirty rate, until Ctrl-C.",
)
@JSON_OPTION
def stat_command(name: str, watch: float | None, as_json: bool) -> None:
    """Show a machine's counters.

    --watch arms the dirty log with a cursor of its own: a migration or a checkpoint that reads
    the log at the same time is not disturbed.
    """
    with Client(name) as client:
        if watch is None:
            stat = client.call("stat")
            if as_json:
                print_json(stat)
            else:
                click.echo("\n".join(_stat_lines(stat)))
            return
        try:
            _watch(client, watch, as_json)
        except KeyboardInterrupt:
            return


def _watch(client: Client, every_s: float, as_json: bool) -> None:
    live: Any = None
    if not as_json and sys.stdout.isatty():
        from rich.live import Live

        live = Live(auto_refresh=False)
    before: dict[str, Any] | None = None
    with live or nullcontext():
        while True:
            stat = client.call("stat", {"dirty": True})
            if as_json:
                print_json(stat)
            elif live is not None:
                live.update("\n".join(_stat_lines(stat, before)), refresh=True)
            else:
                click.echo(_watch_line(stat))
            before = stat
            time.sleep(every_s)


def _watch_line(stat: dict[str, Any]) -> str:
    rate = (stat.get("dirty") or {}).get("dirty-pages-rate")
    migration = stat.get("migration")
    parts = [f"{stat['name']}: {stat['state']}"]
    parts.append("dirty rate -" if rate is None else f"dirty rate {rate:,.0f} pages/s")
    if migration:
        parts.append(f"migrating: {migration.get('phase', '')}")
    return ", ".join(parts)


def _stat_lines(stat: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """For people: who, what, and the counters that say something."""
    lines = [f"{stat['name']}: {stat['state']} (process {stat['pid']})"]
    if "memory" in stat:
        mode = ", deterministic" if stat.get("deterministic") else ""
        lines.append(f"  memory {format_size(stat['memory'])}, {stat['cpus']} cpus{mode}")
    for slot in stat.get("definition", {}).get("slots", []):
        where = f" ({slot['backing']} {slot['path']})" if slot["path"] else f" ({slot['backing']})"
        lines.append(
            f"  slot {slot['name']}: {slot['gpa']:#x}, {format_size(slot['size_bytes'])}{where}"
        )
    stats = stat.get("stats", {})
    for key, value in stats.get("board", {}).items():
        line = f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {value}"
        if before and isinstance(value, int) and not isinstance(value, bool):
            change = value - before.get("stats", {}).get("board", {}).get(key, value)
            line += f"  (+{change:,})" if change else ""
        lines.append(line)
    for slot_name, log in stats.get("logs", {}).items():
        cursors = ", ".join(
            f"{name}: {cursor['pages']:,} pages dirty, epoch {cursor['epoch']}"
            for name, cursor in log["cursors"].items()
        )
        lines.append(f"  dirty log of {slot_name}: {log['backend']}; {cursors or 'no reader'}")
    dirty = stat.get("dirty")
    if dirty and dirty["dirty-pages-rate"] is not None:
        lines.append(
            f"  dirtied in {dirty['seconds']:.2f} s: {dirty['pages']:,} pages, "
            f"{dirty['dirty-pages-rate']:,.0f}/s"
        )
    if migration := stat.get("migration"):
        lines.append(f"  migrating: {migration.get('phase', '')}")
        progress = migration.get("progress", {})
        if "pages-left" in progress:
            lines.append(
                f"    round {progress['round']}, {progress['pages-left']:,} pages left, "
                f"{progress['bandwidth-bytes-per-s'] / 1e6:,.0f} MB/s"
            )
    return lines


@click.command("pause")
@NAME_ARGUMENT
@JSON_OPTION
def pause_command(name: str, as_json: bool) -> None:
    """Stop a machine's vcpus. Returns when they stand still."""
    _report(ask(name, "pause", timeout_s=STOP_TIMEOUT_S), as_json)


@click.command("resume")
@NAME_ARGUMENT
@JSON_OPTION
def resume_command(name: str, as_json: bool) -> None:
    """Let a machine's vcpus run again.

    Also the explicit word after a handover whose confirmation was lost (exit code 8 of `send`):
    look at the destination first, for only one side may run.
    """
    _report(ask(name, "resume", timeout_s=STOP_TIMEOUT_S), as_json)


@click.command("stop")
@NAME_ARGUMENT
@JSON_OPTION
def stop_command(name: str, as_json: bool) -> None:
    """End a machine.

    As if its power were cut. Returns when its process has let go of its name.
    """
    ask(name, "stop")
    path = socket_path(name)
    until = time.monotonic() + STOP_TIMEOUT_S
    while path.exists() and _answers(name):
        if time.monotonic() > until:
            raise MachineStateError(f"machine {name!r} has not ended after {STOP_TIMEOUT_S:.0f} s")
        time.sleep(0.01)
    _report({"name": name, "state": "stopped"}, as_json)


def _report(status: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(status)
    else:
        click.echo(f"{status['name']}: {status['state']}")

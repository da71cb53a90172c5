#!/usr/bin/env python3
"""Benchmark of a Debian guest: its boot against QEMU's, its speed while it is watched and while it
migrates, and how long it falls silent over a migration.

The bounds are those that this project sets itself. Everything runs in processes of its own, through
the command line's own machinery. `tools/bench_linux.py --help` lists the options.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import qemu_peer
from fetch_linux import FetchError, LinuxGuest, ensure
from linux_measure import (
    APPEND,
    Guest,
    MeasureError,
    boot_time_s,
    build_initrd,
    rate,
    rate_for,
    send,
    silence,
    turns,
    watched,
)
from rich.console import Console
from rich.table import Table

from migrate.cli.demo_stage import open_stage
from migrate.errors import MigrateError, UsageError
from migrate.units import MIB, PAGE_SIZE, parse_size

BOOT_MEMORY = 256 * MIB
WINDOW_S = 2.0
WATCH_WINDOWS = 3
WATCH_BOUND, MIGRATION_BOUND, GAP_BOUND_MS = 1.05, 1.3, 30.0
KINDS = ("forks", "hash")
FILL_SHARE = 0.7
"""Of the guest's RAM, filled before it migrates, so that the migration takes its time."""


@dataclass(frozen=True, slots=True)
class Check:
    """One bound and what was measured."""

    what: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound


@dataclass
class Results:
    """What was measured, by what it is called; `rows` has a unit and every run."""

    rows: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, unit: str, value: float) -> None:
        self.rows.setdefault(name, (unit, []))[1].append(value)

    def median(self, name: str) -> float | None:
        return statistics.median(self.rows[name][1]) if name in self.rows else None

    def checks(self) -> list[Check]:
        found = []
        ours, theirs = self.median("boot to shell, migrate"), self.median("boot to shell, QEMU")
        if ours and theirs:
            found.append(Check("boot to shell / QEMU's", ours / theirs, 1.0))
        for kind in KINDS:
            for name, bound in (
                (f"{kind}, watched every 1 s", WATCH_BOUND),
                (f"{kind}, watched every 0.1 s", WATCH_BOUND),
                (f"{kind}, migrating", MIGRATION_BOUND),
            ):
                slower = self.median(name)
                if slower is not None:
                    found.append(Check(f"{name}: times slower", slower, bound))
        gap = self.median("silence at the switch")
        if gap is not None:
            found.append(Check("silence at the switch, ms", gap, GAP_BOUND_MS))
        return found


Step = Callable[[Results, LinuxGuest, argparse.Namespace], None]


def measure_boot(results: Results, linux: LinuxGuest, options: argparse.Namespace) -> None:
    """Both load the same kernel and initrd; the clock starts with the process."""
    images = ["--kernel", linux.kernel, "--initrd", linux.initrd, "--append", APPEND]
    memory = f"{BOOT_MEMORY // MIB}M"
    with open_stage():
        results.add(
            "boot to shell, migrate", "s",
            boot_time_s([
                sys.executable, "-m", "migrate", "run", "--name", "boot",
                "--memory", str(BOOT_MEMORY), "--cpus", str(options.cpus),
                "--console", "stdio", *images,
            ]),
        )  # fmt: skip
    if shutil.which(qemu_peer.BINARY):
        results.add(
            "boot to shell, QEMU", "s",
            boot_time_s([
                qemu_peer.BINARY, "-M", "virt", "-m", memory, "-smp", str(options.cpus),
                "-nographic", "-no-reboot", "-accel", "tcg",
                *[argument.replace("--", "-") for argument in images],
            ]),
        )  # fmt: skip


def measure_watched(results: Results, linux: LinuxGuest, options: argparse.Namespace) -> None:
    """The loops' rates while `stat --watch` harvests, each between two windows without it."""
    with open_stage() as stage:
        initrd = build_initrd(linux, stage.directory)
        guest = Guest(stage, linux, initrd, BOOT_MEMORY, options.cpus)
        for kind in KINDS:
            guest.start_loop(kind)
            time.sleep(WINDOW_S)  # the emulator translates what the loop runs through
            for every_s in (1.0, 0.1):
                before = rate_for(guest.console, kind, WINDOW_S)
                for _ in range(WATCH_WINDOWS):
                    with watched(guest.name, every_s):
                        beside = rate_for(guest.console, kind, WINDOW_S)
                    after = rate_for(guest.console, kind, WINDOW_S)
                    name = f"{kind}, watched every {every_s:g} s"
                    results.add(name, "× slower", (before + after) / 2 / beside)
                    before = after
            results.add(f"{kind}, alone", "turns/s", before)
            guest.interrupt()


def measure_migrating(results: Results, linux: LinuxGuest, options: argparse.Namespace) -> None:
    """The loops' rates while all of a filled RAM goes over, at whatever speed it can."""
    block = 32 * MIB
    count = int(options.ram * FILL_SHARE) // block
    fill = (
        f"dd if=/dev/urandom of=/mnt/fill bs=64k "
        f"count={block // 65536} 2>/dev/null\ni=1\n"
        f"while [ $i -lt {count} ]; do cp /mnt/fill /mnt/fill$i; i=$((i + 1)); done\n"
    )
    with open_stage() as stage:
        initrd = build_initrd(linux, stage.directory, fill)
        guest = Guest(stage, linux, initrd, options.ram, options.cpus)
        for kind in KINDS:
            name, here = guest.name, guest.console
            uri, there = guest.prepare_move()
            guest.start_loop(kind)
            alone = rate_for(here, kind, WINDOW_S)
            move = send(name, uri)
            while_moving = rate(turns(here, kind), move.rounds_began, move.rounds_ended)
            guest.console = there
            guest.interrupt()
            sent = move.report["ram"]["normal"] * PAGE_SIZE
            results.add(f"{kind}, migrating", "× slower", alone / while_moving)
            seconds = move.rounds_ended - move.rounds_began
            results.add(f"{kind}, migrating: speed", "MB/s", sent / seconds / 1e6)
            results.add(f"{kind}, migrating: time", "ms", move.report["total-time"])


def measure_silence(results: Results, linux: LinuxGuest, options: argparse.Namespace) -> None:
    """Beats every 10 ms or so, beside both loops, over a move."""
    with open_stage() as stage:
        initrd = build_initrd(linux, stage.directory)
        guest = Guest(stage, linux, initrd, BOOT_MEMORY, options.cpus)
        guest.shell(
            "loop-forks > /dev/null & loop-hash > /dev/null & loop-beat & renice -n -20 -p $!"
        )
        for _ in range(3):
            name, here = guest.name, guest.console
            uri, there = guest.prepare_move()
            time.sleep(3.0)
            move = send(name, uri)
            time.sleep(1.0)
            guest.console = there
            heard = silence(here, there, move)
            results.add("silence at the switch", "ms", heard.gap_ms)
            results.add("longest silence from start to end", "ms", heard.worst_ms)
            results.add("beats' distance", "ms", heard.usual_ms)
            results.add("longest silence before (99 %)", "ms", heard.usual_worst_ms)
            results.add("downtime reported", "ms", move.report["downtime"])


STEPS: dict[str, Step] = {
    "boot": measure_boot,
    "watched": measure_watched,
    "migrating": measure_migrating,
    "silence": measure_silence,
}


def show(results: Results, checks: list[Check], options: argparse.Namespace, out: Console) -> None:
    table = Table(title=f"Debian guest, {options.cpus} vcpu, medians of {options.runs} runs")
    for heading in ("what", "median", "least", "most", "unit"):
        table.add_column(heading, justify="left" if heading in ("what", "unit") else "right")
    for name, (unit, values) in results.rows.items():
        figures = (f"{f(values):.2f}" for f in (statistics.median, min, max))
        table.add_row(name, *figures, unit)
    out.print(table)
    bounds = Table(title="Bounds")
    for heading in ("what", "measured", "at most", ""):
        bounds.add_column(
            heading, justify="right" if heading in ("measured", "at most") else "left"
        )
    for check in checks:
        mark = "[green]holds[/]" if check.holds else "[red]missed[/]"
        bounds.add_row(check.what, f"{check.value:.2f}", f"{check.bound:g}", mark)
    out.print(bounds)
    for failure in results.failures:
        out.print(f"failed: {failure}", style="red")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--runs", type=int, default=3, metavar="N", help="runs of each part (default 3)")
    add("--cpus", type=int, default=1, metavar="N", help="the guest's vcpus (default 1)")
    add("--ram", default="2GiB", metavar="SIZE", help="RAM of what migrates (default 2GiB)")
    add("--only", action="append", choices=list(STEPS), help="only this part (may be repeated)")
    add("--json", metavar="FILE", help="write every run to FILE ('-': standard output, no table)")
    add("--check", action="store_true", help="exit with 1 if a bound is missed or a part failed")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    out, say = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    try:
        options.ram = parse_size(options.ram)
        linux = ensure()
    except (UsageError, FetchError) as error:
        say.print(f"bench_linux: {error}")
        return 2
    results = Results()
    for number in range(1, options.runs + 1):
        for name in options.only or STEPS:
            say.print(f"run {number}: {name}")
            try:
                STEPS[name](results, linux, options)
            except (MeasureError, MigrateError) as error:
                results.failures.append(f"{name}, run {number}: {error}")
                say.print(results.failures[-1], style="red", markup=False)
    checks = results.checks()
    host = {
        "cpus": os.cpu_count(), "kernel": os.uname().release, "qemu": qemu_peer.version(),
        "load": os.getloadavg()[0], "guest": linux.version,
    }  # fmt: skip
    if options.json:
        document = {
            "host": host,
            "measured": {
                name: {"unit": unit, "runs": values}
                for name, (unit, values) in results.rows.items()
            },
            "checks": [asdict(check) | {"holds": check.holds} for check in checks],
            "failures": results.failures,
        }
        text = json.dumps(document, indent=2) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.json != "-":
        out.print(
            f"{host['cpus']} CPUs, Linux {host['kernel']}, QEMU {host['qemu'] or 'absent'}, "
            f"guest {linux.version}; load of the machine at the end: {host['load']:.1f}"
        )
        show(results, checks, options, out)
    missed = any(not check.holds for check in checks) or bool(results.failures)
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

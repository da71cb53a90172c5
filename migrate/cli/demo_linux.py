"""demo --linux: Debian's kernel and a shell at work move between two processes (layer 5).

The guest is fetched by `tools/fetch_linux.py`, which lies beside the package in a checkout.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

import migrate
from migrate.cli.demo import move
from migrate.cli.demo_stage import ConsoleReader, Stage, say, show
from migrate.errors import HostError, MigrationFailed
from migrate.units import format_size

FETCH_TIMEOUT_S = 1800.0
BOOT_TIMEOUT_S = 120.0
APPEND = "console=ttyS0 no4lvl"

WORK = (
    "dd if=/dev/urandom of=data bs=64k count=64 2>/dev/null; "
    "want=$(sha256sum <data); n=0; echo START-WORK; "
    "while :; do n=$((n+1)); cp data copy; got=$(cat copy | sha256sum); "
    '[ "$got" = "$want" ] && echo "tick $n ok, up $(cut -d" " -f1 /proc/uptime)" '
    '|| echo "WRONG $n"; done\n'
)
"""Processes, pipes, file writes, hashing and a counter, checked at every turn."""


def fetched() -> dict[str, Any]:
    """Paths of kernel and initrd, fetched on first use. Raises HostError."""
    assert migrate.__file__ is not None
    tool = Path(migrate.__file__).parent.parent / "tools" / "fetch_linux.py"
    if not tool.exists():
        raise HostError("demo --linux needs tools/fetch_linux.py: run it from a checkout")
    try:
        done = subprocess.run(
            [sys.executable, tool, "--json"],
            stdout=subprocess.PIPE, text=True, timeout=FETCH_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise HostError(f"the Linux guest was not fetched within {FETCH_TIMEOUT_S:g} s") from None
    if done.returncode:
        raise HostError("the Linux guest could not be fetched (see above)")
    paths = json.loads(done.stdout)
    assert isinstance(paths, dict)
    return paths


def demo_linux(stage: Stage, memory: int, downtime_limit: str) -> None:
    """The whole of it. Raises MigrationFailed if anything was wrong."""
    say("fetching Debian's riscv64 kernel and busybox (cached after the first time)")
    paths = fetched()
    show(f"Linux {paths['version']}")

    say(f"booting it in {format_size(memory)} of memory")
    stage.start(
        "run", "--memory", str(memory), "--kernel", paths["kernel"],
        "--initrd", paths["initrd"], "--append", APPEND, name="here",
    )  # fmt: skip
    here = ConsoleReader("here")
    show(here.wait_for(r"^.*the shell is ready.*$", BOOT_TIMEOUT_S)[0].strip())
    here.type(WORK)
    begun = here.wait_for(r"^START-WORK", 60)
    here.wait_for(r"^tick 3 ", 60, after=begun.end())
    _show_ticks(here.text)

    _, there = move(stage, memory, downtime_limit)
    here.wait_end(15)
    here.close()

    say("the work goes on at the destination")
    last = _ticks(here.text)[-1]
    there.wait_for(rf"^tick {last + 6} ", 120)
    cut = here.text.rpartition("\n")[2]
    _show_ticks(cut + there.text)
    ticks = _ticks(here.text + there.text)
    if ticks != list(range(1, len(ticks) + 1)):
        raise MigrationFailed(f"the guest's counter did not carry on: {ticks[-20:]}")
    if re.search(r"^WRONG", here.text + there.text, re.M):
        raise MigrationFailed("a hash came out wrong: the guest's memory or files were damaged")
    show(f"{len(ticks)} turns without a gap or a wrong hash, {last} of them before the move")

    say("and its shell still listens")
    position = len(there.text)
    there.type("\x03")
    there.type("echo $(uname -sm), $n turns; dmesg | grep -ciE 'oops|bug:|stall|panic'\n")
    answer = there.wait_for(r"^(Linux .*)\n+(\d+)\r?$", 60, after=position)
    show(answer[1].strip())
    if answer[2] != "0":
        there.type("dmesg | tail -n 40\n")
        there.wait_for(r"\n.*\n.*# $", 10, after=answer.end())
        click.echo(there.text[answer.end() :])
        raise MigrationFailed("the guest's kernel complained (its log is above)")
    there.close()


def _ticks(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^tick (\d+) ok", text, re.M)]


def _show_ticks(text: str) -> None:
    for line in re.findall(r"^tick .*$", text, re.M)[:3]:
        show(line.strip())

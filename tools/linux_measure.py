"""What the benchmark of Linux guests measures with: guests in processes of their own, their
consoles, the rate of a loop in the guest, and moves between processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch_linux import LinuxGuest

from migrate.cli.demo_stage import ConsoleReader, Stage
from migrate.control import Client

READY = r"the shell is ready"
APPEND = "console=ttyS0 no4lvl quiet"
PROMPT = r"^~ # "
START_TIMEOUT_S = 120.0
SILENCE_TIMEOUT_S = 10.0
FEWEST_TURNS = 10
"""Of a loop, for its rate to mean anything."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Work that goes on in the guest; `line` matches what it prints for each turn."""

    command: str
    line: str


LOOPS = {
    # fork, exec, exit and wait, by busybox's shell
    "forks": Loop(
        "n=0; while :; do /bin/busybox true; n=$((n + 1)); echo forks $n; done", r"^forks \d+$"
    ),
    # SHA-256 of 128 KiB, by one process
    "hash": Loop(
        "while :; do sha256sum $(yes /mnt/block | head -n 500); done", r"^[0-9a-f]{64}  /mnt/block$"
    ),
    # the shell sleeps in a poll with a time limit
    "beat": Loop(
        "mkfifo /mnt/beat; exec 3<>/mnt/beat; "
        'while :; do read -t 0.01 nothing <&3; read up idle < /proc/uptime; echo "beat $up"; done',
        r"^beat [\d.]+$",
    ),
}
FILES = {
    f"bin/loop-{name}": f"#!/bin/sh\n{loop.command}\n".encode() for name, loop in LOOPS.items()
}
RC = """\
mount -t tmpfs -o size=95% none /mnt
dd if=/dev/urandom of=/mnt/block bs=64k count=2 2>/dev/null
"""


class MeasureError(Exception):
    """The guest or a machine did not do what it was asked."""


def build_initrd(guest: LinuxGuest, directory: Path, rc: str = "") -> Path:
    path = directory / "initrd.cpio"
    path.write_bytes(guest.build_initrd(rc=RC + rc, files=FILES))
    return path


def boot_time_s(command: list[str], environment: dict[str, str] | None = None) -> float:
    """From the start of the process to the guest's shell on its standard output."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    text = b""
    try:
        while READY.encode() not in text:
            left = started + START_TIMEOUT_S - time.monotonic()
            readable = left > 0 and select.select([process.stdout], [], [], left)[0]
            data = os.read(process.stdout.fileno(), 65536) if readable else b""
            if not data:
                raise MeasureError(f"{command[0]} brought up no shell: {text[-500:]!r}")
            text += data
        return time.monotonic() - started
    finally:
        process.kill()
        process.communicate()


class Guest:
    """A Linux guest in a process of its own, that moves from process to process."""

    def __init__(
        self, stage: Stage, linux: LinuxGuest, initrd: Path, memory: int, cpus: int
    ) -> None:
        self._stage = stage
        self._memory = memory
        self._number = 0
        stage.start(
            "run", "--memory", str(memory), "--cpus", str(cpus), "--prealloc",
            "--kernel", linux.kernel, "--initrd", str(initrd), "--append", APPEND, name="guest0",
        )  # fmt: skip
        self.console = ConsoleReader("guest0")
        self.console.wait_for(READY, START_TIMEOUT_S)
        self.console.wait_for(PROMPT, START_TIMEOUT_S)

    @property
    def name(self) -> str:
        return f"guest{self._number}"

    def shell(self, command: str) -> str:
        """What a command prints. Nothing else may be printing."""
        start = len(self.console.text)
        self.console.type(f"{command}; echo do''ne{start}\n")
        match = self.console.wait_for(rf"^done{start}\r?\n", START_TIMEOUT_S, after=start)
        return self.console.text[start : match.start()].replace("\r", "").partition("\n")[2]

    def start_loop(self, kind: str) -> None:
        """In the foreground of the guest's shell, until `interrupt`."""
        start = len(self.console.text)
        self.console.type(f"loop-{kind}\n")
        line = LOOPS[kind].line.replace("$", "\r?\n")
        self.console.wait_for(line, START_TIMEOUT_S, after=start)

    def interrupt(self) -> None:
        """Ctrl-C, and the prompt."""
        start = len(self.console.text)
        self.console.type("\x03")
        self.console.wait_for(PROMPT, START_TIMEOUT_S, after=start)

    def prepare_move(self) -> tuple[str, ConsoleReader]:
        """A process that is ready to receive: its address, and its console."""
        self._number += 1
        uri = f"unix:{self._stage.directory}/to-{self._number}"
        self._stage.start(
            "receive", "--listen", uri, "--prealloc", str(self._memory), name=self.name
        )
        return uri, ConsoleReader(self.name)


@dataclass(frozen=True, slots=True)
class Move:
    """A migration: the report of `send`, and when (CLOCK_MONOTONIC, s) its rounds began and
    ended.
    """

    report: dict[str, Any]
    rounds_began: float
    rounds_ended: float


def send(name: str, uri: str, **arguments: Any) -> Move:
    """Move a machine. Raises MigrateError."""
    phases: dict[str, float] = {}

    def note(event: dict[str, Any]) -> None:
        if event.get("event") == "phase-entered":
            phases[str(event["phase"])] = time.monotonic()

    with Client(name) as client:
        report = client.call("send", {"uri": uri, **arguments}, on_event=note, timeout_s=None)
    return Move(report, phases["rounds"], phases["switchover"])


def turns(console: ConsoleReader, kind: str, after: int = 0) -> list[float]:
    """When the lines of a loop (or of the beats) ended, in seconds of CLOCK_MONOTONIC."""
    line = re.compile(LOOPS[kind].line.replace("$", "\r?\n"), re.M)
    return [console.arrived(match.end() - 1) for match in line.finditer(console.text, after)]


def rate(times: list[float], began: float, ended: float) -> float:
    """Turns a second in a window of time. Raises MeasureError if there were too few."""
    inside = [at for at in times if began <= at <= ended]
    if len(inside) < FEWEST_TURNS:
        raise MeasureError(f"only {len(inside)} turns of the loop in {ended - began:.2f} s")
    return (len(inside) - 1) / (inside[-1] - inside[0])


def rate_for(console: ConsoleReader, kind: str, seconds: float) -> float:
    """The loop's rate over so many seconds from now."""
    position, began = len(console.text), time.monotonic()
    time.sleep(seconds)
    return rate(turns(console, kind, position), began, time.monotonic())


@contextlib.contextmanager
def watched(name: str, every_s: float) -> Iterator[None]:
    """`migrate stat --watch` beside the guest, once it is under way."""
    process = subprocess.Popen(
        [sys.executable, "-m", "migrate", "stat", name, "--watch", str(every_s), "--json"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        if not process.stdout.readline() or not process.stdout.readline():
            raise MeasureError(f"`migrate stat {name} --watch` ended with {process.wait()}")
        yield
        if process.poll() is not None:
            raise MeasureError(f"`migrate stat {name} --watch` ended with {process.returncode}")
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True, slots=True)
class Silence:
    """How long the guest was not heard over a move, ms, less the beats' usual distance."""

    gap_ms: float
    worst_ms: float
    """The longest silence from the move's start to half a second after its end."""
    usual_ms: float
    """Between two beats, the median."""
    usual_worst_ms: float
    """The 99th percentile of the distances before the move, less the median."""


def silence(here: ConsoleReader, there: ConsoleReader, move: Move) -> Silence:
    """What the consoles of both sides tell about the beats over a move."""
    # The line that the switch cut in two begins here and ends there: only its end counts.
    before = turns(here, "beat")
    first_end = there.wait_for(r"\n", SILENCE_TIMEOUT_S).end()
    cut = here.text[here.text.rindex("\n") + 1 :] + there.text[:first_end]
    after = turns(there, "beat", first_end)
    if re.search(LOOPS["beat"].line, cut.replace("\r", ""), re.M):
        after.insert(0, there.arrived(first_end - 1))
    quiet = [b - a for a, b in itertools.pairwise(t for t in before if t < move.rounds_began)]
    if len(quiet) < 100 or not after:
        raise MeasureError(f"only {len(quiet)} beats before the move, {len(after)} after it")
    usual = statistics.median(quiet)
    near = [t for t in before + after if move.rounds_began <= t <= after[0] + 0.5]
    worst = max(b - a for a, b in itertools.pairwise(near))
    return Silence(
        gap_ms=(after[0] - before[-1] - usual) * 1e3,
        worst_ms=(worst - usual) * 1e3,
        usual_ms=usual * 1e3,
        usual_worst_ms=(statistics.quantiles(quiet, n=100)[98] - usual) * 1e3,
    )

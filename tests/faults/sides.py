"""A migration's two sides as processes: machines of the command line with consoles in files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.control import Client
from migrate.vm import guest
from migrate.vm.guest import Heartbeat, Request, Verdict
from tests.cli.cli_process import Cli, gone, until

RAM_MIB = 8
GUEST = ("--memory", f"{RAM_MIB}MiB", "--working-set", "1MiB", "--rate", "2000", "--pattern",
         "random")  # fmt: skip


@dataclass
class Side:
    """A machine's process, or one that waits for a guest."""

    cli: Cli
    name: str
    pid: int
    console: Path
    uri: str = ""

    def reports(self) -> list[Any]:
        return list(guest.Console().feed(self.console.read_bytes()))

    def beats(self) -> int:
        return sum(isinstance(report, Heartbeat) for report in self.reports())

    def lives(self, more: int = 3) -> None:
        """Its guest goes on."""
        before = self.beats()
        until(lambda: self.beats() >= before + more, f"{self.name} beats {more} times more")

    def stands(self, seconds: float = 0.15) -> bool:
        """Does its guest, if there is one, stand still?"""
        time.sleep(0.05)  # what it printed before may be on its way to the file
        before = self.console.stat().st_size
        time.sleep(seconds)
        return self.console.stat().st_size == before

    def verify(self) -> Verdict:
        """Its guest derives all of its memory again; it must be right."""

        def verdicts() -> list[Verdict]:
            return [report for report in self.reports() if isinstance(report, Verdict)]

        before = len(verdicts())
        with Client(self.name) as client:
            client.console()[0].sendall(Request.VERIFY.value)
            until(lambda: len(verdicts()) > before, f"the verdict of {self.name}")
        verdict = verdicts()[-1]
        assert verdict.clean, verdict
        return verdict

    @property
    def state(self) -> str | None:
        return self.cli.state_of(self.name)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def ended(self) -> None:
        until(lambda: gone(self.pid), f"{self.name} has ended")


class Sides:
    """Makes them, by names that count up."""

    def __init__(self, cli: Cli) -> None:
        self.cli = cli
        self._number = 0

    def _next(self) -> tuple[str, Path]:
        self._number += 1
        name = f"m{self._number}"
        console = self.cli.runtime / f"{name}.console"
        console.touch()
        return name, console

    def guest(self, *options: str) -> Side:
        """A machine with our own guest, detached."""
        name, console = self._next()
        started = self.cli.json(
            "run", "--name", name, *GUEST, *options, "--console", f"file:{console}", "--detach"
        )
        return Side(self.cli, name, started["pid"], console)

    def destination(self, *options: str, uri: str = "tcp:127.0.0.1:0") -> Side:
        """A `receive`, detached."""
        name, console = self._next()
        started = self.cli.json(
            "receive", "--listen", uri, "--name", name, *options,
            "--console", f"file:{console}", "--detach",
        )  # fmt: skip
        return Side(self.cli, name, started["pid"], console, started["uri"])

    def waiting(self, *options: str, named: bool = True) -> tuple[Side, Waiting]:
        """A `receive` in the foreground, whose messages and exit code are of interest."""
        name, console = self._next()
        errors = self.cli.runtime / f"{name}.stderr"
        with errors.open("wb") as stderr:
            process = self.cli.background(
                "receive", "--listen", "tcp:127.0.0.1:0", *options,
                *(["--name", name] if named else []),
                "--console", f"file:{console}", stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"machine '(\S+)' .*listens at (\S+)$", line)
        assert match, (line, errors.read_text())
        side = Side(self.cli, match[1], process.pid, console, match[2])
        return side, Waiting(process, errors)


@dataclass
class Waiting:
    """A command in the foreground, and what it says."""

    process: subprocess.Popen[str]
    errors: Path

    @property
    def text(self) -> str:
        return self.errors.read_text()

    def ends(self, code: int) -> str:
        """It has to end so, and without a trace; what it said."""
        self.process.wait(40)
        text = self.text
        assert self.process.returncode == code, (self.process.returncode, text)
        assert "Traceback" not in text, text
        assert "unexpected" not in text, text
        return text


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]

"""This project as a peer of the benchmark: its command line, run as a user would run it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_peer import (
    MIGRATE_TIMEOUT_S,
    START_TIMEOUT_S,
    BenchError,
    Case,
    ConsoleReader,
    Figures,
    Peer,
    free_port,
)

SOURCE, DESTINATION = "bench-source", "bench-destination"


class MigratePeer(Peer):
    """`migrate run`, `receive` and `send`; `extra` goes to `send` (as `--compression none`)."""

    name = "migrate"

    def __init__(self, scratch: Path, case: Case, extra: tuple[str, ...] = ()) -> None:
        super().__init__(scratch, case)
        self._extra = extra
        self._uri = f"tcp:127.0.0.1:{free_port()}"
        self._consoles: list[ConsoleReader] = []
        runtime = scratch / "run"
        runtime.mkdir(mode=0o700)
        self._environment = os.environ | {"MIGRATE_RUNTIME_DIR": str(runtime)}

    def _run(self, *arguments: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """Standard output of one command. Raises BenchError."""
        command = [sys.executable, "-m", "migrate", *arguments]
        try:
            done = subprocess.run(
                command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, check=False, timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BenchError(f"`migrate {arguments[0]}` took over {timeout_s:.0f} s") from None
        if done.returncode:
            raise BenchError(
                f"`migrate {' '.join(arguments)}` ended with {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-400:]}"
            )
        return done.stdout

    def start(self) -> None:
        size = str(self.case.parameters.ram_bytes)
        # The destination first: populating its RAM is not to disturb the guest.
        prealloc = ["--prealloc", size] if self.case.destination_populated else []
        self._run(
            "receive", "--listen", self._uri, "--name", DESTINATION,
            "--console", f"unix:{self.scratch / 'destination.console'}", *prealloc, "--detach",
        )  # fmt: skip
        self.destination = self._reader("destination")
        self._run(
            "run", "--name", SOURCE, "--memory", size, "--firmware", str(self.image),
            "--console", f"unix:{self.scratch / 'source.console'}", "--detach",
        )  # fmt: skip
        self.source = self._reader("source")

    def _reader(self, role: str) -> ConsoleReader:
        reader = ConsoleReader(self.scratch / f"{role}.console")
        self._consoles.append(reader)
        return reader

    def migrate(self) -> Figures:
        limit = self.case.downtime_limit_ms
        limits = ["--downtime-limit", f"{limit}ms"] if limit is not None else []
        began = time.monotonic()
        output = self._run(
            "send", SOURCE, self._uri, *limits, *self._extra, "--json",
            timeout_s=MIGRATE_TIMEOUT_S,
        )  # fmt: skip
        wall = time.monotonic() - began
        report = _last_object(output)
        if report.get("status") != "completed":
            raise BenchError(f"the migration ended as {report.get('status')!r}: {report}")
        return Figures.of(report, wall)

    def close(self) -> None:
        for name in (SOURCE, DESTINATION):
            with contextlib.suppress(BenchError):  # it may have ended by itself
                self._run("stop", name)
        for reader in self._consoles:
            reader.close()


def _last_object(output: str) -> dict[str, Any]:
    """The object that ends the output: one line, or printed over several."""
    lines = output.rstrip().splitlines()
    for first in range(len(lines) - 1, -1, -1):
        if lines[first].startswith("{"):
            with contextlib.suppress(ValueError):
                value: dict[str, Any] = json.loads("\n".join(lines[first:]))
                return value
    raise BenchError(f"`migrate send --json` printed no object: {output[-200:]!r}")

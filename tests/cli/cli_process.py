"""Running `migrate` as users do: processes of its own, in a runtime directory of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate.cli.machines import machine_rows
from migrate.control import ask

TIMEOUT_S = 60.0
SMALL = ("--memory", "16MiB")


class Cli:
    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.environment = {
            **os.environ, "MIGRATE_RUNTIME_DIR": str(runtime), "PYTHONWARNINGS": "error",
            "MIGRATE_DEBUG": "0",
        }  # fmt: skip
        self._background: list[subprocess.Popen[str]] = []

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "migrate", *arguments]

    def run(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """A command that ends; its exit code has to be `code`, and it shows no trace."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True,
            timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        """What a command prints with --json: one value."""
        return json.loads(self.run(*arguments, "--json", code=code).stdout)

    def background(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A command that goes on."""
        options = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            **options,
        }  # fmt: skip
        process = subprocess.Popen(
            self.command(*arguments), env=self.environment, text=True, **options
        )
        self._background.append(process)
        return process

    def machines(self) -> dict[str, str]:
        """Name → state of what runs, as `ps` finds it (asked here, which is quicker)."""
        return {row["name"]: row["state"] for row in machine_rows()}

    def state_of(self, name: str) -> str | None:
        return self.machines().get(name)

    def stat(self, name: str) -> Any:
        """As `stat --json`, asked here."""
        return ask(name, "stat")

    def close(self) -> None:
        for process in self._background:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for row in machine_rows():
            if row["pid"]:
                os.kill(row["pid"], signal.SIGKILL)


def until(reached: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"not reached: {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Has the process ended (be it that its parent has not asked yet)?"""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"

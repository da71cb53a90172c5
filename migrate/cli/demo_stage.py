"""What a demo stands on: machines as processes of their own, and their consoles (layer 5)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from migrate.control import Client, RemoteError
from migrate.errors import MachineStateError, MigrateError, MigrationFailed

START_TIMEOUT_S = 120.0


def say(text: str) -> None:
    """A step of the demo."""
    click.secho(f"── {text}", bold=True)


def show(text: str) -> None:
    """What comes of it."""
    click.echo(f"   {text}")


class Stage:
    """A place for machines: a runtime directory of its own, nothing left in it at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._names: list[str] = []

    def start(self, *arguments: str, name: str) -> dict[str, Any]:
        """`migrate ARGUMENTS --name NAME --detach` in a process of its own, as a user would.

        Raises the error that it ended with.
        """
        self._names.append(name)
        command = [sys.executable, "-m", "migrate", *arguments]
        try:
            done = subprocess.run(
                [*command, "--name", name, "--detach", "--json"],
                capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise MigrateError(
                f"machine {name!r} was not there after {START_TIMEOUT_S:g} s"
            ) from None
        if done.returncode:
            message = done.stderr.strip().removeprefix("migrate: ")
            raise RemoteError("MigrateError", message, done.returncode)
        fields = json.loads(done.stdout)
        assert isinstance(fields, dict)
        return fields

    def close(self) -> None:
        """End what still runs."""
        for name in self._names:
            with contextlib.suppress(MigrateError), Client(name) as client:
                client.call("stop", timeout_s=30.0)
                client.socket.settimeout(30.0)
                # The process closes the connection when it has given everything back.
                with contextlib.suppress(OSError):
                    while client.socket.recv(4096):
                        pass


@contextlib.contextmanager
def open_stage() -> Iterator[Stage]:
    """The runtime directory is this process's and its children's meanwhile."""
    before = os.environ.get("MIGRATE_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="migrate-demo-") as directory:
        os.environ["MIGRATE_RUNTIME_DIR"] = directory
        stage = Stage(Path(directory))
        try:
            yield stage
        finally:
            stage.close()
            if before is None:
                del os.environ["MIGRATE_RUNTIME_DIR"]
            else:
                os.environ["MIGRATE_RUNTIME_DIR"] = before


class ConsoleReader:
    """A machine's console from its first byte on, read by a thread until the machine ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = False
        self._text = ""
        self._arrivals: list[tuple[int, float]] = []
        self._news = threading.Condition()
        self._client = Client(name)
        self._socket, past = self._client.console()
        self._thread = threading.Thread(target=self._read, args=(past,), daemon=True)
        self._thread.start()

    def type(self, text: str) -> None:
        self._socket.sendall(text.encode())

    @property
    def text(self) -> str:
        with self._news:
            return self._text

    def arrived(self, position: int) -> float:
        """When the text at `position` came, on the monotonic clock."""
        with self._news:
            return next(at for end, at in self._arrivals if end > position)

    def lines(self) -> list[str]:
        """All complete lines so far."""
        return self.text.replace("\r", "").split("\n")[:-1]

    def wait_for(self, pattern: str, timeout_s: float, *, after: int = 0) -> re.Match[str]:
        """The first match past position `after` of the text. Raises MigrationFailed."""
        return self.wait(
            lambda text: re.compile(pattern, re.M).search(text, after), timeout_s, repr(pattern)
        )

    def wait(
        self, found: Callable[[str], re.Match[str] | None], timeout_s: float, what: str
    ) -> re.Match[str]:
        until = time.monotonic() + timeout_s
        with self._news:
            while (match := found(self._text)) is None:
                left = until - time.monotonic()
                if left <= 0 or self.ended:
                    why = "has ended" if self.ended else f"said nothing of it in {timeout_s:g} s"
                    tail = self._text[-300:].strip()
                    raise MigrationFailed(f"waited for {what}, but {self.name!r} {why}: …{tail}")
                self._news.wait(left)
            return match

    def wait_end(self, timeout_s: float) -> None:
        """Until the machine is gone. Raises MachineStateError."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise MachineStateError(f"machine {self.name!r} still runs after {timeout_s:g} s")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(2)
        self._socket.close()

    def _read(self, past: bytes) -> None:
        data = past
        while True:
            with self._news:
                self._text += data.decode("utf-8", "replace")
                self._arrivals.append((len(self._text), time.monotonic()))
                self._news.notify_all()
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                with self._news:
                    self.ended = True
                    self._news.notify_all()
                return

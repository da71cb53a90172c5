"""QEMU as the peer of the benchmark: two `qemu-system-riscv64` with our guest, driven over QMP."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
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

from migrate.units import GIB

BINARY = "qemu-system-riscv64"
POLL_S = 0.02
UNLIMITED_BYTES_PER_S = 1024 * GIB
"""QEMU's default is 128 MiB/s."""


def version() -> str | None:
    """QEMU's version; None where it is not installed."""
    if shutil.which(BINARY) is None:
        return None
    done = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split("(")[0].split("version")[-1].strip()


class Qmp:
    """A QMP connection: one command at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(START_TIMEOUT_S)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    log = path.with_suffix(".log").read_text("utf-8", "replace").strip()
                    raise BenchError(f"QEMU does not answer at {path.name}: {log[-400:]}") from None
                time.sleep(0.01)
        self._lines = self._socket.makefile("rb")
        self._answer()  # the greeting
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: Any) -> Any:
        """The command's return value. Raises BenchError."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): v for key, v in arguments.items()}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answer()
        while "event" in answer:
            answer = self._answer()
        if "error" in answer:
            raise BenchError(f"QEMU refuses {command}: {answer['error'].get('desc')}")
        return answer.get("return")

    def _answer(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise BenchError("QEMU closed its control socket")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class QemuPeer(Peer):
    """Plain pre-copy over one TCP connection, no limit on bandwidth."""

    name = "qemu"

    def __init__(self, scratch: Path, case: Case) -> None:
        super().__init__(scratch, case)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._controls: list[Qmp] = []
        self._consoles: list[ConsoleReader] = []
        self._port = free_port()

    def start(self) -> None:
        self.source = self._launch("source", prealloc=False, incoming=False)
        self.destination = self._launch(
            "destination", prealloc=self.case.destination_populated, incoming=True
        )
        source, destination = (Qmp(self.scratch / f"{n}.qmp") for n in ("source", "destination"))
        self._controls = [source, destination]
        destination.run("migrate-incoming", uri=f"tcp:127.0.0.1:{self._port}")

    def _launch(self, role: str, *, prealloc: bool, incoming: bool) -> ConsoleReader:
        size = self.case.parameters.ram_bytes
        ram = f"memory-backend-ram,id=ram,size={size},prealloc={'on' if prealloc else 'off'}"
        console = self.scratch / f"{role}.console"
        # Ends with the benchmark, however that ends: the guest spins.
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [
            *tied, BINARY, "-M", "virt,memory-backend=ram", "-m", f"{size}B", "-smp", "1",
            "-object", ram, "-bios", str(self.image), "-display", "none", "-monitor", "none",
            "-serial", f"unix:{console},server=on,wait=on",
            "-qmp", f"unix:{self.scratch / role}.qmp,server=on,wait=off",
        ]  # fmt: skip
        if incoming:
            command += ["-incoming", "defer"]
        with (self.scratch / f"{role}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(command, stderr=log))
        reader = ConsoleReader(console)
        self._consoles.append(reader)
        return reader

    def migrate(self) -> Figures:
        source = self._controls[0]
        limits: dict[str, Any] = {"max_bandwidth": UNLIMITED_BYTES_PER_S}
        if self.case.downtime_limit_ms is not None:
            limits["downtime_limit"] = self.case.downtime_limit_ms
        source.run("migrate-set-parameters", **limits)
        began = time.monotonic()
        source.run("migrate", uri=f"tcp:127.0.0.1:{self._port}")
        while True:
            report = source.run("query-migrate")
            wall = time.monotonic() - began
            if report.get("status") == "completed":
                break
            if report.get("status") in ("failed", "cancelled"):
                raise BenchError(f"QEMU's migration failed: {report.get('error-desc')}")
            if wall > MIGRATE_TIMEOUT_S:
                raise BenchError(f"QEMU's migration did not end within {MIGRATE_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        return Figures.of(report, wall)

    def close(self) -> None:
        for control in self._controls:
            with contextlib.suppress(OSError):
                control.close()
        for process in self._processes:
            process.kill()
            process.wait()
        for reader in self._consoles:
            reader.close()

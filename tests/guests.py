"""Running guests for the tests of migration: our own guest on real machines, in this process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from migrate import destination, source
from migrate.codec import parse_compression
from migrate.events import Event
from migrate.machine import Machine, State
from migrate.report import Report
from migrate.units import MIB
from migrate.vm import guest
from migrate.vm.console import Console
from migrate.vm.definition import MachineDefinition, SlotSpec
from migrate.vm.guest import GuestParameters, Heartbeat, Request, Verdict

RAM = 0x8000_0000


class Recorder(Console):
    """A console that keeps everything that the guest printed."""

    def __init__(self) -> None:
        super().__init__()
        self.output = bytearray()

    def write(self, data: bytes) -> None:
        self.output += data
        super().write(data)

    def reports(self) -> Iterator[Any]:
        return guest.Console().feed(bytes(self.output))

    def heartbeats(self) -> list[Heartbeat]:
        return [report for report in self.reports() if isinstance(report, Heartbeat)]

    def verdicts(self) -> list[Verdict]:
        return [report for report in self.reports() if isinstance(report, Verdict)]


@dataclasses.dataclass
class Running:
    """A machine and what it printed."""

    machine: Machine
    console: Recorder

    async def until(self, reached: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            self.machine.raise_failure()
            assert time.monotonic() < deadline, bytes(self.console.output[-400:])
            await trio.sleep(0.005)

    async def beats(self, more: int = 2) -> None:
        """Wait for some more heartbeats: the guest lives."""
        before = len(self.console.heartbeats())
        await self.until(lambda: len(self.console.heartbeats()) >= before + more)

    async def verify(self) -> Verdict:
        """Have the guest derive all of its memory again; it must be right."""
        before = len(self.console.verdicts())
        assert self.console.offer(Request.VERIFY.value)
        await self.until(lambda: len(self.console.verdicts()) > before)
        verdict = self.console.verdicts()[-1]
        assert verdict.clean, verdict
        return verdict


def make_guest(
    tmp_path: Path,
    ram_mib: int = 8,
    *,
    cpus: int = 1,
    deterministic: bool = False,
    native: bool | None = None,
    slots: tuple[SlotSpec, ...] = (),
    **parameters: Any,
) -> Running:
    """Our own guest on a machine that is paused before its first instruction."""
    image = tmp_path / "guest.bin"
    image.write_bytes(guest.build_image(GuestParameters(ram_bytes=ram_mib * MIB, **parameters)))
    definition = MachineDefinition(
        name="guest",
        slots=(SlotSpec("ram", RAM, ram_mib * MIB), *slots),
        cpus=cpus,
        deterministic=deterministic,
    )
    console = Recorder()
    machine = Machine.create(definition, console, native=native)
    machine.board.boot(firmware=str(image))
    return Running(machine, console)


def ignore(_: Event) -> None:
    """For events that a test does not look at."""


async def start_receiving(
    nursery: trio.Nursery,
    uri: str,
    arrived: list[Running],
    *,
    native: bool | None = None,
    failures: list[BaseException] | None = None,
) -> str:
    """A `receive` in the background; returns its address. Its guest is appended to `arrived`."""
    listening = trio.Event()
    address: list[str] = []
    console = Recorder()

    def note(where: str) -> None:
        address.append(where)
        listening.set()

    def make(definition: MachineDefinition) -> Machine:
        return Machine.create(definition, console, native=native)

    async def run() -> None:
        try:
            machine = await destination.receive(uri, destination.ReceiveOptions(make), ignore, note)
        except Exception as error:
            if failures is None:
                raise
            failures.append(error)
        else:
            arrived.append(Running(machine, console))

    nursery.start_soon(run)
    await listening.wait()
    return address[0]


def options(**changes: Any) -> source.SendOptions:
    """Send options; `compression` as text."""
    if isinstance(changes.get("compression"), str):
        changes["compression"] = parse_compression(changes["compression"])
    return source.SendOptions(**changes)


async def migrate(
    running: Running, uri: str = "tcp:127.0.0.1:0", *, native: bool | None = None, **changes: Any
) -> tuple[Running, Report]:
    """Move a guest to a new machine in this process. The old machine is closed."""
    arrived: list[Running] = []
    async with trio.open_nursery() as nursery:
        address = await start_receiving(nursery, uri, arrived, native=native)
        report = await source.migrate_to(running.machine, address, options(**changes), ignore)
    assert running.machine.state is State.MIGRATED
    running.machine.close()
    # What it printed goes on where it left off: a line may be cut in two by the switch.
    arrived[0].console.output[:0] = running.console.output
    return arrived[0], report

"""Debian on machines in this process: booting it, and waiting for what it says or reaches."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from migrate.machine import ENDED, Machine, State
from migrate.units import MIB
from migrate.vm.definition import DiskSpec, MachineDefinition, SlotSpec
from migrate.vm.memory_map import RAM_BASE
from tests.guests import Recorder, Running

OPENSBI = Path("/usr/lib/riscv64-linux-gnu/opensbi/generic/fw_dynamic.bin")
APPEND = "console=ttyS0 no4lvl quiet"
READY = r"the shell is ready"
PROMPT = "# "
LIMIT_S = 120.0
"""Far more than anything here takes on a quiet machine: others may use the processors."""


def boot(
    linux: Any,
    *,
    memory_mib: int = 128,
    cpus: int = 1,
    deterministic: bool = False,
    firmware: Path | None = None,
    initrd: Path | None = None,
    disk: Path | None = None,
) -> Running:
    """Debian on a machine that is paused before its first instruction."""
    definition = MachineDefinition(
        name="linux",
        slots=(SlotSpec("ram", RAM_BASE, memory_mib * MIB),),
        cpus=cpus,
        deterministic=deterministic,
        sbi=firmware is None,
        disks=(DiskSpec(str(disk)),) if disk is not None else (),
    )
    console = Recorder()
    machine = Machine.create(definition, console)
    machine.board.boot(
        firmware=str(firmware) if firmware is not None else None,
        kernel=linux.kernel,
        initrd=str(initrd) if initrd is not None else linux.initrd,
        append=APPEND,
    )
    return Running(machine, console)


def text(running: Running) -> str:
    """What the guest's console has shown, without carriage returns."""
    return bytes(running.console.output).decode("utf-8", "replace").replace("\r", "")


def guest_ns(running: Running) -> int:
    """Guest time since the boot."""
    return int(running.machine.board.stats["guest-time-ns"])


async def until_says(running: Running, pattern: str, *, after: int = 0) -> re.Match[str]:
    """The first match in the console's text past position `after`."""
    found: list[re.Match[str]] = []

    def look() -> bool:
        match = re.compile(pattern, re.M).search(text(running), after)
        if match:
            found.append(match)
        return bool(found)

    await until(running, look)
    return found[0]


async def until(running: Running, reached: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        running.machine.raise_failure()
        assert time.monotonic() < deadline, text(running)[-1000:]
        assert running.machine.state not in ENDED, text(running)[-1000:]
        await trio.sleep(0.003)


async def until_off(running: Running) -> None:
    """Until the guest has switched itself off."""
    state = None
    with trio.move_on_after(LIMIT_S):
        state = await running.machine.ended()
    running.machine.raise_failure()
    assert state is State.SHUTDOWN, text(running)[-1000:]


async def shell(running: Running, command: str) -> str:
    """What a command prints, typed at the shell's prompt."""
    start = len(text(running))
    mark = f"done-{start}"
    assert running.console.offer(f"{command}; echo {mark[:4]}''{mark[4:]}\n".encode())
    match = await until_says(running, rf"^{mark}\n(?s:.*){re.escape(PROMPT)}", after=start)
    return text(running)[start : match.start()].partition("\n")[2]

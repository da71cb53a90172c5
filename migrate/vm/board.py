"""The board (layer 2): QEMU's riscv `virt` put together from core, clock, devices and firmware.

What runs when is the scheduler's business, what is where the memory map's, how images get into
memory boot's. Guest memory belongs to whoever made it.
"""

from __future__ import annotations

import enum
import functools
import os
import time
from collections.abc import Callable
from typing import Any, Final

from migrate.errors import MachineStateError, StateFormatError, UsageError
from migrate.vm.boot import Entry, Images, load_images
from migrate.vm.clock import BYTES_PER_TICK, NS_PER_TICK, Clock
from migrate.vm.console import Console
from migrate.vm.definition import MachineDefinition
from migrate.vm.devices.base import MmioDevice, TimedDevice
from migrate.vm.devices.clint import Clint
from migrate.vm.devices.finisher import Finisher
from migrate.vm.devices.plic import Plic
from migrate.vm.devices.rtc import Rtc
from migrate.vm.devices.uart import Uart
from migrate.vm.devices.virtio_blk import Image, VirtioBlk
from migrate.vm.devices.virtio_mmio import VirtioEmpty, VirtioMmio
from migrate.vm.memory import GuestMemory, MemorySlot
from migrate.vm.memory_map import (
    CLINT,
    PLIC,
    RTC,
    RTC_IRQ,
    TEST,
    UART,
    UART_IRQ,
    VIRTIO_COUNT,
    VIRTIO_FIRST_IRQ,
    Window,
    virtio_window,
)
from migrate.vm.riscv64.core import Riscv64Core
from migrate.vm.sbi import Sbi
from migrate.vm.scheduler import Scheduler
from migrate.vm.state import PortableState

__all__ = ["Board", "Console", "Images", "StopReason"]

KIND: Final = "virt-board"
VERSION: Final = 1
PAGE: Final = 0x1000
DETERMINISTIC_EPOCH_NS: Final = 1_735_689_600 * 10**9
"""Time of day at the start of a deterministic machine: 2025-01-01."""
DETERMINISTIC_SEED: Final = bytes(range(32))

MAX_CLOCK_POSITION: Final = 1 << 62
"""A guest may set its time; beyond some 146 years the clock's arithmetic has no room."""

# What a kernel in supervisor mode handles itself: everything but its own calls.
SBI_MEDELEG: Final = 0xB1FF
SBI_MIDELEG: Final = 0x222
SBI_COUNTEREN: Final = 0x7
"""cycle, time and instret: user mode may read them, too. The kernel leaves allowing that to its
firmware, and the vDSO's clock_gettime relies on it.
"""


class StopReason(enum.Enum):
    """Why `Board.run` returned."""

    PAUSED = "stopped from outside"
    SHUTDOWN = "the guest switched itself off"


class Board:
    """One machine's board. Made with empty harts; `boot` or `load_untrusted` fills it.

    Everything is for the vcpu thread with the machine standing still, but for `stop`, `post` and
    `stats`, which are for any thread at any time.
    """

    def __init__(
        self,
        definition: MachineDefinition,
        memory: GuestMemory,
        *,
        console: Console,
        native: bool | None = None,
        virtio_legacy: bool = False,
    ) -> None:
        """`virtio_legacy`: virtio-mmio version 1, as QEMU's board has it unless told otherwise.

        Raises UsageError and HostError (a disk image that cannot be opened).
        """
        self.definition = definition
        self.memory = memory
        self.console = console
        self.harts = definition.cpus
        self.exit_code = 0
        """After SHUTDOWN: what the guest said, 0 for an ordinary power-off."""
        self._images: Images | None = None
        self._restart = False
        self._running = False
        self._last_saved: dict[str, Any] | None = None
        """What `save` gave last, if nothing has run since."""
        self._ended = False
        self.sbi: Sbi | None = None
        self._disks: list[VirtioBlk] = []
        opened = [Image(disk) for disk in definition.disks]
        try:
            self.core = Riscv64Core(
                self.harts, native=native, ecall=self._ecall if definition.sbi else None
            )
        except BaseException:
            for image in opened:
                image.close()
            raise
        self._blank_harts = [self.core.get_state(hart) for hart in range(self.harts)]
        for slot in memory.slots:
            self.attach_slot(slot)
        memory.listeners.append(self.core.written)
        self.clock = Clock(
            deterministic=definition.deterministic,
            executed=lambda: self.core.executed,
            publish=self.core.set_time_source,
        )
        self.scheduler = Scheduler(
            self.core, self.clock, deterministic=definition.deterministic,
            turn_ns=definition.slice_ns, after_turn=self._after_turn,
        )  # fmt: skip
        self._make_devices(opened, virtio_legacy)
        console.attach(self._console_input, self._console_ready)

    def _make_devices(self, images: list[Image], virtio_legacy: bool) -> None:
        scheduler, clock = self.scheduler, self.clock
        self.plic = Plic(self.harts, scheduler.set_irq)
        self.clint = Clint(
            self.harts, time=clock.now, set_time=self._set_time, set_irq=scheduler.set_irq,
            rearm=scheduler.rearm,
        )  # fmt: skip
        self.uart = Uart(self.plic.line(UART_IRQ), self.console.write)
        now_ns = DETERMINISTIC_EPOCH_NS if self.definition.deterministic else time.time_ns()
        self.rtc = Rtc(
            self.plic.line(RTC_IRQ), time=clock.now, now_ns=now_ns, rearm=scheduler.rearm
        )
        self.devices: dict[str, MmioDevice] = {}
        self._place("clint", CLINT, self.clint)
        self._place("uart", UART, self.uart)
        self._place("rtc", RTC, self.rtc)
        self._place("test", TEST, Finisher(self.power_off, self.restart))
        for slot in range(VIRTIO_COUNT):
            line = self.plic.line(VIRTIO_FIRST_IRQ + slot)
            device: VirtioMmio
            if slot < len(images):
                device = VirtioBlk(
                    self.memory, line, images[slot], f"disk{slot}", legacy=virtio_legacy
                )
                self._disks.append(device)
            else:
                device = VirtioEmpty(self.memory, line, legacy=virtio_legacy)
            self._place(f"virtio{slot}", virtio_window(slot), device)
        # Last, also when a state is loaded: the others drive its inputs meanwhile.
        self._place("plic", PLIC, self.plic)
        timed: list[TimedDevice] = [self.clint, self.rtc]
        if self.definition.sbi:
            self.sbi = Sbi(_Services(self))
            timed.append(self.sbi)
        scheduler.connect(timed, self.sbi)

    def _place(self, name: str, window: Window, device: MmioDevice) -> None:
        self.devices[name] = device
        size = -(-window.size // PAGE) * PAGE
        device.place(self.core.map_mmio(window.base, size, device))

    # -- memory slots

    def attach_slot(self, slot: MemorySlot) -> None:
        """Show a slot to the guest."""
        self.core.map_memory(slot.gpa, slot.size_bytes, slot.hva, readonly=slot.spec.readonly)

    def detach_slot(self, slot: MemorySlot) -> None:
        """Take a slot out of the guest's sight, before it is closed."""
        self.core.unmap_memory(slot.gpa, slot.size_bytes)

    # -- boot

    def boot(
        self,
        *,
        firmware: str | None = None,
        kernel: str | None = None,
        initrd: str | None = None,
        append: str = "",
    ) -> None:
        """Load images and set every hart to its start. Raises UsageError and HostError."""
        if self.definition.sbi == (firmware is not None):
            raise UsageError(
                f"machine {self.definition.name!r}: a firmware wants a machine without the "
                "board's SBI, a kernel on its own one with it"
            )
        self._boot(Images(firmware, kernel, initrd, append))

    def _boot(self, images: Images) -> None:
        self._last_saved = None
        deterministic = self.definition.deterministic
        seed = DETERMINISTIC_SEED if deterministic else os.urandom(32)
        entry = load_images(self.memory, self.definition, images, rng_seed=seed)
        for device in self.devices.values():
            device.reset()
        if self.sbi is not None:
            self.sbi.reset()
        self.scheduler.reset()
        for hart, blank in enumerate(self._blank_harts):
            fields = blank["fields"] | _start(hart, entry)
            self.core.set_state_untrusted(hart, {**blank, "fields": fields})
        self.core.forget_code()
        self._images = images
        self._ended = False

    # -- running

    def run(self) -> StopReason:
        """Run the guest on this thread until it is stopped or switches itself off.

        Raises GuestError when it cannot go on.
        """
        if self._ended:
            raise MachineStateError(f"machine {self.definition.name!r} has shut down")
        self._running = True
        self._last_saved = None
        try:
            while True:
                if self.scheduler.run():
                    return StopReason.PAUSED
                if self._restart and self._images is not None:
                    self._restart = False
                    self._boot(self._images)
                    continue
                self._ended = True
                return StopReason.SHUTDOWN
        finally:
            self._running = False

    def stop(self) -> None:
        """Any thread: make `run` return PAUSED at an instruction boundary."""
        self.scheduler.stop()

    def post(self, work: Callable[[], object]) -> None:
        """Any thread: call `work` on the vcpu thread at the next boundary."""
        self.scheduler.post(work)

    def quiesce(self) -> None:
        """Standing still, before the machine is carried on elsewhere: what the guest wrote to its
        disks is stable, what it printed has left. Raises HostError.
        """
        self.scheduler.drain()
        self.uart.flush()
        for disk in self._disks:
            disk.quiesce()

    def power_off(self, code: int) -> None:
        """From a device or the SBI: the guest ends."""
        self.exit_code = code
        self._restart = False
        self.scheduler.leave()

    def restart(self) -> None:
        """From a device or the SBI: boot again. Where the images are unknown (the guest came from
        elsewhere) the guest ends instead.
        """
        self._restart = True
        self.scheduler.leave()

    def _ecall(self, hart: int) -> None:
        assert self.sbi is not None
        self.sbi(hart)

    def _set_time(self, ticks: int) -> None:
        frozen = self.clock.frozen
        self.clock.freeze()
        unit = BYTES_PER_TICK if self.definition.deterministic else NS_PER_TICK
        self.clock.position = min(ticks * unit, MAX_CLOCK_POSITION)
        if not frozen:
            self.clock.thaw()

    # -- console

    def _after_turn(self) -> None:
        self.uart.flush()

    def _console_input(self, data: bytes) -> None:
        self.post(functools.partial(self.uart.receive, data))

    def _console_ready(self) -> bool:
        return self.uart.room > 32 * 1024

    # -- state

    def save(self) -> PortableState:
        """Harts, clock, devices and scheduling; not the memory."""
        self._refuse_running("save")
        self.scheduler.drain()
        self.uart.flush()
        self._last_saved = {
            "harts": [self.core.get_state(hart) for hart in range(self.harts)],
            "clock": self.clock.save(),
            "scheduler": self.scheduler.save(),
            "sbi": self.sbi.save() if self.sbi is not None else None,
            "devices": {name: device.save() for name, device in self.devices.items()},
        }
        return {"kind": KIND, "version": VERSION, "fields": self._last_saved}

    def load_untrusted(self, state: object) -> None:
        """Take over a state; all of it or nothing. Raises StateFormatError."""
        self._refuse_running("load")
        fields = _fields_untrusted(state, self.harts, set(self.devices), self.sbi is not None)
        # To go back to; in a downtime the one that the rehearsal has made will do.
        before = self._last_saved or self.save()["fields"]
        self._last_saved = None
        try:
            self._load(fields)
        except StateFormatError:
            self._load(before)
            raise
        self._images = None
        self._ended = self._restart = False

    def _load(self, fields: dict[str, Any]) -> None:
        # The clock first, for the timers to be compared with; harts before the devices, which
        # drive the harts' interrupt lines again.
        self.clock.load_untrusted(fields["clock"])
        for hart in range(self.harts):
            self.core.set_state_untrusted(hart, fields["harts"][hart])
        for name, device in self.devices.items():
            device.load_untrusted(fields["devices"][name])
        if self.sbi is not None:
            self.sbi.load_untrusted(fields["sbi"])
        self.scheduler.load_untrusted(fields["scheduler"])
        # A switch of harts breaks the reservation of the one that goes out; the next switch has to
        # be one here exactly when it is one where the state comes from.
        self.core.select(self.scheduler.last_hart)
        self.core.forget_code()

    @property
    def stats(self) -> dict[str, Any]:
        """Counters since the board was made."""
        return {
            "executed": self.core.executed,
            "executed-unit": self.core.caps().time_unit,
            "guest-time-ns": self.clock.now() * NS_PER_TICK,
            "turns": self.scheduler.turns,
            "idle-ns": self.scheduler.idle_ns,
            **self.core.stats(),
        }

    def close(self) -> None:
        """Let go of engine, console and disks (not of the memory). Idempotent."""
        if self.core.written in self.memory.listeners:
            self.memory.listeners.remove(self.core.written)
            self.core.close()
        self.console.close()
        for disk in self._disks:
            disk.close()

    def _refuse_running(self, verb: str) -> None:
        if self._running:
            raise MachineStateError(
                f"machine {self.definition.name!r} runs; stop it before you {verb} its state"
            )


class _Services:
    """The board as the SBI sees it (migrate.vm.sbi.Services)."""

    def __init__(self, board: Board) -> None:
        self.harts = board.harts
        self.memory = board.memory
        self.time = board.clock.now
        self.set_irq = board.scheduler.set_irq
        self.rearm = board.scheduler.rearm
        self.end_turn = board.scheduler.end_turn
        self.wait_for_interrupt = board.scheduler.wait_for_interrupt
        self.flush_tlb = board.core.owe_tlb_flush
        self.forget_code = board.core.forget_code
        self.read_reg = board.core.read_reg
        self.write_reg = board.core.write_reg
        self.power_off = board.power_off
        self.restart = board.restart
        self.console_write = board.uart.emit
        self.console_read = board.uart.take


def _start(hart: int, entry: Entry) -> dict[str, int]:
    registers = {"pc": entry.pc, "x10": hart, "x11": entry.a1, "x12": entry.a2}
    if entry.machine_mode:
        return registers | {"priv": 3}
    return registers | {
        "priv": 1, "medeleg": SBI_MEDELEG, "mideleg": SBI_MIDELEG, "mcounteren": SBI_COUNTEREN,
        "scounteren": SBI_COUNTEREN,
    }  # fmt: skip


def _fields_untrusted(state: object, harts: int, devices: set[str], sbi: bool) -> dict[str, Any]:
    """The parts of a board's state, their number and names checked. Raises StateFormatError."""
    if not isinstance(state, dict) or set(state) != {"kind", "version", "fields"}:
        raise StateFormatError(f"{KIND}: not a state (kind, version, fields expected)")
    if state["kind"] != KIND or state["version"] != VERSION:
        raise StateFormatError(
            f"state of {str(state['kind'])[:40]!r} version {str(state['version'])[:20]}; "
            f"this program reads {KIND!r} version {VERSION}"
        )
    fields = state["fields"]
    wanted = {"harts", "clock", "scheduler", "sbi", "devices"}
    if not isinstance(fields, dict) or set(fields) != wanted:
        raise StateFormatError(f"{KIND}: wants the fields {', '.join(sorted(wanted))}")
    if not isinstance(fields["harts"], list) or len(fields["harts"]) != harts:
        raise StateFormatError(f"{KIND}: the state is not one of {harts} harts")
    given = fields["devices"]
    if not isinstance(given, dict) or set(given) != devices:
        odd = set(given) ^ devices if isinstance(given, dict) else devices
        names = ", ".join(sorted(str(name)[:40] for name in odd))
        raise StateFormatError(f"{KIND}: devices left over or missing: {names}")
    if (fields["sbi"] is not None) != sbi:
        raise StateFormatError(f"{KIND}: one side has the board's SBI, the other a firmware")
    return fields

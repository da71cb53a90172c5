"""Where things are on the board (layer 2): the memory map of QEMU's riscv `virt`."""

from __future__ import annotations

from typing import Final, NamedTuple

from migrate.units import Gpa


class Window(NamedTuple):
    """[base, base + size) of guest-physical addresses."""

    base: int
    size: int


TIMEBASE_HZ: Final = 10_000_000

TEST: Final = Window(0x10_0000, 0x1000)
RTC: Final = Window(0x10_1000, 0x1000)
CLINT: Final = Window(0x200_0000, 0x1_0000)
PLIC: Final = Window(0xC00_0000, 0x60_0000)
UART: Final = Window(0x1000_0000, 0x100)
RAM_BASE: Final = Gpa(0x8000_0000)

UART_IRQ: Final = 10
RTC_IRQ: Final = 11
UART_CLOCK_HZ: Final = 3_686_400
VIRTIO_COUNT: Final = 8
VIRTIO_FIRST_IRQ: Final = 1


def virtio_window(slot: int) -> Window:
    """The window of virtio-mmio slot 0..7."""
    return Window(0x1000_1000 + 0x1000 * slot, 0x1000)

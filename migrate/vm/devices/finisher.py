"""SiFive test finisher (layer 2): a guest ends or restarts the machine by a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from migrate.vm.devices.base import MmioDevice

FAIL: Final = 0x3333
PASS: Final = 0x5555
RESET: Final = 0x7777


class Finisher(MmioDevice):
    """`finished(code)`: the guest ended with an exit code; `reset()`: it wants a restart."""

    KIND = "sifive-test"
    VERSION = 1
    SIZE: ClassVar[int] = 0x1000
    FIELDS = ()

    def __init__(self, finished: Callable[[int], None], restart: Callable[[], None]) -> None:
        self._finished = finished
        self._restart = restart

    def reset(self) -> None:
        """Nothing is kept."""

    def after_load(self) -> None:
        """Nothing is derived."""

    def mmio_read(self, offset: int, size: int) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        if offset != 0:
            return
        command = value & 0xFFFF
        if command == PASS:
            self._finished(0)
        elif command == FAIL:
            self._finished(value >> 16 & 0xFFFF)
        elif command == RESET:
            self._restart()

"""SiFive CLINT (layer 2): machine software interrupts, machine timers and the time itself.

The layout is also that of the ACLINT's MSWI and MTIMER. Time is the clock's; writing mtime
sets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from migrate.vm.core import Window
from migrate.vm.devices.base import MASK64, MmioDevice, TimedDevice, read_part, write_part
from migrate.vm.state import Field

MIP_MSIP: Final = 1 << 3
MIP_MTIP: Final = 1 << 7

MTIMECMP: Final = 0x4000
MTIME: Final = 0xBFF8


class Clint(MmioDevice, TimedDevice):
    """`set_irq(hart, mask, value)` drives mip; `rearm()` says that next_tick may be earlier."""

    KIND = "sifive-clint0"
    VERSION = 1
    SIZE: ClassVar[int] = 0x10000
    FIELDS = (
        Field("msip", list, bits=1, max_length=64),
        Field("mtimecmp", list, max_length=64),
    )

    def __init__(
        self,
        harts: int,
        *,
        time: Callable[[], int],
        set_time: Callable[[int], None],
        set_irq: Callable[[int, int, int], None],
        rearm: Callable[[], None],
    ) -> None:
        self._harts = harts
        self._time = time
        self._set_time = set_time
        self._set_irq = set_irq
        self._rearm = rearm
        self.reset()

    def place(self, window: Window) -> None:
        super().place(window)
        window.time_at(MTIME)

    def reset(self) -> None:
        self.msip = [0] * self._harts
        self.mtimecmp = [MASK64] * self._harts
        self._waiting = [True] * self._harts
        """Which compare values have not been reached when last looked at."""
        for hart in range(self._harts):
            self._set_irq(hart, MIP_MSIP | MIP_MTIP, 0)

    def after_load(self) -> None:
        self.refuse_unless(
            len(self.msip) == len(self.mtimecmp) == self._harts,
            f"state of {len(self.msip)} harts, this machine has {self._harts}",
        )
        for hart in range(self._harts):
            self._set_irq(hart, MIP_MSIP, MIP_MSIP if self.msip[hart] else 0)
        self._compare_all()

    def next_tick(self) -> int | None:
        earliest = MASK64
        for hart, waiting in enumerate(self._waiting):
            if waiting and self.mtimecmp[hart] < earliest:
                earliest = self.mtimecmp[hart]
        return None if earliest == MASK64 else earliest

    def tick(self, now: int) -> None:
        for hart, waiting in enumerate(self._waiting):
            if waiting and now >= self.mtimecmp[hart]:
                self._compare(hart, now)

    def _compare(self, hart: int, now: int) -> None:
        reached = now >= self.mtimecmp[hart]
        self._waiting[hart] = not reached
        self._set_irq(hart, MIP_MTIP, MIP_MTIP if reached else 0)

    def _compare_all(self) -> None:
        now = self._time()
        self._waiting = [True] * self._harts
        for hart in range(self._harts):
            self._compare(hart, now)

    def mmio_read(self, offset: int, size: int) -> int:
        if offset < 4 * self._harts:
            return read_part(self.msip[offset >> 2], offset & 3, size)
        if MTIMECMP <= offset < MTIMECMP + 8 * self._harts:
            index, low = divmod(offset - MTIMECMP, 8)
            return read_part(self.mtimecmp[index], low, size)
        if MTIME <= offset < MTIME + 8:
            return read_part(self._time(), offset - MTIME, size)
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        if offset < 4 * self._harts:
            hart = offset >> 2
            if offset & 3 == 0:
                self.msip[hart] = value & 1
                self._set_irq(hart, MIP_MSIP, MIP_MSIP if value & 1 else 0)
        elif MTIMECMP <= offset < MTIMECMP + 8 * self._harts:
            hart, low = divmod(offset - MTIMECMP, 8)
            self.mtimecmp[hart] = write_part(self.mtimecmp[hart], low, size, value) & MASK64
            self._compare(hart, self._time())
            self._rearm()
        elif MTIME <= offset < MTIME + 8:
            self._set_time(write_part(self._time(), offset - MTIME, size, value) & MASK64)
            self._compare_all()
            self._rearm()

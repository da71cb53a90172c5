"""Goldfish RTC (layer 2): nanoseconds since 1970, and an alarm.

The time of day is guest time plus an offset fixed at boot, so that it moves with the guest and
a deterministic run sees the same one each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from migrate.vm.devices.base import MASK32, MASK64, IrqLine, MmioDevice, TimedDevice
from migrate.vm.state import Field

TIME_LOW, TIME_HIGH, ALARM_LOW, ALARM_HIGH = 0x00, 0x04, 0x08, 0x0C
IRQ_ENABLED, CLEAR_ALARM, ALARM_STATUS, CLEAR_INTERRUPT = 0x10, 0x14, 0x18, 0x1C
TICK_NS: Final = 100


class Rtc(MmioDevice, TimedDevice):
    """`time()` is in ticks of the timebase (10 MHz)."""

    KIND = "goldfish-rtc"
    VERSION = 1
    SIZE: ClassVar[int] = 0x1000
    FIELDS = (
        Field("offset_ns", int),
        Field("time_high", int, bits=32),
        Field("alarm_ns", int),
        Field("alarm_running", bool),
        Field("irq_enabled", bool),
        Field("irq_pending", bool),
    )

    def __init__(
        self,
        irq: IrqLine,
        *,
        time: Callable[[], int],
        now_ns: int,
        rearm: Callable[[], None],
    ) -> None:
        self._irq = irq
        self._time = time
        self._rearm = rearm
        self.offset_ns = (now_ns - time() * TICK_NS) & MASK64
        self.reset()

    def reset(self) -> None:
        self.time_high = 0
        self.alarm_ns = 0
        self.alarm_running = False
        self.irq_enabled = False
        self.irq_pending = False
        self._irq(False)

    def after_load(self) -> None:
        self._irq(self.irq_pending and self.irq_enabled)

    def _now_ns(self) -> int:
        return (self._time() * TICK_NS + self.offset_ns) & MASK64

    def next_tick(self) -> int | None:
        if not self.alarm_running:
            return None
        return self._time() + max(-(-(self.alarm_ns - self._now_ns()) // TICK_NS), 0)

    def tick(self, now: int) -> None:
        if self.alarm_running and self._now_ns() >= self.alarm_ns:
            self.alarm_running = False
            self.irq_pending = True
            self._irq(self.irq_enabled)

    def mmio_read(self, offset: int, size: int) -> int:
        match offset:
            case 0x00:
                now = self._now_ns()
                self.time_high = now >> 32
                return now & MASK32
            case 0x04:
                return self.time_high
            case 0x08:
                return self.alarm_ns & MASK32
            case 0x0C:
                return self.alarm_ns >> 32
            case 0x10:
                return int(self.irq_enabled)
            case 0x18:
                return int(self.alarm_running)
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        value &= MASK32
        now = self._now_ns()
        match offset:
            case 0x00:
                self._set_now((now & ~MASK32) | value)
            case 0x04:
                self._set_now((now & MASK32) | value << 32)
            case 0x08:
                self.alarm_ns = (self.alarm_ns & ~MASK32) | value
                self.alarm_running = True
                self._rearm()
            case 0x0C:
                self.alarm_ns = (self.alarm_ns & MASK32) | value << 32
            case 0x10:
                self.irq_enabled = bool(value & 1)
            case 0x14:
                self.alarm_running = False
            case 0x1C:
                self.irq_pending = False
        self.tick(self._time())
        self._irq(self.irq_pending and self.irq_enabled)

    def _set_now(self, now_ns: int) -> None:
        self.offset_ns = (now_ns - self._time() * TICK_NS) & MASK64
        self._rearm()

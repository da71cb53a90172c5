"""Guest time: one clock a machine, 10 MHz ticks (layer 2).

Two kinds. A real-time clock follows CLOCK_MONOTONIC while the machine runs; a deterministic one
follows executed code (128 bytes of it are a tick) and jumps over idle time. Either stands still
while frozen, and after a migration goes on from the value it was frozen at.

The core answers the guest's `time` register itself: whenever the relation between guest time and
its source changes, the clock hands it a new `TimeSource`, from which the compiled part and this
module compute the same ticks. Timers are the board's; no clock knows a device.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from migrate.errors import StateFormatError, UsageError
from migrate.vm.state import Field, Stateful

TICK_HZ: Final = 10_000_000
NS_PER_TICK: Final = 100
BYTES_PER_TICK: Final = 128
_MASK: Final = (1 << 64) - 1


class TimeKind(enum.IntEnum):
    """What guest time follows. The values are those of the compiled part."""

    FROZEN = 0
    REAL = 1
    EXECUTED = 2


@dataclass(frozen=True, slots=True)
class TimeSource:
    """How to compute guest ticks.

    FROZEN: `offset` ticks. REAL: (CLOCK_MONOTONIC ns + offset) / 100. EXECUTED: (executed code
    bytes of the core + offset) / 128. Divisions round down.
    """

    kind: TimeKind
    offset: int

    def ticks(self, executed: int) -> int:
        """Guest ticks now, when the core has executed `executed`."""
        if self.kind is TimeKind.REAL:
            return (time.monotonic_ns() + self.offset) // NS_PER_TICK
        if self.kind is TimeKind.EXECUTED:
            return (executed + self.offset) // BYTES_PER_TICK
        return self.offset


class Clock(Stateful):
    """The machine's clock; frozen when made.

    `executed` reads the core's counter, `publish` is the core's `set_time_source`.
    """

    KIND: ClassVar[str] = "clock"
    VERSION: ClassVar[int] = 1
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field("deterministic", bool),
        Field("position", int, bits=63),
    )

    def __init__(
        self,
        *,
        deterministic: bool,
        executed: Callable[[], int],
        publish: Callable[[TimeSource], None],
    ) -> None:
        self._deterministic = deterministic
        self.deterministic = deterministic
        self._executed = executed
        self._publish = publish
        self._per_tick = BYTES_PER_TICK if deterministic else NS_PER_TICK
        self._position = 0
        self._frozen = True
        self._offset = 0
        self._announce()

    # -- state: `position` is guest time in the source's unit (ns, or bytes of code)

    @property
    def position(self) -> int:
        """Guest time in nanoseconds (real-time) or bytes of executed code (deterministic)."""
        return self._position if self._frozen else self._source() + self._offset

    @position.setter
    def position(self, value: int) -> None:
        if not self._frozen:
            raise UsageError("the clock is set only while the machine is paused")
        self._position = value

    def after_load(self) -> None:
        if self.deterministic is not self._deterministic:
            self.deterministic = self._deterministic
            raise StateFormatError("clock: saved in the other time mode (deterministic or real)")
        self._announce()

    # -- running and standing still

    @property
    def frozen(self) -> bool:
        return self._frozen

    def freeze(self) -> None:
        """Guest time stands still from now on."""
        if not self._frozen:
            self._position = self.position
            self._frozen = True
            self._announce()

    def thaw(self) -> None:
        """Guest time goes on from where it stood."""
        if self._frozen:
            self._offset = self._position - self._source()
            self._frozen = False
            self._announce()

    def _source(self) -> int:
        return self._executed() if self._deterministic else time.monotonic_ns()

    def _announce(self) -> None:
        if self._frozen:
            source = TimeSource(TimeKind.FROZEN, self._position // self._per_tick)
        elif self._deterministic:
            source = TimeSource(TimeKind.EXECUTED, self._offset)
        else:
            source = TimeSource(TimeKind.REAL, self._offset)
        self._publish(source)

    # -- reading and waiting

    def now(self) -> int:
        """Guest time in ticks."""
        return (self.position // self._per_tick) & _MASK

    def jump_to(self, ticks: int) -> None:
        """Deterministic idle: time skips to `ticks`, unless it is there already."""
        if not self._deterministic:
            raise UsageError("only a deterministic clock can jump")
        missing = ticks * BYTES_PER_TICK - self.position
        if missing > 0:
            if self._frozen:
                self._position += missing
            else:
                self._offset += missing
            self._announce()

    def ns_until(self, ticks: int) -> int:
        """Nanoseconds of guest time until `ticks`, 0 if it has passed."""
        return max(0, ticks * self._per_tick - self.position) * NS_PER_TICK // self._per_tick

    def code_until(self, ticks: int) -> int:
        """Deterministic: what the core must execute until `ticks`, 0 if it has passed."""
        if not self._deterministic:
            raise UsageError("only a deterministic clock follows executed code")
        return max(0, ticks * BYTES_PER_TICK - self.position)

"""The platform-level interrupt controller as on QEMU's virt board (layer 2).

Two contexts a hart: 2 * hart is its machine mode, 2 * hart + 1 its supervisor mode.

A source becomes pending each time its device says that its line is high, until it is claimed or
the line falls. A line that merely stays high after a completion is not a new interrupt: so it is on
QEMU's board, and drivers written there (xv6's for the UART) never take their transmit interrupt
back.
Source: RISC-V Platform-Level Interrupt Controller Specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from migrate.vm.devices.base import MASK32, IrqLine, MmioDevice, read_part, write_part
from migrate.vm.state import Field

MIP_SEIP: Final = 1 << 9
MIP_MEIP: Final = 1 << 11

SOURCES: Final = 96
"""Sources 1..95; source 0 does not exist."""
MAX_PRIORITY: Final = 7

PENDING: Final = 0x1000
ENABLE: Final = 0x2000
ENABLE_STRIDE: Final = 0x80
CONTEXT: Final = 0x20_0000
CONTEXT_STRIDE: Final = 0x1000
_ALL: Final = (1 << SOURCES) - 2


class Plic(MmioDevice):
    """Bit i of `pending`, `claimed` and the enables is source i."""

    KIND = "riscv-plic"
    VERSION = 1
    SIZE: ClassVar[int] = 0x60_0000
    FIELDS = (
        Field("priority", list, bits=3, max_length=SOURCES),
        Field("pending_words", list, bits=32, max_length=SOURCES // 32),
        Field("claimed_words", list, bits=32, max_length=SOURCES // 32),
        Field("enable_words", list, bits=32, max_length=64 * 2 * SOURCES // 32),
        Field("threshold", list, bits=3, max_length=64 * 2),
    )

    def __init__(self, harts: int, set_irq: Callable[[int, int, int], None]) -> None:
        self._contexts = 2 * harts
        self._set_irq = set_irq
        self.reset()

    def reset(self) -> None:
        self.priority = [0] * SOURCES
        self.threshold = [0] * self._contexts
        self._pending = 0
        self._claimed = 0
        self._enables = [0] * self._contexts
        self._drive_all()

    # The masks are what the device works on; what travels is words of 32 bits.
    @property
    def pending_words(self) -> list[int]:
        return _to_words(self._pending)

    @pending_words.setter
    def pending_words(self, words: list[int]) -> None:
        self._pending = _from_words(words)

    @property
    def claimed_words(self) -> list[int]:
        return _to_words(self._claimed)

    @claimed_words.setter
    def claimed_words(self, words: list[int]) -> None:
        self._claimed = _from_words(words)

    @property
    def enable_words(self) -> list[int]:
        return [word for mask in self._enables for word in _to_words(mask)]

    @enable_words.setter
    def enable_words(self, words: list[int]) -> None:
        step = SOURCES // 32
        self._enables = [_from_words(words[i : i + step]) for i in range(0, len(words), step)]

    def after_load(self) -> None:
        self.refuse_unless(len(self.priority) == SOURCES, "wrong number of sources")
        self.refuse_unless(
            len(self.threshold) == len(self._enables) == self._contexts,
            f"state of {len(self.threshold)} contexts, this machine has {self._contexts}",
        )
        masks = (self._pending, self._claimed, *self._enables)
        self.refuse_unless(all(mask & ~_ALL == 0 for mask in masks), "source 0 does not exist")
        self._drive_all()

    def line(self, source: int) -> IrqLine:
        """The input of `source`."""
        bit = 1 << source

        def set_level(level: bool) -> None:
            # Called often, and seldom with news.
            if bool(self._pending & bit) != level:
                self._pending ^= bit
                if not self._claimed & bit:
                    self._update()

        return set_level

    def mmio_read(self, offset: int, size: int) -> int:
        word = self._read_word(offset & ~3)
        return read_part(word, offset & 3, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        if size == 8:
            self.mmio_write(offset, 4, value & MASK32)
            self.mmio_write(offset + 4, 4, value >> 32)
            return
        offset, low = offset & ~3, offset & 3
        if offset < PENDING:
            source = offset >> 2
            if 0 < source < SOURCES:
                word = write_part(self.priority[source], low, size, value)
                self.priority[source] = word & MAX_PRIORITY
        elif ENABLE <= offset < ENABLE + ENABLE_STRIDE * self._contexts:
            context, byte = divmod(offset - ENABLE, ENABLE_STRIDE)
            if byte < SOURCES // 8:
                mask = write_part(self._enables[context], byte + low, size, value)
                self._enables[context] = mask & _ALL
        elif CONTEXT <= offset < CONTEXT + CONTEXT_STRIDE * self._contexts:
            context, register = divmod(offset - CONTEXT, CONTEXT_STRIDE)
            if register == 0:
                self.threshold[context] = value & MAX_PRIORITY
            elif register == 4:
                self._complete(context, value)
        self._update()

    def _read_word(self, offset: int) -> int:
        if offset < PENDING:
            source = offset >> 2
            return self.priority[source] if source < SOURCES else 0
        if offset < ENABLE:
            byte = offset - PENDING
            return read_part(self._pending, byte, 4) if byte < SOURCES // 8 else 0
        if offset < ENABLE + ENABLE_STRIDE * self._contexts:
            context, byte = divmod(offset - ENABLE, ENABLE_STRIDE)
            return read_part(self._enables[context], byte, 4) if byte < SOURCES // 8 else 0
        if CONTEXT <= offset < CONTEXT + CONTEXT_STRIDE * self._contexts:
            context, register = divmod(offset - CONTEXT, CONTEXT_STRIDE)
            if register == 0:
                return self.threshold[context]
            if register == 4:
                return self._claim(context)
        return 0

    def _best(self, context: int, threshold: int) -> int:
        """The source of the highest priority over `threshold`, the lowest number first; or 0."""
        candidates = self._pending & ~self._claimed & self._enables[context]
        best = 0
        while candidates:
            bit = candidates & -candidates
            candidates ^= bit
            source = bit.bit_length() - 1
            if self.priority[source] > threshold:
                best, threshold = source, self.priority[source]
        return best

    def _claim(self, context: int) -> int:
        # Claiming is not masked by the threshold; only the interrupt is (section 7).
        source = self._best(context, 0)
        if source:
            self._pending &= ~(1 << source)
            self._claimed |= 1 << source
            self._update()
        return source

    def _complete(self, context: int, source: int) -> None:
        if 0 < source < SOURCES and self._enables[context] >> source & 1:
            self._claimed &= ~(1 << source)

    def _drive_all(self) -> None:
        self._outputs: list[bool | None] = [None] * self._contexts
        self._update()

    def _update(self) -> None:
        for context in range(self._contexts):
            level = bool(self._best(context, self.threshold[context]))
            if level is not self._outputs[context]:
                self._outputs[context] = level
                hart, supervisor = divmod(context, 2)
                mask = MIP_SEIP if supervisor else MIP_MEIP
                self._set_irq(hart, mask, mask if level else 0)


def _to_words(mask: int) -> list[int]:
    return [mask >> shift & MASK32 for shift in range(0, SOURCES, 32)]


def _from_words(words: list[int]) -> int:
    return sum(word << (32 * i) for i, word in enumerate(words))

"""ns16550a UART (layer 2): transmits at once, receives through a 16-byte FIFO.

Not modelled: baud rates, parity and modem lines other than in loopback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from migrate.vm.core import Window
from migrate.vm.devices.base import IrqLine, MmioDevice
from migrate.vm.state import Field, PortableState

FIFO_BYTES: Final = 16
BACKLOG_BYTES: Final = 65536
"""Input that waits on the wire behind the FIFO."""
FLUSH_BYTES: Final = 1024

IER_RX, IER_THRE, IER_MODEM = 1, 2, 8
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RX, IIR_FIFO = 1, 0, 2, 4, 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
LCR_DLAB = 0x80
MCR_LOOP = 0x10
LSR_DR, LSR_THRE, LSR_TEMT = 1, 0x20, 0x40
MSR_IDLE = 0xB0
"""Carrier, data set ready, clear to send: somebody is at the other end."""


class Uart(MmioDevice):
    """Registers of a 16550A. `transmit` takes the bytes sent, in batches; see `flush`."""

    KIND = "ns16550a"
    VERSION = 1
    SIZE: ClassVar[int] = 0x100
    FIELDS = (
        Field("ier", int, bits=4),
        Field("lcr", int, bits=8),
        Field("mcr", int, bits=5),
        Field("scratch", int, bits=8),
        Field("divisor", int, bits=16),
        Field("fifo_enabled", bool),
        Field("thre_pending", bool),
        Field("modem_delta", int, bits=4),
        Field("rx", bytes, max_length=BACKLOG_BYTES),
    )

    def __init__(self, irq: IrqLine, transmit: Callable[[bytes], None]) -> None:
        self._irq = irq
        self._transmit = transmit
        self._tx = bytearray()
        self._plain = False
        """Whether the core may collect what is transmitted."""
        self.reset()

    def reset(self) -> None:
        self.ier = 0
        self.lcr = 3
        self.mcr = 0
        self.scratch = 0
        self.divisor = 12
        self.fifo_enabled = False
        self.thre_pending = False
        self.modem_delta = 0
        self.rx: bytearray = bytearray()
        self._update()

    def after_load(self) -> None:
        self.rx = bytearray(self.rx)
        self._update()

    def place(self, window: Window) -> None:
        super().place(window)
        self._plain = False
        self._update()

    @property
    def room(self) -> int:
        """Bytes that `receive` would take now. Any thread."""
        return BACKLOG_BYTES - len(self.rx)

    def receive(self, data: bytes) -> int:
        """Input from the other end of the line; the number of bytes taken."""
        taken = data[: self.room]
        self.rx += taken
        self._update()
        return len(taken)

    def take(self, size: int) -> bytes:
        """Received input that the guest fetches other than through the registers."""
        data = bytes(self.rx[:size])
        if data:
            del self.rx[:size]
            self._update()
        return data

    def emit(self, data: bytes) -> None:
        """Transmit what does not come through the registers, in its order with what does."""
        self._collect()
        self._tx += data
        # A line is shown when it is whole; what has none waits for the end of the turn.
        if len(self._tx) >= FLUSH_BYTES or data.endswith(b"\n"):
            self.flush()

    def flush(self) -> None:
        """Hand over what was transmitted since the last call."""
        self._collect()
        if self._tx:
            data = bytes(self._tx)
            self._tx.clear()
            self._transmit(data)

    def _collect(self) -> None:
        """What the core took of the transmitter's register by itself."""
        data = self.window.drain()
        if data:
            self._tx += data
            self.thre_pending = True

    def save(self) -> PortableState:
        self._collect()
        return super().save()

    def mmio_read(self, offset: int, size: int) -> int:
        match offset:
            case 0:
                if self.lcr & LCR_DLAB:
                    return self.divisor & 0xFF
                byte = self.rx.pop(0) if self.rx else 0
                self._update()
                return byte
            case 1:
                return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
            case 2:
                cause = self._cause()
                if cause == IIR_THRE:
                    self.thre_pending = False
                    self._update()
                return cause | (IIR_FIFO if self.fifo_enabled else 0)
            case 3:
                return self.lcr
            case 4:
                return self.mcr
            case 5:
                return self._line_status()
            case 6:
                status = self._modem_lines() | self.modem_delta
                self.modem_delta = 0
                self._update()
                return status
            case 7:
                return self.scratch
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        match offset:
            case 0:
                if self.lcr & LCR_DLAB:
                    self.divisor = (self.divisor & 0xFF00) | value
                    return
                if self.mcr & MCR_LOOP:
                    self.receive(bytes((value,)))
                else:
                    self.emit(bytes((value,)))
                # Sent at once: each byte is an interrupt of its own.
                self.thre_pending = True
                self._update()
            case 1:
                if self.lcr & LCR_DLAB:
                    self.divisor = (self.divisor & 0xFF) | value << 8
                    return
                if value & IER_THRE and not self.ier & IER_THRE:
                    self.thre_pending = True
                self.ier = value & 0xF
                self._update()
            case 2:
                self.fifo_enabled = bool(value & FCR_ENABLE)
                if value & FCR_CLEAR_RX:
                    del self.rx[:FIFO_BYTES]
                self._update()
            case 3:
                self.lcr = value
                self._update()
            case 4:
                before = self._modem_lines()
                self.mcr = value & 0x1F
                self.modem_delta |= (before ^ self._modem_lines()) >> 4
                self._update()
            case 7:
                self.scratch = value

    def _modem_lines(self) -> int:
        if not self.mcr & MCR_LOOP:
            return MSR_IDLE
        dtr, rts, out1, out2 = (self.mcr >> bit & 1 for bit in range(4))
        return rts << 4 | dtr << 5 | out1 << 6 | out2 << 7

    def _cause(self) -> int:
        if self.ier & IER_RX and self.rx:
            return IIR_RX
        if self.ier & IER_THRE and self.thre_pending:
            return IIR_THRE
        if self.ier & IER_MODEM and self.modem_delta:
            return IIR_MODEM
        return IIR_NONE

    def _line_status(self) -> int:
        return LSR_THRE | LSR_TEMT | (LSR_DR if self.rx else 0)

    def _update(self) -> None:
        self._irq(self._cause() != IIR_NONE)
        self.window.shadow(5, self._line_status())
        # Plain polled output needs nobody here; with interrupts each byte has its own.
        plain = not (self.lcr & LCR_DLAB or self.mcr & MCR_LOOP or self.ier & IER_THRE)
        if plain != self._plain:
            self._plain = plain
            self._collect()
            self.window.sink(0, on=plain)

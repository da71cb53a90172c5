"""The UART against what drivers do with it."""

from __future__ import annotations

import pytest

from migrate.vm.devices.uart import BACKLOG_BYTES, Uart

THR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


class Line:
    """The UART's surroundings."""

    def __init__(self) -> None:
        self.level = False
        self.sent: list[bytes] = []
        self.uart = Uart(self.set_level, self.sent.append)

    def set_level(self, level: bool) -> None:
        self.level = level

    def read(self, offset: int) -> int:
        return self.uart.mmio_read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.mmio_write(offset, 1, value)


@pytest.fixture
def line() -> Line:
    return Line()


def test_output_leaves_in_batches_and_in_order(line: Line) -> None:
    for byte in b"hello":
        assert line.read(LSR) & 0x60 == 0x60
        line.write(THR, byte)
    line.uart.emit(b", world")
    assert line.sent == []
    line.uart.flush()
    line.uart.flush()
    assert line.sent == [b"hello, world"]
    line.uart.emit(b"x" * 2000)
    assert b"".join(line.sent[1:]) == b"x" * 2000


def test_receive_interrupt(line: Line) -> None:
    assert line.uart.receive(b"ab") == 2
    assert not line.level
    line.write(IER, 1)
    assert line.level
    assert line.read(IIR) & 0xF == 4
    assert line.read(LSR) & 1
    assert line.read(THR) == ord("a")
    assert line.level
    assert line.read(THR) == ord("b")
    assert not line.level
    assert line.read(LSR) & 1 == 0
    assert line.read(IIR) & 0xF == 1


def test_transmit_interrupt_is_cleared_by_reading_its_cause(line: Line) -> None:
    line.write(IER, 2)
    assert line.level
    assert line.read(IIR) & 0xF == 2
    assert not line.level
    line.write(THR, 65)
    assert line.level
    assert line.read(IIR) & 0xF == 2
    line.write(IER, 0)
    line.write(IER, 2)  # enabling it anew raises it anew
    assert line.level


def test_each_byte_sent_raises_the_line_anew(line: Line) -> None:
    """For drivers that never read the cause; the PLIC takes each call as an interrupt."""
    raised: list[bool] = []
    line.uart = Uart(raised.append, line.sent.append)
    line.write(IER, 2)
    raised.clear()
    for byte in b"abc":
        line.write(THR, byte)
    assert raised == [True] * 3


def test_received_data_come_before_the_transmitter(line: Line) -> None:
    line.write(IER, 3)
    line.uart.receive(b"x")
    assert line.read(IIR) & 0xF == 4
    line.read(THR)
    assert line.read(IIR) & 0xF == 2


def test_divisor_and_scratch(line: Line) -> None:
    line.write(LCR, 0x83)
    line.write(0, 0x34)
    line.write(1, 0x12)
    assert (line.read(0), line.read(1)) == (0x34, 0x12)
    line.write(LCR, 3)
    assert line.read(IER) == 0
    line.write(SCR, 0x5A)
    assert line.read(SCR) == 0x5A
    line.uart.flush()
    assert line.sent == []


def test_loopback_as_a_driver_probes_it(line: Line) -> None:
    assert line.read(MSR) & 0xF0 == 0xB0
    line.write(MCR, 0x10 | 0xA)
    assert line.read(MSR) & 0xF0 == 0x90
    line.write(THR, 77)
    assert line.read(THR) == 77
    line.uart.flush()
    assert line.sent == []


def test_a_16550a_shows_its_fifo(line: Line) -> None:
    assert line.read(IIR) & 0xC0 == 0
    line.write(IIR, 1)
    assert line.read(IIR) & 0xC0 == 0xC0
    line.uart.receive(b"0123456789abcdefXY")
    line.write(IIR, 3)  # clears the FIFO, not what is still on the wire
    assert bytes(line.uart.rx) == b"XY"


def test_input_is_bounded(line: Line) -> None:
    assert line.uart.receive(bytes(BACKLOG_BYTES + 5)) == BACKLOG_BYTES
    assert line.uart.room == 0
    assert line.uart.receive(b"x") == 0
    assert len(line.uart.take(10)) == 10
    assert line.uart.receive(b"x") == 1
    line.uart.save()

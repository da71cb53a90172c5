"""What the compiled part does for devices by itself is what they would have done."""

from __future__ import annotations

import pytest

from migrate.vm.core import Window
from migrate.vm.devices.uart import IER_THRE, LCR_DLAB, LSR_DR, LSR_TEMT, LSR_THRE, MCR_LOOP, Uart


class Recording(Window):
    """What a device asks for; collects as the compiled part does."""

    def __init__(self) -> None:
        self.shadows: dict[int, int] = {}
        self.on = False
        self.collected = bytearray()

    def shadow(self, offset: int, value: int) -> None:
        self.shadows[offset] = value

    def sink(self, offset: int, *, on: bool) -> None:
        assert offset == 0
        self.on = on

    def drain(self) -> bytes:
        data = bytes(self.collected)
        self.collected.clear()
        return data


@pytest.fixture
def placed() -> tuple[Uart, Recording, bytearray]:
    out = bytearray()
    uart = Uart(lambda _: None, out.extend)
    window = Recording()
    uart.place(window)
    return uart, window, out


def test_collected_output_keeps_its_order(placed: tuple[Uart, Recording, bytearray]) -> None:
    uart, window, out = placed
    assert window.on
    window.collected += b"one "
    uart.mmio_write(0, 1, ord("2"))  # the buffer was full: the device itself takes it
    window.collected += b" three\n"
    uart.flush()
    assert bytes(out) == b"one 2 three\n"


@pytest.mark.parametrize(("register", "value"), [(1, IER_THRE), (3, LCR_DLAB), (4, MCR_LOOP)])
def test_nothing_is_collected_where_a_write_means_more(
    placed: tuple[Uart, Recording, bytearray], register: int, value: int
) -> None:
    uart, window, out = placed
    window.collected += b"before"
    uart.mmio_write(register, 1, value)
    assert not window.on
    uart.mmio_write(register, 1, 0)
    assert window.on
    uart.flush()
    assert bytes(out) == b"before"


def test_the_line_status_follows_the_input(placed: tuple[Uart, Recording, bytearray]) -> None:
    uart, window, _ = placed
    idle = LSR_THRE | LSR_TEMT
    assert window.shadows[5] == uart.mmio_read(5, 1) == idle
    uart.receive(b"x")
    assert window.shadows[5] == uart.mmio_read(5, 1) == idle | LSR_DR
    uart.mmio_read(0, 1)
    assert window.shadows[5] == uart.mmio_read(5, 1) == idle


def test_a_saved_state_has_what_was_collected(placed: tuple[Uart, Recording, bytearray]) -> None:
    uart, window, out = placed
    window.collected += b"x"
    assert uart.save()["fields"]["thre_pending"] is True
    uart.flush()
    assert bytes(out) == b"x"

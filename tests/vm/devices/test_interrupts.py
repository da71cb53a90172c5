"""CLINT, PLIC, RTC and the test finisher: what they drive, and when."""

from __future__ import annotations

import pytest

from migrate.vm.devices.clint import MIP_MSIP, MIP_MTIP, Clint
from migrate.vm.devices.finisher import Finisher
from migrate.vm.devices.plic import MIP_MEIP, MIP_SEIP, Plic
from migrate.vm.devices.rtc import Rtc


class Wires:
    """Harts' pending interrupts and a clock."""

    def __init__(self) -> None:
        self.mip = {0: 0, 1: 0}
        self.ticks = 100
        self.rearmed = 0
        self.level = False

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        self.mip[hart] = (self.mip[hart] & ~mask) | value

    def set_time(self, ticks: int) -> None:
        self.ticks = ticks

    def rearm(self) -> None:
        self.rearmed += 1

    def line(self, level: bool) -> None:
        self.level = level

    def clint(self) -> Clint:
        return Clint(
            2,
            time=lambda: self.ticks,
            set_time=self.set_time,
            set_irq=self.set_irq,
            rearm=self.rearm,
        )


@pytest.fixture
def wires() -> Wires:
    return Wires()


def test_clint_software_interrupts(wires: Wires) -> None:
    clint = wires.clint()
    clint.mmio_write(4, 4, 1)
    assert wires.mip == {0: 0, 1: MIP_MSIP}
    assert clint.mmio_read(4, 4) == 1
    clint.mmio_write(4, 4, 0xFFFFFFFE)
    assert wires.mip == {0: 0, 1: 0}


def test_clint_timers(wires: Wires) -> None:
    clint = wires.clint()
    assert clint.next_tick() is None
    clint.mmio_write(0x4000, 8, 500)
    clint.mmio_write(0x4008, 4, 300)
    clint.mmio_write(0x400C, 4, 0)
    assert clint.next_tick() == 300
    assert wires.rearmed == 3
    wires.ticks = 400
    clint.tick(400)
    assert wires.mip == {0: 0, 1: MIP_MTIP}
    assert clint.next_tick() == 500
    # A timer that came due between two looks is not lost.
    wires.ticks = 600
    assert clint.next_tick() == 500
    clint.tick(600)
    assert wires.mip == {0: MIP_MTIP, 1: MIP_MTIP}
    assert clint.next_tick() is None
    clint.mmio_write(0x4000, 8, 1000)
    assert wires.mip[0] == 0
    clint.mmio_write(0x4000, 8, 10)
    assert wires.mip[0] == MIP_MTIP
    assert clint.mmio_read(0x4004, 4) == 0


def test_clint_time_is_the_clocks_and_can_be_set(wires: Wires) -> None:
    clint = wires.clint()
    wires.ticks = 0x1_2345_6789
    assert clint.mmio_read(0xBFF8, 8) == 0x1_2345_6789
    assert clint.mmio_read(0xBFFC, 4) == 1
    clint.mmio_write(0x4000, 8, 50)
    assert wires.mip[0] == MIP_MTIP
    clint.mmio_write(0xBFF8, 8, 0)
    assert wires.ticks == 0
    assert wires.mip[0] == 0
    assert clint.next_tick() == 50


def enable(plic: Plic, context: int, sources: int, priorities: dict[int, int]) -> None:
    plic.mmio_write(0x2000 + 0x80 * context, 4, sources)
    for source, priority in priorities.items():
        plic.mmio_write(4 * source, 4, priority)


def test_plic_delivers_the_highest_priority_first(wires: Wires) -> None:
    plic = Plic(2, wires.set_irq)
    enable(plic, 1, 0b11100, {2: 1, 3: 5, 4: 5})
    for source in (2, 3, 4):
        plic.line(source)(True)
    assert wires.mip == {0: MIP_SEIP, 1: 0}
    claim = 0x201004
    assert [plic.mmio_read(claim, 4) for _ in range(4)] == [3, 4, 2, 0]
    assert wires.mip[0] == 0
    plic.mmio_write(claim, 4, 4)
    assert wires.mip[0] == 0  # a line that stays high is no news
    plic.line(4)(True)
    assert wires.mip[0] == MIP_SEIP
    plic.line(4)(False)
    assert wires.mip[0] == 0
    plic.line(3)(True)  # in service: delivered after the completion
    assert wires.mip[0] == 0
    plic.mmio_write(claim, 4, 3)
    assert wires.mip[0] == MIP_SEIP


def test_plic_threshold_masks_the_interrupt_not_the_claim(wires: Wires) -> None:
    plic = Plic(2, wires.set_irq)
    enable(plic, 2, 1 << 7, {7: 3})
    plic.line(7)(True)
    assert wires.mip == {0: 0, 1: MIP_MEIP}
    plic.mmio_write(0x202000, 4, 3)
    assert wires.mip[1] == 0
    assert plic.mmio_read(0x1000, 4) == 1 << 7
    assert plic.mmio_read(0x202004, 4) == 7
    plic.mmio_write(0x202000, 4, 2)
    plic.mmio_write(0x202004, 4, 7)
    plic.line(7)(True)
    assert wires.mip[1] == MIP_MEIP


def test_plic_ignores_what_does_not_exist(wires: Wires) -> None:
    plic = Plic(2, wires.set_irq)
    enable(plic, 1, 0xFFFFFFFF, {0: 7, 1: 9})
    assert plic.mmio_read(0x2080, 4) == 0xFFFFFFFE
    assert plic.mmio_read(0, 4) == 0
    assert plic.mmio_read(4, 4) == 1  # three bits
    plic.mmio_write(0x201004, 4, 500)
    for offset in range(0, 0x600000, 0xFFC):
        plic.mmio_read(offset, 4)
        plic.mmio_write(offset, 4, 0xFFFFFFFF)
    plic.save()


def test_rtc_tells_the_time_and_alarms(wires: Wires) -> None:
    start = 1_700_000_000_123_456_700
    rtc = Rtc(wires.line, time=lambda: wires.ticks, now_ns=start, rearm=wires.rearm)
    wires.ticks += 10_000_000

    def now() -> int:
        return rtc.mmio_read(0, 4) | rtc.mmio_read(4, 4) << 32

    assert now() == start + 10**9
    alarm = now() + 5000
    rtc.mmio_write(0x10, 4, 1)
    rtc.mmio_write(0x0C, 4, alarm >> 32)
    rtc.mmio_write(0x08, 4, alarm & 0xFFFFFFFF)
    assert rtc.mmio_read(0x18, 4) == 1
    due = rtc.next_tick()
    assert due == wires.ticks + 50
    wires.ticks = due - 1
    rtc.tick(wires.ticks)
    assert not wires.level
    wires.ticks = due
    rtc.tick(wires.ticks)
    assert wires.level
    assert rtc.next_tick() is None
    rtc.mmio_write(0x1C, 4, 1)
    assert not wires.level
    rtc.mmio_write(0x04, 4, 0)
    rtc.mmio_write(0x00, 4, 77)
    assert now() == 77


def test_finisher() -> None:
    events: list[object] = []
    finisher = Finisher(events.append, lambda: events.append("reset"))
    finisher.mmio_write(0, 4, 0x5555)
    finisher.mmio_write(0, 4, 0x7_3333)
    finisher.mmio_write(0, 4, 0x7777)
    finisher.mmio_write(0, 4, 0x1234)
    finisher.mmio_write(4, 4, 0x5555)
    assert events == [0, 7, "reset"]

"""The engine's three defects: handled, and seen again where the handling is turned off."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from migrate.vm.core import Reason
from migrate.vm.riscv64 import core as core_module
from migrate.vm.riscv64 import engine, native, selftest
from migrate.vm.riscv64.native import NativeEngine
from tests.vm.riscv64 import asm
from tests.vm.riscv64.conftest import RAM, Box, MakeBox
from tests.vm.riscv64.test_traps import CODE, map_pages

needs_native = pytest.mark.skipif(
    core_module.native_problem() is not None, reason=f"{core_module.native_problem()}"
)


class Counter:
    """A device that counts what is written to it."""

    def __init__(self) -> None:
        self.writes = 0
        self.last = 0
        self.wrong = 0

    def mmio_read(self, offset: int, size: int) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.writes += 1
        self.wrong += value != self.last + 1
        self.last = value


def atomic_loop(box: Box) -> int:
    """a0 counts the turns; each adds 1 to memory, and writes its number to the device."""
    box.set(a1=RAM + 0x8000, a2=1, a3=0x1000_0000, a0=0)
    return box.put(
        CODE,
        asm.addi("a0", "a0", 1),
        asm.amoadd_d("zero", "a2", "a1"),
        asm.amoadd_d("zero", "a2", "a1"),
        asm.sw("a0", "a3"),
        asm.amoadd_d("zero", "a2", "a1"),
        asm.j(-20),
    )


def done(box: Box, device: Counter) -> tuple[int, int]:
    """Turns by the register, increments beyond it: run to the loop's start first."""
    while box.get("pc") != RAM + CODE:
        box.core.run(4)
    return box.get("a0"), box.word(0x8000) - 3 * box.get("a0")


def test_p1_stops_repeat_nothing(make_box: MakeBox) -> None:
    box, device = make_box(), Counter()
    box.core.map_mmio(0x1000_0000, 0x1000, device)
    box.set(pc=atomic_loop(box))
    stopper_ends = threading.Event()

    def stopper() -> None:
        while not stopper_ends.is_set():
            box.core.stop()
            time.sleep(0.00005)

    thread = threading.Thread(target=stopper)
    thread.start()
    stops = 0
    until = time.monotonic() + 1.0
    try:
        while time.monotonic() < until:
            ended = box.core.run(100_000)
            assert ended.reason in (Reason.STOPPED, Reason.BUDGET)
            stops += ended.reason is Reason.STOPPED
    finally:
        stopper_ends.set()
        thread.join()
    box.core.run(1)  # a stop that came late
    turns, extra = done(box, device)
    assert stops > 50 and turns > 1000
    assert extra == 0
    assert device.writes == turns and device.wrong == 0


def test_p1_stops_from_a_device_repeat_nothing(make_box: MakeBox) -> None:
    box, device = make_box(), Counter()

    class Stopping(Counter):
        def mmio_write(self, offset: int, size: int, value: int) -> None:
            super().mmio_write(offset, size, value)
            box.core.stop()

    device = Stopping()
    box.core.map_mmio(0x1000_0000, 0x1000, device)
    box.set(pc=atomic_loop(box))
    for _ in range(300):
        assert box.core.run(100_000).reason is Reason.STOPPED
    box.core.run(1)
    turns, extra = done(box, device)
    assert (extra, device.wrong, device.writes) == (0, 0, turns)


@needs_native
def test_p1_is_there_without_the_handling() -> None:
    from migrate.vm.riscv64.core import Riscv64Core

    box, device = Box(Riscv64Core(1, native=True)), Counter()
    box.core.map_mmio(0x1000_0000, 0x1000, device)
    box.set(pc=atomic_loop(box))
    backend = box.core.engine
    assert isinstance(backend, NativeEngine)
    backend.engine.set_async_stop(True)
    for _ in range(100):
        box.core.run(100_000)
    box.core.close()
    assert device.wrong > 0


def rewriting(box: Box, *, same_page: bool) -> list[int]:
    """Supervisor code that rewrites `li a0, n` and runs it, 50 times.

    Written through virtual page 1, run from page 2, both one physical page; with `same_page` the
    words are at changing places of it, so that most of its code stays.
    """
    page = RAM + 0x20000
    map_pages(box, {1: (page, 0xC7), 2: (page, 0xCB)})
    box.set(priv=1, medeleg=0)
    results = []
    box.put(0x20000, *[asm.NOP] * 512, asm.WFI)
    run = box.put(CODE, asm.sw("a1", "a2"), asm.FENCE_I, asm.jalr("ra", "a3"), asm.WFI, asm.j(-4))
    for i in range(1, 51):
        offset = i % 7 * 8 if same_page else 0
        box.set(a0=0, a1=asm.addi("a0", "zero", i), a2=0x1000 + offset, a3=0x2000)
        ended = box.run_at(run)
        assert ended.reason is Reason.WFI
        results.append(box.get("a0"))
    return results


@pytest.mark.parametrize("same_page", [False, True])
def test_p2_rewritten_code_runs(box: Box, same_page: bool) -> None:
    results = rewriting(box, same_page=same_page)
    if same_page:
        # the last of the seven places wins
        expected = [max(j for j in range(1, i + 1) if j % 7 == max_place(i)) for i in range(1, 51)]
        assert results == expected
    else:
        assert results == list(range(1, 51))


def max_place(i: int) -> int:
    return max(j % 7 for j in range(1, i + 1))


@pytest.fixture
def repair_off() -> Iterator[None]:
    native.set_code_repair(False)
    yield
    native.set_code_repair(True)


@needs_native
def test_p2_is_there_without_the_repair(repair_off: None) -> None:
    from migrate.vm.riscv64.core import Riscv64Core

    assert not selftest.aliased_stores()
    box = Box(Riscv64Core(1, native=True))
    assert rewriting(box, same_page=False) != list(range(1, 51))
    box.core.close()


def test_p2_code_rewritten_by_machine_mode(box: Box) -> None:
    """Writable and executable pages, which is all of machine mode."""
    pc = box.put(CODE, asm.sw("a1", "a2"), asm.FENCE_I, asm.jalr("ra", "a2"), asm.WFI, asm.j(-4))
    box.put(0x9004, asm.jalr("zero", "ra"))
    for i in range(1, 50):
        box.set(a1=asm.addi("a0", "zero", i), a2=RAM + 0x9000, priv=3)
        assert box.run_at(pc).reason is Reason.WFI
        assert box.get("a0") == i


def poke(box: Box, offset: int, word: int) -> None:
    box.memory[offset : offset + 4] = word.to_bytes(4, "little")


def test_p3_host_writes_to_code(box: Box) -> None:
    pc = box.put(CODE, asm.NOP, asm.WFI, asm.j(-4))
    for i in range(1, 50):
        poke(box, CODE, asm.addi("a0", "zero", i))
        if i % 2:
            box.core.written(RAM + CODE, 4)
        else:
            box.core.forget_code()
        box.run_at(pc)
        assert box.get("a0") == i
    # and without the handling the old code runs on
    poke(box, CODE, asm.addi("a0", "zero", 99))
    box.run_at(pc)
    assert box.get("a0") == 49


def test_p3_from_a_device_while_the_guest_runs(box: Box) -> None:
    """A device that writes code by DMA, called by the very code that then runs it."""
    target = 0x9000

    class Dma:
        count = 0

        def mmio_read(self, offset: int, size: int) -> int:
            return 0

        def mmio_write(self, offset: int, size: int, value: int) -> None:
            self.count += 1
            poke(box, target, asm.addi("a4", "a4", self.count))
            box.core.written(RAM + target, 4)

    device = Dma()
    box.core.map_mmio(0x1000_0000, 0x1000, device)
    box.put(target, asm.NOP, asm.jalr("zero", "ra"))
    pc = box.put(
        CODE, asm.sw("zero", "a3"), asm.jalr("ra", "a2"), asm.addi("a0", "a0", 1),
        asm.bne("a0", "a1", -12), asm.WFI, asm.j(-4),
    )  # fmt: skip
    box.set(a0=0, a1=40, a2=RAM + target, a3=0x1000_0000, a4=0)
    assert box.run_at(pc).reason is Reason.WFI
    assert box.get("a4") == 40 * 41 // 2


def test_p3_memory_mapped_in_growing_sizes(native: bool) -> None:
    """The engine gives blocks of memory overlapping numbers, unless it is made to look."""
    import ctypes
    import mmap

    from migrate.vm.riscv64.core import Riscv64Core

    core = Riscv64Core(1, native=native)
    blocks = []
    for i, size in enumerate((0x1000, 0x10000, 0x20000, 0x1000)):
        memory = mmap.mmap(-1, size)
        anchor = (ctypes.c_char * size).from_buffer(memory)
        core.map_memory(RAM + i * 0x100_0000, size, ctypes.addressof(anchor))
        blocks.append(memory)
    for value in (1, 2, 3):
        for i, memory in enumerate(blocks):
            memory[0:8] = asm.code(asm.addi("a0", "zero", value * 10 + i), asm.WFI)
            core.written(RAM + i * 0x100_0000, 8)
        for i in range(4):
            core.write_reg("pc", RAM + i * 0x100_0000)
            assert core.run(1000).reason is Reason.WFI
            assert core.read_reg("a0") == value * 10 + i
    core.close()


def test_the_engine_is_the_one_that_was_studied() -> None:
    import unicorn

    assert unicorn.__version__ == engine.UNICORN_VERSION == "2.1.4"


@needs_native
@pytest.mark.parametrize("name", selftest.CHECKS)
def test_self_tests(name: str) -> None:
    assert selftest.CHECKS[name]()

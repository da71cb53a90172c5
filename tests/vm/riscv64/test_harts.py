"""Several harts on one engine, swapped."""

from __future__ import annotations

import pytest

from migrate.vm.core import Reason
from tests.vm.riscv64 import asm
from tests.vm.riscv64.conftest import RAM, MakeBox
from tests.vm.riscv64.test_traps import CODE, TABLES, map_pages

MSIP, MTIP, SSIP = 1 << 3, 1 << 7, 1 << 1


@pytest.mark.parametrize("harts", [2, 4])
def test_turns(make_box: MakeBox, harts: int) -> None:
    """Every hart counts in its own registers and adds to one counter; no turn loses a step."""
    box = make_box(harts=harts)
    pc = box.put(
        CODE,
        asm.csrr("a3", "mhartid"),
        asm.addi("a0", "a0", 1),
        asm.amoadd_d("zero", "a2", "a1"),
        asm.lr_d("t0", "a4"),
        asm.addi("t0", "t0", 1),
        asm.sc_d("t1", "t0", "a4"),
        asm.bne("t1", "zero", -12),
        asm.j(-24),
    )
    for hart in range(harts):
        for name, value in (
            ("pc", pc), ("a1", RAM + 0x8000), ("a2", 1), ("a4", RAM + 0x8010), ("a0", 0),
        ):  # fmt: skip
            box.core.write_hart_reg(hart, name, value)
    for turn in range(200):
        box.core.select(turn % harts)
        assert box.core.run(50 + turn % 37 * 4).reason is Reason.BUDGET
    total = 0
    for hart in range(harts):
        box.core.select(hart)
        while box.get("pc") != pc + 4:
            box.core.run(1)
        assert box.get("a3") == hart
        assert box.get("a0") > 10
        total += box.get("a0")
    assert box.word(0x8000) == total
    assert box.word(0x8010) == total


def test_a_reservation_ends_with_the_turn(make_box: MakeBox) -> None:
    box = make_box(harts=2)
    pc = box.put(CODE, asm.lr_d("t0", "a1"), asm.WFI, asm.sc_d("t1", "t0", "a1"), asm.WFI)
    box.set(a1=RAM + 0x8000, t1=7)
    box.run_at(pc)
    box.core.select(1)
    box.core.select(0)
    box.core.run(1000)
    assert box.get("t1") == 1


def test_floating_point_flags_and_rounding_are_a_harts_own(make_box: MakeBox) -> None:
    box = make_box(harts=2)
    pc = box.put(CODE, asm.csrw("fcsr", "a1"), asm.WFI, asm.csrr("a0", "fcsr"), asm.WFI)
    for hart, value in ((0, 0x65), (1, 0x2A)):
        box.core.select(hart)
        box.set(mstatus=3 << 13, a1=value)
        box.run_at(pc)
    for hart, value in ((0, 0x65), (1, 0x2A)):
        box.core.select(hart)
        box.core.run(1000)
        assert box.get("a0") == value


def test_interrupts_reach_the_right_hart(make_box: MakeBox) -> None:
    box = make_box(harts=3)
    box.put(0x2000, asm.csrr("s2", "mcause"), asm.csrr("s3", "mhartid"), asm.WFI, asm.j(-4))
    loop = box.put(CODE, asm.addi("a0", "a0", 1), asm.j(-4))
    for hart in range(3):
        box.core.select(hart)
        box.set(pc=loop, mtvec=RAM + 0x2000, mie=MSIP | MTIP, mstatus=1 << 3)
    box.core.set_irq(1, MSIP, MSIP)  # not selected
    assert [box.core.irq_wakes(hart) for hart in range(3)] == [False, True, False]
    box.core.select(0)
    assert box.core.run(2000).reason is Reason.BUDGET
    box.core.select(1)
    box.core.run(2000)
    assert (box.get("s2"), box.get("s3")) == (1 << 63 | 3, 1)
    box.core.select(2)
    assert box.core.run(2000).reason is Reason.BUDGET
    assert box.get("s2") == 0
    box.core.set_irq(2, MTIP, MTIP)
    box.core.run(2000)
    assert (box.get("s2"), box.get("s3")) == (1 << 63 | 7, 2)


def test_interrupts_from_inside_a_device(make_box: MakeBox) -> None:
    """A device raises interrupts of the running hart and of another one."""
    box = make_box(harts=2)

    class Device:
        def mmio_read(self, offset: int, size: int) -> int:
            return 0

        def mmio_write(self, offset: int, size: int, value: int) -> None:
            box.core.set_irq(value, MSIP, MSIP)

    box.core.map_mmio(0x1000_0000, 0x1000, Device())
    box.put(0x2000, asm.csrr("s2", "mcause"), asm.WFI, asm.j(-4))
    pc = box.put(
        CODE, asm.sw("a0", "a1"), asm.addi("a2", "a2", 1), asm.j(4), asm.addi("a3", "a3", 1),
        asm.j(-4),
    )  # fmt: skip
    for hart in (0, 1):
        box.core.select(hart)
        box.set(pc=pc, mtvec=RAM + 0x2000, mie=MSIP, mstatus=1 << 3, a1=0x1000_0000, a0=1)
    box.core.select(0)
    assert box.core.run(4000).reason is Reason.BUDGET
    assert not box.core.irq_wakes(0) and box.core.irq_wakes(1)
    box.core.select(1)
    box.core.run(100)
    assert box.get("s2") == 1 << 63 | 3
    box.core.select(0)
    box.set(pc=pc, a0=0, a3=0)
    box.core.run(40_000)
    assert box.get("s2") == 1 << 63 | 3


def test_translations_are_a_harts_own(make_box: MakeBox) -> None:
    """Same virtual address, two page tables; and one table with an owed flush."""
    box = make_box(harts=2)
    code = box.put(CODE, asm.ld("a0", "a1"), asm.WFI, asm.j(-8))
    box.memory[0x8000:0x8008] = (111).to_bytes(8, "little")
    box.memory[0x9000:0x9008] = (222).to_bytes(8, "little")
    map_pages(box, {5: (RAM + 0x8000, 0xC7)})
    box.set(priv=1, a1=0x5000, pc=code)
    box.core.run(1000)
    assert box.get("a0") == 111
    box.core.select(1)
    # other tables at another place
    other = TABLES + 0x10000
    box.memory[other : other + 0x3000] = box.memory[TABLES : TABLES + 0x3000]
    for level in (0, 1):
        entry = (RAM + other + 0x1000 * (level + 1)) >> 12 << 10 | 1
        at = other + 0x1000 * level
        box.memory[at : at + 8] = entry.to_bytes(8, "little")
    leaf = other + 0x2000 + 5 * 8
    box.memory[leaf : leaf + 8] = ((RAM + 0x9000) >> 12 << 10 | 0xC7).to_bytes(8, "little")
    box.set(satp=8 << 60 | (RAM + other) >> 12, priv=1, a1=0x5000, pc=code)
    box.core.run(1000)
    assert box.get("a0") == 222
    box.core.select(0)
    box.core.run(1000)
    assert box.get("a0") == 111
    # the page is mapped elsewhere by another hart, which sends a fence
    leaf = TABLES + 0x2000 + 5 * 8
    box.core.select(1)
    box.memory[leaf : leaf + 8] = ((RAM + 0x9000) >> 12 << 10 | 0xC7).to_bytes(8, "little")
    box.core.owe_tlb_flush(0)
    box.core.select(0)
    box.core.run(1000)
    assert box.get("a0") == 222
    box.memory[leaf : leaf + 8] = ((RAM + 0x8000) >> 12 << 10 | 0xC7).to_bytes(8, "little")
    box.core.owe_tlb_flush(0)  # selected: at once
    box.core.run(1000)
    assert box.get("a0") == 111


def test_code_that_one_hart_rewrites_is_new_to_the_other(make_box: MakeBox) -> None:
    box = make_box(harts=2)
    box.put(0x9000, asm.NOP, asm.WFI, asm.j(-4))
    write = box.put(CODE, asm.sw("a1", "a2"), asm.WFI)
    for i in range(1, 100):
        box.core.select(0)
        box.set(a1=asm.addi("a0", "zero", i), a2=RAM + 0x9000)
        box.run_at(write)
        box.core.select(1)
        box.run_at(RAM + 0x9000)
        assert box.get("a0") == i


def test_bad_harts_are_refused(make_box: MakeBox) -> None:
    box = make_box(harts=2)
    for bad in (-1, 2):
        with pytest.raises(IndexError):
            box.core.select(bad)

"""Traps, interrupts and waiting, as the privileged architecture has them."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time

import pytest

from migrate.vm.clock import TimeKind, TimeSource
from migrate.vm.core import Reason
from tests.vm.riscv64 import asm
from tests.vm.riscv64.conftest import RAM, Box, MakeBox

M, S, U = 3, 1, 0
M_HANDLER, S_HANDLER, CODE = 0x2000, 0x3000, 0x1000
TABLES = 0x10000


def handlers(box: Box) -> None:
    """Both handlers record cause, value and pc, and wait for ever."""
    for offset, mode in ((M_HANDLER, "m"), (S_HANDLER, "s")):
        box.put(
            offset,
            asm.csrr("s2", f"{mode}cause"),
            asm.csrr("s3", f"{mode}tval"),
            asm.csrr("s4", f"{mode}epc"),
            asm.addi("s5", "zero", M if mode == "m" else S),
            asm.WFI,
            asm.j(-4),
        )
    box.set(mtvec=RAM + M_HANDLER, stvec=RAM + S_HANDLER)


def trap(box: Box, priv: int, *words: int) -> tuple[int, int, int, int]:
    """Run code until it traps: (mode, cause, tval, epc offset in the code)."""
    handlers(box)
    box.set(priv=priv, s2=0, s3=0, s4=0, s5=99)
    pc = box.put(CODE, *words)
    assert box.run_at(pc).reason is Reason.WFI
    return box.get("s5"), box.get("s2"), box.get("s3"), box.get("s4") - pc


@pytest.mark.parametrize(("priv", "cause"), [(U, 8), (S, 9), (M, 11)])
def test_ecall_goes_to_machine_mode(box: Box, priv: int, cause: int) -> None:
    mode, got, value, offset = trap(box, priv, asm.NOP, asm.ECALL)
    assert (mode, got, value, offset) == (M, cause, 0, 4)
    assert box.get("mstatus") >> 11 & 3 == priv


def test_ecall_from_user_mode_is_delegated(box: Box) -> None:
    box.set(medeleg=1 << 8, mstatus=1 << 1)
    assert trap(box, U, asm.NOP, asm.ECALL)[:2] == (S, 8)
    assert box.get("mstatus") & 0x122 == 0x20  # SPIE from SIE, SIE off, SPP user


def test_delegation_is_not_for_machine_mode(box: Box) -> None:
    box.set(medeleg=0xB1FF)
    assert trap(box, M, asm.EBREAK)[:2] == (M, 3)
    assert trap(box, S, asm.EBREAK)[:2] == (S, 3)


@pytest.mark.parametrize("compressed", [False, True])
def test_ebreak_is_precise(box: Box, compressed: bool) -> None:
    word = 0x00019002 if compressed else asm.EBREAK  # c.ebreak; c.nop
    assert trap(box, U, asm.NOP, word)[1::2] == (3, 4)


def test_illegal_instruction(box: Box) -> None:
    box.set(medeleg=1 << 2)
    assert trap(box, U, asm.NOP, 0xFFFFFFFF)[:2] == (S, 2)
    assert trap(box, U, asm.NOP, asm.csrr("a0", "mstatus"))[1::2] == (2, 4)
    # after a compressed instruction
    assert trap(box, U, 0xFFFF0001, 0xFFFFFFFF)[1::2] == (2, 2)


def test_misaligned_atomic(box: Box) -> None:
    box.set(a1=RAM + 0x8003, medeleg=1 << 6)
    assert trap(box, S, asm.amoadd_d("a0", "a2", "a1")) == (S, 6, RAM + 0x8003, 0)


def test_access_faults(box: Box) -> None:
    box.set(a1=0x4000_0010)
    assert trap(box, M, asm.NOP, asm.ld("a0", "a1", 0x18)) == (M, 5, 0x4000_0028, 4)
    assert trap(box, M, asm.NOP, asm.jalr("zero", "a1"))[:3] == (M, 1, 0x4000_0010)


def test_access_fault_after_a_breakpoint(box: Box) -> None:
    """The engine's own error code of the breakpoint must not hide the fault."""
    handlers(box)
    box.put(M_HANDLER, asm.csrw("mtvec", "t0"), asm.ld("a0", "a1"))
    box.set(a1=0x4000_0000, t0=RAM + S_HANDLER, priv=M)
    box.put(S_HANDLER, asm.csrr("s2", "mcause"), asm.csrr("s3", "mtval"), asm.WFI, asm.j(-4))
    box.run_at(box.put(CODE, asm.EBREAK))
    assert (box.get("s2"), box.get("s3")) == (5, 0x4000_0000)


def map_pages(box: Box, pages: dict[int, tuple[int, int]]) -> None:
    """Sv39 with 4 KiB pages below 2 MiB: {virtual page: (physical, rights)}."""
    for level in (0, 1):
        entry = (RAM + TABLES + 0x1000 * (level + 1)) >> 12 << 10 | 1
        offset = TABLES + 0x1000 * level
        box.memory[offset : offset + 8] = entry.to_bytes(8, "little")
    for page, (physical, rights) in pages.items():
        offset = TABLES + 0x2000 + page * 8
        box.memory[offset : offset + 8] = (physical >> 12 << 10 | rights).to_bytes(8, "little")
    # The identity of the first gigabyte of RAM, for handlers and code.
    offset = TABLES + 2 * 8
    box.memory[offset : offset + 8] = (RAM >> 12 << 10 | 0xCF).to_bytes(8, "little")
    box.set(satp=8 << 60 | (RAM + TABLES) >> 12)


@pytest.mark.parametrize(
    ("word", "cause", "address"),
    [
        (asm.ld("a0", "a1", 8), 13, 0x5008),
        (asm.sd("a0", "a1", 16), 15, 0x5010),
        (asm.jalr("zero", "a1"), 12, 0x5000),
        (asm.sd("a0", "a2"), 15, 0x6000),  # read-only page
    ],
)
def test_page_faults_tell_the_address(box: Box, word: int, cause: int, address: int) -> None:
    box.set(a1=0x5000, a2=0x6000, medeleg=0xB1FF)
    map_pages(box, {6: (RAM + 0x8000, 0x43)})
    mode, got, value, offset = trap(box, S, asm.NOP, word)
    assert (mode, got, value) == (S, cause, address)
    if cause != 12:
        assert offset == 4


def test_access_fault_under_translation_tells_the_virtual_address(box: Box) -> None:
    map_pages(box, {7: (0x4000_0000, 0xC7)})
    box.set(a1=0x7000, sp=0x7000)
    assert trap(box, S, asm.NOP, asm.lw("a0", "a1", 4)) == (M, 5, 0x7004, 4)
    # c.ldsp a0, 24(sp); c.nop
    assert trap(box, S, 0x00016562)[1:3] == (5, 0x7018)
    # c.lw a0, 68(a1)
    assert trap(box, S, 0x000141E8)[1:3] == (5, 0x7044)


def test_round_trip_from_user_over_supervisor_to_machine(box: Box) -> None:
    """A user ecall handled in S, which calls M, which returns; 1,000 times."""
    user, supervisor, machine = 0x1000, 0x3000, 0x2000
    box.put(user, asm.addi("a0", "a0", 1), asm.ECALL, asm.bne("a0", "a1", -8), asm.EBREAK)
    box.put(
        supervisor,
        asm.csrr("t0", "sepc"),
        asm.addi("t0", "t0", 4),
        asm.csrw("sepc", "t0"),
        asm.addi("a2", "a2", 1),
        asm.csrr("t2", "sstatus"),
        asm.ECALL,
        asm.csrw("sstatus", "t2"),
        asm.SRET,
    )
    box.put(
        machine,
        asm.csrr("t1", "mepc"),
        asm.addi("t1", "t1", 4),
        asm.csrw("mepc", "t1"),
        asm.addi("a3", "a3", 1),
        asm.csrr("a4", "mcause"),
        asm.addi("a5", "zero", 9),
        asm.beq("a4", "a5", 12),
        asm.WFI,
        asm.j(-4),
        asm.MRET,
    )
    box.set(
        mtvec=RAM + machine, stvec=RAM + supervisor, medeleg=1 << 8, priv=U,
        a0=0, a1=1000, a2=0, a3=0,
    )  # fmt: skip
    assert box.run_at(RAM + user).reason is Reason.WFI
    assert (box.get("a0"), box.get("a2"), box.get("a3")) == (1000, 1000, 1001)
    assert box.get("a4") == 3


@pytest.mark.parametrize(
    ("bit", "delegated", "mode"), [(7, False, M), (3, False, M), (5, True, S), (1, True, S)]
)
def test_interrupts(box: Box, bit: int, delegated: bool, mode: int) -> None:
    handlers(box)
    box.set(
        priv=mode, mie=1 << bit, mideleg=1 << bit if delegated else 0, s5=99, a0=0,
        mstatus=1 << 3 | 1 << 1,
    )  # fmt: skip
    loop = box.put(CODE, asm.addi("a0", "a0", 1), asm.j(-4))
    assert box.run_at(loop, 5000).reason is Reason.BUDGET
    assert box.get("s5") == 99 and box.get("a0") > 100
    box.core.set_irq(0, 1 << bit, 1 << bit)
    assert box.core.irq_wakes(0)
    before = box.get("a0")
    box.core.run(5000)
    assert (box.get("s5"), box.get("s2")) == (mode, 1 << 63 | bit)
    assert box.get("a0") == before
    assert box.get("s4") in (loop, loop + 4)


def test_vectored_interrupt(box: Box) -> None:
    handlers(box)
    box.set(mtvec=RAM + M_HANDLER - 7 * 4 | 1, priv=M, mie=1 << 7, mstatus=1 << 3)
    box.core.set_irq(0, 1 << 7, 1 << 7)
    box.run_at(box.put(CODE, asm.j(0)), 1000)
    assert box.get("s2") == 1 << 63 | 7


@pytest.mark.parametrize("priv", [M, S])
def test_wfi_waits_and_wakes(box: Box, priv: int) -> None:
    """Interrupts disabled: a pending one ends the wait without a trap."""
    pc = box.put(CODE, asm.WFI, asm.addi("a0", "a0", 1), asm.WFI, asm.j(-4))
    box.set(priv=priv, mie=1 << 5, mideleg=1 << 5, a0=0)
    ended = box.run_at(pc)
    assert ended.reason is Reason.WFI and ended.pc == pc + 4
    assert not box.core.irq_wakes(0)
    box.core.set_irq(0, 1 << 5, 1 << 5)
    assert box.core.run(1000).reason is Reason.BUDGET  # WFI is a no-op now
    assert box.get("a0") == 1


def test_wfi_in_user_mode_is_illegal(box: Box) -> None:
    assert trap(box, U, asm.WFI)[1] == 2


def test_software_writes_of_mip_are_kept(box: Box) -> None:
    """Firmware raises STIP itself; the board drives only its own bits."""
    pc = box.put(CODE, asm.csrw("mip", "a1"), asm.csrr("a2", "mip"), asm.WFI)
    box.set(a1=1 << 5 | 1 << 1, priv=M)
    box.core.set_irq(0, 1 << 7, 1 << 7)
    box.run_at(pc)
    assert box.get("a2") == 1 << 5 | 1 << 1 | 1 << 7
    box.core.set_irq(0, 1 << 7, 0)
    assert box.get("mip") == 1 << 5 | 1 << 1


def test_firmware_delivers_a_supervisor_interrupt(box: Box) -> None:
    """Raising STIP in machine mode and returning traps at once in supervisor mode."""
    handlers(box)
    pc = box.put(CODE, asm.csrw("mip", "a1"), asm.csrw("mepc", "a2"), asm.MRET)
    box.set(
        priv=M, a1=1 << 5, a2=box.put(0x5000, asm.addi("a3", "a3", 1), asm.j(-4)), mideleg=0x222,
        mie=0x222, mstatus=1 << 11 | 1 << 1, a3=0, s5=0,
    )  # fmt: skip
    assert box.run_at(pc).reason is not Reason.ERROR
    assert (box.get("s5"), box.get("s2"), box.get("a3")) == (S, 1 << 63 | 5, 0)


def test_time_is_read_where_allowed(box: Box) -> None:
    box.core.set_time_source(TimeSource(TimeKind.FROZEN, 12345))
    pc = box.put(CODE, asm.csrr("a0", "time"), asm.WFI)
    box.set(priv=M)
    assert box.run_at(pc).reason is Reason.WFI
    assert box.get("a0") == 12345
    assert trap(box, S, asm.csrr("a0", "time"))[1] == 2
    box.set(mcounteren=2, a0=0)
    box.set(priv=S)
    assert box.run_at(box.put(CODE, asm.csrr("a0", "time"), asm.WFI)).reason is Reason.WFI
    assert box.get("a0") == 12345
    assert trap(box, U, asm.csrr("a0", "time"))[1] == 2
    box.set(scounteren=2, a0=0)
    assert trap(box, U, asm.csrr("a0", "time"), asm.ECALL)[1] == 8
    assert box.get("a0") == 12345
    assert trap(box, M, asm.csrrw("a0", "time", "a1"))[1] == 2  # read-only


def test_pmp_registers_are_kept_and_enforced(box: Box) -> None:
    """OpenSBI's habit: everything allowed, but for the firmware's own range."""
    protected = RAM + 0x8000
    box.set(a1=protected >> 2 | 0x1FF, a2=(1 << 54) - 1, a3=0x1F18, a4=protected, priv=M)
    handlers(box)
    pc = box.put(
        CODE,
        asm.csrw("pmpaddr0", "a1"),
        asm.csrw("pmpaddr1", "a2"),
        asm.csrw("pmpcfg0", "a3"),
        asm.csrr("a5", "pmpcfg0"),
        asm.csrr("a6", "pmpaddr0"),
        asm.ld("t0", "a4"),
        asm.WFI,
    )
    assert box.run_at(pc).reason is Reason.WFI
    assert (box.get("a5"), box.get("a6")) == (0x1F18, protected >> 2 | 0x1FF)
    fields = box.core.get_state(0)["fields"]
    assert fields["pmpcfg"][:2] == [0x18, 0x1F]
    assert fields["pmpaddr"][0] == protected >> 2 | 0x1FF
    assert trap(box, S, asm.ld("t0", "a4"))[:3] == (M, 5, protected)
    box.set(a4=RAM + 0x9000)
    assert trap(box, S, asm.ld("t0", "a4"), asm.ECALL)[1] == 9


def test_supervisor_ecall_goes_to_the_board(make_box: MakeBox) -> None:
    calls: list[tuple[int, int]] = []

    def sbi(hart: int) -> None:
        calls.append((hart, box.get("a7")))
        box.core.write_reg("a0", 77)
        if box.get("a7") == 2:
            box.core.end_turn()

    box = make_box(ecall=sbi)
    handlers(box)
    box.set(priv=S, a7=1, a1=0)
    pc = box.put(
        CODE, asm.ECALL, asm.add("a1", "a1", "a0"), asm.addi("a7", "zero", 2), asm.ECALL,
        asm.addi("a1", "a1", 1), asm.WFI, asm.j(-4),
    )  # fmt: skip
    ended = box.run_at(pc)
    assert ended.reason is Reason.TURN and ended.pc == pc + 16
    assert calls == [(0, 1), (0, 2)] and box.get("a1") == 77
    assert box.core.run(1000).reason is Reason.WFI
    assert box.get("a1") == 78
    assert trap(box, U, asm.ECALL)[:2] == (M, 8)  # from user mode it is the guest's


def test_an_error_in_the_board_comes_out_of_run(make_box: MakeBox) -> None:
    def sbi(hart: int) -> None:
        raise ZeroDivisionError("in the board")

    box = make_box(ecall=sbi)
    box.set(priv=S)
    pc = box.put(CODE, asm.ECALL, asm.j(0))
    with pytest.raises(ZeroDivisionError, match="in the board"):
        box.run_at(pc)
    assert box.core.run(100).reason is Reason.BUDGET


@pytest.mark.parametrize("translated", [False, True])
def test_a_handler_that_cannot_be_fetched_uses_up_the_budget(box: Box, translated: bool) -> None:
    """Trap upon trap without one instruction between: it must end, and be stoppable."""
    pc = box.put(CODE, asm.ECALL)
    if translated:
        map_pages(box, {})
        box.set(priv=S, medeleg=1 << 9 | 1 << 12, stvec=0x5000)
    else:
        box.set(priv=M, mtvec=0x4000_0000)
    assert box.run_at(pc, 20_000).reason is Reason.BUDGET
    box.core.stop()
    assert box.core.run(1 << 40).reason is Reason.STOPPED
    timer = threading.Timer(0.05, box.core.stop)
    timer.start()
    assert box.core.run(1 << 40).reason is Reason.STOPPED
    timer.join()
    assert box.core.run(1 << 40, time.monotonic_ns() + 10**7).reason is Reason.DEADLINE


def test_stores_to_nowhere(box: Box, native: bool) -> None:
    """Access faults with the compiled part; without, the engine notices too late to be exact."""
    box.set(a1=0x4000_0010, a2=RAM + 0x8000, a3=55)
    words = (asm.NOP, asm.sd("a0", "a1", -8), asm.sd("a3", "a2"), asm.j(0))
    if not native:
        ended = box.run_at(box.put(CODE, *words))
        assert ended.reason is Reason.ERROR
        assert "write" in ended.detail.lower() and "hart 0" in ended.detail
        return
    assert trap(box, M, *words) == (M, 7, 0x4000_0008, 4)
    assert box.word(0x8000) == 0  # nothing after it ran
    map_pages(box, {7: (0x4000_0000, 0xC7), 8: (RAM + 0x8000, 0xC7)})
    box.set(a1=0x7000, sp=0x7000, medeleg=1 << 7)
    assert trap(box, S, asm.sw("a0", "a1", 2044), asm.NOP) == (S, 7, 0x77FC, 0)
    assert trap(box, S, asm.amoadd_d("a0", "a3", "a1")) == (S, 7, 0x7000, 0)
    assert trap(box, S, 0x0000EC2A) == (S, 7, 0x7018, 0)  # c.sdsp a0, 24(sp)
    assert trap(box, S, 0x0000C1E8) == (S, 7, 0x7044, 0)  # c.sw a0, 68(a1)
    box.set(a1=0x8000)
    assert trap(box, S, asm.sd("a3", "a1"), asm.EBREAK)[:2] == (M, 3)
    assert box.word(0x8000) == 55


def test_stores_to_read_only_memory(box: Box, native: bool) -> None:
    memory = mmap.mmap(-1, 0x1000)
    memory[:8] = asm.code(asm.addi("a0", "zero", 9), asm.WFI)
    anchor = (ctypes.c_char * 0x1000).from_buffer(memory)
    box.core.map_memory(0x2000_0000, 0x1000, ctypes.addressof(anchor), readonly=True)
    box.set(a1=0x2000_0000)
    if native:
        assert trap(box, M, asm.sd("a0", "a1"), asm.NOP) == (M, 7, 0x2000_0000, 0)
    assert box.run_at(0x2000_0000).reason is Reason.WFI and box.get("a0") == 9
    assert memory[:4] == asm.code(asm.addi("a0", "zero", 9))
    box.core.unmap_memory(0x2000_0000, 0x1000)
    assert trap(box, M, asm.ld("a0", "a1"))[:3] == (M, 5, 0x2000_0000)

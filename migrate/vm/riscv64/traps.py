"""Traps of a RISC-V hart as pure functions of its environment's bytes (layer 2).

What the compiled part does in C, for the engine without it: entry to a trap handler, the counters
that the engine does not emulate, the address of a faulting load. Memory is read physically, page
tables are walked here: the engine's own walk may fault, and sets accessed bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from migrate.vm.clock import NS_PER_TICK
from migrate.vm.riscv64.layout import OFFSETS
from migrate.vm.riscv64.registers import (
    MSTATUS_MIE,
    MSTATUS_MPIE,
    MSTATUS_MPP,
    MSTATUS_SIE,
    MSTATUS_SPIE,
    MSTATUS_SPP,
    PRV_M,
    PRV_S,
)

FETCH_ACCESS: Final = 1
ILLEGAL: Final = 2
BREAKPOINT: Final = 3
LOAD_ACCESS: Final = 5
ECALL_U: Final = 8
WITH_ADDRESS: Final = frozenset((0, 1, 4, 5, 6, 7, 12, 13, 15))
WFI_WORD: Final = 0x1050_0073

_MASK: Final = (1 << 64) - 1
_PPN: Final = (1 << 44) - 1
_CYCLE, _TIME, _INSTRET = 0xC00, 0xC01, 0xC02
_COUNTERS: Final = {_CYCLE, _TIME, _INSTRET, 0xB00, 0xB02}


def word(env: bytes, name: str) -> int:
    """A field of the environment."""
    offset = OFFSETS[name]
    return int.from_bytes(env[offset : offset + 8], "little")


def entry(env: bytes, cause: int, pc: int, tval: int) -> dict[str, int]:
    """What entering the handler of an exception changes (privileged spec 3.1.6, 4.1.1)."""
    status, priv = word(env, "mstatus"), word(env, "priv")
    if priv <= PRV_S and word(env, "medeleg") >> cause & 1:
        status = status & ~MSTATUS_SPIE | (MSTATUS_SPIE if status & MSTATUS_SIE else 0)
        status = status & ~MSTATUS_SPP | (MSTATUS_SPP if priv == PRV_S else 0)
        mode, new_priv = "s", PRV_S
        status &= ~MSTATUS_SIE
    else:
        status = status & ~MSTATUS_MPIE | (MSTATUS_MPIE if status & MSTATUS_MIE else 0)
        status = status & ~MSTATUS_MPP | priv << 11
        mode, new_priv = "m", PRV_M
        status &= ~MSTATUS_MIE
    return {
        "mstatus": status,
        f"{mode}cause": cause,
        f"{mode}epc": pc,
        f"{mode}tval": tval,
        "pc": word(env, f"{mode}tvec") & ~3,
        "priv": new_priv,
        "load_res": _MASK,
    }


def _physical(uc: Any, gpa: int, size: int) -> int | None:
    try:
        return int.from_bytes(uc.mem_read(gpa, size), "little")
    except Exception as error:
        if type(error).__name__ != "UcError":
            raise
        return None


def _translate(uc: Any, env: bytes, address: int) -> int | None:
    """Where an instruction fetch from `address` goes."""
    satp = word(env, "satp")
    if word(env, "priv") == PRV_M or not satp >> 60:
        return address
    table = (satp & _PPN) << 12
    for level in range((satp >> 60) - 6, -1, -1):
        pte = _physical(uc, table + (address >> (12 + 9 * level) & 511) * 8, 8)
        if pte is None or not pte & 1:
            return None
        table = (pte >> 10 & _PPN) << 12
        if pte & 0xE:
            return table | address & (1 << (12 + 9 * level)) - 1
    return None


def fetch(uc: Any, env: bytes, pc: int) -> int:
    """The instruction at pc, 16 or 32 bits; 0 (illegal) where there is none."""
    halves = []
    for at in (pc, pc + 2):
        gpa = _translate(uc, env, at & _MASK)
        half = None if gpa is None else _physical(uc, gpa, 2)
        if half is None:
            return 0
        halves.append(half)
        if half & 3 != 3:
            return half if at == pc else halves[0] | half << 16
    return halves[0] | halves[1] << 16


def atomic_cause(uc: Any, env: bytes, pc: int, cause: int) -> int:
    """The engine does an AMO's load first and calls its faults load faults; they are a store's."""
    if cause in (4, 5, 13):
        insn = fetch(uc, env, pc)
        if insn & 0x7F == 0x2F and insn >> 27 != 2:
            return cause + 2
    return cause


def counter_read(uc: Any, env: bytes, pc: int, ticks: Callable[[], int]) -> tuple[int, int] | None:
    """(register, value) if the illegal instruction at pc is a permitted read of a counter."""
    insn = fetch(uc, env, pc)
    csr, funct3, rd, rs1 = insn >> 20, insn >> 12 & 7, insn >> 7 & 31, insn >> 15 & 31
    if insn & 0x7F != 0x73 or csr not in _COUNTERS or funct3 not in (1, 2, 3, 5, 6, 7):
        return None
    writes = funct3 in (1, 5) or rs1 != 0
    priv = word(env, "priv")
    if csr >> 8 == 0xC:
        allowed = _MASK
        if priv < PRV_M:
            allowed &= word(env, "mcounteren")
        if priv < PRV_S:
            allowed &= word(env, "scounteren")
        if writes or not allowed >> (csr & 31) & 1:
            return None
    elif priv < PRV_M:
        return None
    value = ticks()
    if csr != _TIME:
        value = value * NS_PER_TICK // (4 if csr & 0xFF == 2 else 1)
    return rd, value & _MASK


def load_address(uc: Any, env: bytes, pc: int) -> int:
    """The address that the load at pc reads."""
    insn = fetch(uc, env, pc)
    if insn & 3 == 3:
        base = word(env, f"x{insn >> 15 & 31}")
        imm = insn >> 20
        offset = 0 if insn & 0x7F == 0x2F else imm - ((imm & 0x800) << 1)
    elif insn & 3 == 0:  # c.fld, c.lw, c.ld
        base = word(env, f"x{8 + (insn >> 7 & 7)}")
        offset = insn >> 7 & 0x38
        offset |= insn >> 4 & 4 | insn << 1 & 0x40 if insn >> 13 & 3 == 2 else insn << 1 & 0xC0
    else:  # c.fldsp, c.lwsp, c.ldsp
        base = word(env, "x2")
        offset = insn >> 7 & 0x20
        if insn >> 13 & 3 == 2:
            offset |= insn >> 2 & 0x1C | insn << 4 & 0xC0
        else:
            offset |= insn >> 2 & 0x18 | insn << 4 & 0x1C0
    return base + offset & _MASK


def pmp_range(cfg: list[int], addr: list[int], i: int) -> tuple[int, int]:
    """First and last address of a PMP entry, as the engine derives them."""
    match cfg[i] >> 3 & 3:
        case 1:
            return (addr[i - 1] << 2 if i else 0) & _MASK, ((addr[i] << 2) - 1) & _MASK
        case 2:
            return addr[i] << 2 & _MASK, (addr[i] + 3) & _MASK
        case 3:
            if addr[i] == _MASK:
                return 0, _MASK
            ones = (~addr[i] & addr[i] + 1).bit_length() - 1
            start = (addr[i] & ~((1 << ones) - 1)) << 2
            return start & _MASK, (start + (1 << ones + 3) - 1) & _MASK
        case _:
            return 0, _MASK

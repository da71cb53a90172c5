"""Does the compiled part fit the installed engine? Asked once a process, before its first use.

Each check runs the real thing on a scratch engine: the environment's layout against the public
interface, exact stops, and the two repairs of stale translated code (layer 2). What fails is
named, and the core then does without the compiled part.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Final

from migrate.errors import HostError
from migrate.vm.core import Reason
from migrate.vm.riscv64 import native
from migrate.vm.riscv64.engine import PAGE
from migrate.vm.riscv64.native import NativeEngine, NativeUnavailable

RAM: Final = 0x8000_0000
_BUDGET: Final = 1 << 20

_problem: str | None = None
_checked = False


def problem() -> str | None:
    """Why the compiled part cannot be used; None if it can."""
    global _problem, _checked
    if not _checked:
        _problem = _check()
        _checked = True
    return _problem


def _check() -> str | None:
    try:
        for check in (layout, exact_stop, host_writes, aliased_stores):
            if not check():
                return f"its self-test {check.__name__!r} failed"
    except NativeUnavailable as error:
        return str(error)
    except HostError as error:
        return str(error)
    return None


class Scratch:
    """An engine with two blocks of memory, mapped in growing sizes."""

    def __init__(self) -> None:
        self.engine = NativeEngine(2, None)
        self._maps = [mmap.mmap(-1, 2 * PAGE), mmap.mmap(-1, 8 * PAGE)]
        self.bases = [RAM, RAM + 0x10_0000]
        for base, memory in zip(self.bases, self._maps, strict=True):
            anchor = (ctypes.c_char * len(memory)).from_buffer(memory)
            self.engine.map_memory(base, len(memory), ctypes.addressof(anchor), False)
            del anchor

    def put(self, block: int, offset: int, *words: int) -> None:
        data = b"".join(word.to_bytes(4, "little") for word in words)
        self._maps[block][offset : offset + len(data)] = data

    def put_bytes(self, block: int, offset: int, data: bytes) -> None:
        self._maps[block][offset : offset + len(data)] = data

    def run_at(self, pc: int, budget: int = _BUDGET) -> Reason:
        self.engine.set(0, "pc", pc)
        return self.engine.run(budget, None).reason

    def close(self) -> None:
        self.engine.close()


def _scratch(body: Callable[[Scratch], bool]) -> Callable[[], bool]:
    def check() -> bool:
        scratch = Scratch()
        try:
            return body(scratch)
        finally:
            scratch.close()

    check.__name__ = body.__name__
    return check


_WFI: Final = 0x10500073


@_scratch
def layout(scratch: Scratch) -> bool:
    """Registers written by the public interface are seen where the compiled part expects them."""
    from unicorn import riscv_const as const

    engine, uc = scratch.engine, scratch.engine.uc
    values: dict[str, tuple[int, int]] = {}
    for i in range(1, 32):
        values[f"x{i}"] = (const.UC_RISCV_REG_X0 + i, 0x1111_0000_0000_0000 + i)
    for i in range(32):
        values[f"f{i}"] = (const.UC_RISCV_REG_F0 + i, 0x2222_0000_0000_0000 + i)
    for i, name in enumerate(
        [
            "mtvec",
            "mepc",
            "mcause",
            "mtval",
            "mscratch",
            "mcounteren",
            "stvec",
            "sepc",
            "scause",
            "stval",
            "sscratch",
        ]
    ):
        values[name] = (getattr(const, f"UC_RISCV_REG_{name.upper()}"), 0x3330 + (i << 16))
    # The engine answers MTVAL by the older name only.
    values["mtval"] = (const.UC_RISCV_REG_MBADADDR, 0x4440)
    values["scounteren"] = (const.UC_RISCV_REG_SCOUNTEREN, 0x5550)
    values["satp"] = (const.UC_RISCV_REG_SATP, 8 << 60 | 0x77)
    values["mie"] = (const.UC_RISCV_REG_MIE, 0xAAA)
    values["mip"] = (const.UC_RISCV_REG_MIP, 0x222)
    values["mideleg"] = (const.UC_RISCV_REG_MIDELEG, 0x222)
    values["medeleg"] = (const.UC_RISCV_REG_MEDELEG, 0xB1FF)
    values["mstatus"] = (const.UC_RISCV_REG_MSTATUS, 0x20AA)
    values["pc"] = (const.UC_RISCV_REG_PC, RAM + 0x40)
    before = {name: engine.get(0, name) for name in values}
    for register, value in values.values():
        uc.reg_write(register, value)
    for name, (register, value) in values.items():
        if before[name] == value or engine.get(0, name) != value:
            return False
        if uc.reg_read(register) != value:
            return False
    uc.reg_write(const.UC_RISCV_REG_FCSR, 0x6B)
    if engine.get(0, "frm") != 3 or engine.get(0, "fflags") != 0xB:
        return False
    uc.reg_write(const.UC_RISCV_REG_PRIV, 1)
    return engine.get(0, "priv") == 1 and engine.get(0, "load_res") == (1 << 64) - 1


@_scratch
def exact_stop(scratch: Scratch) -> bool:
    """A budget of code ends a loop at a block boundary, and the count agrees with the registers."""
    # loop: addi a0, a0, 1; nop; j loop
    scratch.put(0, 0, 0x00150513, 0x00000013, 0xFF9FF06F)
    engine = scratch.engine
    for _ in range(20):
        if scratch.run_at(RAM, 1000) is not Reason.BUDGET:
            return False
    turns = engine.get(0, "x10")
    return engine.executed == turns * 12 and 20 * 84 <= turns <= 20 * 85


@_scratch
def host_writes(scratch: Scratch) -> bool:
    """Code that the host rewrites is run anew, in either block of memory."""
    for block, base in enumerate(scratch.bases):
        for offset in (0x100, PAGE + 0x100):
            for value in (1, 2, 3):
                # li a0, value; wfi
                scratch.put(block, offset, value << 20 | 0x513, _WFI)
                scratch.engine.written(base + offset, 8)
                if scratch.run_at(base + offset) is not Reason.WFI:
                    return False
                if scratch.engine.get(0, "x10") != value:
                    return False
    return True


@_scratch
def aliased_stores(scratch: Scratch) -> bool:
    """Code that the guest rewrites through another virtual address is run anew, every time.

    Supervisor mode, Sv39: one physical page at 0x1000 (written) and 0x2000 (run).
    """
    engine = scratch.engine
    table = RAM + 0x10_0000
    code = RAM + 0x10_0000 + 4 * PAGE
    for level in range(2):
        entry = (table + (level + 1) * PAGE) >> 12 << 10 | 1
        scratch.put_bytes(1, level * PAGE, entry.to_bytes(8, "little"))
    for page, physical, rights in ((1, code, 0xC7), (2, code, 0xCB), (3, RAM, 0xCB)):
        entry = physical >> 12 << 10 | rights  # read-write, read-execute
        scratch.put_bytes(1, 2 * PAGE + page * 8, entry.to_bytes(8, "little"))
    # at 0x3000: sw a1, 0(a2); fence.i; jr a2 + 0x1000 ; the code written: addi a0, a0, imm
    scratch.put(0, 0, 0x00B62023, 0x0000100F, 0x000680E7)
    scratch.put(1, 4 * PAGE + 4, _WFI)
    engine.set(0, "satp", 8 << 60 | table >> 12)
    engine.set(0, "priv", 1)
    engine.set(0, "x12", 0x1000)
    engine.set(0, "x13", 0x2000)
    engine.loaded(0)
    for value in range(1, 20):
        engine.set(0, "x11", value << 20 | 0x513)  # li a0, value
        if scratch.run_at(0x3000) is not Reason.WFI or engine.get(0, "x10") != value:
            return False
    return True


def set_code_repair(on: bool) -> None:
    """See native.set_code_repair; here for the tests that show what it is for."""
    native.set_code_repair(on)


CHECKS: Final[dict[str, Any]] = {
    "layout": layout,
    "exact_stop": exact_stop,
    "host_writes": host_writes,
    "aliased_stores": aliased_stores,
}

"""Where Unicorn 2.1.4 keeps a RISC-V hart's registers: offsets into its CPURISCVState (layer 2).

From qemu/target/riscv/cpu.h of that version. Every offset is checked against the public interface
before use (selftest.layout for the compiled part, plain_harts.PlainHarts for itself): with another
engine, or another build of it, the checks fail, and nothing runs on wrong offsets.
"""

from __future__ import annotations

from typing import Final

_WORDS_AFTER_FPR: Final = (
    "pc load_res load_val frm badaddr guest_phys_fault_addr priv_ver misa misa_mask features priv "
    "virt resetvec mhartid mstatus mip miclaim mie mideleg sptbr satp stval mtval medeleg stvec "
    "sepc scause mtvec mepc mcause unused_mtval"
)
_HYPERVISOR_WORDS: Final = 24
_WORDS_BEFORE_PMP: Final = "scounteren mcounteren sscratch mscratch mfromhost mtohost timecmp"


def _offsets() -> dict[str, int]:
    names = [f"x{i}" for i in range(32)] + [f"f{i}" for i in range(32)]
    names += _WORDS_AFTER_FPR.split()
    names += [f"hypervisor{i}" for i in range(_HYPERVISOR_WORDS)]
    names += _WORDS_BEFORE_PMP.split()
    return {name: 8 * i for i, name in enumerate(names)}


OFFSETS: Final = _offsets()
"""Byte offset of each 64-bit field, by the state's register names."""
PMP: Final = OFFSETS["timecmp"] + 8
"""16 entries: address register (8 bytes), cfg (1), padding (7)."""
PMP_RANGES: Final = PMP + 16 * 16
"""16 entries derived from those: first and last byte address."""
PMP_RULES: Final = PMP_RANGES + 16 * 16
"""Number of entries that are not off (32 bits)."""
CONTEXT_SIZE: Final = PMP_RULES + 8
"""What the engine's own contexts cover."""

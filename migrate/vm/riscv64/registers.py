"""Names of a hart's registers, and its portable state (layer 2).

Integer registers are called x1..x31 and floating-point ones f0..f31 in a saved state; the ABI's
names (a0, sp, fs1, ...) are understood wherever a register is named by a program. Which registers
exist, and which values may be loaded into them, is decided here; how the engine stores them is
the engines' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from migrate.errors import StateFormatError, UsageError
from migrate.vm.state import Field, check_state_untrusted

PRV_U: Final = 0
PRV_S: Final = 1
PRV_M: Final = 3

MIP_SSIP: Final = 1 << 1
MIP_MSIP: Final = 1 << 3
MIP_STIP: Final = 1 << 5
MIP_MTIP: Final = 1 << 7
MIP_SEIP: Final = 1 << 9
MIP_MEIP: Final = 1 << 11
MIP_ALL: Final = MIP_SSIP | MIP_MSIP | MIP_STIP | MIP_MTIP | MIP_SEIP | MIP_MEIP
MIP_S: Final = MIP_SSIP | MIP_STIP | MIP_SEIP

MSTATUS_SIE: Final = 1 << 1
MSTATUS_MIE: Final = 1 << 3
MSTATUS_SPIE: Final = 1 << 5
MSTATUS_MPIE: Final = 1 << 7
MSTATUS_SPP: Final = 1 << 8
MSTATUS_MPP: Final = 3 << 11
MSTATUS_FS: Final = 3 << 13
MSTATUS_MPRV: Final = 1 << 17
MSTATUS_MEMORY: Final = MSTATUS_MPP | MSTATUS_MPRV | 1 << 18 | 1 << 19
"""The bits on which address translation depends: MPP, MPRV, SUM, MXR."""
_MSTATUS_LEGAL: Final = 0x8000_00CF_007E_79AA
_VS_BITS: Final = 1 << 2 | 1 << 6 | 1 << 10
_SATP_MODES: Final = (0, 8, 9, 10)

_ABI: Final = [
    "zero",
    "ra",
    "sp",
    "gp",
    "tp",
    "t0",
    "t1",
    "t2",
    "s0",
    "s1",
    "a0",
    "a1",
    "a2",
    "a3",
    "a4",
    "a5",
    "a6",
    "a7",
    "s2",
    "s3",
    "s4",
    "s5",
    "s6",
    "s7",
    "s8",
    "s9",
    "s10",
    "s11",
    "t3",
    "t4",
    "t5",
    "t6",
]
_ABI_F: Final = [
    "ft0",
    "ft1",
    "ft2",
    "ft3",
    "ft4",
    "ft5",
    "ft6",
    "ft7",
    "fs0",
    "fs1",
    "fa0",
    "fa1",
    "fa2",
    "fa3",
    "fa4",
    "fa5",
    "fa6",
    "fa7",
    "fs2",
    "fs3",
    "fs4",
    "fs5",
    "fs6",
    "fs7",
    "fs8",
    "fs9",
    "fs10",
    "fs11",
    "ft8",
    "ft9",
    "ft10",
    "ft11",
]

CSRS: Final = (
    "mstatus", "mie", "mip", "medeleg", "mideleg",
    "mtvec", "mepc", "mcause", "mtval", "mscratch", "mcounteren",
    "stvec", "sepc", "scause", "stval", "sscratch", "scounteren", "satp",
)  # fmt: skip
"""The CSRs of a hart that hold state of their own."""
WORDS: Final = (
    *(f"x{i}" for i in range(1, 32)),
    *(f"f{i}" for i in range(32)),
    "pc", "priv", "load_res", "load_val", "frm", "fflags",
    *CSRS,
)  # fmt: skip
"""Every register of one word; the PMP comes on top."""
PMP_ENTRIES: Final = 16

KIND: Final = "riscv64-hart"
VERSION: Final = 1
FIELDS: Final = (
    *(Field(name, int) for name in WORDS),
    Field("pmpcfg", list, bits=8, max_length=PMP_ENTRIES),
    Field("pmpaddr", list, bits=64, max_length=PMP_ENTRIES),
)

_ALIASES: Final = {
    **{abi: f"x{i}" for i, abi in enumerate(_ABI)},
    **{abi: f"f{i}" for i, abi in enumerate(_ABI_F)},
    **{f"x{i}": f"x{i}" for i in range(32)},
    **{name: name for name in WORDS},
    "fp": "x8",
    "mhartid": "mhartid",
    "misa": "misa",
}


def canonical(name: str) -> str:
    """The state's name of a register. Raises UsageError."""
    try:
        return _ALIASES[name]
    except KeyError:
        raise UsageError(f"a RISC-V hart has no register {name!r}") from None


def state_of(words: Mapping[str, int], pmpcfg: list[int], pmpaddr: list[int]) -> dict[str, Any]:
    """The portable state of these registers."""
    fields: dict[str, Any] = {name: words[name] for name in WORDS}
    return {
        "kind": KIND,
        "version": VERSION,
        "fields": fields | {"pmpcfg": pmpcfg, "pmpaddr": pmpaddr},
    }


def fields_untrusted(state: object) -> dict[str, Any]:
    """The registers in a foreign state. Raises StateFormatError.

    Refuses whatever no guest could have written, above all what the engine would abort on.
    """
    fields = check_state_untrusted(state, KIND, VERSION, FIELDS)
    for name, legal in (
        ("mstatus", _MSTATUS_LEGAL),
        ("mip", MIP_ALL | _VS_BITS),
        ("mie", MIP_ALL | _VS_BITS),
        ("mideleg", MIP_S | _VS_BITS),
        ("frm", 7),
        ("fflags", 31),
    ):
        if fields[name] & ~legal:
            raise StateFormatError(f"{KIND}: {name} holds impossible bits: {fields[name]:#x}")
    if fields["priv"] not in (PRV_U, PRV_S, PRV_M):
        raise StateFormatError(f"{KIND}: there is no privilege level {fields['priv']}")
    if fields["satp"] >> 60 not in _SATP_MODES:
        raise StateFormatError(f"{KIND}: satp holds an unknown mode: {fields['satp']:#x}")
    for name in ("mtvec", "stvec"):
        if fields[name] & 3 > 1:
            raise StateFormatError(f"{KIND}: {name} holds an unknown mode: {fields[name]:#x}")
    for name in ("pmpcfg", "pmpaddr"):
        if len(fields[name]) != PMP_ENTRIES:
            raise StateFormatError(f"{KIND}: {name} needs {PMP_ENTRIES} entries")
    return fields

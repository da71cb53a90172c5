"""A tiny encoder for the test programs: registers are ABI names, one function an instruction."""

from __future__ import annotations

REG = {
    name: i
    for i, name in enumerate(
        "zero ra sp gp tp t0 t1 t2 s0 s1 a0 a1 a2 a3 a4 a5 a6 a7 "  # noqa: SIM905
        "s2 s3 s4 s5 s6 s7 s8 s9 s10 s11 t3 t4 t5 t6".split()
    )
}
CSR = {
    "fflags": 0x001, "frm": 0x002, "fcsr": 0x003,
    "sstatus": 0x100, "sie": 0x104, "stvec": 0x105, "scounteren": 0x106, "sscratch": 0x140,
    "sepc": 0x141, "scause": 0x142, "stval": 0x143, "sip": 0x144, "satp": 0x180,
    "mstatus": 0x300, "medeleg": 0x302, "mideleg": 0x303, "mie": 0x304, "mtvec": 0x305,
    "mcounteren": 0x306, "mscratch": 0x340, "mepc": 0x341, "mcause": 0x342, "mtval": 0x343,
    "mip": 0x344, "pmpcfg0": 0x3A0, "pmpaddr0": 0x3B0, "pmpaddr1": 0x3B1, "mhartid": 0xF14,
    "cycle": 0xC00, "time": 0xC01, "instret": 0xC02, "mcycle": 0xB00,
}  # fmt: skip

ECALL = 0x00000073
EBREAK = 0x00100073
MRET = 0x30200073
SRET = 0x10200073
WFI = 0x10500073
NOP = 0x00000013
FENCE_I = 0x0000100F
SFENCE_VMA = 0x12000073


def _i(opcode: int, funct3: int, rd: str, rs1: str, imm: int) -> int:
    assert -2048 <= imm < 2048 or 0 <= imm < 4096
    return (imm & 0xFFF) << 20 | REG[rs1] << 15 | funct3 << 12 | REG[rd] << 7 | opcode


def _s(opcode: int, funct3: int, rs2: str, rs1: str, imm: int) -> int:
    assert -2048 <= imm < 2048
    return (
        (imm >> 5 & 0x7F) << 25 | REG[rs2] << 20 | REG[rs1] << 15 | funct3 << 12
        | (imm & 31) << 7 | opcode
    )  # fmt: skip


def _b(funct3: int, rs1: str, rs2: str, offset: int) -> int:
    assert -4096 <= offset < 4096 and offset % 2 == 0
    return (
        (offset >> 12 & 1) << 31 | (offset >> 5 & 0x3F) << 25 | REG[rs2] << 20 | REG[rs1] << 15
        | funct3 << 12 | (offset >> 1 & 15) << 8 | (offset >> 11 & 1) << 7 | 0x63
    )  # fmt: skip


def _r(opcode: int, funct3: int, funct7: int, rd: str, rs1: str, rs2: str) -> int:
    return funct7 << 25 | REG[rs2] << 20 | REG[rs1] << 15 | funct3 << 12 | REG[rd] << 7 | opcode


def addi(rd: str, rs1: str, imm: int) -> int:
    return _i(0x13, 0, rd, rs1, imm)


def slli(rd: str, rs1: str, shift: int) -> int:
    return _i(0x13, 1, rd, rs1, shift)


def andi(rd: str, rs1: str, imm: int) -> int:
    return _i(0x13, 7, rd, rs1, imm)


def add(rd: str, rs1: str, rs2: str) -> int:
    return _r(0x33, 0, 0, rd, rs1, rs2)


def xor(rd: str, rs1: str, rs2: str) -> int:
    return _r(0x33, 4, 0, rd, rs1, rs2)


def mul(rd: str, rs1: str, rs2: str) -> int:
    return _r(0x33, 0, 1, rd, rs1, rs2)


def ld(rd: str, rs1: str, imm: int = 0) -> int:
    return _i(0x03, 3, rd, rs1, imm)


def lw(rd: str, rs1: str, imm: int = 0) -> int:
    return _i(0x03, 2, rd, rs1, imm)


def lbu(rd: str, rs1: str, imm: int = 0) -> int:
    return _i(0x03, 4, rd, rs1, imm)


def sd(rs2: str, rs1: str, imm: int = 0) -> int:
    return _s(0x23, 3, rs2, rs1, imm)


def sw(rs2: str, rs1: str, imm: int = 0) -> int:
    return _s(0x23, 2, rs2, rs1, imm)


def sb(rs2: str, rs1: str, imm: int = 0) -> int:
    return _s(0x23, 0, rs2, rs1, imm)


def amoadd_d(rd: str, rs2: str, rs1: str) -> int:
    return _r(0x2F, 3, 0, rd, rs1, rs2)


def lr_d(rd: str, rs1: str) -> int:
    return _r(0x2F, 3, 0b0001000, rd, rs1, "zero")


def sc_d(rd: str, rs2: str, rs1: str) -> int:
    return _r(0x2F, 3, 0b0001100, rd, rs1, rs2)


def beq(rs1: str, rs2: str, offset: int) -> int:
    return _b(0, rs1, rs2, offset)


def bne(rs1: str, rs2: str, offset: int) -> int:
    return _b(1, rs1, rs2, offset)


def j(offset: int) -> int:
    return jal("zero", offset)


def jal(rd: str, offset: int) -> int:
    assert -(1 << 20) <= offset < 1 << 20
    return (
        (offset >> 20 & 1) << 31 | (offset >> 1 & 0x3FF) << 21 | (offset >> 11 & 1) << 20
        | (offset >> 12 & 0xFF) << 12 | REG[rd] << 7 | 0x6F
    )  # fmt: skip


def jalr(rd: str, rs1: str, imm: int = 0) -> int:
    return _i(0x67, 0, rd, rs1, imm)


def csrrw(rd: str, csr: str, rs1: str) -> int:
    return _i(0x73, 1, rd, rs1, CSR[csr])


def csrrs(rd: str, csr: str, rs1: str) -> int:
    return _i(0x73, 2, rd, rs1, CSR[csr])


def csrrc(rd: str, csr: str, rs1: str) -> int:
    return _i(0x73, 3, rd, rs1, CSR[csr])


def csrr(rd: str, csr: str) -> int:
    return csrrs(rd, csr, "zero")


def csrw(csr: str, rs1: str) -> int:
    return csrrw("zero", csr, rs1)


def code(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)

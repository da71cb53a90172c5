"""The SBI's calls on a board that only takes notes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrate.errors import StateFormatError
from migrate.vm.definition import SlotSpec
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE
from migrate.vm.sbi import (
    EID_BASE,
    EID_DBCN,
    EID_HSM,
    EID_IPI,
    EID_RFENCE,
    EID_SRST,
    EID_TIME,
    MIP_SSIP,
    MIP_STIP,
    Hsm,
    Sbi,
)

ALL = (1 << 64) - 1
NOT_SUPPORTED, INVALID_PARAM, INVALID_ADDRESS, ALREADY_AVAILABLE = -2, -3, -5, -6


class Notes:
    """A board of `harts` harts that writes down what it is asked to do."""

    def __init__(self, harts: int = 4) -> None:
        self.harts = harts
        self.memory = GuestMemory([SlotSpec("ram", RAM_BASE, 1 << 16)])
        self.registers = {f"a{i}": 0 for i in range(8)} | {"mstatus": 2, "satp": 5}
        self.ticks = 100
        self.mip = [0] * harts
        self.log: list[object] = []
        self.output = b""
        self.input = b""
        self.sbi = Sbi(self)

    def time(self) -> int:
        return self.ticks

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        self.mip[hart] = (self.mip[hart] & ~mask) | value

    def rearm(self) -> None:
        self.log.append("rearm")

    def end_turn(self) -> None:
        self.log.append("end-turn")

    def wait_for_interrupt(self) -> None:
        self.log.append("wait")

    def flush_tlb(self, hart: int) -> None:
        self.log.append(("flush", hart))

    def forget_code(self) -> None:
        self.log.append("forget-code")

    def read_reg(self, name: str) -> int:
        return self.registers[name]

    def write_reg(self, name: str, value: int) -> None:
        self.registers[name] = value

    def console_write(self, data: bytes) -> None:
        self.output += data

    def console_read(self, size: int) -> bytes:
        data, self.input = self.input[:size], self.input[size:]
        return data

    def power_off(self, code: int) -> None:
        self.log.append(("off", code))

    def restart(self) -> None:
        self.log.append("restart")

    def call(
        self, extension: int, function: int, *arguments: int, hart: int = 0
    ) -> tuple[int, int]:
        """(error, value) as signed numbers."""
        for i in range(6):
            self.registers[f"a{i}"] = arguments[i] if i < len(arguments) else 0
        self.registers |= {"a6": function, "a7": extension}
        self.sbi(hart)
        error, value = self.registers["a0"], self.registers["a1"]
        assert 0 <= error <= ALL
        assert 0 <= value <= ALL
        return error - (1 << 64) if error >> 63 else error, value


@pytest.fixture
def board() -> Iterator[Notes]:
    notes = Notes()
    yield notes
    notes.memory.close()


def test_base(board: Notes) -> None:
    assert board.call(EID_BASE, 0) == (0, 2 << 24)
    for extension in (EID_BASE, EID_TIME, EID_IPI, EID_RFENCE, EID_HSM, EID_SRST, EID_DBCN):
        assert board.call(EID_BASE, 3, extension) == (0, 1)
    assert board.call(EID_BASE, 3, 0x504D55) == (0, 0)
    assert board.call(EID_BASE, 99) == (NOT_SUPPORTED, 0)
    assert board.call(0x504D55, 0) == (NOT_SUPPORTED, 0)


def test_timer(board: Notes) -> None:
    assert board.call(EID_TIME, 0, 500, hart=1) == (0, 0)
    assert board.sbi.next_tick() == 500
    board.ticks = 500
    assert board.sbi.next_tick() == 500  # due, and not lost
    board.sbi.tick(500)
    assert board.mip == [0, MIP_STIP, 0, 0]
    assert board.sbi.next_tick() is None
    board.call(EID_TIME, 0, ALL, hart=1)
    assert board.mip == [0, 0, 0, 0]
    board.call(EID_TIME, 0, 3, hart=1)
    assert board.mip[1] == MIP_STIP


def test_ipi(board: Notes) -> None:
    assert board.call(EID_IPI, 0, 0b101, 1) == (0, 0)
    assert board.mip == [0, MIP_SSIP, 0, MIP_SSIP]
    assert "end-turn" in board.log
    assert board.call(EID_IPI, 0, 0, ALL) == (0, 0)
    assert board.mip == [MIP_SSIP] * 4
    assert board.call(EID_IPI, 0, 0b10000, 0)[0] == INVALID_PARAM
    assert board.call(EID_IPI, 0, 1, 4)[0] == INVALID_PARAM
    assert board.call(EID_IPI, 0, ALL, 2)[0] == INVALID_PARAM


def test_rfence(board: Notes) -> None:
    assert board.call(EID_RFENCE, 1, 0b11, 2) == (0, 0)
    assert board.log == [("flush", 2), ("flush", 3)]
    assert board.call(EID_RFENCE, 2, 1, 0) == (0, 0)
    assert board.log[-1] == ("flush", 0)
    assert board.call(EID_RFENCE, 0, 1, 0) == (0, 0)
    assert board.log[-1] == "forget-code"
    assert board.call(EID_RFENCE, 3, 1, 0)[0] == NOT_SUPPORTED
    assert board.call(EID_RFENCE, 1, 1, 9)[0] == INVALID_PARAM


def test_harts_start_stop_and_suspend(board: Notes) -> None:
    sbi, entry = board.sbi, RAM_BASE + 0x1000
    assert [sbi.runnable(hart) for hart in range(4)] == [True, False, False, False]
    assert board.call(EID_HSM, 0, 2, entry, 77) == (0, 0)
    assert board.call(EID_HSM, 2, 2) == (0, Hsm.START_PENDING)
    assert board.call(EID_HSM, 0, 2, entry, 77)[0] == ALREADY_AVAILABLE
    assert board.call(EID_HSM, 0, 3, 0x1000, 0)[0] == INVALID_ADDRESS
    assert board.call(EID_HSM, 0, 4, entry, 0)[0] == INVALID_PARAM
    assert sbi.runnable(2)
    sbi.enter(2)
    wanted = {"pc": entry, "priv": 1, "a0": 2, "a1": 77, "satp": 0, "mstatus": 0}
    assert {name: board.registers[name] for name in wanted} == wanted
    assert board.call(EID_HSM, 2, 2) == (0, Hsm.STARTED)
    board.call(EID_HSM, 1, hart=2)
    assert board.log[-1] == "end-turn"
    assert not sbi.runnable(2)

    board.call(EID_HSM, 3, 0, hart=0)  # retentive: like WFI
    assert board.log[-1] == "wait"
    assert board.registers["a0"] == 0
    board.registers["pc"] = 1
    sbi.enter(0)
    assert board.registers["pc"] == 1
    board.call(EID_HSM, 3, 0x8000_0000, entry, 5, hart=0)
    sbi.enter(0)
    assert (board.registers["pc"], board.registers["a0"], board.registers["a1"]) == (entry, 0, 5)
    assert board.call(EID_HSM, 3, 1)[0] == INVALID_PARAM
    assert board.call(EID_HSM, 2, 4)[0] == INVALID_PARAM


def test_reset(board: Notes) -> None:
    board.call(EID_SRST, 0, 0, 0)
    board.call(EID_SRST, 0, 0, 1)
    board.call(EID_SRST, 0, 1, 0)
    assert board.log == [("off", 0), ("off", 1), "restart"]
    assert board.call(EID_SRST, 0, 7, 0)[0] == INVALID_PARAM


def test_debug_console(board: Notes) -> None:
    board.memory.write(RAM_BASE, b"hello")
    assert board.call(EID_DBCN, 0, 5, RAM_BASE, 0) == (0, 5)
    assert board.call(EID_DBCN, 2, ord("!")) == (0, 0)
    assert board.output == b"hello!"
    assert board.call(EID_DBCN, 0, 1 << 40, RAM_BASE, 0) == (0, 4096)
    assert board.call(EID_DBCN, 0, 5, 0x1000, 0)[0] == INVALID_PARAM
    assert board.call(EID_DBCN, 0, 5, RAM_BASE, 1)[0] == INVALID_PARAM
    board.input = b"typed"
    assert board.call(EID_DBCN, 1, 3, RAM_BASE + 100, 0) == (0, 3)
    assert board.memory.read(RAM_BASE + 100, 4) == b"typ\0"
    assert board.call(EID_DBCN, 1, 3, 0, 0)[0] == INVALID_PARAM
    assert board.input == b"ed"


def test_legacy_console_timer_and_shutdown(board: Notes) -> None:
    board.call(1, 0, ord("x"))
    assert board.output == b"x"
    assert board.call(2, 0)[0] == -1
    board.input = b"q"
    assert board.call(2, 0)[0] == ord("q")
    board.call(0, 0, 900)
    assert board.sbi.next_tick() == 900
    board.call(8, 0)
    assert board.log[-1] == ("off", 0)
    assert board.call(4, 0)[0] == NOT_SUPPORTED


def test_state_of_another_number_of_harts_is_refused(board: Notes) -> None:
    other = Notes(2)
    with pytest.raises(StateFormatError, match="2 harts"):
        board.sbi.load_untrusted(other.sbi.save())
    other.memory.close()

"""The smallest board on which a deterministic guest with a timer runs: one device, one clock."""

from __future__ import annotations

from typing import Any

from migrate.vm.clock import Clock
from migrate.vm.core import Reason
from migrate.vm.riscv64.core import Riscv64Core
from tests.vm.riscv64 import asm
from tests.vm.riscv64.conftest import RAM, Box

TIMER = 0x1000_0000
MTIP = 1 << 7
NEVER = (1 << 64) - 1
HANDLER, START, DATA = 0x2000, 0x1000, 0x8000


def fcvt_d_l(fd: int, rs1: str) -> int:
    return 0x69 << 25 | 2 << 20 | asm.REG[rs1] << 15 | 7 << 12 | fd << 7 | 0x53


def fdiv_d(fd: int, f1: int, f2: int) -> int:
    return 0x0D << 25 | f2 << 20 | f1 << 15 | 7 << 12 | fd << 7 | 0x53


def fmv_x_d(rd: str, f1: int) -> int:
    return 0x71 << 25 | f1 << 15 | asm.REG[rd] << 7 | 0x53


def program(box: Box) -> None:
    """Mixes arithmetic, floating point, memory, counters and the places of interrupts in s1.

    Every 64th turn waits; the handler sets the timer anew, farther or nearer, by s1.
    """
    box.put(
        START,
        asm.addi("s0", "s0", 1),
        asm.mul("s1", "s1", "s6"),
        asm.add("s1", "s1", "s0"),
        fcvt_d_l(1, "s1"),
        fcvt_d_l(2, "s0"),
        fdiv_d(3, 1, 2),
        fmv_x_d("t0", 3),
        asm.xor("s1", "s1", "t0"),
        asm.csrr("t0", "time"),
        asm.xor("s1", "s1", "t0"),
        asm.csrr("t0", "cycle"),
        asm.xor("s1", "s1", "t0"),
        asm.andi("t1", "s1", 0x7F8),
        asm.add("t1", "t1", "s7"),
        asm.amoadd_d("t2", "s1", "t1"),
        asm.xor("s1", "s1", "t2"),
        asm.andi("t3", "s0", 63),
        asm.bne("t3", "zero", -68),
        asm.WFI,
        asm.csrr("t0", "fcsr"),
        asm.add("s1", "s1", "t0"),
        asm.j(-84),
    )
    box.put(
        HANDLER,
        asm.csrw("mscratch", "t0"),
        asm.csrr("t0", "mepc"),
        asm.xor("s1", "s1", "t0"),
        asm.addi("s8", "s8", 1),
        asm.andi("t0", "s1", 0x1FF),
        asm.addi("t0", "t0", 40),
        asm.sw("t0", "s9"),
        asm.csrr("t0", "mscratch"),
        asm.MRET,
    )
    box.set(
        pc=RAM + START, mtvec=RAM + HANDLER, mie=MTIP, mstatus=1 << 3 | 3 << 13 | 3 << 11,
        s1=0x1234567, s6=0x5851F42D4C957F2D, s7=RAM + DATA, s9=TIMER,
    )  # fmt: skip


class MiniBoard:
    """A deterministic machine of one hart with a timer that counts from now."""

    def __init__(self, native: bool) -> None:
        self.box = Box(Riscv64Core(1, native=native))
        self.core = self.box.core
        self.clock = Clock(
            deterministic=True,
            executed=lambda: self.core.executed,
            publish=self.core.set_time_source,
        )
        self.deadline = 100
        self.core.map_mmio(TIMER, 0x1000, self)

    def mmio_read(self, offset: int, size: int) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.deadline = self.clock.now() + value
        self.core.set_irq(0, MTIP, 0)
        self.core.end_turn()

    def run_until(self, position: int) -> None:
        """Until the clock stands at `position`, or just after."""
        self.clock.thaw()
        while self.clock.position < position:
            if self.clock.now() >= self.deadline:
                self.deadline = NEVER
                self.core.set_irq(0, MTIP, MTIP)
            left = position - self.clock.position
            if self.deadline != NEVER:
                left = min(left, self.clock.code_until(self.deadline))
            ended = self.core.run(left)
            assert ended.reason is not Reason.ERROR, ended
            if ended.reason is Reason.WFI:
                assert self.deadline != NEVER
                self.clock.jump_to(self.deadline)
        self.clock.freeze()

    def save(self) -> dict[str, Any]:
        return {
            "hart": self.core.get_state(0),
            "clock": self.clock.save(),
            "deadline": self.deadline,
            "memory": bytes(self.box.memory),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.box.memory[:] = state["memory"]
        self.core.forget_code()
        self.core.set_state_untrusted(0, state["hart"])
        self.clock.load_untrusted(state["clock"])
        self.deadline = state["deadline"]

    def close(self) -> None:
        self.core.close()

"""The RISC-V core: harts on one Unicorn engine behind `VcpuCore` (layer 2).

Chooses the engine (with the compiled part, or plain), checks names and foreign states, and turns
engines' results into exits. It knows neither devices nor the board; guest time it takes from the
clock through `set_time_source`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from migrate.errors import HostError, UsageError
from migrate.units import PAGE_SIZE
from migrate.vm.clock import TimeSource
from migrate.vm.core import Caps, EcallHandler, Exit, Mmio, VcpuCore, Window
from migrate.vm.riscv64 import registers
from migrate.vm.riscv64.engine import Engine
from migrate.vm.riscv64.native import NativeEngine
from migrate.vm.state import PortableState

_log = logging.getLogger("migrate")
_said: set[str] = set()
_UNLIMITED = (1 << 64) - 1


def native_problem() -> str | None:
    """Why the compiled part cannot be used here; None if it can (checked once a process)."""
    from migrate.vm.riscv64 import selftest

    return selftest.problem()


def _open(harts: int, native: bool | None, ecall: EcallHandler | None) -> Engine:
    if native is not False:
        problem = native_problem()
        if problem is None:
            return NativeEngine(harts, ecall)
        if native:
            raise HostError(f"the compiled part of the emulator core cannot be used: {problem}")
        if problem not in _said:
            _said.add(problem)
            _log.warning("the emulator core runs without its compiled part, slowly: %s", problem)
    from migrate.vm.riscv64.plain import PlainEngine

    return PlainEngine(harts, ecall)


class Riscv64Core(VcpuCore):
    """`harts` harts in machine mode at pc 0, hart 0 selected, guest time standing at 0.

    `native`: True insists on the compiled part (HostError without), False does without, None
    takes it where it works. With `ecall`, an ecall from supervisor mode goes to the board's SBI;
    without, to the guest's machine mode.
    """

    def __init__(
        self, harts: int, *, native: bool | None = None, ecall: EcallHandler | None = None
    ) -> None:
        if harts < 1:
            raise UsageError("a machine needs at least one vcpu")
        self.harts = harts
        self._engine = _open(harts, native, ecall)
        self._translated = False
        """Whether there may be translated code."""

    @property
    def current(self) -> int:  # type: ignore[override]
        return self._engine.current

    @property
    def engine(self) -> Engine:
        """The engine, for tests and statistics."""
        return self._engine

    def caps(self) -> Caps:
        return self._engine.caps()

    def stats(self) -> dict[str, int]:
        """Counters of the engine: traps, kicks (restarts for a new interrupt), switches."""
        return self._engine.stats()

    # -- memory and devices

    def map_mmio(self, gpa: int, size: int, device: Mmio) -> Window:
        self._aligned(gpa, size)
        return self._engine.map_mmio(gpa, size, device)

    def map_memory(self, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        self._aligned(gpa, size)
        self._engine.map_memory(gpa, size, hva, readonly)

    def unmap_memory(self, gpa: int, size: int) -> None:
        self._engine.unmap_memory(gpa, size)

    @staticmethod
    def _aligned(gpa: int, size: int) -> None:
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise UsageError(f"guest range {gpa:#x}+{size:#x} does not consist of whole pages")

    def written(self, gpa: int, size: int) -> None:
        self._engine.written(gpa, size)

    def forget_code(self) -> None:
        if self._translated:  # on a fresh engine it would only lengthen a downtime
            self._translated = False
            self._engine.forget_code()

    # -- running

    def run(self, budget: int, deadline_ns: int | None = None) -> Exit:
        self._translated = True
        ended = self._engine.run(min(budget, _UNLIMITED), deadline_ns)
        hart = self._engine.current
        pc = self._engine.get(hart, "pc")
        detail = f"{ended.detail} (hart {hart}, pc {pc:#x})" if ended.detail else ""
        return Exit(ended.reason, pc, detail)

    def stop(self) -> None:
        self._engine.stop()

    def end_turn(self) -> None:
        self._engine.end_turn()

    @property
    def executed(self) -> int:
        return self._engine.executed

    def set_time_source(self, source: TimeSource) -> None:
        """What the guest's `time` register follows from now on (published by the clock)."""
        self._engine.set_time(source)

    def guest_ticks(self) -> int:
        """What the guest would read from `time` now."""
        return self._engine.ticks()

    # -- harts

    def select(self, hart: int) -> None:
        self._engine.select(hart)

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        self._engine.set_irq(hart, mask, value)

    def irq_wakes(self, hart: int) -> bool:
        return bool(self._engine.get(hart, "mip") & self._engine.get(hart, "mie"))

    def owe_tlb_flush(self, hart: int) -> None:
        self._engine.owe_tlb_flush(hart)

    def read_reg(self, name: str) -> int:
        return self.read_hart_reg(self._engine.current, name)

    def write_reg(self, name: str, value: int) -> None:
        self.write_hart_reg(self._engine.current, name, value)

    def read_hart_reg(self, hart: int, name: str) -> int:
        """`read_reg` of any hart, selected or not."""
        return self._engine.get(hart, registers.canonical(name))

    def write_hart_reg(self, hart: int, name: str, value: int) -> None:
        """`write_reg` of any hart, selected or not."""
        self._engine.set(hart, registers.canonical(name), value & _UNLIMITED)

    def get_state(self, hart: int) -> PortableState:
        """Also forgets the hart's translations, as its copy will have none: both sides then walk
        the page tables alike.
        """
        words = {name: self._engine.get(hart, name) for name in registers.WORDS}
        cfg, addr = self._engine.get_pmp(hart)
        self._engine.owe_tlb_flush(hart)
        return registers.state_of(words, cfg, addr)

    def set_state_untrusted(self, hart: int, state: object) -> None:
        fields = registers.fields_untrusted(state)
        set_word: Callable[[int, str, int], None] = self._engine.set
        for name in registers.WORDS:
            set_word(hart, name, fields[name])
        self._engine.set_pmp(hart, fields["pmpcfg"], fields["pmpaddr"])
        self._engine.loaded(hart)

    def close(self) -> None:
        self._engine.close()

"""The engine without the compiled part: only Unicorn's public interface (layer 2).

Slow and exact. The guest runs in slices of counted instructions, which end at an instruction
boundary. Python delivers the traps. The registers are plain_harts.py's.

The engine's defects are met so: nothing stops it but the count (or a trap), so that no memory
instruction is repeated; a hook that never fires keeps every store on the path that looks for
translated code; host writes invalidate the engine's translations, by range where it exports that.

`executed` counts 4 for each instruction; a slice that a wait or a trap ended early counts in full,
so that the count does not depend on how long the wait was reached.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any, Final

from migrate.errors import HostError
from migrate.vm.clock import TimeKind, TimeSource
from migrate.vm.core import Caps, EcallHandler, Mmio, Reason, Window
from migrate.vm.riscv64 import layout, native, traps
from migrate.vm.riscv64.engine import Ended, Engine, describe_error, open_unicorn, unicorn
from migrate.vm.riscv64.plain_harts import PlainHarts
from migrate.vm.riscv64.ram import RamOffsets, library
from migrate.vm.riscv64.registers import PRV_S

SLICE: Final = 2000
"""Instructions between two looks at stop flag and clock: some 20 to 50 microseconds."""
COUNT_PER_INSTRUCTION: Final = 4


@functools.cache
def _trap_counters() -> None:
    """Let reads of cycle and instret trap, so that they are emulated by guest time.

    The engine answers them from the host's cycle counter, which is not reproducible. Where it does
    not export the function, that stays so. The compiled part, once bound, does the same its way.
    """
    try:
        get = library().riscv_get_csr_ops_riscv64
        put = library().riscv_set_csr_ops_riscv64
    except AttributeError:
        return
    if native.bound():
        return
    operations = (ctypes.c_void_p * 4)()
    for csr in (0xC00, 0xC02, 0xB00, 0xB02):
        get(csr, operations)
        operations[0] = None  # no predicate: no such CSR
        put(csr, operations)


class PlainEngine(Engine):
    """Unicorn through its public interface."""

    def __init__(self, n_harts: int, ecall: EcallHandler | None) -> None:
        self.uc = open_unicorn()
        _trap_counters()
        self.n_harts = n_harts
        self._ecall = ecall
        self._lib = library()
        self._ram = RamOffsets()
        self._invalidate = self._find_invalidate()
        self._executed = 0
        self._time = TimeSource(TimeKind.FROZEN, 0)
        self._running = False
        self._stop = False
        self._turn = False
        self._flush_code = False
        self._irq_raised = 0
        self._error: BaseException | None = None
        self._callbacks: list[object] = []
        self._traps = 0
        self._harts = PlainHarts(self.uc, self._lib, n_harts)
        const = unicorn.unicorn_const
        self._hook(const.UC_HOOK_INTR, self._on_interrupt)
        self._hook(const.UC_HOOK_INSN_INVALID, self._on_invalid)
        # Never fires (all memory is readable); its presence keeps stores from being taken for
        # ones that cannot hit translated code.
        self._hook(const.UC_HOOK_MEM_READ_PROT, lambda *_: False)

    # -- harts

    @property
    def current(self) -> int:
        return self._harts.current

    def select(self, hart: int) -> None:
        if self._running:
            raise RuntimeError("not while the hart runs")
        self._harts.select(hart)

    def get(self, hart: int, name: str) -> int:
        value = self._harts.get(hart, name)
        return value | self._irq_raised if name == "mip" and hart == self.current else value

    def set(self, hart: int, name: str, value: int) -> None:
        self._harts.set(hart, name, value)

    def get_pmp(self, hart: int) -> tuple[list[int], list[int]]:
        return self._harts.get_pmp(hart)

    def set_pmp(self, hart: int, cfg: list[int], addr: list[int]) -> None:
        self._harts.set_pmp(hart, cfg, addr)

    def loaded(self, hart: int) -> None:
        self._harts.loaded(hart)

    def owe_tlb_flush(self, hart: int) -> None:
        self._harts.owe_tlb_flush(hart)

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        harts = self._harts
        if hart == self.current and self._running:
            # Lowered at once, lest a handler be entered again; raised when the slice ends, as the
            # engine would notice it sooner or later by how its blocks happen to be chained.
            cleared = mask & ~value
            self._irq_raised = self._irq_raised & ~cleared | mask & value
            if cleared:
                harts.set(hart, "mip", harts.get(hart, "mip") & ~cleared)
            return
        harts.set(hart, "mip", harts.get(hart, "mip") & ~mask | value & mask)
        if hart == self.current:
            harts.rearm()

    # -- translated code

    def _find_invalidate(self) -> Callable[[int, int], None] | None:
        try:
            function = self._lib.tb_invalidate_phys_range_riscv64
        except AttributeError:
            return None
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
        call = ctypes.cast(function, prototype)
        handle = self.uc._uch
        return lambda start, end: call(handle, start, end)

    def written(self, gpa: int, size: int) -> None:
        if self._invalidate is None:
            self.forget_code()
            return
        for start, end in self._ram.ranges(gpa, size):
            self._invalidate(start, end)

    def forget_code(self) -> None:
        if self._running:
            self._flush_code = True
        else:
            self.uc.ctl_flush_tb()

    # -- running

    @property
    def executed(self) -> int:
        return self._executed

    def caps(self) -> Caps:
        return Caps(exact_stops=True, native=False, time_unit="instructions")

    def stop(self) -> None:
        self._stop = True

    def end_turn(self) -> None:
        self._turn = True

    def _settle(self) -> None:
        raised, self._irq_raised = self._irq_raised, 0
        if raised:
            self.set_irq(self.current, raised, raised)
        if self._flush_code:
            self._flush_code = False
            self.uc.ctl_flush_tb()

    def _due(self, end: int, deadline_ns: int | None) -> Reason | None:
        if self._stop:
            self._stop = False
            return Reason.STOPPED
        if self._turn:
            return Reason.TURN
        if self._executed >= end:
            return Reason.BUDGET
        if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
            return Reason.DEADLINE
        return None

    def run(self, budget: int, deadline_ns: int | None) -> Ended:
        if self._running:
            raise RuntimeError("not while the hart runs")
        end = self._executed + budget
        try:
            while True:
                self._settle()
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                reason = self._due(end, deadline_ns)
                if reason is not None:
                    return Ended(reason)
                left = -(-(end - self._executed) // COUNT_PER_INSTRUCTION)
                ended = self._slice(min(SLICE, left))
                if ended is not None:
                    return ended
        finally:
            self._turn = False

    def _slice(self, instructions: int) -> Ended | None:
        self._ended_early = False
        self._broke = False
        self._slice_traps = 0
        self._running = True
        pc = self._harts.get(self.current, "pc")
        status = self._lib.uc_emu_start(self.uc._uch, pc, 0, 0, instructions)
        self._running = False
        self._executed += instructions * COUNT_PER_INSTRUCTION
        self._settle()
        if self._error is not None or self._ended_early:
            return None
        const = unicorn.unicorn_const
        if status == const.UC_ERR_EXCEPTION and self._broke:
            return None
        if status in (const.UC_ERR_READ_UNMAPPED, const.UC_ERR_FETCH_UNMAPPED):
            self._access_fault(status == const.UC_ERR_FETCH_UNMAPPED)
            return None
        if status != const.UC_ERR_OK:
            return Ended(Reason.ERROR, describe_error(status))
        return self._waits()

    def _waits(self) -> Ended | None:
        """A count used up, or WFI? Both look alike, but for the instruction before pc."""
        env = self._harts.environment()
        word = traps.word
        if word(env, "mip") & word(env, "mie"):
            return None
        if traps.fetch(self.uc, env, word(env, "pc") - 4) != traps.WFI_WORD:
            return None
        return Ended(Reason.WFI)

    # -- hooks

    def _hook(self, kind: int, callback: Callable[..., Any]) -> None:
        self.uc.hook_add(kind, callback)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            if self._error is None:
                self._error = error

    def _on_interrupt(self, uc: Any, cause: int, _: object) -> None:
        self._guard(lambda: self._interrupt(cause))

    def _interrupt(self, cause: int) -> None:
        env = self._harts.environment()
        word = traps.word
        if cause == traps.ECALL_U:
            priv = word(env, "priv")
            if priv == PRV_S and self._ecall is not None:
                self._ecall(self.current)
                if self._turn:
                    self._leave()
                return
            cause += priv
        pc = word(env, "pc") - 4
        if cause == traps.ILLEGAL:
            found = traps.counter_read(self.uc, env, pc, self.ticks)
            if found is not None:
                register, value = found
                values = {layout.OFFSETS["pc"]: pc + 4}
                if register:
                    values[layout.OFFSETS[f"x{register}"]] = value
                self._harts.store(values)
                return
        cause = traps.atomic_cause(self.uc, env, pc, cause)
        tval = word(env, "badaddr") if cause in traps.WITH_ADDRESS else 0
        self._deliver(env, cause, pc, tval)
        if self._slice_traps >= SLICE:
            self._leave()  # no instruction is counted where handlers cannot be fetched

    def _deliver(self, env: bytes, cause: int, pc: int, tval: int) -> None:
        self._traps += 1
        self._slice_traps += 1
        self._harts.store(
            {layout.OFFSETS[n]: v for n, v in traps.entry(env, cause, pc, tval).items()}
        )

    def _on_invalid(self, uc: Any, _: object) -> bool:
        def deliver() -> None:
            env = self._harts.environment()
            pc = traps.word(env, "pc")
            self._deliver(env, traps.BREAKPOINT, pc, pc)
            self._broke = True
            self._leave()

        self._guard(deliver)
        return True

    def _access_fault(self, fetching: bool) -> None:
        env = self._harts.environment()
        pc = traps.word(env, "pc")
        if fetching:
            self._deliver(env, traps.FETCH_ACCESS, pc, pc)
        else:
            cause = traps.atomic_cause(self.uc, env, pc, traps.LOAD_ACCESS)
            self._deliver(env, cause, pc, traps.load_address(self.uc, env, pc))

    def _leave(self) -> None:
        """End the slice now: exact in a hook for a trap, where no instruction is under way."""
        self._ended_early = True
        self.uc.emu_stop()

    # -- time, memory, devices

    def set_time(self, source: TimeSource) -> None:
        self._time = source

    def ticks(self) -> int:
        return self._time.ticks(self._executed)

    def map_mmio(self, gpa: int, size: int, device: Mmio) -> Window:
        def read(uc: Any, offset: int, width: int, _: object) -> int:
            value = 0

            def act() -> None:
                nonlocal value
                value = device.mmio_read(offset, width)

            if self._running:
                self._guard(act)
            return value & ((1 << 8 * width) - 1)

        def write(uc: Any, offset: int, width: int, value: int, _: object) -> None:
            masked = value & ((1 << 8 * width) - 1)
            if self._running:
                self._guard(lambda: device.mmio_write(offset, width, masked))

        try:
            self.uc.mmio_map(gpa, size, read, None, write, None)
        except unicorn.UcError as error:
            raise HostError(f"cannot map a device at {gpa:#x}: {error}") from None
        return Window()

    def map_memory(self, gpa: int, size: int, hva: int, readonly: bool) -> None:
        const = unicorn.unicorn_const
        rights = const.UC_PROT_READ | const.UC_PROT_EXEC
        if not readonly:
            rights |= const.UC_PROT_WRITE
        self.uc.mem_map_ptr(gpa, size, rights, ctypes.c_void_p(hva))
        self._ram.map(gpa, size)

    def unmap_memory(self, gpa: int, size: int) -> None:
        self.uc.mem_unmap(gpa, size)
        self._ram.unmap(gpa)

    def stats(self) -> dict[str, int]:
        return {"traps": self._traps}

    def close(self) -> None:
        self._harts.close()
        self.uc = None

"""The engine without the compiled part: only Unicorn's public interface (layer 2).

Slow and exact. The guest runs in slices of counted instructions, which end at an instruction
boundary. Registers without a name in the interface are read and written in the engine's saved
context, whose layout is checked when an engine is made. Python delivers the traps.

The engine's defects are met so: nothing stops it but the count (or a trap), so that no memory
instruction is repeated; a hook that never fires keeps every store on the path that looks for
translated code; host writes invalidate the engine's translations, by range where it exports that.

`executed` counts 4 for each instruction; a slice that a wait or a trap ended early counts in full,
so that the count does not depend on how long the wait was reached.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from migrate.errors import HostError
from migrate.vm.clock import TimeKind, TimeSource
from migrate.vm.core import Caps, EcallHandler, Mmio, Reason
from migrate.vm.riscv64 import layout, native, traps
from migrate.vm.riscv64.engine import Ended, Engine, describe_error, open_unicorn, unicorn
from migrate.vm.riscv64.ram import RamOffsets, library
from migrate.vm.riscv64.registers import MSTATUS_MEMORY, PRV_M, PRV_S

SLICE: Final = 2000
"""Instructions between two looks at stop flag and clock: some 20 to 50 microseconds."""
COUNT_PER_INSTRUCTION: Final = 4
_NONE: Final = (1 << 64) - 1


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
        self._current = 0
        self._owed = [False] * n_harts
        self._running = False
        self._stop = False
        self._turn = False
        self._flush_code = False
        self._irq_raised = 0
        self._error: BaseException | None = None
        self._callbacks: list[object] = []
        self._traps = 0
        self._open_context()
        self._images = [bytes(self._env) for _ in range(n_harts)]
        self._fflags = [0] * n_harts
        for hart in range(n_harts):
            self._edit_image(hart, layout.OFFSETS["mhartid"], hart)
        const = unicorn.unicorn_const
        self._hook(const.UC_HOOK_INTR, self._on_interrupt)
        self._hook(const.UC_HOOK_INSN_INVALID, self._on_invalid)
        # Never fires (all memory is readable); its presence keeps stores from being taken for
        # ones that cannot hit translated code.
        self._hook(const.UC_HOOK_MEM_READ_PROT, lambda *_: False)

    # -- the engine's context: its environment, as bytes

    def _open_context(self) -> None:
        lib, handle = self._lib, self.uc._uch
        self._context = self.uc.context_save()
        size = lib.uc_context_size(handle)
        base = ctypes.cast(self._context.context, ctypes.c_void_p).value
        if base is None:
            raise HostError("the emulator engine gave no context")
        # The environment is the context's tail; find it by a pattern.
        const = unicorn.riscv_const
        pattern = [0x5A5A_0000_0000_0000 + i for i in range(32)]
        for i in range(1, 32):
            self.uc.reg_write(const.UC_RISCV_REG_X0 + i, pattern[i])
        self.uc.context_update(self._context)
        raw = ctypes.string_at(base, size)
        start = raw.find(struct.pack("<31Q", *pattern[1:])) - 8
        if start < 0 or start + layout.CONTEXT_SIZE > size:
            raise HostError("the emulator engine's context is not laid out as known")
        raw_env = (ctypes.c_ubyte * layout.CONTEXT_SIZE).from_address(base + start)
        self._env = memoryview(raw_env).cast("B")
        self._words = self._env.cast("Q")
        for i in range(1, 32):
            self.uc.reg_write(const.UC_RISCV_REG_X0 + i, 0)
        self._check_layout()

    def _check_layout(self) -> None:
        const = unicorn.riscv_const
        for i, name in enumerate(("mepc", "sepc", "mscratch", "sscratch", "scounteren", "mcause")):
            register = getattr(const, f"UC_RISCV_REG_{name.upper()}")
            self.uc.reg_write(register, 0x1230 + i)
            if self._load(layout.OFFSETS[name]) != 0x1230 + i:
                raise HostError(f"the emulator engine keeps {name} elsewhere than known")
            self.uc.reg_write(register, 0)
        self.uc.context_update(self._context)

    def _load(self, offset: int) -> int:
        self.uc.context_update(self._context)
        return int(self._words[offset // 8])

    def _store(self, values: dict[int, int]) -> None:
        self.uc.context_update(self._context)
        for offset, value in values.items():
            self._words[offset // 8] = value
        self.uc.context_restore(self._context)

    def _edit_image(self, hart: int, offset: int, value: int) -> None:
        image = bytearray(self._images[hart])
        image[offset : offset + 8] = value.to_bytes(8, "little")
        self._images[hart] = bytes(image)
        if hart == self._current:
            self._store({offset: value})

    # -- registers

    def get(self, hart: int, name: str) -> int:
        if name == "fflags":
            return self._read_fflags() if hart == self._current else self._fflags[hart]
        offset = layout.OFFSETS[name]
        if hart != self._current:
            return int.from_bytes(self._images[hart][offset : offset + 8], "little")
        value = self._load(offset)
        return value | self._irq_raised if name == "mip" else value

    def set(self, hart: int, name: str, value: int) -> None:
        if name == "x0":
            return
        if name == "fflags":
            if hart == self._current:
                self._write_fflags(value)
            else:
                self._fflags[hart] = value
        elif hart == self._current:
            self._store({layout.OFFSETS[name]: value})
        else:
            self._edit_image(hart, layout.OFFSETS[name], value)

    def _with_privilege(self, action: Callable[[], int]) -> int:
        """CSRs are checked against the hart's privilege, and FP ones against mstatus.FS."""
        self.uc.context_update(self._context)
        kept = bytes(self._env)
        offset = layout.OFFSETS
        self._store({offset["priv"]: PRV_M, offset["mstatus"]: 3 << 13})
        result = action()
        self._env[:] = kept
        self.uc.context_restore(self._context)
        return result

    def _read_fflags(self) -> int:
        register = unicorn.riscv_const.UC_RISCV_REG_FFLAGS
        return self._with_privilege(lambda: int(self.uc.reg_read(register)))

    def _write_fflags(self, value: int) -> None:
        def write() -> int:
            self.uc.reg_write(unicorn.riscv_const.UC_RISCV_REG_FFLAGS, value)
            return 0

        self._with_privilege(write)

    def get_pmp(self, hart: int) -> tuple[list[int], list[int]]:
        if hart == self._current:
            self.uc.context_update(self._context)
            env = bytes(self._env)
        else:
            env = self._images[hart]
        entries = [layout.PMP + 16 * i for i in range(16)]
        return (
            [env[at + 8] for at in entries],
            [int.from_bytes(env[at : at + 8], "little") for at in entries],
        )

    def set_pmp(self, hart: int, cfg: list[int], addr: list[int]) -> None:
        values = {}
        for i in range(16):
            values[layout.PMP + 16 * i] = addr[i]
            values[layout.PMP + 16 * i + 8] = cfg[i]
            first, last = traps.pmp_range(cfg, addr, i)
            values[layout.PMP_RANGES + 16 * i] = first
            values[layout.PMP_RANGES + 16 * i + 8] = last
        values[layout.PMP_RULES] = sum(1 for c in cfg if c >> 3 & 3)
        if hart == self._current:
            self._store(values)
        else:
            for offset, value in values.items():
                self._edit_image(hart, offset, value)
        self.owe_tlb_flush(hart)

    # -- harts

    @property
    def current(self) -> int:
        return self._current

    def select(self, hart: int) -> None:
        if self._running:
            raise RuntimeError("not while the hart runs")
        if not 0 <= hart < self.n_harts:
            raise IndexError(f"no hart {hart}; there are {self.n_harts}")
        if hart == self._current:
            return
        self._fflags[self._current] = self._read_fflags()
        self._store({layout.OFFSETS["load_res"]: _NONE})  # other harts may store meanwhile
        self.uc.context_update(self._context)
        out = self._images[self._current] = bytes(self._env)
        into = self._images[hart]
        self._env[:] = into
        self.uc.context_restore(self._context)
        self._current = hart
        self._write_fflags(self._fflags[hart])
        satp, mstatus = layout.OFFSETS["satp"], layout.OFFSETS["mstatus"]

        def word(image: bytes, offset: int) -> int:
            return int.from_bytes(image[offset : offset + 8], "little")

        if (
            self._owed[hart]
            or word(out, satp) != word(into, satp)
            or (word(out, mstatus) ^ word(into, mstatus)) & MSTATUS_MEMORY
            or out[layout.PMP :] != into[layout.PMP :]
        ):
            self._flush_tlb()
        self._owed[hart] = False
        self._rearm()

    def _rearm(self) -> None:
        """Only a write of mip sets or clears the engine's interrupt request."""

        def write() -> int:
            mip = self._load(layout.OFFSETS["mip"])
            self.uc.reg_write(unicorn.riscv_const.UC_RISCV_REG_MIP, mip)
            return mip

        self._with_privilege(write)

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        if hart != self._current:
            mip = self.get(hart, "mip")
            self._edit_image(hart, layout.OFFSETS["mip"], mip & ~mask | value & mask)
        elif self._running:
            # Lowered at once, lest a handler be entered again; raised when the slice ends, as the
            # engine would notice it sooner or later by how its blocks happen to be chained.
            cleared = mask & ~value
            self._irq_raised = self._irq_raised & ~cleared | mask & value
            if cleared:
                offset = layout.OFFSETS["mip"]
                self._store({offset: self._load(offset) & ~cleared})
        else:
            offset = layout.OFFSETS["mip"]
            self._store({offset: self._load(offset) & ~mask | value & mask})
            self._rearm()

    def loaded(self, hart: int) -> None:
        self.owe_tlb_flush(hart)
        if hart == self._current:
            self._rearm()

    def owe_tlb_flush(self, hart: int) -> None:
        if hart == self._current:
            self._flush_tlb()
        else:
            self._owed[hart] = True

    def _flush_tlb(self) -> None:
        const = unicorn.unicorn_const
        self.uc.ctl(const.UC_CTL_TLB_FLUSH, const.UC_CTL_IO_WRITE)  # the binding has no name for it

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
            self.set_irq(self._current, raised, raised)
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
        pc = self._load(layout.OFFSETS["pc"])
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
        self.uc.context_update(self._context)
        env = bytes(self._env)
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
        self.uc.context_update(self._context)
        env = bytes(self._env)
        word = traps.word
        if cause == traps.ECALL_U:
            priv = word(env, "priv")
            if priv == PRV_S and self._ecall is not None:
                self._ecall(self._current)
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
                self._store(values)
                return
        cause = traps.atomic_cause(self.uc, env, pc, cause)
        tval = word(env, "badaddr") if cause in traps.WITH_ADDRESS else 0
        self._deliver(env, cause, pc, tval)
        if self._slice_traps >= SLICE:
            self._leave()  # no instruction is counted where handlers cannot be fetched

    def _deliver(self, env: bytes, cause: int, pc: int, tval: int) -> None:
        self._traps += 1
        self._slice_traps += 1
        self._store({layout.OFFSETS[n]: v for n, v in traps.entry(env, cause, pc, tval).items()})

    def _on_invalid(self, uc: Any, _: object) -> bool:
        def deliver() -> None:
            self.uc.context_update(self._context)
            env = bytes(self._env)
            pc = traps.word(env, "pc")
            self._deliver(env, traps.BREAKPOINT, pc, pc)
            self._broke = True
            self._leave()

        self._guard(deliver)
        return True

    def _access_fault(self, fetching: bool) -> None:
        self.uc.context_update(self._context)
        env = bytes(self._env)
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

    def map_mmio(self, gpa: int, size: int, device: Mmio) -> None:
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
        self.uc = None

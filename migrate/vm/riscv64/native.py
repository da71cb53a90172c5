"""The engine with the compiled part `_engine` (layer 2).

Finds the functions of the loaded libunicorn, checks the environment's layout against the public
interface field by field, and adapts the compiled part to `Engine`. The self-tests that decide
whether it may be used are in selftest.py.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Final

from migrate.errors import HostError
from migrate.vm.clock import TimeSource
from migrate.vm.core import Caps, EcallHandler, Mmio, Reason, Window
from migrate.vm.riscv64 import layout
from migrate.vm.riscv64.engine import Ended, Engine, describe_error, open_unicorn, unicorn
from migrate.vm.riscv64.ram import RamOffsets, library

try:
    from migrate.vm.riscv64 import _engine
except ImportError:
    _engine = None  # type: ignore[assignment]

_PMP: Final = struct.Struct("<16B16Q")
_ENDS: Final = {
    1: Reason.BUDGET,
    2: Reason.DEADLINE,
    3: Reason.STOPPED,
    4: Reason.TURN,
    5: Reason.WFI,
    6: Reason.ERROR,
}

_bound = False


class NativeUnavailable(Exception):
    """The compiled part is missing, or does not fit the installed engine. Says why."""


def bind() -> None:
    """Give the compiled part the engine's functions. Raises NativeUnavailable."""
    global _bound
    if _bound:
        return
    if _engine is None:
        raise NativeUnavailable("the extension migrate.vm.riscv64._engine is not built")
    lib = library()
    symbols: dict[str, int] = {}
    for name in _engine.SYMBOLS:
        try:
            address = ctypes.cast(getattr(lib, name), ctypes.c_void_p).value
        except AttributeError:
            raise NativeUnavailable(f"libunicorn does not export {name}") from None
        assert address is not None
        symbols[name] = address
    try:
        _engine.bind(symbols)
        _engine.set_code_repair(True)
    except (LookupError, RuntimeError, OSError) as error:
        raise NativeUnavailable(str(error)) from None
    _bound = True


def bound() -> bool:
    """Has the compiled part taken over in this process?"""
    return _bound


def set_code_repair(on: bool) -> None:
    """The repair of stale translated code, process-wide. Off only in tests."""
    assert _engine is not None
    _engine.set_code_repair(on)


class NativeWindow(Window):
    """The compiled part's shortcuts of one window."""

    def __init__(self, engine: Any, number: int) -> None:
        self._engine = engine
        self._number = number

    def time_at(self, offset: int) -> None:
        self._engine.window_shortcut(self._number, b"t", offset, 0)

    def shadow(self, offset: int, value: int) -> None:
        self._engine.window_shortcut(self._number, b"s", offset, value)

    def sink(self, offset: int, *, on: bool) -> None:
        self._engine.window_shortcut(self._number, b"i", offset if on else -1, 0)

    def drain(self) -> bytes:
        collected: bytes = self._engine.window_drain(self._number)
        return collected


class NativeEngine(Engine):
    """Unicorn driven by the compiled part."""

    def __init__(self, n_harts: int, ecall: EcallHandler | None) -> None:
        bind()
        assert _engine is not None
        self.uc = open_unicorn()
        self.n_harts = n_harts
        self._fields = layout.OFFSETS
        self._ram = RamOffsets()
        self.exact_ranges = True
        try:
            self.engine = _engine.Engine(self.uc._uch.value, n_harts, ecall)
        except RuntimeError as error:
            raise NativeUnavailable(str(error)) from None

    @property
    def current(self) -> int:
        return int(self.engine.current)

    @property
    def executed(self) -> int:
        return int(self.engine.executed)

    def caps(self) -> Caps:
        return Caps(exact_stops=True, native=True, time_unit="code-bytes")

    def run(self, budget: int, deadline_ns: int | None) -> Ended:
        end, error = self.engine.run(budget, deadline_ns or 0)
        if error:
            return Ended(Reason.ERROR, describe_error(error))
        return Ended(_ENDS[end])

    def stop(self) -> None:
        self.engine.stop()

    def end_turn(self) -> None:
        self.engine.end_turn()

    def select(self, hart: int) -> None:
        self.engine.select(hart)

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        self.engine.set_irq(hart, mask, value)

    def get(self, hart: int, name: str) -> int:
        if name == "fflags":
            return int(self.engine.get_fflags(hart))
        return int(self.engine.peek(hart, self._fields[name]))

    def set(self, hart: int, name: str, value: int) -> None:
        if name == "fflags":
            self.engine.set_fflags(hart, value)
        elif name != "x0":
            self.engine.poke(hart, self._fields[name], value)

    def get_pmp(self, hart: int) -> tuple[list[int], list[int]]:
        packed = _PMP.unpack(self.engine.get_pmp(hart))
        return list(packed[:16]), list(packed[16:])

    def set_pmp(self, hart: int, cfg: list[int], addr: list[int]) -> None:
        self.engine.set_pmp(hart, _PMP.pack(*cfg, *addr))

    def loaded(self, hart: int) -> None:
        self.engine.loaded(hart)

    def owe_tlb_flush(self, hart: int) -> None:
        self.engine.owe_tlb_flush(hart)

    def written(self, gpa: int, size: int) -> None:
        if not self.exact_ranges:
            self.engine.forget_code()
            return
        for start, end in self._ram.ranges(gpa, size):
            self.engine.written(start, end)

    def forget_code(self) -> None:
        self.engine.forget_code()

    def set_time(self, source: TimeSource) -> None:
        self.engine.set_time(int(source.kind), source.offset)

    def ticks(self) -> int:
        return int(self.engine.ticks())

    def map_mmio(self, gpa: int, size: int, device: Mmio) -> Window:
        number = self.engine.map_mmio(gpa, size, device.mmio_read, device.mmio_write)
        if number < 0:
            raise HostError(f"cannot map a device at {gpa:#x}: {describe_error(-number)}")
        return NativeWindow(self.engine, number)

    def map_memory(self, gpa: int, size: int, hva: int, readonly: bool) -> None:
        rights = unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC
        if not readonly:
            rights |= unicorn.UC_PROT_WRITE
        self.uc.mem_map_ptr(gpa, size, rights, ctypes.c_void_p(hva))
        self._ram.map(gpa, size)
        self.engine.memory_mapped(gpa, size, hva, readonly)

    def unmap_memory(self, gpa: int, size: int) -> None:
        self.uc.mem_unmap(gpa, size)
        self._ram.unmap(gpa)
        self.engine.memory_mapped(gpa, size, 0, False)

    def stats(self) -> dict[str, int]:
        return dict(self.engine.stats())

    def close(self) -> None:
        self.engine.close()
        self.uc = None

"""What the RISC-V core asks of an engine: Unicorn with, or without, the compiled part (layer 2).

Two implementations, `native.NativeEngine` and `plain.PlainEngine`, and one set of tests. An engine
keeps the harts' registers; checking names, states and errors is the core's part.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final

from migrate.errors import HostError
from migrate.vm.clock import TimeSource
from migrate.vm.core import Caps, Mmio, Reason, Window

UNICORN_VERSION: Final = "2.1.4"
"""The only version whose insides and defects are known here."""
TCG_BUFFER_BYTES: Final = 48 << 20
"""Enough for a Linux guest's working set of translated code; the engine's default is wasteful."""
PAGE: Final = 0x1000


@dataclass(frozen=True, slots=True)
class Ended:
    """Why an engine returned."""

    reason: Reason
    detail: str = ""


class Engine(ABC):
    """A Unicorn engine that holds `n_harts` harts, one of them selected."""

    uc: Any
    n_harts: int

    @property
    @abstractmethod
    def current(self) -> int: ...

    @property
    @abstractmethod
    def executed(self) -> int: ...

    @abstractmethod
    def caps(self) -> Caps: ...

    @abstractmethod
    def run(self, budget: int, deadline_ns: int | None) -> Ended: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def end_turn(self) -> None: ...

    @abstractmethod
    def select(self, hart: int) -> None: ...

    @abstractmethod
    def set_irq(self, hart: int, mask: int, value: int) -> None: ...

    @abstractmethod
    def get(self, hart: int, name: str) -> int:
        """A register by the name that `registers.canonical` gives."""

    @abstractmethod
    def set(self, hart: int, name: str, value: int) -> None: ...

    @abstractmethod
    def get_pmp(self, hart: int) -> tuple[list[int], list[int]]: ...

    @abstractmethod
    def set_pmp(self, hart: int, cfg: list[int], addr: list[int]) -> None: ...

    @abstractmethod
    def loaded(self, hart: int) -> None:
        """A hart's registers were set: forget translations, re-arm the interrupt request."""

    @abstractmethod
    def owe_tlb_flush(self, hart: int) -> None: ...

    @abstractmethod
    def written(self, gpa: int, size: int) -> None: ...

    @abstractmethod
    def forget_code(self) -> None: ...

    @abstractmethod
    def set_time(self, source: TimeSource) -> None: ...

    @abstractmethod
    def ticks(self) -> int: ...

    @abstractmethod
    def map_mmio(self, gpa: int, size: int, device: Mmio) -> Window: ...

    @abstractmethod
    def map_memory(self, gpa: int, size: int, hva: int, readonly: bool) -> None: ...

    @abstractmethod
    def unmap_memory(self, gpa: int, size: int) -> None: ...

    @abstractmethod
    def stats(self) -> dict[str, int]: ...

    @abstractmethod
    def close(self) -> None: ...


unicorn: Any = importlib.import_module("unicorn")
"""The binding, whose annotations are too partial for a strict type check."""


def describe_error(code: int) -> str:
    """The engine's words for one of its error codes."""
    return str(unicorn.UcError(code))


def open_unicorn() -> Any:
    """A bare engine of the one version that this package knows. Raises HostError."""
    if unicorn.__version__ != UNICORN_VERSION:
        raise HostError(
            f"the emulator engine is unicorn {unicorn.__version__}; this program needs "
            f"{UNICORN_VERSION}: pip install unicorn=={UNICORN_VERSION}"
        )
    uc = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
    uc.ctl_set_tcg_buffer_size(TCG_BUFFER_BYTES)
    uc.ctl_exits_enabled(True)
    uc.ctl_set_exits([])
    # Once something was unmapped, the engine looks for free room for each block of memory; before,
    # blocks mapped in growing sizes get the same room, and their translated code is confused.
    uc.mem_map(0, PAGE)
    uc.mem_unmap(0, PAGE)
    return uc

"""What a vcpu core is to the board above it (layer 2).

A core executes guest code and reports why it returned. It owns registers, translated code and
address translation; devices, clock and pending interrupts belong to the board. Several harts
(vcpus) of a machine take turns on one core, in one thread: `select` swaps their registers.

Every method is for the vcpu thread (the one that calls `run`) with the machine between two
`run` calls, unless it says otherwise; `stop` is for any thread.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from migrate.vm.state import PortableState


class Reason(enum.Enum):
    """Why `run` returned. The guest is at an instruction boundary in every case but ERROR."""

    BUDGET = "slice used up"
    DEADLINE = "deadline reached"
    STOPPED = "stop requested"
    TURN = "turn ended by a hook (an SBI call that yields)"
    WFI = "waiting for an interrupt"
    BREAKPOINT = "breakpoint"
    STEP = "single step done"
    ERROR = "internal error"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a slice ended. `detail` is for ERROR: what the engine said, and where."""

    reason: Reason
    pc: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Caps:
    """What a core can do.

    `exact_stops`: a stop never repeats or skips an instruction. `native`: block budget, traps
    and code repairs run in the compiled part. `time_unit`: what `executed` counts, "code-bytes"
    or "instructions"; deterministic runs compare only where it is the same.
    """

    exact_stops: bool
    native: bool
    time_unit: str
    single_step: bool = False


class EcallHandler(Protocol):
    """The board's SBI: called inside `run` for an ecall from supervisor mode.

    Reads and writes a0..a7 through `core.read_reg`/`write_reg`; may call `core.end_turn()`.
    """

    def __call__(self, hart: int) -> None: ...


class Mmio(Protocol):
    """A device's register window; offsets from its base. Called inside `run`, vcpu thread."""

    def mmio_read(self, offset: int, size: int) -> int: ...

    def mmio_write(self, offset: int, size: int, value: int) -> None: ...


class Window:
    """A device's window as its core knows it: shortcuts for what guests do all the time.

    A shortcut spares a call of the device; what it means is the same without. This class has none,
    which is right for every core. `drain` is for the vcpu thread, or while nothing runs; the others
    too.
    """

    def time_at(self, offset: int) -> None:
        """The eight bytes at `offset` read as the guest's time."""

    def shadow(self, offset: int, value: int) -> None:
        """From now on the byte at `offset` reads as `value`, without a side effect."""

    def sink(self, offset: int, *, on: bool) -> None:
        """While on, bytes that the guest writes at `offset` may be collected, see `drain`."""

    def drain(self) -> bytes:
        """What was collected since the last call. A device drains before it acts on a later write
        to the same register, so that their order is kept.
        """
        return b""


class VcpuCore(ABC):
    """An engine with its harts, one of them selected."""

    harts: int
    current: int

    @abstractmethod
    def caps(self) -> Caps: ...

    @abstractmethod
    def map_mmio(self, gpa: int, size: int, device: Mmio) -> Window:
        """Route accesses to [gpa, gpa + size) to `device`."""

    @abstractmethod
    def map_memory(self, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        """Back [gpa, gpa + size) by the host memory at `hva` (a memory slot's mapping)."""

    @abstractmethod
    def unmap_memory(self, gpa: int, size: int) -> None: ...

    @abstractmethod
    def run(self, budget: int, deadline_ns: int | None = None) -> Exit:
        """Run the selected hart until `budget` (unit of `Caps.time_unit`) is used up,
        CLOCK_MONOTONIC reaches `deadline_ns`, or something else of `Reason` happens.
        Releases the GIL.
        """

    @abstractmethod
    def stop(self) -> None:
        """Any thread: make the running (or the next) `run` return STOPPED soon, exactly once."""

    @abstractmethod
    def end_turn(self) -> None:
        """From a hook inside `run`: return TURN at the next instruction boundary."""

    @property
    @abstractmethod
    def executed(self) -> int:
        """Code executed since creation by all harts (unit of `Caps.time_unit`); exact and
        reproducible. Valid inside hooks too.
        """

    @abstractmethod
    def select(self, hart: int) -> None:
        """Swap `hart` in."""

    @abstractmethod
    def set_irq(self, hart: int, mask: int, value: int) -> None:
        """mip of `hart`: the bits of `mask` become those of `value`. Also inside hooks."""

    @abstractmethod
    def irq_wakes(self, hart: int) -> bool:
        """Does `hart` have an interrupt pending that ends WFI (mip & mie != 0)?"""

    @abstractmethod
    def read_reg(self, name: str) -> int:
        """A register of the selected hart by its name ("a0", "pc", "satp", "priv", ...).

        Also inside hooks; CSRs read their full contents, whatever the hart's privilege.
        """

    @abstractmethod
    def write_reg(self, name: str, value: int) -> None: ...

    @abstractmethod
    def get_state(self, hart: int) -> PortableState:
        """Every architectural register of `hart`, named; no engine insides, no host pointers."""

    @abstractmethod
    def set_state_untrusted(self, hart: int, state: object) -> None:
        """Raises StateFormatError; the hart is unchanged then."""

    @abstractmethod
    def owe_tlb_flush(self, hart: int) -> None:
        """Flush now if `hart` is selected, else when it is next. Also inside hooks."""

    @abstractmethod
    def written(self, gpa: int, size: int) -> None:
        """The host wrote [gpa, gpa + size): forget code translated from there.

        Also inside hooks.
        """

    @abstractmethod
    def forget_code(self) -> None:
        """Forget all translated code (after memory was replaced as a whole)."""

    @abstractmethod
    def close(self) -> None: ...

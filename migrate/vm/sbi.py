"""The SBI for kernels that start in supervisor mode (layer 2): the board is their firmware.

Extensions base, TIME, IPI, RFENCE, HSM, SRST and DBCN, and of the legacy ones timer, console
and shutdown. Runs inside the engine's hook for an ecall; a call that lets other harts go ahead
ends the caller's turn.
Source: RISC-V Supervisor Binary Interface Specification 2.0.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from migrate.errors import UsageError
from migrate.units import Gpa
from migrate.vm.devices.base import MASK64, Device, TimedDevice
from migrate.vm.devices.virtio_ring import DmaMemory
from migrate.vm.state import Field

MIP_SSIP: Final = 1 << 1
MIP_STIP: Final = 1 << 5

EID_BASE: Final = 0x10
EID_TIME: Final = 0x5449_4D45
EID_IPI: Final = 0x0073_5049
EID_RFENCE: Final = 0x5246_4E43
EID_HSM: Final = 0x0048_534D
EID_SRST: Final = 0x5352_5354
EID_DBCN: Final = 0x4442_434E
LEGACY_SET_TIMER, LEGACY_PUTCHAR, LEGACY_GETCHAR, LEGACY_SHUTDOWN = 0, 1, 2, 8

SPEC_VERSION: Final = 2 << 24
IMPLEMENTATION_ID: Final = 0x6D69_6772
IMPLEMENTATION_VERSION: Final = 1
MAX_CONSOLE_BYTES: Final = 4096
"""Of one debug console call; the guest asks again for the rest."""

SUCCESS: Final = 0
ERR_NOT_SUPPORTED: Final = -2
ERR_INVALID_PARAM: Final = -3
ERR_INVALID_ADDRESS: Final = -5
ERR_ALREADY_AVAILABLE: Final = -6


class Hsm(enum.IntEnum):
    """Hart states of the HSM extension (section 9)."""

    STARTED = 0
    STOPPED = 1
    START_PENDING = 2
    SUSPENDED = 4
    """Until an interrupt, then to `start_addr` if it is a non-retentive one."""


class Services(Protocol):
    """What the SBI needs of the board."""

    @property
    def harts(self) -> int: ...
    @property
    def memory(self) -> DmaMemory: ...
    def time(self) -> int: ...
    def set_irq(self, hart: int, mask: int, value: int) -> None: ...
    def rearm(self) -> None: ...
    def end_turn(self) -> None: ...
    def wait_for_interrupt(self) -> None: ...
    def flush_tlb(self, hart: int) -> None: ...
    def forget_code(self) -> None: ...
    def read_reg(self, name: str) -> int: ...
    def write_reg(self, name: str, value: int) -> None: ...
    def console_write(self, data: bytes) -> None: ...
    def console_read(self, size: int) -> bytes: ...
    def power_off(self, code: int) -> None: ...
    def restart(self) -> None: ...


class _Error(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


class Sbi(Device, TimedDevice):
    """Hart states and supervisor timers. Hart 0 starts; the kernel starts the others."""

    KIND = "sbi"
    VERSION = 1
    FIELDS = (
        Field("timecmp", list, max_length=64),
        Field("hsm", list, bits=4, max_length=64),
        Field("start_addr", list, max_length=64),
        Field("start_arg", list, max_length=64),
        Field("resumes", list, bits=1, max_length=64),
    )

    def __init__(self, board: Services) -> None:
        self._board = board
        self._extensions: dict[int, Callable[[int, list[int]], int]] = {
            EID_BASE: self._base,
            EID_TIME: self._time,
            EID_IPI: self._ipi,
            EID_RFENCE: self._rfence,
            EID_HSM: self._hsm,
            EID_SRST: self._srst,
            EID_DBCN: self._dbcn,
        }
        self.reset()

    def reset(self) -> None:
        harts = self._board.harts
        self.timecmp = [MASK64] * harts
        self._waiting = [True] * harts
        """Which compare values have not been reached when last looked at."""
        self.hsm = [int(Hsm.STARTED)] + [int(Hsm.STOPPED)] * (harts - 1)
        self.start_addr = [0] * harts
        self.start_arg = [0] * harts
        self.resumes = [0] * harts

    def after_load(self) -> None:
        for field in self.FIELDS:
            length = len(getattr(self, field.name))
            self.refuse_unless(
                length == self._board.harts,
                f"state of {length} harts, this machine has {self._board.harts}",
            )
        states = {int(state) for state in Hsm}
        self.refuse_unless(set(self.hsm) <= states, f"unknown hart state in {self.hsm}")
        self._waiting = [True] * self._board.harts
        now = self._board.time()
        for hart in range(self._board.harts):
            self._compare(hart, now)

    # -- timers

    def next_tick(self) -> int | None:
        earliest = MASK64
        for hart, waiting in enumerate(self._waiting):
            if waiting and self.timecmp[hart] < earliest:
                earliest = self.timecmp[hart]
        return None if earliest == MASK64 else earliest

    def tick(self, now: int) -> None:
        for hart, waiting in enumerate(self._waiting):
            if waiting and now >= self.timecmp[hart]:
                self._compare(hart, now)

    def _compare(self, hart: int, now: int) -> None:
        reached = now >= self.timecmp[hart]
        self._waiting[hart] = not reached
        self._board.set_irq(hart, MIP_STIP, MIP_STIP if reached else 0)

    # -- harts

    def runnable(self, hart: int) -> bool:
        """Whether the scheduler may give `hart` a turn (waiting or not)."""
        return self.hsm[hart] != Hsm.STOPPED

    def enter(self, hart: int) -> None:
        """`hart` has just been selected for a turn: start it if that is due."""
        state = self.hsm[hart]
        if state == Hsm.STARTED:
            return
        self.hsm[hart] = int(Hsm.STARTED)
        if state == Hsm.START_PENDING or self.resumes[hart]:
            self.resumes[hart] = 0
            write = self._board.write_reg
            write("satp", 0)
            write("mstatus", self._board.read_reg("mstatus") & ~2)  # sstatus.SIE
            write("a0", hart)
            write("a1", self.start_arg[hart])
            write("priv", 1)
            write("pc", self.start_addr[hart])

    # -- calls

    def __call__(self, hart: int) -> None:
        """An ecall from supervisor mode of the selected hart."""
        read, write = self._board.read_reg, self._board.write_reg
        extension = read("a7")
        if extension <= LEGACY_SHUTDOWN:
            write("a0", self._legacy(hart, extension) & MASK64)
            return
        handler = self._extensions.get(extension)
        arguments = [read(f"a{i}") for i in range(7)]
        error, value = ERR_NOT_SUPPORTED, 0
        if handler is not None:
            try:
                error, value = SUCCESS, handler(hart, arguments)
            except _Error as refused:
                error = refused.code
        write("a0", error & MASK64)
        write("a1", value & MASK64)

    def _legacy(self, hart: int, extension: int) -> int:
        argument = self._board.read_reg("a0")
        if extension == LEGACY_SET_TIMER:
            self._set_timer(hart, argument)
        elif extension == LEGACY_PUTCHAR:
            self._board.console_write(bytes((argument & 0xFF,)))
        elif extension == LEGACY_GETCHAR:
            got = self._board.console_read(1)
            return got[0] if got else -1
        elif extension == LEGACY_SHUTDOWN:
            self._board.power_off(0)
        else:
            return ERR_NOT_SUPPORTED
        return SUCCESS

    def _base(self, hart: int, arguments: list[int]) -> int:
        match arguments[6]:
            case 0:
                return SPEC_VERSION
            case 1:
                return IMPLEMENTATION_ID
            case 2:
                return IMPLEMENTATION_VERSION
            case 3:
                wanted = arguments[0]
                legacy = (LEGACY_SET_TIMER, LEGACY_PUTCHAR, LEGACY_GETCHAR, LEGACY_SHUTDOWN)
                return int(wanted in self._extensions or wanted in legacy)
            case 4 | 5 | 6:  # mvendorid, marchid, mimpid
                return 0
        raise _Error(ERR_NOT_SUPPORTED)

    def _time(self, hart: int, arguments: list[int]) -> int:
        if arguments[6] != 0:
            raise _Error(ERR_NOT_SUPPORTED)
        self._set_timer(hart, arguments[0])
        return 0

    def _set_timer(self, hart: int, compare: int) -> None:
        self.timecmp[hart] = compare
        self._compare(hart, self._board.time())
        self._board.rearm()

    def _ipi(self, hart: int, arguments: list[int]) -> int:
        if arguments[6] != 0:
            raise _Error(ERR_NOT_SUPPORTED)
        for target in self._harts(arguments[0], arguments[1]):
            self._board.set_irq(target, MIP_SSIP, MIP_SSIP)
        # Whoever sends one waits for the others more often than not.
        if self._board.harts > 1:
            self._board.end_turn()
        return 0

    def _rfence(self, hart: int, arguments: list[int]) -> int:
        if arguments[6] > 2:  # the rest is for hypervisors
            raise _Error(ERR_NOT_SUPPORTED)
        targets = list(self._harts(arguments[0], arguments[1]))
        if arguments[6] == 0:
            self._board.forget_code()
        else:
            for target in targets:
                self._board.flush_tlb(target)
        return 0

    def _hsm(self, hart: int, arguments: list[int]) -> int:
        match arguments[6]:
            case 0:
                self._start(*arguments[:3])
                return 0
            case 1:
                self.hsm[hart] = int(Hsm.STOPPED)
                self._board.end_turn()
                return 0
            case 2:
                if arguments[0] >= self._board.harts:
                    raise _Error(ERR_INVALID_PARAM)
                return self.hsm[arguments[0]]
            case 3:
                self._suspend(hart, *arguments[:3])
                return 0
        raise _Error(ERR_NOT_SUPPORTED)

    def _start(self, target: int, address: int, argument: int) -> None:
        if target >= self._board.harts:
            raise _Error(ERR_INVALID_PARAM)
        if self.hsm[target] != Hsm.STOPPED:
            raise _Error(ERR_ALREADY_AVAILABLE)
        try:
            self._board.memory.view(Gpa(address), 2).release()
        except UsageError:
            raise _Error(ERR_INVALID_ADDRESS) from None
        self.start_addr[target] = address
        self.start_arg[target] = argument
        self.hsm[target] = int(Hsm.START_PENDING)
        self._board.end_turn()

    def _suspend(self, hart: int, kind: int, address: int, argument: int) -> None:
        if kind not in {0, 0x8000_0000}:
            raise _Error(ERR_INVALID_PARAM)
        self.hsm[hart] = int(Hsm.SUSPENDED)
        self.resumes[hart] = int(kind != 0)
        self.start_addr[hart] = address
        self.start_arg[hart] = argument
        self._board.wait_for_interrupt()

    def _srst(self, hart: int, arguments: list[int]) -> int:
        kind, reason, function = arguments[0], arguments[1], arguments[6]
        if function != 0:
            raise _Error(ERR_NOT_SUPPORTED)
        if kind > 2 or reason > 1:
            raise _Error(ERR_INVALID_PARAM)
        if kind == 0:
            self._board.power_off(int(reason != 0))
        else:
            self._board.restart()
        return 0

    def _dbcn(self, hart: int, arguments: list[int]) -> int:
        size, address = arguments[0], arguments[1] | arguments[2] << 64
        match arguments[6]:
            case 0:
                size = min(size, MAX_CONSOLE_BYTES)
                self._board.console_write(
                    self._at(lambda: self._board.memory.read(Gpa(address), size))
                )
                return size
            case 1:
                size = min(size, MAX_CONSOLE_BYTES)
                self._at(lambda: self._board.memory.view(Gpa(address), size).tobytes())
                data = self._board.console_read(size)
                if data:
                    self._board.memory.write(Gpa(address), data)
                return len(data)
            case 2:
                self._board.console_write(bytes((size & 0xFF,)))
                return 0
        raise _Error(ERR_NOT_SUPPORTED)

    def _at(self, access: Callable[[], bytes]) -> bytes:
        try:
            return access()
        except UsageError:
            raise _Error(ERR_INVALID_PARAM) from None

    def _harts(self, mask: int, base: int) -> Iterator[int]:
        """The harts of a mask. Raises ERR_INVALID_PARAM for one that does not exist."""
        harts = self._board.harts
        if base == MASK64:
            return iter(range(harts))
        if base >= harts or mask >> (harts - base):
            raise _Error(ERR_INVALID_PARAM)
        return (base + bit for bit in range(harts - base) if mask >> bit & 1)

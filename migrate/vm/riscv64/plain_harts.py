"""The harts of the engine without the compiled part: their registers, one hart selected (layer 2).

Registers without a name in Unicorn's public interface are read and written in the engine's saved
context, whose layout is checked when it is opened. The selected hart is in the engine, the others
are images of the same layout.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, Final

from migrate.errors import HostError
from migrate.vm.riscv64 import layout, traps
from migrate.vm.riscv64.engine import unicorn
from migrate.vm.riscv64.registers import MSTATUS_MEMORY, PRV_M

_NONE: Final = (1 << 64) - 1


def _word_at(image: bytes, offset: int) -> int:
    return int.from_bytes(image[offset : offset + 8], "little")


class PlainHarts:
    """`n_harts` harts in the one environment of `uc`."""

    def __init__(self, uc: Any, lib: Any, n_harts: int) -> None:
        self.uc = uc
        self._lib = lib
        self.current = 0
        self._owed = [False] * n_harts
        self._open_context()
        self._images = [bytes(self._env) for _ in range(n_harts)]
        self._fflags = [0] * n_harts
        for hart in range(n_harts):
            self._edit_image(hart, layout.OFFSETS["mhartid"], hart)

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
            if self.load(layout.OFFSETS[name]) != 0x1230 + i:
                raise HostError(f"the emulator engine keeps {name} elsewhere than known")
            self.uc.reg_write(register, 0)
        self.uc.context_update(self._context)

    def environment(self) -> bytes:
        """The selected hart's, as it is now."""
        self.uc.context_update(self._context)
        return bytes(self._env)

    def load(self, offset: int) -> int:
        """A field of the selected hart."""
        self.uc.context_update(self._context)
        return int(self._words[offset // 8])

    def store(self, values: dict[int, int]) -> None:
        """Set fields of the selected hart, by offset; nothing else follows from it."""
        self.uc.context_update(self._context)
        for offset, value in values.items():
            self._words[offset // 8] = value
        self.uc.context_restore(self._context)

    def _edit_image(self, hart: int, offset: int, value: int) -> None:
        image = bytearray(self._images[hart])
        image[offset : offset + 8] = value.to_bytes(8, "little")
        self._images[hart] = bytes(image)
        if hart == self.current:
            self.store({offset: value})

    # -- registers of any hart

    def get(self, hart: int, name: str) -> int:
        if name == "fflags":
            return self._read_fflags() if hart == self.current else self._fflags[hart]
        offset = layout.OFFSETS[name]
        if hart != self.current:
            return _word_at(self._images[hart], offset)
        return self.load(offset)

    def set(self, hart: int, name: str, value: int) -> None:
        if name == "x0":
            return
        if name == "fflags":
            if hart == self.current:
                self._write_fflags(value)
            else:
                self._fflags[hart] = value
        elif hart == self.current:
            self.store({layout.OFFSETS[name]: value})
        else:
            self._edit_image(hart, layout.OFFSETS[name], value)

    def _with_privilege(self, action: Callable[[], int]) -> int:
        """CSRs are checked against the hart's privilege, and FP ones against mstatus.FS."""
        kept = self.environment()
        offset = layout.OFFSETS
        self.store({offset["priv"]: PRV_M, offset["mstatus"]: 3 << 13})
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
        env = self.environment() if hart == self.current else self._images[hart]
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
        if hart == self.current:
            self.store(values)
        else:
            for offset, value in values.items():
                self._edit_image(hart, offset, value)
        self.owe_tlb_flush(hart)

    # -- the selected hart

    def select(self, hart: int) -> None:
        if not 0 <= hart < len(self._images):
            raise IndexError(f"no hart {hart}; there are {len(self._images)}")
        if hart == self.current:
            return
        self._fflags[self.current] = self._read_fflags()
        self.store({layout.OFFSETS["load_res"]: _NONE})  # other harts may store meanwhile
        out = self._images[self.current] = self.environment()
        into = self._images[hart]
        self._env[:] = into
        self.uc.context_restore(self._context)
        self.current = hart
        self._write_fflags(self._fflags[hart])
        satp, mstatus = layout.OFFSETS["satp"], layout.OFFSETS["mstatus"]
        if (
            self._owed[hart]
            or _word_at(out, satp) != _word_at(into, satp)
            or (_word_at(out, mstatus) ^ _word_at(into, mstatus)) & MSTATUS_MEMORY
            or out[layout.PMP :] != into[layout.PMP :]
        ):
            self._flush_tlb()
        self._owed[hart] = False
        self.rearm()

    def rearm(self) -> None:
        """Only a write of mip sets or clears the engine's interrupt request."""

        def write() -> int:
            mip = self.load(layout.OFFSETS["mip"])
            self.uc.reg_write(unicorn.riscv_const.UC_RISCV_REG_MIP, mip)
            return mip

        self._with_privilege(write)

    def loaded(self, hart: int) -> None:
        self.owe_tlb_flush(hart)
        if hart == self.current:
            self.rearm()

    def owe_tlb_flush(self, hart: int) -> None:
        if hart == self.current:
            self._flush_tlb()
        else:
            self._owed[hart] = True

    def _flush_tlb(self) -> None:
        const = unicorn.unicorn_const
        self.uc.ctl(const.UC_CTL_TLB_FLUSH, const.UC_CTL_IO_WRITE)  # the binding has no name for it

    def close(self) -> None:
        self.uc = None

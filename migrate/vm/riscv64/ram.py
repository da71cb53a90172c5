"""Where the engine puts guest memory in its own numbering (layer 2).

Its function that forgets translated code takes these offsets, not guest-physical addresses.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from migrate.vm.riscv64.engine import PAGE

_BLOCK_ALIGN: Final = 64 * PAGE
_RAM_ADDR_MAX: Final = (1 << 64) - 1


def library() -> Any:
    """The libunicorn that the binding loaded."""
    return importlib.import_module("unicorn.unicorn_py3.unicorn").uclib


class RamOffsets:
    """Where the engine puts mapped memory in its own numbering, which `written` needs.

    Follows find_ram_offset() of the engine's exec.c: the smallest gap that fits, after an existing
    block, aligned to 64 pages.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, int]] = {}  # gpa -> size, offset

    def map(self, gpa: int, size: int) -> None:
        if not self.blocks:
            self.blocks[gpa] = (size, 0)
            return
        best, best_gap = 0, _RAM_ADDR_MAX
        for block_size, offset in self.blocks.values():
            candidate = -(-(offset + block_size) // _BLOCK_ALIGN) * _BLOCK_ALIGN
            following = [o for _, o in self.blocks.values() if o >= candidate]
            gap = min(following, default=_RAM_ADDR_MAX) - candidate
            if size <= gap < best_gap:
                best, best_gap = candidate, gap
        self.blocks[gpa] = (size, best)

    def unmap(self, gpa: int) -> None:
        self.blocks.pop(gpa, None)

    def ranges(self, gpa: int, size: int) -> list[tuple[int, int]]:
        """The engine's [start, end) of the mapped parts of [gpa, gpa + size)."""
        found = []
        for base, (length, offset) in self.blocks.items():
            start, end = max(gpa, base), min(gpa + size, base + length)
            if start < end:
                found.append((start - base + offset, end - base + offset))
        return found

"""Dirt by comparing the slot with a shadow copy (layer 3): any kernel, any OS; exact contents.

Costs as much memory as the slot has (pages that were never touched get touched by reading them)
and a pass over both at each harvest. A store of the value that was there already is no change.

Readers copy pages from the shadow, not from the slot. A page that goes A, B, A between two
harvests never differs from the shadow; a reader of the slot may have seen B, one of the shadow has
not. And whenever the shadow changes, the page is reported.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar, Final

import numpy as np

from migrate import pages
from migrate.dirtylog_backends.base import Backend
from migrate.errors import HostError
from migrate.pages import Bitmap
from migrate.units import KIB, PAGE_SIZE, format_size
from migrate.vm.memory import MemorySlot

CHUNK_BYTES: Final = 256 * KIB
_CHUNK_PAGES: Final = CHUNK_BYTES // PAGE_SIZE
_PAGE_WORDS: Final = PAGE_SIZE // 8

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


class CompareBackend(Backend):
    """The fallback."""

    name: ClassVar[str] = "compare"

    def __init__(self, slot: MemorySlot) -> None:
        """Raises HostError if there is no memory for the shadow."""
        self.n_pages = slot.n_pages
        try:
            self.memory = slot.array.copy()
        except MemoryError as error:
            raise HostError(
                f"slot {slot.name!r}: no {format_size(slot.size_bytes)} for the copy that the "
                "dirty-log back end 'compare' needs"
            ) from error
        self._live = slot.words.reshape(-1, _PAGE_WORDS)
        self._shadow = self.memory.view(np.uint64).reshape(-1, _PAGE_WORDS)
        self._live_address = int(slot.hva)
        self._shadow_address = self.memory.ctypes.data
        self._differs = np.empty((_CHUNK_PAGES, _PAGE_WORDS), dtype=np.bool_)

    def _changed(self, first: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        """The pages of [first, end), a chunk at most, that differ; None for no page."""
        at = first * PAGE_SIZE
        size = (end - first) * PAGE_SIZE
        if _memcmp(self._live_address + at, self._shadow_address + at, size) == 0:
            return None
        differs = self._differs[: end - first]
        np.not_equal(self._live[first:end], self._shadow[first:end], out=differs)
        rows = np.bitwise_or.reduce(differs.view(np.uint64), axis=1)
        return np.flatnonzero(rows) + first

    def collect(self, into: Bitmap) -> None:
        for first in range(0, self.n_pages, _CHUNK_PAGES):
            changed = self._changed(first, min(first + _CHUNK_PAGES, self.n_pages))
            if changed is not None:
                # A store that lands from here on is in the copy, or differs from it next time.
                self._shadow[changed] = self._live[changed]
                into |= pages.from_indices(changed, self.n_pages)

    def peek(self, first: int, end: int) -> Bitmap:
        flags = np.zeros(end - first, dtype=np.bool_)
        for at in range(first, end, _CHUNK_PAGES):
            changed = self._changed(at, min(at + _CHUNK_PAGES, end))
            if changed is not None:
                flags[changed - first] = True
        return pages.from_bools(flags)

    def close(self) -> None:
        # What leases refer to stays until they are gone; the slot's mapping goes, and with no page
        # left nothing looks there any more.
        self._live = self._live[:0].copy()
        self.n_pages = 0

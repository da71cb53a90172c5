"""What one side of a migration knows about the pages of all slots (layer 3).

A hash for each page of what was last sent, or has last arrived, and digests of regions of them: so
the two sides compare all of the memory by a few bytes. Which pages to hash is the sender's and the
receiver's business.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from migrate import pages
from migrate.codec import PageHasher, RegionDigests
from migrate.pages import Ranges
from migrate.vm.memory import MemorySlot


class PageHashes:
    """`tables`: one hash a page, slot by slot; untouched pages have that of zeros, which is 0."""

    def __init__(self, hasher: PageHasher, slots: tuple[MemorySlot, ...]) -> None:
        self._hasher = hasher
        self._slots = slots
        self.tables = [hasher.table(slot.n_pages) for slot in slots]
        self._digests = [RegionDigests(hasher, table) for table in self.tables]

    def scan(
        self, slot_number: int, memory: npt.NDArray[np.uint8], ranges: Ranges
    ) -> npt.NDArray[np.bool_]:
        """Hash the pages of `ranges` as `memory` holds them; which of them are zero, in order."""
        self._digests[slot_number].changed(ranges)
        return self._hasher.scan(memory, ranges, self.tables[slot_number])

    def changed(self, slot_number: int, ranges: Ranges) -> None:
        """The table was written at the pages of `ranges`."""
        self._digests[slot_number].changed(ranges)

    def digests(self) -> list[npt.NDArray[np.uint64]]:
        """One array a slot, one digest a region, as the tables are now.

        Cheap where little has changed since the last call.
        """
        return [digests.update() for digests in self._digests]

    def rehash(self) -> None:
        """Hash every page of the memory anew, whatever was sent or arrived: for --verify, with the
        guest standing still.
        """
        for slot, table in zip(self._slots, self.tables, strict=True):
            table[:] = 0
            touched = pages.full(slot.n_pages) & ~slot.never_touched()
            self._hasher.scan(slot.array, pages.to_ranges(touched, slot.n_pages), table)
        self._digests = [RegionDigests(self._hasher, table) for table in self.tables]

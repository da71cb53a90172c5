"""The destination's half of the main path: the link into guest memory (layer 4).

socket → guest memory (raw pages arrive in place, without a copy) → hash. What steers is in
`destination.py`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from migrate import wire
from migrate.channel import Channel, Frame
from migrate.codec import (
    REGION_PAGES,
    Decompressor,
    PageHasher,
    indices,
    split_ranges,
)
from migrate.errors import PeerError
from migrate.page_hashes import PageHashes
from migrate.pages import Ranges
from migrate.units import PAGE_SIZE
from migrate.vm.definition import BackingKind
from migrate.vm.memory import MemorySlot
from migrate.wire import Encoding, FrameType

ZERO_STEP_PAGES: Final = 1 << 16
"""Pages whose numbers are spelled out at a time."""


class PageReceiver:
    """Puts PAGES and ZERO frames where they belong; keeps the hash tables."""

    def __init__(self, channel: Channel, hasher: PageHasher, slots: tuple[MemorySlot, ...]) -> None:
        self._channel = channel
        self._slots = slots
        self._slot_pages = tuple(slot.n_pages for slot in slots)
        self.hashes = PageHashes(hasher, slots)
        # Pages that may hold something else than zeros. Memory of our own starts as zeros, and a
        # page that stays zero is never touched; a file holds whatever it held before. (np.zeros
        # takes no memory before it is written to: a machine's claimed size costs nothing yet.)
        self._written = [
            (np.zeros if slot.spec.backing is BackingKind.ANONYMOUS else np.ones)(
                slot.n_pages, dtype=np.bool_
            )
            for slot in slots
        ]
        self._decompressor = Decompressor()
        self._packed = bytearray(wire.BATCH_PAGES * PAGE_SIZE)

    def take_untrusted(self, frame: Frame) -> None:
        """One PAGES or ZERO frame with its bulk. Raises PeerError, LinkLost."""
        try:
            meta = wire.decode_pages_meta_untrusted(
                frame.header, bytes(frame.meta), self._slot_pages
            )
            slot = self._slots[meta.slot]
            if frame.type is FrameType.ZERO:
                self._zero(slot, meta)
            elif meta.encoding is Encoding.RAW:
                view = slot.view
                # All in one call: smaller steps cost more in the kernel than warm caches save.
                self._channel.link.receive_into(
                    [view[a * PAGE_SIZE : b * PAGE_SIZE] for a, b in meta.ranges.tolist()]
                )
                self._arrived(slot, meta.slot, meta.ranges)
            else:
                packed = memoryview(self._packed)[: frame.bulk_bytes]
                self._channel.link.receive_into([packed])
                data = self._decompressor.decompress_untrusted(packed, meta.n_pages)
                rows = slot.array.reshape(-1, PAGE_SIZE)
                rows[indices(meta.ranges)] = data.reshape(-1, PAGE_SIZE)
                self._arrived(slot, meta.slot, meta.ranges)
        except PeerError as error:
            raise self._channel.breach(error.reason) from None

    def _arrived(self, slot: MemorySlot, number: int, ranges: Ranges) -> None:
        self.hashes.scan(number, slot.array, ranges)
        self._written[number][indices(ranges)] = True

    def _zero(self, slot: MemorySlot, meta: wire.PagesMeta) -> None:
        """Writes only where something else may be: a page that stays zero is not touched."""
        written, table = self._written[meta.slot], self.hashes.tables[meta.slot]
        self.hashes.changed(meta.slot, meta.ranges)
        rows = slot.array.reshape(-1, PAGE_SIZE)
        for piece in split_ranges(meta.ranges, ZERO_STEP_PAGES):
            index = indices(piece)
            index = index[written[index]]
            table[index] = 0
            rows[index] = 0
            written[index] = False

    def compare_untrusted(self, digests: list[Any]) -> None:
        """Every page is what the source sent last, by its digests. PeerError says which is not."""
        if len(digests) != len(self._slots):
            raise self._channel.breach("there is not one list of digests a slot")
        for slot, ours, theirs in zip(self._slots, self.hashes.digests(), digests, strict=True):
            if not isinstance(theirs, bytes) or len(theirs) != ours.nbytes:
                raise self._channel.breach(f"the digests of slot {slot.name!r} have a wrong length")
            differ = np.flatnonzero(ours != np.frombuffer(theirs, dtype="<u8"))
            if len(differ):
                first = int(differ[0]) * REGION_PAGES
                last = min(first + REGION_PAGES, slot.n_pages) - 1
                more = len(differ) - 1
                raise self._channel.breach(
                    f"memory arrived damaged: slot {slot.name!r}, pages {first} to {last}"
                    + (f" (and {more} more regions of {REGION_PAGES} pages)" if more else "")
                )

    def settle(self) -> None:
        """Between rounds: sum up now what would have to be summed up in the downtime."""
        self.hashes.digests()

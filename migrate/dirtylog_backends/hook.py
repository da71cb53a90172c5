"""Dirt by being told of every store (layer 3): exact on any engine and any OS, slow guests.

An engine's write hook runs *before* the store that it announces. A harvest that falls between
the two would hand out the page with its old contents and never report it again, so the last
announced store stays dirty until it is known to be done: by the next one, or by `settled`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from migrate import pages
from migrate.dirtylog_backends.base import Backend
from migrate.pages import Bitmap
from migrate.units import PAGE_SHIFT, PAGE_SIZE
from migrate.vm.memory import MemorySlot

Subscribe = Callable[["HookBackend"], Callable[[], None]]
"""Connects a back end to a source of stores; what it returns takes the connection away.

The source calls `store` from its write hook and `settled` whenever the guest has stopped.
"""


class HookBackend(Backend):
    """The host's writes come from the slot's listeners, the guest's from what is subscribed to."""

    name: ClassVar[str] = "hook"

    def __init__(self, slot: MemorySlot, subscribe: Subscribe) -> None:
        self.n_pages = slot.n_pages
        self.memory = slot.array
        self._gpa = int(slot.gpa)
        self._end = slot.end
        self._written = bytearray(slot.n_pages)
        self._in_flight = (0, 0)
        # Its own, for a few instructions at a time: the vcpu must not wait for a reader's harvest.
        self._lock = threading.Lock()
        self._listeners = slot.listeners
        self._listeners.append(self.mark_gpa)
        try:
            self._unsubscribe: Callable[[], None] | None = subscribe(self)
        except BaseException:
            self._listeners.remove(self.mark_gpa)
            raise

    def _page_range(self, gpa: int, size: int) -> tuple[int, int]:
        """The part of [gpa, gpa + size) in this slot, as pages [first, end); may be empty."""
        first = max(gpa, self._gpa) - self._gpa
        end = min(gpa + size, self._end) - self._gpa
        if end <= first:
            return 0, 0
        return first >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT

    def mark_gpa(self, gpa: int, size: int) -> None:
        """[gpa, gpa + size) has been written; what lies outside of the slot is ignored."""
        first, end = self._page_range(gpa, size)
        with self._lock:
            self._written[first:end] = b"\1" * (end - first)

    def store(self, gpa: int, size: int) -> None:
        """[gpa, gpa + size) is about to be written by the guest, whose store before is done."""
        first, end = self._page_range(gpa, size)
        with self._lock:
            self._written[first:end] = b"\1" * (end - first)
            self._in_flight = first, end

    def settled(self) -> None:
        """The guest has stopped: no announced store is still to come."""
        with self._lock:
            self._in_flight = 0, 0

    def collect(self, into: Bitmap) -> None:
        fresh = bytearray(self.n_pages)
        with self._lock:
            first, end = self._in_flight
            fresh[first:end] = b"\1" * (end - first)
            written, self._written = self._written, fresh
        into |= pages.from_bools(np.frombuffer(written, dtype=np.bool_))

    def peek(self, first: int, end: int) -> Bitmap:
        with self._lock:
            part = bytes(self._written[first:end])
        return pages.from_bools(np.frombuffer(part, dtype=np.bool_))

    def close(self) -> None:
        if self._unsubscribe is not None:
            unsubscribe, self._unsubscribe = self._unsubscribe, None
            self._listeners.remove(self.mark_gpa)
            unsubscribe()

"""A back end that is told what is dirty, for the tests of everything above the log (layer 3)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from migrate import pages
from migrate.dirtylog_backends.base import Backend
from migrate.errors import HostError
from migrate.pages import Bitmap
from migrate.units import PAGE_SIZE


class FakeBackend(Backend):
    """No kernel, no guest: `write` makes pages dirty, `fail` makes the next harvest fail."""

    name: ClassVar[str] = "fake"

    def __init__(self, n_pages: int, memory: npt.NDArray[np.uint8] | None = None) -> None:
        self.n_pages = n_pages
        self.memory = np.zeros(n_pages * PAGE_SIZE, dtype=np.uint8) if memory is None else memory
        self.fail: str | None = None
        """Say this in a HostError at the next `collect`, after the pages were let go of."""
        self.closed = False
        self._written = pages.empty(n_pages)

    def write(self, first: int, end: int | None = None) -> None:
        """Pages [first, end) were written; without `end` the page `first`."""
        pages.set_range(self._written, first, first + 1 if end is None else end)

    def collect(self, into: Bitmap) -> None:
        written, self._written = self._written, pages.empty(self.n_pages)
        if self.fail is not None:
            message, self.fail = self.fail, None
            raise HostError(message)
        into |= written

    def peek(self, first: int, end: int) -> Bitmap:
        return pages.extract(self._written, first, end)

    def close(self) -> None:
        self.closed = True

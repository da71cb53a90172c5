"""What a source of raw dirt is to the dirty log above it (layer 3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from migrate.pages import Bitmap


class Backend(ABC):
    """Knows which pages of one slot were written since it was last asked.

    The log calls `collect`, `peek` and `close` under its lock, from any thread, while the guest
    runs. What `collect` returns has left the back end: after an error inside it the log takes every
    page for dirty.
    """

    name: ClassVar[str]
    n_pages: int
    memory: npt.NDArray[np.uint8]
    """Where the reader of a lease copies page contents from: read here, never elsewhere."""

    @abstractmethod
    def collect(self, into: Bitmap) -> None:
        """Get and reset: OR the pages written since the last `collect` into `into`.

        A write that lands while this runs is in `memory` when it returns, or is reported by the
        next `collect`, or both. Clean from the start: what came before creation is not reported.
        Raises HostError.
        """

    @abstractmethod
    def peek(self, first: int, end: int) -> Bitmap:
        """The pages of [first, end) that `collect` would report; bit 0 is page `first`."""

    @abstractmethod
    def close(self) -> None:
        """End tracking; the guest runs at full speed again. Idempotent."""

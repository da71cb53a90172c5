"""Memory made ready before it is known what for (layer 2).

On some hosts the first touch of a fresh page is what costs most: up to seconds a GiB. A
destination that was told how much will come touches it all before the stream does, and the
machine's largest anonymous slot is then made of it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Final

import numpy as np

from migrate.errors import HostError, UsageError
from migrate.linux import mman
from migrate.units import MIB, PAGE_SIZE, format_size, pages_of

STEP_BYTES: Final = 32 * MIB
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Whoever is given a slot's descriptor cannot take pages from under the guest (SIGBUS)."""


class MemoryReserve:
    """A populated memfd with its mapping, to become one slot's backing."""

    def __init__(self, size_bytes: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Touches all of it now; `progress` hears (bytes done, in all). Raises HostError."""
        if size_bytes <= 0:
            raise UsageError(f"cannot set {size_bytes} bytes of memory aside")
        self.size_bytes = pages_of(size_bytes) * PAGE_SIZE
        fd = -1
        try:
            fd = os.memfd_create("guest-reserve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, self.size_bytes)
            mapping = mmap.mmap(fd, self.size_bytes)
            hva = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
            for start in range(0, self.size_bytes, STEP_BYTES):
                size = min(STEP_BYTES, self.size_bytes - start)
                mman.madvise(hva + start, size, mman.MADV_POPULATE_WRITE)
                if progress is not None:
                    progress(start + size, self.size_bytes)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise HostError(
                f"{format_size(self.size_bytes)} of memory cannot be set aside: {error.strerror}"
            ) from error
        self._held: tuple[int, mmap.mmap] | None = (fd, mapping)

    def take(self, size_bytes: int) -> tuple[int, mmap.mmap] | None:
        """Descriptor and mapping of at least `size_bytes`, now the caller's; None the second time.

        The file has exactly `size_bytes` then. Where more is wanted than was set aside, the rest
        is fresh.
        """
        if self._held is None:
            return None
        (fd, mapping), self._held = self._held, None
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            if size_bytes > self.size_bytes:
                mapping = mmap.mmap(fd, size_bytes)
        except OSError as error:
            os.close(fd)
            raise HostError(
                f"no anonymous memory of {format_size(size_bytes)}: {error.strerror}"
            ) from error
        return fd, mapping

    def close(self) -> None:
        """Give back what was not taken. Idempotent."""
        if self._held is not None:
            os.close(self._held[0])
            self._held = None

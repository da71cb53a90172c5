"""Dirt from the kernel: userfaultfd write-protection, asynchronous, and PAGEMAP_SCAN (layer 3).

The kernel protects the slot's mapping, lifts the protection from a page at its first write without
asking anybody, and PAGEMAP_SCAN finds and re-protects such pages in one step under the page
table's lock. It sees stores by the guest and the host and writes by the kernel (readv, recv)
through the slot's own mapping; through no other mapping.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final

import numpy as np

from migrate import pages
from migrate.compiled import page_functions
from migrate.dirtylog_backends.base import Backend
from migrate.errors import HostError, UsageError
from migrate.linux import pagemap, uffd
from migrate.pages import Bitmap
from migrate.units import PAGE_SHIFT
from migrate.vm.memory import MemorySlot

FEATURES: Final = (
    uffd.UFFD_FEATURE_WP_ASYNC
    | uffd.UFFD_FEATURE_WP_UNPOPULATED
    | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
)
_GET_AND_RESET: Final = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC

VEC_ENTRIES: Final = 1 << 12
"""Regions a scan can report before it must be called again: what stays in the cache."""


class PagemapBackend(Backend):
    """Linux 6.7 and later."""

    name: ClassVar[str] = "pagemap"

    def __init__(self, slot: MemorySlot, *, vec_entries: int = VEC_ENTRIES) -> None:
        """Raises FeatureMissing where the kernel lacks it, UsageError if the slot has a log."""
        self.n_pages = slot.n_pages
        self.memory = slot.array  # also keeps the mapping from going before the registration
        self._slot_name = slot.name
        self._start = int(slot.hva)
        self._length = slot.size_bytes
        self._vec = np.zeros(min(vec_entries, slot.n_pages // 2 + 1), pagemap.page_region)
        self._fields = self._vec.view(np.int64)
        self._pagemap = pagemap.Pagemap()
        try:
            self._uffd = uffd.Userfaultfd(FEATURES)
        except BaseException:
            self._pagemap.close()
            raise
        self._closed = False
        try:
            self._uffd.register(self._start, self._length, uffd.UFFDIO_REGISTER_MODE_WP)
            # Nothing is armed yet: the scan that every new cursor begins with, to discard what was
            # written before, protects all pages in one go, also those that nobody touched. This
            # one only asks whether it will work.
            self._scan(0, 1, flags=pagemap.PM_SCAN_CHECK_WPASYNC)
        except OSError as error:
            self.close()
            if error.errno == errno.EBUSY:
                raise UsageError(
                    f"slot {slot.name!r} has a dirty log already (or a page-fault handler): "
                    "take another cursor of that one"
                ) from error
            raise uffd.FeatureMissing(
                f"slot {slot.name!r} ({slot.spec.backing.value}) cannot be write-protected by "
                f"userfaultfd: {error.strerror}"
            ) from error
        except BaseException:
            self.close()
            raise

    def _scan(self, first: int, end: int, *, flags: int) -> tuple[int, int]:
        """(regions in `_vec`, the page where the walk ended)."""
        start = self._start
        try:
            found, walk_end = self._pagemap.scan(
                start + (first << PAGE_SHIFT), start + (end << PAGE_SHIFT), self._vec, flags=flags
            )
        except OSError as error:
            raise HostError(
                f"slot {self._slot_name!r}: the kernel's page scan failed: {error.strerror}"
            ) from error
        reached = (walk_end - start) >> PAGE_SHIFT
        if reached <= first:
            raise HostError(f"slot {self._slot_name!r}: the kernel's page scan does not advance")
        return found, reached

    def _or_into(self, bitmap: Bitmap, found: int, base: int) -> None:
        """Set the `found` regions of `_vec` in `bitmap`, whose bit 0 is page `base`."""
        if found and page_functions is not None:
            page_functions.or_regions(self._vec, found, self._start + (base << PAGE_SHIFT), bitmap)
        elif found:
            # All three fields of a region at once: numpy is slow over rows of two.
            fields = self._fields[: 3 * found] - (self._start + (base << PAGE_SHIFT))
            fields >>= PAGE_SHIFT
            pages.or_ascending(bitmap, fields.reshape(-1, 3)[:, :2])

    def collect(self, into: Bitmap) -> None:
        self._check_open()
        first = 0
        while first < self.n_pages:
            found, reached = self._scan(first, self.n_pages, flags=_GET_AND_RESET)
            self._or_into(into, found, 0)
            first = reached  # short of the end where _vec was full: the rest is as it was

    def peek(self, first: int, end: int) -> Bitmap:
        self._check_open()
        bitmap = pages.empty(end - first)
        at = first
        while at < end:
            found, reached = self._scan(at, end, flags=pagemap.PM_SCAN_CHECK_WPASYNC)
            self._or_into(bitmap, found, first)
            at = reached
        return bitmap

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"the dirty log of slot {self._slot_name!r} is closed")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._uffd.unregister(self._start, self._length)
        except OSError:
            pass  # never registered; closing the descriptor ends what there is
        finally:
            self._uffd.close()
            self._pagemap.close()

"""PAGEMAP_SCAN by the names of include/uapi/linux/fs.h (layer 1).

One ioctl on /proc/PID/pagemap finds pages by category and, atomically with finding them,
write-protects them. The kernel's document is Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from migrate.linux.uffd import FeatureMissing, ioc

PAGE_IS_WPALLOWED: Final = 1 << 0
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6

PM_SCAN_WP_MATCHING: Final = 1 << 0
PM_SCAN_CHECK_WPASYNC: Final = 1 << 1

page_region: Final = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])


class pm_scan_arg(ctypes.Structure):  # noqa: N801 - the kernel's name
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )
    )  # fmt: skip


assert page_region.itemsize == 24
assert ctypes.sizeof(pm_scan_arg) == 96

PAGEMAP_SCAN: Final = ioc(3, ord("f"), 16, 96)


class Pagemap:
    """An open /proc/PID/pagemap.

    One scan at a time: the argument structure is the object's own, so that a scan allocates
    nothing.
    """

    def __init__(self, pid: int | None = None) -> None:
        """Raises FeatureMissing where there is no PAGEMAP_SCAN, or the process is not ours."""
        path = f"/proc/{'self' if pid is None else pid}/pagemap"
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FeatureMissing(f"{path} cannot be opened: {error.strerror}") from error
        self._arg = pm_scan_arg(size=96)
        try:
            self.scan(0, 0, None)
        except OSError as error:
            self.close()
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                reason = "the kernel has no PAGEMAP_SCAN (Linux 6.7 brought it)"
                raise FeatureMissing(reason) from error
            raise FeatureMissing(f"PAGEMAP_SCAN is refused: {error.strerror}") from error

    def scan(
        self,
        start: int,
        end: int,
        vec: npt.NDArray[np.void] | None,
        *,
        flags: int = 0,
        mask: int = PAGE_IS_WRITTEN,
    ) -> tuple[int, int]:
        """Regions of pages in all categories of `mask`: how many are in `vec`, and where the walk
        ended.

        `vec` is an array of `page_region`; when it is full the walk ends before `end`, and what
        lies beyond is neither reported nor protected. Without `vec` the pages are protected and
        not reported. Releases the GIL. Raises OSError (EPERM with PM_SCAN_CHECK_WPASYNC: the
        range is not registered).

        With `mask` exactly PAGE_IS_WRITTEN the kernel takes a path of its own, which also counts
        a page as written whose entry is gone (reclaimed after a write): the one to log with.
        """
        arg = self._arg
        arg.flags = flags
        arg.start = start
        arg.end = end
        arg.walk_end = 0
        if vec is None:
            arg.vec = arg.vec_len = arg.return_mask = 0
        else:
            arg.vec = vec.ctypes.data
            arg.vec_len = len(vec)
            arg.return_mask = mask
        arg.category_mask = mask
        found = fcntl.ioctl(self.fd, PAGEMAP_SCAN, arg)
        return found, int(arg.walk_end)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

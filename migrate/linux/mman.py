"""Memory calls that Python's mmap module lacks or makes with the GIL held (layer 1).

Names and values from include/uapi/asm-generic/mman-common.h. Every call releases the GIL. This
module knows no guest memory: addresses and sizes in, errno out.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

import numpy as np
import numpy.typing as npt

MADV_DONTNEED: Final = 4
MADV_REMOVE: Final = 9
MADV_DONTFORK: Final = 10
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23

_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_mincore.restype = ctypes.c_int


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2). Raises OSError."""
    if _madvise(address, length, advice) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def mincore(address: int, length: int) -> npt.NDArray[np.bool_]:
    """mincore(2): one bool a page, true where the page is in memory. Raises OSError.

    For a file mapping: in the page cache, whoever put it there.
    """
    resident = np.empty((length + mmap.PAGESIZE - 1) // mmap.PAGESIZE, dtype=np.uint8)
    if _mincore(address, length, resident.ctypes.data) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return (resident & 1).view(np.bool_)

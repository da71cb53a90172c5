"""userfaultfd(2) by the names of include/uapi/linux/userfaultfd.h (layer 1).

What the dirty log needs: a descriptor with chosen features, registration of a range,
write-protection of a range. Features are probed by asking for them; versions are never compared.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
from typing import Final

from migrate.errors import HostError

UFFD_API: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1

UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15

UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2

UFFDIO_WRITEPROTECT_MODE_WP: Final = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1

_SYS_USERFAULTFD: Final = {
    "x86_64": 323, "aarch64": 282, "riscv64": 282, "loongarch64": 282, "ppc64le": 364,
    "s390x": 355,
}  # fmt: skip


class FeatureMissing(HostError):
    """The kernel cannot do it, or does not let this process do it."""


class uffdio_api(ctypes.Structure):  # noqa: N801 - the kernel's name
    _fields_ = (
        ("api", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class uffdio_range(ctypes.Structure):  # noqa: N801
    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class uffdio_register(ctypes.Structure):  # noqa: N801
    _fields_ = (
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class uffdio_writeprotect(ctypes.Structure):  # noqa: N801
    _fields_ = (("range", uffdio_range), ("mode", ctypes.c_uint64))


assert ctypes.sizeof(uffdio_api) == 24
assert ctypes.sizeof(uffdio_range) == 16
assert ctypes.sizeof(uffdio_register) == 32
assert ctypes.sizeof(uffdio_writeprotect) == 24

_IOC_WRITE: Final = 1
_IOC_READ: Final = 2


def ioc(direction: int, kind: int, number: int, size: int) -> int:
    """_IOC() of include/uapi/asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | kind << 8 | number


UFFDIO_API: Final = ioc(_IOC_READ | _IOC_WRITE, 0xAA, 0x3F, 24)
UFFDIO_REGISTER: Final = ioc(_IOC_READ | _IOC_WRITE, 0xAA, 0x00, 32)
UFFDIO_UNREGISTER: Final = ioc(_IOC_READ, 0xAA, 0x01, 16)
UFFDIO_WRITEPROTECT: Final = ioc(_IOC_READ | _IOC_WRITE, 0xAA, 0x06, 24)


def userfaultfd(flags: int) -> int:
    """The system call; a descriptor. Raises OSError (ENOSYS where the number is not known)."""
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"userfaultfd's number on {platform.machine()} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(fd)


class Userfaultfd:
    """An open userfaultfd. Closing it ends all its registrations."""

    def __init__(self, features: int) -> None:
        """Raises FeatureMissing where the call or one of `features` is not to be had.

        User mode only is tried first: every process may open such a descriptor, and no more is
        needed where faults are resolved by the kernel itself (UFFD_FEATURE_WP_ASYNC).
        """
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self.fd = userfaultfd(flags | UFFD_USER_MODE_ONLY)
        except OSError:
            try:
                self.fd = userfaultfd(flags)
            except OSError as error:
                raise FeatureMissing(f"userfaultfd is not available: {error.strerror}") from error
        api = uffdio_api(api=UFFD_API, features=features)
        try:
            fcntl.ioctl(self.fd, UFFDIO_API, api)
        except OSError as error:
            self.close()
            raise FeatureMissing(
                f"userfaultfd lacks one of the features {features:#x}: {error.strerror}"
            ) from error

    def register(self, start: int, length: int, mode: int) -> None:
        """UFFDIO_REGISTER. Raises OSError (EBUSY: another descriptor has the range)."""
        fcntl.ioctl(self.fd, UFFDIO_REGISTER, uffdio_register(uffdio_range(start, length), mode))

    def unregister(self, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER: also lifts write-protection. Raises OSError."""
        fcntl.ioctl(self.fd, UFFDIO_UNREGISTER, uffdio_range(start, length))

    def writeprotect(self, start: int, length: int, *, protect: bool) -> None:
        """UFFDIO_WRITEPROTECT. Raises OSError."""
        mode = UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        argument = uffdio_writeprotect(uffdio_range(start, length), mode)
        fcntl.ioctl(self.fd, UFFDIO_WRITEPROTECT, argument)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

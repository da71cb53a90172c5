"""The kernel interfaces themselves: what the dirty log takes for granted about them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from migrate.errors import HostError
from migrate.linux import mman, pagemap, uffd
from migrate.units import PAGE_SIZE

N_PAGES = 2048
LENGTH = N_PAGES * PAGE_SIZE
LOG_FEATURES = (
    uffd.UFFD_FEATURE_WP_ASYNC
    | uffd.UFFD_FEATURE_WP_UNPOPULATED
    | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
)
GET_AND_RESET = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC


def test_numbers_of_the_uapi_headers() -> None:
    """As the C headers give them on every architecture with the generic ioctl encoding."""
    assert uffd.UFFDIO_API == 0xC018AA3F
    assert uffd.UFFDIO_REGISTER == 0xC020AA00
    assert uffd.UFFDIO_UNREGISTER == 0x8010AA01
    assert uffd.UFFDIO_WRITEPROTECT == 0xC018AA06
    assert pagemap.PAGEMAP_SCAN == 0xC0606610
    assert pagemap.pm_scan_arg.walk_end.offset == 32
    assert pagemap.pm_scan_arg.return_mask.offset == 88
    assert uffd.uffdio_register.mode.offset == 16


def open_fds() -> int:
    gc.collect()  # what earlier tests' tracebacks held
    return len(list(Path("/proc/self/fd").iterdir()))


class Tracked:
    """A mapping, registered and armed."""

    def __init__(self, fd: int, flags: int) -> None:
        self.mapping = mmap.mmap(fd, LENGTH, flags=flags)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.mapping, dtype=np.uint8)
        self.start = self.array.ctypes.data
        self.pagemap = pagemap.Pagemap()
        self.uffd = uffd.Userfaultfd(LOG_FEATURES)
        self.uffd.register(self.start, LENGTH, uffd.UFFDIO_REGISTER_MODE_WP)
        self.uffd.writeprotect(self.start, LENGTH, protect=True)

    def scan(self, flags: int = GET_AND_RESET, entries: int = N_PAGES) -> list[tuple[int, int]]:
        """Regions in pages, all of them, however small the vector."""
        vec = np.zeros(entries, dtype=pagemap.page_region)
        at, end = self.start, self.start + LENGTH
        rows: list[tuple[int, int]] = []
        while at < end:
            found, walk_end = self.pagemap.scan(at, end, vec, flags=flags)
            assert walk_end > at
            assert walk_end == end or found == entries
            for region in vec[:found]:
                assert region["categories"] == pagemap.PAGE_IS_WRITTEN
                first, after = int(region["start"]) - self.start, int(region["end"]) - self.start
                rows.append((first // PAGE_SIZE, after // PAGE_SIZE))
            at = walk_end
        return rows

    def close(self) -> None:
        self.uffd.close()
        self.pagemap.close()


@pytest.fixture(params=["memfd shared", "file shared", "file private"])
def tracked(
    request: pytest.FixtureRequest, tmp_path: Path, kernel_tracking: None
) -> Iterator[Tracked]:
    backing, _, how = request.param.partition(" ")
    if backing == "memfd":
        fd = os.memfd_create("test", os.MFD_CLOEXEC)
    else:
        fd = os.open(tmp_path / "backing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, LENGTH)
    made = Tracked(fd, mmap.MAP_SHARED if how == "shared" else mmap.MAP_PRIVATE)
    os.close(fd)
    yield made
    made.close()


def test_get_and_reset(tracked: Tracked) -> None:
    """Armed it is clean, also where nothing was ever touched; reads leave it so."""
    assert tracked.scan() == []
    tracked.array[5 * PAGE_SIZE] = 1
    tracked.array[1000 * PAGE_SIZE : 1002 * PAGE_SIZE] = 1
    assert int(tracked.array[700 * PAGE_SIZE]) == 0
    wanted = [(5, 6), (1000, 1002)]
    assert tracked.scan(pagemap.PM_SCAN_CHECK_WPASYNC) == wanted  # a look resets nothing
    assert tracked.scan() == wanted
    assert tracked.scan() == []
    tracked.array[5 * PAGE_SIZE] = 2
    assert tracked.scan() == [(5, 6)]


def test_a_full_vector_ends_the_walk_and_loses_nothing(tracked: Tracked) -> None:
    tracked.array[:: 2 * PAGE_SIZE] = 1
    every_second = [(page, page + 1) for page in range(0, N_PAGES, 2)]
    assert tracked.scan(entries=7) == every_second
    assert tracked.scan(entries=7) == []


def test_writes_by_the_kernel_are_seen(tracked: Tracked) -> None:
    with Path("/dev/urandom").open("rb", buffering=0) as source:
        view = memoryview(tracked.mapping)[9 * PAGE_SIZE : 10 * PAGE_SIZE]
        assert os.readv(source.fileno(), [view]) == PAGE_SIZE
        view.release()
    assert tracked.scan() == [(9, 10)]


def test_an_unregistered_range_is_refused_not_reported(tracked: Tracked) -> None:
    tracked.uffd.unregister(tracked.start, LENGTH)
    with pytest.raises(PermissionError):
        tracked.scan()
    tracked.array[0] = 1  # and is writable


def test_one_descriptor_a_range(tracked: Tracked) -> None:
    other = uffd.Userfaultfd(LOG_FEATURES)
    with pytest.raises(OSError) as caught:
        other.register(tracked.start, LENGTH, uffd.UFFDIO_REGISTER_MODE_WP)
    assert caught.value.errno == errno.EBUSY
    other.close()


def test_descriptors_are_not_inherited_and_close_twice(kernel_tracking: None) -> None:
    for made in (uffd.Userfaultfd(0), pagemap.Pagemap()):
        assert fcntl.fcntl(made.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        made.close()
        made.close()


def test_a_feature_that_no_kernel_has_is_said_to_be_missing() -> None:
    before = open_fds()
    with pytest.raises(uffd.FeatureMissing, match="userfaultfd"):
        uffd.Userfaultfd(1 << 62)
    assert open_fds() == before


def test_no_such_process() -> None:
    with pytest.raises(uffd.FeatureMissing, match="cannot be opened"):
        pagemap.Pagemap(pid=2**22 + 1)


def test_feature_missing_is_an_error_of_the_host() -> None:
    assert issubclass(uffd.FeatureMissing, HostError)


def test_mincore_and_madvise() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, LENGTH)
    mapping = mmap.mmap(fd, LENGTH)
    os.close(fd)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    mapping[7 * PAGE_SIZE] = 1
    assert np.flatnonzero(mman.mincore(start, LENGTH)).tolist() == [7]
    with pytest.raises(OSError) as caught:
        mman.madvise(start + 1, PAGE_SIZE, mman.MADV_DONTNEED)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError):
        mman.mincore(start + 1, PAGE_SIZE)

"""Memory slots: ranges of guest-physical memory with their backing (layer 2).

A slot is one mapping in this process, and every write that the host does goes through that
mapping: a write through another mapping of the same file, or by pwrite, escapes the dirty log.
Who writes behind the guest's back (device DMA, loaders) does it with `GuestMemory.write`, or tells
`GuestMemory.wrote` afterwards, so that translated code and hook-fed logs hear of it.

Slots come and go while the machine is stopped; nothing here checks that. What is dirty is the
business of `dirtylog`, not of this module.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from migrate import pages
from migrate.errors import HostError, UsageError
from migrate.linux import mman
from migrate.units import MIB, PAGE_SIZE, Gpa, Hva, format_size, pages_of
from migrate.vm.definition import MAX_SLOT_BYTES, MAX_SLOTS, BackingKind, SlotSpec
from migrate.vm.reserve import SEALS, MemoryReserve

WriteListener = Callable[[int, int], None]
"""Called with (gpa, size) after the host wrote there."""

PREALLOC_STEP_BYTES: Final = 32 * MIB


class MemorySlot:
    """[gpa, gpa + size_bytes) of guest memory and the host memory behind it.

    `view`, `array` (uint8) and `words` (uint64) are the whole slot, writable, without a copy. They
    may outlive `close`: the mapping goes away with the last of them.
    """

    def __init__(
        self, spec: SlotSpec, index: int = 0, reserve: MemoryReserve | None = None
    ) -> None:
        """Raises UsageError for a spec that makes no sense, HostError where the host refuses.

        An anonymous slot is made of `reserve`, if that has not been used yet.
        """
        check_spec(spec)
        if mmap.PAGESIZE != PAGE_SIZE:
            raise HostError(
                f"this host has pages of {mmap.PAGESIZE} bytes; guests need {PAGE_SIZE}"
            )
        self.spec = spec
        self.index = index
        self.gpa = Gpa(spec.gpa)
        self.size_bytes = spec.size_bytes
        self.n_pages = pages_of(spec.size_bytes)
        self.listeners: list[WriteListener] = []
        """The owning GuestMemory's list: who hears of the host's writes."""
        private = spec.backing is BackingKind.PRIVATE_FILE
        ready = None
        if reserve is not None and spec.backing is BackingKind.ANONYMOUS:
            ready = reserve.take(spec.size_bytes)
        fd, mapping = ready if ready is not None else _open_and_map(spec, private)
        self.fd: int | None = fd
        if private:  # nobody can reach the guest's copies through it
            os.close(fd)
            self.fd = None
        self.view: memoryview = memoryview(mapping)[: spec.size_bytes]
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.view, dtype=np.uint8)
        self.words: npt.NDArray[np.uint64] = self.array.view(np.uint64)
        self.hva = Hva(self.array.ctypes.data)
        self.closed = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def end(self) -> int:
        """The first address past the slot."""
        return self.gpa + self.size_bytes

    def __repr__(self) -> str:
        return f"<MemorySlot {self.name!r} {self.gpa:#x}+{self.size_bytes:#x}>"

    def never_touched(self) -> pages.Bitmap:
        """Pages that hold zeros because nothing ever wrote them, found without reading them.

        Exact for an anonymous slot (a page that was only read may count as touched). For a file,
        holes that are not in the page cache; where the file system knows no holes, none. For a
        private mapping always none.
        """
        if self.fd is None:
            return pages.empty(self.n_pages)
        try:
            holes = _holes(self.fd, self.size_bytes)
            bitmap = pages.from_ranges(holes, self.n_pages)
            if len(holes) and self.spec.backing is BackingKind.FILE:
                # Some file systems learn of pages written through a mapping at writeback only;
                # until then the page cache is the witness.
                bitmap &= ~pages.from_bools(mman.mincore(self.hva, self.size_bytes))
        except OSError as error:
            raise HostError(
                f"slot {self.name!r}: its untouched pages cannot be found: {error.strerror}"
            ) from error
        return bitmap

    def prealloc(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Touch every page now, contents unchanged. `progress` hears (bytes done, bytes in all).

        Raises HostError where memory or space on disk runs out. An armed dirty log sees all of it
        as written. Where the kernel has no MADV_POPULATE_WRITE (Linux 5.14 brought it) pages are
        touched by rewriting a byte of each, which is no good beside a running guest.
        """
        populate = True
        for start in range(0, self.size_bytes, PREALLOC_STEP_BYTES):
            size = min(PREALLOC_STEP_BYTES, self.size_bytes - start)
            if populate:
                try:
                    mman.madvise(self.hva + start, size, mman.MADV_POPULATE_WRITE)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise HostError(
                            f"slot {self.name!r}: {format_size(self.size_bytes)} cannot be "
                            f"populated, {format_size(start)} of it went well: {error.strerror}; "
                            "is there memory (or space behind the file) enough?"
                        ) from error
                    populate = False
            if not populate:
                self.array[start : start + size : PAGE_SIZE] |= 0
            if progress is not None:
                progress(start + size, self.size_bytes)

    def flush(self) -> None:
        """Write a file slot's pages to its file now (fsync); nothing to do for the others."""
        if self.spec.backing is BackingKind.FILE and self.fd is not None:
            try:
                os.fsync(self.fd)
            except OSError as error:
                raise HostError(
                    f"slot {self.name!r}: {self.spec.path}: {error.strerror}"
                ) from error

    def close(self) -> None:
        """Let go of the memory. Idempotent. No core may have the slot mapped any more."""
        if self.closed:
            return
        self.closed = True
        self.view = memoryview(b"")
        self.array = np.empty(0, dtype=np.uint8)
        self.words = np.empty(0, dtype=np.uint64)
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def check_spec(spec: SlotSpec) -> None:
    """Raises UsageError for a slot that no host could provide."""
    slot = f"slot {spec.name!r}"
    if not 0 < spec.size_bytes <= MAX_SLOT_BYTES:
        raise UsageError(
            f"{slot}: a size of {spec.size_bytes} bytes is out of range; "
            f"one page to {format_size(MAX_SLOT_BYTES)} are possible"
        )
    for what, value in (("address", spec.gpa), ("size", spec.size_bytes)):
        if value % PAGE_SIZE:
            raise UsageError(f"{slot}: its {what} {value:#x} is not a multiple of {PAGE_SIZE:#x}")
    if spec.gpa < 0 or spec.gpa + spec.size_bytes > 1 << 56:
        raise UsageError(f"{slot}: address {spec.gpa:#x} lies outside of guest-physical memory")
    if (spec.path is None) != (spec.backing is BackingKind.ANONYMOUS):
        missing = "needs a path" if spec.path is None else "takes no path"
        raise UsageError(f"{slot}: backing {spec.backing.value!r} {missing}")


def _open_and_map(spec: SlotSpec, private: bool) -> tuple[int, mmap.mmap]:
    fd = _open_backing(spec)
    try:
        mapping = mmap.mmap(
            fd,
            spec.size_bytes,
            flags=mmap.MAP_PRIVATE if private else mmap.MAP_SHARED,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    except (OSError, ValueError) as error:
        os.close(fd)
        raise HostError(
            f"slot {spec.name!r}: {format_size(spec.size_bytes)} cannot be mapped: {error}"
        ) from error
    return fd, mapping


def _open_backing(spec: SlotSpec) -> int:
    """A descriptor to map: of a sealed memfd, or of the file, which is long enough."""
    if spec.backing is BackingKind.ANONYMOUS:
        try:
            fd = os.memfd_create(f"guest-{spec.name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, spec.size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            raise HostError(
                f"slot {spec.name!r}: no anonymous memory of {format_size(spec.size_bytes)}: "
                f"{error.strerror}"
            ) from error
        return fd
    assert spec.path is not None
    path = Path(spec.path)
    private = spec.backing is BackingKind.PRIVATE_FILE
    try:
        fd = os.open(path, (os.O_RDONLY if private else os.O_RDWR) | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostError(
            f"slot {spec.name!r}: no file {path}; create it first, for example with "
            f"`truncate -s {spec.size_bytes} {path}`"
        ) from error
    except OSError as error:
        raise HostError(f"slot {spec.name!r}: {path} cannot be opened: {error.strerror}") from error
    length = os.fstat(fd).st_size
    if length < spec.size_bytes:
        os.close(fd)
        raise HostError(
            f"slot {spec.name!r}: {path} is {length} bytes long, the slot needs "
            f"{spec.size_bytes}; lengthen the file or shrink the slot"
        )
    return fd


def _holes(fd: int, size_bytes: int) -> pages.Ranges:
    """The holes of a file in whole pages, ranges [first, end).

    lseek moves the offset that every holder of the open file shares; nobody uses it.
    """
    rows: list[tuple[int, int]] = []
    position = 0
    while position < size_bytes:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = size_bytes
        data = min(data, size_bytes)
        first, end = pages_of(position), data // PAGE_SIZE
        if first < end:
            rows.append((first, end))
        if data == size_bytes:
            break
        position = os.lseek(fd, data, os.SEEK_HOLE)
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


class GuestMemory:
    """The slots of a machine, ordered by address, and access to them by guest address."""

    def __init__(self, specs: Iterable[SlotSpec] = (), *, prealloc: bool = False) -> None:
        """With a slot each for `specs`. Raises as `add` does, with nothing left behind."""
        self._slots: list[MemorySlot] = []
        self._starts: list[int] = []
        self.listeners: list[WriteListener] = []
        try:
            for spec in specs:
                self.add(spec, prealloc=prealloc)
        except BaseException:
            self.close()
            raise

    @property
    def slots(self) -> tuple[MemorySlot, ...]:
        return tuple(self._slots)

    @property
    def size_bytes(self) -> int:
        return sum(slot.size_bytes for slot in self._slots)

    def add(
        self, spec: SlotSpec, *, prealloc: bool = False, reserve: MemoryReserve | None = None
    ) -> MemorySlot:
        """A new slot; its index is the lowest free one. The machine is stopped.

        Raises UsageError (overlap, misalignment, name taken, too many slots) and HostError (file
        missing or too short, no memory); nothing is changed then.
        """
        check_spec(spec)
        if len(self._slots) >= MAX_SLOTS:
            raise UsageError(f"slot {spec.name!r} is one too many: {MAX_SLOTS} are possible")
        for other in self._slots:
            if other.name == spec.name:
                raise UsageError(f"there is a slot {spec.name!r} already")
            if spec.gpa < other.end and other.gpa < spec.gpa + spec.size_bytes:
                raise UsageError(
                    f"slot {spec.name!r} at {spec.gpa:#x}, {format_size(spec.size_bytes)}, "
                    f"overlaps slot {other.name!r} at {other.gpa:#x}, "
                    f"{format_size(other.size_bytes)}"
                )
        taken = {slot.index for slot in self._slots}
        slot = MemorySlot(spec, next(i for i in range(MAX_SLOTS) if i not in taken), reserve)
        if prealloc:
            try:
                slot.prealloc()
            except BaseException:
                slot.close()
                raise
        slot.listeners = self.listeners
        insort(self._slots, slot, key=lambda item: item.gpa)
        self._starts = [item.gpa for item in self._slots]
        return slot

    def remove(self, slot: MemorySlot) -> None:
        """Take out a slot and close it. The machine is stopped and no core has it mapped."""
        if slot not in self._slots:
            raise UsageError(f"slot {slot.name!r} is not in this memory")
        self._slots.remove(slot)
        self._starts = [item.gpa for item in self._slots]
        slot.close()

    def slot_at(self, gpa: int, size: int = 1) -> tuple[MemorySlot, int]:
        """The slot that holds all of [gpa, gpa + size), and gpa's offset in it.

        Raises UsageError outside of memory, or where the range leaves its slot.
        """
        at = bisect_right(self._starts, gpa) - 1
        if at >= 0 and size >= 0:
            slot = self._slots[at]
            offset = gpa - slot.gpa
            if offset + size <= slot.size_bytes and offset < slot.size_bytes:
                return slot, offset
        raise UsageError(f"no memory slot holds {size} bytes at {gpa:#x}")

    def read(self, gpa: int, size: int) -> bytes:
        """A copy. Raises UsageError outside of memory."""
        slot, offset = self.slot_at(gpa, size)
        return bytes(slot.view[offset : offset + size])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """As a device does it: the log sees it, and listeners hear of it.

        `readonly` binds the guest, not the host: images are loaded into such slots this way.
        """
        size = len(data)
        slot, offset = self.slot_at(gpa, size)
        slot.view[offset : offset + size] = data
        self.wrote(gpa, size)

    def view(self, gpa: int, size: int) -> memoryview:
        """The memory itself, writable. Whoever wrote into it calls `wrote`."""
        slot, offset = self.slot_at(gpa, size)
        return slot.view[offset : offset + size]

    def wrote(self, gpa: int, size: int) -> None:
        """The host wrote [gpa, gpa + size) through a view."""
        if size > 0:
            for listener in tuple(self.listeners):
                listener(gpa, size)

    def close(self) -> None:
        """Close every slot. Idempotent."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._starts.clear()

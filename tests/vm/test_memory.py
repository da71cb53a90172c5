"""Memory slots: backings, what makes them fail, access by guest address, untouched pages."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from migrate import pages
from migrate.errors import HostError, UsageError
from migrate.linux import mman
from migrate.units import MIB, PAGE_SIZE
from migrate.vm.definition import MAX_SLOTS, BackingKind, SlotSpec
from migrate.vm.memory import GuestMemory, MemorySlot

RAM = 0x8000_0000
N_SPARSE = 16384  # far more than what readahead brings into the page cache


def ram(name: str = "ram", gpa: int = RAM, size: int = 16 * PAGE_SIZE) -> SlotSpec:
    return SlotSpec(name, gpa, size)


def file_spec(path: Path, size: int, kind: BackingKind = BackingKind.FILE) -> SlotSpec:
    return SlotSpec("ram", RAM, size, kind, str(path))


def open_fds() -> int:
    gc.collect()  # what earlier tests' tracebacks held
    return len(list(Path("/proc/self/fd").iterdir()))


def touched(slot: MemorySlot) -> list[int]:
    bitmap = pages.full(slot.n_pages) & ~slot.never_touched()
    return [int(page) for page in pages.to_indices(bitmap, slot.n_pages)]


def test_an_anonymous_slot_is_one_zeroed_mapping_with_three_faces() -> None:
    slot = MemorySlot(ram())
    assert (slot.n_pages, slot.size_bytes, slot.end) == (16, 65536, RAM + 65536)
    assert slot.view.nbytes == len(slot.array) == 8 * len(slot.words) == slot.size_bytes
    assert not slot.array.any()
    assert slot.hva == slot.array.ctypes.data and slot.hva % PAGE_SIZE == 0
    slot.view[8] = 0x2A
    assert slot.array[8] == 0x2A and slot.words[1] == 0x2A
    assert slot.fd is not None and os.pread(slot.fd, 1, 8) == b"\x2a"
    slot.close()


def test_the_memfd_cannot_be_shrunk_and_is_not_inherited() -> None:
    slot = MemorySlot(ram())
    assert slot.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(slot.fd, 0)
    assert not os.get_inheritable(slot.fd)
    slot.close()


def test_a_file_slot_persists(tmp_path: Path) -> None:
    path = tmp_path / "ram.img"
    path.write_bytes(bytes(8 * PAGE_SIZE))
    slot = MemorySlot(file_spec(path, 4 * PAGE_SIZE))  # a longer file will do
    slot.view[PAGE_SIZE : PAGE_SIZE + 5] = b"hello"
    slot.flush()
    slot.close()
    assert path.read_bytes()[PAGE_SIZE : PAGE_SIZE + 5] == b"hello"
    again = MemorySlot(file_spec(path, 4 * PAGE_SIZE))
    assert bytes(again.view[PAGE_SIZE : PAGE_SIZE + 5]) == b"hello"
    again.close()


def test_private_slots_share_an_image_and_copy_on_write(tmp_path: Path) -> None:
    path = tmp_path / "image"
    content = os.urandom(4 * PAGE_SIZE)
    path.write_bytes(content)
    path.chmod(0o444)
    spec = file_spec(path, 4 * PAGE_SIZE, BackingKind.PRIVATE_FILE)
    one, two = MemorySlot(spec), MemorySlot(spec)
    assert one.fd is None
    one.view[0:4] = b"mine"
    assert bytes(one.view[0:4]) == b"mine"
    assert bytes(two.view) == path.read_bytes() == content
    assert not one.never_touched().any()
    one.close()
    two.close()


@pytest.mark.parametrize("kind", [BackingKind.FILE, BackingKind.PRIVATE_FILE])
def test_a_missing_short_or_forbidden_file_is_a_clear_error(
    tmp_path: Path, kind: BackingKind
) -> None:
    path = tmp_path / "ram.img"
    before = open_fds()
    with pytest.raises(HostError, match=r"slot 'ram': no file .*ram\.img.*truncate -s 8192"):
        MemorySlot(file_spec(path, 8192, kind))
    path.write_bytes(bytes(8191))
    with pytest.raises(HostError, match="8191 bytes long, the slot needs 8192"):
        MemorySlot(file_spec(path, 8192, kind))
    with pytest.raises(HostError, match=r"cannot be opened|cannot be mapped|bytes long"):
        MemorySlot(file_spec(tmp_path, 8192, kind))
    assert open_fds() == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SlotSpec("ram", RAM + 1, PAGE_SIZE), "address 0x80000001 is not a multiple of 0x1000"),
        (SlotSpec("ram", RAM, PAGE_SIZE + 512), "size 0x1200 is not a multiple"),
        (SlotSpec("ram", RAM, 0), "out of range"),
        (SlotSpec("ram", RAM, -PAGE_SIZE), "out of range"),
        (SlotSpec("ram", 0, 1 << 41), "out of range"),
        (SlotSpec("ram", 1 << 56, PAGE_SIZE), "outside of guest-physical memory"),
        (SlotSpec("ram", RAM, PAGE_SIZE, BackingKind.FILE), "'file' needs a path"),
        (SlotSpec("ram", RAM, PAGE_SIZE, path="x"), "'anonymous' takes no path"),
    ],
)
def test_a_senseless_spec_is_refused(spec: SlotSpec, message: str) -> None:
    memory = GuestMemory()
    with pytest.raises(UsageError, match=message):
        memory.add(spec)
    assert memory.slots == ()


def test_slots_are_ordered_indexed_and_do_not_overlap() -> None:
    memory = GuestMemory([ram("high", RAM + MIB), ram("low", RAM)])
    assert [(slot.name, slot.index) for slot in memory.slots] == [("low", 1), ("high", 0)]
    for gpa in (RAM - 15 * PAGE_SIZE, RAM, RAM + 15 * PAGE_SIZE):
        with pytest.raises(UsageError, match=r"slot 'new' at .* overlaps slot 'low' at 0x80000000"):
            memory.add(ram("new", gpa))
    with pytest.raises(UsageError, match="slot 'low' already"):
        memory.add(ram("low", RAM + 2 * MIB))
    touching = memory.add(ram("touching", RAM + 16 * PAGE_SIZE))
    assert touching.index == 2
    memory.remove(memory.slots[0])
    assert touching.closed is False and memory.add(ram("new", RAM)).index == 1
    memory.close()
    assert touching.closed


def test_a_slot_too_many_is_refused() -> None:
    memory = GuestMemory(ram(f"s{i}", i * PAGE_SIZE, PAGE_SIZE) for i in range(MAX_SLOTS))
    with pytest.raises(UsageError, match=f"{MAX_SLOTS} are possible"):
        memory.add(ram())
    memory.close()


def test_a_failed_construction_leaves_nothing_open(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(HostError):
        GuestMemory([ram(), SlotSpec("rom", 0, PAGE_SIZE, BackingKind.FILE, str(tmp_path / "no"))])
    assert open_fds() == before


def test_access_by_guest_address() -> None:
    memory = GuestMemory([ram(), ram("next", RAM + 16 * PAGE_SIZE)])
    heard: list[tuple[int, int]] = []
    memory.listeners.append(lambda gpa, size: heard.append((gpa, size)))
    memory.write(RAM + 100, b"abc")
    memory.write(RAM, b"")
    memory.view(RAM + 200, 2)[:] = b"xy"
    assert memory.read(RAM + 99, 5) == b"\0abc\0"
    assert memory.read(RAM + 200, 2) == b"xy"
    memory.wrote(RAM + 200, 2)
    assert heard == [(RAM + 100, 3), (RAM + 200, 2)]
    slot, offset = memory.slot_at(RAM + 17 * PAGE_SIZE, PAGE_SIZE)
    assert (slot.name, offset) == ("next", PAGE_SIZE)
    end = RAM + 32 * PAGE_SIZE
    for gpa, size in ((RAM - 1, 1), (end, 1), (end - 1, 2), (end, 0), (0, 1), (RAM, 1 << 60)):
        with pytest.raises(UsageError, match="no memory slot holds"):
            memory.read(gpa, size)
    with pytest.raises(UsageError):  # over the edge between two slots
        memory.write(RAM + 16 * PAGE_SIZE - 1, b"ab")
    with pytest.raises(UsageError):
        memory.slot_at(RAM, -1)
    assert len(heard) == 2
    memory.close()


def test_the_host_loads_into_a_readonly_slot() -> None:
    memory = GuestMemory([SlotSpec("rom", 0x1000, PAGE_SIZE, readonly=True)])
    memory.write(0x1000, b"reset vector")
    assert memory.read(0x1000, 12) == b"reset vector" and memory.slots[0].spec.readonly
    memory.close()


def test_close_is_idempotent_and_leaves_views_valid() -> None:
    memory = GuestMemory([ram()])
    slot = memory.slots[0]
    array = slot.array
    array[5] = 5
    memory.close()
    memory.close()
    slot.close()
    array[6] = array[5]  # would crash if the mapping had gone
    assert array[6] == 5
    with pytest.raises(UsageError):
        memory.remove(slot)


def test_never_touched_is_exact_for_anonymous_memory() -> None:
    slot = MemorySlot(ram(size=1024 * PAGE_SIZE))
    assert touched(slot) == []
    slot.array[3 * PAGE_SIZE] = 0  # written, if only with zero
    slot.array[700 * PAGE_SIZE : 702 * PAGE_SIZE] = 1
    slot.array[-1] = 1
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        zeros.readinto(slot.view[9 * PAGE_SIZE : 10 * PAGE_SIZE])
    assert touched(slot) == [3, 9, 700, 701, 1023]
    slot.array[::PAGE_SIZE] |= 0
    assert touched(slot) == list(range(1024))
    slot.close()


def test_never_touched_of_a_sparse_file(tmp_path: Path) -> None:
    """Nothing untouched that is not zero; and where the file system knows holes, something."""
    path = tmp_path / "ram.img"
    with path.open("wb") as image:
        image.truncate(N_SPARSE * PAGE_SIZE)
        image.seek(40 * PAGE_SIZE + 17)
        image.write(b"x")
    slot = MemorySlot(file_spec(path, N_SPARSE * PAGE_SIZE))
    slot.array[9 * PAGE_SIZE] = 1  # only in the page cache as yet
    flags = pages.to_bools(slot.never_touched(), slot.n_pages)
    assert not flags[9] and not flags[40]
    assert slot.fd is not None
    if os.lseek(slot.fd, 0, os.SEEK_HOLE) < N_SPARSE * PAGE_SIZE:
        assert flags[-1]
    slot.close()


def test_prealloc_populates_and_keeps_contents() -> None:
    slot = MemorySlot(ram(size=40 * MIB))
    slot.view[5 * MIB : 5 * MIB + 4] = b"keep"
    heard: list[tuple[int, int]] = []
    slot.prealloc(lambda done, total: heard.append((done, total)))
    assert heard == [(32 * MIB, 40 * MIB), (40 * MIB, 40 * MIB)]
    assert len(touched(slot)) == slot.n_pages
    assert mman.mincore(slot.hva, slot.size_bytes).all()
    assert bytes(slot.view[5 * MIB : 5 * MIB + 4]) == b"keep"
    assert np.count_nonzero(slot.array) == 4
    slot.close()


def test_prealloc_without_the_kernel_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, length: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mman, "madvise", refuse)
    slot = MemorySlot(ram(size=4 * MIB))
    slot.view[0:4] = b"keep"
    slot.prealloc()
    assert len(touched(slot)) == slot.n_pages and bytes(slot.view[0:4]) == b"keep"
    slot.close()


def test_prealloc_that_runs_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, length: int, advice: int) -> None:
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(mman, "madvise", refuse)
    before = open_fds()
    memory = GuestMemory()
    with pytest.raises(HostError, match="slot 'ram': 4 MiB cannot be populated"):
        memory.add(ram(size=4 * MIB), prealloc=True)
    assert memory.slots == () and open_fds() == before


def test_a_host_with_other_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "PAGESIZE", 65536)
    with pytest.raises(HostError, match="pages of 65536 bytes"):
        MemorySlot(ram())

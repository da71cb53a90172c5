"""virtio-blk as a driver sees it, modern and legacy, and as a hostile driver would have it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.errors import HostError, StateFormatError
from migrate.vm.definition import DiskSpec, SlotSpec
from migrate.vm.devices.virtio_blk import Image, VirtioBlk
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE

SECTORS = 64
DESC, AVAIL, USED, DATA = (RAM_BASE + 0x1000 * i for i in (0, 1, 2, 4))
NEXT, WRITE, INDIRECT = 1, 2, 4
NUM = 8


class Rig:
    """A device, its memory, and the driver's side of one queue."""

    def __init__(self, path: Path, *, readonly: bool = False, legacy: bool = False) -> None:
        self.path = path
        self.memory = GuestMemory([SlotSpec("ram", RAM_BASE, 1 << 16)])
        self.wrote: list[tuple[int, int]] = []
        self.memory.listeners.append(lambda gpa, size: self.wrote.append((gpa, size)))
        self.irq = False
        self.image = Image(DiskSpec(str(path), readonly))
        self.device = VirtioBlk(self.memory, self.set_irq, self.image, "disk0", legacy=legacy)
        self.index = 0

    def set_irq(self, level: bool) -> None:
        self.irq = level

    def close(self) -> None:
        self.device.close()
        self.memory.close()

    def write(self, offset: int, value: int) -> None:
        self.device.mmio_write(offset, 4, value)

    def read(self, offset: int, size: int = 4) -> int:
        return self.device.mmio_read(offset, size)

    def start(self, features: int | None = None) -> None:
        """What a driver does at its start (section 3.1.1)."""
        self.write(0x70, 0)
        for status in (1, 3):
            self.write(0x70, status)
        offered = 0
        for half in (0, 1):
            self.write(0x14, half)
            offered |= self.read(0x10) << (32 * half)
        accepted = offered if features is None else offered & features
        for half in (0, 1):
            self.write(0x24, half)
            self.write(0x20, accepted >> (32 * half) & 0xFFFFFFFF)
        self.write(0x70, 3 | 8)
        assert self.read(0x70) & 8
        self.write(0x30, 0)
        assert self.read(0x34) == 256
        self.write(0x38, NUM)
        for offset, gpa in ((0x80, DESC), (0x90, AVAIL), (0xA0, USED)):
            self.write(offset, gpa)
            self.write(offset + 4, 0)
        self.write(0x44, 1)
        self.write(0x70, 3 | 8 | 4)

    def descriptors(self, *rows: tuple[int, int, int, int]) -> None:
        self.memory.write(DESC, b"".join(struct.pack("<QIHH", *row) for row in rows))

    def submit(self, head: int = 0) -> None:
        self.memory.write(AVAIL + 4 + 2 * (self.index % NUM), struct.pack("<H", head))
        self.index += 1
        self.memory.write(AVAIL + 2, struct.pack("<H", self.index & 0xFFFF))
        self.write(0x50, 0)

    def request(self, kind: int, sector: int, buffers: list[tuple[int, int, int]]) -> int:
        """A request with data buffers (address, size, flags); its status byte."""
        self.memory.write(DATA, struct.pack("<IIQ", kind, 0, sector) + b"\xff")
        rows = [(DATA, 16, NEXT, 1)]
        for gpa, size, flags in buffers:
            rows.append((gpa, size, flags | NEXT, len(rows) + 1))
        rows.append((DATA + 16, 1, WRITE, 0))
        self.descriptors(*rows)
        self.submit()
        return self.memory.read(DATA + 16, 1)[0]

    def used(self) -> tuple[int, int, int]:
        """Index, and the last entry's head and length."""
        index = struct.unpack("<H", self.memory.read(USED + 2, 2))[0]
        return index, *struct.unpack("<II", self.memory.read(USED + 4 + 8 * ((index - 1) % NUM), 8))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SECTORS * 512))
    return path


@pytest.fixture
def rig(disk: Path) -> Iterator[Rig]:
    rig = Rig(disk)
    rig.start()
    yield rig
    rig.close()


def test_identity_and_configuration(rig: Rig) -> None:
    assert [rig.read(offset) for offset in (0, 4, 8, 0xC)] == [0x74726976, 2, 2, 0x554D4551]
    assert rig.read(0x100, 8) == SECTORS
    assert rig.read(0x104) == 0
    assert rig.read(0x114) == 512
    assert rig.read(0x1000 - 4) == 0
    rig.write(0x14, 1)
    assert rig.read(0x10) & 1  # VERSION_1


def test_read_scattered(rig: Rig) -> None:
    a, b = DATA + 0x1000, DATA + 0x3000
    rig.wrote.clear()
    assert rig.request(0, 3, [(a, 512, WRITE), (b, 1024, WRITE)]) == 0
    content = rig.path.read_bytes()[3 * 512 : 6 * 512]
    assert rig.memory.read(a, 512) + rig.memory.read(b, 1024) == content
    assert rig.used() == (1, 0, 1536 + 1)
    assert {(a, 512), (b, 1024)} <= set(rig.wrote)  # translated code hears of it
    assert rig.irq
    assert rig.read(0x60) == 1
    rig.write(0x64, 1)
    assert not rig.irq


def test_write_flush_and_read_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    payload = os.urandom(1024)
    rig.memory.write(DATA + 0x1000, payload)
    assert rig.request(1, 10, [(DATA + 0x1000, 1024, 0)]) == 0
    assert not synced
    assert rig.path.read_bytes()[10 * 512 : 12 * 512] == payload
    assert rig.request(4, 0, []) == 0
    assert synced == [rig.image.fd]
    rig.device.quiesce()
    assert len(synced) == 2


def test_a_driver_without_flush_gets_stable_writes(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    rig = Rig(disk)
    rig.start(features=~(1 << 9))
    assert rig.request(1, 0, [(DATA + 0x1000, 512, 0)]) == 0
    assert synced
    rig.close()


def test_readonly(disk: Path) -> None:
    rig = Rig(disk, readonly=True)
    rig.start()
    rig.write(0x14, 0)
    assert rig.read(0x10) & 1 << 5
    before = disk.read_bytes()
    assert rig.request(1, 0, [(DATA + 0x1000, 512, 0)]) == 1
    assert rig.request(4, 0, []) == 0
    assert disk.read_bytes() == before
    rig.close()


def test_what_does_not_fit_is_an_io_error(rig: Rig) -> None:
    assert rig.request(0, SECTORS - 1, [(DATA + 0x1000, 1024, WRITE)]) == 1
    assert rig.request(0, (1 << 64) - 1, [(DATA + 0x1000, 512, WRITE)]) == 1
    assert rig.request(1, 1 << 60, [(DATA + 0x1000, 512, 0)]) == 1
    assert rig.request(0, 0, [(DATA + 0x1000, 100, WRITE)]) == 1
    assert rig.request(77, 0, []) == 2
    assert rig.read(0x70) & 0x40 == 0


def test_an_image_that_shrank_is_an_io_error(rig: Rig) -> None:
    os.truncate(rig.path, 512)
    assert rig.request(0, 5, [(DATA + 0x1000, 512, WRITE)]) == 1


def test_get_id(rig: Rig) -> None:
    assert rig.request(8, 0, [(DATA + 0x1000, 20, WRITE)]) == 0
    assert rig.memory.read(DATA + 0x1000, 20) == b"disk0".ljust(20, b"\0")


def test_no_interrupt_when_the_driver_wants_none(rig: Rig) -> None:
    rig.memory.write(AVAIL, struct.pack("<H", 1))
    assert rig.request(0, 0, [(DATA + 0x1000, 512, WRITE)]) == 0
    assert not rig.irq


def test_ring_indices_wrap(rig: Rig) -> None:
    for _ in range(3 * NUM + 1):
        assert rig.request(0, 1, [(DATA + 0x1000, 512, WRITE)]) == 0
    assert rig.used()[0] == 3 * NUM + 1


def test_features_must_fit(disk: Path) -> None:
    rig = Rig(disk)
    rig.write(0x24, 0)
    rig.write(0x20, 1 << 31)
    rig.write(0x70, 3 | 8)
    assert not rig.read(0x70) & 8
    rig.write(0x20, 0)  # without VERSION_1, as xv6 has it
    rig.write(0x70, 3 | 8)
    assert rig.read(0x70) & 8
    rig.close()


HOSTILE = {
    "loop": [(DATA, 16, NEXT, 1), (DATA, 16, NEXT, 0)],
    "next out of the table": [(DATA, 16, NEXT, 200)],
    "outside of memory": [(DATA, 16, NEXT, 1), (0x1000, 512, WRITE, 0)],
    "across the end": [(DATA, 16, NEXT, 1), (RAM_BASE + (1 << 16) - 8, 512, WRITE, 0)],
    "wraps around": [(DATA, 16, NEXT, 1), ((1 << 64) - 8, 512, WRITE, 0)],
    "huge": [(DATA, 16, NEXT, 1), (DATA, (1 << 32) - 1, WRITE, 0)],
    "indirect": [(DATA, 16, INDIRECT, 0)],
    "readable after writable": [(DATA, 16, WRITE | NEXT, 1), (DATA, 16, 0, 0)],
    "no status": [(DATA, 16, 0, 0)],
    "short header": [(DATA, 8, NEXT, 1), (DATA, 1, WRITE, 0)],
    "empty": [(DATA, 0, 0, 0)],
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_chains_stop_the_device_until_reset(rig: Rig, what: str) -> None:
    rig.descriptors(*HOSTILE[what])
    rig.submit()
    assert rig.read(0x70) & 0x40, what
    assert rig.irq
    assert rig.read(0x60) & 2
    used = rig.used()[0]
    rig.submit()  # deaf now
    assert rig.used()[0] == used
    rig.start()
    rig.index = 0
    rig.memory.write(USED, bytes(64))
    assert rig.read(0x70) & 0x40 == 0
    assert rig.request(0, 0, [(DATA + 0x1000, 512, WRITE)]) == 0


def test_an_available_index_beyond_the_ring_stops_the_device(rig: Rig) -> None:
    rig.memory.write(AVAIL + 2, struct.pack("<H", NUM + 1))
    rig.write(0x50, 0)
    assert rig.read(0x70) & 0x40


def test_rings_outside_of_memory_stop_the_device(rig: Rig) -> None:
    rig.write(0x44, 0)
    rig.write(0xA4, 0xFFFFFFFF)
    rig.write(0x44, 1)
    rig.descriptors((DATA, 16, NEXT, 1), (DATA + 16, 1, WRITE, 0))
    rig.submit()
    assert rig.read(0x70) & 0x40


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    table=st.lists(
        st.tuples(
            st.sampled_from([DATA, DATA + 16, RAM_BASE, RAM_BASE + 0xFFF0, 0, DESC, USED]),
            st.sampled_from([0, 1, 8, 16, 512, 4096, 0xFFFFFFFF]),
            st.integers(0, 7),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=NUM,
    ),
    header=st.tuples(st.sampled_from([0, 1, 4, 8, 9]), st.integers(0, 70)),
    rounds=st.integers(1, 10),
)
def test_any_table_is_survived(
    disk: Path, table: list[tuple[int, int, int, int]], header: tuple[int, int], rounds: int
) -> None:
    rig = Rig(disk)
    try:
        rig.start()
        rig.memory.write(DATA, struct.pack("<IIQ", header[0], 0, header[1]))
        rig.descriptors(*table)
        for _ in range(rounds):
            rig.submit()
        rig.device.load_untrusted(rig.device.save())
    finally:
        rig.close()


def test_legacy_registers(disk: Path) -> None:
    """Version 1: page frame numbers, one contiguous queue (section 4.2.4)."""
    rig = Rig(disk, legacy=True)
    assert rig.read(4) == 1
    rig.write(0x28, 4096)
    rig.write(0x70, 0)  # keeps the page size: Linux sets it before
    rig.write(0x70, 3)
    rig.write(0x30, 0)
    rig.write(0x38, NUM)
    rig.write(0x3C, 4096)
    rig.write(0x40, RAM_BASE >> 12)
    rig.write(0x70, 7)
    assert rig.read(0x40) == RAM_BASE >> 12
    desc, avail, used = RAM_BASE, RAM_BASE + 16 * NUM, RAM_BASE + 4096
    rig.memory.write(DATA, struct.pack("<IIQ", 0, 0, 2) + b"\xff")
    rows = ((DATA, 16, NEXT, 1), (DATA + 0x1000, 512, NEXT | WRITE, 2), (DATA + 16, 1, WRITE, 0))
    rig.memory.write(desc, b"".join(struct.pack("<QIHH", *row) for row in rows))
    rig.memory.write(avail, struct.pack("<HHH", 0, 1, 0))
    rig.write(0x50, 0)
    assert rig.memory.read(DATA + 16, 1) == b"\0"
    assert rig.memory.read(DATA + 0x1000, 512) == disk.read_bytes()[1024:1536]
    assert struct.unpack("<HHII", rig.memory.read(used, 12)) == (0, 1, 0, 513)
    rig.close()


def test_state_of_another_disk_is_refused(rig: Rig, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    there = Rig(other)
    with pytest.raises(StateFormatError, match="64 sectors"):
        there.device.load_untrusted(rig.device.save())
    assert there.device.sectors == 1
    there.close()


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"nowhere\.img"):
        Image(DiskSpec(str(tmp_path / "nowhere.img")))

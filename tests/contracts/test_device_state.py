"""Every device's state travels: save, mutate, restore, and go on as if nothing had been.

Devices are found through their registry: one that has no subject here fails the suite.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import struct
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import migrate.vm.devices
import migrate.vm.sbi
from migrate.errors import StateFormatError
from migrate.vm.definition import DiskSpec, SlotSpec
from migrate.vm.devices.base import Device, MmioDevice, concrete_devices
from migrate.vm.devices.clint import Clint
from migrate.vm.devices.finisher import Finisher
from migrate.vm.devices.plic import Plic
from migrate.vm.devices.rtc import Rtc
from migrate.vm.devices.uart import Uart
from migrate.vm.devices.virtio_blk import Image, VirtioBlk
from migrate.vm.devices.virtio_mmio import VirtioEmpty
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE
from migrate.vm.sbi import Sbi

HARTS = 2
for module in pkgutil.iter_modules(migrate.vm.devices.__path__):
    importlib.import_module(f"migrate.vm.devices.{module.name}")


class World:
    """What a device sees of the board: a clock, interrupt inputs, memory, a hart's registers."""

    def __init__(self, image: Path) -> None:
        self.ticks = 1000
        self.irqs: dict[int, int] = {}
        self.level = False
        self.sent = b""
        self.registers = {f"a{i}": 0 for i in range(8)} | {"mstatus": 0}
        self.waited = False
        self.harts = HARTS
        self.memory = GuestMemory([SlotSpec("ram", RAM_BASE, 1 << 16)])
        self.image = Image(DiskSpec(str(image)))

    def time(self) -> int:
        return self.ticks

    def set_time(self, ticks: int) -> None:
        self.ticks = ticks

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        self.irqs[hart] = (self.irqs.get(hart, 0) & ~mask) | value

    def line(self, level: bool) -> None:
        self.level = level

    def nothing(self, *_: object) -> None:
        """What the board would do."""

    rearm = end_turn = wait_for_interrupt = forget_code = flush_tlb = nothing
    power_off = restart = nothing

    def read_reg(self, name: str) -> int:
        return self.registers[name]

    def write_reg(self, name: str, value: int) -> None:
        self.registers[name] = value

    def console_write(self, data: bytes) -> None:
        self.sent += data

    def console_read(self, size: int) -> bytes:
        return b"typed"[:size]

    def outputs(self) -> object:
        return self.irqs, self.level, self.sent, self.registers

    def close(self) -> None:
        self.memory.close()
        self.image.close()


FACTORIES: dict[str, Callable[[World], Device]] = {
    Uart.KIND: lambda world: Uart(world.line, world.console_write),
    Clint.KIND: lambda world: Clint(
        HARTS, time=world.time, set_time=world.set_time, set_irq=world.set_irq, rearm=world.rearm
    ),
    Plic.KIND: lambda world: Plic(HARTS, world.set_irq),
    Rtc.KIND: lambda world: Rtc(
        world.line, time=world.time, now_ns=1_700_000_000 * 10**9, rearm=world.rearm
    ),
    Finisher.KIND: lambda world: Finisher(world.nothing, world.nothing),
    VirtioEmpty.KIND: lambda world: VirtioEmpty(world.memory, world.line),
    VirtioBlk.KIND: lambda world: VirtioBlk(world.memory, world.line, world.image, "disk0"),
    Sbi.KIND: Sbi,
}
OFFSETS = {
    Uart.KIND: range(8),
    Clint.KIND: (0, 4, 8, 0x4000, 0x4004, 0x4008, 0x400C, 0x4010, 0xBFF8, 0xBFFC),
    Plic.KIND: (
        4,
        8,
        40,
        380,
        0x1000,
        0x1004,
        0x2000,
        0x2004,
        0x2080,
        0x2100,
        0x2180,
        0x2184,
        0x200000,
        0x200004,
        0x201000,
        0x201004,
        0x202004,
        0x203000,
        0x203004,
    ),
    Rtc.KIND: range(0, 0x20, 4),
    Finisher.KIND: (0, 4),
    VirtioEmpty.KIND: range(0, 0x104, 4),
    VirtioBlk.KIND: (*range(0, 0x108, 4), 0x44, 0x44, 0x50, 0x50, 0x80, 0x90, 0xA0),
}
SBI_EXTENSIONS = (
    0,
    1,
    2,
    8,
    0x10,
    0x54494D45,
    0x735049,
    0x52464E43,
    0x48534D,
    0x53525354,
    0x4442434E,
)
VALUES = st.one_of(
    st.integers(0, 8),
    st.sampled_from([0x80000000, 0x80001000, 0x80002000, 1100, 0x100, 0xFF]),
    st.integers(0, (1 << 64) - 1),
)
STEPS = st.lists(
    st.tuples(
        st.integers(0, 6), st.integers(0, 1 << 16), st.sampled_from([1, 2, 4, 8]), VALUES, VALUES
    ),
    max_size=25,
)


def step(device: Device, world: World, what: tuple[int, int, int, int, int]) -> object:
    """One thing that happens to a device; what the guest sees of it."""
    kind, place, size, value, more = what
    if kind == 0:
        world.ticks += place
        tick = getattr(device, "tick", None)
        if tick is not None:
            tick(world.ticks)
            return device.next_tick()  # type: ignore[attr-defined]
    elif isinstance(device, Sbi):
        extension = SBI_EXTENSIONS[place % len(SBI_EXTENSIONS)]
        world.registers |= {"a0": value, "a1": more, "a2": 0, "a6": kind - 1, "a7": extension}
        device(place % HARTS)
        device.enter(place % HARTS)
    elif isinstance(device, Plic) and kind == 1:
        device.line(1 + place % 95)(bool(value & 1))
    elif isinstance(device, Uart) and kind == 1:
        return device.receive(value.to_bytes(8, "little"))
    elif isinstance(device, VirtioBlk) and kind == 1:
        start_queue(device, world, waiting=place % 12)
    elif isinstance(device, MmioDevice):
        offsets = OFFSETS[device.KIND]
        offset = offsets[place % len(offsets)]
        if kind < 4:
            return device.mmio_read(offset, size)
        device.mmio_write(offset, size, value & ((1 << (8 * size)) - 1))
    return None


def start_queue(device: VirtioBlk, world: World, waiting: int) -> None:
    """A driver's start, with `waiting` requests for nothing in a queue of 8."""
    header, status = RAM_BASE + 0x3000, RAM_BASE + 0x3010
    world.memory.write(RAM_BASE, struct.pack("<QIHHQIHH", header, 16, 1, 1, status, 1, 2, 0))
    for offset, value in ((0x70, 0), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, 8)):
        device.mmio_write(offset, 4, value)
    for offset, page in ((0x80, 0), (0x90, 1), (0xA0, 2)):
        device.mmio_write(offset, 4, RAM_BASE + 0x1000 * page)
    world.memory.write(RAM_BASE + 0x1002, waiting.to_bytes(2, "little"))
    for offset, value in ((0x44, 1), (0x70, 15), (0x50, 0)):
        device.mmio_write(offset, 4, value)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    path.write_bytes(os.urandom(16384))
    return path


BUDGET = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def test_every_device_has_a_subject() -> None:
    assert {cls.KIND for cls in concrete_devices()} == set(FACTORIES)
    for cls in concrete_devices():
        assert cls.__module__.startswith("migrate.vm.")
        assert cls.VERSION >= 1
        assert len({field.name for field in cls.FIELDS}) == len(cls.FIELDS)


@pytest.mark.parametrize("kind", sorted(FACTORIES))
@BUDGET
@given(history=STEPS, other=STEPS, future=STEPS)
def test_save_mutate_restore(
    kind: str,
    image: Path,
    history: list[tuple[int, int, int, int, int]],
    other: list[tuple[int, int, int, int, int]],
    future: list[tuple[int, int, int, int, int]],
) -> None:
    here, there = World(image), World(image)
    try:
        device, copy = FACTORIES[kind](here), FACTORIES[kind](there)
        for what in history:
            step(device, here, what)
        if isinstance(device, Uart):
            device.flush()
        state = msgpack.unpackb(msgpack.packb(device.save()))
        for what in other:
            step(copy, there, what)
        there.ticks = here.ticks
        there.sent, there.registers = here.sent, dict(here.registers)
        there.memory.slots[0].view[:] = here.memory.slots[0].view[:]
        if isinstance(copy, Uart):
            copy.flush()
            there.sent = here.sent
        copy.load_untrusted(state)
        assert copy.save() == device.save() == state
        assert plain_attributes(copy) == plain_attributes(device)
        assert driven(here) == driven(there)
        for what in future:
            assert step(copy, there, what) == step(device, here, what)
            assert driven(here) == driven(there)
        assert copy.save() == device.save()
        assert there.memory.slots[0].view.tobytes() == here.memory.slots[0].view.tobytes()
        device.reset()
        assert device.save()["fields"].keys() == state["fields"].keys()
    finally:
        here.close()
        there.close()


def driven(world: World) -> object:
    """The outputs; an interrupt that was never driven is low. SSIP is not a device's to drive."""
    return {hart: mip & ~2 for hart, mip in world.irqs.items() if mip & ~2}, world.level, world.sent


def plain_attributes(device: Device) -> dict[str, object]:
    """All values that an object holds: one that FIELDS forgot, and nothing rebuilds, differs."""
    plain = (int, bool, str, bytes, bytearray, list, tuple, type(None))
    return {name: value for name, value in vars(device).items() if isinstance(value, plain)}


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 1 << 70)
    | st.binary(max_size=9)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", sorted(FACTORIES))
@BUDGET
@given(data=st.data())
def test_hostile_states(kind: str, image: Path, data: st.DataObject) -> None:
    world = World(image)
    try:
        device = FACTORIES[kind](world)
        before = device.save()
        state = device.save()
        fields = state["fields"]
        attack = data.draw(
            st.sampled_from(["junk", "missing", "extra", "value", "kind", "version"])
        )
        if attack == "junk":
            state = data.draw(JUNK)
        elif attack == "missing" and fields:
            del fields[data.draw(st.sampled_from(sorted(fields)))]
        elif attack in {"extra", "missing"}:
            fields["no-such-field"] = 1
        elif attack == "value" and fields:
            name = data.draw(st.sampled_from(sorted(fields)))
            fields[name] = data.draw(JUNK)
        else:
            state["version" if attack == "version" else "kind"] = data.draw(JUNK)
        if state == before:
            return
        try:
            device.load_untrusted(state)
        except StateFormatError:
            assert device.save() == before
        else:  # a value that may stand there: the device must be able to live with it
            for what in data.draw(STEPS):
                step(device, world, what)
            device.save()
    finally:
        world.close()

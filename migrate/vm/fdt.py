"""The device tree of the board (layer 2): what QEMU's virt board says of the same devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import fdt

from migrate.vm.definition import MachineDefinition
from migrate.vm.devices.plic import SOURCES
from migrate.vm.memory_map import (
    CLINT,
    PLIC,
    RTC,
    RTC_IRQ,
    TEST,
    TIMEBASE_HZ,
    UART,
    UART_CLOCK_HZ,
    UART_IRQ,
    VIRTIO_COUNT,
    VIRTIO_FIRST_IRQ,
    Window,
    virtio_window,
)

ISA: Final = "rv64imafdc"
PLIC_PHANDLE: Final = 1
TEST_PHANDLE: Final = 2
FIRST_CPU_PHANDLE: Final = 16


def build_dtb(
    definition: MachineDefinition,
    *,
    bootargs: str = "",
    initrd: tuple[int, int] | None = None,
    rng_seed: bytes = b"",
) -> bytes:
    """The flattened tree. `initrd` is [start, end) of its place in memory."""
    tree = _Tree()
    tree.set(
        "/", address_cells=2, size_cells=2, compatible="riscv-virtio", model="riscv-virtio,qemu"
    )
    chosen: dict[str, Any] = {"stdout_path": f"/soc/serial@{UART.base:x}"}
    if bootargs:
        chosen["bootargs"] = bootargs
    if rng_seed:
        chosen["rng_seed"] = rng_seed
    tree.set("/chosen", **chosen)
    if initrd is not None:
        tree.words("/chosen", "linux,initrd-start", _cells(initrd[0]))
        tree.words("/chosen", "linux,initrd-end", _cells(initrd[1]))
    for slot in definition.slots:
        if not slot.readonly:
            path = f"/memory@{slot.gpa:x}"
            tree.set(path, device_type="memory", reg=_reg(Window(slot.gpa, slot.size_bytes)))
    _add_cpus(tree, definition.cpus)
    _add_soc(tree, definition.cpus)
    for name, value in (("poweroff", 0x5555), ("reboot", 0x7777)):
        tree.set(
            f"/{name}", value=value, offset=0, regmap=TEST_PHANDLE, compatible=f"syscon-{name}"
        )
    return tree.to_dtb()


def _add_cpus(tree: _Tree, cpus: int) -> None:
    tree.set("/cpus", address_cells=1, size_cells=0, timebase_frequency=TIMEBASE_HZ)
    for hart in range(cpus):
        path = f"/cpus/cpu@{hart:x}"
        tree.set(
            path, phandle=_cpu_phandle(hart), device_type="cpu", reg=hart, status="okay",
            compatible="riscv", mmu_type="riscv,sv39",
        )  # fmt: skip
        tree.strings(path, "riscv,isa", ISA)
        tree.set(
            f"{path}/interrupt-controller", interrupt_controller=True, phandle=_intc_phandle(hart),
            compatible="riscv,cpu-intc",
        )  # fmt: skip
        tree.words(f"{path}/interrupt-controller", "#interrupt-cells", [1])
        tree.set(f"/cpus/cpu-map/cluster0/core{hart}", cpu=_cpu_phandle(hart))


def _add_soc(tree: _Tree, cpus: int) -> None:
    tree.set("/soc", address_cells=2, size_cells=2, compatible="simple-bus", ranges=True)
    path = f"/soc/clint@{CLINT.base:x}"
    tree.set(path, reg=_reg(CLINT))
    tree.strings(path, "compatible", "sifive,clint0", "riscv,clint0")
    tree.words(path, "interrupts-extended", _per_hart(cpus, 3, 7))
    path = f"/soc/plic@{PLIC.base:x}"
    tree.set(path, phandle=PLIC_PHANDLE, reg=_reg(PLIC), interrupt_controller=True, address_cells=0)
    tree.words(path, "#interrupt-cells", [1])
    tree.words(path, "riscv,ndev", [SOURCES - 1])
    tree.strings(path, "compatible", "sifive,plic-1.0.0", "riscv,plic0")
    tree.words(path, "interrupts-extended", _per_hart(cpus, 11, 9))
    path = f"/soc/test@{TEST.base:x}"
    tree.set(path, phandle=TEST_PHANDLE, reg=_reg(TEST))
    tree.strings(path, "compatible", "sifive,test1", "sifive,test0", "syscon")
    path = f"/soc/rtc@{RTC.base:x}"
    tree.set(path, compatible="google,goldfish-rtc", reg=_reg(RTC), **_irq(RTC_IRQ))
    path = f"/soc/serial@{UART.base:x}"
    tree.set(
        path, compatible="ns16550a", reg=_reg(UART), clock_frequency=UART_CLOCK_HZ,
        **_irq(UART_IRQ),
    )  # fmt: skip
    for slot in range(VIRTIO_COUNT):
        window = virtio_window(slot)
        tree.set(
            f"/soc/virtio_mmio@{window.base:x}", compatible="virtio,mmio", reg=_reg(window),
            **_irq(VIRTIO_FIRST_IRQ + slot),
        )  # fmt: skip


class _Tree:
    """The fdt library's tree with the conventions of this file.

    Python names become property names: `address_cells` is "#address-cells", the others get
    their underscores turned into dashes, except where a node's binding spells them otherwise.
    """

    def __init__(self) -> None:
        self._tree = fdt.FDT()

    def set(self, path: str, **properties: str | int | bool | bytes | Sequence[int]) -> None:
        if path != "/" and not self._tree.exist_node(path):
            parent, _, name = path.rpartition("/")
            self._tree.add_item(fdt.Node(name), parent or "/", create=True)
        for key, value in properties.items():
            name = _SPELLED.get(key, key.replace("_", "-"))
            if isinstance(value, bool):
                self._add(path, fdt.Property(name))
            elif isinstance(value, str):
                self.strings(path, name, value)
            elif isinstance(value, bytes):
                self._add(path, fdt.PropBytes(name, data=value))
            else:
                self.words(path, name, [value] if isinstance(value, int) else value)

    def strings(self, path: str, name: str, *values: str) -> None:
        self._add(path, fdt.PropStrings(name, *values))

    def words(self, path: str, name: str, values: Sequence[int]) -> None:
        self._add(path, fdt.PropWords(name, *values))

    def _add(self, path: str, item: Any) -> None:
        self._tree.add_item(item, path)

    def to_dtb(self) -> bytes:
        return bytes(self._tree.to_dtb(version=17))


_SPELLED: Final = {
    "address_cells": "#address-cells",
    "size_cells": "#size-cells",
    "device_type": "device_type",
}


def _cells(value: int) -> list[int]:
    return [value >> 32, value & 0xFFFF_FFFF]


def _reg(window: Window) -> list[int]:
    return [*_cells(window.base), *_cells(window.size)]


def _irq(source: int) -> dict[str, int]:
    return {"interrupt_parent": PLIC_PHANDLE, "interrupts": source}


def _cpu_phandle(hart: int) -> int:
    return FIRST_CPU_PHANDLE + 2 * hart


def _intc_phandle(hart: int) -> int:
    return _cpu_phandle(hart) + 1


def _per_hart(cpus: int, *causes: int) -> list[int]:
    return [
        word for hart in range(cpus) for cause in causes for word in (_intc_phandle(hart), cause)
    ]

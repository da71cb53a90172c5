"""Images and device tree: where things land, and what is refused."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fdt
import pytest

from migrate.errors import HostError, UsageError
from migrate.units import MIB
from migrate.vm.boot import Images, load_images
from migrate.vm.definition import MachineDefinition, SlotSpec
from migrate.vm.fdt import build_dtb
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE

RAM_BYTES = 32 * MIB
DEFINITION = MachineDefinition("m", (SlotSpec("ram", RAM_BASE, RAM_BYTES),), cpus=2)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(DEFINITION.slots)
    yield memory
    memory.close()


def image(text_offset: int = 0x20_0000, image_size: int = 0x10_0000) -> bytes:
    """A Linux kernel's header with a little behind it."""
    header = struct.pack(
        "<IIQQQIIQ8s4sI",
        0x6F,
        0,
        text_offset,
        image_size,
        0,
        2,
        0,
        0,
        b"RISCV\0\0\0",
        b"RSC\x05",
        0,
    )
    return header + b"kernel" * 100


def elf(paddr: int, content: bytes, *, vaddr: int | None = None, bss: int = 0) -> bytes:
    """A program of one segment that starts 4 bytes into it."""
    vaddr = paddr if vaddr is None else vaddr
    head = b"\x7fELF\2\1\1" + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 2, 243, 1, vaddr + 4, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )  # fmt: skip
    program = struct.pack(
        "<IIQQQQQQ", 1, 7, 120, vaddr, paddr, len(content), len(content) + bss, 4096
    )
    return head + program + content


def tree_at(memory: GuestMemory, gpa: int) -> fdt.FDT:
    size = struct.unpack(">II", memory.read(gpa, 8))[1]
    return fdt.parse_dtb(memory.read(gpa, size))


def put(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_kernel_alone(memory: GuestMemory, tmp_path: Path) -> None:
    initrd = b"initrd" * 1000
    entry = load_images(
        memory,
        DEFINITION,
        Images(
            kernel=put(tmp_path / "k", image()),
            initrd=put(tmp_path / "i", initrd),
            append="console=ttyS0",
        ),
        rng_seed=b"s" * 32,
    )
    assert (entry.pc, entry.machine_mode, entry.a2) == (RAM_BASE + 0x20_0000, False, 0)
    assert memory.read(entry.pc, len(image())) == image()
    tree = tree_at(memory, entry.a1)
    chosen = tree.get_node("/chosen")
    assert chosen.get_property("bootargs").value == "console=ttyS0"
    start = chosen.get_property("linux,initrd-start")[1]
    end = chosen.get_property("linux,initrd-end")[1]
    assert memory.read(start, end - start) == initrd
    assert entry.pc + 0x10_0000 <= start < end <= entry.a1 < RAM_BASE + RAM_BYTES


def test_a_kernel_goes_where_its_header_says(memory: GuestMemory, tmp_path: Path) -> None:
    path = put(tmp_path / "k", gzip.compress(image(text_offset=0x40_0000)))
    entry = load_images(memory, DEFINITION, Images(kernel=path), rng_seed=b"")
    assert entry.pc == RAM_BASE + 0x40_0000
    assert memory.read(entry.pc, 8) == image()[:8]


def test_firmware_with_a_kernel_behind_it(memory: GuestMemory, tmp_path: Path) -> None:
    entry = load_images(
        memory,
        DEFINITION,
        Images(put(tmp_path / "fw", b"firmware"), put(tmp_path / "k", image())),
        rng_seed=b"",
    )
    assert (entry.pc, entry.machine_mode) == (RAM_BASE, True)
    assert memory.read(RAM_BASE, 8) == b"firmware"
    assert memory.read(RAM_BASE + 0x20_0000, 4) == image()[:4]
    info = struct.unpack("<6Q", memory.read(entry.a2, 48))
    assert info == (0x4942534F, 2, RAM_BASE + 0x20_0000, 1, 0, 0)
    # A large firmware pushes the kernel up.
    entry = load_images(
        memory,
        DEFINITION,
        Images(put(tmp_path / "fw", bytes(3 * MIB)), put(tmp_path / "k", image())),
        rng_seed=b"",
    )
    assert struct.unpack("<6Q", memory.read(entry.a2, 48))[2] == RAM_BASE + 4 * MIB


def test_elf(memory: GuestMemory, tmp_path: Path) -> None:
    memory.write(RAM_BASE + 0x1000, b"\xff" * 64)
    program = elf(RAM_BASE + 0x1000, b"code" * 4, vaddr=0xFFFF_FFFF_8000_0000, bss=16)
    path = put(tmp_path / "p", program)
    entry = load_images(memory, DEFINITION, Images(firmware=path), rng_seed=b"")
    assert entry.pc == RAM_BASE + 0x1004
    assert memory.read(RAM_BASE + 0x1000, 40) == b"code" * 4 + bytes(16) + b"\xff" * 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (elf(0x1000, b"x"), "do not fit"),
        (elf(RAM_BASE + RAM_BYTES - 8, b"x" * 9), "do not fit"),
        (elf(RAM_BASE, b"x")[:100], "broken ELF"),
        (elf(RAM_BASE, b"x").replace(b"\x02\0\xf3\0", b"\x02\0\x3e\0"), "RISC-V"),
        (gzip.compress(bytes(RAM_BYTES + 1)), "unpack to more"),
        (gzip.compress(b"x" * 100)[:-12], "end early"),
        (b"\x1f\x8bnonsense", "broken gzip"),
        (bytes(RAM_BYTES + 1), "do not fit"),
        (bytes(RAM_BYTES - 100), "too little"),
    ],
)
def test_bad_firmware_is_refused(
    memory: GuestMemory, tmp_path: Path, data: bytes, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_images(memory, DEFINITION, Images(put(tmp_path / "fw", data)), rng_seed=b"")


def test_missing_files_and_nothing_at_all(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="nowhere"):
        load_images(memory, DEFINITION, Images(kernel=str(tmp_path / "nowhere")), rng_seed=b"")
    with pytest.raises(UsageError, match="nothing to boot"):
        load_images(memory, DEFINITION, Images(), rng_seed=b"")


def test_tree_describes_the_board() -> None:
    tree = fdt.parse_dtb(build_dtb(DEFINITION))
    assert tree.get_property("timebase-frequency", "/cpus").value == 10_000_000
    for hart in (0, 1):
        assert tree.get_property("riscv,isa", f"/cpus/cpu@{hart}").value == "rv64imafdc"
    assert list(tree.get_property("reg", "/memory@80000000")) == [0, RAM_BASE, 0, RAM_BYTES]
    plic = tree.get_property("phandle", "/soc/plic@c000000").value
    for slot in range(8):
        node = f"/soc/virtio_mmio@{0x10001000 + 0x1000 * slot:x}"
        assert tree.get_property("interrupts", node).value == slot + 1
        assert tree.get_property("interrupt-parent", node).value == plic
    assert list(tree.get_property("compatible", "/soc/plic@c000000")) == [
        "sifive,plic-1.0.0",
        "riscv,plic0",
    ]
    assert not tree.exist_property("bootargs", "/chosen")


@pytest.mark.skipif(shutil.which("dtc") is None, reason="no dtc here")
def test_tree_is_what_the_compiler_accepts(tmp_path: Path) -> None:
    path = tmp_path / "t.dtb"
    path.write_bytes(
        build_dtb(DEFINITION, bootargs="x", initrd=(1 << 32, 2 << 32), rng_seed=b"r" * 32)
    )
    done = subprocess.run(
        ["dtc", "-I", "dtb", "-O", "dts", str(path)], capture_output=True, text=True, check=True
    )
    assert "Error" not in done.stderr
    unexpected = [
        line
        for line in done.stderr.splitlines()
        if "Missing #address-cells in interrupt" not in line
    ]
    assert unexpected == []

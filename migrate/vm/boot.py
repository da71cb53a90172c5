"""Images into guest memory, and where each hart starts (layer 2).

Two ways in. `firmware` starts in machine mode at the base of RAM, with the kernel (if any) behind
it where QEMU puts it, and told of it the way QEMU tells OpenSBI's fw_dynamic. A `kernel` alone
starts in supervisor mode, the board being its firmware.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from migrate.errors import HostError, UsageError
from migrate.units import MIB, PAGE_SIZE, format_size
from migrate.vm.definition import MachineDefinition
from migrate.vm.fdt import build_dtb
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE

KERNEL_ALIGN: Final = 2 * MIB
DTB_CEILING: Final = 3072 * MIB
"""32-bit firmware code reaches no further; QEMU's limit too."""

IMAGE_HEADER: Final = struct.Struct("<IIQQQIIQ8sII")
"""struct riscv_image_header: code0, code1, text_offset, image_size, flags, version, res1, res2,
magic, magic2, res3 (Linux, arch/riscv/include/asm/image.h)."""
assert IMAGE_HEADER.size == 64
IMAGE_MAGIC2: Final = b"RSC\x05"

FW_DYNAMIC_INFO: Final = struct.Struct("<6Q")
"""struct fw_dynamic_info of OpenSBI: magic, version, next_addr, next_mode, options, boot_hart."""
FW_DYNAMIC_MAGIC: Final = 0x4942_534F
FW_NEXT_MODE_S: Final = 1


@dataclass(frozen=True, slots=True)
class Images:
    """What to boot; paths. Either `firmware` (and perhaps a kernel behind it) or `kernel`."""

    firmware: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """Registers of every hart at its start; a0 is the hart's number."""

    pc: int
    machine_mode: bool
    a1: int
    a2: int


@dataclass(frozen=True, slots=True)
class _Loaded:
    entry: int
    end: int
    """First address past all that the image occupies once it runs."""


def load_images(
    memory: GuestMemory, definition: MachineDefinition, images: Images, *, rng_seed: bytes
) -> Entry:
    """Put everything in place. Raises UsageError and HostError, naming the file."""
    if images.firmware is None and images.kernel is None:
        raise UsageError("nothing to boot: give a firmware or a kernel")
    slot, _ = memory.slot_at(RAM_BASE)
    ram_end = slot.end
    firmware = kernel = None
    if images.firmware is not None:
        firmware = _load(memory, images.firmware, RAM_BASE, "firmware")
    if images.kernel is not None:
        at = RAM_BASE + KERNEL_ALIGN
        if firmware is not None:
            at = max(at, _align_up(firmware.end, KERNEL_ALIGN))
        kernel = _load(memory, images.kernel, at, "kernel")
    end = max(loaded.end for loaded in (firmware, kernel) if loaded is not None)
    # As high as the devices tree may lie; firmware may move it, kernels reserve it.
    ceiling = min(ram_end, max(DTB_CEILING, RAM_BASE + 16 * MIB))
    initrd = _read(images.initrd, "initrd") if images.initrd is not None else None

    def tree(where: tuple[int, int] | None) -> bytes:
        return build_dtb(definition, bootargs=images.append, initrd=where, rng_seed=rng_seed)

    # The tree's size does not depend on the addresses in it.
    size = len(tree((0, 0) if initrd is not None else None)) + FW_DYNAMIC_INFO.size + 8
    align = KERNEL_ALIGN if ceiling - end > 4 * KERNEL_ALIGN else PAGE_SIZE
    dtb_at = (ceiling - size) // align * align
    top = dtb_at
    place = None
    if initrd is not None:
        start = (dtb_at - len(initrd)) // PAGE_SIZE * PAGE_SIZE
        place = (start, start + len(initrd))
        top = start
    if top < end:
        raise UsageError(
            f"machine {definition.name!r}: {format_size(slot.size_bytes)} of memory are too "
            f"little for its images; at least {format_size(end - RAM_BASE + ceiling - top)} "
            "are needed"
        )
    if initrd is not None:
        memory.write(top, initrd)
    dtb = tree(place)
    memory.write(dtb_at, dtb)
    info_at = _align_up(dtb_at + len(dtb), 8)
    memory.write(info_at, _fw_dynamic_info(kernel))
    if firmware is not None:
        return Entry(firmware.entry, True, dtb_at, info_at)
    assert kernel is not None
    return Entry(kernel.entry, False, dtb_at, 0)


def _fw_dynamic_info(kernel: _Loaded | None) -> bytes:
    next_addr = kernel.entry if kernel is not None else 0
    return FW_DYNAMIC_INFO.pack(FW_DYNAMIC_MAGIC, 2, next_addr, FW_NEXT_MODE_S, 0, 0)


def _load(memory: GuestMemory, path: str, at: int, what: str) -> _Loaded:
    """An ELF where its headers say; a kernel image where its header says; the rest at `at`."""
    data = _read(path, what)
    if data.startswith(b"\x1f\x8b"):
        data = _gunzip(data, memory.size_bytes, path, what)
    if data.startswith(b"\x7fELF"):
        return _load_elf(memory, data, path, what)
    size = len(data)
    if size >= IMAGE_HEADER.size:
        _, _, text_offset, image_size, *_, magic2, _ = IMAGE_HEADER.unpack_from(data)
        if magic2 == int.from_bytes(IMAGE_MAGIC2, "little"):
            size = max(size, image_size)
            if what == "kernel" and at == RAM_BASE + KERNEL_ALIGN and text_offset:
                at = RAM_BASE + text_offset
    _check_fits(memory, at, size, path, what)
    memory.write(at, data)
    return _Loaded(at, at + size)


def _load_elf(memory: GuestMemory, data: bytes, path: str, what: str) -> _Loaded:
    try:
        elf = ELFFile(io.BytesIO(data))
        if elf.header["e_machine"] != "EM_RISCV" or elf.elfclass != 64:
            raise UsageError(f"{what} {path}: not a program for 64-bit RISC-V")
        segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD" and s["p_memsz"]]
        entry = int(elf.header["e_entry"])
        start = None
        end = 0
        for segment in segments:
            at, size = int(segment["p_paddr"]), int(segment["p_memsz"])
            _check_fits(memory, at, size, path, what)
            content = segment.data()[:size]
            memory.write(at, content)
            _zero(memory, at + len(content), size - len(content))
            end = max(end, at + size)
            offset = entry - int(segment["p_vaddr"])
            if 0 <= offset < size:
                start = at + offset
    except (ELFError, ValueError, KeyError, struct.error) as error:
        raise UsageError(f"{what} {path}: a broken ELF file: {error}") from error
    if not segments:
        raise UsageError(f"{what} {path}: an ELF file with nothing to load")
    return _Loaded(entry if start is None else start, end)


def _zero(memory: GuestMemory, at: int, size: int) -> None:
    """Clear [at, at + size), leaving alone what is zero already (untouched pages stay so)."""
    step = MIB
    for start in range(at, at + size, step):
        part = min(step, at + size - start)
        if memory.read(start, part).count(0) != part:
            memory.write(start, bytes(part))


def _check_fits(memory: GuestMemory, at: int, size: int, path: str, what: str) -> None:
    try:
        memory.slot_at(at, size)
    except UsageError:
        raise UsageError(
            f"{what} {path}: {format_size(size)} at {at:#x} do not fit into the memory "
            f"({format_size(memory.size_bytes)} in all)"
        ) from None


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise HostError(f"{what} {path}: {error.strerror}") from error


def _gunzip(data: bytes, limit: int, path: str, what: str) -> bytes:
    """Raises UsageError for what is broken or larger than the guest's memory."""
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        plain = unpacker.decompress(data, limit)
    except zlib.error as error:
        raise UsageError(f"{what} {path}: broken gzip data: {error}") from error
    if not unpacker.eof:
        raise UsageError(
            f"{what} {path}: gzip data that end early or unpack to more than the guest's "
            f"{format_size(limit)} of memory"
        )
    return plain


def _align_up(value: int, align: int) -> int:
    return -(-value // align) * align

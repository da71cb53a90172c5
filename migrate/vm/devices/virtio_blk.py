"""virtio-blk over a raw image (layer 2).

Reads and writes go straight between the image and guest memory; flush is fdatasync. Without a
negotiated flush every write is made stable before it completes.
Source: Virtual I/O Device (VIRTIO) 1.2, section 5.2.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final

from migrate.errors import HostError
from migrate.units import Gpa
from migrate.vm.definition import DiskSpec
from migrate.vm.devices.base import IrqLine
from migrate.vm.devices.virtio_mmio import QUEUE_NUM_MAX, VirtioMmio
from migrate.vm.devices.virtio_ring import (
    Chain,
    DmaMemory,
    Ring,
    RingError,
    Segment,
    drop_back,
    drop_front,
    total_size,
)
from migrate.vm.state import Field

SECTOR: Final = 512
HEADER: Final = struct.Struct("<IIQ")
"""struct virtio_blk_req: type, reserved, sector."""
CONFIG: Final = struct.Struct("<QIIHBBI")
"""struct virtio_blk_config up to blk_size."""
assert CONFIG.size == 24

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
T_IN, T_OUT, T_FLUSH, T_GET_ID = 0, 1, 4, 8
S_OK, S_IOERR, S_UNSUPP = b"\0", b"\1", b"\2"
ID_BYTES: Final = 20


class Image:
    """A raw disk image, open. Raises HostError."""

    def __init__(self, spec: DiskSpec) -> None:
        self.path = spec.path
        self.readonly = spec.readonly
        flags = os.O_RDONLY if spec.readonly else os.O_RDWR
        try:
            self.fd = os.open(Path(spec.path), flags | os.O_CLOEXEC)
        except OSError as error:
            how = "reading" if spec.readonly else "reading and writing"
            raise HostError(
                f"disk image {spec.path}: cannot be opened for {how}: {error.strerror}"
            ) from error
        self.sectors = os.lseek(self.fd, 0, os.SEEK_END) // SECTOR

    def transfer(
        self, call: Callable[[int, list[memoryview], int], int], views: list[memoryview], at: int
    ) -> None:
        """`call` (os.preadv or os.pwritev) until `views` are done. Raises OSError."""
        while views:
            done = call(self.fd, views, at)
            if done <= 0:
                raise OSError(f"{self.path}: short transfer")
            at += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]

    def sync(self) -> None:
        """Raises OSError."""
        if not self.readonly:
            os.fdatasync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class VirtioBlk(VirtioMmio):
    """A disk. `serial` is what GET_ID answers."""

    KIND = "virtio-blk"
    VERSION = 1
    DEVICE_ID: ClassVar[int] = 2
    QUEUES: ClassVar[int] = 1
    FIELDS = (
        *VirtioMmio.TRANSPORT_FIELDS,
        Field("sectors", int),
        Field("readonly", bool),
    )

    def __init__(
        self, memory: DmaMemory, irq: IrqLine, image: Image, serial: str, *, legacy: bool = False
    ) -> None:
        self._image = image
        self._serial = serial.encode("ascii")[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.sectors = image.sectors
        self.readonly = image.readonly
        self._config = CONFIG.pack(image.sectors, 0, QUEUE_NUM_MAX - 2, 0, 0, 0, SECTOR)
        super().__init__(memory, irq, legacy=legacy)

    def after_load(self) -> None:
        self.refuse_unless(
            self.sectors == self._image.sectors and self.readonly == self._image.readonly,
            f"the guest's disk has {self.sectors} sectors (read-only: {self.readonly}); "
            f"{self._image.path} has {self._image.sectors} (read-only: {self._image.readonly})",
        )
        super().after_load()

    def device_features(self) -> int:
        return F_SEG_MAX | F_BLK_SIZE | F_FLUSH | (F_RO if self.readonly else 0)

    def config(self) -> bytes:
        return self._config

    def handle(self, queue: int, ring: Ring, head: int) -> int:
        chain = ring.chain(head)
        if total_size(chain.readable) < HEADER.size or not chain.writable:
            raise RingError("a request without header or without status")
        header = b"".join(self._memory.read(s.gpa, min(s.size, 16)) for s in chain.readable[:16])
        kind, _, sector = HEADER.unpack(header[: HEADER.size])
        last = chain.writable[-1]
        # The length comes before the transfer: what a short one wrote does not count.
        written = 1
        try:
            status, payload = self._serve(kind, sector, chain)
            written += payload
        except OSError:
            status = S_IOERR
        self._memory.write(Gpa(last.gpa + last.size - 1), status)
        return written

    def _serve(self, kind: int, sector: int, chain: Chain) -> tuple[bytes, int]:
        """Status, and bytes put into the writable buffers before it. Raises OSError."""
        source = drop_front(chain.readable, HEADER.size)
        target = drop_back(chain.writable, 1)
        if kind == T_IN:
            size = total_size(target)
            if not self._fits(sector, size):
                return S_IOERR, 0
            self._read(sector, target)
            return S_OK, size
        if kind == T_OUT:
            if self.readonly or not self._fits(sector, total_size(source)):
                return S_IOERR, 0
            self._write(sector, source)
            return S_OK, 0
        if kind == T_FLUSH:
            self._image.sync()
            return S_OK, 0
        if kind == T_GET_ID:
            left = self._serial
            for segment in target:
                self._memory.write(segment.gpa, left[: segment.size])
                left = left[segment.size :]
            return S_OK, ID_BYTES - len(left)
        return S_UNSUPP, 0

    def _fits(self, sector: int, size: int) -> bool:
        return size % SECTOR == 0 and sector + size // SECTOR <= self.sectors

    def _read(self, sector: int, target: tuple[Segment, ...]) -> None:
        views = [self._memory.view(segment.gpa, segment.size) for segment in target]
        try:
            self._image.transfer(os.preadv, list(views), sector * SECTOR)
        finally:
            for view in views:
                view.release()
            for segment in target:
                self._memory.wrote(segment.gpa, segment.size)

    def _write(self, sector: int, source: tuple[Segment, ...]) -> None:
        views = [self._memory.view(segment.gpa, segment.size) for segment in source]
        try:
            self._image.transfer(os.pwritev, list(views), sector * SECTOR)
        finally:
            for view in views:
                view.release()
        if not self.driver_features & F_FLUSH:
            self._image.sync()

    def quiesce(self) -> None:
        """Make everything written so far stable. Raises HostError."""
        try:
            self._image.sync()
        except OSError as error:
            raise HostError(f"disk image {self._image.path}: {error.strerror}") from error

    def close(self) -> None:
        self._image.close()

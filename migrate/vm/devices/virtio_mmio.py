"""virtio over MMIO (layer 2): the transport's registers, modern (version 2) or legacy (1).

Requests are handled inside the write to QueueNotify, to their end: between two instructions of
the guest nothing is in flight, so the registers below are all the state there is.
Source: Virtual I/O Device (VIRTIO) 1.2, section 4.2.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Final

from migrate.vm.devices.base import MASK32, IrqLine, MmioDevice, read_part
from migrate.vm.devices.virtio_ring import DmaMemory, Ring, RingError
from migrate.vm.state import Field

MAGIC: Final = 0x7472_6976
VENDOR: Final = 0x554D_4551
"""What QEMU's board says; some drivers insist on it."""
QUEUE_NUM_MAX: Final = 256
F_VERSION_1: Final = 1 << 32
STATUS_FEATURES_OK, STATUS_NEEDS_RESET = 8, 0x40
STATUS_DRIVER_OK: Final = 4
INTERRUPT_RING, INTERRUPT_CONFIG = 1, 2

_ADDRESSES: Final = {0x80: "queue_desc", 0x90: "queue_avail", 0xA0: "queue_used"}


class VirtioMmio(MmioDevice):
    """One virtio-mmio slot. Subclasses say which device it is and handle its requests."""

    SIZE: ClassVar[int] = 0x1000
    DEVICE_ID: ClassVar[int]
    QUEUES: ClassVar[int]
    TRANSPORT_FIELDS: ClassVar[tuple[Field, ...]] = (
        Field("legacy", bool),
        Field("status", int, bits=8),
        Field("interrupt", int, bits=2),
        Field("device_features_sel", int, bits=32),
        Field("driver_features_sel", int, bits=32),
        Field("driver_features", int, bits=64),
        Field("guest_page_size", int, bits=32),
        Field("queue_sel", int, bits=32),
        Field("queue_num", list, bits=16, max_length=16),
        Field("queue_ready", list, bits=1, max_length=16),
        Field("queue_align", list, bits=32, max_length=16),
        Field("queue_desc", list, max_length=16),
        Field("queue_avail", list, max_length=16),
        Field("queue_used", list, max_length=16),
        Field("queue_last_avail", list, bits=16, max_length=16),
        Field("queue_next_used", list, bits=16, max_length=16),
    )

    def __init__(self, memory: DmaMemory, irq: IrqLine, *, legacy: bool = False) -> None:
        self._memory = memory
        self._irq = irq
        self.legacy = legacy
        self.reset()

    @abstractmethod
    def device_features(self) -> int:
        """Feature bits of the device itself."""

    @abstractmethod
    def config(self) -> bytes:
        """The device's configuration space."""

    @abstractmethod
    def handle(self, queue: int, ring: Ring, head: int) -> int:
        """Serve one request; the bytes written to its buffers. Raises RingError."""

    def reset(self) -> None:
        self.status = 0
        self.interrupt = 0
        self.device_features_sel = 0
        self.driver_features_sel = 0
        self.driver_features = 0
        self.guest_page_size = 0
        self.queue_sel = 0
        queues = self.QUEUES
        self.queue_num = [QUEUE_NUM_MAX if self.legacy else 0] * queues
        self.queue_ready = [0] * queues
        self.queue_align = [4096] * queues
        self.queue_desc = [0] * queues
        self.queue_avail = [0] * queues
        self.queue_used = [0] * queues
        self.queue_last_avail = [0] * queues
        self.queue_next_used = [0] * queues
        self._irq(False)

    def after_load(self) -> None:
        for field in self.TRANSPORT_FIELDS:
            if field.type is list:
                length = len(getattr(self, field.name))
                self.refuse_unless(length == self.QUEUES, f"{field.name} of {length} queues")
        for queue in range(self.QUEUES):
            num = self.queue_num[queue]
            self.refuse_unless(num <= QUEUE_NUM_MAX, f"a queue of {num} entries")
            self.refuse_unless(
                not self.queue_ready[queue] or (num > 0 and num & (num - 1) == 0),
                f"a ready queue of {num} entries",
            )
        self._irq(self.interrupt != 0)

    def mmio_read(self, offset: int, size: int) -> int:
        if offset >= 0x100:
            return read_part(int.from_bytes(self.config(), "little"), offset - 0x100, size)
        queue = self.queue_sel if self.queue_sel < self.QUEUES else None
        match offset:
            case 0x00:
                return MAGIC
            case 0x04:
                return 1 if self.legacy else 2
            case 0x08:
                return self.DEVICE_ID
            case 0x0C:
                return VENDOR
            case 0x10:
                return read_part(self._offered(), 4 * min(self.device_features_sel, 2), 4)
            case 0x34:
                return 0 if queue is None else QUEUE_NUM_MAX
            case 0x40 if self.legacy and queue is not None and self.guest_page_size:
                return self.queue_desc[queue] // self.guest_page_size
            case 0x44 if not self.legacy and queue is not None:
                return self.queue_ready[queue]
            case 0x60:
                return self.interrupt
            case 0x70:
                return self.status
            case 0xB0 | 0xB4 | 0xB8 | 0xBC:
                return MASK32  # no shared memory regions
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        queue = self.queue_sel if self.queue_sel < self.QUEUES else None
        value &= MASK32
        match offset:
            case 0x14:
                self.device_features_sel = value
            case 0x20:
                self._set_driver_features(value)
            case 0x24:
                self.driver_features_sel = value
            case 0x30:
                self.queue_sel = value
            case 0x50:
                if value < self.QUEUES:
                    self._notify(value)
            case 0x64:
                self.interrupt &= ~value
                self._irq(self.interrupt != 0)
            case 0x70:
                self._set_status(value & 0xFF)
            case 0x38 if queue is not None:
                if 0 < value <= QUEUE_NUM_MAX and value & (value - 1) == 0:
                    self.queue_num[queue] = value
            case 0x28 if self.legacy:
                self.guest_page_size = value
            case 0x3C if self.legacy and queue is not None:
                self.queue_align[queue] = value
            case 0x40 if self.legacy and queue is not None:
                self._set_pfn(queue, value)
            case 0x44 if not self.legacy and queue is not None:
                self._set_ready(queue, bool(value & 1))
            case _ if not self.legacy and queue is not None and offset & ~4 in _ADDRESSES:
                if not self.queue_ready[queue]:
                    addresses = getattr(self, _ADDRESSES[offset & ~4])
                    shift = 32 if offset & 4 else 0
                    addresses[queue] = (addresses[queue] & ~(MASK32 << shift)) | value << shift

    def _offered(self) -> int:
        return self.device_features() | (0 if self.legacy else F_VERSION_1)

    def _set_driver_features(self, value: int) -> None:
        if self.driver_features_sel > 1 or self.status & STATUS_FEATURES_OK:
            return
        shift = 32 * self.driver_features_sel
        self.driver_features = (self.driver_features & ~(MASK32 << shift)) | value << shift

    def _set_status(self, value: int) -> None:
        if value == 0:
            # Legacy drivers set the page size once, before they reset the device.
            page_size = self.guest_page_size
            self.reset()
            self.guest_page_size = page_size
            return
        # VERSION_1 is not insisted on: xv6's driver, for one, never looks at that half.
        if not self.status & STATUS_FEATURES_OK and self.driver_features & ~self._offered():
            value &= ~STATUS_FEATURES_OK
        self.status = value | self.status & STATUS_NEEDS_RESET

    def _set_pfn(self, queue: int, pfn: int) -> None:
        num = self.queue_num[queue]
        desc = pfn * self.guest_page_size
        align = max(self.queue_align[queue], 1)
        avail = desc + 16 * num
        self.queue_desc[queue] = desc
        self.queue_avail[queue] = avail
        self.queue_used[queue] = -(-(avail + 6 + 2 * num) // align) * align
        self._set_ready(queue, pfn != 0)

    def _set_ready(self, queue: int, ready: bool) -> None:
        if ready and not self.queue_ready[queue] and self.queue_num[queue]:
            self.queue_last_avail[queue] = 0
            self.queue_next_used[queue] = 0
            self.queue_ready[queue] = 1
        elif not ready:
            self.queue_ready[queue] = 0

    def _notify(self, queue: int) -> None:
        if not self.queue_ready[queue] or self.status & STATUS_NEEDS_RESET:
            return
        ring = Ring(
            self._memory, self.queue_num[queue], self.queue_desc[queue],
            self.queue_avail[queue], self.queue_used[queue],
        )  # fmt: skip
        try:
            waiting = ring.available(self.queue_last_avail[queue])
            for _ in range(waiting):
                head = ring.head(self.queue_last_avail[queue])
                written = self.handle(queue, ring, head)
                ring.push_used(self.queue_next_used[queue], head, written)
                self.queue_last_avail[queue] = (self.queue_last_avail[queue] + 1) & 0xFFFF
                self.queue_next_used[queue] = (self.queue_next_used[queue] + 1) & 0xFFFF
            if waiting and ring.wants_interrupt():
                self._interrupt(INTERRUPT_RING)
        except RingError:
            self.status |= STATUS_NEEDS_RESET
            self._interrupt(INTERRUPT_CONFIG)

    def _interrupt(self, cause: int) -> None:
        self.interrupt |= cause
        self._irq(True)


class VirtioEmpty(VirtioMmio):
    """A slot with nothing in it: device 0, which drivers pass over."""

    KIND = "virtio-empty"
    VERSION = 1
    FIELDS = VirtioMmio.TRANSPORT_FIELDS
    DEVICE_ID = 0
    QUEUES = 0

    def device_features(self) -> int:
        return 0

    def config(self) -> bytes:
        return b""

    def handle(self, queue: int, ring: Ring, head: int) -> int:
        raise RingError("nothing is plugged in here")

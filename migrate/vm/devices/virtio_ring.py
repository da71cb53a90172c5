"""Split virtqueues in guest memory (layer 2): what the guest wrote there is not trusted.

Source: Virtual I/O Device (VIRTIO) 1.2, section 2.7.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Protocol

from migrate.errors import UsageError
from migrate.units import Gpa

DESC: Final = struct.Struct("<QIHH")
"""struct virtq_desc: addr, len, flags, next."""
assert DESC.size == 16

DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT = 1, 2, 4
AVAIL_F_NO_INTERRUPT = 1
MAX_CHAIN_BYTES: Final = 1 << 30


class DmaMemory(Protocol):
    """What devices need of guest memory (migrate.vm.memory.GuestMemory).

    Addresses outside of it raise UsageError.
    """

    def read(self, gpa: Gpa, size: int) -> bytes: ...

    def write(self, gpa: Gpa, data: bytes) -> None: ...

    def view(self, gpa: Gpa, size: int) -> memoryview: ...

    def wrote(self, gpa: Gpa, size: int) -> None: ...


class RingError(Exception):
    """The driver broke the rules; the device stops until it is reset."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A descriptor's buffer, known to lie in guest memory."""

    gpa: Gpa
    size: int


@dataclass(frozen=True, slots=True)
class Chain:
    """One request: the buffers that the device reads, then those that it writes."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]


class Ring:
    """One queue of `num` entries at three guest addresses."""

    def __init__(self, memory: DmaMemory, num: int, desc: int, avail: int, used: int) -> None:
        self._memory = memory
        self._num = num
        self._desc = desc
        self._avail = avail
        self._used = used

    def _read(self, gpa: int, size: int) -> bytes:
        try:
            return self._memory.read(Gpa(gpa), size)
        except UsageError as error:
            raise RingError(str(error)) from None

    def _write(self, gpa: int, data: bytes) -> None:
        try:
            self._memory.write(Gpa(gpa), data)
        except UsageError as error:
            raise RingError(str(error)) from None

    def available(self, last: int) -> int:
        """Requests that wait after index `last`. Raises RingError for more than fit."""
        index = int.from_bytes(self._read(self._avail + 2, 2), "little")
        waiting = (index - last) & 0xFFFF
        if waiting > self._num:
            raise RingError(f"{waiting} requests in a queue of {self._num}")
        return waiting

    def head(self, index: int) -> int:
        """The first descriptor of the request at `index` of the available ring."""
        slot = self._avail + 4 + 2 * (index % self._num)
        return int.from_bytes(self._read(slot, 2), "little")

    def chain(self, head: int) -> Chain:
        """Follow the descriptors from `head`; at most `num` of them. Raises RingError."""
        readable: list[Segment] = []
        writable: list[Segment] = []
        index, total = head, 0
        for _ in range(self._num):
            if index >= self._num:
                raise RingError(f"descriptor {index} in a queue of {self._num}")
            gpa, size, flags, following = DESC.unpack(self._read(self._desc + 16 * index, 16))
            if flags & DESC_F_INDIRECT:
                raise RingError("an indirect descriptor, which was not offered")
            if not flags & DESC_F_WRITE and writable:
                raise RingError("a readable descriptor after a writable one")
            total += size
            if total > MAX_CHAIN_BYTES:
                raise RingError("a request of more than 1 GiB")
            if size:
                self._check(gpa, size)
                (writable if flags & DESC_F_WRITE else readable).append(Segment(Gpa(gpa), size))
            if not flags & DESC_F_NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = following
        raise RingError("the descriptors form a loop")

    def _check(self, gpa: int, size: int) -> None:
        try:
            self._memory.view(Gpa(gpa), size).release()
        except UsageError as error:
            raise RingError(str(error)) from None

    def push_used(self, index: int, head: int, written: int) -> None:
        """Hand request `head` back as entry `index` of the used ring."""
        slot = self._used + 4 + 8 * (index % self._num)
        self._write(slot, struct.pack("<II", head, written))
        self._write(self._used + 2, struct.pack("<H", (index + 1) & 0xFFFF))

    def wants_interrupt(self) -> bool:
        flags = int.from_bytes(self._read(self._avail, 2), "little")
        return not flags & AVAIL_F_NO_INTERRUPT


def drop_front(segments: tuple[Segment, ...], size: int) -> tuple[Segment, ...]:
    """`segments` without their first `size` bytes."""
    left: list[Segment] = []
    for segment in segments:
        if size >= segment.size:
            size -= segment.size
        else:
            left.append(Segment(Gpa(segment.gpa + size), segment.size - size))
            size = 0
    return tuple(left)


def drop_back(segments: tuple[Segment, ...], size: int) -> tuple[Segment, ...]:
    """`segments` without their last `size` bytes."""
    left: list[Segment] = []
    for segment in reversed(segments):
        if size >= segment.size:
            size -= segment.size
        else:
            left.append(Segment(segment.gpa, segment.size - size))
            size = 0
    return tuple(reversed(left))


def total_size(segments: tuple[Segment, ...]) -> int:
    return sum(segment.size for segment in segments)

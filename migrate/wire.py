"""The wire format: stream header, frames, and the payload of each frame (layer 2, pure).

Bytes in, values out and back; no socket, no clock. `docs/protocol.md` has the same layouts as byte
tables, and a test compares them with the structs here. Which frame may come when is
`session.py`'s business.

A stream is one stream header a side, then frames. Every frame has a fixed header with its own
checksum, a *meta* part (checksummed) and a *bulk* part: the pages, which go from the guest's
memory to the socket and back without a copy. Bulk carries no checksum of its own, since a
running guest changes raw pages while the kernel reads them; the page hashes that both sides keep
(`codec.py`) are compared before the handover instead.

Functions ending in `_untrusted` parse what a peer sent and raise PeerError only.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import numpy as np

from migrate.errors import PeerError
from migrate.pages import Ranges
from migrate.units import MIB, PAGE_SIZE

MAJOR: Final = 1
MINOR: Final = 0
STREAM_MAGIC: Final = b"\x89MIGR\r\n\x1a"
FRAME_MAGIC: Final = b"MGRF"

STREAM_HEADER: Final = struct.Struct("<8sHHHHQQII")
"""magic, major, minor, header bytes, role, features offered, features required, reserved, crc32."""
FRAME_HEADER: Final = struct.Struct("<4sHHIIQII")
"""magic, type, flags, sequence, meta bytes, bulk bytes, crc32 of meta, crc32 of the header."""
PAGES_META: Final = struct.Struct("<HBBII")
"""slot, encoding, reserved, ranges, pages; then a RANGE each."""
RANGE: Final = struct.Struct("<II")
"""first page, pages."""
assert STREAM_HEADER.size == 40
assert FRAME_HEADER.size == 32
assert PAGES_META.size == 12

FLAG_OPTIONAL: Final = 1
"""A reader that does not know the type skips the frame."""

BATCH_PAGES: Final = 1024
"""Pages of one PAGES frame at most: 4 MiB, which the last-level cache holds until it is sent."""
MAX_RANGES: Final = 65536


class Role(enum.IntEnum):
    """Who sent the stream header."""

    SOURCE = 1
    DESTINATION = 2

    @property
    def label(self) -> str:
        return self.name.lower()


class Feature(enum.IntFlag):
    """What a side understands beyond the core of version 1."""

    ZSTD = 1
    PAGE_HASHES = 2


FEATURES: Final = Feature.ZSTD | Feature.PAGE_HASHES
REQUIRED: Final = Feature.PAGE_HASHES
"""What neither side can do without: bulk has no other checksum than the page hashes."""


class FrameType(enum.IntEnum):
    """Type numbers are part of the format: never renumber, never reuse."""

    CONFIGURE = 0x10
    CONFIGURED = 0x11
    ROUND = 0x20
    PAGES = 0x21
    ZERO = 0x22
    ROUND_END = 0x23
    ROUND_ACK = 0x24
    FINAL = 0x28
    STATE = 0x30
    LOADED = 0x31
    HANDOVER = 0x40
    RUNNING = 0x41
    ERROR = 0x50


class Encoding(enum.IntEnum):
    """How the bulk of a PAGES frame holds its pages."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a frame's two parts may hold, in bytes."""

    meta_bytes: int
    bulk_bytes: int = 0


LIMITS: Final[dict[FrameType, Limits]] = {
    FrameType.CONFIGURE: Limits(MIB),
    FrameType.CONFIGURED: Limits(4096),
    FrameType.ROUND: Limits(4096),
    FrameType.PAGES: Limits(PAGES_META.size + BATCH_PAGES * RANGE.size, BATCH_PAGES * PAGE_SIZE),
    FrameType.ZERO: Limits(PAGES_META.size + MAX_RANGES * RANGE.size),
    FrameType.ROUND_END: Limits(4096),
    FrameType.ROUND_ACK: Limits(4096),
    FrameType.FINAL: Limits(4096),
    FrameType.STATE: Limits(8 * MIB),
    FrameType.LOADED: Limits(4096),
    FrameType.HANDOVER: Limits(4096),
    FrameType.RUNNING: Limits(4096),
    FrameType.ERROR: Limits(4096),
}
UNKNOWN_OPTIONAL: Final = Limits(MIB, MIB)
"""What an optional frame of a type unknown here may hold; it is read and dropped."""
MAX_CONTAINERS: Final = 4096
"""Lists and maps in one control frame: a byte on the wire may be 64 in memory as an empty list."""


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """What a side says first."""

    role: Role
    major: int = MAJOR
    minor: int = MINOR
    features: int = int(FEATURES)
    required: int = 0


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fixed part of a frame; `type` is None for an optional frame of an unknown type."""

    type: FrameType | None
    sequence: int
    meta_bytes: int
    bulk_bytes: int
    meta_crc: int


def encode_stream_header(header: StreamHeader) -> bytes:
    """40 bytes."""
    body = STREAM_HEADER.pack(
        STREAM_MAGIC, header.major, header.minor, STREAM_HEADER.size, header.role,
        header.features, header.required, 0, 0,
    )[:-4]  # fmt: skip
    return body + struct.pack("<I", zlib.crc32(body))


def decode_stream_header_untrusted(data: bytes) -> StreamHeader:
    """The header in exactly 40 bytes."""
    if len(data) != STREAM_HEADER.size:
        raise PeerError(f"a stream header of {len(data)} bytes; it has {STREAM_HEADER.size}")
    magic, major, minor, size, role, features, required, _reserved, crc = STREAM_HEADER.unpack(data)
    if magic != STREAM_MAGIC:
        raise PeerError("this is not a migration stream (wrong magic)")
    if crc != zlib.crc32(data[:-4]):
        raise PeerError("the stream header is damaged (checksum)")
    if major != MAJOR:
        raise PeerError(f"it speaks version {major}.{minor}; this program speaks {MAJOR}.{MINOR}")
    if size != STREAM_HEADER.size or role not in (Role.SOURCE, Role.DESTINATION):
        raise PeerError("the stream header has an unknown size or role")
    missing = required & ~int(FEATURES)
    if missing:
        raise PeerError(f"it requires features that this program lacks (bits {missing:#x})")
    return StreamHeader(Role(role), major, minor, features, required)


def encode_frame(
    kind: FrameType, sequence: int, meta: bytes = b"", bulk_bytes: int = 0, *, flags: int = 0
) -> bytes:
    """Header and meta; the caller sends the bulk itself, from where it lies."""
    head = FRAME_HEADER.pack(
        FRAME_MAGIC, kind, flags, sequence & 0xFFFF_FFFF, len(meta), bulk_bytes, zlib.crc32(meta), 0
    )[:-4]
    return b"".join((head, struct.pack("<I", zlib.crc32(head)), meta))


def decode_frame_header_untrusted(data: bytes | bytearray, expected_sequence: int) -> FrameHeader:
    """The header in exactly 32 bytes, its lengths within the limits of its type."""
    if len(data) != FRAME_HEADER.size:
        raise PeerError(f"a frame header of {len(data)} bytes; it has {FRAME_HEADER.size}")
    magic, kind, flags, sequence, meta_bytes, bulk_bytes, meta_crc, crc = FRAME_HEADER.unpack(data)
    if magic != FRAME_MAGIC or crc != zlib.crc32(data[:-4]):
        raise PeerError("a frame header is damaged (magic or checksum)")
    if sequence != expected_sequence & 0xFFFF_FFFF:
        raise PeerError(f"frame {sequence} where {expected_sequence & 0xFFFF_FFFF} was due")
    if flags & ~FLAG_OPTIONAL:
        raise PeerError(f"a frame of type {kind:#x} has unknown flags {flags:#x}")
    try:
        known: FrameType | None = FrameType(kind)
        limits = LIMITS[FrameType(kind)]
    except ValueError:
        if not flags & FLAG_OPTIONAL:
            raise PeerError(f"a mandatory frame of unknown type {kind:#x}") from None
        known, limits = None, UNKNOWN_OPTIONAL
    if meta_bytes > limits.meta_bytes or bulk_bytes > limits.bulk_bytes:
        raise PeerError(
            f"a frame of type {kind:#x} claims {meta_bytes} + {bulk_bytes} bytes;"
            f" {limits.meta_bytes} + {limits.bulk_bytes} are the most"
        )
    return FrameHeader(known, sequence, meta_bytes, bulk_bytes, meta_crc)


def check_meta_untrusted(header: FrameHeader, meta: bytes | bytearray | memoryview) -> None:
    """The meta part is what its sender checksummed."""
    if zlib.crc32(meta) != header.meta_crc:
        kind = header.type.name if header.type else "optional"
        raise PeerError(f"the meta part of a {kind} frame is damaged (checksum)")


def pack(value: dict[str, Any]) -> bytes:
    """The meta part of a control frame."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack_untrusted(
    meta: bytes | memoryview, what: str, **types: type | tuple[type, ...]
) -> dict[str, Any]:
    """A control frame's map with at least the named fields, of the named types.

    Further fields are ignored: a later minor version may add some.
    """
    spend = _container_budget()
    try:
        # A list is allocated by the length that it claims, before its items are read. Only
        # lengths that the bytes bear out get that far: skipping builds nothing.
        size = len(meta) or 1
        skipping = msgpack.Unpacker(read_size=min(1024, size), max_buffer_size=size)
        skipping.feed(meta)
        skipping.skip()
        value = msgpack.unpackb(
            meta, raw=False, max_ext_len=0, max_map_len=4096, list_hook=spend, object_hook=spend
        )
    except Exception as error:
        # msgpack raises ValueError, its subclasses, and for hostile nesting StackError.
        raise PeerError(f"{what} is not valid msgpack ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise PeerError(f"{what} is not a map")
    for name, wanted in types.items():
        found = value.get(name)
        if name not in value or not isinstance(found, wanted):
            raise PeerError(f"{what}: field {name!r} is missing or of the wrong type")
        if isinstance(found, bool) and wanted is int:
            raise PeerError(f"{what}: field {name!r} is of the wrong type")
    return value


def _container_budget() -> Callable[[Any], Any]:
    """Passes on what msgpack built, MAX_CONTAINERS times."""
    left = MAX_CONTAINERS

    def spend(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many lists and maps")
        return container

    return spend


def encode_pages_meta(slot: int, encoding: Encoding, ranges: Ranges) -> bytes:
    """Meta of a PAGES or ZERO frame. `ranges`: int64 (k, 2), rows [first, end)."""
    table = np.empty(ranges.shape, dtype="<u4")
    table[:, 0] = ranges[:, 0]
    table[:, 1] = ranges[:, 1] - ranges[:, 0]
    pages = int(table[:, 1].sum(dtype=np.int64))
    return PAGES_META.pack(slot, encoding, 0, len(ranges), pages) + table.tobytes()


@dataclass(frozen=True, slots=True)
class PagesMeta:
    """Which pages a PAGES or ZERO frame speaks of."""

    slot: int
    encoding: Encoding
    ranges: Ranges
    n_pages: int


def decode_pages_meta_untrusted(
    header: FrameHeader, meta: bytes | memoryview, slot_pages: tuple[int, ...]
) -> PagesMeta:
    """Ranges ascending, disjoint, inside the slot, and no more bulk than they can fill.

    `slot_pages`: the size of each slot of the machine, in pages.
    """
    if len(meta) < PAGES_META.size:
        raise PeerError("a PAGES frame is too short")
    slot, encoding, _, n_ranges, n_pages = PAGES_META.unpack_from(meta)
    if slot >= len(slot_pages):
        raise PeerError(f"pages for memory slot {slot}; the machine has {len(slot_pages)}")
    if len(meta) != PAGES_META.size + n_ranges * RANGE.size or n_ranges == 0:
        raise PeerError("a PAGES frame's length and its ranges disagree")
    if encoding not in (Encoding.RAW, Encoding.ZSTD):
        raise PeerError(f"pages in unknown encoding {encoding}")
    table = np.frombuffer(meta, dtype="<u4", offset=PAGES_META.size).reshape(-1, 2)
    ranges = np.empty(table.shape, dtype=np.int64)
    ranges[:, 0] = table[:, 0]
    ranges[:, 1] = ranges[:, 0] + table[:, 1]
    if (
        int(ranges[-1, 1]) > slot_pages[slot]
        or bool((ranges[:, 1] <= ranges[:, 0]).any())
        or bool((ranges[1:, 0] < ranges[:-1, 1]).any())
    ):
        raise PeerError(f"pages outside of memory slot {slot}, or out of order")
    total = int((ranges[:, 1] - ranges[:, 0]).sum())
    if total != n_pages:
        raise PeerError(f"a frame claims {n_pages} pages, its ranges hold {total}")
    if header.type is FrameType.PAGES:
        if n_pages > BATCH_PAGES:
            raise PeerError(f"a PAGES frame of {n_pages} pages; {BATCH_PAGES} are the most")
        whole = n_pages * PAGE_SIZE
        if encoding == Encoding.RAW and header.bulk_bytes != whole:
            raise PeerError(f"{n_pages} raw pages in {header.bulk_bytes} bytes")
        if encoding == Encoding.ZSTD and not 0 < header.bulk_bytes < whole:
            raise PeerError(f"{n_pages} compressed pages in {header.bulk_bytes} bytes")
    elif encoding != Encoding.RAW:
        raise PeerError("zero pages that are compressed")
    return PagesMeta(slot, Encoding(encoding), ranges, n_pages)

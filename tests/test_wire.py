"""The wire format: golden bytes, and decoders on whatever a peer may send."""

from __future__ import annotations

import contextlib
import struct
import zlib
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate import wire
from migrate.errors import PeerError
from migrate.units import MIB, PAGE_SIZE
from migrate.wire import BATCH_PAGES, LIMITS, Encoding, FrameHeader, FrameType, Role
from tests.links import ERRORS, SESSION, Vector, peak_bytes

STREAM_HEADERS = [v for v in SESSION if v.frame == "stream header"]
FRAMES = [v for v in SESSION + ERRORS if v.frame in FrameType.__members__]
SLOT_PAGES = (8, 4)
DAMAGE_BOUND = 64 << 10
"""What refusing a few damaged bytes may allocate."""

u32 = st.integers(0, 2**32 - 1)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def label(vector: Vector) -> str:
    return f"{vector.sender.label} {vector.frame}"


def sequence_of(vector: Vector) -> int:
    return int(struct.unpack_from("<I", vector.head, 8)[0])


def ranges_of(rows: Any) -> wire.Ranges:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def header_for(kind: FrameType, bulk_bytes: int = 0) -> FrameHeader:
    return FrameHeader(kind, 0, 0, bulk_bytes, 0)


def pages_meta(
    slot: int, encoding: int, table: list[tuple[int, int]], n_ranges: int, n_pages: int
) -> bytes:
    """Meta of a PAGES or ZERO frame as anybody might write it; `table` holds (first, pages)."""
    rows = b"".join(wire.RANGE.pack(first, count) for first, count in table)
    return wire.PAGES_META.pack(slot, encoding, 0, n_ranges, n_pages) + rows


# -- golden bytes


def test_the_golden_session_has_every_frame_type() -> None:
    assert {v.frame for v in FRAMES} == set(FrameType.__members__)


@pytest.mark.parametrize("vector", STREAM_HEADERS, ids=label)
def test_stream_header_golden(vector: Vector) -> None:
    header = wire.StreamHeader(vector.sender, required=int(wire.REQUIRED))
    assert wire.encode_stream_header(header) == vector.head
    assert wire.decode_stream_header_untrusted(vector.head) == header


@pytest.mark.parametrize("vector", FRAMES, ids=label)
def test_frame_golden(vector: Vector) -> None:
    kind = FrameType[vector.frame]
    if vector.pages is None:
        assert vector.fields is not None
        meta = wire.pack(vector.fields)
    else:
        ranges = ranges_of(vector.pages["ranges"])
        encoding = Encoding[vector.pages["encoding"]]
        meta = wire.encode_pages_meta(vector.pages["slot"], encoding, ranges)
    sequence = sequence_of(vector)
    assert wire.encode_frame(kind, sequence, meta, len(vector.bulk)) == vector.head

    size = wire.FRAME_HEADER.size
    header = wire.decode_frame_header_untrusted(vector.head[:size], sequence)
    assert header == FrameHeader(kind, sequence, len(meta), len(vector.bulk), zlib.crc32(meta))
    wire.check_meta_untrusted(header, vector.head[size:])
    if vector.pages is None:
        assert wire.unpack_untrusted(vector.head[size:], "it") == vector.fields
    else:
        found = wire.decode_pages_meta_untrusted(header, vector.head[size:], SLOT_PAGES)
        assert (found.slot, found.encoding) == (vector.pages["slot"], encoding)
        assert found.ranges.tolist() == vector.pages["ranges"]
        assert found.n_pages == sum(end - first for first, end in vector.pages["ranges"])


def test_sequence_numbers_wrap() -> None:
    head = wire.encode_frame(FrameType.ROUND, 1 << 32)[: wire.FRAME_HEADER.size]
    assert wire.decode_frame_header_untrusted(head, 1 << 32).sequence == 0


# -- damage


@pytest.mark.parametrize("vector", STREAM_HEADERS, ids=label)
def test_a_stream_header_with_any_bit_flipped_is_refused(vector: Vector) -> None:
    for bit in range(len(vector.head) * 8):
        damaged = bytearray(vector.head)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError):
            wire.decode_stream_header_untrusted(bytes(damaged))


@pytest.mark.parametrize("vector", FRAMES, ids=label)
def test_a_frame_with_any_bit_flipped_before_its_bulk_is_refused(vector: Vector) -> None:
    size = wire.FRAME_HEADER.size
    for bit in range(len(vector.head) * 8):
        damaged = bytearray(vector.head)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError):
            header = wire.decode_frame_header_untrusted(damaged[:size], sequence_of(vector))
            wire.check_meta_untrusted(header, damaged[size:])


def test_headers_of_a_wrong_length_are_refused() -> None:
    for vector in STREAM_HEADERS:
        for data in (b"", vector.head[:-1], vector.head + b"\0"):
            with pytest.raises(PeerError, match="40"):
                wire.decode_stream_header_untrusted(data)
    for vector in FRAMES:
        head = vector.head[: wire.FRAME_HEADER.size]
        for data in (b"", head[:-1], head + b"\0"):
            with pytest.raises(PeerError, match="32"):
                wire.decode_frame_header_untrusted(data, sequence_of(vector))


@given(st.binary(max_size=100))
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(PeerError):
        wire.decode_stream_header_untrusted(data)
    with pytest.raises(PeerError):
        wire.decode_frame_header_untrusted(data, 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"major": 2}, "speaks version 2"),
        ({"required": 1 << 40}, "requires features"),
        ({"role": 3}, "unknown size or role"),
    ],
)
def test_a_stream_header_that_does_not_suit(change: dict[str, Any], match: str) -> None:
    header = wire.StreamHeader(**({"role": Role.SOURCE} | change))
    with pytest.raises(PeerError, match=match):
        wire.decode_stream_header_untrusted(wire.encode_stream_header(header))


def test_a_later_minor_version_and_unknown_features_are_welcome() -> None:
    header = wire.StreamHeader(Role.SOURCE, minor=9, features=2**64 - 1)
    assert wire.decode_stream_header_untrusted(wire.encode_stream_header(header)) == header


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), u32, st.integers(0, 2**64 - 1))
def test_frame_headers_are_held_to_the_limits(
    kind: int, flags: int, meta_bytes: int, bulk_bytes: int
) -> None:
    head = wire.FRAME_HEADER.pack(wire.FRAME_MAGIC, kind, flags, 5, meta_bytes, bulk_bytes, 0, 0)
    head = head[:-4] + struct.pack("<I", zlib.crc32(head[:-4]))
    optional = flags == wire.FLAG_OPTIONAL
    if kind in LIMITS:
        limits = LIMITS[FrameType(kind)]
    else:
        limits = wire.UNKNOWN_OPTIONAL if optional else wire.Limits(-1)
    if flags <= 1 and meta_bytes <= limits.meta_bytes and bulk_bytes <= limits.bulk_bytes:
        header = wire.decode_frame_header_untrusted(head, 5)
        assert (header.meta_bytes, header.bulk_bytes) == (meta_bytes, bulk_bytes)
    else:
        with pytest.raises(PeerError):
            wire.decode_frame_header_untrusted(head, 5)


@pytest.mark.parametrize("kind", list(FrameType), ids=lambda kind: kind.name)
def test_each_type_at_its_limits_and_one_byte_over(kind: FrameType) -> None:
    limits = LIMITS[kind]

    def decode(meta_bytes: int, bulk_bytes: int) -> None:
        head = wire.FRAME_HEADER.pack(wire.FRAME_MAGIC, kind, 0, 0, meta_bytes, bulk_bytes, 0, 0)
        head = head[:-4] + struct.pack("<I", zlib.crc32(head[:-4]))
        wire.decode_frame_header_untrusted(head, 0)

    decode(limits.meta_bytes, limits.bulk_bytes)
    for over in ((1, 0), (0, 1)):
        with pytest.raises(PeerError, match="are the most"):
            decode(limits.meta_bytes + over[0], limits.bulk_bytes + over[1])


# -- page ranges


def valid_pages(
    kind: FrameType,
    bulk: int,
    slot: int,
    encoding: int,
    table: list[tuple[int, int]],
    n_ranges: int,
    n_pages: int,
) -> bool:
    """The rules of docs/protocol.md, spelled out."""
    if slot >= len(SLOT_PAGES) or not table or n_ranges != len(table):
        return False
    past = 0
    for first, count in table:
        if count == 0 or first < past or first + count > SLOT_PAGES[slot]:
            return False
        past = first + count
    if n_pages != sum(count for _, count in table):
        return False
    if kind is FrameType.ZERO:
        return encoding == 0
    whole = n_pages * PAGE_SIZE
    return (encoding == 0 and bulk == whole) or (encoding == 1 and 0 < bulk < whole)


@st.composite
def page_frames(draw: st.DrawFn) -> tuple[Any, ...]:
    """PAGES and ZERO frames that are right or nearly so."""
    bounds = draw(st.lists(st.integers(0, 8), max_size=8, unique=True).map(sorted))
    table = [(a, b - a) for a, b in zip(bounds[::2], bounds[1::2], strict=False)]
    if draw(st.booleans()):
        table = draw(st.lists(st.tuples(st.integers(0, 9) | u32, st.integers(0, 9) | u32)))
    total = sum(count for _, count in table)
    n_pages = draw(st.just(total % 2**32) | st.integers(0, 9))
    n_ranges = draw(st.just(len(table)) | u32)
    bulk = draw(st.sampled_from([n_pages * PAGE_SIZE, n_pages * PAGE_SIZE - 1, 0, 1]))
    kind = draw(st.sampled_from([FrameType.PAGES, FrameType.ZERO]))
    slot, encoding = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return kind, max(bulk, 0), slot, encoding, table, n_ranges, n_pages


@settings(max_examples=200)
@given(page_frames())
def test_page_ranges_against_the_rules(frame: tuple[Any, ...]) -> None:
    kind, bulk, slot, encoding, table, n_ranges, n_pages = frame
    meta = pages_meta(slot, encoding, table, n_ranges, n_pages)
    if valid_pages(*frame):
        found = wire.decode_pages_meta_untrusted(header_for(kind, bulk), meta, SLOT_PAGES)
        assert found.ranges.tolist() == [[first, first + count] for first, count in table]
        assert found.n_pages == n_pages
    else:
        with pytest.raises(PeerError):
            wire.decode_pages_meta_untrusted(header_for(kind, bulk), meta, SLOT_PAGES)


@given(st.binary(max_size=64), st.sampled_from([FrameType.PAGES, FrameType.ZERO]), u32)
def test_random_bytes_as_page_ranges(meta: bytes, kind: FrameType, bulk: int) -> None:
    with pytest.raises(PeerError):
        wire.decode_pages_meta_untrusted(header_for(kind, bulk), meta, SLOT_PAGES)


def test_ranges_at_the_end_of_32_bits_do_not_wrap() -> None:
    meta = pages_meta(0, 0, [(2**32 - 1, 2**32 - 1)], 1, 2**32 - 1)
    with pytest.raises(PeerError, match="outside"):
        wire.decode_pages_meta_untrusted(header_for(FrameType.ZERO), meta, SLOT_PAGES)
    # Two lengths whose sum is the claimed one modulo 2^32.
    meta = pages_meta(0, 0, [(0, 2**32 - 1), (2**32 - 1, 2)], 2, 1)
    with pytest.raises(PeerError):
        wire.decode_pages_meta_untrusted(header_for(FrameType.ZERO), meta, (2**33,))


def test_a_batch_is_bounded_in_pages_not_only_in_bytes() -> None:
    n_pages = BATCH_PAGES + 1
    meta = pages_meta(0, Encoding.ZSTD, [(0, n_pages)], 1, n_pages)
    with pytest.raises(PeerError, match="are the most"):
        wire.decode_pages_meta_untrusted(header_for(FrameType.PAGES, 100), meta, (1 << 20,))


def test_a_full_zero_frame_costs_a_small_multiple_of_its_size() -> None:
    table = np.empty((wire.MAX_RANGES, 2), dtype="<u4")
    table[:, 0] = np.arange(wire.MAX_RANGES) * 2
    table[:, 1] = 1
    meta = wire.PAGES_META.pack(0, 0, 0, len(table), len(table)) + table.tobytes()
    assert len(meta) == LIMITS[FrameType.ZERO].meta_bytes
    decode = wire.decode_pages_meta_untrusted
    assert peak_bytes(lambda: decode(header_for(FrameType.ZERO), meta, (1 << 20,))) < 6 * len(meta)


# -- control frames


def refused(meta: bytes) -> None:
    with pytest.raises(PeerError):
        wire.unpack_untrusted(meta, "it")


@given(st.dictionaries(st.text(), values, max_size=5))
def test_maps_survive(value: dict[str, Any]) -> None:
    assert wire.unpack_untrusted(wire.pack(value), "it") == value


@given(values.filter(lambda value: not isinstance(value, dict)))
def test_whatever_is_no_map_is_refused(value: Any) -> None:
    refused(msgpack.packb(value, use_bin_type=True))


def map_or_refused(meta: bytes) -> None:
    with contextlib.suppress(PeerError):
        assert isinstance(wire.unpack_untrusted(meta, "it"), dict)


@given(st.binary(max_size=200))
def test_random_bytes_as_control_frame(data: bytes) -> None:
    map_or_refused(data)


@given(st.dictionaries(st.text(), values, min_size=1, max_size=5), st.data())
def test_truncated_and_flipped_control_frames(value: dict[str, Any], data: st.DataObject) -> None:
    meta = bytearray(wire.pack(value))
    refused(bytes(meta[: data.draw(st.integers(0, len(meta) - 1))]))
    refused(bytes(meta) + b"\xc0")
    bit = data.draw(st.integers(0, len(meta) * 8 - 1))
    meta[bit // 8] ^= 1 << bit % 8
    map_or_refused(bytes(meta))


def test_fields_are_required_and_typed() -> None:
    meta = wire.pack({"n": 1, "flag": True, "later": "a field of a later minor version"})
    assert wire.unpack_untrusted(meta, "it", n=int, flag=bool)["n"] == 1
    for wrong in ({"n": str}, {"n": bool}, {"flag": int}, {"missing": int}):
        with pytest.raises(PeerError, match=next(iter(wrong))):
            wire.unpack_untrusted(meta, "it", **wrong)


BOMBS = {
    "lists that claim a million items, nested": b"\xdd\x00\x0f\xff\xff" * 1000,
    "a list that claims four thousand million": b"\xdd\xff\xff\xff\xff",
    "a map that claims four thousand million": b"\xdf\xff\xff\xff\xff",
    "a string that claims 4 GiB": b"\xdb\xff\xff\xff\xff",
    "binary that claims 4 GiB": b"\xc6\xff\xff\xff\xff",
    "an extension that claims 4 GiB": b"\xc9\xff\xff\xff\xff\x01",
    "nesting": b"\x91" * 100_000,
    "maps as keys": b"\x81" * 100_000,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_claims_allocate_nothing(bomb: bytes) -> None:
    for meta in (bomb, b"\x81\xa1x" + bomb):
        assert peak_bytes(lambda meta=meta: refused(meta)) < DAMAGE_BOUND + 4 * len(meta)


@pytest.mark.parametrize(
    "item", [b"\x90", b"\x80", b"\xd1\x7f\xff", b"\xa2ab", b"\xc4\x02ab", b"\xca\0\0\0\1", b"\xc0"]
)
def test_a_full_control_frame_is_bounded_in_memory(item: bytes) -> None:
    """The dearest values for their bytes, as many as fit."""
    limit = LIMITS[FrameType.CONFIGURE].meta_bytes
    count = (limit - 8) // len(item)
    meta = b"\x81\xa1x\xdd" + struct.pack(">I", count) + item * count

    def unpack() -> None:
        try:
            wire.unpack_untrusted(meta, "it")
        except PeerError:
            assert count > wire.MAX_CONTAINERS and item in (b"\x90", b"\x80")

    assert peak_bytes(unpack) < 32 * MIB


@pytest.mark.parametrize("item", [b"\xd4\x01\x00", b"\xc7\x00\xff", b"\xd7\xff" + bytes(8)])
def test_extension_types_are_refused_or_stay_data(item: bytes) -> None:
    try:
        value = wire.unpack_untrusted(b"\x81\xa1x" + item, "it")
        assert isinstance(value["x"], msgpack.ExtType)
    except PeerError:
        pass


def test_keys_that_are_not_text_are_refused() -> None:
    refused(msgpack.packb({1: 2}))

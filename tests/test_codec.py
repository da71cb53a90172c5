"""Page hashes, ranges and compression, against models and against hostile input."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migrate import codec, pages
from migrate.codec import (
    REGION_PAGES,
    Compressor,
    Decompressor,
    PageHasher,
    RegionDigests,
    indices,
    parse_compression,
    select,
    split_ranges,
)
from migrate.errors import PeerError, UsageError
from migrate.units import MIB, PAGE_SIZE
from migrate.wire import BATCH_PAGES
from tests.links import peak_bytes

MASK64 = 2**64 - 1
MASK32 = 2**32 - 1
HASHERS = [
    pytest.param(False, id="numpy"),
    pytest.param(
        True,
        id="native",
        marks=pytest.mark.skipif(
            codec.page_functions is None, reason="migrate._pages is not built"
        ),
    ),
]

page_sets = st.sets(st.integers(0, 40), max_size=41)


def ranges_of(*rows: tuple[int, int]) -> pages.Ranges:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def runs(page_set: set[int]) -> pages.Ranges:
    return pages.to_ranges(pages.from_indices(np.array(sorted(page_set), dtype=np.int64), 41), 41)


def memory_of(n_pages: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, n_pages * PAGE_SIZE, dtype=np.uint8)


# -- ranges


@given(page_sets)
def test_indices_are_the_pages(page_set: set[int]) -> None:
    assert indices(runs(page_set)).tolist() == sorted(page_set)


@given(page_sets, st.integers(1, 50))
def test_split_ranges_cuts_into_full_batches(page_set: set[int], batch: int) -> None:
    parts = split_ranges(runs(page_set), batch)
    flat = [indices(part).tolist() for part in parts]
    ordered = sorted(page_set)
    assert flat == [ordered[at : at + batch] for at in range(0, len(ordered), batch)]
    # Within a batch no two ranges touch that were one before.
    assert sum(len(part) for part in parts) <= len(runs(page_set)) + max(len(parts) - 1, 0)


@given(page_sets, st.data())
def test_select_keeps_the_flagged_pages(page_set: set[int], data: st.DataObject) -> None:
    ordered = sorted(page_set)
    chosen = data.draw(st.sets(st.sampled_from(ordered)) if ordered else st.just(set[int]()))
    flags = np.array([page in chosen for page in ordered], dtype=np.bool_)
    found = select(runs(page_set), flags)
    assert found.tolist() == runs(chosen).tolist()


def test_ranges_of_a_large_sparse_slot_are_cut_quickly_and_exactly() -> None:
    first = np.arange(0, 1 << 18, 2, dtype=np.int64)
    ranges = np.stack((first, first + 1), axis=1)
    parts = split_ranges(ranges, BATCH_PAGES)
    assert len(parts) == len(first) // BATCH_PAGES
    assert np.array_equal(np.concatenate(parts), ranges)


# -- hashes


def nh_by_the_book(words: list[int], key: list[int]) -> int:
    total = 0
    for word, k in zip(words, key, strict=True):
        low = ((word & MASK32) + (k & MASK32)) & MASK32
        high = ((word >> 32) + (k >> 32)) & MASK32
        total += low * high
    return total & MASK64


@pytest.mark.parametrize("native", HASHERS)
def test_the_hash_is_nh_less_that_of_zeros(native: bool) -> None:
    hasher = PageHasher(7, native=native)
    memory = memory_of(3)
    memory[PAGE_SIZE : 2 * PAGE_SIZE] = 0
    table = hasher.table(3)
    zero = hasher.scan(memory, ranges_of((0, 3)), table)
    key = [int(k) for k in hasher._key]
    of_zeros = nh_by_the_book([0] * 512, key)
    rows = memory.view(np.uint64).reshape(3, 512)
    expected = [(nh_by_the_book([int(w) for w in row], key) - of_zeros) & MASK64 for row in rows]
    assert [int(h) for h in table] == expected and expected[1] == 0
    assert zero.tolist() == [False, True, False]


def test_the_key_is_splitmix64() -> None:
    """First outputs for seed 1234567, as published with the generator's reference code."""
    assert codec._splitmix64(1234567, 3).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.skipif(codec.page_functions is None, reason="migrate._pages is not built")
@given(page_sets, st.integers(0, MASK64), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 40)))
def test_native_scan_equals_numpy(
    page_set: set[int], seed: int, content: int, zeros: set[int]
) -> None:
    memory = memory_of(41, content)
    memory.reshape(41, -1)[sorted(zeros)] = 0
    for byte in (0, PAGE_SIZE - 1):  # a page of zeros but for its first or last byte
        memory.reshape(41, -1)[byte % 40] = 0
        memory.reshape(41, -1)[byte % 40, byte] = 1
    found = []
    for native in (True, False):
        hasher = PageHasher(seed, native=native)
        table = hasher.table(41)
        table[:] = 99
        found.append((table, hasher.scan(memory, runs(page_set), table)))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])
    untouched = [page for page in range(41) if page not in page_set]
    assert (found[0][0][untouched] == 99).all()


@pytest.mark.skipif(codec.page_functions is None, reason="migrate._pages is not built")
def test_native_scan_checks_what_it_is_given() -> None:
    memory, key = memory_of(2), np.zeros(513, dtype=np.uint64)
    table, zero = np.zeros(2, dtype=np.uint64), np.zeros(2, dtype=np.uint8)
    scan = codec.page_functions.scan
    assert scan(memory, ranges_of((0, 2)), key, table, zero) == 0
    for rows in ([(0, 3)], [(-1, 1)], [(2, 1)], [(0, 1), (1, 2**62)]):
        with pytest.raises(ValueError, match="outside"):
            scan(memory, ranges_of(*rows), key, table, zero)
    with pytest.raises(ValueError, match="too short"):
        scan(memory, ranges_of((0, 2)), key, table[:1], zero)
    with pytest.raises(ValueError, match="too short"):
        scan(memory, ranges_of((0, 2)), key[:512], table, zero)
    with pytest.raises(ValueError, match="too short"):
        scan(memory, ranges_of((0, 2), (0, 1)), key, table, zero)
    table.flags.writeable = False
    with pytest.raises(TypeError, match="read-write"):
        scan(memory, ranges_of((0, 2)), key, table, zero)


def test_insisting_on_the_native_part_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "page_functions", None)
    with pytest.raises(UsageError, match="not available"):
        PageHasher(0, native=True)
    assert PageHasher(0)._native is None


@given(st.integers(0, MASK64), st.integers(0, 2 * PAGE_SIZE * 8 - 1))
def test_any_flipped_bit_changes_its_pages_hash_only(seed: int, bit: int) -> None:
    hasher, memory = PageHasher(seed), memory_of(2)
    before, after = hasher.table(2), hasher.table(2)
    hasher.scan(memory, ranges_of((0, 2)), before)
    memory[bit // 8] ^= 1 << bit % 8
    hasher.scan(memory, ranges_of((0, 2)), after)
    assert (before != after).tolist() == [bit // 8 < PAGE_SIZE, bit // 8 >= PAGE_SIZE]


def test_swapped_pages_change_the_digest() -> None:
    hasher, memory = PageHasher(1), memory_of(2)
    table = hasher.table(2)
    hasher.scan(memory, ranges_of((0, 2)), table)
    assert hasher.region_digests(table) != hasher.region_digests(table[::-1].copy())


@given(st.sampled_from([1, 511, 512, 513, 1024, 1500]), st.integers(0, MASK64), st.data())
def test_region_digests_by_the_book(n_pages: int, seed: int, data: st.DataObject) -> None:
    hasher = PageHasher(seed)
    table = np.random.default_rng(seed).integers(0, 2**64, n_pages, dtype=np.uint64)
    key = [int(k) for k in hasher._region_key]
    expected = [
        sum(int(h) * k for h, k in zip(table[at : at + 512], key, strict=False)) & MASK64
        for at in range(0, n_pages, REGION_PAGES)
    ]
    found = hasher.region_digests(table)
    assert found.tolist() == expected and found.dtype == np.dtype("<u8")
    page = data.draw(st.integers(0, n_pages - 1))
    table[page] ^= np.uint64(1 << data.draw(st.integers(0, 63)))
    differ = np.flatnonzero(hasher.region_digests(table) != found)
    assert differ.tolist() == [page // REGION_PAGES]


def test_digests_and_scans_take_little_memory_beside_the_table() -> None:
    hasher = PageHasher(3, native=False)
    table = hasher.table(1 << 18)
    assert peak_bytes(lambda: hasher.region_digests(table)) < MIB
    memory = np.zeros(32 * MIB, dtype=np.uint8)
    assert peak_bytes(lambda: hasher.scan(memory, ranges_of((0, 8192)), table)) < 16 * MIB


# -- compression


@pytest.mark.parametrize("level", [-7, 1, 19])
@pytest.mark.parametrize("rows", [[(0, 8)], [(1, 2), (4, 7)]])
def test_compressed_pages_come_back(level: int, rows: list[tuple[int, int]]) -> None:
    memory = memory_of(8)
    memory[: 3 * PAGE_SIZE] = 7
    packed = Compressor(level).compress(memory, ranges_of(*rows))
    index = indices(ranges_of(*rows))
    data = Decompressor().decompress_untrusted(packed, len(index))
    assert np.array_equal(data.reshape(-1, PAGE_SIZE), memory.reshape(-1, PAGE_SIZE)[index])


@pytest.mark.parametrize("rows", [[(0, BATCH_PAGES)], [(0, 100), (101, BATCH_PAGES)]])
def test_memory_that_changes_meanwhile_never_makes_a_broken_frame(
    rows: list[tuple[int, int]],
) -> None:
    """zstd reads its input more than once; a guest writes when it likes."""
    memory = np.tile(np.arange(256, dtype=np.uint8), BATCH_PAGES * PAGE_SIZE // 256)
    ranges = ranges_of(*rows)
    stop = threading.Event()

    def write() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            memory[:: 509 + value % 7] = value & 0xFF

    writer = threading.Thread(target=write)
    writer.start()
    try:
        compressor, decompressor = Compressor(3), Decompressor()
        for _ in range(40):
            packed = compressor.compress(memory, ranges)
            decompressor.decompress_untrusted(packed, len(indices(ranges)))
    finally:
        stop.set()
        writer.join()


GOOD = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(b"abcdefgh" * 1024)


@pytest.mark.parametrize(
    ("data", "n_pages"),
    [
        (b"", 1),
        (b"\x28\xb5\x2f\xfd", 1),
        (GOOD[:-1], 2),
        (GOOD + b"\0", 2),
        (GOOD + GOOD, 2),
        (GOOD + GOOD, 4),
        (GOOD, 1),
        (GOOD, 3),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(PAGE_SIZE)), 1),
        (b"\x50\x2a\x4d\x18\x04\0\0\0skip", 1),
    ],
)
def test_what_is_no_batch_of_so_many_pages_is_refused(data: bytes, n_pages: int) -> None:
    with pytest.raises(PeerError, match="compressed batch"):
        Decompressor().decompress_untrusted(data, n_pages)


def test_every_flipped_bit_is_refused_or_harmless() -> None:
    decompressor = Decompressor()
    expected = decompressor.decompress_untrusted(GOOD, 2).tobytes()
    for bit in range(len(GOOD) * 8):
        damaged = bytearray(GOOD)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(PeerError):
            assert decompressor.decompress_untrusted(damaged, 2).tobytes() == expected


@given(st.binary(max_size=300), st.integers(1, 3))
def test_random_bytes_are_no_batch(data: bytes, n_pages: int) -> None:
    for candidate in (data, GOOD[:6] + data, GOOD[:18] + data):
        with pytest.raises(PeerError):
            Decompressor().decompress_untrusted(candidate, n_pages)


def test_a_decompression_bomb_allocates_what_was_claimed_at_most() -> None:
    compressor = zstandard.ZstdCompressor(level=19)
    decompressor = Decompressor()
    for size in (256 * MIB, 4 * MIB):
        bomb = compressor.compress(bytes(size))

        def refuse(bomb: bytes = bomb) -> None:
            with pytest.raises(PeerError):
                decompressor.decompress_untrusted(bomb, 256)

        assert peak_bytes(refuse) < 2 * MIB
    # One that claims a batch in its header and holds more.
    lying = bytearray(compressor.compress(bytes(4 * MIB)))
    at = lying.index((4 * MIB).to_bytes(4, "little"))
    lying[at : at + 4] = MIB.to_bytes(4, "little")
    with pytest.raises(PeerError):
        decompressor.decompress_untrusted(lying, 256)


@pytest.mark.parametrize(
    ("text", "said"),
    [("auto", "auto"), ("none", "none"), ("zstd", "zstd:1"), ("zstd:-5", "zstd:-5"),
     ("zstd:19", "zstd:19"), ("zstd:0", "zstd:0")],
)  # fmt: skip
def test_compression_choices(text: str, said: str) -> None:
    assert str(parse_compression(text)) == said


@pytest.mark.parametrize(
    "text", ["", "gzip", "zstd:", "zstd:20", "zstd:-8", "zstd:1.5", "ZSTD", "zstd:٣x"]
)
def test_unknown_compression(text: str) -> None:
    with pytest.raises(UsageError, match="auto, none, zstd"):
        parse_compression(text)


@given(data=st.data())
def test_digests_kept_up_to_date_equal_those_made_anew(data: st.DataObject) -> None:
    n_pages = data.draw(st.integers(1, 5000))
    hasher = PageHasher(7)
    table = hasher.table(n_pages)
    kept = RegionDigests(hasher, table)
    for _ in range(data.draw(st.integers(1, 4))):
        edges = sorted(data.draw(st.sets(st.integers(0, n_pages), min_size=2, max_size=60)))
        edges = edges[: len(edges) // 2 * 2]
        ranges = np.array(edges, dtype=np.int64).reshape(-1, 2)
        for first, end in ranges.tolist():
            table[first:end] += np.uint64(data.draw(st.integers(1, 1 << 63)))
        kept.changed(ranges)
        assert (kept.update() == hasher.region_digests(table)).all()

"""Pages into bytes and back: zero detection, page hashes, compression (layer 2, pure).

Each side keeps a table of page hashes: the source of what it last sent of every page, the
destination of what it last received. A running guest may tear a raw page between its hashing and
its sending, but such a page is dirty again and is sent again; once the guest stands still and the
last pages have gone, both tables describe the same memory, and comparing them proves the transfer
from end to end for the price of a few microseconds. A table of zeros is untouched memory.

Beside a running guest everything here is bulk work with the GIL released: the compiled
`migrate._pages` where it was built, else numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import zstandard

from migrate.compiled import page_functions
from migrate.errors import PeerError, UsageError
from migrate.pages import Ranges
from migrate.units import PAGE_SIZE
from migrate.wire import BATCH_PAGES

HashTable = npt.NDArray[np.uint64]
"""One hash a page of a slot; 0 is a page of zeros."""

PAGE_WORDS: Final = PAGE_SIZE // 8
_FEW_RANGES: Final = 16
REGION_PAGES: Final = 512
"""Pages of one digest when tables are compared: a mismatch names 2 MiB."""

SCAN_PAGES: Final = 256
"""Pages that the numpy scan copies at a time."""

_LOW: Final = np.uint64(0xFFFF_FFFF)
_U32: Final = np.uint64(32)


def _splitmix64(seed: int, n: int) -> npt.NDArray[np.uint64]:
    """n words of the generator of Steele, Lea and Flood (OOPSLA 2014), from `seed`."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
        return words


def _nh(pages: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """NH of each row of 512 words; `migrate/_pages.c` names the source of the function."""
    low = (pages + key) & _LOW
    high = ((pages >> _U32) + (key >> _U32)) & _LOW
    sums: npt.NDArray[np.uint64] = (low * high).sum(axis=1, dtype=np.uint64)
    return sums


class PageHasher:
    """Zero flags and keyed hashes of pages. Both sides of a session use the same seed."""

    def __init__(self, seed: int, *, native: bool | None = None) -> None:
        """`native`: True insists on the compiled part, False avoids it, None is as it comes."""
        if native and page_functions is None:
            raise UsageError("the compiled page scanner is not available on this host")
        self._native = page_functions if native is not False else None
        words = _splitmix64(seed, PAGE_WORDS + REGION_PAGES)
        self._key = words[:PAGE_WORDS]
        self._region_key = words[PAGE_WORDS:] | np.uint64(1)
        zero = _nh(np.zeros((1, PAGE_WORDS), dtype=np.uint64), self._key)
        self._key_and_zero = np.concatenate((self._key, zero))
        self._zero_hash = zero[0]

    @staticmethod
    def table(n_pages: int) -> HashTable:
        """The table of `n_pages` untouched pages."""
        return np.zeros(n_pages, dtype=np.uint64)

    def scan(
        self, memory: npt.NDArray[np.uint8], ranges: Ranges, table: HashTable
    ) -> npt.NDArray[np.bool_]:
        """Hash the pages of `ranges` into `table`; which of them are zero, in their order.

        `memory`: uint8, the whole slot. `ranges`: int64 (k, 2), rows [first, end).
        """
        total = int((ranges[:, 1] - ranges[:, 0]).sum())
        zero = np.empty(total, dtype=np.uint8)
        if self._native is not None:
            self._native.scan(memory, np.ascontiguousarray(ranges), self._key_and_zero, table, zero)
            return zero.view(np.bool_)
        rows = memory.view(np.uint64).reshape(-1, PAGE_WORDS)
        done = 0
        for piece in split_ranges(ranges, SCAN_PAGES):
            index = indices(piece)
            pages = rows[index]
            table[index] = _nh(pages, self._key) - self._zero_hash
            zero[done : done + len(index)] = ~pages.any(axis=1)
            done += len(index)
        return zero.view(np.bool_)

    def region_digests(self, table: HashTable) -> npt.NDArray[np.uint64]:
        """One keyed digest for every 512 pages of a table."""
        whole = len(table) // REGION_PAGES
        # A product of a matrix and a vector: unlike a product and a sum, it needs no copy.
        digests = table[: whole * REGION_PAGES].reshape(-1, REGION_PAGES) @ self._region_key
        rest = table[whole * REGION_PAGES :]
        if len(rest):
            digests = np.append(digests, rest @ self._region_key[: len(rest)])
        little_endian: npt.NDArray[np.uint64] = digests.astype("<u8")
        return little_endian


class RegionDigests:
    """The digests of a table that changes a little at a time.

    Before the guest stands still all of it is summed up; in the downtime only the regions that the
    last pages lie in are.
    """

    def __init__(self, hasher: PageHasher, table: HashTable) -> None:
        self._hasher = hasher
        self._table = table
        self._digests = hasher.region_digests(table)
        self._stale = np.zeros(len(self._digests), dtype=np.bool_)

    def changed(self, ranges: Ranges) -> None:
        """The table was written at the pages of `ranges`."""
        if len(ranges) <= _FEW_RANGES:
            for first, end in ranges.tolist():
                self._stale[first // REGION_PAGES : (end - 1) // REGION_PAGES + 1] = True
        else:
            # The ranges of a bitmap or a frame: each spans little, and they are many.
            self._stale[ranges[:, 0] // REGION_PAGES] = True
            self._stale[(ranges[:, 1] - 1) // REGION_PAGES] = True
            for first, end in ranges[ranges[:, 1] - ranges[:, 0] > REGION_PAGES].tolist():
                self._stale[first // REGION_PAGES : (end - 1) // REGION_PAGES + 1] = True

    def update(self) -> npt.NDArray[np.uint64]:
        """The digests as the table is now."""
        stale = np.flatnonzero(self._stale)
        if len(stale) > len(self._stale) // 4:
            self._digests = self._hasher.region_digests(self._table)
        else:
            for region in stale.tolist():
                part = self._table[region * REGION_PAGES : (region + 1) * REGION_PAGES]
                self._digests[region] = self._hasher.region_digests(part)[0]
        self._stale[:] = False
        return self._digests


def indices(ranges: Ranges) -> npt.NDArray[np.int64]:
    """The page numbers in `ranges`, in order."""
    lengths = ranges[:, 1] - ranges[:, 0]
    starts = np.repeat(ranges[:, 0] - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return starts + np.arange(len(starts), dtype=np.int64)


def split_ranges(ranges: Ranges, batch_pages: int) -> list[Ranges]:
    """Cut `ranges` into consecutive batches of `batch_pages` pages (the last may be shorter)."""
    if len(ranges) == 0:
        return []
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1])
    edges = np.union1d(begins, np.arange(0, total, batch_pages, dtype=np.int64))
    owner = np.searchsorted(ends, edges, side="right")
    pieces = np.empty((len(edges), 2), dtype=np.int64)
    pieces[:, 0] = ranges[owner, 0] + edges - begins[owner]
    pieces[:, 1] = pieces[:, 0] + np.diff(np.append(edges, total))
    cuts = np.searchsorted(edges, np.arange(batch_pages, total, batch_pages, dtype=np.int64))
    return np.split(pieces, cuts)


def select(ranges: Ranges, flags: npt.NDArray[np.bool_]) -> Ranges:
    """The pages of `ranges` whose flag is set, as ranges. `flags`: one a page, in order."""
    chosen = indices(ranges)[flags]
    if len(chosen) == 0:
        return np.empty((0, 2), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(chosen) != 1)
    first = chosen[np.concatenate(([0], breaks + 1))]
    last = chosen[np.concatenate((breaks, [len(chosen) - 1]))]
    return np.stack((first, last + 1), axis=1)


@dataclass(frozen=True, slots=True)
class CompressionChoice:
    """What the user asked for: raw, zstd always, or whichever is quicker on this link."""

    mode: Literal["auto", "none", "zstd"] = "auto"
    level: int = 1

    def __str__(self) -> str:
        return f"zstd:{self.level}" if self.mode == "zstd" else self.mode


def parse_compression(text: str) -> CompressionChoice:
    """`auto`, `none`, `zstd` or `zstd:LEVEL` with a level of -7 to 19."""
    if text == "auto":
        return CompressionChoice("auto")
    if text == "none":
        return CompressionChoice("none")
    match = re.fullmatch(r"zstd(?::(-?\d{1,2}))?", text)
    if match is None or not -7 <= int(match.group(1) or 1) <= 19:
        raise UsageError(
            f"unknown compression {text!r}; write auto, none, zstd or zstd:LEVEL (-7 to 19)"
        )
    return CompressionChoice("zstd", int(match.group(1) or 1))


class Compressor:
    """zstd over batches of pages. One a thread: neither the context nor the buffer is shared."""

    def __init__(self, level: int) -> None:
        self._context = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._gathered = np.empty((BATCH_PAGES, PAGE_SIZE), dtype=np.uint8)

    def compress(self, memory: npt.NDArray[np.uint8], ranges: Ranges) -> bytes:
        """The pages of `ranges` (at most a batch) as one zstd frame with a content checksum.

        A copy is compressed, never the memory itself: zstd reads its input more than once, and a
        guest that writes in between would make a frame whose checksum fails at the other side.
        """
        rows = memory.reshape(-1, PAGE_SIZE)
        if len(ranges) == 1:
            first, end = int(ranges[0, 0]), int(ranges[0, 1])
            out = self._gathered[: end - first]
            np.copyto(out, rows[first:end])
        else:
            index = indices(ranges)
            out = self._gathered[: len(index)]
            np.take(rows, index, axis=0, out=out, mode="clip")
        packed: bytes = self._context.compress(out.reshape(-1).data)
        return packed


class Decompressor:
    """The reverse, at the destination; the output is bounded by what the frame's header claims."""

    def __init__(self) -> None:
        self._context: Any = zstandard.ZstdDecompressor(max_window_size=1 << 23)

    def decompress_untrusted(
        self, data: bytes | bytearray | memoryview, n_pages: int
    ) -> npt.NDArray[np.uint8]:
        """Exactly `n_pages` pages, uint8. Raises PeerError."""
        expected = n_pages * PAGE_SIZE
        try:
            if zstandard.frame_content_size(data) != expected:
                raise PeerError("a compressed batch does not hold the pages that it claims")
            pages = self._context.decompress(data, max_output_size=expected, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PeerError(f"a compressed batch is damaged ({error})") from None
        if len(pages) != expected:
            raise PeerError("a compressed batch does not hold the pages that it claims")
        return np.frombuffer(pages, dtype=np.uint8)

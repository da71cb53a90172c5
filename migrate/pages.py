"""Page bitmaps and ranges (layer 0: no I/O).

A *bitmap* is a numpy array of little-endian uint64 words, bit 0 of word 0 the first page of the
slot: the layout of KVM_GET_DIRTY_LOG. *Ranges* are an int64 array of shape (k, 2), rows
[first, end) in pages, ascending and disjoint.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bitmap: TypeAlias = npt.NDArray[np.uint64]
Ranges: TypeAlias = npt.NDArray[np.int64]
_Pages: TypeAlias = npt.NDArray[np.int64]

WORD_BITS = 64
_SPARSE_SHARE = 8
_WORD_SHIFT = 6
_FEW_RANGES = 32
_RANGES_AT_ONCE = 4096  # temporaries that stay in the cache
_DENSE_PAGES_A_RANGE = 8
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def word_count(n_pages: int) -> int:
    """Words of a bitmap of `n_pages` pages."""
    return (n_pages + WORD_BITS - 1) // WORD_BITS


def empty(n_pages: int) -> Bitmap:
    """A bitmap with no page set."""
    return np.zeros(word_count(n_pages), dtype="<u8")


def full(n_pages: int) -> Bitmap:
    """A bitmap with every page set; the bits past the last page stay clear."""
    bitmap = np.full(word_count(n_pages), np.uint64(0xFFFF_FFFF_FFFF_FFFF), dtype="<u8")
    tail = n_pages % WORD_BITS
    if tail:
        bitmap[-1] = np.uint64((1 << tail) - 1)
    return bitmap


def count(bitmap: Bitmap) -> int:
    """Pages set."""
    return int(np.bitwise_count(bitmap).sum(dtype=np.int64))


def to_bools(bitmap: Bitmap, n_pages: int) -> npt.NDArray[np.bool_]:
    """One bool a page, shape (n_pages,)."""
    return np.unpackbits(bitmap.view(np.uint8), count=n_pages, bitorder="little").view(np.bool_)


def from_bools(flags: npt.NDArray[np.bool_]) -> Bitmap:
    """The bitmap of one bool a page."""
    packed = np.packbits(flags, bitorder="little")
    bitmap = empty(len(flags))
    bitmap.view(np.uint8)[: len(packed)] = packed
    return bitmap


def to_ranges(bitmap: Bitmap, n_pages: int) -> Ranges:
    """The runs of set pages, shape (k, 2)."""
    words = np.flatnonzero(bitmap)
    if len(words) == 0:
        return np.empty((0, 2), dtype=np.int64)
    if len(words) * _SPARSE_SHARE < len(bitmap):
        # The last round's few pages, in the downtime: only the words that have any are unpacked.
        bits = np.unpackbits(bitmap[words].view(np.uint8), bitorder="little")
        row, column = np.nonzero(bits.reshape(-1, WORD_BITS))
        numbers = words[row] * WORD_BITS + column
        cuts = np.flatnonzero(np.diff(numbers) != 1)
        first = numbers[np.concatenate(([0], cuts + 1))]
        last = numbers[np.concatenate((cuts, [len(numbers) - 1]))]
        return np.stack((first, last + 1), axis=1).astype(np.int64, copy=False)
    edged = np.zeros(n_pages + 2, dtype=np.int8)
    edged[1:-1] = to_bools(bitmap, n_pages)
    return np.flatnonzero(np.diff(edged)).astype(np.int64).reshape(-1, 2)


def from_ranges(ranges: Ranges, n_pages: int) -> Bitmap:
    """The bitmap whose set pages are `ranges` (which may touch or overlap).

    Raises ValueError for a range outside 0..n_pages.
    """
    bitmap = empty(n_pages)
    or_ranges(bitmap, ranges, n_pages)
    return bitmap


def or_ranges(bitmap: Bitmap, ranges: Ranges, n_pages: int) -> None:
    """Set `ranges` (which may touch or overlap, in any order) in `bitmap`, in place.

    Raises ValueError for a range outside 0..n_pages, or reversed; nothing is set then.
    """
    if len(ranges) == 0:
        return
    first, end = ranges[:, 0], ranges[:, 1]
    if int(first.min()) < 0 or int(end.max()) > n_pages or (end < first).any():
        raise ValueError(f"a range lies outside of 0..{n_pages} pages, or ends before it begins")
    if len(ranges) <= _FEW_RANGES:
        for row_first, row_end in ranges.tolist():
            set_range(bitmap, row_first, row_end)
        return
    for at in range(0, len(ranges), _RANGES_AT_ONCE):
        part_first, part_end = first[at : at + _RANGES_AT_ONCE], end[at : at + _RANGES_AT_ONCE]
        base = int(part_first.min()) & -WORD_BITS
        span = int(part_end.max()) - base
        if span <= _DENSE_PAGES_A_RANGE * len(part_first):
            _or_dense(bitmap, part_first, part_end, base, span)
        else:
            _or_sparse(bitmap, part_first, part_end)


def or_ascending(bitmap: Bitmap, ranges: Ranges) -> None:
    """Set `ranges` in `bitmap`, in place; they are not empty, ascend, do not overlap (they may
    touch) and lie in the bitmap. Nothing of this is checked: for what the kernel reports.
    """
    first, end = ranges[:, 0], ranges[:, 1]
    if len(ranges) <= _FEW_RANGES:
        for row_first, row_end in ranges.tolist():
            set_range(bitmap, row_first, row_end)
        return
    base = int(first[0]) & -WORD_BITS
    span = int(end[-1]) - base
    if span > _DENSE_PAGES_A_RANGE * len(ranges):
        _or_sparse(bitmap, first, end)
        return
    steps = np.zeros(span + 1, dtype=np.int8)
    steps[first - base] = 1
    steps[end - base] -= 1
    np.cumsum(steps, dtype=np.int8, out=steps)
    covered = from_bools(steps[:span].view(np.bool_))
    at = base // WORD_BITS
    bitmap[at : at + len(covered)] |= covered


def _or_dense(bitmap: Bitmap, first: _Pages, end: _Pages, base: int, span: int) -> None:
    """By page: +1 where a range begins, -1 where it ends; the running sum says what is covered."""
    steps = np.bincount(first - base, minlength=span + 1)
    steps -= np.bincount(end - base, minlength=span + 1)
    np.cumsum(steps, out=steps)
    covered = from_bools(steps[:span] > 0)
    at = base // WORD_BITS
    bitmap[at : at + len(covered)] |= covered


def _or_sparse(bitmap: Bitmap, first: _Pages, end: _Pages) -> None:
    """By range: its ends as masks of words, the words between whole."""
    last = end - 1
    if (last < first).any():
        first, last = first[last >= first], last[last >= first]
    # Shifts, for numpy divides by a loop of its own that takes several times as long.
    first_word, last_word = first >> _WORD_SHIFT, last >> _WORD_SHIFT
    masks = _ALL << (first & (WORD_BITS - 1)).view(np.uint64)
    last_masks = _ALL >> (~last & (WORD_BITS - 1)).view(np.uint64)
    wide = first_word != last_word
    if wide.any():
        np.bitwise_or.at(bitmap, last_word[wide], last_masks[wide])
        masks[~wide] &= last_masks[~wide]
        steps = np.bincount(first_word[wide] + 1, minlength=len(bitmap) + 1)
        steps -= np.bincount(last_word[wide], minlength=len(bitmap) + 1)
        bitmap[np.cumsum(steps[:-1]) > 0] = _ALL
    else:
        masks &= last_masks
    np.bitwise_or.at(bitmap, first_word, masks)


def extract(bitmap: Bitmap, first: int, end: int) -> Bitmap:
    """Pages [first, end) as a bitmap of their own, bit 0 the page `first`. A copy."""
    n_words = word_count(end - first)
    at, shift = divmod(first, WORD_BITS)
    part = bitmap[at : at + n_words].copy()
    if shift:
        part >>= np.uint64(shift)
        above = bitmap[at + 1 : at + 1 + n_words] << np.uint64(WORD_BITS - shift)
        part[: len(above)] |= above
    clear_past(part, end - first)
    return part


def clear_past(bitmap: Bitmap, n_pages: int) -> None:
    """Clear the bits past the last page, in place."""
    tail = n_pages % WORD_BITS
    if tail:
        bitmap[-1] &= np.uint64((1 << tail) - 1)


def to_indices(bitmap: Bitmap, n_pages: int) -> npt.NDArray[np.int64]:
    """The numbers of the set pages, ascending."""
    return np.flatnonzero(to_bools(bitmap, n_pages)).astype(np.int64)


def from_indices(indices: npt.NDArray[np.int64], n_pages: int) -> Bitmap:
    """The bitmap with the pages `indices` set."""
    flags = np.zeros(n_pages, dtype=np.bool_)
    flags[indices] = True
    return from_bools(flags)


def set_range(bitmap: Bitmap, first: int, end: int) -> None:
    """Set pages [first, end) in place."""
    if end <= first:
        return
    flags = bitmap.view(np.uint8)
    first_byte, end_byte = (first + 7) >> 3, end >> 3
    if first_byte > end_byte:  # all within one byte
        flags[first >> 3] |= np.uint8(((1 << (end - first)) - 1) << (first & 7))
        return
    if first & 7:
        flags[first >> 3] |= np.uint8((0xFF << (first & 7)) & 0xFF)
    flags[first_byte:end_byte] = 0xFF
    if end & 7:
        flags[end_byte] |= np.uint8((1 << (end & 7)) - 1)

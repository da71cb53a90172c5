"""Page bitmaps against sets of page numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import pages
from migrate.compiled import page_functions
from migrate.units import PAGE_SHIFT

SIZES = st.integers(min_value=1, max_value=700)


@st.composite
def page_sets(draw: st.DrawFn) -> tuple[int, set[int]]:
    n_pages = draw(SIZES)
    return n_pages, draw(st.sets(st.integers(0, n_pages - 1)))


@st.composite
def range_lists(draw: st.DrawFn, *, max_ranges: int = 150) -> tuple[int, list[tuple[int, int]]]:
    n_pages = draw(SIZES)
    edge = st.integers(0, n_pages)
    pairs = draw(st.lists(st.tuples(edge, edge), max_size=max_ranges))
    return n_pages, [(min(pair), max(pair)) for pair in pairs]


def bitmap_of(numbers: set[int], n_pages: int) -> pages.Bitmap:
    return pages.from_indices(np.array(sorted(numbers), dtype=np.int64), n_pages)


def set_of(bitmap: pages.Bitmap, n_pages: int) -> set[int]:
    """By the definition of the layout, one bit at a time."""
    whole = int.from_bytes(bitmap.tobytes(), "little")
    assert whole >> n_pages == 0, "a bit past the last page is set"
    return {page for page in range(n_pages) if whole >> page & 1}


@given(page_sets())
def test_round_trips(case: tuple[int, set[int]]) -> None:
    n_pages, numbers = case
    bitmap = bitmap_of(numbers, n_pages)
    assert bitmap.dtype == np.dtype("<u8")
    assert set_of(bitmap, n_pages) == numbers
    assert pages.count(bitmap) == len(numbers)
    assert pages.to_indices(bitmap, n_pages).tolist() == sorted(numbers)
    ranges = pages.to_ranges(bitmap, n_pages)
    assert {page for first, end in ranges.tolist() for page in range(first, end)} == numbers
    assert all(a[1] < b[0] for a, b in zip(ranges.tolist(), ranges.tolist()[1:], strict=False))
    assert np.array_equal(pages.from_ranges(ranges, n_pages), bitmap)
    assert np.array_equal(pages.from_bools(pages.to_bools(bitmap, n_pages)), bitmap)


@given(SIZES)
def test_empty_and_full(n_pages: int) -> None:
    assert set_of(pages.empty(n_pages), n_pages) == set()
    assert set_of(pages.full(n_pages), n_pages) == set(range(n_pages))


@pytest.mark.parametrize(
    ("few", "dense"),
    [(0, 0), (0, 10_000), (10_000, 0)],
    ids=["by range", "by page", "one by one"],
)
@given(case=range_lists(), before=st.sets(st.integers(0, 699)))
def test_or_ranges_takes_any_ranges(
    few: int, dense: int, case: tuple[int, list[tuple[int, int]]], before: set[int]
) -> None:
    """Overlapping, touching, empty and unsorted ones; what was set stays set; whichever way."""
    n_pages, rows = case
    before = {page for page in before if page < n_pages}
    bitmap = bitmap_of(before, n_pages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "_FEW_RANGES", few)
        patch.setattr(pages, "_DENSE_PAGES_A_RANGE", dense)
        patch.setattr(pages, "_RANGES_AT_ONCE", 50)
        pages.or_ranges(bitmap, np.array(rows, dtype=np.int64).reshape(-1, 2), n_pages)
    wanted = before | {page for first, end in rows for page in range(first, end)}
    assert set_of(bitmap, n_pages) == wanted


@pytest.mark.parametrize(
    ("few", "dense"),
    [(0, 0), (0, 10_000), (10_000, 0)],
    ids=["by range", "by page", "one by one"],
)
@given(case=page_sets(), before=st.sets(st.integers(0, 699)), cut=st.integers(1, 699))
def test_or_ascending_takes_what_the_kernel_reports(
    few: int, dense: int, case: tuple[int, set[int]], before: set[int], cut: int
) -> None:
    """Runs of pages, ascending; those over the page `cut` come in two that touch."""
    n_pages, numbers = case
    before = {page for page in before if page < n_pages}
    bitmap = bitmap_of(before, n_pages)
    rows: list[tuple[int, int]] = []
    for first, end in pages.to_ranges(bitmap_of(numbers, n_pages), n_pages).tolist():
        rows.extend([(first, cut), (cut, end)] if first < cut < end else [(first, end)])
    if rows:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pages, "_FEW_RANGES", few)
            patch.setattr(pages, "_DENSE_PAGES_A_RANGE", dense)
            pages.or_ascending(bitmap, np.array(rows, dtype=np.int64))
    assert set_of(bitmap, n_pages) == before | numbers


@pytest.mark.parametrize("row", [(-1, 3), (5, 101), (9, 8)])
def test_a_range_outside_is_refused(row: tuple[int, int]) -> None:
    bitmap = pages.empty(100)
    with pytest.raises(ValueError, match=r"outside of 0\.\.100"):
        pages.or_ranges(bitmap, np.array([(1, 2), row], dtype=np.int64), 100)
    assert not bitmap.any()


@given(page_sets(), st.data())
def test_set_range(case: tuple[int, set[int]], data: st.DataObject) -> None:
    n_pages, numbers = case
    first = data.draw(st.integers(0, n_pages))
    end = data.draw(st.integers(0, n_pages))
    bitmap = bitmap_of(numbers, n_pages)
    pages.set_range(bitmap, first, end)
    assert set_of(bitmap, n_pages) == numbers | set(range(first, end))


@given(page_sets(), st.data())
def test_extract(case: tuple[int, set[int]], data: st.DataObject) -> None:
    n_pages, numbers = case
    first = data.draw(st.integers(0, n_pages - 1))
    end = data.draw(st.integers(first + 1, n_pages))
    bitmap = bitmap_of(numbers, n_pages)
    part = pages.extract(bitmap, first, end)
    assert set_of(part, end - first) == {page - first for page in numbers if first <= page < end}
    part.fill(0)
    assert set_of(bitmap, n_pages) == numbers


@given(SIZES)
def test_clear_past(n_pages: int) -> None:
    bitmap = np.full(pages.word_count(n_pages), np.uint64(0xFFFF_FFFF_FFFF_FFFF), dtype="<u8")
    pages.clear_past(bitmap, n_pages)
    assert np.array_equal(bitmap, pages.full(n_pages))


@pytest.mark.skipif(page_functions is None, reason="the compiled part is not built")
@given(st.data())
def test_compiled_regions_equal_numpy(data: st.DataObject) -> None:
    n_pages = data.draw(st.integers(1, 500))
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=n_pages, max_size=n_pages)))
    ranges = pages.to_ranges(pages.from_bools(wanted), n_pages)
    regions = np.zeros((len(ranges) + 1, 3), dtype=np.uint64)
    regions[:-1, :2] = (ranges + 7) << PAGE_SHIFT
    bitmap = pages.empty(n_pages)
    page_functions.or_regions(regions, len(ranges), 7 << PAGE_SHIFT, bitmap)
    assert (bitmap == pages.from_bools(wanted)).all()


@pytest.mark.skipif(page_functions is None, reason="the compiled part is not built")
@pytest.mark.parametrize(
    ("count", "region"),
    [(2, (0, 4096)), (-1, (0, 4096)), (1, (4096, 4096)), (1, (0, 65 << 12)), (1, (-4096, 4096))],
)
def test_compiled_regions_outside_of_the_bitmap(count: int, region: tuple[int, int]) -> None:
    regions = np.array([[*region, 0]], dtype=np.int64)
    with pytest.raises(ValueError, match="outside"):
        page_functions.or_regions(regions, count, 0, pages.empty(64))

"""The source's half of the main path: leased pages to the link (layer 4).

guest memory → hash and zero test → (zstd) → frame → socket, batch by batch, in a worker thread.
Raw pages go to the kernel from the guest's memory without a copy. What steers (rounds, policy,
handover) is in `source.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from migrate import pages, wire
from migrate.channel import Channel
from migrate.codec import (
    CompressionChoice,
    Compressor,
    PageHasher,
    select,
    split_ranges,
)
from migrate.errors import MigrationFailed
from migrate.page_hashes import PageHashes
from migrate.pages import Bitmap, Ranges
from migrate.units import PAGE_SIZE
from migrate.vm.definition import BackingKind
from migrate.vm.memory import MemorySlot
from migrate.wire import BATCH_PAGES, Encoding, Feature, FrameType

SAMPLE_EVERY: Final = 64
"""`auto` compresses one batch in so many to learn what compression would bring now."""
MUST_WIN_BY: Final = 1.1
"""`auto` compresses only where that is quicker than raw by this factor."""
PACED_BATCH_S: Final = 0.05
"""A batch takes no longer than this at the bandwidth that was asked for: small batches where that
is low keep the link steady and the peer from taking the pauses between them for a stall."""

_Compressing: TypeAlias = tuple[
    int, npt.NDArray[np.uint8], Ranges, int, "Future[tuple[bytes, float]]"
]
"""slot number, memory, batch, its pages, and the outcome to come."""


class Pacer:
    """Holds the sender to a bandwidth; None lets it run free."""

    def __init__(self, bytes_per_s: int | None) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = time.monotonic()

    def sent(self, n_bytes: int) -> None:
        """Sleep until `n_bytes` more are due. Time not used is not saved up beyond 10 ms."""
        if self.bytes_per_s is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 0.01) + n_bytes / self.bytes_per_s
        if self._free_at > now:
            time.sleep(self._free_at - now)


class Chooser:
    """`auto`: raw where the link is quicker than the codec, zstd where it is slower."""

    def __init__(self, choice: CompressionChoice, threads: int) -> None:
        self.choice = choice
        self.threads = threads
        self.compressing = choice.mode == "zstd"
        self.link_bytes_per_s = 0.0
        self._batches = 0

    def next(self, *, sampling: bool) -> bool:
        """Compress the coming batch? `sampling`: there is time to try what it would bring."""
        self._batches += 1
        if self.compressing or self.choice.mode != "auto":
            return self.compressing
        # The first batches only measure the link; then a sample now and then.
        return sampling and self._batches % SAMPLE_EVERY == 8

    def link_took(self, n_bytes: int, seconds: float) -> None:
        rate = n_bytes / max(seconds, 1e-6)
        old = self.link_bytes_per_s
        self.link_bytes_per_s = rate if old == 0.0 else 0.9 * old + 0.1 * rate

    def codec_took(self, raw_bytes: int, packed_bytes: int, seconds: float) -> None:
        if self.choice.mode != "auto" or self.link_bytes_per_s == 0.0:
            return
        codec = raw_bytes / max(seconds, 1e-6) * self.threads
        through_link = self.link_bytes_per_s * raw_bytes / max(packed_bytes, 1)
        self.compressing = min(codec, through_link) > MUST_WIN_BY * self.link_bytes_per_s


class PageSender:
    """Sends the pages of bitmaps; keeps the hash tables and the counters."""

    def __init__(
        self,
        channel: Channel,
        hasher: PageHasher,
        slots: tuple[MemorySlot, ...],
        choice: CompressionChoice,
        threads: int | None = None,
        bandwidth: int | None = None,
    ) -> None:
        """`threads`: for zstd. `bandwidth`: bytes a second. Raises MigrationFailed if the
        destination lacks what was asked for.
        """
        if Feature.ZSTD not in channel.features:
            if choice.mode == "zstd":
                raise MigrationFailed(
                    "the destination does not understand zstd; send with --compression none"
                )
            choice = CompressionChoice("none")
        self._channel = channel
        self._slots = slots
        self.hashes = PageHashes(hasher, slots)
        workers = threads or max(1, (os.cpu_count() or 2) - 1)
        self.chooser = Chooser(choice, workers)
        self.pacer = Pacer(bandwidth)
        self._batch_pages = BATCH_PAGES
        if bandwidth is not None:
            fitting = int(bandwidth * PACED_BATCH_S) // PAGE_SIZE
            self._batch_pages = min(max(fitting, 1), BATCH_PAGES)
        self._level = choice.level
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._queue: deque[_Compressing] = deque()
        self.pages_sent = 0
        self.pages_zero = 0
        self.pages_left = 0
        """Of the bitmap that is being sent: for progress displays, read by other threads."""

    def close(self) -> None:
        """Let go of the worker threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def send(
        self,
        slot_number: int,
        memory: npt.NDArray[np.uint8],
        bitmap: Bitmap,
        *,
        paced: bool = True,
    ) -> None:
        """Every page of `bitmap` once, with what `memory` (a lease's) holds. Raises LinkLost."""
        ranges = pages.to_ranges(bitmap, self._slots[slot_number].n_pages)
        zeros: list[Ranges] = []
        for batch in split_ranges(ranges, self._batch_pages if paced else BATCH_PAGES):
            flags = self.hashes.scan(slot_number, memory, batch)
            n_pages = len(flags)
            if flags.any():
                zeros.append(select(batch, flags))
                batch = select(batch, ~flags)
                self.pages_zero += int(np.count_nonzero(flags))
            n_data = n_pages - int(np.count_nonzero(flags))
            if n_data:
                self._send_batch(slot_number, memory, batch, n_data, paced)
            self.pages_left -= n_pages
        self._drain(0, paced)
        self.send_zero(slot_number, zeros)

    def skip(self, slot_number: int, untouched: Bitmap, backing: BackingKind) -> None:
        """Pages that hold zeros unseen. A destination's anonymous memory starts as zeros; the file
        that backs a slot over there may hold anything, so there it is told.
        """
        n_pages = pages.count(untouched)
        self.pages_zero += n_pages
        self.pages_left -= n_pages
        if backing is not BackingKind.ANONYMOUS:
            ranges = pages.to_ranges(untouched, self._slots[slot_number].n_pages)
            if len(ranges):
                self.send_zero(slot_number, [ranges])

    def digests(self) -> list[bytes]:
        """What memory the destination should hold by now, one digest a region, slot by slot.

        Cheap where little has changed since the last call: call it before the downtime too.
        """
        return [digests.tobytes() for digests in self.hashes.digests()]

    def send_zero(self, slot_number: int, zeros: list[Ranges]) -> None:
        """Tell that pages are zero; no bulk."""
        if not zeros:
            return
        merged = _merge(np.concatenate(zeros))
        for start in range(0, len(merged), wire.MAX_RANGES):
            part = merged[start : start + wire.MAX_RANGES]
            meta = wire.encode_pages_meta(slot_number, Encoding.RAW, part)
            self._channel.send(FrameType.ZERO, meta)

    def _send_batch(
        self,
        slot_number: int,
        memory: npt.NDArray[np.uint8],
        batch: Ranges,
        n_pages: int,
        paced: bool,
    ) -> None:
        if self.chooser.next(sampling=paced):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="zstd")
            future = self._pool.submit(self._compress, memory, batch)
            self._queue.append((slot_number, memory, batch, n_pages, future))
            self._drain(2 * self._workers, paced)
            return
        self._drain(2 * self._workers, paced)
        bulk = _views(memory, batch)
        self._to_link(slot_number, Encoding.RAW, batch, n_pages, bulk, n_pages * PAGE_SIZE, paced)

    def _compress(self, array: npt.NDArray[np.uint8], batch: Ranges) -> tuple[bytes, float]:
        compressor: Compressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = Compressor(self._level)
        started = time.perf_counter()
        packed = compressor.compress(array, batch)
        return packed, time.perf_counter() - started

    def _drain(self, keep: int, paced: bool) -> None:
        """Send what has been compressed by now; wait until no more than `keep` are worked on.

        Batches may overtake each other: within one `send` no page is in two of them.
        """
        while self._queue and (len(self._queue) > keep or self._queue[0][-1].done()):
            slot_number, memory, batch, n_pages, future = self._queue.popleft()
            packed, seconds = future.result()
            raw_bytes = n_pages * PAGE_SIZE
            self.chooser.codec_took(raw_bytes, len(packed), seconds)
            if len(packed) >= raw_bytes:  # does not pay: raw, from memory as it is by now
                bulk = _views(memory, batch)
                self._to_link(slot_number, Encoding.RAW, batch, n_pages, bulk, raw_bytes, paced)
            else:
                self._to_link(
                    slot_number, Encoding.ZSTD, batch, n_pages, [packed], len(packed), paced
                )

    def _to_link(
        self,
        slot_number: int,
        encoding: Encoding,
        batch: Ranges,
        n_pages: int,
        bulk: list[memoryview] | list[bytes],
        bulk_bytes: int,
        paced: bool,
    ) -> None:
        meta = wire.encode_pages_meta(slot_number, encoding, batch)
        started = time.perf_counter()
        self._channel.send(FrameType.PAGES, meta, bulk, bulk_bytes)
        self.chooser.link_took(bulk_bytes, time.perf_counter() - started)
        self.pages_sent += n_pages
        if paced:
            self.pacer.sent(bulk_bytes + len(meta) + wire.FRAME_HEADER.size)


def _views(memory: npt.NDArray[np.uint8], batch: Ranges) -> list[memoryview]:
    """The pages of a batch where they lie."""
    view = memory.data
    return [view[a * PAGE_SIZE : b * PAGE_SIZE] for a, b in batch.tolist()]


def _merge(ranges: Ranges) -> Ranges:
    """Join ranges that touch; they are ascending and disjoint."""
    if len(ranges) < 2:
        return ranges
    starts = np.concatenate(([True], ranges[1:, 0] != ranges[:-1, 1]))
    ends = np.concatenate((starts[1:], [True]))
    return np.stack((ranges[starts, 0], ranges[ends, 1]), axis=1)

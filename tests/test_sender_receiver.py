"""The data path from memory to memory: real slots, a real link, every encoding, damage."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate import pages, wire
from migrate.channel import Channel, PeerGaveUp
from migrate.codec import CompressionChoice, PageHasher, parse_compression
from migrate.errors import MigrationFailed, PeerError
from migrate.pages import Bitmap
from migrate.receiver import PageReceiver
from migrate.sender import Chooser, Pacer, PageSender
from migrate.session import Phase
from migrate.transport import Link, LinkLost
from migrate.units import MIB, PAGE_SIZE
from migrate.vm.definition import BackingKind, SlotSpec
from migrate.vm.memory import MemorySlot
from migrate.wire import FEATURES, Feature, FrameType, Role
from tests.links import beside, channel_pair, peak_bytes

SEED = 0x5EED
CHOICES = pytest.mark.parametrize("choice", ["none", "zstd", "zstd:-5", "auto"])
Slots = tuple[MemorySlot, ...]


@contextlib.contextmanager
def make_slots(*sizes_pages: int, file: Path | None = None) -> Iterator[Slots]:
    """Slots of so many pages; the last one backed by `file`, if there is one."""
    specs = [SlotSpec(f"slot{n}", n << 32, size * PAGE_SIZE) for n, size in enumerate(sizes_pages)]
    if file is not None:
        last = specs[-1]
        specs[-1] = SlotSpec(last.name, last.gpa, last.size_bytes, BackingKind.FILE, str(file))
    slots = tuple(MemorySlot(spec, n) for n, spec in enumerate(specs))
    try:
        yield slots
    finally:
        for slot in slots:
            slot.close()


def fill(slot: MemorySlot, seed: int = 1) -> None:
    """A third each of random, compressible and zero pages, mixed."""
    random = np.random.default_rng(seed)
    rows = slot.array.reshape(-1, PAGE_SIZE)
    kinds = random.integers(0, 3, slot.n_pages)
    rows[kinds == 0] = random.integers(0, 256, ((kinds == 0).sum(), PAGE_SIZE), dtype=np.uint8)
    rows[kinds == 1] = (np.arange(PAGE_SIZE) // 64 % 256).astype(np.uint8)
    rows[kinds == 2] = 0


@dataclass
class Transfer:
    """Two machines' memories and the halves between them."""

    source: Slots
    destination: Slots
    sender: PageSender
    receiver: PageReceiver
    channels: tuple[Channel, Channel]

    def round(self, *bitmaps: Bitmap) -> None:
        """One round; both ends are in the pre-copy phase before and after it."""
        ours, theirs = self.channels
        with beside(self._receive_round):
            ours.send_map(FrameType.ROUND)
            for number, bitmap in enumerate(bitmaps):
                self.sender.send(number, self.source[number].array, bitmap)
            ours.send_map(FrameType.ROUND_END)
            ours.expect_untrusted(FrameType.ROUND_ACK)
        assert theirs.phase is Phase.PRECOPY

    def _receive_round(self) -> None:
        theirs = self.channels[1]
        theirs.expect_untrusted(FrameType.ROUND)
        frame = theirs.receive_untrusted()
        while frame.type is not FrameType.ROUND_END:
            self.receiver.take_untrusted(frame)
            frame = theirs.receive_untrusted()
        theirs.send_map(FrameType.ROUND_ACK)

    def everything(self) -> None:
        self.round(*(pages.full(slot.n_pages) for slot in self.source))

    def assert_equal(self) -> None:
        for ours, theirs in zip(self.source, self.destination, strict=True):
            assert np.array_equal(ours.array, theirs.array)
        for mine, other in zip(self.sender.hashes.tables, self.receiver.hashes.tables, strict=True):
            assert np.array_equal(mine, other)
        self.receiver.compare_untrusted(self.sender.digests())
        # The tables are those of the memory, however it came about.
        self.receiver.hashes.rehash()
        self.receiver.compare_untrusted(self.sender.digests())
        self.sender.hashes.rehash()
        self.receiver.compare_untrusted(self.sender.digests())


@contextlib.contextmanager
def transfer(
    source: Slots, destination: Slots, choice: str = "none", bandwidth: int | None = None
) -> Iterator[Transfer]:
    with channel_pair() as channels:
        for channel in channels:
            channel.session.phase = Phase.PRECOPY
        hasher = PageHasher(SEED)
        sender = PageSender(channels[0], hasher, source, parse_compression(choice), 2, bandwidth)
        receiver = PageReceiver(channels[1], PageHasher(SEED), destination)
        try:
            yield Transfer(source, destination, sender, receiver, channels)
        finally:
            sender.close()


# -- what is sent arrives


@CHOICES
def test_all_of_several_slots(choice: str) -> None:
    sizes = (1000, 1, 513)
    with make_slots(*sizes) as source, make_slots(*sizes) as destination:
        for number, slot in enumerate(source):
            fill(slot, number + 1)
        source[1].array[:] = 3
        with transfer(source, destination, choice) as moving:
            moving.everything()
            moving.assert_equal()
            assert moving.sender.pages_sent + moving.sender.pages_zero == sum(sizes)


@CHOICES
@settings(max_examples=15)
@given(st.data())
def test_scattered_pages_over_rounds(choice: str, data: st.DataObject) -> None:
    """Only what a bitmap names is sent, and zeros that come later replace what was there."""
    n_pages = 300
    with make_slots(n_pages) as (ours,), make_slots(n_pages) as (theirs,):
        model = np.zeros_like(ours.array).reshape(-1, PAGE_SIZE)
        rows = ours.array.reshape(-1, PAGE_SIZE)
        with transfer((ours,), (theirs,), choice) as moving:
            for _ in range(data.draw(st.integers(1, 3))):
                fill(ours, data.draw(st.integers(0, 1000)))
                chosen = data.draw(st.sets(st.integers(0, n_pages - 1), max_size=n_pages))
                index = np.array(sorted(chosen), dtype=np.int64)
                moving.round(pages.from_indices(index, n_pages))
                model[index] = rows[index]
                assert np.array_equal(theirs.array.reshape(-1, PAGE_SIZE), model)
            moving.everything()
            moving.assert_equal()


@CHOICES
def test_memory_that_changes_while_it_is_sent(choice: str) -> None:
    """A torn page is one that was written: the last pass, with the writer at rest, sends it."""
    n_pages = 2048
    with make_slots(n_pages) as (ours,), make_slots(n_pages) as (theirs,):
        fill(ours)
        dirty = np.zeros(n_pages, dtype=np.bool_)
        stop = threading.Event()
        random = np.random.default_rng(5)

        def guest() -> None:
            rows = ours.array.reshape(-1, PAGE_SIZE)
            while not stop.is_set():
                index = random.integers(0, n_pages, 64)
                dirty[index] = True
                rows[index, random.integers(0, PAGE_SIZE)] = random.integers(0, 256)

        with transfer((ours,), (theirs,), choice) as moving:
            with beside(guest):
                try:
                    for _ in range(3):
                        moving.everything()
                finally:
                    stop.set()
            assert dirty.any()
            moving.round(pages.from_bools(dirty))
            moving.assert_equal()


def test_pages_that_stay_zero_are_never_touched() -> None:
    n_pages = 4096
    with make_slots(n_pages) as (ours,), make_slots(n_pages) as (theirs,):
        ours.array[5 * PAGE_SIZE] = 1
        with transfer((ours,), (theirs,)) as moving:
            moving.everything()
            assert moving.sender.pages_sent == 1
            # A page that was written and is zero again is the only one that is written again.
            ours.array[5 * PAGE_SIZE] = 0
            ours.array[9 * PAGE_SIZE] = 1
            moving.everything()
            ours.array[9 * PAGE_SIZE] = 0
            moving.everything()
            touched = pages.full(n_pages) & ~theirs.never_touched()
            assert pages.to_indices(touched, n_pages).tolist() == [5, 9]
            moving.assert_equal()


def test_a_file_at_the_destination_may_hold_anything_before(tmp_path: Path) -> None:
    paths = [tmp_path / "ours", tmp_path / "theirs"]
    paths[0].write_bytes(bytes(64 * PAGE_SIZE))
    paths[1].write_bytes(b"x" * (64 * PAGE_SIZE))
    with make_slots(64, file=paths[0]) as (ours,), make_slots(64, file=paths[1]) as (theirs,):
        ours.array[3 * PAGE_SIZE] = 7
        with transfer((ours,), (theirs,)) as moving:
            untouched = pages.full(64)
            untouched[0] &= ~np.uint64(1 << 3)
            with beside(moving._receive_round):
                moving.channels[0].send_map(FrameType.ROUND)
                moving.sender.skip(0, untouched, BackingKind.FILE)
                moving.sender.send(0, ours.array, ~untouched)
                moving.channels[0].send_map(FrameType.ROUND_END)
                moving.channels[0].expect_untrusted(FrameType.ROUND_ACK)
            moving.assert_equal()
            assert moving.sender.pages_zero == 63


def test_claimed_memory_costs_nothing_before_it_is_filled() -> None:
    """A hostile CONFIGURE may name a terabyte."""
    with make_slots(1 << 28) as (huge,), channel_pair() as (_, theirs):
        with open("/proc/self/statm") as statm:  # noqa: PTH123 (read again below)
            before = int(statm.read().split()[1])
            receiver = PageReceiver(theirs, PageHasher(0), (huge,))
            statm.seek(0)
            grown = int(statm.read().split()[1]) - before
        assert grown * PAGE_SIZE < 16 * MIB
        assert len(receiver.hashes.tables[0]) == 1 << 28


def test_zero_frames_are_merged_and_split_at_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other page: more ranges than one frame holds."""
    monkeypatch.setattr(wire, "MAX_RANGES", 512)
    n_pages = 4 * wire.MAX_RANGES
    with make_slots(n_pages) as ours, make_slots(n_pages) as theirs:
        flags = np.zeros(n_pages, dtype=np.bool_)
        flags[::2] = True
        with transfer(ours, theirs) as moving:
            before = moving.channels[0]._next_sent
            moving.round(pages.from_bools(flags))
            assert moving.channels[0]._next_sent - before == 2 + 2  # ROUND, ROUND_END, two ZERO
            before = moving.channels[0]._next_sent
            moving.everything()
            assert moving.channels[0]._next_sent - before == 2 + 1
            moving.assert_equal()


def test_moving_memory_takes_little_of_it() -> None:
    n_pages = 16384
    with make_slots(n_pages) as ours, make_slots(n_pages) as theirs:
        fill(ours[0])
        for choice in ("none", "zstd"):
            with transfer(ours, theirs, choice) as moving:
                assert peak_bytes(moving.everything) < 16 * wire.BATCH_PAGES * PAGE_SIZE
                moving.assert_equal()


# -- damage


class Flipper:
    """A relay that flips one bit of the stream."""

    def __init__(self, inlet: socket.socket, outlet: socket.socket, bit: int) -> None:
        self._inlet, self._outlet, self._bit = inlet, outlet, bit
        self.flipped = False

    def run(self) -> None:
        seen = 0
        with contextlib.suppress(OSError):
            while data := bytearray(self._inlet.recv(1 << 16)):
                at = self._bit // 8 - seen
                if 0 <= at < len(data):
                    data[at] ^= 1 << self._bit % 8
                    self.flipped = True
                seen += len(data)
                self._outlet.sendall(data)
            self._outlet.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def damaged_transfer(
    source: Slots, destination: Slots, choice: str, bit: int
) -> Iterator[Transfer]:
    """As `transfer`, with one bit of what the source says flipped on the way, past the headers."""
    out, relay_in = socket.socketpair()
    relay_out, back = socket.socketpair()
    flipper = Flipper(relay_in, relay_out, bit)
    ours, theirs = (
        Channel(Link(out, "to"), Role.SOURCE),
        Channel(Link(back, "from"), Role.DESTINATION),
    )
    for channel in (ours, theirs):
        channel.session.phase = Phase.PRECOPY
        channel.link.set_timeout(20)
    sender = PageSender(ours, PageHasher(SEED), source, parse_compression(choice), 1)
    receiver = PageReceiver(theirs, PageHasher(SEED), destination)
    with beside(flipper.run):
        try:
            yield Transfer(source, destination, sender, receiver, (ours, theirs))
        finally:
            sender.close()
            for part in (ours.link, theirs.link):
                part.abort()
                part.close()
    relay_in.close()
    relay_out.close()


@pytest.mark.parametrize("choice", ["none", "zstd"])
@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_is_never_a_silent_wrong_page(choice: str, data: st.DataObject) -> None:
    n_pages = 24
    with make_slots(n_pages) as ours, make_slots(n_pages) as theirs:
        rows = ours[0].array.reshape(-1, PAGE_SIZE)
        rows[:16] = np.random.default_rng(1).integers(0, 16, (16, PAGE_SIZE), dtype=np.uint8)
        rows[3] = rows[11] = 0
        # Anywhere: control frames are short, so half of the tries go to the first kilobyte.
        size = 14 * PAGE_SIZE * (8 if choice == "none" else 5)
        bit = data.draw(st.integers(0, 8 * 1024) | st.integers(0, size))
        with damaged_transfer(ours, theirs, choice, bit) as moving:
            refused = False

            def receive() -> None:
                nonlocal refused
                try:
                    moving._receive_round()
                except (PeerError, LinkLost):
                    refused = True
                    moving.channels[1].link.abort()

            source = moving.channels[0]
            with beside(receive), contextlib.suppress(LinkLost, PeerGaveUp):
                source.send_map(FrameType.ROUND)
                moving.sender.send(0, ours[0].array, pages.full(n_pages))
                source.send_map(FrameType.ROUND_END)
                source.link._sock.shutdown(socket.SHUT_WR)
            wrong = not np.array_equal(ours[0].array, theirs[0].array)
            if not refused:
                try:
                    moving.receiver.compare_untrusted(moving.sender.digests())
                except PeerError as error:
                    refused = True
                    assert "memory arrived damaged: slot 'slot0', pages 0 to 23" in str(error)
            assert refused or not wrong


def test_a_flip_in_raw_bulk_is_named_by_slot_and_pages() -> None:
    sizes = (100, 2000)
    with make_slots(*sizes) as ours, make_slots(*sizes) as theirs:
        for slot in ours:
            fill(slot)
        with transfer(ours, theirs) as moving:
            moving.everything()
            moving.assert_equal()
            page = 1030  # in the third region of the second slot
            bit = np.zeros(2000, dtype=np.bool_)
            bit[page] = True
            theirs[1].array[page * PAGE_SIZE + 77] ^= 4
            ranges = pages.to_ranges(pages.from_bools(bit), 2000)
            moving.receiver._arrived(theirs[1], 1, ranges)  # as if it had come so
            with pytest.raises(PeerError, match=r"slot 'slot1', pages 1024 to 1535$"):
                moving.receiver.compare_untrusted(moving.sender.digests())
            theirs[1].array[1999 * PAGE_SIZE] ^= 1
            moving.receiver.hashes.rehash()
            with pytest.raises(PeerError, match=r"pages 1024 to 1535 \(and 1 more"):
                moving.receiver.compare_untrusted(moving.sender.digests())


@pytest.mark.parametrize(
    "digests", [[], [b""], [b"x" * 8, b"x" * 8], ["x" * 8], [None], [b"x" * 7], [b"x" * 16]]
)
def test_digests_that_are_none(digests: list[object]) -> None:
    with (
        make_slots(10) as ours,
        make_slots(10) as theirs,
        transfer(ours, theirs) as moving,
        pytest.raises(PeerError, match="digests"),
    ):
        moving.receiver.compare_untrusted(digests)


@given(st.binary(max_size=60), st.integers(0, 3 * PAGE_SIZE), st.booleans())
def test_random_page_frames_write_nothing_outside(meta: bytes, bulk: int, zero: bool) -> None:
    kind = FrameType.ZERO if zero else FrameType.PAGES
    bulk = 0 if zero else bulk
    with make_slots(4) as ours, make_slots(4) as theirs, transfer(ours, theirs) as moving:
        moving.channels[1].session.phase = Phase.ROUND
        moving.channels[0].session.phase = Phase.ROUND
        moving.channels[0].send(kind, meta, [bytes(bulk)], bulk)
        frame = moving.channels[1].receive_untrusted()
        with pytest.raises(PeerError) as caught:
            moving.receiver.take_untrusted(frame)
        assert (caught.value.role, caught.value.phase) == ("source", "round")
        assert not theirs[0].array.any()


# -- choosing and pacing


def test_zstd_needs_a_destination_that_has_it() -> None:
    with make_slots(1) as slots, channel_pair() as (ours, _):
        ours.features = FEATURES & ~Feature.ZSTD
        hasher = PageHasher(0)
        with pytest.raises(MigrationFailed, match="does not understand zstd"):
            PageSender(ours, hasher, slots, parse_compression("zstd"))
        sender = PageSender(ours, hasher, slots, parse_compression("auto"))
        assert sender.chooser.choice.mode == "none"
        sender.close()


def chosen(chooser: Chooser, batches: int, *, sampling: bool = True) -> int:
    return sum(chooser.next(sampling=sampling) for _ in range(batches))


def test_auto_compresses_on_a_slow_link_and_not_on_a_fast_one() -> None:
    chooser = Chooser(CompressionChoice("auto"), threads=1)
    assert chosen(chooser, 64) == 1  # a sample
    assert chosen(chooser, 64, sampling=False) == 0  # none in the downtime
    chooser.link_took(MIB, MIB / 3e9)
    chooser.codec_took(MIB, MIB // 3, MIB / 4e8)
    assert chosen(chooser, 64) == 1
    for _ in range(50):
        chooser.link_took(MIB, MIB / 1e8)
    chooser.codec_took(MIB, MIB // 3, MIB / 4e8)
    assert chosen(chooser, 64) == 64
    chooser.codec_took(MIB, MIB, MIB / 4e8)  # from here on the pages do not compress
    assert chosen(chooser, 64) == 1


@pytest.mark.parametrize(("mode", "compressed"), [("none", 0), ("zstd", 100)])
def test_what_the_user_chose_stays(mode: str, compressed: int) -> None:
    chooser = Chooser(parse_compression(mode), threads=1)
    chooser.link_took(MIB, 1.0)
    chooser.codec_took(MIB, 10, 1e-3)
    assert chosen(chooser, 100) == compressed


def test_a_low_bandwidth_is_kept_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1 MB/s no pause between frames is long enough to be taken for a stall."""
    naps: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("migrate.sender.time.sleep", sleep)
    monkeypatch.setattr("migrate.sender.time.monotonic", lambda: clock[0])
    with make_slots(200) as ours, make_slots(200) as theirs:
        ours[0].array[:] = 1
        with transfer(ours, theirs, bandwidth=1_000_000) as moving:
            moving.everything()
            moving.assert_equal()
    assert 0.8 < sum(naps) < 0.9
    assert max(naps) < 0.06


def test_time_not_used_is_not_saved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    naps: list[float] = []
    monkeypatch.setattr("migrate.sender.time.sleep", naps.append)
    monkeypatch.setattr("migrate.sender.time.monotonic", lambda: clock[0])
    pacer = Pacer(1000)
    clock[0] = 100.0
    pacer.sent(1000)
    assert naps == [pytest.approx(0.99)]
    Pacer(None).sent(10**9)
    assert len(naps) == 1

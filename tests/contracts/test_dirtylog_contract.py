"""One contract for every dirty-log back end on every backing that it can track.

The model: each cursor has a set of pending pages. A write adds its pages to every open cursor's
set; a harvest takes the set away; a restore adds pages back. The log must agree exactly: no page
lost, none invented. And whoever copies leased pages at each commit ends with an equal memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from migrate import pages
from migrate.dirtylog import Cursor, DirtyLog, Lease, open_log
from migrate.dirtylog_backends.fake import FakeBackend
from migrate.dirtylog_backends.hook import HookBackend
from migrate.dirtylog_backends.pagemap import PagemapBackend
from migrate.errors import UsageError
from migrate.units import PAGE_SIZE
from migrate.vm.definition import BackingKind, SlotSpec
from migrate.vm.memory import GuestMemory

GPA = 0x8000_0000
N_PAGES = 203  # neither whole words of a bitmap, nor a whole chunk of anything
PAGE = st.integers(0, N_PAGES - 1)

ALL = ("anonymous", "file", "private-file")
CASES = [
    *(("pagemap", backing) for backing in ALL),
    *(("pagemap, full vec", backing) for backing in ALL),
    *(("compare", backing) for backing in ALL),
    *(("hook", backing) for backing in ALL),
    ("hook, announced", "anonymous"),
    ("fake", "anonymous"),
]


class World:
    """A machine's memory of one slot under a log, and the ways to write to it."""

    def __init__(self, kind: str, backing: str, directory: Path) -> None:
        path = None
        if backing != "anonymous":
            path = str(directory / "backing")
            Path(path).write_bytes(os.urandom(PAGE_SIZE) * N_PAGES)
        spec = SlotSpec("ram", GPA, N_PAGES * PAGE_SIZE, BackingKind(backing), path)
        self.memory = GuestMemory([spec])
        self.slot = self.memory.slots[0]
        self.slot.array[3 * PAGE_SIZE] = 7  # before the log: to be seen by nobody
        self.kind = kind
        self.source, self.sink = socket.socketpair()
        self.stamp = 0
        self.log = self.open()

    def open(self) -> DirtyLog:
        if self.kind == "pagemap, full vec":
            return DirtyLog("ram", PagemapBackend(self.slot, vec_entries=2))
        if self.kind == "fake":
            return DirtyLog("ram", FakeBackend(N_PAGES, self.slot.array))
        if self.kind.startswith("hook"):
            return open_log(self.slot, "hook", subscribe=lambda raw: lambda: None)
        return open_log(self.slot, self.kind)

    def _tell(self, first: int, end: int) -> None:
        """What an engine's hook does before the guest's stores."""
        raw = self.log.raw
        if isinstance(raw, FakeBackend):
            raw.write(first, end)
        elif isinstance(raw, HookBackend):
            gpa, size = GPA + first * PAGE_SIZE, (end - first) * PAGE_SIZE
            if self.kind == "hook, announced":
                raw.store(gpa, size)
            else:
                raw.mark_gpa(gpa, size)

    def _told(self) -> None:
        if isinstance(self.log.raw, HookBackend):
            self.log.raw.settled()

    def fresh(self) -> int:
        """A value that memory has not held yet: every write is a change."""
        self.stamp += 1
        return self.stamp << 32 | 0xD1

    def guest_store(self, first: int, end: int, word: int) -> None:
        self._tell(first, end)
        self.slot.words[first * 512 + word : end * 512 : 512] = self.fresh()
        self._told()

    def dma(self, page: int) -> None:
        self.memory.write(GPA + page * PAGE_SIZE + 40, struct.pack("<Q", self.fresh()))
        if isinstance(self.log.raw, FakeBackend):
            self._tell(page, page + 1)

    def receive(self, first: int, end: int) -> None:
        """The kernel writes, by recv_into, from the middle of one page to the middle of another."""
        self._tell(first, end)
        start = first * PAGE_SIZE + 2048
        size = (end - first - 1) * PAGE_SIZE + 8
        self.sink.sendall(struct.pack("<Q", self.fresh()) * (size // 8))
        at = 0
        while at < size:
            at += self.source.recv_into(self.slot.view[start + at : start + size])
        self._told()

    def read_vector(self, one: int, other: int) -> None:
        """The kernel writes two pages by one readv."""
        for page in (one, other):
            self._tell(page, page + 1)
        read_end, write_end = os.pipe()
        os.write(write_end, struct.pack("<QQ", self.fresh(), self.fresh()))
        views = [self.slot.view[page * PAGE_SIZE :][64:72] for page in (one, other)]
        assert os.readv(read_end, views) == 16
        os.close(read_end)
        os.close(write_end)
        self._told()

    def close(self) -> None:
        self.log.close()
        self.log.close()
        self.memory.close()
        self.source.close()
        self.sink.close()


@pytest.fixture(params=CASES, ids=" on ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    kind, backing = request.param
    if kind.startswith("pagemap"):
        request.getfixturevalue("kernel_tracking")
    return kind, backing


@pytest.fixture
def world(case: tuple[str, str], tmp_path: Path) -> Iterator[World]:
    made = World(*case, tmp_path)
    yield made
    made.close()


@dataclass
class Reader:
    """The model of a cursor."""

    cursor: Cursor
    replica: npt.NDArray[np.uint8]
    pending: set[int] = field(default_factory=set)
    harvests: int = 0


@dataclass
class Loan:
    """The model of a lease."""

    reader: Reader
    lease: Lease
    pages: set[int]
    settled: str = "open"


def numbers(bitmap: pages.Bitmap, n_pages: int = N_PAGES) -> set[int]:
    assert len(bitmap) == pages.word_count(n_pages)
    assert not bitmap.size or not (int(bitmap[-1]) >> ((n_pages - 1) % 64 + 1)), "past the end"
    return set(pages.to_indices(bitmap, n_pages).tolist())


def bitmap_of(chosen: set[int]) -> pages.Bitmap:
    return pages.from_indices(np.array(sorted(chosen), dtype=np.int64), N_PAGES)


def copy_pages(into: npt.NDArray[np.uint8], lease: Lease, chosen: set[int]) -> None:
    rows = sorted(chosen)
    into.reshape(-1, PAGE_SIZE)[rows] = lease.memory.reshape(-1, PAGE_SIZE)[rows]


class LogMachine(RuleBasedStateMachine):
    """Anything in any order."""

    case: tuple[str, str]
    directory: Path

    @initialize()
    def begin(self) -> None:
        self.world = World(*self.case, self.directory)
        self.readers: list[Reader] = []
        self.loans: list[Loan] = []
        self.made = 0
        self.open_cursor()

    def wrote(self, *chosen: int) -> None:
        for reader in self.readers:
            reader.pending.update(chosen)

    @rule(first=PAGE, length=st.integers(1, N_PAGES), word=st.integers(0, 511))
    def guest_store(self, first: int, length: int, word: int) -> None:
        end = min(first + length, N_PAGES)
        self.world.guest_store(first, end, word)
        self.wrote(*range(first, end))

    @rule(page=PAGE)
    def dma(self, page: int) -> None:
        self.world.dma(page)
        self.wrote(page)

    @rule(first=PAGE, length=st.integers(1, 3))
    def receive(self, first: int, length: int) -> None:
        end = min(first + length, N_PAGES)
        self.world.receive(first, end)
        self.wrote(*range(first, end))

    @rule(one=PAGE, other=PAGE)
    def read_vector(self, one: int, other: int) -> None:
        self.world.read_vector(one, other)
        self.wrote(one, other)

    @precondition(lambda self: len(self.readers) < 4)
    @rule()
    def open_cursor(self) -> None:
        self.made += 1
        cursor = self.world.log.cursor(f"reader {self.made}")
        self.readers.append(Reader(cursor, self.world.log.memory.copy()))
        assert [reader.cursor for reader in self.readers] == list(self.world.log.cursors)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close_cursor(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        reader.cursor.close()
        self.readers.remove(reader)
        with pytest.raises(UsageError, match="is closed"):
            reader.cursor.harvest()

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def harvest(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        lease = reader.cursor.harvest()
        reader.harvests += 1
        assert lease.epoch == reader.cursor.epoch == reader.harvests
        assert numbers(lease.bitmap) == reader.pending
        assert lease.count == len(reader.pending) and lease.n_pages == N_PAGES
        self.loans.append(Loan(reader, lease, reader.pending))
        reader.pending = set()

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), edges=st.tuples(st.integers(0, N_PAGES), st.integers(0, N_PAGES)))
    def peek(self, data: st.DataObject, edges: tuple[int, int]) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        first, end = sorted(edges)
        if first < end:
            wanted = {page - first for page in reader.pending if first <= page < end}
            assert numbers(reader.cursor.peek(first, end), end - first) == wanted
        assert numbers(reader.cursor.peek()) == reader.pending
        assert reader.cursor.count() == len(reader.pending)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), chosen=st.sets(PAGE))
    def mark(self, data: st.DataObject, chosen: set[int]) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        reader.cursor.mark(bitmap_of(chosen))
        reader.pending |= chosen

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def mark_all(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        reader.cursor.mark_all()
        reader.pending = set(range(N_PAGES))

    def draw_loan(self, data: st.DataObject) -> Loan:
        return data.draw(st.sampled_from(self.loans))

    def settle(self, loan: Loan, how: str, back: set[int]) -> None:
        loan.reader.pending |= back
        copy_pages(loan.reader.replica, loan.lease, loan.pages - back)
        loan.settled = how
        assert loan.lease.state == how

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        loan = self.draw_loan(data)
        if loan.settled == "restored":
            with pytest.raises(UsageError, match="is restored: it cannot commit"):
                loan.lease.commit()
            return
        loan.lease.commit()
        if loan.settled == "open":
            self.settle(loan, "committed", set())

    @precondition(lambda self: self.loans)
    @rule(data=st.data(), only=st.none() | st.sets(PAGE))
    def restore(self, data: st.DataObject, only: set[int] | None) -> None:
        loan = self.draw_loan(data)
        bitmap = None if only is None else bitmap_of(only)
        if loan.settled == "committed":
            with pytest.raises(UsageError, match="is committed: it cannot restore"):
                loan.lease.restore(bitmap)
            return
        back = loan.pages if only is None else only & loan.pages
        loan.lease.restore(bitmap)
        self.settle(loan, "restored", back)
        loan.pages = loan.pages - back  # a page goes back once

    @precondition(lambda self: any(loan.settled == "open" for loan in self.loans))
    @rule(data=st.data(), fails=st.booleans())
    def leave_the_block(self, data: st.DataObject, fails: bool) -> None:
        loan = data.draw(st.sampled_from([loan for loan in self.loans if loan.settled == "open"]))
        with contextlib.suppress(ZeroDivisionError), loan.lease:
            if fails:
                raise ZeroDivisionError
        self.settle(loan, *(("restored", loan.pages) if fails else ("committed", set())))
        loan.pages = set()

    @precondition(lambda self: any(loan.settled == "open" for loan in self.loans))
    @rule(data=st.data())
    def forget_a_lease(self, data: st.DataObject) -> None:
        loan = data.draw(st.sampled_from([loan for loan in self.loans if loan.settled == "open"]))
        self.loans.remove(loan)
        loan.reader.pending |= loan.pages
        del loan.lease

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            for loan in self.loans:
                if loan.settled == "open":
                    loan.lease.restore()
                    loan.reader.pending |= loan.pages
            for reader in self.readers:
                with reader.cursor.harvest() as lease:
                    assert numbers(lease.bitmap) == reader.pending
                    copy_pages(reader.replica, lease, reader.pending)
                assert np.array_equal(reader.replica, self.world.slot.array)
                assert reader.cursor.count() == 0
        finally:
            self.loans.clear()
            self.world.close()


def test_any_order_of_everything(case: tuple[str, str], tmp_path: Path) -> None:
    machine = type("Machine", (LogMachine,), {"case": case, "directory": tmp_path})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_fresh_cursor_is_clean_and_takes_nothing_from_the_others(world: World) -> None:
    early = world.log.cursor("early")
    world.guest_store(10, 20, 0)
    late = world.log.cursor("late")
    assert late.count() == 0 and early.count() == 10
    world.dma(100)
    assert numbers(late.harvest().bitmap) == {100}
    assert numbers(early.harvest().bitmap) == {*range(10, 20), 100}


def test_a_harvest_that_fails_half_way_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursors = [world.log.cursor("a"), world.log.cursor("b")]
    world.guest_store(5, 7, 0)
    collect = world.log.raw.collect

    def fail(into: pages.Bitmap) -> None:
        collect(into)
        raise OSError("after the pages were reset")

    monkeypatch.setattr(world.log.raw, "collect", fail)
    with pytest.raises(OSError, match="after the pages"):
        cursors[0].harvest()
    monkeypatch.undo()
    for cursor in cursors:
        with cursor.harvest() as lease:
            assert numbers(lease.bitmap) >= {5, 6}
        assert cursor.count() == 0


def test_a_lease_that_is_dropped_gives_its_pages_back(world: World) -> None:
    cursor = world.log.cursor("a")
    world.guest_store(5, 7, 0)
    cursor.harvest()
    assert numbers(cursor.peek()) == {5, 6}


def test_misuse_is_named(world: World) -> None:
    cursor = world.log.cursor("a")
    with pytest.raises(UsageError, match="slot 'ram' has a dirty-log cursor 'a' already"):
        world.log.cursor("a")
    for first, end in ((-1, 5), (0, N_PAGES + 1), (6, 5)):
        with pytest.raises(UsageError, match="are not in slot 'ram'"):
            cursor.peek(first, end)
    with pytest.raises(UsageError, match="does not fit slot 'ram'"):
        cursor.mark(pages.empty(N_PAGES + 64))
    with pytest.raises(ValueError, match="read-only"):
        cursor.harvest().bitmap[0] = 1
    cursor.close()
    world.log.cursor("a").close()
    other = world.log.cursor("other")
    world.log.close()
    for call in (other.harvest, other.peek, other.mark_all, lambda: world.log.cursor("new")):
        with pytest.raises(UsageError, match="is closed"):
            call()


def test_the_log_ends_and_another_begins(world: World) -> None:
    """After close the memory is free for a new log, and is written as before."""
    world.log.close()
    world.slot.array[0] ^= 0xFF
    world.log = world.open()
    cursor = world.log.cursor("a")
    world.dma(9)
    assert numbers(cursor.harvest().bitmap) == {9}


def test_bits_past_the_end_are_not_taken(world: World) -> None:
    cursor = world.log.cursor("a")
    cursor.mark(np.full(pages.word_count(N_PAGES), np.uint64(2**64 - 1)))
    assert numbers(cursor.harvest().bitmap) == set(range(N_PAGES))

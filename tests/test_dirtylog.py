"""The dirty log beside writers that run at the same time, on real engines and kernels.

What every back end promises one call at a time is in contracts/test_dirtylog_contract.py.
"""

from __future__ import annotations

import ctypes
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import unicorn
from unicorn import riscv_const

from migrate import dirtylog, pages
from migrate.dirtylog import DirtyLog, open_log
from migrate.dirtylog_backends.hook import HookBackend
from migrate.dirtylog_backends.pagemap import PagemapBackend
from migrate.errors import HostError, UsageError
from migrate.linux import uffd
from migrate.units import MIB, PAGE_SIZE
from migrate.vm.definition import SlotSpec
from migrate.vm.memory import GuestMemory, MemorySlot

GPA = 0x8000_0000
N_PAGES = 4096


@pytest.fixture
def slot() -> Iterator[MemorySlot]:
    memory = GuestMemory([SlotSpec("ram", GPA, N_PAGES * PAGE_SIZE)])
    yield memory.slots[0]
    memory.close()


def numbers(bitmap: pages.Bitmap, n_pages: int = N_PAGES) -> list[int]:
    found: list[int] = [int(page) for page in pages.to_indices(bitmap, n_pages)]
    return found


class Writer(threading.Thread):
    """Stores by memset, which ctypes calls without the GIL: at the same time as any harvest."""

    def __init__(self, slot: MemorySlot, announce: HookBackend | None = None) -> None:
        super().__init__(daemon=True)
        self.slot = slot
        self.announce = announce
        self.until = threading.Event()
        self.pages: set[int] = set()
        self.stores = 0

    def run(self) -> None:
        choice = random.Random(5)
        memset = ctypes.CDLL(None).memset
        memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        while not self.until.is_set():
            page = choice.randrange(N_PAGES)
            # Often the same few pages again, across an edge, with any value.
            page = page % 8 if self.stores % 3 else page
            at = min(page * PAGE_SIZE + choice.randrange(PAGE_SIZE), (N_PAGES - 1) * PAGE_SIZE)
            if self.announce is not None:
                self.announce.store(GPA + at, 1500)
            memset(self.slot.hva + at, choice.randrange(4), 1500)
            self.pages.update((at // PAGE_SIZE, (at + 1499) // PAGE_SIZE))
            self.stores += 1


@pytest.mark.parametrize("kind", ["pagemap", "compare", "hook"])
def test_copying_dirty_pages_while_they_are_written_ends_equal(
    kind: str, slot: MemorySlot, request: pytest.FixtureRequest
) -> None:
    """A pre-copy in small, with a second reader and failing rounds beside it."""
    if kind == "pagemap":
        request.getfixturevalue("kernel_tracking")
    slot.prealloc()
    log = open_log(slot, kind, subscribe=lambda raw: lambda: None)
    raw = log.raw
    cursor, probe = log.cursor("migration"), log.cursor("probe")
    replica = log.memory.copy()
    rows = replica.reshape(-1, PAGE_SIZE)
    reported: set[int] = set()
    writer = Writer(slot, raw if isinstance(raw, HookBackend) else None)
    writer.start()
    probing = threading.Event()

    def probe_now_and_then() -> None:
        while not probing.wait(0.002):
            with probe.harvest() as lease:
                reported.update(numbers(lease.bitmap))

    prober = threading.Thread(target=probe_now_and_then)
    prober.start()

    def copy_round(*, fail: bool = False) -> None:
        with cursor.harvest() as lease:
            chosen = pages.to_indices(lease.bitmap, N_PAGES)
            rows[chosen] = lease.memory.reshape(-1, PAGE_SIZE)[chosen]
            if fail:
                rows[chosen] = 0
                raise ConnectionError

    try:
        ends = time.monotonic() + 0.6
        rounds = 0
        while time.monotonic() < ends or rounds < 20:
            rounds += 1
            if rounds % 5 == 0:
                with pytest.raises(ConnectionError):
                    copy_round(fail=True)
            else:
                copy_round()
            cursor.peek(0, 256)
            time.sleep(0.001)
    finally:
        writer.until.set()
        writer.join()
        probing.set()
        prober.join()
    assert writer.stores > 100
    copy_round()
    assert np.array_equal(replica, slot.array)
    reported.update(numbers(probe.harvest().bitmap))
    if kind == "compare":
        assert reported <= writer.pages  # a value that was there already is no change
    else:
        assert reported == writer.pages
    log.close()


def test_a_page_that_changes_back_between_two_looks(slot: MemorySlot) -> None:
    """`compare` cannot see it; whoever reads the log's memory does not see it either."""
    log = open_log(slot, "compare")
    cursor = log.cursor("a")
    slot.array[5] = 1
    with cursor.harvest() as lease:
        assert numbers(lease.bitmap) == [0]
    slot.array[5] = 2
    copied = int(log.memory[5])
    slot.array[5] = 1
    with cursor.harvest() as lease:
        assert lease.count == 0
    assert copied == 1 == int(lease.memory[5])
    log.close()


def test_an_announced_store_is_dirty_until_it_is_known_to_be_done(slot: MemorySlot) -> None:
    """The hook runs before the store: a harvest in between must not be the last word."""
    raw = HookBackend(slot, lambda raw: lambda: None)
    log = DirtyLog("ram", raw)
    cursor = log.cursor("a")

    def harvest() -> list[int]:
        with cursor.harvest() as lease:
            return numbers(lease.bitmap)

    raw.store(GPA + 3 * PAGE_SIZE - 4, 8)
    assert harvest() == [2, 3]
    slot.array[3 * PAGE_SIZE - 4] = 1  # only now it lands
    assert harvest() == [2, 3]
    raw.store(GPA + 9 * PAGE_SIZE, 8)
    assert harvest() == [2, 3, 9]
    assert harvest() == [9]
    raw.settled()
    assert harvest() == [9]
    assert harvest() == []
    log.close()


def test_the_hook_ends_its_subscriptions(slot: MemorySlot) -> None:
    ended = []
    log = open_log(slot, "hook", subscribe=lambda raw: lambda: ended.append(raw))
    assert len(slot.listeners) == 1
    log.close()
    log.close()
    assert slot.listeners == [] and len(ended) == 1


def guest_of(slot: MemorySlot) -> Any:
    """An engine on the slot: from x5 to x8 in steps of x7, store x6."""
    engine: Any = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)  # type: ignore[attr-defined,no-untyped-call]
    engine.mem_map_ptr(slot.gpa, slot.size_bytes, unicorn.UC_PROT_ALL, slot.hva)
    # sd x6, 0(x5); add x5, x5, x7; bne x5, x8, -8
    slot.words[0:2] = np.array([0x007282B3_0062B023, 0x00000013_FE829CE3], dtype=np.uint64)
    return engine


def run_guest(engine: Any, first: int, end: int, step: int, value: int) -> None:
    for register, content in (
        (riscv_const.UC_RISCV_REG_X5, GPA + first * PAGE_SIZE),
        (riscv_const.UC_RISCV_REG_X6, value),
        (riscv_const.UC_RISCV_REG_X7, step * PAGE_SIZE),
        (riscv_const.UC_RISCV_REG_X8, GPA + end * PAGE_SIZE),
    ):
        engine.reg_write(register, content)
    engine.emu_start(GPA, GPA + 12)


@pytest.mark.parametrize("kind", ["pagemap", "compare", "hook"])
def test_stores_of_a_guest(kind: str, slot: MemorySlot, request: pytest.FixtureRequest) -> None:
    if kind == "pagemap":
        request.getfixturevalue("kernel_tracking")
    engine = guest_of(slot)

    def subscribe(raw: HookBackend) -> Callable[[], None]:
        def on_write(
            uc: object, access: int, gpa: int, size: int, value: int, data: object
        ) -> None:
            raw.store(gpa, size)

        handle = engine.hook_add(unicorn.UC_HOOK_MEM_WRITE, on_write)
        return lambda: engine.hook_del(handle)

    with open_log(slot, kind, subscribe=subscribe) as log:
        cursor = log.cursor("a")
        for value, step in ((1, 1), (2, 3), (3, 2)):
            run_guest(engine, 6, 606, step, value)
            if isinstance(log.raw, HookBackend):
                log.raw.settled()
            with cursor.harvest() as lease:
                assert numbers(lease.bitmap) == list(range(6, 606, step))
        assert cursor.count() == 0
    run_guest(engine, 6, 606, 1, 4)  # the log is gone; the guest runs on


def test_auto_falls_back_and_says_so_once(
    slot: MemorySlot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(uffd, "userfaultfd", refuse)
    monkeypatch.setattr(dirtylog, "_said", set())
    with caplog.at_level(logging.WARNING, logger="migrate"):
        for _ in range(2):
            with open_log(slot) as log:
                assert log.backend == "compare"
    assert len(caplog.records) == 1
    assert "Function not implemented" in caplog.text
    with pytest.raises(HostError, match=r"'pagemap' cannot work here: .*Function not impl"):
        open_log(slot, "pagemap")


def test_auto_takes_the_kernel(slot: MemorySlot, kernel_tracking: None) -> None:
    with open_log(slot) as log:
        assert log.backend == "pagemap"
        for backend in ("auto", "pagemap"):
            with pytest.raises(UsageError, match="slot 'ram' has a dirty log already"):
                open_log(slot, backend)


def test_a_wrong_back_end_or_slot_is_named(slot: MemorySlot) -> None:
    with pytest.raises(UsageError, match="no dirty-log back end 'kvm'; there are auto, pagemap"):
        open_log(slot, "kvm")
    with pytest.raises(UsageError, match="'hook' sees only what it is told"):
        open_log(slot, "hook")
    slot.close()
    with pytest.raises(UsageError, match="slot 'ram' is closed"):
        open_log(slot)


def test_a_slot_closed_before_its_log_is_no_crash(kernel_tracking: None) -> None:
    memory = GuestMemory([SlotSpec("ram", GPA, MIB)])
    log = open_log(memory.slots[0])
    cursor = log.cursor("a")
    memory.close()
    assert cursor.harvest().count == 0
    log.close()


def test_reading_and_never_touched_do_not_disturb_the_log(
    slot: MemorySlot, kernel_tracking: None
) -> None:
    with open_log(slot, "pagemap") as log:
        cursor = log.cursor("a")
        slot.array[7 * PAGE_SIZE] = 1
        assert int(slot.array.sum()) == 1
        assert numbers(cursor.peek()) == [7]
        slot.never_touched()
        assert numbers(cursor.harvest().bitmap) == [7]
        slot.prealloc()
        assert cursor.count() == N_PAGES


def test_harvest_and_peek_cost_no_python_a_page(slot: MemorySlot, kernel_tracking: None) -> None:
    """Not a measurement: every second page of 16 MiB takes a few calls, whatever the vector."""
    calls = 0
    raw = PagemapBackend(slot, vec_entries=512)
    scan = raw._pagemap.scan

    def counted(*args: object, **keywords: object) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        return scan(*args, **keywords)  # type: ignore[arg-type]

    raw._pagemap.scan = counted  # type: ignore[method-assign]
    with DirtyLog("ram", raw) as log:
        cursor = log.cursor("a")
        slot.array[:: 2 * PAGE_SIZE] = 1
        calls = 0
        with cursor.harvest() as lease:
            assert lease.count == N_PAGES // 2
        assert calls <= N_PAGES // 2 // 512 + 1

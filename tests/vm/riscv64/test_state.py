"""Saving and restoring a hart, and that runs repeat exactly."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import StateFormatError, UsageError
from migrate.vm.riscv64 import registers
from tests.vm.riscv64 import asm
from tests.vm.riscv64.conftest import RAM, Box, MakeBox
from tests.vm.riscv64.miniboard import MiniBoard, program


def full_state() -> dict[str, Any]:
    """A state in which every register differs from its reset value."""
    words = {name: 0x1000_0000 + 8 * i for i, name in enumerate(registers.WORDS)}
    words |= {
        "priv": 1, "load_res": RAM + 0x100, "load_val": 5, "frm": 3, "fflags": 9,
        "mstatus": 0x8000_0000_0000_6080, "mie": 0xAAA, "mip": 0x2A2, "medeleg": 0xB1FF,
        "mideleg": 0x222, "mtvec": RAM + 0x2001, "stvec": RAM + 0x3000,
        "satp": 8 << 60 | 0x80010, "pc": RAM + 0x1000,
    }  # fmt: skip
    cfg = [0x9F, 0x18, 0x0F] + [0] * 13
    addr = [RAM >> 2 | 0x1FF, (1 << 54) - 1, RAM >> 2] + [i << 20 for i in range(13)]
    return registers.state_of(words, cfg, addr)


def test_every_register_comes_back(make_box: MakeBox) -> None:
    box = make_box(harts=2)
    for hart in (0, 1):
        box.core.set_state_untrusted(hart, full_state())
        assert box.core.get_state(hart) == full_state()
    box.core.select(1)
    assert box.core.get_state(1) == full_state()
    # swapped in again: all but the reservation
    box.core.select(0)
    box.core.select(1)
    fields = full_state()["fields"] | {"load_res": (1 << 64) - 1}
    assert box.core.get_state(1)["fields"] == fields


def test_a_restored_lock_can_be_loosened(box: Box) -> None:
    """Locked PMP entries refuse the guest, never a restore."""
    state = full_state()
    box.core.set_state_untrusted(0, state)
    state["fields"]["pmpcfg"][0] = 0
    state["fields"]["pmpaddr"][0] = 77
    box.core.set_state_untrusted(0, state)
    assert box.core.get_state(0) == state


def test_abi_names(box: Box) -> None:
    box.core.write_reg("a0", 5)
    box.core.write_reg("fs1", 6)
    assert box.core.read_reg("x10") == 5 and box.core.read_reg("f9") == 6
    assert box.core.read_reg("fp") == box.core.read_reg("s0") == box.core.read_reg("x8")
    box.core.write_reg("zero", 5)
    assert box.core.read_reg("zero") == 0
    with pytest.raises(UsageError, match="no register 'rax'"):
        box.core.read_reg("rax")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priv", 2), ("priv", 4), ("satp", 7 << 60), ("mtvec", 2), ("stvec", 3), ("frm", 8),
        ("mstatus", 1 << 50), ("mip", 1 << 20), ("mideleg", 1 << 7), ("pc", -1), ("x1", 1 << 64),
        ("x1", "1"), ("pmpcfg", [0] * 15), ("pmpcfg", [256] + [0] * 15),
    ],
)  # fmt: skip
def test_impossible_states_are_refused_whole(box: Box, name: str, value: object) -> None:
    before = box.core.get_state(0)
    state = full_state()
    state["fields"][name] = value
    with pytest.raises(StateFormatError):
        box.core.set_state_untrusted(0, state)
    assert box.core.get_state(0) == before


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_rubbish_is_refused(rubbish: object) -> None:
    state = full_state()
    state["fields"]["mstatus"] = rubbish
    if type(rubbish) is not int:
        with pytest.raises(StateFormatError):
            registers.fields_untrusted(state)
    with pytest.raises(StateFormatError):
        registers.fields_untrusted(rubbish)


def end_of(native: bool) -> int:
    return 2_000_000 if native else 200_000


def reference(native: bool, points: Sequence[int] = ()) -> tuple[dict[str, Any], int]:
    """The end of an undisturbed run, which stops at these points and goes on."""
    board = MiniBoard(native)
    program(board.box)
    for point in (*points, end_of(native)):
        board.run_until(point)
    state = board.save()
    interrupts = board.box.get("s8")
    board.close()
    return state, interrupts


def test_two_runs_are_equal(native: bool) -> None:
    first, interrupts = reference(native)
    assert interrupts > 5
    assert first == reference(native)[0]


def test_a_run_moved_to_new_engines_is_equal(native: bool) -> None:
    """Saved at random points and restored into fresh engines: registers, memory, time agree."""
    rng = random.Random(5)
    points = sorted(rng.randrange(end_of(native)) for _ in range(12))
    board = MiniBoard(native)
    program(board.box)
    for point in points:
        board.run_until(point)
        state = board.save()
        board.close()
        board = MiniBoard(native)
        board.load(state)
    board.run_until(end_of(native))
    final = board.save()
    board.close()
    assert final == reference(native, points)[0]
    if native:
        # Where one stops shifts nothing; without the compiled part it ends a slice.
        assert final == reference(native)[0]


def test_stops_from_another_thread_shift_nothing(native: bool) -> None:
    expected, _ = reference(native)
    board = MiniBoard(native)
    program(board.box)
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            board.core.stop()
            time.sleep(0.0001)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        board.run_until(end_of(native))
    finally:
        over.set()
        thread.join()
    assert board.save() == expected
    board.close()


def test_engines_agree(native: bool) -> None:
    """With and without the compiled part, a guest that reads no clock computes the same."""
    if native:
        pytest.skip("compares the two")
    results = []
    for kind in (False, None):
        from migrate.vm.riscv64.core import Riscv64Core

        box = Box(Riscv64Core(1, native=kind))
        program(box)
        # without the counters, timer and wait
        for at in (8, 10, 18, 19, 20):
            box.put(0x1000 + 4 * at, asm.NOP)
        for at in (9, 11):
            box.put(0x1000 + 4 * at, asm.NOP)
        box.put(0x1000 + 4 * 16, asm.slli("t3", "s0", 52))
        box.put(0x1000 + 4 * 18, asm.WFI)
        while box.core.run(10_000).reason.name == "BUDGET":
            pass
        words = box.core.get_state(0)["fields"]
        results.append((words, bytes(box.memory)))
        box.core.close()
    assert results[0] == results[1]

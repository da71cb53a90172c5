"""The machine: its vcpu thread stops, goes on and ends on request, and tells whoever waits."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.errors import GuestError, MachineStateError
from migrate.machine import Machine, State
from migrate.units import MIB
from migrate.vm.console import Console
from migrate.vm.definition import MachineDefinition, SlotSpec
from migrate.vm.guest import Pacing
from tests.guests import RAM, Running, make_guest


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a trio task."""

    @functools.wraps(test)
    def body(*args: Any, **kwargs: Any) -> None:
        trio.run(functools.partial(test, *args, **kwargs))

    return body


def executed(running: Running) -> int:
    return int(running.machine.board.stats["executed"])


@run
async def test_pause_stands_still_and_resume_goes_on(tmp_path: Path) -> None:
    running = make_guest(tmp_path)
    machine = running.machine
    try:
        assert machine.state is State.PAUSED
        await machine.resume()
        assert machine.state is State.RUNNING
        await running.beats()
        await machine.pause()
        assert machine.state is State.PAUSED
        before = executed(running)
        await trio.sleep(0.03)
        assert executed(running) == before
        await machine.pause()  # again: nothing to do
        await machine.resume()
        await machine.resume()
        await running.beats()
        assert executed(running) > before
    finally:
        machine.close()


@run
async def test_a_pause_is_quick(tmp_path: Path) -> None:
    """1 ms on an idle machine; here the median of 30 has to stay within 5."""
    running = make_guest(tmp_path)
    machine = running.machine
    took = []
    try:
        await machine.resume()
        await running.beats()
        for _ in range(30):
            started = time.perf_counter()
            await machine.pause()
            took.append(time.perf_counter() - started)
            await machine.resume()
            await trio.sleep(0.002)
    finally:
        machine.close()
    assert statistics.median(took) < 0.005, took


@run
async def test_a_guest_asleep_is_paused_at_once(tmp_path: Path) -> None:
    running = make_guest(tmp_path, pacing=Pacing.WFI, heartbeat_ms=60_000)
    machine = running.machine
    try:
        await machine.resume()
        await running.until(lambda: b"FILLED" in running.console.output)
        await trio.sleep(0.02)
        with trio.fail_after(2):
            await machine.pause()
    finally:
        machine.close()


@run
async def test_stop_and_start_from_many_sides(tmp_path: Path) -> None:
    """Pauses and resumes that cross: none hangs, the last word counts."""
    running = make_guest(tmp_path)
    machine = running.machine
    try:
        await machine.resume()

        async def toggle(number: int) -> None:
            for step in range(20):
                with contextlib.suppress(MachineStateError):  # taken back by another one
                    if (number + step) % 2:
                        await machine.pause()
                    else:
                        await machine.resume()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(toggle, number)
            await machine.resume()
            assert machine.state is State.RUNNING
            await running.beats()
            await machine.pause()
        assert machine.state is State.PAUSED
    finally:
        machine.close()


def test_threads_that_are_not_trios(tmp_path: Path) -> None:
    running = make_guest(tmp_path)
    machine = running.machine
    try:
        machine.resume_now()
        assert machine.state is State.RUNNING
        machine.pause_now()
        assert machine.state is State.PAUSED
        before = machine.counters.stopped_ns
        assert machine.counters.started_ns <= before <= time.monotonic_ns()
    finally:
        machine.close()


@run
async def test_a_guest_that_switches_itself_off(tmp_path: Path) -> None:
    running = make_guest(tmp_path, heartbeat_ms=1, stop_after_heartbeats=2)
    machine = running.machine
    try:
        machine.start()
        with trio.fail_after(60):
            assert await machine.ended() is State.SHUTDOWN
        assert machine.board.exit_code == 0
        assert b"BYE" in running.console.output
        for verb in (machine.pause, machine.resume):
            with pytest.raises(MachineStateError, match="has shut down"):
                await verb()
    finally:
        machine.close()


@run
async def test_a_guest_that_cannot_go_on(tmp_path: Path) -> None:
    """An error of the board on the vcpu thread reaches whoever waits."""
    running = make_guest(tmp_path)
    machine = running.machine

    def fail() -> None:
        raise GuestError("machine 'guest': it jumped to nowhere")

    try:
        await machine.resume()
        machine.board.post(fail)
        with trio.fail_after(10):
            assert await machine.ended() is State.FAILED
        with pytest.raises(GuestError, match="jumped to nowhere"):
            machine.raise_failure()
        with pytest.raises(MachineStateError, match="has failed"):
            await machine.pause()
    finally:
        machine.close()


@run
async def test_an_unexpected_error_names_the_machine(tmp_path: Path) -> None:
    running = make_guest(tmp_path)
    machine = running.machine

    def fail() -> None:
        raise ZeroDivisionError

    try:
        await machine.resume()
        machine.board.post(fail)
        await machine.ended()
        with pytest.raises(GuestError, match=r"'guest'.*ZeroDivisionError"):
            machine.raise_failure()
    finally:
        machine.close()


@run
async def test_a_machine_that_was_let_go_never_runs_again(tmp_path: Path) -> None:
    machine = make_guest(tmp_path).machine
    try:
        await machine.resume()
        with pytest.raises(MachineStateError, match="while it runs"):
            machine.let_go()
        with pytest.raises(MachineStateError, match="while it runs"):
            machine.save()
        await machine.pause()
        machine.let_go()
        assert await machine.ended() is State.MIGRATED
        for verb in (machine.start, machine.save, machine.pause_now, machine.resume_now):
            with pytest.raises(MachineStateError, match="migrated"):
                verb()
    finally:
        machine.close()


@run
async def test_waiting_for_the_end_can_be_cancelled(tmp_path: Path) -> None:
    machine = make_guest(tmp_path).machine
    try:
        await machine.resume()
        with trio.move_on_after(0.01) as scope:
            await machine.ended()
        assert scope.cancelled_caught
        assert machine.state is State.RUNNING
        await machine.pause()
    finally:
        machine.close()


@run
async def test_a_pause_that_is_cancelled_is_still_carried_through(tmp_path: Path) -> None:
    machine = make_guest(tmp_path).machine
    try:
        await machine.resume()
        with trio.CancelScope() as scope:
            scope.cancel()
            await machine.pause()
        assert machine.state is State.PAUSED
    finally:
        machine.close()


@run
async def test_cursors_of_all_slots(tmp_path: Path, kernel_tracking: None) -> None:
    running = make_guest(
        tmp_path,
        working_set_bytes=MIB,
        slots=(SlotSpec("more", RAM + (1 << 32), MIB),),
    )
    machine = running.machine
    try:
        with machine.reading("probe") as (ram, more):
            await machine.resume()
            await running.beats(5)
            assert ram.count() > 0
            assert more.count() == 0
            machine.memory.write(RAM + (1 << 32), b"x")
            assert more.count() == 1
            logs = machine.stats["logs"]
            assert set(logs["ram"]["cursors"]) == {"probe"}
        assert machine.stats["logs"]["ram"]["cursors"] == {}
        await machine.pause()
    finally:
        machine.close()


def test_close_is_prompt_and_repeatable(tmp_path: Path) -> None:
    before = threading.active_count()
    machine = make_guest(tmp_path).machine
    machine.resume_now()
    started = time.perf_counter()
    machine.close()
    machine.close()
    assert time.perf_counter() - started < 5
    assert threading.active_count() == before
    with pytest.raises(MachineStateError, match="closed"):
        machine.start()


def test_a_machine_that_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    definition = MachineDefinition(
        "guest", (SlotSpec("ram", RAM, MIB), SlotSpec("ram2", RAM + MIB // 2, MIB))
    )
    with pytest.raises(Exception, match="overlaps"):
        Machine.create(definition, Console())
    assert threading.active_count() == before


def test_a_process_may_end_with_its_guest_running(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, time; from tests.guests import make_guest;"
        "guest = make_guest(pathlib.Path(sys.argv[1])); guest.machine.start(); time.sleep(0.2)"
    )
    root = Path(__file__).parent.parent
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr

"""The board under small programs: devices, timers, sleep, turns, stops, and state that moves."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from riscv64 import asm

from migrate.errors import HostError, MachineStateError, StateFormatError, UsageError
from migrate.vm.board import Board, StopReason
from migrate.vm.console import Console
from migrate.vm.definition import DiskSpec, MachineDefinition, SlotSpec
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE

UART, TEST, CLINT = 0x1000_0000, 0x10_0000, 0x200_0000
MTIMECMP, MTIME = CLINT + 0x4000, CLINT + 0xBFF8
RAM_BYTES = 4 << 20
DATA = RAM_BASE + 0x10_0000
MS = 10_000
"""Ticks of a millisecond."""


def li(register: str, value: int) -> list[int]:
    """Load a positive constant, 11 bits at a time."""
    words = [asm.addi(register, "zero", 0)]
    for shift in range(44, -1, -11):
        if len(words) > 1 or value >> shift:
            words.append(asm.slli(register, register, 11))
            words.append(asm.addi(register, register, value >> shift & 0x7FF))
    return words


def store(address: int, value: int, how: Callable[[str, str], int] = asm.sw) -> list[int]:
    return [*li("t0", address), *li("t1", value), how("t1", "t0")]


def put(text: str) -> list[int]:
    return [word for char in text for word in store(UART, ord(char), asm.sb)]


def forever() -> list[int]:
    return [asm.j(0)]


POWER_OFF = [*store(TEST, 0x5555), *forever()]


def only_hart_0() -> list[int]:
    """The other harts go to sleep for good."""
    return [asm.csrr("t0", "mhartid"), asm.beq("t0", "zero", 12), asm.WFI, asm.j(-4)]


def sleep(ticks: int, *, supervisor: bool) -> list[int]:
    """Set a timer `ticks` ahead, wait for it in WFI, with interrupts off."""
    if supervisor:
        enable = [*li("t0", 1 << 5), asm.csrw("sie", "t0")]
        arm = [
            asm.csrr("a0", "time"), *li("t1", ticks), asm.add("a0", "a0", "t1"),
            *li("a7", 0x54494D45), asm.addi("a6", "zero", 0), asm.ECALL,
        ]  # fmt: skip
        pending, mask = "sip", 1 << 5
    else:
        enable = [*li("t0", 1 << 7), asm.csrw("mie", "t0")]
        arm = [
            *li("t0", MTIME), asm.ld("t1", "t0"), *li("t2", ticks), asm.add("t1", "t1", "t2"),
            *li("t0", MTIMECMP), asm.sd("t1", "t0"),
        ]  # fmt: skip
        pending, mask = "mip", 1 << 7
    wait = [
        asm.WFI,
        asm.csrr("t0", pending),
        asm.andi("t0", "t0", mask),
        asm.beq("t0", "zero", -12),
    ]
    return [*enable, *arm, *wait]


class Recorder(Console):
    """Keeps all output, and lets a test wait for some."""

    def __init__(self) -> None:
        super().__init__()
        self.text = b""
        self._news = threading.Condition()

    def write(self, data: bytes) -> None:
        super().write(data)
        with self._news:
            self.text += data
            self._news.notify_all()

    def wait_for(self, text: bytes) -> None:
        with self._news:
            assert self._news.wait_for(lambda: text in self.text, 20), self.text


class Rig:
    """A board that can be run beside the test, and moved."""

    def __init__(self, definition: MachineDefinition) -> None:
        self.definition = definition
        self.memory = GuestMemory(definition.slots)
        self.console = Recorder()
        self.board = Board(definition, self.memory, console=self.console)
        self.reason: StopReason | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        def main() -> None:
            self.reason = self.board.run()

        self.reason = None
        self._thread = threading.Thread(target=main)
        self._thread.start()

    def join(self) -> StopReason | None:
        assert self._thread is not None
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.reason

    def stop(self) -> StopReason | None:
        self.board.stop()
        return self.join()

    def moved(self) -> Rig:
        """This machine on a new board, with a copy of its memory."""
        state = msgpack.unpackb(msgpack.packb(self.board.save()))
        other = Rig(self.definition)
        other.memory.slots[0].view[:] = self.memory.slots[0].view
        other.board.load_untrusted(state)
        return other

    def close(self) -> None:
        self.board.close()
        self.memory.close()


MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[MakeRig]:
    with contextlib.ExitStack() as stack:

        def make(*program: int, sbi: bool = False, **kwargs: Any) -> Rig:
            definition = MachineDefinition(
                "small", (SlotSpec("ram", RAM_BASE, RAM_BYTES),), sbi=sbi, **kwargs
            )
            rig = Rig(definition)
            stack.callback(rig.close)
            path = tmp_path / "image"
            path.write_bytes(asm.code(*program))
            rig.board.boot(**{"kernel" if sbi else "firmware": str(path)})
            return rig

        yield make


def test_output_and_power_off(make_rig: MakeRig) -> None:
    rig = make_rig(*put("hi"), *POWER_OFF)
    assert rig.board.run() is StopReason.SHUTDOWN
    assert rig.console.text == b"hi"
    assert rig.board.exit_code == 0
    with pytest.raises(MachineStateError, match="shut down"):
        rig.board.run()


def test_exit_code(make_rig: MakeRig) -> None:
    rig = make_rig(*store(TEST, 5 << 16 | 0x3333), *forever())
    assert rig.board.run() is StopReason.SHUTDOWN
    assert rig.board.exit_code == 5


def test_restart_boots_again(make_rig: MakeRig) -> None:
    """A counter in memory outlives the first restart; the third time it is over."""
    program = [
        *put("x"), *li("t2", DATA), asm.ld("t3", "t2"), asm.addi("t3", "t3", 1), asm.sd("t3", "t2"),
        *li("t4", 3), asm.beq("t3", "t4", 4 * (len(store(TEST, 0x7777)) + 2)),
        *store(TEST, 0x7777), *forever(), *POWER_OFF,
    ]  # fmt: skip
    rig = make_rig(*program)
    assert rig.board.run() is StopReason.SHUTDOWN
    assert rig.console.text == b"xxx"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("supervisor", [False, True])
def test_asleep_until_the_timer(make_rig: MakeRig, supervisor: bool, deterministic: bool) -> None:
    ticks = 200 * MS
    program = [*sleep(ticks, supervisor=supervisor), *POWER_OFF]
    rig = make_rig(*program, sbi=supervisor, deterministic=deterministic)
    began = time.monotonic()
    assert rig.board.run() is StopReason.SHUTDOWN
    took = time.monotonic() - began
    assert ticks <= rig.board.clock.now() < ticks + 150 * MS
    if deterministic:
        assert took < 0.2  # nobody waits for virtual time
    else:
        assert 0.2 <= took < 0.4
        assert rig.board.stats["idle-ns"] > 150 * 10**6


@pytest.mark.parametrize("supervisor", [False, True])
def test_a_guest_asleep_wakes_on_time_elsewhere(make_rig: MakeRig, supervisor: bool) -> None:
    ticks = 400 * MS
    program = [*put("z"), *sleep(ticks, supervisor=supervisor), *put("!"), *POWER_OFF]
    rig = make_rig(*program, sbi=supervisor)
    rig.start()
    rig.console.wait_for(b"z")
    time.sleep(0.1)
    assert rig.stop() is StopReason.PAUSED
    slept = rig.board.clock.now()
    assert slept < ticks
    time.sleep(0.1)  # while it moves, its time stands still
    assert rig.board.clock.now() == slept
    other = rig.moved()
    began = time.monotonic()
    assert other.board.run() is StopReason.SHUTDOWN
    took = time.monotonic() - began
    assert other.console.text == b"!"
    assert (ticks - slept) / 1e7 - 0.001 <= took < (ticks - slept) / 1e7 + 0.2
    other.close()


def test_stop_wakes_a_sleeper_and_interrupts_a_spinner(make_rig: MakeRig) -> None:
    for program in ([asm.WFI, asm.j(-4)], forever()):
        rig = make_rig(*program)
        rig.start()
        time.sleep(0.05)
        began = time.monotonic()
        assert rig.stop() is StopReason.PAUSED
        assert time.monotonic() - began < 0.5
        rig.board.stop()  # before the run: it ends at once, and only that one
        assert rig.board.run() is StopReason.PAUSED
        rig.start()
        time.sleep(0.02)
        assert rig.reason is None
        assert rig.stop() is StopReason.PAUSED


def test_posts_run_on_the_vcpu_thread_in_order(make_rig: MakeRig) -> None:
    rig = make_rig(asm.WFI, asm.j(-4))
    rig.start()
    done: list[tuple[int, int]] = []
    finished = threading.Event()
    for i in range(20):
        rig.board.post(lambda i=i: done.append((i, threading.get_ident())))  # type: ignore[misc]
    rig.board.post(finished.set)
    assert finished.wait(10)
    assert [i for i, _ in done] == list(range(20))
    assert {thread for _, thread in done} == {rig._thread.ident if rig._thread else None}
    with pytest.raises(MachineStateError, match="stop it"):
        rig.board.save()
    assert rig.stop() is StopReason.PAUSED


def test_console_input_by_interrupt(make_rig: MakeRig) -> None:
    """An echo that sleeps in WFI until the PLIC says that something was typed."""
    plic = 0xC00_0000
    setup = [
        *store(plic + 4 * 10, 1), *store(plic + 0x2000, 1 << 10), *store(UART + 1, 1, asm.sb),
        *li("t0", 1 << 11), asm.csrw("mie", "t0"), *li("s0", UART), *li("s1", plic + 0x200004),
    ]  # fmt: skip
    loop = [
        asm.WFI, asm.lw("t1", "s1"), asm.beq("t1", "zero", -8), asm.lbu("t0", "s0"),
        asm.sb("t0", "s0"), asm.sw("t1", "s1"), asm.j(-24),
    ]  # fmt: skip
    rig = make_rig(*setup, *loop)
    rig.start()
    for text in (b"a", b"bc", b"def"):
        assert rig.console.offer(text)
        rig.console.wait_for(text)
    assert rig.stop() is StopReason.PAUSED
    assert rig.console.text == b"abcdef"


def count_and_kick(harts: int) -> list[int]:
    """Each hart adds 1000 to a shared counter; hart 0 starts the others by software interrupts."""
    spin = [
        *li("s0", DATA), *li("s1", 1000), *li("s2", 1),
        asm.amoadd_d("zero", "s2", "s0"), asm.addi("s1", "s1", -1), asm.bne("s1", "zero", -8),
    ]  # fmt: skip
    others = [*li("t0", 8), asm.csrw("mie", "t0"), asm.WFI, *spin, asm.WFI, asm.j(-4)]
    first = [word for hart in range(1, harts) for word in store(CLINT + 4 * hart, 1)] + spin
    wait = [*li("t2", 1000 * harts), *li("t0", DATA), asm.ld("t1", "t0"), asm.bne("t1", "t2", -4)]
    return [
        asm.csrr("t0", "mhartid"), asm.beq("t0", "zero", 4 * (len(others) + 1)), *others,
        *first, *wait, *put("done"), *POWER_OFF,
    ]  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("harts", [1, 2, 4, 8])
def test_harts_take_turns(make_rig: MakeRig, harts: int, deterministic: bool) -> None:
    rig = make_rig(*count_and_kick(harts), cpus=harts, deterministic=deterministic)
    assert rig.board.run() is StopReason.SHUTDOWN
    assert rig.console.text == b"done"


def test_deterministic_runs_are_equal_wherever_they_are_stopped(make_rig: MakeRig) -> None:
    beat = [*put("."), *sleep(3 * MS, supervisor=False)]
    count = [*li("s1", 40_000), asm.addi("s1", "s1", -1), asm.bne("s1", "zero", -4)]
    program = [*only_hart_0(), *(beat + count) * 12, *POWER_OFF]
    results = []
    for stops in (0, 0, 7):
        rig = make_rig(*program, cpus=2, deterministic=True)
        here = rig
        text = b""
        for _ in range(stops):
            here.start()
            time.sleep(0.002)
            if here.stop() is not StopReason.PAUSED:
                break
            text += here.console.text
            there = here.moved()
            here.close()
            here = there
        if here.reason is not StopReason.SHUTDOWN:
            assert here.board.run() is StopReason.SHUTDOWN
        text += here.console.text
        results.append((text, here.board.save(), here.memory.slots[0].view.tobytes()))
        here.close()
    assert results[0] == results[1]
    assert results[0] == results[2]
    assert results[0][0] == b"." * 12


def test_time_can_be_set_by_the_guest(make_rig: MakeRig) -> None:
    rig = make_rig(*store(MTIME, 5_000_000_000, asm.sd), *POWER_OFF)
    rig.board.run()
    assert 5_000_000_000 <= rig.board.clock.now() < 5_000_000_000 + 100 * MS
    rig.moved().close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_devices_disk_and_console_are_let_go(tmp_path: Path) -> None:
    before = open_descriptors()
    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    definition = MachineDefinition(
        "d", (SlotSpec("ram", RAM_BASE, RAM_BYTES),), disks=(DiskSpec(str(image)),)
    )
    rig = Rig(definition)
    rig.board.quiesce()
    rig.close()
    rig.board.close()
    assert open_descriptors() == before
    image.unlink()
    memory = GuestMemory(definition.slots)
    with pytest.raises(HostError, match="disk image"):
        Board(definition, memory, console=Console())
    memory.close()
    assert open_descriptors() == before


def test_firmware_and_kernel_want_different_machines(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(*POWER_OFF)
    with pytest.raises(UsageError, match="SBI"):
        rig.board.boot(kernel=str(tmp_path / "image"))


def places(state: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Paths to everything inside a state."""
    if path:
        yield path
    items: Any = ()
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list):
        items = enumerate(state[:3])
    for key, value in items:
        yield from places(value, (*path, key))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_states_are_refused_whole(make_rig: MakeRig, data: st.DataObject) -> None:
    rig = make_rig(*POWER_OFF, sbi=True, cpus=2)
    good = rig.board.save()
    bad = copy.deepcopy(good)
    path = data.draw(st.sampled_from(sorted(places(bad), key=repr)))
    parent: Any = bad
    for key in path[:-1]:
        parent = parent[key]
    junk = st.sampled_from([None, True, -1, 0, 3, 1 << 63, 1 << 64, b"x", "x", [], [0] * 9, {}])
    if data.draw(st.booleans()):
        parent[path[-1]] = data.draw(junk)
    else:
        del parent[path[-1]]
    try:
        rig.board.load_untrusted(bad)
    except StateFormatError:
        assert rig.board.save() == good
    rig.close()

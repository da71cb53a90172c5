"""A guest moves between machines, and its own verification says that nothing was lost."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate import source
from migrate.errors import MachineStateError, NotConverging
from migrate.events import Event, PhaseEntered, RoundDone
from migrate.machine import State
from migrate.report import DOWNTIME_PHASES
from migrate.units import MIB, PAGE_SIZE
from migrate.vm.definition import BackingKind, SlotSpec
from migrate.vm.guest import Fill, Order, Pacing, Privilege, Visit
from tests.guests import Running, ignore, make_guest, migrate, options, start_receiving


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a trio task."""

    @functools.wraps(test)
    def body(*args: Any, **kwargs: Any) -> None:
        trio.run(functools.partial(test, *args, **kwargs))

    return body


BUSY = {"working_set_bytes": 2 * MIB, "rate_pages_per_s": 5000, "order": Order.RANDOM}


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix"])
@pytest.mark.parametrize("compression", ["none", "zstd:1", "auto"])
@pytest.mark.parametrize("fill", [Fill.RANDOM, Fill.COMPRESSIBLE])
@run
async def test_guest_goes_on_and_verifies(
    tmp_path: Path, uri: str, compression: str, fill: Fill
) -> None:
    guest = make_guest(tmp_path, fill=fill, visit=Visit.PAGE, **BUSY)
    try:
        guest.machine.start()
        await guest.beats()
        where = f"unix:{tmp_path}/listen" if uri == "unix" else uri
        guest, report = await migrate(guest, where, compression=compression)
        await guest.beats()
        verdict = await guest.verify()
    finally:
        guest.machine.close()
    assert verdict.visits > 0
    numbers = [beat.number for beat in guest.console.heartbeats()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # no line lost
    assert report.status == "completed"
    assert set(report.downtime_phases_ms) == set(DOWNTIME_PHASES)
    assert sum(report.downtime_phases_ms.values()) == pytest.approx(report.downtime_ms)
    if compression == "zstd:1" and fill is Fill.COMPRESSIBLE:
        assert report.transferred_bytes < report.pages_sent * PAGE_SIZE * 0.6


@run
async def test_verify_hashes_both_sides(tmp_path: Path) -> None:
    guest = make_guest(tmp_path, **BUSY)
    guest.machine.start()
    await guest.beats()
    guest, report = await migrate(guest, verify=True)
    await guest.verify()
    guest.machine.close()
    assert report.verified


@run
async def test_untouched_pages_are_not_sent(tmp_path: Path) -> None:
    guest = make_guest(tmp_path, 64, fill=Fill.ZERO)
    guest.machine.start()
    await guest.beats()
    guest, report = await migrate(guest)
    await guest.verify()
    guest.machine.close()
    assert report.transferred_bytes < MIB
    assert report.pages_zero > 15_000


@run
async def test_twenty_migrations_in_a_chain(tmp_path: Path) -> None:
    guest = make_guest(tmp_path, visit=Visit.PAGE, **BUSY)
    guest.machine.start()
    await guest.beats()
    for number in range(20):
        guest, _ = await migrate(guest, compression=("none", "zstd")[number % 2])
        await guest.beats(1)
    verdict = await guest.verify()
    guest.machine.close()
    assert verdict.visits > 1000


@run
async def test_a_paused_guest_arrives_paused(tmp_path: Path) -> None:
    guest = make_guest(tmp_path)
    guest.machine.start()
    await guest.beats()
    await guest.machine.pause()
    guest, _ = await migrate(guest)
    assert guest.machine.state is State.PAUSED
    before = bytes(guest.console.output)
    await trio.sleep(0.05)
    assert bytes(guest.console.output) == before
    await guest.machine.resume()
    await guest.beats()
    await guest.verify()
    guest.machine.close()


@pytest.mark.parametrize("privilege", [Privilege.SUPERVISOR, Privilege.MACHINE])
@run
async def test_a_sleeping_guest_wakes_on_time(tmp_path: Path, privilege: Privilege) -> None:
    """Asleep in WFI with a timer set while it is moved: each beat comes when it was due."""
    guest = make_guest(
        tmp_path, fill=Fill.ZERO, pacing=Pacing.WFI, privilege=privilege, heartbeat_ms=400
    )
    guest.machine.start()
    await guest.beats(1)
    for _ in range(3):
        await trio.sleep(0.1)  # well inside the sleep
        guest, _ = await migrate(guest)
        await guest.beats(1)
    guest.machine.close()
    beats = guest.console.heartbeats()
    assert len(beats) >= 4
    for before, after in itertools.pairwise(beats):
        assert after.number == before.number + 1
        # Guest time stands still during the downtime, so the deadline holds in the guest's time.
        assert after.ticks - before.ticks == pytest.approx(4_000_000, abs=1_000_000)


@run
async def test_several_slots_and_a_file(tmp_path: Path) -> None:
    extra = SlotSpec("extra", 0x1_0000_0000, 4 * MIB)
    image = tmp_path / "image"
    image.write_bytes(b"shared text " * 4096 + bytes(PAGE_SIZE * 256))
    text = SlotSpec("text", 0x2_0000_0000, MIB, BackingKind.PRIVATE_FILE, str(image))
    guest = make_guest(tmp_path, slots=(extra, text))
    memory = guest.machine.memory
    memory.write(extra.gpa + 5 * PAGE_SIZE, b"written by the host")
    memory.write(text.gpa + 3 * PAGE_SIZE, b"copied on write")
    expected = [bytes(slot.view) for slot in memory.slots[1:]]
    guest.machine.start()
    await guest.beats()
    guest, _ = await migrate(guest)
    found = [bytes(slot.view) for slot in guest.machine.memory.slots[1:]]
    await guest.verify()
    guest.machine.close()
    assert found == expected


@run
async def test_what_does_not_converge_stays_and_runs_on(tmp_path: Path) -> None:
    guest = make_guest(tmp_path, 64, working_set_bytes=48 * MIB, rate_pages_per_s=0)
    guest.machine.start()
    await guest.beats()
    arrived: list[Running] = []
    failures: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        address = await start_receiving(nursery, "tcp:127.0.0.1:0", arrived, failures=failures)
        with pytest.raises(NotConverging, match="over the limit"):
            await source.migrate_to(
                guest.machine,
                address,
                options(downtime_limit_ns=3_000_000, max_rounds=3, bandwidth=100 * MIB),
                ignore,
            )
    assert not arrived
    assert "gave up" in str(failures[0])
    assert guest.machine.state is State.RUNNING
    await guest.beats()
    await guest.verify()
    guest.machine.close()


@run
async def test_bandwidth_is_held(tmp_path: Path) -> None:
    guest = make_guest(tmp_path, 16)
    guest.machine.start()
    await guest.beats()
    guest, report = await migrate(guest, bandwidth=32 * MIB, compression="none")
    await guest.verify()
    guest.machine.close()
    assert report.transferred_bytes / (report.total_ms / 1e3) <= 32 * MIB * 1.1


@run
async def test_cancelled_midway_the_guest_stays(tmp_path: Path) -> None:
    guest = make_guest(tmp_path, 32, **BUSY)
    guest.machine.start()
    await guest.beats()
    failures: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        address = await start_receiving(nursery, "tcp:127.0.0.1:0", [], failures=failures)
        with trio.move_on_after(0.3) as scope:
            await source.migrate_to(guest.machine, address, options(bandwidth=16 * MIB), ignore)
    assert scope.cancelled_caught
    assert "nothing was started" in str(failures[0])
    assert guest.machine.state is State.RUNNING
    guest, _ = await migrate(guest)
    await guest.beats()
    await guest.verify()
    guest.machine.close()


@run
async def test_events_tell_phases_and_rounds(tmp_path: Path) -> None:
    guest = make_guest(tmp_path, **BUSY)
    guest.machine.start()
    await guest.beats()
    events: list[Event] = []
    arrived: list[Running] = []
    async with trio.open_nursery() as nursery:
        address = await start_receiving(nursery, "tcp:127.0.0.1:0", arrived)
        await source.migrate_to(guest.machine, address, options(), events.append)
    phases = [event.phase for event in events if isinstance(event, PhaseEntered)]
    assert phases == ["connect", "negotiate", "configure", "rounds", "switchover"]
    assert next(event.round for event in events if isinstance(event, RoundDone)) == 0
    with pytest.raises(MachineStateError):
        guest.machine.start()  # never again here
    guest.machine.close()
    arrived[0].machine.close()

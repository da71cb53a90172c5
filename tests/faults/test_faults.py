"""Links cut and bits flipped anywhere in a migration: no lost page, never two running guests."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate import source
from migrate.errors import HandoverUncertain, MigrateError
from migrate.machine import State
from migrate.units import MIB
from migrate.vm.guest import Order
from tests.faults.proxy import Fault, Proxy
from tests.guests import Running, ignore, make_guest, migrate, options, start_receiving

RAM_MIB = 2
STREAM_BYTES = RAM_MIB * MIB + 16384
"""About what one migration of the guest below sends; faults past the end strike nothing."""

BOUNDED = settings(
    max_examples=15,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


async def attempt(guest: Running, fault: Fault, compression: str) -> tuple[Running, bool]:
    """One migration through a fault. Returns the guest that runs, and whether it has moved.

    Asserts that exactly one side runs it, or for the one ambiguous window none by itself.
    """
    arrived: list[Running] = []
    failures: list[BaseException] = []
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        address = await start_receiving(nursery, "tcp:127.0.0.1:0", arrived, failures=failures)
        proxy = Proxy(address, fault)
        try:
            with trio.fail_after(30):
                await source.migrate_to(
                    guest.machine, proxy.uri, options(compression=compression), ignore
                )
        except MigrateError as failure:
            error = failure
        finally:
            await trio.to_thread.run_sync(proxy.close)
        with trio.move_on_after(0.5):  # one that was turned away keeps listening
            while not arrived and not failures:
                await trio.sleep(0.002)
        nursery.cancel_scope.cancel()
    for failure in failures:
        assert isinstance(failure, MigrateError), failure
    if error is None:
        assert guest.machine.state is State.MIGRATED
        assert arrived, failures
    elif isinstance(error, HandoverUncertain):
        assert guest.machine.state is State.PAUSED
        if not arrived:  # looked at the destination: not there, so it is to run here
            guest.machine.resume_now()
    else:
        assert guest.machine.state is State.RUNNING, error
        assert not arrived, error
    if not arrived:
        return guest, False
    guest.machine.close()
    arrived[0].console.output[:0] = guest.console.output
    return arrived[0], True


@given(
    direction=st.sampled_from(["up", "up", "down"]),
    # Small offsets reach the handshake, large ones the pages; the end is the switchover.
    at_byte=st.one_of(
        st.integers(0, 2000),
        st.integers(0, STREAM_BYTES),
        st.integers(STREAM_BYTES - 40000, STREAM_BYTES),
    ),
    reset=st.booleans(),
    compression=st.sampled_from(["none", "zstd"]),
)
@BOUNDED
def test_a_link_cut_anywhere(
    tmp_path: Path, direction: str, at_byte: int, reset: bool, compression: str
) -> None:
    if direction == "down":
        at_byte %= 400
    trio.run(
        functools.partial(
            _fault_then_success, tmp_path, Fault(direction, at_byte, reset=reset), compression
        )
    )


@given(
    direction=st.sampled_from(["up", "up", "up", "down"]),
    at_byte=st.one_of(st.integers(0, 3000), st.integers(0, STREAM_BYTES)),
    bit=st.integers(0, 7),
    compression=st.sampled_from(["none", "zstd"]),
)
@BOUNDED
def test_a_bit_flipped_anywhere(
    tmp_path: Path, direction: str, at_byte: int, bit: int, compression: str
) -> None:
    if direction == "down":
        at_byte %= 400
    fault = Fault(direction, at_byte, flip_mask=1 << bit)
    trio.run(functools.partial(_fault_then_success, tmp_path, fault, compression))


async def _fault_then_success(tmp_path: Path, fault: Fault, compression: str) -> None:
    guest = make_guest(
        tmp_path, RAM_MIB, working_set_bytes=MIB, rate_pages_per_s=2000, order=Order.RANDOM
    )
    try:
        guest.machine.start()
        await guest.beats(1)
        guest, _ = await attempt(guest, fault, compression)
        await guest.beats(1)
        await guest.verify()
        guest, _ = await migrate(guest)  # nothing was lost for the next attempt
        await guest.beats(1)
        await guest.verify()
    finally:
        guest.machine.close()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_without_a_fault_the_proxy_changes_nothing(tmp_path: Path, compression: str) -> None:
    async def body() -> None:
        guest = make_guest(tmp_path, RAM_MIB)
        guest.machine.start()
        await guest.beats(1)
        guest, moved = await attempt(guest, Fault(), compression)
        assert moved
        await guest.verify()
        guest.machine.close()

    trio.run(body)

"""A running `receive` and whatever may come first: it is turned away, and the next one is heard."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from migrate import destination, source, wire
from migrate.errors import MigrationFailed
from migrate.machine import State
from migrate.session import Phase
from migrate.transport import parse_uri
from migrate.units import MIB, PAGE_SIZE
from migrate.vm.definition import SlotSpec
from migrate.wire import FrameType, Role
from tests.guests import ignore, make_guest, options
from tests.links import frame
from tests.strangers import (
    FEW,
    HELLO,
    PLAIN,
    RAM,
    Receiving,
    Script,
    configure,
    definition,
    errors_in,
    receiving,
    run,
    say,
    script,
)


@pytest.fixture(scope="module")
def good() -> Script:
    return script()


def test_the_script_is_a_migration(good: Script) -> None:
    async def main() -> None:
        async with receiving() as it:
            heard = await say(it.address, good.stream)
            with trio.fail_after(20):
                await it.done.wait()
            assert not errors_in(heard)
            (arrived,) = it.arrived
            assert arrived.counters.starts == 1
            array = arrived.memory.slots[0].array
            pages = array.reshape(-1, PAGE_SIZE).any(axis=1)
            assert pages[:20].all() and not pages[20:].any()

    run(main)


def hello(**changes: Any) -> bytes:
    return wire.encode_stream_header(wire.StreamHeader(**({"role": Role.SOURCE} | changes)))


def machine(**changes: Any) -> dict[str, Any]:
    """CONFIGURE's fields with a machine that differs."""
    return {"machine": definition(**changes).to_portable()}


STREAMS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "closed the connection"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n", "wrong magic"),
    "zeros": (bytes(4096), "wrong magic"),
    "half a header": (HELLO[:20], "closed the connection"),
    "a damaged header": (HELLO[:16] + b"\xff" + HELLO[17:], "checksum"),
    "version 2": (hello(major=2), "speaks version 2.0"),
    "a feature unknown here": (hello(required=1 << 9), "requires features"),
    "another destination": (hello(role=Role.DESTINATION), "destination too"),
    "a header and no more": (HELLO, "closed the connection"),
    "garbage after it": (HELLO + bytes(range(200)), "frame header is damaged"),
}
CONFIGURE = FrameType.CONFIGURE
FRAMES: dict[str, tuple[bytes, str]] = {
    "another frame first": (frame(FrameType.ROUND), "out of order"),
    "a STATE of 8 MiB": (frame(FrameType.STATE, b"", meta_bytes=8 * MIB), "out of order"),
    "claims 4 GiB": (frame(CONFIGURE, b"", meta_bytes=2**32 - 1), "are the most"),
    "claims bulk": (frame(CONFIGURE, bulk_bytes=1), "are the most"),
    "cut short": (frame(CONFIGURE, b"", meta_bytes=MIB), "closed the connection"),
    "an unknown type": (frame(0x77), "unknown type 0x77"),
    "an ERROR": (frame(FrameType.ERROR, wire.pack({"code": 1, "message": "no"})), "gave up: no"),
    "no map": (frame(CONFIGURE, b"\xc0"), "is not a map"),
    "no msgpack": (frame(CONFIGURE, b"\xc1"), "not valid msgpack"),
    "nested lists": (frame(CONFIGURE, b"\xdd\x00\x0f\xff\xff" * 1000), "not valid msgpack"),
    "fields missing": (frame(CONFIGURE, b"\x80"), "'machine' is missing"),
}
MACHINES: dict[str, tuple[dict[str, Any], str]] = {
    "pages of another size": ({"page_size": 16384}, "pages of 16384 bytes"),
    "a negative seed": ({"hash_seed": -1}, "out of range"),
    "a list": ({"machine": [1]}, "'machine' is missing or of the wrong type"),
    "no fields": ({"machine": {}}, "left over or missing"),
    "a field left over": ({"machine": machine()["machine"] | {"colour": 1}}, "colour"),
    "a thousand vcpus": (machine(cpus=1000), "vcpus"),
    "no slot": (machine(slots=()), "no slot"),
    "2 TiB": (machine(slots=(SlotSpec("ram", RAM, 1 << 41),)), "bad address or size"),
    "overlap": (
        machine(slots=(SlotSpec("a", RAM, MIB), SlotSpec("b", RAM + 4096, MIB))), "overlap",
    ),
    "RAM over devices": (machine(slots=(SlotSpec("ram", 0, 4096 * MIB),)), "cannot map a device"),
}  # fmt: skip
OPENINGS = (
    STREAMS
    | {what: (HELLO + data, why) for what, (data, why) in FRAMES.items()}
    | {
        what: (HELLO + frame(CONFIGURE, wire.pack(configure(**changes))), why)
        for what, (changes, why) in MACHINES.items()
    }
)


def test_whatever_comes_first_the_listener_stays_usable(tmp_path: Path) -> None:
    """One `receive` for all of them, and a guest that arrives in the end."""

    async def main() -> None:
        guest = make_guest(tmp_path, 2)
        await guest.machine.resume()
        async with receiving() as it:
            for what, (data, why) in OPENINGS.items():
                heard = await say(it.address, data)
                with trio.fail_after(20):
                    while len(it.turned_away) < 1:
                        await trio.sleep(0.001)
                (message,) = it.turned_away
                assert "turned away" in message and why in message, (what, message)
                if len(data) >= 40:  # who has introduced himself is told
                    assert heard[:8] == wire.STREAM_MAGIC, what
                    if why not in ("closed the connection", "gave up: no"):
                        assert any(why in text for text in errors_in(heard)), (
                            what,
                            errors_in(heard),
                        )
                it.events.clear()
                assert not it.done.is_set()
            assert not it.arrived
            await source.migrate_to(guest.machine, it.address, options(), ignore)
            with trio.fail_after(20):
                await it.done.wait()
            assert it.arrived and it.arrived[0].state is State.RUNNING
        guest.machine.close()

    run(main)


@st.composite
def mangled_configures(draw: st.DrawFn) -> dict[str, Any]:
    """CONFIGURE with some of its values, at any depth, replaced or removed."""
    fields = copy.deepcopy(configure(machine=definition(cpus=2).to_portable()))
    for _ in range(draw(st.integers(1, 3))):
        at: Any = fields
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.booleans()):
                at[key] = draw(PLAIN)
            else:
                del at[key]
            break
    return fields


@FEW
@given(st.lists(st.binary(max_size=300) | mangled_configures(), min_size=1, max_size=6))
def test_random_openings(openings: list[bytes | dict[str, Any]]) -> None:
    async def main() -> None:
        async with receiving() as it:
            for opening in openings:
                data = opening
                if isinstance(data, dict):
                    data = HELLO + frame(FrameType.CONFIGURE, wire.pack(data))
                await say(it.address, data)
                if it.built:  # a machine that can be built after all: then it is the first source
                    assert isinstance(await it.failure(), MigrationFailed)
                    return
                assert not it.done.is_set(), it.failures

    run(main)


@FEW
@given(data=st.data())
def test_an_opening_with_a_flipped_bit_is_turned_away(data: st.DataObject, good: Script) -> None:
    opening = bytearray(good.until(Phase.PRECOPY)[0])
    bit = data.draw(st.integers(0, len(opening) * 8 - 1))
    opening[bit // 8] ^= 1 << bit % 8

    async def main() -> None:
        async with receiving() as it:
            await say(it.address, bytes(opening))
            assert not it.built and not it.done.is_set()

    run(main)


def test_silent_connections_are_ended_and_others_get_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are talked to at once: they wait outside, and time out in turn."""
    monkeypatch.setattr(destination, "NEGOTIATION_TIMEOUT_S", 0.3)
    descriptors = Path("/proc/self/fd")

    async def main() -> None:
        guest = make_guest(tmp_path, 2)
        await guest.machine.resume()
        async with receiving() as it:
            where = parse_uri(it.address)
            before = len(list(descriptors.iterdir()))
            silent = [socket.create_connection((where.host, where.port)) for _ in range(24)]
            silent[3].sendall(HELLO)
            await trio.sleep(0.1)
            accepted = len(list(descriptors.iterdir())) - before - len(silent)
            assert accepted <= destination.MAX_NEGOTIATING
            await source.migrate_to(guest.machine, it.address, options(), ignore)
            with trio.fail_after(20):
                await it.done.wait()
            assert it.arrived
            assert any("within" in message for message in it.turned_away)
            for sock in silent:
                sock.close()
        guest.machine.close()

    run(main)


def test_a_descriptor_that_brings_nothing_good_is_an_error() -> None:
    """There is no second chance on a connection: the message says why, without a traceback."""
    ours, theirs = socket.socketpair()

    async def main() -> None:
        it = Receiving()
        theirs.sendall(bytes(100))
        with pytest.raises(MigrationFailed, match=r"was no use: .*wrong magic"):
            await destination.receive(
                f"fd:{ours.fileno()}", destination.ReceiveOptions(it.make), it.events.append, str
            )
        assert not it.built

    with ours, theirs:
        run(main)

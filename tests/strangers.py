"""A `receive` to attack, and a source by the book whose bytes can be spoiled."""

from __future__ import annotations

import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from migrate import destination, wire
from migrate.codec import PageHasher
from migrate.events import Event, Log
from migrate.machine import Machine, State
from migrate.session import Phase
from migrate.transport import parse_uri
from migrate.units import PAGE_SIZE
from migrate.vm.console import Console
from migrate.vm.definition import MachineDefinition, SlotSpec
from migrate.wire import Encoding, FrameType, Role
from tests.links import frame

RAM = 0x8000_0000
RAM_PAGES = 256
SEED = 7

FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=9)
PLAIN |= st.binary(max_size=9) | st.lists(st.integers(0, 9), max_size=3)


# -- a receive to attack


@dataclass
class Receiving:
    """A `receive` and all that came of it."""

    address: str = ""
    events: list[Event] = field(default_factory=list)
    built: list[Machine] = field(default_factory=list)
    arrived: list[Machine] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)

    @property
    def turned_away(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Log)]

    def make(self, definition: MachineDefinition) -> Machine:
        machine = Machine.create(definition, Console())
        self.built.append(machine)
        return machine

    async def failure(self) -> BaseException:
        """What it failed with; nothing was started."""
        with trio.fail_after(20):
            await self.done.wait()
        assert not self.arrived
        for machine in self.built:
            assert machine.state is State.PAUSED and machine.counters.starts == 0
            assert machine._closing
        (error,) = self.failures
        return error


@contextlib.asynccontextmanager
async def receiving(uri: str = "tcp:127.0.0.1:0") -> AsyncIterator[Receiving]:
    it = Receiving()
    listening = trio.Event()

    def note(where: str) -> None:
        it.address = where
        listening.set()

    async def run() -> None:
        options = destination.ReceiveOptions(it.make)
        try:
            it.arrived.append(await destination.receive(uri, options, it.events.append, note))
        except Exception as error:
            it.failures.append(error)
        finally:
            it.done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await listening.wait()
        yield it
        nursery.cancel_scope.cancel()
    for machine in it.arrived:
        machine.close()


async def say(address: str, data: bytes, *, end: bool = True) -> bytes:
    """Send bytes as a stranger, half-close, and return all that comes back."""

    def talk() -> bytes:
        where = parse_uri(address)
        heard = b""
        with socket.create_connection((where.host, where.port), timeout=20) as sock:
            with contextlib.suppress(OSError):  # the answer may come before the last byte is out
                sock.sendall(data)
                if end:
                    sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while piece := sock.recv(1 << 16):
                    heard += piece
        return heard

    return await trio.to_thread.run_sync(talk)


def errors_in(heard: bytes) -> list[str]:
    """The messages of the ERROR frames that came back, after the stream header."""
    found = []
    at = wire.STREAM_HEADER.size
    sequence = 0
    while at < len(heard):
        header = wire.decode_frame_header_untrusted(heard[at : at + 32], sequence)
        meta = heard[at + 32 : at + 32 + header.meta_bytes]
        if header.type is FrameType.ERROR:
            found.append(wire.unpack_untrusted(meta, "it")["message"])
        at += 32 + header.meta_bytes
        sequence += 1
    return found


# -- a source by the book, as bytes


def definition(**changes: Any) -> MachineDefinition:
    slots = (SlotSpec("ram", RAM, RAM_PAGES * PAGE_SIZE),)
    return MachineDefinition(**({"name": "visitor", "slots": slots} | changes))


HELLO = wire.encode_stream_header(wire.StreamHeader(Role.SOURCE, required=int(wire.REQUIRED)))


def configure(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "machine": definition().to_portable(),
        "page_size": PAGE_SIZE,
        "hash_seed": SEED,
        "verify": False,
    }
    return fields | changes


def saved_state() -> dict[str, Any]:
    machine = Machine.create(definition(), Console())
    try:
        return machine.save()
    finally:
        machine.close()


@dataclass
class Script:
    """What a source says, frame by frame, with the phase that each is said in."""

    frames: list[tuple[Phase, bytes]]

    @property
    def stream(self) -> bytes:
        return b"".join(data for _, data in self.frames)

    def until(self, phase: Phase) -> tuple[bytes, int]:
        """All that comes before the first frame of a phase, and how many frames that is."""
        at = [p for p, _ in self.frames].index(phase)
        return b"".join(data for _, data in self.frames[:at]), at - 1


def script(**changes: Any) -> Script:
    """A whole migration; `changes` replace fields of STATE."""
    memory = np.random.default_rng(3).integers(0, 256, RAM_PAGES * PAGE_SIZE, dtype=np.uint8)
    memory[20 * PAGE_SIZE :] = 0
    hasher = PageHasher(SEED)
    table = hasher.table(RAM_PAGES)
    hasher.scan(memory, np.array([[0, 20]], dtype=np.int64), table)
    state = {
        "state": saved_state(),
        "running": True,
        "digests": [hasher.region_digests(table).tobytes()],
    } | changes
    raw = wire.encode_pages_meta(0, Encoding.RAW, np.array([[0, 15], [16, 20]]))
    zero = wire.encode_pages_meta(0, Encoding.RAW, np.array([[20, RAM_PAGES]]))
    last = wire.encode_pages_meta(0, Encoding.RAW, np.array([[15, 16]]))
    bulk = memory.tobytes()
    raw_bulk = bulk[: 15 * PAGE_SIZE] + bulk[16 * PAGE_SIZE : 20 * PAGE_SIZE]
    parts: list[tuple[Phase, FrameType, bytes, bytes]] = [
        (Phase.CONFIGURE, FrameType.CONFIGURE, wire.pack(configure()), b""),
        (Phase.PRECOPY, FrameType.ROUND, wire.pack({"number": 0, "pages": 256}), b""),
        (Phase.ROUND, FrameType.PAGES, raw, raw_bulk),
        (Phase.ROUND, FrameType.ZERO, zero, b""),
        (Phase.ROUND, FrameType.ROUND_END, wire.pack({"number": 0}), b""),
        (Phase.PRECOPY, FrameType.FINAL, b"\x80", b""),
        (Phase.FINAL, FrameType.PAGES, last, bulk[15 * PAGE_SIZE : 16 * PAGE_SIZE]),
        (Phase.FINAL, FrameType.STATE, wire.pack(state), b""),
        (Phase.HANDOVER, FrameType.HANDOVER, b"\x80", b""),
    ]
    frames = [(Phase.NEGOTIATE, HELLO)]
    for sequence, (phase, kind, meta, data) in enumerate(parts):
        frames.append((phase, frame(kind, meta, sequence=sequence, bulk_bytes=len(data)) + data))
    return Script(frames)


def run(main: Callable[[], Any]) -> None:
    trio.run(main)
    gc.collect()  # what was left open would warn, and warnings are errors

"""A source and destinations that mean no good: its guest runs on, but never where another may."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from migrate import source, wire
from migrate.channel import Channel, PeerGaveUp
from migrate.errors import HandoverUncertain, MigrateError, PeerError
from migrate.machine import State
from migrate.session import Phase
from migrate.transport import LinkLost, Listener, parse_uri
from migrate.wire import FrameType, Role
from tests.guests import Running, ignore, make_guest, migrate, options
from tests.links import frame
from tests.strangers import run

Spoil = Callable[[Channel], None]
"""Says something else than what is due."""


def play(listener: Listener, phase: Phase, spoil: Spoil) -> None:
    """A destination by the book until its turn comes in `phase`; memory and state are dropped."""
    link = listener.accept()
    link.set_timeout(20)
    try:
        channel = Channel(link, Role.DESTINATION)
        if phase is Phase.NEGOTIATE:
            return spoil(channel)
        channel.negotiate_untrusted()
        answers = {
            Phase.PREPARE: (FrameType.CONFIGURED, {}),
            Phase.ACKNOWLEDGE: (FrameType.ROUND_ACK, {}),
            Phase.LOAD: (FrameType.LOADED, {"verified": False}),
            Phase.START: (FrameType.RUNNING, {"start_ns": 1}),
        }
        while True:
            if channel.phase is phase:
                return spoil(channel)
            if channel.phase in answers:
                kind, fields = answers[channel.phase]
                channel.send_map(kind, **fields)
            else:
                channel.drop_bulk(channel.receive_untrusted().bulk_bytes)
    except (LinkLost, PeerGaveUp):
        return None
    finally:
        link.close()


def say(data: bytes) -> Spoil:
    def spoil(channel: Channel) -> None:
        channel.link.send([data])
        with contextlib.suppress(LinkLost):  # until the source has had enough
            while channel.link.receive(1):
                pass

    return spoil


def say_frame(kind: FrameType, meta: bytes = b"\x80", *, skip: int = 0) -> Spoil:
    """A frame whose checksums are right, `skip` numbers ahead of its turn."""

    def spoil(channel: Channel) -> None:
        say(frame(kind, meta, sequence=channel._next_sent + skip) + bytes(40))(channel)

    return spoil


def go(channel: Channel) -> None:
    """Close without a word."""


def give_up(channel: Channel) -> None:
    channel.send_error(MigrateError("the disk is full"), 5)


async def attempt(guest: Running, phase: Phase, spoil: Spoil) -> MigrateError:
    """The error of a migration to such a destination."""
    listener = Listener(parse_uri("tcp:127.0.0.1:0"))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, play, listener, phase, spoil)
            with pytest.raises(MigrateError) as caught, trio.fail_after(30):
                await source.migrate_to(guest.machine, str(listener.address), options(), ignore)
    finally:
        listener.close()
    return caught.value


BREACHES: list[tuple[Spoil, str]] = [
    (say(bytes(200)), "damaged|wrong magic"),
    (say_frame(FrameType.CONFIGURE), "out of order|wrong magic"),
    (say_frame(FrameType.RUNNING, skip=1), "was due|wrong magic"),
    (say(frame(0x99) + bytes(40)), "was due|unknown type|wrong magic"),
]


@pytest.mark.parametrize(
    "phase", [Phase.NEGOTIATE, Phase.PREPARE, Phase.ACKNOWLEDGE, Phase.LOAD], ids=lambda p: p.value
)
def test_before_the_handover_the_guest_runs_on(tmp_path: Path, phase: Phase) -> None:
    async def main() -> None:
        guest = make_guest(tmp_path, 2)
        await guest.machine.resume()
        for spoil, why in BREACHES:
            error = await attempt(guest, phase, spoil)
            assert isinstance(error, PeerError), error
            assert (error.role, error.phase) == ("destination", phase.value)
            assert any(text in error.reason for text in why.split("|")), error
            assert guest.machine.state is State.RUNNING
        if phase is not Phase.NEGOTIATE:
            error = await attempt(guest, phase, give_up)
            assert "the destination gave up: the disk is full" in str(error)
            assert guest.machine.state is State.RUNNING
        error = await attempt(guest, phase, go)
        assert "stays here" in str(error) and guest.machine.state is State.RUNNING
        await guest.beats()
        arrived, _ = await migrate(guest)  # and none of its pages was lost
        await arrived.verify()
        arrived.machine.close()

    run(main)


@pytest.mark.parametrize(
    "spoil",
    [
        go,
        say(bytes(200)),
        say_frame(FrameType.LOADED),
        say_frame(FrameType.RUNNING),  # start_ns is missing
        say_frame(FrameType.RUNNING, b"\xc1"),
        say_frame(FrameType.RUNNING, wire.pack({"start_ns": 1}), skip=1),
        say_frame(FrameType.ERROR, wire.pack({"code": 1, "message": "x"}), skip=1),
    ],
    ids=[
        "silence",
        "garbage",
        "another frame",
        "a field missing",
        "no msgpack",
        "lost",
        "no ERROR",
    ],
)
def test_after_the_handover_only_people_decide(tmp_path: Path, spoil: Spoil) -> None:
    """The destination may be running the guest: it says something that cannot be read."""

    async def main() -> None:
        guest = make_guest(tmp_path, 2)
        await guest.machine.resume()
        await guest.beats()
        error = await attempt(guest, Phase.START, spoil)
        assert isinstance(error, HandoverUncertain) and error.exit_code == 8
        assert "`migrate stop`" in str(error) and "`migrate resume`" in str(error)
        assert guest.machine.state is State.PAUSED
        starts = guest.machine.counters.starts
        await trio.sleep(0.05)
        assert guest.machine.counters.starts == starts
        guest.machine.resume_now()  # as `migrate resume` does
        await guest.verify()
        guest.machine.close()

    run(main)


def test_an_error_in_answer_to_the_handover_gives_the_guest_back(tmp_path: Path) -> None:
    """It promises that nothing was started there."""

    async def main() -> None:
        guest = make_guest(tmp_path, 2)
        await guest.machine.resume()
        error = await attempt(guest, Phase.START, give_up)
        assert isinstance(error, PeerGaveUp) and "the disk is full" in str(error)
        assert guest.machine.state is State.RUNNING
        await guest.verify()
        guest.machine.close()

    run(main)

"""Channels: the golden session through writer and reader, and peers that misbehave."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate import wire
from migrate.channel import Channel, PeerGaveUp
from migrate.errors import PeerError
from migrate.session import TRANSITIONS, Phase
from migrate.transport import Link, LinkLost
from migrate.units import MIB
from migrate.wire import LIMITS, Feature, FrameType, Role
from tests.links import ERRORS, SESSION, beside, channel_pair, frame, peak_bytes, socket_pair

ROLES = pytest.mark.parametrize("role", list(Role), ids=lambda role: role.label)
HEADERS = {v.sender: v for v in SESSION if v.frame == "stream header"}
UNKNOWN = 0x7F


def other(role: Role) -> Role:
    return Role.DESTINATION if role is Role.SOURCE else Role.SOURCE


@contextlib.contextmanager
def channel_and_peer(
    role: Role, timeout_s: float = 20.0
) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the bare socket at the other end of its link."""
    ours, peer = socket_pair()
    link = Link(ours, "peer")
    link.set_timeout(timeout_s)
    peer.settimeout(20)
    try:
        yield Channel(link, role), peer
    finally:
        link.close()
        peer.close()


@contextlib.contextmanager
def negotiated(role: Role, timeout_s: float = 20.0) -> Iterator[tuple[Channel, socket.socket]]:
    with channel_and_peer(role, timeout_s) as (channel, peer):
        peer.sendall(HEADERS[other(role)].head)
        channel.negotiate_untrusted()
        assert peer.recv(40, socket.MSG_WAITALL) == HEADERS[role].head
        yield channel, peer


# -- the golden session, both ways


def walk(channel: Channel, peer: socket.socket, role: Role) -> None:
    """`channel` plays its part of the golden session; `peer` reads it and compares the bytes."""
    for vector in SESSION:
        if vector.sender is role:
            if vector.frame in FrameType.__members__:
                kind, meta = FrameType[vector.frame], vector.head[wire.FRAME_HEADER.size :]
                channel.send(kind, meta, [vector.bulk] if vector.bulk else [], len(vector.bulk))
            elif vector.frame == "unknown optional":  # which this version cannot send
                channel._next_sent += 1
                channel.link.send([vector.whole])
            else:
                continue
            assert peer.recv(len(vector.whole), socket.MSG_WAITALL) == vector.whole
        elif vector.frame in FrameType.__members__:
            found = channel.receive_untrusted()
            assert found.type.name == vector.frame
            assert bytes(found.meta) == vector.head[wire.FRAME_HEADER.size :]
            assert bytes(channel.link.receive(found.bulk_bytes)) == vector.bulk
            if vector.fields is not None:
                assert channel.fields_untrusted(found) == vector.fields
    assert channel.phase is Phase.DONE


@ROLES
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20], ids=["byte by byte", "by sevens", "at once"])
def test_golden_session(role: Role, chunk: int) -> None:
    """At once, every frame has all the later ones trailing behind it."""
    stream = b"".join(v.whole for v in SESSION if v.sender is other(role))

    def feed() -> None:
        for at in range(0, len(stream), chunk):
            peer.sendall(stream[at : at + chunk])

    with channel_and_peer(role) as (channel, peer), beside(feed):
        channel.negotiate_untrusted()
        assert peer.recv(40, socket.MSG_WAITALL) == HEADERS[role].head
        walk(channel, peer, role)


@ROLES
def test_golden_error(role: Role) -> None:
    (vector,) = [v for v in ERRORS if v.sender is role]
    assert vector.fields is not None
    with negotiated(role) as (channel, peer):
        channel._next_sent = 1
        channel.send_error(Exception(vector.fields["message"]), vector.fields["code"])
        assert peer.recv(4096) == vector.whole
    with negotiated(other(role)) as (channel, peer):
        channel._next_received = 1
        peer.sendall(vector.whole)
        with pytest.raises(PeerGaveUp, match=f"the {role.label} gave up: .*no space"):
            channel.receive_untrusted()
        assert channel.phase is Phase.FAILED


# -- negotiation


@ROLES
def test_wrong_versions_meet(role: Role) -> None:
    """Both sides learn of it: the header is answered before it is judged."""
    theirs = wire.encode_stream_header(wire.StreamHeader(other(role), major=2, minor=3))
    with channel_and_peer(role) as (channel, peer):
        peer.sendall(theirs)
        with pytest.raises(PeerError, match=r"version 2\.3; this program speaks 1\.0") as caught:
            channel.negotiate_untrusted()
        assert (caught.value.role, caught.value.phase) == (other(role).label, "negotiate")
        assert peer.recv(40, socket.MSG_WAITALL) == HEADERS[role].head


@ROLES
def test_negotiation_refuses(role: Role) -> None:
    for header, match in (
        (wire.StreamHeader(role), f"it is a {role.label} too"),
        (wire.StreamHeader(other(role), features=0), "lacks what this side needs"),
        (wire.StreamHeader(other(role), required=1 << 63), "requires features"),
    ):
        with channel_and_peer(role) as (channel, peer):
            peer.sendall(wire.encode_stream_header(header))
            with pytest.raises(PeerError, match=match):
                channel.negotiate_untrusted()
            assert channel.phase is Phase.NEGOTIATE


def test_features_are_those_of_both() -> None:
    theirs = wire.StreamHeader(
        Role.DESTINATION, minor=1, features=int(Feature.PAGE_HASHES) | 1 << 60
    )
    with channel_and_peer(Role.SOURCE) as (channel, peer):
        peer.sendall(wire.encode_stream_header(theirs))
        channel.negotiate_untrusted()
        assert channel.features is Feature.PAGE_HASHES


@ROLES
@given(st.binary(min_size=40, max_size=60))
def test_garbage_instead_of_a_header(role: Role, garbage: bytes) -> None:
    with channel_and_peer(role) as (channel, peer):
        peer.sendall(garbage)
        with pytest.raises(PeerError, match="wrong magic"):
            channel.negotiate_untrusted()


# -- order


def in_phase(channel: Channel, phase: Phase) -> None:
    channel.session.phase = phase


@ROLES
@pytest.mark.parametrize(
    "phase", [p for p in Phase if p is not Phase.NEGOTIATE], ids=lambda p: p.name
)
def test_frames_out_of_order(role: Role, phase: Phase) -> None:
    """Refused by their headers: nothing of what they claim to bring is waited for."""
    for kind in FrameType:
        if kind is FrameType.ERROR or (phase, other(role), kind) in TRANSITIONS:
            continue
        with negotiated(role) as (channel, peer):
            in_phase(channel, phase)
            limits = LIMITS[kind]
            peer.sendall(
                frame(kind, b"", meta_bytes=limits.meta_bytes, bulk_bytes=limits.bulk_bytes)
            )
            with pytest.raises(PeerError) as caught:
                channel.receive_untrusted()
            assert caught.value.phase == phase.value and caught.value.role == other(role).label
            assert kind.name in str(caught.value)


def test_a_damaged_frame_names_the_phase_that_it_came_in() -> None:
    for meta, claim in ((b"\x80", 0), (b"\xc0", 0), (b"\x81\xa1x\xc0", 0)):
        data = bytearray(frame(FrameType.CONFIGURE, meta, sequence=claim))
        if meta == b"\x80":
            data[-1] ^= 1  # the checksum of the meta part fails
        with negotiated(Role.DESTINATION) as (channel, peer):
            peer.sendall(data)
            with pytest.raises(PeerError) as caught:
                channel.expect_untrusted(FrameType.CONFIGURE, machine=dict)
            assert caught.value.phase == "configure", caught.value


def test_lost_repeated_and_reordered_frames_are_noticed() -> None:
    for sequences in ([1], [0, 0], [0, 2]):
        with negotiated(Role.DESTINATION) as (channel, peer):
            in_phase(channel, Phase.ROUND)
            peer.sendall(b"".join(frame(FrameType.ZERO, sequence=n) for n in sequences))
            with pytest.raises(PeerError, match="was due"):
                for _ in sequences:
                    channel.receive_untrusted()


def test_unknown_frames() -> None:
    with negotiated(Role.DESTINATION) as (channel, peer):
        peer.sendall(frame(UNKNOWN))
        with pytest.raises(PeerError, match="mandatory frame of unknown type 0x7f"):
            channel.receive_untrusted()
    bulk = bytes(MIB)
    with negotiated(Role.DESTINATION) as (channel, peer):

        def feed() -> None:
            for n in range(3):
                head = frame(UNKNOWN + n, bytes(MIB), sequence=n, flags=1, bulk_bytes=len(bulk))
                peer.sendall(head + bulk)
            peer.sendall(frame(FrameType.CONFIGURE, b"\x80", sequence=3))

        with beside(feed):
            assert channel.receive_untrusted().type is FrameType.CONFIGURE
    with negotiated(Role.DESTINATION) as (channel, peer):
        peer.sendall(frame(UNKNOWN, b"meta", flags=1)[:-1] + b"X")
        with pytest.raises(PeerError, match="optional frame is damaged"):
            channel.receive_untrusted()


def test_a_known_frame_where_another_was_expected() -> None:
    with negotiated(Role.DESTINATION) as (channel, peer):
        in_phase(channel, Phase.PRECOPY)
        peer.sendall(frame(FrameType.FINAL))
        with pytest.raises(PeerError, match="a FINAL frame where ROUND was due"):
            channel.expect_untrusted(FrameType.ROUND)


# -- claims


@pytest.mark.parametrize("kind", list(FrameType), ids=lambda kind: kind.name)
def test_claims_over_the_limit_are_refused_before_anything_is_allocated(kind: FrameType) -> None:
    limits = LIMITS[kind]
    for over in (
        {"meta_bytes": limits.meta_bytes + 1},
        {"meta_bytes": 2**32 - 1},
        {"bulk_bytes": limits.bulk_bytes + 1},
        {"bulk_bytes": 2**64 - 1},
    ):
        with negotiated(Role.DESTINATION) as (channel, peer):
            peer.sendall(frame(kind, b"", **over))

            def refuse(channel: Channel = channel) -> None:
                with pytest.raises(PeerError, match="are the most"):
                    channel.receive_untrusted()

            assert peak_bytes(refuse) < MIB // 4


def test_claims_at_the_limit_cost_no_more_than_they_claim() -> None:
    limit = LIMITS[FrameType.CONFIGURE].meta_bytes
    with negotiated(Role.DESTINATION) as (channel, peer):
        peer.sendall(frame(FrameType.CONFIGURE, b"", meta_bytes=limit))
        peer.shutdown(socket.SHUT_WR)

        def refuse() -> None:
            with pytest.raises(LinkLost):
                channel.receive_untrusted()

        assert peak_bytes(refuse) < limit + MIB // 4


# -- time


def test_half_open_connections_end() -> None:
    """A peer whose host died: the connection stands, nothing comes."""
    with negotiated(Role.SOURCE, timeout_s=0.2) as (channel, _), pytest.raises(LinkLost):
        channel.receive_untrusted()
    with (
        channel_and_peer(Role.DESTINATION, timeout_s=0.2) as (channel, _),
        pytest.raises(LinkLost, match="time limit"),
    ):
        channel.negotiate_untrusted()


def test_a_dripping_peer_cannot_hold_the_source_in_its_downtime() -> None:
    """LOADED that comes byte by byte, each within the limit, ends within two of them."""
    with negotiated(Role.SOURCE, timeout_s=0.4) as (channel, peer):
        in_phase(channel, Phase.LOAD)
        data = frame(FrameType.LOADED, wire.pack({"verified": False, "x": "y" * 500}))

        def drip() -> None:
            with contextlib.suppress(OSError):
                for at in range(len(data)):
                    peer.sendall(data[at : at + 1])
                    time.sleep(0.1)

        started = time.monotonic()
        with beside(drip):
            with pytest.raises(LinkLost, match="came within the time limit"):
                channel.receive_untrusted()
            assert time.monotonic() - started < 10
            channel.link.close()


# -- giving up


def test_an_error_message_is_cut_and_made_printable() -> None:
    """It goes to a terminal, and may quote a file name that is no text."""
    with channel_pair() as (source, destination):
        source.send_error(Exception("\x1b[2J\r\nbad \udcff" + "µ" * 5000), 5)
        with pytest.raises(PeerGaveUp) as caught:
            destination.receive_untrusted()
        assert str(caught.value).startswith("the source gave up: ?[2J??bad ?µµ")
        assert len(str(caught.value)) < 1100 and str(caught.value).isprintable()


@pytest.mark.parametrize("meta", [b"", b"\xc0", b"\x80", wire.pack({"code": "x", "message": 5})])
def test_an_error_that_says_nothing_is_an_error(meta: bytes) -> None:
    with negotiated(Role.SOURCE) as (channel, peer):
        peer.sendall(frame(FrameType.ERROR, meta))
        with pytest.raises(PeerGaveUp, match="the destination gave up"):
            channel.receive_untrusted()


def test_nothing_can_be_sent_or_received_after_an_error() -> None:
    with channel_pair() as (source, destination):
        source.send_error(Exception("no"), 1)
        with pytest.raises(AssertionError):
            source.send_map(FrameType.CONFIGURE)
        with pytest.raises(PeerGaveUp):
            destination.receive_untrusted()
        with pytest.raises(AssertionError):
            destination.send_map(FrameType.CONFIGURED)


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_who_sends_into_a_closed_link_still_hears_why(family: str) -> None:
    with channel_pair(family) as (source, destination):
        in_phase(source, Phase.ROUND)
        in_phase(destination, Phase.ROUND)
        destination.send_error(Exception("the disk is full"), 5)
        destination.link.abort()
        meta = wire.encode_pages_meta(0, wire.Encoding.RAW, np.array([[0, 1]]))
        with pytest.raises(PeerGaveUp, match="the disk is full"):
            for _ in range(10_000):
                source.send(FrameType.PAGES, meta, [bytes(4096)], 4096)


def test_a_link_that_breaks_without_a_word_is_just_lost() -> None:
    with channel_pair() as (source, destination):
        destination.link.close()
        with pytest.raises(LinkLost):
            source.send_map(FrameType.CONFIGURE)


# -- everything else


SOURCE_SAYS = [v for v in SESSION if v.sender is Role.SOURCE]


@settings(max_examples=150)
@given(st.data())
def test_a_stream_with_a_flipped_bit_never_passes_for_another(data: st.DataObject) -> None:
    """Bulk apart (the page hashes guard it), what arrives is what was sent, or an error."""
    stream = bytearray(b"".join(v.whole for v in SOURCE_SAYS))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[bit // 8] ^= 1 << bit % 8
    cut = data.draw(st.just(len(stream)) | st.integers(0, len(stream)))
    with channel_and_peer(Role.DESTINATION) as (channel, peer):
        peer.sendall(stream[:cut])
        peer.shutdown(socket.SHUT_WR)
        try:
            channel.negotiate_untrusted()
            for vector in SOURCE_SAYS[1:]:
                mine = {p: r for p, r, _ in TRANSITIONS}.get(channel.phase)
                if mine is Role.DESTINATION:  # say what is due from this side
                    (kind,) = [k for p, _, k in TRANSITIONS if p is channel.phase]
                    channel.send_map(kind)
                if vector.frame == "unknown optional":
                    continue
                found = channel.receive_untrusted()
                assert bytes(found.meta) == vector.head[wire.FRAME_HEADER.size :]
                channel.drop_bulk(found.bulk_bytes)
        except (PeerError, LinkLost):
            pass

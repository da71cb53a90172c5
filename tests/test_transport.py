"""Links: addresses, exact vectored I/O, time limits, listening."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import HostError, UsageError
from migrate.transport import MAX_IOV, Address, Link, LinkLost, Listener, connect, parse_uri
from migrate.units import MIB
from tests.links import beside, link_pair, socket_pair

FAMILIES = pytest.mark.parametrize("family", ["unix", "tcp"])


# -- addresses


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:host:4444", Address("tcp", host="host", port=4444)),
        ("tcp:127.0.0.1:0", Address("tcp", host="127.0.0.1", port=0)),
        ("tcp:[::1]:65535", Address("tcp", host="::1", port=65535)),
        ("tcp:[fe80::1%eth0]:1", Address("tcp", host="fe80::1%eth0", port=1)),
        ("tcp::4444", Address("tcp", host="", port=4444)),
        ("unix:/a/b:c", Address("unix", path="/a/b:c")),
        ("unix:relative", Address("unix", path="relative")),
        ("fd:7", Address("fd", fd=7)),
    ],
)
def test_addresses_there_and_back(uri: str, address: Address) -> None:
    assert parse_uri(uri) == address
    assert str(address) == uri


@pytest.mark.parametrize(
    "uri",
    ["", "tcp:", "tcp:host", "tcp:host:", "tcp:host:65536", "tcp:host:-1", "tcp:::1:5", "tcp:[::1]",
     "unix:", "unix:" + "x" * 108, "fd:", "fd:-1", "fd:x", "fd:12345678", "udp:host:1", "host:1"],
)  # fmt: skip
def test_what_is_no_address(uri: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(uri)


@given(st.text())
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    for uri in (text, "tcp:" + text, "unix:" + text, "fd:" + text):
        try:
            address = parse_uri(uri)
        except UsageError:
            continue
        assert parse_uri(str(address)) == address


@pytest.mark.parametrize("host", ["a" * 64, "é" * 64, "a..b"])
def test_a_host_name_that_cannot_be_one_is_a_usage_error(host: str) -> None:
    with pytest.raises(UsageError, match="no host can have such a name"):
        parse_uri(f"tcp:{host}:1")


# -- vectored I/O


@FAMILIES
def test_many_buffers_arrive_in_order(family: str) -> None:
    """More than one kernel call takes, of every size, some of them empty."""
    blocks = [os.urandom(n % 97) for n in range(2 * MAX_IOV + 100)] + [os.urandom(8 * MIB)]
    sizes = [5, 0, 8 * MIB, *[3] * (MAX_IOV + 5)]
    whole = b"".join(blocks)
    into = [bytearray(size) for size in sizes]
    into.append(bytearray(len(whole) - sum(sizes)))
    with link_pair(family) as (a, b):
        with beside(lambda: a.send(blocks)):
            b.receive_into(into)
        assert b"".join(into) == whole
        assert a.bytes_sent == b.bytes_received == len(whole)


@FAMILIES
def test_byte_by_byte(family: str) -> None:
    data = os.urandom(3000)
    one, two = socket_pair(family)
    with one:
        link = Link(two, "peer")

        def drip() -> None:
            for at in range(len(data)):
                one.sendall(data[at : at + 1])

        with beside(drip):
            assert link.receive(1000) == data[:1000]
            parts = [bytearray(700), bytearray(0), bytearray(1300)]
            link.receive_into(parts)
            assert b"".join(parts) == data[1000:]
        link.close()


@FAMILIES
def test_a_peer_that_goes_away(family: str) -> None:
    with link_pair(family) as (a, b):
        a.send([b"abc"])
        a.close()
        with pytest.raises(LinkLost, match="closed the connection"):
            b.receive(4)
    with link_pair(family) as (a, b):
        a.send([b"abc"])
        a.close()
        with pytest.raises(LinkLost, match="closed the connection"):
            b.receive_into([bytearray(2), bytearray(2)])
        with pytest.raises(LinkLost, match="while sending"):
            for _ in range(100):
                b.send([bytes(MIB)])


# -- time limits


@FAMILIES
def test_a_silent_peer_is_given_up(family: str) -> None:
    with link_pair(family, timeout_s=0.2) as (_, b):
        for call in (lambda: b.receive(1), lambda: b.receive_into([bytearray(1), bytearray(1)])):
            started = time.monotonic()
            with pytest.raises(LinkLost, match="within the time limit"):
                call()
            assert 0.15 < time.monotonic() - started < 10


@FAMILIES
def test_a_peer_that_reads_nothing_is_given_up(family: str) -> None:
    with link_pair(family, timeout_s=0.2) as (a, _), pytest.raises(LinkLost, match="took no data"):
        for _ in range(1000):
            a.send([bytes(MIB)])


@FAMILIES
def test_dripping_does_not_stretch_the_limit_of_a_header(family: str) -> None:
    one, two = socket_pair(family)
    link = Link(two, "peer")
    link.set_timeout(0.4)
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.05):
            one.sendall(b"x")

    started = time.monotonic()
    with beside(drip):
        try:
            with pytest.raises(LinkLost, match="of 1000 bytes came within the time limit"):
                link.receive(1000)
        finally:
            stop.set()
    assert time.monotonic() - started < 10
    link.close()
    one.close()


def test_bulk_that_keeps_coming_is_never_too_late() -> None:
    """The limit of bulk is on standstill: a slow link is no fault."""
    one, two = socket_pair()
    link = Link(two, "peer")
    link.set_timeout(0.5)

    def trickle() -> None:
        for _ in range(10):
            time.sleep(0.1)
            one.sendall(bytes(100))

    with beside(trickle):
        link.receive_into([bytearray(1000)])
    link.close()
    one.close()


@FAMILIES
@pytest.mark.parametrize("direction", ["receive", "send"])
def test_abort_ends_a_call_under_way(family: str, direction: str) -> None:
    def blocked() -> None:
        with pytest.raises(LinkLost):
            while True:
                if direction == "receive":
                    b.receive_into([bytearray(10), bytearray(10)])
                else:
                    b.send([bytes(MIB)])

    with link_pair(family, timeout_s=None) as (_, b):
        with beside(blocked):
            time.sleep(0.1)
            b.abort()
        with pytest.raises(LinkLost):  # and all later ones
            b.receive(1)
    b.abort()  # of a closed link: nothing


def test_nothing_is_counted_as_sent_when_the_kernel_takes_nothing() -> None:
    """The handover decides by this whether the guest is still the source's."""
    with link_pair() as (a, b):
        b.close()
        with pytest.raises(LinkLost):
            a.send([b"handover"])
        assert a.bytes_sent == 0


# -- connecting and listening


def talk(listener: Listener) -> None:
    client = connect(listener.address)
    server = listener.accept()
    client.send([b"ping"])
    assert server.receive(4) == b"ping"
    client.close()
    server.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_tcp(host: str) -> None:
    try:
        listener = Listener(Address("tcp", host=host, port=0))
    except HostError:
        assert host == "::1"
        pytest.skip("this host has no IPv6")
    try:
        assert listener.address.port != 0
        talk(listener)
        client = connect(listener.address)
        peer = listener.accept()
        assert parse_uri(peer.peer).host in ("127.0.0.1", "::1")
        peer.close()
        client.close()
        with pytest.raises(HostError, match="in use"):
            Listener(listener.address)
    finally:
        listener.close()
    with pytest.raises(HostError, match="is `migrate receive` listening"):
        connect(listener.address, timeout_s=5)


def test_unix_sockets_are_private_and_tidied_up(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    address = Address("unix", path=str(path))
    listener = Listener(address)
    assert path.stat().st_mode & 0o777 == 0o600
    talk(listener)
    with pytest.raises(HostError, match="in use"):
        Listener(address)
    listener.accept().close()  # the second one's look whether somebody answers
    listener.close()
    assert not path.exists()
    with pytest.raises(HostError, match="cannot connect"):
        connect(address)


def test_a_dead_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.close()
    listener = Listener(Address("unix", path=str(path)))
    talk(listener)
    path.unlink()
    path.write_text("mine")
    listener.close()  # not its socket any more
    assert path.read_text() == "mine"
    with pytest.raises(HostError, match="cannot listen"):
        Listener(Address("unix", path=str(path)))
    with pytest.raises(HostError, match="cannot listen"):
        Listener(Address("unix", path=str(tmp_path / "no" / "where")))


def test_a_connected_descriptor() -> None:
    a, b = socket.socketpair()
    with a, b:
        listener = Listener(Address("fd", fd=a.fileno()))
        assert listener.sock is None
        server = listener.accept()
        client = connect(Address("fd", fd=b.fileno()))
        client.send([b"x"])
        assert server.receive(1) == b"x"
        with pytest.raises(HostError, match="used up"):
            listener.accept()
        for link in (server, client):
            link.close()
        listener.close()
        Listener(Address("fd", fd=a.fileno())).close()  # never accepted: closed all the same


def test_a_listening_descriptor(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        listener = Listener(Address("fd", fd=sock.fileno()))
        client = connect(Address("unix", path=path))
        listener.accept().close()
        client.close()
        listener.close()


def test_descriptors_that_are_no_stream_sockets(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(UsageError, match="not a socket"):
        connect(Address("fd", fd=file.fileno()))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram,
        pytest.raises(UsageError, match="not a stream"),
    ):
        Listener(Address("fd", fd=datagram.fileno()))
    with pytest.raises(UsageError, match="not open"):
        connect(Address("fd", fd=999_999))

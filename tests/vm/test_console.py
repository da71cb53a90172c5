"""Consoles: nothing is lost while it fits, nothing ever holds up the guest."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.errors import HostError, UsageError
from migrate.vm.console import RING_BYTES, Console, FileConsole, SocketConsole, open_console


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def dial(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(path))
    client.settimeout(10)
    return client


def receive(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = client.recv(65536)
        assert part, data[-100:]
        data += part
    return data


def test_ring_is_bounded_and_keeps_the_newest() -> None:
    console = Console()
    text = b"".join(b"%07d\n" % i for i in range(RING_BYTES // 4))
    for start in range(0, len(text), 1000):
        console.write(text[start : start + 1000])
    kept, position = console.since(0)
    assert RING_BYTES - 1000 <= len(kept) <= RING_BYTES
    assert text.endswith(kept)
    assert position == len(text)
    assert console.since(position) == (b"", position)
    assert console.since(position - 5) == (text[-5:], position)
    console.close()


def test_file_console_appends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    console = open_console(f"file:{path}")
    for i in range(100):
        console.write(b"%d\n" % i)
    console.close()
    console.close()
    assert path.read_bytes() == b"before\n" + b"".join(b"%d\n" % i for i in range(100))


def test_a_reader_that_does_not_read_costs_the_guest_nothing() -> None:
    read_end, write_end = os.pipe()
    console = FileConsole(write_end)
    began = time.monotonic()
    for _ in range(300):
        console.write(b"x" * 4096)
    assert time.monotonic() - began < 1
    os.close(read_end)
    console.close()
    os.close(write_end)


def test_input_reaches_the_guest_and_waits_for_room() -> None:
    read_end, write_end = os.pipe()
    sink = os.open("/dev/null", os.O_WRONLY)
    console = FileConsole(sink, read_end)
    got: list[bytes] = []
    room = threading.Event()
    console.attach(got.append, room.is_set)
    os.write(write_end, b"typed")
    time.sleep(0.05)
    assert got == []
    room.set()
    eventually(lambda: got == [b"typed"])
    assert console.offer(b"offered")
    assert got == [b"typed", b"offered"]
    os.close(write_end)
    console.close()
    for fd in (read_end, sink):
        os.close(fd)


def test_socket_console_serves_many(tmp_path: Path) -> None:
    path = tmp_path / "console"
    console = SocketConsole(str(path))
    got: list[bytes] = []
    console.attach(got.append, lambda: True)
    console.write(b"before ")
    first = dial(path)
    assert receive(first, 7) == b"before "
    second = dial(path)
    assert receive(second, 7) == b"before "
    console.write(b"after")
    assert receive(first, 5) == receive(second, 5) == b"after"
    first.sendall(b"a")
    eventually(lambda: got == [b"a"])
    second.sendall(b"b")
    eventually(lambda: got == [b"a", b"b"])
    first.close()
    console.write(b"!")
    assert receive(second, 1) == b"!"
    console.close()
    assert second.recv(1) == b""
    second.close()
    assert not path.exists()


def test_a_slow_client_gets_the_rest_later_and_holds_up_nobody(tmp_path: Path) -> None:
    path = tmp_path / "console"
    console = SocketConsole(str(path))
    slow, quick = dial(path), dial(path)
    text = b"".join(b"%07d\n" % i for i in range(RING_BYTES // 16))
    began = time.monotonic()
    console.write(text[:1000])
    for start in range(1000, len(text), 5000):
        console.write(text[start : start + 5000])
    assert time.monotonic() - began < 1
    assert receive(quick, len(text)) == text
    assert receive(slow, len(text)) == text
    slow.close()
    quick.close()
    console.close()


def test_socket_left_behind_is_taken_over_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "console"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    console = SocketConsole(str(path))
    with pytest.raises(HostError, match="console socket"):
        SocketConsole(str(path))
    dial(path).close()
    console.close()


def test_console_specifications(tmp_path: Path) -> None:
    assert type(open_console("none")) is Console
    for wrong in ("", "file:", "tcp:1", "unix:"):
        with pytest.raises(UsageError, match="write stdio"):
            open_console(wrong)
    with pytest.raises(HostError, match="nowhere"):
        open_console(f"file:{tmp_path}/nowhere/log")

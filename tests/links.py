"""Connected links and golden bytes for the tests of the migration stream."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate import wire
from migrate.channel import Channel
from migrate.transport import Link
from migrate.wire import Role

VECTORS = Path(__file__).parent / "vectors" / "session.json"


@contextlib.contextmanager
def link_pair(family: str = "unix", timeout_s: float | None = 20.0) -> Iterator[tuple[Link, Link]]:
    """Two ends of one stream, closed at the end."""
    a, b = socket_pair(family)
    one, two = Link(a, f"{family}:one"), Link(b, f"{family}:two")
    for link in (one, two):
        link.set_timeout(timeout_s)
    try:
        yield one, two
    finally:
        one.close()
        two.close()


def socket_pair(family: str = "unix") -> tuple[socket.socket, socket.socket]:
    if family == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        return a, server.accept()[0]


@contextlib.contextmanager
def channel_pair(family: str = "unix") -> Iterator[tuple[Channel, Channel]]:
    """Source and destination, negotiated."""
    with link_pair(family) as (a, b):
        source, destination = Channel(a, Role.SOURCE), Channel(b, Role.DESTINATION)
        with beside(destination.negotiate_untrusted):
            source.negotiate_untrusted()
        yield source, destination


@contextlib.contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """`work` in a thread while the block runs; what it raises comes out at the end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that `work` had allocated at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def frame(
    kind: int,
    meta: bytes = b"\x80",
    *,
    sequence: int = 0,
    flags: int = 0,
    meta_bytes: int | None = None,
    bulk_bytes: int = 0,
) -> bytes:
    """A frame as anybody might make it, its checksums right."""
    claimed = len(meta) if meta_bytes is None else meta_bytes
    crc = zlib.crc32(meta)
    head = wire.FRAME_HEADER.pack(
        wire.FRAME_MAGIC, kind, flags, sequence, claimed, bulk_bytes, crc, 0
    )[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + meta


@dataclass(frozen=True)
class Vector:
    """One stream header or frame of the golden session, in `tests/vectors/session.json`."""

    sender: Role
    frame: str
    head: bytes
    """The header, and of a frame the meta part too."""
    bulk: bytes
    fields: dict[str, Any] | None
    pages: dict[str, Any] | None

    @property
    def whole(self) -> bytes:
        return self.head + self.bulk


def _value(item: Any) -> Any:
    if isinstance(item, dict):
        if set(item) == {"$hex"}:
            return bytes.fromhex(item["$hex"])
        return {key: _value(value) for key, value in item.items()}
    return [_value(value) for value in item] if isinstance(item, list) else item


def _vector(item: dict[str, Any]) -> Vector:
    bulk = item.get("bulk", {"hex": ""})
    return Vector(
        Role[item["from"].upper()],
        item["frame"],
        bytes.fromhex(item["bytes"]),
        bytes([bulk["byte"]]) * bulk["times"] if "byte" in bulk else bytes.fromhex(bulk["hex"]),
        _value(item.get("fields")),
        item.get("pages"),
    )


_LOADED = json.loads(VECTORS.read_text(encoding="utf-8"))
SESSION = [_vector(item) for item in _LOADED["session"]]
"""A whole migration, in the order of its frames."""
ERRORS = [_vector(item) for item in _LOADED["errors"]]
"""What either side says right after the stream headers when it gives up."""

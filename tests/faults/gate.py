"""A relay that knows frames: it stops a migration at a chosen frame, before or after it passes.

Two `migrate` processes speak through it without noticing. What happens at the frame is the test's
`action`: kill a process, or nothing. What the source sent is kept, for those who replay it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from migrate import wire
from migrate.wire import FrameType

Action = Callable[[], None]


class Gate:
    """One connection to `target` (tcp:HOST:PORT); `uri` is where the source connects.

    At the first frame of `kind`, whichever way it goes, `action` is called, and the connection is
    cut unless `goes_on`. With `passes` the frame is delivered first. `None`: never.
    """

    def __init__(
        self,
        target: str,
        kind: FrameType | None = None,
        action: Action = lambda: None,
        *,
        passes: bool = False,
        goes_on: bool = False,
    ) -> None:
        _, host, port = target.split(":")
        self._target = (host, int(port))
        self._kind, self._action, self._passes, self._goes_on = kind, action, passes, goes_on
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(30)
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self.struck = threading.Event()
        self.sent = bytearray()
        """What the source sent."""
        self._ends: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._cut()
        self._thread.join(20)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            source = self._server.accept()[0]
            self._ends.append(source)
            self._ends.append(socket.create_connection(self._target))
            destination = self._ends[1]
            back = threading.Thread(
                target=self._pump, args=(destination, source, False), daemon=True
            )
            back.start()
            self._pump(source, destination, True)
            back.join(20)
        for end in self._ends:
            end.close()  # with unread bytes in it: a reset, as when a process dies

    def _pump(self, here: socket.socket, there: socket.socket, up: bool) -> None:
        """Frame by frame, until an end is gone."""
        with contextlib.suppress(OSError):
            self._forward(here, there, wire.STREAM_HEADER.size, up)
            while len(header := _read(here, wire.FRAME_HEADER.size)) == wire.FRAME_HEADER.size:
                _, kind, _, _, meta_bytes, bulk_bytes, _, _ = wire.FRAME_HEADER.unpack(header)
                due = kind == self._kind and not self.struck.is_set()
                if due and not self._passes:
                    self._strike()
                there.sendall(header)
                if up:
                    self.sent += header
                self._forward(here, there, meta_bytes + bulk_bytes, up)
                if due and self._passes:
                    self._strike()
        self._cut()

    def _forward(self, here: socket.socket, there: socket.socket, n_bytes: int, up: bool) -> None:
        data = _read(here, n_bytes)
        if up:
            self.sent += data
        there.sendall(data)

    def _strike(self) -> None:
        self.struck.set()
        self._action()
        if not self._goes_on:
            raise OSError("cut")

    def _cut(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _read(sock: socket.socket, n_bytes: int) -> bytes:
    """As much of `n_bytes` as comes before the end."""
    data = bytearray()
    while len(data) < n_bytes and (piece := sock.recv(min(n_bytes - len(data), 1 << 20))):
        data += piece
    return bytes(data)

"""A link that fails: a TCP proxy that cuts, or flips a bit, at a chosen byte of a direction."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass


@dataclass
class Fault:
    """What goes wrong after `at_byte` bytes of a direction ("up": from the source)."""

    direction: str = "up"
    at_byte: int = 1 << 60
    flip_mask: int = 0
    """0 cuts the link; else the byte is changed and the stream goes on."""
    reset: bool = False
    """Cut by RST instead of FIN."""


class Proxy:
    """One connection to `target`, through a fault. `uri` is where to connect."""

    def __init__(self, target: str, fault: Fault) -> None:
        _, host, port = target.split(":")
        self._target = (host, int(port))
        self._fault = fault
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self.seen = {"up": 0, "down": 0}
        self.struck = False
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            client = self._server.accept()[0]
            upstream = socket.create_connection(self._target)
            self._sockets = [client, upstream]
            for direction, source, sink in (("up", client, upstream), ("down", upstream, client)):
                pump = threading.Thread(
                    target=self._pump, args=(direction, source, sink), daemon=True
                )
                self._threads.append(pump)
                pump.start()

    def _pump(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        fault = self._fault
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                start = self.seen[direction]
                self.seen[direction] += len(data)
                offset = fault.at_byte - start
                if direction == fault.direction and 0 <= offset < len(data):
                    self.struck = True
                    if not fault.flip_mask:
                        sink.sendall(data[:offset])
                        self._cut()
                        return
                    data = bytearray(data)
                    data[offset] ^= fault.flip_mask
                sink.sendall(data)
        if self.struck and fault.reset:
            return  # the thread that cuts sends the resets
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        how = socket.SHUT_RD if self._fault.reset else socket.SHUT_RDWR
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(how)  # wakes the other direction's thread too
        if self._fault.reset:
            for thread in self._threads[1:]:
                if thread is not threading.current_thread():
                    thread.join(2)
            for end in self._sockets:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()

    def close(self) -> None:
        self._server.close()
        self._fault = Fault()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for end in self._sockets:
            end.close()

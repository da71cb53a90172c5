"""Where the guest's serial line ends (layer 2): stdio, nowhere, a file, a unix socket.

The vcpu thread only ever appends to a bounded buffer: a reader that is slow or gone costs the
guest nothing, and what does not fit is lost from its old end. A thread of the console's own
moves bytes between that buffer and the outside.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from migrate.errors import HostError, UsageError

RING_BYTES: Final = 256 * 1024
READ_BYTES: Final = 4096
INPUT_RETRY_S: Final = 0.02
MAX_CLIENTS: Final = 16

Receive = Callable[[bytes], None]
Ready = Callable[[], bool]


class Console:
    """Keeps the last `RING_BYTES` of output; on its own (`none`) it does no more.

    `write` is for the vcpu thread; it never blocks. Input goes to what `attach` was given,
    from the console's thread, while its `ready` says yes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: deque[bytes] = deque()
        self._start = 0
        """Bytes of output that have left the ring; `_start + ring` is all there ever was."""
        self._end = 0
        self._receive: Receive | None = None
        self._ready: Ready | None = None

    def attach(self, receive: Receive, ready: Ready) -> None:
        """Deliver input to `receive` from now on."""
        self._receive, self._ready = receive, ready

    def offer(self, data: bytes) -> bool:
        """Input for the guest, from any thread; False while it has no room for it."""
        if self._receive is None or self._ready is None or not self._ready():
            return False
        self._receive(data)
        return True

    def write(self, data: bytes) -> None:
        """Output of the guest."""
        with self._lock:
            self._chunks.append(data)
            self._end += len(data)
            while self._end - self._start > RING_BYTES:
                self._start += len(self._chunks.popleft())
        self._wake()

    def since(self, position: int) -> tuple[bytes, int]:
        """Output from `position` (a count of bytes, 0 at the start) as far as it is kept, and the
        position after it. Any thread.
        """
        with self._lock:
            if position >= self._end:
                return b"", self._end
            skipped, parts = self._end, []
            for chunk in reversed(self._chunks):
                if skipped <= position:
                    break
                parts.append(chunk)
                skipped -= len(chunk)
            data = b"".join(reversed(parts))
            return data[max(position - skipped, 0) :], self._end

    def close(self) -> None:
        """Deliver what is left (without waiting for slow readers) and let go. Idempotent."""

    def _wake(self) -> None:
        """There is output."""


class _Pumped(Console):
    """A console with a thread."""

    def __init__(self) -> None:
        super().__init__()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._awake = False
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._main, name="console", daemon=True)

    @abstractmethod
    def _deliver(self) -> None:
        """Pass on output, as much as goes without blocking."""

    @abstractmethod
    def _readable(self, fd: int) -> None:
        """Something that was registered can be read."""

    @abstractmethod
    def _release(self) -> None:
        """Close what the subclass opened. On the console's thread, the last call."""

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_w, b"\0")

    def _main(self) -> None:
        while not self._closing:
            for key, events in self._selector.select():
                if key.fd == self._wake_r:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_r, READ_BYTES)
                    # Before looking at the ring: a write from now on wakes again.
                    self._awake = False
                elif events & selectors.EVENT_READ:
                    self._readable(key.fd)
            self._deliver()
        self._deliver()
        self._release()
        self._selector.close()
        os.close(self._wake_r)

    def _input(self, data: bytes) -> None:
        """To the guest, waiting for room (the pause is this thread's, not the guest's)."""
        while not self._closing:
            if self._receive is not None and self._ready is not None and self._ready():
                self._receive(data)
                return
            if self._receive is None:
                return
            threading.Event().wait(INPUT_RETRY_S)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._awake = False
            self._wake()
            if self._thread.is_alive() and threading.current_thread() is not self._thread:
                self._thread.join(2.0)


class FileConsole(_Pumped):
    """Output to a descriptor, input perhaps from another. Not owned: it does not close them.

    Writes block this console's thread only. Raises nothing: a full disk or a closed terminal
    loses output, not the guest.
    """

    def __init__(self, out_fd: int, in_fd: int | None = None, *, owned: bool = False) -> None:
        super().__init__()
        self._out_fd = out_fd
        self._owned = owned
        self._position = 0
        if in_fd is not None:
            with contextlib.suppress(PermissionError):  # epoll knows no regular files
                self._selector.register(in_fd, selectors.EVENT_READ)
        self._thread.start()

    def _deliver(self) -> None:
        data, self._position = self.since(self._position)
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._out_fd, view) :]
            except BlockingIOError:
                threading.Event().wait(INPUT_RETRY_S)
                if self._closing:
                    return
            except OSError:
                return

    def _readable(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_BYTES)
        except OSError:
            data = b""
        if data:
            self._input(data)
        else:
            self._selector.unregister(fd)

    def _release(self) -> None:
        if self._owned:
            os.close(self._out_fd)


class SocketConsole(_Pumped):
    """A unix socket that any number of clients may attach to, up to 16 at a time.

    A client gets what the ring holds, then what comes; all may type.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _remove_stale(self._path)
            self._listener.bind(path)
            self._path.chmod(0o600)
            self._listener.listen(MAX_CLIENTS)
        except OSError as error:
            self._listener.close()
            raise HostError(f"console socket {path}: {error.strerror}") from error
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: dict[int, tuple[socket.socket, int]] = {}
        """By descriptor: the client, and the output it has had."""
        self._thread.start()

    def _readable(self, fd: int) -> None:
        if fd == self._listener.fileno():
            with contextlib.suppress(BlockingIOError, ConnectionError):
                client, _ = self._listener.accept()
                if len(self._clients) >= MAX_CLIENTS:
                    client.close()
                    return
                client.setblocking(False)
                self._clients[client.fileno()] = (client, 0)
                self._selector.register(client, selectors.EVENT_READ)
            return
        if fd not in self._clients:
            return
        try:
            data = self._clients[fd][0].recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._input(data)
        else:
            self._drop(fd)

    def _deliver(self) -> None:
        for fd, (client, position) in tuple(self._clients.items()):
            data, end = self.since(position)
            sent = 0
            try:
                if data:
                    sent = client.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(fd)
                continue
            self._clients[fd] = (client, end - len(data) + sent)
            events = selectors.EVENT_READ
            if sent < len(data):
                events |= selectors.EVENT_WRITE
            if self._selector.get_key(client).events != events:
                self._selector.modify(client, events)

    def _drop(self, fd: int) -> None:
        client, _ = self._clients.pop(fd)
        self._selector.unregister(client)
        client.close()

    def _release(self) -> None:
        for fd in tuple(self._clients):
            self._drop(fd)
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def open_console(spec: str) -> Console:
    """`stdio`, `none`, `file:PATH` (created, or appended to), `unix:PATH`.

    Raises UsageError and HostError.
    """
    if spec == "none":
        return Console()
    if spec == "stdio":
        return FileConsole(1, 0)
    kind, _, path = spec.partition(":")
    if kind == "file" and path:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise HostError(f"console file {path}: {error.strerror}") from error
        return FileConsole(fd, owned=True)
    if kind == "unix" and path:
        return SocketConsole(path)
    raise UsageError(f"console {spec!r}: write stdio, none, file:PATH or unix:PATH")


def _remove_stale(path: Path) -> None:
    """A socket that nobody listens on is left over from a process that died."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()

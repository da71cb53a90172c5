"""The machine's side of the control socket: connections, lines, dispatch (layer 5).

Knows requests and answers, not machines: what the commands do is in daemon.py. Whoever may
connect is the machine's owner, but may well be a broken program: no line makes it fall over or
grow without bound, and no silent reader holds a command up.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias

import trio

from migrate.control import (
    MAX_LINE_BYTES,
    Json,
    Request,
    encode,
    error_to_json,
    parse_request_untrusted,
)
from migrate.errors import MigrateError, PeerError, UsageError
from migrate.tasks import open_nursery

MAX_CONNECTIONS: Final = 64
MAX_EVENTS_WAITING: Final = 256
"""A reader that is further behind misses events, never the return."""
MAX_FDS: Final = 4
GONE_POLL_S: Final = 0.2

Handler: TypeAlias = "Callable[[Connection, Json], Awaitable[Any]]"


class Connection:
    """What a command's handler sees of its client.

    `stack` is unwound when the connection ends; `state` is the handlers' own. `fds` came with
    the client's lines (SCM_RIGHTS) and are closed with it. A handler that sets `upgrade` takes
    the connection over once its return has been sent.
    """

    def __init__(self, sock: trio.socket.SocketType, number: int) -> None:
        self.number = number
        self.stack = contextlib.ExitStack()
        self.state: Json = {}
        self.fds: list[int] = []
        self.upgrade: Callable[[trio.abc.Stream], Awaitable[None]] | None = None
        self._sock = sock
        self._buffer = bytearray()
        self._events: trio.MemorySendChannel[Json] | None = None
        self._token = trio.lowlevel.current_trio_token()

    def emit(self, event: Json) -> None:
        """An event of the request that is being answered. Any thread."""
        try:
            here = trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            here = False
        if here:
            self._put(event)
        else:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._put, event)

    def _put(self, event: Json) -> None:
        if self._events is not None:
            with contextlib.suppress(trio.WouldBlock, trio.ClosedResourceError):
                self._events.send_nowait(event)

    async def line(self) -> bytes | None:
        """The next line, None at the end. Raises PeerError for one that is too long."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) >= MAX_LINE_BYTES:
                raise PeerError(f"a line over {MAX_LINE_BYTES} bytes", role="control client")
            data = await self._receive()
            if not data:
                return None
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        if len(line) >= MAX_LINE_BYTES:
            raise PeerError(f"a line over {MAX_LINE_BYTES} bytes", role="control client")
        return line

    async def _receive(self) -> bytes:
        space = socket.CMSG_SPACE(MAX_FDS * 4)
        data, ancillary, _, _ = await self._sock.recvmsg(16384, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self.fds.extend(fds)
        if len(self.fds) > MAX_FDS:
            raise PeerError("too many file descriptors", role="control client")
        return data

    async def send(self, line: Json) -> None:
        data = memoryview(encode(line))
        while data:
            data = data[await self._sock.send(data) :]

    async def gone(self) -> None:
        """Wait until the client is no more (one that only ended its own lines still listens)."""
        poll = select.poll()
        poll.register(self._sock.fileno(), 0)
        while not any(flags & (select.POLLHUP | select.POLLERR) for _, flags in poll.poll(0)):
            await trio.sleep(GONE_POLL_S)

    @contextlib.asynccontextmanager
    async def _events_of(self, request: Request) -> Any:
        """While a request is answered: its events go out, and a client that left cancels it."""
        sending, receiving = trio.open_memory_channel[Json](MAX_EVENTS_WAITING)

        async def pump() -> None:
            async for event in receiving:
                await self.send({"id": request.id, **event})

        async def watch() -> None:
            await self.gone()
            nursery.cancel_scope.cancel()

        self._events = sending
        async with open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                async with open_nursery() as pumping:
                    pumping.start_soon(pump)
                    try:
                        yield
                    finally:
                        self._events = None
                        sending.close()
            finally:
                nursery.cancel_scope.cancel()

    def as_stream(self) -> trio.abc.Stream:
        return trio.SocketStream(self._sock)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.stack.close()
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.fds.clear()
        self._sock.close()


class ControlServer:
    """Answers the requests of any number of connections by `handlers`."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._connections = 0
        self._serial = 0
        self._answering = 0
        self._idle = trio.Event()
        self._idle.set()

    async def serve(self, listener: socket.socket) -> None:
        """Until cancelled."""
        listener.setblocking(False)
        accepting = trio.socket.from_stdlib_socket(listener)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await accepting.accept()
                except OSError:  # out of descriptors, or a client that went at once
                    await trio.sleep(0.05)
                    continue
                if self._connections >= MAX_CONNECTIONS:
                    sock.close()
                    continue
                self._connections += 1
                nursery.start_soon(self._converse, sock)

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    async def _converse(self, sock: trio.socket.SocketType) -> None:
        self._serial += 1
        connection = Connection(sock, self._serial)
        try:
            while connection.upgrade is None:
                try:
                    line = await connection.line()
                except PeerError as error:
                    await connection.send({"id": None, "error": error_to_json(error)})
                    return
                if line is None:
                    return
                await self._answer(connection, line)
            await connection.upgrade(connection.as_stream())
        except OSError:
            pass  # the client is gone
        except Exception:  # a defect of ours costs one connection, not the machine
            traceback.print_exc(file=sys.stderr)
        finally:
            self._connections -= 1
            connection.close()

    async def _answer(self, connection: Connection, line: bytes) -> None:
        self._answering += 1
        if self._answering == 1:
            self._idle = trio.Event()
        try:
            try:
                request = parse_request_untrusted(line)
            except PeerError as error:
                await connection.send({"id": None, "error": error_to_json(error)})
                return
            answer = await self._perform(connection, request)
            await connection.send({"id": request.id, **answer})
        finally:
            self._answering -= 1
            if self._answering == 0:
                self._idle.set()

    async def _perform(self, connection: Connection, request: Request) -> Json:
        handler = self._handlers.get(request.command)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            error: MigrateError = UsageError(
                f"unknown command {request.command[:40]!r}; known are {known}"
            )
            return {"error": error_to_json(error)}
        answer: Json = {}
        async with connection._events_of(request):
            try:
                answer = {"return": await handler(connection, request.arguments)}
            except MigrateError as error:
                answer = {"error": error_to_json(error)}
            except Exception as error:
                # A defect of ours: the machine goes on, its log has the trace.
                traceback.print_exc(file=sys.stderr)
                answer = {
                    "error": {
                        "class": "InternalError",
                        "message": f"{request.command}: {type(error).__name__}: {error}",
                        "exit-code": 1,
                    }
                }
        if not answer:
            raise ConnectionResetError("the client left before it was answered")
        return answer


def take_untrusted(arguments: Json, **types: tuple[type, Any]) -> Json:
    """The arguments by name: each of `types` is (type, default), `...` for one that must be there.

    Raises UsageError for what is left over, missing or of another type.
    """
    if left_over := sorted(set(arguments) - {name.replace("_", "-") for name in types}):
        raise UsageError(f"unknown argument {left_over[0][:40]!r}")
    taken = {}
    for name, (kind, default) in types.items():
        key = name.replace("_", "-")
        value = arguments.get(key, default)
        if value is ...:
            raise UsageError(f"the argument {key!r} is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            raise UsageError(f"the argument {key!r} is a {type(value).__name__}, not {kind}")
        if value is None and default is not None:
            raise UsageError(f"the argument {key!r} must not be null")
        taken[name] = value
    return taken

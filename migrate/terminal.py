"""A guest's console at a terminal or a stream: attaching, detaching, raw mode (layer 5).

What the guest prints is kept by `vm/console.py`, which also serves files and sockets. Here are the
two ends that come and go: this process's own terminal, and a client of the control socket.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import trio

from migrate.tasks import open_nursery
from migrate.vm.console import Console

ESCAPE: Final = b"\x1d"
"""Ctrl-], which leaves a console."""
POLL_S: Final = 0.002
"""How often a reader looks for output. A guest writes byte by byte: to be woken for each would
take the GIL from its vcpus far more often."""
RETRY_S: Final = 0.02


class Reader:
    """One reader's place in the console's output."""

    def __init__(self, console: Console, position: int = 0) -> None:
        """From `position` on, as far as it is kept (0: all that is kept)."""
        self._console = console
        self._position = position

    def take(self) -> bytes:
        """What came since the last call."""
        data, self._position = self._console.since(self._position)
        return data

    async def pass_on(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Until cancelled."""
        while True:
            if data := self.take():
                await write(data)
            else:
                await trio.sleep(POLL_S)


async def type_into(console: Console, data: bytes) -> None:
    """Input for the guest, waiting for room."""
    while data and not console.offer(data):
        await trio.sleep(RETRY_S)


async def attach(console: Console, stream: trio.abc.Stream) -> None:
    """Make `stream` a console until the other end is gone or this is cancelled.

    A peer that only stops typing (`echo v | …`) still gets the output.
    """

    async def read() -> None:
        # Of a connection that is reset both directions may learn at once: no error leaves here.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in stream:
                await type_into(console, bytes(data))
            return
        nursery.cancel_scope.cancel()

    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async with open_nursery() as nursery:
            nursery.start_soon(read)
            await Reader(console).pass_on(stream.send_all)


async def serve_stdio(console: Console, on_escape: Callable[[], None]) -> None:
    """Make this process's stdin and stdout the console until cancelled.

    A terminal is in raw mode meanwhile, and Ctrl-] calls `on_escape`.
    """
    reader = Reader(console)
    with raw_terminal(0):
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(_read_stdin, console, on_escape)
                await reader.pass_on(_write_stdout)
        finally:
            # What the guest printed last is often what matters.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await _write_stdout(reader.take())


async def _read_stdin(console: Console, on_escape: Callable[[], None]) -> None:
    """Terminals, pipes and sockets; a regular file or /dev/null as stdin types nothing."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return
    if not (os.isatty(0) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return
    while True:
        await trio.lowlevel.wait_readable(0)
        data = os.read(0, 4096)
        if not data:
            return
        escape = b""
        if os.isatty(0):
            data, escape, _ = data.partition(ESCAPE)
        await type_into(console, data)
        if escape:
            on_escape()
            return


async def _write_stdout(data: bytes) -> None:
    """In a thread: a terminal that is held (Ctrl-S) or a full pipe stalls nothing else."""
    view = memoryview(data)
    while view:
        try:
            written = await trio.to_thread.run_sync(os.write, 1, view, abandon_on_cancel=True)
        except OSError:  # the terminal or the pipe's reader is gone; the guest is not
            return
        view = view[written:]


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[bool]:
    """Raw mode if `fd` is a terminal (then True), and its old mode again at the end."""
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        # Output processing stays: the program's own messages end in plain newlines.
        mode = termios.tcgetattr(fd)
        mode[1] = before[1]
        termios.tcsetattr(fd, termios.TCSANOW, mode)
        yield True
    finally:
        sys.stdout.flush()
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

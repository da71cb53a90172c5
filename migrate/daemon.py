"""A machine's process: from the first sign of life to the end (layer 5).

One machine, one process, one control socket. The machine is either built here or received; while
it lives, the commands below are answered, and when the guest has shut down, failed, moved away,
or somebody said stop, everything is given back and the process ends.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias

import trio

from migrate.control import Json, SocketPlace, check_name
from migrate.control_server import Connection, ControlServer, take_untrusted
from migrate.dirtylog import Cursor
from migrate.errors import HandoverUncertain, MachineStateError
from migrate.events import Event, Log, PhaseEntered, RoundDone, RoundProgress
from migrate.machine import Machine, State
from migrate.options import send_options_untrusted
from migrate.tasks import open_nursery, settle_memory
from migrate.terminal import attach, serve_stdio
from migrate.vm.console import Console

LAST_ANSWERS_S: Final = 2.0
"""How long requests that are being answered may hold the end of the process up."""

Build: TypeAlias = "Callable[[Daemon], Awaitable[Machine]]"


def say(message: str) -> None:
    """One line for whoever watches the process: its terminal, or its log."""
    print(f"migrate: {message}", file=sys.stderr, flush=True)


class Daemon:
    """`run` is the life of the process. `phase` is what `ps` shows before there is a guest."""

    def __init__(self, name: str, console: Console, *, stdio: bool = False) -> None:
        self.name = check_name(name)
        self.console = console
        self.machine: Machine | None = None
        self.phase = "starting"
        self._stdio = stdio
        self._place: SocketPlace | None = None
        self._stop = trio.Event()
        self._stop_reason = ""
        self.stop_signal = 0
        """The signal that ended the process, if one did."""
        self.guest_exit_code = 0
        """What the guest said when it switched itself off."""
        self._nursery: trio.Nursery | None = None
        self._sending: trio.CancelScope | None = None
        self._migration: Json = {}
        self._moved_to = ""
        self._started_at = time.time()

    async def run(self, build: Build, ready: Callable[[Daemon], None], *, paused: bool) -> str:
        """Until the machine has ended; returns how: "shutdown", "migrated" or "stopped".

        `build` makes the machine (and may take for ever: a receive). `ready` is called when the
        socket answers and the guest runs, unless `build` did it. Raises what `build` raises,
        MachineStateError for a name that is taken, and what made the machine fail.
        """
        self._place = place = SocketPlace(self.name)
        server = ControlServer({
            "console": self._console, "pause": self._pause, "resume": self._resume,
            "send": self._send, "stat": self._stat, "status": self._status, "stop": self._stop_,
        })  # fmt: skip
        outcome = "stopped"
        try:
            async with open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(server.serve, place.listener)
                nursery.start_soon(self._watch_signals)
                if self._stdio:
                    nursery.start_soon(serve_stdio, self.console, lambda: self.stop("Ctrl-]"))
                async with self._until_stopped():
                    self.machine = machine = await build(self)
                    if self.phase == "starting":
                        # Now, and not beside the running guest when it is to be moved.
                        importlib.import_module("migrate.source")
                        settle_memory()
                        if not paused:
                            await machine.resume()
                    self.phase = ""
                    self._migration = {}
                    ready(self)
                    outcome = (await machine.ended()).value
                    self.guest_exit_code = machine.board.exit_code
                if self._sending is not None and outcome == "stopped":
                    self._sending.cancel()
                # Whoever asked is still told: the report of a migration, that it was stopped.
                with trio.move_on_after(LAST_ANSWERS_S, shield=True):
                    await server.idle()
                nursery.cancel_scope.cancel()
        finally:
            place.close()
            if self.machine is not None:
                self.machine.close()
        if self._stop_reason:
            say(f"machine {self.name!r} was stopped by {self._stop_reason}")
        elif self.machine is not None:
            self.machine.raise_failure()
        if outcome == State.MIGRATED.value:
            say(f"machine {self.name!r} runs at {self._moved_to} now")
        return outcome

    def stop(self, reason: str) -> None:
        """End the process, whatever it is doing."""
        if not self._stop.is_set():
            self._stop_reason = reason
            self._stop.set()

    def background(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task beside the machine, for `build`."""
        assert self._nursery is not None
        self._nursery.start_soon(task, *arguments)

    def rename(self, name: str) -> None:
        """Answer to `name`. Raises MachineStateError if it is taken."""
        assert self._place is not None
        self._place.rename(name)
        self.name = name

    def note(self, event: Event) -> None:
        """Keep what a migration reports for `stat`, and say what is for people."""
        match event:
            case PhaseEntered(phase=phase):
                self._migration["phase"] = phase
            case RoundProgress() | RoundDone():
                self._migration["progress"] = event.to_json()
            case Log(message=message):
                say(message)

    @contextlib.asynccontextmanager
    async def _until_stopped(self) -> AsyncIterator[None]:
        """The block is left, without an error, when somebody says stop."""

        async def watch() -> None:
            await self._stop.wait()
            nursery.cancel_scope.cancel()

        async with open_nursery() as nursery:
            nursery.start_soon(watch)
            yield
            nursery.cancel_scope.cancel()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                self.stop_signal = int(number)
                self.stop(signal.Signals(number).name)

    # -- what may be asked

    def _living(self) -> Machine:
        """The machine, once its guest is here. Raises MachineStateError."""
        if self.machine is None or self.phase:
            raise MachineStateError(f"machine {self.name!r} is still {self.phase}: no guest yet")
        return self.machine

    def _not_moving(self, verb: str) -> None:
        if self._sending is not None:
            raise MachineStateError(
                f"cannot {verb} machine {self.name!r} while it is being migrated; end the send "
                "(Ctrl-C) or wait for it"
            )

    async def _status(self, _: Connection, arguments: Json) -> Json:
        take_untrusted(arguments)
        machine = self.machine
        status: Json = {
            "name": self.name,
            "state": self.phase or (machine.state.value if machine is not None else "ended"),
            "pid": os.getpid(),
            "started-at": self._started_at,
        }
        if machine is not None:
            status["memory"] = machine.definition.memory_bytes
            status["cpus"] = machine.definition.cpus
            status["deterministic"] = machine.definition.deterministic
        if self._migration:
            status["migration"] = dict(self._migration)
        return status

    async def _stat(self, connection: Connection, arguments: Json) -> Json:
        """With "dirty", also the pages written since this connection asked last."""
        dirty = take_untrusted(arguments, dirty=(bool, False))["dirty"]
        stat = await self._status(connection, {})
        if self.machine is not None:
            stat["stats"] = self.machine.stats
            stat["definition"] = self.machine.definition.to_portable()
            if dirty and not self.phase:
                stat["dirty"] = await trio.to_thread.run_sync(
                    self._dirty_since_last, connection, self.machine
                )
        return stat

    def _dirty_since_last(self, connection: Connection, machine: Machine) -> Json:
        now = time.monotonic()
        probe = connection.state.get("dirty")
        if probe is None:
            cursors = connection.stack.enter_context(machine.reading(f"stat-{connection.number}"))
            connection.state["dirty"] = (cursors, now)
            return {"pages": None, "seconds": 0.0, "dirty-pages-rate": None}
        cursors, before = probe
        pages = sum(_harvest(cursor) for cursor in cursors)
        connection.state["dirty"] = (cursors, now)
        seconds = now - before
        return {"pages": pages, "seconds": seconds, "dirty-pages-rate": pages / max(seconds, 1e-9)}

    async def _pause(self, connection: Connection, arguments: Json) -> Json:
        take_untrusted(arguments)
        machine = self._living()
        self._not_moving("pause")
        await machine.pause()
        return await self._status(connection, {})

    async def _resume(self, connection: Connection, arguments: Json) -> Json:
        take_untrusted(arguments)
        machine = self._living()
        self._not_moving("resume")
        await machine.resume()
        return await self._status(connection, {})

    async def _stop_(self, _: Connection, arguments: Json) -> Json:
        take_untrusted(arguments)
        self.stop("migrate stop")
        return {}

    async def _console(self, connection: Connection, arguments: Json) -> Json:
        take_untrusted(arguments)

        async def serve(stream: trio.abc.Stream) -> None:
            await attach(self.console, stream)

        connection.upgrade = serve
        return {}

    async def _send(self, connection: Connection, arguments: Json) -> Json:
        uri, options = send_options_untrusted(arguments, connection.fds)
        machine = self._living()
        if self._sending is not None:
            raise MachineStateError(f"machine {self.name!r} is being migrated already")
        from migrate.source import migrate_to

        def emit(event: Event) -> None:
            self.note(event)
            connection.emit(event.to_json())

        self._migration = {"role": "source", "uri": uri}
        self._moved_to = arguments["uri"]
        with trio.CancelScope() as self._sending:
            try:
                report = await migrate_to(machine, uri, options, emit)
                return report.to_json()
            except HandoverUncertain as error:
                say(str(error))  # whoever asked may have left; the log keeps it
                raise
            finally:
                self._sending = None
                self._migration = {}
        raise MachineStateError(
            f"the migration of machine {self.name!r} was stopped; it stays here"
        )


def _harvest(cursor: Cursor) -> int:
    with cursor.harvest() as lease:
        return lease.count

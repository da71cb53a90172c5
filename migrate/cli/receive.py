"""receive: wait for a machine that is sent here, and be its process (layer 5)."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.common import DETACH_OPTION, JSON_OPTION, SIZE
from migrate.cli.process import CONSOLE_HELP, Tell, machine_process
from migrate.control import check_name, socket_path
from migrate.errors import MachineStateError, MigrateError
from migrate.units import format_size

if TYPE_CHECKING:
    from migrate.daemon import Build, Daemon
    from migrate.events import Event
    from migrate.machine import Machine
    from migrate.vm.definition import MachineDefinition

RENAME_S = 5.0
"""A source on the same host gives its name back when it ends, just after the guest came."""


@click.command("receive")
@click.option(
    "--listen",
    "uri",
    required=True,
    metavar="URI",
    help="tcp:HOST:PORT (port 0: a free one, which is printed), unix:PATH or fd:N.",
)
@click.option(
    "--name", metavar="NAME", help="How the machine is called here (default: as at the source)."
)
@click.option("--console", metavar="PLACE", help=CONSOLE_HELP + " Default stdio.")
@click.option(
    "--prealloc",
    type=SIZE,
    metavar="SIZE",
    help="Touch so much memory now, so that the stream need not (default 0).",
)
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="DIR",
    help="A source on another host may name files in DIR for disks and memory slots; one on this"
    " host may name any. Any number of times (default: none).",
)
@DETACH_OPTION
@JSON_OPTION
def receive_command(
    uri: str,
    name: str | None,
    console: str | None,
    prealloc: int | None,
    allowed: tuple[str, ...],
    detach: bool,
    as_json: bool,
) -> int:
    """Wait for a machine that is sent here, and run it.

    Whoever connects and does not speak the protocol is turned away, and the wait goes on. Once a
    migration has begun and fails, nothing is started and the command ends with an error.
    """
    # Until its guest is here it has no name of its own.
    first_name = check_name(name) if name else f"incoming-{os.getpid()}"

    def make_build(tell: Tell) -> Build:
        return _build(uri, name, prealloc or 0, allowed, tell)

    def describe(fields: dict[str, Any]) -> str:
        return f"machine {fields['name']!r} (process {fields['pid']}) listens at {fields['uri']}"

    return machine_process(
        first_name, console, make_build, describe, detach=detach, paused=False, as_json=as_json
    )


def _build(
    uri: str, name: str | None, prealloc_bytes: int, allowed: tuple[str, ...], tell: Tell
) -> Build:
    import trio

    from migrate.daemon import say
    from migrate.destination import ReceiveOptions, receive
    from migrate.machine import Machine
    from migrate.vm.reserve import MemoryReserve
    from migrate.vm.riscv64.core import native_problem

    async def build(daemon: Daemon) -> Machine:
        reserve = None
        # The engine's self-test, once a process: not while a source waits.
        await trio.to_thread.run_sync(native_problem)
        if prealloc_bytes:
            daemon.phase = "preparing"
            reserve = await trio.to_thread.run_sync(MemoryReserve, prealloc_bytes)

        def make_machine(definition: MachineDefinition) -> Machine:
            if name is not None:
                definition = dataclasses.replace(definition, name=name)
            # A peer's: it will be a file's name here, after the guest has been taken over.
            socket_path(definition.name)
            say(f"{definition.name!r} is coming, {format_size(definition.memory_bytes)} of memory")
            daemon.phase = "receiving"
            try:
                return Machine.create(definition, daemon.console, reserve=reserve)
            except BaseException:
                daemon.phase = "listening"  # for another, which can be built here
                raise

        def on_listening(address: str) -> None:
            daemon.phase = "listening"
            tell(daemon, {"uri": address})

        def emit(event: Event) -> None:
            daemon.note(event)

        try:
            options = ReceiveOptions(make_machine, allowed)
            machine = await receive(uri, options, emit, on_listening)
        finally:
            if reserve is not None:
                reserve.close()
        if name is None:
            daemon.background(take_name, daemon, machine.name)
        return machine

    return build


async def take_name(daemon: Daemon, name: str) -> None:
    """Call the machine what it was called at the source, as soon as nobody else here is."""
    import trio

    from migrate.daemon import say

    with trio.move_on_after(RENAME_S):
        while True:
            try:
                daemon.rename(name)
            except MachineStateError:
                await trio.sleep(0.05)
            except MigrateError as error:
                say(f"the machine goes on as {daemon.name!r}: {error}")
                return
            else:
                return
    say(f"the machine goes on as {daemon.name!r}: the name {name!r} is taken here")

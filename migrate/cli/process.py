"""A machine's process as a command: in the foreground or detached (layer 5)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from migrate.cli.common import print_json
from migrate.cli.detach import Ready, in_background
from migrate.errors import GuestError, UsageError

if TYPE_CHECKING:
    from migrate.daemon import Build, Daemon

CONSOLE_HELP: Final = (
    "The guest's console: stdio, none (`migrate console` shows it), file:PATH or unix:PATH."
)

MakeBuild = Callable[["Tell"], "Build"]
"""Imports what it needs and returns the coroutine function that makes the machine."""
Tell = Callable[["Daemon", dict[str, Any]], None]


def machine_process(
    name: str,
    console: str | None,
    make_build: MakeBuild,
    describe: Callable[[dict[str, Any]], str],
    *,
    detach: bool,
    paused: bool,
    as_json: bool,
) -> int:
    """Be the machine's process, or start it; the exit code.

    `describe` words what the user reads once the machine is there.
    """
    if detach and console == "stdio":
        raise UsageError("--console stdio and --detach exclude each other")
    place = console or ("none" if detach else "stdio")

    def announce(fields: dict[str, Any]) -> None:
        if as_json:
            print_json(fields)
        else:
            click.echo(describe(fields), err=place == "stdio")
        sys.stdout.flush()

    if detach:
        announce(in_background(name, lambda ready: _live(name, place, make_build, ready, paused)))
        return 0
    return _live(name, place, make_build, announce, paused)


def _live(name: str, place: str, make_build: MakeBuild, ready: Ready, paused: bool) -> int:
    import trio

    from migrate.daemon import Daemon, say
    from migrate.vm.console import open_console

    stdio = place == "stdio"
    console = open_console("none" if stdio else place)
    told = False

    def tell(daemon: Daemon, fields: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            ready({"name": daemon.name, "pid": _pid(), "console": place, **fields})

    try:
        daemon = Daemon(name, console, stdio=stdio)
        build = make_build(tell)
        outcome = trio.run(lambda: daemon.run(build, lambda d: tell(d, {}), paused=paused))
    finally:
        console.close()
    if outcome == "shutdown" and daemon.guest_exit_code:
        say(f"the guest of {daemon.name!r} ended with status {daemon.guest_exit_code}")
        return GuestError.exit_code
    if outcome == "stopped" and daemon.stop_signal:
        return 128 + daemon.stop_signal
    return 0


def _pid() -> int:
    import os

    return os.getpid()

"""console: a running machine's console at this terminal (layer 5)."""

from __future__ import annotations

import os
import select
import sys

import click

from migrate.cli.common import NAME_ARGUMENT
from migrate.control import Client

ESCAPE = b"\x1d"


@click.command("console")
@NAME_ARGUMENT
def console_command(name: str) -> None:
    """Attach to a machine's console.

    Ctrl-] leaves it, the machine runs on. What it printed last is shown first. With input from
    a pipe (`echo v | migrate console a`) the console stays attached until the machine ends or
    Ctrl-C.
    """
    from migrate.terminal import raw_terminal

    with Client(name) as client:
        connection, past = client.console()
        if os.isatty(0):
            print(f"migrate: console of {name!r}; Ctrl-] leaves it", file=sys.stderr)
        with raw_terminal(0) as raw:
            _write(past)
            ended = _converse(connection.fileno(), raw)
    if os.isatty(0):
        print(f"\nmigrate: {'machine ' + repr(name) + ' has ended' if ended else 'left'}",
              file=sys.stderr)  # fmt: skip


def _converse(connection: int, raw: bool) -> bool:
    """Until the machine ends (True) or Ctrl-] is typed (False)."""
    reading = [0, connection]
    while True:
        ready, _, _ = select.select(reading, [], [])
        if connection in ready:
            try:
                data = os.read(connection, 65536)
            except ConnectionError:
                data = b""
            if not data:
                return True
            _write(data)
        if 0 in ready:
            data = os.read(0, 4096)
            if not data:
                reading.remove(0)
                continue
            if raw and ESCAPE in data:
                _send(connection, data.partition(ESCAPE)[0])
                return False
            _send(connection, data)


def _send(connection: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(connection, view) :]
        except ConnectionError:
            return  # the next read finds the end


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]

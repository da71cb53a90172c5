"""send: move a running machine to where one receives (layer 5)."""

from __future__ import annotations

import re
from typing import Any

import click

from migrate.cli.common import BANDWIDTH, DURATION, JSON_OPTION, NAME_ARGUMENT, print_json
from migrate.cli.render import Progress, print_report
from migrate.control import Client, error_to_json
from migrate.errors import MigrateError


@click.command("send")
@NAME_ARGUMENT
@click.argument("uri", metavar="URI")
@click.option(
    "--downtime-limit",
    type=DURATION,
    default="300ms",
    show_default=True,
    metavar="TIME",
    help="The guest may stand still for so long. A bound, not a budget to spend.",
)
@click.option(
    "--bandwidth",
    type=BANDWIDTH,
    metavar="RATE",
    help="Send no more than this a second: 1Gbit, 100MiB (default: no limit).",
)
@click.option(
    "--compression",
    default="auto",
    show_default=True,
    metavar="HOW",
    help="auto (whatever is quicker on this link), none, zstd or zstd:LEVEL, -7 to 19.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Threads that compress (default: processors less one).",
)
@click.option(
    "--max-rounds",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    metavar="N",
    help="Give up when so many passes have not got the guest under the limit.",
)
@click.option(
    "--timeout", type=DURATION, metavar="TIME", help="Give up after so long (default: never)."
)
@click.option(
    "--verify",
    is_flag=True,
    help="Both sides hash all memory at the switch; let go only if they agree.",
)
@JSON_OPTION
def send_command(
    name: str,
    uri: str,
    downtime_limit: int,
    bandwidth: int | None,
    compression: str,
    threads: int | None,
    max_rounds: int,
    timeout: int | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Move a running machine to where one receives.

    URI is what `migrate receive` listens at: tcp:HOST:PORT, unix:PATH or fd:N. When this returns
    without an error the guest runs there and the machine here has ended; after an error it runs
    on here (but see exit code 8). Ctrl-C calls the migration off. --json prints one object, with
    the field names of QEMU's query-migrate.
    """
    arguments: dict[str, Any] = {
        "uri": uri,
        "downtime-limit-ns": downtime_limit,
        "bandwidth": bandwidth,
        "compression": compression,
        "threads": threads,
        "max-rounds": max_rounds,
        "timeout-ns": timeout,
        "verify": verify,
    }
    try:
        report = send(name, arguments, quiet=as_json)
    except MigrateError as error:
        if as_json:
            print_json({"status": "failed", "error-desc": str(error), **_error_fields(error)})
        raise
    if as_json:
        print_json(report)
    else:
        print_report(report, uri)


def send(name: str, arguments: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Ask the machine to move, showing progress unless `quiet`; its report."""
    fds = [int(match[1])] if (match := re.fullmatch(r"fd:(\d+)", arguments["uri"])) else []
    with Client(name) as client, Progress(quiet=quiet) as progress:
        report = client.call("send", arguments, on_event=progress.event, timeout_s=None, fds=fds)
    assert isinstance(report, dict)
    return report


def _error_fields(error: MigrateError) -> dict[str, Any]:
    fields = error_to_json(error)
    return {"error-class": fields["class"], "exit-code": fields["exit-code"]}

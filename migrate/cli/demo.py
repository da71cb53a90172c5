"""demo: a working guest moves between two processes, and is checked (layer 5)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.common import SIZE
from migrate.cli.demo_stage import ConsoleReader, Stage, open_stage, say, show
from migrate.errors import MigrationFailed
from migrate.units import MIB, format_size

if TYPE_CHECKING:
    from migrate.vm.guest import Heartbeat

VERIFY_TIMEOUT_S = 120.0


@click.command("demo")
@click.option(
    "--linux",
    is_flag=True,
    help="Debian's kernel and a shell at work instead of the project's own guest; fetched once.",
)
@click.option(
    "--memory",
    type=SIZE,
    default="256MiB",
    show_default=True,
    metavar="SIZE",
    help="RAM of the guest.",
)
@click.option(
    "--working-set",
    type=SIZE,
    default="32MiB",
    show_default=True,
    metavar="SIZE",
    help="How much of it the own guest keeps writing.",
)
@click.option(
    "--rate",
    type=click.IntRange(0),
    default=5000,
    show_default=True,
    metavar="PAGES/S",
    help="How fast it writes; 0: flat out.",
)
@click.option(
    "--downtime-limit",
    default="300ms",
    show_default=True,
    metavar="TIME",
    help="As of `migrate send`.",
)
def demo_command(
    linux: bool, memory: int, working_set: int, rate: int, downtime_limit: str
) -> None:
    """Move a working guest between two processes, and check it.

    Starts a guest, a receiver beside it, sends the guest over while it works, watches its console
    carry on there, and has the guest verify all of its memory. Ends with an error if anything at
    all was wrong.
    """
    with open_stage() as stage:
        if linux:
            from migrate.cli.demo_linux import demo_linux

            demo_linux(stage, memory, downtime_limit)
        else:
            _demo_own(stage, memory, working_set, rate, downtime_limit)
    click.secho("── all is well", bold=True, fg="green")


def move(
    stage: Stage, memory_bytes: int, downtime_limit: str
) -> tuple[dict[str, Any], ConsoleReader]:
    """Receive as machine "there" and send "here" to it; the report (printed), and the console."""
    from migrate.cli.render import print_report
    from migrate.cli.send import send
    from migrate.units import parse_duration_ns

    uri = f"unix:{stage.directory}/migration"
    stage.start("receive", "--listen", uri, "--prealloc", str(memory_bytes), name="there")
    there = ConsoleReader("there")
    say("a second process is ready to receive; sending the guest there while it works")
    report = send(
        "here",
        {"uri": uri, "downtime-limit-ns": parse_duration_ns(downtime_limit)},
        quiet=False,
    )
    print_report(report, uri)
    return report, there


def _demo_own(stage: Stage, memory: int, working_set: int, rate: int, downtime_limit: str) -> None:
    from migrate.vm.guest import Verdict, parse_line

    pace = f"{rate:,} pages/s" if rate else "as fast as it can"
    say(
        f"starting a guest: {format_size(memory)} of random RAM, of which it keeps writing "
        f"{format_size(working_set)} at {pace}"
    )
    stage.start(
        "run",
        "--memory",
        str(memory),
        "--fill",
        "random",
        "--working-set",
        str(working_set),
        "--rate",
        str(rate),
        name="here",
    )
    here = ConsoleReader("here")
    filled = here.wait_for(r"^FILLED.*$", 120 + memory / (4 * MIB))
    show(filled[0].strip())
    show(here.wait_for(r"^HB .*$", 10, after=filled.end())[0].strip())
    time.sleep(1.0)

    report, there = move(stage, memory, downtime_limit)
    here.wait_end(15)
    here.close()

    say("the console carries on at the destination")
    there.wait_for(r"^HB .*\n(?:.*\n)*?HB .*\n(?:.*\n)*?HB .*$", 30)
    # The line that the switch cut in two begins here and ends there.
    last_end = here.text.rindex("\n")
    cut = here.text[last_end + 1 :]
    first_end = there.text.index("\n")
    last = _last_beat(here.text[:last_end])
    first = _last_beat(cut + there.text[:first_end])
    show(f"last heartbeat here:   n={last.number}, {last.visits:,} visits")
    show(f"first heartbeat there: n={first.number}, {first.visits:,} visits")
    silent_ms = (there.arrived(first_end) - here.arrived(last_end)) * 1e3
    show(
        f"{silent_ms:.1f} ms between the two, seen from outside (they come every 10 ms); "
        f"reported downtime {report['downtime']:.1f} ms"
    )
    if not last.number < first.number <= last.number + 100 or first.visits < last.visits:
        raise MigrationFailed("the guest did not carry on where it was")

    say("asking the guest to verify all of its memory")
    position = len(there.text)
    there.type("v")
    line = there.wait_for(r"^VERIFY .*$", VERIFY_TIMEOUT_S, after=position)[0].strip()
    show(line)
    verdict = parse_line(line)
    if not isinstance(verdict, Verdict) or not verdict.clean:
        raise MigrationFailed(f"the guest found wrong pages after the migration: {line}")
    show(f"{verdict.pages:,} pages, none wrong; {verdict.visits:,} visits, none wrong")
    there.close()


def _last_beat(text: str) -> Heartbeat:
    from migrate.vm.guest import Heartbeat, parse_line

    for line in reversed(text.replace("\r", "").split("\n")):
        if isinstance(beat := parse_line(line), Heartbeat):
            return beat
    raise MigrationFailed(f"no heartbeat in the guest's output: …{text[-200:]}")

"""The command line (layer 5): thin commands over control socket and daemon.

Commands live one module a group and are imported when they are called: `migrate --help` and the
commands that only ask a running machine load neither numpy nor the engine.
"""

from __future__ import annotations

import importlib
from typing import Final

import click

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "run": ("migrate.cli.run", "Start a machine."),
    "ps": ("migrate.cli.machines", "List the machines that run here."),
    "stat": ("migrate.cli.machines", "Show a machine's counters."),
    "console": ("migrate.cli.console", "Attach to a machine's console."),
    "pause": ("migrate.cli.machines", "Stop a machine's vcpus."),
    "resume": ("migrate.cli.machines", "Let a machine's vcpus run again."),
    "stop": ("migrate.cli.machines", "End a machine."),
    "receive": ("migrate.cli.receive", "Wait for a machine that is sent here, and run it."),
    "send": ("migrate.cli.send", "Move a running machine to where one receives."),
    "demo": ("migrate.cli.demo", "Move a working guest between two processes, and check it."),
}
"""Name → (module that defines it, one line for the list)."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="migrate", message="%(prog)s %(version)s")
def cli() -> None:
    """Virtual machines that move while they run.

    Sizes are written 4096, 64KiB, 256MiB, 1GiB; times 20ms, 1.5s; bandwidths 1Gbit, 100MiB (a
    second). Exit codes: 0 done, 2 wrong usage, 3 no such machine or not in this state, 4 the peer
    broke the protocol, 5 the system failed, 6 not migrated, 7 not converging, 8 handover
    uncertain, 9 the guest failed, 130 Ctrl-C.
    """

"""run: start a machine (layer 5)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.common import DETACH_OPTION, JSON_OPTION, SIZE
from migrate.cli.process import CONSOLE_HELP, Tell, machine_process
from migrate.control import check_name

if TYPE_CHECKING:
    from migrate.daemon import Build, Daemon
    from migrate.machine import Machine

DEFAULT_NAME = "guest"

GUEST_OPTIONS = [
    click.option(
        "--fill",
        type=click.Choice(["zero", "random", "compressible"]),
        help="Own guest: what RAM holds at first (default random).",
    ),
    click.option(
        "--working-set",
        type=SIZE,
        metavar="SIZE",
        help="Own guest: how much it keeps writing (default 0: idle).",
    ),
    click.option(
        "--rate", metavar="PAGES/S", help="Own guest: pages written a second (default 0: flat out)."
    ),
    click.option(
        "--pattern",
        type=click.Choice(["sequential", "random"]),
        help="Own guest: order of the visits (default sequential).",
    ),
    click.option(
        "--write",
        type=click.Choice(["word", "page"]),
        help="Own guest: what a visit checks and writes (default word).",
    ),
    click.option(
        "--heartbeat", metavar="TIME", help="Own guest: how often it reports (default 10ms)."
    ),
    click.option(
        "--pacing",
        type=click.Choice(["spin", "wfi"]),
        help="Own guest: how it waits (default spin: it takes a core).",
    ),
    click.option(
        "--privilege",
        type=click.Choice(["supervisor", "machine"]),
        help="Own guest: the mode it works in (default supervisor).",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, (1 << 64) - 1),
        help="Own guest: of its contents and its random order (default 1).",
    ),
    click.option(
        "--stop-after-heartbeats",
        type=click.IntRange(0),
        metavar="N",
        help="Own guest: verify all RAM and switch off after N (default 0: never).",
    ),
]


def guest_options(command: Any) -> Any:
    """The options of our own guest."""
    for option in reversed(GUEST_OPTIONS):
        command = option(command)
    return command


@click.command("run")
@click.argument(
    "definition",
    required=False,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="[GUEST.toml]",
)
@click.option("--name", metavar="NAME", help=f"How it is called (default {DEFAULT_NAME}).")
@click.option("--memory", type=SIZE, metavar="SIZE", help="RAM (default 256MiB).")
@click.option("--cpus", type=int, metavar="N", help="vcpus, 1 to 8 (default 1).")
@click.option("--firmware", metavar="FILE", help="Flat binary or ELF, entered in machine mode.")
@click.option("--kernel", metavar="FILE", help="Linux Image or ELF; alone, with the board's SBI.")
@click.option("--initrd", metavar="FILE", help="Initial RAM disk for the kernel.")
@click.option("--append", metavar="STR", help="The kernel's command line.")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="FILE[,ro]",
    help="Raw image behind a virtio-blk device; any number of times.",
)
@click.option("--console", metavar="PLACE", help=CONSOLE_HELP + " Default stdio.")
@click.option(
    "--deterministic", is_flag=True, help="Virtual time is executed code: runs repeat bit by bit."
)
@click.option("--prealloc", is_flag=True, help="Touch all RAM before the start.")
@DETACH_OPTION
@click.option("--paused", is_flag=True, help="Do not run yet; `migrate resume` does.")
@guest_options
@JSON_OPTION
def run_command(
    definition: Path | None,
    name: str | None,
    disks: tuple[str, ...],
    console: str | None,
    detach: bool,
    paused: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Start a machine.

    GUEST.toml gives the same things by the same names (memory, cpus, firmware, kernel, initrd,
    append, deterministic, prealloc, disks, and [[slots]] with name, gpa, size, backing
    anonymous|file|private-file, path, readonly); options go before it. Without firmware and
    kernel the project's own guest runs, whose parameters are in [guest]. Ctrl-] at the console
    ends the machine.
    """
    chosen = check_name(name or _name_in(definition) or DEFAULT_NAME)

    def make_build(_: Tell) -> Build:
        import trio

        from migrate.launch import launch_of, parse_disk, read_definition_file

        given = read_definition_file(definition) if definition is not None else {}
        images = ("memory", "cpus", "firmware", "kernel", "initrd", "append")
        for key in images:
            if options[key] is not None:
                given[key] = options[key]
        for key in ("deterministic", "prealloc"):
            given[key] = given.get(key, False) or options[key]
        given["disks"] = (*given.get("disks", ()), *map(parse_disk, disks))
        guest = {
            key.replace("_", "-"): value
            for key, value in options.items()
            if value is not None and key not in (*images, "deterministic", "prealloc")
        }
        given["guest"] = {**given.get("guest", {}), **guest}
        launch = launch_of(**{**given, "name": chosen})

        async def build(daemon: Daemon) -> Machine:
            return await trio.to_thread.run_sync(launch.make, daemon.console)

        return build

    def describe(fields: dict[str, Any]) -> str:
        state = "stands paused" if paused else "runs"
        leave = "; Ctrl-] ends it" if fields["console"] == "stdio" else ""
        return f"machine {fields['name']!r} {state} (process {fields['pid']}){leave}"

    return machine_process(
        chosen, console, make_build, describe, detach=detach, paused=paused, as_json=as_json
    )


def _name_in(definition: Path | None) -> str | None:
    """The name in a definition file; whatever is wrong with the file is said where it is read."""
    if definition is None:
        return None
    try:
        name = tomllib.loads(definition.read_text("utf-8")).get("name")
    except (OSError, ValueError):
        return None
    return name if isinstance(name, str) else None

"""The command line says what it takes, quickly, and refuses what it does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from migrate.cli import COMMANDS, cli
from tests.cli.cli_process import Cli

README = Path(__file__).parent.parent.parent / "README.md"


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", result.output, re.M), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_every_option(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
    assert command.help
    assert command.help.startswith(COMMANDS[name][1]), "the list and the command agree"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("run", "--name --memory --cpus --firmware --kernel --initrd --append --disk --console "
                "--deterministic --prealloc --detach --paused --json"),
        ("receive", "--listen --name --console --prealloc --detach"),
        ("send", "--downtime-limit --bandwidth --compression --max-rounds --timeout --verify "
                 "--json"),
        ("stat", "--watch --json"),
        ("ps", "--json"),
        ("demo", "--linux"),
    ],
)  # fmt: skip
def test_options(name: str, options: str) -> None:
    output = CliRunner().invoke(cli, [name, "--help"]).output
    for option in options.split():
        assert re.search(rf"{option}\b", output), option


def test_help_loads_nothing_heavy() -> None:
    """So that it is there at once."""
    program = (
        "import sys\n"
        "sys.argv = ['migrate', 'ps', '--help']\n"
        "from migrate.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'unicorn', 'trio', 'rich', 'zstandard'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n"), done.stdout


def test_the_readmes_commands_are_understood() -> None:
    lines = re.findall(r"^ {4}(?:\$ )?(?:\.venv/bin/)?migrate ([^\n#]*)", README.read_text(), re.M)
    assert lines
    for line in lines:
        name, *arguments = line.split()
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, line
        command.make_context(name, arguments)  # raises if it would be refused


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense"], 2, "No such command"),
        (["run", "--nonsense"], 2, "No such option"),
        (["run", "--memory", "lots"], 2, "not a size"),
        (["run", "--name", "a/b"], 2, "cannot be a machine's name"),
        (["run", "--memory", "16MiB", "--working-set", "32MiB"], 2, "does not fit"),
        (["run", "--initrd", "x"], 2, "go with --kernel"),
        (["run", "--kernel", "/nonexistent/Image"], 5, "No such file"),
        (["run", "/nonexistent/guest.toml"], 5, "No such file"),
        (["run", "--console", "tape"], 2, "tape"),
        (["run", "--console", "stdio", "--detach"], 2, "exclude each other"),
        (["run", "--cpus", "99"], 2, "1 to 8"),
        (["pause", "nobody"], 3, "no machine 'nobody'"),
        (["send", "nobody", "tcp:localhost:1"], 3, "no machine 'nobody'"),
        (["console", "nobody"], 3, "no machine 'nobody'"),
        (["receive", "--listen", "carrier:pigeon"], 2, "unknown address"),
        (["receive", "--listen", "tcp:192.0.2.1:1"], 5, "cannot listen"),
        (["receive", "--listen", "fd:77"], 2, "fd:77"),
        (["send", "a", "tcp:b:1", "--downtime-limit", "1 day"], 2, "unknown unit"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_a_code(
    cli: Cli, arguments: list[str], code: int, message: str
) -> None:
    done = cli.run(*arguments, code=code)
    assert message in done.stderr
    assert cli.machines() == {}
    if code != 2:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("detach", [True, False])
def test_a_child_that_fails_tells_its_parent(cli: Cli, detach: bool) -> None:
    arguments = ["run", "--name", "a", "--firmware", "/nonexistent/fw"]
    done = cli.run(*arguments, *(["--detach"] if detach else []), code=5)
    assert "/nonexistent/fw" in done.stderr
    assert done.stdout == ""

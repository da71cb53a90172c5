"""What commands share: parameter types, output for scripts, errors (layer 5)."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from migrate.control import error_to_json, exit_code_of, machine_names
from migrate.errors import HostError, MigrateError, UsageError
from migrate.units import parse_bandwidth, parse_duration_ns, parse_size

F = TypeVar("F", bound=Callable[..., Any])

JSON_OPTION: Final = click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
DETACH_OPTION: Final = click.option(
    "--detach",
    is_flag=True,
    help="Return once the machine's socket answers; the machine goes on by itself.",
)


class _Quantity(click.ParamType[int]):
    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            number = self._parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return number


SIZE: Final = _Quantity("size", parse_size)
BANDWIDTH: Final = _Quantity("bandwidth", parse_bandwidth)
DURATION: Final = _Quantity("time", parse_duration_ns)


class MachineName(click.ParamType[str]):
    """A name; the shell completes those that run."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[Any]:
        from click.shell_completion import CompletionItem

        try:
            names = machine_names()
        except MigrateError:
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


NAME_ARGUMENT: Final = click.argument("name", type=MachineName(), metavar="NAME")


def print_json(value: Any) -> None:
    """One line."""
    click.echo(json.dumps(value, allow_nan=False))


def fail_with(error: BaseException) -> int:
    """Say what went wrong, in one line; the exit code for it."""
    error = _single(error)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, MigrateError):
        print(f"migrate: {error}", file=sys.stderr)
        if os.environ.get("MIGRATE_DEBUG") == "1":
            traceback.print_exception(error, file=sys.stderr)
        return exit_code_of(error)
    if os.environ.get("MIGRATE_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"migrate: {what}", file=sys.stderr)
        return HostError.exit_code
    print(
        f"migrate: unexpected {type(error).__name__}: {error} "
        "(a defect of this program; MIGRATE_DEBUG=1 shows its trace)",
        file=sys.stderr,
    )
    return 1


def _single(error: BaseException) -> BaseException:
    """The error inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def error_line(error: BaseException) -> dict[str, Any]:
    """For a parent process: what `fail_with` would say."""
    error = _single(error)
    if isinstance(error, MigrateError):
        return error_to_json(error)
    if isinstance(error, OSError):
        return {"class": "HostError", "message": str(error), "exit-code": HostError.exit_code}
    return {"class": "InternalError", "message": repr(error), "exit-code": 1}

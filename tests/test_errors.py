"""The documented exit codes are those of the error classes, and of what commands end with."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import migrate
from migrate.errors import MigrateError

CLI_PAGE = Path(__file__).parent.parent / "docs" / "cli.md"


def documented() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", CLI_PAGE.read_text("utf-8"), re.M)
    return {name: int(code) for code, name in rows}


def all_errors() -> set[type[MigrateError]]:
    for module in pkgutil.walk_packages(migrate.__path__, "migrate."):
        if not module.name.endswith("__main__") and "._" not in module.name:
            importlib.import_module(module.name)
    found: set[type[MigrateError]] = {MigrateError}
    todo = [MigrateError]
    while todo:
        for sub in todo.pop().__subclasses__():
            if sub.__module__.startswith("migrate.") and sub not in found:
                found.add(sub)
                todo.append(sub)
    return found


def test_the_table_says_what_the_classes_say() -> None:
    table = documented()
    classes = {cls.__name__: cls for cls in all_errors()}
    assert set(table) <= set(classes)
    for name, code in table.items():
        assert classes[name].exit_code == code, name


def test_every_class_of_the_errors_module_is_documented() -> None:
    table = documented()
    own = {cls.__name__ for cls in all_errors() if cls.__module__ == "migrate.errors"}
    assert own == set(table)


def test_other_classes_use_documented_codes() -> None:
    codes = set(documented().values())
    assert {cls.exit_code for cls in all_errors()} <= codes


def test_wire_codes_tell_the_kinds_apart() -> None:
    own = [cls for cls in all_errors() if cls.__module__ == "migrate.errors"]
    assert len({cls.wire_code for cls in own}) == len(own)

"""A layer imports only lower layers, or its own: docs/design.md's table against the imports.

The table is the first indented block under the heading "Layers" of docs/design.md; a module that
stands in no row fails as well, so that nobody adds one without deciding where it belongs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "migrate"
PURE = ("codec", "wire", "session", "policy")
IMPURE_IMPORTS = {
    "asyncio", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "select", "selectors",
    "signal", "socket", "subprocess", "tempfile", "threading", "time", "trio",
}  # fmt: skip


def layers_of(design: str) -> dict[str, int]:
    """Module or package name → layer, from the table in the text of docs/design.md."""
    section = design.partition("\n## Layers")[2].partition("\n## ")[0]
    layer = -1
    found: dict[str, int] = {}
    for line in section.splitlines():
        if not line.startswith("    "):
            continue
        words = re.split(r"\s{2,}", line.strip())
        numbered = re.fullmatch(r"L(\d)", words[0])
        if numbered:
            layer = int(numbered[1])
            words = words[1:]
        for word in words:
            if not re.fullmatch(r"[a-z_][a-z0-9_]*/?", word):
                break  # the description begins
            found[word.rstrip("/")] = layer
    return found


LAYERS = layers_of((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    """The name that the table knows a file by: the first part below the package."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, also those inside functions."""
    package = ("migrate", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join((*above, base)) if base else ".".join(above)
            if base == "migrate":  # from migrate import pages
                for alias in node.names:
                    yield node.lineno, f"migrate.{alias.name}"
            else:
                yield node.lineno, base


def upward_imports(source: str, path: Path, layers: dict[str, int]) -> list[str]:
    """What is wrong with the imports of one file, a line each."""
    own = layers[part_of(path)]
    wrong = []
    for line, name in imports_of(source, path):
        top, _, rest = name.partition(".")
        if top != "migrate" or not rest:
            continue
        part = rest.split(".")[0]
        if part not in layers:
            wrong.append(f"{path.name}:{line}: {name} is in no layer of docs/design.md")
        elif layers[part] > own:
            wrong.append(f"{path.name}:{line}: layer {own} imports {name} of layer {layers[part]}")
    return wrong


def sources() -> list[Path]:
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts != ("__init__.py",)
    )


def test_the_table_is_read() -> None:
    assert LAYERS["errors"] == 0
    assert LAYERS["linux"] == 1
    assert LAYERS["vm"] == LAYERS["wire"] == 2
    assert LAYERS["dirtylog"] == 3
    assert LAYERS["machine"] == 4
    assert LAYERS["cli"] == LAYERS["__main__"] == 5


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    assert part_of(path) in LAYERS, f"{path.name} stands in no layer of docs/design.md"
    assert upward_imports(path.read_text(encoding="utf-8"), path, LAYERS) == []


@pytest.mark.parametrize("name", [*PURE, "pages", "units", "errors", "events"])
def test_pure_modules_know_no_socket_no_clock_no_thread(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    found = {top.split(".")[0] for _, top in imports_of(path.read_text("utf-8"), path)}
    assert not found & IMPURE_IMPORTS


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from migrate.dirtylog import open_log", 1),
        ("import migrate.dirtylog", 1),
        ("from migrate import dirtylog, errors", 1),
        ("def f():\n    from ..source import migrate_to", 1),
        ("from .nowhere import x", 0),  # migrate.vm.nowhere: its own package
        ("from .. import nowhere", 1),
        ("from migrate.errors import UsageError\nimport numpy\nfrom . import state", 0),
    ],
)
def test_upward_imports_are_found(source: str, wrong: int) -> None:
    assert len(upward_imports(source, PACKAGE / "vm" / "board.py", LAYERS)) == wrong


def test_the_table_names_only_what_there_is() -> None:
    parts = {part_of(path) for path in sources()}
    assert set(LAYERS) <= parts

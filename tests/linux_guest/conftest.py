"""The Debian guest for these tests; skipped with the reason where it cannot be had."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.linux_guest.linux import OPENSBI

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FORCED = os.environ.get("MIGRATE_TEST_LINUX") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.linux_guest)


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def linux() -> Any:
    """Kernel, initrd and the maker of other initrds (tools/fetch_linux.py: LinuxGuest)."""
    fetch = _tool("fetch_linux")
    try:
        return fetch.ensure()
    except fetch.FetchError as error:
        if FORCED:
            raise
        pytest.skip(f"no Linux guest: {error}")


@pytest.fixture(scope="session")
def opensbi() -> Path:
    """Debian's OpenSBI. It is not fetched: where it is not installed there is nothing to prove."""
    if not OPENSBI.exists():
        pytest.skip(f"{OPENSBI} is not here: install Debian's package opensbi")
    return OPENSBI

"""Fixtures for tests of the command line."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.cli_process import Cli


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """A place for machines; what a test leaves running is ended."""
    runtime = Path(tempfile.mkdtemp(prefix="migrate-"))
    monkeypatch.setenv("MIGRATE_RUNTIME_DIR", str(runtime))
    cli = Cli(runtime)
    yield cli
    cli.close()
    shutil.rmtree(runtime)

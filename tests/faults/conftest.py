"""Fixtures for tests with failing processes and links."""

from __future__ import annotations

from tests.cli.conftest import cli

__all__ = ["cli"]

"""Fixtures for all tests: what of the host a test needs, skipped with the reason or forced."""

from __future__ import annotations

import functools
import os

import pytest
from hypothesis import HealthCheck, settings

from migrate.errors import HostError
from migrate.linux import pagemap, uffd

# No test fails because the machine is busy: what bounds their time is pytest's timeout.
settings.register_profile(
    "migrate", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("migrate")


@functools.cache
def _kernel_lacks() -> str | None:
    try:
        pagemap.Pagemap().close()
        uffd.Userfaultfd(
            uffd.UFFD_FEATURE_WP_ASYNC
            | uffd.UFFD_FEATURE_WP_UNPOPULATED
            | uffd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        ).close()
    except HostError as error:
        return str(error)
    return None


@pytest.fixture
def kernel_tracking() -> None:
    """The kernel's dirty tracking; MIGRATE_TEST_KERNEL=1 forbids skipping."""
    reason = _kernel_lacks()
    if reason is not None and os.environ.get("MIGRATE_TEST_KERNEL") != "1":
        pytest.skip(reason)

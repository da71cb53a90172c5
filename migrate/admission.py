"""What a machine from elsewhere may demand of this host (layer 4).

The definition that a source sends names memory sizes, and files behind disks and memory slots.
The files are opened with the rights of whoever runs `receive`, so a stranger must not choose them:
a source on this host may name any, one from elsewhere only what lies in directories that were
allowed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from migrate.errors import HostError, UsageError
from migrate.units import format_size
from migrate.vm.definition import MachineDefinition


def check_admission(
    definition: MachineDefinition, *, local_source: bool, allowed: Iterable[str]
) -> None:
    """Raises UsageError for a file that may not be opened, HostError for more than the host has."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if definition.memory_bytes > physical:
        raise HostError(
            f"machine {definition.name!r} has {format_size(definition.memory_bytes)} of memory,"
            f" this host {format_size(physical)}"
        )
    if local_source:
        return
    directories = [Path(directory).resolve() for directory in allowed]
    named = [slot.path for slot in definition.slots if slot.path is not None]
    for path in named + [disk.path for disk in definition.disks]:
        resolved = Path(path).resolve()
        if not any(resolved.is_relative_to(directory) for directory in directories):
            raise UsageError(
                f"machine {definition.name!r} uses the file {path[:200]}, which a source on another"
                " host may not have opened here; allow its directory with `receive --allow DIR`"
            )

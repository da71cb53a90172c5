"""What a machine from elsewhere may demand of this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrate.admission import check_admission
from migrate.errors import HostError, UsageError
from migrate.units import GIB, MIB
from migrate.vm.definition import BackingKind, DiskSpec, MachineDefinition, SlotSpec

RAM = SlotSpec("ram", 0x8000_0000, 16 * MIB)


def with_disk(path: str) -> MachineDefinition:
    return MachineDefinition("guest", (RAM,), disks=(DiskSpec(path),))


def test_no_files_is_fine_from_anywhere() -> None:
    check_admission(MachineDefinition("guest", (RAM,)), local_source=False, allowed=())


def test_a_source_on_this_host_may_name_files(tmp_path: Path) -> None:
    check_admission(with_disk(f"{tmp_path}/disk"), local_source=True, allowed=())


def test_a_stranger_may_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--allow"):
        check_admission(with_disk(f"{tmp_path}/disk"), local_source=False, allowed=())
    slot = SlotSpec("image", 0x1_0000_0000, MIB, BackingKind.FILE, f"{tmp_path}/image")
    with pytest.raises(UsageError, match="image"):
        check_admission(
            MachineDefinition("guest", (RAM, slot)), local_source=False, allowed=("/nowhere",)
        )


def test_an_allowed_directory_and_ways_out_of_it(tmp_path: Path) -> None:
    inside = tmp_path / "images"
    inside.mkdir()
    (inside / "link").symlink_to("/etc/passwd")
    allowed = (str(inside),)
    check_admission(with_disk(f"{inside}/disk"), local_source=False, allowed=allowed)
    for way_out in ("../disk", "link", "a/../../disk"):
        with pytest.raises(UsageError):
            check_admission(with_disk(f"{inside}/{way_out}"), local_source=False, allowed=allowed)


def test_more_memory_than_the_host_has() -> None:
    huge = SlotSpec("ram", 0x8000_0000, 512 * GIB)
    with pytest.raises(HostError, match="512 GiB"):
        check_admission(MachineDefinition("guest", (huge,)), local_source=True, allowed=())

"""GUEST.toml and the options of `run` become machines, or a clear error."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import HostError, UsageError
from migrate.launch import Launch, guest_parameters, launch_of, parse_disk, read_definition_file
from migrate.units import MIB
from migrate.vm.console import Console
from migrate.vm.definition import BackingKind, DiskSpec
from migrate.vm.guest import RAM_BASE, Fill, Order, Pacing, Visit


def read(tmp_path: Path, text: str) -> Launch:
    file = tmp_path / "guest.toml"
    file.write_text(text)
    return launch_of(**read_definition_file(file))


def test_nothing_said() -> None:
    definition = launch_of().definition()
    assert definition.memory_bytes == 256 * MIB
    assert [slot.gpa for slot in definition.slots] == [RAM_BASE]
    assert (definition.cpus, definition.sbi, definition.deterministic) == (1, False, False)


def test_a_whole_file(tmp_path: Path) -> None:
    launch = read(
        tmp_path,
        """
        name = "vm"
        memory = "64MiB"
        cpus = 2
        kernel = "Image"
        initrd = "initrd.cpio"
        append = "console=ttyS0"
        deterministic = true
        disks = ["a.img", "b.img,ro", { path = "/c.img", readonly = true }]

        [[slots]]
        name = "rom"
        gpa = "0x100000000"
        size = "64KiB"
        path = "rom.bin"
        readonly = true
        """,
    )
    definition = launch.definition()
    assert definition.name == "vm"
    assert definition.sbi  # a kernel without firmware
    assert definition.deterministic
    assert definition.disks == (
        DiskSpec(str(tmp_path / "a.img")),
        DiskSpec(str(tmp_path / "b.img"), readonly=True),
        DiskSpec("/c.img", readonly=True),
    )
    ram, rom = definition.slots
    assert (ram.gpa, ram.size_bytes) == (RAM_BASE, 64 * MIB)
    assert (rom.gpa, rom.size_bytes, rom.readonly) == (1 << 32, 65536, True)
    assert (rom.backing, rom.path) == (BackingKind.FILE, str(tmp_path / "rom.bin"))
    assert launch.images is not None
    assert launch.images.kernel == str(tmp_path / "Image")
    assert launch.images.append == "console=ttyS0"


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text("utf-8")
    section = page.partition("\n## GUEST.toml")[2].partition("\n## ")[0]
    example = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    launch = read(tmp_path, example)
    assert len(launch.definition().slots) == 2
    assert len(launch.disks) == 2
    assert guest_parameters(launch.guest, launch.memory_bytes).rate_pages_per_s == 5000


def test_the_ram_may_be_a_slot_of_its_own(tmp_path: Path) -> None:
    launch = read(
        tmp_path,
        f"""
        [[slots]]
        name = "persistent"
        gpa = {RAM_BASE}
        size = "16MiB"
        backing = "file"
        path = "ram.bin"
        """,
    )
    (slot,) = launch.definition().slots
    assert slot.name == "persistent"
    assert slot.size_bytes == 16 * MIB


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name = ", "not TOML"),
        ("nmae = 'x'", "unknown key 'nmae'"),
        ("cpus = '2'", "'cpus' is a str"),
        ("cpus = true", "'cpus' is a bool"),
        ("cpus = 9", "1 to 8"),
        ("deterministic = 1", "'deterministic' is a int"),
        ("memory = '1 furlong'", "unknown unit"),
        ("memory = '100'", "1 MiB at least"),
        ("name = '../x'", "cannot be a machine's name"),
        ("initrd = 'x'", "go with --kernel"),
        ("disks = [1]", "disks is not a table"),
        ("disks = [{readonly = true}]", "a disk has a path"),
        ("[[slots]]\nname = 'x'", "a slot has a gpa"),
        ("[[slots]]\nname = 'x'\ngpa = 0\nsize = 4096\nbacking = 'tape'", "backing is one of"),
        ("[[slots]]\nname = 'x'\ngpa = 0\nsize = 4096\nbacking = 'file'", "do not go together"),
        ("[[slots]]\nname = 'x'\ngpa = 5\nsize = 4096", "bad address or size"),
        ("memory = '8MiB'\n[[slots]]\nname='r'\ngpa=0x80000000\nsize='16MiB'", "is the RAM"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read(tmp_path, text).definition()


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        read_definition_file(tmp_path / "none.toml")


def test_guest_parameters() -> None:
    given = {
        "fill": "compressible", "working-set": "2MiB", "rate": "5000/s", "pattern": "random",
        "write": "page", "heartbeat": "20ms", "pacing": "wfi", "seed": 7,
    }  # fmt: skip
    parameters = guest_parameters(given, 8 * MIB)
    assert parameters.fill is Fill.COMPRESSIBLE
    assert parameters.working_set_bytes == 2 * MIB
    assert parameters.rate_pages_per_s == 5000
    assert parameters.order is Order.RANDOM
    assert parameters.visit is Visit.PAGE
    assert parameters.heartbeat_ms == 20
    assert parameters.pacing is Pacing.WFI
    assert parameters.seed == 7


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"fill": "tea"}, "one of zero, random, compressible"),
        ({"working-set": "1GiB"}, "does not fit"),
        ({"working-set": 5}, "multiple of 4096"),
        ({"rate": "fast"}, "not a whole number"),
        ({"heartbeat": "1us"}, "whole milliseconds"),
        ({"colour": "red"}, "unknown guest parameter 'colour'"),
    ],
)
def test_guest_parameters_that_make_no_sense(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        guest_parameters(given, 8 * MIB)


def test_guest_parameters_are_for_our_own_guest(tmp_path: Path) -> None:
    launch = launch_of(kernel=str(tmp_path / "Image"), guest={"fill": "zero"})
    with pytest.raises(UsageError, match="own guest only"):
        launch.make(Console())


def test_an_image_that_is_missing(tmp_path: Path) -> None:
    launch = launch_of(memory=8 * MIB, firmware=str(tmp_path / "none.bin"))
    with pytest.raises(HostError, match=r"none\.bin"):
        launch.make(Console())


def test_disks() -> None:
    assert parse_disk("a,b.img") == DiskSpec("a,b.img")
    assert parse_disk("a.img,ro") == DiskSpec("a.img", readonly=True)
    with pytest.raises(UsageError):
        parse_disk(",ro")


def test_a_machine_is_made_and_ready() -> None:
    console = Console()
    machine = launch_of(memory=8 * MIB, guest={"fill": "zero"}).make(console)
    try:
        machine.resume_now()
        deadline = time.monotonic() + 30
        while b"FILLED" not in console.since(0)[0]:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        machine.close()

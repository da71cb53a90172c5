"""From what the user asks for to a machine that is ready to run (layer 5).

`Launch` is the request: options of `migrate run` and a GUEST.toml come to the same thing. Whatever
is not said is QEMU's default where it has one. Without firmware and kernel the machine runs our
own guest.
"""

from __future__ import annotations

import re
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, TypeVar

from migrate.control import check_name
from migrate.errors import HostError, StateFormatError, UsageError
from migrate.machine import Machine
from migrate.units import MIB, PAGE_SIZE, format_size, parse_duration_ns, parse_size
from migrate.vm.boot import Images
from migrate.vm.console import Console
from migrate.vm.definition import (
    MAX_CPUS,
    BackingKind,
    DiskSpec,
    MachineDefinition,
    SlotSpec,
    definition_from_untrusted,
)
from migrate.vm.guest import (
    RAM_BASE,
    Clock,
    Fill,
    GuestParameters,
    Order,
    Pacing,
    Privilege,
    Visit,
    build_image,
)

DEFAULT_MEMORY_BYTES: Final = 256 * MIB
RAM_SLOT: Final = "ram"

E = TypeVar("E", bound=IntEnum)


@dataclass(frozen=True, slots=True)
class Launch:
    """A machine to be made. `guest`: parameters of our own guest, by their names in GUEST.toml."""

    name: str
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    cpus: int = 1
    images: Images | None = None
    disks: tuple[DiskSpec, ...] = ()
    slots: tuple[SlotSpec, ...] = ()
    deterministic: bool = False
    prealloc: bool = False
    guest: Mapping[str, Any] = field(default_factory=dict)

    def definition(self) -> MachineDefinition:
        """Raises UsageError."""
        # Paths travel with the definition: at the destination they mean the same only if whole.
        slots = tuple(
            replace(slot, path=str(Path(slot.path).absolute())) if slot.path else slot
            for slot in self.slots
        )
        if not any(slot.gpa <= RAM_BASE < slot.gpa + slot.size_bytes for slot in slots):
            if self.memory_bytes % PAGE_SIZE or self.memory_bytes < MIB:
                raise UsageError(
                    f"{self.memory_bytes} bytes of memory: give whole pages, 1 MiB at least"
                )
            slots = (SlotSpec(RAM_SLOT, RAM_BASE, self.memory_bytes), *slots)
        definition = MachineDefinition(
            name=check_name(self.name),
            slots=slots,
            cpus=self.cpus,
            deterministic=self.deterministic,
            disks=tuple(replace(disk, path=str(Path(disk.path).absolute())) for disk in self.disks),
            sbi=self.images is not None and self.images.firmware is None,
        )
        try:
            # The bounds that a destination would hold it to.
            return definition_from_untrusted(definition.to_portable())
        except StateFormatError as error:
            raise UsageError(str(error)) from None

    def make(self, console: Console) -> Machine:
        """The machine with its images loaded, paused. Takes as long as reading them takes.

        Raises UsageError and HostError.
        """
        definition = self.definition()
        parameters = None
        if self.images is None:
            ram = next(s for s in definition.slots if s.gpa <= RAM_BASE < s.gpa + s.size_bytes)
            size = ram.gpa + ram.size_bytes - RAM_BASE
            parameters = guest_parameters(self.guest, size)
        elif self.guest:
            raise UsageError(
                f"{', '.join(sorted(self.guest))}: for the project's own guest only, "
                "which runs where no firmware and no kernel is given"
            )
        machine = Machine.create(definition, console, prealloc=self.prealloc)
        try:
            if self.images is not None:
                images = self.images
                machine.board.boot(
                    firmware=images.firmware,
                    kernel=images.kernel,
                    initrd=images.initrd,
                    append=images.append,
                )
            else:
                assert parameters is not None
                with tempfile.NamedTemporaryFile(prefix="migrate-guest-", suffix=".bin") as image:
                    image.write(build_image(parameters))
                    image.flush()
                    machine.board.boot(firmware=image.name)
        except BaseException:
            machine.close()
            raise
        return machine


# -- our own guest's parameters

_ENUMS: Final[dict[str, type[IntEnum]]] = {
    "fill": Fill, "pattern": Order, "write": Visit, "pacing": Pacing, "privilege": Privilege,
    "clock": Clock,
}  # fmt: skip
_FIELD_OF: Final = {"pattern": "order", "write": "visit"}
_SIZES: Final = {
    "working-set": "working_set_bytes",
    "working-set-offset": "working_set_offset_bytes",
}
_INTS: Final = {
    "seed": "seed", "rate": "rate_pages_per_s", "stop-after-heartbeats": "stop_after_heartbeats",
    "stop-after-visits": "stop_after_visits", "spin-rounds": "spin_rounds",
}  # fmt: skip


def guest_parameters(given: Mapping[str, Any], ram_bytes: int) -> GuestParameters:
    """Parameters by the names that options and GUEST.toml use. Raises UsageError."""
    taken: dict[str, Any] = {"ram_bytes": ram_bytes}
    for name, value in given.items():
        if name in _ENUMS:
            taken[_FIELD_OF.get(name, name)] = _choice(name, value, _ENUMS[name])
        elif name in _SIZES:
            taken[_SIZES[name]] = _size(name, value)
        elif name in _INTS:
            taken[_INTS[name]] = _rate(value) if name == "rate" else _int(name, value)
        elif name == "heartbeat":
            period_ns = parse_duration_ns(value if isinstance(value, str) else f"{value}")
            if period_ns % 1_000_000:
                raise UsageError(f"heartbeat {value!r}: give whole milliseconds")
            taken["heartbeat_ms"] = period_ns // 1_000_000
        else:
            raise UsageError(f"unknown guest parameter {name!r}")
    return GuestParameters(**taken)


def _choice(name: str, value: Any, kind: type[E]) -> E:
    names = {member.name.lower(): member for member in kind}
    if not isinstance(value, str) or value.lower() not in names:
        raise UsageError(f"{name} {value!r}: one of {', '.join(names)}")
    return names[value.lower()]


def _size(name: str, value: Any) -> int:
    if isinstance(value, str):
        return parse_size(value)
    return _int(name, value)


def _int(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, str) and re.fullmatch(r"0[xX][0-9a-fA-F]+|[0-9][0-9_]*", value):
        return int(value, 0) if value[:2].lower() == "0x" else int(value)
    raise UsageError(f"{name}: {value!r} is not a whole number")


def _rate(value: Any) -> int:
    """Pages a second: `5000`, `5000/s`; 0 is flat out."""
    return _int("rate", value.removesuffix("/s") if isinstance(value, str) else value)


# -- GUEST.toml

_TOP: Final = {
    "name": str, "memory": (str, int), "cpus": int, "firmware": str, "kernel": str, "initrd": str,
    "append": str, "deterministic": bool, "prealloc": bool, "disks": list, "slots": list,
    "guest": dict,
}  # fmt: skip
_DISK: Final = {"path": str, "readonly": bool}
_SLOT: Final = {
    "name": str, "gpa": (str, int), "size": (str, int), "backing": str, "path": str,
    "readonly": bool,
}  # fmt: skip


def read_definition_file(path: Path) -> dict[str, Any]:
    """The keyword arguments of `launch_of` that a GUEST.toml gives. Files in it are relative to
    its directory. Raises UsageError, HostError.
    """
    try:
        with path.open("rb") as file:
            top = tomllib.load(file)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from None

    def beside(name: str) -> str:
        return str(path.parent / name)

    try:
        _check(top, _TOP, "")
        given: dict[str, Any] = dict(top)
        for key in ("firmware", "kernel", "initrd"):
            if key in given:
                given[key] = beside(given[key])
        if "memory" in given:
            given["memory"] = _size("memory", given["memory"])
        given["disks"] = tuple(_disk(item, beside) for item in given.get("disks", ()))
        given["slots"] = tuple(_slot(item, beside) for item in given.get("slots", ()))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return given


def _check(table: object, types: Mapping[str, Any], where: str) -> None:
    if not isinstance(table, dict):
        raise UsageError(f"{where or 'the file'} is not a table")
    for key, value in table.items():
        if key not in types:
            raise UsageError(f"unknown key {key!r}{where and ' in ' + where}")
        if not isinstance(value, types[key]) or (
            isinstance(value, bool) and types[key] is not bool
        ):
            raise UsageError(f"{key!r}{where and ' in ' + where} is a {type(value).__name__}")


def _disk(item: object, beside: Callable[[str], str]) -> DiskSpec:
    if isinstance(item, str):
        disk = parse_disk(item)
        return DiskSpec(beside(disk.path), disk.readonly)
    _check(item, _DISK, "disks")
    assert isinstance(item, dict)
    if "path" not in item:
        raise UsageError("a disk has a path")
    return DiskSpec(beside(item["path"]), item.get("readonly", False))


def _slot(item: object, beside: Callable[[str], str]) -> SlotSpec:
    _check(item, _SLOT, "slots")
    assert isinstance(item, dict)
    for key in ("name", "gpa", "size"):
        if key not in item:
            raise UsageError(f"a slot has a {key}")
    kinds = {kind.value: kind for kind in BackingKind}
    backing = item.get("backing", "file" if "path" in item else "anonymous")
    if backing not in kinds:
        raise UsageError(f"slot {item['name']!r}: backing is one of {', '.join(kinds)}")
    path = beside(item["path"]) if "path" in item else None
    if (path is None) != (backing == "anonymous"):
        raise UsageError(f"slot {item['name']!r}: backing {backing!r} and path do not go together")
    return SlotSpec(
        name=item["name"],
        gpa=_int("gpa", item["gpa"]),
        size_bytes=_size("size", item["size"]),
        backing=kinds[backing],
        path=path,
        readonly=item.get("readonly", False),
    )


def parse_disk(text: str) -> DiskSpec:
    """`FILE` or `FILE,ro`."""
    readonly = text.endswith(",ro")
    path = text.removesuffix(",ro")
    if not path:
        raise UsageError(f"{text!r} is no disk: FILE or FILE,ro")
    return DiskSpec(path, readonly)


def launch_of(
    *,
    name: str | None = None,
    memory: int | None = None,
    cpus: int | None = None,
    firmware: str | None = None,
    kernel: str | None = None,
    initrd: str | None = None,
    append: str | None = None,
    disks: tuple[DiskSpec, ...] = (),
    slots: tuple[SlotSpec, ...] = (),
    deterministic: bool = False,
    prealloc: bool = False,
    guest: Mapping[str, Any] | None = None,
) -> Launch:
    """A launch out of what was said; None is what was not. Raises UsageError."""
    images = None
    if firmware is not None or kernel is not None:
        images = Images(firmware, kernel, initrd, append or "")
    elif initrd is not None or append is not None:
        raise UsageError("--initrd and --append go with --kernel")
    ram = next((s for s in slots if s.gpa <= RAM_BASE < s.gpa + s.size_bytes), None)
    if ram is not None and memory is not None and memory != ram.size_bytes:
        raise UsageError(
            f"slot {ram.name!r} is the RAM and has {format_size(ram.size_bytes)}, "
            f"not {format_size(memory)}"
        )
    if cpus is not None and not 1 <= cpus <= MAX_CPUS:
        raise UsageError(f"{cpus} cpus; 1 to {MAX_CPUS} are possible")
    return Launch(
        name=name or "guest",
        memory_bytes=memory if memory is not None else DEFAULT_MEMORY_BYTES,
        cpus=cpus or 1,
        images=images,
        disks=disks,
        slots=slots,
        deterministic=deterministic,
        prealloc=prealloc,
        guest=dict(guest or {}),
    )

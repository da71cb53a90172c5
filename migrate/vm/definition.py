"""What a machine is made of, as a value that travels (layer 2).

The definition says what both sides of a migration, or a checkpoint and its restore, must agree
on: memory slots, vcpus, devices, time mode. What the machine currently *holds* is its state.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from migrate.errors import StateFormatError
from migrate.units import PAGE_SIZE

MAX_SLOTS = 64
MAX_CPUS = 8
MAX_SLOT_BYTES = 1 << 40


class BackingKind(enum.Enum):
    """Where a slot's memory lives."""

    ANONYMOUS = "anonymous"
    """A memfd of our own."""
    FILE = "file"
    """A shared mapping of a file: guest RAM persists over runs."""
    PRIVATE_FILE = "private-file"
    """A private mapping of a file, copied on write: many guests share one image."""


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """One memory slot: [gpa, gpa + size_bytes), page-aligned."""

    name: str
    gpa: int
    size_bytes: int
    backing: BackingKind = BackingKind.ANONYMOUS
    path: str | None = None
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A raw image behind a virtio-blk device."""

    path: str
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class MachineDefinition:
    """A machine of the board `virt` (QEMU's riscv64 memory map)."""

    name: str
    slots: tuple[SlotSpec, ...]
    cpus: int = 1
    deterministic: bool = False
    disks: tuple[DiskSpec, ...] = ()
    board: str = "virt"
    sbi: bool = False
    """The board implements the SBI (kernels started in supervisor mode)."""
    slice_ns: int = 1_000_000
    """Length of a hart's turn, nanoseconds of guest time."""

    @property
    def memory_bytes(self) -> int:
        return sum(slot.size_bytes for slot in self.slots)

    def to_portable(self) -> dict[str, Any]:
        """Plain maps, lists and scalars, for msgpack."""
        return {
            "name": self.name,
            "board": self.board,
            "cpus": self.cpus,
            "deterministic": self.deterministic,
            "sbi": self.sbi,
            "slice_ns": self.slice_ns,
            "slots": [
                {
                    "name": slot.name,
                    "gpa": slot.gpa,
                    "size_bytes": slot.size_bytes,
                    "backing": slot.backing.value,
                    "path": slot.path,
                    "readonly": slot.readonly,
                }
                for slot in self.slots
            ],
            "disks": [{"path": disk.path, "readonly": disk.readonly} for disk in self.disks],
        }


def _take(source: object, what: str, **types: type | tuple[type, ...]) -> dict[str, Any]:
    if not isinstance(source, Mapping):
        raise StateFormatError(f"{what}: not a map")
    if set(source) != set(types):
        odd = sorted(str(name)[:40] for name in set(source) ^ set(types))
        raise StateFormatError(f"{what}: fields left over or missing: {', '.join(odd)}")
    for name, wanted in types.items():
        value = source[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
            raise StateFormatError(f"{what}: {name!r} holds a {type(value).__name__}")
        if isinstance(value, str) and len(value) > 4096:
            raise StateFormatError(f"{what}: {name!r} is too long")
    return dict(source)


def definition_from_untrusted(source: object) -> MachineDefinition:
    """The definition in a peer's or a file's plain form. Raises StateFormatError.

    Checks every bound that sizes something at the reader; whether the host can provide it is
    found out when the machine is built.
    """
    top = _take(
        source, "machine definition", name=str, board=str, cpus=int, deterministic=bool,
        sbi=bool, slice_ns=int, slots=list, disks=list,
    )  # fmt: skip
    if top["board"] != "virt":
        raise StateFormatError(f"unknown board {top['board'][:40]!r}; this program has 'virt'")
    if not 1 <= top["cpus"] <= MAX_CPUS:
        raise StateFormatError(f"{top['cpus']} vcpus; 1 to {MAX_CPUS} are possible")
    if not 10_000 <= top["slice_ns"] <= 1_000_000_000:
        raise StateFormatError(f"a turn of {top['slice_ns']} ns is out of range")
    if not 1 <= len(top["slots"]) <= MAX_SLOTS or len(top["disks"]) > 8:
        raise StateFormatError("too many memory slots or disks, or no slot")
    slots = []
    for item in top["slots"]:
        slot = _take(
            item, "memory slot", name=str, gpa=int, size_bytes=int, backing=str,
            path=(str, type(None)), readonly=bool,
        )  # fmt: skip
        if (
            slot["gpa"] < 0
            or not 0 < slot["size_bytes"] <= MAX_SLOT_BYTES
            or slot["gpa"] % PAGE_SIZE
            or slot["size_bytes"] % PAGE_SIZE
            or slot["gpa"] + slot["size_bytes"] > 1 << 56
        ):
            raise StateFormatError(f"memory slot {slot['name'][:40]!r}: bad address or size")
        try:
            slot["backing"] = BackingKind(slot["backing"])
        except ValueError:
            raise StateFormatError(f"unknown backing {slot['backing'][:40]!r}") from None
        if (slot["path"] is None) != (slot["backing"] is BackingKind.ANONYMOUS):
            raise StateFormatError(f"memory slot {slot['name'][:40]!r}: path and backing disagree")
        slots.append(SlotSpec(**slot))
    disks = [DiskSpec(**_take(item, "disk", path=str, readonly=bool)) for item in top["disks"]]
    return MachineDefinition(
        name=top["name"], slots=tuple(slots), cpus=top["cpus"],
        deterministic=top["deterministic"], disks=tuple(disks), board=top["board"],
        sbi=top["sbi"], slice_ns=top["slice_ns"],
    )  # fmt: skip

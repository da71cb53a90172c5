"""Portable state: named, versioned fields declared beside the code that owns them (layer 2).

A device, a clock or a board names its fields once, in `FIELDS`; saving and loading follow from
the declaration. What travels is {"kind": str, "version": int, "fields": {name: value}} with
values that msgpack carries. A field left over, missing without a default, of another type or
out of its range is an error: state is never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from migrate.errors import StateFormatError


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()

PortableState = dict[str, Any]
"""{"kind": str, "version": int, "fields": {name: value}}."""


@dataclass(frozen=True, slots=True)
class Field:
    """One named field of a state.

    `type` is int, bool, bytes, str or list (of ints); ints are unsigned of at most `bits` bits.
    A field that came with a later version has a `default`, the value that an older state means.
    """

    name: str
    type: type[Any]
    bits: int = 64
    max_length: int = 65536
    default: Any = REQUIRED

    def check(self, value: Any, owner: str) -> Any:
        """The value, if it may stand in this field. Raises StateFormatError."""
        kind = type(value)
        if kind is int and self.type is int and not value >> self.bits:
            return value  # nearly all of them, and in the downtime
        if kind is not self.type:
            raise StateFormatError(
                f"{owner}: field {self.name!r} holds a {type(value).__name__}, "
                f"not a {self.type.__name__}"
            )
        if self.type is int and not 0 <= value < 1 << self.bits:
            raise StateFormatError(f"{owner}: field {self.name!r} is out of range: {value:#x}")
        if self.type in (bytes, str, list) and len(value) > self.max_length:
            raise StateFormatError(
                f"{owner}: field {self.name!r} is {len(value)} long, over {self.max_length}"
            )
        if self.type is list and not all(
            type(item) is int and 0 <= item < 1 << self.bits for item in value
        ):
            raise StateFormatError(f"{owner}: field {self.name!r} holds an item out of range")
        return value


class Stateful:
    """Something whose state travels. The fields are attributes of the same names."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int]
    FIELDS: ClassVar[tuple[Field, ...]]

    def save(self) -> PortableState:
        """The portable state, a copy."""
        fields: dict[str, Any] = {}
        for field in self.FIELDS:
            value = getattr(self, field.name)
            if field.type is bytes:
                value = bytes(value)
            elif field.type is list:
                value = list(value)
            fields[field.name] = field.check(value, self.KIND)
        return {"kind": self.KIND, "version": self.VERSION, "fields": fields}

    def load_untrusted(self, state: object) -> None:
        """Take over a state from a file or a peer; nothing changes unless all of it fits.

        Raises StateFormatError.
        """
        for name, value in check_state_untrusted(
            state, self.KIND, self.VERSION, self.FIELDS
        ).items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
        self.after_load()

    def after_load(self) -> None:
        """Rebuild what is derived from the fields. Raises StateFormatError if they disagree."""
        raise NotImplementedError(f"{type(self).__name__}.after_load")


def check_state_untrusted(
    state: object, kind: str, version: int, fields: tuple[Field, ...]
) -> dict[str, Any]:
    """The field values of a foreign state, defaults filled in. Raises StateFormatError."""
    if not isinstance(state, dict) or set(state) != {"kind", "version", "fields"}:
        raise StateFormatError(f"{kind}: not a state (kind, version, fields expected)")
    if state["kind"] != kind:
        raise StateFormatError(f"state of {state['kind']!r} where {kind!r} was expected")
    if type(state["version"]) is not int or not 1 <= state["version"] <= version:
        raise StateFormatError(
            f"{kind}: state version {state['version']!r}; this program reads 1 to {version}"
        )
    given = state["fields"]
    if not isinstance(given, dict):
        raise StateFormatError(f"{kind}: the fields are not a map")
    known = {field.name: field for field in fields}
    for name in given:
        if name not in known:
            raise StateFormatError(f"{kind}: field left over: {str(name)[:64]!r}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in given:
            values[name] = field.check(given[name], kind)
        elif field.default is not REQUIRED:
            values[name] = field.default
        else:
            raise StateFormatError(f"{kind}: field {name!r} is missing")
    return values

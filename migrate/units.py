"""Addresses, sizes and times as types and as text (layer 0: no I/O)."""

from __future__ import annotations

import re
from typing import Final, NewType

from migrate.errors import UsageError

Gpa = NewType("Gpa", int)
"""Guest-physical address, bytes."""
Gfn = NewType("Gfn", int)
"""Guest frame number: gpa >> PAGE_SHIFT."""
Hva = NewType("Hva", int)
"""Host virtual address, bytes."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

_SIZE_SUFFIX: Final = {
    "": 1,
    "b": 1,
    "k": KIB, "kb": 1000, "kib": KIB,
    "m": MIB, "mb": 1000**2, "mib": MIB,
    "g": GIB, "gb": 1000**3, "gib": GIB,
}  # fmt: skip
_RATE_SUFFIX: Final = {"bit": 1, "kbit": 1000, "mbit": 1000**2, "gbit": 1000**3}
_TIME_SUFFIX_NS: Final = {
    "ns": 1, "us": 1000, "µs": 1000, "ms": 10**6, "s": 10**9, "": 10**9, "min": 60 * 10**9,
}  # fmt: skip
_QUANTITY: Final = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Zµ/]*)\s*$")


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.match(text)
    if match is None:
        raise UsageError(f"{text!r} is not {what}; write for example {example}")
    return float(match.group(1)), match.group(2)


def parse_size(text: str) -> int:
    """Bytes of `256MiB`, `1g`, `4096`. Bare K, M, G are powers of 1024, as QEMU reads them."""
    number, suffix = _split(text, "a size", "256MiB")
    factor = _SIZE_SUFFIX.get(suffix.lower())
    if factor is None:
        raise UsageError(f"unknown unit {suffix!r} in size {text!r}; write for example 256MiB")
    return int(number * factor)


def parse_bandwidth(text: str) -> int:
    """Bytes a second of `1Gbit`, `100Mbit/s`, `125MB`, `100MiB/s`."""
    number, suffix = _split(text, "a bandwidth", "1Gbit or 100MiB")
    suffix = suffix.lower().removesuffix("/s")
    if suffix in _RATE_SUFFIX:
        return int(number * _RATE_SUFFIX[suffix] / 8)
    if suffix in _SIZE_SUFFIX:
        return int(number * _SIZE_SUFFIX[suffix])
    raise UsageError(f"unknown unit {suffix!r} in bandwidth {text!r}; write 1Gbit or 100MiB")


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of `300ms`, `1.5s`, `20us`; a bare number is seconds."""
    number, suffix = _split(text, "a duration", "300ms")
    factor = _TIME_SUFFIX_NS.get(suffix.lower())
    if factor is None:
        raise UsageError(f"unknown unit {suffix!r} in duration {text!r}; write for example 300ms")
    return int(number * factor)


def format_size(size_bytes: float) -> str:
    """`1.5 GiB`, `256 MiB`, `12 KiB`."""
    for factor, suffix in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= factor:
            value = size_bytes / factor
            decimals = 0 if value >= 100 or value == int(value) else 1
            return f"{value:.{decimals}f} {suffix}"
    return f"{size_bytes:.0f} B"


def pages_of(size_bytes: int) -> int:
    """Pages that hold `size_bytes`, rounded up."""
    return (size_bytes + PAGE_SIZE - 1) >> PAGE_SHIFT

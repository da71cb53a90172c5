"""The host's side of our own bare-metal guest: its parameters and its lines (layer 2).

`build_image` patches parameters into the built image (`migrate/guest/guest.bin`), a flat binary
for the RAM base in machine mode (`--firmware`). `Console` turns what the guest prints into
values. Nothing here runs a machine, and the guest knows nothing of migration.

Header at offset 0x40 of the image, little endian (the same layout is in `guest/start.S`):

    0x40  8   magic "MIGGUEST"
    0x48  4   version (1)
    0x4c  4   length of the header, bytes
    0x50  15 words of 8 bytes, in the order of `_WORDS`
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Final, TypeAlias

import numpy as np

from migrate.errors import UsageError
from migrate.units import GIB, MIB, PAGE_SIZE, format_size

RAM_BASE: Final = 0x8000_0000
TICKS_PER_MS: Final = 10_000
"""The guest's clock (mtime) runs at 10 MHz."""

_HEADER: Final = struct.Struct("<8sII15Q")
_HEADER_OFFSET: Final = 0x40
_MAGIC: Final = b"MIGGUEST"
_VERSION: Final = 1
_WORDS: Final = (
    "ram_bytes", "seed", "fill", "working_set_pages", "working_set_first", "rate_pages_per_s",
    "order", "visit", "pacing", "privilege", "clock", "heartbeat_ticks",
    "stop_after_heartbeats", "stop_after_visits", "spin_rounds",
)  # fmt: skip
_PAGE_WORDS: Final = PAGE_SIZE // 8
_U64: Final = (1 << 64) - 1


class Fill(enum.IntEnum):
    """What RAM holds at first. ZERO touches nothing; COMPRESSIBLE shrinks about four times."""

    ZERO = 0
    RANDOM = 1
    COMPRESSIBLE = 2


class Order(enum.IntEnum):
    """How the working set is visited. RANDOM draws pages with replacement."""

    SEQUENTIAL = 0
    RANDOM = 1


class Visit(enum.IntEnum):
    """What a visit checks and writes: one word of the page, or all of it."""

    WORD = 0
    PAGE = 1


class Pacing(enum.IntEnum):
    """How the guest waits: SPIN takes a core, WFI sleeps with a timer set.

    With a working set it wakes every millisecond, without one for each heartbeat only.
    """

    SPIN = 0
    WFI = 1


class Privilege(enum.IntEnum):
    """Where the guest works. In MACHINE mode stores are several times slower (no page tables)."""

    SUPERVISOR = 1
    MACHINE = 3


class Clock(enum.IntEnum):
    """Where the guest reads its clock: the CLINT's register, or the rdtime instruction."""

    MTIME = 0
    RDTIME = 1


class Request(enum.Enum):
    """Bytes that the guest answers when they arrive at its UART."""

    VERIFY = b"v"
    PARAMETERS = b"p"
    STATISTICS = b"s"
    QUIT = b"q"


@dataclass(frozen=True, slots=True)
class GuestParameters:
    """What the guest does. `rate_pages_per_s` 0 is flat out; `working_set_bytes` 0 is idle.

    `stop_after_heartbeats` and `stop_after_visits` (0: never) end the run with a verification
    and a power-off: exit status 0 of the board's finisher if nothing was wrong, else 1.
    `spin_rounds` is how long it spins between two looks at the clock (about 12 ns each).
    """

    ram_bytes: int
    seed: int = 1
    fill: Fill = Fill.RANDOM
    working_set_bytes: int = 0
    working_set_offset_bytes: int = 0
    rate_pages_per_s: int = 0
    order: Order = Order.SEQUENTIAL
    visit: Visit = Visit.WORD
    pacing: Pacing = Pacing.SPIN
    privilege: Privilege = Privilege.SUPERVISOR
    clock: Clock = Clock.MTIME
    heartbeat_ms: int = 10
    stop_after_heartbeats: int = 0
    stop_after_visits: int = 0
    spin_rounds: int = 1500

    def __post_init__(self) -> None:
        for name in ("ram_bytes", "working_set_bytes", "working_set_offset_bytes"):
            if getattr(self, name) % PAGE_SIZE:
                raise UsageError(f"guest: {name} must be a multiple of {PAGE_SIZE}")
        if not MIB <= self.ram_bytes <= 64 * GIB:
            raise UsageError("guest: RAM of 1 MiB to 64 GiB is possible")
        if not 0 <= self.seed <= _U64:
            raise UsageError("guest: the seed must fit into 64 bits")
        if not 1 <= self.heartbeat_ms <= 3_600_000:
            raise UsageError("guest: a heartbeat period of 1 ms to 1 h is possible")
        if not 0 <= self.rate_pages_per_s <= 10_000_000:
            raise UsageError("guest: a rate of 0 (flat out) to 10,000,000 pages/s is possible")
        if not 1 <= self.spin_rounds < 1 << 32:
            raise UsageError("guest: spin_rounds must be at least 1")
        if self.working_set_bytes < 0 or self.working_set_offset_bytes < 0:
            raise UsageError("guest: the working set's size and offset must not be negative")
        if self.stop_after_heartbeats < 0 or self.stop_after_visits < 0:
            raise UsageError("guest: the counts that end the run must not be negative")
        if self.reserved_bytes + self.working_set_end_bytes > self.ram_bytes:
            raise UsageError(
                f"guest: a working set that ends at {format_size(self.working_set_end_bytes)} "
                f"does not fit into {format_size(self.ram_bytes)} of RAM beside the guest itself"
            )

    @property
    def working_set_end_bytes(self) -> int:
        return self.working_set_offset_bytes + self.working_set_bytes

    @property
    def reserved_bytes(self) -> int:
        """Room for the guest itself (256 KiB is more than it takes) and its table of visits."""
        return 256 * 1024 + self.working_set_bytes // PAGE_SIZE * 4

    def header(self) -> bytes:
        """The header as it stands in the image."""
        words = {
            "working_set_pages": self.working_set_bytes // PAGE_SIZE,
            "working_set_first": self.working_set_offset_bytes // PAGE_SIZE,
            "heartbeat_ticks": self.heartbeat_ms * TICKS_PER_MS,
        }
        values = [words[name] if name in words else int(getattr(self, name)) for name in _WORDS]
        return _HEADER.pack(_MAGIC, _VERSION, _HEADER.size, *values)


def build_image(parameters: GuestParameters) -> bytes:
    """The guest's flat image with `parameters`, to be loaded at RAM_BASE."""
    image = bytearray(resources.files("migrate.guest").joinpath("guest.bin").read_bytes())
    magic, version, length = _HEADER.unpack_from(image, _HEADER_OFFSET)[:3]
    if (magic, version, length) != (_MAGIC, _VERSION, _HEADER.size):
        raise UsageError("guest.bin has another header than this program patches; build it again")
    image[_HEADER_OFFSET : _HEADER_OFFSET + _HEADER.size] = parameters.header()
    return bytes(image)


# -- what the guest prints -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filled:
    """RAM is filled; work begins. `first_gpa` is where the filled part starts."""

    pages: int
    first_gpa: int
    ticks: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One period went by. `dirtied`: visits since the beat before; `late_ticks`: how long after
    it was due the beat was sent; periods that were missed altogether are left out.
    `hole_ticks`: the longest time between two looks at the clock since the beat before. A guest
    that spins looks every 20 µs: a longer hole is time in which it did not run.
    """

    number: int
    ticks: int
    visits: int
    wrong: int
    dirtied: int
    late_ticks: int
    hole_ticks: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The guest derived all of its RAM again.

    `digest` depends on every word and on the visits made: equal for equal runs. `code_intact`
    says whether the guest's own code and constants still have the sum they started with.
    """

    pages: int
    wrong_pages: int
    first_wrong_gpa: int
    digest: int
    code_intact: bool
    visits: int
    wrong_visits: int
    ticks: int

    @property
    def clean(self) -> bool:
        return self.wrong_pages == 0 and self.wrong_visits == 0 and self.code_intact


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters since the start. `sleeps`/`wakes`: timers set, timer interrupts taken."""

    beats: int
    ticks: int
    visits: int
    wrong: int
    first_wrong_gpa: int
    sleeps: int
    wakes: int
    max_late_ticks: int


@dataclass(frozen=True, slots=True)
class Trap:
    """A trap that the guest did not expect; it powers off with a failure."""

    cause: int
    epc: int
    tval: int
    privilege: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The guest is about to power off."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The guest cannot work with these parameters; it powers off with a failure."""

    reason: str


Report: TypeAlias = Filled | Heartbeat | Verdict | Statistics | Trap | Goodbye | Refused

_PAIR: Final = re.compile(r" ([a-z_]{1,16})=(0x[0-9a-f]{1,16}|[0-9]{1,20})")
_LINES: Final[dict[str, tuple[type, tuple[str, ...]]]] = {
    "FILLED": (Filled, ("pages", "from", "ticks")),
    "HB": (Heartbeat, ("n", "t", "visits", "wrong", "dirtied", "late", "hole")),
    "VERIFY": (
        Verdict,
        ("pages", "wrong", "first", "digest", "code", "visits", "wrong_visits", "ticks"),
    ),
    "STATISTICS": (
        Statistics,
        ("beats", "t", "visits", "wrong", "first", "sleeps", "wakes", "max_late"),
    ),
    "TRAP": (Trap, ("cause", "epc", "tval", "privilege")),
}


def parse_line(line: str) -> Report | None:
    """The report in one line of the guest's console; None for any other line, cut ones too."""
    line = line.strip()
    if line == "BYE":
        return Goodbye()
    word, _, rest = line.partition(" ")
    if word == "REFUSED":
        return Refused(rest)
    if word not in _LINES:
        return None
    kind, keys = _LINES[word]
    pairs = _PAIR.findall(" " + rest)
    if (
        tuple(key for key, _ in pairs) != keys
        or "".join(f" {k}={v}" for k, v in pairs) != f" {rest}"
    ):
        return None
    values = [int(value, 16 if value.startswith("0x") else 10) for _, value in pairs]
    if kind is Verdict:
        values[4] = values[4] == 1
    report: Report = kind(*values)
    return report


class Console:
    """Cuts the guest's console output into lines and parses them. Keeps only an unfinished line."""

    _MAX_LINE: Final = 4096

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Report]:
        """The reports that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-self._MAX_LINE :]
        for line in lines:
            report = parse_line(line.decode("ascii", "replace"))
            if report is not None:
                yield report


# -- contents, derived on the host ----------------------------------------------------------------


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _U64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _U64
    return z ^ z >> 31


def _generator_powers(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """a and c with state_k = a[k] * state_0 + c[k] modulo 2**64, for k below `steps`."""
    a, c, factors, terms = 1, 0, [], []
    for _ in range(steps):
        factors.append(a)
        terms.append(c)
        a = a * 0x5851F42D4C957F2D & _U64
        c = (c * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & _U64
    return np.array(factors, dtype=np.uint64), np.array(terms, dtype=np.uint64)


_FACTORS, _TERMS = _generator_powers(_PAGE_WORDS)


def fill_of_page(parameters: GuestParameters, gfn: int) -> bytes:
    """What the guest fills page `gfn` with, derived independently of the guest."""
    if parameters.fill is Fill.ZERO:
        return bytes(PAGE_SIZE)
    start = np.uint64(_mix((parameters.seed + gfn * 0x9E3779B97F4A7C15) & _U64))
    state = _FACTORS * start + _TERMS
    words = state ^ state >> np.uint64(32)
    if parameters.fill is Fill.COMPRESSIBLE:
        words = np.tile(words[: _PAGE_WORDS // 4], 4)
    return bytes(words.astype("<u8").tobytes())

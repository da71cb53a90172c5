"""What every device of the board is (layer 2): state that travels, and a power-on state.

Devices run inside engine hooks on the vcpu thread, one call at a time: no locks, no waiting.
They know nothing of the board; what they need of it comes as callables.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from migrate.errors import StateFormatError
from migrate.vm.core import Window
from migrate.vm.state import Stateful

IrqLine: TypeAlias = Callable[[bool], None]
"""An interrupt input: called with the level whenever it may have changed."""

MASK32 = 0xFFFF_FFFF
MASK64 = 0xFFFF_FFFF_FFFF_FFFF


class Device(Stateful, ABC):
    """A part of the board with state.

    Every concrete subclass lands in `registry` under its KIND, where the contract suite
    finds it.
    """

    registry: ClassVar[dict[str, type[Device]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "KIND" in cls.__dict__:
            if cls.KIND in Device.registry:
                raise TypeError(f"two devices of the kind {cls.KIND!r}")
            Device.registry[cls.KIND] = cls

    @abstractmethod
    def reset(self) -> None:
        """Back to the state at power-on."""

    @abstractmethod
    def after_load(self) -> None:
        """Rebuild what is derived and drive the outputs again. Raises StateFormatError."""

    def load_untrusted(self, state: object) -> None:
        """As Stateful, and a state that after_load refuses leaves nothing behind."""
        before = {field.name: getattr(self, field.name) for field in self.FIELDS}
        try:
            super().load_untrusted(state)
        except StateFormatError:
            for name, value in before.items():
                setattr(self, name, value)
            self.after_load()
            raise

    def refuse_unless(self, condition: bool, what: str) -> None:
        """For after_load: raises StateFormatError when the fields disagree."""
        if not condition:
            raise StateFormatError(f"{self.KIND}: {what}")


class MmioDevice(Device):
    """A device with a register window (migrate.vm.core.Mmio)."""

    SIZE: ClassVar[int]
    """Bytes of the window."""
    window: Window = Window()
    """What the core can do for the device by itself; `place` gives it one that does."""

    def place(self, window: Window) -> None:
        """The device is mapped; a subclass asks for shortcuts here."""
        self.window = window

    @abstractmethod
    def mmio_read(self, offset: int, size: int) -> int: ...

    @abstractmethod
    def mmio_write(self, offset: int, size: int, value: int) -> None: ...


class TimedDevice(ABC):
    """A device that has something to do at a point of guest time (ticks of the timebase)."""

    @abstractmethod
    def next_tick(self) -> int | None:
        """When `tick` is next due; None for never."""

    @abstractmethod
    def tick(self, now: int) -> None:
        """Do what is due at `now`."""


def concrete_devices() -> list[type[Device]]:
    """All registered classes that can be built."""
    return [cls for cls in Device.registry.values() if not inspect.isabstract(cls)]


def read_part(value: int, offset: int, size: int) -> int:
    """`size` bytes at byte `offset` of a wider little-endian register."""
    return (value >> (8 * offset)) & ((1 << (8 * size)) - 1)


def write_part(old: int, offset: int, size: int, value: int) -> int:
    """`old` with `size` bytes at byte `offset` replaced."""
    mask = ((1 << (8 * size)) - 1) << (8 * offset)
    return (old & ~mask) | ((value << (8 * offset)) & mask)

"""A hart with memory and little else, with and without the compiled part."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest

from migrate.vm.core import EcallHandler, Exit
from migrate.vm.riscv64 import core as core_module
from migrate.vm.riscv64.core import Riscv64Core

RAM = 0x8000_0000
RAM_SIZE = 1 << 20
BUDGET = 1 << 18


class Box:
    """A core with 1 MiB of RAM."""

    def __init__(self, core: Riscv64Core) -> None:
        self.core = core
        self.memory = mmap.mmap(-1, RAM_SIZE)
        anchor = (ctypes.c_char * RAM_SIZE).from_buffer(self.memory)
        core.map_memory(RAM, RAM_SIZE, ctypes.addressof(anchor))

    def put(self, offset: int, *words: int) -> int:
        """Code into memory; returns its address."""
        for i, word in enumerate(words):
            self.memory[offset + 4 * i : offset + 4 * i + 4] = word.to_bytes(4, "little")
        self.core.written(RAM + offset, 4 * len(words))
        return RAM + offset

    def word(self, offset: int) -> int:
        return int.from_bytes(self.memory[offset : offset + 8], "little")

    def set(self, **registers: int) -> None:
        for name, value in registers.items():
            self.core.write_reg(name, value)

    def get(self, name: str) -> int:
        return self.core.read_reg(name)

    def run_at(self, pc: int, budget: int = BUDGET) -> Exit:
        self.core.write_reg("pc", pc)
        return self.core.run(budget)


MakeBox = Callable[..., Box]


@pytest.fixture(params=["native", "plain"])
def native(request: pytest.FixtureRequest) -> bool:
    if request.param == "native" and (problem := core_module.native_problem()):
        pytest.skip(f"no compiled part: {problem}")
    return bool(request.param == "native")


@pytest.fixture
def make_box(native: bool) -> Iterator[MakeBox]:
    boxes: list[Box] = []

    def make(harts: int = 1, ecall: EcallHandler | None = None) -> Box:
        box = Box(Riscv64Core(harts, native=native, ecall=ecall))
        boxes.append(box)
        return box

    yield make
    for box in boxes:
        box.core.close()


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    return make_box()

"""What the dirty log costs: a harvest against the bare ioctl, a peek, an armed log under a guest.

    python tools/bench_dirtylog.py [--size 1GiB] [--repeat 15] [--json]

Bare is PAGEMAP_SCAN over the slot with a vector that is large enough, and nothing else. Bare and
harvest take turns, with the same pages dirtied before each, so that the machine's mood hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import unicorn
from unicorn import riscv_const

from migrate.dirtylog import open_log
from migrate.dirtylog_backends.pagemap import PagemapBackend
from migrate.linux import pagemap
from migrate.units import MIB, PAGE_SIZE, format_size, parse_size
from migrate.vm.definition import SlotSpec
from migrate.vm.memory import GuestMemory, MemorySlot

GPA = 0x8000_0000
PATTERNS = {"clean": 0, "1 in 64": 64, "1 in 2": 2, "all": 1}
GET_AND_RESET = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC


def ms_of(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def dirty(slot: MemorySlot, every: int) -> None:
    if every:
        slot.array[:: every * PAGE_SIZE] += 1


def bench_harvest(slot: MemorySlot, repeat: int) -> dict[str, Any]:
    """Medians in ms for each pattern."""
    result: dict[str, Any] = {}
    with open_log(slot, "pagemap") as log:
        cursor = log.cursor("bench")
        assert isinstance(log.raw, PagemapBackend)
        bare_pagemap = pagemap.Pagemap()
        vec = np.zeros(slot.n_pages // 2 + 1, dtype=pagemap.page_region)
        vec["start"] = 0  # touched, as the log's own is
        begin, end = int(slot.hva), int(slot.hva) + slot.size_bytes
        for name, every in PATTERNS.items():
            bare: list[float] = []
            harvest: list[float] = []
            for _ in range(repeat):
                dirty(slot, every)
                bare.append(ms_of(lambda: bare_pagemap.scan(begin, end, vec, flags=GET_AND_RESET)))
                dirty(slot, every)
                harvest.append(ms_of(lambda: cursor.harvest().commit()))
            medians = statistics.median(bare), statistics.median(harvest)
            result[name] = {
                "bare_ms": round(medians[0], 3),
                "harvest_ms": round(medians[1], 3),
                "ratio": round(medians[1] / medians[0], 3),
            }
        dirty(slot, 64)
        pages = min(256, slot.n_pages)
        peeks = [ms_of(lambda: cursor.peek(0, pages)) * 1e3 for _ in range(500)]
        result["peek of 256 pages"] = {"us": round(statistics.median(peeks), 1)}
        bare_pagemap.close()
    return result


def bench_guest(slot: MemorySlot, seconds: float) -> dict[str, Any]:
    """A guest that stores all over 64 MiB: slowed by how much, while a log is armed, or read."""
    engine: Any = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)  # type: ignore[attr-defined,no-untyped-call]
    engine.mem_map_ptr(slot.gpa, slot.size_bytes, unicorn.UC_PROT_ALL, slot.hva)
    # outer: mv x5, x9; inner: sd x6, 0(x5); add x5, x5, x7; bne x5, x8, inner;
    #        addi x10, x10, -1; bnez x10, outer
    code = np.array(
        [0x00048293, 0x0062B023, 0x007282B3, 0xFE829CE3, 0xFFF50513, 0xFE0516E3], dtype=np.uint32
    )
    slot.array[: code.nbytes] = code.view(np.uint8)
    span = min(64 * MIB, slot.size_bytes - MIB)

    def once(passes: int) -> float:
        for register, content in (
            (riscv_const.UC_RISCV_REG_X9, GPA + MIB),
            (riscv_const.UC_RISCV_REG_X8, GPA + MIB + span),
            (riscv_const.UC_RISCV_REG_X7, 64),
            (riscv_const.UC_RISCV_REG_X10, passes),
        ):
            engine.reg_write(register, content)
        return ms_of(lambda: engine.emu_start(GPA, GPA + code.nbytes))

    once(1)
    passes = max(1, int(seconds * 1e3 / once(1)))
    without, armed = [], []
    for _ in range(5):
        without.append(once(passes))
        with open_log(slot, "pagemap") as log:
            log.cursor("unread")
            armed.append(once(passes))
    medians = statistics.median(without), statistics.median(armed)
    return {
        "guest without a log": {"ms": round(medians[0], 1)},
        "guest, log armed and unread": {
            "ms": round(medians[1], 1),
            "ratio": round(medians[1] / medians[0], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="what the dirty log costs")
    parser.add_argument("--size", default="1GiB", help="of the slot (default: 1GiB)")
    parser.add_argument("--repeat", type=int, default=15, help="medians of so many (default: 15)")
    parser.add_argument("--guest-seconds", type=float, default=1.0, help="a guest run (default: 1)")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    options = parser.parse_args()
    memory = GuestMemory([SlotSpec("ram", GPA, parse_size(options.size))], prealloc=True)
    slot = memory.slots[0]
    result = bench_harvest(slot, options.repeat) | bench_guest(slot, options.guest_seconds)
    if options.json:
        print(json.dumps({"size_bytes": slot.size_bytes, **result}))
    else:
        print(f"slot of {format_size(slot.size_bytes)}, medians of {options.repeat}")
        for name, figures in result.items():
            print(f"  {name:30}", "  ".join(f"{key} {value}" for key, value in figures.items()))
    memory.close()


if __name__ == "__main__":
    main()

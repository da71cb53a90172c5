"""A booted Linux guest at work moves from machine to machine, live, and nobody in it notices."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.guests import Running, migrate
from tests.linux_guest.linux import READY, boot, guest_ns, shell, text, until_says

MOVES = 5
WORK = r"""
cd /tmp
dd if=/dev/urandom of=data bs=64k count=8 2>/dev/null
want=$(sha256sum < data)
work() {
    n=0
    while :; do
        n=$((n + 1))
        cp data copy$1
        [ "$(cat copy$1 | sha256sum)" = "$want" ] && echo "tick $1 $n ok" || echo "WRONG $1 $n"
    done
}
i=0
while [ $i -lt WORKERS ]; do i=$((i + 1)); work $i & done
mkfifo never
exec 3<>never
while :; do read -t 0.02 nothing <&3; read up idle < /proc/uptime; echo "beat $up"; done &
"""
"""Loops of processes, pipes, files and hashing, and one that sleeps on a timer and reads the clock
from user mode.
"""

SLACK_NS = 400_000_000
"""For the looks at the two clocks, and for a machine that others use, too."""


def beats(guest: Running) -> list[float]:
    return [float(up) for up in re.findall(r"beat (\d+\.\d+)$", text(guest), re.M)]


def ticks(guest: Running, worker: int) -> list[int]:
    return [int(n) for n in re.findall(rf"tick {worker} (\d+) ok$", text(guest), re.M)]


async def all_work(guest: Running, workers: int) -> None:
    """Every loop comes round once more, the sleeping one a few times: timers wake."""
    end = len(text(guest))
    for worker in range(1, workers + 1):
        await until_says(guest, rf"tick {worker} \d+ ok$", after=end)
    await until_says(guest, r"beat (?s:.*)beat (?s:.*)beat .*$", after=end)


async def live(
    linux: Any, tmp_path: Path, cpus: int, workers: int, moves: int, firmware: Path | None = None
) -> None:
    initrd = tmp_path / "initrd.cpio"
    initrd.write_bytes(linux.build_initrd(rc=WORK.replace("WORKERS", str(workers))))
    guest = boot(linux, memory_mib=256, cpus=cpus, initrd=initrd, firmware=firmware)
    try:
        guest.machine.start()
        await until_says(guest, READY)
        if firmware is not None:
            assert "OpenSBI v" in text(guest)
        await all_work(guest, workers)
        for number in range(moves):
            guest_before, host_before = guest_ns(guest), time.monotonic_ns()
            guest, report = await migrate(guest, compression=("auto", "none", "zstd:1")[number % 3])
            guest_passed = guest_ns(guest) - guest_before
            host_passed = time.monotonic_ns() - host_before
            # Guest time stands still in the downtime and at no other time.
            expected = host_passed - report.downtime_ms * 1e6
            assert abs(guest_passed - expected) < SLACK_NS, (guest_passed, expected)
            await all_work(guest, workers)
        assert (await shell(guest, "echo $((6 * 7)) $(nproc)")).count(f"42 {cpus}\n") == 1
        complaints = await shell(guest, "dmesg | grep -iE 'oops|bug:|stall|lockup|panic|unstable'")
    finally:
        guest.machine.close()
    assert "WRONG" not in text(guest)
    assert not re.search(r"\[ *\d+\.\d+\]", complaints), complaints
    for worker in range(1, workers + 1):
        numbers = ticks(guest, worker)
        assert numbers == list(range(1, len(numbers) + 1))
    ups = beats(guest)
    assert ups == sorted(ups)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (2, 1), (4, 4)])
def test_moves_under_load(linux: Any, tmp_path: Path, cpus: int, workers: int) -> None:
    """With fewer workers than harts, one sleeps in WFI most of the time."""
    trio.run(live, linux, tmp_path, cpus, workers, MOVES)


@pytest.mark.timeout(200)
def test_moves_with_its_firmware(linux: Any, opensbi: Path, tmp_path: Path) -> None:
    """OpenSBI in machine mode below the kernel: its state, its timers and its IPIs move, too."""
    trio.run(live, linux, tmp_path, 2, 1, 3, opensbi)

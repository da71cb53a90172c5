"""A Linux guest that is migrated ends as one that never moved: same RAM, registers, console.

In deterministic mode guest time is executed code, so any two runs of a machine must be equal to
the bit. One that moves between machines, live, at points nobody chose, must be equal to them.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from migrate.units import MIB, PAGE_SIZE
from tests.guests import Running, migrate
from tests.linux_guest.linux import boot, guest_ns, text, until, until_off

MKE2FS = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
MOVES = 5
EXT4_MIB = 16
DISK_BYTES = (EXT4_MIB + 4) * MIB

WORK = r"""
cd /tmp
dd if=/dev/urandom of=data bs=64k count=16 2>/dev/null
echo "entropy $(sha256sum < data) at $(date +%s) $(cat /proc/uptime)"
want=$(sha256sum < data)
count() {
    n=0
    while [ $n -lt 3000 ]; do n=$((n + 1)); done
    echo "counted $1 $n" > count$1
}
count 1 &
count 2 &
(for i in 1 2 3 4 5 6; do usleep 30000; cat /proc/uptime >> ticks; done) &
round=0
while [ $round -lt 4 ]; do
    round=$((round + 1))
    i=0
    while [ $i -lt 8 ]; do i=$((i + 1)); /bin/busybox true; done
    cp data copy$round
    [ "$(cat copy$round | sha256sum)" = "$want" ] || echo "WRONG $round"
    gzip -1 < copy$round | gunzip | md5sum | cut -c-32 | tr a-f A-F | rev > sum$round
    seq 1 400 | awk '{ s += $1 * 1.1 / (NR + 0.5) } END { printf "float %.12f\n", s }'
    seq 1 300 | sort -r | tail -n 1 | grep -q '^1$' || echo "WRONG sort"
    rm copy$round
    echo "round $round at $(cut -d' ' -f1 /proc/uptime) by $(cat sum$round)"
done
wait
cat count1 count2 ticks
grep -E '^(cpu|ctxt|processes)' /proc/stat
grep -E 'timer|serial|virtio|IPI' /proc/interrupts
"""
"""Processes, fork and exec, pipes, files on a tmpfs, hashing, floating point, counters, timers, and
everything by which a guest could tell that time or a processor was not as it should be.
"""

RAW_WORK = r"""
load-modules
cd /tmp
i=0
while [ $i -lt 20 ]; do
    i=$((i + 1))
    dd if=/dev/urandom of=block bs=64k count=1 2>/dev/null
    want=$(sha256sum < block)
    dd if=block of=/dev/vda bs=64k seek=$((256 + i)) conv=fsync 2>/dev/null
    echo 3 > /proc/sys/vm/drop_caches
    got=$(dd if=/dev/vda bs=64k skip=$((256 + i)) count=1 2>/dev/null | sha256sum)
    [ "$got" = "$want" ] || echo "WRONG block $i"
    echo "block $i $got at $(cut -d' ' -f1 /proc/uptime)"
done
"""
EXT4_WORK = r"""
mount -t ext4 /dev/vda /mnt && echo mounted
cd /mnt
i=0
while [ $i -lt 20 ]; do
    i=$((i + 1))
    dd if=/dev/urandom of=file$i bs=16k count=8 conv=fsync 2>/dev/null
    echo "file$i $(sha256sum < file$i) at $(cut -d' ' -f1 /proc/uptime)"
done
echo 3 > /proc/sys/vm/drop_caches
cat file* | sha256sum
grep vda /proc/diskstats
cd /
umount /mnt && echo unmounted
"""


@dataclass
class Ending:
    """Everything that a run can be told by."""

    ram: np.ndarray[Any, Any]
    state: Any
    console: str
    disk: bytes
    guest_ns: int


def make_disk(directory: Path) -> Path:
    """An image whose first part holds an ext4, where there is a tool to make one."""
    image = directory / "empty-disk"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    if MKE2FS is not None:
        command = [MKE2FS, "-q", "-F", "-t", "ext4", str(image), f"{EXT4_MIB}M"]
        subprocess.run(command, check=True, timeout=60)
    return image


async def run(
    linux: Any, initrd: Path, cpus: int, moves: list[int], disk: Path | None = None
) -> Ending:
    """Boot, move at these guest times (ns), and wait until the guest switches itself off.

    `disk`: an image; the guest gets a copy of it.
    """
    if disk is not None:
        disk = Path(shutil.copyfile(disk, disk.with_name("disk")))
    guest = boot(linux, memory_mib=128, cpus=cpus, deterministic=True, initrd=initrd, disk=disk)
    try:
        guest.machine.start()
        for number, moment in enumerate(moves):
            await until(guest, functools.partial(_reached, guest, moment))
            compression = ("none", "zstd:1")[number % 2]
            guest, report = await migrate(guest, compression=compression, verify=number % 2 == 0)
            assert report.status == "completed"
        await until_off(guest)
        return Ending(
            guest.machine.memory.slots[0].array.copy(),
            guest.machine.save(),
            text(guest),
            disk.read_bytes() if disk is not None else b"",
            guest_ns(guest),
        )
    finally:
        guest.machine.close()


def _reached(guest: Running, moment: int) -> bool:
    return guest_ns(guest) >= moment


def assert_same(a: Ending, b: Ending) -> None:
    """The console first: it shows where two runs began to differ."""
    assert a.console == b.console
    assert a.state == b.state
    differ = np.flatnonzero((a.ram != b.ram).reshape(-1, PAGE_SIZE).any(axis=1))
    assert not differ.size, f"{differ.size} pages differ: {differ[:20].tolist()}"
    assert a.disk == b.disk
    assert a.guest_ns == b.guest_ns


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("cpus", "disk"), [(1, False), (2, False), (2, True)], ids=["1-cpu", "2-cpus", "2-cpus-disk"]
)
def test_migrated_five_times_ends_as_if_never_moved(
    linux: Any, tmp_path: Path, cpus: int, disk: bool
) -> None:
    initrd = tmp_path / "initrd.cpio"
    work = RAW_WORK + (EXT4_WORK if MKE2FS else "") if disk else WORK
    initrd.write_bytes(linux.build_initrd(disk=disk, rc=work + "echo finished\npoweroff -f\n"))
    image = make_disk(tmp_path) if disk else None
    start = functools.partial(trio.run, run, linux, initrd, cpus)

    stayed = start([], image)
    assert "finished" in stayed.console, stayed.console[-1000:]
    assert "WRONG" not in stayed.console
    if image is not None:
        assert stayed.disk != image.read_bytes()
        assert stayed.console.count("mounted") == (2 if MKE2FS else 0), stayed.console[-1000:]

    seed = random.randrange(1 << 32)
    print(f"seed of the moves: {seed}")
    draw = random.Random(seed)
    # From the kernel's first lines to the midst of the work; with a disk, while it is in use.
    first, last = (0.65, 0.8) if disk else (0.0, 0.8)
    moves = sorted(int(stayed.guest_ns * draw.uniform(first, last)) for _ in range(MOVES))
    assert_same(stayed, start(moves, image))


@pytest.mark.timeout(200)
def test_two_undisturbed_runs_are_equal(linux: Any, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd.cpio"
    initrd.write_bytes(linux.build_initrd(rc="sha256sum /bin/busybox\npoweroff -f\n"))
    start = functools.partial(trio.run, run, linux, initrd, 2, [])
    assert_same(start(), start())

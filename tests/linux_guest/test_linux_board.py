"""Debian's kernel on the board: boot, harts, disk, firmware, and moving in the midst of it.

The kernel is the cached one of tools/fetch_linux.py, fetched when it is missing. Without it these
tests skip, unless MIGRATE_TEST_LINUX=1 forbids that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from migrate.vm.board import Board, StopReason
from migrate.vm.console import Console
from migrate.vm.definition import DiskSpec, MachineDefinition, SlotSpec
from migrate.vm.memory import GuestMemory
from migrate.vm.memory_map import RAM_BASE

OPENSBI = Path("/usr/lib/riscv64-linux-gnu/opensbi/generic")
APPEND = "console=ttyS0 earlycon=sbi no4lvl"
READY = b"the shell is ready"
BOOT_LIMIT_S = 120.0
"""Far more than a boot takes on an idle machine (3 s): others may use the processors."""


class Typist(Console):
    """Waits for the shell, types one line, keeps everything."""

    def __init__(self, line: str, text: bytes = b"") -> None:
        super().__init__()
        self.text = text
        self._line = line.encode() + b"\n"
        self._typed = READY in text

    def write(self, data: bytes) -> None:
        super().write(data)
        self.text += data
        if not self._typed and READY in self.text:
            self._typed = True
            assert self.offer(self._line)


class Guest:
    """A machine with Linux in it."""

    def __init__(self, definition: MachineDefinition, line: str, text: bytes = b"") -> None:
        self.definition = definition
        self.line = line
        self.memory = GuestMemory(definition.slots)
        self.console = Typist(line, text)
        self.board = Board(definition, self.memory, console=self.console)

    def run(self, limit_s: float = BOOT_LIMIT_S) -> StopReason:
        timer = threading.Timer(limit_s, self.board.stop)
        timer.start()
        try:
            return self.board.run()
        finally:
            timer.cancel()
            timer.join()

    def moved(self) -> Guest:
        state = msgpack.unpackb(msgpack.packb(self.board.save()))
        other = Guest(self.definition, self.line, self.console.text)
        other.memory.slots[0].view[:] = self.memory.slots[0].view
        other.board.load_untrusted(state)
        self.close()
        return other

    def close(self) -> None:
        self.board.close()
        self.memory.close()


@pytest.fixture
def guests() -> Iterator[list[Guest]]:
    made: list[Guest] = []
    yield made
    for guest in made:
        guest.close()


def machine(**kwargs: Any) -> MachineDefinition:
    return MachineDefinition("linux", (SlotSpec("ram", RAM_BASE, 256 << 20),), **kwargs)


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_boots_to_a_shell(linux: Any, guests: list[Guest], cpus: int) -> None:
    guest = Guest(machine(cpus=cpus, sbi=True), "echo harts $(nproc); poweroff -f")
    guests.append(guest)
    guest.board.boot(kernel=linux.kernel, initrd=linux.initrd, append=APPEND)
    assert guest.run() is StopReason.SHUTDOWN, guest.console.text[-2000:]
    assert f"harts {cpus}\r\n".encode() in guest.console.text
    assert b"Power down" in guest.console.text
    assert guest.board.exit_code == 0


@pytest.mark.parametrize("image", ["fw_dynamic.bin", "fw_jump.elf"])
def test_boots_behind_opensbi(linux: Any, guests: list[Guest], image: str) -> None:
    if not (OPENSBI / image).exists():
        pytest.skip("Debian's package opensbi is not installed")
    guest = Guest(machine(cpus=2), "echo harts $(nproc); poweroff -f")
    guests.append(guest)
    guest.board.boot(
        firmware=str(OPENSBI / image), kernel=linux.kernel, initrd=linux.initrd, append=APPEND
    )
    assert guest.run() is StopReason.SHUTDOWN, guest.console.text[-2000:]
    assert b"OpenSBI v" in guest.console.text
    assert b"harts 2\r\n" in guest.console.text


@pytest.mark.parametrize("legacy", [False, True])
def test_ext4_on_a_disk(linux: Any, guests: list[Guest], tmp_path: Path, legacy: bool) -> None:
    mke2fs, e2fsck = (
        shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        for tool in ("mke2fs", "e2fsck")
    )
    if mke2fs is None or e2fsck is None:
        pytest.skip("no e2fsprogs here")
    image, initrd = tmp_path / "disk.img", tmp_path / "initrd"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run([mke2fs, "-q", "-t", "ext4", str(image)], check=True)
    initrd.write_bytes(linux.build_initrd(disk=True))
    work = "\n".join(
        (
            "load-modules",
            "mount -t ext4 /dev/vda /mnt",
            "dd if=/dev/urandom of=/mnt/file bs=64k count=40 conv=fsync 2>/dev/null",
            "echo first $(sha256sum < /mnt/file)",
            "umount /mnt",
            "mount -t ext4 -o ro /dev/vda /mnt",
            "echo again $(sha256sum < /mnt/file)",
            "umount /mnt",
            "poweroff -f\n",
        )
    )
    initrd.write_bytes(linux.build_initrd(disk=True, rc=work))
    definition = machine(sbi=True, disks=(DiskSpec(str(image)),))
    guest = Guest(definition, "")
    guests.append(guest)
    if legacy:
        guest.board.close()
        guest.console = Typist("")
        guest.board = Board(definition, guest.memory, console=guest.console, virtio_legacy=True)
    guest.board.boot(kernel=linux.kernel, initrd=str(initrd), append=APPEND + " quiet")
    assert guest.run() is StopReason.SHUTDOWN, guest.console.text[-2000:]
    lines = guest.console.text.replace(b"\r", b"").split(b"\n")
    sums = {
        line.split()[0]: line.split()[1]
        for line in lines
        if line.startswith((b"first ", b"again "))
    }
    assert sums[b"first"] == sums[b"again"]
    checked = subprocess.run([e2fsck, "-fn", str(image)], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout


WORK = "for i in 1 2 3 4; do (echo $i | sha256sum) & done; wait; seq 1 500 | md5sum; poweroff -f"


def ending(guest: Guest) -> tuple[str, Any, bytes]:
    """Everything that a run can be told by."""
    state = guest.board.save()
    return hashlib.sha256(guest.memory.slots[0].view).hexdigest(), state, guest.console.text


@pytest.mark.parametrize("cpus", [1, 2])
def test_deterministic_guest_moves_without_a_trace(
    linux: Any, guests: list[Guest], cpus: int
) -> None:
    definition = machine(cpus=cpus, sbi=True, deterministic=True)
    endings = []
    for stops in ((), (0.3, 0.9, 1.5, 0.4, 0.2)):
        guest = Guest(definition, WORK)
        guest.board.boot(kernel=linux.kernel, initrd=linux.initrd, append=APPEND + " quiet")
        moves = 0
        for limit_s in stops:
            if guest.run(limit_s) is not StopReason.PAUSED:
                break
            guest = guest.moved()
            moves += 1
        guests.append(guest)
        assert moves >= min(len(stops), 3)
        assert guest.run() is StopReason.SHUTDOWN, guest.console.text[-2000:]
        endings.append(ending(guest))
    assert endings[0][2] == endings[1][2]
    assert endings[0] == endings[1]


def test_real_time_guest_moves_while_it_boots_and_works(linux: Any, guests: list[Guest]) -> None:
    guest = Guest(machine(cpus=2, sbi=True), WORK)
    guest.board.boot(kernel=linux.kernel, initrd=linux.initrd, append=APPEND)
    for limit_s in (0.5, 1.0, 1.0, 0.7):
        if guest.run(limit_s) is not StopReason.PAUSED:
            break
        guest = guest.moved()
    guests.append(guest)
    assert guest.run() is StopReason.SHUTDOWN, guest.console.text[-2000:]
    assert (
        hashlib.md5(b"".join(b"%d\n" % i for i in range(1, 501))).hexdigest().encode()
        in guest.console.text
    )
    for i in range(1, 5):
        assert hashlib.sha256(b"%d\n" % i).hexdigest().encode() in guest.console.text
    assert b"BUG" not in guest.console.text

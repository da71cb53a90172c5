"""The guest itself, on the board it was written for: QEMU's `virt`.

RAM lies in a shared file, so that the test reads and spoils it behind the guest's back.
"""

from __future__ import annotations

import mmap
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from migrate.units import MIB, PAGE_SIZE
from migrate.vm import guest
from migrate.vm.guest import Fill, GuestParameters, Pacing, Privilege, Visit

QEMU = "qemu-system-riscv64"
RAM_BYTES = 16 * MIB

pytestmark = pytest.mark.skipif(
    shutil.which(QEMU) is None, reason=f"{QEMU} is not installed (Debian: qemu-system-misc)"
)

R = TypeVar("R", bound=guest.Report)


class Qemu:
    """One QEMU with the guest, its console and its memory."""

    def __init__(self, directory: Path, parameters: GuestParameters) -> None:
        image, ram, console = (directory / name for name in ("guest.bin", "ram", "console"))
        image.write_bytes(guest.build_image(parameters))
        size = RAM_BYTES
        self.parser = guest.Console()
        self.reports: list[guest.Report] = []
        self.console = socket.socket(socket.AF_UNIX)
        self.console.settimeout(20)
        self.console.bind(str(console))
        self.console.listen()
        # Ends with the test run, however that ends: a guest that spins takes a core.
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        self.process = subprocess.Popen(
            [
                *tied, QEMU, "-M", "virt,memory-backend=ram", "-m", f"{size // MIB}M",
                "-object", f"memory-backend-file,id=ram,size={size},mem-path={ram},share=on",
                "-display", "none", "-monitor", "none", "-bios", str(image),
                "-serial", f"unix:{console}",
            ]
        )  # fmt: skip
        try:
            with self.console as listener:
                self.console = listener.accept()[0]
            self.console.settimeout(20)
            while not (ram.exists() and ram.stat().st_size == size):  # may come after the console
                assert self.process.poll() is None, "QEMU ended"
                time.sleep(0.01)
            with ram.open("r+b") as file:
                self.memory = mmap.mmap(file.fileno(), size)
        except BaseException:
            self.kill()
            raise

    def read(self) -> bool:
        try:
            data = self.console.recv(4096)
        except ConnectionResetError:
            data = b""
        self.reports.extend(self.parser.feed(data))
        return bool(data)

    def wait(self, kind: type[R], test: Callable[[R], bool] = lambda report: True) -> R:
        """The next report of `kind` that passes `test`; earlier ones are dropped."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            while self.reports:
                report = self.reports.pop(0)
                if isinstance(report, kind) and test(report):
                    return report
            assert self.read(), "QEMU ended"
        raise AssertionError(f"no {kind.__name__} came")

    def finish(self) -> int:
        """Reads to the end; the exit status."""
        while self.read():
            pass
        return self.process.wait(timeout=20)

    def send(self, request: guest.Request) -> None:
        self.console.sendall(request.value)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.console.close()

    def close(self) -> None:
        self.kill()
        self.memory.close()


Boot = Callable[..., Qemu]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    machines: list[Qemu] = []

    def start(**changes: object) -> Qemu:
        directory = tmp_path / str(len(machines))
        directory.mkdir()
        machine = Qemu(directory, GuestParameters(**({"ram_bytes": RAM_BYTES} | changes)))  # type: ignore[arg-type]
        machines.append(machine)
        return machine

    yield start
    for machine in machines:
        machine.close()


@pytest.mark.parametrize("fill", list(Fill))
def test_fill_is_what_the_host_derives(boot: Boot, fill: Fill) -> None:
    machine = boot(fill=fill, seed=11)
    filled = machine.wait(guest.Filled)
    offset = filled.first_gpa - guest.RAM_BASE
    assert filled.pages * PAGE_SIZE + offset == RAM_BYTES
    parameters = GuestParameters(ram_bytes=RAM_BYTES, fill=fill, seed=11)
    for page in range(0, filled.pages, 97):
        start = offset + page * PAGE_SIZE
        gfn = filled.first_gpa // PAGE_SIZE + page
        assert machine.memory[start : start + PAGE_SIZE] == guest.fill_of_page(parameters, gfn)


def test_a_spoiled_page_and_spoiled_code_are_found(boot: Boot) -> None:
    machine = boot(fill=Fill.RANDOM)
    filled = machine.wait(guest.Filled)
    machine.send(guest.Request.VERIFY)
    assert machine.wait(guest.Verdict).clean
    offset = filled.first_gpa - guest.RAM_BASE + 37 * PAGE_SIZE + 4095
    machine.memory[offset] ^= 0x80
    machine.send(guest.Request.VERIFY)
    verdict = machine.wait(guest.Verdict)
    assert (verdict.wrong_pages, verdict.code_intact) == (1, True)
    assert verdict.first_wrong_gpa == filled.first_gpa + 37 * PAGE_SIZE
    machine.memory[offset] ^= 0x80
    machine.memory[len(guest.build_image(GuestParameters(ram_bytes=RAM_BYTES))) - 1] ^= 1
    machine.send(guest.Request.VERIFY)
    verdict = machine.wait(guest.Verdict)
    assert (verdict.wrong_pages, verdict.code_intact, verdict.clean) == (0, False, False)


@pytest.mark.parametrize(
    ("visit", "order", "fill"),
    [
        (Visit.WORD, guest.Order.SEQUENTIAL, Fill.RANDOM),
        (Visit.WORD, guest.Order.RANDOM, Fill.COMPRESSIBLE),
        (Visit.WORD, guest.Order.RANDOM, Fill.ZERO),
        (Visit.PAGE, guest.Order.RANDOM, Fill.RANDOM),
    ],
)
def test_a_run_of_given_visits_is_repeatable(
    boot: Boot, visit: Visit, order: guest.Order, fill: Fill
) -> None:
    verdicts = []
    for seed in (5, 5, 6):
        machine = boot(
            fill=fill, visit=visit, order=order, seed=seed,
            working_set_bytes=MIB, working_set_offset_bytes=MIB, stop_after_visits=600,
        )  # fmt: skip
        verdicts.append(machine.wait(guest.Verdict))
        assert machine.finish() == 0
    assert all(verdict.clean and verdict.visits == 600 for verdict in verdicts)
    assert verdicts[0].digest == verdicts[1].digest != verdicts[2].digest


@pytest.mark.parametrize("visit", list(Visit))
def test_a_visit_sees_what_became_of_the_visit_before(boot: Boot, visit: Visit) -> None:
    machine = boot(
        fill=Fill.ZERO, visit=visit, working_set_bytes=4 * PAGE_SIZE, rate_pages_per_s=400
    )
    filled = machine.wait(guest.Filled)
    machine.wait(guest.Heartbeat, lambda beat: beat.visits > 8)
    start = filled.first_gpa - guest.RAM_BASE + 2 * PAGE_SIZE
    machine.memory[start : start + PAGE_SIZE] = bytes(PAGE_SIZE)
    assert machine.wait(guest.Heartbeat, lambda beat: beat.wrong > 0).wrong == 1
    machine.send(guest.Request.STATISTICS)
    statistics = machine.wait(guest.Statistics)
    assert statistics.first_wrong_gpa == filled.first_gpa + 2 * PAGE_SIZE
    machine.send(guest.Request.VERIFY)
    verdict = machine.wait(guest.Verdict)  # the visit wrote the page anew
    assert (verdict.wrong_pages, verdict.wrong_visits, verdict.clean) == (0, 1, False)


@pytest.mark.parametrize("privilege", list(Privilege))
@pytest.mark.parametrize("pacing", list(Pacing))
@pytest.mark.parametrize("clock", list(guest.Clock))
def test_beats_and_rate_keep_time(
    boot: Boot, privilege: Privilege, pacing: Pacing, clock: guest.Clock
) -> None:
    machine = boot(
        privilege=privilege, pacing=pacing, clock=clock, fill=Fill.COMPRESSIBLE,
        working_set_bytes=MIB, rate_pages_per_s=2000, heartbeat_ms=20, stop_after_heartbeats=10,
    )  # fmt: skip
    first = machine.wait(guest.Heartbeat)
    last = machine.wait(guest.Heartbeat, lambda beat: beat.number == 10)
    period = 20 * guest.TICKS_PER_MS
    began = first.ticks - first.late_ticks - period
    assert last.ticks - began >= 10 * period  # later on a busy host, never earlier
    expected = 2000 * (last.ticks - began) / 10_000_000
    assert 0.2 * expected <= last.visits <= expected
    assert machine.wait(guest.Verdict).clean
    assert machine.finish() == 0


@pytest.mark.parametrize("privilege", list(Privilege))
def test_asleep_it_takes_no_core_and_wakes_by_the_timer(boot: Boot, privilege: Privilege) -> None:
    machine = boot(privilege=privilege, pacing=Pacing.WFI, fill=Fill.ZERO, heartbeat_ms=50)
    machine.wait(guest.Heartbeat, lambda beat: beat.number == 4)
    machine.send(guest.Request.STATISTICS)
    statistics = machine.wait(guest.Statistics)
    assert statistics.wakes >= 4 and statistics.sleeps - statistics.wakes <= 1
    machine.send(guest.Request.QUIT)
    machine.wait(guest.Goodbye)
    assert machine.finish() == 0


def test_flat_out_visits_as_fast_as_it_can(boot: Boot) -> None:
    machine = boot(working_set_bytes=MIB)
    assert machine.wait(guest.Heartbeat, lambda beat: beat.number == 5).visits > 5000


@pytest.mark.parametrize("privilege", list(Privilege))
def test_an_unexpected_trap_is_told_and_ends_the_run(boot: Boot, privilege: Privilege) -> None:
    machine = boot(privilege=privilege, ram_bytes=2 * RAM_BYTES)  # more than there is
    trap = machine.wait(guest.Trap)
    assert (trap.cause, trap.privilege) == (7, privilege)  # store access fault
    assert guest.RAM_BASE <= trap.epc < guest.RAM_BASE + 0x10000
    if privilege is Privilege.SUPERVISOR:
        assert trap.tval == guest.RAM_BASE + RAM_BYTES
    assert machine.finish() == 1

"""A `receive` process and whatever a network may bring it; guests that go around; memory.

What is refused, and with which words, is tested beside the code. Here it is the command: what it
says on stderr, its exit code, its memory, and whether it is of any use afterwards.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from migrate import wire
from migrate.terminal import attach
from migrate.units import MIB
from migrate.vm.console import Console
from migrate.vm.definition import MachineDefinition, SlotSpec
from migrate.wire import FrameType, Role
from tests.cli.cli_process import Cli, gone, until
from tests.faults.gate import Gate
from tests.faults.sides import RAM_MIB, Side, Sides, last_line

QUICK = ("--downtime-limit", "1s", "--compression", "none")
HELLO = wire.encode_stream_header(wire.StreamHeader(Role.SOURCE, required=int(wire.REQUIRED)))


def memory_kib(pid: int, *fields: str) -> int:
    """The sum of fields of /proc/PID/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M)[1]) for field in fields)


def talk(uri: str, data: bytes) -> bytes:
    """Say `data` and hear what the other side has to say until it ends."""
    _, host, port = uri.split(":")
    heard = b""
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 10) as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        while piece := stranger.recv(65536):
            heard += piece
    return heard


def configure(**changes: object) -> bytes:
    """A CONFIGURE frame whose machine has odd fields."""
    machine = MachineDefinition(name="m", slots=(SlotSpec("ram", 0x8000_0000, 8 * MIB),))
    fields = {
        "machine": {**machine.to_portable(), **changes}, "page_size": 4096, "hash_seed": 1,
        "verify": False,
    }  # fmt: skip
    return wire.encode_frame(FrameType.CONFIGURE, 0, wire.pack(fields))


def claims(meta_bytes: int, bulk_bytes: int) -> bytes:
    """A CONFIGURE header, well formed, for a frame of these lengths."""
    header = bytearray(wire.encode_frame(FrameType.CONFIGURE, 0))
    fields = list(wire.FRAME_HEADER.unpack(header))
    fields[4], fields[5], fields[7] = meta_bytes, bulk_bytes, 0
    body = wire.FRAME_HEADER.pack(*fields)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def slot(**changes: object) -> dict[str, object]:
    plain = {
        "name": "ram", "gpa": 0x8000_0000, "size_bytes": 8 * MIB, "backing": "anonymous",
        "path": None, "readonly": False,
    }  # fmt: skip
    return {**plain, **changes}


OPENINGS = {
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 40, "'negotiate'.*magic"),
    "zeros": (bytes(4096), "'negotiate'.*magic"),
    "short": (HELLO[:17], "closed the connection.*'negotiate'"),
    "a damaged hello": (HELLO[:20] + b"\xff" + HELLO[21:], "'negotiate'.*checksum"),
    "no frame": (HELLO + bytes(64), "'configure'.*damaged"),
    "too long a frame": (HELLO + claims(1 << 31, 0), "'configure'.*claims 2147483648"),
    "too much bulk": (HELLO + claims(16, 1 << 62), "'configure'.*claims"),
    "out of turn": (HELLO + wire.encode_frame(FrameType.HANDOVER, 0, b"\x80"),
                    "'configure'.*out of order"),
    "not msgpack": (HELLO + wire.encode_frame(FrameType.CONFIGURE, 0, b"\xdf\xff\xff\xff\xff"),
                    "'configure'.*msgpack"),
    "half a frame": (HELLO + configure()[:60], "closed the connection.*'prepare'"),
    "99 vcpus": (HELLO + configure(cpus=99), "99 vcpus"),
    "no memory like that": (HELLO + configure(slots=[slot(size_bytes=1 << 50)]), "size"),
    "overlapping slots": (HELLO + configure(slots=[slot(), slot(name="b")]), "overlap"),
    "a path for a name": (HELLO + configure(name="../../x"), "cannot be a machine's name"),
    "no such disk": (HELLO + configure(disks=[{"path": "/nonexistent/d", "readonly": False}]),
                     "/nonexistent/d"),
}  # fmt: skip


def test_a_receive_that_has_not_begun_stays_usable(cli: Cli) -> None:
    """Whoever comes first, and fifty that say nothing: then a good send completes."""
    sides = Sides(cli)
    destination, waiting = sides.waiting(named=False)
    before_kib = memory_kib(destination.pid, "VmRSS")
    loris = threading.Thread(target=drip, args=(destination.uri,), daemon=True)
    loris.start()
    for what, (data, pattern) in OPENINGS.items():
        said = len(waiting.text)
        talk(destination.uri, data)
        until(lambda n=said: "turned away" in waiting.text[n:], f"{what} is turned away", 20)
        line = last_line(waiting.text[said:])
        assert re.search(pattern, line), (what, line)
        assert destination.state == "listening", what
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(20):
        noise = chance.randbytes(chance.randrange(1, 20000))
        talk(destination.uri, HELLO + noise if chance.random() < 0.5 else noise)
    with crowd(destination.uri, 50):
        source = sides.guest()
        report = cli.json("send", source.name, destination.uri, *QUICK, "--verify")
        loris.join(5)
        assert not loris.is_alive(), "it was turned away"
    assert "did not introduce itself within" in waiting.text
    assert report["status"] == "completed"
    destination.lives()
    until(lambda: cli.machines() == {source.name: "running"}, "it takes its name")
    destination.name = source.name
    destination.verify()
    grown_kib = memory_kib(destination.pid, "VmHWM") - before_kib
    assert grown_kib < (RAM_MIB + 60) * 1024
    cli.run("stop", destination.name)
    waiting.ends(0)


@contextlib.contextmanager
def crowd(uri: str, number: int) -> Iterator[None]:
    """Connections that are silent, or drip."""
    _, host, port = uri.split(":")
    with contextlib.ExitStack() as stack:
        for index in range(number):
            stranger = stack.enter_context(socket.create_connection((host, int(port)), 10))
            if index % 2:
                stranger.sendall(HELLO[: index % 39 + 1])
        yield


def drip(uri: str) -> None:
    """A slow loris: it never stops, and never gets anywhere."""
    _, host, port = uri.split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 10) as stranger:
        for byte in HELLO + configure():
            stranger.sendall(bytes([byte]))
            time.sleep(0.3)


# -- streams that begin well


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a source sent in a migration that went well."""
    runtime = tmp_path_factory.mktemp("rec")
    runtime.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIGRATE_RUNTIME_DIR", str(runtime))
        cli = Cli(runtime)
        try:
            sides = Sides(cli)
            source, destination = sides.guest(), sides.destination()
            with Gate(destination.uri) as gate:
                cli.json("send", source.name, gate.uri, *QUICK)
            return bytes(gate.sent)
        finally:
            cli.close()


def frames(stream: bytes) -> Iterator[tuple[FrameType, int, int, int]]:
    """Type, start, end of the meta part, end, of each frame."""
    at = wire.STREAM_HEADER.size
    while at < len(stream):
        _, kind, _, _, meta_bytes, bulk_bytes, _, _ = wire.FRAME_HEADER.unpack_from(stream, at)
        after_meta = at + wire.FRAME_HEADER.size + meta_bytes
        yield FrameType(kind), at, after_meta, after_meta + bulk_bytes
        at = after_meta + bulk_bytes


def damaged(stream: bytes, how: str, chance: random.Random) -> tuple[bytes, int, str]:
    """The stream, the exit code and the words that are due."""
    pages = [frame for frame in frames(stream) if frame[0] is FrameType.PAGES]
    _, start, after_meta, end = chance.choice(pages)
    match how:
        case "cut":
            return stream[: chance.randrange(start, end)], 6, r"phase '(round|final)'"
        case "bit of a page":
            # Of the last ones: what is sent again later heals.
            _, _, after_meta, end = pages[-1]
            at = chance.randrange(after_meta, end)
            flipped = bytes([stream[at] ^ 1 << chance.randrange(8)])
            return stream[:at] + flipped + stream[at + 1 :], 4, "memory arrived damaged"
        case "bit of a header":
            at = chance.randrange(start, start + wire.FRAME_HEADER.size)
            flipped = bytes([stream[at] ^ 1 << chance.randrange(8)])
            return stream[:at] + flipped + stream[at + 1 :], 4, r"phase '(round|final)'.*damaged"
        case "frame left out":
            return stream[:start] + stream[end:], 4, r"phase '(round|final|acknowledge)'.*due"
        case "no rest":
            handover = next(f for f in frames(stream) if f[0] is FrameType.HANDOVER)
            return stream[: handover[1]], 6, "phase 'handover'"
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how", ["cut", "bit of a page", "bit of a header", "frame left out", "no rest"]
)
def test_a_recording_that_was_damaged(cli: Cli, recording: bytes, how: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    data, code, words = damaged(recording, how, random.Random(seed))
    destination, waiting = Sides(cli).waiting()
    talk(destination.uri, data)
    line = last_line(waiting.ends(code))
    assert re.search(words, line), line
    assert destination.beats() == 0, "nothing was started"
    assert destination.state is None
    assert not (cli.runtime / f"{destination.name}.sock").exists()


def test_the_recording_itself_is_a_migration(cli: Cli, recording: bytes) -> None:
    destination, _ = Sides(cli).waiting()
    heard = talk(destination.uri, recording)
    assert heard
    assert destination.state == "running"
    destination.verify()


# -- there and back again


def test_around_three_processes(cli: Cli) -> None:
    sides = Sides(cli)
    first = here = sides.guest()
    (row,) = cli.json("ps")
    assert (row["name"], row["state"], row["pid"]) == (here.name, "running", here.pid)
    for hop in range(3):
        there = sides.destination(*(["--prealloc", f"{RAM_MIB}MiB"] if hop == 1 else []))
        if hop == 1:
            cli.run("pause", here.name)
        report = cli.json("send", here.name, there.uri, *QUICK)
        check(report)
        here.ended()
        if hop == 1:
            assert there.state == "paused"
            assert there.stands()
            cli.run("resume", there.name)
        there.lives()
        stat = cli.json("stat", there.name)
        assert stat["state"] == "running"
        assert stat["pid"] == there.pid
        here = there
    assert first.console != here.console
    here.verify()
    (row,) = cli.json("ps")
    assert (row["name"], row["state"]) == (here.name, "running")
    cli.run("stop", here.name)
    here.ended()
    assert cli.json("ps") == []
    assert not list(cli.runtime.glob("*.sock"))
    assert not list(cli.runtime.glob("*.log"))


def check(report: dict[str, object]) -> None:
    """The fields that scripts count on."""
    assert report["status"] == "completed"
    for name in ("total-time", "setup-time", "downtime"):
        assert isinstance(report[name], float), name
    ram = report["ram"]
    assert isinstance(ram, dict)
    for name in ("transferred", "total", "duplicate", "normal", "remaining", "dirty-sync-count",
                 "mbps", "dirty-pages-rate"):  # fmt: skip
        assert isinstance(ram[name], int | float), name
        assert ram[name] >= 0
    assert ram["total"] == RAM_MIB * MIB
    assert ram["remaining"] == 0
    assert ram["duplicate"] + ram["normal"] >= RAM_MIB * MIB // 4096
    rounds = report["rounds"]
    assert isinstance(rounds, list)
    assert ram["dirty-sync-count"] == len(rounds)
    for entry in rounds:
        assert {"pages-dirty", "pages-zero", "bytes-sent", "ms"} <= set(entry)
    assert sum(entry["bytes-sent"] for entry in rounds) <= ram["transferred"]
    phases = report["downtime-phases"]
    assert isinstance(phases, dict)
    assert list(phases) == ["stop", "final-harvest", "final-send", "state", "handover", "start"]
    assert all(ms >= 0 for ms in phases.values())
    assert sum(phases.values()) == pytest.approx(report["downtime"], abs=0.002)


# -- memory


def test_peak_memory(cli: Cli, tmp_path: Path) -> None:
    """Of source and destination: the guest's RAM and 200 MB, nothing of it twice."""
    size_mib = 512
    sides = Sides(cli)
    source = sides.guest("--memory", f"{size_mib}MiB", "--working-set", "64MiB")
    until(lambda: source.beats() > 0, "its memory is filled")
    destination = sides.destination("--prealloc", f"{size_mib}MiB")
    peaks: dict[str, int] = {}

    def look(side: Side) -> bool:
        with contextlib.suppress(OSError, TypeError):
            peaks[side.name] = memory_kib(side.pid, "VmHWM")
        return gone(side.pid)

    sender = cli.background("send", source.name, destination.uri, "--downtime-limit", "1s")
    until(lambda: look(source) or sender.poll() not in (None, 0), "the source has ended")
    _, errors = sender.communicate(timeout=20)
    assert sender.returncode == 0, errors
    destination.lives()
    look(destination)
    for side in (source, destination):
        over_mb = (peaks[side.name] * 1024 - size_mib * MIB) / 1e6
        print(f"{side.name}: {over_mb:.0f} MB over the guest's RAM")
        assert over_mb < 200, side.name


def test_a_name_that_is_taken_costs_its_owner_nothing(cli: Cli) -> None:
    """Not even its log."""
    here = Sides(cli).guest()
    log = cli.runtime / f"{here.name}.log"
    inode = log.stat().st_ino
    for command in (["run"], ["receive", "--listen", "tcp:127.0.0.1:0"]):
        done = cli.run(*command, "--name", here.name, "--detach", code=3)
        assert "runs already" in done.stderr
    assert log.stat().st_ino == inode
    cli.run("stop", here.name)
    here.ended()
    assert not log.exists()
    cli.run("run", "--name", "x", "--firmware", "/nonexistent/fw", "--detach", code=5)
    assert not list(cli.runtime.glob("*.log")), "an empty log is no use to anybody"


def test_a_console_client_that_vanished() -> None:
    """Reading and writing both fail, in the same moment: the console's end, and no error."""

    async def main() -> None:
        ours, theirs = trio.socket.socketpair()
        await ours.send(b"unread: closing resets the connection")
        theirs.close()
        console = Console()
        console.write(b"output")
        with trio.fail_after(5):
            await attach(console, trio.SocketStream(ours))
        ours.close()

    trio.run(main)

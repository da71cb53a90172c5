"""The guest's parameters, its lines, and its image (booted in tests/vm/test_guest_on_qemu.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import struct
import zlib
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.units import KIB, MIB, PAGE_SIZE
from migrate.vm import guest
from migrate.vm.guest import Fill, GuestParameters, Heartbeat, Verdict

ROOT = Path(__file__).resolve().parents[2]


def build_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_guest", ROOT / "tools" / "build_guest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_image_matches_its_source() -> None:
    assert build_tool().check()


def test_the_check_sees_a_changed_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = build_tool()
    for path in tool.GUEST.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "guest.c").write_bytes((tmp_path / "guest.c").read_bytes() + b"\n")
    monkeypatch.setattr(tool, "GUEST", tmp_path)
    with pytest.raises(tool.BuildError, match="source has changed"):
        tool.check()


def test_the_header_is_where_the_source_has_it() -> None:
    parameters = GuestParameters(
        ram_bytes=64 * MIB, seed=7, fill=Fill.COMPRESSIBLE, working_set_bytes=MIB,
        working_set_offset_bytes=2 * MIB, rate_pages_per_s=5000, order=guest.Order.RANDOM,
        visit=guest.Visit.PAGE, pacing=guest.Pacing.WFI, privilege=guest.Privilege.MACHINE,
        clock=guest.Clock.RDTIME, heartbeat_ms=20, stop_after_heartbeats=3,
        stop_after_visits=9, spin_rounds=10,
    )  # fmt: skip
    image = guest.build_image(parameters)
    assert image[0x40:0x48] == b"MIGGUEST"
    assert struct.unpack_from("<II", image, 0x48) == (1, 0x88)
    assert struct.unpack_from("<15Q", image, 0x50) == (
        64 * MIB, 7, 2, 256, 512, 5000, 1, 1, 1, 3, 1, 200_000, 3, 9, 10,
    )  # fmt: skip
    plain = guest.build_image(GuestParameters(ram_bytes=64 * MIB))
    assert image[:0x50] == plain[:0x50] and image[0xC8:] == plain[0xC8:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ram_bytes": 64 * MIB + 1}, "ram_bytes must be a multiple"),
        ({"ram_bytes": 4 * KIB}, "1 MiB to 64 GiB"),
        ({"working_set_bytes": 64 * MIB}, "does not fit"),
        ({"working_set_bytes": MIB, "working_set_offset_bytes": 63 * MIB}, "does not fit"),
        ({"working_set_bytes": -PAGE_SIZE}, "negative"),
        ({"rate_pages_per_s": -1}, "rate"),
        ({"heartbeat_ms": 0}, "heartbeat"),
        ({"seed": 1 << 64}, "seed"),
        ({"spin_rounds": 0}, "spin_rounds"),
    ],
)
def test_parameters_that_make_no_sense(change: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(GuestParameters(ram_bytes=64 * MIB), **change)  # type: ignore[arg-type]


def test_lines() -> None:
    beat = guest.parse_line("HB n=3 t=500 visits=7 wrong=0 dirtied=2 late=1 hole=8\r\n")
    assert beat == Heartbeat(3, 500, 7, 0, 2, 1, 8)
    verdict = guest.parse_line(
        "VERIFY pages=10 wrong=1 first=0x0000000080010000 digest=0x00000000000000ff"
        " code=1 visits=7 wrong_visits=0 ticks=5"
    )
    assert isinstance(verdict, Verdict)
    assert (verdict.first_wrong_gpa, verdict.digest, verdict.code_intact) == (0x80010000, 255, True)
    assert not verdict.clean
    assert guest.parse_line("TRAP cause=0x5 epc=0x80000000 tval=0x0 privilege=1") == guest.Trap(
        5, 0x80000000, 0, 1
    )
    assert guest.parse_line("REFUSED no room") == guest.Refused("no room")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "HB",
        "HB n=3 t=500 visits=7 wrong=0 dirtied=2",
        "HB n=3 t=500 visits=7 wrong=0 dirtied=2 late=1 hole=8 more=1",
        "HB n=3 t=500 visits=7 wrong=0 dirtied=2 late=1 hole=x",
        "n=3 t=500 visits=7 wrong=0 dirtied=2 late=1 hole=8",
        "visits=7 wrong=0 HB n=3",
    ],
)
def test_cut_or_foreign_lines_are_no_reports(line: str) -> None:
    assert guest.parse_line(line) is None


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_the_console_does_not_care_how_output_is_cut(noise: bytes, cuts: list[int]) -> None:
    data = noise + b"\nHB n=1 t=2 visits=3 wrong=4 dirtied=5 late=6 hole=7\nBYE\nHB n=2 t="
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    console = guest.Console()
    reports = [
        report
        for first, end in itertools.pairwise(edges)
        for report in console.feed(data[first:end])
    ]
    assert reports[-2:] == [Heartbeat(1, 2, 3, 4, 5, 6, 7), guest.Goodbye()]


def test_fills_have_the_ratio_they_promise() -> None:
    def ratio(fill: Fill) -> float:
        parameters = GuestParameters(ram_bytes=64 * MIB, fill=fill)
        pages = b"".join(guest.fill_of_page(parameters, gfn) for gfn in range(0x80100, 0x80120))
        return len(pages) / len(zlib.compress(pages, 1))

    assert ratio(Fill.RANDOM) < 1.01
    assert 3.5 < ratio(Fill.COMPRESSIBLE) < 4.1
    assert ratio(Fill.ZERO) > 100

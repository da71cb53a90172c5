"""How the benchmark computes gaps and outages, and that it survives a console cut anywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from migrate.units import MIB
from migrate.vm import guest

MS = 1_000_000


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    import bench_peer

    yield bench_peer
    sys.modules.pop("bench_peer")


def beats(
    numbers: range, start_ms: float, start_ticks_ms: float
) -> list[tuple[int, guest.Heartbeat]]:
    return [
        (
            int((start_ms + 10 * index) * MS),
            guest.Heartbeat(
                number, int((start_ticks_ms + 10 * index) * 10_000), number * 50, 0, 50, 0, 200
            ),
        )
        for index, number in enumerate(numbers)
    ]


def outcome(
    bench: ModuleType,
    source: list[tuple[int, guest.Heartbeat]],
    destination: list[tuple[int, guest.Heartbeat]],
    unfinished: Any = None,
) -> Any:
    case = bench.Case("any", guest.GuestParameters(ram_bytes=64 * MIB))
    peer = SimpleNamespace(name="any", case=case, source=SimpleNamespace(unfinished=unfinished))
    figures = bench.Figures(1.0, 1.0, 0.0, 1, 1, 1.0, {})
    verdict = guest.Verdict(1, 0, 0, 0, True, 0, 0, 0)
    return bench._outcome(peer, figures, source, destination, 0, 200 * MS, verdict)


def test_a_frozen_clock_shows_the_outage_exactly(bench: ModuleType) -> None:
    # The last beat at 190 ms; the guest stood still for 7 ms, the next beat was due at 200 ms.
    seen = outcome(bench, beats(range(1, 21), 0, 0), beats(range(21, 30), 207, 200))
    assert seen.gap_ms == pytest.approx(7)
    assert seen.outage_ms == pytest.approx(7)
    assert seen.beats_lost == 0
    assert seen.slowdown == pytest.approx(1.0, abs=0.2) or seen.slowdown is None


def test_a_clock_that_runs_on_shows_a_hole(bench: ModuleType) -> None:
    destination = beats(range(21, 30), 207, 207)
    at, first = destination[0]
    destination[0] = (at, guest.Heartbeat(21, first.ticks, 1050, 0, 50, 70_000, 120_000))
    seen = outcome(bench, beats(range(1, 21), 0, 0), destination)
    assert seen.gap_ms == pytest.approx(7)
    assert seen.outage_ms == pytest.approx(12)  # 5 ms of it passed before the beat was due


def test_a_beat_cut_in_two_is_a_beat(bench: ModuleType) -> None:
    cut = bench.Arrival(200 * MS, guest.Refused("HB n=21 t=2"))
    seen = outcome(bench, beats(range(1, 21), 0, 0), beats(range(22, 30), 214, 210), cut)
    assert seen.beats_lost == 0
    assert seen.gap_ms == pytest.approx(4)


def test_output_that_the_destination_repeats_is_no_new_beat(bench: ModuleType) -> None:
    source = beats(range(1, 21), 0, 0)
    again = [(195 * MS, beat) for _, beat in source]
    seen = outcome(bench, source, again + beats(range(21, 30), 203, 200))
    assert (seen.gap_ms, seen.beats_lost) == (pytest.approx(3), 0)


def test_a_guest_that_went_on_with_old_counters_is_told(bench: ModuleType) -> None:
    seen = outcome(bench, beats(range(1, 21), 0, 0), beats(range(15, 30), 202, 200))
    assert seen.beats_lost == -6
    assert seen.gap_ms == pytest.approx(2)


def test_without_a_new_beat_there_is_no_outcome(bench: ModuleType) -> None:
    source = beats(range(1, 21), 0, 0)
    with pytest.raises(bench.BenchError, match="no new beat"):
        outcome(bench, source, source)

"""How the benchmark of a Linux guest computes rates, and silences over a switch that cuts lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    import linux_measure

    yield linux_measure
    for name in ("linux_measure", "fetch_linux", "initramfs"):
        sys.modules.pop(name, None)


class Heard:
    """A console of which all is there: pieces of text and when they came, in ms."""

    def __init__(self, *pieces: tuple[float, str]) -> None:
        self.text = "".join(text for _, text in pieces)
        self._arrivals: list[tuple[int, float]] = []
        end = 0
        for at_ms, text in pieces:
            end += len(text)
            self._arrivals.append((end, at_ms / 1e3))

    def arrived(self, position: int) -> float:
        return next(at for end, at in self._arrivals if end > position)

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        match = re.search(pattern, self.text)
        assert match is not None
        return match


def beats(numbers: range, start_ms: float) -> list[tuple[float, str]]:
    return [(start_ms + 10 * i, f"beat {n / 100:.2f}\r\n") for i, n in enumerate(numbers)]


def test_rate_of_the_turns_inside_a_window(measure: Any) -> None:
    times = [n / 100 for n in range(200)]
    assert measure.rate(times, 0.5, 1.0) == pytest.approx(100)
    with pytest.raises(measure.MeasureError, match="only 6 turns"):
        measure.rate(times, 0.5, 0.555)


@pytest.mark.parametrize("cut", [None, "beat 2", "beat 2.00", "beat 2.00\r"])
def test_silence_over_a_switch(measure: Any, cut: str | None) -> None:
    """Beats every 10 ms; the last here at 1990 ms, the first whole one there at 2042."""
    here = [*beats(range(200), 0)]
    there = beats(range(201, 300), 2052)
    if cut is None:
        there.insert(0, (2042, "beat 2.00\r\n"))
    else:
        here.append((2000, cut))
        there.insert(0, (2042, "beat 2.00\r\n".removeprefix(cut)))
    move = measure.Move({}, rounds_began=1.8, rounds_ended=1.995)
    heard = measure.silence(Heard(*here), Heard(*there), move)
    assert heard.usual_ms == pytest.approx(10)
    assert heard.gap_ms == pytest.approx(42)
    assert heard.worst_ms == pytest.approx(42)

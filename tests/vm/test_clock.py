"""Guest time: real and deterministic, standing and running, here and after a migration."""

from __future__ import annotations

import time

import pytest

from migrate.errors import StateFormatError, UsageError
from migrate.vm.clock import Clock, TimeKind, TimeSource


class Core:
    """The two things a clock knows of a core."""

    def __init__(self) -> None:
        self.executed = 1_000_000
        self.source = TimeSource(TimeKind.FROZEN, 0)

    def publish(self, source: TimeSource) -> None:
        self.source = source

    def ticks(self) -> int:
        return self.source.ticks(self.executed)


def make(deterministic: bool) -> tuple[Clock, Core]:
    core = Core()
    clock = Clock(deterministic=deterministic, executed=lambda: core.executed, publish=core.publish)
    return clock, core


def test_deterministic_time_is_executed_code() -> None:
    clock, core = make(True)
    assert clock.now() == core.ticks() == 0
    clock.thaw()
    core.executed += 127
    assert clock.now() == core.ticks() == 0
    core.executed += 1
    assert clock.now() == core.ticks() == 1
    clock.freeze()
    core.executed += 5000
    assert clock.now() == core.ticks() == 1
    clock.thaw()
    core.executed += 128
    assert clock.now() == core.ticks() == 2


def test_deterministic_jumps() -> None:
    clock, core = make(True)
    clock.thaw()
    core.executed += 200
    assert clock.code_until(3) == 3 * 128 - 200
    assert clock.ns_until(3) == (3 * 128 - 200) * 100 // 128
    clock.jump_to(50)
    assert clock.now() == core.ticks() == 50 and clock.position == 50 * 128
    clock.jump_to(10)
    assert clock.now() == 50 and clock.ns_until(10) == 0 and clock.code_until(10) == 0


def test_a_fraction_of_a_tick_survives() -> None:
    clock, core = make(True)
    clock.thaw()
    core.executed += 100
    clock.freeze()
    other, other_core = make(True)
    other_core.executed = 7
    other.load_untrusted(clock.save())
    other.thaw()
    other_core.executed += 27
    assert other.now() == other_core.ticks() == 0
    other_core.executed += 1
    assert other.now() == other_core.ticks() == 1


def test_real_time() -> None:
    clock, core = make(False)
    time.sleep(0.01)
    assert clock.now() == core.ticks() == 0
    clock.thaw()
    start = clock.now()
    time.sleep(0.02)
    passed = clock.now() - start
    assert 190_000 <= passed < 5_000_000
    assert abs(core.ticks() - clock.now()) < 100_000
    clock.freeze()
    frozen = clock.now()
    assert core.ticks() == frozen
    time.sleep(0.01)
    assert clock.now() == frozen
    other, _ = make(False)
    other.load_untrusted(clock.save())
    assert other.now() == frozen
    other.thaw()
    assert frozen <= other.now() < frozen + 5_000_000
    assert other.ns_until(other.now() + 10**9) > 9 * 10**10


def test_refusals() -> None:
    real, _ = make(False)
    deterministic, _ = make(True)
    with pytest.raises(UsageError):
        real.jump_to(5)
    with pytest.raises(UsageError):
        real.code_until(5)
    with pytest.raises(StateFormatError, match="time mode"):
        real.load_untrusted(deterministic.save())
    real.thaw()
    with pytest.raises(UsageError):
        real.load_untrusted(make(False)[0].save())

"""The convergence policy: a table of cases, and what holds for every guest and link."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.policy import (
    GOOD_ENOUGH_NS,
    SWITCHOVER_OVERHEAD_NS,
    Decision,
    DowntimePolicy,
    RoundStats,
    Verdict,
)
from migrate.units import PAGE_SIZE

MS = 1_000_000
GBYTE_PER_S = 1e9


def decide(
    left: list[int],
    *,
    limit_ms: float = 300,
    max_rounds: int = 30,
    bandwidth: float = GBYTE_PER_S,
    now_ms: int = 1000,
    timeout_ms: int | None = None,
) -> Decision:
    """After rounds that left so many pages dirty."""
    policy = DowntimePolicy(
        int(limit_ms * MS), max_rounds, 0, None if timeout_ms is None else timeout_ms * MS
    )
    history = [
        RoundStats(n, 1000, 1000 * PAGE_SIZE, 10 * MS, pages) for n, pages in enumerate(left)
    ]
    return policy.decide(now_ms * MS, history, bandwidth, float(PAGE_SIZE))


@pytest.mark.parametrize(
    ("left", "options", "verdict"),
    [
        # An idle guest: at once, whatever the limit would allow.
        ([0], {}, Verdict.SWITCH_OVER),
        ([100], {}, Verdict.SWITCH_OVER),
        # Nothing left: no further round could help, even if the overhead alone is over the limit.
        ([0], {"limit_ms": 0}, Verdict.SWITCH_OVER),
        ([1], {"limit_ms": 0}, Verdict.CONTINUE),
        # 10,000 pages are 41 ms: within the limit, but the limit is no budget.
        ([10_000], {}, Verdict.CONTINUE),
        ([50_000, 10_000], {}, Verdict.CONTINUE),
        ([10_000, 9_000], {}, Verdict.SWITCH_OVER),
        ([10_000, 11_000], {}, Verdict.SWITCH_OVER),
        # Over the limit: go on, in the hope of a quieter guest.
        ([100_000, 100_000], {}, Verdict.CONTINUE),
        ([10_000, 9_000], {"limit_ms": 20}, Verdict.CONTINUE),
        # Out of rounds or of time.
        ([100_000] * 30, {}, Verdict.GIVE_UP),
        ([100_000] * 29, {}, Verdict.CONTINUE),
        ([100_000], {"max_rounds": 1}, Verdict.GIVE_UP),
        ([10_000], {"max_rounds": 1}, Verdict.SWITCH_OVER),
        ([100_000], {"timeout_ms": 1000}, Verdict.GIVE_UP),
        ([100_000], {"timeout_ms": 1001}, Verdict.CONTINUE),
        ([10_000], {"timeout_ms": 1000}, Verdict.SWITCH_OVER),
        # A link that carries next to nothing.
        ([1], {"bandwidth": 0.0}, Verdict.CONTINUE),
        ([0], {"bandwidth": 0.0}, Verdict.SWITCH_OVER),
    ],
)
def test_cases(left: list[int], options: dict[str, float], verdict: Verdict) -> None:
    decision = decide(left, **options)
    assert decision.verdict is verdict, decision


def test_giving_up_says_what_was_measured() -> None:
    decision = decide([100_000] * 30)
    assert decision.verdict is Verdict.GIVE_UP
    for words in ("30 rounds", "412 ms", "limit of 300 ms", "10,000,000 pages/s", "244,141"):
        assert words in decision.reason
    assert "the timeout" in decide([100_000], timeout_ms=1).reason


def test_expected_downtime_is_pages_over_bandwidth_and_the_overhead() -> None:
    assert decide([1000]).expected_downtime_ns == 4_096_000 + SWITCHOVER_OVERHEAD_NS
    assert decide([1000], bandwidth=1e8).expected_downtime_ns == 40_960_000 + SWITCHOVER_OVERHEAD_NS


pages_left = st.integers(0, 10_000_000)
policies = st.builds(
    DowntimePolicy,
    downtime_limit_ns=st.integers(0, 10**10),
    max_rounds=st.integers(1, 40),
    started_ns=st.just(0),
    timeout_ns=st.none() | st.integers(0, 10**12),
)


@settings(max_examples=300)
@given(
    policies,
    st.lists(st.tuples(pages_left, st.integers(0, 10**10)), min_size=1, max_size=60),
    st.floats(0, 1e11),
    st.floats(1, 5000),
)
def test_for_every_guest_and_link(
    policy: DowntimePolicy, rounds: list[tuple[int, int]], bandwidth: float, bytes_per_page: float
) -> None:
    history: list[RoundStats] = []
    now = 0
    for number, (left, elapsed_ns) in enumerate(rounds):
        now += elapsed_ns
        history.append(RoundStats(number, left, left * PAGE_SIZE, elapsed_ns, left))
        decision = policy.decide(now, history, bandwidth, bytes_per_page)
        fits = decision.expected_downtime_ns <= policy.downtime_limit_ns
        pages_ns = decision.expected_downtime_ns - SWITCHOVER_OVERHEAD_NS
        over = len(history) >= policy.max_rounds or (
            policy.timeout_ns is not None and now >= policy.timeout_ns
        )
        if decision.verdict is Verdict.SWITCH_OVER:
            # Never over the limit, unless there is nothing that a round could send.
            assert fits or left == 0
            # Never while rounds help: the limit is not spent because it is there.
            helped = number == 0 or left <= history[-2].pages_left * 0.8
            assert over or not helped or pages_ns <= GOOD_ENOUGH_NS
        elif decision.verdict is Verdict.GIVE_UP:
            assert over and not fits
        else:
            assert not over
        if decision.verdict is not Verdict.CONTINUE:
            return
    assert len(history) < policy.max_rounds  # it always ends by then


@given(st.integers(0, 200), st.floats(1e9, 1e11), st.integers(5 * MS, 10**10))
def test_an_idle_guest_switches_over_after_the_first_round(
    left: int, bandwidth: float, limit_ns: int
) -> None:
    policy = DowntimePolicy(limit_ns, 30, 0)
    first = RoundStats(0, 262144, 1 << 30, 400 * MS, left)
    assert policy.decide(400 * MS, [first], bandwidth, 4096.0).verdict is Verdict.SWITCH_OVER


@given(st.integers(1000, 200_000), st.floats(2e8, 5e9), st.floats(0.05, 0.95), st.integers(5, 500))
def test_a_steady_guest_ends_near_its_floor(
    rate_pages_s: int, bandwidth: float, share: float, limit_ms: int
) -> None:
    """Dirt that comes at a share of the link's speed: rounds shrink by that share until what is
    left is as little as it gets; then it switches over, or says that it cannot.
    """
    rate_pages_s = min(rate_pages_s, int(bandwidth / PAGE_SIZE * share))
    policy = DowntimePolicy(limit_ms * MS, 60, 0)
    history: list[RoundStats] = []
    to_send, now = 262144, 0
    for number in range(60):
        elapsed = int(to_send * PAGE_SIZE / bandwidth * 1e9) + MS
        now += elapsed
        left = min(int(rate_pages_s * elapsed / 1e9), 262144)
        history.append(RoundStats(number, to_send, to_send * PAGE_SIZE, elapsed, left))
        decision = policy.decide(now, history, bandwidth, float(PAGE_SIZE))
        if decision.verdict is not Verdict.CONTINUE:
            break
        to_send = left
    assert decision.verdict is Verdict.SWITCH_OVER
    # Five times what comes in during the shortest round, or next to nothing to send.
    floor_pages = rate_pages_s * 1e-3 / (1 - min(share, 0.8))
    assert history[-1].pages_left <= max(
        5 * floor_pages, GOOD_ENOUGH_NS / 1e9 * bandwidth / 4096
    ) or (history[-1].pages_left > 0.8 * history[-2].pages_left)

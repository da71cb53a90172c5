"""A migration that has begun and goes wrong: `receive` says where and why, and starts nothing."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import MigrateError, MigrationFailed, PeerError, StateFormatError
from migrate.session import TRANSITIONS, Phase
from migrate.wire import LIMITS, FrameType, Role
from tests.links import frame
from tests.strangers import (
    FEW,
    PLAIN,
    Script,
    errors_in,
    receiving,
    run,
    saved_state,
    say,
    script,
)


@pytest.fixture(scope="module")
def good() -> Script:
    return script()


BEGUN = [Phase.PRECOPY, Phase.ROUND, Phase.FINAL, Phase.HANDOVER]


@pytest.mark.parametrize("phase", BEGUN, ids=lambda phase: phase.value)
def test_frames_out_of_order(phase: Phase, good: Script) -> None:
    before, sequence = good.until(phase)

    async def main() -> None:
        for kind in FrameType:
            if kind is FrameType.ERROR or (phase, Role.SOURCE, kind) in TRANSITIONS:
                continue
            async with receiving() as it:
                heard = await say(it.address, before + frame(kind, b"", sequence=sequence))
                error = await it.failure()
                assert isinstance(error, PeerError) and error.exit_code == 4
                assert (error.role, error.phase) == ("source", phase.value)
                assert f"a {kind.name} frame is out of order" in str(error)
                assert any("out of order" in text for text in errors_in(heard))

    run(main)


@pytest.mark.parametrize("phase", BEGUN, ids=lambda phase: phase.value)
def test_other_breaches_in_each_phase(phase: Phase, good: Script) -> None:
    before, sequence = good.until(phase)
    (kind, *_) = [k for p, role, k in TRANSITIONS if p is phase and role is Role.SOURCE]
    over, bulk = LIMITS[kind].meta_bytes + 1, LIMITS[kind].bulk_bytes + 1
    damaged = bytearray(frame(kind, b"\x80", sequence=sequence))
    damaged[-1] ^= 1
    breaches: dict[str, bytes] = {
        "a frame header is damaged": bytes(64),
        f"frame {sequence + 1} where {sequence} was due": frame(kind, sequence=sequence + 1),
        "are the most": frame(kind, b"", sequence=sequence, meta_bytes=over),
        f"claims 1 + {bulk} bytes": frame(kind, sequence=sequence, bulk_bytes=bulk),
        "unknown type 0x99": frame(0x99, sequence=sequence),
        "unknown flags": frame(kind, sequence=sequence, flags=0x8000),
        f"the meta part of a {kind.name} frame is damaged": bytes(damaged),
    }

    async def main() -> None:
        for why, data in breaches.items():
            async with receiving() as it:
                await say(it.address, before + data)
                error = await it.failure()
                assert isinstance(error, PeerError), error
                assert error.phase == phase.value and why in str(error), error

    run(main)


@FEW
@given(data=st.data())
def test_a_stream_cut_anywhere_starts_nothing(data: st.DataObject, good: Script) -> None:
    opening = len(good.until(Phase.PRECOPY)[0])
    cut = data.draw(st.integers(opening, len(good.stream) - 1))

    async def main() -> None:
        async with receiving() as it:
            await say(it.address, good.stream[:cut])
            error = await it.failure()
            assert isinstance(error, MigrationFailed) and error.exit_code == 6
            assert "nothing was started" in str(error) and "(phase '" in str(error)

    run(main)


@FEW
@given(data=st.data())
def test_a_stream_with_a_flipped_bit_starts_nothing(data: st.DataObject, good: Script) -> None:
    opening = len(good.until(Phase.PRECOPY)[0])
    stream = bytearray(good.stream)
    # The last pages and the state get their share beside the bulk of the first round.
    tail = len(good.until(Phase.FINAL)[0])
    at = data.draw(st.integers(opening, len(stream) - 1) | st.integers(tail, len(stream) - 1))
    stream[at] ^= 1 << data.draw(st.integers(0, 7))

    async def main() -> None:
        async with receiving() as it:
            await say(it.address, bytes(stream))
            error = await it.failure()
            assert isinstance(error, PeerError), error
            assert error.phase in {phase.value for phase in Phase}

    run(main)


def test_damaged_bulk_is_named_by_its_pages(good: Script) -> None:
    stream = bytearray(good.stream)
    stream[stream.index(b"MGRF" + b"\x21\x00") + 5000] ^= 0x10

    async def main() -> None:
        async with receiving() as it:
            heard = await say(it.address, bytes(stream))
            error = await it.failure()
            assert "memory arrived damaged: slot 'ram', pages 0 to 255" in str(error)
            assert "memory arrived damaged" in errors_in(heard)[0]

    run(main)


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"state": {}}, StateFormatError, "not a state"),
        ({"state": 5}, PeerError, "'state' is missing or of the wrong type"),
        ({"running": 1}, PeerError, "'running'"),
        ({"digests": []}, PeerError, "one list of digests a slot"),
        ({"digests": [b"123"]}, PeerError, "wrong length"),
        ({"digests": [None]}, PeerError, "wrong length"),
        ({"digests": [bytes(8)]}, PeerError, "memory arrived damaged"),
    ],
)
def test_states_that_do_not_fit(
    changes: dict[str, Any], kind: type[MigrateError], why: str
) -> None:
    async def main() -> None:
        async with receiving() as it:
            heard = await say(it.address, script(**changes).stream)
            error = await it.failure()
            assert isinstance(error, kind) and why in str(error)
            assert error.exit_code == 4
            assert any(why in text for text in errors_in(heard))

    run(main)


@st.composite
def mangled_states(draw: st.DrawFn) -> dict[str, Any]:
    """The state of a machine with one value, at any depth, replaced or removed."""
    state = saved_state()
    at: Any = state
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw(st.sampled_from(keys))
        if isinstance(at[key], (dict, list)) and len(at[key]) and draw(st.integers(0, 9)):
            at = at[key]
            continue
        if draw(st.integers(0, 3)):
            at[key] = draw(PLAIN)
        else:
            del at[key]
        return state


@settings(FEW, max_examples=40)
@given(mangled_states())
def test_a_mangled_state_is_loaded_or_refused(state: dict[str, Any]) -> None:
    """Any value of the right type and range is a state; everything else names itself."""

    async def main() -> None:
        async with receiving() as it:
            await say(it.address, script(state=state).stream)
            with trio.fail_after(20):
                await it.done.wait()
            for error in it.failures:
                assert isinstance(error, StateFormatError), error
                assert "visitor" in str(error) and "Error(" not in str(error), error

    run(main)

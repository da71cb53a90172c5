"""The session's state machine: every phase against every frame, and what the table promises."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import PeerError
from migrate.session import TRANSITIONS, Phase, Session
from migrate.wire import FrameType, Role

ENDS = (Phase.DONE, Phase.FAILED)
EVERY = list(itertools.product(Phase, Role, FrameType))


def session_in(phase: Phase, role: Role) -> Session:
    session = Session(role)
    session.phase = phase
    return session


def other(role: Role) -> Role:
    return Role.DESTINATION if role is Role.SOURCE else Role.SOURCE


@pytest.mark.parametrize(
    ("phase", "sender", "kind"), EVERY, ids=lambda value: getattr(value, "name", str(value))
)
def test_every_phase_against_every_frame(phase: Phase, sender: Role, kind: FrameType) -> None:
    sending, receiving = session_in(phase, sender), session_in(phase, other(sender))
    following = TRANSITIONS.get((phase, sender, kind))
    if kind is FrameType.ERROR:
        following = Phase.FAILED
    if following is None:
        with pytest.raises(AssertionError, match=kind.name):
            sending.sent(kind)
        with pytest.raises(PeerError) as caught:
            receiving.received_untrusted(kind)
        assert (caught.value.role, caught.value.phase) == (sender.label, phase.value)
        assert kind.name in str(caught.value)
        following = phase  # neither moved
    else:
        sending.sent(kind)
        receiving.received_untrusted(kind)
    assert sending.phase is receiving.phase is following


def test_sessions_begin_with_negotiation_which_comes_once() -> None:
    session = Session(Role.SOURCE)
    assert session.phase is Phase.NEGOTIATE and session.peer is Role.DESTINATION
    session.negotiated()
    assert session.phase is Phase.CONFIGURE
    with pytest.raises(AssertionError):
        session.negotiated()


def test_in_every_phase_at_most_one_side_may_speak() -> None:
    """So frames never cross on the link, and both sides agree on the phase."""
    for phase in Phase:
        assert len({role for at, role, _ in TRANSITIONS if at is phase}) <= 1


def test_every_phase_leads_to_the_end_and_ends_lead_nowhere() -> None:
    leads = {Phase.DONE}
    for _ in Phase:
        leads |= {at for (at, _, _), following in TRANSITIONS.items() if following in leads}
    assert leads == set(Phase) - {Phase.NEGOTIATE, Phase.FAILED}
    assert not [at for at, _, _ in TRANSITIONS if at in ENDS]


def test_the_guest_changes_hands_by_one_frame_only() -> None:
    """START is entered by HANDOVER alone, and that only after LOADED."""
    assert [key for key, phase in TRANSITIONS.items() if phase is Phase.START] == [
        (Phase.HANDOVER, Role.SOURCE, FrameType.HANDOVER)
    ]
    assert [key for key, phase in TRANSITIONS.items() if phase is Phase.HANDOVER] == [
        (Phase.LOAD, Role.DESTINATION, FrameType.LOADED)
    ]
    assert [key for key, phase in TRANSITIONS.items() if phase is Phase.LOAD] == [
        (Phase.FINAL, Role.SOURCE, FrameType.STATE)
    ]


@given(st.data())
def test_both_sides_walk_together(data: st.DataObject) -> None:
    source, destination = Session(Role.SOURCE), Session(Role.DESTINATION)
    source.negotiated()
    destination.negotiated()
    for _ in range(data.draw(st.integers(0, 40))):
        steps = [(role, kind) for at, role, kind in TRANSITIONS if at is source.phase]
        if not steps:
            break
        role, kind = data.draw(st.sampled_from(steps))
        first, second = (source, destination) if role is Role.SOURCE else (destination, source)
        first.sent(kind)
        second.received_untrusted(kind)
        assert source.phase is destination.phase

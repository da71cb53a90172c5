"""Which frame may come when: the session's state machine (layer 2, pure).

Both ends walk through the same phases, and one table says what moves them. The table is all there
is to the order of a migration; a frame that is not in it for the present phase is a breach by
whoever sent it. Nothing here reads a socket or a clock.

The phases of the handover keep the promise that never both sides run and that no failure leaves
neither able to, short of losing both hosts:

- up to and including LOAD the guest belongs to the source, which may always resume it;
- HANDOVER is sent by the source after LOADED has told it that the destination holds everything.
  From the moment it is sent the source does not run the guest of its own accord;
- the destination runs the guest only once it has read HANDOVER.

An ERROR from the destination promises that nothing was started there, nor will be: the source may
run the guest again. If the connection dies between the two instead, or says nothing that can be
read, nobody can know which side holds the guest. The source then stays paused, says so
(HandoverUncertain), and an explicit `migrate resume` decides.
"""

from __future__ import annotations

import enum
from typing import Final

from migrate.errors import PeerError
from migrate.wire import FrameType, Role


class Phase(enum.Enum):
    """Where a migration stands; the values are what users read."""

    NEGOTIATE = "negotiate"
    CONFIGURE = "configure"
    PREPARE = "prepare"
    PRECOPY = "precopy"
    ROUND = "round"
    ACKNOWLEDGE = "acknowledge"
    FINAL = "final"
    LOAD = "load"
    HANDOVER = "handover"
    START = "start"
    DONE = "done"
    FAILED = "failed"


_S, _D = Role.SOURCE, Role.DESTINATION

TRANSITIONS: Final[dict[tuple[Phase, Role, FrameType], Phase]] = {
    (Phase.CONFIGURE, _S, FrameType.CONFIGURE): Phase.PREPARE,
    (Phase.PREPARE, _D, FrameType.CONFIGURED): Phase.PRECOPY,
    # Pre-copy: any number of rounds, each acknowledged.
    (Phase.PRECOPY, _S, FrameType.ROUND): Phase.ROUND,
    (Phase.ROUND, _S, FrameType.PAGES): Phase.ROUND,
    (Phase.ROUND, _S, FrameType.ZERO): Phase.ROUND,
    (Phase.ROUND, _S, FrameType.ROUND_END): Phase.ACKNOWLEDGE,
    (Phase.ACKNOWLEDGE, _D, FrameType.ROUND_ACK): Phase.PRECOPY,
    # Switchover: the source's vcpus stand still from here.
    (Phase.PRECOPY, _S, FrameType.FINAL): Phase.FINAL,
    (Phase.FINAL, _S, FrameType.PAGES): Phase.FINAL,
    (Phase.FINAL, _S, FrameType.ZERO): Phase.FINAL,
    (Phase.FINAL, _S, FrameType.STATE): Phase.LOAD,
    (Phase.LOAD, _D, FrameType.LOADED): Phase.HANDOVER,
    (Phase.HANDOVER, _S, FrameType.HANDOVER): Phase.START,
    (Phase.START, _D, FrameType.RUNNING): Phase.DONE,
}


class Session:
    """One side's view of where the migration stands."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.peer = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE
        self.phase = Phase.NEGOTIATE

    def negotiated(self) -> None:
        """Both stream headers have crossed."""
        if self.phase is not Phase.NEGOTIATE:
            raise AssertionError(f"negotiated again in phase {self.phase.value}")
        self.phase = Phase.CONFIGURE

    def sent(self, kind: FrameType) -> None:
        """This side sends `kind`. A frame out of order is a bug of ours: AssertionError."""
        if kind is FrameType.ERROR:
            self.phase = Phase.FAILED
            return
        following = TRANSITIONS.get((self.phase, self.role, kind))
        if following is None:
            raise AssertionError(f"{kind.name} may not be sent in phase {self.phase.value}")
        self.phase = following

    def received_untrusted(self, kind: FrameType) -> None:
        """The peer sent `kind`. Raises PeerError, naming the phase, if it is not its turn."""
        if kind is FrameType.ERROR:
            self.phase = Phase.FAILED
            return
        following = TRANSITIONS.get((self.phase, self.peer, kind))
        if following is None:
            raise PeerError(
                f"a {kind.name} frame is out of order", role=self.peer.label, phase=self.phase.value
            )
        self.phase = following

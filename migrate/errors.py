"""The root error and its kinds (layer 0: no I/O).

Three kinds never mix: the caller misused us, the peer misbehaved, the operating system failed.
Exit codes of the command line and error codes of the wire live on the classes, so that a message
and its code cannot drift apart.
"""

from __future__ import annotations

from typing import ClassVar


class MigrateError(Exception):
    """Root of every error that this package raises on purpose.

    The message is for the user: what happened, to which machine, slot or page, and what to do.
    """

    exit_code: ClassVar[int] = 1
    """Exit status of the command line."""
    wire_code: ClassVar[int] = 1
    """Code of an ERROR record on the wire."""


class UsageError(MigrateError):
    """The caller asked for something that makes no sense; nothing was changed."""

    exit_code = 2
    wire_code = 2


class MachineStateError(MigrateError):
    """The machine does not exist, or is in a state that does not allow the operation."""

    exit_code = 3
    wire_code = 3


class PeerError(MigrateError):
    """The peer broke the protocol. Names the role of the peer and the phase.

    Functions whose names end in `_untrusted` raise this and nothing else.
    """

    exit_code = 4
    wire_code = 4

    def __init__(self, reason: str, *, role: str | None = None, phase: str | None = None) -> None:
        self.reason = reason
        self.role = role
        self.phase = phase
        super().__init__(reason)

    def __str__(self) -> str:
        who = f"the {self.role}" if self.role else "the peer"
        where = f" in phase {self.phase!r}" if self.phase else ""
        return f"{who} broke the protocol{where}: {self.reason}"


class HostError(MigrateError):
    """The operating system failed us: no memory, no space, a missing file, a refused call."""

    exit_code = 5
    wire_code = 5


class MigrationFailed(MigrateError):
    """The migration did not happen; the guest is (or can be) running at the source."""

    exit_code = 6
    wire_code = 6


class NotConverging(MigrationFailed):
    """The policy gave up: the guest dirties memory faster than the link carries it."""

    exit_code = 7
    wire_code = 7


class HandoverUncertain(MigrateError):
    """The confirmation of the handover was lost: the guest is paused at the source.

    Resolved by an explicit command only: `migrate resume NAME` at the side that is to run.
    """

    exit_code = 8
    wire_code = 8


class GuestError(MigrateError):
    """The guest did what the machine cannot carry on from (a double fault, an unmapped jump)."""

    exit_code = 9
    wire_code = 9


class StateFormatError(MigrateError):
    """A saved state does not fit: a field left over, missing, of the wrong type or version."""

    exit_code = 4
    wire_code = 10

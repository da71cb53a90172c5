"""One side's end of a migration stream: a link, the session's order, numbered frames (layer 4).

Joins `transport` (bytes), `wire` (frames) and `session` (order). Blocking, for one worker thread;
knows nothing of guests or policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migrate import wire
from migrate.errors import MigrationFailed, PeerError
from migrate.session import Phase, Session
from migrate.transport import Link
from migrate.wire import FrameHeader, FrameType, Role


class PeerGaveUp(MigrationFailed):
    """The peer ended the migration and said why."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame whose bulk, if any, is still in the link."""

    type: FrameType
    header: FrameHeader
    meta: bytearray

    @property
    def bulk_bytes(self) -> int:
        return self.header.bulk_bytes


class Channel:
    """Frames over a link, in the order that the session allows."""

    def __init__(self, link: Link, role: Role) -> None:
        self.link = link
        self.session = Session(role)
        self._next_sent = 0
        self._next_received = 0
        self._dropping = bytearray()

    @property
    def phase(self) -> Phase:
        return self.session.phase

    def negotiate_untrusted(self) -> wire.StreamHeader:
        """Exchange stream headers: the source speaks first. Raises PeerError, LinkLost."""
        ours = wire.encode_stream_header(wire.StreamHeader(self.session.role))
        if self.session.role is Role.SOURCE:
            self.link.send([ours])
        try:
            data = bytes(self.link.receive(wire.STREAM_HEADER.size))
            theirs = wire.decode_stream_header_untrusted(data)
            if theirs.role is not self.session.peer:
                raise PeerError(f"it says that it is a {theirs.role.label} too")
        except PeerError as error:
            raise self._breach(error) from None
        if self.session.role is Role.DESTINATION:
            self.link.send([ours])
        self.session.negotiated()
        return theirs

    def send(
        self,
        kind: FrameType,
        meta: bytes = b"",
        bulk: Sequence[memoryview | bytes] = (),
        bulk_bytes: int = 0,
    ) -> None:
        """One frame; `bulk` goes to the kernel from where it lies. Raises LinkLost."""
        self.session.sent(kind)
        head = wire.encode_frame(kind, self._next_sent, meta, bulk_bytes)
        self._next_sent += 1
        self.link.send([head, *bulk])

    def send_map(self, kind: FrameType, **fields: Any) -> None:
        """A control frame."""
        self.send(kind, wire.pack(fields))

    def receive_untrusted(self) -> Frame:
        """The next frame that this side knows, in its turn; its bulk is left in the link.

        An ERROR frame raises PeerGaveUp. Raises PeerError, LinkLost.
        """
        while True:
            try:
                data = self.link.receive(wire.FRAME_HEADER.size)
                header = wire.decode_frame_header_untrusted(data, self._next_received)
                self._next_received += 1
                if header.type is not None:
                    self.session.received_untrusted(header.type)
                meta = self.link.receive(header.meta_bytes)
                wire.check_meta_untrusted(header, meta)
            except PeerError as error:
                raise self._breach(error) from None
            if header.type is FrameType.ERROR:
                raise self._gave_up(meta)
            if header.type is not None:
                return Frame(header.type, header, meta)
            self.drop_bulk(header.bulk_bytes)

    def expect_untrusted(self, kind: FrameType, **types: type | tuple[type, ...]) -> dict[str, Any]:
        """The map of the next frame, which has to be a `kind` with the named fields."""
        frame = self.receive_untrusted()
        if frame.type is not kind:
            raise self._breach(PeerError(f"a {frame.type.name} frame where {kind.name} was due"))
        return self.fields_untrusted(frame, **types)

    def fields_untrusted(self, frame: Frame, **types: type | tuple[type, ...]) -> dict[str, Any]:
        """The map of a control frame."""
        try:
            return wire.unpack_untrusted(bytes(frame.meta), f"a {frame.type.name} frame", **types)
        except PeerError as error:
            raise self._breach(error) from None

    def drop_bulk(self, n_bytes: int) -> None:
        """Read and forget `n_bytes`, which the header's limits have bounded."""
        if len(self._dropping) < n_bytes:
            self._dropping = bytearray(n_bytes)
        if n_bytes:
            self.link.receive_into([memoryview(self._dropping)[:n_bytes]])

    def send_error(self, error: BaseException, code: int) -> None:
        """Tell the peer that this side gives up. The caller ignores LinkLost."""
        self.send_map(FrameType.ERROR, code=code, message=str(error)[:1000])

    def breach(self, reason: str) -> PeerError:
        """An error that names the peer's role and the present phase."""
        return self._breach(PeerError(reason))

    def _breach(self, error: PeerError) -> PeerError:
        return PeerError(
            error.reason,
            role=error.role or self.session.peer.label,
            phase=error.phase or self.phase.value,
        )

    def _gave_up(self, meta: bytearray) -> MigrationFailed:
        try:
            fields = wire.unpack_untrusted(bytes(meta), "an ERROR frame", code=int, message=str)
        except PeerError as error:
            return PeerGaveUp(f"the {self.session.peer.label} gave up: {error.reason}")
        text = "".join(c if c.isprintable() else "?" for c in fields["message"][:1000])
        return PeerGaveUp(f"the {self.session.peer.label} gave up: {text}")

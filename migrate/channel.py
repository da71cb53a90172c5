"""One side's end of a migration stream: a link, the session's order, numbered frames (layer 4).

Joins `transport` (bytes), `wire` (frames) and `session` (order). Blocking, for one worker thread;
knows nothing of guests or policies.

Whoever gives up says why in an ERROR frame and closes. The other side may be sending at that
moment: it then finds the link broken, and reads that frame before it says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migrate import wire
from migrate.errors import MigrateError, MigrationFailed, PeerError
from migrate.session import Phase, Session
from migrate.transport import Link, LinkLost
from migrate.wire import Feature, FrameHeader, FrameType, Role

LAST_WORDS_TIMEOUT_S = 1.0
"""How long to look for the reason on a link that takes no more data."""
GIVE_UP_TIMEOUT_S = 1.0
"""How long to try to tell the peer why this side gives up."""


class PeerGaveUp(MigrationFailed):
    """The peer ended the migration and said why."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame whose bulk, if any, is still in the link; it came in `phase`."""

    type: FrameType
    header: FrameHeader
    meta: bytearray
    phase: Phase

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
        self.features = wire.FEATURES
        """What both sides understand, once that is negotiated."""

    @property
    def phase(self) -> Phase:
        return self.session.phase

    def negotiate_untrusted(self) -> wire.StreamHeader:
        """Exchange stream headers: the source speaks first. Raises PeerError, LinkLost."""
        ours = wire.encode_stream_header(
            wire.StreamHeader(self.session.role, required=int(wire.REQUIRED))
        )
        if self.session.role is Role.SOURCE:
            self.link.send([ours])
        data = bytes(self.link.receive(wire.STREAM_HEADER.size))
        if self.session.role is Role.DESTINATION:
            # Before it is judged: a source of another version learns from ours what is wrong.
            self.link.send([ours])
        try:
            theirs = wire.decode_stream_header_untrusted(data)
            if theirs.role is not self.session.peer:
                raise PeerError(f"it says that it is a {theirs.role.label} too")
            missing = int(wire.REQUIRED) & ~theirs.features
            if missing:
                raise PeerError(f"it lacks what this side needs (feature bits {missing:#x})")
        except PeerError as error:
            raise self._breach(error) from None
        self.features = Feature(int(wire.FEATURES) & theirs.features)
        self.session.negotiated()
        return theirs

    def send(
        self,
        kind: FrameType,
        meta: bytes = b"",
        bulk: Sequence[memoryview | bytes] = (),
        bulk_bytes: int = 0,
    ) -> None:
        """One frame; `bulk` goes to the kernel from where it lies.

        Raises LinkLost, or PeerGaveUp if the peer left word why it closed the link.
        """
        self.session.sent(kind)
        head = wire.encode_frame(kind, self._next_sent, meta, bulk_bytes)
        self._next_sent += 1
        try:
            self.link.send([head, *bulk])
        except LinkLost:
            if kind is not FrameType.ERROR:
                self._hear_last_words()
            raise

    def _hear_last_words(self) -> None:
        """Raises PeerGaveUp if an ERROR frame is next in the broken link."""
        with contextlib.suppress(LinkLost, PeerError, OSError):
            self.link.set_timeout(LAST_WORDS_TIMEOUT_S)
            self.receive_untrusted()

    def send_map(self, kind: FrameType, **fields: Any) -> None:
        """A control frame."""
        self.send(kind, wire.pack(fields))

    def receive_untrusted(self) -> Frame:
        """The next frame that this side knows, in its turn; its bulk is left in the link.

        An ERROR frame raises PeerGaveUp. Raises PeerError, LinkLost.
        """
        while True:
            phase = self.phase
            try:
                data = self.link.receive(wire.FRAME_HEADER.size)
                header = wire.decode_frame_header_untrusted(data, self._next_received)
                self._next_received += 1
                if header.type is not None:
                    self.session.received_untrusted(header.type)
                meta = self.link.receive(header.meta_bytes)
                wire.check_meta_untrusted(header, meta)
            except PeerError as error:
                raise self._breach(error, phase) from None
            if header.type is FrameType.ERROR:
                raise self._gave_up(meta)
            if header.type is not None:
                return Frame(header.type, header, meta, phase)
            self.drop_bulk(header.bulk_bytes)

    def expect_untrusted(self, kind: FrameType, **types: type | tuple[type, ...]) -> dict[str, Any]:
        """The map of the next frame, which has to be a `kind` with the named fields."""
        frame = self.receive_untrusted()
        if frame.type is not kind:
            error = PeerError(f"a {frame.type.name} frame where {kind.name} was due")
            raise self._breach(error, frame.phase)
        return self.fields_untrusted(frame, **types)

    def fields_untrusted(self, frame: Frame, **types: type | tuple[type, ...]) -> dict[str, Any]:
        """The map of a control frame."""
        try:
            return wire.unpack_untrusted(bytes(frame.meta), f"a {frame.type.name} frame", **types)
        except PeerError as error:
            raise self._breach(error, frame.phase) from None

    def drop_bulk(self, n_bytes: int) -> None:
        """Read and forget `n_bytes`, which the header's limits have bounded."""
        if len(self._dropping) < n_bytes:
            self._dropping = bytearray(n_bytes)
        if n_bytes:
            self.link.receive_into([memoryview(self._dropping)[:n_bytes]])

    def send_error(self, error: BaseException, code: int) -> None:
        """Tell the peer that this side gives up. The caller ignores LinkLost."""
        # A message may quote a path whose bytes are no text: it must not fail for that.
        message = str(error)[:1000].encode("utf-8", "replace").decode("utf-8")
        self.send_map(FrameType.ERROR, code=code, message=message)

    def give_up(self, failure: BaseException) -> None:
        """As `send_error`, from whoever has failed already: does not insist on being heard."""
        with contextlib.suppress(MigrateError, AssertionError):
            self.link.set_timeout(GIVE_UP_TIMEOUT_S)
            self.send_error(failure, getattr(failure, "wire_code", 1))

    def breach(self, reason: str) -> PeerError:
        """An error that names the peer's role and the present phase."""
        return self._breach(PeerError(reason))

    def _breach(self, error: PeerError, phase: Phase | None = None) -> PeerError:
        return PeerError(
            error.reason,
            role=error.role or self.session.peer.label,
            phase=error.phase or (phase or self.phase).value,
        )

    def _gave_up(self, meta: bytearray) -> MigrationFailed:
        try:
            fields = wire.unpack_untrusted(bytes(meta), "an ERROR frame", code=int, message=str)
        except PeerError as error:
            return PeerGaveUp(f"the {self.session.peer.label} gave up: {error.reason}")
        text = "".join(c if c.isprintable() else "?" for c in fields["message"][:1000])
        return PeerGaveUp(f"the {self.session.peer.label} gave up: {text}")

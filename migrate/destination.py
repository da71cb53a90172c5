"""The destination of a migration (layer 4).

`receive` listens, turns away whoever does not speak the protocol, and lets the first source in that
does and whose machine can be built here. From then on `_Reception.run` mirrors the source's
phases, in a worker thread. The guest runs here only after the source's HANDOVER has been read;
whatever fails before, nothing is started and the machine is thrown away.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from migrate import wire
from migrate.admission import check_admission
from migrate.channel import Channel
from migrate.codec import PageHasher
from migrate.errors import HostError, MigrateError, MigrationFailed, PeerError, StateFormatError
from migrate.events import Event, Log, PhaseEntered
from migrate.machine import Machine
from migrate.receiver import PageReceiver
from migrate.tasks import no_collection, run_cancellable, settle_memory
from migrate.transport import Link, LinkLost, Listener, parse_uri
from migrate.units import PAGE_SIZE
from migrate.vm.definition import MachineDefinition, definition_from_untrusted
from migrate.wire import FrameType, Role

NEGOTIATION_TIMEOUT_S = 10.0
"""For a peer to say who it is and what it brings, all together."""
STALL_TIMEOUT_S = 30.0
MAX_NEGOTIATING = 16
"""Connections that may be negotiating at once; further ones wait in the kernel's backlog."""
GRACE_S = 0.5
"""How long a connection may be silent when others wait. Sources wait NEGOTIATION_TIMEOUT_S: with
the whole of it for each stranger, a few dozen strangers would keep every source out."""


@dataclass(frozen=True, slots=True)
class ReceiveOptions:
    """`make_machine` builds a paused machine (it chooses name, console and memory). `allowed`:
    directories whose files a source on another host may name, see `admission.py`.
    """

    make_machine: Callable[[MachineDefinition], Machine]
    allowed: tuple[str, ...] = ()


Emit = Callable[[Event], None]


@dataclass(slots=True)
class _Offer:
    """A source that has introduced itself and whose machine stands ready."""

    channel: Channel
    machine: Machine
    hash_seed: int
    verify: bool


async def receive(
    uri: str, options: ReceiveOptions, emit: Emit, on_listening: Callable[[str], None]
) -> Machine:
    """Wait for a source at `uri`, take its guest over, and return the machine (running, or paused
    if the source's was).

    `on_listening` is told the address once connections are taken (with the port that was chosen,
    for port 0). Raises UsageError, HostError (cannot listen), and for a migration that began and
    failed MigrationFailed, PeerError, StateFormatError.
    """
    token = trio.lowlevel.current_trio_token()

    def emit_from_thread(event: Event) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(emit, event)

    listener = Listener(parse_uri(uri))
    try:
        settle_memory()
        on_listening(str(listener.address))
        offer = await _first_offer(listener, options, emit)
    finally:
        listener.close()
    reception = _Reception(offer, emit_from_thread)
    try:
        await run_cancellable(reception.run, offer.channel.link.abort)
    except BaseException:
        if not reception.took_over:
            offer.machine.close()
        raise
    finally:
        offer.channel.link.close()
    return offer.machine


async def _first_offer(listener: Listener, options: ReceiveOptions, emit: Emit) -> _Offer:
    """Take connections until one of them brings a machine that can be built here."""
    offers: list[_Offer] = []
    building = trio.Lock()
    introducing: dict[trio.CancelScope, float] = {}
    """Since when; the first one has been at it the longest."""
    vacancies = trio.Semaphore(MAX_NEGOTIATING)

    async def room_for_one() -> None:
        """Before accepting: whoever connects and says nothing takes up no descriptors here."""
        if vacancies.value == 0 and listener.sock is not None:
            await trio.lowlevel.wait_readable(listener.sock)
            for limit, since in itertools.islice(introducing.items(), 1):
                limit.deadline = min(limit.deadline, since + GRACE_S)
        await vacancies.acquire()

    async def consider(link: Link, scope: trio.CancelScope) -> None:
        since = trio.current_time()
        try:
            with trio.fail_after(NEGOTIATION_TIMEOUT_S) as limit:
                introducing[limit] = since
                try:
                    channel, fields = await run_cancellable(lambda: _introduce(link), link.abort)
                finally:
                    del introducing[limit]
            async with building:
                if offers:
                    raise MigrationFailed("another source came first")
                offer = await trio.to_thread.run_sync(_prepare, channel, fields, options)
                offers.append(offer)
                scope.cancel()
                return
        except trio.TooSlowError:
            seconds = trio.current_time() - since
            reason: object = f"it did not introduce itself within {seconds:.1f} s"
        except MigrateError as error:
            reason = error
        except BaseException:
            link.close()
            raise
        finally:
            vacancies.release()
        why = str(reason).removeprefix(f"{link.peer}: ")
        emit(Log(f"a connection from {link.peer} was turned away: {why}"))
        link.close()
        if listener.sock is None:
            raise MigrationFailed(f"the connection {listener.address} was no use: {reason}")

    try:
        async with trio.open_nursery() as nursery:
            while True:
                await room_for_one()
                if listener.sock is not None:
                    await trio.lowlevel.wait_readable(listener.sock)
                try:
                    link = listener.accept()
                except LinkLost:
                    vacancies.release()
                    continue
                nursery.start_soon(consider, link, nursery.cancel_scope)
                if listener.sock is None:
                    await trio.sleep_forever()
    except BaseException as error:
        for offer in offers:
            offer.machine.close()
            offer.channel.link.close()
        if isinstance(error, BaseExceptionGroup):
            ours, others = error.split(MigrateError)
            if ours is not None and others is None:
                raise _first(ours) from None
        raise
    return offers[0]


def _first(group: BaseExceptionGroup[MigrateError]) -> MigrateError:
    error: BaseExceptionGroup[MigrateError] | MigrateError = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _introduce(link: Link) -> tuple[Channel, dict[str, Any]]:
    """Stream headers and the source's CONFIGURE. Raises PeerError, LinkLost."""
    channel = Channel(link, Role.DESTINATION)
    link.set_timeout(NEGOTIATION_TIMEOUT_S)
    try:
        channel.negotiate_untrusted()
        return channel, channel.expect_untrusted(
            FrameType.CONFIGURE, machine=dict, page_size=int, hash_seed=int, verify=bool
        )
    except PeerError as error:
        channel.give_up(error)
        raise
    except LinkLost as error:
        raise LinkLost(f"{error} (phase {channel.phase.value!r})") from None


def _prepare(channel: Channel, fields: dict[str, Any], options: ReceiveOptions) -> _Offer:
    """Build the machine and say so. Raises PeerError, StateFormatError, UsageError, HostError."""
    try:
        if fields["page_size"] != PAGE_SIZE:
            raise channel.breach(
                f"pages of {fields['page_size']} bytes; here they have {PAGE_SIZE}"
            )
        if not 0 <= fields["hash_seed"] < 1 << 64:
            raise channel.breach("the hash seed is out of range")
        definition = definition_from_untrusted(fields["machine"])
        check_admission(definition, local_source=channel.link.local, allowed=options.allowed)
        try:
            machine = options.make_machine(definition)
        except MigrateError:
            raise
        except Exception as error:  # a definition that nobody thought of
            raise HostError(f"the machine cannot be built here: {error!r}") from error
        try:
            channel.link.set_timeout(STALL_TIMEOUT_S)
            channel.send_map(FrameType.CONFIGURED)
        except BaseException:
            machine.close()
            raise
    except MigrateError as error:
        channel.give_up(error)
        raise
    return _Offer(channel, machine, fields["hash_seed"], fields["verify"])


class _Reception:
    """One migration into a machine that stands ready."""

    def __init__(self, offer: _Offer, emit: Emit) -> None:
        self._channel = offer.channel
        self._machine = offer.machine
        self._verify = offer.verify
        self._emit = emit
        self._hasher = PageHasher(offer.hash_seed)
        self._started_ns = time.monotonic_ns()
        self.took_over = False

    def run(self) -> None:
        """From the first round to the running guest (worker thread)."""
        channel, name = self._channel, self._machine.name
        try:
            self._rehearse()
            self._phase("rounds")
            receiver = PageReceiver(channel, self._hasher, self._machine.memory.slots)
            self._rounds(receiver)
            self._phase("switchover")
            with no_collection():
                running = self._load(receiver)
                # From here on the source does not run the guest again by itself.
                channel.expect_untrusted(FrameType.HANDOVER)
                self.took_over = True
                self._start(running)
        except LinkLost as error:
            raise MigrationFailed(
                f"machine {name!r} did not arrive, nothing was started: {error}"
                f" (phase {channel.phase.value!r})"
            ) from error
        except MigrateError as error:
            # In these phases an ERROR promises that nothing was started here, nor will be. Once
            # the guest may have run, silence leaves the decision to people.
            if not self.took_over:
                channel.give_up(error)
            raise

    def _rehearse(self) -> None:
        """Load the machine's own state once, so that in the downtime nothing happens for the first
        time: modules are imported, code and memory are warm.
        """
        state = wire.unpack_untrusted(wire.pack({"state": self._machine.save()}), "a rehearsal")
        self._machine.load_untrusted(state["state"])
        self._machine.save()  # what a state that is refused leads back to

    def _rounds(self, receiver: PageReceiver) -> None:
        """Pages until the source says that the rest is on its way, guest standing."""
        channel = self._channel
        while True:
            frame = channel.receive_untrusted()
            match frame.type:
                case FrameType.PAGES | FrameType.ZERO:
                    receiver.take_untrusted(frame)
                case FrameType.ROUND:
                    pass
                case FrameType.ROUND_END:
                    channel.send_map(FrameType.ROUND_ACK)
                    receiver.settle()
                case FrameType.FINAL:
                    return

    def _load(self, receiver: PageReceiver) -> bool:
        """The last pages and the state; LOADED once everything is here and right."""
        channel, machine = self._channel, self._machine
        frame = channel.receive_untrusted()
        while frame.type in (FrameType.PAGES, FrameType.ZERO):
            receiver.take_untrusted(frame)
            frame = channel.receive_untrusted()
        fields = channel.fields_untrusted(frame, state=dict, digests=list, running=bool)
        if self._verify:
            receiver.hashes.rehash()
        receiver.compare_untrusted(fields["digests"])
        try:
            machine.load_untrusted(fields["state"])
        except StateFormatError as error:
            raise StateFormatError(f"machine {machine.name!r}: {error}") from error
        except MigrateError:
            raise
        except Exception as error:  # a state that nobody thought of
            raise StateFormatError(f"machine {machine.name!r}: {error!r}") from error
        channel.send_map(FrameType.LOADED, verified=self._verify)
        return bool(fields["running"])

    def _start(self, running: bool) -> None:
        """Run the guest, then confirm; it runs even if the source is gone by now."""
        started = time.monotonic_ns()
        if running:
            self._machine.resume_now()
        elapsed = time.monotonic_ns() - started
        with contextlib.suppress(LinkLost):
            self._channel.send_map(FrameType.RUNNING, start_ns=elapsed)
        self._phase("running" if running else "paused")

    def _phase(self, name: str) -> None:
        self._emit(PhaseEntered(name, (time.monotonic_ns() - self._started_ns) / 1e6))

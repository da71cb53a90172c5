"""The source of a migration (layer 4).

`migrate_to` is the coroutine that others call: it gives time limits, cancellation and progress
events. The migration itself is `_Migration.run`, which reads top to bottom, one named phase after
another. It runs in a worker thread, because every step of it is one long kernel call: no hop
between threads is left in the downtime, and the guest's process keeps its GIL free.

Whatever fails before the handover, the guest resumes here as if nothing had been: leases give
their pages back, the cursors are closed, the next attempt starts afresh.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from migrate.accounts import Accounts
from migrate.channel import Channel, PeerGaveUp
from migrate.codec import CompressionChoice, PageHasher
from migrate.dirtylog import Cursor, Lease
from migrate.errors import (
    HandoverUncertain,
    MigrateError,
    MigrationFailed,
    NotConverging,
    PeerError,
)
from migrate.events import Event, Log, PhaseEntered
from migrate.machine import Machine
from migrate.policy import DowntimePolicy, Policy, RoundStats, Verdict
from migrate.report import Report
from migrate.sender import PageSender
from migrate.tasks import no_collection, run_cancellable
from migrate.transport import Address, Link, LinkLost, connect, parse_uri
from migrate.units import PAGE_SIZE
from migrate.wire import FrameType, Role

CURSOR = "migration"
CONNECT_TIMEOUT_S = 10.0
NEGOTIATION_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 30.0
"""A link that takes or gives nothing at all for so long is lost."""
STANDSTILL_TIMEOUT_S = 10.0
"""The same while the guest stands still for it, up to the handover."""
PROGRESS_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class SendOptions:
    """What `migrate send` lets one choose. `bandwidth`: bytes a second; `threads`: for zstd."""

    downtime_limit_ns: int = 300_000_000
    bandwidth: int | None = None
    compression: CompressionChoice = field(default_factory=CompressionChoice)
    threads: int | None = None
    max_rounds: int = 30
    timeout_ns: int | None = None
    verify: bool = False


Emit = Callable[[Event], None]


async def migrate_to(machine: Machine, uri: str, options: SendOptions, emit: Emit) -> Report:
    """Move `machine` to the destination that listens at `uri`.

    On return the guest runs there and `machine` is let go. Raises UsageError, HostError,
    MigrationFailed, NotConverging, PeerError: the guest then is as it was before (running, or
    paused if it was paused). HandoverUncertain: it is paused, see `session.py`. Cancelling is a
    failure like any other, until the handover.
    """
    token = trio.lowlevel.current_trio_token()

    def emit_from_thread(event: Event) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(emit, event)

    migration = _Migration(machine, parse_uri(uri), options, emit_from_thread)

    async def progress() -> None:
        while True:
            await trio.sleep(PROGRESS_INTERVAL_S)
            migration.emit_progress()

    async def beside() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(progress)
            if options.timeout_ns is not None:
                # The policy looks between rounds only; a round may take for ever.
                await trio.sleep(options.timeout_ns / 1e9)
                migration.abort(f"was not done within {options.timeout_ns / 1e9:g} s")

    return await run_cancellable(migration.run, migration.abort, beside)


class _Migration:
    """One attempt."""

    def __init__(
        self, machine: Machine, address: Address, options: SendOptions, emit: Emit
    ) -> None:
        self._machine = machine
        self._address = address
        self._options = options
        self._emit = emit
        self._slots = machine.memory.slots
        self._hasher = PageHasher(0)
        self._link: Link | None = None
        self._sender: PageSender | None = None
        self._aborted = ""
        """Why, if somebody called it off."""
        report = Report(
            ram_total_bytes=machine.definition.memory_bytes,
            downtime_limit_ms=options.downtime_limit_ns / 1e6,
            compression=str(options.compression),
        )
        self._accounts = Accounts(report, options.bandwidth)
        self._phase_name = ""
        self._handover_sent = False
        self._no_return = threading.Lock()
        """Held where a cancellation and the handover decide which of them came first."""
        self._was_running = False

    # -- what other threads may call

    def abort(self, why: str = "was cancelled") -> None:
        """Any thread: fail as soon as may be, unless the handover is under way."""
        with self._no_return:
            self._aborted = self._aborted or why
            if self._link is not None and not self._handover_sent:
                self._link.abort()

    def emit_progress(self) -> None:
        """Any thread."""
        sender, link = self._sender, self._link
        if sender is not None and link is not None:
            self._emit(self._accounts.progress(sender.pages_left, link.bytes_sent))

    # -- the migration, top to bottom (worker thread)

    def run(self) -> Report:
        machine, accounts = self._machine, self._accounts
        self._was_running = machine.meant_to_run
        accounts.begin()
        try:
            self._phase("connect")
            self._link = link = connect(self._address, self._patience_s(CONNECT_TIMEOUT_S))
            try:
                self._migrate(Channel(link, Role.SOURCE))
            finally:
                link.close()
        except BaseException as error:
            failure = self._failure(error)
            accounts.ended(failure)
            if not isinstance(failure, HandoverUncertain) and self._was_running:
                machine.resume_now()
            if failure is error:
                raise
            raise failure from error
        accounts.ended(None, link.bytes_sent)
        return accounts.report

    def _migrate(self, channel: Channel) -> None:
        """The phases over a connected link. Whatever fails, the peer is told, if it can be."""
        link = channel.link
        if self._aborted:
            link.abort()
        try:
            with contextlib.ExitStack() as stack:
                self._phase("negotiate")
                link.set_timeout(NEGOTIATION_TIMEOUT_S)
                channel.negotiate_untrusted()
                self._phase("configure")
                self._configure(channel)
                # Before the first page: whatever is written from now on will be dirty.
                cursors = self._machine.cursors(CURSOR)
                for cursor in cursors:
                    stack.callback(cursor.close)
                self._sender = PageSender(
                    channel,
                    self._hasher,
                    self._slots,
                    self._options.compression,
                    self._options.threads,
                    self._options.bandwidth,
                )
                stack.callback(self._sender.close)
                self._accounts.report.setup_ms = self._accounts.ms()
                self._phase("rounds")
                leases = self._rounds(channel, cursors)
                self._phase("switchover")
                with no_collection():
                    self._switch_over(channel, cursors, leases)
        except BaseException as error:
            if not isinstance(error, LinkLost):
                channel.give_up(self._failure(error))
            raise

    def _configure(self, channel: Channel) -> None:
        """The machine's definition; the destination builds it and answers."""
        seed = secrets.randbits(64)
        self._hasher = PageHasher(seed)
        channel.send_map(
            FrameType.CONFIGURE,
            machine=self._machine.definition.to_portable(),
            page_size=PAGE_SIZE,
            hash_seed=seed,
            verify=self._options.verify,
        )
        # Building a large machine may take a while, so the stall timeout applies.
        channel.link.set_timeout(STALL_TIMEOUT_S)
        channel.expect_untrusted(FrameType.CONFIGURED)

    def _rounds(self, channel: Channel, cursors: list[Cursor]) -> list[Lease]:
        """Pre-copy. Returns the leases of the harvest after which the policy said: switch over."""
        sender = self._sender
        assert sender is not None
        policy: Policy = DowntimePolicy(
            self._options.downtime_limit_ns,
            self._options.max_rounds,
            self._accounts.started_ns,
            self._options.timeout_ns,
        )
        for cursor in cursors:
            cursor.mark_all()
        leases = _harvest(cursors)
        number = 0
        while True:
            with contextlib.ExitStack() as leased:
                for lease in leases:
                    leased.enter_context(lease)  # any failure in here gives the pages back
                stats = self._send_round(channel, sender, leases, number)
            leases = _harvest(cursors)
            pages_left = sum(lease.count for lease in leases)
            stats = RoundStats(
                number, stats.pages_sent, stats.bytes_sent, stats.elapsed_ns, pages_left
            )
            decision = self._accounts.decide(policy, stats)
            if decision.verdict is Verdict.SWITCH_OVER:
                self._emit(Log(f"switching over after round {number}: {decision.reason}"))
                return leases
            if decision.verdict is Verdict.GIVE_UP:
                for lease in leases:
                    lease.restore()
                raise NotConverging(
                    f"machine {self._machine.name!r} was not migrated: {decision.reason}. The guest"
                    " runs on here; allow more with --downtime-limit, or slow the guest down"
                )
            number += 1

    def _send_round(
        self, channel: Channel, sender: PageSender, leases: list[Lease], number: int
    ) -> RoundStats:
        """Send what the leases hold and wait until the destination has it."""
        assert self._link is not None
        started_ns = time.monotonic_ns()
        bytes_before, sent_before = self._link.bytes_sent, sender.pages_sent
        zero_before = sender.pages_zero
        count = sum(lease.count for lease in leases)
        sender.pages_left = count
        channel.send_map(FrameType.ROUND, number=number, pages=count)
        for index, lease in enumerate(leases):
            bitmap = lease.bitmap
            if number == 0:
                # Nothing has ever written these: the destination's memory starts as zeros too.
                untouched = self._slots[index].never_touched() & bitmap
                bitmap = bitmap & ~untouched
                sender.skip(index, untouched, self._slots[index].spec.backing)
            sender.send(index, lease.memory, bitmap)
        channel.send_map(FrameType.ROUND_END, number=number)
        channel.expect_untrusted(FrameType.ROUND_ACK)
        elapsed_ns = time.monotonic_ns() - started_ns
        done = self._accounts.sent(
            count, sender.pages_zero - zero_before, self._link.bytes_sent - bytes_before, elapsed_ns
        )
        self._emit(done)
        return RoundStats(number, sender.pages_sent - sent_before, done.bytes_sent, elapsed_ns, 0)

    def _switch_over(self, channel: Channel, cursors: list[Cursor], leases: list[Lease]) -> None:
        """Stop the guest, send the rest and the state, hand over: the downtime."""
        machine, sender, report = self._machine, self._sender, self._accounts.report
        assert sender is not None
        if not self._options.verify:  # hashing all of a large memory may take its time
            channel.link.set_timeout(STANDSTILL_TIMEOUT_S)
        sender.digests()  # all but the last pages', while the guest still runs
        marks = [time.monotonic_ns()]
        machine.pause_now()
        marks.append(time.monotonic_ns())
        with contextlib.ExitStack() as leased:
            for lease in leases:
                leased.enter_context(lease)
            last = _harvest(cursors)
            for lease in last:
                leased.enter_context(lease)
            marks.append(time.monotonic_ns())
            report.pages_remaining = 0
            channel.send_map(FrameType.FINAL)
            sent_before, zero_before = sender.pages_sent, sender.pages_zero
            bytes_before = channel.link.bytes_sent
            for index, (before, after) in enumerate(zip(leases, last, strict=True)):
                sender.send(index, after.memory, before.bitmap | after.bitmap, paced=False)
            marks.append(time.monotonic_ns())
            zero = sender.pages_zero - zero_before
            self._accounts.sent(
                sender.pages_sent - sent_before + zero,
                zero,
                channel.link.bytes_sent - bytes_before,
                marks[-1] - marks[-2],
            )
            if self._options.verify:
                sender.hashes.rehash()
            channel.send_map(
                FrameType.STATE,
                state=machine.save(),
                running=self._was_running,
                digests=sender.digests(),
            )
            loaded = channel.expect_untrusted(FrameType.LOADED, verified=bool)
            if self._options.verify and not loaded["verified"]:
                raise channel.breach("it did not verify what it was asked to verify")
            marks.append(time.monotonic_ns())
        started_ns = self._hand_over(channel)
        marks.append(time.monotonic_ns())
        report.verified = loaded["verified"]
        self._accounts.moved(marks, started_ns, sender)

    def _hand_over(self, channel: Channel) -> int:
        """The point of no return. Returns how long the destination took to start, in ns.

        Whatever goes wrong in here, the guest does not run on here by itself, with two exceptions:
        not a byte of HANDOVER went out, or the destination's ERROR says that it starts nothing.
        """
        with self._no_return:
            if self._aborted:
                raise self._called_off()
            self._handover_sent = True
        # Now patience costs less than an outcome that people have to find out.
        channel.link.set_timeout(STALL_TIMEOUT_S)
        before = channel.link.bytes_sent
        try:
            channel.send_map(FrameType.HANDOVER)
            running = channel.expect_untrusted(FrameType.RUNNING, start_ns=int)
            self._machine.let_go()
        except Exception as error:
            if isinstance(error, PeerGaveUp) or channel.link.bytes_sent == before:
                self._handover_sent = False
                raise
            raise HandoverUncertain(
                f"the handover of machine {self._machine.name!r} was not confirmed ({error}). It is"
                " paused here. Look at the destination: if the guest runs there, `migrate stop` it"
                " here; if not, `migrate resume` it here"
            ) from error
        return max(0, int(running["start_ns"]))

    # -- small things

    def _phase(self, name: str) -> None:
        self._phase_name = name
        self._emit(PhaseEntered(name, self._accounts.ms()))

    def _patience_s(self, seconds: float) -> float:
        """No longer than all of the migration may take."""
        limit_ns = self._options.timeout_ns
        return seconds if limit_ns is None else min(seconds, limit_ns / 1e9)

    def _failure(self, error: BaseException) -> BaseException:
        """The error to report: which machine, and where its guest is."""
        name = self._machine.name
        if isinstance(error, LinkLost):
            if self._aborted:
                return self._called_off()
            return MigrationFailed(
                f"machine {name!r} was not migrated, it stays here: {error}"
                f" (phase {self._phase_name!r})"
            )
        if isinstance(error, (MigrateError, PeerError)) or not isinstance(error, Exception):
            return error
        return MigrationFailed(f"machine {name!r} was not migrated, it stays here: {error!r}")

    def _called_off(self) -> MigrationFailed:
        where = f" (phase {self._phase_name!r})" if self._phase_name else ""
        return MigrationFailed(
            f"the migration of machine {self._machine.name!r} {self._aborted}{where}; it stays here"
        )


def _harvest(cursors: list[Cursor]) -> list[Lease]:
    """One lease a slot; if one harvest fails, the others get their pages back."""
    leases: list[Lease] = []
    try:
        for cursor in cursors:
            leases.append(cursor.harvest())
    except BaseException:
        for lease in leases:
            lease.restore()
        raise
    return leases

"""Harts taking turns on one core (layer 2): who runs, for how long, and what happens when none can.

Round robin over the harts that do not wait for an interrupt. When all wait, a real-time machine
sleeps until the nearest timer, a post or a stop, and a deterministic one jumps to that timer.

In a deterministic machine a turn ends only where the guest's own execution says so, and each
begins with an empty TLB: where it is stopped, saved and carried on elsewhere then leaves no trace.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from migrate.errors import GuestError, StateFormatError
from migrate.vm.clock import BYTES_PER_TICK, NS_PER_TICK, Clock
from migrate.vm.core import Exit, Reason, VcpuCore
from migrate.vm.devices.base import TimedDevice
from migrate.vm.sbi import Sbi
from migrate.vm.state import Field, Stateful

LONE_TURN_NS: Final = 10_000_000
"""A single hart shares with nobody; it comes back for the console's output."""
UNLIMITED: Final = 1 << 62
_CARRY_ON: Final = frozenset({Reason.BUDGET, Reason.DEADLINE, Reason.STOPPED, Reason.TURN})


class Scheduler(Stateful):
    """`run` is for the vcpu thread, `stop` and `post` are for any; the rest is for hooks."""

    KIND = "scheduler"
    VERSION = 1
    FIELDS = (
        Field("last_hart", int, bits=8),
        Field("waiting", list, bits=1, max_length=64),
    )

    def __init__(
        self,
        core: VcpuCore,
        clock: Clock,
        *,
        deterministic: bool,
        turn_ns: int,
        after_turn: Callable[[], None],
    ) -> None:
        self._core = core
        self._clock = clock
        self._deterministic = deterministic
        self._turn_ns = turn_ns if core.harts > 1 or deterministic else LONE_TURN_NS
        self._after_turn = after_turn
        self._timed: Sequence[TimedDevice] = ()
        self._sbi: Sbi | None = None
        self._wake = threading.Condition()
        self._posts: deque[Callable[[], object]] = deque()
        self._stop = False
        self._leave = False
        self._in_core = False
        self._slice_end = 0
        """Guest ticks at which the running slice ends at the latest."""
        self.turns = 0
        self.idle_ns = 0
        self.reset()

    def connect(self, timed: Sequence[TimedDevice], sbi: Sbi | None) -> None:
        """The devices with timers, and the keeper of started and stopped harts."""
        self._timed = timed
        self._sbi = sbi

    def reset(self) -> None:
        """All harts ready, hart 0 first."""
        self.last_hart = self._core.harts - 1
        self.waiting = [0] * self._core.harts
        self._turn_end_ns = 0

    def after_load(self) -> None:
        if len(self.waiting) != self._core.harts or self.last_hart >= self._core.harts:
            raise StateFormatError("scheduler: state of another number of harts")
        self._turn_end_ns = 0

    # -- any thread

    def stop(self) -> None:
        """Make the running or the next `run` return, soon and once."""
        with self._wake:
            self._stop = True
            self._wake.notify()
        if not self._deterministic:
            self._core.stop()

    def post(self, work: Callable[[], object]) -> None:
        """Call `work` on the vcpu thread at the next boundary; wakes a machine asleep."""
        with self._wake:
            self._posts.append(work)
            self._wake.notify()
        if not self._deterministic:
            self._core.stop()

    # -- hooks and the vcpu thread

    def rearm(self) -> None:
        """A timer may be due earlier than what the running slice was made for."""
        if self._in_core:
            due = self._next_due()
            if due is not None and due < self._slice_end:
                self._core.end_turn()

    def set_irq(self, hart: int, mask: int, value: int) -> None:
        """As the core's; a hart other than the running one gets its turn at once."""
        self._core.set_irq(hart, mask, value)
        if value and self._in_core and hart != self._core.current:
            self.end_turn()

    def end_turn(self) -> None:
        """From a hook: the next hart goes on."""
        self._turn_end_ns = 0
        if self._in_core:
            self._core.end_turn()

    def wait_for_interrupt(self) -> None:
        """From a hook: the running hart waits as in WFI."""
        self.waiting[self._core.current] = 1
        self.end_turn()

    def leave(self) -> None:
        """From a hook or a post: `run` returns at the next boundary."""
        self._leave = True
        if self._in_core:
            self._core.end_turn()

    # -- the vcpu thread

    def run(self) -> bool:
        """Run harts until stopped (True) or told to `leave` (False). Raises GuestError."""
        self._clock.thaw()
        try:
            while True:
                while self._posts:
                    self._posts.popleft()()
                if self._leave:
                    self._leave = False
                    return False
                if self._stop:
                    self._stop = False
                    return True
                due = self._next_due()
                if due is not None:
                    now = self._clock.now()
                    if now >= due:
                        for device in self._timed:
                            device.tick(now)
                        continue
                hart = self._pick()
                if hart is None:
                    self._after_turn()
                    self._idle(due)
                else:
                    self._slice(hart, due)
        finally:
            self._clock.freeze()
            self._after_turn()

    def drain(self) -> None:
        """Do what was posted and not yet done (the machine stands still)."""
        while self._posts:
            self._posts.popleft()()

    def _next_due(self) -> int | None:
        earliest = None
        for device in self._timed:
            due = device.next_tick()
            if due is not None and (earliest is None or due < earliest):
                earliest = due
        return earliest

    def _pick(self) -> int | None:
        """Whose turn it is: the last hart's while its time is not up, else the next one's."""
        harts = self._core.harts
        hart = self.last_hart
        if self._turn_end_ns <= time.monotonic_ns():
            hart += 1
            self._turn_end_ns = 0
        for step in range(harts):
            candidate = (hart + step) % harts
            if self._sbi is not None and not self._sbi.runnable(candidate):
                continue
            if self.waiting[candidate]:
                if not self._core.irq_wakes(candidate):
                    continue
                self.waiting[candidate] = 0
            return candidate
        return None

    def _slice(self, hart: int, due: int | None) -> None:
        if hart != self.last_hart or not self._turn_end_ns:
            self.last_hart = hart
            self._turn_end_ns = time.monotonic_ns() + self._turn_ns
            self.turns += 1
        if self._core.current != hart:
            self._core.select(hart)
        if self._sbi is not None:
            self._sbi.enter(hart)
        ended = self._run_deterministic(due) if self._deterministic else self._run_real(due)
        self._in_core = False
        self._after_turn()
        if ended.reason is Reason.WFI:
            self.waiting[hart] = 1
            self._turn_end_ns = 0
        elif ended.reason not in _CARRY_ON:
            raise GuestError(f"hart {hart} cannot go on at pc {ended.pc:#x}: {ended.detail}")

    def _run_real(self, due: int | None) -> Exit:
        deadline_ns = self._turn_end_ns
        if due is not None:
            deadline_ns = min(deadline_ns, time.monotonic_ns() + self._clock.ns_until(due))
        left_ns = max(deadline_ns - time.monotonic_ns(), 0)
        self._slice_end = self._clock.now() + left_ns // NS_PER_TICK
        self._in_core = True
        return self._core.run(UNLIMITED, deadline_ns)

    def _run_deterministic(self, due: int | None) -> Exit:
        budget = self._turn_ns // NS_PER_TICK * BYTES_PER_TICK
        if due is not None:
            budget = min(budget, self._clock.code_until(due))
        self._slice_end = self._clock.now() + budget // BYTES_PER_TICK
        self._turn_end_ns = 0
        self._core.owe_tlb_flush(self._core.current)
        self._in_core = True
        return self._core.run(budget)

    def _idle(self, due: int | None) -> None:
        if self._deterministic and due is not None:
            self._clock.jump_to(due)
            return
        timeout_s = None if due is None else self._clock.ns_until(due) / 1e9
        began = time.monotonic_ns()
        with self._wake:
            if not (self._posts or self._stop):
                self._wake.wait(timeout_s)
        self.idle_ns += time.monotonic_ns() - began

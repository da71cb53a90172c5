"""A machine: guest memory, board, dirty logs, and the thread that runs the vcpus (layer 4).

The vcpu thread does nothing but `Board.run`; everybody else speaks to it through `pause`,
`resume` and `Board.post`. It spends its life inside the engine, without the GIL, and comes back
for traps and devices: hence the small switch interval, without which any Python that runs beside
it would hold the guest up for 5 ms a trap.

What the machine does not do: migrate itself (source, destination), listen to anybody (daemon).
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import trio

from migrate.dirtylog import Cursor, DirtyLog, open_log
from migrate.errors import GuestError, MachineStateError, MigrateError
from migrate.vm.board import Board, StopReason
from migrate.vm.console import Console
from migrate.vm.definition import MachineDefinition
from migrate.vm.memory import GuestMemory, MemorySlot
from migrate.vm.reserve import MemoryReserve
from migrate.vm.state import PortableState

SWITCH_INTERVAL_S = 50e-6
"""How long a thread may hold the GIL against another that wants it. At the default of 5 ms a
pure-Python thread beside a booted Linux guest slows it 50 times, at 50 µs 3 times."""

STOP_TIMEOUT_S = 30.0
"""A vcpu thread that has not stopped by then hangs in a device or the engine."""


class State(enum.Enum):
    PAUSED = "paused"
    RUNNING = "running"
    SHUTDOWN = "shutdown"
    """The guest switched itself off."""
    FAILED = "failed"
    """The machine cannot carry on; `Machine.failure` says why."""
    MIGRATED = "migrated"
    """The guest runs elsewhere now: never again here."""


ENDED = frozenset({State.SHUTDOWN, State.FAILED, State.MIGRATED})


@dataclass(slots=True)
class MachineStats:
    """Counters of the machine itself; those of the guest are the board's."""

    starts: int = 0
    stopped_ns: int = 0
    """CLOCK_MONOTONIC when the vcpus last came to stand still."""
    started_ns: int = 0
    """CLOCK_MONOTONIC when they last began to run."""
    paused_total_ns: int = 0
    """Standing still between two runs, summed up."""


class Machine:
    """One guest and all that belongs to it. Made paused; `start` runs it.

    Takes over `memory` and `board` and closes them. `pause`, `resume` and `ended` are for trio
    tasks; `pause_now`, `resume_now` and everything else are for any thread.
    """

    def __init__(self, definition: MachineDefinition, memory: GuestMemory, board: Board) -> None:
        self.definition = definition
        self.memory = memory
        self.board = board
        self.failure: BaseException | None = None
        self.counters = MachineStats()
        self._logs: dict[int, DirtyLog] = {}
        self._changed = threading.Condition()
        self._state = State.PAUSED
        self._run = False
        """Whether the vcpus are to run; `_state` follows."""
        self._closing = False
        self._watchers: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        # Made now, so that a migration's downtime does not hold the making of a thread. A daemon
        # thread: the process may end while the guest loops in native code.
        self._thread: threading.Thread | None = threading.Thread(
            target=self._vcpu_main, name=f"vcpu-{self.name}", daemon=True
        )
        self._thread.start()
        # The interpreter must not be taken down under a running engine. (The engine binding's own
        # finalisers were registered before this, so they come after it.)
        atexit.register(self.close)

    @classmethod
    def create(
        cls,
        definition: MachineDefinition,
        console: Console,
        *,
        prealloc: bool = False,
        reserve: MemoryReserve | None = None,
        native: bool | None = None,
    ) -> Machine:
        """Memory and board of `definition`; nothing is loaded, the machine is paused.

        `prealloc` touches all of the RAM now; `reserve` has been touched before and becomes the
        largest slot of it. Raises UsageError and HostError.
        """
        largest = max(spec.size_bytes for spec in definition.slots)
        memory = GuestMemory()
        try:
            for spec in definition.slots:
                fits = reserve if spec.size_bytes == largest else None
                memory.add(spec, prealloc=prealloc, reserve=fits)
            board = Board(definition, memory, console=console, native=native)
        except BaseException:
            memory.close()
            raise
        return cls(definition, memory, board)

    # -- state

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def state(self) -> State:
        return self._state

    @property
    def meant_to_run(self) -> bool:
        """Whether the vcpus run, or will as soon as their thread comes to it."""
        with self._changed:
            return self._run and self._state not in ENDED

    def start(self) -> None:
        """Run the vcpus; returns at once. Raises MachineStateError when the guest has ended."""
        with self._changed:
            self._refuse_ended("start")
            self._run = True
            self._tell()

    async def resume(self) -> None:
        """As `start`, and wait until the vcpus run. Does nothing when they do."""
        self.start()
        await self._until(self._start_settled)
        self._check_started()

    def resume_now(self) -> None:
        """As `resume`, for a thread that is not trio's: blocks until the vcpus run."""
        self.start()
        self._wait(self._start_settled)
        self._check_started()

    async def pause(self) -> None:
        """Stop the vcpus at an instruction boundary; when this returns they stand still.

        Does nothing when they do. A guest that ends meanwhile is a MachineStateError.
        """
        self._begin_pause()
        await self._until(self._pause_settled)
        self._check_paused()

    def pause_now(self) -> None:
        """As `pause`, for a thread that is not trio's: blocks until the vcpus stand still."""
        self._begin_pause()
        self._wait(self._pause_settled)
        self._check_paused()

    def _begin_pause(self) -> None:
        with self._changed:
            self._refuse_ended("pause")
            self._run = False
            self._tell()
            if self._state is State.RUNNING:
                self.board.stop()

    # A pause and a resume that cross: whoever came first is told that it was taken back.

    def _pause_settled(self) -> bool:
        return self._state is not State.RUNNING or self._run

    def _check_paused(self) -> None:
        with self._changed:
            self._refuse_ended("pause")
            if self._state is State.RUNNING:
                raise MachineStateError(f"machine {self.name!r} was resumed while it was paused")

    def _start_settled(self) -> bool:
        return self._state is not State.PAUSED or not self._run

    def _check_started(self) -> None:
        if self._state is State.FAILED:
            self.raise_failure()
        if self._state is State.PAUSED:
            raise MachineStateError(f"machine {self.name!r} was paused while it was resumed")

    async def ended(self) -> State:
        """Wait until the guest has shut down, failed, or runs elsewhere."""
        await self._until(lambda: self._state in ENDED, timeout_s=None)
        return self._state

    def let_go(self) -> None:
        """The guest runs elsewhere from now on: this machine never runs again.

        For the source of a migration, once the destination has confirmed that it holds
        everything. Raises MachineStateError unless paused.
        """
        with self._changed:
            self._refuse_running("let go of")
            self._set_state(State.MIGRATED)

    def raise_failure(self) -> None:
        """Raise what made the machine fail, if it did."""
        if isinstance(self.failure, MigrateError):
            raise self.failure
        if self.failure is not None:
            raise GuestError(f"machine {self.name!r} failed: {self.failure!r}") from self.failure

    # -- state that travels

    def save(self) -> PortableState:
        """Harts, devices and clock; not the memory. What the guest wrote to its disks is stable.

        Raises MachineStateError unless paused, HostError.
        """
        with self._changed:
            self._refuse_running("save")
        self.board.quiesce()
        return self.board.save()

    def load_untrusted(self, state: object) -> None:
        """Take over what `save` gave elsewhere. Raises StateFormatError, MachineStateError."""
        with self._changed:
            self._refuse_running("load")
        self.board.load_untrusted(state)

    # -- dirty logs

    def log(self, slot: MemorySlot) -> DirtyLog:
        """The slot's dirty log, opened when first asked for."""
        with self._changed:
            if slot.index not in self._logs:
                self._logs[slot.index] = open_log(slot)
            return self._logs[slot.index]

    def cursors(self, name: str) -> list[Cursor]:
        """A new cursor of this name on each slot's log, in the order of `memory.slots`."""
        made: list[Cursor] = []
        try:
            for slot in self.memory.slots:
                made.append(self.log(slot).cursor(name))
        except BaseException:
            for cursor in made:
                cursor.close()
            raise
        return made

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[list[Cursor]]:
        """`cursors`, closed at the end of the block."""
        cursors = self.cursors(name)
        try:
            yield cursors
        finally:
            for cursor in cursors:
                cursor.close()

    @property
    def stats(self) -> dict[str, Any]:
        """Counters of machine, guest and logs, as plain values."""
        return {
            "state": self._state.value,
            "machine": asdict(self.counters),
            "board": self.board.stats,
            "logs": {
                slot.spec.name: {
                    "backend": log.backend,
                    "cursors": {
                        cursor.name: {"epoch": cursor.epoch, "pages": cursor.count()}
                        for cursor in log.cursors
                    },
                }
                for slot in self.memory.slots
                if (log := self._logs.get(slot.index)) is not None
            },
        }

    # -- end

    def close(self) -> None:
        """Stop the vcpus for good and give everything back. Any number of times."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._run = False
            thread, self._thread = self._thread, None
            if self._state is State.RUNNING:
                self.board.stop()
            self._changed.notify_all()
        if thread is not None:
            thread.join(STOP_TIMEOUT_S)
            if thread.is_alive():
                # Unmapping memory under a running engine would take the process down.
                return
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        self.board.close()
        self.memory.close()

    # -- the vcpu thread

    def _vcpu_main(self) -> None:
        while self._may_run():
            try:
                reason = self.board.run()
                failure = None
            except BaseException as error:  # whoever waits for the machine is told
                reason, failure = None, error
            now = time.monotonic_ns()
            with self._changed:
                self.counters.stopped_ns = now
                if failure is not None:
                    self.failure = failure
                    self._set_state(State.FAILED)
                elif reason is StopReason.SHUTDOWN:
                    self._set_state(State.SHUTDOWN)
                elif not self._run:
                    self._set_state(State.PAUSED)
                # else a stop that was asked for has been taken back: run on.

    def _may_run(self) -> bool:
        """Wait for the word to run. False when the thread is to end."""
        with self._changed:
            while not (self._run or self._closing) and self._state not in ENDED:
                self._changed.wait()
            if self._closing or self._state in ENDED:
                return False
            if self._state is not State.RUNNING:
                now = time.monotonic_ns()
                if self.counters.starts:
                    self.counters.paused_total_ns += now - self.counters.stopped_ns
                self.counters.starts += 1
                self.counters.started_ns = now
                self._set_state(State.RUNNING)
            return True

    # -- waiting (with self._changed held, where a name begins with _set or _refuse)

    def _set_state(self, state: State) -> None:
        self._state = state
        self._tell()

    def _tell(self) -> None:
        """Whoever waits looks again."""
        self._changed.notify_all()
        for token, event in self._watchers:
            # The watcher's loop may be over: then nobody waits any more.
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(event.set)
        self._watchers.clear()

    def _refuse_ended(self, verb: str) -> None:
        if self._state in ENDED or self._closing:
            what = "is closed" if self._closing else _ENDED_TEXT[self._state]
            raise MachineStateError(f"cannot {verb} machine {self.name!r}: it {what}")

    def _refuse_running(self, verb: str) -> None:
        if self._state is State.RUNNING:
            raise MachineStateError(f"cannot {verb} machine {self.name!r} while it runs: pause it")
        if self._state is State.MIGRATED or self._closing:
            self._refuse_ended(verb)

    def _wait(self, reached: Callable[[], bool]) -> None:
        """Wait, in a thread that may block, until `reached()`."""
        with self._changed:
            if not self._changed.wait_for(reached, timeout=STOP_TIMEOUT_S):
                raise self._hangs()

    async def _until(
        self, reached: Callable[[], bool], timeout_s: float | None = STOP_TIMEOUT_S
    ) -> None:
        """Wait, as a trio task, until `reached()`. Not to be cancelled when it has a timeout:
        a pause that was begun and not awaited would leave the guest standing for nobody.
        """
        token = trio.lowlevel.current_trio_token()
        with trio.CancelScope(
            shield=timeout_s is not None,
            deadline=trio.current_time() + (timeout_s or float("inf")),
        ) as scope:
            while True:
                event = trio.Event()
                with self._changed:
                    if reached():
                        break
                    self._watchers.append((token, event))
                try:
                    await event.wait()
                finally:
                    with self._changed:
                        self._watchers = [pair for pair in self._watchers if pair[1] is not event]
        if scope.cancelled_caught:
            raise self._hangs()

    def _hangs(self) -> MachineStateError:
        return MachineStateError(
            f"the vcpus of machine {self.name!r} did not answer within {STOP_TIMEOUT_S:.0f} s"
        )


_ENDED_TEXT = {
    State.SHUTDOWN: "has shut down",
    State.FAILED: "has failed",
    State.MIGRATED: "has been migrated; the guest runs at the destination",
}

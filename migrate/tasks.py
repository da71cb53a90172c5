"""Small things for tasks: their errors, blocking work beside them, no collector (layer 4)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import trio

T = TypeVar("T")


@contextlib.asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery out of which a single error comes as itself, not as a group of one.

    Errors of this package carry exit codes and messages for the user: callers catch them by
    class. Several errors at once stay a group, cancellations beside an error are left out.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise single(group) from None


def single(error: BaseException) -> BaseException:
    """The one error in a group (of groups) of one, cancellations not counted."""
    while isinstance(error, BaseExceptionGroup):
        _, rest = error.split(trio.Cancelled)
        if rest is None:
            return error.exceptions[0] if len(error.exceptions) == 1 else error
        if len(rest.exceptions) != 1:
            return rest
        error = rest.exceptions[0]
    return error


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector out of a downtime: it may take longer than all of the rest."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def settle_memory() -> None:
    """What has been made by now stays: later collections need not look through it. A full one over
    all imported modules holds the GIL for tens of milliseconds, and with it the guest's console.
    """
    gc.collect()
    gc.freeze()


async def run_cancellable(
    work: Callable[[], T],
    abort: Callable[[], None],
    beside: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """`work()` in a worker thread. If the caller is cancelled, `abort()` is called, which has to
    make the work end soon; cancellation goes on once it has. What the work raises comes out as it
    is. `beside` runs as a task for as long as the work goes on.
    """
    finished = trio.Event()

    async def watch() -> None:
        try:
            await finished.wait()
        except trio.Cancelled:
            if not finished.is_set():
                abort()
            raise

    results: list[T] = []
    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        if beside is not None:
            nursery.start_soon(beside)
        with trio.CancelScope(shield=True):
            try:
                results.append(await trio.to_thread.run_sync(work))
            except Exception as error:  # raised below, outside of the nursery's exception group
                errors.append(error)
        finished.set()
        nursery.cancel_scope.cancel()
    if errors:
        raise errors[0]
    return results[0]

"""Blocking work beside trio (layer 4): one helper that source and destination share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


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

"""Small things for trio tasks (layer 3)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio


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
